"""The one network of all contenders that build it themselves, in timm's own way, with a head drawn as Pylorus does."""

import timm
import torch
from job import Job
from torch import nn


def build_network(job: Job) -> nn.Module:
    """The backbone with the job's weights and a new linear head of small random weights."""
    overlay = {} if job.weights == "hub" else {"pretrained_cfg_overlay": {"file": job.weights}}
    network = timm.create_model(job.model, pretrained=True, num_classes=job.classes, **job.model_args, **overlay)
    torch.manual_seed(0)
    nn.init.normal_(network.get_classifier().weight, std=0.01)
    nn.init.zeros_(network.get_classifier().bias)
    return network


def set_phase(network: nn.Module, phase: str) -> None:
    """Freezes all but the classifier for the first phase, nothing for the second.

    Without a parameter that learns before the classifier, autograd builds no graph for the trunk.
    """
    head = network.get_classifier()
    for parameter in network.parameters():
        parameter.requires_grad_(phase == "finetune")
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    set_mode(network, phase)


def set_mode(network: nn.Module, phase: str) -> None:
    """The modes of a training epoch: what is frozen stays in evaluation mode, batch norm and dropout too."""
    network.train(phase == "finetune")
    network.get_classifier().train()


def peak_memory_mib(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
