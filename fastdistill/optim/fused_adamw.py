"""AdamW with global-norm clipping and EMA in one sweep over the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdistill.ops import _dispatch, adamw
from fastdistill.ops.gradient_norm import is_dense, walk_alike
from fastdistill.optim import states
from fastdistill.optim.shards import alike, is_sharded, local, whole_gradient_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class FusedAdamW(torch.optim.Optimizer):
    """`clip_grad_norm_`, `torch.optim.AdamW` and `ema.lerp_(p, 1 - ema_decay)` as one step that reads gradients twice
    and everything else once. No host sync; can be captured in a CUDA graph.

    A step whose gradients hold an inf or NaN changes nothing, bit for bit: no parameter, moment, step counter or
    average. `skipped` counts such steps on the device.

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`; all on one device; float32, bfloat16, float16, or
            float64 (plain PyTorch). 16-bit parameters get float32 master copies, which are stepped in their place.
        lr: a float, or a tensor of one element, read on the device where it lies there (LR schedules in a CUDA graph).
        betas, eps, weight_decay, maximize: as for `torch.optim.AdamW`, also per group.
        ema: a tensor per parameter, in the order of `params`, of its shape and device; float32 (float64 of float64).
            They belong to the caller, who saves them; averages are of the master copies where there are such. A
            parameter without a gradient is averaged too. A group added later brings its own:
            `add_param_group({"params": [...], "ema": [...]})`.
        ema_decay: a float or a float32 tensor () on the device; the attribute may change between steps.
        max_grad_norm: the largest norm of all gradients of all groups together; None for no clipping. The attribute may
            change between steps. `.grad` is left as it is, unlike by `clip_grad_norm_`.
        state_bits: 32, or 8: moments of parameters with at least 4096 elements as 8-bit floats with a scale per 256
            (`fastdistill.ops.eight_bit` says which, and their error).
        backend: "cuda", "cpu" or "reference" for every step; None lets each call's first choice serve.

    Attributes:
        grad_norm: () on the device, of the last step, before clipping (after unscaling); None before the first.
        skipped: () int64 on the device, steps that changed nothing.

    Bytes per parameter, of this optimiser's state (averages are the caller's, 4 more; the parameter and its gradient
    are the model's):

    | parameter | state_bits=32 | state_bits=8 |
    |---|---|---|
    | float32 | 8 | 2.03 |
    | bfloat16, float16 | 12 | 6.03 |
    | float64 | 16 | 16 |

    `state_dict` is that of `torch.optim.AdamW(fused=True)` and can be loaded there and here, both ways; 16-bit
    parameters add the key `master`, 8-bit moments replace two keys by three. `to_adamw_state_dict` gives AdamW's from
    any.

    With a GradScaler, `scaler.step(optimizer)` alone; no `scaler.unscale_` is needed for clipping. Parameters that
    something else has changed (a checkpoint loaded into a 16-bit model) need `refresh_masters()`.

    Sharded parameters (DTensor, of FSDP2's `fully_shard`): each process steps its own part; norm, clipping and the
    decision to skip are of the whole, by one exchange of a number in `step`, which all processes call. Averages are
    sharded as their parameters. 8-bit moments have blocks within a process's part, and are float32 in `state_dict`, so
    that any number of processes can load it. Under schemes that shard plain tensors the norm, and the decision to skip,
    would be each rank's own.

    Raises:
        ValueError, TypeError: bad input, naming the argument, here and in `step`, before anything is changed.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over `grad_scale` and `found_inf`

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        ema: Iterable[torch.Tensor] | None = None,
        ema_decay: float | torch.Tensor = 0.999,
        max_grad_norm: float | None = None,
        state_bits: int = 32,
        backend: str | None = None,
    ) -> None:
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits={state_bits!r}: must be 8 or 32")
        self.ema_decay = ema_decay
        self.max_grad_norm = max_grad_norm
        self.state_bits = state_bits
        self.backend = backend
        self.grad_norm: torch.Tensor | None = None
        self._ema: dict[torch.Tensor, torch.Tensor] | None = None
        self._complete = False
        self._check_numbers()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        # AdamW's other keys, so that either can load the other's state_dict.
        defaults |= {"maximize": maximize, "foreach": None, "capturable": False, "differentiable": False}
        defaults |= {"fused": True, "decoupled_weight_decay": True}
        super().__init__(params, defaults)
        everything = [p for group in self.param_groups for p in group["params"]]
        if ema is not None:
            self._ema = _pair_up(everything, ema)
        self.skipped = torch.zeros((), dtype=torch.int64, device=everything[0].device)
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimiser's; with `ema` in use, `param_group["ema"]` holds the averages of the new parameters."""
        param_group = dict(param_group)
        ema = param_group.pop("ema", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            for i, p in enumerate(group["params"]):
                _check_param(p, f"params[{i}] of group {len(self.param_groups) - 1}")
            if self._complete and self._ema is not None:
                if ema is None:
                    raise ValueError('param_group: this optimiser averages its parameters, so the group needs "ema"')
                self._ema |= _pair_up(group["params"], ema)
            elif ema is not None:
                raise ValueError('param_group: "ema" is for groups added to an optimiser that was given `ema`')
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @property
    def ema(self) -> list[torch.Tensor] | None:
        """The averages, in the order of the parameters."""
        return None if self._ema is None else list(self._ema.values())

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure`: evaluates the model anew and returns the loss, which is returned.

        Under `torch.compile` this is a graph break: there is nothing left to fuse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_numbers()
        work = [(self._factors(group), batch) for group in self.param_groups for batch in self._batches(group)]
        if not work:
            self._average_idle(None)
            return loss
        _check_devices([g for _, batch in work for g in batch.grads])
        chosen = [_dispatch.select(adamw.OP, self.backend, batch) for _, batch in work]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm = whole_gradient_norm(self._gradients(), self.backend)
        self.grad_norm = norm if grad_scale is None else norm / grad_scale
        skipped = self.skipped = self.skipped.to(norm.device)
        for (factors, batch), backend in zip(work, chosen):
            adamw.adamw_(
                batch,
                norm,
                factors,
                skipped=skipped,
                grad_scale=grad_scale,
                found_inf=found_inf,
                backend=backend,
            )
            skipped = None  # counted once
        self._average_idle(found_inf)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of every optimiser; 8-bit moments of sharded parameters in float32."""
        state_dict = super().state_dict()
        everything = (p for group in self.param_groups for p in group["params"])
        saved = {
            key: states.of_all_processes(p, state_dict["state"][key])
            for key, p in enumerate(everything)
            if key in state_dict["state"]
        }
        return {**state_dict, "state": state_dict["state"] | saved}

    def refresh_masters(self) -> None:
        """Copy the parameters into their master copies, after something else has changed them."""
        for p, state in self.state.items():
            if "master" in state:
                state["master"].copy_(p.detach())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ours or `torch.optim.AdamW` 's, into the `state_bits` and the devices that this optimiser has now.

        Everything is copied. A state without `master` starts one from the parameter.

        Raises:
            ValueError: other groups, `amsgrad`, or a state that lacks something or does not fit.
        """
        # torch would cast every tensor to its parameter's dtype. What it does not know as a tensor it leaves alone; the
        # user's own hooks run before the one and after the other.
        before = self.register_load_state_dict_pre_hook(_shield)
        after = self.register_load_state_dict_post_hook(FusedAdamW._adopt, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    @torch.no_grad()
    def _adopt(self) -> None:
        for group in self.param_groups:
            _check_group(group)
        adopted = {p: states.adopt(p, saved.state, self.state_bits) for p, saved in self.state.items()}
        self.state.clear()
        self.state.update({p: state for p, state in adopted.items() if state})

    @torch.no_grad()
    def to_adamw_state_dict(self) -> dict[str, Any]:
        """The state for `torch.optim.AdamW(...).load_state_dict`: 8-bit moments as float32, no master copies (AdamW has
        none, and keeps moments in the parameter's dtype)."""
        state_dict = self.state_dict()
        return {**state_dict, "state": {key: states.moments_of(s) for key, s in state_dict["state"].items()}}

    def __getstate__(self) -> dict[str, Any]:
        own = ("ema_decay", "max_grad_norm", "state_bits", "backend", "grad_norm", "skipped", "_ema", "_complete")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    # ---- a step's parts ---------------------------------------------------------------------------------------------

    def _check_numbers(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r}: must be positive, or None for no clipping")
        if not isinstance(self.ema_decay, torch.Tensor) and not 0.0 <= self.ema_decay <= 1.0:
            raise ValueError(f"ema_decay={self.ema_decay!r}: must be between 0 and 1")

    def _factors(self, group: dict[str, Any]) -> adamw.Factors:
        return adamw.Factors(
            lr=_on_device(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            max_grad_norm=math.inf if self.max_grad_norm is None else self.max_grad_norm,
            ema_decay=_on_device(self.ema_decay),
            maximize=group["maximize"],
        )

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _batches(self, group: dict[str, Any]) -> Iterable[adamw.Batch]:
        """The parameters of a group that have a gradient, in batches that are treated alike: this process's parts."""
        batches: dict[tuple, adamw.Batch] = {}
        for i, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                continue
            _check_grad(p, grad, i)
            if not self.state[p]:
                self.state[p].update(states.new_state(p, self.state_bits))
            ema = None if self._ema is None else local(self._ema[p])
            state = {key: local(value) for key, value in self.state[p].items()}
            p, grad = local(p), local(grad)
            dense = is_dense(p)
            if dense and not walk_alike(p, grad):
                grad = torch.empty_like(p).copy_(grad)
            codes = "exp_avg_codes" in state
            in_step = dense and (ema is None or walk_alike(p, ema))
            batch = batches.setdefault((p.device, p.dtype, codes, in_step), adamw.Batch())
            batch.params.append(p)
            batch.grads.append(grad)
            batch.exp_avgs.append(state["exp_avg_codes" if codes else "exp_avg"])
            batch.exp_avg_sqs.append(state["exp_avg_sq_codes" if codes else "exp_avg_sq"])
            batch.steps.append(state["step"])
            if codes:
                batch.scales.append(state["moment_scales"])
            if "master" in state:
                batch.masters.append(state["master"])
            if ema is not None:
                batch.emas.append(ema)
        return batches.values()

    def _average_idle(self, found_inf: torch.Tensor | None) -> None:
        """The averages of parameters without a gradient. The weight is 0 where the step is skipped."""
        idle = [(p, ema) for p, ema in (self._ema or {}).items() if p.grad is None]
        if not idle:
            return
        weight = 1 - self.ema_decay
        if any(p.grad is not None for p in self._ema):
            taken = self.grad_norm.isfinite()
            weight = (taken if found_inf is None else taken & (found_inf == 0)) * weight
        for p, ema in idle:
            value, ema = local(self.state.get(p, {}).get("master", p)), local(ema)
            ema.add_((value - ema) * weight)


class _Saved:
    """A parameter's saved state, which torch passes on as it is."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


def _shield(optimizer: FusedAdamW, state_dict: dict[str, Any]) -> dict[str, Any]:
    known = {key for group in state_dict["param_groups"] for key in group["params"]}
    return {**state_dict, "state": {key: _Saved(s) for key, s in state_dict["state"].items() if key in known}}


def _on_device(number: float | torch.Tensor) -> float | torch.Tensor:
    """A tensor on the host is read here, where that costs nothing; one on a device there, as a float32 scalar."""
    if not isinstance(number, torch.Tensor):
        return float(number)
    return number.item() if number.device.type == "cpu" else number.float()


def _pair_up(params: list[torch.Tensor], ema: Iterable[torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    ema = [ema] if isinstance(ema, torch.Tensor) else list(ema)
    if len(ema) != len(params):
        raise ValueError(f"ema: needs {len(params)} tensors, one for each parameter in their order, got {len(ema)}")
    for i, (p, average) in enumerate(zip(params, ema)):
        if not isinstance(average, torch.Tensor):
            raise TypeError(f"ema[{i}]: expected a tensor, got {type(average).__name__}")
        if not alike(average, p):
            raise ValueError(f"ema[{i}]: is {_sharding(average)}, its parameter {_sharding(p)}")
        if average.shape != p.shape:
            raise ValueError(f"ema[{i}]: shape {tuple(average.shape)}, its parameter has {tuple(p.shape)}")
        if average.device != p.device:
            raise ValueError(f"ema[{i}]: lies on {average.device}, its parameter on {p.device}")
        wide = states.wide_dtype(p)
        if average.dtype != wide:
            raise TypeError(
                f"ema[{i}]: {average.dtype} of a parameter in {p.dtype}, needs {wide}: with a decay near 1 an average "
                "of fewer bits does not move"
            )
        if average is p or (_place(local(average)) == _place(local(p)) and local(p).numel()):
            raise ValueError(f"ema[{i}]: is its parameter's own memory, needs a copy")
    return dict(zip(params, ema))


def _sharding(t: torch.Tensor) -> str:
    return f"sharded as {t.placements} over {t.device_mesh.size()} processes" if is_sharded(t) else "whole"


def _place(t: torch.Tensor) -> tuple[int, int]:
    """Where a tensor's first element lies; fake tensors, which have no addresses, have this."""
    return t.untyped_storage()._cdata, t.storage_offset()


def _check_group(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: a tensor must have one element, got shape {tuple(lr.shape)}")
    on_device = isinstance(lr, torch.Tensor) and lr.device.type != "cpu"  # not read: that would wait for the device
    if not on_device and not lr >= 0.0:
        raise ValueError(f"lr={float(lr)!r}: must be at least 0")
    if len(betas) != 2 or any(isinstance(beta, torch.Tensor) for beta in betas):
        raise TypeError(f"betas={betas!r}: must be two floats")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={tuple(betas)!r}: each must be at least 0 and below 1")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name}={group[name]!r}: must be at least 0")
    if group["amsgrad"]:
        raise ValueError("amsgrad=True: is not fused; use torch.optim.AdamW(amsgrad=True, fused=True)")


def _check_param(p: torch.Tensor, name: str) -> None:
    if is_traceable_wrapper_subclass(local(p)):
        raise TypeError(
            f"{name}: a {type(local(p)).__name__} has no single memory to sweep over; use "
            "torch.optim.AdamW(fused=True) and torch.nn.utils.clip_grad_norm_"
        )
    if p.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {p.dtype}")


def _check_grad(p: torch.Tensor, grad: torch.Tensor, i: int) -> None:
    if is_traceable_wrapper_subclass(local(p)):
        _check_param(p, f"params[{i}]")
    if not alike(grad, p):
        raise TypeError(f"gradient of params[{i}]: is {_sharding(grad)}, its parameter {_sharding(p)}")
    if grad.layout != torch.strided:
        raise TypeError(f"gradient of params[{i}]: expected a dense tensor, got layout {grad.layout}")
    if grad.dtype != p.dtype:
        raise TypeError(f"gradient of params[{i}]: {grad.dtype}, its parameter is {p.dtype}")


def _check_devices(grads: list[torch.Tensor]) -> None:
    devices = {g.device for g in grads}
    if len(devices) > 1:
        raise ValueError(
            f"params: must lie on one device, got {', '.join(sorted(map(str, devices)))}; use an optimiser for each, "
            "and torch.nn.utils.clip_grad_norm_ over all in place of max_grad_norm"
        )
