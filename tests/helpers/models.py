"""Tiny pre-trained models and tokenizers, built on the spot: real files that every loader reads."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAMILIES = ("llama", "qwen2", "gpt2")
_CORPUS = [
    "What is the capital of France? Paris, of course.",
    "Tell me a joke about the weather, please.",
    "It rains cats and dogs; I stepped in a poodle!",
    "system user assistant You are a helpful assistant.",
    "Newlines\n\n\nmerge\n\n\ninto\n\n\none\n\n\ntoken.",
    "The quick brown fox jumps over the lazy dog 0123456789.",
]


def build_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML control tokens: any text round-trips."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def build_model(
    folder: Path, family: str = "llama", *, dropout: float = 0.0, seed: int = 0, context: int = 512
) -> Path:
    """Write a random model of one family with its tokenizer to `folder` and return it."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    common = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    decoder = common | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.2,
        "attention_dropout": dropout,
    }
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**decoder, tie_word_embeddings=True))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**decoder, tie_word_embeddings=False))
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                **common,
                n_embd=32,
                n_layer=3,
                n_head=4,
                n_positions=context,
                initializer_range=0.2,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
            )
        )
    else:
        raise ValueError(family)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
