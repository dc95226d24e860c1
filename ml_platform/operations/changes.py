"""What changed in Dagster since a destination was last told.

Nothing is queued: a `Position` in Dagster's storage, with what the destination knows to be bad, is enough to find all
that it was not told. Results of checks are read when their run ends, so that a run that failed because of its checks
and these checks are one entry of a message.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import dagster as dg

from ml_platform.escaping import from_markdown, printable
from ml_platform.lake.partitions import PARTITION_TAG, RANGE_END_TAG, RANGE_START_TAG
from ml_platform.operations.messages import MAX_LISTED, Change, FailedRun, Message, instant, limited, one_line
from ml_platform.settings import ALERT_KINDS

#: Name of the sensor that sends alerts. Its own failed ticks are not reported: they mean that a destination is down.
SENSOR_NAME = "report_failed_runs"

#: The asset whose observations record moves of the alias champion.
CHAMPION_ASSET = dg.AssetKey("fraud_model")

#: Run tag with the cluster that could not be deleted at the end of the run: "name (id): error".
UNDELETED_CLUSTER_TAG = "ml_platform/undeleted_cluster"

#: Maximum number of failed steps in an alert.
MAX_STEPS = 10

#: Maximum number of bad states that a position remembers. Beyond it the oldest are forgotten: their recovery is not
#: reported, and if they are still bad when they are evaluated again, they are reported again.
MAX_BAD = 200

#: Events of one type, and ticks of one sensor, that are read at a time.
PAGE = 100

#: A tick may end this long after its start; older ones are not read again.
TICK_DURATION_S = 10 * 60
TICK_WINDOW_S = 60 * 60

#: Levels of a state; "" is good.
WARN, ERROR, CLUSTERS = "W", "E", "C"

_RUN_ENDS: tuple[Any, ...] = (
    dg.DagsterEventType.RUN_FAILURE,
    dg.DagsterEventType.RUN_SUCCESS,
    dg.DagsterEventType.RUN_CANCELED,
)
_FINISHED = ("SUCCESS", "SKIPPED")

#: Dagster's prefix of the message of a dagster.Failure.
_FAILURE_PREFIX = "dagster._core.definitions.events.Failure: "


class UndeletedClusters(Exception):
    """Orphaned clusters cannot be deleted. The first line says how many, each other line is "name (id): error"."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        lines = [f"{cluster}: {one_line(problem)}" for cluster, problem in problems.items()]
        super().__init__("\n".join([f"{len(problems)} orphaned clusters cannot be deleted:", *lines]))


def champion_changed(
    *, version: str, previous: str | None, who: str, why: str, figures: Mapping[str, str]
) -> dg.AssetObservation:
    """The event that records a move of the alias champion. Whoever moves it records it in Dagster: alerts read it."""
    metadata = {"champion_version": version, "champion_before": previous or "none", "by": who, "why": why, **figures}
    return dg.AssetObservation(
        CHAMPION_ASSET, metadata={name: dg.MetadataValue.text(printable(text)) for name, text in metadata.items()}
    )


@dataclass
class Position:
    """What a destination was told.

    Attributes:
        event: id of the last event that was read.
        others_from: up to this event only failed runs are reported (positions of earlier versions know nothing else).
        bad: levels of what was last reported as bad, by hashed name.
        ticks_from: ticks that started before this time are not reported.
        ticks: (id, start) of the last tick that was read, by hashed name, of sensors that failed.
    """

    event: int
    ticks_from: float
    others_from: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    ticks: dict[str, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any, newest: int) -> Position:
        """Read a position from a cursor. What it does not say starts now; event ids restart if all runs are deleted."""
        now = time.time()
        if type(value) is int:
            return cls(min(value, newest), now, others_from=newest)
        try:
            return cls(
                event=min(int(value["event"]), newest),
                ticks_from=float(value["ticks_from"]),
                others_from=int(value.get("others_from", 0)),
                bad={str(key): str(level) for key, level in value.get("bad", {}).items()},
                ticks={str(key): (int(tick), float(start)) for key, (tick, start) in value.get("ticks", {}).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            return cls(newest, now)

    def as_json(self) -> dict[str, Any]:
        """The position for a cursor, as short as it can be: Dagster keeps a copy with each tick."""
        content: dict[str, Any] = {"event": self.event, "ticks_from": int(self.ticks_from)}
        if self.others_from > self.event:
            content["others_from"] = self.others_from
        if self.bad:
            content["bad"] = self.bad
        if self.ticks:
            content["ticks"] = {key: [tick, int(start)] for key, (tick, start) in self.ticks.items()}
        return content

    def set(self, key: str, level: str) -> str | None:
        """Record a state; returns the level before if it differs."""
        before = self.bad.pop(key, "")
        if level:
            self.bad[key] = level
            for oldest in list(self.bad)[:-MAX_BAD]:
                del self.bad[oldest]
        return before if before != level else None


def _hashed(kind: str, name: str) -> str:
    return kind[:2] + hashlib.sha256(name.encode()).hexdigest()[:8]


class ChangeReader:
    """Reads changes for the destinations of one tick, which share what was read.

    Args:
        per_partition: checks whose partitions each have a state of their own. All others have one state, that of
            their newest result.
    """

    def __init__(
        self,
        instance: dg.DagsterInstance,
        *,
        ui_url: str | None = None,
        kinds: Collection[str] = ALERT_KINDS,
        per_partition: Collection[dg.AssetCheckKey] = (),
    ) -> None:
        self._instance, self._ui_url, self._kinds = instance, ui_url and ui_url.rstrip("/"), kinds
        self._per_partition = per_partition
        # No query looks beyond it, so that an event that is stored between two queries is left to the next tick.
        self.newest = instance.event_log_storage.get_maximum_record_id() or 0
        self._events = cache(self._read_events)
        self._instigators = cache(instance.all_instigator_state)
        self._ticks = cache(self._read_ticks)

    def read(self, position: Position) -> Message:
        """The next message for a destination, empty if there is nothing to report. Moves its position."""
        message = Message()
        for record in self._new_events(position):
            self._add_event(record, position, message)
            position.event = record.storage_id
            if message.is_full:
                break
        if {"ticks", "clusters"} & {*self._kinds}:
            self._add_ticks(position, message)
        return message

    # events

    def _new_events(self, position: Position) -> Iterator[dg.EventLogRecord]:
        while events := self._events(position.event):
            yield from events

    def _read_events(self, after: int) -> list[dg.EventLogRecord]:
        """Next events of all kinds, in order."""
        before, pages = self.newest + 1, []
        if after >= self.newest:
            return []
        for event_type in _RUN_ENDS:
            ends = dg.RunStatusChangeRecordsFilter(event_type, after_storage_id=after, before_storage_id=before)
            pages.append(self._instance.fetch_run_status_changes(ends, limit=PAGE, ascending=True).records)
        moves = dg.AssetRecordsFilter(CHAMPION_ASSET, after_storage_id=after, before_storage_id=before)
        pages.append(self._instance.fetch_observations(moves, limit=PAGE, ascending=True).records)
        # The instance's own method for any type of event is deprecated, without one to replace it for this type.
        changes = dg.EventRecordsFilter(
            dg.DagsterEventType.FRESHNESS_STATE_CHANGE, after_cursor=after, before_cursor=before
        )
        pages.append(self._instance.event_log_storage.get_event_records(changes, limit=PAGE, ascending=True))
        # Beyond the last event of a full page there may be more of its type.
        end = min((page[-1].storage_id for page in pages if len(page) == PAGE), default=before)
        records = (record for page in pages for record in page if record.storage_id <= end)
        return sorted(records, key=lambda record: record.storage_id)

    def _add_event(self, record: dg.EventLogRecord, position: Position, message: Message) -> None:
        entry = record.event_log_entry
        event, is_old = entry.dagster_event, record.storage_id <= position.others_from
        if event is None:
            return
        if event.event_type in _RUN_ENDS:
            self._add_run(entry, position, message, only_failures=is_old)
        elif is_old:
            return
        elif event.event_type == dg.DagsterEventType.FRESHNESS_STATE_CHANGE and "freshness" in self._kinds:
            _add_freshness(event.event_specific_data, position, message)
        elif event.event_type == dg.DagsterEventType.ASSET_OBSERVATION and "champion" in self._kinds:
            observation = entry.asset_observation
            if observation and "champion_version" in observation.metadata:
                message.changes.append(_champion_change(observation, instant(entry.timestamp)))

    def _add_run(
        self, entry: dg.EventLogEntry, position: Position, message: Message, *, only_failures: bool = False
    ) -> None:
        """Report a run that has ended, if it failed, and what its checks say. Deleted runs are skipped."""
        run = self._instance.get_run_by_id(entry.run_id)
        is_failure = entry.dagster_event_type == dg.DagsterEventType.RUN_FAILURE
        report_run, report_checks = is_failure and "runs" in self._kinds, "checks" in self._kinds and not only_failures
        if run is None or not (report_run or report_checks or "clusters" in self._kinds):
            return
        results = self._check_results(run.run_id) if report_run or report_checks else {}
        steps = failed_steps(self._instance, run.run_id) if report_run else []
        stopped = {
            key: result
            for key, result in results.items()
            if key[1] is not None and result.level == ERROR and result.step in dict(steps)
        }
        if report_run:
            message.runs.append(_failed_run(entry, run, steps, stopped, self._run_url(run.run_id)))
        if report_checks:
            # A failed run lists what stopped it: this is known then, and no further change.
            for key in stopped:
                position.set(_check_id(*key), ERROR)
            message.changes += _check_changes(results, position, instant(entry.timestamp), self._run_url(run.run_id))
        if "clusters" in self._kinds and not only_failures and (problem := run.tags.get(UNDELETED_CLUSTER_TAG)):
            _add_cluster(problem, position, message, instant(entry.timestamp), self._run_url(run.run_id))

    def _check_results(self, run_id: str) -> dict[tuple[dg.AssetCheckKey, str | None], CheckResult]:
        """Results of a run's checks by (check, partition); the partition is None for checks with one state."""
        results: dict[tuple[dg.AssetCheckKey, str | None], CheckResult] = {}
        events = self._instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        for record in events.records:
            event = record.event_log_entry.dagster_event
            if event is None:
                continue
            evaluation = event.asset_check_evaluation_data
            check, partition = evaluation.asset_check_key, evaluation.partition
            if check not in self._per_partition:
                partition = None
            elif partition is None:  # the check's result for a range of partitions; those of the partitions tell more
                continue
            severity = ERROR if evaluation.severity == dg.AssetCheckSeverity.ERROR else WARN
            result = CheckResult("" if evaluation.passed else severity, evaluation.description or "", event.step_key)
            before = results.get((check, partition))
            # Of equal results of a partition the first is its own, the second may be that of the whole run.
            if before is None or partition is None or before.level != result.level:
                results[check, partition] = result
        return results

    def _run_url(self, run_id: str) -> str | None:
        return f"{self._ui_url}/runs/{run_id}" if self._ui_url else None

    # ticks

    def _read_ticks(self, origin: str, selector: str, after: float, failed: bool) -> list[Any]:
        from dagster._core.scheduler.instigation import TickStatus

        statuses = [TickStatus.FAILURE] if failed else [TickStatus[name] for name in _FINISHED]
        return [*self._instance.get_ticks(origin, selector, after=after, limit=PAGE, statuses=statuses)]

    def _add_ticks(self, position: Position, message: Message) -> None:
        """Report sensors and schedules that fail or work again.

        Of more than `PAGE` ticks of a sensor since the last message, the newest count.
        """
        for instigator in self._instigators():
            key = _hashed("ticks", instigator.selector_id)
            last, start = position.ticks.get(key, (0, position.ticks_from))
            where = (instigator.instigator_origin_id, instigator.selector_id, start - 1)
            ticks = [tick for tick in self._ticks(*where, True) if tick.tick_id > last]
            if instigator.name == SENSOR_NAME or not (ticks or key in position.bad):
                continue
            ticks += [tick for tick in self._ticks(*where, False) if tick.tick_id > last]
            for tick in sorted(ticks, key=lambda tick: tick.tick_id):
                if message.is_full:
                    return
                self._add_tick(instigator, tick.tick_data, key, position, message)
                position.ticks[key] = (tick.tick_id, tick.timestamp)
        now = time.time()
        if position.ticks_from < now - TICK_DURATION_S - TICK_WINDOW_S:
            position.ticks_from = now - TICK_DURATION_S
        position.ticks = {
            key: (tick, start)
            for key, (tick, start) in position.ticks.items()
            if key in position.bad or start >= position.ticks_from
        }

    def _add_tick(self, instigator: Any, tick: Any, key: str, position: Position, message: Message) -> None:
        what, at = f"{instigator.instigator_type.value.lower()} {instigator.name}", instant(tick.timestamp)
        error = _original_error(tick.error) if tick.error else None
        if error and error.cls_name == UndeletedClusters.__name__:
            position.set(key, CLUSTERS)
            if "clusters" in self._kinds:
                for problem in error.message.splitlines()[1:]:
                    _add_cluster(problem, position, message, at)
            return
        before = position.set(key, ERROR if tick.status.value == "FAILURE" else "")
        if before == CLUSTERS and not error:
            for cluster in [name for name in position.bad if name.startswith("cl")]:
                del position.bad[cluster]
            if "clusters" in self._kinds:
                message.changes.append(Change("clusters", "good", "clusters can be deleted again", [], at))
        elif before is not None and "ticks" in self._kinds:
            if tick.status.value == "FAILURE":
                lines = [error_line(tick.error)]
                message.changes.append(Change("ticks", "bad", f"the {what} fails", lines, at))
            else:
                message.changes.append(Change("ticks", "good", f"the {what} works again", [], at))


@dataclass(frozen=True)
class CheckResult:
    """Result of a check: its level, its description (Markdown), and the step that it comes from."""

    level: str
    description: str
    step: str | None


def failed_steps(instance: dg.DagsterInstance, run_id: str) -> list[tuple[str, str]]:
    """The failed steps of a run, at most MAX_STEPS, each with the first line of its error."""
    steps = []
    records = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.STEP_FAILURE, limit=MAX_STEPS)
    for record in records.records:
        if step := record.event_log_entry.dagster_event:
            steps.append((step.step_key or "?", error_line(step.step_failure_data.error)))
    return steps


def _original_error(error: Any) -> Any:
    """The error that Dagster wrapped in others."""
    while error.cause is not None:
        error = error.cause
    return error


def error_line(error: Any) -> str:
    """First line of the message of an error in an event, without what Dagster wrapped around it."""
    if error is None:
        return "no error recorded"
    error = _original_error(error)
    return one_line(error.message.removeprefix(_FAILURE_PREFIX)) or one_line(error.cls_name or "")


def _failed_run(
    entry: dg.EventLogEntry,
    run: dg.DagsterRun,
    steps: list[tuple[str, str]],
    stopped: Mapping[tuple[dg.AssetCheckKey, str | None], CheckResult],
    url: str | None,
) -> FailedRun:
    """Describe a failed run, given its failure event and the results of the checks that failed it."""
    start, end = run.tags.get(RANGE_START_TAG), run.tags.get(RANGE_END_TAG)
    partitions = run.tags.get(PARTITION_TAG) or (f"{start} to {end}" if start and start != end else start or "none")
    reasons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (check, partition), result in stopped.items():
        reasons[str(partition)][_plain(result.description)].append(check.name)
    listed = {
        one_line(partition): one_line("; ".join(f"{', '.join(checks)}: {why}" for why, checks in by_reason.items()))
        for partition, by_reason in list(reasons.items())[:MAX_LISTED]
    }
    return FailedRun(
        run_id=run.run_id,
        job=run.job_name,
        partitions=one_line(partitions),
        failed_at=instant(entry.timestamp),
        reason=one_line((entry.dagster_event and entry.dagster_event.message) or ""),
        steps=steps,
        url=url,
        stopped=listed,
        stopped_count=len(reasons),
    )


def _plain(description: str) -> str:
    return one_line(from_markdown(description)) or "no reason given"


def _check_id(check: dg.AssetCheckKey, partition: str | None) -> str:
    return _hashed("checks", f"{check.to_user_string()} {partition or ''}")


def _check_changes(
    results: Mapping[tuple[dg.AssetCheckKey, str | None], CheckResult], position: Position, at: str, url: str | None
) -> Iterator[Change]:
    """Changes of checks in a run, one for all partitions of a check that changed in the same way."""
    groups: dict[tuple[dg.AssetCheckKey, str], dict[str | None, CheckResult]] = defaultdict(dict)
    for (check, partition), result in results.items():
        if position.set(_check_id(check, partition), result.level) is not None:
            groups[check, result.level][partition] = result
    for (check, level), changed in groups.items():
        verb = {ERROR: "failed", WARN: "has a warning", "": "passes again"}[level]
        title = f"check {check.name} of {check.asset_key.to_user_string()} {verb}"
        partitions = [one_line(partition) for partition in changed if partition is not None]
        if partitions:
            title += f" for {partitions[0] if len(partitions) == 1 else f'{len(partitions)} partitions'}"
        lines = [
            (f"{one_line(partition)}: " if partition else "") + _plain(result.description)
            if level
            else one_line(partition or "")
            for partition, result in changed.items()
        ]
        yield Change("checks", "bad" if level else "good", title, limited([*filter(None, lines)]), at, url)


def _add_freshness(change: Any, position: Position, message: Message) -> None:
    asset, state = change.key.to_user_string(), change.new_state.value
    key, at = _hashed("freshness", asset), instant(change.state_change_timestamp)
    if state not in ("PASS", "WARN", "FAIL"):  # the asset was wiped, or has no policy any more
        position.set(key, "")
    elif position.set(key, {"PASS": "", "WARN": WARN, "FAIL": ERROR}[state]) is not None:
        title = f"{asset} is fresh again" if state == "PASS" else f"{asset} is late (freshness {state})"
        message.changes.append(Change("freshness", "good" if state == "PASS" else "bad", title, [], at))


def _champion_change(observation: dg.AssetObservation, at: str) -> Change:
    values = {name: one_line(str(value.value)) for name, value in observation.metadata.items()}
    version, before = values.pop("champion_version"), values.pop("champion_before", "none")
    title = (
        f"the champion is version {version} ({f'before: version {before}' if before != 'none' else 'the first one'})"
    )
    return Change("champion", "new", title, [f"{name}: {value}" for name, value in values.items()], at)


def _add_cluster(problem: str, position: Position, message: Message, at: str, url: str | None = None) -> None:
    """Report a cluster that cannot be deleted, given as "name (id): error", once."""
    cluster, _, error = one_line(problem).partition(": ")
    if position.set(_hashed("clusters", cluster), ERROR) is not None:
        lines = [error, "it may cost money; see ml-platform clusters list"]
        message.changes.append(Change("clusters", "bad", f"cluster {cluster} cannot be deleted", lines, at, url))
