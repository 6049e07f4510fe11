"""Pipelines with random weights: pictures, repeatable weights, the published schedulers."""

import numpy as np
import pytest
import torch
from fastdistill.training import Teacher

from fastdistill.models import ARCHITECTURES, ModelError, build

SMALL = [name for name in ARCHITECTURES if name.endswith("-tiny")]
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def weights_of(pipeline):
    parts = {name: getattr(pipeline, name, None) for name in NETWORKS}
    return {f"{p}.{n}": w for p, part in parts.items() if part is not None for n, w in part.state_dict().items()}


def picture(pipeline, prompt, steps=2):
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=steps, generator=generator, output_type="np").images


@pytest.mark.parametrize("name", SMALL)
def test_a_small_pipeline_makes_pictures_of_prompts(name):
    pipeline = build(name)
    image = picture(pipeline, "a photo of a cat")
    height, width = ARCHITECTURES[name].resolution
    assert image.shape == (1, height, width, 3)
    assert np.isfinite(image).all()
    assert 0.1 < image.std() < 0.45
    assert np.abs(image - picture(pipeline, "a seven")).mean() > 0.005, "the prompt shows"
    assert np.array_equal(image, picture(build(name), "a photo of a cat"))


def test_the_seed_decides_the_weights():
    first, same, other = (
        weights_of(build("sdxl-tiny")),
        weights_of(build("sdxl-tiny")),
        weights_of(build("sdxl-tiny", seed=1)),
    )
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    assert all(torch.equal(weight, other[name]) == ("position_ids" in name) for name, weight in first.items())


def test_networks_do_not_share_their_draws():
    pipeline = build("sdxl-tiny")
    first, second = (each.get_input_embeddings().weight for each in (pipeline.text_encoder, pipeline.text_encoder_2))
    assert not torch.equal(first.flatten()[:100], second.flatten()[:100])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_rounds_the_same_weights(dtype):
    exact, rounded = weights_of(build("sd21-tiny", seed=3)), weights_of(build("sd21-tiny", seed=3, dtype=dtype))
    for name, weight in rounded.items():
        assert torch.equal(weight, exact[name].to(weight.dtype)), name
    assert {weight.dtype for weight in rounded.values() if weight.is_floating_point()} == {dtype}


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    build("sd15-tiny")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["sd15-tiny", "sdxl-tiny"])
def test_every_weight_matters_and_half_precision_suffices(name):
    """Activations of order one: no branch is lost in another's rounding, and none overflows."""
    teacher = Teacher(build(name))
    condition = teacher.encode(["a cat", "seven"])
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids} if teacher.is_sdxl else {}
    noise, t = torch.randn(2, *teacher.sample_shape), torch.tensor([999, 500])

    def predict(dtype):
        teacher.unet.to(dtype)
        inputs = {key: value.to(dtype) for key, value in added.items()}
        return teacher.unet(noise.to(dtype), t, condition.states.to(dtype), added_cond_kwargs=inputs).sample.float()

    exact = predict(torch.float32)
    assert 0.3 < exact.std() < 1.5
    assert 0.3 < teacher.decode(noise).std() < 1.5
    assert (predict(torch.float16) - exact).norm() < 0.01 * exact.norm()
    teacher.unet.float()
    for weight in teacher.unet.parameters():
        weight.requires_grad_(True)
    loss = (predict(torch.float32) * noise).sum()
    gradients = torch.autograd.grad(loss, list(teacher.unet.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_pipeline_is_a_teacher(name):
    teacher = Teacher(build(name))
    condition, architecture = teacher.encode(["a cat", "a dog"]), ARCHITECTURES[name]
    assert teacher.sample_shape == architecture.sample_shape
    assert teacher.prediction_type == "epsilon"
    assert condition.states.shape == (2, architecture.text_tokens, architecture.text_width)
    assert not torch.equal(condition.states[0], condition.states[1])
    # 0.00085 and 0.012 are the squares of the ends of a line.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0).sqrt()
    torch.testing.assert_close(teacher.schedule.at(torch.tensor([999]))[0].double(), alpha[999:], rtol=1e-5, atol=0)
    if teacher.is_sdxl:
        assert condition.pooled.shape == (2, architecture.pooled_width)
        assert teacher.unconditional.states.abs().max() == 0


@pytest.mark.parametrize(
    ("name", "scheduler", "one", "four"),
    [
        ("sd-turbo-tiny", "EulerDiscreteScheduler", [999], [999, 749, 499, 249]),
        ("sdxl-turbo-tiny", "EulerAncestralDiscreteScheduler", [999], [999, 749, 499, 249]),
        ("sdxl-tiny", "EulerDiscreteScheduler", [1], [751, 501, 251, 1]),
    ],
)
def test_turbo_schedulers_start_from_the_last_timestep(name, scheduler, one, four):
    found = build(name).scheduler
    assert type(found).__name__ == scheduler
    for timesteps in (one, four):
        found.set_timesteps(len(timesteps))
        assert found.timesteps.tolist() == timesteps


def test_a_scheduler_made_from_the_published_one_does_not_clip():
    from diffusers import DDIMScheduler

    config = DDIMScheduler.from_config(build("sd15-tiny").scheduler.config).config
    assert not config.clip_sample
    assert not config.set_alpha_to_one
    assert config.steps_offset == 1


def test_sdxl_is_whole():
    pipeline = build("sdxl", device="meta")
    assert pipeline.vae.config.scaling_factor == 0.13025
    assert pipeline.vae.config.force_upcast
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.watermark is None
    ids = [each("a cat", padding="max_length").input_ids[:6] for each in (pipeline.tokenizer, pipeline.tokenizer_2)]
    assert ids == [[49406, 320, 2368, 49407, 49407, 49407], [49406, 320, 2368, 49407, 0, 0]]


def test_other_weights_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"weights='laion': needed \"random\"; none come .* load_pipeline"):
        build("sd15", weights="laion")
    with pytest.raises(ModelError, match="unknown architecture 'sd21-base'; known: sd21"):
        build("sd21-base")
