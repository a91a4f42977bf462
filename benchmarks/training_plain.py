"""Plain transformers under ZeRO-3, as a careful user writes it: one rank, started by benchmarks/training.py.

Full logits and cross-entropy, sdpa attention with a padding mask, right padding, conversations of near-equal length
together, the same DeepSpeed settings and optimizer as ours. Step 1's conversations are also scored before training, so
that the loss can be compared with ways that have other conversations in a step.
"""

import argparse
import json
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

SEED = 0
IGNORE = -100
Row = dict[str, list[int]]  # ids and is_target of one conversation


def grouped(rows: list[Row], num_groups: int) -> list[list[Row]]:
    """Rows sorted by length and cut into groups of near-equal numbers of tokens; none is empty."""
    ordered = sorted(rows, key=lambda row: len(row["ids"]))
    groups: list[list[Row]] = []
    left = sum(len(row["ids"]) for row in ordered)
    group: list[Row] = []
    size = 0
    for place, row in enumerate(ordered):
        group.append(row)
        size += len(row["ids"])
        groups_left = num_groups - len(groups)
        must_close = len(ordered) - place - 1 == groups_left - 1
        if groups_left > 1 and (size >= left / groups_left or must_close):
            groups.append(group)
            left, group, size = left - size, [], 0
    return [*groups, group]


def padded(rows: list[Row], device: torch.device) -> dict[str, torch.Tensor]:
    """int64 [rows, longest] each."""
    longest = max(len(row["ids"]) for row in rows)
    ids, labels, mask = [], [], []
    for row in rows:
        room = longest - len(row["ids"])
        ids.append(row["ids"] + [0] * room)
        marked = [i if is_target else IGNORE for i, is_target in zip(row["ids"], row["is_target"], strict=True)]
        labels.append(marked + [IGNORE] * room)
        mask.append([1] * len(row["ids"]) + [0] * room)
    tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.tensor(value, device=device) for name, value in tensors.items()}


def loss_sum(engine: Any, rows: list[Row]) -> torch.Tensor:
    batch = padded(rows, engine.device)
    labels = batch.pop("labels")
    logits = engine(**batch, use_cache=False).logits
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]  # not the logits: cutting those would copy them
    return F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten(), reduction="sum")


def count_targets(rows: list[Row]) -> int:
    return sum(sum(row["is_target"][1:]) for row in rows)


def count_tokens(rows: list[Row]) -> int:
    return sum(len(row["ids"]) for row in rows)


def load(options: argparse.Namespace) -> Any:
    import deepspeed
    from deepspeed.utils import logger
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # the same transport as every other way
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    tree = json.loads(options.deepspeed.read_text())
    announced = HfDeepSpeedConfig(tree)
    dtype = torch.bfloat16 if tree["bf16"]["enabled"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa")
    del announced
    if options.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=tree)
    return engine


def all_sum(value: torch.Tensor) -> float:
    total = value.detach().double().cpu() if dist.get_backend() == "gloo" else value.detach().double()
    dist.all_reduce(total)
    return float(total)


def score(engine: Any, packs: list[list[Row]], rank: int, size: int) -> float:
    """Mean NLL of the targets of a step, untrained; a pack at a time, since every rank must enter each forward."""
    engine.eval()
    with torch.no_grad():
        sums = [loss_sum(engine, pack) for pack in packs[rank::size]]
    return all_sum(torch.stack(sums).sum()) / sum(map(count_targets, packs))


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", type=Path, required=True)
    parser.add_argument("--deepspeed", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--micro-tokens", type=int, default=4_096, help="most tokens of a forward, about")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    steps: list[list[list[Row]]] = json.loads(options.batches.read_text())["steps"]
    engine = load(options)
    first_loss = score(engine, steps[0], rank, size)
    # One micro-step is a group a rank; neighbours in length share it, since ZeRO-3 makes ranks wait for each other.
    longest_pack = max(count_tokens(pack) for step in steps for pack in step)
    micro_steps = max(1, -(-longest_pack // options.micro_tokens)) * (len(steps[0]) // size)
    pool = [row for step in steps for pack in step for row in pack]
    groups = grouped(pool, len(steps) * micro_steps * size)
    together = [groups[first : first + size] for first in range(0, len(groups), size)]
    random.Random(SEED).shuffle(together)
    rows = []
    engine.train()
    for step in range(len(steps)):
        micro_batches = together[step * micro_steps : (step + 1) * micro_steps]
        members = [row for groups in micro_batches for group in groups for row in group]
        started = time.perf_counter()
        total = torch.zeros((), device=engine.device)
        for number, of_ranks in enumerate(micro_batches):
            engine.set_gradient_accumulation_boundary(number == micro_steps - 1)
            loss = loss_sum(engine, of_ranks[rank]) / count_targets(members)
            engine.backward(loss * size)  # DeepSpeed averages over ranks
            total += loss.detach()
        engine.step()
        shown = all_sum(total)
        seconds = time.perf_counter() - started
        wide = [len(group) * max(len(row["ids"]) for row in group) for groups in micro_batches for group in groups]
        counts = {"tokens": count_tokens(members), "targets": count_targets(members), "computed": sum(wide)}
        rows.append({"seconds": seconds, "loss": shown, **counts})
        if rank == 0:
            print(f"plain step {step + 1}/{len(steps)}  {seconds:.2f} s  loss {shown:.4f}", flush=True)
    answer = {"first_loss": first_loss, "steps": rows, "peak_gib": peak_gib()}
    options.output.with_suffix(f".{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    os._exit(0)  # gloo groups abort now and then in the interpreter's shutdown


if __name__ == "__main__":
    main()
