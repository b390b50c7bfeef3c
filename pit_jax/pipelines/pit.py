"""PIT: the stages of Algorithm 1, each resumable, each a function of the ones before.

data          rows, three folds, tokenizer                                   section 4.1, appendix D
pretrain      M_pre, where no checkpoint is named
sft_policy    M_P^SFT  from M_pre on x -> y_w                                section 3.2
sft_pit       M_PIT^SFT from M_pre on (x, y_l) -> y_w                        section 3.2
r_p           R_P by Bradley-Terry                                           section 3.3
r_pit         R_PIT by Equation 2                                            section 3.3
evaluator     a reward model on all folds, used for nothing but evaluation   section 4.3
rl_policy     M_P^RL by PPO                                                  Equation 3
rl_pit_1, ..  M_PIT^RL, one round per source of ref_response                 Equations 4 and 5
evaluate      Algorithm 2 and the tables                                     section 4
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax import optimizers, sampling, sharding, train_state
from pit_jax.config import PitConfig, PPOConfig, RewardModelConfig, SamplingConfig
from pit_jax.data import (
    batches,
    encode,
    verifier,
)
from pit_jax.files import write_text_atomic
from pit_jax.learners import loop, ppo, reward_model
from pit_jax.models import lora
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines import common
from pit_jax.pipelines.common import Context, policy_groups
from pit_jax.pipelines.samples import Ids
from pit_jax.pipelines.stages import choose_by_kl_bin
from pit_jax.types import Params, PreferenceExample, Rollout

FIRST_STAGE = {
    "lora": "sft_policy",
    "sft_policy": "sft_policy",
    "sft_pit": "sft_pit",
    "r_p": "r_p",
    "r_pit": "r_pit",
    "evaluator": "evaluator",
    "ppo": "rl_policy",
    "ppo_pit": "rl_pit_1",
    "curriculum": "rl_pit_1",
    "srt_workdir": "rl_pit_1",
    "evaluation": "evaluate",
}
"""Field of the config -> the first stage that reads it; all other fields are read from the start."""


def stage_names(config: PitConfig) -> list[str]:
    """All stages of a config in order."""
    pretrain = [] if config.pretrain.checkpoint else [name for name, _ in common.pretrained_models(config)]
    rounds = [f"rl_pit_{i}" for i in range(1, len(config.curriculum) + 1)]
    arms = [f"arm_{arm}" for arm in config.arms]
    gap = [] if config.r_pit.loss == "r_p_difference" else ["r_pit"]
    middle = ["sft_policy", "sft_pit", "r_p", *gap, "evaluator", "rl_policy", *rounds, *arms]
    return ["data", *pretrain, *middle, "evaluate"]


# ------------------------------------------------------------------------------------------------------- likelihood


def sft_pit_rows(
    encoder: encode.Encoder, rows: Sequence[PreferenceExample], chain_of_thought: bool = False
) -> list[batches.Turns]:
    """(x, y_l) -> y_w, or c, y_w (appendix K)."""
    target = lambda r: f"{r.reflection}\n{r.chosen}" if chain_of_thought else r.chosen  # noqa: E731
    return [(encoder.pit_prompt(r.prompt, r.rejected), encoder.response(target(r))) for r in rows]


def unlikely_rows(encoder: encode.Encoder, rows: Sequence[PreferenceExample]) -> list[batches.Turns]:
    """(x, y_w) -> y_l, (x, y_l) -> y_l and (x, y_w) -> y_w of section 3.2, in turn."""
    return [unlikely_row(encoder, i, row) for i, row in enumerate(rows)]


def unlikely_row(encoder: encode.Encoder, i: int, row: PreferenceExample) -> batches.Turns:
    """That of row number i."""
    ref_response, response = ((row.chosen, row.rejected), (row.rejected,) * 2, (row.chosen,) * 2)[i % 3]
    return encoder.pit_prompt(row.prompt, ref_response), encoder.response(response)


def sft_pit_stage(context: Context, stage: str) -> dict:
    """M_PIT^SFT: -sum log M_PIT(y_w | x, y_l), with the options of section 3.2 and appendix K."""
    e, config = context.encoder, context.config
    settings = dataclasses.replace(config.sft_pit, chain_of_thought=has_thoughts(config, stage))
    examples = context.rows["sft"]
    rows = batches.Rows(examples, lambda row: sft_pit_rows(e, [row], settings.chain_of_thought)[0])
    unlikely = batches.Rows([*enumerate(examples)] if settings.unlikelihood else [], lambda x: unlikely_row(e, *x))
    start = lambda: common.load_pretrained(context, config.pit_model)  # noqa: E731
    base = common.pretrained_base(config, config.pit_model)
    return common.likelihood_stage(context, stage, config.pit_model, settings, rows, base, start, unlikely=unlikely)


# ---------------------------------------------------------------------------------------------------- reward models


def gap_groups(encoder: encode.Encoder, rows: Sequence[PreferenceExample]) -> list[tuple[list[int], ...]]:
    """R_PIT(x, y_1, y_2) of the four pairings, formatted <<Candidate>> y_2 <<Improved>> y_1 (appendix A)."""
    form = lambda x, y1, y2: encoder.pit_prompt(x, y2) + encoder.response(y1)  # noqa: E731
    w, l = (lambda r: r.chosen), (lambda r: r.rejected)
    pairings = ((w, l), (w, w), (l, l), (l, w))
    return [tuple(form(r.prompt, y1(r), y2(r)) for y1, y2 in pairings) for r in rows]


def gap_stage(config: PitConfig) -> str:
    """The stage whose reward model gives r_gap."""
    return "r_p" if config.r_pit.loss == "r_p_difference" else "r_pit"


def gap_scorer(context: Context) -> Callable[..., np.ndarray]:
    """r_gap by R_PIT, or as r(x, y_1) - r(x, y_2) by R_P where the config says so (appendix C).

    Returns:
      score(triples, pairings=1): (x, y_1 ids, y_2 ids) without EOS -> r_gap(x, y_1, y_2), [len(triples) / pairings,
      pairings]; those of one line share what they begin alike with.
    """
    e = context.encoder
    eos = e.tokenizer.eos_id
    stage = gap_stage(context.config)
    by_difference = stage == "r_p"
    model, params = common.model_of(context, stage), common.load_model(context, stage)

    def score(triples: Sequence[tuple[str, Sequence[int], Sequence[int]]], pairings: int = 1) -> np.ndarray:
        if not triples:
            return np.zeros((0, pairings), np.float32)
        if by_difference:
            form = lambda x, y: [*e.policy_prompt(x), *y, eos]  # noqa: E731
            scores = common.score_groups(model, params, [(form(x, y1), form(x, y2)) for x, y1, y2 in triples])
            return (scores[:, 0] - scores[:, 1]).reshape(-1, pairings)
        rows = [[*e.pit_prompt(x, y2), *y1, eos] for x, y1, y2 in triples]
        return common.score_groups(model, params, [rows[i : i + pairings] for i in range(0, len(rows), pairings)])

    return score


Gains = Callable[[Sequence[str], Sequence[Ids], Sequence[Ids]], list[tuple[float, float, int]]]
"""(prompts, answers, the ones before) -> (gap, gain, tokens read) of each."""


def make_gains(context: Context) -> Gains:
    """Gaps and gains by R_PIT, or by the difference of R_P where the config has no R_PIT."""
    e, score = context.encoder, gap_scorer(context)

    def gains(xs, ys, refs):
        triples = [t for x, y, ref in zip(xs, ys, refs, strict=True) for t in ((x, y, ref), (x, ref, ref))]
        gaps = score(triples, pairings=2)
        # What both pairings begin with is read once.
        prompt = e.pit_prompt if gap_stage(context.config) == "r_pit" else lambda x, _: e.policy_prompt(x)
        read = [len(prompt(x, ref)) + len(y) + len(ref) + 2 for x, y, ref in zip(xs, ys, refs, strict=True)]
        return [(float(gap), float(gap - copy), n) for (gap, copy), n in zip(gaps, read, strict=True)]

    return gains


def reward_stage(
    context: Context,
    stage: str,
    settings: RewardModelConfig,
    make_groups: Callable,
    rows: Sequence[PreferenceExample],
) -> dict:
    """Trains R_P or R_PIT and keeps the checkpoint with the best accuracy on the selection rows (appendix F)."""
    config, e = context.config, context.encoder
    model = ScalarModel(common.sized(config.reward_model, e))
    if settings.start_from == "r_p":
        params, base = common.load_model(context, "r_p"), "models/r_p"
    else:
        if settings.start_from == "pretrain":
            base = common.pretrained_base(config, config.reward_model)
            backbone = common.load_pretrained(context, config.reward_model)["params"]
        else:
            source, sizes = ("sft_pit", config.pit_model) if stage == "r_pit" else ("sft_policy", config.policy_model)
            if sizes != config.reward_model:
                raise ValueError(f"{stage}.start_from=sft needs config.reward_model equal to the sizes of {source}")
            backbone, base = common.load_model(context, source)["params"], f"models/{source}"
        backbone = {k: v for k, v in backbone.items() if k != "unembedding"}
        head = common.init_params(model, common.key_of(config, stage), without="backbone")["params"]
        params = {"params": head | {"backbone": backbone}}

    groups = batches.Rows(rows, lambda row: make_groups(e, [row])[0])
    sizes = batches.group_sizes(groups)
    length = settings.sequence_length
    num_rows = int(np.sum(sizes[:, 0] <= length)) if length else len(rows)
    num_steps = settings.num_steps or max(1, round(settings.num_epochs * num_rows / settings.batch_size))
    of_data = groups, sizes, settings.batch_size, common.seed_of(config, stage), num_steps
    if length:
        if num_rows < len(rows):
            print(f"  {len(rows) - num_rows} of {len(rows)} rows are longer than {length} tokens and dropped")
        pieces = settings.accumulation * sharding.mesh_shape()["data"]
        batch_at, padding = batches.make_packed_score_batch_at(*of_data, length, pieces)
        print(f"  packed into sequences of {length} tokens, {padding:.0%} of them padding", flush=True)
    else:
        batch_at = batches.make_score_batch_at(*of_data)
    optimizer = optimizers.make_optimizer(settings.optimizer, num_steps)
    candidates = context.workdir.candidates(stage)
    selection = make_groups(e, context.rows["selection"])

    def evaluate(state, step):
        scores = common.score_groups(model, state.params, selection)
        measured = {"accuracy": float(np.mean(scores[:, 0] > scores[:, -1])), "n": len(scores)}
        candidates.add(step, lora.trained(state.params), measured)
        context.writer.write(stage, step, {f"selection/{k}": v for k, v in measured.items()})

    params = loop.run(
        train_state.create(common.with_adapters(context, stage, params), optimizer),
        stage=stage,
        num_steps=num_steps,
        batch_at=batch_at,
        train_step=reward_model.make_train_step(
            model, optimizer, loss=settings.loss, accumulation=settings.accumulation
        ),
        directory=context.workdir.checkpoints(stage),
        writer=context.writer,
        profile=context.config.profile,
        save_every=settings.save_every,
        evaluate=evaluate,
        eval_every=settings.eval_every,
    ).params
    measured = candidates.all()
    best = max(measured, key=lambda step: (measured[step]["accuracy"], step))
    params = lora.with_trained(params, candidates.load(best, lora.trained(params)))
    common.leave_model(context, stage, params, base)
    accuracy = measured[best]["accuracy"]
    found = {"steps": num_steps, "rows": num_rows, "over_length": len(rows) - num_rows}
    return found | {"chosen_step": best, "selection_accuracy": accuracy}


def final_stage(config: PitConfig) -> str:
    """The stage that leaves M_PIT behind."""
    return f"rl_pit_{len(config.curriculum)}" if config.curriculum else "sft_pit"


def has_thoughts(config: PitConfig, stage: str) -> bool:
    """Whether the M_PIT of a stage writes c, y_w instead of y_w (appendix K)."""
    return config.sft_pit.chain_of_thought or stage == common.COT_ARM


# ------------------------------------------------------------------------------------------------------------------- RL


class References:
    """Where ref_response comes from in a round of the curriculum (section 3.4.1): pure functions of (rows, key).

    data: y_l and y_w of the data (Equation 4). policy: M_P^RL (Equation 5). pit: M_PIT of the round before improves
    M_P^RL (third round). policy_checkpoint: intermediate checkpoints of M_P's RL, in turn. srt: refinements that the
    critics of config.srt_workdir have written, in turn where a prompt has several; where a prompt has none, as those
    on which checkpoints are measured, the whole batch gets M_P^RL's answers.
    """

    def __init__(self, context: Context, source: str, previous: str, stage: str = ""):
        self.context, self.source = context, source
        self.model = common.model_of(context, "rl_policy")
        if source in ("policy", "pit", "srt"):
            self.policies = [common.load_model(context, "rl_policy")]
        elif source == "policy_checkpoint":
            start = common.shapes(self.model)
            if context.config.lora.rank:  # candidates are adapters alone
                start = common.with_adapters(context, "rl_policy", common.load_model(context, "sft_policy"))
            candidates = context.workdir.candidates("rl_policy")
            steps = sorted(candidates.all())[1:-1] or sorted(candidates.all())
            of_step = lambda step: lora.with_trained(start, candidates.load(step, lora.trained(start)))  # noqa: E731
            self.policies = [of_step(step) for step in steps]
        if source == "pit":
            self.pit_model, self.pit = common.model_of(context, previous), common.load_model(context, previous)
        if source == "srt":
            self.refinements = read_refinements(context, context.config.srt_workdir, stage)

    def rows(self, rows: Sequence[PreferenceExample], least: int) -> Sequence[PreferenceExample]:
        """The rows of a round: those that have a ref_response.

        Raises:
          ValueError: where fewer than `least` have one.
        """
        if self.source != "srt":
            return rows
        found = [row for row in rows if row.prompt in self.refinements]
        if len(found) < least:
            raise ValueError(
                f"srt_workdir={self.context.config.srt_workdir} has refinements for {len(found)} of the {len(rows)} "
                f"prompts of this round, and a batch takes {least}: stage 2 of a run of SRT on the same data and seed "
                "writes them (feedback/self_feedback_1.jsonl)"
            )
        return found

    def __call__(self, rows: Sequence[PreferenceExample], use_chosen: Sequence[bool], key: jax.Array, turn: int):
        """One ref_response (ids without EOS) per row."""
        e, config = self.context.encoder, self.context.config
        if self.source == "srt" and all(row.prompt in self.refinements for row in rows):
            return [(found := self.refinements[row.prompt])[turn % len(found)] for row in rows]
        if self.source == "data":
            answers = [r.chosen if c else r.rejected for r, c in zip(rows, use_chosen, strict=True)]
            return batches.Rows(answers, lambda y: e.response(y)[:-1])
        settings = SamplingConfig(max_new_tokens=config.data.response_window, temperature=config.ppo_pit.temperature)
        draw = functools.partial(common.sample, settings=settings, eos_id=e.tokenizer.eos_id, batch_size=len(rows))
        params = self.policies[turn % len(self.policies)]
        prompts = batches.Rows(rows, lambda r: e.policy_prompt(r.prompt))
        responses = draw(self.model, params, prompts, key, window=e.policy_window)
        if self.source == "pit":
            answered = [(r.prompt, y) for r, y in zip(rows, responses, strict=True)]
            prompts = batches.Rows(answered, lambda pair: e.pit_prompt(*pair))
            responses = draw(self.pit_model, self.pit, prompts, jax.random.fold_in(key, 1), window=e.pit_window)
        return responses


def read_refinements(context: Context, workdir: str, stage: str) -> dict[str, list[list[int]]]:
    """Prompt -> refinements in the records of a run of SRT, kept or not, as ids that fit the response window.

    They are copied at the first start of the stage: a run of SRT that goes on must not change the rows of this one.

    Raises:
      ValueError: where it has no records, or a line is none.
    """
    copy = context.workdir.root / "feedback" / f"{stage}.jsonl"
    if not copy.exists():
        lines = []
        for path in refinement_files(workdir):
            with open(path, encoding="utf-8") as file:
                try:
                    records = [json.loads(line) for line in file]
                    found = [(record["instruction"], record["refinement"]) for record in records]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path} has a line that is no record of SRT ({error!r})") from error
            lines += [json.dumps({"prompt": x, "refinement": y}, ensure_ascii=False) + "\n" for x, y in found if y]
        write_text_atomic(copy, "".join(lines))
    refinements: dict[str, list[list[int]]] = {}
    with open(copy, encoding="utf-8") as file:
        for line in map(json.loads, file):
            ids = context.encoder.response(line["refinement"])[:-1]
            if 0 < len(ids) < context.config.data.response_window:
                refinements.setdefault(line["prompt"], []).append(ids)
    return refinements


def refinement_files(workdir: str) -> list[Path]:
    """The records of a run of SRT.

    Raises:
      ValueError: where there are none.
    """
    paths = sorted(path for path in Path(workdir).glob("feedback/*.jsonl") if not path.stem.endswith(".unfinished"))
    if not paths:
        raise ValueError(f"config.srt_workdir={workdir}, but {workdir}/feedback has no records: name a run of SRT")
    return paths


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Prompts of one iteration: arrays for the device, rows and ref_responses for the text metrics."""

    arrays: ppo.RLBatch
    rows: Sequence[PreferenceExample]
    references: Sequence[Sequence[int]]


def text_metrics(context: Context, rollout: Rollout, batch: TextBatch) -> dict:
    """What only the text shows: the verifier's score (never trained on) and how often ref_response is copied.

    Args:
      context: of the run.
      rollout: the rows of it that this process holds (`sharding.own_part`); the others are read by the others.
      batch: what was continued.
    """
    own = sharding.own_rows(len(batch.rows))
    responses = common.response_ids(rollout, context.encoder.tokenizer.eos_id)
    counts = np.zeros((len(own), 3), np.int32)  # copies; requirements that are met, and all
    for count, i, y in zip(counts, own, responses, strict=True):
        row = batch.rows[i]
        if batch.references:
            count[0] = y == list(batch.references[i])
        if batch.rows[0].requirements:
            met = verifier.verify(row.requirements, context.encoder.text(y))
            count[1:] = sum(met), len(met)
    copies, met, asked = sharding.to_host(sharding.make_batch(len(batch.rows), lambda _: counts)).T
    metrics = {}
    if batch.references:
        metrics["copy_rate"] = (np.sum(copies), len(copies))
    if batch.rows[0].requirements:
        metrics["verifier/share_met"] = (sum(met / asked), len(met))
        metrics["verifier/all_met"] = (np.sum(met == asked), len(met))
    return metrics


def ppo_programs(
    model: Transformer, scorer: ScalarModel, settings: PPOConfig, by_difference: bool, max_new_tokens: int, eos_id: int
):
    """(optimizer of the policy, of the value model, the three programs of `ppo.make_ppo`)."""
    if by_difference:
        score = functools.partial(ppo.difference_scores, scorer)
    else:
        score = lambda params, rollout, _: ppo.rollout_scores(scorer, params, rollout)  # noqa: E731
    num_updates = settings.num_iterations * settings.num_epochs * settings.num_minibatches
    both = settings.policy_optimizer, settings.value_optimizer
    optimizer, value_optimizer = (optimizers.make_optimizer(of, num_updates) for of in both)
    made = ppo.make_ppo(
        model, Transformer(model.config, sharding.DECODE_RULES), scorer, score, optimizer, value_optimizer, settings,
        max_new_tokens=max_new_tokens, eos_id=eos_id,
    )  # fmt: skip
    return optimizer, value_optimizer, made


def rl_stage(
    context: Context,
    stage: str,
    settings: PPOConfig,
    start: str,
    references: References | None,
    programs: Callable = ppo_programs,
) -> dict:
    """PPO for M_P (no references) or for one round of M_PIT; KL to the SFT model throughout.

    Of the seconds of an iteration, seconds/rollout is the sampling, seconds/reward what reads the answers afterwards
    (ref_policy, reward model, value model), seconds/update the learning, seconds/data what comes before all these.

    Args:
      context: of the run.
      stage: rl_policy, rl_pit_1, ...
      settings: PPO settings.
      start: stage whose parameters the policy starts from; the reference policy is the SFT model in all rounds.
      references: source of ref_response.
      programs: `ppo_programs`, which may keep what it has made: rounds with the same settings are not traced twice.

    Returns:
      The record: candidates, KL bins and the chosen step.
    """
    config, e = context.config, context.encoder
    model = common.model_of(context, stage)
    by_difference = references is not None and config.r_pit.loss == "r_p_difference"
    reward_name = "r_p" if references is None or by_difference else "r_pit"
    scorer = common.model_of(context, reward_name)
    ref_name = "sft_policy" if references is None else "sft_pit"
    value_params = common.load_model(context, reward_name)["params"]
    heads = {k: v for k, v in value_params.items() if k != "backbone"}
    # With adapters, the state holds the models that it started from: no second copy of their weights is needed.
    has_adapters = config.lora.rank > 0
    ref_params = None if has_adapters and start == ref_name else common.load_model(context, ref_name)
    reward_params = None if has_adapters else common.load_model(context, reward_name)
    window = e.policy_window if references is None else e.pit_window
    rows, held = context.rows["rl"], common.selection_rows(context, settings.rollout_size)
    if references is not None:
        rows = references.rows(rows, settings.rollout_size // settings.samples_per_prompt)
    num_uses = 2 if references is not None and references.source == "data" else 1  # both y_l and y_w of each x

    key = common.key_of(config, stage)
    optimizer, value_optimizer, (sample, judge, update) = programs(
        model, scorer, settings, by_difference, config.data.response_window, e.tokenizer.eos_id
    )

    def batch_of(chosen_rows, use_chosen, key, turn, copies=1) -> TextBatch:
        repeat = lambda values: [value for value in values for _ in range(copies)]  # noqa: E731
        refs = () if references is None else references(chosen_rows, use_chosen, key, turn)
        if copies > 1:
            chosen_rows, refs = repeat(chosen_rows), batches.Rows(repeat(range(len(refs))), lambda i, of=refs: of[i])

        xs = [row.prompt for row in chosen_rows]
        form = lambda i: e.pit_prompt(xs[i], refs[i]) if refs else e.policy_prompt(xs[i])  # noqa: E731
        prompts = batches.Rows(range(len(xs)), form)
        length = batches.longest_prompt_length(prompts, window)
        make = lambda own: batches.prompt_rows([prompts[i] for i in own], length)  # noqa: E731
        arrays = ppo.RLBatch(sharding.make_batch(len(xs), make))
        if by_difference:
            plain = [e.policy_prompt(r.prompt) for r in chosen_rows]
            policy_prompts = batches.prompt_rows(plain, batches.round_up(e.policy_window))
            behind = sampling.append_ids(policy_prompts, refs, config.data.response_window, e.tokenizer.eos_id)
            arrays = arrays._replace(**sharding.shard_batch({"policy_prompts": policy_prompts, "references": behind}))
        return TextBatch(arrays, chosen_rows, refs)

    def batch_at(step: int) -> TextBatch:
        num_prompts = settings.rollout_size // settings.samples_per_prompt
        numbers = batches.row_numbers(len(rows) * num_uses, num_prompts, step, common.seed_of(config, stage))
        sampled = jax.random.fold_in(common.key_of(config, f"{stage}/references"), step)
        chosen_rows, use_chosen = [rows[n // num_uses] for n in numbers], [n % num_uses == 1 for n in numbers]
        return batch_of(chosen_rows, use_chosen, sampled, step, settings.samples_per_prompt)

    validation = batch_of(held, [i % 2 == 1 for i in range(len(held))], common.key_of(config, f"{stage}/selection"), 0)
    candidates = context.workdir.candidates(stage)

    def frozen(state: ppo.PPOState) -> tuple[Params, Params]:
        """(ref_policy, reward model)."""
        reward = reward_params or {"params": lora.base(state.value.params)["params"] | heads}
        return ref_params or lora.base(state.policy.params), reward

    def evaluate(state: ppo.PPOState, step: int) -> None:
        rollout = sample(state, validation.arrays, key)
        _, _, _, metrics = judge(state, *frozen(state), validation.arrays, rollout)
        measured = {name: float(metrics[name][0] / metrics[name][1]) for name in ("kl", "score", "length")}
        texts = text_metrics(context, sharding.own_part(rollout), validation)
        measured |= {name: float(value / weight) for name, (value, weight) in texts.items()}
        candidates.add(step, lora.trained(state.policy.params), measured)
        context.writer.write(stage, step, {f"selection/{k}": v for k, v in measured.items()})
        if step:
            _show(context, stage, step, rollout, validation)

    def train_step(state, batch: TextBatch):
        began = time.perf_counter()
        rollout = jax.block_until_ready(sample(state, batch.arrays, key))
        sampled = time.perf_counter()
        experience, _, statistics, metrics = judge(state, *frozen(state), batch.arrays, rollout)
        rollout = sharding.own_part(rollout)
        jax.block_until_ready(experience)
        judged = time.perf_counter()
        state, more = update(state, experience, statistics, metrics["kl"][0] / metrics["kl"][1], key)
        metrics |= more | text_metrics(context, rollout, batch)  # texts are read while the update runs
        jax.block_until_ready(state.step)
        seconds = {"rollout": sampled - began, "reward": judged - sampled, "update": time.perf_counter() - judged}
        return state, metrics | {f"seconds/{name}": (value, 1.0) for name, value in seconds.items()}

    # The value model starts as the reward model, with a head of zeros: rewards are normalised, raw scores are not.
    value_params = {"params": value_params | jax.tree.map(jnp.zeros_like, heads)}
    params = loop.run(
        ppo.create(
            common.with_adapters(context, stage, common.load_model(context, start)),
            common.with_adapters(context, stage, value_params, "value/lora"),
            optimizer,
            value_optimizer,
            settings.kl_coef,
        ),
        stage=stage,
        num_steps=settings.num_iterations,
        batch_at=batch_at,
        train_step=train_step,
        directory=context.workdir.checkpoints(stage),
        writer=context.writer,
        profile=context.config.profile,
        save_every=settings.save_every,
        evaluate=evaluate,
        eval_every=settings.eval_every,
    ).policy.params
    measured = candidates.all()
    chosen, winners = choose_by_kl_bin(measured, settings.num_kl_bins, settings.max_kl)
    params = lora.with_trained(params, candidates.load(chosen, lora.trained(params)))
    common.leave_model(context, stage, params, f"models/{start}")
    return {
        "steps": settings.num_iterations,
        "chosen_step": chosen,
        "kl_bins": winners,
        "candidates": {str(k): v for k, v in measured.items()},
    }


def _show(context: Context, stage: str, step: int, rollout: Rollout, batch: TextBatch) -> None:
    """Prints one answer and writes a few to samples/STAGE/STEP.jsonl."""
    e = context.encoder
    responses = common.response_ids(sharding.to_host(rollout), e.tokenizer.eos_id)
    lines = []
    for i in range(min(8, len(responses))):
        line = {"prompt": batch.rows[i].prompt, "response": e.text(responses[i])}
        if batch.references:
            line["ref_response"] = e.text(batch.references[i])
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text_atomic(context.workdir.root / "samples" / stage / f"{step}.jsonl", "".join(lines))
    i = step % len(responses)
    print(f"  [{stage} step {step}] {batch.rows[i].prompt}")
    if batch.references:
        print(f"    before: {e.text(batch.references[i])!r}")
    print(f"    {'after ' if batch.references else 'answer'}: {e.text(responses[i])!r}", flush=True)


# ------------------------------------------------------------------------------------------------------------------ run


def stage_functions(context: Context) -> dict[str, Callable[[], dict]]:
    """Every stage but the last, by name."""
    config = context.config
    functions: dict[str, Callable[[], dict]] = {"data": lambda: common.data_stage(context)}
    for stage, sizes in common.pretrained_models(config):
        functions[stage] = functools.partial(common.pretrain_stage, context, stage, sizes)
    functions["sft_policy"] = lambda: common.sft_policy_stage(context, "sft_policy", config.sft_policy)
    functions["sft_pit"] = lambda: sft_pit_stage(context, "sft_pit")
    fold = lambda name: context.rows[name]  # noqa: E731
    functions["r_p"] = lambda: reward_stage(context, "r_p", config.r_p, policy_groups, fold("rm"))
    functions["r_pit"] = lambda: reward_stage(context, "r_pit", config.r_pit, gap_groups, fold("rm"))
    everything = lambda: fold("sft") + fold("rm") + fold("rl")  # noqa: E731
    functions["evaluator"] = lambda: reward_stage(
        context, "evaluator", config.evaluator, common.policy_groups, everything()
    )
    functions["rl_policy"] = lambda: rl_stage(context, "rl_policy", config.ppo, "sft_policy", None)

    programs = functools.cache(ppo_programs)

    def pit_round(stage: str, source: str, previous: str) -> dict:
        references = References(context, source, previous, stage)
        return rl_stage(context, stage, config.ppo_pit, previous, references, programs=programs)

    previous = "sft_pit"
    for i, source in enumerate(config.curriculum, 1):
        functions[f"rl_pit_{i}"] = functools.partial(pit_round, f"rl_pit_{i}", source, previous)
        previous = f"rl_pit_{i}"
    functions["arm_second_rl_only"] = lambda: pit_round("arm_second_rl_only", "policy", "sft_pit")
    functions[common.COT_ARM] = lambda: sft_pit_stage(context, common.COT_ARM)
    functions["arm_longer_sft"] = lambda: common.sft_policy_stage(context, "arm_longer_sft", config.sft_pit)
    return functions


def check(config: PitConfig, todo: set[str]) -> None:
    """What must hold before anything is trained: the checkpoint to start from, and refinements of SRT, are there."""
    if todo - {"evaluate"}:
        common.check_start(config)
    if any(source == "srt" and f"rl_pit_{i}" in todo for i, source in enumerate(config.curriculum, 1)):
        refinement_files(config.srt_workdir)


def open_finished(root: str | Path, stages: Sequence[str], command: str = Context.command) -> Context:
    """Opens a workdir of PIT to use what it holds; its data are not read yet.

    Args:
      root: the workdir.
      stages: that must be done; "final" stands for the one that leaves M_PIT behind.
      command: what the user typed, for messages.

    Raises:
      ValueError: where it is no workdir of PIT, or a stage is not done.
    """
    context = common.open_workdir(root, command)
    if not isinstance(context.config, PitConfig):
        raise ValueError(f"--workdir={root} is a run of {context.config.name}, not of PIT")
    common.require(context, [final_stage(context.config) if stage == "final" else stage for stage in stages])
    return context


SYSTEM = common.System(stage_names, stage_functions, FIRST_STAGE, check)
