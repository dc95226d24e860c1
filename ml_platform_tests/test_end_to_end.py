"""One directory whose run is killed and whose files change: the daemon does what is left to do.

test_dataproc.py ends such a run by SIGTERM.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.dev.simulator import HEADER, FileTruth
from ml_platform_tests.images.session import NO_CODEGEN
from ml_platform_tests.world import (
    SIMULATION,
    ModificationTimes,
    World,
    assert_counts,
    daemon,
    materialize_command,
    no_process_left,
    simulated,
    ticks,
    wait_until,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.spark,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a test through /proc"),
]

KEPT, LOST, REPLACED, LONG, NEW = (simulated(index) for index in range(5))
#: The same transactions with fewer faults, so that their ids fit.
REPLACEMENT = simulated(2, replace(SIMULATION, fault_rate=100))

#: The rows of the long file again and again: long to clean, and all but one copy are duplicates.
COPIES = 60


@dataclass(frozen=True)
class Life:
    """The directory after all that, and what was seen on the way."""

    world: World
    #: The files of the partitions that nothing happened to.
    kept: ModificationTimes
    tick: Any


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    directory = tmp_path_factory.mktemp("end to end")
    # Training is tested in test_engines.
    settings = {
        "ML_PLATFORM_RUN_CONFIG": str(Path(__file__).with_name("no_training.yaml")),
        "SPARK_PROPERTIES": json.dumps(NO_CODEGEN),
    }
    world = World(directory / "a world", overrides=settings)
    for file in (KEPT, LOST, REPLACED):
        (world.raw / file.name).write_bytes(file.content)
    (world.raw / LONG.name).write_bytes(HEADER + COPIES * LONG.content.removeprefix(HEADER))
    world.register(*(file.key for file in (KEPT, LOST, REPLACED, LONG)))

    kill_a_run(world)
    kept = world.modification_times(KEPT.key)

    world.report_file(LOST.key).unlink()
    (world.raw / REPLACED.name).write_bytes(REPLACEMENT.content)
    (world.raw / NEW.name).write_bytes(NEW.content)
    with daemon(world), world.instance() as instance:
        wait_until(lambda: ticks(instance), "the sensor has ticked", pause=1)
        wait_until(lambda: all(run.is_finished for run in instance.get_runs()), "the run has ended", pause=1)
        (tick,) = ticks(instance)
    return Life(world, kept, tick)


def kill_a_run(world: World) -> None:
    """Kill a run that cleans the long file: the one after that whose report is lost."""
    log = world.root / "killed.log"
    with no_process_left(world):
        process = world.start(*materialize_command("cleaned_transactions", KEPT.key, LONG.key), log=log)
        wait_until(world.report_file(REPLACED.key).exists, "its turn has come", pause=0.02)
        assert "java" in world.processes().values()
        assert not world.report_file(LONG.key).exists(), "the long file is too small for this machine"
        process.kill()
        process.wait(120)
    assert not world.report_file(LONG.key).exists(), log.read_text()


def test_the_sensor_starts_one_run_of_what_is_to_be_done(life: Life) -> None:
    killed, last = life.world.runs()
    assert killed.is_failure_or_canceled
    assert life.tick.status.value == "SUCCESS"
    assert life.tick.run_ids == [last.run_id]
    assert (last.job_name, last.status) == ("process_new_files", dg.DagsterRunStatus.SUCCESS)
    keys = [file.key for file in (LOST, REPLACED, LONG, NEW)]
    assert life.world.partitions() == [KEPT.key, *keys]
    assert life.world.materialized(last.run_id, "cleaned_transactions") == keys
    assert life.world.materialized(last.run_id, "transaction_features") == keys


def test_what_is_cleaned_is_left_alone(life: Life) -> None:
    assert life.world.modification_times(KEPT.key) == life.kept


@pytest.mark.parametrize(
    ("key", "truth"),
    [(file.key, file.truth) for file in (KEPT, LOST, REPLACEMENT, NEW)],
    ids=["kept", "report lost", "replaced", "new"],
)
def test_counts_are_those_of_the_simulator(life: Life, key: str, truth: FileTruth) -> None:
    assert_counts(life.world.report(key), truth)


def test_nothing_of_the_killed_cleaning_is_left(life: Life) -> None:
    import pandas as pd

    counts, truth = life.world.report(LONG.key)["counts"], LONG.truth.counts
    assert counts["raw_rows"] == COPIES * truth["raw_rows"]
    assert counts["clean_rows"] == truth["clean_rows"]
    partition = life.world.report_file(LONG.key).parent
    ids = pd.read_parquet(partition)["transaction_id"]
    assert ids.is_unique
    assert len(ids) == truth["clean_rows"]
    assert not (partition / "_temporary").exists()


def test_too_little_data_is_an_outcome_and_no_failure(life: Life) -> None:
    model = life.world.metadata("fraud_model", NEW.key)
    assert model["outcome"] == "too_little_data"
    assert "days of data" in model["reason"]
