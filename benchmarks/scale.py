"""Measure time and memory for image sets of a thousand to a million images, without reading their files.

`python benchmarks/scale.py` simulates the facts about the files (no file is written), passes them through catalog,
search for copies, split, the set-up of an epoch and the tables of a report, and prints time, peak memory and the growth
of time for ten times as many images. Each size runs in a separate process. The time to read an image is measured on
`--files` synthetic files.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import environment
from made_up import CLASSES, made_up, saved_run

SIZES = (1_000, 10_000, 100_000, 1_000_000)
MOST_GIB = 4.0


class Measures:
    """Seconds and peak memory of each step, in the order of the steps."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
        start = perf_counter()
        yield
        self.found[name] = (perf_counter() - start, peak_gib())
        print(f"  {name}: {self.found[name][0]:.1f} s, {self.found[name][1]:.2f} GiB", file=sys.stderr, flush=True)


def peak_gib() -> float:
    """Return the peak resident memory in GiB since the step began, or of the process if the system lacks that."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def measure(count: int) -> dict[str, tuple[float, float]]:
    """Measure all steps for one size."""
    import numpy as np

    from pylorus.config.schema import AugmentConfig, CacheConfig, DataConfig
    from pylorus.data import catalog as catalog_module
    from pylorus.data.audit_findings import Thresholds
    from pylorus.data.catalog import build_catalog
    from pylorus.data.datamodule import ImageDataModule
    from pylorus.data.image_facts import load_or_compute_facts
    from pylorus.data.input_format import InputFormat
    from pylorus.data.leakage import find_copies
    from pylorus.data.prepare import list_catalog_files
    from pylorus.data.split import split_catalog, write_split

    measures = Measures()
    rows, facts = made_up(count)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        places = {digest: place for place, digest in enumerate(facts.get_column("sha256"))}
        with measures.step("write facts"):
            keep(folder / "facts", facts)
        del facts
        with measures.step("read facts"):
            facts = find(folder / "facts", places)
        del places
        catalog_module.load_or_compute_facts = lambda *_, known=facts, **__: known  # as if the files had been read
        with measures.step("catalog"):
            catalog = build_catalog(
                rows,
                folder,
                CLASSES,
                short_names=["GC", "GU", "CG"],
                grouped=True,
                reading=catalog_module.DEFAULT_READ_OPTIONS,
            )
        del rows
        with measures.step("copies"):
            copies = find_copies(catalog.facts, Thresholds())
        with measures.step("split by patient"):
            found = split_catalog(catalog, DataConfig(), copies=copies)
        alone = catalog.table.assign(group=catalog.table["path"])
        ungrouped = dataclasses.replace(catalog, grouped=False, table=alone)
        with measures.step("split, each image its own group"):
            split_catalog(ungrouped, DataConfig(), copies=copies)
        del ungrouped, alone
        with measures.step("audit's findings"):
            audited(list_catalog_files(catalog, found), catalog.facts, copies)
        with measures.step("split.csv"):
            write_split(found.table, catalog.classes, folder / "split.csv")
        table = found.table
        del catalog, facts, found, copies
        catalog_module.load_or_compute_facts = load_or_compute_facts
        with measures.step("epoch set-up"):
            served = ImageDataModule.from_table(
                table, folder, InputFormat(224, "pad", "bilinear"), batch_size=64, workers=0,
                policy=AugmentConfig(), seed=0, cache=CacheConfig(images=False),
            )  # fmt: skip
            for part in ("train", "val", "test"):
                served.get_dataset(part)
                assert sum(len(batch) for batch in served.build_batches(part)) == len(served.parts[part])
        rng = np.random.default_rng(1)
        with measures.step("predictions written"):
            saved_run(folder, table, rng)
        del table, served
        with measures.step("report's tables"):
            report_tables(folder)
    return measures.found


def keep(folder: Path, facts: Any) -> None:
    """The store's part of a first pass over the files."""
    from pylorus.data.fact_store import FactStore

    store = FactStore(folder, version="1")
    for start in range(0, len(facts), 1024):
        store.add(facts[start : start + 1024])
    store.close()


def find(folder: Path, places: dict[str, int]) -> Any:
    """The store's part of a second pass: the table of facts."""
    from pylorus.data.fact_store import Facts, FactStore, FactTable

    store = FactStore(folder, version="1")
    assert len(store.read_digests()) == len(places)
    facts = FactTable(len(places))
    for row in store.iter_facts(places):
        facts.put(places[row["sha256"]], Facts(**row))
    return facts


def audited(images: Any, facts: Any, copies: Any) -> None:
    """Compute the findings of an audit; the copies were searched before."""
    from pylorus.data import audit
    from pylorus.data.audit_findings import Thresholds

    audit.convert_audit_to_json(audit.audit(images, facts, Thresholds(), copies=copies), names=True)


def report_tables(folder: Path) -> None:
    """Build tables and sentences of a report, without figures."""
    from pylorus.report.evidence import collect_evidence
    from pylorus.report.page import build_sections
    from pylorus.report.results import ReportOptions

    assert build_sections(collect_evidence([folder], ReportOptions()))


def cost_of_files(count: int) -> list[str]:
    """Return sentences with the time to read a synthetic file, the first and the second time."""
    from pylorus.data.image_facts import load_or_compute_facts
    from pylorus.data.synthetic import generate_image_set

    said = []
    with tempfile.TemporaryDirectory() as place:
        for part in (count // 10, count):
            root, store = Path(place) / f"images-{part}", Path(place) / f"facts-{part}"
            generate_image_set(root, images=part // 3, size=512, seed=0)
            paths = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.*"))]
            seconds = []
            for _ in range(2):
                start = perf_counter()
                load_or_compute_facts(root, paths, store=store)
                seconds.append(1000 * (perf_counter() - start) / len(paths))
            said.append(
                f"{len(paths)} synthetic files of 512 × 512 pixels: {seconds[0]:.2f} ms per image the first time, "
                f"{seconds[1]:.2f} ms the second time."
            )
    return said


def page(found: dict[int, dict[str, tuple[float, float]]], said: list[str]) -> str:
    """Render the page in Markdown: seconds and GiB of each step by size, and the growth to the largest size."""
    sizes = sorted(found)
    head = " | ".join(f"{size:,}" for size in sizes)
    lines = [
        f"# An image set of up to {sizes[-1]:,} images",
        "",
        f"Seconds (peak memory of the process in GiB) on {os.cpu_count()} cores. Growth is the ratio of the seconds of",
        "the two largest sizes: 10 is linear. Each size ran in a separate process, which uses 0.9 GiB from the start.",
        "",
        f"| step | {head} | growth |",
        f"| --- |{' --: |' * (len(sizes) + 1)}",
    ]
    for step in found[sizes[0]]:
        cells = [f"{found[size][step][0]:.2f} ({found[size][step][1]:.2f})" for size in sizes]
        growth = found[sizes[-1]][step][0] / found[sizes[-2]][step][0] if len(sizes) > 1 else float("nan")
        lines.append(f"| {step} | {' | '.join(cells)} | {growth:.1f} |")
    most = max(memory for _, memory in found[sizes[-1]].values())
    verdict = "under" if most < MOST_GIB else "NOT under"
    lines += ["", f"Peak memory at {sizes[-1]:,} images: {most:.2f} GiB, {verdict} {MOST_GIB:g} GiB.", "", *said, ""]
    return "\n".join(lines)


def apart(size: int) -> dict[str, tuple[float, float]]:
    """Measure one size in a separate process."""
    print(f"{size:,} images", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--use-this-python", "--one", str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {name: tuple(values) for name, values in json.loads(done.stdout).items()}


def main(run: Callable[[int], dict[str, tuple[float, float]]] = apart) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))), default=SIZES)
    parser.add_argument("--files", type=int, default=900, help="number of synthetic files that are read")
    parser.add_argument("--output", type=Path, default=None, help="file for the page; default: outputs/<date>-scale.md")
    parser.add_argument("--one", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--use-this-python", action="store_true")
    options = parser.parse_args()
    if not options.use_this_python:
        environment.enter()
    if options.one is not None:
        print(json.dumps(measure(options.one)))
        return
    said = cost_of_files(options.files)
    text = page({size: run(size) for size in options.sizes}, said)
    output = options.output or Path(__file__).parent / "outputs" / f"{date.today()}-scale.md"
    output.parent.mkdir(exist_ok=True)
    output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
