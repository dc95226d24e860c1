"""Spark on an ephemeral Yandex Data Proc cluster: made at a run's first job, shared by its steps, deleted at its end.

The cluster belongs to the resource, whose clean-up Dagster calls whether the run succeeds, fails or is terminated; what
a killed process leaves behind is for the next run, or the sensor ``orphaned_clusters``. The identity of a cluster is
recorded before it is waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from ml_platform.dataproc.api import (
    FINISHED_JOB,
    OWNER,
    UNUSABLE,
    Clock,
    Cluster,
    ClusterSpec,
    DataprocApi,
    DataprocError,
    DriverLog,
    Job,
    PysparkJob,
    cluster_name,
    job_name,
    slug,
)
from ml_platform.dataproc.sizing import MAX_TRAIN_ROWS, choose_nodes, cores_of, expected_seconds, memory_properties
from ml_platform.escaping import printable
from ml_platform.lake.resource import LakeResource
from ml_platform.operations.dead_runs import fail_dead_runs, note_process
from ml_platform.spark.code_archive import ARCHIVE_NAME, build_archive, content_hash, library_archive, main_file
from ml_platform.spark.engine import SparkEngine, job_file
from spark_jobs.runtime import START_PROPERTIES

CLUSTER_ID_TAG = "ml_platform/cluster_id"
CLUSTER_NAME_TAG = "ml_platform/cluster_name"

#: A driver log is shown in the run's log in pieces of at most so many characters.
LOG_PIECE = 20_000

HOUR_S = 3600

#: Spark properties of each job.
JOB_PROPERTIES = {
    **START_PROPERTIES,
    # In cluster mode the driver would be somewhere in YARN, and its log not in the job's.
    "spark.submit.deployMode": "client",
    # A rename on S3 is a copy: version 2 makes half as many. See docs/s3.md.
    "spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2",
}

#: Answers to a first create after which there certainly is no cluster. After any other there may be one.
REFUSALS = {
    *("INVALID_ARGUMENT", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED"),
    *("FAILED_PRECONDITION", "NOT_FOUND", "ALREADY_EXISTS"),
}


@dataclass
class _RunsCluster:
    """The cluster of this run."""

    name: str
    spec: ClusterSpec
    labels: Mapping[str, str]
    asked_at: float
    expires_at: float
    #: "" between the request and its answer: then only the name tells which cluster it is.
    id: str = ""
    usable: bool = False
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def cores(self) -> int:
        """Cores of the nodes that work on jobs; 0 where the presets' names do not tell."""
        return sum(
            (cores_of(preset) or 0) * count for preset, _, _, count, role in self.spec.node_groups() if role != "master"
        )


class DataprocEngine(SparkEngine):
    """Runs jobs on a cluster of the run's own. Deployments in one folder are told apart by their name and lake."""

    deployment: str = Field(description="Name of this deployment; label of its clusters.")
    cluster: dict[str, Any] = Field(description="What a cluster is made of: the fields of ClusterSpec.")
    endpoint: str | None = Field(default=None, description="host:port of another installation of the API.")
    root_certificates_file: str | None = Field(default=None, description="Authorities that its certificate is from.")
    service_account_key_file: str | None = Field(
        default=None,
        description="Authorized key to call the API with; default: the token, or the VM's account.",
    )
    iam_token: str | None = Field(default=None, description="IAM token to call the API with.")
    create_timeout_s: float = Field(default=1800, gt=0, description="Longest wait for a cluster.")
    job_timeout_s: float = Field(default=4 * HOUR_S, gt=0, description="Longest time of a job; then it is cancelled.")
    data_max_count: int = Field(default=0, ge=0, le=32, description="Data nodes that a run with much work gets.")
    target_s: float = Field(
        default=900, gt=0, description="Time that a run's work on data is to take, as far as the nodes go."
    )
    max_lifetime_s: float = Field(default=8 * HOUR_S, gt=0, description="A cluster older than this is deleted.")
    delete_timeout_s: float = Field(default=900, gt=0, description="Longest wait for a cluster to be gone.")
    poll_s: float = Field(default=10, gt=0, description="Longest pause between two looks.")
    job_properties: dict[str, str] = Field(default_factory=dict, description="More Spark properties of each job.")
    prices: dict[str, float] = Field(
        default_factory=dict, description="Per hour: of a host of a preset, and of a GB of a disk type."
    )
    currency: str = Field(default="RUB", description="What the prices are in.")
    console_url: str = Field(default="https://console.yandex.cloud", description="Where links to the console lead.")
    lake_uri: str = Field(description="The lake that the deployment works on.")

    _api: Any = PrivateAttr(default=None)
    _clock: Clock = PrivateAttr(default_factory=Clock)
    _run: Any = PrivateAttr(default=None)
    _attempts: int = PrivateAttr(default=0)

    @property
    def spec(self) -> ClusterSpec:
        """What a cluster is made of."""
        return ClusterSpec.model_validate(self.cluster)

    @property
    def api(self) -> DataprocApi:
        """The client of the API."""
        if self._api is None:
            self._api = DataprocApi(
                endpoint=self.endpoint,
                root_certificates_file=self.root_certificates_file,
                service_account_key_file=self.service_account_key_file,
                iam_token=self.iam_token,
                clock=self._clock,
            )
        return self._api

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Generator[DataprocEngine]:
        if context.run and context.instance:
            note_process(context.instance, context.run.run_id)
        try:
            yield self
        finally:
            self._delete_own(context.log or dg.get_dagster_logger())

    # the cluster

    def labels(self, run_id: str, expires_at: float) -> dict[str, str]:
        """Labels of a run's cluster. The lake tells deployments apart that have the same name."""
        return {
            "owner": OWNER,
            "deployment": slug(self.deployment, 63),
            "lake": slug(self.lake_uri, 63),
            "dagster-run-id": slug(run_id, 63),
            "expires-at": str(int(expires_at)),
        }

    def clusters(self) -> list[Cluster]:
        """This deployment's clusters in the folder."""
        own = {name: value for name, value in self.labels("", 0).items() if name in ("owner", "deployment")}
        lake = self.labels("", 0)["lake"]
        return [
            cluster
            for cluster in self.api.list_clusters(self.spec.folder_id)
            if all(cluster.labels.get(name) == value for name, value in own.items())
            and cluster.labels.get("lake", lake) == lake
        ]

    def _cluster(self, context: dg.AssetExecutionContext, job: str, rows: int) -> _RunsCluster:
        """The run's cluster, made if there is none yet, of a size for its first `job` and what follows from it."""
        if self._run is not None and self._run.usable:
            return self._run
        # One that a step before this could not bring up: gone first, or it stays and costs.
        self._delete_own(context.log)
        self._delete_predecessors(context)
        self._attempts += 1
        now = self._clock.time()
        run_id = context.run.run_id
        name, expires_at = cluster_name(self.deployment, run_id, self._attempts), now + self.max_lifetime_s
        spec = self._sized(context, job, rows)
        cluster = _RunsCluster(name, spec, self.labels(run_id, expires_at), now, expires_at)
        self._run = cluster
        context.instance.add_run_tags(run_id, {CLUSTER_NAME_TAG: cluster.name})
        try:
            cluster.id, operation_id = self.api.create_cluster(spec, cluster.name, cluster.labels)
        except DataprocError as error:
            if error.code in REFUSALS:
                self._run = None
            raise
        context.instance.add_run_tags(run_id, {CLUSTER_ID_TAG: cluster.id})
        context.log.info(
            f"creating cluster {cluster.name} ({cluster.id}){'' if operation_id else ', found from an earlier call'}: "
            f"{self._cluster_url(cluster.id)}"
        )
        self.api.wait_until_usable(
            cluster.id,
            operation_id,
            timeout_s=self.create_timeout_s,
            poll_s=self.poll_s,
            say=_changes(context.log),
        )
        cluster.usable = True
        context.log.info(f"cluster {cluster.name} is ready after {self._clock.time() - now:.0f} s")
        return cluster

    def _delete_predecessors(self, context: dg.AssetExecutionContext) -> None:
        """Delete clusters of runs that have ended, and wait for those to be gone whose job goes on.

        A run that was killed leaves such a one: its job may be writing the very partitions that this run is about to
        write, and two writers would leave rows twice. The sensor ``orphaned_clusters`` may come too late.

        Raises:
            DataprocError: one on which a job is at work cannot be deleted.
        """
        # Whose process is gone counts as running until somebody looks.
        fail_dead_runs(context.instance)
        for cluster in self.clusters():
            run = context.instance.get_run_by_id(cluster.labels.get("dagster-run-id", ""))
            if run is None or not run.is_finished:
                continue
            is_at_work = self._is_at_work(cluster.id)
            if cluster.status == "STOPPING" and not is_at_work:  # its run has just asked for that
                continue
            context.log.warning(f"deleting cluster {cluster.name} ({cluster.id}): its run {run.run_id} has ended")
            try:
                if is_at_work:
                    self.api.delete_cluster(
                        cluster.id, timeout_s=self.delete_timeout_s, poll_s=self.poll_s, say=_changes(context.log)
                    )
                else:
                    self.api.request_deletion(cluster.id)
            except DataprocError as error:
                if is_at_work:
                    raise
                context.log.error(f"it is left to the sensor orphaned_clusters: {error}")

    def _is_at_work(self, cluster_id: str) -> bool:
        """Whether a cluster has a job that has not ended."""
        try:
            return any(job.status not in FINISHED_JOB for job in self.api.list_jobs(cluster_id))
        except DataprocError as error:
            if error.code == "NOT_FOUND":  # it is gone
                return False
            raise

    def _sized(self, context: dg.AssetExecutionContext, job: str, rows: int) -> ClusterSpec:
        """What the cluster is made of, with as many nodes as the work needs where the settings leave a choice.

        The choice is between numbers of data nodes. Of compute nodes that scale it is the number to begin with.
        """
        spec = self.spec
        role, least, most = "data", spec.data_count, max(spec.data_count, self.data_max_count)
        if spec.compute_max_count and not self.data_max_count:
            role, least, most = "compute", spec.compute_count, min(spec.compute_max_count, 32)
        cores = cores_of(getattr(spec, f"{role}_preset"))
        if least == most or not rows or cores is None:
            return spec
        sizing = choose_nodes(job, rows, cores=cores, least=least, most=most, target_s=self.target_s)
        context.log.info(f"the cluster gets {role} nodes: {sizing.reason}")
        return spec.model_copy(update={f"{role}_count": sizing.nodes})

    def _delete_own(self, log: Any) -> None:
        """Delete the run's cluster, if there is one; the request first, then the wait."""
        cluster = self._run
        if cluster is None:
            return
        cluster.usable = False
        try:
            # The answer to the create may have been lost with the id: the name is known.
            ids = [cluster.id] if cluster.id else self._ids_by_name(cluster)
            for cluster_id in ids:
                log.info(f"deleting cluster {cluster.name} ({cluster_id})")
                self.api.delete_cluster(
                    cluster_id, timeout_s=self.delete_timeout_s, poll_s=self.poll_s, say=_changes(log)
                )
                log.info(f"cluster {cluster.name} is deleted{self._summary(cluster)}")
            self._run = None
        except DataprocError as error:
            log.error(
                f"CLUSTER {cluster.name} ({cluster.id or 'id unknown'}) MAY STILL BE THERE AND COST MONEY: {error}. "
                "The sensor orphaned_clusters tries again; see `ml-platform clusters list`"
            )
            raise

    def _ids_by_name(self, cluster: _RunsCluster) -> list[str]:
        found = self.api.list_clusters(self.spec.folder_id, name=cluster.name)
        return [one.id for one in found if one.name == cluster.name and one.carries(cluster.labels)]

    # jobs

    def _library_uri(self, context: dg.AssetExecutionContext, lake: LakeResource) -> str | None:
        return lake.store.spark_uri(self._upload_library(lake))

    def _execute(
        self,
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        job: str,
        request: dict[str, Any],
        *,
        rows: int,
        label: str,
    ) -> dict[str, Any]:
        code = self._upload_code(lake, job)
        cluster = self._cluster(context, job, rows)
        run_id = context.run.run_id
        files = {kind: job_file(run_id, job, label, kind) for kind in ("request.json", "report.json", "driver.log")}
        name = job_name(job, label, context.retry_number + 1)
        if context.retry_number:
            # What the try before this left is no report of this one.
            lake.write_json(files["report.json"], {})
        started = self._clock.time()
        job_id = self.api.submit_job(
            cluster.id,
            name,
            PysparkJob(
                main_python_file_uri=lake.store.spark_uri(f"{code}/{job}.py"),
                python_file_uris=[lake.store.spark_uri(f"{code}/{ARCHIVE_NAME}")],
                args=[
                    *("--request", lake.store.spark_uri(files["request.json"])),
                    *("--report", lake.store.spark_uri(files["report.json"])),
                ],
                properties={
                    **JOB_PROPERTIES,
                    **memory_properties(job, request.get("max_train_rows", MAX_TRAIN_ROWS)),
                    **self.job_properties,
                },
            ),
        )
        url = f"{self._cluster_url(cluster.id)}/jobs/{job_id}"
        context.log.info(f"job {name} ({job_id}) submitted: {url}")
        expected = expected_seconds(job, rows, cluster.cores())
        cluster.jobs.append({"name": name, "id": job_id, "url": url, "rows": rows, "expected_seconds": expected})
        finished = self._follow(context, lake, cluster, job_id, name, files["driver.log"])
        cluster.jobs[-1]["seconds"] = round(self._clock.time() - started, 1)
        context.add_asset_metadata(self._metadata(cluster))
        if finished.status != "DONE":
            raise dg.Failure(
                f"job {name} ended as {finished.status}; its driver log is in "
                f"{lake.store.spark_uri(files['driver.log'])}",
                metadata={"job": dg.MetadataValue.url(url)},
                allow_retries=False,
            )
        try:
            return lake.read_json(files["report.json"])
        except (FileNotFoundError, ValueError) as error:
            raise dg.Failure(
                f"job {name} is DONE, but left no readable report in {lake.store.spark_uri(files['report.json'])} "
                f"({type(error).__name__}), so it counts as failed; its driver log is in "
                f"{lake.store.spark_uri(files['driver.log'])}",
                allow_retries=False,
            ) from None

    def _follow(
        self,
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        cluster: _RunsCluster,
        job_id: str,
        name: str,
        log_file: str,
    ) -> Job:
        """Wait for a job's end, its driver log in the run's log; cancel it if it takes too long, or on interrupt."""
        log = self.api.driver_log(cluster.id, job_id)
        text: list[str] = []
        say = _changes(context.log)

        def look() -> Job | None:
            try:
                job = self.api.get_job(cluster.id, job_id)
            except DataprocError as error:
                if error.code == "NOT_FOUND" and self.api.get_cluster(cluster.id) is None:
                    cluster.usable = False
                    raise DataprocError(f"cluster {cluster.id} is gone while its job {name} ran", "NOT_FOUND") from None
                raise
            say(f"job {name}: {job.status}{f', {job.yarn_application}' if job.yarn_application else ''}")
            self._forward(context, log, text)
            if job.status in FINISHED_JOB:
                return job
            found = self.api.get_cluster(cluster.id)
            if found is None or found.status in UNUSABLE:
                cluster.usable = False
                state = found.status if found else "gone"
                raise DataprocError(f"cluster {cluster.id} is {state} while its job {name} is {job.status}")
            return None

        left = cluster.expires_at - self._clock.time()
        timeout = min(self.job_timeout_s, left)
        finished = False
        try:
            found = self.api.wait(look, timeout_s=timeout, poll_s=self.poll_s, what=f"job {name} ({job_id})")
            finished = True
            return found
        finally:
            if not finished and cluster.usable:
                context.log.warning(f"cancelling job {name} ({job_id})")
                with contextlib.suppress(DataprocError):
                    self.api.cancel_job(cluster.id, job_id)
            with contextlib.suppress(Exception):
                self._forward(context, log, text)
                lake.store.write(log_file, "".join(text).encode())

    def _forward(self, context: dg.AssetExecutionContext, log: DriverLog, text: list[str]) -> None:
        try:
            new = log.read()
        except DataprocError as error:
            # The job's outcome does not hang on its log.
            context.log.debug(f"driver log: {error}")
            return
        text.append(new)
        for start in range(0, len(new), LOG_PIECE):
            context.log.info(printable(new[start : start + LOG_PIECE].rstrip("\n"), keep="\n\t"))

    def _upload_code(self, lake: LakeResource, job: str) -> str:
        """Directory in the lake with the code that jobs run.

        The library goes with the first job of a run, whether that needs it or not: a cluster without it is in vain.
        """
        archive = build_archive()
        directory = f"_code/{content_hash(archive)}"
        _upload(lake, f"{directory}/{ARCHIVE_NAME}", archive)
        _upload(lake, f"{directory}/{job}.py", main_file(job))
        self._upload_library(lake)
        return directory

    @staticmethod
    def _upload_library(lake: LakeResource) -> str:
        """Name in the lake of the archive of the learners' library."""
        name, content = library_archive()
        file = f"_code/{content_hash(content)}/{name}"
        _upload(lake, file, content)
        return file

    # what it took

    def _cluster_url(self, cluster_id: str) -> str:
        return f"{self.console_url}/folders/{self.spec.folder_id}/data-proc/cluster/{cluster_id}"

    def _usage(self, cluster: _RunsCluster) -> tuple[float, float | None]:
        """Node-hours since the cluster was asked for, and their price, None where the table lacks one."""
        hours = (self._clock.time() - cluster.asked_at) / HOUR_S
        nodes, price, known = 0, 0.0, bool(self.prices)
        for preset, disk_type, disk_size_gb, count, _ in cluster.spec.node_groups():
            nodes += count
            known = known and preset in self.prices and disk_type in self.prices
            price += count * (self.prices.get(preset, 0) + disk_size_gb * self.prices.get(disk_type, 0))
        return nodes * hours, price * hours if known else None

    def _summary(self, cluster: _RunsCluster) -> str:
        node_hours, price = self._usage(cluster)
        return f"; it took {node_hours:.2f} node-hours" + (
            f", {price:.2f} {self.currency}" if price is not None else ""
        )

    def _metadata(self, cluster: _RunsCluster) -> Mapping[str, Any]:
        node_hours, price = self._usage(cluster)
        metadata: dict[str, Any] = {
            "cluster_id": cluster.id,
            "cluster": dg.MetadataValue.url(self._cluster_url(cluster.id)),
            "cluster_nodes": dg.MetadataValue.json({group[-1]: group[-2] for group in cluster.spec.node_groups()}),
            "cluster_jobs": dg.MetadataValue.json(list(cluster.jobs)),
            "cluster_node_hours": round(node_hours, 3),
        }
        if price is not None:
            metadata["cluster_cost"] = round(price, 2)
            metadata["cluster_cost_currency"] = self.currency
        return metadata


def _upload(lake: LakeResource, file: str, content: bytes) -> None:
    """Write a file to the lake where it is not there yet, and read it back."""
    try:
        if lake.store.read(file) == content:
            return
    except FileNotFoundError:
        pass
    lake.store.write(file, content)
    if lake.store.read(file) != content:
        raise dg.Failure(f"{lake.store.spark_uri(file)} is not what was written there", allow_retries=False)


def _changes(log: Any) -> Any:
    """A function that logs a text if it is not the one before: transitions, not polls."""
    last: list[str] = []

    def say(text: str) -> None:
        if last != [text]:
            last[:] = [text]
            log.info(text)

    return say


def expired(cluster: Cluster, now: float | None = None) -> bool:
    """Whether a cluster's time is over. By our own clock, which wrote the label: the API's may differ."""
    try:
        return int(cluster.labels.get("expires-at", "")) < (time.time() if now is None else now)
    except ValueError:
        return False
