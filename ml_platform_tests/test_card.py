"""The words of a model card."""

from typing import Any

import pytest

from ml_platform.lake.reports import TrainingReport
from ml_platform.model.card import quality_in_words

ROW = {"alerts_per_day": 50, "precision": 0.42, "recall": 0.751, "amount_share": 0.888}


@pytest.mark.parametrize(
    ("row", "budget", "words"),
    [
        (
            ROW,
            50,
            "of 50 alerts a day in the held-out week 21 are frauds; they catch 75% of the frauds and 89% of the money",
        ),
        (ROW, 30, "its report has no figures for 30 alerts a day"),
        ({**ROW, "recall": None}, 50, "no frauds in the held-out week"),
    ],
)
def test_the_quality_is_said_of_the_budget_that_is_in_use(row: dict[str, Any], budget: int, words: str):
    assert quality_in_words(TrainingReport.model_construct(tables={"thresholds": [row]}), budget) == words
