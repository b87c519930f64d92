"""Train with Lightning as in tutorials: a LightningModule, torchvision's ImageFolder, two fits (bf16 by option)."""

import statistics
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytorch_lightning as pl
import torch
from job import Answer, Job
from network import build_network, peak_memory_mib, set_mode, set_phase
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision import transforms
from torchvision.datasets import ImageFolder


class LitClassifier(pl.LightningModule):
    """A network; `phase` determines which part of it is trained."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network, self.classes, self.phase, self.lr = network, classes, "pretrain", 1e-3

    def begin(self, phase: str, lr: float) -> None:
        self.phase, self.lr = phase, lr
        set_phase(self.network, phase)

    def on_train_epoch_start(self) -> None:
        set_mode(self.network, self.phase)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._score("test", batch)

    def configure_optimizers(self) -> dict[str, object]:
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=self.lr, weight_decay=0.01)
        epochs = self.trainer.max_epochs
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        }

    def _score(self, part: str, batch: list[Tensor]) -> None:
        logits = self(batch[0])
        self.log(f"{part}_loss", functional.cross_entropy(logits, batch[1]))
        self.log(f"{part}_accuracy", multiclass_accuracy(logits, batch[1], self.classes, average="micro"))


class Clock(pl.Callback):
    """Measure the training images per second of each epoch; Lightning validates before an epoch ends."""

    def __init__(self) -> None:
        self.speeds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start, self.images = perf_counter(), 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.images += len(batch[1])
        if batch_idx + 1 == trainer.num_training_batches:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.speeds.append(self.images / (perf_counter() - self.start))


def loader(job: Job, part: str, network: nn.Module) -> DataLoader:
    cfg = network.pretrained_cfg
    prepare = transforms.Compose(
        [
            transforms.Resize(job.size),
            transforms.CenterCrop(job.size),
            transforms.ToTensor(),
            transforms.Normalize(cfg["mean"], cfg["std"]),
        ]
    )
    dataset = ImageFolder(f"{job.data}/{part}", prepare)
    return DataLoader(
        dataset,
        job.batch_size,
        shuffle=part == "train",
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        pin_memory=job.device == "cuda",
    )


def main() -> None:
    job, answer = Job.of_command_line(), Answer()
    pl.seed_everything(0)
    network = build_network(job)
    module = LitClassifier(network, job.classes)
    loaders = {part: loader(job, part, network) for part in ("train", "val", "test")}
    for phase, lr in (("pretrain", job.head_lr), ("finetune", job.network_lr)):
        with answer.phase(phase):
            module.begin(phase, lr)
            clock = Clock()
            trainer = pl.Trainer(
                max_epochs=job.epochs,
                accelerator=job.device,
                devices=1,
                precision="bf16-mixed" if job.options.get("bf16") else "32-true",
                default_root_dir=job.folder,
                logger=pl.loggers.CSVLogger(job.folder),
                callbacks=[clock],
                enable_progress_bar=False,
            )
            trainer.fit(module, loaders["train"], loaders["val"])
        answer.images_per_second[phase] = statistics.median(clock.speeds)
    answer.accuracy = float(trainer.test(module, loaders["test"])[0]["test_accuracy"])
    answer.memory_mib = peak_memory_mib(job.device)
    answer.say()


if __name__ == "__main__":
    main()
