"""The command `ml-platform`: what it prints, leaves behind, and says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import dagster as dg
import pytest

from ml_platform.cli import main as cli
from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript
from ml_platform.dev.cloud.processes import TetheredProcess, free_port, listens
from ml_platform.lake import resource as lake_module
from ml_platform.lake.reports import FEATURES_TABLE as FEATURES
from ml_platform.model.mlflow import MlflowResource
from ml_platform.settings import load_settings
from ml_platform_tests.fakes import cleaned_report, features_report, raw_spec

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("simulate", "sync", "process-new-files", "summary", "doctor", "dev-cloud", "clusters", "migrate")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, in an empty directory; its exit code, output and errors."""
    directory = tmp_path / "a project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster home"))
    for console in (cli.console, cli.errors):
        monkeypatch.setattr(console, "width", 800)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ml-platform", *arguments])
        capfd.readouterr()
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        output = capfd.readouterr()
        return int(code or 0), output.out, output.err

    return run


@pytest.fixture
def mlflow_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLflow that answers at once; the real one is test_assets.py's."""
    from ml_platform.model.mlflow import MlflowResource

    monkeypatch.setattr(MlflowResource, "champion", lambda self: None)
    monkeypatch.setattr(MlflowResource, "artifact_location", lambda self: None)


def only_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def simulate(run: Run, *arguments: str) -> str:
    small = ("--days-per-file", "2", "--customers", "20", "--terminals", "30")
    code, out, err = run("simulate", *small, *arguments)
    assert code == 0, err
    return out


class TestHelp:
    def test_all_commands(self, run: Run):
        code, out, _ = run("--help")
        assert code == 0
        for command in COMMANDS:
            assert command in out

    @pytest.mark.parametrize("command", COMMANDS)
    def test_command(self, run: Run, command: str):
        code, out, err = run(command, "--help")
        assert (code, err) == (0, "")
        assert f"ml-platform {command}" in out

    def test_no_command(self, run: Run):
        code, out, err = run()
        assert code != 0
        assert "simulate" in out + err

    def test_unknown_command_and_option(self, run: Run):
        for arguments in (("fly",), ("simulate", "--files", "none"), ("simulate", "--files", "0")):
            code, _, err = run(*arguments)
            assert code == 2
            assert "Traceback" not in err


class TestSimulateAndSync:
    def test_simulate_then_sync(self, run: Run, tmp_path: Path):
        out = simulate(run, "--files", "2")
        raw = tmp_path / "a project" / "data" / "raw"
        names = ["2019-08-22.txt", "2019-08-24.txt"]
        assert sorted(path.name for path in raw.iterdir()) == names
        assert all(name in out for name in names)
        header, first = (raw / names[0]).read_text().splitlines()[:2]
        assert header.startswith("#")
        assert len(first.split(",")) == 9

        code, out, _ = run("sync")
        assert (code, only_line(out)) == (0, f"2 raw files in {raw}, 2 newly registered")
        with dg.DagsterInstance.get() as instance:
            assert list(instance.get_dynamic_partitions("raw_files")) == ["2019-08-22", "2019-08-24"]
        code, out, _ = run("sync")
        assert (code, only_line(out)) == (0, f"2 raw files in {raw}, 0 newly registered")

    def test_the_table_counts_rows(self, run: Run, tmp_path: Path):
        out = simulate(run, "--files", "1", "--fault-rate", "0")
        (file,) = (tmp_path / "a project" / "data" / "raw").iterdir()
        rows = len(file.read_text().splitlines()) - 1
        assert re.search(rf"2019-08-22\.txt\W+{rows}\W", out)

    def test_existing_files_are_kept_unless_told_otherwise(self, run: Run, tmp_path: Path):
        simulate(run, "--files", "1")
        file = tmp_path / "a project" / "data" / "raw" / "2019-08-22.txt"
        simulated = file.read_bytes()
        file.write_text("mine")
        assert "kept as it is" in simulate(run, "--files", "2")
        assert file.read_text() == "mine"
        simulate(run, "--files", "1", "--overwrite")
        assert file.read_bytes() == simulated

    def test_later_files_and_epoch(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("ML_PLATFORM_EPOCH", "2018-04-01")
        monkeypatch.setenv("ML_PLATFORM_RAW_URI", str(tmp_path / "other place"))
        simulate(run, "--files", "1", "--first-file", "3")
        assert [path.name for path in (tmp_path / "other place").iterdir()] == ["2018-04-07.txt"]

    def test_sync_names_what_it_ignores(self, run: Run, tmp_path: Path):
        raw = tmp_path / "a project" / "data" / "raw"
        raw.mkdir(parents=True)
        for name in ("good.txt", "two [bold]words.txt", "other.csv"):
            (raw / name).write_text("x")
        code, out, err = run("sync")
        assert code == 0
        assert "1 raw files" in out
        assert only_line(err).startswith("ignored 'two [bold]words.txt': only letters")


class TestDotenv:
    def test_is_read_and_wins_as_in_dagsters_own_commands(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        Path(".env").write_text(f'ML_PLATFORM_RAW_URI="{tmp_path}/from dotenv"\nML_PLATFORM_EPOCH=2020-02-02\n')
        monkeypatch.setenv("ML_PLATFORM_EPOCH", "2018-04-01")
        simulate(run, "--files", "1")
        assert [path.name for path in (tmp_path / "from dotenv").iterdir()] == ["2020-02-02.txt"]


class TestErrors:
    @pytest.mark.parametrize(
        ("variable", "value", "arguments"),
        [
            ("ML_PLATFORM_EPOCH", "soon", ("simulate",)),
            ("ML_PLATFORM_RAW_URI", "gs://bucket", ("sync",)),
            ("ML_PLATFORM_DEPLOYMENT", "moon", ("doctor",)),
            ("ML_PLATFORM_LAKE_URI", "s3://", ("summary",)),
        ],
    )
    def test_a_wrong_setting_is_one_line(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, arguments: tuple[str, ...]
    ):
        monkeypatch.setenv(variable, value)
        code, _, err = run(*arguments)
        assert code == 1
        assert only_line(err).startswith(f"error: {variable}: ")

    @pytest.mark.parametrize("command", ["sync", "process-new-files"])
    def test_no_dagster_home(self, run: Run, monkeypatch: pytest.MonkeyPatch, command: str):
        monkeypatch.delenv("DAGSTER_HOME")
        code, _, err = run(command)
        assert code == 1
        assert only_line(err).startswith("error: DAGSTER_HOME is not set: ")

    def test_relative_dagster_home(self, run: Run, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("DAGSTER_HOME", "here")
        code, _, err = run("sync")
        assert (code, only_line(err)) == (1, "error: DAGSTER_HOME takes an absolute path")

    def test_impossible_simulation(self, run: Run):
        code, _, err = run("simulate", "--fault-rate", "5000")
        assert code == 1
        assert only_line(err).startswith("error: fault_rate is 5000")

    def test_unforeseen(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("ML_PLATFORM_RAW_URI", str(tmp_path / "file"))
        code, _, err = run("simulate")
        assert code == 1
        assert "Traceback" not in err
        assert err.startswith("error: ")
        assert str(tmp_path / "file") in err
        assert err.strip().splitlines()[1:] == ["(ml-platform --traceback … shows where it happened)"]

    def test_unforeseen_with_traceback(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("ML_PLATFORM_RAW_URI", str(tmp_path / "file"))
        with pytest.raises(NotADirectoryError):
            run("--traceback", "simulate")

    def test_interrupt(self, run: Run, monkeypatch: pytest.MonkeyPatch):
        def interrupt(_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "_lake", interrupt)
        code, _, err = run("sync")
        assert code == 130
        assert "Traceback" not in err

    def test_as_users_see_it(self, tmp_path: Path):
        """In a process of its own, without and with --traceback."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        for arguments, traceback in ((["sync"], False), (["--traceback", "sync"], True)):
            done = subprocess.run(
                [sys.executable, "-m", "ml_platform.cli.main", *arguments],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 1
            assert ("Traceback" in done.stderr) == traceback
            if not traceback:
                assert only_line(done.stderr).startswith("error: DAGSTER_HOME is not set")


class TestSummary:
    def test_lists_the_lake(self, run: Run, tmp_path: Path, mlflow_ready: None):
        simulate(run, "--files", "2")
        cleaned = tmp_path / "a project/data/lake/cleaned_transactions/raw_file=2019-08-22/_report.json"
        features = tmp_path / f"a project/data/lake/{FEATURES}/raw_file=2019-08-22/_report.json"
        report = cleaned_report("2019-08-22", raw_spec(0), raw_rows=21_003, rejected_rows=1_001, duplicate_rows=2)
        for path, content in ((cleaned, report), (features, features_report(report, {}))):
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(content))
        code, out, _ = run("summary")
        assert code == 0
        first, second = (line for line in out.splitlines() if "2019-" in line)
        assert re.findall(r"[\w,-]+", first) == ["2019-08-22", "21,003", "20,000", "2", "1,001", "200", "yes"]
        assert "2019-08-24" in second
        assert "not cleaned yet" in second
        assert "No model of fraud_model is the champion yet." in out


class TestDoctor:
    """Each thing that may be wrong is named, with what to do, and the exit code tells."""

    @pytest.fixture
    def java(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
        """Install a Java that says what it is told to."""

        def install(says: str) -> Path:
            home = tmp_path / "some java"
            (home / "bin").mkdir(parents=True, exist_ok=True)
            program = home / "bin" / "java"
            program.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{says}\nEND\n")
            program.chmod(0o755)
            monkeypatch.setenv("JAVA_HOME", str(home))
            return program

        install('openjdk version "17.0.1" 2021-10-19\nOpenJDK Runtime Environment (build 17.0.1+12)')
        return install

    @pytest.fixture(scope="class")
    def dagster_home(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        """Dagster's storage, which takes a second to make; the doctor only reads it."""
        home = str(tmp_path_factory.mktemp("dagster home"))
        with mock.patch.dict(os.environ, DAGSTER_HOME=home), dg.DagsterInstance.get():
            return home

    @pytest.fixture
    def healthy(self, healthy_but_for_mlflow: None, mlflow_ready: None) -> None: ...

    @pytest.fixture
    def healthy_but_for_mlflow(
        self, run: Run, java: Callable[[str], Path], dagster_home: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DAGSTER_HOME", dagster_home)
        raw = Path("data/raw")
        raw.mkdir(parents=True)
        (raw / "a.txt").write_text("x")

    @pytest.fixture
    def mlflow_server(self, tmp_path: Path) -> Iterator[tuple[str, Path]]:
        """MLflow's server, which keeps its clients' artifacts: its address, and its directory for them."""
        port, directory = free_port(), tmp_path / "server" / "artifacts"
        store = f"sqlite:///{tmp_path}/server/mlflow.db"
        options = {"--host": "127.0.0.1", "--port": str(port), "--workers": "1", "--backend-store-uri": store}
        command = [sys.executable, "-m", "mlflow", "server", "--artifacts-destination", str(directory)]
        server = TetheredProcess(
            [*command, *(part for option in options.items() for part in option)],
            log=tmp_path / "server" / "log",
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        try:
            server.wait_until(lambda: listens(port), what="MLflow's server", timeout_s=120)
            yield f"http://127.0.0.1:{port}", directory
        finally:
            server.stop()

    @staticmethod
    def rows(out: str) -> dict[str, tuple[str, str]]:
        cells = [[cell.strip() for cell in re.split("[│┃|]", line)[1:-1]] for line in out.splitlines()]
        return {row[0]: (row[1], row[2]) for row in cells if len(row) == 3 and row[1] in ("ok", "wrong")}

    def wrong(self, run: Run, *alerts: str) -> dict[str, str]:
        """What the doctor says is wrong; the exit code must agree. `alerts` are the checks after the usual ones."""
        code, out, err = run("doctor")
        rows = self.rows(out)
        wrong = {name: found for name, (verdict, found) in rows.items() if verdict == "wrong"}
        # Without MLflow nobody knows where its artifacts go.
        artifacts = [] if "MLflow" in wrong else ["artifacts"]
        assert list(rows) == ["settings", "Java", "raw files", "lake", "MLflow", *artifacts, "Dagster", *alerts]
        assert code == (1 if wrong else 0)
        if wrong:
            assert f"error: {len(wrong)} of {7 + len(alerts)} checks failed" in err
        return wrong

    def test_all_is_well(self, run: Run, healthy: None):
        assert self.wrong(run) == {}

    @pytest.mark.parametrize(
        "says",
        [
            'openjdk version "21.0.2" 2024-01-16',
            'openjdk version "21-ea" 2023-09-19',
            'java version "17.0.9" 2023-10-17 LTS',
            'Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "17.0.1" 2021-10-19',
        ],
    )
    def test_suitable_java(self, run: Run, healthy: None, java: Callable[[str], Path], says: str):
        java(says)
        assert self.wrong(run) == {}

    @pytest.mark.parametrize(
        "says",
        [
            'openjdk version "11.0.2" 2019-01-15',
            'java version "1.8.0_17"',
            'openjdk version "25" 2025-09-16',
            "",
        ],
    )
    def test_unsuitable_java(self, run: Run, healthy: None, java: Callable[[str], Path], says: str):
        program = java(says)
        wrong = self.wrong(run)
        assert list(wrong) == ["Java"]
        assert str(program) in wrong["Java"]
        assert "17 or 21" in wrong["Java"]

    def test_java_home_without_java(self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("JAVA_HOME", "/nowhere")
        wrong = self.wrong(run)
        assert list(wrong) == ["Java"]
        assert "JAVA_HOME is /nowhere" in wrong["Java"]

    def test_no_java_at_all(self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("JAVA_HOME")
        monkeypatch.setenv("PATH", "/nowhere")
        wrong = self.wrong(run)
        assert list(wrong) == ["Java"]
        assert "apt-get install openjdk-17-jre-headless" in wrong["Java"]

    def test_no_raw_files(self, run: Run, healthy: None):
        Path("data/raw/a.txt").unlink()
        wrong = self.wrong(run)
        assert list(wrong) == ["raw files"]
        assert "ml-platform simulate" in wrong["raw files"]

    def test_raw_files_and_lake_that_cannot_be(
        self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("ML_PLATFORM_RAW_URI", str(tmp_path / "file"))
        monkeypatch.setenv("ML_PLATFORM_LAKE_URI", str(tmp_path / "file" / "lake"))
        wrong = self.wrong(run)
        assert list(wrong) == ["raw files", "lake"]
        assert all(str(tmp_path / "file") in found for found in wrong.values())

    def test_no_dagster_home(self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("DAGSTER_HOME")
        wrong = self.wrong(run)
        assert list(wrong) == ["Dagster"]
        assert "DAGSTER_HOME is not set" in wrong["Dagster"]

    def test_no_mlflow(self, run: Run, java: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
        """The real client, and nobody who answers."""
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        simulate(run, "--files", "1")
        wrong = self.wrong(run)
        assert list(wrong) == ["MLflow"]
        assert "127.0.0.1" in wrong["MLflow"]

    def test_a_check_that_never_ends(self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(cli, "CHECK_TIMEOUT_S", 0.5)
        monkeypatch.setattr(MlflowResource, "champion", lambda self: time.sleep(5))
        started = time.monotonic()
        assert self.wrong(run) == {"MLflow": "no answer within 0.5 s: check its address and the network"}
        assert time.monotonic() - started < 4

    def test_a_database_that_is_not_there(self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch):
        """MLflow itself would try for minutes; the password stays out of what is said."""
        pytest.importorskip("psycopg2")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://me:very-secret@127.0.0.1:9/mlflow")
        wrong = self.wrong(run)
        assert list(wrong) == ["MLflow"]
        assert "Connection refused" in wrong["MLflow"]
        assert "very-secret" not in wrong["MLflow"]

    def artifacts(self, run: Run) -> tuple[str, str]:
        """What the doctor says of MLflow's artifacts; all else is well."""
        rows = self.rows(run("doctor")[1])
        assert {name for name, (verdict, _) in rows.items() if verdict == "wrong"} <= {"artifacts"}
        return rows["artifacts"]

    @pytest.mark.e2e
    def test_artifacts_that_mlflows_server_keeps(
        self, run: Run, healthy_but_for_mlflow: None, mlflow_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
    ):
        address, directory = mlflow_server
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        client = MlflowResource(tracking_uri=address).client()
        assert self.artifacts(run) == ("ok", "can be written, read and deleted in mlflow-artifacts:/0")
        # A new experiment would have been a row of MLflow's UI.
        assert client.get_experiment_by_name("fraud_model") is None
        number = client.create_experiment("fraud_model")
        assert self.artifacts(run) == ("ok", f"can be written, read and deleted in mlflow-artifacts:/{number}")
        assert [path for path in directory.rglob("*") if path.is_file()] == []
        assert client.search_runs([number]) == []

        shutil.rmtree(directory)
        directory.write_text("a file where the directory was")
        verdict, found = self.artifacts(run)
        assert verdict == "wrong"
        assert f"nothing can be written in mlflow-artifacts:/{number}: " in found
        assert "--artifacts-destination" in found

    def test_artifacts_beside_the_lake(self, run: Run, healthy_but_for_mlflow: None):
        directory = Path("data/mlflow-artifacts").absolute()
        where = directory.as_uri()
        assert self.artifacts(run) == ("ok", f"can be written, read and deleted in {where}")
        assert not directory.exists()
        directory.mkdir()
        (directory / "kept").touch()
        assert self.artifacts(run)[0] == "ok"
        assert [path.name for path in directory.iterdir()] == ["kept"]
        shutil.rmtree(directory)
        directory.touch()
        verdict, found = self.artifacts(run)
        assert verdict == "wrong"
        assert f"nothing can be written in {where}: " in found
        assert "a directory of this machine" in found
        experiments = MlflowResource(tracking_uri=load_settings().tracking_uri).client().search_experiments()
        assert [experiment.name for experiment in experiments] == ["Default"]

    def test_artifacts_that_stay(self, run: Run, healthy_but_for_mlflow: None, monkeypatch: pytest.MonkeyPatch):
        """As in a bucket where the key may write and not delete; S3's client in MLflow says nothing of it."""
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", lambda self, path: None)
        verdict, found = self.artifacts(run)
        assert verdict == "wrong"
        (left,) = Path("data/mlflow-artifacts").iterdir()
        assert f"nothing can be deleted in {left.parent.absolute().as_uri()}: {left.name} is still there" in found

    def test_a_champion_that_cannot_score(self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch):
        tags = {"spark_version": "4.3.0", "model_uri": "file:///lake/models/a/r/model"}
        champion = mock.Mock(version=3, tags=tags)
        monkeypatch.setattr(MlflowResource, "champion", lambda self: champion)
        assert "version 3 is a Spark ML pipeline of an earlier version" in self.wrong(run)["MLflow"]
        champion.tags = {"model_uri": "file:///lake/m/model.json", "features": '["a"]', "learner": "xgboost"}
        champion.tags["library_version"] = "99.1.0"
        assert "version 3 was written by xgboost 99.1.0" in self.wrong(run)["MLflow"]
        champion.tags["library_version"] = "1.7.6"
        assert self.wrong(run) == {}

    def test_raw_files_that_may_be_listed_but_not_read(self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch):
        def denied(*_: object) -> bytes:
            raise lake_module.StorageError("S3 denies GetObject")

        monkeypatch.setattr(lake_module.LocalStore, "read_start", denied)
        assert self.wrong(run) == {"raw files": "S3 denies GetObject"}

    def test_a_lake_of_another_version(self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch):
        lake = lake_module.LakeResource(raw_uri="data/raw", lake_uri="data/lake", epoch="2020-01-01")
        lake.write_json("cleaned_transactions/raw_file=a/_report.json", {"schema_version": 1})
        monkeypatch.setattr(lake_module, "SCHEMA_VERSION", 2)
        assert "0 cleaned partitions" in (found := self.rows(run("doctor")[1])["lake"][1])
        assert "1 of an older version (ml-platform migrate)" in found
        monkeypatch.setattr(lake_module, "SCHEMA_VERSION", 0)
        assert "newer version of ml_platform" in self.wrong(run)["lake"]

    def test_dagsters_storage_is_away(self, run: Run, healthy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        home = tmp_path / "broken home"
        (home / "history").mkdir(parents=True)
        (home / "history" / "runs.db").mkdir()
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        wrong = self.wrong(run)
        assert list(wrong) == ["Dagster"]
        assert wrong["Dagster"].endswith(f": check storage in {home}/dagster.yaml")

    def test_alerts(self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            monkeypatch.setenv("ML_PLATFORM_ALERT_WEBHOOK_URL", f"http://localhost:{port}/very-secret")
            assert self.wrong(run, "alerts: webhook") == {}
        wrong = self.wrong(run, "alerts: webhook")
        assert "Connection refused" in wrong["alerts: webhook"]
        assert "very-secret" not in str(run("doctor"))
        for name, value in {"EMAIL_TO": "a@b.example", "EMAIL_FROM": "c@d.example", "SMTP_HOST": "127.0.0.1"}.items():
            monkeypatch.setenv(f"ML_PLATFORM_ALERT_{name}", value)
        monkeypatch.setenv("ML_PLATFORM_ALERT_SMTP_PORT", str(port))
        assert set(self.wrong(run, "alerts: email", "alerts: webhook")) == {"alerts: email", "alerts: webhook"}
        monkeypatch.delenv("ML_PLATFORM_ALERT_SMTP_HOST")
        wrong = self.wrong(run, "alerts")
        assert "need ML_PLATFORM_ALERT_EMAIL_TO" in wrong["alerts"]

    def test_everything_is_wrong_at_once(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        from ml_platform.model.mlflow import MlflowResource

        def fail(_: object) -> None:
            raise RuntimeError("no MLflow\nwith details")

        (tmp_path / "file").write_text("x")
        for name in ("ML_PLATFORM_RAW_URI", "ML_PLATFORM_LAKE_URI"):
            monkeypatch.setenv(name, str(tmp_path / "file"))
        monkeypatch.setenv("JAVA_HOME", "/nowhere")
        monkeypatch.delenv("DAGSTER_HOME")
        monkeypatch.setattr(MlflowResource, "champion", fail)
        wrong = self.wrong(run)
        assert list(wrong) == ["Java", "raw files", "lake", "MLflow", "Dagster"]
        assert wrong["MLflow"] == "no MLflow"

    def test_what_is_wrong_is_shown_as_it_is(
        self, run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        """Square brackets are part of a path, not markup."""
        monkeypatch.setenv("ML_PLATFORM_RAW_URI", str(tmp_path / "[red]x[/bold]"))
        assert str(tmp_path / "[red]x[/bold]") in self.wrong(run)["raw files"]


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
        for number in (1, 2):
            mlflow_run = client.create_run(experiment)
            client.log_metric(mlflow_run.info.run_id, "test_roc_auc", 0.8 + number / 100)
            client.create_model_version(
                "fraud_model",
                f"file:///nowhere/{number}",
                run_id=mlflow_run.info.run_id,
                tags={
                    "cutoff": f"file-{number}",
                    "reload_proof": "100 rows",
                    "model_uri": f"file:///lake/models/{number}/model.json",
                    "features": '["tx_amount"]',
                    "learner": "xgboost",
                    "library_version": "2.1.4",
                },
            )
        return resource

    def test_set_show_and_roll_back(self, run: Run, registry: MlflowResource):
        assert "No model" in run("champion", "show")[1]
        assert run("champion", "set", "1", "--why", "the first [red]", "--who", "ann")[0] == 0
        assert run("champion", "set", "2", "--why", "by hand", "--who", "ben")[0] == 0
        shown = run("champion", "show")[1]
        for part in ("version 2", "file-2", "ben", "by hand", "0.82"):
            assert part in shown
        assert run("champion", "set", "2", "--why", "again", "--who", "ben")[0] == 0
        assert run("champion", "rollback", "--why", "too many alerts", "--who", "eve")[0] == 0
        champion = registry.champion()
        assert champion is not None
        assert (champion.version, champion.tags["champion_by"]) == (1, "eve")
        assert champion.tags["champion_why"] == "too many alerts"

    def test_a_server_that_is_away_is_no_missing_version(
        self, run: Run, registry: MlflowResource, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        code, _, error = run("champion", "set", "1", "--why", "x")
        assert code == 1
        assert "has no version" not in error
        assert "127.0.0.1" in error

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("set", "7", "--why", "x"), "no version '7'"),
            (("set", "nonsense", "--why", "x"), "no version 'nonsense'"),
            (("set", "1", "--why", " "), "--why is empty"),
            (("rollback", "--why", "x"), "no earlier champion"),
        ],
    )
    def test_what_cannot_be_done_is_said(
        self, run: Run, registry: MlflowResource, arguments: tuple[str, ...], says: str
    ):
        code, _, error = run("champion", *arguments)
        assert code == 1
        assert says in error
        assert registry.champion() is None

    def test_a_version_that_was_never_loaded_back_is_refused(self, run: Run, registry: MlflowResource):
        registry.set_champion("2", {})
        registry.set_champion("1", {})
        registry.client().delete_model_version_tag("fraud_model", "2", "reload_proof")
        for arguments in (("set", "2"), ("rollback",)):
            code, _, error = run("champion", *arguments, "--why", "x")
            assert code == 1
            assert "version 2 was never loaded back" in error
        registry.client().set_model_version_tag("fraud_model", "2", "champion_by", "fraud_model")
        assert run("champion", "rollback", "--why", "the gate proved it, before there was the tag")[0] == 0
        registry.set_champion("1", {})
        champion = registry.champion()
        assert champion is not None
        assert champion.version == 1

    @pytest.mark.parametrize(
        ("tags", "says"),
        [
            ({"library_version": "99.1.0"}, "version 2 was written by xgboost 99.1.0"),
            ({"model_uri": "file:///m/model", "spark_version": "4.3.0"}, "version 2 is a Spark ML pipeline"),
            ({"features": "edited"}, "version 2 does not name its inputs"),
        ],
    )
    def test_a_version_that_cannot_score_is_refused(
        self, run: Run, registry: MlflowResource, tags: dict[str, str], says: str
    ):
        for name, value in tags.items():
            registry.client().set_model_version_tag("fraud_model", "2", name, value)
        code, _, error = run("champion", "set", "2", "--why", "try it")
        assert code == 1
        assert says in error
        registry.set_champion("2", {})
        registry.set_champion("1", {})
        assert says in run("champion", "rollback", "--why", "back")[2]
        champion = registry.champion()
        assert champion is not None
        assert champion.version == 1
        assert "champion_why" not in registry.client().get_model_version("fraud_model", "2").tags

    def test_show_says_when_the_champion_cannot_score(self, run: Run, registry: MlflowResource):
        registry.client().set_model_version_tag("fraud_model", "1", "library_version", "99.1.0")
        registry.set_champion("1", {})
        for command in (("champion", "show"), ("summary",), ("migrate", "--dry-run")):
            code, out, error = run(*command)
            assert code == 0, error
            assert "version 1 was written by xgboost 99.1.0" in " ".join(out.split())


class TestClusters:
    """On the stand-in for the API; what counts as left over is test_orphans.py's."""

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
            for name, value in settings.items():
                monkeypatch.setenv(name, value)
            yield cloud

    @staticmethod
    def add(cloud: FakeDataproc, name: str, status: dg.DagsterRunStatus | None, deployment: str = "yandex") -> str:
        """A cluster of a deployment, of a run with a status; None: of no known run."""
        run_id = f"{name}-run"
        if status:
            with dg.DagsterInstance.get() as instance:
                instance.add_run(dg.DagsterRun("process_new_files", run_id=run_id, status=status))
        engine = cli._engine(load_settings()).model_copy(update={"deployment": deployment})
        return cloud.add_cluster(name, engine.labels(run_id, time.time() + 3600))

    @pytest.fixture
    def ids(self, run: Run, cloud: FakeDataproc, tmp_path: Path) -> dict[str, str]:
        (tmp_path / "dagster home").mkdir()
        statuses = {"busy": dg.DagsterRunStatus.STARTED, "done": dg.DagsterRunStatus.SUCCESS, "lost": None}
        ids = {name: self.add(cloud, f"{name}-1", status) for name, status in statuses.items()}
        ids["others"] = self.add(cloud, "others-1", None, "staging")
        ids["stranger"] = cloud.add_cluster("stranger-1")
        return ids

    @pytest.mark.parametrize("way", ["key", "token"])
    def test_list(self, run: Run, cloud: FakeDataproc, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch, way: str):
        if way == "token":
            monkeypatch.delenv("YC_SERVICE_ACCOUNT_KEY_FILE")
            monkeypatch.setenv("YC_IAM_TOKEN", cloud.iam_token())
        code, out, err = run("clusters", "list")
        assert (code, err) == (0, "")
        lines = {name: line for name in ids for line in out.splitlines() if f"{name}-1 " in line}
        assert set(lines) == {"busy", "done", "lost"}
        assert all(ids[name] in line for name, line in lines.items())
        assert "in use" in lines["busy"]
        assert "left over: its run done-1-run has ended (SUCCESS)" in lines["done"]
        assert "left over: its run lost-1-run is unknown" in lines["lost"]
        assert cloud.calls("ClusterService.Delete") == []

    def test_nothing_to_list_or_to_delete(self, run: Run, cloud: FakeDataproc):
        assert only_line(run("clusters", "list")[1]) == "This deployment has no clusters."
        assert only_line(run("clusters", "delete", "--orphaned")[1]) == "No cluster is left over."

    def test_delete_what_is_left_over(self, run: Run, cloud: FakeDataproc, ids: dict[str, str]):
        code, out, _ = run("clusters", "delete", "--orphaned")
        assert code == 0
        assert f"deleted done-1 ({ids['done']}): its run done-1-run has ended (SUCCESS)" in out
        assert f"deleted lost-1 ({ids['lost']})" in out
        assert set(cloud.clusters) == {ids["busy"], ids["others"], ids["stranger"]}

    def test_delete_one(self, run: Run, cloud: FakeDataproc, ids: dict[str, str]):
        assert run("clusters", "delete", ids["lost"])[0] == 0
        assert set(cloud.clusters) == set(ids.values()) - {ids["lost"]}

    @pytest.mark.parametrize("name", ["others", "stranger"])
    @pytest.mark.parametrize("force", [(), ("--force",)])
    def test_strangers_are_left_alone(
        self, run: Run, cloud: FakeDataproc, ids: dict[str, str], name: str, force: tuple[str, ...]
    ):
        code, _, err = run("clusters", "delete", ids["lost"], ids[name], *force)
        assert code == 1
        assert only_line(err) == f"error: no cluster of this deployment: {ids[name]}; nothing was deleted"
        assert set(cloud.clusters) == set(ids.values())

    def test_a_cluster_in_use_needs_force(self, run: Run, cloud: FakeDataproc, ids: dict[str, str]):
        code, _, err = run("clusters", "delete", ids["lost"], ids["busy"])
        assert code == 1
        assert only_line(err).startswith(f"error: a run still needs {ids['busy']}: terminate it, or give --force")
        assert set(cloud.clusters) == set(ids.values())
        code, out, _ = run("clusters", "delete", ids["busy"], "--force")
        assert (code, only_line(out)) == (0, f"deleted busy-1 ({ids['busy']}): by force")
        assert ids["busy"] not in cloud.clusters

    @pytest.mark.parametrize("arguments", [(), ("some-id", "--orphaned")])
    def test_what_to_delete_must_be_clear(self, run: Run, cloud: FakeDataproc, arguments: tuple[str, ...]):
        code, _, err = run("clusters", "delete", *arguments)
        assert code == 1
        assert only_line(err).startswith("error: name clusters")
        assert cloud.journal == []

    @pytest.mark.parametrize("command", [("list",), ("delete", "--orphaned")])
    def test_the_local_deployment_makes_none(self, run: Run, command: tuple[str, ...]):
        code, _, err = run("clusters", *command)
        assert code == 1
        assert only_line(err).startswith("error: this deployment makes no clusters: set ML_PLATFORM_DEPLOYMENT=yandex")

    def test_a_refusal_is_one_line_and_what_to_do(self, run: Run, cloud: FakeDataproc, ids: dict[str, str]):
        cloud.fail("ClusterService.Delete", "PERMISSION_DENIED", "not you")
        code, _, err = run("clusters", "delete", ids["lost"])
        assert code == 1
        assert re.match(r"error: .*PERMISSION_DENIED: not you \(give the service account the roles", err)
        assert "Traceback" not in err

    @pytest.mark.parametrize("refused", [False, True])
    def test_doctor(
        self,
        run: Run,
        cloud: FakeDataproc,
        ids: dict[str, str],
        mlflow_ready: None,
        monkeypatch: pytest.MonkeyPatch,
        refused: bool,
    ):
        # No S3 is there; that is told in rows of its own.
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        monkeypatch.setattr(lake_module, "S3_ATTEMPTS", 1)
        if refused:
            cloud.fail("ClusterService.List", "PERMISSION_DENIED", "not you")
        code, out, _ = run("doctor")
        rows = TestDoctor.rows(out)
        assert code == 1
        assert "Java" not in rows
        verdict, found = rows["Data Proc"]
        if refused:
            assert verdict == "wrong"
            assert "PERMISSION_DENIED: not you" in found
        else:
            assert (verdict, found) == (
                "ok",
                f"the API answers; 3 clusters of this deployment in folder {cloud.folder_id}",
            )
        assert cloud.calls("ClusterService.Create") == []
