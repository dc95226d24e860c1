"""Where the seconds go before and around the work: loading the definitions, and materializing one small partition.

Everything is timed as whole processes, in interleaved rounds. The materialization is taken apart by leaving things out:
the same command on an asset that does nothing, definitions without a run, a Spark session that does nothing, and the
seconds that the job itself reports. What is left over is the platform's own.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.common import ROWS_PER_CUSTOMER, markdown, options, say, simulate, work_directory, write_results
from ml_platform.simulator import Simulation

PROJECT = Path(__file__).resolve().parents[1]
EPOCH = date(2019, 8, 22)

NOTHING = "python -c pass"
DAGSTER = "import dagster"
DEFINITIONS = "import ml_platform.definitions"
BARE = "dagster asset materialize, an asset that does nothing"
SESSION = "a Spark session that does nothing"
MATERIALIZE = "dagster asset materialize, one partition"
JOB = "the job's own seconds"

TRIVIAL = """
import dagster as dg

@dg.asset(partitions_def=dg.StaticPartitionsDefinition(["one"]))
def trivial():
    pass

defs = dg.Definitions([trivial])
"""

SPARK = "from benchmarks.common import spark_session; spark_session().range(1).count()"


def main() -> None:
    """Print the tables."""
    parser = options(__doc__)
    parser.add_argument("--thousand-rows", type=float, default=100, help="size of the partition (default: 100)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured (default: 5)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        customers = round(arguments.thousand_rows * 1e3 / ROWS_PER_CUSTOMER)
        simulate(work / "raw", Simulation(start=EPOCH, customers=customers, terminals=1000), 1)
        results = measure(work, arguments.rounds)
    write_results(arguments.json, results, lambda: table(results))


def measure(work: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds by what was run."""
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
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=work, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{arguments} failed:\n{done.stdout}{done.stderr}")
        return time.monotonic() - started

    run("-m", "ml_platform.cli", "sync")
    (key,) = [path.stem for path in (work / "raw").iterdir()]
    materialize = ("-m", "dagster", "asset", "materialize")
    contestants = {
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
    for name in (BARE, MATERIALIZE):  # Dagster's storage is made by the first run
        run(*contestants[name])
    results: dict[str, list[float]] = {name: [] for name in [*contestants, JOB]}
    for number in range(rounds):
        shutil.rmtree(lake)  # what is clean is not cleaned again
        for name, arguments in contestants.items():
            results[name].append(run(*arguments))
            say(f"round {number + 1}: {results[name][-1]:.2f} s, {name}")
        newest = max(lake.glob("_runs/*/clean_transactions.report.json"), key=lambda path: path.stat().st_mtime)
        results[JOB].append(json.loads(newest.read_text())["seconds"])
    return results


def table(results: dict[str, Any]) -> str:
    """What was run with its median seconds, and the parts of the materialization."""
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
        "Python": median[NOTHING],
        "Dagster: its import, command and run": median[BARE] - median[NOTHING],
        "JVM and Spark session": median[SESSION] - median[NOTHING],
        "Spark job": median[JOB],
    }
    parts["this project's own: the rest"] = total - sum(parts.values())
    shares = [[name, f"{seconds:.2f}", f"{seconds / total:.0%}"] for name, seconds in parts.items()]
    return (
        markdown(["", "seconds", "× import dagster"], timed)
        + "\n\n"
        + markdown(["of `dagster asset materialize`", "seconds", "share"], [*shares, ["all", f"{total:.2f}", "100%"]])
    )


if __name__ == "__main__":
    main()
