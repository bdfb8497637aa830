"""How things show themselves: a line or two as text, a small table in a notebook, nothing of it obeyed."""

from __future__ import annotations

import sys

import pytest
import torch

import kvpolicy
from kvpolicy import CacheStateError, KVPolicyError, pictures
from kvpolicy.html_text import facts, grid, safe
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.spec.overrides import KnownOverrides
from kvpolicy.testing.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return tiny_model("llama")


@pytest.fixture
def filled(model):
    def fill(name="rkv", rows=1, **changes):
        spec = kvpolicy.load(name, budget=24, **changes)
        cache = PolicyCache(spec.replace("trigger.every", 8) if name == "rkv" else spec, model)
        ids = torch.randint(3, 200, (rows, 30), generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), cache:
            model(ids, past_key_values=cache)
            for _ in range(10):
                model(ids[:, :1], past_key_values=cache)
        return cache

    return fill


def test_reprs_are_a_few_lines_at_most(filled):
    cache = filled(rows=2)
    for each in (cache, cache.stats(), cache.policy, kvpolicy.load("rkv"), kvpolicy.load("adakv-snapkv")):
        assert repr(each).count("\n") < 3
        assert len(repr(each)) < 400
        assert repr(each).startswith(type(each).__name__)
        assert len(each._repr_html_()) < 4000
    assert "'rkv', LlamaForCausalLM, 3 layers" in repr(cache)
    assert "2 rows" in repr(cache)
    assert "seen 40" in repr(cache.stats())
    assert "at most 32 entries" in repr(cache.policy)
    assert "window_attention" in repr(kvpolicy.load("rkv"))


def test_looking_at_a_cache_runs_no_compaction(model):
    with torch.no_grad(), PolicyCache(kvpolicy.load("rkv", budget=24).replace("trigger.every", 8), model) as cache:
        assert "empty" in repr(cache)
        assert "0 of 0 tokens" in cache._repr_html_()
        model(torch.arange(3, 43)[None], past_key_values=cache)
        model(torch.arange(3, 4)[None], past_key_values=cache)
        repr(cache), cache._repr_html_()
        assert cache.engine.rows[0].compactions == 0
        assert cache.engine.rows[0].resident == 41


def test_everything_in_html_is_escaped():
    bad = "<script>alert(1)</script>\x1b[31m\u202e"
    for made in (safe(bad), facts(bad, [(bad, bad)]), grid(bad, [bad], [[bad]])):
        assert "<script" not in made
        assert "&lt;script&gt;" in made
        assert "\x1b" not in made
        assert "\u202e" not in made
    assert len(safe("x" * 10_000)) < 400
    spec = kvpolicy.load("rkv").replace({"description": "<img src=x onerror=y>", "paper": "a & b"})
    assert "<img" not in spec._repr_html_()
    assert "a &amp; b" in spec._repr_html_()


def test_a_picture_shows_what_is_held(filled):
    pytest.importorskip("matplotlib")
    cache = filled()
    figure = cache.plot()
    (image,) = figure.axes[0].images
    shares = image.get_array()
    assert shares.shape == (3, 40)
    for layer in range(3):
        for position in range(40):
            held = sum(position in cache.kept(layer, head) for head in range(2)) / 2
            assert shares[layer, position] == pytest.approx(held)
    assert 0 < shares.mean() < 1
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "row" not in figure.axes[0].get_title()
    assert "row 1" in filled(rows=2).plot(row=1).axes[0].get_title()
    with pytest.raises(CacheStateError, match="there is no row 3; the cache holds 1"):
        cache.plot(3)


def test_a_picture_of_heads_with_budgets_of_their_own(filled):
    pytest.importorskip("matplotlib")
    assert filled("adakv-snapkv", protect__recent=4, importance__observe=4).plot().axes[0].images


def test_a_picture_needs_something_to_show_and_matplotlib(model, monkeypatch):
    with PolicyCache("knorm", model) as cache:
        with pytest.raises(CacheStateError, match="nothing has been cached"):
            cache.plot()
        with torch.no_grad():
            model(torch.arange(3, 13)[None], past_key_values=cache)
        pictures._kind.cache_clear()
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(
            KVPolicyError, match=r"needs matplotlib; install it with: pip install 'kvpolicy\[notebook\]'"
        ):
            cache.plot()


def test_dir_shows_what_is_public_only():
    shown = dir(kvpolicy)
    assert shown == sorted(kvpolicy.__all__)
    assert "load" in shown
    assert not [name for name in shown if name.startswith("_") and name != "__version__"]
    assert not {"annotations", "attach", "TYPE_CHECKING", "contracts", "sys"} & set(shown)


def test_overrides_that_editors_complete_are_those_that_there_are():
    """Made by scripts/overrides.py."""
    import importlib.util
    from pathlib import Path

    script = Path(__file__).parents[2] / "scripts" / "overrides.py"
    found = importlib.util.spec_from_file_location("overrides_script", script)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.written()
    names = set(KnownOverrides.__annotations__)
    assert {"mixer__weight", "trigger__interval", "protect__recent", "phase", "importance__use"} <= names
    assert kvpolicy.load("rkv", mixer__weight=0.3).mixer.params["weight"] == 0.3
