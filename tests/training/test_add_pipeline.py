"""ADD on a tiny pipeline, where every switch is tried."""

import copy

import pytest
import torch
from fastdistill.training import Condition, Draws, LatentData, Step, Trainer
from fastdistill.training import add as add_module
from fastdistill.training.features import Features
from fastdistill.training.recipe import Setup
from fastdistill.training.settings import changed
from fastdistill.training.teacher import Teacher
from torch import nn

from fastdistill import diffusion

from .ring import CONDITION
from .test_add import QUICK, ring_method
from .toys import tiny_pipeline


class PixelFeatures(nn.Module):
    """Two layers of 16 tokens of 32x32 pixels, random and frozen; nothing of an image's embedding."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.widths, self.width = (4, 6), 5
        self.first = nn.Parameter(torch.randn(4, 3, 8, 8, generator=generator) / 14)
        self.second = nn.Parameter(torch.randn(6, 4, 1, 1, generator=generator) / 2)
        self.embed = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.seen = []

    def forward(self, images):
        self.seen.append(images.detach())
        first = torch.tanh(nn.functional.conv2d(images, self.first, stride=8))
        second = torch.tanh(nn.functional.conv2d(first, self.second))
        return Features((first.flatten(2), second.flatten(2)), second.mean((2, 3)) @ self.embed)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def setup(pipeline, monkeypatch):
    monkeypatch.setattr(add_module, "build_features", lambda source: PixelFeatures())
    teacher = Teacher(pipeline)
    prompts = ("a handwritten seven", "a handwritten two")
    conditions = teacher.encode(prompts)
    captions = torch.arange(16)[:, None] % 2
    images = LatentData(torch.randn(16, 4, 8, 8), conditions, captions, images=torch.rand(16, 3, 32, 32) * 2 - 1)
    return Setup(teacher, prompts, conditions, images)


TINY = changed(QUICK, trainer={"updates": 1, "batch_size": 4, "seed": 5}, image_condition=True, text_condition=True)


def run_once(config, setup):
    stage = next(config.stages(setup))
    run = Trainer(stage.method, stage.data, stage.trainer, stage.roles).run()
    return stage.method, run


@pytest.mark.parametrize(
    ("change", "trained", "terms"),
    [
        ({}, 1, {"adversarial", "distill"}),
        ({"adversarial_weight": 0}, 0, {"distill"}),
        ({"distill_weight": 0}, 1, {"adversarial"}),
        ({"text_condition": False}, 1, {"adversarial", "distill"}),
        ({"image_condition": False}, 1, {"adversarial", "distill"}),
        ({"text_condition": False, "image_condition": False}, 1, {"adversarial", "distill"}),
        ({"student_init": "random"}, 1, {"adversarial", "distill"}),
        ({"teacher_steps": 2, "guidance_scale": 2.0}, 1, {"adversarial", "distill"}),
        ({"weighting": "sds", "distill_space": "latent"}, 1, {"adversarial", "distill"}),
        ({"weighting": "nfsd", "distill_space": "latent"}, 1, {"adversarial", "distill"}),
        ({"augmentation": "color,translation,cutout", "heads": "sum"}, 1, {"adversarial", "distill"}),
        ({"features": "teacher-unet", "image_condition": False}, 1, {"adversarial", "distill"}),
        ({"r1_mode": "lazy", "r1_interval": 1}, 2, {"adversarial", "distill", "r1"}),
        ({"r1_mode": "finite_difference"}, 1, {"adversarial", "distill"}),
    ],
    ids=lambda value: ",".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_every_switch_of_the_ablation_makes_a_run(setup, change, trained, terms):
    method, run = run_once(changed(TINY, **change), setup)
    expected = {"student": 1} | ({"discriminator": trained} if trained else {})
    assert run.updates == expected
    assert terms <= set(run.losses)
    assert not {"adversarial", "distill", "r1"} & set(run.losses) - terms - {"r1"}
    start = setup.teacher.unet.state_dict()
    from_teacher = sum(float((p - start[name]).abs().max()) for name, p in method.student.state_dict().items())
    assert (from_teacher > 10) == (change.get("student_init") == "random")


def test_the_discriminator_is_told_the_text_and_the_image_that_the_input_was_made_of(setup):
    stage = next(TINY.stages(setup))
    draws = Draws("told", batch_size=4)
    given = Step(stage.data.batch(0, draws.fork("data")), draws)
    told = stage.method._told(given)
    embedding = PixelFeatures()(given.batch["image"]).embedding
    torch.testing.assert_close(told, torch.cat([given.batch["condition"].pooled, embedding], 1))
    assert stage.method.discriminator.heads[0].project.in_features == told.shape[1]


def test_without_pixels_the_decoded_data_are_real(setup):
    given = Step({"data": torch.randn(4, 4, 8, 8)}, Draws("real", batch_size=4))
    stage = next(TINY.stages(setup))
    torch.testing.assert_close(stage.method._real_pixels(given), setup.teacher.decode(given.batch["data"]))


def test_the_unets_features_are_of_noised_latents_and_pass_the_gradient_on(setup):
    config = changed(TINY, features="teacher-unet", image_condition=False, feature_timesteps=(300, 300))
    method = next(config.stages(setup)).method
    latents = torch.randn(4, 4, 8, 8, requires_grad=True)
    condition = setup.conditions[torch.zeros(4).long()]
    tokens = method.features(latents, condition, Draws("look", batch_size=4))
    assert [t.shape[1] for t in tokens] == list(method.features.widths) == [16, 16]
    tokens[-1].square().mean().backward()
    assert latents.grad.abs().sum() > 0
    draws = Draws("look", batch_size=4)
    t, noise = draws.randint(300, 301), draws.randn(4, 8, 8)
    x_t = diffusion.add_noise(latents.detach(), noise, *method.schedule.at(t))
    caught = []
    hook = setup.teacher.unet.down_blocks[0].register_forward_hook(lambda module, given, made: caught.append(made[0]))
    setup.teacher.unet(x_t, t, encoder_hidden_states=condition.states)
    hook.remove()
    torch.testing.assert_close(tokens[0].detach(), caught[0].flatten(2))
    assert not setup.teacher.unet.down_blocks[0]._forward_hooks


def other_teacher(pipeline, tmp_path, parts):
    folder = tmp_path / "other"
    other = copy.deepcopy(pipeline)
    with torch.no_grad():
        for part in parts:
            for parameter in getattr(other, part).parameters():
                parameter.mul_(1.1)
    other.save_pretrained(folder)
    return str(folder)


def test_another_teacher_of_the_same_latents_and_words_only_changes_the_target(setup, pipeline, tmp_path):
    config = changed(TINY, target_teacher=other_teacher(pipeline, tmp_path, ["unet"]))
    method, _ = run_once(config, setup)
    assert method.target.encode is None
    assert method.target.condition == "condition"
    weight = next(iter(setup.teacher.unet.parameters()))
    torch.testing.assert_close(next(iter(method.target.network.parameters())), 1.1 * weight)


def test_another_teacher_with_words_and_latents_of_its_own_reads_the_captions_and_the_pixels_itself(
    setup, pipeline, tmp_path
):
    folder = other_teacher(pipeline, tmp_path, ["unet", "vae", "text_encoder"])
    stage = next(changed(TINY, target_teacher=folder).stages(setup))
    assert stage.method.target.condition == "target_condition"
    assert stage.method.target.encode is not None
    batch = stage.data.batch(0, Draws("both", batch_size=8))
    alone = setup.images.batch(0, Draws("both", batch_size=8).fork("conditions"))
    assert torch.equal(batch["data"], alone["data"])
    assert torch.equal(batch["noise"], alone["noise"])
    theirs = Teacher(folder).encode(setup.prompts)
    which = (batch["condition"].states[:, None] - setup.conditions.states).flatten(2).abs().sum(2).argmin(1)
    torch.testing.assert_close(batch["target_condition"].states, theirs.states[which])
    assert Trainer(stage.method, stage.data, stage.trainer, stage.roles).run().updates["student"] == 1
    with pytest.raises(ValueError, match=r'has an autoencoder of its own: .* needed distill_space "pixel"'):
        next(changed(TINY, target_teacher=folder, distill_space="latent").stages(setup))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": "all"}, "heads must be one of mean, sum; got all"),
        ({"r1_mode": "double"}, "r1_mode must be one of exact, lazy, approximate, finite_difference; got double"),
        ({"weighting": "uniform"}, "weighting must be one of exponential, sds, nfsd; got uniform"),
        ({"student_init": "zeros"}, "student_init must be one of teacher, random"),
        ({"teacher_steps": 0}, "teacher_steps must be 1 or more; got 0"),
        ({"timesteps": ()}, "timesteps must be one timestep or more"),
        ({"r1_weight": -1.0}, r"r1_weight must be 0 or more; got -1\.0"),
        ({"adversarial_weight": 0, "distill_weight": 0}, "both 0: nothing is left"),
        ({"trainer": {"batch_size": 17}}, "batch size 17 makes 3 groups"),
        ({"weighting": "nfsd"}, 'needed distill_space "latent" and teacher_steps 1; got "pixel" and 1'),
        ({"augmentation": "rotation"}, "'rotation' is no augmentation; known: color"),
    ],
)
def test_a_bad_configuration_names_the_field_the_value_and_the_need(change, message):
    with pytest.raises(ValueError, match=message):
        changed(QUICK, **change)


def test_what_a_run_lacks_is_named_before_anything_is_computed(setup):
    with pytest.raises(ValueError, match=r"timesteps must be in 0\.\.999; got 1000"):
        ring_method(changed(QUICK, timesteps=(1000,)))
    with pytest.raises(ValueError, match="image_condition needs a network with an embedding"):
        next(changed(TINY, features="teacher-unet").stages(setup))
    with pytest.raises(ValueError, match="images: add trains on real images, none were given"):
        next(TINY.stages(Setup(setup.teacher, setup.prompts, setup.conditions)))
    wordless = Setup(setup.teacher, setup.prompts, Condition(setup.conditions.states), setup.images)
    with pytest.raises(ValueError, match="text_condition needs a pooled text embedding"):
        next(TINY.stages(wordless))
    with pytest.raises(ValueError, match="data: add trains on real samples; the batch has only noise"):
        ring_method().losses("student", Step({"noise": torch.zeros(8, 2), "condition": CONDITION}, Draws(batch_size=8)))
