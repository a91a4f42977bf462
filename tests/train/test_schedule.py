import pytest

from sft_dist.config import OptimizerConfig, ScheduleConfig
from sft_dist.train.schedule import learning_rate

PEAK = OptimizerConfig(learning_rate=2.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warmup_rises_to_the_peak_and_the_shape_ends_where_it_should(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup_fraction=0.1, final_fraction=0.25)  # type: ignore[arg-type]
    rates = [learning_rate(step, 100, PEAK, schedule) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and 0 < rates[0] < rates[9] < 2.0
    assert rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    end = {"constant": 2.0}.get(name, 0.5)
    assert learning_rate(100, 100, PEAK, schedule) == pytest.approx(end)


def test_shapes_at_half_way() -> None:
    for name, expected in (("cosine", 1.25), ("linear", 1.25), ("constant", 2.0)):
        schedule = ScheduleConfig(name=name, warmup_fraction=0.0, final_fraction=0.25)  # type: ignore[arg-type]
        assert learning_rate(50, 100, PEAK, schedule) == pytest.approx(expected)
    quarter = ScheduleConfig(name="cosine", warmup_fraction=0.0, final_fraction=0.0)
    assert learning_rate(25, 100, PEAK, quarter) == pytest.approx(1.7071067811865475)
