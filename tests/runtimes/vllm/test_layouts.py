"""Pages of vLLM's cache, on CPU tensors in each order in memory that vLLM's sources name. Nothing here ran on a GPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kvpolicy.cache.store.paged import PagedStore
from kvpolicy.cache.store.protocol import Layout, Rows
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.vllm.layouts import TOKEN_BY_TOKEN, pages, probe
from kvpolicy.types import KeepIndices

LAYERS, BLOCKS, HEADS, BLOCK, DIM = 2, 7, 3, 16, 8
# vllm.v1.kv_cache_layout.KVCacheLayout: where the axes [L, B, H, N, C] stand in memory.
ORDERS = {
    "LBHNC": (0, 1, 2, 3, 4), "LBNHC": (0, 1, 3, 2, 4), "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4), "BLNHC": (1, 0, 3, 2, 4), "BHLNC": (1, 2, 0, 3, 4),
}  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def caches(order, dtype, value_dim=DIM):
    """One layer's cache `[B, H, N, C]` each, out of one poisoned buffer in this order, with room between the blocks."""
    shape = (LAYERS, BLOCKS, HEADS, BLOCK, DIM + value_dim)
    raw = torch.full((*(shape[i] for i in order),), float("nan"), dtype=dtype)
    return raw, list(raw.permute(*(order.index(i) for i in range(5))))


def store(cache, key, value, slots):
    """What `reshape_and_cache_flash` does: the token at `slots[t]` of a cache in tokens."""
    for t, slot in enumerate(slots.tolist()):
        cache[slot // BLOCK, :, slot % BLOCK, :DIM] = key[t]
        cache[slot // BLOCK, :, slot % BLOCK, DIM:] = value[t]


def cpu_store(cache, key, value, slots):
    """What `cpu_attn_reshape_and_cache` does with `vec` and `vec16`: keys `[D, block]`, then values `[block, D]`."""
    flat = cache.reshape(BLOCKS, HEADS, 2 * BLOCK * DIM)
    assert flat.data_ptr() == cache.data_ptr()
    for t, slot in enumerate(slots.tolist()):
        block, at = divmod(slot, BLOCK)
        for d in range(DIM):
            flat[block, :, d * BLOCK + at] = key[t, :, d]
            flat[block, :, BLOCK * DIM + at * DIM + d] = value[t, :, d]


def tokens(count, dtype, value_dim=DIM):
    drawn = torch.Generator().manual_seed(count)
    return (torch.randn(count, HEADS, dim, generator=drawn).to(dtype) for dim in (DIM, value_dim))


def bits(tensor):
    """NaN included."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", TOKEN_BY_TOKEN)
def test_slots_are_read_where_the_backend_stored_them(backend, order, dtype):
    raw, layers = caches(ORDERS[order], dtype)
    key, value = tokens(20, dtype)
    slots = torch.randperm(BLOCKS * BLOCK, generator=torch.Generator().manual_seed(1))[:20]
    store(layers[1], key, value, slots)
    keys, values = pages(backend, layers[1], HEADS, DIM, DIM)
    assert keys.shape == values.shape == (BLOCKS, BLOCK, HEADS, DIM)
    assert keys.untyped_storage().data_ptr() == raw.untyped_storage().data_ptr()
    assert torch.equal(keys[slots // BLOCK, slots % BLOCK], key)
    assert torch.equal(values[slots // BLOCK, slots % BLOCK], value)
    assert layers[0].isnan().all()
    assert int((~raw.isnan()).sum()) == 20 * HEADS * 2 * DIM


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_written_through_pages_is_what_the_backend_would_have_stored(order, dtype):
    raw, layers = caches(ORDERS[order], dtype)
    same, expected = caches(ORDERS[order], dtype)
    key, value = tokens(20, dtype)
    slots = torch.randperm(BLOCKS * BLOCK, generator=torch.Generator().manual_seed(2))[:20]
    keys, values = pages("FLASHINFER", layers[0], HEADS, DIM, DIM)
    keys[slots // BLOCK, slots % BLOCK], values[slots // BLOCK, slots % BLOCK] = key, value
    store(expected[0], key, value, slots)
    assert torch.equal(bits(raw), bits(same))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_the_cpu_backend_are_transposed_in_a_block(dtype):
    raw, layers = caches(ORDERS["LBHNC"], dtype)
    same, expected = caches(ORDERS["LBHNC"], dtype)
    key, value = tokens(20, dtype)
    slots = torch.randperm(BLOCKS * BLOCK, generator=torch.Generator().manual_seed(3))[:20]
    keys, values = pages("CPU_ATTN", layers[1], HEADS, DIM, DIM)
    cpu_store(expected[1], key, value, slots)
    keys[slots // BLOCK, slots % BLOCK], values[slots // BLOCK, slots % BLOCK] = key, value
    assert torch.equal(bits(raw), bits(same))
    assert torch.equal(keys[slots // BLOCK, slots % BLOCK], key)


def test_values_may_be_wider_than_keys():
    _, layers = caches(ORDERS["LBNHC"], torch.float32, value_dim=DIM + 4)
    key, value = tokens(5, torch.float32, DIM + 4)
    slots = torch.arange(5)
    store(layers[0], key, value, slots)
    keys, values = pages("FLASH_ATTN", layers[0], HEADS, DIM, DIM + 4)
    assert torch.equal(keys[0, :5], key)
    assert torch.equal(values[0, :5], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "order"), [*product(TOKEN_BY_TOKEN, ORDERS), ("CPU_ATTN", "LBHNC")])
def test_a_compaction_in_place_equals_one_in_plain_pages(backend, order, dtype):
    raw, layers = caches(ORDERS[order], dtype)
    both = [pages(backend, cache, HEADS, DIM, DIM) for cache in layers]
    layout = Layout((0, 1), HEADS, DIM, DIM, dtype, torch.device("cpu"), ())
    mine = PagedStore(layout, {i: k for i, (k, _) in enumerate(both)}, {i: v for i, (_, v) in enumerate(both)})
    plain = PagedStore.allocate(layout, BLOCKS, BLOCK)
    table, length, budget = [4, 1, 6], 2 * BLOCK + 9, BLOCK
    drawn = torch.Generator().manual_seed(7)
    kept = {}
    for layer in (0, 1):
        chosen = torch.rand(1, HEADS, length, generator=drawn).topk(budget, -1).indices.sort(-1).values
        kept[layer] = KeepIndices(chosen, torch.full((1, HEADS), budget))
    for each in (mine, plain):
        each.bind("a", table)
        packed = each.open({"a": length})
        for layer in (0, 1):
            each.append(layer, *tokens(length, dtype), packed)
        each.keep(Rows(("a",), (length,)), kept)
    for layer in (0, 1):
        got, wanted = (each.read(layer, Rows(("a",), (budget,))) for each in (mine, plain))
        assert torch.equal(got.keys, wanted.keys)
        assert torch.equal(got.values, wanted.values)
        assert torch.equal(got.positions, wanted.positions)
        others = [block for block in range(BLOCKS) if block not in table]
        assert layers[layer][others].isnan().all(), "a block that is not the row's was written"
    assert not any(k.isnan().any() for k in (got.keys, got.values))
    assert raw.isnan().any()


@pytest.mark.parametrize(
    ("backend", "change", "says"),
    [
        ("FLEX_ATTENTION", {}, "FLEX_ATTENTION: how it keeps"),
        ("FLASH_ATTN", {"dtype": torch.uint8}, "entries of uint8 are quantised"),
        ("TRITON_ATTN", {"dtype": torch.float8_e4m3fn}, "entries of float8_e4m3fn are quantised"),
        ("FLASHINFER", {"heads": 2 * HEADS}, "packed in another way"),
        ("TRITON_ATTN", {"content": 2 * DIM + 8}, "packed in another way"),
        ("CPU_ATTN", {"order": "LBNHC"}, "leave VLLM_KV_CACHE_LAYOUT unset"),
    ],
)
def test_what_is_not_known_is_refused_by_name(backend, change, says):
    heads, content = change.get("heads", HEADS), change.get("content", 2 * DIM)
    cache = torch.zeros(BLOCKS, heads, BLOCK, content).to(change.get("dtype", torch.float32))
    if change.get("order") == "LBNHC":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(UnsupportedError, match=says):
        pages(backend, cache, HEADS, DIM, DIM)


@pytest.mark.parametrize("backend", [*TOKEN_BY_TOKEN, "CPU_ATTN"])
def test_a_probe_passes_where_the_backend_stores_as_expected_and_leaves_no_trace(backend):
    raw, layers = caches(ORDERS["LBHNC"], torch.bfloat16)
    before = raw.clone()
    keys, values = pages(backend, layers[0], HEADS, DIM, DIM)
    write = cpu_store if backend == "CPU_ATTN" else store
    probe(backend, keys, values, lambda k, v, slots: write(layers[0], k, v, slots))
    assert torch.equal(bits(raw), bits(before))


@pytest.mark.parametrize("backend", [*TOKEN_BY_TOKEN, "CPU_ATTN"])
def test_a_probe_refuses_a_backend_that_packs_otherwise(backend):
    _, layers = caches(ORDERS["LBHNC"], torch.bfloat16)
    keys, values = pages(backend, layers[0], HEADS, DIM, DIM)
    other = store if backend == "CPU_ATTN" else cpu_store
    with pytest.raises(UnsupportedError, match=rf"{backend}: its kernels do not keep bfloat16 entries"):
        probe(backend, keys, values, lambda k, v, slots: other(layers[0], k, v, slots))
    with pytest.raises(UnsupportedError, match="its kernels do not keep"):
        probe(backend, keys, values, lambda k, v, slots: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("isa", "block"), [("vec", 32), ("vec", 64), ("vec16", 16), ("vec16", 32)])
def test_the_kernels_of_vllm_for_cpus_pass_the_probe(isa, block, dtype):
    ops = pytest.importorskip("vllm._custom_ops", reason="needs vLLM; run with `make test-vllm`")
    cache = torch.zeros(BLOCKS, HEADS, block, 2 * 64, dtype=dtype)
    keys, values = pages("CPU_ATTN", cache, HEADS, 64, 64)
    halves = cache.view(BLOCKS, HEADS, 2 * block, 64).chunk(2, dim=2)

    def write(key, value, slots):
        ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")

    probe("CPU_ATTN", keys, values, write)
