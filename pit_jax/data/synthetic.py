"""Synthetic preference data: a prompt with several requirements, an answer that meets all, one that meets only some.

PIT's synthetic data (appendix D) come from a large model that is asked to write a text under a few instructions and is
then filtered. Here the same four columns (x, y_l, y_w, c) are drawn by a program, so that anybody can make them without
a model, and so that code (`pit_jax.data.verifier`) knows for any answer what it meets. The program differs from that
recipe on purpose:

- y_l fails as half-trained models fail: above all by a wrong or missing word (contains, hashtag, starts with, ends
  with, topic, avoids: 63% of the failures), then in its form (24%) and by counts off by one or two (13%). Had y_l only
  left requirements out, a reward model would learn to count tags and words and would be of no use once the policy has
  learnt the form.
- most pairs share a base text and differ in what fails and in what is added to either; the others have nothing but
  their requirements in common, so that a reward model has to read the prompt. `surface_baselines` measures what can be
  had without reading it.

A row depends only on (seed, stream, i), so that any slice can be made anywhere.
"""

import hashlib
import re
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from pit_jax.data import synthetic_answers as answers, synthetic_text as text_of
from pit_jax.data.synthetic_answers import integer, pick
from pit_jax.data.verifier import verify
from pit_jax.types import PreferenceExample, Requirement

STREAMS = {"folds": 0, "pretrain": 1, "selection": 2, "test": 3}
"""Independent row streams of one seed."""

ASK_WEIGHTS = (
    dict(contains=3.6, hashtag=2.6, starts_with=2.6, ends_with=2.4, avoids=1.0, hashtags=0.8)
    | dict(upper_case=1.2, lower_case=0.9, html_bold=0.8, html_italic=0.7, html_paragraph=0.6, markdown_bold=0.7)
    | dict(markdown_heading=0.7, quotes=0.8, json=0.7, parentheses=0.6, postscript=0.6, no_commas=0.7)
    | dict(exactly_words=0.9, at_most_words=0.8, sentences=0.8, bullets=0.8, numbered=0.7)
    | dict(exclamation=0.7, question=0.7)
)
"""How often a prompt asks for a kind; it always asks for the topic."""

FAILURE_WEIGHTS = dict.fromkeys(ASK_WEIGHTS, 0.8) | (
    dict(contains=2.5, hashtag=1.5, starts_with=3.5, ends_with=3.5, topic=0.5, avoids=1.8)
    | dict(exactly_words=3.0, at_most_words=2.0, sentences=2.0, bullets=1.0, numbered=1.0, hashtags=1.2)
)
"""How often y_l fails a kind, relative to the other kinds of its prompt."""

# A prompt asks for at most one kind of each group: together they contradict each other or blur what is counted.
_EXCLUSIVE = (
    {"upper_case", "lower_case"},
    {"upper_case", "json"},  # the key is lower case
    {"html_paragraph", "quotes", "json", "markdown_heading", "bullets", "numbered", "postscript"},
    {"html_bold", "markdown_bold"},
    {"html_italic", "markdown_bold"},
    {"html_paragraph", "markdown_bold"},
    {"exactly_words", "at_most_words", "sentences", "bullets", "numbered", "postscript"},
    {"exclamation", "question", "hashtag", "postscript"},
    {"exclamation", "question", "hashtags", "postscript"},
    {"ends_with", "hashtag", "postscript"},
    {"ends_with", "hashtags"},
    {"hashtag", "hashtags"},
    # Whether a key is a word, or a brace the last mark, is nothing to learn.
    *({"json", kind} for kind in ("exactly_words", "at_most_words", "sentences", "starts_with", "ends_with")),
    *({"json", kind} for kind in ("exclamation", "question")),
)
_CLASHES = {kind: set().union(*(g for g in _EXCLUSIVE if kind in g)) | {kind} for kind in ASK_WEIGHTS}
_WORD_KINDS = ("contains", "avoids", "starts_with", "ends_with", "hashtag")
_VALUES = dict(exactly_words=(5, 8), at_most_words=(5, 8), sentences=(2, 3), bullets=(2, 3)) | (
    dict(numbered=(2, 3), hashtags=(2, 3))
)  # smallest and largest

_MINIMAL_EDITS = 0.85  # share of pairs with one base text
# Answers to which something is added that nobody asked for, beyond what all drafts have. A failure more often takes a
# mark or a bank word away than it adds one; without more in y_l, counting them would tell y_w from y_l. With none in
# y_w, what nobody asked for would itself look like a failure, and a reward model would err on a policy's own answers.
_UNASKED_IN_REJECTED, _UNASKED_IN_CHOSEN = 0.4, 0.15

_KINDS, _SUMS = tuple(ASK_WEIGHTS), list(accumulate(ASK_WEIGHTS.values()))


def reflect(requirements: Sequence[Requirement], met: Sequence[bool]) -> str:
    """A reflection: each requirement, and whether an answer meets it (c of PIT appendix D).

    A requirement is named before it is judged, so that a model which writes this looks for it in the answer. What says
    how many are met must not come first: the judgements could then be had without reading the answer.

    Args:
      requirements: of the prompt, in its order.
      met: which of them the answer meets, from `verify`.

    Returns:
      "topic tea yes, #silver no."
    """
    named = [text_of.CLAUSES[r.kind].format(v=r.value) for r in requirements]
    return ", ".join(f"{name} {'yes' if ok else 'no'}" for name, ok in zip(named, met, strict=True)) + "."


def _draw_requirements(rng, topic: str) -> tuple[Requirement, ...]:
    """The topic, and one to three kinds that go together, with values."""
    size, kinds, closed = pick(rng, (1, 2, 2, 2, 3)), [], set()
    while len(kinds) < size:
        kind = _KINDS[bisect(_SUMS, rng.random() * _SUMS[-1])]
        if kind not in closed:
            kinds.append(kind)
            closed |= _CLASHES[kind]
    requirements, used = [Requirement("topic", topic)], set()
    for kind in kinds:
        value = ""
        if kind in _WORD_KINDS:
            value = answers.fresh_word(rng, used)
            used.add(value)
        elif kind in _VALUES:
            value = str(integer(rng, *_VALUES[kind]))
        elif kind == "json":
            value = pick(rng, text_of.JSON_KEYS)
        requirements.append(Requirement(kind, value))
    return tuple(requirements)


def _draw_failing(rng, kinds: Sequence[str], weights: dict[str, float]) -> set[str]:
    """Kinds that y_l is to fail: one in most rows, never all."""
    how = rng.random()
    count = min(1 if how < 0.6 else 2 if how < 0.9 else 3, len(kinds) - 1)
    chosen: set[str] = set()
    while len(chosen) < count:
        left = [k for k in kinds if k not in chosen and weights[k] > 0]
        if not left:
            break
        sums = list(accumulate(weights[k] for k in left))
        chosen.add(left[min(bisect(sums, rng.random() * sums[-1]), len(left) - 1)])
    return chosen


def _draw_row(rng, which: str, weights: dict[str, float]) -> PreferenceExample:
    tasks = tuple(text_of.TASKS)
    while True:
        task, topic = pick(rng, tasks), pick(rng, text_of.TOPICS)
        requirements = _draw_requirements(rng, topic)
        needs = {r.kind: r.value for r in requirements}
        used = {needs[k] for k in _WORD_KINDS if k in needs}
        asked = answers.Asked(rng, needs, used)
        draft = answers.compose(rng, task, topic, needs, used)
        failing = _draw_failing(rng, tuple(needs), weights)
        if draft is None or not failing:
            continue
        minimal = rng.random() < _MINIMAL_EDITS
        better = draft.copy()
        if rng.random() < _UNASKED_IN_CHOSEN:
            answers.add_unasked(rng, better, needs, used)
        chosen = answers.render(better)
        assert all(verify(requirements, chosen)), (requirements, chosen)
        for _ in range(6):
            worse = draft.copy() if minimal else answers.compose(rng, task, topic, needs, used)
            if worse is None:
                continue
            for kind in sorted(failing, key=answers.FAULT_ORDER.get):
                answers.FAULTS[kind](worse, asked, needs[kind])
            if rng.random() < _UNASKED_IN_REJECTED:
                answers.add_unasked(rng, worse, needs, used)
            rejected = answers.render(worse)
            met = verify(requirements, rejected)
            if {r.kind for r, ok in zip(requirements, met, strict=True) if not ok} == failing:
                break
        else:
            continue
        a = text_of.TASKS[task][0]
        wordings = [pick(rng, text_of.phrasings(r.kind, which)).format(a=a, v=r.value) for r in requirements]
        return PreferenceExample(" ".join(wordings), rejected, chosen, reflect(requirements, met), requirements)


def generate(
    seed: int,
    start: int,
    stop: int,
    *,
    phrasings: str = "train",
    failure_weights: dict[str, float] | None = None,
    stream: int = 0,
) -> list[PreferenceExample]:
    """Rows start .. stop - 1 of a stream (PIT appendix D).

    Args:
      seed: of the data set.
      start: first row.
      stop: row after the last.
      phrasings: "train", or "test" for wordings of the requirements that "train" never uses.
      failure_weights: replaces entries of FAILURE_WEIGHTS; 0 means that y_l never fails this kind.
      stream: another number gives other rows of the same seed, see STREAMS.

    Returns:
      Rows in which `chosen` meets all requirements and `rejected` fails at least one and meets at least one. Row i
      depends only on seed, stream, i and the two options.

    Raises:
      ValueError: for unknown phrasings, kinds, or a negative weight.
    """
    text_of.phrasings("topic", phrasings)
    weights = {**FAILURE_WEIGHTS, **(failure_weights or {})}
    unknown = weights.keys() - FAILURE_WEIGHTS.keys()
    if unknown or min(weights.values()) < 0 or not max(weights.values()) > 0:
        raise ValueError(
            f"failure_weights must be >= 0, not all 0, for kinds of FAILURE_WEIGHTS; unknown: {sorted(unknown)}"
        )
    return [_draw_row(np.random.default_rng([seed, stream, i]), phrasings, weights) for i in range(start, stop)]


# Splits ---------------------------------------------------------------------------------------------------------------

_TASK_NAMES = {called: name for name, (called, _) in text_of.TASKS.items()}
_TASK_NAME = re.compile(r"\b(" + "|".join(map(re.escape, _TASK_NAMES)) + r")\b")


def combination(row: PreferenceExample) -> tuple[str, frozenset[Requirement]]:
    """(task, requirements with their values and so the topic): what a row asks for, without its wording.

    Raises:
      ValueError: where the prompt is not one of this module.
    """
    match = _TASK_NAME.search(row.prompt)
    if match is None:
        raise ValueError(f"no synthetic task in the prompt {row.prompt!r}")
    return _TASK_NAMES[match[1]], frozenset(row.requirements)


def split(rows: Sequence[PreferenceExample], num_folds: int = 3) -> list[list[PreferenceExample]]:
    """Cuts rows into folds of equal size (within one row), so that no prompt lies in two of them.

    Rows are sorted by a hash of their prompt; of rows with the same prompt only the first is kept. So the folds do not
    depend on the order in which different prompts come.

    Args:
      rows: to be cut.
      num_folds: how many folds; PIT uses one third each for SFT, reward model and RL (section 4.1).
    """
    first: dict[str, PreferenceExample] = {}
    for row in rows:
        first.setdefault(row.prompt, row)
    ordered = sorted(first.values(), key=lambda r: hashlib.sha256(r.prompt.encode()).digest())
    bounds = [len(ordered) * k // num_folds for k in range(num_folds + 1)]
    return [ordered[a:b] for a, b in pairwise(bounds)]


def make_splits(
    seed: int,
    size: int,
    num_selection: int = 128,
    num_test: int = 640,
    num_pretrain: int = 0,
    failure_weights: dict[str, float] | None = None,
) -> dict[str, list[PreferenceExample]]:
    """All splits of the synthetic data set.

    Args:
      seed: of all of them.
      size: rows over the three folds (13,000 in PIT appendix D).
      num_selection: rows for choosing checkpoints.
      num_test: rows for the final numbers, with phrasings that no other split has.
      num_pretrain: rows for writing pretraining text.
      failure_weights: see `generate`.

    Returns:
      sft, rm, rl (the folds), selection, test, pretrain. No prompt is twice in a split or in two splits, and no
      (task, topic, requirements) of selection or test is anywhere else.
    """
    prompts: set[str] = set()
    held_out: set[tuple[str, frozenset[Requirement]]] = set()

    def draw(name, count, holds_out=False):
        rows, start = [], 0
        while len(rows) < count:
            stop = start + count - len(rows)
            phrasings = "test" if name == "test" else "train"
            fresh = generate(
                *(seed, start, stop), phrasings=phrasings, failure_weights=failure_weights, stream=STREAMS[name]
            )
            start = stop
            for row in fresh:
                key = combination(row)
                if row.prompt not in prompts and key not in held_out:
                    rows.append(row)
                    prompts.add(row.prompt)
                    if holds_out:
                        held_out.add(key)
        return rows

    test, selection = draw("test", num_test, True), draw("selection", num_selection, True)
    sft, rm, rl = split(draw("folds", size))
    pretrain = draw("pretrain", num_pretrain)
    return {"sft": sft, "rm": rm, "rl": rl, "selection": selection, "test": test, "pretrain": pretrain}


# What can be had without reading the prompt ---------------------------------------------------------------------------

SURFACE_TOKEN = r"</?\w+>|\*\*|[^\W_]+|[^\w\s]|\n"
"""Tokens of the bag of words: tags, words, and each mark."""


def _size(text: str) -> tuple[float, float]:
    return len(text) / 10, len(text.split())


def fit_logistic(x: np.ndarray, y: np.ndarray, steps: int = 300, penalty: float = 1e-4) -> np.ndarray:
    """Weights [F] of a logistic regression without intercept, x [B, F], y [B] in {-1, 1}, by full-batch Adam."""
    w, m, v = (np.zeros(x.shape[1], np.float32) for _ in range(3))
    for step in range(1, steps + 1):
        gradient = -x.T @ (y / (1 + np.exp(np.clip(y * (x @ w), -30, 30)))) / len(y) + penalty * w
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        w -= 0.05 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
    return w


def surface_baselines(
    train_rows: Sequence[PreferenceExample], test_rows: Sequence[PreferenceExample], seed: int = 0
) -> dict[str, float]:
    """How well y_w is told from y_l by a linear model that sees only the two answers.

    A high number means that the data can be solved without reading the prompt, and so teach a reward model nothing.

    Args:
      train_rows: pairs to fit.
      test_rows: other pairs.
      seed: of the random flips of pairs.

    Returns:
      Accuracies on test_rows: bag_of_words (logistic regression on differences of token counts), length (on differences
      of the number of characters and of words).
    """
    vocabulary: dict[str, int] = {}
    rng = np.random.default_rng([seed, 0])

    def counts(text, grow):
        out: dict[int, int] = {}
        for token in re.findall(SURFACE_TOKEN, text):
            i = vocabulary.setdefault(token, len(vocabulary)) if grow else vocabulary.get(token)
            if i is not None:
                out[i] = out.get(i, 0) + 1
        return out

    def features(rows, grow):
        tokens = [(counts(r.chosen, grow), counts(r.rejected, grow)) for r in rows]
        bags = np.zeros((len(rows), len(vocabulary)), np.float32)
        for b, (chosen, rejected) in enumerate(tokens):
            for i, n in chosen.items():
                bags[b, i] += n
            for i, n in rejected.items():
                bags[b, i] -= n
        lengths = np.array([np.subtract(_size(r.chosen), _size(r.rejected)) for r in rows], np.float32)
        flips = np.where(rng.random(len(rows)) < 0.5, -1, 1).astype(np.float32)
        return {"bag_of_words": bags * flips[:, None], "length": lengths * flips[:, None]}, flips

    (train_x, train_y), (test_x, test_y) = features(train_rows, True), features(test_rows, False)
    out = {}
    for name in train_x:
        margin = test_y * (test_x[name] @ fit_logistic(train_x[name], train_y))
        out[name] = float(np.mean((margin > 0) + 0.5 * (margin == 0)))
    return out
