"""The head alone: hidden rows to loss and gradients, by several ways, each in fresh processes. Time and peak memory.

    python benchmarks/head.py                    on the CPU, float32
    python benchmarks/head.py --device cuda      on a GPU, bfloat16, larger cases

T rows of hidden states, of which a share (every fifth two) have a target; the loss is the sum of the targets' NLL over
their number. Every way starts from the same hidden states [T, D] and gives the gradients of these and of the weight:

    ours          model/fused_head.py on the target rows
    products      its three matrix products alone, on memory allocated before: the floor of time
    full          all T rows, full logits, F.cross_entropy that ignores those without a target
    selected      the target rows, full logits, F.cross_entropy
    checkpointed  the target rows in chunks of 1,024, each recomputed in the backward (four products)
    torch         F.linear_cross_entropy on the target rows, torch's own choice of chunk (torch >= 2.13)
    torch-same    the same with the chunk that ours takes

Peak memory is what the process holds at most above what it held before the first forward (resident; on a GPU
allocated), without the hidden states and the weight. The ways take turns; the best of their times counts, of the wall
and of the processor, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sft_dist.model.fused_head import LinearHead, LossTerms, chunk_rows, weighted_loss

RESULTS = Path(__file__).parent / "results" / "head.json"
# name: (T, D, V); widths and vocabularies of SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B
CPU_CASES = {"smollm2-135m": (2_048, 576, 49_152), "qwen2.5-0.5b": (1_024, 896, 151_936)}
GPU_CASES = {"llama-3.2-1b": (16_384, 2_048, 128_256), "llama-3.1-8b": (16_384, 4_096, 128_256)}
ROUNDS = 2
ENOUGH_S = 10.0  # no repeat of a way that took this long
MIB = 2**20

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [T, D], weight [V, D], labels [T] (-100: no target)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows = target_rows(labels)
    ones = torch.ones(len(rows), device=hidden.device)
    loss = weighted_loss(hidden[rows], labels[rows], ones, LinearHead(weight, None), LossTerms()).loss
    assert loss is not None
    return loss / len(rows)


def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def selected(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows = target_rows(labels)
    return full(hidden[rows], weight, labels[rows])


def checkpointed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    def of_chunk(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((rows @ weight.t()).float(), targets, reduction="sum")

    rows = target_rows(labels)
    chunks = zip(hidden[rows].split(1_024), labels[rows].split(1_024), strict=True)
    losses = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum() / len(rows)


def torchs(chunk: int | None) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = target_rows(labels)
        chosen = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk)
        options = chosen if chunk else torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden[rows], weight, labels[rows], reduction="sum", options=options) / len(rows)

    return loss


def target_rows(labels: Tensor) -> Tensor:
    return (labels != -100).nonzero()[:, 0]


def products(hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], None]:
    """The three matrix products of the target rows, in the chunks of ours."""
    rows = hidden.detach()[target_rows(labels)]
    size = min(chunk_rows(len(weight), hidden.device.type), len(rows))
    matrix = weight.detach()
    logits = torch.zeros(size, len(weight), dtype=hidden.dtype, device=hidden.device)
    of_rows, of_weight = torch.zeros_like(rows), torch.zeros_like(matrix)

    def run() -> None:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            torch.mm(part, matrix.t(), out=logits[: len(part)])
            torch.mm(logits[: len(part)], matrix, out=of_rows[start : start + size])
            torch.addmm(of_weight, logits[: len(part)].t(), part, out=of_weight)

    return run


def ways(vocab_size: int, device: str) -> dict[str, Loss | None]:
    found: dict[str, Loss | None] = {"ours": ours, "products": None, "full": full, "selected": selected}
    found["checkpointed"] = checkpointed
    if hasattr(F, "linear_cross_entropy"):
        found |= {"torch": torchs(None), "torch-same": torchs(chunk_rows(vocab_size, device))}
    return found


def measure(way: str, case: tuple[int, int, int], device: str, repeats: int) -> dict[str, Any]:
    """In a process of its own: best time of a forward and backward, peak memory, and figures to compare results by."""
    num_rows, width, vocab_size = case
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).mul_(width**-0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    labels[torch.arange(num_rows) % 5 >= 2] = -100
    labels = labels.to(device)
    loss_of = ways(vocab_size, device)[way]
    run = products(hidden, weight, labels) if loss_of is None else None
    result: dict[str, Any] = {}

    def once() -> tuple[float, float]:
        hidden.grad = weight.grad = None
        synchronise(device)
        started = time.perf_counter(), time.process_time()
        if loss_of is None:
            assert run is not None
            run()
        else:
            loss = loss_of(hidden, weight, labels)
            loss.backward()
            result["loss"] = loss
        synchronise(device)
        return time.perf_counter() - started[0], time.process_time() - started[1]

    torch.mm(hidden.detach()[:64], weight.detach()[:64].t())  # the libraries' own memory
    before = memory(device)
    times = [once()]
    peak = memory(device) - before
    while len(times) <= repeats and sum(wall for wall, _ in times) < ENOUGH_S:
        times.append(once())
    seconds, processor_s = (min(kind) for kind in zip(*(times[1:] or times), strict=True))  # the first warms up
    result = {name: value.item() for name, value in result.items()}
    if loss_of is not None:
        result |= {
            "hidden_grad_norm": hidden.grad.float().norm().item(),
            "weight_grad_norm": weight.grad.float().norm().item(),
        }
    return {"seconds": seconds, "processor_s": processor_s, "peak_mib": round(peak / MIB, 1)} | result


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(device: str) -> int:
    """Bytes this process held at most so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return found


def run_case(name: str, case: tuple[int, int, int], device: str, repeats: int) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS):
        for way in ways(case[2], device):
            answer = in_own_process(["--way", way, "--case", name, "--device", device, "--repeats", str(repeats)])
            best = found.setdefault(way, answer)
            for kind in ("seconds", "processor_s"):
                best[kind] = min(best[kind], answer[kind])
            best["peak_mib"] = max(best["peak_mib"], answer["peak_mib"])
    tolerance = 1e-4 if device == "cpu" else 2e-2
    for way, answer in found.items():
        for figure in ("loss", "hidden_grad_norm", "weight_grad_norm"):
            if figure in answer and abs(answer[figure] / found["selected"][figure] - 1) > tolerance:
                raise SystemExit(f"{name}: {way}: {figure} is {answer[figure]}, not {found['selected'][figure]}")
    rows, width, vocab_size = len(range(0, case[0], 5)) + len(range(1, case[0], 5)), *case[1:]
    print(f"{name}: T {case[0]:,}, of which {rows:,} targets, D {width:,}, V {vocab_size:,}")
    for way, answer in found.items():
        answer["times_ours"] = round(answer["seconds"] / found["ours"]["seconds"], 3)
        times = f"{answer['seconds']:8.3f} s  x{answer['times_ours']:<6} processor {answer['processor_s']:8.3f} s"
        print(f"  {way:<13} {times}  peak {answer['peak_mib']:>9,.1f} MiB")
    rate = 6 * rows * width * vocab_size / found["products"]["seconds"]
    share = found["products"]["seconds"] / found["ours"]["seconds"]
    print(f"  the products run at {rate / 1e9:,.0f} GFLOP/s and take {share:.0%} of ours", flush=True)
    shape = {"T": case[0], "targets": rows, "D": width, "V": vocab_size, "chunk": chunk_rows(vocab_size, device)}
    return {"case": name, **shape, "products_gflops": round(rate / 1e9, 1), "ways": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--case", help="one case alone")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    cases = CPU_CASES if options.device == "cpu" else GPU_CASES
    if options.way:
        print(json.dumps(measure(options.way, cases[options.case], options.device, options.repeats)))
        return
    chosen = {options.case: cases[options.case]} if options.case else cases
    result = {
        "benchmark": "the head alone",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/head.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "cases": [run_case(name, case, options.device, options.repeats) for name, case in chosen.items()],
        "load_average_after": os.getloadavg(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
