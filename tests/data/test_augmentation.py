"""Pylorus's transforms give the same images as before, and those of albumentations for the same parameters."""

import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from pylorus.config.schema import CONF, AugmentConfig
from pylorus.core.errors import PylorusError
from pylorus.data import augmentation
from pylorus.data.augmentation import TRANSFORMS, build_augmentation

GOLDEN = Path(__file__).parent / "golden" / "augmentation.npz"
"""Written by `python -m tests.data.test_augmentation`; rewrite it only together with `augmentation.VERSION`."""

NUMBERS = {
    "HorizontalFlip": None,
    "D4": 5,
    "Affine": augmentation.AffineNumbers(rotate=27, scale_x=1.1, scale_y=0.9, shift_x=0.09, shift_y=-0.06),
    "RandomBrightnessContrast": augmentation.BrightnessContrastNumbers(factor=1.13, offset=-21.7),
    "ColorJitter": augmentation.ColorJitterNumbers(0.87, 1.17, 1.19, 0.027, order=(2, 0, 3, 1)),
    "MotionBlur": augmentation.MotionBlurNumbers(size=7, angle=31, direction=0.2, shift_x=0.4, shift_y=-0.3),
    "GaussNoise": augmentation.GaussNoiseNumbers(deviation=9.5, seed=11),
    "ImageCompression": 60,
}
SEEDS = (1, 2, 4)
POLICIES = ("light", "endoscopy")


def make_frame(size: int) -> np.ndarray:
    """Return a smooth, reddish image with an edge and some texture, from whole numbers alone."""
    y, x = np.mgrid[:size, :size]
    grey = 40 + 150 * (x + y) // (2 * size) + 7 * ((x * y) % 5) + 30 * (x > size // 2)
    return np.stack([grey + 20, grey * 2 // 3, grey // 2 + 40 * y // size], axis=-1).clip(0, 255).astype(np.uint8)


def load_policy(name: str) -> AugmentConfig:
    return AugmentConfig(**yaml.safe_load((CONF / "augment" / f"{name}.yaml").read_text()))


def make_images() -> dict[str, np.ndarray]:
    frame = make_frame(24)
    images = {name: TRANSFORMS[name].apply(frame, numbers) for name, numbers in NUMBERS.items()}
    for policy in POLICIES:
        apply = build_augmentation(load_policy(policy))
        images |= {f"{policy}-{seed}": apply(frame, seed) for seed in SEEDS}
    return images


def build(name: str, **arguments: object) -> augmentation.Augmentation:
    built = build_augmentation(AugmentConfig("mine", {name: arguments}))
    assert built is not None
    return built


FRAME = make_frame(97)
"""No multiple of a SIMD register or of a JPEG block."""


def test_every_transform_of_pylorus_has_golden_images():
    assert set(np.load(GOLDEN)) == set(make_images())
    assert set(NUMBERS) == set(TRANSFORMS)


@pytest.mark.parametrize("name", [*NUMBERS, *(f"{policy}-{seed}" for policy in POLICIES for seed in SEEDS)])
def test_an_image_is_the_golden_one(name):
    """At most 2 % of the values differ, by one grey level: OpenCV's float paths may round differently elsewhere."""
    if cv2.__version__ < "5" and (name == "Affine" or name.split("-")[0] in POLICIES):
        pytest.skip("OpenCV 4 interpolates at thirty-seconds of a pixel: up to 7 grey levels from OpenCV 5")
    difference = np.abs(make_images()[name].astype(int) - np.load(GOLDEN)[name])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.02


@pytest.mark.parametrize("name", NUMBERS)
def test_a_transform_leaves_its_argument_and_every_global_generator_alone(name):
    image = make_frame(60)
    image.flags.writeable = False
    before = np.random.get_state()[1].tobytes()
    first = build(name, p=1)(image, 3)
    assert np.array_equal(first, build(name, p=1)(image, 3))
    assert np.random.get_state()[1].tobytes() == before
    assert np.array_equal(image, make_frame(60))
    assert first.dtype == np.uint8
    assert first.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("name", NUMBERS)
def test_p_is_the_probability_of_a_change(name):
    assert all(np.array_equal(build(name, p=0)(FRAME, seed), FRAME) for seed in range(20))
    arguments = {"rotate": [5, 9]} if name == "Affine" else {}
    arguments |= {"quality_range": [50, 60]} if name == "ImageCompression" else {}
    half = build(name, p=0.5, **arguments)
    changed = sum(not np.array_equal(half(FRAME, seed), FRAME) for seed in range(200))
    unchanged_by_chance = 0.5 / 8 if name == "D4" else 0
    assert abs(changed / 200 - 0.5 + unchanged_by_chance) < 0.12  # 3.4 standard errors


def test_numbers_fill_their_ranges_and_stay_inside():
    rng = np.random.default_rng(0)
    drawn = [
        augmentation.draw_affine(rng, rotate=(-45, 45), scale=(0.8, 1.2), translate_percent=(0, 0.1))
        for _ in range(999)
    ]
    for key, low, high in (("rotate", -45, 45), ("scale_x", 0.8, 1.2), ("scale_y", 0.8, 1.2), ("shift_y", 0, 0.1)):
        values = np.array([getattr(numbers, key) for numbers in drawn])
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    assert {augmentation.draw_motion_blur(rng, blur_limit=(3, 7)).size for _ in range(99)} == {3, 5, 7}
    assert {augmentation.draw_image_compression(rng, quality_range=(50, 53)) for _ in range(99)} == {50, 51, 52, 53}
    assert {augmentation.draw_d4(rng) for _ in range(199)} == set(range(8))


def test_noise_has_the_deviation_asked_for_and_no_mean():
    grey = np.full((200, 200, 3), 128, dtype=np.uint8)
    noise = augmentation.apply_gauss_noise(grey, augmentation.GaussNoiseNumbers(10.0, seed=5)).astype(float) - 128
    assert abs(noise.mean()) < 0.12
    assert noise.std() == pytest.approx(10, rel=0.02)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Affine", {"rotate": [1, 2, 3]}, "rotate: found .*expected two numbers"),
        ("Affine", {"scale": [0, 1]}, r"scale: found \[0, 1\], expected numbers from 0.01 to 100"),
        ("Affine", {"rotate": [0, float("nan")]}, "rotate: found"),
        ("ColorJitter", {"hue": [-1, 0]}, "hue: found .* from -0.5 to 0.5"),
        ("MotionBlur", {"blur_limit": [3, 6]}, "blur_limit: found .*odd"),
        ("ImageCompression", {"quality_range": [50.5, 60]}, "quality_range: found .*whole"),
        ("GaussNoise", {"std_range": 0.1}, "std_range: found 0.1, expected two numbers"),
        ("D4", {"p": -0.1}, "p: found -0.1, expected a number from 0 to 1"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_expected(name, arguments, message):
    with pytest.raises(PylorusError, match=f"augment.transforms.{name}: {message}"):
        build(name, **arguments)


@pytest.mark.slow
def test_the_policies_of_pylorus_do_not_import_albumentations():
    program = f"""
import sys
import numpy as np, pandas as pd, yaml
from pylorus.config.schema import CONF, AugmentConfig
from pylorus.data.dataset import Draw, ImageDataset
class Form:
    size = 32
    def load_images(self, paths): return np.zeros((len(paths), 32, 32, 3), np.uint8)
from pathlib import Path
table = pd.DataFrame({{"path": ["a", "b"], "sample_id": ["a", "b"], "label": [0, 1]}})
for name in {["none", *POLICIES]}:
    policy = AugmentConfig(**yaml.safe_load((CONF / "augment" / f"{{name}}.yaml").read_text()))
    dataset = ImageDataset(table, Path("."), Form(), policy=policy, seed=1)
    for view in range(30):
        assert dataset.__getitems__([Draw(0, view), Draw(1, view)]).image.shape == (2, 3, 32, 32)
print(sorted(name for name in sys.modules if name.startswith("albu")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_other_transforms_are_those_of_albumentations_at_their_position():
    mixed = build_augmentation(
        AugmentConfig("mine", {"HorizontalFlip": {"p": 1}, "Posterize": {"num_bits": [2, 2], "p": 1}, "D4": {"p": 0}})
    )
    assert mixed is not None
    flipped = FRAME[:, ::-1]
    assert np.array_equal(mixed(FRAME, 7), flipped & 0b11000000)
    assert np.array_equal(mixed(FRAME, 7), mixed(FRAME, 8))


def test_transforms_of_albumentations_repeat_by_seed_and_are_independent_of_each_other():
    two = build_augmentation(AugmentConfig("mine", {"VerticalFlip": {"p": 0.5}, "Transpose": {"p": 0.5}}))
    assert two is not None
    images = [two(FRAME, seed).tobytes() for seed in range(60)]
    assert images == [two(FRAME, seed).tobytes() for seed in range(60)]
    assert len(set(images)) == 4


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("albumentations.HorizontalFlip", {"p": 1}),
        ("Affine", {"shear": [10, 10], "p": 1}),
        ("Affine", {"fit_output": True}),
    ],
)
def test_prefix_and_arguments_that_pylorus_lacks_name_albumentations(name, arguments):
    (step,) = build(name, **arguments)._steps
    assert type(step.composed).__module__.startswith("albumentations")


def test_without_albumentations_the_policies_work_and_its_transforms_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    assert all(build_augmentation(load_policy(policy)) is not None for policy in POLICIES)
    with pytest.raises(PylorusError, match='HorizontalFlop: needs albumentations.*Did you mean "HorizontalFlip"'):
        build("HorizontalFlop")


class TestAgainstAlbumentations:
    """One grey level of difference where Pylorus rounds and albumentations truncates."""

    def test_affine_equals_albumentations(self):
        import albumentations

        rng = np.random.default_rng(0)
        for _ in range(20):
            numbers = augmentation.draw_affine(rng, rotate=(-45, 45), scale=(0.8, 1.2), translate_percent=(-0.1, 0.1))
            theirs = albumentations.Affine(
                rotate=(numbers.rotate,) * 2,
                scale={"x": (numbers.scale_x,) * 2, "y": (numbers.scale_y,) * 2},
                translate_percent={"x": (numbers.shift_x,) * 2, "y": (numbers.shift_y,) * 2},
                p=1,
            )
            difference = augmentation.apply_affine(FRAME, numbers).astype(int) - theirs(image=FRAME)["image"]
            assert np.abs(difference).max() <= 1

    def test_d4_equals_albumentations(self):
        from albumentations.augmentations.geometric.functional import d4

        theirs = {d4(FRAME, member).tobytes() for member in ("e", "r90", "r180", "r270", "v", "hvt", "h", "t")}
        assert {augmentation.apply_d4(FRAME, symmetry).tobytes() for symmetry in range(8)} == theirs

    def test_brightness_and_contrast_equal_albumentations(self):
        import albumentations

        theirs = albumentations.RandomBrightnessContrast((0.05, 0.05), (-0.07, -0.07), p=1)(image=FRAME)["image"]
        ours = augmentation.apply_brightness_contrast(FRAME, augmentation.BrightnessContrastNumbers(0.93, 0.05 * 255))
        difference = ours.astype(int) - theirs
        assert difference.min() >= 0
        assert difference.max() <= 1

    @pytest.mark.parametrize("levels", [(0.8, 1, 1, 0), (1.2, 1, 1, 0), (1, 0.8, 1, 0), (1, 1.2, 1, 0), (1, 1, 1.2, 0)])
    def test_color_jitter_equals_albumentations(self, levels):
        import albumentations

        theirs = albumentations.ColorJitter(*((level, level) for level in levels), p=1)(image=FRAME)["image"]
        ours = augmentation.apply_color_jitter(FRAME, augmentation.ColorJitterNumbers(*levels))
        assert np.abs(ours.astype(int) - theirs).max() <= 1

    def test_hue_equals_albumentations_within_its_rounding(self):
        import albumentations

        theirs = albumentations.ColorJitter((1, 1), (1, 1), (1, 1), (5 / 180, 5 / 180), p=1)(image=FRAME)["image"]
        ours = augmentation.apply_color_jitter(FRAME, augmentation.ColorJitterNumbers(hue=5 / 180))
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.max() <= 4
        assert difference.mean() < 1
        assert np.abs(ours.astype(int) - FRAME).mean() > 4

    def test_motion_blur_equals_albumentations(self):
        import albumentations
        from albumentations.augmentations.blur.functional import create_motion_kernel

        class Shifts:
            def __init__(self, *values):
                self.values = list(values)

            def uniform(self, low, high):
                return self.values.pop(0)

        rng = np.random.default_rng(0)
        for _ in range(30):
            one = augmentation.draw_motion_blur(rng, blur_limit=(3, 7))
            kernel = create_motion_kernel(one.size, one.angle, one.direction, True, Shifts(one.shift_x, one.shift_y))
            theirs = albumentations.MotionBlur(p=1).apply(FRAME, kernel / kernel.sum())
            assert np.abs(augmentation.apply_motion_blur(FRAME, one).astype(int) - theirs).max() <= 1

    def test_compression_equals_albumentations_with_swapped_channels(self):
        import albumentations

        theirs = albumentations.ImageCompression(quality_range=(60, 60), p=1)(image=FRAME[..., ::-1].copy())["image"]
        assert np.abs(augmentation.apply_image_compression(FRAME, 60).astype(int) - theirs[..., ::-1]).max() <= 1

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_policy_has_the_same_distribution(self, policy):
        import albumentations

        transforms = load_policy(policy).transforms
        theirs = albumentations.Compose([getattr(albumentations, name)(**args) for name, args in transforms.items()])
        ours = build_augmentation(load_policy(policy))
        assert ours is not None
        theirs.set_random_seed(0)
        image = make_frame(64)
        samples = {
            "ours": np.array([summarize(ours(image, seed)) for seed in range(600)]),
            "theirs": np.array([summarize(theirs(image=image)["image"]) for _ in range(600)]),
        }
        error = np.sqrt(sum(sample.var(axis=0) / 600 for sample in samples.values()))
        # Means: truncation darkens theirs by up to half a grey level in each of several transforms.
        assert (np.abs(samples["ours"].mean(axis=0) - samples["theirs"].mean(axis=0)) < 4 * error + 0.75).all()
        spread = samples["ours"].std(axis=0) / samples["theirs"].std(axis=0)
        assert (np.abs(spread - 1) < 0.2).all(), spread


def summarize(image: np.ndarray) -> list[float]:
    """Return mean of each channel, black share, spread of grey levels and sharpness, all in grey levels."""
    levels = image.astype(float)
    sharpness = np.abs(np.diff(levels, axis=1)).mean()
    return [*levels.mean(axis=(0, 1)), 255 * (image.max(axis=-1) == 0).mean(), levels.std(), sharpness]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **make_images())


NAMED_POLICIES = [path.stem for path in sorted((CONF / "augment").glob("*.yaml")) if path.stem != "none"]
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def policy(name: str) -> AugmentConfig:
    return AugmentConfig(**yaml.safe_load((CONF / "augment" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", NAMED_POLICIES)
def test_an_augmented_image_depends_only_on_image_and_seed(name):
    first, second = build_augmentation(policy(name)), build_augmentation(policy(name))
    for seed in range(7):
        second(IMAGE, seed + 100)
    np.random.seed(5)
    assert all(np.array_equal(first(IMAGE, seed), second(IMAGE, seed)) for seed in range(40))


@pytest.mark.parametrize("name", NAMED_POLICIES)
def test_seeds_give_many_different_images(name):
    augment = build_augmentation(policy(name))
    assert len({augment(IMAGE, seed).tobytes() for seed in range(50)}) >= 40  # some draw no change


@pytest.mark.parametrize("name", NAMED_POLICIES)
def test_size_and_kind_of_the_image_stay(name):
    found = build_augmentation(policy(name))(IMAGE, 1)
    assert found.shape == IMAGE.shape
    assert found.dtype == np.uint8


def test_an_augmentation_can_be_pickled():
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
def test_a_transform_unknown_to_albumentations_is_refused(transforms, message):
    with pytest.raises(PylorusError, match=message):
        build_augmentation(AugmentConfig("mine", transforms))


def test_a_transform_that_changes_the_size_is_refused_when_it_acts():
    augment = build_augmentation(AugmentConfig("mine", {"Resize": {"height": 8, "width": 8}}))
    with pytest.raises(PylorusError, match="Remove transforms that resize"):
        augment(IMAGE, 0)
