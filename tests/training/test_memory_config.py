"""What is chosen where nothing is said, and settings that do not go together."""

import pytest
from fastdistill.training.config import TrainerConfig
from fastdistill.training.memory_config import HUGE, LARGE, MemoryConfig, chosen, settled
from fastdistill.training.settings import changed


def test_a_large_student_saves_memory_and_a_small_one_nothing():
    large, small = settled(TrainerConfig(), LARGE), settled(TrainerConfig(), LARGE - 1)
    assert (large.precision, small.precision) == ("bfloat16", "float32")
    assert large.memory == MemoryConfig("full", "8bit", "blocks", "bfloat16", "sliced", "chunked", "cpu")
    assert small.memory == MemoryConfig("full", "float32", "none", "float32", "plain", "chunked", "device")


def test_a_student_of_sdxls_size_decodes_block_by_block():
    assert settled(TrainerConfig(), HUGE).memory.decode == "checkpointed"
    assert settled(TrainerConfig(), HUGE - 1).memory.decode == "sliced"


def test_adapters_keep_float32_moments_unless_asked():
    config = TrainerConfig(memory=MemoryConfig("lora:8"))
    assert settled(config, LARGE).memory.optimizer == "float32"
    assert settled(changed(config, memory={"optimizer": "8bit"}), LARGE).memory.optimizer == "8bit"


def test_what_is_said_is_kept_and_what_is_chosen_is_told():
    config = TrainerConfig(precision="float32", memory=MemoryConfig(checkpointing="recompute", idle="device"))
    found = settled(config, LARGE)
    assert (found.precision, found.memory.checkpointing, found.memory.idle) == ("float32", "recompute", "device")
    assert found.memory.frozen == "float32"
    assert chosen(config, LARGE) == {
        "optimizer": "8bit",
        "frozen": "float32",
        "decode": "sliced",
        "guidance": "chunked",
    }
    assert chosen(found, LARGE) == {}


@pytest.mark.parametrize(("roles", "rank"), [("full", None), ("lora:1", 1), ("lora:64", 64)])
def test_roles_are_full_or_adapters_of_a_rank(roles, rank):
    assert MemoryConfig(roles).rank == rank


@pytest.mark.parametrize(
    "setting", [{"roles": "lora"}, {"roles": "lora:0"}, {"roles": "half"}, {"optimizer": "4bit"}, {"idle": "disk"}]
)
def test_an_unknown_choice_is_refused_with_the_known_ones(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"^{name} must be .*(lora:RANK|auto).*; got {value}"):
        MemoryConfig(**setting)


def test_frozen_networks_in_bfloat16_need_bfloat16_to_compute_in():
    config = TrainerConfig(precision="float32", memory=MemoryConfig(frozen="bfloat16"))
    with pytest.raises(ValueError, match=r"frozen bfloat16 needs precision bfloat16.*got float32"):
        settled(config, 1)
