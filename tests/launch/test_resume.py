"""A resumed run gives the result of an uninterrupted one bit for bit; a different run is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import pylorus
from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json, write_text
from pylorus.launch.main import check_resumable, resume, update_config
from pylorus.launch.train import run
from pylorus.model.classifier import StageClassifier
from pylorus.runs.folder import RunFolder
from pylorus.training import callbacks
from tests.conftest import TINY

WORDS = ["data=folders", r"data.group=patient_\d+", "data.image_size=32", "data.workers=0", "trainer=cpu", "model=timm",
         f"model.name={TINY}", "model.weights=none", "trainer.progress=false", "report=false", "++model.args={drop_rate: 0.2}",
         "stages.pretrain.epochs=3", "stages.finetune.epochs=4", "stages.finetune.learn=layer3"]  # fmt: skip
MANNERS = {
    "a cosine, new variants in each epoch and a mean of weights": ["augment=light", "averaging=mean"],
    "a plateau, patience, kept variants and an average of weights": [
        "augment=light", "averaging=ema", "stages.pretrain.schedule=plateau", "stages.finetune.schedule=plateau",
        "stages.pretrain.augment=light", "stages.pretrain.views=2", "stages.finetune.patience=2", "optimizer.lr=0.02",
    ],
}  # fmt: skip


class KilledError(BaseException):
    """What a run does not see coming."""


@pytest.fixture(scope="module")
def prepare_run(prepare_run_folder):
    """A folder in which a run can start, with additional command-line arguments."""
    return partial(prepare_run_folder, *WORDS)


@pytest.fixture(scope="module")
def whole_results(prepare_run):
    """The results of a run that nothing stopped."""
    folder = prepare_run()
    run(folder)
    return results(folder)


SAVING = {"each epoch saved": (1e9, 600.0), "some epochs saved": (0.02, 600.0), "each step saved": (1e9, 0.0)}
"""SHARE_OF_TIME and LONGEST."""
CASES = list(
    zip([*MANNERS, *MANNERS], ["each epoch saved", "some epochs saved", *["each step saved"] * 2], strict=True)
)


def files_written(folder: RunFolder, monkeypatch, *, stop_before: int | None = None) -> int:
    """Run or resume, and kill the run before the given file gets its name; return the number of completed files."""
    count, replace = 0, Path.replace

    def counted(path: Path, target: Path) -> Path:
        nonlocal count
        if "cache" not in str(target) and not target.name.startswith("metrics.csv."):  # that is one with metrics.csv
            count += 1
            if count == stop_before:
                raise KilledError(target.name)
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", counted)
        try:
            run(folder)
        except KilledError as killed:
            # A run that is killed before it has written how it ended still says that it is running.
            expected = "running" if killed.args == ("status.json",) else "failed"
            assert folder.read_status()["state"] == expected
    return count


def results(folder: RunFolder) -> dict[str, object]:
    found: dict[str, object] = {"weights": load_file(folder.path / "model" / "model.safetensors")}
    for stage in ("pretrain", "finetune"):
        found[f"{stage} curves"] = folder.get_stage(stage).metrics_path.read_bytes()
        found[f"{stage} record"] = folder.get_stage(stage).record_path.read_bytes()
        found |= {
            f"{stage} {part}": pd.read_parquet(folder.get_predictions_path(stage, part)) for part in ("val", "test")
        }
    found["split"] = (folder.path / "split.csv").read_bytes()
    return found


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    for name, content in one.items():
        if isinstance(content, pd.DataFrame):
            pd.testing.assert_frame_equal(content, other[name], check_exact=True)
        elif isinstance(content, dict):
            assert all(torch.equal(tensor, other[name][key]) for key, tensor in content.items()), name
        else:
            assert content == other[name], name


def copy_before_files(folder: RunFolder, monkeypatch, copies: Path) -> list[RunFolder]:
    """Run, and copy the folder before each file gets its name: a copy is what `kill -9` would have left then."""
    copied, replace = [], Path.replace

    def copy_first(path: Path, target: Path) -> Path:
        if "cache" not in str(target) and not target.name.startswith("metrics.csv."):  # that is one with metrics.csv
            copied.append(RunFolder(Path(shutil.copytree(folder.path, copies / str(len(copied))))))
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr("pylorus.core.io.HEARTBEAT_SECONDS", 1e6)  # no file is written while another is copied
        patched.setattr(Path, "replace", copy_first)
        run(folder)
    return copied


@pytest.mark.parametrize(("manner", "saving"), CASES)
def test_a_run_killed_before_any_file_resumes_to_the_same_result(prepare_run, manner, saving, monkeypatch, tmp_path):
    monkeypatch.setattr(callbacks, "MAX_SAVING_FRACTION", SAVING[saving][0])
    monkeypatch.setattr(callbacks, "MAX_UNSAVED_SECONDS", SAVING[saving][1])
    whole = prepare_run(*MANNERS[manner])
    copies = copy_before_files(whole, monkeypatch, tmp_path)
    expected = results(whole)
    running = [folder for folder in copies[2:] if folder.read_status()["state"] == "running"]
    assert len(running) > 25
    step = len(running) // 3
    for folder in running[CASES.index((manner, saving)) * step // len(CASES) :: step]:  # other places in each case
        run(folder)
        assert folder.read_status()["state"] == "finished"
        assert_same(expected, results(folder))
        left = {path.name for path in folder.path.rglob("*") if path.is_file()}
        assert not [name for name in left if name.startswith((".", "last", "best-"))]


def test_a_stage_killed_after_training_keeps_its_curves(prepare_run, whole_results, monkeypatch):
    monkeypatch.setattr(callbacks, "MAX_SAVING_FRACTION", 1e9)
    folder = prepare_run()

    def killed(stage):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("pylorus.runs.folder.StageFolder.delete_training_state", killed)
        with pytest.raises(KilledError):
            run(folder)
    assert folder.get_stage("pretrain").last_checkpoint.is_file()
    run(folder)
    assert_same(whole_results, results(folder))
    assert not list(folder.path.rglob("last.ckpt"))


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGUSR1"])
def test_a_run_stopped_in_a_step_resumes_after_it(prepare_run, monkeypatch, signal_name):
    words = ["augment=light", "stage=finetune", "trainer.batch_size=4"]
    whole, folder = prepare_run(*words), prepare_run(*words)
    run(whole)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell ignores Ctrl-C
    training_step = StageClassifier.training_step

    def asked(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 2):
            os.kill(os.getpid(), getattr(signal, signal_name))
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(StageClassifier, "training_step", asked)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert folder.read_status()["state"] == "interrupted"
    assert folder.get_stage("finetune").progress == (1, 3)
    monkeypatch.setattr(StageClassifier, "training_step", training_step)
    run(folder)
    first, second = (load_file(each.path / "model" / "model.safetensors") for each in (whole, folder))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (
        whole.get_stage("finetune").metrics_path.read_bytes() == folder.get_stage("finetune").metrics_path.read_bytes()
    )


def test_a_run_with_decoding_workers_resumes_after_its_step(prepare_run, monkeypatch):
    monkeypatch.setattr(callbacks, "MAX_SAVING_FRACTION", 1e9)
    monkeypatch.setattr(callbacks, "MAX_UNSAVED_SECONDS", 0.0)
    words = ["augment=light", "data.workers=2", "stage=finetune", "stages.finetune.learn=all", "trainer.batch_size=8"]
    whole, folder = prepare_run(*words), prepare_run(*words)
    run(whole)
    files_written(folder, monkeypatch, stop_before=17)
    assert 1 <= folder.get_stage("finetune").progress.epochs < 4
    run(folder)
    assert (whole.get_stage("finetune").metrics_path.read_bytes()) == folder.get_stage(
        "finetune"
    ).metrics_path.read_bytes()
    first, second = (load_file(each.path / "model" / "model.safetensors") for each in (whole, folder))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_killed_repeatedly_gives_the_same_result(prepare_run, whole_results, monkeypatch):
    monkeypatch.setattr(callbacks, "MAX_SAVING_FRACTION", 1e9)
    folder = prepare_run()
    for _ in range(12):
        files_written(folder, monkeypatch, stop_before=13)
        if folder.read_status()["state"] == "finished":
            break
    run(folder)
    assert_same(whole_results, results(folder))
    assert folder.read_status()["resumed"] >= 3


def test_a_finished_run_says_so_and_changes_nothing(prepare_run, capsys):
    folder = prepare_run("stage=pretrain")
    run(folder)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.path.rglob("*") if path.is_file()}
    capsys.readouterr()
    resume(folder, [])
    assert "already finished" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}


def test_another_configuration_is_refused_and_each_difference_named(prepare_run):
    folder = prepare_run("stage=pretrain")
    write_text(folder.path / "status.json", json.dumps({**folder.read_status(), "state": "interrupted"}))
    with pytest.raises(PylorusError, match=r"optimizer.lr: the run has 0.001, found 0.5") as refused:
        resume(folder, ["optimizer.lr=0.5", "seed=3"])
    assert "seed: the run has 0, found 3" in str(refused.value)


def test_changed_images_are_refused_and_named(prepare_run, synthetic_root, tmp_path, monkeypatch):
    root = tmp_path / "images"
    shutil.copytree(synthetic_root, root)
    folder = prepare_run(f"data.root={root}", "stage=pretrain")
    files_written(folder, monkeypatch, stop_before=12)
    first, second, *_ = sorted(root.rglob("*.jpg"))
    second.write_bytes(first.read_bytes()[:-2] + b"\0\0\xff\xd9")
    catalogued = (folder.path / "catalog.parquet").read_bytes()
    with pytest.raises(PylorusError, match="the images are not those that this run started with") as refused:
        run(folder)
    assert (folder.path / "catalog.parquet").read_bytes() == catalogued
    assert f"{second.relative_to(root)}: changed" in str(refused.value)
    first.unlink()
    with pytest.raises(PylorusError, match=f"{first.relative_to(root)}: gone"):
        run(folder)


def test_other_weights_are_refused_and_another_version_is_reported(prepare_run, monkeypatch, caplog):
    folder = prepare_run("stage=pretrain")
    files_written(folder, monkeypatch, stop_before=12)
    record = folder.path / "environment.json"
    said = read_json(record)
    write_text(record, json.dumps({**said, "weights_sha256": "0123456789abcdef"}))
    with pytest.raises(PylorusError, match="started from other weights: expected SHA-256 0123456789ab, found none"):
        run(folder)
    write_text(record, json.dumps({name: value for name, value in said.items() if name != "image_rules"}))
    with pytest.raises(PylorusError, match="another version of Pylorus, which prepared images otherwise"):
        run(folder)
    write_text(record, json.dumps({**said, "packages": {**said["packages"], "torch": "1.0"}}))
    run(folder)
    assert "torch 1.0 → " in (folder.path / "run.log").read_text()


def test_settings_chosen_for_the_machine_are_kept_on_resume(prepare_run, monkeypatch):
    folder = prepare_run("stage=pretrain", "trainer.precision=auto")
    files_written(folder, monkeypatch, stop_before=12)
    chosen = json.loads((folder.path / "environment.json").read_text())["precision"]
    monkeypatch.setattr("pylorus.hardware.measure_bf16_speedup", lambda accelerator: 0.0 if chosen == "bf16" else 9.0)
    run(folder)
    log = (folder.path / "run.log").read_text()
    assert re.findall(r"trainer.precision +(\w+)", log) == [chosen, chosen]
    assert re.search(rf"trainer.precision +{chosen} +as chosen when the run started$", log, flags=re.M)


def test_an_automatic_batch_size_is_kept_on_resume(prepare_run, monkeypatch):
    monkeypatch.setattr("pylorus.training.batch_size.MAX_BATCH_SIZE", {"cpu": 4})
    monkeypatch.setattr(
        "pylorus.core.io.HEARTBEAT_SECONDS", 1e6
    )  # a slow trial would let it write a file that is counted
    whole, folder = (
        prepare_run("stage=pretrain", "trainer.batch_size=auto"),
        prepare_run("stage=pretrain", "trainer.batch_size=auto"),
    )
    run(whole)
    files_written(folder, monkeypatch, stop_before=12)
    monkeypatch.setattr(
        "pylorus.training.batch_size.find_largest_size", lambda *_, **__: pytest.fail("it was looked for again")
    )
    run(folder)
    assert re.findall(r"trainer.batch_size +4 +(.+);", (folder.path / "run.log").read_text()) == [
        "fits; larger steps are not tried, since they change what is learned",
        "as chosen when the run started",
    ]
    first, second = (load_file(each.path / "model" / "model.safetensors") for each in (whole, folder))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_with_automatic_settings_resumes_more_than_once(prepare_run, compose_config, synthetic_root, monkeypatch):
    words = ["stage=pretrain", "trainer.precision=auto", "trainer.accelerator=auto"]
    folder, asked = prepare_run(*words), compose_config(f"data.root={synthetic_root}", *WORDS, *words)
    for _ in range(2):
        files_written(folder, monkeypatch, stop_before=12)
        update_config(folder, asked)  # refuses what differs
    run(folder)
    update_config(folder, asked)
    assert folder.read_status()["state"] == "finished"


def test_keys_that_do_not_affect_the_result_may_change(prepare_run, compose_config, synthetic_root):
    folder = prepare_run("stage=pretrain")
    update_config(
        folder,
        compose_config(
            f"data.root={synthetic_root}", *WORDS, "stage=pretrain", "data.workers=1", "cache.memory_gib=0.1"
        ),
    )
    saved = OmegaConf.load(folder.config)
    assert (saved.data.workers, saved.cache.memory_gib) == (1, 0.1)


def test_resuming_a_sweep_a_running_run_or_another_folder_is_refused(tmp_path, prepare_run):
    with pytest.raises(PylorusError, match="found no run in"):
        check_resumable(RunFolder(tmp_path))
    running = prepare_run("stage=pretrain")
    write_text(
        running.path / "status.json", json.dumps({**running.read_status(), "state": "running", "pid": os.getpid()})
    )
    with pytest.raises(PylorusError, match=r"is running as process \d+ on"):
        check_resumable(running)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "status.json").write_text("{}")
    with pytest.raises(PylorusError, match=r"is a sweep.*hydra\.sweep\.dir="):
        check_resumable(RunFolder(tmp_path))


def test_a_reused_process_number_is_not_a_running_run(prepare_run):
    folder = prepare_run("stage=pretrain")
    long_ago = {"state": "running", "pid": os.getpid(), "heartbeat": "2020-01-01T00:00:00+00:00"}
    write_text(folder.path / "status.json", json.dumps({**folder.read_status(), **long_ago}))
    assert folder.read_status()["state"] == "stopped"


def test_a_run_on_another_machine_is_running_while_its_heartbeat_is_recent(prepare_run):
    folder = prepare_run("stage=pretrain")
    for heartbeat, state in (("2999-01-01T00:00:00+00:00", "running"), ("2020-01-01T00:00:00+00:00", "stopped")):
        there = {"state": "running", "host": "elsewhere", "pid": 1, "heartbeat": heartbeat}
        write_text(folder.path / "status.json", json.dumps({**folder.read_status(), **there}))
        assert folder.read_status()["state"] == state


def test_checkpoints_of_a_stage_load_with_tensors_and_plain_values_only(prepare_run, monkeypatch):
    folder = prepare_run()
    files_written(folder, monkeypatch, stop_before=12)
    [last] = folder.path.rglob("last.ckpt")
    state = torch.load(last, weights_only=True)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch"} <= set(state)


@pytest.mark.parametrize(
    ("method", "call"),
    [("training_step", 1), ("training_step", 2), ("training_step", 6), ("validation_step", 1), ("validation_step", 3)],
)
def test_a_run_stopped_anywhere_in_training_loses_nothing(prepare_run, monkeypatch, method, call):
    monkeypatch.setattr(callbacks, "MAX_SAVING_FRACTION", 1e-9)  # no epoch is saved unasked
    folder, original, calls = (
        prepare_run("stage=pretrain", "stages.pretrain.epochs=5"),
        getattr(StageClassifier, method),
        [],
    )

    def asked(self, *batch):
        calls.append((self.current_epoch, batch[-1]))
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(StageClassifier, method, asked)
        try:
            run(folder)
        except KeyboardInterrupt:
            place, epoch = folder.get_stage("pretrain"), calls[-1][0]
            within = place.progress.batches > 0
            assert place.training_result or place.progress.epochs + within >= epoch + (method == "validation_step")
            assert place.training_result or place.progress != (0, 0)
    run(folder)
    assert folder.read_status()["state"] == "finished"


@pytest.mark.parametrize(
    ("silence", "expected"),
    [
        (
            40,
            r"on node7 is training in this folder\. Wait until .* on node7\. .* no sign of life for 3 minutes \(now: 4\d s\)",
        ),
        (
            600,
            r"no sign of life for 10 minutes, but still holds the lock: node7 is off, .* start again: rm \S+/\.lock$",
        ),
    ],
)
def test_a_lock_that_another_machine_holds_is_explained_and_can_be_removed(prepare_run, silence, expected):
    folder = prepare_run()
    heartbeat = (datetime.now(UTC) - timedelta(seconds=silence)).isoformat(timespec="seconds")
    changes = {"state": "running", "host": "node7", "pid": 7, "heartbeat": heartbeat}
    write_text(folder.path / "status.json", json.dumps(folder.read_status() | changes))
    with folder.lock():  # as the other machine does
        with pytest.raises(PylorusError, match=expected) as refused:
            resume(RunFolder(folder.path), [])
        if silence > 180:
            subprocess.run(str(refused.value).rpartition("start again: ")[2], shell=True, check=True)
            with RunFolder(folder.path).lock():
                check_resumable(folder)


def test_a_folder_in_which_another_process_trains_is_refused_and_not_changed(prepare_run, tmp_path):
    folder = prepare_run()
    before = (folder.path / "status.json").read_bytes()
    with folder.lock():
        with pytest.raises(PylorusError, match=r"process \d+ on .* is training in this folder. Wait until it ends"):
            resume(folder, [])
        with pytest.raises(PylorusError, match="is training in this folder"):
            pylorus.train(WORDS, folder=folder.path)
    assert (folder.path / "status.json").read_bytes() == before
    with folder.lock():  # it was released
        folder.remove_incomplete_files()
        with pytest.raises(PylorusError, match="is training"), folder.lock():
            pass
    with pytest.raises(PylorusError, match="found no run"):
        resume(RunFolder(tmp_path / "nothing"), [])
    assert not (tmp_path / "nothing").exists()


@pytest.fixture(scope="module")
def stopped_run(prepare_run):
    """A run that was killed in the third epoch of finetune."""
    folder, original = prepare_run(), StageClassifier.training_step

    def kill(self, *batch):
        if self.plan.name == "finetune" and self.current_epoch == 2:
            raise KilledError
        return original(self, *batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(callbacks, "MAX_SAVING_FRACTION", 1e9)
        patched.setattr(StageClassifier, "training_step", kill)
        with pytest.raises(KilledError):
            run(folder)
    return folder


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in (len(content) // 8, len(content) // 4):
        content[place] ^= 4
    path.write_bytes(content)


def flip_digit(path: Path) -> None:
    """Change a digit, which leaves the file readable."""
    text = path.read_text()
    place = next(match.start() for match in re.finditer(r"\d", text) if match.start() > len(text) // 2)
    path.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


STATE = [
    (flip_bits, "finetune/checkpoints/last.ckpt"),
    (empty, "finetune/checkpoints/last.ckpt"),
    (Path.unlink, "finetune/checkpoints/best-*.ckpt"),
    (flip_bits, "pretrain/checkpoints/best.ckpt"),
    (truncate, "finetune/metrics.csv"),
    (flip_digit, "finetune/metrics.csv"),
    (flip_digit, "pretrain/stage.json"),
    (flip_bits, "pretrain/checkpoints/features-test.npy"),
    (flip_bits, "pretrain/checkpoints/network.safetensors"),
    (flip_bits, "pretrain/predictions-val.parquet"),
]


@pytest.mark.parametrize(("damage", "name"), STATE, ids=[f"{name} {damage.__name__}" for damage, name in STATE])
def test_a_damaged_state_is_computed_again_to_the_same_result(
    stopped_run, whole_results, tmp_path, caplog, damage, name
):
    folder = RunFolder(shutil.copytree(stopped_run.path, tmp_path / "run"))
    paths = list(folder.path.glob(name))
    if not paths and name.endswith("network.safetensors"):
        pytest.skip("finetune was the better stage")
    for path in paths:
        damage(path)
    caplog.set_level("WARNING", logger="pylorus")
    resume(folder, [])
    assert_same(whole_results, results(folder))
    log = (folder.path / "run.log").read_text()
    assert re.search(r"WARNING .* (is damaged|is missing|has \d of 2 epochs)", log)


@pytest.mark.parametrize("damage", [flip_digit, truncate, empty])
@pytest.mark.parametrize(
    "name", ["status.json", "config.yaml", "split.csv", "environment.json", "pretrain/metrics.csv"]
)
def test_a_damaged_record_is_named_and_nothing_is_trained(stopped_run, tmp_path, damage, name):
    folder = RunFolder(shutil.copytree(stopped_run.path, tmp_path / "run"))
    damage(folder.path / name)
    before = {path: path.read_bytes() for path in folder.path.rglob("*.ckpt")}
    with pytest.raises(PylorusError, match=re.escape(str(folder.path / name))) as found:
        resume(folder, [])
    assert "other images" not in str(found.value)
    assert {path: path.read_bytes() for path in folder.path.rglob("*.ckpt")} == before


@pytest.mark.parametrize("text", ["", '{"state": "runn', '{"state": "running", "checksum": "0"}'])
def test_a_damaged_status_names_the_folder_and_how_to_go_on(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    message = f"{tmp_path}/status.json: damaged.* Restore it from a backup. Without one, move {tmp_path} away"
    with pytest.raises(PylorusError, match=message):
        RunFolder(tmp_path).read_status()
