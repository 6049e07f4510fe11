"""adamw and gradient_norm on every backend: a step against float64, skipping, repeats, registration."""

import math
import os
import subprocess
import sys

import pytest
import torch

from fastdistill import _native
from fastdistill.ops import BackendError, eight_bit, explain, gradient_norm
from fastdistill.ops.adamw import Batch, Factors, _number, adamw_
from tests.ops.adamw_batches import check_step, clone, random_batch
from tests.ops.backends import in_every_dtype

BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
on_every_kernel = pytest.mark.parametrize(("backend", "device"), [b for b in BACKENDS if b.id != "reference"])
FACTORS = Factors(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, ema_decay=0.99)


def scalar(value, device, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=device)


def bits_of(t):
    return t.reshape(-1).view(torch.uint8)


def arguments(batch, norm, factors=FACTORS, skipped=None):
    """Of the registered op."""
    (lr, lr_tensor), (decay, decay_tensor) = _number(factors.lr), _number(factors.ema_decay)
    return (
        *vars(batch).values(),
        *(skipped, norm, None, None, lr_tensor, decay_tensor, lr, *factors.betas, factors.eps),
        *(factors.weight_decay, factors.max_grad_norm, decay, factors.maximize),
    )


# ---- adamw ----------------------------------------------------------------------------------------------------------


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_step_equals_float64(backend, device, dtype, bits, offset):
    before = random_batch(dtype, bits, offset=offset, device=device)
    after = clone(before)
    adamw_(after, scalar(2.0, device), FACTORS, backend=backend)
    check_step(before, after, 2.0, FACTORS, bits)


@on_every_backend
def test_numbers_may_lie_on_the_device(backend, device):
    before = random_batch(device=device)
    after = clone(before)
    numbers = Factors(scalar(1e-2, device), weight_decay=0.1, max_grad_norm=0.5, ema_decay=scalar(0.5, device))
    adamw_(after, scalar(2.0, device), numbers, backend=backend)
    check_step(before, after, 2.0, Factors(scalar(1e-2, "cpu").item(), (0.9, 0.999), 1e-8, 0.1, 0.5, 0.5))


@on_every_backend
def test_scaled_gradients_are_unscaled_before_they_are_clipped(backend, device):
    before, scale = random_batch(ema=False, device=device), 1024.0
    after = clone(before)
    after.grads = [g * scale for g in after.grads]
    factors = Factors(lr=1e-2, max_grad_norm=0.5, maximize=True)
    adamw_(after, scalar(2.0 * scale, device), factors, grad_scale=scalar(scale, device), backend=backend)
    check_step(before, after, 2.0, factors)


@on_every_backend
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("norm", "found_inf"), [(math.inf, None), (math.nan, None), (1.0, 1.0)])
def test_a_bad_norm_changes_nothing_and_is_counted(backend, device, bits, norm, found_inf):
    before, skipped = random_batch(bits=bits, device=device, step=0), scalar(4, device, torch.int64)
    before.grads[3][5] = math.nan
    after = clone(before)
    found_inf = None if found_inf is None else scalar(found_inf, device)
    adamw_(after, scalar(norm, device), FACTORS, skipped=skipped, found_inf=found_inf, backend=backend)
    for name, tensors in vars(before).items():
        for ours, theirs in zip(vars(after)[name], tensors):
            assert torch.equal(bits_of(ours), bits_of(theirs)), name
    assert skipped == 5


@on_every_kernel
@pytest.mark.parametrize("bits", [32, 8])
def test_the_same_bits_every_time_and_whatever_the_threads_do(backend, device, bits):
    before = random_batch(torch.bfloat16, bits, device=device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            after = clone(before)
            norm = gradient_norm(after.grads, backend=backend)
            adamw_(after, norm, FACTORS, backend=backend)
            results.append([norm, *(t for name in vars(after) for t in getattr(after, name))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(results[0], other))


@on_every_kernel
@pytest.mark.parametrize("bits", [32, 8])
def test_the_registered_ops_keep_their_promises(backend, device, bits):
    batch = random_batch(torch.bfloat16, bits, sizes=[3, 300], device=device)
    op = getattr(torch.ops.fastdistill.adamw, backend)
    for skipped in (None, scalar(0, device, torch.int64)):
        torch.library.opcheck(op, arguments(batch, scalar(2.0, device), skipped=skipped))
    torch.library.opcheck(getattr(torch.ops.fastdistill.gradient_norm, backend), (batch.grads,))


@pytest.mark.parametrize("capability", _native.CPU_CAPABILITIES[:-1])
def test_lower_instruction_sets_pass_the_same_tests(capability):
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    selection = ["-k", "cpu and equals_float64 and not reference"]
    run = subprocess.run([*command, *selection], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_a_backward_pass_that_needs_the_old_values_is_refused():
    p = torch.nn.Parameter(torch.randn(5))
    y = (p * p).sum()
    state = [torch.zeros(5), torch.zeros(5), torch.tensor(0.0)]
    with torch.no_grad():
        adamw_(Batch([p], [torch.ones(5)], *([t] for t in state)), torch.tensor(1.0), FACTORS, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


def test_every_code_decodes_and_encodes_to_itself():
    one = torch.ones(1)
    for second in (False, True):
        codes = torch.arange(256, dtype=torch.uint8)
        codes = codes[codes != 128] if not second else codes  # 128 is -0
        values = eight_bit.decode(codes, one, second=second)
        again, scales = eight_bit.encode(values, 7, second=second)
        assert torch.equal(again, codes)
        assert scales == 1.0
        assert values.unique().numel() == codes.numel()


def test_a_change_too_small_for_a_spacing_is_not_lost():
    # To nearest, 1.0 -> 1.0 - 1/1000 would stay 1.0 for ever.
    codes, scales = eight_bit.encode(
        torch.full((256 * 64,), 0.5).index_fill(0, torch.arange(0, 256 * 64, 256), 1.0), 0, second=True
    )
    for step in range(1, 301):
        values = eight_bit.decode(codes, scales, second=True)
        values = torch.where(values < 0.9, values * 0.999, values)
        codes, scales = eight_bit.encode(values, step, second=True)
    values = eight_bit.decode(codes, scales, second=True)
    assert abs(values[values < 0.9].mean() / (0.5 * 0.999**300) - 1) < 0.02


# ---- gradient_norm --------------------------------------------------------------------------------------------------


@on_every_backend
def test_the_norm_of_every_size_and_dtype_equals_float64(backend, device):
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    grads = [torch.randn(n).to(device, dtype) for dtype in dtypes for n in (1, 7, 0, 8, 31, 4097, 16384, 65543)]
    exact = torch.cat([g.double() for g in grads]).norm()
    norm = gradient_norm(grads, backend=backend)
    assert norm.dtype == torch.float32
    assert (norm.double() / exact - 1).abs() < 1e-6


@on_every_backend
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_shows(backend, device, bad):
    grads = [torch.randn(300, device=device), torch.randn(70000, device=device)]
    grads[1][66000] = bad
    assert not gradient_norm(grads, backend=backend).isfinite()


def test_gradients_with_gaps_or_of_float64_go_to_the_reference():
    spread, wide = [torch.randn(6, 8)[:, ::2]], [torch.randn(3, dtype=torch.float64)]
    for grads, reason in ((spread, r"grads\[0\] has strides \(8, 2\)"), (wide, "float64")):
        assert explain("gradient_norm", grads).backend == "reference"
        torch.testing.assert_close(gradient_norm(grads), grads[0].norm())
        with pytest.raises(BackendError, match=reason):
            gradient_norm(grads, backend="cpu")


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([], ValueError, "grads: expected at least one tensor"),
        (torch.ones(2), TypeError, "grads: expected a list of tensors, got Tensor"),
        ([torch.ones(2), 3.0], TypeError, r"grads\[1\]: expected a tensor, got float"),
        ([torch.ones(2).to_sparse()], TypeError, r"grads\[0\]: expected a dense tensor, got layout torch.sparse_coo"),
        ([torch.ones(2, dtype=torch.complex64)], TypeError, r"grads\[0\]: expected float32, .* got torch.complex64"),
        ([torch.ones(2), torch.ones(2, device="meta")], ValueError, r"grads\[1\]: all must lie on one device"),
    ],
)
def test_bad_gradients_are_named(grads, error, message):
    with pytest.raises(error, match=message):
        gradient_norm(grads)
