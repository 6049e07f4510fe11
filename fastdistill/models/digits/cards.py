"""The model cards of digits pipelines: what, from which data, by which command, how good, what not to expect."""

from __future__ import annotations

from .figures import BEGIN, END

VIT_COMMAND = "python -m fastdistill.models.digits vit --out digits-vit --seed 0"
TEACHER_COMMAND = "python -m fastdistill.models.digits teacher --out digits-teacher --seed 0"

_DATA = """## Data, licence and attribution

1797 images of *Optical Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49), licensed CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), as scikit-learn carries them. Changed here: enlarged from 8x8 to 32x32
so that the 4x4 block means are the original values. The weights and the code are Apache-2.0, fastdistill contributors.
"""

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

{data}
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

_VIT_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags: [digits, tiny]
---

# digits-vit

A vision transformer of handwritten digits: the feature network of ADD's discriminator on the digits.

`ViTForImageClassification` in small: 4 blocks of width 64 over the 64 patches of a 32x32 image, {parameters}
parameters. Weights are float16 safetensors, opened in float32.

```python
from fastdistill.training import build_features

features = build_features("digits-vit")  # images (B, 3, 32, 32) in [-1, 1] to tokens (B, 64, 64) of five layers
```

`AutoModel` and `AutoModelForImageClassification` of transformers open the folder, which
`fastdistill.models.bundled_networks()` names; pixels are normalised to [-1, 1].

## Training

```
{command}
```

From nothing, on a CPU, {steps} steps of batch 32: cross-entropy (label smoothing {smoothing}) on the first {shown}
digits, turned, scaled, moved and partly covered at random.

{data}
## Figures

Printed by the command above: it recognises {accuracy} % of the last {held_out} digits, which it was not shown.
The order of the labels tells where a writer ends: these are the last two's, whose hands it never saw.

## Limits

- Its features tell digits apart; of any other picture they say little.
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
        data=_DATA,
        begin=BEGIN,
        end=END,
    )


def student_card(name: str, summary: str, command: str, method: str, steps: int = 1) -> str:
    """Markdown of the card of a student of `steps` steps: `summary` and `method` are sentences, `command` trains it."""
    return _CARD.format(
        name=name, summary=summary, steps=steps, command=command, method=method, data=_DATA, begin=BEGIN, end=END
    )


def vit_card(*, parameters: int, steps: int, smoothing: float, shown: int, held_out: int, accuracy: float) -> str:
    """Markdown of the card of the bundled `digits-vit`; `accuracy` is a share of the `held_out` digits."""
    return _VIT_CARD.format(
        command=VIT_COMMAND,
        parameters=f"{parameters / 1e6:.1f} M",
        steps=steps,
        smoothing=smoothing,
        shown=shown,
        held_out=held_out,
        accuracy=f"{100 * accuracy:.1f}",
        data=_DATA,
    )
