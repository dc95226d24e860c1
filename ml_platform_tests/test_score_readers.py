"""What people read scores with: the commands, and the snippets of docs/scores.md, run as they stand there.

test_documented_commands.py runs the commands of that page.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from ml_platform.lake.reports import SCORED_TABLE
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import readable_path
from ml_platform_tests.fakes import put_scores, scored_report
from ml_platform_tests.world import PROJECT

RunCli = Callable[..., tuple[int, str, str]]
TEXT = (PROJECT / "docs/scores.md").read_text()
KEYS = ("2019-10-21", "2019-11-20")

#: Runs SQL: prints the rows of each query after the first statement.
DUCKDB = """
import duckdb, json, sys
_, first, *queries = sys.argv
with duckdb.connect() as database:
    database.execute(first)
    print(json.dumps([database.execute(query).fetchall() for query in queries], default=str))
"""


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def rows_of(key: str) -> list[dict[str, object]]:
    """Twelve rows of two days, the score falling from row to row; the first ten are alerts."""
    first = datetime.fromisoformat(key)
    return [
        {
            "transaction_id": number,
            "tx_datetime": first.replace(day=first.day + number % 2, hour=number),
            "customer_id": number,
            "terminal_id": None if number == 3 else 7,
            "tx_amount": 10.0 * number,
            "score": 0.9 - number / 100,
            "rank_of_day": 1 + number // 2,
            "alert": number < 10,
            "model_version": 3,
            "reason_1": f"amount {10 * number:,.2f}",
            "contribution_1": 0.5,
        }
        for number in range(12)
    ]


@pytest.fixture
def lake(lake: LakeResource, monkeypatch: pytest.MonkeyPatch) -> LakeResource:
    """Two scored partitions, one whose scores are being replaced, and one that no champion could score."""
    lake = LakeResource(raw_uri=lake.raw_uri, lake_uri=f"{lake.lake_uri}/O'Brien", epoch=lake.epoch)
    monkeypatch.setenv("ML_PLATFORM_RAW_URI", lake.raw_uri)
    monkeypatch.setenv("ML_PLATFORM_LAKE_URI", lake.lake_uri)
    for key in (*KEYS, "replaced"):
        put_scores(lake, key, rows_of(KEYS[0] if key == "replaced" else key))
    for key in KEYS:
        lake.write_json(f"{SCORED_TABLE}/raw_file={key}/_report.json", scored_report(key, rows=12, model_version=3))
    lake.write_json(f"{SCORED_TABLE}/raw_file=none/_report.json", scored_report("none", rows=0, model_version=None))
    return lake


def test_alerts_are_shown_with_their_reasons(run_cli: RunCli, lake: LakeResource):
    code, out, _ = run_cli("alerts", KEYS[1], "--day", "2019-11-25")
    assert (code, out.count("amount")) == (0, 0), "no row of the file is of that day"
    code, out, _ = run_cli("alerts", KEYS[1], "--day", "2019-11-21", "--top", "2")
    assert code == 0
    first, reason, second, _, end = out.splitlines()
    assert first == (
        "0.890  2019-11-21 01:00:00 UTC, transaction 1, customer 1, terminal 7, amount 10.00, number 1 of its day"
    )
    assert reason.strip() == "amount 10.00"
    assert "transaction 3, customer 3, terminal unknown," in second
    assert end.startswith("2 of 10 alerts of 2019-11-20, by model version 3")
    assert f"/alerts/raw_file={KEYS[1]}/alerts.csv" in end

    code, out, err = run_cli("alerts", KEYS[1], "--day", "2019-11-21", "--top", "2", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer.pop("csv").endswith(f"/alerts/raw_file={KEYS[1]}/alerts.csv")
    first, second = answer.pop("alerts")
    assert answer == {"partition": KEYS[1], "model_version": 3, "number_of_alerts": 10}
    assert first.pop("reasons") == [{"reason": "amount 10.00", "contribution": 0.5}]
    assert first == {
        **{"transaction_id": 1, "tx_datetime": "2019-11-21T01:00:00Z", "customer_id": 1, "terminal_id": 7},
        **{"tx_amount": 10.0, "score": pytest.approx(0.89), "rank_of_day": 1},
    }
    assert second["terminal_id"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["2019-01-01"], "'2019-01-01' is not a scored partition"),
        (["none"], "run dg launch --assets scored_transactions --partition none"),
    ],
)
def test_alerts_that_cannot_be_shown(run_cli: RunCli, lake: LakeResource, arguments: list[str], says: str):
    code, _, errors = run_cli("alerts", *arguments)
    assert code == 1
    assert says in errors


def test_only_complete_partitions_are_listed(run_cli: RunCli, lake: LakeResource):
    code, out, _ = run_cli("scores")
    assert code == 0
    assert out.split() == [readable_path(lake.partition_uri(SCORED_TABLE, key)) for key in KEYS]


def test_duckdb_reads_them(run_cli: RunCli, lake: LakeResource):
    code, views, _ = run_cli("scores", "--sql")
    assert code == 0
    counts = "SELECT count(*), count(DISTINCT transaction_id) FROM scored_transactions"
    # In a process of its own, because DuckDB complains of leaks at the end of pytest's.
    command = [sys.executable, "-c", DUCKDB, views, counts, *snippets("sql")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (counted,), found = json.loads(done.stdout)
    assert counted == [24, 12]
    assert len(found) == 20
    assert found[0][1:] == [0, pytest.approx(0.9), "amount 0.00"]


def test_pandas_reads_them(run_cli: RunCli, lake: LakeResource):
    _, out, _ = run_cli("scores")
    (program,) = [text for text in snippets("python") if "pandas" in text]
    names: dict[str, object] = {}
    exec(program.replace("PATH", out.split()[-1]), names)
    assert [len(names[name]) for name in ("scores", "alerts")] == [12, 10]  # type: ignore[arg-type]


def test_a_lake_without_scores_says_so(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ML_PLATFORM_LAKE_URI", str(tmp_path / "empty"))
    code, _, errors = run_cli("scores")
    assert code == 1
    assert "has scores yet" in errors
