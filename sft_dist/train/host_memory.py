"""How much memory this host, or what of it this process may use, has left."""

from pathlib import Path

_MEMINFO, _CGROUP, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP, cgroups: Path = _CGROUPS) -> int:
    """MemAvailable, see proc(5), or what the limits of this process's control groups leave, whichever is less.

    Batch systems and containers limit memory by control groups and kill what goes beyond; see memory.max in
    https://docs.kernel.org/admin-guide/cgroup-v2.html. Their page cache counts as used here although it can be freed.
    """
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_in_groups(cgroup, cgroups)])


def _left_in_groups(cgroup: Path, cgroups: Path) -> list[int]:
    """Of the own group and those around it, bytes below the limit, where there is one (version 2)."""
    try:
        (own,) = [line[3:] for line in cgroup.read_text().splitlines() if line.startswith("0::")]
    except (OSError, ValueError):
        return []
    folder, left = cgroups / own.strip("/"), []
    for group in (folder, *folder.parents):
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                left.append(int(limit) - int((group / "memory.current").read_text()))
        except OSError:
            continue
    return left
