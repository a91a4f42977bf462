"""The verb `check`: are all hosts ready for this run? One table with all problems at once; exit code 69."""

import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sft_dist.config import RunConfig
from sft_dist.distributed import preflight
from sft_dist.distributed.world import World, find_world, time_all_reduce
from sft_dist.errors import ClusterError, ConfigError, ExitCode
from sft_dist.estimate import checkpoint_bytes

ALL_REDUCE_BYTES = 64 * 1024**2
TIMEOUT_S = 120.0


def run(config: RunConfig, env: Mapping[str, str]) -> ExitCode:
    """Look at every host and at the network between them; say all that is wrong. Raises ClusterError."""
    import torch

    from sft_dist.distributed import collectives
    from sft_dist.distributed.world import start

    world = find_world(env)
    run_dir = Path(config.run_dir)
    facts = preflight.look(world, paths=needed_paths(config), run_dir=run_dir)
    if facts.gpu != "none":
        torch.cuda.set_device(world.local_rank)
    try:
        # Of CPUs: where a host lacks its GPUs the others are to hear of it.
        start(world, on_gpu=False, timeout_s=TIMEOUT_S)
    except ClusterError as error:
        seen = "".join(f"\n  {facts.host}: {fault}" for fault in facts.faults)
        raise ClusterError(f"{error}{seen}") from error
    need_gib, unknown = _checkpoint_gib(config)
    collectives.barrier()
    facts = replace(facts, clock_s=time.time())
    facts = replace(facts, faults=(*facts.faults, *unknown, *_unshared(world, preflight.nearest_existing(run_dir))))
    everybody = collectives.gather(facts)
    found = preflight.problems(everybody, need_gib=need_gib)
    if world.is_main:
        print(preflight.table(everybody))
        print(f"{len(found)} problem{'s' if len(found) > 1 else ''}:" if found else "no problem of a host", *found,
              sep="\n  ", flush=True)  # fmt: skip
    if world.size > 1 and len({facts.gpu for facts in everybody}) == 1:
        seconds = time_all_reduce(ALL_REDUCE_BYTES, on_gpu=facts.gpu != "none")
        if world.is_main:
            print(_network(world, seconds), flush=True)
    if world.is_main and not found:
        print("ready", flush=True)
    collectives.barrier()  # the first to leave with 69 has the launcher end the others
    return ExitCode.CLUSTER if found else ExitCode.DONE


def _checkpoint_gib(config: RunConfig) -> tuple[float, tuple[str, ...]]:
    """What a checkpoint takes; where the config.json of the model is not to be had, 0 and the fault that tells why."""
    try:
        return checkpoint_bytes(config) / 2**30, ()
    except ConfigError as error:
        return 0.0, (str(error),)


def needed_paths(config: RunConfig) -> dict[str, str]:
    """Files and folders that every host must see. What comes from the Hub is not looked for."""
    sources = [*config.data.train, *config.data.heldout, *config.data.retention]
    found = {f"data {number}": source.path for number, source in enumerate(sources, start=1) if _is_local(source.path)}
    if _is_local(config.model.path):
        found["model.path"] = config.model.path
    return found


def _is_local(path: str) -> bool:
    # As many Hub ids as there are of the form owner/name, none of them begins so or has a suffix of a data file.
    return path.startswith(("/", "./", "../", "~")) or Path(path).suffix in {".jsonl", ".json", ".parquet", ".csv"}


def _unshared(world: World, folder: Path) -> list[str]:
    """Whether this host sees what rank 0 writes where the run folder is to be."""
    from sft_dist.distributed import collectives

    mark = collectives.from_main(f".sft-dist-check-{secrets.token_hex(8)}")
    path = folder / mark
    refused = None
    if world.is_main:
        try:
            path.touch()
        except OSError as error:
            refused = f"run_dir: nothing can be written to {folder} ({os.strerror(error.errno or 0)})"
    collectives.barrier()
    if world.is_main:
        seen = True
    else:
        with suppress(OSError):
            os.listdir(folder)  # a network file system then asks its server
        seen = path.exists()
    refused_by_main = collectives.from_main(refused)
    collectives.barrier()
    if world.is_main:
        path.unlink(missing_ok=True)
        return [refused] if refused else []
    if seen or refused_by_main:
        return []
    return [f"run_dir: {folder} is not the folder that rank 0 sees; it must be shared by all hosts"]


def _network(world: World, seconds: float) -> str:
    moved = 2 * (world.size - 1) / world.size * ALL_REDUCE_BYTES
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "unknown")
    return (
        f"{world.size} ranks meet at {world.master_addr}:{world.master_port} (interface {interface} on rank 0); "
        f"all-reduce of {ALL_REDUCE_BYTES // 1024**2} MiB: {seconds:.3f} s, {moved / seconds / 1e9:.2f} GB/s a rank"
    )
