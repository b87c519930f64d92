"""Whoever trusts a key loads only what was signed with it, unchanged, by every command that takes a bundle."""

import json
import os
import shutil
import stat
import subprocess
from importlib.util import find_spec

import pytest

import pylorus
from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.deploy.model import load_bundle
from pylorus.deploy.signature import create_key_pair, sign_bundle

needs_cryptography = pytest.mark.skipif(
    find_spec("cryptography") is None, reason="needs the extra `sign`: pip install 'pylorus[sign]'"
)


@pytest.fixture
def keys(tmp_path):
    """A private key and its public key."""
    path = tmp_path / "key"
    return path, create_key_pair(path)


@pytest.fixture
def signed(bundle_copy, keys):
    """A signed bundle."""
    sign_bundle(bundle_copy, keys[0])
    return bundle_copy


def refused(folder, public, words):
    with pytest.raises(PylorusError, match=words):
        load_bundle(folder, trust=[public])


@needs_cryptography
def test_a_new_private_key_is_readable_by_its_owner_only(tmp_path, capsys):
    before = os.umask(0o022)
    try:
        main(["sign", "--new-key", str(tmp_path / "key")])
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("key", "key.pub")]
    assert modes == [0o600, 0o644]
    assert "keep it secret" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already exists, and a key is never overwritten"):
        main(["sign", "--new-key", str(tmp_path / "key")])


@needs_cryptography
def test_a_signed_bundle_is_loaded_by_whoever_trusts_its_key(signed, keys, tmp_path):
    other = create_key_pair(tmp_path / "other")
    assert load_bundle(signed, trust=[keys[1]]).description.short_names == ("GC", "GU", "CG")
    load_bundle(signed, trust=[other, keys[1]])
    load_bundle(signed)
    assert pylorus.load_model(signed, trust=str(keys[1])).short_names == ("GC", "GU", "CG")


@needs_cryptography
def test_a_model_whose_licence_limits_passing_on_is_signed_only_once_that_is_accepted(edit_model_json, keys):
    weights = {"from": "EndoViT.bin", "sha256": "0" * 64, "licence": "cc-by-nc-4.0"}
    folder = edit_model_json(lambda content: content.update(weights=weights))
    with pytest.raises(
        PylorusError, match="the signature is refused: .* --accept-licence cc-by-nc-4.0, and sign the export"
    ):
        sign_bundle(folder, keys[0])
    accepted = weights | {"accepted_licence": "cc-by-nc-4.0"}
    sign_bundle(edit_model_json(lambda content: content.update(weights=accepted)), keys[0])


@needs_cryptography
def test_openssl_accepts_the_signature(signed, keys):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys[1]), "-rawin", "-in", "SHA256SUMS"]
    command += ["-sigfile", "SHA256SUMS.sig"]
    assert subprocess.run(command, cwd=signed, capture_output=True, check=False).returncode == 0


@needs_cryptography
def test_an_unsigned_bundle_is_refused_by_whoever_trusts_a_key(bundle_copy, keys):
    refused(bundle_copy, keys[1], r"is not signed, but --trust asks for a signature of .*key.pub")
    (bundle_copy / "SHA256SUMS.sig").write_bytes(b"")
    refused(bundle_copy, keys[1], "SHA256SUMS.sig: is not a signature of SHA256SUMS")
    (bundle_copy / "SHA256SUMS.sig").write_bytes(b"x" * 100)
    refused(bundle_copy, keys[1], "SHA256SUMS.sig: has 100 bytes, expected 64 at most")
    (bundle_copy / "SHA256SUMS.sig").unlink()
    (bundle_copy / "SHA256SUMS.sig").symlink_to(keys[1])
    refused(bundle_copy, keys[1], "found a symbolic link")


@needs_cryptography
def test_a_bundle_of_another_key_is_refused(signed, tmp_path):
    refused(signed, create_key_pair(tmp_path / "other"), "is not a signature of SHA256SUMS by .*other.pub")


@needs_cryptography
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.json", "unlike.safetensors", "appearance.safetensors", "MODEL_CARD.md"]
)
def test_no_file_of_a_signed_bundle_can_be_changed(signed, keys, write_hashes, name):
    saved = (signed / "SHA256SUMS.sig").read_bytes()
    content = bytearray((signed / name).read_bytes())
    content[-2] ^= 1
    (signed / name).write_bytes(content)
    refused(signed, keys[1], f"{name}: its SHA-256 is")
    (signed / "SHA256SUMS.sig").unlink()
    write_hashes(signed)
    (signed / "SHA256SUMS.sig").write_bytes(saved)
    refused(signed, keys[1], "SHA256SUMS was changed after it was signed")


@needs_cryptography
def test_no_file_can_be_added_to_a_signed_bundle(signed, keys):
    (signed / ".DS_Store").touch()
    load_bundle(signed, trust=[keys[1]])
    (signed / "README.md").touch()
    refused(signed, keys[1], "which no signature covers:\n  README.md")
    with pytest.raises(PylorusError, match="which no signature covers:\n  README.md"):
        sign_bundle(signed, keys[0])


@needs_cryptography
def test_a_damaged_bundle_is_not_signed(bundle_copy, keys):
    content = bytearray((bundle_copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (bundle_copy / "model.safetensors").write_bytes(content)
    with pytest.raises(PylorusError, match="model.safetensors: its SHA-256 is"):
        sign_bundle(bundle_copy, keys[0])
    assert not (bundle_copy / "SHA256SUMS.sig").exists()


@needs_cryptography
def test_keys_that_can_not_be_used_are_refused(bundle_copy, keys, tmp_path):
    private, public = keys
    refused(bundle_copy, private, "is a private key, which only whoever signs should have. Give the public one")
    refused(bundle_copy, tmp_path / "nowhere", "--trust: .*nowhere: No such file")
    (tmp_path / "text").write_text("a key")
    refused(bundle_copy, tmp_path / "text", "--trust: .*text holds no key in PEM format")
    with pytest.raises(PylorusError, match=r"--key: .* is a public key, expected the private one"):
        sign_bundle(bundle_copy, public)
    private.chmod(0o640)
    with pytest.raises(PylorusError, match=r"has the mode 0640: other accounts can read .* chmod 600"):
        sign_bundle(bundle_copy, private)
    with pytest.raises(PylorusError, match="trust: found an empty path"):
        pylorus.load_model(bundle_copy, trust="")


@needs_cryptography
@pytest.mark.parametrize("command", ["predict", "explain", "export", "serve"])
def test_every_command_refuses_an_unsigned_bundle(bundle_copy, keys, synthetic_root, tmp_path, command):
    options = {
        "predict": [str(synthetic_root), "--output", str(tmp_path / "p.csv")],
        "explain": [str(synthetic_root), "--output", str(tmp_path / "maps")],
        "export": ["--output", str(tmp_path / "onnx")],
        "serve": ["--port", "0"],
    }[command]
    with pytest.raises(SystemExit, match="is not signed, but --trust asks"):
        main([command, str(bundle_copy), *options, "--trust", str(keys[1])])


@needs_cryptography
def test_doctor_refuses_an_unsigned_bundle(bundle_copy, keys, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--json", "--bundle", str(bundle_copy), "--trust", str(keys[1])])
    checks = json.loads(capsys.readouterr().out)["checks"]
    [check] = [each for each in checks if each["area"] == "Bundle"]
    assert "is not signed, but --trust asks" in json.dumps(check)


def test_without_the_package_signing_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    with pytest.raises(
        PylorusError, match=r"signatures need the package cryptography, .*pip install 'pylorus\[sign\]'"
    ):
        create_key_pair(tmp_path / "key")
