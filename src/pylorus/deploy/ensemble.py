"""`pylorus ensemble`: put the networks of several finished runs into one bundle that averages their probabilities."""

import importlib.metadata
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from pylorus import __version__
from pylorus.config.schema import DeployConfig
from pylorus.core.errors import PylorusError, format_path
from pylorus.core.formatting import format_command, format_count, join_names
from pylorus.core.io import (
    check_new_folder,
    convert_to_plain,
    lock_folder,
    read_json,
    write_atomically,
    write_json,
    write_text,
)
from pylorus.data.prepare import AUDIT_FILE
from pylorus.deploy.bundle import PACKAGES, save_tensors
from pylorus.deploy.bundle_files import DIRECTIONS, build_description
from pylorus.deploy.card import render_model_card
from pylorus.deploy.description import (
    ENSEMBLE_VERSION,
    INTENDED_USE,
    MAX_MEMBERS,
    OUT_OF_FOLD,
    Description,
    Ensemble,
    EnsembleCost,
    Member,
    Training,
    Weights,
)
from pylorus.deploy.ensemble_card import format_ensemble_sentences, render_training_section, write_ensemble_page
from pylorus.deploy.ensemble_votes import (
    EnsembleImages,
    FittedModel,
    MemberOutputs,
    MemberRun,
    check_saved_logits,
    collect_images,
    compute_outputs,
    fit_ensemble,
    measure_cost,
    measure_gains,
)
from pylorus.deploy.fingerprints import build_fingerprints, convert_fingerprints, derive_salt, summarize_fingerprints
from pylorus.deploy.model import Bundle, join_networks, load_bundle
from pylorus.deploy.predict import resolve_device
from pylorus.deploy.thresholds import compute_classification_metrics, estimate_class_metrics
from pylorus.deploy.verified_files import (
    CARD,
    DESCRIPTION,
    ENSEMBLE_RECORD,
    FILES,
    FINGERPRINTS,
    LOOKS,
    SUMS,
    UNLIKE,
    WEIGHTS,
)
from pylorus.model.inference import BundleClassifier
from pylorus.model.weights import compute_sha256
from pylorus.report.page import PAGE
from pylorus.runs.folder import ONLY, STATUS, ShippedStage
from pylorus.runs.reading import SavedRun, get_class_order, read_config, read_run, resolve_scope

TABLE = "predictions.parquet"
SAME_KEYS = ("deploy.class_name", "deploy.sensitivity", "deploy.confidence", "deploy.prediction_sets")
"""Keys of which all runs must have the same value: they say what the bundle decides and promises."""
MAX_DIFFERENCE = 1e-4
"""How far a probability of the written ensemble may be from the mean of those of its networks."""


@dataclass(frozen=True, kw_only=True)
class EnsembleOptions:
    """Options of `pylorus ensemble`.

    Attributes:
        output: Folder to write to: a new or empty one. The bundle is `model` in it.
        batch: Batch size of the networks, in images.
        device: auto, cpu, cuda or mps.
        network: See `load_bundle`; for those runs whose network is the user's own.
        trust: See `load_bundle`.
    """

    output: Path
    batch: int = 32
    device: str = "auto"
    network: Callable[..., Any] | None = None
    trust: tuple[Path, ...] = ()


def build_ensemble(paths: Sequence[Path], options: EnsembleOptions) -> Path:
    """Write the ensemble of some runs: complete and verified, or not at all.

    Args:
        paths: Folders of runs, or of a sweep whose runs are all meant.
        options: The options.

    Returns:
        The folder of the bundle.

    Raises:
        PylorusError: If the runs do not fit together, their images have changed, or an option is invalid.
    """
    folders = _find_runs(paths)
    check_new_folder(options.output, hint="Choose another --output.", outside=folders)
    members = _read_members(folders, options)
    images = collect_images(members)
    outputs = compute_outputs(members, images, batch_size=options.batch)
    check_saved_logits(members, images, outputs)
    fitted = fit_ensemble(members, images, outputs, _get_deploy_config(members[0].run))
    description = _describe(members, images, outputs, fitted)
    notes = _list_notes(members, images)
    with _stage_folder(options.output) as folder:
        _write_bundle(members, images, description, fitted, folder / "model")
        written = load_bundle(folder / "model", device=members[0].bundle.device, network=options.network)
        _check_written(written, members, outputs.sample)
        _write_table(images, outputs, fitted, folder / TABLE)
        record = {
            "pylorus": __version__,
            SUMS: written.identity,
            "runs": [format_path(each) for each in folders],
            "ensemble": convert_to_plain(description)["ensemble"],
            "notes": notes,
        }
        write_json(folder / ENSEMBLE_RECORD, record)
        write_ensemble_page(description, folder, notes)
    _print_result(description, notes, options.output)
    return options.output / "model"


# --- runs ---


def _find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the folders of the runs, after checking that each is meant once."""
    folders: list[Path] = []
    for path in paths:
        if any((folder / ENSEMBLE_RECORD).is_file() for folder in (path, path.parent)):
            raise PylorusError(f"{path}: is an ensemble, expected a run or a sweep. Name the runs of its networks.")
        is_bundle = path.name == "model" and (path.parent / STATUS).is_file()
        folders += resolve_scope([path.parent if is_bundle else path]).folders
    repeated = [folder for folder, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if repeated:
        raise PylorusError(f"{repeated[0]}: is named twice. A network counts once in an ensemble: name each run once.")
    if not 2 <= len(folders) <= MAX_MEMBERS:
        raise PylorusError(
            f"found {format_count(len(folders), 'run')}, expected 2 to {MAX_MEMBERS}. Name several runs, or a sweep: "
            "pylorus ensemble RUN RUN --output DIR"
        )
    return folders


def _read_members(folders: Sequence[Path], options: EnsembleOptions) -> list[MemberRun]:
    """Read the runs and load their bundles, after checking that they fit together."""
    runs = []
    for folder in folders:
        config = read_config(folder)
        run = read_run(folder, config, order=get_class_order(config))
        if run.state != "finished" or not run.bundle or run.split is None:
            raise PylorusError(
                f"{folder}: this run is {run.state}, expected a finished one. Continue it: "
                f"{format_command(['pylorus', 'train', f'resume={folder}'])}; or name the other runs one by one."
            )
        runs.append(run)
    _check_settings(runs)
    device = resolve_device(options.device)
    own = [run for run in runs if run.bundle.get("network") is not None]
    if options.network is not None and not own:
        raise PylorusError("--network: all networks are timm's. Leave the option out.")
    members = [
        MemberRun(
            run,
            load_bundle(
                run.folder / "model",
                device=device,
                network=options.network if run in own else None,
                trust=options.trust,
            ),
        )
        for run in runs
    ]
    _check_bundles(members)
    return members


def _check_settings(runs: Sequence[SavedRun]) -> None:
    """Check that the configurations of the runs allow for an ensemble."""
    first = runs[0]
    for run in runs:
        for key, values in (
            ("data.classes", (run.class_names, first.class_names)),
            ("data.short_names", (run.short_names, first.short_names)),
            *((key, (run.get_setting(key), first.get_setting(key))) for key in SAME_KEYS),
        ):
            if values[0] != values[1]:
                found, other = (join_names(value) if isinstance(value, list) else value for value in values)
                raise PylorusError(
                    f"{key}: found {found} in {run.folder}, but {other} in {first.folder}. Expected the same in all "
                    "runs, and classes in the same order."
                )
        if run.get_setting("data.validation") == "test":
            raise PylorusError(
                f"{run.folder}: validated on its test images (data.validation=test), so no images are left to measure "
                "the ensemble on. Train it without that key."
            )
        if run.get_setting("data.kind") == "shards":
            raise PylorusError(
                f"{run.folder}: its images are in shards, which pylorus ensemble can't read. Expected runs on image "
                "files."
            )


def _check_bundles(members: Sequence[MemberRun]) -> None:
    """Check that the loaded networks can be used together."""
    first = members[0]
    known: dict[str, Path] = {}
    for member in members:
        bundle, folder = member.bundle, member.run.folder
        earlier = known.setdefault(bundle.identity, folder)
        if earlier != folder:
            raise PylorusError(f"{folder}: is a copy of {earlier}. A network counts once in an ensemble.")
        for name, value in (
            ("input.policy", lambda each: each.bundle.input.policy),
            (LOOKS, lambda each: LOOKS in each.bundle.sha256),
        ):
            if value(member) != value(first):
                raise PylorusError(
                    f"{folder}: differs from {first.run.folder} in {name}: versions of Pylorus trained them that read "
                    "images, or tell unlike ones, by other rules. Train both with this one."
                )
    networks = {member.bundle.description.network for member in members} - {None}
    if len(networks) > 1:
        raise PylorusError(
            f"found networks of {join_names(sorted(map(str, networks)))}, expected one class or function of your own "
            "at most, as --network names one."
        )


def _get_deploy_config(run: SavedRun) -> DeployConfig:
    settings = {key.partition(".")[2]: run.get_setting(key) for key in SAME_KEYS}
    default = DeployConfig()
    return replace(default, **{name: value for name, value in settings.items() if value is not None})


# --- the bundle ---


def _describe(
    members: Sequence[MemberRun],
    images: EnsembleImages,
    outputs: MemberOutputs,
    fitted: FittedModel,
) -> Description:
    """Build the content of model.json."""
    parts = [member.bundle.description for member in members]
    votes = np.concatenate(
        [
            images.fit_votes.sum(axis=0)[images.fit_rows],
            images.test_votes.sum(axis=0)[images.test_rows],
        ]
    )
    gain_images, gains = measure_gains(images, outputs, fitted.test)
    ensemble = Ensemble(
        members=tuple(_describe_member(member) for member in members),
        voters=(int(votes.min()), int(votes.max())),
        left_out=images.left_out,
        gain_images=gain_images,
        gains=gains,
        cost=EnsembleCost(0, 0, 0.0, 0.0, ""),
    )
    counts = Counter(part.architecture for part in parts)
    named = join_names([f"{count} {name}" for name, count in counts.items()], most=3)
    largest = max(parts, key=lambda part: part.input.size)
    description = replace(
        largest,
        format_version=ENSEMBLE_VERSION,
        architecture=f"ensemble of {named}",
        arguments={},
        network=None,
        weights=_join_weights(parts),
        training=_join_training(members, images),
        shipped=ShippedStage("ensemble", ONLY, {"ensemble": float((fitted.validation or fitted.test).correct.mean())}),
        calibration=fitted.calibration,
        decision=fitted.decision,
        prediction_sets=fitted.prediction_sets,
        abstention=replace(fitted.abstention, method=f"mean over the networks of the {parts[0].abstention.method}"),
        test=compute_classification_metrics(fitted.test),
        intended_use=INTENDED_USE,
        versions={"pylorus": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        reference=fitted.reference,
        recalibration=None,
        fingerprints=None,
        ensemble=ensemble,
    )
    first = description.form.forms[0]
    description = replace(description, input=next(part.input for part in parts if part.input.form == first))
    bundle = join_networks(description, [member.bundle for member in members])
    return replace(description, ensemble=replace(ensemble, cost=measure_cost(bundle, outputs.sample)))


def _describe_member(member: MemberRun) -> Member:
    part, fold = member.bundle.description, member.run.get_setting("data.fold")
    return Member(
        bundle=member.bundle.identity,
        architecture=part.architecture,
        arguments=part.arguments,
        network=part.network,
        input=part.input,
        weights=part.weights,
        training=part.training,
        shipped=part.shipped,
        calibration=part.calibration,
        fold=fold if type(fold) is int else None,
        accuracy=part.test.accuracy,
    )


def _join_weights(parts: Sequence[Description]) -> Weights:
    """Return what the networks started from as one entry; the licence is unknown if that of one network is."""
    started = [part.weights for part in parts if part.weights.source != "none"]
    if not started:
        return Weights("none", None, None)
    licences = list(dict.fromkeys(weights.licence for weights in started))
    known = [licence for licence in licences if licence is not None]
    return Weights("networks", None, "; ".join(known) if len(known) == len(licences) else None)


def _join_training(members: Sequence[MemberRun], images: EnsembleImages) -> Training:
    """Return what the networks were trained on as one entry."""
    trainings = [member.bundle.description.training for member in members]
    labels, classes = images.table["label"].to_numpy(), len(members[0].run.class_names)

    def count(rows: NDArray[Any]) -> tuple[int, ...]:
        return tuple(int(number) for number in np.bincount(labels[rows], minlength=classes))

    counts = {"train": count((images.splits == "train").any(axis=0))}
    if not images.is_out_of_fold:
        counts["val"] = count(images.fit_rows)
    counts["test"] = count(images.test_rows)
    return Training(
        stages=(),
        seed=trainings[0].seed,
        precision=", ".join(dict.fromkeys(training.precision for training in trainings)),
        data=", ".join(dict.fromkeys(training.data for training in trainings)),
        images=counts,
        grouped=all(training.grouped for training in trainings),
        split_sha256=" ".join(dict.fromkeys(training.split_sha256 for training in trainings)),
        validated_on=OUT_OF_FOLD if images.is_out_of_fold else "val",
        loss=", ".join(dict.fromkeys(training.loss for training in trainings)),
    )


@contextmanager
def _stage_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside `output`, which takes its place on success; what a killed process left goes."""
    staging = output.absolute().with_name(f".{output.absolute().name}.unfinished")
    staging.mkdir(parents=True, exist_ok=True)
    message = f"{output}: another process is writing this ensemble. Wait for it, or choose another --output."
    with lock_folder(staging, lambda: message):
        folder = staging / "result"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "model").mkdir(parents=True)
        try:
            yield folder
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _write_bundle(
    members: Sequence[MemberRun],
    images: EnsembleImages,
    description: Description,
    fitted: FittedModel,
    folder: Path,
) -> None:
    """Write the files of the bundle, the list of their hashes last."""
    weights: dict[str, Tensor] = {}
    directions: dict[str, Tensor] = {}
    looks: dict[str, Tensor] = {}
    for number, member in enumerate(members):
        classifier = member.bundle.classifier
        assert isinstance(classifier, BundleClassifier)
        weights |= {f"{number}.{name}": each.cpu() for name, each in classifier.network.state_dict().items()}
        directions[f"{number}.{DIRECTIONS}"] = classifier.directions.cpu()
        if classifier.appearance is not None:
            looks |= {f"{number}.{name}": each.cpu() for name, each in classifier.appearance.tensors.items()}
    files = {WEIGHTS: weights, UNLIKE: directions, **({LOOKS: looks} if looks else {})}
    if _has_fingerprints(members):
        used = np.isin(images.splits, ["train", "val"]).any(axis=0)
        store = Path(str(members[0].run.get_setting("cache.folder", ""))) / "facts"
        salt = derive_salt(weights)
        fingerprints = build_fingerprints(
            members[0].root, images.table.iloc[np.flatnonzero(used)], store=store, salt=salt
        )
        description = replace(description, fingerprints=summarize_fingerprints(fingerprints))
        files[FINGERPRINTS] = convert_fingerprints(fingerprints)
    content = convert_to_plain(description)
    build_description(content)  # checks what whoever loads the bundle will check
    for name, tensors in files.items():
        save_tensors(folder / name, tensors)
    write_json(folder / DESCRIPTION, content)
    leaks: Counter[str] = Counter()
    for member in members:
        leaks |= Counter((read_json(member.run.folder / AUDIT_FILE) or {}).get("accepted_leaks", {}))
    class_metrics = estimate_class_metrics(fitted.test, members[0].run.get_setting("metrics", {}), {})
    card = render_model_card(
        description, leaks=leaks, class_metrics=class_metrics, training=render_training_section(description)
    )
    write_text(folder / CARD, card)
    names = dict.fromkeys((*FILES, *files))
    write_text(folder / SUMS, "".join(f"{compute_sha256(folder / name)}  {name}\n" for name in names))


def _has_fingerprints(members: Sequence[MemberRun]) -> bool:
    """Return whether the runs want fingerprints, and their images are below one folder."""
    return (
        all(member.bundle.fingerprints is not None for member in members)
        and len({member.root.resolve() for member in members}) == 1
    )


def _check_written(written: Bundle, members: Sequence[MemberRun], sample: NDArray[np.uint8]) -> None:
    """Check that the written ensemble gives the mean of the probabilities of the runs' own bundles."""
    probabilities = []
    for number, member in enumerate(members):
        logits = member.bundle.run_network(written.select_input(sample, number)).logits
        probabilities.append(member.bundle.calibrate_logits(logits))
    mean = np.mean(probabilities, axis=0)
    difference = float(np.abs(np.exp(written.run_network(sample).logits.double().numpy()) - mean).max())
    if not difference <= MAX_DIFFERENCE:
        raise PylorusError(
            f"the ensemble's probabilities differ by {difference:.2g} from the mean of its networks', expected "
            f"{MAX_DIFFERENCE:g} at most. Nothing was written."
        )


def _write_table(images: EnsembleImages, outputs: MemberOutputs, fitted: FittedModel, path: Path) -> None:
    """Write what the ensemble says about the images that it was fitted and measured on."""
    parts = []
    roles = [("test", images.test_rows, images.test_votes, fitted.test)]
    if fitted.validation is not None:
        roles.insert(0, ("val", images.fit_rows, images.fit_votes, fitted.validation))
    for split, rows, votes, predictions in roles:
        table = images.table.iloc[rows][["sha256", "path", "group"]].reset_index(drop=True)
        names = np.array(predictions.class_names, dtype=object)
        table = table.assign(split=split, true=names[predictions.true], votes=votes[:, rows].sum(axis=0))
        average = np.exp(outputs.average(votes, rows))
        for column, name in enumerate(names):
            table[f"average/{name}"] = average[:, column]
            table[f"probability/{name}"] = predictions.probabilities[:, column]
        parts.append(table.assign(unlikeness=outputs.average_unlikeness(votes, rows)))
    with write_atomically(path) as temporary:
        pd.concat(parts, ignore_index=True).to_parquet(temporary, index=False)


def _list_notes(members: Sequence[MemberRun], images: EnsembleImages) -> list[str]:
    """Return what the user should know of the runs."""
    notes = []
    copies = sum(len(member.run.split.table) - len(member.images) for member in members if member.run.split is not None)
    if copies:
        notes.append(f"{format_count(copies, 'exact copy', 'exact copies')} of images in the runs' splits count once.")
    is_tested = (images.splits == "test").any(axis=0)
    are_folds = all(member.run.fold is not None for member in members)  # then it is the rule that they do
    for number, row in enumerate([] if are_folds else images.splits):
        seen = int((is_tested & np.isin(row, ["train", "val"])).sum())
        if seen:
            notes.append(
                f"Network {number} was developed on {format_count(seen, 'test image')} of other networks, and does not "
                "judge them."
            )
    wanted = sum(member.bundle.fingerprints is not None for member in members)
    if wanted and not _has_fingerprints(members):
        why = (
            f"only {wanted} of {len(members)} runs have them (deploy.fingerprints=true)"
            if wanted < len(members)
            else "the runs read their images from different folders"
        )
        notes.append(f"The bundle carries no fingerprints of the images: {why}.")
    return notes


def _print_result(description: Description, notes: Sequence[str], output: Path) -> None:
    sentences = [*format_ensemble_sentences(description), *notes]
    for sentence in sentences:
        print(textwrap.fill(sentence, width=110, initial_indent="- ", subsequent_indent="  "))
    command = format_command(["pylorus", "predict", str(output / "model"), "IMAGES", "--output", "predictions.csv"])
    print(f"\nbundle: {output / 'model'}\npage: {output / PAGE}\nTo predict with it:\n  {command}")
