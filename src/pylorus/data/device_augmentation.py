"""Augment batches of images by torch on the device that trains on them: the same images as `augmentation` gives.

The numbers are drawn by the functions of `augmentation`, from the same seeds; only the arithmetic on images is repeated
here, in the steps of OpenCV and libjpeg-turbo: in whole numbers where they use them, and else in 32-bit floats that
are rounded where they round. So both give the same image; a processor whose OpenCV rounds products of floats
separately may differ by one grey level in few values, as it does from other processors.

No function waits for a GPU. Images are uint8 of shape (images, 3, size, size) before and after.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pylorus.data.augmentation import (
    AffineNumbers,
    Augmentation,
    BrightnessContrastNumbers,
    ColorJitterNumbers,
    GaussNoiseNumbers,
    MotionBlurNumbers,
    OwnStep,
    compute_affine_matrix,
    compute_motion_kernel,
    compute_normal_quantiles,
    create_generator,
    draw_quantile_indices,
)

IMAGES_AT_ONCE = 128
"""Images that are augmented at a time: intermediate values take some ten times the memory of the images as floats."""


class DeviceAugmentation:
    """Returns the augmented images for images on a device and their seeds.

    Args:
        augmentation: A policy of Pylorus's own transforms; see `find_obstacle`.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        self._steps = [step for step in augmentation.steps if isinstance(step, OwnStep)]

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Augment images, each with its seed in [0, 2^63); the argument stays as it is."""
        with torch.autocast(images.device.type, enabled=False):
            blocks = [
                self._augment_block(images[first : first + IMAGES_AT_ONCE], seeds[first : first + IMAGES_AT_ONCE])
                for first in range(0, len(images), IMAGES_AT_ONCE)
            ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _augment_block(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        drawn: list[list[tuple[bool, Any]]] = []
        for seed in seeds:
            rng = create_generator(seed)
            drawn.append([step.draw(rng) for step in self._steps])
        augmented = images
        for index, step in enumerate(self._steps):
            rows = [row for row, of_image in enumerate(drawn) if of_image[index][0]]
            numbers = [drawn[row][index][1] for row in rows]
            augmented = _apply_to_rows(TRANSFORMS[step.name], augmented, rows, numbers)
        return augmented


def find_obstacle(augmentation: Augmentation) -> str | None:
    """Return why a policy can't be applied on a device; None if it can."""
    for step in augmentation.steps:
        if not isinstance(step, OwnStep) or step.name not in TRANSFORMS:
            return f"augment {augmentation.name} has a transform that runs on the CPU alone"
    return None


def send_array(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device; the host does not wait until the copy is complete."""
    tensor = torch.from_numpy(np.require(array, requirements=("C", "W")))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _apply_to_rows(
    transform: Callable[[Tensor, Sequence[Any]], Tensor], images: Tensor, rows: Sequence[int], numbers: Sequence[Any]
) -> Tensor:
    """Return the images with those at `rows` transformed by their numbers."""
    if not rows:
        return images
    if len(rows) == len(images):
        return transform(images, numbers)
    index = send_array(np.asarray(rows), images.device)
    return images.index_copy(0, index, transform(images[index], numbers))


def _flip_horizontally(images: Tensor, numbers: Sequence[None]) -> Tensor:
    return images.flip(3)


def _apply_d4(images: Tensor, symmetries: Sequence[int]) -> Tensor:
    size = images.shape[-1]
    index = _load_d4_index(size, images.device)[send_array(np.asarray(symmetries), images.device)]
    return images.flatten(2).gather(2, index[:, None].expand(-1, images.shape[1], -1)).view(images.shape)


@functools.lru_cache(maxsize=2)
def _load_d4_index(size: int, device: torch.device) -> Tensor:
    """Return the source of each pixel for each symmetry, int64 of shape (8, size · size)."""
    pixels = np.arange(size * size).reshape(size, size)
    turned = [np.rot90(pixels, -turns) for turns in range(4)]
    return send_array(np.stack([*turned, *(np.fliplr(each) for each in turned)]).reshape(8, -1), device)


def _fuse(factor: Tensor, other: Tensor, summand: Tensor) -> Tensor:
    """Return factor · other + summand, rounded to float32 once, as by the fused instruction that OpenCV uses."""
    return torch.addcmul(summand.double(), factor.double(), other.double()).float()


LANES = 16
"""Pixels of a row that OpenCV 5 warps at a time; it rounds the coordinates of those that remain in another order."""


def _apply_affine(images: Tensor, numbers: Sequence[AffineNumbers]) -> Tensor:
    size = images.shape[-1]
    inverse = np.stack([_invert_affine(compute_affine_matrix(each, size, size)) for each in numbers])
    return _warp_in_steps(images, inverse) if cv2.__version__ < "5" else _warp(images, inverse)


def _warp(images: Tensor, inverse: NDArray[np.float64]) -> Tensor:
    """Warp images by maps from their new to their old pixels, (images, 2, 3), as OpenCV 5 does."""
    size = images.shape[-1]
    matrix = send_array(inverse.astype(np.float32), images.device)[..., None, None]  # (images, 2, 3, 1, 1)
    x = torch.arange(size, dtype=torch.float32, device=images.device)
    y = x[:, None]
    of_x, of_y, constant = matrix.unbind(2)
    coordinates = _fuse(of_x, x, of_y * y + constant)  # (images, 2, size, size): x, y in the source
    if size % LANES:
        first = size - size % LANES
        coordinates[..., first:] = _fuse(of_x, x[first:], of_y * y) + constant
    whole = coordinates.floor()
    weight_x, weight_y = (coordinates - whole).unsqueeze(2).unbind(1)  # (images, 1, size, size)
    (upper_left, upper_right), (lower_left, lower_right) = _read_corners(images, whole.clamp(-2, size).long())
    upper = _interpolate(upper_left, upper_right, weight_x)
    lower = _interpolate(lower_left, lower_right, weight_x)
    return _round_levels(_interpolate(upper, lower, weight_y))


def _warp_in_steps(images: Tensor, inverse: NDArray[np.float64]) -> Tensor:
    """Warp images as OpenCV 4 does: coordinates are sums of multiples of 1/1024 pixel, cut to multiples of 1/32."""
    size = images.shape[-1]
    position = np.arange(size)
    along_x = np.rint(inverse[:, :, 0, None] * position * 1024)[:, :, None, :]
    along_y = np.rint((inverse[:, :, 1, None] * position + inverse[:, :, 2, None]) * 1024)[..., None] + 16
    x, y = (send_array(part.astype(np.int32), images.device) for part in (along_x, along_y))
    coordinates = (x + y) >> 5  # (images, 2, size, size), in 1/32 pixel
    weight_x, weight_y = (coordinates & 31).unsqueeze(2).unbind(1)
    (upper_left, upper_right), (lower_left, lower_right) = _read_corners(
        images, (coordinates >> 5).clamp(-2, size).long()
    )
    upper = (32 - weight_x) * upper_left + weight_x * upper_right
    lower = (32 - weight_x) * lower_left + weight_x * lower_right
    return (((32 - weight_y) * upper + weight_y * lower).int() + 512 >> 10).to(torch.uint8)


def _invert_affine(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Invert an affine map by the operations of OpenCV."""
    (a, b, c), (d, e, f) = matrix.tolist()
    scale = 1 / (a * e - b * d)
    inverse_a, inverse_b, inverse_d, inverse_e = e * scale, b * -scale, d * -scale, a * scale
    offsets = -inverse_a * c - inverse_b * f, -inverse_d * c - inverse_e * f
    return np.array([[inverse_a, inverse_b, offsets[0]], [inverse_d, inverse_e, offsets[1]]])


def _read_corners(images: Tensor, corner: Tensor) -> list[list[Tensor]]:
    """Return the four pixels from a column and row on, (images, 2, size, size), by row and then column.

    Each is float32 of shape (images, 3, size, size); black outside the image.
    """
    column, row = corner.unbind(1)
    return [[_read_pixels(images, row + below, column + right) for right in (0, 1)] for below in (0, 1)]


def _read_pixels(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return the pixels at rows and columns (images, size, size) as float32 (images, 3, size, size); black outside."""
    size = images.shape[-1]
    is_inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    position = (row.clamp(0, size - 1) * size + column.clamp(0, size - 1)).flatten(1)[:, None].expand(-1, 3, -1)
    return images.flatten(2).gather(2, position).view(images.shape).float() * is_inside[:, None]


def _interpolate(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    return _fuse(weight, second - first, first)


def _apply_brightness_contrast(images: Tensor, numbers: Sequence[BrightnessContrastNumbers]) -> Tensor:
    pairs = send_array(np.array([(each.factor, each.offset) for each in numbers]), images.device)
    return _map_levels(images, pairs[:, 0], pairs[:, 1])


def _map_levels(images: Tensor, factor: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Map each grey level v to `factor · v + offset`, which are float64 of shape (images,)."""
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    offsets = offset[:, None] if isinstance(offset, Tensor) else offset
    table = _round_levels(levels * factor[:, None] + offsets)
    return table.gather(1, images.flatten(1).long()).view(images.shape)


def _round_levels(values: Tensor) -> Tensor:
    """Round to grey levels, halves to even numbers."""
    return values.round().clamp(0, 255).to(torch.uint8)


def _apply_color_jitter(images: Tensor, numbers: Sequence[ColorJitterNumbers]) -> Tensor:
    functions = (_map_levels, _scale_contrast, _scale_saturation, _shift_hue)
    levels = send_array(
        np.array([(each.brightness, each.contrast, each.saturation, each.hue) for each in numbers]), images.device
    )
    order = np.array([each.order for each in numbers])
    changed = images.clone()
    # One copy of all row numbers to the device: for each position in the order, by function.
    ranked = send_array(np.argsort(order, axis=0, kind="stable"), images.device)  # (images, positions)
    for position in range(len(functions)):
        ends = np.cumsum(np.bincount(order[:, position], minlength=len(functions))).tolist()
        for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if start < end:
                row = ranked[start:end, position]
                changed.index_copy_(0, row, functions[index](changed[row], levels[row, index]))
    return changed


def _compute_grey(images: Tensor) -> Tensor:
    """Return the luma of images, int32 of shape (images, size, size)."""
    red, green, blue = images.int().unbind(1)
    return (9798 * red + 19235 * green + 3735 * blue + (1 << 14)) >> 15


def _scale_contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey = _compute_grey(images).flatten(1)
    return _map_levels(images, factor, (1 - factor) * grey.sum(1, dtype=torch.float64) / grey.shape[1])


def _scale_saturation(images: Tensor, factor: Tensor) -> Tensor:
    scale = ((256 * factor).round() / 256).float()[:, None, None, None]
    return _round_levels(images * scale + _compute_grey(images)[:, None] * (1 - scale))


EPSILON = torch.finfo(torch.float32).eps
SIXTHS_PER_DEGREE = float(np.float32(6) / np.float32(360))


def _shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    red, green, blue = images.float().unbind(1)
    value, least = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    saturation = chroma / (value + EPSILON)
    is_red, is_green = value == red, value == green
    difference = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    offset = torch.where(is_red, torch.where(green < blue, 360, 0), torch.where(is_green, 120, 240))
    # torch would multiply a number by the reciprocal, which rounds twice.
    scale = torch.full_like(chroma, 60).div(chroma + EPSILON)
    hue = _fuse(difference, scale, offset) + (360 * (turns % 1)).float()[:, None, None]
    hue = torch.where(hue >= 360, hue - 360, hue)
    sixths = hue * SIXTHS_PER_DEGREE
    sector = sixths.floor()
    fraction, one = sixths - sector, torch.ones_like(sixths)
    falling = value * _fuse(-saturation, fraction, one)
    rising = value * _fuse(-saturation, 1 - fraction, one)
    lowest = value * (1 - saturation)
    channels = [
        _choose(sector, (value, falling, lowest, lowest, rising, value)),
        _choose(sector, (rising, value, value, falling, lowest, lowest)),
        _choose(sector, (lowest, lowest, rising, value, value, falling)),
    ]
    return _round_levels(torch.stack(channels, 1).abs())


def _choose(sector: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Return the value of each pixel's sixth of the color circle."""
    return torch.stack(list(values)).gather(0, sector.clamp(0, 5).long()[None])[0]


def _apply_motion_blur(images: Tensor, numbers: Sequence[MotionBlurNumbers]) -> Tensor:
    largest, channels = max(each.size for each in numbers), images.shape[1]
    kernels = np.zeros((len(numbers), 1, largest, largest), np.float32)
    for kernel, each in zip(kernels[:, 0], numbers, strict=True):
        start = (largest - each.size) // 2
        kernel[start : start + each.size, start : start + each.size] = compute_motion_kernel(each)
    counts = send_array(kernels.sum((1, 2, 3)).astype(np.int32), images.device)[:, None, None, None]
    weight = send_array(kernels, images.device).repeat_interleave(channels, 0, output_size=channels * len(numbers))
    padded = functional.pad(images.float(), (largest // 2,) * 4, mode="reflect")
    sums = functional.conv2d(padded.flatten(0, 1)[None], weight, groups=len(weight))[0].round().int()
    return torch.div(sums.view(images.shape) + counts // 2, counts, rounding_mode="floor").to(torch.uint8)


def _apply_gauss_noise(images: Tensor, numbers: Sequence[GaussNoiseNumbers]) -> Tensor:
    count, _, size, _ = images.shape
    drawn = np.stack([draw_quantile_indices(each.seed, images[0].numel()) for each in numbers])
    indices = send_array(drawn.view(np.int16), images.device).int() & 0xFFFF
    quantiles = send_array(compute_normal_quantiles(), images.device)
    deviations = send_array(np.array([each.deviation for each in numbers]), images.device)
    noise = (deviations[:, None] * quantiles[indices]).round().view(count, size, size, 3).permute(0, 3, 1, 2)
    return _round_levels(images + noise)


# Compression follows ITU-T T.81 and the arithmetic of libjpeg-turbo's accurate integer transform ("islow").
LUMA_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
"""Quantization steps at quality 50 (T.81, tables K.1 and K.2)."""


HALF_COSINES = (
    (8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260),
    (10703, 4433, -4433, -10703),
    (9633, -2259, -11362, -6436),
    (8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633),
    (4433, -10704, 10704, -4433),
    (2260, -6436, 9633, -11363),
)
COSINES = np.array(
    [[*half, *(value * (-1) ** index for value in reversed(half))] for index, half in enumerate(HALF_COSINES)], float
)
"""The transform of 8 values: cosines times 8192, with the roundings of libjpeg's constants."""


def _compress_images(images: Tensor, qualities: Sequence[int]) -> Tensor:
    """Return what JPEG files of these qualities give, with color at half the resolution."""
    height, width = images.shape[2:]
    red, green, blue = images.int().unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16
    center = (128 << 16) + (1 << 15) - 1
    chroma = [
        (-11059 * red - 21709 * green + 32768 * blue + center) >> 16,
        (32768 * red - 27439 * green - 5329 * blue + center) >> 16,
    ]
    luma_steps, chroma_steps = (
        send_array(np.stack([_scale_steps(steps, quality) for quality in qualities]), images.device)
        for steps in (LUMA_STEPS, CHROMA_STEPS)
    )
    luma = _quantize_plane(_pad_plane(luma, -width % 8, -height % 8), luma_steps)[:, :height, :width]
    blue_difference, red_difference = (
        _double_plane(_quantize_chroma(plane, chroma_steps))[:, :height, :width] - 128 for plane in chroma
    )
    half = 1 << 15
    decoded = [
        luma + ((91881 * red_difference + half) >> 16),
        luma + ((-22554 * blue_difference - 46802 * red_difference + half) >> 16),
        luma + ((116130 * blue_difference + half) >> 16),
    ]
    return torch.stack(decoded, 1).clamp(0, 255).to(torch.uint8)


def _scale_steps(steps: Sequence[Sequence[int]], quality: int) -> NDArray[np.float64]:
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((np.array(steps) * scale + 50) // 100).clip(1, 255).astype(np.float64)


def _pad_plane(plane: Tensor, right: int, bottom: int) -> Tensor:
    """Repeat the last column and row of planes, int32 of shape (images, height, width)."""
    padded = functional.pad(plane[:, None].float(), (0, right, 0, bottom), mode="replicate")
    return padded[:, 0].int()


def _quantize_chroma(plane: Tensor, steps: Tensor) -> Tensor:
    """Halve the resolution of planes, quantize them, and return them at half the resolution."""
    height, width = plane.shape[1:]
    padded = _pad_plane(plane, -width % 16, -height % 2)
    sums = padded[:, ::2, ::2] + padded[:, ::2, 1::2] + padded[:, 1::2, ::2] + padded[:, 1::2, 1::2]
    # Rounding alternates, so that there is no bias.
    halved = (sums + 1 + torch.arange(sums.shape[2], device=sums.device, dtype=torch.int32) % 2) >> 2
    quantized = _quantize_plane(_pad_plane(halved, 0, -halved.shape[1] % 8), steps)
    return quantized[:, : (height + 1) // 2, : (width + 1) // 2]


def _quantize_plane(plane: Tensor, steps: Tensor) -> Tensor:
    """Transform blocks of 8 × 8, quantize them and transform them back; sums of whole numbers, exact in float64."""
    images, height, width = plane.shape
    blocks = plane.view(images, height // 8, 8, width // 8, 8).transpose(2, 3).double() - 128
    cosines = send_array(COSINES, plane.device)
    step = steps[:, None, None]
    frequencies = _shift_right(cosines @ _shift_right(blocks @ cosines.T, 11), 15)
    count = ((frequencies.abs() + (4 * step)) / (8 * step)).floor() * frequencies.sign()
    columns = _shift_right(cosines.T @ (count * step), 11)
    levels = (_shift_right(columns @ cosines, 18) + 128).clamp(0, 255)
    return levels.transpose(2, 3).reshape(images, height, width).int()


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Divide by 2^bits, rounded to the nearest whole number, halves up."""
    return (values / 2.0**bits + 0.5).floor()


def _double_plane(plane: Tensor) -> Tensor:
    """Double the resolution of planes, int32 (images, height, width): three quarters of the nearest pixel."""
    padded = functional.pad(plane[:, None].float(), (1, 1, 1, 1), mode="replicate")[:, 0].int()
    near = 3 * padded[:, 1:-1]
    rows = torch.stack([near + padded[:, :-2], near + padded[:, 2:]], 2).flatten(1, 2)
    near = 3 * rows[:, :, 1:-1]
    columns = [(near + rows[:, :, :-2] + 8) >> 4, (near + rows[:, :, 2:] + 7) >> 4]
    return torch.stack(columns, 3).flatten(2, 3)


TRANSFORMS: dict[str, Callable[[Tensor, Sequence[Any]], Tensor]] = {
    "HorizontalFlip": _flip_horizontally,
    "D4": _apply_d4,
    "Affine": _apply_affine,
    "RandomBrightnessContrast": _apply_brightness_contrast,
    "ColorJitter": _apply_color_jitter,
    "MotionBlur": _apply_motion_blur,
    "GaussNoise": _apply_gauss_noise,
    "ImageCompression": _compress_images,
}
"""The transforms of `augmentation.TRANSFORMS` as functions of images and the numbers drawn for each."""
