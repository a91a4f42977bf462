"""A prompt that several answers share is computed once, and nothing else changes: float64, against rows of their own.

The oracle of attention is a softmax written out; that of models is plain transformers, one answer at a time.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft_dist.model import segments
from sft_dist.model.attention import SPLIT, split_attention
from sft_dist.model.batch import IGNORE, Tree, collate_trees
from sft_dist.model.fused_head import LossTerms
from sft_dist.model.logprobs import TokenLogprobs
from tests.helpers.models import FAMILIES
from tests.model.test_logprobs import load

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


@st.composite
def forests(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and parents of segments: any earlier segment, or none, may be the parent."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    parents = [draw(st.integers(-1, number - 1)) for number in range(len(lengths))]
    return tuple(lengths), tuple(parents)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention token by token over the positions that each would see in a row of its own; [1, T, heads, head_dim]."""
    starts = np.cumsum([0, *lengths])
    rows = []
    for segment, length in enumerate(lengths):
        before: list[int] = []
        ancestor = parents[segment]
        while ancestor >= 0:
            before = [*range(starts[ancestor], starts[ancestor + 1]), *before]
            ancestor = parents[ancestor]
        for place in range(length):
            token = starts[segment] + place
            seen = [*before, *range(starts[segment], token + 1)]
            seen = seen if sliding_window is None else seen[-sliding_window:]
            of_head = []
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // k.shape[1])
                scores = k[0, kv_head, seen] @ q[0, head, token] / q.shape[-1] ** 0.5
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                if s_aux is not None:
                    scores = torch.cat([scores, s_aux[head : head + 1]])
                of_head.append(scores.softmax(0)[: len(seen)] @ v[0, kv_head, seen])
            rows.append(torch.stack(of_head))
    return torch.stack(rows)[None]


@settings(max_examples=60, deadline=None)
@given(
    forests(),
    st.sampled_from([KV_HEADS, HEADS]),
    st.sampled_from([4, 256]),
    st.sampled_from([None, 1, 3, 7]),
    st.sampled_from([None, 0.7]),
    st.booleans(),
)
def test_a_segment_sees_its_ancestors_and_itself_only(
    forest: tuple[tuple[int, ...], tuple[int, ...]],
    kv_heads: int,
    sibling_tokens: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
) -> None:
    lengths, parents = forest
    torch.manual_seed(sum(lengths))
    sinks = torch.randn(HEADS, dtype=torch.float64) if has_sinks else None
    options = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
    q = torch.randn(1, HEADS, sum(lengths), HEAD_DIM, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, sum(lengths), HEAD_DIM, dtype=torch.float64, requires_grad=True) for _ in "kv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "SIBLING_TOKENS", sibling_tokens)
        found, _ = split_attention(
            torch.nn.Module(), q, k, v, None, host_cu_seqlens=bounds(lengths), segment_parents=parents, **options
        )
    expected = written_out(q, k, v, lengths, parents, **options)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
    direction = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), (q, k, v)),
        torch.autograd.grad((expected * direction).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


def random_trees(seed: int) -> list[Tree]:
    """One, several and many outputs; a prompt of a single token."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, 300, length).astype(np.int32)

    shapes = [(20, (5, 1, 9)), (1, (4, 3)), (13, (6,)), (60, tuple(rng.integers(5, 25, 24)))]
    return [Tree(ids(prompt), tuple(ids(length) for length in outputs)) for prompt, outputs in shapes]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_of_trees_equal_each_answer_alone(tmp_path: Path, family: str) -> None:
    trees = random_trees(1)
    shared_model = TokenLogprobs(load(tmp_path, family, SPLIT))
    batch = collate_trees(trees)
    assert batch.input_ids.shape[1] < sum(len(t.prompt) + len(o) - 1 for t in trees for o in t.outputs) / 2
    factors = torch.linspace(0.5, 1.5, batch.num_targets)
    batch.weights[0, batch.target_rows] = factors
    values = shared_model(batch, loss=LossTerms())
    values.loss.backward()
    alone_model = load(tmp_path, family, "eager")
    alone = []
    for tree in trees:
        for output in tree.outputs:
            ids = torch.from_numpy(np.concatenate([tree.prompt, output]).astype(np.int64))
            rows = alone_model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            alone += [rows[t - 1, ids[t]] for t in range(len(tree.prompt), len(ids))]
    reference = torch.stack(alone)
    (-reference * factors).sum().backward()
    assert torch.allclose(values.logprob, reference, atol=1e-5)  # norms compute in float32
    expected = dict(alone_model.named_parameters())
    for name, parameter in shared_model.model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4), name


def test_a_tree_is_laid_out_with_its_prompt_once() -> None:
    prompt, outputs = np.arange(10, 15, dtype=np.int32), (np.array([20, 21, 2]), np.array([30, 2]))
    batch = collate_trees([Tree(prompt, tuple(o.astype(np.int32) for o in outputs))])
    assert batch.input_ids[0].tolist() == [10, 11, 12, 13, 14, 20, 21, 14, 30]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert batch.targets[0].tolist() == [IGNORE] * 4 + [20, 21, 2, 30, 2]
    assert (batch.lengths, batch.parents) == ((4, 3, 2), (-1, 0, 0))
    assert batch.turns == ((0, 0), (0, 1)) and batch.turn_ids[0].tolist() == [-1] * 4 + [0, 0, 0, 1, 1]
    assert Tree(prompt, outputs).num_tokens == batch.input_ids.shape[1]


def test_one_answer_needs_no_tree() -> None:
    batch = collate_trees([Tree(np.arange(5, dtype=np.int32), (np.array([7, 8], np.int32),))])
    assert batch.parents is None and batch.lengths == (6,)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5]
