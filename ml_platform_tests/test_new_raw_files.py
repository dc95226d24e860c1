"""The sensor, its twin the schedule, and the plan behind both, on fabricated lakes."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.remote_origin import (
    GrpcServerCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.storage.tags import AUTO_RETRY_RUN_ID_TAG, WILL_RETRY_TAG

from ml_platform import planning
from ml_platform.definitions import defs
from ml_platform.jobs import run_config
from ml_platform.lake.partitions import PARTITION_TAG, range_tags
from ml_platform.lake.reports import CLEANED_TABLE
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import StoredFile
from ml_platform.planning import plan_runs, run_requests
from ml_platform.sensors import new_raw_files, process_new_files_daily
from ml_platform.settings import SettingsError
from ml_platform_tests.fakes import cleaned_report, put_cleaned, put_raw, raw_spec
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION

Status = dg.DagsterRunStatus


def tick(instance: dg.DagsterInstance, lake: LakeResource) -> dg.SensorResult:
    """One tick of the sensor, with what the daemon does about its partitions."""
    context = dg.build_sensor_context(
        instance=instance, resources={"lake": lake}, repository_def=defs.get_repository_def()
    )
    result = new_raw_files(context)
    assert isinstance(result, dg.SensorResult)
    for request in result.dynamic_partitions_requests or []:
        instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
    return result


def ranges_of(requests: Any) -> list[tuple[str, str]]:
    for request in requests:
        assert set(request.tags) >= set(range_tags("", ""))
        assert request.run_key is None  # a key would keep a failed range from being asked for again
    return [tuple(request.tags[tag] for tag in range_tags("", "")) for request in requests]


def ticked(instance: dg.DagsterInstance, lake: LakeResource) -> list[tuple[str, str]]:
    return ranges_of(tick(instance, lake).run_requests or [])


def reason_of(result: dg.SensorResult) -> str:
    skip = result.skip_reason
    return (skip.skip_message if isinstance(skip, dg.SkipReason) else skip) or ""


def add_run(
    instance: dg.DagsterInstance,
    status: dg.DagsterRunStatus,
    start: str,
    end: str | None = None,
    job: str = "process_new_files",
    **more_tags: str,
) -> str:
    """A run of the past, over a range of partitions or a single one."""
    run_id = str(uuid.uuid4())
    tags = (range_tags(start, end) if end else {PARTITION_TAG: start}) | more_tags
    location = GrpcServerCodeLocationOrigin(host="localhost", port=1, location_name="ml_platform")
    origin = RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), job)
    instance.add_run(dg.DagsterRun(job_name=job, run_id=run_id, status=status, tags=tags, remote_job_origin=origin))
    return run_id


def log_of(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> str:
    """What a tick logged: Dagster's own loggers do not hand on to the root logger."""
    return caplog.text + capfd.readouterr().err


@pytest.fixture
def four(lake: LakeResource) -> list[str]:
    """Four raw files, nothing registered or cleaned."""
    keys = ["a", "b", "c", "d"]
    for number, key in enumerate(keys):
        put_raw(lake, key, raw_spec(number))
    return keys


@pytest.fixture
def done(instance: dg.DagsterInstance, lake: LakeResource, four: list[str]) -> list[str]:
    """Four raw files, registered and cleaned."""
    instance.add_dynamic_partitions("raw_files", four)
    put_cleaned(lake, *four)
    return four


class TestFirstTick:
    def test_registers_all_and_asks_for_one_run(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]
    ):
        result = tick(instance, lake)
        assert ranges_of(result.run_requests) == [("a", "d")]
        assert reason_of(result) == ""
        assert list(instance.get_dynamic_partitions("raw_files")) == four

    def test_observes_what_it_asks_for(self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]):
        """Before the run: Dagster calls an asset stale whose input was observed while it was made."""
        put_cleaned(lake, "b")
        events = tick(instance, lake).asset_events
        assert [event.partition for event in events] == ["a", "c", "d"]
        files, _ = lake.list_raw_files()
        for event in events:
            assert isinstance(event, dg.AssetObservation)
            file = files[event.partition or ""]
            assert event.asset_key == dg.AssetKey("raw_transactions")
            assert event.metadata["size_bytes"].value == file.size
            assert event.tags["dagster/data_version"] == file.fingerprint

    def test_one_run_per_contiguous_range(self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]):
        put_cleaned(lake, "b")
        assert ticked(instance, lake) == [("a", "a"), ("c", "d")]

    def test_no_raw_files(self, instance: dg.DagsterInstance, lake: LakeResource):
        result = tick(instance, lake)
        assert ranges_of(result.run_requests) == []
        assert reason_of(result).startswith("0 raw files")
        assert not result.dynamic_partitions_requests

    def test_the_range_means_these_partitions_to_dagster(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]
    ):
        (start, end) = ticked(instance, lake)[0]
        with dg.partition_loading_context(dynamic_partitions_store=instance):
            keys = dg.DynamicPartitionsDefinition(name="raw_files").get_partition_keys_in_range(
                dg.PartitionKeyRange(start, end)
            )
        assert list(keys) == four


class TestNothingNew:
    def test_skips_with_the_reason(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        result = tick(instance, lake)
        assert ranges_of(result.run_requests or []) == []
        assert reason_of(result) == "4 raw files, all have a cleaned counterpart"

    def test_storage_decides_not_dagsters_memory(
        self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]
    ):
        """Dagster remembers nothing of these partitions: the lake says that they are done, or not."""
        assert ticked(instance, lake) == []
        instance.report_runless_asset_event(dg.AssetMaterialization("cleaned_transactions", partition="b"))
        (lake.store._root / lake.partition_path(CLEANED_TABLE, "b") / REPORT_NAME).unlink()  # type: ignore[attr-defined]
        assert ticked(instance, lake) == [("b", "b")]

    def test_a_vanished_raw_file_leaves_its_partition_alone(
        self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]
    ):
        (lake.raw._root / "b.txt").unlink()  # type: ignore[attr-defined]
        assert ticked(instance, lake) == []
        assert "b" in instance.get_dynamic_partitions("raw_files")


class TestOnePartitionAlone:
    def test_new_file(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        put_raw(lake, "e", raw_spec(4))
        assert ticked(instance, lake) == [("e", "e")]
        assert list(instance.get_dynamic_partitions("raw_files")) == [*done, "e"]

    def test_replaced_raw_file(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        put_raw(lake, "c", raw_spec(2, rows=17))
        assert ticked(instance, lake) == [("c", "c")]

    def test_replaced_by_a_file_of_the_same_size(
        self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]
    ):
        put_raw(lake, "c", raw_spec(2, frauds=300))
        assert ticked(instance, lake) == [("c", "c")]

    def test_other_epoch(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        put_cleaned(lake, "b", epoch="2019-08-22")
        assert ticked(instance, lake) == [("b", "b")]

    def test_changed_epoch_changes_all(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        other = LakeResource(raw_uri=lake.raw_uri, lake_uri=lake.lake_uri, epoch="2018-04-01")
        assert ticked(instance, other) == [("a", "d")]

    @pytest.mark.parametrize(
        "changes",
        [
            {"schema_version": None},
            {"schema_version": str(SCHEMA_VERSION)},
            {"schema_version": True},
            {"schema_version": 0},
            {"schema_version": -1},
            {"schema_version": SCHEMA_VERSION + 0.5},
            {"schema_version": [SCHEMA_VERSION]},
            {"raw": {}},
            {"raw": None},
            {"counts": []},
            {"tx_datetime": {"min": "yesterday", "max": "tomorrow"}},
            {"tx_datetime": {"min": "2020-01-01T00:00:00Z", "max": None}},
            {"transaction_id": {"min": "1", "max": 2}},
            {"epoch": None},
        ],
        ids=str,
    )
    def test_report_that_does_not_fit(
        self,
        instance: dg.DagsterInstance,
        lake: LakeResource,
        done: list[str],
        changes: dict[str, Any],
    ):
        put_cleaned(lake, "d", **changes)
        assert ticked(instance, lake) == [("d", "d")]

    def test_half_a_report(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        name = f"{lake.partition_path(CLEANED_TABLE, 'a')}/{REPORT_NAME}"
        lake.store.write(name, lake.store.read(name)[:100])
        assert ticked(instance, lake) == [("a", "a")]


def test_late_file_is_registered_after_its_neighbours(
    instance: dg.DagsterInstance, lake: LakeResource, done: list[str]
):
    """Dagster's ranges follow the order of registration, not that of names."""
    put_raw(lake, "bb", raw_spec(10))
    assert ticked(instance, lake) == [("bb", "bb")]
    assert list(instance.get_dynamic_partitions("raw_files")) == [*done, "bb"]
    for key in ("b", "d"):
        put_raw(lake, key, raw_spec(5, rows=1))
    assert ticked(instance, lake) == [("b", "b"), ("d", "bb")]
    put_cleaned(lake, "b", "bb")
    put_raw(lake, "c", raw_spec(6, rows=2))
    assert ticked(instance, lake) == [("c", "d")]


class TestUnusableNames:
    @pytest.fixture
    def odd(self, lake: LakeResource) -> None:
        for name in ("two words.txt", "a...b.txt", "_draft.txt"):
            lake.raw.write(name, b"x")

    def test_are_named_in_the_log_and_the_reason(
        self,
        instance: dg.DagsterInstance,
        lake: LakeResource,
        done: list[str],
        odd: None,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ):
        result = tick(instance, lake)
        assert ranges_of(result.run_requests or []) == []
        assert "3 ignored for their names: _draft.txt, a...b.txt, two words.txt" in reason_of(result)
        log = log_of(caplog, capfd)
        for name in ("'two words.txt': only letters", "'a...b.txt': '...'", "'_draft.txt': it starts"):
            assert f"ignored raw file {name}" in log

    def test_do_not_stop_the_others(self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str], odd: None):
        assert ticked(instance, lake) == [("a", "d")]
        assert list(instance.get_dynamic_partitions("raw_files")) == four


class TestActiveRuns:
    @pytest.mark.parametrize(
        "status",
        [Status.QUEUED, Status.NOT_STARTED, Status.STARTING, Status.STARTED, Status.CANCELING],
    )
    def test_their_partitions_are_left_to_them(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str], status: dg.DagsterRunStatus
    ):
        instance.add_dynamic_partitions("raw_files", four)
        add_run(instance, status, "b", "c")
        assert ticked(instance, lake) == [("a", "a"), ("d", "d")]

    def test_all_are_active(self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]):
        instance.add_dynamic_partitions("raw_files", four)
        add_run(instance, Status.STARTED, "a", "b")
        add_run(instance, Status.QUEUED, "c")
        add_run(instance, Status.QUEUED, "d")
        result = tick(instance, lake)
        assert ranges_of(result.run_requests or []) == []
        assert reason_of(result) == "4 raw files, 4 are in a queued or running run"

    def test_runs_of_other_jobs_count_too(self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]):
        """`dagster asset materialize` and the UI run a job of Dagster's own."""
        instance.add_dynamic_partitions("raw_files", four)
        add_run(instance, Status.STARTED, "a", "c", job="__ASSET_JOB")
        assert ticked(instance, lake) == [("d", "d")]

    def test_a_second_tick_before_the_first_ones_run_ends(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]
    ):
        (first,) = ticked(instance, lake)
        add_run(instance, Status.QUEUED, *first)
        assert ticked(instance, lake) == []
        put_raw(lake, "e", raw_spec(4))
        assert ticked(instance, lake) == [("e", "e")]

    def test_a_run_that_waits_in_the_queue_for_long_still_counts(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str], monkeypatch: pytest.MonkeyPatch
    ):
        """One run at a time, hours each: a backlog waits for more than a day."""
        instance.add_dynamic_partitions("raw_files", four)
        add_run(instance, Status.QUEUED, "a", "d")

        class Later(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz) + timedelta(days=2)

        monkeypatch.setattr(planning, "datetime", Later)
        assert ticked(instance, lake) == []

    def test_a_run_over_partitions_that_are_gone(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]
    ):
        instance.add_dynamic_partitions("raw_files", four)
        add_run(instance, Status.STARTED, "gone", "b")
        instance.add_run(dg.DagsterRun(job_name="other", run_id=str(uuid.uuid4()), status=Status.STARTED))
        assert ticked(instance, lake) == [("a", "d")]


class TestRetriedRuns:
    """Dagster's daemon starts a killed run again; until it has, the run counts as one that waits."""

    def test_their_partitions_are_left_to_the_retry(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]
    ):
        instance.add_dynamic_partitions("raw_files", four)
        add_run(instance, Status.FAILURE, "a", "b", **{WILL_RETRY_TAG: "true"})
        assert ticked(instance, lake) == [("c", "d")]

    def test_there_will_be_no_retry(self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]):
        instance.add_dynamic_partitions("raw_files", four)
        add_run(instance, Status.FAILURE, "a", "b", **{WILL_RETRY_TAG: "false"})
        add_run(instance, Status.FAILURE, "a", "b", **{WILL_RETRY_TAG: "true", AUTO_RETRY_RUN_ID_TAG: "its retry"})
        # The daemon starts no run of a command line again.
        by_hand = range_tags("a", "b") | {WILL_RETRY_TAG: "true"}
        instance.add_run(dg.DagsterRun("process_new_files", str(uuid.uuid4()), status=Status.FAILURE, tags=by_hand))
        assert ticked(instance, lake) == [("a", "d")]

    def test_nobody_has_retried_it(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str], monkeypatch: pytest.MonkeyPatch
    ):
        instance.add_dynamic_partitions("raw_files", four)
        add_run(instance, Status.FAILURE, "a", "b", **{WILL_RETRY_TAG: "true"})

        class Later(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz) + timedelta(minutes=6)

        monkeypatch.setattr(planning, "datetime", Later)
        assert ticked(instance, lake) == [("a", "d")]


class TestFailedRuns:
    @pytest.mark.parametrize("status", [Status.FAILURE, Status.CANCELED])
    def test_uncleaned_files_are_asked_for_again(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str], status: dg.DagsterRunStatus
    ):
        instance.add_dynamic_partitions("raw_files", four)
        add_run(instance, status, "a", "d")
        assert ticked(instance, lake) == [("a", "d")]

    def test_cleaned_but_unfinished_ones_in_a_range_of_their_own(
        self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]
    ):
        instance.add_dynamic_partitions("raw_files", four)
        put_cleaned(lake, "a", "b", "d")
        add_run(instance, Status.FAILURE, "a", "d")
        result = tick(instance, lake)
        assert ranges_of(result.run_requests) == [("c", "c"), ("a", "b"), ("d", "d")]

    def test_all_cleaned_but_unfinished(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        add_run(instance, Status.FAILURE, "b", "c")
        plan = plan_runs(instance, lake)
        assert plan.ranges == [("b", "c")]
        assert "2 left unfinished by a failed run" in plan.reason

    def test_a_later_success_settles_it(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        add_run(instance, Status.FAILURE, "a", "d")
        add_run(instance, Status.SUCCESS, "a", "b")
        add_run(instance, Status.SUCCESS, "d")
        assert ticked(instance, lake) == [("c", "c")]
        add_run(instance, Status.SUCCESS, "c")
        assert ticked(instance, lake) == []

    def test_a_later_failure_unsettles_it(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        add_run(instance, Status.SUCCESS, "a", "d")
        add_run(instance, Status.FAILURE, "c")
        assert ticked(instance, lake) == [("c", "c")]

    def test_not_while_another_run_is_at_it(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        add_run(instance, Status.FAILURE, "a", "d")
        add_run(instance, Status.STARTED, "a", "c")
        assert ticked(instance, lake) == [("d", "d")]

    def test_other_jobs_leave_nothing_unfinished(
        self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]
    ):
        add_run(instance, Status.FAILURE, "a", "d", job="__ASSET_JOB")
        assert ticked(instance, lake) == []

    def test_a_vanished_raw_file_is_not_tried_again(
        self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]
    ):
        add_run(instance, Status.FAILURE, "a", "b")
        (lake.raw._root / "a.txt").unlink()  # type: ignore[attr-defined]
        assert ticked(instance, lake) == [("b", "b")]


class TestSchedule:
    @pytest.fixture
    def instance(self, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
        """Storage on disk: a schedule's context opens it by its address."""
        (tmp_path / "dagster").mkdir()
        with dg.DagsterInstance.local_temp(
            str(tmp_path / "dagster"), overrides={"telemetry": {"enabled": False}}
        ) as instance:
            yield instance

    @staticmethod
    def evaluate(instance: dg.DagsterInstance, lake: LakeResource) -> Any:
        context = dg.build_schedule_context(
            instance=instance,
            resources={"lake": lake},
            repository_def=defs.get_repository_def(),
            scheduled_execution_time=datetime(2020, 1, 1, 6, tzinfo=timezone.utc),
        )
        return process_new_files_daily(context)

    def test_does_what_the_sensor_does(self, instance: dg.DagsterInstance, lake: LakeResource, four: list[str]):
        put_cleaned(lake, "b")
        requests = self.evaluate(instance, lake)
        assert ranges_of(requests) == [("a", "a"), ("c", "d")]
        assert list(instance.get_dynamic_partitions("raw_files")) == four

    def test_skips_with_the_reason(self, instance: dg.DagsterInstance, lake: LakeResource, done: list[str]):
        skip = self.evaluate(instance, lake)
        assert isinstance(skip, dg.SkipReason)
        assert skip.skip_message == "4 raw files, all have a cleaned counterpart"

    def test_names_what_it_ignores(
        self,
        instance: dg.DagsterInstance,
        lake: LakeResource,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ):
        lake.raw.write("two words.txt", b"x")
        assert isinstance(self.evaluate(instance, lake), dg.SkipReason)
        assert "ignored raw file 'two words.txt'" in log_of(caplog, capfd)


class CountingStore:
    """A store in memory that counts what is asked of it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.calls: Counter[str] = Counter()

    def spark_uri(self, name: str = "") -> str:
        return f"memory:/{name}"

    def list_directory(self, name: str = "") -> Iterator[StoredFile]:
        self.calls["list_directory"] += 1
        for file, content in self.files.items():
            yield StoredFile(file, len(content), f"{len(content)}-1")

    def list_reports(self, name: str) -> Iterator[StoredFile]:
        self.calls["list_reports"] += 1
        for file, content in self.files.items():
            yield StoredFile(file, len(content), hashlib.sha256(content).hexdigest())

    def read(self, name: str) -> bytes:
        self.calls[name] += 1
        return self.files[name]


class TestManyPartitions:
    """A tick is slow if it asks the storage, or looks at each key, more often than it must."""

    @staticmethod
    def fabricate(lake: LakeResource, number: int) -> tuple[list[str], CountingStore, CountingStore]:
        keys = [f"{index:05}" for index in range(number)]
        raw = CountingStore({f"{key}.txt": b"x" for key in reversed(keys)})
        reports = CountingStore(
            {
                f"{lake.partition_path(CLEANED_TABLE, key)}/{REPORT_NAME}": json.dumps(cleaned_report(key)).encode()
                for key in keys[:-1:2]
            }
        )
        lake.__dict__.update(raw=raw, store=reports)
        return keys, raw, reports

    def test_ten_thousand_are_listed_once_and_each_report_read_once(
        self, instance: dg.DagsterInstance, lake: LakeResource
    ):
        keys, raw, reports = self.fabricate(lake, 10_000)
        instance.add_dynamic_partitions("raw_files", keys[:-1])
        for _ in range(20):
            add_run(instance, Status.FAILURE, keys[0], keys[-2])
        plan = plan_runs(instance, lake)
        assert plan.new_partitions == keys[-1:]
        assert plan.ranges[:2] == [(keys[1], keys[1]), (keys[3], keys[3])]
        assert raw.calls == {"list_directory": 1}
        assert reports.calls.pop("list_reports") == 1
        assert reports.calls == dict.fromkeys(reports.files, 1)

    def test_work_grows_with_the_number_of_partitions_not_with_its_square(
        self, instance: dg.DagsterInstance, lake: LakeResource, monkeypatch: pytest.MonkeyPatch
    ):
        hashed = Counter[str]()

        class Key(str):
            """A key that counts how often it is put into, or looked up in, a set or dict."""

            __slots__ = ()

            def __hash__(self) -> int:
                hashed["times"] += 1
                return str.__hash__(self)

        keys, _, _ = self.fabricate(lake, 1_000)
        monkeypatch.setattr(instance, "get_dynamic_partitions", lambda _: [Key(key) for key in keys])
        add_run(instance, Status.FAILURE, keys[0], keys[-1])
        plan_runs(instance, lake)
        assert hashed["times"] <= 20 * len(keys)


class TestRunConfig:
    def test_a_file_of_run_config_reaches_the_runs(self, lake, instance, tmp_path, monkeypatch):
        path = tmp_path / "run config.yaml"
        path.write_text("ops: {fraud_model: {config: {max_train_rows: 7000}}}")
        monkeypatch.setenv("ML_PLATFORM_RUN_CONFIG", str(path))
        put_raw(lake, "a", raw_spec(0))
        (request,) = run_requests(plan_runs(instance, lake))
        assert request.run_config["ops"] == {"fraud_model": {"config": {"max_train_rows": 7000}}}
        assert "loggers" in request.run_config

    @pytest.mark.parametrize("content", [None, "a: [", "- only\n- a list"], ids=["missing", "no YAML", "no mapping"])
    def test_a_file_that_is_none_is_named(self, tmp_path, monkeypatch, content):
        path = tmp_path / "run.yaml"
        if content is not None:
            path.write_text(content)
        monkeypatch.setenv("ML_PLATFORM_RUN_CONFIG", str(path))
        with pytest.raises(SettingsError, match=r"ML_PLATFORM_RUN_CONFIG.*run\.yaml"):
            run_config()

    def test_without_one_the_defaults_hold(self, monkeypatch):
        monkeypatch.delenv("ML_PLATFORM_RUN_CONFIG", raising=False)
        assert set(run_config()) == {"loggers"}
