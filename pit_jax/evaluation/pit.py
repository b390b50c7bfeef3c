"""The last stage of PIT: Algorithm 2 on the test prompts, judged by the verifier and by the evaluator (section 4)."""

import functools
import json
import time

import numpy as np

from pit_jax.config import SamplingConfig
from pit_jax.data import verifier
from pit_jax.evaluation import agreement, tables, win_rate
from pit_jax.files import write_json_atomic, write_text_atomic
from pit_jax.pipelines import pit, self_refine
from pit_jax.types import PreferenceExample

TIE_BAND = (0.45, 0.55)
"""sigma(r1 - r2) within it is a tie for a reward model (section 4.4)."""

Answers = dict[str, list[list[int]]]
"""Name -> one response per row, as ids without EOS."""

ARM_STAGES = {"second_rl_only": "arm_second_rl_only", "longer_sft": "arm_longer_sft"}
"""Arms that are trained only when asked for: Second RL only (Table 2), and M_P by the settings of M_PIT's SFT."""


def evaluate(context: pit.Context) -> dict:
    """Samples, judges and writes results.json, tables.txt, CSV files and samples/test.jsonl.

    Returns:
      The stage's record; the numbers are in results.json.
    """
    config, started = context.config, time.perf_counter()
    rows = context.rows["test"][: config.evaluation.num_prompts]
    answers, references, parsed = _answers(context, rows)
    judges = {"evaluator": _evaluator_scores(context, rows, answers)}
    if rows[0].requirements:
        judges = {"verifier": _verifier_scores(context, rows, answers)} | judges
    comparisons = {}
    for name, (first, second) in _pairs(answers).items():
        comparisons[name] = {}
        for judge, scores in judges.items():
            band = TIE_BAND if judge == "evaluator" else None
            outcomes = win_rate.compare(scores[first], scores[second], tie_band=band)
            summary = win_rate.summarize(outcomes, seed=config.seed, num_resamples=config.evaluation.num_resamples)
            comparisons[name][judge] = summary
    results = {
        "name": config.name,
        "seed": config.seed,
        "comparisons": comparisons,
        "answers": _answer_statistics(context, answers, references, judges),
        "reward_models": _reward_models(context, rows),
        "self_refine": parsed,
        "stages": _stage_records(context) | {"evaluate": {"steps": 0, "seconds": time.perf_counter() - started}},
        "missing": {
            f"{arm}_vs_{other}": f"{context.command} --config.arms={arm}"
            for arm, stage in ARM_STAGES.items()
            if context.workdir.done(stage) is None
            for other in ("original", "pit")
        },
    }
    _write_samples(context, rows, answers, judges)
    write_json_atomic(context.workdir.root / "results.json", results)
    text = tables.render(results)
    write_text_atomic(context.workdir.root / "tables.txt", text + "\n")
    tables.write_csv(results, context.workdir.root / "tables")
    _print_samples(context, rows, answers)
    return {"steps": 0, "arms": list(config.arms)}


def _answers(context: pit.Context, rows: list[PreferenceExample]) -> tuple[Answers, Answers, dict[str, float]]:
    """All answers to the test prompts, the ref_response of those that improve one, and what Self-Refine reports."""
    parsed: dict[str, float] = {}
    references: Answers = {}
    config, e = context.config, context.encoder
    settings = SamplingConfig(config.data.response_window, config.evaluation.temperature)
    longer = SamplingConfig(pit.improvement_window(context), config.evaluation.temperature)
    key = lambda name: pit.key_of(config, f"evaluate/{name}")  # noqa: E731
    size, eos = config.evaluation.batch_size, e.tokenizer.eos_id
    load = functools.cache(functools.partial(_model, context))

    def policy(name, stage="rl_policy"):
        prompts = [e.policy_prompt(r.prompt) for r in rows]
        return pit.sample(
            *load(stage), prompts, key(name), window=e.policy_window, settings=settings, eos_id=eos, batch_size=size
        )

    def improve(name, refs, stage):
        prompts = [e.pit_prompt(r.prompt, y) for r, y in zip(rows, refs, strict=True)]
        improved = pit.sample(
            *load(stage), prompts, key(name), window=e.pit_window, settings=longer, eos_id=eos, batch_size=size
        )
        references[name] = refs
        return [_without_thoughts(context, y) for y in improved]

    final = f"rl_pit_{len(config.curriculum)}" if config.curriculum else "sft_pit"
    answers = {
        "chosen": [e.response(r.chosen)[:-1] for r in rows],
        "original": policy("original"),
        "fresh": policy("fresh"),  # a second sample of M_P: what sampling again would give
        "sft": policy("sft", "sft_policy"),
    }
    current = answers["original"]
    for k in range(1, config.evaluation.num_iterations + 1):
        name = "pit" if k == 1 else f"pit_iteration_{k}"
        answers[name] = current = improve(name, current, final)
    # Each prompt gets the answer to another prompt: M_PIT without help of its ref_response, and misled by it.
    shuffled = answers["original"][1:] + answers["original"][:1]
    answers["pit_shuffled"] = improve("pit_shuffled", shuffled, final)
    answers["pit_sft"] = improve("pit_sft", answers["original"], "sft_pit")
    if config.evaluation.self_refine and rows[0].reflection:
        answers["self_refine"], parsed = self_refine.refine(context, rows, answers["original"])
        references["self_refine"] = answers["original"]
    if len(config.curriculum) > 1 and config.curriculum[0] == "data":
        answers["first_rl_only"] = improve("first_rl_only", answers["original"], "rl_pit_1")
    for arm, stage in ARM_STAGES.items():
        if context.workdir.done(stage) is not None:
            is_policy = arm == "longer_sft"
            answers[arm] = policy(arm, stage) if is_policy else improve(arm, answers["original"], stage)
    return answers, references, parsed


def _without_thoughts(context: pit.Context, ids: list[int]) -> list[int]:
    """The response behind a chain of thought, c and a line break (appendix K); all of it where there is none.

    Ends, as any sample does, at the response window: thoughts and response share one longer window.
    """
    if not context.config.sft_pit.chain_of_thought:
        return ids
    _, found, response = context.encoder.text(ids).partition("\n")
    return (context.encoder.response(response)[:-1] if found else ids)[: context.config.data.response_window]


def _pairs(answers) -> dict[str, tuple[str, str]]:
    """Comparison name -> (first, second) answers; those whose answers exist."""
    wanted = [
        ("original_vs_chosen", "original", "chosen"),
        ("pit_vs_original", "pit", "original"),
        ("pit_sft_vs_original", "pit_sft", "original"),
        ("rl_vs_sft", "original", "sft"),
        ("fresh_vs_original", "fresh", "original"),
        ("pit_shuffled_vs_original", "pit_shuffled", "original"),
        ("self_refine_vs_original", "self_refine", "original"),
        ("pit_vs_self_refine", "pit", "self_refine"),
        ("first_rl_only_vs_original", "first_rl_only", "original"),
        ("first_rl_only_vs_pit", "first_rl_only", "pit"),
        ("second_rl_only_vs_original", "second_rl_only", "original"),
        ("second_rl_only_vs_pit", "second_rl_only", "pit"),
        ("longer_sft_vs_original", "longer_sft", "original"),
        ("longer_sft_vs_pit", "longer_sft", "pit"),
    ]
    iterations = [name for name in answers if name.startswith("pit_iteration_")]
    wanted += [(f"{name}_vs_original", name, "original") for name in iterations]
    return {name: (a, b) for name, a, b in wanted if a in answers and b in answers}


def _verifier_scores(context, rows, answers) -> dict[str, np.ndarray]:
    """Share of requirements met."""
    text = context.encoder.text
    return {
        name: np.asarray([verifier.share_met(r.requirements, text(y)) for r, y in zip(rows, ys, strict=True)])
        for name, ys in answers.items()
    }


def _evaluator_scores(context, rows, answers) -> dict[str, np.ndarray]:
    """r(x, y) by the reward model that was trained on all folds and used for nothing else."""
    e, names = context.encoder, list(answers)
    prompts = [e.policy_prompt(r.prompt) for r in rows]
    form = lambda i, name: [*prompts[i], *answers[name][i], e.tokenizer.eos_id]  # noqa: E731
    groups = [[form(i, name)] for name in names for i in range(len(rows))]  # one by one: there may be many names
    scores = pit.score_groups(*_model(context, "evaluator"), groups, batch_size=256)
    return dict(zip(names, scores.reshape(len(names), len(rows)), strict=True))


def _answer_statistics(context, answers: Answers, references: Answers, judges) -> dict[str, dict]:
    """What each kind of answer looks like.

    Returns:
      name -> tokens: mean length; copy_rate: share of answers equal to their own ref_response (None where there is
      none); ended: share with EOS; by the verifier share_met, and all_met: share of answers that meet everything;
      fixed and kept: the latter among the prompts whose Original fails something, and among the others.
    """
    mean = lambda values: float(np.mean(values)) if len(values) else None  # noqa: E731
    statistics = {}
    for name, ys in answers.items():
        copies = [y == ref for y, ref in zip(ys, references[name], strict=True)] if name in references else []
        statistics[name] = {
            "tokens": mean([len(y) for y in ys]),
            "copy_rate": mean(copies),
            "ended": mean([len(y) < context.config.data.response_window for y in ys]),
        }
        if "verifier" in judges:
            scores, was_met = judges["verifier"][name], judges["verifier"]["original"] == 1.0
            met = scores == 1.0
            statistics[name] |= {"share_met": mean(scores), "all_met": mean(met)}
            statistics[name] |= {"fixed": mean(met[~was_met]), "kept": mean(met[was_met])}
    return statistics


def _reward_models(context, rows) -> dict[str, dict]:
    """Table 4's accuracies, Figure 2's distributions and the diagnostics of the gap model."""
    e = context.encoder
    ids = lambda y: e.response(y)[:-1]  # noqa: E731
    report: dict[str, dict] = {}

    labelled = context.rows["test"]  # all of them: reading is cheaper than sampling
    triples = [
        (r.prompt, ids(y1), ids(y2))
        for r in labelled
        for y1, y2 in ((r.chosen, r.rejected), (r.chosen, r.chosen), (r.rejected, r.rejected), (r.rejected, r.chosen))
    ]
    gaps = pit.gap_scores(context, triples, pairings=4)
    report["r_pit"] = agreement.accuracy(gaps[:, 0], gaps[:, 3]) | agreement.gap_diagnostics(*gaps.T)
    # Shortcut probe: the same y_1 against the ref_response of another prompt.
    moved = [
        (r.prompt, ids(y1), ids(y2))
        for r, other in zip(labelled, labelled[1:] + labelled[:1], strict=True)
        for y1, y2 in ((r.chosen, other.rejected), (r.rejected, other.chosen))
    ]
    shuffled = pit.gap_scores(context, moved, pairings=2)
    probe = agreement.shortcut_probe(gaps[:, 0], gaps[:, 3], shuffled[:, 0], shuffled[:, 1])
    report["r_pit"]["shortcut_probe"] = probe
    for name in ("r_p", "evaluator"):
        scores = pit.score_groups(*_model(context, name), pit.policy_groups(e, labelled))
        report[name] = agreement.accuracy(scores[:, 0], scores[:, 1])

    if rows[0].requirements:
        # On pairs of a policy's own answers, ranked by the verifier: what RL asks of a reward model.
        for prefix, stage in (("policy", "rl_policy"), ("sft_policy", "sft_policy")):
            pairs, margin, prompts = _own_pairs(context, rows, stage)
            swapped = [(x, b, a) for x, a, b in pairs]
            both = [triple for pair in zip(pairs, swapped, strict=True) for triple in pair]
            gap = pit.gap_scores(context, both, pairings=2)
            own = {"r_pit": gap[:, 0] - gap[:, 1]}
            groups = [[[*e.policy_prompt(x), *y, e.tokenizer.eos_id] for y in (a, b)] for x, a, b in pairs]
            for name in ("r_p", "evaluator"):
                scores = pit.score_groups(*_model(context, name), groups)
                own[name] = scores[:, 0] - scores[:, 1] if groups else margin
            for name, predicted in own.items():
                values = agreement.pair_accuracy_excluding_ties(predicted, margin, groups=prompts)
                report[name] |= {f"{prefix}_{k}": v for k, v in values.items()}
    return report


def _model(context, stage):
    return pit.model_of(context, stage), pit.load_model(context, stage)


def _own_pairs(context, rows, stage):
    """Pairs (x, a, b) of a policy's own samples that the verifier tells apart, its margin (a minus b), and x's row."""
    config, e = context.config, context.encoder
    n = config.evaluation.num_pairs
    settings = SamplingConfig(config.data.response_window, config.evaluation.temperature)
    repeated = [row for row in rows for _ in range(n)]
    samples = pit.sample(
        *_model(context, stage), [e.policy_prompt(r.prompt) for r in repeated for _ in range(2)],
        pit.key_of(config, f"evaluate/own/{stage}"), window=e.policy_window, settings=settings,
        eos_id=e.tokenizer.eos_id, batch_size=config.evaluation.batch_size,
    )  # fmt: skip
    first, second = samples[0::2], samples[1::2]
    share = lambda row, y: verifier.share_met(row.requirements, e.text(y))  # noqa: E731
    margin = np.asarray([share(r, a) - share(r, b) for r, a, b in zip(repeated, first, second, strict=True)])
    keep = np.flatnonzero(margin)
    return [(repeated[i].prompt, first[i], second[i]) for i in keep], margin[keep], keep // n


def _stage_records(context) -> dict[str, dict]:
    """What each finished stage measured."""
    names = pit.stage_names(context.config)
    return {name: record for name in names if (record := context.workdir.done(name)) is not None}


def _write_samples(context, rows, answers, judges) -> None:
    """One JSON line per test prompt: all answers and what each judge says of them."""
    path = context.workdir.root / "samples" / "test.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = context.encoder.text
    lines = []
    for i, row in enumerate(rows):
        line = {
            "prompt": row.prompt,
            "requirements": [[r.kind, r.value] for r in row.requirements],
            "answers": {name: text(ys[i]) for name, ys in answers.items()},
            "scores": {judge: {n: float(s[i]) for n, s in scores.items()} for judge, scores in judges.items()},
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text_atomic(path, "".join(lines))


def _print_samples(context, rows, answers) -> None:
    """A few improved answers as they are, from evenly spaced prompts."""
    n = min(context.config.evaluation.show_samples, len(rows))
    for i in range(0, len(rows), max(1, len(rows) // max(n, 1)))[:n]:
        print(f"  prompt:   {rows[i].prompt}")
        for label, name in (("original", "original"), ("improved", "pit")):
            text = context.encoder.text(answers[name][i])
            met = ""
            if rows[i].requirements:
                checks = verifier.verify(rows[i].requirements, text)
                met = f"  [{sum(checks)} of {len(checks)} met]"
            print(f"  {label}: {text!r}{met}")
        print(flush=True)
