"""A Dagster instance shared by all ticks of the sensors that run often."""

import threading

import dagster as dg

#: The open instance with the reference it was opened from; see `shared_instance`.
_cache: list[tuple[object, dg.DagsterInstance]] = []
_lock = threading.Lock()


def shared_instance(context: dg.SensorEvaluationContext) -> dg.DagsterInstance:
    """Return an instance that stays open across the ticks of this code server.

    `context.instance` is opened anew by each tick. With SQLite, each opening makes alembic load its scripts, which
    registers an exit handler and so leaks memory until the process ends.
    """
    ref = context.instance_ref
    if ref is None:  # in tests, the context has an instance of its own
        return context.instance
    with _lock:  # sensors tick in threads
        instance = next((instance for opened_from, instance in _cache if opened_from == ref), None)
        if instance is None:
            instance = dg.DagsterInstance.from_ref(ref)
            _cache[:] = [(ref, instance)]
    return instance
