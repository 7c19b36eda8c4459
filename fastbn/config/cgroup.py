"""How many processors does a container's quota leave this process? Linux control groups, versions 1 and 2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def quota(root: Path = ROOT) -> int | None:
    """How many processors' time the quota allows, rounded up and at least 1; None without a quota or control groups.

    The groups around this process's group may have quotas too; the smallest counts. Inside a container, the path of a
    group may be one that only the host can see; the mounted folder is then the container's own group.
    """
    found = [processors for folder in _folders(root) if (processors := _of_folder(folder)) is not None]
    return max(1, math.ceil(min(found))) if found else None


def _folders(root: Path) -> Iterator[Path]:
    """The folders in which the groups of this process, and those around them, may have their files."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tops = [mounts, mounts / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [mounts / controllers, mounts / "cpu"]
        else:
            continue
        group = Path(path.lstrip("/"))
        for top in tops:
            yield from (top / parent for parent in (group, *group.parents))


def _of_folder(folder: Path) -> float | None:
    """The quota in one folder: `cpu.max` in version 2, two files in version 1."""
    limit, _, period = _text(folder / "cpu.max").strip().partition(" ")
    if not limit:
        limit, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not limit.isdecimal() or not period.isdecimal() or int(limit) == 0 or int(period) == 0:
        return None  # "max" and -1 mean that there is no quota
    return int(limit) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
