"""Validation of a configuration against the schema; unknown keys are refused, even those added with `+`."""

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pylorus.config.instantiation import TARGET
from pylorus.config.keys import get_averaging_start, suggest_stage_file
from pylorus.config.schema import (
    EXTENSIBLE,
    FUSED_OPTIMIZERS,
    GROUPS,
    NAMED_TARGETS,
    Config,
)
from pylorus.config.vocabulary import check_key
from pylorus.core.errors import (
    MAX_NAME_LENGTH,
    TRAIN_COMMAND,
    PylorusError,
    format_empty_value,
    format_suggestion,
    is_valid_name,
    normalize_name,
    resolve_short_name,
    resolve_unicode_form,
    suggest_path,
)
from pylorus.core.io import iter_fields, seal_text, validate, verify_text, write_text

FORWARDED_KEYS = {"loss": ("label_smoothing",), "logger": ("project", "offline")}
"""Keys of Pylorus's own that a `_target_` receives as well, where they differ from their default."""
RESERVED_STAGE_NAMES = ("model", "report", "images")
"""Names that no stage may have: each stage has a folder in the run's folder, where these names are in use."""


def build_config(composed: DictConfig, *, folder: str | None = None) -> Config:
    """Build the typed configuration from what Hydra composed, and check it.

    Args:
        composed: What Hydra composed.
        folder: Folder that relative paths start from: where the command was typed; None: the current folder, which is
            another one with hydra.job.chdir=true.

    Raises:
        PylorusError: If a key is missing or a value is not allowed; the message names the key.
    """
    target = composed.model.get(TARGET)
    if target and OmegaConf.is_missing(composed.model, "name"):
        composed = composed.copy()
        composed.model.name = target.rpartition(".")[2]
    missing = sorted(str(name) for name in OmegaConf.missing_keys(composed))
    if missing:
        raise PylorusError(f"{missing[0]}: no value given. Add {missing[0]}=… to the command line.")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    for name in EXTENSIBLE:
        _collect_arguments(name, getattr(config, name))
    if config.data._target_ is not None:
        config.data.kind = "external"
    config = validate(Config, dataclasses.asdict(config))
    if config.loss._target_ is not None:
        config.loss.name = None  # the report and loggers would name a loss that was not used
    check_config(config)
    config.stages = {name: config.stages[name] for name in config.run}
    if config.data.fold_column is not None:
        config.data.fold = str(config.data.fold)  # values of a manifest are text, even if they look like numbers
    _make_paths_absolute(config, Path(folder or Path.cwd()))
    return config


def _make_paths_absolute(config: Config, folder: Path) -> None:
    """Make the paths absolute, so that a run can be resumed from another working directory."""
    config.cache.folder = _resolve_path("cache.folder", config.cache.folder, folder)
    if config.data.root is not None and "://" not in config.data.root:
        config.data.root = _resolve_path("data.root", config.data.root, folder)
    if config.data.manifest is not None:
        config.data.manifest = _resolve_path("data.manifest", config.data.manifest, folder)
    if config.data.split_file is not None:
        config.data.split_file = _resolve_path("data.split_file", config.data.split_file, folder)
    if config.model.weights not in ("hub", "none"):
        config.model.weights = _resolve_path("model.weights", config.model.weights, folder)


def _resolve_path(key: str, path: str, folder: Path) -> str:
    if not path.strip():
        raise PylorusError(format_empty_value(key))
    try:
        return str(resolve_unicode_form(folder / Path(path).expanduser()))
    except RuntimeError:
        raise PylorusError(f"{key}: found {path}, but there is no user with such a home folder.") from None


def _collect_arguments(name: str, section: Any) -> None:
    """Move the keys beside a `_target_`, which OmegaConf made attributes, into the section's `args`."""
    known = {field.name for field in dataclasses.fields(section)}
    arguments = {key: vars(section).pop(key) for key in list(vars(section)) if key not in known}
    if arguments and getattr(section, TARGET) is None:
        check_key(f"{name}.{next(iter(arguments))}")
    if getattr(section, TARGET) is not None:
        defaults = type(section)()
        for key in FORWARDED_KEYS.get(name, ()):
            if getattr(section, key) != getattr(defaults, key):
                arguments[key] = getattr(section, key)
    section.args = {**section.args, **arguments}


def load_config(path: Path) -> Config:
    """Load the configuration file of a run's folder.

    Raises:
        PylorusError: If it is damaged, or not a configuration of this version of Pylorus.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if not verify_text(text):
            raise PylorusError(
                f"{path}: damaged, or changed by hand: it does not match the checksum in its last line. Restore it, or "
                "start a new run."
            )
        return build_config(DictConfig(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))))
    except PylorusError as error:
        raise error if str(path) in str(error) else PylorusError(f"{path}: {error}") from error
    except Exception as error:  # YAML has many of its own
        raise PylorusError(f"{path}: not a configuration of this version of Pylorus. {error}") from error


def save_config(path: Path, config: Any) -> None:
    """Write the configuration file of a run's folder, with its checksum."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = OmegaConf.create(dataclasses.asdict(config))  # checked already: checking its types takes as long again
    write_text(path, seal_text(OmegaConf.to_yaml(config)))


def check_config(config: Config) -> None:
    """Check the rules that involve several keys.

    Raises:
        PylorusError: If a rule is violated; the message names the key, what was found and what was expected.
    """
    _check_targets(config)
    if not config.run or len(set(config.run)) < len(config.run):
        raise PylorusError(
            f"run: found {config.run}, expected at least one stage and each only once, as in stage=both."
        )
    for name in config.run:
        if name not in config.stages:
            raise PylorusError(
                f'run: there is no stage "{name}".{format_suggestion(name, config.stages)} Expected some of '
                f"{', '.join(config.stages)}.{suggest_stage_file(name)}"
            )
    if config.deploy.stage is not None and config.deploy.stage not in config.run:
        problem = "which this run does not train" if config.deploy.stage in config.stages else "which is not a stage"
        raise PylorusError(
            f'deploy.stage: found "{config.deploy.stage}", {problem}.'
            f"{format_suggestion(config.deploy.stage, config.run)} "
            f"Expected one of {', '.join(config.run)}, or null."
        )
    for name in config.stages:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED_STAGE_NAMES:
            raise PylorusError(
                f'stages: found "{name}", expected lowercase letters, digits and _, beginning with a letter, and '
                f"none of {', '.join(RESERVED_STAGE_NAMES)}: it becomes the name of a folder."
            )
    if config.data.kind == "folders" and config.data.root is None:
        raise PylorusError("data.root: no value given. Add data.root=DIR, the folder with your class folders.")
    if config.data.kind == "shards" and config.data.root is None:
        raise PylorusError("data.root: no value given. Add data.root=DIR, the folder with your shards, or a URL.")
    if config.data.kind != "shards" and config.data.shard_window is not None:
        raise PylorusError("data.shard_window: only allowed with data=shards. Add data=shards, or leave it out.")
    if config.data.group is not None and not config.data.group.strip():
        raise PylorusError(format_empty_value("data.group"))
    _check_test_set(config)
    _check_classes(config)
    _check_trainer(config)
    _check_averaging(config)
    if config.model._target_ is not None:
        return
    if config.model.args.get("in_chans", 3) != 3:
        raise PylorusError(
            f"model.args.in_chans: found {config.model.args['in_chans']}, expected 3. Every image is converted to RGB, "
            "also a grayscale one, so leave in_chans out."
        )
    reserved = {"num_classes", "pretrained", "pretrained_cfg", "checkpoint_path"} & set(config.model.args)
    if reserved:
        raise PylorusError(
            f"model.args.{min(reserved)}: Pylorus sets it itself, from the classes and model.weights. Leave it out."
        )


def _check_targets(config: Config) -> None:
    """Check that `_target_` is only where it is honoured, and that it is a dotted path there."""
    for name in EXTENSIBLE:
        section = getattr(config, name)
        target = getattr(section, TARGET)
        if target is not None:
            _check_target(name, target)
        elif section.args and name in ("data", "augment"):
            raise PylorusError(f"{name}.args: found arguments without {name}.{TARGET}, which they belong to.")
        elif name != "data":
            _check_free_of_targets(f"{name}.args", section.args)
    if config.loss.name is None and config.loss._target_ is None:
        raise PylorusError(f"loss.name: found null without loss.{TARGET}, expected a loss, such as loss=cross_entropy.")
    for name in NAMED_TARGETS:
        for entry, node in getattr(config, name).items():
            if node is None and name == "metrics":
                continue  # an index that Pylorus has
            if not isinstance(node, dict) or node.get(TARGET) is None:
                raise PylorusError(
                    f"{name}.{entry}: found {str(node)[:80]}, expected a {TARGET} and its arguments, as in "
                    f"{name}.{entry}={{{TARGET}: my_package.MyClass}}."
                )
            _check_target(f"{name}.{entry}", node[TARGET])
    if config.data.kind == "external" and config.data._target_ is None:
        raise PylorusError(
            f"data.kind: found external without data.{TARGET}, expected the function that lists the images."
        )
    _check_free_of_targets("augment.transforms", config.augment.transforms)
    _check_free_of_targets("trainer.args", config.trainer.args)


def _check_target(key: str, target: object) -> None:
    if not isinstance(target, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target):
        raise PylorusError(
            f'{key}.{TARGET}: found "{target}", expected the dotted path of a class or function, such as '
            "my_package.my_module.MyClass."
        )


def _check_free_of_targets(key: str, value: object) -> None:
    if isinstance(value, dict):
        if TARGET in value:
            raise PylorusError(
                f"{key}.{TARGET}: {TARGET} is not allowed here, only in {', '.join((*EXTENSIBLE, *NAMED_TARGETS))}."
            )
        for name, inner in value.items():
            _check_free_of_targets(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_free_of_targets(f"{key}[{index}]", inner)


def _check_trainer(config: Config) -> None:
    batch_size = config.trainer.batch_size
    if batch_size != "auto" and (isinstance(batch_size, str) or batch_size < 1):
        raise PylorusError(f"trainer.batch_size: found {batch_size}, expected auto or a number (at least 1).")
    refused = {
        "several devices": config.trainer.devices * config.trainer.nodes > 1,
        "trainer.compile=true": config.trainer.compile,
        # Gradients are views of the graph's memory, which the next batch of the same step would overwrite.
        "trainer.accumulate above 1": config.trainer.accumulate > 1,
    }
    for other, is_set in refused.items() if config.trainer.cuda_graphs else ():
        if is_set:
            raise PylorusError(f"trainer.cuda_graphs: found true, expected false with {other}. Leave it out.")
    if config.trainer.strategy != "fsdp":
        return
    if config.trainer.precision == "16":
        raise PylorusError(
            "trainer.precision: found 16, expected auto, bf16 or 32 with trainer.strategy=fsdp: the loss can't be "
            "scaled where gradients are sharded."
        )
    if config.trainer.compile:
        raise PylorusError("trainer.compile: found true, expected false with trainer.strategy=fsdp. Leave it out.")
    if config.trainer.batch_size == "auto":
        raise PylorusError(
            "trainer.batch_size: found auto, which only tries steps on a single device, expected a number with "
            "trainer.strategy=fsdp, such as 16."
        )
    if config.optimizer.name not in FUSED_OPTIMIZERS:
        raise PylorusError(
            f"optimizer.name: found {config.optimizer.name}, expected an optimiser of torch itself with "
            f"trainer.strategy=fsdp, because the weights are sharded: {', '.join(FUSED_OPTIMIZERS)}."
        )


def _check_averaging(config: Config) -> None:
    name, start = config.averaging.name, get_averaging_start(config.averaging)
    if name == "none":
        return
    if config.trainer.strategy == "fsdp":
        raise PylorusError(
            f"averaging: found {name}, expected none with trainer.strategy=fsdp, where no device has all weights. "
            "Leave one of the two out."
        )
    for stage in config.run:
        patience = config.stages[stage].patience
        if patience is not None and start > 0:
            raise PylorusError(
                f"stages.{stage}.patience: found {patience}, expected null with averaging={name}, whose average begins "
                f"after {start:g} of the epochs: the stage could end before. Leave it out, or add averaging.start=0."
            )


def _check_deciding_class(config: Config) -> None:
    """Check deploy.class_name before anything is read, if the names of the classes are in the configuration."""
    name, classes = config.deploy.class_name, config.data.classes
    if name is not None and classes:
        short_names = config.data.short_names or classes
        resolve_short_name(name, classes=classes, short_names=short_names, where="deploy.class_name")


def _check_test_set(config: Config) -> None:
    data = config.data
    _check_deciding_class(config)
    if data.kind == "manifest" and data.manifest is None:
        raise PylorusError("data.manifest: no value given. Add data.manifest=FILE, a CSV or Parquet file.")
    if data.kind != "manifest" and data.manifest is not None:
        raise PylorusError("data.manifest: only allowed with data=manifest. Add data=manifest, or leave it out.")
    if data.patients == "dicom" and data.group is not None:
        raise PylorusError("data.group and data.patients=dicom: both define the patients. Leave one of them out.")
    test_set_keys = {"data.fold": data.fold, "data.test_column": data.test_column, "data.split_file": data.split_file}
    used = [name for name, value in test_set_keys.items() if value is not None]
    if len(used) > 1:
        raise PylorusError(f"{' and '.join(used)}: each of them defines the test set. Keep only one.")
    _check_fold(config)
    values = [name for name in ("test_values", "test_from") if getattr(data, name) is not None]
    if (data.test_column is None) != (not values) or len(values) > 1:
        raise PylorusError(
            "data.test_column, data.test_values, data.test_from: expected the column and exactly one of the other "
            "two, as in data.test_column=site 'data.test_values=[B]'."
        )
    if data.test_column is not None and data.kind not in ("manifest", "shards", "external"):
        raise PylorusError("data.test_column: refers to a column of a manifest. Add data=manifest data.manifest=FILE.")


def _check_fold(config: Config) -> None:
    data = config.data
    if data.fold_column is None:
        if data.fold is not None and (not isinstance(data.fold, int) or not 0 <= data.fold < data.folds):
            raise PylorusError(
                f"data.fold: found {data.fold}, expected 0 to {data.folds - 1} with data.folds={data.folds}, or a "
                "value of a manifest column with data.fold_column, as in -m data.fold=A,B,C data.fold_column=site."
            )
        return
    if data.fold is None:
        raise PylorusError(
            f"data.fold_column: found {data.fold_column} without data.fold, expected the value of this column to test "
            f"on. To test on each value in turn: -m data.fold=A,B,C data.fold_column={data.fold_column}."
        )
    if data.kind not in ("manifest", "shards", "external"):
        raise PylorusError("data.fold_column: refers to a column of a manifest. Add data=manifest data.manifest=FILE.")


def check_paths(config: Config) -> None:
    """Check that the files and folders exist that a new run starts from, before it imports torch.

    Raises:
        PylorusError: If one does not; says what is near, and what a drive of Windows is called here.
    """
    data = config.data
    if data.kind == "folders" and data.root is not None and not Path(data.root).is_dir():
        hint = suggest_path(data.root)
        if Path(data.root).is_file():
            is_table = data.root.lower().endswith((".csv", ".parquet"))
            hint = f" It is a file. For a table, type data=manifest data.manifest={data.root}" if is_table else hint
        raise PylorusError(f"data.root: found {data.root}, expected an existing folder.{hint}")
    files = {"data.manifest": data.manifest if data.kind == "manifest" else None, "data.split_file": data.split_file}
    for key, path in files.items():
        if path is not None and Path(path).is_dir():
            hint = f" For class folders, type data=folders data.root={path}" if key == "data.manifest" else ""
            raise PylorusError(f"{key}: found {path}, a folder, expected a file.{hint}")
        if path is not None and not Path(path).exists():
            raise PylorusError(f"{key}: found {path}, expected an existing file.{suggest_path(path)}")
    weights = config.model.weights
    if weights in ("hub", "none") or Path(weights).is_file():
        return
    if (Path(weights) / "model.safetensors").is_file():
        hint = f" It is a bundle: type model.weights={weights}/model.safetensors, or predict with it: pylorus predict"
    elif (Path(weights) / "model" / "model.safetensors").is_file():
        hint = f" It is the folder of a run: type model.weights={weights}/model/model.safetensors"
    else:
        hint = suggest_path(weights)
    raise PylorusError(f"model.weights: found {weights}, expected hub, none, or an existing file.{hint}")


def _check_classes(config: Config) -> None:
    classes, short, exclude = config.data.classes, config.data.short_names, config.data.exclude
    if classes is not None and len({normalize_name(name) for name in classes}) != len(classes):
        raise PylorusError(f"data.classes: found {classes}, expected each name only once.")
    in_both = [name for name in exclude or () if name in (classes or ())]
    if in_both:
        raise PylorusError(
            f'data.exclude: found "{in_both[0]}", which data.classes names too. Remove it from one of the two.'
        )
    if classes is not None and len(classes) < 2:
        raise PylorusError(f"data.classes: found {classes}, expected at least two classes.")
    if short is None:
        return
    if classes is None:
        raise PylorusError(
            "data.short_names: needs data.classes as well, which says to which folder each name belongs."
        )
    invalid = [name for name in short if not is_valid_name(name)]
    if invalid:
        raise PylorusError(
            f"data.short_names: found {invalid[0]!r}, expected 1 to {MAX_NAME_LENGTH} characters that can be seen."
        )
    if len(short) != len(classes) or len(set(short)) != len(short):
        raise PylorusError(
            f"data.short_names: found {short}, expected {len(classes)} different names, one for each of {classes}."
        )


USAGE = f"""\
Pylorus trains image classifiers for gastroscopy by transfer learning, stage by stage.

  {TRAIN_COMMAND}                                            a demo on synthetic images
  {TRAIN_COMMAND} data.root=DIR model=resnet50               your own images, in class folders
  {TRAIN_COMMAND} -m model=vgg19,resnet50,inception_v3       a sweep: one run per value, and a comparison
  {TRAIN_COMMAND} experiment=paper data.root=DIR             the protocol of the study
  {TRAIN_COMMAND} resume=RUN                                 resume a run that was interrupted

GROUPS: choose one file from each, as in model=vgg19
"""

FLAGS = f"""
FLAGS

  -m                              run a sweep over comma-separated values
  --cfg job                       print the configuration instead of running it
  --config-dir DIR                also read your own files: DIR/GROUP/FILE.yaml
  --hydra-help                    help of Hydra itself: launchers, sweepers
  -sc install=bash                tab completion: eval "$$({TRAIN_COMMAND} -sc install=bash)"
"""


def format_help(conf: Path) -> str:
    """Return the complete help text; `$` is doubled because Hydra treats the text as a template.

    Args:
        conf: Folder of the configuration files.
    """
    lines = [USAGE]
    for group in GROUPS:
        files = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        lines.append(f"  {group + '=':<12} {' | '.join(files)}")
    lines += ["", "KEYS: override one, as in optimizer.lr=1e-4", ""]
    lines += _format_keys(Config, "")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).replace("$", "$$")
    return text + FLAGS


def _format_keys(schema: Any, path: str) -> list[str]:
    lines: list[str] = []
    for field, kind in iter_fields(schema):
        name = f"{path}{field.name}"
        if dataclasses.is_dataclass(kind):
            lines += ["", f"{name}: {_get_first_line(kind)}", *_format_keys(kind, f"{name}."), ""]
        elif field.name == "stages":
            stage = kind.__args__[1]
            lines += ["", f"{name}.<stage>: {_get_first_line(stage)}", *_format_keys(stage, f"{name}.<stage>."), ""]
        else:
            lines += _format_entry(name, field)
    return lines


def _format_entry(name: str, field: dataclasses.Field[Any]) -> list[str]:
    metadata = field.metadata
    default = field.default if field.default is not dataclasses.MISSING else {}
    default_text = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
    allowed = list(metadata["choices"])
    low, high = metadata["low"], metadata["high"]
    if low is not None:
        allowed.append(f"{low} to {high}" if high is not None else f"{low} or more")
    allowed_text = f" [{' | '.join(allowed)}]" if allowed else ""
    text = f"{metadata['description']}{allowed_text} (default: {default_text})"
    head = f"  {name:<31} "
    return textwrap.wrap(text, width=112, initial_indent=head, subsequent_indent=" " * 34)


def _get_first_line(schema: Any) -> str:
    return str(schema.__doc__).splitlines()[0]


def check_model_name(name: str, *, where: str) -> None:
    """Check that `name` is a timm model, with or without a tag, which names its weights.

    Raises:
        PylorusError: If it is not; the message suggests the nearest known name.
    """
    import timm

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        nearest = format_suggestion(architecture[:100], timm.list_models())
        raise PylorusError(f'{where}: timm {timm.__version__} has no "{name[:100]}".{nearest}')
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:  # an unknown tag
        known = timm.list_pretrained(f"{architecture}.*")
        raise PylorusError(
            f'{where}: timm {timm.__version__} has no weights "{name[:100]}".{format_suggestion(name[:100], known)}'
        ) from error
