"""When a run stops because its job will be ended."""

import math

from hypothesis import given
from hypothesis import strategies as st

from sft_dist.train.deadline import is_near, job_end_s

SECONDS = st.floats(0, 1e6)


def test_without_a_limit_there_is_no_deadline() -> None:
    for env in ({}, {"SLURM_JOB_END_TIME": ""}, {"SLURM_JOB_END_TIME": "Unknown"}):
        assert job_end_s(env) == math.inf
        assert not is_near(job_end_s(env), now_s=4e9, longest_step_s=1e6, saving_s=1e6, margin_s=1e6)
    assert job_end_s({"SLURM_JOB_END_TIME": "1763736000"}) == 1_763_736_000.0


@given(now_s=SECONDS, longest_step_s=SECONDS, saving_s=SECONDS, margin_s=SECONDS, end_s=st.floats(0, 4e6))
def test_one_more_step_and_its_saving_fit_in_whenever_the_run_goes_on(
    now_s: float, longest_step_s: float, saving_s: float, margin_s: float, end_s: float
) -> None:
    saved_at = now_s + longest_step_s + max(longest_step_s, saving_s)
    if is_near(end_s, now_s=now_s, longest_step_s=longest_step_s, saving_s=saving_s, margin_s=margin_s):
        # No earlier than that: a second later would have been too late.
        assert saved_at + margin_s >= end_s
    else:
        assert saved_at < end_s and end_s - saved_at > margin_s - 1e-3
