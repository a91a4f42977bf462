"""A prediction head beside the language model's: both losses of a step, against plain transformers in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import oracle
from tests.helpers.encoders import make_beside
from tests.helpers.models import build_model
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

# (language_model_weight, weight) of each case
WEIGHTS = {"llama single_label": (0.3, 2.0), "qwen2 multi_label": (1.0, 0.5), "gpt2 regression": (0.7, 1.0)}
LAYOUTS = {1: 2, 2: 1}  # ranks -> packs per forward


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    """(ranks, case) -> what a real world computes; (0, case) -> the case."""
    base = tmp_path_factory.mktemp("beside")
    cases: dict[str, dict[str, Any]] = {}
    for name, (language_model_weight, weight) in WEIGHTS.items():
        family, kind = name.split()
        records = make_beside(16, kind=kind)
        for number, record in enumerate(records):
            record["weight"] = [1.0, 0.5, 2.0][number % 3]
        data = base / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        cases[name] = {
            "case": "gradient",
            "model": str(build_model(base / family, family)),
            "data": str(data),
            "kind": kind,
            "max_length": 192,
            "global_packs": 5,
            "normalise": "turn" if kind == "regression" else "token",
            "head": {"language_model_weight": language_model_weight, "weight": weight},
        }
    llama = cases["llama single_label"]
    cases["continued"] = llama | {"case": "continued", "saved": str(base / "saved"), "head_rate": 0.1}
    found: dict[tuple[int, str], Any] = {(0, name): case for name, case in cases.items()}
    for size, per_forward in sorted(LAYOUTS.items(), reverse=True):  # the first saves what the others load
        layout = {"per_forward": per_forward, "reduce_once": size != 2}
        some = {name: case | layout for name, case in cases.items() if size == 2 or name != "gpt2 regression"}
        if size == 2:
            # So strong a pull that a step goes half of the way back.
            some["pulled"] = some["continued"] | {"saved": str(base / "pulled"), "anchor": {"decay": 50.0, "kl": 0.1}}
            gpt2 = build_model(base / "dropout", "gpt2", dropout=0.1)
            some["exact"] = {
                "case": "exact",
                "name": "beside",
                "model": str(gpt2),
                "data": llama["data"],
                "head": llama["head"] | {"kind": "single_label", "learning_rate": 1e-2},
                "epochs": 1,
                "global_packs": 1,
            }
        values = run_world(size, list(some.values()), base / f"world-{size}", module="tests.helpers.head_cases")
        found |= {(size, name): value for name, value in zip(some, values, strict=True)}
    return found


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_gradient_of_both_losses_is_that_of_plain_transformers_conversation_by_conversation(
    answers: dict[tuple[int, str], Any], name: str
) -> None:
    case, found = answers[0, name], [answers[size, name] for size in LAYOUTS if (size, name) in answers]
    assert found[-1]["empty_forwards"], "a rank without any sample of its own takes part"
    records = [json.loads(line) for line in Path(case["data"]).read_text().splitlines()]
    model, tokenizer = oracle.load(Path(case["model"]))
    omega = found[0]["parameters"]["score.weight"].double().requires_grad_()
    names = found[0]["labels"]
    sums = {"tokens": torch.zeros((), dtype=torch.float64), "labels": torch.zeros((), dtype=torch.float64)}
    masses = {"tokens": 0.0, "labels": 0.0}
    kinds = set()
    for number in found[0]["samples"]:
        record = records[number]
        kinds.add(("label" in record, any(message["role"] == "assistant" for message in record["messages"])))
        ids, targets = oracle.sequence(tokenizer, record["messages"])
        row = torch.tensor([ids])
        output = model(input_ids=row, use_cache=False, output_hidden_states=True)
        logits = output.logits[0, :-1]
        turn_of, turn = [], 0  # of each token
        for before, target in zip([-100, *targets], targets, strict=False):
            turn += before == -100 and target != -100
            turn_of.append(turn if target != -100 else 0)
        nlls = F.cross_entropy(logits, torch.tensor(targets[1:]), ignore_index=-100, reduction="none")
        for own in range(1, turn + 1):
            of_turn = nlls[torch.tensor(turn_of[1:]) == own]
            by_turn = case["normalise"] == "turn"
            sums["tokens"] = sums["tokens"] + record["weight"] * (of_turn.mean() if by_turn else of_turn.sum())
            masses["tokens"] += record["weight"] * (1 if by_turn else len(of_turn))
        if "label" not in record:
            continue
        said = omega @ output.hidden_states[-1][0, -1]
        sums["labels"] = sums["labels"] + record["weight"] * _label_loss(case["kind"], said, record["label"], names)
        masses["labels"] += record["weight"]
    assert len(kinds) == 3, "conversations with both, without a label, and without an answer"
    language_model_weight, weight = WEIGHTS[name]
    nll = sums["tokens"] / masses["tokens"]
    loss = language_model_weight * nll + weight * sums["labels"] / masses["labels"]
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()} | {"score.weight": omega.grad}
    scale = max(float(value.abs().max()) for value in expected.values() if value is not None)
    for answer in found:
        assert answer["samples"] == found[0]["samples"] and len(answer["samples"]) > 8
        assert answer["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert answer["nll"] == pytest.approx(float(nll.detach()), rel=1e-5)
        assert answer["gradients"].keys() == expected.keys()
        for key, value in expected.items():
            assert value is not None
            assert float((answer["gradients"][key] - value).abs().max()) < 1e-5 * scale, key
        for key, value in found[0]["parameters"].items():
            assert torch.equal(answer["parameters"][key], value), f"{key} starts the same on any number of ranks"


def _label_loss(kind: str, said: torch.Tensor, label: Any, names: list[str]) -> torch.Tensor:
    if kind == "single_label":
        return -said.log_softmax(-1)[names.index(label)]
    if kind == "multi_label":
        applies = torch.tensor([float(name in label) for name in names], dtype=torch.float64)
        return F.binary_cross_entropy_with_logits(said, applies)
    return (said[0] - label) ** 2


def test_stopped_and_resumed_no_bit_changes(answers: dict[tuple[int, str], Any]) -> None:
    """With dropout, a learning rate of the head's own, and evaluations and saves in between or not."""
    answer = answers[2, "exact"]
    assert answer["num_steps"] > 2
    assert answer["differing"] == [[], []] and answer["undisturbed"] == [True, True] and answer["rewound"] == [True] * 2


def test_a_run_continues_on_another_number_of_ranks(answers: dict[tuple[int, str], Any]) -> None:
    for moment in ("first", "second"):
        for name, value in answers[1, "continued"][moment].items():
            expected = answers[2, "continued"][moment][name]
            torch.testing.assert_close(value, expected, rtol=0, atol=2e-5, msg=f"{moment} {name}")


def test_the_head_has_its_own_learning_rate_and_is_not_pulled_to_where_it_began(
    answers: dict[tuple[int, str], Any],
) -> None:
    grads = answers[2, "llama single_label"]["gradients"]
    free, pulled = answers[2, "continued"], answers[2, "pulled"]
    # With so large an eps the first step of AdamW is g / (|g| + eps) times the rate.
    for name, rate in (("score.weight", 0.1), ("model.norm.weight", 0.01)):
        moved = free["start"][name] - free["first"][name]
        torch.testing.assert_close(moved, rate * grads[name] / (grads[name].abs() + 0.01), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(pulled["second"]["score.weight"], free["second"]["score.weight"], rtol=0, atol=1e-2)
    assert not torch.equal(pulled["second"]["model.norm.weight"], free["second"]["model.norm.weight"])
