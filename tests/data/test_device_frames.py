"""The frames of devices are the same for the same arguments, and their masks say what was drawn where."""

import numpy as np
import pytest

from tests.data.device_frames import LAYOUTS, draw_frame

LONGEST = 480


def test_there_are_at_least_twelve_layouts():
    assert len(LAYOUTS) >= 12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_arguments_give_the_same_frame_and_another_seed_gives_another(layout):
    first, second, other = (draw_frame(layout, seed, longest=LONGEST) for seed in (3, 3, 4))
    assert np.array_equal(first.image, second.image)
    assert not np.array_equal(first.image, other.image)
    for name in ("field", "overlay", "text"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frames_of_one_device_share_their_field_and_devices_differ(layout):
    one, two, other = (
        draw_frame(layout, seed, device=device, longest=LONGEST) for seed, device in ((1, 5), (2, 5), (1, 6))
    )
    assert np.array_equal(one.field, two.field)
    assert one.device == two.device != other.device
    assert layout.startswith("whole") or not np.array_equal(one.field, other.field)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_of_the_frames_size_and_overlays_lie_over_the_field(layout):
    frame = draw_frame(layout, 8, longest=LONGEST)
    assert frame.image.dtype == np.uint8
    assert frame.image.shape == (*frame.field.shape, 3)
    assert not (frame.overlay & ~frame.field).any()
    assert not (frame.text & frame.field).any()
    assert 0.15 < frame.field.mean() <= 1


def test_text_and_insets_over_the_field_are_in_the_overlay_mask():
    frames = [draw_frame("octagon, cropped, scope map", seed) for seed in range(0, 20, 5)]
    assert all(0.08 < frame.overlay.sum() / frame.field.sum() < 0.3 for frame in frames)
    assert not draw_frame("whole", 1, longest=LONGEST).overlay.any()
