"""What a run does with its images before training: one audit, whose results are written to the run's folder."""

import copy
import json
import logging
import re
import shutil

import pandas as pd
import pytest
from PIL import Image

from pylorus.config.checks import load_config
from pylorus.core.errors import PylorusError
from pylorus.data import image_facts as module
from pylorus.data.prepare import prepare_images
from pylorus.launch.main import update_config
from pylorus.runs.folder import RunFolder
from tests.data.device_frames import draw_frame


@pytest.fixture
def log_lines(monkeypatch):
    """What the terminal says."""
    lines = []
    ours = logging.getLogger("pylorus")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    ours.addHandler(handler)
    monkeypatch.setattr(ours, "level", logging.INFO)
    yield lines
    ours.removeHandler(handler)


@pytest.fixture
def split_folders(class_folders):
    """Class folders in given parts."""
    return class_folders({f"{part}/{name}": 4 for part in ("train", "val", "test") for name in "ab"})


def prepared(compose_config, root, folder, *words):
    return prepare_images(compose_config("data=folders", f"data.root={root}", *words), folder)[0]


def test_the_audit_of_a_run_is_written_and_summarized_in_a_line(compose_config, split_folders, tmp_path, log_lines):
    prepared(compose_config, split_folders, tmp_path)
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["files"] == 24
    assert found["accepted_leaks"] == {"patient": 0, "file": 0, "pixels": 0, "near": 0}
    assert found["left_out"] == []
    assert any(line.startswith("audit ") for line in log_lines)


def test_a_run_says_in_how_many_images_a_field_was_found_and_warns_below_half(compose_config, tmp_path, log_lines):
    for number in range(12):
        layout = "octagon" if number < 4 else "whole"
        path = tmp_path / "set" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_frame(layout, number, longest=320).image).save(path)
    prepared(compose_config, tmp_path / "set", tmp_path / "run", "data.crop=auto", "data.mask=none")
    assert "fields   field of view found in 4 of 12 images" in log_lines
    warning = next(line for line in log_lines if "not cropped" in line)
    assert warning.startswith("fields   8 of 12 images are not cropped (data.crop=auto): 8 have no flat ground")
    assert "a/10.png" in warning


def test_a_run_that_crops_says_in_how_many_images_overlays_are_masked(compose_config, tmp_path, log_lines):
    for number in range(8):
        path = tmp_path / "set" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_frame("octagon, cropped, scope map", number).image).save(path)
    prepared(compose_config, tmp_path / "set", tmp_path / "run", "data.crop=auto")
    line = next(line for line in log_lines if line.startswith("fields "))
    assert re.fullmatch(
        "fields   field of view found in [78] of 8 images, overlays masked in [5-8] [(].* % of the frame in the median[)]",
        line,
    )


def test_a_second_run_decodes_nothing(compose_config, split_folders, tmp_path, monkeypatch):
    first = prepared(compose_config, split_folders, tmp_path / "first", f"cache.folder={tmp_path / 'cache'}")
    monkeypatch.setattr(module, "compute_facts", None)
    second = prepared(compose_config, split_folders, tmp_path / "second", f"cache.folder={tmp_path / 'cache'}")
    assert first.split_hash == second.split_hash
    assert (tmp_path / "first" / "audit.json").read_bytes() == (tmp_path / "second" / "audit.json").read_bytes()


@pytest.fixture
def unsplit_folders(class_folders):
    """Class folders without a given split."""
    return class_folders({"a": 30, "b": 30})


def test_the_seed_of_a_run_leaves_the_split_alone_and_the_split_seed_changes_it(
    compose_config, unsplit_folders, tmp_path
):
    first, same, other = (
        prepared(compose_config, unsplit_folders, tmp_path / word, word).split_hash
        for word in ("seed=0", "seed=1", "data.split_seed=1")
    )
    assert first == same != other


def test_a_resumed_run_keeps_its_original_split(compose_config, unsplit_folders, tmp_path):
    drawn_now = prepared(compose_config, unsplit_folders, tmp_path).table
    began = pd.read_csv(tmp_path / "split.csv")
    older = began.assign(split=began["split"].sample(frac=1, random_state=1).to_numpy())
    older.to_csv(tmp_path / "split.csv", index=False, lineterminator="\n")
    (tmp_path / "split.csv.sha256").unlink()  # the version that wrote it wrote none
    before = (tmp_path / "split.csv").read_bytes()
    again = prepared(compose_config, unsplit_folders, tmp_path).table
    assert again["split"].tolist() == older["split"].tolist() != drawn_now["split"].tolist()
    assert (tmp_path / "split.csv").read_bytes() == before


def test_deviating_fractions_and_few_images_are_reported(compose_config, class_folders, tmp_path, log_lines):
    prepared(compose_config, class_folders({"a": 60, "rare": 3}), tmp_path)
    (share, few) = (
        next(line for line in log_lines if word in line) for word in ("should contain 15 %", "Fewer than 5 images")
    )
    assert '33.3 % of "rare" (each split needs at least one of its 3 images)' in share
    assert '"rare" 1 in training, 1 in validation and 1 in test' in few


def test_patients_with_images_of_several_classes_are_named(compose_config, unsplit_folders, tmp_path, log_lines):
    prepared(compose_config, unsplit_folders, tmp_path, r"data.group=\d_")
    (line,) = [line for line in log_lines if "different labels" in line]
    assert line == "10 of 10 groups (patients) have images with different labels, such as 0_: a and b"


def test_folds_by_a_column_are_counted_in_the_runs_configuration(compose_config, unsplit_folders, tmp_path):
    paths = sorted(path.relative_to(unsplit_folders).as_posix() for path in unsplit_folders.rglob("*.png"))
    sites = [f"site {number % 3}" for number in range(len(paths))]
    pd.DataFrame({"path": paths, "label": [path[0] for path in paths], "site": sites}).to_csv(
        unsplit_folders / "list.csv", index=False
    )
    words = (
        "data=manifest",
        f"data.manifest={unsplit_folders / 'list.csv'}",
        "data.fold=site 1",
        "data.fold_column=site",
    )
    config = compose_config(*words)
    before = copy.deepcopy(config)
    _, completed = prepare_images(config, tmp_path)
    assert config == before
    assert (completed.data.folds, completed.data.fold) == (3, "site 1")
    assert load_config(tmp_path / "config.yaml").data.folds == 3
    update_config(RunFolder(tmp_path), compose_config(*words))  # the same command goes on with it


def test_a_split_seed_is_refused_where_nothing_is_drawn_with_it(compose_config, class_folders, tmp_path):
    whole = class_folders({f"{part}/{name}": 6 for part in ("train", "val", "test") for name in "ab"})
    with pytest.raises(PylorusError, match="data.split_seed: found 1, but the images or other keys .* Leave it out"):
        prepared(compose_config, whole, tmp_path / "refused", "data.split_seed=1")
    prepared(compose_config, whole, tmp_path / "run")
    words = ("data.split_seed=2", f"data.split_file={tmp_path / 'run' / 'split.csv'}")
    with pytest.raises(PylorusError, match="data.split_seed: found 2"):
        prepared(compose_config, whole, tmp_path / "again", *words)


def test_a_split_seed_may_change_the_validation_images_of_a_given_test_set(compose_config, class_folders, tmp_path):
    tested = class_folders({f"{part}/{name}": 30 for part in ("train", "test") for name in "ab"})
    first, other = (
        prepared(compose_config, tested, tmp_path / str(seed), f"data.split_seed={seed}").table for seed in (0, 1)
    )
    assert not first["split"].equals(other["split"])


def test_a_leak_stops_the_run_and_is_written_down_where_it_is_accepted(compose_config, split_folders, tmp_path):
    shutil.copy(sorted((split_folders / "train" / "a").iterdir())[0], split_folders / "test" / "a" / "copy.png")
    with pytest.raises(PylorusError, match=r"Found in more than one split(?s:.*)data\.accept_leaks=true"):
        prepared(compose_config, split_folders, tmp_path / "stopped")
    prepared(compose_config, split_folders, tmp_path / "run", "data.accept_leaks=true")
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["accepted_leaks"]["file"] == 1


def test_left_out_files_are_in_quarantine_audit_and_terminal(compose_config, split_folders, tmp_path, log_lines):
    broken = sorted((split_folders / "train" / "a").iterdir())[0]
    broken.write_bytes(b"no image")
    with pytest.raises(PylorusError, match=r"data\.on_error=quarantine"):
        prepared(compose_config, split_folders, tmp_path / "stopped")
    images = prepared(compose_config, split_folders, tmp_path / "run", "data.on_error=quarantine")
    assert len(images.table) == 23
    assert list(pd.read_csv(tmp_path / "run" / "quarantine.csv")["path"]) == [f"train/a/{broken.name}"]
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert found["left_out"] == [{"class": "a", "split": "train", "files": 1}]
    assert (found["files"], found["readable"]) == (24, 23)
    assert any("1 of 24 files can't be read" in line and broken.name in line for line in log_lines)


def test_facts_are_released_before_training(compose_config, split_folders, tmp_path):
    assert len(prepared(compose_config, split_folders, tmp_path).catalog.facts) == 0
