"""Kill runs at random moments, resume them, and compare the results with those of an uninterrupted run.

`python benchmarks/soak.py --kills 50` starts runs and sweeps of a tiny network on synthetic images, kills each process
group with SIGKILL, SIGTERM or SIGINT after a random time, resumes it until it is finished, and prints a table.
If weights, predictions or curves differ, the exit code is 1. The runs do not share a cache with the
uninterrupted one, so features are computed again, too.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]

WAYS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
"""Signals that end a run; SIGKILL half of the time, because it acts like a power failure."""
WORDS = [
    "data=synthetic", "data.drawn.images=12", "data.drawn.size=64", "data.image_size=32", "data.workers=0",
    "model=timm", "model.name=test_resnet.r160_in1k", "model.weights=none", "trainer=cpu", "trainer.threads=1",
    "augment=light", "stages.pretrain.epochs=20", "stages.finetune.epochs=60", "stages.finetune.learn=layer3",
    "stages.finetune.views=3",
]  # fmt: skip


@dataclass
class Tally:
    """Counts of kills, resumed and finished runs, and the differences that were found."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    finished: int = 0
    differences: list[str] = field(default_factory=list)


def start(words: Sequence[str], place: Path) -> subprocess.Popen[bytes]:
    """Start `python train.py WORDS` in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with (place / "soak.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words],
            cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def fingerprint(run: Path) -> dict[str, str]:
    """Hash each result of a run; files with times, paths or process numbers are not results."""
    weights = load_file(run / "model" / "model.safetensors")
    found = {"weights": hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()}
    for path in [*run.glob("*/metrics.csv"), *run.glob("*/stage.json"), run / "split.csv"]:
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in run.glob("*/predictions-*.parquet"):
        found[str(path.relative_to(run))] = hashlib.sha256(pd.read_parquet(path).to_csv().encode()).hexdigest()
    return found


def moment(run: Path) -> str:
    """Return the phase in which a run was killed."""
    if not (run / "split.csv").is_file():
        return "start, images"
    for stage in ("pretrain", "finetune"):
        place = run / stage
        if not (place / "stage.json").is_file():
            return f"{stage}, training" if (place / "metrics.csv").is_file() else f"{stage}, before its first epoch"
        if not (place / "predictions-test.parquet").is_file():
            return f"{stage}, predictions"
    return "bundle, report" if not (run / "report" / "report.html").is_file() else "end"


def pids(process: subprocess.Popen[bytes]) -> set[int]:
    """Return the numbers of the process and of all its descendants."""
    try:
        return {process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


def runs_of(folder: Path) -> Iterator[Path]:
    """Yield the folder of the run, or those of the jobs of a sweep."""
    yield from (
        [folder] if (folder / "status.json").is_file() else sorted(p.parent for p in folder.glob("*/status.json"))
    )


def soak(command: list[str], again: list[str], place: Path, folder: Path, longest: float, tally: Tally) -> None:
    """Start a command, kill it at random moments and resume it until it ends by itself."""
    process = start(command, place)
    while True:
        try:
            # Three of four kills are late; otherwise most would happen during imports.
            earliest = random.choice((0.5, 0.4 * longest, 0.5 * longest, 0.6 * longest))
            process.wait(timeout=random.uniform(earliest, longest))
        except subprocess.TimeoutExpired:
            way = random.choice(WAYS)
            states = {run: json.loads((run / "status.json").read_text()) for run in runs_of(folder)}
            alive = [run for run, said in states.items() if said["state"] == "running" and said["pid"] in pids(process)]
            tally.moments[moment(alive[0]) if alive else "start-up, or between the jobs of a sweep"] += 1
            os.killpg(process.pid, way)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                tally.differences.append(f"{folder.name}: did not end within 30 s of {way.name}")
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            tally.kills[way.name] += 1
        if process.returncode == 0:
            tally.finished += 1
            return
        if process.returncode not in (130, 143, -9, -15, -2, 1):
            tally.differences.append(f"{folder.name}: ended with exit code {process.returncode}")
        begun = any((run / "config.yaml").is_file() for run in runs_of(folder))
        tally.resumes += 1
        process = start(again if begun else command, place)


def compare(expected: dict[str, dict[str, str]], folder: Path, tally: Tally) -> None:
    """Record each result that differs from the uninterrupted run."""
    for run in runs_of(folder):
        found = fingerprint(run)
        wanted = expected[run.name if run != folder else "run"]
        tally.differences += [f"{folder.name}/{run.name}: {key}" for key in wanted if found.get(key) != wanted[key]]
        leftovers = [path.name for path in run.rglob(".*") if path.is_file()]
        tally.differences += [f"{folder.name}/{run.name}: left behind {name}" for name in leftovers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=30, help="minutes after which no new run is started")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments and signals")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "outputs" / "soak")
    options = parser.parse_args()
    random.seed(options.seed)
    work: Path = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began, tally = time.monotonic(), Tally()
    sweep = ["-m", *WORDS, "report=false", "seed=0,1"]
    seconds = {}
    for name, words in (
        ("run", [*WORDS, f"hydra.run.dir={work}/whole"]),
        ("sweep", [*sweep, f"hydra.sweep.dir={work}/wholes"]),
    ):
        start_time = time.monotonic()
        assert start([*words, f"cache.folder={work}/cache-{name}"], work).wait() == 0, f"see {work}/soak.log"
        seconds[name] = time.monotonic() - start_time
    expected = {"run": fingerprint(work / "whole")}
    expected |= {run.name: fingerprint(run) for run in runs_of(work / "wholes")}
    number = 0
    while tally.kills.total() < options.kills and time.monotonic() - began < 60 * options.minutes:
        number += 1
        folder, cache = work / f"soak-{number}", f"cache.folder={work}/cache-{number}"
        if number % 3:
            command = [*WORDS, cache, f"hydra.run.dir={folder}"]
            soak(command, [f"resume={folder}"], work, folder, seconds["run"], tally)
        else:
            command = [*sweep, cache, f"hydra.sweep.dir={folder}"]
            soak(command, command, work, folder, 0.7 * seconds["sweep"], tally)
        compare(expected, folder, tally)
        print(
            f"{number}: {tally.kills.total()} kills, {len(tally.differences)} differences", file=sys.stderr, flush=True
        )
    print(f"| event | count |\n| --- | --: |\n| runs and sweeps | {number} |")
    for way, count in sorted(tally.kills.items()):
        print(f"| ended by {way} | {count} |")
    print(f"| resumed | {tally.resumes} |\n| finished | {tally.finished} |")
    for when, count in sorted(tally.moments.items()):
        print(f"| ended during: {when} | {count} |")
    print(f"| differences | {len(tally.differences)} |")
    for difference in tally.differences:
        print(f"* {difference}")
    sys.exit(bool(tally.differences))


if __name__ == "__main__":
    main()
