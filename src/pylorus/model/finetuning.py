"""Fine-tuning: what a stage trains and what it freezes, with which optimizer and learning-rate schedule.

A frozen part is frozen altogether: weights, batch-norm statistics and dropout alike. A depth is given as `head` (timm's
classifier, the layer that produces the logits), `all`, a block's name (that block and everything that the network
registers after it), or as a number or share of the last blocks (`last:2`, `last:50%`). The frozen part is a pure
function of the image: it neither draws random numbers nor changes.
Dropout directly before the classifier belongs to the head. `extract_network_structure` describes the outcome as plain
values: a run writes it once, so that a report can draw the network without torch.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, cast

import pytorch_lightning as pl
import torch
from annotated_types import Ge
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from torch import Tensor, distributed, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from pylorus.config.schema import FUSED_OPTIMIZERS, OptimizerConfig, StageConfig
from pylorus.core.arguments import check_arguments
from pylorus.core.distributed import Processes
from pylorus.core.errors import PylorusError, format_suggestion
from pylorus.core.formatting import format_count
from pylorus.model.backbone import restore_modes, run_on_black_images
from pylorus.model.weights import list_classifier_names

LAST = "last:"
"""How a depth begins that counts blocks from the end."""


@dataclass(frozen=True)
class Depth:
    """What is trained in a network, by name.

    Attributes:
        trainable: Names of the trainable parameters, in the network's order.
        frozen: Names of the frozen parameters.
        eval_modules: Names of the modules that stay in evaluation mode: those without anything trainable.
    """

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    eval_modules: tuple[str, ...]


def resolve_depth(network: nn.Module, learn: str) -> Depth:
    """Return which parameters and modules of a timm model are trainable at the depth that `learn` names.

    Raises:
        PylorusError: If the network has no block of that name, or not as many blocks.
    """
    parameter_names = [name for name, _ in network.named_parameters()]
    learn = resolve_learn(network, learn)
    if learn == "all":
        return Depth(trainable=tuple(parameter_names), frozen=(), eval_modules=())
    if learn == "head":
        head_prefixes = tuple(f"{name}." for name in list_classifier_names(network))
        trainable_names = [name for name in parameter_names if name.startswith(head_prefixes)]
    else:
        first_trainable = next(
            (index for index, name in enumerate(parameter_names) if name.startswith(f"{learn}.")), None
        )
        if first_trainable is None:
            raise PylorusError(_format_unknown_block(network, learn))
        trainable_names = parameter_names[first_trainable:]
    frozen_names = [name for name in parameter_names if name not in set(trainable_names)]
    return Depth(
        trainable=tuple(trainable_names),
        frozen=tuple(frozen_names),
        eval_modules=_find_eval_modules(network, trainable_names, frozen_names),
    )


def iter_blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of a network in order: its children and, in place of a sequence, the children of that."""
    for name, module in network.named_children():
        children = list(module.named_children()) if isinstance(module, nn.Sequential | nn.ModuleList) else []
        yield from ((f"{name}.{child}", inner) for child, inner in children) if children else [(name, module)]


def list_blocks(network: nn.Module) -> list[str]:
    """List the names that `learn` accepts: blocks with weights, each sequence before its blocks."""
    names: dict[str, None] = {}
    for name, module in iter_blocks(network):
        if any(True for _ in module.parameters()):
            names |= dict.fromkeys([name.rpartition(".")[0] or name, name])
    return list(names)


def list_counted_blocks(network: nn.Module) -> list[str]:
    """List the blocks that `last:2` counts, from input to output: those with a convolution or a linear layer, without
    the block that holds the classifier.
    """
    heads = list_classifier_names(network)
    return [
        name
        for name, module in iter_blocks(network)
        if _count_layers(module) and not any(head == name or head.startswith(f"{name}.") for head in heads)
    ]


def resolve_learn(network: nn.Module, learn: str) -> str:
    """Return `learn` with a number or share of the last blocks replaced by the name of the first of them.

    Args:
        network: A timm model.
        learn: head, all, a block's name; or last:N for the last N blocks, last:P% for the last P percent of them,
            rounded up to whole blocks.

    Raises:
        PylorusError: If N or P is not a number, or the network has not as many blocks.
    """
    if not learn.startswith(LAST):
        return learn
    blocks = list_counted_blocks(network)
    asked = re.fullmatch(r"(\d{1,4})(%?)", learn.removeprefix(LAST))
    number = int(asked[1]) if asked is not None else 0
    most = 100 if asked is not None and asked[2] else len(blocks)
    if not 1 <= number <= most:
        raise PylorusError(
            f'learn: found "{learn}", expected {LAST}1 to {LAST}{len(blocks)}, as {type(network).__name__} has '
            f"{format_count(len(blocks), 'block')} before the head ({', '.join(blocks)}), or a share of them from "
            f"{LAST}1% to {LAST}100%."
        )
    return blocks[-(math.ceil(number * len(blocks) / 100) if asked is not None and asked[2] else number)]


def apply_depth(network: nn.Module, learn: str) -> Depth:
    """Set `requires_grad` of every parameter to match the depth, and return the depth."""
    resolved = resolve_depth(network, learn)
    trainable_names = set(resolved.trainable)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trainable_names)
    return resolved


def set_modes(network: nn.Module, still: Iterable[str]) -> None:
    """Put every module in training mode except those named in `still`."""
    network.train()
    for name in still:
        network.get_submodule(name).training = False


def can_train_on_one_image(network: nn.Module, learn: str, *, image_size: int) -> bool:
    """Return whether a network can take a training step with one image at the depth that `learn` names.

    Batch norm can't where a channel of one image has a single value. Weights, statistics and random numbers stay as
    they are.
    """
    with restore_modes(network), torch.random.fork_rng(devices=[]):
        set_modes(network, resolve_depth(network, learn).eval_modules)
        try:
            run_on_black_images(network, images=1, image_size=image_size)
        except ValueError as error:
            return "more than 1 value per channel" not in str(error)
        except Exception:  # it can't be run in training mode without values
            return True
    return True


class FreezeBackbone(pl.Callback):
    """Train only part of a LightningModule's timm model: weights, batch-norm statistics and dropout alike.

    What is trained follows from the epoch alone, at the start of each epoch, never from an event, so a resumed training
    misses nothing. The optimizer holds from the start every weight that is trained in some epoch, so that its groups
    are the same in a checkpoint.

    Args:
        learn: head, all, or the name of a block, which trains that block and everything after it; last:N or last:P% for
            the last blocks.
        unfreeze_at_epoch: The epoch, from 0, from which on the whole network is trained; None: never.
        attribute: The LightningModule's attribute that holds the timm model.

    Example:
        >>> callback = FreezeBackbone("head", unfreeze_at_epoch=5)
        >>> callback.get_depth(4), callback.get_depth(5)
        ('head', 'all')
    """

    @check_arguments
    def __init__(
        self,
        learn: str = "head",
        *,
        unfreeze_at_epoch: Annotated[int, Ge(0)] | None = None,
        attribute: str = "network",
    ) -> None:
        self.learn, self.unfreeze_at_epoch, self.attribute = learn, unfreeze_at_epoch, attribute
        self._still: tuple[str, ...] = ()

    def get_depth(self, epoch: int) -> str:
        """Return what is trained in an epoch, from 0: head, all, or a block's name."""
        is_unfrozen = self.unfreeze_at_epoch is not None and epoch >= self.unfreeze_at_epoch
        return "all" if is_unfrozen else self.learn

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set `requires_grad` before the optimizer is built and before the model is wrapped for several devices.

        Raises:
            PylorusError: If the network has no such block, or has to unfreeze on several devices.
        """
        network = self._get_network(pl_module)
        self._still = apply_depth(network, self.learn).eval_modules
        if self.unfreeze_at_epoch is None:
            return
        if trainer.world_size > 1:
            raise PylorusError(
                f"unfreeze_at_epoch: found {self.unfreeze_at_epoch} on {trainer.world_size} devices, but torch fixes "
                "what is trained when it distributes the network. Call Trainer.fit twice, with another depth each time."
            )
        apply_depth(network, "all")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze here too: an epoch resumed midway does not call `on_train_epoch_start`."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set what is trained and every module's mode: Lightning leaves each as it was."""
        network = self._get_network(pl_module)
        if self.unfreeze_at_epoch is None:
            # `requires_grad` is as `setup` left it: a sharded network has other parameters by now.
            set_modes(network, self._still)
        else:
            set_modes(network, apply_depth(network, self.get_depth(trainer.current_epoch)).eval_modules)

    def _get_network(self, module: pl.LightningModule) -> nn.Module:
        network = getattr(module, self.attribute, None)
        if not isinstance(network, nn.Module) or not hasattr(network, "get_classifier"):
            raise PylorusError(
                f"FreezeBackbone: {type(module).__name__}.{self.attribute} is not a timm model. Name the attribute "
                "that holds it: FreezeBackbone(…, attribute=…)."
            )
        return network


def _find_eval_modules(network: nn.Module, learning: list[str], frozen: list[str]) -> tuple[str, ...]:
    """List the modules before the first trainable one; modules without weights count by their position."""
    names = [name for name, _ in network.named_modules()]
    positions = {name: index for index, name in enumerate(names)}
    trainable_positions = [positions[name.rpartition(".")[0]] for name in learning]
    last_frozen_position = max((positions[name.rpartition(".")[0]] for name in frozen), default=-1)
    first_trainable_position = min(trainable_positions)
    head_parents = {name.rpartition(".")[0] for name in list_classifier_names(network)} | {""}
    still = []
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if any(parameter.startswith(prefix) for parameter in learning) or positions[name] > first_trainable_position:
            continue
        is_head_dropout = (
            isinstance(module, nn.Dropout)
            and positions[name] > last_frozen_position
            and name.rpartition(".")[0] in head_parents
        )
        if not is_head_dropout:
            still.append(name)
    return tuple(still)


def _format_unknown_block(network: nn.Module, learn: str) -> str:
    known = ["head", "all", f"{LAST}1", f"{LAST}50%", *list_blocks(network)]
    candidates = [
        *known,
        *(name for name, module in network.named_modules() if name and list(module.parameters())),
    ]
    return (
        f'learn: {type(network).__name__} has no block "{learn}".{format_suggestion(learn, candidates)}\n'
        f"Available: {', '.join(known)}; nested blocks by their dotted names."
    )


NETWORK_BLOCK = "(own)"
"""Block name for parameters that belong to the network itself, such as a class token."""


class BlockStructure(TypedDict):
    """One block; every value is plain JSON."""

    name: str
    """Name as `stages.<stage>.learn` accepts it, or `NETWORK_BLOCK`."""
    type: str
    """Class of its module."""
    layers: int
    """Number of layers with weights: convolutions and linear layers."""
    parameters: int
    """Number of its parameters that no earlier block holds."""
    output: list[int] | None
    """Output shape for one image, without the batch; None if it returns no tensor or is not called."""
    learning: dict[str, int]
    """Number of its trainable parameters in each stage."""


def extract_network_structure(
    network: nn.Module, *, image_size: int, learning: Mapping[str, Collection[str]]
) -> list[BlockStructure]:
    """List blocks with weights in the network's order: its children and, where a child is a sequence, its children.

    A black image shows the output shapes; modes are restored afterwards.

    Args:
        network: Any timm model; takes (batch, 3, size, size).
        image_size: Side of the image in pixels.
        learning: Names of the trainable parameters of each stage, as `resolve_depth` gives them.

    Raises:
        ValueError: If a name in `learning` is not a parameter of the network.

    Example:
        >>> network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.AdaptiveAvgPool2d(1))
        >>> learning = {"pretrain": []}
        >>> extract_network_structure(network, image_size=8, learning=learning)  # doctest: +NORMALIZE_WHITESPACE
        [{'name': '0.0', 'type': 'Conv2d', 'layers': 1, 'parameters': 112, 'output': [4, 6, 6],
          'learning': {'pretrain': 0}}]
    """
    parameters = dict(network.named_parameters())
    for stage, names in learning.items():
        unknown = [name for name in names if name not in parameters]
        if unknown:
            raise ValueError(f'learning of stage "{stage}": the network has no parameter "{unknown[0]}"')
    modules = dict(iter_blocks(network))
    shapes = _compute_output_shapes(network, modules, image_size)
    counted_names: set[str] = set()
    structure = []
    for block, module in [(NETWORK_BLOCK, network), *modules.items()]:
        block_names = _list_block_parameters(block, parameters, [*modules]) - counted_names
        counted_names |= block_names
        if block_names:
            structure.append(
                BlockStructure(
                    name=block,
                    type=type(module).__name__ if block != NETWORK_BLOCK else ", ".join(sorted(block_names)),
                    layers=0 if block == NETWORK_BLOCK else _count_layers(module),
                    parameters=sum(parameters[name].numel() for name in block_names),
                    output=shapes.get(block),
                    learning={
                        stage: sum(parameters[name].numel() for name in block_names.intersection(names))
                        for stage, names in learning.items()
                    },
                )
            )
    return structure


def _list_block_parameters(block: str, parameters: Collection[str], blocks: list[str]) -> set[str]:
    """Return the names of a block's parameters; for `NETWORK_BLOCK`, of those that are in no block."""
    if block != NETWORK_BLOCK:
        return {name for name in parameters if name.startswith(f"{block}.")}
    block_prefixes = tuple(f"{name}." for name in blocks)
    return {name for name in parameters if not name.startswith(block_prefixes)}


def _count_layers(module: nn.Module) -> int:
    return sum(isinstance(inner, _ConvNd | nn.Linear | nn.Bilinear) for inner in module.modules())


def _compute_output_shapes(
    network: nn.Module, modules: Mapping[str, nn.Module], image_size: int
) -> dict[str, list[int]]:
    """Return each block's output shape for one black image, without the batch."""
    shapes: dict[str, list[int]] = {}
    handles: list[RemovableHandle] = []

    def register_shape_hook(name: str, module: nn.Module) -> None:
        def save_shape(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = _find_first_tensor(output)
            if tensor is not None:
                shapes[name] = list(tensor.shape[1:])

        handles.append(module.register_forward_hook(save_shape))

    try:
        for name, module in modules.items():
            register_shape_hook(name, module)
        with restore_modes(network):
            network.eval()  # leaves batch-norm statistics alone
            run_on_black_images(network, images=1, image_size=image_size)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _find_first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((tensor for tensor in map(_find_first_tensor, parts) if tensor is not None), None)


def compute_peak_lr(stage: StageConfig, optimizer: OptimizerConfig) -> float:
    """Return the stage's own learning rate, or its multiple of the run's."""
    return stage.lr if stage.lr is not None else optimizer.lr * stage.lr_factor


def get_monitor_mode(monitor: str) -> Literal["min", "max"]:
    """Return whether a smaller or a larger value of the monitored metric is better."""
    return "min" if monitor == "loss" else "max"


def check_optimizer_name(name: str, *, where: str) -> None:
    """Check that timm has an optimizer.

    Raises:
        PylorusError: If it has none of that name.
    """
    known = [str(each) for each in list_optimizers()]
    if name not in known:
        raise PylorusError(f'{where}: timm has no "{name}".{format_suggestion(name, known)}')


def build_optimizer(
    network: nn.Module, stage: StageConfig, config: OptimizerConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters, grouped by layer where their learning rates differ.

    Args:
        network: A timm model.
        stage: Learning rate and layer decay.
        config: Name and arguments of the optimizer.
        fused: Whether torch may update all weights at once.

    Raises:
        PylorusError: If timm has no optimizer of that name.
    """
    check_optimizer_name(config.name, where="optimizer.name")
    optimizer = create_optimizer_v2(
        network,
        opt=config.name,
        lr=compute_peak_lr(stage, config),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=stage.layer_decay if stage.layer_decay < 1 else None,
        **cast(dict[str, Any], {"fused": True} if fused and config.name in FUSED_OPTIMIZERS else {}),
    )
    for group in optimizer.param_groups:
        # timm leaves a group's lr_scale to its own schedulers; ours start from the group's learning rate.
        group["lr"] *= group.pop("lr_scale", 1.0)
    return optimizer


class WarmupCosine:
    """Learning rate as a fraction of its peak: linear warm-up, then half a cosine down to 0, or constant.

    Example:
        >>> schedule = WarmupCosine(steps=10, warmup=2, falls=True)
        >>> [round(schedule(step), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, *, steps: int, warmup: int, falls: bool) -> None:
        self.steps, self.warmup, self.falls = steps, warmup, falls

    def __call__(self, step: int) -> float:
        """Return the fraction, in [0, 1], at a step in [0, steps]."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.falls:
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_schedule(optimizer: torch.optim.Optimizer, stage: StageConfig, *, steps: int) -> dict[str, Any]:
    """Build the stage's learning-rate schedule in the form that Lightning expects.

    Args:
        optimizer: The optimizer whose learning rates it changes.
        stage: Names the schedule, its warm-up and the metric that a plateau is judged by.
        steps: Optimizer steps in the whole stage.
    """
    scheduler: LRScheduler | ReduceLROnPlateau
    if stage.schedule == "plateau":
        scheduler = ReduceLROnPlateau(optimizer, mode=get_monitor_mode(stage.monitor), factor=0.1, patience=3)
        return {"scheduler": scheduler, "interval": "epoch", "monitor": "monitor"}
    lr_factor = WarmupCosine(steps=steps, warmup=round(stage.warmup * steps), falls=stage.schedule == "cosine")
    return {"scheduler": LambdaLR(optimizer, lr_factor), "interval": "step"}


NOMINAL_WEIGHT = 32.0
"""What the loss of a batch is divided by until the weights of all batches of its step are known."""


class StepLoss:
    """The loss of an optimizer step: over all its images, in all processes and batches, losses divided by weights.

    Where several batches make a step, the weights of the later ones are unknown when the first one's gradients are
    computed. So gradients are those of the sum, scaled by a constant, until `normalize_gradients`.

    Attributes:
        batches: Number of batches for each step; Lightning divides the loss of each by it.
    """

    def __init__(self) -> None:
        self.batches = 1
        self._weight: Tensor | None = None

    def scale_batch(self, losses: Tensor, weight: Tensor, processes: Processes) -> Tensor:
        """Return what a process differentiates for its part of a batch.

        Args:
            losses: Loss of each image, of shape (batch,).
            weight: Sum of the images' weights, of shape ().
            processes: The processes, over which gradients are averaged.
        """
        if self.batches > 1:
            self._weight = weight if self._weight is None else self._weight + weight
            return losses.sum() * (processes.count * self.batches / NOMINAL_WEIGHT)
        total_weight = weight.clone()
        distributed.all_reduce(total_weight)
        return losses.sum() * processes.count / total_weight

    def normalize_gradients(self, parameters: Iterable[nn.Parameter], processes: Processes) -> None:
        """Divide the gradients of a step by the weight of its images, if it has several batches."""
        if self._weight is None:
            return
        if processes.is_distributed:
            distributed.all_reduce(self._weight)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shards = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
        torch._foreach_mul_(shards, NOMINAL_WEIGHT / self._weight)
        self._weight = None
