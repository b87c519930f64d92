"""Simulate false alarms and run lengths of the limits of `pylorus monitor`; prints Markdown.

    python benchmarks/monitoring.py           # 100 histories per row of run lengths, 1,000 periods per row of patients
    python benchmarks/monitoring.py --quick   # 30 and 300

Run lengths: a bundle has 13 measures, 7 proportions (0.33, 0.33, 0.33, 0.4, 0.05, 0.02, 0.03) and 6 scores (normal).
Each history has a reference of its own, of 300 images, and up to 60 periods of 100; one score is higher by the stated
number of standard deviations in all of them. The measures are independent and each image is its own patient.

Patients: false alarms of a single proportion (beta-binomial) and a single score (normal) at a level of 1 %, where
images of one patient are correlated.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
from numpy.typing import NDArray

from pylorus.deploy.monitor_page import DECAY
from pylorus.evaluation.drift import (
    accumulate_samples,
    build_rate_reference,
    build_score_reference,
    compare_rate,
    compare_sample,
    compare_score,
    summarize_rate,
    summarize_score,
)

PROPORTIONS, SCORES = (0.33, 0.33, 0.33, 0.4, 0.05, 0.02, 0.03), 6
REFERENCE, PERIOD, PERIODS, LEVEL, SEED = 300, 100, 60, 0.01, 20261127
PATIENTS = ((150, 50, 4, 0.5, 0.3), (30, 10, 10, 0.2, 0.1), (15, 8, 10, 0.5, 0.3), (15, 8, 10, 0.2, 0.1))
"""Patients of the reference and of a period, images of each, correlation, proportion."""


def find_first_alarms(shift: float, generator: np.random.Generator) -> tuple[float, float]:
    """Return the first period beyond a limit in one history: by periods alone, and with averages of recent ones."""
    measures = len(PROPORTIONS) + SCORES
    rates = [build_rate_reference(generator.random(REFERENCE) < share) for share in PROPORTIONS]
    scores = [build_score_reference(generator.normal(size=REFERENCE)) for _ in range(SCORES)]
    histories: list[list] = [[] for _ in range(measures)]
    alone = both = math.inf
    for number in range(1, PERIODS + 1):
        for index, known in enumerate((*rates, *scores)):
            if index < len(rates):
                sample = summarize_rate(generator.random(PERIOD) < PROPORTIONS[index], known)
            else:
                mean = shift if index == len(rates) else 0.0
                sample = summarize_score(generator.normal(mean, 1, PERIOD), known)
            history = histories[index]
            history.append(sample)
            if alone == math.inf and compare_sample(sample, known, false_alarms=LEVEL / measures).is_beyond:
                alone = number
            if both == math.inf:
                level = LEVEL / measures / 2
                average = accumulate_samples(history, decay=DECAY)
                if any(compare_sample(each, known, false_alarms=level).is_beyond for each in (sample, average)):
                    both = number
        if max(alone, both) < math.inf:
            break
    return alone, both


def format_run_length(lengths: NDArray[np.float64]) -> str:
    """Format the median run length, and how many histories had an alarm by the last period."""
    median = float(np.median(lengths))
    return f"{f'> {PERIODS}' if math.isinf(median) else f'{median:.0f}'} | {100 * np.isfinite(lengths).mean():.0f} %"


def count_false_alarms(
    row: tuple[int, int, int, float, float], periods: int, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Return how often a rate and a score are beyond a limit without drift: without and with the t quantile."""
    reference_patients, patients, images, correlation, share = row
    beyond = np.zeros(4)
    for _ in range(periods):
        flags, scores, groups = [], [], []
        for count in (reference_patients, patients):
            odds = 1 / correlation - 1
            chances = generator.beta(share * odds, (1 - share) * odds, count)
            flags.append((generator.random((count, images)) < chances[:, None]).ravel())
            noise = math.sqrt(1 - correlation) * generator.normal(size=(count, images))
            scores.append((math.sqrt(correlation) * generator.normal(size=(count, 1)) + noise).ravel())
            groups.append(np.repeat(np.arange(count), images))
        rate = build_rate_reference(flags[0], groups[0])
        score = build_score_reference(scores[0], groups[0])
        for index, known in enumerate((None, reference_patients)):
            options = {"false_alarms": LEVEL, "patients": known}
            beyond[index] += compare_rate(flags[1], rate, groups[1], **options).is_beyond
            beyond[2 + index] += compare_score(scores[1], score, groups[1], **options).is_beyond
    return tuple(beyond / periods)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 histories and 300 periods instead of 100 and 1,000")
    histories, periods = (30, 300) if parser.parse_args().quick else (100, 1000)
    generator = np.random.default_rng(SEED)
    print(f"{periods:,} periods per row; stated: {100 * LEVEL:g} %\n")
    columns = ("patients: reference, period", "images each", "correlation", "proportion")
    beyond = ("proportion beyond, without and with the t quantile", "score beyond, without and with")
    print(f"| {' | '.join((*columns, *beyond))} |\n|{' --- |' * 6}")
    for row in PATIENTS:
        cells = [f"{100 * value:.1f} %" for value in count_false_alarms(row, periods, generator)]
        settings = f"{row[0]}, {row[1]} | {row[2]} | {row[3]:g} | {row[4]:g}"
        print(f"| {settings} | {cells[0]}, {cells[1]} | {cells[2]}, {cells[3]} |", flush=True)
    print(f"\n{histories} histories per row\n")
    columns = ("lasting shift, standard deviations", "periods alone: median run length", "alarm within 60 periods")
    print(f"| {' | '.join((*columns, 'with averages: median run length', columns[2]))} |\n|{' --- |' * 5}")
    for shift in (0.0, 0.15, 0.25, 0.35, 0.5):
        alone, both = np.array([find_first_alarms(shift, generator) for _ in range(histories)]).T
        print(f"| {shift:g} | {format_run_length(alone)} | {format_run_length(both)} |", flush=True)


if __name__ == "__main__":
    main()
