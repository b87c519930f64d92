"""`pylorus sign`: sign a bundle or an export, so that whoever uses it knows who made it and that nobody changed it.

SHA256SUMS lists the hash of every file. Its signature (Ed25519) is in SHA256SUMS.sig, and keys are PEM files, so that
OpenSSL can check it, too. `--trust KEY.pub` accepts nothing else than what is signed with that key.
"""

import argparse
import hashlib
import os
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylorus.core.errors import PylorusError, format_name_list, format_path

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    from pylorus.deploy.verified_files import ManifestCheck

SIGNATURE_BYTES = 64
"""Size of a signature."""
MAX_KEY_BYTES = 65_536
"""The largest file with a key that is read, in bytes."""
OTHERS = stat.S_IRWXG | stat.S_IRWXO
"""Permissions of other accounts, which a private key must not have."""
PUBLIC_SUFFIX = ".pub"
"""What the name of a public key ends in."""


def build_manifest_check(trust: Sequence[Path]) -> "ManifestCheck | None":
    """Return a check that SHA256SUMS is signed with one of some keys; None if there are no keys.

    Args:
        trust: Files with public keys.

    Raises:
        PylorusError: If a file holds no public key, or the package `cryptography` is not installed.
    """
    if not trust:
        return None
    keys = {path: load_public_key(path) for path in trust}

    def check_manifest(folder: Path, manifest: bytes) -> None:
        verify_signature(folder, manifest, keys)

    return check_manifest


def verify_signature(folder: Path, manifest: bytes, keys: "dict[Path, Ed25519PublicKey]") -> Path:
    """Verify the signature of a bundle, and that its list of files is complete.

    Args:
        folder: Folder of the bundle or the export.
        manifest: Content of its SHA256SUMS, as it will be used.
        keys: The keys of which one must have signed it, by file.

    Returns:
        The file of that key.

    Raises:
        PylorusError: If it is not signed with one of the keys, or the folder has files that it does not list.
    """
    from pylorus.deploy.verified_files import SIGNATURE, SUMS, read_regular_file

    cryptography = import_cryptography()
    listed = ", ".join(str(path) for path in keys)
    if not os.path.lexists(folder / SIGNATURE):
        raise PylorusError(
            f"{folder}: is not signed, but --trust asks for a signature of {listed}. Ask whoever made it for "
            f"{SIGNATURE}, which `pylorus sign` writes; or leave out --trust, if you know where it is from."
        )
    signature = read_regular_file(folder / SIGNATURE, limit=SIGNATURE_BYTES)
    for path, key in keys.items():
        try:
            key.verify(signature, manifest)
        except cryptography.exceptions.InvalidSignature:
            continue
        check_unlisted_files(folder, manifest)
        return path
    raise PylorusError(
        f"{folder / SIGNATURE}: is not a signature of {SUMS} by {listed}: it was signed with another key, or "
        f"{SUMS} was changed after it was signed. Do not use it; ask whoever made it."
    )


def check_unlisted_files(folder: Path, manifest: bytes) -> None:
    """Check that a folder has no files that its SHA256SUMS does not list, except hidden ones, as desktops make them.

    Raises:
        PylorusError: If there are any.
    """
    from pylorus.deploy.verified_files import SIGNATURE, SUMS, parse_checksums

    known = {*parse_checksums(folder, manifest, ()), SUMS, SIGNATURE}
    unlisted = sorted(path.name for path in folder.iterdir() if path.name not in known and path.name[0] != ".")
    if unlisted:
        raise PylorusError(
            f"{folder}: holds what {SUMS} does not list, and which no signature covers:\n"
            f"{format_name_list(map(format_path, unlisted), most=4)}\nMove it elsewhere."
        )


def sign_bundle(folder: Path, key_path: Path) -> Path:
    """Sign a bundle or an export, after verifying all of its files.

    Args:
        folder: Its folder.
        key_path: File with the private key.

    Returns:
        The file with the signature.

    Raises:
        PylorusError: If a file is missing, changed or not listed, or the key can't be used.
    """
    from pylorus.core.io import write_atomically
    from pylorus.deploy.verified_files import (
        DESCRIPTION,
        EXPORT_FILES,
        FILES,
        SIGNATURE,
        SUMS,
        is_export,
        open_verified_folder,
    )

    key = load_private_key(key_path)
    with open_verified_folder(folder, EXPORT_FILES if is_export(folder) else FILES) as files:
        for tensor_file in files.tensor_files.values():
            tensor_file.verify()
    manifest = files.contents[SUMS]
    check_unlisted_files(folder, manifest)
    _check_licences(folder, files.contents[DESCRIPTION])
    with write_atomically(folder / SIGNATURE) as temporary:
        temporary.write_bytes(key.sign(manifest))
    return folder / SIGNATURE


def _check_licences(folder: Path, content: bytes) -> None:
    """Check that the licence of the weights allows passing the model on, or was accepted; print what is not known.

    Raises:
        PylorusError: If it limits passing on and was not accepted.
    """
    from pylorus.deploy.bundle_files import read_description
    from pylorus.deploy.licences import ACCEPT_OPTION, check_passing_on

    weights = [each.weights for each in read_description(content, where=str(folder)).list_networks()]
    how = f"type pylorus export {shlex.quote(str(folder))} {ACCEPT_OPTION} {{licence}}, and sign the export"
    for warning in check_passing_on(weights, what="the signature", how=how):
        print(f"warning: {warning}")


def create_key_pair(path: Path) -> Path:
    """Create a private key that only its owner can read, and its public key beside it.

    Args:
        path: File for the private key.

    Returns:
        The file of the public key.

    Raises:
        PylorusError: If one of the files exists.
    """
    cryptography = import_cryptography()
    serialization = cryptography.hazmat.primitives.serialization
    public_path = path.with_name(path.name + PUBLIC_SUFFIX)
    for each in (path, public_path):
        if os.path.lexists(each):
            raise PylorusError(f"{each}: already exists, and a key is never overwritten. Choose another name.")
    key = cryptography.hazmat.primitives.asymmetric.ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for each, content, mode in ((path, private, 0o600), (public_path, public, 0o644)):
        with os.fdopen(os.open(each, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    return public_path


def load_public_key(path: Path) -> "Ed25519PublicKey":
    """Load a public key.

    Raises:
        PylorusError: If the file does not hold one.
    """
    serialization = import_cryptography().hazmat.primitives.serialization
    content = _read_key_file(path, option="--trust")
    if b"PRIVATE KEY" in content:
        raise PylorusError(
            f"--trust: {path} is a private key, which only whoever signs should have. Give the public one: "
            f"--trust {shlex.quote(str(path))}{PUBLIC_SUFFIX}."
        )
    key: Ed25519PublicKey = _parse_key(
        serialization.load_pem_public_key, content, path, option="--trust", kind="Ed25519PublicKey"
    )
    return key


def load_private_key(path: Path) -> "Ed25519PrivateKey":
    """Load a private key.

    Raises:
        PylorusError: If the file does not hold one, or other accounts can read it.
    """
    serialization = import_cryptography().hazmat.primitives.serialization
    content = _read_key_file(path, option="--key")
    if b"PUBLIC KEY" in content:
        raise PylorusError(
            f"--key: {path} is a public key, expected the private one, whose name lacks {PUBLIC_SUFFIX}."
        )
    mode = path.stat().st_mode
    if os.name != "nt" and mode & OTHERS:
        raise PylorusError(
            f"--key: {path} has the mode {stat.S_IMODE(mode):04o}: other accounts can read or change this private key. "
            f"Type: chmod 600 {shlex.quote(str(path))}. If others had access to it, create a new key."
        )

    def load(pem: bytes) -> Any:
        return serialization.load_pem_private_key(pem, password=None)

    key: Ed25519PrivateKey = _parse_key(load, content, path, option="--key", kind="Ed25519PrivateKey")
    return key


def _read_key_file(path: Path, *, option: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise PylorusError(
            f"{option}: {path}: {error.strerror or error}; expected a file with a key. `pylorus sign --new-key KEY` "
            "creates a pair."
        ) from error


def _parse_key(load: Any, content: bytes, path: Path, *, option: str, kind: str) -> Any:
    ed25519 = import_cryptography().hazmat.primitives.asymmetric.ed25519
    try:
        key = load(content)
    except Exception as error:  # of several types, and without the name of the file
        if "ENCRYPTED" in content[:200].decode("latin-1"):
            raise PylorusError(
                f"{option}: {path} is encrypted with a password, which Pylorus does not ask for. Decrypt it with "
                "`openssl pkey` first."
            ) from error
        raise PylorusError(f"{option}: {path} holds no key in PEM format.") from error
    if not isinstance(key, getattr(ed25519, kind)):
        raise PylorusError(f"{option}: {path} holds a key of another kind, expected Ed25519.")
    return key


def format_fingerprint(key: "Ed25519PublicKey") -> str:
    """Return the SHA-256 of a public key in DER, by which two people can compare it."""
    serialization = import_cryptography().hazmat.primitives.serialization
    content = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(content).hexdigest()


def import_cryptography() -> Any:
    """Import the package `cryptography`.

    Raises:
        PylorusError: If it is not installed; names the command that installs it.
    """
    try:
        import cryptography.exceptions
        import cryptography.hazmat.primitives.asymmetric.ed25519
        import cryptography.hazmat.primitives.serialization
    except ImportError as error:
        raise PylorusError(
            f"signatures need the package cryptography, which can't be imported ({error}). Type: pip install "
            "'pylorus[sign]' or, in a clone, pip install -e '.[sign]'."
        ) from error
    return cryptography


def add_trust_option(command: argparse.ArgumentParser) -> None:
    """Add `--trust` to a command that uses a bundle."""
    command.add_argument(
        "--trust",
        type=Path,
        action="append",
        default=[],
        metavar="KEY",
        help="accept the model only if it is signed with this public key; may be given several times",
    )


def add_sign_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `sign` to the command line."""
    command = commands.add_parser(
        "sign",
        help="sign a trained model, so that others can check who made it",
        description="Sign a bundle or an export, so that others can check who made it and that nobody changed it "
        "(--trust of predict, explain, export, serve and doctor).",
    )
    command.add_argument(
        "bundle", type=Path, nargs="?", metavar="BUNDLE", help="the folder model/ of a run, or an export of it"
    )
    keys = command.add_mutually_exclusive_group(required=True)
    keys.add_argument("--key", type=Path, metavar="KEY", help="file with your private key")
    keys.add_argument(
        "--new-key", type=Path, metavar="KEY", help="create a private key in this file, and the public key KEY.pub"
    )
    command.set_defaults(act=_run_sign)


def _run_sign(arguments: argparse.Namespace) -> None:
    if arguments.new_key is not None:
        if arguments.bundle is not None:
            raise PylorusError("--new-key: creates keys only. Sign with --key afterwards.")
        public_path = create_key_pair(arguments.new_key)
        print(f"private key: {arguments.new_key} (keep it secret, and keep a copy)")
        print(f"public key: {public_path}, SHA-256 {format_fingerprint(load_public_key(public_path))}")
        return
    if arguments.bundle is None:
        raise PylorusError("sign: found no BUNDLE, expected the folder model/ of a run, or an export of it.")
    path = sign_bundle(arguments.bundle, arguments.key)
    print(f"signature: {path}")
    print(f"public key: SHA-256 {format_fingerprint(load_private_key(arguments.key).public_key())}")
    print("Whoever uses the model needs your public key, from yourself and not with the model, and types:")
    print(f"  pylorus predict {shlex.quote(str(arguments.bundle))} IMAGES --output predictions.csv --trust KEY.pub")
