"""A sweep's table ranks only configurations with the same test images against each other."""

import numpy as np
import pytest

from pylorus.launch.sweep_table import (
    build_sweep_table,
    collect_problems,
    format_sweep_table,
    summarize_configurations,
    write_sweep_table,
)
from tests.report.conftest import Story, write_story

GOOD, FAIR, POOR = ([[20 - wrong, wrong, 0], [0, 20, 0], [0, 0, 20]] for wrong in (0, 6, 15))


@pytest.fixture
def sweep(tmp_path):
    def write(*stories):
        for number, story in enumerate(stories):
            write_story(tmp_path / str(number), Story(stages=("s",), curves=False, network=False, **story))
        return build_sweep_table(tmp_path)

    return write


def seeds(model, confusions, skill):
    return [
        {"model": model, "confusions": {"s": each}, "seed": seed, "skill": skill, "config": {"seed": seed}}
        for seed, each in enumerate(confusions)
    ]


def test_seeds_are_summarized_with_mean_deviation_and_range(sweep):
    table = sweep(*seeds("resnet50", [GOOD, FAIR, POOR], 1.0), *seeds("vgg19", [FAIR] * 3, 5.0))
    found = summarize_configurations(table)
    assert found["model"].tolist() == ["vgg19", "resnet50"]  # by validation accuracy
    row = found.iloc[1]
    shares = table.loc[table["model"] == "resnet50", "test accuracy"]
    assert row["runs"] == 3
    assert row["test mean"] == pytest.approx(shares.mean())
    assert row["test SD"] == pytest.approx(shares.std())
    assert (row["test lowest"], row["test highest"]) == (shares.min(), shares.max())
    text = format_sweep_table(table)
    assert "averaged over a configuration's runs, best first" in text
    assert f"{100 * shares.mean():.1f} ± {100 * shares.std():.1f}" in text


def test_jobs_of_a_configuration_are_listed_together(sweep):
    table = sweep(*seeds("resnet50", [FAIR] * 2, 1.0), *seeds("vgg19", [FAIR] * 2, 1.1))
    assert table["configuration"].tolist() == [1, 1, 2, 2]


def test_runs_with_other_test_images_are_not_ranked_against_each_other(sweep):
    table = sweep(
        {"model": "resnet50", "skill": 0.5},
        {"model": "vgg19", "skill": 6.0, "split_seed": 1},
        {"model": "inception_v3", "skill": 3.0},
    )
    assert table["test set"].tolist() == [1, 1, 2]
    assert table["model"].tolist() == ["inception_v3", "resnet50", "vgg19"]
    text = format_sweep_table(table)
    assert text.count("not to be ranked against the other test sets") == 2
    assert text.index("Test set 1 of 2") < text.index("resnet50") < text.index("Test set 2 of 2")


def test_folds_are_one_configuration_of_several_parts(sweep):
    table = sweep(
        *(
            {"model": model, "split_seed": fold, "seed": fold, "config": {"data.fold": fold}}
            for model in ("resnet50", "vgg19")
            for fold in range(3)
        )
    )
    assert set(table["test set"]) == {1}
    assert summarize_configurations(table)["runs"].tolist() == [3, 3]
    assert "in 3 subsets (folds or splits)" in format_sweep_table(table)


def test_jobs_without_test_predictions_are_last_and_not_in_the_mean(sweep):
    failed = {"model": "resnet50", "finished": 0, "state": "failed", "config": {"seed": 9}}
    table = sweep(failed, *seeds("resnet50", [FAIR] * 2, 1.0))
    assert table["state"].tolist() == ["finished", "finished", "failed"]
    assert np.isnan(table["val accuracy"].iloc[-1])
    assert summarize_configurations(table)["runs"].tolist() == [2]
    assert "Jobs without test predictions:" in format_sweep_table(table)


def test_the_same_seed_on_the_same_split_counts_once(sweep):
    story = {"model": "resnet50", "confusions": {"s": POOR}, "config": {"seed": 0}}
    table = sweep(story, {**story, "config": {"seed": 0, "data.workers": 2}}, *seeds("resnet50", [GOOD, FAIR], 1.0)[1:])
    (row,) = summarize_configurations(table).to_dict("records")
    assert row["runs"] == 2
    assert row["test lowest"] == pytest.approx(0.75)


def test_single_runs_are_one_table_under_one_line(sweep):
    table = sweep({"model": "resnet50"}, {"model": "vgg19", "skill": 5.0})
    head, _, body = format_sweep_table(table).partition("\n\n")
    assert head == "The same test images. Ordered by the validation accuracy of the shipped stage, best first."
    assert len(body.splitlines()) == len(table) + 2


def test_a_degenerate_job_is_named_below_the_table(sweep, tmp_path):
    one_class = [[0, 20, 0]] * 3
    table = sweep(
        {"model": "resnet50", "confusions": {"s": GOOD}, "skill": 6.0},
        {"model": "vgg19", "confusions": {"s": one_class}, "skill": 0.1},
    )
    problems = collect_problems(tmp_path, table)
    assert problems[0] == "Job 1: The model predicts GU for every test image."
    assert all(sentence.startswith("Job 1: ") for sentence in problems)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["status.json", "config.yaml", "s/predictions-test.parquet"])
def test_a_damaged_job_is_named_and_the_others_are_reported(sweep, tmp_path, capsys, damaged):
    sweep(*seeds("resnet50", [GOOD, FAIR, POOR], 1.0))
    (tmp_path / "1" / damaged).write_text('{"state": [')
    assert write_sweep_table(tmp_path) == 1
    printed = capsys.readouterr().out
    assert f"job 1 damaged: {tmp_path / '1' / damaged}" in printed
    assert "| 1   | –" in printed
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Job 1 has a damaged file and is left out" in page


def test_a_narrow_terminal_gets_a_short_table(sweep, tmp_path, capsys, monkeypatch):
    table = sweep({"model": "resnet50"}, {"model": "vgg19", "skill": 5.0})
    short = format_sweep_table(table, is_short=True)
    header = next(line for line in short.splitlines() if line.startswith("|"))
    assert {"job", "stage", "val accuracy", "test accuracy"} <= {cell.strip() for cell in header.split("|")}
    assert "duration" not in short
    assert "precision" not in short
    assert len(short.splitlines()) == len(format_sweep_table(table).splitlines())
    monkeypatch.setattr("pylorus.launch.sweep_table.write_report", lambda *_, **__: "report.html")
    for is_terminal, columns in ((True, "60"), (True, "400"), (False, "60")):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        write_sweep_table(tmp_path)
        printed = capsys.readouterr().out
        assert ("duration" not in printed) == (is_terminal and columns == "60")
        assert (f"All columns: {tmp_path / 'sweep.md'}" in printed) == (is_terminal and columns == "60")
        assert "duration" in (tmp_path / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("stories", "line"),
    [
        (
            [{"model": "vgg19", "skill": 0.1}, {"model": "resnet50", "skill": 6.0}],
            "best: job 1, stage s (highest validat",
        ),
        ([{"model": "vgg19"}, {"model": "resnet50"}], "; job 1 has the same)"),
        (seeds("resnet50", [GOOD, FAIR], 1.0), None),  # each replicate ships its own model
    ],
)
def test_the_best_job_is_named_with_the_commands_that_come_next(sweep, tmp_path, capsys, monkeypatch, stories, line):
    sweep(*stories)
    monkeypatch.setattr("pylorus.launch.sweep_table.write_report", lambda *_, **__: "report.html")
    write_sweep_table(tmp_path)
    printed = capsys.readouterr().out
    assert ("next: pylorus predict" in printed) == (line is not None)
    assert line is None or line in printed
