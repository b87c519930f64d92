"""Facts about files are computed once and found again by content; they are correct whatever happens to the store."""

import hashlib
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pylorus.config.schema import CacheConfig
from pylorus.core import distributed
from pylorus.data import fact_store as fact_store_module
from pylorus.data import image_facts as module
from pylorus.data.fact_store import MAX_SMALL_PARTS, FactStore, FactTable, extract_thumbnails
from pylorus.data.image_facts import analyze_content, compute_facts, load_or_compute_facts
from pylorus.data.input_format import ImageWriter, InputFormat, load_or_decode_images
from pylorus.data.synthetic import generate_image_set


@pytest.fixture
def root_and_paths(synthetic_root):
    return synthetic_root, sorted(path.relative_to(synthetic_root).as_posix() for path in synthetic_root.rglob("*.*"))


@pytest.fixture
def fact_store(root_and_paths, tmp_path):
    """A store with the facts of the synthetic images, and its only part."""
    store = tmp_path / "facts"
    load_or_compute_facts(*root_and_paths, store=store)
    (part,) = store.rglob("*.parquet")
    return store, part


@pytest.fixture
def decoded_files(monkeypatch):
    """Counts how often a file was decoded."""
    times = []

    def counting(content):
        times.append(1)
        return analyze_content(content)

    monkeypatch.setattr(module, "analyze_content", counting)
    return times


def test_each_file_is_read_and_decoded_once(root_and_paths, tmp_path, decoded_files, monkeypatch):
    read, plain = [], module.read_image_bytes
    monkeypatch.setattr(module, "read_image_bytes", lambda path: (read.append(path), plain(path))[1])
    load_or_compute_facts(*root_and_paths, store=tmp_path)
    assert len(read) == len(decoded_files) == 30


def test_a_second_pass_decodes_nothing_and_gives_the_same(root_and_paths, tmp_path, decoded_files):
    first = load_or_compute_facts(*root_and_paths, store=tmp_path)
    decoded_files.clear()
    assert list(load_or_compute_facts(*root_and_paths, store=tmp_path)) == list(first)
    assert decoded_files == []
    assert list(first) == list(load_or_compute_facts(*root_and_paths, store=None))


def test_a_renamed_file_is_known_and_a_changed_one_is_not(class_folders, tmp_path, decoded_files):
    root = class_folders({"a": 3})
    first, second, third = sorted((root / "a").iterdir())
    load_or_compute_facts(root, [f"a/{path.name}" for path in (first, second, third)], store=tmp_path / "facts")
    decoded_files.clear()
    first.rename(root / "a" / "other.png")
    second.write_bytes(third.read_bytes() + b"behind")
    load_or_compute_facts(root, ["a/other.png", f"a/{second.name}"], store=tmp_path / "facts")
    assert len(decoded_files) == 1


@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied", "text", "folder", "gone", "other columns"])
def test_a_damaged_store_is_recomputed(root_and_paths, fact_store, harm, decoded_files):
    store, part = fact_store
    content = part.read_bytes()
    if harm in ("folder", "gone"):
        part.unlink()
        if harm == "folder":
            part.mkdir()
    elif harm == "other columns":
        import pandas as pd

        pd.DataFrame({"sha256": ["a"]}).to_parquet(part)
    else:
        at = len(content) // 2
        flipped = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        part.write_bytes({"flipped": flipped, "cut": content[:at], "emptied": b"", "text": b"no table"}[harm])
    assert list(load_or_compute_facts(*root_and_paths, store=store)) == list(
        load_or_compute_facts(*root_and_paths, store=None)
    )
    decoded_files.clear()
    load_or_compute_facts(*root_and_paths, store=store)
    assert len(decoded_files) == 0


def test_facts_of_another_version_are_ignored(root_and_paths, fact_store, decoded_files, monkeypatch):
    for name in ("VERSION", "DECODER_VERSION"):
        monkeypatch.setattr(module, name, 99)
        decoded_files.clear()
        load_or_compute_facts(*root_and_paths, store=fact_store[0])
        assert len(decoded_files) == 30


@pytest.mark.slow
def test_processes_may_share_a_store(root_and_paths, tmp_path):
    root, paths = root_and_paths
    program = (
        "import sys, pathlib\nfrom pylorus.data.image_facts import load_or_compute_facts\n"
        "root, store, *paths = sys.argv[1:]\n"
        "for end in range(5, len(paths) + 1, 5):\n"
        "    assert all(each.readable for each in load_or_compute_facts(pathlib.Path(root), paths[:end], store=pathlib.Path(store)))\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(root), str(tmp_path), *order])
        for order in (paths, paths[::-1])
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    store = FactStore(tmp_path, version=f"{module.VERSION}-{module.DECODER_VERSION}")
    assert len(store.read_digests()) == len({each.sha256 for each in load_or_compute_facts(root, paths, store=None)})


def test_new_images_are_added_in_parts_of_their_own_and_many_small_parts_are_joined(root_and_paths, tmp_path):
    root, paths = root_and_paths
    store = FactStore(tmp_path, version="1")
    table = list(load_or_compute_facts(root, paths, store=None))
    for number in range(MAX_SMALL_PARTS):
        store.add(table[number % 30 : number % 30 + 1])
        store.close()
    assert len(list(tmp_path.rglob("*.parquet"))) == MAX_SMALL_PARTS
    store.add(table[-1:])
    store.close()
    assert len(list(tmp_path.rglob("*.parquet"))) == 1
    assert len(store.read_digests()) == 30


def test_unreadable_files_are_not_cached(class_folders, tmp_path):
    root = class_folders({"a": 1})
    (root / "a" / "bad.png").write_bytes(b"no image")
    table = load_or_compute_facts(root, ["a/bad.png", "a/gone.png"], store=tmp_path / "facts")
    assert [each.readable for each in table] == [False, False]
    assert table[0].sha256
    assert not table[1].sha256
    assert "No such file" in table[1].problem
    assert not list((tmp_path / "facts").rglob("*.parquet"))


def test_without_a_writable_cache_facts_are_computed(root_and_paths, tmp_path, caplog):
    (tmp_path / "facts").write_text("a file where the folder should be")
    assert all(each.readable for each in load_or_compute_facts(*root_and_paths, store=tmp_path / "facts"))
    assert "can't cache what was found" in caplog.text


def test_the_store_is_for_its_owner_only(fact_store):
    store, part = fact_store
    assert store.stat().st_mode & 0o077 == 0
    assert part.parent.stat().st_mode & 0o077 == 0


def test_a_table_gives_back_what_was_put_into_it(root_and_paths):
    root, paths = root_and_paths
    whole = [compute_facts((root / path).read_bytes()) for path in paths[:3]]
    table = FactTable(4)
    for place, facts in enumerate(whole):
        table.put(place, facts)
    assert table[:3] == whole
    assert not table[3].readable
    assert table.get_column("width").tolist() == [48, 48, 48, 0]
    assert (extract_thumbnails(table, [2, 0]) == extract_thumbnails([whole[2], whole[0]])).all()


def test_an_interrupted_pass_saves_its_facts(root_and_paths, tmp_path, monkeypatch):
    root, paths = root_and_paths
    monkeypatch.setattr(module, "BLOCK", 5)
    monkeypatch.setattr(distributed, "count_free_cores", lambda: 1)  # several threads may begin with any file
    looked, examine = [], module.analyze_content

    def interrupted(content):
        looked.append(content)
        if len(looked) > 12:
            raise KeyboardInterrupt
        return examine(content)

    monkeypatch.setattr(module, "analyze_content", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_or_compute_facts(root, paths, store=tmp_path)
    assert len(FactStore(tmp_path, version=f"{module.VERSION}-{module.DECODER_VERSION}").read_digests()) >= 10


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once, not only two seconds after their last change."""
    monkeypatch.setattr(fact_store_module, "SETTLED_NS", 0)


@pytest.fixture
def read_paths(monkeypatch):
    """Names of the files that were read."""
    names, plain = [], module.read_image_bytes
    monkeypatch.setattr(module, "read_image_bytes", lambda path: (names.append(path.name), plain(path))[1])
    return names


def test_a_second_pass_reads_no_file(root_and_paths, tmp_path, settled, read_paths):
    first = load_or_compute_facts(*root_and_paths, store=tmp_path)
    read_paths.clear()
    assert list(load_or_compute_facts(*root_and_paths, store=tmp_path)) == list(first)
    assert read_paths == []


def test_a_file_that_changed_just_now_is_read_again(class_folders, tmp_path, read_paths):
    root = class_folders({"a": 2})
    paths = sorted(f"a/{path.name}" for path in (root / "a").iterdir())
    for _ in range(2):
        load_or_compute_facts(root, paths, store=tmp_path / "facts")
    assert len(read_paths) == 4


def test_verify_content_reads_every_file(root_and_paths, tmp_path, settled, read_paths, decoded_files):
    load_or_compute_facts(*root_and_paths, store=tmp_path)
    read_paths.clear()
    decoded_files.clear()
    load_or_compute_facts(*root_and_paths, store=tmp_path, verify="content")
    assert (len(read_paths), len(decoded_files)) == (30, 0)


def test_another_content_of_the_same_size_and_modification_time_is_noticed(
    class_folders, tmp_path, settled, read_paths
):
    root = class_folders({"a": 2})
    first, second = sorted((root / "a").iterdir())
    paths = [f"a/{path.name}" for path in (first, second)]
    content = first.read_bytes()
    second.write_bytes(content)
    load_or_compute_facts(root, paths, store=tmp_path / "facts")
    status = second.stat()
    changed = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
    second.write_bytes(changed)
    os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns))
    read_paths.clear()
    table = load_or_compute_facts(root, paths, store=tmp_path / "facts")
    assert read_paths == [second.name]
    assert table[1].sha256 == hashlib.sha256(changed).hexdigest()


def test_the_index_of_files_names_no_path(class_folders, tmp_path, settled):
    root = class_folders({"miller_anna": 2})
    paths = [f"miller_anna/{path.name}" for path in (root / "miller_anna").iterdir()]
    load_or_compute_facts(root, paths, store=tmp_path / "facts")
    (index,) = (tmp_path / "facts").rglob("*.npy")
    assert b"miller" not in index.read_bytes()
    assert "miller" not in str(index.relative_to(tmp_path))


@pytest.mark.parametrize("harm", ["cut", "emptied", "text", "folder"])
def test_a_damaged_index_of_files_is_ignored(root_and_paths, tmp_path, settled, harm):
    first = list(load_or_compute_facts(*root_and_paths, store=tmp_path))
    (index,) = tmp_path.rglob("*.npy")
    content = index.read_bytes()
    index.unlink()
    if harm == "folder":
        index.mkdir()
    else:
        index.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "text": b"no array"}[harm])
    assert list(load_or_compute_facts(*root_and_paths, store=tmp_path)) == first


def test_a_pass_saves_the_networks_input_of_large_images(tmp_path):
    root = tmp_path / "images"
    generate_image_set(root, images=2, size=96, seed=0)
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))
    form, settings = InputFormat(32, "pad", "bicubic"), CacheConfig(folder=str(tmp_path / "cache"))
    writer = ImageWriter(form, settings)
    facts = load_or_compute_facts(root, paths, store=tmp_path / "facts", images=writer)
    columns = {name: facts.get_column(name) for name in ("sha256", "width", "height")}
    records = load_or_decode_images(pd.DataFrame({"path": paths, **columns}), root, form, settings)
    assert records is not None
    assert records.computed == 0
    expected = form.load_images([root / path for path in paths])
    assert (records.read_rows(range(len(paths))).reshape(expected.shape) == expected).all()


def test_a_pass_saves_no_input_of_small_images(root_and_paths, tmp_path):
    writer = ImageWriter(InputFormat(48, "pad", "bicubic"), CacheConfig(folder=str(tmp_path / "cache")))
    load_or_compute_facts(*root_and_paths, store=tmp_path / "facts", images=writer)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_networks_input_is_saved_from_when_its_format_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    for name, value in {"PROBE": 4, "LEAST_SECONDS": 0, "CHUNK": 2, "AHEAD": 1, "count_free_cores": lambda: 2}.items():
        monkeypatch.setattr(distributed, name, value)  # then processes read, which were forked before it is known
    root = tmp_path / "images"
    generate_image_set(root, images=20, size=96, seed=0)
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))
    form, settings = InputFormat(32, "pad", "bicubic"), CacheConfig(folder=str(tmp_path / "cache"))
    answers = iter([None, None, form])
    writer = ImageWriter(None, settings, find_form=lambda: next(answers))
    facts = load_or_compute_facts(root, paths, store=tmp_path / "facts", images=writer)
    columns = {name: facts.get_column(name) for name in ("sha256", "width", "height")}
    records = load_or_decode_images(pd.DataFrame({"path": paths, **columns}), root, form, settings)
    assert records is not None
    assert 8 <= records.computed < len(paths) - 4
    expected = form.load_images([root / path for path in paths])
    assert (records.read_rows(range(len(paths))).reshape(expected.shape) == expected).all()


@pytest.mark.slow
def test_processes_that_read_learn_that_there_is_no_space_for_images(tmp_path):
    form, image = InputFormat(32, "pad", "bicubic"), np.zeros((96, 96, 3), np.uint8)
    writer = ImageWriter(form, CacheConfig(folder=str(tmp_path), budget_gib=1e-6))
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def answer():
        while there.recv():
            there.send(writer.prepare(image) is None)

    reader = context.Process(target=answer, daemon=True)
    reader.start()
    here.send("before")
    assert not here.recv()
    writer.save(["0" * 64], [form.prepare_image(image)])
    here.send("after")
    assert here.recv()
    assert writer.prepare(image) is None
    here.send(None)
    reader.join()


@pytest.mark.parametrize("crop", ["none", "auto"])
@pytest.mark.parametrize("shape", [(1030, 1040), (1031, 1040), (900, 3000)])
def test_the_input_saved_by_a_pass_is_that_of_the_file_read_alone(tmp_path, shape, crop):
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    frame[:, :200] = 0
    Image.fromarray(frame).save(tmp_path / "frame.bmp")
    form = InputFormat(64, "pad", "bicubic", crop)
    saved = {}

    class Images(ImageWriter):
        def save(self, digests, images):
            saved.update(zip(digests, images, strict=True))

    images = Images(form, CacheConfig(folder=str(tmp_path / "cache")))
    facts = load_or_compute_facts(tmp_path, ["frame.bmp"], store=None, images=images)
    assert np.array_equal(saved[facts[0].sha256], form.load_image(tmp_path / "frame.bmp"))
