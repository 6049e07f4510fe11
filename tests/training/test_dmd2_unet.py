"""DMD2 with diffusers' UNets: features that end behind the mid block, SDXL's conditions, export, the warm-up."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from fastdistill.training import (
    Condition,
    DMDConfig,
    Draws,
    LatentData,
    PromptData,
    Setup,
    Step,
    Teacher,
    Trainer,
    distill,
)
from fastdistill.training.adapters import SharedBase
from fastdistill.training.config import role_configs
from fastdistill.training.dmd2 import DMD2, DMD2Config
from fastdistill.training.fake_score import FakeScore, mid_block_head
from fastdistill.training.networks import predict
from fastdistill.training.pipelines import renoising_scheduler
from fastdistill.training.settings import changed
from torch import nn

from fastdistill import diffusion
from fastdistill.engine import OneStepPipeline
from fastdistill.models.digits.networks import TEXT_WIDTH

from .toys import tiny_pipeline

PROMPTS = ["a handwritten seven", "two", "digit 3"]
FOUR_STEPS = (999, 749, 499, 249)
QUICK = changed(
    DMD2Config(critic_ratio=2, pairs=6, pair_steps=2),
    trainer={"updates": 2, "batch_size": 4, "ema_decay": 0.0},
    student={"warm_up": 0, "learning_rate": 0.01},
    fake_score={"warm_up": 0},
)


def unet(kind="sd", seed=0):
    sdxl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 16),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
            **(sdxl if kind == "sdxl" else {}),
        )


def conditions(kind, count=3):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(count, 5, TEXT_WIDTH, generator=generator)
    if kind == "sd":
        return Condition(states)
    sizes = torch.tensor([[64.0, 48, 4, 8, 32, 32]]).repeat(count, 1)
    return Condition(states, torch.randn(count, 12, generator=generator), sizes)


def inputs(kind):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([3, 500, 999]), conditions(kind)


def pipeline():
    made = tiny_pipeline()
    made.register_modules(unet=unet())
    made.set_progress_bar_config(disable=True)
    return made


def real_latents():
    samples = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    return samples, torch.randint(len(PROMPTS), (12, 1), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_features_of_a_pass_that_ends_behind_the_mid_block_are_those_of_a_whole_one(kind):
    network = FakeScore(unet(kind), nn.Identity())
    x_t, t, condition = inputs(kind)
    seen = []
    hook = network.network.mid_block.register_forward_hook(lambda module, given, made: seen.append(made))
    whole = predict(network, x_t, t, condition)
    hook.remove()
    ran_on = []
    network.network.up_blocks[0].register_forward_hook(lambda *_: ran_on.append(True))
    assert torch.equal(network.logits(x_t, t, condition), seen[0])
    assert not ran_on
    pred, features = network.predict_with_logits(x_t, t, condition)
    assert torch.equal(features, seen[0])
    assert torch.equal(pred, whole)
    assert not network.network.mid_block._forward_hooks


def test_the_gradient_of_a_pass_that_ends_behind_the_mid_block_is_that_of_a_whole_one():
    network = FakeScore(unet(), mid_block_head(unet()))
    x_t, t, condition = inputs("sd")
    gradients = []
    for logits in (network.logits, lambda *given: network.predict_with_logits(*given)[1]):
        network.zero_grad()
        x = x_t.clone().requires_grad_()
        logits(x, t, condition).sum().backward()
        gradients.append([x.grad, network.network.conv_in.weight.grad, network.head[0].weight.grad])
        assert network.network.conv_out.weight.grad is None
    for ended, whole in zip(*gradients):
        torch.testing.assert_close(ended, whole)


def test_a_fake_score_that_is_an_adapter_of_a_shared_base_has_its_own_features_and_trains_it_alone():
    base = SharedBase(unet(), rank=2)
    teacher, role = base.role(None), base.role("fake_score")
    with torch.no_grad():
        for p in role.parameters():
            p.add_(0.1)
    x_t, t, condition = inputs("sd")
    network = FakeScore(role, mid_block_head(unet()))
    own, plain = network.logits(x_t, t, condition), FakeScore(teacher, network.head).logits(x_t, t, condition)
    torch.testing.assert_close(own, network.predict_with_logits(x_t, t, condition)[1])
    assert not torch.allclose(own, plain)
    own.sum().backward()
    assert any(bool(p.grad.any()) for p in role.parameters() if p.grad is not None)
    assert base.network.conv_in.weight.grad is None


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_head_makes_one_logit_of_an_image_at_the_unets_own_size(size):
    with torch.device("meta"):
        network = UNet2DConditionModel(sample_size=size, cross_attention_dim=8, block_out_channels=(32, 32, 32, 32))
        head = mid_block_head(network)
        assert head(torch.empty(2, 32, size // 8, size // 8)).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_network_of_an_update_is_given_the_conditions_and_sizes(kind):
    config = changed(QUICK, guidance_scale=2.0, student_steps=FOUR_STEPS)
    unconditional = conditions(kind, 1).map(torch.zeros_like)
    fake_score = FakeScore(unet(kind), mid_block_head(unet(kind)))
    schedule = diffusion.scaled_linear()
    method = DMD2(unet(kind), schedule, "epsilon", config, unconditional, fake_score=fake_score)
    seen = {name: [] for name in ("student", "teacher", "fake_score")}
    for name, network in (("student", method.student), ("teacher", method.teacher), ("fake_score", fake_score.network)):

        def note(module, args, kwargs, name=name):
            seen[name].append((kwargs["encoder_hidden_states"], kwargs.get("added_cond_kwargs")))

        network.register_forward_pre_hook(note, with_kwargs=True)
    samples, captions = real_latents()
    data = LatentData(samples, conditions(kind), captions)
    before = {name: value.clone() for name, value in method.student.state_dict().items()}
    run = Trainer(method, data, config.trainer, role_configs(config)).run()
    assert run.updates == {"student": 2, "fake_score": 4}
    assert any(not torch.equal(value, before[name]) for name, value in method.student.state_dict().items())
    for name, calls in seen.items():
        empty = [not states.any() for states, _ in calls]
        assert any(empty) == (name == "teacher")  # only the teacher is guided
        for (_, added), is_empty in zip(calls, empty):
            assert (added is None) == (kind == "sd")
            if kind == "sdxl":
                assert bool(added["text_embeds"].any()) != is_empty
                assert added["time_ids"][0].tolist() == [64, 48, 4, 8, 32, 32]


@pytest.fixture(scope="module")
def four_steps():
    samples, captions = real_latents()
    teacher = pipeline()
    data = LatentData(samples, Teacher(teacher).encode(PROMPTS), captions)
    return distill(teacher, PROMPTS, changed(QUICK, student_steps=FOUR_STEPS), images=data)


class InOrder:
    """Noise in the order in which diffusers draws it."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape):
        return torch.randn(1, *shape, generator=self.generator)


def test_the_exported_pipeline_of_several_steps_does_exactly_what_the_method_does(four_steps, tmp_path):
    schedule = Teacher(four_steps.pipeline).schedule
    config = changed(QUICK, student_steps=FOUR_STEPS, gan_weight=0)
    method = DMD2(four_steps.pipeline.unet, schedule, "v_prediction", config)
    condition = Teacher(four_steps.pipeline).encode(PROMPTS[:1])
    noise = InOrder(9).randn(4, 8, 8)
    with torch.no_grad():
        expected = method.generate_in_steps(noise, condition, InOrder(5))
    assert four_steps.facts["sampling"] == {
        "steps": 4,
        "timestep": 999,
        "guidance_scale": 1.0,
        "timesteps": list(FOUR_STEPS),
    }

    def sample(opened):
        return opened(
            PROMPTS[0],
            num_inference_steps=4,
            guidance_scale=1.0,
            latents=noise.to(opened.unet.dtype),
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images

    torch.testing.assert_close(sample(four_steps.pipeline), expected, rtol=1e-5, atol=1e-5)
    folder = four_steps.save(tmp_path / "student")
    opened = DiffusionPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample(opened).float(), expected, rtol=0, atol=0.02)  # float16 on disk
    assert opened.scheduler.timesteps.tolist() == list(FOUR_STEPS)


def test_the_engine_samples_a_student_of_several_steps_as_diffusers_does(four_steps, tmp_path):
    folder = four_steps.save(tmp_path / "student")
    opened = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    opened.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = opened(PROMPTS[:2], num_inference_steps=4, guidance_scale=1.0, generator=generators, output_type="np")
    engine = OneStepPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
    ours = engine(PROMPTS[:2], seed=[3, 4], steps=4, output="np")
    np.testing.assert_allclose(ours, theirs.images, rtol=0, atol=1e-4)
    assert ours.std() > 0.05


def test_a_schedule_beyond_the_first_of_several_timesteps_is_cut_off():
    teacher = pipeline()
    scheduler = renoising_scheduler(teacher.scheduler, (399, 199))
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [399, 199]
    theirs = diffusion.from_scheduler(scheduler)
    ours = diffusion.from_scheduler(teacher.scheduler)
    torch.testing.assert_close(theirs.alpha, ours.alpha[:400])


def test_timesteps_that_no_scheduler_visits_are_refused():
    teacher = pipeline()
    with pytest.raises(ValueError, match=r"timesteps \[999, 900, 499\]: .* visits \[998, 665, 332\] in 3 steps"):
        renoising_scheduler(teacher.scheduler, (999, 900, 499))
    teacher.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="an epsilon network says nothing about x0 at this schedule's pure noise"):
        renoising_scheduler(teacher.scheduler, FOUR_STEPS)


def test_the_warm_up_is_a_stage_that_moves_the_student_towards_the_odes_ends_and_the_next_begins_with_its_student():
    teacher = Teacher(pipeline())
    encoded = teacher.encode(PROMPTS)
    config = changed(QUICK, gan_weight=0, warm_up_updates=8, student_steps=(399,), student={"learning_rate": 2e-3})
    stages = config.stages(Setup(teacher, tuple(PROMPTS), encoded))
    warm_up = next(stages)
    assert (warm_up.name, warm_up.is_last, warm_up.trainer.updates) == ("dmd2-warm-up", False, 8)
    pairs = warm_up.data.pairs

    def distance(network):
        method = DMD2(network, teacher.schedule, "v_prediction", config)
        with torch.no_grad():
            return float((method.generate(pairs.noise, encoded[pairs.condition]) - pairs.sample).square().mean())

    before = distance(teacher.unet)
    run = Trainer(warm_up.method, warm_up.data, warm_up.trainer, warm_up.roles).run()
    assert distance(run.student) < 0.9 * before
    last = stages.send(run.student)
    assert last.is_last
    delivered = run.student.state_dict()
    assert all(torch.equal(value, delivered[name]) for name, value in last.method.student.state_dict().items())


def test_the_paired_data_join_the_real_ones_where_both_are_needed():
    samples, captions = real_latents()
    teacher = Teacher(pipeline())
    encoded = teacher.encode(PROMPTS)
    setup = Setup(teacher, tuple(PROMPTS), encoded, LatentData(samples, encoded, captions))
    stage = next(changed(QUICK, regression_weight=0.5).stages(setup))
    batch = stage.data.batch(0, Draws(0, batch_size=4))
    terms = stage.method.losses("student", Step(batch, Draws(1, batch_size=4))).whole().terms
    assert set(terms) == {"dmd", "gan", "regression"}
    real = next(row for row in range(12) if torch.equal(samples[row], batch["data"][0]))
    assert torch.equal(batch["condition"].states[0], encoded.states[captions[real, 0]])


def test_a_gan_without_images_and_a_unet_without_a_middle_are_named():
    teacher = Teacher(pipeline())
    setup = Setup(teacher, tuple(PROMPTS), teacher.encode(PROMPTS))
    with pytest.raises(ValueError, match="dmd2 trains on real images, none were given"):
        next(QUICK.stages(setup))
    samples, captions = real_latents()
    data = LatentData(samples, setup.conditions, captions)
    with pytest.raises(ValueError, match="UNet2DConditionModel has no mid_block"):
        distill(tiny_pipeline(), PROMPTS, QUICK, images=data)


@pytest.mark.parametrize("kind", ["pixel_l2", "lpips"])
def test_the_regression_term_may_compare_decoded_images(kind, monkeypatch):
    """LPIPS itself has its own tests; here is which images it is given, and where its gradient goes."""
    given = []

    class Perceptual(nn.Module):
        def __init__(self, backbone, weights, **options):
            super().__init__()
            given.append((backbone, weights, options["no_grad"]))

        def forward(self, x, y):
            return (x - y).abs().mean((1, 2, 3))

    monkeypatch.setattr("fastdistill.training.regression.LPIPS", Perceptual)
    teacher = Teacher(pipeline())
    encoded = teacher.encode(PROMPTS)
    config = changed(
        DMDConfig(regression=kind, lpips_backbone="vgg.safetensors", pairs=6, pair_steps=2), trainer={"batch_size": 4}
    )
    stage = next(config.stages(Setup(teacher, tuple(PROMPTS), encoded)))
    batch = stage.data.batch(0, Draws(0, batch_size=4))
    assert isinstance(stage.data, PromptData)
    term = stage.method.losses("student", Step(batch, Draws(1, batch_size=4))).whole().terms["regression"]
    x = teacher.decode(stage.method.generate(batch["pair_noise"], batch["pair_condition"]))
    off = x - teacher.decode(batch["pair_sample"])
    expected = off.square().mean() if kind == "pixel_l2" else off.abs().mean()
    torch.testing.assert_close(term, 0.5 * expected)
    assert given == ([] if kind == "pixel_l2" else [("vgg.safetensors", None, "y")])
    term.backward()
    assert all(p.grad is None for p in teacher.pipeline.vae.parameters())
    assert bool(stage.method.student.conv_in.weight.grad.any())


@pytest.mark.parametrize("stage", ["dmd2-warm-up", "dmd2"])
def test_a_run_with_a_warm_up_stopped_in_either_stage_and_resumed_is_the_same_to_the_bit(tmp_path, stage):
    config = changed(QUICK, warm_up_updates=2, trainer={"report_every": 1, "ema_decay": 0.9})
    samples, captions = real_latents()

    def run(**options):
        teacher = pipeline()
        data = LatentData(samples, Teacher(teacher).encode(PROMPTS), captions)
        return distill(teacher, PROMPTS, config, images=data, **options)

    whole = run()
    stopped = run(checkpoints=tmp_path, callback=lambda progress: progress.stage == stage and progress.update == 1)
    assert stopped.run.ended == "callback"
    resumed = run(checkpoints=tmp_path, resume=True).run.student.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.run.student.state_dict().items())
