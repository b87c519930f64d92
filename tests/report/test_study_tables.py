"""Predictions made from the published confusion matrices reproduce the published tables."""

import csv
import io

import numpy as np
import pytest

from pylorus.report.evidence import collect_evidence
from pylorus.report.results import PATIENTS, ReportOptions
from pylorus.report.study_tables import (
    STUDY,
    build_confusion_table,
    build_published_confusion_table,
    build_published_metric_table,
    build_study_metric_table,
)
from pylorus.report.table import format_csv, format_markdown

MODELS = {"VGG19": "vgg19.tv_in1k", "ResNet50": "resnet50.tv_in1k", "Inception-V3": "inception_v3.tv_in1k"}
STAGES = ("pretrain", "finetune")
INDICES = {"precision": "precision", "sensitivity": "sensitivity", "f1": "F1"}

MISPRINTS = {("Inception-V3", "pretrain", "precision", 1), ("ResNet50", "pretrain", "f1", 3)}
"""The paper's own: 66.5 printed as 64, and an average of rounded cells that is 88.49 unrounded."""


@pytest.fixture(scope="module")
def study(make_shared_run):
    def made(published):
        confusions = {stage: STUDY.get_result(published, stage).counts for stage in STAGES}
        return make_shared_run(published, model=MODELS[published], confusions=confusions)

    return collect_evidence([made(name) for name in MODELS], ReportOptions(resamples=100))


def test_70_of_the_72_cells_are_those_of_the_paper_and_the_other_two_are_its_misprints(study):
    differing = set()
    for run, published in zip(study.runs, MODELS, strict=True):
        rows = list(csv.DictReader(io.StringIO(format_csv(build_study_metric_table(study.get_run_results(run))))))
        assert [row["class"] for row in rows] == ["GC", "GU", "CG", "average"]
        for stage in STAGES:
            for index, title in INDICES.items():
                for place, row in enumerate(rows):
                    ours = np.floor(float(row[f"{stage} {title}"]) + 0.5)
                    if ours != getattr(STUDY.get_result(published, stage), index)[place]:
                        differing.add((published, stage, index, place))
    assert differing == MISPRINTS


def test_all_six_confusion_matrices_are_those_of_the_paper(study):
    ours, theirs = build_confusion_table(study.results), build_published_confusion_table()
    assert [row.cells[2:] for row in ours.rows] == [row.cells[2:] for row in theirs.rows]
    assert len(ours.rows) == 18


def test_the_published_tables_are_reproduced_as_printed():
    text = format_markdown(build_published_metric_table("Inception-V3"))
    assert "| GU      |                 64 |" in text
    assert "OPTIMISTIC" in text


def test_captions_state_level_images_and_split(study):
    split = study.runs[0].split.short_hash
    basis = build_study_metric_table(study.get_run_results(study.runs[0])).basis
    assert basis == f"Image-level; 450 test images, each its own group; split {split}."


def test_the_patient_level_matrix_counts_patients(make_run):
    evidence = collect_evidence([make_run(images_per_group=2)], ReportOptions(resamples=100))
    table = build_confusion_table(evidence.results, level=PATIENTS)
    assert sum(cell for row in table.rows for cell in row.cells[3:]) == 2 * 30
    assert table.basis.startswith("Patient-level; 30 groups, mean probability of their images; 60 test images; split ")
