"""The real commands and the real daemon, in processes of their own, on files below a path with a space."""

from __future__ import annotations

import itertools
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.dev.simulator import HEADER, FileTruth, Simulation
from ml_platform_tests.world import (
    COMMAND_TIMEOUT_S,
    DAGSTER,
    ML_PLATFORM,
    ModificationTimes,
    World,
    daemon,
    materialize_command,
    no_process_left,
    ticks,
    wait_until,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.spark,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a test through /proc"),
]

SIMULATION = Simulation(days_per_file=20, customers=400, terminals=400, radius=10, fault_rate=300, seed=3)
KEYS = [SIMULATION.file_name(index).removesuffix(".txt") for index in range(4)]
FIRST, SECOND, THIRD, FOURTH = KEYS

#: Both learners, with several candidates each.
CANDIDATES = [
    {"learner": "xgboost", "grid": {"rounds": [5, 20], "max_depth": [2]}},
    {"learner": "logistic_regression", "grid": {"C": [0.0001, 0.01, 1], "max_iter": [100, 200]}},
]


#: Settings of worlds where training is not the matter: there are too little data for it, which fails nothing.
NO_TRAINING = {"ML_PLATFORM_RUN_CONFIG": str(Path(__file__).with_name("no_training.yaml"))}


def search(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """Run config that searches among `candidates`."""
    return {"ops": {"fraud_model": {"config": {"candidates": candidates}}}}


TEST_METRICS = ("average_precision", "roc_auc", "card_precision_at_100", "rows", "frauds")
SCORE_COLUMNS = [
    "transaction_id",
    "tx_datetime",
    "customer_id",
    "tx_amount",
    "tx_fraud",
    "score",
    "champion_score",
]

# --- what the tests stand on ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawFiles:
    """Simulated raw files by partition, and what is in them."""

    paths: dict[str, Path]
    truths: dict[str, FileTruth]


@pytest.fixture(scope="module")
def raw_files(tmp_path_factory: pytest.TempPathFactory) -> RawFiles:
    directory = tmp_path_factory.mktemp("simulated")
    paths, truths = {}, {}
    for index, key in enumerate(KEYS):
        paths[key] = directory / SIMULATION.file_name(index)
        with paths[key].open("wb") as out:
            truths[key] = SIMULATION.write_file(index, out)
    return RawFiles(paths, truths)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose path has a space."""
    return tmp_path_factory.mktemp("end to end")


@pytest.fixture(scope="module")
def cleaned(directory: Path, raw_files: RawFiles) -> World:
    """Three files, synchronized and cleaned. Not to be altered: copy it."""
    world = World(directory / "cleaned")
    for key in (FIRST, SECOND, THIRD):
        world.add(raw_files.paths[key])
    world.sync()
    world.materialize("cleaned_transactions", FIRST, THIRD)
    return world


@dataclass(frozen=True)
class Trained:
    """A world whose assets are all materialized, and its files of cleaned data before that."""

    world: World
    run: dg.DagsterRun
    cleaned_before: ModificationTimes


@pytest.fixture(scope="module")
def trained(directory: Path, cleaned: World) -> Trained:
    """All assets of the three files, on a lake where they are cleaned. Not to be altered."""
    world = cleaned.copy(directory / "trained")
    before = world.modification_times()
    world.register(FIRST, SECOND, THIRD)
    world.materialize("*", FIRST, THIRD, config=search(CANDIDATES))
    return Trained(world, world.runs()[-1], before)


# --- commands ----------------------------------------------------------------------------------------------------


def test_definitions_are_valid(directory: Path) -> None:
    world = World(directory / "valid")
    printed = world.run(*DAGSTER, "definitions", "validate", "-m", "ml_platform.definitions")
    assert "Validation successful" in printed


def test_reports_have_the_counts_of_the_simulator(cleaned: World, raw_files: RawFiles) -> None:
    assert cleaned.partitions() == [FIRST, SECOND, THIRD]
    total = dict.fromkeys(raw_files.truths[FIRST].counts, 0)
    for key in (FIRST, SECOND, THIRD):
        truth = raw_files.truths[key].counts
        found = cleaned.report(key)["counts"]
        assert {name: found[name] for name in truth} == truth
        metadata = cleaned.metadata("cleaned_transactions", key)
        assert metadata["outcome"] == "cleaned"
        assert metadata["dagster/row_count"] == truth["clean_rows"]
        total = {name: total[name] + truth[name] for name in truth}
    assert all(total.values()), f"the simulated files lack a fault: {total}"


def test_what_is_cleaned_is_not_rewritten(trained: Trained) -> None:
    assert trained.run.status == dg.DagsterRunStatus.SUCCESS
    assert trained.world.modification_times() == trained.cleaned_before
    for key in (FIRST, SECOND, THIRD):
        assert trained.world.metadata("cleaned_transactions", key)["outcome"] == "already clean"


def test_every_clean_row_has_features(trained: Trained, raw_files: RawFiles) -> None:
    for key in (FIRST, SECOND, THIRD):
        clean_rows = raw_files.truths[key].counts["clean_rows"]
        assert trained.world.report(key, "transaction_features")["counts"]["rows"] == clean_rows
        assert trained.world.metadata("transaction_features", key)["dagster/row_count"] == clean_rows


# --- MLflow ------------------------------------------------------------------------------------------------------


def champion_run(trained: Trained) -> tuple[Any, Any]:
    """The champion's version and its MLflow run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=trained.world.tracking_uri, registry_uri=trained.world.tracking_uri)
    version = client.get_model_version_by_alias("fraud_model", "champion")
    return version, client.get_run(version.run_id)


def grid(run: Any) -> tuple[list[dict[str, Any]], list[float], dict[str, Any]]:
    """What the search tried, the score of each, and the one with the highest."""
    points = [json.loads(run.data.params[f"grid.{number}"]) for number in range(8)]
    scores = [run.data.metrics[f"grid.{number}.validation_average_precision"] for number in range(8)]
    return points, scores, points[scores.index(max(scores))]


def scores_directory(trained: Trained) -> Path:
    return trained.world.lake / "models" / THIRD / trained.run.run_id / "test_scores"


def test_mlflow_and_dagster_name_each_other(trained: Trained) -> None:
    from mlflow import MlflowClient

    version, run = champion_run(trained)
    experiment = MlflowClient(tracking_uri=trained.world.tracking_uri).get_experiment_by_name("fraud_model")
    assert experiment is not None
    assert run.info.experiment_id == experiment.experiment_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["dagster.run_id"] == trained.run.run_id
    assert run.data.tags["partitions"] == f"{FIRST},{SECOND},{THIRD}"
    model = trained.world.metadata("fraud_model", THIRD)
    assert model["outcome"] == "trained"
    for key in (FIRST, SECOND, THIRD):
        metadata = trained.world.metadata("fraud_model", key)
        assert metadata["mlflow_run_id"] == run.info.run_id
        assert metadata["model_version"] == int(version.version)
    for name in TEST_METRICS:
        assert model[f"test_{name}"] == pytest.approx(run.data.metrics[f"test_{name}"], rel=1e-12)


def test_mlflow_has_every_grid_point_and_the_winner(trained: Trained) -> None:
    _, run = champion_run(trained)
    points, scores, best = grid(run)
    assert Counter(point["learner"] for point in points) == {
        "logistic_regression": 6,
        "xgboost": 2,
    }
    expected = itertools.product([0.0001, 0.01, 1], [100, 200])
    baseline = [point for point in points if point["learner"] == "logistic_regression"]
    assert sorted((point["C"], point["max_iter"]) for point in baseline) == sorted(expected)
    assert run.data.metrics["validation_average_precision"] == max(scores)
    assert {name: run.data.params[f"best.{name}"] for name in best} == {
        name: str(value) for name, value in best.items()
    }


def test_logged_metrics_are_those_of_the_test_scores(trained: Trained) -> None:
    import pandas as pd
    from sklearn.metrics import average_precision_score, roc_auc_score

    _, run = champion_run(trained)
    scores = pd.read_parquet(scores_directory(trained))
    assert list(scores.columns) == SCORE_COLUMNS
    assert scores["champion_score"].isna().all()
    metrics = run.data.metrics
    assert metrics["test_rows"] == len(scores)
    assert metrics["test_frauds"] == scores["tx_fraud"].sum() >= 10
    average_precision = average_precision_score(scores["tx_fraud"], scores["score"])
    assert metrics["test_average_precision"] == pytest.approx(average_precision, rel=1e-6)
    assert metrics["test_roc_auc"] == pytest.approx(roc_auc_score(scores["tx_fraud"], scores["score"]), rel=1e-6)
    assert metrics["test_average_precision"] > 2 * scores["tx_fraud"].mean(), "the model is no better than chance"


# --- sensor and daemon -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(directory: Path, cleaned: World, raw_files: RawFiles) -> World:
    """A cleaned lake, a new file, and a Dagster that knows nothing yet."""
    world = cleaned.copy(directory / "watched")
    world.add(raw_files.paths[FOURTH])
    return world


def test_daemon_processes_a_new_file_alone(watched: World, raw_files: RawFiles) -> None:
    before = watched.modification_times()
    with daemon(watched):
        wait_until(lambda: ticks(watched), "the sensor has ticked", pause=1)
        wait_until(lambda: all(run.is_finished for run in watched.runs()), "the run has ended", COMMAND_TIMEOUT_S, 1)
    (tick,) = ticks(watched)
    (run,) = watched.runs()
    assert tick.status.value == "SUCCESS"
    assert tick.run_ids == [run.run_id]
    assert watched.partitions() == KEYS
    assert run.job_name == "process_new_files"
    assert run.status == dg.DagsterRunStatus.SUCCESS
    assert watched.materialized(run.run_id, "cleaned_transactions") == [FOURTH]
    assert watched.materialized(run.run_id, "transaction_features") == [FOURTH]
    after = watched.modification_times()
    assert {name: after[name] for name in before} == before
    truth = raw_files.truths[FOURTH].counts
    counts = watched.report(FOURTH)["counts"]
    assert {name: counts[name] for name in truth} == truth
    # Twenty days with features are too few, which is a named outcome and no failure.
    model = watched.metadata("fraud_model", FOURTH)
    assert model["outcome"] == "too_little_data"
    assert "20 days of data" in model["reason"]


def test_tick_without_a_new_file_is_skipped_with_its_reason(watched: World) -> None:
    """The next sensor tick is a day off, so another Dagster looks at the same lake."""
    assert watched.report_file(FOURTH).exists(), "the daemon has not processed the new file"
    before = watched.modification_times()
    other = World(watched.root, home_name="another dagster home")
    with daemon(other):
        (tick,) = wait_until(lambda: ticks(other), "the sensor has ticked", pause=1)
    assert tick.status.value == "SKIPPED"
    assert tick.skip_reason == "4 raw files, every one has a cleaned counterpart"
    assert other.runs() == []
    assert other.partitions() == KEYS
    assert other.modification_times() == before


# --- healing -----------------------------------------------------------------------------------------------------


def test_lost_report_and_replaced_file_are_healed_alone(tmp_path: Path, cleaned: World, raw_files: RawFiles) -> None:
    world = replace(cleaned.copy(tmp_path / "healed world"), overrides=NO_TRAINING)
    other = replace(SIMULATION, fault_rate=100)  # the same transactions, so that their ids fit
    with (world.raw / f"{THIRD}.txt").open("wb") as out:
        replaced = other.write_file(KEYS.index(THIRD), out).counts
    world.report_file(FIRST).unlink()
    untouched = world.modification_times(SECOND)

    world.run(*ML_PLATFORM, "process-new-files")

    runs = world.runs()
    assert [run.status for run in runs] == [dg.DagsterRunStatus.SUCCESS] * 2
    assert [world.materialized(run.run_id, "cleaned_transactions") for run in runs] == [[FIRST], [THIRD]]
    assert world.modification_times(SECOND) == untouched
    for key, truth in ((FIRST, raw_files.truths[FIRST].counts), (THIRD, replaced)):
        counts = world.report(key)["counts"]
        assert {name: counts[name] for name in truth} == truth

    assert "every one has a cleaned counterpart" in world.run(*ML_PLATFORM, "process-new-files")
    assert len(world.runs()) == 2


# --- what somebody may put into the directory --------------------------------------------------------------------

BINARY, LONG_LINE, EMPTY, HEADER_ONLY, GOOD = ("1_binary", "2_long_line", "3_empty", "4_header_only", "5_good")
GROWING, UNREADABLE, VANISHING = ("6_growing", "7_unreadable", "8_vanishing")
LONG_LINE_BYTES = 100_000_000


@pytest.fixture(scope="module")
def hostile(directory: Path, raw_files: RawFiles) -> tuple[World, str, str]:
    """A directory with one good file, and what `ml-platform sync` and the cleaning of all files printed."""
    world = World(directory / "hostile")
    (world.raw / f"{BINARY}.txt").write_bytes(random.Random(0).randbytes(200_000))
    (world.raw / f"{LONG_LINE}.txt").write_bytes(b"7" * LONG_LINE_BYTES)
    (world.raw / f"{EMPTY}.txt").touch()
    (world.raw / f"{HEADER_ONLY}.txt").write_bytes(HEADER)
    for key in (GOOD, GROWING, VANISHING):
        world.add(raw_files.paths[FIRST], f"{key}.txt")
    # Not even root can read it: nothing is mapped at the first address of a process.
    (world.raw / f"{UNREADABLE}.txt").symlink_to("/proc/self/mem")
    world.add(raw_files.paths[FIRST], "we ird;name.txt")
    (world.raw / "folder.txt").mkdir()
    (world.raw / "notes.md").write_text("no raw file")

    def meddle() -> None:
        # The request is written when the files have been listed, and none has been read yet.
        wait_until(lambda: list(world.lake.glob("_runs/*/clean_transactions.request.json")), "cleaning is requested")
        with (world.raw / f"{GROWING}.txt").open("ab") as file:
            file.write(b"9999999,2019-08-30 10:00:00,1,1,1.00,727200,8,0,0\n")
        (world.raw / f"{VANISHING}.txt").unlink()

    synchronized = world.sync()
    meddler = threading.Thread(target=meddle, daemon=True)
    meddler.start()
    printed = world.materialize("cleaned_transactions", BINARY, VANISHING, fails=True)
    meddler.join(10)
    return world, synchronized, printed


def test_bad_names_are_named_and_ignored(hostile: tuple[World, str, str]) -> None:
    world, synchronized, _ = hostile
    assert "'we ird;name.txt'" in synchronized
    assert world.partitions() == [BINARY, LONG_LINE, EMPTY, HEADER_ONLY, GOOD, GROWING, UNREADABLE, VANISHING]


def test_good_file_is_cleaned_among_bad_ones(hostile: tuple[World, str, str], raw_files: RawFiles) -> None:
    world, _, _ = hostile
    truth = raw_files.truths[FIRST].counts
    counts = world.report(GOOD)["counts"]
    assert {name: counts[name] for name in truth} == truth
    assert world.metadata("cleaned_transactions", GOOD)["outcome"] == "cleaned"


@pytest.mark.parametrize("key", [EMPTY, HEADER_ONLY])
def test_file_without_rows_is_an_empty_partition(hostile: tuple[World, str, str], key: str) -> None:
    world, _, _ = hostile
    assert world.metadata("cleaned_transactions", key)["outcome"] == "empty file"
    assert set(world.report(key)["counts"].values()) == {0}


@pytest.mark.parametrize("key", [BINARY, LONG_LINE])
def test_lines_that_are_no_rows_are_in_quarantine(hostile: tuple[World, str, str], key: str) -> None:
    import pandas as pd

    world, _, _ = hostile
    metadata = world.metadata("cleaned_transactions", key)
    assert metadata["dagster/row_count"] == 0
    assert metadata["rejected_rows"] == metadata["raw_rows"] > 0
    rejects = pd.read_parquet(world.report_file(key, "rejected_transactions").parent)
    assert len(rejects) == metadata["rejected_rows"]
    assert all("malformed_row" in reasons for reasons in rejects["reasons"])
    if key == LONG_LINE:
        assert rejects["raw_line"].str.len().tolist() == [LONG_LINE_BYTES]


@pytest.mark.parametrize(
    ("key", "reason"),
    [(GROWING, "the raw file is changing"), (UNREADABLE, "Input/output error"), (VANISHING, "does not exist")],
)
def test_file_that_cannot_be_cleaned_is_named_with_its_reason(
    hostile: tuple[World, str, str], key: str, reason: str
) -> None:
    world, _, printed = hostile
    assert not world.report_file(key).exists()
    (run,) = world.runs()
    assert run.status == dg.DagsterRunStatus.FAILURE
    assert world.materialized(run.run_id, "cleaned_transactions") == [BINARY, LONG_LINE, EMPTY, HEADER_ONLY, GOOD]
    with world.instance() as instance:
        (failure,) = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    assert failure.dagster_event is not None
    data = failure.dagster_event.step_failure_data.user_failure_data
    assert data is not None
    assert reason in data.metadata["failed_partitions"].value[key]
    assert "3 of 8 partitions of cleaned_transactions failed (5 are done)" in printed
    assert f"{key}: " in printed


def test_check_names_the_files_that_are_all_rejects(hostile: tuple[World, str, str]) -> None:
    """With nothing left to fail, the checks judge what is cleaned."""
    world = hostile[0]
    printed = world.materialize("cleaned_transactions", BINARY, GOOD, fails=True)
    assert "reject_rate" in printed
    with world.instance() as instance:
        run = world.runs()[-1]
        events = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    evaluations = [event.dagster_event.asset_check_evaluation_data for event in events if event.dagster_event]
    judged = [evaluation for evaluation in evaluations if evaluation.check_name == "reject_rate"]
    # One of each partition, and the run's own verdict, which names those with a problem.
    passed = {evaluation.partition: evaluation.passed for evaluation in judged if evaluation.partition}
    assert passed == {BINARY: False, LONG_LINE: False, EMPTY: True, HEADER_ONLY: True, GOOD: True}
    (verdict,) = [evaluation for evaluation in judged if "problems" in evaluation.metadata]
    assert not verdict.passed
    problems = verdict.metadata["problems"].value
    assert sorted(problems) == [BINARY, LONG_LINE]
    assert problems[LONG_LINE].startswith("100.00% of 1 rows are rejected")
    assert all(problem in (verdict.description or "") for problem in problems.values())


# --- interruption ------------------------------------------------------------------------------------------------

COPIES = 20


def test_interrupted_cleaning_leaves_nothing_that_counts(tmp_path: Path, raw_files: RawFiles) -> None:
    import pandas as pd

    world = World(tmp_path / "interrupted world", overrides=NO_TRAINING)
    world.add(raw_files.paths[FIRST])
    # The same rows again and again: long to clean, and all but one copy are duplicates.
    content = raw_files.paths[SECOND].read_bytes().removeprefix(HEADER)
    with (world.raw / f"{SECOND}.txt").open("wb") as out:
        out.write(HEADER)
        for _ in range(COPIES):
            out.write(content)
    world.register(FIRST, SECOND)

    for number in (signal.SIGTERM, signal.SIGKILL):
        # The first file is to be cleaned as well: its report tells when the second one's turn has come.
        world.report_file(FIRST).unlink(missing_ok=True)
        log = tmp_path / f"{number.name}.log"
        with no_process_left(world):
            process = world.start(*materialize_command("cleaned_transactions", FIRST, SECOND), log=log)
            wait_until(world.report_file(FIRST).exists, "the first file is cleaned", COMMAND_TIMEOUT_S)
            time.sleep(0.3)
            assert "java" in world.processes().values()
            assert not world.report_file(SECOND).exists(), "the second file is too small for this machine"
            process.send_signal(number)
            assert process.wait(120) != 0
        assert not world.report_file(SECOND).exists(), log.read_text()
    first = world.modification_times(FIRST)

    world.run(*ML_PLATFORM, "process-new-files")

    *interrupted, finishing = world.runs()
    assert [run.is_failure_or_canceled for run in interrupted] == [True, True]
    assert finishing.is_success
    assert world.materialized(finishing.run_id, "cleaned_transactions") == [SECOND]
    assert world.modification_times(FIRST) == first
    truth, counts = raw_files.truths[SECOND].counts, world.report(SECOND)["counts"]
    assert counts["raw_rows"] == COPIES * truth["raw_rows"]
    assert counts["clean_rows"] == truth["clean_rows"]
    partition = world.report_file(SECOND).parent
    ids = pd.read_parquet(partition)["transaction_id"]
    assert ids.is_unique
    assert len(ids) == truth["clean_rows"]
    assert not (partition / "_temporary").exists()
