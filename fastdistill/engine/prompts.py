"""From prompts to what the UNet attends to, with a bounded cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor


class PromptEncoder:
    """Encodes prompts one by one and keeps the last `capacity` results (0 keeps none). Thread-safe.

    One by one, because a batch changes the rounding: an image would depend on which prompts were asked for before.
    """

    def __init__(self, tokenizer, text_encoder, capacity: int) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._capacity = capacity
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()  # also for the tokenizer, whose padding is state that threads would share
        positions = getattr(text_encoder.config, "max_position_embeddings", tokenizer.model_max_length)
        self.limit = min(tokenizer.model_max_length, positions)

    def check(self, argument: str, prompts: Sequence[str]) -> None:
        """Raise a ValueError for a prompt of more tokens than the encoder reads; `argument` is named in it."""
        for prompt in prompts:
            if prompt in self._cache:
                continue
            with self._lock:
                count = len(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if count > self.limit:
                raise ValueError(
                    f"{argument}: {_shortened(prompt)!r} is {count} tokens long (start and end included); "
                    f"this model reads at most {self.limit}"
                )

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, tokens, D) in the text encoder's dtype and on its device. Prompts must have passed `check`."""
        encoded: dict[str, Tensor] = {}
        for prompt in prompts:
            if prompt not in encoded:
                encoded[prompt] = self._encode(prompt)
        return torch.cat([encoded[prompt] for prompt in prompts]) if len(prompts) > 1 else encoded[prompts[0]]

    def clear(self) -> None:
        """Forget every cached prompt."""
        with self._lock:
            self._cache.clear()

    def _encode(self, prompt: str) -> Tensor:
        """(1, tokens, D)"""
        with self._lock:
            if prompt in self._cache:
                self._cache.move_to_end(prompt)
                return self._cache[prompt]
            tokens = self._tokenizer(prompt, padding="max_length", max_length=self.limit, return_tensors="pt")
        device = self._text_encoder.device
        config = self._text_encoder.config
        mask = tokens.attention_mask.to(device) if getattr(config, "use_attention_mask", False) else None
        embedding = self._text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        if self._capacity:
            with self._lock:
                self._cache[prompt] = embedding
                if len(self._cache) > self._capacity:
                    self._cache.popitem(last=False)
        return embedding


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."
