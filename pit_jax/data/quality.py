"""A classifier of good and bad rows, trained on rows that a person has labelled (PIT appendix D, filter 2).

The paper fine-tunes a classifier, of which it says nothing more, on data that its authors inspected and sorted into
high and low quality. Here it is a logistic regression over hashed words: no language model, nothing to download, and a
few hundred labels will do. It sees which words and marks stand in prompt and answer and how long the answer is, not
whether the answer is right; so it finds what looks bad (remarks about the task, refusals, broken markup), and the rest
is left to self-verification. Its accuracy is measured on labelled rows that it has not learnt from.
"""

import hashlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pit_jax.data import sources
from pit_jax.data.sources import DataError
from pit_jax.data.synthetic import SURFACE_TOKEN, fit_logistic

NUM_BUCKETS = 4096
"""Of the hash: words that share one cannot be told apart."""

MIN_LABELS = 20
"""Fewer labelled rows are refused: an accuracy on a fifth of them would say nothing."""


class Labelled(NamedTuple):
    """A row that somebody has judged.

    Attributes:
      prompt: x.
      response: y.
      label: whether it is good.
    """

    prompt: str
    response: str
    label: bool


class Classifier(NamedTuple):
    """Weights, and how good they are.

    Attributes:
      weights: [NUM_BUCKETS + 1] float32, the last of the constant.
      accuracy: on held-out rows, where it lets through what it finds good with at least `min_quality`.
      majority: what always giving the label that is more frequent among the rows learnt from would have there.
      num_train: rows that it has learnt from.
      num_held_out: rows that it was measured on.
    """

    weights: np.ndarray
    accuracy: float
    majority: float
    num_train: int
    num_held_out: int


def read_labels(path: str | Path) -> list[Labelled]:
    """Rows {"prompt", "response", "label"}; label is true or 1 for good, false or 0 for bad.

    Raises:
      DataError: names line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file (--config.labels)")
    rows = []
    for line in sources.raw_lines(path):
        where = f"{path}, line {line.number}"
        row = sources.parse_object(line, where)
        label = row.get("label")
        if label not in (0, 1):  # True == 1
            raise DataError(f"{where}: label is {label!r}: write true (good) or false (bad), or delete the line")
        texts = (sources.string_field(row, field, where) for field in ("prompt", "response"))
        rows.append(Labelled(*texts, bool(label)))
    return rows


def features(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """[n, NUM_BUCKETS + 1] float32: which words the prompt has, which words and pairs the answer; last the constant.

    Without the constant rows have length 1, so that long answers do not weigh more.
    """
    x = np.zeros((len(prompts), NUM_BUCKETS + 1), np.float32)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        asked, said = (re.findall(SURFACE_TOKEN, text.lower()) for text in (prompt, response))
        names = [f"x {token}" for token in asked] + [f"y {token}" for token in said]
        names += [f"y {a} {b}" for a, b in zip(said, said[1:], strict=False)]
        names += [f"length {len(said).bit_length()}", f"upper {response.isupper()}"]
        buckets = sorted({zlib.crc32(name.encode("utf-8", "replace")) % NUM_BUCKETS for name in names})
        x[i, buckets] = len(buckets) ** -0.5
    x[:, -1] = 1
    return x


def train(rows: Sequence[Labelled], held_out: float, seed: int, min_quality: float = 0.5) -> Classifier:
    """Fits the classifier on a part of the rows and measures it on the others, with which it shares no prompt.

    Args:
      rows: labelled.
      held_out: share of the prompts that is measured on.
      seed: of the hash that prompts are ordered by.
      min_quality: the probability from which on a row counts as good.

    Raises:
      DataError: where there are too few rows, or one label only.
    """
    counts = [sum(row.label == label for row in rows) for label in (True, False)]
    if len(rows) < MIN_LABELS or not min(counts):
        raise DataError(
            f"the classifier has {counts[0]} good and {counts[1]} bad rows to learn from: at least {MIN_LABELS} rows, "
            "of both labels, are needed (--config.labels)"
        )
    order = sorted({row.prompt for row in rows}, key=lambda x: hashlib.sha256(f"{seed} {x}".encode()).digest())
    measured = set(order[: max(1, round(held_out * len(order)))])
    test = [row for row in rows if row.prompt in measured]
    learnt = [row for row in rows if row.prompt not in measured]
    if len({row.label for row in learnt}) < 2:
        raise DataError(f"{len(learnt)} rows are left to learn from, with one label only: label more (--config.labels)")
    signs = lambda part: np.array([1 if row.label else -1 for row in part], np.float32)  # noqa: E731
    inputs = lambda part: features([row.prompt for row in part], [row.response for row in part])  # noqa: E731
    x = inputs(learnt)
    used = x.any(axis=0)  # the other weights stay 0
    weights = np.zeros(x.shape[1], np.float32)
    weights[used] = fit_logistic(x[:, used], signs(learnt))
    found = probabilities(Classifier(weights, 0.0, 0.0, 0, 0), [r.prompt for r in test], [r.response for r in test])
    right = (found >= min_quality) == (signs(test) > 0)
    usual = signs(learnt).sum() >= 0
    return Classifier(weights, float(right.mean()), float(np.mean((signs(test) > 0) == usual)), len(learnt), len(test))


def probabilities(classifier: Classifier, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """[n] float64: how likely it finds each row to be good."""
    found = [np.zeros(0)]
    for start in range(0, len(prompts), 1024):  # bounds the memory of the features
        part = slice(start, start + 1024)
        found.append(1 / (1 + np.exp(-(features(prompts[part], responses[part]) @ classifier.weights).astype(float))))
    return np.concatenate(found)
