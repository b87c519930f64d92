"""The answers of the checklist are true for their run, and another run changes them."""

import pandas as pd
import pytest
from omegaconf import OmegaConf

from pylorus.core.io import read_json, write_json
from pylorus.report import checklist_answers as answers
from pylorus.report.checklists import (
    GUIDELINES,
    ITEMS,
    QUAIDE_DOMAINS,
    build_checklist_table,
    build_guideline_table,
)
from pylorus.report.evidence import collect_evidence
from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions

FAST = ReportOptions(resamples=20)


def change_json(name, **values):
    def change(folder):
        write_json(folder / name, (read_json(folder / name) or {}) | values)

    return change


def change_bundle_input(**values):
    def change(folder):
        bundle = read_json(folder / "model" / "model.json")
        write_json(folder / "model" / "model.json", bundle | {"input": bundle["input"] | values})

    return change


def give_parts(*parts):
    """As a run writes catalog.parquet where folders or a manifest give these parts."""

    def change(folder):
        split = pd.read_csv(folder / "split.csv")["split"]
        pd.DataFrame({"split": split.where(split.isin(parts), "")}).to_parquet(folder / "catalog.parquet")

    return change


def add_column(name, values):
    def change(folder):
        for path in folder.rglob("predictions-test.parquet"):
            table = pd.read_parquet(path)
            table[f"about/{name}"] = [values[number % len(values)] for number in range(len(table))]
            table.to_parquet(path)

    return change


def configure(**values):
    """Sets keys of config.yaml, also those that this version does not have."""

    def change(folder):
        config = OmegaConf.create(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
        for key, value in values.items():
            OmegaConf.update(config, key, value)
        OmegaConf.save(config, folder / "config.yaml")

    return change


def remove(pattern):
    def change(folder):
        for path in folder.rglob(pattern):
            path.unlink()

    return change


BASE = {"stages": ("s",), "test_each": (8, 8, 8), "val_each": (5, 5, 5), "skill": 0.5}
TWO_CLASSES = {"names": ("GC", "CG"), "test_each": (8, 8), "val_each": (5, 5)}
LEFT_OUT = {"left_out": [{"class": "gastric_ulcer", "split": "not given", "files": 4}]}


@pytest.fixture(scope="module")
def base_evidence(make_shared_run):
    return collect_evidence([make_shared_run("base", **BASE)], FAST)


@pytest.mark.parametrize(
    ("answer", "story", "change", "base_says", "contrary_says"),
    [
        (
            answers.report_intended_use,
            {},
            change_json("model/model.json", intended_use="Teaching."),
            "Research use",
            "Teaching.",
        ),
        (answers.report_images, {"images_per_group": 2}, None, "129 images.", "129 images of 66 groups."),
        (answers.report_images, {"config": {"data.kind": "synthetic"}}, None, "129 images.", "129 synthetic images."),
        (
            answers.report_preprocessing,
            {},
            change_bundle_input(crop="auto"),
            "RGB, made square",
            "RGB, cropped to the field",
        ),
        (
            answers.report_classes,
            TWO_CLASSES,
            None,
            "gastric_ulcer",
            "gastric_cancer (GC), chronic_gastritis (CG).",
        ),
        (
            answers.report_deidentification,
            {"config": {"data.patients": "dicom"}},
            None,
            "Only pixels and orientation of the image files are used",
            "Patients are distinguished by salted hashes of the DICOM PatientID",
        ),
        (
            answers.report_deidentification,
            {"config": {"logger.name": "wandb", "logger.images": True}},
            None,
            "contains file names (split.csv).",
            "Misclassified images were logged to wandb",
        ),
        (
            answers.report_deidentification,
            {"config": {"data.kind": "synthetic"}},
            None,
            "of the image files",
            "show no patient",
        ),
        (
            answers.report_missing_data,
            {"config": {"data.on_error": "quarantine"}},
            None,
            "an unreadable file stops the run",
            "Unreadable files are excluded (data.on_error=quarantine); there were none.",
        ),
        (
            answers.report_missing_data,
            {"config": {"data.on_error": "quarantine"}},
            change_json("audit.json", **LEFT_OUT),
            "an unreadable file stops the run",
            "4 files could not be read and were excluded",
        ),
        (
            answers.report_missing_data,
            {"finished": 0},
            None,
            "Every test image was classified",
            "Every file could be read",
        ),
        (answers.report_blinding, {"config": {"data.validation": "test"}}, None, "pixels only", "Not blinded:"),
        (answers.report_blinding, {"finished": 0}, None, "pixels only", ""),
        (answers.report_sample_size, {"test_each": (8, 8, 9)}, None, "on 24 images", "on 25 images"),
        (
            answers.report_partitions,
            {},
            configure(**{"data.split_seed": 7}),
            "Test images: selected at random by image, stratified by class (",
            "Test images: selected at random by image, stratified by class (data.split_seed 7).",
        ),
        (answers.report_partitions, {"images_per_group": 2}, None, "random by image", "random by patient (group)"),
        (
            answers.report_partitions,
            {"config": {"data.test_column": "site_id", "data.test_values": ["Klinik Mustermann"]}},
            None,
            "Test images: selected at random",
            "Test images: those with one value of site_id (data.test_column).",
        ),
        (
            answers.report_partitions,
            {"config": {"data.test_column": "date", "data.test_from": "2024"}},
            None,
            "Test images: selected at random",
            "Test images: those whose date reaches a given value (data.test_column).",
        ),
        (
            answers.report_partitions,
            {"config": {"data.split_file": "other/split.csv"}},
            None,
            "Test images: selected at random",
            "Test images: those of another run's split (data.split_file). Validation images: those of another run's",
        ),
        (
            answers.report_partitions,
            {"config": {"data.fold": 2}},
            None,
            "Test images: selected at random",
            "Test images: fold 2 of folds 0 to 4, selected at random by image",
        ),
        (
            answers.report_partitions,
            {},
            configure(**{"data.fold": "B", "data.fold_column": "site"}),
            "Test images: selected at random",
            "Test images: those with one value of site, excluded from training (data.fold_column).",
        ),
        (
            answers.report_partitions,
            {},
            give_parts("train", "test"),
            "Test images: selected at random",
            "Test images: given by the folders. Validation images: selected at random",
        ),
        (
            answers.report_partitions,
            {"config": {"data.kind": "manifest"}},
            give_parts("train", "val", "test"),
            "Validation images: selected at random",
            "Validation images: given by the column `split` of the manifest.",
        ),
        (
            answers.report_partitions,
            {"config": {"data.validation": "test"}},
            None,
            "90 training, 15 validation and 24 test images",
            "90 training and 24 test images",
        ),
        (
            answers.report_partitions,
            {},
            change_json("audit.json", **LEFT_OUT),
            "not test images.",
            "could not be read: 4.",
        ),
        (
            answers.report_split_overlaps,
            {"images_per_group": 2},
            None,
            "is unknown",
            "Groups (patients); in more than one split: 0 groups, 0 identical images.",
        ),
        (
            answers.report_split_overlaps,
            {"images_per_group": 2, "config": {"data.patients": "dicom"}},
            None,
            "is unknown",
            "Patients (by DICOM PatientID); in more than one split: 0 groups",
        ),
        (
            answers.report_split_overlaps,
            {},
            change_json("audit.json", accepted_leaks={"patient": 0, "file": 0, "pixels": 1, "near": 2}),
            "in more than one split: 0 identical images. Whether",
            "in more than one split: 0 identical images and 3 near copies. Whether",
        ),
        (answers.report_models, {"model": "vgg19.tv_in1k"}, None, "resnet50.tv_in1k at 224 pixels", "vgg19.tv_in1k"),
        (
            answers.report_models,
            {"config": {"model.args": {"drop_rate": 0.1}}},
            None,
            "3 classes.",
            "3 classes, drop_rate 0.1.",
        ),
        (
            answers.report_software,
            {},
            change_json("environment.json", packages={"torch": "9.9"}),
            "torch 2.6.0",
            "torch 9.9",
        ),
        (
            answers.report_initial_weights,
            {},
            change_json("model/model.json", weights={"from": "none"}),
            "the timm hub",
            "Random initialisation.",
        ),
        (
            answers.report_initial_weights,
            {},
            change_json("model/model.json", weights={"from": "/home/w/vgg.pth", "sha256": "cd" * 32}),
            "Pretrained weights from the timm hub",
            "Weights from the file vgg.pth, SHA-256 cdcdcdcdcdcd",
        ),
        (
            answers.report_training,
            {"config": {"stages.s.lr": 0.03}},
            None,
            "rate 0.001 (cosine schedule)",
            "rate 0.03 (cosine schedule)",
        ),
        (answers.report_training, {"config": {"stages.s.lr_factor": 0.1}}, None, "rate 0.001 ", "rate 0.0001 "),
        (
            answers.report_training,
            {"config": {"stages.s.schedule": "plateau"}},
            None,
            "(cosine schedule)",
            "(plateau schedule)",
        ),
        (
            answers.report_training,
            {"config": {"stages.s.augment": "endoscopy"}},
            None,
            "augmentation none",
            "endoscopy",
        ),
        (
            answers.report_training,
            {"config": {"augment.name": "light"}},
            None,
            "augmentation none",
            "augmentation light",
        ),
        (
            answers.report_training,
            {"config": {"stages.s.views": 4}},
            None,
            "augmentation none.",
            "4 variants of each image",
        ),
        (
            answers.report_training,
            {"config": {"stages.s.layer_decay": 0.8}},
            None,
            "(cosine schedule), aug",
            "(cosine schedule), layer-wise learning rate decay 0.8",
        ),
        (
            answers.report_training,
            {"config": {"stages.s.learn": "layer4"}},
            None,
            "trained layers: all",
            "trained layers: layer4",
        ),
        (
            answers.report_training,
            {"config": {"stages.s.patience": 2}},
            None,
            "4 of 10 epochs,",
            "4 of 10 epochs (stopped early after 2 epochs without improvement)",
        ),
        (
            answers.report_training,
            {"config": {"optimizer.name": "sgd"}},
            None,
            "adamw, weight decay 0.01",
            "momentum 0.9",
        ),
        (
            answers.report_training,
            {"config": {"optimizer.clip": None}},
            None,
            "clipped to a norm of 1",
            "0.01, batch size",
        ),
        (answers.report_training, {}, change_json("environment.json", batch_size=64), "batch size 16", "batch size 64"),
        (
            answers.report_training,
            {"averaged": 2, "config": {"averaging.name": "mean"}},
            None,
            "augmentation none. adamw",
            "weights used: mean of the weights of 2 epochs",
        ),
        (
            answers.report_training,
            {"config": {"trainer.accumulate": 4}},
            None,
            "batch size 16",
            "batch size 64 (gradients accumulated over 4 batches of 16)",
        ),
        (
            answers.report_training,
            {"config": {"loss.class_weights": "balanced"}},
            None,
            ", cross-entropy,",
            "class-weighted cross-entropy",
        ),
        (
            answers.report_training,
            {"config": {"loss.label_smoothing": 0.1}},
            None,
            "entropy, prec",
            "label smoothing 0.1",
        ),
        (answers.report_training, {"config": {"trainer.devices": 4}}, None, "precision auto, seed", "4 devices (ddp)"),
        (
            answers.report_training,
            {},
            change_json("environment.json", precision="bf16"),
            "precision auto",
            "precision bf16",
        ),
        (answers.report_training, {}, change_json("status.json", resumed=2), "auto, seed 0.", "resumed 2 times"),
        (answers.report_training, {"config": {"seed": 5}}, None, "seed 0.", "seed 5."),
        (
            answers.report_model_selection,
            {"config": {"stages.s.monitor": "f1"}},
            None,
            "by loss on the validation",
            "by f1 on the validation",
        ),
        (
            answers.report_model_selection,
            {"config": {"data.validation": "test"}},
            None,
            "by loss on the validation images",
            "by loss on the test images (data.validation=test)",
        ),
        (answers.report_model_selection, {"finished": 0}, None, "best of 4 epochs", ""),
        (
            answers.report_thresholds,
            {"config": {"data.validation": "test"}},
            None,
            "fixed on the validation images for a true sensitivity of at least 95 % with 90 % confidence",
            "fixed on the test images (data.validation=test) for a true sensitivity of at least 95 %",
        ),
        (
            answers.report_thresholds,
            {"val_each": (0, 8, 8)},
            None,
            "For GC",
            "No threshold was used: the class with the highest probability is predicted.",
        ),
        (
            answers.report_measures,
            {},
            remove("predictions-val.parquet"),
            "net benefit of calibrated",
            "risk-coverage curves; per image.",
        ),
        (answers.report_measures, {"images_per_group": 2}, None, "; per image.", "per image and per patient (group)."),
        (
            answers.report_uncertainty,
            {"images_per_group": 2},
            None,
            "treating images as independent",
            "allowing for the clustering of images within groups",
        ),
        (
            answers.report_uncertainty,
            {"stages": ("a", "b")},
            None,
            "in the last section.",
            "compared in pairs on the same test images",
        ),
        (
            answers.report_external_test,
            {"config": {"data.test_column": "site_id", "data.test_values": ["A", "B"]}},
            None,
            "No external test: the test images come from the same data set",
            "The test images are those with 2 values of site_id (data.test_column); no image with such a value was used for",
        ),
        (
            answers.report_external_test,
            {},
            give_parts("train", "test"),
            "No external test: the test images",
            "given by the folders. Whether they come from another hospital is for the author to state.",
        ),
        (
            answers.report_external_test,
            {"config": {"data.split_file": "split.csv"}},
            None,
            "No external test: the test images",
            "how that split was made is not documented here.",
        ),
        (
            answers.report_external_test,
            {},
            configure(**{"data.fold": "B", "data.fold_column": "site"}),
            "No external test: the test images",
            "those with one value of site, excluded from training",
        ),
        (answers.report_external_test, {"finished": 0}, None, "No external test: the test images", ""),
        (answers.report_characteristics, {}, add_column("sex", "mf"), "", "by sex: see the subgroup tables."),
        (answers.report_confusion_matrices, {"finished": 0}, None, "See the tables of confusion matrices.", ""),
        (answers.report_accuracy, {"finished": 0}, None, "See the tables", ""),
        (
            answers.report_failures,
            {"confusions": {"s": [[8, 0, 0], [0, 8, 0], [0, 0, 8]]}},
            None,
            "See the worst mistakes in the report.",
            "No test image was misclassified.",
        ),
        (answers.report_fairness, {}, add_column("site_id", "AB"), "", "Subgroups by site_id: see their tables"),
        (
            answers.report_limitations,
            {"config": {"data.validation": "test"}},
            None,
            "evaluated at least once",
            "All figures are optimistic",
        ),
        (
            answers.report_test_images,
            {"config": {"data.fold": 1, "data.folds": 4}},
            None,
            "24 test images: selected at random by image",
            "24 test images: fold 1 of folds 0 to 3",
        ),
        (
            answers.report_class_balance,
            {"config": {"loss.class_weights": "balanced"}},
            None,
            "Training images: GC 30, GU 30, CG 30; the loss does not weight the classes",
            "the loss weights each class inversely to its frequency",
        ),
        (
            answers.report_class_balance,
            {"config": {"loss.name": "logit_adjusted"}},
            None,
            "the loss does not weight the classes",
            "the loss corrects for the frequencies of the classes (loss=logit_adjusted)",
        ),
        (
            answers.report_availability,
            {"finished": 0},
            None,
            "the predictions and the trained model",
            "the software versions and the training curves;",
        ),
    ],
)
def test_a_checklist_answer_follows_from_facts_of_the_run(
    base_evidence, make_run, answer, story, change, base_says, contrary_says
):
    contrary = make_run("contrary", **(BASE | story))
    if answer is answers.report_availability and story.get("finished") == 0:
        write_curves(contrary)
    if change is not None:
        change(contrary)
    first, second = answer(base_evidence), answer(collect_evidence([contrary], FAST))
    assert base_says in first
    assert contrary_says in second
    assert bool(contrary_says) == bool(second)
    assert first != second
    assert "Mustermann" not in second


def write_curves(folder):
    """Curves of a stage that has not predicted anything yet."""
    (folder / "s").mkdir(exist_ok=True)
    (folder / "s" / "metrics.csv").write_text("step,s/val/loss\n1,0.5\n")


def test_every_checklist_answer_has_a_counterexample_run():
    marks = test_a_checklist_answer_follows_from_facts_of_the_run.pytestmark
    tested = {case[0] for mark in marks for case in mark.args[1]} | {answers.report_explainability}
    assert {item.answer for item in ITEMS if item.answer is not None} <= tested


def test_an_older_run_was_split_by_its_seed(make_run):
    run = make_run(**(BASE | {"config": {"seed": 3}}))
    configure(**{"data.split_seed": None})(run)
    assert "selected at random by image, stratified by class (seed 3)" in answers.report_partitions(
        collect_evidence([run], FAST)
    )


def test_values_that_select_the_test_set_are_shown_only_with_names(make_run):
    run = make_run(**(BASE | {"config": {"data.test_column": "site", "data.test_values": ["Köln", "Bonn"]}}))
    named = answers.report_external_test(collect_evidence([run], ReportOptions(resamples=20, names=True)))
    assert "those with 2 values of site (Köln, Bonn)" in named
    assert "Köln" not in answers.report_external_test(collect_evidence([run], FAST))


def test_the_checklist_states_when_names_and_pictures_are_shown(make_run):
    run = make_run(**BASE)
    shown = answers.report_deidentification(
        collect_evidence([run], ReportOptions(resamples=20, names=True, thumbnails=True))
    )
    assert shown.startswith("This report names files and groups (--names) and shows test images (--thumbnails).")


def test_runs_with_equal_answers_share_one_and_others_are_named(make_run):
    stories = ({}, {"config": {"seed": 1}}, {"config": {"seed": 2, "data.on_error": "quarantine"}})
    runs = [make_run(f"run-{number}", **(BASE | story)) for number, story in enumerate(stories)]
    evidence = collect_evidence(runs, FAST)
    said = answers.report_missing_data(evidence)
    by_runs = {len(runs): label for label, runs in evidence.replicates.items()}
    assert said.startswith(f"{by_runs[2]}: Every file could be read")
    assert f"{by_runs[1]}: Unreadable files are excluded" in said


def test_the_blank_for_the_author_stays_beside_the_answer(make_run):
    run = make_run(**BASE)
    add_column("sex", "mf")(run)
    rows = {row.cells[0]: row.cells[-1] for row in build_checklist_table(collect_evidence([run], FAST)).rows}
    assert rows["Bias and fairness"].startswith("Subgroups by sex")
    assert "[author: " in rows["Bias and fairness"]
    assert rows["Robustness"] == "[author: robustness to other endoscopes, sites and image quality]"


def test_a_run_without_a_split_answers_what_it_can(make_run):
    run = make_run(**(BASE | {"finished": 0, "state": "failed"}))
    for name in ("split.csv", "environment.json"):
        (run / name).unlink()
    OmegaConf.save(OmegaConf.create({}), run / "config.yaml")
    table = build_checklist_table(collect_evidence([run], FAST))
    assert not [row for row in table.rows if "None" in row.cells[-1] or "nan" in row.cells[-1]]


@pytest.mark.parametrize(
    ("story", "present", "absent"),
    [
        ({}, "were fitted on the validation images only", "optimistic"),
        (
            {"config": {"data.validation": "test"}},
            "were fitted on the test images themselves",
            "validation images only",
        ),
        ({"val_each": (0, 8, 8)}, "The temperature was fitted on the validation images only", "threshold were fitted"),
        ({"images_per_group": 2}, "At patient level", "compared in pairs on the same test images"),
        ({"stages": ("a", "b")}, "compared in pairs on the same test images", "At patient level"),
        ({"finished": 0}, "This report was computed", "temperature"),
    ],
)
def test_the_methods_section_lists_the_methods_used(make_run, skip_rendering, story, present, absent):
    page = write_report([make_run(**(BASE | story))], options=FAST).read_text()
    methods = page.partition('id="methods"')[2].replace("&#39;", "'")
    assert present in methods
    assert absent not in methods


def test_a_report_validated_on_test_images_never_claims_otherwise(make_run, skip_rendering):
    page = write_report([make_run(**(BASE | {"config": {"data.validation": "test"}}))], options=FAST).read_text()
    for false in ("fitted on the validation images", "validation images only", "on training and validation images"):
        assert false not in page
    assert "a temperature fitted on the test images (data.validation=test)" in page


def test_the_checklist_mentions_only_existing_evaluations_mistakes_and_pairs(make_run, skip_rendering):
    perfect = [[8, 0, 0], [0, 8, 0], [0, 0, 8]]
    page = write_report([make_run(**(BASE | {"confusions": {"s": perfect}}))], options=FAST).read_text()
    assert "classifies all 24 test images correctly" in page
    assert "With --thumbnails, the report includes these images" not in page


@pytest.mark.parametrize(
    ("guideline", "numbers", "parts"),
    [
        ("stard", 40, {15: "abcd", 16: "abc", 17: "ab", 26: "ab", 40: "ab"}),
        ("claim", 44, {}),
        (
            "tripod",
            27,
            {
                3: "abc",
                5: "ab",
                6: "abc",
                8: "abc",
                9: "abc",
                12: "abcdefg",
                18: "abcdef",
                20: "abc",
                23: "ab",
                27: "abc",
            },
        ),
    ],
)
def test_every_number_of_a_guideline_has_an_item(guideline, numbers, parts):
    official = [f"{number}{part}" for number in range(1, numbers + 1) for part in parts.get(number, [""])]
    listed = {number.strip() for item in ITEMS for number in getattr(item, guideline).split(",")} - {""}
    assert listed == set(official)


def test_each_guideline_says_how_far_its_numbers_were_confirmed(base_evidence):
    notes = {each.key: " ".join(build_guideline_table(each, base_evidence).notes) for each in GUIDELINES}
    assert all("not confirmed" in notes[key] for key in ("stard", "claim"))
    assert "look up its number" in notes["quaide"]
    assert "not with the published form" in notes["tripod"]


def test_the_rows_of_a_guideline_are_in_the_order_of_its_numbers(base_evidence):
    tables = {each.key: build_guideline_table(each, base_evidence) for each in GUIDELINES}
    assert [row.cells[0] for row in tables["tripod"].rows][:6] == ["1", "2", "3a", "3b", "3c", "4"]
    assert list(dict.fromkeys(row.cells[0] for row in tables["claim"].rows)) == list(map(str, range(1, 45)))
    domains = [row.cells[0].removesuffix(", statement [author: number]") for row in tables["quaide"].rows]
    assert list(dict.fromkeys(domains)) == list(QUAIDE_DOMAINS)
    assert all(row.cells[2] for table in tables.values() for row in table.rows)
