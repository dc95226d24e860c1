"""Years of ticks that find nothing to do leave nothing behind, neither in the code server nor on its disk.

Each tick is evaluated as the code server does it: a context, an instance and resources of its own. What runs leave
behind is measured by benchmarks/soak.py.
"""

from __future__ import annotations

import atexit
import gc
import os
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import LocalStore
from ml_platform.sensors import build_orphaned_clusters, build_report_failed_runs, dead_runs, new_raw_files
from ml_platform.settings import AlertSettings
from ml_platform_tests.fakes import put_cleaned, put_raw, raw_spec
from ml_platform_tests.fakes_cloud import FakeClock, engine_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system has no /proc")

WARM_UP, TICKS = 5, 30


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DAGSTER_HOME, with the directory for temporary files in it."""
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp"))
    return home


def tick(sensor: dg.SensorDefinition, ref: Any, resources: dict[str, Any]) -> Any:
    # With both names, the tick has a log.
    with dg.build_sensor_context(
        instance_ref=ref, resources=resources, repository_name="repository", sensor_name=sensor.name
    ) as context:
        return sensor.evaluate_tick(context)


def resources_in_use(home: Path) -> dict[str, Any]:
    gc.collect()
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "files": sorted(
            str(path.relative_to(home)) for path in home.rglob("*") if not path.name.endswith(("-wal", "-shm"))
        ),
    }


def assert_nothing_grows(
    sensor: dg.SensorDefinition, home: Path, resources: dict[str, Any], *, often: bool = False
) -> None:
    """`often`: nor does what is left to do at the end of the process, of which an opened SQLite storage leaves more."""
    with dg.DagsterInstance.local_temp(str(home), overrides={"telemetry": {"enabled": False}}) as instance:
        for _ in range(WARM_UP):
            result = tick(sensor, instance.get_ref(), resources)
        before, to_be_done = resources_in_use(home), atexit._ncallbacks()
        for _ in range(TICKS):
            result = tick(sensor, instance.get_ref(), resources)
            assert result.skip_message
        now = resources_in_use(home)
        assert now["files"] == before["files"]
        for name in ("open files", "threads"):
            # Perhaps fewer: what earlier tests have left in this process ends when it ends.
            assert now[name] <= before[name], name
        assert not often or atexit._ncallbacks() == to_be_done
        assert not (home / "storage" / "repository").exists()  # logs of ticks, which Dagster never deletes


def test_new_raw_files(home: Path, lake: LakeResource, monkeypatch: pytest.MonkeyPatch):
    for number, key in enumerate("abc"):
        put_raw(lake, key, raw_spec(number))
        put_cleaned(lake, key)
    listings: Counter[Path] = Counter()
    list_directory = LocalStore.list_directory

    def count(store: LocalStore, name: str = "") -> Any:
        listings[store._root / name] += 1
        return list_directory(store, name)

    monkeypatch.setattr(LocalStore, "list_directory", count)
    assert_nothing_grows(new_raw_files, home, {"lake": lake})
    directories = (Path(lake.raw_uri), Path(lake.lake_uri, "_withdrawn"), Path(lake.lake_uri, "_uncleaned"))
    assert listings == dict.fromkeys(directories, WARM_UP + TICKS)


def test_report_failed_runs(home: Path, tmp_path: Path):
    """Nothing happens, so that nothing is sent to these destinations."""
    (tmp_path / "urls").write_text("json://127.0.0.1:9/\n")
    settings = AlertSettings(
        ML_PLATFORM_ALERT_WEBHOOK_URL="http://127.0.0.1:9/", ML_PLATFORM_ALERT_APPRISE_FILE=tmp_path / "urls"
    )
    assert_nothing_grows(build_report_failed_runs(settings, None), home, {}, often=True)


def test_dead_runs(home: Path):
    assert_nothing_grows(dead_runs, home, {}, often=True)


def test_orphaned_clusters(home: Path, lake: LakeResource, tmp_path: Path):
    clock = FakeClock()
    with FakeDataproc(tmp_path / "cloud", clock=clock, run_job=lambda _: JobScript()) as cloud:
        sensor = build_orphaned_clusters(dg.DefaultSensorStatus.RUNNING)
        assert_nothing_grows(sensor, home, {"spark": engine_of(cloud, lake, clock)})
