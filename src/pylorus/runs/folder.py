"""A run's folder: which file is where, how far the run and each stage have come, and which stage is shipped.

One rule chooses the stage that is written to `model/`, headlines the report and represents the run in a sweep: the
highest validation accuracy; if accuracies are equal, the lower validation loss; if losses are equal too, the later
stage. `deploy.stage` overrides the rule.
"""

import errno
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from pylorus.core.errors import PylorusError, TimeLimitReached
from pylorus.core.formatting import format_percent
from pylorus.core.io import (
    SUFFIX,
    check_digest,
    compute_digest,
    describe_process,
    explain_lock,
    format_now,
    is_archive_intact,
    is_process_alive,
    lock_folder,
    read_json,
    remove_incomplete_files,
    send_heartbeats,
    write_atomically,
    write_digest,
    write_json,
)
from pylorus.core.system import explain_limit

ONLY, ACCURACY, LOSS, ORDER, KEY, LAST = CHOICES = ("only", "accuracy", "loss", "order", "key", "last")
"""How a stage is chosen; see `ShippedStage`."""

PARTS = ("val", "test")
"""Splits that each stage predicts."""
STATUS = "status.json"
"""File that identifies a folder as a run."""
DAMAGED = "damaged"
"""State of a run with a damaged file, in the table and the report of a sweep."""
PREPARED = ("config.yaml", "environment.json", "network.json", "audit.json", "catalog.parquet", "split.csv",
            "split.csv.sha256", "quarantine.csv", "ignored.csv")  # fmt: skip
"""Files that a run writes before it trains."""


@dataclass(frozen=True)
class StageScore:
    """Performance of a stage on the validation images.

    Attributes:
        correct: Number of correctly classified images.
        images: Number of images, at least one.
        loss: Mean negative log-likelihood of the true class, in nats.
    """

    correct: int
    images: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Proportion of correctly classified images, in [0, 1]."""
        return self.correct / self.images


@dataclass(frozen=True)
class ShippedStage:
    """The stage whose network is shipped, and how it was chosen.

    Attributes:
        name: Name of the stage.
        chosen_by: `only`: there is no other stage; `accuracy`: highest validation accuracy; `loss`: equal accuracy,
            lower validation loss; `order`: both equal, later stage; `key`: set by deploy.stage; `last`: the last
            stage, which versions without this rule shipped.
        accuracy: Validation accuracy of each stage, in [0, 1], in the order of the stages; empty if unknown.
    """

    name: str
    chosen_by: str
    accuracy: dict[str, float]


def score_stage(logits: NDArray[np.float64], true: NDArray[np.int64]) -> StageScore:
    """Score a stage by its logits for the validation images.

    Args:
        logits: Uncalibrated logits of shape (images, classes).
        true: True classes, of shape (images,).

    Example:
        >>> score_stage(np.array([[2.0, 0.0], [1.0, 3.0]]), np.array([0, 0])).accuracy
        0.5
    """
    rows = np.arange(len(true))
    loss = -log_softmax(logits, axis=1)[rows, true].mean()
    return StageScore(int((logits.argmax(axis=1) == true).sum()), len(true), float(loss))


def select_stage(scores: Mapping[str, StageScore], *, asked: str | None = None) -> ShippedStage:
    """Choose the stage that is shipped.

    Args:
        scores: Score of each stage on the same validation images, in the order of the stages; at least one.
        asked: The value of deploy.stage; if that stage has no score yet, the rule decides.

    Example:
        >>> scores = {"pretrain": StageScore(17, 20, 0.4), "finetune": StageScore(14, 20, 0.9)}
        >>> select_stage(scores).name
        'pretrain'
    """
    accuracy = {name: score.accuracy for name, score in scores.items()}
    if asked is not None and asked in scores:
        return ShippedStage(asked, KEY, accuracy)
    most = max(score.correct for score in scores.values())
    best = {name: score.loss for name, score in scores.items() if score.correct == most}
    lowest = min(best.values())
    names = [name for name, loss in best.items() if loss == lowest]
    reason = ORDER if len(names) > 1 else LOSS if len(best) > 1 else ACCURACY if len(scores) > 1 else ONLY
    return ShippedStage(names[-1], reason, accuracy)


def read_shipped(description: Mapping[str, Any]) -> ShippedStage | None:
    """Return the shipped stage that the content of a model.json names; None if an earlier version wrote it."""
    entry = description.get("shipped")
    return None if entry is None else ShippedStage(**entry)


def explain_choice(shipped: ShippedStage, *, validated_on: str = "val") -> str:
    """Describe how a stage was chosen, in a phrase that follows its name.

    Args:
        shipped: The stage.
        validated_on: `val`, or `test` if the validation images were the test images.
    """
    own = format_percent(shipped.accuracy[shipped.name]) if shipped.name in shipped.accuracy else ""
    others = ", ".join(
        f"{name} {format_percent(accuracy)} %" for name, accuracy in shipped.accuracy.items() if name != shipped.name
    )
    reason = {
        ONLY: "the only stage",
        ACCURACY: f"highest validation accuracy: {own} %, against {others}",
        LOSS: f"validation accuracy {own} %, against {others}; lowest validation loss of the stages with that accuracy",
        ORDER: f"validation accuracy {own} %, against {others}; latest of the stages with that accuracy and loss",
        KEY: f"named by deploy.stage; validation accuracy {own} %{f', against {others}' if others else ''}",
        LAST: "the last stage: written by a version that did not compare stages",
    }[shipped.chosen_by]
    if validated_on == "test" and shipped.chosen_by in (ACCURACY, LOSS, ORDER):
        reason += "; the validation images are the test images, so the choice was made on the test images"
    return reason


@dataclass(frozen=True)
class TrainingResult:
    """Result of a stage's training.

    Attributes:
        epochs: Number of epochs trained.
        best_epoch: Epoch whose weights were chosen, from 1.
        curves_sha256: SHA-256 of metrics.csv; empty if an earlier version trained the stage.
        averaged_weights: Number of weights of which the chosen ones are the average; 0: they are no average.
        estimated_norms: Number of batch-norm layers whose statistics were estimated anew for the average.
    """

    epochs: int
    best_epoch: int
    curves_sha256: str = ""
    averaged_weights: int = 0
    estimated_norms: int = 0


class StageProgress(NamedTuple):
    """Progress of a stage in training: complete epochs, and batches of the next one."""

    epochs: int
    batches: int


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage."""

    path: Path

    @property
    def metrics_path(self) -> Path:
        """The learning curves."""
        return self.path / "metrics.csv"

    @property
    def curve_digests_path(self) -> Path:
        """SHA-256 of the learning curves as they are and as they were before; only while the stage is trained."""
        return self.path / f"metrics.csv{SUFFIX}"

    @property
    def last_checkpoint(self) -> Path:
        """The state from which an interrupted stage resumes: after an epoch, or within one."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def progress(self) -> StageProgress:
        """Saved progress: all epochs of a trained stage, else that of `last.ckpt`."""
        if self.training_result is not None:
            return StageProgress(self.training_result.epochs, 0)
        if not self.last_checkpoint.is_file():
            return StageProgress(0, 0)
        import torch  # imported here, since reading a status needs no torch

        return StageProgress(*torch.load(self.last_checkpoint, map_location="meta", weights_only=True)["reached"])

    @property
    def best_checkpoint(self) -> Path:
        """The weights of the best epoch, once the stage is trained."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def record_path(self) -> Path:
        """The file that marks the stage as trained; see `TrainingResult`."""
        return self.path / "stage.json"

    def get_best_path(self, epoch: int) -> Path:
        """Return the path of the weights of an epoch, counted from 0, that is the best so far."""
        return self.path / "checkpoints" / f"best-{epoch}.ckpt"

    def delete_other_bests(self, epoch: int | None) -> None:
        """Delete weights of epochs that are no longer the best."""
        for path in self.best_checkpoint.parent.glob("best-*.ckpt"):
            if epoch is None or path != self.get_best_path(epoch):
                path.unlink()

    def delete_training_state(self) -> None:
        """Delete what is only needed until the stage is trained."""
        self.delete_other_bests(None)
        self.last_checkpoint.unlink(missing_ok=True)
        self.curve_digests_path.unlink(missing_ok=True)  # the stage's record has the digest

    @property
    def own_metrics_path(self) -> Path:
        """Values of the user's own metrics on each split, if there are any."""
        return self.path / "own_metrics.json"

    def read_own_metrics(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return the user's own metrics by split, metric and class; empty if there are none.

        The ends of their intervals are beside the splits, as test/low and test/high.
        """
        path = self.own_metrics_path
        return read_json(path) if path.is_file() else {}

    def get_predictions_path(self, split: str) -> Path:
        """Return the path of the best epoch's predictions for `val` or `test`."""
        return self.path / f"predictions-{split}.parquet"

    def get_features_path(self, split: str) -> Path:
        """Return the path of penultimate features for `val` or `test`; they exist until the bundle does."""
        return self.path / "checkpoints" / f"features-{split}.npy"

    def write_features(self, split: str, features: NDArray[np.float32]) -> None:
        """Write the features of a split, of shape (images, features)."""
        with write_atomically(self.get_features_path(split)) as temporary:
            np.save(temporary, features)
        write_digest(self.get_features_path(split))

    def read_features(self, split: str) -> NDArray[np.float32]:
        """Read the features of a split."""
        return np.asarray(np.load(self.get_features_path(split)), dtype=np.float32)

    @property
    def network_path(self) -> Path:
        """The complete network of a stage that may be shipped, since later stages change it."""
        return self.path / "checkpoints" / "network.safetensors"

    def delete_candidate(self) -> None:
        """Delete what is only needed until the bundle is written."""
        for path in (*map(self.get_features_path, PARTS), self.network_path):
            path.unlink(missing_ok=True)
            path.with_name(path.name + SUFFIX).unlink(missing_ok=True)

    def write_record(self, **values: Any) -> None:
        """Mark the stage as trained: the values of `TrainingResult`, to which the digest of the curves is added."""
        result = TrainingResult(**values, curves_sha256=compute_digest(self.metrics_path))
        write_json(self.record_path, asdict(result), sealed=True)

    def discard_damaged_files(self) -> list[str]:
        """Delete damaged files whose content is computed again; return a sentence for each.

        Raises:
            PylorusError: If the learning curves of a trained stage are damaged, which are not.
        """
        if found := self._find_damaged_state():
            for path in (self.record_path, self.best_checkpoint, *map(self.get_predictions_path, PARTS)):
                path.unlink(missing_ok=True)
            self.delete_training_state()
            return [f"{found}: the stage is trained again from its start, with the same result"]
        result = self.training_result
        if result is not None and result.curves_sha256 not in ("", compute_digest(self.metrics_path)):
            raise PylorusError(
                f"{self.metrics_path}: damaged, or changed since the stage was trained, so its learning curves are "
                f"lost. Restore it from a backup, or delete {self.record_path} to train the stage again."
            )
        from pyarrow import ArrowException, parquet  # late: reading a status needs no tables

        sentences = []
        for path in filter(Path.is_file, (*self._list_outputs(), self.network_path)):
            try:
                check_digest(path)
                if path.suffix == ".parquet":
                    parquet.read_table(path, page_checksum_verification=True, use_threads=False, pre_buffer=False)
            except (PylorusError, ArrowException, OSError):
                path.unlink()
                sentences.append(f"{path} is damaged: it is computed again")
        return sentences

    def _list_outputs(self) -> list[Path]:
        return [*map(self.get_features_path, PARTS), *map(self.get_predictions_path, PARTS)]

    def _find_damaged_state(self) -> str:
        """Return what keeps the stage from being resumed or read, in words; empty if nothing does."""
        try:
            result = self.training_result
        except PylorusError:
            return f"{self.record_path} is damaged"
        if result is None and not self.last_checkpoint.is_file():
            return ""
        bests = sorted(self.best_checkpoint.parent.glob("best-*.ckpt"))
        needed = [self.best_checkpoint] if result is not None else [self.last_checkpoint, *bests]
        for path in needed:
            if not is_archive_intact(path):
                return f"{path} is {'damaged' if path.is_file() else 'missing'}"
        epochs = self.progress.epochs if result is None else 0
        if epochs and not bests:
            return f"{self.get_best_path(0).with_name('best-*.ckpt')} is missing"
        digests = self.curve_digests_path.read_bytes().split() if self.curve_digests_path.is_file() else []
        if result is None and digests and compute_digest(self.metrics_path).encode() not in [b"", *digests]:
            return f"{self.metrics_path} is damaged"
        rows = max(0, self.metrics_path.read_bytes().count(b"\n") - 1) if self.metrics_path.is_file() else 0
        return f"{self.metrics_path} has {rows} of {epochs} epochs" if rows < epochs else ""

    @property
    def training_result(self) -> TrainingResult | None:
        """The result of training; None if it has not finished."""
        record = read_json(self.record_path)
        return None if record is None else TrainingResult(**record)

    @property
    def is_finished(self) -> bool:
        """Whether the stage is trained and has predicted every split, as the bundle predicts it.

        A stage without features predicts again: older versions, which saved none, predicted in training precision.
        """
        return self.training_result is not None and all(path.is_file() for path in self._list_outputs())


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, with its state in `status.json`.

    A status has `state` (starting, running, finished, failed, interrupted), `id`, `host`, `pid`, `slurm` (the SLURM job
    ID and how often the job was requeued, or null), `started`, `heartbeat`, `ended`, `seconds` (running time without
    interruptions), `resumed` (how often), `overrides` (from the command line), `sweep` (the sweep's name, or null) and,
    if the run failed or reached its time limit, `error`. A finished run also has `shipped_stage` and `shipped_by`: the
    stage in `model` and how it was chosen.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """File of the complete, resolved configuration."""
        return self.path / "config.yaml"

    @property
    def speed(self) -> Path:
        """File of the seconds that the run's process spent on each part of its work; see `Timeline`."""
        return self.path / "speed.json"

    def get_stage(self, name: str) -> StageFolder:
        """Return the folder of a stage: its curves, checkpoints and predictions."""
        return StageFolder(self.path / name)

    def get_predictions_path(self, stage: str, split: str) -> Path:
        """Return the file with the predictions of a stage's best checkpoint for each image of `val` or `test`."""
        return self.get_stage(stage).get_predictions_path(split)

    @property
    def shipped(self) -> ShippedStage | None:
        """The stage whose network is in `model`; None if there is none, or if an earlier version wrote it."""
        description = read_json(self.path / "model" / "model.json")
        return None if description is None else read_shipped(description)

    def read_status(self) -> dict[str, Any]:
        """Read the run's status; empty if the folder has none. A run whose process is gone is `stopped`.

        Raises:
            PylorusError: If the file is damaged.
        """
        try:
            status: dict[str, Any] = dict(read_json(self.path / STATUS) or {})
        except PylorusError as error:
            raise PylorusError(
                f"{error} Without one, move {self.path} away: the command that started the run then starts it again."
            ) from error
        if status and status["state"] in ("starting", "running") and not is_process_alive(status):
            status["state"] = "stopped"
        return status

    def find_status(self) -> dict[str, Any]:
        """Read the run's status; of a damaged one, only `state`, which is `damaged`, and the reason as `error`."""
        try:
            return self.read_status()
        except PylorusError as error:
            return {"state": DAMAGED, "error": str(error)}

    def read_seconds(self, status: Mapping[str, Any]) -> float:
        """Return the seconds that a run of that status has taken, without interruptions; NaN if unknown.

        Those of a finished run include its start-up and its report.
        """
        speed: dict[str, Any] = {}
        with suppress(PylorusError):  # it is damaged
            speed = read_json(self.speed) or {}
        return max(float(status.get("seconds", math.nan)), float(speed.get("seconds", 0.0)))

    @property
    def has_trained(self) -> bool:
        """Whether any stage has saved something, be it a part of an epoch."""
        return any(self.path.glob("*/checkpoints/*")) or any(self.path.glob("*/stage.json"))

    def delete_preparation(self) -> None:
        """Delete what a run writes before it trains, so that another one can start in its folder."""
        for name in PREPARED:
            (self.path / name).unlink(missing_ok=True)

    def remove_incomplete_files(self) -> None:
        """Remove incomplete files of a killed process."""
        remove_incomplete_files(self.path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let no other process train in this folder.

        Raises:
            PylorusError: If another process trains in it; names the process.
        """

        def explain() -> str:
            status = {"pid": "?", "host": "this machine", **self.read_status()}
            return explain_lock(self.path, "process {pid} on {host} is training".format_map(status), status)

        with lock_folder(self.path, explain):
            yield

    @contextmanager
    def set_starting(
        self, overrides: list[str], *, sweep: str | None = None, searchpath: Sequence[str] = ()
    ) -> Iterator[None]:
        """Mark the run as `starting`, or as `failed` if the code inside the context fails.

        Args:
            overrides: The overrides of the command line.
            sweep: Name of the sweep, if the run is one of its jobs.
            searchpath: Where the user's own configuration files are, as in Hydra's `hydra.searchpath`.
        """
        status: dict[str, Any] = {
            "state": "starting",
            "id": secrets.token_hex(4),
            **describe_process(),
            "started": format_now(),
            "overrides": overrides,
            "sweep": sweep,
            **({"searchpath": list(searchpath)} if searchpath else {}),
        }
        self._write_status(status)
        with self.report_early_end():
            yield

    @contextmanager
    def report_early_end(self) -> Iterator[None]:
        """Mark a run that is still `starting` as failed or interrupted if the code inside the context fails."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError, PylorusError):  # the user has to see the error that ended the run, not this one
                end = {"state": "interrupted", "ended": format_now()}
                if not isinstance(error, KeyboardInterrupt):
                    end |= {"state": "failed", "error": explain_limit(error) or str(error) or type(error).__name__}
                if (status := self.read_status()).get("state") == "starting":
                    self._write_status({**status, **end})
            raise

    @contextmanager
    def update_status(self) -> Iterator[None]:
        """Keep status.json up to date while the run executes inside the context, however it ends."""
        previous = self.read_status()
        status = {**previous, **describe_process(), "state": "running"}
        for key in ("ended", "error"):
            status.pop(key, None)
        if previous["state"] != "starting":
            status["resumed"] = previous.get("resumed", 0) + 1
        start, earlier_seconds = time.monotonic(), previous.get("seconds", 0.0)

        def write_update(**updates: Any) -> None:
            self.check_exists()
            self._write_status({**status, "seconds": round(earlier_seconds + time.monotonic() - start, 1), **updates})

        def write_if_possible(**updates: Any) -> None:
            with suppress(OSError):  # the user has to see the error that ended the run, not this one
                write_update(**updates)

        write_update()
        try:
            with send_heartbeats(write_update):
                yield
        except KeyboardInterrupt as stop:
            reason = {"error": str(stop)} if isinstance(stop, TimeLimitReached) else {}
            write_if_possible(state="interrupted", ended=format_now(), **reason)
            raise
        except BaseException as error:
            write_if_possible(state="failed", ended=format_now(), error=str(error) or type(error).__name__)
            raise
        shipped = self.shipped
        choice = {} if shipped is None else {"shipped_stage": shipped.name, "shipped_by": shipped.chosen_by}
        write_update(state="finished", ended=format_now(), **choice)

    def check_exists(self) -> None:
        """Check that the run's folder still exists: writing to it would create it again, half empty.

        Raises:
            FileNotFoundError: If the run's configuration no longer exists.
        """
        if not self.config.is_file():
            raise FileNotFoundError(errno.ENOENT, "the run's folder disappeared", str(self.config))

    def _write_status(self, status: dict[str, Any]) -> None:
        write_json(self.path / STATUS, status, sealed=True)
