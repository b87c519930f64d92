"""Which files of a folder are used, by training, audit, pack and predict alike, and what is said about the others."""

import os
import shutil
import tarfile
import unicodedata

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pylorus.config.schema import DataConfig
from pylorus.core.errors import PylorusError, resolve_unicode_form
from pylorus.data.audit import audit, convert_audit_to_json
from pylorus.data.audit_findings import Thresholds
from pylorus.data.catalog import ReadOptions, read_folders
from pylorus.data.files import read_head
from pylorus.data.image_facts import load_or_compute_facts
from pylorus.data.sources import list_folder_files, pack_shards, read_manifest
from pylorus.data.split import split_catalog
from pylorus.deploy.inputs import ResumableTable, Sources, format_ignored


def predicted_paths(root, classes=("a", "b"), **options):
    """The images that `pylorus predict` reads in a folder, each with its class, and the files that it does not."""
    ignored = []
    sources = Sources((str(root),), [(name,) for name in classes], None, on_ignored=ignored.append, **options)
    items = [(os.path.relpath(item.source, root), item.label) for item in sources.iter_items()]
    return items, {os.path.relpath(each.path, root): each.reason for each in ignored}


def trained_paths(root, **options):
    catalog = read_folders(root, **options)
    return list(catalog.table["path"]), {each.path.rstrip("/"): each.reason for each in catalog.ignored}


@pytest.fixture
def root(class_folders):
    return class_folders({"a": 3, "b": 3})


def test_folders_that_are_links_are_read_and_circles_are_not(root, tmp_path):
    patient = tmp_path / "disk" / "p1"
    shutil.copytree(root / "a", patient)
    for number, file in enumerate(sorted(patient.iterdir())):
        Image.fromarray(np.full((40, 40, 3), 40 * number, np.uint8)).save(file)
    (patient / "itself").symlink_to(patient)
    (patient / "above").symlink_to(tmp_path)
    (root / "a" / "p1").symlink_to(patient)
    (root / "a" / "p2").symlink_to(patient)
    (root / "b" / "up").symlink_to("..")
    images, ignored = trained_paths(root)
    assert len([path for path in images if path.startswith("a/p1/")]) == 3
    assert len(images) == 9
    assert ignored == {
        "a/p1/above": "a link to a folder that contains it",
        "a/p1/itself": "a link to a folder that contains it",
        "a/p2": "a link to a folder that is read already",
        "b/up": "a link to a folder that contains it",
    }
    assert sorted(path for path, _ in predicted_paths(root)[0]) == images
    assert predicted_paths(root)[1] == ignored


def test_the_content_decides_about_files_without_an_images_suffix(root):
    files = sorted((root / "a").iterdir())
    files[0].rename(root / "a" / "without")
    files[1].rename(root / "a" / "y.export")
    image = Image.open(files[2])
    image.convert("RGB").save(root / "a" / "z.jfif", "JPEG")
    image.save(root / "a" / "moving.gif")
    (root / "a" / "note").write_text("BM: a note")
    (root / "a" / "annotation.json").write_text("{}")
    os.mkfifo(root / "a" / "pipe")
    images, ignored = trained_paths(root)
    assert [path for path in images if path.startswith("a/")] == ["a/" + name for name in (
        files[2].name, "without", "y.export", "z.jfif")]  # fmt: skip
    assert ignored == {
        "a/annotation.json": "not an image (.json)",
        "a/moving.gif": "GIF, which is not read: save it as JPEG or PNG",
        "a/note": "not an image by its content",
        "a/pipe": "is a pipe, expected an image file",
    }
    assert ([path for path, _ in predicted_paths(root)[0]], predicted_paths(root)[1]) == (images, ignored)


def test_files_without_a_suffix_that_a_run_has_read_are_not_opened_to_see_what_they_are(root, tmp_path, monkeypatch):
    monkeypatch.setattr("pylorus.data.fact_store.SETTLED_NS", 0)
    min((root / "a").iterdir()).rename(root / "a" / "export")
    reading = ReadOptions(store=tmp_path / "facts")
    first, _ = trained_paths(root, reading=reading)
    opened = []

    def open_and_note(path):
        opened.append(path)
        return read_head(path)

    monkeypatch.setattr("pylorus.data.walk.read_head", open_and_note)
    assert trained_paths(root, reading=reading)[0] == first
    assert opened == []
    (root / "a" / "export").write_text("no image any more")
    assert trained_paths(root, reading=reading)[1] == {"a/export": "not an image by its content"}


@pytest.mark.parametrize(
    "name",
    ["@eaDir", ".@__thumb", "#recycle", "@Recycle", "$RECYCLE.BIN", ".Trash-1000", "lost+found", "__MACOSX", "Previews",
     ["Lightroom", "Previews.lrdata"][1], ".git", ".thumbnails", "System Volume Information"],
)  # fmt: skip
def test_folders_that_systems_leave_are_not_read(root, name):
    expected = trained_paths(root)[0]
    for folder in (root, root / "a"):
        shutil.copytree(root / "b", folder / name)
    images, ignored = trained_paths(root)
    assert images == expected
    assert set(ignored) == {name, f"a/{name}"}
    assert (sorted(path for path, _ in predicted_paths(root)[0]), predicted_paths(root)[1]) == (images, ignored)


@pytest.mark.parametrize(
    "name", ["Thumbs.db", "desktop.ini", ".DS_Store", "._x.png", "x.png~", "x.png.bak", "x.png_original", "x.png.part",
             "x.png:Zone.Identifier", "DICOMDIR", "~$list.docx"]
)  # fmt: skip
def test_files_that_systems_leave_are_not_read(root, name):
    shutil.copy(next((root / "b").iterdir()), root / "a" / name)
    images, ignored = trained_paths(root)
    assert len(images) == 6
    assert list(ignored) == [f"a/{name}"]
    assert predicted_paths(root)[1] == ignored


def test_a_folder_that_cannot_be_listed_stops_a_run(root, monkeypatch):
    (root / "a" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PylorusError, match="a/locked/: can't be listed: Permission denied"):
        read_folders(root)
    with pytest.raises(PylorusError, match="a/locked/: can't be listed"):
        pack_shards(root, root.with_name("shards"))
    _, ignored = trained_paths(root, reading=ReadOptions(on_error="quarantine"))
    assert ignored == {"a/locked": "can't be listed: Permission denied"}


def test_a_name_is_the_same_composed_and_decomposed(root):
    composed, decomposed = "gastrite érosive", unicodedata.normalize("NFD", "gastrite érosive")
    (root / "a").rename(root / decomposed)
    catalog = read_folders(root, classes=[composed, "b"], group="(érosive|b)/patient_[0-9]+".replace("é", "e\u0301"))
    assert catalog.classes == (composed, "b")
    assert set(catalog.table["group"]) == {"érosive", "b"}
    assert {label for _, label in predicted_paths(root, (composed, "b"))[0]} == {0, 1}
    assert {label for _, label in predicted_paths(root, (decomposed, "b"))[0]} == {0, 1}
    moved = root.with_name("moved")
    shutil.copytree(root, moved)
    (moved / decomposed).rename(moved / composed)
    assert list(read_folders(moved).table["sample_id"]) == list(read_folders(root).table["sample_id"])
    assert resolve_unicode_form(root / composed) == root / decomposed
    shutil.copytree(root / decomposed, root / composed)
    with pytest.raises(PylorusError, match="the set was copied twice"):
        read_folders(root)


@pytest.mark.parametrize(("name", "named"), [("gastric\u00a0ulcer", r"gastric\\u00a0ulcer"), ("a\tb", r"a\\u0009b"),
                                             ("x" * 201, "found 201 characters")])  # fmt: skip
def test_class_names_that_a_bundle_can_not_have_are_refused_before_training(class_folders, name, named):
    table = class_folders({"a": 2, "b": 2}) / "table.csv"
    rows = [f"{path.relative_to(table.parent)},{name}" for path in sorted(table.parent.glob("a/*.png"))]
    rows += [f"{path.relative_to(table.parent)},b" for path in sorted(table.parent.glob("b/*.png"))]
    table.write_text("\n".join(["path,label", *rows]))
    with pytest.raises(PylorusError, match=named):
        read_manifest(table)


@pytest.mark.parametrize(("first", "second"), [("Ulcer", "ulcer"), ("gastric ulcer", "gastric_ulcer"), ("1", "1.0"),
                                               ("a b", "a  b"), ("Ａ", "A")])  # fmt: skip
def test_classes_that_only_look_alike_stop_the_run_with_both_spellings(class_folders, first, second):
    root = class_folders({first: 2, second: 2, "x": 2})
    with pytest.raises(PylorusError, match=r'classes ".*" and ".*" differ only in capitals, spaces'):
        read_folders(root)
    images = list_folder_files(root)
    result = audit(images, load_or_compute_facts(root, list(images.table["path"]), store=None), Thresholds())
    assert "classes-look-alike" in {finding.code for finding in result.findings}
    with pytest.raises(PylorusError, match="differ only in capitals"):
        pack_shards(root, root.with_name("shards"))


def test_a_folder_called_nan_is_no_class_unless_it_is_named(class_folders):
    root = class_folders({"a": 2, "b": 2, "nan": 2})
    with pytest.raises(PylorusError, match='found a class "nan"'):
        read_folders(root)
    assert read_folders(root, exclude=["nan"]).classes == ("a", "b")
    assert read_folders(root, classes=["a", "b", "nan"]).classes == ("a", "b", "nan")


def test_a_folder_that_looks_like_a_class_is_reported_by_predict(root, capsys):
    (root / "a").rename(root / "A")
    assert {label for _, label in predicted_paths(root)[0]} == {None, 1}
    assert 'a folder is called "A", which only looks like the class "a"' in capsys.readouterr().err
    with pytest.raises(PylorusError, match='--evaluate: a folder is called "A"'):
        predicted_paths(root, evaluate=True)


def test_predict_lists_the_files_that_it_does_not_use_beside_its_output(root, tmp_path):
    (root / "a" / "notes.txt").write_text("x")
    (root / "b" / "x.gif").write_bytes(b"GIF89a")
    parts = ResumableTable(tmp_path / "p.csv", {}, also={})
    with parts.lock_parts():
        with parts.list_ignored(Sources((str(root),), [("a",), ("b",)], None)) as sources:
            parts.add_part(pd.DataFrame({"path": [item.path for item in sources.iter_items()]}))
        record = parts.merge_parts({"images": 6}, columns=["path"])
    assert (record["ignored"], record["ignored_images"]) == (2, 1)
    [line] = format_ignored(record, tmp_path / "p.csv")
    assert line.startswith("2 other files or folders are not used, of which 1 may be an image")
    assert f"({tmp_path / 'p.csv.ignored.csv'} lists them" in line
    assert (tmp_path / "p.csv.ignored.csv").read_text().splitlines() == [
        "path,reason,may_be_image",
        f"{root}/a/notes.txt,not an image (.txt),no",
        f'{root}/b/x.gif,"GIF, which is not read: save it as JPEG or PNG",yes',
    ]


def test_a_class_folder_is_left_out_on_purpose(class_folders):
    root = class_folders({"a": 2, "b": 2, "basophil": 3, "empty": 1})
    shutil.rmtree(root / "empty")
    (root / "empty").mkdir()
    with pytest.raises(PylorusError, match="empty: there is no image in this class folder.*data.exclude"):
        read_folders(root, exclude=["basophil"])
    assert read_folders(root, exclude=["basophil", "empty"]).classes == ("a", "b")
    (root / "empty").rmdir()
    catalog = read_folders(root, exclude=["basophil"])
    assert catalog.classes == ("a", "b")
    assert catalog.excluded == {"basophil": 3}
    with pytest.raises(PylorusError, match='data.exclude names "basofil".*Did you mean "basophil"'):
        read_folders(root, exclude=["basofil"])


def test_split_folders_below_classes_are_the_split(class_folders):
    root = class_folders({f"{name}/{split}": 2 for name in "ab" for split in ("train", "Test")})
    table = split_catalog(read_folders(root), DataConfig()).table
    assert set(table.loc[table["path"].str.contains("/Test/"), "split"]) == {"test"}
    assert "test" not in set(table.loc[table["path"].str.contains("/train/"), "split"])
    assert set(list_folder_files(root).table["split"]) == {"train", "test"}


@pytest.mark.parametrize(
    "counts",
    [
        {"a/train": 2, "a/test": 2, "b": 2},
        {"a/train": 2, "a/test": 2, "b/train": 2},
        {"a/train": 2, "a/test": 2, "b/train": 2, "b/test": 2, "b/p1": 2},
        {"a/site/train": 2, "a/site/test": 2, "b": 2},
    ],
)
def test_split_folders_that_are_not_those_of_every_class_are_refused(class_folders, counts):
    with pytest.raises(PylorusError, match="below class folders, but not as CLASS/train/"):
        read_folders(class_folders(counts))


def test_a_class_of_one_patient_is_explained(class_folders):
    root = class_folders({"a/p1": 4, "b/p2": 2, "b/p3": 2, "b/p4": 2, "b/p5": 2})
    with pytest.raises(PylorusError) as caught:
        split_catalog(read_folders(root, group=r"/(p\d)/"), DataConfig())
    message = str(caught.value)
    assert 'class "a" has 1 patient ' in message
    assert "All its 4 images count as p1: check that data.group" in message
    assert "type 'data.exclude=[a]'" in message


def test_the_only_folder_of_a_root_is_suggested_if_it_holds_the_classes(class_folders):
    root = class_folders({"images/a": 2, "images/b": 2})
    with pytest.raises(PylorusError, match=f"type data.root={root}/images"):
        read_folders(root)


NAMES = ("x{}.png", "x{}.JPG", "x{}", "x{}.jfif", "x{}.dat", "x{}.txt", ".x{}.png", "._x{}.jpg", "x{}.png~", "ü{}.png",
         " x{} .png", "x{}.gif", "x{}.tar.gz", "x{}.png.part", "a.b{}.c.png", "Thumbs{}.db", "x{}\n.png", "x{}.PNG")  # fmt: skip
FOLDERS = (
    "a",
    "b",
    "a/p1",
    "b/p 2",
    "b/p1/deep/er",
    "a/@eaDir",
    "b/.hidden",
    "a/previews",
    "a/ü",
    "b/x.png",
    "b/#recycle",
)


def write_odd_files(root, count, seed):
    """Write `count` files with odd names and contents below two class folders, each readable image another one."""
    generator = np.random.default_rng(seed)
    source = root / "source"
    for number in range(count):
        folder = root / FOLDERS[generator.integers(len(FOLDERS))]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAMES[generator.integers(len(NAMES))].format(number)
        kind = generator.integers(8)
        pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        form = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")[generator.integers(6)]
        Image.fromarray(pixels).save(source, form)
        content = source.read_bytes()
        if kind == 0:
            content = content[: len(content) // 2]
        elif kind == 1:
            content = generator.bytes(300)
        elif kind == 2:
            content = b""
        path.write_bytes(content)
        if kind == 3:
            path.with_name(f"link{number}.png").symlink_to(path)
        elif kind == 4:
            path.with_name(f"broken{number}").symlink_to("nowhere")
    source.unlink()


def list_everything(root):
    """Every file below a folder, as `find -L` lists them, without following circles."""
    return {os.path.relpath(f"{folder}/{name}", root) for folder, _, names in os.walk(root) for name in names}


@pytest.mark.parametrize("seed", range(2))
def test_every_file_is_used_or_listed_with_a_reason_by_all_commands_alike(tmp_path, seed):
    root = tmp_path / "set"
    root.mkdir()
    write_odd_files(root, 150, seed)
    catalog = read_folders(root, reading=ReadOptions(on_error="quarantine"))
    used, unreadable = set(catalog.table["path"]), set(catalog.unreadable["path"])
    reasons = {each.path: each.reason for each in catalog.ignored}
    assert all(reasons.values())
    assert not catalog.unreadable["reason"].eq("").any()

    def is_listed(path):
        return path in used | unreadable | set(reasons) or any(
            path.startswith(folder) for folder in reasons if folder.endswith("/")
        )

    everything = list_everything(root)
    assert {path for path in everything if not is_listed(path)} == set()
    assert used
    assert unreadable
    assert used | unreadable <= everything

    images = list_folder_files(root)
    assert set(images.table["path"]) == used | unreadable
    assert {each.path: each.reason for each in images.ignored} == reasons
    result = audit(images, load_or_compute_facts(root, list(images.table["path"]), store=None), Thresholds())
    listed = convert_audit_to_json(result, names=True)["ignored"]
    assert {each["reason"] for each in listed} == set(reasons.values())

    items, ignored = predicted_paths(root)
    problems = {path.rstrip("/") for path, reason in reasons.items() if reason.startswith("can't be")}
    assert {path for path, _ in items} == used | unreadable | problems
    assert set(ignored) == {path.rstrip("/") for path in reasons} - problems

    for path in problems:
        (root / path).unlink()
    shards = pack_shards(root, tmp_path / "shards")
    members = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            members += [name for name in tar.getnames() if not name.endswith(".json")]
    assert len(members) == len(used | unreadable)
    assert len((tmp_path / "shards" / "ignored.csv").read_text().splitlines()) == len(reasons) - len(problems) + 1
