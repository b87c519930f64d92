"""Columns of a manifest: subgroups, identifying columns, and that no column is dropped silently."""

import numpy as np
import pytest

from pylorus.report.subgroup_columns import RARE_VALUES, build_subgroup_columns, replace_single_patient_values


def column(values, group=None):
    values = np.array(values, dtype=str)
    group = np.arange(len(values)) if group is None else np.array(group)
    (found,) = build_subgroup_columns({"column": values}, group)
    return found


def counts(values, group=None):
    return {each.name: int(each.images.sum()) for each in column(values, group).subgroups}


def test_text_values_form_subgroups_and_missing_values_form_another():
    assert counts(["B", "A", "B", "A", ""]) == {"A": 2, "B": 2, "not stated": 1}


def test_few_distinct_numbers_form_ordered_subgroups():
    assert counts(["10", "9", "10", "9"]) == {"9": 2, "10": 2}


def test_many_numbers_are_divided_at_quartiles_and_no_single_age_is_shown():
    found = counts([str(number) for number in range(20, 120)])
    assert found == {"below 45": 25, "45 to below 70": 25, "70 to below 95": 25, "95 and above": 25}


def test_values_are_in_the_subgroup_that_its_rounded_limits_state():
    values = np.random.default_rng(0).uniform(0, 1, 80)
    for each in column([f"{value:.6f}" for value in values]).subgroups:
        edges = [float(word) for word in each.name.split() if word[0].isdigit()]
        inside = values[each.images]
        assert inside.max() < edges[-1] or "above" in each.name
        assert inside.min() >= edges[0] or each.name.startswith("below")


def test_more_than_twelve_values_are_the_eleven_most_frequent_and_other():
    values = [f"device-{number:02d}" for number in range(15) for _ in range(20 - number)]
    found = counts(values)
    assert list(found) == [f"device-{number:02d}" for number in range(11)] + ["other"]
    assert sum(found.values()) == len(values)
    assert found["other"] == sum(20 - number for number in range(11, 15))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["2023-11-03", "2023-12-24", "2024-02-01", "2024-03-31"], ["2023 Q4", "2024 Q1"]),
        (["20231103", "20231224", "20240201", "20240331"], ["2023 Q4", "2024 Q1"]),
        (["3.11.2023", "24.12.2023", "1.2.2024", "31.3.2024"], ["2023 Q4", "2024 Q1"]),
        (["11/03/2023", "12/24/2023", "02/01/2024", "03/31/2024"], ["2023", "2024"]),
        (
            [f"{year}-{month:02d}-15T08:00" for year in (2019, 2021, 2023) for month in (1, 4, 7, 10)],
            ["2019", "2021", "2023"],
        ),
    ],
)
def test_dates_are_grouped_by_quarter_or_year(values, names):
    found = column(values * 2)
    assert [each.name for each in found.subgroups] == names


def test_dates_over_twelve_years_are_divided_at_quartiles():
    found = counts([f"{year}-05-01" for year in range(2001, 2025) for _ in range(3)])
    assert list(found) == ["below 2007", "2007 to below 2013", "2013 to below 2019", "2019 and above"]


@pytest.mark.parametrize("name", ["site_id", "patient_site", "case_mix", "endoscope name", "id"])
def test_the_name_of_a_column_does_not_matter(name):
    (found,) = build_subgroup_columns({name: np.array(["A", "B"] * 4)}, np.arange(8))
    assert [each.name for each in found.subgroups] == ["A", "B"]


FAMILY_NAMES = ["Weber", "Wagner", "Becker", "Hoffmann", "Richter", "Klein", "Wolf", "Zimmermann"]
RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([f"Patient{number}" for number in range(40)], "value of their own"),
        ([f"remark {number} on this case" for number in range(40)], "value of their own"),
        (FAMILY_NAMES * 8, "personal names"),
        (["Erika Mustermann", "Max Mustermann"] * 20, "personal names"),
        (["Zoltan Kovacs", "Milena Horvat", "Bela Nagy"] * 10, "personal names"),
        (["KOVACS^ZOLTAN", "HORVAT^MILENA"] * 10, "personal names"),
        (["Dr. Kovacs", "Dr. Horvat"] * 10, "personal names"),
        (["王小明", "李伟", "张丽"] * 10, "personal names"),
        ([f"{number}" for number in RANDOM.integers(100_000, 999_999, 40)], "patient or case numbers"),
        ([f"MRN-{number}" for number in range(10_000, 10_040) for _ in range(2)], "patient or case numbers"),
        ([f"{number:08d}" for number in range(40)], "patient or case numbers"),
        (["erika@example.org", "max@example.org"] * 20, "e-mail addresses"),
        ([f"+49 30 1234{number % 3}" for number in range(40)], "telephone numbers"),
        ([f"{year}-04-01" for year in range(1935, 2000)], "dates of birth"),
        ([f"{a}{b}" for a in "ABCDEFGH" for b in "KLM"] * 2, "initials"),
    ],
)
def test_identifying_columns_are_refused_by_content_and_never_quoted(values, reason):
    found = column(values)
    assert found.subgroups == ()
    assert reason in found.reason
    assert not [value for value in values if value in found.reason]


@pytest.mark.parametrize(
    "values",
    [
        ["Olympus Exera", "Fujifilm Eluxeo", "Pentax Optivista"],
        ["Upper Body", "Lower Body", "Antrum"],
        ["male", "female"],
        ["klein", "mittel", "groß"],
        ["Charité Hospital", "Peking Hospital"],
        ["GIF-H190", "GIF-HQ290"],
        ["GC", "GU", "CG"],
        ["北京医院", "上海医院"],
        ["1", "2", "3"],
        ["01", "02", "03"],
    ],
)
def test_devices_sites_and_findings_are_not_taken_as_names(values):
    assert [each.name for each in column(values * 10).subgroups] == sorted(values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([""] * 3, "no test image has a value"),
        (["A"] * 5, "all test images have the same value"),
        (["A", "A", ""], "only one value is given"),
        (["a", "b", "c"], "hardly any of its values are shared by two patients"),
        (["2024-01-03", "2024-02-03", "2024-03-03"], "all its values fall into one subgroup"),
    ],
)
def test_a_column_without_subgroups_has_a_reason(values, reason):
    assert column(values).reason == reason


def test_the_column_that_selected_the_test_set_is_marked():
    (found,) = build_subgroup_columns({"site": np.array(["C"] * 4)}, np.arange(4), test_column="site")
    assert found.reason == "all test images have the same value; it defines the test images"


def test_values_that_only_one_patient_has_are_not_shown():
    values = np.array(["Miller", "Miller", "A", "A", "Meyer", ""])
    group = np.array(["1", "1", "2", "3", "4", "5"])
    assert replace_single_patient_values(values, group).tolist() == [
        RARE_VALUES,
        RARE_VALUES,
        "A",
        "A",
        RARE_VALUES,
        "",
    ]


def test_a_year_with_a_single_patient_is_not_shown():
    found = counts(["2019-01-01", "2021-01-01", "2021-06-01", "2023-01-01", "2023-02-01"], ["a", "b", "c", "d", "e"])
    assert found == {"2023 Q1": 2, RARE_VALUES: 3}
