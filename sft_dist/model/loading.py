"""The pre-trained model θ̂, loaded whole or sharded, with nothing newly initialised in silence."""

import fnmatch
from typing import Any

import torch

from sft_dist.config import ModelConfig
from sft_dist.errors import ConfigError
from sft_dist.model import attention

_NAMED_PARAMETERS = 5


def load_config(model: ModelConfig, max_length: int) -> Any:
    """The model's configuration. Raises ConfigError where it is missing or its context is shorter than max_length."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        raise ConfigError(f"model.path: {model.path}: no model configuration there: {_first_line(error)}") from error
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ConfigError(
            f"data.max_length ({max_length:,}) is longer than the model's context "
            f"({context:,}; config.json max_position_embeddings)"
        )
    return config


def load_causal_lm(model: ModelConfig, config: Any, *, dtype: torch.dtype, max_length: int) -> Any:
    """A causal language model with its pre-trained weights, in `dtype`.

    Sharded by ZeRO-3 when model/engine.py has announced it (`sharded_loading`). Raises ConfigError for parameters
    that the files do not hold, unless their names match model.allow_new_parameters.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    implementation = attention.choose_attention(config, model.attention, max_length)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model.path,
            config=config,
            dtype=dtype,
            attn_implementation=implementation,
            output_loading_info=True,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=None if model.trust_remote_code else True,
        )
    except Exception as error:
        raise ConfigError(f"model.path: {model.path}: the weights cannot be loaded: {_first_line(error)}") from error
    _check_report(model, report)
    return loaded


def _check_report(model: ModelConfig, report: dict[str, Any]) -> None:
    mismatched = [item[0] if isinstance(item, tuple) else item for item in report.get("mismatched_keys") or ()]
    new = sorted({*report["missing_keys"], *mismatched})
    refused = [name for name in new if not any(fnmatch.fnmatch(name, p) for p in model.allow_new_parameters)]
    if refused:
        raise ConfigError(
            f"model.path: {model.path}: {len(refused)} parameter(s) are not in its files and would start at random: "
            f"{', '.join(refused[:_NAMED_PARAMETERS])}; name them in model.allow_new_parameters if that is meant"
        )
    if report["unexpected_keys"]:
        names = sorted(report["unexpected_keys"])
        raise ConfigError(
            f"model.path: {model.path}: its files hold {len(names)} parameter(s) that the model has no place for: "
            f"{', '.join(names[:_NAMED_PARAMETERS])}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
