"""`pylorus monitor` compares what a model answers in use with its answers on the test images."""

import hashlib
import json
import re
from functools import partial

import cv2
import numpy as np
import pandas as pd
import pytest

from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.data.input_format import measure_quality
from pylorus.deploy.bundle_files import read_description
from pylorus.deploy.monitor import MonitorOptions, monitor

NAMES = ("GC", "GU", "CG")


@pytest.fixture
def draw_predictions(bundle_folder, tmp_path):
    """Draw a file as `pylorus predict` writes it, with the bundle's hash beside it."""

    def draw(name, *, seed, images=240, most=(0.4, 0.3, 0.3), redness=0.4, bundle=None):
        chance = np.random.default_rng(seed)
        logits = chance.normal(size=(images, 3))
        logits[np.arange(images), chance.choice(3, size=images, p=most)] += 3
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        table = pd.DataFrame({"path": [f"2026-0{1 + row * 4 // images}-05/p{row}.png" for row in range(images)]})
        table["predicted"] = np.array(NAMES)[probabilities.argmax(axis=1)]
        for column, short in enumerate(NAMES):
            table[f"probability/{short}"] = probabilities[:, column]
        table["unlikeness"] = chance.uniform(0.1, 0.2, images)
        for column, mean in (("brightness", 0.5), ("redness", redness), ("sharpness", 0.5), ("field", 0.8)):
            table[column] = chance.normal(mean, 0.03, images)
        table["error"] = ""
        table["taken"] = [path[:10] for path in table["path"]]
        path = tmp_path / name
        table.to_csv(path, index=False)
        sums = hashlib.sha256(((bundle or bundle_folder) / "SHA256SUMS").read_bytes()).hexdigest()
        (tmp_path / f"{name}.about.json").write_text(json.dumps({"request": {"bundle": {"SHA256SUMS": sums}}}))
        return path

    return draw


def run(bundle, *words):
    with pytest.raises(SystemExit) as ended:
        main(["monitor", str(bundle), *map(str, words)])
    return ended.value.code


def test_the_bundle_records_what_it_answers_on_the_test_images_without_naming_any(bundle_folder, trained_run):
    content = (bundle_folder / "model.json").read_bytes()
    reference = read_description(content).reference
    table = pd.read_parquet(trained_run.get_predictions_path(trained_run.shipped.name, "test"))
    assert reference.images == len(table)
    for name in NAMES:
        assert reference.rates[f"predicted/{name}"].count == (table["predicted"] == name).sum()
    assert set(reference.scores) == {"confidence", "unlikeness", "brightness", "redness", "sharpness", "field"}
    assert {score.images for score in reference.scores.values()} == {len(table)}
    assert b"patient_" not in content


def test_periods_like_the_baseline_are_within_limits_and_changed_ones_are_named(
    bundle_folder, draw_predictions, tmp_path, capsys
):
    baseline, same = draw_predictions("base.csv", seed=1), draw_predictions("same.csv", seed=2)
    words = ("--baseline", baseline, "--time", "taken", "--by", "month", "--output")
    assert run(bundle_folder, same, *words, tmp_path / "a") == 0
    assert "nothing is beyond its limits" in capsys.readouterr().out
    changed = draw_predictions("changed.csv", seed=3, most=(0.05, 0.05, 0.9), redness=0.44)
    assert run(bundle_folder, changed, *words, tmp_path / "b") == 3
    said = capsys.readouterr().out
    assert "2026-04: predicted as CG" in said
    assert "redness is higher" in said
    assert "0.04 by chance" in said
    table = pd.read_csv(tmp_path / "b" / "monitor.csv")
    assert list(dict.fromkeys(table["period"])) == ["2026-01", "2026-02", "2026-03", "2026-04", "all periods"]
    first = table[(table["period"] == "2026-01") & (table["measure"] == "predicted/CG")].iloc[0]
    predictions = pd.read_csv(changed)
    assert first["value"] == pytest.approx((predictions["predicted"][:60] == "CG").mean())
    assert first["beyond"]
    page = (tmp_path / "b" / "monitor.html").read_text(encoding="utf-8")
    assert "predicted as CG" in page
    assert "http" not in page.split("</style>")[1].replace("http://www.w3.org", "")


def test_each_file_is_a_period_and_n_images_are_one_if_asked(bundle_folder, draw_predictions, tmp_path):
    files = [draw_predictions(f"{number}.csv", seed=number, images=60) for number in (1, 2)]
    options = {"output": tmp_path / "out", "baseline": (files[0],)}
    monitor(bundle_folder, files, MonitorOptions(**options))
    assert set(pd.read_csv(tmp_path / "out" / "monitor.csv")["period"]) == {"1.csv", "2.csv", "all periods"}
    monitor(bundle_folder, files, MonitorOptions(by="50", **options))
    names = ["images 1 to 50", "images 51 to 100", "images 101 to 120", "all periods"]
    assert list(dict.fromkeys(pd.read_csv(tmp_path / "out" / "monitor.csv")["period"])) == names


def test_days_of_dicom_images_make_weeks(bundle_folder, draw_predictions, tmp_path):
    path = draw_predictions("p.csv", seed=1)
    table = pd.read_csv(path).rename(columns={"taken": "acquired"})
    table.to_csv(path, index=False)
    options = MonitorOptions(output=tmp_path / "out", baseline=(path,))
    monitor(bundle_folder, [path], options)
    result = pd.read_csv(tmp_path / "out" / "monitor.csv")
    assert list(dict.fromkeys(result["period"]))[:2] == ["2026-W02", "2026-W06"]
    assert set(result["window"]) == {"period", "recent", "all"}
    table.loc[3, "acquired"] = ""
    table.to_csv(path, index=False)
    with pytest.raises(PylorusError, match="the time of the images is not known for 1 of 240"):
        monitor(bundle_folder, [path], MonitorOptions(output=tmp_path / "out", by="week"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "month"}, "--by month: the time of the images is not known"),
        ({"by": "year"}, "--by: found year, expected day, week, month or a number of images"),
        ({"time": "when"}, "--time: no column when"),
        ({"time": "predicted"}, r"--time: found '(GC|GU|CG)', expected a date"),
        ({"date": r"\d{8}"}, "finds no date in"),
        ({"group": "patient_(x)"}, "finds no patient in"),
    ],
)
def test_options_that_do_not_fit_the_predictions_are_refused(bundle_folder, draw_predictions, tmp_path, options, words):
    path = draw_predictions("p.csv", seed=1, images=20)
    with pytest.raises(PylorusError, match=words):
        monitor(bundle_folder, [path], MonitorOptions(output=tmp_path / "out", **options))


def test_predictions_of_another_bundle_are_refused(bundle_folder, edit_model_json, draw_predictions, tmp_path):
    other = edit_model_json(lambda content: content.update(reference=None))
    options = MonitorOptions(output=tmp_path / "out")
    with pytest.raises(PylorusError, match="these predictions are of another bundle"):
        monitor(bundle_folder, [draw_predictions("p.csv", seed=1, bundle=other)], options)
    with pytest.raises(PylorusError, match=r"--baseline PREDICTIONS\.csv"):
        monitor(other, [draw_predictions("q.csv", seed=1, bundle=other)], options)
    path = draw_predictions("r.csv", seed=1)
    (tmp_path / "r.csv.about.json").unlink()
    with pytest.raises(PylorusError, match=r"r\.csv\.about\.json is missing"):
        monitor(bundle_folder, [path], options)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("probability/GC", 1.5, "column probability/GC: found 1.5, expected a probability, from 0 to 1"),
        ("probability/CG", -0.2, "column probability/CG: found -0.2, expected a probability, from 0 to 1"),
        ("probability/GU", "n/a", "column probability/GU: found n/a, expected a probability, from 0 to 1"),
        ("probability/GU", "", "column probability/GU: found nothing, expected a probability, from 0 to 1"),
        ("unlikeness", "far", "column unlikeness: found far, expected a number"),
        ("redness", "red", "column redness: found red, expected a number"),
        ("sum", 0.5, "columns probability/GC, probability/GU and probability/CG: found 0.5, expected a sum of 1"),
    ],
)
def test_a_table_that_was_changed_is_refused_with_line_and_column(
    bundle_folder, draw_predictions, tmp_path, suffix, column, value, words
):
    path = draw_predictions(f"p{suffix}", seed=1, images=20)
    table = pd.read_csv(path)
    if column == "sum":
        table.loc[7, [f"probability/{name}" for name in NAMES]] = [value, 0.0, 0.0]
    else:
        table[column] = table[column].astype(str if isinstance(value, str) else float)
        table.loc[7, column] = value
    writers = {".csv": table.to_csv, ".parquet": table.to_parquet, ".json": partial(table.to_json, orient="records")}
    writers[suffix](path, index=False)
    row = "line 9" if suffix == ".csv" else "row 8"
    options = MonitorOptions(output=tmp_path / "out")
    with pytest.raises(PylorusError, match=re.escape(f"{path}: {row}, {words}. Was the file changed")):
        monitor(bundle_folder, [path], options)
    assert not (tmp_path / "out").exists()


def test_lines_are_counted_as_an_editor_counts_them_and_empty_ones_are_passed_over(
    bundle_folder, draw_predictions, tmp_path
):
    path = draw_predictions("p.csv", seed=1, images=20)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", *lines[1:], "", ""]))
    options = MonitorOptions(output=tmp_path / "out")
    monitor(bundle_folder, [path], options)
    assert set(pd.read_csv(tmp_path / "out" / "monitor.csv")["images"]) == {20}
    path.write_text("\n".join([lines[0], "", lines[1].replace(",0.", ",7.", 1), *lines[2:]]))
    with pytest.raises(PylorusError, match=r"p\.csv: line 3, column probability/GC: found 7"):
        monitor(bundle_folder, [path], options)


def test_a_file_that_is_given_twice_is_refused_and_a_class_that_never_occurs_is_not(
    bundle_folder, draw_predictions, tmp_path
):
    one, other = draw_predictions("p.csv", seed=1), draw_predictions("q.csv", seed=1)
    options = MonitorOptions(output=tmp_path / "out")
    with pytest.raises(PylorusError, match=r"p\.csv: is given twice, so that its images would count twice"):
        monitor(bundle_folder, [one, one], options)
    with pytest.raises(PylorusError, match=r"q\.csv: holds the same predictions as .*p\.csv"):
        monitor(bundle_folder, [one, other], options)
    assert not (tmp_path / "out").exists()
    table = pd.read_csv(one)
    table[table["predicted"] != "GU"].to_csv(one, index=False)
    monitor(bundle_folder, [one], options)
    result = pd.read_csv(tmp_path / "out" / "monitor.csv")
    assert (result.loc[result["measure"] == "predicted/GU", "value"] == 0).all()


def test_quality_follows_light_color_blur_and_field():
    chance = np.random.default_rng(0)
    image = cv2.resize(chance.integers(60, 200, (22, 22, 3), dtype=np.uint8), (64, 64))
    brighter, redder, cropped = (image.copy() for _ in range(3))
    brighter[:] = np.clip(image.astype(int) + 40, 0, 255)
    redder[..., 0] = np.clip(image[..., 0].astype(int) + 40, 0, 255)
    blurred = cv2.blur(image, (7, 7))
    cropped[:32] = 0
    plain, light, red, blur, half = measure_quality(np.stack([image, brighter, redder, blurred, cropped]))
    assert light[0] > plain[0] + 0.1
    assert red[1] > plain[1] + 0.03
    assert blur[2] < 0.8 * plain[2]
    assert half[3] == pytest.approx(0.5)
    assert half[0] == pytest.approx(plain[0], abs=0.05)
