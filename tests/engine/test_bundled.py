"""The bundled digits models through the engine."""

import numpy as np
import pytest
import torch

from fastdistill import OneStepPipeline
from fastdistill.models import load_pipeline
from fastdistill.models.digits.metrics import recognise
from fastdistill.models.digits.text import prompt


@pytest.mark.parametrize(("model", "steps"), [("digits-dmd", 1), ("digits-teacher", 1), ("digits-teacher", 5)])
def test_a_bundled_model_draws_what_diffusers_draws_within_float32_rounding(model, steps):
    prompts = [prompt(7), "3"]
    pipe = OneStepPipeline.from_pretrained(model, device="cpu")
    exact = load_pipeline(model)(
        prompts,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (4, 5)],
        output_type="np",
    ).images
    images = pipe(prompts, seed=4, steps=steps, output="np")
    assert images.shape == (2, 32, 32, 3)
    assert np.abs(images - exact).max() < 2e-5


def test_the_student_draws_the_digit_that_was_asked_for_in_one_step():
    digits = torch.arange(10).repeat_interleave(5)
    pipe = OneStepPipeline.from_pretrained("digits-dmd", device="cpu")
    images = pipe([prompt(int(digit)) for digit in digits], seed=list(range(5)) * 10, output="pt")
    assert (recognise(images * 2 - 1) == digits).sum() >= 45
