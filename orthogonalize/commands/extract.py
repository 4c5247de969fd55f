"""`extract`: from two prompt sets to directions, scored candidates and tried edits, in stages.

Each stage reads the output of the one before and writes its own: prompts (prompts.jsonl), activations
(activations.safetensors), directions (directions.safetensors), answers (tokens.json) and selection (candidates.json,
run.json, plots). A stage whose inputs are unchanged is kept; an interrupted stage is resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..architectures.schema import architecture_of, remembered
from ..checkpoints.settings_files import context_length
from ..core.files import fingerprint, write_atomically
from ..core.foreign import has
from ..core.journal import Journal
from ..core.locks import exclusive
from ..core.output_folders import RUN, check_run_folder
from ..core.progress import note, track
from ..data.chat import ChatFormat
from ..data.inventory import drop_too_long, inventory
from ..data.prompts import SIDES, SPLITS, Prompt, Side, Source, Split, split_preserved, split_prompts, texts_of
from ..data.refusals import LEAST_TOKENS
from ..data.thoughts import answer_texts
from ..directions.activation_store import FILE as ACTIVATIONS
from ..directions.activation_store import Recording
from ..directions.direction_set import Directions
from ..directions.fit import DirectionSettings, find_directions
from ..edits.fitting.fit import ANSWER_START
from ..evals.measures.check import AnswerCheck
from ..evals.measures.measured_prompts import measure_prompts, other_measures, read_phrases
from ..evals.measures.registry import AUTO, check_measure
from ..models.loading import choose_device, load_tokenizer
from ..selection.behaviour import MeasureInfo, keep_expected, load_readout, save_readout
from ..selection.candidates import Candidate, explain_ranking, rank
from ..selection.fits import TOKENS
from ..selection.own_answers import ANSWER_TOKENS, OwnAnswers
from ..selection.probes import probe_best
from ..selection.readers.base import Reader, Scored
from ..selection.readers.choose import choose_engine, open_reader
from ..selection.readers.direction_scoring import Places
from ..selection.readouts import Readout
from ..selection.run_folder import (
    Run,
    RunInfo,
    base_scores,
    load_preserved,
    load_prompt_file,
    load_run,
    package_versions,
    save_preserved,
    save_prompts,
    save_selection,
)
from ..selection.search.objectives import AnswerShares, Trial, why_none
from ..selection.search.try_edits import ValPrompts
from ..selection.settings import Settings
from ..selection.source import RunSource, read_source
from ..selection.stages import STAGES, Stage, StageBook


class _Extraction:
    """The stages; each reads the results of earlier stages from the run folder."""

    def __init__(self, source: RunSource, settings: Settings, out: Path) -> None:
        self.source, self.settings, self.out = source, settings, out
        self.book = StageBook(out)
        self.weights = source.checkpoint.fingerprint()
        self.architecture = architecture_of(source.checkpoint.config)
        self.layer_count = self.architecture.layers(source.checkpoint.config)
        self.tokenizer = load_tokenizer(source.folder, settings.trust_remote_code)
        self.chat = ChatFormat(
            self.tokenizer, settings.system, settings.template_arguments, settings.chat_template, settings.thinking
        )
        self.chat.check_template()
        self.encoded = fingerprint([self.chat.encode_all(texts) for texts in source.texts()])
        self.positions = tuple(self.chat.positions())
        self.places = Places.of(self.positions, self.layer_count, settings.positions, settings.layers)
        self.asked = settings.engine
        self.settings, self.why = choose_engine(source, settings)

    @cached_property
    def reader(self) -> Reader:
        """The model, opened by the engine of the settings when the first stage needs it."""
        if self.asked == "auto":
            note(f"engine: {self.settings.engine}, {self.why}")
        places = len(self.positions), self.layer_count + 1
        return open_reader(self.source, self.settings, self.chat, places, self.out, self.weights)

    def inputs(self, stage: Stage) -> dict[str, Any]:
        """The inputs of `stage`, including the fingerprint of the stage before it."""
        s = self.settings
        before = {}
        if stage != "prompts":
            previous = STAGES[STAGES.index(stage) - 1]
            before = {previous: fingerprint(self.inputs(previous))}
        match stage:
            case "prompts":
                texts = {
                    side: [(p.text, p.category, p.split) for p in prompts]
                    for side, prompts in self.source.prompts.items()
                }
                own: dict[str, Any] = {
                    "weights": self.weights,
                    "model's other files": self.source.checkpoint.settings_fingerprint(),
                    "versions": package_versions(),
                    "tokens": self.encoded,
                    **{side: fingerprint(rows) for side, rows in texts.items()},
                    **{name: getattr(s, name) for name in ("seed", "train", "val", "test", "system")},
                    "spare": s.counts("positive")["spare"],
                    "template_arguments": dict(s.template_arguments),
                    "chat_template": s.chat_template,
                    "behaviour_tokens": list(s.behaviour_tokens or []),
                    "filtered": s.filtered,
                    "dtype": str(s.dtype),
                }
                own |= {"measure": s.measure} if s.measure != AUTO else {}
                own |= {"wording": read_phrases(s.wording)} if s.wording is not None else {}
                if self.source.preserved:
                    kept = {name: fingerprint([p.text for p in each]) for name, each in self.source.preserved.items()}
                    own["preserve"] = kept
            case "activations":
                own_description = remembered(self.source.checkpoint.config)
                own = {"description": own_description.model_dump()} if own_description else {}
            case "directions":
                found = asdict(self._direction_settings)
                own = {"methods": found.pop("finders"), **found}  # stages.json calls the finders `methods`
            case "answers":
                own = {"wanted": s.trials > 0, "tokens": [ANSWER_START, ANSWER_TOKENS]}
                if s.trials and s.engine == "stream":  # which cuts answers short
                    own["engine"] = s.engine
                    if s.own_answers is not None:
                        own["own_answers"] = sha256(Path(s.own_answers).read_bytes()).hexdigest()
            case "selection":
                own = {name: getattr(s, name) for name in ("scored", "trials", "answers")}
                own |= {"scoring": list(s.scoring), "sensitive": self.source.sensitive, "goal": s.goal}
                own |= {"places": asdict(self.places), "enough": s.enough if s.engine == "hf" else 0}
                own |= {"answer_tokens": ANSWER_TOKENS, "confirm_tokens": LEAST_TOKENS}
                if self.source.preserved:
                    own["sensitive_preserved"] = self.source.sensitive_preserved
        return before | own

    @property
    def _direction_settings(self) -> DirectionSettings:
        s = self.settings
        return DirectionSettings(
            tuple(s.finders), s.max_rank, s.solver, s.classifier, s.seed, s.seeds, s.mean, s.orthogonal_to
        )

    def run(self, stage: Stage) -> None:
        """Run one stage and record it as done."""
        inputs = self.inputs(stage)
        (self.out / "run.json").unlink(missing_ok=True)  # until the selection is made again
        result = {
            "prompts": self._run_prompts,
            "activations": self._run_activations,
            "directions": self._run_directions,
            "answers": self._run_answers,
            "selection": self._run_selection,
        }[stage]()
        self.book.complete(stage, inputs, result)

    # prompts

    def _run_prompts(self) -> dict[str, Any]:
        """Split the prompts, learn the behaviour tokens, keep the prompts on which the model behaves as expected."""
        s = self.settings
        context = context_length(self.source.checkpoint.config)
        fitting = drop_too_long(self.source.prompts, self.chat.encode, context, self.source.files)
        prompts = [p for side, each in fitting.items() for p in split_prompts(each, s.seed, **s.counts(side))]
        sources = drop_too_long(self.source.preserved, self.chat.encode, context, self.source.files).items()
        preserved = [p for name, each in sources for p in split_preserved(name, each, s.seed, s.train, s.val, s.test)]
        journal = Journal(self.out / ".prompts.journal", self.inputs("prompts"))
        measured, prompts = measure_prompts(self.reader, self.tokenizer, self.chat, prompts, s, journal, preserved)
        kept, filtered = keep_expected(prompts, s.filtered)
        words = [self.tokenizer.decode([t]) for t in measured.tokens]
        note(*inventory(self.source.prompts, fitting, prompts, kept, s.counts("negative")).split("\n"))
        self.out.mkdir(parents=True, exist_ok=True)
        save_prompts(kept, self.out)
        save_readout(measured.readout, self.out)
        save_preserved(preserved, self.out)
        journal.close()
        return {
            "behaviour_tokens": measured.tokens,
            "behaviour_words": words,
            "filtered": filtered,
            "measure": measured.info.model_dump(),
        }

    # activations and directions

    def _ids(self, prompts: Sequence[Prompt], side: Side, split: Split) -> list[list[int]]:
        return self.chat.encode_all(texts_of(prompts, side, split))

    def _run_activations(self) -> dict[str, Any]:
        prompts = load_prompt_file(self.out)
        sets = {
            f"{side}.{split}": self._ids(prompts, side, split) for side in SIDES for split in SPLITS if split != "test"
        }
        sets |= {f"{side}.spare": sets[f"{side}.spare"][: self.settings.counts("positive")["spare"]] for side in SIDES}
        self.reader.record(sets, [self.inputs("activations"), str(self.reader.dtype)])
        return {"dtype": str(self.reader.dtype).removeprefix("torch.")}

    def _run_directions(self) -> dict[str, Any]:
        found = find_directions(
            Recording(self.out / ACTIVATIONS),
            self.positions,
            self.layer_count + 1,
            self._direction_settings,
            choose_device(self.settings.device),
            layer_norm=self.architecture.norms.kind == "layer",
        )
        found.save(self.out / "directions.safetensors")
        return {}

    # answers

    def _run_answers(self) -> dict[str, Any]:
        """The tokens that conditional edits are fitted to."""
        file = self.out / TOKENS
        if not self.settings.trials:
            file.unlink(missing_ok=True)
            return {}
        journal = Journal(self.out / ".answers.journal", self.inputs("answers"))
        own = OwnAnswers(self.chat, self.reader.answers, journal)
        tokens = own.fit_tokens(load_prompt_file(self.out), load_preserved(self.out))
        tokens.save(file)
        journal.close()
        return {"tokens": {name: each.count for name, each in tokens.sets.items()}}

    # selection

    def _run_selection(self) -> dict[str, Any]:
        directions = Directions.load(self.out / "directions.safetensors")
        prompts = load_prompt_file(self.out)
        journal = Journal(self.out / ".selection.journal", self.inputs("selection"))
        if journal.on_disk:
            note("selection: resuming an interrupted run")
        given = Scored(directions, self._readout, journal, self.places, self.settings.enough or None)
        candidates = self._score(prompts, given)
        probes = probe_best(Recording(self.out / ACTIVATIONS), directions, candidates)
        trials = self._try_edits(prompts, candidates, given)
        save_selection(candidates, trials, probes, self.out)
        info = self._info(prompts, directions, self._nothing_chosen(trials, prompts, journal))
        self._plot(Run(info, prompts, directions, candidates, trials, probes))
        write_atomically(self.out / "run.json", info.model_dump_json(indent=2) + "\n")
        journal.close()
        self.reader.close()
        return {}

    def _plot(self, run: Run) -> None:
        if not has("matplotlib"):
            note("no plots: matplotlib is not installed (`pip install 'orthogonalize[plots]'`)")
            return
        from ..reports.run_plots import plot_run

        plot_run(run, self.out)

    @property
    def _measure_info(self) -> MeasureInfo:
        return self.book.found.measure

    @property
    def _readout(self) -> Readout:
        return load_readout(self._measure_info, self.book.found.behaviour_tokens, self.out)

    @cached_property
    def _check(self) -> AnswerCheck:
        return AnswerCheck.of(self._measure_info, self.settings.device)

    def _score(self, prompts: list[Prompt], given: Scored) -> list[Candidate]:
        """Scored, filtered and ranked candidates of every finder."""
        positive, negative = (self._ids(prompts, side, "val")[: self.settings.scored] for side in SIDES)
        everywhere = "global" in self.settings.scoring
        finders = self.settings.finders
        ranked = rank(self.reader.score(positive, negative, finders, everywhere, given))
        note(*explain_ranking(ranked, finders))
        return ranked

    def _try_edits(self, prompts: list[Prompt], ranked: list[Candidate], given: Scored) -> list[Trial]:
        """Search whole edits on val prompts, and confirm the best by the answers of the edited model."""
        if not self.settings.trials:
            return []
        s = self.settings
        val = ValPrompts.of(self.chat, prompts, load_preserved(self.out), s.answers, s.goal == "strengthen")
        left = partial(self._left_in_answers, val.target_texts, val.target, given.journal)
        return self.reader.try_edits(s.trials, val, ranked, given, left)

    def _left_in_answers(self, texts: Sequence[str], ids: Sequence[Sequence[int]], journal: Journal) -> AnswerShares:
        """The shares of answers to prompts that are not as they should be, and that are degenerate."""
        with track("confirming by answers", len(ids), "prompts") as advance:
            answers = self.reader.answers([list(row) for row in ids], LEAST_TOKENS, advance)
        pairs = list(zip(texts, answer_texts(self.tokenizer, answers), strict=True))
        return self._check.shares(pairs, self.settings.goal == "strengthen", journal)

    def _nothing_chosen(self, trials: list[Trial], prompts: list[Prompt], journal: Journal) -> str | None:
        """Why no edit is chosen, and which other measures tell the two sides apart; None if one is."""
        reason = why_none(trials)
        if reason is not None:
            reason += other_measures(
                self.reader, self.tokenizer, self.chat, prompts, self.settings, journal, self._measure_info.name
            )
            note(f"no edit is chosen: {reason}")
        return reason

    def _info(self, prompts: list[Prompt], directions: Directions, nothing_chosen: str | None) -> RunInfo:
        return RunInfo(
            nothing_chosen=nothing_chosen,
            concept=self.source.concept,
            sources=dict(self.source.sources),
            thinking=self.settings.thinking,
            model=self.source.name,
            revision=self.source.revision,
            architecture=self.architecture.family,
            weights=self.weights,
            prompts={
                f"{side}.{split}": fingerprint(texts_of(prompts, side, split))
                for side in self.source.prompts
                for split in SPLITS
            },
            goal=self.settings.goal,
            sensitive=self.source.sensitive,
            sensitive_preserved=self.source.sensitive_preserved,
            system=self.settings.system,
            template_arguments=dict(self.settings.template_arguments),
            chat_template=self.settings.chat_template,
            layer_count=directions.layer_count,
            width=self.architecture.width(self.source.checkpoint.config),
            finders=list(self.settings.finders),
            position_tokens=[self.tokenizer.decode([token]) for token in self.chat.post_instruction_tokens()],
            base_score={side: mean.value for side, mean in base_scores(prompts).items()},
            base_score_ci95={side: mean.ci95 for side, mean in base_scores(prompts).items() if mean.ci95},
            seed=self.settings.seed,
            versions=package_versions(),
            **self.book.found.model_dump(),
        )


@exclusive
def extract(
    model: Path | str,
    out: Path | str,
    *,
    concept: str | None = None,
    positive: Source | None = None,
    negative: Source | None = None,
    column: str | None = None,
    hub_split: str = "train",
    data: Path | str | None = None,
    revision: str | None = None,
    settings: Settings | None = None,
    stage: Stage | None = None,
    force: bool = False,
    **changes: Any,
) -> Run | None:
    """Find where `model` represents a contrast, and which edit removes it at the least cost.

    Called again with the same arguments, it resumes an interrupted run, or returns the finished one.

    Args:
        model: a checkpoint folder, a Hub id or a .gguf file.
        out: the run folder to create or resume.
        concept: a named contrast; the alternative is `positive` and `negative`, two prompt sources or lists of texts.
        column, hub_split: the column and the dataset split that hold the prompts.
        data: a folder with local copies of a concept's public sets; by default they are read from the Hub.
        settings: everything else.
        stage: run only this stage; those before it must be done.
        force: redo the stages whose inputs changed (all of them if none did).
        changes: fields of `Settings`, such as `trials=0`; they take precedence over `settings`.

    Returns:
        The run, or None if a single stage leaves it unfinished.

    Raises:
        OrthogonalizeError: the model, the prompts, the settings or the output folder cannot be used.
    """
    settings = (settings or Settings()).with_changes(**changes)
    settings.check()
    check_measure(settings.measure)
    out, model = Path(out), str(model)
    check_run_folder(out, RUN)
    source = read_source(
        model, settings, concept_name=concept, positive=positive, negative=negative, column=column, hub_split=hub_split,
        data=data, revision=revision,
    )  # fmt: skip
    work = _Extraction(source, settings, out)
    stages = work.book.to_run(work.inputs, stage, force)
    for name in STAGES:
        if name in stages:
            work.run(name)
        elif stage in (None, name):
            note(f"{name}: unchanged, kept")
    return load_run(out) if work.book.unchanged("selection", work.inputs("selection")) else None
