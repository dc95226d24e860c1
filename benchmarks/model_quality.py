"""Quality of the models: learners and sets of inputs on weekly folds, trained and scored by the platform's jobs.

Folds are those of the Fraud Detection Handbook: training ends on a given day, labels are 7 days late, and the test is
the following 7 days without cards known to be compromised. Intervals are those of the promotion rule: 95%,
bootstrap over customers.
"""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

from benchmarks.common import log_progress, markdown, options, simulate, spark_session, work_directory, write_results
from ml_platform.dev.simulator import Simulation
from ml_platform.lake.storage import LocalStore
from ml_platform.model.evaluation import read_test_scores
from ml_platform.model.promotion import Facts, PromotionRule, Scores, decide
from ml_platform.spark.bare_jobs import clean, features
from spark_jobs import train_model
from spark_jobs.evaluation.metrics import evaluate
from spark_jobs.features.registry import MODEL_INPUTS, REGISTRY
from spark_jobs.training.learners import DEFAULT_CANDIDATES

HANDBOOK = ("tx_amount", *[feature.name for feature in REGISTRY if feature.source == "handbook"])

#: Inputs of the predecessor's model.
OLD_PIPELINE = ("tx_amount", "tx_time_seconds", "is_terminal_0", "second_of_day")

CANDIDATES = {candidate["learner"]: [candidate] for candidate in DEFAULT_CANDIDATES}

#: Name of a model → its inputs and learner.
MODELS = {
    "old pipeline's inputs, logistic_regression": (OLD_PIPELINE, "logistic_regression"),
    "handbook's inputs, logistic_regression": (HANDBOOK, "logistic_regression"),
    "handbook's inputs, xgboost": (HANDBOOK, "xgboost"),
    "all inputs, logistic_regression": (MODEL_INPUTS, "logistic_regression"),
    "all inputs, xgboost": (MODEL_INPUTS, "xgboost"),
}


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--raw", type=Path, help="directory of raw files (default: simulated ones)")
    parser.add_argument("--epoch", type=date.fromisoformat, default=date(2018, 4, 1), help="first day of the data")
    parser.add_argument(
        "--train-ends",
        type=date.fromisoformat,
        nargs="+",
        default=[date(2018, 6, 26), date(2018, 7, 3), date(2018, 7, 10)],
        metavar="DATE",
        help="last days of training, one per fold (default: 2018-06-26 2018-07-03 2018-07-10)",
    )
    parser.add_argument("--customers", type=int, default=5_000, help="customers to simulate (default: 5000)")
    parser.add_argument(
        "--max-train-rows", type=int, help="maximum rows that a model is fitted on (default: the job's)"
    )
    parser.add_argument("--only", default="", help="only the models whose name contains this")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        if arguments.raw is None:
            simulation = Simulation(
                start=arguments.epoch, customers=arguments.customers, terminals=2 * arguments.customers
            )
            raw = simulate(work / "raw", simulation, 4)
        else:
            raw = sorted(arguments.raw.absolute().glob("*.txt"))
            if not raw:
                parser.error(f"there are no raw files (*.txt) in {arguments.raw}")
        models = {name: model for name, model in MODELS.items() if arguments.only in name}
        limit = {"max_train_rows": arguments.max_train_rows} if arguments.max_train_rows else {}
        results = measure(raw, arguments.epoch, arguments.train_ends, work, models, limit)
    write_results(arguments.json, results, lambda: table(results))


def measure(
    raw: list[Path], epoch: date, train_ends: list[date], work: Path, models: dict[str, Any], limit: dict[str, int]
) -> list[dict[str, Any]]:
    """Train and score every model on every fold, with `limit` in the requests; one dict of results each."""
    from pyspark.sql import functions as F

    spark = spark_session()
    lake = work / "lake"
    features(spark, clean(spark, raw, lake, epoch), lake)
    rows = spark.read.parquet(f"file://{lake}/transaction_features").drop("raw_file")
    rows = rows.withColumns(
        {
            "is_terminal_0": F.expr("double(coalesce(terminal_id, 0) = 0)"),
            "second_of_day": F.expr("double(tx_time_seconds % 86400)"),
        }
    )
    results = []
    for train_end in train_ends:
        # The test window ends after 7 days of delay and 7 test days; later rows are removed.
        last = train_end + timedelta(days=14)
        fold = f"file://{work}/fold={train_end}"
        rows.where(F.col("tx_datetime") < F.lit(last + timedelta(days=1)).cast("timestamp")).write.mode(
            "overwrite"
        ).parquet(fold)
        for name, (inputs, learner) in models.items():
            output = work / "models" / f"{train_end}" / name.replace(" ", "_")
            report = train_model.run(
                spark,
                {
                    "run_id": "benchmark",
                    "cutoff": train_end.isoformat(),
                    "feature_uris": [fold],
                    "cutoff_uri": fold,
                    "features": list(inputs),
                    "output_uri": f"file://{output}",
                    "candidates": CANDIDATES[learner],
                    **limit,
                },
            )
            if report["outcome"] != "trained":
                raise SystemExit(f"{name}, training until {train_end}: {report['reason']}")
            scores = read_test_scores(LocalStore(str(output)), "test_scores")
            columns = (scores[column].to_numpy() for column in ("tx_fraud", "score", "customer_id"))
            decision = decide(PromotionRule(), Scores(*columns), Facts())
            metrics = evaluate(scores, "score", 100)
            figures = {
                "model": name,
                "train_end": train_end.isoformat(),
                "train_rows": report["windows"]["train"]["rows"],
                "test_rows": metrics["rows"],
                "test_frauds": metrics["frauds"],
                "average_precision": metrics["average_precision"],
                "interval": [decision.figures[f"average_precision_{bound}"] for bound in ("lower", "upper")],
                "roc_auc": metrics["roc_auc"],
                "card_precision_at_100": metrics["card_precision_at_100"],
                "best": {"learner": report["best"]["learner"], **report["best"]["params"]},
                "seconds": report["seconds"]["total"],
            }
            log_progress(f"{train_end} {name}: {figures}")
            results.append(figures)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """One row per model: average precision of each fold with its interval, and the means."""
    folds = list(dict.fromkeys(figures["train_end"] for figures in results))
    models = list(dict.fromkeys(figures["model"] for figures in results))
    by = {(figures["model"], figures["train_end"]): figures for figures in results}

    def mean(model: str, figure: str) -> float:
        return sum(by[model, fold][figure] for fold in folds) / len(folds)

    def with_interval(figures: dict[str, Any]) -> str:
        lower, upper = figures["interval"]
        return f"{figures['average_precision']:.3f} [{lower:.3f}, {upper:.3f}]"

    return markdown(
        ["model", *[f"AP, trained until {fold}" for fold in folds], "mean AP", "mean AUC", "mean CP@100"],
        [
            [
                model,
                *[with_interval(by[model, fold]) for fold in folds],
                mean(model, "average_precision"),
                mean(model, "roc_auc"),
                mean(model, "card_precision_at_100"),
            ]
            for model in models
        ],
    )


if __name__ == "__main__":
    main()
