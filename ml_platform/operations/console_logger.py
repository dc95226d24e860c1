"""Console logger of runs: Dagster's own, without the stack of a Failure, which says in words what is wrong."""

import logging

import dagster as dg


def drop_stack_of_failure(record: logging.LogRecord) -> bool:
    """Cut the stack trace off the message of a step or run that ended with dagster.Failure."""
    event = getattr(record, "dagster_event", None)
    error = getattr(event.event_specific_data, "error", None) if event else None
    if error is not None and error.cls_name == "Failure":
        record.msg = str(record.msg).partition("\n\nStack Trace:")[0]
    return True


@dg.logger(dg.colored_console_logger.config_schema, description="Dagster's console logger, with short failures.")
def console_logger(init_context: dg.InitLoggerContext) -> logging.Logger:
    logger = dg.colored_console_logger.logger_fn(init_context)
    logger.addFilter(drop_stack_of_failure)
    return logger
