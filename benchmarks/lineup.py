"""The contenders: which modules each one needs, how it is started, and how its result is read."""

import json
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contenders import pylorus_run
from job import SAYS, Answer, Job

HERE = Path(__file__).parent
NEEDS_OF_PYLORUS = ("hydra", "albumentations", "pytorch_lightning", "torchmetrics", "pyarrow", "rich", "timm")


@dataclass(frozen=True)
class Known:
    """The full name of a model, its input size, and the block from which it is trained in partial fine-tuning."""

    name: str
    size: int
    late: str


MODELS = {
    "resnet50": Known("resnet50.tv_in1k", 224, "layer4"),
    "vgg19": Known("vgg19.tv_in1k", 224, "features.28"),
    "inception_v3": Known("inception_v3.tv_in1k", 299, "Mixed_7a"),
    "mobilenetv2_100": Known("mobilenetv2_100", 224, "blocks.6"),
    "resnet18": Known("resnet18.tv_in1k", 224, "layer4"),
    "test_resnet": Known("test_resnet.r160_in1k", 160, "layer4"),
}

WORKS: dict[str, dict[str, Any]] = {
    "standard": {"model": "resnet50", "images": 480, "epochs": 5, "weights": "drawn", "size": None},
    "overhead": {"model": "test_resnet", "images": 480, "epochs": 5, "weights": "none", "size": 64},
    "frames": {"model": "resnet18", "images": 1200, "epochs": 3, "weights": "none", "size": None},
}
"""The kinds of work, with the options that they set unless the command line does."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: Its name in tables.
        what: A description in one line, for the table of all contenders.
        needs: Modules that must be installed.
        script: Its file in contenders/, or None for Pylorus itself.
        options: The options of its job.
        after: The contender whose cache this one finds: it runs after that one, and only together with it.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    script: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    after: str | None = None

    @property
    def lacking(self) -> list[str]:
        return [name for name in self.needs if find_spec(name) is None]

    def command(self, job: Job, checkout: Path) -> list[str]:
        if self.script is None:
            return pylorus_run.command(job, checkout)
        path = Path(job.folder) / "job.json"
        job.write(path)
        return [sys.executable, str(HERE / "contenders" / self.script), str(path)]

    def read(self, job: Job, output: str) -> Answer:
        """Read the result of a run that succeeded.

        Raises:
            RuntimeError: If it printed no result.
        """
        if self.script is None:
            return pylorus_run.read(job)
        said = [line for line in output.splitlines() if line.startswith(SAYS)]
        if not said:
            raise RuntimeError("the contender ended without printing a result")
        return Answer(**json.loads(said[-1].removeprefix(SAYS)))


def _pylorus(name: str, what: str, *, after: str | None = None, **options: Any) -> Contender:
    return Contender(name, what, NEEDS_OF_PYLORUS, options=options, after=after)


PYLORUS = _pylorus("pylorus", "both stages, with an empty cache", stages="both")
FASTAI = Contender("fastai", "fastai's defaults, fine_tune", ("fastai", "timm"), "fastai_finetune.py")
TIMM_BEST = Contender(
    "timm_best",
    "a script built from timm's components: channels_last, bf16, fused",
    ("timm",),
    "timm_style.py",
    {"best": True},
)


def contenders(epochs: int, work: str = "standard") -> list[Contender]:
    """Return all contenders of a kind of work in the order in which they run.

    Args:
        epochs: Number of epochs of one phase.
        work: One of `WORKS`.
    """
    if work == "overhead":
        return [PYLORUS, TIMM_BEST, FASTAI, *OPTIONAL]
    if work == "frames":
        read = "catalog, audit, leaks and split"
        return [
            PYLORUS,
            _pylorus("pylorus_again", "the same, second run", stages="both", after="pylorus"),
            TIMM_BEST,
            FASTAI,
            Contender("opencv", "bare OpenCV decode, a process per core", ("cv2",), "opencv_decode.py"),
            Contender("pass", f"Pylorus's {read}, first pass", NEEDS_OF_PYLORUS, "pylorus_pass.py"),
            Contender(
                "pass_again", f"Pylorus's {read}, second pass", NEEDS_OF_PYLORUS, "pylorus_pass.py", after="pass"
            ),
            *OPTIONAL,
        ]
    late = {"stages": "finetune", "late": True, "epochs": 2 * epochs}
    return [
        PYLORUS,
        FASTAI,
        Contender("timm", "a script built from timm's components, no flags: fp32", ("timm",), "timm_style.py"),
        TIMM_BEST,
        Contender("lightning", "Lightning as in tutorials, fp32", ("pytorch_lightning", "timm"), "lightning_plain.py"),
        Contender(
            "lightning_bf16",
            "the same, precision=bf16-mixed",
            ("pytorch_lightning", "timm"),
            "lightning_plain.py",
            {"bf16": True},
        ),
        _pylorus("pylorus_uncached", "both stages, cache.prefix=false", stages="both", prefix=False),
        _pylorus("pylorus_late", "only finetune, from a late block on", **late),
        _pylorus("pylorus_late_uncached", "the same, cache.prefix=false", **late, prefix=False),
        _pylorus(
            "pylorus_sweep", "pretrain, two jobs of one sweep; results of the second", stages="pretrain", sweep=True
        ),
        *OPTIONAL,
    ]


OPTIONAL = (
    Contender(
        "timm_compiled",
        "timm_best with torch.compile",
        ("timm",),
        "timm_style.py",
        {"best": True, "compile": True},
    ),
)
"""Contenders that run only if `--only` names them."""
