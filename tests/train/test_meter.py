"""Phases partition time, work adds up, and operations are those that torch counts."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from sft_dist.data.cost import CostModel, cost_of_model
from sft_dist.model.cost import Peak, find_peak, gpu_of_name, matrix_rate
from sft_dist.train.meter import PHASES, Meter, PhaseClock, Work, shares_line
from sft_dist.train.metrics import step_line
from tests.helpers.flops import of_products
from tests.helpers.models import FAMILIES, build_model

CPU = torch.device("cpu")


def test_phases_partition_the_time_of_a_step() -> None:
    clock = PhaseClock(CPU)
    clock.enter("forward")  # before the first step: nobody's
    started = time.perf_counter()
    clock.begin(4)
    inside = time.perf_counter()
    clock.enter("data")
    time.sleep(0.01)
    clock.enter("forward")
    time.sleep(0.02)
    clock.enter("data")
    time.sleep(0.01)
    least = time.perf_counter() - inside
    clock.begin(5)
    most = time.perf_counter() - started
    clock.end()
    first, second = clock.finished()
    assert (first.step, second.step) == (4, 5)
    assert least <= sum(first.seconds.values()) <= most
    assert first.seconds["data"] >= 0.02 and first.seconds["forward"] >= 0.02
    assert first.seconds["backward"] == 0.0
    assert sum(first.shares.values()) == pytest.approx(1.0)
    assert clock.finished() == []


works = st.builds(
    Work,
    st.integers(1, 10**9),
    st.integers(0, 10**9),
    st.floats(1, 1e18),
    st.floats(1, 1e18),
    st.floats(1e-3, 1e6),
)


@given(st.lists(works, min_size=1, max_size=5), st.floats(1e9, 1e15))
def test_the_speed_of_many_steps_is_the_mean_over_their_time(steps: list[Work], flops_per_s: float) -> None:
    total = sum(steps, Work())
    speed = total.speed(flops_per_s)
    time_of_all = sum(step.seconds for step in steps)
    weights = [step.seconds / time_of_all for step in steps]
    each = [step.speed(flops_per_s) for step in steps]
    assert speed.tokens_per_s == pytest.approx(np.dot(weights, [s.tokens_per_s for s in each]))
    assert speed.mfu == pytest.approx(np.dot(weights, [s.mfu for s in each]))
    assert speed.mfu_palm == pytest.approx(np.dot(weights, [s.mfu_palm for s in each]))


def test_utilisation_by_hand() -> None:
    """Two samples of 3 and 5 tokens, 4 targets, one layer of 7 weights and 2 head dimensions, width 2, 10 words."""
    cost = CostModel(linear_per_token=6 * 7, attention_per_pair=12 * 2, head_per_target=6 * 2 * 10)
    meter = Meter(PhaseClock(CPU), cost, flops_per_s=1e4, row_length=16)
    speed = meter.add(np.array([3, 5]), 4, 0.5)
    exact = 6 * 7 * 8 + 6 * 2 * 10 * 4 + 6 * 2 * (3 * 4 + 5 * 6)
    palm = 6 * (7 + 20) * 8 + 12 * 2 * 16 * 8
    assert speed.tokens_per_s == 16 and speed.target_tokens_per_s == 8
    assert speed.mfu == pytest.approx(exact / 0.5 / 1e4)
    assert speed.mfu_palm == pytest.approx(palm / 0.5 / 1e4)
    assert meter.speed() == speed


def test_a_model_of_unknown_cost_has_no_utilisation_but_a_speed() -> None:
    meter = Meter(PhaseClock(CPU), None, flops_per_s=1e4, row_length=16)
    speed = meter.add(np.array([3, 5]), 4, 0.5)
    assert (speed.tokens_per_s, speed.mfu, speed.mfu_palm) == (16, None, None)
    line = step_line(
        step=1, num_steps=10, loss=1.0, nll=None, grad_norm=1.0, learning_rate=1e-5, speed=speed, memory_gib=1, eta_s=9
    )
    assert "mfu -  " in line and "tokens/s 16 " in line


def torch_flops(model: Any, length: int) -> int:
    """What torch counts for forward and backward of one sample."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None] % 50, use_cache=False).logits.sum().backward()
    return of_products(counter)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_operations_are_those_that_torch_counts(tmp_path: Path, family: str) -> None:
    """eager attention computes the whole square, l² instead of l (l + 1) / 2 pairs; the first layer's input needs its
    gradient, as embeddings are trained. Every position is a target here.
    """
    length = 23
    model = AutoModelForCausalLM.from_pretrained(build_model(tmp_path, family))
    cost = cost_of_model(model.config.to_dict())
    ours = cost.flops(np.array([length]), length)
    pairs = length * (length + 1) / 2
    assert torch_flops(model, length) == ours + cost.attention_per_pair * (length**2 - pairs)


def test_hardware_operations_are_model_operations_and_what_is_recomputed() -> None:
    cost = CostModel(linear_per_token=6_000, attention_per_pair=96, head_per_target=1_200)
    lengths = np.array([10, 30])
    pairs = (10 * 11 + 30 * 31) / 2
    model = cost.flops(lengths, 12)
    assert cost.with_recomputation("none").flops(lengths, 12) == model + 96 / 6 * pairs
    assert cost.with_recomputation("full").flops(lengths, 12) == model + 2 * 1_000 * 40 + 3 * 96 / 6 * pairs


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("h100", 989e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H2000", None),
    ],
)
def test_peaks_are_found_by_whole_names(name: str, peak: float | None) -> None:
    gpu = gpu_of_name(name)
    assert (None if gpu is None else gpu.flops_per_s) == peak


def test_a_cpu_is_measured_and_called_so() -> None:
    peak = find_peak(CPU, torch.float32)
    assert isinstance(peak, Peak) and "measured matrix rate" in peak.name
    assert 1e8 < peak.flops_per_s < 1e14
    assert matrix_rate(CPU, torch.bfloat16) > 1e6


def test_shares_are_said_of_phases_that_took_time() -> None:
    assert shares_line(dict.fromkeys(PHASES, 0.0) | {"data": 0.25, "forward": 0.75}) == "data 25.0%, forward 75.0%"
