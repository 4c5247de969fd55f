"""The recipe (`orthogonalize.json`): everything needed to rebuild an edited checkpoint bit for bit from its base."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ..architectures.schema import Architecture
from ..checkpoints.checkpoint import RECIPE
from ..checkpoints.quantizing.names import SchemeName
from ..checkpoints.rounding.registry import DEFAULT_ROUNDING, ROUNDING_SCHEMES
from ..core.errors import OrthogonalizeError, first_line
from ..core.files import check_text, write_atomically
from ..core.interventions import AffineMap, ConditionalMap, Intervention, Site, WriteMatrix
from ..core.words import counted
from .config import EditConfig

LARGEST = 2**31  # bytes of a recipe: the maps of a conditional edit of a large mixture of experts
RoundingName = Annotated[str, AfterValidator(lambda name: ROUNDING_SCHEMES.find(name).name)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Base(_Record):
    """The model that was edited; `weights` is the SHA-256 of each weight file."""

    model: str
    revision: str | None
    architecture: str
    weights: dict[str, str]


class Source(_Record):
    """The source of the direction: `run` or `file`, the SHA-256 of the vectors, and the run's prompt sources.

    `concept` is what the run calls the behaviour.
    """

    kind: Literal["run", "file"]
    fingerprint: str
    prompts: dict[str, str] = {}
    concept: str = ""


class Array(_Record):
    """A float64 array, little-endian, row-major, in base64."""

    shape: list[int]
    data: str


class MapRecord(_Record):
    """One affine map and the sites where it acts; `u`, `v` and `s` are keys of `arrays`."""

    side: Literal["write", "read"]
    sites: list[str]
    u: str
    v: str
    s: str


class ConditionalRecord(_Record):
    """A conditional map of one write matrix; `r` and `c` are keys of `arrays`."""

    matrix: str
    r: str
    c: str


class TensorChange(_Record):
    """One edited tensor (see `tensor_edit.TensorRecord`)."""

    name: str
    site: str
    leak: float | None
    change: float


class Quantization(_Record):
    """The quantisation of the edited weights: a scheme of `--quantize`, and the version of compressed-tensors.

    `matrices` is the number of those that were quantised.
    """

    scheme: SchemeName
    version: str
    matrices: int


MEANINGLESS = 0.5  # share of the planned change that quantisation may lose before nothing is called verified


class QuantizationCost(_Record):
    """What quantisation did to the edit, over all edited matrices that were quantised.

    `leak`: the share of the planned change along the edit's directions that is missing. `error`: the distance of the
    stored weights from the unquantised edit, relative to these. `against_plain`: that distance relative to the one that
    plain quantisation of the base has from the base; None if that is none.
    """

    leak: float
    error: float
    against_plain: float | None

    @property
    def meaningless(self) -> bool:
        """Whether too much of the edit is lost for it to be called verified."""
        return self.leak > MEANINGLESS


class Verification(_Record):
    """The results of `verify`. A gap is the largest difference of any logit, in float32 arithmetic.

    `hooks_gap`: hooks on the base against the edit before rounding. `stored_gap`: against the
    checkpoint as stored. `renormalised_gap`: as `hooks_gap`, but with hooks that divide by the scale of
    the edited stream (read-side edits and post-norm models only). `rebuilt`: whether the recipe gives the stored bytes.
    `quantization`: of a quantised checkpoint, unless no edited matrix is.
    """

    rebuilt: bool
    unexpected_changes: list[str]
    hooks_gap: float | None
    stored_gap: float | None
    renormalised_gap: float | None = None
    tolerance: float
    passed: bool
    quantization: QuantizationCost | None = None


class Recipe(_Record):
    """Everything about an edit; `weights` is the SHA-256 of each weight file of the edited checkpoint.

    `files` are the names of its other files, which the edit copied or wrote; `push` uploads these and no others.
    `tokenizer_class` is the class in its tokenizer_config.json, where the base's does not do what tokenizer.json says.
    `rounding` is the name of a rounding scheme (see `checkpoints.rounding.registry`). `quantization` says how the
    edited weights were then quantised, if they were. `description` is that of the architecture, where no shipped file
    describes it.
    """

    format: Literal[2] = 2
    version: str
    base: Base
    choice: EditConfig
    source: Source
    maps: list[MapRecord]
    arrays: dict[str, Array]
    conditional: list[ConditionalRecord] = []
    rounding: RoundingName = DEFAULT_ROUNDING
    quantization: Quantization | None = None
    tensors: list[TensorChange] = []
    weights: dict[str, str] = {}
    files: list[str] = []
    added: list[str] = []
    config_changes: dict[str, Any] = {}
    left_out: list[str] = []
    tokenizer_class: str | None = None
    probes: list[ProbeResult] = []
    description: Architecture | None = None
    verification: Verification | None = None

    def __repr__(self) -> str:
        edit = shorten(self.choice.describe(), 80, placeholder=" …")
        verified = "" if self.verification is None else ", verified" if self.verification.passed else ", NOT verified"
        return f"Recipe({edit}; {counted(len(self.tensors), 'tensor')} edited{verified})"

    __str__ = __repr__

    def intervention(self) -> Intervention:
        """The intervention that the recipe stores."""
        arrays = {key: _decode(array) for key, array in self.arrays.items()}
        sides: dict[str, dict[Site, AffineMap]] = {"write": {}, "read": {}}
        try:
            for record in self.maps:
                affine = AffineMap(arrays[record.u], arrays[record.v], arrays[record.s])
                _check_rank(affine.u.shape)
                sides[record.side].update({Site.parse(site): affine for site in record.sites})
            conditional = {
                WriteMatrix.parse(record.matrix): ConditionalMap(arrays[record.r], arrays[record.c])
                for record in self.conditional
            }
            for each in conditional.values():
                _check_rank(each.r.mT.shape)
            return Intervention(sides["write"], sides["read"], conditional)
        except (KeyError, ValueError, RuntimeError) as error:
            raise OrthogonalizeError(f"the recipe's maps are damaged: {first_line(error)}") from error

    def save(self, folder: Path) -> None:
        """Write the recipe into a checkpoint folder, atomically."""
        write_atomically(folder / RECIPE, self.model_dump_json(indent=1) + "\n")

    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the edited weights: the base's weights, the maps and the rounding."""
        stored = {"maps", "arrays", "rounding"}
        stored |= {name for name in ("conditional", "quantization") if getattr(self, name)}
        parts = self.model_dump_json(include=stored) + repr(sorted(self.base.weights.items()))
        return hashlib.sha256(parts.encode()).hexdigest()


def _check_rank(shape: Sequence[int]) -> None:
    """Check that directions of `shape` [d, k] are one matrix, and no more than the stream has.

    Raises:
        ValueError: they are not.
    """
    if len(shape) != 2 or shape[1] > shape[0]:
        raise ValueError(f"{list(shape)} are no directions of a stream [d, k]")


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe, given as a file or as the checkpoint folder that contains it.

    Raises:
        OrthogonalizeError: there is none, or it cannot be read.
    """
    path = Path(path)
    file = path / RECIPE if path.is_dir() else path
    if not file.is_file():
        raise OrthogonalizeError(f"no recipe at {file}")
    check_text(file, LARGEST)
    try:
        return Recipe.model_validate_json(file.read_text("utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise OrthogonalizeError(f"{file} is not a recipe that this version can read") from error
    except OrthogonalizeError as error:  # a name that is not registered
        raise OrthogonalizeError(f"{file}: {error}") from error


def _encode(tensor: torch.Tensor) -> Array:
    values = tensor.detach().to(torch.float64).contiguous().numpy().astype("<f8")
    return Array(shape=list(values.shape), data=base64.b64encode(values.tobytes()).decode())


def _decode(array: Array) -> torch.Tensor:
    try:
        values = np.frombuffer(base64.b64decode(array.data, validate=True), dtype="<f8").reshape(array.shape)
    except ValueError as error:
        raise OrthogonalizeError("the recipe's vectors are damaged") from error
    if not np.isfinite(values).all():
        raise OrthogonalizeError("the recipe's vectors hold NaN or infinite values")
    return torch.from_numpy(values.astype(np.float64))


@dataclass(frozen=True)
class StoredMaps:
    """An intervention as records and arrays (each distinct array once); `fingerprint` is the SHA-256 of all arrays."""

    maps: list[MapRecord]
    conditional: list[ConditionalRecord]
    arrays: dict[str, Array]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(sorted(self.arrays)).encode()).hexdigest()


def store_maps(intervention: Intervention) -> StoredMaps:
    """The records and arrays of an intervention, for its recipe."""
    arrays: dict[str, Array] = {}
    records: dict[tuple[str, ...], MapRecord] = {}

    def store(tensor: torch.Tensor) -> str:
        array = _encode(tensor)
        key = hashlib.sha256(repr(array.shape).encode() + array.data.encode()).hexdigest()[:16]
        arrays[key] = array
        return key

    for side, maps in (("write", intervention.writes), ("read", intervention.reads)):
        for site, affine in maps.items():
            keys = [store(tensor) for tensor in (affine.u, affine.v, affine.s)]
            record = records.setdefault(
                (side, *keys),
                MapRecord(side=side, sites=[], u=keys[0], v=keys[1], s=keys[2]),  # type: ignore[arg-type]
            )
            record.sites.append(str(site))
    conditional = [
        ConditionalRecord(matrix=str(matrix), r=store(each.r), c=store(each.c))
        for matrix, each in intervention.conditional.items()
    ]
    return StoredMaps(list(records.values()), conditional, arrays)


class ProbeResult(BaseModel):
    """A fresh logistic regression on train activations, scored on val activations at one position and layer.

    `before` and `after`: its accuracy without and with the edit's map applied to both. `chance`: the accuracy of
    always answering the larger side. `n`: the number of val prompts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    position: int
    layer: int
    rank: int
    before: float
    after: float
    chance: float
    n: int
