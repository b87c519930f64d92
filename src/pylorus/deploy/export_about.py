"""Describe an export: for the terminal, for programs (export.json) and for readers (README.md)."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import torch

from pylorus.deploy.description import Description
from pylorus.deploy.export_speed import Speed
from pylorus.deploy.exported import IMAGE, OUTPUTS
from pylorus.deploy.files import MODEL
from pylorus.deploy.int8 import QuantizationLoss
from pylorus.deploy.onnx_graph import format_input_description, format_outputs_description
from pylorus.deploy.parity import Parity
from pylorus.deploy.strict import convert_to_plain
from pylorus.percent import format_percent

RECORD_VERSION = 1


def build_export_record(
    description: Description,
    parity: Parity,
    loss: QuantizationLoss | None,
    speed: Sequence[Speed],
    *,
    bundle: str,
    versions: Mapping[str, str],
) -> dict[str, object]:
    """Return the content of export.json as plain values.

    Args:
        description: The bundle's description.
        parity: Result of the parity check, in fp32.
        loss: Loss by int8 quantization; None for fp32.
        speed: Speed compared with PyTorch; empty if not measured.
        bundle: SHA-256 of the bundle's list of file hashes.
        versions: Versions of the packages used, by name.
    """
    return {
        "format_version": RECORD_VERSION,
        "format": "onnx",
        "precision": "32" if loss is None else "int8",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": bundle,
        "intended_use": description.intended_use,
        "input": {IMAGE: format_input_description(description)},
        "outputs": {"names": list(OUTPUTS), "meaning": format_outputs_description(description)},
        "classes": list(description.classes),
        "short_names": list(description.short_names),
        "preprocessing": convert_to_plain(description.input),
        "parity": convert_to_plain(parity),
        "int8": convert_to_plain(loss),
        "speed": {"threads": torch.get_num_threads(), "measured": convert_to_plain(list(speed))} if speed else None,
        "versions": dict(versions),
    }


def format_export_summary(
    description: Description, parity: Parity, loss: QuantizationLoss | None, speed: Sequence[Speed]
) -> str:
    """Return the summary for the terminal."""
    lines = [f"{description.architecture}, classes {', '.join(description.short_names)}", *_format_parity(parity)]
    if loss is not None:
        lines += ["", *_format_loss(loss, description)]
    threads = "thread" if torch.get_num_threads() == 1 else "threads"
    for each in speed:
        lines.append(
            f"speed at batch {each.batch}: {each.milliseconds['onnx']:.1f} ms per image, PyTorch "
            f"{each.milliseconds['pytorch']:.1f} ms: {each.times_pytorch['onnx']:.2f} times as fast (median of "
            f"{each.repeats}, {torch.get_num_threads()} {threads} each; depends on the load of this machine)"
        )
    return "\n".join(lines)


def render_readme(description: Description, parity: Parity, loss: QuantizationLoss | None) -> str:
    """Return the text of README.md."""
    lines = [*_format_parity(parity), *([] if loss is None else _format_loss(loss, description))]
    measured = "\n".join(f"{'  ' if line.startswith(' ') else ''}- {line.strip()}" for line in lines)
    size = description.input.size
    pairs = zip(description.classes, description.short_names, strict=True)
    classes = ", ".join(f"{name} ({short_name})" for name, short_name in pairs)
    return f"""# {description.architecture} as ONNX

**{description.intended_use}** The model card beside this file describes its training data and its measured performance.

`{MODEL}` needs only onnxruntime.
`pylorus predict THIS_FOLDER IMAGES --output predictions.csv` does everything described below.

## Input

{format_input_description(description)}

## Outputs

{format_outputs_description(description)}

Classes, in order: {classes}.

```python
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{MODEL}", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["pylorus.classes"])
images = np.zeros((2, {size}, {size}, 3), dtype=np.uint8)  # your images, preprocessed as described above
logits, probabilities, unlikeness = session.run(["logits", "probabilities", "unlikeness"], {{"{IMAGE}": images}})
```

## How it was verified

{measured}

`sha256sum -c SHA256SUMS` checks the files; `export.json` holds the same information for programs.
"""


def _format_parity(parity: Parity) -> list[str]:
    return [
        f"parity with PyTorch on {parity.images} images ({parity.source}), in fp32:",
        *(
            f"  batch {size}: logits differ by at most {logits:.1e} (allowed: {parity.tolerance:.1e}; the largest "
            f"logit is {parity.largest_logit:.3g}), probabilities by {probabilities:.1e}, "
            f"unlikeness by {unlikeness:.1e}"
            for size, logits, probabilities, unlikeness in zip(
                parity.batches, parity.logits, parity.probabilities, parity.unlikeness, strict=True
            )
        ),
        f"  {parity.other_class} images with another predicted class; PyTorch's own batches differ by "
        f"{parity.pytorch_alone:.1e}"
        + (f", and PyTorch differs from fp64 by {parity.rounding:.1e}" if parity.rounding is not None else ""),
    ]


def _format_loss(loss: QuantizationLoss, description: Description) -> list[str]:
    difference = loss.accuracy_difference
    change = "no interval: fewer than two groups differ"
    if difference.value is not None and difference.low is not None and difference.high is not None:
        change = f"95 % interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    value = 100 * (loss.right_8 - loss.right_32) / loss.images
    return [
        f"int8 compared with fp32, on {loss.images} images of {loss.groups} groups ({loss.source}); calibrated on "
        f"{loss.calibration_images} other images:",
        f"  accuracy {format_percent(loss.right_8 / loss.images)} % instead of {format_percent(loss.right_32 / loss.images)} %: "
        f"{value:+.1f} points ({change})",
        f"  {loss.only_32} images correct only in fp32, {loss.only_8} only in int8; McNemar's p = {loss.p_value:.3g}",
        f"  {loss.other_class} images with another predicted class, {loss.other_decision} with another decision for "
        f"{description.decision.class_name}, {loss.other_abstention} answered by only one of both or abstained "
        "for another reason",
        f"  calibrated probabilities differ by at most {loss.largest_difference:.2g}; the thresholds are those of fp32",
    ]
