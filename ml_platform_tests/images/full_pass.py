"""Raw files to scored rows with nothing but the jobs, and the proof that several Sparks do it alike.

    simulate RAW            make raw files, with their truth (in the project's own environment)
    make RAW OUT            clean, build features, train a model of each learner
    score OUT EVERY_OUT...  score the models of all of them, as the jobs score a champion and prove a reload
    compare RAW EVERY_OUT...  hold everything against each other, oldest Spark first; fails if anything differs

`make` and `score` run on Python 3.8, in environments that copy the cluster's images: see scripts/test_images.sh.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spark_jobs import build_features, clean_transactions, runtime, train_model, verify_model
from spark_jobs.features import FEATURES

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

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
    "logistic_regression": {"regParam": [0.01], "maxIter": [50]},
    "gbt": {"maxIter": [5], "maxDepth": [3], "maxBins": [64], "stepSize": [0.1]},
    "random_forest": {"numTrees": [5], "maxDepth": [4], "maxBins": [64], "featureSubsetStrategy": ["onethird"]},
}
#: Scores that a model loaded by another Spark may differ by; as for a reloaded model, see ml_platform/assets/gate.py.
SAME_SCORE = 1e-9
#: Scores of the same row that models may differ by that several Sparks fitted on the same rows.
SAME_FIT = {"logistic_regression": 1e-3, "gbt": 1e-9, "random_forest": 1e-9}


def simulate(raw: Path) -> None:
    """Raw files that show every fault, and what is true of them."""
    from ml_platform.simulator import Simulation

    simulation = Simulation(customers=200, terminals=400, radius=12.0, days_per_file=DAYS_PER_FILE, fault_rate=1000)
    truth: dict[str, Any] = {}
    for index in range(FILES):
        with (raw / simulation.file_name(index)).open("wb") as out:
            truth[Path(out.name).stem] = simulation.write_file(index, out).counts
    (raw / "truth.json").write_text(json.dumps({"epoch": simulation.start.isoformat(), "counts": truth}))


def make(raw: Path, out: Path) -> None:
    """Clean, build features, train; what the jobs report goes to ``reports.json``."""
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
    models = {learner: _train(spark, out, keys, learner, grid) for learner, grid in GRIDS.items()}
    reports = {"spark_version": spark.version, "cleaned": cleaned_reports, "features": _reports(built)}
    (out / "reports.json").write_text(json.dumps({**reports, "models": models}, indent=1))
    spark.stop()


def _train(spark: SparkSession, out: Path, keys: list[str], learner: str, grid: dict[str, Any]) -> dict[str, Any]:
    uris = [_partition(out, "transaction_features", key) for key in keys]
    report = train_model.run(
        spark,
        {
            "run_id": "pass",
            "cutoff": keys[-1],
            "feature_uris": uris,
            "cutoff_uri": uris[-1],
            "features": list(FEATURES),
            "output_uri": (out / "models" / learner).as_uri(),
            "candidates": [{"learner": learner, "grid": grid}],
            **WINDOWS,
        },
    )
    assert report["outcome"] == "trained", report
    return report


def score(out: Path, everyone: list[Path]) -> None:
    """Let this Spark score every model; verdicts go to ``verdicts.json``, scores beside it."""
    spark = _session(out)
    own = json.loads((out / "reports.json").read_text())
    verdicts: dict[str, dict[str, Any]] = {}
    for other in everyone:
        reports = json.loads((other / "reports.json").read_text())
        for learner, report in reports["models"].items():
            model = {
                "version": "1",
                "model_uri": report["model_uri"],
                "features": report["features"],
                "spark_version": report["spark_version"],
            }
            name = f"{other.name}-{learner}"
            verdict = train_model.write_scores(
                spark, _test_rows(spark, out, own["models"][learner]), _own_model(own, learner), model,
                (out / "scored" / name).as_uri(),
            )  # fmt: skip
            verdicts[name] = {"champion": verdict, "reload": _reload(spark, out, model, report)}
    (out / "verdicts.json").write_text(json.dumps(verdicts, indent=1))
    spark.stop()


def _reload(spark: SparkSession, out: Path, model: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    features_uri = _partition(out, "transaction_features", report["cutoff"])
    request = {"run_id": "pass", "feature_uris": [features_uri], "scores_uri": report["scores_uri"]}
    try:
        return verify_model.run(spark, {**request, "model_uri": model["model_uri"], "features": model["features"]})
    except Exception as error:
        return {"error": runtime.describe(error)}


def _own_model(reports: dict[str, Any], learner: str) -> Any:
    from pyspark.ml import PipelineModel

    return PipelineModel.load(reports["models"][learner]["model_uri"])


def _test_rows(spark: SparkSession, out: Path, report: dict[str, Any]) -> DataFrame:
    """The held-out rows of a model, from this Spark's own features."""
    rows = spark.read.parquet(*[str(path) for path in sorted((out / "transaction_features").iterdir())])
    return rows.join(spark.read.parquet(report["scores_uri"]).select("transaction_id"), "transaction_id")


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
    """Hold all outputs against the first's, and all verdicts against the order of the Sparks; returns what differs."""
    reports = {out.name: json.loads((out / "reports.json").read_text()) for out in everyone}
    wrong = []
    for key, counts in json.loads((raw / "truth.json").read_text())["counts"].items():
        for name, report in reports.items():
            found = report["cleaned"][key]["counts"]
            if {rule: found[rule] for rule in counts} != counts:
                wrong.append(f"{name} counts {found} in {key}, where {counts} were made")
    first, *others = everyone
    for table in ("cleaned_transactions", "rejected_transactions", "transaction_features"):
        expected = _rows(first / table)
        for other in others:
            wrong += [
                f"{table}, {first.name} and {other.name}: {text}" for text in _differ(expected, _rows(other / table))
            ]
        say(f"{table}: {expected.num_rows:,} rows, {expected.num_columns} columns, of {len(everyone)} Sparks compared")
    for learner in GRIDS:
        wrong += _compare_training(learner, everyone)
        for scorer in everyone:
            wrong += _compare_scoring(learner, scorer, everyone, reports)
    return wrong


def _compare_training(learner: str, everyone: list[Path]) -> list[str]:
    """Models that several Sparks fitted on the same rows: they score the same rows, and nearly alike."""
    import pyarrow.compute as pc

    first, *others = everyone
    expected = _rows(first / "models" / learner / "test_scores")
    wrong = []
    for other in others:
        found = _rows(other / "models" / learner / "test_scores")
        names = [name for name in expected.column_names if "score" not in name]
        wrong += [
            f"test rows of {learner}, {other.name}: {text}"
            for text in _differ(expected.select(names), found.select(names))
        ]
        difference = pc.max(pc.abs(pc.subtract(expected["score"], found["score"]))).as_py()
        if difference > SAME_FIT[learner]:
            wrong.append(
                f"{learner} of {first.name} and {other.name} score the same rows by up to {difference} otherwise"
            )
        say(
            f"{learner} fitted by {other.name} and {first.name}: "
            f"largest difference of {len(found):,} scores {difference:.2g}"
        )
    return wrong


def _compare_scoring(learner: str, scorer: Path, everyone: list[Path], reports: dict[str, Any]) -> list[str]:
    """A model scores as where it was saved, unless a newer Spark saved it: then it is refused by name."""
    import pyarrow.compute as pc

    verdicts = json.loads((scorer / "verdicts.json").read_text())
    wrong = []
    for number, saver in enumerate(everyone):
        name = f"{saver.name}-{learner}"
        what = f"{learner} saved by {saver.name}, scored by {scorer.name}"
        champion, reload = verdicts[name]["champion"], verdicts[name]["reload"]
        if number > everyone.index(scorer):
            told = f"saved by Spark {reports[saver.name]['spark_version']}"
            if (
                champion["status"] != "newer_spark"
                or told not in champion["error"]
                or told not in reload.get("error", "")
            ):
                wrong.append(f"{what} was not refused: {champion}, {reload}")
            say(f"{what}: {champion.get('error', champion['status'])}")
            continue
        if champion["status"] != "scored" or not reload.get("rows") or reload["max_difference"] > SAME_SCORE:
            wrong.append(f"{what}: {champion}, {reload}")
            continue
        trained, again = _rows(saver / "models" / learner / "test_scores"), _rows(scorer / "scored" / name)
        rows = ["transaction_id"]
        wrong += [f"{what}: {text}" for text in _differ(trained.select(rows), again.select(rows))]
        difference = pc.max(pc.abs(pc.subtract(trained["score"], again["champion_score"]))).as_py()
        if difference > SAME_SCORE:
            wrong.append(f"{what}: scores differ by up to {difference}")
        say(f"{what}: largest difference of {len(again):,} scores {difference:.2g}")
    return wrong


def _rows(directory: Path) -> pa.Table:
    """The rows of all Parquet files below a directory, in an order that does not depend on the files."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.concat_tables(parquet.ParquetFile(path).read() for path in sorted(directory.rglob("part-*.parquet")))
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
    elif action == "score":
        score(paths[0], paths[1:])
    elif wrong := compare(paths[0], paths[1:]):
        sys.exit("\n".join(["The images differ:", *wrong]))


if __name__ == "__main__":
    main(*sys.argv[1:])
