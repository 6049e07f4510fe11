"""Distribution matching distillation (arXiv 2311.18828) over fastdistill's fused losses and optimiser.

`dmd_plain.py` beside it is the same loop in plain PyTorch; `diff` shows what was swapped.
"""

import torch
from torch import nn

from fastdistill.losses import denoising_loss, dmd_loss
from fastdistill.optim import FusedAdamW

CENTRES, DEVIATION = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 0.5


def network() -> nn.Sequential:
    conv = nn.Conv2d
    return nn.Sequential(conv(5, 32, 3, 1, 1), nn.SiLU(), conv(32, 32, 3, 1, 1), nn.SiLU(), conv(32, 4, 3, 1, 1))


def predict(net: nn.Module, x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return net(torch.cat([x_t, sigma.expand_as(x_t[:, :1])], dim=1))


def teacher(x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The noise that the exact denoiser of the mixture finds in x_t (B, 4, 8, 8)."""
    variance = alpha**2 * DEVIATION**2 + sigma**2
    away = x_t[:, None] - alpha[:, None] * CENTRES  # (B, 8, 4, 8, 8)
    share = torch.softmax(-away.square().sum((2, 3, 4)) / (2 * variance.flatten(1)), dim=1)
    return sigma * (share[:, :, None, None, None] * away).sum(1) / variance


def train(updates: int, batch: int = 16) -> tuple[list[tuple[float, float]], list[torch.Tensor]]:
    """(loss of the student, loss of the fake score) of every update, and the averaged student."""
    torch.manual_seed(0)
    student, fake = network(), network()
    ema = [p.detach().clone() for p in student.parameters()]
    student_adam = FusedAdamW(student.parameters(), lr=1e-3, max_grad_norm=1.0, ema=ema, ema_decay=0.99)
    fake_adam = FusedAdamW(fake.parameters(), lr=1e-3, max_grad_norm=1.0)
    losses = []
    for _ in range(updates):
        alpha = 0.02 + 0.96 * torch.rand(batch, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        x = predict(student, torch.randn(batch, 4, 8, 8), torch.ones_like(sigma))
        with torch.no_grad():
            x_t = alpha * x + sigma * torch.randn_like(x)
            pred_real, pred_fake = teacher(x_t, alpha, sigma), predict(fake, x_t, sigma)
        loss = dmd_loss(x, x_t, pred_real, pred_fake, alpha.flatten(), sigma.flatten())
        student_adam.zero_grad()
        loss.backward()
        student_adam.step()

        x, noise = x.detach(), torch.randn_like(x)
        pred = predict(fake, alpha * x + sigma * noise, sigma)
        fake_loss = denoising_loss(pred, x, noise, alpha.flatten(), sigma.flatten())
        fake_adam.zero_grad()
        fake_loss.backward()
        fake_adam.step()
        losses.append((loss.item(), fake_loss.item()))
    return losses, ema


if __name__ == "__main__":
    for update, (loss, fake_loss) in enumerate(train(50)[0]):
        print(f"{update:3d}  student {loss:.6f}  fake score {fake_loss:.6f}")
