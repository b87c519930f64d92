"""trainer.batch_size=auto finds the largest batch that fits and gives the run of that batch size."""

import json
import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from pylorus.core.errors import PylorusError
from pylorus.core.io import write_text
from pylorus.hardware import Engine
from pylorus.launch.train import run
from pylorus.model.backbone import build_backbone
from pylorus.runs.folder import RunFolder
from pylorus.training import batch_size
from pylorus.training.batch_size import StepCost, TrialProcess, find_largest_size
from tests.conftest import TINY

SIZES = [2, 4, 8, 16, 32, 64]
FAST = ["data=folders", r"data.group=patient_\d+", "trainer=cpu", "data.image_size=32", "model=timm", f"model.name={TINY}",
        "model.weights=none", "data.workers=0", "trainer.progress=false", "report=false", "augment=light",
        "stages.pretrain.epochs=1", "stages.finetune.epochs=2", "++model.args={drop_rate: 0.2}"]  # fmt: skip


def found(*, per_image=10, base=100, budget=10**9, crowded_from=10**9, refuses_from=10**9, careful=True):
    """What is found where a step takes so much, and which sizes were tried for it."""
    tried = []

    def step(size: int) -> StepCost | None:
        tried.append(size)
        if size >= refuses_from:
            return None
        return StepCost(base + per_image * size, size / min(size, crowded_from))

    return (*find_largest_size(step, sizes=SIZES, budget=budget, room="70 % of 3 GiB", careful=careful), tried)


def test_without_any_limit_the_largest_size_is_taken():
    assert found()[0] == 64


def test_on_a_cpu_a_batch_size_that_would_not_fit_is_predicted_not_tried():
    size, why, tried = found(budget=270)
    assert (size, tried) == (16, [2, 4, 8, 16])
    assert why == "the largest that fits: a step of 32 would need more than 70 % of 3 GiB"


@pytest.mark.parametrize("limit", [{"budget": 270}, {"refuses_from": 32}])
def test_on_a_gpu_sizes_are_tried_until_one_does_not_fit(limit):
    size, _, tried = found(careful=False, **limit)
    assert (size, tried) == (16, [2, 4, 8, 16, 32])


def test_accumulated_batches_together_are_no_larger_than_a_batch_may_be(compose_config, monkeypatch):
    sizes, requests = [], []

    class Trial:
        free = 10**9

        def __init__(self, request):
            requests.append(request)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def measure_step(self, size: int) -> StepCost:
            sizes.append(size)
            return StepCost(100, 1.0)

    monkeypatch.setattr(batch_size, "TrialProcess", Trial)
    config = compose_config(*FAST, "data.root=images", "trainer.batch_size=auto", "trainer.accumulate=4")
    backbone = build_backbone(config.model, classes=3, image_size=32)
    engine = Engine("cpu", "32", 1, {})
    assert batch_size.resolve_batch_size(config.trainer, config, backbone, engine, images=1000)[0] == 32
    assert sizes == [2, 4, 8, 16, 32]  # 4 times 32 are the 128 that a CPU tries at most
    assert requests[0]["accumulate"] == 4  # gradients take memory while the next batch is computed


def test_a_killed_process_counts_as_a_size_that_does_not_fit():
    assert found(refuses_from=8)[0] == 4


def test_on_a_cpu_the_search_stops_without_speedup_but_not_below_the_default():
    size, why, tried = found(crowded_from=4)
    assert (size, tried[-1]) == (16, 32)
    assert why == "a step of 32 would fit, but is no faster in images per second"


def test_if_the_smallest_size_does_not_fit_the_error_names_a_remedy():
    with pytest.raises(PylorusError, match=r"not even 2 images fit in 70 % of 3 GiB.*data.image_size"):
        found(budget=100)


@pytest.mark.parametrize(
    ("images", "most", "largest_tried"), [(3, 128, 2), (40, 128, 16), (1000, 128, 128), (1000, 512, 256)]
)
def test_no_step_is_larger_than_half_of_the_training_images(images, most, largest_tried):
    sizes = batch_size._list_sizes(images, most)
    assert sizes[-1] == largest_tried
    assert all(size & (size - 1) == 0 for size in sizes)


@pytest.fixture
def train_run(compose_config, synthetic_root, tmp_path_factory):
    """Run with additional command-line arguments."""

    def of(*words: str) -> RunFolder:
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        with folder.set_starting([]):
            write_text(folder.config, OmegaConf.to_yaml(compose_config(f"data.root={synthetic_root}", *FAST, *words)))
        run(folder)
        return folder

    return of


@pytest.fixture
def forked_trials(fork_server, monkeypatch):
    """Processes that try steps, as forks; `test_real_steps_report_their_memory_and_out_of_memory` starts one as a run does."""
    monkeypatch.setattr(batch_size, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": fork_server.start}))


def test_a_run_with_auto_equals_the_run_with_the_chosen_size(train_run, forked_trials, monkeypatch):
    monkeypatch.setattr(batch_size, "MAX_BATCH_SIZE", {"cpu": 8})
    auto, given = train_run("trainer.batch_size=auto"), train_run("trainer.batch_size=8")
    first, second = (load_file(folder.path / "model" / "model.safetensors") for folder in (auto, given))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    curves = [(folder.get_stage("finetune").metrics_path).read_bytes() for folder in (auto, given)]
    assert curves[0] == curves[1]
    assert json.loads((auto.path / "environment.json").read_text())["batch_size"] == 8
    assert OmegaConf.load(auto.config).trainer.batch_size == "auto"


@pytest.fixture
def build_request(compose_config):
    return {
        "model": {"name": TINY, "weights": "none"}, "classes": 3, "image_size": 32, "timed_from": 16, "channels_last": True, "accumulate": 1,
        "stage": {}, "optimizer": {}, "loss": {}, "engine": {"accelerator": "cpu", "precision": "32", "threads": 1},
    }  # fmt: skip


def test_real_steps_report_their_memory_and_out_of_memory(build_request):
    with TrialProcess(build_request) as trial:
        assert trial.free > 0
        small, larger = trial.measure_step(2), trial.measure_step(64)
        assert small is not None
        assert larger is not None
        assert larger.peak > small.peak
        assert trial.measure_step(2**38) is None


def test_a_process_killed_by_the_system_counts_as_out_of_memory(build_request, forked_trials):
    with TrialProcess(build_request) as trial:
        os.kill(trial._process.pid, signal.SIGKILL)
        assert trial.measure_step(4) is None


def test_other_failures_of_a_step_are_an_error_with_the_reason(build_request, forked_trials):
    wrong = TrialProcess({**build_request, "model": {"name": "no_such_model", "weights": "none"}})
    with pytest.raises(PylorusError, match=r"(?s)batch_size: found auto.*such as 16.*has no .no_such_model"), wrong:
        pass


@pytest.mark.parametrize(
    "loss", [{"name": "focal", "class_weights": "balanced"}, {"_target_": "torch.nn.CrossEntropyLoss"}]
)
def test_the_steps_minimize_the_loss_of_the_run(build_request, forked_trials, loss):
    with TrialProcess({**build_request, "loss": loss}) as trial:
        assert trial.measure_step(2) is not None
    one_class = {"_target_": "torch.nn.functional.binary_cross_entropy", "args": {}}
    with (
        pytest.raises(PylorusError, match=r"(?s)batch_size: found auto.*target size"),
        TrialProcess({**build_request, "loss": one_class}) as trial,
    ):
        trial.measure_step(2)
