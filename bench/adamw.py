"""FusedAdamW against clip_grad_norm_, torch's fused AdamW and an EMA: `python -m fastdistill.bench.adamw`.

Both step parameters of their own with the same gradients, in turn, in one process. The error is that of a few steps
of a smaller network against float64, in units of the learning rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastdistill.optim import FusedAdamW

from .timing import Speed, time_pairs

# Of a UNet's blocks: convolutions, projections, norms.
SHAPES = [(320, 320, 3, 3), (320,), (640, 640, 3, 3), (2560, 320), (1280,), (1280, 1280), (1280, 768), (640, 320, 1, 1)]
MAX_GRAD_NORM, EMA_DECAY, LR = 1.0, 0.999, 1e-4


@dataclass(frozen=True)
class Row:
    """`what` both do; bytes moved per parameter and step, counted; bytes of the optimiser's state, measured; errors
    against float64 in learning rates."""

    what: str
    speed: Speed
    ours_moved: float
    torch_moved: float
    ours_state: float
    torch_state: float
    ours_error: float
    torch_error: float


@dataclass(frozen=True)
class Work:
    clip: bool
    ema: bool
    state_bits: int = 32

    @property
    def name(self) -> str:
        parts = ["clip"] * self.clip + ["AdamW"] + ["EMA"] * self.ema
        return " + ".join(parts) + (", 8-bit moments" if self.state_bits == 8 else "")

    @property
    def moved(self) -> tuple[float, float]:
        """Bytes per float32 parameter, ours and torch's. Ours reads the gradients once more for their norm; torch
        writes them scaled, and reads the parameter again for the EMA."""
        moments = 16.0 if self.state_bits == 32 else 4.0 + 2 * 2 * 4 / 256
        return 4 + 12 + moments + 8 * self.ema, 12 * self.clip + 28 + 12 * self.ema


WORKS = (Work(True, True), Work(True, False), Work(False, False), Work(True, True, 8))


def measure(params: int, pairs: int, device: str = "cpu") -> list[Row]:
    rows = []
    for work in WORKS:
        speed, states = _time(work, _shapes(params), pairs, torch.device(device))
        errors = _errors(work, torch.device(device))
        rows.append(Row(work.name, speed, *work.moved, *states, *errors))
    return rows


def _shapes(params: int) -> list[tuple[int, ...]]:
    """SHAPES again and again, the last one cut, to `params` elements in all."""
    shapes, left = [], params
    for shape in itertools.cycle(SHAPES):
        if left <= 0:
            return shapes
        size = torch.Size(shape).numel()
        shapes.append(shape if size <= left else (left,))
        left -= size
    raise AssertionError("not reached: the cycle has no end")


def _parameters(shapes, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device, dtype))
        p.grad = (1e-3 * torch.randn(shape, generator=generator)).to(device, dtype)
        params.append(p)
    return params


def _ours(work: Work, params: list, ema: list) -> FusedAdamW:
    norm = MAX_GRAD_NORM if work.clip else None
    return FusedAdamW(
        params, LR, ema=ema if work.ema else None, ema_decay=EMA_DECAY, max_grad_norm=norm, state_bits=work.state_bits
    )


def _torchs(work: Work, params: list, ema: list, fused: bool) -> tuple[torch.optim.AdamW, Callable[[], None]]:
    optimizer = torch.optim.AdamW(params, LR, fused=fused)

    @torch.no_grad()
    def step() -> None:
        if work.clip:
            torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()
        if work.ema:
            torch._foreach_lerp_(ema, params, 1 - EMA_DECAY)

    return optimizer, step


def _time(work: Work, shapes, pairs: int, device: torch.device) -> tuple[Speed, tuple[float, float]]:
    params = [_parameters(shapes, torch.float32, device) for _ in range(2)]
    ema = [[p.detach().clone() for p in each] for each in params]
    ours = _ours(work, params[0], ema[0])
    optimizer, step = _torchs(work, params[1], ema[1], fused=True)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = time_pairs([lambda: (ours.step(), wait())], [lambda: (step(), wait())], pairs)
    count = sum(p.numel() for p in params[0])
    return Speed.of(times), tuple(_state_bytes(each) / count for each in (ours, optimizer))


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values())


def _errors(work: Work, device: torch.device, steps: int = 5) -> tuple[float, float]:
    shapes = [(64, 32, 3, 3), (77, 65), (1,)]
    exact, ours, plain = (_parameters(shapes, dtype, device) for dtype in (torch.float64, torch.float32, torch.float32))
    ema = [[p.detach().clone() for p in each] for each in (exact, ours, plain)]
    taken = [
        _torchs(work, exact, ema[0], fused=False)[1],
        _ours(work, ours, ema[1]).step,
        _torchs(work, plain, ema[2], fused=True)[1],
    ]
    generator = torch.Generator().manual_seed(1)
    for p, q, r in zip(exact, ours, plain):  # the same start, of float32 values
        p.data.copy_(q)
        r.data.copy_(q)
    for average, p in zip(ema[0], exact):
        average.copy_(p.detach())
    for _ in range(steps):
        for group in zip(exact, ours, plain):
            gradient = torch.randn(group[0].shape, generator=generator).to(device)
            for p in group:
                p.grad = gradient.to(p.dtype)
        for step in taken:
            step()
    pairs = [(p, q, r) for each in (zip(exact, ours, plain), zip(*ema)) for p, q, r in each]
    return tuple(max(_largest(group[0] - group[i]) for group in pairs) / LR for i in (1, 2))


def _largest(t: torch.Tensor) -> float:
    return t.detach().abs().max().item()


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def adamw(
    params: Annotated[int, typer.Option(min=1, help="float32 parameters")] = 50_000_000,
    pairs: Annotated[int, typer.Option(min=1, help="pairs of steps that are timed")] = 20,
    threads: Annotated[int, typer.Option(min=0, help="of torch; 0: as many as it takes")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Print how much faster a step is, its bytes and its error, beside torch's clipping, fused AdamW and EMA."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device", param_hint="--device")
    if threads:
        torch.set_num_threads(threads)
    table = Table(title=f"{params:,} float32 parameters, {device}, {torch.get_num_threads()} threads")
    for heading in ("", "ms", "torch / ours", "bytes moved", "bytes of state", "error / lr"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for row in measure(params, pairs, device):
        s = row.speed
        table.add_row(
            row.what,
            f"{s.ours_us / 1e3:.1f} : {s.baseline_us / 1e3:.1f}",
            f"{s.ratio:.2f} ({s.ratio_low:.2f} to {s.ratio_high:.2f})",
            f"{row.ours_moved:.3g} : {row.torch_moved:.3g}",
            f"{row.ours_state:.3g} : {row.torch_state:.3g}",
            f"{row.ours_error:.1e} : {row.torch_error:.1e}",
        )
    Console(width=140).print(table)
    print("ours : torch's. Medians; the ratio's 20 % and 80 % quantiles over pairs. Error against float64, 5 steps.")


if __name__ == "__main__":
    app(prog_name="python -m fastdistill.bench.adamw")
