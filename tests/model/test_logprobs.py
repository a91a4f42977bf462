"""Log-probs of targets without ever holding all logits, in one process on a plain model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Example
from sft_dist.errors import ConfigError
from sft_dist.model import attention, fused_head
from sft_dist.model.attention import SPLIT
from sft_dist.model.batch import IGNORE, collate
from sft_dist.model.fused_head import LossTerms
from sft_dist.model.logprobs import TokenLogprobs
from tests.helpers.models import FAMILIES, build_model


def example(length: int, *, seed: int = 0, everything: bool = False) -> Example:
    ids = np.random.default_rng(seed).integers(3, 300, length).astype(np.int32)
    half = length // 2
    user = Span(0, "user", 0, 0, half, half, is_owned=True)
    spans = (user, Span(1, "assistant", half, half + 2, length - 1, length, is_owned=True, turn=1))
    turns = np.full(length, -1, np.int32)
    turns[slice(1, None) if everything else slice(half + 2, length - 1)] = 1
    return Example(Sample(f"s{seed}", seed, "test", ids, spans, num_turns=1), turns, (turns > 0).astype(np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def load(folder: Path, family: str, implementation: str) -> torch.nn.Module:
    attention.register()
    path = folder / family
    if not path.exists():
        build_model(path, family)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation=implementation
    ).eval()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", [SPLIT, "sdpa", "eager"])
def test_packed_logprobs_and_gradients_equal_each_sample_alone(
    folder: Path, family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_head, "chunk_rows", lambda *_: 7)
    examples = [example(length, seed=length) for length in (30, 4, 17, 41)]
    packed_model = TokenLogprobs(load(folder, family, implementation))
    packed = packed_model(collate(examples), loss=LossTerms())
    packed.loss.backward()
    alone_model = load(folder, family, "eager")
    alone = []
    for item in (e.sample for e in examples):
        ids = torch.from_numpy(item.ids.astype(np.int64))
        rows = alone_model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        span = item.spans[1]
        alone += [rows[t - 1, ids[t]] for t in range(span.output_start, span.output_end)]
    (-torch.stack(alone).sum()).backward()
    assert torch.allclose(packed.logprob, torch.stack(alone), atol=1e-5)  # norms compute in float32
    expected = dict(alone_model.named_parameters())
    for name, parameter in packed_model.model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5), name


def test_log_probs_and_hits_are_those_of_the_full_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "chunk_rows", lambda *_: 7)
    batch = collate([example(30, everything=True), example(17, seed=3, everything=True)])
    model, plain = TokenLogprobs(load(folder, "llama", SPLIT)), load(folder, "llama", "eager")
    # One target that is the likeliest token for sure.
    with torch.no_grad():
        row = plain(input_ids=batch.input_ids[:, :30], use_cache=False).logits[0]
    batch.targets[0, 4] = row[4].argmax()
    values = model(batch, with_details=True)
    logits = torch.cat(
        [plain(input_ids=ids, use_cache=False).logits[0, :-1] for ids in batch.input_ids.split([30, 17], 1)]
    )
    targets = batch.targets[0][batch.targets[0] != IGNORE]
    everything = logits.log_softmax(-1)
    logprob = everything.gather(-1, targets[:, None])
    is_top = (logprob >= everything.max(-1, keepdim=True).values)[:, 0].double()
    assert torch.allclose(values.logprob, logprob[:, 0], atol=1e-5)
    assert torch.equal(values.is_top, is_top) and 0 < is_top.sum() < len(targets)
    assert torch.allclose(values.entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5)
    only = model(batch)
    assert (
        only.is_top is None and only.entropy is None and only.loss is None and torch.equal(only.logprob, values.logprob)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neftune_noises_each_sample_by_its_own_length_and_only_while_training(folder: Path, family: str) -> None:
    """Jain et al., 2023, section 2: uniform(-1, 1) times alpha / sqrt(length x width)."""
    alpha, lengths = 5.0, (30, 6, 17)
    examples = [example(length, seed=length, everything=True) for length in lengths]
    batch, plain = collate(examples), load(folder, family, "eager")
    noisy = TokenLogprobs(load(folder, family, SPLIT), neftune_alpha=alpha).train()
    torch.manual_seed(11)
    found = noisy(batch).logprob
    width = plain.get_input_embeddings().weight.shape[1]
    torch.manual_seed(11)
    draws = torch.empty(1, sum(lengths), width).uniform_(-1, 1)
    expected, quiet = [], []
    for ids, noise in zip(batch.input_ids.split(lengths, 1), draws.split(lengths, 1), strict=True):
        embedded = plain.get_input_embeddings()(ids)
        for inputs, into in ((embedded + noise * alpha / (ids.shape[1] * width) ** 0.5, expected), (embedded, quiet)):
            rows = plain(inputs_embeds=inputs, use_cache=False).logits[0, :-1].log_softmax(-1)
            into.append(rows.gather(-1, ids[0, 1:, None])[:, 0])
    assert torch.allclose(found.double(), torch.cat(expected), atol=1e-4)
    assert not torch.allclose(torch.cat(expected), torch.cat(quiet), atol=0.1)
    torch.manual_seed(12)
    assert not torch.allclose(noisy(batch).logprob, found, atol=0.1), "the noise follows from the seed"
    assert torch.allclose(noisy.eval()(batch).logprob.double(), torch.cat(quiet), atol=1e-5)


def test_a_batch_without_targets_gives_a_connected_zero(folder: Path) -> None:
    wrapped = TokenLogprobs(load(folder, "qwen2", SPLIT))
    for batch in (collate([]), collate([without_targets(example(9))])):
        values = wrapped(batch, loss=LossTerms(label_smoothing=0.1, z_loss=0.1))
        assert values.logprob.shape == (0,) and values.loss == 0
        values.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in wrapped.parameters() if p.requires_grad)


def without_targets(example: Example) -> Example:
    return replace(example, turns=np.full_like(example.turns, -1), weights=np.zeros_like(example.weights))


def test_a_head_that_is_not_linear_is_refused_by_name(folder: Path) -> None:
    model = load(folder, "llama", SPLIT)
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ConfigError, match="Identity"):
        TokenLogprobs(model)


def test_collate_shifts_once_and_restarts_positions() -> None:
    first, second = example(8, seed=1), example(8, seed=2)
    batch = collate([first, second])
    assert batch.cu_seqlens.tolist() == [0, 8, 16] and batch.lengths == (8, 8)
    assert batch.position_ids[0].tolist() == [*range(8), *range(8)]
    rows = (batch.targets[0] != IGNORE).nonzero()[:, 0].tolist()
    # Outputs: token 6 of the first sample, token 6 of the second: each is predicted one position earlier.
    assert rows == [5, 8 + 5]
    assert batch.target_rows.tolist() == rows and batch.num_targets == 2
    assert batch.weights[0].tolist() == [1.0 if row in rows else 0.0 for row in range(16)]
    for row in rows:
        assert batch.targets[0, row] == batch.input_ids[0, row + 1]
    assert batch.targets[0, 7] == IGNORE, "no target crosses from one sample to the next"
    assert batch.turns == ((0, 1), (1, 1))
    assert [batch.turn_ids[0, row].item() for row in rows] == [0 if row < 8 else 1 for row in rows]
