"""Reflow and its distillation: what they learn, their stages, their bookkeeping, and what they deliver."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from fastdistill.training import (
    Condition,
    Draws,
    FlowDistillation,
    GradientContractError,
    InstaFlowConfig,
    Pairs,
    PromptData,
    Reflow,
    ReflowConfig,
    RoleConfig,
    Setup,
    Step,
    StraightPath,
    Teacher,
    Trainer,
    TrainerConfig,
    distill,
    make_pairs,
)
from fastdistill.training.flow import flow_path, sample_times
from fastdistill.training.settings import changed
from torch import nn

from fastdistill import diffusion
from fastdistill.engine import OneStepPipeline
from fastdistill.losses import LPIPS
from fastdistill.models.stacked import StackedUNet

from .ring import CONDITION, PREDICTION_TYPE, SCHEDULE, SHAPE, StudentMLP
from .toys import tiny_pipeline

PATH = StraightPath(SCHEDULE, PREDICTION_TYPE)
PROMPTS = ["a handwritten seven", "two", "digit 3"]
REFLOW = changed(
    ReflowConfig(pairs=6, pair_steps=2, steps=2, straightness_samples=3),
    trainer={"updates": 2, "batch_size": 4},
    student={"warm_up": 0, "learning_rate": 0.01},
)
INSTAFLOW = InstaFlowConfig(trainer=REFLOW.trainer, student=REFLOW.student, reflow=REFLOW)
UNMEASURED = dataclasses.replace(REFLOW, straightness_samples=0)
INSTAFLOW_UNMEASURED = dataclasses.replace(INSTAFLOW, reflow=UNMEASURED)


class Linear(nn.Module):
    """Called as a UNet, answers `gain * x`, whatever the time."""

    def __init__(self, gain=0.5):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        return (self.gain * x_t,)


def some_pairs(count=40, seed=0):
    noise, sample = torch.randn(2, count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return Pairs(noise, sample, torch.zeros(count, dtype=torch.long))


def step(pairs=None, batch_size=8):
    draws = Draws(0, 0, 0, batch_size=batch_size)
    return Step(PromptData(CONDITION, SHAPE, pairs or some_pairs()).batch(0, draws.fork("data")), draws)


METHODS = {
    "reflow": lambda: Reflow(StudentMLP(width=16), PATH),
    "reflow with prompt dropout": lambda: Reflow(
        StudentMLP(width=16), PATH, times="logit_normal", prompt_dropout=0.5, unconditional=CONDITION
    ),
    "distillation": lambda: FlowDistillation(StudentMLP(width=16), PATH),
}


# ---- what is learned ------------------------------------------------------------------------------------------------


def test_reflow_is_the_squared_error_of_the_velocity_between_the_ends_of_a_pair():
    now = step()
    loss = Reflow(Linear(), PATH).losses("student", now).terms["reflow"]
    noise, data = now.batch["pair_noise"].double(), now.batch["pair_sample"].double()
    t = Draws(0, 0, 0, batch_size=8).rand().clamp(max=0.999).double()[:, None]
    length = (t**2 + (1 - t) ** 2).sqrt()
    alpha, sigma = t / length, (1 - t) / length
    x = (t * data + (1 - t) * noise) / length
    v = 0.5 * x
    velocity = (alpha * x - sigma * v) - (sigma * x + alpha * v)  # v of arXiv 2202.00512: data, noise
    torch.testing.assert_close(loss.double(), (velocity - (data - noise)).square().mean())


def test_distillation_is_the_squared_error_of_the_one_step_from_pure_noise():
    now = step()
    method = FlowDistillation(Linear(), PATH)
    noise, data = now.batch["pair_noise"], now.batch["pair_sample"]
    torch.testing.assert_close(method.generate(noise, CONDITION.expand(8)), -0.5 * noise)  # at alpha = 0, x0 = -v
    loss = method.losses("student", now).terms["distillation"]
    torch.testing.assert_close(loss, (-0.5 * noise - data).square().mean())


def test_distillation_in_pixels_compares_what_is_decoded():
    decoder = nn.Linear(2, 3)
    now = step()
    method = FlowDistillation(Linear(), PATH, decode=decoder, frozen={"decoder": decoder})
    loss = method.losses("student", now).terms["distillation"]
    noise, data = now.batch["pair_noise"], now.batch["pair_sample"]
    torch.testing.assert_close(loss, (decoder(-0.5 * noise) - decoder(data)).square().mean())


def test_distillation_by_lpips_is_its_mean_distance_and_moves_the_student_alone():
    torch.manual_seed(0)
    decoder, backbone = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 5, 3)
    lpips = LPIPS(backbone, no_grad="y")
    noise, sample = torch.randn(2, 6, 4, 8, 8)
    pairs = Pairs(noise, sample, torch.zeros(6, dtype=torch.long))
    method = FlowDistillation(
        Linear(), PATH, distance=lpips, decode=decoder, frozen={"decoder": decoder, "lpips": lpips}
    )
    config = TrainerConfig(updates=3, batch_size=4, report_every=1)
    losses = []
    Trainer(method, PromptData(CONDITION, (4, 8, 8), pairs), config, {"student": RoleConfig(0.1)}).run(
        lambda progress: losses.append(progress.losses["distillation"])
    )
    assert losses[-1] < losses[0]
    assert method.facts()["distance"] == "LPIPS"
    draws = Draws(0, 0, 0, batch_size=4)
    now = Step(PromptData(CONDITION, (4, 8, 8), pairs).batch(0, draws.fork("data")), draws)
    one, two = decoder(method.generate(now.batch["pair_noise"], CONDITION.expand(4))), decoder(now.batch["pair_sample"])
    torch.testing.assert_close(method.losses("student", now).terms["distillation"], lpips(one, two).mean())


def test_dropped_prompts_are_learned_as_the_empty_one():
    seen = []

    class Recorder(Linear):
        def forward(self, x_t, t, encoder_hidden_states, return_dict):
            seen.extend(encoder_hidden_states.flatten().tolist())
            return super().forward(x_t, t, encoder_hidden_states, return_dict)

    empty = Condition(torch.full((1, 1, 1), -1.0))
    method = Reflow(Recorder(), PATH, prompt_dropout=0.25, unconditional=empty)
    method.losses("student", step(batch_size=2000))
    assert set(seen) == {0.0, -1.0}
    assert seen.count(-1.0) / 2000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("distribution", "quantiles"),
    [
        ("uniform", (0.25, 0.5, 0.75)),
        ("logit_normal", (0.3375, 0.5, 0.6625)),  # sigmoid(-0.6745), sigmoid(0.6745)
        ("u_shaped", (0.0867, 0.5, 0.9133)),  # 0.5 -+ asinh(sinh(4) / 2) / 8
    ],
)
def test_times_have_the_quartiles_of_their_distribution(distribution, quantiles):
    t = sample_times(distribution, Draws(0, batch_size=40000))
    torch.testing.assert_close(t.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor(quantiles), rtol=0, atol=0.015)
    assert t.min() >= 0
    assert t.max() <= 0.999


def test_a_flow_of_gaussians_is_rectified_to_the_straight_one():
    # The ends of the exact flow from N(0, 1) to N(2, 0.5^2): data = 2 + 0.5 noise, so v(x_t, t) is known.
    noise = torch.randn(512, *SHAPE, generator=torch.Generator().manual_seed(1))
    pairs = Pairs(noise, 2 + 0.5 * noise, torch.zeros(512, dtype=torch.long))
    config = TrainerConfig(updates=400, batch_size=128, ema_decay=0.98)
    method = Reflow(StudentMLP(width=32), PATH)
    roles = {"student": RoleConfig(5e-3, weight_decay=0.0, decay=0.5)}
    student = Trainer(method, PromptData(CONDITION, SHAPE, pairs), config, roles).run().student
    t = torch.linspace(0, 0.9, 8)
    z = torch.linspace(-1, 1, 8)[:, None].expand(8, 2)
    x_t = t[:, None] * (2 + 0.5 * z) + (1 - t[:, None]) * z
    with torch.no_grad():
        velocity = PATH.velocity(student, x_t, t, CONDITION.expand(8))
    assert (velocity - (2 - 0.5 * z)).abs().mean() < 0.06


# ---- bookkeeping ----------------------------------------------------------------------------------------------------


def trainer(method, folder=None, accumulation=1):
    config = TrainerConfig(updates=5, batch_size=8, accumulation=accumulation, ema_decay=0.9, report_every=1)
    roles = {"student": RoleConfig(0.01, warm_up=2, decay=0.5)}
    return Trainer(method, PromptData(CONDITION, SHAPE, some_pairs()), config, roles, folder=folder)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stop", range(1, 5))
@pytest.mark.parametrize("name", METHODS)
def test_a_run_stopped_at_any_update_and_resumed_equals_the_uninterrupted_one(name, stop, accumulation, tmp_path):
    whole = trainer(METHODS[name](), accumulation=accumulation)
    whole.run()
    trainer(METHODS[name](), tmp_path, accumulation).run(lambda progress: progress.update == stop)
    resumed = trainer(METHODS[name](), tmp_path, accumulation)
    assert resumed.resume() == stop
    resumed.run()
    for network in (lambda t: t.average.network, lambda t: t.method.student):
        ours, theirs = network(resumed).state_dict(), network(whole).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", METHODS)
def test_a_student_that_learns_nothing_is_refused_at_start_up(name):
    method = METHODS[name]()
    forward = method.student.forward
    method.student.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0].detach(),)
    with pytest.raises(GradientContractError, match="gives no gradient"):
        trainer(method).run()


def test_a_decoder_that_would_be_trained_is_refused_at_start_up():
    decoder = nn.Linear(2, 3)

    class Leaky(FlowDistillation):
        def losses(self, role, now):
            decoder.requires_grad_(True)
            return super().losses(role, now)

    method = Leaky(StudentMLP(width=16), PATH, decode=decoder, frozen={"decoder": decoder})
    with pytest.raises(GradientContractError, match=r"'distillation' must train 'student' alone.*'decoder'"):
        trainer(method).run()


def test_data_without_pairs_is_named():
    method = Reflow(StudentMLP(width=16), PATH)
    with pytest.raises(ValueError, match="a flow learns from pairs; the data has none"):
        Trainer(method, PromptData(CONDITION, SHAPE), TrainerConfig(), {"student": RoleConfig(0.01)}).run()


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (REFLOW, {"rectifications": -1}, "rectifications must be 0 or more; got -1"),
        (REFLOW, {"parameterization": "v"}, "parameterization must be one of teacher, flow; got v"),
        (REFLOW, {"network": "two"}, "network must be one of unet, stacked; got two"),
        (REFLOW, {"times": "middle"}, "times must be one of uniform, logit_normal, u_shaped; got middle"),
        (REFLOW, {"solver": "rk4"}, "solver must be one of"),
        (REFLOW, {"prompt_dropout": 1.0}, r"prompt_dropout must be in \[0, 1\); got 1\.0"),
        (REFLOW, {"steps": 0}, "steps must be 1 or more; got 0"),
        (INSTAFLOW, {"space": "image"}, "space must be one of latent, pixel; got image"),
        (INSTAFLOW, {"lpips_updates": 5}, "lpips_updates above 0 needs lpips_backbone; got None"),
        (INSTAFLOW, {"reflow": {"pairs": 0}}, "pairs must be 1 or more; got 0"),
    ],
)
def test_a_bad_configuration_names_the_field_the_value_and_the_need(config, change, message):
    with pytest.raises(ValueError, match=message):
        changed(config, **change)


# ---- stages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup():
    teacher = Teacher(tiny_pipeline())
    return Setup(teacher, tuple(PROMPTS), teacher.encode(PROMPTS))


def run_stages(config, setup):
    """Every stage, and the network that is sent back for it: another one each time, which stands for the trained."""
    stages, seen, sent = config.stages(setup), [], []
    stage = next(stages)
    while True:
        seen.append(stage)
        trained = nn.Sequential(stage.method.student)[0].eval()
        with torch.no_grad():
            for p in trained.parameters():
                p.mul_(0.9)
        sent.append(trained)
        try:
            stage = stages.send(trained)
        except StopIteration:
            return seen, sent


@pytest.mark.parametrize("rectifications", [0, 1, 2])
def test_each_rectification_is_a_stage_on_pairs_of_the_flow_before_and_distillation_comes_last(setup, rectifications):
    config = changed(INSTAFLOW, reflow={"rectifications": rectifications})
    stages, networks = run_stages(config, setup)
    assert [stage.name for stage in stages] == [
        *(f"reflow-{n}" for n in range(1, rectifications + 1)),
        "distillation",
    ]
    assert [stage.is_last for stage in stages] == [False] * rectifications + [True]
    teacher = setup.teacher
    flows = [teacher.unet, *networks]
    for number, stage in enumerate(stages):
        expected = make_pairs(
            flows[number],
            setup.conditions,
            teacher.schedule,
            teacher.prediction_type,
            count=6,
            sample_shape=teacher.sample_shape,
            steps=2,
            seed=number + 1,
        )
        assert torch.equal(stage.data.pairs.noise, expected.noise)
        assert torch.equal(stage.data.pairs.sample, expected.sample)
    figures = stages[-1].method.figures()
    assert list(figures["straightness"]) == [f"{n}-RF" for n in range(1, rectifications + 2)]
    assert all(value > 0 for value in figures["straightness"].values())


def test_the_log_shows_the_straightness_of_the_flow_that_made_the_pairs(setup):
    stages = REFLOW.stages(setup)
    stage = next(stages)
    before = stage.method.figures()["straightness"]["1-RF"]
    draws = Draws(0, 0, 0, batch_size=4)
    logs = stage.method.losses("student", Step(stage.data.batch(0, draws.fork("data")), draws)).logs
    assert float(logs["straightness"]) == pytest.approx(before)
    with pytest.raises(StopIteration):
        stages.send(stage.method.student.eval())
    assert set(stage.method.figures()["straightness"]) == {"1-RF", "2-RF"}


def test_a_rectified_flow_starts_as_the_flow_before_and_one_that_predicts_velocities_from_its_weights(setup):
    teacher = setup.teacher
    noise = torch.randn(3, *teacher.sample_shape)
    condition, t = setup.conditions, torch.tensor([0.0, 0.4, 0.9])
    own = StraightPath(teacher.schedule, teacher.prediction_type)
    method = next(UNMEASURED.stages(setup)).method
    with torch.no_grad():
        before = own.velocity(teacher.unet, noise, t, condition)
        torch.testing.assert_close(method.path.velocity(method.student.eval(), noise, t, condition), before)
    flow = next(dataclasses.replace(UNMEASURED, parameterization="flow").stages(setup)).method
    assert flow.path.prediction_type == flow.facts()["prediction_type"] == "flow_prediction"
    ours, theirs = flow.student.state_dict(), teacher.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_reflow_without_a_rectification_is_refused(setup):
    with pytest.raises(ValueError, match="rectifications must be 1 or more for the method reflow; got 0"):
        next(dataclasses.replace(REFLOW, rectifications=0).stages(setup))


def test_steps_that_no_sampler_could_take_are_refused():
    path = StraightPath(SCHEDULE, "epsilon")
    with pytest.raises(ValueError, match="steps=2: diffusers samples no epsilon network from pure noise"):
        Reflow(Linear(), path, steps=2)
    Reflow(Linear(), path, steps=1)


def test_a_missing_lpips_backbone_is_found_before_anything_is_trained(setup):
    config = changed(INSTAFLOW, lpips_updates=2, lpips_backbone="nowhere/vgg16.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nowhere/vgg16\.safetensors"):
        next(config.stages(setup))


def test_lpips_is_a_last_stage_that_goes_on_with_the_student(setup, monkeypatch):
    monkeypatch.setattr("fastdistill.losses.LPIPS", lambda *args, **options: LPIPS(nn.Conv2d(3, 4, 3), **options))
    config = changed(INSTAFLOW_UNMEASURED, lpips_updates=3, lpips_backbone="vgg16", reflow={"rectifications": 0})
    stages, networks = run_stages(config, setup)
    assert [stage.name for stage in stages] == ["distillation", "distillation-lpips"]
    assert [stage.is_last for stage in stages] == [False, True]
    assert stages[1].trainer.updates == 3
    assert stages[1].method.decode == setup.teacher.decode
    assert set(stages[1].method.roles) == {"student", "decoder", "lpips"}
    assert networks[1] is not networks[0]


# ---- what is delivered ----------------------------------------------------------------------------------------------


def latents():
    """Of two images, as the engine draws them for seed 0."""
    return torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])


def pictures(pipeline, steps):
    pipeline.set_progress_bar_config(disable=True)
    noise = latents().to(pipeline.unet.dtype)
    return pipeline(PROMPTS[:2], num_inference_steps=steps, guidance_scale=1.0, latents=noise, output_type="np").images


def decoded(pipeline, samples):
    with torch.no_grad():
        images = pipeline.vae.decode(samples / pipeline.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def euler(path, pipeline, times):
    x = latents()
    condition = Teacher(pipeline).encode(PROMPTS[:2]) if not path.is_flow else encoded(pipeline)
    with torch.no_grad():
        for t, following in pairwise(times):
            x = x + (following - t) * path.velocity(pipeline.unet, x, torch.full((2,), t), condition)
    return x


def encoded(pipeline):
    states, _ = pipeline.encode_prompt(PROMPTS[:2], "cpu", 1, False)
    return Condition(states)


def test_a_rectified_flow_opens_in_diffusers_and_its_steps_there_are_euler_steps_of_the_flow(tmp_path):
    result = distill(tiny_pipeline(), PROMPTS, REFLOW)
    assert result.facts["sampling"] == {"steps": 2, "timestep": 999, "guidance_scale": 1.0}
    assert set(result.facts["figures"]["straightness"]) == {"1-RF", "2-RF"}
    opened = DiffusionPipeline.from_pretrained(result.save(tmp_path / "flow"), torch_dtype=torch.float32)
    alpha, sigma = diffusion.from_scheduler(opened.scheduler).at(499)
    path = StraightPath(diffusion.from_scheduler(opened.scheduler), "v_prediction")
    expected = decoded(opened, euler(path, opened, [0.0, float(alpha / (alpha + sigma)), 1.0]))
    np.testing.assert_allclose(pictures(opened, 2), expected, rtol=0, atol=2e-5)


def test_the_one_step_student_draws_the_same_in_diffusers_and_in_the_engine(tmp_path):
    result = distill(tiny_pipeline(), PROMPTS, INSTAFLOW_UNMEASURED)
    folder = result.save(tmp_path / "student")
    opened = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    path = StraightPath(diffusion.from_scheduler(opened.scheduler), "v_prediction")
    expected = decoded(opened, euler(path, opened, [0.0, 1.0]))
    np.testing.assert_allclose(pictures(opened, 1), expected, rtol=0, atol=2e-5)
    engine = OneStepPipeline.from_pretrained(folder)
    np.testing.assert_allclose(engine(PROMPTS[:2], output="np"), expected, rtol=0, atol=2e-5)
    facts = json.loads((folder / "fastdistill.json").read_text())
    assert facts["method"] == "instaflow"
    assert facts["sampling"] == {"steps": 1, "timestep": 999, "guidance_scale": 1.0}
    assert facts["updates"] == {"student": 2}


@pytest.mark.parametrize("steps", [1, 4])
def test_a_flow_that_predicts_velocities_is_sampled_by_plain_diffusers(tmp_path, steps):
    config = changed(INSTAFLOW_UNMEASURED, reflow={"parameterization": "flow"})
    result = distill(tiny_pipeline(), PROMPTS, config)
    assert result.facts["prediction_type"] == "flow_prediction"
    opened = DiffusionPipeline.from_pretrained(result.save(tmp_path / "flow"), torch_dtype=torch.float32)
    # Its sigmas are 0.999 times 1, (k - 1) / k, …; its integer timesteps are at most one below 1000 sigma.
    times = [0.0, *(1 - 0.999 * k / steps for k in range(steps - 1, 0, -1)), 1.0]
    expected = decoded(opened, euler(flow_path(), opened, times))
    np.testing.assert_allclose(pictures(opened, steps), expected, rtol=0, atol=2e-5 if steps == 1 else 5e-3)


def test_two_unets_in_series_are_trained_by_the_same_configuration_and_open_in_diffusers(tmp_path):
    config = changed(INSTAFLOW_UNMEASURED, network="stacked")
    result = distill(tiny_pipeline(), PROMPTS, config)
    assert isinstance(result.run.student, StackedUNet)
    opened = DiffusionPipeline.from_pretrained(result.save(tmp_path / "stacked"), torch_dtype=torch.float32)
    assert isinstance(opened.unet, StackedUNet)
    np.testing.assert_allclose(pictures(opened, 1), pictures(result.pipeline, 1), rtol=0, atol=0.01)  # float16 on disk


def test_a_stack_may_be_rectified_first(setup):
    stages = changed(INSTAFLOW_UNMEASURED, network="stacked", reflow={"network": "stacked"}).stages(setup)
    first = next(stages).method.student
    assert isinstance(first, StackedUNet)
    second = stages.send(first.eval()).method.student
    assert isinstance(second, StackedUNet)
    assert not isinstance(second.first, StackedUNet)


@pytest.mark.parametrize("config", [UNMEASURED, INSTAFLOW_UNMEASURED])
def test_a_run_of_stages_resumes_within_the_stage_that_it_was_stopped_in(tmp_path, config):
    config = changed(config, trainer={"updates": 3, "report_every": 1})
    last = {"reflow": "reflow-1", "instaflow": "distillation"}[config.method]
    whole = distill(tiny_pipeline(), PROMPTS, config).run.student.state_dict()
    calls = []
    distill(
        tiny_pipeline(),
        PROMPTS,
        config,
        checkpoints=tmp_path,
        callback=lambda progress: calls.append(progress) or (progress.stage == last and progress.update == 2),
    )
    assert calls[-1].stage == last
    resumed = distill(tiny_pipeline(), PROMPTS, config, checkpoints=tmp_path, resume=True).run.student.state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
