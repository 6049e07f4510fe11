"""Every damage to a set is found, and named by its file."""

import dataclasses
import json
import shutil

import pytest
import torch
from fastdistill.training import Teacher
from fastdistill.training.pairs import PairSetError, Source, generate, verify
from fastdistill.training.pairs.shards import record_file, shard_file, write_shard
from safetensors import safe_open

from ..toys import tiny_pipeline
from .conftest import PROMPTS


def rewrite(folder, change, *, with_record=True, shard=1):
    """Change a shard's tensors and metadata in place; with its record, as a program that knows the format would."""
    file, record = shard_file(folder, shard), record_file(folder, shard)
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    change(tensors, metadata)
    before = record.read_text()
    write_shard(folder, shard, tensors, metadata)
    if not with_record:
        record.write_text(before)


def swap(tensors, metadata):
    tensors["noise"], tensors["latent"] = tensors["latent"], tensors["noise"]


def swap_one(tensors, metadata):
    tensors["noise"][2], tensors["latent"][2] = tensors["latent"][2].clone(), tensors["noise"][2].clone()


def other_seed(tensors, metadata):
    tensors["noise"] = torch.randn(4, 4, 8, 8)


def scale(tensors, metadata):
    tensors["noise"] *= 3


def overflow(tensors, metadata):
    tensors["latent"][3, 0, 0, 0] = float("nan")


def halve(tensors, metadata):
    tensors["latent"] = tensors["latent"].half()


def shorten(tensors, metadata):
    tensors["latent"] = tensors["latent"][:3].clone()


def drop(tensors, metadata):
    del tensors["noise"]


def add(tensors, metadata):
    tensors["extra"] = torch.zeros(1)


def other_prompts(tensors, metadata):
    tensors["prompt"] = tensors["prompt"].flip(0).roll(1)


def no_texts(tensors, metadata):
    del metadata["prompts"]


def reworded(tensors, metadata):
    metadata["prompts"] = json.dumps(["eleven"] * 4)


def other_steps(tensors, metadata):
    metadata["steps"] = "3"


def test_a_set_as_it_was_made_has_no_problems(made, teacher, source, small, tmp_path):
    assert verify(made, teacher=teacher) == []
    for name, options in {"seed": {"noise": "seed"}, "text": {"text": True}, "whole": {"draws": "whole"}}.items():
        generate(source, dataclasses.replace(small, **options), tmp_path / name)
        assert verify(tmp_path / name, teacher=teacher) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (swap, ["noise and latent are swapped in 4 pairs from 4 on"]),
        (swap_one, ["noise and latent are swapped in pair 6"]),
        (other_seed, ["noise is not that of seed 3 in 4 pairs from 4 on: mean "]),
        (scale, ["noise is not that of seed 3 in 4 pairs from 4 on: mean ", "standard deviation 3.0"]),
        (overflow, ["latent is not finite in pair 7"]),
        (halve, ["latent is (4, 4, 8, 8) float16; needed (4, 4, 8, 8) float32"]),
        (shorten, ["latent is (3, 4, 8, 8) float32; needed (4, 4, 8, 8) float32"]),
        (drop, ["noise is missing"]),
        (add, ["extra does not belong there"]),
        (other_prompts, ["the prompts are not those of seed 3"]),
        (no_texts, ["the prompts are not in its metadata"]),
        (reworded, ["is 'eleven' here and "]),
        (other_steps, ["is of another set: steps is 3, in set.json 2"]),
    ],
)
def test_wrong_content_is_found_even_where_the_record_fits(change, expected, made):
    rewrite(made, change)
    problems = verify(made)
    assert {problem.file for problem in problems} == {"pairs-00001.safetensors"}
    assert len(problems) == 1
    assert all(text in problems[0].what for text in expected)


def test_a_shard_that_was_changed_after_it_was_written_is_found_by_its_digest(made):
    rewrite(made, lambda tensors, metadata: tensors["latent"].mul_(1.001), with_record=False)
    (problem,) = verify(made)
    assert problem.file == "pairs-00001.safetensors"
    assert "was changed after it was written" in problem.what


def test_a_shard_that_is_cut_off_is_found_wherever_the_cut_is(made):
    file = shard_file(made, 2)
    content = file.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        assert verify(made) == [(file.name, f"is cut off: {length} of {len(content)} bytes")]


def test_a_missing_shard_a_foreign_one_and_a_missing_record_are_found(made):
    shard_file(made, 0).unlink()
    shutil.copy(shard_file(made, 1), shard_file(made, 3))
    record_file(made, 2).unlink()
    found = {problem.file: problem.what for problem in verify(made)}
    assert found.keys() == {shard_file(made, number).name for number in (0, 2, 3)}
    assert found["pairs-00000.safetensors"] == "is missing"
    assert "pairs-00002.json cannot be read" in found["pairs-00002.safetensors"]
    assert found["pairs-00003.safetensors"] == "does not belong to a set of 3 shards"


def test_a_shard_in_anothers_place_is_named_a_duplicate(made):
    shutil.copy(shard_file(made, 0), shard_file(made, 1))
    shutil.copy(record_file(made, 0), record_file(made, 1))
    assert verify(made) == [
        ("pairs-00001.safetensors", "holds the pairs 0 to 3, duplicates of pairs-00000.safetensors; needed 4 to 7")
    ]


def test_a_set_without_stored_noise_whose_latents_are_the_noise_is_found(source, small, tmp_path):
    generate(source, dataclasses.replace(small, noise="seed"), tmp_path / "set")

    def noise_itself(tensors, metadata):
        tensors["latent"] = small.noise_of(range(4, 8))

    rewrite(tmp_path / "set", noise_itself)
    assert verify(tmp_path / "set") == [("pairs-00001.safetensors", "latent is the noise itself in 4 pairs from 4 on")]


def test_latents_that_the_ode_does_not_end_in_are_found_by_solving_again(made, teacher):
    rewrite(made, lambda tensors, metadata: tensors["latent"].add_(0.1))
    assert verify(made) == []  # nothing but the teacher can tell
    problems = verify(made, teacher=teacher, samples=10)
    assert [problem.file for problem in problems] == ["pairs-00001.safetensors"] * 4
    assert "pair 4 is not where the teacher's ODE ends" in problems[0].what


def test_another_teacher_is_found_by_its_digest_and_another_solver_by_solving_again(made, small):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1
    other = Teacher(pipeline)
    (problem,) = verify(made, teacher=other)
    assert problem.file == "set.json"
    assert "unet_sha256 differ" in problem.what


def test_a_set_that_was_made_with_fewer_steps_than_it_says_is_found(teacher, source, small, tmp_path):
    generate(source, dataclasses.replace(small, steps=1), tmp_path / "set")
    for file in (tmp_path / "set").glob("*.safetensors"):
        number = int(file.stem[-5:])
        rewrite(tmp_path / "set", lambda tensors, metadata: metadata.update(steps="2"), shard=number)
    description = tmp_path / "set" / "set.json"
    description.write_text(description.read_text().replace('"steps": 1', '"steps": 2'))
    assert verify(tmp_path / "set") == []
    assert len(verify(tmp_path / "set", teacher=teacher, samples=3)) == 3


def test_a_description_that_cannot_be_read_is_refused_by_name(made):
    description = made / "set.json"
    description.write_text(description.read_text()[:100])
    with pytest.raises(PairSetError, match=r"set\.json"):
        verify(made)
    description.write_text(json.dumps({"count": 3}))
    with pytest.raises(PairSetError, match=r"set\.json: shard_size: Field required"):
        verify(made)


def test_a_half_precision_teachers_pairs_are_verified_in_its_own_precision(teacher, tmp_path):
    source = Source.of(teacher, PROMPTS, torch.bfloat16)
    generate(source, source.pair_set(count=3, steps=2), tmp_path / "set")
    assert verify(tmp_path / "set", teacher=teacher) == []
    assert teacher.unet.dtype == torch.float32
