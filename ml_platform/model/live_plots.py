"""Plots of scores in service: their grades week by week, and drift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_platform.lake.reports import Grade
from ml_platform.model.plot_elements import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SKY,
    VERMILION,
    add_legend,
    as_percent,
    new_figure,
    png_of,
    set_labels,
    shorten,
    styled,
)

#: Weeks in a plot; more would be unreadable.
MAX_WEEKS = 26
MAX_DATES = 9

#: Colours of versions, in turn.
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY)


def grades_plot(grades: Sequence[Grade]) -> bytes:
    """Average precision of each week with its interval, and the held-out interval of each version, as PNG."""
    weeks = sorted({grade.week for grade in grades})[-MAX_WEEKS:]
    place = {week: number for number, week in enumerate(weeks)}
    dates = {grade.week: grade.first_date for grade in grades}
    shown = [grade for grade in grades if grade.week in place]
    figure = new_figure("Bars: 95% intervals. Bands: interval of the version's held-out week.", width=8, height=3.6)
    ax = styled(figure.subplots())
    for number, version in enumerate(sorted({grade.model_version for grade in shown})):
        colour = COLOURS[number % len(COLOURS)]
        rows = [grade for grade in shown if grade.model_version == version]
        places = [place[grade.week] for grade in rows]
        values = [math.nan if grade.average_precision is None else grade.average_precision for grade in rows]
        ax.plot(places, values, "o-", color=colour, markersize=5, linewidth=1.2, label=f"version {version}")
        for grade, where in zip(rows, places, strict=True):
            if (lower := grade.average_precision_lower) is not None and (upper := grade.average_precision_upper):
                ax.vlines(where, lower, upper, color=colour)
        if (held_out := rows[-1].held_out) is not None:
            span = [min(places) - 0.4, max(places) + 0.4]
            ax.fill_between(span, held_out.lower, held_out.upper, color=colour, alpha=0.13, linewidth=0)
    ticks = weeks[:: math.ceil(len(weeks) / MAX_DATES)]
    ax.set_xticks([place[week] for week in ticks], [dates[week] for week in ticks])
    ax.set(ylim=(0, 1.02))
    as_percent(ax.yaxis)
    set_labels(ax, "Average precision of the scores as they were given", "first day of the week", "")
    ax.axhline(0, color=GREY, linewidth=0.8)
    add_legend(ax, "lower left", columns=3)
    return png_of(figure)


def drift_plot(pictures: Sequence[Mapping[str, Any]]) -> bytes:
    """Distributions of a file beside those of the training window, one panel per picture of `drift.measure`, as PNG."""
    rows = math.ceil(len(pictures) / 2)
    caption = "Bins by quantiles of the training window, from the lowest values to the highest."
    figure = new_figure(caption, width=8, height=0.4 + 2.3 * rows)
    # A subfigure each, so that an odd number leaves no empty axes.
    cells = figure.subfigures(rows, 2, squeeze=False).flat
    for cell, picture in zip(cells, pictures, strict=False):
        ax = styled(cell.subplots())
        places = range(len(picture["expected"]))
        ax.bar(places, picture["expected"], width=0.8, color=SKY, label="training window")
        ax.step(places, picture["found"], where="mid", color=VERMILION, linewidth=1.6, label="this file")
        edges = picture["edges"]
        shown = range(0, len(edges), max(1, math.ceil(len(edges) / 4)))
        ax.set_xticks([place + 0.5 for place in shown], [f"{edges[place]:.3g}" for place in shown])
        as_percent(ax.yaxis)
        ax.set_ylim(0, 1.35 * max(*picture["expected"], *picture["found"]))
        set_labels(ax, shorten(picture["input"], 44), "", "")
        add_legend(ax, "upper right", columns=2)
    return png_of(figure)
