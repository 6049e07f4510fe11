"""Processes that share a run, its networks whole in each or sharded over all: the run of one process."""

import os
import shutil

import pytest
import torch
from fastdistill.training import CheckpointError
from fastdistill.training.sharding import blocks_of

from fastdistill.models import load_pipeline

from . import sharded_runs as runs
from .sharded_runs import ALONE, in_processes, job

SHARDINGS = ("none", "full")
UPDATES, BATCH = 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def made(folder):
    """What two processes make of everything that needs no earlier run."""
    jobs = {
        "watched": job(runs.watch, batch_size=2, sharding="full"),
        "exchange": runs.exchange,
        "adamw": runs.optimize,
        "eight bits": job(runs.optimize, bits=8),
        "refused": runs.refused,
        "bfloat16": job(runs.once, precision="bfloat16", memory={"checkpointing": "blocks"}),
        "float32": job(runs.once, precision="float32"),
        "poisoned": job(runs.optimize, poisoned=1),
    }
    for sharding in SHARDINGS:
        options = {"batch_size": BATCH // 2, "updates": UPDATES, "sharding": sharding}
        jobs[f"whole {sharding}"] = job(runs.train, **options)
        jobs[f"start {sharding}"] = job(runs.train, folder=folder / sharding, stop=1, **options)
    return in_processes(folder, jobs)


@pytest.fixture(scope="module")
def alone():
    return runs.train(ALONE, batch_size=BATCH, updates=UPDATES)


@pytest.fixture(scope="module")
def resumed(made, folder):
    """Runs that two processes began, one went on with and two ended; and what else needs the files of the first."""
    jobs, middle = {}, {}
    jobs["full disk"] = job(runs.save_on_a_full_disk, folder=shutil.copytree(folder / "full", folder / "full disk"))
    damaged = shutil.copytree(folder / "full", folder / "damaged")
    _flip(damaged / "step-00000002" / "student" / "shard-00002-model-00001-of-00001.safetensors")
    jobs["damaged"] = job(runs.resumed_error, folder=damaged)
    for sharding in SHARDINGS:
        first = shutil.copytree(folder / sharding, folder / f"{sharding} first")
        here = shutil.copytree(folder / sharding, folder / f"{sharding} again")
        options = {"batch_size": BATCH // 2, "updates": UPDATES}
        jobs[f"read {sharding}"] = job(runs.read, folder=first, sharding="full", **options)
        jobs[f"same {sharding}"] = job(runs.train, folder=here, sharding=sharding, **options)
        middle[sharding] = runs.train(
            ALONE, folder=folder / sharding, batch_size=BATCH, updates=UPDATES, sharding=sharding, stop=2
        )
        jobs[f"end {sharding}"] = job(runs.train, folder=folder / sharding, sharding=sharding, **options)
    return in_processes(folder, jobs), middle


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def assert_same(found, expected):
    different = [n for n, t in expected.items() if not n.startswith("held.") and not torch.equal(found[n], t)]
    assert found.keys() == expected.keys()
    assert not different


def assert_close(found, expected):
    """Each tensor as a whole: AdamW makes a step of every gradient, the smallest included, whose sign is rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("held."):
            continue
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-30)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_equal_one_with_twice_the_batch(made, alone, sharding):
    first, second = made[f"whole {sharding}"]
    assert_same(first, second)
    assert_close(first, alone)


def test_in_bfloat16_blocks_are_gathered_so_and_all_that_is_kept_stays_float32(made):
    found, exact = made["bfloat16"][0], made["float32"][0]
    assert found["computed in"] == [torch.bfloat16, torch.bfloat16]
    assert exact["computed in"] == [torch.float32, torch.float32]
    assert found["kept in"] == exact["kept in"] == [torch.float32]
    error = (found["exp_avg"] - exact["exp_avg"]).norm() / exact["exp_avg"].norm()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_run_resumed_by_as_many_processes_equals_the_uninterrupted_one_bit_for_bit(made, resumed, sharding):
    whole, ended = made[f"whole {sharding}"], resumed[0][f"same {sharding}"]
    for rank in range(2):
        assert_same(ended[rank], whole[rank])


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_one_and_two_processes_resume_each_other(made, resumed, sharding):
    # Within rounding: one process adds the gradients of a batch in another order.
    first, second = resumed[0][f"end {sharding}"]
    assert_same(first, second)
    assert_close(first, made[f"whole {sharding}"][0])


@pytest.mark.parametrize("saved", SHARDINGS)
@pytest.mark.parametrize("here", ["one process", "sharded"])
def test_what_is_read_is_to_the_bit_what_was_saved_however_many_read_it(made, resumed, folder, saved, here):
    expected = {name: t for name, t in made[f"start {saved}"][0].items() if not name.endswith("norm")}
    if here == "one process":
        reader = runs.trainer(ALONE, folder=folder / f"{saved} first", batch_size=BATCH, updates=UPDATES)
        reader.resume()
        found = runs.tensors(reader)
    else:
        found = resumed[0][f"read {saved}"][1]
    for name, value in expected.items():
        if not name.startswith(("delivered.", "held.")):
            assert torch.equal(found[name], value), name


def test_a_resume_with_another_batch_over_all_processes_says_what_is_needed(made, folder):
    for settings, needed in (
        (
            {"batch_size": 2},
            r"samples per update is 4 .* and 2 here \(processes 1 x batch_size 2 .*needed batch_size 4",
        ),
        ({"batch_size": 2, "accumulation": 4}, "needed batch_size 1"),
        ({"batch_size": 2, "accumulation": 3}, "needed a number of processes x accumulation that divides 4"),
    ):
        with pytest.raises(CheckpointError, match=needed):
            runs.trainer(ALONE, folder=folder / "full", updates=UPDATES, **settings).resume()
    runs.trainer(ALONE, folder=folder / "full", updates=UPDATES, batch_size=2, accumulation=2).resume()


def test_a_damaged_shard_is_named_by_every_process(resumed):
    first, second = resumed[0]["damaged"]
    assert first == second
    assert "step-00000002/student/shard-00002-model-00001-of-00001.safetensors: its content was changed" in first


def test_a_full_disk_of_one_process_is_told_by_all_and_loses_nothing_that_was_saved(resumed):
    first, second = resumed[0]["full disk"]
    assert first == second
    message, left = first
    assert "step-00000001: cannot be written (process 1: [Errno 28] No space left on device)" in message
    assert [name for name in left if "step" in name] == ["step-00000002"]


def test_an_older_checkpoint_is_used_where_a_shard_of_the_newest_is_gone(resumed, folder):
    here = shutil.copytree(folder / "full", folder / "gone")
    newest = max(here.glob("step-*"))
    os.remove(newest / "average" / "shard-00001-model-00001-of-00001.safetensors")
    reader = runs.trainer(ALONE, folder=here, batch_size=BATCH, updates=UPDATES)
    with pytest.warns(UserWarning, match=f"{newest.name}/average/shard-00001.*is missing"):
        assert reader.resume() == 2


def test_nothing_in_a_checkpoint_is_pickled(resumed, folder):
    files = [file for file in (folder / "full").glob("step-*/**/*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    assert any(file.name.startswith("shard-00002") for file in files)


def test_each_process_holds_its_part_of_networks_moments_and_average(made):
    method = runs.trainer(ALONE).method
    sizes = {role: sum(p.numel() for p in network.parameters()) for role, network in method.roles.items()}
    sizes |= {"average": sizes["student"], "exp_avg": sizes["student"]}
    first, second = made["start full"]
    for role, size in sizes.items():
        held = first[f"held.{role}"], second[f"held.{role}"]
        assert sum(held) == size
        assert max(held) < 0.53 * size  # an odd row goes to the first


def test_the_first_process_alone_can_look_at_the_networks_and_all_deliver_the_best(made):
    first, second = made["watched"]
    teacher = runs.unet()
    x, t, condition = torch.ones(1, 4, 8, 8), torch.tensor([999]), torch.ones(1, 5, 8)
    with torch.no_grad():
        expected = teacher(x, t, condition).sample
    for seen in ("seen.0", "seen.1"):  # before the first update the average is the teacher's copy
        torch.testing.assert_close(first[seen], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(first["seen.2"], first["seen.3"])
    assert first["best"] == second["best"] == 1
    delivered = {name: t for name, t in first.items() if name.startswith("delivered")}
    assert all(torch.equal(second[name], t) for name, t in delivered.items())
    teacher.load_state_dict({name.removeprefix("delivered."): t for name, t in delivered.items()})
    with torch.no_grad():
        torch.testing.assert_close(teacher(x, t, condition).sample, first["seen.2"], rtol=1e-5, atol=1e-6)


def test_the_exchange_of_gradients_takes_two_buckets_of_memory_and_no_second_set(made):
    for each in made["exchange"]:
        numbers = [t.flatten()[0].item() for t in each["tensors"][:19]]
        assert numbers == [number + 0.5 for number in range(19)]
        last, first_half, strided = each["tensors"][19:]
        assert torch.equal(last, torch.arange(120.0).view(2, 3, 4, 5) * 1.5)
        assert torch.equal(first_half, torch.full((9,), 0.5, dtype=torch.float64))
        assert torch.equal(strided, torch.arange(8.0)[::2] * 0.5)
        assert each["peak"] <= 2 * 2**21 + 2**10 < 0.25 * each["bytes"]


def plain_adamw(**options):
    """What `optimize` does, by one process."""
    model = runs.network()
    optimizer, ema = runs.optimizer_of(model, **options)
    samples = torch.randn(8, 96, generator=torch.Generator().manual_seed(4))
    for _ in range(3):
        model(samples).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, ema


def test_sharded_adamw_clips_by_the_norm_of_all_shards_and_averages_as_one_process(made):
    model, optimizer, ema = plain_adamw()
    state = optimizer.state.values()
    for each in made["adamw"]:
        torch.testing.assert_close(each["norm"], optimizer.grad_norm)
        assert each["norm"] > 1e-3  # the gradients are clipped, which the first moments show
        for name, expected in (
            ("exp_avg", [s["exp_avg"] for s in state]),
            ("exp_avg_sq", [s["exp_avg_sq"] for s in state]),
            ("params", list(model.parameters())),
            ("ema", ema),
        ):
            torch.testing.assert_close(each[name], [t.detach() for t in expected], rtol=1e-4, atol=1e-8)
        assert each["step"] == [3, 3, 3, 3]


def test_moments_of_eight_bits_are_kept_per_shard_and_leave_as_float32(made):
    exact, eight = made["adamw"][0], made["eight bits"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        first, expected = eight[name][0], exact[name][0]
        assert first.dtype == torch.float32
        assert not torch.equal(first, expected)
        assert (first - expected).norm() < 0.1 * expected.norm()


def test_a_gradient_that_is_not_finite_in_one_shard_leaves_the_step_out_everywhere(made):
    good, (first, second) = made["adamw"][0], made["poisoned"]
    for each in (first, second):
        assert each["skipped"] == 1
        assert each["step"] == [2, 2, 2, 2]
    for name in ("params", "ema", "exp_avg"):
        assert all(map(torch.equal, first[name], second[name]))
        assert all(bool(t.isfinite().all()) for t in first[name])
    assert not torch.equal(first["params"][0], good["params"][0])


def test_a_student_is_cut_at_its_transformer_and_residual_blocks():
    student = runs.unet()
    blocks = blocks_of(student)
    names = [name for name, module in student.named_modules() if any(module is block for block in blocks)]
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in names
    assert "mid_block.resnets.1" in names
    assert "up_blocks.0" in names
    order = [blocks.index(student.get_submodule(name)) for name in ("up_blocks.0.resnets.0", "up_blocks.0")]
    assert order == sorted(order)  # inner ones first


def test_what_cannot_be_sharded_is_refused(made):
    with pytest.raises(ValueError, match=r"sharding full splits networks that train as a whole; .*lora:4"):
        runs.trainer(ALONE, sharding="full", memory={"roles": "lora:4"})
    first, second = made["refused"]
    assert first == second
    assert 'sharding "full": GaussianNetwork names no blocks' in first


def test_the_command_trains_a_sharded_student_and_saves_a_whole_one(tmp_path):
    (tmp_path / "prompts.txt").write_text("a handwritten seven\ntwo\n")
    settings = ("sharding=full", "batch_size=2", "updates=1")
    command = ["dmd", "--prompts=prompts.txt", "--out=student", "--device=cpu", "--checkpoints=run"]
    command += ["--set=pairs=4", "--set=pair_steps=1", "--set=critic_ratio=1", "--export-dtype=float32"]
    runs.processes(runs.run_command, tmp_path, [*command, *(f"--set=trainer.{each}" for each in settings)])
    student, teacher = load_pipeline(tmp_path / "student").unet, load_pipeline("digits-teacher").unet
    assert type(student) is type(teacher)
    moved = [not torch.equal(p, q) for p, q in zip(student.parameters(), teacher.parameters(), strict=True)]
    assert all(moved)
    assert all(bool(p.isfinite().all()) for p in student.parameters())
    shards = sorted(path.name for path in (tmp_path / "run" / "dmd" / "step-00000001" / "student").iterdir())
    assert [name[:11] for name in shards] == ["shard-00001", "shard-00002"]
