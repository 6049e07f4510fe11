"""Distribution matching distillation (arXiv 2311.18828) in plain PyTorch, on a ring of eight Gaussians.

`dmd_fused.py` beside it is the same loop over fastdistill's fused losses and optimiser; `diff` shows what was swapped.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

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
    student_adam = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.0, 0.999))
    fake_adam = torch.optim.AdamW(fake.parameters(), lr=1e-3, betas=(0.0, 0.999))
    losses = []
    for _ in range(updates):
        angle = (0.02 + 0.96 * torch.rand(batch)) * (math.pi / 2)
        alpha, sigma = angle.cos(), angle.sin()
        x = predict(student, torch.randn(batch, 2), torch.ones(batch))
        with torch.no_grad():
            x_t = alpha[:, None] * x + sigma[:, None] * torch.randn_like(x)
            pred_real, pred_fake = teacher(x_t, alpha, sigma), predict(fake, x_t, sigma)
            mu_real = (x_t - sigma[:, None] * pred_real) / alpha[:, None]
            mu_fake = (x_t - sigma[:, None] * pred_fake) / alpha[:, None]
            normaliser = (x - mu_real).abs().mean(dim=1, keepdim=True)
            gradient = torch.nan_to_num(((x - mu_real) - (x - mu_fake)) / normaliser)
        loss = 0.5 * F.mse_loss(x, (x - gradient).detach())
        student_adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        student_adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, list(student.parameters()), 1 - 0.99)

        x, noise = x.detach(), torch.randn_like(x)
        x_t = alpha[:, None] * x + sigma[:, None] * noise
        fake_loss = F.mse_loss(predict(fake, x_t, sigma), noise)
        fake_adam.zero_grad()
        fake_loss.backward()
        nn.utils.clip_grad_norm_(fake.parameters(), 1.0)
        fake_adam.step()
        losses.append((loss.item(), fake_loss.item()))
    return losses, ema


if __name__ == "__main__":
    for update, (loss, fake_loss) in enumerate(train(50)[0]):
        print(f"{update:3d}  student {loss:.6f}  fake score {fake_loss:.6f}")
