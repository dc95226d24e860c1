"""Common parts of the benchmarks: options, raw files, a Spark session like the platform's, Markdown tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_platform.dev.simulator import Simulation
from ml_platform.spark.bare_jobs import clean, features
from ml_platform.spark.session import default_spark_config, local_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


#: First day of the simulated files.
EPOCH = date(2019, 8, 22)

#: Approximate number of transactions of a simulated customer in the 30 days of a file.
ROWS_PER_CUSTOMER = 57.6


def log_progress(text: str) -> None:
    """Print progress to standard error; standard output is for the results."""
    print(text, file=sys.stderr, flush=True)


def options(description: str | None) -> argparse.ArgumentParser:
    """Parser with the options common to all benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory to keep the data in (default: none)")
    parser.add_argument("--json", type=Path, help="also write the raw results to this file")
    return parser


@contextmanager
def work_directory(kept: Path | None) -> Iterator[Path]:
    """Directory for a benchmark's data: `kept`, or a temporary one."""
    with tempfile.TemporaryDirectory(prefix="ml-platform-benchmark-") as temporary:
        yield (kept or Path(temporary)).absolute()


def spark_session(driver_memory: str | None = None) -> SparkSession:
    """Spark session configured like that of the platform's local engine."""
    return local_session("benchmark", default_spark_config("local[*]", driver_memory))


@contextmanager
def peak_memory(pid: int) -> Iterator[Callable[[], float]]:
    """Sample the memory of a process within the block; yields a function that returns the peak so far, in MB.

    This is the resident memory of the process and its children together, sampled ten times a second.
    """
    import psutil

    peak = 0.0
    stopped = threading.Event()

    def follow() -> None:
        nonlocal peak
        while not stopped.wait(0.1):
            total = 0
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                for process in [root, *root.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        total += process.memory_info().rss
            peak = max(peak, total / 1e6)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        stopped.set()
        thread.join()


def simulation(rows: float, terminals: int = 1000, **settings: Any) -> Simulation:
    """A simulation whose files begin at EPOCH and have about `rows` rows each."""
    return Simulation(start=EPOCH, customers=round(rows / ROWS_PER_CUSTOMER), terminals=terminals, **settings)


def simulate(directory: Path, simulation: Simulation, files: int) -> list[Path]:
    """Write `files` raw files into `directory` and return them in order of time; existing files are kept."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / simulation.file_name(index) for index in range(files)]
    for index, path in enumerate(paths):
        if not path.exists():
            log_progress(f"simulating {path.name}")
            draft = path.with_suffix(".draft")
            with draft.open("wb") as out:
                simulation.write_file(index, out)
            draft.rename(path)
    return paths


def timed_jobs(spark: SparkSession, raw: list[Path], lake: Path) -> list[dict[str, Any]]:
    """Clean one raw file and build its features; returns rows, MB of text, seconds and peak MB of each job."""
    cleaned: dict[str, Any] = {}
    results = []
    for job in ("cleaning", "features"):
        with peak_memory(os.getpid()) as peak:
            started = time.monotonic()
            if job == "cleaning":
                cleaned = clean(spark, raw, lake, EPOCH)
            else:
                features(spark, cleaned, lake)
            seconds = time.monotonic() - started
        (report,) = cleaned.values()
        rows, size = report["counts"]["raw_rows"], report["raw"]["size"] / 1e6
        results.append({"job": job, "rows": rows, "mb": size, "seconds": seconds, "memory_mb": peak()})
        log_progress(str(results[-1]))
    return results


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown table; floats with three decimals."""

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def write_results(path: Path | None, results: Any, table: Callable[[], str]) -> None:
    """Print the table, and write the raw results as JSON to `path` if given."""
    print(table())
    if path is not None:
        path.write_text(json.dumps(results, indent=1))
