"""What people type who know another framework, and what it is called here: keys, files of conf/, and values.

The words are in tables; a new word is one entry. A key that is missing there but is the last part of one of our keys
(`image_size=224`) is found in the schema itself.
"""

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pylorus.config.keys import get_key_metadata, is_key
from pylorus.config.schema import GROUPS, Config, StageConfig, list_group_files
from pylorus.core.errors import TRAIN_COMMAND, PylorusError, format_suggestion
from pylorus.core.io import iter_fields

_ON, _OFF = "true|1|yes|on", "false|0|no|off|none|null|"
_NUMBER = r"\d+"
_EPOCHS = "stages.*.epochs={}"
_FOLDS = {
    "5": "-m data.fold=0,1,2,3,4",
    _NUMBER: "-m data.fold={range} data.folds={}",
    _ON: "-m data.fold=0,1,2,3,4",
}
_DASHBOARD = {_OFF: "logger=csv", _ON: "logger={name}", ".*": "logger={name} logger.project={}"}
_LIGHTNING = "trainer.args.{name}={}"
_FOLLOWS_FROM_FOLDERS = "# The number of classes follows from the class folders: leave it out."

SYNONYMS: Mapping[str, str | Mapping[str, str]] = {
    # training
    "lr learning_rate base_lr init_lr lr0 lrate eta max_lr rate": "optimizer.lr={}",
    "epochs epoch max_epochs num_epochs n_epochs num_train_epochs nb_epoch total_epochs n_epoch": _EPOCHS,
    "fine_tune_epochs finetune_epochs unfrozen_epochs": "stages.finetune.epochs={}",
    "head_epochs pretrain_epochs frozen_epochs freeze_epochs warmup_head_epochs": "stages.pretrain.epochs={}",
    "batch_size bs batch batchsize train_batch_size per_device_train_batch_size minibatch": "trainer.batch_size={}",
    "early_stopping early_stop patience early_stopping_patience": {
        _ON: "stages.*.patience=3",
        _OFF: "stages.*.patience=null",
        ".*": "stages.*.patience={}",
    },
    "scheduler lr_scheduler lr_schedule sched schedule_type": {
        "(cosine|plateau|constant)": "stages.*.schedule={}",
        ".*cos.*": "stages.*.schedule=cosine",
        ".*plateau.*": "stages.*.schedule=plateau",
        f"{_OFF}|fixed|const": "stages.*.schedule=constant",
        ".*": "stages.*.schedule=cosine",
    },
    "warmup_ratio warmup_fraction warmup_epochs warmup_steps": {
        r"0?\.\d+|0": "stages.*.warmup={}",
        ".*": "stages.*.warmup=0.1 # It is the fraction of a stage's steps.",
    },
    "weight_decay wd decay l2 weightdecay": "optimizer.weight_decay={}",
    "beta beta1 mom": "optimizer.momentum={}",
    "clip clip_grad grad_clip gradient_clip gradient_clip_val clip_norm max_grad_norm clip_grad_norm": (
        "optimizer.clip={}"
    ),
    "opt optim optimiser optimizer_name solver": "optimizer={}",
    "criterion loss_function loss_fn loss_name objective": "loss={}",
    "smoothing label_smooth ls": "loss.label_smoothing={}",
    "class_weight class_weights weighted balanced pos_weight": {
        _OFF: "loss.class_weights=none",
        ".*": "loss.class_weights=balanced # The weights follow from the frequencies of the classes.",
    },
    "gamma focal_gamma": "loss=focal loss.args.gamma={}",
    "focal focal_loss": "loss=focal",
    "tau logit_adjustment_tau": "loss=logit_adjusted loss.args.tau={}",
    "logit_adjust logit_adjusted logit_adjustment balanced_softmax": "loss=logit_adjusted",
    "weighted_sampler balanced_sampler balanced_sampling class_balanced_sampling oversample oversampling": (
        "loss=logit_adjusted # It balances rare and frequent classes in the loss; docs/imbalance.md compares both."
    ),
    "accumulate_grad_batches gradient_accumulation_steps accum_iter accumulation_steps accumulation": (
        "trainer.accumulate={}"
    ),
    "random_state random_seed seeds manual_seed rng seed_everything": "seed={}",
    "layer_wise_lr_decay llrd lr_decay discriminative_lr": "stages.finetune.layer_decay={}",
    "freeze freeze_backbone frozen freeze_encoder linear_probe feature_extraction": {
        f"{_ON}|all|backbone|encoder": "stage=pretrain",
        f"{_OFF}": "stage=finetune",
        ".*": "stages.finetune.learn=layer4 # It names the first block that is trained, or head, or all.",
    },
    "unfreeze finetune fine_tune fine_tuning transfer trainable trainable_layers train_layers": {
        f"{_ON}|all": "stage=both",
        _OFF: "stage=pretrain",
        ".*": "stages.finetune.learn={}",
    },
    "save_best checkpoint_metric best_metric metric_for_best_model": {
        f"{_ON}|{_OFF}": "stages.*.monitor=loss",
        ".*": "stages.*.monitor={}",
    },
    "ema model_ema use_ema ema_decay model_ema_decay": {
        _OFF: "averaging=none",
        r"0?\.\d+": "averaging=ema averaging.decay={}",
        ".*": "averaging=ema",
    },
    "swa weight_averaging polyak": {_OFF: "averaging=none", ".*": "averaging=mean"},
    "mixup cutmix distillation teacher": "# Pylorus has nothing of the kind: leave it out.",
    "tta test_time_augmentation": "# It is an option of pylorus predict and pylorus validate: --tta flips.",
    # network
    "arch architecture backbone net network encoder model_name base_model model_type model_arch": {
        "({models})": "model={}",
        ".*": "model=timm model.name={}",
    },
    "pretrained pretrain_weights pretrained_weights imagenet init_weights weights checkpoint_path initial_weights": {
        f"{_ON}|imagenet.*|default|hub": "model.weights=hub",
        f"{_OFF}|random|scratch": "model.weights=none",
        ".*": "model.weights={}",
    },
    "from_scratch scratch": {_OFF: "model.weights=hub", ".*": "model.weights=none"},
    "dropout drop drop_rate dropout_rate p_dropout": "model.args.drop_rate={}",
    "drop_path stochastic_depth drop_path_rate": "model.args.drop_path_rate={}",
    "num_classes n_classes nb_classes nclass classes_num num_labels": _FOLLOWS_FROM_FOLDERS,
    "in_chans channels in_channels num_channels": "# Every image is converted to RGB: leave it out.",
    "normalize_mean img_mean image_mean": "model.mean={}",
    "normalize_std img_std image_std": "model.std={}",
    # images
    "root data_root data_dir data_path dataset datadir dataset_dir dataset_path image_dir images_dir img_dir "
    "image_folder folder input_dir train_dir train_path train_data images input": "data.root={}",
    "manifest csv csv_file csv_path table labels label_file labels_file annotations annotation_file dataframe df "
    "metadata train_csv": "data.manifest={}",
    "shards wds webdataset": "data=shards data.root={}",
    "classes class_names class_list categories names": {_NUMBER: _FOLLOWS_FROM_FOLDERS, ".*": "data.classes={list}"},
    "short_name abbreviations": "data.short_names={list}",
    "ignore_classes skip_classes exclude_classes": "data.exclude={list}",
    "patient patients patient_id patient_regex group_by groups subject case": "data.group={}",
    "img_size imgsz image_size imgsize input_size resize resolution im_size crop_size target_size size": {
        r"\D*(\d+)\D*.*": "data.image_size={1}"
    },
    "workers num_workers n_workers nworkers n_jobs num_cpus dataloader_num_workers": "data.workers={}",
    "test_size test_split test_ratio test_frac test_percent": {
        r"0?\.\d+": "data.test_fraction={}",
        r"(\d\d?)%?": "data.test_fraction={fraction}",
        ".*": "data.test_fraction=0.15",
    },
    "val_size val_split val_ratio valid_pct validation_split valid_size validation_size val_frac val_percent": {
        r"0?\.\d+": "data.val_fraction={}",
        r"(\d\d?)%?": "data.val_fraction={fraction}",
        ".*": "data.val_fraction=0.15",
    },
    "split splits split_csv split_path": {
        r".*\.csv": "data.split_file={}",
        r"0?\.\d+": "data.test_fraction={}",
        r"(\d\d?)%?": "data.test_fraction={fraction}",
        ".*": "data.split_file=RUN/split.csv # Or data.test_fraction=0.15, for a new split.",
    },
    "cv folds n_folds num_folds k kfold k_fold k_folds n_splits cross_validation crossval xval": _FOLDS,
    "val_dir valid_dir val_path test_dir test_path val_data test_data valid": (
        "# data.root names the folder above: DIR/train, DIR/val and DIR/test, each with class folders."
    ),
    "aug augs augmentation augmentations transform transforms data_augmentation augmenter": {
        _OFF: "augment=none",
        "({augment})": "augment={}",
        "heavy|strong|hard|full|medium": "augment=endoscopy",
        ".*": "augment=light",
    },
    "letterbox padding": {_OFF: "data.fit=stretch", ".*": "data.fit=pad"},
    "center_crop centercrop": {_OFF: "data.fit=pad", ".*": "data.fit=crop"},
    # machine
    "gpu cuda use_gpu use_cuda": {
        "true|yes|on|0|": "trainer=gpu",
        "false|no|off|none|-1": "trainer=cpu",
        ".*": "trainer=gpu # To choose among several: CUDA_VISIBLE_DEVICES={} before it.",
    },
    "gpus num_gpus n_gpu n_gpus ngpus ngpu world_size nproc_per_node num_devices": {
        "0|none|false": "trainer=cpu",
        _NUMBER: "trainer.devices={}",
        ".*": "trainer.devices=1 # It is a number. To choose some: CUDA_VISIBLE_DEVICES={} before it.",
    },
    "device dev accelerator_type platform": {
        "cpu|mps|auto": "trainer.accelerator={}",
        r"(?:cuda|gpu)?:?(\d+)": "trainer=gpu # To choose among several: CUDA_VISIBLE_DEVICES={1} before it.",
        "cuda|gpu": "trainer.accelerator=gpu",
        ".*": "trainer.accelerator=auto",
    },
    "fp16 half float16 use_fp16": {_OFF: "trainer.precision=32", ".*": "trainer.precision=16"},
    "bf16 bfloat16": {_OFF: "trainer.precision=32", ".*": "trainer.precision=bf16"},
    "fp32 float32": {_OFF: "trainer.precision=auto", ".*": "trainer.precision=32"},
    "amp mixed_precision use_amp autocast native_amp": {
        _OFF: "trainer.precision=32",
        "16.*|fp16": "trainer.precision=16",
        "bf16.*": "trainer.precision=bf16",
        ".*": "trainer.precision=auto",
    },
    "num_nodes nnodes n_nodes": "trainer.nodes={}",
    "ddp distributed parallel multi_gpu": {_OFF: "trainer.devices=1", ".*": "trainer.devices=2"},
    "fsdp": {_OFF: "trainer.strategy=ddp", ".*": "trainer.strategy=fsdp"},
    "torch_compile compile_model": "trainer.compile={}",
    "num_threads n_threads cpu_threads omp_threads": "trainer.threads={}",
    "progress_bar enable_progress_bar tqdm verbose": {
        "0|false|no|off": "trainer.progress=false",
        ".*": "trainer.progress=true",
    },
    "cache_dir cachedir": "cache.folder={}",
    "limit_train_batches limit_val_batches log_every_n_steps fast_dev_run detect_anomaly deterministic profiler "
    "benchmark": _LIGHTNING,
    "val_check_interval check_val_every_n_epoch overfit_batches num_sanity_val_steps eval_every save_every": (
        "# Each epoch ends with one validation, after which it is saved: leave it out."
    ),
    "max_time": "# A stage ends after its epochs: leave it out.",
    "sync_batchnorm sync_bn": "# With several devices, Pylorus synchronizes batch norm itself: leave it out.",
    "max_steps num_steps max_iter iterations n_iter": "stages.*.epochs=1 # A stage counts epochs, not steps.",
    # results
    "out output output_dir outdir out_dir outputs save_dir savedir save_path log_dir logdir run_dir workdir work_dir "
    "result_dir results results_dir default_root_dir": "hydra.run.dir={}",
    "name run_name exp_name experiment_name exp job_name title tag": "hydra.run.dir=outputs/{}",
    "resume_from resume_from_checkpoint ckpt ckpt_path checkpoint load_from restore continue last": {
        f"{_ON}|{_OFF}|last|best": "resume=RUN",
        ".*": "resume={}",
    },
    "wandb use_wandb": {**_DASHBOARD},
    "tensorboard tb use_tensorboard": {_OFF: "logger=csv", ".*": "logger=tensorboard"},
    "mlflow use_mlflow": {**_DASHBOARD},
    "log loggers tracker report_to logging": {
        "({logger})": "logger={}",
        _OFF: "logger=csv",
        ".*": "logger=tensorboard",
    },
    "project project_name wandb_project": "logger=wandb logger.project={}",
    "positive_class pos_label target_class class_of_interest": "deploy.class_name={}",
    "recall min_sensitivity target_sensitivity": "deploy.sensitivity={}",
    "debug demo smoke_test dry_run test_run quick": {_OFF: "", ".*": "experiment=debug"},
    "sweep multirun grid grid_search": "-m",
    "search hpo tune hyperparameter_search optuna": "-m experiment=search",
    "config config_file cfg config_path yaml": "--config-dir=DIR # With your files in DIR/GROUP/FILE.yaml.",
}
"""Words of other frameworks → what to type here.

A value is what takes the place of KEY=VALUE, or patterns of the value (whole, in any case, first match) with it. There
`{}` is the value as typed, `{1}` a group of the pattern, `{list}` the value in brackets, `{range}` 0 to value - 1,
`{fraction}` the value in percent as a fraction, `{name}` the key, `*` each stage; after `#` stands a sentence.
"""


GROUP_VALUES: Mapping[str, Mapping[str, str]] = {
    "data": {
        "folder|dir|directory|images?|image_?folders?|real|own|local": "data=folders",
        "csv|table|tables|dataframe|parquet|list|file": "data=manifest",
        "tars?|wds|webdataset|shard": "data=shards",
        "fake|demo|drawn|toy|dummy|random|synth|generated": "data=synthetic",
    },
    "stage": {
        r"all|full|two|2|two.?stages?|pretrain.{1,3}fine.?tune": "stage=both",
        "head|frozen|freeze|linear|linear.?prob(e|ing)|pre.?train(ed|ing)?|first|1": "stage=pretrain",
        "fine.?tun(e|ed|ing)|unfrozen|tune|whole|second|train": "stage=finetune",
        "gradual.*|progressive.*|ulmfit|step.?wise|unfreez(e|ing)|three|3|four|4": "stage=gradual",
    },
    "augment": {
        "strong|heavy|hard|full|medium|endoscop.*|gastroscop.*": "augment=endoscopy",
        "default|basic|weak|simple|auto.*|rand.*|trivial.*|true|yes|on|small|flip": "augment=light",
        "false|no|off|null|0": "augment=none",
    },
    "optimizer": {r"adam\s?w": "optimizer=adamw", "momentum|nesterov": "optimizer=sgd", ".*": "optimizer.name={}"},
    "loss": {
        "ce|bce|nll|cross.?entropy.*|crossentropyloss|softmax": "loss=cross_entropy",
        "focal.*": "loss=focal",
        "logit.?adj.*|balanced.?softmax|la": "loss=logit_adjusted",
    },
    "averaging": {
        "true|yes|on|exponential.*|model_?ema": "averaging=ema",
        "swa|equal|average|polyak.*|avg": "averaging=mean",
        "false|no|off|null|0": "averaging=none",
    },
    "trainer": {
        r"cuda.*|gpus?|nvidia|true|\d": "trainer=gpu",
        "false|none|off": "trainer=cpu",
        "auto": "trainer=default",
    },
    "logger": {
        "tb|tensor.?board.*": "logger=tensorboard",
        "w.?(and)?.?b|weights.*": "logger=wandb",
        "ml.?flow.*": "logger=mlflow",
        "none|false|off|null|no|file": "logger=csv",
    },
    "model": {
        "res.?net.?50.*": "model=resnet50",
        "vgg.?19.*": "model=vgg19",
        "inception.*": "model=inception_v3",
        r"[a-z]\w*\d[\w.]*": "model=timm model.name={}",
    },
    "experiment": {
        "demo|test|quick|smoke.*|dry.?run": "experiment=debug",
        "study|article|publication": "experiment=paper",
        "optuna|hpo|tune": "experiment=search",
    },
}
"""Words for a file of a group of conf/ → what to type, by patterns of the value as in `SYNONYMS`."""


VALUES: Mapping[str, Mapping[str, str]] = {
    "trainer.accelerator": {r"cuda.*|nvidia|gpus|\d|true": "gpu", "metal|apple": "mps", "false|none|null": "cpu"},
    "trainer.precision": {
        "fp16|half|float16|16.?mixed|16.?true": "16",
        "bf16.*|bfloat16|mixed|amp": "bf16",
        "fp32|full|float32|32.?true|single|high|highest": "32",
        "true|default|none|null": "auto",
    },
    "trainer.strategy": {"dp|ddp.*|auto|single.*|horovod": "ddp", "fsdp.*|deepspeed.*|zero.*|sharded": "fsdp"},
    "model.weights": {"imagenet.*|pretrained|true|yes|default|timm": "hub", "false|no|random|scratch|null": "none"},
    "stages.*.schedule": {".*cos.*": "cosine", ".*plateau.*": "plateau", "none|null|fixed|const|off": "constant"},
    "loss.class_weights": {"true|yes|on|auto|inverse.*|weighted": "balanced", "false|no|off|null|equal": "none"},
    "data.crop": {"true|yes|on|fov|field.*": "auto", "false|no|off|null": "none"},
    "data.mask": {"true|yes|on|text|auto": "overlays", "false|no|off": "none"},
    "data.fit": {"resize|squash|scale": "stretch", "letterbox|padding": "pad", "center.?crop": "crop"},
    "data.validation": {"train|true|split|fraction|none": "cut"},
    "data.on_error": {"skip|ignore|drop|continue|warn": "quarantine", "stop|raise|error|abort": "fail"},
    "data.patients": {"path|folder|folders|group|regex|manifest": "paths", "dcm|patientid": "dicom"},
    "data.kind": {"folder|image_?folder": "folders", "csv|table": "manifest", "tar|wds": "shards"},
}
"""Words for the values of keys that take one of a few → the value here, by patterns as in `SYNONYMS`."""
TRUE, FALSE = "true|yes|on|y|1|ja|oui|si|t", "false|no|off|n|0|nein|non|f"


STAGES = ("pretrain", "finetune")
"""The stages of conf/config.yaml: `stages.*.KEY` below stands for the key of each that the command trains."""


class UnknownKeyError(PylorusError):
    """A key that does not exist.

    Attributes:
        words: What to type in its place; empty if nothing is close.
    """

    def __init__(self, message: str, words: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.words = list(words)


def check_key(path: str, *, schema: type = Config, value: str | None = None, stages: Sequence[str] = STAGES) -> None:
    """Check that the schema has a dotted key.

    Args:
        path: The key.
        schema: The dataclass at its root.
        value: The value that was typed with it, for the suggestion; None: the key alone.
        stages: The stages that the command trains.

    Raises:
        UnknownKeyError: If it does not; the message names the unknown part, and what is meant by it here.
    """
    kind: Any = schema
    parents: list[str] = []
    for part in path.split("."):
        if dataclasses.is_dataclass(kind):
            known = {field.name: field_kind for field, field_kind in iter_fields(kind)}
            if part not in known:
                raise _build_unknown_key_error(path, parents, part, list(known), value, stages)
            kind = known[part]
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is Any:
            return
        else:
            raise UnknownKeyError(f'{path}: "{".".join(parents)}" is a single value and has no keys of its own.')
        parents.append(part)


def _build_unknown_key_error(
    path: str, parents: list[str], part: str, known: list[str], value: str | None, stages: Sequence[str]
) -> UnknownKeyError:
    problem = f'"{".".join(parents)}" has no key "{part}"' if parents else f'there is no key "{part}"'
    names = known if parents else list(dict.fromkeys([*known, *GROUPS]))
    if part in names:
        problem = f'"{part}" is a group of files, as in {part}=NAME, and has no keys'
    words, note = ([], "") if part in names else translate_key(path, value, stages=stages)
    own, _, last = words[0].partition("=")[0].rpartition(".") if len(words) == 1 else ("", "", "")
    if parents and own == ".".join(parents) and format_suggestion(part, [last], cutoff=0.8):
        return UnknownKeyError(f'{path}: {problem}. Did you mean "{last}"?', words)
    if words or note:
        text = f" Did you mean {' '.join(words)}?" if words else ""
        return UnknownKeyError(f"{path}: {problem}.{text}{f' {note}' if note else ''}", words)
    suggestion = format_suggestion(part, set(names) - {part}, cutoff=0.6)
    if suggestion:
        nearest = suggestion.split('"')[1]
        rest = path.split(".")[len(parents) + 1 :]
        key = ".".join([*parents, nearest, *rest])
        words = [key if value is None else f"{key}={value}"] if key in GROUPS or is_key(key) else []
    return UnknownKeyError(
        f"{path}: {problem}.{suggestion}\n"
        f"Keys at this level: {', '.join(names)}. For all keys, run: {TRAIN_COMMAND} --help",
        words,
    )


def translate_key(path: str, value: str | None, *, stages: Sequence[str] = STAGES) -> tuple[list[str], str]:
    """Translate a key that does not exist into what it is called here.

    Args:
        path: The key as typed, such as trainer.max_epochs.
        value: Its value; None: none was typed.
        stages: The stages that the command trains.

    Returns:
        The words to type in its place, and a sentence about them; both empty if nothing is known.

    Example:
        >>> translate_key("epochs", "5")
        (['stages.pretrain.epochs=5', 'stages.finetune.epochs=5'], '')
        >>> translate_key("trainer.max_epochs", "5", stages=["finetune"])
        (['stages.finetune.epochs=5'], '')
        >>> translate_key("model.pretrained", "False")
        (['model.weights=none'], '')
    """
    *parents, name = path.split(".")
    in_stage = [part for part in parents if part in STAGES]
    named = _normalize(name)
    if "stages" in parents or in_stage or (parents and parents[0] == "stage"):
        own = {_normalize(field.name): field.name for field, _ in iter_fields(StageConfig)}
        aliases = {"learningrate": "lr", "learning_rate": "lr", "baselr": "lr", "initlr": "lr", "trainable": "learn"}
        key = own.get(named) or aliases.get(named)
        if key is not None:
            return _fill(f"stages.*.{key}={{}}", name, value, in_stage or stages)
    template = _find_template(named, value)
    if template is None:
        template = _find_leaf(named, parents)
    if template is None and not parents:
        nearest = difflib.get_close_matches(named, [*_index_synonyms(), *_index_leaves()], n=1, cutoff=0.85)
        if nearest:
            template = _find_template(nearest[0], value) or _find_leaf(nearest[0], parents)
    return ([], "") if template is None else _fill(template, name, value, in_stage or stages)


def check_value(key: str, value: str) -> None:
    """Check the value of a key that takes one of a few words, or true and false.

    Args:
        key: The key.
        value: Its value as typed, one only.

    Raises:
        UnknownKeyError: If it is none of them; suggests the one that is meant.
    """
    metadata = get_key_metadata(key)
    plain = value.strip().strip("'\"")
    generic = re.sub(r"^stages\.\w+\.", "stages.*.", key)
    choices = list(metadata.get("choices") or ())
    if metadata.get("kind") is bool:
        choices = ["true", "false"]
        meant = "true" if re.fullmatch(TRUE, plain, re.IGNORECASE) else ""
        meant = meant or ("false" if re.fullmatch(FALSE, plain, re.IGNORECASE) else "")
        is_wrong = not meant or plain.lower() in ("ja", "oui", "si", "nein", "non")
    else:
        is_limited = bool(choices) and metadata.get("low") is None
        meant = next((word for pattern, word in VALUES.get(generic, {}).items()
                      if re.fullmatch(pattern, plain, re.IGNORECASE)), "")  # fmt: skip
        is_wrong = (is_limited and plain not in choices) or (key == "model.weights" and bool(meant))
        high = metadata.get("high")
        if (
            high is not None
            and high <= 1
            and re.fullmatch(r"\d+(\.\d+)?%?", plain)
            and 1 < float(plain.strip("%")) <= 100
        ):
            raise UnknownKeyError(
                f"{key}: found {plain}, expected {metadata['low']} to {high}. "
                f'Did you mean "{float(plain.strip("%")) / 100:g}"?',
                [f"{key}={float(plain.strip('%')) / 100:g}"],
            )
    if not is_wrong or not plain or (plain == "null" and (metadata.get("is_optional") or not choices)):
        return
    nearest = meant or next(iter(format_suggestion(plain, choices).split('"')[1:]), "")
    suggestion = f' Did you mean "{nearest}"?' if nearest else ""
    expected = f"one of {', '.join(choices)}" if choices else "hub, none, or an existing file"
    if metadata.get("kind") is bool:
        expected = "true or false"
    raise UnknownKeyError(
        f'{key}: found "{plain}", expected {expected}.{suggestion}', [f"{key}={nearest}"] if nearest else []
    )


def translate_group_value(group: str, value: str) -> list[str]:
    """Translate the value of a group of conf/ that has no such file into the words to type; empty if nothing is known.

    Example:
        >>> translate_group_value("augment", "strong"), translate_group_value("model", "efficientnet_b0")
        (['augment=endoscopy'], ['model=timm', 'model.name=efficientnet_b0'])
    """
    for pattern, template in GROUP_VALUES.get(group, {}).items():
        if re.fullmatch(pattern, value, re.IGNORECASE):
            return template.replace("{}", value).split()
    return []


@functools.cache
def _index_synonyms() -> dict[str, str | Mapping[str, str]]:
    return {_normalize(word): meaning for words, meaning in SYNONYMS.items() for word in words.split()}


@functools.cache
def _index_leaves() -> dict[str, list[str]]:
    """Return the keys of the schema by their last part, without separators."""
    leaves: dict[str, list[str]] = {}

    def collect(schema: Any, path: str) -> None:
        for field, kind in iter_fields(schema):
            if dataclasses.is_dataclass(kind):
                collect(kind, f"{path}{field.name}.")
            elif field.name == "stages":
                collect(StageConfig, "stages.*.")
            elif field.name not in ("kind", "args", "_target_"):
                leaves.setdefault(_normalize(field.name), []).append(f"{path}{field.name}")

    collect(Config, "")
    return leaves


def _find_template(named: str, value: str | None) -> str | None:
    meaning = _index_synonyms().get(named)
    if meaning is None or isinstance(meaning, str):
        return meaning
    plain = "" if value is None else value.strip().strip("'\"")
    for pattern, template in meaning.items():
        for group in ("model", "augment", "logger"):
            options = [re.escape(name) for name in list_group_files(group) if name != "timm"]
            pattern = pattern.replace("{models}" if group == "model" else f"{{{group}}}", "|".join(options))
        match = re.fullmatch(f"(?:{pattern})", plain, re.IGNORECASE)
        if match is not None:
            groups = [text for text in match.groups() if text is not None]
            return template.replace("{1}", groups[0] if groups else "").replace(
                "{fraction}", f"{float(groups[0]) / 100:g}" if "{fraction}" in template else ""
            )
    return None


def _find_leaf(named: str, parents: Sequence[str]) -> str | None:
    """Return the template of the key whose last part this is: that of its section, else the only one there is."""
    keys = _index_leaves().get(named, [])
    own = [key for key in keys if parents and key.startswith(f"{parents[0]}.")]
    keys = own or keys
    return f"{keys[0]}={{}}" if len(keys) == 1 else None


def _fill(template: str, name: str, value: str | None, stages: Sequence[str]) -> tuple[list[str], str]:
    """Return the words of a template, with the value in its place, and its sentence."""
    text, _, note = (part.strip() for part in template.partition("#"))
    plain = value if value is not None else "…"
    words = []
    for word in text.split():
        word = word.replace("{name}", name.lower().removeprefix("use_"))
        word = word.replace("{list}", plain if plain.startswith("[") else f"[{plain.strip('()')}]")
        if "{range}" in word:
            word = word.replace("{range}", ",".join(map(str, range(min(int(plain), 20)))))
        word = word.replace("{}", plain)
        words += [word.replace(".*.", f".{stage}.") for stage in stages] if ".*." in word else [word]
    return words, note.replace("{}", plain)


def _normalize(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
