"""Mutated image files, decoded in child processes under limits of time and memory.

    python -m tests.data.fuzzing 1000        the long run: counts of what was decoded and refused, and why

Mutation `number` is the same file in every run, so a fault can be looked at alone: `mutated(number)`.
"""

import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from numpy.random import Generator

from pylorus.core.limited_process import assume_limits
from pylorus.data.decode import MAX_PIXELS, UnreadableImageError, decode_image
from tests.data.sample_files import samples

SECONDS = 5.0
MEMORY = 2**30
MUTATIONS = ("bit flips", "deletion", "insertion", "header edit", "truncation", "splice")


@dataclass(frozen=True)
class Outcome:
    """What became of one mutated file; `verdict` is decoded, refused or fault."""

    number: int
    sample: str
    mutation: str
    verdict: str
    reason: str
    seconds: float


def mutated(number: int) -> tuple[str, str, bytes]:
    """Name of the sample, name of the mutation and the file; every sample meets every mutation in turn."""
    names = list(samples())
    sample, mutation = names[number % len(names)], MUTATIONS[number // len(names) % len(MUTATIONS)]
    rng = np.random.default_rng(number)
    content = samples()[sample]
    if mutation == "splice":
        other = samples()[names[rng.integers(len(names))]]
        return sample, mutation, content[: rng.integers(1, len(content))] + other[rng.integers(0, len(other)) :]
    return sample, mutation, _changed(content, mutation, rng)


def _changed(content: bytes, mutation: str, rng: Generator) -> bytes:
    data, at = bytearray(content), int(rng.integers(1, len(content)))
    some = int(rng.integers(1, 40))
    if mutation == "truncation":
        return content[:at]
    if mutation == "deletion":
        del data[at : at + some]
    elif mutation == "insertion":
        data[at:at] = rng.bytes(some)
    elif mutation == "bit flips":
        for place in rng.integers(0, len(data), some):
            data[place] ^= 1 << int(rng.integers(8))
    else:
        begin = int(rng.integers(0, 400))  # where formats keep sizes, counts and offsets; DICOM's lie behind byte 128
        for place in range(begin, min(begin + 4, len(data))):
            data[place] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
    return bytes(data)


def run(numbers: Iterable[int], *, processes: int = 2) -> list[Outcome]:
    """Decode these mutations in child processes; a child that dies or hangs is a fault and is replaced."""
    waiting = iter(numbers)
    workers = [_Worker() for _ in range(processes)]
    found: list[Outcome] = []
    try:
        busy = [worker for worker in workers if worker.take(next(waiting, None))]
        while busy:
            for worker in list(busy):
                outcome = worker.outcome()
                if outcome is None:
                    continue
                found.append(outcome)
                if not worker.take(next(waiting, None)):
                    busy.remove(worker)
    finally:
        for worker in workers:
            worker.stop()
    return found


class _Worker:
    """One child process and the file that it has in hand."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._pipe.recv()  # ready: imports do not count against the limit of time

    def take(self, number: int | None) -> bool:
        if number is None:
            return False
        self._number, self._since = number, time.monotonic()
        self._pipe.send(number)
        return True

    def outcome(self) -> Outcome | None:
        try:
            if self._pipe.poll(0.05):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            return self._replaced("the process died")
        if time.monotonic() - self._since > SECONDS:
            return self._replaced("hangs")
        return None

    def _replaced(self, reason: str) -> Outcome:
        sample, mutation, _ = mutated(self._number)
        self.stop()
        self._start()
        return Outcome(self._number, sample, mutation, "fault", reason, time.monotonic() - self._since)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection) -> None:
    assume_limits(True)  # it has those of this module
    samples()
    for content in samples().values():  # so that every library is loaded before memory is measured
        decode_image(content)
    used = _limit_memory()
    pipe.send("ready")
    while True:
        pipe.send(_judged(pipe.recv(), used))


def _limit_memory() -> int:
    import resource

    import psutil

    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY,) * 2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _judged(number: int, used: int) -> Outcome:
    import resource

    sample, mutation, content = mutated(number)
    begin = time.monotonic()
    try:
        verdict, reason = _plausible(decode_image(content), sample, mutation)
    except UnreadableImageError as error:
        verdict, reason = "refused", re.sub(r"b['\"].*", "…", re.sub(r"\d+", "N", str(error)))[:60]
        if isinstance(error.__cause__, MemoryError):
            verdict = "fault"
    except BaseException as error:  # whatever gets out is the fault that is looked for
        verdict, reason = "fault", f"{type(error).__name__} got out: {error}"
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) * 1024 > MEMORY:
        verdict, reason = "fault", "took over 1 GiB"
    return Outcome(number, sample, mutation, verdict, reason, time.monotonic() - begin)


def _plausible(image: np.ndarray, sample: str, mutation: str) -> tuple[str, str]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not 0 < image.size <= 3 * MAX_PIXELS:
        return "fault", f"gives an array of {image.dtype} {image.shape}"
    if np.array_equal(image, decode_image(samples()[sample])):
        return "decoded", "the very image"
    return ("fault", "cut, and another image") if mutation == "truncation" else ("decoded", "another image")


def main() -> None:
    """Print the counts of a run; exit with 1 if there was a fault."""
    begin = time.monotonic()
    outcomes = run(range(int(sys.argv[1])))
    faults = [outcome for outcome in outcomes if outcome.verdict == "fault"]
    print(
        f"{len(outcomes)} files in {time.monotonic() - begin:.0f} s, slowest {max(o.seconds for o in outcomes):.2f} s"
    )
    for (verdict, reason), count in Counter((o.verdict, o.reason) for o in outcomes).most_common():
        print(f"{count:6} {verdict:8} {reason}")
    for mutation in MUTATIONS:
        print(f"{mutation:12}", dict(Counter(o.verdict for o in outcomes if o.mutation == mutation)))
    others = Counter(o.sample for o in outcomes if o.reason == "another image")
    print("another image, by sample:", dict(others.most_common()))
    for fault in faults:
        print(fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
