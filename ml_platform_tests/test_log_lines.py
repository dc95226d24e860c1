"""Log lines of MLflow's server."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from ml_platform.operations.log_lines import formatter


def line(message: str, *values: object) -> str:
    error = sys.exc_info() if sys.exc_info()[0] else None
    return formatter().format(logging.LogRecord("uvicorn.access", logging.INFO, __file__, 1, message, values, error))


def test_lines_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML_PLATFORM_LOG_FORMAT", "json")
    entry = json.loads(line('GET "%s"\n%d', "/é", 200))
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {"event": 'GET "/é"\n200', "logger": "uvicorn.access", "level": "info"}
    try:
        raise RuntimeError("it broke")
    except RuntimeError:
        with_traceback = line("GET %s", "/")
    assert "\n" not in with_traceback
    assert "RuntimeError: it broke" in json.loads(with_traceback)["exception"]


def test_lines_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML_PLATFORM_LOG_FORMAT", "text")
    assert line("GET %s", "/").endswith(" - uvicorn.access - INFO - GET /")
