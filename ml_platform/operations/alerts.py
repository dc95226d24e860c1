"""Alerts: report every change to each destination, exactly once as far as its answers arrive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from ml_platform.operations.changes import ChangeReader, Position
from ml_platform.operations.destinations import AlertError, Destination
from ml_platform.settings import SettingsError


@dataclass(frozen=True)
class Delivery:
    """Result of the alerts of one tick: sent messages, failures, and the cursor with each destination's position."""

    done: list[str]
    failures: list[str]
    cursor: str


def deliver_alerts(reader: ChangeReader, destinations: Sequence[Destination], cursor: str | None) -> Delivery:
    """Send each destination one message about what changed since the `cursor`, if anything did.

    Dagster's run failure sensors consider a run reported even if the report raised. This function keeps a position per
    destination, and the next tick continues from there.

    Raises AlertError if a delivery failed and the cursor has not changed.
    """
    positions = _parse_cursor(cursor)
    done, failures = [], []
    for destination in destinations:
        name = destination.name
        # A new destination starts with future changes.
        positions[name] = Position.parse(positions.get(name), reader.newest)
        try:
            position = deepcopy(positions[name])
            if message := reader.read(position):
                destination.send(message)
                done.append(f"{name}: {message.summary}")
            positions[name] = position
        except Exception as error:
            # Catch everything: one destination's failure must not repeat the other's messages.
            is_safe = isinstance(error, (AlertError, SettingsError))  # other messages may contain secrets
            failures.append(f"{name}: {error}" if is_safe else f"{name}: {type(error).__name__}")
    # Those of destinations that are not there now stay: a file may be unreadable for a while.
    content = {name: value.as_json() if isinstance(value, Position) else value for name, value in positions.items()}
    new_cursor = json.dumps(content, sort_keys=True, separators=(",", ":"))
    if failures and new_cursor == cursor:
        raise AlertError(f"{'; '.join(failures)}. The next tick will try again.")
    return Delivery(done, failures, new_cursor)


def _parse_cursor(cursor: str | None) -> dict[str, Any]:
    try:
        positions = json.loads(cursor or "{}")
    except ValueError:
        return {}
    return positions if isinstance(positions, dict) else {}
