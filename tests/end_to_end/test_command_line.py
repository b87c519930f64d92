"""The command line before a run: help, configuration, messages, without waiting for torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forking import PROJECT


def test_help_explains_groups_and_keys(train_for_real):
    found = train_for_real("--help")
    assert found.returncode == 0
    models = sorted(path.stem for path in (PROJECT / "conf" / "model").glob("*.yaml"))
    assert f"model= {' | '.join(models)}" in " ".join(found.stdout.split())
    assert "stages.<stage>.learn" in found.stdout


@pytest.mark.parametrize("word", ["optimizer.lrr=1", "+optimizer.lrr=1"])
def test_a_typo_gives_one_message_and_leaves_no_folder(train, tmp_path, word):
    found = train(word)
    assert found.returncode == 1
    assert 'error: optimizer.lrr: "optimizer" has no key "lrr". Did you mean "lr"?' in found.stderr
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_text_instead_of_a_number_names_key_and_value(train):
    found = train("stages.pretrain.epochs=three")
    assert found.returncode == 1
    assert "stages.pretrain.epochs" in found.stderr
    assert 'found "three", expected a whole number' in found.stderr
    assert "Traceback" not in found.stderr


def test_a_missing_input_gives_one_message_and_marks_the_run_failed(train_for_real, tmp_path):
    found = train_for_real("data=folders", "data.root=no/such/folder")
    assert found.returncode == 1
    assert f"error: data.root: found {tmp_path}/no/such/folder, expected an existing folder." in found.stderr
    assert "Traceback" not in found.stderr
    status = next(tmp_path.glob("outputs/20*/*/status.json")).read_text()
    assert '"failed"' in status
    assert "no/such/folder" in status


@pytest.mark.parametrize("words", [["hydra.job.chdir=true"], ["hydra.job.chdir=true", "hydra.run.dir=run"]])
def test_a_relative_path_starts_where_the_command_was_typed(train, tmp_path, words):
    found = train("data=manifest", "data.manifest=no.csv", *words)
    assert f"error: data.manifest: found {tmp_path}/no.csv, expected an existing file." in found.stderr
    sweep = train("-m", "data=manifest", "data.manifest=no.csv", "seed=0,1", *words[:1], "hydra.sweep.dir=s")
    assert f"\njobs 0 and 1 failed: data.manifest: found {tmp_path}/no.csv" in sweep.stdout, sweep.stdout


def test_composing_a_configuration_does_not_wait_for_heavy_packages():
    code = (
        "import sys; sys.argv = ['train.py', '--cfg', 'job']\n"
        "from pylorus.launch.main import main\n"
        "try: main()\nexcept SystemExit: pass\nprint('loaded:', {'torch', 'pandas', 'cv2', 'wandb.sdk'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("loaded: set()\n")


def test_training_imports_no_package_that_only_some_runs_need():
    """Beside torch, timm and Lightning, which import some of these themselves if they are installed."""
    code = (
        "import sys, torch, timm, pytorch_lightning\nbefore = set(sys.modules)\nimport pylorus.launch.train\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    optional = "albumentations mlflow onnx onnxruntime pydicom ray sklearn skimage statsmodels tensorboard wandb"
    assert "pandas" in found.stdout.split()
    assert not set(optional.split()) & set(found.stdout.split())


def test_draw_writes_images_and_prints_how_to_train_on_them(train, tmp_path):
    program = (str(Path(sys.executable).with_name("pylorus")),)
    found = train("draw", "drawn", "--images", "4", "--size", "32", program=program)
    assert found.returncode == 0, found.stderr
    assert len(list((tmp_path / "drawn").rglob("*.jpg"))) == 12
    assert "python train.py data.root=drawn" in found.stdout
    again = train("draw", "drawn", program=program)
    assert again.returncode == 1
    assert again.stderr.startswith("error: drawn: already exists")


TRAIN = (sys.executable, "-m", "pylorus", "train")


def test_train_is_the_first_command_that_pylorus_lists(train):
    found = train("--help", program=TRAIN[:-1])
    assert found.stdout.split("COMMAND\n")[1].split()[:2] == ["train", "train"]


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--cfg", "job", "seed=7", "-p", "optimizer"],
        ["--info", "config", "model=vgg19"],
        ["-sc", "uninstall=bash"],
        ["optimizer.lrr=1"],
        ["--config-dir", "nowhere"],
        ["-m", "model=resnet5,vgg19"],
    ],
)
def test_pylorus_train_does_what_train_py_does(train, words):
    commands = [train(*words), train(*words, program=TRAIN)]
    assert commands[0].stdout + commands[0].stderr
    python, pylorus = ((each.returncode, each.stdout, each.stderr) for each in commands)
    assert pylorus == python


def test_pylorus_train_trains(train_for_real, tmp_path):
    small = ["data.drawn.images=8", "data.drawn.size=32", "stage=pretrain", "stages.pretrain.epochs=1", "report=false"]
    ended = train_for_real("model=small", *small, "hydra.run.dir=run", program=TRAIN)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("line", "expected"),
    [("pylorus train model=", "model=vgg19"), ("pylorus ", "predict"), ("pylorus predict ", "")],
)
def test_a_shell_completes_the_words_after_pylorus(tmp_path, line, expected):
    environment = {**os.environ, "COMP_LINE": line}
    program = [*TRAIN[:-1], "-sc", "query=bash"]
    found = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert expected in found.stdout.split() or not (expected or found.stdout)


def test_hydra_names_a_command_that_installs_completion(train):
    assert "pylorus -sc install=bash" in train("--hydra-help", program=TRAIN).stdout
    installed = train("-sc", "install=bash", program=TRAIN[:-1])
    assert installed.stdout.endswith("hydra_bash_completion pylorus\n")


def test_an_installed_wheel_trains_and_names_the_command_that_it_has(tmp_path):
    shutil.copytree(PROJECT / "src" / "pylorus", tmp_path / "site" / "pylorus")
    shutil.copytree(PROJECT / "conf", tmp_path / "site" / "pylorus" / "conf")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*TRAIN, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert start("--cfg", "job", "-p", "model").stdout.startswith("# @package model")
    assert "pylorus train resume=RUN" in start("--help").stdout
    assert "run: pylorus train --help" in start("optimizer.lrr=1").stderr
