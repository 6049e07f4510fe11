"""DMD's gradient: from the fake score's data prediction to the teacher's, over each sample's distance to the teacher's.

Yin et al., "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828, equations 7 and 8, and the
loss that has this gradient. Guidance, conversion to data, normaliser, guard, gradient, loss and statistics are one op;
the gradient of the loss is a second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill import diffusion
from fastdistill.ops import _dispatch, _kernels
from fastdistill.ops._layout import samples_in_step

NORMALISER_BOUND = 1e-6  # below it x equals the teacher's prediction: nothing to divide by, and nothing to learn


class DMDStats(NamedTuple):
    """What a training log needs, as tensors on the inputs' device (reading them is the caller's choice to wait).

    Attributes:
        grad_abs_mean: () mean of |gradient| over all elements, after the guard.
        normaliser: (B,) mean of |x - mu_real| per sample, before the guard.
        guarded: () int64, elements whose gradient was set to zero by the guard.
    """

    grad_abs_mean: Tensor
    normaliser: Tensor
    guarded: Tensor


def dmd_gradient(
    x: Tensor,
    x_t: Tensor,
    pred_real: Tensor,
    pred_fake: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    pred_real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    prediction_type: str = "epsilon",
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, DMDStats]:
    """`g = (mu_fake - mu_real) / mean|x - mu_real|`, the mean taken over each sample; `dmd_loss` in `losses` uses it.

    This is the paper's gradient with its weight (equation 8) put in and the remaining factor alpha dropped, as all
    public code does. A sample whose normaliser is below 1e-6 or not finite, and any element that is not finite, gets 0
    and is counted. One launch on "cuda" and "cpu".

    Args:
        x: (B, ...) the student's sample of the data, floating point, any number of further dimensions.
        x_t: (B, ...) x noised, `alpha * x + sigma * noise`, as both networks saw it.
        pred_real, pred_fake: (B, ...) raw outputs of the teacher (with the condition) and of the fake score at x_t.
        alpha, sigma: float, () or (B,), of the timestep of each sample. Tensors are read in float32; one of another
            dtype is converted first, in a launch of its own.
        pred_real_uncond: (B, ...) the teacher's raw output without the condition, needed for `guidance_scale != 1`.
        guidance_scale: raw w of `uncond + w * (cond - uncond)`, teacher only; the fake score is never guided.
        prediction_type: of both networks, one of `fastdistill.diffusion.PREDICTION_TYPES`.
        return_stats: also return a `DMDStats`.
        backend: "cuda", "triton", "cpu" or "reference"; None lets `fastdistill.ops.explain` 's first choice serve.
            Kernels read predictions of one dtype (float32, float16, bfloat16), x and x_t each in that dtype or in
            float32, as autocast leaves them, whose samples are dense and in one memory order, any distance apart.
            Everything else goes to the reference.

    Returns:
        (B, ...) float32 (float64 for float64 inputs) without a graph,
        samples in x's memory order; or (gradient, stats).

    Raises:
        ValueError, TypeError: before anything is launched: shapes or devices that differ, an unknown prediction type,
            guidance without `pred_real_uncond`, or epsilon at alpha = 0. That last check reads alpha on the host, so it
            is made for floats and CPU tensors. A CUDA tensor would have to be waited for: there a sample at alpha = 0
            has no finite normaliser, its gradient is 0 and it is counted as guarded.
        BackendError: the backend asked for does not exist or cannot serve the call; the message says why.
    """
    options = {
        "pred_real_uncond": pred_real_uncond,
        "guidance_scale": guidance_scale,
        "prediction_type": prediction_type,
    }
    inputs = (x, x_t, pred_real, pred_fake, alpha, sigma)
    _check(*inputs, **options)
    chosen = _dispatch.select(OP, backend, *inputs, **options)
    with torch.no_grad():
        _, gradient, *stats = _run(chosen, *inputs, **options)
    return (gradient, _stats(*stats)) if return_stats else gradient


def half_square(
    x: Tensor,
    x_t: Tensor,
    pred_real: Tensor,
    pred_fake: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    pred_real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    prediction_type: str = "epsilon",
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, DMDStats]:
    """What `fastdistill.losses.dmd_loss` returns, and its arguments."""
    _check(x, x_t, pred_real, pred_fake, alpha, sigma, pred_real_uncond, guidance_scale, prediction_type)
    inputs = (x, x_t, pred_real, pred_fake, alpha, sigma, pred_real_uncond, guidance_scale, prediction_type)
    chosen = _dispatch.select(OP, backend, *inputs)
    if torch.is_grad_enabled() and x.requires_grad:
        if not return_stats:
            return _HalfSquare.apply(chosen, False, *inputs)  # every result that is not made here saves a microsecond
        loss, *stats = _HalfSquare.apply(chosen, True, *inputs)
    else:
        with torch.no_grad():
            loss, _, *stats = _run(chosen, *inputs)
    return (loss, _stats(*stats)) if return_stats else loss


def reference(
    x: Tensor,
    x_t: Tensor,
    pred_real: Tensor,
    pred_fake: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    pred_real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    prediction_type: str = "epsilon",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradient, normaliser, grad_abs_mean, guarded) in plain PyTorch: fallback, oracle of the tests.

    float32, or float64 if any input is.
    """
    tensors = [t for t in (x, x_t, pred_real, pred_fake, pred_real_uncond) if t is not None]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    x, x_t, pred_real, pred_fake = (t.to(dtype) for t in (x, x_t, pred_real, pred_fake))
    if pred_real_uncond is not None:
        pred_real = diffusion.guide(pred_real_uncond.to(dtype), pred_real, guidance_scale)
    mu_real = diffusion.to_data(pred_real, x_t, alpha, sigma, prediction_type)
    mu_fake = diffusion.to_data(pred_fake, x_t, alpha, sigma, prediction_type)

    # The paper's p_real - p_fake = (x - mu_real) - (x - mu_fake), without the rounding of the two x that cancel.
    per_sample = (x.shape[0], *(1,) * (x.ndim - 1))
    normaliser = (x - mu_real).abs().flatten(1).mean(dim=1)
    gradient = (mu_fake - mu_real) / normaliser.clamp(min=NORMALISER_BOUND).reshape(per_sample)
    usable = ((normaliser >= NORMALISER_BOUND) & normaliser.isfinite()).reshape(per_sample) & gradient.isfinite()
    gradient = torch.where(usable, gradient, 0.0)
    numel = max(gradient.numel(), 1)
    loss = 0.5 * gradient.square().sum() / numel
    return loss, gradient, normaliser, gradient.abs().sum() / numel, (~usable).sum()


def reference_backward(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """dL/dx in x's dtype from dL/dloss and dloss/dx in plain PyTorch."""
    return (grad_loss * gradient).to(dtype)


def _run(
    chosen: str,
    x: Tensor,
    x_t: Tensor,
    pred_real: Tensor,
    pred_fake: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    pred_real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    prediction_type: str = "epsilon",
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `reference` returns, the gradient multiplied with `scale`."""
    if chosen == _dispatch.REFERENCE or x.numel() == 0:
        loss, gradient, *stats = reference(
            x, x_t, pred_real, pred_fake, alpha, sigma, pred_real_uncond, guidance_scale, prediction_type
        )
        return loss, gradient * scale, *stats
    if prediction_type == "sample":
        x_t, alpha, sigma = None, 1.0, 0.0  # not needed, and so not read
    return _forward(chosen)(
        x,
        x_t,
        pred_real,
        pred_fake,
        None if guidance_scale == 1 else pred_real_uncond,
        *_coefficients(alpha, sigma),
        *diffusion.prediction_terms(prediction_type),
        guidance_scale,
        scale,
    )


def _coefficients(alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor | None, Tensor | None, float, float]:
    (of_alpha, alpha), (of_sigma, sigma) = _tensor_or_number(alpha), _tensor_or_number(sigma)
    return of_alpha, of_sigma, alpha, sigma


def _tensor_or_number(value: Tensor | float) -> tuple[Tensor | None, float]:
    if not isinstance(value, Tensor):
        return None, float(value)
    return (value if value.dtype == torch.float32 else value.to(torch.float32)), 0.0


def _stats(normaliser: Tensor, grad_abs_mean: Tensor, guarded: Tensor) -> DMDStats:
    return DMDStats(grad_abs_mean, normaliser, guarded)


def _check(
    x,
    x_t,
    pred_real,
    pred_fake,
    alpha,
    sigma,
    pred_real_uncond=None,
    guidance_scale=1.0,
    prediction_type="epsilon",
) -> None:
    _check_tensor("x", x, x)
    others = {"x_t": x_t, "pred_real": pred_real, "pred_fake": pred_fake}
    if pred_real_uncond is not None:
        others["pred_real_uncond"] = pred_real_uncond
    elif guidance_scale != 1:
        raise ValueError(f"guidance_scale {guidance_scale} needs pred_real_uncond, the teacher without the condition")
    for name, value in others.items():
        _check_tensor(name, value, x)
    if x.ndim < 2:
        raise ValueError(f"x must be (B, ...) with at least one dimension per sample; got {tuple(x.shape)}")
    diffusion.check_to_data(x_t, alpha, sigma, prediction_type)


def _check_tensor(name: str, value, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {value.dtype}")
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}; got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device, {x.device}; got {value.device}")


def _kernel_reasons(
    x: Tensor,
    x_t: Tensor,
    pred_real: Tensor,
    pred_fake: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    pred_real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    prediction_type: str = "epsilon",
) -> list[str]:
    """What no kernel serves, whoever wrote it."""
    predictions = (pred_real, pred_fake) if pred_real_uncond is None else (pred_real, pred_fake, pred_real_uncond)
    tensors, dtype, reasons = (x, x_t, *predictions), pred_real.dtype, []
    # The usual call first, without making sets: a small latent is computed in the time of a few Python statements.
    if dtype not in _SERVED or any(t.dtype is not dtype for t in tensors):
        reasons += _dtype_reasons(x, x_t, predictions)
    if not all(t.is_contiguous() for t in tensors) and not samples_in_step(*tensors):
        strides = ", ".join(str(tuple(t.stride())) for t in tensors)
        reasons.append(f"strides {strides}: needs dense samples in one memory order, not overlapping")
    if isinstance(guidance_scale, Tensor):
        reasons.append("guidance_scale: a tensor is read by the reference alone")
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if isinstance(value, Tensor) and value.device != x.device:
            reasons.append(f"{name}: is on {value.device}, x on {x.device}")
    return reasons


_SERVED = set(_kernels.DTYPES)


def _dtype_reasons(x: Tensor, x_t: Tensor, predictions: tuple[Tensor, ...]) -> list[str]:
    dtype, found = predictions[0].dtype, {t.dtype for t in (x, x_t, *predictions)}
    if torch.float64 in found:
        return ["float64 is served by the reference alone"]
    of_one = all(t.dtype == dtype for t in predictions) and all(t.dtype in (dtype, torch.float32) for t in (x, x_t))
    if found <= _SERVED and of_one:
        return []
    names = ", ".join(sorted(str(t)[6:] for t in found))
    return [
        f"needs predictions of one dtype (float32, float16 or bfloat16), and x and x_t in it or in float32; got {names}"
    ]


# ---- the registered ops: one overload per backend -------------------------------------------------------------------

# x_t: None where the predictions are of the data. alpha, sigma: float32, () or (B,); None where the number is meant.
# a … b_alpha: `fastdistill.diffusion.prediction_terms`. scale: of the gradient that is returned, which no sum contains.
_FORWARD = (
    "(Tensor x, Tensor? x_t, Tensor pred_real, Tensor pred_fake, Tensor? pred_real_uncond, Tensor? alpha, "
    "Tensor? sigma, float alpha_value, float sigma_value, float a, float a_sigma, float b, float b_alpha, "
    "float guidance_scale, float scale) "
    "-> (Tensor loss, Tensor gradient, Tensor normaliser, Tensor grad_abs_mean, Tensor guarded)"
)
_BACKWARD = "(Tensor grad_loss, Tensor gradient, ScalarType dtype) -> Tensor"


def _forward_fake(x, *_):
    strides = (x.numel() // x.shape[0], *x.stride()[1:])
    gradient = torch.empty_strided(x.shape, strides, dtype=torch.float32, device=x.device)
    per_sample, scalar, other = (gradient.new_empty(shape) for shape in (x.shape[:1], (), ()))
    return scalar, gradient, per_sample, other, gradient.new_empty((), dtype=torch.int64)


def _backward_fake(grad_loss, gradient, dtype):
    return torch.empty_strided(gradient.shape, gradient.stride(), dtype=dtype, device=gradient.device)


def _triton_forward(*arguments):
    from fastdistill.kernels import dmd_gradient as kernel

    return kernel.dmd_gradient(*arguments)


def _triton_backward(grad_loss, gradient, dtype):
    from fastdistill.kernels import dmd_gradient as kernel

    return kernel.dmd_gradient_backward(grad_loss, gradient, dtype)


_kernels.define("dmd_gradient", _FORWARD, _forward_fake, _triton_forward)
_kernels.define("dmd_gradient_backward", _BACKWARD, _backward_fake, _triton_backward)


def _forward(backend: str):
    return getattr(torch.ops.fastdistill.dmd_gradient, backend)


def _backward(backend: str):
    return getattr(torch.ops.fastdistill.dmd_gradient_backward, backend)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _HalfSquare(torch.autograd.Function):
    """Value `0.5 * mean(g^2)`, gradient in x `g / numel`: half the squared distance from x to the constant x - g.

    g / numel is kept in float32 whatever x is: of a latent it underflows in float16, and g itself can overflow there.
    """

    @staticmethod
    def forward(ctx, chosen, return_stats, x, *inputs):
        loss, gradient, *stats = _run(chosen, x, *inputs, scale=1 / max(x.numel(), 1))
        ctx.save_for_backward(gradient)
        ctx.backend = _dispatch.REFERENCE if x.numel() == 0 else chosen
        ctx.dtype = x.dtype
        if not return_stats:
            return loss
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        others = (None,) * 8
        if grad_loss is None:
            return None, None, None, *others
        (gradient,) = ctx.saved_tensors
        if _is_one(grad_loss) and gradient.dtype == ctx.dtype:
            return None, None, gradient, *others
        backward = reference_backward if ctx.backend == _dispatch.REFERENCE else _backward(ctx.backend)
        return None, None, backward(grad_loss, gradient, ctx.dtype), *others


def _is_one(grad_loss: Tensor) -> bool:
    """Whether it can be read without waiting and is 1, as it is where `backward()` is called of the loss itself."""
    if type(grad_loss) is not Tensor or grad_loss.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return grad_loss.tolist() == 1  # without a dispatch


OP = _dispatch.register(_dispatch.Op("dmd_gradient", _check, _kernels.backends(_kernel_reasons)))
