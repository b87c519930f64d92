"""Check and measure Pylorus on a GPU: `benchmarks/gpu.sh`.

Steps, in this order; each that has no time left is skipped, and one that fails does not end the others:

| step | what |
| --- | --- |
| machine | versions, card, cores |
| augmentation | images of light and endoscopy by torch on the device against those by OpenCV, and the time of each |
| small | 480 frames of 320 pixels, ResNet50, 5 + 5 epochs, batches of 16: whole process, against the timm script |
| frames | 6,000 frames of 1280 × 1024, 10 + 10 epochs, batches of 64, augment=light: the same, and a second run |
| reading | the first pass over the frames alone, by all cores, against decoding them by OpenCV and nothing else |
| graphs | trainer.cuda_graphs=false on the small set and on the frames, against the runs of the steps before |
| checks | one seed twice, a run that is interrupted and resumed, and the tests with the GPU: all at once |
| batch_size | trainer.batch_size=auto on the small set, against a run with a number |
| compile | trainer.compile=true on the small set |

On the frames the script trains 2 + 2 epochs; its further epochs are counted as taking as long as these.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT / "src")]

import images  # noqa: E402
from contenders import pylorus_run  # noqa: E402
from job import SAYS, Job  # noqa: E402

SMALL_ROUNDS = 3
"""Times that the 480 images are trained on, by the script and by Pylorus in turn."""
SCRIPT_EPOCHS = 2
"""Epochs of each phase that the timm script trains on the frames: ten would take half of the time for all steps."""
STEPS = ("machine", "augmentation", "small", "frames", "reading", "graphs", "checks", "batch_size", "compile")


class Report:
    """The rows of the table; written to its file after each, so that an interruption leaves what is finished."""

    def __init__(self, file: Path) -> None:
        self._file, self._rows = file, list[tuple[str, str]]()

    def add(self, name: str, result: str) -> None:
        print(f"{name:<34} {result}", flush=True)
        self._rows.append((name, result))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = ["| what | result |", "| --- | --- |", *(f"| {name} | {result} |" for name, result in self._rows)]
        self._file.write_text("\n".join(lines) + "\n", encoding="utf-8")


class UtilizationSampler:
    """Samples how busy the GPU is, with the time of each sample."""

    def __init__(self, device: str) -> None:
        self._samples: list[tuple[float, float]] = []
        self._process: subprocess.Popen[str] | None = None
        if device == "cuda":
            query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
            with suppress(FileNotFoundError):
                self._process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
                threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):
                self._samples.append((time.time(), float(line)))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def format_share(self, windows: list[tuple[float, float]]) -> str:
        """Return the mean utilization within windows of time, in percent."""
        values = [value for at, value in self._samples if any(start <= at <= end for start, end in windows)]
        return f"{mean(values):.0f} %" if values else "not measured"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all steps share."""

    device: str
    tiny: bool
    work: Path
    end: float
    """Time of `time.monotonic` at which all must be finished."""

    @property
    def remaining(self) -> float:
        return self.end - time.monotonic()

    def run(self, command: list[str], *, log: str) -> float:
        """Run a command to its end, and return its seconds.

        Raises:
            RuntimeError: If it fails, or if no time is left; the last lines of its output are in the message.
        """
        if self.remaining < 5:
            raise RuntimeError("skipped: no time left")
        file, start = self.work / f"{log}.log", time.monotonic()
        with file.open("wb") as stream:
            child = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = child.wait(timeout=self.remaining)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                raise RuntimeError(f"stopped after {time.monotonic() - start:.0f} s: no time left") from None
        if code:
            lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
            raise RuntimeError(f"failed with exit code {code}: {' / '.join(lines[-3:])[:400]}")
        return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a few small images and one epoch, to try the script")
    parser.add_argument("--only", default=",".join(STEPS), help="some of the steps")
    parser.add_argument("--seconds", type=float, default=530, help="time for everything")
    parser.add_argument("--work", type=Path, default=HERE / "outputs" / "gpu", help="images, weights, runs; emptied")
    parser.add_argument("--output", type=Path, default=HERE / "outputs" / "gpu.md")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if set(chosen) - set(STEPS):
        parser.error(f"--only: found {options.only}, expected some of {', '.join(STEPS)}")
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    setup = Setup(options.device, options.tiny, options.work.absolute(), time.monotonic() + options.seconds)
    report = Report(options.output)
    functions: dict[str, Callable[[Setup, Report], None]] = {
        "machine": describe_machine,
        "augmentation": compare_augmentation,
        "small": measure_small_set,
        "frames": measure_frames,
        "checks": run_checks,
        "batch_size": measure_batch_size,
        "reading": measure_reading,
        "graphs": measure_graphs,
        "compile": measure_compile,
    }
    for name in STEPS:
        if name in chosen:
            start = time.monotonic()
            with report_failure(report, name):
                functions[name](setup, report)
            print(f"  ({name}: {time.monotonic() - start:.0f} s)", flush=True)
    print(f"\nwritten: {options.output}")


@contextmanager
def report_failure(report: Report, name: str) -> Iterator[None]:
    """Report an error of a step as its result, so that the other steps are run."""
    try:
        yield
    except Exception as error:  # whatever it is, it is the result of this step
        report.add(name, f"{type(error).__name__}: {error}".replace(str(ROOT), ".").replace("|", "/")[:500])


def describe_machine(setup: Setup, report: Report) -> None:
    import cv2
    import pytorch_lightning
    import timm
    import torch

    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    report.add("commit", commit.stdout.strip() or "unknown")
    versions = {"torch": torch, "timm": timm, "pytorch-lightning": pytorch_lightning, "OpenCV": cv2}
    names = [f"{name} {module.__version__}" for name, module in versions.items()]
    report.add("versions", f"Python {sys.version.split()[0]}, {', '.join(names)}")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    report.add("machine", f"{card}, {len(os.sched_getaffinity(0))} cores")
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU: everything below fails; try --device cpu --tiny")


def compare_augmentation(setup: Setup, report: Report) -> None:
    import cv2
    import numpy as np
    import torch

    from pylorus.data.augmentation import build_augmentation, load_policy
    from pylorus.data.device_augmentation import DeviceAugmentation, find_obstacle

    count, size = (8, 96) if setup.tiny else (64, 224)
    rng = np.random.default_rng(0)
    frames = np.stack(
        [cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (size, size), interpolation=2) for _ in range(count)]
    )
    frames = (frames.astype(int) + rng.integers(-6, 7, frames.shape)).clip(0, 255).astype(np.uint8)
    on_device = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(setup.device)
    for name in ("light", "endoscopy"):
        augment = build_augmentation(load_policy(name))
        assert augment is not None
        obstacle = find_obstacle(augment)
        if obstacle is not None:
            report.add(f"augment={name}", f"on the CPU only: {obstacle}")
            continue
        augment_batch = DeviceAugmentation(augment)
        augment_batch(on_device, list(range(count)))  # warms up
        differences, cpu_seconds, device_seconds = [], 0.0, 0.0
        for first in range(0, 1000, 100):
            seeds = [first + number for number in range(count)]
            start = time.perf_counter()
            expected = np.stack([augment(frame, seed) for frame, seed in zip(frames, seeds, strict=True)])
            cpu_seconds += time.perf_counter() - start
            start = time.perf_counter()
            augmented = augment_batch(on_device, seeds)
            if setup.device == "cuda":
                torch.cuda.synchronize()
            device_seconds += time.perf_counter() - start
            differences.append(np.abs(augmented.permute(0, 2, 3, 1).cpu().numpy().astype(int) - expected))
        values = np.stack(differences)
        report.add(
            f"augment={name}, {setup.device} against OpenCV",
            f"{int((values > 0).sum()):,} of {values.size:,} values differ, by at most {values.max()} of 255; "
            f"{1e3 * device_seconds / count / 10:.3f} ms an image in batches of {count}, OpenCV on one core "
            f"{1e3 * cpu_seconds / count / 10:.3f} ms",
        )


def build_job(setup: Setup, data: Path, *, epochs: int, batch_size: int, **options: Any) -> Job:
    """Build the job of ResNet50 on a folder of frames; its weights are drawn once."""
    model, size = ("test_resnet.r160_in1k", 64) if setup.tiny else ("resnet50.tv_in1k", 224)
    weights = setup.work / "weights.safetensors"
    if not weights.is_file():
        words = [model, str(weights), "--data", str(data), "--size", str(size)]
        setup.run([sys.executable, str(HERE / "weights.py"), *words], log="weights")
    return Job(
        data=str(data),
        classes=3,
        model=model,
        model_args={},
        weights=str(weights),
        size=size,
        late="layer4",
        group=r"patient_\d+",
        epochs=1 if setup.tiny else epochs,
        batch_size=4 if setup.tiny else batch_size,
        device=setup.device,
        workers=min(8, len(os.sched_getaffinity(0))),
        options={"stages": "both", **options},
    )


def run_pylorus(setup: Setup, job: Job, name: str, *words: str, augment: str = "none") -> tuple[float, str]:
    """Run Pylorus on a job; return its seconds, and its stages with the share of time in which the GPU is busy."""
    folder = setup.work / name
    job = dataclasses.replace(job, folder=str(folder))
    command = [word.replace("augment=none", f"augment={augment}") for word in pylorus_run.command(job, ROOT)]
    sampler = UtilizationSampler(setup.device)
    try:
        seconds = setup.run([*command, *words], log=name)
    finally:
        sampler.stop()
    answer = pylorus_run.read(job)
    speeds = {stage: round(speed) for stage, speed in answer.images_per_second.items() if speed}
    windows = []
    for stage in pylorus_run.stages(job):
        speed = json.loads((folder / "run" / stage / "speed.json").read_text(encoding="utf-8"))
        end = (folder / "run" / stage / "stage.json").stat().st_mtime
        windows.append((end - speed["fit_seconds"], end))
    phases = ", ".join(f"{part} {value:.1f} s" for part, value in answer.timeline.items() if value >= 0.05)
    busy = sampler.format_share(windows)
    return seconds, f"{phases}; {speeds} images/s; GPU busy while training: {busy}; accuracy {answer.accuracy:.2f}"


def run_script(setup: Setup, job: Job, name: str, script: str = "timm_style.py") -> tuple[float, dict[str, Any]]:
    """Run a script of contenders/ with its best flags on a job; return its seconds, and what it reports."""
    file = setup.work / f"{name}.json"
    folder = setup.work / f"{name}-files"
    folder.mkdir()
    dataclasses.replace(job, folder=str(folder), options={"best": True}).write(file)
    seconds = setup.run([sys.executable, str(HERE / "contenders" / script), str(file)], log=name)
    output = (setup.work / f"{name}.log").read_text(errors="replace").splitlines()
    (line,) = [line for line in output if line.startswith(SAYS)]
    return seconds, json.loads(line.removeprefix(SAYS))


def count_small_set(setup: Setup) -> int:
    return 48 if setup.tiny else 480


def draw_small_set(setup: Setup) -> Path:
    return images.draw(setup.work / "small", images=count_small_set(setup), size=80 if setup.tiny else 320)


def measure_small_set(setup: Setup, report: Report) -> None:
    job = build_job(setup, draw_small_set(setup), epochs=5, batch_size=16)
    rounds = 1 if setup.tiny else SMALL_ROUNDS
    scripts, runs = [], []
    for number in range(rounds):  # in turn, since a first run reads libraries from the disk for all
        script, answer = run_script(setup, job, f"small-script-{number}")
        phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in answer["phases"].items())
        report.add(f"{count_small_set(setup)} images, timm script", f"{script:.1f} s; {phases}")
        own, own_phases = run_pylorus(setup, job, f"small-pylorus-{number}")
        report.add(f"{count_small_set(setup)} images, Pylorus", f"{own:.1f} s; {own_phases}")
        scripts.append(script)
        runs.append(own)
    ratios = ", ".join(f"{script / own:.2f}" for script, own in zip(scripts, runs, strict=True))
    report.add(
        f"{count_small_set(setup)} images, ratio of medians",
        f"{median(scripts) / median(runs):.2f} (at least 1.0); of the rounds {ratios}",
    )


def measure_frames(setup: Setup, report: Report) -> None:
    count = 60 if setup.tiny else 6000
    start = time.monotonic()
    data = draw_frames(setup.work / "frames", count, width=320 if setup.tiny else 1280)
    print(f"  ({count} frames drawn in {time.monotonic() - start:.0f} s)", flush=True)
    job = build_job(setup, data, epochs=10, batch_size=64)
    own, phases = run_pylorus(setup, job, "frames-pylorus", augment="light")
    report.add(f"{count:,} frames, Pylorus, augment=light", f"{own:.1f} s; {phases}")
    again, phases = run_pylorus_again(setup, job, "frames-again")
    report.add(f"{count:,} frames, Pylorus again", f"{again:.1f} s; {phases}")
    epochs = min(SCRIPT_EPOCHS, job.epochs)
    seconds, answer = run_script(setup, dataclasses.replace(job, epochs=epochs), "frames-script")
    by_epoch = sum(answer["phases"].values()) / epochs
    script = seconds + by_epoch * (job.epochs - epochs)
    report.add(
        f"{count:,} frames, timm script, no augment",
        f"{script:.1f} s: {seconds:.1f} s for {epochs} + {epochs} epochs, {by_epoch:.1f} s for each further pair",
    )
    report.add(f"{count:,} frames, ratio", f"{script / own:.2f} (at least 3)")
    report.add(f"{count:,} frames, ratio of the second run", f"{script / again:.2f}")


def measure_reading(setup: Setup, report: Report) -> None:
    data = setup.work / "frames"
    if not data.is_dir():
        raise RuntimeError("skipped: it needs the images of step frames")
    job = build_job(setup, data, epochs=1, batch_size=64)
    job = dataclasses.replace(job, cache=str(setup.work / "reading-cache"))
    seconds = {}
    for name, script in (("OpenCV's decoder", "opencv_decode.py"), ("first pass", "pylorus_pass.py")):
        _, answer = run_script(setup, job, f"reading-{script.partition('_')[0]}", script)
        (seconds[name],) = answer["phases"].values()
        report.add(f"frames, {name}", f"{seconds[name]:.1f} s; {answer['note']}")
    ratio = seconds["OpenCV's decoder"] / seconds["first pass"]
    report.add("frames, ratio of the first pass", f"{ratio:.2f} (on two cores at least 0.75)")


def run_pylorus_again(setup: Setup, job: Job, name: str, *words: str) -> tuple[float, str]:
    """Run Pylorus on the frames once more, with the cache of the first run: the files are known."""
    command_words = [f"cache.folder={setup.work}/frames-pylorus/cache", *words]
    return run_pylorus(setup, job, name, *command_words, augment="light")


def draw_frames(folder: Path, count: int, *, width: int) -> Path:
    """Draw frames as JPEG files of about 200 kB, {train,val,test}/CLASS, two of each patient, in all processes."""
    numbers = range(count)
    for part in images.PARTS:
        for label in "abc":
            (folder / part / label).mkdir(parents=True)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # torch has threads by now
        list(pool.map(draw_frame, numbers, [folder] * count, [count] * count, [width] * count, chunksize=20))
    return folder


def draw_frame(number: int, folder: Path, count: int, width: int) -> None:
    import cv2
    import numpy as np

    cv2.setNumThreads(1)
    rng = np.random.default_rng(number)
    height, patient, label = width * 4 // 5, number // 6, number % 3
    coarse = rng.integers(40, 220, (9, 9, 3), np.uint8)
    coarse[..., label] = coarse[..., label] // 4 * 3 + 60  # something to learn
    frame = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    texture = rng.normal(0, 6, (height // 4 + 1, width // 4 + 1)).astype(np.float32)
    frame += texture.repeat(4, 0).repeat(4, 1)[:height, :width, None]
    y, x = np.ogrid[:height, :width]
    frame *= ((x - width / 2) ** 2 + (y - height / 2) ** 2 < (0.52 * height) ** 2)[..., None]
    share = 6 * patient / count
    part = "train" if share < 0.7 else "val" if share < 0.85 else "test"
    path = folder / part / "abc"[label] / f"patient_{patient * 3 + label:05d}_{number}.jpg"
    cv2.imwrite(str(path), frame.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])


def run_checks(setup: Setup, report: Report) -> None:
    data = draw_small_set(setup)
    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(function, setup, report, data) for function in (check_repeats, run_tests)]:
            task.result()


def list_check_words(setup: Setup, data: Path, name: str) -> list[str]:
    """List the words of a short run whose weights are compared: ResNet18, augmented, in 32 bits."""
    model = "test_resnet.r160_in1k" if setup.tiny else "resnet18"
    return [
        "data=folders", f"data.root={data}", "data.image_size=96", "model=timm", f"model.name={model}",
        "model.weights=none", "stage=finetune", "stages.finetune.epochs=4", "augment=endoscopy", "report=false",
        f"trainer.accelerator={'gpu' if setup.device == 'cuda' else 'cpu'}", "trainer.precision=32",
        "trainer.progress=false", f"cache.folder={setup.work}/checks-cache", "cache.on_device=true",
        f"hydra.run.dir={setup.work}/{name}",
    ]  # fmt: skip


def check_repeats(setup: Setup, report: Report, data: Path) -> None:
    with report_failure(report, "one seed twice"):
        for name in ("check-first", "check-second"):
            setup.run([sys.executable, "train.py", *list_check_words(setup, data, name)], log=name)
        report.add("one seed twice, 32 bits", compare_weights(setup, "check-first", "check-second"))
    with report_failure(report, "interrupted and resumed"):
        interrupt_run(setup, [sys.executable, "train.py", *list_check_words(setup, data, "check-resumed")])
        setup.run([sys.executable, "train.py", f"resume={setup.work}/check-resumed"], log="check-resumed-2")
        report.add("interrupted and resumed, 32 bits", compare_weights(setup, "check-first", "check-resumed"))


def interrupt_run(setup: Setup, command: list[str]) -> None:
    """Start a run, and interrupt it by SIGTERM after its first epoch."""
    file = setup.work / "check-resumed.log"
    with file.open("wb") as stream:
        child = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    while child.poll() is None and "finetune epoch 1/" not in file.read_text(errors="replace"):
        if setup.remaining < 5:
            child.kill()
            raise RuntimeError("skipped: no time left")
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    if child.wait(60) == 0:
        raise RuntimeError("the run finished before it was interrupted")


def compare_weights(setup: Setup, first: str, second: str) -> str:
    from safetensors.torch import load_file

    one, other = (load_file(setup.work / name / "model" / "model.safetensors") for name in (first, second))
    largest = max((float((one[key].double() - other[key].double()).abs().max()) for key in one), default=0.0)
    return "the same weights, bit for bit" if largest == 0 else f"weights differ by at most {largest:.2g}"


def run_tests(setup: Setup, report: Report, data: Path) -> None:
    """Run the tests of what differs on a GPU, which use it where there is one, and the fast ones of the network."""
    files = ["data/test_device_augmentation.py", "data/test_device_images.py", "test_hardware.py"]
    runs = {"tests of the device": ("fast or slow", [*files, "training/test_synchronization.py"])}
    if not setup.tiny:
        runs["fast tests of the network"] = ("fast", ["model", "test_hardware.py"])
    for name, (kinds, paths) in runs.items():
        with report_failure(report, name):
            words = ["-m", kinds, "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
            log = name.replace(" ", "-")
            setup.run([sys.executable, "-m", "pytest", *words, *(f"tests/{path}" for path in paths)], log=log)
            report.add(name, (setup.work / f"{log}.log").read_text().splitlines()[-1].strip("= "))


def measure_variant(setup: Setup, report: Report, name: str, *words: str) -> None:
    job = build_job(setup, draw_small_set(setup), epochs=5, batch_size=16)
    seconds, phases = run_pylorus(setup, job, f"variant-{name}", *words)
    report.add(f"{count_small_set(setup)} images, {' '.join(words)}", f"{seconds:.1f} s; {phases}")


def measure_batch_size(setup: Setup, report: Report) -> None:
    job = build_job(setup, draw_small_set(setup), epochs=5, batch_size=16)
    folder = setup.work / "variant-batch_size"
    command = pylorus_run.command(dataclasses.replace(job, folder=str(folder)), ROOT)
    words = ["trainer.batch_size=auto" if word.startswith("trainer.batch_size=") else word for word in command]
    report.add(
        f"{count_small_set(setup)} images, trainer.batch_size=auto",
        f"{setup.run(words, log='variant-batch_size'):.1f} s",
    )


def measure_graphs(setup: Setup, report: Report) -> None:
    word = "trainer.cuda_graphs=false"
    measure_variant(setup, report, "graphs", word)
    if (setup.work / "frames").is_dir():
        job = build_job(setup, setup.work / "frames", epochs=10, batch_size=64)
        seconds, phases = run_pylorus_again(setup, job, "frames-graphs", word)
        report.add(f"frames again, {word}", f"{seconds:.1f} s; {phases}")


def measure_compile(setup: Setup, report: Report) -> None:
    measure_variant(setup, report, "compile", f"trainer.compile={'false' if setup.tiny else 'true'}")


if __name__ == "__main__":
    main()
