"""Measure how closely exports agree with PyTorch on real images, by architecture: the table of docs/export.md.

    python benchmarks/export_parity.py RUN/model --images DIR vgg19 resnet50 inception_v3 vit_small_patch16_224

The weights are random, because the test concerns the arithmetic of a network, not its accuracy. Plain random weights
are not realistic (residual branches that are zero, logits of 0.03 or 1e11), so these branches get a scale of 0.2,
batch norm gets the statistics of the images, and the head is scaled so that logits have a standard deviation of 3, as
in trained networks. Classes, temperature and thresholds are those of the bundle. Without MODELs, the bundle's own
network is used. PyTorch and ONNX are also compared with the same network in 64 bits on a few images, which shows the
rounding of 32 bits.
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
    compute_fp64_outputs,
    find_user_images,
    measure_speed,
    select_evenly,
)
from pylorus.model.inference import BundleClassifier, compute_logits_and_features, move_to_device
from pylorus.model.weights import init_head

IN_64_BITS = 14
TITLES = (
    *("network", "size", "largest logit", "batch 1", "batch 7", "relative", "unlikeness"),
    *("64 bits: PyTorch", "64 bits: ONNX", "result"),
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
                "passed" if found.has_passed else f"failed ({found.other_class} images with another class)",
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            print(f"{found.images} images, {time.monotonic() - began:.0f} s", file=sys.stderr)
            if chosen.speed:
                _, pixels = next(select_evenly(images, 16).read_blocks(bundle.input))
                model = ExportedModel(path.parent, bundle.description, {}, {}, session)
                for each in measure_speed(bundle, {"onnx": model}, pixels):
                    print(each, flush=True)
        del bundle, session
        gc.collect()


def from_64_bits(bundle: Bundle, session: object, images: TrialImages) -> tuple[float, float]:
    """Return the largest distances of the logits of PyTorch and of the export from those in 64 bits."""
    _, pixels = next(select_evenly(images, IN_64_BITS).read_blocks(bundle.input))
    theirs = bundle.run_network(pixels).logits.double().numpy()
    (ours,) = run_session(session, pixels, "logits")
    wanted, _ = compute_fp64_outputs(bundle, pixels)
    return float(np.abs(theirs - wanted).max()), float(np.abs(ours - wanted).max())


def drawn(lent: Bundle, name: str, images: Path) -> Bundle:
    """Build a bundle in memory with another network and random weights."""
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
        [block for _, block in select_evenly(find_user_images(images, said, group=None), IMAGES).read_blocks(given)]
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
    return Bundle(lent.folder, said, {}, lent.contents, classifier, device)


if __name__ == "__main__":
    main()
