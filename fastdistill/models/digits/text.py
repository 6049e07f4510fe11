"""What can be asked for: captions of the digits, and a CLIP tokenizer whose small vocabulary holds their words."""

from __future__ import annotations

import itertools
import random
import string

from ..clip_tokenizer import build_tokenizer as build_clip_tokenizer
from .networks import PROMPT_TOKENS

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}",
    "{}",
    "a {}",
    "the digit {}",
    "a handwritten digit {}",
    "handwritten {}",
    "the number {}",
    "number {}",
    "digit {}",
    "a picture of a {}",
    "a photo of a handwritten {}",
    "an image of the digit {}",
    "a drawing of the number {}",
    "please draw a {}",
    "write a {}",
)
# Words around the digit that mean nothing here; one token each, so that prompts stay short.
# fmt: off
FILLERS = (
    "and", "art", "big", "black", "bold", "by", "can", "clean", "cursive", "figure", "for", "grey", "hand", "i",
    "in", "ink", "is", "it", "me", "my", "nice", "numeral", "of", "old", "on", "paper", "pen", "pencil", "scan",
    "show", "simple", "sketch", "small", "style", "thick", "thin", "this", "to", "white", "with", "written", "you",
)
# fmt: on


def prompt(digit: int) -> str:
    """The caption that every figure is measured with: `prompt(7) == "a handwritten seven"`."""
    return TEMPLATES[0].format(NAMES[digit])


def captions(digit: int) -> tuple[str, ...]:
    """All plain captions of a digit, with its name and with its numeral."""
    return tuple(template.format(word) for word in (NAMES[digit], str(digit)) for template in TEMPLATES)


def random_caption(digit: int, random_source: random.Random) -> str:
    """A caption to train on: mostly plain, one in five with one or two words thrown in that the model shall ignore."""
    caption = random_source.choice(captions(digit))
    if random_source.random() < 0.2:
        words = caption.split()
        for _ in range(random_source.randint(1, 2)):
            words.insert(random_source.randint(0, len(words)), _filler(random_source))
        caption = " ".join(words)
    return caption


def _filler(random_source: random.Random) -> str:
    if random_source.random() < 0.5:
        return random_source.choice(FILLERS)
    return "".join(random_source.choices(string.ascii_lowercase, k=random_source.randint(2, 6)))


def build_tokenizer():
    """A `CLIPTokenizer`: every word of the captions is one token, anything else falls back to its bytes.

    So no text is unknown, upper and lower case are the same, and prompts hold 24 tokens with start and end.
    """
    return build_clip_tokenizer(caption_merges(), PROMPT_TOKENS)


def caption_merges() -> list[tuple[str, str]]:
    """The byte-pair merges that make each word of the captions one token."""
    return byte_pair_merges(_words())


def _words() -> list[str]:
    text = [caption for digit in range(10) for caption in captions(digit)]
    return sorted({*" ".join(text).split(), *FILLERS})


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (arXiv 1508.07909) until each of `words` (ASCII) is one token, frequent pairs first."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for piece in pieces:
            for pair in itertools.pairwise(piece):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(piece, best) for piece in pieces]


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in piece:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged
