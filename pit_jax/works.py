"""Pieces of work of fixed sizes, whose speed can be compared across changes, machines and libraries.

Random tokens, full-parameter AdamW with gradients clipped to norm 1, activations and weights in float32, no padding,
and nothing ends an answer early, so that all that run a work do the same. A call takes its batch from the host, and
brings its metrics or tokens back there.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax import metrics, optimizers, sharding, train_state
from pit_jax.config import ModelConfig, OptimizerConfig, PPOConfig, SamplingConfig
from pit_jax.data import batches, pairs
from pit_jax.learners import dpo, ppo, reward_model, sft
from pit_jax.losses import preference
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines import common
from pit_jax.programs import forward_flops, num_matrix_parameters, prompt_flops, tree_flops, unread_flops
from pit_jax.types import Array, PromptBatch, ScoreBatch, TokenBatch

SIZES = {
    "small": ModelConfig(
        vocab_size=8192, num_layers=8, d_model=512, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1408,
        tie_embeddings=False,
    ),
    "tiny": ModelConfig(
        vocab_size=2048, num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=704,
        tie_embeddings=False,
    ),
}  # fmt: skip
"""32 and 4 million parameters."""

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.01)
"""Of all works."""

NEVER = -1
"""No token is this one: as EOS it ends nothing."""


class Phase(NamedTuple):
    """A part of a call, behind which the next one waits.

    Attributes:
      flops: operations that the mathematics asks for.
      bytes: what has to be read from memory at least; 0 where that takes no time beside the operations; None: nobody
        knows, and neither how fast it could be.
    """

    flops: float
    bytes: float | None = 0.0


class Work(NamedTuple):
    """What is measured.

    Attributes:
      tokens: that a call counts.
      unit: what they are.
      phases: of a call.
      start: compile -> call; `compile(jitted function, *arguments)` gives the compiled one, `call(i)` runs once to the
        end, i = 0, 1, ...
    """

    tokens: int
    unit: str
    phases: tuple[Phase, ...]
    start: Callable[[Callable], Callable[[int], Any]]


def optimizer():
    """AdamW as in all works."""
    return optimizers.make_optimizer(OPTIMIZER, 1000)


def random_tokens(sizes: ModelConfig, seed: int, *shape: int) -> np.ndarray:
    """int32, without the ids that are usually special."""
    return np.random.default_rng(seed).integers(3, sizes.vocab_size, shape, dtype=np.int32)


def _training(module, train_step, batch_at: Callable[[int], Any]) -> Callable:
    """`start` of a work that trains on host batches."""

    def start(compile: Callable) -> Callable[[int], Any]:
        state = train_state.create(common.init_params(module, jax.random.key(0)), optimizer())
        step = compile(train_step, state, sharding.shard_batch(batch_at(0)))

        def call(i: int):
            nonlocal state
            state, values = step(state, sharding.shard_batch(batch_at(i)))
            return metrics.reduce(values)

        return call

    return start


def sft_work(sizes: ModelConfig, rows: int, length: int, chunk_size: int = 0) -> Work:
    """Every token of `rows` sequences is learnt; `chunk_size` is that of `token_log_probs`, 0: all at once."""
    module = Transformer(sizes)
    step = sft.make_train_step(module, optimizer(), chunk_size=chunk_size)
    ones = np.ones((rows, length), np.int32)

    def batch_at(i: int):
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
        tokens = random_tokens(sizes, i, rows, length)
        return sft.SFTBatch(TokenBatch(tokens, ones, positions, positions > 0))

    flops = 3 * forward_flops(sizes, rows, length, length - 1)
    return Work(rows * length, "tokens", (Phase(flops),), _training(module, step, batch_at))


def _as_rows(batch: ScoreBatch) -> ScoreBatch:
    """The rows of [B] groups of C as [B * C] groups of one: nothing is shared."""
    B, _, C = batch.last.shape
    found = [
        batch.tokens[b, (batch.members[b] >> c & 1) == 1] for b in range(B) for c in range(C)
    ]  # fmt: skip
    return batches.score_rows([[ids] for ids in found])


def _in_groups(values: Array, size: int) -> Array:
    """[B * size] or [B * size, 1] -> [B, size]."""
    return jnp.reshape(values, (-1, size), out_sharding=sharding.RULES.spec("batch", None))


def reward_work(sizes: ModelConfig, rows: int, prompt: int, answer: int, *, gap: bool, shared: bool = True) -> Work:
    """Bradley-Terry on pairs of answers, or (gap) the five terms of Equation 2 on the four pairings.

    Args:
      sizes: of the reward model.
      rows: pairs.
      prompt: tokens of x; 0: the two answers share nothing.
      answer: tokens of each answer.
      gap: whether it is R_PIT.
      shared: False: all rows of a group are sequences of their own, as elsewhere.
    """
    module, made, loss = ScalarModel(sizes), optimizer(), "gap"
    C, length = (4, prompt + 2 * answer) if gap else (2, prompt + answer)
    shared = shared and prompt > 0

    def summed(params, batch):
        scores = _in_groups(reward_model.group_scores(module, params, batch), C)
        per_row, values = reward_model.preference_loss(scores, loss)
        return (jnp.sum(per_row), jnp.float32(rows)), values

    def of_rows(state, batch):
        grads, values = train_state.gradients(summed, state.params, batch)
        return train_state.apply_gradients(state, grads, values, made)

    jit_step = train_state.jit_step
    step = reward_model.make_train_step(module, made, loss=loss) if shared else jit_step(of_rows, donate_argnums=0)

    def batch_at(i: int) -> ScoreBatch:
        ids = random_tokens(sizes, i, rows, prompt + 2 * answer)
        groups = []
        for x, y in ((row[:prompt], row[prompt:].reshape(2, answer)) for row in ids):
            order = ((0, 1), (0, 0), (1, 1), (1, 0)) if gap else ((0,), (1,))
            groups.append([np.concatenate([x, *(y[j] for j in places)]) for places in order])
        found = batches.score_rows(groups)
        return found if shared else _as_rows(found)

    if shared:
        flops, tokens = tree_flops(sizes, rows, prompt, answer, 2 if gap else 1), prompt + (6 if gap else 2) * answer
    else:
        flops, tokens = forward_flops(sizes, rows * C, length, 0), C * length
    flops -= unread_flops(sizes, rows * (tokens - C))
    return Work(rows * C * length, "tokens of rows", (Phase(3 * flops),), _training(module, step, batch_at))


MIXED_LENGTHS = (32, 257)
"""Tokens of a prompt or an answer of `mixed_reward_work`: from the first up to below the second, all as often."""


def mixed_reward_work(sizes: ModelConfig, rows: int, batch_size: int, layout: str) -> Work:
    """Bradley-Terry on pairs whose prompts and answers have 32 to 256 tokens each; a call is an epoch.

    Args:
      sizes: of the reward model.
      rows: pairs.
      batch_size: of them.
      layout: packed: in sequences of 1024 tokens; like: a sequence each, batches of like length; padded: a sequence
        each, all as long as the longest.
    """
    module, rng = ScalarModel(sizes), np.random.default_rng(0)
    lengths = rng.integers(*MIXED_LENGTHS, (rows, 3))
    parts = [[rng.integers(3, sizes.vocab_size, n, dtype=np.int32) for n in of] for of in lengths]
    groups = [[np.concatenate([x, y]) for y in answers] for x, *answers in parts]
    num_steps, counted = rows // batch_size, batches.group_sizes(groups)
    if layout == "packed":
        batch_at, _ = batches.make_packed_score_batch_at(groups, counted, batch_size, 0, num_steps, 1024)
    else:
        steps = 1 if layout == "padded" else 32  # few steps have one shape, many have eight
        batch_at = batches.make_score_batch_at(groups, counted, batch_size, 0, steps)

    def start(compile: Callable) -> Callable[[int], Any]:
        state = train_state.create(common.init_params(module, jax.random.key(0)), optimizer())
        step = reward_model.make_train_step(module, optimizer(), loss="gap")
        shapes = {batch.tokens.shape: batch for batch in map(batch_at, range(num_steps))}
        steps = {shape: compile(step, state, batch) for shape, batch in shapes.items()}

        def call(i: int):
            nonlocal state
            values = []
            for batch in map(batch_at, range(num_steps)):
                state, some = steps[batch.tokens.shape](state, batch)
                values.append(some)
            return metrics.reduce(jax.tree.map(lambda *x: sum(x), *values))

        return call

    flops = sum(
        forward_flops(sizes, 1, x, 0) + sum(forward_flops(sizes, 1, y, 0, start=x) for y in answers)
        for x, *answers in lengths.tolist()
    ) - unread_flops(sizes, int(np.sum(lengths)) - 2 * rows)
    tokens = int(np.sum(2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]))
    return Work(tokens, "tokens of rows", (Phase(3 * flops),), start)


def dpo_work(sizes: ModelConfig, rows: int, prompt: int, answer: int, *, shared: bool = True) -> Work:
    """DPO on pairs, with the log-probs of ref_policy as they are stored with the data.

    Args:
      sizes: of the policy.
      rows: pairs.
      prompt, answer: tokens of each.
      shared: False: chosen and rejected are sequences of their own, as elsewhere.
    """
    module, made = Transformer(sizes), optimizer()
    length, ref_log_probs = prompt + answer, np.full((rows, 2), -1000.0, np.float32)

    def answers_at(i: int) -> list[np.ndarray]:
        """x, y_w and y_l, [rows, n] each."""
        return np.split(random_tokens(sizes, i, rows, length + answer), [prompt, length], axis=1)

    def pairs_at(i: int) -> pairs.PairBatch:
        return pairs.pair_rows(list(zip(*answers_at(i), strict=True)))._replace(ref_log_probs=ref_log_probs)

    def rows_at(i: int) -> sft.SFTBatch:
        x, *answers = answers_at(i)
        tokens = np.stack([np.concatenate([x, y], 1) for y in answers], 1).reshape(2 * rows, length)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        return sft.SFTBatch(TokenBatch(tokens, np.ones_like(tokens), positions, positions >= prompt))

    def summed(params, batch):
        log_probs, mask = sft.row_log_probs(module, params, batch.likely, num_targets=answer)
        sums = _in_groups(jnp.sum(jnp.where(mask, log_probs, 0.0), axis=1), 2)
        per_row, values = preference.dpo_loss(sums, jnp.asarray(ref_log_probs), beta=0.1)
        return (jnp.sum(per_row), jnp.float32(rows)), values

    def of_rows(state, batch):
        grads, values = train_state.gradients(summed, state.params, batch)
        return train_state.apply_gradients(state, grads, values, made)

    if shared:
        step, batch_at = dpo.make_train_step(module, made, beta=0.1), pairs_at
        flops = tree_flops(sizes, rows, prompt, answer, depth=1)
        flops += rows * 2 * answer * 2.0 * num_matrix_parameters(sizes)[1]
        flops -= unread_flops(sizes, rows * prompt)
    else:
        step, batch_at = train_state.jit_step(of_rows, donate_argnums=0), rows_at
        flops = forward_flops(sizes, 2 * rows, length, answer) - unread_flops(sizes, 2 * rows * prompt)
    return Work(2 * rows * length, "tokens of rows", (Phase(3 * flops),), _training(module, step, batch_at))


def sampling_phases(sizes: ModelConfig, rows: int, prompt: int, new: int) -> tuple[Phase, ...]:
    """Prefill, and one phase for each further token: weights and cache are read once for all rows, in float32."""
    layers, unembedding = num_matrix_parameters(sizes)
    of_token = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim
    steps = (
        Phase(forward_flops(sizes, rows, 1, 1, start=at), 4.0 * (layers + unembedding + rows * (at + 1) * of_token))
        for at in range(prompt, prompt + new - 1)
    )
    return Phase(prompt_flops(sizes, rows, prompt)), *steps


def sampling_work(sizes: ModelConfig, rows: int, prompt: int, new: int) -> Work:
    """Answers of `new` tokens to prompts of one length, at temperature 1."""
    generate = common.jitted_generate(Transformer(sizes), SamplingConfig(max_new_tokens=new), NEVER)
    lengths = np.full(rows, prompt, np.int32)
    prompts_at = lambda i: PromptBatch(random_tokens(sizes, i, rows, prompt), lengths)  # noqa: E731

    def start(compile: Callable) -> Callable[[int], Any]:
        params = common.init_params(Transformer(sizes), jax.random.key(0))
        run = compile(generate, params, sharding.shard_batch(prompts_at(0)), jax.random.key(0))

        def call(i: int):
            return sharding.to_host(run(params, sharding.shard_batch(prompts_at(i)), jax.random.key(i)).tokens)

        return call

    return Work(rows * new, "new tokens", sampling_phases(sizes, rows, prompt, new), start)


def prompts_work(sizes: ModelConfig, rows: int, size: int, window: int, new: int, *, padded: bool = False) -> Work:
    """Answers of `new` tokens to prompts of which half have less than a fifth of the window: what dialogues are like.

    Args:
      sizes: of the decoder.
      rows, size: prompts, and rows of a batch.
      window: tokens of the longest prompt.
      new: tokens of an answer.
      padded: whether all prompts are padded to the window, in the order in which they come.
    """
    generate = common.jitted_generate(Transformer(sizes), SamplingConfig(max_new_tokens=new), NEVER)
    rng = np.random.default_rng(0)
    lengths = np.minimum(8 + rng.exponential(0.25 * window, rows), window).astype(np.int32)
    prompts = [rng.integers(3, sizes.vocab_size, n, dtype=np.int32) for n in lengths]
    buckets = np.full_like(lengths, window) if padded else batches.prompt_lengths(lengths, window)
    read = batches.like_length_batches(buckets, size)

    def start(compile: Callable) -> Callable[[int], Any]:
        params = common.init_params(Transformer(sizes), jax.random.key(0))
        key, made = jax.random.key(0), {}
        put = lambda numbers, length: sharding.shard_batch(  # noqa: E731
            batches.prompt_rows([prompts[i] for i in numbers], length)
        )
        for numbers, length in read:
            if length not in made:
                made[length] = compile(generate, params, put(numbers, length), key)

        def call(i: int):
            return [
                sharding.to_host(made[length](params, put(numbers, length), key)).tokens for numbers, length in read
            ]

        return call

    flops = sum(
        prompt_flops(sizes, 1, n) + forward_flops(sizes, 1, new - 1, new - 1, start=n) for n in lengths.tolist()
    )
    return Work(rows * new, "new tokens", (Phase(flops, None),), start)


def mixed_work(sizes: ModelConfig, rows: int, slots: int, prompt: int, new: int, *, replace: bool) -> Work:
    """Answers of 1 to `new` tokens, 32 in the mean, `slots` at a time: the vocabulary has 32 words, and EOS is one.

    Args:
      sizes: of the decoder.
      rows: prompts.
      slots: rows at a time.
      prompt, new: tokens of each prompt, and of an answer at most.
      replace: whether rows that end make room for others; else `slots` of them are a batch, up to the longest.
    """
    module = Transformer(dataclasses.replace(sizes, num_tokens=32))
    settings = SamplingConfig(max_new_tokens=new, slots=slots)
    generate = common.jitted_generate(module, settings, 2)
    size = rows if replace else slots
    lengths = np.full(size, prompt, np.int32)

    def prompts_at(i: int) -> list[PromptBatch]:
        tokens = np.random.default_rng(i).integers(3, 32, (rows // size, size, prompt), dtype=np.int32)
        return [sharding.shard_batch(PromptBatch(some, lengths)) for some in tokens]

    def start(compile: Callable) -> Callable[[int], Any]:
        params = common.init_params(module, jax.random.key(0))
        run = compile(generate, params, prompts_at(0)[0], jax.random.key(0))

        def call(i: int):
            keys = jax.random.split(jax.random.key(i), rows // size)
            found = [sharding.to_host(run(params, *both)) for both in zip(prompts_at(i), keys, strict=True)]
            return np.concatenate([rollout.response_mask.sum(1) for rollout in found])

        return call

    flops = prompt_flops(sizes, rows, prompt) + forward_flops(sizes, rows, 31, 31, start=prompt)
    return Work(rows, "answers", (Phase(flops, None),), start)


def ppo_work(sizes: ModelConfig, rows: int, prompt: int, new: int, epochs: int, minibatches: int = 1) -> Work:
    """A whole iteration: sampling, log-probs of ref_policy, scores, values, and the updates; all models are `sizes`."""
    settings = PPOConfig(rollout_size=rows, num_epochs=epochs, num_minibatches=minibatches)
    module, scorer, made = Transformer(sizes), ScalarModel(sizes), optimizer()
    scored = lambda params, rollout, _: ppo.rollout_scores(scorer, params, rollout)  # noqa: E731
    sample, judge, update = ppo.make_ppo(
        module, Transformer(sizes, sharding.DECODE_RULES), scorer, scored, made, made, settings,
        max_new_tokens=new, eos_id=NEVER,
    )  # fmt: skip
    lengths = np.full(rows, prompt, np.int32)

    def start(compile: Callable) -> Callable[[int], Any]:
        keys = jax.random.split(jax.random.key(0), 4)
        policy, reference = (common.init_params(module, keys[0]) for _ in range(2))
        value, reward = (common.init_params(scorer, key) for key in keys[1:3])
        state, key = ppo.create(policy, value, made, made, settings.kl_coef), keys[3]
        batch_at = lambda i: sharding.shard_batch(  # noqa: E731
            ppo.RLBatch(PromptBatch(random_tokens(sizes, i, rows, prompt), lengths))
        )
        batch = batch_at(0)
        rollout = jax.eval_shape(sample, state, batch, key)
        experience, _, statistics, values = jax.eval_shape(judge, state, reference, reward, batch, rollout)
        sampled = compile(sample, state, batch, key)
        judged = compile(judge, state, reference, reward, batch, rollout)
        updated = compile(update, state, experience, statistics, values["kl"][0], key)

        def call(i: int):
            nonlocal state
            batch = batch_at(i)
            experience, _, statistics, values = judged(state, reference, reward, batch, sampled(state, batch, key))
            state, more = updated(state, experience, statistics, values["kl"][0] / values["kl"][1], key)
            return metrics.reduce(values | more)

        return call

    length = prompt + new
    read, value = (forward_flops(sizes, rows, length, n) - unread_flops(sizes, rows * prompt) for n in (new, 0))
    score = forward_flops(sizes, rows, length, 0) - unread_flops(sizes, rows * (length - 1))
    phases = (*sampling_phases(sizes, rows, prompt, new), Phase(read + value + score + epochs * 3 * (read + value)))
    return Work(rows * length, "tokens of rollouts", phases, start)


def works() -> dict[str, Callable[[], Work]]:
    """Name -> what makes the work."""
    small, tiny = SIZES["small"], SIZES["tiny"]
    make = functools.partial
    return {
        "sft_small": make(sft_work, small, 8, 512),
        "sft_tiny": make(sft_work, tiny, 16, 256),
        "dpo_small": make(dpo_work, small, 8, 128, 128),
        "dpo_small_rows": make(dpo_work, small, 8, 128, 128, shared=False),
        "rm_small": make(reward_work, small, 8, 0, 256, gap=False),
        "rm_small_prompt": make(reward_work, small, 8, 128, 128, gap=False),
        "rm_tiny_mixed": make(mixed_reward_work, tiny, 64, 8, "packed"),
        "rm_tiny_mixed_like": make(mixed_reward_work, tiny, 64, 8, "like"),
        "rm_tiny_mixed_padded": make(mixed_reward_work, tiny, 64, 8, "padded"),
        "gap_small_128": make(reward_work, small, 4, 128, 128, gap=True),
        "gap_small_128_rows": make(reward_work, small, 4, 128, 128, gap=True, shared=False),
        "gap_small_512": make(reward_work, small, 1, 512, 512, gap=True),
        "gap_small_512_rows": make(reward_work, small, 1, 512, 512, gap=True, shared=False),
        "gen_small_b16": make(sampling_work, small, 16, 128, 128),
        "gen_small_b64": make(sampling_work, small, 64, 128, 128),
        "gen_tiny_b16": make(sampling_work, tiny, 16, 128, 128),
        "gen_tiny_b64": make(sampling_work, tiny, 64, 128, 128),
        "gen_tiny_prompts": make(prompts_work, tiny, 128, 32, 512, 64),
        "gen_tiny_prompts_padded": make(prompts_work, tiny, 128, 32, 512, 64, padded=True),
        "gen_small_mixed": make(mixed_work, small, 128, 16, 128, 128, replace=True),
        "gen_small_mixed_batches": make(mixed_work, small, 128, 16, 128, 128, replace=False),
        "gen_tiny_mixed": make(mixed_work, tiny, 128, 16, 128, 128, replace=True),
        "gen_tiny_mixed_batches": make(mixed_work, tiny, 128, 16, 128, 128, replace=False),
        "ppo_tiny_e1": make(ppo_work, tiny, 32, 64, 64, 1),
        "ppo_tiny_e4": make(ppo_work, tiny, 32, 64, 64, 4),
    }


def describe(name: str) -> dict[str, Any]:
    """What another library needs to do the same (launch/peers.sh), as JSON: sizes, numbers, and what a call counts."""
    make = works()[name]
    made = make()
    given = inspect.signature(make.func).bind(*make.args, **make.keywords)
    given.apply_defaults()
    sizes = dataclasses.asdict(given.arguments.pop("sizes"))
    optimizer = dataclasses.asdict(OPTIMIZER)
    return {"work": name, "tokens": made.tokens, "unit": made.unit, "sizes": sizes, "optimizer": optimizer} | (
        given.arguments
    )
