"""Text and image tokens apart: what components with the option `by_modality` share."""

from __future__ import annotations

from typing import Protocol

from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import UnsupportedError
from kvpolicy.types import Mask


class _HasOption(Protocol):
    by_modality: bool


class NeedsModality:
    """`needs` of a component that looks at the modality only when its parameter `by_modality` says so."""

    def __get__(self, component: _HasOption | None, owner: type[object]) -> frozenset[str]:
        return frozenset({"modality"}) if component is not None and component.by_modality else frozenset()


def modalities(view: CacheView, by_modality: bool) -> tuple[Mask, ...]:
    """Return the valid slots, bool `[B, H, N]`, in one mask or in one for text and one for images.

    Raises UnsupportedError when the view does not say which is which.
    """
    if not by_modality:
        return (view.valid,)
    image = view.extras.get("modality")
    if image is None:
        raise UnsupportedError(
            "by_modality needs the mask of image tokens and the view holds none; leave it off, or give CacheView "
            "`extras` with `modality`."
        )
    return view.valid & ~image, view.valid & image
