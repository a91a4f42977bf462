"""A few short conversations by which a model is checked: against itself unpacked, and after export.

The check at the start of a run catches models that mix tokens outside attention, restart positions wrongly or
change logits after the head in a way logprobs.py does not know.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sft_dist.data.sample import Int32, Sample
from sft_dist.data.selection import Example
from sft_dist.data.store import PreparedDataset
from sft_dist.errors import ConfigError
from sft_dist.model.batch import collate
from sft_dist.model.engine import Engine

_MAX_TOKENS = 256

# Largest difference of a token's log-prob between two kernels of the same precision, in nats.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.5}

# The same by one kernel in rows of the same lengths, where a token sees the same, as a mean over tokens: where experts
# get other numbers of tokens, products round otherwise, and a single token may be given to another expert.
_ROUNDING_OF_ONE_KERNEL = {torch.float32: 1e-3, torch.bfloat16: 0.05}
_FEW = 8  # tokens

Probe = tuple[Example, ...]


def choose(dataset: PreparedDataset, max_length: int) -> Probe:
    """The beginnings of two of the shortest samples: a check that costs next to nothing."""
    shortest = np.argsort(dataset.lengths, kind="stable")[:2]
    return tuple(_beginning(dataset[int(number)], min(_MAX_TOKENS, max_length)) for number in shortest)


def _beginning(sample: Sample, num_tokens: int) -> Example:
    """The first tokens of a sample, all of them targets but the first."""
    ids = sample.ids[:num_tokens]
    is_target = np.arange(len(ids)) > 0
    beginning = Sample(sample.conversation_id, sample.index, sample.source, ids, (), num_turns=0)
    return Example(beginning, np.where(is_target, 0, -1).astype(np.int32), is_target.astype(np.float32))


def logprobs(engine: Engine, probe: Probe) -> list[float]:
    """Packed log-probs of the probe's tokens, of a prediction head its logits, from the sharded model. A collective."""
    engine.train(False)
    with torch.no_grad():
        batch = collate(probe)
        values = engine.logits(batch).flatten() if engine.is_classifier else engine.logprobs(batch)
    return [float(value) for value in values]


def record(engine: Engine, probe: Probe) -> dict[str, Any]:
    """What a checkpoint says of the probe: ids, `logprobs`, and of a head beside the language model's `logits`.

    A collective.
    """
    found = {"samples": [example.sample.ids.tolist() for example in probe], "logprobs": logprobs(engine, probe)}
    if engine.is_classifier or not engine.has_head:
        return found
    with torch.no_grad():
        return found | {"logits": engine.logits(collate(probe)).flatten().tolist()}


def check(engine: Engine, probe: Probe) -> float:
    """Compare packed log-probs with transformers' own forward, one sample at a time; returns the largest difference.

    Raises ConfigError when they differ by more than rounding, or when those of one sample change with another one's
    tokens. A collective.
    """
    packed = torch.tensor(logprobs(engine, probe))
    _check_isolation(engine, probe, packed)
    plain = plain_logits if engine.is_classifier else plain_logprobs
    alone = torch.tensor([v for example in probe for v in plain(engine.causal_lm, example.sample.ids)])
    difference = float((packed - alone).abs().max())
    bound = ROUNDING[engine.causal_lm.dtype]
    if engine.is_classifier:
        bound *= float(alone.abs().max())  # a new head's logits are small, and so is what a leak does to them
    if not difference <= bound:
        what = "logits" if engine.is_classifier else "log-probs"
        raise ConfigError(
            f"model.path: packed {what} differ from the model's own, unpacked, by {difference:.3g} "
            f"(at most {bound:.3g} is rounding): this model mixes the conversations of a pack or changes its logits "
            "in a way that is not known here; try another model.attention (auto, sdpa, eager), else it cannot be "
            "trained packed"
        )
    return difference


def _check_isolation(engine: Engine, probe: Probe, packed: Tensor) -> None:
    """In 16 bits a leak can be as small as the difference between two kernels, so it is looked for by one kernel alone.

    Nothing but the tokens of the samples before it changes around the last one; those put there occur in the probe.
    """
    ids = np.unique(np.concatenate([example.sample.ids for example in probe]))
    if len(probe) == 1 or len(ids) == 1:
        return
    *others, last = probe
    changed = tuple(
        replace(e, sample=replace(e.sample, ids=ids[(np.searchsorted(ids, e.sample.ids) + 1) % len(ids)]))
        for e in others
    )
    size = len(packed) // len(probe) if engine.is_classifier else int((last.turns >= 0).sum())
    before, after = (
        values[len(values) - size :] for values in (packed, torch.tensor(logprobs(engine, (*changed, last))))
    )
    difference = float((after - before).abs().mean()) if size else 0.0
    # Of a few tokens one given to another expert is much of the mean.
    bound = (_ROUNDING_OF_ONE_KERNEL if size >= _FEW or engine.is_classifier else ROUNDING)[engine.causal_lm.dtype]
    if engine.is_classifier:
        bound *= float(before.abs().max())
    if difference > bound:  # not of NaN, which the comparison with the unpacked model tells
        raise ConfigError(
            f"model.path: what the model answers to one conversation changes by {difference:.3g} on average with the "
            f"tokens of another one in its pack (at most {bound:.3g} is rounding): its attention mixes them; try "
            "another model.attention (auto, sdpa, eager), else it cannot be trained packed"
        )


def plain_logits(model: Any, ids: Sequence[int] | Int32) -> list[float]:
    """The outputs of a prediction head, by the model's own forward on this sequence alone: the oracle."""
    device = next(model.parameters()).device
    with torch.no_grad(), _uncompiled():
        logits = model(input_ids=torch.tensor([[int(i) for i in ids]], device=device)).logits[0].float()  # [C]
    return [float(value) for value in logits]


def plain_logprobs(causal_lm: Any, ids: Sequence[int] | Int32) -> list[float]:
    """log Pr of every token but the first, by the model's own forward on this sequence alone: the oracle."""
    device = next(causal_lm.parameters()).device
    row = torch.tensor([[int(i) for i in ids]], device=device)  # [1, T]
    with torch.no_grad(), _uncompiled():
        logits = causal_lm(input_ids=row, use_cache=False).logits[0, :-1].float()  # [T - 1, V]
    picked = logits.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]
    return [float(value) for value in picked]


def _uncompiled() -> Any:
    """A context in which compiled layers run as they were written: an oracle, and no graphs for a few forwards."""
    return torch.compiler.set_stance("force_eager")
