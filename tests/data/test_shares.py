"""Sentences about a split: which share was asked, which it holds, and why."""

import pandas as pd

from pylorus.data.stratification import explain_split, get_requested_fractions

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


def test_a_split_that_holds_its_shares_and_enough_patients_is_not_warned_of():
    table = rows(*even("a", 100), *even("b", 100))
    assert explain_split(table, {"test": 0.2, "val": 0.1}, grouped=True) == ()


def test_a_part_with_one_large_patient_is_named_with_class_shares_and_reason():
    table = rows(*even("a", 100), ("a", "test", 100), *even("b", 100))
    (said,) = explain_split(table, {"test": 0.2, "val": 0.1}, grouped=True)
    assert said == (
        "The test set should contain 20 % of the images of each class but contains "
        '46.7 % of "a" (one patient has 33.3 % of them); 36.0 % of all classes together.'
    )


def test_a_patient_too_large_to_be_drawn_is_the_reason_for_a_small_share():
    table = rows(*even("a", 100), ("a", "train", 500), *even("b", 100))
    test, val = explain_split(table, {"test": 0.2, "val": 0.1}, grouped=True)
    assert '5.7 % of "a" (one patient has 71.4 % of them, too many to be drawn)' in test
    assert "The validation set should contain 10 % of the images of each class outside the test set" in val
    assert '"b"' not in test + val


def test_each_part_needs_an_image_of_a_rare_class():
    table = rows(*even("a", 100, 1), *[("rare", part, 1) for part in ("train", "val", "test")])
    test, val, few = explain_split(table, {"test": 0.2, "val": 0.1}, grouped=False)
    assert '33.3 % of "rare" (each split needs at least one of its 3 images)' in test
    assert '50.0 % of "rare" (each split needs at least one of its 2 remaining images)' in val
    assert '"rare" 1 in training, 1 in validation and 1 in test' in few


def test_copies_and_groups_of_several_classes_are_reasons():
    table = rows(*[("a", "test", 1)] * 30, *[("a", "train", 1)] * 70, *even("b", 100))
    (said,) = (s for s in explain_split(table, {"test": 0.2}, grouped=True, joined=12) if "20 %" in s)
    assert '30.0 % of "a" (copies of images link 12 patients of the set to others)' in said
    mixed = pd.concat([table, table[table["group"].isin(["g0", "g50"])].assign(**{"class": "b"})])
    (said,) = (s for s in explain_split(mixed, {"test": 0.2}, grouped=True) if "20 %" in s)
    assert "2 of its 100 patients have images of other classes too and can't be divided" in said


def test_a_share_that_sizes_do_not_explain_is_not_explained_by_them():
    table = rows(*[("a", "test", 1)] * 70, *[("a", "train", 1)] * 130, *even("b", 100))
    (said,) = (s for s in explain_split(table, {"test": 0.2}, grouped=False) if "20 %" in s)
    assert '35.0 % of "a" (the sizes of its images do not explain this; a new draw would come closer)' in said


def test_few_patients_are_told_where_no_share_was_asked():
    table = rows(
        *[("a", part, 3) for part in ("train", "test")] * 4, *[("b", part, 1) for part in ("train", "test")] * 9
    )
    assert explain_split(table, {}, grouped=True) == (
        'Fewer than 5 patients of a class in a split: "a" 4 in training and 4 in test. Single patients determine what '
        "is learned or measured there.",
    )


def test_a_share_is_asked_only_of_parts_that_are_drawn():
    def asked(*given, chosen=False, fixed=False, **changed):
        return get_requested_fractions(given=given, chosen=chosen, fixed=fixed, **(ASKED | changed))

    assert asked() == {"test": 0.2, "val": 0.1}
    assert asked("train", "test") == {"val": 0.1}
    assert asked("train", "val", "test") == {}
    assert asked(chosen=True) == {"val": 0.1}
    assert asked("train", "val", "test", chosen=True) == {"val": 0.1}
    assert asked(fixed=True) == {}
    assert asked(validation="test") == {"test": 0.2}
