"""Tokenizers made from merges: OpenAI's ids, and a small vocabulary that fits the small text encoders."""

import pytest

from fastdistill.models.architectures import ARCHITECTURES
from fastdistill.models.clip_tokenizer import build_tokenizer, clip_merges
from fastdistill.models.digits.text import caption_merges


@pytest.fixture(scope="module")
def clip():
    return build_tokenizer(clip_merges(), tokens=77)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A  Photo\tof a CAT", [320, 1125, 539, 320, 2368]),
        ("a diagram", [320, 22697]),
        ("a dog", [320, 1929]),
        ("hello world!", [3306, 1002, 256]),
        ("", []),
    ],
)
def test_prompts_have_the_ids_of_openais_tokenizer(clip, prompt, ids):
    assert clip(prompt).input_ids == [49406, *ids, 49407]


def test_the_vocabulary_is_whole(clip):
    assert len(clip_merges()) == 48894
    assert len(clip) == 49408
    assert clip.get_vocab()["!"] == 0


def test_prompts_are_filled_and_cut_to_77_tokens(clip):
    options = {"padding": "max_length", "truncation": True}
    assert clip("a cat", **options).input_ids == [49406, 320, 2368, *[49407] * 74]
    long = clip("cat " * 100, **options).input_ids
    assert long == [49406, *[2368] * 75, 49407]


def test_the_padding_of_openclip_is_the_first_token():
    tokenizer = build_tokenizer(clip_merges(), tokens=6, pad_token="!")
    assert tokenizer("a cat", padding="max_length").input_ids == [49406, 320, 2368, 49407, 0, 0]


def test_any_text_is_known_to_the_small_vocabulary():
    tokenizer = build_tokenizer(caption_merges(), tokens=77)
    for prompt in ("a photo of zebras", "naïve 日本 😀"):
        ids = tokenizer(prompt).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
        assert ids[-1] == max(ids) == len(tokenizer) - 1, "the pooled token is that with the largest id"


def test_the_text_encoders_have_an_embedding_for_each_token(clip):
    sizes = {"clip": len(clip), "small": len(build_tokenizer(caption_merges(), tokens=77))}
    for architecture in ARCHITECTURES.values():
        for name, tokenizer in architecture.tokenizers.items():
            encoder = architecture.networks[name.replace("tokenizer", "text_encoder")]
            assert encoder.config["vocab_size"] == sizes[tokenizer.vocabulary], (architecture.name, name)
