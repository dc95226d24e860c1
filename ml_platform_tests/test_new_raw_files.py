"""The sensor, its twin the schedule, and the plan behind both, on fabricated lakes."""

from __future__ import annotations

import contextlib
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_platform import planning
from ml_platform.definitions import defs
from ml_platform.lake.partitions import PARTITION_TAG, keys_of_run, range_tags
from ml_platform.lake.reports import CLEANED_TABLE, CleanedReport
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import StoredFile
from ml_platform.planning import plan_runs, run_requests, sort_partitions
from ml_platform.run_config import run_config
from ml_platform.sensors import new_raw_files, process_new_files_daily
from ml_platform.settings import SettingsError
from ml_platform_tests.fakes import cleaned_report, put_cleaned, put_raw, raw_spec
from spark_jobs.schema import REPORT_NAME

Status = dg.DagsterRunStatus


class Planner:
    """A lake, Dagster's storage, and what the sensor asks for."""

    def __init__(self, instance: dg.DagsterInstance, lake: LakeResource) -> None:
        self.instance, self.lake = instance, lake

    def tick(self, lake: LakeResource | None = None) -> dg.SensorResult:
        """One tick of the sensor, with what the daemon does about its partitions."""
        context = dg.build_sensor_context(
            instance=self.instance, resources={"lake": lake or self.lake}, repository_def=defs.get_repository_def()
        )
        result = new_raw_files(context)
        assert isinstance(result, dg.SensorResult)
        for request in result.dynamic_partitions_requests or []:
            self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        return result

    def ranges(self, lake: LakeResource | None = None) -> list[tuple[str, str]]:
        """The ranges of partitions that one tick asks for."""
        return ranges_of(self.tick(lake).run_requests or [])

    @property
    def partitions(self) -> list[str]:
        return list(self.instance.get_dynamic_partitions("raw_files"))

    def add_run(
        self,
        status: dg.DagsterRunStatus,
        start: str,
        end: str | None = None,
        job: str = "process_new_files",
        **more_tags: str,
    ) -> None:
        """A run of the past, over a range of partitions or a single one."""
        tags = (range_tags(start, end) if end else {PARTITION_TAG: start}) | more_tags
        location = GrpcServerCodeLocationOrigin(host="localhost", port=1, location_name="ml_platform")
        origin = RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), job)
        self.instance.add_run(dg.DagsterRun(job, str(uuid.uuid4()), status=status, tags=tags, remote_job_origin=origin))

    def replace(self, key: str, number: int, **changes: int) -> None:
        """Put a raw file, or another one of the same name."""
        put_raw(self.lake, key, raw_spec(number, **changes))

    def remove(self, key: str) -> None:
        """Remove a raw file."""
        (self.lake.raw._root / f"{key}.txt").unlink()  # type: ignore[attr-defined]


def ranges_of(requests: Any) -> list[tuple[str, str]]:
    for request in requests:
        assert set(request.tags) >= set(range_tags("", ""))
        assert request.run_key is None  # a key would keep a failed range from being asked for again
    return [tuple(request.tags[tag] for tag in range_tags("", "")) for request in requests]


def reason_of(result: dg.SensorResult) -> str:
    skip = result.skip_reason
    return (skip.skip_message if isinstance(skip, dg.SkipReason) else skip) or ""


def log_of(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> str:
    """What a tick logged; Dagster's own loggers do not propagate to the root logger."""
    return caplog.text + capfd.readouterr().err


def let_pass(monkeypatch: pytest.MonkeyPatch, **time: float) -> None:
    """Let some time pass for the plan."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(**time)

    monkeypatch.setattr(planning, "datetime", Later)


@pytest.fixture
def planner(instance: dg.DagsterInstance, lake: LakeResource) -> Planner:
    return Planner(instance, lake)


@pytest.fixture
def new(planner: Planner) -> list[str]:
    """Four raw files, neither registered nor cleaned."""
    for number, key in enumerate("abcd"):
        planner.replace(key, number)
    return list("abcd")


@pytest.fixture
def registered(planner: Planner, new: list[str]) -> list[str]:
    """Four raw files, registered and not cleaned."""
    planner.instance.add_dynamic_partitions("raw_files", new)
    return new


@pytest.fixture
def done(planner: Planner, registered: list[str]) -> list[str]:
    """Four raw files, registered and cleaned."""
    put_cleaned(planner.lake, *registered)
    return registered


class TestFirstTick:
    def test_registers_all_and_asks_for_one_run(self, planner: Planner, new: list[str]):
        result = planner.tick()
        assert ranges_of(result.run_requests) == [("a", "d")]
        assert reason_of(result) == ""
        assert planner.partitions == new

    def test_observes_what_it_asks_for(self, planner: Planner, new: list[str]):
        """An observation during the run would make Dagster call the new asset stale."""
        put_cleaned(planner.lake, "b")
        events = planner.tick().asset_events
        assert [event.partition for event in events] == ["a", "c", "d"]
        files, _ = planner.lake.list_raw_files()
        for event in events:
            assert isinstance(event, dg.AssetObservation)
            file = files[event.partition or ""]
            assert event.asset_key == dg.AssetKey("raw_transactions")
            assert event.metadata["size_bytes"].value == file.size
            assert event.tags["dagster/data_version"] == file.fingerprint

    def test_no_raw_files(self, planner: Planner):
        result = planner.tick()
        assert ranges_of(result.run_requests) == []
        assert reason_of(result).startswith("0 raw files")
        assert not result.dynamic_partitions_requests

    def test_the_range_means_these_partitions_to_dagster(self, planner: Planner, new: list[str]):
        (start, end) = planner.ranges()[0]
        with dg.partition_loading_context(dynamic_partitions_store=planner.instance):
            keys = dg.DynamicPartitionsDefinition(name="raw_files").get_partition_keys_in_range(
                dg.PartitionKeyRange(start, end)
            )
        assert list(keys) == new


class TestNothingNew:
    def test_skips_with_the_reason(self, planner: Planner, done: list[str]):
        result = planner.tick()
        assert ranges_of(result.run_requests or []) == []
        assert reason_of(result) == "4 raw files, all have a cleaned counterpart"

    def test_the_lake_decides_what_is_done_not_dagster(self, planner: Planner, done: list[str]):
        assert planner.ranges() == []
        planner.instance.report_runless_asset_event(dg.AssetMaterialization("cleaned_transactions", partition="b"))
        report = f"{planner.lake.partition_path(CLEANED_TABLE, 'b')}/{REPORT_NAME}"
        (planner.lake.store._root / report).unlink()  # type: ignore[attr-defined]
        assert planner.ranges() == [("b", "b")]

    def test_a_vanished_raw_file_leaves_its_partition_alone(self, planner: Planner, done: list[str]):
        planner.remove("b")
        assert planner.ranges() == []
        assert "b" in planner.partitions


class TestOnePartitionAlone:
    def test_new_file_is_registered(self, planner: Planner, done: list[str]):
        planner.replace("e", 4)
        assert planner.ranges() == [("e", "e")]
        assert planner.partitions == [*done, "e"]

    @pytest.mark.parametrize("changes", [{"rows": 17}, {"frauds": 300}], ids=["of another size", "of the same size"])
    def test_replaced_file(self, planner: Planner, done: list[str], changes: dict[str, int]):
        planner.replace("c", 2, **changes)
        assert planner.ranges() == [("c", "c")]

    def test_file_cleaned_with_another_epoch(self, planner: Planner, done: list[str]):
        put_cleaned(planner.lake, "b", epoch="2019-08-22")
        assert planner.ranges() == [("b", "b")]

    def test_changed_epoch_changes_all(self, planner: Planner, done: list[str]):
        other = LakeResource(raw_uri=planner.lake.raw_uri, lake_uri=planner.lake.lake_uri, epoch="2018-04-01")
        assert planner.ranges(other) == [("a", "d")]

    def test_invalid_report(self, planner: Planner, done: list[str]):
        """Which reports are invalid: test_lake.py."""
        name = f"{planner.lake.partition_path(CLEANED_TABLE, 'a')}/{REPORT_NAME}"
        planner.lake.store.write(name, planner.lake.store.read(name)[:100])
        assert planner.ranges() == [("a", "a")]


def test_late_file_is_registered_after_its_neighbours(planner: Planner, done: list[str]):
    """Dagster's ranges follow the order of registration, not that of names."""
    planner.replace("bb", 10)
    assert planner.ranges() == [("bb", "bb")]
    assert planner.partitions == [*done, "bb"]
    for key in ("b", "d"):
        planner.replace(key, 5, rows=1)
    assert planner.ranges() == [("b", "b"), ("d", "bb")]
    put_cleaned(planner.lake, "b", "bb")
    planner.replace("c", 6, rows=2)
    assert planner.ranges() == [("c", "d")]


class TestUnusableNames:
    @pytest.fixture
    def odd(self, lake: LakeResource) -> None:
        for name in ("two words.txt", "a...b.txt", "_draft.txt"):
            lake.raw.write(name, b"x")

    def test_are_named_in_the_log_and_the_reason(
        self,
        planner: Planner,
        done: list[str],
        odd: None,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ):
        result = planner.tick()
        assert ranges_of(result.run_requests or []) == []
        assert "3 ignored: '_draft.txt' (it starts with a dot or underscore" in reason_of(result)
        log = log_of(caplog, capfd)
        for name in ("'two words.txt': only letters", "'a...b.txt': '...'", "'_draft.txt': it starts"):
            assert f"ignored raw file {name}" in log

    def test_do_not_stop_the_others(self, planner: Planner, new: list[str], odd: None):
        assert planner.ranges() == [("a", "d")]
        assert planner.partitions == new


def past(status: dg.DagsterRunStatus, start: str, end: str, **more: str) -> tuple[Any, ...]:
    """The arguments of a run of the past."""
    return status, start, end, more


ASSET_JOB = {"job": "__ASSET_JOB"}  # that of `dagster asset materialize` and of the UI
WILL_RETRY = {WILL_RETRY_TAG: "true"}


class TestRunsOverUncleanedFiles:
    @pytest.mark.parametrize(
        ("run", "expected"),
        [
            *[
                pytest.param(past(status, "b", "c"), [("a", "a"), ("d", "d")], id=status.value)
                for status in (Status.QUEUED, Status.NOT_STARTED, Status.STARTING, Status.STARTED, Status.CANCELING)
            ],
            pytest.param(past(Status.STARTED, "a", "c", **ASSET_JOB), [("d", "d")], id="of another job"),
            pytest.param(past(Status.STARTED, "gone", "b"), [("a", "d")], id="partitions that are gone"),
            pytest.param(past(Status.FAILURE, "a", "d"), [("a", "d")], id="failed"),
            pytest.param(past(Status.CANCELED, "a", "d"), [("a", "d")], id="canceled"),
            # Dagster's daemon starts a killed run again; until it has, the run counts as queued.
            pytest.param(past(Status.FAILURE, "a", "b", **WILL_RETRY), [("c", "d")], id="will be retried"),
            pytest.param(past(Status.FAILURE, "a", "b", **{WILL_RETRY_TAG: "false"}), [("a", "d")], id="no retry"),
            pytest.param(
                past(Status.FAILURE, "a", "b", **WILL_RETRY, **{AUTO_RETRY_RUN_ID_TAG: "its retry"}),
                [("a", "d")],
                id="was retried",
            ),
        ],
    )
    def test_partitions_of_active_runs_are_left_to_them(
        self, planner: Planner, registered: list[str], run: tuple[Any, ...], expected: list[tuple[str, str]]
    ):
        *arguments, more = run
        planner.add_run(*arguments, **more)
        assert planner.ranges() == expected

    def test_a_run_without_partitions_holds_none(self, planner: Planner, registered: list[str]):
        planner.instance.add_run(dg.DagsterRun(job_name="other", run_id=str(uuid.uuid4()), status=Status.STARTED))
        assert planner.ranges() == [("a", "d")]

    def test_a_failed_run_of_the_command_line_is_not_retried(self, planner: Planner, registered: list[str]):
        """The daemon retries only runs with an origin."""
        tags = range_tags("a", "b") | WILL_RETRY
        planner.instance.add_run(
            dg.DagsterRun("process_new_files", str(uuid.uuid4()), status=Status.FAILURE, tags=tags)
        )
        assert planner.ranges() == [("a", "d")]

    def test_all_are_active(self, planner: Planner, registered: list[str]):
        planner.add_run(Status.STARTED, "a", "b")
        planner.add_run(Status.QUEUED, "c")
        planner.add_run(Status.QUEUED, "d")
        result = planner.tick()
        assert ranges_of(result.run_requests or []) == []
        assert reason_of(result) == "4 raw files, 4 are in a queued or running run"

    def test_a_second_tick_before_the_first_ones_run_ends(self, planner: Planner, new: list[str]):
        (first,) = planner.ranges()
        planner.add_run(Status.QUEUED, *first)
        assert planner.ranges() == []
        planner.replace("e", 4)
        assert planner.ranges() == [("e", "e")]

    def test_a_run_that_was_queued_days_ago_still_counts(
        self, planner: Planner, registered: list[str], monkeypatch: pytest.MonkeyPatch
    ):
        planner.add_run(Status.QUEUED, "a", "d")
        let_pass(monkeypatch, days=2)
        assert planner.ranges() == []

    def test_a_retry_that_does_not_come_is_not_waited_for(
        self, planner: Planner, registered: list[str], monkeypatch: pytest.MonkeyPatch
    ):
        planner.add_run(Status.FAILURE, "a", "b", **WILL_RETRY)
        let_pass(monkeypatch, minutes=6)
        assert planner.ranges() == [("a", "d")]


class TestFailedRunsOverCleanedFiles:
    @pytest.mark.parametrize(
        ("runs", "expected"),
        [
            pytest.param([past(Status.FAILURE, "b", "c")], [("b", "c")], id="failed"),
            pytest.param(
                [past(Status.FAILURE, "a", "d"), past(Status.SUCCESS, "a", "b"), past(Status.SUCCESS, "d", "d")],
                [("c", "c")],
                id="a later success settles its own partitions",
            ),
            pytest.param(
                [past(Status.FAILURE, "a", "d"), past(Status.SUCCESS, "a", "d")], [], id="a later success settles all"
            ),
            pytest.param(
                [past(Status.SUCCESS, "a", "d"), past(Status.FAILURE, "c", "c")], [("c", "c")], id="a later failure"
            ),
            pytest.param(
                [past(Status.FAILURE, "a", "d"), past(Status.STARTED, "a", "c")],
                [("d", "d")],
                id="another run is active",
            ),
            pytest.param([past(Status.FAILURE, "a", "d", **ASSET_JOB)], [], id="of another job"),
        ],
    )
    def test_unfinished_partitions_are_asked_for_again(
        self, planner: Planner, done: list[str], runs: list[tuple[Any, ...]], expected: list[tuple[str, str]]
    ):
        for *arguments, more in runs:
            planner.add_run(*arguments, **more)
        assert planner.ranges() == expected

    def test_unfinished_partitions_are_counted_in_the_reason(self, planner: Planner, done: list[str]):
        planner.add_run(Status.FAILURE, "b", "c")
        assert "2 left unfinished by a failed run" in plan_runs(planner.instance, planner.lake).reason

    def test_uncleaned_and_unfinished_partitions_are_in_separate_ranges(self, planner: Planner, registered: list[str]):
        put_cleaned(planner.lake, "a", "b", "d")
        planner.add_run(Status.FAILURE, "a", "d")
        assert planner.ranges() == [("c", "c"), ("a", "b"), ("d", "d")]

    def test_an_accepted_file_is_asked_for_again(self, planner: Planner, done: list[str]):
        planner.replace("b", 1, frauds=20_000)
        put_cleaned(planner.lake, "b")
        planner.add_run(Status.FAILURE, "b", "b")
        assert planner.ranges() == []
        planner.lake.accept([planner.lake.reports(CleanedReport)["b"]])
        assert planner.ranges() == [("b", "b")]

    def test_a_vanished_raw_file_is_not_tried_again(self, planner: Planner, done: list[str]):
        planner.add_run(Status.FAILURE, "a", "b")
        planner.remove("a")
        assert planner.ranges() == [("b", "b")]


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
    def evaluate(planner: Planner) -> Any:
        context = dg.build_schedule_context(
            instance=planner.instance,
            resources={"lake": planner.lake},
            repository_def=defs.get_repository_def(),
            scheduled_execution_time=datetime(2020, 1, 1, 6, tzinfo=timezone.utc),
        )
        return process_new_files_daily(context)

    def test_does_what_the_sensor_does(self, planner: Planner, new: list[str]):
        put_cleaned(planner.lake, "b")
        requests = self.evaluate(planner)
        assert ranges_of(requests) == [("a", "a"), ("c", "d")]
        assert planner.partitions == new

    def test_skips_with_the_reason(self, planner: Planner, done: list[str]):
        skip = self.evaluate(planner)
        assert isinstance(skip, dg.SkipReason)
        assert skip.skip_message == "4 raw files, all have a cleaned counterpart"

    def test_names_what_it_ignores(
        self, planner: Planner, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ):
        planner.lake.raw.write("two words.txt", b"x")
        assert isinstance(self.evaluate(planner), dg.SkipReason)
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

    def test_ten_thousand_are_listed_once_and_each_report_read_once(self, planner: Planner):
        keys, raw, reports = self.fabricate(planner.lake, 10_000)
        planner.instance.add_dynamic_partitions("raw_files", keys[:-1])
        for _ in range(20):
            planner.add_run(Status.FAILURE, keys[0], keys[-2])
        plan = plan_runs(planner.instance, planner.lake)
        assert plan.new_partitions == keys[-1:]
        assert plan.ranges[:2] == [(keys[1], keys[1]), (keys[3], keys[3])]
        assert raw.calls == {"list_directory": 1}
        assert reports.calls.pop("list_reports") == 2
        assert reports.calls.pop("list_directory") == 2
        assert reports.calls == dict.fromkeys(reports.files, 1)

    def test_work_grows_with_the_number_of_partitions_not_with_its_square(
        self, planner: Planner, monkeypatch: pytest.MonkeyPatch
    ):
        hashed = Counter[str]()

        class Key(str):
            """A key that counts how often it is hashed."""

            __slots__ = ()

            def __hash__(self) -> int:
                hashed["times"] += 1
                return str.__hash__(self)

        keys, _, _ = self.fabricate(planner.lake, 1_000)
        monkeypatch.setattr(planner.instance, "get_dynamic_partitions", lambda _: [Key(key) for key in keys])
        planner.add_run(Status.FAILURE, keys[0], keys[-1])
        plan_runs(planner.instance, planner.lake)
        assert hashed["times"] <= 20 * len(keys)


class TestRunConfig:
    def test_a_file_of_run_config_reaches_the_runs(self, planner, tmp_path, monkeypatch):
        path = tmp_path / "run config.yaml"
        path.write_text("ops: {fraud_model: {config: {max_train_rows: 7000}}}")
        monkeypatch.setenv("ML_PLATFORM_RUN_CONFIG", str(path))
        planner.replace("a", 0)
        (request,) = run_requests(plan_runs(planner.instance, planner.lake))
        assert request.run_config["ops"] == {"fraud_model": {"config": {"max_train_rows": 7000}}}
        assert "loggers" in request.run_config

    @pytest.mark.parametrize(
        "content", [None, "a: [", "- only\n- a list"], ids=["missing", "not YAML", "not a mapping"]
    )
    def test_an_unusable_file_is_named(self, tmp_path, monkeypatch, content):
        path = tmp_path / "run.yaml"
        if content is not None:
            path.write_text(content)
        monkeypatch.setenv("ML_PLATFORM_RUN_CONFIG", str(path))
        with pytest.raises(SettingsError, match=r"ML_PLATFORM_RUN_CONFIG.*run\.yaml"):
            run_config()

    def test_without_one_the_defaults_hold(self, monkeypatch):
        monkeypatch.delenv("ML_PLATFORM_RUN_CONFIG", raising=False)
        assert set(run_config()) == {"loggers"}


class TestOrder:
    """Dagster keeps partitions in order of registration; ranges go by it."""

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.permutations([f"key-{number}" for number in range(6)]), st.integers(0, 6))
    def test_any_files_registered_in_any_order_are_sorted(self, lake: LakeResource, keys: list[str], synced: int):
        with dg.DagsterInstance.ephemeral(settings={"telemetry": {"enabled": False}}) as instance:
            for number, key in enumerate(keys):
                instance.add_dynamic_partitions("raw_files", [key])
                if number == synced:
                    sort_partitions(instance, lake)
            sort_partitions(instance, lake)
            assert list(instance.get_dynamic_partitions("raw_files")) == sorted(keys)
            assert sort_partitions(instance, lake) == "partitions are in order"

    @pytest.mark.parametrize("deleted", range(5))
    def test_a_kill_in_between_loses_no_partition(
        self, planner: Planner, monkeypatch: pytest.MonkeyPatch, deleted: int
    ):
        keys = ["d", "c", "b", "a"]
        planner.instance.add_dynamic_partitions("raw_files", keys)
        delete, calls = planner.instance.delete_dynamic_partition, iter(range(9))

        def killed(*arguments: Any) -> None:
            if next(calls) == deleted:
                raise KeyboardInterrupt
            delete(*arguments)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(planner.instance, "delete_dynamic_partition", killed)
            sort_partitions(planner.instance, planner.lake)
        assert sort_partitions(planner.instance, planner.lake).startswith("partitions")
        assert list(planner.instance.get_dynamic_partitions("raw_files")) == sorted(keys)

    @pytest.mark.parametrize("status", [Status.QUEUED, Status.STARTED, Status.CANCELING])
    def test_nothing_is_moved_under_a_run(self, planner: Planner, status: Status):
        planner.instance.add_dynamic_partitions("raw_files", ["b", "a"])
        planner.add_run(status, "b", "a")
        assert "cannot be sorted while runs are queued or running" in sort_partitions(planner.instance, planner.lake)
        assert list(planner.instance.get_dynamic_partitions("raw_files")) == ["b", "a"]

    def test_a_run_keeps_the_partitions_that_it_started_with(self):
        tags, now = range_tags("a", "c"), ["a", "b", "c"]
        assert keys_of_run(tags, now) == ["a", "b", "c"]
        assert keys_of_run({**tags, "ml_platform/partitions": "a,c"}, now) == ["a", "c"]
