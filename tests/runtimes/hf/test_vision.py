"""MixKV on a vision-language model: random weights, but the real processor, real images and the real image tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import kvpolicy
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache, generate

pytest.importorskip("PIL")

WORDS = {
    *("what", "does", "the", "picture", "show", "and", "where", "is", "red", "boat", "it"),
    *("please", "tell", "me", "this", "strange"),
}
SIDE, PATCH = 16, 4
BUDGET = 20


@pytest.fixture(scope="module")
def processor():
    """LLaVA's own processor over a tokenizer of a few words: 16 x 16 pixels in patches of 4, so 16 image tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: n for n, word in enumerate([*special, *sorted(WORDS)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(processor):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, initializer_range=0.2,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.12, tie_word_embeddings=False,
    )  # fmt: skip
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=token, image_token_id=token)
        )
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made.eval()


@pytest.fixture(scope="module")
def inputs(processor):
    """Two rows, each with an image of its own between words, one of them left-padded."""
    from PIL import Image

    texts = [
        "please tell me <image> what does the picture show and where is the red boat",
        "this strange picture <image> what is it",
    ]
    generator = torch.Generator().manual_seed(2)
    pixels = [torch.randint(0, 256, (24, 20, 3), generator=generator, dtype=torch.uint8) for _ in texts]
    images = [Image.fromarray(each.numpy()) for each in pixels]
    made = processor(text=texts, images=images, padding=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def mixkv(by_modality: bool, **changes: Any):
    spec = kvpolicy.load("mixkv").replace(
        {
            "budget.tokens": BUDGET,
            "protect.recent": 4,
            "importance.observe": 4,
            "mixer.window": 4,
            "mixer.by_modality": by_modality,
            "redundancy.by_modality": by_modality,
            **changes,
        }
    )
    return spec.build()


def kept_sets(cache, rows=2):
    return [[cache.kept(layer, head, row) for layer in range(3) for head in range(2)] for row in range(rows)]


def test_the_processor_makes_image_tokens(processor, inputs):
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == token).sum(1).tolist() == [(SIDE // PATCH) ** 2] * 2
    assert inputs["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert inputs["attention_mask"].sum(1).tolist() == [14 + 16, 6 + 16]


def test_the_image_reaches_the_text(model, inputs):
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    got, cache = generate(model, inputs, mixkv(True, **{"budget.tokens": 100}), do_sample=False, max_new_tokens=12)
    assert torch.equal(got, wanted)
    assert cache.stats().evicted == 0
    blind = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits[:, -1], model(**blind).logits[:, -1], atol=1e-3)


@pytest.mark.parametrize("by_modality", [False, True])
def test_mixkv_runs_end_to_end(model, inputs, by_modality, monkeypatch):
    """Exactly the budget of the prompt is kept, and what a component is told about images is true."""
    policy = mixkv(by_modality)
    told = []
    mix = type(policy.mixer).mix

    def spy(mixer, importance, redundancy, view):
        # The view shows the cache itself, which moves on.
        told.append(replace(view, positions=view.positions.clone(), extras=dict(view.extras)))
        return mix(mixer, importance, redundancy, view)

    monkeypatch.setattr(type(policy.mixer), "mix", spy)
    output, cache = generate(model, inputs, policy, do_sample=False, max_new_tokens=12)
    assert output.shape == (2, inputs["input_ids"].shape[1] + 12)
    seen = inputs["attention_mask"].sum(1).tolist()
    for row, sets in enumerate(kept_sets(cache)):
        assert [len(kept) for kept in sets] == [BUDGET + 11] * 6
        assert all(kept[-11:] == list(range(seen[row], seen[row] + 11)) for kept in sets)
    assert [view.layer_idx for view in told] == [0, 1, 2]
    for view in told:
        assert ("modality" in view.extras) == by_modality
        for row, ids in enumerate(inputs["input_ids"]):
            tokens = ids[inputs["attention_mask"][row].bool()]
            positions = view.positions[row][view.valid[row]].long()
            assert positions.tolist() == [*range(seen[row])] * 2
            if by_modality:
                marked = view.extras["modality"][row][view.valid[row]]
                assert torch.equal(marked, tokens[positions] == model.config.image_token_id)


def test_the_mask_changes_what_is_kept(model, inputs):
    sets = [kept_sets(generate(model, inputs, mixkv(by), max_new_tokens=1)[1]) for by in (False, True)]
    different = sum(a != b for one, two in zip(*sets, strict=True) for a, b in zip(one, two, strict=True))
    assert different >= 6  # of 2 rows x 3 layers x 2 heads


@pytest.mark.parametrize("by_modality", [False, True])
def test_a_padded_row_with_an_image_is_as_if_alone(model, inputs, by_modality):
    together = kept_sets(generate(model, inputs, mixkv(by_modality), max_new_tokens=1)[1])
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "attention_mask": inputs["attention_mask"][row : row + 1, real],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        assert kept_sets(generate(model, alone, mixkv(by_modality), max_new_tokens=1)[1], 1)[0] == together[row]


def test_while_decoding_new_tokens_are_text(model, inputs):
    """The mask is that of the prompt; it moves with the entries over several compactions."""
    policy = mixkv(True, phase="both", trigger={"every": 4})
    with PolicyCache(policy, model) as cache:
        generate(model, inputs, cache, do_sample=False, max_new_tokens=30)
        assert min(row.compactions for row in cache.engine.rows) > 2
        for layer in range(3):
            view = cache.engine.view(layer, slice(0, 2))
            for row, ids in enumerate(inputs["input_ids"]):
                tokens = ids[inputs["attention_mask"][row].bool()]
                for head in range(2):
                    at = view.positions[row, head][view.valid[row, head]].tolist()
                    marked = view.extras["modality"][row, head][view.valid[row, head]].tolist()
                    images = [p < len(tokens) and int(tokens[p]) == model.config.image_token_id for p in at]
                    assert marked == images


def test_without_the_mask_a_policy_that_needs_it_is_refused(model, inputs):
    with PolicyCache(mixkv(True), model) as cache, pytest.raises((UnsupportedError, CacheStateError), match="modality"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
