"""The command `ml-platform`: its output, its effects, and its errors."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version as version_of_package
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

import dagster as dg
import pytest
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._daemon.types import DaemonHeartbeat

from ml_platform.cli import clusters, data, doctor
from ml_platform.cli.context import CommandError, complete_partition
from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript
from ml_platform.lake import resource as lake_module
from ml_platform.lake import storage
from ml_platform.lake.reports import FEATURES_TABLE as FEATURES
from ml_platform.lake.reports import CleanedReport
from ml_platform.model.mlflow import MlflowResource
from ml_platform.operations.changes import CHAMPION_ASSET
from ml_platform.settings import load_settings
from ml_platform_tests.fakes import cleaned_report, features_report, raw_spec

mlflow_version = version_of_package("mlflow")
ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    *(
        "simulate",
        "sync",
        "process-new-files",
        "summary",
        "rejects",
        "alerts",
        "withdraw",
        "migrate",
        "dev-cloud",
        "doctor",
    ),
    *("champion show", "champion set", "champion rollback", "clusters list", "clusters delete"),
)

#: A version whose tags are those of an earlier platform.
SPARK_ML = mock.Mock(version=3, tags={"spark_version": "4.3.0", "model_uri": "file:///lake/models/a/r/model"})

RunCli = Callable[..., tuple[int, str, str]]
Faults = Callable[..., dict[str, str]]


@pytest.fixture
def mlflow_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLflow that answers at once; the real one is test_assets.py's."""
    monkeypatch.setattr(MlflowResource, "champion", lambda self: None)
    monkeypatch.setattr(MlflowResource, "experiment", lambda self: None)
    monkeypatch.setattr(MlflowResource, "artifact_location", lambda self: None)


def set_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str | None]) -> None:
    """Set variables, or delete those of None."""
    for name, value in values.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)


def only_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def simulate(run_cli: RunCli, *arguments: str) -> str:
    small = ("--days-per-file", "2", "--customers", "20", "--terminals", "30")
    code, out, err = run_cli("simulate", *small, *arguments)
    assert code == 0, err
    return out


def test_every_command_has_help(run_cli: RunCli):
    code, overview, _ = run_cli("--help")
    assert code == 0
    for command in COMMANDS:
        assert command.split()[0] in overview
        code, out, err = run_cli(*command.split(), "--help")
        assert (code, err) == (0, "")
        assert f"ml-platform {command}" in out
    code, out, err = run_cli()
    assert code != 0
    assert "simulate" in out + err


def test_the_version_is_that_of_the_project(run_cli: RunCli):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run_cli("--version") == (0, f"{project['version']}\n", "")


class TestSimulateAndSync:
    def test_simulate_then_sync(self, run_cli: RunCli):
        out = simulate(run_cli, "--files", "2", "--fault-rate", "0")
        raw = Path("data/raw").absolute()
        names = ["2019-08-22.txt", "2019-08-24.txt"]
        assert sorted(path.name for path in raw.iterdir()) == names
        for name in names:
            header, *rows = (raw / name).read_text().splitlines()
            assert header.startswith("#")
            assert len(rows[0].split(",")) == 9
            assert re.search(rf"{name}\W+{len(rows)}\W", out)

        for new in (2, 0):
            code, out, _ = run_cli("sync")
            assert (code, only_line(out)) == (
                0,
                f"2 raw files in {raw}, {new} newly registered, 0 ignored; partitions are in order",
            )
        with dg.DagsterInstance.get() as instance:
            assert list(instance.get_dynamic_partitions("raw_files")) == ["2019-08-22", "2019-08-24"]

    def test_existing_files_are_kept_without_overwrite(self, run_cli: RunCli):
        simulate(run_cli, "--files", "1")
        file = Path("data/raw/2019-08-22.txt")
        simulated = file.read_bytes()
        file.write_text("mine")
        assert "kept as it is" in simulate(run_cli, "--files", "2")
        assert file.read_text() == "mine"
        simulate(run_cli, "--files", "1", "--overwrite")
        assert file.read_bytes() == simulated

    def test_dotenv_wins_over_the_environment_as_in_dagsters_own_commands(
        self, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        Path(".env").write_text(f'ML_PLATFORM_RAW_URI="{tmp_path}/from dotenv"\nML_PLATFORM_EPOCH=2020-02-02\n')
        monkeypatch.setenv("ML_PLATFORM_EPOCH", "2018-04-01")
        simulate(run_cli, "--files", "1", "--first-file", "3")
        assert [path.name for path in (tmp_path / "from dotenv").iterdir()] == ["2020-02-08.txt"]

    def test_sync_names_the_files_that_it_ignores(self, run_cli: RunCli):
        raw = Path("data/raw")
        raw.mkdir(parents=True)
        for name in ("good.txt", "two [bold]words.txt", "other.csv"):
            (raw / name).write_text("x")
        code, out, err = run_cli("sync")
        assert code == 0
        assert "1 raw files" in out
        csv, words = err.strip().splitlines()
        assert csv.startswith("ignored 'other.csv': it does not end with .txt")
        assert words.startswith("ignored 'two [bold]words.txt': only letters")


class TestErrors:
    @pytest.mark.parametrize(
        ("environment", "command", "error"),
        [
            ({"ML_PLATFORM_EPOCH": "soon"}, "simulate", "ML_PLATFORM_EPOCH: "),
            ({"ML_PLATFORM_RAW_URI": "gs://bucket"}, "sync", "ML_PLATFORM_RAW_URI: "),
            ({"ML_PLATFORM_DEPLOYMENT": "moon"}, "doctor", "ML_PLATFORM_DEPLOYMENT: "),
            ({"ML_PLATFORM_LAKE_URI": "s3://"}, "summary", "ML_PLATFORM_LAKE_URI: "),
            ({"DAGSTER_HOME": None}, "sync", "DAGSTER_HOME is not set: "),
            ({"DAGSTER_HOME": None}, "process-new-files", "DAGSTER_HOME is not set: "),
            ({"DAGSTER_HOME": "here"}, "sync", "DAGSTER_HOME must be an absolute path"),
            ({}, "simulate --terminals 1", "compromised_terminals_per_day is 2"),
            ({}, "clusters list", "this deployment does not use clusters: set ML_PLATFORM_DEPLOYMENT=yandex"),
            ({}, "clusters delete --orphaned", "this deployment does not use clusters: set ML_PLATFORM_DEPLOYMENT"),
        ],
    )
    def test_an_error_is_one_line(
        self,
        run_cli: RunCli,
        monkeypatch: pytest.MonkeyPatch,
        environment: dict[str, str | None],
        command: str,
        error: str,
    ):
        set_environment(monkeypatch, environment)
        code, _, err = run_cli(*command.split())
        assert code == 1
        assert only_line(err).startswith(f"error: {error}")

    @pytest.mark.parametrize(
        "arguments",
        [
            *("fly", "simulate --files none", "simulate --files 0", "simulate --fault-rate 1001"),
            *("alerts a --day soon", "clusters delete", "clusters delete some-id --orphaned"),
        ],
    )
    def test_wrong_usage_exits_with_2(self, run_cli: RunCli, arguments: str):
        code, _, err = run_cli(*arguments.split())
        assert code == 2
        assert "Traceback" not in err

    def test_an_unexpected_error_is_one_line_and_a_hint(
        self, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("ML_PLATFORM_RAW_URI", str(tmp_path / "file"))
        code, _, err = run_cli("simulate")
        assert code == 1
        error, hint = err.splitlines()
        assert error.startswith("error: NotADirectoryError: ")
        assert str(tmp_path / "file") in error
        assert hint == "(use ml-platform --traceback … to see where it happened)"
        with pytest.raises(NotADirectoryError):
            run_cli("--traceback", "simulate")

    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, DagsterExecutionInterruptedError])
    def test_an_interrupt_exits_with_130(
        self, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
    ):
        monkeypatch.setattr(data, "lake_of", mock.Mock(side_effect=interrupt))
        code, _, err = run_cli("sync")
        assert code == 130
        assert "Traceback" not in err


class TestSignals:
    """The command in a process of its own."""

    @pytest.fixture
    def command(self, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
        def start(*arguments: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, "-m", "ml_platform.cli.main", *arguments],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        return start

    def test_a_stopped_simulation_leaves_no_half_file_for_long(
        self, command: Callable[..., subprocess.Popen[str]], tmp_path: Path
    ):
        raw = tmp_path / "data/raw"

        def stop(number: signal.Signals) -> int:
            before = set(raw.glob(".*"))
            with command("simulate", "--days-per-file", "3650") as process:
                while process.poll() is None and not set(raw.glob(".*")) - before:
                    time.sleep(0.1)
                process.send_signal(number)
                process.communicate()
                return process.returncode

        assert stop(signal.SIGKILL) == -signal.SIGKILL
        assert len(list(raw.iterdir())) == 1
        # The next one cleans up after it, and after itself.
        assert stop(signal.SIGTERM) == 130
        assert list(raw.iterdir()) == []

    def test_a_reader_that_goes_away_gets_no_traceback(
        self, command: Callable[..., subprocess.Popen[str]], tmp_path: Path
    ):
        report = tmp_path / "data/lake/cleaned_transactions/raw_file=a/_report.json"
        report.parent.mkdir(parents=True)
        report.write_text(json.dumps(cleaned_report("a", raw_spec(0), rejected_rows=1, malformed_row=1)))
        for arguments in (["--help"], ["rejects", "a"]):
            with command(*arguments) as process:
                assert process.stdout is not None
                process.stdout.close()
                process.stdout = None
                _, err = process.communicate()
            assert (process.returncode, err) == (1, "")


def test_the_summary_counts_the_rows_of_each_file(run_cli: RunCli, mlflow_ready: None):
    simulate(run_cli, "--files", "2")
    report = cleaned_report(
        "2019-08-22", raw_spec(0, start="2019-08-22T00:00:00Z"), raw_rows=20_103, rejected_rows=101, duplicate_rows=2
    )
    for table, content in (
        ("cleaned_transactions", report),
        (FEATURES, features_report(report, {"cleaned": "1", "history": {}})),
    ):
        path = Path(f"data/lake/{table}/raw_file=2019-08-22/_report.json")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    (Path("data/raw") / "other.csv").touch()
    code, out, _ = run_cli("summary")
    assert code == 0
    first, second = (line for line in out.splitlines() if "2019-" in line)
    assert re.findall(r"[\w,-]+", first) == ["2019-08-22", "20,103", "20,000", "2", "101", "200", "not", "scored"]
    assert "2019-08-24" in second
    assert "not cleaned yet" in second
    assert "No model of fraud_model is the champion yet." in out

    code, out, err = run_cli("summary", "--json")
    assert code == 0
    assert only_line(err).startswith("ignored 'other.csv'")
    unknown = dict.fromkeys(("raw_rows", "clean_rows", "duplicate_rows", "rejected_rows", "fraud_rows", "alerts"))
    counts = {"raw_rows": 20_103, "clean_rows": 20_000, "duplicate_rows": 2, "rejected_rows": 101, "fraud_rows": 200}
    assert json.loads(out) == {
        "raw_uri": str(Path("data/raw").absolute()),
        "lake_uri": str(Path("data/lake").absolute()),
        "partitions": [
            {"partition": "2019-08-22", "state": "not_scored", "reason": None, **unknown, **counts},
            {"partition": "2019-08-24", "state": "not_cleaned", "reason": None, **unknown},
        ],
        "champion": None,
    }


def test_the_shell_completes_partitions(run_cli: RunCli):
    for key in ("2019-08-22", "2019-08-24", "2020-01-01"):
        Path(f"another lake/cleaned_transactions/raw_file={key}").mkdir(parents=True)
    Path(".env").write_text('ML_PLATFORM_LAKE_URI="another lake"\n')
    words = {"COMP_WORDS": "ml-platform alerts 2019", "COMP_CWORD": "2", "_ML_PLATFORM_COMPLETE": "complete_bash"}
    program = str(Path(sys.executable).with_name("ml-platform"))
    process = subprocess.run([program], env={**os.environ, **words}, capture_output=True, text=True, check=True)
    assert (process.stdout.split(), process.stderr) == (["2019-08-22", "2019-08-24"], "")

    for uri in ("s3://bucket/lake", "gs://wrong", "nowhere"):
        Path(".env").write_text(f"ML_PLATFORM_LAKE_URI={uri}\n")
        assert complete_partition("") == []


def doctor_rows(out: str) -> dict[str, tuple[str, str]]:
    """Verdict and text of each check in the doctor's table."""
    cells = [[cell.strip() for cell in re.split("[│┃|]", line)[1:-1]] for line in out.splitlines()]
    return {row[0]: (row[1], row[2]) for row in cells if len(row) == 3 and row[1] in ("ok", "note", "failed")}


@pytest.fixture
def install_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Install a Java that prints a version."""

    def install(version: str) -> Path:
        program = tmp_path / "some java" / "bin" / "java"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{version}\nEND\n")
        program.chmod(0o755)
        monkeypatch.setenv("JAVA_HOME", str(program.parent.parent))
        return program

    return install


@pytest.mark.parametrize(
    ("version", "suitable"),
    [
        ('openjdk version "17.0.1" 2021-10-19\nOpenJDK Runtime Environment (build 17.0.1+12)', True),
        ('openjdk version "21.0.2" 2024-01-16', True),
        ('openjdk version "21-ea" 2023-09-19', True),
        ('java version "17.0.9" 2023-10-17 LTS', True),
        ('Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "17.0.1" 2021-10-19', True),
        ('openjdk version "11.0.2" 2019-01-15', False),
        ('java version "1.8.0_17"', False),
        ('openjdk version "25" 2025-09-16', False),
        ("", False),
    ],
)
def test_java_of_versions_17_and_21_is_suitable(install_java: Callable[[str], Path], version: str, suitable: bool):
    program = str(install_java(version))
    if suitable:
        assert program in doctor._check_java(load_settings())
    else:
        with pytest.raises(CommandError, match=f"^{program} .* 17 or 21"):
            doctor._check_java(load_settings())


@pytest.fixture(scope="module")
def dagster_home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Dagster's storage, which takes a second to make; the doctor only reads it."""
    home = str(tmp_path_factory.mktemp("dagster home"))
    shutil.copy(ROOT / "dagster.yaml", home)
    with mock.patch.dict(os.environ, DAGSTER_HOME=home), dg.DagsterInstance.get():
        return home


@pytest.fixture
def own_dagster_home(dagster_home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of Dagster's storage that a test may change."""
    home = tmp_path / "own dagster home"
    shutil.copytree(dagster_home, home)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    return home


@pytest.fixture
def faults(
    run_cli: RunCli, install_java: Callable[[str], Path], dagster_home: str, monkeypatch: pytest.MonkeyPatch
) -> Faults:
    """Run the doctor on a sound installation with the test's changes; return the text of each failed check."""
    install_java('openjdk version "17.0.1" 2021-10-19')
    monkeypatch.setenv("DAGSTER_HOME", dagster_home)
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/a.txt").write_text("x")

    def faults(*alerts: str) -> dict[str, str]:
        """`alerts` are the checks after the usual ones."""
        code, out, err = run_cli("doctor")
        rows = doctor_rows(out)
        faults = {name: text for name, (verdict, text) in rows.items() if verdict == "failed"}
        # MLflow says where its artifacts go, and Dagster when its daemon was last there.
        artifacts = [] if "MLflow" in faults else ["artifacts"]
        daemon = [] if "Dagster" in faults else ["daemon"]
        expected = ["settings", "Java", "raw files", "lake", "MLflow", *artifacts, "Dagster", *daemon, *alerts]
        assert list(rows) == expected
        assert code == (1 if faults else 0)
        assert (f"error: {len(faults)} of {8 + len(alerts)} checks failed" in err) == bool(faults)
        assert "Traceback" not in out + err
        return faults

    return faults


class TestDoctorAndMlflow:
    """The real client."""

    def test_an_experiment_in_the_trash_is_named(
        self, faults: Faults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_mlflow_store: Path
    ):
        uri = f"sqlite:///{shutil.copy(empty_mlflow_store, tmp_path)}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        client = MlflowResource(tracking_uri=uri).client()
        client.delete_experiment(client.create_experiment("fraud_model"))
        assert "experiment fraud_model is in MLflow's trash" in faults()["MLflow"]

    @pytest.mark.parametrize(
        ("version", "fits"), [("1.30.0", False), ("30.1", False), ("", True), ("<html>", True), (None, True)]
    )
    def test_a_server_of_another_major_version_is_named(self, version: str | None, fits: bool):
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if version is not None else 404)
                self.end_headers()
                self.wfile.write((version or mlflow_version).encode())

            def log_message(self, *_: Any) -> None: ...

        with HTTPServer(("127.0.0.1", 0), Answer) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}"
            if fits:
                doctor._check_server(address)
            else:
                with pytest.raises(
                    CommandError, match=rf"server is version {version}, its client here {mlflow_version}"
                ):
                    doctor._check_server(address)
            server.shutdown()

    def test_an_unreachable_mlflow_is_named(self, faults: Faults, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert faults() == {
            "MLflow": "MLflow's server at http://127.0.0.1:9 does not answer (Connection refused): start it, or check "
            "MLFLOW_TRACKING_URI"
        }

    def test_artifacts_that_cannot_be_written_are_named(self, faults: Faults, empty_mlflow_store: Path):
        shutil.copy(empty_mlflow_store, "data/mlflow.db")
        assert faults() == {}
        directory = Path("data/mlflow-artifacts").absolute()
        directory.touch()
        ((name, text),) = faults().items()
        assert name == "artifacts"
        assert f"artifacts cannot be written in {directory.as_uri()}: " in text
        # A new experiment would be a row of MLflow's UI.
        experiments = MlflowResource(tracking_uri=load_settings().tracking_uri).client().search_experiments()
        assert [experiment.name for experiment in experiments] == ["Default"]


@pytest.mark.usefixtures("mlflow_ready")
class TestDoctor:
    """Each fault is named with its remedy and sets the exit code."""

    def test_all_is_well(self, faults: Faults):
        assert faults() == {}

    @pytest.mark.parametrize(
        ("environment", "check", "texts"),
        [
            ({"JAVA_HOME": "/nowhere"}, "Java", ["JAVA_HOME is /nowhere"]),
            ({"JAVA_HOME": None, "PATH": "/nowhere"}, "Java", ["apt-get install openjdk-17-jre-headless"]),
            # Square brackets are part of a path, not markup.
            ({"ML_PLATFORM_RAW_URI": "/no/[red]x[/bold]"}, "raw files", ["/no/[red]x[/bold]", "ml-platform simulate"]),
            ({"DAGSTER_HOME": None}, "Dagster", ["DAGSTER_HOME is not set"]),
            # MLflow itself would try for minutes.
            (
                {"MLFLOW_TRACKING_URI": "postgresql+psycopg2://me:very-secret@127.0.0.1:9/mlflow"},
                "MLflow",
                ["in MLFLOW_TRACKING_URI", "Connection refused: start the database, or check its address"],
            ),
        ],
    )
    def test_a_fault_of_the_environment_is_named(
        self,
        faults: Faults,
        monkeypatch: pytest.MonkeyPatch,
        environment: dict[str, str | None],
        check: str,
        texts: list[str],
    ):
        set_environment(monkeypatch, environment)
        ((name, text),) = faults().items()
        assert name == check
        assert all(part in text for part in texts)
        assert "very-secret" not in text

    @pytest.mark.parametrize(
        ("owner", "method", "answer", "check", "text"),
        [
            # To list is one permission of S3, to read another.
            (storage.LocalStore, "read_start", storage.StorageError("S3 denies"), "raw files", "S3 denies"),
            (storage.LocalStore, "read_start", FileNotFoundError("s3://b/a.txt"), "raw files", "s3://b/a.txt"),
            (
                storage.LocalStore,
                "read_start",
                PermissionError(errno.EACCES, "Permission denied", "/raw/a.txt"),
                "raw files",
                "Permission denied: /raw/a.txt: check that the directory exists and is readable, or set "
                "ML_PLATFORM_RAW_URI",
            ),
            (MlflowResource, "champion", RuntimeError("no MLflow\nwith details"), "MLflow", "no MLflow"),
            (MlflowResource, "champion", lambda: time.sleep(60), "MLflow", "timed out after 5 s: check its address "),
            (
                MlflowResource,
                "champion",
                lambda: SPARK_ML,
                "MLflow",
                "problem with the champion: version 3 is a Spark ML",
            ),
        ],
    )
    def test_a_service_that_fails_is_named(
        self,
        faults: Faults,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        method: str,
        answer: Any,
        check: str,
        text: str,
    ):
        monkeypatch.setattr(doctor, "CHECK_TIMEOUT_S", 5)
        monkeypatch.setattr(owner, method, mock.Mock(side_effect=answer))
        ((name, found),) = faults().items()
        assert name == check
        assert found.startswith(text)
        assert "details" not in found

    def test_all_faults_are_named_at_once(self, faults: Faults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        (tmp_path / "file").write_text("x")
        locations = {"ML_PLATFORM_RAW_URI": str(tmp_path / "file"), "ML_PLATFORM_LAKE_URI": str(tmp_path / "file/lake")}
        set_environment(monkeypatch, {**locations, "JAVA_HOME": "/nowhere", "DAGSTER_HOME": None})
        monkeypatch.setattr(MlflowResource, "champion", mock.Mock(side_effect=RuntimeError))
        wrong = faults()
        assert list(wrong) == ["Java", "raw files", "lake", "MLflow", "Dagster"]
        assert wrong["MLflow"] == "RuntimeError"
        assert str(tmp_path / "file") in wrong["raw files"]
        assert str(tmp_path / "file") in wrong["lake"]
        assert "exists and is readable, or set ML_PLATFORM_RAW_URI" in wrong["raw files"]
        assert "exists and is writable, or set ML_PLATFORM_LAKE_URI" in wrong["lake"]

    def test_a_lake_of_another_version(self, run_cli: RunCli, faults: Faults, monkeypatch: pytest.MonkeyPatch):
        lake = lake_module.LakeResource(raw_uri="data/raw", lake_uri="data/lake", epoch="2020-01-01")
        lake.write_json("cleaned_transactions/raw_file=a/_report.json", {"schema_version": 1})
        monkeypatch.setattr(lake_module, "SCHEMA_VERSION", 2)
        text = doctor_rows(run_cli("doctor")[1])["lake"][1]
        assert "0 cleaned partitions" in text
        assert "1 of an older version (ml-platform migrate)" in text
        monkeypatch.setattr(lake_module, "SCHEMA_VERSION", 0)
        monkeypatch.setattr(lake_module, "_report_cache", {})
        assert "newer version of ml_platform" in faults()["lake"]

    def test_dagsters_broken_storage_is_named(self, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        home = tmp_path / "broken home"
        (home / "history" / "runs.db").mkdir(parents=True)
        shutil.copy(ROOT / "dagster.yaml", home)
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        ((name, text),) = faults().items()
        assert name == "Dagster"
        assert text.endswith(f": check storage in {home}/dagster.yaml")

    def test_a_spark_that_is_not_there_is_named(self, faults: Faults, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("SPARK_HOME", "/nowhere")
        assert faults() == {"Java": "SPARK_HOME is /nowhere, which is not a Spark installation: unset it"}

    def test_a_variable_that_dagsters_settings_need_is_named(
        self, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        home = tmp_path / "home"
        home.mkdir()
        shutil.copy(ROOT / "deploy" / "dagster.yaml", home)
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        assert "DAGSTER_POSTGRES_URL: not set, but " in faults()["Dagster"]

    def test_a_database_of_dagster_that_does_not_answer_is_tried_once(
        self, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        shutil.copy(ROOT / "deploy" / "dagster.yaml", tmp_path)
        url = "postgresql+psycopg2://dagster:very-secret@127.0.0.1:9/dagster"
        environment = {"DAGSTER_HOME": str(tmp_path), "DAGSTER_POSTGRES_URL": url}
        set_environment(monkeypatch, dict(environment))
        ((name, text),) = faults().items()
        assert name == "Dagster"
        assert text.startswith("cannot connect to the database in DAGSTER_POSTGRES_URL: ")
        assert text.endswith("Connection refused: start the database, or check its address and password")
        assert "very-secret" not in text
        # Dagster logs each of its attempts.
        assert not [record for record in caplog.records if "database" in record.getMessage()]

    def test_a_home_without_dagsters_settings_is_named(
        self, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "empty"))
        assert faults()["Dagster"].startswith(f"there is no {tmp_path}/empty/dagster.yaml, so Dagster would use its ")
        assert not (tmp_path / "empty").exists()

    @pytest.mark.parametrize("file", ["history/runs.db", "history/runs/index.db", "schedules/schedules.db"])
    def test_tables_of_another_version_of_dagster_are_named(self, faults: Faults, own_dagster_home: Path, file: str):
        with closing(sqlite3.connect(own_dagster_home / file)) as database, database:
            (head,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
            database.execute("UPDATE alembic_version SET version_num = 'older'")
        assert faults()["Dagster"].startswith(
            f"Dagster's tables are of revision older, and this version needs {head}: back them up, then run "
            "dagster instance migrate"
        )

    @pytest.mark.parametrize(
        ("age_s", "verdict", "text"),
        [
            (None, "note", "none has run yet: sensors, schedules and queued runs need one"),
            (3600, "note", "none has run for 60 minutes: sensors, schedules and queued runs need one"),
            (0, "ok", "last heartbeat "),
        ],
    )
    @pytest.mark.usefixtures("faults", "own_dagster_home")
    def test_a_daemon_that_does_not_run_is_noted(self, run_cli: RunCli, age_s: float | None, verdict: str, text: str):
        if age_s is not None:
            with dg.DagsterInstance.get() as instance:
                instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - age_s, "SENSOR", "id"))
        code, out, _ = run_cli("doctor")
        assert code == 0
        found = doctor_rows(out)["daemon"]
        assert found[0] == verdict
        assert found[1].startswith(text)

    def test_destinations_of_alerts_are_tried(self, faults: Faults, monkeypatch: pytest.MonkeyPatch):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            monkeypatch.setenv("ML_PLATFORM_ALERT_WEBHOOK_URL", f"http://localhost:{port}/very-secret")
            assert faults("alerts: webhook") == {}
        text = faults("alerts: webhook")["alerts: webhook"]
        assert "Connection refused" in text
        assert "very-secret" not in text
        email = {"EMAIL_TO": "a@b.example", "EMAIL_FROM": "c@d.example", "SMTP_HOST": "127.0.0.1", "SMTP_PORT": port}
        set_environment(monkeypatch, {f"ML_PLATFORM_ALERT_{name}": str(value) for name, value in email.items()})
        assert set(faults("alerts: email", "alerts: webhook")) == {"alerts: email", "alerts: webhook"}
        monkeypatch.delenv("ML_PLATFORM_ALERT_SMTP_HOST")
        assert "need ML_PLATFORM_ALERT_EMAIL_TO" in faults("alerts")["alerts"]


class TestWithdrawAndRejects:
    @pytest.fixture
    def lake(self, run_cli: RunCli) -> lake_module.LakeResource:
        simulate(run_cli, "--files", "2")
        lake = lake_module.LakeResource(raw_uri="data/raw", lake_uri="data/lake", epoch="2019-08-22")
        for key in lake.list_raw_files()[0]:
            report = cleaned_report(key, raw_spec(0), rejected_rows=101, malformed_row=100, invalid_amount=1)
            samples = {"malformed_row": "[bold]garbage", "invalid_amount": "1,-1"}
            lake.write_json(f"cleaned_transactions/raw_file={key}/_report.json", {**report, "reject_samples": samples})
        return lake

    def test_rejects_are_counted_by_reason_with_a_line_each(self, run_cli: RunCli, lake: lake_module.LakeResource):
        code, out, _ = run_cli("rejects", "2019-08-22")
        assert code == 0
        rows = [re.split(r"\s*│\s*", line)[1:4] for line in out.splitlines() if "│" in line]
        assert rows == [["malformed_row", "100", "[bold]garbage"], ["invalid_amount", "1", "1,-1"]]
        path = f"{Path(lake.lake_uri).absolute()}/rejected_transactions/raw_file=2019-08-22"
        assert out.endswith(f"101 of 20,000 rows are rejected; all of them, with reasons: {path}\n")
        clean = cleaned_report("2019-08-24", raw_spec(0))
        lake.write_json("cleaned_transactions/raw_file=2019-08-24/_report.json", clean)
        assert run_cli("rejects", "2019-08-24") == (0, "none of the 20,000 rows was rejected\n", "")
        code, _, err = run_cli("rejects", "2000-01-01")
        assert (code, "'2000-01-01' is not a cleaned partition" in err) == (1, True)

    def test_a_file_is_withdrawn_and_brought_back(self, run_cli: RunCli, lake: lake_module.LakeResource):
        code, out, err = run_cli("withdraw", "2019-08-22")
        assert (code, err) == (0, "")
        assert "2019-08-22 is withdrawn" in out
        assert not Path("data/lake/cleaned_transactions/raw_file=2019-08-22").exists()
        assert list(lake.reports(CleanedReport)) == ["2019-08-24"]
        for arguments, error in (
            (("2019-08-23",), "neither a raw file nor a partition"),
            (("../..",), "neither a raw file nor a partition"),
            (("2019-08-24", "--undo"), "is not withdrawn; ml-platform summary lists withdrawn files"),
        ):
            code, _, err = run_cli("withdraw", *arguments)
            assert (code, error in err) == (1, True)
        assert run_cli("withdraw", "--undo", "2019-08-22")[0] == 0
        assert lake.withdrawn() == []

    def test_nothing_is_processed_beside_a_run(self, run_cli: RunCli):
        """It may be rebuilding the features of the same partitions."""
        assert (
            run_cli("simulate", "--first-file", "9", "--files", "1", "--days-per-file", "1", "--customers", "5")[0] == 0
        )
        assert run_cli("sync")[0] == 0
        with dg.DagsterInstance.get() as instance:
            instance.add_run(dg.DagsterRun("process_new_files", status=dg.DagsterRunStatus.STARTED))
        code, _, err = run_cli("process-new-files")
        assert (code, "may write the same partitions: wait for it" in err) == (1, True)

    def test_nothing_is_withdrawn_under_a_run(self, run_cli: RunCli, lake: lake_module.LakeResource):
        """Any run may read the file, as history or as a neighbour."""
        assert run_cli("sync")[0] == 0
        with dg.DagsterInstance.get() as instance:
            instance.add_run(dg.DagsterRun("process_new_files", status=dg.DagsterRunStatus.STARTED))
        code, _, err = run_cli("withdraw", "2019-08-22")
        assert (code, "runs are queued or running" in err) == (1, True)


class TestProbeOfArtifacts:
    """On S3: test_s3.py; on MLflow's server: test_stack.py."""

    def test_it_leaves_nothing_behind(self, tmp_path: Path):
        new, existing = tmp_path / "new" / "artifacts", tmp_path / "existing"
        existing.mkdir()
        (existing / "kept").touch()
        for directory in (new, existing):
            doctor.probe_artifacts(directory.as_uri(), "sqlite://")
        assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {"existing", "existing/kept"}

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        (tmp_path / "file").touch()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", lambda self, path: None)
        uri = tmp_path.as_uri()
        for location, tracking_uri, message in (
            (f"{uri}/file", "sqlite://", f"^artifacts cannot be written in {uri}/file: .*a directory of this machine"),
            ("mlflow-artifacts:/1", "http://127.0.0.1:9", "^artifacts cannot be written in .*--artifacts-destination"),
            # As in a bucket where the key may write and not delete, which MLflow's S3 client does not report.
            (f"{uri}/a", "sqlite://", rf"^artifacts cannot be deleted in {uri}/a: ml-platform-doctor-\w+ still exists"),
        ):
            with pytest.raises(CommandError, match=message):
                doctor.probe_artifacts(location, tracking_uri)


class TestChampion:
    """The command group champion, on a registry of two versions."""

    @pytest.fixture
    def registry(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_mlflow_store: Path) -> MlflowResource:
        uri = f"sqlite:///{shutil.copy(empty_mlflow_store, tmp_path)}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        resource = MlflowResource(tracking_uri=uri)
        client = resource.client()
        client.create_registered_model("fraud_model")
        experiment = client.create_experiment("fraud_model", artifact_location=str(tmp_path / "artifacts"))
        for number, library_version in ((1, "1.7.6"), (2, "2.1.4")):
            run_id = client.create_run(experiment).info.run_id
            client.log_metric(run_id, "test_roc_auc", 0.8 + number / 100)
            tags = {
                "cutoff": f"file-{number}",
                "reload_proof": "100 rows",
                "model_uri": f"file:///lake/models/{number}/model.json",
                "features": '["tx_amount"]',
                "learner": "xgboost",
                "library_version": library_version,
            }
            client.create_model_version("fraud_model", f"file:///nowhere/{number}", run_id=run_id, tags=tags)
        return resource

    def test_a_champion_whose_artifacts_or_run_are_gone_is_named_with_the_way_out(
        self, run_cli: RunCli, registry: MlflowResource
    ):
        registry.set_champion("2", {}, lambda _: None)
        for command in ("champion show", "summary"):
            code, out, _ = run_cli(*command.split())
            text = " ".join(out.split())
            assert (code, "version 2: its artifacts are gone from" in text) == (0, True), text
            assert "ml-platform champion rollback, or materialize fraud_model" in text
        champion = registry.champion()
        assert champion is not None
        registry.client().delete_run(champion.run_id)
        code, out, _ = run_cli("champion", "show")
        assert (code, "is in the trash: restore it (mlflow runs restore)" in " ".join(out.split())) == (0, True)

    def test_set_show_and_roll_back(self, run_cli: RunCli, registry: MlflowResource):
        assert "No model" in run_cli("champion", "show")[1]
        assert json.loads(run_cli("champion", "show", "--json")[1]) is None
        assert run_cli("champion", "set", "1", "--why", "the first [red]", "--who", "ann")[0] == 0
        assert run_cli("champion", "set", "2", "--why", "by hand", "--who", "ben")[0] == 0
        shown = run_cli("champion", "show")[1]
        for part in ("version 2", "file-2", "ben", "by hand", "0.82"):
            assert part in shown
        assert run_cli("champion", "set", "2", "--why", "again", "--who", "ben")[0] == 0
        assert run_cli("champion", "rollback", "--why", "too many alerts", "--who", "eve")[0] == 0
        shown = run_cli("champion", "show")[1]
        for part in ("version 1", "file-1", "eve", "too many alerts", "0.81"):
            assert part in shown
        code, out, err = run_cli("champion", "show", "--json")
        assert (code, err) == (0, "")
        facts = json.loads(out)
        assert datetime.fromisoformat(facts.pop("since"))
        (problem,) = facts.pop("problems")
        assert problem.startswith("Problem with the champion: version 1: its artifacts are gone from")
        assert facts == {
            **{"version": 1, "by": "eve", "why": "too many alerts", "cutoff": "file-1", "learner": "xgboost"},
            **{"train_last_date": None, "run_id": None, "platform_version": None, "metrics": {"test_roc_auc": 0.81}},
        }
        # Alerts read each move in Dagster, and the same version again is no move.
        with dg.DagsterInstance.get() as instance:
            moves = instance.fetch_observations(CHAMPION_ASSET, limit=9, ascending=True).records
        told = [move.asset_observation.metadata for move in moves if move.asset_observation]
        assert [metadata["champion_version"].value for metadata in told] == ["1", "2", "1"]
        assert [metadata["by"].value for metadata in told] == ["ann", "ben", "eve"]
        assert {name: value.value for name, value in told[2].items()} == {
            "champion_version": "1",
            "champion_before": "2",
            "by": "eve",
            "why": "too many alerts",
            "test_roc_auc": "0.8100",
        }

    def test_without_dagster_the_alias_moves_but_nobody_is_told(
        self, run_cli: RunCli, registry: MlflowResource, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.delenv("DAGSTER_HOME")
        code, _, error = run_cli("champion", "set", "1", "--why", "x")
        assert code == 0
        assert "no alert will report it. Check DAGSTER_HOME (ml-platform doctor): DAGSTER_HOME is not set" in error
        champion = registry.champion()
        assert champion is not None
        assert str(champion.version) == "1"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("set 7 --why x", "no version '7'"),
            ("set nonsense --why x", "no version 'nonsense'"),
            ("set 1 --why=", "--why is empty"),
            ("rollback --why x", "no earlier champion"),
        ],
    )
    def test_versions_and_notes_that_are_refused(
        self, run_cli: RunCli, registry: MlflowResource, arguments: str, message: str
    ):
        code, _, error = run_cli("champion", *arguments.split())
        assert code == 1
        assert message in error
        assert registry.champion() is None

    def test_an_unreachable_server_is_not_taken_for_a_missing_version(
        self, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
    ):
        set_environment(
            monkeypatch, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        )
        code, _, error = run_cli("champion", "set", "1", "--why", "x")
        assert code == 1
        assert "has no version" not in error
        assert "127.0.0.1" in error

    @pytest.mark.parametrize(
        ("tags", "message"),
        [
            ({"reload_proof": None}, "version 2 was never verified"),
            ({"library_version": "99.1.0"}, "version 2 was written by xgboost 99.1.0"),
            ({"model_uri": "file:///m/model", "spark_version": "4.3.0"}, "version 2 is a Spark ML pipeline"),
            ({"features": "edited"}, "version 2 has no inputs in its tags: choose another version, or materialize"),
        ],
    )
    def test_a_version_that_cannot_be_champion(
        self, run_cli: RunCli, registry: MlflowResource, tags: dict[str, str | None], message: str
    ):
        registry.set_champion("2", {}, lambda _: None)
        registry.set_champion("1", {}, lambda _: None)
        client = registry.client()
        for name, value in tags.items():
            client.delete_model_version_tag("fraud_model", "2", name)
            if value:
                client.set_model_version_tag("fraud_model", "2", name, value)
        for command in ("set 2", "rollback"):
            code, _, error = run_cli("champion", *command.split(), "--why", "try it")
            assert code == 1
            assert message in error
        assert registry.champion() == client.get_model_version("fraud_model", "1")
        assert "champion_why" not in client.get_model_version("fraud_model", "2").tags

    def test_a_version_that_the_gate_promoted_needs_no_proof(self, run_cli: RunCli, registry: MlflowResource):
        registry.client().delete_model_version_tag("fraud_model", "2", "reload_proof")
        registry.client().set_model_version_tag("fraud_model", "2", "champion_by", "fraud_model")
        assert run_cli("champion", "set", "2", "--why", "x")[0] == 0

    def test_a_champion_that_cannot_score_is_named(self, run_cli: RunCli, registry: MlflowResource):
        registry.client().set_model_version_tag("fraud_model", "1", "library_version", "99.1.0")
        registry.set_champion("1", {}, lambda _: None)
        for command in ("champion show", "summary", "migrate --dry-run"):
            code, out, error = run_cli(*command.split())
            assert code == 0, error
            assert "version 1 was written by xgboost 99.1.0" in " ".join(out.split())


class TestClusters:
    """On the stand-in for the API; which clusters are left over: test_orphans.py."""

    @pytest.fixture
    def cloud(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDataproc]:
        with FakeDataproc(tmp_path / "cloud", run_job=lambda request: JobScript(), delete_seconds=0.1) as cloud:
            settings = {
                "ML_PLATFORM_DEPLOYMENT": "yandex",
                "ML_PLATFORM_RAW_URI": "s3://bucket/raw",
                "ML_PLATFORM_LAKE_URI": "s3://bucket/lake",
                "DATAPROC_POLL_S": "0.1",
                **cloud.environment(),
            }
            set_environment(monkeypatch, {**settings})
            yield cloud

    @pytest.fixture
    def ids(self, run_cli: RunCli, cloud: FakeDataproc, tmp_path: Path) -> dict[str, str]:
        """Three clusters of this deployment, one of another deployment, and one that is not the platform's."""
        (tmp_path / "dagster home").mkdir()
        engine = clusters.dataproc_engine(load_settings())
        engines = {"yandex": engine, "staging": engine.model_copy(update={"deployment": "staging"})}

        def add(name: str, deployment: str = "yandex") -> str:
            return cloud.add_cluster(f"{name}-1", engines[deployment].labels(f"{name}-run", time.time() + 3600))

        with dg.DagsterInstance.get() as instance:
            for name, status in (("busy", dg.DagsterRunStatus.STARTED), ("done", dg.DagsterRunStatus.SUCCESS)):
                instance.add_run(dg.DagsterRun("process_new_files", run_id=f"{name}-run", status=status))
        ids = {name: add(name) for name in ("busy", "done", "lost")}
        return ids | {"staging": add("staging", "staging"), "foreign": cloud.add_cluster("foreign-1")}

    @pytest.mark.parametrize("credential", ["key", "token"])
    def test_clusters_are_listed_with_what_needs_them(
        self,
        run_cli: RunCli,
        cloud: FakeDataproc,
        ids: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
        credential: str,
    ):
        if credential == "token":
            set_environment(monkeypatch, {"YC_SERVICE_ACCOUNT_KEY_FILE": None, "YC_IAM_TOKEN": cloud.iam_token()})
        code, out, err = run_cli("clusters", "list")
        assert (code, err) == (0, "")
        lines = {name: line for name in ids for line in out.splitlines() if f"{name}-1 " in line}
        assert set(lines) == {"busy", "done", "lost"}
        assert all(ids[name] in line for name, line in lines.items())
        assert "in use" in lines["busy"]
        assert "orphaned: its run done-run has ended (SUCCESS)" in lines["done"]
        assert "orphaned: its run lost-run is unknown" in lines["lost"]
        assert cloud.calls("ClusterService.Delete") == []
        code, out, err = run_cli("clusters", "list", "--json")
        assert (code, err) == (0, "")
        listed = {cluster["name"]: cluster for cluster in json.loads(out)}
        assert all(datetime.fromisoformat(cluster.pop("created")) for cluster in listed.values())
        assert listed["done-1"] == {
            **{"name": "done-1", "id": ids["done"], "status": "RUNNING", "run_id": "done-run"},
            "orphaned": "its run done-run has ended (SUCCESS)",
        }
        assert {name: bool(cluster["orphaned"]) for name, cluster in listed.items()} == {
            **{"busy-1": False, "done-1": True, "lost-1": True}
        }

    def test_a_deployment_without_clusters(self, run_cli: RunCli, cloud: FakeDataproc):
        assert only_line(run_cli("clusters", "list")[1]) == "This deployment has no clusters."
        assert json.loads(run_cli("clusters", "list", "--json")[1]) == []
        assert only_line(run_cli("clusters", "delete", "--orphaned")[1]) == "No orphaned clusters."

    def test_only_orphaned_clusters_are_deleted(self, run_cli: RunCli, cloud: FakeDataproc, ids: dict[str, str]):
        code, out, _ = run_cli("clusters", "delete", "--orphaned")
        assert code == 0
        assert f"deleted done-1 ({ids['done']}): its run done-run has ended (SUCCESS)" in out
        assert f"deleted lost-1 ({ids['lost']})" in out
        assert set(cloud.clusters) == {ids["busy"], ids["staging"], ids["foreign"]}

    @pytest.mark.parametrize("name", ["staging", "foreign"])
    def test_clusters_of_others_are_left_alone(
        self, run_cli: RunCli, cloud: FakeDataproc, ids: dict[str, str], name: str
    ):
        for force in ([], ["--force"]):
            code, _, err = run_cli("clusters", "delete", ids["lost"], ids[name], *force)
            assert code == 1
            assert only_line(err) == f"error: not a cluster of this deployment: {ids[name]}; nothing was deleted"
        assert set(cloud.clusters) == set(ids.values())

    def test_a_cluster_in_use_needs_force(self, run_cli: RunCli, cloud: FakeDataproc, ids: dict[str, str]):
        code, _, err = run_cli("clusters", "delete", ids["lost"], ids["busy"])
        assert code == 1
        assert only_line(err).startswith(f"error: a run still needs {ids['busy']}: terminate it, or give --force")
        assert set(cloud.clusters) == set(ids.values())
        code, out, _ = run_cli("clusters", "delete", ids["busy"], "--force")
        assert (code, only_line(out)) == (0, f"deleted busy-1 ({ids['busy']}): by force")
        assert set(cloud.clusters) == set(ids.values()) - {ids["busy"]}

    def test_delete_takes_either_ids_or_orphaned(self, run_cli: RunCli, cloud: FakeDataproc):
        for arguments in ([], ["some-id", "--orphaned"]):
            code, _, err = run_cli("clusters", "delete", *arguments)
            assert code == 2
            assert "name clusters" in err
        assert cloud.journal == []

    def test_a_refusal_of_the_api_is_one_line_with_advice(
        self, run_cli: RunCli, cloud: FakeDataproc, ids: dict[str, str]
    ):
        cloud.fail("ClusterService.Delete", "PERMISSION_DENIED", "not you")
        code, _, err = run_cli("clusters", "delete", ids["lost"])
        assert code == 1
        assert re.match(r"error: .*PERMISSION_DENIED: not you \(grant the service account the roles", only_line(err))

    def test_the_doctor_asks_the_api(
        self,
        run_cli: RunCli,
        cloud: FakeDataproc,
        ids: dict[str, str],
        mlflow_ready: None,
        monkeypatch: pytest.MonkeyPatch,
    ):
        # There is no S3, which fails checks of its own.
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        monkeypatch.setattr(storage, "S3_ATTEMPTS", 1)
        found = f"the API answers; 3 clusters of this deployment in folder {cloud.folder_id}"
        code, out, _ = run_cli("doctor")
        rows = doctor_rows(out)
        assert code == 1
        assert "Java" not in rows
        assert rows["Data Proc"] == ("ok", found)
        cloud.fail("ClusterService.List", "PERMISSION_DENIED", "not you")
        with pytest.raises(Exception, match="PERMISSION_DENIED: not you"):
            doctor._check_dataproc(load_settings())
        assert cloud.calls("ClusterService.Create") == []
