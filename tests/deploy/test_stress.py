"""`pylorus stress`: a network that reads a corner is called that, one that does not is not, and the page says so."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pylorus.cli import main
from pylorus.data.degradation import degrade_image
from pylorus.data.input_format import InputFormat
from pylorus.data.synthetic import CLASSES, generate_frame, generate_image_set
from pylorus.deploy.model import load_bundle
from pylorus.deploy.parity import TrialImages
from pylorus.deploy.stress import (
    REGION_VARIANTS,
    WHOLE,
    compute_variants,
    evaluate_degradations,
    evaluate_regions,
    select_images,
)
from pylorus.model.inference import NetworkOutput
from pylorus.report.evidence import collect_evidence
from pylorus.report.page import build_sections
from pylorus.report.results import ReportOptions

FORM = InputFormat(64, "pad", "bicubic")
TRUE = np.arange(48) % 3


def read_corner(images):
    """Call an image cancer if its bottom left corner is blue; else ulcer or gastritis by the brightness of its centre."""
    corner = torch.from_numpy(images[:, -12:, :12, 2].mean(axis=(1, 2)) / 255.0).float()
    center = torch.from_numpy(images[:, 24:40, 24:40].mean(axis=(1, 2, 3)) / 255.0).float()
    logits = torch.stack([8 * corner - 1, center, 0.8 - center], dim=1)
    return NetworkOutput(logits, torch.zeros(len(images)))


def read_center(images):
    """Decide by the colours of the centre only."""
    center = torch.from_numpy(images[:, 20:44, 20:44].mean(axis=(1, 2)) / 255.0).float()
    return NetworkOutput(4 * center, torch.zeros(len(images)))


def draw_frames(*, marked):
    """Draw a frame of each of 48 patients, with a mark in the bottom left corner of those that `marked` says."""
    frames = []
    for number, label in enumerate(TRUE):
        frame = generate_frame(CLASSES[label], seed=number, size=96).image.copy()
        if marked(number, label):
            frame[85:94, 2:11] = (60, 200, 240)
        frames.append(frame)
    return frames


def find_regions(network, frames):
    outputs = compute_variants(frames, FORM, network, (WHOLE, *REGION_VARIANTS), progress=False)
    return {each.region: each for each in evaluate_regions(outputs, TRUE, None)}


def test_a_network_that_reads_a_corner_with_a_mark_of_one_class_is_accused_and_the_corner_named():
    regions = find_regions(read_corner, draw_frames(marked=lambda number, label: (label == 0) != (number % 16 == 0)))
    accused = {name for name, each in regions.items() if each.is_shortcut}
    assert accused == {"border", "bottom left"}
    assert CLASSES[regions["bottom left"].test.label] == "gastric_cancer"
    assert regions["bottom left"].accuracy_change.high < 0


@pytest.mark.parametrize(
    ("network", "marked"),
    [
        (read_center, lambda number, label: label == 0),  # the mark tells the class, but the network does not see it
        (read_corner, lambda number, label: number % 2 == 0),  # the network reads a mark that tells nothing
        (read_corner, lambda number, label: False),
    ],
)
def test_a_network_without_a_shortcut_is_not_accused(network, marked):
    assert not any(each.is_shortcut for each in find_regions(network, draw_frames(marked=marked)).values())


def test_text_in_images_of_one_class_is_found_if_the_network_reads_it():
    def read_top_left(images):
        blue = torch.from_numpy(images[:, :14, :20, 2].mean(axis=(1, 2)) / 255.0).float()
        return NetworkOutput(torch.stack([20 * blue, 2 - blue, 2 - blue], dim=1), torch.zeros(len(images)))

    frames = [
        generate_frame(CLASSES[label], seed=number, size=256, overlay=label == 0).image
        for number, label in enumerate(TRUE)
    ]
    assert find_regions(read_top_left, frames)["overlays"].is_shortcut


def test_frames_without_a_border_are_not_tested_and_that_is_said():
    generator = np.random.default_rng(0)
    frames = [generator.integers(60, 200, (64, 64, 3), dtype=np.uint8) for _ in TRUE]
    regions = find_regions(read_corner, frames)
    assert regions["border"].test is None
    assert regions["border"].problem == "a border surrounds the field in no image"


def test_the_limit_takes_classes_evenly_and_patients_before_their_second_images():
    labels = np.repeat([0, 1, 2], 40)
    patients = np.array([f"{label}-{number // 2}" for label in range(3) for number in range(40)])
    files = tuple(Path(f"{number}.png") for number in range(120))
    chosen = select_images(TrialImages(files, labels, patients, ""), 30)
    assert np.bincount(chosen.labels).tolist() == [10, 10, 10]
    assert len(set(chosen.groups)) == 30


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("stress") / "images"
    generate_image_set(root, images=6, size=64, seed=8)
    return root


def run_stress(*words):
    main(["stress", *map(str, words)])


@pytest.fixture(scope="module")
def stressed_run(trained_run, tmp_path_factory):
    """A copy of the run whose bundle was stressed on the run's own test images."""
    run = shutil.copytree(trained_run.path, tmp_path_factory.mktemp("stressed") / "run")
    run_stress(run / "model")
    return run


@pytest.mark.slow
def test_the_test_images_of_the_run_are_stressed_and_page_tables_and_record_written(stressed_run):
    split = pd.read_csv(stressed_run / "split.csv")
    test = split[split["split"] == "test"]
    record = json.loads((stressed_run / "stress" / "stress.json").read_text())
    assert (record["images"], record["patients"]) == (len(test), test["group"].nunique())
    assert len(pd.read_csv(stressed_run / "stress" / "tables" / "degradation.csv")) == 1 + 12 * 5
    page = (stressed_run / "stress" / "report.html").read_text()
    assert "<script" not in page
    assert "http://" not in page


@pytest.mark.slow
def test_a_report_repeats_what_stress_found_with_the_runs_own_bundle(stressed_run):
    def build_report():
        evidence = collect_evidence([stressed_run], ReportOptions())
        section = next(each for each in build_sections(evidence) if each.key == "stress")
        return [text for item in section.items for text in item.texts]

    finding = json.loads((stressed_run / "stress" / "stress.json").read_text())["findings"][0]
    assert finding in build_report()
    sums = stressed_run / "model" / "SHA256SUMS"
    content = sums.read_text()
    sums.write_text("another bundle")
    assert build_report() == []
    sums.write_text(content)


@pytest.mark.slow
def test_all_grades_are_measured_with_the_stored_threshold_and_abstention(bundle_folder):
    bundle = load_bundle(bundle_folder)
    frames = draw_frames(marked=lambda number, label: False)[:12]
    outputs = compute_variants(frames, bundle.input, bundle.run_network, (WHOLE, "dark/5"), progress=False)
    whole, dark = evaluate_degradations(bundle, outputs, TRUE[:12], None, "GC")
    pixels = np.stack([bundle.input.prepare_image(degrade_image(frame, "dark", 5)) for frame in frames])
    answer = bundle.predict_images(pixels, class_name="GC")
    assert dark.accuracy.value == (answer.predicted == TRUE[:12]).mean()
    assert dark.sensitivity.value == answer.positive[TRUE[:12] == 0].mean()
    assert dark.answered.value == (answer.why == "").mean()
    assert dark.accuracy_change.value == pytest.approx(dark.accuracy.value - whole.accuracy.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere", "--output", "{out}"), "nowhere does not exist. Expected class folders, or a manifest"),
        (("--map", "Ca=GC"), "--map, --root and --group are for images that you name"),
        (("{images}",), "--output: expected a folder"),
        (("{images}", "--output", "{out}", "--margin", "5"), "Did you mean 0.05?"),
        (("{images}", "--output", "{out}", "--limit", "3"), "--limit: found 3, expected at least 10"),
        (("{images}", "--output", "{out}", "--class", "GX"), '--class: found "GX"'),
        (("{images}", "--output", "{out}", "--group", "case"), "finds no patient in"),
    ],
)
def test_wrong_input_is_named(bundle_folder, image_folder, tmp_path, words, message):
    places = {"images": image_folder, "out": tmp_path / "out"}
    with pytest.raises(SystemExit, match=message):
        run_stress(bundle_folder, *(word.format(**places) for word in words))


def test_images_of_other_classes_are_refused_with_what_to_type_and_may_be_mapped_or_left_out(
    bundle_folder, image_folder, tmp_path, monkeypatch
):
    site = tmp_path / "site"
    for new, old in {"Ca": CLASSES[0], "Ulkus": CLASSES[1], "Polyp": CLASSES[2]}.items():
        shutil.copytree(image_folder / old, site / new)
    with pytest.raises(SystemExit, match=r"3 classes that the model does not have:\n  Ca\n") as refused:
        run_stress(bundle_folder, site, "--output", tmp_path / "out")
    assert "--map Ca=GC" in str(refused.value)
    assert not (tmp_path / "out").exists()
    words = ("--map", "Ca=GC", "Ulkus=gastric_ulcer", "Polyp=", "--group", r"patient_\d+", "--limit", "10")
    run_stress(bundle_folder, site, "--output", tmp_path / "out", *words)
    record = json.loads((tmp_path / "out" / "stress.json").read_text())
    assert record["images"] == 10
    page = (tmp_path / "out" / "report.html").read_text()
    assert "6 images of class Polyp left out" in page
    assert "There are no images of CG" in page
