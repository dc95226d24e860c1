"""Helpers shared by assets and checks: outcomes and check results per partition, table schemas."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from ml_platform.escaping import markdown, printable
from ml_platform.lake.reports import ReportT

OWNERS = ["team:ml-platform"]


def table_schema(columns: Iterable[tuple[str, str, str]], *, never_null: Iterable[str] = ()) -> dg.TableSchema:
    """Dagster table schema from (name, Spark type, description) tuples."""
    required = set(never_null)
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                name,
                type=kind,
                description=text,
                constraints=dg.TableColumnConstraints(nullable=name not in required),
            )
            for name, kind, text in columns
        ]
    )


def record_outcomes(
    context: dg.AssetExecutionContext,
    *,
    succeeded: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
) -> dg.MaterializeResult:
    """Record one outcome per partition at the end of an asset's step.

    Args:
        succeeded: metadata of each partition that now exists. Partitions outside the run (rebuilt because
            their inputs changed) get a separate materialization.
        failed: reason for each partition that failed.

    Raises:
        dagster.Failure: some partitions failed. The others are recorded as materialized first, so that Dagster
            shows exactly which partitions exist.
    """
    requested = set(context.partition_keys)
    for key, metadata in succeeded.items():
        if key in requested and not failed:
            context.add_asset_metadata(metadata=metadata, partition_key=key)
        else:
            context.log_event(dg.AssetMaterialization(context.asset_key, metadata=metadata, partition=key))
    if failed:
        reasons = printable("; ".join(f"{key}: {reason}" for key, reason in failed.items()))
        raise dg.Failure(
            f"{len(failed)} of {len(succeeded) + len(failed)} partitions of {context.asset_key.to_user_string()} "
            f"failed ({len(succeeded)} succeeded): {reasons}",
            metadata={"failed_partitions": dg.JsonMetadataValue(dict(failed))},
            allow_retries=False,
        )
    return dg.MaterializeResult()


def split_verdicts(
    verdicts: Mapping[str, Mapping[str, Any]], kind: type[ReportT]
) -> tuple[dict[str, ReportT], dict[str, str]]:
    """Split a job's verdicts into reports of succeeded partitions and errors of failed ones."""
    reports = {
        key: kind.model_validate(verdict["report"])
        for key, verdict in verdicts.items()
        if verdict["status"] == "succeeded"
    }
    return reports, {key: verdict["error"] for key, verdict in verdicts.items() if key not in reports}


def check_partitions(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext,
    check: dg.AssetCheckKey,
    problem_of: Callable[[str], str | None],
    measure: Callable[[str], Mapping[str, Any]] = lambda key: {},
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
) -> dg.AssetCheckResult:
    """Check every partition of the run.

    Dagster takes a single result from a check over a partition range. To show each partition's result in the UI, with
    the figures from `measure`, they are logged one by one; the single result, which may block the run, lists problems.
    """
    problems: dict[str, str] = {}
    for key in context.partition_keys:
        if problem := problem_of(key):
            problems[key] = problem
            context.log.warning(f"{check.name}: {printable(key)}: {printable(problem)}")
        evaluation = dg.AssetCheckEvaluation(
            asset_key=check.asset_key,
            check_name=check.name,
            passed=key not in problems,
            severity=severity,
            description=markdown(problem) if problem else None,
            metadata=dict(measure(key)),
            partition=key,
        )
        # log_event accepts evaluations, although its annotation omits them.
        context.op_execution_context.log_event(evaluation)  # type: ignore[arg-type]
    return dg.AssetCheckResult(
        check_name=check.name,
        passed=not problems,
        severity=severity,
        description=markdown("; ".join(f"{key}: {problem}" for key, problem in problems.items())) or None,
        metadata={"partitions_checked": len(context.partition_keys), "problems": dg.JsonMetadataValue(problems)},
    )


def shorten_list(keys: Sequence[str], limit: int = 5) -> str:
    """Join partition keys with commas, naming at most `limit` of them."""
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return printable(", ".join(keys[:limit])) + rest
