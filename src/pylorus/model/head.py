"""The head: the layer, or layers, of a timm model that give the logits."""

from typing import Any

from torch import nn


def classifier_names(network: Any) -> tuple[str, ...]:
    """The names of the modules that give the logits: timm's classifier, two of them in distilled transformers."""
    found = network.get_classifier()
    heads = found if isinstance(found, tuple | list) else (found,)
    return tuple(name for name, module in network.named_modules() if any(module is head for head in heads))


def draw_head(network: Any) -> None:
    """Draws small weights for the head, so that a stage starts from even odds.

    timm's own draws differ from model to model; for few classes some are so large that ten epochs only undo them.
    """
    for name in classifier_names(network):
        head = network.get_submodule(name)
        if isinstance(head, nn.Linear | nn.Conv2d):
            nn.init.normal_(head.weight, std=0.01)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
