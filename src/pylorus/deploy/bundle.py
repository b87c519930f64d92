"""The bundle: a trained network as safetensors, and beside it in JSON all that must be known to use it."""

import importlib.metadata
from pathlib import Path

from safetensors.torch import save_file

from pylorus import __version__
from pylorus.config import Config
from pylorus.data.prepare import Images
from pylorus.files import whole, write_json
from pylorus.model.backbone import Backbone

INTENDED_USE = "Research use only. Not a medical device."


def write_bundle(folder: Path, backbone: Backbone, images: Images, config: Config) -> None:
    """Writes model.safetensors and model.json; no file name of an image is in them.

    Args:
        folder: Where to.
        backbone: The trained network and the input that it takes.
        images: Classes and the split that it was trained on.
        config: Of the run.
    """
    network = {name: tensor.contiguous() for name, tensor in backbone.network.state_dict().items()}
    with whole(folder / "model.safetensors") as temporary:
        save_file(network, temporary)
    description = {
        "architecture": backbone.name,
        "arguments": config.model.args,
        "classes": list(images.catalog.classes),
        "short_names": list(images.catalog.short_names),
        "input": {
            "size": backbone.image_size,
            "crop": config.data.crop,
            "fit": config.data.fit,
            "interpolation": backbone.interpolation,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        },
        "weights": {
            "from": backbone.weights,
            "sha256": backbone.weights_sha256,
            "licence": backbone.licence,
        },
        "training": {
            "stages": list(config.stages),
            "seed": config.seed,
            "images": {part: sum(images.of_class(part)) for part in ("train", "val", "test")},
            "split_sha256": images.split_hash,
            "validated_on": images.validation,
        },
        "intended_use": INTENDED_USE,
        "versions": {"pylorus": __version__} | {name: importlib.metadata.version(name) for name in ("timm", "torch")},
    }
    write_json(folder / "model.json", description)
