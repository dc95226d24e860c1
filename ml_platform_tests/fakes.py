"""Fabricated raw files and reports, a Spark engine that acts without Spark, and one on the tests' session.

The fake engine's raw files hold JSON, which says what the file would have held::

    {"start": "2020-01-01T00:00:00Z", "days": 30, "rows": 1000, "frauds": 10, "first_id": 0}

An empty file is an empty partition; ``{"error": "…"}`` is a file that cannot be cleaned, ``{"refused": "…"}`` one that
never can. ``"report": {…}`` replaces fields of the report.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import dagster as dg
from pydantic import Field

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.features import transaction_features
from ml_platform.assets.model import fraud_model
from ml_platform.assets.raw import raw_transactions
from ml_platform.assets.scores import scored_transactions
from ml_platform.checks import ASSET_CHECKS
from ml_platform.jobs import process_new_files
from ml_platform.lake.partitions import range_tags
from ml_platform.lake.quality import QualityLimits
from ml_platform.lake.reports import ALERTS_TABLE, CLEANED_TABLE, SCORED_TABLE, CleanedReport, FeatureInputs
from ml_platform.lake.resource import LakeResource
from ml_platform.model.mlflow import MlflowResource
from ml_platform.spark.engine import JobCall, SparkEngine
from spark_jobs import build_features
from spark_jobs.partitions import Refused
from spark_jobs.schema import ALERT_COLUMNS, FIX_RULES, REJECT_RULES, REPORT_NAME, SCHEMA_VERSION, SCORED_COLUMNS
from spark_jobs.scoring import grading
from spark_jobs.scoring.alerts import PARQUET_NAME
from spark_jobs.train_model import MODEL_FILE, SAMPLE_FILE
from spark_jobs.training.learners import LogisticRegressionModel, Scorer

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

EPOCH = "2020-01-01"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
DAY_0 = datetime(2020, 1, 1)


def local_path(uri: str) -> Path:
    """Path of a ``file://`` URI as the lake makes them, which quotes nothing."""
    return Path(uri.removeprefix("file://"))


def raw_spec(number: int, **changes: Any) -> dict[str, Any]:
    """What the raw file of the `number`-th 30 days holds: rows, frauds and ids of its own."""
    return {
        "start": (DAY_0 + timedelta(days=30 * number)).strftime(TIME_FORMAT),
        "days": 30,
        "rows": 20_000,
        "frauds": 200,
        "first_id": 1_000_000 * number,
        **changes,
    }


def rows_per_day(number: int) -> dict[str, int]:
    """The report's field of that name for the raw file of the `number`-th 30 days."""
    first = DAY_0 + timedelta(days=30 * number)
    return {(first + timedelta(days=day)).strftime(TIME_FORMAT): 1 for day in range(30)}


def put_raw(lake: LakeResource, key: str, spec: dict[str, Any] | None) -> None:
    """Put a raw file that the fake engine understands; None makes an empty one."""
    lake.raw.write(f"{key}.txt", b"" if spec is None else json.dumps(spec).encode())


def cleaned_report(
    key: str,
    spec: dict[str, Any] | None = None,
    *,
    raw: dict[str, Any] | None = None,
    run_id: str = "fabricated",
    epoch: str = EPOCH,
    **counts: int,
) -> dict[str, Any]:
    """The report of a cleaned raw file; `counts` replace those that follow from `spec`."""
    spec = spec or {"rows": 0, "frauds": 0}
    rows = spec["rows"]
    start = datetime.strptime(spec["start"], TIME_FORMAT) if rows else None
    end = start + timedelta(days=spec["days"], seconds=-1) if start else None
    return {
        "schema_version": SCHEMA_VERSION,
        "partition": key,
        "run_id": run_id,
        "raw": raw or {"uri": f"file:///raw/{key}.txt", "size": 1, "fingerprint": "1-1"},
        "epoch": epoch,
        "header": True,
        "counts": {
            **dict.fromkeys((*REJECT_RULES, *FIX_RULES), 0),
            "raw_rows": rows,
            "clean_rows": rows,
            "duplicate_rows": 0,
            "duplicate": 0,
            "rejected_rows": 0,
            "fraud_rows": spec["frauds"],
            "zero_amount": 0,
            **counts,
        },
        "tx_datetime": times_between(
            start.strftime(TIME_FORMAT) if start else None, end.strftime(TIME_FORMAT) if end else None
        ),
        "transaction_id": ids_between(
            spec["first_id"] if rows else None, spec["first_id"] + rows - 1 if rows else None
        ),
        "rows_per_day": {},
        "odd_rows": {"rows": 0, "usual_days": [], "examples": []},
        "out_of_range": None,
        "text_bytes": (raw or {"size": 1})["size"],
        "shared_ids": {},
        "reject_samples": {},
        "accepted": False,
        "spark_version": "0.0.0",
        "seconds": 0.1,
    }


def times_between(first: str | None, last: str | None) -> dict[str, str | None]:
    """The ``tx_datetime`` of a report, without odd rows."""
    days = [time and f"{time[:10]}T00:00:00Z" for time in (first, last)]
    return {"min": first, "max": last, "p0_1": days[0], "p99_9": days[1]}


def ids_between(first: int | None, last: int | None) -> dict[str, int | None]:
    """The ``transaction_id`` of a report, without odd rows."""
    return {"min": first, "max": last, "p0_1": first, "p99_9": last}


def cleaned_reports(*reports: dict[str, Any]) -> dict[str, CleanedReport]:
    """Reports of cleaned raw files by partition, as the lake returns them."""
    return {report["partition"]: CleanedReport.model_validate(report) for report in reports}


def put_report(lake: LakeResource, table: str, key: str, report: Any) -> None:
    """Put a report, which marks the partition as complete."""
    lake.write_json(f"{lake.partition_path(table, key)}/{REPORT_NAME}", report)


def put_cleaned(lake: LakeResource, *keys: str, **changes: Any) -> None:
    """Mark raw files as cleaned, as they are now."""
    files, _ = lake.list_raw_files()
    for key in keys:
        content = lake.raw.read(f"{key}.txt")
        spec = json.loads(content) if content else None
        report = cleaned_report(key, spec, raw=files[key].as_request(), epoch=lake.epoch)
        put_report(lake, CLEANED_TABLE, key, {**report, **changes})


def put_scores(lake: LakeResource, key: str, rows: list[dict[str, Any]]) -> None:
    """Write rows of ``scored_transactions``, and those of them that are alerts; the report is not written."""
    import pyarrow as pa
    from pyarrow import parquet

    types = {
        **{"bigint": pa.int64(), "int": pa.int32(), "double": pa.float64(), "boolean": pa.bool_()},
        **{"string": pa.string(), "timestamp": pa.timestamp("us", "UTC")},
    }
    for table, columns, name, chosen in (
        (SCORED_TABLE, SCORED_COLUMNS, "part-0.parquet", rows),
        (ALERTS_TABLE, ALERT_COLUMNS, PARQUET_NAME, [row for row in rows if row["alert"]]),
    ):
        directory = Path(lake.lake_uri) / lake.partition_path(table, key)
        directory.mkdir(parents=True, exist_ok=True)
        schema = pa.schema([(column, types[kind]) for column, kind, *_ in columns])
        parquet.write_table(pa.Table.from_pylist(chosen, schema), directory / name)


class FakeEngine(SparkEngine):
    """Reads what the raw files say of themselves, and writes the reports that the real jobs would write."""

    no_features: dict[str, str] = Field(default_factory=dict, description="Partition → error.")
    too_little: dict[str, str] = Field(default_factory=dict, description="Cut-off → reason.")
    breaks_down: str = Field("", description="Job that raises.")
    challenger_skill: float = Field(2.0, description="How far its scores of frauds are above those of the others.")
    champion_skill: float | None = Field(2.0, description="The same of the champion; None: its very scores.")
    champion_error: str = Field("", description="Why the champion cannot score: a newer library wrote it.")
    live_average_precision: float = Field(0.7, description="Of each week that it grades.")
    grading_error: str | None = Field(None, description="Why a week has no grade.")
    reload_difference: float = Field(0.0, description="Between the scores of a model and of the same loaded back.")

    def _execute(self, call: JobCall) -> dict[str, Any]:
        if call.job == self.breaks_down:
            raise RuntimeError(f"{call.job} broke down")
        report = getattr(self, f"_{call.job}")(call.request)
        call.lake.write_json(call.file("report.json"), report)
        return report

    def _clean_transactions(self, request: dict[str, Any]) -> dict[str, Any]:
        def clean(item: dict[str, Any]) -> dict[str, Any]:
            content = local_path(item["raw"]["uri"]).read_text()
            spec = json.loads(content) if content else None
            if spec and "error" in spec:
                raise RuntimeError(spec["error"])
            if spec and "refused" in spec:
                raise Refused(spec["refused"])
            counts = (spec or {}).get("counts", {})
            key, run_id, epoch = item["partition"], request["run_id"], request["epoch"]
            report = cleaned_report(key, spec, raw=item["raw"], run_id=run_id, epoch=epoch, **counts)
            made_with = {"out_of_range": request["out_of_range"], "accepted": item["accepted"]}
            return {**report, **made_with, **(spec or {}).get("report", {})}

        return self._verdicts(request, clean)

    def _build_features(self, request: dict[str, Any]) -> dict[str, Any]:
        def build(item: dict[str, Any]) -> dict[str, Any]:
            if item["partition"] in self.no_features:
                raise RuntimeError(self.no_features[item["partition"]])
            cleaned = json.loads((local_path(item["cleaned_uri"]) / REPORT_NAME).read_text())
            return features_report(cleaned, item["inputs"], run_id=request["run_id"])

        return self._verdicts(request, build)

    def _score_transactions(self, request: dict[str, Any]) -> dict[str, Any]:
        """The report of each partition; a model without an error scores every row."""
        champion, entries = request["champion"], dict(request["grading"]["scored"])
        outcome = "no_champion" if champion is None else "champion_unreadable" if champion["error"] else "scored"
        model = champion or dict.fromkeys(("version", "error", "out_of_time_from", "held_out"))

        def score(item: dict[str, Any]) -> dict[str, Any]:
            rows = item["rows"] if outcome == "scored" else 0
            days = sorted(map(int, item["rows_per_day"])) if rows else []
            report = scored_report(item["partition"], rows=rows, model_version=model["version"]) | {
                "run_id": request["run_id"],
                "inputs": item["inputs"],
                "cause": item["cause"],
                "outcome": outcome,
                "error": model["error"],
                "out_of_time_from": model["out_of_time_from"],
                "held_out": model["held_out"],
                "alerts_per_day": request["alerts_per_day"],
                "weeks": grading.live_weeks(dict.fromkeys(days, 1), request["epoch"], model["out_of_time_from"]),
            }
            if rows:
                entries[item["partition"]] = grading.entry_of(item["output_uri"], report)
            if item is request["partitions"][-1]:
                weeks = grading.ungraded_weeks({**request["grading"], "epoch": request["epoch"], "scored": entries})
                report["grades"] = [self._grade(week, model["held_out"]) for week in weeks]
                report["grading_error"] = self.grading_error
            return report

        return self._verdicts(request, score)

    def _grade(self, week: grading.Week, held_out: Any) -> dict[str, Any]:
        precision = self.live_average_precision
        return {
            **{"week": week.week, "model_version": week.version, "scores": week.scores, "held_out": held_out},
            **{"first_date": "2020-01-01", "last_date": "2020-01-07", "graded_at": "2020-01-14T00:00:00Z"},
            **{"alerts_per_day": 100, "rows": 7000, "frauds": 70, "roc_auc": 0.9, "card_precision_at_100": 0.3},
            "average_precision": precision,
            "average_precision_lower": precision - 0.05,
            "average_precision_upper": precision + 0.05,
            **{"precision_at_budget": 0.3, "recall_at_budget": 0.7, "calibration": 1.0},
        }

    @staticmethod
    def _verdicts(request: dict[str, Any], work: Any) -> dict[str, Any]:
        verdicts: dict[str, Any] = {}
        for item in request["partitions"]:
            target = local_path(item["output_uri"]) / REPORT_NAME
            try:
                report = work(item)
            except Refused as error:
                target.unlink(missing_ok=True)
                verdicts[item["partition"]] = {"status": "refused", "error": str(error)}
            except RuntimeError as error:
                target.unlink(missing_ok=True)
                verdicts[item["partition"]] = {"status": "failed", "error": f"RuntimeError: {error}"}
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(report))
                verdicts[item["partition"]] = {"status": "succeeded", "report": report}
        return {
            "run_id": request["run_id"],
            "spark_version": "0.0.0",
            "seconds": 0.1,
            "partitions": verdicts,
        }

    def _train_model(self, request: dict[str, Any]) -> dict[str, Any]:
        report: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "run_id": request["run_id"],
            "cutoff": request["cutoff"],
            "features": request["features"],
            "seed": request["seed"],
            "windows": {
                "train": {"first_date": "2020-01-01", "last_date": "2020-01-16", "rows": 5000, "frauds": 600},
                "test": {"first_day": 23, "last_day": 29, "rows": 500, "frauds": 60}
                | {"first_date": "2020-01-24", "last_date": "2020-01-30"},
            },
            "spark_version": "4.0.0",
            "seconds": {"total": 0.1},
        }
        if request["cutoff"] in self.too_little:
            return report | {"outcome": "too_little_data", "reason": self.too_little[request["cutoff"]]}
        output = local_path(request["output_uri"])
        output.mkdir(parents=True)
        self._write_model(output, request["features"])
        points = [
            {"learner": candidate["learner"], "params": dict(zip(candidate["grid"], values, strict=True))}
            for candidate in request["candidates"]
            for values in itertools.product(*candidate["grid"].values())
        ]
        grid = [{**point, "validation_average_precision": 0.5 + n / 100} for n, point in enumerate(points)]
        self._write_scores(
            output / "test_scores", with_champion=request["champion"] is not None and not self.champion_error
        )
        return report | {
            "outcome": "trained",
            "grid": grid,
            "best": grid[-1],
            "sampling": None,
            "feature_importances": {name: 1 / len(request["features"]) for name in request["features"]},
            "champion": request["champion"] and {**request["champion"], **self._champion_verdict()},
            "model_uri": f"{request['output_uri']}/model.json",
            "scores_uri": f"{request['output_uri']}/test_scores",
            "sample_uri": f"{request['output_uri']}/sample.parquet",
        }

    def _champion_verdict(self) -> dict[str, str]:
        if self.champion_error:
            return {"status": "newer_library", "error": self.champion_error}
        return {"status": "scored"}

    def _write_scores(self, directory: Path, *, with_champion: bool) -> None:
        """Scores of 500 rows, 60 of them frauds: the champion's are as good as `champion_skill` says."""
        import numpy as np
        import pyarrow as pa
        from pyarrow import parquet

        random = np.random.default_rng(0)
        label = (np.arange(500) < 60).astype("int32")
        challenger = label * self.challenger_skill + random.normal(size=500)
        champion = challenger
        if self.champion_skill is not None:
            champion = label * self.champion_skill + random.normal(size=500)
        columns = {
            "transaction_id": np.arange(500),
            "tx_datetime": np.datetime64("2020-01-24", "us") + np.arange(500) * np.timedelta64(20, "m"),
            "customer_id": np.arange(500) % 250,
            "tx_amount": np.full(500, 10.0),
            "tx_fraud": label,
            "tx_fraud_scenario": label,
            "score": 1 / (1 + np.exp(-challenger)),
            "champion_score": 1 / (1 + np.exp(-champion)) if with_champion else np.full(500, np.nan),
        }
        table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
        directory.mkdir(parents=True)
        parquet.write_table(table, directory / "part-0.parquet")

    def _write_model(self, directory: Path, features: list[str]) -> None:
        """A model file, and 100 rows with its scores, which `reload_difference` changes."""
        import numpy as np
        import pandas

        ones = np.ones(len(features))
        scorer = Scorer("logistic_regression", features, LogisticRegressionModel(0 * ones, ones, 0.1 * ones, -1.0))
        (directory / MODEL_FILE).write_text(scorer.to_json())
        matrix = np.random.default_rng(1).normal(size=(100, len(features))).astype("f4")
        sample = pandas.DataFrame(matrix.astype("f8"), columns=features)
        sample["score"] = scorer.score(matrix) + self.reload_difference
        sample.to_parquet(directory / SAMPLE_FILE)


class SessionEngine(SparkEngine):
    """Runs the jobs in the tests' own session."""

    session: ClassVar[SparkSession]

    def _execute(self, call: JobCall) -> dict[str, Any]:
        report: dict[str, Any] = importlib.import_module(f"spark_jobs.{call.job}").run(self.session, call.request)
        return report


def scored_report(key: str, *, rows: int, model_version: int | None) -> dict[str, Any]:
    """Report of a partition of ``scored_transactions``, without grades."""
    return {
        "schema_version": SCHEMA_VERSION,
        "partition": key,
        "run_id": "a-run",
        "inputs": {"cleaned": "a version"},
        "cause": "new",
        "outcome": "no_champion" if model_version is None else "scored",
        "error": None,
        "model_version": model_version,
        "out_of_time_from": None,
        "held_out": None,
        "alerts_per_day": 100,
        "counts": {"rows": rows, "alerts": min(rows, 10)},
        "score_sum": 0.01 * rows,
        "weeks": {},
        "alerts": [],
        "drift": {},
        "grades": [],
        "grading_error": None,
        "spark_version": "0.0.0",
        "seconds": 0.1,
    }


def features_report(
    cleaned: dict[str, Any], inputs: FeatureInputs | dict[str, Any], *, run_id: str = "fabricated", **counts: int
) -> dict[str, Any]:
    """The report of the features of a cleaned partition."""
    return {
        "schema_version": SCHEMA_VERSION,
        "partition": cleaned["partition"],
        "run_id": run_id,
        "inputs": inputs if isinstance(inputs, dict) else inputs.model_dump(),
        "features": list(build_features.MODEL_INPUTS),
        "counts": {
            "rows": cleaned["counts"]["clean_rows"],
            "fraud_rows": cleaned["counts"]["fraud_rows"],
            "unusable_rows": 0,
            **counts,
        },
        "spark_version": "0.0.0",
        "seconds": 0.1,
    }


def definitions(
    lake: LakeResource, engine: SparkEngine | None = None, mlflow: MlflowResource | None = None
) -> dg.Definitions:
    """The platform's assets, checks and job around a lake and an engine of the test's own."""
    return dg.Definitions(
        assets=[raw_transactions, cleaned_transactions, transaction_features, scored_transactions, fraud_model],
        asset_checks=ASSET_CHECKS,
        jobs=[process_new_files],
        resources={
            "lake": lake,
            "spark": engine or FakeEngine(),
            "mlflow": mlflow or MlflowResource(tracking_uri="sqlite:////nowhere/mlflow.db"),
            "limits": QualityLimits(),
        },
        executor=dg.in_process_executor,
    )


def run_assets(
    definitions: dg.Definitions,
    instance: dg.DagsterInstance,
    *assets: str,
    keys: tuple[str, str],
    config: dict[str, dict[str, Any]] | None = None,
    tags: dict[str, str] | None = None,
    limits: dict[str, Any] | None = None,
) -> dg.ExecuteInProcessResult:
    """Run assets, with their checks, over the partitions from the first to the second key."""
    ops = {asset: {"config": values} for asset, values in (config or {}).items()}
    resources = {"limits": {"config": limits or {}}}
    return definitions.resolve_job_def("process_new_files").execute_in_process(
        run_config={"ops": ops, "resources": resources},
        instance=instance,
        tags=range_tags(*keys) | (tags or {}),
        asset_selection=[dg.AssetKey(asset) for asset in assets],
        raise_on_error=False,
    )


def requests_of(lake: LakeResource, run_id: str, job: str) -> list[dict[str, Any]]:
    """The requests that the jobs of a run got."""
    directory = local_path(lake.store.spark_uri(f"_runs/{run_id}"))
    return [json.loads(path.read_text()) for path in sorted(directory.glob(f"{job}*.request.json"))]


def partitions_sent(lake: LakeResource, run_id: str, job: str) -> list[str]:
    """Partitions of a run's request, in order; empty if the job did not run."""
    return [item["partition"] for request in requests_of(lake, run_id, job) for item in request["partitions"]]


def recorded(instance: dg.DagsterInstance, asset: str, run_id: str | None = None) -> dict[str, dict[str, Any]]:
    """Metadata of each partition's last materialization (of one run), by partition."""
    events: Iterable[dg.EventLogRecord] = instance.fetch_materializations(dg.AssetKey(asset), limit=1000).records
    found: dict[str, dict[str, Any]] = {}
    for event in events:  # newest first
        materialization = event.asset_materialization
        assert materialization is not None
        assert materialization.partition is not None
        if run_id in (None, event.run_id):
            found.setdefault(
                materialization.partition,
                {name: value.value for name, value in materialization.metadata.items()},
            )
    return found
