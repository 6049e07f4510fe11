"""Distribution matching distillation (arXiv 2311.18828) over fastdistill's fused losses and optimiser.

`dmd_plain.py` beside it is the same loop in plain PyTorch; `diff` shows what was swapped.
"""

import math

import torch
from torch import nn

from fastdistill.losses import denoising_loss, dmd_loss
from fastdistill.optim import FusedAdamW

ANGLES = torch.arange(8) * (math.tau / 8)
CENTRES, DEVIATION = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1), 0.1


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))


def predict(net: nn.Module, x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return net(torch.cat([x_t, sigma[:, None]], dim=1))


def teacher(x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The noise that the exact denoiser of the mixture finds in x_t."""
    alpha, sigma = alpha[:, None], sigma[:, None]
    variance = alpha**2 * DEVIATION**2 + sigma**2
    away = x_t[:, None] - alpha[:, None] * CENTRES  # (B, 8, 2)
    share = torch.softmax(-away.square().sum(2) / (2 * variance), dim=1)
    return sigma * (share[:, :, None] * away).sum(1) / variance


def train(updates: int, batch: int = 256) -> tuple[list[tuple[float, float]], list[torch.Tensor]]:
    """(loss of the student, loss of the fake score) of every update, and the averaged student."""
    torch.manual_seed(0)
    student, fake = network(), network()
    ema = [p.detach().clone() for p in student.parameters()]
    settings = {"lr": 1e-3, "betas": (0.0, 0.999), "max_grad_norm": 1.0}
    student_adam = FusedAdamW(student.parameters(), ema=ema, ema_decay=0.99, **settings)
    fake_adam = FusedAdamW(fake.parameters(), **settings)
    losses = []
    for _ in range(updates):
        angle = (0.02 + 0.96 * torch.rand(batch)) * (math.pi / 2)
        alpha, sigma = angle.cos(), angle.sin()
        x = predict(student, torch.randn(batch, 2), torch.ones(batch))
        with torch.no_grad():
            x_t = alpha[:, None] * x + sigma[:, None] * torch.randn_like(x)
            pred_real, pred_fake = teacher(x_t, alpha, sigma), predict(fake, x_t, sigma)
        loss = dmd_loss(x, x_t, pred_real, pred_fake, alpha, sigma)
        student_adam.zero_grad()
        loss.backward()
        student_adam.step()

        x, noise = x.detach(), torch.randn_like(x)
        x_t = alpha[:, None] * x + sigma[:, None] * noise
        fake_loss = denoising_loss(predict(fake, x_t, sigma), x, noise, alpha, sigma)
        fake_adam.zero_grad()
        fake_loss.backward()
        fake_adam.step()
        losses.append((loss.item(), fake_loss.item()))
    return losses, ema


if __name__ == "__main__":
    for update, (loss, fake_loss) in enumerate(train(50)[0]):
        print(f"{update:3d}  student {loss:.6f}  fake score {fake_loss:.6f}")
