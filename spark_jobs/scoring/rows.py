"""The score of each row of a features partition, its rank of the day and the alerts, in Spark tasks.

A task reads a whole Parquet file of features with pyarrow, because passing its rows through the JVM would take longer
than scoring them. Scored rows are shuffled by day, ranked and written. The inputs of the highest scores of each day
travel along, so that the tasks that know the alerts can explain them.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Iterator, NamedTuple

from spark_jobs import runtime
from spark_jobs.features.registry import in_words
from spark_jobs.io import blocks, parquet_files
from spark_jobs.schema import NO_KEY, REASONS, SCORED_COLUMNS
from spark_jobs.scoring.drift import SCORE, bin_counts
from spark_jobs.training import fits, library
from spark_jobs.training.learners import Scorer, matrix_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.io.blocks import Array, Columns

#: Shuffled columns of a scored row; `_day` counts from the epoch of the data set.
ROW_LAYOUT = (
    ("transaction_id", "i8"),
    ("tx_unix_seconds", "i8"),
    ("customer_id", "i8"),
    ("terminal_id", "i8"),
    ("tx_amount", "f8"),
    ("score", "f8"),
    ("_day", "i4"),
)

#: Rows of a file that are decoded and scored at a time: 35 MB of inputs.
ROWS_PER_BATCH = 250_000

#: Rows whose inputs and scores are binned for the drift checks; evenly spaced in time if a partition has more.
BINNED_ROWS = 500_000

#: Name of the counts of labels.
LABELS = ""

#: First byte of a block: scored rows, or inputs of possible alerts.
ROWS, CANDIDATES = b"R", b"C"


class Scoring(NamedTuple):
    """What the tasks need to score a partition.

    Attributes:
        model: model file.
        features: its inputs.
        version: its version.
        alerts_per_day: rows of a day that are alerts.
        first_days: first day of each task, ascending, but for the first task.
        edges: input or ``score`` → edges of the bins to count (see `drift`).
        step: every `step`-th row of a file is counted in bins.
    """

    model: str
    features: list[str]
    version: int
    alerts_per_day: int
    first_days: list[int]
    edges: dict[str, list[float]]
    step: int


def scored_files(
    spark: SparkSession,
    features_uri: str,
    scoring: Scoring,
    library_name: str | None,
    report_bins: Callable[[list[Any]], None],
    report_tally: Callable[[list[Any]], None],
) -> DataFrame:
    """Parquet files (see parquet_files) of the scored rows of a features partition, sorted by instant and id.

    To be written within `one_file_per_task`. Each task that writes files has a tally: ``rows``, ``rows_per_day`` (day →
    rows), ``score_sum`` and ``alerts`` (a list of dicts with the columns of ALERT_COLUMNS; instants are Unix seconds,
    keys NO_KEY if unknown). Each task that reads files reports what it counts of them (see `_count`).
    """
    options = parquet_files.options(spark, ["model_version"])
    keys = blocks.partition_keys(len(scoring.first_days) + 1)
    features = scoring.features
    candidate_layout = (("transaction_id", "i8"), *[(name, "f4") for name in features])

    def score_files(files: list[bytes]) -> Iterator[Columns]:
        library.use(library_name)
        scorer = Scorer.from_json(scoring.model)
        while files:
            content = files.pop(0)
            bins: dict[int, dict[str, Any]] = {}
            for columns, matrix in _batches(content, features):
                columns["score"] = fits.checked_scores(scorer, matrix)
                _count(bins, columns, matrix, features, scoring.edges, scoring.step)
                yield from _packed(columns, matrix, scoring, keys, candidate_layout)
            report_bins([bins])

    def finish(packed: list[bytes]) -> Iterator[Columns]:
        columns = _ranked(blocks.unpack(blocks.of_kind(packed, ROWS), ROW_LAYOUT), scoring)
        candidates = blocks.unpack(blocks.of_kind(packed, CANDIDATES), candidate_layout)
        packed.clear()
        days = columns["_day"]
        rows_per_day = {int(days[begin]): end - begin for begin, end in _spans(days)}
        alerts: list[dict[str, Any]] = []
        if columns["alert"].any():
            library.use(library_name)
            alerts = _explained(columns, candidates, Scorer.from_json(scoring.model))
        report_tally(
            [
                {
                    "rows": len(columns["score"]),
                    "rows_per_day": rows_per_day,
                    "score_sum": float(columns["score"].sum()),
                    "alerts": alerts,
                }
            ]
        )
        return parquet_files.files_of(columns, SCORED_COLUMNS, options)

    contents = _file_contents(spark, features_uri)
    shuffled = blocks.exchange(blocks.map_blocks(contents, score_files, blocks.BLOCK_SCHEMA), len(keys))
    return blocks.map_blocks(shuffled, finish, parquet_files.FILE_SCHEMA)


@contextmanager
def one_file_per_task(spark: SparkSession) -> Iterator[None]:
    """Within it, Spark plans one task for each file that `scored_files` reads."""
    name = "spark.sql.files.maxPartitionBytes"
    spark.conf.set(name, "1")
    try:
        yield
    finally:
        spark.conf.set(name, runtime.SESSION_SETTINGS[name])


def _file_contents(spark: SparkSession, uri: str) -> DataFrame:
    """The Parquet files of a directory as rows of BLOCK_SCHEMA."""
    files = spark.read.format("binaryFile").option("pathGlobFilter", "*.parquet").load(runtime.literal_path(uri))
    return files.selectExpr("0 AS partition_key", "content AS block")


def _batches(content: bytes, features: list[str]) -> Iterator[tuple[Columns, Array]]:
    """Some rows of a Parquet file at a time: columns (of ROW_LAYOUT without the score, and the label), and inputs."""
    import numpy as np
    import pyarrow
    from pyarrow import parquet

    file = parquet.ParquetFile(pyarrow.BufferReader(content))
    kept = ["transaction_id", "tx_datetime", "customer_id", "terminal_id", "tx_amount", "tx_time_days", "tx_fraud"]
    names = [*kept, *[name for name in features if name not in kept]]
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=names, use_threads=False)
        for begin in range(0, table.num_rows, ROWS_PER_BATCH):
            batch = table.slice(begin, ROWS_PER_BATCH)
            columns: Columns = {
                "transaction_id": _numbers(batch, "transaction_id"),
                "tx_unix_seconds": _numbers(batch, "tx_datetime") // 1_000_000,
                "customer_id": _numbers(batch, "customer_id", NO_KEY),
                "terminal_id": _numbers(batch, "terminal_id", NO_KEY),
                "tx_amount": _numbers(batch, "tx_amount"),
                "_day": _numbers(batch, "tx_time_days").astype("i4"),
                "_fraud": _numbers(batch, "tx_fraud"),
            }
            yield columns, matrix_of({name: _numbers(batch, name, np.nan) for name in features}, features)


def _numbers(batch: Any, name: str, null: Any = None) -> Array:
    """A numeric column of an Arrow table, instants as microseconds; `null` stands for NULL."""
    import numpy as np

    parts = []
    for chunk in batch.column(name).chunks:
        validity, content = chunk.buffers()
        kind = {"float": "f4", "double": "f8", "int32": "i4"}.get(str(chunk.type), "i8")
        end = chunk.offset + len(chunk)
        values = np.frombuffer(content or b"", dtype=kind)[chunk.offset : end]
        if chunk.null_count:
            if null is None:
                raise ValueError(f"{name} is NULL in some rows")
            valid = np.unpackbits(np.frombuffer(validity, "u1"), bitorder="little")[chunk.offset : end]
            values = np.where(valid == 1, values, null)
        parts.append(values)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _packed(
    columns: Columns, matrix: Array, scoring: Scoring, keys: Array, candidate_layout: blocks.Layout
) -> Iterator[Columns]:
    """Blocks of scored rows, and of the inputs of those that may be alerts, for the tasks of their days."""
    import numpy as np

    task = np.atleast_1d(np.searchsorted(np.array(scoring.first_days, "i4"), columns["_day"], side="right"))
    chosen = _highest_of_days(columns, scoring.alerts_per_day)
    candidates = {"transaction_id": columns["transaction_id"][chosen]}
    candidates.update((name, matrix[chosen, number]) for number, (name, _) in enumerate(candidate_layout[1:]))
    for kind, layout, part, tasks in (
        (ROWS, ROW_LAYOUT, columns, task),
        (CANDIDATES, candidate_layout, candidates, task[chosen]),
    ):
        block = blocks.split(part, layout, tasks, keys)
        yield {"partition_key": block["partition_key"], "block": [kind + packed for packed in block["block"]]}


def _highest_of_days(columns: Columns, number: int) -> Array:
    """Rows with one of the `number` highest scores of their day in this batch, and those with equal scores."""
    import numpy as np

    score, days = columns["score"], columns["_day"]
    order = np.argsort(days, kind="stable")  # the rows are usually sorted by time, which costs next to nothing
    chosen = []
    for begin, end in _spans(days[order]):
        rows = order[begin:end]
        if len(rows) > number:
            lowest = np.partition(score[rows], len(rows) - number)[len(rows) - number]
            rows = rows[score[rows] >= lowest]
        chosen.append(rows)
    return np.concatenate(chosen) if chosen else order


def _ranked(columns: Columns, scoring: Scoring) -> Columns:
    """The rows sorted by instant and id, with rank_of_day, alert and model_version."""
    import numpy as np

    order = _order_by(columns["tx_unix_seconds"], columns["transaction_id"])
    columns = {name: values[order] for name, values in columns.items()}
    rank = np.empty(len(order), "i4")
    # Sorted by time, the rows of a day are together.
    for begin, end in _spans(columns["_day"]):
        by_id = np.argsort(columns["transaction_id"][begin:end], kind="stable")
        by_score = by_id[np.argsort(-columns["score"][begin:end][by_id], kind="stable")]
        rank[begin + by_score] = np.arange(1, end - begin + 1)
    return {
        **columns,
        "tx_datetime": columns["tx_unix_seconds"],
        "rank_of_day": rank,
        "alert": rank <= scoring.alerts_per_day,
        "model_version": np.full(len(order), scoring.version, "i4"),
    }


def _order_by(first: Array, second: Array) -> Array:
    """Order of integers by `first`, then by `second`; fast where they are a few sorted runs, one after another."""
    import numpy as np

    if not len(first):
        return np.arange(0)
    spans = [int(values.max()) - int(values.min()) + 1 for values in (first, second)]
    if spans[0] * spans[1] >= 1 << 63:
        return np.lexsort((second, first))
    # One number for both, because numpy's stable sort merges runs, and lexsort has to sort twice.
    return np.argsort((first - first.min()) * spans[1] + (second - second.min()), kind="stable")


def _spans(values: Array) -> list[tuple[int, int]]:
    """(begin, end) of each run of equal values."""
    import numpy as np

    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return list(zip(bounds[:-1], bounds[1:])) if len(values) else []


def _explained(columns: Columns, candidates: Columns, scorer: Scorer) -> list[dict[str, Any]]:
    """The alerts with their reasons, by day and rank."""
    import numpy as np

    rows = np.flatnonzero(columns["alert"])
    rows = rows[np.lexsort((columns["rank_of_day"][rows], columns["_day"][rows]))]
    order = np.argsort(candidates["transaction_id"], kind="stable")
    place = order[np.searchsorted(candidates["transaction_id"][order], columns["transaction_id"][rows])]
    matrix = matrix_of({name: candidates[name][place] for name in scorer.features}, scorer.features)
    names, contributions = scorer.reasons(matrix, REASONS)
    alerts = []
    for number, row in enumerate(rows):
        alert = {name: columns[name][row].item() for name, *_ in SCORED_COLUMNS}
        for reason in range(REASONS):
            # A model may have fewer inputs.
            name = names[number][reason] if reason < len(names[number]) else None
            words, contribution = None, None
            if name is not None:
                words = in_words(name, float(matrix[number, scorer.features.index(name)]))
                contribution = float(contributions[number, reason])
            alert[f"reason_{reason + 1}"], alert[f"contribution_{reason + 1}"] = words, contribution
        alerts.append(alert)
    return alerts


def _count(
    found: dict[int, dict[str, Any]],
    columns: Columns,
    matrix: Array,
    features: list[str],
    edges: dict[str, list[float]],
    step: int,
) -> None:
    """Add the rows of a batch to the counts: day → LABELS → [genuine rows, frauds], and name → rows in each bin."""
    import numpy as np

    def add(day: int, name: str, counts: list[int]) -> None:
        of_day = found.setdefault(day, {})
        of_day[name] = [a + b for a, b in zip(of_day.get(name, [0] * len(counts)), counts)]

    for day, number in zip(*np.unique(columns["_day"], return_counts=True)):
        frauds = int(columns["_fraud"][columns["_day"] == day].sum())
        add(int(day), LABELS, [int(number) - frauds, frauds])
    days = columns["_day"][::step]
    binned = {name: matrix[::step, number] for number, name in enumerate(features) if name in edges}
    binned[SCORE] = columns["score"][::step]
    for day in np.unique(days):
        of_day = days == day
        counted = {name: limits for name, limits in edges.items() if name in binned}
        for name, counts in bin_counts({name: values[of_day] for name, values in binned.items()}, counted).items():
            add(int(day), name, counts)
