"""How near exports come to PyTorch on real images, by architecture: the table of docs/export.md.

    python benchmarks/export_parity.py RUN/model --images DIR vgg19 resnet50 inception_v3 vit_small_patch16_224

Weights are drawn, since a network's arithmetic is asked for and not its skill. Drawn ones say next to nothing as they
are (residual branches that begin at zero, logits of 0.03 or of 1e11), so these branches get a scale of 0.2, batch norms
the statistics of the images, and the head is scaled until logits have a standard deviation of 3, as trained ones do.
The bundle lends classes, temperature and thresholds. Without MODELs it is the bundle's own network. Both are also
compared with the same network in 64 bits, on the first images: that is how rough 32 bits are by themselves.
"""

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from pylorus.deploy.model import Bundle, load_bundle
from pylorus.deploy.onnx import ExportedModel, open_session, run_session, write_onnx
from pylorus.deploy.parity import (
    IMAGES,
    TrialImages,
    check_parity,
    compute_fp64_logits,
    find_user_images,
    measure_speed,
    select_evenly,
)
from pylorus.model.backbone import init_head
from pylorus.model.inference import BundleClassifier, compute_logits_and_features, move_to_device

IN_64_BITS = 14
TITLES = (
    *("network", "size", "largest logit", "batch 1", "batch 7", "relative", "unlikeness"),
    *("PyTorch from 64 bits", "ONNX from 64 bits", "gate"),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--speed", action="store_true")
    chosen = parser.parse_intermixed_args()
    lent = load_bundle(chosen.bundle)
    print("| " + " | ".join(TITLES) + " |\n" + "| --- " * len(TITLES) + "|")
    for name in chosen.models or ["the bundle's own"]:
        began = time.monotonic()
        bundle = drawn(lent, name, chosen.images) if chosen.models else lent
        images = find_user_images(chosen.images, bundle.description, group=None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_onnx(bundle, path)
            session = open_session(path)
            found = check_parity(bundle, session, images)
            cells = [
                *(bundle.description.architecture, bundle.input.size, f"{found.largest_logit:.3g}"),
                *(f"{far:.1e}" for far in found.logits),
                f"{max(found.logits) / found.largest_logit:.1e}",
                f"{max(found.unlikeness):.1e}",
                *(f"{far:.1e}" for far in from_64_bits(bundle, session, images)),
                "open" if found.has_passed else f"closed ({found.other_class} of another class)",
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            print(f"{found.images} images, {time.monotonic() - began:.0f} s", file=sys.stderr)
            if chosen.speed:
                _, pixels = next(select_evenly(images, 16).read_blocks(bundle.input))
                model = ExportedModel(path.parent, bundle.description, {}, session)
                for each in measure_speed(bundle, {"onnx": model}, pixels):
                    print(each, flush=True)
        del bundle, session
        gc.collect()


def from_64_bits(bundle: Bundle, session: object, images: TrialImages) -> tuple[float, float]:
    """How far PyTorch's and the export's logits are from those in 64 bits, at most."""
    _, pixels = next(select_evenly(images, IN_64_BITS).read_blocks(bundle.input))
    theirs = bundle.run_network(pixels).logits.double().numpy()
    (ours,) = run_session(session, pixels, "logits")
    wanted = compute_fp64_logits(bundle, pixels)
    return float(np.abs(theirs - wanted).max()), float(np.abs(ours - wanted).max())


def drawn(lent: Bundle, name: str, images: Path) -> Bundle:
    """A bundle in memory of another network, with drawn weights."""
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=len(lent.description.classes))
    init_head(network)
    data = resolve_model_data_config(network)
    given = replace(
        lent.description.input,
        **{"size": data["input_size"][-1], "interpolation": data["interpolation"]},
        **{"mean": tuple(data["mean"]), "std": tuple(data["std"])},
    )
    said = replace(lent.description, architecture=name, input=given)
    pixels = np.concatenate(
        [
            block
            for _, block in select_evenly(find_user_images(images, said, group=None), IMAGES).read_blocks(given.form)
        ]
    )
    tensor = torch.from_numpy(pixels[::4].transpose(0, 3, 1, 2).copy()).float() / 255
    tensor = (tensor - torch.tensor(given.mean).view(1, 3, 1, 1)) / torch.tensor(given.std).view(1, 3, 1, 1)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            if not part.weight.any():
                nn.init.constant_(part.weight, 0.2)
            part.momentum = None
    with torch.no_grad():
        network.train()(tensor)
        logits, features = compute_logits_and_features(network.eval(), tensor)
        head = network.get_classifier()
        head.weight *= 3 / logits.std()
    directions = nn.functional.normalize(
        torch.stack([features[:4].mean(0), features[4:9].mean(0), features[9:].mean(0)]), dim=1
    )
    device = torch.device("cpu")
    classifier = BundleClassifier(
        move_to_device(network, device), mean=given.mean, std=given.std, directions=directions
    )
    return Bundle(lent.folder, said, {}, classifier, device)


if __name__ == "__main__":
    main()
