"""The interleaved timer, on a clock that the timed steps themselves advance."""

import gc

import pytest
from fastdistill.bench.timing import WARM_UP_CALLS, PairTimes, Speed, time_pairs


class Clock:
    """Nanoseconds; `step(name, cost)` makes a step that takes `cost` of them and notes its name."""

    def __init__(self):
        self.now = 0
        self.calls = []

    def __call__(self):
        return self.now

    def step(self, name, cost):
        def run():
            self.calls.append(name)
            self.now += cost() if callable(cost) else cost

        return run


@pytest.fixture
def clock():
    return Clock()


def test_the_order_within_a_pair_alternates(clock):
    time_pairs([clock.step("a", 10)], [clock.step("b", 10)], 4, clock=clock, min_sample_ns=1)
    assert "".join(clock.calls[-8:]) == "abbaabba"


def test_warm_up_and_calibration_are_not_timed(clock):
    costs = iter([1000] * (WARM_UP_CALLS + 1) + [10] * 5)
    times = time_pairs([clock.step("a", lambda: next(costs))], [clock.step("b", 30)], 5, clock=clock, min_sample_ns=1)
    assert times == PairTimes((10,) * 5, (30,) * 5)


def test_short_calls_are_repeated_until_the_faster_one_fills_a_sample(clock):
    times = time_pairs([clock.step("a", 10)], [clock.step("b", 40)], 3, clock=clock, min_sample_ns=1000)
    assert times == PairTimes((10,) * 3, (40,) * 3)
    assert clock.calls[-200:] in (["a"] * 100 + ["b"] * 100, ["b"] * 100 + ["a"] * 100)


def test_several_inputs_are_rotated_through(clock):
    ours = [clock.step(f"a{i}", 10) for i in range(3)]
    time_pairs(ours, [clock.step("b", 10)], 6, clock=clock, min_sample_ns=1)
    mine = [name for name in clock.calls if name != "b"]
    assert mine[-6:] in (["a1", "a2", "a0"] * 2, ["a2", "a0", "a1"] * 2, ["a0", "a1", "a2"] * 2)


def test_a_machine_that_slows_down_does_not_change_the_ratio(clock):
    def slowing(cost):
        return lambda: cost * (1 + clock.now / 50_000)

    ours, baseline = [clock.step("a", slowing(100))], [clock.step("b", slowing(300))]
    times = time_pairs(ours, baseline, 40, clock=clock, min_sample_ns=1)
    assert times.ours[-1] > 1.3 * times.ours[0]  # so it does slow down
    assert Speed.of(times).ratio == pytest.approx(3, rel=0.02)


def test_garbage_collection_is_off_while_timing_and_on_again_after_an_error(clock):
    seen = []

    def ours():
        seen.append(gc.isenabled())
        clock.now += 10
        if len(seen) == 10:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        time_pairs([ours], [clock.step("b", 10)], 100, clock=clock, min_sample_ns=1)
    assert seen[0]
    assert not seen[-1]
    assert gc.isenabled()


def test_speed_is_the_distribution_of_the_per_pair_ratio():
    # Ratios 1, 2, 3, 4, 6: not the ratio of the medians, which is 4 / 2.
    speed = Speed.of(PairTimes(ours=(2, 2, 1, 1, 2), baseline=(2, 4, 3, 4, 12)))
    assert (speed.ratio, speed.ratio_low, speed.ratio_high) == pytest.approx((3, 1.8, 4.4))
    assert (speed.ours_us, speed.baseline_us, speed.pairs) == (0.002, 0.004, 5)
