"""Errors during a run are reported with a remedy and in status.json, and finished results are kept."""

import errno
import json
import multiprocessing.synchronize
import os
import shutil
import signal
import sys
import types
from pathlib import Path
from pkgutil import resolve_name

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from pylorus.core.errors import PylorusError
from pylorus.core.io import write_text
from pylorus.data.dataset import ImageDataset
from pylorus.launch.train import run
from pylorus.model.classifier import StageClassifier
from pylorus.model.inference import NormalizingNetwork
from pylorus.runs.folder import RunFolder, StageProgress
from pylorus.training.callbacks import Checkpoints
from pylorus.training.processes import explain_fault
from tests.conftest import TINY

FAST = ["data=folders", r"data.group=patient_\d+", "trainer=cpu", "data.image_size=32", "model=timm", f"model.name={TINY}",
        "stages.pretrain.epochs=2", "stages.finetune.epochs=2", "model.weights=none", "data.workers=0",
        "trainer.progress=false", "report=false"]  # fmt: skip
IMAGES = ["cache.prefix=false", "cache.images=false", "stage=finetune", "stages.finetune.epochs=3"]
"""A stage that reads every image in every epoch."""


@pytest.fixture(scope="module")
def prepare_run(compose_config, synthetic_root, tmp_path_factory):
    """A folder in which a run can start, with additional command-line arguments."""

    def prepare(*words: str, root: Path = synthetic_root) -> RunFolder:
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        config = compose_config(f"data.root={root}", *FAST, *words)
        with folder.set_starting([]):
            write_text(folder.config, OmegaConf.to_yaml(config))
        return folder

    return prepare


@pytest.fixture(scope="module")
def train_uninterrupted(prepare_run):
    """What each kind of run gives where nothing befalls it."""
    folders = {}

    def of(*words: str) -> RunFolder:
        if words not in folders:
            folders[words] = prepare_run(*words)
            run(folders[words])
        return folders[words]

    return of


def fails(folder: RunFolder) -> str:
    """Runs; the run must fail with a message for its user, which its status repeats."""
    with pytest.raises(PylorusError) as failed:
        run(folder)
    status = folder.read_status()
    assert (status["state"], status["error"]) == ("failed", str(failed.value))
    assert "Traceback" not in str(failed.value)
    return str(failed.value)


def goes_on_to(expected: RunFolder, folder: RunFolder) -> None:
    run(folder)
    assert folder.read_status()["state"] == "finished"
    first, second = (load_file(one.path / "model" / "model.safetensors") for one in (expected, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for path in expected.path.glob("*/metrics.csv"):
        assert path.read_bytes() == (folder.path / path.relative_to(expected.path)).read_bytes()
    for path in expected.path.glob("*/predictions-*.parquet"):
        other = folder.path / path.relative_to(expected.path)
        pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(other), check_exact=True)


def from_call(number: int, function, wrong):
    """`function`, but from the given call on `wrong` first."""
    calls = 0

    def called(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls >= number:
            wrong(*args)
        return function(*args, **kwargs)

    return called


def raises(error: BaseException):
    def wrong(*_):
        raise error

    return wrong


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SHUT = OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("owner", "name", "call", "error", "said"),
    [
        ("pylorus.training.callbacks:CheckpointFiles", "write_kept", 2, FULL, "the disk is full"),
        ("pandas:DataFrame", "to_csv", 6, SHUT, "can't be written to: Read-only file"),
        ("pandas:DataFrame", "to_parquet", 4, FULL, "the disk is full"),
    ],
)
def test_a_full_disk_is_named_with_a_remedy_and_the_run_resumes(
    prepare_run, train_uninterrupted, monkeypatch, owner, name, call, error, said
):
    expected, folder = train_uninterrupted(), prepare_run()
    place = resolve_name(owner)
    with monkeypatch.context() as patched:
        patched.setattr(place, name, from_call(call, getattr(place, name), raises(error)))
        told = fails(folder)
    assert said in told
    assert str(folder.path) in told
    assert f"python train.py resume={folder.path}" in told
    goes_on_to(expected, folder)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/5"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/somewhere/best-1.ckpt"),
    ],
)
def test_all_error_codes_of_a_full_disk_are_recognized(prepare_run, compose_config, error):
    try:
        try:
            raise error
        except Exception as inner:
            raise ValueError("while closing") from inner
    except ValueError as outer:
        told = str(explain_fault(outer, prepare_run(), compose_config()))
    assert "the disk is full" in told
    assert " free)" in told
    assert "cache" in told


def test_if_the_status_cannot_be_written_the_first_error_is_shown(prepare_run, monkeypatch):
    from pytorch_lightning import Trainer

    folder = prepare_run()
    with monkeypatch.context() as patched:

        def fill(*_):
            patched.setattr("pylorus.runs.folder.write_json", raises(OSError(errno.ENOSPC, "of the status")))
            raise OSError(errno.ENOSPC, "of the checkpoint", "last.ckpt")

        patched.setattr(Trainer, "save_checkpoint", from_call(2, Trainer.save_checkpoint, fill))
        with pytest.raises(PylorusError, match="the disk is full: last.ckpt could not be written"):
            run(folder)


@pytest.mark.parametrize("where", ["an epoch", "the predictions"])
def test_a_deleted_run_folder_is_reported_and_not_created_again(prepare_run, train_uninterrupted, monkeypatch, where):
    expected, folder = train_uninterrupted(), prepare_run()
    away = folder.path.with_name(f"{folder.path.name}-away")

    def take_away(*_):
        if not away.exists():
            shutil.move(folder.path, away)

    with monkeypatch.context() as patched:
        owner, step, call = (
            (StageClassifier, "training_step", 4)
            if where == "an epoch"
            else (NormalizingNetwork, "forward_with_features", 1)
        )
        patched.setattr(owner, step, from_call(call, getattr(owner, step), take_away))
        with pytest.raises(PylorusError, match=r"folder .* disappeared during the run.*\n.*resume=NEW_LOCATION"):
            run(folder)
    assert not (folder.path / "status.json").exists()
    goes_on_to(expected, RunFolder(away))


@pytest.mark.parametrize(("workers", "harm"), [(0, "deleted"), (2, "damaged")])
def test_an_image_that_disappears_during_an_epoch_is_named(
    prepare_run, train_uninterrupted, synthetic_root, tmp_path, monkeypatch, workers, harm
):
    expected, root = train_uninterrupted(*IMAGES), tmp_path / "images"
    shutil.copytree(synthetic_root, root)
    folder = prepare_run(*IMAGES, f"data.workers={workers}", root=root)

    def hurt(*_):
        split = pd.read_csv(folder.path / "split.csv", dtype=str)
        for name in split["path"][split["split"] == "train"]:
            (root / name).unlink() if harm == "deleted" else (root / name).write_bytes(b"\xff\xd8 no image")

    with monkeypatch.context() as patched:
        patched.setattr(
            StageClassifier, "on_validation_epoch_end", from_call(1, StageClassifier.on_validation_epoch_end, hurt)
        )
        told = fails(folder)
    assert f"  {root}/" in told
    assert {"deleted": ".jpg: No such file", "damaged": ".jpg: "}[harm] in told
    assert f"resume={folder.path}" in told
    shutil.copytree(synthetic_root, root, dirs_exist_ok=True)
    goes_on_to(expected, folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_disappears_while_features_are_computed_is_named(
    prepare_run, train_uninterrupted, synthetic_root, tmp_path, monkeypatch, workers
):
    expected, root = train_uninterrupted(), tmp_path / "images"
    shutil.copytree(synthetic_root, root)
    # Otherwise the images are cached when they are read for the first time.
    words = ["cache.images=false", f"data.workers={workers}", f"cache.folder={tmp_path / 'cache'}"]
    folder = prepare_run(*words, root=root)

    def hurt(*_):
        for path in root.rglob("*.jpg"):
            path.unlink()

    with monkeypatch.context() as patched:
        patched.setattr("pylorus.training.stage.build_stage_data", from_call(1, _serve_features(), hurt))
        assert f"  {root}/" in fails(folder)
    shutil.copytree(synthetic_root, root, dirs_exist_ok=True)
    goes_on_to(expected, folder)


def _serve_features():
    from pylorus.training.stage import build_stage_data

    return build_stage_data


def test_sigterm_between_two_epochs_ends_the_run_with_its_state_saved(prepare_run, train_uninterrupted, monkeypatch):
    words = ["stage=finetune"]
    expected, folder = train_uninterrupted(*words), prepare_run(*words)
    end_epoch = Checkpoints.on_train_epoch_end

    def terminate(*arguments):
        end_epoch(*arguments)
        if sent.is_file():
            return
        sent.touch()
        os.kill(os.getpid(), signal.SIGTERM)

    sent = folder.path / "sent"
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "on_train_epoch_end", terminate)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            run(folder)
    assert folder.read_status()["state"] == "interrupted"
    assert folder.get_stage("finetune").progress == StageProgress(1, 1)
    goes_on_to(expected, folder)


def test_a_killed_decoding_worker_is_reported_with_likely_causes(prepare_run, train_uninterrupted, monkeypatch):
    expected, folder = train_uninterrupted(*IMAGES), prepare_run(*IMAGES, "data.workers=2")

    def kill(*_):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(ImageDataset, "__getitems__", from_call(2, ImageDataset.__getitems__, kill))
        told = fails(folder)
    assert "was killed" in told
    assert "/dev/shm" in told
    assert (
        f"data.workers is 2; 0 needs no shared memory and gives the same result.\nThen resume the run: python train.py resume={folder.path} data.workers=0"
        in told
    )
    goes_on_to(expected, folder)


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            ),
            "this machine",
        ),
    ],
)
def test_out_of_memory_suggests_a_batch_size(prepare_run, train_uninterrupted, monkeypatch, error, where):
    expected, folder = train_uninterrupted(), prepare_run()
    with monkeypatch.context() as patched:
        patched.setattr(StageClassifier, "training_step", from_call(4, StageClassifier.training_step, raises(error)))
        told = fails(folder)
    assert f"{where} ran out of memory" in told
    assert "trainer.batch_size=8 (now 16), or with trainer.batch_size=auto, which finds a size that fits." in told
    goes_on_to(expected, folder)


def test_torchs_out_of_memory_message_is_recognized(prepare_run, compose_config):
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**55)
    assert "trainer.batch_size=8" in str(explain_fault(real.value, prepare_run(), compose_config()))


def test_out_of_memory_halves_what_auto_found(prepare_run, compose_config):
    folder = prepare_run("trainer.batch_size=auto")
    record = {"accelerator": "cuda", "precision": "32", "threads": 1, "batch_size": 64}
    write_text(folder.path / "environment.json", json.dumps(record))
    told = explain_fault(torch.OutOfMemoryError("no"), folder, compose_config("trainer.batch_size=auto"))
    assert "trainer.batch_size=32 (now 64, as found by auto)." in str(told)


def test_a_batch_of_one_is_not_halved(prepare_run, compose_config):
    told = explain_fault(torch.OutOfMemoryError("no"), prepare_run(), compose_config("trainer.batch_size=1"))
    assert "already a single image" in str(told)


def test_a_nan_loss_names_the_images_of_its_batch(prepare_run, monkeypatch):
    folder, seen, logits = prepare_run(*IMAGES), {}, StageClassifier.compute_logits

    def broken(self, batch):
        found = logits(self, batch)
        if not self.training or self.current_epoch == 0:
            return found
        seen.setdefault("rows", batch.row.tolist()) if seen.setdefault("steps", 0) == 1 else None
        seen["steps"] += 1
        return found * float("nan") if seen["steps"] >= 2 else found

    monkeypatch.setattr(StageClassifier, "compute_logits", broken)
    told = fails(folder)
    split = pd.read_csv(folder.path / "split.csv", dtype=str)
    train = split[split["split"] == "train"].reset_index(drop=True)
    expected = {train["sample_id"][row] for row in seen["rows"]}
    named = {line.strip() for line in told.splitlines() if line.startswith("  ") and "…" not in line}
    assert "became NaN or infinite in epoch 2" in told
    assert named
    assert named <= expected
    assert len(named) == min(10, len(expected))


def named_in(told: str) -> set[str]:
    """The images that a message lists."""
    return {line.strip() for line in told.splitlines() if line.startswith("  ") and "…" not in line}


def test_a_nan_validation_loss_names_its_images(prepare_run, monkeypatch):
    folder, logits = prepare_run(*IMAGES), StageClassifier.compute_logits

    def broken(self, batch):
        found = logits(self, batch)
        return found * float("nan") if not self.training and self.current_epoch == 1 else found

    monkeypatch.setattr(StageClassifier, "compute_logits", broken)
    told = fails(folder)
    split = pd.read_csv(folder.path / "split.csv", dtype=str)
    assert (
        "the validation loss, but not yet the training loss, of stage finetune became NaN or infinite in epoch 2"
        in told
    )
    assert named_in(told)
    assert named_in(told) <= set(split["sample_id"][split["split"] == "val"])


def test_nan_weights_in_the_last_step_stop_the_run_with_a_message(prepare_run, monkeypatch):
    folder = prepare_run(*IMAGES)

    def break_weights(self):
        if self.current_epoch == 2:
            self.network.get_classifier().weight.data.fill_(float("nan"))

    monkeypatch.setattr(StageClassifier, "on_validation_epoch_start", break_weights)
    told = fails(folder)
    assert "became NaN or infinite in epoch 3" in told
    assert "Lower optimizer.lr" in told


def test_nan_logits_of_test_images_name_the_images(prepare_run, monkeypatch):
    folder, answers = prepare_run(*IMAGES), NormalizingNetwork.forward_with_features

    def broken(self, image):
        logits, features = answers(self, image)
        logits[1] = float("-inf")
        return logits, features

    monkeypatch.setattr(NormalizingNetwork, "forward_with_features", broken)
    told = fails(folder)
    split = pd.read_csv(folder.path / "split.csv", dtype=str)
    rows = split[split["split"] == "val"].reset_index(drop=True)
    assert f"The logits of 1 of the {len(rows)} images of val are NaN or infinite" in told
    assert named_in(told) == {rows["sample_id"][1]}


@pytest.mark.parametrize("moment", ["log", "finish"])
def test_a_failing_dashboard_is_reported_once_and_the_run_finishes(
    prepare_run, train_uninterrupted, monkeypatch, moment
):
    expected, folder = train_uninterrupted(), prepare_run("logger=wandb")

    def send(*_, **__):
        if moment == "log":
            raise ConnectionError("the service is gone")

    service = types.SimpleNamespace(
        id="x", log=send, define_metric=send_nothing, summary={}, finish=raises_any("the service is gone")
    )
    monkeypatch.setattr("wandb.init", lambda **_: service)
    run(folder)
    said = (folder.path / "run.log").read_text()
    assert said.count("wandb failed; the run continues and its files are complete: the service is gone") == 1
    assert folder.read_status()["state"] == "finished"
    goes_on_to(expected, folder)


def send_nothing(*_, **__):
    pass


def raises_any(text: str):
    def wrong(*_, **__):
        raise ConnectionError(text)

    return wrong


def test_a_program_bug_keeps_its_traceback(prepare_run, compose_config):
    assert explain_fault(KeyError("network"), prepare_run(), compose_config()) is None


def test_the_command_ends_with_an_error_code_and_without_a_traceback(prepare_run, fork_server):
    folder = prepare_run("trainer.precision=32")
    script = (
        "import errno, sys; from pytorch_lightning import Trainer\n"
        "def full(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "Trainer.save_checkpoint = full; from pylorus.launch.train import main; main()"
    )
    ended = fork_server.run([sys.executable, "-c", script, str(folder.path)], timeout=120)
    assert ended.returncode == 1
    assert "error: the disk is full" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOENT])
def test_locks_without_shared_memory_are_not_mistaken_for_the_folder_of_the_run(
    number, prepare_run, compose_config, monkeypatch
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", refuse)
    with pytest.raises(OSError, match=os.strerror(number)) as failure:
        multiprocessing.get_context("spawn").Queue()
    told = str(explain_fault(failure.value, prepare_run(), compose_config("data.workers=2")))
    assert "/dev/shm is full, too small, or can't be written to" in told
    assert "data.workers=0" in told
