"""A bundle whose texts and headers were changed at random, with fitting hashes, is loaded or refused in words.

`PYLORUS_FUZZ=2000 pytest -n 0 tests/deploy/test_bundle_fuzz.py` tries so many changes of each kind; a failure names the
number of the change, which is the seed of its randomness.
"""

import copy
import hashlib
import json
import os
import random
import time

import pytest

from pylorus.core.errors import PylorusError
from pylorus.deploy.model import load_bundle

COUNT = int(os.environ.get("PYLORUS_FUZZ", "120"))
TENSOR_FILES = ("model.safetensors", "unlike.safetensors", "appearance.safetensors", "fingerprints.safetensors")
LIMIT = 20.0
"""CPU seconds that a change may cost: none may make the network large."""


def _nest(depth):
    return {"a": _nest(depth - 1)} if depth else 1


VALUES = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 10**30, -(10**400), 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 20_000, "\ud800", "a\0b", "a\nb", "\x1b[2J", "\u202eevil", "../../etc/passwd", "/dev/zero", "https://x"),
    *("__import__('os').system('true')", "hf-hub:a/b", "local-dir:/tmp", "vit_base_patch16_224", "test_vit", "resnet18.a"),
    *([], {}, [[]], [{}], [1] * 5000, ["GC"] * 3, {"_target_": "os.system"}, {"GC": None}, {"\ud800": 1}, _nest(3), _nest(80)),
]  # fmt: skip
ARGUMENTS = {
    "block": ["x", None, 3, "torch.nn.Linear", [], "timm.models.resnet.BasicBlock"],
    "layers": [0, -1, [0], [10_000] * 4, [10_000] * 64, [1, 1, 1, 1], "x"],
    "act_layer": ["x", "relu", "os.system", 1, [], ""],
    "norm_layer": ["x", "layernorm", "eval", 0, None],
    "drop_path_rate": [2.0, -1.0, "x", 0.1],
    "img_size": [10_000, 0, -1, [10_000, 10_000], "x"],
    "depth": [10_000, -1, 0],
    "embed_dim": [10_000, 7, 0],
    "stem_width": [10_000, 0, -5],
    "base_width": [10_000, 0],
    "cardinality": [0, 3, 10_000],
    "global_pool": ["x", "", "max", 5],
    "zero_init_last": ["x", 1],
    "pretrained_custom_load": [True, "x"],
    "model_cfg": ["x"],
    "feature_cls": ["fx"],
    "in_chans": [3, 4, True],
    "checkpoint_path": ["/etc/passwd"],
    "weight_init": ["jax", "x"],
}


def _list_places(values, path=()):
    places = [path] if path else []
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in items:
        places += _list_places(value, (*path, name))
    return places


def mutate_values(values, chance):
    """Change one to three places of plain values: drop, replace, repeat, rename, exchange, add."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        path = chance.choice(_list_places(values))
        parent = values
        for part in path[:-1]:
            parent = parent[part]
        name, act = (
            path[-1],
            chance.choice(["drop", "replace", "replace", "replace", "repeat", "rename", "move", "add"]),
        )
        if act == "drop":
            del parent[name]
        elif act == "replace":
            parent[name] = copy.deepcopy(chance.choice(VALUES))
        elif act == "repeat" and isinstance(parent[name], list):
            parent[name] = parent[name] * chance.choice([2, 700])
        elif act == "rename" and isinstance(parent, dict):
            parent[str(chance.choice(["x", "_target_", "\ud800", f"{name} ", str(name).upper()]))] = parent.pop(name)
        elif act == "move":
            parent[name] = copy.deepcopy(_get(values, chance.choice(_list_places(values))))
        elif isinstance(parent, dict):
            parent[chance.choice(["x", "__class__", "a" * 300, "a\nb"])] = copy.deepcopy(chance.choice(VALUES))
        if not _list_places(values):
            return values
    return values


def _get(values, path):
    for part in path:
        values = values[part]
    return values


def mutate_description(content, chance):
    values = json.loads(content)
    kind = chance.random()
    if kind < 0.35:
        name = chance.choice(list(ARGUMENTS))
        values["arguments"] = {name: chance.choice(ARGUMENTS[name])}
        values["architecture"] = chance.choice([values["architecture"], "test_vit", "resnet18", "vit_tiny_patch16_224"])
        return json.dumps(values).encode()
    text = json.dumps(mutate_values(values, chance))
    if kind > 0.9:
        place = chance.randrange(len(text))
        text = chance.choice(
            [text[:place], text[:place] + text[place + 1 :], f'{text[:-1]}, "input": 1}}', text + text, "[" * place, "\ufeff" + text]
        )  # fmt: skip
    return text.encode("utf-8", errors="surrogatepass")


def mutate_tensors(content, chance):
    """Change the header of a safetensors file, or its frame: lengths, offsets, types, shapes, names."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = chance.choice(list(header))
    entry = header[name]
    kind = chance.randrange(14)
    if kind == 0:
        entry["dtype"] = chance.choice(["F16", "BF16", "F8_E4M3", "I64", "BOOL", "C64", "", 5, None, "f32", "\ud800"])
    elif kind == 1:
        entry["shape"] = chance.choice(
            [[], [0], [-1], [2**63], [10**30], [2**31, 2**31], [1.5], ["3"], "x", None, [1] * 65]
        )
    elif kind == 2:
        entry["data_offsets"] = chance.choice(
            [[0, 0], [0, 4], [4, 0], [-4, 0], [0, 2**62], [0], [0, 4, 8], [0.0, 4.0], "x", None]
        )
    elif kind == 3:
        shift = chance.choice([-4, -1, 1, 4, 4096])
        entry["data_offsets"] = [each + shift for each in entry["data_offsets"]]
    elif kind == 4:
        header[chance.choice(["x", "", "../x", "a\nb", "a" * 5000, "__metadata__"])] = copy.deepcopy(entry)
    elif kind == 5:
        header[chance.choice(["x", f"{name} ", "\ud800"])] = header.pop(name)
    elif kind == 6:
        del header[name]
    elif kind == 7:
        header["__metadata__"] = chance.choice([{"a": 1}, [], "x", {"format": "pt"}, {"a": "b" * 50_000}, None])
    elif kind == 8:
        header = mutate_values(header, chance)
    elif kind == 9:
        header |= {f"x{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(25_000)}
    elif kind == 10:
        data = chance.choice([data[:-1], data[: len(data) // 2], data + b"\0", b"", data + data])
    text = json.dumps(header).encode()
    if kind == 11:
        text = chance.choice(
            [b"", b"{}", b"[]", b"{", b"\xff" * 10, b"[" * 90_000, b'{"a":' * 5000, text + b" " * 9, b" " + text]
        )
    size = len(text)
    if kind == 12:
        size = chance.choice([0, 1, size - 1, size + 1, 2**31, 2**63 - 1, 2**64 - 1, size + len(data)])
    if kind == 13:
        twice = json.dumps({name: entry})[1:-1]
        text = text[:-1] + f", {twice}}}".encode()
        size = len(text)
    return size.to_bytes(8, "little") + text + data


@pytest.fixture(scope="module")
def template(bundle_folder):
    return {path.name: path.read_bytes() for path in bundle_folder.iterdir()}


def check_outcome(folder, number, template, name, content):
    """Load the bundle with one file changed; whatever happens, it is a bundle or one error in words."""
    (folder / name).write_bytes(content)
    files = {**template, name: content}
    del files["SHA256SUMS"]
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {file}\n" for file, data in files.items())
    (folder / "SHA256SUMS").write_text(sums)
    before = time.process_time()
    try:
        load_bundle(folder)
    except PylorusError as error:
        message = str(error)
        message.encode()
        assert len(message) < 3000, f"change {number}: a message of {len(message)} characters"
        assert all(letter.isprintable() or letter == "\n" for letter in message), f"change {number}: {message!r}"
        assert message.startswith(str(folder)), f"change {number} names no file: {message}"
    except Exception as error:
        raise AssertionError(f"change {number} of {name} ends in {type(error).__name__}: {error}") from error
    finally:
        (folder / name).write_bytes(template[name])
    assert time.process_time() - before < LIMIT, f"change {number}"


def test_a_changed_description_is_loaded_or_refused_in_words(bundle_copy, template):
    for number in range(COUNT):
        chance = random.Random(number)
        check_outcome(
            bundle_copy, number, template, "model.json", mutate_description(template["model.json"], chance)
        )  # fmt: skip


def test_a_changed_header_of_tensors_is_loaded_or_refused_in_words(bundle_copy, template):
    for number in range(COUNT):
        chance = random.Random(number)
        name = chance.choice(TENSOR_FILES)
        check_outcome(bundle_copy, number, template, name, mutate_tensors(template[name], chance))
