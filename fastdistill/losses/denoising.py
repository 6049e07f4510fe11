"""The loss a diffusion network is trained with: the teacher's own, and the fake score's of distribution matching.

Ho et al., arXiv 2006.11239, eq. 14; weightings: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting
Strategy", arXiv 2303.09556.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill import diffusion
from fastdistill.ops import weighted_squared_error

from ._inputs import check_per_sample, check_samples

WEIGHTINGS = ("uniform", "snr", "min_snr")


def denoising_loss(
    pred: Tensor,
    data: Tensor,
    noise: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    prediction_type: str = "epsilon",
    weighting: str = "uniform",
    snr_gamma: float = 5.0,
) -> Tensor:
    """`mean over the batch of w * mean over a sample of (pred - target)^2`.

    pred is the network's output at `diffusion.add_noise(data, noise, alpha, sigma)`; the target is what its type stands
    for: noise ("epsilon"), data ("sample"), alpha * noise - sigma * data ("v_prediction"), noise - data
    ("flow_prediction"), data - noise ("instaflow"). w is

    - "uniform": 1.
    - "snr": the error of the data counts SNR = alpha^2 / sigma^2: 1 for "epsilon" (the same as uniform), SNR for
      "sample", SNR / (SNR + 1) for "v_prediction" (variance preserving), SNR / (sqrt(SNR) + 1)^2 for the flows.
    - "min_snr": the same with min(SNR, snr_gamma) in the numerators (for "epsilon" over SNR).

    `fastdistill.diffusion.snr_weight` derives them. They are finite at alpha = 0 and at sigma = 0, but for "sample"
    with "snr" at sigma = 0, which is infinite.

    Args:
        pred: (B, ...) float32, float16, bfloat16 or float64: the only input that receives a gradient.
        data, noise: (B, ...) of the same shape and of one dtype (of two, plain PyTorch serves), pred's or another: a
            bfloat16 prediction is compared with float32 data as they are.
        alpha, sigma: float, () or (B,).

    Returns:
        () float32 (float64 where an input is). An empty batch gives 0.

    One op (`fastdistill.ops.weighted_squared_error`): the target is never written out. Besides, over (B,) elements:
    one launch for "v_prediction", and for the weight of "min_snr" 4 ("epsilon"), 3 ("sample"), 6 ("v_prediction") or 5
    (flows). Nothing waits for the device.

    Raises:
        ValueError, TypeError: bad input, by the name of the argument.
    """
    check_samples(pred=pred, data=data, noise=noise)
    check_per_sample(pred, alpha=alpha, sigma=sigma)
    weight = _weight(pred, alpha, sigma, prediction_type, weighting, snr_gamma)
    of_data, of_noise = diffusion.prediction_coefficients(prediction_type, alpha, sigma)
    # A coefficient that is 0 for every sample: its end is not read.
    if isinstance(of_data, float) and of_data == 0:
        return weighted_squared_error(pred, noise, scale_a=of_noise, weight=weight)
    if isinstance(of_noise, float) and of_noise == 0:
        return weighted_squared_error(pred, data, scale_a=of_data, weight=weight)
    return weighted_squared_error(pred, data, noise, scale_a=of_data, scale_b=of_noise, weight=weight)


def _weight(pred, alpha, sigma, prediction_type, weighting, snr_gamma) -> Tensor | float:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if not snr_gamma > 0:
        raise ValueError(f"snr_gamma: expected a positive number, got {snr_gamma}")
    if weighting == "uniform":
        return 1.0
    alpha, sigma = (_as_tensor(value, pred) for value in (alpha, sigma))
    return diffusion.snr_weight(alpha, sigma, prediction_type, gamma=snr_gamma if weighting == "min_snr" else None)


def _as_tensor(value: Tensor | float, pred: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.promote_types(value.dtype, torch.float32))
    # Filled on the device: a copy from the host would wait for it.
    return torch.full(
        (), value, dtype=torch.float64 if pred.dtype == torch.float64 else torch.float32, device=pred.device
    )
