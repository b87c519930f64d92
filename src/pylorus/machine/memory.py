"""How much memory is free: the machine's, or less where a container or a job of SLURM may use less."""

from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")
"""Where Linux shows what groups of processes may use."""
FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Limit, use, and the part of the use that is given back on demand, by the version of the interface."""


def free_memory() -> int:
    """Bytes that this process and its children may still take."""
    return min([int(psutil.virtual_memory().available), *_left(ROOT, Path("/proc/self/cgroup"))])


def _left(root: Path, groups: Path) -> list[int]:
    """Bytes left in each group of processes that this one is in and whose memory is limited.

    Args:
        root: Where the groups lie.
        groups: A file with a line `number:controllers:/path` for each of them.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        return []
    found: list[int] = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        version, top = ("v1", root / "memory") if controllers else ("v2", root)
        # A container may show its own group as the top, under a path that is only valid outside.
        inner = top / path.lstrip("/")
        for folder in {top, *(one for one in (inner, *inner.parents) if one.is_relative_to(top))}:
            left = _left_in(folder, *FILES[version])
            if left is not None:
                found.append(left)
    return found


def _left_in(folder: Path, limit: str, use: str, returned: str) -> int | None:
    try:
        most = (folder / limit).read_text(encoding="utf-8").strip()
        if most == "max":
            return None
        used = int((folder / use).read_text(encoding="utf-8"))
        facts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(most) - used + int(facts.get(returned, 0)))
