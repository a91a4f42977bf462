"""What a DeepSpeed file may say about 16-bit states, and what it may not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.config import DataConfig, ModelConfig, RunConfig
from sft_dist.errors import ConfigError
from sft_dist.model import engine as engines

STATES = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def resolved(tmp_path: Path, section: dict[str, Any], dtype: str) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": section}))
    model = ModelConfig.model_validate({"path": "unused", "dtype": dtype})
    config = RunConfig(run_dir="unused", model=model, data=DataConfig(), deepspeed=str(path))
    return engines.resolve_deepspeed_config(config)


def test_states_of_16_bits_are_the_deepspeed_files_to_choose(tmp_path: Path) -> None:
    assert resolved(tmp_path, STATES, "bfloat16")["bf16"] == {"enabled": True} | STATES
    assert resolved(tmp_path, {}, "float32")["bf16"] == {"enabled": False}


def test_states_of_16_bits_need_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"need model\.dtype: bfloat16, which is float32"):
        resolved(tmp_path, STATES, "float32")


def test_whether_bf16_is_on_stays_the_run_files_to_choose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bf16\.enabled is decided by model\.dtype"):
        resolved(tmp_path, {"enabled": False}, "bfloat16")


def test_the_shipped_16_bit_file_is_accepted() -> None:
    model = ModelConfig(path="unused", dtype="bfloat16")
    tree = engines.resolve_deepspeed_config(RunConfig(run_dir="unused", model=model, deepspeed="zero3_16bit"))
    assert tree["bf16"] == {"enabled": True} | STATES
    assert engines.compute_dtype(model) is torch.bfloat16
