"""A prediction head over packed samples, against plain transformers in float64, one sample at a time."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sft_dist.config import DataConfig, HeadConfig, ModelConfig, RunConfig
from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Example
from sft_dist.errors import ConfigError
from sft_dist.model import attention, bidirectional
from sft_dist.model.batch import collate
from sft_dist.model.classifier import Classifier, choose_attention, last_tokens
from sft_dist.model.classifier import load as classifier_of
from sft_dist.model.fused_head import LossTerms
from sft_dist.model.layers import decoder_layers
from tests.helpers.encoders import ENCODERS, build_encoder, make_labelled
from tests.helpers.models import build_model
from tests.helpers.worlds import run_world

DECODERS = ("llama", "qwen2", "gpt2")
KINDS = ("single_label", "multi_label", "regression")
NUM_OUTPUTS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {f: build_encoder(base / f, f) for f in ENCODERS} | {f: build_model(base / f, f) for f in DECODERS}


def load(folder: Path, implementation: str) -> Any:
    attention.register()
    from transformers import AttentionInterface

    AttentionInterface.register(bidirectional.NAME, bidirectional.attention)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=NUM_OUTPUTS, dtype=torch.float64, attn_implementation=implementation, pad_token_id=0
    )
    return model.eval()


def example(ids: list[int], second: int, target: list[float], weight: float) -> Example:
    """A labelled sample whose second text begins at token `second`."""
    edges = [(0, second), (second, len(ids))]
    spans = tuple(Span(n, "text", a, a, b, b, is_owned=n == 0) for n, (a, b) in enumerate(edges) if a < b)
    sample = Sample("c", 0, "s", np.array(ids, np.int32), spans, num_turns=0)
    turns, weights = np.full(len(ids), -1, np.int32), np.zeros(len(ids), np.float32)
    turns[0], weights[0] = 0, weight
    return Example(sample, turns, weights, np.array(target, np.float64))


@st.composite
def examples(draw: st.DrawFn, kind: str) -> list[Example]:
    found = []
    for _ in range(draw(st.integers(1, 5))):
        # 0 is the token of padding, which decoders look past.
        ids = draw(st.lists(st.integers(0, 40), min_size=1, max_size=7))
        numbers = draw(st.lists(st.sampled_from([0.0, 1.0, -2.5]), min_size=NUM_OUTPUTS, max_size=NUM_OUTPUTS))
        targets = {
            "single_label": [float(draw(st.integers(0, NUM_OUTPUTS - 1)))],
            "multi_label": [float(number > 0) for number in numbers],
            "regression": numbers,
        }
        second = draw(st.integers(1, len(ids)))
        found.append(example(ids, second, targets[kind], draw(st.sampled_from([0.5, 1.0, 2.0]))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", (*ENCODERS, *DECODERS))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradient_are_those_of_each_sample_alone(
    folders: dict[str, Path], family: str, kind: str
) -> None:
    packed_model = load(folders[family], bidirectional.NAME if family in ENCODERS else attention.SPLIT)
    classifier = Classifier(packed_model, frozenset(), HeadConfig(kind=kind), decoder_layers(packed_model))  # type: ignore[arg-type]
    plain = load(folders[family], "eager")
    bound = 1e-10 if family in ENCODERS else 1e-5  # norms, positions and eager softmax of decoders are float32

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(some=examples(kind))
    def check(some: list[Example]) -> None:
        classifier.zero_grad()
        plain.zero_grad()
        values = classifier(collate(some), loss=LossTerms())
        values.loss.backward()
        expected = []
        for one in some:
            row = {"input_ids": torch.tensor(one.sample.ids[None].astype(np.int64))}
            if family == "bert":
                types = [span.message for span in one.sample.spans for _ in range(span.start, span.end)]
                row["token_type_ids"] = torch.tensor([types])
            if family in ENCODERS:
                row["attention_mask"] = torch.ones_like(row["input_ids"])
            if family == "roberta":  # which would take a token of padding for no position
                row["position_ids"] = torch.arange(len(one.sample.ids))[None] + 1
            expected.append(plain(**row).logits[0])
        losses = [_loss(kind, logits, torch.tensor(one.target)) for logits, one in zip(expected, some, strict=True)]
        total = sum(float(one.weights[0]) * loss for one, loss in zip(some, losses, strict=True))
        total.backward()  # type: ignore[union-attr]
        torch.testing.assert_close(values.logits, torch.stack(expected), rtol=0, atol=bound)
        assert float(values.loss.detach()) == pytest.approx(float(total.detach()), rel=bound)  # type: ignore[union-attr]
        theirs = dict(plain.named_parameters())
        for name, parameter in packed_model.named_parameters():
            if theirs[name].grad is not None:
                torch.testing.assert_close(
                    parameter.grad, theirs[name].grad, rtol=10 * bound, atol=10 * bound, msg=name
                )

    check()


def _loss(kind: str, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As transformers computes it for a batch of one sample."""
    if kind == "single_label":
        return F.cross_entropy(logits[None], target.long())
    return F.binary_cross_entropy_with_logits(logits, target) if kind == "multi_label" else F.mse_loss(logits, target)


@given(
    samples=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=5),
    padding=st.sampled_from([None, 0]),
)
def test_the_last_token_is_the_last_that_is_no_padding(samples: list[list[int]], padding: int | None) -> None:
    lengths = [len(ids) for ids in samples]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    found = last_tokens(torch.tensor([i for ids in samples for i in ids]), bounds, padding).tolist()
    for ids, begin, place in zip(samples, bounds.tolist(), found, strict=False):
        real = [n for n, i in enumerate(ids) if i != padding]
        assert place - begin == (real[-1] if real else 0)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    """(ranks, case) -> the gradient of the first step in a real world, for several layouts."""
    base = tmp_path_factory.mktemp("worlds")
    found: dict[tuple[int, str], Any] = {}
    cases = {}
    for family, kind in (("bert", "single_label"), ("bert", "multi_label"), ("llama", "single_label")):
        model = build_encoder(base / family) if family == "bert" else build_model(base / family, family)
        data = base / f"{family}-{kind}.jsonl"
        records = make_labelled(14, kind=kind, pairs=family == "bert")
        for number, record in enumerate(records):
            record["weight"] = [1.0, 0.5, 2.0][number % 3]
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        cases[f"{family} {kind}"] = {"case": "gradient", "model": str(model), "data": str(data), "kind": kind}
        cases[f"{family} {kind}"]["max_length"] = 32 if family == "bert" else 96  # a few samples a pack
    bert = cases["bert single_label"]
    cases["continued"] = bert | {"case": "continued", "saved": str(base / "saved"), "head_rate": 0.1}
    cases["frozen"] = bert | {"case": "continued", "saved": str(base / "frozen"), "is_frozen": True}
    for size in (2, 1, 3):  # the first saves what the others load
        layout = {"per_forward": 2 if size == 1 else 1, "reduce_once": size != 2}
        some = [case | layout for case in cases.values()]
        answers = run_world(size, some, base / f"world-{size}", module="tests.helpers.head_cases")
        found |= {(size, name): answer for name, answer in zip(cases, answers, strict=True)}
    found |= {(0, name): case for name, case in cases.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert single_label", "bert multi_label", "llama single_label"])
def test_the_gradient_of_a_step_is_that_of_plain_transformers_on_any_number_of_ranks(
    gradients: dict[tuple[int, str], Any], name: str
) -> None:
    case = gradients[0, name]
    answers = [gradients[size, name] for size in (1, 2, 3)]
    assert answers[2]["empty_forwards"], "a rank without any sample of its own takes part"
    records = [json.loads(line) for line in Path(case["data"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    model = AutoModelForSequenceClassification.from_pretrained(
        case["model"], num_labels=len(answers[0]["labels"]), dtype=torch.float64, attn_implementation="eager"
    )
    model.load_state_dict({name: value.double() for name, value in answers[0]["parameters"].items()})
    names = answers[0]["labels"]
    # Of the whole step: every sample once, weights in numerator and denominator.
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for number in answers[0]["samples"]:
        record = records[number]
        row = tokenizer(record["text"], record.get("text_pair"), return_tensors="pt")
        if "llama" in name:
            row.pop("token_type_ids", None)
        logits = model.eval()(**row).logits[0]
        if case["kind"] == "single_label":
            target = torch.tensor([float(names.index(record["label"]))])
        else:
            target = torch.tensor([float(name in record["label"]) for name in names], dtype=torch.float64)
        total = total + record["weight"] * _loss(case["kind"], logits, target)
        mass += record["weight"]
    (total / mass).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for answer in answers:
        assert answer["samples"] == answers[0]["samples"] and len(answer["samples"]) > 8
        assert answer["loss"] == pytest.approx(float((total / mass).detach()), rel=1e-5)
        for key, value in expected.items():
            torch.testing.assert_close(answer["gradients"][key].double(), value, rtol=1e-3, atol=2e-6, msg=key)
        for key, value in answers[0]["parameters"].items():
            assert torch.equal(answer["parameters"][key], value), f"{key} starts the same on any number of ranks"


@pytest.mark.slow
def test_a_run_continues_on_any_number_of_ranks_with_the_learning_rate_of_its_head(
    gradients: dict[tuple[int, str], Any],
) -> None:
    for size, case in product((1, 3), ("continued", "frozen")):
        for moment in ("first", "second"):
            for name, value in gradients[size, case][moment].items():
                expected = gradients[2, case][moment][name]
                torch.testing.assert_close(value, expected, rtol=0, atol=2e-5, msg=f"{size} {case} {moment} {name}")
    whole = gradients[2, "continued"]
    # With so large an eps the first step of AdamW is g / (|g| + eps) times the rate, ten times as large for the head.
    grads, start = gradients[2, "bert single_label"]["gradients"], whole["start"]
    for name, rate in (("classifier.weight", 0.1), ("bert.pooler.dense.weight", 0.01)):
        moved = start[name] - whole["first"][name]
        torch.testing.assert_close(moved, rate * grads[name] / (grads[name].abs() + 0.01), rtol=1e-2, atol=1e-5)


@pytest.mark.slow
def test_a_frozen_backbone_stays_and_its_head_is_trained(gradients: dict[tuple[int, str], Any]) -> None:
    frozen = gradients[2, "frozen"]
    inside = [name for name in frozen["start"] if name.startswith("bert.")]
    assert len(inside) > 30
    assert all(torch.equal(frozen["second"][name], frozen["start"][name]) for name in inside)
    assert float((frozen["second"]["classifier.weight"] - frozen["start"]["classifier.weight"]).abs().min()) > 0


def drops(model: torch.nn.Module) -> dict[str, bool]:
    """Name of each module of dropout -> whether it draws."""
    return {name: module.training for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_frozen_backbone_draws_no_dropout_while_its_head_does(tmp_path: Path, is_frozen: bool) -> None:
    model = load(build_encoder(tmp_path / "bert", "bert", dropout=0.5), bidirectional.NAME).float()
    omega = frozenset({"classifier.weight", "classifier.bias"})
    head = HeadConfig(kind="single_label", freeze_backbone=is_frozen)
    classifier = Classifier(model, omega, head, decoder_layers(model))
    classifier.train()
    draws = drops(model)
    assert len(draws) > 3 and draws.pop("dropout"), "that of the head"
    assert set(draws.values()) == {not is_frozen}
    torch.manual_seed(0)
    batch = collate([example([1, 5, 6, 7, 2], 3, [0.0], 1.0)])
    inside = [model.base_model(**classifier._row(batch)).last_hidden_state for _ in range(2)]
    assert torch.equal(*inside) is is_frozen
    classifier.eval()
    assert not any(drops(model).values())


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of classifiers of the labels a, b, c, as transformers saves them."""
    base = tmp_path_factory.mktemp("classifiers")
    names = dict(enumerate("abc"))
    for family in ENCODERS:
        tokenizer = AutoTokenizer.from_pretrained(build_encoder(base / "plain" / family, family))
        model = AutoModelForSequenceClassification.from_pretrained(base / "plain" / family, id2label=names)
        model.save_pretrained(base / family)
        tokenizer.save_pretrained(base / family)
    return {family: base / family for family in ENCODERS}


@pytest.mark.parametrize(
    ("family", "lost"),
    [("bert", None), ("bert", "bert.pooler."), ("roberta", "classifier.dense."), ("distilbert", "pre_classifier.")],
)
def test_a_head_of_other_labels_is_refused_also_where_what_stands_before_it_is_new(
    with_heads: dict[str, Path], tmp_path: Path, family: str, lost: str | None
) -> None:
    folder = Path(shutil.copytree(with_heads[family], tmp_path / family))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if lost is None or not name.startswith(lost)}
    assert (len(kept) < len(weights)) is (lost is not None)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    def loaded(*labels: str) -> dict[str, torch.Tensor]:
        head = HeadConfig(kind="single_label", labels=labels)
        config = RunConfig(
            run_dir="unused", model=ModelConfig(path=str(folder)), head=head, data=DataConfig(max_length=64)
        )
        model_config = AutoConfig.from_pretrained(folder)
        model, _ = classifier_of(config, model_config, dtype=torch.float32, seed=0, is_main=True)
        return dict(model.named_parameters())

    output = "classifier.out_proj.weight" if family == "roberta" else "classifier.weight"
    assert torch.equal(loaded("a", "b", "c")[output], weights[output])
    for labels in (("c", "b", "a"), ("x", "y", "z")):
        with pytest.raises(ConfigError, match=r"its head has 3 labels \(a, b, c \.\.\.\), head\.labels are others"):
            loaded(*labels)
    assert len(loaded("x", "y")[output]) == 2, "of another number nothing is kept"


@pytest.mark.parametrize("family", ["mpnet", "deberta-v2", "modernbert", "bart", "roformer"])
def test_an_encoder_that_cannot_be_packed_exactly_is_refused_by_name(family: str) -> None:
    config = RunConfig(run_dir="unused", model=ModelConfig(path="unused"), head=HeadConfig(kind="single_label"))
    with pytest.raises(ConfigError, match=f"{family} is not known to keep the samples of a pack apart"):
        choose_attention(config, AutoConfig.for_model(family), dtype=torch.float32)
