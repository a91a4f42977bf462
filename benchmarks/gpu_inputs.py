"""Inputs of benchmarks/gpu_check.py: a random Llama-like model with a tokenizer, and synthetic conversations.

    python3 benchmarks/gpu_inputs.py FOLDER '{"hidden_size": 2048, ...}'

Token ids are uniform and lengths lognormal, as chat data have it: what is timed depends on lengths alone. The model is
made on the GPU where there is one, and written in bfloat16.
"""

import json
import sys
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

SEED = 0
MEDIAN_TOKENS, SIGMA = 300, 1.0  # of the lognormal lengths
TARGET_SHARE = 0.4


def build_model(folder: Path, sizes: dict[str, int | bool]) -> None:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype="bfloat16")
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)


def write_conversations(path: Path, *, num_tokens: int, longest: int, vocabulary: int) -> None:
    """Records of token ids: a prompt and a response that is the target, `num_tokens` in all."""
    rng = np.random.default_rng(SEED)
    written = 0
    with path.open("w") as file:
        while written < num_tokens:
            length = int(np.clip(rng.lognormal(np.log(min(MEDIAN_TOKENS, longest / 4)), SIGMA), 8, longest))
            _write(file, length, round(length * (1 - TARGET_SHARE)), vocabulary, rng)
            written += length


def write_documents(path: Path, *, num_tokens: int, length: int, vocabulary: int) -> None:
    """Records of exactly `length` tokens, all of them targets but the first: what public figures are measured on."""
    rng = np.random.default_rng(SEED)
    with path.open("w") as file:
        for _ in range(-(-num_tokens // length)):
            _write(file, length, 1, vocabulary, rng)


def _write(file: TextIO, length: int, prompt: int, vocabulary: int, rng: np.random.Generator) -> None:
    ids = rng.integers(3, vocabulary, length).tolist()
    file.write(json.dumps({"input_ids": ids, "loss_mask": [0] * prompt + [1] * (length - prompt)}) + "\n")


if __name__ == "__main__":
    build_model(Path(sys.argv[1]), json.loads(sys.argv[2]))
