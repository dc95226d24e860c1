"""Verdicts on cleaned files: which ones get features and train models, as a pure function of reports and limits.

A file is stopped by its own figures, or because it shares days or ids with another file. A file stopped by its own
figures cannot stop another file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from ml_platform.lake.reports import CleanedReport, CleanedReports, FeaturesReport, FeaturesReports, SharedIds
from spark_jobs.schema import REJECT_RULES


class QualityLimits(dg.ConfigurableResource):
    """Thresholds of the data quality checks."""

    max_reject_rate: float = Field(
        default=0.02, ge=0, le=1, description="Largest share of raw rows that may be rejected."
    )
    min_fraud_rate: float = Field(default=0.0005, ge=0, le=1, description="Smallest plausible share of frauds.")
    max_fraud_rate: float = Field(default=0.25, ge=0, le=1, description="Largest plausible share of frauds.")
    min_rows_to_judge: int = Field(
        default=10_000,
        ge=1,
        description="A file with fewer clean rows gets no fraud rate check: the rate would be mostly noise.",
    )
    max_days_per_file: int = Field(default=100, ge=1, description="Longest time span that one file may cover.")
    max_overlap_days: int = Field(default=1, ge=0, description="Days that the time ranges of two files may share.")
    max_days_before_name: int = Field(
        default=1, ge=0, description="Days by which the first transaction may precede the date in the file's name."
    )
    max_unknown_ids: float = Field(
        default=0.05, ge=0, le=1, description="Largest share of clean rows without a customer, or without a terminal."
    )
    out_of_range: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Reject rows whose day or id lies farther outside the file's 0.1 to 99.9 percentile range than "
        "this multiple of the range's width. Unset: off.",
    )


def row_count_mismatch(report: CleanedReport) -> str | None:
    """Every raw row must be a clean, duplicate or rejected row."""
    counts = report.counts
    total = counts.clean_rows + counts.duplicate_rows + counts.rejected_rows
    if counts.raw_rows == total:
        return None
    return f"{counts.raw_rows} raw rows, but {total} clean, duplicate and rejected rows"


def reject_rate_of(report: CleanedReport) -> float:
    """Share of the raw rows that are rejected."""
    return report.counts.rejected_rows / max(1, report.counts.raw_rows)


def fraud_rate_of(report: CleanedReport) -> float:
    """Share of the clean rows that are frauds."""
    return report.counts.fraud_rows / max(1, report.counts.clean_rows)


def high_reject_rate(report: CleanedReport, limits: QualityLimits) -> str | None:
    """The share of rejected rows must be small."""
    rate = reject_rate_of(report)
    if rate <= limits.max_reject_rate:
        return None
    text = f"{rate:.2%} of {report.counts.raw_rows} rows are rejected, more than {limits.max_reject_rate:.2%}"
    reasons = [f"{rows} {rule}{_sample(report, rule)}" for rule, rows in commonest_reasons(report)]
    return f"{text}: {', '.join(reasons)}" if reasons else text


def commonest_reasons(report: CleanedReport) -> list[tuple[str, int]]:
    """The three rules that rejected most rows of a file, with their numbers of rows."""
    counts = report.counts.model_dump()
    rules = sorted(((rule, counts.get(rule, 0)) for rule in REJECT_RULES), key=lambda item: -item[1])
    return [(rule, rows) for rule, rows in rules[:3] if rows]


def _sample(report: CleanedReport, rule: str) -> str:
    line = report.reject_samples.get(rule)
    return f" (like {line!r})" if line is not None else ""


def implausible_fraud_rate(report: CleanedReport, limits: QualityLimits) -> str | None:
    """The fraud rate must be plausible, if there are enough rows to estimate it."""
    if report.counts.clean_rows < limits.min_rows_to_judge:
        return None
    rate = fraud_rate_of(report)
    if limits.min_fraud_rate <= rate <= limits.max_fraud_rate:
        return None
    return f"{rate:.3%} of the rows are frauds, not between {limits.min_fraud_rate:.3%} and {limits.max_fraud_rate:.3%}"


def many_unknown_ids(report: CleanedReport, limits: QualityLimits) -> str | None:
    """Nearly all rows must have a customer, and nearly all a terminal."""
    rows = max(1, report.counts.clean_rows)
    problems = [
        f"{unknown / rows:.2%} of the clean rows have no {name}"
        for name, unknown in (
            ("customer", report.counts.unknown_customer),
            ("terminal", report.counts.unknown_terminal),
        )
        if unknown / rows > limits.max_unknown_ids
    ]
    return f"{' and '.join(problems)}, more than {limits.max_unknown_ids:.2%}" if problems else None


def implausible_time_range(report: CleanedReport, limits: QualityLimits) -> str | None:
    """A file must span a plausible period that matches the date in its name, if any."""
    times = report.tx_datetime
    if times is None:
        return None
    first, last = times.min, times.max
    if last - first > timedelta(days=limits.max_days_per_file):
        return (
            f"it spans {(last - first).days} days, from {first} to {last}, more than {limits.max_days_per_file}"
            f"{_odd_rows(report)}"
        )
    named_date = _date_of(report.partition)
    earliest, latest = -timedelta(days=limits.max_days_before_name), timedelta(days=limits.max_days_per_file)
    if named_date and not earliest <= first - named_date <= latest:
        return f"its first transaction, at {first}, does not match the date in its name{_odd_rows(report)}"
    return None


def _odd_rows(report: CleanedReport) -> str:
    """The rows that are not of the file's usual days, as the end of a message."""
    odd = report.odd_rows
    if not odd.rows or len(odd.usual_days) != 2:
        return ""
    first, last = (day.date() for day in odd.usual_days)
    examples = ", ".join(f"id {row.transaction_id} at {row.tx_datetime}" for row in odd.examples)
    return f"; {odd.rows} rows are far from {first} to {last}: {examples}"


def problem_of_features(report: CleanedReport, features: FeaturesReport) -> str | None:
    """Every clean row must have features, none of them NULL, NaN or infinite."""
    if features.counts.rows != report.counts.clean_rows:
        return f"{features.counts.rows} feature rows for {report.counts.clean_rows} clean rows"
    return f"{features.counts.unusable_rows} rows have unusable features" if features.counts.unusable_rows else None


def _date_of(key: str) -> datetime | None:
    try:
        return datetime.strptime(key, "%Y-%m-%d") if len(key) == len("2019-08-22") else None
    except ValueError:
        return None


#: A file that shares days with another one wins if it is this many times denser there: the other has only odd rows.
MANY_TIMES = 5

#: How to go on with a stopped file.
ADVICE = (
    "Correct the file, or change a limit (out_of_range rejects only the odd rows), or take the file as it is: "
    "materialize transaction_features with accept: true"
)

#: Checks of a file by itself. `time_range` and `unique_ids` also compare files.
OWN_CHECKS: Mapping[str, Callable[[CleanedReport, QualityLimits], str | None]] = {
    "rows_add_up": lambda report, limits: row_count_mismatch(report),
    "reject_rate": high_reject_rate,
    "fraud_rate": implausible_fraud_rate,
    "known_ids": many_unknown_ids,
    "time_range": implausible_time_range,
}
CHECK_NAMES = (*OWN_CHECKS, "unique_ids")

#: Check → problem, for one file.
Problems = dict[str, str]


@dataclass(frozen=True)
class Verdicts:
    """The stopped files with the checks that stop them, and warnings about files that are not stopped for these.

    Attributes:
        uncompared: files whose ids overlap another one's and are not compared with them, or could not be: cleaning the
            files does that.
    """

    problems: dict[str, Problems]
    warnings: dict[str, Problems] = field(default_factory=dict)
    uncompared: set[str] = field(default_factory=set)

    @property
    def duplicates(self) -> set[str]:
        """Files stopped by `unique_ids`, whose rows are nobody's history."""
        return {key for key, problems in self.problems.items() if "unique_ids" in problems}

    def without(self, keys: Iterable[str]) -> Verdicts:
        """The same verdicts, but for `keys`, which are taken as they are."""
        return replace(self, problems={key: found for key, found in self.problems.items() if key not in set(keys)})

    def reason(self, key: str) -> str | None:
        """Why a file is stopped, in one line; None if it is not."""
        return "; ".join(f"{check}: {text}" for check, text in self.problems.get(key, {}).items()) or None

    def stopped(self, keys: Iterable[str]) -> dict[str, str]:
        """The stopped ones among `keys`, each with its reason."""
        return {key: reason for key in keys if (reason := self.reason(key))}


def judge_files(cleaned: CleanedReports, features: FeaturesReports, limits: QualityLimits) -> Verdicts:
    """Decide which files are stopped.

    A file that was accepted is not stopped by its own figures. Of files that only accuse each other, those with
    features of their present rows stand, then those with features of older rows, then those with the fewest conflicts,
    then those that have more than odd rows on the days that they share; equals are all stopped.
    """
    problems: dict[str, Problems] = {}
    for key, report in cleaned.items():
        own = own_problems(report, limits)
        if own and not report.accepted:
            problems[key] = own
    accusers = {key: report for key, report in cleaned.items() if key not in problems}
    conflicts: dict[str, dict[str, Problems]] = defaultdict(dict)  # key → other key → problems
    warnings: dict[str, Problems] = {}
    uncompared = set()
    for one, other, days in _pairs_that_share_days(accusers, limits):
        for key, culprit in ((one, other), (other, one)):
            text = f"it shares {days} days with {culprit}{_odd_rows(accusers[key])}"
            conflicts[key].setdefault(culprit, {})["time_range"] = text
    for one, other, bulks_overlap in _pairs_with_overlapping_ids(accusers):
        comparison = _comparison_of(accusers[one], accusers[other])
        if bulks_overlap and (comparison is None or comparison.rows is None):
            uncompared.add(max(one, other))
        is_problem = bulks_overlap and not (comparison and comparison.rows == 0)
        if is_problem or bulks_overlap or (comparison and comparison.rows):
            for key, culprit in ((one, other), (other, one)):
                text = _overlap_text(culprit, comparison)
                place = conflicts[key].setdefault(culprit, {}) if is_problem else warnings.setdefault(key, {})
                place["unique_ids"] = text
    ranks = _ranks(cleaned, features)
    for key, others in conflicts.items():
        if any(_gives_way(accusers[key], accusers[other], conflicts, ranks) for other in others):
            for found in others.values():
                problems[key] = {**found, **problems.get(key, {})}
    return Verdicts(problems, warnings, uncompared)


def _overlap_text(culprit: str, comparison: SharedIds | None) -> str:
    if comparison is None or comparison.rows is None:
        return (
            f"its ids overlap those of {culprit}, and {'were not' if comparison is None else 'could not be'} compared"
        )
    if comparison.rows:
        examples = f": {', '.join(map(str, comparison.examples))}" if comparison.examples else ""
        return f"{comparison.rows} of its ids are also in {culprit}{examples}"
    return f"its ids overlap those of {culprit}, but none is in both"


def _ranks(cleaned: CleanedReports, features: FeaturesReports) -> dict[str, int]:
    """2 for files with features of their present rows, 1 for those with features of older rows."""
    return {
        key: 2 if report.inputs.cleaned == cleaned[key].version else 1
        for key, report in features.items()
        if key in cleaned
    }


def _gives_way(
    report: CleanedReport,
    other: CleanedReport,
    conflicts: Mapping[str, Mapping[str, Problems]],
    ranks: Mapping[str, int],
) -> bool:
    """True if the first of two files in conflict is stopped. Counted are all conflicts, so that verdicts are stable."""
    own, its = ranks.get(report.partition, 0), ranks.get(other.partition, 0)
    if own != its:
        return own < its
    own, its = len(conflicts[report.partition]), len(conflicts[other.partition])
    if ranks.get(report.partition) == 2 or own != its:
        # Two files with features were both taken before, under other limits.
        return ranks.get(report.partition) != 2 and own > its
    return _density(report, other) < MANY_TIMES * _density(other, report)


def _density(report: CleanedReport, other: CleanedReport) -> float:
    """Rows per day of a file on the usual days that it shares with another one, compared with all its usual days."""
    own, its = report.tx_datetime, other.tx_datetime
    if own is None or its is None:
        return 1.0
    first, last = max(own.p0_1, its.p0_1), min(own.p99_9, its.p99_9)
    rows = sum(report.rows_per_day.values())
    shared = sum(count for day, count in report.rows_per_day.items() if first <= day <= last)
    days, shared_days = (own.p99_9 - own.p0_1).days + 1, (last - first).days + 1
    return (shared / shared_days) / (rows / days) if rows and shared_days > 0 else 1.0


def own_problems(report: CleanedReport, limits: QualityLimits) -> Problems:
    """Problems of a file by its own figures."""
    return {name: text for name, check in OWN_CHECKS.items() if (text := check(report, limits))}


def _pairs_that_share_days(cleaned: CleanedReports, limits: QualityLimits) -> Iterator[tuple[str, str, int]]:
    """Pairs of files that have too many usual days in common, and how many."""
    ranges = {key: (times.p0_1, times.p99_9) for key, report in cleaned.items() if (times := report.tx_datetime)}
    for one, other in _overlapping_pairs(ranges):
        days = (min(ranges[one][1], ranges[other][1]) - max(ranges[one][0], ranges[other][0])).days + 1
        if days > limits.max_overlap_days:
            yield one, other, days


def _pairs_with_overlapping_ids(cleaned: CleanedReports) -> Iterator[tuple[str, str, bool]]:
    """Pairs of files whose ids overlap, and whether their usual ids do."""
    ids = {key: report.transaction_id for key, report in cleaned.items() if report.transaction_id is not None}
    for one, other in _overlapping_pairs({key: (found.min, found.max) for key, found in ids.items()}):
        yield one, other, ids[one].p0_1 <= ids[other].p99_9 and ids[other].p0_1 <= ids[one].p99_9


def _overlapping_pairs(ranges: Mapping[str, tuple[Any, Any]]) -> Iterator[tuple[str, str]]:
    """Pairs of keys whose ranges have a value in common, by a sweep over their beginnings."""
    active: list[str] = []
    for key in sorted(ranges, key=lambda key: (ranges[key], key)):
        active = [other for other in active if ranges[other][1] >= ranges[key][0]]
        yield from ((other, key) for other in active)
        active.append(key)


def _comparison_of(report: CleanedReport, other: CleanedReport) -> SharedIds | None:
    """What the cleaning of either file found in the present version of the other."""
    for newer, older in ((report, other), (other, report)):
        comparison = newer.shared_ids.get(older.partition)
        if comparison is not None and comparison.version == older.version:
            return comparison
    return None
