"""Fit a fraud model on ``transaction_features``, choose learner and parameters, and score later rows with it.

All windows are whole days (``tx_time_days``) and end with the last full day D of the cut-off partition::

    |<------------------- train ------------------>|<- delay ->|<-- test -->|
    |<-- validation_train -->|<- delay ->|<- valid. ->|                     D

A label is known `delay_days` after its transaction, so nothing is fitted on labels that would not have been
known. The learner and its parameters are those with the best average precision on the validation window, or
the best mean over several: earlier folds are the same two windows, `validation_days` further back for each, and
begin with the train window too. Candidates are fitted on a draw of the rows, the best one then on the whole train
window. What is drawn is drawn from a seed. Of the test window, nothing but its numbers of rows and frauds is used
before the model is fitted; of what comes after D, nothing at all.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spark_jobs import runtime
from spark_jobs.io import parquet_files
from spark_jobs.progress import Progress
from spark_jobs.schema import NO_KEY, SCHEMA_VERSION
from spark_jobs.training import fits, library
from spark_jobs.training.learners import (
    DEFAULT_CANDIDATES,
    LogisticRegressionModel,
    ModelError,
    NewerModelError,
    Scorer,
    check_candidates,
    matrix_of,
    points,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.training.fits import Fit, Fitted

log = logging.getLogger("spark_jobs")

#: Settings of a request that may be left out; days are whole days.
DEFAULTS: dict[str, Any] = {
    "test_days": 7,
    "delay_days": 7,
    "train_days": 60,
    "validation_days": 7,
    "min_train_days": 7,
    "min_frauds": 10,
    "candidates": DEFAULT_CANDIDATES,
    "validation_folds": 1,
    "search_rows": 200_000,
    "max_train_rows": 5_000_000,
    "fit_threads": 4,
    "compromised_lookback_days": 7,
    "seed": 0,
    "champion": None,
    "library_uri": None,
}

#: What a request cannot do without.
REQUIRED = ("run_id", "cutoff", "feature_uris", "cutoff_uri", "features", "output_uri")

#: Columns of ``test_scores``; ``score`` and ``champion_score`` follow them.
SCORED_COLUMNS = ("transaction_id", "tx_datetime", "customer_id", "tx_amount", "tx_fraud", "tx_fraud_scenario")

#: Held-out rows that are kept with the model, and those whose contributions make its importances.
SAMPLE_ROWS = 1_000
IMPORTANCE_ROWS = 2_000

#: Names of the files in a model's directory.
MODEL_FILE = "model.json"
SAMPLE_FILE = "sample.parquet"

LABEL = fits.LABEL


def run(spark: SparkSession, request: dict[str, Any]) -> dict[str, Any]:
    """Train one model, save it, and score the held-out rows.

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
        candidates: list of {"learner", "grid"}: a learner of `learners.LEARNERS`, and parameter → values. Every
            combination is fitted and judged, the first names vary slowest; of equals the first is taken (see
            `learners.DEFAULT_CANDIDATES`).
        validation_folds: folds to judge them on, latest first (1); fewer are used where the rows before have
            less than min_train_days or min_frauds.
        search_rows: how many rows a candidate is fitted on, at most (200,000); validation rows are always all of them.
        max_train_rows: how many rows the model is fitted on, at most (5,000,000). Rows are drawn by a hash of
            transaction_id and seed, frauds and genuine ones apart, and weigh as many as they stand for; frauds take at
            most half of either limit.
        fit_threads: threads of the last fit (4); those of the search have one each, for they run side by side.
        compromised_lookback_days: see `without_compromised_cards` (7).
        seed: of what learners and the limits draw.
        champion: null or {"model_uri", "features", "version"}: a model file that scores the same test rows.
        library_uri: null or the archive of the learners' library (see `library`); null: Spark's Python has it.

    Report: ``schema_version``, ``run_id``, ``cutoff``, ``features``, ``seed``, ``windows`` (name →
        ``first_day``, ``last_day``, ``first_date``, ``last_date``, ``days``, ``rows``, ``frauds``; test also
        ``removed_rows`` and ``removed_frauds`` of cards known as compromised), ``spark_version``, ``seconds``
        (phase → seconds), and ``outcome``:

    * ``too_little_data``, with ``reason``, one sentence; nothing is written.
    * ``trained``, with ``grid`` (``learner``, ``params``, ``validation_average_precision``: the mean of
      ``fold_average_precisions``, ``rows`` (fitted on, of the latest fold), ``seconds``), ``best`` (``learner``,
      ``params``, ``validation_average_precision``), ``validation_folds`` (list of ``validation_train`` and
      ``validation`` as in ``windows``, the latest first), ``sampling`` (null if all rows were learned from, else
      ``max_train_rows``, ``rows``, ``frauds``, ``kept_rows``, ``kept_frauds``, ``genuine_weight``, ``fraud_weight``),
      ``feature_importances`` (feature → mean absolute contribution to the log-odds, over `IMPORTANCE_ROWS` held-out
      rows), ``profile`` (distributions of inputs and score in the train window; see `fits.profile_of`), ``champion``
      (null, or the request's with ``status`` scored, unreadable or newer_library, the latter two with ``error``),
      ``model_uri``, ``scores_uri``, ``sample_uri``; of logistic regression also ``coefficients`` (feature → value, in
      units of the feature), ``intercept``. Metrics are not this job's matter: whoever reads ``test_scores`` has them.

    Writes into ``output_uri`` the model file ``model.json`` (see `learners.Scorer`), ``test_scores`` (Parquet:
    `SCORED_COLUMNS`, score, champion_score), the rows to judge the model by, and
    ``sample.parquet``: `SAMPLE_ROWS` of them, drawn by hash, with the model's inputs.

    Raises:
        ValueError: the request lacks a key, names an unknown learner or parameter, or the partitions lack a
            column.
        library.LibraryError: the learners' library is missing or damaged; nothing was read.
    """
    runtime.configure(spark)
    library_name = library.ship(spark, request.get("library_uri"))
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
    report.update(_train(spark, settings, report["windows"], clock, library_name))
    clock.seconds["total"] = round(time.monotonic() - started, 3)
    return report


def _train(
    spark: SparkSession,
    settings: dict[str, Any],
    described: dict[str, Any],
    clock: _Clock,
    library_name: str | None,
) -> dict[str, Any]:
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

    files, output = runtime.Files(spark), settings["output_uri"].rstrip("/")
    folds = validation_folds(windows, per_day, settings)
    with clock.phase("search") as progress:
        grid = search(frame, folds, per_day, settings, library_name, progress)
    # max() keeps the first of equals.
    best = max(grid, key=lambda entry: entry["validation_average_precision"])

    with clock.phase("fit"):
        fit = _fit(best["learner"], best["params"], windows["train"], per_day, settings, settings["max_train_rows"])
        fit = fit._replace(threads=settings["fit_threads"], with_profile=True)
        (fitted,) = fits.fit_all(frame, settings["features"], [fit], settings["seed"], library_name)
        model_uri = f"{output}/{MODEL_FILE}"
        files.write(model_uri, fitted.model.encode())
    log.info("fitted %s with %s to %d rows", best["learner"], best["params"], fitted.rows)

    with clock.phase("score"):
        scores_uri = f"{output}/test_scores"
        champion = write_scores(spark, test, fitted.model, settings["champion"], scores_uri, library_name)
    with clock.phase("explain"):
        scorer = Scorer.from_json(fitted.model, settings["fit_threads"])
        sample_uri = f"{output}/{SAMPLE_FILE}"
        importances = _keep_sample(files, test, scorer, settings["seed"], sample_uri)
    report = {
        "outcome": "trained",
        "grid": grid,
        "best": {
            "learner": best["learner"],
            "params": best["params"],
            "validation_average_precision": best["validation_average_precision"],
        },
        "validation_folds": [
            {name: _window(first, last, per_day, day_zero) for name, (first, last) in fold.items()} for fold in folds
        ],
        "sampling": _sampling(fit, fitted, settings),
        "feature_importances": importances,
        "profile": fitted.profile,
        "champion": champion,
        "model_uri": model_uri,
        "scores_uri": scores_uri,
        "sample_uri": sample_uri,
    }
    if isinstance(scorer.model, LogisticRegressionModel):
        linear = scorer.model
        coefficients = (linear.coefficients / linear.deviation).tolist()
        report["coefficients"] = dict(zip(settings["features"], coefficients))
        report["intercept"] = linear.intercept - sum(
            float(mean) * coefficient for mean, coefficient in zip(linear.mean, coefficients)
        )
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


def _fit(
    learner: str,
    params: dict[str, Any],
    window: tuple[int, int],
    per_day: dict[int, tuple[int, int]],
    settings: dict[str, Any],
    limit: int,
) -> Fit:
    """A fit of one thread to at most `limit` rows of a window."""
    rows, frauds = _rows_and_frauds(window, per_day)
    return fits.Fit(learner, params, window, fits.draw(limit, rows, frauds), rows, frauds, settings["seed"], threads=1)


def _sampling(fit: Fit, fitted: Fitted, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What `max_train_rows` did to the rows of the train window; None if all of them were learned from."""
    if fit.rows <= settings["max_train_rows"]:
        return None
    return {
        "max_train_rows": settings["max_train_rows"],
        "rows": fit.rows,
        "frauds": fit.frauds,
        "kept_rows": fitted.rows,
        "kept_frauds": fitted.frauds,
        "genuine_weight": fitted.genuine_weight,
        "fraud_weight": fitted.fraud_weight,
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


def search(
    frame: DataFrame,
    folds: list[dict[str, tuple[int, int]]],
    per_day: dict[int, tuple[int, int]],
    settings: dict[str, Any],
    library_name: str | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Fit every combination of the candidates and judge it on each fold's validation rows; entries in their order."""
    combinations = points(settings["candidates"])
    tasks = [
        (number, fold, _fit(learner, params, fold["validation_train"], per_day, settings, settings["search_rows"]))
        for number, (learner, params) in enumerate(combinations)
        for fold in folds
    ]
    # Whatever takes longest is not to be started last.
    tasks.sort(key=lambda task: -task[2].work)
    progress.enter(f"{len(tasks)} fits", 0.0, 0.8)
    fitted = fits.fit_all(frame, settings["features"], [fit for _, _, fit in tasks], settings["seed"], library_name)
    progress.enter(f"judging {len(tasks)} fits", 0.8, 1.0)
    judged = [(one.model, fold["validation"]) for one, (_, fold, _) in zip(fitted, tasks)]
    precisions = fits.validate(frame, judged, library_name)
    entries = []
    for number, (learner, params) in enumerate(combinations):
        # The sort is stable: folds are in their order.
        own = [index for index, task in enumerate(tasks) if task[0] == number]
        of_folds = [precisions[index] for index in own]
        entry = {
            "learner": learner,
            "params": params,
            "validation_average_precision": round(math.fsum(of_folds) / len(of_folds), 12),
            "fold_average_precisions": of_folds,
            "rows": fitted[own[0]].rows,
            "seconds": round(sum(fitted[index].seconds for index in own), 3),
        }
        log.info(
            "%d/%d: %s %s: average precision %.4f, %d rows, %.1f s",
            number + 1, len(combinations), learner, params, entry["validation_average_precision"], entry["rows"],
            entry["seconds"],
        )  # fmt: skip
        entries.append(entry)
    return entries


def write_scores(
    spark: SparkSession,
    test: DataFrame,
    model: str,
    champion: dict[str, Any] | None,
    scores_uri: str,
    library_name: str | None,
) -> dict[str, Any] | None:
    """Write the test rows with the scores of a model file and the champion's, and say how the champion fared.

    A champion that cannot be loaded or applied leaves champion_score NULL and is reported as unreadable, or as
    newer_library if a newer library wrote it, which this one would misread; that is no error of this job.
    """
    from pyspark.sql import functions as F

    kept = {
        "transaction_id": "bigint",
        "tx_unix_seconds": "bigint",
        "customer_id": "bigint",
        "tx_amount": "double",
        LABEL: "int",
        "tx_fraud_scenario": "int",
    }
    # numpy has no NULL integer, and slow timestamps: both go as plain integers.
    plain = {
        "tx_unix_seconds": F.expr("CAST(tx_datetime AS BIGINT)"),
        "customer_id": F.coalesce(F.col("customer_id"), F.lit(NO_KEY)),
    }

    def write(models: dict[str, str]) -> None:
        inputs = sorted({name for text in models.values() for name in Scorer.from_json(text).features} - set(kept))
        columns = [plain.get(name, F.col(name)).cast(kind).alias(name) for name, kind in kept.items()]
        scored = fits.with_scores(test.select(*columns, *fits.input_columns(inputs)), models, kept, library_name)
        found = {
            "tx_datetime": F.expr("CAST(tx_unix_seconds AS TIMESTAMP)"),
            "customer_id": F.expr(f"nullif(customer_id, CAST({NO_KEY} AS BIGINT))"),
        }
        champion_score = F.col("champion_score") if "champion_score" in models else F.lit(None).cast("double")
        frame = scored.select(
            *[found.get(name, F.col(name)).alias(name) for name in SCORED_COLUMNS],
            "score",
            champion_score.alias("champion_score"),
        )
        frame.write.mode("overwrite").parquet(scores_uri)

    if champion is not None:
        try:
            log.info("scoring the champion, version %s", champion.get("version"))
            text = _champion_model(spark, test, champion)
            write({"score": model, "champion_score": text})
            return {**champion, "status": "scored"}
        except NewerModelError as error:
            champion = {**champion, "status": "newer_library", "error": str(error)}
        except Exception as error:
            # Whatever is wrong with the champion: if it is not the champion, the write below fails as well.
            champion = {**champion, "status": "unreadable", "error": runtime.describe(error)}
        log.warning("the champion cannot score: %s", champion["error"])
    write({"score": model})
    return champion


def _champion_model(spark: SparkSession, test: DataFrame, champion: dict[str, Any]) -> str:
    """The champion's model file, if it can score these rows. Raises ModelError if it cannot."""
    text = runtime.Files(spark).read(champion["model_uri"]).decode("utf-8", errors="replace")
    features = Scorer.from_json(text).features
    missing = [name for name in features if name not in test.columns]
    if missing:
        raise ModelError("it needs features that these partitions do not have: {}".format(", ".join(missing)))
    return text


def _keep_sample(files: runtime.Files, test: DataFrame, scorer: Scorer, seed: int, uri: str) -> dict[str, float]:
    """Write SAMPLE_ROWS held-out rows with inputs and scores to `uri`; returns feature → mean absolute contribution.

    The rows are those with the lowest hashes, so the same for the same test window.
    """
    import numpy as np
    import pyarrow
    from pyspark.sql import functions as F

    ids = ("transaction_id", "tx_datetime", "customer_id", "terminal_id", LABEL)
    numbers = {"tx_datetime": F.expr("CAST(tx_datetime AS BIGINT)")}
    names = [*ids, *scorer.features]
    chosen = test.orderBy(fits.hash_of_transaction(seed), "transaction_id").limit(IMPORTANCE_ROWS)
    rows = chosen.select(*[numbers.get(name, F.col(name)).alias(name) for name in names]).collect()
    matrix = matrix_of({name: [row[name] for row in rows] for name in scorer.features}, scorer.features)
    importances = np.abs(scorer.contributions(matrix)[:, :-1]).mean(axis=0)

    kept = rows[:SAMPLE_ROWS]
    types = {"tx_datetime": pyarrow.timestamp("us", tz="UTC"), LABEL: pyarrow.int32()}
    columns = {name: [row[name] for row in kept] for name in names}
    columns["tx_datetime"] = [seconds * 1_000_000 for seconds in columns["tx_datetime"]]
    arrays = [
        pyarrow.array(columns[name], types.get(name, pyarrow.int64() if name in ids else pyarrow.float64()))
        for name in names
    ]
    scores = pyarrow.array(scorer.score(matrix[: len(kept)]))
    table = pyarrow.Table.from_arrays([*arrays, scores], names=[*names, "score"])
    files.write(uri, parquet_files.file_of(table))
    return {name: float(value) for name, value in zip(scorer.features, importances)}


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    missing = [name for name in REQUIRED if not request.get(name)]
    if missing:
        raise ValueError("the request lacks {}; see train_model.run".format(", ".join(missing)))
    if request["cutoff_uri"] not in request["feature_uris"]:
        raise ValueError("cutoff_uri must be one of feature_uris; it is {}".format(request["cutoff_uri"]))
    settings = {**DEFAULTS, **{name: value for name, value in request.items() if value is not None}}
    for name, least in (("validation_folds", 1), ("fit_threads", 1), ("search_rows", 1000), ("max_train_rows", 1000)):
        if not settings[name] >= least:
            raise ValueError(f"{name} must be {least:,} or more; it is {settings[name]}")
    check_candidates(settings["candidates"])
    return settings


def _read_features(spark: SparkSession, settings: dict[str, Any]) -> DataFrame:
    frame = runtime.read_parquet(spark, *settings["feature_uris"])
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


def _between(frame: DataFrame, window: tuple[int, int]) -> DataFrame:
    from pyspark.sql import functions as F

    return frame.where(F.col("tx_time_days").between(*window))


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
