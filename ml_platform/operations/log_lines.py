"""Log formatter of MLflow's server, by ML_PLATFORM_LOG_FORMAT."""

from __future__ import annotations

import logging

from ml_platform.settings import load_settings


def formatter() -> logging.Formatter:
    """Create a formatter for a logging configuration: text, or JSON lines with the same keys as Dagster's servers."""
    if load_settings().log_format == "text":
        return logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s")
    from structlog import processors as p
    from structlog import stdlib

    timestamp = p.TimeStamper(fmt="iso", utc=True)
    return stdlib.ProcessorFormatter(
        foreign_pre_chain=[stdlib.add_logger_name, stdlib.add_log_level, timestamp, p.format_exc_info],
        processors=[stdlib.ProcessorFormatter.remove_processors_meta, p.JSONRenderer()],
    )
