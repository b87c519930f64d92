"""Real images and real ImageNet weights, if a folder `shared` exists beside the project; skipped otherwise."""

from pathlib import Path

import pandas as pd
import pytest

SHARED = Path(__file__).parents[3] / "shared"
IMAGES, WEIGHTS = SHARED / "data" / "bloodcells", SHARED / "weights" / "mobilenetv2_100.safetensors"

pytestmark = pytest.mark.skipif(
    not (IMAGES.is_dir() and WEIGHTS.is_file()), reason=f"no real images and weights in {SHARED}"
)


def test_a_new_head_on_frozen_imagenet_features_recognises_real_cells(train, tmp_path):
    found = train(
        "data=folders", f"data.root={IMAGES}", r"data.group=BloodImage_\d+", "model=timm", "model.name=mobilenetv2_100",
        f"model.weights={WEIGHTS}", "model.args.pad_type=same", "stage=pretrain", "stages.pretrain.epochs=5",
        "data.image_size=160", "report=false",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    folder = next(tmp_path.glob("outputs/20*/*"))
    table = pd.read_parquet(folder / "pretrain" / "predictions-test.parquet")
    assert len(table) == 120
    assert (table["true"] == table["predicted"]).mean() > 0.75
    split = pd.read_csv(folder / "split.csv")
    assert (split.groupby("group")["split"].nunique() == 1).all()
