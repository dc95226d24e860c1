"""The tests' Spark session where ml_platform_tests/conftest.py cannot be: beside Python 3.8, without Dagster.

A plugin of pytest (``-p ml_platform_tests.images.session``) for environments that copy the cluster's images.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from spark_jobs.training import library

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyspark.sql import SparkSession


#: Spark's default, 200, is work for minutes on a handful of rows. A job says how many it wants.
FEW_PARTITIONS = {"spark.sql.shuffle.partitions": "3"}

#: Code generated for each query takes longer to compile than a test's rows to process. full_pass does generate it.
NO_CODEGEN = {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}


def start_session(warehouse: str, config: dict[str, str]) -> SparkSession:
    """A session in this process, set up as the jobs set up theirs, with the properties of `config`."""
    from pyspark.sql import SparkSession

    from spark_jobs import runtime

    builder = (
        SparkSession.builder.master("local[2]")
        .appName("ml_platform_tests")
        .config("spark.driver.memory", "2g")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.sql.warehouse.dir", warehouse)
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
    )
    for name, value in config.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    session.sparkContext.pythonExec = sys.executable
    runtime.configure(session)
    return session


#: Names the archive of the learners' library.
ARCHIVE_VARIABLE = "LIBRARY_ARCHIVE"


@pytest.fixture(scope="session", autouse=True)
def library_uri() -> str:
    """The archive of the learners' library, which tests in this process use as tasks do."""
    archive = os.environ[ARCHIVE_VARIABLE]
    sys.path.insert(0, library.unpacked(Path(archive)))
    return archive


@pytest.fixture(autouse=True)
def isolated_environment() -> Iterator[None]:
    """Undo what a test, or the code under test, sets in the environment."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """One Spark session for all tests."""
    session = start_session(str(tmp_path_factory.mktemp("warehouse")), {**FEW_PARTITIONS, **NO_CODEGEN})
    yield session
    session.stop()
