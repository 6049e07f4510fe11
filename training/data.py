"""Where a run's batches come from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .draws import Draws
from .pairs import Pairs


class PromptData:
    """Unit noise and prompts drawn uniformly, and pairs for a regression term: no images are needed.

    Args:
        conditions: (P, L, D) the encoded prompts, on the networks' device.
        sample_shape: of one sample, without the batch.
        pairs: of the same prompts; None for a run without a regression term.
    """

    def __init__(self, conditions: Tensor, sample_shape: Sequence[int], pairs: Pairs | None = None) -> None:
        self.conditions, self.sample_shape, self.pairs = conditions, tuple(sample_shape), pairs

    def batch(self, first: int, draws: Draws) -> dict[str, Tensor]:
        """`noise` (B, …) and `condition` (B, L, D); with pairs also `pair_noise`, `pair_sample`, `pair_condition`."""
        noise = draws.randn(*self.sample_shape).to(self.conditions.dtype)
        batch = {"noise": noise, "condition": self.conditions[draws.randint(0, len(self.conditions))]}
        if self.pairs is not None:
            chosen = draws.randint(0, len(self.pairs.noise))
            batch["pair_noise"] = self.pairs.noise[chosen]
            batch["pair_sample"] = self.pairs.sample[chosen]
            batch["pair_condition"] = self.conditions[self.pairs.condition[chosen]]
        return batch
