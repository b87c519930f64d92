"""What the system allows this process (memory, CPU time, files, processes), and faults of limits and disks in words.

Nothing here imports torch.
"""

import ctypes
import errno
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
UNREACHABLE = {errno.ESTALE, errno.EIO, errno.ENODEV, errno.ENOTCONN, errno.ENXIO}
NOT_A_FOLDER = {errno.EEXIST, errno.ENOTDIR}
NOT_A_FILE = {errno.EISDIR, errno.ELOOP}
OTHER_FOLDER_HINT = "choose another folder: hydra.run.dir=DIR, or hydra.sweep.dir=DIR for a sweep."

if sys.platform == "win32":
    resource = None  # it has no such limits
else:
    import resource

CGROUP_ROOT = Path("/sys/fs/cgroup")
"""Where Linux mounts control groups (cgroups)."""
CGROUP_FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files for limit and usage, and the statistic for reclaimable memory, by cgroup version."""
OWN_GROUPS = Path("/proc/self/cgroup")
"""File with a line `number:controllers:/path` for each cgroup of this process."""
CPU_MARGIN = 0.05
"""Fraction of the CPU time that a run keeps to end in; at least `LEAST_CPU_SECONDS`."""
LEAST_CPU_SECONDS = 5

MEMORY_ERROR = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|cannot allocate memory|out of memory"
    r"|insufficient memory|failed to map segment from shared object|unable to allocate .* for an array"
    r"|could not create a (primitive|memory)|\bmalloc of size \d+ failed|\bENOMEM\b",
    re.IGNORECASE,
)
"""How torch, oneDNN, OpenCV, NumPy, pyarrow, the dynamic loader and C++ report that they got no memory."""
FILE_SIZE_ERROR = re.compile(r"file too large|os error 27\b", re.IGNORECASE)
OPEN_FILES_ERROR = re.compile(r"too many open files|os error 24\b", re.IGNORECASE)
PROCESSES_ERROR = re.compile(
    r"can't start new thread|resource temporarily unavailable|os error 11\b|thread creation failed", re.IGNORECASE
)


def get_free_memory(root: Path = CGROUP_ROOT, groups: Path = OWN_GROUPS) -> int:
    """Return how many bytes this process may still allocate.

    That is the least that the machine, its control groups (a container, a job of SLURM) and `ulimit -v` leave.

    Args:
        root: Mount point of the cgroups.
        groups: As `OWN_GROUPS`.
    """
    import psutil

    left = [int(psutil.virtual_memory().available), *read_free_group_memory(root, groups)]
    limit = get_limit("RLIMIT_AS")
    if limit is not None:
        left.append(max(0, limit - int(psutil.Process().memory_info().vms)))
    return min(left)


def read_free_group_memory(root: Path, groups: Path) -> list[int]:
    """Return the bytes left in each memory-limited cgroup that contains this process.

    Args:
        root: Mount point of the cgroups.
        groups: File with a line `number:controllers:/path` for each cgroup of the process.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    bytes_left: list[int] = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        version, top = ("v1", root / "memory") if controllers else ("v2", root)
        # A container may mount its own cgroup as the root, under a path that is only valid outside.
        group_folder = top / path.lstrip("/")
        for folder in {
            top,
            *(ancestor for ancestor in (group_folder, *group_folder.parents) if ancestor.is_relative_to(top)),
        }:
            group_left = _read_free_memory_of(folder, *CGROUP_FILES[version])
            if group_left is not None:
                bytes_left.append(group_left)
    return bytes_left


def _read_free_memory_of(folder: Path, limit: str, use: str, reclaimable: str) -> int | None:
    try:
        limit_bytes = (folder / limit).read_text(encoding="utf-8").strip()
        if limit_bytes == "max":
            return None
        used_bytes = int((folder / use).read_text(encoding="utf-8"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(limit_bytes) - used_bytes + int(statistics.get(reclaimable, 0)))


def get_limit(name: str) -> int | None:
    """Return a soft limit of this process by its name, such as "RLIMIT_AS"; None if there is none."""
    if resource is None or not hasattr(resource, name):
        return None
    soft: int = resource.getrlimit(getattr(resource, name))[0]
    return None if soft == resource.RLIM_INFINITY else soft


def reserve_cpu_time() -> None:
    """Let the signal of the CPU time limit (`ulimit -t`) arrive before the system kills this process."""
    if resource is None or not hasattr(resource, "RLIMIT_CPU"):
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY:
        return
    earlier = hard - max(LEAST_CPU_SECONDS, int(CPU_MARGIN * hard))
    if earlier > 0 and not 0 <= soft <= earlier:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (earlier, hard))


def initialize_cuda(driver: ctypes.CDLL) -> None:
    """Create the context of the first visible NVIDIA GPU, and load cuDNN and cuBLAS once torch is imported elsewhere.

    It takes a second in all, in which other threads go on. Without a GPU nothing is done.

    Args:
        driver: The library of NVIDIA's driver.
    """
    # https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__PRIMARY__CTX.html
    if driver.cuInit(0) or driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0):
        return
    while "pytorch_lightning" not in sys.modules:  # it is imported after torch
        time.sleep(0.01)
    torch = sys.modules["torch"]
    numbers = torch.zeros(1, 8, 8, 8, device="cuda")
    torch.nn.functional.conv2d(numbers, numbers)
    torch.mm(numbers[0, 0], numbers[0, 0])


def format_stop(name: str) -> str:
    """Return a phrase that says what a signal means, for after "interrupted"; empty if Ctrl-C sent it.

    Example:
        >>> format_stop("SIGTERM"), format_stop("SIGINT")
        (' by SIGTERM', '')
    """
    if name == "SIGXCPU":
        hard = None if resource is None else resource.getrlimit(resource.RLIMIT_CPU)[1]
        seconds = "" if hard in (None, -1) else f" of {hard} s"
        return (
            f" by SIGXCPU: the CPU time limit{seconds} is almost used up. Raise it where the run is started, "
            "ulimit -t unlimited, and go on"
        )
    return "" if name in ("", "SIGINT") else f" by {name}"


def format_kill(code: int) -> str:
    """Return in words which signal ended a process, and what usually sends it; empty if none did.

    Args:
        code: Exit code of the process; negative for a signal, as in `subprocess`.

    Example:
        >>> format_kill(-9)
        'was killed by SIGKILL: usually the machine or the container ran out of memory (see dmesg)'
        >>> format_kill(1)
        ''
    """
    if code >= 0:
        return ""
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    causes = {
        "SIGKILL": "usually the machine or the container ran out of memory (see dmesg)",
        "SIGABRT": f"a library gave up, usually for lack of memory{_format_address_space()}",
        "SIGSEGV": f"a library failed, sometimes for lack of memory{_format_address_space()}",
        "SIGBUS": "usually a disk or /dev/shm is full, or a drive has become unavailable",
        "SIGXCPU": "its CPU time is used up (ulimit -t)",
        "SIGXFSZ": "a file became larger than allowed (ulimit -f)",
    }
    return f"was killed by {name}{f': {causes[name]}' if name in causes else ''}"


def explain_limit(error: BaseException) -> str | None:
    """Explain an error that means that a limit of the system is reached; return None if it means something else.

    Args:
        error: The error; those that led to it are examined too, the last one first.

    Returns:
        What was reached, how much the system allows, and how to raise that.

    Example:
        >>> explain_limit(OSError(24, "Too many open files", "a.png")).partition(":")[0]
        'too many open files'
        >>> explain_limit(ValueError("no")) is None
        True
    """
    for cause in iterate_causes(error):
        if isinstance(cause, PylorusError):
            return None
        message = _explain_cause(cause)
        if message is not None:
            return message
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of this process, machine or container was insufficient."""
    return (
        isinstance(error, MemoryError)
        # An extension module that got no memory, and did not say so.
        or (isinstance(error, SystemError) and get_limit("RLIMIT_AS") is not None)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (not isinstance(error, PylorusError) and MEMORY_ERROR.search(str(error)) is not None)
    )


def _explain_cause(error: BaseException) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number == errno.EFBIG or FILE_SIZE_ERROR.search(text):
        return format_file_size(error)
    if number in (errno.EMFILE, errno.ENFILE) or OPEN_FILES_ERROR.search(text):
        return (
            f"too many open files: this process may have {_format_limit('RLIMIT_NOFILE')} open. Raise the limit: "
            "ulimit -n 4096; or use fewer processes that read images: data.workers=0"
        )
    if is_out_of_memory(error):
        return f"the memory is used up: {format_memory_error(error)}. {format_memory_advice()}"
    if number == errno.EAGAIN or PROCESSES_ERROR.search(text):
        return (
            "no further thread or process could be started: this user may have "
            f"{_format_limit('RLIMIT_NPROC')} at once{_format_address_space()}. Raise the limit: ulimit -u unlimited; "
            "or use fewer: data.workers=0 trainer.threads=1"
        )
    return None


def format_file_size(error: BaseException) -> str:
    """Return the message for a file that became larger than allowed."""
    path = error.filename if isinstance(error, OSError) and error.filename else "a file"
    limit = get_limit("RLIMIT_FSIZE")
    if limit is None:
        return f"{path} became larger than its disk takes (FAT: 4 GiB a file). Use another disk"
    return (
        f"a file became too large: {path} could not be written, since this process may write {format_bytes(limit)} to "
        "a file (ulimit -f). Lift the limit: ulimit -f unlimited"
    )


def format_memory_error(error: BaseException) -> str:
    """Return the line of an error that says what got no memory.

    Example:
        >>> format_memory_error(MemoryError())
        'no memory was left'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if MEMORY_ERROR.search(line)), lines[0] if lines else "no memory was left")
    return line.rstrip(".")[:200]


def format_memory_advice() -> str:
    """Return a sentence about the memory that is free and how this process gets more."""
    limit = get_limit("RLIMIT_AS")
    if limit is not None:
        return (
            f"This process may use {format_bytes(limit)} of addresses (ulimit -v); torch alone needs about 5 GiB. Lift "
            "the limit: ulimit -v unlimited"
        )
    return (
        f"{format_bytes(get_free_memory())} is free. Close other programs, or give the job or container more (SLURM: "
        "--mem, docker: --memory)"
    )


def _format_limit(name: str) -> str:
    limit = get_limit(name)
    return "any number" if limit is None else str(limit)


def _format_address_space() -> str:
    limit = get_limit("RLIMIT_AS")
    return "" if limit is None else f", or the {format_bytes(limit)} of addresses (ulimit -v) are used up"


def iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an error and its causes and contexts, the last error first."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def explain_disk_error(error: OSError) -> str | None:
    """Return a message on why a run can't start or be summarized; None if it is not an error of the disk."""
    if (limit := explain_limit(error)) is not None:
        return f"{limit}."
    path = get_error_path(error) or "the output folder"
    folder = _find_existing_folder(Path(path) if get_error_path(error) else Path.cwd())
    if error.errno in DISK_FULL:
        return f"{format_disk_full(path, folder)}\nFree some space, or {OTHER_FOLDER_HINT}"
    if error.errno in NOT_WRITABLE:
        return f"{format_not_writable(error, path, folder)}\nOr {OTHER_FOLDER_HINT}"
    if error.errno in UNREACHABLE:
        return f"{format_drive_lost(error, path)}\nReconnect the drive or the network, or {OTHER_FOLDER_HINT}"
    if error.errno in NOT_A_FOLDER:
        return (
            f"{path}: found a file with this name or with the name of a folder above it, expected a folder. Move the "
            f"file, or {OTHER_FOLDER_HINT}"
        )
    if error.errno in NOT_A_FILE:
        return f"{format_not_a_file(path)} Move it away, or {OTHER_FOLDER_HINT}"
    if error.errno == errno.ENAMETOOLONG:
        return f"{path}: the name is too long for this disk. Use a shorter name, or {OTHER_FOLDER_HINT}"
    return None


def format_system_error(error: Exception) -> str:
    """Return an error as a message of a command; of an error of the system, with the file and what to do.

    Example:
        >>> format_system_error(OSError(errno.ENOSPC, "No space left on device", "/data/predictions.csv"))
        'the disk is full: /data/predictions.csv could not be written. Free some space, or write to another folder.'
        >>> format_system_error(PermissionError(errno.EACCES, "Permission denied", "model"))
        'model: Permission denied'
    """
    if (limit := explain_limit(error)) is not None:
        return f"{limit}."
    if not isinstance(error, OSError):
        return str(error)
    path = get_error_path(error)
    if error.errno in DISK_FULL:
        return (
            f"the disk is full: {path or 'a file'} could not be written. Free some space, or write to another folder."
        )
    if error.errno in NOT_A_FILE and path:
        return f"{format_not_a_file(path)} Move it away, or write to another folder."
    if error.errno == errno.EROFS:
        return f"{path or 'the disk'} can't be written to: {error.strerror}. Write to another folder."
    return f"{path}: {error.strerror}" if path and error.strerror else str(error)


def get_error_path(error: BaseException) -> str | None:
    """Return the file that an error names, if any."""
    filename = error.filename2 or error.filename if isinstance(error, OSError) else None
    return str(filename) if filename else None


def format_disk_full(path: str, folder: Path) -> str:
    """Return the message for a full disk: what could not be written, and how much space is free at `folder`."""
    return f"the disk is full: {path} could not be written{_format_free_space(folder)}."


def format_not_writable(error: OSError, path: str, folder: Path) -> str:
    """Return the message for a file or folder that is not writable, and how to find out why."""
    return (
        f"{path} can't be written to: {error.strerror}.\n"
        f"Make the folder writable (to see its owner: ls -ld {folder}; to see whether its drive is mounted read-only: "
        f"findmnt -T {folder})."
    )


def format_drive_lost(error: OSError, path: str) -> str:
    """Return the message for a drive that has become unavailable."""
    return f"{path} can't be reached: {error.strerror}."


def format_not_a_file(path: str) -> str:
    """Return the message for a folder, or for links that lead in a circle, in the place of a file."""
    return f"{path}: found {'a folder' if Path(path).is_dir() else 'links that lead in a circle'}, expected a file."


def _find_existing_folder(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), path)


def _format_free_space(folder: Path) -> str:
    try:
        return f" ({format_bytes(shutil.disk_usage(folder).free)} free)"
    except OSError:
        return ""
