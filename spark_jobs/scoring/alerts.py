"""Alerts as files for people: Parquet, and CSV that spreadsheets open."""

from __future__ import annotations

import csv
import io
from datetime import datetime, timedelta
from typing import Any

from spark_jobs.io import parquet_files
from spark_jobs.schema import ALERT_COLUMNS, KEY_COLUMNS, NO_KEY

#: Alerts of a partition, in its directory.
PARQUET_NAME = "alerts.parquet"
CSV_NAME = "alerts.csv"

#: A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection").
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def alert_files(alerts: list[dict[str, Any]]) -> dict[str, bytes]:
    """Name → content of the files with these alerts (see rows.scored_files)."""
    return {PARQUET_NAME: _parquet(alerts), CSV_NAME: _csv(alerts)}


def plain(alert: dict[str, Any]) -> dict[str, Any]:
    """An alert for a JSON report: its instant as text, unknown keys as None."""
    result = {name: alert[name] for name, *_ in ALERT_COLUMNS}
    result["tx_datetime"] = _instant(alert["tx_datetime"])
    return {name: None if name in KEY_COLUMNS and value == NO_KEY else value for name, value in result.items()}


def _instant(unix_seconds: int) -> str:
    return (datetime(1970, 1, 1) + timedelta(seconds=unix_seconds)).isoformat(sep=" ")


def _parquet(alerts: list[dict[str, Any]]) -> bytes:
    import pyarrow

    arrays = []
    for name, kind, _ in ALERT_COLUMNS:
        values = [alert[name] for alert in alerts]
        if kind == "timestamp":
            values = [seconds * 1_000_000 for seconds in values]
        elif name in KEY_COLUMNS:
            values = [None if value == NO_KEY else value for value in values]
        arrays.append(pyarrow.array(values, parquet_files.arrow_type(kind)))
    return parquet_files.file_of(pyarrow.Table.from_arrays(arrays, names=[name for name, *_ in ALERT_COLUMNS]))


def _csv(alerts: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")  # RFC 4180
    writer.writerow([name for name, *_ in ALERT_COLUMNS])
    writer.writerows([_cell(value) for value in plain(alert).values()] for alert in alerts)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """A value as a cell that no spreadsheet runs."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value
