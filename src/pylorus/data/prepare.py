"""Prepare the images of a run: catalog, audit and split them, and write the results into the run's folder."""

import logging
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from pylorus.config.checks import save_config
from pylorus.config.schema import Config, DataConfig, SyntheticConfig
from pylorus.core.errors import PylorusError, format_name_list, format_path
from pylorus.core.formatting import format_count, format_percent, join_names
from pylorus.core.io import write_atomically, write_json
from pylorus.data.audit import audit, convert_audit_to_json
from pylorus.data.audit_findings import ImageSet, Thresholds, count_leaks
from pylorus.data.audit_image_checks import UNCLEAR, WHOLE
from pylorus.data.catalog import Catalog, count_unreadable, log_unreadable, write_quarantine
from pylorus.data.input_format import ImageWriter, InputFormat, resolve_mask
from pylorus.data.leakage import Copies, find_copies
from pylorus.data.sources import read_run_catalog
from pylorus.data.split import (
    SPLITS,
    RunImages,
    Split,
    check_images_unchanged,
    read_fold_values,
    read_initial_split,
    split_catalog,
    write_split,
)
from pylorus.data.synthetic import generate_image_set
from pylorus.data.walk import log_ignored, write_ignored

log = logging.getLogger(__name__)

AUDIT_FILE = "audit.json"
MAX_EXAMPLES = 5
"""Maximum number of images without a field of view that a warning names."""


def audit_run_images(catalog: Catalog, split: Split, copies: Copies, folder: Path, data: DataConfig) -> None:
    """Audit a run's images from the facts in the catalog, without opening files, and write audit.json.

    The file contains paths, as split.csv does; reports take only counts and sentences from it.
    """
    result = audit(list_catalog_files(catalog, split), catalog.facts, Thresholds(), copies=copies)
    accepted = {
        "accepted_leaks": count_leaks(split.leaks),
        "joined_groups": split.joined,
        "left_out": count_unreadable(catalog.unreadable),
        "excluded": dict(catalog.excluded),
    }
    write_json(folder / AUDIT_FILE, convert_audit_to_json(result, names=True) | accepted, indent=None)
    counts = [format_count(count, severity) for severity, count in result.counts.items() if count]
    if counts:
        details = _format_audit_command(catalog, data) or str(folder / AUDIT_FILE)
        log.info("audit    %s; for details: %s", ", ".join(counts), details)
    else:
        log.info("audit    no findings")


def _format_audit_command(catalog: Catalog, data: DataConfig) -> str:
    """Return the command that audits the same files; empty if there is none, as for shards."""
    if data.kind not in ("folders", "manifest", "synthetic"):
        return ""
    words = ["pylorus", "audit", str(catalog.root)]
    if data.kind == "manifest":
        words += ["--manifest", str(data.manifest)]
    return shlex.join([*words, "--group", data.group] if data.group is not None else words)


def list_catalog_files(catalog: Catalog, split: Split) -> ImageSet:
    """Return all files of a catalog, including those that were left out, in the order of its facts."""
    columns = ["path", "class", "split", "group"]
    left_out = np.setdiff1d(np.arange(len(catalog.facts)), catalog.fact_indices)
    rows = split.table.assign(**{"class": np.array(catalog.classes, dtype=object)[split.table["label"]]})[columns]
    table = pd.concat(
        [rows.set_axis(catalog.fact_indices), catalog.unreadable[columns].set_axis(left_out)]
    ).sort_index()
    return ImageSet(catalog.root, table, grouped=catalog.grouped)


def prepare_images(config: Config, folder: Path, form: InputFormat | None = None) -> tuple[RunImages, Config]:
    """Catalog, audit and split the configured images, and write the results into the run's folder.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        form: How a file becomes the network's input, which is cached as the files are decoded; None: not yet known.

    Writes catalog.parquet, split.csv, audit.json, quarantine.csv and ignored.csv if files were left
    out, and config.yaml, completed with the classes.

    Returns:
        The images, and the configuration with what they determine: classes, short names, root and number of folds.

    Raises:
        PylorusError: If the images can't be used as they are; the message says what is wrong.
    """
    data = config.data
    root: Path | None
    if data.kind == "synthetic":
        root = folder / "images"
        if not root.is_dir():  # a resumed run has it already, and complete
            _generate_images(root, data.drawn)
    else:
        root = Path(data.root) if data.root is not None else None
    images = ImageWriter(form, config.cache) if form is not None else None
    catalog = read_run_catalog(data, root, folder, cache=Path(config.cache.folder), images=images)
    check_images_unchanged(catalog.table, folder / "split.csv")  # before any file of the run is overwritten
    # Record what was inferred, so that the configuration of a run is complete.
    data = _complete_data(data, catalog)
    config = replace(config, data=data)
    save_config(folder / "config.yaml", config)
    with write_atomically(folder / "catalog.parquet") as temporary:
        catalog.table.to_parquet(temporary, index=False)
    write_quarantine(catalog.unreadable, folder)
    log_unreadable(catalog)
    write_ignored(catalog.ignored, folder)
    log_ignored(catalog.ignored)
    for name, count in catalog.excluded.items():
        log.info('excluded %s of class "%s" (data.exclude)', format_count(count, "image"), name)
    log_fields(catalog, data)
    copies = find_copies(catalog.facts, Thresholds(), store=Path(config.cache.folder) / "facts")
    initial_split = read_initial_split(catalog.table, folder / "split.csv")
    assignment = split_catalog(catalog, data, copies=copies, parts=initial_split)
    if initial_split is None:
        _check_split_seed(assignment, data.split_seed)
    split_hash = write_split(assignment.table, catalog.classes, folder / "split.csv")
    audit_run_images(catalog, assignment, copies, folder, data)
    run_images = RunImages(
        catalog.copy_without_facts(), assignment.table, split_hash, "test" if data.validation == "test" else "val"
    )
    _log_images(run_images)
    for sentence in assignment.explain_deviations(catalog.classes, grouped=catalog.grouped):
        log.warning("split    %s", sentence)
    return run_images, config


def log_fields(catalog: Catalog, data: DataConfig) -> None:
    """Log in how many images a field of view was found and overlays are masked; warn if no field is found in most."""
    mask, count = resolve_mask(data.mask, crop=data.crop), len(catalog.table)
    if data.crop != "auto":
        if mask == "overlays":
            log.info("mask     %s of %s images", _format_masked(catalog), f"{count:,}")
        return
    outcomes = catalog.facts.get_column("field")[catalog.fact_indices].astype(np.str_)
    whole, unclear = np.flatnonzero(outcomes == WHOLE), np.flatnonzero(outcomes == UNCLEAR)
    missing = len(whole) + len(unclear)
    log.info(
        "fields   field of view found in %s of %s images%s",
        f"{count - missing:,}",
        f"{count:,}",
        f", {_format_masked(catalog)}" if mask == "overlays" else "",
    )
    if 2 * missing > count:
        examples = [format_path(Path(catalog.table["path"].iloc[index])) for index in [*unclear, *whole][:MAX_EXAMPLES]]
        log.warning(
            "fields   %s of %s images are not cropped (data.crop=auto): %s have no flat ground at the edge, in %s no "
            "field of view can be told. %sFor example:\n%s",
            f"{missing:,}",
            f"{count:,}",
            f"{len(whole):,}",
            f"{len(unclear):,}",
            f"`{command}` shows the outlines. " if (command := _format_audit_command(catalog, data)) else "",
            format_name_list(examples, most=MAX_EXAMPLES),
        )


def _check_split_seed(split: Split, split_seed: int) -> None:
    """Refuse a split seed without effect: runs with others would count as replicates of other splits."""
    if split_seed != DataConfig.split_seed and not split.is_random:
        raise PylorusError(
            f"data.split_seed: found {split_seed}, but the images or other keys of data define the whole split, so "
            "nothing is drawn. Leave it out; seed changes only the training."
        )


def _complete_data(data: DataConfig, catalog: Catalog) -> DataConfig:
    """Return the section with what was read from the images."""
    completed = replace(data, classes=list(catalog.classes), short_names=list(catalog.short_names))
    if data.kind in ("manifest", "external"):
        completed = replace(completed, root=str(catalog.root))
    if data.fold_column is not None:
        completed = replace(completed, folds=read_fold_values(catalog.table, data.fold_column).nunique())
    return completed


def _generate_images(root: Path, drawn: SyntheticConfig) -> None:
    generate_image_set(
        root,
        images=drawn.images,
        size=drawn.size,
        seed=drawn.seed,
        images_per_patient=drawn.images_per_patient,
        overlay=drawn.overlay,
    )


def _format_masked(catalog: Catalog) -> str:
    """Say in how many images overlays are masked, and how much of a frame."""
    covered = catalog.facts.get_column("covered")[catalog.fact_indices]
    masked = covered[covered > 0]
    share = f" ({format_percent(float(np.median(masked)))} % of the frame in the median)" if len(masked) else ""
    return f"overlays masked in {len(masked):,}{share}"


def _log_images(images: RunImages) -> None:
    catalog = images.catalog
    names = ", ".join(
        name if name == short else f"{name} ({short})"
        for name, short in zip(catalog.classes, catalog.short_names, strict=True)
    )
    patients = images.table["group"].nunique()
    grouping = "image-level, since patients are not defined"
    if catalog.grouped:
        grouping = f"{format_count(patients, 'group')} ({'patient' if patients == 1 else 'patients'})"
    log.info("images   %s: %s of %s; %s", catalog.root, format_count(len(images.table), "image"), names, grouping)
    pairs = catalog.table[["group", "label"]].drop_duplicates()
    mixed = pairs[pairs.duplicated("group", keep=False)].sort_values(["group", "label"])
    if catalog.grouped and len(mixed):
        group, count = mixed["group"].iloc[0], mixed["group"].nunique()
        log.warning(
            "%s of %s (patients) %s images with different labels, such as %s: %s",
            f"{count:,}",
            format_count(pairs["group"].nunique(), "group"),
            "has" if count == 1 else "have",
            group,
            join_names([catalog.classes[label] for label in mixed.loc[mixed["group"] == group, "label"]]),
        )
    sizes = [f"{sum(images.count_by_class(part))} {part}" for part in SPLITS]
    log.info("split    %s (%s)", ", ".join(sizes), images.split_hash[:12])
    if images.validation == "test":
        log.warning("OPTIMISTIC: every epoch is validated on the test images, as in the study (data.validation=test)")
