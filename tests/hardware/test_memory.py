"""Free memory: the minimum of what the machine and the limits of the process leave."""

import pytest

from pylorus.core import limits

GIB = 2**30


@pytest.fixture
def make_control_groups(tmp_path, monkeypatch):
    """A system whose groups of processes have files of these contents."""

    def make(groups: str, files: dict[str, str]) -> None:
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        (tmp_path / "groups").write_text(groups)

    return make


def left(tmp_path) -> list[int]:
    return sorted(limits.read_free_group_memory(tmp_path / "cgroup", tmp_path / "groups"))


def test_cgroup_v2_limits_count_available_and_reclaimable_memory(make_control_groups, tmp_path):
    make_control_groups(
        "0::/job/step\n",
        {
            "job/memory.max": f"{8 * GIB}\n", "job/memory.current": f"{3 * GIB}\n",
            "job/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            "job/step/memory.max": "max\n", "job/step/memory.current": "1\n", "job/step/memory.stat": "",
        },
    )  # fmt: skip
    assert left(tmp_path) == [6 * GIB]


def test_cgroup_v1_limits_are_respected(make_control_groups, tmp_path):
    make_control_groups(
        "4:memory:/pod\n3:cpu:/pod\n0::/\n",
        {
            "memory/pod/memory.limit_in_bytes": str(4 * GIB), "memory/pod/memory.usage_in_bytes": str(GIB),
            "memory/pod/memory.stat": "total_inactive_file 0\n",
        },
    )  # fmt: skip
    assert left(tmp_path) == [3 * GIB]


def test_a_container_with_a_host_path_uses_the_top_cgroup(make_control_groups, tmp_path):
    make_control_groups(
        "0::/../outside/4f\n", {"memory.max": str(2 * GIB), "memory.current": str(GIB), "memory.stat": ""}
    )
    assert left(tmp_path) == [GIB]


def test_without_limits_or_on_another_system_the_machines_own_memory_counts(tmp_path, monkeypatch):
    assert limits.read_free_group_memory(tmp_path, tmp_path / "nothing") == []
    assert limits.get_free_memory() > 0
