"""The fraud model in MLflow's flavour ``python_function``.

MLflow's model contains this module and `learners` as a separate package and does not need the platform; hence the
relative import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .learners import Scorer, matrix_of  # noqa: TID252 - in MLflow, it is in another package

if TYPE_CHECKING:
    import pandas


def _load_pyfunc(path: str) -> FraudModel:
    """MLflow's entry point, called with the path of the model file."""
    return FraudModel(Scorer.from_json(Path(path).read_bytes()))


class FraudModel:
    """Fraud model that scores rows of inputs."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pandas.DataFrame:
        """Return a column ``score``, the probability of fraud of each row.

        ``params={"reasons": n}`` adds ``reason_1`` to ``reason_n``, the inputs that raise a row's score most, and
        ``contribution_1`` to ``contribution_n``, by how many log-odds; None and NaN if fewer inputs raise it.
        Raises ValueError if an input is missing or not a number.
        """
        import pandas

        missing = [name for name in self.scorer.features if name not in model_input]
        if missing:
            raise ValueError("missing columns: {}".format(", ".join(missing)))
        matrix = matrix_of(model_input, self.scorer.features)
        result = pandas.DataFrame({"score": self.scorer.score(matrix)}, index=getattr(model_input, "index", None))
        number = int((params or {}).get("reasons", 0))
        if number > 0:
            names, contributions = self.scorer.reasons(matrix, number)
            for index in range(contributions.shape[1]):
                result[f"reason_{index + 1}"] = pandas.array([row[index] for row in names], dtype=object)
                result[f"contribution_{index + 1}"] = contributions[:, index]
        return result
