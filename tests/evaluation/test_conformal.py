import numpy as np
import pytest

from pylorus.evaluation.decisions import count_patients_needed_for_sets, fit_set_limits, prediction_sets


def simulate(generator, patients, *, images=(1, 1), skill=1.5):
    """Probabilities, true classes and patients; images of a patient share class and difficulty."""
    counts = generator.integers(images[0], images[1] + 1, patients)
    groups = np.repeat(np.arange(patients), counts)
    true = generator.integers(0, 3, patients)[groups]
    logits = generator.standard_normal((len(groups), 3))
    logits[np.arange(len(groups)), true] += skill + generator.standard_normal(patients)[groups]
    chance = np.exp(logits)
    return chance / chance.sum(axis=1, keepdims=True), true, groups


class Answers:
    """A fitted classifier, as MAPIE asks for one, whose input is what it answers."""

    def __init__(self, classes):
        self.classes_ = np.arange(classes)

    def __sklearn_is_fitted__(self):
        return True

    def fit(self, features, labels):
        return self

    def predict(self, features):
        return np.argmax(features, axis=1)

    def predict_proba(self, features):
        return np.asarray(features)


@pytest.mark.filterwarnings("ignore:WARNING. your conformalization dataset has less labels")
@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_with_one_image_a_patient_limits_and_sets_are_those_of_mapie_apart_for_each_class(coverage):
    from mapie.classification import SplitConformalClassifier

    generator = np.random.default_rng(5)
    table, true, _ = simulate(generator, 200)
    new, *_ = simulate(generator, 300)
    limits = fit_set_limits(table, true, coverage=coverage)
    ours = prediction_sets(new, limits)
    for label in range(3):
        theirs = SplitConformalClassifier(
            Answers(3), confidence_level=coverage, conformity_score="lac", prefit=True, random_state=0
        )
        theirs.conformalize(table[true == label], true[true == label])
        for images, members in ((new, ours), (table, prediction_sets(table, limits))):
            _, sets = theirs.predict_set(images)
            assert (members[:, label] == sets[:, label, 0]).all()
        # Of the calibrated images themselves, the last one in the set has the quantile.
        assert limits.lowest[label] == table[(true == label) & sets[:, label, 0], label].min()


def test_the_limit_is_the_probability_of_rank_n_plus_1_times_coverage():
    chance = np.arange(1, 20) / 20
    table = np.stack([chance, 1 - chance], axis=1)
    limits = fit_set_limits(table, np.zeros(19, dtype=int), coverage=0.9)
    assert limits.lowest[0] == chance[::-1][18 - 1]  # 0.9 * (19 + 1) = 18
    assert limits.patients == (19, 0)


def test_a_class_of_too_few_patients_is_in_every_set():
    generator = np.random.default_rng(0)
    table, true, _ = simulate(generator, 40)
    few = np.concatenate([np.flatnonzero(true == label)[:n] for label, n in ((0, 8), (1, 9), (2, 0))])
    limits = fit_set_limits(table[few], true[few], coverage=0.9)
    assert count_patients_needed_for_sets(0.9) == 9
    assert limits.lowest[0] is None
    assert limits.lowest[1] == table[few][true[few] == 1, 1].min()
    assert limits.lowest[2] is None
    members = prediction_sets(np.eye(3), limits)
    assert members[:, [0, 2]].all()


def test_eight_patients_are_too_few_for_any_number_of_images():
    table, true, groups = simulate(np.random.default_rng(1), 8, images=(20, 20))
    assert fit_set_limits(table, np.zeros_like(true), groups, coverage=0.9).lowest[0] is None
    assert fit_set_limits(table, np.zeros_like(true), coverage=0.9).lowest[0] is not None


def test_copies_of_images_do_not_change_the_limits():
    table, true, groups = simulate(np.random.default_rng(2), 100)
    times = np.random.default_rng(3).integers(1, 9, len(true))
    expected = fit_set_limits(table, true, groups, coverage=0.9)
    assert fit_set_limits(*(np.repeat(each, times, axis=0) for each in (table, true, groups)), coverage=0.9) == expected


def test_each_class_is_covered_in_images_of_new_patients():
    generator = np.random.default_rng(4)
    covered, sizes = [], []
    for _ in range(300):
        table, true, groups = simulate(generator, 75, images=(1, 12))
        limits = fit_set_limits(table, true, groups, coverage=0.9)
        new, label, _ = simulate(generator, 300)
        members = prediction_sets(new, limits)
        covered.append([members[label == each, each].mean() for each in range(3)])
        sizes.append(members.sum(axis=1).mean())
    for share in np.mean(covered, axis=0):
        assert 0.9 - 0.01 <= share <= 0.96
    assert np.mean(sizes) < 2.6


@pytest.mark.parametrize("coverage", [0, 1, 90, float("nan")])
def test_a_coverage_outside_0_and_1_is_refused(coverage):
    with pytest.raises(ValueError, match="coverage is"):
        fit_set_limits(np.array([[0.5, 0.5]]), np.array([0]), coverage=coverage)


def test_probabilities_of_other_classes_are_refused():
    limits = fit_set_limits(np.array([[0.5, 0.5]]), np.array([0]), coverage=0.9)
    with pytest.raises(ValueError, match=r"expected \(n, 2\)"):
        prediction_sets(np.ones((4, 3)) / 3, limits)
