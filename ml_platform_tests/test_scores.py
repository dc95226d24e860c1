"""``scored_transactions`` with a fake engine, through Dagster and MLflow: which model scores what, checks, grades."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.assets.scores import CHAMPION_TAG
from ml_platform.dev.cloud.processes import free_port
from ml_platform.lake.grades import newest_grade, problem_of_grade, valid_grades
from ml_platform.lake.reports import ALERTS_TABLE, FEATURES_TABLE, SCORED_TABLE, Grade, ScoredReport
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.withdrawal import withdraw_file
from ml_platform.model.mlflow import MlflowResource
from ml_platform_tests.fakes import (
    FakeEngine,
    definitions,
    local_path,
    put_cleaned,
    put_raw,
    raw_spec,
    recorded,
    requests_of,
    rows_per_day,
    run_assets,
)
from ml_platform_tests.world import PROJECT
from spark_jobs.features.registry import MODEL_INPUTS
from spark_jobs.scoring import grading

CLEANED, FEATURES, SCORES, MODEL = (
    *("cleaned_transactions", "transaction_features"),
    *("scored_transactions", "fraud_model"),
)
ALL = (CLEANED, FEATURES, SCORES, MODEL)
WITHOUT_MODEL = ALL[:-1]
#: The fake model's held-out interval ends about here: it separates frauds well.
GOOD, BAD = 0.9, 0.1


class Platform:
    """A lake, Dagster's storage and MLflow, with raw files of 30 days each."""

    def __init__(self, lake: LakeResource, instance: dg.DagsterInstance, mlflow: MlflowResource) -> None:
        self.lake, self.instance, self.mlflow = lake, instance, mlflow

    def put(self, *numbers: int, **changes: Any) -> None:
        for number in numbers:
            spec = raw_spec(number, report={"rows_per_day": rows_per_day(number)}, **changes)
            put_raw(self.lake, f"file-{number}", spec)
        self.instance.add_dynamic_partitions("raw_files", [f"file-{number}" for number in numbers])

    def run(self, *assets: str, first: int, last: int | None = None, **options: Any) -> dg.ExecuteInProcessResult:
        keys = (f"file-{first}", f"file-{first if last is None else last}")
        engine = options.pop("engine", None)
        return run_assets(definitions(self.lake, engine, self.mlflow), self.instance, *assets, keys=keys, **options)

    def report(self, number: int) -> ScoredReport:
        return self.lake.reports(ScoredReport)[f"file-{number}"]

    def request(self, result: dg.ExecuteInProcessResult) -> dict[str, Any]:
        (request,) = requests_of(self.lake, result.run_id, "score_transactions")
        return request

    def tag(self, result: dg.ExecuteInProcessResult) -> str | None:
        run = self.instance.get_run_by_id(result.run_id)
        assert run is not None
        return run.tags.get(CHAMPION_TAG)


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def platform(lake: LakeResource, instance: dg.DagsterInstance, mlflow: MlflowResource) -> Platform:
    found = Platform(lake, instance, mlflow)
    found.put(0, 1, 2)
    return found


@pytest.fixture
def in_service(platform: Platform, first_run: Path, tmp_path: Path) -> Platform:
    """A first file, whose rows nothing could score, has trained version 1; Dagster has forgotten its run."""
    for name in ("raw", "lake"):
        shutil.copytree(first_run / name, tmp_path / name, dirs_exist_ok=True)
    shutil.copy(first_run / "mlflow.db", tmp_path / "ml flow")
    return platform


def check(result: dg.ExecuteInProcessResult, name: str) -> Any:
    (found,) = (
        item for item in result.get_asset_check_evaluations() if item.check_name == name and item.partition is None
    )
    return found


class TestWhichModel:
    def test_without_a_champion_a_report_says_so_and_the_run_trains_one(self, platform: Platform):
        assert platform.run(*ALL, first=0).success
        report = platform.report(0)
        assert (report.outcome, report.counts.rows, report.model_version) == ("no_champion", 0, None)
        metadata = recorded(platform.instance, SCORES)["file-0"]
        assert metadata["outcome"] == "no_champion"
        champion = platform.mlflow.champion()
        assert champion is not None
        assert int(champion.version) == 1

    def test_new_rows_are_scored_by_the_champion_of_before_the_run(self, in_service: Platform):
        engine = FakeEngine(challenger_skill=3.0, champion_skill=0.5)
        result = in_service.run(*ALL, first=1, last=2, engine=engine, config={MODEL: {"train_each": True}})
        assert result.success
        assert in_service.tag(result) == "1"
        for number in (1, 2):
            report = in_service.report(number)
            assert (report.outcome, report.model_version, report.cause) == ("scored", 1, "new")
            assert report.out_of_time_from == "2020-01-17"  # the day after the training window
            assert report.held_out is not None
        champion = in_service.mlflow.champion()
        assert champion is not None
        assert int(champion.version) > 1

    def test_scores_stay_when_the_champion_or_the_history_changes(self, in_service: Platform):
        assert in_service.run(*ALL, first=1, engine=FakeEngine(challenger_skill=3.0, champion_skill=0.5)).success
        before = in_service.report(1)
        in_service.put(0, rows=19_000)  # the history of the second file
        result = in_service.run(*WITHOUT_MODEL, first=0, last=1)
        assert result.success
        assert in_service.report(1) == before
        assert recorded(in_service.instance, SCORES)["file-1"]["outcome"] == "already scored"
        # The rows of the first file are others now; they are scored by this run's champion.
        assert (in_service.report(0).cause, in_service.report(0).model_version) == ("new_rows", 2)

    def test_a_retry_scores_with_the_same_champion(self, in_service: Platform):
        """The first attempt was killed after another version became the champion."""
        assert in_service.run(MODEL, first=0, engine=FakeEngine(challenger_skill=3.0, champion_skill=0.5)).success
        result = in_service.run(*WITHOUT_MODEL, first=1, tags={CHAMPION_TAG: "1"})
        assert result.success
        assert in_service.report(1).model_version == 1
        result = in_service.run(*WITHOUT_MODEL, first=2, tags={CHAMPION_TAG: "none"})
        assert in_service.report(2).outcome == "no_champion"

    def test_a_retry_after_the_scores_keeps_them(self, in_service: Platform):
        broken = in_service.run(*ALL, first=1, engine=FakeEngine(breaks_down="train_model"))
        assert not broken.success
        before = in_service.report(1)
        tags = {CHAMPION_TAG: str(in_service.tag(broken))}
        assert in_service.run(*WITHOUT_MODEL, first=1, tags=tags).success
        assert in_service.report(1) == before

    def test_rows_are_scored_again_by_hand(self, in_service: Platform):
        assert in_service.run(*ALL, first=1, engine=FakeEngine(challenger_skill=3.0, champion_skill=0.5)).success
        assert in_service.report(1).model_version == 1
        assert in_service.run(SCORES, first=1).success
        assert in_service.report(1).model_version == 1
        assert in_service.run(SCORES, first=1, config={SCORES: {"rebuild": True}}).success
        assert (in_service.report(1).model_version, in_service.report(1).cause) == (2, "rebuild")
        assert in_service.run(SCORES, first=1, config={SCORES: {"model_version": 1}}).success
        assert (in_service.report(1).model_version, in_service.report(1).cause) == (1, "model_version")
        # A partition without scores gets them.
        assert in_service.run(SCORES, first=0).success
        assert (in_service.report(0).model_version, in_service.report(0).cause) == (2, "no_scores")
        failed = in_service.run(SCORES, first=1, config={SCORES: {"model_version": 9}})
        assert not failed.success
        assert in_service.report(1).model_version == 1

    def test_a_champion_that_cannot_score_is_a_warning_and_the_run_trains(self, in_service: Platform):
        in_service.mlflow.client().delete_model_version_tag("fraud_model", "1", "features")
        result = in_service.run(*ALL, first=1)
        assert result.success
        assert in_service.report(1).outcome == "champion_unreadable"
        found = check(result, "champion_scores")
        assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
        assert "version 1 has no inputs" in found.description
        assert recorded(in_service.instance, MODEL)["file-1"]["outcome"] == "trained"

    def test_a_deleted_champion_of_a_retry_is_a_warning(self, in_service: Platform):
        result = in_service.run(*WITHOUT_MODEL, first=1, tags={CHAMPION_TAG: "7"})
        assert result.success
        assert in_service.report(1).outcome == "champion_unreadable"
        assert in_service.report(1).error == "version 7 is gone from MLflow"

    def test_without_mlflow_the_step_fails(
        self, lake: LakeResource, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        broken = Platform(lake, instance, MlflowResource(tracking_uri="http://127.0.0.1:1"))
        broken.put(0)
        result = broken.run(*ALL, first=0)
        assert {event.step_key for event in result.get_step_failure_events()} == {SCORES}
        assert lake.reports(ScoredReport) == {}


class TestFiles:
    def test_stopped_files_get_no_scores(self, in_service: Platform):
        in_service.put(2, frauds=15_000)
        result = in_service.run(*WITHOUT_MODEL, first=1, last=2)
        assert {event.step_key for event in result.get_step_failure_events()} == {"intake_checks"}
        assert sorted(in_service.lake.reports(ScoredReport)) == ["file-0", "file-1"]
        assert sorted(recorded(in_service.instance, SCORES, result.run_id)) == ["file-1"]
        assert not in_service.run(SCORES, first=2).success

    def test_withdrawing_a_file_takes_its_scores_and_alerts(self, in_service: Platform):
        assert in_service.run(*WITHOUT_MODEL, first=1).success
        alerts = local_path(in_service.lake.partition_uri(ALERTS_TABLE, "file-1"))
        alerts.mkdir(parents=True)
        (alerts / "alerts.csv").write_text("transaction_id\n")
        withdraw_file(in_service.lake, "file-1")
        assert "file-1" not in in_service.lake.reports(ScoredReport)
        assert not alerts.exists()
        assert not local_path(in_service.lake.partition_uri(SCORED_TABLE, "file-1")).exists()

    def test_one_setting_for_alerts_and_the_models_figures(
        self, in_service: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        result = in_service.run(*ALL, first=1, config={MODEL: {"alerts_per_day": 7, "delay_days": 9}})
        request = in_service.request(result)
        assert (request["alerts_per_day"], request["grading"]["delay_days"]) == (7, 9)
        # A run that does not train takes the deployment's.
        file = tmp_path / "run.yaml"
        file.write_text("ops: {fraud_model: {config: {alerts_per_day: 11}}}")
        monkeypatch.setenv("ML_PLATFORM_RUN_CONFIG", str(file))
        result = in_service.run(SCORES, first=1, config={SCORES: {"rebuild": True}})
        assert in_service.request(result)["alerts_per_day"] == 11

    def test_what_the_job_is_asked_for(self, in_service: Platform):
        assert in_service.run(*WITHOUT_MODEL, first=1).success
        result = in_service.run(*WITHOUT_MODEL, first=2)
        request = in_service.request(result)
        (item,) = request["partitions"]
        uri = f"file://{in_service.lake.lake_uri}"
        assert {name: item[name] for name in ("partition", "rows", "cause", "usual_days")} == {
            **{"partition": "file-2", "rows": 20_000, "cause": "new"},
            "usual_days": [60, 89],
        }
        assert item["features_uri"] == f"{uri}/{FEATURES_TABLE}/raw_file=file-2"
        assert item["output_uri"] == f"{uri}/{SCORED_TABLE}/raw_file=file-2"
        assert item["alerts_uri"] == f"{uri}/{ALERTS_TABLE}/raw_file=file-2"
        assert item["rows_per_day"] == {str(day): 1 for day in range(60, 90)}
        champion = request["champion"]
        assert champion["report_uri"] == champion["model_uri"].replace("model.json", "_report.json")
        grading = request["grading"]
        assert (grading["last_day"], request["data_first_day"]) == (89, 0)
        assert list(grading["scored"]) == ["file-1"]
        assert {key: (part["first_day"], part["last_day"]) for key, part in grading["cleaned"].items()} == {
            f"file-{number}": (30 * number, 30 * number + 29) for number in range(3)
        }


class TestGrades:
    def test_grades_are_metrics_of_the_versions_run_by_week(self, in_service: Platform):
        assert in_service.run(*WITHOUT_MODEL, first=1).success
        assert in_service.run(*WITHOUT_MODEL, first=2).success
        grades = valid_grades(in_service.lake.reports(ScoredReport))
        # From day 30, where the second file begins, to day 82, whose labels are known on day 89.
        assert [grade.week for grade in grades] == list(range(4, 11))
        version = in_service.mlflow.version("1")
        assert version is not None
        history = in_service.mlflow.client().get_metric_history(version.run_id, "live_average_precision")
        assert sorted(point.step for point in history) == list(range(4, 11))

    def test_metrics_that_could_not_be_logged_are_logged_later(
        self, in_service: Platform, monkeypatch: pytest.MonkeyPatch
    ):
        with monkeypatch.context() as patched:
            patched.setattr(MlflowResource, "log_steps", lambda *_, **__: None)
            assert in_service.run(*WITHOUT_MODEL, first=1).success
        assert in_service.run(*WITHOUT_MODEL, first=2).success
        version = in_service.mlflow.version("1")
        assert version is not None
        history = in_service.mlflow.client().get_metric_history(version.run_id, "live_frauds")
        assert sorted(point.step for point in history) == list(range(4, 11))

    def test_scoring_again_makes_the_weeks_ungraded(self, in_service: Platform):
        assert in_service.run(*WITHOUT_MODEL, first=1).success
        assert in_service.run(*WITHOUT_MODEL, first=2).success
        assert in_service.run(SCORES, first=1, config={SCORES: {"rebuild": True}}).success
        grades = valid_grades(in_service.lake.reports(ScoredReport))
        run = in_service.report(1).run_id
        assert [grade.week for grade in grades] == list(range(4, 11))
        assert {grade.week for grade in grades if grade.scores.get("file-1") == run} == set(range(4, 9))

    def test_a_week_that_is_certainly_worse_is_a_warning_until_a_good_one(self, in_service: Platform):
        result = in_service.run(*ALL, first=1, engine=FakeEngine(live_average_precision=BAD))
        assert result.success
        found = check(result, "live_quality")
        assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
        assert "version 1, " in found.description
        assert "average precision 0.100 (at most 0.150)" in found.description
        health = check(result, "champion_health")
        assert not health.passed
        assert "average precision of 0.100" in health.description
        result = in_service.run(*ALL, first=2, engine=FakeEngine(live_average_precision=GOOD))
        assert check(result, "live_quality").passed
        assert check(result, "champion_health").passed

    def test_a_week_without_a_grade_hides_no_bad_one(self, in_service: Platform):
        engine = FakeEngine(live_average_precision=BAD, grading_error="week 5: other rows")
        described = check(in_service.run(*WITHOUT_MODEL, first=1, engine=engine), "live_quality").description
        assert "week 5: other rows; version 1, " in described

    def test_the_interval_decides(self):
        held_out = {"average_precision": 0.8, "lower": 0.75, "upper": 0.85}
        grade = Grade.model_validate(FakeEngine()._grade(grading.Week(1, 1, 7, 13, {}), held_out))
        assert problem_of_grade(grade.model_copy(update={"average_precision_upper": 0.75})) is None
        assert problem_of_grade(grade.model_copy(update={"average_precision_upper": 0.74})) is not None
        assert problem_of_grade(grade.model_copy(update={"average_precision_upper": None})) is None
        assert problem_of_grade(grade.model_copy(update={"held_out": None, "average_precision_upper": 0.1})) is None

    def test_the_newest_grade_of_a_version(self, in_service: Platform):
        assert newest_grade(in_service.lake.reports(ScoredReport), 1) is None
        assert in_service.run(*WITHOUT_MODEL, first=1).success
        grade = newest_grade(in_service.lake.reports(ScoredReport), 1)
        assert grade is not None
        assert grade.week == 6


def test_cleaning_again_with_other_limits_scores_again(in_service: Platform):
    assert in_service.run(*WITHOUT_MODEL, first=1).success
    put_cleaned(in_service.lake, "file-1", out_of_range=5.0)
    result = in_service.run(FEATURES, SCORES, first=1)
    assert result.success
    assert in_service.report(1).cause == "new_rows"


def test_the_champion_is_served_over_http_and_then_its_successor(in_service: Platform, tmp_path: Path):
    assert in_service.run(MODEL, first=0, engine=FakeEngine(challenger_skill=0.5, champion_skill=3.0)).success
    port = free_port()
    log = tmp_path / "serve.log"
    # As in Dagster's commands, .env is read from the working directory and wins.
    (tmp_path / ".env").write_text(f"MLFLOW_TRACKING_URI={in_service.mlflow.tracking_uri}\n")
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "ml_platform.model.serve", "--port", str(port), "--poll", "0.5"],
            cwd=tmp_path,
            env={**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "PYTHONPATH": str(PROJECT)},
            stderr=out,
            stdout=out,
        )

    def answers() -> bool:
        with suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).status == 200
        return False

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < deadline, log.read_text()
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)

    try:
        wait_for(answers)
        row = dict.fromkeys(MODEL_INPUTS, 0.5)
        request = {"dataframe_split": {"columns": list(row), "data": [list(row.values())]}}
        question = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(question, timeout=30) as answer:
            (found,) = json.load(answer)["predictions"]
        # The fake model: -1 and a tenth of the sum of its inputs.
        assert found["score"] == pytest.approx(1 / (1 + math.exp(1 - 0.05 * len(row))))
        assert "version 1 of fraud_model" in log.read_text()
        in_service.mlflow.set_champion("2", {}, lambda event: None)
        wait_for(lambda: "version 2 of fraud_model" in log.read_text())
        wait_for(answers)
    finally:
        server.terminate()
        server.wait(30)
    assert not answers()
