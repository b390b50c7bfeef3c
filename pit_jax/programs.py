"""The programs that the stages of a config run, with arguments that have shapes and layouts but no values.

Nothing is computed and no device is needed: the programs are those of `pipelines`, made by the same functions, and
every batch is as long as the config's windows allow.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pit_jax import optimizers, sharding, train_state
from pit_jax.config import ModelConfig, OptimizerConfig, PitConfig, SamplingConfig, SrtConfig
from pit_jax.data import batches
from pit_jax.data.pairs import PairBatch
from pit_jax.learners import dpo, ppo, reward_model, sft
from pit_jax.models import lora
from pit_jax.models.transformer import ScalarModel, Transformer, init_cache
from pit_jax.pipelines import common
from pit_jax.types import Params, PromptBatch, Rollout, ScoreBatch, TokenBatch

FORM = 32
"""Tokens that templates add to a prompt, at most: control symbols and the words around them."""

EOS, STOP = -1, (5, 6, 7)
"""Ids that end an answer: none does, so that answers are as long as they may be; and those that a critique begins with:
which ones is of no consequence here."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a stage.

    Attributes:
      stage: whose it is; behind a colon which of them.
      settings, model: fields of the config: with its batch size, with the sizes of what it trains or samples from.
      function: jitted.
      arguments: arrays without values, in their layout on the mesh that is set.
      model_flops: operations that the mathematics asks for, on all devices together: no second forward pass of remat.
      batch, length: rows of a call, on all devices together, and positions of a row.
      while_trips: tokens that are sampled, at most; 0: none are.
      cache: keys and values that it makes room for.
      gradients: what they are taken of, at a time.
      beside: what lies on the devices while it runs and is no argument.
      shared: arguments that are held once and given twice.
      epochs: how often a call reads its rows.
      prompt, answer: tokens of a row that stand before what is learnt, and that are learnt or written: of each answer.
      optimizers: of the TrainStates among the arguments, in their order.
    """

    stage: str
    settings: str
    model: str
    function: Callable
    arguments: tuple
    model_flops: float
    batch: int
    length: int
    while_trips: int = 0
    cache: Any = None
    gradients: Any = None
    beside: tuple = ()
    shared: tuple = ()
    epochs: int = 1
    prompt: int = 0
    answer: int = 0
    optimizers: tuple[optax.GradientTransformation, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions of a call."""
        return self.epochs * self.batch * self.length


def field(config: Any, path: str) -> Any:
    """`config.a.b` for "a.b"."""
    return functools.reduce(getattr, path.split("."), config)


def num_matrix_parameters(config: ModelConfig) -> tuple[int, int]:
    """(parameters of the layers' matrices, of the unembedding): a token takes two operations with each."""
    c = config
    attention = c.d_model * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.d_model * c.mlp_dim), c.vocab_size * c.d_model


Passes = tuple[float, float]
"""How often operations of a forward pass are done: products with weights, and those of attention."""

READ: Passes = (1.0, 1.0)
LEARN: Passes = (3.0, 3.0)
"""With the gradients of both sides of every product."""
ADAPT: Passes = (2.0, 3.0)
"""Weights are frozen, and have no gradient; what the adapters do beside them is little, and not counted."""


def forward_flops(
    config: ModelConfig, rows: int, length: int, num_targets: int, start: int = 0, passes: Passes = READ
) -> float:
    """Operations of reading `rows` sequences of `length` tokens, each attending to those before it.

    Args:
      config: of the decoder.
      rows, length: of the batch.
      num_targets: positions per row at which the vocabulary is scored.
      start: tokens that stand before them in a cache.
      passes: READ, or what learning from them takes.
    """
    layers, unembedding = num_matrix_parameters(config)
    seen = length * start + length * (length + 1) / 2  # sliding windows, which see less, are not taken into account
    attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * seen
    return rows * (passes[0] * 2.0 * (layers * length + unembedding * num_targets) + passes[1] * attention)


def prompt_flops(config: ModelConfig, rows: int, length: int) -> float:
    """Operations of reading prompts for their next token: of the others the last layer makes keys and values alone."""
    c = config
    rest = c.d_model * (2 * c.num_heads * c.head_dim + 3 * c.mlp_dim)
    attention = 4.0 * c.num_heads * c.head_dim * (length - 1) * length / 2
    return forward_flops(config, rows, length, 1) - rows * (2.0 * rest * (length - 1) + attention)


def unread_flops(config: ModelConfig, tokens: int) -> float:
    """Operations of the last layer behind its attention for so many tokens, of which only keys and values are read.

    `forward_flops` counts them, as is usual; layers that are a loop do them (`Transformer.__call__`, `read`).
    """
    c = config
    return 2.0 * c.d_model * (c.num_heads * c.head_dim + 3 * c.mlp_dim) * tokens


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
        self.learn = ADAPT if config.lora.rank else LEARN
        data = config.data
        self.answer = data.response_window
        self.policy_prompt = data.prompt_window + FORM
        self.pit_prompt = data.prompt_window + data.response_window + FORM
        self.key = self.array(dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)

    def array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """With its first axis along the batch."""
        spec = sharding.RULES.spec("batch", *[None] * (len(shape) - 1)) if shape else jax.P()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(self.mesh, spec))

    def rows(self, settings: str, size: str, pieces: str = "") -> int:
        """The batch size that a field of `settings` holds.

        Raises:
          ValueError: where the devices of the batch axis do not get as many rows each, of each of its pieces.
        """
        group, data = field(self.config, settings), self.mesh.shape["data"]
        found, parts = getattr(group, size), getattr(group, pieces) if pieces else 1
        if found % (parts * data):
            cut = f" in {parts} pieces ({pieces})" if parts > 1 else ""
            raise ValueError(
                f"config.{settings}.{size}={found}{cut} is no multiple of the {data} devices of the mesh's axis data: "
                f"set it to one, or config.mesh.data to a divisor of {found // parts}"
            )
        return found

    def params(self, module: Transformer | ScalarModel, adapted: bool = False) -> Params:
        params = common.shapes(module)
        if adapted and self.config.lora.rank:
            params = jax.eval_shape(lambda p: lora.add(p, self.config.lora, jax.random.key(0)), params)
        return on_mesh(params, self.mesh)

    def state(self, module: Transformer | ScalarModel, optimizer: optax.GradientTransformation, adapted: bool = True):
        params = self.params(module, adapted)
        start = lambda p: train_state.TrainState(jnp.int32(0), p, optimizer.init(lora.trained(p)))  # noqa: E731
        return on_mesh(jax.eval_shape(start, params), self.mesh)

    def cache(self, sizes: ModelConfig, rows: int, length: int):
        return on_mesh(jax.eval_shape(lambda: init_cache(sizes, rows, length, sharding.DECODE_RULES)), self.mesh)

    def likelihood(self, stage: str, model: str, path: str, row: int, num_targets: int) -> Program:
        """`row` tokens are in a row at most, `num_targets` of them learnt: of a packed sequence all may be."""
        adapted = not stage.startswith("pretrain")  # what starts from nothing has no weights to freeze
        sizes, settings = field(self.config, model), field(self.config, path)
        length = settings.sequence_length or batches.round_up(row)
        prompt = max(row - num_targets, 1)  # the first token of a row follows nothing, and is not learnt
        if settings.sequence_length or settings.loss_on_prompt:
            num_targets = length
        num_targets = min(batches.round_up(num_targets, 16), length)
        B = self.rows(path, "batch_size", "accumulation")
        module, optimizer = Transformer(sizes), _optimizer(settings.optimizer)
        step = sft.make_train_step(
            module, optimizer, unlikelihood=settings.unlikelihood, num_targets=num_targets,
            chunk_size=settings.chunk_size, accumulation=settings.accumulation,
        )  # fmt: skip
        rows = TokenBatch(*(self.array(B, length) for _ in range(3)), self.array(B, length, dtype=jnp.bool_))
        batch = sft.SFTBatch(rows, rows if settings.unlikelihood else None)
        passes = self.learn if adapted else LEARN
        flops = forward_flops(sizes, B, length, num_targets, passes=passes) * (2 if settings.unlikelihood else 1)
        state = self.state(module, optimizer, adapted)
        return Program(
            stage, path, model, step, (state, batch), flops, B, length, gradients=lora.trained(state.params),
            prompt=prompt, answer=row - prompt, optimizers=(optimizer,),
        )  # fmt: skip

    def reward_model(self, stage: str) -> Program:
        """A group: x, two candidates, and for R_PIT two answers behind each. It is a sequence, or several are."""
        sizes, settings = self.config.reward_model, field(self.config, stage)
        is_gap, prompt, answer = stage == "r_pit", self.policy_prompt, self.answer
        C, length = (4, prompt + 6 * answer) if is_gap else (2, prompt + 2 * answer)
        if T := settings.sequence_length:
            num_groups, E = settings.batch_size, max(1, T // length)
            prompt, answer = (int(n * min(1.0, T / length)) for n in (prompt, answer))  # longer groups are dropped
            B = batches.round_up(-(-num_groups // E), settings.accumulation * self.mesh.shape["data"])
        else:
            T, E = batches.round_up(length), 1
            num_groups = B = self.rows(stage, "batch_size", "accumulation")
        module, optimizer = ScalarModel(sizes), _optimizer(settings.optimizer)
        step = reward_model.make_train_step(module, optimizer, loss=settings.loss, accumulation=settings.accumulation)
        batch = ScoreBatch(*(self.array(B, T) for _ in range(4)), self.array(B, E, C))
        flops = tree_flops(sizes, num_groups, prompt, answer, depth=2 if is_gap else 1, passes=self.learn)
        state = self.state(module, optimizer)
        return Program(
            stage, stage, "reward_model", step, (state, batch), flops, B, T, gradients=lora.trained(state.params),
            prompt=prompt, answer=answer, optimizers=(optimizer,),
        )  # fmt: skip

    def rl(self, stage: str, model: str, path: str) -> list[Program]:
        """The rollout; its log-probs, scores and values; the updates."""
        # Memory of slots would be less; here all rows are written at a time, as loops in loops are not counted.
        sizes, settings = field(self.config, model), dataclasses.replace(field(self.config, path), rollout_slots=0)
        is_pit = stage == "rl_pit"
        P, R = batches.round_up(self.pit_prompt if is_pit else self.policy_prompt), self.answer
        B = self.rows(path, "rollout_size", "num_minibatches")
        module, scorer = Transformer(sizes), ScalarModel(self.config.reward_model)
        optimizers_ = _optimizer(settings.policy_optimizer), _optimizer(settings.value_optimizer)
        score = lambda params, rollout, _: ppo.rollout_scores(scorer, params, rollout)  # noqa: E731
        batch = ppo.RLBatch(PromptBatch(self.array(B, P), self.array(B)))
        if by_difference := is_pit and self.config.r_pit.loss == "r_p_difference":
            short = batches.round_up(self.policy_prompt)
            score = functools.partial(ppo.difference_scores, scorer)
            row, mask = self.array(B, short + R), self.array(B, R, dtype=jnp.bool_)
            answers = Rollout(row, row, row, self.array(B, R, dtype=jnp.float32), mask)
            batch = ppo.RLBatch(batch.prompts, PromptBatch(self.array(B, short), self.array(B)), answers)
        sample, judge, update = ppo.make_ppo(
            module, Transformer(sizes, sharding.DECODE_RULES), scorer, score, *optimizers_, settings,
            max_new_tokens=R, eos_id=EOS,
        )  # fmt: skip
        number = self.array(dtype=jnp.float32)
        statistics = ppo.ScoreStatistics(number, number, number)
        policy, value = self.state(module, optimizers_[0]), self.state(scorer, optimizers_[1])
        state = ppo.PPOState(self.array(), policy, value, number, statistics)
        frozen = self.params(module), self.params(scorer)
        rollout = on_mesh(jax.eval_shape(sample, state, batch, self.key), self.mesh)
        experience, _, statistics, _ = jax.eval_shape(judge, state, *frozen, batch, rollout)
        reads = forward_flops(sizes, B, P + R, R)
        reward, length = self.config.reward_model, (short if by_difference else P) + R
        scores = forward_flops(reward, B, length, 0) * (2 if by_difference else 1)
        values = forward_flops(reward, B, P + R, 0)
        read_rows = B // settings.samples_per_prompt  # a prompt is read once for all its answers
        sampled = prompt_flops(sizes, read_rows, P) + forward_flops(sizes, B, R, R, start=P)
        learning = on_mesh((experience, statistics), self.mesh)
        epochs = settings.num_epochs
        learnt = forward_flops(sizes, B, P + R, R, passes=self.learn)
        learnt += forward_flops(reward, B, P + R, 0, passes=self.learn)
        # With adapters the state holds the models that it started from (the policy that of the first round).
        held, shared = ((), frozen) if self.config.lora.rank else (frozen, ())
        others = self.answering() if is_pit else ()
        adapted = max((lora.trained(s.params) for s in (policy, value)), key=_size)
        more = {"prompt": P, "answer": R, "optimizers": optimizers_}
        return [
            Program(
                f"{stage}: rollout", path, model, sample, (state, batch, self.key), sampled, B, P + R, R,
                cache=self.cache(sizes, B, P + R), beside=(*held, *others), **more,
            ),
            Program(
                f"{stage}: reward", path, model, judge, (state, *frozen, batch, rollout), reads + scores + values,
                B, P + R, beside=others, shared=shared, **more,
            ),
            Program(
                f"{stage}: update", path, model, update, (state, *learning, number, self.key),
                epochs * learnt, B, P + R, gradients=adapted, beside=(*held, *others), epochs=epochs, **more,
            ),
        ]  # fmt: skip

    def answering(self) -> tuple:
        """The models that write ref_responses in the round of the curriculum that holds most of them."""
        policy, ppo = Transformer(self.config.policy_model), self.config.ppo
        own = self.params(policy)
        of_source = dict.fromkeys(("policy", "policy_checkpoint", "srt"), (own,))
        of_source["pit"] = (own, self.params(Transformer(self.config.pit_model)))
        # All candidates of rl_policy but the first and the last, which take turns; adapters share their weights.
        num_candidates = 1 + -(-ppo.num_iterations // ppo.eval_every)
        more = (num_candidates - 2 if num_candidates > 2 else num_candidates) - 1
        of_source["policy_checkpoint"] += (lora.trained(self.params(policy, adapted=True)),) * more
        return max((of_source.get(source, ()) for source in self.config.curriculum), key=_size, default=())

    def sampling(
        self, stage: str, model: str, path: str, prompt: int, answer: int, stop: tuple[int, ...] = ()
    ) -> Program:
        """Answers or critiques."""
        sizes = field(self.config, model)
        P, R = batches.round_up(prompt), answer + len(stop)
        B = batches.round_up(field(self.config, path).batch_size, self.mesh.shape["data"])
        module = Transformer(sizes)
        generate = common.jitted_generate(module, SamplingConfig(max_new_tokens=R), EOS, stop)
        arguments = self.params(module), PromptBatch(self.array(B, P), self.array(B)), self.key
        flops = prompt_flops(sizes, B, P) + forward_flops(sizes, B, R, R, start=P)
        cache = self.cache(sizes, B, P + R)
        return Program(stage, path, model, generate, arguments, flops, B, P + R, R, cache=cache, prompt=P, answer=R)

    def dpo(self, stage: str, model: str, path: str) -> list[Program]:
        """Log-probs of ref_policy, read once, and the step."""
        sizes, settings = field(self.config, model), field(self.config, path)
        T, R = batches.round_up(self.policy_prompt + 2 * self.answer), 2 * self.answer
        B = self.rows(path, "batch_size", "accumulation")
        module, optimizer = Transformer(sizes), _optimizer(settings.optimizer)
        step = dpo.make_train_step(
            module, optimizer, beta=settings.beta, kind=settings.loss, label_smoothing=settings.label_smoothing,
            length_normalized=settings.length_normalized, chunk_size=settings.chunk_size,
            accumulation=settings.accumulation,
        )  # fmt: skip
        batch = PairBatch(
            *(self.array(B, T) for _ in range(3)), *(self.array(B, R) for _ in range(3)),
            self.array(B, 2, dtype=jnp.float32),
        )  # fmt: skip
        flops = lambda passes: tree_flops(  # noqa: E731
            sizes, B, self.policy_prompt, self.answer, depth=1, num_targets=R, passes=passes
        )
        read, state = dpo.jitted_log_probs(module, settings.chunk_size), self.state(module, optimizer)
        more = {"prompt": self.policy_prompt, "answer": self.answer}
        return [
            Program(f"{stage}: log-probs", path, model, read, (self.params(module), batch), flops(READ), B, T, **more),
            Program(
                stage, path, model, step, (state, batch), flops(self.learn), B, T, gradients=lora.trained(state.params),
                optimizers=(optimizer,), **more,
            ),
        ]  # fmt: skip


def _size(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    return optimizers.make_optimizer(config, 1000)


def tree_flops(
    config: ModelConfig, rows: int, prompt: int, answer: int, depth: int, num_targets: int = 0, passes: Passes = READ
) -> float:
    """Operations of reading a prompt, two answers behind it, and with depth 2 two more behind each of these."""
    total = forward_flops(config, rows, prompt, num_targets, passes=passes)
    total += 2 * forward_flops(config, rows, answer, 0, start=prompt, passes=passes)
    if depth == 2:
        total += 4 * forward_flops(config, rows, answer, 0, start=prompt + answer, passes=passes)
    return total


def programs(config: PitConfig | SrtConfig, mesh: jax.sharding.Mesh) -> dict[str, Callable[[], list[Program]]]:
    """Stage -> what makes its programs; stages whose programs are those of another are left out.

    Args:
      config: of a run.
      mesh: the mesh that is set; its devices need not exist.
    """
    m, c = _Maker(config, mesh), config
    row, own = m.policy_prompt + m.answer, "policy_model"
    found: dict[str, Callable[[], list[Program]]] = {}

    def add(stage: str, *arguments) -> None:
        found[stage] = lambda: [m.likelihood(stage, *arguments)]

    if not common.starts_from(config)[1]:
        models = {"pretrain": own, "pretrain_pit": "pit_model", "pretrain_reward": "reward_model"}
        for stage, _ in common.pretrained_models(config):
            add(stage, models[stage], "pretrain.sft", row, row)
    if isinstance(config, PitConfig):
        add("sft_policy", own, "sft_policy", row, m.answer)
        add("sft_pit", "pit_model", "sft_pit", m.pit_prompt + m.answer, m.answer)
        found["r_p"] = lambda: [m.reward_model("r_p")]
        if c.r_pit.loss != "r_p_difference":
            found["r_pit"] = lambda: [m.reward_model("r_pit")]
        found["rl_policy"] = lambda: m.rl("rl_policy", own, "ppo")
        if c.curriculum:
            found["rl_pit"] = lambda: m.rl("rl_pit", "pit_model", "ppo_pit")
        return found
    if not c.base:
        add("sft_policy", own, "sft_policy", row, m.answer)
    feedback = c.feedback_window + m.answer
    add("srt", own, "srt", row + feedback, m.answer + feedback)
    found["self_feedback"] = lambda: [
        m.sampling("self_feedback: answers", own, "self_feedback", m.policy_prompt, m.answer, STOP),
        m.sampling("self_feedback: critiques", own, "self_feedback", row, feedback),
    ]
    if c.num_rounds:
        found["dpo"] = lambda: m.dpo("dpo", own, "dpo")
    return found
