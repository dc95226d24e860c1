"""Log lines of MLflow's and Dagster's servers by ML_PLATFORM_LOG_FORMAT.

``python -m ml_platform.operations.log_lines COMMAND …`` runs a command of Dagster with them.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points

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


def configure_root_logger() -> None:
    """Write what no other handler writes in the same format.

    Dagster's storage reports that PostgreSQL does not answer by ``logging.warning``. Without a handler of the root
    logger, that adds one, which repeats all later lines of Dagster's loggers as text (dagster-io/dagster#23732).
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter())
    handler.addFilter(lambda record: not _has_other_handler(record.name))
    logging.getLogger().addHandler(handler)


def _has_other_handler(name: str) -> bool:
    """Whether a logger or one above it, but for the root logger, has a handler."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger is not logging.root:
        if logger.handlers:
            return True
        logger = logger.parent
    return False


def main() -> None:
    """Run the command that the arguments name in this process."""
    scripts = entry_points(group="console_scripts", name=sys.argv[1] if sys.argv[1:] else "")
    if not scripts:
        sys.exit("log_lines: name a command, e.g. python -m ml_platform.operations.log_lines dagster-daemon run")
    configure_root_logger()
    del sys.argv[0]
    (script,) = scripts
    script.load()()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a run, which the code server starts by multiprocessing
    configure_root_logger()
