"""Fixtures that all tests share. No test sees the settings of the shell that starts it."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import dagster as dg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from filelock import FileLock
from hypothesis import settings

from ml_platform.dev.cloud.s3_server import LocalS3, start_s3_server
from ml_platform.lake.resource import LakeResource
from ml_platform.model.mlflow import MlflowResource
from ml_platform.spark.session import default_spark_config, local_session
from ml_platform_tests.fakes import SessionEngine, definitions, put_raw, raw_spec, rows_per_day, run_assets
from ml_platform_tests.images.session import FEW_PARTITIONS, NO_CODEGEN
from ml_platform_tests.world import FILES, ML_PLATFORM, SHORT_LIVED, World, no_process_left

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: Why the S3 of the tests is a mock; empty if it is none.
MOCK_REASON = pytest.StashKey[str]()

FOREIGN = ("ML_PLATFORM_", "DAGSTER_", "MLFLOW_", "AWS_", "YC_", "DATAPROC_", "SPARK_", "PYSPARK_")

# Before any test imports MLflow, which reads it once; nothing is to leave this machine.
TELEMETRY_OFF = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}

# Before any test imports gRPC, which reads it once. Tests hold servers and channels in the process that forks for
# PySpark's Java; with gRPC's fork handlers one in ten such children died by SIGABRT or SIGSEGV before it was Java.
FORK_TO_EXEC = {"GRPC_ENABLE_FORK_SUPPORT": "false"}


def pytest_configure() -> None:
    """Clear the environment before module- and session-scoped fixtures read it."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ.update(TELEMETRY_OFF | FORK_TO_EXEC)
    # A busy machine may take any time for an example.
    settings.register_profile("ml_platform", deadline=None)
    settings.load_profile("ml_platform")
    # A script's background job ignores SIGINT. Dagster gives SIGTERM the handler of SIGINT, what it starts inherits
    # that, and runs wait half a minute for each `tail` that is then told in vain to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for `--dist loadgroup`; the large groups first, so that no worker is busy long after the others.

    One worker takes all tests of the Spark session, which takes half a minute to warm up. Other tests are grouped by
    file, because they share its fixtures.
    """
    groups = {}
    for item in items:
        uses_session = "spark" in getattr(item, "fixturenames", ())
        groups[item] = "spark" if uses_session else item.path.stem
        item.add_marker(pytest.mark.xdist_group(groups[item]))

    def order(item: pytest.Item) -> tuple[bool, ...]:
        return groups[item] != "spark", *(item.get_closest_marker(name) is None for name in ("e2e", "spark"))

    items.sort(key=order)


def pytest_collection_finish() -> None:
    """Let Python's garbage collector pass over the packages: it would look at them again and again, in vain."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say so where the tests of S3 prove less than they should."""
    if reason := config.stash.get(MOCK_REASON, ""):
        terminalreporter.write_sep("=", "S3 tests ran against moto's mock", yellow=True)
        terminalreporter.write_line(reason)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of pytest-xdist found out, for the summary."""
    if reason := getattr(node, "workeroutput", {}).get("mock_reason"):
        node.config.stash[MOCK_REASON] = reason


def crash_file(config: pytest.Config, worker: str) -> Path:
    """Where a worker of pytest-xdist leaves its threads' stacks if it crashes."""
    return Path(config.cache.mkdir("crashes")) / worker  # type: ignore[union-attr]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Keep the stacks of a crash for its report: standard error has them among the dots of all workers."""
    if worker := getattr(session.config, "workerinput", None):
        faulthandler.enable(crash_file(session.config, worker["workerid"]).open("w"))


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report: Any) -> None:
    """Add the stacks to the report of the test during which a worker crashed. SIGKILL leaves none."""
    stacks = crash_file(report.node.config, report.node.gateway.id).read_text()
    report.longrepr += f"\n{stacks or 'it left no stacks: was it killed?'}"


@pytest.fixture(scope="session", autouse=True)
def migrations_read_once() -> Iterator[None]:
    """Let Alembic read a directory of migrations once, not for each instance of Dagster, and twice for one in memory:
    these are a hundred Python files, read in a tenth of a second, in hundreds of tests.
    """
    read, known = ScriptDirectory.from_config, {}

    def read_once(config: Config) -> ScriptDirectory:
        location = config.get_alembic_option("script_location")
        if location not in known:
            known[location] = read(config)
        return known[location]

    with mock.patch.object(ScriptDirectory, "from_config", read_once):
        yield


@pytest.fixture(autouse=True)
def isolated_environment() -> Iterator[None]:
    """Undo what a test, or the code under test, sets in the environment."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def lake(tmp_path: Path) -> LakeResource:
    """A lake on two directories, neither of which exists yet."""
    return LakeResource(raw_uri=str(tmp_path / "raw"), lake_uri=str(tmp_path / "lake"), epoch="2020-01-01")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """Dagster's storage in memory."""
    with dg.DagsterInstance.ephemeral(settings={"telemetry": {"enabled": False}}) as instance:
        yield instance


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """One Spark session for all tests, set up as the jobs set up theirs."""
    from spark_jobs import runtime

    config = default_spark_config("local[2]", "2g") | FEW_PARTITIONS | NO_CODEGEN
    config["spark.driver.extraJavaOptions"] = SHORT_LIVED
    config["spark.sql.warehouse.dir"] = str(tmp_path_factory.mktemp("warehouse"))
    session = local_session("ml_platform_tests", config)
    runtime.configure(session)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def library_uri() -> None:
    """Here, Python has the learners' library; in copies of the images it comes as an archive."""


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes much of a training's time, and test_plots covers it."""
    monkeypatch.setattr("ml_platform.model.training.draw_figures", lambda *_, **__: {"overview": b"a picture"})


@pytest.fixture
def session_engine(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> SessionEngine:
    """Runs the jobs in the tests' own session."""
    monkeypatch.setattr(SessionEngine, "session", spark, raising=False)
    return SessionEngine()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[LocalS3]:
    """One S3 server for all tests, each of which makes its own buckets. The environment does not name it."""
    server, reason = start_s3_server(tmp_path_factory.mktemp("s3"))
    pytestconfig.stash[MOCK_REASON] = reason
    if hasattr(pytestconfig, "workeroutput"):
        pytestconfig.workeroutput["mock_reason"] = reason
    with server:
        yield server


@pytest.fixture
def s3(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> LocalS3:
    """The S3 server that the environment leads to."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def fast_sqlite() -> Iterator[None]:
    """SQLite does not wait for the disk: a test's databases need not survive a power failure."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def do_not_wait_for_the_disk(connection: Any, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", do_not_wait_for_the_disk)
    yield
    event.remove(Engine, "connect", do_not_wait_for_the_disk)


@pytest.fixture(scope="session")
def empty_mlflow_store(tmp_path_factory: pytest.TempPathFactory, fast_sqlite: None) -> Path:
    """An SQLite store of MLflow with its tables, which take seconds to create."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowResource(tracking_uri=f"sqlite:///{path}").champion()
    return path


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_store: Path) -> Path:
    """What a run over the file of the first 30 days leaves with the fake engine, for tests to copy: ``raw`` and
    ``lake``, whose rows nothing could score, and ``mlflow.db``, where version 1, trained on them, is the champion.
    """
    directory = tmp_path_factory.mktemp("first run")
    lake = LakeResource(raw_uri=f"{directory}/raw", lake_uri=f"{directory}/lake", epoch="2020-01-01")
    store = f"sqlite:///{shutil.copy(empty_mlflow_store, directory)}"
    platform = definitions(
        lake, None, MlflowResource(tracking_uri=store, artifact_root=f"file://{directory}/artifacts")
    )
    assets = ("cleaned_transactions", "transaction_features", "scored_transactions", "fraud_model")
    put_raw(lake, "file-0", raw_spec(0, report={"rows_per_day": rows_per_day(0)}))
    with (
        mock.patch.dict(os.environ),  # MLflow's client keeps the address of its server there
        dg.DagsterInstance.ephemeral(settings={"telemetry": {"enabled": False}}) as instance,
    ):
        instance.add_dynamic_partitions("raw_files", ["file-0"])
        with mock.patch("ml_platform.model.training.draw_figures", return_value={"overview": b"a picture"}):
            assert run_assets(platform, instance, *assets, keys=("file-0", "file-0")).success
    return directory


@pytest.fixture
def run_cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run ``ml-platform`` in this process, in an empty directory; its exit code, output and errors."""
    from ml_platform.cli.context import console, errors
    from ml_platform.cli.main import main

    directory = tmp_path / "a project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster home"))
    for output in (console, errors):
        monkeypatch.setattr(output, "width", 800)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ml-platform", *arguments])
        capfd.readouterr()
        code: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        captured = capfd.readouterr()
        return int(code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def local_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The raw files as this machine processes them: what other engines are compared with. Not to be altered.

    The first worker of pytest-xdist that needs it makes it for all. The full pass of scripts/test_images.sh processes
    files with generated code, as users do.
    """
    base = tmp_path_factory.getbasetemp()
    directory = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    done = directory / "local_world.done"
    world = World(directory / "local world", overrides={"SPARK_PROPERTIES": json.dumps(NO_CODEGEN)})
    with FileLock(directory / "local_world.lock"):
        if not done.exists():
            for file in FILES:
                (world.raw / file.name).write_bytes(file.content)
            with no_process_left(world):
                world.run(*ML_PLATFORM, "process-new-files")
            done.touch()
    return world


@pytest.fixture
def mlflow(empty_mlflow_store: Path, tmp_path: Path) -> Iterator[MlflowResource]:
    """MLflow on a store of the test's own."""
    import mlflow as module

    directory = tmp_path / "ml flow"
    directory.mkdir()
    shutil.copy(empty_mlflow_store, directory / "mlflow.db")
    yield MlflowResource(
        tracking_uri=f"sqlite:///{directory}/mlflow.db", artifact_root=(directory / "artifacts").as_uri()
    )
    while module.active_run():
        module.end_run()
