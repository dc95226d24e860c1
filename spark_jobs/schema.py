"""Tables, counts and conventions shared by the jobs and all readers of the lake."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

#: Version of the reports, the tables and the cleaning rules. Data of an older version are rebuilt, or converted by a
#: step of ml_platform/lake/migrations.py; a lake with data of a newer version is refused.
SCHEMA_VERSION = 2

#: File name of the report, which is written last and marks its partition as complete.
REPORT_NAME = "_report.json"

#: Fields of a line of a raw file.
RAW_COLUMNS = (
    ("transaction_id", "string", "Unique number of the transaction, in all files."),
    ("tx_datetime", "string", "Instant of the transaction, YYYY-MM-DD HH:MM:SS, UTC."),
    ("customer_id", "string", "Customer (card), an integer. Other values stand for an unknown customer."),
    ("terminal_id", "string", "Terminal of the merchant, an integer. Other values stand for an unknown terminal."),
    ("tx_amount", "string", "Amount, not negative."),
    ("tx_time_seconds", "string", "Seconds from the epoch; computed again from tx_datetime."),
    ("tx_time_days", "string", "Days from the epoch; computed again from tx_datetime."),
    ("tx_fraud", "string", "1 for a fraud, 0 for a genuine transaction."),
    ("tx_fraud_scenario", "string", "Number of the simulated fraud scenario, 0 for none."),
)

#: Columns of ``cleaned_transactions``: name, Spark type, description.
CLEANED_COLUMNS = (
    ("transaction_id", "bigint", "Unique number of the transaction."),
    ("tx_datetime", "timestamp", "Instant of the transaction, UTC."),
    ("customer_id", "bigint", "Customer (card); NULL if the raw value is not a customer id."),
    ("terminal_id", "bigint", "Terminal of the merchant; NULL if the raw value is not a terminal id."),
    ("tx_amount", "double", "Amount, in the currency of the raw data; zero and large amounts are valid."),
    ("tx_time_seconds", "bigint", "Seconds from the epoch of the data set to tx_datetime."),
    ("tx_time_days", "int", "Whole days from the epoch of the data set to tx_datetime."),
    ("tx_fraud", "int", "1 for a fraud, 0 for a genuine transaction."),
    ("tx_fraud_scenario", "int", "Number of the simulated fraud scenario, 0 for none."),
)

#: Columns that identify a transaction for people.
_IDENTIFYING = ("transaction_id", "tx_datetime", "customer_id", "terminal_id", "tx_amount")

#: The columns that may be NULL.
KEY_COLUMNS = ("customer_id", "terminal_id")

#: Stands for NULL in numpy columns of keys, which are never negative.
NO_KEY = -1

#: Seconds per day.
DAY_S = 86400

#: Inputs that are named as reasons of an alert.
REASONS = 3
_RANKS = range(1, REASONS + 1)

#: Columns of ``scored_transactions``.
SCORED_COLUMNS = (
    *[column for column in CLEANED_COLUMNS if column[0] in _IDENTIFYING],
    ("score", "double", "Probability of fraud, by the model of model_version."),
    ("rank_of_day", "int", "Place by score among the file's rows of that day (UTC), from 1; ties by transaction_id."),
    ("alert", "boolean", "True for the rows of a day that are handed to people: the alerts_per_day highest ranks."),
    ("model_version", "int", "Version of the registered model that gave the score."),
)

#: Columns of ``alerts``.
ALERT_COLUMNS = (
    *SCORED_COLUMNS,
    *[(f"reason_{n}", "string", f"Input {n} of those that raised the score most, in words.") for n in _RANKS],
    *[(f"contribution_{n}", "double", f"Log-odds by which reason_{n} raised the score.") for n in _RANKS],
)

#: Columns of ``rejected_transactions``.
REJECTED_COLUMNS = (
    ("raw_line", "string", "The line as in the raw file, without its line end."),
    ("reasons", "array<string>", "Names of the rules that rejected it."),
)

#: Rules that reject a row, in words; each is a key of a report's ``counts`` and a value of ``reasons``.
REJECT_RULES = {
    "malformed_row": "not 9 fields, or a numeric field that is not a number",
    "invalid_datetime": "not an existing date and time",
    "invalid_amount": "negative amount",
    "invalid_label": "tx_fraud is neither 0 nor 1",
    "conflicting_duplicate": "same transaction_id, other content",
    "out_of_range": "id or day far outside the bulk of the file",
}

#: Rules that correct a row and keep it, in words; each is a key of a report's ``counts``.
FIX_RULES = {
    "hour_24": "24:00:00 set to 00:00:00 of the next day",
    "wrong_seconds": "tx_time_seconds computed again",
    "wrong_days": "tx_time_days computed again",
    "unknown_terminal": "terminal unknown, set to NULL",
    "unknown_customer": "customer unknown, set to NULL",
    "respelled_id": "id read as the integer that it stands for",
}


def version_of(report: Mapping[str, Any]) -> str:
    """Version of a cleaned partition by its report: what its rows depend on."""
    limit = report.get("out_of_range")
    made_with = report["epoch"] if limit is None else "{} out_of_range={}".format(report["epoch"], float(limit))
    return "{}/{}/{}".format(report.get("schema_version", SCHEMA_VERSION), made_with, report["raw"]["fingerprint"])


def ddl(columns: Iterable[tuple[str, str, str]]) -> str:
    """Spark DDL string of a table of (name, type, ...) tuples."""
    return ", ".join(f"{column[0]} {column[1]}" for column in columns)
