"""An architecture file applied to one checkpoint: the tensors that write and read the residual stream."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..architectures.schema import Architecture, Embedded, Part, bias_name, text_config, without_experts
from ..checkpoints.quantization import refuse_packed
from ..checkpoints.safetensors_file import TensorInfo
from ..core.errors import OrthogonalizeError
from ..core.interventions import Site, WriteMatrix

# Suffixes of what quantized checkpoints store beside, or instead of, a weight.
COMPANIONS = ("_scale", "_scale_inv", "_blocks", "_scales", "_packed", "_shape", "_zero_point", "_g_idx")

# Possible prefixes of tensors outside the text model, depending on the library that wrote the checkpoint.
ROOTS = ("", "model.")
AUDIO = re.compile(r"audio|speech|sound")  # audio encoders, in tensor names and configuration keys
VISION = re.compile(r"(^|\.)vis(ion|ual)")  # vision encoders, in tensor names


@dataclass(frozen=True)
class Located:
    """A tensor of the checkpoint, and which of its axes is the residual stream."""

    name: str
    axis: int


@dataclass(frozen=True)
class Sites:
    """Where the model of a checkpoint writes and reads its residual stream."""

    architecture: Architecture
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @cached_property
    def decoder(self) -> str:
        """The prefix of the text model's tensor names."""
        return self._layout[0]

    @cached_property
    def head(self) -> str:
        """The tensor name of the output head, whether or not it is stored."""
        return self._layout[1]

    @cached_property
    def _layout(self) -> tuple[str, str]:
        weights = [e.weight for e in self.architecture.embed.values() if not e.image]
        for layout in self.architecture.layouts:
            if any(layout.decoder + weight in self.tensors for weight in weights):
                return layout.decoder, layout.head
        expected = " or ".join(layout.decoder + weights[0] for layout in self.architecture.layouts)
        raise OrthogonalizeError(
            f"this {self.architecture.family} checkpoint has no embedding with a known name ({expected}); "
            "run `orthogonalize describe MODEL` to see its layout"
        )

    def in_layer(self, name: str, layer: int) -> str:
        """The full name of a tensor in block `layer`."""
        return f"{self.decoder}{self.architecture.block(layer)}.{name}"

    def _expand(self, template: str, layer: int) -> list[str]:
        """The stored tensors that a described name stands for: none, one, or one per expert."""
        name = self.in_layer(template, layer)
        if "{expert}" not in name:
            return [name] if name in self.tensors else []
        count = min(self.architecture.experts(self.config), len(self.tensors) + 1)  # config.json may say any number
        names = [name.replace("{expert}", str(e)) for e in range(count)]
        stored = [n for n in names if n in self.tensors]
        if stored and len(stored) < len(names):
            missing = next(n for n in names if n not in self.tensors)
            raise OrthogonalizeError(f"the checkpoint lacks {missing}, although it has other experts of that layer")
        return stored

    def _locate(self, named: Mapping[str, int], layer: int) -> list[Located]:
        return [Located(n, axis) for template, axis in named.items() for n in self._expand(template, layer)]

    def writes(self, part: Part, layer: int, among: Sequence[str] = ()) -> list[Located]:
        """The tensors through which `part` of block `layer` writes (only those in `among`, if given)."""
        named = {name: axis for name, axis in part.writes.items() if not among or name in among}
        return self._locate(named, layer)

    def write_matrices(self, site: Site) -> dict[WriteMatrix, tuple[Part, list[Located]]]:
        """The matrices that write at `site` of a block: the part of each, and its tensors (one per expert, or one)."""
        found: dict[WriteMatrix, tuple[Part, list[Located]]] = {}
        layer = int(site.layer or 0)
        for part in self.parts(site):
            for template in part.writes:
                stored = self.writes(part, layer, [template])
                if not stored or len(self.tensors[stored[0].name].shape) == 1:  # a vector that is added has no input
                    continue
                routed = "{expert}" in template or len(self.tensors[stored[0].name].shape) == 3
                dense = WriteMatrix(site, template.removesuffix(".weight"))
                found[WriteMatrix.of_experts(site, template) if routed else dense] = (part, stored)
        return found

    def reads(self, part: Part, layer: int) -> list[Located]:
        """The tensors through which `part` of block `layer` reads."""
        found = self._locate(part.reads, layer)
        if not found and part.reads:
            raise OrthogonalizeError(f"the checkpoint lacks {self.in_layer(next(iter(part.reads)), layer)}")
        return found

    def parts(self, site: Site) -> list[Part]:
        """The parts that write at `site` of a block, in the order of the architecture file.

        Raises:
            OrthogonalizeError: the layer has none of them, or they are packed.
        """
        layer = int(site.layer or 0)
        described = self.architecture.parts(site.kind)
        found = [part for part in described.values() if self.writes(part, layer)]
        if described and not found:
            missing = self.in_layer(next(iter(next(iter(described.values())).writes)), layer)
            refuse_packed(self.tensors, missing)
            stem = missing.removesuffix(".weight")
            packed = next((stem + end for end in COMPANIONS if stem + end in self.tensors), None)
            if packed is not None:
                raise OrthogonalizeError(
                    f"{packed} is quantized in a format that cannot be edited exactly; start from a bfloat16 copy"
                )
            raise OrthogonalizeError(
                f"the checkpoint lacks {missing}, which {self.architecture.family} models have at {site}"
            )
        return found

    def norm(self, part: Part, layer: int) -> str | None:
        """The weight of the norm through which `part` reads; None if it reads the stream directly."""
        names = [self.in_layer(f"{norm}.weight", layer) for norm in part.norm]
        if not names or not self.architecture.norms.parameters:
            return None
        return next((name for name in names if name in self.tensors), names[0])

    def post_norms(self, part: Part, layer: int) -> list[str]:
        """The weights of the norms that the output of `part` passes before it is added, in order."""
        names = [(norm, self.in_layer(f"{norm}.weight", layer)) for norm in part.post_norm]
        return [name for norm, name in names if name in self.tensors or norm not in part.sometimes]

    def embedded(self) -> Iterator[tuple[Embedded, str]]:
        """The tensors that write to the stream before the first block."""
        for entry in self.architecture.embed.values():
            name = self._name(entry)
            off = entry.unless is not None and self.decoder + entry.unless in self.tensors
            if name in self.tensors and not off:
                yield entry, name

    def _name(self, entry: Embedded) -> str:
        """The tensor name of `entry`; an image projector lies outside the text model."""
        if not entry.image:
            return self.decoder + entry.weight
        return next((p + entry.weight for p in ROOTS if p + entry.weight in self.tensors), entry.weight)

    def check_images(self) -> None:
        """Reject a multimodal model if an encoder's output would reach the stream unedited.

        Where the embedding cannot be edited either, this does not matter.

        Raises:
            OrthogonalizeError: it has an audio encoder or an image projector that is not described or not found.
        """
        if "embed" in self.architecture.refused:
            return
        entries = [entry for entry in self.architecture.embed.values() if entry.image]
        described = any(AUDIO.search(entry.weight) for entry in entries)
        audio = next((key for key in self.config if AUDIO.search(key) and isinstance(self.config[key], Mapping)), None)
        if audio is not None and not described and any(AUDIO.search(name) for name in self.tensors):
            raise OrthogonalizeError(
                f"this model has an audio encoder ({audio}), whose output would reach the residual stream unedited; "
                "extract the text model into a checkpoint of its own and edit that"
            )
        sees = "vision_config" in self.config and any(VISION.search(name) for name in self.tensors)
        if sees and not entries and not self.architecture.images_attended:
            raise OrthogonalizeError(
                f"the architecture file of {self.architecture.family} does not say through which tensor images enter "
                "the residual stream; add an [embed.images] with image = true (docs/architectures.md)"
            )
        for entry in entries:
            if sees and self._name(entry) not in self.tensors:
                raise OrthogonalizeError(
                    f"the checkpoint lacks {entry.weight}, through which images enter the residual stream of "
                    f"{self.architecture.family} models; is it stored in another format?"
                )

    @cached_property
    def tied_to(self) -> str:
        """The name of the embedding that a tied head shares its weights with."""
        return next(self.decoder + e.weight for e in self.architecture.embed.values() if e.tied)

    def check_head(self) -> None:
        """Reject a checkpoint whose configuration says that the head is untied, and which has none.

        Raises:
            OrthogonalizeError: the message names the missing tensor.
        """
        head = self.architecture.head
        configs = [self.config, text_config(self.config)]
        told = [(flag, c[flag]) for c in configs for flag in head.flags if isinstance(c.get(flag), bool)]
        if self.head not in self.tensors and told and not any(tied for _, tied in told):
            raise OrthogonalizeError(
                f"the checkpoint is incomplete: it lacks {self.head}, which {told[0][0]} = false in config.json calls "
                "for; fetch it again"
            )

    @cached_property
    def reader(self) -> Located:
        """The tensor through which the head reads the stream."""
        before = self.architecture.head.before
        if before is not None and self.decoder + before in self.tensors:
            return Located(self.decoder + before, 1)
        return Located(self.head, self.architecture.head.axis)

    def check_complete(self) -> None:
        """Reject a checkpoint whose text model has a tensor as wide as the stream that is not described.

        It might write to the stream, and an edit that misses one write fails. Layers after the last (for
        multi-token prediction) are not part of the stream.

        Raises:
            OrthogonalizeError: there is such a tensor; the message names the first.
        """
        width, layers = self.architecture.width(self.config), self.architecture.layers(self.config)
        block = re.compile(re.escape(self.architecture.layer).replace(r"\{layer\}", r"(\d{1,9})") + r"\.(.+)")
        known, outside = self._described_in_blocks(), self._described_outside()
        for name, info in self.tensors.items():
            if not name.startswith(self.decoder) or len(info.shape) < 2 or width not in info.shape:
                continue
            inner = block.fullmatch(name[len(self.decoder) :])
            if inner and int(inner[1]) >= layers:
                continue
            relative = without_experts(inner[2]) if inner else name
            if not _is_described(relative, known if inner else outside):
                raise OrthogonalizeError(
                    f"the architecture file of {self.architecture.family} does not describe {name}, which is as wide "
                    "as the residual stream; run `orthogonalize describe MODEL` to find its role, then add it"
                )

    def _described_in_blocks(self) -> set[str]:
        named = set(self.architecture.inert)
        for part in (*self.architecture.attn.values(), *self.architecture.mlp.values()):
            named |= part.writes.keys() | part.reads.keys()
            named |= {bias_name(weight) for weight in (*part.writes, *part.reads)}
        return named

    def _described_outside(self) -> set[str]:
        entries = self.architecture.embed.values()
        named = {self._name(entry) for entry in entries}
        before = self.architecture.head.before
        # If the decoder has no prefix, its names and those of the root share one namespace.
        named |= {self.decoder + name for name in self.architecture.inert}
        return named | {self.head, *([self.decoder + before] if before else [])}


def _is_described(name: str, known: set[str]) -> bool:
    if name in known:
        return True
    return any(name.removesuffix(end) in known or name.removesuffix(end) + ".weight" in known for end in COMPANIONS)
