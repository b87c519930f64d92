"""Gradual unfreezing: more than two stages, each from the best epoch of the one before, resumed in any of them."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pylorus.core.errors import PylorusError
from pylorus.launch.train import run
from pylorus.report.page import write_report
from tests.conftest import TINY

STAGES = ["pretrain", "last_block", "last_half", "finetune"]
WORDS = ["data=folders", r"data.group=patient_\d+", "data.image_size=32", "data.workers=0", "trainer=cpu", "model=timm",
         f"model.name={TINY}", "model.weights=none", "trainer.progress=false", "report=false", "trainer.precision=32",
         "stage=gradual", "optimizer.lr=0.01", "stages.last_half.epochs=2",
         *(f"stages.{name}.epochs=1" for name in STAGES if name != "last_half")]  # fmt: skip


class KilledError(BaseException):
    """What a run does not see coming."""


@pytest.fixture(scope="module")
def whole_run(prepare_run_folder):
    """A finished run of four stages. Read it only."""
    folder = prepare_run_folder(*WORDS)
    run(folder)
    return folder


def test_four_stages_train_ever_more_at_ever_lower_rates_and_one_is_shipped(whole_run):
    network = json.loads((whole_run.path / "network.json").read_text())
    trained = [sum(block["learning"][name] for block in network) for name in STAGES]
    assert trained == sorted(set(trained))
    assert trained[-1] == sum(block["parameters"] for block in network)
    bundle = json.loads((whole_run.path / "model" / "model.json").read_text())
    names = [stage["name"] for stage in bundle["training"]["stages"]]
    assert names == STAGES[: len(names)]
    assert bundle["shipped"]["name"] == names[-1] == whole_run.shipped.name
    log = (whole_run.path / "run.log").read_text()
    assert f"last_block: {TINY}" in log
    assert "training last:1, from layer4.0 on (" in log


def test_the_report_shows_four_stages_in_order(whole_run, tmp_path):
    write_report([whole_run.path], tmp_path / "report")
    settings = pd.read_csv(tmp_path / "report" / "tables" / "training-settings.csv")
    assert list(settings["stage"]) == STAGES
    assert list(settings["peak learning rate"].astype(float)) == pytest.approx([0.01, 0.005, 0.002, 0.001])
    assert list(settings["trained layers"]) == ["head", "last:1, from layer4.0 on", "last:50%, from layer1.0 on", "all"]
    (study,) = (tmp_path / "report" / "tables").glob("study-*.csv")  # stages below each other: four are too wide
    assert list(pd.read_csv(study)["stage"].ffill().drop_duplicates()) == STAGES
    for name in STAGES:
        assert (tmp_path / "report" / "figures" / f"curves-{name}.png").is_file()


def test_a_run_killed_in_the_third_stage_resumes_to_the_same_model(prepare_run_folder, whole_run, monkeypatch):
    killed, replace = prepare_run_folder(*WORDS), Path.replace

    def fail_in_third_stage(path: Path, target: Path) -> Path:
        done = replace(path, target)
        if killed.path / "last_half" in Path(target).parents:
            raise KilledError
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail_in_third_stage)
        with pytest.raises(KilledError):
            run(killed)
    assert not (killed.path / "finetune").exists()
    run(killed)
    models = [load_file(each.path / "model" / "model.safetensors") for each in (killed, whole_run)]
    assert all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())
    for name in STAGES:
        one, other = (pd.read_parquet(each.get_predictions_path(name, "test")) for each in (killed, whole_run))
        pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_a_misspelt_block_is_refused_before_any_image_is_read(prepare_run_folder):
    folder = prepare_run_folder(*WORDS, "stages.last_half.learn=layer44")
    with pytest.raises(
        PylorusError, match=r'^stages\.last_half\.learn: ResNet has no block "layer44".*Did you mean "layer4"'
    ):
        run(folder)
    assert not (folder.path / "catalog.parquet").exists()
