"""What only a server can tell about a model: asked by NaN, of servers that read some parameters and ignore others."""

from __future__ import annotations

import errno
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from orthogonalize.architectures.open_questions import answered, open_flags, open_names, parts_with_bias
from orthogonalize.architectures.schema import families
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import InPlaceError, OrthogonalizeError
from orthogonalize.engines.experiment import server
from orthogonalize.engines.experiment.questions import (
    OtherModelError,
    PassingError,
    Question,
    Told,
    ask,
    open_questions,
)
from orthogonalize.models.describe.twin import save_twin
from orthogonalize.models.sites import Sites

HEAD = Question("head", ("lm_head.weight",), ("lm_head.weight",), {}, {})
ATTENTION = Question("attn.self", ("0.o.bias", "1.o.bias"), ("0.o.bias", "1.o.bias", "0.q.bias"), {}, {})
MLP = Question("mlp.dense", ("0.down.bias",), ("0.down.bias",), {}, {})
ALL = [HEAD, ATTENTION, MLP]


def left_open(architecture):
    """A description that says nothing of what a server does."""
    return answered(architecture, dict.fromkeys(["head", *parts_with_bias(architecture)], "unknown"))


class Fake:
    """Two implementations: the tensors that each reads, and those for which it refuses a checkpoint (or `all`).

    `dropped` are those that have no effect where they are swapped in, and have one where they are loaded.
    """

    def __init__(self, own=(), backend=(), refused=(), backend_refused=(), dropped=(), error=OrthogonalizeError):
        self.dropped, self.error = dropped, error
        self.of = {"vllm": (own, refused), "transformers": (backend, backend_refused)}
        self.starts = []

    @contextmanager
    def __call__(self, served, stored, spoiled):
        read, refused = self.of[served]
        self.starts.append((served, [question.name for question in stored], list(spoiled)))
        if "all" in refused or any(name in refused for question in stored for name in question.created):
            raise self.error(f"{served} stops")
        numbers = not set(spoiled) & set(read)
        yield SimpleNamespace(reads=lambda t: t in read and t not in self.dropped, is_number=lambda: numbers)


def test_backend_is_asked_only_for_what_the_class_does_not_read():
    fake = Fake(own=HEAD.tensors, backend=(*HEAD.tensors, *ATTENTION.tensors))
    assert ask(ALL, fake) == Told({"head": "vllm", "attn.self": "transformers", "mlp.dense": "never"})
    everything = ["head", "attn.self", "mlp.dense"]
    assert fake.starts[:3] == [
        ("vllm", everything, []),
        ("vllm", everything, list(ATTENTION.tensors)),
        ("vllm", everything, list(MLP.tensors)),
    ]
    assert fake.starts[3:] == [("transformers", everything, []), ("transformers", everything, list(MLP.tensors))]


def test_bias_that_is_read_in_some_layers_alone_is_not_read():
    assert ask([ATTENTION], Fake(own=["0.o.bias"])).answers == {"attn.self": "never"}


def test_tensor_that_cannot_be_swapped_in_is_tried_by_a_start_on_it():
    """Fused experts' biases, for one; otherwise they would seem to be ignored."""
    fake = Fake(own=ATTENTION.tensors, dropped=ATTENTION.tensors)
    assert ask([ATTENTION], fake).answers == {"attn.self": "vllm"}
    assert [spoiled for *_, spoiled in fake.starts] == [[], [*ATTENTION.tensors], ["0.o.bias"], ["1.o.bias"]]
    one_of_two = Fake(own=["0.o.bias"], dropped=["0.o.bias"])
    assert ask([ATTENTION], one_of_two).answers == {"attn.self": "never"}


def test_backend_that_computes_another_model_reads_nothing():
    fake = Fake(backend=HEAD.tensors, backend_refused=["all"], error=OtherModelError)
    assert ask([HEAD], fake) == Told({"head": "never"})


def test_class_that_refuses_one_tensor_is_asked_for_the_others_without_it():
    everything = [name for question in ALL for name in question.tensors]
    fake = Fake(own=everything, backend=everything, refused=["lm_head.weight"])
    assert ask(ALL, fake).answers == {"head": "transformers", "attn.self": "vllm", "mlp.dense": "vllm"}
    assert ("vllm", [], []) in fake.starts


def test_model_that_the_server_does_not_run_at_all_is_no_answer():
    assert ask(ALL, Fake(refused=["all"], backend_refused=["all"])) == Told({}, "vllm stops")


def test_what_one_implementation_does_not_read_is_open_where_the_other_does_not_run():
    assert ask(ALL, Fake(own=HEAD.tensors, backend_refused=["all"])) == Told({"head": "vllm"}, "transformers stops")
    own_fails = Fake(refused=["all"], backend=ATTENTION.tensors)
    assert ask(ALL, own_fails) == Told({"attn.self": "transformers"}, "vllm stops")


def test_answers_do_not_depend_on_what_may_pass():
    """A class that seems to refuse a tensor for want of memory would seem not to read it."""
    fake = Fake(own=HEAD.tensors, backend=ATTENTION.tensors, refused=ATTENTION.created, error=PassingError)
    assert ask(ALL, fake) == Told({}, "vllm stops", passing=True)
    assert fake.starts == [("vllm", ["head", "attn.self", "mlp.dense"], [])]
    short = Fake(own=HEAD.tensors, backend_refused=["all"], error=PassingError)
    told = []
    assert ask(ALL, short, tell=lambda answers: told.append(dict(answers))).passing
    assert told == [{"head": "vllm"}]


def test_backend_that_is_of_no_use_is_not_asked():
    fake = Fake(own=HEAD.tensors, backend=MLP.tensors)
    assert ask([HEAD, MLP], fake, backend=False) == Told({"head": "vllm", "mlp.dense": "never"})
    assert {served for served, *_ in fake.starts} == {"vllm"}
    assert ask([HEAD], Fake(backend=HEAD.tensors, refused=["all"]), backend=False) == Told({}, "vllm stops")


def test_what_is_known_is_not_asked_again():
    fake = Fake(own=MLP.tensors, backend=MLP.tensors)
    known = {"head": "never", "attn.self": "transformers"}
    assert ask(ALL, fake, known) == Told(known | {"mlp.dense": "vllm"})
    assert [served for served, *_ in fake.starts] == ["vllm"]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "starcoder2"])
def test_questions_are_about_what_the_settings_create(name, tmp_path):
    """Against the tensors of two models of transformers, one with every flag and one without."""
    architecture = left_open(families()[name])
    config = AutoConfig.for_model(name)
    stored = {}
    for value in (True, False):
        for flag in open_flags(architecture):
            setattr(config, flag, value)
        (tmp_path / str(value)).mkdir()
        save_twin(config, tmp_path / str(value))
        stored[value] = open_checkpoint(tmp_path / str(value))
    questions = open_questions(Sites(architecture, stored[True].config, stored[True].tensors))
    assert [question.name for question in questions] == open_names(architecture)
    biases = questions[1:]
    made = stored[True].tensors.keys() - stored[False].tensors.keys()
    assert {name for question in biases for name in question.created} == made
    assert {name for question in biases for name in question.tensors} <= stored[True].tensors.keys()
    assert all(len(question.tensors) == 4 for question in biases)  # one per layer
    assert questions[0].tensors[0] in stored[True].tensors


class FakeEngine:
    """Scores that are NaN if a parameter among `read` is; a load of `stuck` is dropped, `kept` can only be set once.

    One that `forgets` answers with tokens that are not the likeliest once they are part of a prompt.
    """

    def __init__(self, source, read, stuck=(), kept=(), unset=False, forgets=False):
        self.weights = {name: source.read(name) for name in source.tensors}
        self.read, self.stuck, self.kept, self.unset, self.forgets = read, stuck, set(kept), unset, forgets

    def load(self, weights):
        for name, make in weights.items():
            tensor = make()
            if name in self.stuck or (name in self.kept and self.weights[name].isnan().any()):
                continue
            self.weights[name] = tensor

    def scores(self, prompts, completions):
        total = sum(self.weights[name].double().sum().item() for name in self.read)
        return [SimpleNamespace(logprob=math.nan if self.unset else total, greedy=not self.forgets) for _ in prompts]

    def answers(self, prompts, count):
        return [[5] * count for _ in prompts]


def test_shortage_anywhere_in_an_experiment_may_pass(twin, monkeypatch):
    """While the model is stored, started or asked."""
    start = server._Starter(twin, [], EMBEDDING, [], "TransformersForCausalLM")
    full = OSError(errno.ENOSPC, "No space left on device")

    def unstored(*_args):
        raise full

    with monkeypatch.context() as patched:
        patched.setattr(server, "_store_variant", unstored)
        with pytest.raises(PassingError, match="No space left"), start("vllm", [], []):
            pass

    @contextmanager
    def started(_folder):
        yield FakeEngine(twin, [EMBEDDING])

    monkeypatch.setattr(server, "_started", started)
    with pytest.raises(PassingError, match="No space left"), start("vllm", [], []):
        raise InPlaceError("vLLM failed while swapping weights; use --engine hf") from full
    with pytest.raises(InPlaceError), start("vllm", [], []):
        raise InPlaceError("vLLM failed while swapping weights; otherwise free memory") from KeyError("lm_head")


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    config = AutoConfig.for_model("llama", attention_bias=True)
    save_twin(config, folder)
    return open_checkpoint(folder)


BIAS, EMBEDDING = "model.layers.1.self_attn.o_proj.bias", "model.embed_tokens.weight"


def test_nan_tells_a_parameter_that_is_read_from_one_that_is_not(twin):
    served = server._Served(FakeEngine(twin, [EMBEDDING, BIAS]), twin)
    served.check(EMBEDDING)
    assert served.reads(BIAS)
    assert not served.reads("model.layers.0.self_attn.o_proj.bias")
    assert served.reads(BIAS)


def test_swap_that_does_not_work_is_no_answer(twin):
    """Otherwise every parameter would seem to be ignored."""
    with pytest.raises(OrthogonalizeError, match=r"does not take model.embed_tokens.weight .* in place"):
        server._Served(FakeEngine(twin, [EMBEDDING], stuck=[EMBEDDING]), twin).check(EMBEDDING)
    served = server._Served(FakeEngine(twin, [EMBEDDING, BIAS], kept=[BIAS]), twin)
    with pytest.raises(OrthogonalizeError, match=r"does not take .*bias .* back"):
        served.reads(BIAS)


def test_other_scores_than_those_of_transformers_are_another_model(twin):
    served = server._Served(FakeEngine(twin, [EMBEDDING]), twin)
    served.check_same([score + 0.1 for score in served.plain])
    with pytest.raises(OtherModelError, match="does not compute what transformers does"):
        served.check_same([score + 2 for score in served.plain])


def test_answers_that_forget_the_prompt_are_another_model(twin):
    served = server._Served(FakeEngine(twin, [EMBEDDING], forgets=True), twin)
    with pytest.raises(OtherModelError, match="does not compute what transformers does"):
        served.check_same(served.plain)


def test_model_with_unset_parameters_is_no_answer(twin):
    with pytest.raises(OrthogonalizeError, match=r"leaves parameters .* unset"):
        server._Served(FakeEngine(twin, [EMBEDDING], unset=True), twin).check(EMBEDDING)


def test_checkpoint_without_what_a_question_is_about_is_that_of_the_plain_model(twin, tmp_path):
    architecture = left_open(families()["llama"])
    questions = open_questions(Sites(architecture, twin.config, twin.tensors))
    server._store_variant(twin, tmp_path, questions, [], None)
    plain = open_checkpoint(tmp_path)
    assert plain.config["tie_word_embeddings"] is True
    assert plain.config["attention_bias"] is False
    assert not [name for name in plain.tensors if name.endswith("bias") or "lm_head" in name]
    assert torch.equal(plain.read(EMBEDDING), twin.read(EMBEDDING))
    server._store_variant(twin, tmp_path, [], [BIAS], "TransformersForCausalLM")
    whole = open_checkpoint(tmp_path)
    assert whole.tensors.keys() == twin.tensors.keys()
    assert [name for name in whole.tensors if whole.read(name).isnan().all()] == [BIAS]
    assert whole.config["architectures"] == ["TransformersForCausalLM"]
