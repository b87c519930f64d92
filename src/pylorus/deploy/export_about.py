"""What is said of an export: to its user, to programs (export.json) and to readers (README.md)."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import torch

from pylorus.deploy.description import Description
from pylorus.deploy.export_speed import Speed
from pylorus.deploy.exported import IMAGE, OUTPUTS
from pylorus.deploy.files import MODEL
from pylorus.deploy.int8 import Loss
from pylorus.deploy.onnx_graph import input_in_words, outputs_in_words
from pylorus.deploy.parity import Parity
from pylorus.deploy.strict import plain
from pylorus.percent import percent

RECORD_VERSION = 1


def record(
    said: Description,
    parity: Parity,
    loss: Loss | None,
    speed: Sequence[Speed],
    *,
    bundle: str,
    versions: Mapping[str, str],
) -> dict[str, object]:
    """The content of export.json, plain values.

    Args:
        said: The bundle's description.
        parity: What it was let pass with, in 32 bits.
        loss: What 8 bits cost; None for 32 bits.
        speed: Beside PyTorch; empty where it was not measured.
        bundle: SHA-256 of the bundle's list of hashes.
        versions: Of the packages that made it.
    """
    return {
        "format_version": RECORD_VERSION,
        "format": "onnx",
        "precision": "32" if loss is None else "int8",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": bundle,
        "intended_use": said.intended_use,
        "input": {IMAGE: input_in_words(said)},
        "outputs": {"names": list(OUTPUTS), "meaning": outputs_in_words(said)},
        "classes": list(said.classes),
        "short_names": list(said.short_names),
        "preprocessing": plain(said.input),
        "parity": plain(parity),
        "int8": plain(loss),
        "speed": {"threads": torch.get_num_threads(), "measured": plain(list(speed))} if speed else None,
        "versions": dict(versions),
    }


def told(said: Description, parity: Parity, loss: Loss | None, speed: Sequence[Speed]) -> str:
    """What a user is to see."""
    lines = [f"{said.architecture}, classes {', '.join(said.short_names)}", *_parity(parity)]
    if loss is not None:
        lines += ["", *_loss(loss, said)]
    for each in speed:
        lines.append(
            f"speed at batch {each.batch}: {each.milliseconds['onnx']:.1f} ms an image, PyTorch "
            f"{each.milliseconds['pytorch']:.1f} ms: {each.times_pytorch['onnx']:.2f} times as fast (median of "
            f"{each.repeats}, {torch.get_num_threads()} threads each, this machine as busy as it was)"
        )
    return "\n".join(lines)


def readme(said: Description, parity: Parity, loss: Loss | None) -> str:
    """The text of README.md."""
    lines = [*_parity(parity), *([] if loss is None else _loss(loss, said))]
    measured = "\n".join(f"{'  ' if line.startswith(' ') else ''}- {line.strip()}" for line in lines)
    return f"""# {said.architecture} as ONNX

**{said.intended_use}** The model card beside this file says what it was trained on and what it was found to be worth.

`{MODEL}` needs nothing but onnxruntime.
`pylorus predict THIS_FOLDER IMAGES --output predictions.csv` does all of what follows.

## What goes in

{input_in_words(said)}

## What comes out

{outputs_in_words(said)}

Classes, in order: {", ".join(f"{name} ({short})" for name, short in zip(said.classes, said.short_names, strict=True))}.

```python
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{MODEL}", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["pylorus.classes"])
images = np.zeros((2, {said.input.size}, {said.input.size}, 3), dtype=np.uint8)  # yours, made ready as said above
logits, probabilities, unlikeness = session.run(["logits", "probabilities", "unlikeness"], {{"{IMAGE}": images}})
```

## How it was tried

{measured}

`sha256sum -c SHA256SUMS` checks the files; `export.json` holds the same for programs.
"""


def _parity(parity: Parity) -> list[str]:
    return [
        f"parity with PyTorch on {parity.images} images ({parity.source}), in 32 bits:",
        *(
            f"  batch {size}: logits differ by {logits:.1e} at most (allowed: {parity.tolerance:.1e}; the largest "
            f"logit is {parity.largest_logit:.3g}), probabilities by {shares:.1e}, unlikeness by {far:.1e}"
            for size, logits, shares, far in zip(
                parity.batches, parity.logits, parity.probabilities, parity.unlikeness, strict=True
            )
        ),
        f"  {parity.other_class} images of another class; PyTorch's own batches differ by {parity.pytorch_alone:.1e}"
        + (f", and it is {parity.rounding:.1e} from 64 bits" if parity.rounding is not None else ""),
    ]


def _loss(loss: Loss, said: Description) -> list[str]:
    difference = loss.accuracy_difference
    change = "no interval: fewer than two groups tell them apart"
    if difference.value is not None and difference.low is not None and difference.high is not None:
        change = f"95 % interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    value = 100 * (loss.right_8 - loss.right_32) / loss.images
    return [
        f"8 bits beside 32, on {loss.images} images of {loss.groups} groups ({loss.source}); ranges from "
        f"{loss.calibration_images} others:",
        f"  accuracy {percent(loss.right_8 / loss.images)} % beside {percent(loss.right_32 / loss.images)} %: "
        f"{value:+.1f} points ({change})",
        f"  {loss.only_32} images only 32 bits recognise, {loss.only_8} only 8 bits; McNemar's p = {loss.p_value:.3g}",
        f"  {loss.other_class} images of another class, {loss.other_decision} another decision for "
        f"{said.decision.class_name}, {loss.other_abstention} answered by one alone or left for another reason",
        f"  a calibrated probability differs by {loss.largest_difference:.2g} at most; thresholds are those of 32 bits",
    ]
