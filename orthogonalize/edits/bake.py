"""Bake an intervention into weights: which tensors of a checkpoint realise it, and along which of their axes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..architectures.schema import Part, bias_name
from ..checkpoints.checkpoint import Addition, Checkpoint
from ..checkpoints.quantization import row_reader
from ..checkpoints.safetensors_file import DTYPES, row_blocks
from ..checkpoints.settings_files import code_keys
from ..checkpoints.tensor_edit import TensorEdit
from ..core.errors import OrthogonalizeError, UnansweredError
from ..core.interventions import AffineMap, ConditionalMap, Intervention, Site, WriteMatrix, conjugate
from ..models.sites import Located
from .constant_vectors import place_constant
from .plan import EditPlan

CENTRED = 1e-6  # largest sum of a unit vector's entries that counts as zero
AskServer = Callable[[Checkpoint], str]
"""Finds out what the description of a checkpoint leaves open, and has it remembered; says why, if it could not."""


def bake(source: Checkpoint, intervention: Intervention, ask: AskServer | None = None) -> EditPlan:
    """Plan the edit that realises `intervention` in the weights of `source`; nothing is written.

    Args:
        ask: called if the edit depends on what the description leaves open (see `architectures.open_questions`).

    Raises:
        OrthogonalizeError: the architecture has no description, or an incomplete one for this checkpoint; the
            widths differ, a tensor is missing or not editable, or a constant cannot be placed exactly.
    """
    try:
        return _bake(source, intervention)
    except UnansweredError:
        if ask is None:
            raise
    reason = ask(source)
    try:
        return _bake(source, intervention)
    except UnansweredError as error:
        raise UnansweredError(error.what, error.instead, reason) from error


def _bake(source: Checkpoint, intervention: Intervention) -> EditPlan:
    plan = EditPlan.of(source)
    width = plan.architecture.width(source.config)
    for wrong in sorted(intervention.widths - {width}):
        raise OrthogonalizeError(
            f"the direction has width {wrong} and the model's residual stream {width}; "
            "was it extracted from another model?"
        )
    for key in code_keys(source.config):  # served by whoever gets the result, who should not run what a file names
        plan.checkpoint.config_changes[key] = None
    nested = source.config.get("text_config")
    for key in code_keys(nested) if isinstance(nested, dict) else ():
        plan.checkpoint.set_text_config(key, None)
    plan.sites.check_complete()
    plan.sites.check_head()
    plan.sites.check_images()
    _refuse(plan, intervention)
    for site, affine in intervention.writes.items():
        _plan_write(plan, site, affine)
    for site, affine in intervention.reads.items():
        _plan_read(plan, site, affine)
    for matrix, conditional in intervention.conditional.items():
        _plan_conditional(plan, matrix, conditional)
    return plan


def _refuse(plan: EditPlan, intervention: Intervention) -> None:
    """Reject what the description says cannot be made exactly.

    Raises:
        OrthogonalizeError: the message says why, and what works instead.
    """
    ways = {
        "embed": (
            Site("embed") in intervention.writes,
            "the embedding",
            "use a scope of blocks (layers:…, one, top:…)",
        ),
        "reads": (bool(intervention.reads), "what is read", "use a scope of blocks (layers:…, one, top:…)"),
        "constants": (
            any(affine.shifts for site, affine in intervention.writes.items() if site.kind != "embed"),
            "constants in blocks",
            "use ablate, nullspace, reflect or conditional",
        ),
        "conditional": (bool(intervention.conditional), "inputs", "use another method than conditional"),
    }
    for kind, why in plan.architecture.refused.items():
        asked, what, instead = ways[kind]
        if asked:
            raise OrthogonalizeError(f"{plan.architecture.family} cannot be edited by {what}: {why}; {instead}")


def _plan_write(plan: EditPlan, site: Site, affine: AffineMap) -> None:
    """Plan the edit of everything that writes into the stream at `site`."""
    if site.kind == "embed":
        _plan_embedding(plan, site, affine)
        return
    if affine.rank:
        for part in plan.sites.parts(site):
            _plan_part(plan, site, part, affine.unshifted)
    if affine.shifts:
        place_constant(plan, site, affine.s)


def _plan_part(plan: EditPlan, site: Site, part: Part, affine: AffineMap) -> None:
    layer = int(site.layer or 0)
    affine = _before_norms(plan, site, part, affine)
    for write in plan.sites.writes(part, layer):
        bare = len(plan.checkpoint.shape(write.name)) == 1
        plan.edit(write.name, site, write.axis, affine, "vectors" if bare else "matrix")
        bias = bias_name(write.name)
        if bias in plan.source.tensors:
            plan.edit(bias, site, len(plan.checkpoint.shape(bias)) - 1, affine, "vectors")


def _before_norms(plan: EditPlan, site: Site, part: Part, affine: AffineMap) -> AffineMap:
    """The map of what `part` writes before the norms after it, if there are any (see `conjugate`)."""
    names = plan.sites.post_norms(part, int(site.layer or 0))
    scales = [_norm_weight(plan, name, site, affine.width) for name in names]
    return conjugate(affine, torch.stack(scales).prod(0)) if scales else affine


def _plan_conditional(plan: EditPlan, matrix: WriteMatrix, conditional: ConditionalMap) -> None:
    """Plan the conditional edit of one write matrix, or of its experts."""
    found = plan.sites.write_matrices(matrix.site).get(matrix)
    if found is None:
        raise OrthogonalizeError(f"the checkpoint has no write matrix {matrix}; was the edit fitted to another model?")
    part, stored = found
    affine = conditional.directions
    affine = _before_norms(plan, matrix.site, part, affine)
    _check_inputs(plan, matrix, stored, conditional)
    # Of experts that are stored one by one, each has its own components; fused ones have them in the same order.
    parts = conditional.c if len(stored) > 1 else [conditional.c]
    for write, c in zip(stored, parts, strict=True):
        if not c.any():
            continue
        inputs = c.movedim(-2, 0).reshape(conditional.rank, -1)
        if write.name in plan.checkpoint.edits:
            raise OrthogonalizeError(f"{write.name} is edited twice, conditionally and for every input")
        plan.edit_given(write.name, matrix.site, write.axis, affine, inputs)


def _check_inputs(plan: EditPlan, matrix: WriteMatrix, stored: list[Located], conditional: ConditionalMap) -> None:
    """Reject a conditional map whose experts or inputs are not those of the matrix.

    Raises:
        OrthogonalizeError: the message names the tensor, its shape, and the map's.
    """
    for write in stored:
        shape = plan.checkpoint.shape(plan.check_shape(write.name, matrix.site, write.axis, conditional.width))
        inputs = tuple(size for axis, size in enumerate(shape) if axis != write.axis % len(shape))
        wanted = (*inputs[:-1], conditional.rank, inputs[-1]) if inputs else ()
        if matrix.routed and len(shape) == 2:
            wanted = (len(stored), *wanted)
        if tuple(conditional.c.shape) != wanted:
            raise OrthogonalizeError(
                f"the edit of {write.name} {list(shape)} has the components {list(conditional.c.shape)} and needs "
                f"{list(wanted)}; was it fitted to another model?"
            )


def _plan_embedding(plan: EditPlan, site: Site, affine: AffineMap) -> None:
    placed = not affine.shifts
    for entry, name in plan.sites.embedded():
        bias = bias_name(name)
        if affine.rank:
            plan.edit(name, site, entry.axis, affine.unshifted, "vectors" if entry.rows else "matrix")
            if not entry.rows and bias in plan.source.tensors:
                plan.edit(bias, site, 0, affine.unshifted, "vectors")
        if entry.rows and not placed:
            plan.add_constant(name, site, affine.s / _embedding_scale(plan, entry.scale, name), entry.axis)
            placed = True
        if entry.image and affine.shifts:
            if bias not in plan.source.tensors:
                raise OrthogonalizeError(
                    f"{name} has no bias, so what comes from images cannot be shifted by a constant; "
                    "use ablate, nullspace or reflect"
                )
            plan.add_constant(bias, site, affine.s)
    if plan.sites.tied_to in plan.checkpoint.edits:
        _untie_head(plan)


def _embedding_scale(plan: EditPlan, key: str | None, name: str) -> float:
    scale = plan.architecture.scale(key, plan.source.config)
    if key == "sqrt_width":  # kept by the model in the weights' own dtype
        scale = torch.tensor(scale, dtype=DTYPES[plan.source.tensors[name].dtype]).item()
    return scale


def _plan_read(plan: EditPlan, site: Site, affine: AffineMap) -> None:
    """Plan the edit of everything that reads the stream at `site`."""
    if site.kind == "head":
        reader = plan.sites.reader
        if reader.name == plan.sites.head:
            _untie_head(plan)
        name = f"{plan.sites.decoder}{plan.architecture.head.norm}.weight"
        normed = plan.architecture.head.norm is not None
        norm = name if plan.architecture.norms.parameters and normed else None
        _plan_reads(plan, site, [reader], norm, affine, normed)
        return
    layer = int(site.layer or 0)
    for part in plan.sites.parts(site):
        reads, norm = plan.sites.reads(part, layer), plan.sites.norm(part, layer)
        _plan_reads(plan, site, reads, norm, affine, normed=bool(part.norm))


def _plan_reads(
    plan: EditPlan, site: Site, reads: list[Located], norm: str | None, affine: AffineMap, normed: bool = True
) -> None:
    """Plan the edit of the tensors `reads`, which read through the norm with weight `norm` (None: of ones)."""
    centring = normed and plan.architecture.norms.kind == "layer"
    if centring and not affine.is_centred(CENTRED):
        raise OrthogonalizeError(
            f"{plan.architecture.family} subtracts the mean before it reads, so a direction must be centred first"
        )
    if norm is None:
        scale = torch.ones(affine.width, dtype=torch.float64)
    else:
        scale = _norm_weight(plan, norm, site, affine.width)
    bias = bias_name(norm) if norm else ""
    for read in reads:
        edit = plan.edit_reader(read.name, site, read.axis, affine, scale)
        if centring and bias in plan.source.tensors:
            _check_vector(plan, bias, site, affine.width)
            _restore_norm_bias(plan, edit, plan.source.read(bias).double())


def _restore_norm_bias(plan: EditPlan, edit: TensorEdit, bias: torch.Tensor) -> None:
    """Add back what the edited reader no longer sees of the norm's own `bias`, which is not part of the stream."""
    addition, affine = plan.checkpoint.additions.get(edit.name), edit.vectors_map()
    name = edit.name if addition is None else addition.copy_of or edit.name
    rows = row_reader(plan.source, name)
    component, square = torch.zeros((), dtype=torch.float64), 0.0
    parts: list[torch.Tensor] = []
    for first, last in row_blocks(plan.source.tensors[name].shape):
        block = rows(first, last).double()
        square += float(block.square().sum())
        if edit.axis == 0:
            component = component + block.movedim(0, -1) @ affine.v[first:last]
        else:
            parts.append(block.movedim(edit.axis, -1) @ affine.v)
    lost = (torch.cat(parts) if parts else component) @ (affine.u.mT @ bias)
    if lost.norm() <= 1e-12 * square**0.5 * bias.norm():
        return
    own = bias_name(edit.name)
    if own not in plan.source.tensors:
        raise OrthogonalizeError(
            f"{edit.name} reads through a LayerNorm with a bias and has no bias itself, so what it reads along the "
            "direction cannot be removed exactly; use a scope on the write side (all, upto:l, layers:…)"
        )
    plan.add_constant(own, edit.site, lost)


def _check_vector(plan: EditPlan, name: str, site: Site, width: int) -> str:
    """`name`, once checked that the tensor is a vector of `width` (see `EditPlan.check_shape`)."""
    shape = plan.checkpoint.shape(plan.check_shape(name, site, -1, width))
    if len(shape) != 1:
        raise OrthogonalizeError(f"{name} has the shape {list(shape)} instead of [{width}]; fetch the checkpoint again")
    return name


def _norm_weight(plan: EditPlan, name: str, site: Site, width: int) -> torch.Tensor:
    """What the norm with weight `name` multiplies by, [width] in float64."""
    return plan.architecture.norms.offset + plan.source.read(_check_vector(plan, name, site, width)).double()


def _untie_head(plan: EditPlan) -> None:
    """Make the head independent of the embedding, with its current values.

    Raises:
        OrthogonalizeError: no server runs an untied head of this family.
    """
    head, name = plan.architecture.head, plan.sites.head
    if name not in plan.source.tensors:
        if head.untied == "never":
            raise OrthogonalizeError(
                f"vLLM always takes the embedding of {plan.architecture.family} for its head, so neither can be "
                "edited on its own; use a scope without them (layers:…, one, top:…)"
            )
        if head.untied == "unknown":
            raise UnansweredError(
                f"the head of this {plan.architecture.family} model is its embedding, and whether vLLM runs one of its "
                "own",
                "use a scope of blocks (layers:…, one, top:…) or --method conditional, or say it in a file for "
                "--description (head.untied)",
            )
        embedding = plan.check_tensor(plan.sites.tied_to, Site("embed"))
        plan.checkpoint.additions[name] = Addition.copy(plan.source, embedding)
        if head.untied == "transformers":
            plan.serve_with_transformers()
    for flag in head.flags:
        for config in (plan.source.config, plan.source.config.get("text_config")):
            if isinstance(config, dict) and (name in plan.checkpoint.additions or config.get(flag, head.tied)):
                if config is plan.source.config:
                    plan.checkpoint.config_changes[flag] = False
                else:
                    plan.checkpoint.set_text_config(flag, False)
