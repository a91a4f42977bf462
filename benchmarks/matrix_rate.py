"""The rate of a model's own matrix products, which bounds every training of it: one number in FLOP/s a process.

    python benchmarks/matrix_rate.py --model FOLDER --tokens 1024 --targets 600

For each linear layer of one decoder layer, and for the head on the target rows: the product of the forward and the two
of the backward, on random data, in float32 on a CPU and bfloat16 on a GPU. The rate is that of all layers and the head
together, from the best of some repeats of each product.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MAX_TOKENS = 4_096  # larger products are no faster, and take longer to time


@dataclass(frozen=True)
class Shape:
    """What the floor needs to know of a Llama-like model (docs of its config: transformers' LlamaConfig)."""

    num_layers: int
    hidden: int
    queries: int  # heads x head_dim
    keys: int  # key-value heads x head_dim
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, folder: Path) -> "Shape":
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        keys = (config.get("num_key_value_heads") or heads) * head_dim
        sizes = config["num_hidden_layers"], hidden, heads * head_dim, keys
        return cls(*sizes, config["intermediate_size"], config["vocab_size"])

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of one decoder layer."""
        h, q, kv, f = self.hidden, self.queries, self.keys, self.intermediate
        return [(h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h)]

    @property
    def layer_parameters(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.linears)

    def model_flops(self, tokens: int, targets: int, squares: int) -> float:
        """Forward and backward, causal attention, head at targets only; `squares` is the sum of l(l+1) over samples."""
        return self._flops(6, 6, tokens, targets, squares)

    def hardware_flops(self, tokens: int, targets: int, squares: int, *, recompute: bool) -> float:
        """What must be computed: a flash backward forms the scores again; recomputing adds one forward of the layers.

        Korthikanti et al., "Reducing Activation Recomputation", 2022 (recomputation); Dao, "FlashAttention-2", 2023,
        section 4.1 (a backward is 2.5 forwards).
        """
        return self._flops(8 if recompute else 6, 9 if recompute else 7, tokens, targets, squares)

    def _flops(self, of_linears: int, of_attention: int, tokens: int, targets: int, squares: int) -> float:
        linear = of_linears * self.num_layers * self.layer_parameters * tokens
        attention = of_attention * self.num_layers * self.queries * squares
        return float(linear + attention + 6 * self.hidden * self.vocabulary * targets)


def measure(shape: Shape, tokens: int, targets: int, *, device: torch.device, repeats: int) -> float:
    """FLOP/s of the products of one step."""
    flops = seconds = 0.0
    products = [(inputs, outputs, tokens, shape.num_layers) for inputs, outputs in shape.linears]
    products.append((shape.hidden, shape.vocabulary, targets, 1))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for inputs, outputs, wanted_rows, times in products:
        rows = min(wanted_rows, MAX_TOKENS)
        scale = times * wanted_rows / rows
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        gradient = torch.randn(rows, outputs, device=device, dtype=dtype)
        for left, right in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            seconds += scale * min(_seconds(left, right) for _ in range(repeats))
            flops += scale * 2 * inputs * outputs * rows
    return flops / seconds


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    on_gpu = left.device.type == "cuda"
    number = 10 if on_gpu else 1
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(number):
        torch.mm(left, right)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--targets", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(measure(Shape.of(options.model), options.tokens, options.targets, device=device, repeats=options.repeats))


if __name__ == "__main__":
    main()
