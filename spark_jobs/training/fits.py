"""Fits and validation in Spark's tasks. The driver sees models and figures, never rows.

A task does one fit. Its rows come through Spark as packed 32-bit columns and are put into one fixed order, so a fit
depends on nothing but the request and the data: not on cores, partitions or executors.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, NamedTuple, Sequence

from spark_jobs.io import blocks
from spark_jobs.training import library
from spark_jobs.training.learners import LEARNERS, Scorer, matrix_of

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from spark_jobs.io.blocks import Array, Columns

log = logging.getLogger("spark_jobs")

LABEL = "tx_fraud"

#: A transaction's hash is a number from 0 to HASHES - 1.
HASHES = 1_000_000_007

#: A drawn class has fewer rows than it may by so many standard deviations of a draw by hash: it never has more.
DEVIATIONS = 6

#: Bins of an input's or the score's distribution, and the rows that their edges are taken from.
BINS = 20
EDGE_ROWS = 100_000

#: Columns of a row on its way to a fit, before its inputs. Their names are not those of columns, which may be inputs.
_KEYS = (("_seconds", "i8"), ("_id", "i8"), ("_day", "i4"), ("_label", "u1"))


class Sample(NamedTuple):
    """Which rows are drawn: those whose hash is below a number, one for each class."""

    genuine: int
    frauds: int


class Fit(NamedTuple):
    """A fit of one task.

    ``rows`` and ``frauds`` are those of the window, of which the sample is drawn; ``with_profile`` asks for the
    distributions of inputs and scores, too.
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
    def work(self) -> float:
        """How long it takes compared with others."""
        return LEARNERS[self.learner].work(self.params)


class Fitted(NamedTuple):
    """What came of a fit: the model file, the rows that were drawn, each class's weight, the seconds of the task."""

    model: str
    rows: int
    frauds: int
    genuine_weight: float
    fraud_weight: float
    seconds: float
    profile: dict[str, Any] | None


def draw(limit: int, rows: int, frauds: int) -> Sample:
    """At most `limit` of so many rows, by hash; frauds are at most half of them, and genuine rows fill the rest."""
    if rows <= limit:
        return Sample(HASHES, HASHES)
    kept_frauds = min(frauds, limit // 2)
    return Sample(_threshold(limit - kept_frauds, rows - frauds), _threshold(kept_frauds, frauds))


def _threshold(limit: int, rows: int) -> int:
    if rows <= limit:
        return HASHES
    return int(max(limit - DEVIATIONS * limit**0.5, 0) / rows * HASHES)


def hash_of_transaction(seed: int) -> Column:
    """The number by which transactions are drawn."""
    from pyspark.sql import functions as F

    return F.expr(f"pmod(xxhash64(transaction_id, CAST({int(seed)} AS BIGINT)), {HASHES})")


def input_columns(features: Iterable[str]) -> list[Column]:
    """The inputs as 32-bit numbers; NaN where there is none, which scorers and learners refuse."""
    from pyspark.sql import functions as F

    return [F.coalesce(F.col(name).cast("float"), F.expr("float('NaN')")).alias(name) for name in features]


def fit_all(
    rows: DataFrame, features: Sequence[str], fits: Sequence[Fit], seed: int, library_name: str | None
) -> list[Fitted]:
    """Do the `fits`, one task each; `rows` are of ``transaction_features``, and `seed` draws them.

    Raises what a task raises, e.g. for an input that is no number.
    """
    from pyspark.sql import functions as F

    layout = (*_KEYS, *[(name, "f4") for name in features])
    keys = blocks.partition_keys(len(fits))
    numbers = {int(key): number for number, key in enumerate(keys)}
    fits = list(fits)
    first, last = min(fit.window[0] for fit in fits), max(fit.window[1] for fit in fits)
    genuine, frauds = max(fit.sample.genuine for fit in fits), max(fit.sample.frauds for fit in fits)

    def distribute(columns: Columns) -> Columns:
        found = [(number, _chosen(columns, fit)) for number, fit in enumerate(fits)]
        found = [(number, chosen) for number, chosen in found if chosen.any()]
        packed = [blocks.pack({name: columns[name][chosen] for name, _ in layout}, layout) for _, chosen in found]
        return {"partition_key": keys[[number for number, _ in found]].astype("i4"), "block": packed}

    def work(arrived: Iterable[Any]) -> Iterator[tuple[int, str]]:
        library.use(library_name)
        by_fit: dict[int, list[bytes]] = {}
        for key, block in arrived:
            by_fit.setdefault(numbers[key], []).append(block)
        for number in sorted(by_fit):
            yield number, json.dumps(_fitted(fits[number], features, by_fit.pop(number), layout)._asdict())

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
    # Through an RDD, which hands over a few blocks at a time: Arrow would make one batch of all of them.
    answers = dict(shuffled.rdd.mapPartitions(work).collect())
    missing = [fit for number, fit in enumerate(fits) if number not in answers]
    if missing:
        raise ValueError(f"no row was drawn for {missing[0].learner} in the window {missing[0].window}")
    return [Fitted(**json.loads(answers[number])) for number in range(len(fits))]


def _chosen(columns: Columns, fit: Fit) -> Array:
    """Which rows of a batch a fit takes."""
    import numpy as np

    days, drawn = columns["_day"], columns["_hash"]
    below = np.where(columns["_label"] == 1, fit.sample.frauds, fit.sample.genuine)
    chosen: Array = (days >= fit.window[0]) & (days <= fit.window[1]) & (drawn < below)
    return chosen


def _fitted(fit: Fit, features: Sequence[str], packed: list[bytes], layout: blocks.Layout) -> Fitted:
    """Do a fit with its packed rows, which are given up on the way."""
    import numpy as np

    started = time.monotonic()
    seconds, ids, days, label = (blocks.column(packed, layout, name) for name, _ in _KEYS)
    order = np.lexsort((ids, seconds))
    del seconds, ids
    days, label = days[order], label[order]
    matrix = np.empty((len(order), len(features)), dtype="f4")
    # Column by column: all at once would be there twice.
    for number, name in enumerate(features):
        matrix[:, number] = matrix_of({name: blocks.column(packed, layout, name)}, [name])[order, 0]
    packed.clear()
    del order
    frauds = int(label.sum())
    if frauds in (0, len(label)):
        raise ValueError(f"{frauds} of {len(label)} rows that were drawn are frauds: a fit takes both kinds")
    missing = np.isnan(matrix.sum(axis=0, dtype="f8"))
    if missing.any():
        names = [name for name, is_missing in zip(features, missing) if is_missing]
        raise ValueError("there is no number in {}; build the features again".format(", ".join(names)))
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

    ``edges``: input, or ``score`` → at most BINS - 1 numbers, rising: quantiles of the rows. Bin i has the values from
    edge i - 1 up to but without edge i. ``first_day`` and ``days``: the days of the rows. ``counts``: input, or
    ``score`` → a list for each day of the rows in each bin, each row with the weight of its class; rounded.
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
        place = ((days - first_day) * bins + np.searchsorted(limits, values, side="right")) * 2 + label
        of_class = np.bincount(place, minlength=number_of_days * bins * 2).reshape(number_of_days, bins, 2)
        edges[name] = [float(limit) for limit in limits]
        counts[name] = np.rint(of_class @ np.array(weights)).astype("i8").tolist()
    return {"first_day": first_day, "days": number_of_days, "edges": edges, "counts": counts}


def validate(rows: DataFrame, models: Sequence[tuple[str, tuple[int, int]]], library_name: str | None) -> list[float]:
    """Average precision of each model file on the rows of its window, exact, all scored where they are."""
    from pyspark.sql import functions as F

    models = list(models)
    features = sorted({name for model, _ in models for name in json.loads(model)["features"]})
    keys = blocks.partition_keys(len(models))
    numbers = {int(key): number for number, key in enumerate(keys)}
    layout = (("_score", "f8"), ("_label", "u1"))
    score = _loaded_once([model for model, _ in models], library_name)

    def scored(columns: Columns) -> Columns:
        found = []
        for number, (_, window) in enumerate(models):
            days = columns["_day"]
            inside = (days >= window[0]) & (days <= window[1])
            if inside.any():
                chosen = {name: values[inside] for name, values in columns.items()}
                chosen["_score"] = score(number, chosen)
                found.append((number, blocks.pack(chosen, layout)))
        numbered = [number for number, _ in found]
        return {"partition_key": keys[numbered].astype("i4"), "block": [block for _, block in found]}

    def judge(arrived: Iterable[Any]) -> Iterator[tuple[int, float]]:
        from sklearn.metrics import average_precision_score

        by_model: dict[int, list[bytes]] = {}
        for key, block in arrived:
            by_model.setdefault(numbers[key], []).append(block)
        for number, packed in sorted(by_model.items()):
            columns = blocks.unpack(packed, layout)
            yield number, round(float(average_precision_score(columns["_label"], columns["_score"])), 12)

    first, last = min(window[0] for _, window in models), max(window[1] for _, window in models)
    plain = rows.where(F.col("tx_time_days").between(first, last)).select(
        F.col("tx_time_days").alias("_day"), F.col(LABEL).cast("tinyint").alias("_label"), *input_columns(features)
    )
    shuffled = blocks.exchange(blocks.map_columns(plain, scored, blocks.BLOCK_SCHEMA), len(models))
    answers = dict(shuffled.rdd.mapPartitions(judge).collect())
    return [answers[number] for number in range(len(models))]


def _loaded_once(models: Sequence[str], library_name: str | None) -> Callable[[int, Columns], Array]:
    """A function for tasks: the scores of a model, by its number, from columns of inputs; each is loaded once."""
    scorers: dict[int, Scorer] = {}

    def score(number: int, columns: Columns) -> Array:
        if number not in scorers:
            library.use(library_name)
            scorers[number] = Scorer.from_json(models[number])
        return scorers[number].score(matrix_of(columns, scorers[number].features))

    return score


def with_scores(rows: DataFrame, models: dict[str, str], kept: dict[str, str], library_name: str | None) -> DataFrame:
    """Score rows where they are.

    Args:
        rows: columns that `kept` and the models take; inputs as `input_columns` gives them.
        models: name of a column of scores → model file.
        kept: columns of numbers without NULLs that stay → their type in SQL.
    """
    names = list(models)
    score = _loaded_once(list(models.values()), library_name)

    def scored(columns: Columns) -> Columns:
        found = {name: columns[name] for name in kept}
        found.update((name, score(number, columns)) for number, name in enumerate(names))
        return found

    schema = ", ".join([*(f"{name} {kind}" for name, kind in kept.items()), *(f"{name} double" for name in names)])
    return blocks.map_columns(rows, scored, schema)
