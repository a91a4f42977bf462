"""Low-rank adapters beside the linear layers of a frozen model, by PEFT: LoRA, rsLoRA, DoRA.

In: a loaded causal language model, sharded or not, and the run file's section. Out: the same model, its linear layers
wrapped, everything but the adapters frozen. The layers and their mathematics are PEFT's; which layers, from which seed
they start, and that they are sharded like all else, is decided here.
"""

import fnmatch
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sft_dist.config import AdapterConfig
from sft_dist.errors import ConfigError
from sft_dist.model import zero
from sft_dist.model.layers import decoder_layers
from sft_dist.model.loading import NewTokens

_NAMED = 5


def quantisation(adapter: AdapterConfig, dtype: torch.dtype) -> Any:
    """What transformers is told about 4 bits; None for weights as they are. Raises ConfigError where it cannot run."""
    if adapter.quantise == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"adapter.quantise: {adapter.quantise} needs bitsandbytes, which is not installed: pip install "
            "bitsandbytes, or use none"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=adapter.quantise,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # shards are cut from tensors of the model's precision
    )


def keep_layout(causal_lm: nn.Module) -> None:
    """Leave 4-bit weights as they lie: bitsandbytes packs them anew on some CPUs, and shards do not follow."""
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def inject(causal_lm: Any, adapter: AdapterConfig, *, seed: int) -> frozenset[str]:
    """Wrap the chosen linear layers in place and freeze all other parameters, whose names are returned.

    Those of the base are as model.path has them, and no checkpoint holds them; without adapters there are none.

    The adapters start from `seed`, the same for every number of ranks, and change nothing: one of their two matrices
    is zero. They are sharded if the model is, and this is a collective then. Raises ConfigError for targets that are
    none.
    """
    if adapter.kind == "none":
        return frozenset()
    from peft import inject_adapter_in_model

    config = lora_config(causal_lm, adapter)
    keep_layout(causal_lm)
    torch.manual_seed(seed % 2**63)  # all that torch takes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of matrices that lie transposed, which PEFT sees by itself
            inject_adapter_in_model(config, causal_lm)
    except ValueError as error:
        raise ConfigError(f"adapter.targets: PEFT cannot adapt this model: {error}") from error
    zero.shard_new(causal_lm)
    return frozen_names(causal_lm)


def check_tokens(added: NewTokens | None) -> None:
    """Raises ConfigError for control tokens whose new embeddings would stay untrained."""
    if added is not None:
        raise ConfigError(
            f"model.control_tokens: {', '.join(added.texts)} would need embeddings that are trained, and adapters "
            "leave all of them as they are; use a model that knows them, a template without them, or adapter.kind: none"
        )


def lora_config(causal_lm: Any, adapter: AdapterConfig) -> Any:
    """PEFT's own description of the adapters, for a model without any. Raises ConfigError for targets that are none."""
    from peft import LoraConfig

    targets = target_names(causal_lm, adapter.targets)
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rank_stabilised,
        use_dora=adapter.kind == "dora",
        target_modules=targets,
        fan_in_fan_out=all(not isinstance(causal_lm.get_submodule(name), nn.Linear) for name in targets),
        task_type="CAUSAL_LM",
    )


def target_names(causal_lm: Any, patterns: Sequence[str]) -> list[str]:
    """Names of the linear layers of decoder layers that match any of the patterns; without patterns all of them.

    Raises ConfigError for a pattern that matches none of them, and for models without decoder layers.
    """
    names = {module: name for name, module in causal_lm.named_modules()}
    inside = [module for layer in decoder_layers(causal_lm) for module in layer.modules()]
    linear = [names[module] for module in inside if _is_linear(module)]
    if not linear:
        raise ConfigError(
            f"adapter.kind: {type(causal_lm).__name__} has no linear layers inside of decoder layers that adapters "
            "could stand beside; use none"
        )
    for pattern in patterns:
        if fnmatch.filter(linear, pattern):
            continue
        outside = fnmatch.filter(names.values(), pattern)
        if outside:
            told = f"{', '.join(outside[:_NAMED])} cannot be adapted: only linear layers of decoder layers can"
        else:
            told = f"nothing has such a name; linear layers are {', '.join(linear[:_NAMED])}, ..."
        raise ConfigError(f"adapter.targets: {pattern}: {told}")
    return [name for name in linear if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Of a model with adapters, the names of the parameters that they stand beside."""
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def describe(causal_lm: Any, adapter: AdapterConfig) -> str:
    """One line for people."""
    parameters = list(causal_lm.parameters())
    total = sum(map(zero.numel, parameters))
    trained = sum(zero.numel(parameter) for parameter in parameters if parameter.requires_grad)
    num_layers = sum(hasattr(module, "lora_A") for module in causal_lm.modules())
    scale = "sqrt(rank)" if adapter.rank_stabilised else "rank"
    return (
        f"{adapter.kind} of rank {adapter.rank} (alpha / {scale}, alpha {adapter.alpha:g}) beside {num_layers:,} "
        f"linear layers: {trained:,} of {total:,} parameters are trained ({trained / total:.3%}), all others are frozen"
    )
