"""Teachers small enough to know the answer: Gaussians in closed form, and a pipeline of random weights."""

import torch
from fastdistill.training import Condition
from torch import nn

from fastdistill import diffusion


class GaussianNetwork(nn.Module):
    """Predicts x0 as the exact denoiser of N(mean, std^2), except at the last timestep, where it is `gain * x + bias`.

    So the same class is an exact teacher, a fake score that can follow any Gaussian student, and a one-step generator
    of N(bias, gain^2).
    """

    def __init__(self, mean, std, gain, bias, schedule):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())
        self.gain = nn.Parameter(torch.tensor(gain))
        self.bias = nn.Parameter(torch.tensor(bias))
        self.schedule = schedule
        self.calls = 0

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        self.calls += 1
        alpha, sigma = (value[:, None] for value in self.schedule.at(t))
        variance = (2 * self.log_std).exp()
        exact = self.mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * self.mean)
        first_step = (t == len(self.schedule) - 1)[:, None]
        return (torch.where(first_step, self.gain * x_t + self.bias, exact),)


TARGET_MEAN, TARGET_STD = (2.0, -1.0), (0.5, 1.0)
CONDITIONS = Condition(torch.zeros(1, 1, 1))


def gaussian_teacher():
    """A teacher of N((2, -1), diag(0.25, 1)) in two dimensions whose own one step is far off: N((-1, 1), 0.2^2)."""
    schedule = diffusion.scaled_linear(zero_terminal_snr=True)
    return GaussianNetwork(TARGET_MEAN, TARGET_STD, (0.2, 0.2), (-1.0, 1.0), schedule), schedule


def tiny_pipeline(scheduler=None):
    """A Stable Diffusion pipeline of the digits' shapes, its networks random and its UNet tiny."""
    from diffusers import UNet2DConditionModel

    from fastdistill.models.digits import folder, networks, text

    torch.manual_seed(0)
    tokenizer = text.build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=networks.TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return folder.assemble(
        networks.build_vae(),
        tokenizer,
        networks.build_text_encoder(tokenizer).eval(),
        unet,
        scheduler or networks.build_scheduler(),
    )
