"""From prompts to what the UNet attends to, with a bounded cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastdistill.engine.shared import Shared


class PromptEncoder:
    """Encodes prompts one by one and keeps the last `capacity` results (0 keeps none). Thread-safe.

    One by one, because a batch changes the rounding: an image would depend on which prompts were asked for before.
    """

    def __init__(self, tokenizer, text_encoder, capacity: int) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._capacity = capacity
        self._cache: OrderedDict[str, Shared] = OrderedDict()
        self._lock = threading.Lock()  # also for the tokenizer, whose padding is state that threads would share
        positions = getattr(text_encoder.config, "max_position_embeddings", tokenizer.model_max_length)
        self.limit = min(tokenizer.model_max_length, positions)

    def tokenize(self, argument: str, prompts: Sequence[str]) -> dict[str, Any]:
        """Token ids and mask of each prompt that is not cached.

        Raises:
            ValueError: a prompt of more tokens than the encoder reads; `argument` is named in it.
        """
        tokens = {}
        for prompt in prompts:
            if prompt in self._cache or prompt in tokens:
                continue
            tokens[prompt] = self._tokenize(prompt)
            count = tokens[prompt].input_ids.shape[1]
            if count > self.limit:
                raise ValueError(
                    f"{argument}: {_shortened(prompt)!r} is {count} tokens long (start and end included); "
                    f"this model reads at most {self.limit}"
                )
        return tokens

    def __call__(self, prompts: Sequence[str], tokens: Mapping[str, Any]) -> list[Tensor]:
        """(1, tokens, D) per prompt, in the text encoder's dtype and on its device; `tokens` is what `tokenize` gave.

        The same tensor again for a prompt that is cached. Nobody may write to it.
        """
        encoded: dict[str, Tensor] = {}
        for prompt in prompts:
            if prompt not in encoded:
                encoded[prompt] = self._encode(prompt, tokens.get(prompt))
        return [encoded[prompt] for prompt in prompts]

    def clear(self) -> None:
        """Forget every cached prompt."""
        with self._lock:
            self._cache.clear()

    def _tokenize(self, prompt: str):
        with self._lock:
            # Nothing is cut off; verbose=False: nor is there a warning where an error follows.
            return self._tokenizer(
                prompt,
                padding="max_length",
                max_length=self.limit,
                truncation=False,
                return_tensors="pt",
                verbose=False,
            )

    def _encode(self, prompt: str, tokens) -> Tensor:
        """(1, tokens, D)"""
        with self._lock:
            if prompt in self._cache:
                self._cache.move_to_end(prompt)
                return self._cache[prompt].get()
        tokens = tokens or self._tokenize(prompt)  # it was cached when it was looked at, and has been dropped since
        encoder = self._text_encoder
        mask = (
            tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
        )
        embedding = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
        if self._capacity:
            with self._lock:
                self._cache[prompt] = Shared(embedding)
                if len(self._cache) > self._capacity:
                    self._cache.popitem(last=False)
        return embedding


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."
