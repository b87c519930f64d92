import hashlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pylorus.report.evidence import collect_evidence
from pylorus.report.mistakes import (
    build_augmentation_pictures,
    build_mistake_table,
    build_prediction_pictures,
    create_thumbnails,
    find_worst_mistakes,
)
from pylorus.report.results import ReportOptions
from pylorus.runs.reading import read_run

FAST = ReportOptions(resamples=100)


def collect_candidate_results(evidence):
    return [result for each in evidence.candidates for result in each.results]


@pytest.fixture(scope="module")
def evidence(make_shared_run):
    return collect_evidence([make_shared_run("a"), make_shared_run("b", model="vgg19.tv_in1k", seed=1)], FAST)


def test_mistakes_are_sorted_by_confidence(evidence):
    result = evidence.results[-1]
    found = find_worst_mistakes(result, collect_candidate_results(evidence))
    said = result.test.predictions
    assert [each.certainty for each in found] == sorted((each.certainty for each in found), reverse=True)
    assert len(found) == min(12, int((~said.correct).sum()))
    assert all(each.true != each.predicted and each.certainty >= each.true_probability for each in found)
    surest = said.probabilities.max(axis=1)[~said.correct].max()
    assert found[0].certainty == surest


def test_the_number_of_models_that_share_a_mistake_is_stated(evidence):
    first, second = collect_candidate_results(evidence)
    wrong = [set(result.test.predictions.sample[~result.test.predictions.correct]) for result in (first, second)]
    for each in find_worst_mistakes(first, (first, second)):
        assert each.missed_by == 1 + (each.sample in wrong[1])


def test_the_table_names_files_only_if_asked(evidence):
    result = evidence.results[0]
    found = find_worst_mistakes(result, collect_candidate_results(evidence))
    assert "file" not in [column.title for column in build_mistake_table(result, found, peers=2, names=False).columns]
    named = build_mistake_table(result, found, peers=2, names=True)
    assert named.rows[0].cells[1].endswith(".jpg")


def test_a_thumbnail_shows_the_predicted_image(make_run, tmp_path):
    folder = make_run(config={"data.root": str(tmp_path / "images")})
    run = read_run(folder)
    assert run.split is not None
    rows = run.split.table.query("split == 'test'").iloc[:3]
    for path in rows["path"]:
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "images" / rows["path"].iloc[0])
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "images" / rows["path"].iloc[1])
    content = (tmp_path / "images" / rows["path"].iloc[0]).read_bytes()
    run.split.table.loc[rows.index[0], "sha256"] = hashlib.sha256(content).hexdigest()
    shown, changed, gone = (create_thumbnails(run, [sample])[sample] for sample in rows["sample_id"])
    assert shown.jpeg
    assert (changed.jpeg, changed.missing) == ("", "the file has changed since the run")
    assert (gone.jpeg, gone.missing) == ("", "the file no longer exists")


def test_a_report_that_may_show_images_has_samples_of_predictions_and_augmented_images(make_run, tmp_path):
    folder = make_run(
        config={"data.root": str(tmp_path / "images"), "augment.transforms": {"HorizontalFlip": {"p": 1}}}
    )
    run = read_run(folder)
    rng = np.random.default_rng(0)
    for index, path in run.split.table["path"].items():
        file = tmp_path / "images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(file)
        run.split.table.loc[index, "sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    [result] = [each for each in collect_evidence([folder], FAST).results if each.stage.name == "finetune"]
    result = replace(result, run=run)
    sampled = build_prediction_pictures(result).shown
    assert len(sampled) == 24
    by_sample = dict(zip(result.test.predictions.sample.tolist(), result.test.predictions.correct, strict=True))
    assert [each.is_wrong for each in sampled] == [not by_sample[each.thumbnail.sample] for each in sampled]
    assert all(each.thumbnail.jpeg for each in sampled)
    augmented = build_augmentation_pictures(run, stage="finetune").shown
    assert [each.caption for each in augmented] == ["unchanged", *(f"variant {number}" for number in range(1, 5))] * 3
    assert len({each.thumbnail.jpeg for each in augmented}) > 3


def test_without_augmentation_no_augmented_images_are_shown(make_run):
    assert build_augmentation_pictures(read_run(make_run()), stage="finetune") is None
