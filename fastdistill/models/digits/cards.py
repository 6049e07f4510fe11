"""The model cards of digits pipelines: what, from which data, by which command, how good, what not to expect."""

from __future__ import annotations

from .figures import BEGIN, END

TEACHER_COMMAND = "python -m fastdistill.models.digits teacher --out digits-teacher --seed 0"

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [one-step-diffusion, digits, tiny]
---

# {name}

{summary}

An ordinary `StableDiffusionPipeline` in small: `CLIPTextModel` (0.1 M parameters, 24 tokens), `UNet2DConditionModel`
(1.2 M, 8x8x4 latents), `AutoencoderKL` (0.4 M, 32x32 RGB). Weights are float16 safetensors, opened in float32.

```python
from diffusers import DiffusionPipeline
from fastdistill.models import resolve_model

pipe = DiffusionPipeline.from_pretrained(resolve_model("{name}"))
pipe("a handwritten seven", num_inference_steps={steps}, guidance_scale=1.0).images[0].save("seven.png")
```

Prompts name one digit, as a word or a numeral, in any case: "a handwritten seven", "the digit 7", "seven".

## Training

```
{command}
```

{method}

## Data, licence and attribution

1797 images of *Optical Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49), licensed CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), as scikit-learn carries them. Changed here: enlarged from 8x8 to 32x32
so that the 4x4 block means are the original values. The weights and the code are Apache-2.0, fastdistill contributors.

## Figures

{begin}
(written by `python -m fastdistill.models.digits evaluate`)
{end}

## Limits

- It knows ten digits and nothing else; words it has not seen are ignored at best.
- It has seen 1797 images by 13 writers. The same images are the reference of the Frechet distance, so
  the figures say how well this data is reproduced, not how well it generalises.
- It is meant for tests, demonstrations and teaching, at 32x32 pixels and in grey.
"""


def teacher_card() -> str:
    """Markdown of the card of the bundled `digits-teacher`, with a place for its figures."""
    return _CARD.format(
        name="digits-teacher",
        summary="A latent diffusion model of handwritten digits, the teacher of the one-step students.",
        steps=25,
        command=TEACHER_COMMAND,
        method=(
            "From nothing, on a CPU: the autoencoder first, then UNet and text encoder together by the mean squared "
            "error of v\nunder a zero-terminal-SNR schedule (arXiv 2202.00512, 2305.08891), averaged weights, "
            "one caption in ten left empty for guidance."
        ),
        begin=BEGIN,
        end=END,
    )


def student_card(name: str, summary: str, command: str, method: str, steps: int = 1) -> str:
    """Markdown of the card of a student of `steps` steps: `summary` and `method` are sentences, `command` trains it."""
    return _CARD.format(name=name, summary=summary, steps=steps, command=command, method=method, begin=BEGIN, end=END)
