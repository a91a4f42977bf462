"""Log-probabilities of target tokens and their loss, from hidden states at target positions only.

`TokenLogprobs` wraps a causal language model of transformers. The head is called once, as a module, with the targets,
so that ZeRO-3 gathers its weight for it; what it then computes is model/fused_head.py. Noise on the embeddings
(NEFTune) is added here too, where the samples of the row are known.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sft_dist.errors import ConfigError
from sft_dist.model import fused_head, zero
from sft_dist.model.batch import Batch
from sft_dist.model.beside import LabelHead
from sft_dist.model.fused_head import LinearHead, LogitTransform, LossTerms, Reference, TokenValues, TopReference


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """What a causal language model gives to its head at a batch's targets, and the model, sharded as it is."""

    rows: Tensor  # [R, D]
    model: Any

    @contextmanager
    def whole(self) -> Iterator[Reference]:
        """Within, the head's weight is whole. A collective under ZeRO-3."""
        head, transform = self.model.get_output_embeddings(), _logit_transform(self.model.config.get_text_config())
        with ExitStack() as gathered:
            for parameter in head.parameters():
                gathered.enter_context(zero.gathered(parameter))
            yield Reference(self.rows, LinearHead(head.weight, head.bias, transform))


class TokenLogprobs(nn.Module):
    """A causal language model that answers with the log-probabilities of a batch's targets.

    `neftune_alpha`: while training, add uniform noise to the input embeddings (0: none). `beside`: another head of
    the model, which answers from the same hidden states.
    """

    def __init__(self, model: Any, *, neftune_alpha: float = 0.0, beside: LabelHead | None = None) -> None:
        super().__init__()
        self.model = model
        self.beside = beside
        self.omega: frozenset[str] = frozenset() if beside is None else beside.omega  # names of the other head
        self._neftune_alpha = neftune_alpha
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"model.path: its head is a {type(head).__name__}; only linear heads are known here")
        head.forward = _with_targets(head, _logit_transform(model.config.get_text_config()))  # type: ignore[method-assign]

    def forward(
        self,
        batch: Batch,
        *,
        with_details: bool = False,
        loss: LossTerms | None = None,
        reference: HiddenRows | TopReference | None = None,
        as_reference: bool = False,
    ) -> TokenValues | Tensor:
        """Log-probs of the batch's targets; `is_top` and `entropy` with `with_details`.

        With `loss` also Σ w ℓ over them, w those of the batch, and the loss of the head beside. Nothing else can be
        differentiated. `reference`: another model of the same vocabulary, with what it has answered to this batch
        `as_reference`: [num_targets, D], what its head is given there; or what is kept of its answer.
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
        rows = batch.target_rows
        head = self.model.get_output_embeddings()
        if as_reference:
            return hidden[0].index_select(0, rows)
        with reference.whole() if isinstance(reference, HiddenRows) else nullcontext(reference) as compared:
            found: TokenValues = head(
                hidden[0].index_select(0, rows),
                batch.targets[0, rows],
                weights=batch.weights[0, rows],
                terms=loss,
                with_details=with_details,
                reference=compared,
            )
        if self.beside is None:
            return found
        return self.beside.answered(found, hidden[0], batch, with_loss=loss is not None)


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
        of_sample = torch.tensor(lengths).to(embedded.device, non_blocking=True)
        scale = alpha / (of_sample * embedded.shape[-1]).sqrt()  # [n]
        # With its size told, the host waits for nothing.
        of_token = scale.repeat_interleave(of_sample, output_size=embedded.shape[1])  # [T]
        noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1)
        return embedded + (noise * of_token[:, None]).to(embedded.dtype)

    hook = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


def _logit_transform(config: Any) -> LogitTransform:
    """What a model's own forward does to logits after the head (Gemma 2: softcap; Cohere, Granite: scale)."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return LogitTransform(
        factor=(1 if scale is None else scale) / (1 if divisor is None else divisor),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _with_targets(head: nn.Linear, transform: LogitTransform) -> Callable[..., Any]:
    """The head's forward, extended: with targets it answers with what is known of them instead of logits."""
    project = head.forward

    def forward(
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        terms: LossTerms | None = None,
        with_details: bool = False,
        reference: Reference | TopReference | None = None,
    ) -> Tensor | TokenValues:
        if targets is None:
            return project(hidden)
        # Looked up now: under ZeRO-3 the weight is whole only within this call.
        linear = LinearHead(head.weight, head.bias, transform)
        if terms is None or weights is None:
            return fused_head.values(hidden, targets, linear, with_details=with_details)
        return fused_head.weighted_loss(
            hidden, targets, weights, linear, terms, with_details=with_details, reference=reference
        )

    return forward
