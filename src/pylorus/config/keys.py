"""What the schema says of a key, in words: its kind and range, why a run ignores it, what loss and average are called.

A key that a new run would ignore is refused: it was typed for a reason, and a run without it answers another question.
A configuration file may set keys that some runs do not use, so most rules hold for the words of the command line only.
In a sweep, a word is refused if no job uses it.
"""

import dataclasses
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pylorus.config.schema import CONF, AveragingConfig, Config, DataConfig, LossConfig, list_group_files
from pylorus.core.errors import PylorusError, format_suggestion, suggest_path
from pylorus.core.formatting import format_command
from pylorus.core.io import iter_fields


def _iter_steps(path: str) -> Iterator[tuple[Any, "dataclasses.Field[Any] | None"]]:
    """Yield the type at each part of a dotted key, with its field if it has one; end at a part that is unknown."""
    kind: Any = Config
    for part in path.split("."):
        field = None
        if dataclasses.is_dataclass(kind):
            field, kind = {each.name: (each, its_kind) for each, its_kind in iter_fields(kind)}.get(part, (None, None))
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is not Any:
            return
        if kind is None:
            return
        yield kind, field


def is_key(path: str) -> bool:
    """Return whether the schema has a dotted key; searches for no similar one.

    Example:
        >>> is_key("optimizer.lr"), is_key("lr")
        (True, False)
    """
    return len(list(_iter_steps(path))) == len(path.split("."))


def is_free_form(path: str) -> bool:
    """Return whether a key is in a part of the schema that accepts any name (model.args, augment.transforms).

    Example:
        >>> is_free_form("model.args.drop_rate"), is_free_form("model.name")
        (True, False)
    """
    return any(kind is Any and field is None for kind, field in _iter_steps(path))


def get_key_metadata(path: str) -> Mapping[str, Any]:
    """Return what the schema says of a key: its choices, range, default and kind; empty if unknown.

    Example:
        >>> get_key_metadata("optimizer.lr")["kind"].__name__, dict(get_key_metadata("lr"))
        ('float', {})
    """
    steps = list(_iter_steps(path))
    if len(steps) < len(path.split(".")):
        return {}
    kind, field = next((kind, field) for kind, field in reversed(steps) if field is not None)
    is_optional = type(None) in typing.get_args(field.type)
    return {**field.metadata, "default": field.default, "kind": kind, "is_optional": is_optional}


def format_error(error: BaseException) -> str:
    """Format an error of Hydra or OmegaConf; for OmegaConf's, with the key and what is wrong with its value."""
    from hydra.errors import HydraException  # late: not every program that reads a configuration uses Hydra

    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: no value given. Add {error.full_key}=… to the command line."
    cause = error.__cause__ if isinstance(error, HydraException) else None
    type_error = cause if cause is not None else error
    wrong = re.match(
        r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)|"
        r"Cannot convert '(?:\w+)' to (string): '(.*)'",
        str(type_error),
        re.DOTALL,
    )
    if wrong is not None and isinstance(type_error, OmegaConfBaseException):
        found, kind = (wrong[1], wrong[2]) if wrong[2] else (wrong[4], wrong[3])
        if kind in KINDS:
            return _format_wrong_type(str(type_error.full_key), found, kind)
    if isinstance(type_error, ConfigKeyError | ConfigAttributeError) and isinstance(type_error.parent_node, DictConfig):
        key, known = str(type_error.key), [str(name) for name in type_error.parent_node]  # a stage, which has any name
        parent = str(type_error.full_key).removesuffix(f".{key}")
        if type_error.full_key == "hydra.launcher.n_jobs":
            return f"{type_error.full_key}: this launcher runs one job after the other. Add hydra/launcher=local."
        return (
            f'{type_error.full_key}: "{parent}" has no key "{key}".{format_suggestion(key, known)}\n'
            f"Keys at this level: {', '.join(known)}.{suggest_stage_file(key) if parent == 'stages' else ''}"
        )
    lines = [str(error)] + ([str(cause)] if cause is not None else [])
    return "\n".join(line.strip() for line in lines if line.strip())


def suggest_stage_file(stage: str) -> str:
    """Return the sentence of an error message that names the files of conf/stage that define a stage; "" if none does.

    Example:
        >>> suggest_stage_file("last_half")
        ' Add stage=gradual, which defines "last_half".'
    """
    settings = {name: OmegaConf.load(CONF / "stage" / f"{name}.yaml") for name in list_group_files("stage")}
    files = [
        name for name, each in settings.items() if isinstance(each, DictConfig) and stage in each.get("stages", {})
    ]
    return f' Add stage={" or stage=".join(files)}, which defines "{stage}".' if files else ""


KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "string": "a single word"}
"""What OmegaConf's names of types mean."""


def _format_wrong_type(key: str, found: str, kind: str) -> str:
    """Say what a key takes, with an example that is as close as possible to what was typed."""
    metadata = get_key_metadata(key)
    if metadata.get("choices") and kind == "string":
        expected = f"one of {', '.join(metadata['choices'])}"
        return f"{key}: found {found}, expected {expected}."
    numbers = re.findall(r"-?\d+(?:[.,]\d+)?(?:e-?\d+)?", found, re.IGNORECASE)
    example = ""
    if kind == "Integer" and numbers:
        example = f", such as {max(round(float(numbers[0].replace(',', '.'))), round(metadata.get('low') or 0))}"
    elif kind == "Float" and numbers:
        example = f", such as {numbers[0].replace(',', '.')}"
    elif kind in ("Integer", "Float") and metadata.get("low") is not None:
        example = f" of at least {metadata['low']:g}"
    return f'{key}: found "{found}", expected {KINDS[kind]}{example}.'


DECISIVE_KEYS = (
    *("stage", "run", "data", "data.kind", "data.fold", "data.fold_column", "data.split_file", "data.test_column"),
    *("data.validation", "optimizer", "optimizer.name", "logger", "augment", "model", "experiment", "trainer"),
    *("trainer.devices", "trainer.nodes", "averaging", "averaging.name"),
)
"""Keys that decide whether another one is used, besides those of a stage."""


@dataclass(frozen=True)
class Rule:
    """When a key has no effect.

    Attributes:
        key: Pattern of the key; its first group is the name of a stage.
        is_unused: Whether a run with this configuration ignores the key; gets the name of the stage too.
        reason: Why, and what to type; `{stage}`, `{value}` and `{key}` are filled in.
        if_default: Whether the key is refused even if its value is the default.
    """

    key: str
    is_unused: Callable[[Config, str], bool]
    reason: str
    if_default: bool = False


def _has_own_rates(config: Config, _: str) -> bool:
    return all(config.stages[name].lr is not None for name in config.run)


def _has_own_augmentation(config: Config, _: str) -> bool:
    return all(config.stages[name].augment is not None for name in config.run)


def _is_unaugmented(config: Config, stage: str) -> bool:
    own = config.stages[stage].augment
    return own == "none" or (own is None and not config.augment.transforms and config.augment._target_ is None)


RULES = (
    Rule(
        r"stages\.(\w+)\..*",
        lambda config, stage: stage not in config.run,
        "this run does not train the stage {stage}. To train it, add stage=both or stage={stage}; else leave it out.",
        if_default=True,
    ),
    Rule(
        r"stages\.(\w+)\.lr_factor",
        lambda config, stage: config.stages[stage].lr is not None,
        "stages.{stage}.lr sets the learning rate itself. Keep one of the two.",
    ),
    Rule(
        r"stages\.(\w+)\.layer_decay",
        lambda config, stage: config.stages[stage].learn == "head",
        "the stage trains the head only. Add stages.{stage}.learn=all, or leave it out.",
    ),
    Rule(
        r"stages\.(\w+)\.views",
        _is_unaugmented,
        "the stage does not augment its images. Add stages.{stage}.augment=light, or leave it out.",
    ),
    Rule(
        r"model\.source",
        lambda config, _: config.model.weights != "hub",
        "model.weights names what the training starts from. Keep one of the two.",
    ),
    Rule(
        r"model\.licence",
        lambda config, _: config.model.weights == "none",
        "random weights have no licence. Leave it out.",
    ),
    Rule(
        r"optimizer\.lr",
        _has_own_rates,
        "every stage of this run has a learning rate of its own, stages.<stage>.lr. Keep one of the two.",
    ),
    Rule(
        r"optimizer\.momentum",
        lambda config, _: re.match(r"([nr]?adam|lion|lamb|adafactor|adopt)", config.optimizer.name) is not None,
        "this optimizer does not use it. Add optimizer=sgd, or leave it out.",
    ),
    Rule(
        r"averaging\.(?:decay|every|start)",
        lambda config, _: config.averaging.name == "none",
        "averaging=none, the default, averages nothing. Add averaging=ema or averaging=mean, or leave it out.",
        if_default=True,
    ),
    Rule(
        r"averaging\.decay",
        lambda config, _: config.averaging.name == "mean",
        "averaging=mean gives all weights the same share. Add averaging=ema, or leave it out.",
        if_default=True,
    ),
    Rule(
        r"augment(\.\w.*)?",
        _has_own_augmentation,
        "every stage of this run has a policy of its own, as stages.pretrain.augment=none. To change that of a stage, "
        "type stages.<stage>.augment={value}; else leave it out.",
    ),
    Rule(
        r"logger\.(?:project|offline|images|predictions|artifact|notes)",
        lambda config, _: config.logger.name == "csv" and config.logger._target_ is None,
        "logger=csv, the default, shows nothing on a dashboard. Add logger=wandb, logger=mlflow or "
        "logger=tensorboard, or leave it out.",
    ),
    Rule(
        r"logger\.(?:project|offline)",
        lambda config, _: config.logger.name == "tensorboard" and config.logger._target_ is None,
        "TensorBoard has no projects and sends nothing. Add logger=wandb or logger=mlflow, or leave it out.",
    ),
    Rule(
        r"logger\.artifact",
        lambda config, _: config.logger.name == "tensorboard" and config.logger._target_ is None,
        "TensorBoard stores no models; the run's folder has it. Add logger=wandb or logger=mlflow, or leave it out.",
    ),
    Rule(
        r"data\.val_fraction",
        lambda config, _: config.data.validation == "test" or config.data.split_file is not None,
        "the validation images are given: by data.validation=test or data.split_file. Keep one of the two.",
    ),
    Rule(
        r"data\.test_fraction",
        lambda config, _: any(getattr(config.data, name) is not None for name in ("fold", "split_file", "test_column")),
        "the test images are given: by data.fold, data.split_file or data.test_column. Keep one of the two.",
    ),
    Rule(
        r"data\.split_seed",
        lambda config, _: config.data.split_file is not None,
        "data.split_file has the split of another run. Keep one of the two.",
    ),
    Rule(
        r"trainer\.strategy",
        lambda config, _: config.trainer.devices * config.trainer.nodes == 1,
        "there is a single device to train on. Add trainer.devices=2, or leave it out.",
    ),
    Rule(
        r"data\.drawn\..*",
        lambda config, _: config.data.kind != "synthetic",
        "only data=synthetic generates images, and the source is another one. Leave it out.",
        if_default=True,
    ),
)
"""Applied in this order to the words of a command line."""


def read_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """Return the keys and values of overrides, without those that delete a key or set it to null."""
    pairs = [word.lstrip("+").partition("=") for word in overrides if not word.startswith("~")]
    return {key: value for key, equals, value in pairs if equals and value != "null"}


def find_unused_keys(config: Config, typed: Mapping[str, str]) -> dict[str, str]:
    """Find keys that were typed and have no effect.

    Args:
        config: The configuration.
        typed: Keys and values of the command line.

    Returns:
        The reason for each such key, with what to type.
    """
    reasons: dict[str, str] = {}
    for key, value in typed.items():
        default = get_key_metadata(key).get("default")
        is_default = str(default).lower() == value.strip("'\"").lower()
        for rule in RULES:
            match = re.fullmatch(rule.key, key)
            stage = next((group for group in match.groups() if group), "") if match and match.groups() else ""
            if match is None or (is_default and not rule.if_default) or key in reasons:
                continue
            if rule.is_unused(config, stage):
                reasons[key] = rule.reason.format(stage=stage, value=value, key=key)
    if set(reasons) & {"augment"} and typed["augment"] in {config.stages[name].augment for name in config.run}:
        del reasons["augment"]  # it says what the stages say
    return reasons


def check_used_keys(config: Config, overrides: Sequence[str]) -> None:
    """Check that a new run uses every key of its command line, and every key of `data` that a file sets.

    A saved run is not checked again.

    Args:
        config: The configuration.
        overrides: The overrides of its command line.

    Raises:
        PylorusError: If a key would have no effect; the message names it, and what to type instead.
    """
    _check_data(config.data)
    typed = read_overrides(overrides)
    reasons = find_unused_keys(config, typed)
    if reasons:
        raise PylorusError(format_unused_keys(reasons, {key: _get_value(config, key, typed[key]) for key in typed}))


def _get_value(config: Config, key: str, typed: str) -> str:
    """Return the value of a key in a configuration; as typed, if it has none, as a stage that it does not train."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else getattr(node, part, None)
    return typed if node is None or is_dataclass(node) else str(node)


def format_unused_keys(reasons: Mapping[str, str], typed: Mapping[str, str]) -> str:
    """Return the message for keys without effect, one line each."""
    return "\n".join(f"{key}: found {typed[key]}, but {reason}" for key, reason in reasons.items())


def _check_data(data: DataConfig) -> None:
    defaults = DataConfig()
    if data.kind == "synthetic" and data.root is not None:
        missing = (
            "" if Path(data.root).exists() else f" There is nothing with this name, though.{suggest_path(data.root)}"
        )
        raise PylorusError(
            f"data.root: found {data.root}, but data=synthetic, the default, generates its images and would ignore "
            f"it. To train on your own images, type data=folders {format_command([f'data.root={data.root}'])}; else "
            f"leave data.root out.{missing}"
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


def format_loss_name(name: str) -> str:
    """Return what texts call the loss of a name.

    Example:
        >>> format_loss_name("cross_entropy"), format_loss_name("focal")
        ('cross-entropy', 'focal loss')
    """
    return "cross-entropy" if name == "cross_entropy" else f"{name.replace('_', '-')} loss"


def list_loss_details(settings: LossConfig | Mapping[str, Any]) -> list[str]:
    """Describe a run's loss for its checklist and card: its name first, then what differs from the usual.

    Args:
        settings: The section `loss` of a configuration, also of an older or newer version; nothing in it is executed.

    Example:
        >>> list_loss_details({"name": "focal", "class_weights": "balanced", "args": {"gamma": 1}})
        ['class-weighted focal loss', 'gamma 1']
    """
    given = asdict(settings) if isinstance(settings, LossConfig) else dict(settings)
    smoothing, target = float(given.get("label_smoothing") or 0.0), given.get("_target_")
    label = f"the loss {target}" if target else format_loss_name(str(given.get("name") or "cross_entropy"))
    weighted = "class-weighted " if given.get("class_weights") == "balanced" else ""
    details = [
        f"{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}"
        for key, value in dict(given.get("args") or {}).items()
    ]
    return [f"{weighted}{label}", *details, *([f"label smoothing {smoothing:g}"] if smoothing and not target else [])]


def get_averaging_start(config: AveragingConfig) -> float:
    """Return the fraction of a stage's epochs before its average begins."""
    return config.start if config.start is not None else 0.5 if config.name == "mean" else 0.0


def describe_averaging(settings: AveragingConfig | Mapping[str, Any], *, weights: int, norms: int) -> str:
    """Describe a stage's weights for its checklist, card and manuscript: "" if they are no average.

    Args:
        settings: The section `averaging` of a configuration, also of an older or newer version.
        weights: Number of weights of which they are the average; 0: they are no average.
        norms: Number of batch-norm layers whose statistics were estimated anew.

    Example:
        >>> describe_averaging({"name": "ema", "decay": 0.999}, weights=420, norms=0)
        'exponential moving average of the weights over 420 updates, one a step (decay at most 0.999)'
        >>> describe_averaging({"name": "mean"}, weights=5, norms=52)
        'mean of the weights of 5 epochs, with batch-norm statistics estimated anew over the training images'
        >>> describe_averaging({"name": "mean"}, weights=1, norms=0)
        'weights after an epoch, the only one in the mean'
    """
    given = asdict(settings) if isinstance(settings, AveragingConfig) else dict(settings)
    if not weights:
        return ""
    every = given.get("every")
    if given.get("name") == "ema":
        pace = "one a step" if every in (None, 1) else f"one every {every} steps"
        updates = f"{weights:,} updates, {pace}" if weights > 1 else "1 update"
        decay = float(given.get("decay", 0))
        text = f"exponential moving average of the weights over {updates} (decay at most {decay:g})"
    else:
        unit, point = ("of {} epochs", "an epoch") if every is None else ("at {} steps", "a step")
        pace = "" if every is None else f", one every {every} steps"
        several = f"mean of the weights {unit.format(f'{weights:,}')}{pace}"
        text = several if weights > 1 else f"weights after {point}, the only one in the mean"
    return f"{text}, with batch-norm statistics estimated anew over the training images" if norms else text
