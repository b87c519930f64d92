"""trainer.accumulate trains as a batch so many times as large does, and trainer.precision=16 as fp16 with a scaled loss."""

from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.amp.grad_scaler import GradScaler

from pylorus.core.distributed import SINGLE_PROCESS
from pylorus.core.errors import PylorusError
from pylorus.hardware import Engine, list_choices, resolve_engine, resolve_precision
from pylorus.launch.train import run
from pylorus.model.finetuning import StepLoss
from pylorus.runs.folder import RunFolder
from pylorus.training import callbacks, trainer
from tests.conftest import TINY

WORDS = ["data=folders", r"data.group=patient_\d+", "data.image_size=32", "data.workers=0", "trainer=cpu", "trainer.threads=1",
         "model=timm", f"model.name={TINY}", "model.weights=none", "trainer.progress=false", "report=false", "augment=light",
         "loss.class_weights=balanced", "stage=finetune", "stages.finetune.epochs=3", "stages.finetune.monitor=f1"]  # fmt: skip
VIT = ["model.name=test_vit.r160_in1k"]  # no batch norm


@pytest.fixture(scope="module")
def prepare_run(prepare_run_folder):
    """A folder in which a run can start, with additional command-line arguments."""
    return partial(prepare_run_folder, *WORDS)


@pytest.fixture
def last_checkpoints(monkeypatch) -> list[dict]:
    """What is saved to resume from; each epoch and each step of the optimizer is."""
    monkeypatch.setattr(callbacks, "MAX_SAVING_FRACTION", 1e9)
    monkeypatch.setattr(callbacks, "MAX_UNSAVED_SECONDS", 0.0)
    saved: list[dict] = []
    replace = Path.replace

    def record(path: Path, target: Path) -> Path:
        if Path(target).name == "last.ckpt":
            saved.append(torch.load(path, weights_only=True))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", record)
    return saved


class KilledError(BaseException):
    """What a run does not see coming."""


def run_killed(folder: RunFolder, monkeypatch, *, after: int) -> None:
    """Run, and kill the run after so many states were saved."""
    saved, save = 0, callbacks.Checkpoints._save_last

    def count(self, *arguments) -> None:
        nonlocal saved
        save(self, *arguments)
        saved += 1
        if saved == after:
            raise KilledError

    with monkeypatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(callbacks.Checkpoints, "_save_last", count)
        run(folder)


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "model" / "model.safetensors")


def curves(folder: RunFolder) -> pd.DataFrame:
    return pd.read_csv(folder.get_stage("finetune").metrics_path)


@pytest.fixture(scope="module")
def large_batch_run(prepare_run) -> RunFolder:
    folder = prepare_run(*VIT, "trainer.batch_size=8")
    run(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("words", [["batch_size=4", "accumulate=2"], ["batch_size=2", "accumulate=4"]])
def test_without_batch_norm_accumulated_batches_train_as_a_large_one(prepare_run, large_batch_run, words):
    folder = prepare_run(*VIT, *(f"trainer.{word}" for word in words))
    run(folder)
    pd.testing.assert_frame_equal(curves(folder), curves(large_batch_run), rtol=1e-4, atol=1e-5)
    expected = weights(large_batch_run)
    assert max((tensor - expected[name]).abs().max() for name, tensor in weights(folder).items()) < 1e-5


@pytest.mark.slow
def test_accumulation_is_not_the_small_batch(prepare_run, large_batch_run):
    folder = prepare_run(*VIT, "trainer.batch_size=4")
    run(folder)
    expected = weights(large_batch_run)
    assert max((tensor - expected[name]).abs().max() for name, tensor in weights(folder).items()) > 1e-4


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_resumes_between_two_steps_to_the_same_weights(
    prepare_run, monkeypatch, last_checkpoints
):
    words = (
        "trainer.batch_size=3",
        "trainer.accumulate=2",
        "averaging=ema",
        "averaging.every=2",
        "++model.args={drop_rate: 0.2}",
    )
    whole, folder = prepare_run(*words), prepare_run(*words)
    run(whole)
    reached = [checkpoint["reached"] for checkpoint in last_checkpoints]
    assert (0, 2) in reached
    assert all(batches % 2 == 0 for _, batches in reached)
    run_killed(folder, monkeypatch, after=1)
    run(folder)
    assert curves(folder).equals(curves(whole))
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(folder).items())


def test_a_step_of_several_batches_has_the_gradient_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    losses, image_weights = torch.rand(7, generator=generator), torch.rand(7, generator=generator) + 0.5
    parameter, step = nn.Parameter(torch.ones(())), StepLoss()
    step.batches = 3
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        loss = step.scale_batch(losses[part] * parameter, image_weights[part].sum(), SINGLE_PROCESS)
        (loss / step.batches).backward()  # Lightning divides
    step.normalize_gradients([parameter], SINGLE_PROCESS)
    torch.testing.assert_close(parameter.grad, losses.sum() / image_weights.sum())
    step.normalize_gradients([parameter], SINGLE_PROCESS)  # nothing is left for the next step
    torch.testing.assert_close(parameter.grad, losses.sum() / image_weights.sum())


def test_the_number_of_images_of_a_step_is_printed(compose_config):
    config = compose_config("trainer.batch_size=8", "trainer.accumulate=4", "optimizer=adamw")
    reasons = {"accelerator": "", "precision": "", "threads": ""}
    network = nn.Linear(1, 1)
    choices = {choice.key: choice for choice in list_choices(config, Engine("cpu", "32", 1, reasons), network)}
    assert choices["trainer.accumulate"].value == "4"
    assert choices["trainer.accumulate"].reason.endswith("that is, 32 images")
    assert "optimizer.name" in choices
    choices = {choice.key: choice for choice in list_choices(config, Engine("cuda", "16", 1, reasons), network)}
    assert "optimizer.name" not in choices  # fused: not where gradients are unscaled


@pytest.fixture
def fp16_engine(monkeypatch) -> Engine:
    """fp16 on the CPU, where a user can't have it; its loss is scaled so much that the first steps are skipped."""
    engine = Engine("cpu", "16", 1, {"accelerator": "", "precision": "", "threads": ""})
    monkeypatch.setattr("pylorus.launch.train.resolve_engine", lambda *_: engine)
    monkeypatch.setattr(trainer, "GradScaler", partial(GradScaler, init_scale=2.0**28, growth_interval=3))
    return engine


@pytest.mark.slow
def test_skipped_steps_end_no_run_and_the_scaler_resumes_exactly(
    prepare_run, monkeypatch, last_checkpoints, fp16_engine
):
    words = ("trainer.batch_size=4", "stages.finetune.epochs=4")
    whole, folder = prepare_run(*words), prepare_run(*words)
    run(whole)
    scales = [checkpoint["MixedPrecision"]["scale"] for checkpoint in last_checkpoints]
    assert scales[0] < 2.0**28  # the first step was skipped
    assert len(set(scales)) > 2
    assert curves(whole)["finetune/train/loss"].notna().all()
    assert curves(whole)["finetune/lr"].iloc[-1] == pytest.approx(0.0, abs=1e-12)  # the schedule was completed
    run_killed(folder, monkeypatch, after=6)
    run(folder)
    assert curves(folder).equals(curves(whole))
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(folder).items())


@pytest.mark.slow
def test_gradients_that_stay_infinite_end_the_run(prepare_run, monkeypatch, fp16_engine):
    monkeypatch.setattr(callbacks, "MIN_LOSS_SCALE", 2.0**40)
    with pytest.raises(PylorusError, match=r"the gradients of stage finetune stay NaN or infinite.*precision=32"):
        run(prepare_run())


@pytest.mark.slow
def test_fp16_with_accumulation_trains(prepare_run, fp16_engine):
    folder = prepare_run("trainer.batch_size=4", "trainer.accumulate=2")
    run(folder)
    assert folder.read_status()["state"] == "finished"


def test_fp16_is_refused_on_the_cpu_and_with_sharding(compose_config):
    with pytest.raises(PylorusError, match=r"trainer\.precision: found 16, which needs an NVIDIA GPU"):
        resolve_engine(compose_config("trainer.accelerator=cpu", "trainer.precision=16").trainer)
    with pytest.raises(PylorusError, match=r"trainer\.precision: found 16, expected auto, bf16 or 32"):
        compose_config("trainer.precision=16", "trainer.strategy=fsdp")


@pytest.mark.parametrize(
    ("name", "capability", "has_bf16", "expected"),
    [
        ("NVIDIA H200", (9, 0), True, "bf16"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), True, "bf16"),
        ("Tesla T4", (7, 5), False, "16"),
        ("Tesla V100-SXM2-16GB", (7, 0), False, "16"),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), False, "16"),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), False, "32"),
        ("Quadro T2000", (7, 5), False, "32"),
        ("Tesla P100-PCIE-16GB", (6, 0), False, "32"),
    ],
)
def test_auto_takes_fp16_where_the_gpu_has_no_bf16(monkeypatch, name, capability, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert resolve_precision("cuda")[0] == expected
