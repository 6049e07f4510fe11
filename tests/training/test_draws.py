"""Random numbers are a function of their place in the run."""

import torch
from fastdistill.training import Draws


def test_the_same_place_gives_the_same_numbers_and_another_place_others():
    a, b = Draws(0, 3, 1, batch_size=4), Draws(0, 3, 1, batch_size=4)
    assert torch.equal(a.randn(2), b.randn(2))
    assert torch.equal(a.randint(0, 1000), b.randint(0, 1000))
    assert not torch.equal(Draws(0, 3, 1, batch_size=4).randn(2), Draws(0, 31, batch_size=4).randn(2))


def test_a_fork_does_not_depend_on_what_was_drawn_before():
    a, b = Draws(0, batch_size=4), Draws(0, batch_size=4)
    a.randn(7)
    assert torch.equal(a.fork("student").rand(), b.fork("student").rand())
    assert not torch.equal(a.fork("student").rand(), a.fork("fake_score").rand())


def test_processes_draw_together_what_one_draws_for_the_whole_batch():
    whole = Draws(5, 6, batch_size=6)
    parts = [Draws(5, 6, batch_size=2, rank=rank, world=3) for rank in range(3)]
    for draw in (
        lambda d: d.randn(2, 3),
        lambda d: d.rand(),
        lambda d: d.randint(0, 100, 4),
        lambda d: d.fork("x").randn(2),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))
    assert {part.shared(0, 10**6) for part in parts} == {whole.shared(0, 10**6)}


def test_numbers_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    Draws(0, batch_size=2).randn(3)
    assert torch.equal(before, torch.get_rng_state())
