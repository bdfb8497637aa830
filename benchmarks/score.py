"""What one R-KV compression costs, on the keys that SmolLM2 caches for this project's own text.

1. Redundancy, layer by layer on one thread: ours beside what the released code does, operation by operation in fp32
   with its n x n matrices; time, memory and the largest difference of the results.
2. The whole compression of all layers as the engine runs it (views, scores, selection, compaction), in decode steps of
   the model with as many entries.
3. The scores of `rkv-density` beside those of `rkv`, all layers as the engine scores them; two caches of the same text.
4. With ``--kvpress PYTHON``: kvpress's SnapKV and KeyDiff scores on the same tensors, in that interpreter.

    python -P benchmarks/score.py --quick
    python -P benchmarks/score.py --json score.json
    python -P benchmarks/score.py --kvpress .kvpress/bin/python
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

_HERE = Path(__file__).resolve().parent  # not itself on the path: kernels.py would pass for the PyPI package
sys.path[:] = [str(_HERE / "shared"), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import kvpolicy
from kvbench import measuring, real
from kvbench.elsewhere import kvpress_side
from kvbench.lanes import PreallocatedLane
from kvbench.literal import released_redundancy
from kvbench.measuring import MIB, Sample, Spread, interleaved, peak_extra
from kvpolicy import ops
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy import decide
from kvpolicy.runtimes.hf import PolicyCache

RELEASED, OURS = "released form", "kvpolicy"
_ALIKE = {
    "SnapKV": {
        "use": "window_attention", "observe": 8, "group": "mean", "group_stage": "weights", "softmax_over": "row",
        "smooth": 7, "smooth_kind": "mean_zero_padded",
    },
    "KeyDiff": {"use": "key_diff"},
}  # fmt: skip


def _ratios(slower: list[Sample], faster: list[Sample], clock: str) -> list[float]:
    return [getattr(a, clock) / getattr(b, clock) for a, b in zip(slower, faster, strict=True)]


def near_the_threshold(
    keys: Tensor, got: Tensor, expected: Tensor, threshold: float = 0.5
) -> tuple[list[float], float]:
    """Find what explains results `[H, N]` that differ: a cosine that rounding puts on the other side of the threshold.

    Returns:
        For each key whose results differ by more than 1e-5 of the head's largest, how far from the threshold its
        nearest cosine is in fp64; and the largest difference of the other keys.
    """
    difference = (got - expected).abs() / expected.amax(-1, keepdim=True)
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    gaps = []
    for head, key in (difference > 1e-5).nonzero().tolist():
        cosine = unit[head] @ unit[head, key]
        cosine[key] = 2.0
        gaps.append(float((cosine - threshold).abs().min()))
    return gaps, float(difference.masked_fill(difference > 1e-5, 0.0).max())


def redundancy(views: list[CacheView], rounds: int) -> dict[str, Any]:
    """Compare the two forms on every view; memory of ours on every view, of the released form on the first."""
    layers: list[dict[str, Any]] = []
    difference, elsewhere, extra = 0.0, 0.0, 0
    ties: list[float] = []
    for view in views:
        steps: dict[str, Any] = {
            RELEASED: lambda view=view: released_redundancy(view.keys[0]),
            OURS: lambda view=view: ops.redundancy(view.keys, view.valid, index_zero=True),
        }
        samples = interleaved(steps, rounds)
        expected, got = steps[RELEASED](), steps[OURS]()[0]
        difference = max(difference, float(((got - expected).abs() / expected.amax(-1, keepdim=True)).max()))
        gaps, other = near_the_threshold(view.keys[0], got, expected)
        ties, elsewhere = ties + gaps, max(elsewhere, other)
        extra = max(extra, peak_extra(steps[OURS]))
        layers.append({
            "layer": view.layer_idx,
            "seconds": samples,
            "ratio": {c: Spread.of(_ratios(samples[RELEASED], samples[OURS], c)).median for c in ("wall", "cpu")},
        })  # fmt: skip
    first = views[0]
    one = first.keys.numel() * first.keys.element_size()
    return {
        "layers": layers,
        "milliseconds": {
            name: Spread.of([1e3 * s.cpu for each in layers for s in each["seconds"][name]])
            for name in (RELEASED, OURS)
        },
        "ratio": {c: Spread.of([each["ratio"][c] for each in layers]) for c in ("wall", "cpu")},
        "largest_relative_difference": difference,
        "differ_at_the_threshold": {"keys": len(ties), "farthest_from_it": max(ties, default=0.0)},
        "largest_relative_difference_elsewhere": elsewhere,
        "peak_extra_bytes": {RELEASED: peak_extra(lambda: released_redundancy(first.keys[0])), OURS: extra},
        "key_bytes": {"one layer": one, "all layers": one * first.num_layers},
    }


def compression(model: PreTrainedModel, cache: PolicyCache, rounds: int) -> dict[str, Any]:
    """Time the compaction that is due in a cache of one row, beside decode steps over as many entries."""
    engine = cache.engine
    entries = engine.rows[0].resident
    token, full = torch.tensor([[5]]), DynamicCache(config=model.config)
    model(real.real_tokens(entries), past_key_values=full, logits_to_keep=1)
    fixed = PreallocatedLane("preallocated", model, entries)
    fixed.prefill(token)
    twins = [engine.clone() for _ in range(2)]  # a compaction changes its engine, so each one has a fresh copy

    def compact() -> None:
        twins.pop().settle()

    samples: dict[str, list[Sample]] = {"compression": [], "preallocated": [], "DynamicCache": []}
    compact()
    for _ in range(rounds):
        twins[:] = [engine.clone()]
        for name, more in interleaved(
            {
                "preallocated": lambda: model(token, past_key_values=fixed.cache),
                "DynamicCache": lambda: model(token, past_key_values=full),
            },
            2,
        ).items():
            samples[name].append(more[-1])
        samples["compression"].append(measuring.timed(compact))
    twins[:] = [engine.clone()]
    last = twins[0]
    extra = peak_extra(compact)
    if last.rows[0].resident >= entries:
        raise SystemExit(
            f"nothing was evicted of {entries} entries, so there is nothing to time; choose larger --keys."
        )
    stats = cache.stats()
    return {
        "entries": entries,
        "kept": last.rows[0].resident,
        "samples": samples,
        "milliseconds": {name: Spread.of([1e3 * s.cpu for s in some]) for name, some in samples.items()},
        "decode_steps": {
            name: {c: Spread.of(_ratios(samples["compression"], samples[name], c)) for c in ("wall", "cpu")}
            for name in ("preallocated", "DynamicCache")
        },
        "peak_extra_bytes": extra,
        "allocated_bytes": stats.bytes_allocated,
    }


def scores_side_by_side(model: PreTrainedModel, count: int, rounds: int) -> dict[str, Any]:
    """Time the scores of `rkv-density` and of `rkv`, all layers of a row with `count` entries."""
    names = ("rkv", "rkv-density")
    with real.due_cache(model, count, names[0]) as one, real.due_cache(model, count, names[1]) as other:
        steps: dict[str, Any] = {}
        for name, cache in zip(names, (one, other), strict=True):
            views = real.views_of(cache)

            def score(policy: Any = cache.engine.policy, views: list[CacheView] = views) -> None:
                for view in views:
                    view.memo.clear()
                decide.score(policy, views)

            steps[name] = score
        samples = interleaved(steps, rounds)
    return {
        "keys": count,
        "milliseconds": {name: Spread.of([1e3 * s.cpu for s in some]) for name, some in samples.items()},
        "ratio": {c: Spread.of(_ratios(samples[names[1]], samples[names[0]], c)) for c in ("wall", "cpu")},
    }


def beside_kvpress(python: str, views: list[CacheView], rounds: int) -> dict[str, Any]:
    """Time kvpress's scores and ours, layer by layer; theirs in another process, afterwards."""
    spec = kvpolicy.load("rkv", budget=views[0].shape[2])
    policy = spec.build()
    alike = {name: spec.replace("importance", how).build().importance for name, how in _ALIKE.items()}
    ours: dict[str, list[float]] = {"R-KV (importance, redundancy and mix)": [], **{name: [] for name in alike}}
    for view in views:
        steps: dict[str, Any] = {"R-KV (importance, redundancy and mix)": lambda view=view: policy.retention(view)}
        steps |= {name: lambda view=view, part=part: part.score(view) for name, part in alike.items()}
        for name, samples in interleaved(steps, rounds).items():
            ours[name].append(1e3 * Spread.of([s.cpu for s in samples]).median)
    tensors = {}
    for view in views:
        assert view.queries is not None
        tensors[f"{view.layer_idx}.keys"] = view.keys.contiguous()
        tensors[f"{view.layer_idx}.queries"] = view.queries.flatten(1, 2).contiguous()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tensors.safetensors"
        save_file(tensors, file)
        answer = kvpress_side(python, "score", file=file, repeats=rounds)
    theirs = {
        name: [1e3 * Spread.of([cpu for _, cpu in runs]).median for runs in layers]
        for name, layers in answer.pop("seconds").items()
    }
    return {
        "versions": answer,
        "milliseconds": {
            "kvpolicy": {name: Spread.of(times) for name, times in ours.items()},
            "kvpress": {name: Spread.of(times) for name, times in theirs.items()},
        },
    }


def report(results: list[dict[str, Any]], scores: list[dict[str, Any]]) -> None:
    """Print one table per part."""
    clock = measuring.cpu_clock()
    rows = []
    for r in results:
        part = r["redundancy"]
        ms, extra, size = part["milliseconds"], part["peak_extra_bytes"], part["key_bytes"]
        rows.append([
            r["keys"], ms[RELEASED].text(".1f"), ms[OURS].text(".2f"), part["ratio"]["cpu"].text(".1f") + "x",
            part["ratio"]["wall"].text(".1f") + "x",
            f"{part['largest_relative_difference']:.0e} / {part['largest_relative_difference_elsewhere']:.0e}",
            "{keys} ({farthest_from_it:.0e})".format(**part["differ_at_the_threshold"]),
            f"{extra[RELEASED] / MIB:.1f}", f"{extra[OURS] / MIB:.2f}",
            f"{extra[OURS] / size['one layer']:.1%} / {extra[OURS] / size['all layers']:.2%}",
        ])  # fmt: skip
    measuring.show(
        f"Redundancy of one layer, {len(results[0]['redundancy']['layers'])} layers",
        ["keys", "released form ms", "kvpolicy ms", "ratio (CPU)", "ratio (wall)", "difference / elsewhere",
         "at threshold", "released MiB", "kvpolicy MiB", "of the keys of one layer / all"],
        rows,
        f"Milliseconds: {clock}. Median [quartiles]: of runs and layers for times, of layers for ratios. MiB: the most "
        "that is allocated at a time, beside the keys. At threshold: keys whose results differ by more than 1e-5, and "
        "how far from the threshold a cosine of theirs is at the most; elsewhere: the difference of all others.",
    )  # fmt: skip
    measuring.show(
        "A whole R-KV compression of all layers, one row",
        ["entries", "compression ms", "decode step ms, preallocated / DynamicCache", "decode steps (CPU)",
         "decode steps (wall)", "extra memory of allocated"],
        [
            [
                f"{r['entries']} to {r['kept']}", r["milliseconds"]["compression"].text(".1f"),
                f"{r['milliseconds']['preallocated'].text('.1f')} / {r['milliseconds']['DynamicCache'].text('.1f')}",
                *(
                    " / ".join(r["decode_steps"][name][c].text(".2f") for name in ("preallocated", "DynamicCache"))
                    for c in ("cpu", "wall")
                ),
                f"{r['peak_extra_bytes'] / r['allocated_bytes']:.1%}",
            ]
            for r in (r["compression"] for r in results)
        ],
        f"Milliseconds: {clock}. Decode steps: what the compression costs, in steps over as many entries.",
    )  # fmt: skip
    measuring.show(
        "Scores of all layers, one row",
        ["entries", "rkv ms", "rkv-density ms", "ratio (CPU)", "ratio (wall)"],
        [
            [
                r["keys"], *(r["milliseconds"][name].text(".1f") for name in ("rkv", "rkv-density")),
                *(r["ratio"][c].text(".2f") for c in ("cpu", "wall")),
            ]
            for r in scores
        ],
        f"Milliseconds: {clock}.",
    )  # fmt: skip
    for r in results:
        if "kvpress" in r:
            times = r["kvpress"]["milliseconds"]
            measuring.show(
                f"Scores of one layer, {r['keys']} keys: milliseconds ({clock})",
                ["score", "kvpolicy", f"kvpress {r['kvpress']['versions']['kvpress']}"],
                [
                    [name, spread.text(), times["kvpress"][name].text() if name in times["kvpress"] else "-"]
                    for name, spread in times["kvpolicy"].items()
                ],
                "Median [quartiles] over layers. kvpress ran afterwards in a process of its own, not interleaved; it "
                "was given finished queries, which it otherwise projects anew.",
            )


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; `--quick` replaces the sizes."""
    parser = measuring.arguments(__doc__)
    parser.add_argument(
        "--keys", type=int, nargs="+", default=[1152, 4224], help="entries per head before a compression"
    )
    parser.add_argument(
        "--score-keys",
        type=int,
        nargs="*",
        default=[384, 1152],
        help="entries per head where policies' scores are timed",
    )
    parser.add_argument("--layers", type=int, help="compare redundancy on so many layers only, evenly spaced")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each form")
    parser.add_argument("--kvpress", metavar="PYTHON", help="an interpreter that has kvpress and transformers < 5.3")
    options = parser.parse_args(argv)
    if options.quick:
        options.keys, options.score_keys, options.layers, options.rounds = [192], [192], 3, 2
    return options


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure, print tables, and write JSON when asked."""
    options = parsed(argv)
    torch.set_num_threads(options.threads)
    model = real.load_model()
    results = []
    for count in options.keys:
        with real.due_cache(model, count) as cache:
            views = real.views_of(cache)
            step = max(1, len(views) // (options.layers or len(views)))
            some = views[::step]
            result = {"keys": count, "redundancy": redundancy(some, options.rounds)}
            result["compression"] = compression(model, cache, options.rounds)
            if options.kvpress:
                result["kvpress"] = beside_kvpress(options.kvpress, some, options.rounds)
        results.append(result)
    scores = [scores_side_by_side(model, count, options.rounds) for count in options.score_keys]
    report(results, scores)
    measuring.write(options, "score", {"results": results, "scores": scores})


if __name__ == "__main__":
    main()
