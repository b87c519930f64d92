"""`pylorus predict` gives the run's own probabilities and one row per file, and resumes after a kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pylorus.cli import main
from pylorus.core import distributed
from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.core.io import convert_to_plain
from pylorus.data.input_format import InputFormat, stack_formats
from pylorus.deploy import inputs as parts_module
from pylorus.deploy import predict as predict_module
from pylorus.deploy.augmented import turn_images
from pylorus.deploy.commands import TTA_KINDS
from pylorus.deploy.inputs import Item, Sources
from pylorus.deploy.model import load_bundle
from pylorus.deploy.predict import PredictOptions, format_prediction_summary, predict, read_ahead

SHARES = ["probability/GC", "probability/GU", "probability/CG"]


@pytest.mark.parametrize(("kind", "passes"), [("mirror", 2), ("flips", 4), ("turns", 8)])
def test_test_time_augmentation_averages_calibrated_probabilities_of_copies(
    bundle_folder, loaded_bundle, synthetic_root, tmp_path, kind, passes, capsys
):
    (tmp_path / "site" / "gastric_ulcer").mkdir(parents=True)
    for path in sorted((synthetic_root / "gastric_ulcer").rglob("*.*"))[:3]:
        shutil.copy(path, tmp_path / "site" / "gastric_ulcer")
    files = sorted((tmp_path / "site" / "gastric_ulcer").iterdir())
    code, table = asked(bundle_folder, [tmp_path / "site"], tmp_path / "averaged.parquet", tta=kind)
    assert code == 0
    printed = capsys.readouterr().out
    assert f"test-time augmentation ({kind})" in printed
    assert f"{passes} passes of the network for each image instead of 1" in printed
    assert "guarantees was measured without test-time augmentation, and does not hold here" in " ".join(printed.split())
    _, plain = asked(bundle_folder, [tmp_path / "site"], tmp_path / "plain.parquet")
    images = loaded_bundle.input.load_images(files)
    copies = {
        "mirror": [images, images[:, :, ::-1]],
        "flips": [images, images[:, :, ::-1], images[:, ::-1], images[:, ::-1, ::-1]],
        "turns": [np.rot90(each, turns, (1, 2)) for each in (images, images[:, :, ::-1]) for turns in range(4)],
    }[kind]
    expected = np.mean(
        [loaded_bundle.predict_images(np.ascontiguousarray(each)).probabilities for each in copies], axis=0
    )
    assert table[SHARES].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert list(table["unlikeness"]) == pytest.approx(list(plain["unlikeness"]), abs=1e-6)
    assert list(table["predicted"]) == [loaded_bundle.description.short_names[row.argmax()] for row in expected]
    record = json.loads((tmp_path / "averaged.parquet.about.json").read_text())
    assert record["tta"]["passes"] == TTA_KINDS[kind] == passes
    assert record["request"]["tta"] == kind
    with pytest.raises(PylorusError, match="tta"):
        asked(bundle_folder, [tmp_path / "site"], tmp_path / "averaged.parquet")
    with pytest.raises(SystemExit, match="made with --tta"):
        main(["monitor", str(bundle_folder), str(tmp_path / "averaged.parquet"), "--output", str(tmp_path / "m")])


def test_the_squares_of_an_ensembles_input_are_turned_each_for_itself():
    form = stack_formats([InputFormat(4, "pad", "bicubic"), InputFormat(2, "pad", "bicubic")])
    images = np.random.default_rng(0).integers(0, 256, (3, *form.shape), dtype=np.uint8)
    turned = turn_images(images, form, 1, True)
    for number in range(2):
        expected = np.rot90(form.get_square(images, number)[:, :, ::-1], 1, (1, 2))
        assert (form.get_square(turned, number) == expected).all()


def test_the_web_page_refuses_test_time_augmentation_in_words(bundle_folder):
    with pytest.raises(SystemExit, match="--tta: found flips, but the page decides by thresholds"):
        main(["serve", str(bundle_folder), "--tta", "flips"])


class KilledError(BaseException):
    """What a prediction does not see coming."""


def fail_as_killed(*_, **__):
    raise KilledError


@pytest.fixture(scope="module")
def loaded_bundle(bundle_folder):
    return load_bundle(bundle_folder)


@pytest.fixture(autouse=True)
def load_bundle_once(loaded_bundle, monkeypatch):
    monkeypatch.setattr(predict_module, "load_bundle", lambda *_, **__: loaded_bundle)


def asked(bundle, inputs, output, **choices):
    code = predict(bundle, [str(each) for each in inputs], output, PredictOptions(**choices))
    return code, read(output)


def read(path):
    if path.suffix == ".csv":
        return pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in SHARES})
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_json(path)


def test_the_probabilities_are_those_of_the_runs_own_test_predictions(
    trained_run, bundle_folder, synthetic_root, tmp_path
):
    split = pd.read_csv(trained_run.path / "split.csv", dtype=str)
    rows = split[split["split"] == "test"]
    for batch in (1, 7):
        code, table = asked(
            bundle_folder, [synthetic_root / path for path in rows["path"]], tmp_path / f"{batch}.parquet", batch=batch
        )
        assert code == 0
        table_of_run = pd.read_parquet(trained_run.get_predictions_path(trained_run.shipped.name, "test"))
        saved = table_of_run.set_index("sample_id").loc[rows["sample_id"]]
        temperature = load_bundle(bundle_folder).description.calibration.temperature
        # Undone for the comparison: the run's own are not calibrated.
        scores = np.log(table[SHARES].to_numpy()) * temperature
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        found = scores / scores.sum(axis=1, keepdims=True)
        assert np.abs(found - saved[SHARES].to_numpy()).max() < 1e-5
        assert table["predicted"].tolist() == saved["predicted"].tolist()


def test_all_formats_hold_the_same_rows(bundle_folder, synthetic_root, tmp_path):
    tables = [
        asked(bundle_folder, [synthetic_root], tmp_path / f"p{suffix}")[1] for suffix in (".csv", ".parquet", ".json")
    ]
    assert len(tables[0]) == 30
    for other in tables[1:]:
        assert list(other.columns) == list(tables[0].columns)
        assert other["path"].tolist() == tables[0]["path"].tolist()
        assert np.allclose(other[SHARES], tables[0][SHARES], atol=1e-8)
        assert other["abstain"].astype(bool).tolist() == tables[0]["abstain"].astype(bool).tolist()


def test_inputs_are_predicted_in_the_order_given(bundle_folder, synthetic_root, tmp_path):
    folder = synthetic_root / "gastric_ulcer"
    first, *_ = sorted((synthetic_root / "gastric_cancer").iterdir())
    _, table = asked(bundle_folder, [first, folder, synthetic_root / "chronic_*" / "*_1.*"], tmp_path / "p.csv")
    expected = [first, *sorted(folder.iterdir()), *sorted(synthetic_root.glob("chronic_*/*_1.*"))]
    assert table["path"].tolist() == [str(path) for path in expected]


def test_decision_and_abstention_follow_the_stored_thresholds(bundle_folder, synthetic_root, tmp_path):
    said = load_bundle(bundle_folder).description
    _, table = asked(bundle_folder, [synthetic_root], tmp_path / "p.parquet")
    threshold = said.decision.thresholds["GC"]
    assert (table["decision"] == np.where(table["probability/GC"] >= threshold, "GC", "not GC")).all()
    unlike = table["unlikeness"] > said.abstention.unlike_above
    unsure = table[SHARES].max(axis=1) < said.abstention.unsure_below
    assert (table["why"] == np.where(unlike, "unlike", np.where(unsure, "unsure", ""))).all()
    assert (table["abstain"] == (unlike | unsure)).all()
    _, other = asked(bundle_folder, [synthetic_root], tmp_path / "q.parquet", class_name="CG")
    assert set(other["decision"]) <= {"CG", "not CG"}


def test_prediction_sets_hold_the_classes_that_reach_their_lowest_probability(
    bundle_folder, synthetic_root, tmp_path, capsys
):
    sets = load_bundle(bundle_folder).description.prediction_sets
    words = {"group": r"patient_\d+"}
    _, table = asked(bundle_folder, [synthetic_root], tmp_path / "p.parquet", **words)
    names = ("GC", "GU", "CG")
    members = np.stack([table[f"probability/{name}"] >= sets.lowest[name] for name in names], axis=1)
    expected = ["{" + ", ".join(np.array(names)[row]) + "}" for row in members]
    assert table["prediction_set"].tolist() == expected
    found = json.loads((tmp_path / "p.parquet.about.json").read_text())["evaluation"]["prediction_sets"]
    patients = table["path"].str.extract(r"(patient_\d+)")[0]
    assert found["size"]["value"] == pytest.approx(pd.Series(members.sum(axis=1)).groupby(patients).mean().mean())
    covered = pd.Series(members[:, 0])[table["true"] == "GC"].groupby(patients).mean().mean()
    assert found["coverage"]["GC"]["value"] == pytest.approx(covered)
    said = capsys.readouterr().out
    assert "prediction sets at 50 %, each patient weighted equally" in said
    assert "too small to guarantee a sensitivity of 95 % for GC" in " ".join(said.split())


def test_a_bundle_without_prediction_sets_gives_no_column_of_them(
    edit_model_json, synthetic_root, tmp_path, monkeypatch
):
    monkeypatch.setattr(predict_module, "load_bundle", load_bundle)
    folder = edit_model_json(lambda content: content.update(prediction_sets=None))
    _, table = asked(folder, [synthetic_root / "gastric_ulcer"], tmp_path / "p.parquet")
    assert "prediction_set" not in table.columns


def test_what_can_not_be_read_is_a_row_with_an_error_and_counts_in_the_exit_code(
    bundle_folder, synthetic_root, tmp_path
):
    folder = tmp_path / "in"
    shutil.copytree(synthetic_root / "gastric_ulcer", folder)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "folder.jpg").mkdir()
    (folder / "notes.txt").write_text("passed over")
    (folder / ".hidden.jpg").write_bytes(b"passed over")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    code, table = asked(bundle_folder, [folder], tmp_path / "p.csv")
    assert code == 2 + 3
    bad = table[table["error"] != ""]
    assert bad["abstain"].eq("").all()
    assert [path.rsplit("/", 1)[1] for path in bad["path"]] == ["empty.jpg", "gone.jpg", "text.png"]
    assert bad[SHARES].isna().all().all()
    assert (bad["predicted"] == "").all()
    assert str(folder) not in "".join(bad["error"])
    assert len(table) == 13


def test_a_cycle_of_links_ends(bundle_folder, synthetic_root, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(synthetic_root / "gastric_ulcer", folder / "a")
    (folder / "a" / "round").symlink_to(folder)
    assert len(asked(bundle_folder, [folder], tmp_path / "p.csv")[1]) == 10


def test_unusual_file_names_are_rows(bundle_folder, synthetic_root, tmp_path):
    image, *_ = sorted((synthetic_root / "gastric_ulcer").iterdir())
    names = [
        "a,b.jpg",
        'quo"te.jpg',
        "line\nbreak.jpg",
        "umläut.jpg",
        b"no\xffutf8.jpg".decode("utf-8", "surrogateescape"),
    ]
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / "in" / name)
    for suffix in (".csv", ".parquet"):
        code, table = asked(bundle_folder, [tmp_path / "in"], tmp_path / f"p{suffix}")
        assert code == 0
        assert len(table) == len(names)


@pytest.mark.parametrize(("suffix", "kills"), [(".csv", (0, 3, 6)), (".parquet", (5,)), (".json", (5,))])
def test_a_killed_prediction_resumes_to_the_same_output(
    bundle_folder, synthetic_root, tmp_path, monkeypatch, suffix, kills, capsys
):
    monkeypatch.setattr(predict_module, "PART_ROWS", 8)
    asked(bundle_folder, [synthetic_root], tmp_path / f"whole{suffix}", batch=4)
    expected = (tmp_path / f"whole{suffix}").read_bytes()
    read_images, load_image, replace = 0, InputFormat.load_image, Path.replace

    def counted(form, path):
        nonlocal read_images
        read_images += 1
        return load_image(form, path)

    monkeypatch.setattr(InputFormat, "load_image", counted)
    for kill_at in kills:  # files: the request, four parts, the output, what is said about it
        output, seen = tmp_path / f"{kill_at}{suffix}", 0

        def dying(path, target, kill_at=kill_at):
            nonlocal seen
            seen += 1
            if seen > kill_at:
                raise KilledError
            return replace(path, target)

        with monkeypatch.context() as patched, pytest.raises(KilledError):
            patched.setattr(Path, "replace", dying)
            asked(bundle_folder, [synthetic_root], output, batch=4)
        assert output.exists() == (kill_at == 6)
        read_images = 0
        asked(bundle_folder, [synthetic_root], output, batch=4)
        assert output.read_bytes() == expected
        assert read_images == max(0, 30 - 8 * max(0, kill_at - 1))
        assert sorted(path.name for path in tmp_path.glob(f"*{output.name}*")) == [
            output.name,
            f"{output.name}.about.json",
        ]
    capsys.readouterr()
    asked(bundle_folder, [synthetic_root], output, batch=4)
    assert f"already complete: {output}" in capsys.readouterr().out


@pytest.mark.parametrize("parts", [(0,), (0, 1)])  # all of them, or some: that version was resumed by this one
def test_a_prediction_that_another_version_began_with_other_columns_begins_anew_and_says_so(
    bundle_folder, synthetic_root, tmp_path, monkeypatch, capsys, parts
):
    monkeypatch.setattr(predict_module, "PART_ROWS", 8)
    asked(bundle_folder, [synthetic_root], tmp_path / "whole.csv", batch=4)
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(parts_module.ResumableTable, "merge_parts", fail_as_killed)
        asked(bundle_folder, [synthetic_root], tmp_path / "p.csv", batch=4)
    for number in parts:
        path = tmp_path / ".p.csv.parts" / f"part-{number:08d}.parquet"
        pd.read_parquet(path).drop(columns="acquired").to_parquet(path, index=False)
    capsys.readouterr()
    asked(bundle_folder, [synthetic_root], tmp_path / "p.csv", batch=4)
    said = capsys.readouterr().out
    assert "rows of another version of Pylorus, with other columns (acquired): all images are predicted anew" in said
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_the_output_of_another_command_is_not_overwritten(bundle_folder, synthetic_root, tmp_path, bundle_copy):
    output = tmp_path / "p.csv"
    asked(bundle_folder, [synthetic_root], output)
    before = output.read_bytes()
    with pytest.raises(PylorusError, match=r"p\.csv: already exists, from another request \(different: inputs\)"):
        asked(bundle_folder, [synthetic_root / "gastric_ulcer"], output)
    with pytest.raises(PylorusError, match="different: class"):
        asked(bundle_folder, [synthetic_root], output, class_name="CG")
    (tmp_path / "q.csv").write_text("mine")
    with pytest.raises(PylorusError, match=r"q\.csv: already exists"):
        asked(bundle_folder, [synthetic_root], tmp_path / "q.csv")
    assert output.read_bytes() == before
    assert (tmp_path / "q.csv").read_text() == "mine"


def test_two_processes_do_not_write_one_output(bundle_folder, synthetic_root, tmp_path):
    with (
        parts_module.ResumableTable(tmp_path / "p.csv", {}, also={}).lock_parts(),
        pytest.raises(PylorusError, match="another process"),
    ):
        asked(bundle_folder, [synthetic_root], tmp_path / "p.csv")


def test_images_are_read_batch_by_batch_without_listing_all(bundle_folder, synthetic_root):
    image = next((synthetic_root / "gastric_ulcer").iterdir())
    taken = 0

    def endless():
        nonlocal taken
        from pylorus.deploy.inputs import Item

        while True:
            taken += 1
            yield Item(str(image), image)

    form = load_bundle(bundle_folder).input
    for number, (items, images) in enumerate(predict_module.read_ahead(endless(), form, 4), start=1):
        assert len(items) == len(images) == 4
        assert taken <= 4 * (number + predict_module.BATCHES_AHEAD)
        if number == 5:
            break


@pytest.fixture
def two_readers(monkeypatch):
    """Processes read images after the first batch, and two of them."""
    monkeypatch.setattr(distributed, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(distributed, "count_free_cores", lambda: 2)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_processes_that_read_give_the_same_output(bundle_folder, synthetic_root, tmp_path, suffix, request):
    folder = tmp_path / "in"
    shutil.copytree(synthetic_root, folder)
    (folder / "gastric_ulcer" / "a.jpg").write_bytes(b"")
    (folder / "gastric_ulcer" / "patient_0.png").write_text("no image")
    outputs = []
    for where in ("threads", "processes"):
        if where == "processes":
            request.getfixturevalue("two_readers")
        assert asked(bundle_folder, [folder], tmp_path / f"{where}{suffix}", batch=4)[0] == 2 + 2
        outputs.append((tmp_path / f"{where}{suffix}").read_bytes())
    assert outputs[0] == outputs[1]


def test_images_are_read_while_the_network_computes(loaded_bundle, two_readers):
    image = np.zeros((loaded_bundle.input.size, loaded_bundle.input.size, 3), dtype=np.uint8)

    class SlowFormat:
        def load_image(self, _):
            time.sleep(0.1)
            return image

    items = [Item(str(number), Path(str(number))) for number in range(64)]
    start = time.monotonic()
    for batch, images in read_ahead(items, SlowFormat(), 8):
        assert len(batch) == len(images) == 8
        time.sleep(0.4)
    assert time.monotonic() - start < 8 * (0.4 + 0.4)  # 3.6 s if both overlap entirely


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_prediction_that_is_ended_leaves_no_processes_and_can_be_resumed(
    bundle_folder, synthetic_root, tmp_path, fork_server, number, monkeypatch, capsys
):
    folder = tmp_path / "in"
    for copy in range(6):
        shutil.copytree(synthetic_root, folder / str(copy))
    program = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom pylorus.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background would ignore it
        "from pylorus.core import distributed\nfrom pylorus.deploy import predict\n"
        "distributed.LEAST_SECONDS, distributed.count_free_cores, predict.PART_ROWS = 0.0, lambda: 2, 8\n"
        "read_image = predict._read_image\n"
        "def read_slowly(*words):\n    Path('pids', str(os.getpid())).touch()\n    time.sleep(0.5)\n"
        "    return read_image(*words)\n"
        "predict._read_image = read_slowly\nmain()\n"
    )
    (tmp_path / "pids").mkdir()
    words = ["predict", str(bundle_folder), "in", "--batch", "4", "--output", "p.csv"]
    command = [sys.executable, "-c", program, *words]
    process = fork_server.start(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    parts = tmp_path / ".p.csv.parts"
    pids = tmp_path / "pids"
    wait_until(lambda: len(list(pids.iterdir())) == 3 and len(list(parts.glob("part-*"))) >= 2)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert not (tmp_path / "p.csv").exists()
    assert ("finished rows are saved" in errors) == (number == signal.SIGINT)
    wait_until(lambda: not any(Path(f"/proc/{path.name}").exists() for path in pids.iterdir()))
    done = sum(len(pd.read_parquet(part)) for part in parts.glob("part-*"))
    assert 16 <= done < 180
    monkeypatch.chdir(tmp_path)
    _, table = asked(bundle_folder, ["in"], Path("p.csv"))
    assert len(table) == table["path"].nunique() == 180
    assert f"already predicted: {done} images" in capsys.readouterr().out


def wait_until(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_csv_file_contains_no_formulas(bundle_folder, synthetic_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = next(synthetic_root.rglob("*.jpg"))
    for name in ("=cmd|' calc'!A0.jpg", "@sum(1).jpg", "+1.jpg", "plain=1.jpg"):
        shutil.copy(image, tmp_path / name)
    inputs = ["=*.jpg", "@*.jpg", "+*.jpg", "plain*.jpg"]
    asked(bundle_folder, inputs, Path("p.csv"))
    asked(bundle_folder, inputs, Path("p.parquet"))
    written = pd.read_csv("p.csv")["path"].tolist()
    assert written == ["'=cmd|' calc'!A0.jpg", "'@sum(1).jpg", "'+1.jpg", "plain=1.jpg"]
    assert pd.read_parquet("p.parquet")["path"].tolist() == [name.removeprefix("'") for name in written]


def test_a_folder_too_large_to_sort_is_read_completely(tmp_path, monkeypatch):
    from pylorus.deploy import inputs

    monkeypatch.setattr(inputs, "MAX_SORTED_FILES", 3)
    for number in range(8):
        (tmp_path / f"{number}.jpg").touch()
    found = [item.path for item in Sources((str(tmp_path),), [], None).iter_items()]
    assert sorted(found) == [str(tmp_path / f"{number}.jpg") for number in range(8)]


def test_without_groups_an_evaluation_says_that_each_image_counts_as_a_patient(bundle_folder):
    said = load_bundle(bundle_folder).description
    figures = convert_to_plain(said.test)
    shares = ("balanced_accuracy", "macro_f1", "answered", "accuracy_answered")
    evaluation = {**figures, **dict.fromkeys(shares, figures["accuracy"])}
    record = {"images": 3, "unreadable": 0, "evaluation": evaluation}
    assert "each treated as a separate patient because --group was not given" in format_prediction_summary(record, said)
    grouped = format_prediction_summary(record | {"request": {"group": "p"}}, said)
    assert f"images of {said.test.groups} groups (patients), in %" in grouped


def test_class_folders_reproduce_the_runs_own_results(trained_run, bundle_folder, synthetic_root, tmp_path, capsys):
    split = pd.read_csv(trained_run.path / "split.csv", dtype=str)
    for path in split[split["split"] == "test"]["path"]:
        target = tmp_path / "test" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(synthetic_root / path, target)
    code, table = asked(bundle_folder, [tmp_path / "test"], tmp_path / "p.csv", group=r"patient_\d+")
    assert code == 0
    assert table["true"].isin(["GC", "GU", "CG"]).all()
    found = json.loads((tmp_path / "p.csv.about.json").read_text())["evaluation"]
    own = json.loads((bundle_folder / "model.json").read_text())["test"]
    for name in ("sensitivity", "specificity", "auroc"):
        for each in ("GC", "GU", "CG"):
            assert found[name][each] == pytest.approx(own[name][each], abs=1e-6)
    assert found["accuracy"] == pytest.approx(own["accuracy"])
    assert (found["images"], found["groups"]) == (own["images"], own["groups"])
    calibration = found["calibration"]["GC"]
    assert calibration["observed"] == pytest.approx((table["true"] == "GC").mean())
    assert calibration["expected"] == pytest.approx(table["probability/GC"].mean())
    assert calibration["difference"]["value"] == pytest.approx(calibration["observed"] - calibration["expected"])
    said = capsys.readouterr().out
    assert "observed, " in said
    assert "evaluation on" in said
    assert f"AUROC {found['auroc']['GC']['value']:.3f} (" in said
    assert "each treated as a separate patient" not in said
    assert "at the stored threshold" in said


def test_predictive_values_are_given_for_these_images_and_for_a_stated_prevalence(
    bundle_folder, synthetic_root, tmp_path, capsys
):
    asked(bundle_folder, [synthetic_root], tmp_path / "p.csv", evaluate=True, prevalence=0.01)
    decision = json.loads((tmp_path / "p.csv.about.json").read_text())["evaluation"]["decision"]
    stated = decision["at_prevalence"]
    hits = 0.01 * decision["sensitivity"]["value"]
    false_alarms = 0.99 * (1 - decision["specificity"]["value"])
    assert stated["ppv"]["value"] == pytest.approx(hits / (hits + false_alarms))
    assert stated["ppv"]["low"] <= stated["ppv"]["value"] <= stated["ppv"]["high"]
    assert stated["npv"]["value"] > decision["npv"]["value"]
    said = capsys.readouterr().out
    assert f"where {100 * decision['prevalence']:.1f} % of the images are {decision['class']}, as here: PPV" in said
    assert f"where 1 % of the images are {decision['class']}: PPV" in said
    without = asked(bundle_folder, [synthetic_root], tmp_path / "q.csv", evaluate=True)
    assert without[0] == 0
    assert "at_prevalence" not in json.loads((tmp_path / "q.csv.about.json").read_text())["evaluation"]["decision"]


def test_what_one_class_alone_can_not_tell_is_called_unknown_and_no_dash_is_printed(
    bundle_folder, synthetic_root, tmp_path, capsys
):
    shutil.copytree(synthetic_root / "gastric_cancer", tmp_path / "images" / "gastric_cancer")
    asked(bundle_folder, [tmp_path / "images"], tmp_path / "p.csv", evaluate=True, prevalence=0.05)
    said = capsys.readouterr().out
    assert "where 5 % of the images are GC: PPV and NPV are unknown: they need both sensitivity and specificity" in said
    assert "specificity undefined" in said
    assert "–" not in said


@pytest.mark.parametrize("value", ["0", "1", "5", "nan"])
def test_a_prevalence_that_is_no_proportion_is_refused_before_the_bundle_is_read(tmp_path, value):
    with pytest.raises(SystemExit, match=f"--prevalence: found {value}, expected a proportion above 0 and below 1"):
        main(["predict", "missing", str(tmp_path), "--output", str(tmp_path / "p.csv"), "--prevalence", value])


def test_an_impossible_evaluation_is_refused_before_anything_is_predicted(bundle_folder, synthetic_root, tmp_path):
    flat = shutil.copytree(synthetic_root / "gastric_ulcer", tmp_path / "flat")
    with pytest.raises(PylorusError, match="--evaluate: no image is in a folder named after a class"):
        asked(bundle_folder, [flat], tmp_path / "p.csv", evaluate=True)
    with pytest.raises(PylorusError, match="--prevalence: no image is in a folder named after a class"):
        asked(bundle_folder, [flat], tmp_path / "p.csv", evaluate=True, prevalence=0.1)
    with pytest.raises(PylorusError, match="--group: 'visit_x' finds no patient in"):
        asked(bundle_folder, [synthetic_root], tmp_path / "p.csv", group="visit_x")
    assert [path.name for path in tmp_path.iterdir()] == ["flat"]
    assert "true" not in asked(bundle_folder, [flat], tmp_path / "p.csv")[1].columns


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_called_like_a_video_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "film.mp4")
    with pytest.raises(UnreadableImageError, match="is a pipe, expected a file"):
        next(parts_module.decode_frames(tmp_path / "film.mp4", every=1.0))


def test_frames_of_a_video_are_predicted(bundle_folder, tmp_path):
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (64, 48))
    for number in range(35):
        writer.write(np.full((48, 64, 3), number * 7, dtype=np.uint8))
    writer.release()
    with pytest.raises(PylorusError, match=r"film.avi: this is a video. Add --frames-every"):
        asked(bundle_folder, [path], tmp_path / "p.csv")
    code, table = asked(bundle_folder, [path], tmp_path / "p.csv", frames_every=1.0)
    assert code == 0
    assert table["second"].tolist() == [0, 1, 2, 3]
    (tmp_path / "text.mp4").write_text("no video")
    code, table = asked(bundle_folder, [path, tmp_path / "text.mp4"], tmp_path / "q.csv", frames_every=0.5)
    assert code == 3
    assert table["error"].tolist()[-1] == "not a video that OpenCV can read"
    assert len(table) == 8


def test_a_dicom_image_is_read_with_pydicom(bundle_folder, tmp_path):
    pytest.importorskip("pydicom")
    from tests.data.sample_files import dicom, dicom_samples, picture

    (tmp_path / "a.dcm").write_bytes(dicom_samples()["dicom rgb"])
    code, table = asked(bundle_folder, [tmp_path / "a.dcm"], tmp_path / "p.csv")
    assert code == 0
    assert "acquired" not in table
    dates = {"StudyDate": "20261126", "AcquisitionDate": "20261127"}
    (tmp_path / "b.dcm").write_bytes(dicom(picture(), "RGB", **dates))
    (tmp_path / "c.dcm").write_bytes(dicom(picture(), "RGB", StudyDate="20261131", AcquisitionDate=""))
    files = [tmp_path / name for name in ("a.dcm", "b.dcm", "c.dcm")]
    code, table = asked(bundle_folder, files, tmp_path / "q.csv")
    assert code == 0
    assert table["acquired"].fillna("").tolist() == ["", "2026-11-27", ""]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: found no such file or folder, and no file that matches it as a pattern"),
        (["."], "There are no images in the inputs"),
        ([".", "--class", "GX"], '--class: found "GX", which has no threshold.*Expected one of GC, GU, CG'),
        ([".", "--frames-every", "0"], "--frames-every: found 0"),
        ([".", "--batch", "0"], "--batch: found 0"),
    ],
)
def test_invalid_options_are_named(bundle_folder, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=said):
        main(["predict", str(bundle_folder), *words, "--output", "p.csv"])
    with pytest.raises(
        SystemExit, match=r"--output: found p.xlsx, expected a file name that ends in .csv, .parquet, .json"
    ):
        main(["predict", str(bundle_folder), ".", "--output", "p.xlsx"])


def test_noise_and_blank_frames_are_rejected_more_often_than_test_images(bundle_folder, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(tmp_path / f"noise_{number}.png")
        Image.fromarray(np.full((48, 48, 3), 30 * number, dtype=np.uint8)).save(tmp_path / f"plain_{number}.png")
    _, table = asked(bundle_folder, [tmp_path], tmp_path / "p.csv")
    rate = load_bundle(bundle_folder).description.abstention.unlike_test.value
    assert (table["why"] == "unlike").mean() > rate + 0.3


def test_the_command_runs_as_typed(bundle_folder, synthetic_root, tmp_path):
    words = [
        "-c",
        "from pylorus.cli import main; main()",
        "predict",
        str(bundle_folder),
        str(synthetic_root),
        "--output",
        "p.csv",
    ]
    environment = {**os.environ, "OMP_DISPLAY_ENV": "TRUE"}
    environment.pop("OMP_WAIT_POLICY", None)
    found = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    if sys.platform == "linux":  # waiting threads of the network leave the cores to the processes that read images
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in found.stderr
    assert found.stdout.startswith("images: 30, unreadable: 0\n")
    assert found.stdout.rstrip().endswith("predictions: p.csv")
    assert len(pd.read_csv(tmp_path / "p.csv")) == 30


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
@pytest.mark.parametrize("folder", [".", "gastric_cancer"])
def test_where_no_file_can_be_read_the_first_is_named_and_the_exit_code_counts(
    bundle_folder, tmp_path, capsys, suffix, folder
):
    for name in ("a.jpg", "b.png"):
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / folder / name).write_text("no image")
    words = ["predict", str(bundle_folder), str(tmp_path / "images"), "--output", str(tmp_path / f"table.{suffix}")]
    for _ in range(2):  # computed, and already complete
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 4
        assert re.search(r"error: no file could be read\. \S*a\.jpg: \w", capsys.readouterr().err)
    with pytest.raises(SystemExit, match="so there is nothing to evaluate|no image is in a folder named after a class"):
        main([*words[:-1], str(tmp_path / f"other.{suffix}"), "--evaluate"])
