"""Runs whose process died are reported as failed, and no others."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import dagster as dg
import pytest
from dagster_shared.record import copy

from ml_platform.lake.partitions import range_tags
from ml_platform.lake.resource import LakeResource
from ml_platform.operations.dead_runs import PROCESS_TAG, VERSION_TAG, fail_dead_runs, record_process
from ml_platform.planning import plan_runs
from ml_platform.sensors import dead_runs
from ml_platform_tests.fakes import put_raw, raw_spec

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")


def start_run(
    instance: dg.DagsterInstance, status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED, **tags: str
) -> str:
    run_id = str(uuid.uuid4())
    instance.add_run(dg.DagsterRun(job_name="process_new_files", run_id=run_id, status=status, tags=tags))
    return run_id


def get_run(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRun:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run


@pytest.fixture
def process_tag(instance: dg.DagsterInstance) -> str:
    """The tag of a run of this process."""
    run_id = start_run(instance, dg.DagsterRunStatus.SUCCESS)
    record_process(instance, run_id)
    tags = get_run(instance, run_id).tags
    assert tags[VERSION_TAG] == version("ml-platform")
    return tags[PROCESS_TAG]


@pytest.fixture
def reused(process_tag: str) -> str:
    """The tag of an earlier process that had this one's pid."""
    host, pid, start_time = process_tag.rsplit(":", 2)
    return f"{host}:{pid}:{int(start_time) - 1}"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def tag_of(process: subprocess.Popen[bytes]) -> str:
    """The tag that a process would give its run, its start time read from the kernel."""
    fields = Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()
    return f"{socket.gethostname()}:{process.pid}:{int(fields[19])}"


def tick(instance: dg.DagsterInstance) -> str | None:
    skipped = dead_runs(dg.build_sensor_context(instance=instance))
    assert isinstance(skipped, dg.SkipReason)
    return skipped.skip_message


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_process_fails_its_run(instance: dg.DagsterInstance, child: subprocess.Popen[bytes], reaped: bool):
    run_id = start_run(instance, **{PROCESS_TAG: tag_of(child)})
    assert tick(instance) == "no run's process has died"
    assert get_run(instance, run_id).status == dg.DagsterRunStatus.STARTED
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    assert tick(instance) == f"reported as failed: {run_id}"
    assert get_run(instance, run_id).status == dg.DagsterRunStatus.FAILURE
    assert fail_dead_runs(instance) == []


def test_a_run_of_a_living_or_unknown_process_is_left_alone(instance: dg.DagsterInstance, process_tag: str):
    host, pid, _ = process_tag.rsplit(":", 2)
    assert (host, pid) == (socket.gethostname(), str(os.getpid()))
    for tags in ({}, {PROCESS_TAG: process_tag}, {PROCESS_TAG: f"elsewhere:{pid}:1"}, {PROCESS_TAG: "anything"}):
        start_run(instance, **tags)
    assert fail_dead_runs(instance) == []


def test_a_process_may_have_any_name(instance: dg.DagsterInstance, tmp_path: Path):
    program = os.fsencode(tmp_path) + b"/) caf\xe9"
    os.symlink(os.fsencode(str(shutil.which("sleep"))), program)
    with subprocess.Popen([program, b"600"]) as process:
        start_run(instance, **{PROCESS_TAG: tag_of(process)})
        try:
            assert fail_dead_runs(instance) == []
        finally:
            process.kill()


def test_a_process_that_cannot_be_looked_at_may_be_alive(
    instance: dg.DagsterInstance, reused: str, monkeypatch: pytest.MonkeyPatch
):
    """With the mount option hidepid, /proc shows nothing of other users' processes."""
    start_run(instance, **{PROCESS_TAG: reused})
    for read in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, read, mock.Mock(side_effect=PermissionError))
    assert fail_dead_runs(instance) == []


def test_a_run_that_ends_while_it_is_looked_at_has_not_died(
    instance: dg.DagsterInstance, reused: str, monkeypatch: pytest.MonkeyPatch
):
    listed = get_run(instance, start_run(instance, **{PROCESS_TAG: reused}))
    ended = get_run(instance, start_run(instance, dg.DagsterRunStatus.SUCCESS, **{PROCESS_TAG: reused}))
    monkeypatch.setattr(instance, "get_runs", lambda _: [copy(listed, run_id=ended.run_id), listed])
    assert fail_dead_runs(instance) == [listed.run_id]
    assert get_run(instance, ended.run_id).status == dg.DagsterRunStatus.SUCCESS


def test_a_pid_in_use_again_is_another_process(instance: dg.DagsterInstance, reused: str):
    ended = start_run(instance, dg.DagsterRunStatus.SUCCESS, **{PROCESS_TAG: reused})
    started = start_run(instance, **{PROCESS_TAG: reused})
    assert fail_dead_runs(instance) == [started]
    assert get_run(instance, ended).status == dg.DagsterRunStatus.SUCCESS


def test_a_retry_that_has_not_recorded_its_process_is_alive(instance: dg.DagsterInstance, reused: str):
    """Dagster copies the tags of the run that died."""
    died = start_run(instance, dg.DagsterRunStatus.FAILURE, **{PROCESS_TAG: reused})
    retry = dg.DagsterRun(
        job_name="process_new_files",
        run_id=str(uuid.uuid4()),
        status=dg.DagsterRunStatus.STARTED,
        tags={PROCESS_TAG: reused},
        parent_run_id=died,
        root_run_id=died,
    )
    instance.add_run(retry)
    assert fail_dead_runs(instance) == []
    host, pid, start_time = reused.rsplit(":", 2)
    instance.add_run_tags(retry.run_id, {PROCESS_TAG: f"{host}:{pid}:{int(start_time) - 1}"})
    assert fail_dead_runs(instance) == [retry.run_id]


def test_a_tick_asks_for_the_dead_runs_partitions(instance: dg.DagsterInstance, lake: LakeResource, reused: str):
    keys = ["a", "b"]
    for number, key in enumerate(keys):
        put_raw(lake, key, raw_spec(number))
    instance.add_dynamic_partitions("raw_files", keys)
    start_run(instance, **{PROCESS_TAG: reused}, **range_tags("a", "b"))
    plan = plan_runs(instance, lake)
    assert plan.ranges == [("a", "b")]
    assert "1 runs reported as failed because their process died" in plan.reason
