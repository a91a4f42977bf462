"""Base models as they come from pre-training: no chat template, no control tokens but the end of text."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_CORPUS = [
    "What is the capital of France? Paris, of course.",
    "system user assistant\n\nimstart imend < | > 0123456789",
]


def build_bare_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def build_bare_model(folder: Path, family: str, *, spare_rows: int = 0, dropout: float = 0.0) -> Path:
    """A random base model: llama (tied), qwen2 (untied), phi (untied, a bias on the head) or gpt2 (tied).

    `spare_rows`: rows of the embeddings beyond the tokenizer's ids.
    """
    torch.manual_seed(0)
    tokenizer = build_bare_tokenizer()
    common = {"vocab_size": len(tokenizer) + spare_rows, "eos_token_id": 0, "bos_token_id": None}
    decoder = common | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "attention_dropout": dropout,
    }
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**decoder, tie_word_embeddings=True))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**decoder, num_key_value_heads=2, tie_word_embeddings=False))
        case "phi":
            model = PhiForCausalLM(PhiConfig(**decoder, tie_word_embeddings=False))
            torch.nn.init.normal_(model.lm_head.bias)
        case "gpt2":
            small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
            model = GPT2LMHeadModel(GPT2Config(**common, **small, resid_pdrop=dropout, embd_pdrop=dropout))
        case other:
            raise ValueError(other)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
