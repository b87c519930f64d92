"""The folder of a run may be somebody's home: nothing in it that is not the run's is deleted, read or overwritten."""

import os
import tempfile
from types import SimpleNamespace

import pytest
import torch

import pylorus
from pylorus.core.errors import PylorusError
from pylorus.core.io import is_archive_intact
from pylorus.core.system import explain_disk_error
from pylorus.runs.folder import RunFolder
from pylorus.runs.reading import read_config
from pylorus.training.trainer import build_precision_arguments

OURS = (".status-0a1b2c3d.json", "pretrain/.metrics-0a1b2c3d.csv", "pretrain/checkpoints/.last-0a1b2c3d.ckpt",
        ".failure-0.json", "report/tables/.runs-0a1b2c3d.csv", "pretrain/checkpoints/.tmpmcNzqa",
        "model/.tmp0aBcDe")  # fmt: skip
OTHERS = (
    ".git/HEAD",
    ".ssh/key",
    ".bashrc",
    ".env.local",
    ".tmpAb12Cd",
    "project/.git/HEAD",
    "pretrain/.nfs0123456789abcdef",
    "a-0a1b2c3d.csv",
)


def test_only_incomplete_files_of_a_run_are_removed_from_its_folder(tmp_path):
    for name in (*OURS, *OTHERS):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    RunFolder(tmp_path).remove_incomplete_files()
    assert {name for name in (*OURS, *OTHERS) if (tmp_path / name).exists()} == set(OTHERS)


@pytest.mark.parametrize(
    "name", ["config.yaml", "model/model.safetensors", "finetune/checkpoints/last.ckpt", "split.csv"]
)
def test_a_new_run_neither_reads_nor_overwrites_the_files_of_others(name, tmp_path, synthetic_root):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("a: 1\n")
    with pytest.raises(PylorusError, match=r"mine: found .*, but no status.json"):
        pylorus.train([f"data.root={synthetic_root}", "stages.finetune.epochs=1"], folder=tmp_path / "mine")
    assert mine.read_text() == "a: 1\n"
    assert not (tmp_path / "mine" / "status.json").exists()


def test_a_named_pipe_in_the_place_of_a_file_is_never_waited_for(tmp_path):
    (tmp_path / "pretrain" / "checkpoints").mkdir(parents=True)
    paths = [tmp_path / "run.log", tmp_path / "pretrain" / "checkpoints" / "best.ckpt"]
    for path in paths:
        os.mkfifo(path)
    assert not is_archive_intact(paths[1])
    RunFolder(tmp_path).remove_incomplete_files()
    assert not any(path.exists() for path in paths)


def test_a_folder_or_a_circle_of_links_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "run.log").mkdir()
    (tmp_path / "status.json").symlink_to("status.json")
    for name, found in (("run.log", "a folder"), ("status.json", "links that lead in a circle")):
        with pytest.raises(OSError, match=name) as failure:
            (tmp_path / name).read_bytes()
        assert f"{name}: found {found}, expected a file." in explain_disk_error(failure.value)


def test_a_trained_run_without_its_configuration_is_refused_by_name(tmp_path):
    assert read_config(tmp_path) == {}  # it failed before it had one
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "stage.json").write_text("{}")
    with pytest.raises(PylorusError, match=r"config.yaml: found no such file"):
        read_config(tmp_path)


def test_a_checkpoint_is_written_beside_the_run_not_in_the_folder_of_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    [files] = build_precision_arguments(SimpleNamespace(precision="32", lightning_precision="32-true"))["plugins"]
    files.save_checkpoint({"weight": torch.ones(3)}, tmp_path / "last.ckpt")
    assert is_archive_intact(tmp_path / "last.ckpt")
    assert files.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["weight"].tolist() == [1.0, 1.0, 1.0]
