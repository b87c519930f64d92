"""Every file in conf/ composes, and typos are refused by name."""

import functools
import re
from dataclasses import asdict, is_dataclass, replace
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from pylorus import train
from pylorus.config.checks import check_config, format_help, load_config
from pylorus.config.schema import CONF, GROUPS, Config, StageConfig
from pylorus.core.errors import PylorusError
from pylorus.core.io import iter_fields, validate
from pylorus.launch.main import check_overrides, register, run_overrides
from pylorus.launch.sweep import check_installed

FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
NEEDS = {
    "data=folders": ["data.root=X"],
    "data=manifest": ["data.manifest=X.csv"],
    "data=shards": ["data.root=X"],
    "model=timm": ["model.name=resnet18"],
    "experiment=paper": ["data.root=X"],
}


@pytest.mark.parametrize(("group", "file"), FILES, ids=lambda part: str(part))
def test_every_file_of_conf_composes_to_a_valid_configuration(compose_config, group, file):
    word = f"{group}={file}"
    needs_extra(word)
    assert isinstance(compose_config(word, *NEEDS.get(word, [])), Config)


def needs_extra(word: str) -> None:
    """Skips a test where the package that a word needs is not installed."""
    try:
        check_installed(word)
    except PylorusError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("launcher", sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")))
def test_every_launcher_of_conf_composes(launcher):
    needs_extra(f"hydra/launcher={launcher}")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = compose("config", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
    assert str(found.hydra.launcher._target_).endswith("Launcher")


def test_a_launcher_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("pylorus.launch.sweep.distribution", missing)
    for word, extra in (("hydra/launcher=joblib", "parallel"), ("experiment=search", "optuna")):
        with pytest.raises(PylorusError, match=re.escape(f"pip install 'pylorus[{extra}]'")):
            check_overrides(["-m", word])


def test_every_folder_of_conf_is_a_group_that_help_names():
    folders = {path.name for path in CONF.iterdir() if path.is_dir()} - {
        "hydra"
    }  # launchers, which docs/sweeps.md names
    assert folders == set(GROUPS)
    text = format_help(CONF)
    assert all(f"  {group}=" in text for group in GROUPS)


def test_help_explains_every_key():
    text = format_help(CONF)
    for field, kind in iter_fields(Config):
        if hasattr(kind, "__dataclass_fields__"):
            for inner, _ in iter_fields(kind):
                assert f"{field.name}.{inner.name}" in text
    assert all(f"stages.<stage>.{field.name} " in text for field, _ in iter_fields(StageConfig))


@pytest.mark.parametrize(
    ("word", "suggested"),
    [
        ("optimizer.lrr=1e-3", "lr"),
        ("+optimizer.lrr=1e-3", "lr"),
        ("++optimizer.lrr=1e-3", "lr"),
        ("data.rooot=X", "root"),
        ("+data.drawn.imagse=3", "images"),
        ("stages.pretrain.epoch=3", "epochs"),
        ("modle=vgg19", "model"),
        ("+sede=1", "seed"),
        ("stages.finetune.learning=head", "learn"),
        ("stage.finetune.learn=head", "stages"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(word, suggested):
    with pytest.raises(PylorusError, match=re.escape(f'Did you mean "{suggested}"?')):
        check_overrides([word])


def test_an_unknown_file_of_a_group_is_refused_with_the_nearest_known_one():
    with pytest.raises(PylorusError, match='Did you mean "resnet50"'):
        check_overrides(["model=resnet5"])


def test_an_unknown_launcher_is_refused_with_the_nearest_known_one():
    with pytest.raises(PylorusError, match='Did you mean "local"'):
        check_overrides(["-m", "hydra/launcher=locl"])


def test_a_number_of_jobs_without_a_launcher_says_which_launcher_takes_it(tmp_path):
    with pytest.raises(PylorusError, match=r"one job after the other\. Add hydra/launcher=local\."):
        run_overrides(["hydra.launcher.n_jobs=2"], tmp_path)


def test_a_sweep_with_one_unknown_file_is_refused_before_its_first_job():
    with pytest.raises(PylorusError, match='model=resnet5: there is no.*Did you mean "resnet50"'):
        check_overrides(["-m", "model=vgg19,resnet5"])


def test_a_stage_is_not_added_by_a_typo():
    with pytest.raises(PylorusError, match="stages are added in a file"):
        check_overrides(["+stages.pretain.epochs=3"])


@pytest.mark.parametrize("word", ["stages.pretrian.epochs=3", "stages.pretrian.lr=1e-3", "stages.pretrian={}"])
def test_keys_of_an_unknown_stage_are_refused_with_the_nearest_known_one(word, tmp_path):
    with pytest.raises(PylorusError) as caught:
        run_overrides([word], tmp_path)
    assert str(caught.value) == (
        'stages.pretrian: "stages" has no key "pretrian". Did you mean "pretrain"?\n'
        "Keys at this level: pretrain, finetune."
    )


@pytest.mark.parametrize(
    ("word", "key"), [("stages.last_half.lr_factor=0.1", "stages.last_half"), ("run=[pretrain,last_half]", "run")]
)
def test_a_stage_of_another_file_is_refused_with_the_file_that_defines_it(word, key, tmp_path):
    with pytest.raises(PylorusError, match=rf'(?s)^{key}: .*Add stage=gradual, which defines "last_half"\.$'):
        run_overrides([word], tmp_path)


def test_arguments_for_timm_need_no_plus(compose_config):
    words = check_overrides(["model.args.drop_path_rate=0.1"])
    assert compose_config(*words).model.args == {"drop_path_rate": 0.1}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stages.pretrain.epochs=0", "stages.pretrain.epochs: found 0, expected at least 1"),
        ("data.val_fraction=0.9", "data.val_fraction: found 0.9, expected 0.01 to 0.5"),
        ("optimizer.lr=nan", "optimizer.lr: found nan"),
        ("data.fit=stretched", 'data.fit: found "stretched", expected one of .*Did you mean "stretch"'),
        ("model.args.in_chans=1", "model.args.in_chans: found 1, expected 3"),
        ("model.args.num_classes=4", "model.args.num_classes: Pylorus sets it itself"),
        ("data.short_names=[A,B]", "data.short_names: found .* expected 3 different names"),
        ("data.classes=[a,a]", "data.classes: found .* expected each name only once"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(compose_config, word, message):
    with pytest.raises(PylorusError, match=message):
        compose_config(*check_overrides([word]))


def list_forbidden_values(schema: Any, path: str = "") -> list[tuple[str, object]]:
    """Names of keys, each with a value outside its range or apart from its choices."""
    forbidden: list[tuple[str, object]] = []
    for field, kind in iter_fields(schema):
        name, limits = f"{path}{field.name}", field.metadata
        if is_dataclass(kind):
            forbidden += list_forbidden_values(kind, f"{name}.")
        elif limits["low"] is not None:
            forbidden += [(name, limits["low"] - 1), *([(name, limits["high"] + 1)] if limits["high"] else [])]
        if limits.get("choices"):
            forbidden += [(name, word) for word in ("no_such_word", "", f"{limits['choices'][0]}\n")]
    return forbidden


def test_every_key_refuses_what_its_help_excludes(compose_config):
    config = compose_config()
    stages = [(f"stages.{stage}", StageConfig) for stage in config.stages]
    forbidden = list_forbidden_values(Config) + [
        each for path, schema in stages for each in list_forbidden_values(schema, f"{path}.")
    ]
    assert len(forbidden) > 80
    for name, value in forbidden:
        values = asdict(config)
        *path, last = name.split(".")
        functools.reduce(dict.__getitem__, path, values)[last] = value
        with pytest.raises(PylorusError, match=f"(?s)^{re.escape(name)}: found .*, expected "):
            check_config(validate(Config, values))


def test_text_instead_of_a_number_is_refused(compose_config):
    with pytest.raises(HydraException, match="epochs"):
        compose_config("stages.pretrain.epochs=three")


def test_a_missing_required_value_is_named(compose_config):
    with pytest.raises(PylorusError, match=re.escape("data.root: no value given. Add data.root=")):
        compose_config("data=folders")


def test_short_names_require_classes(compose_config):
    with pytest.raises(PylorusError, match="needs data.classes as well"):
        compose_config("data=folders", "data.root=X", "data.short_names=[A,B]")


def test_stage_both_is_pretrain_then_finetune(compose_config):
    assert list(compose_config("stage=both").stages) == ["pretrain", "finetune"]
    assert list(compose_config("stage=finetune").stages) == ["finetune"]


def test_a_sweep_over_stages_may_set_keys_of_a_stage_that_one_job_leaves_out(compose_config):
    assert list(compose_config("stage=pretrain", "stages.finetune.epochs=3").stages) == ["pretrain"]


@pytest.mark.parametrize(
    ("word", "message"), [("run=[pretain]", 'no stage "pretain".*"pretrain"'), ("run=[]", "found")]
)
def test_unknown_stages_are_refused(compose_config, word, message):
    with pytest.raises(PylorusError, match=message):
        compose_config(word)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.strategy=fsdp"], "averaging: found mean, expected none with trainer.strategy=fsdp"),
        (
            ["stages.finetune.patience=3"],
            "finetune.patience: found 3, expected null with averaging=mean, .* averaging.start=0",
        ),
    ],
)
def test_what_an_average_cannot_be_combined_with_is_refused(compose_config, words, message):
    with pytest.raises(PylorusError, match=message):
        compose_config("averaging=mean", *words)
    assert compose_config("averaging=mean", "averaging.start=0", "stages.finetune.patience=3").averaging.name == "mean"


def test_user_images_default_to_pretrained_weights_and_synthetic_ones_to_a_small_network(compose_config):
    assert compose_config().model.weights == "none"
    own = compose_config("data=folders", "data.root=X")
    assert (own.model.name, own.model.weights) == ("resnet50.tv_in1k", "hub")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=manifest"], "data.manifest: no value given"),
        (["data=shards"], "data.root: no value given"),
        (["data=folders", "data.root=X", "data.shard_window=2"], "data.shard_window: only allowed with data=shards"),
        (["data=folders", "data.root=X", "data.manifest=X.csv"], "data.manifest: only allowed with data=manifest"),
        (["data.fold=5"], "data.fold: found 5, expected 0 to 4"),
        (["data.fold=-1"], "data.fold: found -1, expected 0 to 4"),
        (["data.fold=B"], "data.fold: found B, expected 0 to 4 .* or a value of a manifest column with data.fold_column"),
        (["data.fold=1.5"], "data.fold: found 1.5, expected 0 to 4"),
        (["data=manifest", "data.manifest=X.csv", "data.fold_column=site"], "-m data.fold=A,B,C data.fold_column=site"),
        (["data=folders", "data.root=X", "data.fold=A", "data.fold_column=site"], "refers to a column of a manifest"),
        (["data.fold=0", "data.split_file=X"], "data.fold and data.split_file: each of them defines the test set"),
        (["data=manifest", "data.manifest=X.csv", "data.test_column=site"], "expected the column and exactly one of the other two"),
        (["data=manifest", "data.manifest=X.csv", "data.test_from=3"], "expected the column and exactly one of the other two"),
        (["data=folders", "data.root=X", "data.test_column=a", "data.test_from=3"], "refers to a column of a manifest"),
    ],
)  # fmt: skip
def test_contradictory_keys_for_the_test_set_are_refused(compose_config, words, message):
    with pytest.raises(PylorusError, match=message):
        compose_config(*words)


@pytest.mark.parametrize("value", ["B", "1", "01", "1.5", "2024-01-01", "'Site 3'"])
def test_a_fold_by_a_column_stays_text_after_a_round_trip(compose_config, tmp_path, value):
    config = compose_config("data=manifest", "data.manifest=X.csv", "data.fold_column=site", f"data.fold={value}")
    assert config.data.fold == value.strip("'")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    assert load_config(tmp_path / "config.yaml").data.fold == config.data.fold


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.root=/X"], "data.root: found /X, but data=synthetic, the default, .* type data=folders data.root=/X;"),
        (["data=synthetic", "data.root=/X"], "data.root: found /X, but data=synthetic"),
        (
            ["data=folders", "data.root=X", "data.drawn.images=40"],
            "data.drawn.images: found 40, but only data=synthetic",
        ),
        (["data=shards", "data.root=X", "data.drawn.overlay=true"], "data.drawn.overlay: found True, but only"),
        (["data.folds=3"], "data.folds: found 3 without data.fold, .* -m data.fold=0,1,2"),
        (
            ["data=manifest", "data.manifest=X.csv", "data.fold_column=site", "data.fold=A", "data.folds=3"],
            "data.folds: found 3, but the folds are the values of site",
        ),
    ],
)
def test_a_key_of_data_that_a_new_run_would_ignore_is_refused(tmp_path, words, message):
    with pytest.raises(PylorusError, match=message):
        train(words, folder=tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_of_an_earlier_version_with_a_key_that_it_ignored_can_be_resumed(compose_config, tmp_path):
    config = compose_config()
    config = replace(config, data=replace(config.data, root="/X", folds=3))
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
