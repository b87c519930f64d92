"""Degraded frames: graded, deterministic, and only where they should be."""

import numpy as np
import pytest

from pylorus.data.degradation import (
    DEGRADATIONS,
    GRADES,
    degrade_image,
    draw_field_mask,
    find_surroundings,
    hide_region,
    isolate_region,
)
from pylorus.data.field_of_view import find_field
from pylorus.data.synthetic import generate_frame

IN_THE_FIELD = ("defocus", "motion", "dark", "bright", "vignetting", "white-balance", "noise", "highlights")


@pytest.fixture(scope="module")
def frame():
    return generate_frame("gastric_ulcer", seed=7, size=320).image


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_higher_grade_is_further_from_the_frame_as_it_is(frame, name):
    field = find_field(frame)
    inside = draw_field_mask(field, frame.shape) if name in (*IN_THE_FIELD, "jpeg") else np.ones(frame.shape[:2], bool)
    differences = [
        np.abs(degrade_image(frame, name, grade, field=field)[inside].astype(float) - frame[inside]).mean()
        for grade in range(1, GRADES + 1)
    ]
    assert differences[0] > 0
    assert differences == sorted(differences)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_content_grade_and_seed_determine_the_degraded_frame(frame, name):
    assert (degrade_image(frame, name, 3, seed=1) == degrade_image(frame.copy(), name, 3, seed=1)).all()


def test_another_seed_or_frame_gives_other_noise(frame):
    other = frame.copy()
    other[128, 128] ^= 1
    noise = degrade_image(frame, "noise", 3).astype(int) - frame
    assert (noise != degrade_image(frame, "noise", 3, seed=1).astype(int) - frame).mean() > 0.2
    assert (noise != degrade_image(other, "noise", 3).astype(int) - other).mean() > 0.2


@pytest.mark.parametrize("name", IN_THE_FIELD)
def test_light_is_changed_inside_the_field_only(frame, name):
    field = find_field(frame)
    outside = ~draw_field_mask(field, frame.shape)
    assert (degrade_image(frame, name, 5, field=field)[outside] == frame[outside]).all()


def test_a_grade_means_the_same_on_a_frame_of_another_size():
    losses = []
    for size in (192, 384):
        frame = generate_frame("gastric_ulcer", seed=7, size=size).image
        blurred = degrade_image(frame, "defocus", 4).astype(float)
        losses.append(np.abs(blurred - frame).mean())
    assert losses[0] == pytest.approx(losses[1], rel=0.25)


def test_two_stops_less_light_are_a_quarter_of_the_light():
    grey = np.full((64, 64, 3), 200, dtype=np.uint8)
    darker = degrade_image(grey, "dark", 4)  # 2.2 stops
    assert (darker / 255.0) ** 2.2 == pytest.approx((200 / 255) ** 2.2 / 2**2.2, rel=0.03)


def test_an_unknown_kind_or_grade_is_named(frame):
    with pytest.raises(ValueError, match='"fog"; expected one of defocus'):
        degrade_image(frame, "fog", 1)
    with pytest.raises(ValueError, match="grade 6"):
        degrade_image(frame, "dark", 6)


def test_a_corner_alone_keeps_its_mark_and_no_tissue(frame):
    marked = frame.copy()
    marked[4:20, 4:20] = (60, 200, 240)
    surroundings = find_surroundings(marked, find_field(marked))
    fill = np.array([120, 60, 50], dtype=np.uint8)
    alone = isolate_region(marked, surroundings, "top left", fill)
    assert (alone[4:20, 4:20] == (60, 200, 240)).all()
    assert (alone[surroundings.inside] == fill).all()
    blank = isolate_region(marked, surroundings, None, fill)
    assert (blank[~surroundings.inside] == 0).all()
    assert (alone[160:] == blank[160:]).all()
    assert (isolate_region(marked, surroundings, "top right", fill) == blank).all()


def test_a_hidden_border_loses_its_mark_and_keeps_the_tissue(frame):
    marked = frame.copy()
    marked[4:20, 4:20] = (60, 200, 240)
    surroundings = find_surroundings(marked, find_field(marked))
    hidden = hide_region(marked, surroundings, "border")
    assert (hidden[4:20, 4:20] == 0).all()
    assert (hidden[surroundings.inside] == frame[surroundings.inside]).all()
