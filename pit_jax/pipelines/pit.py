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
import difflib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax import checkpoint, config as config_lib, optimizers, sampling, sharding, train_state
from pit_jax.config import ModelConfig, PitConfig, PPOConfig, RewardModelConfig, SamplingConfig, SFTConfig
from pit_jax.data import (
    batches,
    builders,
    encode,
    sources,
    synthetic,
    synthetic_text,
    templates,
    tokenizer as tokenizer_lib,
    verifier,
)
from pit_jax.files import read_json, write_text_atomic
from pit_jax.learners import loop, ppo, reward_model, sft
from pit_jax.metrics import MetricsWriter
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines.stages import FREE_FIELDS, Candidates, Workdir, choose_by_kl_bin, run_stage
from pit_jax.types import Params, PreferenceExample, Rollout

REWARD_STAGES = ("r_p", "r_pit", "evaluator")
COT_ARM = "arm_pit_sft_cot"
"""M_PIT^SFT with a chain of thought, beside one without (Figure 5)."""

FIRST_STAGE = {
    "sft_policy": "sft_policy",
    "sft_pit": "sft_pit",
    "r_p": "r_p",
    "r_pit": "r_pit",
    "evaluator": "evaluator",
    "ppo": "rl_policy",
    "ppo_pit": "rl_pit_1",
    "curriculum": "rl_pit_1",
    "evaluation": "evaluate",
}
"""Field of the config -> the first stage that reads it; all other fields are read from the start."""

SPLITS = ("sft", "rm", "rl", "selection", "test", "pretrain")


@dataclasses.dataclass
class Context:
    """What every stage reads.

    Attributes:
      config: of the run.
      workdir: where everything lies.
      writer: of metrics; None where nothing is trained.
      command: what the user typed to start the run, for messages.
      rows: split -> rows that fit the windows; filled by the data stage.
      encoder: text to ids; filled by the data stage.
    """

    config: PitConfig
    workdir: Workdir
    writer: MetricsWriter | None
    command: str = "python -m pit_jax.train --config=... --workdir=..."
    rows: dict[str, list[PreferenceExample]] = dataclasses.field(default_factory=dict)
    encoder: encode.Encoder | None = None


def stage_names(config: PitConfig) -> list[str]:
    """All stages of a config in order."""
    pretrain = [] if config.pretrain.checkpoint else [name for name, _ in pretrained_models(config)]
    rounds = [f"rl_pit_{i}" for i in range(1, len(config.curriculum) + 1)]
    arms = [f"arm_{arm}" for arm in config.arms]
    gap = [] if config.r_pit.loss == "r_p_difference" else ["r_pit"]
    middle = ["sft_policy", "sft_pit", "r_p", *gap, "evaluator", "rl_policy", *rounds, *arms]
    return ["data", *pretrain, *middle, "evaluate"]


def pretrained_models(config: PitConfig) -> list[tuple[str, ModelConfig]]:
    """(stage, sizes) of each M_pre: one per distinct size (appendix J allows other sizes for PIT and rewards)."""
    found: dict[ModelConfig, str] = {}
    for name, sizes in (("", config.policy_model), ("_pit", config.pit_model), ("_reward", config.reward_model)):
        found.setdefault(sizes, f"pretrain{name}")
    return [(stage, sizes) for sizes, stage in found.items()]


def key_of(config: PitConfig, purpose: str) -> jax.Array:
    """A PRNG key per purpose, from the seed and a stable hash of the name."""
    number = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    return jax.random.fold_in(jax.random.key(config.seed), number)


def seed_of(config: PitConfig, purpose: str) -> int:
    """A NumPy seed per purpose."""
    return int.from_bytes(hashlib.sha256(f"{config.seed}/{purpose}".encode()).digest()[:4], "big")


# ---------------------------------------------------------------------------------------------------------------- data


def data_stage(context: Context) -> dict:
    """Writes rows and tokenizer, drops rows over the windows, and reports what a surface cue would get."""
    config, root = context.config, context.workdir.root / "data"
    shutil.rmtree(root, ignore_errors=True)  # of a start that was killed: the stage is not done
    if config.data.source == "synthetic":
        builders.write_synthetic(
            root,
            seed=config.seed,
            size=config.data.size,
            num_selection=config.data.num_selection,
            num_test=config.data.num_test,
            num_pretrain=config.data.num_pretrain,
        )
        counts: dict[str, int] = {}
    else:
        rows, counts = sources.read(config.data.path, config.data.format)
        rest, selection, test = sources.split_off(rows, config.data.num_selection, config.data.num_test, config.seed)
        folds = sources.folds(rest, config.seed)
        splits = dict(zip(SPLITS, (*folds, selection, test, []), strict=True))
        for name, split in splits.items():
            lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in split]
            write_text_atomic(root / f"{name}.jsonl", "".join(lines))
    raw = read_rows(config, root)
    if config.tokenizer.path:
        tokenizer_lib.load(config.tokenizer.path)  # says what is wrong with the file
        model = Path(config.tokenizer.path).read_bytes()
    else:
        # From the first fold alone (section 4.1's D_SFT): the others must stay unseen until their stage.
        texts = [text for row in raw["sft"] for text in (row.prompt, row.rejected, row.chosen, row.reflection)]
        if config.data.source == "synthetic":
            # Each word of the lexicon and of the templates whole, in its three cases.
            texts += synthetic_text.word_forms(templates.literals(config.data.templates))
        model = tokenizer_lib.train(texts, config.tokenizer.vocab_size)
    (root / "tokenizer.model").write_bytes(model)
    encoder = encode.make_encoder(tokenizer_lib.load(root / "tokenizer.model"), config.data)
    record: dict[str, Any] = {"steps": 0, "rows": {}, "over_length": {}, "skipped": counts}
    for name, split in raw.items():
        kept, dropped = encode.drop_over_length(split, encoder)
        context.rows[name] = kept
        record["rows"][name] = len(kept)
        if dropped:
            record["over_length"][name] = dropped
    context.encoder = encoder
    record["vocab_size"] = encoder.tokenizer.vocab_size
    if config.data.source == "synthetic":
        record["surface_baselines"] = synthetic.surface_baselines(raw["rm"] + raw["rl"], raw["sft"])
    print(f"  rows {record['rows']}, over the windows and dropped: {record['over_length'] or 'none'}")
    if counts:
        print(f"  rows of the source that were left out: {counts}")
    if "surface_baselines" in record:
        shares = ", ".join(f"{k} {v:.3f}" for k, v in record["surface_baselines"].items())
        print(f"  y_w told from y_l without the prompt: {shares}", flush=True)
    empty = [name for name in ("sft", "rm", "rl", "selection", "test") if not record["rows"][name]]
    if empty:
        raise ValueError(f"no rows are left in {', '.join(empty)}: widen config.data.*_window or give more rows")
    return record


def read_rows(config: PitConfig, root: Path, splits: Sequence[str] = SPLITS) -> dict[str, list[PreferenceExample]]:
    """Splits that the data stage has written."""
    if config.data.source == "synthetic":
        return {name: builders.read(root, name) for name in splits}
    read = lambda path: sources.read_jsonl(path)[0] if path.stat().st_size else []  # noqa: E731
    return {name: read(root / f"{name}.jsonl") for name in splits}


def load_encoder(context: Context) -> None:
    """Fills `encoder` from a finished data stage."""
    model = context.workdir.root / "data" / "tokenizer.model"
    context.encoder = encode.make_encoder(tokenizer_lib.load(model), context.config.data)


def prompt_ending(context: Context, prompt: str) -> str:
    """What a prompt lacks at its end to look as those that the models learnt from: a blank line after dialogues."""
    if context.config.data.source == "synthetic" or prompt.endswith("\n\n"):
        return ""
    with open(context.workdir.root / "data" / "sft.jsonl", encoding="utf-8") as file:
        learnt = json.loads(next(file))["prompt"]
    return "\n\n" if learnt.endswith("\n\n") else ""


def load_data(context: Context, splits: Sequence[str] = SPLITS) -> None:
    """Fills `rows` and `encoder` from a finished data stage."""
    load_encoder(context)
    raw = read_rows(context.config, context.workdir.root / "data", splits)
    context.rows = {name: encode.drop_over_length(split, context.encoder)[0] for name, split in raw.items()}


# ------------------------------------------------------------------------------------------------------- likelihood


def init_params(module: Transformer | ScalarModel, key: jax.Array) -> Params:
    """Parameters born in their layout on the mesh."""
    rows = sharding.mesh_shape().get("data", 1)
    one = jnp.zeros((rows, 8), jnp.int32)
    one = jax.device_put(one, module.rules.spec("batch", None))
    method = Transformer.full_logits if isinstance(module, Transformer) else None
    return jax.jit(lambda k: module.init(k, one, one, one, method=method))(key)


def shapes(module: Transformer | ScalarModel) -> Params:
    """Shapes and shardings of a module's parameters, for restoring them."""
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0)))


def sized(config: ModelConfig, encoder: encode.Encoder) -> ModelConfig:
    """The sizes with the vocabulary that the tokenizer really has, rounded up for the matrix units."""
    return dataclasses.replace(config, vocab_size=batches.round_up(encoder.tokenizer.vocab_size, 128))


def likelihood_stage(
    context: Context,
    stage: str,
    sizes: ModelConfig,
    settings: SFTConfig,
    rows: Sequence[batches.Turns],
    start: Callable[[], Params],
    *,
    loss_on_prompt: bool = False,
    unlikely: Sequence[batches.Turns] = (),
) -> dict:
    """Trains a decoder on rows of (prompt ids, response ids) or more turns: the last parameters stay (appendix F)."""
    rng = np.random.default_rng(seed_of(context.config, f"{stage}/order"))
    order = rng.permutation(len(rows))
    rows = [rows[i] for i in order]
    over_length = 0
    if settings.sequence_length and not unlikely:
        fitting = [row for row in rows if batches.num_tokens(row) <= settings.sequence_length]
        over_length, rows = len(rows) - len(fitting), fitting
        if over_length:
            print(f"  {over_length} of {len(order)} rows are longer than {settings.sequence_length} tokens and dropped")
        arrays = batches.packed_rows(rows, settings.sequence_length, loss_on_prompt=loss_on_prompt)
    else:
        length = batches.round_up(max(batches.num_tokens(row) for row in (*rows, *unlikely)))
        arrays = batches.token_rows(rows, length, loss_on_prompt=loss_on_prompt)
    data = sft.SFTBatch(arrays)
    if unlikely:  # the three rows of section 3.2 for each likely one, side by side
        data = sft.SFTBatch(arrays, batches.token_rows([unlikely[i] for i in order], length))
    num_sequences = len(arrays.tokens)
    num_targets = batches.round_up(max(int(b.loss_mask.sum(1).max()) for b in data if b is not None), 16)
    num_steps = settings.num_steps or max(1, round(settings.num_epochs * num_sequences / settings.batch_size))
    model = Transformer(sized(sizes, context.encoder))
    optimizer = optimizers.make_optimizer(settings.optimizer, num_steps)
    train_step = sft.make_train_step(
        model, optimizer, unlikelihood=settings.unlikelihood, num_targets=num_targets, chunk_size=settings.chunk_size,
        accumulation=settings.accumulation,
    )  # fmt: skip
    state = loop.run(
        train_state.create(start(), optimizer),
        stage=stage,
        num_steps=num_steps,
        batch_at=batches.make_batch_at(data, settings.batch_size, seed_of(context.config, stage)),
        train_step=train_step,
        directory=context.workdir.checkpoints(stage),
        writer=context.writer,
        save_every=settings.save_every,
    )
    context.workdir.save_model(stage, state.params)
    return {"steps": num_steps, "rows": len(rows), "sequences": num_sequences, "over_length": over_length}


def pretraining_rows(context: Context) -> list[tuple[list[int], ...]]:
    """M_pre's text: dialogues in which an answer is followed by its review, and some reviews by a better answer.

    (x, y_w, c of y_w), or (x, y_l, c, y_w): the two forms of Self-Refine. A review stands directly behind the answer's
    EOS, where a reward model reads its score. A row of preference data that has no reflection (real data) gives two
    plain rows. Text of the world is good and bad: y_l is learnt too, where `pretrain.learn_rejected` says so, and then
    M_P's mistakes are like those of y_l.
    """
    e, share = context.encoder, context.config.pretrain.refinement_share
    examples = context.rows["pretrain"] or context.rows["sft"]
    rows: list[tuple[list[int], ...]] = []
    for i, row in enumerate(examples):
        good, bad = e.response(row.chosen), e.response(row.rejected)
        if not row.reflection:
            rows += [(e.policy_prompt(row.prompt), y) for y in (good, bad)]
        elif np.random.default_rng([seed_of(context.config, "pretrain/form"), i]).random() < share:
            read = e.reflection_prompt(row.prompt, bad[:-1])
            ask = e.refinement_prompt(row.prompt, bad[:-1], row.reflection)
            review = e.response(row.reflection)
            behind = len(read) + len(review)
            if ask[:behind] != read + review:
                raise ValueError("templates: refinement.txt must go on where reflection.txt, {feedback}<<End>> end")
            if context.config.pretrain.learn_rejected:
                if read != e.policy_prompt(row.prompt) + bad:
                    raise ValueError("templates: reflection.txt must be policy.txt, {response}<<End>>")
                read, review = e.policy_prompt(row.prompt), bad + review
            rows.append((read, review, ask[behind:], good))
        else:
            all_met = synthetic.reflect(row.requirements, [True] * len(row.requirements))
            rows.append((e.policy_prompt(row.prompt), good + e.response(all_met)))
    return rows


def pretrain_stage(context: Context, stage: str, sizes: ModelConfig) -> dict:
    """M_pre from scratch."""
    settings = context.config.pretrain.sft
    model = Transformer(sized(sizes, context.encoder))
    start = lambda: init_params(model, key_of(context.config, stage))  # noqa: E731
    rows = pretraining_rows(context)
    return likelihood_stage(context, stage, sizes, settings, rows, start, loss_on_prompt=settings.loss_on_prompt)


def load_pretrained(context: Context, sizes: ModelConfig) -> Params:
    """M_pre of a size: of this run's pretrain stage, or of config.pretrain.checkpoint."""
    like = shapes(Transformer(sized(sizes, context.encoder)))
    if context.config.pretrain.checkpoint:
        path = Path(context.config.pretrain.checkpoint)
        if checkpoint.latest_step(path) is None:
            raise ValueError(f"config.pretrain.checkpoint={path} holds no checkpoint: name a models/pretrain")
        return checkpoint.restore(path, checkpoint.latest_step(path), like)
    stage = {sizes: stage for stage, sizes in pretrained_models(context.config)}[sizes]
    return context.workdir.load_model(stage, like)


def sft_policy_stage(context: Context, stage: str, settings: SFTConfig) -> dict:
    """M_P^SFT: -sum log M_P(y_w | x)."""
    e, config = context.encoder, context.config
    rows = [(e.policy_prompt(r.prompt), e.response(r.chosen)) for r in context.rows["sft"]]
    start = lambda: load_pretrained(context, config.policy_model)  # noqa: E731
    return likelihood_stage(context, stage, config.policy_model, settings, rows, start)


def sft_pit_stage(context: Context, stage: str) -> dict:
    """M_PIT^SFT: -sum log M_PIT(y_w | x, y_l), with the options of section 3.2 and appendix K."""
    e, config = context.encoder, context.config
    settings = dataclasses.replace(config.sft_pit, chain_of_thought=has_thoughts(config, stage))
    rows = []
    for r in context.rows["sft"]:
        target = f"{r.reflection}\n{r.chosen}" if settings.chain_of_thought else r.chosen
        rows.append((e.pit_prompt(r.prompt, r.rejected), e.response(target)))
    unlikely = []
    if settings.unlikelihood:
        terms = ((lambda r: (r.chosen, r.rejected)), (lambda r: (r.rejected,) * 2), (lambda r: (r.chosen,) * 2))
        for i, r in enumerate(context.rows["sft"]):  # the three terms in turn
            ref_response, response = terms[i % 3](r)
            unlikely.append((e.pit_prompt(r.prompt, ref_response), e.response(response)))
    start = lambda: load_pretrained(context, config.pit_model)  # noqa: E731
    return likelihood_stage(context, stage, config.pit_model, settings, rows, start, unlikely=unlikely)


# ---------------------------------------------------------------------------------------------------- reward models


def policy_groups(encoder: encode.Encoder, rows: Sequence[PreferenceExample]) -> list[tuple[list[int], ...]]:
    """R_P(x, y_w), R_P(x, y_l)."""
    form = lambda x, y: encoder.policy_prompt(x) + encoder.response(y)  # noqa: E731
    return [(form(r.prompt, r.chosen), form(r.prompt, r.rejected)) for r in rows]


def gap_groups(encoder: encode.Encoder, rows: Sequence[PreferenceExample]) -> list[tuple[list[int], ...]]:
    """R_PIT(x, y_1, y_2) of the four pairings, formatted <<Candidate>> y_2 <<Improved>> y_1 (appendix A)."""
    form = lambda x, y1, y2: encoder.pit_prompt(x, y2) + encoder.response(y1)  # noqa: E731
    w, l = (lambda r: r.chosen), (lambda r: r.rejected)
    pairings = ((w, l), (w, w), (l, l), (l, w))
    return [tuple(form(r.prompt, y1(r), y2(r)) for y1, y2 in pairings) for r in rows]


@functools.cache
def _jitted_scores(model: ScalarModel):
    return jax.jit(functools.partial(reward_model.group_scores, model))


def score_groups(
    model: ScalarModel, params: Params, groups: Sequence[Sequence[Sequence[int]]], batch_size: int = 64
) -> np.ndarray:
    """Scores [len(groups), C] of rows of ids, in batches of one shape."""
    if not groups:
        return np.zeros((0, 0), np.float32)
    data = batches.score_rows(groups, 32)
    batch_size = batches.round_up(batch_size, sharding.mesh_shape().get("data", 1))
    out = []
    for start in range(0, len(groups), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(groups) - 1)
        batch = sharding.shard_batch(jax.tree.map(lambda x: x[rows], data))  # noqa: B023
        out.append(np.asarray(_jitted_scores(model)(params, batch)))
    return np.concatenate(out)[: len(groups)]


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
    model, params = model_of(context, stage), load_model(context, stage)

    def score(triples: Sequence[tuple[str, Sequence[int], Sequence[int]]], pairings: int = 1) -> np.ndarray:
        if not triples:
            return np.zeros((0, pairings), np.float32)
        if by_difference:
            form = lambda x, y: [*e.policy_prompt(x), *y, eos]  # noqa: E731
            scores = score_groups(model, params, [(form(x, y1), form(x, y2)) for x, y1, y2 in triples])
            return (scores[:, 0] - scores[:, 1]).reshape(-1, pairings)
        rows = [[*e.pit_prompt(x, y2), *y1, eos] for x, y1, y2 in triples]
        return score_groups(model, params, [rows[i : i + pairings] for i in range(0, len(rows), pairings)])

    return score


def reward_stage(
    context: Context,
    stage: str,
    settings: RewardModelConfig,
    make_groups: Callable,
    rows: Sequence[PreferenceExample],
) -> dict:
    """Trains R_P or R_PIT and keeps the checkpoint with the best accuracy on the selection rows (appendix F)."""
    config, e = context.config, context.encoder
    model = ScalarModel(sized(config.reward_model, e))
    if settings.start_from == "r_p":
        params = load_model(context, "r_p")
    else:
        if settings.start_from == "pretrain":
            backbone = load_pretrained(context, config.reward_model)["params"]
        else:
            source, sizes = ("sft_pit", config.pit_model) if stage == "r_pit" else ("sft_policy", config.policy_model)
            if sizes != config.reward_model:
                raise ValueError(f"{stage}.start_from=sft needs config.reward_model equal to the sizes of {source}")
            backbone = load_model(context, source)["params"]
        backbone = {k: v for k, v in backbone.items() if k != "unembedding"}
        params = {"params": {**init_params(model, key_of(config, stage))["params"], "backbone": backbone}}

    groups = make_groups(e, rows)
    num_steps = settings.num_steps or max(1, round(settings.num_epochs * len(rows) / settings.batch_size))
    optimizer = optimizers.make_optimizer(settings.optimizer, num_steps)
    candidates = Candidates(context.workdir.candidates(stage))
    selection = make_groups(e, context.rows["selection"])

    def evaluate(state, step):
        scores = score_groups(model, state.params, selection)
        measured = {"accuracy": float(np.mean(scores[:, 0] > scores[:, -1])), "n": len(scores)}
        candidates.add(step, state.params, measured)
        context.writer.write(stage, step, {f"selection/{k}": v for k, v in measured.items()})

    loop.run(
        train_state.create(params, optimizer),
        stage=stage,
        num_steps=num_steps,
        batch_at=batches.make_score_batch_at(batches.score_rows(groups), settings.batch_size, seed_of(config, stage)),
        train_step=reward_model.make_train_step(
            model, optimizer, loss=settings.loss, accumulation=settings.accumulation
        ),
        directory=context.workdir.checkpoints(stage),
        writer=context.writer,
        save_every=settings.save_every,
        evaluate=evaluate,
        eval_every=settings.eval_every,
    )
    measured = candidates.all()
    best = max(measured, key=lambda step: (measured[step]["accuracy"], step))
    context.workdir.save_model(stage, candidates.load(best, params))
    accuracy = measured[best]["accuracy"]
    return {"steps": num_steps, "rows": len(rows), "chosen_step": best, "selection_accuracy": accuracy}


# ---------------------------------------------------------------------------------------------------- models, sampling


def model_of(context: Context, stage: str) -> Transformer | ScalarModel:
    """The module whose parameters a stage leaves behind."""
    config, e = context.config, context.encoder
    if stage in REWARD_STAGES:
        return ScalarModel(sized(config.reward_model, e))
    is_pit = stage in ("sft_pit", "arm_second_rl_only", COT_ARM) or stage.startswith("rl_pit")
    return Transformer(sized(config.pit_model if is_pit else config.policy_model, e))


def load_model(context: Context, stage: str) -> Params:
    """The parameters of a finished stage."""
    return context.workdir.load_model(stage, shapes(model_of(context, stage)))


@functools.cache
def jitted_generate(model: Transformer, settings: SamplingConfig, eos_id: int):
    """`sampling.generate` as a compiled function of (params, prompts, key)."""
    decode_model = Transformer(model.config, sharding.DECODE_RULES)

    def run(params, prompts, key):
        gathered = sharding.gather_weights(params, model.rules)
        return sampling.generate(gathered, prompts, key, model=decode_model, config=settings, eos_id=eos_id)

    return jax.jit(run)


def sample(
    model: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    window: int,
    settings: SamplingConfig,
    eos_id: int,
    batch_size: int = 128,
) -> list[list[int]]:
    """One response per prompt as ids without EOS, in batches of one shape."""
    responses: list[list[int]] = []
    for i, start in enumerate(range(0, len(prompts), batch_size)):
        chunk = [prompts[min(j, len(prompts) - 1)] for j in range(start, start + batch_size)]
        batch = sharding.shard_batch(batches.prompt_rows(chunk, batches.round_up(window)))
        rollout = jitted_generate(model, settings, eos_id)(params, batch, jax.random.fold_in(key, i))
        responses += response_ids(jax.device_get(rollout), eos_id)
    return responses[: len(prompts)]


def response_ids(rollout: Rollout, eos_id: int) -> list[list[int]]:
    """Ids of the responses of a rollout on the host, without EOS."""
    R = rollout.response_mask.shape[1]
    rows = zip(rollout.tokens[:, -R:], rollout.response_mask, strict=True)
    return [[int(t) for t, m in zip(tokens, mask, strict=True) if m and t != eos_id] for tokens, mask in rows]


def final_stage(config: PitConfig) -> str:
    """The stage that leaves M_PIT behind."""
    return f"rl_pit_{len(config.curriculum)}" if config.curriculum else "sft_pit"


def has_thoughts(config: PitConfig, stage: str) -> bool:
    """Whether the M_PIT of a stage writes c, y_w instead of y_w (appendix K)."""
    return config.sft_pit.chain_of_thought or stage == COT_ARM


# ------------------------------------------------------------------------------------------------------------------- RL


class References:
    """Where ref_response comes from in a round of the curriculum (section 3.4.1): pure functions of (rows, key).

    data: y_l and y_w of the data (Equation 4). policy: M_P^RL (Equation 5). pit: M_PIT of the round before improves
    M_P^RL (third round). policy_checkpoint: intermediate checkpoints of M_P's RL, in turn.
    """

    def __init__(self, context: Context, source: str, previous: str):
        self.context, self.source = context, source
        self.model = model_of(context, "rl_policy")
        if source in ("policy", "pit"):
            self.policies = [load_model(context, "rl_policy")]
        elif source == "policy_checkpoint":
            like = shapes(self.model)
            candidates = Candidates(context.workdir.candidates("rl_policy"))
            steps = sorted(candidates.all())[1:-1] or sorted(candidates.all())
            self.policies = [candidates.load(step, like) for step in steps]
        if source == "pit":
            self.pit_model, self.pit = model_of(context, previous), load_model(context, previous)

    def __call__(self, rows: Sequence[PreferenceExample], use_chosen: Sequence[bool], key: jax.Array, turn: int):
        """One ref_response (ids without EOS) per row."""
        e, config = self.context.encoder, self.context.config
        if self.source == "data":
            return [e.response(r.chosen if c else r.rejected)[:-1] for r, c in zip(rows, use_chosen, strict=True)]
        settings = SamplingConfig(max_new_tokens=config.data.response_window, temperature=config.ppo_pit.temperature)
        draw = functools.partial(sample, settings=settings, eos_id=e.tokenizer.eos_id, batch_size=len(rows))
        params = self.policies[turn % len(self.policies)]
        prompts = [e.policy_prompt(r.prompt) for r in rows]
        responses = draw(self.model, params, prompts, key, window=e.policy_window)
        if self.source == "pit":
            prompts = [e.pit_prompt(r.prompt, y) for r, y in zip(rows, responses, strict=True)]
            responses = draw(self.pit_model, self.pit, prompts, jax.random.fold_in(key, 1), window=e.pit_window)
        return responses


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Prompts of one iteration: arrays for the device, rows and ref_responses for the text metrics."""

    arrays: ppo.RLBatch
    rows: tuple[PreferenceExample, ...]
    references: tuple[tuple[int, ...], ...]


def text_metrics(context: Context, rollout: Rollout, batch: TextBatch) -> dict:
    """What only the text shows: the verifier's score (never trained on) and how often ref_response is copied."""
    responses = response_ids(rollout, context.encoder.tokenizer.eos_id)
    metrics = {}
    if batch.references:
        copies = sum(tuple(y) == ref for y, ref in zip(responses, batch.references, strict=True))
        metrics["copy_rate"] = (copies, len(responses))
    if batch.rows[0].requirements:
        texts = [context.encoder.text(y) for y in responses]
        met = [verifier.verify(r.requirements, text) for r, text in zip(batch.rows, texts, strict=True)]
        metrics["verifier/share_met"] = (sum(np.mean(m) for m in met), len(met))
        metrics["verifier/all_met"] = (sum(all(m) for m in met), len(met))
    return metrics


def rl_stage(context: Context, stage: str, settings: PPOConfig, start: str, references: References | None) -> dict:
    """PPO for M_P (no references) or for one round of M_PIT; KL to the SFT model throughout.

    Args:
      context: of the run.
      stage: rl_policy, rl_pit_1, ...
      settings: PPO settings.
      start: stage whose parameters the policy starts from; the reference policy is the SFT model in all rounds.
      references: source of ref_response.

    Returns:
      The record: candidates, KL bins and the chosen step.
    """
    config, e = context.config, context.encoder
    model = model_of(context, stage)
    by_difference = references is not None and config.r_pit.loss == "r_p_difference"
    reward_name = "r_p" if references is None or by_difference else "r_pit"
    scorer = model_of(context, reward_name)
    reward_params = load_model(context, reward_name)
    ref_params = load_model(context, "sft_policy" if references is None else "sft_pit")
    optimizer = optimizers.make_optimizer(settings.policy_optimizer, _updates(settings))
    value_optimizer = optimizers.make_optimizer(settings.value_optimizer, _updates(settings))
    window = e.policy_window if references is None else e.pit_window
    rows = context.rows["rl"]
    num_uses = 2 if references is not None and references.source == "data" else 1  # both y_l and y_w of each x

    key = key_of(config, stage)
    if by_difference:
        score = functools.partial(ppo.difference_scores, scorer)
    else:
        score = lambda params, rollout, _: ppo.rollout_scores(scorer, params, rollout)  # noqa: E731
    collect, update = ppo.make_ppo(
        model, Transformer(model.config, sharding.DECODE_RULES), scorer, score, optimizer, value_optimizer, settings,
        max_new_tokens=config.data.response_window, eos_id=e.tokenizer.eos_id,
    )  # fmt: skip

    def batch_of(chosen_rows, use_chosen, key, turn, copies=1) -> TextBatch:
        repeat = lambda values: [value for value in values for _ in range(copies)]  # noqa: E731
        refs = () if references is None else repeat(references(chosen_rows, use_chosen, key, turn))
        chosen_rows = repeat(chosen_rows)
        plain = [e.policy_prompt(r.prompt) for r in chosen_rows]
        pit_form = [e.pit_prompt(r.prompt, y) for r, y in zip(chosen_rows, refs, strict=False)]
        arrays = ppo.RLBatch(batches.prompt_rows(pit_form or plain, batches.round_up(window)))
        if by_difference:
            policy_prompts = batches.prompt_rows(plain, batches.round_up(e.policy_window))
            behind = sampling.append_ids(policy_prompts, refs, config.data.response_window, e.tokenizer.eos_id)
            arrays = arrays._replace(policy_prompts=policy_prompts, references=behind)
        return TextBatch(sharding.shard_batch(arrays), tuple(chosen_rows), tuple(map(tuple, refs)))

    def batch_at(step: int) -> TextBatch:
        num_prompts = settings.rollout_size // settings.samples_per_prompt
        numbers = batches.row_numbers(len(rows) * num_uses, num_prompts, step, seed_of(config, stage))
        sampled = jax.random.fold_in(key_of(config, f"{stage}/references"), step)
        chosen_rows, use_chosen = [rows[n // num_uses] for n in numbers], [n % num_uses == 1 for n in numbers]
        return batch_of(chosen_rows, use_chosen, sampled, step, settings.samples_per_prompt)

    held = selection_rows(context, settings.rollout_size)
    validation = batch_of(held, [i % 2 == 1 for i in range(len(held))], key_of(config, f"{stage}/selection"), 0)
    candidates = Candidates(context.workdir.candidates(stage))

    def evaluate(state: ppo.PPOState, step: int) -> None:
        experience, _, _, metrics = collect(state, ref_params, reward_params, validation.arrays, key)
        measured = {name: float(metrics[name][0] / metrics[name][1]) for name in ("kl", "score", "length")}
        texts = text_metrics(context, jax.device_get(experience.rollout), validation)
        measured |= {name: float(value / weight) for name, (value, weight) in texts.items()}
        candidates.add(step, state.policy.params, measured)
        context.writer.write(stage, step, {f"selection/{k}": v for k, v in measured.items()})
        if step:
            _show(context, stage, step, experience.rollout, validation)

    def train_step(state, batch: TextBatch):
        experience, _, statistics, metrics = collect(state, ref_params, reward_params, batch.arrays, key)
        rollout = jax.device_get(experience.rollout)
        state, more = update(state, experience, statistics, metrics["kl"][0] / metrics["kl"][1], key)
        return state, metrics | more | text_metrics(context, rollout, batch)  # texts are read while the update runs

    # The value model starts as the reward model, with a head of zeros: rewards are normalised, raw scores are not.
    value_params = {"params": {k: jax.tree.map(jnp.zeros_like, v) if k != "backbone" else v for k, v in
                               load_model(context, reward_name)["params"].items()}}  # fmt: skip
    state = ppo.create(load_model(context, start), value_params, optimizer, value_optimizer, settings.kl_coef)
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    policy_like = jax.tree.map(struct, state.policy.params)
    loop.run(
        state,
        stage=stage,
        num_steps=settings.num_iterations,
        batch_at=batch_at,
        train_step=train_step,
        directory=context.workdir.checkpoints(stage),
        writer=context.writer,
        save_every=settings.save_every,
        evaluate=evaluate,
        eval_every=settings.eval_every,
    )
    measured = candidates.all()
    chosen, winners = choose_by_kl_bin(measured, settings.num_kl_bins, settings.max_kl)
    context.workdir.save_model(stage, candidates.load(chosen, policy_like))
    return {
        "steps": settings.num_iterations,
        "chosen_step": chosen,
        "kl_bins": winners,
        "candidates": {str(k): v for k, v in measured.items()},
    }


def selection_rows(context: Context, n: int) -> list[PreferenceExample]:
    """The n selection rows that checkpoints of RL are measured on; from the first again where there are fewer."""
    rows = context.rows["selection"]
    return [rows[i % len(rows)] for i in range(n)]


def _updates(settings: PPOConfig) -> int:
    return settings.num_iterations * settings.num_epochs * settings.num_minibatches


def _show(context: Context, stage: str, step: int, rollout: Rollout, batch: TextBatch) -> None:
    """Prints one answer and writes a few to samples/STAGE/STEP.jsonl."""
    e = context.encoder
    responses = response_ids(jax.device_get(rollout), e.tokenizer.eos_id)
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
    functions: dict[str, Callable[[], dict]] = {"data": lambda: data_stage(context)}
    for stage, sizes in pretrained_models(config):
        functions[stage] = functools.partial(pretrain_stage, context, stage, sizes)
    functions["sft_policy"] = lambda: sft_policy_stage(context, "sft_policy", config.sft_policy)
    functions["sft_pit"] = lambda: sft_pit_stage(context, "sft_pit")
    fold = lambda name: context.rows[name]  # noqa: E731
    functions["r_p"] = lambda: reward_stage(context, "r_p", config.r_p, policy_groups, fold("rm"))
    functions["r_pit"] = lambda: reward_stage(context, "r_pit", config.r_pit, gap_groups, fold("rm"))
    everything = lambda: fold("sft") + fold("rm") + fold("rl")  # noqa: E731
    functions["evaluator"] = lambda: reward_stage(context, "evaluator", config.evaluator, policy_groups, everything())
    functions["rl_policy"] = lambda: rl_stage(context, "rl_policy", config.ppo, "sft_policy", None)

    def pit_round(stage: str, source: str, previous: str) -> dict:
        return rl_stage(context, stage, config.ppo_pit, previous, References(context, source, previous))

    previous = "sft_pit"
    for i, source in enumerate(config.curriculum, 1):
        functions[f"rl_pit_{i}"] = functools.partial(pit_round, f"rl_pit_{i}", source, previous)
        previous = f"rl_pit_{i}"
    functions["arm_second_rl_only"] = lambda: pit_round("arm_second_rl_only", "policy", "sft_pit")
    functions[COT_ARM] = lambda: sft_pit_stage(context, COT_ARM)
    functions["arm_longer_sft"] = lambda: sft_policy_stage(context, "arm_longer_sft", config.sft_pit)
    return functions


def open_finished(root: str | Path, stages: Sequence[str], command: str = Context.command) -> Context:
    """Opens a workdir to use what it holds; its data are not read yet.

    Args:
      root: the workdir.
      stages: that must be done; "final" stands for the one that leaves M_PIT behind.
      command: what the user typed, for messages.

    Raises:
      ValueError: where it is no workdir, or a stage is not done.
    """
    path = Path(root) / "config.json"
    if not path.is_file():
        raise ValueError(f"--workdir={root} has no config.json: name the workdir of a `python -m pit_jax.train`")
    try:
        config = config_lib.from_config_dict(PitConfig, read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} is not of this version of pit_jax: {error}") from error
    workdir = Workdir.of(root)
    stages = ["data", *(final_stage(config) if stage == "final" else stage for stage in stages)]
    lacking = [stage for stage in stages if workdir.done(stage) is None]
    if lacking:
        raise ValueError(f"workdir {root} has not finished {', '.join(lacking)}: go on with `python -m pit_jax.train`")
    context = Context(config, workdir, None, command)
    load_encoder(context)
    return context


def run(
    config: PitConfig,
    root: str | Path,
    evaluate: Callable[[Context], dict],
    only: str | None = None,
    command: str = Context.command,
    redo: str | None = None,
) -> Context:
    """Runs all stages that are not done, or only the one named.

    Args:
      config: of the run.
      root: the workdir.
      evaluate: the last stage; evaluation lies to the right of pipelines, so it is handed in.
      only: a stage name.
      command: what the user typed, for messages.
      redo: a stage name: what it and all later stages left is deleted first. Fields that only these read may then
        differ from those that the workdir was made with.

    Raises:
      ValueError: for an unknown stage, or one whose earlier stages are not done.
    """
    names = stage_names(config)
    for flag, name in (("stage", only), ("redo", redo)):
        if name is not None and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"--{flag}={name} is not a stage of this config: {', '.join(names)}.{hint}")
    later = names[names.index(redo) :] if redo else []
    free = [field for field, first in FIRST_STAGE.items() if first in later or (later and first not in names)]
    workdir = Workdir(root, config, (*FREE_FIELDS, *free))
    if redo:
        done = {path.stem for path in workdir.root.glob("stages/*.json")}
        gone = done - set(names) if later != ["evaluate"] else set()  # arms, rounds that this config has not
        for name in (*later, *sorted(gone)):
            workdir.discard(name)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    with jax.set_mesh(mesh):
        context = Context(config, workdir, MetricsWriter(workdir.root), command)
        evaluated = workdir.done("evaluate")
        if evaluated and set(config.arms) - set(evaluated["arms"]):
            workdir.forget("evaluate")  # an arm was added: the tables get its rows
        functions = stage_functions(context) | {"evaluate": lambda: evaluate(context)}
        for name in names if only is None else [only]:
            lacking = [earlier for earlier in names[: names.index(name)] if workdir.done(earlier) is None]
            if lacking:
                raise ValueError(f"--stage={only} needs {', '.join(lacking)} first: run them, or all without --stage")
            if name != "data" and context.encoder is None:
                load_data(context)
            run_stage(workdir, name, functions[name])
            if name in REWARD_STAGES:
                # Only now: a stage that was killed before its mark chooses again.
                Candidates(workdir.candidates(name)).clear()
        context.writer.close()
    return context
