"""Augment RGB arrays at random: the interface to albumentations.

An augmented image is a pure function of the image, the policy and a seed. The generator of albumentations, which would
repeat itself in every worker and epoch, is therefore seeded anew for each image.
"""

import os
import warnings
from typing import Any

from pylorus.config import AugmentConfig
from pylorus.data.image import RGB
from pylorus.errors import PylorusError, format_suggestion


class Augmentation:
    """Returns the augmented image for an image and a seed; can be sent to other processes."""

    def __init__(self, name: str, composed: Any) -> None:
        self.name, self._composed = name, composed

    def __call__(self, image: RGB, seed: int) -> RGB:
        """Augment an image, uint8 of shape (size, size, 3), with a seed in [0, 2^63)."""
        self._composed.set_random_seed(seed % (1 << 32))
        augmented: RGB = self._composed(image=image)["image"]
        if augmented.shape != image.shape or augmented.dtype != image.dtype:
            raise PylorusError(
                f'augment "{self.name}": changed {image.dtype} {image.shape} to {augmented.dtype} {augmented.shape}. '
                "Remove transforms that resize or normalize: an image has the network's size before it is augmented."
            )
        return augmented


def build_augmentation(policy: AugmentConfig) -> Augmentation | None:
    """Build the augmentation of a policy; None if the policy has no transforms.

    Raises:
        PylorusError: If albumentations has no such transform or rejects its arguments.
    """
    if not policy.transforms:
        return None
    # At import, albumentations would query the package index for a newer version; Pylorus makes no such calls.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    transforms = [_build_transform(albumentations, name, arguments) for name, arguments in policy.transforms.items()]
    return Augmentation(policy.name, albumentations.Compose(transforms))


def _build_transform(albumentations: Any, name: str, arguments: Any) -> Any:
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
            return transforms[name](**(arguments or {}))
    except (TypeError, ValueError, UserWarning) as error:
        raise PylorusError(f"augment.transforms.{name}: {error}") from error
