"""Augment RGB images at random: Pylorus's own transforms on OpenCV, and the interface to those of albumentations.

An augmented image is a pure function of the image, the policy and a seed. Each transform of Pylorus is a pair of
functions: `draw_…` draws its numbers from a generator, `apply_…` is a pure function of an image and these numbers. An
image is RGB, uint8 of shape (size, size, 3), before and after. No function writes to its argument or reads or changes a
global state. Names, arguments, defaults and distributions are those of albumentations 2.0.8, with these differences:

* Grey levels are rounded, not truncated, so that brightness, contrast, hue and noise have no bias of half a step.
* Saturation factors are multiples of 1/256, and hues are not rounded to steps of two degrees.
* JPEG compression takes the image as RGB; albumentations swaps red and blue, and with them the luma weights.

Another processor may round rotations and hues differently, by one grey level in few values, which compression may
enlarge. OpenCV 4 interpolates rotations more coarsely than OpenCV 5.

To add a transform, write its two functions and add a line to TRANSFORMS.
"""

import functools
import importlib.util
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from omegaconf import OmegaConf

from pylorus.config.instantiation import TARGET, build_callable, get_object, get_target
from pylorus.config.schema import CONF, AugmentConfig, StageConfig
from pylorus.core.errors import PylorusError, format_suggestion
from pylorus.data.files import RGB

Range = tuple[float, float]
Step = Callable[[RGB, Generator], RGB]
"""One transform with its arguments: takes from the generator whatever it draws."""

VERSION = 1
"""Increase it when a transform gives another image for the same seed: features of augmented images are cached."""

ALBUMENTATIONS = "albumentations."
"""Before a name in `augment.transforms`: the transform of albumentations, even where Pylorus has one of that name."""


def draw_nothing(rng: Generator) -> None:
    """Draw no numbers, for a transform that has none."""


def apply_horizontal_flip(image: RGB, numbers: None = None) -> RGB:
    """Mirror an image left to right."""
    return _as_rgb(cv2.flip(image, 1))


def draw_d4(rng: Generator) -> int:
    """Draw one of the square's eight symmetries, in [0, 8)."""
    return int(rng.integers(8))


def apply_d4(image: RGB, symmetry: int) -> RGB:
    """Turn an image by `symmetry % 4` quarter turns clockwise, and then mirror it left to right if `symmetry >= 4`."""
    turns = (None, cv2.ROTATE_90_CLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_COUNTERCLOCKWISE)[symmetry % 4]
    turned = image if turns is None else cv2.rotate(image, turns)
    return _as_rgb(turned if symmetry < 4 else cv2.flip(turned, 1))


@dataclass(frozen=True)
class AffineNumbers:
    """Rotation in degrees counterclockwise, scale factors (above 1 enlarges) and shift as a proportion of the size."""

    rotate: float = 0.0
    scale_x: float = 1.0
    scale_y: float = 1.0
    shift_x: float = 0.0
    shift_y: float = 0.0


def draw_affine(rng: Generator, *, rotate: Range, scale: Range, translate_percent: Range) -> AffineNumbers:
    """Draw each number from the uniform distribution over its range; x and y are independent."""
    ranges = (rotate, scale, scale, translate_percent, translate_percent)
    return AffineNumbers(*(rng.uniform(*bounds) for bounds in ranges))


def apply_affine(image: RGB, numbers: AffineNumbers) -> RGB:
    """Scale and rotate an image about its center, and shift it by whole pixels; bilinear, black outside the image."""
    height, width = image.shape[:2]
    matrix = compute_affine_matrix(numbers, width, height)
    warped = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return _as_rgb(warped)


def compute_affine_matrix(numbers: AffineNumbers, width: int, height: int) -> NDArray[np.float64]:
    """Return the matrix of shape (2, 3) that maps a pixel (x, y, 1) of the image to where it lies afterwards."""
    cos, sin = math.cos(math.radians(numbers.rotate)), math.sin(math.radians(numbers.rotate))
    linear = np.array([[cos, sin], [-sin, cos]]) @ np.diag([numbers.scale_x, numbers.scale_y])
    center = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = np.array([int(numbers.shift_x * width), int(numbers.shift_y * height)])
    return np.column_stack([linear, center + shift - linear @ center])


@dataclass(frozen=True)
class BrightnessContrastNumbers:
    """Factor on each grey level, and what is then added, in grey levels."""

    factor: float = 1.0
    offset: float = 0.0


def draw_brightness_contrast(
    rng: Generator, *, brightness_limit: Range, contrast_limit: Range
) -> BrightnessContrastNumbers:
    """Draw the contrast factor minus 1, and the brightness as a proportion of 255 grey levels."""
    return BrightnessContrastNumbers(1 + rng.uniform(*contrast_limit), 255 * rng.uniform(*brightness_limit))


def apply_brightness_contrast(image: RGB, numbers: BrightnessContrastNumbers) -> RGB:
    """Map each grey level v to `factor · v + offset`."""
    return _map_levels(image, numbers.factor, numbers.offset)


@dataclass(frozen=True)
class ColorJitterNumbers:
    """Factors of brightness, contrast and saturation, the shift of the hue in turns, and the order of the four."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    order: tuple[int, ...] = (0, 1, 2, 3)


def draw_color_jitter(
    rng: Generator, *, brightness: Range, contrast: Range, saturation: Range, hue: Range
) -> ColorJitterNumbers:
    """Draw each number from the uniform distribution over its range, and a random order."""
    b, c, s, h = (rng.uniform(*bounds) for bounds in (brightness, contrast, saturation, hue))
    return ColorJitterNumbers(b, c, s, h, order=tuple(rng.permutation(4).tolist()))


def apply_color_jitter(image: RGB, numbers: ColorJitterNumbers) -> RGB:
    """Change brightness, contrast about the mean grey level, saturation and hue, in the order that was drawn."""
    functions = (_map_levels, _scale_contrast, _scale_saturation, _shift_hue)
    levels = (numbers.brightness, numbers.contrast, numbers.saturation, numbers.hue)
    for index in numbers.order:
        image = functions[index](image, levels[index])
    return image


def _scale_contrast(image: RGB, factor: float) -> RGB:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return _map_levels(image, factor, (1 - factor) * int(grey.sum(dtype=np.int64)) / grey.size)


def _scale_saturation(image: RGB, factor: float) -> RGB:
    # Multiples of 1/256 are exact in OpenCV's float32, so that processors with and without fused operations agree.
    factor = round(256 * factor) / 256
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _as_rgb(cv2.addWeighted(image, factor, grey, 1 - factor, 0.0))


def _shift_hue(image: RGB, turns: float) -> RGB:
    # In float32: OpenCV's 8-bit conversion rounds or truncates depending on the width of the processor's registers.
    hsv: Any = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    hue = hsv[..., 0]
    hue += 360 * (turns % 1)
    hue[hue >= 360] -= 360
    return _as_rgb(cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)))


@dataclass(frozen=True)
class MotionBlurNumbers:
    """Odd size of the kernel in pixels, angle in degrees, and where on the line the kernel lies.

    `direction` is in [-1, 1]: from -1, behind the pixel alone, over 0, symmetric, to 1, before the pixel alone.
    The shifts, in [-1, 1], move the line by up to a quarter of the kernel.
    """

    size: int = 3
    angle: float = 0.0
    direction: float = 0.0
    shift_x: float = 0.0
    shift_y: float = 0.0


def draw_motion_blur(rng: Generator, *, blur_limit: Range) -> MotionBlurNumbers:
    """Draw an odd size from `blur_limit`, both ends included, and the other numbers uniformly from all they can be."""
    smallest, largest = int(blur_limit[0]), int(blur_limit[1])
    size = smallest + 2 * int(rng.integers((largest - smallest) // 2 + 1))
    return MotionBlurNumbers(size, rng.uniform(0, 360), *rng.uniform(-1, 1, size=3).tolist())


def apply_motion_blur(image: RGB, numbers: MotionBlurNumbers) -> RGB:
    """Average an image along a line; at its border it is mirrored, without repeating the last pixel."""
    kernel = compute_motion_kernel(numbers)
    # The sums are whole numbers, exact in float32 whatever the order in which a processor adds them.
    count = int(kernel.sum())
    sums = cv2.filter2D(image, cv2.CV_16S, kernel, borderType=cv2.BORDER_REFLECT_101)
    return ((sums + np.int16(count // 2)) // np.int16(count)).astype(np.uint8)


def compute_motion_kernel(numbers: MotionBlurNumbers) -> NDArray[np.float32]:
    """Return the pixels of the line: float32 of shape (size, size), 1 on the line and 0 elsewhere."""
    half = numbers.size // 2
    start = -half * (1 - max(numbers.direction, 0.0))
    end = half * (1 + min(numbers.direction, 0.0))
    along = np.linspace(start, end, numbers.size)
    angle = math.radians(numbers.angle)
    columns = half + math.cos(angle) * along + numbers.shift_x * half / 2
    rows = half + math.sin(angle) * along + numbers.shift_y * half / 2
    kernel = np.zeros((numbers.size, numbers.size), dtype=np.float32)
    last = numbers.size - 1
    kernel[np.rint(rows).clip(0, last).astype(int), np.rint(columns).clip(0, last).astype(int)] = 1
    return kernel


@dataclass(frozen=True)
class GaussNoiseNumbers:
    """Standard deviation of the noise, in grey levels, and the seed of its values, in [0, 2^63)."""

    deviation: float = 0.0
    seed: int = 0


def draw_gauss_noise(rng: Generator, *, std_range: Range) -> GaussNoiseNumbers:
    """Draw the standard deviation, given as a proportion of 255 grey levels, and a seed."""
    return GaussNoiseNumbers(255 * rng.uniform(*std_range), int(rng.integers(1 << 63, dtype=np.uint64)))


def apply_gauss_noise(image: RGB, numbers: GaussNoiseNumbers) -> RGB:
    """Add noise that is independent in each pixel and channel.

    The values are looked up in 65,536 quantiles of the normal distribution, by whole numbers from the generator's bit
    stream, which NumPy keeps the same in all versions. None is over 4.4 standard deviations.
    """
    levels = np.rint(numbers.deviation * compute_normal_quantiles()).astype(np.int16)
    noise = levels[draw_quantile_indices(numbers.seed, image.size)].reshape(image.shape)
    return _as_rgb(cv2.add(image, noise, dtype=cv2.CV_8U))


def draw_quantile_indices(seed: int, count: int) -> NDArray[np.uint16]:
    """Draw `count` indices of `compute_normal_quantiles`."""
    bits = np.random.PCG64(seed).random_raw((count + 3) // 4)
    return np.asarray(bits).astype("<u8", copy=False).view("<u2")[:count]


@functools.cache
def compute_normal_quantiles() -> NDArray[np.float64]:
    """Return the quantiles of the normal distribution at 65,536 evenly spaced probabilities."""
    from scipy.special import ndtri

    return np.asarray(ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)))


def draw_image_compression(rng: Generator, *, quality_range: Range) -> int:
    """Draw the quality of a JPEG file, in [1, 100], both ends of the range included."""
    return int(rng.integers(int(quality_range[0]), int(quality_range[1]), endpoint=True))


def apply_image_compression(image: RGB, quality: int) -> RGB:
    """Compress an image as JPEG and decode it again."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded: Any = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    return _as_rgb(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))


def _map_levels(image: RGB, factor: float, offset: float = 0.0) -> RGB:
    levels = np.rint(np.arange(256) * factor + offset).clip(0, 255).astype(np.uint8)
    return _as_rgb(cv2.LUT(image, levels))


def _as_rgb(image: Any) -> RGB:
    """Tell the type checker what OpenCV's stubs leave open."""
    return image  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Argument:
    """A range from which a number is drawn: two numbers in [low, high], or one number where `expand` makes it a range.

    Both are `remainder` modulo `step`, where there is a step.
    """

    default: Range
    low: float = -math.inf
    high: float = math.inf
    expand: Callable[[float], Range] | None = None
    step: int = 0
    remainder: int = 0

    def parse(self, value: Any) -> Range:
        """Return the range of a value in the configuration, the smaller number first.

        Raises:
            ValueError: If it is no such range.
        """
        pair = self.expand(value) if self.expand and isinstance(value, int | float) else value
        if isinstance(pair, int | float) or len(pair) != 2:
            raise ValueError(f"found {value}, expected two numbers")
        first, second = sorted(pair)
        if not (math.isfinite(first) and math.isfinite(second) and self.low <= first and second <= self.high):
            raise ValueError(f"found {value}, expected numbers from {self.low:g} to {self.high:g}")
        if self.step and any(number % self.step != self.remainder for number in pair):
            raise ValueError(f"found {value}, expected {'odd' if self.step == 2 else 'whole'} numbers")
        return first, second


@dataclass(frozen=True)
class Transform:
    """A transform of Pylorus: `draw(generator, **ranges)` gives the numbers of `apply(image, numbers)`."""

    draw: Callable[..., Any]
    apply: Callable[[RGB, Any], RGB]
    arguments: Mapping[str, Argument] = field(default_factory=dict)


_SHIFT = Argument((0, 0), expand=lambda value: (value, value))
_SCALE = Argument((1, 1), 0.01, 100, lambda value: (value, value))
_LIMIT = Argument((-0.2, 0.2), expand=lambda value: (-value, value))
_FACTOR = Argument((0.8, 1.2), 0, expand=lambda value: (max(1 - value, 0), 1 + value))
_HUE = Argument((-0.5, 0.5), -0.5, 0.5, lambda value: (-value, value))
_BLUR = Argument((3, 7), 3, 127, lambda value: (3, value), step=2, remainder=1)
_QUALITY = Argument((99, 100), 1, 100, step=1)

TRANSFORMS: dict[str, Transform] = {
    "HorizontalFlip": Transform(draw_nothing, apply_horizontal_flip),
    "D4": Transform(draw_d4, apply_d4),
    "Affine": Transform(
        draw_affine,
        apply_affine,
        {"rotate": _SHIFT, "scale": _SCALE, "translate_percent": _SHIFT},
    ),
    "RandomBrightnessContrast": Transform(
        draw_brightness_contrast, apply_brightness_contrast, {"brightness_limit": _LIMIT, "contrast_limit": _LIMIT}
    ),
    "ColorJitter": Transform(
        draw_color_jitter,
        apply_color_jitter,
        {"brightness": _FACTOR, "contrast": _FACTOR, "saturation": _FACTOR, "hue": _HUE},
    ),
    "MotionBlur": Transform(draw_motion_blur, apply_motion_blur, {"blur_limit": _BLUR}),
    "GaussNoise": Transform(draw_gauss_noise, apply_gauss_noise, {"std_range": Argument((0.2, 0.44), 0, 1)}),
    "ImageCompression": Transform(draw_image_compression, apply_image_compression, {"quality_range": _QUALITY}),
}
"""Pylorus's transforms by their name in `augment.transforms`. Each also has `p`, its probability, 0.5 by default."""


@dataclass(frozen=True)
class OwnStep:
    """A transform of Pylorus with its arguments.

    Attributes:
        name: Its name in TRANSFORMS.
        ranges: The range of each argument.
        p: Its probability.
    """

    name: str
    ranges: Mapping[str, Range]
    p: float

    def draw(self, rng: Generator) -> tuple[bool, Any]:
        """Draw whether the transform is applied, and its numbers if it is."""
        if rng.random() >= self.p:
            return False, None
        return True, TRANSFORMS[self.name].draw(rng, **self.ranges)

    def __call__(self, image: RGB, rng: Generator) -> RGB:
        """Augment an image with what is drawn from the generator."""
        is_applied, numbers = self.draw(rng)
        return TRANSFORMS[self.name].apply(image, numbers) if is_applied else image


@dataclass(frozen=True)
class _AlbumentationsStep:
    composed: Any

    def __call__(self, image: RGB, rng: Generator) -> RGB:
        # albumentations has a generator of its own, which would repeat itself in every worker and epoch.
        self.composed.set_random_seed(int(rng.integers(1 << 32)))
        augmented: RGB = self.composed(image=image)["image"]
        return augmented


@dataclass(frozen=True)
class _ExternalStep:
    function: Callable[[RGB, int], RGB]

    def __call__(self, image: RGB, rng: Generator) -> RGB:
        augmented: RGB = self.function(image.copy(), int(rng.integers(1 << 63)))
        return augmented


def create_generator(seed: int) -> Generator:
    """Return the generator from which an augmented image's numbers are drawn, for a seed in [0, 2^63)."""
    return np.random.Generator(np.random.PCG64(seed))


class Augmentation:
    """Returns the augmented image for an image and a seed; can be sent to other processes."""

    def __init__(self, name: str, steps: Iterable[Step]) -> None:
        self.name, self._steps = name, tuple(steps)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The transforms with their arguments, in the order in which they are applied."""
        return self._steps

    def __call__(self, image: RGB, seed: int) -> RGB:
        """Augment an image, uint8 of shape (size, size, 3), with a seed in [0, 2^63); the argument stays as it is."""
        rng = create_generator(seed)
        augmented = image
        for step in self._steps:
            augmented = step(augmented, rng)
        if augmented.shape != image.shape or augmented.dtype != image.dtype:
            raise PylorusError(
                f'augment "{self.name}": changed {image.dtype} {image.shape} to {augmented.dtype} {augmented.shape}. '
                "Remove transforms that resize or normalize: an image has the network's size before it is augmented."
            )
        return augmented


def load_policy(name: str, *, key: str = "augment") -> AugmentConfig:
    """Load an augmentation policy of conf/augment, such as light.

    Args:
        name: Name of the file, without its suffix.
        key: The configuration key or argument that names it, for the error.

    Raises:
        PylorusError: If there is no such file.
    """
    files = {path.stem: path for path in (CONF / "augment").glob("*.yaml")}
    if name not in files:
        raise PylorusError(
            f"{key}: there is no augment/{name}.yaml.{format_suggestion(name, files)} "
            f"Available: {', '.join(sorted(files))}."
        )
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AugmentConfig), OmegaConf.load(files[name])))
    assert isinstance(merged, AugmentConfig)
    return merged


def resolve_augmentation(stage: StageConfig, default: AugmentConfig) -> AugmentConfig:
    """Return the augmentation of a stage: the run's, or the one of conf/augment that it names.

    Raises:
        PylorusError: If there is no such file.
    """
    is_own = default._target_ is not None and default.name == "none"  # without a name of its own
    if stage.augment is None or (stage.augment == default.name and not is_own):
        return default
    return load_policy(stage.augment, key="stages: augment")


def build_augmentation(policy: AugmentConfig) -> Augmentation | None:
    """Build the augmentation of a policy; None if the policy has no transforms.

    Raises:
        PylorusError: If there is no such transform, or it rejects its arguments.
    """
    node = get_target(policy)
    if node is not None:
        return Augmentation(str(node[TARGET]), [_ExternalStep(build_callable(node, key="augment"))])
    if not policy.transforms:
        return None
    return Augmentation(policy.name, [_build_step(name, dict(args or {})) for name, args in policy.transforms.items()])


def has_augmentation(policy: AugmentConfig) -> bool:
    """Return whether a policy changes images."""
    return bool(policy.transforms) or policy._target_ is not None


def format_policy(policy: AugmentConfig) -> str:
    """Return what distinguishes a policy from others, as text; of your own function, arguments and code."""
    node = get_target(policy)
    if node is None:
        return json.dumps(dict(policy.transforms), sort_keys=True, default=str)
    module = inspect.getmodule(get_object(node, key="augment"))
    code = inspect.getsource(module) if module is not None else ""
    return json.dumps(node, sort_keys=True, default=str) + code


def compute_augmentation_version() -> str:
    """Return what, besides policy and seed, an augmented image depends on: the versions of this module and packages."""
    installed = importlib.util.find_spec("albumentations") is not None
    foreign = version("albumentations") if installed else "none"
    return f"augment {VERSION}, opencv {cv2.__version__}, albumentations {foreign}"


def _build_step(name: str, arguments: dict[str, Any]) -> Step:
    """Build a transform of Pylorus if it has all of the arguments, and otherwise one of albumentations."""
    transform = TRANSFORMS.get(name)
    if transform is None or not all(
        key in ("p", *transform.arguments) and _is_numeric(value) for key, value in arguments.items()
    ):
        return _AlbumentationsStep(_build_albumentations(name.removeprefix(ALBUMENTATIONS), arguments))
    p = arguments.pop("p", 0.5)
    if not isinstance(p, int | float) or not 0 <= p <= 1:
        raise PylorusError(f"augment.transforms.{name}: p: found {p}, expected a number from 0 to 1")
    ranges = {key: argument.default for key, argument in transform.arguments.items()}
    for key, value in arguments.items():
        try:
            ranges[key] = transform.arguments[key].parse(value)
        except ValueError as error:
            raise PylorusError(f"augment.transforms.{name}: {key}: {error}") from error
    return OwnStep(name, ranges, p)


def _is_numeric(value: Any) -> bool:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def _build_albumentations(name: str, arguments: dict[str, Any]) -> Any:
    # At import, albumentations would query the package index for a newer version; Pylorus makes no such calls.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    try:
        import albumentations
    except ImportError as error:
        message = f"needs albumentations, which can't be imported: {error}. Type: pip install albumentations==2.0.8"
        raise PylorusError(f"augment.transforms.{name}: {message}.{format_suggestion(name, TRANSFORMS)}") from error
    # Only image transforms of albumentations can be named, never arbitrary code.
    transforms = {
        key: kind
        for key, kind in vars(albumentations).items()
        if isinstance(kind, type)
        and issubclass(kind, (albumentations.ImageOnlyTransform, albumentations.DualTransform))
    }
    if name not in transforms:
        raise PylorusError(f'augment.transforms: albumentations has no "{name}".{format_suggestion(name, transforms)}')
    try:
        with warnings.catch_warnings():
            # albumentations only warns about an unknown argument, and ignores it.
            warnings.simplefilter("error", UserWarning)
            return albumentations.Compose([transforms[name](**arguments)])
    except (TypeError, ValueError, UserWarning) as error:
        raise PylorusError(f"augment.transforms.{name}: {error}") from error
