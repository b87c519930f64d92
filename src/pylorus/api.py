"""The functions of `import pylorus`: train, load a model, predict, validate and audit from Python.

Each does what the command of that name does, by the same code. Nothing heavy is imported before it is called.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Lt

from pylorus.core.arguments import check_arguments, describe_value
from pylorus.core.errors import TRAIN_COMMAND, PylorusError, translate_errors
from pylorus.core.io import resolve_path

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from pylorus.data.audit import Audit
    from pylorus.deploy.model import InferenceModel

Paths: TypeAlias = str | Path | Sequence[str | Path]
"""A path, or several: files, folders and glob patterns."""
Images: TypeAlias = "Paths | NDArray[np.uint8] | Sequence[NDArray[np.uint8]]"
"""Paths; or decoded images, uint8 RGB of shape (height, width, 3) or (images, height, width, 3)."""

ARGUMENTS = {
    "--class": "class_name",
    "--group": "group",
    "--device": "device",
    "--trust": "trust",
    "--evaluate": "folders",
    "--prevalence": "prevalence",
    "--network: found an export, which contains its network. Leave the option out.": (
        "network: found an export, which contains its network. Leave the argument out."
    ),
    "Leave out --network (in Python: network).": "Leave out the argument network.",
    "--network MODULE.NAME, or in Python: load_model": "load_model",
    "data.manifest": "manifest",
    "data.group": "group",
    "data.root": "folder",
    " Add --frames-every SECONDS to choose the frames to predict.": " The command `pylorus predict` predicts videos.",
}
"""What the options and keys in messages are called in Python."""


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        folder: The run's folder.
        model: The folder of its bundle, for `load_model`.
        stage: Name of the stage that is shipped.
        metrics: Accuracy, and the indices of each class that tables show, of the shipped stage on validation and test
            images, in [0, 1], as test/accuracy and test/sensitivity/GC; NaN where undefined.
    """

    folder: Path
    model: Path
    stage: str
    metrics: dict[str, float]


@check_arguments
def train(
    overrides: Sequence[str] = (), *, folder: str | Path | None = None, config_dir: str | Path | None = None
) -> TrainedRun:
    """Train a run in this process, from its main thread, and wait for it.

    The same overrides on the same folder resume a run that was interrupted.

    Args:
        overrides: As on the command line of `train.py`, such as `["data.root=images"]`.
        folder: The run's folder; None: a new one in outputs/.
        config_dir: Folder of your own configuration, as `--config-dir` on the command line; None: Pylorus's alone.

    Raises:
        PylorusError: If something that the user can fix is wrong; the message says what.
    """
    for word in overrides:
        if word.startswith("-"):
            raise PylorusError(
                f'train: overrides: found "{word}", an option of the command line, expected KEY=VALUE. Use the '
                f"argument config_dir; for sweeps and help: {TRAIN_COMMAND}."
            )
    path = None if folder is None else resolve_path(folder, argument="folder")
    if path is not None and path.exists() and not path.is_dir():
        raise PylorusError(f"train: folder: {path} is a file, expected a new folder or that of a run.")
    own = None if config_dir is None else resolve_path(config_dir, argument="config_dir")
    import pylorus.launch.main

    return _read_trained_run(pylorus.launch.main.run_overrides(list(overrides), path, config_dir=own).path)


def _read_trained_run(folder: Path) -> TrainedRun:
    from pylorus.evaluation.confusion import compute_class_metric, overall_indices, select_class_metrics
    from pylorus.runs.folder import RunFolder
    from pylorus.runs.predictions import read_predictions

    shipped = RunFolder(folder).shipped
    assert shipped is not None  # the run has just finished
    metrics: dict[str, float] = {}
    for split in ("val", "test"):
        saved = read_predictions(RunFolder(folder).get_predictions_path(shipped.name, split))
        confusion, names = saved.confusion, saved.predictions.class_names
        metrics[f"{split}/accuracy"] = float(overall_indices(confusion).accuracy)
        for metric in select_class_metrics():
            for name, value in zip(names, compute_class_metric(metric, confusion), strict=True):
                metrics[f"{split}/{metric.name}/{name}"] = float(value)
    return TrainedRun(folder, folder / "model", shipped.name, metrics)


@dataclass(frozen=True, eq=False)
class Validation:
    """Performance of a model on images of known classes.

    Attributes:
        predictions: One row per image, as `Model.predict` returns it.
        metrics: The evaluation as `pylorus predict --evaluate` writes it: accuracy, sensitivity, specificity, AUROC and
            more, with 95 % confidence intervals, as in `metrics["accuracy"]["value"]`.
        confusion: Number of images by true class (rows) and predicted class (columns).
    """

    predictions: "pd.DataFrame"
    metrics: dict[str, Any]
    confusion: "pd.DataFrame"


class Model:
    """A trained model: a bundle or an export of one. `load_model` loads it.

    Attributes:
        classes: Name of each class, in label order.
        short_names: Short name of each class, which tables use.
    """

    def __init__(self, model: "InferenceModel") -> None:
        self._model = model
        self.classes: tuple[str, ...] = tuple(model.description.classes)
        self.short_names: tuple[str, ...] = tuple(model.description.short_names)

    def __repr__(self) -> str:
        description = self._model.description
        return f"<Model {description.architecture} of {', '.join(self.short_names)} in {self._model.folder}>"

    @check_arguments
    def predict(
        self,
        images: "Images",
        *,
        class_name: str | None = None,
        batch: Annotated[int, Ge(1)] = 32,
        tta: Literal["mirror", "flips", "turns"] | None = None,
    ) -> "pd.DataFrame":
        """Predict images by the code of `pylorus predict`.

        Args:
            images: Files, folders or glob patterns; or decoded images: a uint8 RGB array of shape (height, width, 3),
                several of them, or one array of shape (images, height, width, 3).
            class_name: Short name of the class that decides; None: the bundle's own.
            batch: Images per batch, at least 1.
            tta: Test-time augmentation: the probabilities are the mean over an image and its mirror image, over its
                flips or over its quarter turns; thresholds were measured without it. None: the image as it is.

        Returns:
            One row per image: path, predicted, a calibrated probability/NAME for each class, decision, abstain, why,
            unlikeness, error, and true where folders are named after classes. The path of a decoded image is its
            number, as in "image 0". A file that is in several of the folders has one row.

        Raises:
            PylorusError: If an input does not exist, or there are no images.
        """
        from pylorus.deploy.predict import PredictOptions, predict_table

        inputs = _list_images(images)
        with translate_errors(ARGUMENTS):
            return predict_table(self._model, inputs, PredictOptions(class_name=class_name, batch=batch, tta=tta))

    @check_arguments
    def validate(
        self,
        folders: Paths,
        *,
        group: str | None = None,
        prevalence: Annotated[float, Gt(0), Lt(1)] | None = None,
        batch: Annotated[int, Ge(1)] = 32,
    ) -> Validation:
        """Evaluate the model on class folders; see `pylorus.validate`."""
        import pandas as pd

        from pylorus.deploy.predict import PredictOptions, predict_table
        from pylorus.deploy.validation import evaluate_predictions

        inputs = _list_paths(folders, argument="folders")
        options = PredictOptions(evaluate=True, group=group, prevalence=prevalence, batch=batch)
        with translate_errors(ARGUMENTS):
            table = predict_table(self._model, inputs, options)
            metrics = evaluate_predictions(iter([table]), self._model.description, group=group, prevalence=prevalence)
        names = list(self.short_names)
        known = table[(table["true"] != "") & (table["error"] == "")]
        confusion = pd.crosstab(known["true"], known["predicted"]).reindex(index=names, columns=names, fill_value=0)
        return Validation(table, metrics, confusion)


@check_arguments
def load_model(
    path: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    network: Callable[..., object] | None = None,
    trust: Paths | None = None,
) -> Model:
    """Load a trained model; every file is verified, and nothing in it is executed.

    Args:
        path: The folder of a run or an ensemble, its bundle (the folder model/), or an export.
        device: auto, cpu, cuda or mps.
        network: For a network of your own (`model._target_`): its class or function, or a module of its kind, which
            gets the bundle's weights in a copy. Only the arguments and weights are the bundle's.
        trust: Files with public keys of which one must have signed the model (`pylorus sign`); None to accept any.

    Raises:
        PylorusError: If there is no valid bundle or export; the message names the file and what is wrong. If the
            network is of your own and `network` is missing, it is a subclass, UnknownNetworkError.
    """
    from pylorus.deploy.predict import load_model as load_inference_model

    folder = _find_bundle(resolve_path(path, argument="path"))
    with translate_errors(ARGUMENTS):
        keys = [] if trust is None else [Path(key) for key in _list_paths(trust, argument="trust")]
        return Model(load_inference_model(folder, device, network=network, trust=keys))


def _find_bundle(path: Path) -> Path:
    """Return the bundle of a run, or the path itself; a folder or file beside the bundle is refused."""
    from pylorus.runs.folder import STATUS

    if any((path / name).is_file() for name in (STATUS, "ensemble.json")) and (path / "model").is_dir():
        return path / "model"
    if path.is_file():
        raise PylorusError(f"path: {path} is a file, expected a folder: that of a run, a bundle or an export.")
    if path.is_dir() and (path.parent / STATUS).is_file() and path.name != "model":
        raise PylorusError(f"path: {path} is a folder inside a run. Use the run: load_model({str(path.parent)!r}).")
    return path


@check_arguments
def validate(
    model: Model | str | Path,
    folders: Paths,
    *,
    group: str | None = None,
    prevalence: Annotated[float, Gt(0), Lt(1)] | None = None,
) -> Validation:
    """Evaluate a model on images of known classes.

    Args:
        model: The model, or where it is: see `load_model`.
        folders: Folders that contain folders named after the classes; an image that is in several counts once.
        group: Regular expression that finds the patient in a path, for the confidence intervals; None: each image is
            its own.
        prevalence: Proportion of the class of interest, in (0, 1), for which PPV and NPV are computed too:
            `metrics["decision"]["at_prevalence"]`.

    Raises:
        PylorusError: If no image is in a folder named after a class.
    """
    loaded = model if isinstance(model, Model) else load_model(model)
    return loaded.validate(folders, group=group, prevalence=prevalence)


@check_arguments
def audit(
    folder: str | Path,
    *,
    manifest: str | Path | None = None,
    group: str | None = None,
    cache: str | Path | None = None,
) -> "Audit":
    """Check an image set for leaks between splits, near copies, damaged files, burned-in text and other problems.

    Args:
        folder: FOLDER/CLASS/… or FOLDER/{train,val,test}/CLASS/….
        manifest: CSV or Parquet file that lists the images below the folder; None for class folders.
        group: Regular expression that finds the patient in a path below the folder; None for no groups.
        cache: Folder that holds what was read of the files for the next time; None: nothing is cached.

    Returns:
        The audit. Each of its `findings` has a code, a severity (leak, error, warning or note), a sentence, a remedy,
        and items: for each case the rows of its files in `images.table`.

    Raises:
        PylorusError: If the folder or manifest holds no image set.
    """
    from pylorus.report.audit_page import audit_images

    root = resolve_path(folder, argument="folder")
    table = None if manifest is None else resolve_path(manifest, argument="manifest")
    store = None if cache is None else resolve_path(cache, argument="cache")
    with translate_errors(ARGUMENTS):
        return audit_images(root, manifest=table, group=group, cache=store)


def _list_paths(paths: Any, *, argument: str) -> list[str]:
    """Return the paths as text, with `~` expanded.

    Raises:
        PylorusError: If a path is empty or something else.
    """
    is_single = isinstance(paths, str | Path | bytes | Mapping) or not isinstance(paths, Iterable)
    values = [paths] if is_single else list(paths)
    for value in values:
        if not isinstance(value, str | Path):
            raise PylorusError(f"{argument}: found {describe_value(value)}, expected a path or several.")
    return [str(resolve_path(value, argument=argument)) for value in values]


def _list_images(images: Any) -> "list[str | NDArray[np.uint8]]":
    """Return paths as `_list_paths` does, or decoded images as arrays of shape (height, width, 3).

    Raises:
        PylorusError: If they are neither.
    """
    values = list(images) if isinstance(images, list | tuple) else [images]
    if not any(_is_array(value) for value in values):
        if values and type(values[0]).__module__.startswith("PIL."):
            raise PylorusError(
                "images: found an image of PIL, expected paths or uint8 arrays. Write "
                'numpy.asarray(image.convert("RGB")).'
            )
        return [*_list_paths(images, argument="images")]
    arrays: list[NDArray[np.uint8]] = []
    for value in values:
        shape: Any = getattr(value, "shape", ())
        if not _is_array(value) or str(value.dtype) != "uint8" or len(shape) not in (3, 4) or shape[-1] != 3:
            kind = f" and type {value.dtype}" if _is_array(value) else ""
            raise PylorusError(
                f"images: found {describe_value(value)}{kind}, expected paths, or uint8 RGB arrays of shape (height, "
                "width, 3), with values from 0 to 255."
            )
        arrays += [value] if len(shape) == 3 else list(value)
    return [*arrays]


def _is_array(value: Any) -> bool:
    """Return whether a value is an array or tensor of numbers; a Series or array of paths is not."""
    return hasattr(value, "shape") and getattr(getattr(value, "dtype", None), "kind", "f") not in "OUST"
