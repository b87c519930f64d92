"""Damaged files of every format give an image or a refusal: no process dies, hangs or fills the memory.

`python -m tests.data.fuzzing 1000` is the longer run, with its counts.
"""

import pytest

from tests.data.fuzzing import MUTATIONS, mutated, run
from tests.data.sample_files import samples

pytest.importorskip("resource", reason="limits of memory need POSIX")

NUMBERS = range(len(samples()) * len(MUTATIONS))  # every sample meets every mutation once


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_damaged_file_gives_an_image_or_a_refusal_in_time_and_in_memory():
    outcomes = run(NUMBERS)
    assert len(outcomes) == len(NUMBERS)
    assert [outcome for outcome in outcomes if outcome.verdict == "fault"] == []
    assert {outcome.mutation for outcome in outcomes} == set(MUTATIONS)


def test_a_mutation_can_be_reproduced():
    assert mutated(77) == mutated(77)
    assert mutated(77) != mutated(78)
