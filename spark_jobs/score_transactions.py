"""Score features partitions with a model: scores, ranks of the day, alerts with reasons, grades and drift.

A partition is scored by one version of the registered model. Without a model that can score, a partition has a report
that says so, and no rows. After the last partition, the weeks whose labels are known by then are graded.
"""

from __future__ import annotations

import json
import logging
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from spark_jobs import partitions, runtime
from spark_jobs.io import parquet_files
from spark_jobs.schema import DAY_S
from spark_jobs.scoring import alerts, drift, grading, rows
from spark_jobs.training import library
from spark_jobs.training.learners import ModelError, NewerModelError, Scorer

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from spark_jobs.progress import Progress

log = logging.getLogger("spark_jobs")

#: Rows that a task ranks and writes: 300 MB in a Python process.
ROWS_PER_TASK = 2_500_000

#: Alerts in a report, for tables.
ALERTS_IN_REPORT = 10


def run(spark: SparkSession, request: dict[str, Any]) -> dict[str, Any]:
    """Score the partitions of `request`, one result per partition (see partitions.run_partitions).

    Request:
        run_id: identifies the run in the reports.
        library_uri: archive of the learners' library (see `library`), or null if Spark's Python has it.
        champion: null, or the model that scores: ``version`` (a number), ``model_uri``, ``report_uri`` (training
            report, for the drift checks), ``out_of_time_from`` (YYYY-MM-DD, or null if not known), ``held_out``
            (average precision of its held-out week, with ``lower`` and ``upper``; null if not known), ``error`` (null,
            or why it cannot score, if that is known beforehand).
        alerts_per_day: rows of each day that become alerts.
        epoch: first day of the data set (YYYY-MM-DD), from which days are counted.
        data_first_day: first day of all data.
        partitions: list of ``partition`` (key), ``features_uri``, ``output_uri``, ``alerts_uri``, ``rows``,
            ``rows_per_day`` (day → rows, to spread them over tasks), ``usual_days`` (first and last, without odd rows),
            ``inputs`` and ``cause`` (both copied into the report).
        grading: the rest of the request of `grading.grade_weeks`; its ``scored`` lists the partitions that were scored
            before.

    Report fields of a partition: ``inputs``, ``cause``, ``outcome`` (scored, no_champion, champion_unreadable,
    champion_newer_library or champion_other_features), ``error`` (why the champion cannot score), ``model_version``,
    ``out_of_time_from``, ``held_out``, ``alerts_per_day``, ``counts`` (``rows``, ``alerts``), ``score_sum``, ``weeks``
    (week → rows that can be graded as live, see `grading`), ``alerts`` (the first ten), ``drift`` (see
    `drift.measure`), and ``grades`` (those that the run made, in the report of its last partition) with
    ``grading_error`` (why a week has none).

    Writes into ``output_uri`` the scored rows (SCORED_COLUMNS), and into ``alerts_uri`` the alerts (ALERT_COLUMNS) as
    Parquet and CSV, which the report in ``output_uri`` commits.

    Raises:
        library.LibraryError: the learners' library is missing or damaged; nothing was read.
    """
    runtime.configure(spark)
    library_name = library.ship(spark, request.get("library_uri"))
    model = _Model.load(spark, request["champion"])
    last = request["partitions"][-1]["partition"]
    to_grade = {**request["grading"], "epoch": request["epoch"], "alerts_per_day": request["alerts_per_day"]}
    to_grade["scored"] = dict(to_grade["scored"])

    def build(item: dict[str, Any], progress: Progress) -> dict[str, Any]:
        report = _score_partition(spark, item, request, model, library_name, progress)
        if report["outcome"] == "scored":
            to_grade["scored"][item["partition"]] = grading.entry_of(
                item["output_uri"], {**report, "run_id": request["run_id"]}
            )
        grades, problem = _grades(spark, to_grade) if item["partition"] == last else ([], None)
        return {**report, "grades": grades, "grading_error": problem}

    return partitions.run_partitions(spark, request, build, what="scores", size=lambda item: item["rows"])


def _grades(spark: SparkSession, request: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The grades, and why a week has none: the scores of a file do not wait for those of others, and the next run
    grades what this one could not."""
    try:
        return grading.grade_weeks(spark, request)
    except Exception as error:
        log.exception("the scores cannot be graded")
        return [], runtime.describe(error)


class _Model:
    """The model that scores, or why there is none."""

    def __init__(self, outcome: str, error: str | None = None, text: str = "", champion: Any = None) -> None:
        self.outcome, self.error, self.text, self.champion = outcome, error, text, champion or {}
        self.features: list[str] = []
        self.profile: dict[str, Any] = {}
        self.edges: dict[str, list[float]] = {}

    @classmethod
    def load(cls, spark: SparkSession, champion: dict[str, Any] | None) -> _Model:
        """Read the model file. Errors of the storage are raised; those of the file are the outcome."""
        if champion is None:
            return cls("no_champion")
        if champion.get("error"):
            return cls("champion_unreadable", champion["error"], champion=champion)
        files = runtime.Files(spark)
        try:
            text = files.read(champion["model_uri"]).decode("utf-8", errors="replace")
            features = Scorer.from_json(text).features
        except NewerModelError as error:
            return cls("champion_newer_library", str(error), champion=champion)
        except ModelError as error:
            return cls("champion_unreadable", str(error), champion=champion)
        except Exception as error:
            if not runtime.is_not_found(error):
                raise
            return cls("champion_unreadable", "there is no {}".format(champion["model_uri"]), champion=champion)
        model = cls("scored", text=text, champion=champion)
        model.features = features
        model.profile, model.edges = _profile(files, champion)
        return model


def _profile(files: runtime.Files, champion: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Distributions in the training window, of the training report, and the edges of their bins.

    Empty if the report is not there or broken: anyone can edit it, and scores do not depend on it.
    """
    try:
        profile = json.loads(files.read(champion["report_uri"]).decode("utf-8"))["profile"]
        return profile, {name: [float(edge) for edge in limits] for name, limits in profile.get("edges", {}).items()}
    except Exception as error:
        log.warning("drift is not measured: the training report cannot be read: %s", runtime.describe(error))
        return {}, {}


def _score_partition(
    spark: SparkSession,
    item: dict[str, Any],
    request: dict[str, Any],
    model: _Model,
    library_name: str | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write the scores and alerts of one partition; return the fields of its report."""
    files = runtime.Files(spark)
    outcome, error = model.outcome, model.error
    if outcome == "scored":
        present = runtime.read_parquet(spark, item["features_uri"]).columns
        missing = [name for name in model.features if name not in present]
        if missing:
            outcome = "champion_other_features"
            error = "it needs features that this partition does not have: {}".format(", ".join(missing))
    report: dict[str, Any] = {
        "inputs": item["inputs"],
        "cause": item["cause"],
        "outcome": outcome,
        "error": error,
        "model_version": model.champion.get("version"),
        "out_of_time_from": model.champion.get("out_of_time_from"),
        "held_out": model.champion.get("held_out"),
        "alerts_per_day": request["alerts_per_day"],
    }
    if outcome != "scored":
        return _without_scores(files, item, report)
    scoring = rows.Scoring(
        model=model.text,
        features=model.features,
        version=int(model.champion["version"]),
        alerts_per_day=request["alerts_per_day"],
        first_days=_first_days(spark, item),
        edges=model.edges,
        step=max(1, -(-item["rows"] // rows.BINNED_ROWS)),
    )
    bins, tallies = partitions.list_accumulator(spark), partitions.list_accumulator(spark)
    progress.follow(tallies)
    frame = rows.scored_files(spark, item["features_uri"], scoring, library_name, bins.add, tallies.add)
    try:
        with rows.one_file_per_task(spark):
            parquet_files.write(frame, item["output_uri"])
    except Exception as error:
        problem = runtime.describe(error)
        if ModelError.__name__ not in problem:
            raise
        return _without_scores(files, item, {**report, "outcome": "champion_unreadable", "error": problem})
    done = partitions.tallies_of(tallies, len(scoring.first_days) + 1)
    found = [alert for tally in done for alert in tally["alerts"]]
    found.sort(key=lambda alert: (alert["tx_datetime"] // DAY_S, alert["rank_of_day"]))
    for name, content in alerts.alert_files(found).items():
        files.write("{}/{}".format(item["alerts_uri"], name), content)
    rows_per_day = {day: number for tally in done for day, number in tally["rows_per_day"].items()}
    return {
        **report,
        "counts": {"rows": sum(tally["rows"] for tally in done), "alerts": len(found)},
        "score_sum": sum(tally["score_sum"] for tally in done),
        "weeks": grading.live_weeks(rows_per_day, request["epoch"], report["out_of_time_from"]),
        "alerts": [alerts.plain(alert) for alert in found[:ALERTS_IN_REPORT]],
        "drift": _drift(model, bins.value, item["usual_days"], request),
    }


def _without_scores(files: runtime.Files, item: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Delete scores of earlier rows; return the fields of a report that says why there are none."""
    level = logging.WARNING if report["error"] else logging.INFO
    log.log(level, "%s: no scores: %s", item["partition"], report["error"] or "there is no champion")
    files.delete(item["output_uri"])
    files.delete(item["alerts_uri"])
    return {**report, "counts": {"rows": 0, "alerts": 0}, "score_sum": 0.0, "weeks": {}, "alerts": [], "drift": {}}


def _drift(model: _Model, found: list[Any], usual_days: list[int], request: dict[str, Any]) -> dict[str, Any]:
    """Compare what the tasks counted with the training window; empty if the profile is broken."""
    first, last = usual_days
    known_until = request["grading"]["last_day"] - request["grading"]["delay_days"]
    counts: dict[str, dict[int, list[int]]] = {name: {} for name in (rows.LABELS, *model.edges)}
    # A retried task before the shuffle may have counted twice, which changes shares by little.
    for of_file in found:
        for day, of_day in of_file.items():
            for name, number in of_day.items() if first <= day <= last else ():
                before = counts[name].get(day, [0] * len(number))
                counts[name][day] = [a + b for a, b in zip(before, number)]
    labels = {
        day: (genuine + frauds, frauds)
        for day, (genuine, frauds) in counts.pop(rows.LABELS).items()
        if day <= known_until
    }
    by_day = {
        name: [of_days.get(day, [0] * (len(model.edges[name]) + 1)) for day in range(first, last + 1)]
        for name, of_days in counts.items()
    }
    try:
        return drift.measure(model.profile, by_day, first, labels, request["data_first_day"])
    except Exception as error:
        log.warning("drift is not measured: %s", runtime.describe(error))
        return {}


def _first_days(spark: SparkSession, item: dict[str, Any]) -> list[int]:
    """First day of each task but for the first one, so that they have about as many rows each."""
    days = sorted((int(day), number) for day, number in item["rows_per_day"].items())
    tasks = runtime.round_up_to_cores(spark, -(-item["rows"] // ROWS_PER_TASK))
    before = [0, *accumulate(number for _, number in days)]
    share = max(1, before[-1]) / tasks
    tasks_of_days = [int((before[index] + number / 2) / share) for index, (_, number) in enumerate(days)]
    return [days[index][0] for index in range(1, len(days)) if tasks_of_days[index] > tasks_of_days[index - 1]]


if __name__ == "__main__":
    runtime.main(run, "score_transactions")
