"""What the system allows a process and the faults of its disks are said in words; free memory is the least that is left."""

import errno
import resource
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from pylorus.core import system
from pylorus.core.errors import PylorusError
from pylorus.core.system import explain_disk_error, explain_limit, format_kill, format_stop, get_free_memory

MEMORY = "the memory is used up: "
FILE_SIZE = "became larger than its disk takes"


def chain(first: Exception, last: Exception) -> Exception:
    last.__cause__ = first
    return last


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (MemoryError(), f"{MEMORY}no memory was left. "),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            MEMORY,
        ),
        (RuntimeError("std::bad_alloc"), f"{MEMORY}std::bad_alloc. "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MEMORY),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), MEMORY),
        (Exception("OpenCV(4) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes"), MEMORY),
        (RuntimeError("could not create a primitive"), MEMORY),
        (chain(MemoryError(), ValueError("no features")), MEMORY),
        (OSError(errno.EFBIG, "File too large", "last.ckpt"), f"last.ckpt {FILE_SIZE}"),
        (Exception("Error while serializing: I/O error: File too large (os error 27)"), f"a file {FILE_SIZE}"),
        (OSError(errno.EMFILE, "Too many open files", "a.png"), "too many open files: "),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "too many open"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no further thread or process"),
        (RuntimeError("can't start new thread"), "no further thread or process"),
    ],
)
def test_reaching_a_limit_is_explained_with_the_way_to_raise_it(error, start):
    words = explain_limit(error)
    assert words is not None
    assert words.startswith(start)
    assert any(way in words for way in ("ulimit", "Close other programs", "Use another disk"))


def test_numpys_own_error_of_memory_is_explained():
    with pytest.raises(MemoryError) as failure:
        np.empty(1 << 60, dtype=np.uint8)
    words = explain_limit(failure.value)
    assert words is not None
    assert "1.00 EiB" in words


@pytest.mark.parametrize(
    "error", [ValueError("no"), PylorusError("out of memory"), OSError(errno.ENOENT, "No such file", "out"), OSError()]
)
def test_other_errors_are_left_alone(error):
    assert explain_limit(error) is None


def test_signals_are_explained_by_their_usual_cause():
    assert "out of memory (see dmesg)" in format_kill(-signal.SIGKILL)
    assert "CPU time" in format_kill(-signal.SIGXCPU)
    assert format_kill(-signal.SIGRTMAX - 3) == f"was killed by signal {signal.SIGRTMAX + 3}"
    assert format_stop("SIGXCPU").startswith(" by SIGXCPU: the CPU time limit")


def run_limited(program: str, **limits: int) -> "subprocess.CompletedProcess[str]":
    def set_limits() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=set_limits, check=False)


@pytest.mark.slow
def test_a_limit_of_addresses_counts_as_memory():
    program = "from pylorus.core.system import get_free_memory; print(get_free_memory())"
    limited = run_limited(program, AS=2**30)
    assert 0 <= int(limited.stdout) < 2**30 <= get_free_memory()


@pytest.mark.slow
def test_the_cpu_time_limit_interrupts_a_run_before_the_system_kills_it():
    program = (
        "from pylorus.core.system import *; from pylorus.runs.process import handle_signals\n"
        "reserve_cpu_time()\n"
        "try:\n"
        "    with handle_signals():\n"
        "        while True: pass\n"
        "except KeyboardInterrupt as stop: print('ended' + format_stop(str(stop)))"
    )
    ended = run_limited(program, CPU=6)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("ended by SIGXCPU: the CPU time limit of 6 s is almost used up.")


@pytest.mark.slow
def test_tables_are_read_where_no_thread_can_be_started(tmp_path):
    table = tmp_path / "table.parquet"
    pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}).to_parquet(table)
    program = f"""
import resource, pandas as pd, pyarrow.parquet
from pylorus.core.io import PARQUET_OPTIONS
pd.read_parquet({str(table)!r}, **PARQUET_OPTIONS)  # imports what it needs
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 4 * 2**20  # less than the stack of a thread
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(len(pd.read_parquet({str(table)!r}, **PARQUET_OPTIONS)))
"""
    assert run_limited(program).stdout == "2\n"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full: {place} could not be written ("),
        (
            errno.EROFS,
            "{place} can't be written to: gone.\nMake the folder writable (to see its owner: ls -ld {above};",
        ),
        (errno.EACCES, "{place} can't be written to"),
        (errno.EIO, "{place} can't be reached: gone.\nReconnect the drive"),
        (errno.EEXIST, "{place}: found a file with this name"),
        (errno.ENOTDIR, "{place}: found a file with this name"),
        (errno.ENAMETOOLONG, "{place}: the name is too long"),
    ],
)
def test_disk_errors_name_the_file_and_an_alternative(tmp_path, number, said):
    place = tmp_path / "there" / "run"
    words = explain_disk_error(OSError(number, "gone", str(place)))
    assert words is not None
    assert said.format(place=place, above=tmp_path) in words
    assert "hydra.run.dir=DIR" in words


def test_other_errors_keep_their_traceback():
    assert explain_disk_error(OSError(errno.ENOENT, "gone", "a module")) is None
    assert explain_disk_error(BrokenPipeError(errno.EPIPE, "gone")) is None


GIB = 2**30


@pytest.fixture
def make_control_groups(tmp_path, monkeypatch):
    """A system whose groups of processes have files of these contents."""

    def make(groups: str, files: dict[str, str]) -> None:
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        (tmp_path / "groups").write_text(groups)

    return make


def left(tmp_path) -> list[int]:
    return sorted(system.read_free_group_memory(tmp_path / "cgroup", tmp_path / "groups"))


def test_cgroup_v2_limits_count_available_and_reclaimable_memory(make_control_groups, tmp_path):
    make_control_groups(
        "0::/job/step\n",
        {
            "job/memory.max": f"{8 * GIB}\n", "job/memory.current": f"{3 * GIB}\n",
            "job/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            "job/step/memory.max": "max\n", "job/step/memory.current": "1\n", "job/step/memory.stat": "",
        },
    )  # fmt: skip
    assert left(tmp_path) == [6 * GIB]


def test_cgroup_v1_limits_are_respected(make_control_groups, tmp_path):
    make_control_groups(
        "4:memory:/pod\n3:cpu:/pod\n0::/\n",
        {
            "memory/pod/memory.limit_in_bytes": str(4 * GIB), "memory/pod/memory.usage_in_bytes": str(GIB),
            "memory/pod/memory.stat": "total_inactive_file 0\n",
        },
    )  # fmt: skip
    assert left(tmp_path) == [3 * GIB]


def test_a_container_with_a_host_path_uses_the_top_cgroup(make_control_groups, tmp_path):
    make_control_groups(
        "0::/../outside/4f\n", {"memory.max": str(2 * GIB), "memory.current": str(GIB), "memory.stat": ""}
    )
    assert left(tmp_path) == [GIB]


def test_without_limits_or_on_another_system_the_machines_own_memory_counts(tmp_path, monkeypatch):
    assert system.read_free_group_memory(tmp_path, tmp_path / "nothing") == []
    assert system.get_free_memory() > 0
