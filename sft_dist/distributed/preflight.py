"""Is this cluster ready for a run: what each rank sees of its host, and what is wrong with it all, told at once.

`look` reads the facts of one rank; `problems` and `table` are pure and are given those of all ranks.
"""

import glob
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from sft_dist.distributed.world import World

PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy", "mpi4py")
STALE_LOCK_S = 600.0
MAX_CLOCK_SPREAD_S = 30.0
_GIB = 1024**3
_SHOWN = ("python", "torch", "transformers", "deepspeed", "code")  # in the table; the others where they differ


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one rank sees. Everything in `same` must be the same on every rank."""

    rank: int
    host: str
    local_rank: int
    local_size: int
    gpu: str  # name of the one it would use, "none" without
    num_gpus: int
    free_gib: float  # where the run folder is to be
    clock_s: float  # Unix time, read by all ranks at one moment
    same: Mapping[str, str]
    faults: Sequence[str] = field(default_factory=tuple)  # that show on this host alone


def look(world: World, *, paths: Mapping[str, str], run_dir: Path) -> Facts:
    """Facts of this rank. `paths` are files and folders a run needs, by what they are for."""
    import torch

    on_gpu = torch.cuda.is_available()
    num_gpus = torch.cuda.device_count() if on_gpu else 0
    faults = [f"{what}: {path} is not there" for what, path in paths.items() if not _is_there(path)]
    faults += [f"{lock}: a lock left by a build that was killed; every run would wait for it: delete it" for lock in
               stale_locks(_extension_folders())]  # fmt: skip
    if on_gpu and num_gpus < world.local_size:
        faults.append(f"{world.local_size} ranks on this host, but {num_gpus} GPUs are visible")
    writable = nearest_existing(run_dir)
    if not os.access(writable, os.W_OK):
        faults.append(f"run_dir: {writable} is not writable")
    return Facts(
        rank=world.rank,
        host=socket.gethostname(),
        local_rank=world.local_rank,
        local_size=world.local_size,
        gpu=torch.cuda.get_device_name(world.local_rank) if world.local_rank < num_gpus else "none",
        num_gpus=num_gpus,
        free_gib=shutil.disk_usage(writable).free / _GIB,
        clock_s=0.0,
        same=versions(torch.version.cuda) | {"GPU driver": _driver() if on_gpu else "none"},
        faults=tuple(faults),
    )


def _is_there(path: str) -> bool:
    return os.path.exists(path) or bool(glob.glob(path))


def stale_locks(folders: Iterable[Path]) -> list[Path]:
    """Locks of PyTorch's extension builds that nobody can be holding any more, by their age."""
    old = time.time() - STALE_LOCK_S
    found = []
    for folder in folders:
        for lock in sorted(folder.glob("**/lock")):
            try:
                if lock.is_file() and lock.stat().st_mtime < old:
                    found.append(lock)
            except OSError:
                continue  # released since
    return found


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def problems(everybody: Sequence[Facts], *, need_gib: float) -> list[str]:
    """Everything that is wrong, in one line each; hosts that share a fault are named together. Pure.

    `need_gib`: of a checkpoint, where the run folder is to be.
    """
    first = everybody[0]
    found: dict[str, list[str]] = {}

    def add(problem: str, facts: Facts) -> None:
        hosts = found.setdefault(problem, [])
        if facts.host not in hosts:
            hosts.append(facts.host)

    for facts in everybody:
        for fault in facts.faults:
            add(fault, facts)
        for key in sorted(first.same.keys() | facts.same.keys()):
            theirs, ours = facts.same.get(key, "none"), first.same.get(key, "none")
            if theirs != ours:
                add(f"{key}: {theirs} here, {ours} on {first.host} (rank {first.rank})", facts)
        if facts.gpu != first.gpu:
            add(f"GPU: {facts.gpu} here, {first.gpu} on {first.host}", facts)
        if facts.free_gib < need_gib:
            add(f"run_dir: {facts.free_gib:,.2f} GiB of disk are free, a checkpoint takes {need_gib:,.2f} GiB", facts)
        if (spread := abs(facts.clock_s - first.clock_s)) > MAX_CLOCK_SPREAD_S:
            add(f"clock: {spread:.0f} s away from that of {first.host}; have the host synchronise it", facts)
    return [f"{', '.join(hosts)}: {problem}" for problem, hosts in found.items()]


def table(everybody: Sequence[Facts]) -> str:
    """A line for every host. Pure."""
    by_host: dict[str, list[Facts]] = {}
    for facts in everybody:
        by_host.setdefault(facts.host, []).append(facts)
    rows: list[tuple[str, ...]] = [("host", "ranks", "GPUs", "driver", "free disk", "clock", *_SHOWN)]
    for host, group in by_host.items():
        one = group[0]
        gpus = f"{one.num_gpus} x {one.gpu}" if one.num_gpus else "none"
        clock = f"{one.clock_s - everybody[0].clock_s:+.1f} s"
        driver, *versions = (one.same.get(key, "none") for key in ("GPU driver", *_SHOWN))
        rows.append((host, str(len(group)), gpus, driver, f"{one.free_gib:.1f} GiB", clock, *versions))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def versions(cuda: str | None = None) -> dict[str, str]:
    """Of Python, of packages and of this code; `cuda` is that of torch."""
    found = {"python": sys.version.split()[0], "CUDA of torch": cuda or "none", "code": _code_digest()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _code_digest() -> str:
    """Of the sources of sft_dist, as this rank would run them."""
    root = Path(__file__).resolve().parents[1]
    digest = sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"


def _extension_folders() -> list[Path]:
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return [Path(chosen) if chosen else Path(sys.prefix) / "torch_extensions", Path.home() / ".cache/torch_extensions"]
