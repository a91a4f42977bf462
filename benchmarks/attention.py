"""Attention of packed rows against a dense mask over the whole row: forward and backward, one layer's worth.

    python benchmarks/attention.py                   # the CPU, or a GPU where there is one

Rows of T tokens hold 1, 4, 16 or 64 conversations of equal length l, so S2/T = Σl²/T = l. `packed` is what a run takes
here (model.attention: auto), `slices` cuts the row with slices under autograd instead, `dense` is one masked
scaled_dot_product_attention over the row, its mask built beforehand. All give the same output and gradients, which is
checked in the same run. On the CPU the seconds are processor time of one thread. A masked kernel computes the whole
square and a causal one half of each conversation's, so dense over packed is at most 2 T² / S2. Writes
results/attention.json.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft_dist.model import attention

NUM_CONVERSATIONS = (1, 4, 16, 64)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="T of the rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    heads, kv_heads, head_dim = (32, 8, 128) if on_gpu else (9, 3, 64)  # of a Llama of 8B, and of SmolLM2-135M
    dtype = torch.bfloat16 if on_gpu else torch.float32
    cases = []
    for num_tokens in options.tokens or ((4096, 8192, 32768) if on_gpu else (1024, 2048, 4096)):
        for num in NUM_CONVERSATIONS:
            shapes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim))
            rows = [torch.randn(1, num_tokens, *shape, device=device, dtype=dtype) for shape in shapes]
            case = measure(rows, (num_tokens // num,) * num, options.repeats)
            cases.append(case)
            print(describe(case), flush=True)
    path = Path(__file__).parent / "results" / "attention.json"
    path.write_text(json.dumps(surroundings(device, dtype, options.threads) | {"cases": cases}, indent=2) + "\n")


def measure(rows: list[Tensor], lengths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Seconds of forward and backward of each way, interleaved, after two that do not count."""
    ways = attention_ways(rows[0].device, lengths)
    inputs = [row.transpose(1, 2).requires_grad_() for row in rows]
    direction = torch.randn(1, sum(lengths), *rows[0].shape[2:], device=rows[0].device, dtype=rows[0].dtype)
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward_s": [], "backward_s": []} for name in ways}
    answers: dict[str, list[Tensor]] = {}
    for repeat in range(repeats + 2):
        for name, attend in ways.items():
            start = now(rows[0].device)
            out = attend(*inputs)
            middle = now(rows[0].device)
            grads = torch.autograd.grad(out, inputs, direction)
            end = now(rows[0].device)
            answers[name] = [out.detach(), *grads]
            if repeat >= 2:
                seconds[name]["forward_s"].append(middle - start)
                seconds[name]["backward_s"].append(end - middle)
    figures: dict[str, Any] = {name: {key: summary(values) for key, values in s.items()} for name, s in seconds.items()}
    totals = {
        name: statistics.median(map(sum, zip(s["forward_s"], s["backward_s"], strict=True)))
        for name, s in seconds.items()
    }
    largest = {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(values, answers["dense"], strict=True))
        for name, values in answers.items()
        if name != "dense"
    }
    assert max(largest.values()) < (1e-4 if rows[0].dtype is torch.float32 else 2e-2), largest
    num_tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    return {
        "tokens": num_tokens,
        "conversations": len(lengths),
        "squares_per_token": squares / num_tokens,
        "largest_ratio_possible": 2 * num_tokens**2 / squares,
        "dense_over_packed": totals["dense"] / totals["packed"],
        "slices_over_packed": totals["slices"] / totals["packed"],
        "relative_difference_to_dense": largest,
        "ways": figures,
    }


def attention_ways(device: torch.device, lengths: tuple[int, ...]) -> dict[str, Attend]:
    """Functions of query, key and value [1, heads, T, D] to [1, T, heads, D]; masks and bounds are made here, once."""
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    row = {"cu_seqlens": bounds.to(device), "host_cu_seqlens": bounds, "max_seqlen": max(lengths)}
    function = attention.varlen_attention if device.type == "cuda" else attention.split_attention
    conversation = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    mask = (conversation[:, None] == conversation[None, :]).tril()[None, None]
    module = torch.nn.Module()

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(module, q, k, v, None, **row)[0]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sharing = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1)  # as transformers does under a mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts, ends = [], bounds.tolist()
        for first, end in pairwise(ends):
            own = [x[:, :, first:end] for x in (q, k, v)]
            parts.append(F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True))
        return torch.cat(parts, 2).transpose(1, 2)

    return {"packed": packed, "slices": slices, "dense": dense}


def now(device: torch.device) -> float:
    """Seconds: of the clock on a GPU, of processor time on the CPU, which other processes disturb less."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values)}


def describe(case: dict[str, Any]) -> str:
    ways = case["ways"]
    times = "  ".join(
        f"{name} {1e3 * ways[name]['forward_s']['median']:.1f} + {1e3 * ways[name]['backward_s']['median']:.1f} ms"
        for name in ways
    )
    return (
        f"T {case['tokens']:>6,}  S2/T {case['squares_per_token']:>6,.0f}  {times}  dense/packed "
        f"{case['dense_over_packed']:.1f} of at most {case['largest_ratio_possible']:.0f}"
    )


def surroundings(device: torch.device, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""),
        "threads": threads,
        "load_average": os.getloadavg(),
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
