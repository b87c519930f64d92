"""Augmentation by torch, in batches on the training device, gives the images of augmentation by OpenCV."""

import cv2
import numpy as np
import pytest
import torch

from pylorus.config.schema import AugmentConfig
from pylorus.data.augmentation import TRANSFORMS, build_augmentation, load_policy
from pylorus.data.device_augmentation import DeviceAugmentation, find_obstacle
from tests.waiting import WaitCounter

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ARGUMENTS = {
    "Affine": {"rotate": [-180, 180], "scale": [0.5, 2], "translate_percent": [-0.3, 0.3]},
    "RandomBrightnessContrast": {"brightness_limit": 0.5, "contrast_limit": 0.5},
    "ColorJitter": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.9, "hue": 0.5},
    "MotionBlur": {"blur_limit": [3, 11]},
    "GaussNoise": {"std_range": [0.01, 0.3]},
    "ImageCompression": {"quality_range": [5, 100]},
}


def build_policy(name: str) -> AugmentConfig:
    return load_policy(name) if name.islower() else AugmentConfig(name, {name: {"p": 1, **ARGUMENTS.get(name, {})}})


def make_frames(count: int, size: int) -> np.ndarray:
    """Return smooth images with some texture, one of noise, and one without color."""
    rng = np.random.default_rng(size)
    frames = [
        cv2.resize(rng.integers(0, 256, (7, 7, 3), np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)
        for _ in range(count)
    ]
    textured = np.stack(frames).astype(int) + rng.integers(-5, 6, (count, size, size, 3))
    textured[0] = rng.integers(0, 256, textured[0].shape)
    textured[1] = textured[1, ..., :1]
    return textured.clip(0, 255).astype(np.uint8)


def augment_on(device: str, policy: AugmentConfig, frames: np.ndarray, seeds: list[int]) -> np.ndarray:
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(device)
    return DeviceAugmentation(build_augmentation(policy))(images, seeds).permute(0, 2, 3, 1).cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize("name", [*TRANSFORMS, "light", "endoscopy"])
def test_a_batch_on_the_device_is_what_opencv_gives_for_the_same_seeds(device, size, name):
    policy, frames = build_policy(name), make_frames(16, size)
    augment = build_augmentation(policy)
    for first in (0, 1000, 2000):
        seeds = [first + number for number in range(len(frames))]
        expected = np.stack([augment(frame, seed) for frame, seed in zip(frames, seeds, strict=True)])
        difference = np.abs(augment_on(device, policy, frames, seeds).astype(int) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-4


@pytest.mark.parametrize("name", ["light", "endoscopy"])
def test_an_image_does_not_depend_on_the_others_of_its_batch(name):
    frames, seeds = make_frames(8, 32), list(range(8))
    together = augment_on("cpu", load_policy(name), frames, seeds)
    alone = [augment_on("cpu", load_policy(name), frames[row : row + 1], [row])[0] for row in range(8)]
    assert np.array_equal(together, np.stack(alone))


def test_the_images_given_stay_as_they_are_and_the_host_does_not_wait():
    images = torch.from_numpy(make_frames(8, 32)).permute(0, 3, 1, 2).contiguous()
    before, augment = images.clone(), DeviceAugmentation(build_augmentation(load_policy("endoscopy")))
    with WaitCounter() as counter:
        augment(images, list(range(8)))
    assert not counter.found
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["light", "endoscopy"])
def test_the_policies_of_pylorus_run_on_a_device(name):
    assert find_obstacle(build_augmentation(load_policy(name))) is None


def test_a_policy_with_a_function_of_the_user_runs_on_the_cpu():
    policy = AugmentConfig("mine", _target_="numpy.rot90")
    assert "runs on the CPU" in find_obstacle(build_augmentation(policy))


def test_rotations_of_opencv_4_are_in_steps_of_a_thirty_second_of_a_pixel(monkeypatch):
    frames, policy = make_frames(4, 40), build_policy("Affine")
    exact = augment_on("cpu", policy, frames, [0, 1, 2, 3])
    monkeypatch.setattr(cv2, "__version__", "4.12.0" if cv2.__version__ >= "5" else "5.0.0")
    other = augment_on("cpu", policy, frames, [0, 1, 2, 3])
    difference = np.abs(exact.astype(int) - other)
    assert 0 < difference.max() <= 2 * 255 / 32
