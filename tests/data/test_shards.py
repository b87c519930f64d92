"""Shards give the same images, order and evaluation as class folders, wherever they are stored; errors in shards."""

import io
import json
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from pylorus.config.schema import CONF, AugmentConfig, CacheConfig, DataConfig
from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.data import sources
from pylorus.data.catalog import ReadOptions, read_folders
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.dataset import ShardWindows
from pylorus.data.files import read_image_bytes
from pylorus.data.input_format import InputFormat
from pylorus.data.sources import pack_shards, read_shard_catalog
from pylorus.data.split import split_catalog

GROUP = r"patient_\d+"
POLICY = AugmentConfig(**yaml.safe_load((CONF / "augment" / "light.yaml").read_text()))


@pytest.fixture(scope="module")
def shard_folder(synthetic_root, tmp_path_factory):
    """The synthetic images in four shards; do not write to them."""
    output = tmp_path_factory.mktemp("packed") / "shards"
    pack_shards(synthetic_root, output, group=GROUP, per_shard=8)
    return output


@pytest.fixture
def read_catalog(tmp_path):
    return lambda root, **further: read_shard_catalog(str(root), index=tmp_path / "index", **further)


@pytest.fixture
def write_shard(synthetic_root, tmp_path):
    """Write a shard with members by name; `IMAGE` stands for a synthetic image."""
    image = next(synthetic_root.rglob("*.*g")).read_bytes()

    def write(members, name="a.tar"):
        path = tmp_path / "made" / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                content = image if content == "IMAGE" else content.encode()
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return path

    return write


def module_of(catalog, *, workers=0, window=None, batch_size=4):
    table = split_catalog(catalog, DataConfig(val_fraction=0.2, test_fraction=0.2)).table
    return ImageDataModule.from_table(
        table,
        catalog.root,
        InputFormat(32, "pad", "bilinear"),
        batch_size=batch_size,
        workers=workers,
        policy=POLICY,
        seed=0,
        cache=CacheConfig(images=False),
        shard_window=window,
    )


def seen(module, part="train", epoch=1):
    loader = module.build_loader(part)
    loader.batch_sampler.sampler.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([batch.row for batch in batches]), torch.cat([batch.image for batch in batches])


def test_the_catalog_is_that_of_the_class_folders(synthetic_root, shard_folder, read_catalog):
    folders, shards = read_folders(synthetic_root, group=GROUP), read_catalog(shard_folder)
    pd.testing.assert_frame_equal(shards.table, folders.table, check_dtype=False)
    assert shards.classes == folders.classes
    assert shards.grouped


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_class_folders_for_any_number_of_workers(
    synthetic_root, shard_folder, read_catalog, part, workers
):
    rows, pixels = seen(module_of(read_folders(synthetic_root, group=GROUP)), part)
    same_rows, same_pixels = seen(module_of(read_catalog(shard_folder), workers=workers), part)
    assert torch.equal(rows, same_rows)
    assert torch.equal(pixels, same_pixels)


def test_packing_twice_gives_the_same_bytes(synthetic_root, shard_folder, tmp_path):
    again = pack_shards(synthetic_root, tmp_path / "again", group=GROUP, per_shard=8)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in sorted(shard_folder.glob("*.tar"))]


def test_a_manifest_is_packed_with_its_further_columns(synthetic_root, tmp_path, read_catalog):
    paths = sorted(path.relative_to(synthetic_root).as_posix() for path in synthetic_root.rglob("*.*g"))
    table = pd.DataFrame({"path": paths, "label": [path.split("/")[0] for path in paths]})
    table["site"] = ["A" if number % 2 else "" for number in range(len(table))]
    (tmp_path / "images").symlink_to(synthetic_root)
    table.assign(path="images/" + table["path"]).to_csv(tmp_path / "set.csv", index=False)
    pack_shards(tmp_path / "set.csv", tmp_path / "out")
    assert list(read_catalog(tmp_path / "out").table["about/site"]) == list(table["site"])


def test_windows_read_shard_by_shard_and_cover_every_image():
    windows = ShardWindows(np.repeat(np.arange(10, dtype=np.int32), 7)[np.random.default_rng(1).permutation(70)], 2)
    order = windows.generate_order(np.random.default_rng(3))
    assert sorted(order) == list(range(70))
    for start in range(0, 70, 14):
        assert len(set(windows.shards[order[start : start + 14]])) == 2
    assert list(order) != list(windows.generate_order(np.random.default_rng(4)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_in_windows_depends_only_on_seed_and_epoch(shard_folder, read_catalog, workers):
    rows, pixels = seen(module_of(read_catalog(shard_folder), window=1))
    same, same_pixels = seen(module_of(read_catalog(shard_folder), window=1, workers=workers))
    assert torch.equal(rows, same)
    assert torch.equal(pixels, same_pixels)
    assert not torch.equal(rows, seen(module_of(read_catalog(shard_folder), window=1), epoch=2)[0])


def test_a_second_start_reads_no_shard(shard_folder, tmp_path, monkeypatch):
    start = partial(
        read_shard_catalog, str(shard_folder), index=tmp_path, reading=ReadOptions(store=tmp_path / "facts")
    )
    first = start()
    monkeypatch.setattr("pylorus.data.shards.open_shard", lambda shard: pytest.fail("indexed again"))
    monkeypatch.setattr("pylorus.data.shards.read_range", lambda *_: pytest.fail("read again"))
    second = start()
    pd.testing.assert_frame_equal(first.table, second.table)
    assert [each.pixels for each in first.facts] == [each.pixels for each in second.facts]


def test_a_damaged_index_is_built_again(shard_folder, tmp_path, read_catalog):
    before = read_catalog(shard_folder).table
    for path in (tmp_path / "index").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    pd.testing.assert_frame_equal(read_catalog(shard_folder).table, before)


def test_interrupted_indexing_continues(shard_folder, tmp_path, monkeypatch):
    true, names = sources.load_shard_index, []

    def dies(shard, folder):
        if shard.name.endswith("2.tar"):
            raise KeyboardInterrupt
        return true(shard, folder)

    monkeypatch.setattr(sources, "load_shard_index", dies)
    with pytest.raises(KeyboardInterrupt):
        read_shard_catalog(str(shard_folder), index=tmp_path / "index")
    monkeypatch.setattr(sources, "load_shard_index", true)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    assert done
    assert all(path.suffix == ".parquet" and not path.name.startswith(".") for path in done)
    opened = sources.load_shard_index.__globals__["open_shard"]
    monkeypatch.setattr("pylorus.data.shards.open_shard", lambda shard: (names.append(shard.name), opened(shard))[1])
    assert len(read_shard_catalog(str(shard_folder), index=tmp_path / "index").table) == 30
    assert len(names) == 4 - len(done)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())


class Ranges(SimpleHTTPRequestHandler):
    """Serves a folder with ranges, as object stores do; Python's own server knows none."""

    def do_GET(self):
        content = (self.directory / self.path.lstrip("/")).read_bytes()
        start, end = 0, len(content) - 1
        wanted = self.headers.get("Range") if self.server.ranges else None
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or end), end)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(content[start : end + 1])

    def __init__(self, *arguments, directory):
        self.directory = directory
        super(SimpleHTTPRequestHandler, self).__init__(*arguments)

    def log_message(self, *_):
        pass


@pytest.fixture
def shard_server(shard_folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=shard_folder))
    server.ranges = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_a_web_server_give_the_same_batches(shard_folder, shard_server, read_catalog, workers):
    url = f"http://127.0.0.1:{shard_server.server_port}/shard-{{000000..000003}}.tar"
    rows, pixels = seen(module_of(read_catalog(shard_folder)))
    same_rows, same_pixels = seen(module_of(read_catalog(url), workers=workers))
    assert torch.equal(rows, same_rows)
    assert torch.equal(pixels, same_pixels)


def test_a_server_without_range_requests_is_refused(shard_server, read_catalog):
    shard_server.ranges = False
    with pytest.raises(PylorusError, match=r"shard-000000\.tar"):
        read_catalog(f"http://127.0.0.1:{shard_server.server_port}/shard-{{000000..000003}}.tar")


def test_shards_in_any_fsspec_store_are_read(shard_folder, synthetic_root, read_catalog):
    for path in shard_folder.glob("*.tar"):
        fsspec.filesystem("memory").pipe(f"/set/{path.name}", path.read_bytes())
    catalog = read_catalog("memory://set/shard-{000000..000003}.tar")
    assert list(catalog.table["sha256"]) == list(read_folders(synthetic_root).table["sha256"])


def label(name):
    return json.dumps({"label": name})


GOOD = [("x.png", "IMAGE"), ("x.json", label("a")), ("y.png", "IMAGE"), ("y.json", label("b"))]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([*GOOD, ("z.json", label("a"))], r"a\.tar, key z: has no image .*only json"),
        ([*GOOD, ("z.png", "IMAGE")], r"a\.tar, key z: has no label"),
        ([*GOOD, ("x.png", "IMAGE"), ("x.cls", "a")], r"a\.tar, key x: occurs twice"),
        ([*GOOD, ("z.png", "IMAGE"), ("z.png", "IMAGE")], r"a\.tar, key z: has two png files"),
        ([*GOOD, ("z.png", "IMAGE"), ("z.jpg", "IMAGE")], r"a\.tar, key z: has two images"),
        ([*GOOD, ("z.png", "IMAGE"), ("z.json", "{")], r"a\.tar, key z: can't read its \.json"),
        ([*GOOD, ("z.png", "IMAGE"), ("z.json", label("c"))], r'a\.tar, z\.png: label "c" is not among data\.classes'),
        ([("x.png", "IMAGE"), ("x.cls", "a")], "at least two classes"),
        ([], r"a\.tar: contains no images"),
    ],
)
def test_errors_in_a_shard_name_shard_and_key(write_shard, read_catalog, members, said):
    with pytest.raises(PylorusError, match=said):
        read_catalog(write_shard(members).parent, classes=["a", "b"] if len(members) != 2 else None)


VALUES = json.dumps({"label": "gastritis", **{f"value {number}": 1 for number in range(2000)}})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("b.json", '{"label": "a", "more": ' + "[]," * 400_000, r"b\.json has 1,200,0\d\d bytes, expected 1,000,000"),
        ("b.cls", "a" * 1_000_001, r"b\.cls has 1,000,001 bytes, expected 1,000,000"),
        ("b.json", VALUES, "key b: the .json files have over 1,000 different names"),
        ("b.json", '{"label": "a\\ud800"}', "key b: its .json has half a character"),
        ("b.json", '{"label": ' + "[" * 100_000, "key b: can't read its .json"),
        ("b\udce4.json", '{"label": "a"}', r"the name b\\udce4.jpg is not UTF-8"),
    ],
    ids=["long json", "long cls", "many values", "half a character", "deep", "another encoding"],
)
def test_hostile_metadata_in_a_shard_are_refused_by_name(write_shard, read_catalog, name, text, words):
    image = (name.replace(".json", ".jpg").replace(".cls", ".jpg"), "IMAGE")
    with pytest.raises(PylorusError, match=rf"shard a\.tar.*{words}"):
        read_catalog(write_shard([("a.jpg", "IMAGE"), ("a.json", label("gastritis")), image, (name, text)]))


def test_a_sparse_file_in_a_shard_is_not_read_as_its_neighbours_bytes(write_shard, read_catalog):
    path = write_shard([("a.jpg", "IMAGE"), ("a.json", label("gastritis"))])
    content = bytearray(path.read_bytes())
    content[156:157], content[386:398] = tarfile.GNUTYPE_SPARSE, b"00000000000\0"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(PylorusError, match=r"shard a\.tar: a\.jpg is stored as a sparse file"):
        read_catalog(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_called_like_a_shard_is_not_waited_for(tmp_path, read_catalog):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(PylorusError, match=r"a\.tar: is a pipe, expected a file"):
        read_catalog(tmp_path)


def test_a_range_of_very_many_shards_is_refused_before_they_are_listed(tmp_path, read_catalog):
    with pytest.raises(PylorusError, match="expected 100,000 shards at most"):
        read_catalog(tmp_path / "a-{0..99999999999}.tar")


def test_a_key_in_two_shards_is_refused_with_both(write_shard, read_catalog):
    write_shard(GOOD)
    with pytest.raises(PylorusError, match=r"key x\.png is in shards a\.tar and b\.tar"):
        read_catalog(write_shard(GOOD, "b.tar").parent)


def test_numeric_labels_index_the_configured_classes(write_shard, read_catalog):
    path = write_shard([("x.png", "IMAGE"), ("x.cls", "1"), ("y.png", "IMAGE"), ("y.cls", "0")])
    assert list(read_catalog(path, classes=["b", "a"]).table["label"]) == [1, 0]


@pytest.mark.parametrize("left", [0.1, 0.3, 0.5])
def test_a_truncated_shard_is_refused(shard_folder, tmp_path, read_catalog, left):
    whole = (shard_folder / "shard-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: int(len(whole) * left)])
    with pytest.raises(PylorusError, match=r"cut\.tar.*truncated"):
        read_catalog(tmp_path / "cut.tar")


def test_a_shard_truncated_between_two_members_is_refused(write_shard, read_catalog):
    path = write_shard(GOOD)
    with tarfile.open(path) as tar:
        end = tar.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(PylorusError, match=r"a\.tar: truncated or damaged after x\.json"):
        read_catalog(path)


def test_a_shard_changed_after_indexing_is_an_error(write_shard, read_catalog):
    path = write_shard(GOOD)
    place = read_catalog(path).root / "x.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:600])
    with pytest.raises(UnreadableImageError, match=r"shard a\.tar has changed .* ends within x\.png"):
        read_image_bytes(place)
    path.write_bytes(whole[:600] + b"\0" + whole[601:])
    with pytest.raises(UnreadableImageError, match=r"shard a\.tar has changed .* contains a different x\.png"):
        read_image_bytes(place)
    path.unlink()
    with pytest.raises(UnreadableImageError, match=r"can't read shard a\.tar: No such file"):
        read_image_bytes(place)


def list_members(labels):
    return [member for number, label in enumerate(labels) for member in (
        (f"{number}.png", "IMAGE"), (f"{number}.json", json.dumps({"label": label})))]  # fmt: skip


def test_what_systems_leave_in_a_tar_file_is_not_read(write_shard, read_catalog):
    members = [("._0.png", "a shadow"), (".DS_Store", "x"), *list_members(["a", "b"]), ("__MACOSX/._0.png", "a shadow")]
    assert list(read_catalog(write_shard(members)).table["path"]) == ["0.png", "1.png"]


def test_labels_in_shards_are_compared_as_those_of_folders_are(write_shard, read_catalog):
    root = write_shard(list_members(["e\u0301tat", "b", "état", "left out"]))
    catalog = read_catalog(root, classes=["état", "b"], exclude=["left out"])
    assert list(catalog.table["label"]) == [0, 1, 0]
    assert catalog.excluded == {"left out": 1}
    with pytest.raises(PylorusError, match='"B" and "b" differ only in capitals'):
        read_catalog(write_shard(list_members(["B", "b"]), name="b.tar"))
    with pytest.raises(PylorusError, match='data.exclude names "c"'):
        read_catalog(root, exclude=["c"])
