"""The bundled one-step student, held to its bounds, and the command that made it."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from fastdistill.training.digits import digits_card, digits_prompts
from fastdistill.training.pipelines import weights_digest
from fastdistill.training.run import command, run_of

from fastdistill.models import load_pipeline, resolve_model
from fastdistill.models.digits import metrics
from fastdistill.models.digits.sampling import balanced_labels, generate


@pytest.fixture(scope="module")
def student():
    return load_pipeline("digits-dmd")


@pytest.fixture(scope="module")
def scores(student):
    labels = balanced_labels()
    return metrics.score(generate(student, labels, steps=1, seed=0), labels)


@pytest.fixture(scope="module")
def facts():
    return json.loads((resolve_model("digits-dmd") / "fastdistill.json").read_text())


def test_one_step_from_pure_noise_is_close_to_the_data(scores):
    assert scores.fd <= 0.8


def test_one_step_is_at_least_three_times_closer_than_the_teachers(scores):
    labels = balanced_labels()
    teacher = metrics.frechet(generate(load_pipeline("digits-teacher"), labels, steps=1, seed=0))
    assert scores.fd <= teacher / 3


def test_the_digit_that_was_asked_for_is_recognised(scores):
    assert scores.accuracy >= 0.95


def test_every_digit_is_drawn_in_more_than_one_way(scores):
    assert min(scores.diversity_per_digit) >= 0.6


def test_plain_diffusers_draws_a_seven_in_one_step():
    pipeline = DiffusionPipeline.from_pretrained(resolve_model("digits-dmd"))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a handwritten seven"] * 20,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert metrics.accuracy(images * 2 - 1, torch.full((20,), 7)) >= 0.9


def test_the_facts_beside_the_weights_are_those_of_the_bundled_teacher(facts):
    assert facts["method"] == "dmd"
    assert facts["sampling"] == {"steps": 1, "timestep": 999, "guidance_scale": 1.0}
    assert facts["teacher"] == {
        "name": "digits-teacher",
        "unet_sha256": weights_digest(load_pipeline("digits-teacher").unet),
    }
    assert facts["prompts"] == len(digits_prompts())


def test_the_documented_command_is_the_run_it_was_made_by(facts):
    card = (resolve_model("digits-dmd") / "README.md").read_text()
    assert f"\n{command(run_of(facts), out='digits-dmd')}\n" in card


def test_the_card_of_a_new_student_says_what_the_bundled_ones_say(facts):
    card = digits_card("digits-dmd", command(run_of(facts), out="digits-dmd"), facts)
    for text in ("arXiv 2311.18828", "num_inference_steps=1", "CC BY 4.0", "<!-- figures: begin"):
        assert text in card
    assert "takes one step from pure noise at t = 999" in " ".join(card.split())
