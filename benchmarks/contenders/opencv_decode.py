"""Decode the images of all splits with nothing but OpenCV, in one process per core: the lower bound of reading them."""

import multiprocessing
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

import cv2
from job import Answer, Job
from machine import cores


def decode(path: str) -> int:
    return cv2.imread(path).size


def main() -> None:
    job, answer = Job.of_command_line(), Answer()
    paths = sorted(str(path) for path in Path(job.data).glob("*/*/*.jpg"))
    cv2.setNumThreads(1)
    start = perf_counter()
    with multiprocessing.get_context("fork").Pool(cores()) as pool:
        count = len(pool.map(decode, paths, chunksize=8))
    seconds = perf_counter() - start
    answer.phases["decode"] = seconds
    answer.note = f"{count} images, {1000 * seconds / max(1, count):.2f} ms each, {cores()} processes"
    answer.say()


if __name__ == "__main__":
    main()
