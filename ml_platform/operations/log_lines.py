"""Log lines of programs that are not Dagster's, in the format that ML_PLATFORM_LOG_FORMAT names."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

from ml_platform.settings import load_settings


class JsonLines(logging.Formatter):
    """An object a line, with the keys that Dagster's servers use for theirs."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "event": record.getMessage(),
            "logger": record.name,
            "level": record.levelname.lower(),
            "timestamp": datetime.fromtimestamp(record.created, timezone.utc).isoformat().replace("+00:00", "Z"),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def formatter() -> logging.Formatter:
    """For the configuration of Python's logging."""
    if load_settings().log_format == "json":
        return JsonLines()
    return logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s")
