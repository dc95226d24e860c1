"""Log lines of MLflow's and Dagster's servers."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ml_platform.dev.cloud.processes import TetheredProcess, free_port, listens
from ml_platform.operations.log_lines import formatter, main
from ml_platform_tests.postgres import PostgresServer
from ml_platform_tests.stack import COMPOSE, DEPLOY
from ml_platform_tests.world import wait_until


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


def test_an_unknown_command_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["log_lines"])
    with pytest.raises(SystemExit, match="name a command"):
        main()


def test_runs_log_lines_of_the_root_logger_once(tmp_path: Path) -> None:
    """A code server starts its runs by multiprocessing, which imports its main module under another name."""
    (tmp_path / "entry_points.py").write_text(
        "import logging, multiprocessing\n"
        "def run():\n"
        "    logging.getLogger('own').addHandler(logging.StreamHandler())\n"
        "    logging.warning('of the root logger')\n"
        "    logging.getLogger('own.child').warning('of a logger with a handler')\n"
        "    logging.getLogger('dagster.run').warning('of another')\n"
        "def main():\n"
        "    process = multiprocessing.get_context('spawn').Process(target=run)\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    metadata = tmp_path / "server-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: server\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[console_scripts]\nserver = entry_points:main\n")
    done = subprocess.run(
        [sys.executable, "-m", "ml_platform.operations.log_lines", "server"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "ML_PLATFORM_LOG_FORMAT": "json"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["of the root logger", "of another"]
    assert done.stderr == "of a logger with a handler\n"


@pytest.mark.parametrize("name", ["code", "daemon"])
def test_dagsters_commands_are_started_with_these_lines(name: str) -> None:
    assert COMPOSE["services"][name]["command"][:3] == ["python", "-m", "ml_platform.operations.log_lines"]


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_servers_log_each_line_once_after_postgresql_was_late(tmp_path: Path) -> None:
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(DEPLOY / name, tmp_path)
    postgres = PostgresServer()
    postgres.create()
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "ML_PLATFORM_LOG_FORMAT": "json",
        "DAGSTER_HOME": str(tmp_path),
        "DAGSTER_POSTGRES_URL": f"postgresql+psycopg2://postgres@127.0.0.1:{postgres.port}/postgres",
        "PGPASSWORD": postgres.password,
        "DAGSTER_CODE_HOST": "127.0.0.1",
        "DAGSTER_CODE_PORT": str(free_port()),  # nothing listens there
    }
    services = {}
    for name in ("daemon", "webserver"):
        words = " ".join(COMPOSE["services"][name]["command"])
        words = words.replace("${ML_PLATFORM_LOG_FORMAT:-json}", "json").replace("3000", str(port))
        command = ["env", f"--chdir={tmp_path}", *words.replace("0.0.0.0", "127.0.0.1").split()]
        services[name] = TetheredProcess(command, log=tmp_path / f"{name}.log", env=environment)
    processes = [*services.values()]
    try:
        for name, process in services.items():
            wait_until(lambda process=process: "Retrying" in process.log.read_text(), f"{name} misses PostgreSQL")  # type: ignore[misc]
        processes.append(TetheredProcess(postgres.command, log=tmp_path / "postgres.log", env=environment))
        wait_until(lambda: listens(port), "the webserver listens")
        wait_until(lambda: "SensorDaemon" in services["daemon"].log.read_text(), "the daemon has started its work")
    finally:
        for process in processes:
            process.stop()
        postgres.remove()
    for name, process in services.items():
        lines = process.log.read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        print(name, *lines, sep="\n")
        assert any(entry["level"] == "warning" and "Retrying failed" in entry["event"] for entry in entries), name
        assert any(entry["logger"].startswith("dagster") for entry in entries), name
        # As Python's own handler writes them.
        assert not [line for line in lines if re.match(r"[A-Z]+:[\w.-]+:", line)], name
        told = Counter((entry["logger"], entry["event"], entry["timestamp"]) for entry in entries)
        assert max(told.values()) == 1, name
