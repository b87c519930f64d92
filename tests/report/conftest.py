"""Run folders as training writes them, from simulated predictions, without training and torch."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from pylorus.config.schema import Config, StageConfig
from pylorus.core.io import write_json, write_text
from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions
from pylorus.runs.folder import StageFolder, score_stage, select_stage
from pylorus.runs.predictions import build_prediction_table, read_predictions, write_predictions

CLASSES = {"GC": "gastric_cancer", "GU": "gastric_ulcer", "CG": "chronic_gastritis"}


@dataclass
class Story:
    """What a made-up run is to look like."""

    model: str = "resnet50.tv_in1k"
    names: Sequence[str] = ("GC", "GU", "CG")
    stages: Sequence[str] = ("pretrain", "finetune")
    finished: int | None = None
    """How many stages predicted the test images; None: all."""
    confusions: dict[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    """Of the test images, by stage; else drawn with `skill`."""
    test_each: Sequence[int] = (20, 20, 20)
    """Test images of each class, in the order of `names`, where there is no confusion."""
    val_each: Sequence[int] = (15, 15, 15)
    images_per_group: int = 1
    skill: float = 1.5
    scale: float = 1.0
    """Factor of all logits."""
    seed: int = 0
    split_seed: int = 0
    """Another one gives other test images."""
    config: dict[str, Any] = field(default_factory=dict)
    state: str = "finished"
    error: str | None = None
    curves: bool = True
    network: bool = True
    averaged: int = 0
    """Weights of which those of the third epoch are the average."""


Maker = Callable[..., Path]


def write_runs_below(root: Path) -> Maker:
    def make(name: str = "run", **story: Any) -> Path:
        write_story(root / name, Story(**story))
        return root / name

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Maker:
    """Make a run's folder below `tmp_path`; takes its name and the fields of `Story`."""
    return write_runs_below(tmp_path)


@pytest.fixture(scope="module")
def make_shared_run(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Make a run's folder that the tests of a module share and must not change."""
    return write_runs_below(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def run_with_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two images a group with its report, written once for the tests that only read it."""
    folder = tmp_path_factory.mktemp("written") / "run"
    write_story(folder, Story(images_per_group=2))
    write_report([folder], options=ReportOptions(resamples=100))
    return folder


def write_story(folder: Path, story: Story) -> None:
    config = OmegaConf.structured(Config)
    config.model.name = story.model
    config.data.root = "/hospital/patients"
    config.data.classes = [CLASSES.get(name, name) for name in story.names]
    config.data.short_names = list(story.names)
    config.data.group = r"patient_\d+" if story.images_per_group > 1 else None
    config.stages = {name: StageConfig(learn="head" if name == "pretrain" else "all") for name in story.stages}
    for key, value in story.config.items():
        OmegaConf.update(config, key, value)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
    status = {"state": story.state, "pid": 1, "started": "2026-01-31T12:00:00+00:00", "overrides": [], "sweep": None}
    ended = {} if story.state == "running" else {"ended": "2026-01-31T12:30:00+00:00"}
    write_json(folder / "status.json", status | ended | ({"error": story.error} if story.error else {}))
    write_json(folder / "environment.json", {"python": "3.11.7", "packages": {"torch": "2.6.0"}, "gpu": None})
    rows = _rows(story, config.data.validation)
    _write_split(rows, story, folder / "split.csv")
    finished = len(story.stages) if story.finished is None else story.finished
    for number, stage in enumerate(story.stages[:finished]):
        _write_stage(folder, stage, number, rows, story, config.data.validation)
    if story.network:
        write_json(folder / "network.json", network())
    if finished == len(story.stages):
        write_json(folder / "model" / "model.json", _bundle(story) | _shipped(folder, config))


def _shipped(folder: Path, config: Any) -> dict[str, Any]:
    scores = {}
    for stage in config.stages:
        validation = read_predictions(folder / stage / "predictions-val.parquet")
        scores[stage] = score_stage(validation.logits, validation.predictions.true)
    return {"shipped": asdict(select_stage(scores, asked=config.deploy.stage))} if scores else {}


def network() -> list[dict[str, Any]]:
    blocks = [("conv1", "Conv2d", 1, 9408, [64, 112, 112]), ("layer1.0", "Bottleneck", 4, 75008, [256, 56, 56])]
    blocks += [("layer1.1", "Bottleneck", 3, 70400, [256, 56, 56]), ("fc", "Linear", 1, 6147, [3])]
    return [
        {
            "name": name,
            "type": kind,
            "layers": layers,
            "parameters": parameters,
            "output": output,
            "learning": {"pretrain": parameters if name == "fc" else 0, "finetune": parameters},
        }
        for name, kind, layers, parameters, output in blocks
    ]


def _rows(story: Story, validation: str) -> pd.DataFrame:
    """The split's rows, with the label as an index into the story's names."""
    test = [sum(row) for row in next(iter(story.confusions.values()))] if story.confusions else story.test_each
    parts = {"train": [30] * len(story.names), "val": story.val_each, "test": test}
    if validation == "test":
        del parts["val"]
    rows = []
    # By the class and not by its place, so that an image is the same in whatever order a run has the classes.
    for part, each in parts.items():
        for name, count in sorted(zip(story.names, each, strict=True)):
            for number in range(count):
                key = f"{part}{name}{number}s{story.split_seed}"
                patient = f"{part}_{name}_patient_{number // story.images_per_group:04d}_s{story.split_seed}"
                path = f"{CLASSES.get(name, name)}/{patient}_{number}.jpg"
                group = patient if story.images_per_group > 1 else path
                rows.append((f"{hash_of(key):064x}"[:16], path, name, group, part, f"{hash_of(key):064x}"))
    return pd.DataFrame(rows, columns=["sample_id", "path", "name", "group", "split", "sha256"])


def hash_of(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _write_split(rows: pd.DataFrame, story: Story, path: Path) -> None:
    table = rows.assign(**{"class": [CLASSES.get(name, name) for name in rows["name"]]})
    columns = ["sample_id", "path", "class", "group", "split", "sha256"]
    table[columns].sort_values("path").to_csv(path, index=False, lineterminator="\n")


def _write_stage(folder: Path, stage: str, number: int, rows: pd.DataFrame, story: Story, validation: str) -> None:
    names = list(story.names)
    for kind, part in (("val", "test" if validation == "test" else "val"), ("test", "test")):
        own = rows[rows["split"] == part].reset_index(drop=True)
        own = own.assign(label=[names.index(name) for name in own["name"]])
        generator = np.random.default_rng([story.seed, number, part == "test"])
        logits = generator.standard_normal((len(own), len(names)))
        if part == "test" and stage in story.confusions:
            answers = _answers(own["label"].to_numpy(), np.array(story.confusions[stage]))
            logits[np.arange(len(own)), answers] = logits.max(axis=1) + generator.uniform(0.1, 3, len(own))
        else:
            logits[np.arange(len(own)), own["label"]] += story.skill + number
        table = build_prediction_table(own, (story.scale * logits).astype(np.float32), names=names, split=kind)
        write_predictions(table, folder / stage / f"predictions-{kind}.parquet")
    if story.curves:
        write_text(folder / stage / "metrics.csv", _curves(stage, number, names).to_csv(index=False))
    if story.averaged:
        StageFolder(folder / stage).write_record(epochs=4, best_epoch=3, averaged_weights=story.averaged)


def _answers(labels: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """A predicted class for each image, so that they make up the confusion matrix."""
    answers = np.empty(len(labels), dtype=int)
    for label, counts in enumerate(confusion):
        answers[labels == label] = np.repeat(np.arange(len(counts)), counts)
    return answers


def _curves(stage: str, number: int, names: list[str], epochs: int = 4) -> pd.DataFrame:
    rise = np.linspace(0.5, 0.9, epochs)
    columns: dict[str, Any] = {"step": np.arange(1, epochs + 1) + epochs * number}
    for part in ("train", "val"):
        columns |= {f"{stage}/{part}/loss": 2 - rise, f"{stage}/{part}/accuracy": rise}
        for index in ("precision", "sensitivity", "f1"):
            for name in [*names, "average"]:
                # The first epoch predicts none of the last class.
                first = np.where(np.arange(epochs) == 0, np.nan, rise)
                columns[f"{stage}/{part}/{index}/{name}"] = first if name == names[-1] else rise
    return pd.DataFrame(columns)


def _bundle(story: Story) -> dict[str, Any]:
    return {
        "architecture": story.model,
        "input": {"size": 224, "fit": "pad", "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.2] * 3},
        "weights": {"from": "hub", "sha256": "ab" * 32, "licence": None},
        "intended_use": "Research use only. Not a medical device.",
        "versions": {"pylorus": "0.1.0", "timm": "1.0.0"},
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
