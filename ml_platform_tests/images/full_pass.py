"""Raw files to scored rows by the jobs alone, and the comparison of what several Sparks write.

    simulate RAW            make raw files, with their truth (in the project's environment)
    make RAW OUT            clean, build features, train a model of each learner, score
    compare RAW OUT...      compare all outputs with the first and the truth; fails if any differs

`make` also runs on Python 3.8, in copies of the cluster's images: see scripts/test_images.sh.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spark_jobs import build_features, clean_transactions, score_transactions, train_model
from spark_jobs.features.registry import MODEL_INPUTS

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

FILES = 2
DAYS_PER_FILE = 14
WINDOWS = {
    "test_days": 4,
    "delay_days": 2,
    "validation_days": 4,
    "train_days": 20,
    "min_train_days": 5,
    "compromised_lookback_days": 3,
}
#: Small, so that a fit takes seconds.
GRIDS: dict[str, dict[str, list[Any]]] = {
    "xgboost": {"rounds": [5, 20], "max_depth": [3], "subsample": [0.8], "colsample_bynode": [0.5]},
    "logistic_regression": {"C": [1]},
}
#: Tolerance of scores: XGBoost is the same everywhere, but each image has its own solver for logistic regression.
SAME_FIT = {"xgboost": 0.0, "logistic_regression": 1e-6}


def simulate(raw: Path) -> None:
    """Raw files with every fault, and their true counts."""
    from ml_platform.dev.simulator import Simulation

    simulation = Simulation(customers=200, terminals=400, radius=12.0, days_per_file=DAYS_PER_FILE, fault_rate=1000)
    truth: dict[str, Any] = {}
    for index in range(FILES):
        with (raw / simulation.file_name(index)).open("wb") as out:
            truth[Path(out.name).stem] = simulation.write_file(index, out).counts
    (raw / "truth.json").write_text(json.dumps({"epoch": simulation.start.isoformat(), "counts": truth}))


def make(raw: Path, out: Path) -> None:
    """Clean, build features, train; the reports of the jobs go to ``reports.json``."""
    spark = _session(out)
    truth = json.loads((raw / "truth.json").read_text())
    keys = sorted(truth["counts"])
    cleaned = clean_transactions.run(
        spark,
        {
            "run_id": "pass",
            "epoch": truth["epoch"],
            "partitions": [
                {
                    "partition": key,
                    "raw": {
                        "uri": (raw / f"{key}.txt").as_uri(),
                        "size": (raw / f"{key}.txt").stat().st_size,
                        "fingerprint": key,
                    },
                    "output_uri": _partition(out, "cleaned_transactions", key),
                    "rejected_uri": _partition(out, "rejected_transactions", key),
                }
                for key in keys
            ],
        },
    )
    cleaned_reports = _reports(cleaned)
    built = build_features.run(
        spark,
        {
            "run_id": "pass",
            "partitions": [
                {
                    "partition": key,
                    "cleaned_uri": _partition(out, "cleaned_transactions", key),
                    "tx_datetime_min": cleaned_reports[key]["tx_datetime"]["min"],
                    "history": [_partition(out, "cleaned_transactions", earlier) for earlier in keys[:number]],
                    "cleaned_bytes": (raw / f"{key}.txt").stat().st_size,
                    "inputs": {},
                    "output_uri": _partition(out, "transaction_features", key),
                }
                for number, key in enumerate(keys)
            ],
        },
    )
    models: dict[str, Any] = {}
    champion = None
    for learner in GRIDS:
        models[learner] = _train(spark, out, keys, learner, champion)
        champion = {name: models[learner][name] for name in ("model_uri", "features")}
    scored = _score(spark, out, keys, cleaned_reports, models["xgboost"]["model_uri"], truth["epoch"])
    reports = {"spark_version": spark.version, "cleaned": cleaned_reports, "features": _reports(built)}
    reports["scored"] = _reports(scored)
    (out / "reports.json").write_text(json.dumps({**reports, "models": models}, indent=1))
    spark.stop()


def _train(spark: SparkSession, out: Path, keys: list[str], learner: str, champion: Any) -> dict[str, Any]:
    """Train a model that competes with the one trained before."""
    uris = [_partition(out, "transaction_features", key) for key in keys]
    report = train_model.run(
        spark,
        {
            "run_id": "pass",
            "cutoff": keys[-1],
            "feature_uris": uris,
            "cutoff_uri": uris[-1],
            "features": list(MODEL_INPUTS),
            "output_uri": (out / "models" / learner).as_uri(),
            "candidates": [{"learner": learner, "grid": GRIDS[learner]}],
            "champion": champion,
            "library_uri": os.environ.get("LIBRARY_ARCHIVE"),
            **WINDOWS,
        },
    )
    assert report["outcome"] == "trained", report
    assert champion is None or report["champion"]["status"] == "scored", report
    (out / "models" / learner / "_report.json").write_text(json.dumps(report))
    return report


def _score(
    spark: SparkSession, out: Path, keys: list[str], cleaned: dict[str, Any], model_uri: str, epoch: str
) -> dict[str, Any]:
    """Score all files with a model, and grade the weeks whose labels are known."""
    spans = {key: [number * DAYS_PER_FILE, (number + 1) * DAYS_PER_FILE - 1] for number, key in enumerate(keys)}
    champion = {"version": 1, "model_uri": model_uri, "out_of_time_from": epoch}
    champion["report_uri"] = model_uri.replace("model.json", "_report.json")
    return score_transactions.run(
        spark,
        {
            "run_id": "pass",
            "library_uri": os.environ.get("LIBRARY_ARCHIVE"),
            "champion": {**champion, "held_out": None, "error": None},
            "epoch": epoch,
            "alerts_per_day": 10,
            "data_first_day": 0,
            "partitions": [
                {
                    "partition": key,
                    "cause": "new",
                    "inputs": {},
                    "rows": cleaned[key]["counts"]["clean_rows"],
                    "rows_per_day": {str(day): 1 for day in range(spans[key][0], spans[key][1] + 1)},
                    "usual_days": spans[key],
                    "features_uri": _partition(out, "transaction_features", key),
                    "output_uri": _partition(out, "scored_transactions", key),
                    "alerts_uri": _partition(out, "alerts", key),
                }
                for key in keys
            ],
            "grading": {
                "last_day": spans[keys[-1]][1],
                "delay_days": 7,
                "compromised_lookback_days": 7,
                "scored": {},
                "cleaned": {
                    key: {
                        "uri": _partition(out, "cleaned_transactions", key),
                        "first_day": spans[key][0],
                        "last_day": spans[key][1] + 1,
                    }
                    for key in keys
                },
                "grades": [],
            },
        },
    )


def _session(out: Path) -> SparkSession:
    from ml_platform_tests.images.session import FEW_PARTITIONS, start_session

    out.mkdir(parents=True, exist_ok=True)
    return start_session(str(out / "warehouse"), FEW_PARTITIONS)


def _partition(out: Path, table: str, key: str) -> str:
    return (out / table).as_uri() + f"/raw_file={key}"


def _reports(answer: dict[str, Any]) -> dict[str, Any]:
    verdicts = answer["partitions"]
    assert all(verdict["status"] == "succeeded" for verdict in verdicts.values()), verdicts
    return {key: verdict["report"] for key, verdict in verdicts.items()}


def compare(raw: Path, everyone: list[Path]) -> list[str]:
    """Compare all outputs with the first; returns the differences."""
    reports = {out.name: json.loads((out / "reports.json").read_text()) for out in everyone}
    wrong = []
    for key, counts in json.loads((raw / "truth.json").read_text())["counts"].items():
        for name, report in reports.items():
            found = report["cleaned"][key]["counts"]
            if {rule: found[rule] for rule in counts} != counts:
                wrong.append(f"{name} counts {found} in {key}, where {counts} were made")
    first, *others = everyone
    for table in (
        "cleaned_transactions",
        "rejected_transactions",
        "transaction_features",
        "scored_transactions",
        "alerts",
    ):
        expected = _rows(first / table)
        for other in others:
            wrong += [
                f"{table}, {first.name} and {other.name}: {text}" for text in _differ(expected, _rows(other / table))
            ]
        say(f"{table}: {expected.num_rows:,} rows, {expected.num_columns} columns, of {len(everyone)} Sparks compared")
    for learner in GRIDS:
        wrong += _compare_training(learner, everyone)
    for key, report in reports[first.name]["scored"].items():
        for other in others:
            found = reports[other.name]["scored"][key]
            wrong += [
                f"the report on scores of {key} of {first.name} and {other.name} differs in {name}"
                for name in ("outcome", "counts", "weeks", "alerts", "drift")
                if not _close(report[name], found[name])
            ]
            grades = [[{**grade, "graded_at": ""} for grade in one["grades"]] for one in (report, found)]
            wrong += [f"the grades of {key} of {first.name} and {other.name} differ"] * (not _close(*grades))
    # The platform computes the metrics from the test scores, which _compare_training compares.
    expected = reports[first.name]["models"]["xgboost"]
    for other in others:
        found = reports[other.name]["models"]["xgboost"]
        wrong += [
            f"the report on xgboost of {first.name} and {other.name} differs in {name}"
            for name in ("windows", "best", "feature_importances", "profile")
            if not _close(expected[name], found[name])
        ]
    return wrong


def _close(expected: Any, found: Any) -> bool:
    """Whether two parts of reports are equal but for the last digits of numbers."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(_close(expected[name], found[name]) for name in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(_close, expected, found))
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-12)
    return bool(expected == found)


def _compare_training(learner: str, everyone: list[Path]) -> list[str]:
    """Models of the same rows: equal scores within SAME_FIT, there and in this process."""
    import pyarrow.compute as pc

    first, *others = everyone
    models = {out.name: (out / "models" / learner / "model.json").read_bytes() for out in everyone}
    expected = _rows(first / "models" / learner / "test_scores")
    names = [name for name in expected.column_names if name != "score"]
    wrong = [
        f"{learner} of {name} does not score as there" for name in models if not _scores_again(learner, name, everyone)
    ]
    for other in others:
        found = _rows(other / "models" / learner / "test_scores")
        wrong += [
            f"test rows of {learner}, {other.name}: {text}"
            for text in _differ(expected.select(names), found.select(names))
        ]
        difference = pc.max(pc.abs(pc.subtract(expected["score"], found["score"]))).as_py()
        if difference > SAME_FIT[learner]:
            wrong.append(f"{learner} of {first.name} and {other.name}: scores differ by up to {difference}")
        same_file = models[other.name] == models[first.name]
        if SAME_FIT[learner] == 0 and not same_file:
            wrong.append(f"the model files of {learner} of {first.name} and {other.name} differ")
        say(
            f"{learner} fitted by {other.name} and {first.name}: {'the same' if same_file else 'another'} file, "
            f"largest difference of {len(found):,} scores {difference:.2g}"
        )
    return wrong


def _scores_again(learner: str, name: str, everyone: list[Path]) -> bool:
    """Whether a model gives its sample the same scores in this process."""
    import numpy as np
    from pyarrow import parquet

    from spark_jobs.training.learners import Scorer, matrix_of

    (out,) = (out for out in everyone if out.name == name)
    directory = out / "models" / learner
    scorer = Scorer.from_json((directory / "model.json").read_bytes())
    sample = parquet.read_table(directory / "sample.parquet").to_pydict()
    differences = np.abs(scorer.score(matrix_of(sample, scorer.features)) - np.array(sample["score"]))
    return bool(differences.max() <= (0.0 if learner == "xgboost" else 1e-12))


def _rows(directory: Path) -> pa.Table:
    """The rows of all Parquet files below a directory, in an order that does not depend on the files."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.concat_tables(parquet.ParquetFile(path).read() for path in sorted(directory.rglob("[pa]*.parquet")))
    key = "transaction_id" if "transaction_id" in table.column_names else "raw_line"
    return table.replace_schema_metadata(None).sort_by(key).combine_chunks()


def _differ(expected: pa.Table, found: pa.Table) -> list[str]:
    """How two tables differ, in a sentence or none: types, rows, or values bit for bit."""
    if expected.schema != found.schema:
        return [f"columns {expected.schema} and {found.schema}"]
    if expected.num_rows != found.num_rows:
        return [f"{expected.num_rows} and {found.num_rows} rows"]
    columns = [name for name in expected.column_names if not expected[name].equals(found[name])]
    return [f"other values in {', '.join(columns)}"] if columns else []


def say(text: str) -> None:
    """A line of the protocol."""
    print(text, flush=True)


def main(action: str, *arguments: str) -> None:
    """See the module's docstring."""
    paths = [Path(argument).absolute() for argument in arguments]
    if action == "simulate":
        simulate(*paths)
    elif action == "make":
        make(*paths)
    elif wrong := compare(paths[0], paths[1:]):
        sys.exit("\n".join(["The images differ:", *wrong]))


if __name__ == "__main__":
    main(*sys.argv[1:])
