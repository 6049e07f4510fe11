"""dmd_loss against the formula, the Gaussian closed form, and the cases that break public implementations."""

import pytest
import torch

from fastdistill import diffusion
from fastdistill.losses import dmd_gradient, dmd_loss


def batch(shape=(3, 4, 5, 7), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, noise, real, fake, uncond = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5)
    )
    t = torch.linspace(20, 980, shape[0]).long()
    alpha, sigma = diffusion.scaled_linear(dtype=torch.float64).at(t)
    return x, diffusion.add_noise(x, noise, alpha, sigma), real, fake, uncond, alpha, sigma


def textbook(x, mu_real, mu_fake):
    p_real, p_fake = x - mu_real, x - mu_fake
    return (p_real - p_fake) / p_real.abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 4, 5, 7), (2, 4, 3, 5, 2), (5, 2)])
def test_gradient_is_the_papers_formula(prediction_type, shape):
    x, x_t, real, fake, uncond, alpha, sigma = batch(shape)
    gradient = dmd_gradient(
        x, x_t, real, fake, alpha, sigma,
        pred_real_uncond=uncond, guidance_scale=3.0, prediction_type=prediction_type,
    )  # fmt: skip
    mu_real = diffusion.to_data(uncond + 3.0 * (real - uncond), x_t, alpha, sigma, prediction_type)
    mu_fake = diffusion.to_data(fake, x_t, alpha, sigma, prediction_type)
    torch.testing.assert_close(gradient, textbook(x, mu_real, mu_fake))


def test_loss_has_the_value_and_gradient_of_half_the_mse_to_a_constant():
    x, x_t, real, fake, _, alpha, sigma = batch()
    g = dmd_gradient(x, x_t, real, fake, alpha, sigma)
    plain = x.clone().requires_grad_()
    (0.5 * torch.nn.functional.mse_loss(plain, (plain - g).detach())).backward()
    x.requires_grad_()
    loss = dmd_loss(x, x_t, real, fake, alpha, sigma)
    (3 * loss).backward()
    torch.testing.assert_close(loss, 0.5 * g.square().mean())
    torch.testing.assert_close(x.grad, 3 * plain.grad)
    torch.testing.assert_close(x.grad, 3 * g / g.numel(), rtol=1e-14, atol=0)


def test_only_x_receives_a_gradient():
    x, x_t, real, fake, uncond, alpha, sigma = (value.requires_grad_() for value in batch())
    dmd_loss(
        x, x_t, real, fake, alpha, sigma, pred_real_uncond=uncond, guidance_scale=2.0, prediction_type="v_prediction"
    ).backward()
    assert x.grad.abs().sum() > 0
    assert all(value.grad is None for value in (x_t, real, fake, uncond, alpha, sigma))


def test_equal_predictions_give_exactly_nothing():
    x, x_t, real, _, _, alpha, sigma = batch(dtype=torch.float32)
    x.requires_grad_()
    loss, stats = dmd_loss(x, x_t, real, real, alpha, sigma, return_stats=True)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.abs().max() == 0
    assert stats.guarded.item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_sample_that_equals_the_teachers_prediction_contributes_nothing_and_is_counted(dtype):
    x, x_t, real, fake, _, alpha, sigma = batch(dtype=dtype)
    real[1] = x[1]
    x.requires_grad_()
    loss, stats = dmd_loss(x, x_t, real, fake, alpha, sigma, prediction_type="sample", return_stats=True)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert x.grad[1].abs().max() == 0
    assert x.grad[0].abs().max() > 0
    assert stats.guarded.item() == x[1].numel()
    assert stats.normaliser[1].item() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_predictions_are_zeroed_and_counted(bad):
    x, x_t, real, fake, _, alpha, sigma = batch(dtype=torch.float32)
    clean = dmd_gradient(x, x_t, real, fake, alpha, sigma, prediction_type="sample")
    fake[0, 1, 2, 3] = bad  # spoils one element
    real[2, 0, 0, 0] = bad  # spoils its sample's normaliser
    gradient, stats = dmd_gradient(x, x_t, real, fake, alpha, sigma, prediction_type="sample", return_stats=True)
    clean[0, 1, 2, 3] = 0
    clean[2] = 0
    torch.testing.assert_close(gradient, clean, rtol=0, atol=0)
    assert stats.guarded.item() == 1 + x[2].numel()
    torch.testing.assert_close(stats.grad_abs_mean, gradient.abs().mean())


def test_the_normaliser_belongs_to_each_sample():
    x, x_t, real, fake, _, alpha, sigma = batch()
    together = dmd_gradient(x, x_t, real, fake, alpha, sigma)
    alone = torch.cat([dmd_gradient(*(v[i : i + 1] for v in (x, x_t, real, fake, alpha, sigma))) for i in range(3)])
    torch.testing.assert_close(together, alone)
    _, stats = dmd_gradient(x, x_t, real, fake, alpha, sigma, return_stats=True)
    mu_real = diffusion.to_data(real, x_t, alpha, sigma)
    torch.testing.assert_close(stats.normaliser, (x - mu_real).abs().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_give_the_float32_gradient(dtype):
    inputs = batch(dtype=dtype)
    x, x_t, real, fake, _, alpha, sigma = inputs
    x, x_t, real, fake = (1e4 * value for value in (x, x_t, real, fake))  # squares overflow float16
    loss, stats = dmd_loss(x, x_t, real, fake, alpha, sigma, return_stats=True)
    exact = dmd_loss(x.double(), x_t.double(), real.double(), fake.double(), alpha, sigma)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert stats.guarded.item() == 0


def test_gaussian_closed_form_moves_the_student_to_the_target_mean():
    """Real N(m, s^2), fake N(m', s^2): both optimal denoisers are known, so the fake score needs no training."""
    target, std = 2.0, 0.5
    mean = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    schedule = diffusion.scaled_linear(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def denoise(x_t, alpha, sigma, mean):
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain[:, None] * (x_t - alpha[:, None] * mean)

    optimiser = torch.optim.SGD([mean], lr=0.2)
    distances = [abs(mean.item() - target)]
    for _ in range(60):
        z, noise = torch.randn(2, 256, 1, generator=generator, dtype=torch.float64)
        x = mean + std * z
        alpha, sigma = schedule.at(torch.randint(20, 980, (256,), generator=generator))
        x_t = diffusion.add_noise(x.detach(), noise, alpha, sigma)
        mu_real = denoise(x_t, alpha, sigma, target)
        mu_fake = denoise(x_t, alpha, sigma, mean.detach())
        optimiser.zero_grad()
        dmd_loss(x, x_t, mu_real, mu_fake, alpha, sigma, prediction_type="sample").backward()
        optimiser.step()
        distances.append(abs(mean.item() - target))
    assert distances[1] < distances[0]
    assert distances[-1] < 0.02


def test_an_empty_batch_gives_zero():
    x = torch.zeros(0, 4, 8, 8, requires_grad=True)
    loss = dmd_loss(x, x, x, x, torch.ones(0), torch.ones(0))
    loss.backward()
    assert loss.item() == 0


def test_the_loss_compiles_without_graph_breaks():
    x, x_t, real, fake, uncond, alpha, sigma = batch(dtype=torch.float32)

    def loss(x):
        return dmd_loss(x, x_t, real, fake, alpha, sigma, pred_real_uncond=uncond, guidance_scale=2.0)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x.requires_grad_()), loss(x))


def test_bad_input_names_the_argument_the_value_and_the_need():
    x, x_t, real, fake, _, alpha, sigma = batch()
    with pytest.raises(ValueError, match=r"pred_fake must have the shape of x, \(3, 4, 5, 7\); got \(2, 4, 5, 7\)"):
        dmd_loss(x, x_t, real, fake[:2], alpha, sigma)
    with pytest.raises(ValueError, match=r"guidance_scale 2\.0 needs pred_real_uncond"):
        dmd_loss(x, x_t, real, fake, alpha, sigma, guidance_scale=2.0)
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon"):
        dmd_loss(x, x_t, real, fake, alpha, sigma, prediction_type="eps")
    with pytest.raises(ValueError, match=r"alpha must be a number or of shape \(3,\)"):
        dmd_loss(x, x_t, real, fake, alpha[:2], sigma)
    with pytest.raises(ValueError, match="alpha = 0"):
        dmd_loss(x, x_t, real, fake, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"x must be floating point; got torch\.int64"):
        dmd_loss(x.long(), x_t, real, fake, alpha, sigma)
    with pytest.raises(ValueError, match="at least one dimension per sample"):
        dmd_loss(x.flatten(), x.flatten(), x.flatten(), x.flatten(), 1.0, 1.0)
    with pytest.raises(TypeError, match="pred_real must be a tensor; got NoneType"):
        dmd_loss(x, x_t, None, fake, alpha, sigma)
