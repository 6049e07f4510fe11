"""Where a run's batches come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .condition import Condition
from .config import require
from .draws import Draws

if TYPE_CHECKING:
    from .pairs import Pairs


class Data(Protocol):
    """Where micro-batches come from.

    A batch is a dict. The names that methods know, each of the B samples of this process:

    - `noise` (B, …) unit noise of the student's input, `condition` (`Condition`) of the same samples.
    - `data` (B, …) a real sample in the student's space (latents), of the same `condition`; `image` (B, 3, H, W) in
      [-1, 1], its pixels, where they are there.
    - `pair_noise`, `pair_sample` (B, …), `pair_condition`: a noise and where the teacher's ODE carries it.

    A method `figures()`, where there is one, gives numbers by name for the log; `networks`, where there is one, are
    those that a batch is made with.
    """

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        """The samples of `draws.batch_size` of this process, on its device.

        first: how many samples the run has taken before, over all processes: the position in the data.
        """


class PromptData:
    """Unit noise and prompts drawn uniformly, and pairs for a regression term: no images are needed.

    Args:
        conditions: of the prompts, on the networks' device.
        sample_shape: of one sample, without the batch.
        pairs: of the same prompts; None for a run without a regression term.
    """

    def __init__(self, conditions: Condition, sample_shape: Sequence[int], pairs: Pairs | None = None) -> None:
        self.conditions, self.sample_shape, self.pairs = conditions, tuple(sample_shape), pairs

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        """`noise` and `condition`; with pairs also `pair_noise`, `pair_sample`, `pair_condition`."""
        noise = draws.randn(*self.sample_shape).to(self.conditions.states.dtype)
        batch = {"noise": noise, "condition": self.conditions[draws.randint(0, len(self.conditions))]}
        return batch if self.pairs is None else batch | pair_batch(self.pairs, self.conditions, draws)


class LatentData:
    """Real samples held in memory, with what can be said of each, and unit noise.

    Every epoch shows every sample once, in an order of its own.

    Args:
        samples: (N, …) float32 on the networks' device, in the student's space: latents.
        conditions: of all captions.
        captions: (N, K) int64, the captions of each sample as indices into `conditions`; one is drawn each time.
        images: (N, 3, H, W) float32 in [-1, 1], the pixels of the same samples; None where no method asks for them.
        pairs: as in `PromptData`.
        seed: of the order.
    """

    def __init__(
        self,
        samples: Tensor,
        conditions: Condition,
        captions: Tensor,
        *,
        images: Tensor | None = None,
        pairs: Pairs | None = None,
        seed: int = 0,
    ) -> None:
        if captions.shape[:1] != samples.shape[:1] or captions.ndim != 2:
            raise ValueError(f"captions: shape {tuple(captions.shape)}; needed ({len(samples)}, K), one row per sample")
        self.samples, self.conditions, self.captions = samples, conditions, captions
        self.images, self.pairs, self.seed = images, pairs, seed

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        """`noise`, `condition`, `data`; `image` and the pairs where they are there."""
        chosen = shuffled(draws.first_of(first), draws.batch_size, len(self.samples), self.seed).to(draws.device)
        caption = self.captions[chosen].gather(1, draws.randint(0, self.captions.shape[1], 1)).squeeze(1)
        data = self.samples[chosen]
        noise = draws.randn(*data.shape[1:]).to(data)
        batch = {"noise": noise, "condition": self.conditions[caption], "data": data}
        if self.images is not None:
            batch["image"] = self.images[chosen]
        return batch if self.pairs is None else batch | pair_batch(self.pairs, self.conditions, draws)


class PromptDropout:
    """Data that shows some samples without their prompt: what a network that is to be guided learns from.

    Args:
        data: whose batches are taken; `condition` is changed in them, sizes are kept, nothing else is.
        share: of samples, drawn one by one; 0 changes and draws nothing.
        unconditional: the condition of the empty prompt, of one sample, on the networks' device.
    """

    def __init__(self, data: Data, share: float, unconditional: Condition) -> None:
        require("dropout", share, 0 <= share <= 1, "in [0, 1]")
        self.data, self.share, self.unconditional = data, share, unconditional

    def batch(self, first: int, draws: Draws) -> dict[str, Any]:
        """The data's batch; whatever the share, with the same noise, samples and prompts."""
        batch = self.data.batch(first, draws)
        if self.share > 0:
            kept = draws.fork("dropout").rand() >= self.share
            batch["condition"] = batch["condition"].where(kept, self.unconditional)
        return batch

    def figures(self) -> dict[str, float]:
        """Those of the data."""
        return getattr(self.data, "figures", dict)()

    @property
    def networks(self) -> list[nn.Module]:
        """Those of the data."""
        return networks_of(self.data)


def networks_of(data: Data) -> list[nn.Module]:
    """What batches are made with on the device; none where everything was made before."""
    return list(getattr(data, "networks", ()))


def pair_batch(pairs: Pairs, conditions: Condition, draws: Draws) -> dict[str, Any]:
    """`pair_noise`, `pair_sample` and `pair_condition` of pairs drawn uniformly."""
    chosen = draws.randint(0, len(pairs.noise))
    return {
        "pair_noise": pairs.noise[chosen],
        "pair_sample": pairs.sample[chosen],
        "pair_condition": conditions[pairs.condition[chosen]],
    }


def shuffled(first: int, count: int, length: int, seed: int) -> Tensor:
    """(count,) int64: which of `length` samples stand at the places first, first + 1, … of endlessly many epochs."""
    chosen = []
    while count > 0:
        epoch, place = divmod(first, length)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(order[place : place + count])
        first, count = first + len(chosen[-1]), count - len(chosen[-1])
    return torch.cat(chosen)
