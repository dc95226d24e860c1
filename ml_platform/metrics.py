"""Metrics for Prometheus, collected from Dagster's storage, the lake's reports, MLflow and the cloud at each scrape.

Nothing is counted in this process: it may start, stop and be killed at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import dagster as dg
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.jobs import ASSETS, delete_orphaned_clusters, process_new_files
from ml_platform.lake.grades import newest_grade
from ml_platform.lake.reports import CleanedReport, FeaturesReport, ScoredReport, ScoredReports
from ml_platform.model.gate import INSTANT, SINCE_TAG
from ml_platform.operations.background import in_background
from ml_platform.planning import waiting_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow.entities.model_registry import ModelVersion

    from ml_platform.dataproc.api import Cluster
    from ml_platform.lake.resource import LakeResource
    from ml_platform.model.mlflow import MlflowResource

log = logging.getLogger(__name__)

#: Seconds that a scrape waits for all sources, which are read at the same time. prometheus.yaml allows it 30.
SOURCES_TIMEOUT_S = 25.0

#: Seconds of retries of a call of the cloud's API.
RETRY_FOR_S = 3.0

OUTCOMES = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


@dataclass(frozen=True, eq=False)  # a registry keeps collectors by identity
class PlatformMetrics(Collector):
    """Collector of all metrics. A source that fails has `ml_platform_source_up` 0, and no metrics.

    Attributes:
        engine: the cloud's engine; None where Spark runs on this machine.
    """

    instance: dg.DagsterInstance
    lake: LakeResource
    mlflow: MlflowResource
    engine: DataprocEngine | None = None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read all sources."""
        sources: dict[str, Callable[[], Any]] = {
            "dagster": lambda: list(self._runs()),
            "lake": self._read_lake,
            "mlflow": self.mlflow.champion,
        }
        if self.engine is not None:
            sources["dataproc"] = self._read_clusters
        answers = {source: in_background(read) for source, read in sources.items()}
        wait(answers.values(), SOURCES_TIMEOUT_S)
        up = GaugeMetricFamily(
            "ml_platform_source_up", "Whether a source could be read (1) or not (0).", labels=["source"]
        )
        found: dict[str, Any] = {}
        for source, answer in answers.items():
            problem = answer.exception() if answer.done() else TimeoutError()
            if problem is None:
                found[source] = answer.result()
            else:
                # Without its text, which may contain the address of MLflow with a password.
                log.warning("%s cannot be read (%s): see ml-platform doctor", source, type(problem).__name__)
            up.add_metric([source], problem is None)
        yield up
        yield from found.get("dagster", ())
        if "lake" in found:
            yield from _data(found["lake"])
        if found.get("mlflow") is not None:
            yield from _champion(found["mlflow"])
            if "lake" in found:
                yield from _live_figures(found["mlflow"], found["lake"].scored)
        if "dataproc" in found:
            yield from _clusters(found["dataproc"])

    def _runs(self) -> Iterator[GaugeMetricFamily]:
        runs = GaugeMetricFamily("ml_platform_runs", "Finished runs in Dagster's storage.", labels=["job", "status"])
        for job in (process_new_files.name, delete_orphaned_clusters.name):
            for status in OUTCOMES:
                number = self.instance.get_runs_count(dg.RunsFilter(job_name=job, statuses=[status]))
                runs.add_metric([job, status.value.lower()], number)
        yield runs
        if heartbeats := self.instance.get_daemon_heartbeats():
            text = "Last sign of life of Dagster's daemon, in Unix seconds."
            yield _gauge("daemon_heartbeat_timestamp_seconds", text, max(one.timestamp for one in heartbeats.values()))
        newest: tuple[float, float] | None = None
        for asset in ASSETS:
            event = self.instance.get_latest_materialization_event(dg.AssetKey(asset))
            materialization = None if event is None else event.asset_materialization
            if event is not None and materialization and "cluster_node_hours" in materialization.metadata:
                found = event.timestamp, float(str(materialization.metadata["cluster_node_hours"].value))
                newest = max(newest or found, found)
        if newest is not None:
            text = "Node-hours of the last cluster up to its last finished step."
            yield _gauge("last_run_node_hours", text, newest[1])

    def _read_lake(self) -> _Lake:
        cleaned, features = self.lake.reports(CleanedReport), self.lake.reports(FeaturesReport)
        waiting = len(waiting_files(self.lake, cleaned, features))
        return _Lake(waiting, cleaned, features, self.lake.reports(ScoredReport))

    def _read_clusters(self) -> list[Cluster]:
        assert self.engine is not None  # noqa: S101 - narrows the type
        self.engine.api.retry_for_s = RETRY_FOR_S
        return self.engine.clusters()


@dataclass(frozen=True)
class _Lake:
    """Number of raw files that wait, and the reports of the tables."""

    waiting: int
    cleaned: Mapping[str, CleanedReport]
    features: Mapping[str, FeaturesReport]
    scored: ScoredReports


def _data(lake: _Lake) -> Iterator[GaugeMetricFamily]:
    yield _gauge("files_waiting", "Raw files without a cleaned counterpart.", lake.waiting)
    times = {key: report.tx_datetime.max for key, report in lake.cleaned.items() if report.tx_datetime}
    if times:
        text = "Last instant of the cleaned transactions, in Unix seconds."
        yield _gauge("newest_data_timestamp_seconds", text, _unix_seconds(max(times.values())))
    speeds = GaugeMetricFamily(
        "ml_platform_rows_per_second", "Rows per second of the newest partition of a table.", labels=["table"]
    )
    rows = {
        CleanedReport.table: {key: (report.counts.raw_rows, report.seconds) for key, report in lake.cleaned.items()},
        FeaturesReport.table: {key: (report.counts.rows, report.seconds) for key, report in lake.features.items()},
        ScoredReport.table: {key: (report.counts.rows, report.seconds) for key, report in lake.scored.items()},
    }
    for table, of_table in rows.items():
        newest = max(of_table.keys() & times.keys(), key=lambda key: times[key], default=None)
        if newest is not None and of_table[newest][1] > 0:
            number, seconds = of_table[newest]
            speeds.add_metric([table], number / seconds)
    yield speeds


def _champion(champion: ModelVersion) -> Iterator[GaugeMetricFamily]:
    yield _gauge("champion_version", "Version of the model in service.", int(champion.version))
    if since := champion.tags.get(SINCE_TAG):
        text = "Instant at which the model came into service, in Unix seconds."
        with suppress(ValueError):  # anyone can edit the tag
            yield _gauge("champion_since_timestamp_seconds", text, _unix_seconds(datetime.strptime(since, INSTANT)))


def _live_figures(champion: ModelVersion, scored: ScoredReports) -> Iterator[GaugeMetricFamily]:
    grade = newest_grade(scored, int(champion.version))
    if grade is None:
        return
    text = "Figures of the champion's scores in its last graded week."
    live = GaugeMetricFamily("ml_platform_champion_live", text, labels=["figure"])
    for name, value in grade.figures().items():
        live.add_metric([name], value)
    yield live
    if grade.held_out is not None:
        text = "Lower end of the 95% interval of the average precision in the held-out week."
        yield _gauge("champion_held_out_average_precision_lower", text, grade.held_out.lower)


def _clusters(clusters: list[Cluster]) -> Iterator[GaugeMetricFamily]:
    by_status = GaugeMetricFamily("ml_platform_clusters", "Clusters of this deployment.", labels=["status"])
    statuses = [cluster.status for cluster in clusters]
    for status in sorted({"RUNNING", *statuses}):
        by_status.add_metric([status.lower()], statuses.count(status))
    yield by_status
    if clusters:
        text = "Creation of the oldest cluster of this deployment, in Unix seconds."
        yield _gauge("oldest_cluster_created_timestamp_seconds", text, min(one.created_at for one in clusters))


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"ml_platform_{name}", text, value=value)


def _unix_seconds(instant: datetime) -> float:
    return instant.replace(tzinfo=timezone.utc).timestamp()
