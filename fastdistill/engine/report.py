"""What the engine did to a model, as data that prints as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastdistill.ops import Explanation


@dataclass(frozen=True)
class PassReport:
    """One pass: what it changed, with counts, and what it could not do, with the reason.

    `changed` is empty where nothing was changed; then the pass was not applied and `left` says why.
    """

    name: str
    changed: Mapping[str, int] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    @property
    def applied(self) -> bool:
        return bool(self.changed)

    def __str__(self) -> str:
        lines = [f"{self.name}: {'applied' if self.applied else 'not applied'}"]
        lines += [f"  {count} x {what}" for what, count in self.changed.items()]
        lines += [f"  not: {reason}" for reason in self.left]
        return "\n".join(lines)


@dataclass(frozen=True)
class EngineReport:
    """Everything `OneStepPipeline.explain()` knows; `str()` of it is meant to be read.

    Attributes:
        model: the name or folder it was loaded from.
        device, dtype, scheduler: what runs where, and how the model is sampled.
        passes: one report per pass, in the order of application, those that are switched off included.
        norms: which backend serves the GroupNorms, and why the others do not; None where the fused op is not used.
        attention: which backend serves the attentions, and why the others do not, by the sizes (heads x queries x keys
            x head dim, batch) that calls have asked for so far; None where torch's own function is called directly.
        graphs: whether CUDA graphs are used, and why not.
        notes: other facts, such as parts of the pipeline that are not run.
    """

    model: str
    device: str
    dtype: str
    scheduler: str
    passes: tuple[PassReport, ...]
    norms: Explanation | None
    attention: Mapping[str, Explanation] | None
    graphs: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.device} in {self.dtype}, sampled by {self.scheduler}"]
        lines += [str(report) for report in self.passes]
        lines.append(str(self.norms) if self.norms else "group_norm_silu: not used (GroupNorm and SiLU of torch)")
        lines += self._attention_lines()
        lines.append(f"CUDA graphs: {self.graphs}")
        lines += self.notes
        return "\n".join(lines)

    def _attention_lines(self) -> list[str]:
        if self.attention is None:
            return ["attention: not used (scaled_dot_product_attention of torch)"]
        if not self.attention:
            return ["attention: its backend depends on sizes, and is chosen by the first call of each"]
        first_lines = (f"{sizes}: {str(each).splitlines()[0]}" for sizes, each in self.attention.items())
        return [f"attention {line.replace('attention: ', '', 1)}" for line in first_lines]
