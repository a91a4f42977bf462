"""`sft-dist` with one fault built in: python -m tests.helpers.broken_verify FAULT verify RUN_YAML ..."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from sft_dist import cli
from sft_dist.data.plan import Plan
from sft_dist.data.renderer import Renderer
from sft_dist.data.sample import Sample
from sft_dist.data.store import PreparedDataset
from sft_dist.model import attention
from sft_dist.model.engine import Engine


def mixes_conversations() -> None:
    """Attention over the whole row, whatever conversations lie in it."""
    split = attention.split_attention
    attention.split_attention = lambda *values, host_cu_seqlens=None, **options: split(*values, **options)


def looks_ahead() -> None:
    """Attention that sees what comes after: alone or packed, the same."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        bounds = options.get("host_cu_seqlens")
        lengths = [query.shape[2]] if bounds is None else bounds.diff().tolist()
        parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        seen = [F.scaled_dot_product_attention(q, k, v, scale=options["scaling"], enable_gqa=True) for q, k, v in parts]
        import torch

        return torch.cat(seen, 2).transpose(1, 2).contiguous(), None

    attention.split_attention = attend


def mean_of_means() -> None:
    """A step divided by its number of packs, not by its targets."""
    Plan.denominator = lambda self, step: float(100 * len(self.packs(step)))  # type: ignore[method-assign]


def remembers_gradients() -> None:
    Engine.clear_gradients = lambda self: None  # type: ignore[method-assign]


def another_template() -> None:
    """The rendering that is trained puts one more newline into every header than the model's own template."""
    apply = Renderer.apply

    def changed(self: Renderer, *values: Any, **options: Any) -> str:
        return apply(self, *values, **options).replace("<|im_start|>assistant\n", "<|im_start|>assistant\n\n")

    Renderer.apply = changed  # type: ignore[method-assign]


def another_tokenizer() -> None:
    """The ids of two letters are exchanged when text is encoded for training."""
    _change_samples(lambda sample: replace(sample, ids=sample.ids ^ (sample.ids > 40)))


def forgets_the_stop_token() -> None:
    _change_samples(
        lambda sample: replace(
            sample, spans=tuple(replace(s, output_end=s.output_end - bool(s.turn)) for s in sample.spans)
        )
    )


def _change_samples(change: Callable[[Sample], Sample]) -> None:
    read = PreparedDataset.__getitem__
    PreparedDataset.__getitem__ = lambda self, number: change(read(self, number))  # type: ignore[method-assign]


FAULTS = {
    fault.__name__: fault
    for fault in (
        mixes_conversations,
        looks_ahead,
        mean_of_means,
        remembers_gradients,
        another_template,
        another_tokenizer,
        forgets_the_stop_token,
    )
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    cli.main(sys.argv[2:])
