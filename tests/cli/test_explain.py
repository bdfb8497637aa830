"""`kvpolicy explain` and `show --diff`: the words, and numbers that agree with a real run."""

from __future__ import annotations

import json
import re

import pytest
import torch

import kvpolicy
from kvpolicy.cli import main
from kvpolicy.cli.memory import Course, ModelShape, shape_from_config, simulate
from kvpolicy.errors import KVPolicyError
from kvpolicy.testing.tables import stand_in_tables
from kvsupport.policies import small_spec

TINY = ("--layers", "3", "--kv-heads", "2", "--head-dim", "16", "--dtype", "fp32")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def model():
    from kvpolicy.testing.tiny import tiny_model

    torch.set_num_threads(1)
    return tiny_model("llama")


@pytest.fixture
def tables():
    """Let tables fit any model: the shipped ones are of another than the tiny one."""
    with stand_in_tables():
        yield


@pytest.mark.parametrize("prompt", [5, 20, 53])
@pytest.mark.parametrize("name", [entry.name for entry in kvpolicy.catalog().policies()])
def test_the_numbers_are_those_of_a_run(name, prompt, model, run, tables):
    from kvpolicy.runtimes.hf import PolicyCache

    spec, length, batch = small_spec(name, 24, 7), 64, 2
    policy = spec.build()
    if policy.reserved(prompt) > 24 and policy.budget.tokens:
        with pytest.raises(KVPolicyError, match="budget: 24 entries per head are fewer than"):
            simulate(policy, length, prompt)
        return
    ids = torch.randint(3, 240, (batch, prompt), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), PolicyCache(policy, model) as cache:
        cache.prefill_chunks(ids)
        model(ids[:, cache.get_seq_length() :], past_key_values=cache)
        for _ in range(length - prompt):
            model(ids[:, :1], past_key_values=cache)
        stats = cache.stats()
    course = simulate(policy, length, prompt)
    if not policy.selector.exact:  # the numbers are upper limits, and how many entries pass hangs on the text
        assert stats.seen == course.seen
        assert stats.resident <= course.resident
        assert stats.peak_resident <= course.peak
        return
    assert course == Course(stats.seen, stats.resident, stats.peak_resident, stats.compactions)
    shape = ModelShape(3, 2, 16, "float32")
    assert stats.bytes_resident == course.resident * shape.bytes_per_token * batch
    if policy.bound is not None and prompt <= policy.bound:
        assert course.peak <= policy.bound


def test_printed_bytes_are_those_of_a_run(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    code, out, err = run("explain", "rkv", *TINY, "--budget", "24", "--batch", "2", "--length", "1000")
    assert (code, err) == (0, "")
    each = 3 * 2 * 2 * 16 * 4
    number = dict(re.findall(r"^(\w[\w ]+?) {2,}.*?\(?(\d[\d,]*) bytes", out, re.MULTILINE))
    found = {label: int(text.replace(",", "")) for label, text in number.items()}
    assert found["per token"] == each
    assert found["full cache"] == 1000 * 2 * each
    assert found["at most"] == (24 + 128) * 2 * each
    assert found["saved"] == found["full cache"] - found["at the end"]
    for words in ("While decoding", "sinks(count=4)", "window_attention(", "linear(weight=0.1)", "needs       queries"):
        assert words in out


@pytest.mark.parametrize("name", [entry.name for entry in kvpolicy.catalog().policies()])
def test_every_registered_policy_is_explained(name, run):
    code, out, err = run("explain", name, "--length", 2048)
    assert (code, err) == (0, "")
    assert out.startswith(f"{name}: ")
    assert "None" not in out.replace("No bound", "")
    assert max(map(len, out.splitlines()[1:])) <= 110


CONFIG = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}

KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, ModelShape(4, 2, 8, "float32")),
        ({**CONFIG, "torch_dtype": "bfloat16", "head_dim": 32}, ModelShape(4, 2, 32, "bfloat16")),
        ({"text_config": {**CONFIG, "dtype": "float16"}}, ModelShape(4, 2, 8, "float16")),
        ({**CONFIG, "num_key_value_heads": None}, ModelShape(4, 8, 8, "float32")),
        ({**CONFIG, "layer_types": ["full_attention", "sliding_attention"] * 2}, ModelShape(2, 2, 8, "float32", 2)),
        ({**CONFIG, "sliding_window": 4096, "use_sliding_window": False}, ModelShape(4, 2, 8, "float32")),
        ({**CONFIG, **KINDS, "global_head_dim": 32}, ModelShape(2, 2, 32, "float32", 2)),
        ({**CONFIG, **KINDS, "num_global_key_value_heads": 1}, ModelShape(2, 1, 8, "float32", 2)),
        (
            {**CONFIG, **KINDS, "num_global_key_value_heads": 1, "attention_k_eq_v": False},
            ModelShape(2, 2, 8, "float32", 2),
        ),
        ({**CONFIG, **KINDS, "num_kv_shared_layers": 2}, ModelShape(1, 2, 8, "float32", 1)),
        ({**CONFIG, "per_layer_config": {"1": {"head_dim": 16}}}, ModelShape(3, 2, 8, "float32", unlike=((1, 2, 16),))),
        (
            {**CONFIG, "head_dim": 8, "num_key_value_heads": [1, 2, 2, 4]},
            ModelShape(1, 1, 8, "float32", unlike=((2, 2, 8), (1, 4, 8))),
        ),
        ({**CONFIG, "per_layer_config": {"0": {"sliding_window": 8}}}, ModelShape(3, 2, 8, "float32", 1)),
        ({**CONFIG, "v_head_dim": 8}, ModelShape(4, 2, 8, "float32")),
    ],
)
def test_a_plain_configuration_is_read(config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for place in (tmp_path, tmp_path / "config.json"):
        found = shape_from_config(str(place), None)
        assert ModelShape(**{**found.__dict__, "source": ""}) == expected
    assert shape_from_config(str(tmp_path), "fp16").dtype == "float16"


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3", "gpt_oss", "qwen2_vl"])
def test_a_model_folder_gives_the_bytes_of_its_cache(family, tmp_path):
    from kvpolicy.runtimes.hf import PolicyCache
    from kvpolicy.testing.tiny import tiny_model

    torch.set_num_threads(1)
    tiny = tiny_model(family)
    tiny.config.save_pretrained(tmp_path)
    shape = shape_from_config(str(tmp_path), "fp32")
    with torch.no_grad(), PolicyCache("knorm", tiny) as cache:
        tiny(torch.arange(3, 13)[None], past_key_values=cache)
        assert cache.stats().bytes_resident == 10 * shape.bytes_per_token
        assert len(cache.engine.layers) == shape.layers


@pytest.mark.parametrize("shared", [0, 2])
def test_a_model_whose_layers_differ_gives_the_bytes_of_its_cache(shared, tmp_path, run):
    """Gemma-4: heads of another size in layers of full attention, and layers that keep no keys."""
    import transformers

    from kvpolicy.runtimes.hf import PolicyCache

    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("transformers without Gemma-4")
    torch.set_num_threads(1)
    config = transformers.Gemma4TextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=32, hidden_size_per_layer_input=8,
        num_kv_shared_layers=shared, **KINDS,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shape = shape_from_config(str(tmp_path), "fp32")
    model = transformers.Gemma4ForCausalLM(config).eval()
    with torch.no_grad(), PolicyCache("knorm", model) as cache:
        model(torch.arange(3, 13)[None], past_key_values=cache)
        assert cache.stats().bytes_resident == 10 * shape.bytes_per_token
        assert len(cache.engine.layers) == shape.layers == (1 if shared else 2)
    code, out, _ = run("explain", "knorm", "--model-config", tmp_path)
    assert code == 0
    assert "2 KV heads x (key 32 + value 32)" in out


def test_layers_that_differ_are_listed(tmp_path, run):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "per_layer_config": {"1": {"head_dim": 16}}}))
    _, out, _ = run("explain", "knorm", "--model-config", tmp_path)
    listed = "3 layers x 2 KV heads x (key 8 + value 8) and 1 layer x 2 KV heads x (key 16 + value 16)"
    assert listed in " ".join(out.split())


def test_nonsense_is_refused_in_a_sentence(run, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    listed = tmp_path / "list.json"
    listed.write_text("[1]")
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    latent = tmp_path / "latent.json"
    latent.write_text(json.dumps({**CONFIG, "kv_lora_rank": 8}))
    values = tmp_path / "values.json"
    values.write_text(json.dumps({**CONFIG, "v_head_dim": 4}))
    unowned = tmp_path / "unowned.json"
    unowned.write_text(json.dumps({**CONFIG, "num_kv_shared_layers": 4}))
    short = tmp_path / "short.json"
    short.write_text(json.dumps({**CONFIG, "num_attention_heads": [8, 8]}))
    empty = tmp_path / "folder"
    empty.mkdir()
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({**CONFIG, "num_hidden_layers": -1}))
    windowed = tmp_path / "windowed.json"
    windowed.write_text(json.dumps({**CONFIG, "sliding_window": 128}))
    cases = {
        "--batch: 0 makes no sense": ("--batch", "0"),
        "--length: -5 makes no sense": ("--length", "-5"),
        "--length: 99999999999 makes no sense": ("--length", "99999999999"),
        "--prompt: 300 tokens are more than the --length of 200": ("--length", "200", "--prompt", "300"),
        "--kv-heads: is missing": ("--layers", "3"),
        "--head-dim: 0 makes no sense": ("--layers", "3", "--kv-heads", "2", "--head-dim", "0"),
        "--dtype: 'int3' is not one of": ("--dtype", "int3"),
        "--layers: --model-config says it already": ("--model-config", bad, "--layers", "3"),
        f"{bad} is not JSON": ("--model-config", bad),
        f"{deep} is not JSON": ("--model-config", deep),
        f"{listed} is not a JSON object": ("--model-config", listed),
        "has `kv_lora_rank`": ("--model-config", latent),
        "values of another size than its keys": ("--model-config", values),
        "is 4 of 4 layers; some have to keep keys": ("--model-config", unowned),
        "`num_attention_heads` of": ("--model-config", short),
        "holds no config.json": ("--model-config", empty),
        "`num_hidden_layers` of": ("--model-config", odd),
        "no full-attention layer": ("--model-config", windowed),
        "there is no file or folder": ("--model-config", tmp_path / "none"),
        "cannot be read": ("--model-config", "nobody/nothing-of-the-kind"),
        "--budget: 'many' is not a number": ("--budget", "many"),
    }
    for words, arguments in cases.items():
        code, out, err = run("explain", "rkv", *arguments)
        assert (code, out) == (1, ""), words
        assert words in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
    code, _, err = run("explain", "rvk")
    assert code == 1
    assert "Did you mean 'rkv'?" in err


def test_show_diff(run, tmp_path):
    code, out, err = run("show", "--diff", "rkv", "rkv-code")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["field", "rkv", "rkv-code"]
    assert ["protect.sinks.count", "4", "-"] in lines
    assert ["redundancy.index_zero", "false", "true"] in lines
    assert "Other words in: description, departures." in out
    code, out, _ = run("show", "--diff", "h2o", "streaming-llm")
    assert code == 0
    assert re.search(r"post.rerotate +- +true", out)
    variant = tmp_path / "same.yaml"
    variant.write_text("schema_version: 1\npolicy: same\nextends: rkv\n")
    assert run("show", "--diff", "rkv", variant) == (0, "rkv and same do the same.\n", "")


@pytest.mark.parametrize(
    ("first", "second", "row"),
    [
        ("[merge_values, rerotate]", "[rerotate, merge_values]", "post merge_values, rerotate rerotate, merge_values"),
        (
            "[{use: merge_values, threshold: 0.5}, merge_values]",
            "[{use: merge_values, threshold: 0.5}]",
            "post.merge_values (2).threshold 0.0 -",
        ),
    ],
)
def test_operations_differ_in_their_order_and_number(run, tmp_path, first, second, row):
    for name, post in (("a", first), ("b", second)):
        text = f"schema_version: 1\npolicy: {name}\nextends: rkv\npost: {post}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    code, out, err = run("show", "--diff", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"))
    assert (code, err) == (0, "")
    assert [" ".join(line.split()) for line in out.splitlines()] == ["field a b", row]


def test_show_wants_one_name_or_two(run):
    for arguments, words in (
        (("show", "rkv", "h2o"), "name one, or two policies with --diff"),
        (("show", "--diff", "rkv"), "name two policies"),
        (("show", "--diff", "rkv", "nothing"), "unknown policy 'nothing'"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert words in err


def test_lines_end_where_the_terminal_does(run, monkeypatch):
    for columns, most in ((60, 60), (80, 80), (200, 110)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = run("explain", "snapkv-prefill")[1].splitlines()
        assert most - 20 < max(map(len, lines)) <= most


def test_the_prompt_is_long_where_only_prompts_are_compacted(run):
    out = run("explain", "snapkv-prefill")[1]
    assert "8,192 tokens each, 7,936 of them the prompt: 1 compaction." in out
    assert "only the prompt is compacted." in out
    assert "8,192 tokens each, 128 of them the prompt" in run("explain", "rkv")[1]
    assert "200 tokens each, 100 of them the prompt" in run("explain", "snapkv-prefill", "--length", "200")[1]
    assert "Nothing is compacted, for a prompt of 100 tokens" in run("explain", "snapkv-prefill", "--length", "200")[1]
    assert "Nothing is compacted, for 200 tokens" in run("explain", "rkv", "--length", "200")[1]


def test_the_full_cache_keeps_everything_and_saves_nothing(run):
    out = run("explain", "full")[1]
    assert "All of it, always: 8,192 entries" in out
    assert "Nothing is saved." in out
    assert "0 bytes" not in out
