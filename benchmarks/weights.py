"""Draw random weights whose frozen features have a realistic scale, for machines without a hub.

`python benchmarks/weights.py MODEL FILE --data DIR --size 224`. The statistics of batch norm are estimated on the
images of the benchmark; in a network without batch norm, each layer is scaled to unit variance (Mishkin and Matas,
"All you need is a good init", 2016). The classifier is not included: every contender initializes its own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

MEASURED_ON = 256
"""Maximum number of images from which statistics are estimated."""


def draw_weights(
    model: str, arguments: dict[str, Any], *, data: Path, size: int, batch_size: int = 32
) -> dict[str, Tensor]:
    """Return a state dict without the classifier; the same arguments give the same tensors on the same machine."""
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=3, **arguments)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    hooks = [] if norms else [layer.register_forward_hook(_to_unit_variance) for layer in _layers(network)]
    network.train(bool(norms))
    config = resolve_data_config({}, model=network)
    loader = create_loader(
        create_dataset("", root=str(data / "train")),
        input_size=(3, size, size),
        batch_size=batch_size,
        crop_pct=1.0,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    samples = loader.dataset.reader.samples  # sorted by class; shuffled, so that each batch contains all classes
    loader.dataset.reader.samples = [samples[index] for index in torch.randperm(len(samples))[:MEASURED_ON]]
    with torch.no_grad():
        for pixels, _ in loader:
            network(pixels)
            if hooks:
                break
    for hook in hooks:
        hook.remove()
    head = next(name for name, module in network.named_modules() if module is network.get_classifier())
    state = network.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(f"{head}.")}


def write_weights(file: Path, model: str, arguments: dict[str, Any], *, data: Path, size: int) -> None:
    """Write the weights to a safetensors file, which appears only when it is complete."""
    temporary = file.with_name(file.name + ".part")
    save_file(draw_weights(model, arguments, data=data, size=size), temporary, {"made": "random, for benchmarks only"})
    temporary.rename(file)


def _layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _to_unit_variance(layer: nn.Module, _given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    scale = output.std().clamp_min(1e-6)
    layer.weight.div_(scale)
    if layer.bias is not None:
        layer.bias.div_(scale)
    return output / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="timm's name")
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--args", type=json.loads, default={}, help='arguments of timm.create_model, as JSON: \'{"pad_type": "same"}\''
    )
    options = parser.parse_args()
    write_weights(options.file, options.model, options.args, data=options.data, size=options.size)


if __name__ == "__main__":
    main()
