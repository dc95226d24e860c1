"""The tests' Spark session where ml_platform_tests/conftest.py cannot be: beside Python 3.8, without Dagster.

A plugin of pytest (``-p ml_platform_tests.images.session``) for environments that copy the cluster's images.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyspark.sql import SparkSession


def start_session(warehouse: str) -> SparkSession:
    """A session in this process, set up as the jobs set up theirs."""
    from pyspark.sql import SparkSession

    from spark_jobs import runtime

    session = (
        SparkSession.builder.master("local[2]")
        .appName("ml_platform_tests")
        .config("spark.driver.memory", "2g")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.sql.warehouse.dir", warehouse)
        # As in ml_platform_tests/conftest.py.
        .config("spark.sql.shuffle.partitions", "3")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    session.sparkContext.pythonExec = sys.executable
    runtime.configure(session)
    return session


@pytest.fixture(autouse=True)
def isolated_environment() -> Iterator[None]:
    """Undo what a test, or the code under test, sets in the environment."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """One Spark session for all tests."""
    session = start_session(str(tmp_path_factory.mktemp("warehouse")))
    yield session
    session.stop()
