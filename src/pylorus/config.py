"""The schema: one dataclass a configuration group, each key with its meaning, unit and range.

A default is written here and nowhere else; the files in conf/ only say what differs. Importing this module costs
no more than the standard library, so that help and errors come at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

Value = TypeVar("Value")

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"
"""The configuration's files: in a clone at its top level, in a wheel inside the package."""


def key(
    default: Value,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Value:
    """A field of the schema: its default, its meaning and the values it takes.

    Both a range (`low` and `high` included) and choices: a number in the range, or one of these words.
    """
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    if isinstance(default, dict | list):
        made = field(default_factory=lambda: cast(Any, type(default)(default)), metadata=metadata)
    else:
        made = field(default=default, metadata=metadata)
    return cast(Value, made)


@dataclass
class DrawnConfig:
    """The drawn image set of `data=synthetic`."""

    images: int = key(64, "images of each class", low=6)
    size: int = key(160, "side of the square frames, in pixels", low=32)
    images_per_patient: int = key(2, "images of each patient", low=1)
    overlay: bool = key(False, "burn a console's text into the frames")
    seed: int = key(0, "seed of the painter: the same seed draws the same set", low=0)


@dataclass
class DataConfig:
    """Where the images come from, how they are split, and how a file becomes the network's input."""

    kind: str = key(
        "folders",
        "folders: the user's class folders; manifest: a table that names files; shards: tar files; synthetic: drawn",
        choices=("folders", "manifest", "shards", "synthetic"),
    )
    root: str | None = key(
        None,
        "folder that holds ROOT/{train,val,test}/CLASS, ROOT/{train,test}/CLASS or ROOT/CLASS; of shards, their "
        "folder, or a path or URL with braces: shard-{000..127}.tar",
    )
    manifest: str | None = key(
        None,
        "CSV or Parquet file with a row an image: path (below data.root, or beside the manifest), label and, where "
        "known, group and split; further columns (device, site, age) are kept for splits and subgroup tables",
    )
    shard_window: int | None = key(
        None,
        "shards whose training images are shuffled into one another, window after window; null: all images at once",
        low=1,
    )
    classes: list[str] | None = key(
        None, "names of the class folders, in the order of all tables; null: those found, sorted"
    )
    short_names: list[str] | None = key(None, "one short name a class, in the order of data.classes, e.g. [GC,GU,CG]")
    group: str | None = key(
        None,
        "regular expression that finds the patient in a path below the root (its first parentheses, or all it "
        "matches); null: every image is its own group",
    )
    validation: str = key(
        "cut",
        "cut: a part of the training images, by group; test: the test images, as the study did, which makes "
        "every figure optimistic",
        choices=("cut", "test"),
    )
    val_fraction: float = key(
        0.15, "share of the training images to validate on, where no val folder is given", low=0.01, high=0.5
    )
    test_fraction: float = key(
        0.15, "share of the images to test on, where no test folder is given", low=0.01, high=0.5
    )
    split_seed: int = key(
        0, "seed of the split alone: runs of any seed train and test on the same images until it changes", low=0
    )
    fold: int | float | str | None = key(
        None,
        "test on this one of data.folds parts of the images, as in -m data.fold=0,1,2,3,4, or on the images of this "
        "value of data.fold_column; null: one cut",
    )
    folds: int = key(5, "how many parts data.fold counts; with data.fold_column the number of its values", low=2)
    fold_column: str | None = key(
        None,
        "column of the manifest whose values are the folds, to leave one site out at a time: "
        "-m data.fold=A,B,C data.fold_column=site",
    )
    split_file: str | None = key(
        None, "split.csv of another run: the same images in the same parts; refused where an image has changed"
    )
    test_column: str | None = key(
        None, "column of the manifest that says what is tested on, with data.test_values or data.test_from"
    )
    test_values: list[str] | None = key(None, "values of data.test_column that make the test set, such as a site")
    test_from: str | None = key(
        None, "value of data.test_column from which on images make the test set, such as a date; as numbers or as text"
    )
    patients: str = key(
        "paths",
        "where groups come from: data.group or the manifest; dicom: PatientID, hashed",
        choices=("paths", "dicom"),
    )
    on_error: str = key(
        "fail", "quarantine: files that can't be read are left out and listed", choices=("fail", "quarantine")
    )
    accept_leaks: bool = key(False, "go on although a patient or a copy of an image lies in two parts of the split")
    image_size: int | None = key(
        None, "side of the network's input in pixels; null: what the backbone was made for", low=32
    )
    fit: str = key(
        "pad",
        "how a frame becomes square: pad with black, stretch, or crop the centre",
        choices=("pad", "stretch", "crop"),
    )
    crop: str = key(
        "none",
        "auto: crop each frame to its field of view and black out the rest, so that borders, menus and burned-in text "
        "do not reach the network; where no field is found a frame stays as it is",
        choices=("none", "auto"),
    )
    workers: int | None = key(None, "processes that decode images; null: fits the machine", low=0)
    drawn: DrawnConfig = field(default_factory=DrawnConfig)


@dataclass
class ModelConfig:
    """The backbone: any timm model."""

    name: str = key("???", "timm's name, best with its tag: architecture.weights; ??? means that it must be given")
    weights: str = key(
        "hub",
        "hub: fetched once, then cached; none: random; or a file (safetensors, or a pickle that holds only tensors)",
    )
    args: dict[str, Any] = key({}, "further arguments of timm.create_model, e.g. {drop_path_rate: 0.1}")


@dataclass
class StageConfig:
    """One stage of training: how deep the network learns, for how long, and how fast."""

    learn: str = key("all", "head, all, or a block's name (layer4): that block and all behind it learn")
    epochs: int = key(10, "passes over the training images", low=1)
    lr: float | None = key(None, "peak learning rate; null: optimizer.lr × lr_factor", low=0)
    lr_factor: float = key(1.0, "share of optimizer.lr that this stage takes where lr is null", low=0)
    layer_decay: float = key(
        1.0, "learning rate of a layer relative to the layer behind it; 1: the same for all", low=0.01, high=1
    )
    schedule: str = key(
        "cosine",
        "cosine: down to zero along a half cosine; plateau: a tenth after 3 epochs without improvement; constant",
        choices=("cosine", "plateau", "constant"),
    )
    warmup: float = key(0.1, "share of the stage's steps over which the learning rate rises from zero", low=0, high=0.9)
    patience: int | None = key(None, "stop after so many epochs without improvement; null: never", low=1)
    monitor: str = key(
        "loss",
        "what names the best epoch, on the validation images",
        choices=("loss", "accuracy", "precision", "sensitivity", "f1"),
    )
    augment: str | None = key(None, "a file of conf/augment (none, light, endoscopy); null: the run's augment")
    views: int | None = key(
        None,
        "augmented variants of each training image, of which what is frozen sees each once; null: a new one each epoch",
        low=1,
    )


@dataclass
class AugmentConfig:
    """How training images are varied: albumentations' transforms by name, with their arguments."""

    name: str = key("none", "the policy's name")
    transforms: dict[str, Any] = key({}, "transform: {argument: value}, applied in this order")


FUSED = ("adam", "adamw", "sgd")
"""Optimisers that are torch's own, which moves all weights in one pass, on CPU and GPU."""


@dataclass
class OptimizerConfig:
    """How weights move."""

    name: str = key("adamw", "adamw, sgd, or another of timm's optimisers")
    lr: float = key(1e-3, "learning rate from which each stage takes its own", low=0)
    weight_decay: float = key(0.01, "of weights, not of biases and norms", low=0)
    momentum: float = key(0.9, "of optimisers that have it (sgd)", low=0, high=1)
    clip: float | None = key(1.0, "largest norm of a step's gradient; null: no limit", low=0)


@dataclass
class LossConfig:
    """Cross entropy and its variations."""

    class_weights: str = key(
        "none", "balanced: a rare class weighs as much as a frequent one", choices=("none", "balanced")
    )
    label_smoothing: float = key(0.0, "share of each label that is spread over all classes", low=0, high=0.5)


@dataclass
class TrainerConfig:
    """The machine and how it is used."""

    accelerator: str = key("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "gpu", "mps"))
    precision: str = key(
        "auto", "auto: bf16 where it is measured to be faster; 32; bf16", choices=("auto", "32", "bf16")
    )
    devices: int = key(
        1, "processes that train together on a machine, each on a GPU of its own or a share of the CPU", low=1
    )
    strategy: str = key(
        "ddp",
        "of several devices: ddp: each holds all weights; fsdp: what learns is divided among them, with its gradients "
        "and moments, for backbones that no device holds",
        choices=("ddp", "fsdp"),
    )
    nodes: int = key(1, "machines that train together; more than one needs SLURM", low=1)
    batch_size: int | str = key(
        16,
        "images a step, of all devices together; auto: as many as fit the memory, found by trying: a power of two up "
        "to 128, on a GPU to 512",
        low=1,
        choices=("auto",),
    )
    channels_last: bool | None = key(
        None, "keep a pixel's channels together, which convolutions prefer; null: but for VGG on a CPU"
    )
    threads: int | None = key(None, "threads that compute on a CPU; null: the cores that this process may use", low=1)
    compile: bool = key(False, "translate what learns with torch.compile: minutes at the start, for long runs")
    progress: bool = key(True, "draw a progress bar where the output is a terminal")


@dataclass
class CacheConfig:
    """What is computed once and kept, for later epochs, stages and runs."""

    folder: str = key("outputs/cache", "where it is kept; runs that share it find each other's work")
    prefix: bool = key(
        True, "compute what lies before the first layer that learns once for each image, not in each epoch"
    )
    images: bool | None = key(
        None, "decode each image once and keep it at the network's size; null: where frames are over twice as large"
    )
    budget_gib: float = key(
        20.0, "most that the folder may hold, in GiB; what was not used for longest goes first", low=0
    )
    memory_gib: float = key(0.25, "most that is held in memory, in GiB; more is read from mapped files", low=0)


@dataclass
class LoggerConfig:
    """Where the curves are shown, beside metrics.csv in the run's folder."""

    name: str = key("csv", "csv: files alone; tensorboard; wandb", choices=("csv", "tensorboard", "wandb"))
    project: str = key("pylorus", "project in Weights & Biases")
    offline: bool = key(True, "Weights & Biases keeps everything on this machine; false: sends it, once logged in")
    images: bool = key(False, "show wrongly classified validation images too, which then leave with the rest")


@dataclass
class DeployConfig:
    """What a run ships in model/: the stage that report, card and `pylorus predict` speak of, and how it decides."""

    stage: str | None = key(
        None,
        "the stage that is shipped and reported; null: highest validation accuracy, of equals lowest validation loss, "
        "then the later stage",
    )
    class_name: str | None = key(None, "the class that decides, by its short or full name; null: the first class")
    sensitivity: float = key(
        0.95, "sensitivity that the threshold of each class is to guarantee for new patients", low=0.01, high=1
    )
    confidence: float = key(
        0.9,
        "confidence with which it is to be guaranteed; of fewer positive validation patients than that takes (45 for "
        "0.95 at 0.9) the lowest probability is the threshold, and card and report say what it guarantees",
        low=0.5,
        high=0.999,
    )
    prediction_sets: float | None = key(
        None,
        "share of each class's images whose prediction set is to hold that class, such as 0.9; null: no sets",
        low=0.5,
        high=0.99,
    )


@dataclass
class Config:
    """All of a run."""

    seed: int = key(
        0, "one run's chance: weights of the head, order, augmentation, dropout; the split has data.split_seed", low=0
    )
    report: bool = key(True, "write report/report.html at the end; `pylorus report RUN` writes it later too")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    run: list[str] = key([], "names of the stages that run, in this order; `stage=` sets it")
    stages: dict[str, StageConfig] = key({}, "the stages there are, by name")
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    deploy: DeployConfig = field(default_factory=DeployConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


GROUPS = ("data", "model", "stage", "augment", "optimizer", "trainer", "logger", "experiment")
"""The groups of conf/: `GROUP=FILE` on the command line."""
