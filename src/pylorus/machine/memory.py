"""Measure free memory: the machine's, or less if a container or SLURM job is limited."""

from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")
"""Where Linux mounts control groups (cgroups)."""
FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files for limit and usage, and the statistic for reclaimable memory, by cgroup version."""


def get_free_memory() -> int:
    """Return how many bytes this process and its children may still allocate."""
    return min([int(psutil.virtual_memory().available), *_read_free_cgroup_memory(ROOT, Path("/proc/self/cgroup"))])


def _read_free_cgroup_memory(root: Path, groups: Path) -> list[int]:
    """Return the bytes left in each memory-limited cgroup that contains this process.

    Args:
        root: Mount point of the cgroups.
        groups: File with a line `number:controllers:/path` for each cgroup of the process.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    bytes_left: list[int] = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        version, top = ("v1", root / "memory") if controllers else ("v2", root)
        # A container may mount its own cgroup as the root, under a path that is only valid outside.
        group_folder = top / path.lstrip("/")
        for folder in {
            top,
            *(ancestor for ancestor in (group_folder, *group_folder.parents) if ancestor.is_relative_to(top)),
        }:
            group_left = _read_free_memory_of(folder, *FILES[version])
            if group_left is not None:
                bytes_left.append(group_left)
    return bytes_left


def _read_free_memory_of(folder: Path, limit: str, use: str, reclaimable: str) -> int | None:
    try:
        limit_bytes = (folder / limit).read_text(encoding="utf-8").strip()
        if limit_bytes == "max":
            return None
        used_bytes = int((folder / use).read_text(encoding="utf-8"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(limit_bytes) - used_bytes + int(statistics.get(reclaimable, 0)))
