"""Detection of runs whose process died without reporting it (SIGKILL, out of memory, power failure).

Dagster does not monitor a run that was started from a command line, or whose code server died with it, and with one run
at a time it would block all later ones for hours. So a run records its process in a tag, and the sensor ``dead_runs``
on the same host reports the run as failed once that process is gone.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import dagster as dg

from ml_platform.version import PLATFORM_VERSION

#: Run tag with the value host:pid:start time.
PROCESS_TAG = "ml_platform/process"

#: Run tag with the version of the platform that executed the run.
VERSION_TAG = "ml_platform/version"


def _start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks, to detect reused pids; None if it does not exist or is a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # proc(5): the fields after the parenthesized program name are state, ppid, ...; starttime is field 22.
    fields = status.rpartition(b")")[2].split()
    return None if fields[0] == b"Z" else fields[19].decode()


def record_process(instance: dg.DagsterInstance, run_id: str) -> None:
    """Tag a run with the platform's version and, on systems with /proc, with this process."""
    tags = {VERSION_TAG: PLATFORM_VERSION}
    if start_time := _start_time(os.getpid()):
        tags[PROCESS_TAG] = f"{socket.gethostname()}:{os.getpid()}:{start_time}"
    instance.add_run_tags(run_id, tags)


def _is_dead(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Return True if the run's process is known to be gone; processes on other hosts cannot be checked."""
    tag = run.tags.get(PROCESS_TAG, "")
    host, _, process = tag.partition(":")
    pid, _, start_time = process.partition(":")
    if host != socket.gethostname():
        return False
    try:
        if _start_time(int(pid)) == start_time:
            return False
    except PermissionError:  # another user's process, and /proc is mounted with hidepid
        return False
    # Dagster copies the tags of a run to its retry, which has its parent's process until it records its own.
    parent = instance.get_run_by_id(run.parent_run_id) if run.parent_run_id else None
    return parent is None or parent.tags.get(PROCESS_TAG) != tag


def _has_ended(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Read a run again once its process is gone: it may have ended properly since it was listed."""
    current = instance.get_run_by_id(run.run_id)
    return current is None or current.is_finished


def fail_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Report runs with a dead process as failed; returns their ids."""
    active = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
    dead = [run for run in instance.get_runs(active) if _is_dead(instance, run) and not _has_ended(instance, run)]
    for run in dead:
        instance.report_run_failed(run, f"The process of the run died: {run.tags[PROCESS_TAG]}.")
    return [run.run_id for run in dead]
