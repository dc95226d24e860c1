"""Feature registry: the definition, window and description of each feature.

To add a feature, add an entry. Sources: *handbook*: Le Borgne, Siblini, Lebichot, Bontempi, Reproducible Machine
Learning for Credit Card Fraud Detection, chapter 3, "Baseline feature transformation"; *own*: this project's.
Windows end with the transaction itself, or LABEL_DELAY_DAYS before it where they use labels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Callable, Iterator, NamedTuple

from spark_jobs.features.windows import CENT, LOG_UNIT, History, Window
from spark_jobs.schema import DAY_S

if TYPE_CHECKING:
    from spark_jobs.io.blocks import Array

#: Days after a transaction until its label is known.
LABEL_DELAY_DAYS = 7

#: Ratio of an amount to the customer's mean above which a payment counts as high (own; the simulator multiplies by 5).
HIGH_RATIO = 2.5

#: Cap on ratios and scores. Larger values carry no more information and distort a linear model, whose average precision
#: on three weekly folds was 0.63 without the limit and 0.68 with it.
LARGEST_RATIO = 10.0

#: Days of labels behind the features of a terminal's last labels, and the age if there is no label: just before them.
LABEL_DAYS = 35
NO_LABEL_AGE = float(LABEL_DAYS + LABEL_DELAY_DAYS)


class Feature(NamedTuple):
    """A feature of a transaction, a double that is never NULL, NaN or infinite.

    Attributes:
        entity: "customer" or "terminal" if `compute` takes their `History`; "transaction" if it takes Unix seconds.
        days: maximum age of the rows that the feature uses, directly or through other features.
        delay_days: minimum age of the labels that it uses.
        words: a value as a reason of an alert, in words that an investigator reads.
    """

    name: str
    entity: str
    compute: Callable[[Any], Array]
    days: int
    delay_days: int
    unit: str
    source: str
    description: str
    words: Callable[[float], str]


def during_weekend(unix_seconds: Array) -> Array:
    """1 on Saturdays and Sundays (UTC), else 0; 1970-01-01 was a Thursday."""
    return ((unix_seconds // DAY_S + 3) % 7 >= 5).astype("float64")


def during_night(unix_seconds: Array) -> Array:
    """1 before 07:00 (UTC), else 0."""
    return (unix_seconds % DAY_S < 7 * 3600).astype("float64")


def customer_count(days: int) -> Callable[[History], Array]:
    """Transactions in (t - days, t]; 1 for an unknown customer."""

    def compute(history: History) -> Array:
        import numpy as np

        return np.maximum(history.window(days, include_current=True).count, 1.0)

    return compute


def customer_mean(days: int) -> Callable[[History], Array]:
    """Mean amount in (t - days, t]; the transaction's own amount for an unknown customer."""
    return lambda history: history.window(days, include_current=True).mean(history.cents, history.cents) * CENT


def ratio_to_mean(history: History) -> Array:
    """Amount over the mean of the 30 days before; 1 if there are none."""
    import numpy as np

    mean = history.window(30, include_current=False).mean(history.cents)
    return np.where(mean > 0, np.minimum(history.cents / np.maximum(mean, 1e-9), LARGEST_RATIO), 1.0)


def z_score(history: History) -> Array:
    """(amount - mean) / standard deviation of the 30 days before; 0 with fewer than two, cut off at ±LARGEST_RATIO."""
    import numpy as np

    window = history.window(30, include_current=False)
    count = window.count
    total = window.sum(history.cents).astype("float64")
    squares = window.sum(history.cents * history.cents).astype("float64")
    variance = np.maximum(squares - total * total / np.maximum(count, 1), 0) / np.maximum(count - 1, 1)
    # At least a cent, so that the score after equal amounts is finite.
    deviation = np.maximum(np.sqrt(variance), 1.0)
    score = (history.cents - total / np.maximum(count, 1)) / deviation
    return np.where(count > 1, np.clip(score, -LARGEST_RATIO, LARGEST_RATIO), 0.0)


def log_ratio(history: History) -> Array:
    """log(1 + amount) less its mean over the 30 days before; 0 if there are none."""
    import numpy as np

    logs = np.rint(np.log1p(history.cents * CENT) / LOG_UNIT).astype("int64")
    window = history.window(30, include_current=False)
    return np.where(window.count > 0, (logs - window.mean(logs)) * LOG_UNIT, 0.0)


def ratio_to_max(history: History) -> Array:
    """Amount over the largest of the 14 days before; 1 if there are none."""
    import numpy as np

    largest = history.window(14, include_current=False).max(history.cents)
    return np.where(largest > 0, np.minimum(history.cents / np.maximum(largest, 1e-9), LARGEST_RATIO), 1.0)


def high_ratio_count(history: History) -> Array:
    """Payments of the 14 days before with a ratio to mean above HIGH_RATIO."""
    return history.window(14, include_current=False).sum(ratio_to_mean(history) > HIGH_RATIO).astype("float64")


def largest_ratio(history: History) -> Array:
    """Largest ratio to mean of the 14 days before; 0 if there are none."""
    return history.window(14, include_current=False).max(ratio_to_mean(history))


def known_window(history: History, days: int) -> Window:
    """Window of a terminal's last `days` with known labels."""
    return history.window(days, LABEL_DELAY_DAYS, include_current=True)


def terminal_count(days: int) -> Callable[[History], Array]:
    """Transactions in the known window; 0 for an unknown terminal."""
    return lambda history: known_window(history, days).count


def terminal_risk(days: int) -> Callable[[History], Array]:
    """Share of frauds in the known window; 0 without transactions."""
    return lambda history: known_window(history, days).mean(history.fraud)


def terminal_frauds(days: int) -> Callable[[History], Array]:
    """Frauds in the known window."""
    return lambda history: known_window(history, days).sum(history.fraud).astype("float64")


def first_known_fraud_age(history: History) -> Array:
    """Days since the first fraud in the known LABEL_DAYS; NO_LABEL_AGE if there is none."""
    import numpy as np

    window = known_window(history, LABEL_DAYS)
    rows = len(history.fraud)
    position = np.where(history.fraud == 1, np.arange(rows), rows)
    following = np.r_[np.minimum.accumulate(position[::-1])[::-1], rows]
    first = following[window.start]
    age = history.time - history.time[np.minimum(first, rows - 1)]
    return np.where(first < window.stop, age / DAY_S, NO_LABEL_AGE)


def last_known_genuine_age(history: History) -> Array:
    """Days since the last genuine transaction in the known LABEL_DAYS; NO_LABEL_AGE if there is none."""
    import numpy as np

    window = known_window(history, LABEL_DAYS)
    position = np.where(history.fraud == 0, np.arange(len(history.fraud)), -1)
    preceding = np.r_[-1, np.maximum.accumulate(position)]
    last = preceding[window.stop]
    age = history.time - history.time[np.maximum(last, 0)]
    return np.where(last >= window.start, age / DAY_S, NO_LABEL_AGE)


def last_known_label_age(history: History) -> Array:
    """Days since the last transaction in the known LABEL_DAYS; NO_LABEL_AGE if there is none."""
    import numpy as np

    window = known_window(history, LABEL_DAYS)
    age = history.time - history.time[np.maximum(window.stop - 1, 0)]
    return np.where(window.count > 0, age / DAY_S, NO_LABEL_AGE)


def last_known_label(history: History) -> Array:
    """Label of the last transaction in the known LABEL_DAYS; 0 if there is none."""
    import numpy as np

    window = known_window(history, LABEL_DAYS)
    return np.where(window.count > 0, history.fraud[np.maximum(window.stop - 1, 0)], 0).astype("float64")


WINDOW_DAYS = (1, 7, 30)


def _registry() -> Iterator[Feature]:
    delay = LABEL_DELAY_DAYS

    def row(name: str, compute: Any, source: str, unit: str, text: str, words: Any) -> Feature:
        return Feature(name, "transaction", compute, 0, 0, unit, source, text, words)

    def customer(name: str, compute: Any, days: int, source: str, unit: str, text: str, words: Any) -> Feature:
        return Feature(name, "customer", compute, days, 0, unit, source, text, words)

    def terminal(name: str, compute: Any, days: int, source: str, unit: str, text: str, words: Any) -> Feature:
        return Feature(name, "terminal", compute, days + delay, delay, unit, source, text, words)

    windows = [(days, "1 day" if days == 1 else f"{days} days") for days in WINDOW_DAYS]
    # fmt: off
    yield row("tx_during_weekend", during_weekend, "handbook", "0 or 1", "Saturday or Sunday (UTC).",
              lambda value: "on a weekend" if value else "on a weekday")
    yield row("tx_during_night", during_night, "handbook", "0 or 1", "00:00 to 06:59 (UTC).",
              lambda value: "at night (before 07:00 UTC)" if value else "by day (from 07:00 UTC)")
    for days, text in windows:
        period = "day" if days == 1 else text
        yield customer(f"customer_tx_count_{days}d", customer_count(days), days, "handbook", "transactions",
                       f"The customer's transactions in the {period} up to and including this one; 1 if unknown.",
                       _phrase("{:,.0f} payments of this customer within {}", text))
        yield customer(f"customer_mean_amount_{days}d", customer_mean(days), days, "handbook", "amount",
                       f"Mean customer amount in the {period} up to this transaction; if unknown, this amount.",
                       _phrase("mean amount {:,.2f} of this customer within {}", text))
    for days, text in windows:
        period = "day" if days == 1 else text
        yield terminal(f"terminal_tx_count_{days}d", terminal_count(days), days, "handbook", "transactions",
                       f"The terminal's transactions in the {period} ending {delay} days ago; 0 if unknown.",
                       _phrase("{:,.0f} payments at this terminal in the {} until {} days ago", text, delay))
        yield terminal(f"terminal_fraud_risk_{days}d", terminal_risk(days), days, "handbook", "share",
                       f"Share of frauds at the terminal in the {period} ending {delay} days ago; 0 without payments.",
                       _phrase("{:.1%} frauds among this terminal's payments in the {} until {} days ago", text, delay))
    yield customer("customer_amount_ratio_to_mean", ratio_to_mean, 30, "own", "ratio",
                   "Amount over the mean of the customer's 30 days before; 1 without any.",
                   _phrase("amount {:.1f} times this customer's mean"))
    yield customer("customer_amount_z_score", z_score, 30, "own", "standard deviations",
                   "Distance of the amount from that mean; 0 with fewer than two transactions.",
                   lambda value: "amount {:.1f} standard deviations {} this customer's mean".format(
                       abs(value), "below" if value < 0 else "above"))
    yield customer("customer_amount_log_ratio", log_ratio, 30, "own", "log of amount",
                   "log(1 + amount) less its mean over the customer's 30 days before; 0 without any.",
                   lambda value: f"amount {math.exp(value):.1f} times this customer's typical amount")
    yield customer("customer_amount_ratio_to_max_14d", ratio_to_max, 14, "own", "ratio",
                   "Amount over the largest of the customer's 14 days before; 1 without any.",
                   _phrase("amount {:.1f} times this customer's largest of 14 days"))
    yield customer("customer_high_ratio_count_14d", high_ratio_count, 14 + 30, "own", "transactions",
                   f"The customer's payments of the 14 days before above {HIGH_RATIO} times the mean before them.",
                   _phrase("{:.0f} other payments above {} times this customer's mean within 14 days", HIGH_RATIO))
    yield customer("customer_max_ratio_14d", largest_ratio, 14 + 30, "own", "ratio",
                   "Largest ratio to mean among the customer's payments of the 14 days before; 0 without any.",
                   _phrase("another payment of {:.1f} times this customer's mean within 14 days"))
    for days in (3, 21):
        yield terminal(f"terminal_fraud_count_{days}d", terminal_frauds(days), days, "own", "frauds",
                       f"Known frauds at the terminal in the {days} days ending {delay} days ago.",
                       _phrase("{:.0f} frauds at this terminal in the {} days until {} days ago", days, delay))
    known, without = f"{LABEL_DAYS} known days", f"{NO_LABEL_AGE:.0f}"
    yield terminal("terminal_first_fraud_age", first_known_fraud_age, LABEL_DAYS, "own", "days",
                   f"Days since the first known fraud of the terminal's last {known}; {without} without any.",
                   _age("first known fraud at this terminal", "no known fraud at this terminal"))
    yield terminal("terminal_last_genuine_age", last_known_genuine_age, LABEL_DAYS, "own", "days",
                   f"Days since the terminal's last genuine transaction in {known}; {without} if none.",
                   _age("last known genuine payment at this terminal", "no known genuine payment at this terminal"))
    yield terminal("terminal_last_label_age", last_known_label_age, LABEL_DAYS, "own", "days",
                   f"Days since the terminal's last transaction in {known}; {without} if none.",
                   _age("last known payment at this terminal", "no known payment at this terminal"))
    yield terminal("terminal_last_label", last_known_label, LABEL_DAYS, "own", "0 or 1",
                   "Label of the terminal's last transaction whose label is known; 0 without any.",
                   lambda value: "the last known payment at this terminal was {}".format(
                       "a fraud" if value else "genuine or there is none"))
    # fmt: on


def _phrase(text: str, *more: Any) -> Callable[[float], str]:
    return lambda value: text.format(value, *more)


def _age(event: str, without: str) -> Callable[[float], str]:
    """Words for days since an event, or that it did not happen."""
    return lambda value: f"{event} {value:.0f} days ago" if value < NO_LABEL_AGE else without


#: All features except the amount itself, in the order of their columns.
REGISTRY = tuple(_registry())

#: Names of a model's inputs.
MODEL_INPUTS = ("tx_amount", *[feature.name for feature in REGISTRY])

_WORDS = {feature.name: feature.words for feature in REGISTRY}


def in_words(name: str, value: float) -> str:
    """A model input and its value as a reason of an alert."""
    if name == "tx_amount":
        return f"amount {value:,.2f}"
    return _WORDS[name](value) if name in _WORDS else f"{name} is {value:g}"


#: Columns of ``transaction_features`` beyond those of ``cleaned_transactions``: name, Spark type, description.
FEATURE_COLUMNS = tuple(
    (feature.name, "double", f"{feature.description} Unit: {feature.unit}. Source: {feature.source}.")
    for feature in REGISTRY
)

#: Days of history that a partition needs before its first row.
HISTORY_DAYS = max(feature.days for feature in REGISTRY)

#: Columns with few distinct values (counts, shares of few rows, labels), dictionary-encoded in Parquet.
DICTIONARY_COLUMNS = (
    *("tx_time_days", "tx_fraud", "tx_fraud_scenario"),
    *[feature.name for feature in REGISTRY if feature.unit in ("0 or 1", "frauds", "share", "transactions")],
)
