"""Train a fraud model on ``transaction_features``: choose learner and parameters, fit, and score later rows.

All windows are whole days (``tx_time_days``) and end with the last day D of the cut-off partition (see `_ends`)::

    |<------------------- train ------------------>|<- delay ->|<-- test -->|
    |<-- validation_train -->|<- delay ->|<- valid. ->|                     D

A label is known `delay_days` after its transaction, so no fit uses labels that would not have been known. The learner
and parameters chosen have the best average precision on the validation window, or the best mean over several folds:
earlier folds are the same two windows, `validation_days` further back for each, and also start with the train window.
Candidates are fitted on a sample of the rows, the best one then on the whole train window. All sampling is seeded. Of
the test window, only the numbers of rows and frauds are used before the model is fitted; rows after D are never used.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from datetime import date
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
    grid_points,
    matrix_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.training.fits import Fit, Fitted

log = logging.getLogger("spark_jobs")

#: Optional settings of a request with their defaults; days are whole days.
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
    "cutoff_last_date": None,
    "library_uri": None,
}

#: Phase of a training → the shares of the work where it begins and ends, for the progress: about those of 150,000 and
#: of 600,000 rows in docs/performance.md.
PHASES = {
    "windows": (0.0, 0.05),
    "search": (0.05, 0.5),
    "fit": (0.5, 0.85),
    "score": (0.85, 0.93),
    "explain": (0.93, 1.0),
}

#: Required keys of a request.
REQUIRED = ("run_id", "cutoff", "feature_uris", "cutoff_uri", "features", "output_uri")

#: Columns of ``test_scores``; followed by ``score`` and ``champion_score``.
TEST_SCORE_COLUMNS = ("transaction_id", "tx_datetime", "customer_id", "tx_amount", "tx_fraud", "tx_fraud_scenario")

#: Held-out rows kept with the model, and those whose contributions give its feature importances.
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
        platform_version: version of the platform, noted in the report.
        cutoff: key of the last partition that the model may use.
        feature_uris: directories of ``transaction_features``, Parquet.
        cutoff_uri: the one of `cutoff`; its last full day is D.
        cutoff_last_date: null, or the last day that D may be (YYYY-MM-DD): later rows of the partition are odd ones.
        features: names of the feature columns, in the order of the model's coefficients.
        output_uri: directory for the model and the scores; its content is replaced.
        test_days, delay_days, train_days, validation_days: lengths of the windows (7, 7, 60, 7). The train
            window is shorter if the data do not reach back that far.
        min_train_days: minimum days to fit on while parameters are chosen (7).
        min_frauds: minimum frauds in each window (10).
        candidates: list of {"learner", "grid"}: a learner of `learners.LEARNERS`, and parameter → values. Every
            combination is fitted and validated, the first names vary slowest; the first of equals wins (see
            `learners.DEFAULT_CANDIDATES`).
        validation_folds: folds to validate on, latest first (1); fewer are used if earlier folds would have less than
            min_train_days or min_frauds.
        search_rows: maximum rows that a candidate is fitted on (200,000); validation always uses all rows.
        max_train_rows: maximum rows that the model is fitted on (5,000,000). Rows are sampled by a hash of
            transaction_id and seed, frauds and genuine rows separately, and weighted by the number of rows they
            represent; frauds take at most half of either limit.
        fit_threads: threads of the final fit (4); fits of the search run in parallel with one thread each.
        compromised_lookback_days: see `without_compromised_cards` (7).
        seed: seed of the learners and of the sampling.
        champion: null or {"model_uri", "features", "version"}: a model file that scores the same test rows.
        library_uri: archive of the learners' library (see `library`), or null if Spark's Python has it.

    Report: ``schema_version``, ``run_id``, ``platform_version``, ``cutoff``, ``features``, ``seed``, ``windows``
        (name → ``first_day``, ``last_day``, ``first_date``, ``last_date``, ``days``, ``rows``, ``frauds``; test also
        ``removed_rows`` and ``removed_frauds`` of cards known to be compromised), ``spark_version``, ``seconds``
        (phase → seconds), and ``outcome``:

    * ``too_little_data``, with ``reason``, one sentence; nothing is written.
    * ``trained``, with ``grid`` (``learner``, ``params``, ``validation_average_precision``: the mean of
      ``fold_average_precisions``, ``rows`` (rows fitted on in the latest fold), ``seconds``), ``best`` (``learner``,
      ``params``, ``validation_average_precision``), ``validation_folds`` (list of ``validation_train`` and
      ``validation`` as in ``windows``, the latest first), ``sampling`` (null if all rows were used, else
      ``max_train_rows``, ``rows``, ``frauds``, ``kept_rows``, ``kept_frauds``, ``genuine_weight``, ``fraud_weight``),
      ``feature_importances`` (feature → mean absolute contribution to the log-odds, over `IMPORTANCE_ROWS` held-out
      rows), ``profile`` (inputs, score and labels of the train window by day; see `fits.profile_of`), ``champion``
      (null, or the request's with ``status`` scored, unreadable or newer_library, the latter two with ``error``),
      ``model_uri``, ``scores_uri``, ``sample_uri``; of logistic regression also ``coefficients`` (feature → value, in
      units of the feature), ``intercept``. Metrics are left to readers of ``test_scores``.

    Writes into ``output_uri`` the model file ``model.json`` (see `learners.Scorer`), ``test_scores`` (Parquet:
    `TEST_SCORE_COLUMNS`, score, champion_score), the held-out rows, and ``sample.parquet``:
    `SAMPLE_ROWS` of them, sampled by hash, with the model's inputs.

    Raises:
        ValueError: the request lacks a key, names an unknown learner or parameter, or the partitions lack a
            column.
        library.LibraryError: the learners' library is missing or damaged; nothing was read.
    """
    runtime.configure(spark)
    library_name = library.ship(spark, request.get("library_uri"))
    settings = _settings(request)
    seconds: dict[str, float] = {}
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run_id": settings["run_id"],
        "platform_version": settings.get("platform_version"),
        "cutoff": settings["cutoff"],
        "features": settings["features"],
        "seed": settings["seed"],
        "windows": {},
        "spark_version": spark.version,
        "seconds": seconds,
    }
    started = time.monotonic()
    with Progress(spark, "training") as progress:
        report.update(_train(spark, settings, report["windows"], _Clock(progress, seconds), library_name))
    seconds["total"] = round(time.monotonic() - started, 3)
    return report


def _train(
    spark: SparkSession,
    settings: dict[str, Any],
    report_windows: dict[str, Any],
    clock: _Clock,
    library_name: str | None,
) -> dict[str, Any]:
    with clock.phase("windows"):
        frame = _read_features(spark, settings)
        ends = _ends(spark, frame, settings)
        if ends is None:
            return _too_little("The cut-off partition {} has no rows.".format(settings["cutoff"]))
        last_day, day_zero = ends
        runtime.set_shuffle_partitions(spark, 0)  # one row per day
        per_day = _rows_per_day(frame, last_day)
        if not per_day:
            return _too_little("The cut-off partition {} has no full day.".format(settings["cutoff"]))
        windows = time_windows(min(per_day), last_day, settings)
        runtime.set_shuffle_partitions(spark, 64 * sum(rows for rows, _ in per_day.values()))
        test = _between(without_compromised_cards(frame, windows["test"], settings), windows["test"])
        test_counts = _count(test)
        report_windows.update(_describe(windows, per_day, test_counts, day_zero))
        reason = _shortage(windows, report_windows, settings)
        if reason:
            return _too_little(reason)
        for name, window in report_windows.items():
            log.info(
                "%s: %s to %s, %d rows, %d frauds",
                name, window["first_date"], window["last_date"], window["rows"], window["frauds"],
            )  # fmt: skip

    files, output = runtime.Files(spark), settings["output_uri"].rstrip("/")
    folds = validation_folds(windows, per_day, settings)
    with clock.phase("search"):
        grid = search(frame, folds, per_day, settings, library_name, clock.progress)
    # max() returns the first of equals.
    best = max(grid, key=lambda entry: entry["validation_average_precision"])

    with clock.phase("fit"):
        fit = _fit(best["learner"], best["params"], windows["train"], per_day, settings, settings["max_train_rows"])
        fit = fit._replace(threads=settings["fit_threads"], with_profile=True)
        (fitted,) = fits.fit_all(frame, settings["features"], [fit], library_name)
        model_uri = f"{output}/{MODEL_FILE}"
        files.write(model_uri, fitted.model.encode())
    log.info("fitted %s with %s on %d rows", best["learner"], best["params"], fitted.rows)

    with clock.phase("score"):
        scores_uri = f"{output}/test_scores"
        champion = write_scores(spark, test, fitted.model, settings["champion"], scores_uri, library_name)
    with clock.phase("explain"):
        scorer = Scorer.from_json(fitted.model, settings["fit_threads"])
        sample_uri = f"{output}/{SAMPLE_FILE}"
        importances = _write_sample(files, test, scorer, settings["seed"], sample_uri)
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
    """Name of a window → its first and last day (inclusive), for data from `first_day` to `last_day`.

    A window ends before it begins if there are too few days for it.
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
    """Folds that candidates are validated on, latest first: name of a window → its first and last day.

    The first is that of `time_windows`. Each further one ends `validation_days` earlier and starts on the same day;
    the list ends before the first fold with less than min_train_days, or with a window that has less than min_frauds
    or no genuine rows.
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
    """A single-threaded fit on at most `limit` rows of a window."""
    rows, frauds = _rows_and_frauds(window, per_day)
    return fits.Fit(learner, params, window, fits.draw(limit, rows, frauds), rows, frauds, settings["seed"], threads=1)


def _sampling(fit: Fit, fitted: Fitted, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Effect of `max_train_rows` on the train window; None if all its rows were used."""
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
    """Remove rows of cards that were known to be compromised on that day; meant for the test window.

    As in the Fraud Detection Handbook (chapter 3, "Baseline fraud detection system"): a card known to be compromised is
    blocked, so its rows do not test a model. Known on day t are frauds up to day t - delay_days - 1, and from test
    start - delay_days - compromised_lookback_days on: a fixed lookback, so that the test rows do not depend on
    train_days. Rows without a customer are kept.
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
    """Fit every combination of the candidates and validate it on each fold; one entry each, in their order."""
    combinations = grid_points(settings["candidates"])
    tasks = [
        (number, fold, _fit(learner, params, fold["validation_train"], per_day, settings, settings["search_rows"]))
        for number, (learner, params) in enumerate(combinations)
        for fold in folds
    ]
    # Longest first, so that none starts when the others are done.
    tasks.sort(key=lambda task: -task[2].relative_cost)
    begin, end = PHASES["search"]
    fitted_share = begin + 0.8 * (end - begin)
    progress.enter(f"search: {len(tasks)} fits", begin, fitted_share)
    fitted = fits.fit_all(frame, settings["features"], [fit for _, _, fit in tasks], library_name)
    progress.enter(f"search: validating {len(tasks)} fits", fitted_share, end)
    models = [(one.model, fold["validation"]) for one, (_, fold, _) in zip(fitted, tasks)]
    precisions = fits.validate(frame, models, library_name)
    entries = []
    for number, (learner, params) in enumerate(combinations):
        # The sort is stable, so folds stay in order.
        indices = [index for index, task in enumerate(tasks) if task[0] == number]
        fold_precisions = [precisions[index] for index in indices]
        entry = {
            "learner": learner,
            "params": params,
            "validation_average_precision": round(math.fsum(fold_precisions) / len(fold_precisions), 12),
            "fold_average_precisions": fold_precisions,
            "rows": fitted[indices[0]].rows,
            "seconds": round(sum(fitted[index].seconds for index in indices), 3),
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
    """Write the test rows with the scores of a model file and the champion; return the champion with its ``status``.

    If the champion's file is missing or cannot be applied, champion_score is NULL and the status unreadable, or
    newer_library if it was written by a newer library, which this one would misread. Errors of the storage are raised:
    they say nothing about the champion, which a challenger would replace.
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
    # numpy has no NULL integers, and timestamps are slow to convert: both become plain integers.
    plain = {
        "tx_unix_seconds": F.expr("CAST(tx_datetime AS BIGINT)"),
        "customer_id": F.coalesce(F.col("customer_id"), F.lit(NO_KEY)),
    }

    def write(models: dict[str, str]) -> None:
        inputs = sorted({name for text in models.values() for name in Scorer.from_json(text).features} - set(kept))
        columns = [plain.get(name, F.col(name)).cast(kind).alias(name) for name, kind in kept.items()]
        scored = fits.with_scores(test.select(*columns, *fits.input_columns(inputs)), models, kept, library_name)
        restored = {
            "tx_datetime": F.expr("CAST(tx_unix_seconds AS TIMESTAMP)"),
            "customer_id": F.expr(f"nullif(customer_id, CAST({NO_KEY} AS BIGINT))"),
        }
        champion_score = F.col("champion_score") if "champion_score" in models else F.lit(None).cast("double")
        frame = scored.select(
            *[restored.get(name, F.col(name)).alias(name) for name in TEST_SCORE_COLUMNS],
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
            problem = runtime.describe(error)
            # A task's error arrives as text. If it is of the new model, the write below fails as well.
            if not isinstance(error, ModelError) and ModelError.__name__ not in problem:
                raise
            champion = {**champion, "status": "unreadable", "error": problem}
        log.warning("the champion cannot score: %s", champion["error"])
    write({"score": model})
    return champion


def _champion_model(spark: SparkSession, test: DataFrame, champion: dict[str, Any]) -> str:
    """Read the champion's model file. Raises ModelError if it is not there or cannot score these rows."""
    try:
        text = runtime.Files(spark).read(champion["model_uri"]).decode("utf-8", errors="replace")
    except Exception as error:
        if not runtime.is_not_found(error):
            raise
        raise ModelError("there is no {}".format(champion["model_uri"])) from None
    features = Scorer.from_json(text).features
    missing = [name for name in features if name not in test.columns]
    if missing:
        raise ModelError("it needs features that these partitions do not have: {}".format(", ".join(missing)))
    return text


def _write_sample(files: runtime.Files, test: DataFrame, scorer: Scorer, seed: int, uri: str) -> dict[str, float]:
    """Write SAMPLE_ROWS held-out rows with inputs and scores to `uri`; return feature → mean absolute contribution.

    The rows with the lowest hashes are taken, so the same test window gives the same sample.
    """
    import numpy as np
    import pyarrow
    from pyspark.sql import functions as F

    ids = ("transaction_id", "tx_datetime", "customer_id", "terminal_id", LABEL)
    numbers = {"tx_datetime": F.expr("CAST(tx_datetime AS BIGINT) AS tx_datetime")}
    names = [*ids, *scorer.features]
    chosen = test.orderBy(fits.hash_of_transaction(seed), "transaction_id").limit(IMPORTANCE_ROWS)
    rows = chosen.select(*[numbers.get(name, name) for name in names]).collect()
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
    for name, minimum in (("validation_folds", 1), ("fit_threads", 1), ("search_rows", 1000), ("max_train_rows", 1000)):
        if not settings[name] >= minimum:
            raise ValueError(f"{name} must be {minimum:,} or more; it is {settings[name]}")
    check_candidates(settings["candidates"])
    return settings


def _read_features(spark: SparkSession, settings: dict[str, Any]) -> DataFrame:
    frame = runtime.read_parquet(spark, *settings["feature_uris"])
    missing = [name for name in (*TEST_SCORE_COLUMNS, *settings["features"]) if name not in frame.columns]
    if missing:
        raise ValueError("the feature partitions have no column {}; build them again".format(", ".join(missing)))
    return frame


def _ends(spark: SparkSession, frame: DataFrame, settings: dict[str, Any]) -> tuple[int, int] | None:
    """(D, days from 1970-01-01 to day 0); None if the cut-off has no rows.

    D is the day of the cut-off's last transaction, or `cutoff_last_date` if that is earlier. One second is subtracted
    because a row at 24:00:00 falls on the first instant of the next file's first day.
    """
    from pyspark.sql import functions as F

    cutoff = spark.read.schema(frame.schema).parquet(runtime.literal_path(settings["cutoff_uri"]))
    last_second, unix_epoch = cutoff.agg(
        F.max("tx_time_seconds"), F.min(F.expr("CAST(tx_datetime AS BIGINT) - tx_time_seconds"))
    ).collect()[0]
    if last_second is None:
        return None
    day_zero = unix_epoch // 86_400
    last_day = (last_second - 1) // 86_400
    if settings["cutoff_last_date"]:
        last_date = date.fromisoformat(settings["cutoff_last_date"])
        last_day = min(last_day, (last_date - date(1970, 1, 1)).days - day_zero)
    return last_day, day_zero


def _rows_per_day(frame: DataFrame, last_day: int) -> dict[int, tuple[int, int]]:
    """Day → (rows, frauds), up to and including `last_day`."""
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
        # numpy's dates, because a window may begin before the year 1.
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
    """Reason why the data do not suffice, one sentence with figures; None if training can start."""
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
            lacking.append("{} has {} frauds and no genuine rows".format(where, window["frauds"]))
    return "There is too little data: {}.".format("; ".join(lacking)) if lacking else None


def _too_little(reason: str) -> dict[str, Any]:
    log.warning("too little data: %s", reason)
    return {"outcome": "too_little_data", "reason": reason}


def _between(frame: DataFrame, window: tuple[int, int]) -> DataFrame:
    from pyspark.sql import functions as F

    return frame.where(F.col("tx_time_days").between(*window))


class _Clock:
    """Measures the seconds of each phase, and tells the progress when one begins."""

    def __init__(self, progress: Progress, seconds: dict[str, float]) -> None:
        self.progress, self._seconds = progress, seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        self.progress.enter(name, *PHASES[name])
        try:
            yield
        finally:
            self._seconds[name] = round(time.monotonic() - started, 3)
            log.info("%s: %.1f s", name, self._seconds[name])


if __name__ == "__main__":
    runtime.main(run, "train_model")
