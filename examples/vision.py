"""A vision-language model under MixKV: the prompt, images included, is compressed before the answer.

The model is a LLaVA of random weights, made here, so that this runs anywhere; another one is loaded in its place with
``AutoModelForImageTextToText.from_pretrained`` and its own processor.

    python -P examples/vision.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import kvpolicy
from kvpolicy.runtimes.hf import PolicyCache, generate

SIDE, PATCH, IMAGE = 32, 4, 5
PATCHES = (SIDE // PATCH) ** 2


def random_llava() -> LlavaForConditionalGeneration:
    """Return a small LLaVA with random weights, in evaluation mode."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, initializer_range=0.2,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.12,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_token_id=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def main(argv: Sequence[str] | None = None) -> tuple[PolicyCache, float]:
    """Answer; returns the cache, and the share of what is held that belongs to the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--by-modality", action="store_true", help="treat image and text tokens apart")
    options = parser.parse_args(argv)
    model = random_llava()
    # What a processor returns: words, then a place for each patch of the image, then words.
    words = torch.randint(6, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[:, :8], torch.full((1, PATCHES), IMAGE), words[:, 8:]], 1)
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    spec = kvpolicy.load("mixkv", budget=options.budget).replace({"protect.recent": 8, "importance.observe": 8})
    if options.by_modality:
        spec = spec.replace({"mixer.by_modality": True, "redundancy.by_modality": True})
    output, cache = generate(model, inputs, spec, max_new_tokens=8, do_sample=False)
    kept = cache.kept(layer=0, head=0)
    of_image = sum(8 <= position < 8 + PATCHES for position in kept) / len(kept)
    print(f"answer: {output[0, ids.shape[1] :].tolist()}")
    print(f"{cache.stats()!r}; {of_image:.0%} of what head 0 of layer 0 holds is of the image")
    return cache, of_image


if __name__ == "__main__":
    main()
