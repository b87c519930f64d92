"""The classification head: the layer, or layers, of a timm model that produce the logits."""

from typing import Any

from torch import nn


def list_classifier_names(network: Any) -> tuple[str, ...]:
    """Return the names of the modules that produce the logits: one classifier, or two in distilled transformers."""
    classifier = network.get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    return tuple(name for name, module in network.named_modules() if any(module is head for head in heads))


def init_head(network: Any) -> None:
    """Initialize the head with small random weights, so that a stage starts from nearly uniform probabilities.

    timm's own initialization differs between models; with few classes some are so large that ten epochs only undo it.
    """
    for name in list_classifier_names(network):
        head = network.get_submodule(name)
        if isinstance(head, nn.Linear | nn.Conv2d):
            nn.init.normal_(head.weight, std=0.01)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
