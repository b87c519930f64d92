"""Copies stay in one split if Pylorus makes it, are refused if the split is given, and reported if accepted."""

import io
import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from pylorus.config.schema import DataConfig
from pylorus.core.errors import PylorusError
from pylorus.data.audit import audit
from pylorus.data.audit_findings import Thresholds, count_leaks
from pylorus.data.catalog import read_folders
from pylorus.data.image_facts import compute_facts, load_or_compute_facts
from pylorus.data.leakage import Copies, DescriptorCells, collect_copy_pairs, find_copies, merge_linked_groups
from pylorus.data.sources import list_folder_files
from pylorus.data.split import split_catalog
from pylorus.data.synthetic import generate_frame

NONE = Copies((), (), (), (), ())


FIRST_SPLIT = (
    ["patient_0009", "patient_0011", "patient_0013"],
    ["patient_0003", "patient_0005", "patient_0007"],
)
"""Test and validation patients of the drawn images by split seed 0: a split that was published stays."""


def frame(number, *, label="gastric_ulcer"):
    return generate_frame(label, seed=number, size=96).image


@pytest.fixture
def frames(tmp_path):
    """Create folders of synthetic frames, each of another patient."""

    def make(counts):
        number = 0
        for folder, count in counts.items():
            (tmp_path / folder).mkdir(parents=True)
            for _ in range(count):
                number += 1
                label = "gastric_ulcer" if folder.endswith("a") else "gastric_cancer"
                Image.fromarray(frame(number, label=label)).save(tmp_path / folder / f"{number:03d}.png")
        return tmp_path

    return make


def copied(path, kind, place):
    """A copy of an image of some kind, in another file."""
    image = np.asarray(Image.open(path))
    place.parent.mkdir(exist_ok=True, parents=True)
    if kind == "file":
        shutil.copy(path, place)
    elif kind == "pixels":
        Image.fromarray(image).save(place, compress_level=1)
    else:
        made = {
            "saved anew": image,
            "scaled": cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA),
            "rotated": np.rot90(image),
        }[kind]
        Image.fromarray(np.ascontiguousarray(made)).save(place.with_suffix(".jpg"), quality=90)


KINDS = ["file", "pixels", "saved anew", "scaled", "rotated"]
GIVEN = {f"{part}/{name}": 3 for part in ("train", "val", "test") for name in "ab"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_keeps_copies_together(frames, kind):
    root = frames({"a": 20, "b": 20})
    for original in sorted((root / "a").iterdir())[:6]:
        copied(original, kind, root / "a" / f"{original.stem}-again.png")
    catalog = read_folders(root)
    for seed in range(6):
        for data in (DataConfig(split_seed=seed), DataConfig(split_seed=seed, fold=seed % 5)):
            table = split_catalog(catalog, data).table
            number = table["path"].str.extract(r"(\d+)", expand=False)
            assert (table.groupby(number)["split"].nunique() == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_two_given_splits_stops_the_run_and_names_both(frames, kind):
    root = frames(GIVEN)
    original = sorted((root / "train/a").iterdir())[0]
    copied(original, kind, root / "test" / "a" / "leak.png")
    catalog = read_folders(root)
    name = "leak.png" if kind in ("file", "pixels") else "leak.jpg"
    with pytest.raises(PylorusError) as caught:
        split_catalog(catalog, DataConfig())
    said = str(caught.value)
    assert re.search(rf"test/a/{name} and train/a/001.png: |train/a/001.png and test/a/{name}: ", said)
    assert "data.accept_leaks=true" in said
    found = split_catalog(catalog, DataConfig(accept_leaks=True)).leaks
    wanted = kind if kind in ("file", "pixels") else "near"
    assert {name: count for name, count in count_leaks(found).items() if count} == {wanted: 1}


def test_a_copy_within_one_given_split_is_accepted(frames):
    root = frames(GIVEN)
    shutil.copy(root / "train/a/001.png", root / "train/a/again.png")
    assert split_catalog(read_folders(root), DataConfig()).leaks == ()


def test_a_validation_split_drawn_from_given_training_images_keeps_copies_together(frames):
    root = frames({"train/a": 12, "train/b": 12, "test/a": 3, "test/b": 3})
    for original in sorted((root / "train/a").iterdir())[:5]:
        copied(original, "saved anew", root / "train" / "a" / f"{original.stem}-again.png")
    for seed in range(5):
        assert split_catalog(read_folders(root), DataConfig(split_seed=seed)).leaks == ()


@pytest.mark.parametrize("kind", ["file", "pixels"])
def test_one_content_under_two_labels_is_refused_by_name(frames, kind):
    root = frames({"a": 5, "b": 5})
    copied(root / "a" / "001.png", kind, root / "b" / "wrong.png")
    with pytest.raises(
        PylorusError, match=r"different labels:\n  a/001.png \(a\) and b/wrong.png \(b\): identical"
    ) as caught:
        split_catalog(read_folders(root), DataConfig(accept_leaks=True))
    assert "remove that file" in str(caught.value)


def test_copies_link_patients_transitively(frames):
    root = frames({"a/p1": 2, "a/p2": 2, "a/p3": 2, "a/p4": 2, "b/p5": 1, "b/p6": 1})
    copied(root / "a/p1/001.png", "file", root / "a/p2/x.png")
    copied(root / "a/p2/003.png", "saved anew", root / "a/p3/y.png")
    catalog = read_folders(root, group=r"p\d+")
    joined = merge_linked_groups(catalog, collect_copy_pairs(catalog, find_copies(catalog.facts, Thresholds())))
    told = dict(zip(catalog.table["group"], joined, strict=True))
    assert told == {"p1": "p1", "p2": "p1", "p3": "p1", "p4": "p4", "p5": "p5", "p6": "p6"}


def test_a_split_without_copies_is_unchanged_from_earlier_versions(synthetic_root):
    catalog = read_folders(synthetic_root, group=r"patient_\d+")
    assert list(merge_linked_groups(catalog, [])) == list(catalog.table["group"])
    for table in (split_catalog(catalog, DataConfig(), copies=NONE).table, split_catalog(catalog, DataConfig()).table):
        chosen = {part: sorted(set(rows["group"])) for part, rows in table.groupby("split")}
        assert (chosen["test"], chosen["val"]) == FIRST_SPLIT


def test_the_copies_of_a_known_set_are_found_in_the_cache(frames, tmp_path_factory):
    store = tmp_path_factory.mktemp("facts")
    root = frames({"a": 6, "b": 3})
    originals = sorted((root / "a").iterdir())
    for kind, original in zip(KINDS, originals, strict=False):
        copied(original, kind, root / "a" / f"{original.stem}-again.png")
    facts = read_folders(root).facts
    expected = find_copies(facts, Thresholds())
    assert expected.near
    assert find_copies(facts, Thresholds(), store=store) == expected
    (cached,) = store.rglob("*.json")
    assert find_copies(facts, Thresholds(), store=store) == expected
    cached.write_text('{"near": 3}')
    assert find_copies(facts, Thresholds(), store=store) == expected
    assert find_copies(facts, Thresholds(likeness=1.0), store=store).near != expected.near
    assert find_copies(list(facts)[:5], Thresholds(), store=store) != expected
    assert len(list(store.rglob("*.json"))) == 3


def changed(image, name):
    """An image that was cropped or rotated by a few degrees, as another program would save it."""
    height, width = image.shape[:2]
    rows, columns = round(0.05 * height), round(0.05 * width)
    turned = cv2.warpAffine(image, cv2.getRotationMatrix2D((width / 2, height / 2), 3, 1), (width, height))
    return {
        "cropped": image[rows:-rows, columns:-columns],
        "cropped and mirrored": image[rows:-rows, -columns:columns:-1],
        "cropped at a corner": image[2 * rows :, : -2 * columns],
        "rotated by 3°": turned,
    }[name]


@pytest.mark.parametrize("name", ["cropped", "cropped and mirrored", "cropped at a corner", "rotated by 3°"])
def test_a_cropped_or_slightly_rotated_copy_is_found(tmp_path, name):
    images = [generate_frame("gastric_ulcer", seed=seed, size=256).image for seed in range(10)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index:02d}.jpg", quality=90)
        Image.fromarray(np.ascontiguousarray(changed(image, name))).save(tmp_path / f"{index:02d}-copy.jpg", quality=85)
    facts = [compute_facts(path.read_bytes()) for path in sorted(tmp_path.iterdir())]
    pairs = {(each.first, each.second) for each in find_copies(facts, Thresholds()).near}
    assert pairs == {(2 * index, 2 * index + 1) for index in range(len(images))}


def test_two_views_of_one_place_are_no_copies():
    rng = np.random.default_rng(2)
    scene = cv2.GaussianBlur(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8), (0, 0), 6)
    scene = cv2.normalize(scene, None, 30, 250, cv2.NORM_MINMAX)
    content = [io.BytesIO(), io.BytesIO()]
    for file, left in zip(content, (0, 40), strict=True):
        Image.fromarray(scene[20:276, left : left + 256]).save(file, "PNG")
    assert find_copies([compute_facts(file.getvalue()) for file in content], Thresholds()).near == ()


def test_neighbors_in_a_large_set_are_those_of_a_comparison_of_all_pairs():
    rng = np.random.default_rng(3)
    known = rng.normal(size=(9000, 35)).astype(np.float32)
    queries = known + 0.4 * rng.normal(size=known.shape).astype(np.float32)
    known, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (known, queries[::-1].copy()))
    cells = DescriptorCells(known)
    assert len(cells.members) > 1
    pairs, cosines = cells.find_neighbors(queries, least=0.85, most=8)
    assert np.allclose(cosines, (queries[pairs[:, 0]] * known[pairs[:, 1]]).sum(axis=1), atol=1e-5)
    expected = {(row, column) for row, column in np.argwhere(queries @ known.T >= 0.85).tolist() if row != column}
    assert len(expected & set(map(tuple, pairs.tolist()))) >= 0.95 * len(expected)


def test_run_and_audit_count_leaks_in_the_same_way(frames):
    root = frames(GIVEN)
    first, second = sorted((root / "test/a").iterdir())[:2]
    for copy in ("x.png", "y.png"):
        shutil.copy(first, root / "train/a" / copy)
    copied(first, "pixels", root / "val/a/z.png")
    copied(second, "saved anew", root / "train/a/again.jpg")
    shutil.copy(second, root / "test/a/twice.png")
    images = list_folder_files(root)
    findings = audit(images, load_or_compute_facts(root, list(images.table["path"]), store=None), Thresholds()).findings
    audited = {each.code: len(each.items) for each in findings if each.severity == "leak"}
    counts = count_leaks(split_catalog(read_folders(root), DataConfig(accept_leaks=True)).leaks)
    assert counts == {"patient": 0, "file": 1, "pixels": 0, "near": 1}
    assert audited == {"copy-across-splits": 1, "near-copy-across-splits": 1}
