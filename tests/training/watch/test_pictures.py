"""Pictures of a student: what it draws, cell for cell, and nothing else changed by looking."""

import numpy as np
import pytest
import torch
from fastdistill.training.pipelines import one_step_scheduler, student_pipeline
from fastdistill.training.watch import Samples, sheet
from PIL import Image

from fastdistill._pictures import enlarge

from ..toys import tiny_pipeline

PROMPTS = ["a handwritten seven", "two"]
ONE_STEP = {"steps": 1, "timestep": 999, "guidance_scale": 1.0}


def scheduler(teacher_scheduler):
    return one_step_scheduler(teacher_scheduler, 999)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def test_each_cell_is_one_image_enlarged_and_the_space_between_is_clear():
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole = sheet(images)
    assert whole.mode == "RGBA"
    assert whole.size == (10 * 68 - 4, 2 * 68 - 4)
    for index in (0, 9, 10, 19):
        row, column = divmod(index, 10)
        pixels = ((images[index] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        cell = whole.crop((68 * column, 68 * row, 68 * column + 64, 68 * row + 64))
        np.testing.assert_array_equal(np.asarray(cell.convert("RGB")), enlarge(Image.fromarray(pixels), 2))
    assert np.asarray(whole)[:, 64:68, 3].max() == 0


@pytest.mark.parametrize(("side", "shown"), [(100, 100), (64, 64), (256, 256), (1024, 256)])
def test_images_are_enlarged_or_reduced_to_a_size_that_one_can_look_at(side, shown):
    assert sheet(torch.zeros(1, 3, side, side)).size == (shown, shown)


def test_the_pictures_are_those_of_the_student_s_own_pipeline_in_its_one_step(pipeline):
    student = tiny_pipeline().unet
    with torch.no_grad():
        student.conv_out.weight *= 2
    samples = Samples(pipeline, PROMPTS, seed=4)
    images = samples.of_student(student, scheduler, ONE_STEP)
    made = student_pipeline(pipeline, student, scheduler(pipeline.scheduler))
    noise = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert samples.prompts == ([PROMPTS[0]] * 5 + [PROMPTS[1]] * 5) * 2
    for index in (0, 7, 19):
        alone = made(
            samples.prompts[index], num_inference_steps=1, guidance_scale=1.0, latents=noise[[index]], output_type="pt"
        ).images[0]
        torch.testing.assert_close(images[index], 2 * alone - 1, rtol=0, atol=1e-4)
    assert not torch.equal(images, samples.of_student(pipeline.unet, scheduler, ONE_STEP))


def test_looking_touches_no_generator_and_neither_pipeline_nor_scheduler(pipeline):
    samples = Samples(pipeline, PROMPTS, teacher_steps=3)
    before = torch.get_rng_state(), dict(pipeline.components), pipeline.scheduler.timesteps.clone()
    first = samples.of_teacher(), samples.of_student(pipeline.unet, scheduler, ONE_STEP)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pipeline.components == before[1]
    assert torch.equal(pipeline.scheduler.timesteps, before[2])
    torch.manual_seed(99)
    again = samples.of_teacher(), samples.of_student(pipeline.unet, scheduler, ONE_STEP)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_a_scheduler_that_draws_numbers_gives_the_same_pictures_every_time(pipeline):
    from diffusers import LCMScheduler

    def noisy(teacher_scheduler):
        return LCMScheduler.from_config(teacher_scheduler.config, timestep_spacing="trailing")

    samples = Samples(pipeline, PROMPTS)
    state = torch.get_rng_state()
    first = samples.of_student(pipeline.unet, noisy, {"steps": 4, "guidance_scale": 1.0})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, samples.of_student(pipeline.unet, noisy, {"steps": 4, "guidance_scale": 1.0}))
    one = samples.of_student(pipeline.unet, noisy, {"steps": 1, "guidance_scale": 1.0})
    assert not torch.allclose(first, one, atol=0.01)


def test_columns_are_prompts_evenly_spread_over_all(pipeline):
    samples = Samples(pipeline, [f"prompt {index}" for index in range(300)])
    assert samples.prompts == [f"prompt {30 * column}" for column in range(10)] * 2


def test_pictures_without_a_prompt_are_refused(pipeline):
    with pytest.raises(ValueError, match="prompts: none"):
        Samples(pipeline, [])
