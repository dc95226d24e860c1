"""Runs whose process died without a word (SIGKILL, out of memory, power): Dagster would wait for them for hours.

A run started from a command line has no launcher that watches it, nor has one whose code server died with it, and with
one run at a time it would also hold up every later one. So a run notes its process in a tag, and a tick of the sensor
``dead_runs`` on the same host reports it as failed once that process is gone.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import dagster as dg

PROCESS_TAG = "ml_platform/process"


def _started_at(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks; None if there is none. It tells a reused pid apart."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = status.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]


def note_process(instance: dg.DagsterInstance, run_id: str) -> None:
    """Tag a run with this process, where the system tells about processes (Linux)."""
    if started_at := _started_at(os.getpid()):
        instance.add_run_tags(run_id, {PROCESS_TAG: f"{socket.gethostname()}:{os.getpid()}:{started_at}"})


def is_dead(run: dg.DagsterRun) -> bool:
    """Whether a run's process is known to be gone. One on another host is none of our business."""
    host, _, process = run.tags.get(PROCESS_TAG, "").rpartition(":")[0].rpartition(":")
    if host != socket.gethostname():
        return False
    return _started_at(int(process)) != run.tags[PROCESS_TAG].rpartition(":")[2]


def fail_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Report runs as failed whose process died; returns their ids."""
    started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
    dead = [run for run in instance.get_runs(started) if is_dead(run)]
    for run in dead:
        instance.report_run_failed(run, f"The process of the run died: {run.tags[PROCESS_TAG]}.")
    return [run.run_id for run in dead]
