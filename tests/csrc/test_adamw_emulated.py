"""The CUDA kernels of adamw, run on the host by the emulator, against float64."""

import math

import pytest
import torch

from fastdistill.ops.adamw import Factors
from tests.csrc.emulator import Device
from tests.ops.adamw_batches import check_step, clone, random_batch
from tests.ops.backends import in_every_dtype

pytestmark = pytest.mark.compiler
SIZES = [1, 31, 256, 2001, 16385]  # less than a warp, a tile, several, a chunk and one more
FACTORS = Factors(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, ema_decay=0.99)


@pytest.fixture
def step(emulator):
    def step(batch, norm, factors=FACTORS, skipped=None, grad_scale=None, found_inf=None, seed=0):
        with emulator.on(Device(), seed):
            torch.ops.fastdistill.adamw.cuda(
                batch.params,
                batch.grads,
                batch.exp_avgs,
                batch.exp_avg_sqs,
                batch.steps,
                batch.masters,
                batch.emas,
                batch.scales,
                skipped,
                torch.tensor(norm),
                grad_scale,
                found_inf,
                None,
                None,
                factors.lr,
                *factors.betas,
                factors.eps,
                factors.weight_decay,
                factors.max_grad_norm,
                factors.ema_decay,
                factors.maximize,
            )
        return batch

    return step


@in_every_dtype
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_step_equals_float64(step, dtype, bits, offset):
    before = random_batch(dtype, bits, sizes=SIZES, offset=offset)
    check_step(before, step(clone(before), 2.0), 2.0, FACTORS, bits)


def test_nothing_beside_the_tensors_is_written(step):
    batch = random_batch(sizes=SIZES, offset=3)
    around = [(t, t._base.clone()) for name in vars(batch) for t in getattr(batch, name)]
    step(batch, 2.0)
    for t, before in around:
        after = t._base.clone()
        after.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(
            before.as_strided(t.shape, t.stride(), t.storage_offset())
        )
        assert torch.equal(after.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("count", [50, 51, 130])
def test_more_tensors_than_a_launch_takes_and_empty_ones_among_them(step, count):
    sizes = [0 if i % 7 == 3 else 1 + i % 5 for i in range(count)]
    before = random_batch(sizes=sizes)
    for i, t in enumerate(before.steps):
        t.fill_(i % 4)
    after = step(clone(before), 2.0)
    whole = [i for i, n in enumerate(sizes) if n]
    for b in (before, after):
        for name in vars(b):
            tensors = getattr(b, name)
            setattr(b, name, [tensors[i] for i in whole] if tensors else [])
    check_step(before, after, 2.0, FACTORS)


@pytest.mark.parametrize("bad", [{"norm": math.inf}, {"norm": math.nan}, {"norm": 1.0, "found_inf": torch.tensor(1.0)}])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_bad_norm_changes_nothing_and_is_counted(step, bad, bits):
    before, skipped = random_batch(bits=bits, sizes=SIZES), torch.tensor(4)
    after = step(clone(before), skipped=skipped, **bad)
    for name in vars(before):
        assert all(torch.equal(a, b) for a, b in zip(getattr(before, name), getattr(after, name)))
    assert skipped == 5


def test_scaled_gradients_are_unscaled_before_they_are_clipped(step):
    before, scale = random_batch(ema=False, sizes=SIZES), 1024.0
    scaled = clone(before)
    scaled.grads = [g * scale for g in scaled.grads]
    factors = Factors(lr=1e-2, max_grad_norm=0.5, maximize=True)
    after = step(scaled, 2.0 * scale, factors, skipped=torch.tensor(0), grad_scale=torch.tensor(scale))
    check_step(before, after, 2.0, factors)
