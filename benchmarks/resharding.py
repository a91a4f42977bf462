"""Resuming on another number of ranks: by our own re-sharding, and through DeepSpeed's universal checkpoint.

    python benchmarks/resharding.py --model demo/model            what 2 ranks wrote is read by 1, and by 2 (minutes)

Both ways read the same checkpoint of a model in float32 with AdamW's moments after two steps, into fresh engines. Time
is that of loading alone (converting and loading), after the engine was built; memory is what a rank's anonymous pages
rise to above those before (`rise`), file pages mapped from the checkpoint beside it, which the kernel takes back when
it needs them; disk is what lies there when loading begins beyond the checkpoint. Every way's whole state is compared by
its sums in float64 with the state that was written, and so are weight decays and AdamW's step.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "resharding.json"
SHARDS, UNIVERSAL = "shards", "universal"
_EVERY_S = 0.005


class Memory:
    """Anonymous and file pages of this process, sampled from where the block begins to its end, in MiB."""

    def __enter__(self) -> "Memory":
        self._before, self._ended = self._now(), threading.Event()
        self.rise = [0.0, 0.0]
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(_EVERY_S):
            risen = (now - before for now, before in zip(self._now(), self._before, strict=True))
            self.rise = [max(pair) for pair in zip(self.rise, risen, strict=True)]

    @staticmethod
    def _now() -> list[float]:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {
            key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if key[:3] == "Rss"
        }
        return [kib["RssAnon"] / 1024, kib["RssFile"] / 1024]


def work(part: str, model: str, folder: Path) -> None:
    """What a rank does: `write` a checkpoint, or load it by `own` or by `universal`."""
    import numpy as np

    from sft_dist.config import ModelConfig, OptimizerConfig, RunConfig
    from sft_dist.data.sample import Sample
    from sft_dist.data.selection import Example
    from sft_dist.distributed import collectives
    from sft_dist.distributed.world import find_world
    from sft_dist.model import engine as engines
    from sft_dist.model.batch import collate
    from sft_dist.model.fused_head import LossTerms
    from sft_dist.session import close_session, open_session

    world = find_world(os.environ)
    open_session(world)
    config = RunConfig(
        run_dir=str(folder),
        model=ModelConfig(path=model, dtype="float32"),
        optimizer=OptimizerConfig(weight_decay=0.1),
        deepspeed=str(folder / f"{part}.json"),
    )
    engine = engines.training_engine(config, world, None)
    inner = engine._engine.optimizer
    answer: dict[str, Any] = {}
    if part == "write":
        rng = np.random.default_rng(world.rank)
        engine.train()
        for _ in range(2):
            ids = rng.integers(3, 400, 64).astype(np.int32)
            turns = np.where(np.arange(64) > 2, 0, -1).astype(np.int32)
            sample = Sample("s", 0, "random", ids, (), num_turns=1)
            batch = collate([Example(sample, turns, (turns >= 0).astype(np.float32))])
            loss, _ = engine.loss(batch, LossTerms())
            engine.backward(loss / (61 * world.size), is_last=True)
            engine.step()
        engine.save(folder)
    else:
        started = time.perf_counter()
        with Memory() as memory:
            if part == "own":
                engine.load(folder)
            else:
                engine._engine.load_checkpoint(str(folder), tag=UNIVERSAL, load_lr_scheduler_states=False)
        answer = {
            "load_s": time.perf_counter() - started,
            "rise_mib": memory.rise[0],
            "mapped_mib": memory.rise[1],
        }
    flats = inner.fp32_partitioned_groups_flat
    states = [inner.optimizer.state[flat] for flat in flats]
    own = [
        sum(float(tensor.detach().double().sum()) for tensor in tensors)
        for tensors in (flats, *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")))
    ]
    answer |= {
        "sums": collectives.all_sum(own),
        "weight_decay": [group["weight_decay"] for group in inner.optimizer.param_groups],
        "steps_share_one_tensor": len({id(state["step"]) for state in states}) < len(states),
        "num_parameters": sum(parameter.ds_numel for parameter in engine.causal_lm.parameters()),
    }
    answers = collectives.gather(answer)
    if world.is_main:
        (folder / f"{part}-{world.size}.answer.json").write_text(json.dumps(answers))
    close_session()
    sys.stdout.flush()
    os._exit(0)


def run(part: str, ranks: int, model: str, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    command = [sys.executable, __file__, "--part", part, "--model", model, "--folder", str(folder)]
    processes = []
    for rank in range(ranks):
        values = (str(rank), str(rank), str(ranks), str(ranks), "127.0.0.1", port)
        env = os.environ | dict(zip(names, values, strict=True)) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{part} on {ranks} ranks failed")
    answers: list[dict[str, Any]] = json.loads((folder / f"{part}-{ranks}.answer.json").read_text())
    return answers


def convert(folder: Path) -> dict[str, float]:
    """DeepSpeed's own conversion, with as many processes as it takes by default."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / SHARDS), "--output_folder", str(folder / UNIVERSAL)]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {
        "convert_s": time.perf_counter() - started,
        "disk_mib": _mib(folder / UNIVERSAL),
        "largest_process_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def _mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def _row(way: str, ranks: int, answers: list[dict[str, Any]], written: dict[str, Any], **more: float) -> dict[str, Any]:
    first = answers[0]
    same = all(abs(a - b) <= 1e-9 * max(abs(b), 1.0) for a, b in zip(first["sums"], written["sums"], strict=True))
    row = {
        "way": way,
        "ranks": ranks,
        "load_s": max(answer["load_s"] for answer in answers),
        "rise_mib": max(answer["rise_mib"] for answer in answers),
        "mapped_mib": max(answer["mapped_mib"] for answer in answers),
        "convert_s": 0.0,
        "disk_mib": 0.0,
        **more,
        "same_state": same,
        "same_weight_decay": first["weight_decay"] == written["weight_decay"],
        "own_step_for_every_sub_group": not first["steps_share_one_tensor"],
    }
    print(
        ", ".join(f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = str(Path(options.model).resolve())
    if options.part:
        work(options.part, model, options.folder)
    before = os.getloadavg()
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="resharding-"))
    tree = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    for part, more in (("write", {}), ("own", {}), ("universal", {"checkpoint": {"load_universal": True}})):
        (folder / f"{part}.json").write_text(json.dumps(tree | more))
    try:
        written = run("write", 2, model, folder)[0]
        rows = [_row("own", ranks, run("own", ranks, model, folder), written) for ranks in (1, 2)]
        converted = convert(folder)
        rows += [
            _row("universal", ranks, run("universal", ranks, model, folder), written, **converted) for ranks in (1, 2)
        ]
        checkpoint_mib = _mib(folder / SHARDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    content = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/resharding.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": {"before": before, "after": os.getloadavg()},
        "model": Path(model).name,
        "num_parameters": written["num_parameters"],
        "checkpoint_mib": checkpoint_mib,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
