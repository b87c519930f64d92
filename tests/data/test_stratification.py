"""Splits and folds: every patient has the same probability, every class its fraction, and deviations are reported."""

import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from pylorus.data import draw_part
from pylorus.data.stratification import explain_split, get_requested_fractions, stratified_folds

SHARE = 0.15


def patients_of(sizes, classes=3):
    """Labels and groups of patients with so many images each, class after class in turn."""
    patient = np.repeat(np.arange(len(sizes)), sizes)
    return patient % classes, np.array([f"patient {number:04d}" for number in patient])


def draw_often(sizes, draws, classes=3):
    """Which patient is tested in which draw, of shape (draws, patients), and the share of each class's images."""
    labels, groups = patients_of(sizes, classes)
    first = np.append(0, np.cumsum(sizes)[:-1])
    parts = np.array([draw_part(labels, groups, share=SHARE, later=SHARE, seed=seed) for seed in range(draws)])
    shares = np.array([parts[:, labels == label].mean(axis=1) for label in range(classes)]).T
    return parts[:, first], shares


@pytest.fixture(scope="module")
def skewed_groups():
    """120 patients of 1 to 30 images in 200 draws."""
    sizes = np.random.default_rng(8).integers(1, 31, 120)
    return sizes, *draw_often(sizes, 200)


def test_the_largest_patient_is_tested_as_often_as_requested(skewed_groups):
    sizes, drawn, _ = skewed_groups
    assert drawn[:, sizes.argmax()].mean() == pytest.approx(SHARE, abs=0.05)


def test_small_and_large_patients_have_equal_probability(skewed_groups):
    sizes, drawn, _ = skewed_groups
    for fifth in np.array_split(sizes.argsort(), 5):
        assert drawn[:, fifth].mean() == pytest.approx(SHARE, abs=0.015)


def test_patient_sizes_are_equal_inside_and_outside_the_split(skewed_groups):
    sizes, drawn, _ = skewed_groups
    inside = np.mean([sizes[row].mean() for row in drawn])
    assert inside == pytest.approx(sizes.mean(), rel=0.03)


def test_each_class_gets_its_fraction_of_images_in_every_split(skewed_groups):
    *_, shares = skewed_groups
    assert np.abs(shares - SHARE).max() < 0.01


def test_a_patient_larger_than_the_split_stays_in_training():
    sizes = np.random.default_rng(1).integers(1, 10, 60)
    sizes[0] = sizes[1:].sum() * 2 // 3  # 40 % of all images
    drawn, shares = draw_often(sizes, 60)
    assert not drawn[:, 0].any()
    assert np.abs(shares - SHARE).max() < 0.02


def test_a_large_patient_may_exceed_the_fraction_of_its_class():
    sizes = np.random.default_rng(1).integers(1, 10, 100)
    sizes[0] = sizes[1:].sum() // 9  # 10 % of all images, a quarter of its class
    drawn, shares = draw_often(sizes, 200)
    assert drawn[:, 0].mean() == pytest.approx(SHARE, abs=0.05)
    without = shares[~drawn[:, 0]]
    assert np.abs(without - SHARE).max() < 0.02


def test_a_rare_class_has_an_image_in_each_split_and_changes_no_other_fraction():
    labels = np.repeat([0, 1, 2], [200, 200, 3])
    groups = np.array([f"image {number}" for number in range(403)])
    for seed in range(20):
        test = draw_part(labels, groups, share=SHARE, later=SHARE, seed=seed)
        rest = np.flatnonzero(~test)
        val = rest[draw_part(labels[rest], groups[rest], share=SHARE, seed=seed)]
        assert np.bincount(labels[test]).tolist() == [30, 30, 1]
        counts = np.bincount(labels[val])
        assert counts[2] == 1
        assert set(counts[:2]) <= {25, 26}


def test_a_group_with_images_of_several_classes_stays_whole_and_classes_get_their_shares():
    rng = np.random.default_rng(0)
    sizes, mixtures = rng.integers(20, 200, 80), rng.dirichlet(np.ones(6) * 2, 80)
    labels = np.concatenate([rng.choice(6, size, p=mixture) for size, mixture in zip(sizes, mixtures, strict=True)])
    groups = np.repeat([f"smear {number:02d}" for number in range(80)], sizes)
    for seed in range(20):
        part = draw_part(labels, groups, share=SHARE, later=SHARE, seed=seed)
        assert not set(groups[part]) & set(groups[~part])
        shares = np.array([part[labels == label].mean() for label in range(6)])
        assert np.abs(shares - SHARE).max() < 0.02


def test_neither_the_order_of_images_nor_the_numbers_of_classes_matter():
    sizes = np.random.default_rng(5).integers(1, 20, 50)
    labels, groups = patients_of(sizes)
    part = draw_part(labels, groups, share=SHARE, seed=3)
    order = np.random.default_rng(6).permutation(len(labels))
    assert np.array_equal(draw_part(labels[order], groups[order], share=SHARE, seed=3), part[order])
    assert np.array_equal(draw_part(np.array([2, 0, 1])[labels], groups, share=SHARE, seed=3), part)
    assert not np.array_equal(draw_part(labels, groups, share=SHARE, seed=4), part)


@pytest.mark.parametrize("trial", range(40))
def test_each_class_is_inside_and_outside_with_few_patients(trial):
    rng = np.random.default_rng(trial)
    classes = int(rng.integers(2, 6))
    labels, groups = patients_of(rng.geometric(rng.uniform(0.05, 1), int(rng.integers(3 * classes, 40))), classes)
    later = float(rng.choice([0, 0.2]))
    part = draw_part(labels, groups, share=float(rng.choice([0.05, 0.2, 0.5])), later=later, seed=trial)
    for label in range(classes):
        assert part[labels == label].any()
        assert len(set(groups[~part & (labels == label)])) >= (2 if later else 1)


def test_too_few_groups_of_a_class_are_refused():
    with pytest.raises(ValueError, match="a class has 2 groups, expected at least 3"):
        draw_part(np.array([0, 0, 0, 1, 1]), np.array(list("abcde")), share=0.2, later=0.2, seed=0)


@pytest.mark.slow
def test_pylorus_data_exports_split_functions_without_importing_numpy():
    program = (
        "import sys, pylorus.data; assert 'numpy' not in sys.modules; "
        "from pylorus.data import draw_part, stratified_folds; print(stratified_folds.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "stratified_folds"


@pytest.mark.parametrize("trial", range(30))
def test_folds_are_those_of_scikit_learn(trial):
    rng = np.random.default_rng(trial)
    classes, patients, folds = (int(rng.integers(*span)) for span in ((2, 8), (25, 150), (2, 21)))
    rows = int(rng.integers(patients, 4 * patients))
    labels = rng.choice(classes, size=rows, p=rng.dirichlet(np.ones(classes) * 4))
    names = rng.integers(0, patients, rows) if trial % 3 else np.arange(rows)
    groups = np.array([f"patient {name}" for name in names])
    theirs = np.empty(rows, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cutter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=trial)
        for number, (_, held_out) in enumerate(cutter.split(labels, labels, groups)):
            theirs[held_out] = number
    assert np.array_equal(stratified_folds(labels, groups, folds=folds, seed=trial), theirs)


ASKED = {"validation": "cut", "test_fraction": 0.2, "val_fraction": 0.1}


def rows(*groups):
    """A table of groups, each a class, a part and how many images."""
    return pd.DataFrame(
        [
            {"class": name, "group": f"g{number}", "split": part}
            for number, (name, part, images) in enumerate(groups)
            for _ in range(images)
        ]
    )


def even(name, patients=50, images=2):
    """A class that holds its shares: a fifth tested, and a tenth of the rest validated on."""
    parts = ["test"] * (patients // 5) + ["val"] * (patients * 4 // 50)
    return [(name, part, images) for part in [*parts, *["train"] * (patients - len(parts))]]


def test_a_split_with_its_fractions_and_enough_patients_has_no_warning():
    table = rows(*even("a", 100), *even("b", 100))
    assert explain_split(table, {"test": 0.2, "val": 0.1}, grouped=True) == ()


def test_a_split_with_one_large_patient_is_reported_with_the_reason():
    table = rows(*even("a", 100), ("a", "test", 100), *even("b", 100))
    (said,) = explain_split(table, {"test": 0.2, "val": 0.1}, grouped=True)
    assert said == (
        "The test set should contain 20 % of the images of each class but contains "
        '46.7 % of "a" (one patient has 33.3 % of them); 36.0 % of all classes together.'
    )


def test_a_patient_too_large_to_draw_explains_a_small_fraction():
    table = rows(*even("a", 100), ("a", "train", 500), *even("b", 100))
    test, val = explain_split(table, {"test": 0.2, "val": 0.1}, grouped=True)
    assert '5.7 % of "a" (one patient has 71.4 % of them, too many to be drawn)' in test
    assert "The validation set should contain 10 % of the images of each class outside the test set" in val
    assert '"b"' not in test + val


def test_a_rare_class_explains_a_large_fraction():
    table = rows(*even("a", 100, 1), *[("rare", part, 1) for part in ("train", "val", "test")])
    test, val, few = explain_split(table, {"test": 0.2, "val": 0.1}, grouped=False)
    assert '33.3 % of "rare" (each split needs at least one of its 3 images)' in test
    assert '50.0 % of "rare" (each split needs at least one of its 2 remaining images)' in val
    assert '"rare" 1 in training, 1 in validation and 1 in test' in few


def test_what_holds_for_several_classes_is_said_once():
    table = rows(*[(name, part, 1) for name in "abc" for part in ("train", "val", "test")], *even("d", 100))
    test, _, few = explain_split(table, {"test": 0.2, "val": 0.1}, grouped=True)
    assert test.count('33.3 % of each of "a", "b" and "c" (each split needs at least one of its 3 patients);') == 1
    assert 'in a split: each of "a", "b" and "c" 1 in training, 1 in validation and 1 in test.' in few
    test, _, few = explain_split(table[table["class"] != "d"], {"test": 0.2, "val": 0.1}, grouped=True)
    assert test.endswith("33.3 % of each class (each split needs at least one of its 3 patients).")
    assert "in a split: each class 1 in training" in few


def test_copies_and_mixed_groups_explain_deviations():
    table = rows(*[("a", "test", 1)] * 30, *[("a", "train", 1)] * 70, *even("b", 100))
    (said,) = (s for s in explain_split(table, {"test": 0.2}, grouped=True, joined=12) if "20 %" in s)
    assert '30.0 % of "a" (copies of images link 12 patients of the set to others)' in said
    mixed = pd.concat([table, table[table["group"].isin(["g0", "g50"])].assign(**{"class": "b"})])
    (said,) = (s for s in explain_split(mixed, {"test": 0.2}, grouped=True) if "20 %" in s)
    assert "2 of its 100 patients have images of other classes too and can't be divided" in said


def test_an_unexplained_deviation_gets_no_false_reason():
    table = rows(*[("a", "test", 1)] * 70, *[("a", "train", 1)] * 130, *even("b", 100))
    (said,) = (s for s in explain_split(table, {"test": 0.2}, grouped=False) if "20 %" in s)
    assert '35.0 % of "a" (the sizes of its images do not explain this; a new draw would come closer)' in said


def test_few_patients_are_reported_for_a_given_split():
    table = rows(
        *[("a", part, 3) for part in ("train", "test")] * 4, *[("b", part, 1) for part in ("train", "test")] * 9
    )
    assert explain_split(table, {}, grouped=True) == (
        'Fewer than 5 patients of a class in a split: "a" 4 in training and 4 in test. Single patients determine what '
        "is learned or measured there.",
    )


def test_fractions_are_requested_only_for_drawn_splits():
    def asked(*given, chosen=False, fixed=False, **changed):
        return get_requested_fractions(given=given, chosen=chosen, fixed=fixed, **(ASKED | changed))

    assert asked() == {"test": 0.2, "val": 0.1}
    assert asked("train", "test") == {"val": 0.1}
    assert asked("train", "val", "test") == {}
    assert asked(chosen=True) == {"val": 0.1}
    assert asked("train", "val", "test", chosen=True) == {"val": 0.1}
    assert asked(fixed=True) == {}
    assert asked(validation="test") == {"test": 0.2}
