"""Prompts: each word of the captions is a token, nothing is unknown, case does not matter."""

import random

import pytest

from fastdistill.models.digits import text


@pytest.fixture(scope="module")
def tokenizer():
    return text.build_tokenizer()


def tokens_of(tokenizer, prompt):
    ids = tokenizer(prompt).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return ids[1:-1]


def test_every_caption_has_one_token_per_word(tokenizer):
    for digit in range(10):
        for caption in text.captions(digit):
            assert len(tokens_of(tokenizer, caption)) == len(caption.split()), caption


def test_captions_name_their_digit_as_word_and_numeral():
    assert text.prompt(7) == "a handwritten seven"
    assert {"a handwritten seven", "a handwritten 7", "seven", "7", "the digit seven"} <= set(text.captions(7))
    assert not set(text.captions(7)) & set(text.captions(1))


def test_case_and_spacing_do_not_matter(tokenizer):
    assert tokens_of(tokenizer, "A  Handwritten\tSEVEN ") == tokens_of(tokenizer, "a handwritten seven")


@pytest.mark.parametrize("prompt", ["zebra", "naïve", "日本", "😀", "x" * 500, "a;b&c"])
def test_unknown_text_falls_back_to_bytes(tokenizer, prompt):
    ids = tokens_of(tokenizer, prompt)
    assert ids
    assert tokenizer.unk_token_id not in ids
    assert max(ids) < len(tokenizer)


def test_text_comes_back_from_its_tokens(tokenizer):
    for prompt in ("a handwritten seven", "some zebra 42"):
        assert (
            tokenizer.decode(tokens_of(tokenizer, prompt)).split()
            == tokenizer.decode(tokens_of(tokenizer, prompt.upper())).split()
        )
    assert tokenizer.decode(tokens_of(tokenizer, "a handwritten seven")) == "a handwritten seven"


def test_the_empty_prompt_is_start_and_end(tokenizer):
    assert tokens_of(tokenizer, "") == []


def test_random_captions_hold_the_digit_and_fit(tokenizer):
    source = random.Random(0)
    for _ in range(500):
        digit = source.randrange(10)
        caption = text.random_caption(digit, source)
        assert {text.NAMES[digit], str(digit)} & set(caption.split()), caption
        assert len(tokenizer(caption).input_ids) <= text.PROMPT_TOKENS, caption


def test_byte_pair_merges_join_the_most_frequent_pair_first():
    # "a b" occurs four times, then "ab c</w>" twice and "ab d</w>" once.
    assert text.byte_pair_merges(["abab", "abc", "zabc", "abd"])[0] == ("a", "b")


def test_byte_pair_merges_end_with_whole_words():
    merges = text.byte_pair_merges(["see", "seven", "eve"])
    assert {"see</w>", "seven</w>", "eve</w>"} <= {a + b for a, b in merges}
