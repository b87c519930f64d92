"""Facts about files are computed once and found again by content; they are correct whatever happens to the store."""

import subprocess
import sys

import pytest

from pylorus.data import image_facts as module
from pylorus.data.image_facts import (
    MAX_SMALL_PARTS,
    FactStore,
    FactTable,
    compute_facts,
    extract_thumbnails,
    load_or_compute_facts,
)


@pytest.fixture
def listed(drawn):
    return drawn, sorted(path.relative_to(drawn).as_posix() for path in drawn.rglob("*.*"))


@pytest.fixture
def stored(listed, tmp_path):
    """A store with the facts of the synthetic images, and its only part."""
    store = tmp_path / "facts"
    load_or_compute_facts(*listed, store=store)
    (part,) = store.rglob("*.parquet")
    return store, part


@pytest.fixture
def examined(monkeypatch):
    """Counts how often a file was decoded."""
    times = []

    def counting(content):
        times.append(1)
        return compute_facts(content)

    monkeypatch.setattr(module, "compute_facts", counting)
    return times


def test_each_file_is_read_and_decoded_once(listed, tmp_path, examined, monkeypatch):
    read, plain = [], module.read_image_bytes
    monkeypatch.setattr(module, "read_image_bytes", lambda path: (read.append(path), plain(path))[1])
    load_or_compute_facts(*listed, store=tmp_path)
    assert len(read) == len(examined) == 30


def test_a_second_pass_decodes_nothing_and_gives_the_same(listed, tmp_path, examined):
    first = load_or_compute_facts(*listed, store=tmp_path)
    examined.clear()
    assert list(load_or_compute_facts(*listed, store=tmp_path)) == list(first)
    assert examined == []
    assert list(first) == list(load_or_compute_facts(*listed, store=None))


def test_a_renamed_file_is_known_and_a_changed_one_is_not(class_folders, tmp_path, examined):
    root = class_folders({"a": 3})
    first, second, third = sorted((root / "a").iterdir())
    load_or_compute_facts(root, [f"a/{path.name}" for path in (first, second, third)], store=tmp_path / "facts")
    examined.clear()
    first.rename(root / "a" / "other.png")
    second.write_bytes(third.read_bytes() + b"behind")
    load_or_compute_facts(root, ["a/other.png", f"a/{second.name}"], store=tmp_path / "facts")
    assert len(examined) == 1


@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied", "text", "folder", "gone", "other columns"])
def test_a_damaged_store_is_recomputed(listed, stored, harm, examined):
    store, part = stored
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
    assert list(load_or_compute_facts(*listed, store=store)) == list(load_or_compute_facts(*listed, store=None))
    examined.clear()
    load_or_compute_facts(*listed, store=store)
    assert len(examined) == 0


def test_facts_of_another_version_are_ignored(listed, stored, examined, monkeypatch):
    for name in ("VERSION", "POLICY_VERSION"):
        monkeypatch.setattr(module, name, 99)
        examined.clear()
        load_or_compute_facts(*listed, store=stored[0])
        assert len(examined) == 30


@pytest.mark.slow
def test_processes_may_share_a_store(listed, tmp_path):
    root, paths = listed
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
    store = FactStore(tmp_path, version=f"{module.VERSION}-{module.POLICY_VERSION}")
    assert len(store.read_digests()) == len({each.sha256 for each in load_or_compute_facts(root, paths, store=None)})


def test_new_images_are_added_in_parts_of_their_own_and_many_small_parts_are_joined(listed, tmp_path):
    root, paths = listed
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


def test_without_a_writable_cache_facts_are_computed(listed, tmp_path, caplog):
    (tmp_path / "facts").write_text("a file where the folder should be")
    assert all(each.readable for each in load_or_compute_facts(*listed, store=tmp_path / "facts"))
    assert "can't cache what was found" in caplog.text


def test_the_store_is_for_its_owner_only(stored):
    store, part = stored
    assert store.stat().st_mode & 0o077 == 0
    assert part.parent.stat().st_mode & 0o077 == 0


def test_a_table_gives_back_what_was_put_into_it(listed):
    root, paths = listed
    whole = [compute_facts((root / path).read_bytes()) for path in paths[:3]]
    table = FactTable(4)
    for place, facts in enumerate(whole):
        table.put(place, facts)
    assert table[:3] == whole
    assert not table[3].readable
    assert table.get_column("width").tolist() == [48, 48, 48, 0]
    assert (extract_thumbnails(table, [2, 0]) == extract_thumbnails([whole[2], whole[0]])).all()


def test_an_interrupted_pass_saves_its_facts(listed, tmp_path, monkeypatch):
    root, paths = listed
    monkeypatch.setattr(module, "BLOCK", 5)
    looked, examine = [], module.compute_facts

    def interrupted(content):
        looked.append(content)
        if len(looked) > 12:
            raise KeyboardInterrupt
        return examine(content)

    monkeypatch.setattr(module, "compute_facts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_or_compute_facts(root, paths, store=tmp_path)
    assert len(FactStore(tmp_path, version=f"{module.VERSION}-{module.POLICY_VERSION}").read_digests()) >= 10
