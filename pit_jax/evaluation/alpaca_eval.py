"""AlpacaEval 2 from files of annotations: win rate and length-controlled win rate (SRT Table 3 and section 4).

An annotation is one prompt: the baseline's answer is output_1, the model's output_2, and the preference is 1 where the
annotator is sure that the baseline is better, 2 where it is sure of the model, and between where it is not (Li et al.,
2023). Length-controlled win rates are those of Dubois et al. (2024): a logistic regression of the preference on length,
difficulty of the instruction and model, read off at equal lengths. Rates are in percent, lengths in characters.
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pit_jax.data.sources import DataError, raw_lines
from pit_jax.types import Array


class Annotations(NamedTuple):
    """A model's annotations, n in all, in the order of their file."""

    name: str
    """Of the model: generator_2."""
    baseline: str
    """generator_1."""
    preferences: np.ndarray
    """[n] in 1..2, NaN where the annotator gave none."""
    lengths: np.ndarray
    """[n], of the model's answers."""
    baseline_lengths: np.ndarray
    """[n], of the baseline's."""
    instructions: tuple[str, ...] | None
    """[n]; None for a table of numbers."""
    indices: np.ndarray | None
    """[n] int, where the instructions stand in the evaluation set; None where the file does not say."""


class Difficulty(NamedTuple):
    """How much better than the baseline models tend to be, by instruction of the evaluation set."""

    instructions: tuple[str, ...]
    values: np.ndarray
    """[instructions], in nats per unit of a model's weight."""


class Weights(NamedTuple):
    """Of the regression, one number per feature."""

    length: float
    difficulty: float
    bias: float


ANCHORS = np.array(
    [
        # length term, difficulty, preference in 0..1, weight
        [-0.860, -1.912, 0.4087, 14.536],
        [-0.875, 2.564, 0.8646, 11.130],
        [1.005, -0.799, 0.0200, 27.462],
        [-0.004, -3.864, 0.3604, 4.168],
        [-0.309, -1.981, 0.2736, 16.781],
        [-0.490, 1.297, 0.9751, 27.723],
        [0.814, 3.988, 0.5400, 1.610],
        [0.848, 0.468, 0.2523, 40.537],
    ]
)
"""Rows that hold the weights of length and difficulty near those of other models; they say nothing about the bias.

The leaderboard adds the annotations of gpt4_1106_preview told to be concise and told to be verbose: 1,610 rows of the
weight 0.1, its df_gamed.csv. Of their preferences only the sums of preference * feature matter, and at the published
weights of a model these sums must balance its own rows: all models agree on them to three digits or more. The eight
rows here have these sums and, to 0.05, the gradient of the 1,610 wherever published weights lie. They belong to the
baseline gpt4_1106_preview and the annotator weighted_alpaca_eval_gpt4_turbo; another baseline or annotator asks for
rows of its own, or None.
"""

PENALTY = 10 ** (-4 / 3)
"""Of the sum of |weight|. The leaderboard chooses it by cross-validation from 10^(-4..4) in steps of 10^(8/9).

Its choices show in the published weights: 0.36 for about half of the 39 models that were looked at, 0.046 for most
others. 0.046, which is fixed here, is at most 0.1 points of win rate away from what any of them gives.
"""


def read_annotations(path: Path | str) -> Annotations:
    """Annotations from AlpacaEval's JSON list, or from a CSV table with lengths instead of texts.

    Fields of the JSON rows: instruction, output_1, output_2, preference (null where there is none), generator_1,
    generator_2. Columns of the table: index, preference, len_output_1, len_output_2, generator_1, generator_2. 0 is the
    old way to write a draw, 1.5.

    Args:
      path: .json or .csv, as it is or as .gz or .xz.

    Raises:
      DataError: where the file cannot be read, or a field is missing or wrong; names the file, the row and the field.
    """
    path = Path(path)
    if ".csv" in path.suffixes:
        rows = _read_csv(path)
        lengths = [[_number(row, f"len_output_{i}", where) for where, row in rows] for i in (1, 2)]
        instructions = None
        indices = np.array([int(_number(row, "index", where)) for where, row in rows])
    else:
        rows = _read_json(path)
        lengths = [[float(len(_text(row, f"output_{i}", where))) for where, row in rows] for i in (1, 2)]
        instructions = tuple(_text(row, "instruction", where) for where, row in rows)
        indices = None
    names = []
    for field in ("generator_1", "generator_2"):
        found = list(dict.fromkeys(_text(row, field, where) for where, row in rows))
        if len(found) > 1:
            raise DataError(f"{path}: field {field!r} names {found[:3]}, but the annotations of one pair are asked for")
        names.append(found[0])
    return Annotations(
        name=names[1],
        baseline=names[0],
        preferences=np.array([_preference(row, where) for where, row in rows]),
        lengths=np.array(lengths[1]),
        baseline_lengths=np.array(lengths[0]),
        instructions=instructions,
        indices=indices,
    )


def read_difficulty(path: Path | str) -> Difficulty:
    """The evaluation set's difficulties from a JSON list of {index, instruction, instruction_difficulty}.

    Raises:
      DataError: where the file cannot be read, a field is missing or wrong, or the rows are not in order of the index.
    """
    rows = _read_json(Path(path))
    for i, (where, row) in enumerate(rows):
        if _number(row, "index", where) != i:
            raise DataError(f"{where}: field 'index' is {row['index']}, but the rows must be in order, from 0")
    return Difficulty(
        tuple(_text(row, "instruction", where) for where, row in rows),
        np.array([_number(row, "instruction_difficulty", where) for where, row in rows]),
    )


def read_weights(path: Path | str) -> dict[str, Weights]:
    """The leaderboard's published weights: a CSV table with a model's name and three numbers per row.

    Raises:
      DataError: where the file cannot be read, or a column is missing or no number.
    """
    columns = ("np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)")
    rows = _read_csv(Path(path))
    return {_text(row, "", where): Weights(*[_number(row, c, where) for c in columns]) for where, row in rows}


def difficulty_of(annotations: Annotations, difficulty: Difficulty, *, by_row: bool = False) -> np.ndarray:
    """The difficulty of each annotation's instruction.

    Args:
      annotations: with instructions or indices.
      difficulty: of the evaluation set.
      by_row: take the n-th difficulty for the n-th row, as the leaderboard does. This is wrong from the first missing
        row on in a file that lacks some, and is only meant to reproduce the published numbers of such models.

    Returns:
      [n] float64.

    Raises:
      ValueError: where an instruction is not in the evaluation set.
    """
    n = annotations.preferences.size
    if by_row:
        indices = np.arange(n)
    elif annotations.indices is not None:
        indices = annotations.indices
    else:
        where = {text: i for i, text in enumerate(difficulty.instructions)}
        unknown = [i for i, text in enumerate(annotations.instructions) if text not in where]
        if unknown:
            raise ValueError(
                f"annotations of {annotations.name}: {len(unknown)} instructions are not in the evaluation set, the "
                f"first in row {unknown[0]}: {annotations.instructions[unknown[0]][:60]!r}."
            )
        indices = np.array([where[text] for text in annotations.instructions])
    outside = np.flatnonzero((indices < 0) | (indices >= difficulty.values.size))
    if outside.size:
        raise ValueError(
            f"annotations of {annotations.name}: row {outside[0]} has the index {indices[outside[0]]}, but the "
            f"evaluation set has {difficulty.values.size} instructions."
        )
    return difficulty.values[indices]


def win_rate(annotations: Annotations) -> dict:
    """The leaderboard's numbers that need no regression.

    Returns:
      win_rate: 100 * mean(preference - 1).
      standard_error: of it.
      n_wins, n_wins_base, n_draws: preferences above, below and at 1.5.
      n_total: preferences in all; n_dropped: rows without one.
      discrete_win_rate: share of wins, a draw is half of one.
      avg_length: mean length of the model's answers, rounded down.

    Raises:
      ValueError: where no row has a preference.
    """
    p = _targets(annotations)
    p = p[~np.isnan(p)]
    wins, draws = int(np.sum(p > 0.5)), int(np.sum(p == 0.5))
    return {
        "win_rate": float(100 * p.mean()),
        "standard_error": _standard_error(100 * p),
        "n_wins": wins,
        "n_wins_base": p.size - wins - draws,
        "n_draws": draws,
        "n_total": p.size,
        "n_dropped": annotations.preferences.size - p.size,
        "discrete_win_rate": 100 * (wins + draws / 2) / p.size,
        "avg_length": int(annotations.lengths.mean()),
    }


def length_controlled(
    annotations: Annotations,
    difficulty: Array,
    *,
    anchors: Array | None = ANCHORS,
    penalty: float = PENALTY,
) -> dict:
    """Length-controlled win rate: fits the regression and predicts at equal lengths.

    P(model wins) = sigma(w_length * tanh(d / std(d)) + w_difficulty * difficulty + w_bias), with d the length of the
    baseline's answer minus that of the model's. Preferences are soft labels. Newton steps maximise the log-likelihood
    of the rows and of the anchors, less penalty * sum |w|.

    Measured on 39 models with published weights: at most 0.092 points from the leaderboard, median 0.010. What is left
    is the leaderboard's choice of the penalty: with the nearest of its ten values the most is 0.014 and the median
    0.001, the tolerance of its solver. Without anchors and penalty the most is 2.5 points, the median 0.9.

    Args:
      annotations: rows without a preference are left out of the fit, and predicted.
      difficulty: [n], from `difficulty_of`.
      anchors: [rows, 4] of length term, difficulty, preference in 0..1 and weight; None: no such rows.
      penalty: from 0.

    Returns:
      {"length_controlled_winrate", "lc_standard_error", "weights", "n_total", "n_dropped"}; weights is a dict by
      feature. A model that is the baseline has the weights 0 and the rate 50.

    Raises:
      ValueError: where no row has a preference, the shapes differ, an argument is out of its range, or the preferences
        have no finite weights (a model that always wins, with a penalty of 0).
    """
    p, difficulty = _targets(annotations), np.asarray(difficulty, np.float64)
    if difficulty.shape != p.shape:
        raise ValueError(f"difficulty has the shape {difficulty.shape}: one number for each of {p.size} annotations.")
    if not np.isfinite(difficulty).all():
        raise ValueError(f"the difficulty of row {np.flatnonzero(~np.isfinite(difficulty))[0]} is not a finite number.")
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"penalty={penalty} must be a number from 0.")
    used = ~np.isnan(p)
    weights = Weights(0.0, 0.0, 0.0)
    if annotations.name != annotations.baseline:
        differences = annotations.baseline_lengths - annotations.lengths
        spread = float(np.std(differences, ddof=1)) if p.size > 1 else 0.0
        lengths = np.tanh(differences / spread) if spread > 0 else np.zeros(p.size)
        features = np.stack([lengths, difficulty, np.ones(p.size)], axis=1)[used]
        targets, importance = p[used], np.ones(used.sum())
        if anchors is not None:
            anchors = _checked_anchors(anchors)
            features = np.concatenate([features, anchors[:, :2] @ np.eye(2, 3)])
            targets, importance = np.append(targets, anchors[:, 2]), np.append(importance, anchors[:, 3])
        weights = Weights(*map(float, _fit(features, targets, importance, penalty)))
    rate = length_controlled_from_weights(weights, difficulty)
    return rate | {"weights": weights._asdict(), "n_total": int(used.sum()), "n_dropped": int(p.size - used.sum())}


def length_controlled_from_weights(weights: Weights, difficulty: Array, *, baseline: Weights | None = None) -> dict:
    """100 * mean sigma(w_bias + w_difficulty * difficulty), the win rate at equal lengths.

    Args:
      weights: of the model.
      difficulty: [n], of the instructions.
      baseline: weights of the model to compare with; None: gpt4_1106_preview, whose weights are 0.

    Returns:
      {"length_controlled_winrate", "lc_standard_error"}; the error is the leaderboard's, over instructions, and leaves
      out that the weights are themselves estimates.
    """
    difficulty = np.asarray(difficulty, np.float64)
    baseline = baseline or Weights(0.0, 0.0, 0.0)
    logits = weights.bias - baseline.bias + (weights.difficulty - baseline.difficulty) * difficulty
    p = 100 * np.exp(-np.logaddexp(0, -logits))
    return {"length_controlled_winrate": float(p.mean()), "lc_standard_error": _standard_error(p)}


def _fit(features: np.ndarray, targets: np.ndarray, importance: np.ndarray, penalty: float) -> np.ndarray:
    """Minimises the weighted cross-entropy of soft labels + penalty * sum |w|: convex, and solved to 1e-10."""
    w = np.zeros(features.shape[1])

    def objective(w):
        logits = features @ w
        return float(importance @ (np.logaddexp(0, logits) - targets * logits) + penalty * np.abs(w).sum())

    for _ in range(100):
        p = np.exp(-np.logaddexp(0, -(features @ w)))
        gradient = features.T @ (importance * (p - targets))
        hessian = (features * (importance * p * (1 - p))[:, None]).T @ features
        if np.linalg.cond(hessian) > 1e12:
            break
        step = _penalised_step(gradient, hessian, w, penalty)
        size, value = 1.0, objective(w)
        while objective(w + size * step) > value + 1e-12 * abs(value) and size > 1e-9:
            size /= 2
        w = w + size * step
        if np.abs(step).max() < 1e-10:
            return w
    raise ValueError(
        "the preferences have no finite weights: the model always wins or loses, or difficulty or lengths do not vary. "
        "Give anchors and a penalty above 0."
    )


def _penalised_step(gradient: np.ndarray, hessian: np.ndarray, w: np.ndarray, penalty: float) -> np.ndarray:
    """The minimum of the quadratic model + penalty * sum |w + step|, one coordinate after the other."""
    new = w.copy()
    for _ in range(10_000):
        before = new.copy()
        for j in range(w.size):
            slope = gradient[j] + hessian[j] @ (new - w) - hessian[j, j] * new[j]
            new[j] = -np.sign(slope) * max(abs(slope) - penalty, 0.0) / hessian[j, j]
        if np.abs(new - before).max() < 1e-13 * (1 + np.abs(new).max()):
            break
    return new - w


def _targets(annotations: Annotations) -> np.ndarray:
    p = annotations.preferences - 1
    if not p.size or np.isnan(p).all():
        raise ValueError(f"annotations of {annotations.name}: no row has a preference, so there is no win rate.")
    return p


def _checked_anchors(anchors: Array) -> np.ndarray:
    anchors = np.asarray(anchors, np.float64)
    if anchors.ndim != 2 or anchors.shape[1] != 4 or not np.isfinite(anchors).all():
        raise ValueError(f"anchors have the shape {anchors.shape}: [rows, 4] finite numbers are asked for.")
    if (anchors[:, 2] < 0).any() or (anchors[:, 2] > 1).any() or (anchors[:, 3] < 0).any():
        raise ValueError("anchors: the preference, column 2, is in 0..1, and the weight, column 3, is not below 0.")
    return anchors


def _standard_error(x: np.ndarray) -> float | None:
    return float(np.std(x, ddof=1) / math.sqrt(x.size)) if x.size > 1 else None


def _content(path: Path) -> str:
    content = b"".join(line.content for line in raw_lines(path))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {error.start}. A compressed file needs a name that ends in .gz or .xz"
        ) from error


def _read_json(path: Path) -> list[tuple[str, dict]]:
    try:
        rows = json.loads(_content(path))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); the file must hold a JSON list of objects") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: the file must hold a JSON list of objects, and at least one")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {i}: is not a JSON object")
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows)]


def _read_csv(path: Path) -> list[tuple[str, dict]]:
    rows = list(csv.DictReader(io.StringIO(_content(path), newline="")))
    if not rows:
        raise DataError(f"{path}: the table has no rows")
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows)]


def _field(row: dict, field: str, where: str) -> Any:
    if field not in row:
        raise DataError(f"{where}: field {field!r} is missing; the row has {sorted(map(str, row))}")
    return row[field]


def _text(row: dict, field: str, where: str) -> str:
    value = _field(row, field, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is {value!r:.60}, but must be text")
    return value


def _number(row: dict, field: str, where: str) -> float:
    value = _field(row, field, where)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: field {field!r} is {value!r:.60}, but must be a finite number")
    return number


def _preference(row: dict, where: str) -> float:
    value = _field(row, "preference", where)
    if value is None or str(value).strip().lower() in ("", "nan"):
        return math.nan
    number = _number(row, "preference", where)
    if number == 0:
        return 1.5
    if not 1 <= number <= 2:
        raise DataError(f"{where}: field 'preference' is {value!r:.60}, but must be from 1 (baseline) to 2 (model)")
    return number
