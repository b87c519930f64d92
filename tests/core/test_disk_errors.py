"""Disk errors before a run starts are reported with a remedy."""

import errno

import pytest

from pylorus.core.storage import explain_disk_error


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full: {place} could not be written ("),
        (
            errno.EROFS,
            "{place} can't be written to: gone.\nMake the folder writable (to see its owner: ls -ld {above};",
        ),
        (errno.EACCES, "{place} can't be written to"),
        (errno.EIO, "{place} can't be reached: gone.\nReconnect the drive"),
        (errno.EEXIST, "{place}: found a file with this name"),
        (errno.ENOTDIR, "{place}: found a file with this name"),
        (errno.ENAMETOOLONG, "{place}: the name is too long"),
    ],
)
def test_disk_errors_name_the_file_and_an_alternative(tmp_path, number, said):
    place = tmp_path / "there" / "run"
    words = explain_disk_error(OSError(number, "gone", str(place)))
    assert words is not None
    assert said.format(place=place, above=tmp_path) in words
    assert "hydra.run.dir=DIR" in words


def test_other_errors_keep_their_traceback():
    assert explain_disk_error(OSError(errno.ENOENT, "gone", "a module")) is None
    assert explain_disk_error(BrokenPipeError(errno.EPIPE, "gone")) is None
