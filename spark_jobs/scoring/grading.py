"""Grades of scores whose labels are known: figures per week and version, of the scores as they were given.

Weeks are seven days, counted from the epoch of the data set. A week can be graded once its last label is known: when
the data reach `delay_days` beyond it. Cards that were known to be compromised are left out as in the held-out figures
(see train_model.without_compromised_cards).
"""

from __future__ import annotations

import json
import logging
from datetime import date, datetime, timedelta, timezone
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, NamedTuple

from spark_jobs import runtime
from spark_jobs.io import blocks
from spark_jobs.schema import NO_KEY

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.io.blocks import Array, Columns

    #: Number of a week, kind of the block, its layout, columns, and mask of the rows.
    _Rows = tuple[int, bytes, blocks.Layout, Columns, Array]

log = logging.getLogger("spark_jobs")

DAYS_PER_WEEK = 7

#: Bootstrap replicates: ten beyond each bound of the intervals.
REPLICATES = 400

#: Scores of a week by partition, and the runs that gave them.
Scores = Dict[str, str]

#: Shuffled columns: scored rows, rows with labels, and known frauds. `_part` is the number of the partition.
SCORED_LAYOUT = (("_part", "i4"), ("transaction_id", "i8"), ("customer_id", "i8"), ("_day", "i4"), ("score", "f8"))
LABEL_LAYOUT = (("_part", "i4"), ("transaction_id", "i8"), ("tx_fraud", "i1"))
FRAUD_LAYOUT = (("customer_id", "i8"), ("_day", "i4"))
SCORED, LABELS, FRAUDS = b"S", b"L", b"F"


#: Fields of a scored partition's report that `grade_weeks` takes.
ENTRY_FIELDS = ("run_id", "model_version", "weeks", "out_of_time_from", "held_out")


class OtherRowsError(ValueError):
    """The scores of a week are of other rows than the cleaned ones."""


class Week(NamedTuple):
    """Rows of one version in a week: the days, and the partitions with the runs that scored them."""

    week: int
    version: int
    first_day: int
    last_day: int
    scores: Scores


def first_day_of(text: str | None, epoch: str) -> int | None:
    """Days from the epoch to a date (both YYYY-MM-DD); None without a date."""
    return None if text is None else (date.fromisoformat(text) - date.fromisoformat(epoch)).days


def live_weeks(rows_per_day: dict[int, int], epoch: str, out_of_time_from: str | None) -> dict[str, int]:
    """Week → rows of it that can be graded as live: from `out_of_time_from` on; none if that is not known."""
    first = first_day_of(out_of_time_from, epoch)
    weeks: dict[str, int] = {}
    for day, rows in sorted(rows_per_day.items()):
        if first is not None and day >= first:
            week = str(day // DAYS_PER_WEEK)
            weeks[week] = weeks.get(week, 0) + rows
    return weeks


def ungraded_weeks(request: dict[str, Any]) -> list[Week]:
    """Weeks of a request (see grade_weeks) whose labels are known, and that have no grade of the present scores."""
    found: dict[tuple[int, int], Scores] = {}
    first_days: dict[tuple[int, int], int] = {}
    for key, entry in request["scored"].items():
        for text in entry["weeks"]:
            group = int(text), int(entry["model_version"])
            found.setdefault(group, {})[key] = entry["run_id"]
            first = first_day_of(entry["out_of_time_from"], request["epoch"])
            first_days[group] = max(group[0] * DAYS_PER_WEEK, first if first is not None else 0)
    graded = {(grade["week"], grade["model_version"]): grade["scores"] for grade in request["grades"]}
    weeks = []
    for (week, version), scores in sorted(found.items()):
        last_day = week * DAYS_PER_WEEK + DAYS_PER_WEEK - 1
        if last_day + request["delay_days"] <= request["last_day"] and graded.get((week, version)) != scores:
            weeks.append(Week(week, version, first_days[week, version], last_day, scores))
    return weeks


def grade_weeks(spark: SparkSession, request: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Grade the ungraded weeks of all scored partitions; returns the grades, and why a week has none.

    Request:
        epoch: first day of the data set.
        scored: key → ``uri`` (of the scored rows), ``run_id`` (that scored it), ``model_version``, ``weeks`` (see
            live_weeks), ``out_of_time_from``, ``held_out``.
        cleaned: key → ``uri``, ``first_day``, ``last_day`` (from the epoch), with the labels.
        grades: those that there are: ``week``, ``model_version``, ``scores``.
        last_day: last full day of the data.
        delay_days, compromised_lookback_days, alerts_per_day: as in training.

    A grade has ``week``, ``model_version``, ``first_date``, ``last_date``, ``scores`` (partition → run that scored it),
    ``graded_at``, ``held_out`` and ``alerts_per_day``; ``rows``, ``frauds``, ``removed_rows`` and ``removed_frauds``
    (of compromised cards); ``average_precision``, ``roc_auc``, ``precision_at_budget``, ``recall_at_budget`` and
    ``calibration`` (frauds over the sum of the scores), each with ``…_lower`` and ``…_upper``, and
    ``card_precision_at_100``. Figures that are not defined are null.
    """
    weeks = ungraded_weeks(request)
    if not weeks:
        return [], None
    log.info("grading %d weeks whose labels are known by now", len(weeks))
    grades, problems = [], []
    for week, figures in _figures(spark, request, weeks):
        first, last = (_date(day, request["epoch"]) for day in (week.first_day, week.last_day))
        if "problem" in figures:
            problem = "version {}, {} to {} in {}: {}".format(
                week.version, first, last, ", ".join(sorted(week.scores)), figures["problem"]
            )
            log.error("not graded: %s", problem)
            problems.append(problem)
            continue
        grade = {
            "week": week.week,
            "model_version": week.version,
            "first_date": first,
            "last_date": last,
            "scores": week.scores,
            "graded_at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "held_out": request["scored"][min(week.scores)]["held_out"],
            "alerts_per_day": request["alerts_per_day"],
            **figures,
        }
        log.info("version %d, %s to %s: %s", week.version, first, last, _text(grade))
        grades.append(grade)
    return grades, problems[0] if problems else None


def _text(grade: dict[str, Any]) -> str:
    precision = grade["average_precision"]
    shown = "not defined" if precision is None else f"{precision:.3f}"
    return "average precision {}, {:,} rows, {:,} frauds".format(shown, grade["rows"], grade["frauds"])


def _date(day: int, epoch: str) -> str:
    return (date.fromisoformat(epoch) + timedelta(days=day)).isoformat()


def _figures(spark: SparkSession, request: dict[str, Any], weeks: list[Week]) -> list[tuple[Week, dict[str, Any]]]:
    """The weeks with their figures, each computed by one task, or with the ``problem`` of this week alone."""
    delay = request["delay_days"]
    known = [
        (week.first_day - delay - request["compromised_lookback_days"], week.last_day - delay - 1) for week in weeks
    ]
    first, last = min(span[0] for span in known), max(week.last_day for week in weeks)
    parts = [
        key
        for key, part in sorted(request["cleaned"].items())
        if part["first_day"] <= last and part["last_day"] >= first
    ]
    numbers = {key: number for number, key in enumerate(parts)}
    keys = blocks.partition_keys(len(weeks))
    week_of = {int(key): number for number, key in enumerate(keys)}
    members = [[numbers[key] for key in week.scores if key in numbers] for week in weeks]

    def split_scores(columns: Columns) -> Columns:
        found: list[_Rows] = [
            (number, SCORED, SCORED_LAYOUT, columns, _in_week(columns, week, members[number]))
            for number, week in enumerate(weeks)
        ]
        return _blocks_of_weeks(keys, found)

    def split_labels(columns: Columns) -> Columns:
        frauds = (columns["tx_fraud"] == 1) & (columns["customer_id"] != NO_KEY)
        found: list[_Rows] = []
        for number, (begin, end) in enumerate(known):
            found.append((number, LABELS, LABEL_LAYOUT, columns, _in_week(columns, weeks[number], members[number])))
            is_known = frauds & (columns["_day"] >= begin) & (columns["_day"] <= end)
            found.append((number, FRAUDS, FRAUD_LAYOUT, columns, is_known))
        return _blocks_of_weeks(keys, found)

    def grade(key_blocks: Iterable[Any]) -> Iterator[tuple[int, str]]:
        by_week: dict[int, list[bytes]] = {}
        for key, block in key_blocks:
            by_week.setdefault(week_of[key], []).append(bytes(block))
        for number, packed in sorted(by_week.items()):
            try:
                figures = _grade(packed, delay, request["alerts_per_day"])
            except OtherRowsError as error:
                figures = {"problem": str(error)}
            yield number, json.dumps(figures)

    used = {key for week in weeks for key in week.scores}
    scored = _read(
        spark, {numbers[key]: request["scored"][key]["uri"] for key in used if key in numbers}, first, last, request
    )
    labelled = _read(spark, {numbers[key]: request["cleaned"][key]["uri"] for key in parts}, first, last, request)
    frame = blocks.map_columns(scored.select(*[name for name, _ in SCORED_LAYOUT]), split_scores, blocks.BLOCK_SCHEMA)
    names = ["_part", "_day", "transaction_id", "customer_id", "tx_fraud"]
    frame = frame.union(blocks.map_columns(labelled.select(*names), split_labels, blocks.BLOCK_SCHEMA))
    results = dict(blocks.exchange(frame, len(weeks)).rdd.mapPartitions(grade).collect())
    return [(week, json.loads(results[number])) for number, week in enumerate(weeks) if number in results]


def _read(
    spark: SparkSession, uris: dict[int, str], first_day: int, last_day: int, request: dict[str, Any]
) -> DataFrame:
    """Rows of these days, with `_part` and `_day`; keys are NO_KEY where unknown."""
    from pyspark.sql import functions as F

    epoch = date.fromisoformat(request["epoch"])
    zero = (epoch - date(1970, 1, 1)).days
    frames = []
    for number, uri in uris.items():
        frame = runtime.read_parquet(spark, uri)
        begin, end = ((epoch + timedelta(days=day)).isoformat() for day in (first_day, last_day + 1))
        frame = frame.where(
            (F.col("tx_datetime") >= F.lit(begin).cast("timestamp"))
            & (F.col("tx_datetime") < F.lit(end).cast("timestamp"))
        )
        frames.append(
            frame.withColumn("_part", F.lit(number))
            .withColumn("_day", F.expr(f"CAST(floor(CAST(tx_datetime AS BIGINT) / 86400) - {zero} AS INT)"))
            .withColumn("customer_id", F.coalesce(F.col("customer_id"), F.lit(NO_KEY).cast("bigint")))
        )
    result = frames[0]
    for frame in frames[1:]:
        result = result.union(frame)
    return result


def _in_week(columns: Columns, week: Week, parts: list[int]) -> Array:
    import numpy as np

    days = columns["_day"]
    mask: Array = (days >= week.first_day) & (days <= week.last_day) & np.isin(columns["_part"], parts)
    return mask


def _blocks_of_weeks(keys: Array, found: Iterable[_Rows]) -> Columns:
    """Blocks of the rows in each mask, for the task of their week."""
    numbers, packed = [], []
    for number, kind, layout, columns, mask in found:
        if mask.any():
            numbers.append(number)
            packed.append(kind + blocks.pack({name: columns[name][mask] for name, _ in layout}, layout))
    return {"partition_key": keys[numbers].astype("i4"), "block": packed}


def _grade(packed: list[bytes], delay_days: int, alerts_per_day: int) -> dict[str, Any]:
    """Figures of the rows in blocks of all three kinds. Raises OtherRowsError."""
    import numpy as np
    import pandas as pd

    from spark_jobs.evaluation.bootstrap import bootstrap_figures, customer_clusters, customer_codes
    from spark_jobs.evaluation.metrics import evaluate, share_of, with_ranks

    scored, labels, frauds = (
        blocks.unpack(blocks.of_kind(packed, kind), layout)
        for kind, layout in ((SCORED, SCORED_LAYOUT), (LABELS, LABEL_LAYOUT), (FRAUDS, FRAUD_LAYOUT))
    )
    packed.clear()
    scored, labels = _sorted(scored), _sorted(labels)
    if not (
        np.array_equal(scored["_part"], labels["_part"])
        and np.array_equal(scored["transaction_id"], labels["transaction_id"])
    ):
        raise OtherRowsError("the scored rows are not those of the cleaned partitions: score them again")
    customer = np.where(scored["customer_id"] == NO_KEY, np.nan, scored["customer_id"].astype("f8"))
    rows = pd.DataFrame(
        {
            "transaction_id": scored["transaction_id"],
            "day": scored["_day"],
            "customer_id": customer,
            "tx_fraud": labels["tx_fraud"].astype("i8"),
            "score": scored["score"],
        }
    )
    compromised = pd.DataFrame({"customer_id": frauds["customer_id"].astype("f8"), "known": frauds["_day"]})
    since = rows["customer_id"].map(compromised.groupby("customer_id")["known"].min())
    kept = rows[~(since <= rows["day"] - delay_days - 1)].reset_index(drop=True)
    ranked = with_ranks(kept)
    is_alert, is_fraud = ranked["rank"] <= alerts_per_day, ranked["tx_fraud"]
    figures = evaluate(kept, "score", alerts_per_day)
    for name, whole in (("precision_at_budget", is_alert), ("recall_at_budget", is_fraud)):
        share = share_of(name, ranked, is_alert * is_fraud, whole)
        figures.update((each, value) for each, value in share.items() if each != name)
    both_classes = 0 < figures["frauds"] < figures["rows"]
    label, score = kept["tx_fraud"].to_numpy(), kept["score"].to_numpy()
    bounds: dict[str, Any] = {}
    if both_classes:
        clusters = customer_clusters(label, [score], kept["customer_id"].to_numpy())
        bounds = bootstrap_figures(label, [score], clusters, replicates=REPLICATES)
    for name in ("average_precision", "roc_auc"):
        for end in ("lower", "upper"):
            figures[f"{name}_{end}"] = bounds.get(f"{name}_{end}")
    figures.update(_calibration(label, score, customer_codes(kept["customer_id"].to_numpy())))
    removed = rows["tx_fraud"].sum() - label.sum()
    return {**figures, "removed_rows": len(rows) - len(kept), "removed_frauds": int(removed)}


def _sorted(columns: Columns) -> Columns:
    import numpy as np

    order = np.lexsort((columns["transaction_id"], columns["_part"]))
    return {name: values[order] for name, values in columns.items()}


def _calibration(label: Array, score: Array, customers: Array) -> dict[str, float | None]:
    """Frauds over the sum of the scores, with its 95% interval.

    A ratio of sums over independent customers; its variance is linearized (Cochran, Sampling Techniques, 1977, chapter
    6), and the interval is symmetric on the logarithm, since the ratio is positive.
    """
    import numpy as np

    from spark_jobs.evaluation.metrics import CONFIDENCE

    names = ("calibration", "calibration_lower", "calibration_upper")
    expected = float(score.sum())
    if expected <= 0 or not label.any():
        return {**dict.fromkeys(names), "calibration": 0.0 if expected > 0 else None}
    ratio = float(label.sum()) / expected
    residuals = np.bincount(customers, label) - ratio * np.bincount(customers, score)
    number = len(residuals)
    deviation = float(np.sqrt((residuals**2).sum() * number / max(1, number - 1))) / float(label.sum())
    factor = float(np.exp(NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * deviation))
    return dict(zip(names, (ratio, ratio / factor, ratio * factor)))


def entry_of(uri: str, report: dict[str, Any]) -> dict[str, Any]:
    """A scored partition, by its report, as `grade_weeks` takes it."""
    return {"uri": uri, **{name: report[name] for name in ENTRY_FIELDS}}
