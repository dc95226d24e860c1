"""Fit a fraud model on ``transaction_features``, choose its parameters and judge it on later rows.

All windows are whole days (``tx_time_days``) and end with the last full day D of the cut-off partition::

    |<------------------- train ------------------>|<- delay ->|<-- test -->|
    |<-- validation_train -->|<- delay ->|<- valid. ->|                     D

A label is known `delay_days` after its transaction, so nothing is fitted on labels that would not have been
known. The parameters are those with the best average precision on the validation window; the model is then
fitted on the whole train window. Nothing is drawn at random. Of the test window, nothing but its numbers of
rows and frauds is used before the model is fitted; of what comes after D, nothing at all.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from spark_jobs import evaluation, runtime
from spark_jobs.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyspark.ml import PipelineModel
    from pyspark.sql import Column, DataFrame, SparkSession

log = logging.getLogger("spark_jobs")

#: Settings of a request that may be left out; days are whole days.
DEFAULTS: dict[str, Any] = {
    "test_days": 7,
    "delay_days": 7,
    "train_days": 60,
    "validation_days": 7,
    "min_train_days": 7,
    "min_frauds": 10,
    "alerts_per_day": 100,
    "grid": {"regParam": [0, 0.1, 0.5], "maxIter": [100, 500, 1000]},
    "compromised_lookback_days": 7,
    "seed": 0,
    "champion": None,
}

#: What a request cannot do without.
REQUIRED = ("run_id", "cutoff", "feature_uris", "cutoff_uri", "features", "output_uri")

#: Columns of ``test_scores``; ``score`` and ``champion_score`` follow them.
SCORED_COLUMNS = ("transaction_id", "tx_datetime", "customer_id", "tx_amount", "tx_fraud")

#: Fits that run at the same time. A fit's many small jobs leave cores idle that another fit can use.
PARALLEL_FITS = 3

LABEL = "tx_fraud"
VECTOR = "feature_vector"


def run(spark: SparkSession, request: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate and save one model.

    Request:
        run_id: identifies the run in the report.
        cutoff: key of the last partition that the model may know.
        feature_uris: directories of ``transaction_features``, Parquet.
        cutoff_uri: the one of them that belongs to `cutoff`; its last full day is D.
        features: names of the feature columns, in the order of the model's coefficients.
        output_uri: directory for the model and the scores; what is there is replaced.
        test_days, delay_days, train_days, validation_days: lengths of the windows (7, 7, 60, 7). The train
            window is shorter if the data do not reach back so far.
        min_train_days: the fewest days to fit on while parameters are chosen (7).
        min_frauds: the fewest frauds in each window (10).
        alerts_per_day: budget of the figures ``…_at_budget`` (100).
        grid: parameter of pyspark.ml's LogisticRegression → values; every combination is a candidate, the
            first names vary slowest.
        compromised_lookback_days: see `without_compromised_cards` (7).
        seed: recorded in the report; logistic regression draws nothing (0).
        champion: null or {"model_uri", "features", "version", "spark_version"}: a saved PipelineModel that
            scores the same test rows.

    Report: ``schema_version``, ``run_id``, ``cutoff``, ``features``, ``seed``, ``windows`` (name →
        ``first_day``, ``last_day``, ``first_date``, ``last_date``, ``days``, ``rows``, ``frauds``; test also
        ``removed_rows`` and ``removed_frauds`` of cards known as compromised), ``spark_version``, ``seconds``
        (phase → seconds), and ``outcome``:

    * ``too_little_data``, with ``reason``, one sentence; nothing is written.
    * ``trained``, with ``grid`` (``params``, ``validation_average_precision``, ``iterations``,
      ``reused_fit``, ``seconds``), ``best`` (``params``, ``validation_average_precision``, ``iterations`` of
      the final fit), ``coefficients`` (feature → value, in units of the feature), ``intercept``, ``metrics``
      (``test_…``, and ``champion_test_…`` where a champion scored; see `evaluation.evaluate`), ``champion``
      (null, or the request's with ``status`` scored or unreadable, the latter with ``error``), ``model_uri``,
      ``scores_uri``.

    Writes ``output_uri/model`` (PipelineModel) and ``output_uri/test_scores`` (Parquet: `SCORED_COLUMNS`,
    score, champion_score), the latter being the rows that the metrics are computed on.

    Raises:
        ValueError: the request lacks a key, or the partitions lack a column.
    """
    runtime.configure(spark)
    settings = _settings(request)
    clock = _Clock()
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run_id": settings["run_id"],
        "cutoff": settings["cutoff"],
        "features": settings["features"],
        "seed": settings["seed"],
        "windows": {},
        "spark_version": spark.version,
        "seconds": clock.seconds,
    }
    with clock.phase("total"):
        report.update(_train(spark, settings, report["windows"], clock))
    return report


def _train(spark: SparkSession, settings: dict[str, Any], described: dict[str, Any], clock: _Clock) -> dict[str, Any]:
    with clock.phase("windows"):
        frame = _read_features(spark, settings)
        ends = _ends(spark, frame, settings)
        if ends is None:
            return _too_little("The cut-off partition {} has no rows.".format(settings["cutoff"]))
        last_day, day_zero = ends
        per_day = _rows_per_day(frame, last_day)
        if not per_day:
            return _too_little("The cut-off partition {} has no full day.".format(settings["cutoff"]))
        windows = time_windows(min(per_day), last_day, settings)
        runtime.set_shuffle_partitions(spark, 64 * sum(rows for rows, _ in per_day.values()))
        test = _between(without_compromised_cards(frame, windows["test"], settings), windows["test"])
        test_counts = _count(test)
        described.update(_describe(windows, per_day, test_counts, day_zero))
        reason = _shortage(windows, described, settings)
        if reason:
            return _too_little(reason)
        for name, window in described.items():
            log.info(
                "%s: %s to %s, %d rows, %d frauds",
                name, window["first_date"], window["last_date"], window["rows"], window["frauds"],
            )  # fmt: skip

    from pyspark.ml import PipelineModel
    from pyspark.ml.feature import VectorAssembler

    assembler = VectorAssembler(inputCols=settings["features"], outputCol=VECTOR)

    def learning_rows(window: tuple[int, int]) -> DataFrame:
        return assembler.transform(_between(frame, window)).select(LABEL, VECTOR)

    with clock.phase("search"), _persisted(
        learning_rows(windows["validation_train"]), learning_rows(windows["validation"])
    ) as (fitted_on, validated_on):
        grid = search(fitted_on, validated_on, settings["grid"])
    # max() keeps the first of equals.
    best = max(grid, key=lambda entry: entry["validation_average_precision"])

    with clock.phase("fit"), _persisted(learning_rows(windows["train"])) as (train,):
        model = _learner(best["params"]).fit(train)
        pipeline = PipelineModel(stages=[assembler, model])
        model_uri = settings["output_uri"].rstrip("/") + "/model"
        pipeline.write().overwrite().save(model_uri)
    log.info("fitted with %s in %d iterations", best["params"], _iterations(model))

    with clock.phase("score"):
        scores_uri = settings["output_uri"].rstrip("/") + "/test_scores"
        champion = write_scores(spark, test, pipeline, settings["champion"], scores_uri)
    with clock.phase("evaluate"):
        scores = spark.read.parquet(runtime.literal_path(scores_uri))
        metrics = _metrics(scores, champion, settings["alerts_per_day"])
    log.info("test: %s", metrics)
    return {
        "outcome": "trained",
        "grid": grid,
        "best": {
            "params": best["params"],
            "validation_average_precision": best["validation_average_precision"],
            "iterations": _iterations(model),
        },
        "coefficients": {name: float(model.coefficients[index]) for index, name in enumerate(settings["features"])},
        "intercept": float(model.intercept),
        "metrics": metrics,
        "champion": champion,
        "model_uri": model_uri,
        "scores_uri": scores_uri,
    }


def time_windows(first_day: int, last_day: int, settings: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Name of a window → its first and last day, both included, if the data are of `first_day` to `last_day`.

    A window ends before it begins where there are too few days for it.
    """
    test_start = last_day - settings["test_days"] + 1
    train_end = test_start - settings["delay_days"] - 1
    train_start = max(train_end - settings["train_days"] + 1, first_day)
    validation_start = train_end - settings["validation_days"] + 1
    return {
        "train": (train_start, train_end),
        "validation_train": (train_start, validation_start - settings["delay_days"] - 1),
        "validation": (validation_start, train_end),
        "test": (test_start, last_day),
    }


def without_compromised_cards(frame: DataFrame, test_window: tuple[int, int], settings: dict[str, Any]) -> DataFrame:
    """The rows of `frame` whose card was not known as compromised on their day; meant for the test window.

    As the Fraud Detection Handbook does (chapter 3, "Baseline fraud detection system"): a card that is known
    as compromised is blocked, so its rows are no test of a model. Known on day t are frauds up to day t -
    delay_days - 1, and from test start - delay_days - compromised_lookback_days on: a fixed lookback, so that
    the test rows do not depend on train_days. Rows without a customer stay.
    """
    from pyspark.sql import functions as F

    first, last = test_window
    delay = settings["delay_days"]
    known = (
        _between(frame, (first - delay - settings["compromised_lookback_days"], last - delay - 1))
        .where((F.col("tx_fraud") == 1) & F.col("customer_id").isNotNull())
        .groupBy("customer_id")
        .agg(F.min("tx_time_days").alias("compromised_day"))
    )
    blocked = F.col("compromised_day") <= F.col("tx_time_days") - delay - 1
    return (
        frame.join(known, "customer_id", "left")
        .where(F.col("compromised_day").isNull() | ~blocked)
        .drop("compromised_day")
    )


def search(fitted_on: DataFrame, validated_on: DataFrame, grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Fit every combination of the grid and judge it on the validation rows; entries in the grid's order.

    The iterations are the same whatever maxIter is, until it stops them. So a fit that stopped before its
    maxIter is also the fit for every larger one (``reused_fit``), and is not done again.
    """
    points = [dict(_pairs(grid, values)) for values in itertools.product(*grid.values())]
    # Points that differ in maxIter alone, shortest first: the fits of a chain build on each other, the chains
    # do not.
    chains: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        rest = {name: value for name, value in point.items() if name != "maxIter"}
        chains.setdefault(repr(sorted(rest.items())), []).append(index)

    entries: dict[int, dict[str, Any]] = {}
    lock = threading.Lock()

    def fit_chain(chain: list[int]) -> None:
        last: dict[str, Any] | None = None
        for index in sorted(chain, key=lambda index: points[index].get("maxIter", 0)):
            params = points[index]
            if last is not None and last["iterations"] < last["params"]["maxIter"]:
                last = {**last, "params": params, "reused_fit": True, "seconds": 0.0}
            else:
                last = _fit_and_validate(params, fitted_on, validated_on)
            with lock:
                entries[index] = last
                log.info(
                    "grid point %d/%d: %s, average precision %.4f, %d iterations%s, %.1f s",
                    len(entries), len(points), params, last["validation_average_precision"],
                    last["iterations"], " (same fit)" if last["reused_fit"] else "", last["seconds"],
                )  # fmt: skip

    with ThreadPoolExecutor(max_workers=min(PARALLEL_FITS, len(chains))) as pool:
        for future in [pool.submit(fit_chain, chain) for chain in chains.values()]:
            future.result()
    return [entries[index] for index in range(len(points))]


def _fit_and_validate(params: dict[str, Any], fitted_on: DataFrame, validated_on: DataFrame) -> dict[str, Any]:
    started = time.monotonic()
    model = _learner(params).fit(fitted_on)
    scored = model.transform(validated_on).select(LABEL, _probability().alias("score"))
    return {
        "params": params,
        "validation_average_precision": evaluation.ranking_metrics(scored)["average_precision"],
        "iterations": _iterations(model),
        "reused_fit": False,
        "seconds": round(time.monotonic() - started, 3),
    }


def write_scores(
    spark: SparkSession,
    test: DataFrame,
    pipeline: PipelineModel,
    champion: dict[str, Any] | None,
    scores_uri: str,
) -> dict[str, Any] | None:
    """Write the test rows with the model's scores and the champion's, and say how the champion fared.

    A champion that cannot be loaded or applied leaves champion_score NULL and is reported as unreadable; that
    is no error, because a model saved by a newer Spark is not readable by an older one.
    """
    from pyspark.sql import functions as F

    def write(scored: DataFrame, champion_score: Column) -> tuple[int, int, int]:
        frame = scored.select(*SCORED_COLUMNS, "score", champion_score.cast("double").alias("champion_score"))
        frame.write.mode("overwrite").parquet(scores_uri)
        counts = spark.read.parquet(runtime.literal_path(scores_uri)).agg(
            F.count(F.lit(1)), _numbers("score"), _numbers("champion_score")
        )
        rows, scores, champion_scores = counts.collect()[0]
        return rows, scores, champion_scores

    scored = pipeline.transform(test).select(*test.columns, _probability().alias("score"))
    verdict = None
    written = None
    if champion is not None:
        try:
            log.info("scoring the champion, version %s", champion.get("version"))
            written = write(_champion_scored(scored, champion), F.col("champion_score"))
            if written[0] != written[2]:
                raise ValueError(f"it gives no number for {written[0] - written[2]} of {written[0]} rows")
            verdict = {**champion, "status": "scored"}
        except Exception as error:
            # Whatever is wrong with the champion: if it is not the champion, the write below fails as well.
            reason = runtime.describe(error)
            if champion.get("spark_version") not in (None, spark.version):
                reason += " (saved by Spark {}, read by {})".format(champion["spark_version"], spark.version)
            verdict = {**champion, "status": "unreadable", "error": reason}
            log.warning("the champion cannot score: %s", verdict["error"])
    if verdict is None or verdict["status"] != "scored":
        written = write(scored, F.lit(None))
    assert written is not None
    if written[0] != written[1]:
        raise ValueError(f"the model gives no number for {written[0] - written[1]} of {written[0]} rows")
    return verdict


def _champion_scored(scored: DataFrame, champion: dict[str, Any]) -> DataFrame:
    from pyspark.ml import PipelineModel

    missing = [name for name in champion["features"] if name not in scored.columns]
    if missing:
        raise ValueError("it needs features that these partitions do not have: {}".format(", ".join(missing)))
    model = PipelineModel.load(champion["model_uri"])
    return model.transform(scored).withColumn("champion_score", _probability())


def _metrics(scores: DataFrame, champion: dict[str, Any] | None, alerts_per_day: int) -> dict[str, Any]:
    metrics = {}
    for name, value in evaluation.evaluate(scores, "score", alerts_per_day).items():
        metrics["test_" + name] = value
    if champion is not None and champion["status"] == "scored":
        for name, value in evaluation.evaluate(scores, "champion_score", alerts_per_day).items():
            if name not in ("rows", "frauds"):
                metrics["champion_test_" + name] = value
    return metrics


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    missing = [name for name in REQUIRED if not request.get(name)]
    if missing:
        raise ValueError("the request lacks {}; see train_model.run".format(", ".join(missing)))
    if request["cutoff_uri"] not in request["feature_uris"]:
        raise ValueError("cutoff_uri must be one of feature_uris; it is {}".format(request["cutoff_uri"]))
    return {**DEFAULTS, **{name: value for name, value in request.items() if value is not None}}


def _read_features(spark: SparkSession, settings: dict[str, Any]) -> DataFrame:
    frame = spark.read.parquet(*[runtime.literal_path(uri) for uri in settings["feature_uris"]])
    missing = [name for name in (*SCORED_COLUMNS, *settings["features"]) if name not in frame.columns]
    if missing:
        raise ValueError("the feature partitions have no column {}; build them again".format(", ".join(missing)))
    return frame


def _ends(spark: SparkSession, frame: DataFrame, settings: dict[str, Any]) -> tuple[int, int] | None:
    """The last full day of the cut-off, and the days from 1970-01-01 to day 0; None if it has no rows.

    A row of the instant 24:00:00 stands at the first instant of the next file's first day, hence the one
    second.
    """
    from pyspark.sql import functions as F

    cutoff = spark.read.schema(frame.schema).parquet(runtime.literal_path(settings["cutoff_uri"]))
    last_second, unix_epoch = cutoff.agg(
        F.max("tx_time_seconds"), F.min(F.expr("CAST(tx_datetime AS BIGINT) - tx_time_seconds"))
    ).collect()[0]
    if last_second is None:
        return None
    return (last_second - 1) // 86_400, unix_epoch // 86_400


def _rows_per_day(frame: DataFrame, last_day: int) -> dict[int, tuple[int, int]]:
    """Day → rows and frauds, up to and with `last_day`."""
    from pyspark.sql import functions as F

    days = (
        frame.where(F.col("tx_time_days") <= last_day)
        .groupBy("tx_time_days")
        .agg(F.count(F.lit(1)).alias("rows"), F.sum("tx_fraud").alias("frauds"))
        .collect()
    )
    return {row["tx_time_days"]: (row["rows"], row["frauds"]) for row in days}


def _count(frame: DataFrame) -> tuple[int, int]:
    from pyspark.sql import functions as F

    rows, frauds = frame.agg(F.count(F.lit(1)), F.sum("tx_fraud")).collect()[0]
    return rows, frauds or 0


def _describe(
    windows: dict[str, tuple[int, int]],
    per_day: dict[int, tuple[int, int]],
    test_counts: tuple[int, int],
    day_zero: int,
) -> dict[str, dict[str, Any]]:
    """The windows for the report."""

    def iso_date(day: int) -> str:
        return (date(1970, 1, 1) + timedelta(days=day_zero + day)).isoformat()

    described: dict[str, dict[str, Any]] = {}
    for name, (first, last) in windows.items():
        inside = [counts for day, counts in per_day.items() if first <= day <= last]
        described[name] = {
            "first_day": first,
            "last_day": last,
            "first_date": iso_date(first),
            "last_date": iso_date(last),
            "days": max(0, last - first + 1),
            "rows": sum(rows for rows, _ in inside),
            "frauds": sum(frauds for _, frauds in inside),
        }
    test = described["test"]
    rows, frauds = test_counts
    test["removed_rows"], test["removed_frauds"] = test["rows"] - rows, test["frauds"] - frauds
    test["rows"], test["frauds"] = rows, frauds
    return described


def _shortage(
    windows: dict[str, tuple[int, int]], described: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> str | None:
    """What is missing, in one sentence with figures, or None if training can begin."""
    if described["validation_train"]["days"] < settings["min_train_days"]:
        delay, first, last = settings["delay_days"], windows["train"][0], windows["test"][1]
        parts = [
            (settings["min_train_days"], "to fit on"),
            (delay, "until their labels are known"),
            (settings["validation_days"], "to choose parameters on"),
            (delay, "until their labels are known"),
            (settings["test_days"], "to test on"),
        ]
        return "There are {} days of data up to {}, and at least {} are needed: {}.".format(
            last - first + 1,
            described["test"]["last_date"],
            sum(days for days, _ in parts),
            ", ".join(f"{days} {what}" for days, what in parts),
        )
    lacking = []
    for name, window in described.items():
        where = "{} to {} ({})".format(window["first_date"], window["last_date"], name)
        if window["frauds"] < settings["min_frauds"]:
            lacking.append(
                "{} has {} frauds in {} rows, and at least {} frauds are needed".format(
                    where, window["frauds"], window["rows"], settings["min_frauds"]
                )
            )
        elif window["frauds"] == window["rows"]:
            lacking.append("{} has {} frauds and no genuine row".format(where, window["frauds"]))
    return "The data are too few: {}.".format("; ".join(lacking)) if lacking else None


def _too_little(reason: str) -> dict[str, Any]:
    log.warning("too little data: %s", reason)
    return {"outcome": "too_little_data", "reason": reason}


def _learner(params: dict[str, Any]) -> Any:
    from pyspark.ml.classification import LogisticRegression

    return LogisticRegression(featuresCol=VECTOR, labelCol=LABEL, **params)


def _iterations(model: Any) -> int:
    # The history begins with the value before the first iteration; totalIterations counted it until Spark
    # 3.0.
    return len(model.summary.objectiveHistory) - 1


def _probability() -> Column:
    """The probability of fraud, as a model's transform() leaves it."""
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql import functions as F

    return vector_to_array(F.col("probability"))[1]


def _numbers(column: str) -> Column:
    """How many rows have a number (not NULL, not NaN) in `column`."""
    from pyspark.sql import functions as F

    return F.count(F.when(~F.isnan(column), 1))


def _between(frame: DataFrame, window: tuple[int, int]) -> DataFrame:
    from pyspark.sql import functions as F

    return frame.where(F.col("tx_time_days").between(*window))


def _pairs(grid: dict[str, list[Any]], values: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for index, name in enumerate(grid):
        yield name, values[index]


@contextmanager
def _persisted(*frames: DataFrame) -> Iterator[tuple[DataFrame, ...]]:
    cached = tuple(frame.persist() for frame in frames)
    try:
        yield cached
    finally:
        for frame in cached:
            frame.unpersist()


class _Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - started, 3)
            log.info("%s: %.1f s", name, self.seconds[name])


if __name__ == "__main__":
    runtime.main(run, "train_model")
