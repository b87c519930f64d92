"""The table that a stage prints states on which images its best epoch was chosen."""

import logging

import numpy as np
import pandas as pd
import pytest

from pylorus.config.schema import StageConfig
from pylorus.model.classifier import StagePlan
from pylorus.runs.predictions import build_prediction_table, check_predictions
from pylorus.training.stage import StageResult, log_stage_table


@pytest.mark.parametrize(
    ("epochs", "validated_on", "title"),
    [
        (4, "val", "s: epoch 1 of 4, best by loss on validation images"),
        (4, "test", "s: epoch 1 of 4, best by loss on the test images"),
        (1, "val", "s: epoch 1 of 1, the only one"),
    ],
)
def test_the_title_states_what_selected_the_epoch(caplog, epochs, validated_on, title):
    rows = pd.DataFrame({"sample_id": ["a", "b"], "group": ["a", "b"], "label": [0, 1]})
    logits = np.eye(2, dtype=np.float32)
    table = build_prediction_table(rows, logits, names=["GC", "GU"], split="val")
    predictions = {part: check_predictions(table) for part in ("val", "test")}
    with caplog.at_level(logging.INFO, logger="pylorus"):
        log_stage_table(
            StagePlan("s", StageConfig(), 0, 0), StageResult(epochs, 1, predictions), validated_on=validated_on
        )
    assert title in caplog.text
