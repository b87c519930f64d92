"""An augmented image follows from image, policy and seed, and from nothing else."""

import pickle

import numpy as np
import pytest
import yaml

from pylorus.config.schema import CONF, AugmentConfig
from pylorus.core.errors import PylorusError
from pylorus.data.augmentation import build_augmentation

POLICIES = [path.stem for path in sorted((CONF / "augment").glob("*.yaml")) if path.stem != "none"]
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def policy(name: str) -> AugmentConfig:
    return AugmentConfig(**yaml.safe_load((CONF / "augment" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_seed_gives_the_same_image_whatever_came_before(name):
    first, second = build_augmentation(policy(name)), build_augmentation(policy(name))
    for seed in range(7):
        second(IMAGE, seed + 100)
    np.random.seed(5)
    assert all(np.array_equal(first(IMAGE, seed), second(IMAGE, seed)) for seed in range(40))


@pytest.mark.parametrize("name", POLICIES)
def test_seeds_give_many_different_images(name):
    augment = build_augmentation(policy(name))
    assert len({augment(IMAGE, seed).tobytes() for seed in range(50)}) >= 40  # some draw no change


@pytest.mark.parametrize("name", POLICIES)
def test_size_and_kind_of_the_image_stay(name):
    found = build_augmentation(policy(name))(IMAGE, 1)
    assert found.shape == IMAGE.shape
    assert found.dtype == np.uint8


def test_an_augmentation_crosses_to_another_process():
    augment = build_augmentation(policy("endoscopy"))
    assert np.array_equal(pickle.loads(pickle.dumps(augment))(IMAGE, 9), augment(IMAGE, 9))


def test_no_transform_is_no_augmentation():
    assert build_augmentation(AugmentConfig()) is None


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ({"HorizontalFlop": {}}, 'albumentations has no "HorizontalFlop".*Did you mean "HorizontalFlip"'),
        ({"Compose": {}}, 'albumentations has no "Compose"'),
        ({"HorizontalFlip": {"prob": 0.5}}, "augment.transforms.HorizontalFlip: .*prob"),
        ({"HorizontalFlip": {"p": 2}}, "augment.transforms.HorizontalFlip: "),
    ],
)
def test_what_albumentations_lacks_is_refused_by_name(transforms, message):
    with pytest.raises(PylorusError, match=message):
        build_augmentation(AugmentConfig("mine", transforms))


def test_a_transform_that_changes_the_size_is_refused_when_it_acts():
    augment = build_augmentation(AugmentConfig("mine", {"Resize": {"height": 8, "width": 8}}))
    with pytest.raises(PylorusError, match="Remove transforms that resize"):
        augment(IMAGE, 0)
