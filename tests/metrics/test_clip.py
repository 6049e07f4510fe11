"""CLIP score with a tiny CLIP model, and the forms in which pictures may come."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from fastdistill.metrics import clip_score, clip_similarities
from fastdistill.models import bundled_models


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(bundled_models()["digits-teacher"] / "tokenizer")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return model, CLIPProcessor(images, tokenizer)


PROMPTS = ["a handwritten seven", "two", "zero"]


@pytest.fixture
def pictures():
    pixels = np.random.default_rng(0).integers(0, 256, size=(3, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def test_it_is_the_mean_cosine_of_the_models_own_embeddings(clip, pictures):
    model, processor = clip
    similarities = clip_similarities(pictures, PROMPTS, model, processor, batch_size=2)
    with torch.no_grad():
        for picture, prompt, similarity in zip(pictures, PROMPTS, similarities):
            inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
            logit = model(**inputs).logits_per_image.item() / model.logit_scale.exp().item()
            assert similarity.item() == pytest.approx(logit, abs=1e-6)
    assert similarities.std() > 1e-3  # the prompt and the image matter
    expected = similarities.clamp(min=0).mean().item()
    assert clip_score(pictures, PROMPTS, model, processor) == pytest.approx(expected)
    assert clip_score(pictures, PROMPTS, model, processor, weight=2.5) == pytest.approx(2.5 * expected)


def test_a_negative_cosine_counts_as_zero(clip, pictures):
    model, processor = clip
    similarities = clip_similarities(pictures, PROMPTS, model, processor)

    class Opposite(torch.nn.Module):
        device = model.device

        def forward(self, **inputs):
            output = model(**inputs)
            output.text_embeds = -output.text_embeds * similarities.float().sign()[:, None]
            return output

    assert clip_score(pictures, PROMPTS, Opposite(), processor) == 0


def test_every_form_of_the_same_pictures_scores_the_same(clip, pictures):
    expected = clip_similarities(pictures, PROMPTS, *clip)
    array = np.stack([np.asarray(picture) for picture in pictures])
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for form in (array, array / 255, (array / 255).astype(np.float32), tensor, tensor / 255, (tensor / 255).double()):
        assert torch.equal(clip_similarities(form, PROMPTS, *clip), expected)
    grey = tensor[:, :1]
    assert torch.equal(
        clip_similarities(grey, PROMPTS, *clip), clip_similarities(grey.expand(-1, 3, -1, -1), PROMPTS, *clip)
    )


def test_a_prompt_beyond_the_context_is_cut_off(clip, pictures):
    long = " ".join(["seven"] * 100)
    assert clip_similarities(pictures[:1], [long], *clip).isfinite().all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 3, 16, 16) * 2 - 1, r"images: values from -\d.* to .*; needed \[0, 1\].*\(x \+ 1\) / 2"),
        (torch.full((3, 3, 16, 16), torch.nan), "images: values from nan"),
        (torch.zeros(3, 16, 16, 3), r"images: shape \(3, 16, 16, 3\); needed \(N, 1 or 3, H, W\)"),
        (np.zeros((3, 3, 16, 16)), r"needed \(N, H, W, 1 or 3\), as numpy images are"),
        (torch.zeros(3, 3, 16, 16, dtype=torch.int64), "dtype torch.int64; needed uint8"),
        (torch.zeros(2, 3, 16, 16), "prompts: 3 for 2 images"),
        ([], "images: none"),
    ],
)
def test_bad_pictures_are_named(clip, images, message):
    with pytest.raises(ValueError, match=message):
        clip_score(images, PROMPTS, *clip)


def test_other_things_than_pictures_and_texts_are_named(clip, pictures):
    with pytest.raises(TypeError, match="images: holds str"):
        clip_score(["a.png"], PROMPTS, *clip)
    with pytest.raises(TypeError, match="prompts: needed a sequence of texts"):
        clip_score(pictures[:1], "two", *clip)
