"""fastdistill: fused kernels, a one-step inference engine and a training loop for one-step diffusion.

    from fastdistill import OneStepPipeline          # sample faster
    from fastdistill.ops import group_norm_silu      # swap in a fused op
    from fastdistill.nn import GroupNormSiLU

Names are resolved when first used, so that `import fastdistill` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {"OneStepPipeline": "fastdistill.engine.pipeline"}
__all__ = ["OneStepPipeline", "__version__"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fastdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
