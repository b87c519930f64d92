"""Train in the style of timm's train.py, with its factories for network, loader, optimizer and schedule.

`options.best` turns on the flags of an expert user: channels_last (except for VGG on a CPU, whose wide layer it slows
down), bf16 autocast if it is fast on the machine, fused AdamW, TF32. `options.compile` adds torch.compile. The script
neither writes checkpoints nor clips gradients, which is to its advantage.
"""

import statistics
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from job import Answer, Job
from network import build_network, peak_memory_mib, set_mode, set_phase
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader


class Script:
    """The state that timm's train.py has in local variables."""

    def __init__(self, job: Job) -> None:
        self.job, self.best = job, bool(job.options.get("best"))
        self.device = torch.device(job.device)
        if self.best:
            torch.set_float32_matmul_precision("high")
        self.network = build_network(job).to(self.device)
        wide = job.model.startswith("vgg") and job.device == "cpu"
        self.memory_format = torch.channels_last if self.best and not wide else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)
        self.forward: nn.Module = torch.compile(self.network) if job.options.get("compile") else self.network
        self.loss = nn.CrossEntropyLoss()
        self.loaders = {part: self._loader(part) for part in ("train", "val", "test")}

    def _loader(self, part: str) -> DataLoader:
        job = self.job
        config = resolve_data_config({}, model=self.network)
        dataset = create_dataset("", root=f"{job.data}/{part}")
        return create_loader(
            dataset,
            input_size=(3, job.size, job.size),
            batch_size=job.batch_size if part == "train" else 2 * job.batch_size,
            is_training=part == "train",
            no_aug=True,
            crop_pct=1.0,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            num_workers=job.workers,
            pin_memory=job.device == "cuda",
            device=self.device,
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.job.device, torch.bfloat16, enabled=self.best and self.job.bf16)

    def run_phase(self, phase: str, lr: float, answer: Answer) -> None:
        set_phase(self.network, phase)
        optimizer = create_optimizer_v2(
            self.network, opt="adamw", lr=lr, weight_decay=0.01, **({"fused": True} if self.best else {})
        )
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=self.job.epochs,
            warmup_epochs=0,
            step_on_epochs=False,
            updates_per_epoch=len(self.loaders["train"]),
        )
        speeds = []
        for epoch in range(epochs):
            set_mode(self.network, phase)
            start = perf_counter()
            images = self.train_one_epoch(epoch, optimizer, scheduler)
            speeds.append(images / (perf_counter() - start))
            print(f"{phase} {epoch + 1}: validation accuracy {self.validate('val'):.3f}", flush=True)
        answer.images_per_second[phase] = statistics.median(speeds)

    def train_one_epoch(self, epoch: int, optimizer, scheduler) -> int:
        images, updates = 0, epoch * len(self.loaders["train"])
        for pixels, target in self.loaders["train"]:
            pixels, target = pixels.to(self.device, memory_format=self.memory_format), target.to(self.device)
            with self.autocast():
                loss = self.loss(self.forward(pixels), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            scheduler.step_update(num_updates=updates)
            images += len(target)
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        return images

    @torch.inference_mode()
    def validate(self, part: str) -> float:
        self.network.eval()
        meter = AverageMeter()
        for pixels, target in self.loaders[part]:
            pixels, target = pixels.to(self.device, memory_format=self.memory_format), target.to(self.device)
            with self.autocast():
                logits = self.forward(pixels)
            meter.update(accuracy(logits, target)[0].item(), len(target))
        return meter.avg / 100


def main() -> None:
    job, answer = Job.of_command_line(), Answer()
    script = Script(job)
    for phase, lr in (("pretrain", job.head_lr), ("finetune", job.network_lr)):
        with answer.phase(phase):
            script.run_phase(phase, lr, answer)
    answer.accuracy = script.validate("test")
    answer.memory_mib = peak_memory_mib(job.device)
    answer.say()


if __name__ == "__main__":
    main()
