"""CLIP tokenizers, of OpenAI's vocabulary or of a small one, from the list of their merges alone."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"


def build_tokenizer(merges: Sequence[tuple[str, str]], tokens: int, pad_token: str = END) -> CLIPTokenizer:
    """A `CLIPTokenizer` of the vocabulary that these byte-pair merges make.

    Args:
        merges: pairs of tokens, in the order in which they were found.
        tokens: that a prompt holds at most, with start and end.
        pad_token: that shorter prompts are filled with.
    """
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), merges)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=tokens, pad_token=pad_token)


def clip_merges() -> list[tuple[str, str]]:
    """The 48894 merges of OpenAI's CLIP, which OpenCLIP and so every Stable Diffusion has as well."""
    lines = gzip.decompress(CLIP_MERGES.read_bytes()).decode().splitlines()[1:]
    return [tuple(line.split()) for line in lines]


def write_vocabulary(folder: Path, merges: Sequence[tuple[str, str]]) -> None:
    """Write `vocab.json` and `merges.txt`, the two files that every version of transformers reads.

    The vocabulary is CLIP's: 256 letters, one for each byte, these again as ends of words, the merges, start and end.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    numbers = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n", "utf-8")
