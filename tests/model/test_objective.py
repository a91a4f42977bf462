"""The objective of docs/objective.md, section 5, in worlds of 1 to 4 ranks, against plain transformers in float64.

One start of a world computes many random cases: data with weights, marks, branches and texts, masks, normalisations,
repeats, lengths and layouts.
"""

import random
from collections import Counter
from typing import Any

import pytest
import torch

from sft_dist.config import DataConfig, ModelConfig
from sft_dist.data.renderer import load_renderer
from tests.helpers import oracle
from tests.helpers.models import build_model
from tests.helpers.samples import prepared
from tests.helpers.weighted import make_conversations, samples_of
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

SIZES = (1, 2, 3, 4)
CASES_PER_WORLD = 9
NUM_DATA_SETS = 3
WHOLE_STEP = 1_000  # packs: all data in one step
PLAIN = {"label_smoothing": 0.0, "z_loss": 0.0}
TRAIN_ON = ("assistant", "last_assistant", "all", "marked")
NORMALISE = ("token", "turn", "conversation")


def draw_case(rng: random.Random) -> dict[str, Any]:
    is_whole, is_cut = rng.random() < 0.7, rng.random() < 0.7
    return {
        "case": "objective",
        "data": rng.randrange(NUM_DATA_SETS),
        "policy": {
            "max_length": rng.choice([45, 60, 90] if is_cut else [160, 300]) if is_whole else 300,
            "train_on": rng.choice(TRAIN_ON),
            "normalise": rng.choice(NORMALISE),
            "overflow": "truncate_turns" if is_cut else "drop",
            "source_weights": {"chat": rng.choice([0.5, 1.0, 3.0]), "book": 2.0},
        },
        "objective": {"label_smoothing": rng.choice([0.0, 0.1, 0.5]), "z_loss": rng.choice([0.0, 0.0, 0.01])},
        "repeats": {"code": rng.choice([1.0, 2.0])},
        "global_packs": WHOLE_STEP if is_whole else rng.choice([1, 3]),
        "per_forward": rng.choice([1, 1, 2, 3]),
        "seed": rng.randrange(1_000),
        "last_step": rng.random() < 0.5,
        "details": False,
    }


def settled_cases(size: int) -> list[dict[str, Any]]:
    """What chance may miss: every normalisation on every size, ranks without any target, every train_on."""
    rng = random.Random(size)
    base = draw_case(rng) | {"global_packs": WHOLE_STEP, "per_forward": 1, "data": 0, "details": True, "repeats": {}}
    policy = {"max_length": 130, "overflow": "truncate_turns", "source_weights": {"chat": 0.5, "book": 2.0}}
    smooth = {"label_smoothing": 0.1, "z_loss": 0.01}
    cases = [
        base | {"policy": policy | {"normalise": normalise, "train_on": TRAIN_ON[(size + place) % 4]}, "objective": o}
        for place, (normalise, o) in enumerate(zip(NORMALISE, (PLAIN, smooth, smooth), strict=True))
    ]
    # One pack: all ranks but one have nothing to do.
    alone = base | {"policy": policy | {"max_length": 300, "normalise": "turn", "train_on": "assistant"}}
    return [*cases, alone | {"global_packs": 1, "last_step": True, "objective": smooth}]


def noise_case(alpha: float) -> dict[str, Any]:
    base = settled_cases(1)[0]
    return base | {"objective": PLAIN | {"neftune_alpha": alpha}, "details": False}


def heldout_case(per_forward: int, max_length: int, alpha: float = 0.0) -> dict[str, Any]:
    policy = {"max_length": max_length, "train_on": "all", "normalise": "conversation", "overflow": "truncate_turns"}
    policy["source_weights"] = {"chat": 7.0}
    return {"case": "heldout", "data": 1, "policy": policy, "per_forward": per_forward, "neftune_alpha": alpha}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("objective")
    model_path = build_model(folder / "model", "llama")
    renderer = load_renderer(ModelConfig(path=str(model_path)), DataConfig())
    model, tokenizer = oracle.load(model_path)
    data = [make_conversations(12, seed) for seed in range(NUM_DATA_SETS)]
    for number, conversations in enumerate(data):
        prepared(folder / f"data-{number}", samples_of(renderer, conversations))
    rng = random.Random(0)
    answers: dict[int, list[tuple[dict[str, Any], Any]]] = {}
    for size in SIZES:
        cases = [*(draw_case(rng) for _ in range(CASES_PER_WORLD)), *settled_cases(size)]
        if size < 3:
            cases += [noise_case(5.0), noise_case(5.0), noise_case(0.0)]
            cases += [heldout_case(size, 300), heldout_case(3 - size, 300, alpha=5.0)]
        placed = [case | {"model": str(model_path), "prepared": str(folder / f"data-{case['data']}")} for case in cases]
        answers[size] = list(zip(cases, run_world(size, placed, folder / f"world-{size}"), strict=True))
    reference = oracle.Objective(model)
    return {"answers": answers, "data": data, "model": model, "tokenizer": tokenizer, "reference": reference}


def pieces_of(setting: dict[str, Any], case: dict[str, Any]) -> list[oracle.Piece]:
    policy = case["policy"]
    return oracle.pieces(
        setting["tokenizer"],
        setting["data"][case["data"]],
        train_on=policy["train_on"],
        max_length=policy["max_length"],
        truncate=policy["overflow"] == "truncate_turns",
    )


def reference_loss(setting: dict[str, Any], case: dict[str, Any], samples: list[int], **extra: float) -> torch.Tensor:
    data = pieces_of(setting, case)
    if case["global_packs"] == WHOLE_STEP:
        counts = [int(case["repeats"].get(piece.source, 1)) for piece in data]
    else:
        in_step = Counter(samples)
        counts = [in_step[piece.sample] for piece in data]
    policy = case["policy"]
    loss: torch.Tensor = setting["reference"].loss(
        data, counts, normalise=policy["normalise"], source_weights=policy["source_weights"], **extra
    )
    return loss


def largest_relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - value).abs().max()) / scale for name, value in expected.items())


@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradient_are_those_of_the_definition_for_any_data_weights_and_layout(
    setting: dict[str, Any], size: int
) -> None:
    model = setting["model"]
    for case, answer in setting["answers"][size][: CASES_PER_WORLD + 4]:
        loss = reference_loss(setting, case, answer["samples"], **case["objective"])
        model.zero_grad()
        loss.backward(retain_graph=True)
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert answer["loss"] == pytest.approx(float(loss.detach()), rel=1e-5), case
        nll = float(reference_loss(setting, case, answer["samples"]).detach())
        assert answer["nll"] == pytest.approx(nll, rel=1e-5), case
        assert largest_relative_difference(answer["gradients"], expected) < 2e-5, case


def test_the_cases_reach_what_they_should(setting: dict[str, Any]) -> None:
    """Empty forwards, accumulation, cut conversations, windows, conversations without targets, branches."""
    seen: Counter[str] = Counter()
    for size, answers in setting["answers"].items():
        for case, answer in answers[: CASES_PER_WORLD + 4]:
            per_rank = [sum(map(len, forwards)) for forwards in answer["forwards"]]
            seen["rank without targets"] += size > 1 and 0 in per_rank
            seen[f"accumulation of {min(len(answer['forwards'][0]), 4)}"] += 1
            pieces = pieces_of(setting, case)
            seen["windows"] += len({piece.sample for piece in pieces}) < len(pieces)
            in_step = Counter(answer["samples"])
            seen["repeated"] += max(in_step.values()) > 1
            with_targets = {piece.conversation for piece in pieces if piece.targets}
            seen["conversation without targets"] += len(with_targets) < len({piece.conversation for piece in pieces})
            branches = Counter(piece.conversation for piece in pieces if piece.targets and not piece.is_text)
            seen["branches"] += max(branches.values(), default=0) > 1
            seen[case["policy"]["normalise"]] += 1
            seen[case["policy"]["train_on"]] += 1
    wanted = ["rank without targets", "windows", "repeated", "conversation without targets", "branches"]
    wanted += [f"accumulation of {number}" for number in (1, 2, 3, 4)] + list(NORMALISE) + list(TRAIN_ON)
    assert all(seen[name] >= 2 for name in wanted), seen


def figures_match(found: dict[str, Any], expected: dict[str, dict[str, list[float]]]) -> None:
    all_figures = found["all"]
    groups = {"all": {"all": all_figures}} | {name: group for name, group in found.items() if name != "all"}
    assert {name: set(group) for name, group in groups.items() if group} == {
        name: set(group) for name, group in expected.items()
    }
    for name, group in expected.items():
        for key, (nll_sum, num_top, entropy_sum, count) in group.items():
            figures = groups[name][key]
            assert figures["count"] == count
            assert figures["nll"] == pytest.approx(nll_sum / count, rel=1e-5)
            assert figures["accuracy"] == pytest.approx(num_top / count)
            assert figures["entropy"] == pytest.approx(entropy_sum / count, rel=1e-5)
            assert figures["perplexity"] == pytest.approx(torch.tensor(nll_sum / count).exp().item(), rel=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_training_figures_are_those_of_every_target_whatever_the_layout(setting: dict[str, Any], size: int) -> None:
    for case, answer in setting["answers"][size][CASES_PER_WORLD : CASES_PER_WORLD + 3]:
        figures_match(answer["details"], oracle.figures(setting["reference"], pieces_of(setting, case)))


@pytest.mark.parametrize("size", [1, 2])
def test_heldout_figures_are_those_of_every_target_for_any_ranks_and_packing(
    setting: dict[str, Any], size: int
) -> None:
    """Source weights and NEFTune play no part in them."""
    answers = [pair for pair in setting["answers"][size] if pair[0]["case"] == "heldout"]
    assert len(answers) == 2
    for case, answer in answers:
        figures_match(answer, oracle.figures(setting["reference"], pieces_of(setting, case)))
        assert {"first", "stop", "text"} == set(answer["token"]) and len(answer["source"]) == 3


@pytest.mark.parametrize("size", [1, 2])
def test_neftune_changes_the_gradient_the_same_way_every_time(setting: dict[str, Any], size: int) -> None:
    first, again, without = (answer for case, answer in setting["answers"][size][CASES_PER_WORLD + 4 :][:3])
    assert first["loss"] == again["loss"]
    assert all(torch.equal(first["gradients"][name], value) for name, value in again["gradients"].items())
    assert 1e-3 < largest_relative_difference(first["gradients"], without["gradients"]) < 1
