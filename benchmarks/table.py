"""Compute ratios and render the result page; `python benchmarks/table.py FILE.json` writes the page again."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Measurement = dict[str, Any]
Value = Callable[[Measurement], float | None]


def phase(*names: str) -> Value:
    """Return a function that adds the seconds of the named phases; its value is None if one is missing."""

    def take(one: Measurement) -> float | None:
        found = [one.get("phases", {}).get(name) for name in names]
        return None if None in found else sum(found)

    return take


def whole(one: Measurement) -> float | None:
    return one.get("seconds")


def stage_memory(name: str) -> Value:
    """Return a function that gives the peak resident memory of the main process in a stage, in MiB."""
    return lambda one: one.get("phase_memory_mib", {}).get(name)


def memory(one: Measurement) -> float | None:
    return one.get("gpu_memory_mib") or one.get("memory_mib")


@dataclass(frozen=True)
class Target:
    """A ratio of two measured values and its minimum.

    Attributes:
        work: The work that is measured, as shown in the table.
        against: What Pylorus is compared with, as shown in the table.
        value: The denominator: a contender of Pylorus and a function that takes the value from a measurement.
        other: The numerator: the other contender and its function.
        least: The minimum of the ratio.
    """

    work: str
    against: str
    value: tuple[str, Value]
    other: tuple[str, Value]
    least: float


def targets(late: str, epochs: int, work: str = "standard") -> list[Target]:
    """Return all targets of a kind of work; they name contenders of `lineup.py`."""
    script = "timm-style script, best flags"
    if work == "overhead":
        run = f"whole process, {epochs} + {epochs} epochs"
        return [Target(run, script, ("pylorus", whole), ("timm_best", whole), 1.0)]
    if work == "frames":
        run = f"whole process, {epochs} + {epochs} epochs"
        read = phase("read")
        return [
            Target(run, script, ("pylorus", whole), ("timm_best", whole), 1.5),
            Target(f"{run}, second run", script, ("pylorus_again", whole), ("timm_best", whole), 2.5),
            Target("first pass", "bare OpenCV decode", ("pass", read), ("opencv", phase("decode")), 0.75),
            Target("second pass", "the first pass", ("pass_again", read), ("pass", read), 100),
        ]
    pretrain, finetune = phase("pretrain"), phase("finetune")
    head, both = f"pre-training, {epochs} epochs", f"both stages, {epochs} + {epochs} epochs, whole process"
    return [
        Target(head, "fastai default", ("pylorus", pretrain), ("fastai", pretrain), 20),
        Target(head, "timm-style script, best flags", ("pylorus", pretrain), ("timm_best", pretrain), 4),
        Target(
            f"fine-tuning from {late}, {2 * epochs} epochs",
            "the same without the cache",
            ("pylorus_late", finetune),
            ("pylorus_late_uncached", finetune),
            2,
        ),
        Target(
            f"fine-tuning the whole network, {epochs} epochs",
            "fastai default",
            ("pylorus", finetune),
            ("fastai", finetune),
            3,
        ),
        Target(both, "fastai default", ("pylorus", whole), ("fastai", whole), 4.5),
        Target(both, "timm-style script, best flags", ("pylorus", whole), ("timm_best", whole), 1.25),
        Target(
            "pre-training of the second job of a sweep",
            "the first job",
            ("pylorus_sweep", phase("second")),
            ("pylorus_sweep", phase("first")),
            5,
        ),
        Target("fine-tuning, fraction of the bf16 peak", "1", ("pylorus", lambda _: 1.0), ("pylorus", _share), 0.55),
        *(
            Target(
                f"peak memory, {what}",
                "without the cache (ratio to cached)",
                (mine, value),
                (f"{mine}_uncached", value),
                1 / 1.2,
            )
            for what, mine, value in (
                ("pre-training", "pylorus", stage_memory("pretrain")),
                ("both stages, whole process", "pylorus", memory),
                (f"fine-tuning from {late}, whole process", "pylorus_late", memory),
            )
        ),
    ]


def markdown(record: dict[str, Any]) -> str:
    """Render the page: machine, ratios, contenders."""
    _with_share(record)
    done = [one for one in record["measurements"] if one["error"] is None]
    machine, settings = record["machine"], record["settings"]
    images = settings["images"]
    peaks = f"bf16 {record['peak_bf16'] / 1e9:.0f}, fp32 {record['peak_fp32'] / 1e9:.0f} billion operations per second"
    repeats = 1 + max((one["repeat"] for one in record["measurements"]), default=-1)
    lines = [
        f"# {settings['model']} at {settings['size']} px",
        "",
        f"{record['date'][:10]}, Pylorus {record['commit']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB"
        + (f", {machine['gpu']}" if machine["gpu"] else "")
        + f"; matrix product {peaks}.",
        f"{'Synthetic images' if settings['drawn'] else 'Images'}: "
        f"{images['train']} / {images['val']} / {images['test']} "
        f"(train / val / test), {settings['classes']} classes; weights {settings['weights']}; batches of "
        f"{settings['batch_size']}; {settings['epochs']} epochs per phase; no augmentation. "
        f"Medians of up to {repeats} round{'s' if repeats > 1 else ''}; smallest and largest value in brackets."
        + ("" if record["finished"] else " **Not finished.**"),
        "",
        *_ratios(done, targets(settings["late"], settings["epochs"], settings.get("work", "standard"))),
        "",
        *_contenders(record),
        "",
        *_timelines(record),
        *_arithmetic(record),
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
    ]
    return "\n".join(lines)


def line(one: Measurement) -> str:
    """Format one measurement as the line that is printed when it is finished."""
    if one["error"]:
        return f"{one['repeat'] + 1}  {one['contender']:22} {one['error']}"
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in one["phases"].items())
    accuracy = "?" if one["accuracy"] is None else f"{100 * one['accuracy']:.1f} %"
    text = (
        f"{one['repeat'] + 1}  {one['contender']:22} {one['seconds']:7.1f} s, CPU {one['cpu_seconds']:.1f} s  "
        f"({parts})  {one['memory_mib']:.0f} MiB  test accuracy {accuracy}"
    )
    timeline = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in timeline_of(one).items())
    return f"{text}\n     {timeline}" if timeline else text


def timeline_of(one: Measurement) -> dict[str, float]:
    """Return the seconds of each part of a run of Pylorus, and those that only the watching process sees."""
    timeline = one.get("timeline") or {}
    if not timeline or one["contender"] == "pylorus_sweep":  # there it is the timeline of the second job alone
        return dict(timeline)
    return {**timeline, "outside": max(0.0, one["seconds"] - sum(timeline.values()))}


def _ratios(done: list[Measurement], wanted: list[Target]) -> list[str]:
    lines = ["| work | compared with | target | measured | met |", "| --- | --- | --: | --: | --- |"]
    for target in wanted:
        mine, other = _values(done, *target.value), _values(done, *target.other)
        found, met = "–", "not measured"
        if mine and other:
            ratio = median(other.values()) / median(mine.values())
            met = "yes" if ratio >= target.least else "**no**"
            # Ratios within a round: other load on the machine then affects both values.
            turns = [other[turn] / mine[turn] for turn in mine if turn in other]
            found = f"{ratio:.2f}" + (f" ({min(turns):.2f}–{max(turns):.2f})" if turns else "")
        lines.append(f"| {target.work} | {target.against} | {target.least:.3g} | {found} | {met} |")
    return lines


def _contenders(record: dict[str, Any]) -> list[str]:
    lines = [
        "| contender | whole process, s | CPU, s | pre-training, s | fine-tuning, s | training images/s, pre-training "
        "| fine-tuning | peak memory, MiB | GPU memory, MiB | GPU busy | test accuracy |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    takes: list[tuple[Value, str]] = [
        (whole, ".1f"),
        (lambda one: one.get("cpu_seconds"), ".1f"),
        (lambda one: phase("pretrain")(one) or phase("second")(one), ".1f"),
        (phase("finetune"), ".1f"),
        (lambda one: one["images_per_second"].get("pretrain"), ".1f"),
        (lambda one: one["images_per_second"].get("finetune"), ".1f"),
        (lambda one: one["memory_mib"], ".0f"),
        (lambda one: one.get("gpu_memory_mib"), ".0f"),
        (lambda one: one.get("gpu_share"), ".0%"),
        (lambda one: one["accuracy"], ".1%"),
    ]
    for name, what in record["contenders"].items():
        own = [one for one in record["measurements"] if one["contender"] == name]
        good = [one for one in own if one["error"] is None]
        if good:
            cells = [_spread([take(one) for one in good], form) for take, form in takes]
            lines.append(f"| {name}: {what} | " + " | ".join(cells) + " |")
        if len(good) < len(own):
            failed = [one for one in own if one["error"] is not None]
            times = "" if failed[-1]["error"].startswith("not installed") else f": failed {len(failed)} ×"
            lines.append(f"| {name}{times} | {failed[-1]['error']} |" + " |" * 9)
    return lines


def _timelines(record: dict[str, Any]) -> list[str]:
    """Return the table of the timelines of Pylorus's runs: medians of the rounds."""
    timelines: dict[str, list[dict[str, float]]] = {}
    for one in record["measurements"]:
        if one["error"] is None and timeline_of(one):
            timelines.setdefault(one["contender"], []).append(timeline_of(one))
    if not timelines:
        return []
    parts = list(dict.fromkeys(part for rounds in timelines.values() for one in rounds for part in one))
    lines = [
        f"| timeline, s | {' | '.join(parts)} |",
        f"| --- |{' --: |' * len(parts)}",
    ]
    for name, rounds in timelines.items():
        cells = [_spread([one.get(part) for one in rounds], ".2f") for part in parts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


REFERENCE_IMAGES, REFERENCE_IMAGES_PER_CLASS = 1000, 100
"""Training images, in all and of each class, whose features Pylorus compares others with; see docs/predict.md."""


def least_seconds(record: dict[str, Any]) -> dict[str, float]:
    """Compute the seconds that the arithmetic of a contender takes at the rates of the fastest matrix products.

    It is the work of two phases, the whole network being trained in the second: operations of the network's layers,
    without normalization, activations, optimizer, reading and imports. What Pylorus predicts for the report and the
    bundle is computed in fp32. A second run finds the features of the frozen network.
    """
    if "forward_operations_per_image" not in record:  # of earlier measurements
        return {}
    settings, forward = record["settings"], record["forward_operations_per_image"]
    images, epochs = settings["images"], settings["epochs"]
    full = record["peak_fp32"]
    fast = record["peak_bf16"] if settings["bf16"] else full
    frozen = (images["train"] + images["val"]) * forward / fast
    finetune = epochs * (images["train"] * record["operations_per_image"] + images["val"] * forward) / fast
    predictions = (images["val"] + images["test"]) * forward / full
    reference = (
        min(images["train"], REFERENCE_IMAGES, REFERENCE_IMAGES_PER_CLASS * settings["classes"]) * forward / full
    )
    return {
        "pylorus": frozen + finetune + 2 * predictions + reference,
        "pylorus_again": finetune + predictions + reference,
        "timm_best": epochs * frozen + finetune + images["test"] * forward / fast,
    }


def _arithmetic(record: dict[str, Any]) -> list[str]:
    """Return the table of the seconds that arithmetic alone takes, and the largest ratio that it allows."""
    done = [one for one in record["measurements"] if one["error"] is None]
    measured = {name: _values(done, name, whole) for name in least_seconds(record)}
    script = measured.get("timm_best")
    lines = []
    for name, seconds in least_seconds(record).items():
        if measured[name]:
            middle = median(measured[name].values())
            bound = f"{median(script.values()) / seconds:.2f}" if script and name != "timm_best" else "–"
            lines.append(f"| {name} | {seconds:.1f} | {middle:.1f} | {seconds / middle:.0%} | {bound} |")
    if not lines:
        return []
    return [
        "| whole process | arithmetic alone, s | measured, s | fraction | timm_best ÷ arithmetic alone |",
        "| --- | --: | --: | --: | --: |",
        *lines,
        "",
    ]


def _values(done: list[Measurement], name: str, value: Value) -> dict[int, float]:
    """Return the value of each round."""
    found = {one["repeat"]: value(one) for one in done if one["contender"] == name}
    return {turn: number for turn, number in found.items() if number is not None}


def _spread(values: list[float | None], form: str) -> str:
    found = sorted(value for value in values if value is not None)
    if not found:
        return "–"
    middle = format(median(found), form)
    return middle if len(found) == 1 else f"{middle} ({found[0]:{form}}–{found[-1]:{form}})"


def _share(one: Measurement) -> float | None:
    return one.get("share_of_peak")


def _with_share(record: dict[str, Any]) -> None:
    """Add the operations per second of fine-tuning, divided by the larger of the peaks measured before and after it."""
    for one in record["measurements"]:
        speed = one.get("images_per_second", {}).get("finetune")
        if speed and one.get("peaks_bf16"):
            one["share_of_peak"] = speed * record["operations_per_image"] / max(one["peaks_bf16"])


if __name__ == "__main__":
    file = Path(sys.argv[1])
    text = markdown(json.loads(file.read_text(encoding="utf-8")))
    file.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
