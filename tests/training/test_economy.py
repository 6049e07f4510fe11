"""Saving memory changes what is kept, and not what is learned."""

import copy

import pytest
import torch
from fastdistill.training import DMDConfig, LatentData, Teacher, Trainer, distill
from fastdistill.training.adapters import LAYERS, AdapterRole
from fastdistill.training.economy import restore, size_of
from fastdistill.training.memory import TensorMemory
from fastdistill.training.networks import predict_guided
from fastdistill.training.recipe import Setup
from fastdistill.training.settings import changed

from .toys import tiny_pipeline

PROMPTS = ["a handwritten seven", "two"]
CONFIG = changed(
    DMDConfig(critic_ratio=1, pairs=4, pair_steps=2, regression="pixel_l2"),
    trainer={"updates": 2, "batch_size": 2, "ema_decay": 0.5},
    student={"warm_up": 0},
    fake_score={"warm_up": 0},
)


def trained(config, pipeline=None):
    result = distill(pipeline or tiny_pipeline(), PROMPTS, config)
    return {name: p.detach() for name, p in result.run.student.named_parameters()}


@pytest.fixture(scope="module")
def plain():
    return trained(CONFIG)


@pytest.mark.parametrize(
    "memory",
    [{"checkpointing": "blocks"}, {"checkpointing": "recompute"}, {"decode": "checkpointed"}, {"decode": "sliced"}],
)
def test_what_is_computed_again_gives_the_same_student(plain, memory):
    found = trained(changed(CONFIG, trainer={"memory": memory}))
    for name, p in plain.items():
        torch.testing.assert_close(found[name], p, rtol=1e-4, atol=1e-6)


def test_a_student_with_moments_of_eight_bits_goes_nearly_the_same_way(plain):
    start = dict(tiny_pipeline().unet.named_parameters())
    found = trained(changed(CONFIG, trainer={"memory": {"optimizer": "8bit"}}))
    way = torch.cat([(p - start[name]).flatten() for name, p in plain.items()])
    other = torch.cat([(p - start[name]).flatten() for name, p in found.items()])
    assert 0 < (way - other).norm() < 0.2 * way.norm()


def test_moments_of_eight_bits_are_what_the_optimiser_has():
    config = changed(CONFIG, trainer={"memory": {"optimizer": "8bit"}})
    trainer = make_trainer(config)
    trainer.iterate()
    kinds = {key for state in trainer.updaters["student"].optimizer.state.values() for key in state}
    assert "exp_avg_codes" in kinds


def make_trainer(config, pipeline=None):
    teacher = Teacher(pipeline or tiny_pipeline())
    stage = next(config.stages(Setup(teacher, tuple(PROMPTS), teacher.encode(PROMPTS))))
    return Trainer(stage.method, stage.data, stage.trainer, stage.roles)


def test_the_two_backward_passes_of_a_turn_never_take_memory_together():
    config = changed(CONFIG, regression="l2", trainer={"batch_size": 32})
    trainer = make_trainer(config)
    trainer.iterate()
    peaks = {}
    for weight in (0.0, 0.5):
        object.__setattr__(trainer.method.config, "regression_weight", weight)
        with TensorMemory() as memory:
            trainer._take(trainer.method.turns[0], [trainer._step(0)])
        peaks[weight] = memory.peak
    assert peaks[0.5] < 1.1 * peaks[0.0]


def test_blocks_that_are_computed_again_keep_less():
    peaks, config = {}, changed(CONFIG, regression="l2", trainer={"batch_size": 32})
    for checkpointing in ("none", "blocks"):
        trainer = make_trainer(changed(config, trainer={"memory": {"checkpointing": checkpointing}}))
        trainer.iterate()
        with TensorMemory() as memory:
            trainer.iterate()
        peaks[checkpointing] = memory.peak
    assert peaks["blocks"] < 0.8 * peaks["none"]


def test_a_sliced_decode_keeps_one_samples_graph_at_a_time():
    config = changed(CONFIG, regression_weight=1.0, trainer={"batch_size": 16})
    peaks = {}
    for decode in ("plain", "sliced"):
        trainer = make_trainer(changed(config, trainer={"memory": {"decode": decode}}))
        trainer.iterate()
        with TensorMemory() as memory:
            trainer.iterate()
        peaks[decode] = memory.peak
        assert not trainer.method.roles["decoder"].is_gradient_checkpointing
    assert peaks["sliced"] < 0.7 * peaks["plain"]


def test_the_teacher_is_left_as_it_was():
    pipeline = tiny_pipeline()
    unet, before = pipeline.unet, copy.deepcopy(pipeline.unet.state_dict())
    classes = [type(part) for part in unet.modules()]
    trained(changed(CONFIG, trainer={"memory": {"roles": "lora:2", "checkpointing": "recompute"}}), pipeline)
    assert pipeline.unet is unet
    assert [type(part) for part in unet.modules()] == classes
    assert list(unet.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "recompute"])
def test_adapters_of_one_base_learn_what_they_learn_apart(checkpointing):
    """The same adapters, each role in a network of its own, are the expectation."""
    memory = {"roles": "lora:2", "checkpointing": checkpointing}
    config = changed(CONFIG, trainer={"memory": memory, "updates": 3})
    torch.manual_seed(0)
    found = trained(config)
    torch.manual_seed(0)
    expected = trained(changed(config, trainer={"memory": {"roles": "lora:2", "checkpointing": "none"}}))
    start = dict(tiny_pipeline().unet.named_parameters())
    assert list(found) == list(start)
    moved = [name for name in found if not torch.equal(found[name], start[name])]
    assert moved
    assert all(".".join(name.split(".")[:-1]).endswith(LAYERS) for name in moved)
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-4, atol=1e-6)


def test_the_base_of_adapters_counts_as_the_students_size():
    teacher = Teacher(tiny_pipeline())
    whole = sum(p.numel() for p in teacher.unet.parameters())
    with teacher.shared(2):
        student = copy.deepcopy(teacher.unet)
        own = sum(p.numel() for p in student.parameters())
        assert isinstance(student, AdapterRole)
        assert 0 < own < whole
        assert size_of(student) == whole + own


def test_frozen_networks_in_bfloat16_train_a_student_in_float32():
    config = changed(CONFIG, trainer={"precision": "bfloat16", "memory": {"frozen": "bfloat16"}})
    trainer = make_trainer(config)
    trainer.iterate()
    roles = trainer.method.roles
    dtypes = {role: {p.dtype for p in network.parameters()} for role, network in roles.items()}
    assert dtypes == {
        "student": {torch.float32},
        "teacher": {torch.bfloat16},
        "fake_score": {torch.float32},
        "decoder": {torch.float32},
    }
    assert all(value.isfinite() for value in trainer.losses.values())


def test_a_checkpointed_decode_computes_the_same_again_under_autocast():
    memory = {"decode": "checkpointed"}
    trainer = make_trainer(changed(CONFIG, trainer={"precision": "bfloat16", "memory": memory}))
    assert trainer.method.decodes_by_sample
    assert trainer.method.roles["decoder"].is_gradient_checkpointing
    trainer.iterate()
    assert all(value.isfinite() for value in trainer.losses.values())


def test_adapters_on_a_base_in_bfloat16_train_in_float32():
    config = changed(CONFIG, trainer={"precision": "bfloat16", "memory": {"frozen": "bfloat16", "roles": "lora:2"}})
    student = trained(config)
    assert {p.dtype for p in student.values()} == {torch.float32}
    assert all(p.isfinite().all() for p in student.values())


def test_a_flow_of_adapters_on_a_base_in_bfloat16_makes_the_next_stages_pairs():
    from fastdistill.training import InstaFlowConfig

    config = changed(
        InstaFlowConfig(),
        trainer={"updates": 1, "batch_size": 2, "precision": "bfloat16"}
        | {"memory": {"frozen": "bfloat16", "roles": "lora:2"}},
        reflow={"pairs": 2, "pair_steps": 1, "straightness_samples": 2, "trainer": {"updates": 1, "batch_size": 2}},
    )
    assert all(p.isfinite().all() for p in trained(config).values())


def test_restored_networks_compute_as_before():
    trainer = make_trainer(changed(CONFIG, trainer={"memory": {"checkpointing": "blocks", "decode": "tiled"}}))
    unet, vae = trainer.method.student, trainer.method.roles["decoder"]
    assert unet.is_gradient_checkpointing
    assert vae.use_tiling
    restore(trainer.method)
    assert not unet.is_gradient_checkpointing
    assert not vae.use_tiling


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_in_one_pass_equals_guidance_in_two(scale):
    teacher = Teacher(tiny_pipeline())
    condition = teacher.encode(PROMPTS)
    x, t = torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 900])
    given = (teacher.unet, x, t, condition, scale, teacher.unconditional)
    with torch.no_grad():
        torch.testing.assert_close(predict_guided(*given, batched=True), predict_guided(*given), rtol=1e-4, atol=1e-5)


class _Elsewhere(torch.nn.Linear):
    """Knows where it was last moved to."""

    def to(self, device):
        self.place = str(device)
        return self


def test_parts_that_a_stage_does_not_use_wait_on_the_host():
    teacher = Teacher(tiny_pipeline())
    used, idle = _Elsewhere(1, 1), _Elsewhere(1, 1)
    teacher.pipeline.register_modules(vae=torch.nn.Sequential(used), text_encoder=idle)
    teacher.device = torch.device("cuda")
    used.place = idle.place = "cuda"
    teacher.park([teacher.unet, teacher.pipeline.vae])
    assert (used.place, idle.place) == ("cuda", "cpu")


def test_a_random_student_or_a_stack_of_two_needs_full_rank():
    from fastdistill.training import ADDConfig, ReflowConfig

    for config, named in (
        (ADDConfig(student_init="random", adversarial_weight=0), "student_init"),
        (ReflowConfig(network="stacked", pairs=2, pair_steps=1, straightness_samples=0), "network"),
    ):
        config = changed(config, trainer={"memory": {"roles": "lora:2"}})
        teacher = Teacher(tiny_pipeline())
        conditions = teacher.encode(PROMPTS)
        data = LatentData(torch.zeros(2, *teacher.sample_shape), conditions, torch.zeros(2, 1, dtype=torch.int64))
        with pytest.raises(ValueError, match=f'{named} .*memory.roles "full"; got adapters'):
            distill(teacher, PROMPTS, config, images=data)
