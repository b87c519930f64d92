"""The command line before a run: help, configuration, messages, without waiting for torch."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_help_explains_groups_and_keys(train_for_real):
    found = train_for_real("--help")
    assert found.returncode == 0
    assert "model= inception_v3 | resnet50 | small | timm | vgg19" in " ".join(found.stdout.split())
    assert "stages.<stage>.learn" in found.stdout


@pytest.mark.parametrize("word", ["optimizer.lrr=1", "+optimizer.lrr=1"])
def test_a_typo_gives_one_message_and_leaves_no_folder(train_for_real, tmp_path, word):
    found = train_for_real(word)
    assert found.returncode == 1
    assert 'error: optimizer.lrr: "optimizer" has no key "lrr". Did you mean "lr"?' in found.stderr
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_text_instead_of_a_number_names_key_and_value(train_for_real):
    found = train_for_real("stages.pretrain.epochs=three")
    assert found.returncode == 1
    assert "stages.pretrain.epochs" in found.stderr
    assert "'three'" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_missing_input_gives_one_message_and_marks_the_run_failed(train_for_real, tmp_path):
    found = train_for_real("data=folders", "data.root=no/such/folder")
    assert found.returncode == 1
    assert f"error: data.root: found {tmp_path}/no/such/folder, expected an existing folder." in found.stderr
    assert "Traceback" not in found.stderr
    status = next(tmp_path.glob("outputs/20*/*/status.json")).read_text()
    assert '"failed"' in status
    assert "no/such/folder" in status


@pytest.mark.parametrize("module", ["torch", "pandas", "cv2", "wandb"])
def test_composing_a_configuration_does_not_wait_for_heavy_packages(module):
    code = (
        "import sys; sys.argv = ['train.py', '--cfg', 'job']\n"
        "from pylorus.launch.main import main\n"
        f"try: main()\nexcept SystemExit: pass\nprint('loaded' if '{module}' in sys.modules else 'light')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("light\n")


def test_draw_writes_images_and_prints_how_to_train_on_them(train_for_real, tmp_path):
    program = (str(Path(sys.executable).with_name("pylorus")),)
    found = train_for_real("draw", "drawn", "--images", "4", "--size", "32", program=program)
    assert found.returncode == 0, found.stderr
    assert len(list((tmp_path / "drawn").rglob("*.jpg"))) == 12
    assert "python train.py data=folders data.root=drawn" in found.stdout
    again = train_for_real("draw", "drawn", program=program)
    assert again.returncode == 1
    assert again.stderr.startswith("error: drawn: already exists")
