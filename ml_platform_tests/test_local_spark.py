"""Properties of an embedded session, and the archive of Spark's classes: used where it fits, never in the way."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import dagster as dg
import pytest

from ml_platform.dev.cloud.spark_submit import spark_home
from ml_platform.spark import class_archive
from ml_platform.spark.engine import LocalSparkEngine, _forward_log, shared_session
from ml_platform.spark.session import CLASS_ARCHIVE, GARBAGE_COLLECTOR, default_spark_config, java_options
from spark_jobs.runtime import START_PROPERTIES

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def java_command(config: dict[str, str]) -> list[str]:
    """The command that Spark's own launcher makes of the properties, up to the main class."""
    conf = [word for name, value in config.items() for word in ("--conf", f"{name}={value}")]
    java = f"{os.environ['JAVA_HOME']}/bin/java" if "JAVA_HOME" in os.environ else "java"
    launcher = [java, "-cp", f"{spark_home()}/jars/*", "org.apache.spark.launcher.Main"]
    done = subprocess.run(
        [*launcher, "org.apache.spark.deploy.SparkSubmit", *conf, "pyspark-shell"],
        env={**os.environ, "SPARK_HOME": spark_home(), "SPARK_SCALA_VERSION": "2.13"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    words = [word.strip("\n") for word in done.stdout.split("\0")]
    start = next(index for index, word in enumerate(words) if word.endswith("java"))
    return words[start : words.index("org.apache.spark.deploy.SparkSubmit")]


def test_without_an_archive_java_is_told_of_none(tmp_path: Path) -> None:
    assert java_options(tmp_path / "none.jsa") == GARBAGE_COLLECTOR
    (tmp_path / "failed.jsa").touch()
    assert java_options(tmp_path / "failed.jsa") == GARBAGE_COLLECTOR


@pytest.mark.parametrize("name", ["plain", "two words", 'a "quoted" one', "back\\slash", "single's"])
def test_java_is_given_the_path_as_it_is(tmp_path: Path, name: str) -> None:
    archive = tmp_path / name / "spark.jsa"
    archive.parent.mkdir()
    archive.write_bytes(b"x")

    for option, write in (("SharedArchiveFile", False), ("ArchiveClassesAtExit", True)):
        properties = {"spark.driver.defaultJavaOptions": java_options(archive, write=write)}
        assert f"-XX:{option}={archive}" in java_command(properties)


def test_java_takes_the_archive_of_this_environment() -> None:
    if java_options(CLASS_ARCHIVE) == GARBAGE_COLLECTOR:
        pytest.skip("no archive was made in this environment: make classes")
    command = [*java_command(default_spark_config("local[2]")), "-Xshare:on", "-Xlog:cds=info", "-version"]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Mapped dynamic" in done.stdout, done.stdout


def test_other_jars_run_without_the_archive(tmp_path: Path) -> None:
    if java_options(CLASS_ARCHIVE) == GARBAGE_COLLECTOR:
        pytest.skip("no archive was made in this environment: make classes")
    command = java_command(default_spark_config("local[2]"))
    command[command.index("-cp") + 1] = str(tmp_path)

    done = subprocess.run([*command, "-version"], capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stderr
    assert "archive" not in done.stdout + done.stderr


def test_a_failure_is_one_line_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "no java"))
    monkeypatch.setattr(sys, "argv", ["class_archive", "--output", str(tmp_path / "spark.jsa")])

    class_archive.main()

    assert [path.name for path in tmp_path.iterdir()] == ["spark.jsa"]
    assert (tmp_path / "spark.jsa").read_bytes() == b""
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("could not build Spark's class archive; Spark will start more slowly: ")


@pytest.mark.spark
@pytest.mark.parametrize(
    ("master", "within", "before"),
    [("local[2]", False, 2), ("local[2]", True, 0), ("spark://127.0.0.1:7077", True, 2)],
    ids=["run by run", "shared", "of a cluster"],
)
def test_a_session_ends_with_its_run_unless_it_is_shared(master: str, within: bool, before: int) -> None:
    """`before` is how often it was stopped by the runs; in the end it is stopped in any case."""
    session = mock.Mock()
    engine = LocalSparkEngine(master=master)
    with shared_session() if within else nullcontext():
        for _ in range(2):
            with engine.yield_for_execution(dg.build_init_resource_context()) as spark:
                spark._pyspark = mock.Mock(spark_session=session)
        assert session.stop.call_count == before
    assert session.stop.call_count == (before or 1)


def test_a_session_that_cannot_be_prepared_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    session = mock.Mock()
    session.sparkContext.addPyFile.side_effect = OSError("no space left")
    monkeypatch.setattr("dagster_pyspark.LazyPySparkResource", lambda **_: mock.Mock(spark_session=session))
    monkeypatch.setattr("ml_platform.spark.engine.library_archive", lambda: ("library.zip", b""))
    engine = LocalSparkEngine(master="spark://127.0.0.1:7077")
    with (
        engine.yield_for_execution(dg.build_init_resource_context()) as spark,
        pytest.raises(OSError, match="no space left"),
    ):
        spark._session(mock.Mock())
    session.stop.assert_called_once_with()


def test_loggers_are_left_as_they_were() -> None:
    logger = logging.getLogger("spark_jobs")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with _forward_log(mock.Mock()):
            assert logger.isEnabledFor(logging.INFO)
        assert not logger.isEnabledFor(logging.INFO)
    finally:
        logger.setLevel(before)


def test_the_traceback_of_a_partition_reaches_the_runs_log() -> None:
    log = mock.Mock()
    with _forward_log(log):
        try:
            raise ValueError("of a partition")
        except ValueError:
            logging.getLogger("spark_jobs.partitions").exception("2019-08-22 failed")
    (call,) = log.log.call_args_list
    assert call.args == (logging.ERROR, "2019-08-22 failed")
    assert str(call.kwargs["exc_info"][1]) == "of a partition"


def test_workers_of_python_are_reached_without_tcp(spark: SparkSession) -> None:
    def families(_: int) -> list[str]:
        found = set()
        for descriptor in range(3, 100):
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                found.add(connection.family.name)
        return sorted(found)

    assert spark.sparkContext.parallelize([0], 1).map(families).collect() == [["AF_UNIX"]]


@pytest.mark.spark
def test_workers_of_python_keep_freed_memory(spark: SparkSession) -> None:
    prefix = "spark.executorEnv."
    wanted = {name[len(prefix) :]: value for name, value in START_PROPERTIES.items() if name.startswith(prefix)}

    def environment(_: int) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in wanted}

    assert spark.sparkContext.parallelize([0], 1).map(environment).collect() == [wanted]
