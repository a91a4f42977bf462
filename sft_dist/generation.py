"""The verb `generate`: answer one prompt with a model folder, a Hub id or a checkpoint, by plain transformers."""

import datetime
from pathlib import Path
from typing import Any

from sft_dist.config import AdapterConfig, DataConfig, ModelConfig
from sft_dist.data.conversation import Conversation, Message, RecordError
from sft_dist.data.renderer import Renderer
from sft_dist.data.rendering import encode_prompt
from sft_dist.data.tokenizer import load_tokenizer, template_text
from sft_dist.errors import ConfigError, ExitCode
from sft_dist.train import checkpoint as checkpoints
from sft_dist.train import contract, rundir


def run(model: str, *, prompt: str, system: str | None, checkpoint: str, max_new_tokens: int) -> ExitCode:
    """Print the greedy answer."""
    import torch

    from sft_dist.model import loading

    causal_lm, renderer, stop_ids = _load(model, checkpoint)
    messages = (*((Message("system", system),) if system else ()), Message("user", prompt))
    try:
        # As in training: what looks like a control token in the prompt is text.
        context = encode_prompt(renderer, Conversation("prompt", 0, "prompt", "--prompt", 1.0, messages))
    except RecordError as error:
        raise ConfigError(f"--prompt: it cannot be put to {model}: {error.detail}") from None
    input_ids = torch.tensor(context, dtype=torch.int64, device=causal_lm.device)[None]
    loading.check_ids(causal_lm.config, int(context.max()))
    _check_context(causal_lm.config, input_ids.shape[1], max_new_tokens)
    with torch.no_grad():
        output = causal_lm.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
    print(renderer.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))
    return ExitCode.DONE


def _check_context(model_config: Any, num_prompt_tokens: int, max_new_tokens: int) -> None:
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is not None and num_prompt_tokens + max_new_tokens > context:
        raise ConfigError(
            f"--prompt: {num_prompt_tokens:,} tokens and --max-new-tokens {max_new_tokens:,} are more than the model's "
            f"context ({context:,}; config.json max_position_embeddings); shorten the prompt or ask for fewer tokens"
        )


def _load(model: str, which: str) -> tuple[Any, Renderer, list[int]]:
    """The model, the renderer of the contexts it was trained on, and the ids that end an answer."""
    import torch
    from transformers.utils import logging

    from sft_dist.model import adapters, attention, beside, loading, zero
    from sft_dist.model.engine import compute_dtype, set_environment, stored_parameters

    logging.disable_progress_bar()
    set_environment()
    found = seed = None
    adapter = AdapterConfig()
    if rundir.is_run_dir(model):
        saved = rundir.saved_config(Path(model))
        config, data, seed, adapter = saved.model, saved.data, saved.seed, saved.adapter
        contract.check_language_model(saved, model)
        found = checkpoints.find(Path(model), which)
        contract.check_base(saved, found)
    else:
        config, data = ModelConfig(path=model), DataConfig(date=datetime.date.today())
    model_config = loading.load_config(config, max_length=2)
    causal_lm = loading.load_causal_lm(
        config,
        model_config,
        added=loading.new_tokens(config),
        dtype=compute_dtype(config),
        max_length=2,
        seed=seed,
        quantisation=adapters.quantisation(adapter, compute_dtype(config)),
        implementation=attention.for_generation(model_config),
    )
    tokenizer = load_tokenizer(config)
    template = template_text(tokenizer, None) if found is None else found.manifest["template"]
    if template is None:
        raise ConfigError(f"--model: {model}: its tokenizer has no chat template")
    stop_ids = [tokenizer.eos_token_id]
    if found is not None:
        base = adapters.inject(causal_lm, adapter, seed=seed or 0)
        zero.assign(causal_lm, beside.without_head(stored_parameters(found.folder)), but=base)
        stop_ids += found.manifest["stop_ids"]
    known = causal_lm.generation_config.eos_token_id
    stop_ids += [] if known is None else [known] if isinstance(known, int) else list(known)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    renderer = Renderer(tokenizer, template, date=data.date, template_kwargs=data.template_kwargs)
    return causal_lm.eval().to(device), renderer, list(dict.fromkeys(stop_ids))
