"""The results in the report are those of the exported model in every index, whichever stage validation chooses."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from PIL import Image

from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_percent
from pylorus.core.io import read_json, write_text
from pylorus.deploy.bundle_files import read_description
from pylorus.deploy.model import load_bundle
from pylorus.launch.sweep_table import build_sweep_table, get_objective
from pylorus.launch.train import run
from pylorus.report import page
from pylorus.runs.folder import RunFolder, StageScore, explain_choice, select_stage
from tests.conftest import TINY

CLASSES = ("gastric_cancer", "gastric_ulcer", "chronic_gastritis")
NAMES = ("GC", "GU", "CG")
STAGES = ("pretrain", "finetune")
WORDS = ["data=folders", r"data.group=patient_\d+", "data.image_size=32", "data.workers=0", "trainer=cpu",
         "trainer.precision=bf16", "trainer.progress=false", "trainer.batch_size=8", "model=timm", f"model.name={TINY}",
         "model.weights=none", f"data.classes=[{','.join(CLASSES)}]", f"data.short_names=[{','.join(NAMES)}]",
         "augment=none", "data.test_fraction=0.3", "data.val_fraction=0.3", "stages.pretrain.learn=all",
         "stages.pretrain.monitor=accuracy", "stages.finetune.monitor=accuracy"]  # fmt: skip
BETTER = {
    "pretrain": ["stages.pretrain.epochs=3", "stages.pretrain.lr=0.01", "stages.finetune.epochs=1", "stages.finetune.lr=0.5"],
    "finetune": ["stages.pretrain.epochs=1", "stages.pretrain.lr=0", "stages.finetune.epochs=3", "stages.finetune.lr=0.01",
                 "averaging=mean"],
}  # fmt: skip
"""Learning rates with which one stage is better than the other; with averages of weights, and without."""
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Class folders of noise around a colour, two images a patient: easy to learn, but not to perfection."""
    root, chance = tmp_path_factory.mktemp("drawn") / "images", np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(24):
            colour = chance.normal(110, 35, 3)
            colour[label] += 60
            pixels = np.clip(colour + chance.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"patient_{label}{number // 2:02d}_{number % 2}.png")
    return root


@pytest.fixture(scope="module")
def train_run(compose_config, images, tmp_path_factory) -> Callable[..., RunFolder]:
    """Runs in bf16 in which the named stage is the better one, each made once; to be read only."""
    folders: dict[tuple[str, ...], RunFolder] = {}
    sweep = tmp_path_factory.mktemp("sweep")

    def make(better: str, *words: str) -> RunFolder:
        if (better, *words) not in folders:
            folder = RunFolder(sweep / str(len(folders)))
            overrides = [f"data.root={images}", *WORDS, *BETTER[better], *words]
            with folder.set_starting(overrides):
                write_text(folder.config, OmegaConf.to_yaml(compose_config(*overrides)))
            with pytest.MonkeyPatch.context() as patched:
                for name in ("render_svg", "render_png"):  # drawing takes most of a report's time
                    patched.setattr(page, name, lambda drawing: drawing.alt.encode())
                run(folder)
            folders[(better, *words)] = folder
        return folders[(better, *words)]

    return make


@pytest.fixture(scope="module")
def evaluate_bundle(train_run, images, tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """What `pylorus predict RUN/model TEST --evaluate` finds on the run's own test images."""

    def evaluate(folder: RunFolder, *, batch: int = 32) -> dict[str, Any]:
        place = tmp_path_factory.mktemp("predicted")
        split = pd.read_csv(folder.path / "split.csv", dtype=str)
        for path in split.loc[split["split"] == "test", "path"]:
            (place / "test" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / path, place / "test" / path)
        words = [
            str(folder.path / "model"),
            str(place / "test"),
            "--group",
            r"patient_\d+",
            "--evaluate",
            "--batch",
            str(batch),
        ]
        with pytest.raises(SystemExit) as ended:
            main(["predict", *words, "--output", str(place / "found.parquet")])
        assert ended.value.code == 0
        about = json.loads((place / "found.parquet.about.json").read_text())
        return about["evaluation"] | {"table": pd.read_parquet(place / "found.parquet")}

    return evaluate


def description(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "model" / "model.json").read_text())


def rows_of(folder: RunFolder, table: str, stage: str) -> pd.DataFrame:
    found = pd.read_csv(folder.path / "report" / "tables" / f"{table}.csv")
    return found[found["stage"] == stage].reset_index(drop=True)


def number(value: object) -> float:
    return math.nan if value in (None, "–") else float(value)


def assert_same(reported: object, predicted: dict[str, Any] | float | None, *, per_cent: bool = False) -> None:
    value = predicted["value"] if isinstance(predicted, dict) else predicted
    share = number(reported) / (100 if per_cent else 1)
    # Tables in CSV have six digits.
    assert share == pytest.approx(number(value), rel=5e-6, abs=TOLERANCE, nan_ok=True)


@pytest.mark.parametrize("stage", STAGES)
def test_the_stage_that_validation_chooses_is_named_everywhere(train_run, stage, capsys):
    folder = train_run(stage)
    run(folder)
    *_, line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model: ")]
    assert f"holds stage {stage} (highest validation accuracy: " in line
    found = description(folder)["shipped"]
    assert (found["name"], found["chosen_by"]) == (stage, "accuracy")
    for name, accuracy in found["accuracy"].items():
        table = pd.read_parquet(folder.get_predictions_path(name, "val"))
        assert accuracy == (table["true"] == table["predicted"]).mean()
    assert found["accuracy"][stage] == max(found["accuracy"].values()) > min(found["accuracy"].values())
    assert (folder.read_status()["shipped_stage"], folder.read_status()["shipped_by"]) == (stage, "accuracy")
    assert (
        f"The shipped network is that of stage **{stage}** of its run (highest validation accuracy"
        in (folder.path / "model" / "MODEL_CARD.md").read_text()
    )
    page = (folder.path / "report" / "report.html").read_text()
    assert re.search(rf"{stage}, selected by validation accuracy", page)
    for text in (page, (folder.path / "model" / "MODEL_CARD.md").read_text()):
        averaged = re.search(
            "mean of the weights of|the only one in the mean", text
        )  # rounding decides on the best epoch
        assert (averaged is not None) == (stage == "finetune")
    runs = pd.read_csv(folder.path / "report" / "tables" / "runs.csv")
    assert runs["shipped stage"].tolist() == [stage]
    assert get_objective(folder) == found["accuracy"][stage]


@pytest.mark.parametrize("stage", STAGES)
def test_report_card_bundle_and_prediction_agree_in_every_index(train_run, evaluate_bundle, stage):
    folder = train_run(stage)
    predicted, written = evaluate_bundle(folder), description(folder)

    overall = rows_of(folder, "overall", stage).iloc[0]
    for column, index, per_cent in (
        ("accuracy, %", "accuracy", True),
        ("balanced accuracy, %", "balanced_accuracy", True),
        ("macro F1, %", "macro_f1", True),
        ("macro AUROC", "macro_auroc", False),
        ("macro average precision", "macro_average_precision", False),
        ("Cohen's κ", "cohen_kappa", False),
        ("MCC", "mcc", False),
    ):
        assert_same(overall[column], predicted[index], per_cent=per_cent)

    by_class = rows_of(folder, "classes-test-resnet", stage).set_index("class")
    for name in NAMES:
        for index in ("precision", "sensitivity", "specificity", "NPV", "F1"):
            assert_same(by_class.loc[name, f"{index}, %"], predicted[index.lower()][name], per_cent=True)
        assert_same(by_class.loc[name, "AUROC"], predicted["auroc"][name])
        assert_same(by_class.loc[name, "average precision"], predicted["average_precision"][name])

    confusion = rows_of(folder, "confusion-matrices", stage)
    counts = confusion[[column for column in confusion if column.startswith("predicted")]].to_numpy()
    assert counts.tolist() == predicted["confusion"]

    calibration = rows_of(folder, "calibration", stage).iloc[1]  # the second row is at the temperature
    for index, title in (("ece", "ECE"), ("brier", "Brier"), ("nll", "NLL")):
        assert_same(calibration[title], predicted[index])
    assert_same(written["calibration"]["ece_after"], predicted["ece"]["value"])
    assert f"{written['calibration']['temperature']:.2f}" in calibration["probabilities"]

    threshold = rows_of(folder, "threshold", stage).iloc[0]
    decision = predicted["decision"]
    assert_same(threshold["threshold"], decision["threshold"])
    for index in ("sensitivity", "specificity", "precision", "NPV"):
        assert_same(threshold[f"test {index}, %"], decision[index.lower()], per_cent=True)

    for index in ("accuracy", "sensitivity", "specificity", "precision", "auroc"):
        here, there = written["test"][index], predicted[index]
        for name in NAMES if index != "accuracy" else (None,):
            mine, other = (each if name is None else each[name] for each in (here, there))
            for bound in ("value", "low", "high"):
                assert_same(mine[bound], other[bound])
    assert_same(written["decision"]["test"]["GC"]["sensitivity"]["value"], decision["sensitivity"])
    assert_same(written["abstention"]["unlike_test"]["value"], predicted["unlike"])
    assert_same(written["abstention"]["answered_test"]["value"], predicted["answered"])
    assert_same(written["abstention"]["accuracy_answered"]["value"], predicted["accuracy_answered"])

    card = (folder.path / "model" / "MODEL_CARD.md").read_text()
    assert f"accuracy {format_percent(predicted['accuracy']['value'])} % (" in card
    assert f"The model answers {format_percent(predicted['answered']['value'])} % (" in card
    assert f"| {predicted['auroc']['GC']['value']:.3f} (" in card


@pytest.mark.parametrize("stage", STAGES)
def test_predicted_probabilities_are_those_of_the_report_although_training_was_in_bf16(
    train_run, evaluate_bundle, stage
):
    folder = train_run(stage)
    table = evaluate_bundle(folder)["table"]
    bundle = load_bundle(folder.path / "model")
    assert bundle.description.training.precision == "bf16"
    saved = pd.read_parquet(folder.get_predictions_path(stage, "test"))
    columns = [f"logit/{name}" for name in NAMES]
    expected = np.sort(bundle.calibrate_logits(saved[columns].to_numpy(dtype=np.float64)), axis=0)
    shares = np.sort(table[[f"probability/{name}" for name in NAMES]].to_numpy(), axis=0)
    assert np.abs(shares - expected).max() < TOLERANCE

    mistakes = pd.read_csv(folder.path / "report" / "tables" / "worst-mistakes.csv")
    wrong = table[table["true"] != table["predicted"]]
    surest = wrong[[f"probability/{name}" for name in NAMES]].max(axis=1).sort_values(ascending=False)[: len(mistakes)]
    assert mistakes["predicted probability, %"].to_numpy() / 100 == pytest.approx(surest.to_numpy(), abs=TOLERANCE)


def test_deploy_stage_overrides_the_choice_and_says_so(train_run, evaluate_bundle, capsys):
    folder = train_run("pretrain", "deploy.stage=finetune")
    run(folder)
    assert "holds stage finetune (named by deploy.stage; validation accuracy" in capsys.readouterr().out
    assert folder.read_status()["shipped_stage"] == "finetune"
    card = (folder.path / "model" / "MODEL_CARD.md").read_text()
    assert "The shipped network is that of stage **finetune** of its run (named by deploy.stage" in card
    page = (folder.path / "report" / "report.html").read_text()
    assert "finetune, named by deploy.stage" in page
    assert_same(
        rows_of(folder, "overall", "finetune").iloc[0]["accuracy, %"],
        evaluate_bundle(folder)["accuracy"],
        per_cent=True,
    )


def test_the_shipped_stage_has_the_same_weights_whether_or_not_training_continued(train_run):
    """An earlier stage is shipped as it was, not as later stages changed it."""
    whole = train_run("pretrain")
    alone = train_run("pretrain", "stage=pretrain")
    first, second = (load_bundle(folder.path / "model").classifier.network.state_dict() for folder in (whole, alone))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert alone.read_status()["shipped_by"] == "only"
    assert [stage["name"] for stage in description(whole)["training"]["stages"]] == ["pretrain"]


def test_temporary_files_for_the_bundle_are_removed(train_run):
    for stage in STAGES:
        left = {path.name for name in STAGES for path in (train_run(stage).path / name / "checkpoints").iterdir()}
        assert left == {"best.ckpt"}


def test_a_sweep_orders_its_jobs_by_the_shipped_stage(train_run):
    folders = [train_run("pretrain"), train_run("finetune")]
    table = build_sweep_table(folders[0].path.parent)
    for folder in folders:
        job = table[table["job"] == folder.path.name]
        assert job.loc[job["shipped"] == "yes", "stage"].tolist() == [folder.read_status()["shipped_stage"]]
    order = table.loc[table["shipped"] == "yes", "val accuracy"].tolist()
    assert order == sorted(order, reverse=True)


def test_a_choice_on_test_images_is_marked(train_run, evaluate_bundle):
    folder = train_run("pretrain", "data.validation=test")
    abstention = description(folder)["abstention"]
    for batch in (1, 7, 32):  # here the very images that fix the thresholds are predicted
        predicted = evaluate_bundle(folder, batch=batch)
        assert_same(abstention["unlike_test"]["value"], predicted["unlike"])
        assert_same(abstention["answered_test"]["value"], predicted["answered"])
    card = (folder.path / "model" / "MODEL_CARD.md").read_text()
    assert "so the choice was made on the test images" in card
    assert "selected by accuracy on these same images" in (folder.path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "words"), [("finetun", 'Did you mean "finetune"'), ("pretrain", "this run does not train")]
)
def test_a_stage_that_is_not_run_cannot_be_shipped(compose_config, name, words):
    with pytest.raises(PylorusError, match=f'deploy.stage: found "{name}".*') as error:
        compose_config("stage=finetune", f"deploy.stage={name}")
    assert words in str(error.value)


def test_a_bundle_of_version_1_is_read_as_the_last_stage_of_its_run(train_run):
    old = description(train_run("finetune")) | {"format_version": 1, "largest_difference": 0.001}
    del old["shipped"]
    found = read_description(json.dumps(old).encode())
    assert (found.shipped.name, found.shipped.chosen_by) == ("finetune", "last")


@pytest.mark.parametrize(
    ("scores", "asked", "expected"),
    [
        ({"a": StageScore(9, 10, 0.5), "b": StageScore(8, 10, 0.1)}, None, ("a", "accuracy")),
        ({"a": StageScore(9, 10, 0.5), "b": StageScore(9, 10, 0.4)}, None, ("b", "loss")),
        ({"a": StageScore(9, 10, 0.4), "b": StageScore(9, 10, 0.5)}, None, ("a", "loss")),
        ({"a": StageScore(9, 10, 0.4), "b": StageScore(9, 10, 0.4)}, None, ("b", "order")),
        ({"a": StageScore(9, 10, 0.4), "b": StageScore(1, 10, 9.0)}, "b", ("b", "key")),
        ({"a": StageScore(9, 10, 0.4)}, None, ("a", "only")),
        ({"a": StageScore(9, 10, 0.4)}, "b", ("a", "only")),
    ],
)
def test_the_rule_is_accuracy_then_loss_then_the_later_stage_unless_a_stage_is_named(scores, asked, expected):
    found = select_stage(scores, asked=asked)
    assert (found.name, found.chosen_by) == expected
    assert explain_choice(found)


def test_a_killed_run_that_ships_an_earlier_stage_writes_the_same_bytes(train_run, compose_config, images, monkeypatch):
    class KilledError(BaseException):
        pass

    whole = train_run("pretrain", "report=false")
    folder = RunFolder(whole.path.with_name("killed"))
    overrides = [f"data.root={images}", *WORDS, *BETTER["pretrain"], "report=false"]
    with folder.set_starting(overrides):
        write_text(folder.config, OmegaConf.to_yaml(compose_config(*overrides)))
    replace = Path.replace
    for name in ("network.safetensors", "predictions-test.parquet", "model.safetensors"):
        stage = "finetune" if name == "predictions-test.parquet" else ""

        def dying(path, target, name=name, stage=stage):
            if Path(target).name == name and stage in str(target):
                raise KilledError
            return replace(path, target)

        with monkeypatch.context() as patched, pytest.raises(KilledError):
            patched.setattr(Path, "replace", dying)
            run(folder)
        assert not (folder.path / "model" / "SHA256SUMS").exists()
    run(folder)
    assert folder.read_status()["shipped_stage"] == "pretrain"
    for path in (whole.path / "model").iterdir():
        assert path.read_bytes() == (folder.path / "model" / path.name).read_bytes(), path.name
    for stage, part in ((stage, part) for stage in STAGES for part in ("val", "test")):
        assert (
            whole.get_predictions_path(stage, part).read_bytes()
            == folder.get_predictions_path(stage, part).read_bytes()
        )


def test_predictions_without_saved_features_are_computed_again(train_run, tmp_path):
    """A run that an earlier version left unfinished holds predictions in the precision of its training."""
    whole = train_run("pretrain", "report=false")
    folder = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "old")))
    shutil.rmtree(folder.path / "model")
    status = read_json(folder.path / "status.json")
    (folder.path / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    for part in ("val", "test"):
        rough = pd.read_parquet(folder.get_predictions_path("pretrain", part))
        columns = [name for name in rough if name.startswith("logit/")]
        rough[columns] = rough[columns].round(1)
        rough.to_parquet(folder.get_predictions_path("pretrain", part), index=False)
    run(folder)
    for part in ("val", "test"):
        assert (
            whole.get_predictions_path("pretrain", part).read_bytes()
            == folder.get_predictions_path("pretrain", part).read_bytes()
        )
