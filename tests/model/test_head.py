"""The fused head against the same loss written out with all logits: float64, finite differences, autograd of torch.

Counted, not timed: matrix products, and the largest tensor that is ever made.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from sft_dist.model import attention, fused_head
from sft_dist.model.batch import Batch, collate
from sft_dist.model.fused_head import (
    LinearHead,
    LogitTransform,
    LossTerms,
    Reference,
    chunk_rows,
    values,
    weighted_loss,
)
from sft_dist.model.logprobs import TokenLogprobs
from tests.model.test_logprobs import example

WIDTH, VOCAB = 6, 11
TERMS = (
    *(LossTerms(), LossTerms(label_smoothing=0.1), LossTerms(z_loss=0.05), LossTerms(0.2, 0.01)),
    *(LossTerms(kl=0.7), LossTerms(0.2, 0.01, kl=1.5)),
)
TRANSFORMS = (LogitTransform(), LogitTransform(factor=0.25), LogitTransform(softcap=2.0), LogitTransform(3.0, 1.5))


def draw(num_rows: int, *, with_bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Rows, weight and bias that want gradients; targets; weights, one of them 0 and one negative."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    weights = torch.rand(num_rows, generator=generator) + 0.5
    weights[:1], weights[1:2] = 0.0, -2.0
    return {
        "rows": random(num_rows, WIDTH),
        "weight": random(VOCAB, WIDTH),
        "bias": random(VOCAB) if with_bias else None,
        "targets": torch.randint(VOCAB, (num_rows,), generator=generator),
        "weights": weights,
    }


def written_out(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    how: LogitTransform,
    t: LossTerms,
) -> tuple[Tensor, Tensor]:
    """The weighted loss and the log-probs from all logits at once, by the definitions."""
    logits = F.linear(rows, weight, bias) * how.factor
    if how.softcap is not None:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    logprobs = logits.log_softmax(-1)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=t.label_smoothing)
    losses = losses + t.z_loss * logits.logsumexp(-1) ** 2
    if t.kl:
        other = reference_of(rows, bias, how)
        other_logits = F.linear(other.rows, other.head.weight, other.head.bias) * how.factor
        if how.softcap is not None:
            other_logits = how.softcap * torch.tanh(other_logits / how.softcap)
        losses = losses + t.kl * F.kl_div(logprobs, other_logits.softmax(-1), reduction="none").sum(-1)
    return (losses * weights).sum(), logprobs.gather(-1, targets[:, None])[:, 0]


def reference_of(rows: Tensor, bias: Tensor | None, how: LogitTransform) -> Reference:
    """Another head, and other rows, of the same shapes."""
    other = draw(len(rows), with_bias=bias is not None, dtype=rows.dtype, seed=1000)
    own = [None if other[name] is None else other[name].detach() for name in ("weight", "bias")]
    return Reference(other["rows"].detach(), LinearHead(*own, how))


def fused(drawn: dict[str, Any], how: LogitTransform, terms: LossTerms, *, with_details: bool = False) -> Any:
    head = LinearHead(drawn["weight"], drawn["bias"], how)
    reference = reference_of(drawn["rows"], drawn["bias"], how) if terms.kl else None
    return weighted_loss(
        drawn["rows"], drawn["targets"], drawn["weights"], head, terms, with_details=with_details, reference=reference
    )


def leaves(drawn: dict[str, Any]) -> list[Tensor]:
    return [drawn[name] for name in ("rows", "weight", "bias") if drawn[name] is not None]


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda num_rows: monkeypatch.setattr(fused_head, "chunk_rows", lambda *_: num_rows)


@pytest.mark.parametrize(
    ("how", "terms"), [*((how, TERMS[5]) for how in TRANSFORMS), *((TRANSFORMS[3], terms) for terms in TERMS[:5])]
)
def test_the_gradient_is_that_of_finite_differences(
    chunks_of: Callable[[int], None], how: LogitTransform, terms: LossTerms
) -> None:
    chunks_of(2)
    drawn = draw(3, with_bias=True)

    def loss(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused(drawn | {"rows": rows, "weight": weight, "bias": bias}, how, terms).loss

    assert torch.autograd.gradcheck(loss, leaves(drawn))


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(0, 17),
    size=st.sampled_from([1, 4, 8]),
    with_bias=st.booleans(),
    how=st.sampled_from(TRANSFORMS),
    terms=st.sampled_from(TERMS),
    factor=st.sampled_from([1.0, -0.25, 3.0]),
    seed=st.integers(0, 99),
)
def test_loss_values_and_gradients_are_those_of_all_logits_at_once(
    num_rows: int, size: int, with_bias: bool, how: LogitTransform, terms: LossTerms, factor: float, seed: int
) -> None:
    drawn = draw(num_rows, with_bias=with_bias, seed=seed)
    plain, logprobs = written_out(**drawn, how=how, t=terms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_head, "chunk_rows", lambda *_: size)
        found = fused(drawn, how, terms)
        scored = values(drawn["rows"], drawn["targets"], LinearHead(drawn["weight"], drawn["bias"], how))
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(found.loss, plain, **close)
    torch.testing.assert_close(found.logprob, logprobs.detach(), **close)
    torch.testing.assert_close(scored.logprob, found.logprob, **close)
    if not terms.kl:  # with a reference chunks have half the rows, and products of other sizes may be rounded otherwise
        assert torch.equal(scored.logprob, found.logprob), "scoring and training see the same log-probs"
    assert not scored.logprob.requires_grad and not found.logprob.requires_grad
    expected = torch.autograd.grad(plain * factor, leaves(drawn))
    torch.testing.assert_close(torch.autograd.grad(found.loss * factor, leaves(drawn)), expected, **close)


@pytest.mark.parametrize("frozen", ["rows", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs(frozen: str) -> None:
    drawn = draw(9, with_bias=True)
    drawn[frozen].requires_grad_(False)
    trained = [leaf for leaf in leaves(drawn) if leaf.requires_grad]
    expected = torch.autograd.grad(written_out(**drawn, how=TRANSFORMS[3], t=TERMS[3])[0], trained)
    fused(drawn, TRANSFORMS[3], TERMS[3]).loss.backward()
    assert drawn[frozen].grad is None
    torch.testing.assert_close([leaf.grad for leaf in trained], list(expected))


def test_the_likeliest_token_is_the_first_of_equals(chunks_of: Callable[[int], None]) -> None:
    chunks_of(2)
    weight = torch.zeros(VOCAB, WIDTH, dtype=torch.float64)
    weight[[3, 5]] = 1.0  # logits of tokens 3 and 5 are equal and the largest
    rows = torch.ones(5, WIDTH, dtype=torch.float64)
    targets = torch.tensor([3, 5, 0, 3, 10])
    for found in (
        values(rows, targets, LinearHead(weight, None), with_details=True),
        weighted_loss(rows, targets, torch.ones(5), LinearHead(weight, None), LossTerms(), with_details=True),
    ):
        assert found.is_top is not None and found.is_top.tolist() == [1, 0, 0, 1, 0]


def test_large_logits_do_not_overflow() -> None:
    rows = torch.full((2, WIDTH), 1e4, requires_grad=True)
    weight = torch.linspace(-1, 1, VOCAB)[:, None].repeat(1, WIDTH).requires_grad_()
    found = weighted_loss(rows, torch.tensor([VOCAB - 1, 0]), torch.ones(2), LinearHead(weight, None), LossTerms())
    assert found.loss is not None
    found.loss.backward()
    assert found.logprob.tolist() == pytest.approx([0, -1.2e5]) and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_in_low_precision_values_and_the_sum_over_rows_are_kept_in_float32(dtype: torch.dtype, rounding: float) -> None:
    """A gradient summed in bfloat16 over so many chunks would be off by far more than one rounding."""
    num_rows = 2_000
    drawn = draw(num_rows, with_bias=True, dtype=dtype)
    drawn["weights"] = torch.ones(num_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_head, "chunk_rows", lambda *_: 8)
        found = fused(drawn, LogitTransform(), LossTerms())
    assert found.logprob.dtype == found.loss.dtype == torch.float32
    gradients = torch.autograd.grad(found.loss, leaves(drawn))
    exact = {key: v.detach().double().requires_grad_() if v.is_floating_point() else v for key, v in drawn.items()}
    loss, _ = written_out(**exact, how=LogitTransform(), t=LossTerms())
    for found_gradient, leaf, expected in zip(
        gradients, leaves(drawn), torch.autograd.grad(loss, leaves(exact)), strict=True
    ):
        assert found_gradient.dtype == leaf.dtype
        assert (found_gradient - expected).norm() < rounding * expected.norm()
    assert found.loss.item() == pytest.approx(loss.item(), rel=rounding)


def test_matrix_products_are_three_one_more_with_a_reference_two_with_a_frozen_part_and_one_without_gradient(
    chunks_of: Callable[[int], None],
) -> None:
    chunks_of(8)
    num_rows = 30
    unit = 2 * num_rows * WIDTH * VOCAB

    def count(units: int, *, frozen: str = "", terms: LossTerms = TERMS[0], is_enabled: bool = True) -> None:
        drawn = draw(num_rows, with_bias=True)
        if frozen:
            drawn[frozen].requires_grad_(False)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(is_enabled):
            found = fused(drawn, TRANSFORMS[3], terms)
            if is_enabled:
                found.loss.backward()
        assert counter.get_total_flops() == units * unit

    count(3)
    count(3, terms=TERMS[3])
    count(4, terms=TERMS[4])
    count(2, frozen="weight")
    count(2, frozen="rows")
    count(1, is_enabled=False)
    drawn = draw(num_rows, with_bias=True)
    with FlopCounterMode(display=False) as counter:
        values(drawn["rows"], drawn["targets"], LinearHead(drawn["weight"], drawn["bias"]))
    assert counter.get_total_flops() == unit


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that any operation gave, and the names of operations that read one on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().size() // tensor.element_size())
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.reads.append(str(func))
        return result


@pytest.mark.parametrize("how", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits_and_nothing_is_read_on_the_host(
    chunks_of: Callable[[int], None], how: LogitTransform, dtype: torch.dtype
) -> None:
    chunks_of(16)
    drawn = draw(400, with_bias=True, dtype=dtype)
    limit = max(16 * VOCAB, 400 * WIDTH)
    for terms in (TERMS[3], TERMS[5]):
        with Sizes() as made:
            fused(drawn, how, terms, with_details=True).loss.backward()
        assert made.largest == limit and made.reads == []
    with Sizes() as made:
        written_out(**drawn, how=how, t=TERMS[3])[0].backward()
    assert made.largest >= 400 * VOCAB, "the measure sees all logits where there are all"


def test_a_chunk_has_enough_rows_for_its_device_and_bounded_logits() -> None:
    for vocab_size in (1_000, 32_000, 49_152, 128_256, 262_144):
        on_gpu, on_cpu = chunk_rows(vocab_size, "cuda"), chunk_rows(vocab_size, "cpu")
        assert 2_048 <= on_gpu <= 8_192 and on_gpu * vocab_size * 4 <= 2 * 2**30
        assert on_cpu >= 256 and (on_cpu == 256 or on_cpu * vocab_size * 4 <= 128 * 2**20)


COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
MODELS = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=True)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**COMMON, tie_word_embeddings=False)),
    "scale": lambda: CohereForCausalLM(CohereConfig(**COMMON, logit_scale=0.3)),
    "divisor": lambda: GraniteForCausalLM(GraniteConfig(**COMMON, logits_scaling=3.0)),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=4.0)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("terms", [TERMS[0], TERMS[3]], ids=str)
def test_loss_and_all_gradients_of_a_model_are_those_of_transformers(
    chunks_of: Callable[[int], None], name: str, terms: LossTerms
) -> None:
    """Full logits of the model's own forward and F.cross_entropy, sample by sample."""
    chunks_of(7)
    attention.register()
    torch.manual_seed(5)
    model = MODELS[name]().double().eval()
    if name == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    model.set_attn_implementation("eager")
    batch = weighted_batch()
    total: Any = 0
    for ids, targets, weights in samples_of(batch):
        logits = model(input_ids=ids, use_cache=False).logits[0]  # [T, V]
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=terms.label_smoothing)
        rows = targets != -100
        total = total + ((losses + terms.z_loss * logits.logsumexp(-1) ** 2)[rows] * weights[rows]).sum()
    total.backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    loss = TokenLogprobs(model)(batch, loss=terms).loss
    loss.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for key, parameter in model.named_parameters():
        scale = float(expected[key].abs().max())
        assert torch.allclose(parameter.grad, expected[key], rtol=1e-4, atol=1e-5 * max(scale, 1)), key


def weighted_batch() -> Batch:
    batch = collate([example(length, seed=length) for length in (30, 4, 17, 41)])
    batch.weights[0, batch.target_rows] = torch.linspace(0.2, 2, batch.num_targets)
    return batch


def samples_of(batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids [1, l], targets [l], weights [l]) of every sample of the row."""
    parts = (row.split(batch.lengths) for row in (batch.input_ids[0], batch.targets[0], batch.weights[0]))
    return [(ids[None], targets, weights) for ids, targets, weights in zip(*parts, strict=True)]
