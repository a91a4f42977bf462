"""The same ranks take the same steps bit for bit: from a checkpoint of any step, and whatever was done in between.

Every rank's master weights, moments, steps and weights are compared, padding included. Each resume is one engine and
one step, which by induction covers all: the step after every checkpoint gives the state of the next one.
"""

from pathlib import Path
from typing import Any

import pytest

from sft_dist.model.zero import safe_load
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

# Dropout in all of them.
VARIANTS: dict[str, dict[str, Any]] = {
    "three epochs, noise, steps balanced over windows": {
        "epochs": 3,
        "neftune_alpha": 5.0,
        "balance_steps": 2,
        "global_packs": 3,
        "reduce_once": False,
    },
    "gradient reduced once, bfloat16": {"epochs": 2, "reduce_once": True, "dtype": "bfloat16", "global_packs": 5},
    "optimizer and weights offloaded": {
        "epochs": 2,
        "dtype": "bfloat16",
        "deepspeed": "zero3_offload_all",
        "global_packs": 5,
    },
    "states of 16 bits": {"epochs": 1, "dtype": "bfloat16", "deepspeed": "zero3_16bit", "global_packs": 5},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("exact")
    build_model(folder / "model", "gpt2", dropout=0.1)
    write_jsonl(folder / "data.jsonl", make_records(40, max_words=6))
    common = {"case": "exact", "model": str(folder / "model"), "data": str(folder / "data.jsonl")}
    cases = [common | variant | {"name": number} for number, variant in enumerate(VARIANTS.values())]
    return dict(zip(VARIANTS, run_world(2, cases, folder / "w", module="tests.helpers.resume_cases"), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_after_every_checkpoint_has_the_same_bits(answers: dict[str, Any], variant: str) -> None:
    found = answers[variant]
    assert found["differing"] == [[], []]
    assert found["num_micro_batches"] > 1, "with accumulation"
    assert found["num_steps"] > found["steps_per_epoch"] or VARIANTS[variant]["epochs"] == 1
    assert found["steps_per_epoch"] > 1, "also in the middle of an epoch"
    assert len(set(found["losses"])) == found["num_steps"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_an_evaluation_nor_a_checkpoint_disturbs_what_follows(answers: dict[str, Any], variant: str) -> None:
    assert answers[variant]["undisturbed"] == [True, True]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_engine_that_has_trained_goes_back_to_a_checkpoint(answers: dict[str, Any], variant: str) -> None:
    assert answers[variant]["rewound"] == [True, True]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_files_hold_no_random_state(answers: dict[str, Any], variant: str) -> None:
    """What is drawn follows from (seed, step, micro-step, rank); a stored state would tie files to their ranks."""
    files = sorted((Path(answers[variant]["folder"]) / "shards").glob("*.pt"))
    assert len(files) == 4
    for path in files:
        assert not any("rng" in key or "random" in key for key, value in safe_load(path).items() if value is not None)
