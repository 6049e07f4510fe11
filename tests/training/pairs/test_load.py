"""Pairs from a set on disk are those that the solver makes, whoever asks for them."""

import dataclasses

import pytest
import torch
from fastdistill.training import DMDConfig, Setup, Teacher, make_pairs
from fastdistill.training.data import PromptData
from fastdistill.training.draws import Draws
from fastdistill.training.pairs import PairSetError, generate, load_pairs, pairs_for
from fastdistill.training.pairs.shards import shard_file
from fastdistill.training.settings import changed
from fastdistill.training.solvers import solve

from ..toys import tiny_pipeline
from .conftest import PROMPTS


@pytest.fixture
def setup(teacher):
    return Setup(teacher, PROMPTS, teacher.encode(PROMPTS))


def test_a_loaded_sample_is_where_the_ode_carries_its_noise(teacher, made):
    pairs = load_pairs(made, teacher=teacher)
    condition = teacher.encode(PROMPTS)[pairs.condition]
    options = {"solver": "heun", "steps": 2, "guidance_scale": 1.5, "unconditional": teacher.unconditional}
    expected = solve(teacher.unet, pairs.noise[:], condition, teacher.schedule, teacher.prediction_type, **options)
    torch.testing.assert_close(pairs.sample[:], expected)
    assert len(pairs.noise) == len(pairs.sample) == len(pairs.condition) == 10


def test_rows_are_given_in_the_order_that_is_asked_for_across_shards(made):
    pairs = load_pairs(made)
    whole = pairs.sample[:]
    assert torch.equal(pairs.sample[torch.tensor([9, 0, 5, 0])], whole[[9, 0, 5, 0]])
    assert torch.equal(pairs.noise[[4, 3]], pairs.noise[:][[4, 3]])
    assert torch.equal(pairs.noise[2:7], pairs.noise[:][2:7])


def test_noise_that_is_kept_as_its_seed_is_the_same_noise(source, small, made, tmp_path):
    by_seed = dataclasses.replace(small, noise="seed")
    generate(source, by_seed, tmp_path / "by-seed", batch_size=3)
    stored, drawn = load_pairs(made), load_pairs(tmp_path / "by-seed")
    chosen = torch.tensor([7, 2, 9])
    assert torch.equal(drawn.noise[chosen], stored.noise[chosen])
    assert torch.equal(drawn.sample[:], stored.sample[:])
    sizes = [sum(file.stat().st_size for file in (made, tmp_path / "by-seed")[i].glob("*.safetensors")) for i in (0, 1)]
    assert sizes[1] < 0.7 * sizes[0]


def test_noise_is_normal_and_every_prompt_comes_equally_often(source):
    pair_set = source.pair_set(count=900, seed=1)
    noise = pair_set.noise_of(range(200))
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02
    assert pair_set.prompts_of(range(900)).bincount().tolist() == [300, 300, 300]


def test_a_pair_is_a_function_of_seed_and_number_alone(source):
    long, short = source.pair_set(count=900, seed=1), source.pair_set(count=20, shard_size=3, seed=1)
    assert torch.equal(long.noise_of([17]), short.noise_of(range(16, 19))[1:2])
    assert torch.equal(long.prompts_of(range(5, 12)), short.prompts_of(range(12))[5:])
    assert not torch.equal(long.noise_of([17]), source.pair_set(count=900, seed=2).noise_of([17]))


def test_the_conditions_are_mapped_to_the_prompts_of_the_run(made):
    other = ["two", "unused", "digit 3", "a handwritten seven"]
    as_made, mapped = load_pairs(made), load_pairs(made, prompts=other)
    texts = [PROMPTS[line] for line in as_made.condition.tolist()]
    assert [other[line] for line in mapped.condition.tolist()] == texts


def test_prompts_that_the_run_does_not_have_are_named(made):
    with pytest.raises(PairSetError, match=r"1 of its prompts are not among the 2 of this run, for example 'digit 3'"):
        load_pairs(made, prompts=["two", "a handwritten seven"])


def test_another_teachers_set_is_refused(made):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1
    with pytest.raises(PairSetError, match="not by this teacher"):
        load_pairs(made, teacher=Teacher(pipeline))


def test_a_set_that_is_not_whole_is_refused_by_the_file(made):
    file = shard_file(made, 1)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(PairSetError, match=rf"{file.name}: {len(content) - 1} bytes, {len(content)} were written"):
        load_pairs(made)
    file.unlink()
    with pytest.raises(PairSetError, match=rf"1 of 3 shards are missing, the first is {file.name}"):
        load_pairs(made)
    with pytest.raises(PairSetError, match="no set of pairs"):
        load_pairs(made / "nowhere")


def test_made_pairs_are_the_same_in_memory_in_the_work_folder_and_after_an_interruption(setup, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdistill.training.pairs.supply.BATCH_SIZE", 4)
    options = {"count": 10, "steps": 2, "guidance_scale": 1.5, "seed": 5}
    in_memory = pairs_for(setup, **options)
    teacher = setup.teacher
    by_hand = make_pairs(
        teacher.unet,
        setup.conditions,
        teacher.schedule,
        teacher.prediction_type,
        sample_shape=teacher.sample_shape,
        unconditional=teacher.unconditional,
        batch_size=4,
        **options,
    )
    kept = dataclasses.replace(setup, work=tmp_path)
    first = pairs_for(kept, **options)
    (folder,) = tmp_path.iterdir()
    shard_file(folder, 1).unlink()  # as if the run had ended before it
    second = pairs_for(kept, **options)
    for pairs in (by_hand, first, second):
        assert all(torch.equal(a, b) for a, b in zip(in_memory, pairs))


def test_another_runs_pairs_in_the_same_work_folder_are_not_taken_for_ones_own(setup, tmp_path):
    kept = dataclasses.replace(setup, work=tmp_path)
    one, other = (pairs_for(kept, count=3, steps=1, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.noise, other.noise)


def test_dmd_learns_from_the_pairs_it_is_given(setup, made):
    config = changed(DMDConfig(), trainer={"batch_size": 4})
    stage = next(config.stages(dataclasses.replace(setup, pairs=made)))
    assert isinstance(stage.data, PromptData)
    batch = stage.data.batch(0, Draws("place", batch_size=4))
    pairs, found = load_pairs(made), batch["pair_sample"]
    places = [(pairs.sample[:] == sample).flatten(1).all(1).nonzero().item() for sample in found]
    assert torch.equal(batch["pair_noise"], pairs.noise[places])
    assert torch.equal(batch["pair_condition"].states, setup.conditions.states[pairs.condition[places]])
