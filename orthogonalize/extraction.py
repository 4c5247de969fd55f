"""`extract`: from two prompt sets to directions, scored candidates and tried edits, in stages.

Each stage reads what the one before wrote, and writes its own: prompts (prompts.jsonl), activations
(activations.safetensors), directions (directions.safetensors), selection (candidates.json, run.json, plots).
One whose inputs are unchanged is kept; one that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .activations import mean_activations
from .architectures import architecture_of
from .chat import ChatFormat
from .checkpoint import Checkpoint, open_checkpoint
from .contrast import DirectionSettings, find_directions
from .directions import Directions
from .errors import OrthogonalizeError
from .generation import generate, stop_tokens
from .models import choose_device, commit_of, find_model, load_model, load_tokenizer
from .nullspace import Classifier, Solver
from .outputs import RUN, check_run_folder
from .plots import plot_run
from .probes import Probe, probe_candidate
from .progress import note, track
from .prompts import MINIMUM_TRAIN, Prompt, Side, Split, check_contrast, concept, load_prompts, split_prompts
from .recording import FILE as ACTIVATIONS
from .recording import Recording, record
from .refusals import refused
from .run import Run, RunInfo, load_prompt_file, load_run, save_prompts, save_selection
from .scores import behaviour_score, first_token_probabilities, learn_behaviour_tokens
from .selection import Candidate, explain_fallback, rank, rank_correlation, score_candidates
from .stages import STAGES, Journal, Stage, StageBook, fingerprint, write_whole
from .trials import Trial, Trials

METHODS = ("dim", "inlp", "leace")
SCORINGS = ("local", "global")
SIDES: tuple[Side, ...] = ("positive", "negative")
SPLITS: tuple[Split, ...] = ("train", "val", "test", "spare")
ANSWER_TOKENS = 48  # of the base model's own answers, against which a tried edit's harm is measured
CONFIRM_TOKENS = 64
CONFIRMED = 0.05  # the most answers of a confirmed edit that may still refuse


@dataclass(frozen=True)
class Settings:
    """How `extract` works; the defaults are the reference's where it has them.

    `scored` is the most val prompts a side that score single directions (None is all of them); whole
    edits are tried on all positive ones, and on the model's own answers to `answers` negative ones.
    `trials` is how many edits; 0 skips that. `seeds` is how many draws of the prompts show how stable
    the directions are (1 shows nothing). `scoring` may add `global`: every candidate at every write.
    """

    methods: Sequence[str] = METHODS
    device: str = "auto"
    dtype: torch.dtype | None = None
    seed: int = 0
    seeds: int = 1
    train: int = 128
    val: int = 32
    test: int = 100
    system: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    chat_template: bool = True
    behaviour_tokens: Sequence[int | str] | None = None
    filtered: bool = True
    max_rank: int | None = None
    solver: Solver = "newton"
    classifier: Classifier = "logistic"
    scoring: Sequence[str] = ("local",)
    scored: int | None = None
    trials: int = 32
    answers: int = 32
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            OrthogonalizeError: naming the option.
        """
        if set(self.methods) - set(METHODS) or "dim" not in self.methods:
            raise OrthogonalizeError(
                f"--methods must name dim, and may add inlp and leace; got {','.join(self.methods)}"
            )
        if set(self.scoring) - set(SCORINGS) or "local" not in self.scoring:
            raise OrthogonalizeError(f"--scoring must name local, and may add global; got {','.join(self.scoring)}")
        if self.train < MINIMUM_TRAIN or self.val < 1 or self.test < 0 or self.seeds < 1:
            raise OrthogonalizeError(f"--train must be at least {MINIMUM_TRAIN}, --val and --seeds 1 and --test 0")
        if self.classifier == "svm" and self.solver != "sklearn":
            raise OrthogonalizeError("--classifier svm is scikit-learn's; give --solver sklearn with it")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("orthogonalize", "torch", "transformers", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def read_contrast(
    concept_name: str | None,
    positive: str | None,
    negative: str | None,
    column: str | None = None,
    hub_split: str = "train",
) -> tuple[list[Prompt], list[Prompt], bool]:
    """Both sides of a contrast, and whether its prompts are sensitive.

    Raises:
        OrthogonalizeError: neither a concept nor both sources are given, or they cannot be used.
    """
    if concept_name and not (positive or negative):
        named = concept(concept_name)
        sides = (
            load_prompts(named.positive, "positive", named.positive_column, named.hub_split),
            load_prompts(named.negative, "negative", named.negative_column, named.hub_split),
        )
        sensitive = named.sensitive
    elif positive and negative and not concept_name:
        sides = (
            load_prompts(positive, "positive", column, hub_split),
            load_prompts(negative, "negative", column, hub_split),
        )
        sensitive = False
    else:
        raise OrthogonalizeError("give either --concept, or both --positive and --negative")
    check_contrast(*sides)
    return *sides, sensitive


@dataclass(frozen=True)
class _Source:
    """The model and the contrast that a run is made from."""

    name: str
    folder: Path
    checkpoint: Checkpoint
    revision: str | None
    prompts: Mapping[Side, list[Prompt]]
    sensitive: bool


class _Extraction:
    """The stages, each as `inputs_of_…` and `run_…`; what a stage needs of earlier ones it reads from the folder."""

    def __init__(self, source: _Source, settings: Settings, out: Path) -> None:
        self.source, self.settings, self.out = source, settings, out
        self.book = StageBook(out)
        self.weights = source.checkpoint.fingerprint()
        self.architecture = architecture_of(source.checkpoint.config)
        self.layer_count = self.architecture.layers(source.checkpoint.config)
        self.tokenizer = load_tokenizer(source.folder, settings.trust_remote_code)
        self.chat = ChatFormat(self.tokenizer, settings.system, settings.template_arguments, settings.chat_template)
        self.positions = tuple(self.chat.positions())

    @cached_property
    def model(self) -> Any:
        """The model, loaded when the first stage needs it."""
        return load_model(
            self.source.folder, self.settings.device, self.settings.dtype, self.settings.trust_remote_code
        )

    def inputs(self, stage: Stage) -> dict[str, Any]:
        """What `stage` depends on, the fingerprint of the stage before included."""
        s = self.settings
        before = {}
        if stage != "prompts":
            previous = STAGES[STAGES.index(stage) - 1]
            before = {previous: fingerprint(self.inputs(previous))}
        match stage:
            case "prompts":
                texts = {side: [(p.text, p.category) for p in prompts] for side, prompts in self.source.prompts.items()}
                own: dict[str, Any] = {
                    "weights": self.weights,
                    "tokens": self.chat.encode("Why?"),  # any other template or tokenizer encodes otherwise
                    **{side: fingerprint(rows) for side, rows in texts.items()},
                    **{name: getattr(s, name) for name in ("seed", "train", "val", "test", "system")},
                    "spare": self._spare,
                    "template_arguments": dict(s.template_arguments),
                    "chat_template": s.chat_template,
                    "behaviour_tokens": list(s.behaviour_tokens or []),
                    "filtered": s.filtered,
                    "dtype": str(s.dtype),
                }
            case "activations":
                own = {}
            case "directions":
                own = asdict(self._direction_settings)
            case "selection":
                own = {"scoring": list(s.scoring), "scored": s.scored, "trials": s.trials, "answers": s.answers}
        return before | own

    @property
    def _spare(self) -> int:
        return self.settings.train if self.settings.seeds > 1 else 0

    @property
    def _direction_settings(self) -> DirectionSettings:
        s = self.settings
        return DirectionSettings(tuple(s.methods), s.max_rank, s.solver, s.classifier, s.seed, s.seeds)

    def run(self, stage: Stage) -> None:
        """Run one stage and record it as done."""
        inputs = self.inputs(stage)
        (self.out / "run.json").unlink(missing_ok=True)  # until the selection is made again
        result = {
            "prompts": self._run_prompts,
            "activations": self._run_activations,
            "directions": self._run_directions,
            "selection": self._run_selection,
        }[stage]()
        self.book.complete(stage, inputs, result)

    # prompts

    def _run_prompts(self) -> dict[str, Any]:
        """Split the prompts, learn the behaviour tokens, keep prompts on which the model behaves as it should."""
        s = self.settings
        counts = {"train": s.train, "val": s.val, "test": s.test, "spare": self._spare}
        prompts = [p for side in SIDES for p in split_prompts(self.source.prompts[side], s.seed, **counts)]
        tokens, prompts = self._measure_behaviour(prompts)
        kept, filtered = self._filter(prompts)
        words = [self.tokenizer.decode([t]) for t in tokens]
        note(f"behaviour tokens: {', '.join(map(repr, words))}")
        self.out.mkdir(parents=True, exist_ok=True)
        save_prompts(kept, self.out)
        return {"behaviour_tokens": tokens, "behaviour_words": words, "filtered": filtered}

    def _measure_behaviour(self, prompts: list[Prompt]) -> tuple[list[int], list[Prompt]]:
        """Behaviour tokens, learnt on train and val prompts or given; every prompt but the test ones gets its score."""
        used = [i for i, p in enumerate(prompts) if p.split != "test"]
        ids = self.chat.encode_all([prompts[i].text for i in used])
        with track("scoring prompts", len(used), "prompts") as advance:
            probabilities = first_token_probabilities(self.model, ids)
            advance(len(used))
        if not torch.isfinite(probabilities).all():
            mean_activations(self.model, ids, 1)  # names the layer, where it is one
            raise OrthogonalizeError("the model's outputs hold NaN or infinite values; the checkpoint is damaged")
        if self.settings.behaviour_tokens:
            tokens = [self._token(t) for t in self.settings.behaviour_tokens]
        else:
            rows = {side: [n for n, i in enumerate(used) if prompts[i].side == side and prompts[i].split != "spare"]
                    for side in SIDES}  # fmt: skip
            tokens = learn_behaviour_tokens(probabilities[rows["positive"]], probabilities[rows["negative"]])
        scored = list(prompts)
        for i, score in zip(used, behaviour_score(probabilities, tokens).tolist(), strict=True):
            scored[i] = replace(prompts[i], score=score)
        return tokens, scored

    def _token(self, token: int | str) -> int:
        if isinstance(token, int):
            if not 0 <= token < self.model.config.vocab_size:
                raise OrthogonalizeError(f"behaviour token {token} is no id of this model's vocabulary")
            return token
        ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise OrthogonalizeError(f"behaviour token {token!r} is {len(ids)} tokens for this model; it must be one")
        return int(ids[0])

    def _filter(self, prompts: list[Prompt]) -> tuple[list[Prompt], dict[str, dict[str, int]]]:
        """Keep train and val prompts on which the model behaves as their side says (design, section 5)."""
        kept = prompts
        if self.settings.filtered:
            kept = [p for p in prompts if p.score is None or (p.score > 0) == (p.side == "positive")]
        counts: dict[str, dict[str, int]] = {}
        for side in SIDES:
            for split in ("train", "val"):
                left = sum((p.side, p.split) == (side, split) for p in kept)
                given = sum((p.side, p.split) == (side, split) for p in prompts)
                counts.setdefault(side, {})[split] = left
                needed = MINIMUM_TRAIN if split == "train" else 1
                if left < needed:
                    verb = "shows" if side == "positive" else "lacks"
                    raise OrthogonalizeError(
                        f"of {given} {side} {split} prompts the model {verb} the behaviour on {left}, and at least "
                        f"{needed} are needed; give other prompts, --behaviour-tokens or --no-filter"
                    )
        return kept, counts

    # activations and directions

    def _ids(self, prompts: Sequence[Prompt], side: Side, split: Split) -> list[list[int]]:
        return self.chat.encode_all([p.text for p in prompts if (p.side, p.split) == (side, split)])

    def _run_activations(self) -> dict[str, Any]:
        prompts = load_prompt_file(self.out)
        sets = {
            f"{side}.{split}": self._ids(prompts, side, split) for side in SIDES for split in SPLITS if split != "test"
        }
        inputs = [self.inputs("activations"), str(self.model.dtype)]
        record(self.model, sets, len(self.positions), self.layer_count + 1, self.out, inputs)
        return {"dtype": str(self.model.dtype).removeprefix("torch.")}

    def _run_directions(self) -> dict[str, Any]:
        found = find_directions(
            Recording(self.out / ACTIVATIONS),
            self.positions,
            self.layer_count + 1,
            self._direction_settings,
            choose_device(self.settings.device),
        )
        found.save(self.out / "directions.safetensors")
        return {}

    # selection

    def _run_selection(self) -> dict[str, Any]:
        directions = Directions.load(self.out / "directions.safetensors")
        prompts, tokens = load_prompt_file(self.out), self.book.result("prompts")["behaviour_tokens"]
        journal = Journal(self.out / ".selection.journal", self.inputs("selection"))
        if journal.resumed:
            note("selection: going on where the last run was")
        candidates = self._score(prompts, directions, tokens, journal)
        probes = self._probe(directions, candidates)
        trials = self._try_edits(prompts, directions, candidates, tokens, journal)
        save_selection(candidates, trials, probes, self.out)
        info = self._info(prompts, directions)
        plot_run(Run(info, prompts, directions, candidates, trials, probes), self.out)
        write_whole(self.out / "run.json", info.model_dump_json(indent=2) + "\n")
        journal.close()
        return {}

    def _score(
        self, prompts: list[Prompt], directions: Directions, tokens: list[int], journal: Journal
    ) -> list[Candidate]:
        """Scored, filtered and ranked candidates of every method."""
        positive, negative = (self._ids(prompts, side, "val")[: self.settings.scored] for side in SIDES)
        everywhere = "global" in self.settings.scoring
        methods = self.settings.methods
        ranked = rank(
            score_candidates(self.model, positive, negative, directions, methods, tokens, everywhere, journal)
        )
        for method in methods:
            fallback = explain_fallback(ranked, method)
            if fallback:
                note(fallback)
            correlation = rank_correlation(ranked, method)
            if correlation is not None:
                note(f"{method}: local and global scores rank alike with Spearman's correlation {correlation:.2f}")
        return ranked

    def _probe(self, directions: Directions, ranked: list[Candidate]) -> list[Probe]:
        """Whether what each method's best candidate removes can still be read from the stream it was found in."""
        recording = Recording(self.out / ACTIVATIONS)
        best = {c.method: c for c in reversed(ranked)}
        return [p for c in best.values() for p in probe_candidate(recording, directions, c.method, c.position, c.layer)]

    def _try_edits(
        self,
        prompts: list[Prompt],
        directions: Directions,
        ranked: list[Candidate],
        tokens: list[int],
        journal: Journal,
    ) -> list[Trial]:
        """Search whole edits on val prompts, and confirm the best by what the model then answers."""
        if not self.settings.trials:
            return []
        negative = self._ids(prompts, "negative", "val")[: self.settings.answers]
        if "answers" not in journal:
            with track("the model's own answers", len(negative), "prompts") as advance:
                journal.put({"answers": self._generate(negative, ANSWER_TOKENS, advance)})
        answers = journal["answers"]
        kept = [i for i, answer in enumerate(answers) if answer]
        if not kept:
            note("the model answers nothing to the negative prompts, so no edit can be tried")
            return []
        positive = self._ids(prompts, "positive", "val")
        trials = Trials(
            self.model, directions, ranked, tokens, positive, [negative[i] for i in kept], [answers[i] for i in kept],
            journal,
        )  # fmt: skip
        return self._confirm(trials, trials.search(self.settings.trials), journal)

    def _generate(self, ids: list[list[int]], tokens: int, advance: Any) -> list[list[int]]:
        return generate(self.model, ids, tokens, stop_tokens(self.model, self.tokenizer), progress=advance)

    def _confirm(self, trials: Trials, found: list[Trial], journal: Journal, most: int = 4) -> list[Trial]:
        """Let the best trials answer; the first whose answers do not refuse goes to the front.

        Only where the unedited model's answers are refusals by wording can this be told.
        """
        if "refuses" not in journal:
            journal.put({"refuses": self._refusal_rate(trials.positive)})
        if journal["refuses"] < 0.5:
            return found
        confirmed: list[Trial] = []
        for trial in found[:most]:
            key = f"confirmed:{trial.choice.model_dump_json()}"
            if key not in journal:
                with trials.edited(trial.choice):
                    journal.put({key: self._refusal_rate(trials.positive)})
            confirmed.append(trial.model_copy(update={"confirmed": journal[key]}))
            if journal[key] <= CONFIRMED:
                break
        # Only the last can have passed; where none did, the one that leaves least comes first.
        confirmed.sort(key=lambda t: t.confirmed or 0.0)
        return [*confirmed, *found[len(confirmed) :]]

    def _refusal_rate(self, ids: Sequence[Sequence[int]]) -> float:
        with track("confirming by answers", len(ids), "prompts") as advance:
            answers = self._generate([list(row) for row in ids], CONFIRM_TOKENS, advance)
        return sum(refused(self.tokenizer.decode(a)) for a in answers) / len(answers)

    def _info(self, prompts: list[Prompt], directions: Directions) -> RunInfo:
        def texts(side: Side, split: Split) -> list[str]:
            return [p.text for p in prompts if (p.side, p.split) == (side, split)]

        base_score: dict[str, float] = {}
        for side in SIDES:
            scores = [p.score for p in prompts if (p.side, p.split) == (side, "val") and p.score is not None]
            base_score[side] = sum(scores) / len(scores)
        found = self.book.result("prompts")
        return RunInfo(
            model=self.source.name,
            revision=self.source.revision,
            architecture=self.architecture.family,
            weights=self.weights,
            prompts={f"{side}.{split}": fingerprint(texts(side, split)) for side in SIDES for split in SPLITS},
            sensitive=self.source.sensitive,
            system=self.settings.system,
            template_arguments=dict(self.settings.template_arguments),
            chat_template=self.settings.chat_template,
            layer_count=directions.layer_count,
            width=self.architecture.width(self.source.checkpoint.config),
            methods=list(self.settings.methods),
            base_score=base_score,
            seed=self.settings.seed,
            versions=_versions(),
            **found,
        )


def _plan(work: _Extraction, only: Stage | None, force: bool) -> list[Stage]:
    """The stages to run: those that are not done from the present inputs, and all after the first of them.

    Raises:
        OrthogonalizeError: a finished stage would have to be done over and nothing said so, or `only`
            lacks an earlier stage.
    """
    stale = [stage for stage in STAGES if not work.book.unchanged(stage, work.inputs(stage))]
    if only is not None:
        missing = [stage for stage in STAGES[: STAGES.index(only)] if stage in stale]
        if missing:
            raise OrthogonalizeError(
                f"--stage {only} needs stage {missing[0]!r} of {work.out} first, done with the same inputs; "
                "run that, or leave --stage out"
            )
        return [only] if only in stale or force else []
    if not stale:
        return list(STAGES) if force else []
    changed = work.book.changed_inputs(stale[0], work.inputs(stale[0]))
    if changed and not force:
        raise OrthogonalizeError(
            f"{work.out} exists and its stage {stale[0]!r} was done with another {', '.join(changed)}; "
            "--force does it over from there, or choose another --out"
        )
    return list(STAGES[STAGES.index(stale[0]) :])


def extract(
    model: str,
    out: Path | str,
    *,
    concept: str | None = None,
    positive: str | None = None,
    negative: str | None = None,
    column: str | None = None,
    hub_split: str = "train",
    revision: str | None = None,
    settings: Settings | None = None,
    stage: Stage | None = None,
    force: bool = False,
) -> Run | None:
    """Find where `model` represents a contrast, and which edit removes it at the least cost.

    Called again with the same arguments it goes on where it was, or finds all done.

    Args:
        model: a checkpoint folder, a Hub id or a .gguf file.
        out: the run folder to make or to go on with.
        concept: a named contrast; or `positive` and `negative`, two prompt sources.
        column, hub_split: which column and dataset split hold the prompts.
        settings: everything else.
        stage: run this one alone; those before it must be done.
        force: do stages over that were done with other inputs (all of them, if none was).

    Returns:
        The run, or None where a single stage leaves it unfinished.

    Raises:
        OrthogonalizeError: anything in model, prompts or output that cannot work.
    """
    settings = settings or Settings()
    settings.check()
    out = Path(out)
    check_run_folder(out, RUN)
    sides = read_contrast(concept, positive, negative, column, hub_split)
    folder = find_model(model, revision)
    source = _Source(
        str(model),
        folder,
        open_checkpoint(folder),
        commit_of(folder) or revision,
        {"positive": sides[0], "negative": sides[1]},
        sides[2],
    )
    work = _Extraction(source, settings, out)
    stages = _plan(work, stage, force)
    for name in STAGES:
        if name in stages:
            work.run(name)
        elif stage in (None, name):
            note(f"{name}: done before, unchanged")
    return load_run(out) if work.book.unchanged("selection", work.inputs("selection")) else None
