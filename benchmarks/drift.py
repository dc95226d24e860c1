"""Warnings of the drift checks: false ones on clean files, and those that three faults should cause.

Data sets are simulated in memory, without Spark, by the platform's own functions. In each of them, champions are
trained after some months. For false warnings, each champion is compared with the clean files that follow, one by one;
for true ones, with the next file, in which something has changed:

* amounts × 1.2: all amounts of the file. `feature_drift` should warn.
* fraud rate halved: a random half of the frauds of each scenario is genuine; the amounts that scenario 3 multiplied are
  divided again. `label_drift` should warn.
* clock + 6 h: all instants of the file. `feature_drift` should warn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.common import EPOCH, log_progress, markdown, options, write_results
from ml_platform.dev.simulator import Simulation
from spark_jobs import build_features, train_model
from spark_jobs.features.registry import HISTORY_DAYS, LABEL_DELAY_DAYS, MODEL_INPUTS
from spark_jobs.schema import DAY_S
from spark_jobs.scoring import drift
from spark_jobs.training import fits
from spark_jobs.training.learners import DEFAULT_CANDIDATES, LEARNERS, Scorer, grid_points, matrix_of

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Columns = dict[str, Array]

FILE_DAYS = 30

#: Files whose features are computed together.
FILES_AT_ONCE = 10

#: The check that should warn of each fault.
SEEN_BY = {"amounts × 1.2": "feature_drift", "fraud rate halved": "label_drift", "clock + 6 h": "feature_drift"}

CHECKS = ("feature_drift", "score_drift", "label_drift")


class Champion(NamedTuple):
    """A model trained after `month` files, and the profile of its training window."""

    month: int
    scorer: Scorer
    profile: dict[str, Any]


class Features(NamedTuple):
    """Rows in order of time: model inputs, day and label of each."""

    matrix: Array
    days: Array
    labels: Array

    def between(self, first_day: int, last_day: int) -> Features:
        """The rows of some days, both inclusive."""
        import numpy as np

        begin, end = np.searchsorted(self.days, [first_day, last_day + 1])
        return Features(*(values[begin:end] for values in self))


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--customers", type=int, default=2_500, help="customers to simulate (default: 2500)")
    parser.add_argument("--terminals", type=int, help="terminals to simulate (default: twice the customers)")
    parser.add_argument("--files", type=int, default=50, help="clean files after each champion (default: 50)")
    parser.add_argument("--clean-seeds", type=int, default=4, help="data sets with clean files only (default: 4)")
    parser.add_argument("--seeds", type=int, default=20, help="data sets with a changed file (default: 20)")
    parser.add_argument(
        "--months", type=int, nargs="+", default=[3, 4, 6], help="files that champions are trained after (3 4 6)"
    )
    arguments = parser.parse_args()
    terminals = arguments.terminals or 2 * arguments.customers

    def simulation(seed: int) -> Simulation:
        return Simulation(start=EPOCH, customers=arguments.customers, terminals=terminals, seed=seed, fault_rate=0.0)

    results: list[dict[str, Any]] = []
    # Neither these seeds nor those of the changed files were used to choose the method.
    for seed in range(1000, 1000 + arguments.clean_seeds):
        results += clean_files(simulation(seed), arguments.months, arguments.files)
        log_progress(f"clean files, seed {seed}: done")
    for seed in range(2000, 2000 + arguments.seeds):
        # A champion that is not calibrated warns of nothing.
        results += changed_files(simulation(seed), [month for month in arguments.months if month > 3])
        log_progress(f"changed files, seed {seed}: done")
    write_results(arguments.json, results, lambda: table(results))


def clean_files(simulation: Simulation, months: list[int], files: int) -> list[dict[str, Any]]:
    """Results of champions trained after `months` on the `files` clean files that follow each."""
    results: list[dict[str, Any]] = []
    champions: list[Champion] = []
    number_of_files = max(months) + files
    for first in range(0, number_of_files, FILES_AT_ONCE):
        last = min(first + FILES_AT_ONCE, number_of_files)
        # The first files are those that the champions are trained on.
        begin = max(first * FILE_DAYS - HISTORY_DAYS, 0)
        features = features_of(rows_of(simulation, begin, last * FILE_DAYS)).between(
            first * FILE_DAYS, last * FILE_DAYS - 1
        )
        champions = champions or [train(features, month) for month in months]
        for champion in champions:
            for file in range(max(first, champion.month), min(last, champion.month + files)):
                results.append(compare(champion, features, file, "clean", simulation.seed))
    return results


def changed_files(simulation: Simulation, months: list[int]) -> list[dict[str, Any]]:
    """Results of champions trained after `months` on the next file, changed in each way."""
    import numpy as np

    rows = rows_of(simulation, 0, (max(months) + 1) * FILE_DAYS)
    features = features_of(rows)
    results = []
    for month in months:
        champion = train(features, month)
        first_day = month * FILE_DAYS
        day = rows["tx_time_seconds"] // DAY_S
        needed = (day >= first_day - HISTORY_DAYS - 1) & (day < first_day + FILE_DAYS)
        near = {name: values[needed] for name, values in rows.items()}
        of_file = near["tx_time_seconds"] >= first_day * DAY_S
        random = np.random.default_rng(simulation.seed)
        for fault, change in FAULTS.items():
            changed = {name: values.copy() for name, values in near.items()}
            change(changed, of_file, simulation, random)
            results.append(compare(champion, features_of(changed), month, fault, simulation.seed))
    return results


def raise_amounts(rows: Columns, of_file: Array, simulation: Simulation, random: np.random.Generator) -> None:
    """Multiply the amounts by 1.2."""
    rows["tx_amount"][of_file] = (rows["tx_amount"][of_file] * 1.2).round(2)


def halve_fraud_rate(rows: Columns, of_file: Array, simulation: Simulation, random: np.random.Generator) -> None:
    """Make a random half of the frauds of each scenario genuine."""
    import numpy as np

    for scenario in (1, 2, 3):
        frauds = random.permutation(np.flatnonzero(of_file & (rows["tx_fraud_scenario"] == scenario)))
        freed = frauds[: len(frauds) // 2]
        rows["tx_fraud"][freed] = rows["tx_fraud_scenario"][freed] = 0
        if scenario == 3:
            rows["tx_amount"][freed] = (rows["tx_amount"][freed] / simulation.compromised_factor).round(2)


def shift_clock(rows: Columns, of_file: Array, simulation: Simulation, random: np.random.Generator) -> None:
    """Add 6 hours."""
    for name in ("tx_time_seconds", "tx_unix_seconds"):
        rows[name][of_file] += 6 * 3600


FAULTS: dict[str, Callable[[Columns, Array, Simulation, np.random.Generator], None]] = {
    "amounts × 1.2": raise_amounts,
    "fraud rate halved": halve_fraud_rate,
    "clock + 6 h": shift_clock,
}


def rows_of(simulation: Simulation, first_day: int, end_day: int) -> Columns:
    """Clean rows of some days, as `build_features` takes them."""
    import numpy as np

    first_id = sum(simulation._total(day) for day in range(first_day))
    parts: list[tuple[Array, ...]] = []
    for number in range(first_day, end_day):
        day = simulation._day(number, first_id)
        ids = np.arange(first_id, first_id + len(day.second))
        parts.append((ids, day.second + number * DAY_S, day.customer_id, day.terminal_id, day.cents, day.scenario))
        first_id += len(ids)
    ids, seconds, customers, terminals, cents, scenarios = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return {
        "transaction_id": ids,
        "tx_unix_seconds": seconds + (simulation.start - type(simulation.start)(1970, 1, 1)).days * DAY_S,
        "customer_id": customers,
        "terminal_id": terminals,
        "tx_amount": cents / 100,
        "tx_time_seconds": seconds,
        "tx_fraud": (scenarios > 0).astype("i4"),
        "tx_fraud_scenario": scenarios.astype("i4"),
        "is_current": np.ones(len(ids), dtype=bool),
    }


def features_of(rows: Columns) -> Features:
    """Model inputs of rows; those of the first HISTORY_DAYS lack their history."""
    columns = dict(rows)
    for entity in ("terminal", "customer"):
        columns.update(build_features._entity_features(columns, entity))
    columns = build_features._with_derived_columns(build_features._sorted_current(columns))
    return Features(matrix_of(columns, MODEL_INPUTS), columns["tx_time_days"], columns["tx_fraud"])


def train(features: Features, month: int) -> Champion:
    """Champion trained after `month` files, with the first default candidate."""
    import numpy as np

    windows = train_model.time_windows(0, month * FILE_DAYS - 1, train_model.DEFAULTS)
    rows = features.between(*windows["train"])
    learner, params = grid_points(DEFAULT_CANDIDATES)[0]
    model = LEARNERS[learner].fit(rows.matrix, rows.labels, np.ones(len(rows.labels)), params, 0, 1)
    scorer = Scorer(learner, MODEL_INPUTS, model)
    return Champion(month, scorer, fits.profile_of(scorer, *rows, (1.0, 1.0)))


def compare(champion: Champion, features: Features, file: int, situation: str, seed: int) -> dict[str, Any]:
    """Outcome of each check of one file, and its exceedance as a multiple of the threshold."""
    first_day, last_day = file * FILE_DAYS, (file + 1) * FILE_DAYS - 1
    edges = champion.profile["edges"]
    counts: drift.Counts = {name: [] for name in edges}
    labels = {}
    for day in range(first_day, last_day + 1):
        rows = features.between(day, day)
        columns = dict(zip(MODEL_INPUTS, rows.matrix.T, strict=True))
        for name, of_day in drift.bin_counts({**columns, "score": champion.scorer.score(rows.matrix)}, edges).items():
            counts[name].append(of_day)
        if day <= last_day - LABEL_DELAY_DAYS:
            labels[day] = (len(rows.labels), int(rows.labels.sum()))
    results = drift.measure(champion.profile, counts, first_day, labels, 0)
    return {
        "situation": situation,
        "seed": seed,
        "month": champion.month,
        "file": file,
        "checks": {
            check: {
                "outcome": results[check]["outcome"],
                "multiple": results[check]["exceedance"] / results[check]["threshold"]
                if results[check]["threshold"]
                else None,
                "reason": results[check]["reason"],
            }
            for check in CHECKS
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    """One row per check, situation and month of training; of a changed file only the check that should warn."""
    return markdown(
        [
            *("check", "situation", "trained after, months", "data sets", "files", "warnings", "share"),
            *("exceedance / threshold: lowest", "median", "highest"),
        ],
        _rows(results),
    )


def _rows(results: list[dict[str, Any]]) -> Iterator[list[Any]]:
    for situation in dict.fromkeys(result["situation"] for result in results):
        for check in [SEEN_BY[situation]] if situation in SEEN_BY else CHECKS:
            for month in sorted({result["month"] for result in results if result["situation"] == situation}):
                chosen = [result for result in results if (result["situation"], result["month"]) == (situation, month)]
                outcomes = [result["checks"][check] for result in chosen]
                warnings = sum(outcome["outcome"] == "drift" for outcome in outcomes)
                multiples = [outcome["multiple"] for outcome in outcomes if outcome["multiple"] is not None]
                yield [
                    check,
                    situation,
                    month,
                    len({result["seed"] for result in chosen}),
                    len(chosen),
                    warnings if multiples else "not_calibrated",
                    f"{warnings / len(chosen):.1%}" if multiples else "",
                    *([min(multiples), median(multiples), max(multiples)] if multiples else ["", "", ""]),
                ]


if __name__ == "__main__":
    main()
