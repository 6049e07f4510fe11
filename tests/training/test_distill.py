"""From a teacher's folder to a student's folder that plain diffusers opens and samples in one step."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from fastdistill.training import DMDConfig, Teacher, TeacherError, distill
from fastdistill.training.networks import conversion_point
from fastdistill.training.pipelines import one_step_scheduler, student_pipeline
from fastdistill.training.settings import changed, from_dict
from safetensors.torch import load_file

from fastdistill import diffusion
from fastdistill.models.digits.folder import save_folder

from .toys import tiny_pipeline

PROMPTS = ["a handwritten seven", "two", "digit 3"]
CONFIG = changed(
    DMDConfig(critic_ratio=2, pairs=6, pair_steps=2),
    trainer={"updates": 2, "batch_size": 4},
    student={"warm_up": 0, "learning_rate": 0.01},
    fake_score={"warm_up": 0},
)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return save_folder(tiny_pipeline(), tmp_path_factory.mktemp("models") / "tiny-teacher", "a card")


@pytest.fixture(scope="module")
def distilled(teacher_folder):
    return distill(teacher_folder, PROMPTS, CONFIG)


@pytest.fixture
def student_folder(distilled, tmp_path):
    return distilled.save(tmp_path / "student")


def pixels(pipeline, prompt="a handwritten seven"):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt, num_inference_steps=1, guidance_scale=1.0, latents=latents.to(pipeline.unet.dtype), output_type="np"
    ).images[0]


def test_the_saved_folder_opens_in_plain_diffusers_and_gives_the_same_picture(distilled, student_folder):
    opened = DiffusionPipeline.from_pretrained(student_folder)
    assert opened.unet.dtype == opened.text_encoder.dtype == opened.vae.dtype
    np.testing.assert_allclose(pixels(opened), pixels(distilled.pipeline), rtol=0, atol=0.01)  # float16 on disk


def test_the_picture_is_the_decoded_one_step_of_the_student(distilled):
    pipeline = distilled.pipeline
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        condition = Teacher(pipeline).encode(["a handwritten seven"])
        v = pipeline.unet(noise, torch.tensor([999]), encoder_hidden_states=condition.states).sample
        decoded = pipeline.vae.decode(-v / pipeline.vae.config.scaling_factor).sample  # at alpha = 0, x0 = -v
    expected = (decoded / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels(pipeline), expected, rtol=0, atol=1e-5)


def test_the_student_is_not_the_teacher_and_the_frozen_parts_are_copied_byte_for_byte(student_folder, teacher_folder):
    name = "unet/diffusion_pytorch_model.safetensors"
    student, teacher = load_file(student_folder / name), load_file(teacher_folder / name)
    assert student.keys() == teacher.keys()
    assert all(tensor.dtype == torch.float16 for tensor in student.values())
    assert any(not torch.equal(student[key], teacher[key]) for key in student)
    for part in ("vae", "text_encoder", "tokenizer"):
        files = [path for path in (teacher_folder / part).rglob("*") if path.is_file()]
        assert files
        for path in files:
            assert (student_folder / path.relative_to(teacher_folder)).read_bytes() == path.read_bytes()


def test_what_it_was_trained_with_stands_beside_the_weights(student_folder):
    facts = json.loads((student_folder / "fastdistill.json").read_text())
    assert facts["method"] == "dmd"
    assert facts["sampling"] == {"steps": 1, "timestep": 999, "guidance_scale": 1.0}
    assert facts["prediction_type"] == "v_prediction"
    assert facts["zero_terminal_snr"] is True
    assert facts["teacher"]["name"] == "tiny-teacher"
    assert len(facts["teacher"]["unet_sha256"]) == 64
    assert facts["updates"] == {"student": 2, "fake_score": 4}
    assert from_dict(DMDConfig, facts["config"]) == CONFIG
    assert "tmp" not in "".join(path.read_text() for path in student_folder.rglob("*config.json"))


def test_the_same_seed_gives_the_same_student_bit_for_bit(distilled, teacher_folder):
    again = distill(str(teacher_folder), PROMPTS, CONFIG).run.student.state_dict()
    first = distilled.run.student.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_pipeline_in_memory_is_distilled_and_saved_whole(tmp_path):
    teacher = tiny_pipeline()
    before = pixels(teacher)
    result = distill(teacher, PROMPTS, dataclasses.replace(CONFIG, guidance_scale=2.0))
    np.testing.assert_allclose(pixels(teacher), before, rtol=0, atol=1e-4)
    opened = DiffusionPipeline.from_pretrained(result.save(tmp_path / "student"), torch_dtype=torch.float32)
    np.testing.assert_allclose(pixels(opened), pixels(result.pipeline), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("options", "timestep"),
    [
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 999),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 399),
        ({"prediction_type": "epsilon"}, 999),
        ({"prediction_type": "epsilon"}, 399),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, 999),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, 399),
        ({"prediction_type": "sample", "clip_sample": True}, 249),
    ],
)
def test_the_saved_scheduler_starts_and_ends_where_the_loop_does(options, timestep, tmp_path):
    stable_diffusion = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = DDIMScheduler(**{**stable_diffusion, "clip_sample": False, **options})
    teacher = tiny_pipeline(scheduler)
    config = dataclasses.replace(CONFIG, student_timestep=timestep)
    result = distill(teacher, PROMPTS, config)
    assert result.pipeline.scheduler.config.clip_sample is False
    sampler = DiffusionPipeline.from_pretrained(result.save(tmp_path / "student")).scheduler
    sampler.set_timesteps(1)
    assert sampler.timesteps.tolist() == [timestep]
    noise, pred = torch.randn(2, 1, 4, 8, 8)
    schedule = diffusion.from_scheduler(scheduler)
    point = conversion_point(schedule, timestep, options["prediction_type"])
    expected = diffusion.to_data(pred, noise, *point, options["prediction_type"])
    torch.testing.assert_close(sampler.step(pred, timestep, noise).prev_sample, expected, rtol=1e-4, atol=1e-4)


def test_the_one_step_pipeline_leaves_the_teachers_pipeline_alone():
    teacher = tiny_pipeline()
    unet, scheduler = teacher.unet, teacher.scheduler
    student = student_pipeline(teacher, torch.nn.Identity(), one_step_scheduler(scheduler, 399))
    assert teacher.unet is unet
    assert teacher.scheduler is scheduler
    assert student.vae is teacher.vae
    assert len(student.scheduler.alphas_cumprod) == 400
    assert len(scheduler.alphas_cumprod) == 1000


def test_teachers_that_this_loop_cannot_distil_are_named():
    flow = tiny_pipeline()
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TeacherError, match="FlowMatchEulerDiscreteScheduler is a flow model"):
        distill(flow, PROMPTS, CONFIG)
    pictured = tiny_pipeline()
    pictured.unet.register_to_config(addition_embed_type="image")
    with pytest.raises(TeacherError, match="embeds 'image'"):
        distill(pictured, PROMPTS, CONFIG)
    consistency = tiny_pipeline()
    consistency.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(TeacherError, match="guidance-distilled"):
        distill(consistency, PROMPTS, CONFIG)


def test_prompts_must_be_a_list_of_strings():
    with pytest.raises(ValueError, match="prompts must be a non-empty list of strings"):
        distill(tiny_pipeline(), [], CONFIG)


def test_a_folder_that_is_not_a_pipeline_is_not_overwritten(distilled, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(FileExistsError, match="not a pipeline folder"):
        distilled.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_saving_again_replaces_the_pipeline_and_leaves_nothing_beside_it(distilled, tmp_path):
    distilled.save(tmp_path / "student")
    (tmp_path / "student" / "stale").touch()
    distilled.save(tmp_path / "student")
    assert not (tmp_path / "student" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_resuming_from_a_folder_without_a_checkpoint_is_refused_and_does_not_start_anew(tmp_path):
    (tmp_path / "dmd").mkdir()
    with pytest.raises(ValueError, match="resume: there is no checkpoint in"):
        distill(tiny_pipeline(), PROMPTS, CONFIG, checkpoints=tmp_path, resume=True)
    assert list((tmp_path / "dmd").iterdir()) == []
