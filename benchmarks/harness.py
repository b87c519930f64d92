"""Run a contender as a process and measure it from outside: seconds from start to exit, peak memory, GPU."""

import csv
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean


@dataclass(frozen=True)
class Seen:
    """Measurements of a process.

    Attributes:
        code: Exit code.
        seconds: From start to exit.
        cpu_seconds: Of all cores, in the process and in the children that it waited for; it depends less than `seconds`
            on other load of the machine.
        memory_mib: Peak resident memory of the largest single process: itself or a child that it waited for, such
            as a decoding process. It is not a sum, because processes share pages.
        gpu_memory_mib: Peak memory of the whole GPU; None without a GPU.
        gpu_share: Mean utilization of the GPU in [0, 1]; None without a GPU.
        output: Its output, including errors.
    """

    code: int
    seconds: float
    cpu_seconds: float
    memory_mib: float
    gpu_memory_mib: float | None
    gpu_share: float | None
    output: str

    @property
    def last_error(self) -> str:
        """The line that most likely names the error, without paths of this machine."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        telling = [line for line in lines if "rror" in line] or lines or [""]
        said = " … ".join(dict.fromkeys([telling[-1], *lines[-1:]]))
        here = str(Path(__file__).parents[1])
        return f"exit code {self.code}: {said.replace(here, '.')[:300]}"


def watch(command: list[str], *, folder: Path, environment: dict[str, str], device: str) -> Seen:
    """Run a command to its end; its output is written to `folder/output.txt`.

    Ctrl-C reaches the command too; this function waits for its end before it raises KeyboardInterrupt again.
    """
    output = folder / "output.txt"
    gpu = _watch_gpu(folder / "gpu.csv") if device == "cuda" else None
    with output.open("wb") as stream:
        start = time.perf_counter()
        child = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except KeyboardInterrupt:
            _end(child)
            raise
        finally:
            if gpu is not None:
                gpu.terminate()
                gpu.wait()
        seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    memory, share = _read_gpu(folder / "gpu.csv")
    unit = 2**20 if os.uname().sysname == "Darwin" else 2**10
    text = output.read_text(encoding="utf-8", errors="replace")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Seen(child.returncode, seconds, cpu_seconds, usage.ru_maxrss / unit, memory, share, text)


def _end(child: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        for insist in (signal.SIGINT, signal.SIGKILL):
            try:
                child.wait(timeout=15)
                return
            except subprocess.TimeoutExpired:
                child.send_signal(insist)
        child.wait()


def _watch_gpu(file: Path) -> "subprocess.Popen[bytes] | None":
    query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "500"]
    with suppress(FileNotFoundError), file.open("wb") as stream:
        return subprocess.Popen(query, stdout=stream, stderr=subprocess.DEVNULL)
    return None


def _read_gpu(file: Path) -> tuple[float | None, float | None]:
    """Read peak memory in MiB and mean utilization of the first GPU."""
    if not file.is_file():
        return None, None
    values = []
    for row in csv.reader(file.read_text(encoding="utf-8").splitlines()):
        with suppress(ValueError):
            values.append((float(row[0]) / 100, float(row[1])))
    if not values:
        return None, None
    return max(memory for _, memory in values), mean(share for share, _ in values)
