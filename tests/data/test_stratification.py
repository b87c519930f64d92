"""A part drawn by chance: each patient the same chance, each class its share, whatever the sizes."""

import subprocess
import sys

import numpy as np
import pytest

from pylorus.data import draw_part

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
def skewed():
    """120 patients of 1 to 30 images in 200 draws."""
    sizes = np.random.default_rng(8).integers(1, 31, 120)
    return sizes, *draw_often(sizes, 200)


def test_the_largest_patient_is_tested_as_often_as_its_share_says(skewed):
    sizes, drawn, _ = skewed
    assert drawn[:, sizes.argmax()].mean() == pytest.approx(SHARE, abs=0.05)


def test_small_and_large_patients_have_the_same_chance(skewed):
    sizes, drawn, _ = skewed
    for fifth in np.array_split(sizes.argsort(), 5):
        assert drawn[:, fifth].mean() == pytest.approx(SHARE, abs=0.015)


def test_patients_have_as_many_images_in_the_part_as_outside_it(skewed):
    sizes, drawn, _ = skewed
    inside = np.mean([sizes[row].mean() for row in drawn])
    assert inside == pytest.approx(sizes.mean(), rel=0.03)


def test_each_class_gets_its_share_of_images_in_every_draw(skewed):
    *_, shares = skewed
    assert np.abs(shares - SHARE).max() < 0.01


def test_a_patient_larger_than_the_part_stays_out_and_the_others_fill_it():
    sizes = np.random.default_rng(1).integers(1, 10, 60)
    sizes[0] = sizes[1:].sum() * 2 // 3  # 40 % of all images
    drawn, shares = draw_often(sizes, 60)
    assert not drawn[:, 0].any()
    assert np.abs(shares - SHARE).max() < 0.02


def test_a_patient_smaller_than_the_part_is_drawn_although_its_class_then_has_more_than_its_share():
    sizes = np.random.default_rng(1).integers(1, 10, 100)
    sizes[0] = sizes[1:].sum() // 9  # 10 % of all images, a quarter of its class
    drawn, shares = draw_often(sizes, 200)
    assert drawn[:, 0].mean() == pytest.approx(SHARE, abs=0.05)
    without = shares[~drawn[:, 0]]
    assert np.abs(without - SHARE).max() < 0.02


def test_a_rare_class_leaves_one_image_to_each_part_and_the_others_their_shares():
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
def test_however_few_patients_each_class_is_inside_and_outside(trial):
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


def test_the_package_gives_its_cuts_without_importing_numpy_before_they_are_asked_for():
    program = (
        "import sys, pylorus.data; assert 'numpy' not in sys.modules; "
        "from pylorus.data import draw_part, stratified_folds; print(stratified_folds.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "stratified_folds"
