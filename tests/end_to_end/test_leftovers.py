"""What a killed process leaves behind stops nobody: locks of compilers, half-written exports."""

import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from tests.end_to_end.conftest import Place
from tests.helpers.worlds import ROOT, free_port, rank_environment

pytestmark = pytest.mark.slow


def test_a_lock_that_a_killed_compiler_left_and_a_killed_export(place: Place) -> None:
    extensions = place.folder / "torch_extensions"
    (extensions / "deepspeed_shm_comm").mkdir(parents=True)
    (extensions / "deepspeed_shm_comm" / "lock").touch()
    run_dir, output = place.folder / "leftovers", place.folder / "leftovers-export"
    env = rank_environment(0, 1, free_port()) | {"TORCH_EXTENSIONS_DIR": str(extensions)}
    train = ["train", str(place.run_file), f"run_dir={run_dir}", "schedule.max_steps=1", "evaluate.every=0"]
    trained = _verb(train, env)
    assert trained.returncode == 0, trained.stderr

    export = ["export", str(run_dir), "--output", str(output)]
    alone = {key: value for key, value in env.items() if key not in ("RANK", "WORLD_SIZE")}
    killed = _verb(export, alone | {"SFT_DIST_FAULTS": "export.before_rename:SIGKILL"})
    assert killed.returncode == -9 and not output.exists(), killed.stderr
    again = _verb(export, alone)
    assert again.returncode == 0, again.stderr
    AutoModelForCausalLM.from_pretrained(output)


def _verb(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sft_dist", *arguments]
    return subprocess.run(command, env=os.environ | env, cwd=ROOT, capture_output=True, text=True, timeout=120)
