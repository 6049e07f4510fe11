"""The prompt encoder and its cache."""

import pytest
import torch

from fastdistill.engine.prompts import PromptEncoder

from .conftest import build_text_encoder


@pytest.fixture
def counted(tokenizer):
    """A text encoder, and the list of batch sizes it was called with."""
    encoder, calls = build_text_encoder(tokenizer), []
    encoder.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    return encoder, calls


def encode(encoder, prompts):
    with torch.inference_mode():
        return torch.cat(encoder(prompts, encoder.tokenize("prompts", prompts)))


def test_an_embedding_is_what_diffusers_would_encode(diffusers_pipeline, tokenizer):
    encoder = PromptEncoder(tokenizer, diffusers_pipeline.text_encoder, 4)
    exact, _ = diffusers_pipeline.encode_prompt(["three", "a 7"], "cpu", 1, False)
    torch.testing.assert_close(encode(encoder, ["three", "a 7"]), exact, rtol=1e-5, atol=1e-5)


def test_prompts_are_encoded_one_by_one_and_once_each(tokenizer, counted):
    text_encoder, calls = counted
    encoder = PromptEncoder(tokenizer, text_encoder, 4)
    first = encode(encoder, ["one", "two", "one"])
    assert first.shape == (3, 24, 24)
    assert calls == [1, 1]
    assert torch.equal(encode(encoder, ["two", "one", "one"]), first[[1, 0, 2]])
    assert calls == [1, 1]


def test_the_cache_is_bounded_and_drops_what_was_used_longest_ago(tokenizer, counted):
    text_encoder, calls = counted
    encoder = PromptEncoder(tokenizer, text_encoder, 2)
    for prompt in ("one", "two", "one", "three"):  # drops "two"
        encode(encoder, [prompt])
    assert len(calls) == 3
    encode(encoder, ["one"])
    assert len(calls) == 3
    encode(encoder, ["two"])
    assert len(calls) == 4


def test_without_capacity_nothing_is_kept(tokenizer, counted):
    text_encoder, calls = counted
    encoder = PromptEncoder(tokenizer, text_encoder, 0)
    encode(encoder, ["one"])
    encode(encoder, ["one"])
    assert len(calls) == 2


def test_a_batch_larger_than_the_cache_is_encoded_whole(tokenizer, counted):
    encoder = PromptEncoder(tokenizer, counted[0], 2)
    prompts = ["one", "two", "three", "four"]
    together = encode(encoder, prompts)
    for row, prompt in zip(together, prompts):
        assert torch.equal(encode(encoder, [prompt])[0], row)


def test_a_prompt_dropped_between_look_and_use_is_tokenized_again(tokenizer, counted):
    encoder = PromptEncoder(tokenizer, counted[0], 2)
    expected = encode(encoder, ["one"])
    tokens = encoder.tokenize("prompts", ["one"])
    assert not tokens
    encoder.clear()
    with torch.inference_mode():
        assert torch.equal(encoder(["one"], tokens)[0], expected)


def test_a_prompt_of_exactly_the_limit_is_read(tokenizer, counted):
    encoder = PromptEncoder(tokenizer, counted[0], 2)
    assert encode(encoder, [" ".join(["three"] * 22)]).shape == (1, 24, 24)
    with pytest.raises(ValueError, match="25 tokens long"):
        encoder.tokenize("prompts", [" ".join(["three"] * 23)])
