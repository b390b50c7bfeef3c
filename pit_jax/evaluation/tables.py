"""Results as tables, in plain text and CSV: win rates (PIT Tables 1 and 2), ratings (Table 3), agreement (Table 4), ...

A results dict has these keys; those that are absent have no table. A summary is {win, lose, tie, delta, low, high, n}
and perhaps no_verdict, the number of prompts that are not in n as the judge gave none.

    comparisons         {"pit_vs_original": {judge: summary}}
    answers             {"pit": {statistic: number or None}}
    iterations          {method: [{iteration, answer, tokens, written, copy_rate, length, share_met, all_met,
                        delta: {judge: {delta, low, high, n}}}]}; tokens: read and written up to here, per prompt
    equal_tokens        [{first, first_tokens, method, second, second_tokens, comparisons: {judge: summary}}]
    stop_rules          [{method, rule, judge, score, regret, tokens, iterations, n}]; stop_rules_note: more of them
    temperature_sweep   {temperatures: [...], comparisons: {name: {judge: [summary per temperature]}}}
    chain_of_thought    the same, or {name: {judge: summary}} at one temperature
    ratings             {judge: {elo: [{name, rating, low, high, rank, rank_low, rank_high}], bradley_terry: [...],
                        num_comparisons, num_shuffles}}
    reward_models       {"r_pit": {accuracy, low, high, n, ...}, "r_p": {...}, "llm": {..., no_verdict}}
    gap_distributions   {edges: [m + 1], density: {pairing: [m]}}
    rl_rewards          {similar: [low, high], n, stages: {stage: {steps, reward, chosen_step,
                        training_steps, training_reward}}}; n: selection prompts behind reward
    kl_reward           {stage: {steps, kl, score, share_met, chosen_step, bins: [{low, high, step}]}}
    srt                 {parse_rate, feedback: {stage: {records, causes: {cause: n}, parse_rate, mean_scores: [y, r]}}}
    self_scores         {"stage1": {agreement: {accuracy, low, high, n}, ties, no_score, histograms: {answer and
                        refinement: [10]}, quality: [{score, n, share_met, all_met}]}}
    costs               {name of answers: {seconds, read, written, scored, answers}}; read, written, scored in tokens
    judge_costs         {judge: {calls, cached_calls, prompt_tokens, completion_tokens, seconds, ...}}
    stages              {"sft_policy": {seconds, steps, ...}}
    missing             {"second_rl_only_vs_pit": the command, or the flag, that trains the arm}
"""

import csv
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pit_jax import files

SHARES = ("win", "lose", "tie", "delta")

_ORDER = """
    pit self_refine rerank pit_sft pit_sft_cot pit_sft_of_sft pit_sft_cot_of_sft self_refine_of_sft first_rl_only
    second_rl_only pit_shuffled original rl fresh sft longer_sft
    srt_stage1 srt_stage2 srt_rerank without_score without_suggestions without_weaknesses without_feedback
    all_but_refinement quarter half refined_base answer1 answer2 base base_greedy chosen rejected
    tokens copy_rate ended share_met all_met fixed kept
    verifier data pretrain sft_policy sft_pit r_p r_pit evaluator rl_policy rl_pit_1 rl_pit_2
    arm_second_rl_only arm_longer_sft arm_pit_sft_cot critic_feedback srt self_feedback_1 dpo_1 evaluate
    chosen_rejected chosen_chosen rejected_rejected rejected_chosen
""".split()
_JUDGE_COSTS = ("calls", "cached_calls", "prompt_tokens", "completion_tokens", "seconds")
_SAME = {"rl": "original", "stage1": "srt_stage1", "rerank": "srt_rerank"}
"""Answers that go by another name in a comparison."""


class Table(NamedTuple):
    """What the text, the CSV file and the web page are made of.

    Attributes:
      name: of the CSV file, and the key of the results dict.
      title: one line; "" where there are notes only.
      header: column names.
      rows: cells as text, as many per row as the header has.
      num_left: this many columns, from the first, are set left; the others hold numbers and are set right.
      notes: lines below the table.
      records: the same with full numbers, one dict per line of the CSV file.
    """

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    num_left: int
    notes: tuple[str, ...] = ()
    records: tuple[dict, ...] = ()


def tables(results: dict) -> list[Table]:
    """The tables of a results dict, in reading order; shares in percent."""
    results = in_order(results)
    found = [
        _comparisons(results.get("comparisons", {}), results.get("answers", {})),
        _answers(results.get("answers", {})),
        _iterations(results.get("iterations", {})),
        _equal_tokens(results.get("equal_tokens", [])),
        _stop_rules(results.get("stop_rules", []), results.get("stop_rules_note")),
        _temperature_sweep(results.get("temperature_sweep", {})),
        _chain_of_thought(results.get("chain_of_thought", {})),
        _ratings(results.get("ratings", {})),
        _srt_feedback(results.get("srt", {})),
        _self_scores(results.get("self_scores", {})),
        _quality(results.get("self_scores", {})),
        _reward_models(results.get("reward_models", {})),
        _gap_distributions(results.get("gap_distributions", {})),
        _rl_rewards(results.get("rl_rewards", {})),
        _kl_reward(results.get("kl_reward", {})),
        _costs(results.get("costs", {})),
        _judge_costs(results.get("judge_costs", {})),
        _stages(results.get("stages", {})),
        _missing(results.get("missing", {})),
    ]
    return [table for table in found if table.rows or table.notes]


def render(results: dict) -> str:
    """The tables of a results dict as text."""
    return "\n\n".join(section for section in [title(results), *map(_text, tables(results))] if section)


def write_csv(results: dict, directory: Path | str) -> list[Path]:
    """Writes comparisons.csv, answers.csv and so on; shares in 0..1, empty cells for None.

    reward_models.csv has one line per number: model, name ("gaps.chosen_rejected"), value.

    Returns:
      The files that were written: one per table that has numbers.
    """
    paths = []
    for table in tables(results):
        if not table.records:
            continue
        text = io.StringIO(newline="")
        columns = list(dict.fromkeys(key for record in table.records for key in record))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.records)
        paths.append(Path(directory) / f"{table.name}.csv")
        files.write_text_atomic(paths[-1], text.getvalue())
    return paths


def in_order(results):
    """The same with the dicts inside in reading order, which a file with sorted keys has lost; unknown names last."""
    if isinstance(results, list):
        return [in_order(x) for x in results]
    if not isinstance(results, dict):
        return results
    return {name: in_order(results[name]) for name in sorted(results, key=place)}


def place(name: str) -> tuple:
    """Sorts "pit", "pit_iteration_2", "pit_iteration_10", "pit_t0.2" in this order; comparisons by first, then second.

    Among comparisons of one answer that with the original comes first.
    """
    first, versus, second = str(name).partition("_vs_")
    base, iteration, temperature = re.fullmatch(r"(.*?)(?:_iteration_(\d+))?(?:_t([\d.]+))?", first, re.DOTALL).groups()
    rank = _ORDER.index(base) if base in _ORDER else len(_ORDER)
    made = float(temperature) if temperature and temperature.count(".") < 2 and temperature != "." else -1.0
    return rank, made, int(iteration or 0), second not in ("original", "base"), place(second) if versus else ()


def title(results: dict) -> str:
    """Name and seed of the run; "" where the results have neither."""
    parts = [str(results["name"])] if "name" in results else []
    parts += [f"seed {results['seed']}"] if "seed" in results else []
    return ", ".join(parts)


def words(name: str) -> str:
    """A name of the results dict in words: "pit_vs_original" is "pit vs. original"."""
    return name.replace("_vs_", " vs. ").replace("_", " ")


def percent(share: float | None, *, signed: bool = False, digits: int = 2) -> str:
    """A share of 0..1 in percent, without the sign of percent; "-" for None."""
    return "-" if share is None else f"{100 * share:{'+' if signed else ''}.{digits}f}"


def interval(summary: dict, *, signed: bool = False, digits: int = 2) -> str:
    """low and high of a summary in percent, in brackets; "-" where they are absent."""
    if summary.get("low") is None:
        return "-"
    low, high = (percent(summary[key], signed=signed, digits=digits) for key in ("low", "high"))
    return f"[{low}, {high}]"


_SUMMARY_HEADER = ["win", "lose", "tie", "delta", "95% interval", "prompts"]


def _summary_cells(s: dict, no_verdict: bool) -> list[str]:
    cells = [percent(s[key], signed=key == "delta") for key in SHARES]
    cells += [interval(s, signed=True), str(s["n"])]
    return [*cells, _count(s.get("no_verdict", 0))] if no_verdict else cells


def _summary_record(s: dict, no_verdict: bool) -> dict:
    record = {key: s[key] for key in (*SHARES, "low", "high", "n")}
    return record | {"no_verdict": s.get("no_verdict", 0)} if no_verdict else record


def _lacks_verdicts(summaries) -> bool:
    return any(s.get("no_verdict", 0) for s in summaries)


def _comparisons(comparisons: dict, answers: dict) -> Table:
    found = [(name, judge, s) for name, judges in comparisons.items() for judge, s in judges.items()]
    lacks = _lacks_verdicts(s for _, _, s in found)
    header = ["first vs. second", "judge", *_SUMMARY_HEADER, *(["no verdict"] if lacks else [])]
    note = "delta = win - lose, above 0 where the first is better."
    if answers:
        header += ["tokens", "copy rate"]
        note += " Tokens (mean length) and copy rate (share equal to their ref_response) are those of the first."
    rows, records = [], []
    for name, judge, s in found:
        row = [words(name), judge, *_summary_cells(s, lacks)]
        record = {"comparison": name, "judge": judge} | _summary_record(s, lacks)
        if answers:
            first = name.partition("_vs_")[0]
            first = answers.get(_SAME.get(first, first), {})
            row += [_number(first.get("tokens"), "{:.1f}"), percent(first.get("copy_rate"))]
            record |= {"tokens": first.get("tokens"), "copy_rate": first.get("copy_rate")}
        rows.append(row)
        records.append(record)
    title = "Win rates in percent (PIT Tables 1 and 2, SRT Table 3)"
    return Table("comparisons", title, header, rows, 2, (note,) if rows else (), tuple(records))


def _answers(answers: dict) -> Table:
    keys = list(dict.fromkeys(key for row in answers.values() for key in row))
    rows = [[words(name), *[_statistic(key, row.get(key)) for key in keys]] for name, row in answers.items()]
    records = tuple({"answer": name} | _flat(row) for name, row in answers.items())
    title = "Answers: mean length in tokens; shares in percent"
    note = (
        "fixed: share that meets all where the original answer (in SRT M_base's) fails something; kept: where it meets "
        "all. An answer that was not made of it can be better by chance."
    )
    notes = (note,) if "fixed" in keys else ()
    return Table("answers", title, ["answer", *map(words, keys)], rows if keys else [], 1, notes, records)


def _iterations(iterations: dict) -> Table:
    found = [(method, row) for method, steps in iterations.items() for row in steps]
    shares = [key for key in ("share_met", "all_met") if any(row.get(key) is not None for _, row in found)]
    judges = list(dict.fromkeys(judge for _, row in found for judge in row.get("delta") or {}))
    header = ["method", "iteration", "tokens", "written", "length", "copy rate", *map(words, shares)]
    header += [f"delta, {judge}" for judge in judges]
    rows = []
    for method, row in found:
        cells = [words(method), str(row["iteration"])]
        cells += [_number(row.get(key), "{:.1f}") for key in ("tokens", "written", "length")]
        cells += [percent(row.get(key)) for key in ("copy_rate", *shares)]
        for judge in judges:
            s = (row.get("delta") or {}).get(judge)
            cells.append("-" if s is None else f"{percent(s['delta'], signed=True)} {interval(s, signed=True)}")
        rows.append(cells)
    notes = (
        "Per prompt, means. Tokens: all that were read and written up to this iteration, so that methods compare at "
        "equal cost; written: the part that was sampled; length: of this iteration's answer.",
        f"delta = win - lose against {iterated_against(iterations)} in percent, with its 95% interval.",
    )
    records = tuple({"method": method} | _flat(row) for method, row in found)
    title = f"Iterations ({iterated_section(iterations)}); shares in percent"
    return Table("iterations", title, header, rows, 1, notes if rows else (), records)


def iterated_against(iterations: dict) -> str:
    """Whose answer the iterations are compared with."""
    return "the answer of M_base" if _is_srt(iterations) else "the original answer"


def iterated_section(iterations: dict) -> str:
    """Where the papers show such iterations."""
    return "SRT Table 2" if _is_srt(iterations) else "section 4.7"


def _is_srt(iterations: dict) -> bool:
    return any(method.startswith("srt") for method in iterations)


def _srt_feedback(found: dict) -> Table:
    rows, records, notes = [], [], []
    stages = found.get("feedback", {})
    shares = ("found", "mended", "false_alarms", "broken") if any("truth" in row for row in stages.values()) else ()
    for stage, row in stages.items():
        before, after = row.get("mean_scores") or (None, None)
        kept = row["causes"].get("kept", 0)
        dropped = ", ".join(f"{n:,} {cause}" for cause, n in row["causes"].items() if cause != "kept")
        rows.append(
            [words(stage), _count(row["records"]), _count(kept), percent(row["parse_rate"])]
            + [_number(x, "{:.2f}") for x in (before, after)]
            + [percent(row.get("truth", {}).get(share)) for share in shares]
        )
        notes.append(f"{words(stage)}: dropped are {dropped or 'none'}.")
        records.append(
            {"stage": stage, "records": row["records"], "parse_rate": row["parse_rate"]}
            | {"mean_score": before, "mean_refinement_score": after}
            | {f"causes.{cause}": n for cause, n in row["causes"].items()}
            | _flat(row.get("truth", {}), "truth.")
        )
    if shares:
        notes.append(
            "By the verifier, of responses that fail something: found, those with a score below 10, and mended, those "
            "whose refinement meets all; of the others: false alarms, with a score below 10, and broken."
        )
    header = ["feedback", "records", "kept", "parse rate", "mean score", "of refinements", *map(words, shares)]
    title = "Feedback (SRT section 4.1); shares in percent"
    return Table("srt_feedback", title, header, rows, 1, tuple(notes), tuple(records))


def _self_scores(models: dict) -> Table:
    rows, records = [], []
    for model, found in models.items():
        means = [_mean_score(found["histograms"].get(side)) for side in ("answer", "refinement")]
        a = found.get("agreement", {})  # data may have no labels
        rows.append(
            [words(model), percent(a.get("accuracy")), interval(a), _count(a.get("n")), percent(found.get("ties"))]
            + [_count(found["no_score"]), *(_number(x, "{:.2f}") for x in means)]
        )
        records.append(
            {"model": model} | _flat(a, "agreement.") | {"ties": found.get("ties"), "no_score": found["no_score"]}
        )
        records[-1] |= {f"{side}_score_{k}": n for side, x in found["histograms"].items() for k, n in enumerate(x, 1)}
    header = [
        "model",
        "agrees with labels",
        "95% interval",
        "pairs",
        "ties",
        "without score",
        "own answers",
        "refinements",
    ]
    note = "A tie counts as wrong. Own answers and refinements: their mean score on the test prompts."
    title = "Scores that the model gives (SRT Table 5, Figure 3), in percent"
    return Table("self_scores", title, header, rows, 1, (note,) if rows else (), tuple(records))


def _mean_score(histogram: list[int] | None) -> float | None:
    counts = np.asarray(histogram or [0])
    return float(np.sum(counts * np.arange(1, len(counts) + 1)) / counts.sum()) if counts.sum() else None


def _quality(models: dict) -> Table:
    found = [(model, row) for model, of in models.items() for row in of.get("quality") or []]
    rows = [
        [words(m), str(r["score"]), _count(r["n"]), percent(r["share_met"]), percent(r["all_met"])] for m, r in found
    ]
    records = tuple({"model": m} | r for m, r in found)
    header = ["model", "score", "refinements", "share met", "all met"]
    title = "Refinements by the score that the model gives them (SRT Figure 6); shares in percent"
    return Table("self_score_quality", title, header, rows, 1, (), records)


def _equal_tokens(entries: list[dict]) -> Table:
    found = [(entry, judge, s) for entry in entries for judge, s in entry["comparisons"].items()]
    rows = [
        [words(e["first"]), _number(e["first_tokens"], "{:.1f}"), f"{words(e['second'])} ({words(e['method'])})"]
        + [_number(e["second_tokens"], "{:.1f}"), judge, *_summary_cells(s, False)]
        for e, judge, s in found
    ]
    header = ["first", "tokens", "second (method)", "tokens", "judge", *_SUMMARY_HEADER]
    records = tuple(
        {key: e[key] for key in ("first", "first_tokens", "method", "second", "second_tokens")}
        | {"judge": judge}
        | _summary_record(s, False)
        for e, judge, s in found
    )
    note = "Second: the furthest answer of the method that took no more tokens per prompt than the first."
    title = "Methods at equal tokens, in percent"
    return Table("equal_tokens", title, header, rows, 1, (note,) if rows else (), records)


def _stop_rules(rules: list[dict], note: str | None) -> Table:
    judge = next((row["judge"] for row in rules if "judge" in row), "verifier")
    shares = judge == "verifier"
    shown = percent if shares else _number
    header = ["method", "rule", "share met" if shares else f"{judge}'s score", "regret", "tokens", "iterations"]
    header.append("prompts")
    rows = [
        [words(row["method"]), words(row["rule"]), shown(row.get("score")), shown(row.get("regret"))]
        + [_number(row.get(key), "{:.1f}") for key in ("tokens", "iterations")]
        + [str(row["n"])]
        for row in rules
    ]
    meaning = (
        f"Regret: what the best stop for each prompt would have added{' (both in percent)' if shares else ''}; tokens "
        "and iterations: means per prompt."
    )
    notes = (meaning, *([note] if note else [])) if rows else ()
    return Table(
        "stop_rules", "When to stop (section 4.7, appendix J)", header, rows, 2, notes, tuple(map(_flat, rules))
    )


def _temperature_sweep(sweep: dict) -> Table:
    found = [
        (name, judge, temperature, s)
        for name, judges in sweep.get("comparisons", {}).items()
        for judge, summaries in judges.items()
        for temperature, s in zip(sweep["temperatures"], summaries, strict=True)
        if s is not None
    ]
    lacks = _lacks_verdicts(s for *_, s in found)
    header = ["first vs. second", "judge", "temperature", *_SUMMARY_HEADER, *(["no verdict"] if lacks else [])]
    rows = [[words(name), judge, f"{t:g}", *_summary_cells(s, lacks)] for name, judge, t, s in found]
    records = tuple(
        {"comparison": name, "judge": judge, "temperature": t} | _summary_record(s, lacks)
        for name, judge, t, s in found
    )
    return Table("temperature_sweep", "Win rates by temperature in percent (Figure 3)", header, rows, 2, (), records)


def _chain_of_thought(found: dict) -> Table:
    table = _temperature_sweep(found) if "temperatures" in found else _comparisons(found, {})
    title = "Chain of thought: win rates in percent (appendix K, Figure 5)"
    return table._replace(name="chain_of_thought", title=title)


def _ratings(ratings: dict) -> Table:
    rows, notes, records = [], [], []
    for judge, found in ratings.items():
        methods = {method: {row["name"]: row for row in found.get(method) or []} for method in ("elo", "bradley_terry")}
        records += [{"judge": judge, "method": method} | row for method, of in methods.items() for row in of.values()]
        names = dict.fromkeys(name for of in methods.values() for name in of)
        order = sorted(names, key=lambda name: min(of[name]["rank"] for of in methods.values() if name in of))
        for name in order:
            rows.append([words(name), judge, *(cell for of in methods.values() for cell in _rating(of.get(name)))])
        count = f"{judge}: {_count(found.get('num_comparisons'))} comparisons"
        shuffles = found.get("num_shuffles")
        notes.append(f"{count}, {_count(shuffles)} shuffles of their order." if shuffles else f"{count}.")
    if rows:
        notes.append("Rank: of all, and in brackets the best and the worst that it came out at.")
    columns = [f"{name}{what}" for name in ("Elo", "Bradley-Terry") for what in ("", " interval", " rank")]
    title = "Ratings, higher is better (Table 3)"
    return Table("ratings", title, ["answer", "judge", *columns], rows, 2, tuple(notes), tuple(records))


def _rating(row: dict | None) -> list[str]:
    if row is None:
        return ["-", "-", "-"]
    bounds = "-" if row.get("low") is None else f"[{row['low']:.0f}, {row['high']:.0f}]"
    ranks = "" if row.get("rank_low") is None else f" ({row['rank_low']}-{row['rank_high']})"
    return [f"{row['rating']:.0f}", bounds, f"{row['rank']}{ranks}"]


def _reward_models(models: dict) -> Table:
    rows, notes = [], []
    lacks = _lacks_verdicts(models.values())
    for name, row in models.items():
        for key in row:
            if key == "accuracy" or key.endswith("_accuracy"):
                prefix = key.removesuffix("accuracy")
                pairs = "labelled, of test prompts" if not prefix else f"own, of {words(prefix.rstrip('_'))}"
                part = {k: row.get(prefix + k) for k in ("accuracy", "low", "high", "n")}
                rows.append([name, pairs, percent(part["accuracy"]), interval(part), _count(part["n"])])
                if lacks:
                    rows[-1].append("-" if prefix else _count(row.get("no_verdict", 0)))
        if "gaps" in row:
            means = ", ".join(f"{words(pairing)} {mean:+.3f}" for pairing, mean in row["gaps"].items())
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
                f"accuracy {percent(probe['accuracy'])} -> {percent(probe['shuffled_accuracy'])}."
            )
    header = ["judge", "pairs", "accuracy", "95% interval", "n", *(["no verdict"] if lacks else [])]
    records = tuple(
        {"model": model, "name": key, "value": value}
        for model, row in models.items()
        for key, value in _flat(row).items()
    )
    title = "Agreement with the labels in percent (Table 4)"
    return Table("reward_models", title, header, rows, 2, tuple(notes), records)


def _gap_distributions(distributions: dict) -> Table:
    if not distributions:
        return Table("gap_distributions", "", [], [], 1)
    edges, density = np.asarray(distributions["edges"], float), distributions["density"]
    rows = []
    for pairing, values in density.items():
        mass = np.asarray(values) * np.diff(edges)
        top = int(np.argmax(values))
        # Within the bin that holds 0 the mass is taken as even.
        below = float(np.interp(0.0, edges, np.concatenate([[0.0], np.cumsum(mass)])))
        rows.append([words(pairing), percent(below, digits=0), f"{edges[top]:+.2f} to {edges[top + 1]:+.2f}"])
    records = tuple(
        {"low": low, "high": high} | {pairing: values[i] for pairing, values in density.items()}
        for i, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    )
    header = ["pairing", "below 0, percent", "most frequent gap"]
    note = "Read off a histogram, so to the width of its bins."
    return Table("gap_distributions", "Gaps of R_PIT by pairing (Figure 2)", header, rows, 1, (note,), records)


def _rl_rewards(rewards: dict) -> Table:
    rows, records = [], []
    for stage, curve in rewards.get("stages", {}).items():
        if not curve["steps"]:
            continue
        chosen = curve.get("chosen_step")
        at = dict(zip(curve["steps"], curve["reward"], strict=True))
        rows.append(
            [words(stage), str(len(curve["steps"])), *(_number(curve["reward"][i], "{:+.3f}") for i in (0, -1))]
            + [_count(chosen), _number(at.get(chosen), "{:+.3f}")]
        )
        records += [
            {"stage": stage, "prompts": "selection", "step": step, "reward": reward, "chosen": step == chosen}
            for step, reward in at.items()
        ]
        training = zip(curve.get("training_steps") or [], curve.get("training_reward") or [], strict=True)
        records += [{"stage": stage, "prompts": "training", "step": step, "reward": x} for step, x in training]
    notes = []
    if rows and rewards.get("similar"):
        low, high = rewards["similar"]
        notes.append(f"Similar: from {low:+.3f} to {high:+.3f}; above it Better, below it Worse.")
    header = ["stage", "points", "first reward", "last reward", "chosen step", "reward there"]
    title = "Rewards during RL (section 4.6, Figure 4)"
    return Table("rl_rewards", title, header, rows, 1, tuple(notes), tuple(records))


def _kl_reward(stages: dict) -> Table:
    rows, records = [], []
    for stage, points in stages.items():
        shares = points.get("share_met") or [None] * len(points["steps"])
        best = {group["step"] for group in points.get("bins") or []}
        for step, kl, score, share in zip(points["steps"], points["kl"], points["score"], shares, strict=True):
            mark = "chosen" if step == points.get("chosen_step") else "best of its KL group" if step in best else ""
            rows.append([words(stage), mark, str(step), _number(kl), _number(score), percent(share)])
            record = {"stage": stage, "step": step, "kl": kl, "score": score, "share_met": share}
            records.append(record | {"chosen": step == points.get("chosen_step"), "best_of_group": step in best})
    header = ["stage", "checkpoint", "step", "KL", "reward", "share met"]
    title = "Checkpoints of RL: KL to the SFT model in nats, reward, share met in percent (appendix F)"
    return Table("kl_reward", title, header, rows, 2, (), tuple(records))


def _costs(costs: dict) -> Table:
    keys = [key for key in ("read", "written", "scored") if any(row.get(key) for row in costs.values())]
    rows = [
        [words(name), _count(row.get("answers")), _number(row.get("seconds"), "{:.1f}")]
        + [_count(row.get(key)) for key in keys]
        for name, row in costs.items()
    ]
    header = ["answer", "answers", "seconds", *(f"tokens {key}" for key in keys)]
    records = tuple({"answer": name} | row for name, row in costs.items())
    return Table("costs", "What the answers took", header, rows, 1, (), records)


def _judge_costs(costs: dict) -> Table:
    keys = [key for key in _JUDGE_COSTS if any(key in row for row in costs.values())]
    keys += dict.fromkeys(key for row in costs.values() for key in row if key not in keys)
    rows = [[words(judge), *(_judge_cost(key, row.get(key)) for key in keys)] for judge, row in costs.items()]
    records = tuple({"judge": judge} | row for judge, row in costs.items())
    title = "What the judges took; rates in percent"
    return Table("judge_costs", title, ["judge", *map(words, keys)], rows, 1, (), records)


def _judge_cost(key: str, x: float | None) -> str:
    if key.endswith("_rate"):
        return percent(x)
    return _number(x, "{:.1f}") if key == "seconds" else _count(x)


def _stages(stages: dict) -> Table:
    rows = [
        [name, "-" if row.get("steps") is None else str(row["steps"]), _number(row.get("seconds"), "{:.1f}")]
        for name, row in stages.items()
    ]
    if rows:
        total = sum(row.get("seconds") or 0.0 for row in stages.values())
        rows.append(["total", "", f"{total:.1f}"])
    records = tuple(
        {"stage": name, "steps": row.get("steps"), "seconds": row.get("seconds")} for name, row in stages.items()
    )
    return Table("stages", "Stages", ["stage", "steps", "seconds"], rows, 1, (), records)


def _missing(missing: dict[str, str]) -> Table:
    commands: dict[str, list[str]] = {}
    for name, command in missing.items():
        commands.setdefault(command, []).append(words(name))
    notes = tuple(
        f"Not in the table: {', '.join(names)}. This arm was not trained; train it with: {command}"
        for command, names in commands.items()
    )
    return Table("missing", "", [], [], 1, notes)


def _statistic(key: str, x: float | None) -> str:
    return _number(x, "{:.1f}") if key == "tokens" else percent(x)


def _number(x: float | None, form: str = "{:.3f}") -> str:
    return "-" if x is None else form.format(x)


def _count(x: int | None) -> str:
    return "-" if x is None else f"{x:,}"


def _text(table: Table) -> str:
    """Title, columns as wide as their widest cell, notes."""
    lines = [table.title] if table.title else []
    if table.rows:
        body = [table.header, *table.rows]
        widths = [max(len(row[i]) for row in body) for i in range(len(table.header))]

        def line(row):
            cells = [
                cell.ljust(w) if i < table.num_left else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        lines += [line(table.header), "  ".join("-" * w for w in widths), *map(line, table.rows)]
    return "\n".join([*lines, *table.notes])


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
