"""Command ``ml-platform demo``: the platform on simulated files, from an empty directory to the first alerts."""

from __future__ import annotations

from collections.abc import Iterator

from ml_platform.cli.context import CommandError, lake_of, mlflow_of, say
from ml_platform.cli.data import process_new_files, simulate
from ml_platform.settings import Settings, load_settings

#: Files that the first champion is trained on. It scores the next one.
FIRST_FILES = 3

#: Alerts in the summary.
ALERTS_SHOWN = 3

#: Settings that name places of the user's own, where simulated files do not belong.
PLACES = ("deployment", "raw_uri", "lake_uri", "mlflow_tracking_uri", "artifacts_uri")


def demo() -> None:
    """Simulate three months of transactions, train a first model, and let it score a fourth month.

    Writes to ./data and DAGSTER_HOME only.
    """
    from ml_platform.spark.engine import shared_session

    settings = load_settings()
    if own := [str(Settings.model_fields[name].alias) for name in PLACES if name in settings.model_fields_set]:
        raise CommandError(
            f"the demo uses ./data only; other places are set by {', '.join(own)}: unset them (also in .env), or use "
            "ml-platform simulate and ml-platform process-new-files"
        )
    with shared_session():
        say("Three months of transactions arrive", "bold")
        simulate(files=FIRST_FILES)
        process_new_files()
        say("A fourth month arrives", "bold")
        simulate(files=1, first_file=FIRST_FILES)
        process_new_files()
    say("Results", "bold")
    for line in _results(settings):
        say(line)


def _results(settings: Settings) -> Iterator[str]:
    """A dozen lines: rows, model, alerts, and the next steps."""
    from ml_platform.lake.reports import CleanedReport, ScoredReport, TrainingReport
    from ml_platform.model.card import quality_in_words
    from spark_jobs.schema import REPORT_NAME

    lake = lake_of(settings)
    counts = [report.counts for report in lake.reports(CleanedReport).values()]
    raw, clean, duplicates, rejected = (
        sum(getattr(count, name) for count in counts)
        for name in ("raw_rows", "clean_rows", "duplicate_rows", "rejected_rows")
    )
    yield f"Rows: {raw:,} raw = {clean:,} clean + {duplicates:,} duplicate + {rejected:,} rejected, with their reasons"
    champion = mlflow_of(settings).champion()
    if champion is not None:
        directory = lake.model_path(champion.tags["cutoff"], champion.tags["dagster.run_id"])
        report = TrainingReport.model_validate(lake.read_json(f"{directory}/{REPORT_NAME}"))
        yield f"Champion: version {champion.version}, trained up to {report.windows['train'].last_date}"
        yield f"  {quality_in_words(report)}"
    scored = {key: report for key, report in sorted(lake.reports(ScoredReport).items()) if report.outcome == "scored"}
    for key, found in list(scored.items())[-1:]:
        yield (
            f"Scores: {found.counts.rows:,} rows of {key} by version {found.model_version}, {found.counts.alerts:,} of "
            "them alerts, for instance:"
        )
        for alert in found.alerts[:ALERTS_SHOWN]:
            reasons = "; ".join(filter(None, (alert.get(f"reason_{number}") for number in (1, 2))))
            yield f"  {alert['tx_datetime']}, amount {alert['tx_amount']:,.2f}, score {alert['score']:.3f}: {reasons}"
        yield f"Next: ml-platform alerts {key} lists more; ml-platform summary shows the files and the champion"
    yield "      make dev opens the UIs of Dagster (http://localhost:3000) and MLflow (http://localhost:5000)"
    yield "      README.md, “Use your own data”, says how to go on"
