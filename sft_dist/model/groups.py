"""Which parameters are trained, and in which of AdamW's groups: by weight decay, and by depth where rates follow it."""

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn

from sft_dist.config import OptimizerConfig
from sft_dist.errors import ConfigError
from sft_dist.model import zero
from sft_dist.model.places import depths_of

_NAMED = 3


def freeze(causal_lm: nn.Module, patterns: Sequence[str]) -> str | None:
    """Take parameters whose names match a pattern (fnmatch) out of training; what was done, for people.

    A parameter of several names (a tied head) is frozen by any of them. Raises ConfigError for a pattern that matches
    nothing, and where nothing would be left to train.
    """
    if not patterns:
        return None
    names: dict[int, list[str]] = {}  # of a parameter, the first one is its own
    parameters = {}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    every = [name for aliases in names.values() for name in aliases]
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise ConfigError(f"model.freeze: {pattern}: no parameter has such a name; {_near(pattern, every)}")
    chosen = {
        key: aliases for key, aliases in names.items() if any(fnmatch.filter(aliases, pattern) for pattern in patterns)
    }
    if len(chosen) == len(names):
        raise ConfigError(f"model.freeze: {', '.join(patterns)}: all {len(names):,} parameters, so nothing is trained")
    for key in chosen:
        parameters[key].requires_grad_(False)
    frozen, total = (sum(zero.numel(parameters[key]) for key in keys) for keys in (chosen, names))
    tied = [" = ".join(aliases) for aliases in chosen.values() if len(aliases) > 1]
    return (
        f"frozen by model.freeze: {len(chosen):,} of {len(names):,} parameters, {frozen:,} of {total:,} weights "
        f"({frozen / total:.1%})" + (f"; tied, so frozen under every name: {', '.join(tied)}" if tied else "")
    )


def _near(pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern.strip("*."), names, n=_NAMED, cutoff=0.3)
    return f"near it are {', '.join(close)}" if close else f"there are {', '.join(names[:_NAMED])}, ..."


def parameter_groups(causal_lm: Any, layers: Sequence[nn.Module], optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices and vectors apart, and with layer_decay each depth by itself.

    `lr_factor` is what the learning rate of a group is multiplied by: d^(n + 1 - depth), for embeddings at depth 0, n
    decoder layers and the head at n + 1. Howard and Ruder, "Universal Language Model Fine-tuning", 2018, section 3.2;
    in this form Clark et al., "ELECTRA", 2020, appendix B. Raises ConfigError where layers cannot be told apart.
    """
    decay = optimizer.layer_decay
    if decay < 1 and not layers:
        raise ConfigError(
            f"optimizer.layer_decay: {decay:g}: no decoder layers were found in {type(causal_lm).__name__}, so its "
            "parameters have no depths; leave it at 1"
        )
    depths = depths_of(causal_lm, layers) if decay < 1 else {}
    last = len(layers) + 1
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in causal_lm.named_parameters():
        if parameter.requires_grad:
            members.setdefault((depths.get(name, last), zero.is_vector(parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_vector else optimizer.weight_decay,
            "lr_factor": decay ** (last - depth),
            "name": _name(depth, last, is_vector, by_depth=decay < 1),
        }
        for (depth, is_vector), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def _name(depth: int, last: int, is_vector: bool, *, by_depth: bool) -> str:
    kind = "norms and biases" if is_vector else "matrices"
    if not by_depth:
        return kind
    where = "embeddings" if depth == 0 else "head" if depth == last else f"layer {depth}"
    return f"{kind} of the {where}" if depth in (0, last) else f"{kind} of {where}"
