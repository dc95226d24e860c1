"""Dagster's storage, opened once for the sensors that tick often."""

import threading

import dagster as dg

#: Dagster's storage as it is open, after what it was opened by; see `lasting_instance`.
_opened: list[tuple[object, dg.DagsterInstance]] = []
_opening = threading.Lock()


def lasting_instance(context: dg.SensorEvaluationContext) -> dg.DagsterInstance:
    """Dagster's storage, opened once for all ticks of the code server that often tick.

    Each tick opens `context.instance` anew. With SQLite, Dagster then has alembic look for its scripts, which each time
    registers something to be done at the end of the process: memory that only its end gives back.
    """
    ref = context.instance_ref
    if ref is None:  # a test brings its own
        return context.instance
    with _opening:  # sensors tick in threads
        found = next((instance for opened_by, instance in _opened if opened_by == ref), None)
        if found is None:
            found = dg.DagsterInstance.from_ref(ref)
            _opened[:] = [(ref, found)]
    return found
