"""Staying near θ̂: decay toward it, drift from it, frozen parameters, rates by layer; on 1, 2 and 3 ranks.

The reference is one process of plain transformers and torch.optim.AdamW in float64, on the conversations of each step.
"""

import json
import math
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sft_dist.data.top_logprobs import TopTable
from tests.helpers import oracle
from tests.helpers.bare import CHATML_TOKENS, build_bare_model
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import CHATML, build_model, build_tokenizer
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

SAVED, LAST = 3, 5
VOCAB = len(build_tokenizer())
LEARNING_RATE = 3e-3
# A large eps: AdamW would blow up the rounding of gradients that are nearly zero.
OPTIMIZER = {"learning_rate": LEARNING_RATE, "weight_decay": 0.1, "eps": 1e-3}
SETTINGS: dict[str, dict[str, Any]] = {
    "decay": {
        "family": "qwen2",
        "anchor": {"decay": 30.0},
        "optimizer": OPTIMIZER | {"layer_decay": 0.7},
        "freeze": ["*embed_tokens*", "*layers.0.mlp*", "*layers.2.*norm*"],
        "gradient_checkpointing": False,  # the input of the first layer needs no gradient, and nothing computes it anew
    },
    "divergence": {"family": "llama", "anchor": {"kl": 2.0, "decay": 10.0}, "optimizer": OPTIMIZER},
    "kept divergence": {"family": "qwen2", "anchor": {"kl": 2.0, "kl_top_k": 5}, "optimizer": OPTIMIZER},
    "measured only": {"family": "llama", "optimizer": OPTIMIZER, "freeze": ["*layers.1.*"]},
}
BF16: dict[str, dict[str, Any]] = {
    name: {
        "dtype": "bfloat16",
        "deepspeed": file,
        "family": "llama",
        "anchor": {"decay": 250.0},
        "optimizer": OPTIMIZER,
    }
    for name, file in (
        ("bfloat16", "cpu"),
        ("offload all", "zero3_offload_all"),
    )
}


@dataclass(frozen=True)
class Runs:
    """Answers of resume_cases.train by (ranks, what)."""

    folder: Path
    answers: dict[tuple[int, str], Any]

    def saved(self, ranks: int, name: str) -> Path:
        return self.folder / f"saved-{ranks}-{list(SETTINGS).index(name)}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("anchor")
    for family in ("llama", "qwen2"):
        build_model(folder / family, family)
    build_bare_model(folder / "bare", "qwen2", spare_rows=1)
    (folder / "chat.jinja").write_text(CHATML)
    write_jsonl(folder / "data.jsonl", make_records(24, max_words=6))
    result = Runs(folder, {})

    def ask(ranks: int, cases: dict[str, dict[str, Any]], name: str) -> None:
        common = {"case": "train", "data": str(folder / "data.jsonl"), "model": ""}
        asked = [common | {"model": str(folder / case.get("family", "llama"))} | case for case in cases.values()]
        found = run_world(ranks, asked, folder / name, module="tests.helpers.resume_cases")
        result.answers.update(zip([(ranks, key) for key in cases], found, strict=True))

    def from_start(ranks: int) -> dict[str, dict[str, Any]]:
        return {
            name: setting | {"steps": [0, SAVED], "save": str(result.saved(ranks, name))}
            for name, setting in SETTINGS.items()
        }

    def resumed(from_ranks: int) -> dict[str, dict[str, Any]]:
        return {
            f"{name} from {from_ranks}": setting
            | {"resume": str(result.saved(from_ranks, name)), "steps": [SAVED, LAST]}
            for name, setting in SETTINGS.items()
        }

    undisturbed = {f"{name} undisturbed": SETTINGS[name] | {"steps": [0, LAST]} for name in SETTINGS}
    half = {name: setting | {"steps": [0, 2]} for name, setting in BF16.items()}
    half["bfloat16, resumed"] = BF16["bfloat16"] | {"steps": [2, 4], "resume": str(folder / "half"), "start": True}
    half["not pulled"] = half["bfloat16"] | {"anchor": {}}
    half["bfloat16"] |= {"save": str(folder / "half")}
    tokens = {
        "new tokens": {
            "model": str(folder / "bare"),
            "control_tokens": list(CHATML_TOKENS),
            "chat_template": str(folder / "chat.jinja"),
            "steps": [0, 2],
            "start": True,
        }
    }
    again = {"family": "qwen2", "initial": str(result.saved(2, "decay")), "steps": [0, 2], "start": True}
    compared = {"kl": 2.0, "decay": 10.0}
    adapters = {"family": "llama", "adapter": {"kind": "lora", "rank": 4}, "steps": [0, 3]}
    whole = {
        "all kept": SETTINGS["divergence"] | {"anchor": compared | {"kl_top_k": VOCAB}, "steps": [0, LAST]},
        "adapters, compared": adapters | {"anchor": {"kl": 2.0}},
        "adapters, all kept": adapters | {"anchor": {"kl": 2.0, "kl_top_k": VOCAB}},
    }
    anew = {"kept anew": SETTINGS["kept divergence"] | {"steps": [0, 1], "cache_dir": str(folder / "anew")}}
    rounded = SETTINGS["decay"] | {"anchor": {"decay": 30.0, "dtype": "bfloat16"}, "steps": [0, 1]}
    ask(2, from_start(2) | undisturbed, "2")
    refused = {
        "refused": SETTINGS["kept divergence"] | {"case": "refused_answers", "cache_dir": str(folder / "refused")}
    }
    ask(2, refused | half | tokens | {"from a checkpoint": again, "rounded": rounded} | whole, "others")
    ask(1, from_start(1) | resumed(2) | anew, "1")
    ask(3, from_start(3), "3")
    ask(2, resumed(1) | resumed(2), "again")
    return result


def reference(folder: Path, setting: dict[str, Any], steps: list[list[int]]) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of steps on these conversations, by the definitions."""
    model, tokenizer = oracle.load(folder / setting["family"])
    records = make_records(24, max_words=6)
    chosen = setting["optimizer"]
    groups = []
    for name, parameter in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in setting.get("freeze", [])):
            parameter.requires_grad_(False)
            continue
        layer = re.search(r"layers\.(\d)", name)
        depth = 0 if "embed" in name else 4 if layer is None else int(layer[1]) + 1
        groups.append(
            {
                "params": [parameter],
                "weight_decay": chosen["weight_decay"] if parameter.ndim > 1 else 0.0,
                "factor": chosen.get("layer_decay", 1.0) ** (4 - depth),
            }
        )
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=chosen["eps"])
    start = [group["params"][0].detach().clone() for group in adamw.param_groups]
    beta = setting.get("anchor", {}).get("kl", 0)
    frozen = oracle.load(folder / setting["family"])[0] if beta else None
    losses = []
    for number, members in enumerate(steps):
        conversations = [records[i]["messages"] for i in members]
        loss = oracle.loss(model, tokenizer, conversations)
        if beta:
            kept = setting["anchor"].get("kl_top_k")
            loss = loss + beta * divergence(model, frozen, tokenizer, conversations, kept)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([group["params"][0] for group in adamw.param_groups], 1.0)
        for group, before in zip(adamw.param_groups, start, strict=True):
            group["lr"] = LEARNING_RATE / (1 + number) * group["factor"]
            with torch.no_grad():
                group["params"][0] -= (
                    group["lr"] * setting.get("anchor", {}).get("decay", 0) * (group["params"][0] - before)
                )
        adamw.step()
        losses.append(loss.item())
    return dict(model.named_parameters()), losses


def divergence(model: Any, frozen: Any, tokenizer: Any, conversations: Any, kept: int | None) -> Tensor:
    """Mean over all tokens of answers of KL(frozen ‖ model), one turn at a time.

    With `kept`, of so many tokens, the likeliest to `frozen`, and all others as one.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for messages in conversations:
        for context, output in oracle.turn_contexts(tokenizer, messages):
            ids = torch.tensor([context + output])
            now = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(-1)
            with torch.no_grad():
                before = frozen(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(-1)
            if kept is not None:
                ids = before.topk(kept).indices
                now, before = _with_the_rest(now, ids), _with_the_rest(before, ids)
            total = total + (before.exp() * (before - now)).sum()
            count += len(output)
    return total / count


def _with_the_rest(logprobs: Tensor, ids: Tensor) -> Tensor:
    """[n, kept + 1]: log-probs of these tokens, and of all others together."""
    chosen = logprobs.gather(-1, ids)
    return torch.cat([chosen, (1 - chosen.exp().sum(-1, keepdim=True)).log()], -1)


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_after_steps_are_those_of_plain_torch_on_any_number_of_ranks(runs: Runs, name: str) -> None:
    setting = SETTINGS[name]
    whole = runs.answers[2, f"{name} undisturbed"]
    steps = whole["samples"]
    short, short_losses = reference(runs.folder, setting, steps[:SAVED])
    long, long_losses = reference(runs.folder, setting, steps)
    checked = [(runs.answers[ranks, name], short, short_losses) for ranks in (1, 2, 3)]
    checked += [(whole, long, long_losses)]
    checked += [
        (runs.answers[ranks, f"{name} from {before}"], long, long_losses[SAVED:])
        for ranks, before in ((1, 2), (2, 1), (2, 2))
    ]
    moved = runs.answers[2, name]["drift"]["all"]
    assert moved > 1e-3
    for answer, expected, losses in checked:
        assert answer["losses"] == pytest.approx(losses, abs=2e-6)
        for parameter, value in expected.items():
            found = answer["state"]["weight"][parameter]
            assert torch.allclose(found.double(), value.detach(), rtol=0, atol=1e-6), (
                parameter,
                (found - value).abs().max(),
            )
            is_frozen = parameter not in answer["state"]["master"]
            assert is_frozen == any(fnmatch(parameter, pattern) for pattern in setting.get("freeze", []))


def test_without_the_decay_weights_are_far_from_where_they_are_with_it(runs: Runs) -> None:
    """So that the test above cannot pass with a pull that is never made."""
    setting = SETTINGS["decay"]
    steps = runs.answers[2, "decay undisturbed"]["samples"]
    pulled, _ = reference(runs.folder, setting, steps)
    free, _ = reference(runs.folder, setting | {"anchor": {}}, steps)
    assert max(float((pulled[name] - free[name]).detach().abs().max()) for name in pulled) > 1e-4


def test_a_run_resumed_on_the_same_ranks_goes_on_bit_for_bit(runs: Runs) -> None:
    for name in SETTINGS:
        whole, found = runs.answers[2, f"{name} undisturbed"], runs.answers[2, f"{name} from 2"]
        for kind, values in whole["state"].items():
            assert all(torch.equal(found["state"][kind][n], value) for n, value in values.items())
        assert found["drift"] == whole["drift"]


def test_with_every_token_kept_weights_are_those_of_the_frozen_copy(runs: Runs) -> None:
    """Where the start is the model before adapters do anything, too; without β they would be elsewhere."""
    for copied, kept in (("divergence undisturbed", "all kept"), ("adapters, compared", "adapters, all kept")):
        expected, found = runs.answers[2, copied], runs.answers[2, kept]
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        for name, value in expected["state"]["weight"].items():
            # Where a gradient is next to nothing, Adam makes rounding larger: up to a thousandth of a step of 5e-3.
            difference = (found["state"]["weight"][name] - value).abs()
            assert difference.mean() < 1e-7 and difference.max() < 1e-5, name
    steps = runs.answers[2, "all kept"]["samples"]
    plain, _ = reference(runs.folder, SETTINGS["divergence"] | {"anchor": {"decay": 10.0}}, steps)
    found = runs.answers[2, "all kept"]["state"]["weight"]
    assert max(float((plain[name] - found[name]).detach().abs().max()) for name in plain) > 1e-4


def test_what_is_kept_is_made_once_and_does_not_depend_on_ranks(runs: Runs) -> None:
    """By two ranks, and elsewhere by one: the same bits at every target, those of plain transformers turn by turn."""
    first, anew = runs.answers[2, "kept divergence"], runs.answers[1, "kept anew"]
    for answer in (first, anew):
        assert any("computing the 5 likeliest" in line for line in answer["said"])
    for key in ((1, "kept divergence"), (3, "kept divergence"), (2, "kept divergence from 1")):
        assert runs.answers[key]["table"] == first["table"] != anew["table"]
        assert not any("computing" in line for line in runs.answers[key]["said"])
    folders = [Path(answer["table"]) for answer in (first, anew)]
    one, two = (TopTable(f, json.loads((f / "manifest.json").read_text())["identity"]) for f in folders)
    model, tokenizer = oracle.load(runs.folder / "qwen2")
    tail_mass: list[float] = []
    for number, record in enumerate(make_records(24, max_words=6)):
        pairs = oracle.turn_contexts(tokenizer, record["messages"])
        expected = torch.cat([_before_targets(model, *pair) for pair in pairs])
        found, again = (table.rows(number, len(expected)) for table in (one, two))
        assert all(map(np.array_equal, (found.ids, found.logprobs), (again.ids, again.logprobs)))
        kept = _with_the_rest(expected, torch.from_numpy(found.ids.astype(np.int64)))
        assert torch.allclose(torch.from_numpy(found.logprobs.copy()).double(), kept, rtol=0, atol=1e-4)
        assert torch.allclose(kept[:, :5], expected.topk(5).values, rtol=0, atol=1e-5), "the likeliest, in their order"
        tail_mass += kept[:, 5].exp().tolist()
    assert one.num_rows == two.num_rows == len(tail_mass)
    mean = sum(tail_mass) / len(tail_mass)
    assert one.mean_tail_mass == pytest.approx(mean, rel=1e-5) and 0.01 < mean < 0.99
    assert any(f"has {one.mean_tail_mass:.3g} of the mass" in line for line in first["said"])


def test_answers_that_cannot_be_had_are_refused_on_every_rank_and_none_are_left_half_written(runs: Runs) -> None:
    said = runs.answers[2, "refused"]
    (more, _), (full, other_full), (made, _), (other, other_other) = said.values()
    assert more == f"ConfigError: anchor.kl_top_k: 1,000 of {VOCAB:,} tokens that the model's head knows 0"
    assert full.startswith("StorageError: rank 1: data.cache_dir") and full.endswith(" 0") and full == other_full
    assert made == "nothing 1"
    assert other.startswith("StorageError: rank 0:") and "other data than its name says (data); delete" in other
    assert other == other_other


def _before_targets(model: Any, context: list[int], output: list[int]) -> Tensor:
    """float64 [len(output), V]: log-probs of what comes at the places of the output's tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + output]), use_cache=False).logits[0]
    return logits[len(context) - 1 : -1].log_softmax(-1)


def test_offloaded_states_are_pulled_as_others_are(runs: Runs) -> None:
    """Gradients are rounded otherwise there; the first step's way is cut by a third, the drift by a fifth."""
    plain, found, free = (runs.answers[2, name]["drift"] for name in ("bfloat16", "offload all", "not pulled"))
    for kind, share in plain["kinds"].items():
        assert found["kinds"][kind] == pytest.approx(share, rel=0.03)
        assert free["kinds"][kind] > 1.15 * share
    resumed = runs.answers[2, "bfloat16, resumed"]
    assert resumed["drift"] == _drift(resumed["start"], resumed["state"])


def _drift(start: dict[str, Tensor], state: dict[str, dict[str, Tensor]]) -> Any:
    """What a record holds, from whole tensors: places are told by the names of these models."""
    squares: dict[tuple[str, str], list[float]] = {}
    for name, weight in state["weight"].items():
        now = state["master"].get(name, weight).double()
        layer = re.search(r"layers\.(\d)", name)
        kinds = ("embed", "embeddings"), ("norm", "norms"), ("attn", "attention"), ("mlp", "mlp"), ("lm_head", "head")
        kind = next(kind for word, kind in kinds if word in name)
        entry = squares.setdefault(("outside" if layer is None else layer[1], kind), [0.0, 0.0])
        entry[0] += float((now - start[name].double()).square().sum().detach())
        entry[1] += float(start[name].double().square().sum())

    def ratio(keys: Any) -> Any:
        moved, norm = (math.fsum(squares[key][i] for key in keys) for i in (0, 1))
        return pytest.approx(math.sqrt(moved / norm), rel=1e-9)

    return {
        "all": ratio(squares),
        "kinds": {kind: ratio([key for key in squares if key[1] == kind]) for kind in {key[1] for key in squares}},
        "layers": {
            layer: {"all": ratio([key for key in squares if key[0] == layer])}
            | {key[1]: ratio([key]) for key in squares if key[0] == layer}
            for layer in {key[0] for key in squares}
        },
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_drift_is_that_of_whole_tensors_on_any_number_of_ranks_and_after_resume(runs: Runs, name: str) -> None:
    start = dict(
        AutoModelForCausalLM.from_pretrained(
            runs.folder / SETTINGS[name]["family"], dtype=torch.float32
        ).named_parameters()
    )
    keys = [(1, name), (2, name), (3, name), (1, f"{name} from 2"), (2, f"{name} from 1")]
    for key in keys:
        assert runs.answers[key]["drift"] == _drift(start, runs.answers[key]["state"]), key


def test_only_the_decay_keeps_a_copy_in_memory_and_no_wider_than_exact(runs: Runs) -> None:
    assert runs.answers[2, "measured only"]["kept"] == {}
    kept = runs.answers[2, "decay"]["kept"]
    # Norms begin at one, biases at zero: bfloat16 is exact for them.
    assert {torch.bfloat16 if "norm" in name or "bias" in name else torch.float32 for name in kept} == set(
        kept.values()
    )
    assert all((dtype is torch.bfloat16) == ("norm" in name or "bias" in name) for name, dtype in kept.items())
    assert not any("embed" in name for name in kept), "what is frozen needs no copy"
    assert set(runs.answers[2, "bfloat16"]["kept"].values()) == {torch.bfloat16}
    assert set(runs.answers[2, "rounded"]["kept"].values()) == {torch.bfloat16}


def test_rows_of_new_tokens_drift_from_the_mean_they_began_as(runs: Runs) -> None:
    found = runs.answers[2, "new tokens"]
    assert found["drift"] == _drift(found["start"], found["state"])
    assert 0 < found["drift"]["layers"]["outside"]["embeddings"] < 0.1
    # Only what the files do not hold is kept: embeddings and head with other numbers of rows.
    assert set(found["kept"]) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_with_init_from_drift_is_from_the_weights_of_that_checkpoint(runs: Runs) -> None:
    found = runs.answers[2, "from a checkpoint"]
    begun = runs.answers[2, "decay"]["state"]["weight"]
    assert all(torch.equal(found["start"][name], value) for name, value in begun.items())
    assert found["drift"] == _drift(begun, found["state"])
    assert found["kept"] == {}
