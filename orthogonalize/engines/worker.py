"""What vLLM's worker processes import by name to read weights: no function is sent to them."""

from __future__ import annotations

from typing import Any

from .base import Part, fingerprint


class FingerprintWorker:
    """Methods added to vLLM's workers (`worker_extension_cls`); vLLM calls them by name."""

    get_model: Any  # the worker's own

    def weights_fingerprint(self, part: Part) -> str:
        """SHA-256 of the weights that this worker holds (see `base.fingerprint`)."""
        return fingerprint(self.get_model(), part)
