"""Killed twenty times at random instants, a run ends as if nothing had happened: the same bits in every tensor."""

import json
import os
import random
from collections import Counter

import pytest
import torch

from sft_dist.train import goodput
from tests.end_to_end.conftest import make_place
from tests.helpers.chaos import Chaos

pytestmark = pytest.mark.slow

NUM_KILLS = 20
NUM_STEPS = 4 * NUM_KILLS + 4
EVALUATE_EVERY = 2


@pytest.mark.timeout(900)
def test_a_run_killed_twenty_times_ends_with_the_bits_of_the_undisturbed_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    place = make_place(
        tmp_path_factory.mktemp("chaos"),
        schedule={"epochs": 100, "max_steps": NUM_STEPS},
        evaluate={"every": EVALUATE_EVERY},
        checkpoint={"every": 1, "keep": 2},
    )
    done = place.train("whole", "checkpoint.every=0", "checkpoint.keep_best=false")
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    run_dir = place.folder / "killed"
    options = ["--nproc", "2", "--restarts", "1000", "--restart-stopped", "--restart-pause-s", "0.05", "--grace-s", "1"]
    arguments = [str(place.run_file), f"run_dir={run_dir}", *options]
    chaos = Chaos(arguments, run_dir, evaluate_every=EVALUATE_EVERY, rng=random.Random(seed))
    kills = chaos.run(NUM_KILLS)
    print(Counter(kill.phase for kill in kills), Counter(kill.signal for kill in kills))

    expected, found = place.state("whole", NUM_STEPS), place.state("killed", NUM_STEPS)
    assert expected.keys() == found.keys() and len(expected) > 6
    assert all(torch.equal(found[name], value) for name, value in expected.items()), f"seed {seed}"
    # Every step once, whatever was taken twice.
    assert [(e["step"], e["loss"]) for e in place.steps("killed")] == [
        (e["step"], e["loss"]) for e in place.steps("whole")
    ]
    assert not list((run_dir / "checkpoints").glob(".tmp*"))
    assert place.outcome("killed")["exit_code"] == 0

    times = goodput.account(goodput.read(run_dir))
    summary = json.loads((run_dir / "summary.json").read_text())["goodput"]
    print(*times.lines(), sep="\n")
    assert summary["goodput"] == times.goodput and 0 < summary["goodput"] < 1
    assert NUM_KILLS // 3 < summary["starts"] <= NUM_KILLS + 1, "one that dies while Python starts leaves no line"
    assert times.recovery_s is not None and place.outcome("killed")["recovery_s"] == times.recovery_s
