"""Tokens for people, beside their log-probabilities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.renderer import Renderer
from sft_dist.data.sample import Int32


class TokenTexts:
    """The text of single tokens. A token that is part of a character reads as U+FFFD; its id is the truth."""

    def __init__(self, renderer: Renderer) -> None:
        self._decode = renderer.tokenizer.backend_tokenizer.decode
        # Before each token: decoders of the sentencepiece family drop a leading space at the very start.
        self._anchor = int(renderer.tokenizer.eos_token_id)
        self._anchor_text = self._decode([self._anchor], skip_special_tokens=False)
        self._known: dict[int, str] = {}

    def described(self, ids: Int32, logprobs: NDArray[np.float32]) -> dict[str, Any]:
        """Ids, texts and log-probs, one entry a token."""
        numbers = ids.tolist()
        return {"ids": numbers, "texts": self._texts(numbers), "logprobs": logprobs.tolist()}

    def _texts(self, ids: Sequence[int]) -> list[str]:
        for number in set(ids) - self._known.keys():
            text = self._decode([self._anchor, number], skip_special_tokens=False)
            self._known[number] = text[len(self._anchor_text) :]
        return [self._known[number] for number in ids]
