"""What is added to Pylorus in one place is everywhere: the table "Adding to Pylorus itself" of docs/extending.md."""

import numpy as np
import pandas as pd
import pytest

import pylorus
from pylorus.data.augmentation import TRANSFORMS, Transform, draw_nothing
from pylorus.evaluation.confusion import CLASS_METRICS, NEITHER, ClassMetric
from pylorus.launch.sweep_table import build_sweep_table
from tests.conftest import TINY

WORDS = ["data=folders", r"data.group='patient_\d+'", "data.image_size=32", "data.workers=0", "trainer=cpu",
         "trainer.progress=false", "model=timm", f"model.name={TINY}", "model.weights=none", "augment=upside_down",
         "stage=warm"]  # fmt: skip


JACCARD = ClassMetric(
    "jaccard",
    "Jaccard",
    "TP / (TP + FP + FN)",
    lambda counts: counts.true_positives / np.maximum(counts.predicted + counts.present - counts.true_positives, 1),
    lambda present, predicted: (present & predicted, present | predicted),
    undefined=NEITHER,
    is_in_tables=True,
)


def turn_upside_down(image, *_):
    return np.ascontiguousarray(image[::-1])


@pytest.fixture(scope="module")
def trained(synthetic_root, tmp_path_factory):
    """A run with a metric and a transform that are one entry each, and with files of its own for transform and stage."""
    folder = tmp_path_factory.mktemp("registries")
    for name, text in {
        "augment/upside_down": "name: upside_down\ntransforms: {UpsideDown: {p: 1.0}}",
        "stage/warm": "# @package _global_\nrun: [warm]\nstages: {warm: {learn: head, epochs: 1, monitor: jaccard}}",
    }.items():
        (folder / "conf" / name).parent.mkdir(parents=True)
        (folder / "conf" / f"{name}.yaml").write_text(text)
    words = [f"data.root={synthetic_root}", *WORDS, f"cache.folder={folder / 'cache'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CLASS_METRICS, "jaccard", JACCARD)
        patch.setitem(TRANSFORMS, "UpsideDown", Transform(draw_nothing, turn_upside_down))
        yield pylorus.train(words, folder=folder / "sweep" / "0", config_dir=folder / "conf")


def read(folder, pattern):
    return next(folder.rglob(pattern)).read_text(encoding="utf-8")


def test_a_metric_is_one_entry(trained):
    run = trained.folder
    assert "warm/val/jaccard/average" in read(run, "metrics.csv").splitlines()[0]
    assert "Jaccard" in read(run, "*study-*.csv")
    assert "Jaccard" in read(run, "*classes-*.csv")
    assert "test Jaccard" in build_sweep_table(run.parent).columns
    assert "Jaccard" in read(run, "MODEL_CARD.md")
    assert "Jaccard" in read(run, "*checklist*.csv")
    assert {f"test/jaccard/{name}" for name in pylorus.load_model(run).short_names} <= set(trained.metrics)


def test_a_transform_is_an_entry_and_a_stage_is_a_file(trained):
    assert "UpsideDown" in read(trained.folder, "config.yaml")
    assert trained.stage == "warm"
    assert pd.read_csv(trained.folder / "warm" / "metrics.csv")["warm/train/loss"].notna().all()
