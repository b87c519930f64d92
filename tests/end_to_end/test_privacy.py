"""Model, report and dashboard contain nothing that names a patient: planted names are searched for."""

import base64
import re

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from PIL import Image

from pylorus.core.io import write_text
from pylorus.data.synthetic import CLASSES, generate_frame
from pylorus.launch.train import run
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY

BORN = tuple(f"{1958 + 3 * patient}-05" for patient in range(15))
MARKS = (b"mustermann", b"erika", b"geheim", b"brandauer", b"quastenberg", b"fall-4711", *map(str.encode, BORN))
"""Of names, numbers and births of persons, in small letters: in file names, folders, EXIF, groups and columns."""
FAMILIES = ("Brandauer", "Quastenberg", "Müller", "Schmidt", "Weber", "Wagner")


@pytest.fixture
def clinic(tmp_path):
    """A manifest, images with EXIF, folders and groups that all name patients, and one file that can't be read."""
    root = tmp_path / "Geheim_Klinik" / "Mustermann"
    root.mkdir(parents=True)
    rows = []
    for number, label in enumerate(name for name in CLASSES for _ in range(10)):
        exif = Image.Exif()
        exif[0x013B], exif[0x010E] = "Erika Mustermann", "geheim"
        path = root / f"Mustermann_{number // 2}" / f"erika_{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(generate_frame(label, seed=number // 2, view=number % 2, size=48).image)
        image.save(path, exif=exif, comment=b"geheim")
        rows.append(
            {
                "path": path.relative_to(root).as_posix(),
                "label": label,
                "group": f"Mustermann-{number // 2}",
                "patient_name": "Erika Mustermann" if number % 2 else "Max Mustermann",
                "family": FAMILIES[number // 2 % len(FAMILIES)],
                "kürzel": "EM" if number // 2 % 7 else "QB",
                "doctor": f"Dr. {FAMILIES[number // 2 % 2]}",
                "case": f"Fall-4711{37 * (number // 2):04d}",
                "born": f"{BORN[number // 2]}-0{1 + number % 9}",
                "mail": f"erika{number // 2}@geheim.example",
                "remark": f"geheim {number // 2}" if number % 3 else "none",
                "site": "AB"[number // 2 % 2],
            }
        )
    (root / "erika_defekt.jpg").write_bytes(b"geheim")
    rows.append({**rows[0], "path": "erika_defekt.jpg", "group": "Mustermann-99"})
    pd.DataFrame(rows).to_csv(root / "Mustermann.csv", index=False)
    return root


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_model_report_and_dashboard_contain_no_names(compose_config, clinic, tmp_path, logger, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(clinic)  # a relative path shows no slash that would give it away
    words = [
        "data=manifest", "data.manifest=Mustermann.csv", "data.on_error=quarantine", "data.accept_leaks=true",
        "data.image_size=32", "model=timm", f"model.name={TINY}", "model.weights=none", "stage=pretrain",
        "stages.pretrain.epochs=1", f"logger={logger}", "trainer=cpu",
    ]  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    config = compose_config(*words)
    with folder.set_starting(words):
        write_text(folder.config, OmegaConf.to_yaml(config))
    run(folder)
    assert b"erika_defekt.jpg" in (folder.path / "quarantine.csv").read_bytes()  # here it may be named
    left_out = (folder.path / "report" / "tables" / "subgroup-columns-left-out.csv").read_text()
    for column in ("patient_name", "family", "doctor", "case", "born", "mail"):
        assert column in left_out  # refused, and said so
    assert "1 file" in (folder.path / "report" / "report.html").read_text()
    leaving = [*(folder.path / "model").rglob("*"), *(folder.path / "report").rglob("*")]
    shown = [path for path in folder.path.rglob("*") if logger in path.relative_to(folder.path).as_posix()]
    files = [path for path in (*leaving, *shown) if path.is_file()]
    assert len(files) > len([path for path in leaving if path.is_file()]) > 3
    found = [
        f"{path.relative_to(folder.path)}: {mark!r} in {content[max(0, at - 80) : at + 40]!r}"
        for path in files
        for content in unpacked(path)
        for mark in (*MARKS, str(clinic).lower().encode())
        if (at := content.lower().find(mark)) >= 0
    ]
    assert not found, "\n".join(found)


def unpacked(path):
    """A file's bytes, and what it holds in base64."""
    content = path.read_bytes()
    return [content, *(base64.b64decode(found) for found in re.findall(rb"base64,([A-Za-z0-9+/=]+)", content))]


def test_a_samples_id_can_not_be_found_from_a_guessed_name_alone():
    from pylorus.data.catalog import compute_sample_id

    digests = [f"{number:064x}" for number in np.random.default_rng(0).integers(0, 1 << 60, 100)]
    assert len({compute_sample_id("mustermann.jpg", digest) for digest in digests}) == 100
    assert compute_sample_id("mustermann.jpg", digests[0]) not in {
        compute_sample_id("mustermann.jpg", ""),
        compute_sample_id("", digests[0]),
    }
