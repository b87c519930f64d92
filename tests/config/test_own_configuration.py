"""A user's configuration in a folder outside the clone is found, checked and saved; where `_target_` is honoured."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from pylorus.config.checks import build_config, load_config
from pylorus.config.schema import EXTENSIBLE, GROUPS
from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json, write_text
from pylorus.launch.main import check_overrides, resume
from pylorus.launch.train import run
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY
from tests.forking import TRAIN, ForkServer

PROJECT = Path(__file__).parents[2]
OWN = {
    "data": "image_size: 64",
    "model": "name: resnet10t\nweights: none",
    "stage": "# @package _global_\nrun: [warm]\nstages: {warm: {learn: head, epochs: 2}}",
    "augment": "name: mine\ntransforms: {HorizontalFlip: {p: 0.5}}",
    "optimizer": "lr: 0.5",
    "loss": "_target_: my_hospital.losses.Asymmetric\ngamma: 3",
    "averaging": "name: ema\ndecay: 0.9",
    "trainer": "accelerator: cpu\nargs: {profiler: simple}",
    "logger": "_target_: my_hospital.Logger\nserver: here",
    "callbacks": "early: {_target_: my_hospital.Early, patience: 3}",
    "experiment": "# @package _global_\ndefaults:\n  - override /model: mine\nseed: 7",
}
REQUIRED = {"data": ["data.root=X"]}


@pytest.fixture(scope="module")
def own_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file `mine` of every group."""
    folder = tmp_path_factory.mktemp("own")
    for group, content in OWN.items():
        (folder / group).mkdir()
        (folder / group / "mine.yaml").write_text(content)
    return folder


@pytest.fixture
def marker_file(tmp_path: Path) -> Path:
    """What code that must not run would create."""
    return tmp_path / "mark"


@pytest.fixture
def run_command(fork_server: ForkServer, tmp_path: Path) -> "Callable[..., subprocess.CompletedProcess[str]]":
    """Run `python train.py ARGUMENTS…` in an empty folder."""
    return lambda *words: fork_server.run([sys.executable, str(TRAIN), *map(str, words)], cwd=tmp_path, timeout=120)


def test_a_user_file_exists_for_every_group():
    assert set(OWN) == set(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("option", ["--config-dir", "-cd"])
def test_a_user_file_of_a_group_is_found_in_the_config_dir(own_groups, group, option):
    words = [option, str(own_groups), f"{group}=mine"]
    assert check_overrides(words) == words


@pytest.mark.parametrize("group", GROUPS)
def test_a_user_file_of_a_group_is_found_on_the_search_path(own_groups, compose_config, group):
    words = check_overrides([f"hydra.searchpath=[file://{own_groups}]", f"{group}=mine", *REQUIRED.get(group, [])])
    config = compose_config(*words)
    OmegaConf.to_yaml(config)


def test_a_user_group_is_found(own_groups, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "ward3.yaml").write_text("# @package _global_\nseed: 3")
    assert check_overrides(["-cd", str(tmp_path), "+site=ward3"])
    with pytest.raises(PylorusError, match=r'site=ward4: there is no site/ward4.yaml. Did you mean "ward3"\?'):
        check_overrides(["-cd", str(tmp_path), "+site=ward4"])


def test_a_typo_in_a_user_file_is_refused_with_a_suggestion(own_groups):
    with pytest.raises(
        PylorusError, match=re.escape('experiment=mien: there is no experiment/mien.yaml. Did you mean "mine"?')
    ):
        check_overrides(["--config-dir", str(own_groups), "experiment=mien"])
    with pytest.raises(PylorusError, match=r"Your own files: --config-dir DIR, with DIR/experiment/mine.yaml"):
        check_overrides(["experiment=mine"])


@pytest.mark.parametrize("words", [["--config-dir", "/nowhere"], ["hydra.searchpath=[/nowhere]"]])
def test_a_folder_of_configuration_that_does_not_exist_is_named(words):
    with pytest.raises(PylorusError, match="/nowhere"):
        check_overrides([*words, "seed=1"])


def test_a_user_experiment_runs_from_the_command_line(own_groups, run_command):
    ended = run_command("--config-dir", own_groups, "experiment=mine", "--cfg", "job")
    assert ended.returncode == 0, ended.stderr
    printed = OmegaConf.create(ended.stdout)
    assert (printed.seed, printed.model.name) == (7, "resnet10t")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-sc", "install=bash"], "hydra_bash_completion"),
        (["--info", "config"], "run:"),
        (["--hydra-help"], "hydra/launcher"),
        (["--help"], "callbacks=   none"),
        (["--cfg", "job", "-p", "optimizer"], "name: adamw"),
    ],
)
def test_options_of_hydra_itself_work(run_command, words, expected):
    ended = run_command(*words)
    assert ended.returncode == 0, ended.stderr
    assert expected in ended.stdout


def test_keys_beside_a_target_become_its_arguments(own_groups, compose_config, tmp_path):
    search = f"hydra.searchpath=[{own_groups}]"
    config = compose_config(*check_overrides([search, "loss=mine", "loss.gamma=5", "loss.label_smoothing=0.1"]))
    assert config.loss._target_ == "my_hospital.losses.Asymmetric"
    assert config.loss.args == {"gamma": 5, "label_smoothing": 0.1}
    write_text(tmp_path / "config.yaml", OmegaConf.to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("section", EXTENSIBLE)
def test_a_target_is_accepted_on_the_command_line(compose_config, section):
    words = check_overrides(
        [f"{section}._target_=my_hospital.thing", f"{section}.further=2", f"{section}.args.other=x"]
    )
    found = getattr(compose_config(*words), section)
    assert (found._target_, found.args) == ("my_hospital.thing", {"further": 2, "other": "x"})


def test_a_custom_network_is_labelled_by_its_target_unless_named(tmp_path, compose_config):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: my_hospital.GastroNet")
    search = f"hydra.searchpath=[{tmp_path}]"
    assert compose_config(search, "model=mine").model.name == "GastroNet"
    assert compose_config(search, "model=mine", "model.name=G2").model.name == "G2"


def test_a_custom_image_source_needs_no_folder(compose_config, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("_target_: my_hospital.list_images")
    config = compose_config(f"hydra.searchpath=[{tmp_path}]", "data=mine")
    assert (config.data.kind, config.data.root) == ("external", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["callbacks.early._target_=Early"], 'callbacks.early._target_: found "Early", expected the dotted path'),
        (["callbacks.early.patience=3"], r"callbacks.early: found .* expected a _target_ and its arguments"),
        (["metrics.youden=3"], r"metrics.youden: found 3, expected a _target_"),
        (["loss._target_='os system'"], 'loss._target_: found "os system", expected the dotted path'),
        (["data.kind=external"], "data.kind: found external without data._target_"),
        (["augment.args.p=1"], "augment.args: found arguments without augment._target_"),
        (["model.args.block._target_=os.getcwd"], "model.args.block._target_: _target_ is not allowed here"),
        (["augment.transforms.Blur._target_=os.getcwd"], "augment.transforms.Blur._target_: _target_ is not allowed"),
        (["trainer.args.profiler._target_=os.getcwd"], "trainer.args.profiler._target_: _target_ is not allowed here"),
    ],
)
def test_an_invalid_or_misplaced_target_is_refused_by_name(compose_config, words, message):
    with pytest.raises(PylorusError, match=message):
        compose_config(*check_overrides(words))


@pytest.mark.parametrize("key", ["optimizer._target_", "stages.finetune._target_", "_target_", "deploy._target_"])
def test_other_sections_have_no_target_key(key):
    with pytest.raises(PylorusError, match="no key"):
        check_overrides([f"{key}=os.getcwd"])


def test_an_unknown_key_is_refused_without_a_target(own_groups, compose_config):
    words = check_overrides(["--config-dir", str(own_groups), "loss.label_smothing=0.1"])[2:]
    with pytest.raises(PylorusError, match=r'"loss" has no key "label_smothing". Did you mean "label_smoothing"\?'):
        compose_config(*words)


WORDS = ["data=folders", r"data.group=patient_\d+", "data.image_size=32", "data.workers=0", "trainer=cpu", "model=timm",
         f"model.name={TINY}", "trainer.progress=false", "report=false", "augment=none", "stage=pretrain",
         "stages.pretrain.epochs=1"]  # fmt: skip


@pytest.fixture
def prepare_run(compose_config, synthetic_root, tmp_path) -> Callable[..., RunFolder]:
    """A folder in which a run can start, with additional command-line arguments."""

    def prepare(*words: str) -> RunFolder:
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        words = (f"data.root={synthetic_root}", *WORDS, *words)
        with folder.set_starting(list(words)):
            write_text(folder.config, OmegaConf.to_yaml(compose_config(*words)))
        return folder

    return prepare


def test_a_run_with_user_files_is_resumed_with_further_overrides(own_groups, compose_config, tmp_path):
    folder = RunFolder(tmp_path)
    with folder.set_starting(["experiment=mine"], searchpath=[f"file://{own_groups}"]):
        write_text(
            folder.config, OmegaConf.to_yaml(compose_config(f"hydra.searchpath=[{own_groups}]", "experiment=mine"))
        )
    status = read_json(tmp_path / "status.json")
    (tmp_path / "status.json").write_text(json.dumps(status | {"state": "interrupted"}))
    with pytest.raises(PylorusError, match="seed: the run has 7, found 8"):
        resume(folder, ["seed=8"])


def test_a_target_in_a_weights_file_is_never_honoured(prepare_run, marker_file, tmp_path):
    import timm

    file = tmp_path / "downloaded.safetensors"
    network = timm.create_model(TINY, pretrained=False)
    command = {"_target_": "pathlib.Path.touch", "_args_": json.dumps([str(marker_file)])}
    save_file(network.state_dict(), file, metadata={**command, "pretrained_cfg": json.dumps(command)})
    run(prepare_run(f"model.weights={file}"))
    assert not marker_file.exists()


def test_a_target_in_a_checkpoint_is_never_honoured(prepare_run, marker_file, monkeypatch):
    folder = prepare_run("model.weights=none", "stages.pretrain.epochs=2")
    with monkeypatch.context() as patched:
        patched.setattr("pylorus.launch.train.write_bundle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    checkpoints = list(folder.path.glob("*/checkpoints/*.ckpt"))
    assert checkpoints
    command = {"_target_": "pathlib.Path.touch", "_args_": [str(marker_file)]}
    for path in checkpoints:
        content = torch.load(path, weights_only=True)
        hyper_parameters = {**command, "loss": command, "_instantiator": "pathlib.Path.touch"}
        torch.save(
            {**content, "hyper_parameters": hyper_parameters, "loss": command, "callbacks_of_mine": command}, path
        )
    run(folder)
    assert folder.read_status()["state"] == "finished"
    assert not marker_file.exists()


def test_only_the_users_configuration_reaches_instantiate():
    """Nothing that reads a bundle, a table or a download imports what honours `_target_`."""
    users = {
        str(path.relative_to(PROJECT / "src" / "pylorus").parent)
        for path in (PROJECT / "src" / "pylorus").rglob("*.py")
        if re.search(r"config\.instantiation import .*(instantiate|build_callable)|hydra\.utils", path.read_text())
    }
    assert users <= {"config", "model", "training", "data", "evaluation", "launch"}
    calls = [
        path.name
        for path in (PROJECT / "src" / "pylorus").rglob("*.py")
        if "hydra.utils.instantiate" in path.read_text()
    ]
    assert calls == ["instantiation.py"]


def test_build_config_does_not_change_the_composed_configuration(tmp_path):
    composed = OmegaConf.structured(load_config_of(tmp_path))
    before = OmegaConf.to_yaml(composed)
    build_config(composed)
    assert OmegaConf.to_yaml(composed) == before


def load_config_of(folder: Path):
    (folder / "config.yaml").write_text("model: {_target_: a.B}\nrun: [a]\nstages: {a: {}}\ndata: {kind: synthetic}")
    return load_config(folder / "config.yaml")
