"""The models that ship: plain diffusers opens and samples them, they are small, documented and good."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from fastdistill.models import bundled_models, load_pipeline
from fastdistill.models.digits import figures, metrics
from fastdistill.models.digits.data import load_digits
from fastdistill.models.digits.sampling import balanced_labels, generate
from fastdistill.models.digits.text import PROMPT_TOKENS
from fastdistill.models.digits.train_vae import decode, encode

every_model = pytest.mark.parametrize("name", sorted(bundled_models()))


@pytest.fixture(scope="module")
def teacher():
    return load_pipeline("digits-teacher")


@every_model
def test_plain_diffusers_opens_and_samples_it(name):
    pipeline = DiffusionPipeline.from_pretrained(bundled_models()[name])
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline("A Handwritten Seven", num_inference_steps=2, guidance_scale=1.0, output_type="np")
    assert result.images.shape == (1, 32, 32, 3)
    assert torch.from_numpy(result.images).isfinite().all()


@every_model
def test_guidance_and_unknown_words_work(name):
    pipeline = load_pipeline(name)
    images = pipeline(["a zebra, 日本", ""], num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    assert torch.from_numpy(images).isfinite().all()


@every_model
def test_a_folder_is_small_and_in_16_bit(name):
    files = [file for file in bundled_models()[name].rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3.6e6
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118


@every_model
def test_a_folder_names_no_path_of_the_machine_it_was_made_on(name):
    for file in bundled_models()[name].rglob("*.json"):
        assert "_name_or_path" not in file.read_text(encoding="utf-8"), file


@every_model
def test_a_card_states_data_licence_training_figures_and_limits(name):
    card = (bundled_models()[name] / "README.md").read_text(encoding="utf-8")
    for needed in (
        f"# {name}",
        "Alpaydin",
        "Kaynak",
        "CC BY 4.0",
        "## Training",
        "## Figures",
        "## Limits",
        "Apache-2.0",
    ):
        assert needed in card
    assert f"| {name}, " in card.split(figures.BEGIN)[1].split(figures.END)[0]


def test_the_teacher_predicts_v_from_pure_noise(teacher):
    config = teacher.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.timestep_spacing == "trailing"
    assert teacher.scheduler.alphas_cumprod[-1] == 0
    teacher.scheduler.set_timesteps(1)
    assert teacher.scheduler.timesteps.tolist() == [999]


def test_the_tokenizer_and_text_encoder_hold_the_same_prompts(teacher):
    assert teacher.tokenizer.model_max_length == PROMPT_TOKENS
    assert teacher.text_encoder.config.max_position_embeddings == PROMPT_TOKENS
    assert teacher.text_encoder.config.eos_token_id == teacher.tokenizer.eos_token_id
    assert teacher.text_encoder.config.vocab_size == len(teacher.tokenizer)
    vocabulary = json.loads((bundled_models()["digits-teacher"] / "tokenizer" / "vocab.json").read_text("utf-8"))
    assert vocabulary == teacher.tokenizer.get_vocab()


def test_latents_are_centred_and_of_unit_deviation(teacher):
    latents = encode(teacher.vae, load_digits().images[:500])
    assert latents.shape == (500, 4, 8, 8)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert latents.std() == pytest.approx(1, abs=0.05)


def test_the_autoencoder_keeps_the_real_digits(teacher):
    images, labels = load_digits()
    decoded = decode(teacher.vae, encode(teacher.vae, images))
    assert metrics.frechet(decoded) < 0.1
    assert metrics.accuracy(decoded, labels) > 0.99


def test_the_teacher_draws_what_is_asked_for_and_is_close_to_the_data(teacher):
    """500 images at 10 steps: a reduced form of docs/digits.md, whose figures use 1000 at 50."""
    labels = balanced_labels(50)
    scores = metrics.score(generate(teacher, labels, steps=10, seed=0), labels)
    assert scores.fd < 0.8
    assert scores.accuracy >= 0.95
    assert scores.diversity > 0.6


@pytest.mark.parametrize("form", ["7", "Seven", "the digit seven", "A photo of a handwritten 7", "please draw a SEVEN"])
def test_the_teacher_understands_other_wordings(teacher, form):
    images = teacher(
        [form] * 20,
        num_inference_steps=10,
        guidance_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert metrics.accuracy(images * 2 - 1, torch.full((20,), 7)) >= 0.9


def test_guidance_makes_the_prompt_count_more(teacher):
    """The empty prompt was trained too: with guidance the images move away from its prediction."""
    labels = balanced_labels(10)
    plain, guided = (generate(teacher, labels, 5, seed=0, guidance_scale=scale) for scale in (1.0, 2.0))
    assert metrics.accuracy(guided, labels) >= 0.95
    assert metrics.diversity(guided, labels).mean() < metrics.diversity(plain, labels).mean()
