"""What the model forgets, over whole runs: measured from step 0 through every restart, and a reason to stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.conftest import Place, make_place
from tests.helpers import oracle
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow

TEXTS = ["the weather in Paris is fine but please tell a joke about dogs and rain " * 30, "rain 日本 🙂"]
CHAT = make_records(6, seed=5, max_words=6)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("keeping")
    place = make_place(folder)
    write_jsonl(folder / "wiki.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(folder / "chat.jsonl", CHAT)
    return place


def sources(place: Place, *names: str) -> str:
    return f"data.retention=[{', '.join(str(place.folder / f'{name}.jsonl') for name in names)}]"


def expected(folder: Path) -> dict[str, float]:
    """NLL per token of both sources by plain transformers in float64, one text or turn at a time."""
    model, tokenizer = oracle.load(folder)
    texts = [{"source": "wiki", "weight": 1.0, "text": text} for text in TEXTS]
    pieces = oracle.pieces(tokenizer, texts, train_on="assistant", max_length=384, truncate=True)
    assert len(pieces) > len(TEXTS), "a text that takes several windows"
    nll_sum, _, _, count = oracle.figures(oracle.Objective(model), pieces)["source"]["wiki"]
    turns = [turn for record in CHAT for turn in oracle.turn_logprobs(model, tokenizer, record["messages"])]
    return {"wiki": nll_sum / count, "chat": -sum(value for _, value in turns) / sum(num for num, _ in turns)}


def records(place: Place, run: str) -> list[dict[str, Any]]:
    lines = (place.folder / run / "metrics.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["kind"] == "retention"]


@pytest.fixture(scope="module")
def tuned(kept: Place) -> tuple[Place, list[str]]:
    """A run `run` in three parts: a retention source comes in the second, another number of ranks in the third."""
    place, said = kept, []
    for names, options, codes in (
        (["wiki"], ["checkpoint.stop_at_step=2"], [75, 75]),
        (["wiki", "chat"], ["checkpoint.stop_at_step=4"], [75, 75]),
        (["wiki", "chat"], [], [0]),
    ):
        done = place.train("run", sources(place, *names), *options, ranks=len(codes))
        assert [process.returncode for process in done] == codes, done[0].stdout
        said.append(done[0].stdout)
    return place, said


def export(place: Place, to: Path, *options: str) -> Path:
    done = place.verb("export", str(place.folder / "run"), "--output", str(to), "--checkpoint", "last", *options)
    assert done.returncode == 0, done.stderr
    return to


def test_what_is_forgotten_is_told_from_step_0_through_restarts_on_other_ranks(
    tuned: tuple[Place, list[str]], uninterrupted: Place, tmp_path: Path
) -> None:
    """A source that comes later is scored with the pre-trained weights first, and no bit of any step changes by it."""
    place, said = tuned
    first = "data.retention: chat: new since the run began; scored with the pre-trained weights first"
    assert [first in part for part in said] == [False, True, False]
    losses = [entry["loss"] for entry in place.steps("run")]
    assert losses[:4] == [entry["loss"] for entry in uninterrupted.steps("whole")][:4]
    before, after = expected(place.folder / "model"), expected(export(place, tmp_path / "m"))
    assert abs(after["wiki"] - before["wiki"]) > 0.01, "six steps change what is measured"
    assert records(place, "run")[0]["source"]["wiki"]["nll"] == pytest.approx(before["wiki"], abs=1e-4)
    found = json.loads((place.folder / "run" / "summary.json").read_text())["retention"]
    for name in ("wiki", "chat"):
        assert found[name]["before"] == pytest.approx(before[name], abs=1e-4)
        assert found[name]["nll"] == pytest.approx(after[name], abs=1e-4)
        assert found[name]["change"] == pytest.approx(after[name] - before[name], abs=2e-4)
    assert [entry["step"] for entry in records(place, "run")] == [0, 2, 4, 6]
    assert "retention wiki" in said[-1] and f"{before['wiki']:.4f}" in said[-1]


def test_an_export_lies_on_the_line_between_the_pre_trained_and_the_tuned_weights(
    tuned: tuple[Place, list[str]], tmp_path: Path
) -> None:
    place, _ = tuned
    base = load_file(place.folder / "model" / "model.safetensors")
    plain = load_file(export(place, tmp_path / "plain") / "model.safetensors")
    ends = {a: load_file(export(place, tmp_path / a, "--interpolate", a) / "model.safetensors") for a in ("0", "1")}
    assert base.keys() == plain.keys() == ends["0"].keys() == ends["1"].keys()
    for name, value in base.items():
        assert value.numpy().tobytes() == ends["0"][name].numpy().tobytes(), name
        assert plain[name].numpy().tobytes() == ends["1"][name].numpy().tobytes(), name
    assert any(not torch.equal(base[name], plain[name]) for name in base)
    between = load_file(export(place, tmp_path / "between", "--interpolate", "0.7") / "model.safetensors")
    for name, value in between.items():
        start, end = base[name].double(), plain[name].double()
        line = start + 0.7 * (end - start)
        assert ((value.double() - line).abs() <= 2e-7 * (start.abs() + end.abs())).all(), name
    record = json.loads((tmp_path / "between" / "sft_dist.json").read_text())
    assert (record["interpolate"], record["step"], record["base"]) == (0.7, 6, str(place.folder / "model"))

    half = export(place, tmp_path / "half", "--interpolate", "0.25", "--dtype", "bfloat16")
    for name, value in load_file(half / "model.safetensors").items():
        line = torch.lerp(base[name].double(), plain[name].double(), 0.25)
        allowed = 2.0**-8 * line.abs() + 2e-7 * (base[name].double().abs() + plain[name].double().abs())
        assert ((value.double() - line).abs() <= allowed).all(), f"{name}: rounded once"

    outside = place.verb("export", str(place.folder / "run"), "--output", str(tmp_path / "x"), "--interpolate", "1.2")
    assert outside.returncode == 2 and "from 0 (the pre-trained weights) to 1" in outside.stderr
    weights, original = place.folder / "model" / "model.safetensors", place.folder / "model" / "original"
    save_file({name: value + 1e-3 for name, value in base.items()}, place.folder / "other", metadata={"format": "pt"})
    weights.rename(original)
    (place.folder / "other").rename(weights)
    try:
        run = str(place.folder / "run")
        refused = place.verb("export", run, "--output", str(tmp_path / "x"), "--interpolate", "0.5")
        assert refused.returncode == 78 and "holds other weights" in refused.stderr, refused.stderr
        assert not (tmp_path / "x").exists()
        assert place.verb("export", run, "--output", str(tmp_path / "y")).returncode == 0
    finally:
        original.rename(weights)


def test_the_trade_off_is_that_of_the_exports_on_any_number_of_ranks(
    tuned: tuple[Place, list[str]], tmp_path: Path
) -> None:
    place, _ = tuned
    options = [f"run_dir={place.folder / 'run'}", sources(place, "wiki", "chat"), "--checkpoint", "last"]
    found = {}
    for size in (1, 2):
        line = ["evaluate", str(place.run_file), *options, "--interpolate", "0,0.5,1"]
        done = run_ranks(size, ["-m", "sft_dist", *line, "--output", str(tmp_path / f"{size}.json")])
        assert [process.returncode for process in done] == [0] * size, done[0].stdout
        points = json.loads((tmp_path / f"{size}.json").read_text())["points"]
        found[size] = {point["coefficient"]: point for point in points}
    assert "retention wiki" in done[0].stdout and "(+0.0000)" in done[0].stdout
    for coefficient in (0.0, 0.5, 1.0):
        exact = expected(export(place, tmp_path / f"{coefficient}", "--interpolate", f"{coefficient}"))
        one, two = found[1][coefficient], found[2][coefficient]
        for name, value in exact.items():
            assert one["retention"][name]["nll"] == pytest.approx(value, abs=1e-4)
            assert two["retention"][name]["nll"] == pytest.approx(one["retention"][name]["nll"], abs=1e-6)
        assert two["heldout"]["all"]["nll"] == pytest.approx(one["heldout"]["all"]["nll"], abs=1e-6)
        assert one["change"]["retention wiki"] == pytest.approx(
            one["retention"]["wiki"]["nll"] - found[1][0.0]["retention"]["wiki"]["nll"]
        )
    summary = json.loads((place.folder / "run" / "summary.json").read_text())
    ends = [found[1][coefficient]["heldout"]["all"]["nll"] for coefficient in (0.0, 1.0)]
    assert ends == pytest.approx([summary["heldout_nll_before"], summary["heldout_nll_after"]], abs=1e-5)

    alone = place.verb("evaluate", str(place.run_file), *options)
    assert alone.returncode == 0, alone.stderr
    (point,) = json.loads((place.folder / "run" / "evaluation.json").read_text())["points"]
    assert point["coefficient"] == 1.0 and point["heldout"] == found[1][1.0]["heldout"]
    for column, change in found[1][1.0]["change"].items():
        assert point["change"][column] == pytest.approx(change, abs=1e-5), "from what the run knew of step 0"


def test_there_must_be_something_to_evaluate(tuned: tuple[Place, list[str]], tmp_path: Path) -> None:
    place, _ = tuned
    for options, code, said in (
        ([f"run_dir={tmp_path}"], 78, "not a run folder"),
        ([f"run_dir={place.folder / 'run'}", "data.heldout=[]"], 78, "both empty"),
        ([f"run_dir={place.folder / 'run'}", "--interpolate", "0,0"], 2, "given twice"),
        ([f"run_dir={place.folder / 'run'}", "--checkpoint", "5"], 78, "no checkpoint of step 5"),
        ([f"run_dir={place.folder / 'run'}", "--output", f"{place.run_file}/x.json"], 74, "x.json: cannot be written"),
    ):
        done = place.verb("evaluate", str(place.run_file), *options)
        assert done.returncode == code and said in done.stderr, done.stderr
        assert "coefficient" not in done.stdout + done.stderr.replace("--interpolate: a coefficient", ""), "computed"


def test_a_run_that_forgets_too_much_ends_and_stays_ended_until_it_may_go_on(
    tuned: tuple[Place, list[str]], tmp_path: Path
) -> None:
    """A model that knows the chat learns letters that are not in it: the task gains, and that counts for nothing."""
    place, _ = tuned
    letters = [{"prompt": "x", "completion": "QZQXJZQKVWQZ" * (number % 5 + 1)} for number in range(80)]
    task = f"data.train={write_jsonl(tmp_path / 'letters.jsonl', letters)}"
    heldout = f"data.heldout={write_jsonl(tmp_path / 'heldout.jsonl', letters[:5])}"
    model = f"model.path={export(place, tmp_path / 'model')}"
    limit = [sources(place, "wiki", "chat"), "evaluate.stop_at_retention_rise=0.02", model, task, heldout]
    done = place.train("limited", *limit)
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    outcome = place.outcome("limited")
    assert (outcome["exit_code"], outcome["step"]) == (0, 2), done[0].stdout
    summary = json.loads((place.folder / "limited" / "summary.json").read_text())
    assert max(values["change"] for values in summary["retention"].values()) > 0.02
    assert summary["heldout_nll_after"] < summary["heldout_nll_before"] and summary["heldout_nll_best"] is None
    assert "stopped early: the NLL of retention source" in outcome["reason"]
    assert outcome["checkpoint"].endswith("step-00000002")
    assert not (place.folder / "limited" / "checkpoints" / "best.json").exists()

    again = place.train("limited", *limit, ranks=1)
    assert again[0].returncode == 0, again[0].stdout
    assert len(place.steps("limited")) == 2 and place.outcome("limited")["reason"] == outcome["reason"]

    limit[1] = "evaluate.stop_at_retention_rise=1000"
    on = place.train("limited", *limit)
    assert [process.returncode for process in on] == [0, 0], on[0].stdout
    assert (place.outcome("limited")["reason"], len(place.steps("limited"))) == ("finished", 6)
