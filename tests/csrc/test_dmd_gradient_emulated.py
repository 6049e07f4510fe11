"""The CUDA kernels of dmd_gradient, run on the host by the emulator, against float64.

tests/ops/test_dmd_gradient.py covers the op on every backend, where there is a GPU.
"""

import pytest
import torch

from fastdistill import diffusion
from fastdistill.ops.dmd_gradient import _coefficients, reference
from tests.csrc.emulator import Device
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import DTYPES, in_every_dtype

pytestmark = pytest.mark.compiler

LARGE = Device()
# 4 multiprocessors keep 49152 elements in at most 4 samples: larger calls take three launches.
SMALL = Device(multiprocessors=4)
RESULTS = ("loss", "gradient", "normaliser", "grad_abs_mean", "guarded")


def samples(shape, dtype, offset=0, gap=0):
    """Random samples in memory that is NaN everywhere else."""
    count, elements = shape[0], torch.Size(shape[1:]).numel()
    memory = torch.full((count * (elements + gap) + offset,), float("nan"), dtype=dtype)
    flat = memory.as_strided((count, elements), (elements + gap, 1), offset).copy_(torch.randn(count, elements))
    return flat.unflatten(1, shape[1:])


def make(shape, dtype=torch.float32, x=None, x_t=None, **memory):
    kinds = (x or dtype, x_t or dtype, dtype, dtype, dtype)
    tensors = [samples(shape, kind, **memory) for kind in kinds]
    alpha, sigma = diffusion.scaled_linear().at(torch.linspace(20, 980, shape[0]).long())
    return (*tensors, alpha, sigma)


def run(emulator, inputs, device=LARGE, prediction_type="epsilon", seed=0):
    """The op's results and the gradient of x; what is allocated is full of NaN before."""
    x, x_t, real, fake, uncond, alpha, sigma = inputs
    arguments = (*_coefficients(alpha, sigma), *diffusion.prediction_terms(prediction_type), 3.0, 0.25)
    with emulator.on(device, seed):
        results = torch.ops.fastdistill.dmd_gradient.cuda(x, x_t, real, fake, uncond, *arguments)
        # The gradient comes multiplied by a scale, 1/4 here.
        grad_x = torch.ops.fastdistill.dmd_gradient_backward.cuda(torch.tensor(4 * 0.7), results[1], x.dtype)
    return dict(zip(RESULTS, results), gradient=4 * results[1], grad_x=grad_x)


def check(emulator, inputs, device=LARGE, prediction_type="epsilon"):
    ours = run(emulator, inputs, device, prediction_type)
    x, x_t, real, fake, uncond, alpha, sigma = inputs
    options = (uncond, 1.0 if uncond is None else 3.0, prediction_type)
    wide = [None if t is None else t.double() for t in (x, real if x_t is None else x_t, real, fake, alpha, sigma)]
    narrow = (x, real if x_t is None else x_t, real, fake, alpha, sigma)
    exact = dict(zip(RESULTS, reference(*wide, None if uncond is None else uncond.double(), *options[1:])))
    torchs = dict(zip(RESULTS, reference(*narrow, *options)))
    for name in RESULTS[:-1]:
        assert_close_to_exact(ours[name], exact[name], torchs[name], torch.float32, what=name)
    assert ours["guarded"].item() == exact["guarded"].item()
    assert_close_to_exact(
        ours["grad_x"], 0.7 * exact["gradient"], (0.7 * torchs["gradient"]).to(x.dtype), x.dtype, what="grad_x"
    )
    return ours


# One element, odd sizes, a vector per thread, several vectors per thread, more samples than blocks at once.
SHAPES = [(1, 1), (3, 4, 5, 7), (2, 4, 65, 63), (3, 4, 32, 32), (2, 3, 100, 96), (9, 24), (1, 4, 3, 16, 100)]


@in_every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_samples_of_every_size_equal_float64(emulator, shape, dtype):
    check(emulator, make(shape, dtype), SMALL)


def test_one_launch_where_the_differences_fit_and_three_elsewhere(emulator):
    def launched(shape, device):
        emulator.launches()
        check(emulator, make(shape), device)
        return [line.split(",")[0].split(" ")[0] for line in emulator.launches()[:-1]]

    assert launched((4, 4, 32, 32), SMALL) == ["cooperative"]
    assert launched((2, 4, 64, 80), SMALL) == ["cooperative"]
    assert launched((5, 24), SMALL) == ["plain"] * 3  # more samples than blocks at once
    assert launched((2, 3, 120, 128), SMALL) == ["plain"] * 3  # 92160 elements
    assert launched((2, 3, 120, 128), LARGE) == ["cooperative"]
    for cooperative in (0, 2):  # a device without, and one that has no room for the grid
        assert launched((4, 4, 32, 32), Device(multiprocessors=4, cooperative=cooperative)) == ["plain"] * 3


@pytest.mark.parametrize("device", [SMALL, Device(multiprocessors=4, cooperative=0)], ids=["one launch", "three"])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_every_prediction_type_with_and_without_guidance(emulator, prediction_type, guided, device):
    x, x_t, real, fake, uncond, *coefficients = make((3, 4, 6, 8), torch.bfloat16, x=torch.float32)
    inputs = (x, None if prediction_type == "sample" else x_t, real, fake, uncond if guided else None, *coefficients)
    check(emulator, inputs, device, prediction_type)


@pytest.mark.parametrize("device", [SMALL, Device(multiprocessors=4, cooperative=0)], ids=["one launch", "three"])
@pytest.mark.parametrize("x", [torch.float32, None], ids=["x float32", "x narrow"])
@pytest.mark.parametrize("x_t", [torch.float32, None], ids=["x_t float32", "x_t narrow"])
def test_x_and_x_t_may_be_float32_beside_narrow_predictions(emulator, x_t, x, device):
    for dtype in DTYPES[1:]:
        check(emulator, make((2, 4, 9, 8), dtype, x, x_t), device)


@in_every_dtype
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 5), (8, 8), (0, 16)])
def test_samples_in_larger_memory_are_read_in_place(emulator, offset, gap, dtype):
    check(emulator, make((3, 4, 9, 8), dtype, offset=offset, gap=gap), SMALL)


@pytest.mark.parametrize("device", [SMALL, Device(multiprocessors=4, cooperative=0)], ids=["one launch", "three"])
def test_the_guard_zeroes_and_counts_what_is_not_finite(emulator, device):
    x, _, real, fake, _, alpha, sigma = make((4, 4, 8, 9))
    fake[0, 1, 2, 3] = float("inf")
    real[2, 0, 0, 0] = float("nan")
    real[3] = x[3] = 0.0
    real[3] += 5e-7  # a normaliser below 1e-6, but not 0
    ours = run(emulator, (x, None, real, fake, None, alpha, sigma), device, "sample")
    assert ours["guarded"].item() == 1 + 2 * 4 * 8 * 9
    assert ours["gradient"].isfinite().all()
    assert ours["gradient"][2:].abs().max() == ours["gradient"][0, 1, 2, 3] == 0
    assert 0 < ours["normaliser"][3] < 1e-6
    clean = reference(x, x, real, fake, 1.0, 0.0, None, 1.0, "sample")
    torch.testing.assert_close(ours["loss"], clean[0])
    torch.testing.assert_close(ours["gradient"], clean[1])


def test_alpha_of_zero_is_guarded_and_numbers_and_scalars_are_read(emulator):
    *tensors, _, sigma = make((3, 4, 5, 8))
    ours = run(emulator, (*tensors, torch.tensor([0.5, 0.0, 0.5]), sigma))
    assert ours["guarded"].item() == 4 * 5 * 8
    expected = run(emulator, (*tensors, torch.full((3,), 0.6), torch.full((3,), 0.8)))["gradient"]
    assert torch.equal(run(emulator, (*tensors, 0.6, torch.tensor(0.8)))["gradient"], expected)


def test_the_order_in_which_threads_run_changes_nothing(emulator):
    inputs = make((3, 4, 40, 48), torch.bfloat16)
    for device in (SMALL, Device(multiprocessors=4, cooperative=0)):
        first, second = run(emulator, inputs, device), run(emulator, inputs, device, seed=7)
        assert all(torch.equal(first[name], second[name]) for name in first)
