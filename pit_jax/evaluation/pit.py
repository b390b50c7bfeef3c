"""The tables and figures of PIT: which answers they need, who judges them, and every number (section 4).

Answers, scores and verdicts come from files below WORKDIR/evaluation, or are made and left there; the numbers are then
functions of these files alone.
"""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pit_jax.config import PitConfig
from pit_jax.data import verifier
from pit_jax.evaluation import (
    agreement,
    answers,
    bag_of_words,
    judges as judging,
    ratings,
    store,
)
from pit_jax.evaluation.answers import Maker, Plan
from pit_jax.evaluation.judges import Judge
from pit_jax.evaluation.run import Evaluation, Options, System, answer_statistics, write
from pit_jax.pipelines import common, improve, pit
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.improve import Step, StopRules

ARM_STAGES = {"second_rl_only": "arm_second_rl_only", "longer_sft": "arm_longer_sft", "pit_sft_cot": common.COT_ARM}
"""Arms that are trained only when asked for: see `config.ARMS`."""

OWN_JUDGES = ("verifier", "evaluator", "r_p", "r_pit")


def can_self_refine(run: Evaluation) -> bool:
    """Whether M_P has learnt to write feedback."""
    return run.context.config.evaluation.self_refine and bool(run.rows[0].reflection)


def make_judge(context: Context, name: str, maker: Maker) -> Judge | None:
    """A judge of the answers of a split; the verifier only where there are requirements."""
    root = {kind: maker.root / kind / maker.split for kind in ("scores", "verdicts")}
    if name == "verifier":
        return judging.verifier_judge(root["scores"], maker.rows) if maker.rows[0].requirements else None
    if name == "r_pit":
        return judging.gap_judge(context, root["verdicts"], maker.rows)
    return judging.reward_model_judge(context, name, root["scores"], maker.rows)


def evaluate(context: Context) -> dict:
    """The last stage: the tables of a run's own judges.

    Returns:
      The stage's record; the numbers are in results.json.
    """
    write(Evaluation(SYSTEM, context, Options()))
    return {"steps": 0, "arms": list(context.config.arms)}


# ---------------------------------------------------------------------------------------------- win rates (Tables 1, 2)


def main_plans(run: Evaluation) -> list[Plan]:
    """The answers of Tables 1 and 2 and of the controls beside them."""
    config, workdir = run.context.config, run.context.workdir
    final = pit.final_stage(config)
    plans = [
        Plan("chosen", "chosen"),
        Plan("original", "policy", "rl_policy"),
        Plan("fresh", "policy", "rl_policy"),  # a second sample of M_P: what sampling again would give
        Plan("sft", "policy", "sft_policy"),
        *answers.chain("pit", final, "original", run.num_iterations),
        # Each prompt gets the answer to another prompt: M_PIT without help of its ref_response, and misled by it.
        Plan("pit_shuffled", "pit", final, "original", shuffled=True),
        Plan("pit_sft", "pit", "sft_pit", "original"),
    ]
    if can_self_refine(run):
        plans.append(Plan("self_refine", "self_refine", "rl_policy", "original"))
    if len(config.curriculum) > 1 and config.curriculum[0] == "data":
        plans.append(Plan("first_rl_only", "pit", "rl_pit_1", "original"))
    for arm in ("second_rl_only", "longer_sft"):
        if workdir.done(ARM_STAGES[arm]) is not None:
            method, of = ("policy", "") if arm == "longer_sft" else ("pit", "original")
            plans.append(Plan(arm, method, ARM_STAGES[arm], of))
    return plans


def win_rates(run: Evaluation) -> dict:
    """comparisons, answers, self_refine and missing of results.json."""
    context = run.context
    names = [run.maker.make(plan).name for plan in main_plans(run)]
    comparisons = {
        name: {
            judge.name: run.compare(judge, first, second)
            for judge in run.judges
            if judge.comparisons is None or name in judge.comparisons
        }
        for name, (first, second) in run.system.pairs(names).items()
    }
    found = {
        "comparisons": comparisons,
        "answers": {name: answer_statistics(run, name) for name in names},
        "missing": {
            f"{arm}_vs_{other}": f"{context.command} --config.arms={arm}"
            for arm in ("second_rl_only", "longer_sft")
            if context.workdir.done(ARM_STAGES[arm]) is None
            for other in ("original", "pit")
        },
    }
    if "self_refine" in names:
        parsed = [step.parsed for step in run.maker["self_refine"].steps]
        found["self_refine"] = {"parse_rate": sum(parsed) / len(parsed)}
    return found


COMPARISONS = {
    "original_vs_chosen": ("original", "chosen"),
    "pit_vs_original": ("pit", "original"),
    "pit_sft_vs_original": ("pit_sft", "original"),
    "rl_vs_sft": ("original", "sft"),
    "fresh_vs_original": ("fresh", "original"),
    "pit_shuffled_vs_original": ("pit_shuffled", "original"),
    "self_refine_vs_original": ("self_refine", "original"),
    "pit_vs_self_refine": ("pit", "self_refine"),
    "first_rl_only_vs_original": ("first_rl_only", "original"),
    "first_rl_only_vs_pit": ("first_rl_only", "pit"),
    "second_rl_only_vs_original": ("second_rl_only", "original"),
    "second_rl_only_vs_pit": ("second_rl_only", "pit"),
    "longer_sft_vs_original": ("longer_sft", "original"),
    "longer_sft_vs_pit": ("longer_sft", "pit"),
}
"""Name -> (first, second) answers; beside them each iteration of M_PIT against the original."""


# ---------------------------------------------------------------------------------------- agreement (Table 4, Figure 2)


def reward_models(run: Evaluation) -> dict:
    """reward_models and gap_distributions of results.json: accuracies, distributions, diagnostics of the gap model."""
    labelled = labelled_scores(run)
    gap = {name: np.asarray(x) for name, x in labelled["r_pit"].items()}
    four = (gap["wl"], gap["ww"], gap["ll"], gap["lw"])
    report = {"r_pit": agreement.accuracy(gap["wl"], gap["lw"]) | agreement.gap_diagnostics(*four)}
    probe = agreement.shortcut_probe(gap["wl"], gap["lw"], gap["shuffled_wl"], gap["shuffled_lw"])
    report["r_pit"]["shortcut_probe"] = probe
    for name in ("r_p", "evaluator"):
        report[name] = agreement.accuracy(labelled[name]["chosen"], labelled[name]["rejected"])
    if run.verifiable:
        # On pairs of a policy's own answers, ranked by the verifier: what RL asks of a reward model.
        for prefix, stage in (("policy", "rl_policy"), ("sft_policy", "sft_policy")):
            own = own_margins(run, stage)
            for name in ("r_pit", "r_p", "evaluator"):
                values = agreement.pair_accuracy_excluding_ties(own[name], own["verifier"], groups=own["prompt"])
                report[name] |= {f"{prefix}_{k}": v for k, v in values.items()}
    for judge in run.judges:
        if judge.name not in OWN_JUDGES and (said := judge_agreement(run, judge)):
            report[judge.name] = said
    if said := word_counts(run):
        report["bag_of_words"] = said
    edges = np.histogram_bin_edges(np.concatenate(four), bins=60)
    density = {
        name: np.histogram(x, edges, density=True)[0].tolist()
        for name, x in zip(agreement.PAIRING_NAMES, four, strict=True)
    }
    return {"reward_models": report, "gap_distributions": {"edges": edges.tolist(), "density": density}}


def word_counts(run: Evaluation) -> dict | None:
    """Accuracy of word counts that learn from the rows of R_P; None without scikit-learn, empty without words."""
    if importlib.util.find_spec("sklearn") is None:
        return None
    splits = [run.context.rows[name] for name in ("rm", "selection", "test")]
    spec = {"words": "with case", "rows": [store.digest([[r.chosen, r.rejected] for r in split]) for split in splits]}
    path = run.maker.root / "agreement" / "bag_of_words.json"
    return store.values(path, spec, lambda: bag_of_words.accuracy(*splits) or {})


def judge_agreement(run: Evaluation, judge: Judge) -> dict | None:
    """How often a judge of others finds y_w better than y_l; a tie is an error. None where it was not asked."""
    chosen, rejected = (run.maker.make(Plan(name, name)) for name in ("chosen", "rejected"))
    if judge.comparisons is not None and "chosen_vs_rejected" not in judge.comparisons:
        return None
    verdicts = judge.compare(chosen, rejected)
    run.compare(judge, "chosen", "rejected")  # for its costs
    said = verdicts.outcome[verdicts.mask]
    lacking = {"no_verdict": int(np.sum(verdicts.asked & ~verdicts.mask))}
    if not said.size:
        return dict.fromkeys(("accuracy", "low", "high")) | {"n": 0} | lacking
    return agreement.accuracy(said, np.zeros(said.size)) | lacking


def labelled_scores(run: Evaluation) -> dict[str, dict[str, list[float]]]:
    """What each reward model says of the labelled pairs of all test prompts: reading is cheaper than sampling."""
    context = run.context
    e, rows = context.encoder, context.rows["test"]
    ids = lambda y: e.response(y)[:-1]  # noqa: E731

    def make() -> dict:
        score = pit.gap_scorer(context)
        both = lambda r: (ids(r.chosen), ids(r.rejected))  # noqa: E731
        pairings = lambda w, l: ((w, l), (w, w), (l, l), (l, w))  # noqa: E731
        triples = [(r.prompt, y1, y2) for r in rows for y1, y2 in pairings(*both(r))]
        found = {"r_pit": dict(zip(("wl", "ww", "ll", "lw"), score(triples, pairings=4).T, strict=True))}
        # Shortcut probe: the same y_1 against the ref_response of another prompt.
        moved = [
            (r.prompt, ids(y1), ids(y2))
            for r, other in zip(rows, rows[1:] + rows[:1], strict=True)
            for y1, y2 in ((r.chosen, other.rejected), (r.rejected, other.chosen))
        ]
        found["r_pit"] |= dict(zip(("shuffled_wl", "shuffled_lw"), score(moved, pairings=2).T, strict=True))
        for name in ("r_p", "evaluator"):
            model = common.model_of(context, name), common.load_model(context, name)
            scores = common.score_groups(*model, common.policy_groups(e, rows))
            found[name] = {"chosen": scores[:, 0], "rejected": scores[:, 1]}
        return found

    models = {
        stage: context.workdir.model_digest(stage) for stage in (pit.gap_stage(context.config), "r_p", "evaluator")
    }
    spec = {"models": models, "prompts": store.digest([[r.prompt, r.chosen, r.rejected] for r in rows])}
    spec["form"] = context.encoder.digest
    return store.values(run.maker.root / "agreement" / "labelled.json", spec, make)


def own_margins(run: Evaluation, stage: str) -> dict[str, np.ndarray]:
    """Pairs of a policy's own samples that the verifier tells apart: its margin (first minus second), those of the
    reward models, and the number of the prompt."""
    context, n = run.context, run.context.config.evaluation.num_pairs
    e = context.encoder
    maker = Maker(context, "own", [row for row in run.rows for _ in range(2 * n)])
    own = maker.make(Plan(stage, "policy", stage))
    met = np.asarray([verifier.share_met(r.requirements, y) for r, y in zip(maker.rows, own.texts, strict=True)])
    margin = met[0::2] - met[1::2]
    keep = np.flatnonzero(margin)
    pairs = [(maker.rows[2 * i].prompt, own.ids[2 * i], own.ids[2 * i + 1]) for i in keep]

    def make() -> dict:
        both = [triple for x, a, b in pairs for triple in ((x, a, b), (x, b, a))]
        gap = pit.gap_scorer(context)(both, pairings=2)
        found = {"r_pit": gap[:, 0] - gap[:, 1]}
        groups = [[[*e.policy_prompt(x), *y, e.tokenizer.eos_id] for y in (a, b)] for x, a, b in pairs]
        for name in ("r_p", "evaluator"):
            model = common.model_of(context, name), common.load_model(context, name)
            scores = common.score_groups(*model, groups).reshape(-1, 2)
            found[name] = scores[:, 0] - scores[:, 1]
        return found

    models = {name: context.workdir.model_digest(name) for name in (pit.gap_stage(context.config), "r_p", "evaluator")}
    spec = {"models": models, "answers": store.digest(own.spec), "pairs": keep.tolist()}
    found = store.values(maker.root / "agreement" / f"own_{stage}.json", spec, make)
    found = {name: np.asarray(x, np.float64) for name, x in found.items()}
    return found | {"verifier": margin[keep], "prompt": keep // n}


# -------------------------------------------------------------------------------------------- iterations (Table 3, 4.7)


def _chains(run: Evaluation) -> dict[str, list[str]]:
    """Method -> names of y_0 .. y_K, all made."""
    methods = ["pit", *(["self_refine"] if can_self_refine(run) else []), "rerank"]
    return {method: _chain(run, run.maker, method) for method in methods}


def _chain(run: Evaluation, maker: Maker, method: str, temperature: float | None = None) -> list[str]:
    """Names of y_0 .. y_K of a method, all made; at a temperature of its own the names say so."""
    config = run.context.config
    default = config.evaluation.temperature
    temperature = default if temperature is None else temperature
    stage = pit.final_stage(config) if method == "pit" else "rl_policy"
    original = Plan("original", "policy", "rl_policy")
    plans = [original, *answers.chain(method, stage, "original", run.num_iterations)]
    if temperature != default:
        name = lambda plain: answers.at_temperature(plain, temperature, default) if plain else ""  # noqa: E731
        plans = [dataclasses.replace(p, name=name(p.name), of=name(p.of), temperature=temperature) for p in plans]
    return [maker.make(plan).name for plan in plans]


def elo_ratings(run: Evaluation) -> dict:
    """ratings of results.json: Elo and Bradley-Terry over all pairs of Original and the iterations (Table 3)."""
    chains = _chains(run)
    names = ["original", *(name for method in ("pit", "self_refine") for name in chains.get(method, [])[1:])]
    found = {}
    for judge in run.judges_of_all:
        pairs = [(i, j) for i in range(len(names)) for j in range(i)]
        verdicts = [judge.compare(run.maker[names[i]], run.maker[names[j]]) for i, j in pairs]
        prompt = np.concatenate([np.flatnonzero(v.mask) for v in verdicts])
        sides = np.concatenate([np.tile(p, (int(v.mask.sum()), 1)) for p, v in zip(pairs, verdicts, strict=True)])
        outcome = np.concatenate([v.outcome[v.mask] for v in verdicts])
        seed = run.context.config.seed
        if not outcome.size:
            continue
        sides = *sides.T, outcome, len(names)
        found[judge.name] = {
            "elo": ratings.elo_shuffled(*sides, names=names, num_shuffles=run.options.num_shuffles, seed=seed),
            "bradley_terry": ratings.bradley_terry(*sides, names=names, groups=prompt, prior=1.0, seed=seed),
            "num_comparisons": int(outcome.size),
            "num_shuffles": run.options.num_shuffles,
        }
    return {"ratings": found}


def iteration_curves(run: Evaluation) -> dict:
    """iterations and equal_tokens of results.json: each method's answers by iteration, with all that they took.

    At equal tokens, y_k of M_PIT meets the furthest answer of another method that took no more.
    """
    found = {}
    for method, names in _chains(run).items():
        tokens = written = 0.0
        found[method] = []
        for k, name in enumerate(names):
            made = run.maker[name]
            tokens += float(np.mean([step.tokens for step in made.steps]))
            written += float(np.mean([step.written for step in made.steps]))
            statistics = answer_statistics(run, name)
            line = {"iteration": k, "answer": name, "tokens": tokens, "written": written}
            line |= {"copy_rate": statistics["copy_rate"], "length": statistics["tokens"]}
            line |= {key: statistics[key] for key in ("share_met", "all_met") if key in statistics}
            line["delta"] = {judge.name: run.compare(judge, name, "original") for judge in run.judges_of_all if k}
            found[method].append(line)
    equal = []
    for line in found["pit"][1:]:
        for method, lines in found.items():
            if method == "pit":
                continue
            other = max((x for x in lines if x["tokens"] <= line["tokens"]), key=lambda x: x["iteration"])
            compared = {judge.name: run.compare(judge, line["answer"], other["answer"]) for judge in run.judges_of_all}
            entry = {"first": line["answer"], "first_tokens": line["tokens"], "method": method}
            entry |= {"second": other["answer"], "second_tokens": other["tokens"], "comparisons": compared}
            equal.append(entry)
    return {"iterations": found, "equal_tokens": equal}


def chain_steps(run: Evaluation, maker: Maker, names: Sequence[str]) -> list[list[Step]]:
    """y_0 .. y_K of each prompt, with R_PIT's gaps."""
    context = run.context
    gains = functools.cache(lambda: pit.make_gains(context))
    columns = [maker[names[0]].steps]
    for before, name in zip(names, names[1:], strict=False):
        after = maker[name]

        def make(before=before, after=after) -> dict:
            found = gains()([row.prompt for row in maker.rows], after.ids, maker[before].ids)
            return dict(zip(("gap", "gain", "scored"), map(list, zip(*found, strict=True)), strict=True))

        spec = {
            "model": context.workdir.model_digest(pit.gap_stage(context.config)),
            "answers": store.digest(after.spec),
        }
        found = store.values(maker.root / "gaps" / maker.split / f"{name}.json", spec, make)
        columns.append([
            step._replace(gap=gap, gain=gain, scored=step.scored + scored)
            for step, gap, gain, scored in zip(after.steps, found["gap"], found["gain"], found["scored"], strict=True)
        ])  # fmt: skip
    return [list(steps) for steps in zip(*columns, strict=True)]


def calibrated_threshold(run: Evaluation, method: str, temperature: float | None = None) -> float:
    """The threshold of a method's gains, from its answers to the selection prompts."""
    names = _chain(run, run.selection, method, temperature)
    truth = run.truth_of(run.selection)
    scores = np.stack([truth.scores(run.selection[name]) for name in names], axis=1)
    return improve.calibrate(chain_steps(run, run.selection, names), scores)


def stop_rules(run: Evaluation) -> dict:
    """stop_rules of results.json: where each rule would have stopped, against an oracle that knows the scores."""
    K = run.num_iterations
    lines = []
    for method, names in _chains(run).items():
        if method == "rerank":  # keeps its best by construction
            continue
        scores = np.stack([run.truth.scores(run.maker[name]) for name in names], axis=1)
        chains = chain_steps(run, run.maker, names)
        plain = [[step._replace(scored=0) for step in steps] for steps in chains]
        threshold = calibrated_threshold(run, method)
        budget = round(float(np.mean([sum(step.tokens for step in steps[:3]) for steps in plain])))  # y_0, y_1, y_2
        rules = [(f"K = {k}", StopRules(iterations=k)) for k in range(1, K + 1)]
        rules += [("identical", StopRules(identical=True, iterations=K))]
        rules += [(f"{budget} tokens", StopRules(max_tokens=budget, iterations=K))]
        rules += [("gap, calibrated", StopRules(min_gain=threshold, iterations=K))]
        rules += [("gap above 0", StopRules(min_gain=0.0, iterations=K))]
        rules += [("keep best", StopRules(keep="best", iterations=K))]
        rules += [("gap, calibrated, keep best", StopRules(min_gain=threshold, keep="best", iterations=K))]
        oracle = scores.max(axis=1)
        for rule, settings in rules:
            taken = chains if settings.needs_gains else plain  # R_PIT reads only where it is asked
            stops = [improve.stopped(steps, settings) for steps in taken]
            reached = scores[np.arange(len(stops)), [kept for kept, _ in stops]]
            tokens = [sum(step.tokens for step in steps[: k + 1]) for steps, (_, k) in zip(taken, stops, strict=True)]
            lines.append({
                "method": method, "rule": rule, "judge": run.truth.name, "score": float(reached.mean()),
                "regret": float(np.mean(oracle - reached)), "tokens": float(np.mean(tokens)),
                "iterations": float(np.mean([k for _, k in stops])), "n": len(stops),
                "threshold": settings.min_gain,
            })  # fmt: skip
    note = (
        f"Score by the {run.truth.name}; regret against the best of y_0 .. y_{K} of each prompt. The threshold of the "
        f"gap was calibrated on {len(run.selection.rows)} selection prompts."
    )
    return {"stop_rules": lines, "stop_rules_note": note}


# --------------------------------------------------------------------------------------- temperatures (Figures 3 and 5)


def _sweep(run: Evaluation, methods: dict[str, Plan], original: str) -> dict:
    """Comparisons of each method with the original, and of the first with the second, at each temperature."""
    default = run.context.config.evaluation.temperature
    names: dict[str, list[str]] = {}
    for method, plan in methods.items():
        names[method] = []
        for temperature in run.options.temperatures:
            name = answers.at_temperature(plan.name, temperature, default)
            made = run.maker.make(dataclasses.replace(plan, name=name, temperature=temperature))
            names[method].append(made.name)
    pairs = {f"{method}_vs_{original}": [(name, original) for name in found] for method, found in names.items()}
    first, *others = names
    for other in others:
        pairs[f"{first}_vs_{other}"] = list(zip(names[first], names[other], strict=True))
    comparisons = {
        name: {judge.name: [run.compare(judge, a, b) for a, b in sides] for judge in run.judges_of_all}
        for name, sides in pairs.items()
    }
    return {"temperatures": list(run.options.temperatures), "comparisons": comparisons}


def temperature_sweep(run: Evaluation) -> dict:
    """temperature_sweep of results.json: M_PIT and Self-Refine at each temperature, originals at that of the config."""
    run.maker.make(Plan("original", "policy", "rl_policy"))
    methods = {"pit": Plan("pit", "pit", pit.final_stage(run.context.config), "original")}
    if can_self_refine(run):
        methods["self_refine"] = Plan("self_refine", "self_refine", "rl_policy", "original")
    return {"temperature_sweep": _sweep(run, methods, "original")}


def chain_of_thought(run: Evaluation) -> dict:
    """chain_of_thought of results.json: M_PIT^SFT with and without thoughts improves M_P^SFT's answers (appendix K)."""
    if run.context.workdir.done(common.COT_ARM) is None:
        return {"missing": {"pit_sft_cot_vs_sft": f"{run.context.command} --config.arms=pit_sft_cot"}}
    run.maker.make(Plan("sft", "policy", "sft_policy"))
    methods = {
        "pit_sft": Plan("pit_sft_of_sft", "pit", "sft_pit", "sft"),
        "pit_sft_cot": Plan("pit_sft_cot_of_sft", "pit", common.COT_ARM, "sft"),
    }
    if can_self_refine(run):
        methods["self_refine"] = Plan("self_refine_of_sft", "self_refine", "sft_policy", "sft")
    return {"chain_of_thought": _sweep(run, methods, "sft")}


# ---------------------------------------------------------------------------------------------------- RL (Figure 4, KL)


def rl_curves(run: Evaluation) -> dict:
    """rl_rewards and kl_reward of results.json, from what the stages of RL have recorded.

    "Similar" is where the reward of a policy as good as M_P^RL would be in 95% of all cases: M_P^RL itself against its
    own answers, one sample for each selection prompt.
    """
    context = run.context
    rounds = [f"rl_pit_{i}" for i in range(1, len(context.config.curriculum) + 1)]
    stages = [*rounds, "arm_second_rl_only"]
    curves = {stage: curve for stage in ("rl_policy", *stages) if (curve := _kl_curve(context, stage))}
    found: dict[str, Any] = {"kl_reward": curves}
    faced = [s for s, source in zip(rounds, context.config.curriculum, strict=True) if source == "policy"]
    faced += ["arm_second_rl_only"] if "arm_second_rl_only" in curves else []
    if faced:
        gaps = par_gaps(run)
        mean = float(np.mean(gaps))
        # The checkpoints answer the same prompts, so only the spread within prompts counts.
        half = 1.96 * float(np.mean(np.var(gaps, axis=1, ddof=1)) / len(gaps)) ** 0.5
        training = _training_scores(context, faced)
        found["rl_rewards"] = {
            "similar": [mean - half, mean + half],
            "n": len(gaps),
            "stages": {
                stage: {
                    "steps": curves[stage]["steps"],
                    "reward": curves[stage]["score"],
                    "chosen_step": curves[stage]["chosen_step"],
                    "training_steps": [step for step, _ in training[stage]],
                    "training_reward": [score for _, score in training[stage]],
                }
                for stage in faced
            },
        }
    return found


def par_gaps(run: Evaluation, num_pairs: int = 8) -> np.ndarray:
    """r_gap(x, y, y_ref) of pairs of M_P^RL's own answers to the prompts that checkpoints of RL are measured on.

    Returns:
      [rollout_size, num_pairs]; sampled as in RL.
    """
    context, settings = run.context, run.context.config.ppo_pit
    rows = common.selection_rows(context, settings.rollout_size)
    maker = Maker(context, "par", [row for row in rows for _ in range(2 * num_pairs)])
    own = maker.make(Plan("rl_policy", "policy", "rl_policy", temperature=settings.temperature))

    def make() -> dict:
        pairs = zip(maker.rows[::2], own.ids[::2], own.ids[1::2], strict=True)
        return {"gap": pit.gap_scorer(context)([(row.prompt, a, b) for row, a, b in pairs])[:, 0]}

    spec = {"model": context.workdir.model_digest(pit.gap_stage(context.config)), "answers": store.digest(own.spec)}
    gaps = store.values(maker.root / "gaps" / maker.split / "rl_policy.json", spec, make)["gap"]
    return np.reshape(gaps, (len(rows), num_pairs))


def _kl_curve(context: Context, stage: str) -> dict | None:
    record = context.workdir.done(stage)
    if record is None:
        return None
    measured = sorted((int(step), values) for step, values in record["candidates"].items())
    column = lambda key: [values[key] for _, values in measured]  # noqa: E731
    share = "verifier/share_met"
    return {
        "steps": [step for step, _ in measured],
        "kl": column("kl"),
        "score": column("score"),
        "share_met": column(share) if share in measured[0][1] else None,
        "chosen_step": record["chosen_step"],
        "bins": [{key: b[key] for key in ("low", "high", "step")} for b in record["kl_bins"]],
    }


def _training_scores(context: Context, stages: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, mean reward of the rollout) of each stage, from metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {stage: [] for stage in stages}
    with open(context.workdir.root / "metrics.jsonl", encoding="utf-8") as file:
        for line in map(json.loads, file):
            if line["stage"] in found and line.get("score") is not None:
                found[line["stage"]].append((line["step"], line["score"]))
    return found


def _sample_chains(run: Evaluation) -> dict[str, list[str]]:
    """Method -> names of y_0 .. y_K, those that were made."""
    sets = run.maker.sets
    chains = {method: ["original", *answers.chain_names(method, run.num_iterations)] for method in improve.METHODS}
    return {method: [n for n in names if n in sets] for method, names in chains.items() if method in sets}


def _stage_names(config: PitConfig) -> list[str]:
    names = pit.stage_names(config)
    return names + [stage for stage in ARM_STAGES.values() if stage not in names]


SYSTEM = System(
    tables={
        "win_rates": win_rates,  # Tables 1 and 2
        "agreement": reward_models,  # Table 4 and Figure 2
        "ratings": elo_ratings,  # Table 3
        "iterations": iteration_curves,  # curves over iterations and tokens
        "stop_rules": stop_rules,  # section 4.7, appendix J
        "temperatures": temperature_sweep,  # Figure 3
        "rl": rl_curves,  # Figure 4 and the choice by KL
        "chain_of_thought": chain_of_thought,  # Figure 5
    },
    judges=OWN_JUDGES,
    usual_judges=("verifier", "evaluator"),
    main_comparisons=("original_vs_chosen", "pit_vs_original", "self_refine_vs_original", "pit_vs_self_refine"),
    needs=lambda config: ["rl_policy", pit.final_stage(config), "evaluator"],
    make_judge=make_judge,
    truth=lambda run: "verifier" if run.verifiable else "evaluator",
    comparisons=COMPARISONS,
    original="original",
    shown=(("original", "original"), ("improved", "pit")),
    repeated="pit",
    chains=_sample_chains,
    stages=_stage_names,
)
