"""What people type in their first hour is answered with the command that they meant, quoted for a shell."""

import os
import shlex
from pathlib import Path

import pytest

from pylorus import train
from pylorus.config.checks import check_paths
from pylorus.config.keys import check_used_keys, is_key
from pylorus.config.schema import StageConfig
from pylorus.config.vocabulary import GROUP_VALUES, SYNONYMS, VALUES, check_value, translate_key
from pylorus.core.errors import PylorusError, suggest_path
from pylorus.core.io import iter_fields
from pylorus.launch.corrections import explain_error
from pylorus.launch.main import _check_sweep
from pylorus.launch.overrides import check_overrides

BASE = ["data=folders", "data.root=D"]
EPOCHS = "stages.pretrain.epochs={0} stages.finetune.epochs={0}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with class folders, a table, shards and a folder with a space in its name."""
    monkeypatch.chdir(tmp_path)
    for name in ("D/a/1.jpg", "D/b/2.jpg", "shards/a-000.tar", "my images/a/1.jpg", "outputs/x/y/status.json"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    Path("labels.csv").write_text("path,label\n")


def answer(words: list[str]) -> str:
    """Return the message for a command line that is refused before it is composed."""
    with pytest.raises(PylorusError) as error:
        check_overrides(words)
    return str(error.value)


KEYS = [
    ("lr=0.001", "optimizer.lr=0.001"),
    ("learning_rate=1e-4", "optimizer.lr=1e-4"),
    ("epochs=5", EPOCHS.format(5)),
    ("max_epochs=3", EPOCHS.format(3)),
    ("trainer.max_epochs=3", EPOCHS.format(3)),
    ("+trainer.max_steps=3", EPOCHS.format(1)),
    ("batch_size=8", "trainer.batch_size=8"),
    ("bs=8", "trainer.batch_size=8"),
    ("data.batch_size=8", "trainer.batch_size=8"),
    ("gpu=0", "trainer=gpu"),
    ("gpu=false", "trainer=cpu"),
    ("trainer.gpus=1", "trainer.devices=1"),
    ("device=cuda", "trainer.accelerator=gpu"),
    ("device=cuda:1", "trainer=gpu"),
    ("device=cpu", "trainer.accelerator=cpu"),
    ("model.pretrained=false", "model.weights=none"),
    ("pretrained=True", "model.weights=hub"),
    ("pretrained=w.pth", "model.weights=w.pth"),
    ("cv=5", "-m data.fold=0,1,2,3,4"),
    ("n_splits=3", "-m data.fold=0,1,2 data.folds=3"),
    ("classes=[a,b]", "'data.classes=[a,b]'"),
    ("classes=a,b", "'data.classes=[a,b]'"),
    ("workers=0", "data.workers=0"),
    ("num_workers=4", "data.workers=4"),
    ("img_size=224", "data.image_size=224"),
    ("image_size=224px", "data.image_size=224"),
    ("fp16=true", "trainer.precision=16"),
    ("amp=true", "trainer.precision=auto"),
    ("amp=false", "trainer.precision=32"),
    ("name=first", "hydra.run.dir=outputs/first"),
    ("output_dir=out", "hydra.run.dir=out"),
    ("out=o", "hydra.run.dir=o"),
    ("arch=resnet50", "model=resnet50"),
    ("backbone=efficientnet_b0", "model=timm model.name=efficientnet_b0"),
    ("dropout=0.5", "model.args.drop_rate=0.5"),
    ("early_stopping=true", "stages.pretrain.patience=3 stages.finetune.patience=3"),
    ("stages.pretrain.early_stopping=4", "stages.pretrain.patience=4"),
    ("freeze=true", "stage=pretrain"),
    ("split=0.2", "data.test_fraction=0.2"),
    ("split=s.csv", "data.split_file=s.csv"),
    ("test_size=20", "data.test_fraction=0.2"),
    ("val_split=0.1", "data.val_fraction=0.1"),
    ("weight_decay=0.1", "optimizer.weight_decay=0.1"),
    ("patient=(P\\d+)", "'data.group=(P\\d+)'"),
    ("csv=labels.csv", "data.manifest=labels.csv"),
    ("wandb=true", "logger=wandb"),
    ("scheduler=cosine", "stages.pretrain.schedule=cosine stages.finetune.schedule=cosine"),
    ("random_state=3", "seed=3"),
    ("augmentation=strong", "augment=endoscopy"),
    ("lerning_rate=1", "optimizer.lr=1"),
    ("optmizer.lr=1", "optimizer.lr=1"),
    ("Optimizer.LR=1", "optimizer.lr=1"),
    ("pretrain.epochs=3", "stages.pretrain.epochs=3"),
    ("stages.pretrain.epoch=3", "stages.pretrain.epochs=3"),
    ("stages.pretrain.learning_rate=1", "stages.pretrain.lr=1"),
    ("modle=vgg19", "model=vgg19"),
    ("label_smoothing=0.1", "loss.label_smoothing=0.1"),
    ("resume_from=RUN", "resume=RUN"),
    ("debug=true", "experiment=debug"),
    ("max_steps=100", EPOCHS.format(1)),
    ("limit_train_batches=2", "trainer.args.limit_train_batches=2"),
    ("accumulate_grad_batches=4", "trainer.accumulate=4"),
]
VALUES_TYPED = [
    ("model=resnet5O", "model=resnet50"),
    ("model=ResNet50", "model=resnet50"),
    ("model=efficientnet_b0", "model=timm model.name=efficientnet_b0"),
    ("stage=fine-tune", "stage=finetune"),
    ("stage=all", "stage=both"),
    ("optimizer=adam", "optimizer=adamw"),
    ("augment=strong", "augment=endoscopy"),
    ("logger=mlflwo", "logger=mlflow"),
    ("logger=tb", "logger=tensorboard"),
    ("trainer=cuda", "trainer=gpu"),
    ("loss=ce", "loss=cross_entropy"),
    ("trainer.accelerator=GPU", "trainer.accelerator=gpu"),
    ("trainer.accelerator=cuda", "trainer.accelerator=gpu"),
    ("trainer.precision=fp16", "trainer.precision=16"),
    ("trainer.precision=32-true", "trainer.precision=32"),
    ("data.fit=Pad", "data.fit=pad"),
    ("data.val_fraction=20", "data.val_fraction=0.2"),
    ("data.on_error=skip", "data.on_error=quarantine"),
    ("model.weights=imagenet", "model.weights=hub"),
    ("report=ja", "report=true"),
    ("stages.finetune.schedule=CosineAnnealingLR", "stages.finetune.schedule=cosine"),
]


@pytest.mark.parametrize(("typed", "meant"), [*KEYS, *VALUES_TYPED])
def test_a_word_of_another_framework_leads_to_ours_with_its_value(typed, meant):
    words = [word for word in shlex.split(meant) if word != "-m"]
    switch = "-m " if meant.startswith("-m") else ""
    expected = " ".join(meant.removeprefix("-m ").split() if "'" not in meant else [meant])
    assert answer([*BASE, typed]).endswith(f"\nType:\n  python train.py {switch}data=folders data.root=D {expected}")
    if "resume=RUN" not in words:
        check_overrides([*BASE, *words, *(["-m"] if switch else [])])  # which are right


FORMS = [
    (["--data", "D", "--model", "small"], "data.root=D model=small"),
    (["--data=D", "--epochs", "5"], f"data.root=D {EPOCHS.format(5)}"),
    (["--lr", "0.1", *BASE], "optimizer.lr=0.1 data=folders data.root=D"),
    (["-lr", "0.1"], "optimizer.lr=0.1"),
    (["--no-report"], "report=false"),
    (["--model.weights", "none"], "model.weights=none"),
    (["help"], "--help"),
    (["-help"], "--help"),
    (["data=folders data.root=D seed=1"], "data=folders data.root=D seed=1"),
    (["data", "=", "folders", "data.root=D"], "data=folders data.root=D"),
    (["data.root", "=D"], "data.root=D"),
    (["data.root=", "D"], "data.root=D"),
    (["root=D"], "data.root=D"),
    (["data_dir=D"], "data.root=D"),
    (["data.root:D"], "data.root=D"),
    (["data.root:", "D"], "data.root=D"),
    (["lr:0.1"], "optimizer.lr=0.1"),
    ([*BASE, "data.classes=[a,", "b]"], "data=folders data.root=D 'data.classes=[a,b]'"),
    ([*BASE, "data.classes=[gastric", "cancer,", "ulcer]"], "data=folders data.root=D 'data.classes=[gastric cancer,ulcer]'"),
    ([*BASE, "data.classes=a,", "b"], "data=folders data.root=D 'data.classes=[a,b]'"),
    ([*BASE, "data.classes=[a,b"], "data=folders data.root=D 'data.classes=[a,b]'"),
    ([*BASE, "data.classes=a,b]"], "data=folders data.root=D 'data.classes=[a,b]'"),
    (["data.root=my", "images"], "'data.root=my images'"),
    (["D"], "data.root=D"),
    (["labels.csv"], "data.manifest=labels.csv"),
    (["outputs/x/y"], "resume=outputs/x/y"),
    (["resnet50", *BASE], "model=resnet50 data=folders data.root=D"),
    (["train", *BASE], "data=folders data.root=D"),
    (["data=D"], "data.root=D"),
    (["-m", "model=[vgg19,resnet50]"], "-m model=vgg19,resnet50"),
    (["-m", "model=vgg19,resnet5"], "-m model=vgg19,resnet50"),
    ([*BASE, "epochs=5", "stages.pretrain.epochs=1"], f"data=folders data.root=D {EPOCHS.format(5)}"),
    ([*BASE, "stage=pretrain", "epochs=5"], "data=folders data.root=D stage=pretrain stages.pretrain.epochs=5"),
    ([*BASE, "lr=1", "bs=2", "img_size=3x3"], "data=folders data.root=D optimizer.lr=1 trainer.batch_size=2 data.image_size=3"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "line"), FORMS)
def test_another_form_of_words_is_answered_with_the_command_in_ours(words, line):
    assert answer(words).endswith(f"\nType:\n  python train.py {line}")


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["model=vgg19,resnet50"], ["To sweep over them:\n  python train.py -m model=vgg19,resnet50"]),
        (["data.classes=a,b"], ["If they are a list:\n  python train.py 'data.classes=[a,b]'"]),
        (
            ["stage=pretrain,finetune"],
            ["in one run:\n  python train.py stage=both", "python train.py -m stage=pretrain,"],
        ),
        (["optimizer.lr=0,1"], ["If it is a decimal number:\n  python train.py optimizer.lr=0.1"]),
    ],
)
def test_a_comma_in_a_run_that_is_no_sweep_names_what_may_be_meant(words, lines, tmp_path):
    with pytest.raises(PylorusError) as error:
        train(words, folder=tmp_path / "run")
    assert all(line in str(error.value) for line in lines)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.image_size=224px", 'data.image_size: found "224px", expected a whole number, such as 224.'),
        ("trainer.devices=[0]", 'trainer.devices: found "[0]", expected a whole number, such as 1.'),
        ("seed=abc", 'seed: found "abc", expected a whole number of at least 0.'),
        ("optimizer.lr=1e-3x", 'optimizer.lr: found "1e-3x", expected a number, such as 1e-3.'),
        ("loss.class_weights=[1,2,3]", 'loss.class_weights: found "[1,2,3]", expected one of none, balanced.'),
        ("stages.pretrain.epochs=three", "expected a whole number of at least 1."),
        ("data.fold=5", "data.fold: found 5, expected 0 to 4"),
        ("data.short_names=[A,B]", "data.short_names: needs data.classes as well"),
        ("ema=true", "averaging=ema"),
        ("averaging=swa", "averaging=mean"),
        ("averaging.name=polyak", 'averaging.name: found "polyak", expected one of ema, mean, none'),
        ("averaging.decay=1", "averaging.decay: found 1"),
        ("mixup=0.2", "Pylorus has nothing of the kind: leave it out."),
        ("num_classes=3", "The number of classes follows from the class folders: leave it out."),
        ("val_dir=v", "data.root names the folder above"),
        ("model.weights=D", "model.weights: found {folder}/D, expected hub, none, or an existing file."),
        ("data.root=labels.csv", "It is a file. For a table, type data=manifest data.manifest={folder}/labels.csv"),
        ("data.root=d", "data.root: found {folder}/d, expected an existing folder. Did you mean"),
        (r"data.root=C:\Users\Eva", "It is a path of Windows; in WSL it is /mnt/c/Users/Eva."),
    ],
)
def test_a_wrong_value_is_answered_in_our_own_words(word, message, tmp_path):
    with pytest.raises(PylorusError) as error:
        train([*BASE, word], folder=tmp_path / "run")
    assert message.format(folder=tmp_path) in str(error.value)


def test_a_pattern_that_lost_its_backslash_in_the_shell_is_shown_with_it():
    error = PylorusError("data.group: 'patient_d+' finds no patient in 36 of 36 paths:")
    assert explain_error(error, ["data.group=patient_d+"]).endswith("python train.py 'data.group=patient_\\d+'")


def test_groups_are_listed_once():
    known = answer(["nothing_like_this=1"]).split("Keys at this level: ")[1].split(".")[0].split(", ")
    assert len(known) == len(set(known)) > 10


def test_every_synonym_leads_to_keys_that_exist():
    for words, meaning in SYNONYMS.items():
        for template in [meaning] if isinstance(meaning, str) else meaning.values():
            for word in template.partition("#")[0].split():
                key = word.partition("=")[0].replace("*", "finetune")
                is_file = key in ("model", "stage", "augment", "optimizer", "loss", "trainer", "logger", "data")
                assert (
                    is_file or key in ("-m", "resume", "experiment", "--config-dir", "hydra.run.dir") or is_key(key)
                ), words
    every = [word for words in SYNONYMS for word in words.split()]
    assert len(every) == len(set(every)) > 250
    stage_keys = {field.name for field, _ in iter_fields(StageConfig)}
    for key, values in VALUES.items():
        assert is_key(key.replace("*", "pretrain")) or key.split(".")[-1] in stage_keys
        for value in values.values():
            check_value(key.replace("*", "pretrain"), value)
    for patterns in GROUP_VALUES.values():
        for template in patterns.values():
            words = template.replace("{}", "adam").split()
            if words != ["experiment=search"]:  # which needs an extra
                check_overrides(words)


def test_a_word_without_a_value_or_meaning_gives_nothing():
    assert translate_key("nothing_like_this", "1") == ([], "")


SOURCES = [
    ("data.root=D", "folders"),
    ("data.root=labels.csv", "manifest"),
    ("data.root=shards", "shards"),
    ("data.root=s3://bucket/shard-{000..127}.tar", "shards"),
    ("data.manifest=labels.csv", "manifest"),
]


@pytest.mark.parametrize(("word", "kind"), SOURCES)
def test_the_source_of_the_images_follows_from_what_is_given(compose_config, word, kind):
    config = compose_config(*check_overrides([word]))
    assert config.data.kind == kind
    assert (config.data.manifest is not None) == (kind == "manifest")


def test_a_source_that_was_chosen_is_left_as_it_is(compose_config):
    assert check_overrides(["data.root=D"], resuming=True) == ["data.root=D"]
    assert check_overrides(["experiment=paper", "data.root=D"]) == ["experiment=paper", "data.root=D"]
    debug = compose_config(*check_overrides(["experiment=debug", "data.root=D"]))
    assert (debug.data.kind, debug.data.image_size, debug.model.name) == ("folders", 64, "resnet10t")


UNUSED = [
    (["stage=pretrain", "stages.finetune.epochs=3"], "stages.finetune.epochs: found 3, but this run does not train"),
    (["stages.pretrain.lr=1e-3", "stages.pretrain.lr_factor=2"], "stages.pretrain.lr_factor: found 2.0, but stages"),
    (["stage=pretrain", "augment=light"], "augment: found light, but every stage of this run has a policy of its own"),
    (["stages.pretrain.views=3"], "stages.pretrain.views: found 3, but the stage does not augment"),
    (["stages.pretrain.layer_decay=0.8"], "layer_decay: found 0.8, but the stage trains the head only"),
    (
        ["optimizer.momentum=0.5"],
        "optimizer.momentum: found 0.5, but this optimizer does not use it. Add optimizer=sgd",
    ),
    (["logger.project=x"], "logger.project: found x, but logger=csv, the default, shows nothing on a dashboard"),
    (["logger=tensorboard", "logger.offline=false"], "logger.offline: found False, but TensorBoard has no projects"),
    (["data.fold=0", "data.test_fraction=0.2"], "data.test_fraction: found 0.2, but the test images are given"),
    (["data.validation=test", "data.val_fraction=0.2"], "data.val_fraction: found 0.2, but the validation images"),
    (["stages.pretrain.lr=1", "stages.finetune.lr=1", "optimizer.lr=0.1"], "optimizer.lr: found 0.1, but every stage"),
    (["trainer.strategy=fsdp"], "trainer.strategy: found fsdp, but there is a single device"),
    (["averaging.every=3"], "averaging.every: found 3, but averaging=none, the default, averages nothing"),
    (["averaging=mean", "averaging.decay=0.99"], "averaging.decay: found 0.99, but averaging=mean gives all weights"),
    (["data.folds=3"], "data.folds: found 3 without data.fold"),
    (["data=folders", "data.root=D", "data.drawn.images=7"], "data.drawn.images: found 7, but only data=synthetic"),
]


@pytest.mark.parametrize(("words", "message"), UNUSED)
def test_a_key_that_a_run_would_not_use_is_refused(words, message, tmp_path):
    with pytest.raises(PylorusError) as error:
        train(words, folder=tmp_path / "run")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["stage=both", "stages.finetune.epochs=3", "stages.finetune.lr_factor=0.1", "stages.finetune.layer_decay=0.8"],
        ["optimizer=sgd", "optimizer.momentum=0.5"],
        ["logger=wandb", "logger.project=x", "logger.images=true"],
        ["logger.offline=true", "optimizer.momentum=0.9"],  # the defaults
        ["stage=pretrain", "augment=none"],
        ["averaging=ema", "averaging.decay=0.99", "averaging.every=2", "averaging.start=0.2"],
        ["stages.pretrain.augment=light", "stages.pretrain.views=3"],
    ],
)
def test_keys_that_are_used_or_say_what_holds_anyway_are_accepted(compose_config, words):
    check_used_keys(compose_config(*check_overrides(words)), words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "seed=0,1", "stage=pretrain", "stages.finetune.epochs=3"], "stages.finetune.epochs: found 3, but"),
        (["-m", "optimizer.lr=0.1,0.01", "logger.project=x"], "logger.project: found x"),
        (["-m", "stage=pretrain,both", "stages.finetune.epochs=3"], None),
        (["-m", "optimizer=adamw,sgd", "optimizer.momentum=0.5"], None),
        (["-m", "augment=none,light", "stage=pretrain,finetune"], None),
    ],
)
def test_a_key_of_a_sweep_is_refused_only_if_no_job_uses_it(words, message):
    if message is None:
        _check_sweep(check_overrides(words))
        return
    with pytest.raises(PylorusError, match=message):
        _check_sweep(check_overrides(words))


def test_a_model_on_synthetic_images_keeps_its_own_rate_and_size(compose_config):
    small, vgg = compose_config(), compose_config("model=vgg19")
    assert (small.optimizer.lr, small.data.image_size) == (0.01, 96)
    assert (vgg.optimizer.lr, vgg.data.image_size) == (1e-3, None)


def test_paths_that_exist_pass_and_their_neighbours_are_suggested(compose_config, tmp_path):
    check_paths(compose_config("data=folders", "data.root=D"))
    check_paths(compose_config("data=shards", "data.root=s3://bucket/x.tar"))
    assert suggest_path(str(tmp_path / " D")).strip() == f'Did you mean "{tmp_path}/D", without the space?'
    assert "my images" in suggest_path(str(tmp_path / "my_images"))
    assert suggest_path(str(tmp_path / "no" / "such")).strip() == f"{tmp_path} exists, but it contains no no."
    assert os.getcwd() == str(tmp_path)  # noqa: PTH109
