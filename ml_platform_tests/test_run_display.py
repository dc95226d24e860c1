"""What process-new-files shows of a run: progress, warnings, failures; and where the rest goes."""

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from ml_platform.cli import progress
from ml_platform.cli.context import console

JOBS = logging.getLogger("spark_jobs")


def report_share(share: float, level: int = logging.INFO) -> None:
    JOBS.log(level, "cleaning 1/2: a, %s", f"{share:.0%}", extra={"share": share})


@pytest.fixture
def shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[bool, str]]:
    """Execute ops; whether the run succeeded, and what was shown."""

    def execute(*ops: dg.OpDefinition, assets: list[str]) -> tuple[bool, str]:
        @dg.job
        def job() -> None:
            for op in ops:
                op()

        with dg.DagsterInstance.local_temp(str(tmp_path), overrides={"telemetry": {"enabled": False}}) as instance:
            capfd.readouterr()
            result = progress.execute_with_display(job, instance, assets, tmp_path / "output.log", raise_on_error=False)
        return result.success, capfd.readouterr().out

    return execute


PROGRAM = """
import logging, subprocess, sys
import dagster as dg
from pathlib import Path
from ml_platform.cli import progress

@dg.op
def cleaned(context):
    print("from Python")
    subprocess.run(["sh", "-c", "echo from Java >&2"], check=True)
    jobs = logging.getLogger("spark_jobs")
    jobs.info("cleaning 1/2: a, 25%", extra={"share": 0.25})
    jobs.debug("cleaning 1/2: a, 30%", extra={"share": 0.3})
    context.log.warning("half of it is odd\x1b[31m")
    context.log.info("not shown")

@dg.op
def check(cleaned):
    pass

@dg.job
def job():
    check(cleaned())

directory = sys.argv[1]
with dg.DagsterInstance.local_temp(directory, overrides={"telemetry": {"enabled": False}}) as instance:
    progress.execute_with_display(job, instance, ["cleaned"], Path(directory) / "output.log")
print("the terminal is back", flush=True)
"""


def test_lines_are_progress_and_the_result_of_each_asset_and_of_all_checks(tmp_path: Path):
    """In a process of its own, whose descriptors are the real ones."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=True)
    assert [re.sub(r"in \d+ s", "in _ s", line.rstrip()) for line in done.stdout.splitlines()] == [
        "cleaned       cleaning 1/2: a, 25%",
        "cleaned: half of it is odd\\x1b[31m",
        "cleaned       done in _ s",
        "asset checks  done in _ s",
        "the terminal is back",
    ]
    assert done.stderr == ""
    (log,) = tmp_path.glob("storage/*/compute_logs/*.out")
    assert "from Python" in log.read_text()
    assert "from Java" in log.with_suffix(".err").read_text()


def test_a_failed_step_says_why(shown: Callable[..., tuple[bool, str]]):
    @dg.op
    def cleaned() -> None:
        raise dg.Failure("the file is broken\nand more", allow_retries=False)

    success, out = shown(cleaned, assets=["cleaned"])
    assert not success
    assert "cleaned: the file is broken\n" in out
    assert re.search(r"^cleaned +failed in \d+ s$", out, re.MULTILINE)


def test_a_bar_never_goes_back(monkeypatch: pytest.MonkeyPatch, shown: Callable[..., tuple[bool, str]]):
    monkeypatch.setattr(console, "_force_terminal", True)
    drawn: list[float] = []

    class Bars(progress.Progress):
        def update(self, task_id, **fields):
            super().update(task_id, **fields)
            drawn.append(self.tasks[task_id].completed)

    monkeypatch.setattr(progress, "Progress", Bars)

    @dg.op
    def cleaned() -> None:
        for share in (0.1, 0.6, 0.2, 0.7):
            report_share(share, logging.DEBUG)

    success, out = shown(cleaned, assets=["cleaned"])
    assert success
    assert drawn == sorted(drawn)
    assert len(drawn) == 6
    assert drawn[-1] == 1.0
    assert "━" in out
