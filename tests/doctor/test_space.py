"""Memory, disks and the clock: from which amounts on it is a warning, and from which on wrong."""

import shutil
import time
from collections import namedtuple

import pytest

from pylorus.doctor import machine
from pylorus.doctor.check import State

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "state"), [(8.0, State.GOOD), (2.0, State.WARNING), (0.5, State.WRONG)])
def test_little_memory_is_told(free, state):
    assert machine.check_memory(int(free * GIB), 16 * GIB).state is state


def test_a_containers_limit_counts_not_its_hosts_memory(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text(f"{2 * GIB}\n")
    used.write_text(f"{GIB // 2}\n")
    monkeypatch.setattr(machine, "LIMITS", ((limit, used),))
    memory = next(iter(machine.check_space()))
    assert memory.found.endswith("of 2.0 GiB; the study's models should have 4.0 GiB free")
    limit.write_text("max\n")
    assert "of 2.0 GiB" not in next(iter(machine.check_space())).found


def test_the_64_mib_of_a_plain_container_are_told_with_both_remedies():
    check = machine.check_shared_memory(64 * 2**20)
    assert check.state is State.WARNING
    assert "64.0 MiB" in check.found
    assert "--shm-size" in check.mend
    assert "data.workers=0" in check.mend


@pytest.mark.parametrize(("free", "state"), [(50, State.GOOD), (5, State.WARNING), (0, State.WRONG)])
def test_a_full_disk_is_told(tmp_path, monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, free * GIB))
    assert machine.check_disk("outputs", tmp_path / "not" / "yet").state is state


def test_looking_whether_results_can_be_written_leaves_nothing_behind(tmp_path):
    check = machine.check_writable(tmp_path / "outputs")
    assert check.state is State.GOOD
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_wrong(tmp_path):
    (tmp_path / "outputs").write_text("")
    assert machine.check_writable(tmp_path / "outputs").state is State.WRONG


def test_a_folder_that_takes_no_file_is_wrong_with_the_systems_reason(tmp_path, monkeypatch):
    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine, "write_atomically", refused)
    check = machine.check_writable(tmp_path)
    assert check.state is State.WRONG
    assert check.found == f"can't write to {tmp_path}: Permission denied"


def test_a_file_servers_clock_that_differs_is_told(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(machine.time, "time", lambda: now + 60)
    check = machine.check_writable(tmp_path)
    assert check.state is State.WARNING
    assert "-60 s" in check.found


def test_a_clock_before_the_installation_is_told():
    assert machine.check_clock(1.7e9, 1.6e9).state is State.GOOD
    assert machine.check_clock(1.6e9, 1.7e9).state is State.WARNING
