"""Benchmark scores of a file of answers that any model has written (SRT Table 3, AlpacaEval 2)."""

import collections
from pathlib import Path
from typing import Any

from pit_jax.data import sources
from pit_jax.data.sources import DataError
from pit_jax.evaluation import alpaca_eval, benchmarks

BENCHMARKS = ("gsm8k", "bbh", "tydiqa", "alpaca_eval")


def score(name: str, path: str | Path, difficulty: str | Path | None = None) -> dict[str, Any]:
    """The summary of a benchmark.

    Args:
      name: of BENCHMARKS. gsm8k: rows {"response", "target"}; bbh: with "task" as well; tydiqa: {"response", "targets":
        [...], "language"?}. alpaca_eval: AlpacaEval's own annotations of a model, with win rate, and with the
        length-controlled win rate where difficulty is given.
      path: of the file, JSON lines or what AlpacaEval writes; .gz and .xz too.
      difficulty: of alpaca_eval: instructions with their difficulty.

    Raises:
      DataError: where the file cannot be read; names the line and the field.
      ValueError: for an unknown benchmark.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"--benchmark={name}: use {', '.join(BENCHMARKS)}")
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    if name == "alpaca_eval":
        annotations = alpaca_eval.read_annotations(path)
        found = {"model": annotations.name, "baseline": annotations.baseline} | alpaca_eval.win_rate(annotations)
        if difficulty:
            of_rows = alpaca_eval.difficulty_of(annotations, alpaca_eval.read_difficulty(difficulty))
            found |= alpaca_eval.length_controlled(annotations, of_rows)
        return found
    scores = collections.defaultdict(list)
    for line in sources.raw_lines(Path(path)):
        where = f"{path}, line {line.number}"
        row = sources.parse_object(line, where)
        response = sources.string_field(row, "response", where)
        try:
            if name == "tydiqa":
                language = sources.string_field(row, "language", where, "all")
                scores[language].append(benchmarks.tydiqa_score(response, _texts(row, "targets", where)))
            elif name == "bbh":
                task = sources.string_field(row, "task", where)
                target = sources.string_field(row, "target", where)
                scores[task].append(benchmarks.bbh_score(task, response, target))
            else:
                target = sources.string_field(row, "target", where)
                scores[""].append(benchmarks.gsm8k_score(response, target))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
    if not scores:
        raise DataError(f"{path}: the file has no rows")
    if name == "gsm8k":
        return benchmarks.summarize(scores[""])
    return benchmarks.summarize_tasks(scores) if name == "bbh" else benchmarks.summarize_languages(scores)


def _texts(row: dict[str, Any], field: str, where: str) -> list[str]:
    values = row.get(field)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: field {field!r} must be an array of at least one string")
    return values
