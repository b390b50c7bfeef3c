"""Results as plain text and CSV: win rates (PIT Tables 1 and 2), agreement (Table 4), what each stage took.

A results dict has these keys; those that are absent are left out of the text:

    comparisons     {"pit_vs_original": {judge: {win, lose, tie, delta, low, high, n}}}
    answers         {"pit": {statistic: number or None}}
    reward_models   {"r_pit": {accuracy, low, high, n, ...}, "r_p": {...}}
    stages          {"sft_policy": {seconds, steps, ...}}
    missing         {"second_rl_only_vs_pit": the command, or the flag, that trains the arm}
"""

import csv
import io
from pathlib import Path

from pit_jax import files

SHARES = ("win", "lose", "tie", "delta")


def render(results: dict) -> str:
    """The tables of a results dict as text; shares in percent."""
    sections = [
        _title(results),
        _comparisons(results.get("comparisons", {})),
        _answers(results.get("answers", {})),
        _reward_models(results.get("reward_models", {})),
        _stages(results.get("stages", {})),
        _missing(results.get("missing", {})),
    ]
    return "\n\n".join(section for section in sections if section)


def write_csv(results: dict, directory: Path | str) -> list[Path]:
    """Writes comparisons.csv, answers.csv, reward_models.csv and stages.csv; shares in 0..1, empty cells for None.

    reward_models.csv has one line per number: model, name ("gaps.chosen_rejected"), value.

    Returns:
      The files that were written: one per key of `results` that is not empty.
    """
    directory = Path(directory)
    rows = {
        "comparisons": [
            {"comparison": name, "judge": judge} | {key: summary[key] for key in (*SHARES, "low", "high", "n")}
            for name, judges in results.get("comparisons", {}).items()
            for judge, summary in judges.items()
        ],
        "answers": [{"answer": name} | _flat(row) for name, row in results.get("answers", {}).items()],
        "reward_models": [
            {"model": model, "name": key, "value": value}
            for model, row in results.get("reward_models", {}).items()
            for key, value in _flat(row).items()
        ],
        "stages": [
            {"stage": name, "steps": row.get("steps"), "seconds": row.get("seconds")}
            for name, row in results.get("stages", {}).items()
        ],
    }
    paths = []
    for name, lines in rows.items():
        if not lines:
            continue
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        paths.append(directory / f"{name}.csv")
        files.write_text_atomic(paths[-1], text.getvalue())
    return paths


def _title(results: dict) -> str:
    parts = [str(results["name"])] if "name" in results else []
    parts += [f"seed {results['seed']}"] if "seed" in results else []
    return ", ".join(parts)


def _comparisons(comparisons: dict) -> str:
    rows = [
        [_words(name), judge, *[_percent(s[key], signed=key == "delta") for key in SHARES], _interval(s, signed=True)]
        + [str(s["n"])]
        for name, judges in comparisons.items()
        for judge, s in judges.items()
    ]
    if not rows:
        return ""
    header = ["first vs. second", "judge", "win", "lose", "tie", "delta", "95% interval", "prompts"]
    return "Win rates in percent (Tables 1 and 2); delta = win - lose, above 0 where the first is better\n" + _table(
        header, rows, left=2
    )


def _answers(answers: dict) -> str:
    keys = list(dict.fromkeys(key for row in answers.values() for key in row))
    if not keys:
        return ""
    number = lambda key, x: "-" if x is None else f"{x:.1f}" if key == "tokens" else _percent(x)  # noqa: E731
    rows = [[_words(name), *[number(key, row.get(key)) for key in keys]] for name, row in answers.items()]
    return "Answers: mean length in tokens; shares in percent\n" + _table(["answer", *map(_words, keys)], rows)


def _reward_models(models: dict) -> str:
    rows, notes = [], []
    for name, row in models.items():
        for key in row:
            if key == "accuracy" or key.endswith("_accuracy"):
                prefix = key.removesuffix("accuracy")
                pairs = "labelled, of test prompts" if not prefix else f"own, of {_words(prefix.rstrip('_'))}"
                part = {k: row.get(prefix + k) for k in ("accuracy", "low", "high", "n")}
                count = "-" if part["n"] is None else str(part["n"])
                rows.append([name, pairs, _percent(part["accuracy"]), _interval(part), count])
        if "gaps" in row:
            means = ", ".join(f"{_words(pairing)} {mean:+.3f}" for pairing, mean in row["gaps"].items())
            holds = "hold" if row["order_holds"] else "do NOT hold"
            notes.append(f"{name}, mean gaps (Figure 2): {means}; they {holds} the order of Equation 1.")
            notes.append(
                f"{name}, gap of equal responses: {_number(row.get('diagonal_offset'))}; "
                f"antisymmetry error: {_number(row.get('antisymmetry_error'))} standard deviations."
            )
        if "shortcut_probe" in row:
            probe = row["shortcut_probe"]
            notes.append(
                f"{name}, ref_response of another prompt: gaps move by {_number(probe['change'])} standard deviations, "
                f"accuracy {_percent(probe['accuracy'])} -> {_percent(probe['shuffled_accuracy'])}."
            )
    if not rows and not notes:
        return ""
    header = ["reward model", "pairs", "accuracy", "95% interval", "n"]
    table = _table(header, rows, left=2) if rows else ""
    return "\n".join(filter(None, ["Agreement with the labels in percent (Table 4)", table, *notes]))


def _stages(stages: dict) -> str:
    rows = [
        [name, "-" if row.get("steps") is None else str(row["steps"]), _number(row.get("seconds"), "{:.1f}")]
        for name, row in stages.items()
    ]
    if not rows:
        return ""
    total = sum(row.get("seconds") or 0.0 for row in stages.values())
    return "Stages\n" + _table(["stage", "steps", "seconds"], [*rows, ["total", "", f"{total:.1f}"]])


def _missing(missing: dict[str, str]) -> str:
    commands: dict[str, list[str]] = {}
    for name, command in missing.items():
        commands.setdefault(command, []).append(_words(name))
    return "\n".join(
        f"Not in the table: {', '.join(names)}. This arm was not trained; train it with: {command}"
        for command, names in commands.items()
    )


def _words(name: str) -> str:
    return name.replace("_vs_", " vs. ").replace("_", " ")


def _percent(share: float | None, *, signed: bool = False) -> str:
    return "-" if share is None else f"{100 * share:+.2f}" if signed else f"{100 * share:.2f}"


def _interval(summary: dict, *, signed: bool = False) -> str:
    if summary.get("low") is None:
        return "-"
    return f"[{_percent(summary['low'], signed=signed)}, {_percent(summary['high'], signed=signed)}]"


def _number(x: float | None, form: str = "{:.3f}") -> str:
    return "-" if x is None else form.format(x)


def _table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell; the first `left` to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row):
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def _flat(row: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat |= {f"{prefix}{key}.{i}": x for i, x in enumerate(value)}
        else:
            flat[prefix + key] = value
    return flat
