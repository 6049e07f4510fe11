"""dmd_gradient and the loss over it on every backend: numbers against float64, dtypes, layouts, guard, frameworks."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill import _native, diffusion
from fastdistill.losses import dmd_loss
from fastdistill.ops import BackendError, dmd_gradient, explain
from fastdistill.ops.dmd_gradient import _backward, _coefficients, _forward, reference, reference_backward
from tests.ops.accuracy import assert_close_to_exact
from tests.ops.backends import (
    COMPILED,
    DTYPES,
    KERNELS,
    in_every_dtype,
    on_every_backend,
    on_every_kernel,
    truncates,
)

NAMES = ("x", "x_t", "pred_real", "pred_fake", "pred_real_uncond")
# One element; odd sizes; a latent that Triton keeps whole and ones that it cuts; a video latent; (B, features).
SHAPES = [(1, 1, 1, 1), (3, 4, 5, 7), (3, 4, 65, 63), (8, 4, 16, 16), (1, 4, 64, 65), (2, 4, 3, 5, 9), (5, 2)]
WIDE = torch.float32


def make(shape, dtype=WIDE, device="cpu", x=None, x_t=None):
    """The op's tensors by name; x and x_t in `dtype` unless told otherwise. alpha and sigma are float32."""
    dtypes = dict.fromkeys(NAMES, dtype) | {"x": x or dtype, "x_t": x_t or dtype}
    tensors = {name: torch.randn(shape).to(device, kind) for name, kind in dtypes.items()}
    t = torch.linspace(20, 980, shape[0]).long()
    alpha, sigma = diffusion.scaled_linear().at(t)
    return tensors | {"alpha": alpha.to(device), "sigma": sigma.to(device)}


def call(function, inputs, **options):
    positional = [inputs[name] for name in ("x", "x_t", "pred_real", "pred_fake", "alpha", "sigma")]
    guided = {"pred_real_uncond": inputs["pred_real_uncond"], "guidance_scale": 3.0}
    return function(*positional, **(guided | options))


def evaluate(inputs, grad_loss=1.0, **options):
    """What comes of a call, by name. `grad_loss` is per element: the gradient of x is of the size of g."""
    inputs = inputs | {"x": inputs["x"].detach().requires_grad_()}
    loss, stats = call(dmd_loss, inputs, return_stats=True, **options)
    seed = torch.full_like(loss, grad_loss * inputs["x"].numel())
    (grad_x,) = torch.autograd.grad(loss, inputs["x"], seed)
    gradient = call(dmd_gradient, inputs, **options)
    return {"loss": loss.detach(), "grad_x": grad_x, "gradient": gradient, **stats._asdict()}


def wide(inputs):
    return {name: t.cpu().double() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}


def check_against_exact(backend, device, inputs, **options):
    ours = evaluate(inputs, 0.7, backend=backend, **options)
    exact = evaluate(wide(inputs), 0.7, backend="reference", **options)
    cpu = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    torchs = evaluate(cpu, 0.7, backend="reference", **options)
    for name in ("loss", "gradient", "grad_abs_mean", "normaliser"):
        assert ours[name].dtype == WIDE
        assert_close_to_exact(ours[name].cpu(), exact[name], torchs[name], WIDE, what=name)
    dtype = inputs["x"].dtype
    assert ours["grad_x"].dtype == dtype
    whole_ulp = truncates(backend, device, dtype)
    assert_close_to_exact(ours["grad_x"].cpu(), exact["grad_x"], torchs["grad_x"], dtype, whole_ulp=whole_ulp)
    assert ours["guarded"].dtype == torch.int64
    assert ours["guarded"].item() == exact["guarded"].item()
    return ours


# ---- numbers --------------------------------------------------------------------------------------------------------


@on_every_backend
@in_every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_loss_gradients_and_statistics_equal_float64(backend, device, shape, dtype):
    check_against_exact(backend, device, make(shape, dtype, device))


@on_every_backend
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_every_prediction_type_with_and_without_guidance(backend, device, prediction_type, guided):
    inputs = make((3, 4, 5, 7), WIDE, device)
    options = {} if guided else {"pred_real_uncond": None, "guidance_scale": 1.0}
    check_against_exact(backend, device, inputs, prediction_type=prediction_type, **options)
    if not guided:  # a scale of one is no guidance, whatever is passed
        unused = call(dmd_gradient, inputs, prediction_type=prediction_type, guidance_scale=1.0, backend=backend)
        assert torch.equal(
            unused, call(dmd_gradient, inputs, prediction_type=prediction_type, backend=backend, **options)
        )


@on_every_kernel
@pytest.mark.parametrize("x", [torch.float32, None], ids=["x float32", "x narrow"])
@pytest.mark.parametrize("x_t", [torch.float32, None], ids=["x_t float32", "x_t narrow"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
def test_x_and_x_t_may_be_float32_beside_narrow_predictions(backend, device, dtype, x_t, x):
    inputs = make((2, 4, 9, 8), dtype, device, x=x, x_t=x_t)
    assert call(lambda *a, **k: explain("dmd_gradient", *a, **k), inputs, backend=backend).backend == backend
    check_against_exact(backend, device, inputs)


@on_every_kernel
def test_alpha_and_sigma_may_be_numbers_scalar_tensors_or_strided(backend, device):
    inputs = make((4, 4, 5, 6), WIDE, device)
    constant = inputs | {"alpha": torch.full((4,), 0.6, device=device), "sigma": torch.full((4,), 0.8, device=device)}
    expected = call(dmd_gradient, constant, backend=backend)
    for alpha, sigma in (
        (0.6, 0.8),
        (torch.tensor(0.6, device=device), torch.tensor(0.8, device=device)),
        (constant["alpha"], 0.8),
        (torch.full((4, 3), 0.6, device=device)[:, 1], torch.tensor(0.8, device=device).expand(4)),
        (constant["alpha"].double(), constant["sigma"].double()),
    ):
        assert torch.equal(call(dmd_gradient, inputs | {"alpha": alpha, "sigma": sigma}, backend=backend), expected)


@on_every_kernel
def test_many_samples_and_long_ones_add_up(backend, device):
    check_against_exact(backend, device, make((40, 7), WIDE, device))
    check_against_exact(backend, device, make((2, 3, 80, 81), torch.bfloat16, device))


# ---- memory ---------------------------------------------------------------------------------------------------------

VIEWS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "half of the channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "every second sample": lambda t: torch.stack([t, t], 1)[:, 0],
    "one element late": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("view", VIEWS)
def test_dense_samples_are_read_in_place_and_keep_their_order(backend, device, view, dtype):
    plain = make((3, 4, 8, 8), dtype, device)
    inputs = {name: VIEWS[view](t) if name in NAMES else t for name, t in plain.items()}
    ours = check_against_exact(backend, device, inputs)
    expected = evaluate(plain, 0.7, backend=backend)
    torch.testing.assert_close(ours["gradient"], expected["gradient"])
    order = (256, *inputs["x"].stride()[1:])
    assert ours["gradient"].stride() == ours["grad_x"].stride() == order


UNREADABLE = {
    "float64": (lambda t: t | {"x": t["x"].double()}, "float64"),
    "two kinds of predictions": (lambda t: t | {"pred_fake": t["pred_fake"].half()}, "predictions of one dtype"),
    "x narrower than the predictions": (lambda t: t | {"x": t["x"].bfloat16()}, "predictions of one dtype"),
    "mixed orders": (lambda t: t | {"x_t": VIEWS["channels last"](t["x_t"])}, "one memory order"),
    "expanded": (lambda t: t | {"pred_real": t["pred_real"][:1].expand(3, 4, 5, 7)}, "one memory order"),
    "cropped": (lambda t: {n: v[..., 1:] if n in NAMES else v for n, v in t.items()}, "one memory order"),
    "a tensor as guidance": (lambda t: t, "guidance_scale"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_no_kernel_reads_is_served_by_the_reference(case):
    change, reason = UNREADABLE[case]
    inputs = change(make((3, 4, 5, 7)))
    scale = torch.full((3,), 3.0) if case == "a tensor as guidance" else 3.0
    explanation = call(lambda *a, **k: explain("dmd_gradient", *a, **k), inputs, guidance_scale=scale)
    assert explanation.backend == "reference"
    assert any(reason in text for text in explanation.reasons["cpu"])
    ours = call(dmd_gradient, inputs, guidance_scale=scale)
    torch.testing.assert_close(ours.double(), call(dmd_gradient, wide(inputs)), rtol=1e-4, atol=1e-4)
    if case != "a tensor as guidance":
        with pytest.raises(BackendError, match="dmd_gradient: backend 'cpu' cannot serve this call: "):
            call(dmd_gradient, inputs, backend="cpu")


@on_every_backend
def test_an_empty_batch_gives_zero(backend, device):
    inputs = make((2, 4, 3, 3), WIDE, device)
    inputs = {name: t[:0] for name, t in inputs.items()}
    ours = evaluate(inputs, backend=backend)
    assert ours["loss"].item() == ours["grad_abs_mean"].item() == ours["guarded"].item() == 0
    assert ours["grad_x"].shape == ours["gradient"].shape == (0, 4, 3, 3)


# ---- the guard ------------------------------------------------------------------------------------------------------


@on_every_backend
@in_every_dtype
def test_a_sample_that_equals_the_teachers_prediction_gets_zero_and_is_counted(backend, device, dtype):
    inputs = make((3, 4, 5, 7), dtype, device)
    inputs["pred_real"][1] = inputs["x"][1]
    inputs["pred_real_uncond"] = None
    ours = evaluate(inputs, backend=backend, prediction_type="sample", guidance_scale=1.0)
    assert ours["loss"].isfinite()
    assert ours["gradient"][1].abs().max() == ours["grad_x"][1].abs().max() == ours["normaliser"][1] == 0
    assert ours["guarded"].item() == 4 * 5 * 7
    others = {name: t[::2] if t is not None else t for name, t in inputs.items()}
    alone = evaluate(others, backend=backend, prediction_type="sample", guidance_scale=1.0)
    torch.testing.assert_close(ours["gradient"][::2], alone["gradient"])
    torch.testing.assert_close(3 * ours["loss"], 2 * alone["loss"])


@on_every_backend
def test_a_sample_is_guarded_below_a_normaliser_of_1e_6_and_not_above(backend, device):
    zeros = torch.zeros(2, 4, 3, 3, device=device)
    real, fake = zeros.clone(), zeros.clone()
    real[0], real[1], fake[0], fake[1] = 5e-7, 2e-6, 1e-6, 3e-6
    gradient, stats = dmd_gradient(
        zeros, zeros, real, fake, 1.0, 0.0, prediction_type="sample", return_stats=True, backend=backend
    )
    assert gradient[0].abs().max() == 0
    torch.testing.assert_close(gradient[1], torch.full_like(gradient[1], 0.5))
    assert stats.guarded.item() == 4 * 3 * 3
    torch.testing.assert_close(stats.normaliser.cpu(), torch.tensor([5e-7, 2e-6]))


@on_every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_zeroed_and_counted_and_spoils_nothing_else(backend, device, bad):
    inputs = make((4, 4, 5, 7), torch.bfloat16, device, x=WIDE)
    clean = call(dmd_gradient, inputs, backend=backend)
    inputs["pred_fake"][0, 1, 2, 3] = bad  # spoils one element
    inputs["pred_real"][2, 0, 0, 0] = bad  # spoils its sample's normaliser
    inputs["x"][3, 3, 4, 6] = bad
    expected = clean.clone()
    expected[0, 1, 2, 3] = 0
    expected[2:] = 0
    ours = evaluate(inputs, backend=backend)
    assert torch.equal(ours["gradient"], expected)
    assert ours["guarded"].item() == 1 + 2 * 4 * 5 * 7
    assert not ours["normaliser"][2:].isfinite().any()
    torch.testing.assert_close(ours["loss"], 0.5 * expected.square().mean())
    torch.testing.assert_close(ours["grad_abs_mean"], expected.abs().mean())
    assert ours["grad_x"].isfinite().all()


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
def test_inputs_whose_squares_overflow_float16_lose_nothing(backend, device, dtype):
    inputs = make((3, 4, 5, 7), dtype, device)
    inputs = {name: (1e4 * t).to(dtype) if name in NAMES else t for name, t in inputs.items()}
    ours = check_against_exact(backend, device, inputs)
    assert ours["guarded"].item() == 0


@on_every_kernel
def test_a_far_outlier_does_not_overflow_a_float16_gradient_before_it_is_scaled(backend, device):
    inputs = make((1, 4, 16, 16), torch.float16, device)
    inputs["pred_real"] = inputs["x"] * 1.001
    ours = evaluate(
        inputs, 1 / 4096, backend=backend, prediction_type="sample", pred_real_uncond=None, guidance_scale=1.0
    )
    assert ours["gradient"].abs().max() > 1000
    torch.testing.assert_close(ours["grad_x"].float(), ours["gradient"] / 4096, rtol=1e-3, atol=1e-7)


@on_every_backend
def test_without_noise_there_is_nothing_to_learn_and_nothing_guarded(backend, device):
    inputs = make((2, 4, 3, 3), WIDE, device) | {"alpha": 1.0, "sigma": 0.0}
    ours = evaluate(inputs, backend=backend)
    assert ours["gradient"].abs().max() == ours["loss"] == ours["guarded"] == 0


def test_epsilon_at_alpha_zero_raises_where_it_can_be_seen_without_waiting():
    inputs = make((3, 4, 5, 7))
    for alpha in (0.0, torch.tensor(0.0), torch.tensor([0.5, 0.0, 0.5])):
        with pytest.raises(ValueError, match='an "epsilon" prediction cannot be converted at alpha = 0'):
            call(dmd_gradient, inputs | {"alpha": alpha})
    ours = evaluate(inputs | {"alpha": torch.tensor([0.5, 0.0, 0.5])}, prediction_type="v_prediction")
    assert ours["guarded"].item() == 0


@pytest.mark.parametrize(("backend", "device"), [b for b in KERNELS if b.id != "cpu"])
def test_a_kernel_guards_a_sample_at_alpha_zero(backend, device):
    """What a CUDA tensor's alpha of 0 comes to: the op itself, which the check on the host does not stand before."""
    inputs = make((3, 4, 5, 7), WIDE, device)
    alpha = torch.tensor([0.5, 0.0, 0.5], device=device)
    _, gradient, normaliser, _, guarded = _forward(backend)(*raw_arguments(inputs | {"alpha": alpha}))
    assert gradient[1].abs().max() == 0
    assert not normaliser[1].isfinite()
    assert guarded.item() == 4 * 5 * 7


# ---- identities -----------------------------------------------------------------------------------------------------


@on_every_backend
def test_value_and_gradient_are_those_of_half_the_mse_to_a_constant(backend, device):
    inputs = make((3, 4, 5, 7), WIDE, device)
    ours = evaluate(inputs, 1 / inputs["x"].numel(), backend=backend)
    x = inputs["x"].double().requires_grad_()
    plain = 0.5 * torch.nn.functional.mse_loss(x, (x - ours["gradient"]).detach())
    (grad_x,) = torch.autograd.grad(plain, x)
    torch.testing.assert_close(ours["loss"].double(), plain.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["grad_x"].double(), grad_x, rtol=1e-6, atol=1e-12)


@on_every_kernel
def test_a_step_of_descent_moves_gaussians_from_the_fake_mean_to_the_real_one(backend, device):
    """Real N(2, s^2), fake N(-1, s^2): both optimal denoisers are known (algorithm's closed form)."""
    real, fake, std = 2.0, -1.0, 0.5
    x = (fake + std * torch.randn(64, 4, 4, 4)).to(device)
    alpha, sigma = (v.to(device) for v in diffusion.scaled_linear().at(torch.linspace(20, 980, 64).long()))
    x_t = diffusion.add_noise(x, torch.randn_like(x), alpha, sigma)
    gain = (alpha * std**2 / (alpha**2 * std**2 + sigma**2)).view(-1, 1, 1, 1)
    mu_real, mu_fake = (m + gain * (x_t - alpha.view(-1, 1, 1, 1) * m) for m in (real, fake))
    gradient = dmd_gradient(x, x_t, mu_real, mu_fake, alpha, sigma, prediction_type="sample", backend=backend)
    assert (gradient < 0).all()
    same = dmd_gradient(x, x_t, mu_fake, mu_fake, alpha, sigma, prediction_type="sample", backend=backend)
    assert same.abs().max() == 0


# ---- derivatives ----------------------------------------------------------------------------------------------------


@on_every_backend
def test_only_x_receives_a_gradient_and_only_once(backend, device):
    inputs = {name: t.requires_grad_() for name, t in make((2, 3, 4, 4), WIDE, device).items()}
    loss, stats = call(dmd_loss, inputs, return_stats=True, backend=backend)
    assert not any(s.requires_grad for s in stats)
    (first,) = torch.autograd.grad(loss, inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()
    call(dmd_loss, inputs, backend=backend).backward()
    assert inputs["x"].grad.abs().sum() > 0
    assert all(t.grad is None for name, t in inputs.items() if name != "x")
    inputs["x"] = inputs["x"].detach()
    assert not call(dmd_loss, inputs, backend=backend).requires_grad
    assert not call(dmd_gradient, inputs, backend=backend).requires_grad


def test_the_reference_passes_gradcheck_against_the_constant_target():
    x, target = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 4).double()

    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x - target)
            return 0.5 * (x - target).square().mean()

        @staticmethod
        def backward(ctx, grad_loss):
            return reference_backward(grad_loss, ctx.saved_tensors[0] / 24, torch.float64)

    assert torch.autograd.gradcheck(Moved.apply, (x,))


@on_every_kernel
def test_the_gradient_alone_is_saved(backend, device):
    inputs = make((2, 4, 8, 8), torch.bfloat16, device)
    inputs["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(dmd_loss, inputs, backend=backend)
    assert [(t.dtype, t.shape) for t in saved] == [(WIDE, inputs["x"].shape)]


@on_every_backend
@in_every_dtype
def test_the_same_call_gives_the_same_bits(backend, device, dtype):
    inputs = make((3, 4, 31, 33), dtype, device)
    first, second = (evaluate(inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = [make((1, 3, 200, 201)), make((7, 4, 64, 64), torch.bfloat16)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([t for each in inputs for t in evaluate(each, backend="cpu").values()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in results[1:] for a, b in zip(results[0], run))


# ---- the frameworks around it ---------------------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def by_hand(x, x_t, pred_real, pred_fake, alpha, sigma, pred_real_uncond, guidance_scale):
    """A plain loop's chain."""
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        guided = pred_real_uncond + guidance_scale * (pred_real - pred_real_uncond)
        p_real, p_fake = x - (x_t - s * guided) / a, x - (x_t - s * pred_fake) / a
        g = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(dim=(1, 2, 3), keepdim=True))
    return 0.5 * torch.nn.functional.mse_loss(x, (x - g).detach())


@on_every_kernel
def test_forward_and_backward_dispatch_one_op_each_where_a_plain_loop_dispatches_more_than_twenty(backend, device):
    inputs = make((2, 4, 8, 8), WIDE, device)
    inputs["x"].requires_grad_()
    call(dmd_loss, inputs, backend=backend)  # loads the library
    seed = torch.full((), 0.5, device=device)
    counts = []
    for function in (lambda: call(dmd_loss, inputs, backend=backend), lambda: call(by_hand, inputs)):
        with Dispatched() as mode:
            torch.autograd.grad(function(), inputs["x"], seed)
        counts.append(mode.ops)
    if os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter copies through torch
        assert counts[0] == [f"fastdistill.dmd_gradient.{backend}", f"fastdistill.dmd_gradient_backward.{backend}"]
    assert len(counts[1]) > 20


def test_on_a_cpu_the_loss_s_own_backward_hands_over_the_gradient_that_is_there():
    inputs = make((2, 4, 8, 8), WIDE, "cpu")
    inputs["x"].requires_grad_()
    loss = call(dmd_loss, inputs, backend="cpu")
    with Dispatched() as mode:
        (first,) = torch.autograd.grad(loss, inputs["x"], retain_graph=True)
    assert not mode.ops or mode.ops == ["aten.ones_like.default"]
    (half,) = torch.autograd.grad(loss / 2, inputs["x"], retain_graph=True)
    torch.testing.assert_close(half, first / 2)
    # What is handed over twice is added to in no place that the other sees.
    again = call(dmd_loss, inputs, backend="cpu")
    (again + again * 1.0).backward()
    torch.testing.assert_close(inputs["x"].grad, 2 * first)
    kept = first.clone()
    inputs["x"].grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(inputs["x"].grad, 2 * kept)
    assert torch.equal(first, kept)


def raw_arguments(inputs, prediction_type="epsilon", scale=1.0):
    return (
        *(inputs[name] for name in NAMES),
        *_coefficients(inputs["alpha"], inputs["sigma"]),
        *diffusion.prediction_terms(prediction_type),
        3.0,
        scale,
    )


@on_every_kernel
@pytest.mark.parametrize("view", ["dense", "channels last", "every second sample"])
def test_raw_ops_pass_opcheck(backend, device, view):
    inputs = make((3, 4, 4, 4), WIDE, device)
    if view != "dense":
        inputs = {name: VIEWS[view](t) if name in NAMES else t for name, t in inputs.items()}
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = raw_arguments(inputs)
    torch.library.opcheck(_forward(backend), arguments, test_utils=tests)
    loss, gradient, *_ = _forward(backend)(*arguments)
    torch.library.opcheck(_backward(backend), (loss, gradient, torch.bfloat16), test_utils=tests)


@on_every_kernel
def test_the_raw_op_returns_what_the_reference_does(backend, device):
    inputs = make((3, 4, 6, 6), WIDE, device)
    loss, gradient, *stats = _forward(backend)(*raw_arguments(inputs, scale=0.25))
    ours = (loss, 4 * gradient, *stats)  # the scale is the gradient's alone
    names = ("x", "x_t", "pred_real", "pred_fake", "alpha", "sigma", "pred_real_uncond")
    for a, b in zip(ours, reference(*(inputs[name] for name in names), 3.0), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), COMPILED)
def test_compiles_into_one_graph_with_dynamic_shapes(backend, device):
    def function(inputs):
        loss, stats = call(dmd_loss, inputs | {"x": inputs["x"] * 1.0}, return_stats=True, backend=backend)
        return loss, stats.normaliser

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 4, 6, 6), (3, 4, 8, 10)):
        inputs = make(shape, torch.bfloat16, device, x=WIDE)
        inputs["x"].requires_grad_()
        (loss, normaliser), (plain, plain_normaliser) = compiled(inputs), function(inputs)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(normaliser, plain_normaliser)
        torch.testing.assert_close(*(torch.autograd.grad(each, inputs["x"])[0] for each in (loss, plain)))


@pytest.mark.parametrize(("backend", "device"), [b for b in COMPILED if b.id in ("cpu", "triton", "cuda")])
def test_the_compiled_forward_and_backward_are_the_kernel_s(backend, device):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    called = []

    def collect(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if "fastdistill" in str(node.target))
        return make_boxed_func(graph)

    inputs = make((2, 4, 4, 4), WIDE, device)
    inputs["x"].requires_grad_()
    compiled = torch.compile(
        lambda inputs: call(dmd_loss, inputs, backend=backend),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=collect),
    )
    compiled(inputs).backward()
    assert called == [f"fastdistill.dmd_gradient.{backend}", f"fastdistill.dmd_gradient_backward.{backend}"]


@on_every_backend
def test_autocast_changes_nothing(backend, device):
    inputs = make((2, 4, 5, 5), torch.bfloat16, device, x=WIDE)
    plain = evaluate(inputs, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = evaluate(inputs, backend=backend)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_is_captured_in_a_cuda_graph_as_it_is_called(backend, prediction_type):
    inputs = make((4, 4, 64, 64), torch.bfloat16, "cuda", x=WIDE)
    inputs["x"].requires_grad_()
    seed = torch.ones((), device="cuda")

    def step():
        loss, stats = call(dmd_loss, inputs, return_stats=True, prediction_type=prediction_type, backend=backend)
        return loss.detach(), *stats, *torch.autograd.grad(loss, inputs["x"], seed)

    step()  # loads the library, or compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for name in NAMES:
        inputs[name].data.copy_(torch.randn_like(inputs[name]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


# ---- which backend serves, and bad input ----------------------------------------------------------------------------


def test_explain_names_the_choice_and_every_reason():
    explanation = call(lambda *a, **k: explain("dmd_gradient", *a, **k), make((3, 4, 5, 7), torch.bfloat16, x=WIDE))
    assert explanation.backend == "cpu"
    assert explanation.reasons["cpu"] == []
    assert explanation.reasons["cuda"] == ["needs a CUDA tensor, got cpu"]


@pytest.mark.parametrize("capability", _native.CPU_CAPABILITIES[:-1])
def test_lower_instruction_sets_pass_the_same_tests(capability):
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": capability}
    selection = "cpu and (65x63 or prediction_type or narrow or not_finite or one_element)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k"]
    run = subprocess.run([*command, f"{selection} and not reference"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input_names_the_argument_the_value_and_the_need(backend):
    inputs = make((3, 4, 5, 7))
    for change, options, error, message in (
        ({"pred_fake": torch.randn(2, 4, 5, 7)}, {}, ValueError, r"pred_fake must have the shape of x, \(3, 4, 5, 7\)"),
        ({"x_t": inputs["x_t"].long()}, {}, ValueError, r"x_t must be floating point; got torch\.int64"),
        ({"pred_real": None}, {}, TypeError, "pred_real must be a tensor; got NoneType"),
        ({"pred_fake": inputs["x"].to("meta")}, {}, ValueError, "pred_fake must be on x's device, cpu; got meta"),
        ({"alpha": torch.ones(2)}, {}, ValueError, r"alpha must be a number or of shape \(3,\).*; got \(2,\)"),
        ({}, {"pred_real_uncond": None}, ValueError, r"guidance_scale 3\.0 needs pred_real_uncond"),
        ({}, {"prediction_type": "eps"}, ValueError, "prediction_type must be one of epsilon, .*; got 'eps'"),
    ):
        for function in (dmd_gradient, dmd_loss):
            with pytest.raises(error, match=message):
                call(function, inputs | change, backend=backend, **options)
    with pytest.raises(BackendError, match="dmd_gradient has no backend 'cudnn'; it has: cuda, triton, cpu, reference"):
        call(dmd_gradient, inputs, backend="cudnn")


def test_the_terms_that_kernels_are_given_are_those_of_the_conversions():
    alpha, sigma = 0.3, 0.7
    data, noise = torch.randn(2, 50, dtype=torch.float64)
    for name in diffusion.PREDICTION_TYPES:
        a, a_sigma, b, b_alpha = diffusion.prediction_terms(name)
        expected = diffusion.training_target(data[None], noise[None], alpha, sigma, name)[0]
        torch.testing.assert_close((a + a_sigma * sigma) * data + (b + b_alpha * alpha) * noise, expected)
