"""The text encoder's output is kept per prompt: the same prompt again costs a look-up.

Each prompt is encoded by itself, cached or not, so that its embedding does not depend on what it came with.
"""

from __future__ import annotations

from fastdistill.engine.components import Components
from fastdistill.engine.report import PassReport


def apply(components: Components) -> PassReport:
    components.switch_on_prompt_cache()
    return PassReport("prompt_cache", {f"cache of the {components.prompt_cache} prompts used last": 1})
