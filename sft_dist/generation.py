"""The verb `generate`: answer one prompt with a model folder, a Hub id or a checkpoint, by plain transformers."""

from pathlib import Path
from typing import Any

from sft_dist.config import ModelConfig
from sft_dist.data.renderer import load_tokenizer, template_text
from sft_dist.errors import ConfigError, ExitCode
from sft_dist.train import checkpoint as checkpoints
from sft_dist.train import rundir


def run(model: str, *, prompt: str, system: str | None, checkpoint: str, max_new_tokens: int) -> ExitCode:
    """Print the greedy answer."""
    import torch
    from jinja2 import TemplateError

    causal_lm, tokenizer, stop_ids = _load(model, checkpoint)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    try:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(causal_lm.device)
    except TemplateError as error:
        raise ConfigError(f"--model: {model}: its chat template refuses the prompt: {error}") from None
    with torch.no_grad():
        output = causal_lm.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return ExitCode.DONE


def _load(model: str, which: str) -> tuple[Any, Any, list[int]]:
    import torch
    from transformers.utils import logging

    from sft_dist.model import loading, zero
    from sft_dist.model.engine import compute_dtype, set_environment, stored_parameters

    logging.disable_progress_bar()
    set_environment()
    found = None
    if rundir.is_run_dir(model):
        config = rundir.saved_config(Path(model)).model
        found = checkpoints.find(Path(model), which)
    else:
        config = ModelConfig(path=model)
    config = config.model_copy(update={"attention": "sdpa"})
    model_config = loading.load_config(config, max_length=2)
    added = loading.new_tokens(config)
    causal_lm = loading.load_causal_lm(config, model_config, added=added, dtype=compute_dtype(config), max_length=2)
    tokenizer = load_tokenizer(config)
    tokenizer.chat_template = template_text(tokenizer, None) if found is None else found.manifest["template"]
    if tokenizer.chat_template is None:
        raise ConfigError(f"--model: {model}: its tokenizer has no chat template")
    stop_ids = [tokenizer.eos_token_id]
    if found is not None:
        zero.assign(causal_lm, stored_parameters(found.folder))
        stop_ids += found.manifest["stop_ids"]
    known = causal_lm.generation_config.eos_token_id
    stop_ids += [] if known is None else [known] if isinstance(known, int) else list(known)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return causal_lm.eval().to(device), tokenizer, list(dict.fromkeys(stop_ids))
