"""What the layers of one `PolicyCache` share."""

from __future__ import annotations

from torch import Tensor

from kvpolicy.cache.engine import Engine
from kvpolicy.errors import CacheStateError, UnsupportedError


class Session:
    """What the layers of one cache share: the engine and the forward pass that is under way."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.announced: tuple[int, Tensor | None] | None = None
        self.prompt_end = 0  # columns that are known to belong to a prompt, whatever length they come in
        self.unattended: int | None = None
        self.has_images = False

    def begin(self, keys: Tensor) -> None:
        """Open the forward pass at its first layer; check that every earlier layer's attention came by.

        Raises:
            UnsupportedError: the model does not ask the registries for its mask or its attention.
        """
        if self.unattended is not None:
            raise UnsupportedError(
                f"the attention of layer {self.unattended} did not go through transformers' attention registry while "
                "this cache was in use; do not change the model's attention implementation inside the cache's "
                "`with` block."
            )
        if self.announced is not None:
            self._check_modality(keys.shape[0])
            columns, valid = self.announced
            self.announced = None
            if columns != keys.shape[2]:
                raise UnsupportedError(f"the mask was made for {columns} tokens but {keys.shape[2]} arrived.")
            prefill = self.engine.columns < self.prompt_end
            self.engine.open(keys.shape[0], columns, valid, keys.device, prefill=prefill)

    def _check_modality(self, rows: int) -> None:
        known = self.engine.modality
        if known is None and self.has_images and "modality" in self.engine.policy.needs:
            raise UnsupportedError(
                f"policy {self.engine.policy.name!r} treats image tokens apart and nobody said which they are; use "
                "kvpolicy.runtimes.hf.generate(), or cache.set_modality(input_ids == image_token_id) first."
            )
        if known is not None and known.shape[0] != rows:
            raise CacheStateError(f"set_modality: the mask has {known.shape[0]} rows but the forward pass has {rows}.")
