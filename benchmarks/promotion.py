"""Time and memory of the promotion gate's comparison or, with --simulations, the error rates of its rule."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, Any

from benchmarks.common import log_progress, markdown, options, write_results
from ml_platform.model.promotion import Facts, PromotionRule, Scores, decide

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FRAUD_SHARE = 0.008
WEEKLY_ROWS_PER_CUSTOMER = 11


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument(
        "--thousand-rows", type=int, nargs="+", default=[58, 1000], metavar="N", help="sizes (default: 58 1000)"
    )
    parser.add_argument("--replicates", type=int, default=1000, help="bootstrap replicates (default: 1000)")
    parser.add_argument(
        "--simulations",
        type=int,
        metavar="N",
        help="instead, count promotions in N simulated weeks of equally good models, and of a better challenger",
    )
    arguments = parser.parse_args()
    rule = PromotionRule(replicates=arguments.replicates)
    if arguments.simulations:
        rates = [error_rates(rule, strength, arguments.simulations) for strength in (1.0, 1.15)]
        write_results(arguments.json, rates, lambda: rates_table(rates))
    else:
        results = [measure(rule, 1000 * size) for size in sorted(arguments.thousand_rows)]
        write_results(arguments.json, results, lambda: table(results))


def scored_week(
    seed: int,
    *,
    rows: int = 4000,
    frauds: int = 120,
    customers: int = 400,
    challenger: float = 1.0,
    champion: float = 1.0,
) -> dict[str, npt.NDArray[np.float64]]:
    """Arguments of `Scores`: rows scored by two models of the given strengths.

    Models of equal strength are equally good. Scores are the sum of a component common to both models, one of the model
    alone, and one shared by the rows of a customer.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    label = np.zeros(rows)
    label[random.choice(rows, frauds, replace=False)] = 1
    customer = random.integers(0, customers, rows)
    common = random.normal(size=rows)
    scores = {
        name: 2.2 * strength * label
        + common
        + random.normal(scale=0.8, size=rows)
        + random.normal(scale=0.5, size=customers)[customer]
        for name, strength in (("challenger", challenger), ("champion", champion))
    }
    return {"label": label, **scores, "customer_id": customer.astype(float)}


def error_rates(rule: PromotionRule, challenger: float, simulations: int) -> dict[str, Any]:
    """Shares of simulated weeks in which the challenger was promoted, and in which it was found to be worse.

    For equally good models, the expected share is (1 - confidence) / 2 each.
    """
    promoted = worse = 0
    for seed in range(simulations):
        week = scored_week(seed, rows=20_000, frauds=300, customers=1500, challenger=challenger)
        decision = decide(rule, Scores(**week), Facts(champion="1"))
        promoted += decision.promote
        worse += decision.figures["average_precision_difference_upper"] < 0
    result = {
        "strength": challenger,
        "simulations": simulations,
        "promoted": promoted / simulations,
        "worse": worse / simulations,
    }
    log_progress(str(result))
    return result


def measure(rule: PromotionRule, rows: int) -> dict[str, Any]:
    """Seconds for random scores of `rows` rows, and the peak memory of this process so far."""
    week = scored_week(
        0, rows=rows, frauds=round(FRAUD_SHARE * rows), customers=max(1, rows // WEEKLY_ROWS_PER_CUSTOMER)
    )
    started = time.monotonic()
    figures = decide(rule, Scores(**week), Facts(champion="1")).figures
    result = {
        "rows": rows,
        "frauds": figures["frauds"],
        "replicates": figures["replicates"],
        "seconds": time.monotonic() - started,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    log_progress(str(result))
    return result


def table(results: list[dict[str, Any]]) -> str:
    """One row per size."""
    header = ["scored rows", "frauds", "replicates", "decision, s", "peak MB"]
    forms = {"rows": ",", "frauds": ",", "replicates": ",", "seconds": ".1f", "memory_mb": ","}
    return markdown(header, [[format(result[name], form) for name, form in forms.items()] for result in results])


def rates_table(rates: list[dict[str, Any]]) -> str:
    """One row per strength of the challenger; the champion's is 1."""
    header = ["challenger's strength", "simulated weeks", "promoted", "found worse"]
    forms = {"strength": ".2f", "simulations": ",", "promoted": ".1%", "worse": ".1%"}
    return markdown(header, [[format(rate[name], form) for name, form in forms.items()] for rate in rates])


if __name__ == "__main__":
    main()
