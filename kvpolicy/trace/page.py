"""One HTML file that shows recordings: data, styles and script in it, and nothing that it asks for."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpolicy.trace.quantised import quantise

if TYPE_CHECKING:
    from kvpolicy.trace.recording import Recording, Snapshot

KINDS = ("importance", "redundancy", "retention")
_MOST_BYTES = 9 << 20  # of scores, all recordings together: a file of at most some 13 MB


@dataclass(frozen=True)
class Shown:
    """A recording and the text it is of.

    Attributes:
        policy: name of the policy.
        about: its budget, in a few words.
        texts: one text per token, those that never went into the cache included.
        special: indices of special tokens.
        recording: what was recorded.
        details: its trigger and what it protects, in a few words.
    """

    policy: str
    about: str
    texts: list[str]
    special: list[int]
    recording: Recording
    details: str = ""


def trace_page(shown: Sequence[Shown], model: str, *, same_text: bool = False, made: str = "") -> str:
    """Return the page.

    Args:
        shown: one recording or two of the same model, which are put side by side.
        model: its name.
        same_text: both recordings are of one text, so that a token is pointed at in both.
        made: in which dtype, by which version and when, in a few words.
    """
    blob = _Blob()
    sizes = [sum(_bytes(each) for each in one.recording.snapshots) for one in shown]
    thin = 1
    while sum(sizes) > _MOST_BYTES * thin:
        thin *= 2
    data = {
        "model": model,
        "same": same_text,
        "made": made,
        "traces": [_trace(one, one.recording.snapshots[::thin], blob) for one in shown],
        "blob": base64.b64encode(gzip.compress(bytes(blob.data), 6, mtime=0)).decode("ascii"),
    }
    names = " and ".join(one.policy for one in shown)
    values = {
        "title": html.escape(f"{names} on {model}: kvpolicy trace"),
        "style": _part("trace.css"),
        "script": "".join(map(_part, ("trace.js", "trace_difference.js", "trace_picture.js", "trace_page.js"))),
        # Inside of a script element only "<" can end it.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _part("trace.html"))


def _part(name: str) -> str:
    return resources.files("kvpolicy.trace").joinpath(name).read_text(encoding="utf-8")


class _Blob:
    """Arrays one behind the other, each at a multiple of 4 bytes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def add(self, array: np.ndarray) -> list[Any]:
        """Append an array and return its dtype, its place in bytes and its length."""
        place = len(self.data)
        self.data += np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        self.data += bytes(-len(self.data) % 4)
        return [array.dtype.name, place, array.size]


def _bytes(snapshot: Snapshot) -> int:
    return len(snapshot.protected) * sum(getattr(snapshot, kind) is not None for kind in KINDS)


def _trace(shown: Shown, snapshots: Sequence[Snapshot], blob: _Blob) -> dict[str, Any]:
    recording = shown.recording
    # Entries that are held have the highest number: one comparison in the page says whether an entry is there.
    wide = np.uint16 if len(recording.compactions) < np.iinfo(np.uint16).max else np.uint32
    never = np.iinfo(wide).max
    return {
        "policy": shown.policy,
        "about": shown.about,
        "details": shown.details,
        "texts": shown.texts,
        "special": shown.special,
        "prompt": recording.prompt,
        "seen": recording.seen,
        "layers": recording.layers,
        "heads": recording.heads,
        "compactions": blob.add(recording.compactions),
        "evicted": blob.add(np.where(recording.evicted == 0, never, recording.evicted).astype(wide)),
        "never": int(never),
        "snapshots": [_snapshot(recording, each, blob) for each in snapshots],
    }


def _snapshot(recording: Recording, snapshot: Snapshot, blob: _Blob) -> dict[str, Any]:
    counts = recording.candidates(snapshot.compaction).sum(1)
    scores = {}
    for kind in KINDS:
        values = getattr(snapshot, kind)
        if values is not None:
            scores[kind] = [blob.add(array) for array in quantise(values, counts)]
    return {
        "compaction": snapshot.compaction,
        "protected": blob.add(np.packbits(snapshot.protected, bitorder="little")),
        "scores": scores,
    }
