"""Metrics for Prometheus: what they say, and that Prometheus itself scrapes them and fires a rule."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.error import HTTPError
from urllib.parse import urlencode

import dagster as dg
import pytest
import yaml
from dagster._daemon.types import DaemonHeartbeat
from prometheus_client import CollectorRegistry, start_http_server

from ml_platform import metrics
from ml_platform.dev.cloud.fake_dataproc import FakeDataproc
from ml_platform.dev.cloud.processes import TetheredProcess, free_port
from ml_platform.lake.resource import LakeResource
from ml_platform.metrics import PlatformMetrics
from ml_platform.model.gate import INSTANT, SINCE_TAG
from ml_platform.model.mlflow import MlflowResource
from ml_platform_tests.fakes import put_raw, raw_spec
from ml_platform_tests.fakes_cloud import FakeClock, engine_of
from ml_platform_tests.world import ML_PLATFORM, PROJECT, wait_until

PROMETHEUS = PROJECT / "deploy/prometheus"
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="Prometheus is not installed"
)


@pytest.fixture
def directory(first_run: Path, tmp_path: Path, lake: LakeResource) -> Path:
    """A copy of the first run's lake and MLflow store, and a raw file that waits."""
    shutil.copytree(first_run, tmp_path, dirs_exist_ok=True)
    put_raw(lake, "file-1", raw_spec(1))
    return tmp_path


@pytest.fixture
def registry(directory: Path, lake: LakeResource, instance: dg.DagsterInstance) -> CollectorRegistry:
    registry = CollectorRegistry()
    mlflow = MlflowResource(tracking_uri=f"sqlite:///{directory}/mlflow.db")
    registry.register(PlatformMetrics(instance, lake, mlflow))
    return registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"ml_platform_{name}", labels)


def test_metrics_say_what_the_sources_hold(registry: CollectorRegistry, instance: dg.DagsterInstance, directory: Path):
    report = json.loads((directory / "lake/cleaned_transactions/raw_file=file-0/_report.json").read_text())
    last = datetime.strptime(report["tx_datetime"]["max"], INSTANT).replace(tzinfo=timezone.utc)
    instance.add_run(dg.DagsterRun("process_new_files", status=dg.DagsterRunStatus.FAILURE))
    instance.report_runless_asset_event(
        dg.AssetMaterialization("fraud_model", metadata={"cluster_node_hours": 0.75}, partition="file-0")
    )
    for at, daemon in ((1_700_000_060.0, "SENSOR"), (1_700_000_000.0, "SCHEDULER")):
        instance.add_daemon_heartbeat(DaemonHeartbeat(at, daemon, "id"))
    assert value(registry, "runs", job="process_new_files", status="failure") == 1
    assert value(registry, "runs", job="process_new_files", status="success") == 0
    assert value(registry, "last_run_node_hours") == 0.75
    assert value(registry, "daemon_heartbeat_timestamp_seconds") == 1_700_000_060
    assert value(registry, "files_waiting") == 1
    assert value(registry, "newest_data_timestamp_seconds") == last.timestamp()
    rows_per_second = report["counts"]["raw_rows"] / report["seconds"]
    assert value(registry, "rows_per_second", table="cleaned_transactions") == pytest.approx(rows_per_second)
    assert value(registry, "champion_version") == 1
    since = value(registry, "champion_since_timestamp_seconds")
    assert since is not None
    assert 0 <= datetime.now(timezone.utc).timestamp() - since < 3600
    for source in ("dagster", "lake", "mlflow"):
        assert value(registry, "source_up", source=source) == 1
    assert value(registry, "source_up", source="dataproc") is None


def test_a_source_that_fails_hides_no_other(
    registry: CollectorRegistry, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    error = ConnectionError("no answer from http://user:a-password@mlflow")
    monkeypatch.setattr(MlflowResource, "champion", mock.Mock(side_effect=error))
    assert value(registry, "source_up", source="mlflow") == 0
    assert value(registry, "champion_version") is None
    assert value(registry, "files_waiting") == 1
    assert "mlflow cannot be read (ConnectionError)" in caplog.text
    assert "a-password" not in caplog.text


def test_the_champion_is_seen_while_the_lake_is_not(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(LakeResource, "reports", mock.Mock(side_effect=OSError))
    assert value(registry, "source_up", source="lake") == 0
    assert value(registry, "source_up", source="mlflow") == 1
    assert value(registry, "champion_version") == 1


def test_a_source_that_hangs_hides_no_other(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(metrics, "SOURCES_TIMEOUT_S", 5)
    end = threading.Event()
    monkeypatch.setattr(MlflowResource, "champion", lambda self: end.wait(600))
    (up,) = (family for family in registry.collect() if family.name == "ml_platform_source_up")
    end.set()
    assert {one.labels["source"]: one.value for one in up.samples} == {"dagster": 1, "lake": 1, "mlflow": 0}
    assert "mlflow cannot be read (TimeoutError)" in caplog.text


def test_clusters_and_the_age_of_the_oldest(
    tmp_path: Path, lake: LakeResource, instance: dg.DagsterInstance, directory: Path
):
    clock = FakeClock()
    with FakeDataproc(tmp_path / "cloud", clock=clock) as cloud:
        engine = engine_of(cloud, lake, clock)
        registry = CollectorRegistry()
        mlflow = MlflowResource(tracking_uri=f"sqlite:///{directory}/mlflow.db")
        registry.register(PlatformMetrics(instance, lake, mlflow, engine))
        assert value(registry, "clusters", status="running") == 0
        assert value(registry, "oldest_cluster_created_timestamp_seconds") is None
        created = clock.time()
        cloud.add_cluster("first", engine.labels("run-1", created + 3600))
        clock.sleep(1000)
        cloud.add_cluster("second", engine.labels("run-2", created + 3600))
        cloud.add_cluster("of another")
        assert value(registry, "clusters", status="running") == 2
        assert value(registry, "oldest_cluster_created_timestamp_seconds") == pytest.approx(created, abs=1)
        assert value(registry, "source_up", source="dataproc") == 1


def test_the_command_serves_them(directory: Path):
    port = free_port()
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}",
        "DAGSTER_HOME": str(directory / "dagster home"),
        "ML_PLATFORM_RAW_URI": f"{directory}/raw",
        "ML_PLATFORM_LAKE_URI": f"{directory}/lake",
        "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
        "ML_PLATFORM_EPOCH": "2020-01-01",
        "PYTHONPATH": str(PROJECT),
    }
    process = TetheredProcess([*ML_PLATFORM, "metrics", "--port", str(port)], log=directory / "log", env=environment)

    def scraped() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
                return response.read().decode()
        except OSError:
            assert process.is_running(), (directory / "log").read_text()
            return ""

    try:
        text = wait_until(scraped, "the metrics are served")
    finally:
        process.stop()
    assert "ml_platform_files_waiting 1.0\n" in text
    assert 'ml_platform_source_up{source="mlflow"} 1.0\n' in text


def described() -> set[str]:
    """Names of metrics in the rules and the dashboard."""
    rules = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"][0]["rules"]
    return names_in(*(rule["expr"] for rule in rules), *shown())


def shown() -> list[str]:
    """Expressions of the dashboard."""
    panels = json.loads((PROMETHEUS / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def names_in(*expressions: str) -> set[str]:
    return set(re.findall(r"\bml_platform_\w+", " ".join(expressions)))


def test_rules_and_dashboard_use_metrics_that_exist():
    source = (PROJECT / "ml_platform/metrics.py").read_text()
    collected = set(re.findall(r'GaugeMetricFamily\(\s*"(\w+)"', source))
    collected |= {f"ml_platform_{name}" for name in re.findall(r'_gauge\("(\w+)"', source)}
    unknown = described() - collected
    assert described()
    assert unknown == set()


@needs_prometheus
@pytest.mark.parametrize(
    "command", ["check rules rules.yaml", "test rules rules_test.yaml", "check config prometheus.yaml"]
)
def test_promtool_accepts_the_files(command: str):
    done = subprocess.run(["promtool", *command.split()], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def scraping(registry: CollectorRegistry, tmp_path: Path) -> Iterator[str]:
    """Address of a Prometheus that scrapes the metrics each second, with the deployment's rules."""
    target, port = free_port(), free_port()
    server, thread = start_http_server(target, "127.0.0.1", registry)
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "rules.yaml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    options = ["--config.file=prometheus.yaml", f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.path=tsdb"]
    prometheus = TetheredProcess(
        ["/bin/sh", "-c", 'cd "$0" && exec prometheus "$@"', str(tmp_path), *options], log=tmp_path / "prometheus.log"
    )
    yield f"http://127.0.0.1:{port}"
    prometheus.stop()
    server.shutdown()
    thread.join()


def ask(prometheus: str, method: str, **parameters: str) -> dict[str, Any]:
    """Answer of Prometheus; empty as long as it starts."""
    try:
        with urllib.request.urlopen(f"{prometheus}/api/v1/{method}?{urlencode(parameters)}", timeout=30) as response:
            return dict(json.load(response)["data"])
    except HTTPError as error:
        if error.code == 503:
            return {}
        raise  # a wrong query
    except OSError:
        return {}


@needs_prometheus
def test_the_dashboard_shows_what_is_collected(registry: CollectorRegistry, scraping: str):
    collected = {family.name for family in registry.collect()}
    expressions = [expression for expression in shown() if names_in(expression) <= collected]
    assert len(expressions) > 5

    def answered(expression: str) -> bool:
        return bool(ask(scraping, "query", query=expression).get("result"))

    for expression in expressions:
        wait_until(lambda expression=expression: answered(expression), expression, timeout=120, pause=0.5)
    # What this deployment has not, such as clusters, is asked for correctly all the same.
    assert all(ask(scraping, "query", query=expression)["resultType"] == "vector" for expression in shown())


def test_a_tag_that_someone_edited_hides_nothing_else(directory: Path, registry: CollectorRegistry):
    MlflowResource(tracking_uri=f"sqlite:///{directory}/mlflow.db").tag_version("1", {SINCE_TAG: "yesterday"})
    assert value(registry, "source_up", source="mlflow") == 1
    assert value(registry, "champion_version") == 1
    assert value(registry, "champion_since_timestamp_seconds") is None


@needs_prometheus
def test_a_rule_fires_when_the_champion_is_too_old(directory: Path, scraping: str):
    mlflow = MlflowResource(tracking_uri=f"sqlite:///{directory}/mlflow.db")
    long_ago = datetime.now(timezone.utc) - timedelta(days=100)
    mlflow.tag_version("1", {SINCE_TAG: long_ago.strftime(INSTANT)})

    def firing() -> list[str]:
        alerts = ask(scraping, "alerts").get("alerts", [])
        return [alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"]

    # The transactions are of 2020.
    both = ["ChampionTooOld", "DataTooOld"]
    wait_until(lambda: sorted(firing()) == both, "these rules fire and no other", timeout=120, pause=0.5)
