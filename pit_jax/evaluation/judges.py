"""Judges behind one protocol: who wins each prompt, of two sets of answers (PIT section 4.3).

A judge that scores answers one by one (the verifier, a reward model) compares scores; one that looks at pairs (R_PIT, a
language model, people) sees each pair in both orders, or in a shuffled one. What a judge has said is kept on disk.
"""

import functools
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pit_jax import client
from pit_jax.data import verifier
from pit_jax.evaluation import hf_reward, human, llm_judge, store, win_rate
from pit_jax.evaluation.store import AnswerSet, Spec
from pit_jax.evaluation.win_rate import Verdicts
from pit_jax.files import read_json
from pit_jax.pipelines import common, pit
from pit_jax.pipelines.common import Context
from pit_jax.types import PreferenceExample

TIE_BAND = (0.45, 0.55)
"""sigma(r1 - r2) within it is a tie for a reward model (section 4.4)."""


class Judge(NamedTuple):
    """One who compares sets of answers to the same prompts.

    Attributes:
      name: in tables.
      compare: (first, second) -> Verdicts; swapping the two changes the sign of each outcome and nothing else.
      scores: answers -> [n] float64; None where the judge looks at pairs only.
      details: (first, second) -> all that it said of pairs; None where it scores answers one by one.
      comparisons: names of the comparisons of Tables 1 and 2 that it judges, and none elsewhere; None: all, everywhere.
    """

    name: str
    compare: Callable[[AnswerSet, AnswerSet], Verdicts]
    scores: Callable[[AnswerSet], np.ndarray] | None = None
    details: Callable[[AnswerSet, AnswerSet], dict[str, Any]] | None = None
    comparisons: tuple[str, ...] | None = None


def by_scores(
    name: str,
    root: Path,
    spec: Spec,
    score: Callable[[AnswerSet], Sequence[float]],
    tie_band: tuple[float, float] | None,
) -> Judge:
    """A judge that compares scores.

    Args:
      name: of the judge.
      root: folder of the scores of a split.
      spec: what the judge is made from.
      score: of each answer of a set.
      tie_band: see `win_rate.compare`.
    """
    known: dict[str, np.ndarray] = {}

    def scores(answers: AnswerSet) -> np.ndarray:
        if answers.name not in known:
            of = spec | {"answers": store.digest(answers.spec)}
            make = lambda: {"scores": [float(x) for x in score(answers)]}  # noqa: E731
            path = root / name / f"{answers.name}.json"
            known[answers.name] = np.asarray(store.values(path, of, make)["scores"])
        return known[answers.name]

    def compare(first: AnswerSet, second: AnswerSet) -> Verdicts:
        outcome = win_rate.compare(scores(first), scores(second), tie_band=tie_band)
        return Verdicts(outcome, *np.ones((2, *outcome.shape), np.bool_))

    return Judge(name, compare, scores)


def by_pairs(
    name: str,
    root: Path,
    spec: Spec,
    judge: Callable[[AnswerSet, AnswerSet], dict[str, Any]],
    comparisons: tuple[str, ...] | None = None,
) -> Judge:
    """A judge that looks at pairs; its verdicts on (b, a) are those on (a, b) with the other sign.

    Args:
      name: of the judge.
      root: folder of the verdicts of a split.
      spec: what the judge is made from.
      judge: (first, second) -> {"outcome": 1, 0, -1 or None for each of the first prompts, as many as were asked, and
        whatever else is worth keeping}.
      comparisons: see `Judge`.
    """

    @functools.cache
    def read(first_name: str, second_name: str) -> tuple[dict[str, Any], int]:
        """What is kept, and whether it is of the pair the other way round; asked once, also where it is incomplete."""
        first, second = sets[first_name], sets[second_name]
        path = lambda a, b: root / name / f"{a.name}_vs_{b.name}.json"  # noqa: E731
        of = lambda a, b: spec | {"first": store.digest(a.spec), "second": store.digest(b.spec)}  # noqa: E731
        if not path(first, second).exists() and path(second, first).exists():
            return store.values(path(second, first), of(second, first), lambda: judge(second, first)), -1
        return store.values(path(first, second), of(first, second), lambda: judge(first, second)), 1

    sets: dict[str, AnswerSet] = {}

    def look(first: AnswerSet, second: AnswerSet) -> tuple[dict[str, Any], int]:
        sets.update({first.name: first, second.name: second})
        return read(first.name, second.name)

    def compare(first: AnswerSet, second: AnswerSet) -> Verdicts:
        found, sign = look(first, second)
        outcome = [*found["outcome"], *[None] * (len(first.steps) - len(found["outcome"]))]
        asked = np.arange(len(outcome)) < len(found["outcome"])
        mask = np.asarray([x is not None for x in outcome], np.bool_)
        return Verdicts(np.asarray([sign * (x or 0) for x in outcome], np.int8), mask, asked)

    return Judge(name, compare, None, lambda first, second: look(first, second)[0], comparisons)


# ----------------------------------------------------------------------------------------------------------- our judges


def verifier_judge(root: Path, rows: Sequence[PreferenceExample]) -> Judge:
    """The share of requirements that an answer meets."""
    requirements = [[[r.kind, r.value] for r in row.requirements] for row in rows]

    def score(answers: AnswerSet) -> list[float]:
        return [verifier.share_met(row.requirements, y) for row, y in zip(rows, answers.texts, strict=True)]

    return by_scores("verifier", root, {"judge": "verifier", "requirements": store.digest(requirements)}, score, None)


def reward_model_judge(context: Context, name: str, root: Path, rows: Sequence[PreferenceExample]) -> Judge:
    """R_P, or the evaluator, which was trained on all folds and is used for nothing else."""
    e = context.encoder

    def score(answers: AnswerSet) -> np.ndarray:
        groups = [
            [[*e.policy_prompt(row.prompt), *y, e.tokenizer.eos_id]] for row, y in zip(rows, answers.ids, strict=True)
        ]
        model = common.model_of(context, name), common.load_model(context, name)
        return common.score_groups(*model, groups, batch_size=256)[:, 0]

    return by_scores(name, root, {"judge": name, "model": context.workdir.model_digest(name)}, score, TIE_BAND)


def gap_judge(context: Context, root: Path, rows: Sequence[PreferenceExample]) -> Judge:
    """R_PIT, asked in both orders: y_1 is better where r_gap(x, y_1, y_2) > r_gap(x, y_2, y_1) (appendix G)."""

    score = functools.cache(lambda: pit.gap_scorer(context))

    def judge(first: AnswerSet, second: AnswerSet) -> dict[str, Any]:
        sides = zip(rows, first.ids, second.ids, strict=True)
        triples = [triple for row, a, b in sides for triple in ((row.prompt, a, b), (row.prompt, b, a))]
        gaps = score()(triples, pairings=2).astype(np.float64)
        outcome = win_rate.compare(gaps[:, 0] / 2, gaps[:, 1] / 2, tie_band=TIE_BAND)
        return {"outcome": outcome.tolist(), "gap": gaps[:, 0].tolist(), "swapped_gap": gaps[:, 1].tolist()}

    digest = context.workdir.model_digest(pit.gap_stage(context.config))
    return by_pairs("r_pit", root, {"judge": "r_pit", "model": digest}, judge)


# ----------------------------------------------------------------------------------------------------- judges of others


def hf_judge(name_or_path: str, max_length: int | None = None) -> Callable[[Path, Sequence[PreferenceExample]], Judge]:
    """A reward model of Hugging Face; the paper's is OpenAssistant/reward-model-deberta-v3-large-v2 (section 4.3).

    Args:
      name_or_path: on the hub, or a folder.
      max_length: tokens that it reads; None: what it says itself.

    Returns:
      (folder of the scores of a split, its rows) -> the judge; the model is loaded at once, so that a wrong name is
      found before anything is generated.
    """
    model = hf_reward.load(name_or_path, max_length)
    name = "hf_" + re.sub(r"[^A-Za-z0-9._-]+", "_", name_or_path.rstrip("/").rsplit("/", 1)[-1])
    spec = {"judge": "hf_reward", "model": _identity(name_or_path), "max_length": max_length}

    def make(root: Path, rows: Sequence[PreferenceExample]) -> Judge:
        prompts = [row.prompt.strip() for row in rows]
        return by_scores(name, root, spec, lambda answers: hf_reward.score(model, prompts, answers.texts), TIE_BAND)

    return make


def _identity(name_or_path: str) -> Any:
    """What tells one model from another: the name on the hub, or the files of a folder as they were last written."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return name_or_path
    files = ((f.name, f.stat()) for f in sorted(folder.iterdir()) if f.is_file())
    return store.digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in files])


def language_model_judge(
    config: client.ClientConfig,
    template: str,
    root: Path,
    rows: Sequence[PreferenceExample],
    num_prompts: int,
    comparisons: tuple[str, ...],
) -> Judge:
    """A language model behind an OpenAI-compatible server, asked in both orders (appendix E.2).

    Args:
      config: server, model and how to ask it.
      template: text of the judge prompt.
      root: folder of the verdicts of a split.
      rows: prompts.
      num_prompts: how many of them are asked about, from the first on.
      comparisons: names of the comparisons that are asked about: calls cost money.
    """

    def judge(first: AnswerSet, second: AnswerSet) -> dict[str, Any]:
        asked = min(num_prompts, len(rows))
        texts = [row.prompt.strip() for row in rows[:asked]], first.texts[:asked], second.texts[:asked]
        description = f"{config.model}: {first.name} vs {second.name}"
        started = time.perf_counter()
        found = llm_judge.judge(config, template, *texts, description=description)
        outcome = [
            int(x) if there else None for x, there in zip(found.verdicts.outcome, found.verdicts.mask, strict=True)
        ]
        replies = [list(detail.replies) for detail in found.details]
        counts = found.counts | {"seconds": time.perf_counter() - started}
        return {"outcome": outcome, "counts": counts, "replies": replies, "incomplete": counts["failed_requests"]}

    spec = {"judge": "llm", "server": config.server_name or config.base_url, "model": config.model}
    spec |= {"temperature": config.temperature, "max_tokens": config.max_tokens}
    spec |= {"seed": config.seed, "extra": config.extra}
    spec |= {"template": store.digest(template), "prompts": num_prompts}
    return by_pairs("llm", root, spec, judge, comparisons)


def human_judge(root: Path) -> Judge | None:
    """People, by the sheets that they have filled in (appendix I); None where there are none.

    Args:
      root: folder of COMPARISON.json, what `evaluation.pit.write_sheet` keeps of a sheet, and of COMPARISON/*.json, the
        files that annotators have saved.
    """
    sheets = {path.stem: read_json(path) for path in sorted(root.glob("*.json"))}
    sheets = {name: kept for name, kept in sheets.items() if any((root / name).glob("*.json"))}
    by_sets = {tuple(kept["sets"]): name for name, kept in sheets.items()}

    def look(first: AnswerSet, second: AnswerSet) -> dict[str, Any]:
        name = by_sets[first.name, second.name]
        kept = sheets[name]
        if kept["specs"] != [store.digest(first.spec), store.digest(second.spec)]:
            raise ValueError(
                f"the answers have changed since the sheet of {name} was made: delete {root / name}.json and the "
                "folder of the same name, or go back to the models of the sheet"
            )
        exports = {path.name: read_json(path) for path in sorted((root / name).glob("*.json"))}
        return {"annotations": human.read_verdicts(kept["key"], exports), "prompts": kept["prompts"]}

    def compare(first: AnswerSet, second: AnswerSet) -> Verdicts:
        found = look(first, second)
        agreed = human.agreed(found["annotations"])
        verdicts = Verdicts(*(np.zeros(len(first.steps), dtype) for dtype in (np.int8, np.bool_, np.bool_)))
        for whole, part in zip(verdicts, agreed, strict=True):
            whole[found["prompts"]] = part
        return verdicts

    return Judge("human", compare, None, look, tuple(sheets)) if sheets else None
