"""Bad files in the directory of raw files: each is named with its reason, and the good one is cleaned."""

from __future__ import annotations

import json
import random
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import dagster as dg
import pytest

from ml_platform.dev.simulator import HEADER
from ml_platform.escaping import markdown
from ml_platform.lake.reports import CLEANED_TABLE as CLEANED
from ml_platform.lake.resource import LakeResource
from ml_platform_tests.fakes import SessionEngine, definitions, recorded, run_assets
from ml_platform_tests.world import assert_counts, simulated

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = [pytest.mark.spark]

BINARY, LONG_LINE, EMPTY, HEADER_ONLY, GOOD = ("1_binary", "2_long_line", "3_empty", "4_header_only", "5_good")
GROWING, UNREADABLE, VANISHING = ("6_growing", "7_unreadable", "8_vanishing")
CLEANABLE = [BINARY, LONG_LINE, EMPTY, HEADER_ONLY, GOOD]
LONG_LINE_BYTES = 10_000_000


@dataclass(frozen=True)
class Hostile:
    """A lake after a run over all files, and one over those that can be cleaned."""

    lake: Path
    instance: dg.DagsterInstance
    first: dg.ExecuteInProcessResult
    second: dg.ExecuteInProcessResult

    def parquet(self, table: str, key: str) -> Path:
        return self.lake / table / f"raw_file={key}"


@pytest.fixture(scope="module")
def hostile(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Generator[Hostile]:
    directory = tmp_path_factory.mktemp("hostile files")
    raw = directory / "raw"
    raw.mkdir()
    (raw / f"{BINARY}.txt").write_bytes(random.Random(0).randbytes(200_000))
    (raw / f"{LONG_LINE}.txt").write_bytes(b"7" * LONG_LINE_BYTES)
    (raw / f"{EMPTY}.txt").touch()
    (raw / f"{HEADER_ONLY}.txt").write_bytes(HEADER)
    for key in (GOOD, GROWING, VANISHING):
        (raw / f"{key}.txt").write_bytes(simulated(0).content)
    # Not even root can read it: nothing is mapped at the first address of a process.
    (raw / f"{UNREADABLE}.txt").symlink_to("/proc/self/mem")
    (raw / "we ird;name.txt").write_bytes(simulated(0).content)
    (raw / "folder.txt").mkdir()
    (raw / "notes.md").write_text("not a raw file")

    class Meddler(SessionEngine):
        """Changes files after they were listed and before one is read."""

        session: ClassVar[Any] = spark

        def _execute(self, *arguments: Any, **options: Any) -> dict[str, Any]:
            with (raw / f"{GROWING}.txt").open("ab") as file:
                file.write(b"9999999,2019-08-30 10:00:00,1,1,1.00,727200,8,0,0\n")
            (raw / f"{VANISHING}.txt").unlink(missing_ok=True)
            return super()._execute(*arguments, **options)

    lake = LakeResource(raw_uri=str(raw), lake_uri=str(directory / "lake"), epoch="2019-08-22")
    platform = definitions(lake, Meddler())
    with dg.DagsterInstance.ephemeral(settings={"telemetry": {"enabled": False}}) as instance:
        files, ignored = lake.list_raw_files()
        assert list(files) == [*CLEANABLE, GROWING, UNREADABLE, VANISHING]
        assert "we ird;name.txt" in ignored
        instance.add_dynamic_partitions("raw_files", list(files))
        first = run_assets(platform, instance, CLEANED, keys=(BINARY, VANISHING))
        second = run_assets(platform, instance, CLEANED, keys=(BINARY, GOOD))
        yield Hostile(directory / "lake", instance, first, second)


def test_the_good_file_is_cleaned(hostile: Hostile) -> None:
    report = json.loads((hostile.parquet(CLEANED, GOOD) / "_report.json").read_text())
    assert_counts(report, simulated(0).truth)


@pytest.mark.parametrize("key", [EMPTY, HEADER_ONLY])
def test_a_file_without_rows_is_an_empty_partition(hostile: Hostile, key: str) -> None:
    metadata = recorded(hostile.instance, CLEANED, hostile.first.run_id)[key]
    assert (metadata["outcome"], metadata["dagster/row_count"]) == ("empty file", 0)


@pytest.mark.parametrize("key", [BINARY, LONG_LINE])
def test_malformed_lines_are_in_quarantine(hostile: Hostile, key: str) -> None:
    import pandas as pd

    metadata = recorded(hostile.instance, CLEANED, hostile.first.run_id)[key]
    assert metadata["dagster/row_count"] == 0
    assert metadata["rejected_rows"] == metadata["raw_rows"] > 0
    rejects = pd.read_parquet(hostile.parquet("rejected_transactions", key))
    assert len(rejects) == metadata["rejected_rows"]
    assert all("malformed_row" in reasons for reasons in rejects["reasons"])
    if key == LONG_LINE:
        assert rejects["raw_line"].str.len().tolist() == [LONG_LINE_BYTES]


def test_files_that_cannot_be_cleaned_fail_the_run_and_are_named(hostile: Hostile) -> None:
    assert not hostile.first.success
    assert sorted(recorded(hostile.instance, CLEANED, hostile.first.run_id)) == CLEANABLE
    (failure,) = hostile.instance.all_logs(hostile.first.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    assert failure.dagster_event is not None
    data = failure.dagster_event.step_failure_data
    assert data.user_failure_data is not None
    assert "5 of 8 files are left out; everything else is done" in str(data.user_failure_data.description)
    problems: Any = data.user_failure_data.metadata["left_out"].value
    assert sorted(problems) == [BINARY, LONG_LINE, GROWING, UNREADABLE, VANISHING]
    for key, reason in (
        (GROWING, "the raw file is changing"),
        (UNREADABLE, "Input/output error"),
        (VANISHING, "does not exist"),
    ):
        assert reason in problems[key]
        assert not (hostile.parquet(CLEANED, key) / "_report.json").exists()


def test_the_check_names_the_files_that_are_all_rejects(hostile: Hostile) -> None:
    """With nothing left to fail, the checks judge what is cleaned."""
    assert not hostile.second.success
    judged = [found for found in hostile.second.get_asset_check_evaluations() if found.check_name == "reject_rate"]
    # One of each partition, and the run's own verdict, which names those with a problem.
    passed = {evaluation.partition: evaluation.passed for evaluation in judged if evaluation.partition}
    assert passed == {key: key not in (BINARY, LONG_LINE) for key in CLEANABLE}
    (verdict,) = [evaluation for evaluation in judged if evaluation.partition is None]
    assert not verdict.passed
    problems: Any = verdict.metadata["problems"].value
    assert sorted(problems) == [BINARY, LONG_LINE]
    assert problems[LONG_LINE].startswith("100.00% of 1 rows are rejected")
    assert all(markdown(problem) in (verdict.description or "") for problem in problems.values())
