"""What a resumed run must share with the checkpoint it continues."""

from pathlib import Path
from typing import Any

import pytest

from sft_dist.errors import ConfigError
from sft_dist.train import contract
from sft_dist.train.checkpoint import Checkpoint


def facts(dtype: str) -> dict[str, Any]:
    """Of a run whose file says model.dtype: auto, on a machine where that is `dtype`."""
    return {"config": {"model.dtype": "auto"}, "dtype": dtype, "mixture": [[1.0, 1.0]], "data": "d", "model": "m"}


def test_auto_that_means_another_dtype_is_another_run() -> None:
    written = Checkpoint(Path("step-00000001"), facts("bfloat16"))
    contract.check(written, facts("bfloat16"), allow_changed=())
    named = r"model\.dtype \(resolved\): 'bfloat16' in the checkpoint, 'float32' now"
    with pytest.raises(ConfigError, match=named):
        contract.check(written, facts("float32"), allow_changed=())
    contract.check(written, facts("float32"), allow_changed=("model.dtype",))
