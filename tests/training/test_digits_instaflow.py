"""The bundled InstaFlow, held to its bounds, and what stands beside its weights."""

import json

import pytest
from fastdistill.training import InstaFlowConfig
from fastdistill.training.digits import digits_prompts
from fastdistill.training.pipelines import weights_digest
from fastdistill.training.settings import from_dict

from fastdistill.models import load_pipeline, resolve_model
from fastdistill.models.digits import metrics
from fastdistill.models.digits.sampling import balanced_labels, generate

NAME = "digits-instaflow"


@pytest.fixture(scope="module")
def scores():
    labels = balanced_labels()
    return metrics.score(generate(load_pipeline(NAME), labels, steps=1, seed=0), labels)


@pytest.fixture(scope="module")
def facts():
    return json.loads((resolve_model(NAME) / "fastdistill.json").read_text())


def test_one_step_from_pure_noise_is_close_to_the_data(scores):
    assert scores.fd <= 0.6


def test_the_digit_that_was_asked_for_is_recognised(scores):
    assert scores.accuracy >= 0.95


def test_every_digit_is_drawn_in_more_than_one_way(scores):
    assert scores.diversity >= 0.7
    assert min(scores.diversity_per_digit) >= 0.6


def test_reflow_had_made_the_flow_at_least_five_times_straighter(facts):
    straightness = facts["figures"]["straightness"]
    assert straightness["2-RF"] <= straightness["1-RF"] / 5


def test_the_facts_are_those_of_the_bundled_teacher_and_of_the_default_settings(facts):
    assert facts["method"] == "instaflow"
    assert facts["sampling"] == {"steps": 1, "timestep": 999, "guidance_scale": 1.0}
    assert facts["teacher"]["name"] == "digits-teacher"
    assert facts["teacher"]["unet_sha256"] == weights_digest(load_pipeline("digits-teacher").unet)
    assert facts["prompts"] == len(digits_prompts())
    trained, default = (vars(from_dict(InstaFlowConfig, values)) for values in (facts["config"], {}))
    assert trained["reflow"].rectifications == 1
    assert {name for name in default if trained[name] != default[name]} <= {"trainer"}  # how often it reported
