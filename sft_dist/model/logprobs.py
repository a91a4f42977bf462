"""Log-probabilities of target tokens, from hidden states at target positions only, in chunks.

`TokenLogprobs` wraps a causal language model of transformers: one forward gives float32 [num_targets, columns]. The
head is called once as a module, with the targets, so that ZeRO-3 gathers its weight once; inside, each chunk's logits
are recomputed in the backward pass, so no more than chunk x V of them ever exist. Noise on the embeddings (NEFTune)
is added here too, where the samples of the row are known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sft_dist.model.batch import IGNORE, Batch

# Rows of logits at a time: 1,024 x 128k vocabulary x 4 B = 0.5 GB.
CHUNK_ROWS = 1_024


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a forward gives of every target beside its log-prob. V is the number of rows of the head."""

    log_normaliser: bool = False  # log Z = log Σ_v exp(logit_v)
    mean_logprob: bool = False  # (1/V) Σ_v log Pr(v | all before the target)
    is_top: bool = False  # whether the target is the likeliest token (the first of those)


ONLY_LOGPROBS = Wanted()


@dataclass(frozen=True, slots=True)
class TokenValues:
    """What one forward says of its targets, each float32 [num_targets], None where it was not wanted."""

    logprob: Tensor
    log_normaliser: Tensor | None
    mean_logprob: Tensor | None
    is_top: Tensor | None  # 1 or 0

    @classmethod
    def of(cls, columns: Tensor, wanted: Wanted) -> "TokenValues":
        """From what `TokenLogprobs` answers when it is asked for `wanted`."""
        own = iter(columns.unbind(-1))
        logprob = next(own)
        flags = (wanted.log_normaliser, wanted.mean_logprob, wanted.is_top)
        return cls(logprob, *(next(own) if flag else None for flag in flags))


class TokenLogprobs(nn.Module):
    """A causal language model that answers with the log-probabilities of a batch's targets.

    `neftune_alpha`: while training, add uniform noise to the input embeddings (0: none).
    """

    def __init__(self, model: Any, *, neftune_alpha: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self._neftune_alpha = neftune_alpha
        head = model.get_output_embeddings()
        head.forward = _with_targets(head.forward, _logit_transform(model.config.get_text_config()))

    def forward(self, batch: Batch, wanted: Wanted = ONLY_LOGPROBS) -> Tensor:
        """float32 [num_targets, 1 + wanted columns], in the order of the row; `TokenValues.of` names the columns.

        Column 0 is log Pr(target | all before it in its sample).
        """
        alpha = self._neftune_alpha if self.training else 0.0
        with _noise(self.model.get_input_embeddings(), alpha, batch.lengths):
            hidden = self.model.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                cu_seqlens=batch.cu_seqlens,
                host_cu_seqlens=batch.host_cu_seqlens,
                max_seqlen=batch.max_length,
                segment_parents=batch.parents,
            ).last_hidden_state  # [1, T, D]
        rows = (batch.targets[0] != IGNORE).nonzero(as_tuple=True)[0]
        columns: Tensor = self.model.get_output_embeddings()(
            hidden[0, rows], targets=batch.targets[0, rows], wanted=wanted
        )
        return columns


@contextmanager
def _noise(embeddings: nn.Module, alpha: float, lengths: tuple[int, ...]) -> Iterator[None]:
    """Within, embeddings of a row get uniform(-1, 1) noise times alpha / sqrt(L D), L the length of the own sample.

    NEFTune: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", 2023, section 2. A hook, and not
    embeddings handed to the model: models may scale them, or look up more by the ids.
    """
    if not alpha:
        yield
        return

    def add_noise(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:  # [1, T, D]
        of_sample = torch.tensor(lengths, dtype=torch.float32, device=embedded.device)
        scale = alpha / (of_sample * embedded.shape[-1]).sqrt()  # [n]
        noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1)
        return embedded + (noise * scale.repeat_interleave(of_sample.long())[:, None]).to(embedded.dtype)

    hook = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


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

    def chunk_columns(rows: Tensor, targets: Tensor, wanted: Wanted) -> Tensor:
        logits = transform(project(rows)).float()  # [C, V]
        log_normaliser = logits.logsumexp(-1)
        columns = [logits.gather(-1, targets[:, None])[:, 0] - log_normaliser]
        if wanted.log_normaliser:
            columns.append(log_normaliser)
        if wanted.mean_logprob:
            columns.append(logits.mean(-1) - log_normaliser)
        if wanted.is_top:
            columns.append((logits.argmax(-1) == targets).float())
        return torch.stack(columns, -1)

    def forward(hidden: Tensor, targets: Tensor | None = None, wanted: Wanted = ONLY_LOGPROBS) -> Tensor:
        if targets is None:
            return project(hidden)
        # At least one chunk, if empty: the answer stays connected to the graph, and every rank enters the head.
        starts = range(0, max(len(targets), 1), CHUNK_ROWS)
        return torch.cat(
            [
                checkpoint(
                    chunk_columns,
                    hidden[start : start + CHUNK_ROWS],
                    targets[start : start + CHUNK_ROWS],
                    wanted,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for start in starts
            ]
        )

    return forward
