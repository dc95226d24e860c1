"""Speed of the portable scorer on one core: a single row with the model loaded, a large batch, and contributions.

The model is XGBoost with 100 rounds of depth 5 on 27 synthetic inputs.
"""

from __future__ import annotations

import time

from benchmarks.common import markdown, options, write_results
from spark_jobs.features.registry import MODEL_INPUTS
from spark_jobs.training.learners import LEARNERS, Scorer

FIT_ROWS = 200_000


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows per batch (default: 1000000)")
    arguments = parser.parse_args()
    results = measure(arguments.rows)
    rows = [(what, f"{value:,.3f}" if value < 10 else f"{value:,.0f}") for what, value in results.items()]
    write_results(arguments.json, results, lambda: markdown(["one thread", ""], rows))


def measure(rows: int) -> dict[str, float]:
    """Milliseconds for one row, and rows per second, each the best of five."""
    import numpy as np

    draw = np.random.default_rng(0)
    matrix = draw.gamma(2, 10, size=(max(rows, FIT_ROWS), len(MODEL_INPUTS))).astype("f4")
    label = (matrix[:FIT_ROWS, :3].sum(axis=1) + draw.normal(0, 20, FIT_ROWS) > 110).astype("i4")
    params = {"rounds": 100, "max_depth": 5, "learning_rate": 0.1, "max_bin": 1024}
    model = LEARNERS["xgboost"].fit(matrix[:FIT_ROWS], label, np.ones(FIT_ROWS), params, 0, 2)
    scorer = Scorer.from_json(Scorer("xgboost", MODEL_INPUTS, model).to_json())

    def seconds(work: object, repeat: int, number: int) -> float:
        best = []
        for _ in range(repeat):
            started = time.perf_counter()
            for _ in range(number):
                work()  # type: ignore[operator]
            best.append((time.perf_counter() - started) / number)
        return min(best)

    one, batch, some = matrix[:1], matrix[:rows], matrix[:2000]
    return {
        "one row, ms": 1000 * seconds(lambda: scorer.score(one), 5, 200),
        "rows per second": rows / seconds(lambda: scorer.score(batch), 5, 1),
        "contributions per second": len(some) / seconds(lambda: scorer.contributions(some), 5, 1),
    }


if __name__ == "__main__":
    main()
