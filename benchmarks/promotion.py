"""What the gate's comparison costs: 1,000 bootstrap replicates of two models' scores, and DeLong's method beside it."""

from __future__ import annotations

import resource
import time
from typing import Any

from benchmarks.common import markdown, options, say, write_results
from ml_platform.model.promotion import delong, paired_bootstrap

FRAUD_SHARE = 0.008
WEEKLY_ROWS_PER_CUSTOMER = 11


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument(
        "--thousand-rows", type=int, nargs="+", default=[58, 1000], metavar="N", help="sizes (default: 58 1000)"
    )
    parser.add_argument("--replicates", type=int, default=1000, help="bootstrap replicates (default: 1000)")
    arguments = parser.parse_args()
    results = [measure(1000 * size, arguments.replicates) for size in sorted(arguments.thousand_rows)]
    write_results(arguments.json, results, lambda: table(results))


def measure(rows: int, replicates: int) -> dict[str, Any]:
    """Seconds for random scores of `rows` rows, and the largest memory of this process so far."""
    import numpy as np

    random = np.random.default_rng(0)
    label = (random.random(rows) < FRAUD_SHARE).astype(np.int64)
    challenger, champion = (label + random.normal(size=rows) for _ in range(2))
    customers = random.integers(0, max(1, rows // WEEKLY_ROWS_PER_CUSTOMER), rows)
    started = time.monotonic()
    found = paired_bootstrap(label, challenger, champion, customers, replicates=replicates)
    bootstrapped = time.monotonic()
    delong(label, challenger, champion)
    result = {
        "rows": rows,
        "frauds": int(label.sum()),
        "replicates": found.replicates,
        "bootstrap_s": bootstrapped - started,
        "delong_s": time.monotonic() - bootstrapped,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    say(str(result))
    return result


def table(results: list[dict[str, Any]]) -> str:
    """A row for each size."""
    header = ["scored rows", "frauds", "replicates", "bootstrap, s", "DeLong, s", "peak MB"]
    forms = {"rows": ",", "frauds": ",", "replicates": ",", "bootstrap_s": ".1f", "delong_s": ".2f", "memory_mb": ","}
    return markdown(header, [[format(result[name], form) for name, form in forms.items()] for result in results])


if __name__ == "__main__":
    main()
