"""Fit a fraud model on ``transaction_features``, choose learner and parameters, and judge it on later rows.

All windows are whole days (``tx_time_days``) and end with the last full day D of the cut-off partition::

    |<------------------- train ------------------>|<- delay ->|<-- test -->|
    |<-- validation_train -->|<- delay ->|<- valid. ->|                     D

A label is known `delay_days` after its transaction, so nothing is fitted on labels that would not have been
known. The learner and its parameters are those with the best average precision on the validation window, or
the best mean over several: earlier folds are the same two windows, `validation_days` further back for each, and
begin with the train window too. The model is then fitted on the whole train window. What is drawn is drawn from
a seed. Of the test window, nothing but its numbers of rows and frauds is used before the model is fitted; of
what comes after D, nothing at all.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spark_jobs import evaluation, runtime
from spark_jobs.progress import Progress
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
    "candidates": [
        {"learner": "logistic_regression", "grid": {"regParam": [0, 0.1, 0.5], "maxIter": [100, 500, 1000]}},
        {"learner": "gbt", "grid": {"maxIter": [50], "maxDepth": [3, 5], "maxBins": [1024], "stepSize": [0.1]}},
        {
            "learner": "random_forest",
            "grid": {
                "numTrees": [50],
                "maxDepth": [10],
                "maxBins": [1024],
                "featureSubsetStrategy": ["onethird"],
            },
        },
    ],
    "validation_folds": 1,
    "max_train_rows": None,
    "compromised_lookback_days": 7,
    "seed": 0,
    "champion": None,
}

#: What a request cannot do without.
REQUIRED = ("run_id", "cutoff", "feature_uris", "cutoff_uri", "features", "output_uri")

#: Columns of ``test_scores``; ``score`` and ``champion_score`` follow them.
SCORED_COLUMNS = ("transaction_id", "tx_datetime", "customer_id", "tx_amount", "tx_fraud")

_TREES = (
    "maxDepth",
    "maxBins",
    "minInstancesPerNode",
    "minWeightFractionPerNode",
    "minInfoGain",
    "subsamplingRate",
    "featureSubsetStrategy",
    "maxMemoryInMB",
)

#: Learner → its class in pyspark.ml.classification, and the parameters that a grid may vary.
LEARNERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "logistic_regression": (
        "LogisticRegression",
        ("regParam", "elasticNetParam", "maxIter", "tol", "fitIntercept", "standardization", "aggregationDepth"),
    ),
    "gbt": ("GBTClassifier", ("maxIter", "stepSize", *_TREES)),
    "random_forest": ("RandomForestClassifier", ("numTrees", "impurity", *_TREES)),
}

#: Fits that run at the same time. A fit's many small jobs leave cores idle that another fit can use.
PARALLEL_FITS = 3

#: Partitions of the rows that are learned from: one for so many rows, within limits. Not one for each core, because
#: what a forest draws depends on the partitions, and the same request is to give the same model on any machine.
ROWS_PER_PARTITION = 150_000
MAX_PARTITIONS = 64

LABEL = "tx_fraud"
VECTOR = "feature_vector"
WEIGHT = "weight"

#: Values that the hash of a transaction takes when rows are sampled.
HASHES = 1_000_000_007


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
        candidates: list of {"learner", "grid"}: a learner of `LEARNERS`, and parameter of its pyspark.ml class →
            values. Every combination is fitted and judged, the first names vary slowest; of equals the first
            is taken (see `DEFAULTS`).
        validation_folds: folds to judge them on, latest first (1); fewer are used where the rows before have
            less than min_train_days or min_frauds.
        max_train_rows: null, or about how many rows of the train window to learn from: frauds all stay, genuine
            rows are drawn by a hash of transaction_id and seed, never fewer than there are frauds, and weigh as
            many as they stand for (null). Validation and test rows are always all of them.
        compromised_lookback_days: see `without_compromised_cards` (7).
        seed: of the trees' draws and of max_train_rows (0).
        champion: null or {"model_uri", "features", "version", "spark_version"}: a saved PipelineModel that
            scores the same test rows.

    Report: ``schema_version``, ``run_id``, ``cutoff``, ``features``, ``seed``, ``windows`` (name →
        ``first_day``, ``last_day``, ``first_date``, ``last_date``, ``days``, ``rows``, ``frauds``; test also
        ``removed_rows`` and ``removed_frauds`` of cards known as compromised), ``spark_version``, ``seconds``
        (phase → seconds), and ``outcome``:

    * ``too_little_data``, with ``reason``, one sentence; nothing is written.
    * ``trained``, with ``grid`` (``learner``, ``params``, ``validation_average_precision``: the mean of
      ``fold_average_precisions``, ``iterations`` (of logistic regression, else null), ``reused_fit``,
      ``seconds``), ``best`` (``learner``, ``params``, ``validation_average_precision``, ``iterations`` of the
      final fit), ``validation_folds`` (list of ``validation_train`` and ``validation`` as in ``windows``, the
      latest first), ``sampling`` (null if all rows were learned from, else ``max_train_rows``, ``rows``,
      ``frauds``, ``kept_rows``, ``genuine_weight``), ``feature_importances`` (feature → share, see
      `feature_importances`), ``metrics`` (``test_…``, and ``champion_test_…`` where a champion scored; see
      `evaluation.evaluate`), ``tables`` (of the test rows; see `evaluation.evaluate_with_tables`), ``champion`` (null,
      or the request's with ``status`` scored, unreadable or newer_spark, the latter two with ``error``),
      ``model_uri``, ``scores_uri``; of logistic regression also ``coefficients`` (feature → value, in units of the
      feature), ``intercept``.

    Writes ``output_uri/model`` (PipelineModel) and ``output_uri/test_scores`` (Parquet: `SCORED_COLUMNS`,
    score, champion_score), the latter being the rows that the metrics are computed on.

    Raises:
        ValueError: the request lacks a key, names an unknown learner or parameter, or the partitions lack a
            column.
    """
    runtime.configure(spark)
    settings = _settings(request)
    clock = _Clock(spark)
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
    started = time.monotonic()
    report.update(_train(spark, settings, report["windows"], clock))
    clock.seconds["total"] = round(time.monotonic() - started, 3)
    return report


def _train(spark: SparkSession, settings: dict[str, Any], described: dict[str, Any], clock: _Clock) -> dict[str, Any]:
    with clock.phase("windows"):
        frame = _read_features(spark, settings)
        ends = _ends(spark, frame, settings)
        if ends is None:
            return _too_little("The cut-off partition {} has no rows.".format(settings["cutoff"]))
        last_day, day_zero = ends
        runtime.set_shuffle_partitions(spark, 0)  # a row for each day
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

    folds = validation_folds(windows, per_day, settings)
    assembler = VectorAssembler(inputCols=settings["features"], outputCol=VECTOR)
    with clock.phase("search") as progress:
        rows, sampling = learning_rows(_between(frame, windows["train"]), folds, settings)
        rows = assembler.transform(rows).select("tx_time_days", LABEL, VECTOR, *([WEIGHT] if sampling else []))
        rows = rows.persist()
        size = rows.count()
        log.info("learning from %d rows in %d partitions, on %d folds", size, rows.rdd.getNumPartitions(), len(folds))
        weight = WEIGHT if sampling else None

        def fitted_on(window: tuple[int, int]) -> DataFrame:
            inside = _between(rows, window)
            return inside.where(f"{WEIGHT} IS NOT NULL") if sampling else inside

        grid = search(
            [(fitted_on(fold["validation_train"]), _between(rows, fold["validation"])) for fold in folds],
            settings["candidates"],
            seed=settings["seed"],
            weight=weight,
            progress=progress,
        )
    # max() keeps the first of equals.
    best = max(grid, key=lambda entry: entry["validation_average_precision"])

    with clock.phase("fit"):
        train = fitted_on(windows["train"])
        model = _estimator(best["learner"], best["params"], settings["seed"], weight).fit(train)
        importances = feature_importances(model, train, settings["features"], weight)
        rows.unpersist()
        pipeline = PipelineModel(stages=[assembler, model])
        model_uri = settings["output_uri"].rstrip("/") + "/model"
        pipeline.write().overwrite().save(model_uri)
    log.info("fitted %s with %s", best["learner"], best["params"])

    with clock.phase("score"):
        scores_uri = settings["output_uri"].rstrip("/") + "/test_scores"
        champion = write_scores(spark, test, pipeline, settings["champion"], scores_uri)
    with clock.phase("evaluate"):
        scores = runtime.read_parquet(spark, scores_uri)
        alerts_per_day = settings["alerts_per_day"]
        figures, tables = evaluation.evaluate_with_tables(scores, test.where("tx_fraud = 1"), "score", alerts_per_day)
        metrics = {f"test_{name}": value for name, value in figures.items()}
        if champion is not None and champion["status"] == "scored":
            figures = evaluation.evaluate(scores, "champion_score", alerts_per_day)
            metrics.update(
                (f"champion_test_{name}", figures[name]) for name in figures if name not in ("rows", "frauds")
            )
    log.info("test: %s", metrics)
    report = {
        "outcome": "trained",
        "grid": grid,
        "best": {
            "learner": best["learner"],
            "params": best["params"],
            "validation_average_precision": best["validation_average_precision"],
            "iterations": _iterations(model),
        },
        "validation_folds": [
            {name: _window(first, last, per_day, day_zero) for name, (first, last) in fold.items()} for fold in folds
        ],
        "sampling": sampling,
        "feature_importances": importances,
        "metrics": metrics,
        "tables": tables,
        "champion": champion,
        "model_uri": model_uri,
        "scores_uri": scores_uri,
    }
    if best["learner"] == "logistic_regression":
        coefficients = model.coefficients.toArray()
        report["coefficients"] = {name: float(value) for name, value in zip(settings["features"], coefficients)}
        report["intercept"] = float(model.intercept)
    return report


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


def validation_folds(
    windows: dict[str, tuple[int, int]], per_day: dict[int, tuple[int, int]], settings: dict[str, Any]
) -> list[dict[str, tuple[int, int]]]:
    """The folds that candidates are judged on, latest first: name of a window → its first and last day.

    The first is that of `time_windows`. Each further one ends `validation_days` earlier and begins with the same
    day; the folds end before the first that has less than min_train_days, or a window with less than min_frauds or
    without genuine rows.
    """
    folds = [{name: windows[name] for name in ("validation_train", "validation")}]
    for number in range(1, settings["validation_folds"]):
        back = number * settings["validation_days"]
        (start, train_end), (first, last) = windows["validation_train"], windows["validation"]
        fold = {"validation_train": (start, train_end - back), "validation": (first - back, last - back)}
        if train_end - back - start + 1 < settings["min_train_days"]:
            break
        counts = [_rows_and_frauds(window, per_day) for window in fold.values()]
        if any(frauds < settings["min_frauds"] or frauds == rows for rows, frauds in counts):
            break
        folds.append(fold)
    return folds


def learning_rows(
    window: DataFrame, folds: list[dict[str, tuple[int, int]]], settings: dict[str, Any]
) -> tuple[DataFrame, dict[str, Any] | None]:
    """The rows of the train window as they are learned from, and what `max_train_rows` did to them, or None.

    If rows are sampled, they have a column `WEIGHT`; where it is NULL, they are there to validate on. Partitions and
    their order depend on nothing but the rows.
    """
    from pyspark.sql import functions as F

    rows, frauds = _count(window)
    sampling = None
    kept = rows
    limit = settings["max_train_rows"]
    if limit is not None and rows > limit:
        share = max(limit - frauds, frauds) / (rows - frauds)
        if share < 1:
            drawn = f"pmod(xxhash64(transaction_id, CAST({settings['seed']} AS BIGINT)), {HASHES})"
            is_kept = F.expr(f"{LABEL} = 1 OR {drawn} < {int(share * HASHES)}")
            kept = window.where(is_kept).count()
            # Were no genuine row drawn, there would be none to weigh.
            genuine_weight = (rows - frauds) / max(1, kept - frauds)
            window = window.withColumn(
                WEIGHT, F.when(is_kept, F.when(F.col(LABEL) == 1, 1.0).otherwise(genuine_weight))
            )
            validated = min(fold["validation"][0] for fold in folds)
            window = window.where(F.col(WEIGHT).isNotNull() | (F.col("tx_time_days") >= validated))
            sampling = {
                "max_train_rows": limit,
                "rows": rows,
                "frauds": frauds,
                "kept_rows": kept,
                "genuine_weight": genuine_weight,
            }
            log.info("sampled: %s", sampling)
    partitions = min(MAX_PARTITIONS, -(-kept // ROWS_PER_PARTITION))
    ordered = window.repartition(partitions, "transaction_id").sortWithinPartitions("tx_time_days", "transaction_id")
    return ordered, sampling


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


def search(
    folds: list[tuple[DataFrame, DataFrame]],
    candidates: list[dict[str, Any]],
    seed: int = 0,
    weight: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Fit every combination of the candidates and judge it on each fold's validation rows; entries in their order.

    A fold is the rows to fit on, with their `weight` if there is one, and those to judge on. Of logistic regression,
    the iterations are the same whatever maxIter is, until it stops them. So a fit that stopped before its maxIter is
    also the fit for every larger one (``reused_fit``), and is not done again.
    """
    points = _points(candidates)
    # Points that build on each other, in order; the chains do not.
    chains: dict[str, list[int]] = {}
    for index, (learner, params) in enumerate(points):
        if learner == "logistic_regression":
            rest = sorted((name, value) for name, value in params.items() if name != "maxIter")
            chains.setdefault(repr(rest), []).append(index)
        else:
            chains[f"point {index}"] = [index]

    fits = len(points) * len(folds)
    results: dict[tuple[int, int], dict[str, Any]] = {}

    def fit_chain(chain: list[int], number: int) -> None:
        last: dict[str, Any] | None = None
        for index in sorted(chain, key=lambda index: points[index][1].get("maxIter", 0)):
            learner, params = points[index]
            if last is not None and last["iterations"] < last["maxIter"]:
                last = {**last, "reused_fit": True, "seconds": 0.0}
            else:
                estimator = _estimator(learner, params, seed, weight)
                last = {**_fit_and_validate(estimator, *folds[number]), "maxIter": params.get("maxIter", 0)}
            results[index, number] = last
            if progress is not None:
                share = len(results) / fits
                progress.enter(f"{len(results)} of {fits} fits", share, share)
            log.info(
                "%d/%d: %s %s, fold %d: average precision %.4f%s, %.1f s",
                len(results), fits, learner, params, number + 1, last["average_precision"],
                " (same fit)" if last["reused_fit"] else "", last["seconds"],
            )  # fmt: skip

    tasks = [(chain, number) for chain in chains.values() for number in range(len(folds))]
    # The trees first: whatever takes longest is not to be started last.
    tasks.sort(key=lambda task: points[task[0][0]][0] == "logistic_regression")
    with ThreadPoolExecutor(max_workers=min(PARALLEL_FITS, len(tasks))) as pool:
        futures = [pool.submit(fit_chain, *task) for task in tasks]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()

    entries = []
    for index, (learner, params) in enumerate(points):
        of_folds = [results[index, number] for number in range(len(folds))]
        precisions = [result["average_precision"] for result in of_folds]
        entries.append(
            {
                "learner": learner,
                "params": params,
                "validation_average_precision": round(math.fsum(precisions) / len(precisions), 12),
                "fold_average_precisions": precisions,
                "iterations": of_folds[0]["iterations"],
                "reused_fit": all(result["reused_fit"] for result in of_folds),
                "seconds": round(sum(result["seconds"] for result in of_folds), 3),
            }
        )
    return entries


def _fit_and_validate(estimator: Any, fitted_on: DataFrame, validated_on: DataFrame) -> dict[str, Any]:
    started = time.monotonic()
    model = estimator.fit(fitted_on)
    scored = model.transform(validated_on).select(LABEL, _probability().alias("score"))
    return {
        "average_precision": evaluation.ranking_metrics(scored)["average_precision"],
        "iterations": _iterations(model),
        "reused_fit": False,
        "seconds": round(time.monotonic() - started, 3),
    }


def feature_importances(
    model: Any, fitted_on: DataFrame, features: list[str], weight: str | None = None
) -> dict[str, float]:
    """Feature → its share of a fitted model's decisions; the shares are 0 or more, and sum up to 1 unless all are 0.

    Of trees, Spark's featureImportances: each split's gain times the rows it splits. Of logistic regression,
    the coefficient's size times the standard deviation of the feature in the rows that were fitted on.
    """
    from pyspark.ml.stat import Summarizer
    from pyspark.sql import functions as F

    if hasattr(model, "featureImportances"):
        sizes = model.featureImportances.toArray()
    else:
        deviation = Summarizer.metrics("std").summary(F.col(VECTOR), *([F.col(weight)] if weight else []))
        sizes = abs(model.coefficients.toArray()) * fitted_on.select(deviation["std"]).collect()[0][0].toArray()
    total = float(sizes.sum()) or 1.0
    return {name: float(size) / total for name, size in zip(features, sizes)}


def write_scores(
    spark: SparkSession,
    test: DataFrame,
    pipeline: PipelineModel,
    champion: dict[str, Any] | None,
    scores_uri: str,
) -> dict[str, Any] | None:
    """Write the test rows with the model's scores and the champion's, and say how the champion fared.

    A champion that cannot be loaded or applied leaves champion_score NULL and is reported as unreadable, or as
    newer_spark if a newer Spark saved it, which an older one does not read; that is no error of this job.
    """
    from pyspark.sql import functions as F

    def write(scored: DataFrame, champion_score: Column) -> tuple[int, int, int]:
        frame = scored.select(*SCORED_COLUMNS, "score", champion_score.cast("double").alias("champion_score"))
        frame.write.mode("overwrite").parquet(scores_uri)
        counts = runtime.read_parquet(spark, scores_uri).agg(
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
            written = write(_champion_scored(spark, scored, champion), F.col("champion_score"))
            if written[0] != written[2]:
                raise ValueError(f"it gives no number for {written[0] - written[2]} of {written[0]} rows")
            verdict = {**champion, "status": "scored"}
        except runtime.NewerSparkError as error:
            verdict = {**champion, "status": "newer_spark", "error": str(error)}
            log.warning("the champion cannot score: %s", error)
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


def _champion_scored(spark: SparkSession, scored: DataFrame, champion: dict[str, Any]) -> DataFrame:
    missing = [name for name in champion["features"] if name not in scored.columns]
    if missing:
        raise ValueError("it needs features that these partitions do not have: {}".format(", ".join(missing)))
    model = runtime.load_model(spark, champion["model_uri"])
    return model.transform(scored).withColumn("champion_score", _probability())


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    missing = [name for name in REQUIRED if not request.get(name)]
    if missing:
        raise ValueError("the request lacks {}; see train_model.run".format(", ".join(missing)))
    if request["cutoff_uri"] not in request["feature_uris"]:
        raise ValueError("cutoff_uri must be one of feature_uris; it is {}".format(request["cutoff_uri"]))
    settings = {**DEFAULTS, **{name: value for name, value in request.items() if value is not None}}
    for name in ("validation_folds", "max_train_rows"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"{name} must be 1 or more; it is {settings[name]}")
    for learner, params in _points(settings["candidates"]):
        try:
            _estimator(learner, params, settings["seed"], None)
        except TypeError as error:
            raise ValueError(f"{learner} cannot have {params}: {error}") from None
    return settings


def _points(candidates: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Learner and parameters of every combination; raises ValueError for what `LEARNERS` does not have."""
    points = []
    for candidate in candidates:
        learner, grid = candidate.get("learner"), candidate.get("grid") or {}
        if learner not in LEARNERS:
            raise ValueError("there is no learner {!r}; a candidate has one of {}".format(learner, ", ".join(LEARNERS)))
        allowed = LEARNERS[learner][1]
        unknown = [name for name in grid if name not in allowed]
        if unknown:
            raise ValueError(
                "the grid of {} cannot have {}; it can have {}".format(learner, ", ".join(unknown), ", ".join(allowed))
            )
        points += [(learner, dict(_pairs(grid, values))) for values in itertools.product(*grid.values())]
    if not points:
        raise ValueError("candidates has no combination to fit; see train_model.run")
    return points


def _read_features(spark: SparkSession, settings: dict[str, Any]) -> DataFrame:
    frame = runtime.read_parquet(spark, *settings["feature_uris"])
    missing = [
        name for name in (*SCORED_COLUMNS, "tx_fraud_scenario", *settings["features"]) if name not in frame.columns
    ]
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
    described = {name: _window(first, last, per_day, day_zero) for name, (first, last) in windows.items()}
    test = described["test"]
    rows, frauds = test_counts
    test["removed_rows"], test["removed_frauds"] = test["rows"] - rows, test["frauds"] - frauds
    test["rows"], test["frauds"] = rows, frauds
    return described


def _window(first: int, last: int, per_day: dict[int, tuple[int, int]], day_zero: int) -> dict[str, Any]:
    """A window for the report."""
    import numpy as np

    rows, frauds = _rows_and_frauds((first, last), per_day)
    return {
        "first_day": first,
        "last_day": last,
        # numpy's dates, for a window may reach to before the year 1.
        "first_date": str(np.datetime64(day_zero + first, "D")),
        "last_date": str(np.datetime64(day_zero + last, "D")),
        "days": max(0, last - first + 1),
        "rows": rows,
        "frauds": frauds,
    }


def _rows_and_frauds(window: tuple[int, int], per_day: dict[int, tuple[int, int]]) -> tuple[int, int]:
    inside = [counts for day, counts in per_day.items() if window[0] <= day <= window[1]]
    return sum(rows for rows, _ in inside), sum(frauds for _, frauds in inside)


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


def _estimator(learner: str, params: dict[str, Any], seed: int, weight: str | None) -> Any:
    from pyspark.ml import classification

    common: dict[str, Any] = {"featuresCol": VECTOR, "labelCol": LABEL}
    if weight is not None:
        common["weightCol"] = weight
    if learner != "logistic_regression":
        common["seed"] = seed
    return getattr(classification, LEARNERS[learner][0])(**common, **params)


def _iterations(model: Any) -> int | None:
    """Iterations of a logistic regression; None for trees."""
    if hasattr(model, "featureImportances"):
        return None
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


class _Clock:
    """Seconds per phase, and the progress of each."""

    def __init__(self, spark: SparkSession) -> None:
        self._spark = spark
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Progress]:
        started = time.monotonic()
        try:
            with Progress(self._spark, f"training: {name}") as progress:
                yield progress
        finally:
            self.seconds[name] = round(time.monotonic() - started, 3)
            log.info("%s: %.1f s", name, self.seconds[name])


if __name__ == "__main__":
    runtime.main(run, "train_model")
