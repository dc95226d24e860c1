"""Time to score a partition, compared with XGBoost's own prediction of the same matrix in memory, by size of the model.

One raw file is simulated, cleaned and given features; the models are fitted to a sample of them. Rounds are interleaved
in one warm Spark session. A round scores the whole partition (scores, ranks, alerts with reasons, counts for the drift
checks), and predicts the same rows from a matrix in memory with as many threads as there are processors; then it scores
once more with a grade of each known week, which shows what grades cost. The table also shows the share of cleaning plus
features.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    EPOCH,
    log_progress,
    markdown,
    options,
    simulate,
    simulation,
    spark_session,
    work_directory,
    write_results,
)
from ml_platform.spark.bare_jobs import clean, features
from spark_jobs import score_transactions
from spark_jobs.features.registry import MODEL_INPUTS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from spark_jobs.io.blocks import Array

#: Models: rounds and depth, and the limit of the ratio.
MODELS = {(100, 5): 4.0, (300, 6): 2.0}

#: Rows that the models are fitted to.
FITTED_ROWS = 300_000


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--million-rows", type=float, default=4.9, metavar="N", help="rows to score (default: 4.9)")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each (default: 3)")
    parser.add_argument("--driver-memory", help="memory of Spark's driver (default: a third of the machine's, to 8 GB)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        spark = spark_session(arguments.driver_memory)
        results = measure(spark, arguments.million_rows * 1e6, arguments.rounds, work)
    write_results(arguments.json, results, lambda: table(results))


def measure(spark: SparkSession, rows: float, rounds: int, work: Path) -> list[dict[str, Any]]:
    """Seconds of scoring and of XGBoost alone, `rounds` times for each model."""
    lake = work / "lake"
    raw = simulate(work / "raw", simulation(rows, terminals=10_000), 1)
    # The first pass warms the session up.
    for _ in range(2):
        started = time.monotonic()
        cleaned = clean(spark, raw, lake, EPOCH)
        built = features(spark, cleaned, lake)
        before = time.monotonic() - started
    ((key, report),) = cleaned.items()
    log_progress(f"cleaning and features of {built[key]['counts']['rows']:,} rows: {before:.1f} s")
    matrix, label, days = _matrix(lake / f"transaction_features/raw_file={key}")
    results = []
    for number in range(-1, rounds):
        for (trees, depth), limit in MODELS.items():
            directory = work / f"model-{trees}-{depth}"
            if not directory.exists():
                _fit(directory, matrix, label, days, trees, depth)
            seconds, _ = _timed(spark, _request(lake, key, report, directory, grade=False), len(matrix))
            alone = _alone(directory, matrix)
            with_grades, weeks = _timed(spark, _request(lake, key, report, directory, grade=True), len(matrix))
            result = {"model": f"{trees} rounds of depth {depth}", "rows": len(matrix), "seconds": seconds}
            result |= {"alone": alone, "limit": limit, "before": before, "weeks": weeks}
            result["grading"] = with_grades - seconds
            log_progress(f"round {number + 1}: {result}")
            if number >= 0:  # the first round warms up
                results.append(result)
    return results


def _timed(spark: SparkSession, request: dict[str, Any], rows: int) -> tuple[float, int]:
    """Seconds of the job, and the number of weeks that it graded."""
    started = time.monotonic()
    answer = score_transactions.run(spark, request)
    seconds = time.monotonic() - started
    (verdict,) = answer["partitions"].values()
    if verdict["status"] != "succeeded" or verdict["report"]["counts"]["rows"] != rows:
        raise SystemExit(f"not scored: {verdict}")
    return seconds, len(verdict["report"]["grades"])


def _matrix(directory: Path) -> tuple[Array, Array, Array]:
    """(inputs, label, day) of the rows of a features partition."""
    import numpy as np
    from pyarrow import dataset

    source = dataset.dataset(directory, exclude_invalid_files=True)
    matrix = np.empty((source.count_rows(), len(MODEL_INPUTS)), "f4")
    for number, name in enumerate(MODEL_INPUTS):
        matrix[:, number] = source.to_table(columns=[name])[name].to_numpy()
    rest = source.to_table(columns=["tx_fraud", "tx_time_days"])
    return matrix, rest["tx_fraud"].to_numpy(), rest["tx_time_days"].to_numpy()


def _fit(directory: Path, matrix: Array, label: Array, days: Array, rounds: int, depth: int) -> None:
    """Write a model file and a training report with its profile."""
    import numpy as np

    from spark_jobs.training import fits
    from spark_jobs.training.learners import LEARNERS, Scorer

    chosen = np.sort(np.random.default_rng(0).choice(len(matrix), min(FITTED_ROWS, len(matrix)), replace=False))
    chosen = chosen[np.argsort(days[chosen], kind="stable")]
    part, known = matrix[chosen], label[chosen]
    params = {"rounds": rounds, "max_depth": depth, "learning_rate": 0.1}
    model = LEARNERS["xgboost"].fit(part, known, np.ones(len(part), "f4"), params, 0, os.cpu_count() or 1)
    scorer = Scorer("xgboost", MODEL_INPUTS, model)
    profile = fits.profile_of(scorer, part, days[chosen], known, (1.0, 1.0))
    directory.mkdir(parents=True)
    (directory / "model.json").write_text(scorer.to_json())
    (directory / "_report.json").write_text(json.dumps({"profile": profile}))


def _alone(directory: Path, matrix: Array) -> float:
    """Seconds of XGBoost's own prediction."""
    import xgboost

    content = json.dumps(json.loads((directory / "model.json").read_text())["model"])
    booster = xgboost.Booster({"nthread": os.cpu_count()})
    booster.load_model(bytearray(content.encode()))
    started = time.monotonic()
    booster.inplace_predict(matrix)
    return time.monotonic() - started


def _request(lake: Path, key: str, report: dict[str, Any], directory: Path, *, grade: bool) -> dict[str, Any]:
    """The scoring job's request for one partition; all of its weeks are known but for the last, or none is."""
    uri = lake.as_uri()
    rows_per_day = {str(day): count for day, count in enumerate(report["rows_per_day"].values())}
    return {
        "run_id": "benchmark",
        "champion": {
            "version": 1,
            "model_uri": (directory / "model.json").as_uri(),
            "report_uri": (directory / "_report.json").as_uri(),
            "out_of_time_from": EPOCH.isoformat(),
            "held_out": None,
            "error": None,
        },
        "epoch": EPOCH.isoformat(),
        "alerts_per_day": 100,
        "data_first_day": 0,
        "partitions": [
            {
                "partition": key,
                "cause": "new",
                "inputs": {},
                "rows": report["counts"]["clean_rows"],
                "rows_per_day": rows_per_day,
                "usual_days": [0, len(rows_per_day) - 1],
                "features_uri": f"{uri}/transaction_features/raw_file={key}",
                "output_uri": f"{uri}/scored_transactions/raw_file={key}",
                "alerts_uri": f"{uri}/alerts/raw_file={key}",
            }
        ],
        "grading": {
            "last_day": len(rows_per_day) - 1 if grade else -1,
            "delay_days": 7,
            "compromised_lookback_days": 7,
            "scored": {},
            "cleaned": {
                key: {
                    "uri": f"{uri}/cleaned_transactions/raw_file={key}",
                    "first_day": 0,
                    "last_day": len(rows_per_day) - 1,
                }
            },
            "grades": [],
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    """One row per model: median seconds and ratios."""
    lines = []
    for model in dict.fromkeys(result["model"] for result in results):
        same = [result for result in results if result["model"] == model]
        seconds, alone, ratio = (
            statistics.median(values)
            for values in zip(
                *((one["seconds"], one["alone"], one["seconds"] / one["alone"]) for one in same), strict=True
            )
        )
        share = statistics.median(one["seconds"] / one["before"] for one in same)
        graded = statistics.median(one["grading"] / max(1, one["weeks"]) for one in same)
        lines.append(
            [
                model,
                f"{same[0]['rows']:,}",
                f"{seconds:.1f}",
                f"{alone:.1f}",
                f"{ratio:.2f}",
                f"{share:.0%}",
                f"{graded:.1f}",
            ]
        )
    return markdown(
        [
            "model",
            "rows",
            "scoring, s",
            "XGBoost alone, s",
            "ratio",
            "share of cleaning and features",
            "grading, s a week",
        ],
        lines,
    )


if __name__ == "__main__":
    main()
