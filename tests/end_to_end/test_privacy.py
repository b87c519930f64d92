"""Model, report and dashboard contain nothing that names a patient: planted names are searched for."""

import base64
import getpass
import io
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
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


@pytest.fixture
def train_in_clinic(compose_config, clinic, tmp_path, monkeypatch):
    """Train in the clinic's folder; return the finished run."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(clinic)  # a relative path shows no slash that would give it away

    def train(*more):
        words = [
            "data=manifest", "data.manifest=Mustermann.csv", "data.on_error=quarantine", "data.accept_leaks=true",
            "data.image_size=32", "model=timm", f"model.name={TINY}", "model.weights=none", "stage=pretrain",
            "stages.pretrain.epochs=1", "trainer=cpu", *more,
        ]  # fmt: skip
        folder = RunFolder(tmp_path / "run")
        config = compose_config(*words)
        with folder.set_starting(words):
            write_text(folder.config, OmegaConf.to_yaml(config))
        run(folder)
        return folder

    return train


def list_dashboard_files(folder, logger):
    found = [path for path in folder.path.rglob("*") if logger in path.relative_to(folder.path).as_posix()]
    files = [path for path in found if path.is_file()]
    assert files
    return files


def test_model_report_and_dashboard_contain_no_names(train_in_clinic, clinic):
    folder = train_in_clinic("logger=wandb")
    assert b"erika_defekt.jpg" in (folder.path / "quarantine.csv").read_bytes()  # here it may be named
    left_out = (folder.path / "report" / "tables" / "subgroup-columns-left-out.csv").read_text()
    for column in ("patient_name", "family", "doctor", "case", "born", "mail"):
        assert column in left_out  # refused, and said so
    assert "1 file" in (folder.path / "report" / "report.html").read_text()
    leaving = [path for part in ("model", "report") for path in (folder.path / part).rglob("*") if path.is_file()]
    assert len(leaving) > 3
    assert_no_names(folder, [*leaving, *list_dashboard_files(folder, "wandb")], clinic)


def test_tensorboard_names_neither_patients_nor_the_machine(train_in_clinic, clinic, monkeypatch):
    for module, name in ((socket, "gethostname"), (socket, "getfqdn"), (platform, "node"), (getpass, "getuser")):
        monkeypatch.setattr(module, name, lambda *_: MACHINE)
    folder = train_in_clinic("logger=tensorboard", "report=false")
    files = list_dashboard_files(folder, "tensorboard")
    assert_no_names(folder, files, clinic)
    assert find_marks(folder.path, files, [MACHINE]) == []


def assert_no_names(folder, files, clinic):
    found = [
        f"{path.relative_to(folder.path)}: {mark!r} in {content[max(0, at - 80) : at + 40]!r}"
        for path in files
        for content in unpacked(path)
        for mark in (*MARKS, str(clinic).lower().encode())
        if (at := content.lower().find(mark)) >= 0
    ]
    assert not found, "\n".join(found)


def unpacked(path):
    """A file's bytes, and what it holds in base64, zlib (PNG, PDF), gzip, zip and Parquet."""
    return unpack(path.read_bytes())


def unpack(content, depth=3):
    found = [content]
    if depth == 0:
        return found
    inner = [base64.b64decode(match) for match in re.findall(rb"base64,([A-Za-z0-9+/=]+)", content)]
    for match in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]", content):
        try:
            inner.append(zlib.decompressobj(47).decompress(content[match.start() :], 1 << 24))
        except zlib.error:  # two bytes that look like a beginning
            continue
    if content.startswith(b"PK\3\4"):
        archive = zipfile.ZipFile(io.BytesIO(content))
        inner += [part for name in archive.namelist() for part in (name.encode(), archive.read(name))]
    if content.startswith(b"PAR1"):
        file = pq.ParquetFile(io.BytesIO(content))
        inner += [str(part).encode() for part in (file.schema_arrow, file.metadata.metadata, file.read().to_pylist())]
    return found + [part for each in inner for part in unpack(each, depth - 1)]


def test_what_is_compressed_is_searched():
    text = b"a name that is hidden " * 3
    packed, table = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", zlib.compress(text))
    pd.DataFrame({"x": [text.decode()] * 50}).to_parquet(table, compression="zstd")
    for content in (packed.getvalue(), table.getvalue(), b"base64," + base64.b64encode(zlib.compress(text))):
        assert any(text.strip() in part for part in unpack(content))
        assert content.startswith(b"PAR1") or b"hidden" not in content


MACHINE, PATIENT = "zqmachine", "zqpatient"
"""Planted in everything that names the machine, its user and its folders; in everything that names a patient."""


def start_elsewhere(words, base, *, at=None):
    """Run a command of Pylorus on a machine whose host, user, folders, variables, Git and Python path have one name."""
    home, cwd, path = (base / f"{name}-{MACHINE}" for name in ("home", "cwd", "path"))
    for folder in (home, cwd, path):
        folder.mkdir(exist_ok=True)
    (cwd / ".git").mkdir(exist_ok=True)
    (cwd / ".git" / "config").write_text(f'[remote "origin"]\n\turl = https://git.{MACHINE}.example/x.git\n')
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= dict.fromkeys(
        ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "PATIENT", "SLURM_JOB_NAME", "SLURM_SUBMIT_HOST", "WANDB_USERNAME"),
        MACHINE,
    )
    source = os.pathsep.join(path for path in sys.path if path)
    environment |= {"HOME": str(home), "PYTHONPATH": f"{source}{os.pathsep}{path}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pylorus", *words]
    renamed = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", f'hostname {MACHINE} && exec "$@"', "sh"]
    if shutil.which("unshare") and not subprocess.run([*renamed, "true"], capture_output=True, check=False).returncode:
        command = [*renamed, *command]
    done = subprocess.run(command, cwd=at or cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def find_marks(folder, paths, marks):
    return [
        f"{path.relative_to(folder)}: {mark} in {content[max(0, at - 80) : at + 40]!r}"
        for path in paths
        if path.is_file()
        for mark in marks
        for content in (str(path.relative_to(folder)).encode(), *unpacked(path))
        if (at := content.lower().find(mark.encode())) >= 0
    ]


def test_what_leaves_names_neither_machine_nor_user_nor_folders_nor_patients(tmp_path):
    root, folder = tmp_path / f"root-{MACHINE}", tmp_path / f"sweep-{MACHINE}" / f"run-{MACHINE}"
    for number, label in enumerate(name for name in CLASSES for _ in range(20)):
        path = root / label / f"{PATIENT}P{number}_a.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generate_frame(label, seed=number, view=0, size=48).image).save(path)
    start_elsewhere(
        [
            "train", "data=folders", f"data.root={root}", r"data.group=[a-z]+P\d+", "data.image_size=32",
            f"data.classes=[{','.join(CLASSES)}]", "model=timm", f"model.name={TINY}", "model.weights=none",
            "stage=pretrain", "stages.pretrain.epochs=1", "logger=wandb", "trainer=cpu", "data.accept_leaks=true",
            f"hydra.run.dir={folder}",
        ],
        tmp_path,
    )  # fmt: skip
    output = tmp_path / "predictions.csv"
    start_elsewhere(["predict", str(folder / "model"), ".", "--output", str(output)], tmp_path, at=root)
    leaving = [*(folder / "model").rglob("*"), *(folder / "report").rglob("*")]
    shown = folder.glob("wandb/offline-run-*/**/*")
    shown = [path for path in shown if path.is_file() and "logs" not in path.relative_to(folder).parts]
    assert shown
    found = find_marks(folder, [*leaving, *shown], (MACHINE, PATIENT))
    found += find_marks(tmp_path, [output, *tmp_path.glob("predictions.csv*")], (MACHINE,))
    assert not found, "\n".join(found)


def test_a_samples_id_can_not_be_found_from_a_guessed_name_alone():
    from pylorus.data.catalog import compute_sample_id

    digests = [f"{number:064x}" for number in np.random.default_rng(0).integers(0, 1 << 60, 100)]
    assert len({compute_sample_id("mustermann.jpg", digest) for digest in digests}) == 100
    assert compute_sample_id("mustermann.jpg", digests[0]) not in {
        compute_sample_id("mustermann.jpg", ""),
        compute_sample_id("", digests[0]),
    }
