import json
import math

import pytest

from support.errors import refused
from zsseg_rt.errors import ArgumentError
from zsseg_rt.training.config import ScheduleConfig
from zsseg_rt.training.loop.config import cosine, poly


@pytest.mark.needs_shared
def test_the_official_learning_rate(shared_dir):
    golden = json.loads((shared_dir / "golden" / "zs_lr_schedule.json").read_text())
    for max_steps, rates in golden.items():
        for step, rate in rates.items():
            settings = {"max_steps": int(max_steps), "warmup_steps": 1500, "min_factor": 0.005}
            # float64: the factor is rounded before the multiplication, not after
            assert 2e-4 * poly(int(step), **settings) == pytest.approx(rate, rel=1e-14, abs=0)


def test_poly_without_warm_up():
    for step in range(11):
        assert poly(step, max_steps=10) == pytest.approx((1 - step / 10) ** 0.9)
    assert poly(11, max_steps=10) == 0


def test_cosine():
    factors = [cosine(step, max_steps=12, warmup_steps=4, min_factor=0.1) for step in range(14)]
    assert factors[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert factors[4:13] == pytest.approx(expected)
    assert factors[13] == factors[12] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["poly", "cosine", "constant"])
def test_every_schedule_has_a_name_and_stays_within_one(name):
    factors = [ScheduleConfig(name=name).factor(step, 7) for step in range(9)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1
    assert factors[-1] == (1 if name == "constant" else pytest.approx(0))


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 5, "warmup_steps": 5}, "max_steps"),
        ({"max_steps": 5, "min_factor": 1.5}, "min_factor"),
    ],
)
def test_refuses_settings_out_of_range(settings, argument):
    for schedule in (poly, cosine):
        with refused(ArgumentError, argument):
            schedule(0, **settings)


@pytest.mark.parametrize(("name", "setting"), [("cosine", "power"), ("constant", "warmup_steps")])
def test_refuses_a_setting_that_is_not_the_schedules(name, setting):
    with pytest.raises(ArgumentError, match=f"settings of {name}, got others: {setting}"):
        ScheduleConfig(name=name, **{setting: 2}).factor(0, 9)


def test_zeros_of_a_configuration_count():
    warm = ScheduleConfig(name="poly", warmup_steps=4, warmup_start=0.0)
    assert warm.factor(0, 9) == 0
    assert ScheduleConfig(name="poly", power=0.0).factor(5, 9) == 1
