"""Every causal class of transformers is served rightly, or refused when the cache is made, as docs/models.md says."""

from __future__ import annotations

import pytest
import transformers

from kvsupport.model_table import PAGE, cell, refusals, written
from kvsupport.shrinking import CAUSAL, IMAGE_TEXT, CannotBuildError, tiny_of
from kvsupport.sweep import FEW, POLICIES, sweep

MECHANISMS = {
    "llama": ("rkv", "adakv-snapkv"),  # plain rotary attention
    "gpt2": ("rkv",),  # learned positions
    "gpt_neox": ("streaming-llm",),  # part of the dimensions is turned
    "cohere": ("streaming-llm",),  # neighbouring dimensions are turned together
    "gpt_oss": ("adakv-snapkv",),  # attention sinks, sliding windows
    "gemma2": ("rkv-density",),  # soft-caps
    "gemma3n_text": ("h2o",),  # layers that read the keys of others
    "gemma4_text": ("rkv",),  # heads of other sizes in some layers
    "llama4_text": ("tova",),  # layers that attend in chunks, others without positions
    "qwen3_next": ("rkv",),  # linear attention between
    "jamba": ("sinks-recent",),  # a state space between
    "bert": ("snapkv-prefill",),  # an encoder as a decoder
    "deepseek_v3": ("rkv",),  # latent attention
    "jetmoe": ("rkv",),  # keys are repeated after they are stored
    "diffllama": ("rkv",),  # values of other heads
    "bloom": ("rkv",),  # biases by distance, attention of its own
    "mpt": ("rkv",),
    "falcon": ("rkv",),
    "gptj": ("rkv",),  # attention of its own
    "mamba": ("rkv",),  # nothing to evict from
    "deepseek_v32": ("rkv",),  # an index beside the keys
    "minimax_m3_vl_text": ("rkv",),
}
"""One model type per mechanism that has its own way through the runtime -> the policies that show it."""


def _held_against_the_page(family, outcome):
    """What the page says of a class is what happens, on the version of transformers that it was written with."""
    version, rows = written()
    if version != transformers.__version__:
        return
    row = rows[family]
    assert row.name == outcome.model, f"{PAGE.name} is stale: run make models"
    said = refusals(row.text)
    if said is None:
        assert outcome.untried, f"{PAGE.name} is stale: run make models"
        return
    for policy in {*outcome.served, *outcome.refused} & set(row.tried):
        assert (policy in said) == (policy in outcome.refused), (policy, row.text, cell(outcome))


@pytest.mark.parametrize("family", [family for family in MECHANISMS if family in CAUSAL])
def test_a_class_of_each_mechanism_is_served_rightly_or_refused(family):
    outcome = sweep(tiny_of(family), MECHANISMS[family])
    assert not outcome.faults, outcome.faults
    assert outcome.served or outcome.refused
    _held_against_the_page(family, outcome)


def test_refusals_name_the_model_and_say_what_to_do():
    for family in ("jetmoe", "bloom", "mamba", "mpt"):
        [message] = sweep(tiny_of(family), ("rkv",)).refused.values()
        assert "; use a " in message, message
        assert message.endswith(".")


def test_the_page_has_every_class():
    version, rows = written()
    assert not [family for family, row in rows.items() if "FAULT" in row.text]
    if version == transformers.__version__:
        assert set(rows) == {*CAUSAL, *IMAGE_TEXT}


@pytest.mark.slow
@pytest.mark.parametrize("family", [*CAUSAL, *IMAGE_TEXT])
def test_every_class_is_served_rightly_or_refused(family):
    try:
        model = tiny_of(family)
    except CannotBuildError as error:
        pytest.skip(str(error))
    outcome = sweep(model, POLICIES if family in CAUSAL else FEW)
    assert not outcome.faults, outcome.faults
    _held_against_the_page(family, outcome)
