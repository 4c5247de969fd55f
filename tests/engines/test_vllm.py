"""vLLM on a tiny model: its numbers equal transformers', and edits swapped in place equal edits on disk.

Engines are slow to start, so one serves most tests; only those that need another start their own.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.benchmark_files import SETS, all_sets, harness_rows, harness_task
from helpers.chat import store_choosing, tiny_tokenizer
from helpers.command_line import UNTRIED
from helpers.tiny_models import store_tiny

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract
from orthogonalize.commands.sweep import sweep
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import removal
from orthogonalize.data.chat import ChatFormat
from orthogonalize.edits.bake import bake
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.edits.scopes import map_sites, parse_scope
from orthogonalize.engines.base import EngineOptions
from orthogonalize.engines.data_parallel import EngineGroup
from orthogonalize.engines.shared_base import common_folder, edited_weights
from orthogonalize.engines.transformers import TransformersEngine
from orthogonalize.engines.vllm import VllmEngine
from orthogonalize.engines.weight_swap import WeightSwap
from orthogonalize.evals.suites.kl import kl_bound
from orthogonalize.evals.suites.registry import DEFAULT_SUITES
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.variants import make_variants

ON_CPU = not torch.cuda.is_available()
# On a GPU vLLM's attention multiplies float32 in TF32 (10 bits of mantissa), and several engines share the GPU.
CLOSE: dict[str, float] = {"abs": 1e-3} if ON_CPU else {"abs": 1e-2, "rel": 1e-3}
SMALL = EngineOptions(gpu_memory_utilization=0.1)

# The first adds an untied head, the second adds biases, the last edits parts of tensors that the engine fuses.
EDITS = {
    "ablate": {"method": "ablate", "scope": "all"},
    "actadd": {"method": "actadd", "layer": 2, "position": -1, "coefficient": 3.0},
    "reflect": {"method": "reflect", "scope": "layers:1"},
    "reads": {"method": "ablate", "scope": "from:1"},
}


@pytest.fixture(scope="module")
def run_settings():
    return UNTRIED


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return store_choosing(tmp_path_factory.mktemp("vllm") / "model", hidden_size=128, intermediate_size=96)


@pytest.fixture(scope="module")
def written(model, run, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("written")
    for name, settings in EDITS.items():
        edit(str(model), root / name, run=run, **settings)
    return {name: root / name for name in EDITS}


@pytest.fixture(scope="module")
def plans(model, written):
    source = open_checkpoint(model)
    return {name: bake(source, load_recipe(folder).intervention()).checkpoint for name, folder in written.items()}


@pytest.fixture(scope="module")
def shared(model, plans):
    with (
        common_folder(open_checkpoint(model), list(plans.values())) as folder,
        VllmEngine(folder, 512, SMALL, enable_prefix_caching=True) as engine,
    ):
        yield engine, WeightSwap(engine, open_checkpoint(folder))


@pytest.fixture(scope="module")
def prompts(run) -> list[list[int]]:
    found = load_run(run)
    texts = [*found.texts("positive", "test"), *found.texts("negative", "test")]
    # Longer than a block of the prefix cache, so that a stale prefix would be noticed.
    return [ChatFormat(tiny_tokenizer()).encode(f"{'please bake the cake today ' * 40}{text}") for text in texts]


@pytest.fixture(scope="module")
def reference(model):
    with TransformersEngine(model, tiny_tokenizer(), "cpu") as engine:
        yield engine


def assert_likeliest(ours: list[float], theirs: list[float]) -> None:
    """The likeliest choice's score is exact, and every other score is an upper bound."""
    best = max(range(len(theirs)), key=theirs.__getitem__)
    assert max(range(len(ours)), key=ours.__getitem__) == best
    assert ours[best] == pytest.approx(theirs[best], **CLOSE)
    assert all(a >= b - CLOSE["abs"] for a, b in zip(ours, theirs, strict=True))


def assert_choices_are_those_of(reference, engine, prompts) -> None:
    choices = [
        [[8 + i], [9 + i], [10 + i]] if i % 2 else [[8 + i, 9], [10 + i], [11, 12, 13]] for i in range(len(prompts))
    ]
    for ours, theirs in zip(engine.choices(prompts, choices), reference.choices(prompts, choices), strict=True):
        assert_likeliest(ours, theirs)


SWAPPED: dict[str, list[list[int]]] = {}


def test_losses_choices_and_distributions_equal_transformers(shared, reference, prompts):
    engine, _ = shared
    answers = reference.answers(prompts, 12)
    assert engine.answers(prompts, 12) == answers
    answers = [a or [5] for a in answers]
    for ours, theirs in zip(engine.scores(prompts, answers), reference.scores(prompts, answers), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, **CLOSE)
        assert ours.greedy == theirs.greedy
    pairs = zip(engine.likeliest(prompts, answers), reference.likeliest(prompts, answers), strict=True)
    for ours, theirs in pairs:
        assert ours.ids.shape == theirs.ids.shape
        assert kl_bound(theirs, ours).max() < (1e-5 if ON_CPU else 1e-4)
    assert_choices_are_those_of(reference, engine, prompts)


@pytest.mark.parametrize("length", [127, 128, 129, 256])
def test_scores_are_right_with_a_cached_context(length, shared, reference):
    """The whole context may be in the cache, and end on a block boundary."""
    engine, _ = shared
    generator = torch.Generator().manual_seed(length)
    context = torch.randint(3, 96, (length,), generator=generator).tolist()
    choices = [[[8, 9]], [[10]], [[8, 9, 12]]]  # a question's only choice is scored to its end
    contexts = [context] * len(choices)
    for _ in range(2):  # the second time, every context and choice is cached
        found = engine.choices(contexts, choices)
        for ours, theirs in zip(found, reference.choices(contexts, choices), strict=True):
            assert ours == pytest.approx(theirs, **CLOSE)


def test_choices_are_scored_until_the_likeliest_is_known(shared, reference):
    """Choices of different lengths, and choices that differ only in their last token."""
    engine, _ = shared
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(3, 96, (16, 140), generator=generator).tolist()
    choices = [
        [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (1, 2, 5, 3)]
        if i % 2
        else [[8, 9, 10, last] for last in range(20, 26)]
        for i in range(16)
    ]
    found, expected = engine.choices(contexts, choices), reference.choices(contexts, choices)
    for ours, theirs in zip(found, expected, strict=True):
        assert_likeliest(ours, theirs)
    scored = [abs(a - b) < 1e-2 for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(scored) < len(scored)  # choices that could not be the likeliest were abandoned


def test_edit_is_swapped_in_and_out_bit_for_bit(shared, plans, prompts, written):
    engine, swap = shared
    before, base = engine.fingerprint(), engine.answers(prompts, 12)
    logprobs = [s.logprob for s in engine.scores(prompts, [[5, 6]] * len(prompts))]
    for name, plan in plans.items():
        swap.apply(edited_weights(plan))
        assert engine.fingerprint() != before
        SWAPPED[name] = engine.answers(prompts, 12)
        found = engine.scores(prompts, [[5, 6]] * len(prompts))
        with TransformersEngine(written[name], tiny_tokenizer(), "cpu") as other:
            for ours, theirs in zip(found, other.scores(prompts, [[5, 6]] * len(prompts)), strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, **CLOSE)
            assert SWAPPED[name] == other.answers(prompts, 12)
    assert any(answers != base for answers in SWAPPED.values())
    grown: list[list[int]] = []
    assert engine.stream(prompts[0], 12, grown.append) == SWAPPED[name][0], "what chat shows of the edit"
    assert len(grown) > 1
    assert all(after[: len(before)] == before for before, after in pairwise(grown))
    swap.restore()
    assert engine.fingerprint() == before
    assert engine.answers(prompts, 12) == base
    again = [s.logprob for s in engine.scores(prompts, [[5, 6]] * len(prompts))]
    assert again == (logprobs if ON_CPU else pytest.approx(logprobs, abs=1e-5))  # a GPU's sums depend on the batch


@pytest.mark.parametrize("name", ["ablate", "actadd"])
def test_written_checkpoint_generates_the_swapped_edits_tokens(name, written, prompts):
    assert name in SWAPPED, "the test before makes them"
    with VllmEngine(written[name], 512, SMALL) as engine:
        assert engine.answers(prompts, 12) == SWAPPED[name]


@pytest.mark.prove
@pytest.mark.skipif(not ON_CPU and torch.cuda.device_count() < 2, reason="an engine takes a GPU of its own")
def test_two_engines_in_separate_processes_act_as_one(model, shared, plans, prompts, reference):
    assert "ablate" in SWAPPED, "a test before makes it"
    before = shared[0].fingerprint()
    with (
        common_folder(open_checkpoint(model), list(plans.values())) as folder,
        EngineGroup(folder, 512, EngineOptions(data_parallel_size=2)) as group,
    ):
        assert group.fingerprint() == f"{before} {before}"
        assert group.answers(prompts, 12) == reference.answers(prompts, 12)
        assert_choices_are_those_of(reference, group, prompts)
        swap = WeightSwap(group, open_checkpoint(folder))
        swap.apply(edited_weights(plans["ablate"]))
        assert group.answers(prompts, 12) == SWAPPED["ablate"]
        swap.restore()
        assert group.fingerprint() == f"{before} {before}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("spread", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_engine_over_two_gpus_is_swapped_as_one(spread, model, plans, prompts, reference):
    assert SWAPPED, "a test before makes them"
    options = EngineOptions(**{spread: 2}, gpu_memory_utilization=0.1)
    with (
        common_folder(open_checkpoint(model), list(plans.values())) as folder,
        VllmEngine(folder, 512, options) as engine,
    ):
        before = engine.fingerprint()
        assert before.count("-") == 1
        assert engine.answers(prompts, 12) == reference.answers(prompts, 12)
        assert_choices_are_those_of(reference, engine, prompts)
        swap = WeightSwap(engine, open_checkpoint(folder))
        for name, plan in plans.items():
            swap.apply(edited_weights(plan))
            assert engine.answers(prompts, 12) == SWAPPED[name]
        swap.restore()
        assert engine.fingerprint() == before


def test_multimodal_wrapper_is_served_as_text_and_swapped(tmp_path):
    pytest.importorskip("torchvision")  # vLLM imports it for every multimodal class
    folder = store_tiny("gemma3 multimodal", tmp_path / "model", torch.bfloat16, 64)
    tiny_tokenizer().save_pretrained(folder)
    source = open_checkpoint(folder)
    basis = torch.linalg.qr(torch.randn(192, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0].T
    plan = bake(source, map_sites(parse_scope("layers:0-3"), 4, lambda _: removal(basis))).checkpoint
    (tmp_path / "edited").mkdir()
    plan.write(tmp_path / "edited")
    asked = [[5, 9, 11, 20], [7, 8, 30, 31, 32]]
    with VllmEngine(folder, 64, SMALL) as engine:
        before, plain = engine.fingerprint(), engine.scores(asked, asked)
        swap = WeightSwap(engine, source)
        swap.apply(edited_weights(plan))
        swapped = engine.scores(asked, asked)
        swap.restore()
        assert engine.fingerprint() == before
    tiny_tokenizer().save_pretrained(tmp_path / "edited")
    with VllmEngine(tmp_path / "edited", 64, SMALL) as engine:
        assert engine.scores(asked, asked) == swapped
    assert swapped != plain


def test_eval_measures_base_and_edited_in_one_engine_start(model, run, written, tmp_path, monkeypatch):
    from orthogonalize.commands.evaluate import evaluate

    starts: list[Path] = []
    enter = VllmEngine.__enter__

    def counted(self):
        starts.append(self.folder)
        return enter(self)

    monkeypatch.setattr(VllmEngine, "__enter__", counted)
    data = all_sets(tmp_path / "data")
    harness_task(data, harness_rows())
    suites = [*DEFAULT_SUITES, *SETS, "lm_eval:housework"]
    settings = {"max_new_tokens": 16, "suites": suites, "data": data, "limit": 6}
    ours = evaluate(written["ablate"], str(model), run, tmp_path / "vllm", **settings)
    assert starts == [written["ablate"]]
    theirs = evaluate(written["ablate"], str(model), run, tmp_path / "hf", engine="hf", **settings)
    for mine, yours in ((ours.base, theirs.base), (ours.edited, theirs.edited)):
        expected = yours.flat()
        assert len([key for key in expected if not key.startswith("suites.form.")]) == 16
        assert mine.flat().keys() == expected.keys()
        for key, measure in mine.flat().items():
            assert measure.value == pytest.approx(expected[key].value, **CLOSE), key
    assert [a.edited for a in ours.answers] == [a.edited for a in theirs.answers]


def test_sweep_in_vllm_equals_sweep_in_transformers(model, run, tmp_path, monkeypatch):
    """It covers edits that no other test here swaps: subspaces, and an eraser with its shift."""
    names = ("nullspace all", "leace top:50%", "actadd inlp +1 one")
    kept = [v for v in make_variants(load_run(run)) if v.name in names]
    monkeypatch.setattr("orthogonalize.commands.sweep.make_variants", lambda *_: kept)
    settings = {"max_new_tokens": 12}
    ours = sweep(str(model), run, tmp_path / "ours", options=SMALL, **settings)
    theirs = sweep(str(model), run, tmp_path / "theirs", engine="hf", **settings)
    assert ours.restored is True
    for mine, other in zip([ours.base, *(v.measures for v in ours.variants)],
                           [theirs.base, *(v.measures for v in theirs.variants)], strict=True):  # fmt: skip
        expected = other.flat()
        for key, measure in mine.flat().items():
            assert measure.value == pytest.approx(expected[key].value, **CLOSE), key
    moved = [v.measures.flat()["kl.completions"].value for v in ours.variants]
    assert min(moved) > 0.01, "an edit did nothing, so nothing was compared"


@pytest.mark.prove
def test_experts_that_vllm_cannot_swap_get_their_own_engines(tmp_path, sources):
    """vLLM 0.32's CPU build packs them, and a reload corrupts or rejects what it packed."""
    folder = store_tiny("qwen3_moe", tmp_path / "model", torch.float32, 64)
    tiny_tokenizer().save_pretrained(folder)
    extract(str(folder), tmp_path / "run", **sources, settings=UNTRIED)
    settings = {"max_new_tokens": 8, "methods": ["ablate"], "scopes": ["all"]}
    ours = sweep(str(folder), tmp_path / "run", tmp_path / "ours", options=SMALL, **settings)
    theirs = sweep(str(folder), tmp_path / "run", tmp_path / "theirs", engine="hf", **settings)
    for mine, other in zip([ours.base, ours.variants[0].measures], [theirs.base, theirs.variants[0].measures],
                           strict=True):  # fmt: skip
        expected = other.flat()
        for key, measure in mine.flat().items():
            assert measure.value == pytest.approx(expected[key].value, **CLOSE), key
    assert ours.variants[0].measures.flat()["kl.completions"].value > 0.01
    assert not ON_CPU or ours.restored is None


@pytest.mark.skipif(not ON_CPU, reason="arguments of vLLM on a CPU")
@pytest.mark.parametrize(
    ("name", "changed"), [("lfm2", True), ("deepseek_v2", True), ("deepseek_v3", True), ("llama", False)]
)
def test_cpu_engine_disables_the_rotary_kernel_where_it_is_wrong(name, changed, tmp_path, monkeypatch):
    given = {}

    def starts(**arguments):
        given.update(arguments)
        raise RuntimeError("far enough")

    monkeypatch.setattr("vllm.LLM", starts)
    folder = store_tiny(name, tmp_path / "model", torch.float32)
    with pytest.raises(OrthogonalizeError, match="far enough"), VllmEngine(folder, 64):
        pass
    assert given.get("compilation_config") == ({"custom_ops": ["-rotary_embedding"]} if changed else None)
