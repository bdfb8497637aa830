"""`kvpolicy plan`: its bytes are those of real caches, its speeds those of arithmetic, and it says where it stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kvpolicy
from kvpolicy.cli.capacity import Machine, Roofline, RowNeeds, row_under, rows_that_fit
from kvpolicy.cli.devices import GPUS, gpu_of
from kvpolicy.cli.memory import Course, ModelShape
from kvpolicy.cli.modelsize import EXAMPLE, ModelSize, bytes_of
from kvpolicy.errors import KVPolicyError
from kvpolicy.testing.tables import stand_in_tables
from kvpolicy.testing.tiny import tiny_model
from kvsupport.policies import small_spec

PLAIN = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}


@pytest.fixture
def planned(run):
    def call(*arguments):
        code, out, err = run("plan", *arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


def fed(model, cache, prompt, length):
    """Feed tokens one by one behind a prompt; return the most bytes of keys and values, of tensors, of metadata."""
    ids = torch.randint(3, 60, (1, prompt), generator=torch.Generator().manual_seed(3))
    most = [0, 0, 0]
    with torch.no_grad():
        cache.prefill_chunks(ids)
        model(ids[:, cache.get_seq_length() :], past_key_values=cache)
        for _ in range(length - prompt + 1):
            layers = [(s.bytes_resident, s.bytes_allocated, s.bytes_metadata) for s in read(cache).layers]
            most = [max(a, b) for a, b in zip(most, map(sum, zip(*layers, strict=True)), strict=True)]
            if cache.engine.rows[0].seen < length:
                model(ids[:, :1], past_key_values=cache)
    return most


def read(cache):
    """Read the numbers without the compaction that `stats` would run first."""
    from kvpolicy.runtimes.hf.stats import collect

    return collect(cache.engine)


def test_smollm2_takes_what_is_planned(planned):
    """Bytes per token, weights, the resident maximum and what is allocated, of the real model."""
    from kvpolicy.runtimes.hf import PolicyCache
    from kvpolicy.runtimes.hf.demo_model import ensure_demo_model
    from kvpolicy.runtimes.opening import open_model

    torch.set_num_threads(1)
    options = ("--budget", 32, "--length", 190, "--prompt", 20, "--cache-memory", "1GiB")
    found = planned("rkv", "--model-config", "smollm2", *options)
    model = open_model(ensure_demo_model(), "smollm2", dtype="float32", device="cpu")
    assert found["parameters"] == sum(each.numel() for each in model.parameters())
    assert found["weights_bytes"] == sum(each.numel() * each.element_size() for each in model.parameters())
    with PolicyCache(kvpolicy.load("rkv", budget=32), model) as cache:
        held, allocated, metadata = fed(model, cache, 20, 190)
        assert cache.stats().peak_resident == found["policy"]["entries_at_most"] == 32 + 128
        assert cache.stats().compactions == found["policy"]["compactions"]
        queries = sum(q.numel() * q.element_size() for r in cache.engine.log.records for q in r.queries.values())
    assert found["bytes_per_token"] == 30 * 3 * 2 * 64 * 4
    assert held == found["policy"]["bytes_resident_at_most"]
    assert allocated == found["policy"]["bytes_allocated_at_most"]
    assert metadata < metadata + queries <= found["policy"]["bytes_beside_at_most"]
    row = sum(found["policy"][f"bytes_{name}"] for name in ("allocated_at_most", "beside_at_most", "state"))
    assert found["policy"]["rows"] == (1 << 30) // row
    assert found["full"]["rows"] == (1 << 30) // (190 * found["bytes_per_token"])


@pytest.mark.parametrize("prompt", [9, 50])
@pytest.mark.parametrize(
    "name", ["rkv", "h2o", "g-kv", "adakv-snapkv", "pyramidkv", "streaming-llm", "threshold", "knorm", "duo-attention"]
)
def test_no_policy_takes_more_than_planned(name, prompt):
    """Ragged stores in blocks, slot state, rotations and a prompt above the bound: planned is an upper limit."""
    from kvpolicy.runtimes.hf import PolicyCache

    torch.set_num_threads(1)
    model = tiny_model("llama")
    config, length = model.config, 64
    shape = ModelShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, "float32")
    size = ModelSize(1, query_heads=config.num_attention_heads)
    with stand_in_tables():
        policy = small_spec(name, 24, 7).build()
        if policy.reserved(prompt) > 24:
            pytest.skip("protects more than this budget")
        needs = row_under(policy, shape, size, length, prompt)
        with PolicyCache(policy, model) as cache:
            held, allocated, metadata = fed(model, cache, prompt, length)
    exact = policy.counts == "equal"
    assert held == needs.keys_values if exact else held <= needs.keys_values
    assert allocated <= needs.allocated <= 2 * max(allocated, needs.keys_values)
    assert 0 < metadata <= needs.beside


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "qwen3_next", "qwen2_vl", "llama"])
def test_windows_and_states_are_those_of_the_model(family, tmp_path, planned):
    from transformers import DynamicCache

    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    text = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=text)
    length = 200
    with torch.no_grad():
        model(torch.randint(3, 60, (1, length)), past_key_values=cache)
    sizes = {True: 0, False: 0}
    for layer in cache.layers:
        for name, each in vars(layer).items():
            parts = each.values() if isinstance(each, dict) else [each]
            for part in parts:
                if isinstance(part, torch.Tensor) and part.dim() > 1:
                    full = type(layer).__name__ == "DynamicLayer" and name in {"keys", "values"}
                    sizes[full] += part.numel() * part.element_size()
    found = planned("knorm", "--model-config", tmp_path, "--dtype", "fp32", "--length", length, "--memory", "1GiB")
    assert found["full"]["bytes_resident_at_most"] == sizes[True]
    assert found["full"]["bytes_state"] == found["policy"]["bytes_state"] == sizes[False]
    assert (sizes[False] > 0) == (family in {"gemma3", "gpt_oss", "qwen3_next"})
    assert found["parameters"] == sum(each.numel() for each in model.parameters())
    assert ("full attention" in (found["vllm"]["refused"] or "")) == (sizes[False] > 0)


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        (
            "JambaConfig",
            {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 2},
            (2, 6),
        ),
        (
            "BambaConfig",
            {"num_hidden_layers": 4, "attn_layer_indices": [2], "mamba_n_heads": 8, "mamba_d_head": 8},
            (1, 3),
        ),
    ],
)
def test_hybrids_say_in_words_of_their_own_which_layers_attend(name, options, layers, tmp_path, run):
    """Their configurations have no `layer_types` in the file: only the model's code knows."""
    import transformers

    getattr(transformers, name)(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        **options,
    ).save_pretrained(tmp_path)  # fmt: skip
    code, out, _ = run("explain", "knorm", "--model-config", tmp_path)
    assert code == 0
    words = " ".join(out.split())
    assert f"{layers[0]} layer{'s' * (layers[0] > 1)} x 2 KV heads" in words
    assert f"{layers[1]} further layers keep a window or a state" in words


def test_experts_are_read_by_those_who_choose_them(tmp_path, planned):
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = transformers.Qwen3MoeForCausalLM(config)
    experts = sum(each.numel() for name, each in model.named_parameters() if ".experts." in name)
    total = sum(each.numel() for each in model.parameters())
    found = planned("knorm", "--model-config", tmp_path, "--memory", "1GB", "--dtype", "bf16")
    assert found["parameters"] == total
    size = ModelSize(2 * total, total, experts / total, 1 / 4)
    assert size.read(1) == pytest.approx(2 * (total - experts * 3 / 4))
    assert size.read(2) == pytest.approx(2 * (total - experts * 9 / 16))
    assert size.products == pytest.approx(2 * (total - experts * 3 / 4))
    assert size.read(10**6) == 2 * total


def test_the_roofline_is_arithmetic():
    shape, size = ModelShape(2, 1, 8, "float16"), ModelSize(1000, 500, query_heads=2)
    needs = RowNeeds(Course(100, 100, 100, 0, 50.0), 0, 0, 0, 10)
    slow = Roofline(Machine("some", 0, bandwidth=100.0, arithmetic=1e9), shape, size)
    entry = 2 * 1 * 2 * 8 * 2
    assert slow.step(3, needs) == pytest.approx((1000 + 3 * (50 * entry + 10)) / 100)
    busy = Roofline(Machine("some", 0, bandwidth=1e12, arithmetic=100.0), shape, size)
    products = 2 * 500 + 4 * 2 * (2 * 8) * 50
    assert busy.step(3, needs) == pytest.approx(3 * products / 100)
    assert busy.tokens_per_second(3, needs, 10) == pytest.approx(3 / busy.step(3, needs))
    assert busy.bound_by_arithmetic(needs) == 1
    even = Roofline(
        Machine("some", 0, bandwidth=100.0, arithmetic=100.0 * products / (50 * entry + 10) / 2), shape, size
    )
    at = even.bound_by_arithmetic(needs)
    assert at == 1000 // (50 * entry + 10) + 1
    assert Roofline(Machine("some", 0), shape, size).bound_by_arithmetic(needs) is None
    compacted = RowNeeds(Course(100, 40, 60, 2, 50.0), 0, 0, 0, 10)
    moved = 2 * 3 * (60 * entry / 2 + 2 * 40 * entry) / 100
    assert slow.tokens_per_second(3, compacted, 10) == pytest.approx(3 * 90 / (90 * slow.step(3, compacted) + moved))


def test_the_example_is_counted(planned):
    import transformers

    config = transformers.Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    assert sum(each.numel() for each in model.parameters()) == EXAMPLE.parameters
    one, two = (planned("rkv", "--gpu", "H100 SXM", "--tensor-parallel", n) for n in (1, 2))
    assert two["bytes_per_token"] * 2 == one["bytes_per_token"] == 36 * 8 * 2 * 128 * 2
    assert two["weights_bytes"] * 2 == one["weights_bytes"]
    assert one["full"]["rows"] == (int(80e9 * 0.9) - one["weights_bytes"]) // (8192 * one["bytes_per_token"])
    gain = one["gains"]
    assert 1 < gain["one row"] < gain["the same rows"] < gain["the largest batches"]
    # More rows of the whole cache fit than twice as many, for weights take a smaller part.
    assert two["full"]["rows"] > 2 * one["full"]["rows"]


def test_heads_with_budgets_of_their_own_are_planned_at_their_worst():
    """A pool over layers of unlike heads may give all that it has to the largest."""
    policy, size = kvpolicy.load("pyramidkv", budget=64).build(), ModelSize(1)
    shape = ModelShape(1, 2, 16, "float32", unlike=((3, 2, 8),))
    needs = row_under(policy, shape, size, 256, 200)
    assert needs.keys_values == needs.course.peak * 4 * 2 * 2 * 16 * 4
    equal = row_under(kvpolicy.load("snapkv-prefill", budget=64).build(), shape, size, 256, 200)
    assert equal.keys_values == equal.course.peak * (2 * 2 * 16 + 3 * 2 * 2 * 8) * 4


def test_quantised_weights_are_looked_at_or_given(tmp_path, planned, run):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "some", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = (tmp_path / "model.safetensors").stat().st_size
    options = ("rkv", "--model-config", tmp_path, "--cache-memory", "1GiB")
    assert planned(*options)["weights_bytes"] == stored
    assert planned(*options, "--weights", "5GB")["weights_bytes"] == 5 * 10**9
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert planned(*options)["weights_bytes"] == stored
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "is no index of weights" in run("plan", *options)[2]
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    assert "is quantised and holds no weights to look at" in run("plan", *options)[2]


def test_gpus_go_by_their_names(run):
    assert gpu_of("h100-sxm") == gpu_of("NVIDIA H100 SXM") == next(each for each in GPUS if each.name == "H100 SXM")
    assert gpu_of("4090").name == "RTX 4090"
    with pytest.raises(KVPolicyError, match="may be one of 'A100 40GB', 'A100 80GB PCIe', 'A100 80GB SXM'"):
        gpu_of("A100")
    with pytest.raises(KVPolicyError, match="'Voodoo 2' is not known"):
        gpu_of("Voodoo 2")
    assert all(each.source and 1e9 < each.bandwidth < 1e14 and each.memory > 10**10 for each in GPUS)
    code, out, _ = run("plan", "--gpus")
    assert code == 0
    assert all(each.name in out and each.source in out for each in GPUS)


def test_sizes_are_read():
    assert bytes_of("24GiB", "-") == 24 << 30
    assert bytes_of("80 gb", "-") == 80 * 10**9
    assert bytes_of("1.5MiB", "-") == 3 << 19
    assert bytes_of("4096", "-") == 4096
    for text in ("", "GiB", "-3GB", "1e9", "0", "9" * 40, "1PB", "4i"):
        with pytest.raises(KVPolicyError, match="is not a size"):
            bytes_of(text, "--memory")


def test_it_says_where_it_stops(run):
    at = ("--gpu", "H100 SXM")
    words = " ".join(run("plan", "rkv", *at)[1].split())
    assert "Of texts of up to 1,152 tokens nothing is evicted, so that nothing is gained." in words
    assert "Under it a step waits for memory at any number of rows, never for arithmetic." in words
    assert "memory 80.00 GiB: " in " ".join(run("plan", "rkv", "--memory", "80GiB")[1].split())
    assert "(estimates)" in words
    assert "One row of the whole cache fits up to" in words
    assert "Nothing is compacted within 1,000 tokens" in " ".join(run("plan", "rkv", *at, "--length", 1000)[1].split())
    assert "only the prompt is compacted" in run("plan", "snapkv-prefill", *at)[1]
    words = " ".join(run("plan", "adakv-snapkv", *at)[1].split())
    assert "the worst case is counted" in words
    assert "Not in vLLM: policy 'adakv-snapkv' cannot be served in vLLM (trait equal_counts)" in words
    assert "keeps everything and gains nothing" in run("plan", "full", *at)[1]
    assert "more rows gain nothing" in " ".join(run("plan", "rkv", *at, "--length", 64, "--budget", 16)[1].split())
    assert "The whole cache does not fit at all" in run("plan", "rkv", *at, "--length", 600_000)[1]


def test_nonsense_is_refused_in_a_sentence(run, tmp_path):
    plain, latent = tmp_path / "plain.json", tmp_path / "latent.json"
    plain.write_text(json.dumps(PLAIN))
    latent.write_text(json.dumps({**PLAIN, "kv_lora_rank": 8}))
    at = ("--gpu", "H100 SXM")
    cases = {
        "--gpu: is missing; give one of": (),
        "--gpu: and --memory say both": (*at, "--memory", "1GB"),
        "--memory: 'much' is not a size": ("--memory", "much"),
        "of weights do not fit into 0.9 of 1,000,000,000 bytes": ("--memory", "1GB"),
        "not one row of 8,192 tokens fits": ("--cache-memory", "1MB"),
        "--bandwidth: --gpu says it already": (*at, "--bandwidth", "9"),
        "--bandwidth: -1.0 makes no sense": ("--memory", "80GB", "--bandwidth", "-1"),
        "--use: 1.5 makes no sense": (*at, "--use", "1.5"),
        "--tensor-parallel: 3 does not divide the 8 KV heads": (*at, "--tensor-parallel", "3"),
        "--tensor-parallel: 0 makes no sense": (*at, "--tensor-parallel", "0"),
        "--block-size: 0 makes no sense": (*at, "--block-size", "0"),
        "--prompt: 300 tokens are more than": (*at, "--length", "200", "--prompt", "300"),
        "--weights: is missing": (*at, "--layers", "3", "--kv-heads", "2", "--head-dim", "16"),
        "transformers knows no model like": (*at, "--model-config", plain),
        "keeps one latent vector per token (MLA)": (*at, "--model-config", latent),
    }
    for words, arguments in cases.items():
        code, out, err = run("plan", "rkv", *arguments)
        assert (code, out) == (1, ""), words
        assert words in err
        assert err.count("\n") == 1, err


def test_a_model_that_cannot_be_served_is_refused_by_the_runtime_s_own_cause(run, tmp_path):
    import transformers

    transformers.BloomConfig(n_layer=2, hidden_size=16, n_head=2, vocab_size=32).save_pretrained(tmp_path)
    for command in (("plan", "rkv", "--gpu", "L4"), ("explain", "rkv")):
        code, _, err = run(*command, "--model-config", tmp_path)
        assert code == 1
        assert "no policy can be run on" in err
        assert "BloomForCausalLM: layer 0 has no attention of its own" in err


def test_the_page_shows_what_is_printed(run):
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    shown = page.partition("```text\n")[2].partition("```")[0].splitlines()
    printed = run("plan", "rkv", "--gpu", "H100 SXM")[1].splitlines()
    assert len(shown) > 10
    assert [line for line in shown if line not in printed] == []


def test_a_batch_that_fits_is_the_largest_one():
    needs = RowNeeds(Course(1, 1, 1, 0), 0, 70, 20, 10)
    assert rows_that_fit(needs, Machine("some", 999)) == 9
    assert rows_that_fit(needs, Machine("some", 1000)) == 10


def test_a_memory_without_one_block_holds_no_request(planned):
    shape = ("--layers", "2", "--kv-heads", "2", "--head-dim", "64", "--weights", "1MB")
    found = planned("full", *shape, "--cache-memory", "300KB", "--block-size", "4096", "--length", "8", "--prompt", "4")
    assert (found["vllm"]["blocks"], found["vllm"]["full_rows"]) == (0, 0)
