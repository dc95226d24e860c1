"""Drift of a file against the training window of the champion: inputs, scores, and the fraud rate.

The job that scores a file counts its rows in the bins of the champion's training report (`bin_counts`). `measure` then
compares the file with the training window by the population stability index: PSI = sum over bins of (found - expected)
* ln(found / expected), of the shares of the rows (N. Siddiqi, "Credit Risk Scorecards", 2006, chapter 9).

What PSI may a clean file have? Sampling does not say it: inputs remember up to HISTORY_DAYS and terminals stay
compromised for 28 days, so weeks differ, however many rows they have. How much they differ is seen in the training
window. The shares of a day are taken to deviate from their mean by a part that is new every day and a part that lasts,
with a correlation of 1 - h / DEPENDENCE_DAYS over h days: the kernel of W. K. Newey and K. D. West ("A Simple,
Positive Semi-Definite, Heteroskedasticity and Autocorrelation Consistent Covariance Matrix", Econometrica 55, 1987).
Eight weeks do not say well how large the two parts are, so all sizes count, each as likely as the weeks make it. From
this follows the distribution of a clean file's PSI, with the heavy tail that so little data deserve. It is the
predictive distribution of a long-run average (U. K. Müller and M. W. Watson, "Measuring Uncertainty about Long-Run
Predictions", Review of Economic Studies 83, 2016) for several bins:

* Deviations of the weeks' shares from their mean are divided by the square root of the expected share. The PSI of a
  small difference is then its squared length.
* They vary in r independent dimensions, r = (sum of eigenvalues)² / (sum of squared eigenvalues) of their covariance
  over bins (F. E. Satterthwaite, "An Approximate Distribution of Estimates of Variance Components", 1946).
* With the variance v of a day, of which the share s lasts, their covariance over weeks is v * S in each dimension,
  S = (1 - s) * I / 7 + s * K, where K is the mean of the kernel over the days of two weeks.
* With C, the contrasts that remove the mean, q = weeks - 1 and Q = tr(y' C' (C S C')⁻¹ C y) of the deviations y, the
  likelihood of (v, s) is det(C S C')^(-r/2) * v^(-rq/2) * exp(-Q / 2v). All s and all logarithms of v are equally
  likely before, except that the part that is new every day cannot be less than that of drawing rows independently.
* The PSI of a clean file is v * (S of the training window's mean + S of the file's mean) * chi²(r).

Whole weeks are compared, so that weekends are not drift. Fraud rates are compared in the same way, by the squared
logarithm of their ratio instead of the PSI.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Sequence

from spark_jobs.features.registry import HISTORY_DAYS

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Input or ``score`` → for each day, the rows in each bin, as in the profile of a training report.
Counts = Dict[str, List[List[int]]]

#: Name of the score among the inputs of a profile.
SCORE = "score"

#: Days of the data set that tell little: windows of inputs still fill.
WARM_UP_DAYS = HISTORY_DAYS

#: Days over which days depend on each other: as far as inputs remember. The same for fraud rates, although a
#: compromised terminal stays compromised for 28 days only: with 28, up to 1% of clean files gave a warning.
DEPENDENCE_DAYS = HISTORY_DAYS

#: Fewer weeks of training cannot show how weeks differ: six are just as long as inputs remember. More than eight would
#: make a champion's threshold depend on how long its training window is.
LEAST_WEEKS, MOST_WEEKS = 6, 8

#: Probability that a clean file gives a warning, for each check. Because days are taken to depend on each other longer
#: than they do, and inputs to vary independently, it is really far less (docs/performance.md).
FALSE_ALARM_RATE = 0.02

#: An exceedance of 1 is the value that this share of clean files exceeds, input by input.
REFERENCE_RATE = 0.01

#: Values drawn from each predictive distribution: enough that 1% of them are 200.
DRAWS = 20_000

#: Shares of lasting variance that are tried; the prior is the same for all.
SHARES = (0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)

#: Variances that are tried, at equal distances of their logarithms, with the same prior for all; the largest one in
#: relation to the estimate.
VARIANCES = 100
LARGEST_VARIANCE = 1e3

#: Added to each count, so that the logarithm of an empty bin exists.
HALF_A_ROW = 0.5

#: Inputs with a picture in the result.
PICTURES = 3


class _Predicted(NamedTuple):
    """Draws of the squared distance of a clean file, the value that REFERENCE_RATE of them exceed, and the variances.

    The variances are those of the mean of the training window and the mean of the file, summed over bins.
    """

    draws: Array
    reference: float
    variances: tuple[float, float]


def bin_counts(columns: Mapping[str, Any], edges: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
    """Rows in each bin of every name in `edges`; those of several batches may be added.

    Args:
        columns: input or ``score`` → values, one per row: inputs as 32-bit floats, as the model gets them.
        edges: those of a profile. Bin i has the values from edge i - 1 (inclusive) to edge i (exclusive).
    """
    import numpy as np

    counts = {}
    for name, limits in edges.items():
        bins = np.searchsorted(np.asarray(limits, "f8"), np.asarray(columns[name]), side="right")
        counts[name] = np.bincount(bins, minlength=len(limits) + 1).tolist()
    return counts


def measure(
    profile: Mapping[str, Any] | None,
    counts: Counts,
    first_day: int,
    labels: Mapping[int, tuple[int, int]],
    data_first_day: int,
) -> dict[str, dict[str, Any]]:
    """Compare a file with the training window of the champion.

    Args:
        profile: that of the champion's training report (see `fits.profile_of`), or None.
        counts: input or ``score`` → for each day of the file, from `first_day` on, the rows in each bin (see
            `bin_counts`); a sample of the rows will do.
        first_day: first day of `counts` (tx_time_days). Days that are not the file's own should not be among them.
        labels: day of the file → (rows, frauds), for days whose labels are known.
        data_first_day: first day of the data set.

    Returns ``feature_drift``, ``score_drift`` and ``label_drift``, each with:

    * ``outcome``: ok, drift or not_calibrated; ``reason``, one sentence.
    * ``exceedance``: the largest one, and ``threshold``, which it exceeds if there is drift; None if not calibrated.
      An exceedance of 1 is what one clean file in a hundred exceeds. The threshold is what the largest exceedance of
      all inputs exceeds with the probability FALSE_ALARM_RATE in a clean file.
    * ``inputs``, not for labels: ``input``, ``psi`` and ``exceedance`` of each, worst first; ``pictures``: for the
      three worst ``input``, ``edges``, and the shares of rows in each bin, ``expected`` and ``found``.
    * ``expected`` and ``found``, only for labels: ``rate``, ``rows``, ``frauds``, ``standard_error`` of the rate;
      ``lower`` and ``upper``: rates between these give no warning. None if not calibrated.
    """
    names = [name for name in (profile or {}).get("edges", {}) if name != SCORE]
    return {
        "feature_drift": _distributions(profile, counts, first_day, data_first_day, names, "inputs"),
        "score_drift": _distributions(profile, counts, first_day, data_first_day, [SCORE], "scores"),
        "label_drift": _fraud_rate(profile, labels, data_first_day),
    }


def _distributions(
    profile: Mapping[str, Any] | None,
    counts: Counts,
    first_day: int,
    data_first_day: int,
    names: Sequence[str],
    what: str,
) -> dict[str, Any]:
    """Result of one check of distributions: the inputs or the score."""
    import numpy as np

    result: dict[str, Any] = {
        "outcome": "not_calibrated",
        "reason": "",
        "threshold": None,
        "exceedance": None,
        "inputs": [],
        "pictures": [],
    }
    keys = ("edges", "counts")
    known = profile and "first_day" in profile and all(name in profile.get(key, {}) for key in keys for name in names)
    if not profile or not known or not names:
        return {**result, "reason": f"The champion's training report has no distribution of its {what}."}
    effective = _effective_share(profile)
    training, file = {}, {}
    for name in names:
        bins = len(profile["edges"][name]) + 1
        training[name] = _last_weeks(
            profile["counts"][name], bins, profile["first_day"], data_first_day + WARM_UP_DAYS, MOST_WEEKS
        )
        file[name] = _last_weeks(counts.get(name, []), bins, first_day)
    if any(len(weeks) == 0 for weeks in file.values()):
        return {**result, "reason": f"The file has no whole week of {what}."}
    weeks = min(len(of_weeks) for of_weeks in training.values())
    if weeks == 0:
        return {**result, "reason": _too_few_weeks(0)}

    psi = {name: _psi(training[name].sum(axis=0), file[name].sum(axis=0)) for name in names}
    exceedances: dict[str, float] = {}
    if weeks >= LEAST_WEEKS:
        random = np.random.default_rng(0)
        largest = np.zeros(DRAWS)
        # Always in the same order, because the draws depend on it.
        for name in sorted(names):
            predicted = _predicted_psi(training[name], file[name], effective, random)
            exceedances[name] = psi[name] / predicted.reference
            # As if inputs drifted independently: dependent ones have a lower maximum.
            largest = np.maximum(largest, predicted.draws / predicted.reference)
        result["threshold"] = _short(np.quantile(largest, 1 - FALSE_ALARM_RATE))
    order = sorted(names, key=lambda name: (-exceedances.get(name, psi[name]), name))
    for name in order:
        exceedance = _short(exceedances[name]) if name in exceedances else None
        result["inputs"].append({"input": name, "psi": _short(psi[name]), "exceedance": exceedance})
    for name in order[:PICTURES]:
        picture: dict[str, Any] = {"input": name, "edges": list(profile["edges"][name])}
        for key, shown in (("expected", training[name]), ("found", file[name])):
            rows = shown.sum(axis=0)
            picture[key] = [_short(share) for share in rows / rows.sum()]
        result["pictures"].append(picture)
    if not exceedances:
        return {**result, "reason": _too_few_weeks(weeks)}

    worst = result["inputs"][0]
    result["exceedance"] = worst["exceedance"]
    result["outcome"] = "drift" if worst["exceedance"] > result["threshold"] else "ok"
    above = sum(exceedance > result["threshold"] for exceedance in exceedances.values())
    result["reason"] = "{} differs most: PSI {:.2g}, {:.2g} times its limit for a clean file{}.".format(
        worst["input"],
        worst["psi"],
        worst["exceedance"] / result["threshold"],
        f"; {above} of {len(names)} inputs are above it" if above > 1 else "",
    )
    return result


def _fraud_rate(
    profile: Mapping[str, Any] | None, labels: Mapping[int, tuple[int, int]], data_first_day: int
) -> dict[str, Any]:
    """Result of the check of the fraud rate."""
    import numpy as np

    result: dict[str, Any] = {
        "outcome": "not_calibrated",
        "reason": "",
        "threshold": None,
        "exceedance": None,
        "expected": None,
        "found": None,
        "lower": None,
        "upper": None,
    }
    if not profile or "first_day" not in profile or not profile.get("labels"):
        return {**result, "reason": "The champion's training report has no labels by day."}
    training = _last_weeks(profile["labels"], 2, profile["first_day"], data_first_day + WARM_UP_DAYS, MOST_WEEKS)
    if len(training) < LEAST_WEEKS:
        return {**result, "reason": _too_few_weeks(len(training))}
    first = min(labels, default=0)
    known = [labels.get(day, (0, 0)) for day in range(first, max(labels, default=-1) + 1)]
    file = _last_weeks(known, 2, first)
    if len(file) == 0:
        return {**result, "reason": "The file has no whole week whose labels are known."}
    rows, frauds = training.sum(axis=0)
    found_rows, found_frauds = file.sum(axis=0)
    if frauds == 0:
        return {**result, "reason": "The training window has no frauds in the weeks that count."}

    rate, found_rate = frauds / rows, found_frauds / found_rows
    deviations = (training[:, 1] - rate * training[:, 0]) / (frauds / len(training))
    predicted = _predict(
        deviations[:, None],
        dimensions=1,
        least_variance=7 * len(training) / float(frauds),
        file_weeks=len(file),
        noise=_noise(training[:, 0], file[:, 0]),
        random=np.random.default_rng(0),
    )
    distance = math.log((found_frauds + HALF_A_ROW) / (found_rows + HALF_A_ROW) / rate)
    threshold = float(np.quantile(predicted.draws, 1 - FALSE_ALARM_RATE)) / predicted.reference
    exceedance = distance**2 / predicted.reference
    width = math.sqrt(threshold * predicted.reference)
    lower, upper = rate * math.exp(-width), min(rate * math.exp(width), 1.0)
    described = [
        {
            "rate": _short(share),
            "rows": int(number),
            "frauds": int(positive),
            "standard_error": _short(rate * math.sqrt(variance)),
        }
        for share, number, positive, variance in zip(
            (rate, found_rate), (rows, found_rows), (frauds, found_frauds), predicted.variances
        )
    ]
    return {
        "outcome": "drift" if exceedance > threshold else "ok",
        "reason": f"Fraud rate {found_rate:.3%}, against {rate:.3%} in the training window; {1 - FALSE_ALARM_RATE:.0%} "
        f"of clean files have {lower:.3%} to {upper:.3%}.",
        "threshold": _short(threshold),
        "exceedance": _short(exceedance),
        "expected": described[0],
        "found": described[1],
        "lower": _short(lower),
        "upper": _short(upper),
    }


def _last_weeks(
    counts: Sequence[Sequence[int]], bins: int, first_day: int, not_before: int | None = None, most: int | None = None
) -> Array:
    """Rows by week and bin in the last whole weeks of counts by day, at most `most`, without days before `not_before`.

    Days without rows at either end do not count. There are no weeks if the counts have another number of bins.
    """
    import numpy as np

    if not all(len(day) == bins for day in counts):
        return np.zeros((0, bins))
    days = np.array(counts, "f8").reshape(len(counts), bins)
    if not_before is not None:
        days = days[max(not_before - first_day, 0) :]
    with_rows = np.flatnonzero(days.sum(axis=1))
    if len(with_rows) == 0:
        return np.zeros((0, bins))
    end = int(with_rows[-1]) + 1
    weeks = (end - int(with_rows[0])) // 7
    if most is not None:
        weeks = min(weeks, most)
    summed: Array = days[end - 7 * weeks : end].reshape(weeks, 7, bins).sum(axis=1)
    return summed


def _shares(rows: Array) -> Array:
    """Share of each bin, none of them 0."""
    shares: Array = (rows + HALF_A_ROW) / (rows + HALF_A_ROW).sum()
    return shares


def _psi(expected: Array, found: Array) -> float:
    """Population stability index of the rows in each bin."""
    import numpy as np

    expected, found = _shares(expected), _shares(found)
    return float(((found - expected) * np.log(found / expected)).sum())


def _effective_share(profile: Mapping[str, Any]) -> float:
    """Rows that the training window was counted with, relative to those that they stand for; 1 if not known."""
    rows = sum(map(sum, next(iter(profile["counts"].values()))))
    return min(float(profile.get("effective_rows", rows)) / max(rows, 1), 1.0)


def _predicted_psi(training: Array, file: Array, effective: float, random: Any) -> _Predicted:
    """PSI of a clean file that is as long and as large as `file`; both are rows by week and bin.

    `effective` is the share of the training window's rows that were really counted.
    """
    import numpy as np

    rows = training.sum(axis=1)
    expected = _shares(training.sum(axis=0))
    deviations = (training - rows[:, None] * expected) / (rows.mean() * np.sqrt(expected))
    bins_with_rows = int((training.sum(axis=0) > 0).sum())
    return _predict(
        deviations,
        dimensions=max(bins_with_rows - 1, 1),
        least_variance=7 / (effective * float(rows.mean())),
        file_weeks=len(file),
        noise=_noise(effective * rows, file.sum(axis=1)),
        random=random,
    )


def _predict(
    deviations: Array,
    dimensions: int,
    least_variance: float,
    file_weeks: int,
    noise: float,
    random: Any,
) -> _Predicted:
    """Squared distance of a clean file from the training window; see the module's docstring for the method.

    Args:
        deviations: of the weeks of the training window from their mean (weeks × any number of columns).
        dimensions: in which they can vary.
        least_variance: of a day in each dimension, where it does not last: that of drawing its rows independently.
        noise: variance of a day of the file, where it does not last, relative to that of a training day.
    """
    import numpy as np
    from scipy.linalg import helmert

    weeks = len(deviations)
    contrasts = helmert(weeks)  # orthonormal rows that sum to 0: what is left of a series without its mean
    varied = contrasts @ deviations
    product = varied @ varied.T
    total, squares = float(np.trace(product)), float((product**2).sum())
    rank = min(max(total**2 / squares, 1.0), dimensions) if squares > 0 else 1.0
    degrees = rank * (weeks - 1)

    # The posterior on a grid: rows are shares of lasting variance, columns are variances.
    least = least_variance * dimensions / rank
    weighted, determinants, of_training, of_file = [], [], [], []
    training_kernel, file_kernel = _kernel(weeks), _kernel(file_weeks)
    for share in SHARES:
        covariance = (1 - share) * np.eye(weeks) / 7 + share * training_kernel
        inner = contrasts @ covariance @ contrasts.T
        weighted.append(float((np.linalg.inv(inner) * product).sum()))
        determinants.append(float(np.linalg.slogdet(inner)[1]))
        of_training.append(covariance.mean())
        of_file.append((1 - share) * noise / (7 * file_weeks) + share * file_kernel.mean())
    variances = np.geomspace(least, max(least, max(weighted) / degrees) * LARGEST_VARIANCE, VARIANCES)
    logarithms = (
        -rank / 2 * np.array(determinants)[:, None]
        - degrees / 2 * np.log(variances)
        - np.array(weighted)[:, None] / (2 * variances)
    )
    possible = variances * (1 - np.array(SHARES)[:, None]) >= least
    posterior = np.exp(logarithms - logarithms[possible].max()) * possible * np.gradient(SHARES)[:, None]
    drawn = random.choice(posterior.size, DRAWS, p=posterior.ravel() / posterior.sum())
    row, variance = drawn // VARIANCES, variances[drawn % VARIANCES]
    parts = (variance * np.array(of_training)[row], variance * np.array(of_file)[row])
    # Twice a gamma variable of shape n / 2 is chi-square with n degrees of freedom, which need not be whole.
    draws = (parts[0] + parts[1]) * 2 * random.gamma(rank / 2, size=DRAWS)
    reference = float(np.quantile(draws, 1 - REFERENCE_RATE))
    return _Predicted(draws, reference, (float(parts[0].mean()), float(parts[1].mean())))


def _kernel(weeks: int) -> Array:
    """Covariance of the means of two weeks, if the correlation of two days declines to 0 over DEPENDENCE_DAYS."""
    import numpy as np

    days = np.arange(7 * weeks)
    daily = np.maximum(1 - np.abs(days[:, None] - days) / DEPENDENCE_DAYS, 0)
    return daily.reshape(weeks, 7, weeks, 7).mean(axis=(1, 3))


def _noise(training_rows: Array, file_rows: Array) -> float:
    """Noise of a file's week as a multiple of that of a training week, because it has fewer rows; at least 1."""
    return max(float(training_rows.mean() / file_rows.mean()), 1.0)


def _too_few_weeks(weeks: int) -> str:
    return (
        f"The training window has {weeks} whole weeks after the first {WARM_UP_DAYS} days of the data, "
        f"in which inputs still fill; at least {LEAST_WEEKS} show how weeks differ."
    )


def _short(value: float) -> float:
    """Six digits, for a report."""
    return float(f"{value:.6g}")
