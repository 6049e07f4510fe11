"""`OneStepPipeline` as a user calls it, against diffusers running the same folder."""

import itertools
import threading

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, LCMScheduler
from PIL import Image

from fastdistill.engine import PASSES, EngineReport, OneStepPipeline
from fastdistill.models import ModelError

from .conftest import build_unet, build_vae
from .test_sampling import SD

PROMPTS = ["a handwritten seven", "three", "the digit 9"]


@pytest.fixture(scope="module")
def pipe(folder):
    return OneStepPipeline.from_pretrained(folder, device="cpu")


def by_diffusers(pipeline, prompts, seed=0, **options):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np", **options}
    return pipeline(prompts, generator=generators, **options).images


@pytest.mark.parametrize("passes", [None, ()], ids=["all passes", "no pass"])
@pytest.mark.parametrize("steps", [1, 4])
def test_images_are_those_of_diffusers_within_float32_rounding(diffusers_pipeline, steps, passes):
    engine = OneStepPipeline(diffusers_pipeline, device="cpu", passes=passes)
    exact = by_diffusers(diffusers_pipeline, PROMPTS, seed=3, num_inference_steps=steps)
    images = engine(PROMPTS, seed=3, steps=steps, output="np")
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == np.float32
    assert images.std() > 0.05
    assert np.abs(images - exact).max() < 2e-5


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
        EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
        LCMScheduler(**SD),
    ],
    ids=["Euler trailing", "Euler leading", "LCM"],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_other_schedulers_give_the_images_of_diffusers_too(make_pipeline, scheduler, steps):
    pipeline = make_pipeline(scheduler)
    exact = by_diffusers(pipeline, PROMPTS, num_inference_steps=steps)
    images = OneStepPipeline(pipeline, device="cpu")(PROMPTS, steps=steps, output="np")
    assert np.abs(images - exact).max() < 1e-4  # epsilon at t = 999 is amplified 14.65 times


@pytest.mark.parametrize("negative", [None, "one", ["one", "two", "four"]], ids=["none", "one for all", "one each"])
def test_guidance_is_that_of_diffusers(diffusers_pipeline, pipe, negative):
    theirs = [negative] * 3 if isinstance(negative, str) else negative
    exact = by_diffusers(diffusers_pipeline, PROMPTS, guidance_scale=4.0, negative_prompt=theirs, num_inference_steps=2)
    images = pipe(PROMPTS, guidance_scale=4.0, negative_prompt=negative, steps=2, output="np")
    assert np.abs(images - exact).max() < 5e-5
    assert np.abs(images - pipe(PROMPTS, steps=2, output="np")).max() > 0.05


def test_passes_change_no_image_in_float64(diffusers_pipeline):
    def generate(passes):
        engine = OneStepPipeline(diffusers_pipeline, device="cpu", dtype=torch.float64, passes=passes)
        return engine(PROMPTS, steps=2, guidance_scale=3, output="np")

    plain = generate(())
    assert plain.dtype == np.float64
    for passes in (None, *([name] for name in PASSES)):
        assert np.abs(generate(passes) - plain).max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_images_are_near_those_of_float32(diffusers_pipeline, pipe, dtype):
    images = OneStepPipeline(diffusers_pipeline, device="cpu", dtype=dtype)(PROMPTS, output="np")
    assert images.dtype == np.float32
    assert np.abs(images - pipe(PROMPTS, output="np")).mean() < 0.02


@pytest.mark.parametrize("size", [24, (8, 32)])
def test_another_size_is_that_of_diffusers(diffusers_pipeline, pipe, size):
    height, width = (size, size) if isinstance(size, int) else size
    exact = by_diffusers(diffusers_pipeline, PROMPTS, height=height, width=width)
    images = pipe(PROMPTS, size=size, output="np")
    assert images.shape == (3, height, width, 3)
    assert np.abs(images - exact).max() < 2e-5


def test_the_three_outputs_are_one_image(pipe):
    array = pipe(PROMPTS, output="np")
    tensor = pipe(PROMPTS, output="pt")
    pictures = pipe(PROMPTS)
    assert tensor.shape == (3, 3, 16, 16)
    assert not tensor.is_inference()
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert all(isinstance(picture, Image.Image) and picture.mode == "RGB" for picture in pictures)
    np.testing.assert_array_equal(np.stack(pictures), np.rint(array * 255).astype(np.uint8))


def test_one_prompt_may_be_a_string(pipe):
    np.testing.assert_array_equal(pipe("three", output="np"), pipe(["three"], output="np"))


def test_the_same_call_gives_the_same_bytes_whatever_was_called_before(folder, pipe):
    first = pipe(PROMPTS, seed=5, output="np")
    pipe([*PROMPTS[::-1], "four"], steps=2, guidance_scale=2, output="np")
    np.testing.assert_array_equal(pipe(PROMPTS, seed=5, output="np"), first)
    pipe.forget_prompts()
    pipe([PROMPTS[1]])  # now this prompt is cached and the others are not
    np.testing.assert_array_equal(pipe(PROMPTS, seed=5, output="np"), first)
    fresh = OneStepPipeline.from_pretrained(folder, device="cpu")
    np.testing.assert_array_equal(fresh(PROMPTS, seed=5, output="np"), first)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_image_does_not_depend_on_its_batch(make_pipeline, steps):
    for scheduler in (None, LCMScheduler(**SD)):
        engine = OneStepPipeline(make_pipeline(scheduler), device="cpu")
        together = engine(PROMPTS, seed=[7, 1, 2**40], steps=steps, output="np")
        alone = [engine(p, seed=s, steps=steps, output="np")[0] for p, s in zip(PROMPTS, (7, 1, 2**40))]
        assert np.abs(together - np.stack(alone)).max() < 1 / 255


def test_image_i_starts_from_seed_plus_i(pipe):
    images = pipe(["three"] * 3, seed=11, output="np")
    assert np.abs(images[0] - images[1]).max() > 0.05
    np.testing.assert_array_equal(pipe(["three"] * 3, seed=[11, 12, 13], output="np"), images)
    assert np.abs(pipe("three", seed=13, output="np")[0] - images[2]).max() < 1 / 255


def test_threads_get_the_images_they_would_get_alone(pipe):
    calls = [
        {"prompts": prompt, "seed": seed, "steps": steps}
        for prompt, seed, steps in itertools.product(PROMPTS, range(2), (1, 2))
    ]
    alone = [pipe(**call, output="np") for call in calls]
    pipe.forget_prompts()
    results = [None] * len(calls)

    def work(some):
        for index in some:
            results[index] = pipe(**calls[index], output="np")

    threads = [threading.Thread(target=work, args=(range(start, len(calls), 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, expected in zip(results, alone):
        np.testing.assert_array_equal(result, expected)


def test_the_diffusers_pipeline_stays_as_it_is(make_pipeline):
    pipeline = make_pipeline()
    before = by_diffusers(pipeline, PROMPTS)
    OneStepPipeline(pipeline, device="cpu")(PROMPTS, steps=3)
    np.testing.assert_array_equal(by_diffusers(pipeline, PROMPTS), before)
    assert not pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_picture_of_one_channel_is_grey(make_pipeline):
    pipeline = make_pipeline(vae=build_vae(in_channels=1, out_channels=1))
    assert OneStepPipeline(pipeline, device="cpu")("three")[0].mode == "L"


def test_warming_up_prepares_a_shape_and_changes_no_image(folder):
    pipe = OneStepPipeline.from_pretrained(folder, device="cpu")
    expected = pipe(PROMPTS, steps=2, output="np")
    warmed = OneStepPipeline.from_pretrained(folder, device="cpu")
    warmed.warmup()
    warmed.warmup([(3, 16, 16), (1, 8, 12)], steps=2)
    np.testing.assert_array_equal(warmed(PROMPTS, steps=2, output="np"), expected)


@pytest.mark.parametrize("shape", [(0, 16, 16), (1, 16), "16", (1, 15, 16)])
def test_warming_up_a_shape_that_is_none_is_refused(pipe, shape):
    with pytest.raises(ValueError, match=r"shapes|size"):
        pipe.warmup([shape])


def test_explain_tells_what_every_pass_did_and_who_serves_the_norms(pipe, folder):
    report = pipe.explain()
    assert isinstance(report, EngineReport)
    assert [one.name for one in report.passes] == list(PASSES)
    assert report.norms.backend in ("cpu", "reference")
    text = str(report)
    assert str(folder) in text
    assert "cpu in float32, sampled by DDIMScheduler (v_prediction)" in text
    assert "12 x time projection folded" in text
    assert f"group_norm_silu: served by {report.norms.backend}" in text
    assert "CUDA graphs: not used, they need a CUDA device" in text


def test_explain_tells_who_serves_the_attentions_that_calls_asked_for(folder):
    pipe = OneStepPipeline.from_pretrained(folder, device="cpu")
    assert "attention: its backend depends on sizes, and is chosen by the first call of each" in str(pipe.explain())
    pipe.warmup([(2, 16, 16)])
    found = pipe.explain().attention
    # 8 heads of 5 in the first level, 4 of 20 in the middle (both of 8 x 8 or 4 x 4 tokens, and 24 of text), the VAE's.
    assert set(found) == {
        "8x64x64x5, batch 2",
        "8x64x24x5, batch 2",
        "4x16x16x20, batch 2",
        "4x16x24x20, batch 2",
        "1x64x64x24, batch 2",
    }
    assert all(explanation.backend == "sdpa" for explanation in found.values())
    assert "attention 8x64x24x5, batch 2: served by sdpa (torch's flash kernel for CPUs" in str(pipe.explain())
    off = OneStepPipeline.from_pretrained(folder, device="cpu", passes={"direct_attention": False})
    assert off.explain().attention is None
    assert "attention: not used (scaled_dot_product_attention of torch)" in str(off.explain())


def test_attention_can_be_forced_to_a_backend_for_the_process(folder, monkeypatch, pipe):
    chosen = pipe(PROMPTS, output="np")
    monkeypatch.setenv("FASTDISTILL_BACKEND", "attention=reference")
    forced = OneStepPipeline.from_pretrained(folder, device="cpu")
    assert np.abs(forced(PROMPTS, output="np") - chosen).max() < 2e-5
    assert {explanation.backend for explanation in forced.explain().attention.values()} == {"reference"}


def test_a_prompt_is_projected_for_cross_attention_once_until_it_is_forgotten(folder):
    pipe = OneStepPipeline.from_pretrained(folder, device="cpu")
    cache = pipe._parts.context
    first = pipe(["three", "seven", "three"], steps=2, guidance_scale=3, output="np")
    assert len(cache) == 3  # with the empty prompt
    kept = [entry[-1].get() for entry in cache._entries.values()]
    np.testing.assert_array_equal(pipe(["three", "seven", "three"], steps=2, guidance_scale=3, output="np"), first)
    assert all(any(entry[-1].get() is one for one in kept) for entry in cache._entries.values())
    pipe.forget_prompts()
    assert len(cache) == 0
    np.testing.assert_array_equal(pipe(["three", "seven", "three"], steps=2, guidance_scale=3, output="np"), first)


def test_without_the_prompt_cache_cross_attentions_keep_nothing(folder, pipe):
    off = OneStepPipeline.from_pretrained(folder, device="cpu", passes={"prompt_cache": False})
    np.testing.assert_array_equal(off(PROMPTS, output="np"), pipe(PROMPTS, output="np"))
    assert len(off._parts.context) == 0
    assert "not: kept from call to call: prompt_cache is off" in str(off.explain())


def test_explain_tells_what_is_switched_off(folder):
    text = str(OneStepPipeline.from_pretrained(folder, device="cpu", passes={"fused_group_norm_silu": False}).explain())
    assert "fused_group_norm_silu: not applied\n  not: switched off" in text
    assert "group_norm_silu: not used" in text
    assert "fold_timestep: applied" in text


def test_clipping_schedulers_are_sampled_without_folded_scales(make_pipeline, diffusers_pipeline):
    scheduler = type(diffusers_pipeline.scheduler).from_config(diffusers_pipeline.scheduler.config, clip_sample=True)
    pipeline = make_pipeline(scheduler)
    engine = OneStepPipeline(pipeline, device="cpu")
    assert "clip_sample=True clips" in str(engine.explain())
    exact = by_diffusers(pipeline, PROMPTS, num_inference_steps=2)
    assert np.abs(engine(PROMPTS, steps=2, output="np") - exact).max() < 2e-5


def test_models_of_another_kind_are_refused_by_name(make_pipeline):
    with pytest.raises(ModelError, match="scheduler DDPMScheduler: this engine samples"):
        OneStepPipeline(make_pipeline(DDPMScheduler(**SD)), device="cpu")
    with pytest.raises(ModelError, match="num_class_embeds=10"):
        OneStepPipeline(make_pipeline(unet=build_unet(num_class_embeds=10)), device="cpu")
    with pytest.raises(ModelError, match="in_channels=9: needed the VAE's 4"):
        OneStepPipeline(make_pipeline(unet=build_unet(in_channels=9)), device="cpu")
    with pytest.raises(ModelError, match="runs StableDiffusionPipeline folders only"):
        OneStepPipeline(object(), device="cpu")


def test_an_unknown_model_is_the_models_own_error():
    with pytest.raises(ModelError, match="unknown model 'digits-nobody-made'"):
        OneStepPipeline.from_pretrained("digits-nobody-made", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu9"}, "device must be .* got 'tpu9'"),
        ({"device": "meta"}, "device must be"),
        ({"device": "cuda:4096"}, "device 'cuda:4096': .* CUDA device"),
        ({"dtype": torch.int8}, "dtype must be one of torch.float32"),
        ({"passes": ["fold_everything"]}, "unknown pass 'fold_everything'; known: fused_group_norm_silu"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        OneStepPipeline.from_pretrained("not looked for", **options)
