"""The fraud model as MLflow loads it (flavour ``python_function``).

MLflow's model carries this module and `learners` in a package of its own, so that it needs nothing of the platform:
hence the relative import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .learners import Scorer, matrix_of  # noqa: TID252 - the copy in MLflow has another package

if TYPE_CHECKING:
    import pandas


def _load_pyfunc(path: str) -> FraudModel:
    """What MLflow calls with the path of the model file."""
    return FraudModel(Scorer.from_json(Path(path).read_bytes()))


class FraudModel:
    """Scores transactions by their inputs."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pandas.DataFrame:
        """A column ``score``, the probability of fraud of each row.

        With ``params={"reasons": n}`` also ``reason_1`` to ``reason_n``, the inputs that raise a row's score most, and
        ``contribution_1`` to ``contribution_n``, by how many log-odds; None and NaN where fewer inputs do.
        Raises ValueError: an input is missing, or no number.
        """
        import pandas

        missing = [name for name in self.scorer.features if name not in model_input]
        if missing:
            raise ValueError("there is no column {}".format(", ".join(missing)))
        matrix = matrix_of(model_input, self.scorer.features)
        answer = pandas.DataFrame({"score": self.scorer.score(matrix)}, index=getattr(model_input, "index", None))
        number = int((params or {}).get("reasons", 0))
        if number > 0:
            names, contributions = self.scorer.reasons(matrix, number)
            for place in range(contributions.shape[1]):
                answer[f"reason_{place + 1}"] = pandas.array([row[place] for row in names], dtype=object)
                answer[f"contribution_{place + 1}"] = contributions[:, place]
        return answer
