"""One evaluation: rows, answers, judges, and what is written of them. PIT and SRT hand in their tables as a `System`.

Answers, scores and verdicts come from files below WORKDIR/evaluation, or are made and left there; the numbers are then
functions of these files alone.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pit_jax.data import verifier
from pit_jax.evaluation import figures, human, report, store, tables, win_rate
from pit_jax.evaluation.answers import Maker
from pit_jax.evaluation.judges import Judge
from pit_jax.evaluation.store import AnswerSet
from pit_jax.evaluation.win_rate import Verdicts
from pit_jax.files import read_json, write_json_atomic, write_text_atomic
from pit_jax.pipelines import common, improve
from pit_jax.pipelines.common import Context


class System(NamedTuple):
    """What PIT and SRT evaluate, and how.

    Attributes:
      tables: name -> (evaluation) -> its part of results.json, in the order in which they are made.
      judges: names of the run's own judges.
      usual_judges: those that are asked where none is named.
      main_comparisons: those that judges are asked about whose calls cost money.
      needs: (config) -> stages that must be done.
      make_judge: (context, name, maker) -> the judge, or None where the rows have nothing for it.
      truth: (context) -> name of the judge that others are measured by.
      comparisons: name -> (first, second) sets of answers.
      original: name of the set that is improved.
      shown: (label, name) of sets whose samples are printed, each made of the one before.
      repeated: iterations of it, NAME_iteration_K, are compared with the original too.
      chains: (evaluation) -> method -> names of y_0, y_1, ..., those that were made.
      stages: (config) -> names of all stages that may be done, with arms.
    """

    tables: Mapping[str, Callable[["Evaluation"], dict]]
    judges: tuple[str, ...]
    usual_judges: tuple[str, ...]
    main_comparisons: tuple[str, ...]
    needs: Callable[[Any], list[str]]
    make_judge: Callable[[Context, str, Maker], Judge | None]
    truth: Callable[["Evaluation"], str]
    comparisons: Mapping[str, tuple[str, str]]
    original: str
    shown: tuple[tuple[str, str], ...]
    repeated: str
    chains: Callable[["Evaluation"], dict[str, list[str]]]
    stages: Callable[[Any], list[str]]

    def pairs(self, names: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Comparison name -> (first, second) answers; those whose answers exist."""
        later = {f"{n}_vs_{self.original}": (n, self.original) for n in names if n.startswith(f"{self.repeated}_it")}
        return {name: pair for name, pair in (self.comparisons | later).items() if set(pair) <= set(names)}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is evaluated; sampling settings are in config.evaluation.

    Attributes:
      tables: names of tables; empty: those that training ends with.
      judges: names of the run's own judges; the verifier is left out where the data have no requirements.
      num_iterations: K of Algorithm 2; 0: that of the config.
      temperatures: of sweeps.
      num_shuffles: orders of the comparisons for Elo.
    """

    tables: tuple[str, ...] = ("win_rates", "agreement")
    judges: tuple[str, ...] = ("verifier", "evaluator")
    num_iterations: int = 0
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    num_shuffles: int = 100

    def __post_init__(self):
        if self.num_iterations < 0:
            raise ValueError(f"--iterations={self.num_iterations}: not below 0")
        if any(t < 0 for t in self.temperatures):
            raise ValueError(f"--temperatures={self.temperatures}: not below 0")

    def check(self, system: System) -> None:
        """Raises ValueError where a table or a judge is not one of the system's."""
        for field, known in (("tables", tuple(system.tables)), ("judges", system.judges)):
            for name in getattr(self, field):
                if name not in known:
                    raise ValueError(f"--{field} names {name!r}: use {', '.join(known)}")
            if not getattr(self, field):
                raise ValueError(f"--{field} is empty: use {', '.join(known)}")


MoreJudges = Callable[[Maker], list[Judge]]
"""Judges of the answers to the test prompts that are not the run's own."""


class Evaluation:
    """Everything that the tables read: rows, answers, judges."""

    def __init__(self, system: System, context: Context, options: Options, more_judges: MoreJudges | None = None):
        options.check(system)
        self.system, self.context, self.options = system, context, options
        self.rows = context.rows["test"][: context.config.evaluation.num_prompts]
        self.maker = Maker(context, "test", self.rows)
        self.selection = Maker(context, "selection", context.rows["selection"])
        self.judges = self._own_judges(options.judges, self.maker)
        self.judges += more_judges(self.maker) if more_judges else []
        if not self.judges_of_all:  # the verifier alone was named, and the data have no requirements
            self.judges.insert(0, self.truth)
        self.details: dict[str, list[dict]] = {}
        self.num_iterations = options.num_iterations or context.config.evaluation.num_iterations

    @property
    def verifiable(self) -> bool:
        """Whether the rows say what they ask for."""
        return bool(self.rows[0].requirements)

    def _own_judges(self, names: Sequence[str], maker: Maker) -> list[Judge]:
        made = (self.system.make_judge(self.context, name, maker) for name in names)
        return [judge for judge in made if judge is not None]

    @functools.cached_property
    def truth(self) -> Judge:
        """The judge that stop rules are measured by: the verifier, or another where there is none."""
        return self.truth_of(self.maker)

    def truth_of(self, maker: Maker) -> Judge:
        """The same, of another split."""
        return self.system.make_judge(self.context, self.system.truth(self), maker)

    @property
    def judges_of_all(self) -> list[Judge]:
        """Those that are asked about everything."""
        return [judge for judge in self.judges if judge.comparisons is None]

    def compare(self, judge: Judge, first: str, second: str) -> dict:
        """win, lose, tie, delta and its interval over the prompts with a verdict; how many have none."""
        verdicts = judge.compare(self.maker[first], self.maker[second])
        if judge.details is not None:
            said = judge.details(self.maker[first], self.maker[second])
            self.details.setdefault(judge.name, []).extend([said["counts"]] if "counts" in said else [])
        config = self.context.config
        return summarize(verdicts, seed=config.seed, num_resamples=config.evaluation.num_resamples)


def summarize(verdicts: Verdicts, *, seed: int, num_resamples: int) -> dict:
    """`win_rate.summarize` over the prompts with a verdict; `no_verdict`: how many were asked about and have none."""
    counted = verdicts.outcome[verdicts.mask]
    lacking = int(np.sum(verdicts.asked & ~verdicts.mask))
    if not counted.size:
        return dict.fromkeys(("win", "lose", "tie", "delta", "low", "high")) | {"n": 0, "no_verdict": lacking}
    summary = win_rate.summarize(counted, seed=seed, num_resamples=num_resamples)
    return summary | ({"no_verdict": lacking} if lacking else {})


def write(run: Evaluation, command: str = "") -> None:
    """Samples, judges and writes results.json, tables.txt, CSV files, samples/test.jsonl and report/index.html.

    Args:
      run: what to evaluate.
      command: what the user typed, for the report.
    """
    started, context = time.perf_counter(), run.context
    models = {name: context.workdir.model_digest(name) for name in _model_stages(run)}
    form = improve.form_of(context)
    asked = [dataclasses.asdict(context.config.evaluation), form.pop("templates"), *([form] if form else [])]
    settings = store.digest(asked)
    earlier = _earlier(context.workdir.root, models, settings)
    results: dict[str, Any] = {"name": context.config.name, "seed": context.config.seed, "models": models}
    results |= {"temperature": context.config.evaluation.temperature, "settings": settings}
    for table, make in run.system.tables.items():
        if table in run.options.tables:
            print(f"  {table}", flush=True)
            found = make(run)
            for key, value in found.items():
                results[key] = results[key] | value if isinstance(results.get(key), dict) else value
    results["costs"] = costs(run)
    results |= {"judge_costs": found} if (found := judge_costs(run)) else {}
    results["commands"] = {"train": context.command} | ({"evaluate": command} if command else {})
    results["stages"] = _stage_records(run) | {"evaluate": {"steps": 0, "seconds": time.perf_counter() - started}}
    results = earlier | results | {key: earlier[key] | results.get(key, {}) for key in MERGED if key in earlier}
    there = results.get("comparisons", {})
    results["missing"] = {name: how for name, how in results.get("missing", {}).items() if name not in there}
    root = context.workdir.root
    samples = _with_earlier(sample_lines(run), root / "samples" / "test.jsonl" if earlier else None)
    write_text_atomic(root / "samples" / "test.jsonl", "".join(f"{store.line(sample)}\n" for sample in samples))
    write_json_atomic(root / "results.json", results)
    write_text_atomic(root / "tables.txt", tables.render(results) + "\n")
    shutil.rmtree(root / "tables", ignore_errors=True)  # of tables of other models
    tables.write_csv(results, root / "tables")
    _write_report(context, results, samples)
    _print_samples(run)


MERGED = ("comparisons", "answers", "costs", "missing")
"""Parts of results.json that several tables share: a table that is made again replaces its own lines of them."""


def _model_stages(run: Evaluation) -> list[str]:
    names, workdir = run.system.stages(run.context.config), run.context.workdir
    return [name for name in names if workdir.model(name).is_dir() and workdir.done(name) is not None]


def _earlier(root: Path, models: dict[str, str], settings: str) -> dict[str, Any]:
    """Tables of the same models and settings that were made before: those that are not asked for now stay."""
    path = root / "results.json"
    found = read_json(path) if path.exists() else {}
    had = found.get("models", {"": ""})  # an earlier version did not say
    # An arm that was trained since then adds to the tables and changes none.
    same = found.get("settings") == settings and all(models.get(name) == digest for name, digest in had.items())
    return found if same else {}


def _with_earlier(lines: list[dict], path: Path | None) -> list[dict]:
    """The samples, with answers and verdicts of tables that are not asked for now."""
    if path is None or not path.exists():
        return lines
    before = {line["prompt"]: line for line in map(json.loads, path.read_text("utf-8").split("\n")[:-1])}
    for line in lines:
        old = before.get(line["prompt"], {})
        for key in ("answers", "chains", "met", "feedback"):
            if key in line or key in old:
                line[key] = old.get(key, {}) | line.get(key, {})
        for key in ("scores", "verdicts"):
            both = old.get(key, {}), line[key]
            line[key] = {judge: both[0].get(judge, {}) | both[1].get(judge, {}) for judge in {**both[0], **both[1]}}
    return lines


def _write_report(context: Context, results: dict, samples: list[dict]) -> None:
    """report/index.html and report/*.svg; without figures where matplotlib is not installed."""
    folder = context.workdir.root / "report"
    shutil.rmtree(folder, ignore_errors=True)  # figures of other models
    try:
        drawn = figures.draw(results)
    except ImportError as error:
        print(f"  the report has no figures: {error}", flush=True)
        drawn = {}
    for name, svg in drawn.items():
        write_text_atomic(folder / f"{name}.svg", svg)
    config = dataclasses.asdict(context.config)
    write_text_atomic(folder / "index.html", report.render(results, config, samples, drawn))


def write_sheet(run: Evaluation, comparison: str, num_prompts: int) -> Path:
    """A blind sheet on which people compare two sets of answers (appendix I: 170 prompts, two annotators for each).

    Args:
      run: whose answers.
      comparison: such as "pit_vs_self_refine".
      num_prompts: chosen at random.

    Returns:
      The file. Which side is whose stays in evaluation/human.

    Raises:
      ValueError: for an unknown comparison, or one whose sheet has been handed out with other answers.
    """
    known = run.system.pairs(list(run.maker.sets))
    if comparison not in known:
        raise ValueError(f"the run has no answers for the sheet {comparison}: use one of {', '.join(known)}")
    first, second = (run.maker[name] for name in known[comparison])
    config, root = run.context.config, run.context.workdir.root
    rng = np.random.default_rng(common.seed_of(config, f"sheet/{comparison}"))
    prompts = sorted(rng.permutation(len(run.rows))[:num_prompts].tolist())
    pairs = [human.Pair(run.rows[i].prompt.strip(), first.texts[i], second.texts[i]) for i in prompts]
    seed, title = common.seed_of(config, f"sheet/{comparison}/sides"), "Which answer is better?"
    kept = {"key": human.key(pairs, seed, title), "prompts": prompts}
    kept |= {"sets": list(known[comparison]), "specs": [store.digest(made.spec) for made in (first, second)]}
    path = human_folder(root) / f"{comparison}.json"
    if path.exists() and read_json(path) != kept and any((path.parent / comparison).glob("*.json")):
        raise ValueError(
            f"{path.parent / comparison} has verdicts on another sheet of {comparison}: move it away first"
        )
    write_json_atomic(path, kept)
    sheet = root / "sheets" / f"{comparison}.html"
    write_text_atomic(sheet, human.sheet(pairs, seed, title))
    return sheet


def human_folder(root: Path) -> Path:
    """Where keys of sheets and verdicts of people are."""
    return root / "evaluation" / "human"


def add_verdicts(root: Path, exports: Sequence[str | Path]) -> None:
    """Takes files that annotators have saved into the workdir.

    Raises:
      ValueError: where a file is none, or no sheet of this workdir has its number.
    """
    folder = human_folder(root)
    keys = {path.stem: read_json(path)["key"] for path in folder.glob("*.json")}
    for export in exports:
        if not Path(export).is_file():
            raise ValueError(f"--verdicts={export}: no such file")
        content = read_json(export)
        sheet = content.get("sheet") if isinstance(content, dict) else None
        names = [name for name, key in keys.items() if key["sheet"] == sheet]
        if not names:
            raise ValueError(
                f"--verdicts={export} is of none of the sheets of this workdir ({', '.join(keys) or 'none'})"
            )
        for name in names:
            human.read_verdicts(keys[name], {str(export): content})
            others = {path: read_json(path) for path in (folder / name).glob("*.json")}
            same = [path for path, other in others.items() if human.same_annotator(other, content)]
            for path in same:  # who sends a sheet again takes the first one back
                path.unlink()
            # Annotators' names do not become names of files.
            write_json_atomic(folder / name / f"{store.digest(content)}.json", content)
            print(
                f"  {name}: verdicts of {1 + len(others) - len(same)} annotators; two must agree on a win", flush=True
            )


def answer_statistics(run: Evaluation, name: str) -> dict:
    """What a set of answers looks like.

    Returns:
      tokens: mean length; copy_rate: share of answers whose text is that of their own ref_response (None where there
      is none); ended: share with EOS; by the verifier share_met, and all_met: share of answers that meet everything;
      fixed and kept: the latter among the prompts whose Original fails something, and among the others.
    """
    mean = lambda values: float(np.mean(values)) if len(values) else None  # noqa: E731
    found = run.maker[name]
    statistics = {
        "tokens": mean([len(y) for y in found.ids]),
        "copy_rate": mean(copies(run, found)),
        "ended": mean([len(y) < run.context.config.data.response_window for y in found.ids]),
    }
    if run.verifiable:
        scores, original = (run.truth.scores(run.maker[n]) for n in (name, run.system.original))
        met, was_met = scores == 1.0, original == 1.0
        statistics |= {"share_met": mean(scores), "all_met": mean(met)}
        statistics |= {"fixed": mean(met[~was_met]), "kept": mean(met[was_met])}
    return statistics


def copies(run: Evaluation, found: AnswerSet) -> list[bool]:
    """Which answers equal the one that they improve; empty where they improve none."""
    if "of" not in found.spec:
        return []
    before = run.maker[found.spec["of"]].texts
    if found.spec["shuffled"]:
        before = [*before[1:], *before[:1]]
    return [y == ref for y, ref in zip(found.texts, before, strict=True)]


def costs(run: Evaluation) -> dict[str, dict]:
    """What each set of answers took."""
    found = {}
    for name, made in run.maker.sets.items():
        if made.spec["method"] not in ("chosen", "rejected"):
            total = lambda field: sum(getattr(step, field) for step in made.steps)  # noqa: E731, B023
            found[name] = {"seconds": made.seconds, "answers": len(made.steps)}
            found[name] |= {field: total(field) for field in ("read", "written", "scored")}
    return found


def judge_costs(run: Evaluation) -> dict[str, dict]:
    """What judges that count have counted, summed over comparisons; rates are means over comparisons."""
    found = {}
    for name, counts in run.details.items():
        if counts:
            keys = [key for key in counts[0] if key != "first_position_rate"]
            found[name] = {key: sum(count[key] for count in counts) for key in keys}
            rates = [count["first_position_rate"] for count in counts if count["first_position_rate"] is not None]
            found[name]["first_position_rate"] = sum(rates) / len(rates) if rates else None
    return found


def _stage_records(run: Evaluation) -> dict[str, dict]:
    """What each finished stage measured."""
    names, done = run.system.stages(run.context.config), run.context.workdir.done
    return {name: record for name in names if (record := done(name)) is not None}


def sample_lines(run: Evaluation) -> list[dict]:
    """One dict per test prompt: all answers, which improve which, and what each judge says of them."""
    sets = run.maker.sets
    scored = {judge.name: {n: judge.scores(made) for n, made in sets.items()} for judge in run.judges if judge.scores}
    chains = run.system.chains(run)
    original = run.system.original
    compared = {f"{n}_vs_{original}": (n, original) for names in chains.values() for n in names[1:]}
    compared |= run.system.pairs(list(sets))
    pairs = {name: (run.maker[a], run.maker[b]) for name, (a, b) in compared.items()}
    outcomes = {
        judge.name: {
            name: judge.compare(*sides)
            for name, sides in pairs.items()
            if judge.comparisons is None or name in judge.comparisons
        }
        for judge in run.judges
    }
    lines = []
    for i, row in enumerate(run.rows):
        verdict = lambda v: int(v.outcome[i]) if v.mask[i] else None  # noqa: E731, B023
        line = {
            "prompt": row.prompt,
            "requirements": [[r.kind, r.value] for r in row.requirements],
            "answers": {name: made.texts[i] for name, made in sets.items()},
            "chains": chains,
            "scores": {judge: {n: float(x[i]) for n, x in scores.items()} for judge, scores in scored.items()},
            "verdicts": {
                judge: {name: verdict(v) for name, v in by_pair.items() if v.asked[i]}
                for judge, by_pair in outcomes.items()
            },
        }
        if feedback := {name: made.steps[i].feedback for name, made in sets.items() if made.steps[i].feedback}:
            line["feedback"] = feedback
        if row.requirements:
            line["met"] = {n: list(verifier.verify(row.requirements, made.texts[i])) for n, made in sets.items()}
        lines.append(line)
    return lines


def _print_samples(run: Evaluation) -> None:
    """A few improved answers as they are, from evenly spaced prompts."""
    rows, sets = run.rows, run.maker.sets
    shown = [(label, sets[name]) for label, name in run.system.shown if name in sets]
    n = min(run.context.config.evaluation.show_samples, len(rows)) if len(shown) == len(run.system.shown) else 0
    for i in range(0, len(rows), max(1, len(rows) // max(n, 1)))[:n]:
        print(f"  prompt:   {rows[i].prompt}")
        for label, made in shown:
            met = ""
            if rows[i].requirements:
                checks = verifier.verify(rows[i].requirements, made.texts[i])
                met = f"  [{sum(checks)} of {len(checks)} met]"
            print(f"  {label}: {made.texts[i]!r}{met}")
        print(flush=True)
