"""Text and plates that a console draws over the mucosa are covered, and mucosa is not."""

import dataclasses

import cv2
import numpy as np
import pytest

from pylorus.data.overlays import cover_overlays, find_overlays
from tests.data.device_frames import LAYOUTS, draw_frame

WITH_TEXT = ("whole with text", "octagon, cropped, scope map", "rounded rectangle", "round, cut by the frame")


@pytest.mark.parametrize("layout", WITH_TEXT)
def test_text_is_found_and_covered_where_it_lies_over_the_field(layout):
    drawn = left = 0
    for seed in (0, 5, 10, 15):
        frame = draw_frame(layout, seed)
        overlays = find_overlays(frame.image)
        covered = overlays.draw_mask(frame.image.shape)
        assert len(overlays.text) > 0
        assert (covered & frame.field & ~frame.overlay).sum() <= 0.09 * frame.field.sum()
        drawn, left = drawn + int(frame.overlay.sum()), left + int((frame.overlay & ~covered).sum())
    assert left <= 0.12 * drawn


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mucosa_with_reflections_instruments_and_folds_is_not_covered(layout, monkeypatch):
    monkeypatch.setitem(LAYOUTS, layout, dataclasses.replace(LAYOUTS[layout], texts=("none",), inset="none"))
    frame = draw_frame(layout, 15, longest=1280)
    assert not find_overlays(frame.image)
    assert cover_overlays(frame.image, find_overlays(frame.image)) is frame.image


def test_a_scope_map_is_covered_with_black_and_all_else_but_text_stays():
    frame = draw_frame("octagon, cropped, scope map", 5)
    overlays = find_overlays(frame.image)
    [(left, top, right, bottom)] = overlays.plates
    before = frame.image.copy()
    covered = cover_overlays(frame.image, overlays)
    assert np.array_equal(frame.image, before)
    assert not covered[top:bottom, left:right].any()
    untouched = ~overlays.draw_mask(frame.image.shape)
    assert np.array_equal(covered[untouched], frame.image[untouched])


def test_text_on_even_ground_leaves_no_trace():
    image = np.full((480, 640, 3), (180, 90, 70), np.uint8)
    even = image.copy()
    for row, text in enumerate(("25/09/2013", "10:45:03", "ID:12345678")):
        cv2.putText(image, text, (20, 80 + 24 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    covered = cover_overlays(image, find_overlays(image))
    assert np.abs(covered.astype(int) - even).max() <= 2


def test_reflections_of_different_sizes_are_not_text():
    image = np.full((480, 640, 3), (180, 90, 70), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(120):
        centre, axes = rng.integers(10, 470, 2).tolist(), rng.integers(2, 9, 2).tolist()
        cv2.ellipse(image, centre, axes, float(rng.uniform(0, 180)), 0, 360, (250, 250, 245), -1, cv2.LINE_AA)
    assert len(find_overlays(image).text) == 0


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 2000, 3), (2000, 3, 3), (40, 40, 3), (1001, 3, 3)])
def test_images_of_any_size_are_searched(shape):
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    assert cover_overlays(image, find_overlays(image)).shape == shape


def test_the_same_frame_is_covered_in_the_same_way():
    frame = draw_frame("whole with text", 0)
    first, second = (cover_overlays(frame.image, find_overlays(frame.image)) for _ in range(2))
    assert np.array_equal(first, second)
