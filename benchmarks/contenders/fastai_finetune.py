"""Train with fastai as in its documentation: `ImageDataLoaders.from_folder`, a `Learner`, `fine_tune`.

The defaults are unchanged: fp32, the usual memory layout, one decoding process per core, the one-cycle schedule, and
`train_bn=True`, so that batch norm is also trained in the frozen backbone. The network is that of the other contenders,
including the linear head, split into backbone and head as `vision_learner` does, because fastai's own head is larger.
The learning rates are those of the others: 1e-3 for the head, then 1e-4 for the backbone.
"""

import statistics
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fastai.vision import all as fastai
from job import Answer, Job
from network import build_network, peak_memory_mib
from torch import nn


class Clock(fastai.Callback):
    """Measure the two fits of `fine_tune`, frozen and unfrozen."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.coming = answer, iter(("pretrain", "finetune"))

    def before_fit(self) -> None:
        self.phase, self.start, self.speeds = next(self.coming), perf_counter(), []

    def before_train(self) -> None:
        self.epoch_start, self.images = perf_counter(), 0

    def after_batch(self) -> None:
        self.images += len(self.learn.yb[0]) if self.learn.training else 0

    def after_train(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.speeds.append(self.images / (perf_counter() - self.epoch_start))

    def after_fit(self) -> None:
        self.answer.phases[self.phase] = perf_counter() - self.start
        self.answer.images_per_second[self.phase] = statistics.median(self.speeds)


def backbone_and_head(network: nn.Module) -> list[list[nn.Parameter]]:
    head = list(network.get_classifier().parameters())
    return [[parameter for parameter in network.parameters() if all(parameter is not own for own in head)], head]


def main() -> None:
    job, answer = Job.of_command_line(), Answer()
    fastai.default_device(job.device == "cuda")
    fastai.set_seed(0)
    network = build_network(job)
    cfg = network.pretrained_cfg
    loaders = fastai.ImageDataLoaders.from_folder(
        job.data,
        train="train",
        valid="val",
        item_tfms=fastai.Resize(job.size, method=fastai.ResizeMethod.Pad, pad_mode=fastai.PadMode.Zeros),
        batch_tfms=fastai.Normalize.from_stats(cfg["mean"], cfg["std"]),
        bs=job.batch_size,
        device=torch.device(job.device),
    )
    learner = fastai.Learner(
        loaders,
        network,
        loss_func=fastai.CrossEntropyLossFlat(),
        splitter=backbone_and_head,
        metrics=fastai.accuracy,
        path=job.folder,
    )
    with learner.no_bar():
        # fine_tune halves the rate for the second phase, then divides it for the backbone: 1e-3 / 2 / 5.
        halves = job.head_lr / 2 / job.network_lr
        learner.fine_tune(job.epochs, base_lr=job.head_lr, freeze_epochs=job.epochs, lr_mult=halves, cbs=Clock(answer))
        test = loaders.test_dl(fastai.get_image_files(Path(job.data) / "test"), with_labels=True)
        answer.accuracy = float(learner.validate(dl=test)[1])
    answer.memory_mib = peak_memory_mib(job.device)
    answer.note = f"{loaders.train.fake_l.num_workers} decoding processes"
    answer.say()


if __name__ == "__main__":
    main()
