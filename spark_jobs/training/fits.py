"""Fits and validation in Spark tasks. The driver receives models and metrics, never rows.

Each task does one fit. Its rows arrive as packed 32-bit columns and are sorted, so a fit depends only on the request
and the data, not on cores, partitions or executors.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, NamedTuple, Sequence

from spark_jobs.io import blocks
from spark_jobs.training import library
from spark_jobs.training.learners import LEARNERS, ModelError, Scorer, matrix_of

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from spark_jobs.io.blocks import Array, Columns

log = logging.getLogger("spark_jobs")

LABEL = "tx_fraud"

#: A transaction's hash is a number from 0 to HASHES - 1.
HASHES = 1_000_000_007

#: Sampling aims below a limit by this many standard deviations, so that a class practically never exceeds it.
DEVIATIONS = 6

#: Bins of the distribution of an input or the score, and the rows from which their edges are computed.
BINS = 20
EDGE_ROWS = 100_000

#: Columns shuffled to a fit, before the inputs. The underscore avoids clashes with names of inputs.
_KEYS = (("_seconds", "i8"), ("_id", "i8"), ("_day", "i4"), ("_label", "u1"))


class Sample(NamedTuple):
    """A sample of rows: those whose hash is below the threshold of their class."""

    genuine: int
    frauds: int


class Fit(NamedTuple):
    """A fit, done by one task.

    ``rows`` and ``frauds`` are those of the window that is sampled; ``with_profile`` requests the distributions of
    inputs and scores.
    """

    learner: str
    params: dict[str, Any]
    window: tuple[int, int]
    sample: Sample
    rows: int
    frauds: int
    seed: int
    threads: int
    with_profile: bool = False

    @property
    def relative_cost(self) -> float:
        """Duration relative to other fits."""
        return LEARNERS[self.learner].relative_cost(self.params)


class Fitted(NamedTuple):
    """Result of a fit: model file, sampled rows and frauds, weight of each class, seconds of the task, profile."""

    model: str
    rows: int
    frauds: int
    genuine_weight: float
    fraud_weight: float
    seconds: float
    profile: dict[str, Any] | None


def draw(limit: int, rows: int, frauds: int) -> Sample:
    """Sample at most `limit` of `rows` by hash; frauds take at most half of it, and genuine rows fill the rest."""
    if rows <= limit:
        return Sample(HASHES, HASHES)
    kept_frauds = min(frauds, limit // 2)
    return Sample(_threshold(limit - kept_frauds, rows - frauds), _threshold(kept_frauds, frauds))


def _threshold(limit: int, rows: int) -> int:
    if rows <= limit:
        return HASHES
    return int(max(limit - DEVIATIONS * limit**0.5, 0) / rows * HASHES)


def hash_of_transaction(seed: int) -> Column:
    """Hash by which transactions are sampled."""
    from pyspark.sql import functions as F

    return F.expr(f"pmod(xxhash64(transaction_id, CAST({int(seed)} AS BIGINT)), {HASHES})")


def input_columns(features: Iterable[str]) -> list[Column]:
    """Inputs as 32-bit floats; NULL becomes NaN, which scorers and learners reject."""
    from pyspark.sql import functions as F

    # One call of the JVM each; with the functions of columns it is forty, a third of a small training's time.
    names = ["`{}`".format(name.replace("`", "``")) for name in features]
    return [F.expr(f"coalesce(CAST({name} AS FLOAT), float('NaN')) AS {name}") for name in names]


def fit_all(rows: DataFrame, features: Sequence[str], fits: Sequence[Fit], library_name: str | None) -> list[Fitted]:
    """Do the `fits`, one task each, on `rows` of ``transaction_features`` sampled with their seed, the same for all.

    Raises the error of a failed task, e.g. for an input that is not a number.
    """
    from pyspark.sql import functions as F

    layout = (*_KEYS, *[(name, "f4") for name in features])
    keys = blocks.partition_keys(len(fits))
    numbers = {int(key): number for number, key in enumerate(keys)}
    fits = list(fits)
    (seed,) = {fit.seed for fit in fits}
    first, last = min(fit.window[0] for fit in fits), max(fit.window[1] for fit in fits)
    genuine, frauds = max(fit.sample.genuine for fit in fits), max(fit.sample.frauds for fit in fits)

    def distribute(columns: Columns) -> Columns:
        masks = [(number, _is_sampled(columns, fit)) for number, fit in enumerate(fits)]
        masks = [(number, mask) for number, mask in masks if mask.any()]
        packed = [blocks.pack({name: columns[name][mask] for name, _ in layout}, layout) for _, mask in masks]
        return {"partition_key": keys[[number for number, _ in masks]].astype("i4"), "block": packed}

    def run_fits(key_blocks: Iterable[Any]) -> Iterator[tuple[int, str]]:
        library.use(library_name)
        by_fit: dict[int, list[bytes]] = {}
        for key, block in key_blocks:
            by_fit.setdefault(numbers[key], []).append(block)
        for number in sorted(by_fit):
            yield number, json.dumps(_run_fit(fits[number], features, by_fit.pop(number), layout)._asdict())

    plain = rows.where(F.col("tx_time_days").between(first, last)).select(
        F.col("tx_time_seconds").alias("_seconds"),
        F.col("transaction_id").alias("_id"),
        F.col("tx_time_days").alias("_day"),
        F.col(LABEL).cast("tinyint").alias("_label"),
        hash_of_transaction(seed).alias("_hash"),
        *input_columns(features),
    )
    plain = plain.where(F.col("_hash") < F.expr(f"IF(_label = 1, {frauds}, {genuine})"))
    shuffled = blocks.exchange(blocks.map_columns(plain, distribute, blocks.BLOCK_SCHEMA), len(fits))
    # Through an RDD, which passes a few blocks at a time; Arrow would put all of them into one batch.
    results = dict(shuffled.rdd.mapPartitions(run_fits).collect())
    missing = [fit for number, fit in enumerate(fits) if number not in results]
    if missing:
        raise ValueError(f"no rows were sampled for {missing[0].learner} in the window {missing[0].window}")
    return [Fitted(**json.loads(results[number])) for number in range(len(fits))]


def _is_sampled(columns: Columns, fit: Fit) -> Array:
    """Mask of the rows of a batch that a fit uses."""
    import numpy as np

    days = columns["_day"]
    threshold = np.where(columns["_label"] == 1, fit.sample.frauds, fit.sample.genuine)
    mask: Array = (days >= fit.window[0]) & (days <= fit.window[1]) & (columns["_hash"] < threshold)
    return mask


def _run_fit(fit: Fit, features: Sequence[str], packed: list[bytes], layout: blocks.Layout) -> Fitted:
    """Do a fit on its packed rows, which are freed once they are unpacked."""
    import numpy as np

    started = time.monotonic()
    seconds, ids, days, label = (blocks.column(packed, layout, name) for name, _ in _KEYS)
    order = np.lexsort((ids, seconds))
    del seconds, ids
    days, label = days[order], label[order]
    matrix = np.empty((len(order), len(features)), dtype="f4")
    # Column by column, so that the data are not held twice.
    for number, name in enumerate(features):
        matrix[:, number] = matrix_of({name: blocks.column(packed, layout, name)}, [name])[order, 0]
    packed.clear()
    del order
    frauds = int(label.sum())
    if frauds in (0, len(label)):
        raise ValueError(f"{frauds} of {len(label)} sampled rows are frauds: a fit needs both classes")
    missing = np.isnan(matrix.sum(axis=0, dtype="f8"))
    if missing.any():
        names = [name for name, is_missing in zip(features, missing) if is_missing]
        raise ValueError("missing values in {}; build the features again".format(", ".join(names)))
    weights = (fit.rows - fit.frauds) / (len(label) - frauds), fit.frauds / frauds
    weight = np.where(label == 1, weights[1], weights[0]).astype("f4")
    model = LEARNERS[fit.learner].fit(matrix, label, weight, fit.params, fit.seed, fit.threads)
    scorer = Scorer(fit.learner, features, model)
    profile = profile_of(scorer, matrix, days, label, weights) if fit.with_profile else None
    return Fitted(scorer.to_json(), len(label), frauds, *weights, round(time.monotonic() - started, 3), profile)


def profile_of(
    scorer: Scorer, matrix: Array, days: Array, label: Array, weights: tuple[float, float]
) -> dict[str, Any]:
    """Distributions of the inputs and of the score, day by day, for comparison with those of later rows.

    ``edges``: input, or ``score`` → at most BINS - 1 ascending quantiles of the rows. Bin i has the values from edge
    i - 1 (inclusive) to edge i (exclusive). ``first_day`` and ``days``: the days of the rows. ``counts``: input, or
    ``score`` → a list for each day with the rows in each bin, weighted by class and rounded. ``labels``: a list of the
    rows and the frauds of each day, weighted in the same way. ``effective_rows``: rows drawn with equal weights that
    would vary as these (L. Kish, "Survey Sampling", 1965, section 11.7); all rows of the window if none was left out.
    """
    import numpy as np

    edges: dict[str, list[float]] = {}
    counts: dict[str, list[list[int]]] = {}
    first_day = int(days[0])
    number_of_days = int(days[-1]) - first_day + 1
    step = -(-len(matrix) // EDGE_ROWS)
    for column, name in enumerate((*scorer.features, "score")):
        values = scorer.score(matrix) if name == "score" else matrix[:, column]
        ordered = np.sort(values[::step])
        limits = np.unique(ordered[[len(ordered) * number // BINS for number in range(1, BINS)]])
        bins = len(limits) + 1
        cell = ((days - first_day) * bins + np.searchsorted(limits, values, side="right")) * 2 + label
        of_class = np.bincount(cell, minlength=number_of_days * bins * 2).reshape(number_of_days, bins, 2)
        edges[name] = [float(limit) for limit in limits]
        counts[name] = np.rint(of_class @ np.array(weights)).astype("i8").tolist()
    rows = np.bincount((days - first_day) * 2 + label, minlength=number_of_days * 2).reshape(number_of_days, 2)
    weighted = rows * np.array(weights)
    return {
        "first_day": first_day,
        "days": number_of_days,
        "edges": edges,
        "counts": counts,
        "labels": np.rint(np.column_stack([weighted.sum(axis=1), weighted[:, 1]])).astype("i8").tolist(),
        "effective_rows": round(float(weighted.sum()) ** 2 / float((weighted * weights).sum())),
    }


def validate(rows: DataFrame, models: Sequence[tuple[str, tuple[int, int]]], library_name: str | None) -> list[float]:
    """Exact average precision of each model file on all rows of its window, scored in Spark tasks."""
    from pyspark.sql import functions as F

    models = list(models)
    features = sorted({name for model, _ in models for name in json.loads(model)["features"]})
    keys = blocks.partition_keys(len(models))
    numbers = {int(key): number for number, key in enumerate(keys)}
    layout = (("_score", "f8"), ("_label", "u1"))
    score = _cached_scorer([model for model, _ in models], library_name)

    def score_windows(columns: Columns) -> Columns:
        packed = []
        for number, (_, window) in enumerate(models):
            days = columns["_day"]
            mask = (days >= window[0]) & (days <= window[1])
            if mask.any():
                in_window = {name: values[mask] for name, values in columns.items()}
                in_window["_score"] = score(number, in_window)
                packed.append((number, blocks.pack(in_window, layout)))
        return {
            "partition_key": keys[[number for number, _ in packed]].astype("i4"),
            "block": [block for _, block in packed],
        }

    def average_precisions(key_blocks: Iterable[Any]) -> Iterator[tuple[int, float]]:
        from sklearn.metrics import average_precision_score

        by_model: dict[int, list[bytes]] = {}
        for key, block in key_blocks:
            by_model.setdefault(numbers[key], []).append(block)
        for number, packed in sorted(by_model.items()):
            columns = blocks.unpack(packed, layout)
            yield number, round(float(average_precision_score(columns["_label"], columns["_score"])), 12)

    first, last = min(window[0] for _, window in models), max(window[1] for _, window in models)
    plain = rows.where(F.col("tx_time_days").between(first, last)).select(
        F.col("tx_time_days").alias("_day"), F.col(LABEL).cast("tinyint").alias("_label"), *input_columns(features)
    )
    shuffled = blocks.exchange(blocks.map_columns(plain, score_windows, blocks.BLOCK_SCHEMA), len(models))
    results = dict(shuffled.rdd.mapPartitions(average_precisions).collect())
    return [results[number] for number in range(len(models))]


def _cached_scorer(models: Sequence[str], library_name: str | None) -> Callable[[int, Columns], Array]:
    """A function for tasks that scores columns of inputs with a model, by its number, loading each model once."""
    scorers: dict[int, Scorer] = {}

    def score(number: int, columns: Columns) -> Array:
        if number not in scorers:
            library.use(library_name)
            scorers[number] = Scorer.from_json(models[number])
        return checked_scores(scorers[number], matrix_of(columns, scorers[number].features))

    return score


def checked_scores(scorer: Scorer, matrix: Array) -> Array:
    """Scores of the rows. Raises ModelError if the model fails or gives one that is not a number."""
    import numpy as np

    try:
        scores = scorer.score(matrix)
    except Exception as error:
        raise ModelError(f"it fails: {type(error).__name__}: {error}") from None
    if not np.isfinite(scores).all():
        raise ModelError("it gives scores that are not numbers")
    return scores


def with_scores(rows: DataFrame, models: dict[str, str], kept: dict[str, str], library_name: str | None) -> DataFrame:
    """Score rows in Spark tasks.

    Args:
        rows: the columns of `kept` and the models' inputs, the latter as from `input_columns`.
        models: name of a score column → model file.
        kept: numeric columns without NULLs to keep → their SQL type.
    """
    names = list(models)
    score = _cached_scorer(list(models.values()), library_name)

    def add_scores(columns: Columns) -> Columns:
        result = {name: columns[name] for name in kept}
        result.update((name, score(number, columns)) for number, name in enumerate(names))
        return result

    schema = ", ".join([*(f"{name} {kind}" for name, kind in kept.items()), *(f"{name} double" for name in names)])
    return blocks.map_columns(rows, add_scores, schema)
