"""The text encoder's output is kept per prompt: the same prompt again costs a look-up.

Each prompt is encoded by itself, cached or not, so that its embedding does not depend on what it came with.
"""

from __future__ import annotations

from fastdistill.engine.components import Components
from fastdistill.engine.report import PassReport

CAPACITY = 64  # prompts; 15 MB at 77 tokens of 768 float32 values


def apply(components: Components) -> PassReport:
    components.prompt_cache = CAPACITY
    return PassReport("prompt_cache", {f"cache of the {CAPACITY} prompts used last": 1})
