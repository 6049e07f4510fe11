"""Adversarial losses over any number of heads, and the sign statistics that training logs watch.

Hinge: Lim and Ye, arXiv 1705.02894. Softplus, the non-saturating logistic loss: Goodfellow et al., arXiv 1406.2661.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastdistill.ops.adversarial_loss import adversarial_loss, check_logits

Logits = Tensor | Sequence[Tensor]


class LogitStats(NamedTuple):
    """Of the real or of the fake logits, as tensors on their device (reading them is the caller's choice to wait).

    Each is () and the mean over heads of a mean over a head's logits; an empty head counts with zeros.

    Attributes:
        loss: their term of the loss.
        mean: the logit.
        positive, negative: the fraction of logits > 0, of logits < 0. A discriminator is right on real logits > 0 and
            on fake logits < 0.
        sign: the sign; of the real logits it is r_t of StyleGAN2-ADA (arXiv 2006.06676), 0 where the discriminator
            knows nothing, 1 where it has learned the data by heart.
        heads: (heads, 5), the same five per head, in this order.
    """

    loss: Tensor
    mean: Tensor
    positive: Tensor
    negative: Tensor
    sign: Tensor
    heads: Tensor


class DiscriminatorStats(NamedTuple):
    """Statistics of both kinds of logits of a discriminator's step."""

    real: LogitStats
    fake: LogitStats


def hinge_discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    heads: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, DiscriminatorStats]:
    """`mean relu(1 - real) + mean relu(1 + fake)`: over the logits of each head, then over the heads.

    Args:
        real_logits, fake_logits: a tensor, or one per head, of any shapes; as many heads in both, whose sizes and
            batches may differ. float32, float16, bfloat16 or float64, also mixed; computed in float32 (float64 if any
            are). A head without logits contributes 0 and counts as a head.
        heads: "mean" or "sum" over the heads; "sum" reproduces ADD's constants.
        return_stats: also return the statistics, which cost no launch of their own.
        backend: as in `fastdistill.ops.adversarial_loss`.

    Returns:
        A float32 (float64) scalar, or (scalar, `DiscriminatorStats`). On a GPU all heads are one launch, their
        gradients another (one more for every 64 tensors); nothing waits for the device.

    Raises:
        ValueError, TypeError: no heads, or another number of real than of fake ones, or logits that are not floating
            tensors of one device.
    """
    return _discriminator_loss("hinge", real_logits, fake_logits, heads, return_stats, backend)


def hinge_generator_loss(
    fake_logits: Logits, *, heads: str = "mean", return_stats: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, LogitStats]:
    """`-mean fake`: over the logits of each head, then over the heads; arguments as in `hinge_discriminator_loss`."""
    return _generator_loss("linear", fake_logits, heads, return_stats, backend)


def softplus_discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    heads: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, DiscriminatorStats]:
    """`mean softplus(-real) + mean softplus(fake)`, the logistic loss, finite for any finite logit.

    Arguments as in `hinge_discriminator_loss`.
    """
    return _discriminator_loss("softplus", real_logits, fake_logits, heads, return_stats, backend)


def softplus_generator_loss(
    fake_logits: Logits, *, heads: str = "mean", return_stats: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, LogitStats]:
    """`mean softplus(-fake)`, the non-saturating loss; arguments as in `hinge_discriminator_loss`."""
    return _generator_loss("softplus", fake_logits, heads, return_stats, backend)


def _discriminator_loss(function, real_logits, fake_logits, heads, return_stats, backend):
    real, fake = _as_heads("real_logits", real_logits), _as_heads("fake_logits", fake_logits)
    if len(real) != len(fake):
        raise ValueError(f"fake_logits must have as many heads as real_logits, {len(real)}; got {len(fake)}")
    loss, statistics = adversarial_loss(real, fake, function=function, heads=heads, backend=backend)
    if not return_stats:
        return loss
    last = 2 + len(real)
    return loss, DiscriminatorStats(
        LogitStats(*statistics[0].unbind(), statistics[2:last]), LogitStats(*statistics[1].unbind(), statistics[last:])
    )


def _generator_loss(function, fake_logits, heads, return_stats, backend):
    fake = _as_heads("fake_logits", fake_logits)
    loss, statistics = adversarial_loss(fake, function=function, heads=heads, backend=backend)
    return (loss, LogitStats(*statistics[0].unbind(), statistics[2:])) if return_stats else loss


def _as_heads(name: str, logits: Logits) -> list[Tensor]:
    if isinstance(logits, Tensor):
        logits = [logits]
    check_logits(name, logits)
    if not logits:
        raise ValueError(f"{name}: expected the logits of at least one head, got none")
    return list(logits)
