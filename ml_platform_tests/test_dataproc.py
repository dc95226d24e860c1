"""The cluster engine on the stand-in for the API: runs of real assets, and the faults that they may meet.

Whatever happens, the end is the same: no cluster, no half-written partition, and a recovery or a clear error.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.dataproc.api import cluster_name
from ml_platform.dataproc.engine import CLUSTER_ID_TAG, CLUSTER_NAME_TAG, JOB_PROPERTIES
from ml_platform.dataproc.orphans import delete_orphans, is_expired
from ml_platform.dataproc.sizing import expected_seconds
from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript, Outcome, Quotas
from ml_platform.dev.cloud.s3_server import LocalS3
from ml_platform.lake.reports import CleanedReport
from ml_platform.lake.resource import BYTES_PER_ROW, LakeResource
from ml_platform.lake.storage import LocalStore, StorageError
from ml_platform.operations.changes import UNDELETED_CLUSTER_TAG
from ml_platform.operations.dead_runs import PROCESS_TAG
from ml_platform.spark.code_archive import CodeArchiveError, build_archive, content_hash, library_archive
from ml_platform.spark.engine import job_file
from ml_platform_tests.fakes import local_path, put_raw, raw_spec, recorded
from ml_platform_tests.fakes_cloud import FakeClock, Platform, Result, ScriptedJobs, engine_of, platform_on

ROOT = Path(__file__).resolve().parent.parent
HOUR = 3600.0
RUN_ID = "7f9c24e5-1d3b-4c5a-9e8f-0a1b2c3d4e5f"

Arrange = Callable[[Platform], object]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def platform(tmp_path: Path, lake: LakeResource, instance: dg.DagsterInstance, clock: FakeClock) -> Iterator[Platform]:
    with platform_on(tmp_path / "cloud", lake, instance, clock) as platform:
        yield platform


def succeed(platform: Platform, *assets: str, **options: Any) -> Result:
    """A run that must succeed."""
    result = platform.run(*assets, **options)
    assert result.success, result.errors
    return result


def deletions(platform: Platform) -> dict[str, float]:
    """When the deletion of each cluster was last asked for."""
    return {call["request"]["cluster_id"]: call["time"] for call in platform.cloud.calls("ClusterService.Delete")}


def driver_log(platform: Platform, result: Result) -> str:
    return platform.lake.store.read(job_file(result.run_id, "clean_transactions", "", "driver.log")).decode()


def leave(content: str | bytes) -> Arrange:
    """Let the next job end as DONE with `content` as its report."""

    def arrange(platform: Platform) -> None:
        def effect() -> None:
            job = platform.cloud.calls("JobService.Create")[-1]
            target = local_path(job["request"]["pyspark_job"]["args"][3])
            target.write_bytes(content if isinstance(content, bytes) else content.encode())

        platform.jobs.changes.append({"effect": effect})

    return arrange


def next_job(**changes: Any) -> Arrange:
    return lambda platform: platform.jobs.changes.append(changes)


def fail(method: str, code: str, **details: Any) -> Arrange:
    return lambda platform: platform.cloud.fail(method, code, **details)


def together(faults: Iterable[Arrange]) -> Arrange:
    """All of the faults in one run."""
    arranged = list(faults)
    return lambda platform: [arrange(platform) for arrange in arranged]


def fault(name: str, arrange: Arrange, *expected: Any, **settings: Any) -> Any:
    return pytest.param(arrange, *expected, settings, id=name)


# --- What a run does


#: Per hour of a host, and of a GB of disk.
PRICES = {"s3-c2-m8": 10, "s3-c4-m16": 20, "network-ssd": 0.02, "network-hdd": 0.005}


class TestARun:
    def test_its_steps_share_one_cluster_that_is_gone_afterwards(self, platform: Platform):
        result = succeed(platform, "cleaned_transactions", "transaction_features", keys=("a", "c"))
        assert platform.cleaned == ["a", "b", "c"]
        assert platform.jobs.names == ["clean_transactions", "build_features"]
        (created,) = platform.accepted("ClusterService.Create")
        assert [job["request"]["cluster_id"] for job in platform.cloud.calls("JobService.Create")] == [
            result.run.tags[CLUSTER_ID_TAG]
        ] * 2
        assert created["name"] == result.run.tags[CLUSTER_NAME_TAG]
        assert len(platform.accepted("ClusterService.Delete")) == 1
        assert platform.cloud.clusters == {}

    def test_a_run_without_work_makes_no_call(self, platform: Platform):
        succeed(platform)
        calls = len(platform.cloud.journal)
        # Everything is clean: the asset has no job for Spark.
        succeed(platform)
        assert len(platform.cloud.journal) == calls

    @pytest.mark.parametrize(
        ("settings", "role", "hosts"),
        [
            pytest.param({}, "data", 3, id="the number is fixed by default"),
            pytest.param({"data_max_count": 9}, "data", 3, id="little work"),
            pytest.param({"data_max_count": 9, "target_s": 1e-9}, "data", 9, id="more work than fits the time"),
            pytest.param(
                {"cluster": {"compute_count": 1, "compute_max_count": 6}, "target_s": 1e-9},
                *("compute", 6),
                id="compute nodes that scale begin with what the work needs",
            ),
        ],
    )
    def test_the_number_of_nodes_follows_the_work(
        self, platform: Platform, settings: dict[str, Any], role: str, hosts: int
    ):
        result = succeed(platform, **settings)
        (created,) = platform.accepted("ClusterService.Create")
        hosts_of = {one["name"]: int(one["hosts_count"]) for one in created["config_spec"]["subclusters_spec"]}
        assert hosts_of[role] == hosts
        metadata = recorded(platform.instance, "cleaned_transactions")["a"]
        assert metadata["cluster_nodes"] == hosts_of
        (job,) = metadata["cluster_jobs"]
        assert job["rows"] > 0
        assert job["expected_seconds"] > 0
        assert job["seconds"] > 0
        chosen = [line for line in result.log if "the cluster gets" in line]
        assert len(chosen) == (1 if set(settings) - {"cluster"} else 0), chosen

    def test_opening_the_resource_makes_no_cluster(self, platform: Platform):
        # `dagster job execute` opens a run's resources twice.
        engine = platform.engine()
        for _ in range(2):
            context = dg.build_init_resource_context(instance=platform.instance)
            with engine.yield_for_execution(context):
                pass
        assert platform.cloud.journal == []

    def test_the_clusters_name_and_id_are_recorded_before_the_wait(self, platform: Platform):
        tags: list[dict[str, str]] = []

        def look(request: Any) -> bool:
            run = platform.instance.get_run_by_id(RUN_ID)
            assert run is not None
            tags.append(dict(run.tags))
            return False

        platform.cloud.fail("ClusterService.Create", "INTERNAL", when=look)
        platform.cloud.fail("ClusterService.Get", "INTERNAL", when=look)
        succeed(platform, run_id=RUN_ID)
        name = cluster_name("test", RUN_ID, 1)
        assert [found.get(CLUSTER_NAME_TAG) for found in tags[:2]] == [name, name]
        (cluster_id,) = {found[CLUSTER_ID_TAG] for found in tags[1:]}
        assert CLUSTER_ID_TAG not in tags[0]
        assert platform.accepted("ClusterService.Delete") == [{"cluster_id": cluster_id}]

    def test_metadata_of_a_step(self, platform: Platform):
        result = platform.run(prices=PRICES, currency="EUR", poll_s=10)
        metadata = recorded(platform.instance, "cleaned_transactions", result.run_id)["a"]
        url = f"https://console.yandex.cloud/folders/{platform.cloud.folder_id}/data-proc/cluster"
        cluster_id = result.run.tags[CLUSTER_ID_TAG]
        assert metadata["cluster_id"] == cluster_id
        assert metadata["cluster"] == f"{url}/{cluster_id}"
        ((job_id, record),) = platform.cloud.jobs.items()
        (job,) = metadata["cluster_jobs"]
        assert job == {
            "name": record.proto.name,
            "id": job_id,
            "url": f"{url}/{cluster_id}/jobs/{job_id}",
            "rows": platform.lake.list_raw_files()[0]["a"].size // BYTES_PER_ROW,
            # Three nodes of four cores.
            "expected_seconds": expected_seconds("clean_transactions", job["rows"], 12),
            "seconds": job["seconds"],
        }
        assert 70 <= job["seconds"] <= 70 + 12
        hours = metadata["cluster_node_hours"] / 4
        assert (60 + 70) / HOUR <= hours <= (60 + 70 + 30) / HOUR
        # One master with 40 GB, three nodes with 128 GB.
        per_hour = 10 + 40 * 0.02 + 3 * (20 + 128 * 0.005)
        assert metadata["cluster_cost"] == pytest.approx(per_hour * hours, abs=0.02)
        assert metadata["cluster_cost_currency"] == "EUR"
        assert any(re.search(r"is deleted; it used 0\.\d\d node-hours, \d\.\d\d EUR", line) for line in result.log)

    @pytest.mark.parametrize(
        "changes",
        [
            {"prices": {}},
            {"prices": {"s3-c2-m8": 10.0, "network-ssd": 0.02}},
            {"prices": PRICES, "cluster": {"compute_count": 1, "compute_max_count": 6}},
        ],
        ids=["no table", "gaps", "unknown number of nodes"],
    )
    def test_unknown_prices_give_no_cost(self, platform: Platform, changes: dict[str, Any]):
        result = platform.run(**changes)
        metadata = recorded(platform.instance, "cleaned_transactions", result.run_id)["a"]
        assert metadata["cluster_node_hours"] > 0
        assert "cluster_cost" not in metadata

    def test_the_driver_log_is_followed_and_kept(self, platform: Platform):
        lines = [(second, f"line at {second}\n") for second in range(0, 60, 15)]
        platform.jobs.changes.append({"log": lines})
        result = platform.run(poll_s=10)
        assert driver_log(platform, result) == "".join(text for _, text in lines)
        log = result.log
        positions = [log.index(f"line at {second}") for second, _ in lines]
        done = next(index for index, line in enumerate(log) if re.match(r"job .*: DONE", line))
        assert positions == sorted(positions)
        assert positions[-1] < done + 2
        running = [line for line in log if re.match(r"job \S+: RUNNING", line)]
        assert len(running) == 1, "transitions, not polls"

    def test_a_huge_driver_log_is_kept_whole(self, platform: Platform):
        text = "".join(f"{number:07} héllo\n" for number in range(100_000))
        platform.jobs.changes.append({"log": text})
        result = succeed(platform)
        assert driver_log(platform, result) == text
        assert max(map(len, result.log)) <= 20_000

    def test_a_job_gets_its_code_request_and_properties(self, platform: Platform):
        result = platform.run(job_properties={"spark.executor.memory": "3g"})
        (job,) = platform.accepted("JobService.Create")
        directory = f"{platform.lake.store.spark_uri('_code')}/{content_hash(build_archive())}"
        files = f"{platform.lake.store.spark_uri('_runs')}/{result.run_id}/clean_transactions"
        assert job["name"] == "clean-transactions-1"
        assert job["pyspark_job"] == {
            "main_python_file_uri": f"{directory}/clean_transactions.py",
            "python_file_uris": [f"{directory}/spark_jobs.zip"],
            "args": ["--request", f"{files}.request.json", "--report", f"{files}.report.json"],
            "properties": {**JOB_PROPERTIES, "spark.executor.memory": "3g"},
        }

    def test_code_is_uploaded_once(self, platform: Platform):
        succeed(platform)
        code = local_path(platform.lake.store.spark_uri("_code"))
        files = {path: path.stat().st_mtime_ns for path in code.glob("*/*")}
        jobs, (name, content) = content_hash(build_archive()), library_archive()
        # The first job does not need the library; it is uploaded now so that a run that lacks it fails early.
        assert {str(path.relative_to(code)) for path in files} == {
            f"{jobs}/spark_jobs.zip",
            f"{jobs}/clean_transactions.py",
            f"{content_hash(content)}/{name}",
        }
        assert (code / content_hash(content) / name).read_bytes() == content
        platform.advance(10)
        succeed(platform, keys=("b", "b"))
        assert {path: path.stat().st_mtime_ns for path in code.glob("*/*")} == files

    def test_without_the_library_no_cluster_is_made(self, platform: Platform, monkeypatch: pytest.MonkeyPatch):
        def missing() -> None:
            raise CodeArchiveError("clusters need xgboost-cpu==2.1.4 for Linux on x86_64")

        monkeypatch.setattr("ml_platform.dataproc.engine.library_archive", missing)
        result = platform.run()
        assert not result.success
        assert "clusters need xgboost-cpu==2.1.4" in result.errors
        assert platform.accepted("ClusterService.Create") == []

    def test_damaged_code_is_uploaded_again(self, platform: Platform):
        directory = local_path(platform.lake.store.spark_uri(f"_code/{content_hash(build_archive())}"))
        directory.mkdir(parents=True)
        (directory / "spark_jobs.zip").write_bytes(b"half an upl")
        succeed(platform)
        assert (directory / "spark_jobs.zip").read_bytes() == build_archive()


# --- Faults that a run survives


def vanish_at_end(platform: Platform) -> None:
    def vanish(request: Any) -> bool:
        platform.cloud.vanish(request.cluster_id)
        return False

    platform.cloud.fail("ClusterService.Delete", "INTERNAL", when=vanish)


def log_pages(answer: Callable[[Any], Any]) -> Arrange:
    """Let the API answer with `answer(page)`, to page tokens as well, which the stand-in itself would refuse."""

    def arrange(platform: Platform) -> None:
        for when in (None, lambda request: bool(request.page_token)):
            platform.cloud.answer("JobService.ListLog", lambda _, page: answer(page), times=1000, when=when)

    return arrange


SURVIVED = [
    # A short outage of any method must not cost a run.
    fault(
        "each method unavailable for 3 calls",
        together(
            fail(method, "UNAVAILABLE", times=3)
            for method in (
                *("ApiEndpointService.List", "IamTokenService.Create", "OperationService.Get"),
                *("ClusterService.Create", "ClusterService.Get", "ClusterService.Delete"),
                *("JobService.List", "JobService.Create", "JobService.Get"),
            )
        ),
    ),
    # The calls worked, but their answers were lost: the next call must find what the first has made.
    *[
        fault(f"answers lost: {code}", together(fail(method, code, after=True) for method in methods))
        for code, *methods in (
            ("UNAVAILABLE", "ClusterService.Create", "JobService.Create", "ClusterService.Delete"),
            ("DEADLINE_EXCEEDED", "ClusterService.Create", "JobService.Create"),
            ("INTERNAL", "ClusterService.Create"),
        )
    ],
    # Only the operation says why a creation failed, but the cluster's state says that it did.
    fault("operations may not be read", fail("OperationService.Get", "PERMISSION_DENIED", times=1000)),
    # A job's outcome does not depend on its log.
    fault("no log page", fail("JobService.ListLog", "NOT_FOUND", times=1000)),
    fault("log pages unavailable for a while", fail("JobService.ListLog", "UNAVAILABLE", times=3)),
    fault("a log page that leads to itself", log_pages(lambda page: type(page)(content="x", next_page_token="again"))),
    fault("a log page that shrinks", log_pages(lambda page: type(page)(content=page.content[:3]))),
    fault("a garbled log page", log_pages(lambda page: type(page)(content="\x00\ufffd\x1b[31m" + page.content))),
    fault("deletion refused twice", fail("ClusterService.Delete", "INTERNAL", times=2)),
    fault("deletion conflicts twice", fail("ClusterService.Delete", "FAILED_PRECONDITION", times=2)),
    fault("deletion fails twice", lambda p: p.cloud.script_delete(Outcome(error="INTERNAL"), times=2)),
    fault("deleted by another program meanwhile", vanish_at_end),
    # Signed in by the key, the client gets itself another token.
    fault("token expires during the run", next_job(seconds=3 * HOUR), poll_s=120),
]


@pytest.mark.parametrize(("arrange", "settings"), SURVIVED)
def test_a_run_survives(platform: Platform, arrange: Arrange, settings: dict[str, Any]):
    arrange(platform)
    succeed(platform, **settings)
    assert platform.cloud.clusters == {}
    assert platform.cleaned == ["a"]
    assert len(platform.accepted("ClusterService.Create")) <= 1
    assert len(platform.cloud.jobs) == 1


def test_the_log_tells_of_a_cluster_found_after_a_lost_answer(platform: Platform):
    platform.cloud.fail("ClusterService.Create", "UNAVAILABLE", after=True)
    result = platform.run()
    assert [call["code"] for call in platform.cloud.calls("ClusterService.Create")] == ["UNAVAILABLE", "ALREADY_EXISTS"]
    assert any("found from an earlier call" in line for line in result.log)


# --- Faults that end a run


def creation(**outcome: Any) -> Arrange:
    return lambda platform: platform.cloud.script_create(Outcome(**outcome))


FATAL = [
    fault(
        "quota",
        lambda p: setattr(p.cloud, "quotas", Quotas(hosts=2)),
        "RESOURCE_EXHAUSTED: The limit on maximum number of hosts.*request an increase",
    ),
    fault("create denied", fail("ClusterService.Create", "PERMISSION_DENIED"), "create .*PERMISSION_DENIED.*roles"),
    *[
        fault(f"{method} unavailable for good", fail(method, "UNAVAILABLE", times=1000), "UNAVAILABLE.*YC_API_ENDPOINT")
        for method in ("ClusterService.Create", "ApiEndpointService.List")
    ],
    fault(
        "creation fails",
        creation(error="INTERNAL", message="no hosts left in zone"),
        r"could not be created: no hosts left in zone \(its state: ERROR\)",
    ),
    fault(
        "the answer to a create is lost, and the creation fails",
        lambda p: (
            creation(seconds=0, error="INTERNAL")(p),
            p.cloud.fail("ClusterService.Create", "UNAVAILABLE", after=True),
        ),
        r"could not be created: the API does not say why \(its state: ERROR\)",
    ),
    fault("cluster breaks at once", creation(error_after=0), r"could not be created: .* \(its state: ERROR\)"),
    fault("cluster gone at once", creation(vanish_after=0), r"could not be created: .* \(its state: gone\)"),
    # The creation is seen up to 36 s late (the longest pause), and the job ends 70 s after that at the earliest.
    fault("cluster breaks under a job", creation(error_after=60), "job clean-transactions-1 ended as ERROR"),
    fault("cluster gone under a job", creation(vanish_after=60), "is gone while its job clean-transactions-1 is gone"),
    fault(
        "a cluster in an unknown state",
        lambda p: p.cloud.answer("ClusterService.Get", lambda request, found: with_status(found, 77)),
        r"could not be created: .* \(its state: 77\)",
    ),
    fault(
        "a job in an unknown state",
        lambda p: p.cloud.answer("JobService.Get", lambda request, found: with_status(found, 77)),
        "is in an unknown state: 77",
    ),
    fault(
        "an answer without the cluster's id",
        lambda p: p.cloud.answer("ClusterService.Create", lambda request, operation: type(operation)(id="x")),
        "the API's answer to ClusterService.Create has no cluster_id",
    ),
    fault("job fails", next_job(status="ERROR", effect=None), "job clean-transactions-1 ended as ERROR; .*driver.log"),
    fault("no report", next_job(effect=None), "is DONE, but left no readable report .*FileNotFoundError"),
    fault("half a report", leave('{"run_id": '), "is DONE, but left no readable report .*JSONDecodeError"),
    fault("a binary report", leave(b"\xff\xfe\x00"), "is DONE, but left no readable report"),
    fault("another run's report", leave('{"run_id": "other", "partitions": {}}'), "is not of this run"),
    fault("a report that is a list", leave("[]"), "is not of this run"),
]


def with_status(message: Any, status: int) -> Any:
    message = type(message).FromString(message.SerializeToString())
    message.status = status
    return message


@pytest.mark.parametrize(("arrange", "error", "settings"), FATAL)
def test_a_run_fails_clearly(platform: Platform, arrange: Arrange, error: str, settings: dict[str, Any]):
    arrange(platform)
    result = platform.run(**settings)
    assert not result.success
    assert re.search(error, result.errors), result.errors
    assert platform.cloud.clusters == {}
    assert platform.cleaned == []
    assert len(platform.accepted("ClusterService.Create")) <= 1


@pytest.mark.parametrize(
    ("settings", "longest"),
    [({"job_timeout_s": 1000}, 1000), ({"max_lifetime_s": 2 * HOUR, "poll_s": 120}, 2 * HOUR)],
    ids=["the job's own limit", "the lifetime of the cluster"],
)
def test_a_hanging_job_is_cancelled(platform: Platform, clock: FakeClock, settings: dict[str, Any], longest: float):
    platform.jobs.changes.append({"seconds": math.inf, "log": "before it hung\n"})
    started = clock.time()
    result = platform.run(**settings)
    assert re.search(r"timed out after \d+ s waiting for job clean-transactions-1", result.errors), result.errors
    (job_id,) = platform.cloud.jobs
    (cancelled,) = platform.accepted("JobService.Cancel")
    assert cancelled["job_id"] == job_id
    # The cluster's lifetime includes its creation; then it has to be deleted.
    assert longest <= clock.time() - started <= longest + 180
    assert driver_log(platform, result) == "before it hung\n"
    assert platform.cloud.clusters == {}


@pytest.mark.parametrize("late", [True, False], ids=["deletable while creating", "not deletable while creating"])
def test_a_creation_that_takes_too_long_leaves_no_cluster(platform: Platform, late: bool):
    platform.cloud.delete_while_creating = late
    platform.cloud.script_create(Outcome(seconds=1000))
    result = platform.run(create_timeout_s=600)
    assert not result.success
    assert re.search("timed out after 600 s waiting for cluster .* to be created", result.errors)
    assert platform.cloud.clusters == {}


def test_a_deletion_that_is_denied_is_reported_and_left_to_the_sensor(platform: Platform):
    platform.cloud.fail("ClusterService.Delete", "PERMISSION_DENIED", "no right to delete")
    result = platform.run()
    (cluster_id,) = platform.cloud.clusters
    (error,) = [line for line in result.log if "MAY STILL BE THERE AND COST MONEY" in line]
    assert cluster_id in error
    assert "no right to delete" in error
    # Alerts tell it from here: the run itself has succeeded.
    (run,) = platform.instance.get_runs()
    assert re.fullmatch(rf"mlp-\S+ \({cluster_id}\): .*no right to delete.*", run.tags[UNDELETED_CLUSTER_TAG])
    assert platform.cleaned == ["a"]
    delete_orphans(platform.instance, platform.engine(), lambda: logging.getLogger("test"))
    platform.advance(platform.cloud.delete_seconds)
    assert platform.cloud.clusters == {}


def test_a_deletion_that_hangs_is_reported(platform: Platform):
    platform.cloud.script_delete(Outcome(seconds=10 * HOUR))
    result = platform.run()
    assert any("MAY STILL BE THERE AND COST MONEY" in line and "timed out after 900 s" in line for line in result.log)


@pytest.mark.parametrize(
    ("label", "code"),
    [
        *[(label, "") for label in ("owner", "deployment", "lake", "dagster-run-id")],
        pytest.param("dagster-run-id", "UNAVAILABLE", id="answer lost"),
    ],
)
def test_another_owners_cluster_of_the_same_name_is_left_alone(platform: Platform, label: str, code: str):
    taken = cluster_name("test", RUN_ID, 1)
    cluster_id = platform.cloud.add_cluster(taken, platform.engine().labels(RUN_ID, 0) | {label: "other"})
    if code:
        # It never learns whether the create worked: a cluster of this name need not be this run's.
        platform.cloud.fail("ClusterService.Create", code, times=1000)
    result = platform.run(run_id=RUN_ID)
    assert not result.success
    assert ("UNAVAILABLE" if code else f"the name {taken} is taken by a cluster that this run did not make") in (
        result.errors
    )
    assert list(platform.cloud.clusters) == [cluster_id]
    assert platform.cloud.calls("ClusterService.Delete") == []
    assert platform.cleaned == []


def left_over(platform: Platform, status: dg.DagsterRunStatus, *, job: str | None) -> str:
    """A cluster of another run of that status, perhaps with a job that is RUNNING or DONE."""
    platform.instance.add_run(dg.DagsterRun("process_new_files", run_id=RUN_ID, status=status))
    left = platform.cloud.add_cluster("mlp-before", platform.engine().labels(RUN_ID, time.time() + HOUR))
    if job:
        platform.cloud.run_job = lambda _: JobScript(seconds=math.inf if job == "RUNNING" else 1)
        platform.engine().api.submit_job(left, "of-before", {"main_python_file_uri": Path(__file__).as_uri()})
        platform.cloud.run_job = platform.jobs
        platform.advance(60)
        assert [found.state for found in platform.cloud.jobs.values()] == [job]
    return left


@pytest.mark.parametrize(
    ("status", "job", "is_deleted"),
    [
        (dg.DagsterRunStatus.FAILURE, "RUNNING", True),
        (dg.DagsterRunStatus.FAILURE, "DONE", True),
        (dg.DagsterRunStatus.SUCCESS, None, True),
        (dg.DagsterRunStatus.STARTED, "RUNNING", False),
    ],
    ids=["ended, its job goes on", "ended with its job", "ended without a job", "running"],
)
def test_a_cluster_of_an_ended_run_is_deleted_and_waited_for_if_it_runs_a_job(
    platform: Platform, status: dg.DagsterRunStatus, job: str | None, is_deleted: bool
):
    left = left_over(platform, status, job=job)
    succeed(platform)
    (created,) = platform.cloud.calls("ClusterService.Create")
    deleted = deletions(platform)
    if is_deleted:
        assert platform.cloud.clusters == {}
        waited = deleted[left] + platform.cloud.delete_seconds <= created["time"]
        assert waited == (job == "RUNNING")
    else:
        assert list(platform.cloud.clusters) == [left]
        assert left not in deleted


def test_the_cluster_of_a_run_whose_process_is_gone_is_deleted(platform: Platform):
    """The run still counts as started."""
    left = left_over(platform, dg.DagsterRunStatus.STARTED, job="RUNNING")
    platform.instance.add_run_tags(RUN_ID, {PROCESS_TAG: f"{socket.gethostname()}:{2**22}:1"})
    succeed(platform)
    assert platform.cloud.clusters == {}
    assert left in deletions(platform)


def test_a_cluster_that_its_ended_run_is_deleting_is_left_alone(platform: Platform):
    left = left_over(platform, dg.DagsterRunStatus.SUCCESS, job="DONE")
    platform.engine().api.request_deletion(left)
    succeed(platform)
    requests = [call["request"]["cluster_id"] for call in platform.cloud.calls("ClusterService.Delete")]
    assert requests.count(left) == 1


@pytest.mark.parametrize("job", ["RUNNING", "DONE"])
def test_an_undeletable_cluster_stops_a_run_only_while_its_job_runs(platform: Platform, job: str):
    """Its running job may still write; without one, the cluster only costs money."""
    left = left_over(platform, dg.DagsterRunStatus.FAILURE, job=job)
    platform.cloud.fail(
        "ClusterService.Delete", "PERMISSION_DENIED", "not you", times=9, when=lambda call: call.cluster_id == left
    )
    result = platform.run()
    assert result.success is (job == "DONE"), result.errors
    assert len(platform.accepted("ClusterService.Create")) == (1 if job == "DONE" else 0)
    assert platform.cleaned == (["a"] if job == "DONE" else [])
    assert list(platform.cloud.clusters) == [left]


def refuse(monkeypatch: pytest.MonkeyPatch, verb: str, names: str) -> None:
    """Let the lake refuse the files whose names match."""
    method = {"GetObject": "read", "PutObject": "write"}[verb]
    allowed = getattr(LocalStore, method)

    def call(store: LocalStore, name: str, *content: bytes) -> Any:
        if re.search(names, name):
            raise StorageError(f"S3 denies {verb} on s3://lake/{name}")
        return allowed(store, name, *content)

    monkeypatch.setattr(LocalStore, method, call)


@pytest.mark.parametrize(
    ("verb", "names", "clusters"),
    [
        # No cluster is created that could not be used.
        ("PutObject", "request.json", 0),
        ("PutObject", "spark_jobs.zip", 0),
        ("PutObject", "clean_transactions.py", 0),
        ("GetObject", "spark_jobs.zip", 0),
        # After the job, whose work then does not count for the step.
        ("GetObject", "_runs/.*report.json", 1),
    ],
)
def test_a_file_that_s3_refuses_fails_the_run_and_leaves_no_cluster(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, verb: str, names: str, clusters: int
):
    refuse(monkeypatch, verb, names)
    result = platform.run()
    assert not result.success
    assert f"StorageError: S3 denies {verb}" in result.errors
    assert len(platform.accepted("ClusterService.Create")) == clusters
    assert platform.cloud.clusters == {}


def test_a_run_survives_a_driver_log_that_s3_refuses(platform: Platform, monkeypatch: pytest.MonkeyPatch):
    refuse(monkeypatch, "PutObject", "driver.log")
    result = succeed(platform)
    assert any(line.startswith("the driver log cannot be kept: S3 denies PutObject") for line in result.log)


def s3_lake(s3_server: LocalS3, lake: LakeResource, monkeypatch: pytest.MonkeyPatch, bucket: str) -> LakeResource:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return LakeResource(raw_uri=lake.raw_uri, lake_uri=f"s3://{bucket}/lake", epoch=lake.epoch)


def test_a_missing_bucket_is_named_before_any_call(
    platform: Platform, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch
):
    result = platform.run(lake=s3_lake(s3_server, platform.lake, monkeypatch, "nobodys-bucket"))
    assert not result.success
    assert "bucket nobodys-bucket does not exist: create it" in result.errors
    assert platform.cloud.journal == []


def test_a_bucket_that_vanished_under_the_job_is_named(
    platform: Platform, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch
):
    bucket, client = "gone-while-the-job-ran", s3_server.client()
    client.create_bucket(Bucket=bucket)

    def effect() -> None:
        for item in client.list_objects_v2(Bucket=bucket)["Contents"]:
            client.delete_object(Bucket=bucket, Key=item["Key"])
        client.delete_bucket(Bucket=bucket)

    platform.jobs.changes.append({"effect": effect})
    result = platform.run(lake=s3_lake(s3_server, platform.lake, monkeypatch, bucket))
    assert not result.success
    assert f"bucket {bucket} does not exist" in result.errors
    assert platform.cloud.clusters == {}
    (job,) = platform.accepted("JobService.Create")
    main_file = f"s3a://{bucket}/lake/_code/{content_hash(build_archive())}/clean_transactions.py"
    assert job["pyspark_job"]["main_python_file_uri"] == main_file


# --- Who calls the API


def test_an_expired_token_is_named(platform: Platform):
    token = platform.cloud.iam_token()
    platform.jobs.changes.append({"seconds": 2 * HOUR})
    result = platform.run(service_account_key_file=None, iam_token=token, poll_s=120)
    assert not result.success
    assert re.search("UNAUTHENTICATED: The token has expired .*YC_IAM_TOKEN", result.errors)
    assert any("MAY STILL BE THERE" in line for line in result.log)
    # By another token, the sensor clears up.
    delete_orphans(platform.instance, platform.engine(), lambda: logging.getLogger("test"))
    platform.advance(platform.cloud.delete_seconds)
    assert platform.cloud.clusters == {}


@pytest.mark.parametrize("way", ["key", "token"])
def test_no_credential_leaves_the_process(
    platform: Platform,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    way: str,
):
    secret = "s3-secret-key-of-the-orchestrator"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    token = platform.cloud.iam_token()
    key = json.loads(platform.cloud.service_account_key_file.read_text())["private_key"]
    secrets = [secret, token, *[line for line in key.splitlines() if len(line) > 40 and "SA Key" not in line]]
    assert len(secrets) > 10
    caplog.set_level(logging.DEBUG)
    credentials = {"service_account_key_file": None, "iam_token": token} if way == "token" else {}
    good = platform.run(**credentials)
    platform.jobs.changes.append({"status": "ERROR", "effect": None})
    bad = platform.run(keys=("b", "b"), **credentials)
    assert (good.success, bad.success) == (True, False)
    tokens = set(platform.cloud.issued_tokens())
    assert token in tokens
    places = {
        "journal": json.dumps(platform.cloud.journal),
        "run": good.everything + bad.everything,
        "terminal": "".join(capfd.readouterr()),
        "log": caplog.text,
        **{
            str(path): path.read_text(errors="replace")
            for directory in ("lake", "raw")
            for path in (tmp_path / directory).rglob("*")
            if path.is_file()
        },
    }
    assert "clean-transactions-1" in places["journal"]
    assert "clean-transactions-1" in places["run"]
    assert "clean-transactions-1" in places["terminal"] + places["log"]
    found = {(secret[:12], place) for place, text in places.items() for secret in (*secrets, *tokens) if secret in text}
    assert found == set()


# --- Two at a time, clocks


def test_two_runs_at_the_same_time_have_a_cluster_each(tmp_path: Path, lake: LakeResource, clock: FakeClock):
    (tmp_path / "dagster").mkdir()
    with (
        dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance,
        platform_on(tmp_path / "cloud", lake, instance, clock) as platform,
    ):
        results: dict[str, Result] = {}

        def run(key: str) -> None:
            results[key] = platform.run(keys=(key, key))

        threads = [threading.Thread(target=run, args=[key]) for key in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [results[key].success for key in "ab"] == [True, True]
        assert platform.cleaned == ["a", "b"]
        clusters = {results[key].run.tags[CLUSTER_ID_TAG] for key in "ab"}
        assert len(clusters) == 2
        assert {request["cluster_id"] for request in platform.accepted("ClusterService.Delete")} == clusters
        assert platform.cloud.clusters == {}


@pytest.mark.parametrize("skew", [-86400.0, 86400.0], ids=["a day behind", "a day ahead"])
def test_the_api_may_have_another_clock(
    tmp_path: Path, lake: LakeResource, instance: dg.DagsterInstance, clock: FakeClock, skew: float
):
    settings = {"skew_seconds": skew, "token_lifetime_seconds": 100 * HOUR}
    with platform_on(tmp_path / "cloud", lake, instance, clock, **settings) as platform:
        # Signing in by key needs clocks that agree; a token does not.
        credentials = {"service_account_key_file": None, "iam_token": platform.cloud.iam_token()}
        engine = platform.engine(**credentials)
        name, labels = "left-over", engine.labels("some run", clock.time() + engine.max_lifetime_s)
        cluster_id, _ = engine.api.create_cluster(engine.spec, name, labels)
        (cluster,) = engine.clusters()
        end = clock.time() + engine.max_lifetime_s
        assert [is_expired(cluster, now) for now in (clock.time(), end - 10, end + 10)] == [False, False, True]
        engine.api.delete_cluster(cluster_id, timeout_s=900, poll_s=10, say=lambda text: None)
        succeed(platform, **credentials)
        assert platform.cloud.clusters == {}


# --- A process that is terminated or killed


class RunProcess:
    """A run in a process of its own, in real time, on a stand-in in this one."""

    def __init__(self, directory: Path, lake: LakeResource, cloud: FakeDataproc) -> None:
        self.lake, self.cloud = lake, cloud
        self.home = directory / "dagster"
        self.home.mkdir()
        put_raw(lake, "a", raw_spec(0))
        with self.instance() as instance:
            instance.add_dynamic_partitions("raw_files", ["a"])
        self.engine = engine_of(cloud, lake, poll_s=0.2)
        settings = {"lake": lake.model_dump(), "engine": self.engine.model_dump(), "run_id": RUN_ID}
        self.log = directory / "run.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ml_platform_tests.interrupted_run", json.dumps(settings)],
                cwd=ROOT,
                env={**os.environ, "DAGSTER_HOME": str(self.home)},
                stdout=log,
                stderr=log,
            )

    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.local_temp(str(self.home))

    def wait_until(self, what: str, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"timed out waiting until {what}: {self.log.read_text()}"
            time.sleep(0.02)

    def wait_for_clusters(self, *states: str) -> None:
        self.wait_until(
            f"clusters are {states}", lambda: tuple(one.state for one in self.cloud.clusters.values()) == states
        )

    def wait_for_no_cluster(self) -> None:
        """Also when the process has ended."""
        deadline = time.monotonic() + 20
        while self.cloud.clusters:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def send(self, number: int) -> int:
        """Send a signal and wait for the end; send it again if it was lost, as a user would. Returns how often."""
        deadline = time.monotonic() + 60
        sent = 0
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()
            if self.lost_signals() == sent:
                self.process.send_signal(number)
                sent += 1
            time.sleep(0.1)
        return sent

    def lost_signals(self) -> int:
        """How often Python dropped the exception of Dagster's signal handler, by the log.

        Python does so in finalizers and callbacks of weak references: seen in SQLAlchemy's, once in ten runs.
        """
        dropped = r"Exception ignored in.*\n(?:Traceback.*\n(?: .*\n)+)?dagster\S*DagsterExecutionInterruptedError"
        return len(re.findall(dropped, self.log.read_text()))

    def status(self) -> dg.DagsterRunStatus:
        with self.instance() as instance:
            run = instance.get_run_by_id(RUN_ID)
            assert run is not None
            return run.status


@pytest.fixture
def run_process(tmp_path: Path, lake: LakeResource) -> Iterator[Callable[..., RunProcess]]:
    started: list[RunProcess] = []
    with ExitStack() as stack:

        def start(**settings: Any) -> RunProcess:
            times: dict[str, Any] = {"create_seconds": 0.2, "delete_seconds": 0.2, "run_job": ScriptedJobs()}
            cloud = stack.enter_context(FakeDataproc(tmp_path / "cloud", **times | settings))
            started.append(RunProcess(tmp_path, lake, cloud))
            return started[-1]

        yield start
        for run in started:
            run.process.kill()
            run.process.wait()


def jobs_of(seconds: float) -> ScriptedJobs:
    jobs = ScriptedJobs()
    jobs.changes.append({"seconds": seconds})
    return jobs


#: Moments of a run: settings of the stand-in that make each last, and how to wait for it.
MOMENTS: dict[str, tuple[dict[str, Any], Callable[[RunProcess], None]]] = {
    "creating": (
        {"create_seconds": 1000, "delete_while_creating": True},
        lambda run: run.wait_for_clusters("CREATING"),
    ),
    "running": (
        {},
        lambda run: run.wait_until("the job is followed", lambda: run.cloud.calls("JobService.ListLog")),
    ),
    "deleting": ({"delete_seconds": 2}, lambda run: run.wait_for_clusters("STOPPING")),
}


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("creating", signal.SIGINT),
        ("running", signal.SIGTERM),
        ("deleting", signal.SIGTERM),
    ],
    ids=lambda value: value if isinstance(value, str) else signal.Signals(value).name,
)
def test_a_terminated_process_deletes_its_cluster(run_process: Callable[..., RunProcess], moment: str, number: int):
    settings, wait = MOMENTS[moment]
    run = run_process(**settings, run_job=jobs_of(0 if moment == "deleting" else math.inf))
    wait(run)
    sent = run.send(number)
    assert len(run.cloud.calls("ClusterService.Create")) == 1
    if moment == "deleting":
        # The deletion was requested before, and goes on without the process.
        run.wait_for_no_cluster()
        assert len(run.cloud.calls("ClusterService.Delete")) == 1
        assert list(run.lake.reports(CleanedReport)) == ["a"]
        # A run that lost every signal ends normally.
        expected = dg.DagsterRunStatus.SUCCESS if run.lost_signals() == sent else dg.DagsterRunStatus.FAILURE
        assert run.status() == expected, run.log.read_text()
    else:
        assert run.cloud.clusters == {}, run.log.read_text()
        assert run.status() in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
        assert run.lake.reports(CleanedReport) == {}
    if moment == "running":
        assert [call["code"] for call in run.cloud.calls("JobService.Cancel")] == ["OK"]


@pytest.mark.e2e
def test_the_cluster_of_a_killed_process_is_gone_within_two_ticks(run_process: Callable[..., RunProcess]):
    settings, wait = MOMENTS["running"]
    run = run_process(**settings, run_job=jobs_of(math.inf))
    wait(run)
    with run.instance() as instance:
        tick = lambda: delete_orphans(instance, run.engine, lambda: logging.getLogger("test"))  # noqa: E731
        # The run is alive: its cluster is not touched.
        assert tick() == "no orphans"
        run.process.kill()
        run.process.wait()
        assert len(run.cloud.clusters) == 1
        said = [tick(), tick()]
        assert "requested deletion of 1 clusters" in said[0]
        assert run.status() == dg.DagsterRunStatus.FAILURE
        run.wait_for_no_cluster()
        assert tick() == "no orphans"
        assert len(run.cloud.calls("ClusterService.Delete")) == 1
