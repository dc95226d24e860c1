"""Helpers shared by assets and checks: outcomes and check results per partition, table schemas."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from ml_platform.escaping import markdown, printable, shorten_list
from ml_platform.lake.partitions import PARTITIONS_TAG, partitions_tags, raw_files
from ml_platform.lake.reports import ReportT

OWNERS = ["team:ml-platform"]

#: Name of the step that fails the runs in which files were stopped or could not be cleaned.
INTAKE_CHECKS = "intake_checks"


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


def record_partitions(context: dg.AssetExecutionContext) -> Sequence[str]:
    """Record the run's partitions in a tag, once, and warn of those that its range leaves out. Returns the partitions:
    Dagster queries its database each time that it is asked for them.

    Raises dagster.Failure if the run has no partition.
    """
    keys = context.partition_keys
    if not keys:
        raise dg.Failure("the range of partitions is empty or backwards: nothing was done", allow_retries=False)
    run = context.instance.get_run_by_id(context.run.run_id)
    if run is not None and PARTITIONS_TAG in run.tags:  # an earlier step has done so
        return keys
    context.instance.add_run_tags(context.run.run_id, partitions_tags(keys))
    if len(keys) > 1:
        registered = context.instance.get_dynamic_partitions(str(raw_files.name))
        if between := sorted({key for key in registered if min(keys) < key < max(keys)} - set(keys)):
            context.log.warning(
                f"not part of this run, though their names lie in its range: {shorten_list(between)}. They were "
                "registered later; ml-platform sync puts the partitions in order"
            )
    return keys


def record_outcomes(
    context: dg.AssetExecutionContext,
    *,
    succeeded: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
    left_out: Mapping[str, str] | None = None,
) -> Iterator[dg.MaterializeResult]:
    """Record one outcome per partition at the end of an asset's step. Yields nothing if no partition of the run exists.

    Args:
        succeeded: metadata of each partition that now exists. Partitions outside the run (rebuilt because
            their inputs changed) get a separate materialization.
        failed: reason for each partition that failed.
        left_out: reason for each partition that the run goes on without: the intake checks fail it at its end, and
            if they are not part of the run, it fails here.

    Raises:
        dagster.Failure: some partitions failed. The others are recorded as materialized first, so that Dagster
            shows exactly which partitions exist.
    """
    if left_out and not context.job_def.has_node_named(INTAKE_CHECKS):
        failed = {**failed, **left_out}
    keys = context.partition_keys
    done = [key for key in keys if key in succeeded]
    for key, metadata in succeeded.items():
        if key in done and not failed:
            context.add_asset_metadata(metadata=metadata, partition_key=key)
        else:
            context.log_event(dg.AssetMaterialization(context.asset_key, metadata=metadata, partition=key))
    if failed:
        reasons = printable(listed(failed))
        raise dg.Failure(
            f"{len(failed)} of {len(succeeded) + len(failed)} partitions of {context.asset_key.to_user_string()} "
            f"failed ({len(succeeded)} succeeded): {reasons}",
            metadata={"failed_partitions": dg.JsonMetadataValue(dict(failed))},
            allow_retries=False,
        )
    if len(done) < len(keys):
        materialize_only(context, done)
    if done:
        yield dg.MaterializeResult()


def listed(reasons: Mapping[str, str]) -> str:
    """Partitions with their reasons, in one line."""
    return "; ".join(f"{key}: {reason}" for key, reason in reasons.items())


def materialize_only(context: dg.AssetExecutionContext, keys: Sequence[str]) -> None:
    """Make Dagster record only some of the run's partitions as materialized when the step ends.

    Dagster records all partitions of a step that succeeds, and skips what depends on one that fails; users have asked
    for more (dagster issues 17836 and 15666). This goes through a private attribute, and a test fails when it stops
    working.
    """
    from dagster._core.definitions.partitions.subset import DefaultPartitionsSubset

    step = context.op_execution_context._step_execution_context
    create = step.get_output_context

    def with_some_partitions(*args: Any, **kwargs: Any) -> Any:
        output = create(*args, **kwargs)
        if output.has_asset_partitions:
            output._asset_partitions_subset = DefaultPartitionsSubset(set(keys))
        return output

    step.get_output_context = with_some_partitions  # type: ignore[method-assign]


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
    warning_of: Callable[[str], str | None] = lambda key: None,
    finding_of: Callable[[str], str | None] = lambda key: None,
) -> dg.AssetCheckResult:
    """Check every partition of the run; `warning_of` has problems of severity WARN, `finding_of` what is good.

    Dagster takes a single result from a check over a partition range. To show each partition's result in the UI, with
    the figures from `measure`, they are logged one by one. The single result, which the UI shows first, lists the
    problems, and has the findings and figures of the last partition.
    """
    problems: dict[str, str] = {}
    keys = context.partition_keys
    worst = dg.AssetCheckSeverity.WARN
    for key in keys:
        problem, level = problem_of(key), severity
        if problem is None:
            problem, level = warning_of(key), dg.AssetCheckSeverity.WARN
        if problem is not None:
            problems[key] = problem
            context.log.warning(f"{check.name}: {printable(key)}: {printable(problem)}")
            worst = dg.AssetCheckSeverity.ERROR if dg.AssetCheckSeverity.ERROR in (worst, level) else worst
        evaluation = dg.AssetCheckEvaluation(
            asset_key=check.asset_key,
            check_name=check.name,
            passed=problem is None,
            severity=level if problem else severity,
            description=markdown(problem or finding_of(key) or "") or None,
            metadata=dict(measure(key)),
            partition=key,
        )
        # log_event accepts evaluations, although its annotation omits them.
        context.op_execution_context.log_event(evaluation)  # type: ignore[arg-type]
    return dg.AssetCheckResult(
        asset_key=check.asset_key,
        check_name=check.name,
        passed=not problems,
        severity=worst if problems else severity,
        description=markdown(listed(problems) or finding_of(keys[-1]) or "") or None,
        metadata={
            "partitions": f"{len(keys)}, {keys[0]} to {keys[-1]}" if len(keys) > 1 else keys[0],
            **({"problems": dg.JsonMetadataValue(problems)} if problems else {}),
            **measure(keys[-1]),
        },
    )


def rounded(value: float | int | None) -> float | int | None:
    """A figure as people read it: four decimals."""
    return round(value, 4) if isinstance(value, float) else value
