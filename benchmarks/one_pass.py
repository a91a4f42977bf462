"""One pass against K passes: log-probs of all turns of K-turn conversations, tokens computed and wall time.

    python benchmarks/one_pass.py                       a random Llama of about 30M parameters, built on the spot
    python benchmarks/one_pass.py --model FOLDER        another model (its weights and vocabulary; any tokens will do)

Both ways score the same turns by the same model and attention: one forward over the whole conversation, or K forwards,
one for each turn with everything before it (as serving the dialogue would, without a cache). They are timed in turns
inside one process, and the ratios are those of the medians, of wall time and of the processor time of this process,
which other work on the machine disturbs less. Beside them: the largest difference of a turn's log-prob.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft_dist.config import ModelConfig
from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Example
from sft_dist.model import loading
from sft_dist.model.batch import IGNORE, Batch, collate
from sft_dist.model.logprobs import TokenLogprobs

RESULTS = Path(__file__).parent / "results" / "one_pass.json"
TURNS = (2, 3, 5, 8, 12, 16, 20)
SEED = 0


def build_model(folder: Path) -> Path:
    """A random Llama of about 30M parameters: what is timed does not depend on the values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1_024,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def conversation(num_turns: int, vocab_size: int, rng: np.random.Generator) -> Example:
    """K exchanges of 20 to 60 tokens to the model and 20 to 80 tokens of its own."""
    spans: list[Span] = []
    at = 0
    for turn in range(1, num_turns + 1):
        asked, answered = int(rng.integers(20, 61)), int(rng.integers(20, 81))
        spans.append(Span(2 * turn - 2, "user", at, at, at + asked, at + asked, is_owned=True))
        at += asked
        spans.append(Span(2 * turn - 1, "assistant", at, at, at + answered, at + answered, is_owned=True, turn=turn))
        at += answered
    ids = rng.integers(3, vocab_size, at).astype(np.int32)
    return example(Sample("c", 0, "benchmark", ids, tuple(spans), num_turns=num_turns))


def example(sample: Sample, *, only_last: bool = False) -> Example:
    """All answers are targets, or the last one alone."""
    answers = [span for span in sample.spans if span.turn]
    turns = np.full(len(sample.ids), -1, np.int32)
    for span in answers[-1:] if only_last else answers:
        turns[span.output_start : span.output_end] = span.turn
    return Example(sample, turns, (turns > 0).astype(np.float32))


def prefixes(whole: Example) -> list[Example]:
    """For each turn, the conversation up to its end with that turn as the target."""
    sample = whole.sample
    ends = [(number, span.output_end) for number, span in enumerate(sample.spans) if span.turn]
    return [
        example(Sample("c", 0, "benchmark", sample.ids[:end], sample.spans[: number + 1], num_turns=0), only_last=True)
        for number, end in ends
    ]


def turn_scores(model: TokenLogprobs, batches: list[Batch]) -> list[float]:
    """Log-probs of all turns, one forward a batch."""
    scores: list[float] = []
    with torch.no_grad():
        for batch in batches:
            slots = batch.turn_ids[0][batch.targets[0] != IGNORE]
            sums = torch.zeros(len(batch.turns), dtype=torch.float64)
            scores += sums.index_add_(0, slots, model(batch).logprob.double()).tolist()
    return scores


def measure(
    model: TokenLogprobs, vocab_size: int, num_turns: int, repeats: int, num_conversations: int
) -> dict[str, Any]:
    rng = np.random.default_rng([SEED, num_turns])
    wholes = [conversation(num_turns, vocab_size, rng) for _ in range(num_conversations)]
    ways = {
        "one_pass": [collate([whole]) for whole in wholes],
        "k_passes": [collate([prefix]) for whole in wholes for prefix in prefixes(whole)],
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}  # (wall, processor)
    scores: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for name, batches in ways.items():
            started = (time.perf_counter(), time.process_time())
            scores[name] = turn_scores(model, batches)
            if repeat:  # the first round warms up
                times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    tokens = {name: sum(batch.input_ids.shape[1] for batch in batches) for name, batches in ways.items()}
    medians = {
        kind: {name: statistics.median(pair[place] for pair in pairs) for name, pairs in times.items()}
        for place, kind in enumerate(("wall", "processor"))
    }
    differences = np.abs(np.array(scores["one_pass"]) - np.array(scores["k_passes"]))
    return {
        "turns": num_turns,
        "conversations": num_conversations,
        "tokens": tokens,
        "tokens_ratio": round(tokens["k_passes"] / tokens["one_pass"], 3),
        "wall_and_processor_s": {
            name: [[round(value, 4) for value in pair] for pair in pairs] for name, pairs in times.items()
        },
        "median_s": {kind: {name: round(v, 4) for name, v in of.items()} for kind, of in medians.items()},
        "wall_ratio": round(medians["wall"]["k_passes"] / medians["wall"]["one_pass"], 3),
        "processor_ratio": round(medians["processor"]["k_passes"] / medians["processor"]["one_pass"], 3),
        "largest_difference_nats": float(differences.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder or Hub id")
    parser.add_argument("--turns", type=int, nargs="+", default=TURNS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--conversations", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or str(build_model(Path(folder)))
        section = ModelConfig(path=path, dtype="float32", attention="split")
        config = loading.load_config(section, max_length=2)
        loaded = loading.load_causal_lm(section, config, added=None, dtype=torch.float32, max_length=2, seed=None)
    model = TokenLogprobs(loaded.eval())
    vocab_size = config.get_text_config().vocab_size
    rows = []
    for num_turns in options.turns:
        row = measure(model, vocab_size, num_turns, options.repeats, options.conversations)
        rows.append(row)
        print(
            f"K {num_turns:>2}  tokens x{row['tokens_ratio']:.2f}  wall x{row['wall_ratio']:.2f}  "
            f"processor x{row['processor_ratio']:.2f}  (one pass {row['median_s']['wall']['one_pass']:.2f} s)  "
            f"largest difference of a turn {row['largest_difference_nats']:.1e} nats",
            flush=True,
        )
    result = {
        "benchmark": "one pass against K passes",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/one_pass.py", *sys.argv[1:]]),
        "model": options.model or "random Llama",
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
