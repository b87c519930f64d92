"""Run the speed benchmark: each contender does the same work; the results are a table, JSON and Markdown.

`make benchmark`, or `python benchmarks/run.py --help`.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import environment
import images
import table
from harness import watch
from job import Job, list_python_paths
from lineup import MODELS, OPTIONAL, WORKS, Contender, Known, contenders
from machine import cores

HERE = Path(__file__).parent
ROOT = HERE.parent


def main() -> None:
    options = _options()
    if not options.use_this_python:
        environment.enter()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    job = _job(options, folder)
    chosen = _chosen(options)
    record = _record(options, job)
    job = dataclasses.replace(job, bf16=record["peak_bf16"] > 1.3 * record["peak_fp32"])
    record["settings"]["bf16"] = job.bf16
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends the benchmark like Ctrl-C
    record["measurements"] = [_lacking(contender) for contender in chosen if contender.lacking]
    try:
        for repeat in range(options.repeats):
            for contender in (one for one in chosen if not one.lacking):
                one = _measure(contender, job, repeat, options.checkout.absolute(), folder)
                record["measurements"].append(one)
                _save(record, options)
                print(table.line(one), flush=True)
        record["finished"] = True
    except KeyboardInterrupt:
        print("\ninterrupted: the results of finished measurements are saved", file=sys.stderr)
    finally:
        for temporary in folder.glob("running-*"):
            shutil.rmtree(temporary, ignore_errors=True)
    _save(record, options)
    print("\n" + table.markdown(record))
    print(f"\nwritten: {options.output}.json and .md")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    names = list(dict.fromkeys(one.name for work in WORKS for one in contenders(5, work)))
    add = parser.add_argument
    add(
        "--work",
        default="standard",
        choices=WORKS,
        help="standard; overhead: a network that costs next to nothing; frames: large frames, first and second run. "
        "It sets --model, --images, --epochs, --weights and --size, unless they are given",
    )
    add("--model", default="resnet50", help=f"{', '.join(MODELS)}, or a timm name (then with --late)")
    add("--model-args", type=json.loads, default={}, help='arguments of timm.create_model: \'{"pad_type": "same"}\'')
    add(
        "--late",
        help="the block from which the network is trained in partial fine-tuning; default: by model, such as layer4",
    )
    add(
        "--weights",
        default="drawn",
        help="drawn (random, features of a realistic scale), none (random), hub, or a file",
    )
    add("--data", type=Path, help="your own images: DIR/{train,val,test}/CLASS, DIR/{train,test}/CLASS or DIR/CLASS")
    add("--group", help="regular expression that finds the patient in a path of --data")
    add("--images", type=int, default=480, help="number of synthetic images")
    add(
        "--drawn-size",
        type=int,
        default=320,
        help="side of the synthetic images in pixels; those of --work frames are always 1280 x 1024",
    )
    add("--size", type=int, help="side of the network's input in pixels; default: that of the model")
    add("--epochs", type=int, default=5, help="epochs of each of the two phases")
    add("--batch-size", type=int, default=16)
    add(
        "--repeats",
        type=int,
        default=3,
        help="rounds; each runs all contenders, so that changes of the machine's speed affect all alike",
    )
    add("--only", help=f"contenders to run, some of: {', '.join(names)}")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--workers", type=int, help="decoding processes of timm and Lightning; default: 2, on a GPU up to 8")
    add("--output", type=Path, help="path of the result files without suffix; default: in --folder")
    add("--folder", type=Path, default=HERE / "outputs", help="folder for images, weights and temporary files")
    add("--checkout", type=Path, default=ROOT, help="the clone of Pylorus to measure, for example an older version")
    add("--use-this-python", action="store_true", help="use the installed packages, install nothing")
    parser.set_defaults(**WORKS[parser.parse_args().work])
    options = parser.parse_args()
    stamp = datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S")
    kind = "" if options.work == "standard" else f"{options.work}-"
    options.output = options.output or options.folder / f"{stamp}-{kind}{options.model}"
    names = [contender.name for contender in contenders(5, options.work)]
    unknown = set((options.only or "").split(",")) - {"", *names}
    if unknown:
        parser.error(
            f"--only: found {', '.join(sorted(unknown))}, expected some of {', '.join(names)} for --work {options.work}"
        )
    if options.model not in MODELS and not options.late:
        parser.error(f"--late: {options.model} is not one of {', '.join(MODELS)}, so its late block must be named")
    return options


def _chosen(options: argparse.Namespace) -> list[Contender]:
    everyone = contenders(options.epochs, options.work)
    if options.only:
        names = options.only.split(",")
        names += [str(one.after) for one in everyone if one.name in names and one.after]
        return [contender for contender in everyone if contender.name in names]
    return [contender for contender in everyone if contender not in OPTIONAL]


def _job(options: argparse.Namespace, folder: Path) -> Job:
    known = MODELS.get(options.model, Known(options.model, 224, options.late))
    size = options.size or known.size
    if options.data:
        source = options.data.absolute()
        mark = hashlib.sha256(f"{source}\n{options.group}".encode()).hexdigest()[:8]
        data = images.arrange(source, folder / f"images-{source.name}-{mark}", group=options.group)
    elif options.work == "frames":
        data = images.draw_frames(folder / f"frames-{options.images}", images=options.images, processes=cores())
    else:
        data = images.draw(
            folder / f"images-{options.images}-{options.drawn_size}", images=options.images, size=options.drawn_size
        )
    weights = options.weights
    if weights == "drawn":
        file = folder / f"weights-{known.name}-{data.name}-{size}.safetensors"
        if not file.is_file():
            words = [known.name, str(file), "--data", str(data), "--size", str(size)]
            subprocess.run(
                [sys.executable, str(HERE / "weights.py"), *words, "--args", json.dumps(options.model_args)], check=True
            )
        weights = str(file)
    elif weights not in ("hub", "none"):
        weights = str(Path(weights).absolute())
    return Job(
        data=str(data),
        classes=len(images.classes(data)),
        model=known.name,
        model_args=options.model_args,
        weights=weights,
        size=size,
        late=options.late or known.late,
        group=options.group if options.data else images.PATIENT,
        epochs=options.epochs,
        work=options.work,
        batch_size=options.batch_size,
        device=options.device,
        workers=options.workers or (min(8, cores()) if options.device == "cuda" else 2),
    )


def _record(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Return the settings and the description of the machine, without any path of it."""
    words = ["--device", job.device, "--model", job.model, "--size", str(job.size), "--classes", str(job.classes)]
    found = _machine([*words, "--args", json.dumps(job.model_args)])
    settings = dataclasses.asdict(job)
    for private in ("data", "folder", "cache", "options"):
        del settings[private]
    settings["weights"] = options.weights if options.weights in ("drawn", "none", "hub") else Path(options.weights).name
    settings["images"] = images.counts(Path(job.data))
    settings["drawn"] = options.data is None
    commit = subprocess.run(
        ["git", "-C", str(options.checkout), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        **found,
        "settings": settings,
        "contenders": {contender.name: contender.what for contender in contenders(options.epochs, options.work)},
        "finished": False,
        "measurements": [],
    }


def _machine(words: list[str]) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "machine.py"), *words]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _peak(job: Job) -> list[float]:
    return [_machine(["--device", job.device, "--peak-only"])["peak_bf16"]]


def _lacking(contender: Contender) -> dict[str, Any]:
    return {"contender": contender.name, "repeat": 0, "error": f"not installed: {', '.join(contender.lacking)}"}


def _measure(contender: Contender, job: Job, repeat: int, checkout: Path, work: Path) -> dict[str, Any]:
    """Run one contender once and return its measurement, or its error if it fails."""
    one: dict[str, Any] = {"contender": contender.name, "repeat": repeat, "error": None}
    folder = work / f"running-{contender.name}"
    cache = work / f"running-cache-{contender.after or contender.name}"
    if contender.after is None:
        shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    # The peak changes with the load of the machine, so it is measured immediately before and after.
    peaks = _peak(job) if contender.name == "pylorus" and job.work == "standard" and job.bf16 else []
    job = dataclasses.replace(job, folder=str(folder), cache=str(cache), options=contender.options)
    found = {"PYTHONPATH": list_python_paths(checkout)}
    seen = watch(contender.command(job, checkout), folder=folder, environment=found, device=job.device)
    one |= {"seconds": seen.seconds, "cpu_seconds": seen.cpu_seconds, "memory_mib": seen.memory_mib}
    if peaks:
        one["peaks_bf16"] = [*peaks, *_peak(job)]
    if job.device == "cuda":
        one |= {"gpu_memory_mib": seen.gpu_memory_mib, "gpu_share": seen.gpu_share}
    try:
        if seen.code != 0:
            raise RuntimeError(seen.last_error)
        answer = dataclasses.asdict(contender.read(job, seen.output))
        one |= {"gpu_allocated_mib": answer.pop("memory_mib"), **answer}
        # Pylorus resets the peak of the process at each stage, so the process reports only that of the last stage.
        one["memory_mib"] = max(one["memory_mib"], *answer["phase_memory_mib"].values(), 0.0)
    except (RuntimeError, OSError, KeyError, ValueError, ImportError) as error:
        shutil.copyfile(folder / "output.txt", work / f"failed-{contender.name}.txt")
        one["error"] = str(error).replace(str(ROOT), ".").replace(str(work), "WORK")
    shutil.rmtree(folder, ignore_errors=True)
    return one


def _save(record: dict[str, Any], options: argparse.Namespace) -> None:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", table.markdown(record) + "\n")):
        temporary = options.output.with_name(options.output.name + suffix + ".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(options.output.with_name(options.output.name + suffix))


if __name__ == "__main__":
    main()
