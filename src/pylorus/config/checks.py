"""Validation of a configuration against the schema; unknown keys are refused, even those added with `+`."""

import dataclasses
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pylorus.config.instantiation import TARGET
from pylorus.config.schema import (
    EXTENSIBLE,
    FUSED_OPTIMIZERS,
    GROUPS,
    NAMED_TARGETS,
    Config,
    DataConfig,
)
from pylorus.core.errors import (
    MAX_NAME_LENGTH,
    TRAIN_COMMAND,
    PylorusError,
    format_empty_value,
    format_suggestion,
    is_valid_name,
    normalize_name,
    resolve_unicode_form,
)
from pylorus.core.io import iter_fields, validate, write_text
from pylorus.core.storage import seal_text, verify_text

FORWARDED_KEYS = {"loss": ("label_smoothing",), "logger": ("project", "offline")}
"""Keys of Pylorus's own that a `_target_` receives as well, where they differ from their default."""
RESERVED_STAGE_NAMES = ("model", "report", "images")
"""Names that no stage may have: each stage has a folder in the run's folder, where these names are in use."""


def check_key(path: str, *, schema: type = Config) -> None:
    """Check that the schema has a dotted key.

    Raises:
        PylorusError: If it does not; the message names the unknown part and suggests the closest known one.
    """
    kind: Any = schema
    parents: list[str] = []
    for part in path.split("."):
        if dataclasses.is_dataclass(kind):
            known = {field.name: field_kind for field, field_kind in iter_fields(kind)}
            if part not in known:
                problem = f'"{".".join(parents)}" has no key "{part}"' if parents else f'there is no key "{part}"'
                names = list(known) if parents else list(dict.fromkeys([*known, *GROUPS]))
                if part in names:
                    problem = f'"{part}" is a group of files, as in {part}=NAME, and has no keys'
                raise PylorusError(
                    f"{path}: {problem}.{format_suggestion(part, set(names) - {part})}\n"
                    f"Keys at this level: {', '.join(names)}. For all keys, run: {TRAIN_COMMAND} --help"
                )
            kind = known[part]
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is Any:
            return
        else:
            raise PylorusError(f'{path}: "{".".join(parents)}" is a single value and has no keys of its own.')
        parents.append(part)


def is_free_form(path: str) -> bool:
    """Return whether a key is in a part of the schema that accepts any name (model.args, augment.transforms)."""
    kind: Any = Config
    for part in path.split("."):
        if dataclasses.is_dataclass(kind):
            kind = {field.name: field_kind for field, field_kind in iter_fields(kind)}.get(part)
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            if kind is Any:
                return True
        else:
            return False
    return False


def build_config(composed: DictConfig) -> Config:
    """Build the typed configuration from what Hydra composed, and check it.

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
    _make_paths_absolute(config)
    return config


def _make_paths_absolute(config: Config) -> None:
    """Make the paths absolute, so that a run can be resumed from another working directory."""
    config.cache.folder = _resolve_path("cache.folder", config.cache.folder)
    if config.data.root is not None and "://" not in config.data.root:
        config.data.root = _resolve_path("data.root", config.data.root)
    if config.data.manifest is not None:
        config.data.manifest = _resolve_path("data.manifest", config.data.manifest)
    if config.data.split_file is not None:
        config.data.split_file = _resolve_path("data.split_file", config.data.split_file)
    if config.model.weights not in ("hub", "none"):
        config.model.weights = _resolve_path("model.weights", config.model.weights)


def _resolve_path(key: str, path: str) -> str:
    if not path.strip():
        raise PylorusError(format_empty_value(key))
    try:
        return str(resolve_unicode_form(Path(path).expanduser().absolute()))
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


def format_error(error: BaseException) -> str:
    """Format an error of Hydra or OmegaConf; for OmegaConf's, with the key and what is wrong with its value."""
    from hydra.errors import HydraException  # late: not every program that reads a configuration uses Hydra

    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: no value given. Add {error.full_key}=… to the command line."
    several = re.match(r"Ambiguous value for argument '(.*?)=(.*)'\n", str(error))
    if several is not None:
        key, values = several.groups()
        return (
            f"{key}: found several values, {values}. To sweep over them: {TRAIN_COMMAND} -m {key}={values}. If they "
            f"are a list: {key}=[{values}]. If they are one text: \"{key}='{values}'\"."
        )
    cause = error.__cause__ if isinstance(error, HydraException) else None
    type_error = cause if cause is not None else error
    wrong = re.match(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)", str(type_error))
    if wrong is not None and isinstance(type_error, OmegaConfBaseException) and wrong[2] in KINDS:
        return f'{type_error.full_key}: found "{wrong[1]}", expected {KINDS[wrong[2]]}.'
    if isinstance(type_error, ConfigKeyError | ConfigAttributeError) and isinstance(type_error.parent_node, DictConfig):
        key, known = str(type_error.key), [str(name) for name in type_error.parent_node]  # a stage, which has any name
        parent = str(type_error.full_key).removesuffix(f".{key}")
        if type_error.full_key == "hydra.launcher.n_jobs":
            return f"{type_error.full_key}: this launcher runs one job after the other. Add hydra/launcher=local."
        return (
            f'{type_error.full_key}: "{parent}" has no key "{key}".{format_suggestion(key, known)}\n'
            f"Keys at this level: {', '.join(known)}."
        )
    lines = [str(error)] + ([str(cause)] if cause is not None else [])
    return "\n".join(line.strip() for line in lines if line.strip())


KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
"""What OmegaConf's names of types mean."""


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
            raise PylorusError(f'run: there is no stage "{name}".{format_suggestion(name, config.stages)}')
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


def _check_test_set(config: Config) -> None:
    data = config.data
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
            "two, as in data.test_column=site data.test_values=[B]."
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


def check_ignored_keys(data: DataConfig) -> None:
    """Check that the image source of a new run uses every key of `data` that was set. A saved run is not checked again.

    Raises:
        PylorusError: If a key would have no effect; the message names it, and what to type instead.
    """
    defaults = DataConfig()
    if data.kind == "synthetic" and data.root is not None:
        raise PylorusError(
            f"data.root: found {data.root}, but data=synthetic, the default, generates its images and would ignore "
            f"it. To train on your own images, type data=folders data.root={data.root}; else leave data.root out."
        )
    if data.kind != "synthetic":
        for field, _ in iter_fields(type(data.drawn)):
            value = getattr(data.drawn, field.name)
            if value != getattr(defaults.drawn, field.name):
                raise PylorusError(
                    f"data.drawn.{field.name}: found {value}, but only data=synthetic generates images, and the source "
                    f"is {data.kind}. Leave it out."
                )
    if data.folds != defaults.folds and data.fold_column is not None:
        raise PylorusError(
            f"data.folds: found {data.folds}, but the folds are the values of {data.fold_column}. Leave it out."
        )
    if data.folds != defaults.folds and data.fold is None:
        numbers = ",".join(map(str, range(data.folds)))
        raise PylorusError(
            f"data.folds: found {data.folds} without data.fold, which makes a single split. To test on each fold in "
            f"turn, add -m data.fold={numbers}"
        )


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
  {TRAIN_COMMAND} data=folders data.root=DIR model=resnet50  your own images, in class folders
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

    known = timm.list_models()
    architecture = name.split(".")[0]
    if architecture not in known:
        nearest = format_suggestion(architecture[:100], known)
        raise PylorusError(f'{where}: timm {timm.__version__} has no "{name[:100]}".{nearest}')
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:  # an unknown tag
        known = timm.list_pretrained(f"{architecture}.*")
        raise PylorusError(
            f'{where}: timm {timm.__version__} has no weights "{name[:100]}".{format_suggestion(name[:100], known)}'
        ) from error
