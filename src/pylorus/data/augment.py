"""RGB array → RGB array, varied by chance: the seam to albumentations.

An augmented image is a pure function of the image, the policy and a seed: albumentations' own generator, which
repeats itself in every worker and epoch, is set anew for each image.
"""

import os
import warnings
from typing import Any

from pylorus.config import AugmentConfig
from pylorus.data.image import RGB
from pylorus.errors import PylorusError, did_you_mean


class Augmentation:
    """Gives the augmented image of an image and a seed; crosses to other processes."""

    def __init__(self, name: str, composed: Any) -> None:
        self.name, self._composed = name, composed

    def __call__(self, image: RGB, seed: int) -> RGB:
        """The image, of shape (size, size, 3), varied by the chance of `seed`, in [0, 2^63)."""
        self._composed.set_random_seed(seed % (1 << 32))
        varied: RGB = self._composed(image=image)["image"]
        if varied.shape != image.shape or varied.dtype != image.dtype:
            raise PylorusError(
                f'augment "{self.name}": made {varied.dtype} {varied.shape} of {image.dtype} {image.shape}. Leave out '
                "transforms that resize or normalise: an image has the network's size before it is augmented."
            )
        return varied


def build_augmentation(policy: AugmentConfig) -> Augmentation | None:
    """The augmentation of a policy; None where the policy holds no transform.

    Raises:
        PylorusError: If albumentations has no such transform or refuses its arguments.
    """
    if not policy.transforms:
        return None
    # albumentations asks the package index for a newer version at import; nobody asked for that call.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    transforms = [_transform(albumentations, name, given) for name, given in policy.transforms.items()]
    return Augmentation(policy.name, albumentations.Compose(transforms))


def _transform(albumentations: Any, name: str, given: Any) -> Any:
    # A register of names, not free code: only transforms of images, found under their own name.
    known = {
        other: kind
        for other, kind in vars(albumentations).items()
        if isinstance(kind, type)
        and issubclass(kind, (albumentations.ImageOnlyTransform, albumentations.DualTransform))
    }
    if name not in known:
        raise PylorusError(f'augment.transforms: albumentations has no "{name}".{did_you_mean(name, known)}')
    try:
        with warnings.catch_warnings():
            # Of an unknown argument albumentations only warns, and goes on without it.
            warnings.simplefilter("error", UserWarning)
            return known[name](**(given or {}))
    except (TypeError, ValueError, UserWarning) as error:
        raise PylorusError(f"augment.transforms.{name}: {error}") from error
