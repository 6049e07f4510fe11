"""Schedules, prediction types, guidance and timesteps: the only place that knows signs and conventions.

Everything here rests on one equation and one table. A noisy sample is

    x_t = alpha * data + sigma * noise

and a network predicts some other combination `a * data + b * noise`, with (a, b) from `prediction_coefficients`. Two
linear equations in the unknowns (data, noise): whatever is asked for follows by Cramer's rule, on any path (variance
preserving, flow, or neither).

Sources: epsilon DDPM arXiv 2006.11239 · v 2202.00512 · DDIM step 2010.02502 · zero-terminal SNR 2305.08891 ·
straight path 2209.03003, 2309.06380 · classifier-free guidance 2207.12598.

Conventions, everywhere in the package:

- `data` and `noise` name the ends of the path; never x0/x1, which two literatures use for opposite ends.
- alpha and sigma are Python floats or tensors of shape () or (B,), one per sample, and broadcast over the batch.
- Arithmetic is float32, or float64 when a sample or a prediction is; the result has the promoted dtype of the inputs.
- `guidance_scale` is the raw w of `uncond + w * (cond - uncond)`: 1 is no guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction", "instaflow")
FLOW_CONVENTIONS = ("instaflow", "sd3")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def check_prediction_type(prediction_type: str) -> str:
    """Return `prediction_type` if it is one of `PREDICTION_TYPES`, else raise a ValueError that lists them."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}")
    return prediction_type


def prediction_coefficients(
    prediction_type: str, alpha: Tensor | float, sigma: Tensor | float
) -> tuple[Tensor | float, Tensor | float]:
    """(a, b) such that the network's output is `a * data + b * noise`: floats, or shaped as alpha and sigma.

    Raises:
        ValueError: unknown type.
    """
    if check_prediction_type(prediction_type) == "v_prediction":
        return -sigma, alpha  # diffusers: get_velocity
    return _CONSTANT_COEFFICIENTS[prediction_type]


_CONSTANT_COEFFICIENTS = {
    "epsilon": (0.0, 1.0),
    "sample": (1.0, 0.0),
    "flow_prediction": (-1.0, 1.0),  # SD3, FLUX: noise - data
    "instaflow": (1.0, -1.0),  # InstaFlow, rectified flow: data - noise, its time runs towards data
}


def check_flow_convention(convention: str) -> str:
    """Return `convention` if it is one of `FLOW_CONVENTIONS`, else raise a ValueError that lists them."""
    if convention not in FLOW_CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(FLOW_CONVENTIONS)}; got {convention!r}")
    return convention


def flow_ends(data: Tensor, noise: Tensor, convention: str) -> tuple[Tensor, Tensor]:
    """(start, end) of the straight path, at t = 0 and t = 1, in either direction of time.

    On it `x_t = start + t * (end - start)`, and the velocity, which is what the network predicts, is `end - start`:
    "instaflow" runs from noise to data (arXiv 2209.03003, 2309.06380), "sd3" from data to noise (2403.03206).
    """
    return (noise, data) if check_flow_convention(convention) == "instaflow" else (data, noise)


def noise_time(convention: str) -> float:
    """The t at which a flow is pure noise: 0 for "instaflow", 1 for "sd3"."""
    return 0.0 if check_flow_convention(convention) == "instaflow" else 1.0


def snr_weight(
    alpha: Tensor, sigma: Tensor, prediction_type: str = "epsilon", *, gamma: float | None = None
) -> Tensor | float:
    """What a prediction's squared error is multiplied with so that it counts as `SNR * ||error of the data||^2`.

    SNR is alpha^2 / sigma^2, cut off at `gamma` where given: Min-SNR (arXiv 2303.09556). Since the data implied by a
    prediction is off by sigma / d times the prediction's error, the weight is `min(alpha^2, gamma * sigma^2) / d^2`
    with d = alpha for "epsilon", sigma for "sample", alpha^2 + sigma^2 for "v_prediction" and alpha + sigma for the
    flows. So with gamma it is min(SNR, gamma) / SNR, min(SNR, gamma), min(SNR, gamma) / (SNR + 1) (variance
    preserving) and min(SNR, gamma) / (sqrt(SNR) + 1)^2; without it 1, SNR, SNR / (SNR + 1) and
    SNR / (sqrt(SNR) + 1)^2.

    Args:
        alpha, sigma: () or (B,), not negative.
        gamma: positive, or None for the plain SNR.

    Returns:
        As alpha and sigma broadcast, finite everywhere but for "sample" without gamma at sigma = 0: infinite there. The
        float 1 for "epsilon" without gamma.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        # Not divided by alpha^2 at last, which can be 0: the weight is 1 there.
        return 1.0 if gamma is None else (sigma * gamma**0.5 / alpha).clamp(max=1.0).square()
    if prediction_type == "sample":
        root = alpha / sigma
        return (root if gamma is None else root.clamp(max=gamma**0.5)).square()
    least = alpha if gamma is None else torch.minimum(alpha, sigma * gamma**0.5)
    divisor = torch.hypot(alpha, sigma).square() if prediction_type == "v_prediction" else alpha + sigma
    return (least / divisor).square()


def _terms(prediction_type: str) -> tuple[float, float, float, float]:
    (a, b), (with_sigma, _), (_, with_alpha) = (
        prediction_coefficients(prediction_type, alpha, sigma) for alpha, sigma in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0))
    )
    return a, with_sigma - a, b, with_alpha - b


_EPSILON_AT_ZERO = ('an "epsilon" prediction', "Schedule.at(t, original=True) gives the usual way out")
_TERMS = {name: _terms(name) for name in PREDICTION_TYPES}


def prediction_terms(prediction_type: str) -> tuple[float, float, float, float]:
    """(a, a_sigma, b, b_alpha): an output is `(a + a_sigma * sigma) * data + (b + b_alpha * alpha) * noise`.

    The table of prediction types as plain numbers, for code that cannot call this module: kernels.
    """
    return _TERMS[check_prediction_type(prediction_type)]


def check_to_data(x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, prediction_type: str) -> None:
    """Raise what `to_data` raises for predictions at x_t, without computing anything."""
    check_prediction_type(prediction_type)
    if prediction_type == "sample":
        return
    _check_coefficient("alpha", alpha, x_t)
    _check_coefficient("sigma", sigma, x_t)
    if prediction_type == "epsilon":
        _refuse_zero("alpha", alpha, *_EPSILON_AT_ZERO)


def convert(
    pred: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, source: str, target: str
) -> Tensor:
    """Turn a network output of type `source` at `x_t` into what a network of type `target` would have said.

    Args:
        pred: (B, ...) network output, floating point.
        x_t: (B, ...) the noisy sample the network saw, same shape.
        alpha, sigma: float, () or (B,), with `x_t = alpha * data + sigma * noise`.
        source, target: names from `PREDICTION_TYPES`.

    Returns:
        (B, ...) in the promoted dtype of `pred` and `x_t`. `source == target` returns `pred` itself.

    Raises:
        ValueError: unknown type, shapes that do not match, or a map that does not exist: "epsilon" at alpha = 0 says
            nothing about the data (see `Schedule.at(t, original=True)`), "sample" at sigma = 0 nothing about the
            noise. The last check reads alpha and sigma, so it is made on CPU tensors and floats only: on a GPU it
            would wait for the device, and the result is infinite or NaN instead.
    """
    check_prediction_type(source)
    check_prediction_type(target)
    _check_pair("pred", pred, "x_t", x_t)
    if source == target:
        return pred
    if source == "epsilon":
        _refuse_zero("alpha", alpha, *_EPSILON_AT_ZERO)
    elif source == "sample":
        _refuse_zero("sigma", sigma, 'a "sample" prediction', "there x_t contains no noise")
    dtype = _compute_dtype(pred, x_t)
    alpha, sigma = _per_sample("alpha", alpha, x_t, dtype), _per_sample("sigma", sigma, x_t, dtype)
    a, b = prediction_coefficients(source, alpha, sigma)
    c, d = prediction_coefficients(target, alpha, sigma)
    determinant = alpha * b - sigma * a
    from_x_t = (c * b - d * a) / determinant
    from_pred = (d * alpha - c * sigma) / determinant
    return (from_x_t * x_t.to(dtype) + from_pred * pred.to(dtype)).to(torch.promote_types(pred.dtype, x_t.dtype))


def to_data(
    pred: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, prediction_type: str = "epsilon"
) -> Tensor:
    """The clean sample (mu, "x0") that a prediction implies. Arguments, dtypes and errors as in `convert`."""
    return convert(pred, x_t, alpha, sigma, prediction_type, "sample")


def to_noise(
    pred: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, prediction_type: str = "epsilon"
) -> Tensor:
    """The noise (eps) that a prediction implies. Arguments, dtypes and errors as in `convert`."""
    return convert(pred, x_t, alpha, sigma, prediction_type, "epsilon")


def to_score(
    pred: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, prediction_type: str = "epsilon"
) -> Tensor:
    """The score, the gradient of log p(x_t): `-noise / sigma`. As in `convert`; sigma = 0 raises (no density there)."""
    _refuse_zero("sigma", sigma, "a prediction", "without noise there is no density to take the score of")
    noise = to_noise(pred, x_t, alpha, sigma, prediction_type)
    dtype = _compute_dtype(noise)
    sigma = _per_sample("sigma", sigma, x_t, dtype)
    return (-noise.to(dtype) / sigma).to(noise.dtype)


def training_target(
    data: Tensor, noise: Tensor, alpha: Tensor | float, sigma: Tensor | float, prediction_type: str = "epsilon"
) -> Tensor:
    """What a network of this type should answer for `add_noise(data, noise, alpha, sigma)`, in the same dtype."""
    check_prediction_type(prediction_type)
    _check_pair("data", data, "noise", noise)
    dtype = _compute_dtype(data, noise)
    alpha, sigma = _per_sample("alpha", alpha, data, dtype), _per_sample("sigma", sigma, data, dtype)
    a, b = prediction_coefficients(prediction_type, alpha, sigma)
    return (a * data.to(dtype) + b * noise.to(dtype)).to(torch.promote_types(data.dtype, noise.dtype))


def guide(pred_uncond: Tensor, pred_cond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance `uncond + w * (cond - uncond)`, w a float or (B,).

    Every conversion of this module is affine in the prediction, so guiding raw outputs and guiding x0 is the same.
    Some public code writes `cond + w' * (cond - uncond)`: its w' is this w - 1. w = 1 returns `pred_cond` exactly.
    """
    _check_pair("pred_uncond", pred_uncond, "pred_cond", pred_cond)
    if isinstance(guidance_scale, (int, float)) and guidance_scale == 1:
        return pred_cond
    dtype = _compute_dtype(pred_uncond, pred_cond)
    w = _per_sample("guidance_scale", guidance_scale, pred_cond, dtype)
    uncond, cond = pred_uncond.to(dtype), pred_cond.to(dtype)
    return (uncond + w * (cond - uncond)).to(torch.promote_types(pred_uncond.dtype, pred_cond.dtype))


def add_noise(data: Tensor, noise: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """`alpha * data + sigma * noise`: (B, ...), promoted dtype of data and noise. alpha, sigma: float, () or (B,)."""
    _check_pair("data", data, "noise", noise)
    dtype = _compute_dtype(data, noise)
    alpha, sigma = _per_sample("alpha", alpha, data, dtype), _per_sample("sigma", sigma, data, dtype)
    return (alpha * data.to(dtype) + sigma * noise.to(dtype)).to(torch.promote_types(data.dtype, noise.dtype))


def ddim_step(
    pred: Tensor,
    x_t: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    next_alpha: Tensor | float,
    next_sigma: Tensor | float,
    prediction_type: str = "epsilon",
) -> Tensor:
    """One deterministic DDIM step (eta = 0) from (alpha, sigma) to (next_alpha, next_sigma); shapes as in `convert`.

    On the straight path this is the Euler step of the flow.
    """
    data = to_data(pred, x_t, alpha, sigma, prediction_type)
    noise = to_noise(pred, x_t, alpha, sigma, prediction_type)
    return add_noise(data, noise, next_alpha, next_sigma)


def to_straight_path(x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
    """Carry a sample of any path to the straight one: `x_tau = (1 - tau) * data + tau * noise`.

    Returns:
        x_tau (B, ...) in x_t's dtype and tau = sigma / (alpha + sigma), (B,) in float32 (float64 for float64 x_t).
        Its velocity noise - data is `convert(pred, x_t, alpha, sigma, type, "flow_prediction")`, from the ORIGINAL x_t.
    """
    _check_sample("x_t", x_t)
    dtype = _compute_dtype(x_t)
    alpha, sigma = _per_sample("alpha", alpha, x_t, dtype), _per_sample("sigma", sigma, x_t, dtype)
    tau = (sigma / (alpha + sigma)).flatten().expand(x_t.shape[0])
    return (x_t.to(dtype) / (alpha + sigma)).to(x_t.dtype), tau


@dataclass(frozen=True, eq=False)
class Schedule:
    """alpha and sigma at every training timestep, and what the network is told there.

    Make one with `scaled_linear`, `flow` or `from_scheduler`.

    Attributes:
        alpha, sigma: (T,) coefficients of data and noise, index 0 the cleanest; float32 unless made otherwise.
        timesteps: (T,) the network's time argument at each index: the index itself (int64), or 1000 * sigma for flows.
        original_alpha, original_sigma: (T,) as they were before the last timestep became pure noise; the same as
            alpha and sigma where that was not done.
    """

    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor
    original_alpha: Tensor
    original_sigma: Tensor

    def __len__(self) -> int:
        return self.alpha.shape[0]

    def at(self, t: int | Sequence[int] | Tensor, *, original: bool = False) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at the indices `t`: shape () for an int, (B,) for a list or an integer tensor.

        `original=True` gives the coefficients from before the terminal SNR was set to zero. That is the usual way to
        read x0 from an epsilon prediction at pure noise: make the input with `at(t)`, convert with
        `at(t, original=True)`. It amplifies the network's error by sigma/alpha: 14.6 times for Stable Diffusion.

        Raises:
            ValueError: t outside 0..T-1 (read on the CPU only), not integer, or on another device than the schedule.
        """
        t = self._index(t)
        if original:
            return self.original_alpha[t], self.original_sigma[t]
        return self.alpha[t], self.sigma[t]

    def with_zero_terminal_snr(self) -> Schedule:
        """All timesteps rescaled so that the last is pure noise (arXiv 2305.08891, algorithm 1). VP schedules only."""
        alpha, sigma = self.alpha.double(), self.sigma.double()
        deviation = (alpha.square() + sigma.square() - 1).abs().max().item()
        if deviation > 1e-5:
            raise ValueError(
                "with_zero_terminal_snr needs a variance-preserving schedule (alpha^2 + sigma^2 = 1); "
                f"this one is off by {deviation:.3g}"
            )
        first, last = alpha[0], alpha[-1]
        rescaled = (alpha - last) * (first / (first - last))
        return self._ending_in_noise(rescaled, (1 - rescaled.square()).sqrt())

    def with_pure_noise_end(self) -> Schedule:
        """Only the last timestep becomes pure noise (alpha 0, sigma 1); all others stay where the teacher knows them.

        This is what ADD asks of the student's input at t = 999, while the teacher keeps its own schedule.
        """
        alpha, sigma = self.alpha.clone(), self.sigma.clone()
        alpha[-1], sigma[-1] = 0, 1
        return self._ending_in_noise(alpha, sigma)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Schedule:
        """The same schedule on another device or in another floating dtype (float32 or float64)."""
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
        moved = {name: getattr(self, name).to(device=device, dtype=dtype) for name in _COEFFICIENTS}
        return Schedule(timesteps=self.timesteps.to(device=device), **moved)

    def _ending_in_noise(self, alpha: Tensor, sigma: Tensor) -> Schedule:
        dtype = self.alpha.dtype
        return replace(
            self,
            alpha=alpha.to(dtype),
            sigma=sigma.to(dtype),
            original_alpha=self.alpha,
            original_sigma=self.sigma,
        )

    def _index(self, t: int | Sequence[int] | Tensor) -> Tensor:
        t = torch.as_tensor(t, device=None if isinstance(t, Tensor) else self.alpha.device)
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"t must be an integer index into the {len(self)} timesteps; got dtype {t.dtype}")
        if t.device != self.alpha.device:
            raise ValueError(f"t is on {t.device}, the schedule on {self.alpha.device}: use schedule.to(t.device)")
        t = t.long()
        if _values_can_be_read(t) and t.numel() and not (int(t.min()) >= 0 and int(t.max()) < len(self)):
            raise ValueError(f"t must be in 0..{len(self) - 1}; got {int(t.min())}..{int(t.max())}")
        return t


_COEFFICIENTS = ("alpha", "sigma", "original_alpha", "original_sigma")


def scaled_linear(
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_train_timesteps: int = 1000,
    *,
    zero_terminal_snr: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Schedule:
    """Stable Diffusion's schedule: the square root of beta is linear. alpha ends at 0.068, or at 0 when asked for."""
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"beta_start and beta_end must satisfy 0 < start <= end < 1; got {beta_start}, {beta_end}")
    _check_count("num_train_timesteps", num_train_timesteps, least=2)
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64).square()
    schedule = _variance_preserving(torch.cumprod(1 - betas, dim=0), torch.float64)
    if zero_terminal_snr:
        schedule = schedule.with_zero_terminal_snr()
    return schedule.to(dtype=dtype)


def flow(num_train_timesteps: int = 1000, *, shift: float = 1.0, dtype: torch.dtype = torch.float32) -> Schedule:
    """The straight path alpha = 1 - sigma at sigma = 1/T, 2/T, ... 1, as in diffusers' flow-matching schedulers.

    `shift` s moves sigma to `s * sigma / (1 + (s - 1) * sigma)` (SD3, FLUX). Timesteps are T * sigma. In InstaFlow's
    time, which runs the other way, t = alpha.
    """
    _check_count("num_train_timesteps", num_train_timesteps, least=1)
    if not shift > 0:
        raise ValueError(f"shift must be positive; got {shift}")
    sigma = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    alpha, timesteps = (1 - sigma).to(dtype), (sigma * num_train_timesteps).to(dtype)
    sigma = sigma.to(dtype)
    return Schedule(alpha, sigma, timesteps, alpha, sigma)


def from_scheduler(scheduler, *, dtype: torch.dtype = torch.float32) -> Schedule:
    """The schedule a diffusers scheduler was configured with, whatever timesteps it is set to at the moment.

    Args:
        scheduler: any diffusers scheduler that has `alphas_cumprod` (DDIM, DDPM, Euler, LCM, DPM-Solver, ...) or is
            a flow-matching one. Where it was rescaled to zero-terminal SNR, the last alpha is exactly 0 (some
            schedulers keep 2^-12 there to avoid a division) and `original_alpha` is its unrescaled schedule.

    Raises:
        ValueError: a scheduler with neither.
    """
    config = scheduler.config
    if _is_flow_matching(scheduler):
        # A dynamic shift depends on the image size and is applied by the pipeline, not by the schedule.
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift") or config.get("flow_shift") or 1.0
        return flow(config.num_train_timesteps, shift=shift, dtype=dtype)
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has neither alphas_cumprod nor flow-matching sigmas: "
            "its schedule is not known here"
        )
    if not config.get("rescale_betas_zero_snr", False):
        return _variance_preserving(scheduler.alphas_cumprod, dtype)
    plain = type(scheduler).from_config(config, rescale_betas_zero_snr=False)
    original = _variance_preserving(plain.alphas_cumprod, dtype)
    rescaled = _variance_preserving(scheduler.alphas_cumprod, dtype).with_pure_noise_end()
    return replace(rescaled, original_alpha=original.alpha, original_sigma=original.sigma)


def prediction_type_of(scheduler) -> str:
    """The prediction type that a diffusers scheduler expects of its network, one of `PREDICTION_TYPES`."""
    if _is_flow_matching(scheduler):
        return "flow_prediction"
    return check_prediction_type(scheduler.config.get("prediction_type", "epsilon"))


def inference_timesteps(
    num_steps: int, spacing: str, *, num_train_timesteps: int = 1000, steps_offset: int = 0
) -> Tensor:
    """The training timesteps that a sampler of `num_steps` steps visits: int64, descending, on the CPU.

    Equal to diffusers' DDIM scheduler, except that for some counts (the first is 61) its "trailing" table has one
    timestep too many, t = -1, from rounding; that one is left out. One step is t = 999 with "trailing" spacing, but
    t = 0 (plus `steps_offset`, 1 for Stable Diffusion) with the others, which is no place to start from noise.

    Raises:
        ValueError: unknown spacing, or a number of steps outside 1..num_train_timesteps.
    """
    _check_count("num_steps", num_steps, least=1, most=num_train_timesteps)
    if spacing == "linspace":
        timesteps = np.linspace(0, num_train_timesteps - 1, num_steps).round()[::-1]
    elif spacing == "leading":
        timesteps = (np.arange(num_steps) * (num_train_timesteps // num_steps))[::-1] + steps_offset
    elif spacing == "trailing":
        timesteps = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps))[:num_steps] - 1
    else:
        raise ValueError(f"spacing must be one of {', '.join(TIMESTEP_SPACINGS)}; got {spacing!r}")
    return torch.from_numpy(timesteps.astype(np.int64))


def _variance_preserving(alphas_cumprod: Tensor, dtype: torch.dtype) -> Schedule:
    abar = alphas_cumprod.detach().double().cpu()  # sigma_0 = sqrt(1 - 0.99915) loses four digits in float32
    alpha, sigma = abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)
    return Schedule(alpha, sigma, torch.arange(len(alpha)), alpha, sigma)


def _is_flow_matching(scheduler) -> bool:
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas", False)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _per_sample(name: str, value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a tensor that broadcasts over the batch of `like`: () or (B, 1, 1, ...)."""
    _check_coefficient(name, value, like)
    if not isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=dtype, device=like.device)
    if value.ndim == 0:
        return value.to(dtype)
    return value.to(dtype).reshape(-1, *(1,) * (like.ndim - 1))


def _check_coefficient(name: str, value: Tensor | float, like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return
    if value.shape != like.shape[:1]:
        raise ValueError(
            f"{name} must be a number or of shape ({like.shape[0]},), one per sample; got {tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the sample on {like.device}")


def _check_sample(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"{name} must have a batch dimension; got a scalar tensor")


def _check_pair(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    _check_sample(name, x)
    _check_sample(other_name, other)
    if x.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape; got {tuple(x.shape)} and {tuple(other.shape)}"
        )


def _check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be {f'{least} or more' if most is None else f'in {least}..{most}'}; got {value}")


def _values_can_be_read(x: Tensor) -> bool:
    """Whether looking at the values is free: not on a GPU (it would wait for it), not while torch.compile traces, and
    not where a subclass has none (fake tensors)."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def _refuse_zero(name: str, value: Tensor | float, what: str, advice: str) -> None:
    if isinstance(value, Tensor):
        values = value.tolist() if _values_can_be_read(value) else []  # dispatches nothing, unlike (value == 0).any()
        zero = 0 in values if isinstance(values, list) else values == 0
    else:
        zero = value == 0
    if zero:
        raise ValueError(f"{what} cannot be converted at {name} = 0: {advice}")
