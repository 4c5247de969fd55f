"""compressed-tensors, which llm-compressor and vLLM are built on: scales and stored numbers of one matrix.

Everything that is asked of that library is asked here, as llm-compressor's data-free path (`model_free_ptq`) asks it:
the bytes are the same. llm-compressor itself cannot be installed beside vLLM, as each pins another version of
compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from ...core.errors import OrthogonalizeError
from .names import SchemeName
from .schemes import SCHEMES, Scheme

LIBRARY = "compressed-tensors"


class WeightScales(NamedTuple):
    """Scales [out, in / group] of a matrix, in its own dtype; with `shared` [1], they are divided by it."""

    own: torch.Tensor
    shared: torch.Tensor | None = None

    @property
    def factors(self) -> torch.Tensor:
        """What the stored numbers are multiplied by, [out, in / group] in float32."""
        own = self.own.float()
        return own if self.shared is None else own / self.shared


@dataclass(frozen=True)
class Quantizer:
    """One scheme of the installed library."""

    scheme: Scheme
    version: str

    @classmethod
    def of(cls, name: SchemeName) -> Quantizer:
        """The quantiser of the scheme `name` (see `SCHEMES`).

        Raises:
            OrthogonalizeError: compressed-tensors is not installed.
        """
        try:
            import compressed_tensors  # noqa: F401
        except ImportError as error:
            raise OrthogonalizeError(
                f"{name} needs {LIBRARY}, which is not installed: pip install 'orthogonalize[quantize]'"
            ) from error
        return cls(SCHEMES[name], version(LIBRARY))

    @cached_property
    def _preset(self) -> Any:
        from compressed_tensors.quantization import preset_name_to_scheme

        return preset_name_to_scheme(self.scheme.preset, ["Linear"])

    def settings(self, ignored: list[str]) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint in which the modules `ignored` are left as they were."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

        preset = self._preset.model_copy(update={"format": self.scheme.format})
        config = QuantizationConfig(
            config_groups={self.scheme.preset: preset},
            ignore=ignored,
            format=self.scheme.format,
            quantization_status=QuantizationStatus.COMPRESSED,
        )
        found: dict[str, Any] = config.model_dump(mode="json")
        return {**found, "version": self.version}

    def scales(self, weight: torch.Tensor, largest: float) -> WeightScales:
        """The scales of `weight` [out, in]; `largest` is the largest number of all matrices that share one with it."""
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        groups = weight.reshape(len(weight), -1, self.scheme.group or weight.shape[-1])
        shared = None
        if self.scheme.shared:
            extremes = torch.tensor(largest, dtype=weight.dtype)
            shared = generate_gparam(-extremes, extremes)
        own, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), self._preset.weights, global_scale=shared)
        return WeightScales(own, shared)

    def store(self, weight: torch.Tensor, scales: WeightScales) -> dict[str, torch.Tensor]:
        """What replaces `weight` [out, in], by the suffix of its name: every number rounded to the nearest."""
        from compressed_tensors.compressors.base import BaseCompressor

        state = {"weight": weight, "weight_scale": scales.own}
        if scales.shared is not None:
            state["weight_global_scale"] = scales.shared
        compressor = BaseCompressor.get_value_from_registry(self.scheme.format)
        found = compressor.compress(state, self._preset)
        return {name.removeprefix("weight"): tensor.contiguous() for name, tensor in found.items()}
