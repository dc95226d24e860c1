"""Spark engine on a Yandex Data Proc cluster, created for a run's first job and deleted when the run ends.

The resource owns the cluster; Dagster calls its clean-up whether the run succeeds, fails or is terminated. A cluster
left by a killed process is deleted by the next run or by the sensor ``orphaned_clusters``, which find it by its labels.
Its name and id are also recorded in run tags, for people.
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
from ml_platform.operations.changes import UNDELETED_CLUSTER_TAG
from ml_platform.operations.dead_runs import fail_dead_runs, record_process
from ml_platform.operations.messages import one_line
from ml_platform.settings import ClusterOptions, ClusterSpec
from ml_platform.spark.code_archive import ARCHIVE_NAME, build_archive, content_hash, library_archive, main_file
from ml_platform.spark.engine import JobCall, SparkEngine
from spark_jobs.runtime import START_PROPERTIES

CLUSTER_ID_TAG = "ml_platform/cluster_id"
CLUSTER_NAME_TAG = "ml_platform/cluster_name"

#: Maximum characters of a driver log per message in the run's log.
LOG_CHUNK = 20_000

HOUR_S = 3600

#: Spark properties of each job.
JOB_PROPERTIES = {
    **START_PROPERTIES,
    # In cluster mode the driver would run in YARN, and its log would not be the job's log.
    "spark.submit.deployMode": "client",
    # S3 renames by copying; version 2 of the committer renames half as often. See docs/s3.md.
    "spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2",
}


@dataclass
class RunCluster:
    """A run's cluster. `requested_at` and `expires_at` are Unix seconds."""

    name: str
    spec: ClusterSpec
    labels: dict[str, str]
    requested_at: float
    expires_at: float
    #: "" until the create call returns; until then only the name identifies the cluster.
    id: str = ""
    is_usable: bool = False
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def cores(self) -> int:
        """Total cores of the worker nodes; presets whose names do not contain the number count as 0."""
        groups = self.spec.node_groups()
        return sum((cores_of(group.preset) or 0) * group.hosts for group in groups if group.role != "master")


class DataprocEngine(SparkEngine, ClusterOptions):
    """Engine with one cluster per run. Deployments that share a folder are distinguished by name and lake."""

    deployment: str = Field(description="Name of this deployment; a label of its clusters.")
    lake_uri: str = Field(description="URI of the deployment's lake.")
    cluster: dict[str, Any] = Field(description="Composition of a cluster: the fields of ClusterSpec.")

    _api: Any = PrivateAttr(default=None)
    _clock: Any = PrivateAttr(default_factory=lambda: time)
    _run_cluster: RunCluster | None = PrivateAttr(default=None)
    _attempts: int = PrivateAttr(default=0)

    @property
    def spec(self) -> ClusterSpec:
        """Composition of a cluster, as configured."""
        return ClusterSpec.model_validate(self.cluster)

    @property
    def api(self) -> DataprocApi:
        """API client, created on first use."""
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
            try:
                self._delete_cluster(context.log or dg.get_dagster_logger())
            except DataprocError as error:
                # Dagster only logs what clean-up raises.
                if context.run and context.instance and (cluster := self._run_cluster):
                    problem = f"{cluster.name} ({cluster.id or 'id unknown'}): {one_line(str(error))}"
                    context.instance.add_run_tags(context.run.run_id, {UNDELETED_CLUSTER_TAG: problem})
                raise

    # cluster

    def labels(self, run_id: str, expires_at: float) -> dict[str, str]:
        """Labels of a run's cluster. The lake distinguishes deployments with the same name."""
        return {
            "owner": OWNER,
            "deployment": slug(self.deployment, 63),
            "lake": slug(self.lake_uri, 63),
            "dagster-run-id": slug(run_id, 63),
            "expires-at": str(int(expires_at)),
        }

    def clusters(self) -> list[Cluster]:
        """This deployment's clusters in the folder."""
        expected = self.labels("", 0)
        return [
            cluster
            for cluster in self.api.list_clusters(self.spec.folder_id)
            if all(cluster.labels.get(name) == expected[name] for name in ("owner", "deployment"))
            and cluster.labels.get("lake", expected["lake"]) == expected["lake"]
        ]

    def _usable_cluster(self, call: JobCall) -> RunCluster:
        """The run's cluster, created if necessary, and sized for its first job and the jobs that follow from it."""
        if self._run_cluster is not None and self._run_cluster.is_usable:
            return self._run_cluster
        # Delete a failed cluster first; otherwise it keeps costing money.
        self._delete_cluster(call.context.log)
        self._delete_predecessors(call.context)
        self._attempts += 1
        context, run_id, now = call.context, call.context.run.run_id, self._clock.time()
        name, expires_at = cluster_name(self.deployment, run_id, self._attempts), now + self.max_lifetime_s
        cluster = RunCluster(name, self._sized(call), self.labels(run_id, expires_at), now, expires_at)
        # Record the name first: even if the request fails, a cluster may exist, and clean-up looks for it by name.
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
            say=_log_changes(context.log),
        )
        cluster.is_usable = True
        context.log.info(f"cluster {name} is ready after {self._clock.time() - now:.0f} s")
        return cluster

    def _delete_predecessors(self, context: dg.AssetExecutionContext) -> None:
        """Delete clusters of ended runs, and wait for the deletion of those that still run a job.

        A killed run leaves such a cluster. Its job may be writing the same partitions as this run, and two writers
        would duplicate rows. The sensor ``orphaned_clusters`` may come too late.

        Raises:
            DataprocError: a cluster that runs a job cannot be deleted.
        """
        # Dagster considers a run with a dead process as running until it is reported as failed.
        fail_dead_runs(context.instance)
        for cluster in self.clusters():
            run = context.instance.get_run_by_id(cluster.labels.get("dagster-run-id", ""))
            if run is None or not run.is_finished:
                continue
            has_job = self._runs_a_job(cluster.id)
            if cluster.status == "STOPPING" and not has_job:  # its run has just requested the deletion
                continue
            context.log.warning(f"deleting cluster {cluster.name} ({cluster.id}): its run {run.run_id} has ended")
            if has_job:
                self._wait_for_deletion(cluster.id, context.log)
                continue
            try:
                self.api.request_deletion(cluster.id)
            except DataprocError as error:
                context.log.error(f"cannot delete it now, the sensor orphaned_clusters will try again: {error}")

    def _runs_a_job(self, cluster_id: str) -> bool:
        try:
            return any(job.status not in FINISHED_JOB for job in self.api.list_jobs(cluster_id))
        except DataprocError as error:
            if error.code == "NOT_FOUND":  # the cluster is gone
                return False
            raise

    def _sized(self, call: JobCall) -> ClusterSpec:
        """Composition of the cluster, with as many nodes as the work needs within the settings' limits.

        Sizes the data nodes, or the initial number of autoscaled compute nodes.
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
        """Delete the run's cluster, if any."""
        cluster = self._run_cluster
        if cluster is None:
            return
        cluster.is_usable = False
        try:
            if not cluster.id:
                # The create call failed, or its response was lost: find the cluster by name.
                existing = self.api.find_cluster(self.spec.folder_id, cluster.name, cluster.labels)
                cluster.id = existing.id if existing else ""
            if cluster.id:
                log.info(f"deleting cluster {cluster.name} ({cluster.id})")
                self._wait_for_deletion(cluster.id, log)
                log.info(f"cluster {cluster.name} is deleted{self._summary(cluster)}")
            self._run_cluster = None
        except DataprocError as error:
            log.error(
                f"CLUSTER {cluster.name} ({cluster.id or 'id unknown'}) MAY STILL BE THERE AND COST MONEY: {error}. "
                "The sensor orphaned_clusters will try again; see `ml-platform clusters list`"
            )
            raise

    def _wait_for_deletion(self, cluster_id: str, log: Any) -> None:
        self.api.delete_cluster(cluster_id, timeout_s=self.delete_timeout_s, poll_s=self.poll_s, say=_log_changes(log))

    # jobs

    def _library_uri(self, call: JobCall) -> str | None:
        return _upload_library(call.lake)

    def _execute(self, call: JobCall) -> dict[str, Any]:
        main_file_uri, archive_uri = _upload_code(call.lake, call.job)
        cluster = self._usable_cluster(call)
        context, lake = call.context, call.lake
        name = job_name(call.job, call.label, context.retry_number + 1)
        if context.retry_number:
            # The report of an earlier attempt must not count for this one.
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
        """Wait for a job to finish, copying its driver log to the run's log; cancel it on timeout or interrupt."""
        log = call.context.log
        say = _log_changes(log)
        driver_log = self.api.follow_log(cluster.id, job_id)
        log_chunks: list[str] = []

        def poll() -> Job | None:
            try:
                job: Job | None = self.api.get_job(cluster.id, job_id)
            except DataprocError as error:
                if error.code != "NOT_FOUND":
                    raise
                job = None
            if job:
                say(f"job {name}: {job.status}{f', {job.yarn_application}' if job.yarn_application else ''}")
                log_chunks.append(_log_new_lines(driver_log, log))
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
            try:
                log_chunks.append(_log_new_lines(driver_log, log))
                call.lake.store.write(call.file("driver.log"), "".join(log_chunks).encode())
            except Exception as error:  # neither the API nor the storage may hide how the job ended
                log.warning(f"the driver log cannot be kept: {one_line(str(error)) or type(error).__name__}")

    # usage and cost

    def _cluster_url(self, cluster: RunCluster) -> str:
        return f"{self.console_url}/folders/{cluster.spec.folder_id}/data-proc/cluster/{cluster.id}"

    def _usage(self, cluster: RunCluster) -> tuple[float, float | None]:
        """Node-hours since the cluster was requested, and their price; None if a price is not configured.

        With autoscaling, nodes that were added are not known here: the hours are a lower bound, and there is no price.
        """
        hours = (self._clock.time() - cluster.requested_at) / HOUR_S
        groups = cluster.spec.node_groups()
        node_hours = hours * sum(group.hosts for group in groups)
        if cluster.spec.compute_max_count:
            return node_hours, None
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
        return f"; it used {node_hours:.2f} node-hours{cost}"

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


def _log_new_lines(driver_log: Iterator[str], log: Any) -> str:
    """Copy new lines of a driver log to the run's log, and return them."""
    new = next(driver_log, "")
    for start in range(0, len(new), LOG_CHUNK):
        log.info(printable(new[start : start + LOG_CHUNK].rstrip("\n"), keep="\n\t"))
    return new


def _upload_code(lake: LakeResource, job: str) -> tuple[str, str]:
    """Upload a job's code; returns the URIs of its main file and of the code archive.

    The library is uploaded with every job, even if the job does not need it: if it is unavailable, the run must fail
    before it creates a cluster.
    """
    archive = build_archive()
    directory = f"_code/{content_hash(archive)}"
    _upload_library(lake)
    return (
        _upload(lake, f"{directory}/{job}.py", main_file(job)),
        _upload(lake, f"{directory}/{ARCHIVE_NAME}", archive),
    )


def _upload_library(lake: LakeResource) -> str:
    """Upload the learners' library archive; returns its URI."""
    name, content = library_archive()
    return _upload(lake, f"_code/{content_hash(content)}/{name}", content)


def _upload(lake: LakeResource, file: str, content: bytes) -> str:
    """Write a file to the lake if it is missing or damaged; returns its URI."""
    try:
        is_uploaded = lake.store.read(file) == content
    except FileNotFoundError:
        is_uploaded = False
    if not is_uploaded:
        lake.store.write(file, content)
    return lake.store.spark_uri(file)


def _log_changes(log: Any) -> Callable[[str], None]:
    """Return a function that logs a message unless it repeats the previous one."""
    last = ""

    def say(text: str) -> None:
        nonlocal last
        if text != last:
            log.info(text)
        last = text

    return say
