"""compressed-tensors, which llm-compressor and vLLM are built on: scales and stored numbers of one matrix.

Everything that is asked of that library is asked here, as llm-compressor's data-free path (`model_free_ptq`) asks it:
the bytes are the same. llm-compressor itself cannot be installed beside vLLM, as each pins another version of
compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from ...core.errors import OrthogonalizeError
from ...core.foreign import explained
from ..safetensors_file import TensorInfo
from .names import SchemeName
from .schemes import SCHEMES, Scheme

LIBRARY = "compressed-tensors"
# What is stored of a matrix, by the last part of its names.
PARTS = (
    "weight_packed", "weight", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape",
    "weight_g_idx",
)  # fmt: skip


def _check_installed(what: str) -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise OrthogonalizeError(
            f"{what} needs {LIBRARY}, which is not installed: pip install 'orthogonalize[quantize]'"
        ) from error


WIDE = (torch.bfloat16, torch.float16, torch.float32)


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
        _check_installed(name)
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


class Decoder:
    """What decodes the matrices of a checkpoint with these `settings` of quantisation.

    Raises:
        OrthogonalizeError: compressed-tensors is not installed, or does not understand the settings; or the stream of
            the model is rotated, which no weights show.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        _check_installed(f"a checkpoint of {LIBRARY}")
        from compressed_tensors.quantization import QuantizationConfig

        if settings.get("transform_config"):
            raise OrthogonalizeError("its transform_config rotates what its matrices read, which is not done here")
        with explained(f"{LIBRARY} does not understand the quantization_config"):
            self._config = QuantizationConfig.model_validate(dict(settings))

    def _scheme(self, module: str) -> Any:
        """How a module is quantised: as its name says, or else as all matrices are; None if nothing says it."""
        groups = list(self._config.config_groups.values())
        named = (
            group
            for group in groups
            for target in group.targets
            if target == module or (target.startswith("re:") and re.match(target.removeprefix("re:"), module))
        )
        return next(named, next((group for group in groups if "Linear" in group.targets), None))

    def _format(self, scheme: Any) -> str:
        from compressed_tensors.compressors.format import infer_module_format

        stated = scheme.format or self._config.format
        if stated in (None, "dense", "mixed-precision"):
            stated = infer_module_format(torch.nn.Linear, scheme)
        return str(getattr(stated, "value", stated))

    def shape(self, module: str, stored: TensorInfo) -> tuple[int, ...] | None:
        """The shape of a decoded matrix, by its packed numbers; None if nothing says how they are packed."""
        scheme = self._scheme(module)
        if scheme is None or scheme.weights is None:
            return None
        each = {"I32": 32 // scheme.weights.num_bits, "U8": 2, "I8": 1}.get(stored.dtype)
        return None if each is None else (stored.shape[0], stored.shape[1] * each)

    def decode(self, module: str, state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """A matrix [out, in] in `dtype` of what is stored of it, on its device."""
        from compressed_tensors.compressors.base import BaseCompressor

        scheme = self._scheme(module)
        with explained(f"{LIBRARY} cannot decode {module}", "fetch the checkpoint again"):
            if state["weight_scale"].dtype in WIDE:  # as transformers does, so that products are in the model's dtype
                state["weight_scale"] = state["weight_scale"].to(dtype)
            compressor = BaseCompressor.get_value_from_registry(self._format(scheme))
            found: torch.Tensor = compressor.decompress(state, scheme)["weight"]
        return found.to(dtype)
