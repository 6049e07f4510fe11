"""The memory plan: its figures against counts by hand, and that planning leaves no trace."""

import json

import pytest
import torch
from fastdistill.training import Teacher, plan_memory
from fastdistill.training.memory_plan import CONTEXT_BYTES
from fastdistill.training.memory_report import measured, render, short, size
from fastdistill.training.plan_command import planned_config
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from fastdistill.cli import app

from .toys import tiny_pipeline

ARCH = "digits-teacher"
PLAIN = {"precision": "float32", "optimizer": "float32", "checkpointing": "none"}


def planned(method="dmd2", *settings, batch=2, device="cuda", largest=0, resolution=None, **options):
    config = planned_config(method, settings, batch=batch, **options)
    return plan_memory(config, ARCH, prompts=4, device=device, largest=largest, resolution=resolution)


def roles(plan):
    return {role.role: role for role in plan.stage.roles}


@pytest.fixture(scope="module")
def plain():
    return planned(**PLAIN)


def test_full_rank_roles_take_what_is_counted_by_hand(plain):
    student, teacher, fake = (roles(plain)[name] for name in ("student", "teacher", "fake_score"))
    n, m = student.parameters, fake.parameters
    assert m > n == teacher.parameters  # the fake score has a head
    assert student.weight_bytes == student.gradient_bytes == student.average_bytes == 4 * n
    assert (teacher.weight_bytes, teacher.gradient_bytes, teacher.optimizer_bytes) == (4 * n, 0, 0)
    assert fake.weight_bytes == fake.gradient_bytes == 4 * m
    # AdamW's two moments, and a step counter per tensor.
    for role in (student, fake):
        assert 8 * role.parameters < role.optimizer_bytes < 8.02 * role.parameters
    # 4 weights + 4 gradients + 8 moments, for two roles; the teacher in 16 bits: the 34 bytes of the public recipe.
    by_hand = 16 * n + 16 * n + 2 * n
    counted = sum(r.resident_bytes + r.gradient_bytes for r in (student, fake)) - student.average_bytes
    assert counted - 16 * (m - n) + teacher.weight_bytes // 2 == pytest.approx(by_hand, rel=2e-3)


def test_moments_of_eight_bits_take_two_bytes_for_eight(plain):
    eight = planned(**(PLAIN | {"optimizer": "8bit"}))
    ratio = roles(eight)["student"].optimizer_bytes / roles(plain)["student"].optimizer_bytes
    assert 2.03 / 8 < ratio < 2.4 / 8  # tensors below 4096 elements keep all of it


def test_adapters_share_one_base_which_is_counted_once(plain):
    found = roles(planned(**PLAIN, roles="lora:4"))
    base, student, fake = found["base"], found["student"], found["fake_score"]
    assert base.parameters == roles(plain)["student"].parameters
    assert (base.weight_bytes, base.gradient_bytes) == (4 * base.parameters, 0)
    assert found["teacher"].weight_bytes == 0
    head = roles(plain)["fake_score"].parameters - base.parameters
    assert fake.parameters == student.parameters + head
    assert student.gradient_bytes == student.average_bytes == 4 * student.parameters
    twice = roles(planned(**PLAIN, roles="lora:8"))["student"]
    assert twice.parameters == 2 * student.parameters


def test_every_turn_is_what_stays_and_gradients_and_activations(plain):
    stage = plain.stage
    for turn in stage.turns:
        if turn.turn != "preparation":
            assert turn.peak_bytes == stage.resident_bytes + turn.gradient_bytes + turn.activation_bytes
            assert turn.gradient_bytes <= roles(plain)[turn.turn].gradient_bytes
    assert plain.peak_bytes == plain.tensor_bytes + CONTEXT_BYTES
    assert plain.tensor_bytes == max(turn.peak_bytes for turn in stage.turns)


def test_more_samples_and_more_pixels_need_more(plain):
    def activations(plan):
        return {turn.turn: turn.activation_bytes for turn in plan.stage.turns if turn.turn != "preparation"}

    before = activations(plain)
    side = 2 * plain.resolution[0]
    for more in (activations(planned(batch=4, **PLAIN)), activations(planned(resolution=side, **PLAIN))):
        assert set(more) == set(before) == {"student", "fake_score"}
        assert all(more[turn] > 1.3 * before[turn] for turn in more)


def test_checkpointing_keeps_less_for_the_same_roles(plain):
    blocks = planned(**(PLAIN | {"checkpointing": "blocks"}))
    assert blocks.stage.resident_bytes == plain.stage.resident_bytes
    assert blocks.tensor_bytes < plain.tensor_bytes


def test_norms_are_float32_under_a_gpus_autocast_and_not_under_a_cpus():
    options = {"precision": "bfloat16", "checkpointing": "none", "optimizer": "float32"}
    gpu, cpu = planned(**options), planned(**options, device="cpu")
    assert gpu.tensor_bytes > cpu.tensor_bytes
    assert cpu.context_bytes == 0


def test_the_largest_tensors_are_named_with_the_op_that_made_them(plain):
    found = planned(**PLAIN, largest=3)
    assert found.tensor_bytes == plain.tensor_bytes
    for turn in found.stage.turns[1:]:
        assert [each.bytes for each in turn.largest] == sorted((e.bytes for e in turn.largest), reverse=True)
        assert len(turn.largest) == 3
        assert all(each.made_by.startswith(("aten.", "fastdistill.", "resident")) for each in turn.largest)


def test_tables_show_what_the_json_says(plain):
    data = json.loads(json.dumps(plain.to_dict()))
    assert data["peak_bytes"] == data["tensor_bytes"] + data["context_bytes"]
    console = Console(record=True, width=200)
    console.print(render(plain), short(plain))
    text = console.export_text()
    for role in data["roles"]:
        for name in ("weight", "gradient", "optimizer", "average"):
            assert size(role[f"{name}_bytes"]) in text
    for turn, figures in data["turns"].items():
        assert turn in text
        assert size(figures["peak_bytes"]) in text
        assert size(figures["activation_bytes"]) in text
    assert size(data["peak_bytes"]) in text


def test_after_a_run_the_measured_peak_stands_beside_the_planned_one(plain):
    assert "0.50 of it" in measured(plain, plain.tensor_bytes // 2)
    assert "nothing measures it" in measured(plain, None)


def test_what_auto_became_is_said_with_its_reason(plain):
    chosen = planned().stage.chosen
    assert chosen["optimizer"][0] == "float32"  # a tiny student
    assert all(reason for _, reason in chosen.values())
    assert "optimizer" not in plain.stage.chosen


def test_planning_a_loaded_teacher_changes_nothing():
    teacher = Teacher(tiny_pipeline())
    before = {name: t.clone() for name, t in teacher.unet.state_dict().items()}
    state, apply = torch.random.get_rng_state(), nn.Module._apply
    plan = plan_memory(planned_config("reflow", ["pairs=4"], batch=2), teacher, prompts=3, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert nn.Module._apply is apply
    assert not torch.is_autocast_enabled("cpu")
    assert all(torch.equal(t, before[name]) for name, t in teacher.unet.state_dict().items())
    assert not any(p.requires_grad for p in teacher.unet.parameters())
    values = sum(p.numel() for p in teacher.unet.parameters())
    assert roles(plan)["student"].weight_bytes == 4 * values


def test_the_command_prints_json_and_refuses_what_it_does_not_know_in_one_line():
    run = CliRunner()
    found = run.invoke(app, ["plan", "dmd2", "--arch", ARCH, "--batch", "2", "--roles", "lora:4", "--json"])
    data = json.loads(found.stdout)
    assert {"peak_bytes", "tensor_bytes", "context_bytes", "roles", "turns", "chosen"} <= set(data)
    assert data["roles"][0]["role"] == "student" or data["roles"][0]["role"] == "base"
    for wrong, known in (
        (["dmd3"], "dmd2"),
        (["dmd2", "--arch", "sd16"], "sd15"),
        (["dmd2", "--roles", "lora"], "lora:RANK"),
        (["dmd2", "--optimizer", "lion"], "8bit"),
        (["dmd2", "--device", "tpu"], "cuda or cpu"),
        (["dmd2", "--arch", ARCH, "--resolution", "33"], "a multiple of"),
    ):
        refused = run.invoke(app, ["plan", *wrong])
        assert refused.exit_code == 2
        assert known in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
