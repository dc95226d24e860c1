"""Commands for those who receive scores: alerts of a file, and the list of what can be read."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from ml_platform.cli.context import AsJson, CommandError, Partition, lake_of, print_json, say
from ml_platform.settings import load_settings


def alerts(
    key: Partition,
    day: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], metavar="YYYY-MM-DD", help="Only this day (UTC).")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of alerts to show, the highest scores first.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show the alerts of a partition, with the inputs that raised their scores most."""
    import io

    from pyarrow import parquet

    from ml_platform.lake.reports import ALERTS_TABLE, ScoredReport
    from ml_platform.lake.storage import readable_path
    from spark_jobs.scoring.alerts import CSV_NAME, PARQUET_NAME

    settings = load_settings()
    lake = lake_of(settings)
    report = lake.reports(ScoredReport).get(key)
    if report is None:
        raise CommandError(f"{key!r} is not a scored partition of {settings.lake_uri}; ml-platform summary lists them")
    if report.outcome != "scored":
        no_champion = (
            "there was no champion when it was processed: once there is one, run "
            f"dg launch --assets scored_transactions --partition {key}"
        )
        raise CommandError(f"{key} has no scores: {report.error or no_champion}")
    directory = lake.partition_path(ALERTS_TABLE, key)
    rows = parquet.read_table(io.BytesIO(lake.store.read(f"{directory}/{PARQUET_NAME}"))).to_pylist()
    rows = [row for row in rows if day is None or row["tx_datetime"].date() == day.date()]
    rows = sorted(rows, key=lambda row: -row["score"])[:top]
    csv = f"{readable_path(lake.partition_uri(ALERTS_TABLE, key))}/{CSV_NAME}"
    if as_json:
        alerts = [_alert(row) for row in rows]
        counts = {"model_version": report.model_version, "number_of_alerts": report.counts.alerts}
        print_json({"partition": key, **counts, "csv": csv, "alerts": alerts})
        return
    for row in rows:
        ids = [
            f"{name} {'unknown' if row[f'{name}_id'] is None else row[f'{name}_id']}"
            for name in ("customer", "terminal")
        ]
        say(
            f"{row['score']:.3f}  {row['tx_datetime']:%Y-%m-%d %H:%M:%S} UTC, transaction {row['transaction_id']}, "
            f"{', '.join(ids)}, amount {row['tx_amount']:,.2f}, number {row['rank_of_day']} of its day"
        )
        say(f"       {'; '.join(_reasons(row))}", "dim")
    say(
        f"{len(rows):,} of {report.counts.alerts:,} alerts of {key}, by model version {report.model_version}; all of "
        f"them: {csv}"
    )


def _reasons(row: dict[str, Any]) -> dict[str, float]:
    """The inputs that raised a score most, in words, each with the log-odds by which it did."""
    from spark_jobs.schema import REASONS

    pairs = [(row[f"reason_{number}"], row[f"contribution_{number}"]) for number in range(1, REASONS + 1)]
    return {reason: contribution for reason, contribution in pairs if reason}


def _alert(row: dict[str, Any]) -> dict[str, Any]:
    names = ("transaction_id", "customer_id", "terminal_id", "tx_amount", "score", "rank_of_day")
    reasons = [{"reason": reason, "contribution": value} for reason, value in _reasons(row).items()]
    return {name: row[name] for name in names} | {
        "tx_datetime": f"{row['tx_datetime']:%Y-%m-%dT%H:%M:%SZ}",
        "reasons": reasons,
    }


def scores(
    sql: Annotated[bool, typer.Option("--sql", help="Print views of scores and alerts for DuckDB instead.")] = False,
) -> None:
    """List the directories of scored partitions, complete ones only."""
    from ml_platform.lake.reports import ALERTS_TABLE, SCORED_TABLE, ScoredReport
    from ml_platform.lake.storage import readable_path

    settings = load_settings()
    lake = lake_of(settings)
    keys = sorted(key for key, report in lake.reports(ScoredReport).items() if report.outcome == "scored")
    if not keys:
        raise CommandError(f"no partition of {settings.lake_uri} has scores yet")
    if not sql:
        for key in keys:
            say(readable_path(lake.partition_uri(SCORED_TABLE, key)))
        return
    for view, table in (("scored_transactions", SCORED_TABLE), ("alerts", ALERTS_TABLE)):
        paths = [readable_path(lake.partition_uri(table, key)).replace("'", "''") for key in keys]
        files = [f"'{path}/*.parquet'" for path in paths]
        say(f"CREATE OR REPLACE VIEW {view} AS SELECT * FROM read_parquet([{', '.join(files)}]);")  # noqa: S608
