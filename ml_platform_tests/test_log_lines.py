"""Log lines of MLflow's server."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from ml_platform.operations.log_lines import formatter


def record(message: str, *values: object, failed: bool = False) -> logging.LogRecord:
    error = None
    if failed:
        try:
            raise RuntimeError("it broke")
        except RuntimeError:
            error = sys.exc_info()
    return logging.LogRecord("uvicorn.access", logging.INFO, __file__, 1, message, values, error)


@pytest.mark.parametrize("failed", [False, True])
def test_an_object_a_line(monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    monkeypatch.setenv("ML_PLATFORM_LOG_FORMAT", "json")
    line = formatter().format(record('GET "%s"\n%d', "/é", 200, failed=failed))
    assert "\n" not in line
    found = json.loads(line)
    assert (found["event"], found["logger"], found["level"]) == ('GET "/é"\n200', "uvicorn.access", "info")
    assert found["timestamp"].endswith("Z")
    assert ("RuntimeError: it broke" in found.get("exception", "")) is failed


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML_PLATFORM_LOG_FORMAT", "text")
    assert formatter().format(record("GET %s", "/")).endswith(" - uvicorn.access - INFO - GET /")
