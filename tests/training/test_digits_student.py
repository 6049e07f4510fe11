"""The bundled one-step students, held to their bounds, and the commands that made them."""

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

# Each with its method and the Frechet distance that it must stay below.
STUDENTS = {"digits-add": ("add", 0.8), "digits-dmd": ("dmd", 0.6), "digits-instaflow": ("instaflow", 0.6)}


@pytest.fixture(scope="module", params=STUDENTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def scores(name):
    labels = balanced_labels()
    return metrics.score(generate(load_pipeline(name), labels, steps=1, seed=0), labels)


@pytest.fixture(scope="module")
def facts(name):
    return json.loads((resolve_model(name) / "fastdistill.json").read_text())


@pytest.fixture(scope="module")
def teachers_distance():
    return metrics.frechet(generate(load_pipeline("digits-teacher"), balanced_labels(), steps=1, seed=0))


def test_one_step_from_pure_noise_is_close_to_the_data(name, scores, teachers_distance):
    assert scores.fd <= STUDENTS[name][1]
    assert scores.fd <= teachers_distance / 3


def test_the_digit_that_was_asked_for_is_recognised(scores):
    assert scores.accuracy >= 0.95


def test_every_digit_is_drawn_in_more_than_one_way(scores):
    assert scores.diversity >= 0.7
    assert min(scores.diversity_per_digit) >= 0.6


def test_plain_diffusers_draws_a_seven_in_one_step(name):
    pipeline = DiffusionPipeline.from_pretrained(resolve_model(name))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a handwritten seven"] * 20,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert metrics.accuracy(images * 2 - 1, torch.full((20,), 7)) >= 0.9


def test_the_facts_beside_the_weights_are_those_of_the_bundled_teacher(name, facts):
    assert facts["method"] == STUDENTS[name][0]
    assert facts["sampling"] == {"steps": 1, "timestep": 999, "guidance_scale": 1.0}
    assert facts["teacher"]["name"] == "digits-teacher"
    assert facts["teacher"]["unet_sha256"] == weights_digest(load_pipeline("digits-teacher").unet)
    assert facts["prompts"] == len(digits_prompts())


def test_the_documented_command_is_the_run_it_was_made_by(name, facts):
    card = (resolve_model(name) / "README.md").read_text()
    assert f"\n{command(run_of(facts), out=name)}\n" in card


def test_the_card_of_a_new_student_says_what_the_bundled_ones_say(name, facts):
    card = digits_card(name, command(run_of(facts), out=name), facts)
    for text in ("arXiv", "num_inference_steps=1", "CC BY 4.0", "<!-- figures: begin"):
        assert text in card
    assert "takes one step from pure noise at t = 999" in " ".join(card.split())


def test_reflow_had_made_the_flow_at_least_five_times_straighter():
    facts = json.loads((resolve_model("digits-instaflow") / "fastdistill.json").read_text())
    assert facts["figures"]["straightness of 2-RF"] <= facts["figures"]["straightness of 1-RF"] / 5
