"""Log-probabilities of target tokens, from hidden states at target positions only, in chunks.

`TokenLogprobs` wraps a causal language model of transformers: one forward gives float32 [num_targets]. The head is
called once as a module, with the targets, so that ZeRO-3 gathers its weight once; inside, each chunk's logits are
recomputed in the backward pass, so no more than chunk x V of them ever exist.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sft_dist.model.batch import IGNORE, Batch

# Rows of logits at a time: 1,024 x 128k vocabulary x 4 B = 0.5 GB.
CHUNK_ROWS = 1_024


class TokenLogprobs(nn.Module):
    """A causal language model that answers with the log-probabilities of a batch's targets."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        head.forward = _with_targets(head.forward, _logit_transform(model.config.get_text_config()))

    def forward(self, batch: Batch) -> Tensor:
        """float32 [num_targets]: log Pr(target | all before it in its sample), in the order of the row."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            segment_lengths=batch.lengths,
            segment_parents=batch.parents,
        ).last_hidden_state  # [1, T, D]
        rows = (batch.targets[0] != IGNORE).nonzero(as_tuple=True)[0]
        logprobs: Tensor = self.model.get_output_embeddings()(hidden[0, rows], targets=batch.targets[0, rows])
        return logprobs


def _logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What a model's own forward does to logits after the head (Gemma 2: softcap; Cohere, Granite: scale)."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)

    def transform(logits: Tensor) -> Tensor:
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits

    return transform


def _with_targets(project: Callable[[Tensor], Tensor], transform: Callable[[Tensor], Tensor]) -> Any:
    """The head's forward, extended: with targets it answers with their log-probabilities instead of logits."""

    def chunk_logprobs(rows: Tensor, targets: Tensor) -> Tensor:
        logits = transform(project(rows)).float()  # [C, V]
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def forward(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return project(hidden)
        # At least one chunk, if empty: the answer stays connected to the graph, and every rank enters the head.
        starts = range(0, max(len(targets), 1), CHUNK_ROWS)
        return torch.cat(
            [
                checkpoint(
                    chunk_logprobs,
                    hidden[start : start + CHUNK_ROWS],
                    targets[start : start + CHUNK_ROWS],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for start in starts
            ]
        )

    return forward
