"""Measure an ensemble: which network may vote on which image, what the networks say, and what is fitted on their votes.

An image counts only by the votes of networks that were not developed on it or on others of its patient. With one split
for all runs these are all networks: temperature and thresholds are fitted on validation images, and measured on test
images. Otherwise, as with folds, each test image has the votes of those whose run tested on it; what is fitted for the
figures of a patient is then fitted on other patients.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import log_softmax

from pylorus.config.schema import DeployConfig
from pylorus.core.errors import PylorusError, format_path
from pylorus.core.formatting import open_progress_bar
from pylorus.core.io import compute_digest
from pylorus.data.input_format import measure_quality, stack_formats
from pylorus.deploy.description import (
    Abstention,
    Calibration,
    Decision,
    EnsembleCost,
    Gain,
    OperatingMetrics,
    PredictionSets,
    UsageReference,
)
from pylorus.deploy.inputs import Item
from pylorus.deploy.model import Bundle
from pylorus.deploy.predict import read_ahead
from pylorus.deploy.thresholds import (
    TrainingDistances,
    build_usage_reference,
    collect_answers,
    compute_set_metrics,
    convert_calibration,
    convert_estimate,
    estimate_proportion,
    fit_abstention,
    fit_decision,
    fit_prediction_sets,
    resolve_deciding_class,
)
from pylorus.evaluation.calibration import estimate_calibration, fit_temperature, probabilities_of_logits
from pylorus.evaluation.decisions import operating_point, prediction_sets
from pylorus.evaluation.predictions import Predictions, encode_groups
from pylorus.evaluation.replicates import AveragingGain, average_log_probabilities, estimate_averaging_gain
from pylorus.report.results import calibrate_predictions
from pylorus.runs.predictions import SavedPredictions
from pylorus.runs.reading import SavedRun

MAX_LOGIT_DIFFERENCE = 0.01
"""How far a logit may be from the one that its run saved, as a fraction of the largest: devices round differently."""
TIMED_IMAGES, TIMED_REPEATS = 8, 7
PRIORITY = {"train": 0, "val": 1, "test": 2}
"""Of copies of an image in several splits of a run, the first of these counts."""
PARTS = 10
"""Parts into which the patients are divided where what is fitted and what is measured are on the same images."""


@dataclass(frozen=True, eq=False)
class MemberRun:
    """A finished run whose network becomes a part of the ensemble, and its loaded bundle."""

    run: SavedRun
    bundle: Bundle

    @property
    def root(self) -> Path:
        """Folder that the paths of its images are relative to."""
        is_synthetic = self.run.get_setting("data.kind") == "synthetic"
        return self.run.folder / "images" if is_synthetic else Path(str(self.run.get_setting("data.root", "")))

    @property
    def images(self) -> pd.DataFrame:
        """Its images, each content once: sha256, path, class, group, split and file."""
        assert self.run.split is not None
        table = self.run.split.table
        table = table.iloc[np.argsort(table["split"].map(PRIORITY), kind="stable")].drop_duplicates("sha256")
        return table.assign(file=[self.root / path for path in table["path"]])


@dataclass(frozen=True, eq=False)
class EnsembleImages:
    """The images of all runs, each content once.

    Attributes:
        table: A row for each image, with sha256, path, file, label and group.
        splits: The split of each image in each run, "" where it has none, of shape (runs, images).
        fit_votes: Which network's probabilities count for temperature and thresholds, of shape (runs, images).
        test_votes: Which count for the results; the same as `fit_votes` if the images are out-of-fold.
        left_out: Number of test images that no network may judge.
    """

    table: pd.DataFrame
    splits: NDArray[np.str_]
    fit_votes: NDArray[np.bool_]
    test_votes: NDArray[np.bool_]
    left_out: int

    @property
    def is_out_of_fold(self) -> bool:
        """Whether temperature and thresholds are fitted on the images of the results."""
        return self.fit_votes is self.test_votes

    @property
    def test_rows(self) -> NDArray[np.int64]:
        """The images of the results."""
        return np.flatnonzero(self.test_votes.any(axis=0))

    @property
    def fit_rows(self) -> NDArray[np.int64]:
        """The images on which temperature and thresholds are fitted."""
        return np.flatnonzero(self.fit_votes.any(axis=0))


def collect_images(members: Sequence[MemberRun]) -> EnsembleImages:
    """Collect the images of some runs, and decide which network may vote on which.

    Raises:
        PylorusError: If runs disagree about the class or the patient of an image, or no test image is left.
    """
    tables = [member.images.assign(member=number) for number, member in enumerate(members)]
    everything = pd.concat(tables, ignore_index=True)
    grouped = everything["member"].isin([number for number, each in enumerate(members) if each.run.has_groups])
    for column, key, rows in (("class", "data.classes", everything), ("group", "data.group", everything[grouped])):
        differing = rows.groupby("sha256")[column].nunique()
        if (differing > 1).any():
            path = rows.loc[rows["sha256"] == differing.idxmax(), "path"].iloc[0]
            raise PylorusError(
                f"{format_path(path)}: has different values of {column} in the runs. Expected the same images with the "
                f"same {key}."
            )
    table = everything.drop_duplicates("sha256").reset_index(drop=True)
    patients = everything[grouped].drop_duplicates("sha256").set_index("sha256")["group"]
    table["group"] = table["sha256"].map(patients).fillna(table["path"]).astype(str)
    classes = {name: label for label, name in enumerate(members[0].run.class_names)}
    table["label"] = table["class"].map(classes).astype(np.int64)
    splits = np.stack(
        [table["sha256"].map(each.set_index("sha256")["split"]).fillna("").to_numpy(dtype=str) for each in tables]
    )
    groups = table["group"].to_numpy(dtype=str)
    fit_votes, test_votes = (
        np.stack([(row == part) & ~np.isin(groups, groups[np.isin(row, seen)]) for row in splits])
        for part, seen in (("val", ["train"]), ("test", ["train", "val"]))
    )
    test_groups = groups[test_votes.any(axis=0)]
    if not len(test_groups):
        raise PylorusError(
            "Every test image of these runs, or another one of its patient, was used in the development of the "
            "networks that could judge it. Expected runs with test images of other patients."
        )
    is_fit = fit_votes.any(axis=0)
    if not is_fit.any() or np.isin(groups[is_fit], test_groups).any():
        fit_votes = test_votes
    left_out = int(((splits == "test").any(axis=0) & ~test_votes.any(axis=0)).sum())
    return EnsembleImages(table, splits, fit_votes, test_votes, left_out)


@dataclass(frozen=True, eq=False)
class MemberOutputs:
    """What the networks say about the images on which they vote.

    Attributes:
        logits: Of shape (runs, images, classes); NaN where a network has no vote.
        tables: Logarithms of each network's calibrated probabilities, of the same shape.
        unlikeness: Of shape (runs, images).
        quality: How the images look, of shape (images, 4); see `measure_quality`.
        sample: Some prepared images, uint8 of shape (n, height, width, 3).
    """

    logits: NDArray[np.float64]
    tables: NDArray[np.float64]
    unlikeness: NDArray[np.float64]
    quality: NDArray[np.float64]
    sample: NDArray[np.uint8]

    def average(self, votes: NDArray[np.bool_], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the logarithm of the mean probabilities of some images, of shape (rows, classes)."""
        return average_log_probabilities(self.tables[:, rows], votes[:, rows])

    def average_unlikeness(self, votes: NDArray[np.bool_], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the mean unlikeness of some images, of shape (rows,)."""
        masked = np.where(votes[:, rows], self.unlikeness[:, rows], 0.0)
        return np.asarray(masked.sum(axis=0) / votes[:, rows].sum(axis=0))


def compute_outputs(members: Sequence[MemberRun], images: EnsembleImages, *, batch_size: int) -> MemberOutputs:
    """Run each network on the images on which it votes; each image is decoded once for all networks."""
    bundles = [member.bundle for member in members]
    form = stack_formats([bundle.input for bundle in bundles])
    votes = images.fit_votes | images.test_votes
    rows = np.flatnonzero(votes.any(axis=0))
    shape = (*votes.shape, len(bundles[0].description.classes))
    logits, tables = np.full(shape, np.nan), np.full(shape, np.nan)
    unlikeness, quality = np.full(votes.shape, np.nan), np.full((votes.shape[1], 4), np.nan)
    sample: list[NDArray[np.uint8]] = []
    _check_contents(images.table.iloc[rows])
    items = [Item(format_path(images.table["file"][row]), Path(images.table["file"][row])) for row in rows]
    bar = open_progress_bar("predicting images", len(rows))
    with bar, closing(read_ahead(items, form, batch_size)) as batches:
        start = 0
        for batch, loaded in batches:
            problem = next((pair for pair in zip(batch, loaded, strict=True) if isinstance(pair[1], str)), None)
            if problem is not None:
                raise PylorusError(
                    f"{problem[0].path}: {problem[1]}. The ensemble is measured on the images of its runs: restore "
                    "this file."
                )
            pixels = np.stack([image for image in loaded if not isinstance(image, str)])
            chosen = rows[start : start + len(batch)]
            start += len(batch)
            quality[chosen] = measure_quality(form.get_square(pixels))
            sample += [] if sample else [pixels[:TIMED_IMAGES]]
            for number, bundle in enumerate(bundles):
                used = votes[number, chosen]
                if used.any():
                    square = form.get_square(pixels, form.forms.index(bundle.input))
                    output = bundle.run_network(square[used])
                    logits[number, chosen[used]] = output.logits.double().numpy()
                    unlikeness[number, chosen[used]] = output.unlikeness.double().numpy()
            bar.update(len(batch))
    for number, bundle in enumerate(bundles):
        calibration, used = bundle.description.calibration, votes[number]
        scaled = logits[number, used] / calibration.temperature + np.asarray(calibration.bias or 0.0)
        tables[number, used] = log_softmax(scaled, axis=1)
    return MemberOutputs(logits, tables, unlikeness, quality, sample[0])


def _check_contents(table: pd.DataFrame) -> None:
    """Check that files are still those of their runs: a weak network gives nearly the same logits for other images."""
    for file, digest in zip(table["file"], table["sha256"], strict=True):
        if not file.is_file():
            raise PylorusError(
                f"{format_path(file)}: this image of a run no longer exists, but the ensemble is measured on it. "
                "Restore it."
            )
        if compute_digest(file) != digest:
            raise PylorusError(
                f"{format_path(file)}: has changed since the run, so the ensemble can't be measured on it. Restore it."
            )


def check_saved_logits(members: Sequence[MemberRun], images: EnsembleImages, outputs: MemberOutputs) -> None:
    """Check that each network gives the logits that its run saved: otherwise images or weights have changed.

    Raises:
        PylorusError: If not; names the image.
    """
    position = {digest: row for row, digest in enumerate(images.table["sha256"])}
    for number, member in enumerate(members):
        stage = next(each for each in member.run.stages if each.name == member.bundle.description.shipped.name)
        assert member.run.split is not None
        digests = member.run.split.rows_by_sample["sha256"]
        for saved in (stage.validation, stage.test):
            if saved is None:
                continue
            rows = np.array([position[digest] for digest in digests.loc[list(saved.predictions.sample)]])
            difference = np.nan_to_num(np.abs(outputs.logits[number, rows] - saved.logits).max(axis=1), nan=0.0)
            if difference.max() > MAX_LOGIT_DIFFERENCE * max(1.0, float(np.abs(saved.logits).max())):
                path = images.table["file"][rows[int(difference.argmax())]]
                raise PylorusError(
                    f"{format_path(path)}: {member.run.folder / 'model'} does not give the logits for it that its run "
                    "saved: the image has changed since, or the bundle is that of another run. Restore both."
                )


# --- what is fitted and measured ---


@dataclass(frozen=True, eq=False)
class FittedModel:
    """What is fitted on the votes of networks, and measured on their votes on the images of the results.

    Attributes:
        calibration: Temperature of the average.
        decision: Thresholds, with their performance on the images of the results.
        prediction_sets: None if the runs did not request them.
        abstention: Limits of abstention, with their performance on these images.
        test: Predictions for these images, calibrated by what was fitted on others.
        validation: Predictions for the images that it was fitted on; None if these are the same.
        reference: What the model answers on these images; None if its networks answer only some at a time.
    """

    calibration: Calibration
    decision: Decision
    prediction_sets: PredictionSets | None
    abstention: Abstention
    test: Predictions
    validation: Predictions | None
    reference: UsageReference | None


def fit_ensemble(
    members: Sequence[MemberRun], images: EnsembleImages, outputs: MemberOutputs, deploy: DeployConfig
) -> FittedModel:
    """Fit temperature, thresholds and limits of the average, and measure them."""
    description = members[0].bundle.description
    names = description.short_names
    deciding = resolve_deciding_class(deploy, classes=description.classes, short_names=names)

    def save(votes: NDArray[np.bool_], rows: NDArray[np.int64]) -> SavedPredictions:
        logits = outputs.average(votes, rows)
        predictions = Predictions(
            sample=images.table["sha256"].to_numpy(dtype=str)[rows],
            group=images.table["group"].to_numpy(dtype=str)[rows],
            true=images.table["label"].to_numpy(dtype=np.int64)[rows],
            probabilities=probabilities_of_logits(logits),
            class_names=names,
        )
        return SavedPredictions(predictions, logits)

    rows, training = images.test_rows, max(member.bundle.description.abstention.images for member in members)
    test, unlikeness = save(images.test_votes, rows), outputs.average_unlikeness(images.test_votes, rows)
    quality = outputs.quality[rows]
    if images.is_out_of_fold:
        distances = _build_distances(training, unlikeness, unlikeness, quality)
        return _fit_across_patients(test, distances, deploy, class_name=deciding)
    fit_rows = images.fit_rows
    calibration = calibrate_predictions(save(images.fit_votes, fit_rows), test)
    distances = _build_distances(training, outputs.average_unlikeness(images.fit_votes, fit_rows), unlikeness, quality)
    decision = fit_decision(calibration, deploy, class_name=deciding)
    abstention = fit_abstention(calibration, distances, confidence=deploy.confidence)
    predictions = calibration.test
    answers = collect_answers(
        predictions.probabilities,
        unlikeness,
        quality,
        predictions.clusters,
        names=names,
        decision=decision,
        abstention=abstention,
    )
    is_whole = bool(images.test_votes[:, rows].all())
    return FittedModel(
        calibration=convert_calibration(calibration),
        decision=decision,
        prediction_sets=fit_prediction_sets(calibration, deploy.prediction_sets),
        abstention=abstention,
        test=predictions,
        validation=calibration.validation,
        reference=build_usage_reference(answers, split="test") if is_whole else None,
    )


def _build_distances(
    training: int, validation: NDArray[np.float64], test: NDArray[np.float64], quality: NDArray[np.float64]
) -> TrainingDistances:
    return TrainingDistances(training, validation, np.arange(len(validation)), test, np.arange(len(test)), quality)


def _fit_across_patients(
    saved: SavedPredictions, distances: TrainingDistances, deploy: DeployConfig, *, class_name: str
) -> FittedModel:
    """Fit on all images, and measure with what is fitted for each part of the patients on all others.

    Args:
        saved: The average of the votes on each image.
        distances: Unlikeness of the images, as validation and as test images.
        deploy: What the bundle shall decide and promise.
        class_name: Short name of the class that decides.
    """
    everything, whole = saved.predictions, calibrate_predictions(saved, saved)
    codes, names = encode_groups(everything.group, length=saved.images), everything.class_names
    patients = int(codes.max()) + 1
    if patients < 2:
        raise PylorusError("All test images of these runs are of one patient, so nothing can be measured on others.")
    part = np.random.default_rng(0).permutation(patients)[codes] % min(PARTS, patients)
    probabilities = np.empty_like(everything.probabilities)
    positive, members = (np.zeros(probabilities.shape, dtype=np.bool_) for _ in range(2))
    is_unlike, is_unsure = (np.zeros(saved.images, dtype=np.bool_) for _ in range(2))
    for number in range(int(part.max()) + 1):
        held, kept = np.flatnonzero(part == number), np.flatnonzero(part != number)
        temperature = fit_temperature(saved.logits[kept], everything.true[kept])
        calibrated = probabilities_of_logits(saved.logits, temperature=temperature.temperature)
        fitting, measured = (_select_rows(everything, calibrated, rows) for rows in (kept, held))
        calibration = replace(whole, temperature=temperature, validation=fitting, test=measured)
        probabilities[held] = measured.probabilities
        decision = fit_decision(calibration, deploy, class_name=class_name)
        for column, name in enumerate(names):
            threshold = decision.thresholds[name]
            positive[held, column] = measured.probabilities[:, column] >= (2.0 if threshold is None else threshold)
        test_quality = distances.test_quality[held]
        others = _build_distances(distances.training, distances.validation[kept], distances.test[held], test_quality)
        abstention = fit_abstention(calibration, others, confidence=deploy.confidence)
        is_unlike[held] = others.test > abstention.unlike_above
        is_unsure[held] = measured.probabilities.max(axis=1) < abstention.unsure_below
        sets = fit_prediction_sets(calibration, deploy.prediction_sets)
        if sets is not None:
            members[held] = prediction_sets(measured.probabilities, sets.get_limits(names))
    test = replace(everything, probabilities=probabilities)
    points = {
        name: operating_point(test.true == column, positive[:, column].astype(np.float64), test.clusters, threshold=0.5)
        for column, name in enumerate(names)
    }
    answered, sets = ~(is_unlike | is_unsure), fit_prediction_sets(whole, deploy.prediction_sets)
    return FittedModel(
        calibration=replace(
            convert_calibration(whole),
            ece_after=estimate_calibration(test.probabilities, test.true, test.clusters).ece.value,
        ),
        decision=replace(
            fit_decision(whole, deploy, class_name=class_name),
            test={
                name: OperatingMetrics(convert_estimate(point.sensitivity), convert_estimate(point.specificity))
                for name, point in points.items()
            },
        ),
        prediction_sets=None if sets is None else replace(sets, test=compute_set_metrics(test, members)),
        abstention=replace(
            fit_abstention(whole, distances, confidence=deploy.confidence),
            unlike_test=estimate_proportion(is_unlike, test.clusters),
            unsure_test=estimate_proportion(is_unsure, test.clusters, among=test.correct),
            answered_test=estimate_proportion(answered, test.clusters),
            accuracy_answered=estimate_proportion(test.correct, test.clusters, among=answered),
        ),
        test=test,
        validation=None,
        reference=None,
    )


def _select_rows(predictions: Predictions, probabilities: NDArray[np.float64], rows: NDArray[np.int64]) -> Predictions:
    return Predictions(
        predictions.sample[rows],
        np.asarray(predictions.group)[rows],
        predictions.true[rows],
        probabilities[rows],
        predictions.class_names,
    )


def measure_gains(
    images: EnsembleImages, outputs: MemberOutputs, predictions: Predictions
) -> tuple[int, tuple[Gain, ...]]:
    """Measure what averaging gains on the images with several votes, and count these."""
    rows = images.test_rows
    votes = images.test_votes[:, rows]
    several = votes.sum(axis=0) > 1
    if not several.any():
        return 0, ()
    votes, models = votes[:, several], np.exp(np.nan_to_num(outputs.tables[:, rows[several]], nan=0.0))
    true, groups = predictions.true[several], np.asarray(predictions.group)[several]
    average = predictions.probabilities[several]
    gains = []
    fit_votes = images.fit_votes[:, images.fit_rows]
    if not images.is_out_of_fold and votes.all() and fit_votes.all():
        tables, labels = outputs.tables[:, images.fit_rows], images.table["label"].to_numpy()[images.fit_rows]
        correct = (tables.argmax(axis=2) == labels).sum(axis=1)
        losses = -tables[:, np.arange(len(labels)), labels].mean(axis=1)
        best = int(np.lexsort((losses, -correct))[0])  # as a run chooses its stage
        gain = estimate_averaging_gain(average, models[[best]], votes[[best]], true, groups)
        gains.append(_convert_gain(gain, best))
    gains.append(_convert_gain(estimate_averaging_gain(average, models, votes, true, groups), None))
    return int(several.sum()), tuple(gains)


def _convert_gain(gain: AveragingGain, best: int | None) -> Gain:
    return Gain(best, *map(convert_estimate, (gain.accuracy, gain.balanced_accuracy, gain.brier, gain.log_loss)))


def measure_cost(bundle: Bundle, images: NDArray[np.uint8]) -> EnsembleCost:
    """Measure the time of the ensemble and of each network in turns, so that other load affects all alike."""

    def measure(each: Bundle, pixels: NDArray[np.uint8]) -> float:
        start = time.perf_counter()
        each.run_network(pixels)
        return time.perf_counter() - start

    parts = [bundle.select_input(images, number) for number in range(len(bundle.members))]
    seconds, ratios = [], []
    for repeat in range(1 + TIMED_REPEATS):
        whole = measure(bundle, images)
        single = statistics.mean(map(measure, bundle.members, parts))
        if repeat:  # the first only warms up
            seconds.append(whole / len(images))
            ratios.append(whole / single)
    tensors = [tensor for member in bundle.members for tensor in member.network.state_dict().values()]
    parameters = sum(each.numel() for member in bundle.members for each in member.network.parameters())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return EnsembleCost(
        parameters, size, 1000 * statistics.median(seconds), statistics.median(ratios), bundle.device.type
    )
