"""The doctor's checks: cores, precision, GPUs, memory, disks and the clock; images, weights, a bundle and fonts.

torch, timm and what reads images are imported only where they are needed: memory and disk are checked in a process
without them, and fonts and images are checked where torch does not load.
"""

import os
import re
import secrets
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

from pylorus.config.schema import PACKAGE, CacheConfig
from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.core.formatting import format_bytes, format_count
from pylorus.core.io import write_atomically
from pylorus.doctor.packages import Check, State, format_first_line

COMPUTING = "Computing"
DRIVER = Path("/proc/driver/nvidia/version")
MIN_GPU_MEMORY = 4 * 2**30
"""Bytes of free GPU memory; with less, the study's models may not fit at their batch size."""


def check_computing() -> Iterator[Check]:
    """Check the cores, the CPU precision and each GPU."""
    import torch

    from pylorus.hardware import count_usable_cores

    cores = count_usable_cores()
    yield check_cores(cores, os.cpu_count() or cores)
    torch.set_num_threads(cores)
    yield Check(COMPUTING, "CPU precision", State.GOOD, _format_precision("cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    if has_cuda:
        for index in range(torch.cuda.device_count()):
            yield check_gpu(index)
    elif torch.backends.mps.is_available():
        yield Check(COMPUTING, "GPU", State.GOOD, f"Apple GPU (Metal); {_format_precision('mps')}")
    else:
        yield check_no_gpu(read_driver_version(), [str(warning.message) for warning in caught])


def check_cores(usable: int, counted: int) -> Check:
    """Check how many CPU cores a run can use.

    Args:
        usable: Cores that this process may use; also the number of threads of a run.
        counted: Cores that the operating system reports.
    """
    summary = f"{usable} of {counted} usable; a run uses {format_count(usable, 'thread')}"
    if usable > 1:
        return Check(COMPUTING, "cores", State.GOOD, summary)
    fix = "Give the container, job or virtual machine more cores (docker --cpus, SLURM --cpus-per-task)."
    return Check(COMPUTING, "cores", State.WARNING, f"{summary}: training will be slow", fix)


def _format_precision(accelerator: str) -> str:
    from pylorus.hardware import resolve_precision

    folder = Path(CacheConfig().folder)  # where runs save what they measured
    precision, reason = resolve_precision(accelerator, folder if folder.is_dir() else None)
    return f"{precision if precision == 'bf16' else f'fp{precision}'} ({reason})"


def check_gpu(index: int) -> Check:
    """Check one GPU: multiply two matrices on it and verify the result."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    name = "GPU" if torch.cuda.device_count() == 1 else f"GPU {index}"
    gpu = f"{properties.name}, compute capability {properties.major}.{properties.minor}, driver {read_driver_version()}"
    fix = (
        "Install the PyTorch build for this GPU and driver (pytorch.org, Get Started), or train on the CPU: trainer=cpu"
    )
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        is_correct = bool((ones @ ones == 64).all())
    except RuntimeError as error:
        return Check(COMPUTING, name, State.WRONG, f"{gpu}: a test computation failed: {format_first_line(error)}", fix)
    if not is_correct:
        return Check(COMPUTING, name, State.WRONG, f"{gpu}: a test computation gave a wrong result", fix)
    memory = f"{format_bytes(free)} free of {format_bytes(total)}"
    summary = (
        f"{gpu}, {memory}; {_format_precision('cuda')}; torch built for CUDA {torch.version.cuda or torch.version.hip}"
    )
    if free < MIN_GPU_MEMORY:
        fix = "Stop other programs on this GPU (nvidia-smi lists them), or set a smaller trainer.batch_size."
        return Check(COMPUTING, name, State.WARNING, summary, fix)
    return Check(COMPUTING, name, State.GOOD, summary)


def check_no_gpu(driver: str | None, messages: list[str]) -> Check:
    """Explain why torch sees no GPU: there is none, or something prevents its use.

    Args:
        driver: Version of the machine's NVIDIA driver; None if there is none.
        messages: Warnings that torch gave while it searched for a GPU.
    """
    import torch

    if driver is None and not messages:
        return Check(COMPUTING, "GPU", State.GOOD, "none; runs use the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        summary = f"hidden by CUDA_VISIBLE_DEVICES={hidden}; runs use the CPU"
        return Check(COMPUTING, "GPU", State.GOOD, summary, "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and torch.version.hip is None:
        summary = f"the NVIDIA driver ({driver}) is installed, but this build of torch supports only CPUs"
        return Check(
            COMPUTING, "GPU", State.WARNING, summary, "Install the CUDA build of torch: pytorch.org, Get Started."
        )
    summary = f"the NVIDIA driver ({driver}) is installed, but torch can't use a GPU"
    reason = f": {' '.join(messages[0].split())}" if messages else ""
    fix = "Update the driver; in a container, start it with docker run --gpus all. Until then, runs use the CPU."
    return Check(COMPUTING, "GPU", State.WARNING, f"{summary}{reason}", fix)


def read_driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None if there is no driver."""
    try:
        match = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", DRIVER.read_text())
    except OSError:
        return "of unknown version" if shutil.which("nvidia-smi") else None
    return match[1] if match else "of unknown version"


MEMORY_AND_DISK = "Memory and disk"
GIB = 2**30
LOW_MEMORY, MIN_MEMORY = 4 * GIB, GIB
"""Bytes of free memory that the study's models should have, and that any run needs."""
MIN_SHARED_MEMORY = GIB
"""Bytes of free shared memory; less is enough for only a few worker processes."""
LOW_DISK, MIN_DISK = 10 * GIB, GIB
"""Bytes of free disk: checkpoints and bundle of VGG19 in both stages take up to 6 GiB, the cache up to its budget."""
MAX_CLOCK_DIFFERENCE = 5.0
"""Largest tolerated difference of a disk's clock, in seconds; with more, a run's heartbeat seems to be late."""

SHARED_MEMORY = Path("/dev/shm")
MEMORY_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Files in which Linux states a container's memory limit and use, in version 2 and version 1 of control groups."""


def check_space() -> Iterator[Check]:
    """Check memory, shared memory, disks, whether results can be written, and the clock."""
    yield check_memory(*_read_memory())
    if SHARED_MEMORY.is_dir():
        yield check_shared_memory(shutil.disk_usage(SHARED_MEMORY).free)
    results, cache = Path("outputs"), Path(CacheConfig().folder)
    yield check_disk("outputs", results)
    if _find_existing_folder(results).stat().st_dev != _find_existing_folder(cache).stat().st_dev:
        yield check_disk("cache", cache)
    yield check_writable(results)
    yield check_clock(time.time(), (PACKAGE / "__init__.py").stat().st_mtime)


def _read_memory() -> tuple[int, int]:
    """Return the free and total memory of the machine or the container, in bytes."""
    import psutil

    machine = psutil.virtual_memory()
    free, total = int(machine.available), int(machine.total)
    for limit, used in MEMORY_FILES:
        try:
            allowed = int(limit.read_text())  # "max": no limit
            free, total = min(free, allowed - int(used.read_text())), min(total, allowed)
        except (OSError, ValueError):
            continue
    return max(0, free), total


def check_memory(free: int, total: int) -> Check:
    """Check that there is enough memory for a run; both arguments in bytes."""
    summary = f"{format_bytes(free)} free of {format_bytes(total)}"
    if free >= LOW_MEMORY:
        return Check(MEMORY_AND_DISK, "memory", State.GOOD, summary)
    state = State.WRONG if free < MIN_MEMORY else State.WARNING
    fix = "Close other programs, or choose a smaller trainer.batch_size, data.image_size or model."
    return Check(
        MEMORY_AND_DISK,
        "memory",
        state,
        f"{summary}; the study's models should have {format_bytes(LOW_MEMORY)} free",
        fix,
    )


def check_shared_memory(free: int) -> Check:
    """Check that worker processes have enough shared memory to pass on images; `free` in bytes."""
    summary = f"{format_bytes(free)} free in {SHARED_MEMORY}"
    if free >= MIN_SHARED_MEMORY:
        return Check(MEMORY_AND_DISK, "shared memory", State.GOOD, summary)
    fix = "In a container: docker run --shm-size=8g. Or set data.workers=0, which needs none and gives the same result."
    return Check(
        MEMORY_AND_DISK, "shared memory", State.WARNING, f"{summary}, too little for a large data.workers", fix
    )


def check_disk(name: str, folder: Path) -> Check:
    """Check the free space of the disk on which `folder` is or would be created."""
    free = shutil.disk_usage(_find_existing_folder(folder)).free
    summary = f"{format_bytes(free)} free on the disk of {folder} ({_find_existing_folder(folder)})"
    if free >= LOW_DISK:
        return Check(MEMORY_AND_DISK, f"disk of {name}", State.GOOD, summary)
    state = State.WRONG if free < MIN_DISK else State.WARNING
    fix = "Free some space, work on another disk, or set cache.folder to another disk and a smaller cache.budget_gib."
    return Check(MEMORY_AND_DISK, f"disk of {name}", state, summary, fix)


def _find_existing_folder(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return nearest


def check_writable(folder: Path) -> Check:
    """Write a small file as a run does, read it back and delete it; compare the disk's clock with this machine's."""
    existing = _find_existing_folder(folder)
    file = existing / f".pylorus-doctor-{secrets.token_hex(4)}.txt"
    fix = f"Work in a folder that you own, or type: chown -R $USER {existing}"
    if not existing.is_dir():
        return Check(
            MEMORY_AND_DISK,
            "results",
            State.WRONG,
            f"{existing} is not a folder",
            f"Rename {existing}: runs are saved in a folder of this name.",
        )
    try:
        with write_atomically(file) as temporary:
            temporary.write_text("pylorus", encoding="utf-8")
        content = file.read_text(encoding="utf-8")
        skew = file.stat().st_mtime - time.time()
    except OSError as error:
        return Check(MEMORY_AND_DISK, "results", State.WRONG, f"can't write to {existing}: {error.strerror}", fix)
    finally:
        if os.access(file, os.F_OK):
            file.unlink()
    if content != "pylorus":
        return Check(
            MEMORY_AND_DISK,
            "results",
            State.WRONG,
            f"{existing}: a test file came back with other content",
            "Use another disk.",
        )
    if abs(skew) > MAX_CLOCK_DIFFERENCE:
        summary = f"{existing} is writable, but its clock differs by {skew:+.0f} s"
        return Check(
            MEMORY_AND_DISK,
            "results",
            State.WARNING,
            summary,
            "Synchronize the clocks of this machine and its file server (NTP).",
        )
    return Check(MEMORY_AND_DISK, "results", State.GOOD, f"{existing} is writable")


def check_clock(now: float, installed: float) -> Check:
    """Check that the system time is plausible; both arguments in seconds since 1970.

    Example:
        >>> check_clock(0.0, 1.7e9).state
        <State.WARNING: 'warning'>
    """
    time_text = datetime.fromtimestamp(now).astimezone().isoformat(" ", "minutes")
    if now >= installed - 24 * 3600:
        return Check(MEMORY_AND_DISK, "clock", State.GOOD, time_text)
    fix = "Set the clock (date, or NTP): the folders of runs are named after it."
    return Check(MEMORY_AND_DISK, "clock", State.WARNING, f"{time_text}, before Pylorus was installed", fix)


IMAGES = "Images"
SAMPLE_SIZE = 24
"""Number of images that are read."""


@cache
def _list_class_images(root: Path) -> list[tuple[str, str, str]]:
    from pylorus.data.walk import list_class_images

    return list_class_images(root)[0]


def check_images(root: Path) -> Iterator[Check]:
    """Count the images of each class folder and read a sample of them."""
    if not root.is_dir():
        fix = "Pass a folder with one subfolder per class: --data DIR"
        yield Check(IMAGES, "folder", State.WRONG, f"{root} is not a folder", fix)
        return
    shards = len(list(root.glob("*.tar")))
    if shards:
        summary = f"{format_count(shards, 'shard')} in {root}"
        yield Check(IMAGES, "folder", State.GOOD, summary, f"train with data=shards data.root={root}")
        return
    try:
        rows = _list_class_images(root)
    except PylorusError as error:
        fix = f"Put the images into {root}/CLASS/…, or list them in a manifest (docs/data.md)."
        yield Check(IMAGES, "folder", State.WRONG, " ".join(str(error).split()), fix)
        return
    counts = Counter(row[1] for row in rows)
    classes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    yield Check(IMAGES, "folder", State.GOOD, f"{len(rows)} images in {root}: {classes}")
    yield check_sample([root / row[0] for row in rows[:: max(1, len(rows) // SAMPLE_SIZE)]][:SAMPLE_SIZE])


def check_sample(paths: list[Path]) -> Check:
    """Read the images as a run does and time it."""
    from pylorus.data.decode import read_image

    unreadable: list[str] = []
    start = time.perf_counter()
    for path in paths:
        try:
            read_image(path)
        except UnreadableImageError as error:
            unreadable.append(str(error))
    seconds = time.perf_counter() - start
    if unreadable:
        summary = f"{len(unreadable)} of {len(paths)} sampled images can't be read, e.g. {unreadable[0]}"
        return Check(
            IMAGES,
            "reading",
            State.WARNING,
            summary,
            "List all of them: pylorus audit DIR. Train without them: data.on_error=quarantine",
        )
    speed = f"{seconds / max(1, len(paths)) * 1000:.0f} ms each"
    return Check(IMAGES, "reading", State.GOOD, f"all {len(paths)} sampled images can be read, {speed}")


def list_class_names(root: Path) -> list[str]:
    """Return the class names of a folder; an empty list if it does not exist or holds no class folders."""
    if not root.is_dir() or list(root.glob("*.tar")):
        return []
    try:
        rows = _list_class_images(root)
    except PylorusError:
        return []
    return sorted({row[1] for row in rows})


BUNDLE = "Bundle"


def check_bundle(folder: Path, trust: Sequence[Path] = ()) -> Iterator[Check]:
    """Load a bundle as `pylorus predict` does: file hashes, description, classes, weights, signature if `trust`."""
    from pylorus.deploy.model import UnknownNetworkError, load_bundle

    try:
        bundle = load_bundle(folder, trust=trust)
    except UnknownNetworkError as error:
        fix = "Check it with the command that uses it: `pylorus predict` with --network."
        yield Check(BUNDLE, "bundle", State.WARNING, " ".join(str(error).split()), fix)
        return
    except (PylorusError, OSError) as error:
        fix = "Copy the run's whole model/ folder again; `sha256sum -c SHA256SUMS` in it lists the files that changed."
        yield Check(BUNDLE, "bundle", State.WRONG, " ".join(str(error).split()), fix)
        return
    description = bundle.description
    summary = f"{folder}: {description.architecture}, classes {', '.join(description.classes)}; complete and loadable"
    yield Check(BUNDLE, "bundle", State.GOOD, summary)


FIGURES = "Figures"


def check_fonts(words: Iterable[str] = ()) -> Iterator[Check]:
    """Check that an installed font can draw the class names.

    Args:
        words: The class names, if known.
    """
    from pylorus.report.figure_style import DEFAULT_FONT, find_cjk_font_file, is_in_default_font

    cjk_font = find_cjk_font_file()
    unsupported = [word for word in words if not is_in_default_font(word)]
    if cjk_font is not None:
        yield Check(
            FIGURES, "fonts", State.GOOD, f"{DEFAULT_FONT}, and {cjk_font.name} for Chinese, Japanese and Korean"
        )
        return
    summary = f"{DEFAULT_FONT}: Latin, Greek, Cyrillic; no font for Chinese, Japanese or Korean class names"
    fix = "install Noto Sans CJK (on Debian and Ubuntu: apt install fonts-noto-cjk)"
    if unsupported:
        yield Check(FIGURES, "fonts", State.WARNING, f"{summary}: figures show {', '.join(unsupported)} as boxes", fix)
    else:
        yield Check(FIGURES, "fonts", State.GOOD, summary, fix)
