"""Drift (placeholder until the branch lands)."""

from __future__ import annotations

from typing import Any


def bin_counts(columns: dict[str, Any], edges: dict[str, list[float]]) -> dict[str, list[int]]:
    """Rows in each bin."""
    import numpy as np

    return {
        name: np.bincount(np.searchsorted(limits, columns[name], side="right"), minlength=len(limits) + 1).tolist()
        for name, limits in edges.items()
    }
