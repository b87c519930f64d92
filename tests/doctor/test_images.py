"""The user's images at a glance."""

from pylorus.doctor import user_files
from pylorus.doctor.check import State
from pylorus.doctor.user_files import check_fonts, check_images, list_class_names


def test_classes_are_counted_and_a_sample_is_read(drawn):
    folder, reading = check_images(drawn)
    assert folder.state is reading.state is State.GOOD
    assert folder.found.startswith("30 images in ")
    assert all(f"{name} 10" in folder.found for name in list_class_names(drawn))
    assert reading.found.startswith("all 24 sampled images can be read")


def test_a_damaged_image_is_named(class_folders):
    root = class_folders({"a": 3, "b": 3})
    damaged = next((root / "a").iterdir())
    damaged.write_bytes(b"no image")
    _, reading = check_images(root)
    assert reading.state is State.WARNING
    assert f"1 of 6 sampled images can't be read, e.g. {damaged}" in reading.found


def test_what_is_no_image_set_is_wrong_with_its_reason(tmp_path):
    (missing,) = check_images(tmp_path / "none")
    assert missing.state is State.WRONG
    (tmp_path / "train").mkdir()
    (halves,) = check_images(tmp_path)
    assert halves.state is State.WRONG
    assert "there is no folder test next to train" in halves.found
    assert list_class_names(tmp_path) == list_class_names(tmp_path / "none") == []


def test_shards_are_told_with_the_words_that_train_on_them(tmp_path):
    (tmp_path / "shard-000.tar").write_bytes(b"")
    (check,) = check_images(tmp_path)
    assert check.state is State.GOOD
    assert "1 shard in " in check.found
    assert "data=shards" in check.mend


def test_a_missing_font_matters_only_where_a_class_needs_it(monkeypatch):
    monkeypatch.setattr(user_files, "find_cjk_font_file", lambda: None)
    assert next(check_fonts(["gastric cancer", "Zöliakie"])).state is State.GOOD
    needed = next(check_fonts(["胃癌"]))
    assert needed.state is State.WARNING
    assert "figures show 胃癌 as boxes" in needed.found
