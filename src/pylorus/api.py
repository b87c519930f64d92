"""The functions of `import pylorus`: train, load a model, predict, validate, audit and report from Python.

Each does what the command of that name does, by the same code. Nothing heavy is imported before it is called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from pylorus.data.audit import Audit
    from pylorus.deploy.model import InferenceModel
    from pylorus.report.results import ReportOptions

Paths = str | Path | Sequence[str | Path]
"""A path, or several: files, folders and glob patterns."""


@dataclass(frozen=True, eq=False)
class Validation:
    """Performance of a model on images of known classes.

    Attributes:
        predictions: One row per image, as `Model.predict` returns it.
        metrics: The evaluation as `pylorus predict --evaluate` writes it: accuracy, sensitivity, specificity, AUROC and
            more, with 95 % confidence intervals.
        confusion: Number of images by true class (rows) and predicted class (columns).
    """

    predictions: "pd.DataFrame"
    metrics: dict[str, object]
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

    def predict(self, images: Paths, *, class_name: str | None = None, batch: int = 32) -> "pd.DataFrame":
        """Predict images by the code of `pylorus predict`.

        Args:
            images: Files, folders or glob patterns.
            class_name: Short name of the class that decides; None: the bundle's own.
            batch: Images per batch.

        Returns:
            One row per image: path, predicted, a calibrated probability/NAME for each class, decision, abstain, why,
            unlikeness, error, and true where folders are named after classes.

        Raises:
            PylorusError: If an input does not exist, or there are no images.
        """
        from pylorus.deploy.predict import PredictOptions, predict_table

        return predict_table(self._model, _list_paths(images), PredictOptions(class_name=class_name, batch=batch))

    def validate(self, folders: Paths, *, group: str | None = None, batch: int = 32) -> Validation:
        """Evaluate the model on class folders; see `pylorus.validate`."""
        import pandas as pd

        from pylorus.deploy.predict import PredictOptions, evaluate_predictions, predict_table

        options = PredictOptions(evaluate=True, group=group, batch=batch)
        table = predict_table(self._model, _list_paths(folders), options)
        metrics = evaluate_predictions(iter([table]), self._model.description, options)
        names = list(self.short_names)
        known = table[(table["true"] != "") & (table["error"] == "")]
        confusion = pd.crosstab(known["true"], known["predicted"]).reindex(index=names, columns=names, fill_value=0)
        return Validation(table, metrics, confusion)


def load_model(path: str | Path, *, device: str = "auto", network: Callable[..., object] | None = None) -> Model:
    """Load a trained model; every file is verified, and nothing in it is executed.

    Args:
        path: A run's folder, its bundle (the folder model/), or an export.
        device: auto, cpu, cuda or mps.
        network: For a network of your own (`model._target_`): its class or function, or a module of its kind, which
            gets the bundle's weights in a copy. Only the arguments and weights are the bundle's.

    Raises:
        PylorusError: If there is no valid bundle or export; the message names the file and what is wrong.
    """
    from pylorus.deploy.predict import load_model as load_inference_model

    folder = Path(path)
    if (folder / "status.json").is_file() and (folder / "model").is_dir():
        folder = folder / "model"
    return Model(load_inference_model(folder, device, network=network))


def validate(model: Model | str | Path, folders: Paths, *, group: str | None = None) -> Validation:
    """Evaluate a model on images of known classes.

    Args:
        model: The model, or where it is: see `load_model`.
        folders: Folders that contain folders named after the classes.
        group: Regular expression that finds the patient in a path, for the confidence intervals; None: each image is
            its own.

    Raises:
        PylorusError: If no image is in a folder named after a class.
    """
    return (model if isinstance(model, Model) else load_model(model)).validate(folders, group=group)


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

    Raises:
        PylorusError: If the folder or manifest holds no image set.
    """
    from pylorus.report.audit_page import audit_images

    return audit_images(
        Path(folder),
        manifest=None if manifest is None else Path(manifest),
        group=group,
        cache=None if cache is None else Path(cache),
    )


def report(paths: Paths, output: str | Path | None = None, *, options: "ReportOptions | None" = None) -> Path:
    """Write the report of a run, a sweep or several runs; return the path of the HTML page.

    Args:
        paths: Folder of a run or of a sweep, or several.
        output: Output folder; None: `report` in a single run or sweep, or in the current folder for several.
        options: Options of the report; None: the defaults.

    Raises:
        PylorusError: If a path is not a run or sweep, or a file is damaged; the message names it.
    """
    from pylorus.report.page import write_report

    return write_report(paths, output, options=options)


def _list_paths(paths: Paths) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
