"""Run a stage's network over the images of a run exactly as its bundle does: by the same code, in fp32.

Also what the forward pass costs.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pylorus.core.formatting import open_progress_bar
from pylorus.data.dataset import Draw, EpochBatchSampler, EpochSampler, ImageBatches
from pylorus.hardware import is_faster_channels_last, use_full_precision
from pylorus.model.backbone import Backbone, convert_to_pixel_scale, normalize_images, restore_modes

UNLIKENESS = "cosine distance of the penultimate features to the mean direction of the nearest class"
"""The distance that bundles without statistics of the images' appearance use."""
LARGER_UNLIKENESS = (
    "larger of two distances from the training images, each relative to its spread over validation images (the cosine "
    "distance of the penultimate features to the mean direction of the nearest class, and the Mahalanobis distance of "
    "the image's colors and textures to the mean of the nearest class)"
)
"""The distance that bundles use that have them; see `combine_distances`."""


class NetworkOutput(NamedTuple):
    """The network's output for n images.

    Attributes:
        logits: float32 of shape (n, classes); not calibrated.
        unlikeness: Distance from the training images, float32 of shape (n,), in [0, 2]: see `UNLIKENESS`.
    """

    logits: Tensor
    unlikeness: Tensor


class NormalizingNetwork(nn.Module):
    """A network in evaluation mode that normalises its input images itself.

    Both a run and a bundle predict with it, so both give the same logits.

    Args:
        network: A timm model.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        for name, tensor in zip(("mean", "std"), convert_to_pixel_scale(mean, std), strict=True):
            self.register_buffer(name, tensor)
        self.eval()

    def normalize_images(self, image: Tensor) -> Tensor:
        """Normalise uint8 RGB images of shape (n, 3, size, size) to float32 of the same shape."""
        return normalize_images(image, self.mean, self.std)

    def forward_with_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and penultimate features; see the function of this name.

        Args:
            image: uint8 RGB of shape (n, 3, size, size).
        """
        return compute_logits_and_features(self.network, self.normalize_images(image))


class BundleClassifier(NormalizingNetwork):
    """A network that also computes the distance of images from its training images.

    Args:
        network: A timm model.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
        directions: Unit vectors of shape (classes, features): the mean direction of each class's training images.
        appearance: How the training images look; None for a bundle that does not say: only features count.
    """

    directions: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        directions: Tensor,
        appearance: "AppearanceModel | None" = None,
    ):
        super().__init__(network, mean=mean, std=std)
        self.register_buffer("directions", directions)
        self.appearance = appearance

    def forward(self, image: Tensor) -> NetworkOutput:
        """Compute the output for uint8 RGB images of shape (n, 3, size, size)."""
        logits, features = self.forward_with_features(image)
        distance = compute_unlikeness(features, self.directions)
        if self.appearance is not None:
            distance = combine_distances(distance, self.appearance(compute_appearance(image)), self.appearance.scales)
        return NetworkOutput(logits, distance)


def compute_logits_and_features(network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logits and penultimate features.

    Args:
        network: A timm model.
        pixels: Normalised images of shape (n, 3, size, size).

    Returns:
        Logits of shape (n, classes) and the last layer's input of shape (n, features), both float32.
    """
    maps = network.forward_features(pixels)
    logits, features = network.forward_head(maps), network.forward_head(maps, pre_logits=True)
    return raise_to_float32(logits), pool_features(features)


def raise_to_float32(values: Tensor) -> Tensor:
    """Return values as float32; float64 stays, so that a network converted to it shows the rounding of float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def pool_features(features: Tensor) -> Tensor:
    """Return the last layer's input for n images as float32 of shape (n, features), averaged over maps or tokens."""
    if features.ndim == 4:
        features = features.mean(dim=(2, 3))  # heads that pool after their last layer, or hold 1 × 1 maps
    elif features.ndim == 3:
        features = features.mean(dim=1)
    return raise_to_float32(features)


def compute_unlikeness(features: Tensor, directions: Tensor) -> Tensor:
    """Compute the distance of images from the training images; see `UNLIKENESS`.

    Args:
        features: Penultimate features of shape (n, features).
        directions: Unit vectors of shape (classes, features): the mean direction of each class.

    Returns:
        Distances of shape (n,), in [0, 2].
    """
    unit = functional.normalize(features, dim=1)
    nearest = directions[(unit @ directions.T).argmax(dim=1)]
    # This is 1 - cosine without the rounding of a cosine close to 1, which fit_scales may enlarge two hundredfold.
    return (unit - nearest).square().sum(dim=1) / 2


APPEARANCE_LENGTH = 33
"""Statistics of an image's appearance."""
VISIBLE, FULLY_VISIBLE = 0.04, 0.14
"""Largest channel, in [0, 1], up to which a pixel is black and has no weight, and from which it has full weight."""
TEXTURE_SCALES = 4


IMAGES_IN_CPU_CACHE = 4
"""Images whose appearance a CPU computes at a time: the values in between stay in its cache, which takes a third of the
time of a whole batch."""


def compute_appearance(image: Tensor) -> Tensor:
    """Compute statistics of the colors and textures of images; black around the field of view has no weight.

    They are, for each channel, the mean and the logarithm of the standard deviation; the three correlations of
    channels; and the logarithm of the mean difference of neighboring pixels in both directions at four scales. A
    network that is trained to ignore color and sharpness does not see them in its features.

    Args:
        image: uint8 RGB of shape (n, 3, size, size).

    Returns:
        float32 of shape (n, `APPEARANCE_LENGTH`).
    """
    if image.device.type != "cpu" or torch.compiler.is_compiling():  # an export has one path for all batch sizes
        return _compute_appearance(image)
    return torch.cat([_compute_appearance(block) for block in torch.split(image, IMAGES_IN_CPU_CACHE)])


def _compute_appearance(image: Tensor) -> Tensor:
    pixels = raise_to_float32(image) / 255
    weight = ((pixels.amax(dim=1, keepdim=True) - VISIBLE) / (FULLY_VISIBLE - VISIBLE)).clamp(0, 1)
    textures = []
    for scale in range(TEXTURE_SCALES):
        if scale and pixels.shape[-1] >= 2:
            pixels, weight = functional.avg_pool2d(pixels, 2), functional.avg_pool2d(weight, 2)
        if scale == 1:
            colors = _compute_color_statistics(pixels, weight)
        for near, far in (
            ((slice(None), slice(None), slice(1, None)), (slice(None), slice(None), slice(None, -1))),
            ((slice(None), slice(None), slice(None), slice(1, None)), (..., slice(None, -1))),
        ):
            common = weight[near] * weight[far]
            difference = _sum_pixels((pixels[near] - pixels[far]).abs() * common)
            textures.append((difference / _sum_pixels(common).clamp_min(1) + 0.001).log())
    return torch.cat([*colors, *textures], dim=1)


def _sum_pixels(values: Tensor) -> Tensor:
    """Sum values of shape (n, channels, height, width) over the pixels, by rows: onnxruntime adds one by one."""
    return values.sum(dim=3).sum(dim=2)


def _compute_color_statistics(pixels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, logarithm of the standard deviation and correlations of channels, each of shape (n, 3)."""
    total = _sum_pixels(weight).clamp_min(1)
    mean = _sum_pixels(weight * pixels) / total
    offset = pixels - mean[:, :, None, None]
    # Exporters to ONNX take a constant of 1e-8 for zero and drop its addition, but not that of a product with it.
    deviation = ((_sum_pixels(weight * offset**2) + 1e-8 * total) / total).sqrt()
    products = weight * offset * torch.cat([offset[:, 1:], offset[:, :1]], dim=1)
    covariance = _sum_pixels(products) / total
    correlation = covariance / (deviation * torch.cat([deviation[:, 1:], deviation[:, :1]], dim=1))
    return mean, (deviation + 0.01).log(), correlation


class AppearanceModel(nn.Module):
    """How the training images look: the mean of each class and a covariance that all share.

    Args:
        center: Mean over the training images, of shape (length,).
        whitening: Matrix of shape (length, length) after which differences within a class are uncorrelated.
        means: Mean of each class after subtracting the center and whitening, of shape (classes, length).
        scales: Median of both distances over validation images, and how far their 90th percentile is above it, of
            shape (2, 2): rows are median and spread, columns the distance of features and that of the appearance.
    """

    center: Tensor
    whitening: Tensor
    means: Tensor
    scales: Tensor

    def __init__(self, *, center: Tensor, whitening: Tensor, means: Tensor, scales: Tensor):
        super().__init__()
        for name, tensor in (("center", center), ("whitening", whitening), ("means", means), ("scales", scales)):
            self.register_buffer(name, tensor)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a bundle stores, by name."""
        return dict(self.named_buffers())

    def forward(self, statistics: Tensor) -> Tensor:
        """Compute the distance of shape (n,) to the nearest class; `statistics` are from `compute_appearance`."""
        whitened = (statistics - self.center) @ self.whitening
        distances: Tensor = (whitened[:, None] - self.means).square().sum(dim=2).amin(dim=1).sqrt()
        return distances


def fit_appearance(statistics: Tensor, label: Tensor, *, classes: int) -> AppearanceModel:
    """Fit the appearance of training images, with a covariance shrunk toward equal variances (Ledoit and Wolf 2004).

    Args:
        statistics: `compute_appearance` of the images, of shape (n, length).
        label: Class of each image, of shape (n,); every class has at least one.
        classes: Number of classes.
    """
    values = statistics.double()
    center, spread = values.mean(dim=0), values.std(dim=0, correction=0).clamp_min(0.01)
    standardized = (values - center) / spread
    means = torch.stack([standardized[label == index].mean(dim=0) for index in range(classes)])
    residuals = standardized - means[label]
    count, length = residuals.shape
    covariance = residuals.T @ residuals / count
    variance = covariance.diagonal().mean()
    identity = torch.eye(length, dtype=torch.float64)
    dispersion = (covariance - variance * identity).square().sum()
    noise = (residuals.square().sum(dim=1).square().sum() / count - covariance.square().sum()) / count
    shrinkage = float((noise / dispersion.clamp_min(1e-12)).clamp(0.01, 1))
    shrunk = (1 - shrinkage) * covariance + shrinkage * variance.clamp_min(1e-3) * identity
    eigenvalues, vectors = torch.linalg.eigh(shrunk)
    whitening = vectors / eigenvalues.sqrt()
    return AppearanceModel(
        center=center.float(),
        whitening=(whitening / spread[:, None]).float(),
        means=(means @ whitening).float(),
        scales=torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
    )


def fit_scales(distances: Tensor) -> Tensor:
    """Return median and spread of distances of validation images, of shape (n, 2); see `AppearanceModel.scales`."""
    median, high = distances.double().quantile(torch.tensor([0.5, 0.9], dtype=torch.float64), dim=0)
    # A smaller spread would make the rounding of a cosine in 32 bits visible.
    return torch.stack([median, torch.maximum(high - median, 0.1 * median).clamp_min(0.005)]).float()


def combine_distances(features: Tensor, appearance: Tensor, scales: Tensor) -> Tensor:
    """Combine both distances from the training images into one.

    Each is expressed by how many spreads it exceeds its median on validation images; x, the larger, becomes
    1 + x / (1 + abs(x)): 1 for a typical image, 1.5 for one among the farthest tenth.

    Args:
        features: Distances of features, of shape (n,); see `compute_unlikeness`.
        appearance: Distances of the appearance, of shape (n,).
        scales: See `AppearanceModel.scales`.

    Returns:
        Distances of shape (n,), in (0, 2).
    """
    excess = ((torch.stack([features, appearance], dim=1) - scales[0]) / scales[1]).amax(dim=1)
    return 1 + excess / (1 + excess.abs())


def compute_split_appearance(
    datamodule: ImageBatches,
    split: str,
    rows: NDArray[np.int64],
    compute: Callable[[Tensor], Tensor] = compute_appearance,
) -> Tensor:
    """Compute the appearance of some images of a split, in the order of the rows, without augmentation.

    Args:
        datamodule: The images.
        split: Name of the split.
        rows: The rows of the images.
        compute: Computes the statistics of a batch, uint8 RGB of shape (n, 3, size, size), one row for each image.
    """
    size = 2 * datamodule.batch_size
    batches = [[Draw(int(row), None) for row in rows[at : at + size]] for at in range(0, len(rows), size)]
    with torch.inference_mode():
        parts = [compute(batch.image).cpu() for batch in datamodule.build_batch_loader(split, batches)]
    return torch.cat(parts)


def move_to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move the network to a device, in the memory layout that is fastest for its convolutions; values stay the same."""
    is_faster = is_faster_channels_last(network, device.type)
    return network.to(device, memory_format=torch.channels_last if is_faster else torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


MAX_IMAGES = 5000
"""Validation or test images whose features are saved: enough for the threshold's quantile."""
MAX_TRAINING_IMAGES, MAX_TRAINING_IMAGES_PER_CLASS = 1000, 100
"""Training images, in all and of each class, that the mean directions are computed from."""


@dataclass(frozen=True, eq=False)
class SplitOutputs:
    """The network's output for a split of the images.

    Attributes:
        logits: float32 of shape (images, classes), in the order of the split's rows.
        features: float32 of shape (n, features): penultimate features of the rows that `select_feature_rows` returns.
    """

    logits: NDArray[np.float32]
    features: NDArray[np.float32]


class RowOutputs(NamedTuple):
    """The network's output for some rows of a split, on the CPU.

    Attributes:
        row: int64 of shape (n,).
        logits: float32 of shape (n, classes).
        features: float32 of shape (n, features): see `pool_features`.
    """

    row: Tensor
    logits: Tensor
    features: Tensor


def select_feature_rows(images: int) -> NDArray[np.int64]:
    """Return the rows of a validation or test split whose features are saved: all, or evenly spaced ones."""
    return _select_evenly(np.arange(images), MAX_IMAGES)


def select_training_rows(labels: NDArray[np.int64], *, classes: int) -> NDArray[np.int64]:
    """Return the rows of the training images that the mean directions are computed from, in ascending order.

    They are evenly spaced among those of their class, and of a rare class all are taken: its mean is the least certain.

    Args:
        labels: Label of each training image, of shape (images,).
        classes: Number of classes.
    """
    most = max(1, min(MAX_TRAINING_IMAGES_PER_CLASS, MAX_TRAINING_IMAGES // classes))
    return np.sort(np.concatenate([_select_evenly(np.flatnonzero(labels == label), most) for label in range(classes)]))


def _select_evenly(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(np.int64)]


@contextmanager
def prepare_network(backbone: Backbone, accelerator: str) -> Iterator[NormalizingNetwork]:
    """Move the network to its device as a bundle does; on exit it is on the CPU again, with its modes restored."""
    device = torch.device(accelerator)
    with restore_modes(backbone.network), use_full_precision():
        network = move_to_device(backbone.network, device)
        yield NormalizingNetwork(network, mean=backbone.mean, std=backbone.std).to(device)
        network.to("cpu")


class Evaluator:
    """Computes a network's output for the images of a run, without augmentation.

    Args:
        network: The network, prepared by `prepare_network`.
        image_data: The images.
    """

    def __init__(self, network: NormalizingNetwork, image_data: ImageBatches) -> None:
        self.network, self.image_data = network, image_data

    def compute_outputs(
        self, split: str, rows: NDArray[np.int64], *, advance: Callable[[int], object] = int
    ) -> Iterator[RowOutputs]:
        """Compute the output for some images of a split, or this process's share of it.

        Args:
            split: train, val or test.
            rows: Their rows, the same in all distributed processes.
            advance: Called with the number of images that have just been computed.
        """
        for batch in self.image_data.build_batch_loader(split, self.build_batches(rows)):
            with torch.inference_mode():
                logits, features = self.network.forward_with_features(batch.image.to(self.network.mean.device))
            yield RowOutputs(batch.row.cpu(), logits.cpu(), features.cpu())
            advance(len(batch.row))

    def build_batches(self, rows: NDArray[np.int64]) -> Iterator[list[Draw]]:
        """Yield the rows in batches of evaluation size, or this process's share of each."""
        size, processes = 2 * self.image_data.batch_size, self.image_data.processes
        for batch in EpochBatchSampler(EpochSampler(len(rows), seed=None), size, processes=processes):
            yield [Draw(int(rows[draw.row]), None) for draw in batch]


def compute_split_outputs(evaluator: Evaluator, part: str, *, progress: bool) -> SplitOutputs:
    """Compute the network's output for every image of a split.

    Each distributed process computes its share of the images; all processes return the output for all images.

    Args:
        evaluator: The network and the images.
        part: val or test.
        progress: Whether to show a progress bar on a terminal.
    """
    processes, images = evaluator.image_data.processes, len(evaluator.image_data.parts[part])
    saved_rows = select_feature_rows(images)
    rows, logits, features = [], [], []
    label = f"predicting {'validation' if part == 'val' else part} images"
    with open_progress_bar(label, images, shown=progress and processes.is_first) as bar:
        for batch in evaluator.compute_outputs(
            part, np.arange(images), advance=lambda count: bar.update(processes.count * count)
        ):
            is_saved = torch.from_numpy(np.isin(batch.row.numpy(), saved_rows))
            rows.append(batch.row)
            logits.append(batch.logits)
            features.append((batch.row[is_saved], batch.features[is_saved]))
    local = (torch.cat(rows), torch.cat(logits), *(torch.cat(tensors) for tensors in zip(*features, strict=True)))
    by_process = processes.gather(local)
    all_rows, all_logits, feature_row, all_features = (torch.cat(each) for each in zip(*by_process, strict=True))
    return SplitOutputs(all_logits[torch.argsort(all_rows)].numpy(), all_features[torch.argsort(feature_row)].numpy())


def compute_mean_directions(evaluator: Evaluator, *, classes: int) -> Tensor:
    """Compute the mean direction of each class's features over training images.

    Args:
        evaluator: The network and the images, for a single process.
        classes: Number of classes.

    Returns:
        Unit vectors of shape (classes, features).
    """
    labels = evaluator.image_data.parts["train"]["label"].to_numpy(dtype=np.int64)
    rows = select_training_rows(labels, classes=classes)
    features = torch.cat([batch.features for batch in evaluator.compute_outputs("train", rows)])
    directions, label = functional.normalize(features.double(), dim=1), torch.from_numpy(labels[rows])
    means = torch.stack([directions[label == index].mean(dim=0) for index in range(classes)])
    return functional.normalize(means, dim=1).float()


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Measures the largest number of bytes of tensors that were created inside the context and existed at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and follow the memory of its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        if identity not in self._known:
            self._known.add(identity)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, identity, size)

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.bytes -= size


COST_IMAGES, COST_REPEATS = 8, 3
"""Images of the batch on which the forward pass is timed, and how often; the first pass only warms up."""


def measure_cost(network: NormalizingNetwork, *, image_size: int) -> dict[str, Any]:
    """Measure what it costs to classify an image.

    Returns:
        parameters: their number; weight_bytes: of weights and buffers; activation_bytes: the largest memory of
        intermediate results for one image; forward_seconds: for an image in a batch, the shortest of a few passes.
    """
    device = network.mean.device
    images = torch.full((COST_IMAGES, 3, image_size, image_size), 128, dtype=torch.uint8, device=device)
    tensors = [*network.network.parameters(), *network.network.buffers()]
    with torch.no_grad():
        seconds = []
        for _ in range(1 + COST_REPEATS):
            start = time.perf_counter()
            network.network(network.normalize_images(images)).sum().item()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
        with LiveMemory() as memory:
            network.network(network.normalize_images(images[:1]))
    return {
        "parameters": sum(parameter.numel() for parameter in network.network.parameters()),
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "activation_bytes": memory.peak,
        "forward_seconds": min(seconds[1:]) / COST_IMAGES,
    }
