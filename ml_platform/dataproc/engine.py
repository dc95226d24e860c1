"""Spark on a Yandex Data Proc cluster that is created at a run's first job and deleted at the run's end.

The cluster belongs to the resource, whose clean-up Dagster calls whether the run succeeds, fails or is terminated. What
a killed process leaves behind is deleted by the next run or by the sensor ``orphaned_clusters``. The identity of a
cluster is recorded before it is waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from ml_platform.dataproc.api import (
    FINISHED_JOB,
    OWNER,
    Cluster,
    DataprocApi,
    DataprocError,
    Job,
    cluster_name,
    job_name,
    slug,
)
from ml_platform.dataproc.sizing import MAX_TRAIN_ROWS, choose_nodes, cores_of, expected_seconds, memory_properties
from ml_platform.escaping import printable
from ml_platform.lake.resource import LakeResource
from ml_platform.operations.dead_runs import fail_dead_runs, record_process
from ml_platform.settings import ClusterOptions, ClusterSpec
from ml_platform.spark.code_archive import ARCHIVE_NAME, build_archive, content_hash, library_archive, main_file
from ml_platform.spark.engine import JobCall, SparkEngine
from spark_jobs.runtime import START_PROPERTIES

CLUSTER_ID_TAG = "ml_platform/cluster_id"
CLUSTER_NAME_TAG = "ml_platform/cluster_name"

#: A driver log is shown in the run's log in pieces of at most so many characters.
LOG_PIECE = 20_000

HOUR_S = 3600

#: Spark properties of each job.
JOB_PROPERTIES = {
    **START_PROPERTIES,
    # In cluster mode the driver would run somewhere in YARN, and the job would not have its log.
    "spark.submit.deployMode": "client",
    # A rename on S3 is a copy: version 2 makes half as many. See docs/s3.md.
    "spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2",
}


@dataclass
class RunCluster:
    """The cluster of this run. `requested_at` and `expires_at` are Unix seconds."""

    name: str
    spec: ClusterSpec
    labels: dict[str, str]
    requested_at: float
    expires_at: float
    #: "" until the create is answered: then only the name identifies the cluster.
    id: str = ""
    is_usable: bool = False
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def cores(self) -> int:
        """Cores of the nodes that run tasks; 0 where the presets' names do not say."""
        groups = self.spec.node_groups()
        return sum((cores_of(group.preset) or 0) * group.hosts for group in groups if group.role != "master")


class DataprocEngine(SparkEngine, ClusterOptions):
    """Runs jobs on a cluster of the run's own. Deployments in one folder are told apart by their name and lake."""

    deployment: str = Field(description="Name of this deployment; label of its clusters.")
    lake_uri: str = Field(description="The lake that the deployment works on.")
    cluster: dict[str, Any] = Field(description="What a cluster consists of: the fields of ClusterSpec.")

    _api: Any = PrivateAttr(default=None)
    _clock: Any = PrivateAttr(default_factory=lambda: time)
    _run_cluster: RunCluster | None = PrivateAttr(default=None)
    _attempts: int = PrivateAttr(default=0)

    @property
    def spec(self) -> ClusterSpec:
        """What a cluster consists of."""
        return ClusterSpec.model_validate(self.cluster)

    @property
    def api(self) -> DataprocApi:
        """The client of the API."""
        if self._api is None:
            self._api = DataprocApi(
                endpoint=self.api_endpoint,
                root_certificates_file=self.root_certificates_file,
                service_account_key_file=self.service_account_key_file,
                iam_token=self.iam_token,
                clock=self._clock,
            )
        return self._api

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Generator[DataprocEngine]:
        if context.run and context.instance:
            record_process(context.instance, context.run.run_id)
        try:
            yield self
        finally:
            self._delete_cluster(context.log or dg.get_dagster_logger())

    # the cluster

    def labels(self, run_id: str, expires_at: float) -> dict[str, str]:
        """Labels of a run's cluster. The lake distinguishes deployments that have the same name."""
        return {
            "owner": OWNER,
            "deployment": slug(self.deployment, 63),
            "lake": slug(self.lake_uri, 63),
            "dagster-run-id": slug(run_id, 63),
            "expires-at": str(int(expires_at)),
        }

    def clusters(self) -> list[Cluster]:
        """This deployment's clusters in the folder."""
        own = self.labels("", 0)
        return [
            cluster
            for cluster in self.api.list_clusters(self.spec.folder_id)
            if all(cluster.labels.get(name) == own[name] for name in ("owner", "deployment"))
            and cluster.labels.get("lake", own["lake"]) == own["lake"]
        ]

    def _usable_cluster(self, call: JobCall) -> RunCluster:
        """The run's cluster, created if there is none yet, of a size for its first job and what follows from it."""
        if self._run_cluster is not None and self._run_cluster.is_usable:
            return self._run_cluster
        # Delete a failed cluster first; otherwise it keeps costing money.
        self._delete_cluster(call.context.log)
        self._delete_predecessors(call.context)
        self._attempts += 1
        context, run_id, now = call.context, call.context.run.run_id, self._clock.time()
        name, expires_at = cluster_name(self.deployment, run_id, self._attempts), now + self.max_lifetime_s
        cluster = RunCluster(name, self._sized(call), self.labels(run_id, expires_at), now, expires_at)
        # Before the request: whatever the answer, there may be a cluster, and clean-up looks for it by name.
        self._run_cluster = cluster
        context.instance.add_run_tags(run_id, {CLUSTER_NAME_TAG: name})
        cluster.id, operation_id = self.api.create_cluster(cluster.spec, name, cluster.labels)
        context.instance.add_run_tags(run_id, {CLUSTER_ID_TAG: cluster.id})
        context.log.info(
            f"creating cluster {name} ({cluster.id}){'' if operation_id else ', found from an earlier call'}: "
            f"{self._cluster_url(cluster)}"
        )
        self.api.wait_until_running(
            cluster.id,
            operation_id,
            timeout_s=self.create_timeout_s,
            poll_s=self.poll_s,
            say=_changes(context.log),
        )
        cluster.is_usable = True
        context.log.info(f"cluster {name} is ready after {self._clock.time() - now:.0f} s")
        return cluster

    def _delete_predecessors(self, context: dg.AssetExecutionContext) -> None:
        """Delete clusters of runs that have ended, and wait until those are gone that still run a job.

        A killed run leaves such a cluster: its job may be writing the very partitions that this run is about to write,
        and two writers would leave rows twice. The sensor ``orphaned_clusters`` may come too late.

        Raises:
            DataprocError: a cluster that runs a job cannot be deleted.
        """
        # A run whose process is gone counts as running until somebody checks.
        fail_dead_runs(context.instance)
        for cluster in self.clusters():
            run = context.instance.get_run_by_id(cluster.labels.get("dagster-run-id", ""))
            if run is None or not run.is_finished:
                continue
            has_job = self._runs_a_job(cluster.id)
            if cluster.status == "STOPPING" and not has_job:  # its run has just asked for that
                continue
            context.log.warning(f"deleting cluster {cluster.name} ({cluster.id}): its run {run.run_id} has ended")
            if has_job:
                self._wait_for_deletion(cluster.id, context.log)
                continue
            try:
                self.api.request_deletion(cluster.id)
            except DataprocError as error:
                context.log.error(f"it is left to the sensor orphaned_clusters: {error}")

    def _runs_a_job(self, cluster_id: str) -> bool:
        try:
            return any(job.status not in FINISHED_JOB for job in self.api.list_jobs(cluster_id))
        except DataprocError as error:
            if error.code == "NOT_FOUND":  # the cluster is gone
                return False
            raise

    def _sized(self, call: JobCall) -> ClusterSpec:
        """What the cluster consists of, with as many nodes as the work needs where the settings leave a choice.

        The choice is between numbers of data nodes. Of compute nodes that scale it is the number to begin with.
        """
        spec = self.spec
        if spec.compute_max_count and not self.data_max_count:
            role, preset = "compute", spec.compute_preset
            least, most = spec.compute_count, min(spec.compute_max_count, 32)
        else:
            role, preset = "data", spec.data_preset
            least, most = spec.data_count, max(spec.data_count, self.data_max_count)
        cores = cores_of(preset)
        if least == most or not call.rows or cores is None:
            return spec
        sizing = choose_nodes(call.job, call.rows, cores=cores, least=least, most=most, target_s=self.target_s)
        call.context.log.info(f"the cluster gets {role} nodes: {sizing.reason}")
        return spec.model_copy(update={f"{role}_count": sizing.nodes})

    def _delete_cluster(self, log: Any) -> None:
        """Delete the run's cluster, if there is one."""
        cluster = self._run_cluster
        if cluster is None:
            return
        cluster.is_usable = False
        try:
            if not cluster.id:
                # The answer to the create was an error, or was lost with the id: the name is known.
                earlier = self.api.find_cluster(self.spec.folder_id, cluster.name, cluster.labels)
                cluster.id = earlier.id if earlier else ""
            if cluster.id:
                log.info(f"deleting cluster {cluster.name} ({cluster.id})")
                self._wait_for_deletion(cluster.id, log)
                log.info(f"cluster {cluster.name} is deleted{self._summary(cluster)}")
            self._run_cluster = None
        except DataprocError as error:
            log.error(
                f"CLUSTER {cluster.name} ({cluster.id or 'id unknown'}) MAY STILL BE THERE AND COST MONEY: {error}. "
                "The sensor orphaned_clusters tries again; see `ml-platform clusters list`"
            )
            raise

    def _wait_for_deletion(self, cluster_id: str, log: Any) -> None:
        self.api.delete_cluster(cluster_id, timeout_s=self.delete_timeout_s, poll_s=self.poll_s, say=_changes(log))

    # jobs

    def _library_uri(self, call: JobCall) -> str | None:
        return _upload_library(call.lake)

    def _execute(self, call: JobCall) -> dict[str, Any]:
        main_file_uri, archive_uri = _upload_code(call.lake, call.job)
        cluster = self._usable_cluster(call)
        context, lake = call.context, call.lake
        name = job_name(call.job, call.label, context.retry_number + 1)
        if context.retry_number:
            # The report of an earlier try must not count for this one.
            lake.write_json(call.file("report.json"), {})
        started = self._clock.time()
        job_id = self.api.submit_job(
            cluster.id,
            name,
            {
                "main_python_file_uri": main_file_uri,
                "python_file_uris": [archive_uri],
                "args": ["--request", call.uri("request.json"), "--report", call.uri("report.json")],
                "properties": {
                    **JOB_PROPERTIES,
                    **memory_properties(call.job, call.request.get("max_train_rows", MAX_TRAIN_ROWS)),
                    **self.job_properties,
                },
            },
        )
        url = f"{self._cluster_url(cluster)}/jobs/{job_id}"
        context.log.info(f"job {name} ({job_id}) submitted: {url}")
        expected = expected_seconds(call.job, call.rows, cluster.cores())
        record = {"name": name, "id": job_id, "url": url, "rows": call.rows, "expected_seconds": expected}
        cluster.jobs.append(record)
        finished = self._follow(call, cluster, job_id, name)
        record["seconds"] = round(self._clock.time() - started, 1)
        context.add_asset_metadata(self._metadata(cluster))
        if finished.status != "DONE":
            raise dg.Failure(
                f"job {name} ended as {finished.status}; its driver log is in {call.uri('driver.log')}",
                metadata={"job": dg.MetadataValue.url(url)},
                allow_retries=False,
            )
        try:
            return lake.read_json(call.file("report.json"))
        except (FileNotFoundError, ValueError) as error:
            raise dg.Failure(
                f"job {name} is DONE, but left no readable report in {call.uri('report.json')} "
                f"({type(error).__name__}), so it counts as failed; its driver log is in {call.uri('driver.log')}",
                allow_retries=False,
            ) from None

    def _follow(self, call: JobCall, cluster: RunCluster, job_id: str, name: str) -> Job:
        """Wait for a job's end, with its driver log in the run's log; cancel it on timeout and on interrupt."""
        log = call.context.log
        say = _changes(log)
        driver_log = self.api.follow_log(cluster.id, job_id)
        text: list[str] = []

        def poll() -> Job | None:
            try:
                job: Job | None = self.api.get_job(cluster.id, job_id)
            except DataprocError as error:
                if error.code != "NOT_FOUND":
                    raise
                job = None
            if job:
                say(f"job {name}: {job.status}{f', {job.yarn_application}' if job.yarn_application else ''}")
                text.append(_show_new_lines(driver_log, log))
                if job.status in FINISHED_JOB:
                    return job
            current = self.api.get_cluster(cluster.id)
            state = current.status if current else "gone"
            cluster.is_usable = state == "RUNNING"
            if not job or not cluster.is_usable:
                job_state = job.status if job else "gone"
                raise DataprocError(f"cluster {cluster.id} is {state} while its job {name} is {job_state}")
            return None

        timeout_s = min(self.job_timeout_s, cluster.expires_at - self._clock.time())
        job = None
        try:
            job = self.api.wait(poll, timeout_s=timeout_s, poll_s=self.poll_s, what=f"job {name} ({job_id})")
            return job
        finally:
            if job is None and cluster.is_usable:
                log.warning(f"cancelling job {name} ({job_id})")
                with contextlib.suppress(DataprocError):
                    self.api.cancel_job(cluster.id, job_id)
            with contextlib.suppress(Exception):
                text.append(_show_new_lines(driver_log, log))
                call.lake.store.write(call.file("driver.log"), "".join(text).encode())

    # what it took

    def _cluster_url(self, cluster: RunCluster) -> str:
        return f"{self.console_url}/folders/{cluster.spec.folder_id}/data-proc/cluster/{cluster.id}"

    def _usage(self, cluster: RunCluster) -> tuple[float, float | None]:
        """Node-hours since the cluster was requested, and their price, None where the table of prices lacks one."""
        hours = (self._clock.time() - cluster.requested_at) / HOUR_S
        groups = cluster.spec.node_groups()
        node_hours = hours * sum(group.hosts for group in groups)
        try:
            price = sum(
                group.hosts * (self.prices[group.preset] + group.disk_size_gb * self.prices[group.disk_type])
                for group in groups
            )
        except KeyError:
            return node_hours, None
        return node_hours, hours * price

    def _summary(self, cluster: RunCluster) -> str:
        node_hours, price = self._usage(cluster)
        cost = "" if price is None else f", {price:.2f} {self.currency}"
        return f"; it took {node_hours:.2f} node-hours{cost}"

    def _metadata(self, cluster: RunCluster) -> dict[str, Any]:
        node_hours, price = self._usage(cluster)
        metadata: dict[str, Any] = {
            "cluster_id": cluster.id,
            "cluster": dg.MetadataValue.url(self._cluster_url(cluster)),
            "cluster_nodes": dg.MetadataValue.json({group.role: group.hosts for group in cluster.spec.node_groups()}),
            "cluster_jobs": dg.MetadataValue.json(list(cluster.jobs)),
            "cluster_node_hours": round(node_hours, 3),
        }
        if price is not None:
            metadata |= {"cluster_cost": round(price, 2), "cluster_cost_currency": self.currency}
        return metadata


def _show_new_lines(driver_log: Iterator[str], log: Any) -> str:
    """Show in the run's log what is new in a driver log, and return it."""
    new = next(driver_log, "")
    for start in range(0, len(new), LOG_PIECE):
        log.info(printable(new[start : start + LOG_PIECE].rstrip("\n"), keep="\n\t"))
    return new


def _upload_code(lake: LakeResource, job: str) -> tuple[str, str]:
    """URIs of a job's main file and of the archive with the other code.

    The library is uploaded with the first job of a run, whether or not that job needs it: without the library, a
    cluster would be created in vain.
    """
    archive = build_archive()
    directory = f"_code/{content_hash(archive)}"
    _upload_library(lake)
    return (
        _upload(lake, f"{directory}/{job}.py", main_file(job)),
        _upload(lake, f"{directory}/{ARCHIVE_NAME}", archive),
    )


def _upload_library(lake: LakeResource) -> str:
    """URI of the archive of the learners' library."""
    name, content = library_archive()
    return _upload(lake, f"_code/{content_hash(content)}/{name}", content)


def _upload(lake: LakeResource, file: str, content: bytes) -> str:
    """Write a file to the lake if it is missing or damaged; returns its URI."""
    try:
        is_there = lake.store.read(file) == content
    except FileNotFoundError:
        is_there = False
    if not is_there:
        lake.store.write(file, content)
    return lake.store.spark_uri(file)


def _changes(log: Any) -> Callable[[str], None]:
    """A function that logs a text if it differs from the one before: transitions, not polls."""
    last = ""

    def say(text: str) -> None:
        nonlocal last
        if text != last:
            log.info(text)
        last = text

    return say
