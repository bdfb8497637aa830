"""Names of the overrides of `kvpolicy.load` for the bundled components, so that editors complete them.

Made by scripts/overrides.py. Any other override is passed on and checked in the same way: those of a plugin's
components are not listed here.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class KnownOverrides(TypedDict, total=False):
    """A field of a policy, or a parameter as ``field__parameter``."""

    phase: Literal["prefill", "decode", "both"]
    prefill_chunk: int | None
    backend: str
    budget__tokens: int
    budget__fraction: float
    trigger: Any
    trigger__use: str
    trigger__interval: int
    trigger__align: int
    importance: Any
    importance__use: str
    importance__base: Any
    importance__decay: float
    importance__combine: Any
    importance__window: int
    importance__smooth: int
    importance__observe: int
    importance__beacons: int
    importance__over: Any
    importance__first_share: float
    importance__epsilon: float
    importance__leverage: Any
    importance__delay: int
    importance__future: int
    importance__sinks: int
    importance__covariance: bool
    importance__value_norm: bool
    importance__weight: float
    importance__step: int
    importance__lag: int
    importance__ranked: bool
    importance__share: float
    importance__gate: str
    importance__ahead: int
    importance__lookahead: int
    importance__sketch: int
    importance__seed: int
    importance__chunk: int
    importance__scaled: bool
    importance__prune: Any
    importance__output: Any
    importance__table: str
    importance__threshold: float
    importance__reach: int
    importance__distances: Any
    importance__group: Any
    importance__standardise: bool
    importance__sharpness: float
    importance__norm: Any
    importance__group_stage: Any
    importance__softmax_over: Any
    importance__smooth_kind: Any
    importance__smooth_stage: Any
    importance__prior: float
    redundancy: Any
    redundancy__use: str
    redundancy__threshold: float
    redundancy__beta: int
    redundancy__spare: Any
    redundancy__index_zero: bool
    redundancy__window: int
    redundancy__rope: Any
    redundancy__bandwidth: float
    redundancy__by: Any
    redundancy__lower: float
    redundancy__unit_mean: bool
    redundancy__by_modality: bool
    redundancy__base: Any
    mixer: Any
    mixer__use: str
    mixer__mass: float
    mixer__size: int
    mixer__sinks: int
    mixer__recent: int
    mixer__intrinsic: Any
    mixer__window: int
    mixer__by_modality: bool
    mixer__weight: float
    allocator: Any
    allocator__use: str
    allocator__floor: float
    allocator__normalise: Any
    allocator__beta: float
    allocator__table: str
    allocator__temperature: float
    allocator__retrieval: float
    selector: Any
    selector__use: str
    selector__scope: Any
    selector__reduce: Any
    selector__size: int
    selector__regions: int
    selector__prompt: bool
    selector__floor: float
    selector__share: float
    selector__anchor: Any
    selector__sampled: float
    selector__temperature: float
    selector__in_proportion: bool
    selector__seed: int
    selector__value: float
    selector__relative_to: Any
    protect__large_values: Any
    protect__large_values__count: int
    protect__large_values__measure: Any
    protect__large_values__newest: int
    protect__pads: Any
    protect__prompt: Any
    protect__recent: Any
    protect__recent__count: int
    protect__sinks: Any
    protect__sinks__count: int
