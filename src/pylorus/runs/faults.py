"""What can befall a run in its middle, in words for its user: what, where, and how to mend it.

Errors of the system, of torch and of its loader come wrapped in many ways; here, and only here, they are told apart.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pylorus.config import Config, TrainerConfig
from pylorus.data.unreadable import UnreadableImageError
from pylorus.errors import PylorusError
from pylorus.machine.choices import images_a_step
from pylorus.runs.begun import as_begun
from pylorus.runs.disk import FULL, LOST, SHUT, full, lost, named, shut
from pylorus.runs.folder import RunFolder

MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory", re.IGNORECASE)
WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
SHARED = re.compile(r"shared memory|unable to (write to file|open shared).*/?torch_", re.IGNORECASE)
UNWRITTEN = re.compile(r"PytorchStreamWriter failed writing|No space left on device|Disk quota exceeded")


@contextmanager
def faults_explained(folder: RunFolder, config: Config) -> Iterator[None]:
    """Makes a PylorusError of a fault that `explained` knows, inside; the original stays as its cause."""
    try:
        yield
    except Exception as error:
        told = explained(error, folder, config)
        if told is None:
            raise
        raise told from error


def explained(error: BaseException, folder: RunFolder, config: Config) -> PylorusError | None:
    """What befell a run, where it is a known fault of the machine or of the images; else None.

    Args:
        error: What ended the run; the errors that led to it are looked at too, the last one first.
        folder: The run's.
        config: The run's.
    """
    if isinstance(error, PylorusError):
        return None
    for one in _chain(error):
        words = _words(one, folder, config)
        if words is not None:
            return PylorusError(words)
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's or the machine's memory did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or MEMORY.search(str(error)) is not None


def _words(error: BaseException, folder: RunFolder, config: Config) -> str | None:
    text = str(error)
    if isinstance(error, UnreadableImageError):
        return _unreadable(text, folder)
    if out_of_memory(error):
        return _out_of_memory(error, folder, config)
    if isinstance(error, RuntimeError) and (WORKER.search(text) or SHARED.search(text)):
        return _worker(text, folder, config)
    if isinstance(error, OSError) and (error.errno == errno.ENOENT or error.errno in LOST) and not _there(folder):
        return _vanished(folder)
    if (isinstance(error, OSError) and error.errno in FULL) or UNWRITTEN.search(text):
        return _disk_full(error, folder, config)
    if isinstance(error, OSError) and error.errno in SHUT:
        return f"{shut(error, _place(error, folder), folder.path)}\nThen {_go_on(folder)}"
    if isinstance(error, OSError) and error.errno in LOST:
        return f"{lost(error, _place(error, folder))}\nMend the drive or the network, then {_go_on(folder)}"
    return None


def _disk_full(error: BaseException, folder: RunFolder, config: Config) -> str:
    return (
        f"{full(_place(error, folder), folder.path)}\n"
        f"Free some space: older runs beside {folder.path} (their checkpoints first), or the cache in "
        f"{Path(config.cache.folder).absolute()}, which may go whole and is computed again.\nThen {_go_on(folder)}"
    )


def _vanished(folder: RunFolder) -> str:
    return (
        f"the run's folder {folder.path} vanished while the run went on: its config.yaml is not there any more.\n"
        "Where it was moved, or its drive was lost, bring it back, or go on where it lies now: "
        "python train.py resume=ITS_NEW_PLACE. Where it was deleted, start the run again."
    )


def _unreadable(text: str, folder: RunFolder) -> str:
    # A loader's worker hands on its whole traceback, whose last line is the error.
    said = text.strip().splitlines()[-1].removeprefix(f"{UnreadableImageError.__module__}.UnreadableImageError: ")
    return (
        f"an image can't be read any more, though it could when the run began:\n  {said}\n"
        "Bring the file back as it was (a run goes on only with the very images that it began with), "
        f"then {_go_on(folder)}\n"
        "To leave such files out, start another run with data.on_error=quarantine."
    )


def _worker(text: str, folder: RunFolder, config: Config) -> str:
    found = WORKER.search(text)
    who = f"a process that decodes images (pid {found[1].strip()})" if found else "a process that decodes images"
    workers = "as many as the machine has cores for" if config.data.workers is None else config.data.workers
    return (
        f"{who} was killed, or got no shared memory. Most often the machine's memory is used up (dmesg tells), or "
        "/dev/shm is too small (in a container: docker run --shm-size=8g).\n"
        f"Take fewer processes: data.workers is {workers}; 0 needs no shared memory and gives the same result.\n"
        f"Then {_go_on(folder, 'data.workers=0')}"
    )


def _out_of_memory(error: BaseException, folder: RunFolder, config: Config) -> str:
    size, auto = _batch_size(folder, config), config.trainer.batch_size == "auto"
    where = "the GPU" if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error) else "this machine"
    smaller = (
        f"Try half the batch, as a new run: the same command with trainer.batch_size={size // 2} (now {size}"
        + (", which auto found)." if auto else "), or trainer.batch_size=auto, which finds what fits.")
        if size > 1
        else "The batch is a single image already: take a smaller data.image_size or model, as a new run."
    )
    return (
        f"the memory of {where} does not suffice: {str(error).strip().splitlines()[0] if str(error) else 'no memory'}\n"
        f"{smaller}\nWhere other programs held the memory, end them, and {_go_on(folder)}"
    )


def _batch_size(folder: RunFolder, config: Config) -> int:
    """The images of a step: those that were asked for, or found when the run began."""
    try:
        return images_a_step(as_begun(config.trainer, folder.path / "environment.json"))
    except (OSError, ValueError):
        return images_a_step(TrainerConfig())


def _go_on(folder: RunFolder, *words: str) -> str:
    return f"go on: {' '.join(['python train.py', f'resume={folder.path}', *words])}"


def _place(error: BaseException, folder: RunFolder) -> str:
    """The file that an error names, else the run's folder."""
    return named(error) or f"a file in {folder.path}"


def _there(folder: RunFolder) -> bool:
    try:
        return folder.config.is_file()
    except OSError:
        return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from or met with, the last one first."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
