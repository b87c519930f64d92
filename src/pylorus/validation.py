"""Is this configuration one that the schema allows? Unknown keys are refused, also those behind a `+`."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pylorus.config import FUSED, GROUPS, Config
from pylorus.errors import PylorusError, did_you_mean

RESERVED_STAGE_NAMES = ("model", "report", "images")
"""A stage has its folder in the run's; these names are taken there."""


def unwrapped(annotation: Any) -> Any:
    """The type itself where the annotation also allows None: `int | None` gives `int`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def fields_of(schema: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Each field of a dataclass with its type, None left out."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield field, unwrapped(hints[field.name])


def check_key(path: str, *, schema: type = Config) -> None:
    """Refuses a dotted key that the schema does not have.

    Raises:
        PylorusError: Names the part that is unknown and the nearest that is known.
    """
    here: Any = schema
    walked: list[str] = []
    for part in path.split("."):
        if dataclasses.is_dataclass(here):
            known = {field.name: kind for field, kind in fields_of(typing.cast(type, here))}
            if part not in known:
                place = f'"{".".join(walked)}" has no key "{part}"' if walked else f'there is no key "{part}"'
                names = list(known) if walked else [*known, *GROUPS]
                raise PylorusError(
                    f"{path}: {place}.{did_you_mean(part, names)}\n"
                    f"Known here: {', '.join(names)}. All keys: python train.py --help"
                )
            here = known[part]
        elif typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
        elif here is Any:
            return
        else:
            raise PylorusError(f'{path}: "{".".join(walked)}" is a single value and has no keys of its own.')
        walked.append(part)


def is_free(path: str) -> bool:
    """Whether a key lies in a part of the schema that takes any name (model.args, augment.transforms)."""
    here: Any = Config
    for part in path.split("."):
        if dataclasses.is_dataclass(here):
            here = {field.name: kind for field, kind in fields_of(typing.cast(type, here))}.get(part)
        elif typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
            if here is Any:
                return True
        else:
            return False
    return False


def check_values(config: object, *, path: str = "") -> None:
    """Refuses a value outside the range or the choices that its key states.

    Raises:
        PylorusError: Names the key, the value found and what is expected.
    """
    for field, _ in fields_of(type(config)):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            check_values(value, path=f"{name}.")
        elif isinstance(value, dict):
            for part, inner in value.items():
                if dataclasses.is_dataclass(inner):
                    check_values(inner, path=f"{name}.{part}.")
        elif value is not None:
            _check_value(name, value, field.metadata)


def _check_value(name: str, value: Any, says: typing.Mapping[str, Any]) -> None:
    choices, low, high = says["choices"], says["low"], says["high"]
    span = f"{low} to {high}" if low is not None and high is not None else f"at least {low}"
    if choices and (low is None or isinstance(value, str)):
        if value in choices:
            return
        known = f"one of {', '.join(choices)}" if low is None else f"{', '.join(choices)} or a number of {span}"
        raise PylorusError(f'{name}: found "{value}", expected {known}.{did_you_mean(value, choices)}')
    # Written so that nan is refused as well.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise PylorusError(f"{name}: found {value}, expected {span}.")


def built(composed: DictConfig) -> Config:
    """The typed configuration of what Hydra composed, checked.

    Raises:
        PylorusError: Names the key that is missing or out of its range.
    """
    missing = sorted(str(name) for name in OmegaConf.missing_keys(composed))
    if missing:
        raise PylorusError(f"{missing[0]}: no value given. Add {missing[0]}=… to the command line.")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    check(config)
    config.stages = {name: config.stages[name] for name in config.run}
    if config.data.fold_column is not None:
        config.data.fold = str(config.data.fold)  # a value of a manifest is text, also where it looks like a number
    # A run goes on from another working directory too.
    config.cache.folder = str(Path(config.cache.folder).expanduser().absolute())
    if config.data.root is not None and "://" not in config.data.root:
        config.data.root = str(Path(config.data.root).expanduser().absolute())
    if config.data.manifest is not None:
        config.data.manifest = str(Path(config.data.manifest).expanduser().absolute())
    if config.data.split_file is not None:
        config.data.split_file = str(Path(config.data.split_file).expanduser().absolute())
    if config.model.weights not in ("hub", "none"):
        config.model.weights = str(Path(config.model.weights).expanduser().absolute())
    return config


def loaded(path: Path) -> Config:
    """The configuration that a run's folder holds.

    Raises:
        PylorusError: If it is not one of ours.
    """
    try:
        return built(DictConfig(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))))
    except OmegaConfBaseException as error:
        raise PylorusError(f"{path}: not a configuration of this version of Pylorus. {error}") from error


def check(config: Config) -> None:
    """Refuses what no single key can tell: see each message.

    Raises:
        PylorusError: Names the key, what was found, what was expected.
    """
    check_values(config)
    if not config.run or len(set(config.run)) < len(config.run):
        raise PylorusError(f"run: found {config.run}, expected one stage or more, each once, as in stage=both.")
    for name in config.run:
        if name not in config.stages:
            raise PylorusError(f'run: there is no stage "{name}".{did_you_mean(name, config.stages)}')
    if config.deploy.stage is not None and config.deploy.stage not in config.run:
        known = "a stage that this run has not" if config.deploy.stage in config.stages else "no stage"
        raise PylorusError(
            f'deploy.stage: found "{config.deploy.stage}", {known}.{did_you_mean(config.deploy.stage, config.run)} '
            f"Expected one of {', '.join(config.run)}, or null."
        )
    for name in config.stages:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED_STAGE_NAMES:
            raise PylorusError(
                f'stages: "{name}" can\'t name a stage. It names a folder: small letters, digits and _, '
                f"and none of {', '.join(RESERVED_STAGE_NAMES)}."
            )
    if config.data.kind == "folders" and config.data.root is None:
        raise PylorusError("data.root: no value given. Add data.root=DIR, the folder of your class folders.")
    if config.data.kind == "shards" and config.data.root is None:
        raise PylorusError("data.root: no value given. Add data.root=DIR, the folder of your shards, or a URL.")
    if config.data.kind != "shards" and config.data.shard_window is not None:
        raise PylorusError("data.shard_window: needs data=shards as well.")
    _check_test_set(config)
    _check_classes(config)
    _check_strategy(config)
    if config.model.args.get("in_chans", 3) != 3:
        raise PylorusError(
            f"model.args.in_chans: found {config.model.args['in_chans']}, expected 3. Every image reaches the network "
            "as RGB; a grey file is copied to the three channels, so leave in_chans out."
        )
    taken = {"num_classes", "pretrained", "pretrained_cfg", "checkpoint_path"} & set(config.model.args)
    if taken:
        raise PylorusError(
            f"model.args.{min(taken)}: set by Pylorus itself, from the classes and model.weights. Leave it out."
        )


def _check_strategy(config: Config) -> None:
    if config.trainer.strategy != "fsdp":
        return
    if config.trainer.compile:
        raise PylorusError("trainer.compile: found true, expected false with trainer.strategy=fsdp. Leave it out.")
    if config.trainer.batch_size == "auto":
        raise PylorusError(
            "trainer.batch_size: found auto, which tries steps of one device, expected a number with "
            "trainer.strategy=fsdp, such as 16."
        )
    if config.optimizer.name not in FUSED:
        raise PylorusError(
            f"optimizer.name: found {config.optimizer.name}, expected one of torch's own with trainer.strategy=fsdp, "
            f"whose weights are divided: {', '.join(FUSED)}."
        )


def _check_test_set(config: Config) -> None:
    data = config.data
    if data.kind == "manifest" and data.manifest is None:
        raise PylorusError("data.manifest: no value given. Add data.manifest=FILE, a CSV or Parquet file.")
    if data.kind != "manifest" and data.manifest is not None:
        raise PylorusError("data.manifest: needs data=manifest as well.")
    if data.patients == "dicom" and data.group is not None:
        raise PylorusError("data.group and data.patients=dicom: each tells patients apart. Leave one of them out.")
    ways = {"data.fold": data.fold, "data.test_column": data.test_column, "data.split_file": data.split_file}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise PylorusError(f"{' and '.join(given)}: each names the test images. Leave all but one out.")
    _check_fold(config)
    values = [name for name in ("test_values", "test_from") if getattr(data, name) is not None]
    if (data.test_column is None) != (not values) or len(values) > 1:
        raise PylorusError(
            "data.test_column, data.test_values, data.test_from: expected the column and one of the other two, such as "
            "data.test_column=site data.test_values=[B]."
        )
    if data.test_column is not None and data.kind not in ("manifest", "shards"):
        raise PylorusError("data.test_column: names a column of a manifest: needs data=manifest data.manifest=FILE.")


def _check_fold(config: Config) -> None:
    data = config.data
    if data.fold_column is None:
        if data.fold is not None and (not isinstance(data.fold, int) or not 0 <= data.fold < data.folds):
            raise PylorusError(
                f"data.fold: found {data.fold}, expected 0 to {data.folds - 1} with data.folds={data.folds}, or a "
                "value of a manifest's column with data.fold_column, as in -m data.fold=A,B,C data.fold_column=site."
            )
        return
    if data.fold is None:
        raise PylorusError(
            f"data.fold_column: found {data.fold_column}, but no data.fold, expected the value of this column to test "
            f"on. For each value in turn: -m data.fold=A,B,C data.fold_column={data.fold_column}."
        )
    if data.kind not in ("manifest", "shards"):
        raise PylorusError("data.fold_column: names a column of a manifest: needs data=manifest data.manifest=FILE.")


def _check_classes(config: Config) -> None:
    classes, short = config.data.classes, config.data.short_names
    if classes is not None and len(set(classes)) != len(classes):
        raise PylorusError(f"data.classes: a name stands twice in {classes}.")
    if classes is not None and len(classes) < 2:
        raise PylorusError(f"data.classes: found {classes}, expected at least two classes.")
    if short is None:
        return
    if classes is None:
        raise PylorusError("data.short_names: needs data.classes as well, to know which name belongs to which folder.")
    if len(short) != len(classes) or len(set(short)) != len(short):
        raise PylorusError(
            f"data.short_names: found {short}, expected {len(classes)} different names, one for each of {classes}."
        )
