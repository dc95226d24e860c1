"""The features: each an entry of the registry, which names its window and what defines it.

Adding a feature is adding an entry. Sources: *handbook*: Le Borgne, Siblini, Lebichot, Bontempi, Reproducible Machine
Learning for Credit Card Fraud Detection, chapter 3, "Baseline feature transformation"; *own*: this project's.
Windows end with the transaction itself, or LABEL_DELAY_DAYS before it where they look at labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from spark_jobs.features.windows import CENT, DAY_S, LOG_UNIT, History

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: A label counts as known only so many days after its transaction.
LABEL_DELAY_DAYS = 7

#: A payment of so many times the customer's mean is a high one (own; the simulator multiplies by 5).
HIGH_RATIO = 2.5

#: Ratios and scores are cut off here. Beyond, they say nothing more, and a linear model would follow them: its
#: average precision on three weekly folds was 0.63 without and 0.68 with it.
LARGEST_RATIO = 10.0


class Feature(NamedTuple):
    """A feature of a transaction, a double that is never NULL, NaN or infinite.

    ``of`` says whose history ``define`` is given: that of the customer or of the terminal; or, for a feature of the
    transaction alone, instants in Unix seconds. ``days`` is how far back the feature reaches in all, ``delay_days`` how
    old the youngest label is.
    """

    name: str
    of: str
    define: Callable[[Any], Array]
    days: int
    delay_days: int
    unit: str
    source: str
    description: str


def during_weekend(unix_seconds: Array) -> Array:
    """Whether it is Saturday or Sunday in UTC; the first day of Unix was a Thursday."""
    return ((unix_seconds // DAY_S + 3) % 7 >= 5).astype("float64")


def during_night(unix_seconds: Array) -> Array:
    """Whether it is before 7 o'clock in UTC."""
    return (unix_seconds % DAY_S < 7 * 3600).astype("float64")


def customer_count(days: int) -> Callable[[History], Array]:
    """Transactions in (t - days, t]; 1 for an unknown customer."""

    def define(history: History) -> Array:
        import numpy as np

        return np.maximum(history.window(days, with_now=True).count, 1.0)

    return define


def customer_mean(days: int) -> Callable[[History], Array]:
    """Mean amount in (t - days, t]; the own amount for an unknown customer."""

    def define(history: History) -> Array:
        cents = history.window(days, with_now=True).mean(history.cents, history.cents)
        return cents * CENT

    return define


def ratio_to_mean(history: History) -> Array:
    """Amount over the mean of the 30 days before; 1 without any."""
    import numpy as np

    mean = history.window(30, with_now=False).mean(history.cents)
    return np.where(mean > 0, np.minimum(history.cents / np.maximum(mean, 1e-9), LARGEST_RATIO), 1.0)


def z_score(history: History) -> Array:
    """(amount - mean) / standard deviation of the 30 days before; 0 with fewer than two, cut off at ±LARGEST_RATIO."""
    import numpy as np

    window = history.window(30, with_now=False)
    count = window.count
    total = window.sum(history.cents).astype("float64")
    squares = window.sum(history.cents * history.cents).astype("float64")
    variance = np.maximum(squares - total * total / np.maximum(count, 1), 0) / np.maximum(count - 1, 1)
    # A cent of deviation at least: equal amounts would make any other amount infinitely strange.
    deviation = np.maximum(np.sqrt(variance), 1.0)
    score = (history.cents - total / np.maximum(count, 1)) / deviation
    return np.where(count > 1, np.clip(score, -LARGEST_RATIO, LARGEST_RATIO), 0.0)


def log_ratio(history: History) -> Array:
    """log(1 + amount) less its mean over the 30 days before; 0 without any."""
    import numpy as np

    logs = np.rint(np.log1p(history.cents * CENT) / LOG_UNIT).astype("int64")
    window = history.window(30, with_now=False)
    return np.where(window.count > 0, (logs - window.mean(logs)) * LOG_UNIT, 0.0)


def ratio_to_max(history: History) -> Array:
    """Amount over the largest of the 14 days before; 1 without any."""
    import numpy as np

    largest = history.window(14, with_now=False).max(history.cents)
    return np.where(largest > 0, np.minimum(history.cents / np.maximum(largest, 1e-9), LARGEST_RATIO), 1.0)


def high_ratio_count(history: History) -> Array:
    """Payments of the 14 days before with a ratio to mean above HIGH_RATIO."""
    return history.window(14, with_now=False).sum(ratio_to_mean(history) > HIGH_RATIO).astype("float64")


def largest_ratio(history: History) -> Array:
    """Largest ratio to mean of the 14 days before; 0 without any."""
    return history.window(14, with_now=False).max(ratio_to_mean(history))


def terminal_count(days: int) -> Callable[[History], Array]:
    """Transactions in the window that ends a label delay ago; 0 for an unknown terminal."""
    return lambda history: history.window(days, LABEL_DELAY_DAYS, with_now=True).count


def terminal_risk(days: int) -> Callable[[History], Array]:
    """Share of frauds in the window that ends a label delay ago; 0 without any transactions."""
    return lambda history: history.window(days, LABEL_DELAY_DAYS, with_now=True).mean(history.fraud)


def terminal_frauds(days: int) -> Callable[[History], Array]:
    """Frauds in the window that ends a label delay ago."""

    def define(history: History) -> Array:
        return history.window(days, LABEL_DELAY_DAYS, with_now=True).sum(history.fraud).astype("float64")

    return define


def first_known_fraud_age(history: History) -> Array:
    """Days since the first known fraud of the last 35 known days; 42, as if just before, without any."""
    import numpy as np

    window = history.window(35, LABEL_DELAY_DAYS, with_now=True)
    rows = len(history.fraud)
    position = np.where(history.fraud == 1, np.arange(rows), rows)
    following = np.r_[np.minimum.accumulate(position[::-1])[::-1], rows]
    first = following[window.start]
    age = history.time - history.time[np.minimum(first, rows - 1)]
    return np.where(first < window.stop, age / DAY_S, 35.0 + LABEL_DELAY_DAYS)


def last_known_genuine_age(history: History) -> Array:
    """Days since the last genuine transaction of the last 35 known days; 42, as if just before, without any."""
    import numpy as np

    window = history.window(35, LABEL_DELAY_DAYS, with_now=True)
    position = np.where(history.fraud == 0, np.arange(len(history.fraud)), -1)
    preceding = np.r_[-1, np.maximum.accumulate(position)]
    last = preceding[window.stop]
    age = history.time - history.time[np.maximum(last, 0)]
    return np.where(last >= window.start, age / DAY_S, 35.0 + LABEL_DELAY_DAYS)


def last_known_label_age(history: History) -> Array:
    """Days since the last transaction of the last 35 known days; 42, as if just before, without any."""
    import numpy as np

    window = history.window(35, LABEL_DELAY_DAYS, with_now=True)
    age = history.time - history.time[np.maximum(window.stop - 1, 0)]
    return np.where(window.count > 0, age / DAY_S, 35.0 + LABEL_DELAY_DAYS)


def last_known_label(history: History) -> Array:
    """Label of the last transaction of the last 35 known days; 0 without any."""
    import numpy as np

    window = history.window(35, LABEL_DELAY_DAYS, with_now=True)
    return np.where(window.count > 0, history.fraud[np.maximum(window.stop - 1, 0)], 0).astype("float64")


WINDOW_DAYS = (1, 7, 30)


def _registry() -> list[Feature]:
    delay = LABEL_DELAY_DAYS

    def row(name: str, define: Any, source: str, unit: str, text: str) -> Feature:
        return Feature(name, "transaction", define, 0, 0, unit, source, text)

    def customer(name: str, define: Any, days: int, source: str, unit: str, text: str) -> Feature:
        return Feature(name, "customer", define, days, 0, unit, source, text)

    def terminal(name: str, define: Any, days: int, source: str, unit: str, text: str) -> Feature:
        return Feature(name, "terminal", define, days + delay, delay, unit, source, text)

    def text(days: int) -> str:
        return "1 day" if days == 1 else f"{days} days"

    features = [
        row("tx_during_weekend", during_weekend, "handbook", "0 or 1", "Saturday or Sunday (UTC)."),
        row("tx_during_night", during_night, "handbook", "0 or 1", "00:00 to 06:59 (UTC)."),
    ]
    for days in WINDOW_DAYS:
        features += [
            customer(
                f"customer_tx_count_{days}d",
                customer_count(days),
                days,
                "handbook",
                "transactions",
                f"The customer's transactions in the {text(days)} up to and including this one; 1 if unknown.",
            ),
            customer(
                f"customer_mean_amount_{days}d",
                customer_mean(days),
                days,
                "handbook",
                "amount",
                f"Mean amount of the customer's {text(days)} up to this transaction; if unknown, this amount.",
            ),
        ]
    for days in WINDOW_DAYS:
        features += [
            terminal(
                f"terminal_tx_count_{days}d",
                terminal_count(days),
                days,
                "handbook",
                "transactions",
                f"The terminal's transactions in the {text(days)} that end {delay} days ago; 0 if unknown.",
            ),
            terminal(
                f"terminal_fraud_risk_{days}d",
                terminal_risk(days),
                days,
                "handbook",
                "share",
                f"Share of frauds among the terminal's transactions in these {text(days)}; 0 if there are none.",
            ),
        ]
    features += [
        customer("customer_amount_ratio_to_mean", ratio_to_mean, 30, "own", "ratio",
                 "Amount over the mean of the customer's 30 days before; 1 without any."),
        customer("customer_amount_z_score", z_score, 30, "own", "standard deviations",
                 "Distance of the amount from that mean; 0 with fewer than two transactions."),
        customer("customer_amount_log_ratio", log_ratio, 30, "own", "log of amount",
                 "log(1 + amount) less its mean over the customer's 30 days before; 0 without any."),
        customer("customer_amount_ratio_to_max_14d", ratio_to_max, 14, "own", "ratio",
                 "Amount over the largest of the customer's 14 days before; 1 without any."),
        customer("customer_high_ratio_count_14d", high_ratio_count, 14 + 30, "own", "transactions",
                 f"The customer's payments of the 14 days before above {HIGH_RATIO} times the mean before them."),
        customer("customer_max_ratio_14d", largest_ratio, 14 + 30, "own", "ratio",
                 "Largest ratio to mean among the customer's payments of the 14 days before; 0 without any."),
        terminal("terminal_fraud_count_3d", terminal_frauds(3), 3, "own", "frauds",
                 f"Known frauds at the terminal in the 3 days that end {delay} days ago."),
        terminal("terminal_fraud_count_21d", terminal_frauds(21), 21, "own", "frauds",
                 f"Known frauds at the terminal in the 21 days that end {delay} days ago."),
        terminal("terminal_first_fraud_age", first_known_fraud_age, 35, "own", "days",
                 f"Days since the first known fraud of the terminal's last 35 known days; {35 + delay} without any."),
        terminal("terminal_last_genuine_age", last_known_genuine_age, 35, "own", "days",
                 f"Days since the terminal's last genuine transaction in 35 known days; {35 + delay} if none."),
        terminal("terminal_last_label_age", last_known_label_age, 35, "own", "days",
                 f"Days since the terminal's last transaction in 35 known days; {35 + delay} if none."),
        terminal("terminal_last_label", last_known_label, 35, "own", "0 or 1",
                 "Label of the terminal's last transaction whose label is known; 0 without any."),
    ]  # fmt: skip
    return features


#: All features beside the amount itself, in the order of their columns.
REGISTRY = tuple(_registry())

#: The inputs of a model.
FEATURES = ("tx_amount", *[feature.name for feature in REGISTRY])

#: Columns of ``transaction_features`` beyond those of ``cleaned_transactions``: name, Spark type, description.
FEATURE_COLUMNS = tuple(
    (feature.name, "double", f"{feature.description} Unit: {feature.unit}. Source: {feature.source}.")
    for feature in REGISTRY
)

#: Days of history before its first row that a partition needs.
HISTORY_DAYS = max(feature.days for feature in REGISTRY)

#: Columns whose values repeat, being counts, shares of few rows or labels: Parquet keeps them as a dictionary.
REPEATING = (
    *("tx_time_days", "tx_fraud", "tx_fraud_scenario"),
    *[feature.name for feature in REGISTRY if feature.unit in ("0 or 1", "frauds", "share", "transactions")],
)
