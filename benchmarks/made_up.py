"""Simulate an image set without files: catalog rows, facts about files, and the saved results of a run on them."""

from pathlib import Path
from typing import Any

CLASSES = ("gastric_cancer", "gastric_ulcer", "chronic_gastritis")
IMAGES_PER_PATIENT = 4
COPIES = 0.01
"""Fraction of the images that are copies of another image of the same patient."""


def made_up(count: int) -> tuple[Any, Any]:
    """Simulate the rows of class folders and the facts of their files; a few are copies of the preceding image."""
    import hashlib

    import cv2
    import numpy as np
    import pandas as pd

    from pylorus.data.fact_store import FactTable

    rng = np.random.default_rng(0)
    patients = np.arange(count) // IMAGES_PER_PATIENT
    label = patients % len(CLASSES)
    paths = [
        f"{CLASSES[one]}/patient_{who:07d}/{number:08d}.jpg"
        for number, (one, who) in enumerate(zip(label, patients, strict=True))
    ]
    facts = FactTable(count)
    copied = np.flatnonzero((rng.random(count) < COPIES) & (np.arange(count) % IMAGES_PER_PATIENT > 0))
    for start in range(0, count, 10_000):
        end = min(count, start + 10_000)
        coarse = rng.integers(20, 236, (end - start, 8, 8), dtype=np.uint8)
        facts.thumbnails[start:end] = [cv2.resize(one, (32, 32), interpolation=cv2.INTER_CUBIC) for one in coarse]
    facts.thumbnails[copied] = facts.thumbnails[copied - 1]
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(2 * count)]
    for name, value in (("problem", ""), ("format", "JPEG"), ("mode", "RGB")):
        facts.get_column(name)[:] = [value] * count
    facts.get_column("sha256")[:] = digests[:count]
    facts.get_column("pixels")[:] = digests[count:]
    for name, low, high in (
        ("width", 640, 1920),
        ("height", 640, 641),
        ("sharpness", 50, 900),
        ("brightness", 60, 140),
    ):
        facts.get_column(name)[:] = rng.integers(low, high, count)
    facts.get_column("width")[copied] = facts.get_column("width")[copied - 1]
    rows = pd.DataFrame({"path": paths, "class": [CLASSES[one] for one in label], "split": ""})
    rows["group"] = [path.split("/")[1] for path in paths]
    return rows, facts


def saved_run(folder: Path, table: Any, rng: Any) -> None:
    """Write the files of a run that a report needs: status, configuration and predictions of one stage."""
    from omegaconf import OmegaConf

    from pylorus.config.schema import Config, StageConfig
    from pylorus.core.io import write_json, write_text
    from pylorus.runs.predictions import build_prediction_table, write_predictions

    config = OmegaConf.structured(Config)
    config.model.name = "resnet50.tv_in1k"
    config.data.classes, config.data.short_names, config.data.group = list(CLASSES), ["GC", "GU", "CG"], "patient"
    config.stages = {"finetune": StageConfig()}
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
    times = {"started": "2026-01-31T12:00:00+00:00", "ended": "2026-01-31T12:30:00+00:00"}
    write_json(folder / "status.json", {"state": "finished", "pid": 1, "overrides": [], "sweep": None, **times})
    for part in ("val", "test"):
        rows = table[table["split"] == part].reset_index(drop=True)
        logits = rng.normal(size=(len(rows), 3)).astype("float32")
        logits[range(len(rows)), rows["label"]] += 1.5
        said = build_prediction_table(rows, logits, names=["GC", "GU", "CG"], split=part)
        (folder / "finetune").mkdir(exist_ok=True)
        write_predictions(said, folder / "finetune" / f"predictions-{part}.parquet")
