"""Startup time and overhead: loading the definitions, and materializing one small partition.

Whole processes are timed in interleaved rounds. The parts of the materialization come from its run: Spark's part is the
time from the job's request to its report, which has the seconds of the job itself, without the start of JVM and
session; the platform's part is the duration of Dagster's steps and checks less Spark's part, plus the time to load the
definitions beyond importing Dagster.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    EPOCH,
    log_progress,
    markdown,
    options,
    simulate,
    simulation,
    work_directory,
    write_results,
)

PROJECT = Path(__file__).resolve().parents[1]

NOTHING = "python -c pass"
DAGSTER = "import dagster"
DEFINITIONS = "import ml_platform.definitions"
BARE = "dagster asset materialize, an asset that does nothing"
SESSION = "a Spark session that does nothing"
MATERIALIZE = "dagster asset materialize, one partition"
SPARK_PART = "of that, from the job's request to its report"
JOB = "of that, the job's own seconds"
OWN = "steps and checks of that run, without Spark's part"

TRIVIAL = """
import dagster as dg

@dg.asset(partitions_def=dg.StaticPartitionsDefinition(["one"]))
def trivial():
    pass

defs = dg.Definitions([trivial])
"""

SPARK = "from benchmarks.common import spark_session; spark_session().range(1).count()"

CLEANING = "clean_transactions"


def main() -> None:
    """Print the tables."""
    parser = options(__doc__)
    parser.add_argument("--thousand-rows", type=float, default=100, help="size of the partition (default: 100)")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements of each (default: 5)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        simulate(work / "raw", simulation(arguments.thousand_rows * 1e3), 1)
        results = measure(work, arguments.rounds)
    write_results(arguments.json, results, lambda: table(results))


def measure(work: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each case."""
    home, lake = work / "home", work / "lake"
    home.mkdir(exist_ok=True)
    (home / "dagster.yaml").write_text((PROJECT / "dagster.yaml").read_text())
    (work / "trivial.py").write_text(TRIVIAL)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ML_PLATFORM_", "AWS_"))}
    environment |= {
        "DAGSTER_HOME": str(home),
        "PYTHONPATH": str(PROJECT),
        "ML_PLATFORM_RAW_URI": str(work / "raw"),
        "ML_PLATFORM_LAKE_URI": str(lake),
        "ML_PLATFORM_EPOCH": EPOCH.isoformat(),
    }

    def run(*arguments: str) -> float:
        started = time.monotonic()
        process = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=work, capture_output=True, text=True, check=False
        )
        if process.returncode:
            raise SystemExit(f"{arguments} failed:\n{process.stdout}{process.stderr}")
        return time.monotonic() - started

    run("-m", "ml_platform.cli.main", "sync")
    (key,) = [path.stem for path in (work / "raw").iterdir()]
    materialize = ("-m", "dagster", "asset", "materialize")
    cases = {
        NOTHING: ("-c", "pass"),
        DAGSTER: ("-c", "import dagster"),
        DEFINITIONS: ("-c", "import ml_platform.definitions"),
        BARE: (*materialize, "-f", "trivial.py", "--select", "trivial", "--partition", "one"),
        SESSION: ("-c", SPARK),
        MATERIALIZE: (
            *(*materialize, "-m", "ml_platform.definitions"),
            *("--select", "cleaned_transactions", "--partition", key),
        ),
    }
    for name in (BARE, MATERIALIZE):  # the first run creates Dagster's storage
        run(*cases[name])
    results: dict[str, list[float]] = {name: [] for name in [*cases, SPARK_PART, JOB, OWN]}
    for number in range(rounds):
        shutil.rmtree(lake)  # otherwise the partition would be up to date
        for name, arguments in cases.items():
            results[name].append(run(*arguments))
            log_progress(f"round {number + 1}: {results[name][-1]:.2f} s, {name}")
        for name, seconds in parts_of_last_run(home, lake).items():
            results[name].append(seconds)
    return results


def parts_of_last_run(home: Path, lake: Path) -> dict[str, float]:
    """Seconds of the parts of the last run, from the job's files and Dagster's events."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(home)) as instance:
        run_id = instance.get_run_records(limit=1)[0].dagster_run.run_id
        at = {
            (entry.dagster_event.step_key, entry.dagster_event.event_type): entry.timestamp
            for entry in instance.all_logs(run_id)
            if entry.dagster_event is not None
        }
    begun, ended = dg.DagsterEventType.STEP_START, dg.DagsterEventType.STEP_SUCCESS
    steps = sum(at[step, ended] - at[step, begun] for step, kind in at if kind == begun)
    request, report = (lake / f"_runs/{run_id}/{CLEANING}.{kind}.json" for kind in ("request", "report"))
    spark = report.stat().st_mtime - request.stat().st_mtime
    return {SPARK_PART: spark, JOB: json.loads(report.read_text())["seconds"], OWN: steps - spark}


def table(results: dict[str, Any]) -> str:
    """Median seconds of each case, and the parts of the materialization."""
    median = {name: statistics.median(seconds) for name, seconds in results.items()}
    timed = [
        [
            name,
            f"{median[name]:.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            f"{median[name] / median[DAGSTER]:.2f}",
        ]
        for name, seconds in results.items()
    ]
    total = median[MATERIALIZE]
    parts = {
        "Spark: JVM and session": median[SPARK_PART] - median[JOB],
        "Spark: the job": median[JOB],
        "this project's own: steps and checks, and loading its definitions": median[OWN]
        + median[DEFINITIONS]
        - median[DAGSTER],
    }
    parts["Python, Dagster's import, command and run, and the end of the JVM: the rest"] = total - sum(parts.values())
    shares = [[name, f"{seconds:.2f}", f"{seconds / total:.0%}"] for name, seconds in parts.items()]
    return (
        markdown(["", "seconds", "× import dagster"], timed)
        + "\n\n"
        + markdown(["of `dagster asset materialize`", "seconds", "share"], [*shares, ["all", f"{total:.2f}", "100%"]])
    )


if __name__ == "__main__":
    main()
