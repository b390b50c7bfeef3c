"""The programs that the stages of a config run, with arguments that have shapes and layouts but no values.

Nothing is computed and no device is needed: the programs are those of `pipelines`, made by the same functions, and
every batch is as long as the config's windows allow.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pit_jax import optimizers, sharding, train_state
from pit_jax.config import (
    DPOConfig,
    ModelConfig,
    OptimizerConfig,
    PitConfig,
    PPOConfig,
    RewardModelConfig,
    SamplingConfig,
    SFTConfig,
    SrtConfig,
)
from pit_jax.data import batches
from pit_jax.data.pairs import PairBatch
from pit_jax.learners import dpo, ppo, reward_model, sft
from pit_jax.models import lora
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines import common
from pit_jax.types import Params, PromptBatch, ScoreBatch, TokenBatch

FORM = 32
"""Tokens that templates add to a prompt, at most: control symbols and the words around them."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a stage.

    Attributes:
      stage: whose it is.
      function: jitted.
      arguments: arrays without values, in their layout on the mesh that is set.
      model_flops: operations that the mathematics asks for, on all devices together: no second forward pass of remat.
      num_tokens: positions of a call.
      while_trips: tokens that are sampled, at most.
    """

    stage: str
    function: Callable
    arguments: tuple
    model_flops: float
    num_tokens: int
    while_trips: int = 1


def num_matrix_parameters(config: ModelConfig) -> tuple[int, int]:
    """(parameters of the layers' matrices, of the unembedding): a token takes two operations with each."""
    c = config
    attention = c.d_model * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.d_model * c.mlp_dim), c.vocab_size * c.d_model


def forward_flops(config: ModelConfig, rows: int, length: int, num_targets: int, start: int = 0) -> float:
    """Operations of reading `rows` sequences of `length` tokens, each attending to those before it.

    Args:
      config: of the decoder.
      rows, length: of the batch.
      num_targets: positions per row at which the vocabulary is scored.
      start: tokens that stand before them in a cache.
    """
    layers, unembedding = num_matrix_parameters(config)
    seen = length * start + length * (length + 1) / 2  # sliding windows, which see less, are not taken into account
    attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * seen
    return rows * (2.0 * layers * length + 2.0 * unembedding * num_targets + attention)


def on_mesh(tree, mesh: jax.sharding.Mesh):
    """Arrays without values, on `mesh` in the layout that their types name."""

    def one(x):
        spec = jax.P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


class _Maker:
    """Arguments of the programs of one config, on one mesh."""

    def __init__(self, config: PitConfig | SrtConfig, mesh: jax.sharding.Mesh):
        self.config, self.mesh = config, mesh
        data = config.data
        self.answer = data.response_window
        self.policy_prompt = data.prompt_window + FORM
        self.pit_prompt = data.prompt_window + data.response_window + FORM

    def array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """With its first axis along the batch."""
        spec = sharding.RULES.spec("batch", *[None] * (len(shape) - 1)) if shape else jax.P()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(self.mesh, spec))

    def params(self, module: Transformer | ScalarModel, adapted: bool = False) -> Params:
        params = common.shapes(module)
        if adapted and self.config.lora.rank:
            params = jax.eval_shape(lambda p: lora.add(p, self.config.lora, jax.random.key(0)), params)
        return on_mesh(params, self.mesh)

    def state(self, module: Transformer | ScalarModel, optimizer: optax.GradientTransformation):
        params = self.params(module, adapted=True)
        start = lambda p: train_state.TrainState(jnp.int32(0), p, optimizer.init(lora.trained(p)))  # noqa: E731
        return on_mesh(jax.eval_shape(start, params), self.mesh)

    def likelihood(self, stage: str, sizes: ModelConfig, settings: SFTConfig, row: int, num_targets: int) -> Program:
        """`row` tokens are in a row at most, `num_targets` of them learnt: of a packed sequence all may be."""
        length = settings.sequence_length or batches.round_up(row)
        if settings.sequence_length or settings.loss_on_prompt:
            num_targets = length
        num_targets = min(batches.round_up(num_targets, 16), length)
        B, model, optimizer = settings.batch_size, Transformer(sizes), _optimizer(settings.optimizer)
        step = sft.make_train_step(
            model, optimizer, unlikelihood=settings.unlikelihood, num_targets=num_targets,
            chunk_size=settings.chunk_size, accumulation=settings.accumulation,
        )  # fmt: skip
        rows = TokenBatch(*(self.array(B, length) for _ in range(3)), self.array(B, length, dtype=jnp.bool_))
        batch = sft.SFTBatch(rows, rows if settings.unlikelihood else None)
        flops = 3 * forward_flops(sizes, B, length, num_targets) * (2 if settings.unlikelihood else 1)
        return Program(stage, step, (self.state(model, optimizer), batch), flops, B * length)

    def reward_model(self, stage: str, settings: RewardModelConfig) -> Program:
        """A group is one sequence: x, two candidates, and for R_PIT two answers behind each."""
        sizes = self.config.reward_model
        is_gap = stage == "r_pit"
        C, length = (4, self.policy_prompt + 6 * self.answer) if is_gap else (2, self.policy_prompt + 2 * self.answer)
        T, B = batches.round_up(length), settings.batch_size
        model, optimizer = ScalarModel(sizes), _optimizer(settings.optimizer)
        step = reward_model.make_train_step(model, optimizer, loss=settings.loss, accumulation=settings.accumulation)
        batch = ScoreBatch(*(self.array(B, T) for _ in range(3)), self.array(B, C))
        flops = 3 * tree_flops(sizes, B, self.policy_prompt, self.answer, depth=2 if is_gap else 1)
        return Program(stage, step, (self.state(model, optimizer), batch), flops, B * T)

    def rl(self, stage: str, sizes: ModelConfig, settings: PPOConfig, prompt: int) -> list[Program]:
        """The rollout with its log-probs, scores and values, and the updates."""
        P, R, B = batches.round_up(prompt), self.answer, settings.rollout_size
        model, scorer = Transformer(sizes), ScalarModel(self.config.reward_model)
        optimizers_ = _optimizer(settings.policy_optimizer), _optimizer(settings.value_optimizer)
        collect, update = ppo.make_ppo(
            model, Transformer(sizes, sharding.DECODE_RULES), scorer,
            lambda params, rollout, _: ppo.rollout_scores(scorer, params, rollout),
            *optimizers_, settings, max_new_tokens=R, eos_id=2,
        )  # fmt: skip
        number = self.array(dtype=jnp.float32)
        statistics = ppo.ScoreStatistics(number, number, number)
        policy, value = self.state(model, optimizers_[0]), self.state(scorer, optimizers_[1])
        state = ppo.PPOState(self.array(), policy, value, number, statistics)
        batch = ppo.RLBatch(PromptBatch(self.array(B, P), self.array(B)))
        key = self.array(dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
        arguments = state, self.params(model), self.params(scorer), batch, key
        experience, _, statistics, _ = jax.eval_shape(collect, *arguments)
        reads = forward_flops(sizes, B, P + R, R)
        scores = forward_flops(self.config.reward_model, B, P + R, 0)
        sampled = forward_flops(sizes, B, P, 1) + forward_flops(sizes, B, R, R, start=P)
        learning = on_mesh((experience, statistics), self.mesh)
        epochs = settings.num_epochs
        return [
            Program(f"{stage}: rollout", collect, arguments, sampled + reads + 2 * scores, B * (P + R), R),
            Program(
                f"{stage}: update", update, (state, *learning, number, key), 3 * epochs * (reads + scores),
                epochs * B * (P + R),
            ),
        ]  # fmt: skip

    def sampling(self, stage: str, sizes: ModelConfig, prompt: int, answer: int, batch_size: int) -> Program:
        """Answers or critiques."""
        P, R, B = batches.round_up(prompt), answer, batch_size
        model = Transformer(sizes)
        generate = common.jitted_generate(model, SamplingConfig(max_new_tokens=R), 2)
        key = self.array(dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
        arguments = self.params(model), PromptBatch(self.array(B, P), self.array(B)), key
        flops = forward_flops(sizes, B, P, 1) + forward_flops(sizes, B, R, R, start=P)
        return Program(stage, generate, arguments, flops, B * (P + R), R)

    def dpo(self, stage: str, sizes: ModelConfig, settings: DPOConfig) -> list[Program]:
        """Log-probs of ref_policy, read once, and the step."""
        B, T, R = settings.batch_size, batches.round_up(self.policy_prompt + 2 * self.answer), 2 * self.answer
        model, optimizer = Transformer(sizes), _optimizer(settings.optimizer)
        step = dpo.make_train_step(
            model, optimizer, beta=settings.beta, kind=settings.loss, label_smoothing=settings.label_smoothing,
            length_normalized=settings.length_normalized, chunk_size=settings.chunk_size,
            accumulation=settings.accumulation,
        )  # fmt: skip
        batch = PairBatch(
            *(self.array(B, T) for _ in range(3)), *(self.array(B, R) for _ in range(3)),
            self.array(B, 2, dtype=jnp.float32),
        )  # fmt: skip
        flops = tree_flops(sizes, B, self.policy_prompt, self.answer, depth=1, num_targets=R)
        read = dpo.jitted_log_probs(model, settings.chunk_size)
        return [
            Program(f"{stage}: log-probs", read, (self.params(model), batch), flops, B * T),
            Program(stage, step, (self.state(model, optimizer), batch), 3 * flops, B * T),
        ]


def _optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    return optimizers.make_optimizer(config, 1000)


def tree_flops(config: ModelConfig, rows: int, prompt: int, answer: int, depth: int, num_targets: int = 0) -> float:
    """Operations of reading a prompt, two answers behind it, and with depth 2 two more behind each of these."""
    total = forward_flops(config, rows, prompt, num_targets)
    total += 2 * forward_flops(config, rows, answer, 0, start=prompt)
    if depth == 2:
        total += 4 * forward_flops(config, rows, answer, 0, start=prompt + answer)
    return total


def programs(config: PitConfig | SrtConfig, mesh: jax.sharding.Mesh) -> dict[str, Callable[[], list[Program]]]:
    """Stage -> what makes its programs; stages whose programs are those of another are left out.

    Args:
      config: of a run.
      mesh: the mesh that is set; its devices need not exist.
    """
    m, c = _Maker(config, mesh), config
    row = m.policy_prompt + m.answer
    found: dict[str, Callable[[], list[Program]]] = {}
    if not common.starts_from(config)[1]:
        for stage, sizes in common.pretrained_models(config):
            found[stage] = lambda stage=stage, sizes=sizes: [m.likelihood(stage, sizes, c.pretrain.sft, row, row)]
    if isinstance(config, PitConfig):
        found["sft_policy"] = lambda: [m.likelihood("sft_policy", c.policy_model, c.sft_policy, row, m.answer)]
        pit_row = m.pit_prompt + m.answer
        found["sft_pit"] = lambda: [m.likelihood("sft_pit", c.pit_model, c.sft_pit, pit_row, m.answer)]
        found["r_p"] = lambda: [m.reward_model("r_p", c.r_p)]
        if c.r_pit.loss != "r_p_difference":
            found["r_pit"] = lambda: [m.reward_model("r_pit", c.r_pit)]
        found["rl_policy"] = lambda: m.rl("rl_policy", c.policy_model, c.ppo, m.policy_prompt)
        if c.curriculum:
            found["rl_pit"] = lambda: m.rl("rl_pit", c.pit_model, c.ppo_pit, m.pit_prompt)
        return found
    if not c.base:
        found["sft_policy"] = lambda: [m.likelihood("sft_policy", c.policy_model, c.sft_policy, row, m.answer)]
    feedback = c.feedback_window + m.answer
    found["srt"] = lambda: [m.likelihood("srt", c.policy_model, c.srt, row + feedback, m.answer + feedback)]
    found["self_feedback"] = lambda: [
        m.sampling("self_feedback: answers", c.policy_model, m.policy_prompt, m.answer, c.self_feedback.batch_size),
        m.sampling("self_feedback: critiques", c.policy_model, row, feedback, c.self_feedback.batch_size),
    ]
    if c.num_rounds:
        found["dpo"] = lambda: m.dpo("dpo", c.policy_model, c.dpo)
    return found
