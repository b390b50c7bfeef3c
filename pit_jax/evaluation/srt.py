"""The tables and figures of SRT: which answers they need, who judges them, and every number (section 4)."""

from collections.abc import Sequence

import numpy as np

from pit_jax.config import SrtConfig
from pit_jax.data import sources
from pit_jax.evaluation import agreement, answers, judges as judging, store
from pit_jax.evaluation.answers import Maker, Plan
from pit_jax.evaluation.judges import Judge
from pit_jax.evaluation.run import Evaluation, Options, System, answer_statistics, write
from pit_jax.pipelines import srt
from pit_jax.pipelines.common import Context

STAGES = {"stage1": lambda config: "srt", "stage2": srt.final_stage}
"""Name in tables -> the stage whose model it is."""


def evaluate(context: Context) -> dict:
    """The last stage: the tables of the run's own judges; the numbers are in results.json."""
    write(Evaluation(SYSTEM, context, Options(("win_rates", "self_scores", "arms"), SYSTEM.usual_judges)))
    return {"steps": 0, "arms": list(context.config.arms)}


def make_judge(context: Context, name: str, maker: Maker) -> Judge | None:
    """The verifier where there are requirements, or M_self by the scores that it gives."""
    root = maker.root / "scores" / maker.split
    if name == "verifier":
        return judging.verifier_judge(root, maker.rows) if maker.rows[0].requirements else None
    stage = STAGES[name.removeprefix("self_")](context.config)

    def score(made: store.AnswerSet) -> list[float]:
        """0 where a reply has no score: it is below all others."""
        model = srt.make_self_critic(context, stage, 0.0, context.config.evaluation.batch_size)
        replies = model.score([row.prompt for row in maker.rows], made.ids)
        return [reply.feedback.score or 0.0 for reply in replies]

    spec = {"judge": name, "model": context.workdir.model_digest(stage)} | srt.form_of(context)
    return judging.by_scores(name, root, spec, score, None)


def _stages(run: Evaluation) -> list[tuple[str, str]]:
    """(name in tables, stage) of the models that were trained."""
    config = run.context.config
    return [("stage1", "srt")] + ([("stage2", srt.final_stage(config))] if config.num_rounds else [])


def _plans(run: Evaluation, iterations: int = 1) -> list[Plan]:
    """Answers of M_base, and of each M_self: its own answer, and refinements of it."""
    plans = [] if sources.has_no_answers(run.rows) else [Plan("chosen", "chosen")]
    plans += [
        Plan("base", "policy", "sft_policy"),
        Plan("base_greedy", "policy", "sft_policy", temperature=0.0),  # refinements are greedy too
        Plan("refined_base", "srt", "srt", "base"),
    ]
    for number, (name, stage) in enumerate(_stages(run), 1):
        plans.append(Plan(f"answer{number}", "srt_answer", stage))
        plans += answers.chain("srt", stage, f"answer{number}", iterations, f"srt_{name}")
    return plans


def win_rates(run: Evaluation) -> dict:
    """comparisons, answers and srt of results.json."""
    names = [run.maker.make(plan).name for plan in _plans(run)]
    parsed = {name: [step.parsed for step in run.maker[f"srt_{name}"].steps] for name, _ in _stages(run)}
    done = run.context.workdir.done
    stages = ["critic_feedback", *(f"self_feedback_{i}" for i in range(1, run.context.config.num_rounds + 1))]
    return {
        "comparisons": _comparisons(run, names),
        "answers": {name: answer_statistics(run, name) for name in names},
        "srt": {
            "parse_rate": float(np.mean(parsed["stage1"])),
            "parse_rates": {name: float(np.mean(x)) for name, x in parsed.items()},
            "counts": {stage: done(stage)["causes"] for stage in stages},
            "feedback": {
                stage: {key: record[key] for key in FEEDBACK_KEYS if key in record}
                for stage in stages
                if (record := done(stage))
            },
        },
    }


FEEDBACK_KEYS = (
    "records",
    "causes",
    "parse_rate",
    "mean_scores",
    "mean_scores_by_round",
    "histograms",
    "read",
    "written",
    "truth",  # where there is a verifier
)


def _comparisons(run: Evaluation, names: Sequence[str]) -> dict:
    return {
        name: {
            judge.name: run.compare(judge, first, second)
            for judge in run.judges
            if judge.comparisons is None or name in judge.comparisons
        }
        for name, (first, second) in run.system.pairs(names).items()
    }


def self_scores(run: Evaluation) -> dict:
    """self_scores of results.json: agreement of M_self's scores with the labels (Table 5), what it gives to answers and
    refinements (Figure 3), and how good refinements of each score are (Figure 6)."""
    labelled = not sources.has_no_answers(run.rows)
    for plan in [*([Plan("rejected", "rejected")] if labelled else []), *_plans(run)]:
        run.maker.make(plan)
    found = {}
    for number, (name, _) in enumerate(_stages(run), 1):
        judge = make_judge(run.context, f"self_{name}", run.maker)
        sides = [judge.scores(run.maker[side]) for side in ("chosen", "rejected")] if labelled else []
        scored = [judge.scores(run.maker[made]) for made in (f"answer{number}", f"srt_{name}")]
        found[name] = {
            "no_score": int(sum(np.sum(x == 0) for x in (*sides, *scored))),
            "histograms": {
                made: [int(np.sum(np.round(x) == k)) for k in range(1, 11)]
                for made, x in zip(("answer", "refinement"), scored, strict=True)
            },
        }
        if labelled:
            chosen, rejected = sides
            # A tie is an error, as in the paper, and so is a pair of which a score is missing.
            both = np.where(rejected > 0, chosen, 0.0), np.where(chosen > 0, rejected, 1.0)
            found[name] |= {"agreement": agreement.accuracy(*both), "ties": float(np.mean(chosen == rejected))}
        if run.verifiable:
            truth = run.truth.scores(run.maker[f"srt_{name}"])
            found[name]["quality"] = [
                {
                    "score": k,
                    "n": int(np.sum(here)),
                    "share_met": float(truth[here].mean()),
                    "all_met": float(np.mean(truth[here] == 1)),
                }
                for k in range(1, 11)
                if np.any(here := np.round(scored[1]) == k)
            ]
    return {"self_scores": found}


def iterations(run: Evaluation) -> dict:
    """iterations of results.json: refinements of refinements, with all that they took (Table 2)."""
    K = run.num_iterations
    for plan in _plans(run, K):
        run.maker.make(plan)
    found = {}
    for number, (name, _) in enumerate(_stages(run), 1):
        tokens = written = 0.0
        found[f"srt_{name}"] = []
        for k, made in enumerate([f"answer{number}", *answers.chain_names(f"srt_{name}", K)]):
            steps = run.maker[made].steps
            tokens += float(np.mean([step.tokens for step in steps]))
            written += float(np.mean([step.written for step in steps]))
            statistics = answer_statistics(run, made)
            line = {"iteration": k, "answer": made, "tokens": tokens, "written": written}
            line |= {"copy_rate": statistics["copy_rate"], "length": statistics["tokens"]}
            line |= {key: statistics[key] for key in ("share_met", "all_met") if key in statistics}
            line["delta"] = {judge.name: run.compare(judge, made, "base") for judge in run.judges_of_all}
            found[f"srt_{name}"].append(line)
    return {"iterations": found}


def rerank(run: Evaluation) -> dict:
    """comparisons and answers of results.json: one refinement against the best of N answers by M_self's own scores
    (Figure 4)."""
    names = [run.maker.make(plan).name for plan in [*_plans(run), Plan("srt_rerank", "srt_rerank", "srt")]]
    comparison = {"srt_stage1_vs_rerank": ("srt_stage1", "srt_rerank")}
    return {
        "comparisons": {
            name: {judge.name: run.compare(judge, *sides) for judge in run.judges_of_all}
            for name, sides in comparison.items()
        },
        "answers": {"srt_rerank": answer_statistics(run, names[-1])},
        "num_candidates": run.context.config.evaluation.num_candidates,
    }


def arms(run: Evaluation) -> dict:
    """comparisons and answers of results.json: stage 1 without some parts (Table 6), on fewer sequences (Figure 5)."""
    context = run.context
    for plan in _plans(run):
        run.maker.make(plan)
    found: dict[str, dict] = {"comparisons": {}, "answers": {}, "missing": {}}
    for arm in srt.ARMS:
        if context.workdir.done(f"arm_{arm}") is None:
            found["missing"][f"{arm}_vs_base"] = f"{context.command} --config.arms={arm}"
            continue
        if arm == "all_but_refinement":
            made = run.maker.make(Plan(arm, "policy", f"arm_{arm}", temperature=0.0))  # refinements are greedy too
        else:
            run.maker.make(Plan(f"answer_{arm}", "srt_answer", f"arm_{arm}"))
            made = run.maker.make(Plan(arm, "srt", f"arm_{arm}", f"answer_{arm}"))
        found["answers"][arm] = answer_statistics(run, made.name)
        for other in ("base", "srt_stage1"):
            found["comparisons"][f"{arm}_vs_{other}"] = {
                judge.name: run.compare(judge, made.name, other) for judge in run.judges_of_all
            }
    return found


COMPARISONS = {
    "srt_stage1_vs_base": ("srt_stage1", "base"),
    "srt_stage2_vs_stage1": ("srt_stage2", "srt_stage1"),
    "srt_stage2_vs_base": ("srt_stage2", "base"),
    "srt_stage1_vs_base_greedy": ("srt_stage1", "base_greedy"),
    "srt_stage1_vs_answer1": ("srt_stage1", "answer1"),
    "srt_stage2_vs_answer2": ("srt_stage2", "answer2"),
    "answer1_vs_base": ("answer1", "base"),
    "answer2_vs_answer1": ("answer2", "answer1"),
    "refined_base_vs_base": ("refined_base", "base"),
    "base_greedy_vs_base": ("base_greedy", "base"),
    "base_vs_chosen": ("base", "chosen"),
    "srt_stage1_vs_rerank": ("srt_stage1", "srt_rerank"),
}
"""Name -> (first, second) answers."""


def _sample_chains(run: Evaluation) -> dict[str, list[str]]:
    sets = run.maker.sets
    chains = {
        f"srt_{name}": [f"answer{number}", *answers.chain_names(f"srt_{name}", run.num_iterations)]
        for number, (name, _) in enumerate(_stages(run), 1)
    }
    return {name: [made for made in chain if made in sets] for name, chain in chains.items()}


def _stage_names(config: SrtConfig) -> list[str]:
    names = srt.stage_names(config)
    return names + [f"arm_{arm}" for arm in srt.ARMS if f"arm_{arm}" not in names]


SYSTEM = System(
    tables={
        "win_rates": win_rates,  # Table 3
        "self_scores": self_scores,  # Table 5, Figures 3 and 6
        "iterations": iterations,  # Table 2
        "rerank": rerank,  # Figure 4
        "arms": arms,  # Table 6, Figure 5
    },
    judges=("verifier", "self_stage1", "self_stage2"),
    usual_judges=("verifier",),
    main_comparisons=("srt_stage1_vs_base", "srt_stage2_vs_stage1"),
    needs=lambda config: ["sft_policy", "srt", srt.final_stage(config)],
    make_judge=make_judge,
    truth=lambda run: "verifier" if run.verifiable else "self_stage1",
    comparisons=COMPARISONS,
    original="base",
    shown=(("response", "answer1"), ("refined ", "srt_stage1")),
    repeated="srt_stage1",
    chains=_sample_chains,
    stages=_stage_names,
)
