"""Build the timm network of all contenders except Pylorus, with a head that is initialized as Pylorus does."""

import timm
import torch
from job import Job
from torch import nn


def build_network(job: Job) -> nn.Module:
    """Build the backbone with the job's weights and a new linear head with small random weights."""
    torch.manual_seed(0)
    overlay = {} if job.weights in ("hub", "none") else {"pretrained_cfg_overlay": {"file": job.weights}}
    pretrained = job.weights != "none"
    network = timm.create_model(job.model, pretrained=pretrained, num_classes=job.classes, **job.model_args, **overlay)
    torch.manual_seed(0)
    nn.init.normal_(network.get_classifier().weight, std=0.01)
    nn.init.zeros_(network.get_classifier().bias)
    return network


def set_phase(network: nn.Module, phase: str) -> None:
    """Freeze everything except the classifier in the first phase, and nothing in the second.

    Without a trainable parameter before the classifier, autograd builds no graph for the backbone.
    """
    head = network.get_classifier()
    for parameter in network.parameters():
        parameter.requires_grad_(phase == "finetune")
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    set_mode(network, phase)


def set_mode(network: nn.Module, phase: str) -> None:
    """Set the modes for a training epoch: frozen layers, including batch norm and dropout, stay in evaluation mode."""
    network.train(phase == "finetune")
    network.get_classifier().train()


def peak_memory_mib(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
