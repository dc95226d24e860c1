"""Metrics for Prometheus, collected from Dagster's storage, the lake's reports, MLflow and the cloud at each scrape.

Nothing is counted in this process: it may start, stop and be killed at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from typing import TYPE_CHECKING, Any

import dagster as dg
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.jobs import ASSETS, delete_orphaned_clusters, process_new_files
from ml_platform.lake.grades import newest_grade
from ml_platform.lake.reports import CleanedReport, FeaturesReport, ScoredReport, ScoredReports
from ml_platform.model.gate import INSTANT, SINCE_TAG
from ml_platform.planning import waiting_files

if TYPE_CHECKING:
    from ml_platform.lake.resource import LakeResource
    from ml_platform.model.mlflow import MlflowResource

log = logging.getLogger(__name__)

#: Seconds of retries of a call of the cloud's API: Prometheus gives up after ten by default.
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

    def describe(self) -> list[Any]:
        """Nothing: a registry would collect all metrics to learn their names."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Ask all sources."""
        up = GaugeMetricFamily(
            "ml_platform_source_up", "Whether a source could be read (1) or not (0).", labels=["source"]
        )
        # Read once per scrape, by whichever source asks first.
        scored = cache(lambda: self.lake.reports(ScoredReport))
        sources: dict[str, Callable[[], Iterator[GaugeMetricFamily]]] = {
            "dagster": self._runs,
            "lake": lambda: self._data(scored()),
            "mlflow": lambda: self._champion(scored),
        }
        if self.engine is not None:
            sources["dataproc"] = self._clusters
        for source, metrics in sources.items():
            try:
                found = list(metrics())
            except Exception as error:
                # Of any kind, because the other sources must still be seen. Without its text, which may contain the
                # address of MLflow with a password.
                log.warning("%s cannot be read (%s): see ml-platform doctor", source, type(error).__name__)
                up.add_metric([source], 0)
            else:
                up.add_metric([source], 1)
                yield from found
        yield up

    def _runs(self) -> Iterator[GaugeMetricFamily]:
        runs = GaugeMetricFamily("ml_platform_runs", "Finished runs in Dagster's storage.", labels=["job", "status"])
        for job in (process_new_files.name, delete_orphaned_clusters.name):
            for status in OUTCOMES:
                number = self.instance.get_runs_count(dg.RunsFilter(job_name=job, statuses=[status]))
                runs.add_metric([job, status.value.lower()], number)
        yield runs
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

    def _data(self, scored: ScoredReports) -> Iterator[GaugeMetricFamily]:
        cleaned, features = self.lake.reports(CleanedReport), self.lake.reports(FeaturesReport)
        waiting = len(waiting_files(self.lake, cleaned, features))
        yield _gauge("files_waiting", "Raw files without a cleaned counterpart.", waiting)
        times = {key: report.tx_datetime.max for key, report in cleaned.items() if report.tx_datetime}
        if times:
            text = "Last instant of the cleaned transactions, in Unix seconds."
            yield _gauge("newest_data_timestamp_seconds", text, _unix_seconds(max(times.values())))
        speeds = GaugeMetricFamily(
            "ml_platform_rows_per_second", "Rows per second of the newest partition of a table.", labels=["table"]
        )
        rows = {
            CleanedReport.table: {key: (report.counts.raw_rows, report.seconds) for key, report in cleaned.items()},
            FeaturesReport.table: {key: (report.counts.rows, report.seconds) for key, report in features.items()},
            ScoredReport.table: {key: (report.counts.rows, report.seconds) for key, report in scored.items()},
        }
        for table, of_table in rows.items():
            newest = max(of_table.keys() & times.keys(), key=lambda key: times[key], default=None)
            if newest is not None and of_table[newest][1] > 0:
                number, seconds = of_table[newest]
                speeds.add_metric([table], number / seconds)
        yield speeds

    def _champion(self, scored: Callable[[], ScoredReports]) -> Iterator[GaugeMetricFamily]:
        champion = self.mlflow.champion()
        if champion is None:
            return
        version = int(champion.version)
        yield _gauge("champion_version", "Version of the model in service.", version)
        if since := champion.tags.get(SINCE_TAG):
            text = "Instant at which the model came into service, in Unix seconds."
            with suppress(ValueError):  # anyone can edit the tag
                yield _gauge("champion_since_timestamp_seconds", text, _unix_seconds(datetime.strptime(since, INSTANT)))
        grade = newest_grade(scored(), version)
        if grade is not None:
            text = "Figures of the champion's scores in its last graded week."
            live = GaugeMetricFamily("ml_platform_champion_live", text, labels=["figure"])
            for name, value in grade.figures().items():
                live.add_metric([name], value)
            yield live
            if grade.held_out is not None:
                text = "Lower end of the 95% interval of the average precision in the held-out week."
                yield _gauge("champion_held_out_average_precision_lower", text, grade.held_out.lower)

    def _clusters(self) -> Iterator[GaugeMetricFamily]:
        assert self.engine is not None  # noqa: S101 - narrows the type
        self.engine.api.retry_for_s = RETRY_FOR_S
        clusters = GaugeMetricFamily("ml_platform_clusters", "Clusters of this deployment.", labels=["status"])
        statuses = [cluster.status for cluster in self.engine.clusters()]
        for status in sorted({"RUNNING", *statuses}):
            clusters.add_metric([status.lower()], statuses.count(status))
        yield clusters


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"ml_platform_{name}", text, value=value)


def _unix_seconds(instant: datetime) -> float:
    return instant.replace(tzinfo=timezone.utc).timestamp()
