"""Commands for raw files and the lake: simulate, sync, process-new-files, rejects, withdraw, summary, migrate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ml_platform.cli.champion import champion_facts, print_champion, print_champion_problem
from ml_platform.cli.context import (
    AsJson,
    CommandError,
    Partition,
    console,
    dagster_instance,
    lake_of,
    mlflow_of,
    plain,
    print_json,
    say,
    warn,
)
from ml_platform.settings import load_settings

if TYPE_CHECKING:
    import dagster as dg
    from rich.status import Status

    from ml_platform.lake.resource import LakeResource, RawFile


def simulate(
    files: Annotated[int, typer.Option(min=1, help="Number of raw files.")] = 3,
    first_file: Annotated[int, typer.Option(min=0, help="Index of the first file; earlier files are skipped.")] = 0,
    days_per_file: Annotated[int, typer.Option(min=1, help="Days per file.")] = 30,
    customers: Annotated[int, typer.Option(min=1, help="Number of customers.")] = 2_500,
    terminals: Annotated[int, typer.Option(min=1, help="Number of terminals.")] = 5_000,
    fault_rate: Annotated[
        float, typer.Option(min=0, max=1000, help="Fault rate as a multiple of the real files' rate; 0 for none.")
    ] = 50.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed; the same seed produces the same files.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Overwrite existing files.")] = False,
) -> None:
    """Simulate raw files, including faults, by a published method, in ML_PLATFORM_RAW_URI."""
    from ml_platform.dev.simulator import Simulation
    from ml_platform.lake.storage import open_store

    settings = load_settings()
    try:
        simulation = Simulation(
            start=settings.epoch,
            days_per_file=days_per_file,
            customers=customers,
            terminals=terminals,
            fault_rate=fault_rate,
            seed=seed,
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    store = open_store(settings.raw_uri)
    existing = {file.name for file in store.list_directory()}
    store.delete_leftovers()
    table = Table(
        "file", "rows", "frauds", "faulty or rejected", "MB", title=escape(f"Raw files in {settings.raw_uri}")
    )
    for index in range(first_file, first_file + files):
        name = simulation.file_name(index)
        if name in existing and not overwrite:
            table.add_row(name, "kept as it is", "", "", "")
            continue
        with console.status(f"simulating {name} …") as status, store.open_new(name) as out:

            def show(rows: int, name: str = name, status: Status = status) -> None:
                status.update(f"simulating {name}: {rows:,} rows")

            truth = simulation.write_file(index, out, progress=show)
        counts = truth.counts
        faulty = counts["rejected_rows"] + counts["duplicate_rows"]
        faulty += sum(counts[rule] for rule in ("hour_24", "wrong_seconds", "unknown_terminal", "unknown_customer"))
        size = f"{truth.size_bytes / 1e6:.1f}"
        table.add_row(name, f"{counts['raw_rows']:,}", f"{counts['fraud_rows']:,}", f"{faulty:,}", size)
    console.print(table)


def _warn_of_ignored_files(ignored: Mapping[str, str]) -> None:
    for name, reason in ignored.items():
        warn(f"ignored {name!r}: {reason}")


def sync() -> None:
    """Register the raw files as partitions, so that Dagster's commands and UI show them."""
    from ml_platform.assets.raw import raw_file_observation
    from ml_platform.lake.partitions import raw_files
    from ml_platform.planning import sort_partitions

    settings = load_settings()
    lake = lake_of(settings)
    files, ignored = lake.list_raw_files()
    _warn_of_ignored_files(ignored)
    withdrawn = set(lake.withdrawn())
    with dagster_instance(settings) as instance:
        registered = set(instance.get_dynamic_partitions(str(raw_files.name)))
        new = [key for key in files if key not in registered and key not in withdrawn]
        instance.add_dynamic_partitions(str(raw_files.name), new)
        for key in new:
            instance.report_runless_asset_event(raw_file_observation(files[key]))
        order = sort_partitions(instance, lake)
    say(f"{len(files)} raw files in {settings.raw_uri}, {len(new)} newly registered, {len(ignored)} ignored; {order}")


def process_new_files(
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the run's log instead of its progress.")] = False,
) -> None:
    """Run now, in this process, what the sensor new_raw_files would start: one run per range of new files."""
    settings = load_settings()
    with dagster_instance(settings) as instance:
        from ml_platform.cli.progress import execute_with_display
        from ml_platform.definitions import defs
        from ml_platform.jobs import ASSETS
        from ml_platform.lake.partitions import range_tags
        from ml_platform.operations.changes import failed_steps
        from ml_platform.planning import active_runs, plan_runs, prepare

        plan = plan_runs(instance, lake_of(settings))
        _warn_of_ignored_files(plan.ignored)
        prepare(instance, plan)
        say(plan.reason)
        job = defs.resolve_job_def("process_new_files")
        failed = []
        for start, end in plan.ranges:
            # A run also rebuilds stale features of other partitions than its own.
            if active := [run.run_id for run in active_runs(instance)]:
                raise CommandError(
                    f"{', '.join(active)} may write the same partitions: wait for it, or terminate it in Dagster's UI"
                )
            say(f"processing {start} to {end}" if start != end else f"processing {start}", "bold")
            options: dict[str, Any] = {
                "tags": range_tags(start, end),
                "run_config": plan.run_config,
                "raise_on_error": False,
            }
            if verbose or settings.log_format == "json":
                result = job.execute_in_process(instance=instance, **options)
            else:
                output = Path(instance.root_directory) / "process-new-files.log"
                result = execute_with_display(job, instance, ASSETS, output, **options)
            if any(_is_interrupt(event) for event in result.all_events):
                raise KeyboardInterrupt
            if not result.success:
                steps = failed_steps(instance, result.run_id)
                failed.append("; ".join([result.run_id, *(f"{step}: {error}" for step, error in steps)]))
    if failed:
        raise CommandError(f"{len(failed)} of {len(plan.ranges)} runs failed: {', '.join(failed)}")


def _is_interrupt(event: dg.DagsterEvent) -> bool:
    """Dagster reports Ctrl-C and SIGTERM as a failure of the step."""
    error = event.step_failure_data.error if event.is_step_failure else None
    return error is not None and error.cls_name == "DagsterExecutionInterruptedError"


def rejects(key: Partition) -> None:
    """Count a partition's rejected rows by rule, with an example line for each rule."""
    from ml_platform.lake.reports import REJECTED_TABLE, CleanedReport
    from ml_platform.lake.storage import readable_path
    from spark_jobs.schema import REJECT_RULES

    settings = load_settings()
    lake = lake_of(settings)
    report = lake.reports(CleanedReport).get(key)
    if report is None:
        raise CommandError(f"{key!r} is not a cleaned partition of {settings.lake_uri}; ml-platform summary lists them")
    counts = report.counts.model_dump()
    table = Table("reason", "rows", "for instance", title=escape(f"Rejected rows of {key}"))
    for rule in sorted(REJECT_RULES, key=lambda rule: -counts.get(rule, 0)):
        if rows := counts.get(rule, 0):
            table.add_row(rule, f"{rows:,}", plain(report.reject_samples.get(rule, "")))
    if table.rows:
        console.print(table)
    rejected, rows = report.counts.rejected_rows, report.counts.raw_rows
    if not rejected:  # then there is no file of them either
        say(f"none of the {rows:,} rows was rejected")
        return
    path = readable_path(lake.partition_uri(REJECTED_TABLE, key))
    say(f"{rejected:,} of {rows:,} rows are rejected; all of them, with reasons: {path}")


def withdraw(
    key: Partition,
    undo: Annotated[bool, typer.Option("--undo", help="Let the next run clean the file again.")] = False,
) -> None:
    """Take a file out of the lake and keep it out, whatever its raw file holds, until --undo."""
    from ml_platform.lake.withdrawal import allow_again, withdraw_file
    from ml_platform.planning import has_active_runs

    settings = load_settings()
    lake = lake_of(settings)
    if undo:
        if not allow_again(lake, key):
            raise CommandError(f"{key!r} is not withdrawn; ml-platform summary lists withdrawn files")
        say(f"{key} is no longer withdrawn: the next run cleans it again if its raw file is there")
        return
    with dagster_instance(settings) as instance:
        if has_active_runs(instance):
            raise CommandError("runs are queued or running, and may read the file: wait for them or terminate them")
        try:
            effects = withdraw_file(lake, key)
        except ValueError as error:
            raise CommandError(str(error)) from None
    say(f"{key} is withdrawn; ml-platform withdraw --undo {key} undoes it")
    for effect in effects:
        say(f"* {effect}")


#: Row counts of a partition in the summary, by the label of their column.
COUNTS = {
    "raw rows": "raw_rows",
    "clean": "clean_rows",
    "duplicate": "duplicate_rows",
    "rejected": "rejected_rows",
    "frauds": "fraud_rows",
}


def summary(as_json: AsJson = False) -> None:
    """Show the contents of the lake and the champion."""
    settings = load_settings()
    lake = lake_of(settings)
    files, ignored = lake.list_raw_files()
    _warn_of_ignored_files(ignored)
    partitions = _partitions(lake, files)
    if as_json:
        uris = {"raw_uri": settings.raw_uri, "lake_uri": settings.lake_uri}
        print_json({**uris, "partitions": partitions, "champion": champion_facts(settings)})
        return
    table = Table("partition", *COUNTS, "state", title="Lake")
    for item in partitions:
        counts = ["" if item[name] is None else f"{item[name]:,}" for name in COUNTS.values()]
        table.add_row(item["partition"], *counts, plain(_state_in_words(item)))
    console.print(table)
    print_champion(settings)


def _partitions(lake: LakeResource, files: Mapping[str, RawFile]) -> list[dict[str, Any]]:
    """All partitions with their row counts, state, the reason of the state, and number of alerts."""
    from ml_platform.lake.quality import judge_files
    from ml_platform.lake.reports import CleanedReport, FeaturesReport, ScoredReport
    from ml_platform.run_config import run_config, run_limits

    cleaned, features = lake.reports(CleanedReport), lake.reports(FeaturesReport)
    scored, withdrawn, uncleaned = lake.reports(ScoredReport), set(lake.withdrawn()), lake.uncleaned()
    verdicts = judge_files(cleaned, features, run_limits(run_config()))
    partitions = []
    for key in sorted(files.keys() | cleaned.keys() | withdrawn):
        counts, reason, alerts = cleaned[key].counts if key in cleaned else None, None, None
        if counts is None:
            state = "withdrawn" if key in withdrawn else "not_cleaned"
            if state == "not_cleaned" and key in uncleaned:
                reason = uncleaned[key].reason
        elif stopped := verdicts.reason(key):
            state, reason = "stopped", stopped
        elif key not in features:
            state = "no_features"
        elif key not in scored:
            state = "not_scored"
        else:
            state = scored[key].outcome
            alerts = scored[key].counts.alerts if state == "scored" else None
        numbers = {name: getattr(counts, name, None) for name in COUNTS.values()}
        partitions.append({"partition": key, **numbers, "state": state, "reason": reason, "alerts": alerts})
    return partitions


def _state_in_words(item: Mapping[str, Any]) -> str:
    state, reason = item["state"], item["reason"]
    match state:
        case "not_cleaned":
            return f"not cleaned: {reason}" if reason else "not cleaned yet"
        case "stopped":
            return f"stopped by {reason}"
        case "scored":
            return f"{item['alerts']:,} alerts"
        case _:
            return str(state).replace("_", " ")


def migrate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done without doing it.")] = False,
) -> None:
    """Migrate the lake to this version after an upgrade. Safe to run again at any time."""
    from ml_platform.lake.migrations import migrate_lake
    from ml_platform.planning import has_active_runs

    settings = load_settings()
    if not dry_run:
        with dagster_instance(settings) as instance:
            if has_active_runs(instance):
                raise CommandError("runs are queued or running: wait for them or terminate them, then try again")
    table = Table("table", "partition", "schema", "", title="Partitions of an older version")
    outcomes = list(migrate_lake(lake_of(settings), dry_run=dry_run))
    for item in outcomes:
        table.add_row(item.table, plain(item.key), str(item.version), plain(item.outcome))
    if outcomes:
        console.print(table)
    else:
        say(f"{settings.lake_uri} has no data of an older version.")
    if dry_run and any(item.can_move for item in outcomes):
        say("This was a dry run; run without --dry-run to apply it.")
    print_champion_problem(mlflow_of(settings).champion())
