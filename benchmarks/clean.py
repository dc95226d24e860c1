"""Time and memory to clean one new file: this platform, its predecessor with earlier files, DuckDB and Polars.

Each is timed as a whole process with nothing else running, and the platform's job also in a warm session. Rounds are
interleaved, so that disturbances of the machine affect all of them. First it is checked that the platform, DuckDB and
Polars give the same rows and counts. Memory is the sampled peak of the resident memory of a process and its children
together.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import cleaners
from benchmarks.common import (
    EPOCH,
    log_progress,
    markdown,
    options,
    peak_memory,
    simulate,
    simulation,
    work_directory,
    write_results,
)

WARM = "this platform, warm job"
PLATFORM = "this platform"


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--million-rows", type=float, default=4.9, help="size of the new file (default: 4.9)")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each (default: 3)")
    parser.add_argument(
        "--done",
        type=int,
        nargs="*",
        default=[5, 12],
        help="files that the predecessor has cleaned before (default: 5 12)",
    )
    parser.add_argument("--conflicts", action="store_true", help="include differing rows with the same id")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        # Conflicting duplicates were never seen in real files, and finding them takes time.
        without = () if arguments.conflicts else ("conflicting_duplicate",)
        (raw,) = simulate(work / "raw", simulation(arguments.million_rows * 1e6, without=without), 1)
        require_equal_results(raw, work)
        results = measure(raw, work, arguments.rounds, arguments.done)
    write_results(arguments.json, results, lambda: table(results))


def require_equal_results(raw: Path, work: Path) -> None:
    """Raise SystemExit unless the platform, DuckDB and Polars give the same rows and counts."""
    import duckdb

    outputs = {
        cleaners.platform: "cleaned_transactions/*/*.parquet",
        cleaners.duckdb: "clean.parquet",
        cleaners.polars: "clean.parquet",
    }
    names = [cleaner.__name__ for cleaner in outputs]
    log_progress("comparing the results")
    counts = [_process(name, raw, work / name)[1] for name in names]
    tables = [f"read_parquet('{work / cleaner.__name__ / files}')" for cleaner, files in outputs.items()]
    con = duckdb.connect()
    con.execute("SET TimeZone = 'UTC'")
    columns = ", ".join(cleaners.FIELDS).replace("tx_datetime", "tx_datetime::TIMESTAMP AS tx_datetime")
    for name, count, rows in zip(names[1:], counts[1:], tables[1:], strict=True):
        if count != counts[0]:
            raise SystemExit(f"{name} counts {count}, the platform {counts[0]}")
        for one, other in ((rows, tables[0]), (tables[0], rows)):
            differing = con.execute(
                f"SELECT count(*) FROM (SELECT {columns} FROM {one} EXCEPT ALL SELECT {columns} FROM {other})"
            ).fetchall()[0][0]
            if differing:
                raise SystemExit(f"{differing} rows of {one} are not in {other}")


def measure(raw: Path, work: Path, rounds: int, done: list[int]) -> list[dict[str, Any]]:
    """Seconds and memory of each case, `rounds` times."""

    def old(files: int) -> dict[str, Any]:
        prepare_predecessor(raw, work, files)
        return _process("old_pipeline", raw, work / "old_pipeline")[0]

    cases: dict[str, Callable[[], dict[str, Any]]] = {
        WARM: lambda: {**_process("warm_job", raw, work / "warm")[1], "memory_mb": None},
        PLATFORM: lambda: _process("platform", raw, work / "platform")[0],
        **{f"its predecessor, {files} files done": lambda files=files: old(files) for files in done},  # type: ignore[misc]
        "DuckDB": lambda: _process("duckdb", raw, work / "duckdb")[0],
        "Polars": lambda: _process("polars", raw, work / "polars")[0],
    }
    results = []
    for number in range(rounds):
        for name, run in cases.items():
            results.append({"name": name, **run()})
            log_progress(f"round {number + 1}: {results[-1]}")
    return results


def prepare_predecessor(raw: Path, work: Path, files: int) -> None:
    """Fill the predecessor's CLEANED with `files` copies of its output for the new file.

    So the rows have the order left by its deduplication, which takes longer to read and write than the order of the raw
    file. Equal ids in different files do not matter, because it never compared files.
    """
    cleaned, out = work / "cleaned_once", work / "old_pipeline"
    if not cleaned.exists():
        _process("old_pipeline", raw, cleaned)
    shutil.rmtree(out, ignore_errors=True)
    (out / "CLEANED").mkdir(parents=True)
    for file in (cleaned / "CLEANED").glob("*.parquet"):
        for index in range(files):
            shutil.copy(file, out / "CLEANED" / f"{index}-{file.name}")


def _process(name: str, raw: Path, out: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(time and memory, counts) of one cleaner, run in its own process."""
    command = [sys.executable, "-m", "benchmarks.cleaners", name, str(raw), str(out), "--epoch", EPOCH.isoformat()]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with peak_memory(process.pid) as peak:
        printed, errors = process.communicate()
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return {"rows": None, "seconds": seconds, "memory_mb": peak()}, json.loads(printed)


def table(results: list[dict[str, Any]]) -> str:
    """One row per case: median seconds and range, ratios to the platform and DuckDB, and memory."""
    rows = next(result["rows"] for result in results if result["rows"])
    by_name = {
        name: [result for result in results if result["name"] == name]
        for name in dict.fromkeys(result["name"] for result in results)
    }
    medians = {name: statistics.median(result["seconds"] for result in same) for name, same in by_name.items()}
    lines = []
    for name, same in by_name.items():
        seconds = [result["seconds"] for result in same]
        memory = [result["memory_mb"] for result in same if result["memory_mb"]]
        lines.append(
            [
                name,
                f"{medians[name]:.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
                f"{rows / medians[name] / 1e3:,.0f}",
                f"{medians[name] / medians[PLATFORM]:.2f}",
                f"{medians[name] / medians['DuckDB']:.2f}",
                f"{statistics.median(memory):,.0f}" if memory else "",
            ]
        )
    header = ["", "seconds", "thousand rows/s", "× this platform", "× DuckDB", "peak MB"]
    return f"{rows:,} rows\n\n" + markdown(header, lines)


if __name__ == "__main__":
    main()
