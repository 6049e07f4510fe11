"""Parameters and their states for the tests of adamw: random, of every size that matters, in memory full of NaN."""

import copy

import torch

from fastdistill.ops import eight_bit
from fastdistill.ops.adamw import Batch

# One element, less than a warp, a block of 8 bits and its neighbours, a chunk of the CPU's and of CUDA's and beyond.
SIZES = [1, 31, 255, 256, 257, 2000, 16384, 16385, 33000]


def in_nan(t, offset):
    """t at an address `offset` elements past a multiple of 16 bytes, with NaN before and behind."""
    whole = t.is_floating_point()
    memory = torch.full((t.numel() + offset + 40,), float("nan") if whole else 255, dtype=t.dtype, device=t.device)
    return memory[offset : offset + t.numel()].view(t.shape).copy_(t)


def random_batch(dtype=torch.float32, bits=32, ema=True, sizes=SIZES, offset=0, device="cpu", step=3):
    """Of parameters that have been stepped `step` times."""
    batch = Batch()
    for n in sizes:
        p = torch.randn(n).to(dtype)
        m, v = torch.randn(n) * 1e-2, torch.rand(n) * 1e-3
        count = torch.tensor(float(step))
        batch.params.append(p)
        batch.grads.append((torch.randn(n) * 10.0 ** torch.randint(-4, 1, (n,))).to(dtype))
        batch.steps.append(count)
        if dtype != torch.float32:
            batch.masters.append(p.float() + 1e-4 * torch.randn(n))
        if ema:
            batch.emas.append(torch.randn(n))
        if bits == 8:
            first, second = eight_bit.encode(m, step, second=False), eight_bit.encode(v, step, second=True)
            m, v = first[0], second[0]
            batch.scales.append(torch.stack([first[1], second[1]]))
        batch.exp_avgs.append(m)
        batch.exp_avg_sqs.append(v)
    for name, tensors in vars(batch).items():
        setattr(batch, name, [in_nan(t.to(device), 0 if name in ("steps", "scales") else offset) for t in tensors])
    return batch


def clone(batch, dtype=None):
    """A deep copy; `dtype`: of its floating-point tensors but 8-bit scales and steps."""
    batch = copy.deepcopy(batch)
    if dtype is not None:
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters", "emas"):
            setattr(batch, name, [t.to(dtype) if t.is_floating_point() else t for t in getattr(batch, name)])
    return batch


def exact(batch, norm, factors, bits=32):
    """What a step gives in float64, as (values, first moments, second moments, averages) per tensor."""
    results = []
    clip = min(1.0, factors.max_grad_norm / (norm + 1e-6)) * (-1.0 if factors.maximize else 1.0)
    beta1, beta2 = factors.betas
    for i, p in enumerate(batch.params):
        p = (batch.masters[i] if batch.masters else p).double()
        m, v = batch.exp_avgs[i], batch.exp_avg_sqs[i]
        if bits == 8:
            m = eight_bit.decode(m, batch.scales[i][0], second=False)
            v = eight_bit.decode(v, batch.scales[i][1], second=True)
        g, t = batch.grads[i].double() * clip, batch.steps[i].item() + 1
        m = beta1 * m.double() + (1 - beta1) * g
        v = beta2 * v.double() + (1 - beta2) * g * g
        p = p * (1 - factors.lr * factors.weight_decay)
        p = p - factors.lr / (1 - beta1**t) * m / ((v / (1 - beta2**t)).sqrt() + factors.eps)
        a = batch.emas[i].double() if batch.emas else p
        results.append((p, m, v, a + (1 - factors.ema_decay) * (p - a)))
    return results


def check_step(before, after, norm, factors, bits=32):
    """`after` against float64, to float32 rounding; 8-bit moments to their spacing."""
    for i, (p, m, v, a) in enumerate(exact(before, norm, factors, bits)):
        values = after.masters[i] if after.masters else after.params[i]
        close(values, p)
        torch.testing.assert_close(after.params[i], values.to(after.params[i].dtype), rtol=0, atol=0)
        if after.emas:
            close(after.emas[i], a)
        assert after.steps[i] == before.steps[i] + 1
        if bits == 8:
            for row, (codes, value) in enumerate(((after.exp_avgs[i], m), (after.exp_avg_sqs[i], v))):
                check_codes(codes, after.scales[i][row], value, second=row == 1)
        else:
            close(after.exp_avgs[i], m)
            close(after.exp_avg_sqs[i], v)


def close(ours, exact):
    bound = 4e-7 * (exact.abs() + exact.abs().max().clamp(max=1.0))
    assert ((ours.double() - exact).abs() <= bound).all()


def check_codes(codes, scales, exact, *, second):
    """The stated bound of a step, and no bias."""
    decoded = eight_bit.decode(codes, scales, second=second).double()
    largest = torch.nn.functional.pad(exact.abs(), (0, -exact.numel() % 256)).view(-1, 256).amax(1)
    torch.testing.assert_close(scales.double(), largest, rtol=1e-6, atol=0)
    floor = largest.repeat_interleave(256)[: exact.numel()] * (
        eight_bit.SECOND_SMALLEST if second else eight_bit.FIRST_SMALLEST
    )
    error = (decoded - exact).abs()
    assert (error <= torch.maximum(exact.abs() / 8, floor) * (1 + 1e-5)).all()
    if second:
        assert ((decoded > 0) == (exact > 0)).all()
    if exact.numel() > 10000:
        shares = ((decoded - exact) / exact)[exact.abs() > floor]
        assert shares.mean().abs() < 0.003
