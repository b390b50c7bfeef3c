"""The programs of a config as works: weights and tokens are random, rows are as long as the config's windows allow."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax import planner, programs, speed
from pit_jax.config import ModelConfig
from pit_jax.data import batches, pairs
from pit_jax.data.pairs import PairBatch
from pit_jax.learners.ppo import Experience, PPOState, RLBatch, ScoreStatistics
from pit_jax.learners.sft import SFTBatch
from pit_jax.models import lora
from pit_jax.programs import Program
from pit_jax.slices import GIB
from pit_jax.train_state import TrainState
from pit_jax.types import Params, PromptBatch, Rollout, ScoreBatch, TokenBatch
from pit_jax.works import Phase, Work, sampling_phases

FIRST_ID = 3
"""Ids below are usually special."""


class TooLargeError(ValueError):
    """A program that the devices of this machine cannot hold."""


# ------------------------------------------------------------------------------------------------------------- weights


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, spec: jax.P) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype, out_sharding=spec)


def weights(like: Params, key: jax.Array) -> Params:
    """Normal numbers of standard deviation 0.02, born in the layout of `like`; scales are 1."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    keys = jax.random.split(key, len(leaves))

    def one(path, x, key):
        if path[-1].key == "scale":
            return jnp.ones(x.shape, x.dtype, out_sharding=x.sharding.spec)
        return _normal(key, x.shape, x.dtype, x.sharding.spec)

    return jax.tree.unflatten(tree, [one(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


# ------------------------------------------------------------------------------------------------------------- batches


class _Filler:
    """Makes the arguments of one program."""

    def __init__(self, program: Program, settings: Any, vocab_size: int, seed: int):
        self.program, self.settings, self.vocab_size = program, settings, vocab_size
        self.rng, self.key = np.random.default_rng(seed), jax.random.key(seed)
        self.optimizers = iter(program.optimizers)

    def ids(self, *shape: int) -> np.ndarray:
        """int32."""
        return self.rng.integers(FIRST_ID, self.vocab_size, shape, dtype=np.int32)

    def next_key(self) -> jax.Array:
        self.key, used = jax.random.split(self.key)
        return used

    def argument(self, like: Any) -> Any:
        """Of any kind that programs take."""
        if isinstance(like, PPOState):
            policy, value, step = self.argument(like.policy), self.argument(like.value), self.host(like.step, 0)
            return PPOState(step, policy, value, self.host(like.kl_coef, 0.1), self.argument(like.scores))
        if isinstance(like, TrainState):
            params = weights(like.params, self.next_key())
            opt_state = jax.jit(next(self.optimizers).init)(lora.trained(params))
            return TrainState(self.host(like.step, 0), params, opt_state)
        if isinstance(like, ScoreStatistics):
            return ScoreStatistics(*(self.host(x, number) for x, number in zip(like, (0.0, 1.0, 0.0), strict=True)))
        if isinstance(like, dict):
            return weights(like, self.next_key())
        if isinstance(like, tuple):
            return jax.tree.map(self.host, like, self.batch(like))
        if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.device_put(self.next_key(), like.sharding)
        return self.host(like, 0.0)

    def host(self, like: jax.ShapeDtypeStruct, value: Any) -> jax.Array:
        """From the host to the devices, to each what it holds."""
        return jax.device_put(np.asarray(value, like.dtype), like.sharding)

    def batch(self, like: Any) -> Any:
        """NumPy arrays of the shapes of a batch."""
        if isinstance(like, SFTBatch):
            return SFTBatch(*(None if rows is None else self.token_rows(rows) for rows in like))
        if isinstance(like, RLBatch):
            return RLBatch(*(None if part is None else self.batch(part) for part in like))
        if isinstance(like, Experience):
            numbers = (self.rng.normal(size=x.shape) for x in like[1:])
            return Experience(self.batch(like.rollout), *numbers)
        kinds = {ScoreBatch: self.groups, PairBatch: self.pairs, PromptBatch: self.prompts, Rollout: self.rollout}
        return kinds[type(like)](like)

    def token_rows(self, like: TokenBatch) -> TokenBatch:
        """A row in each sequence; where rows are packed as many as there is room for, of which the last is cut."""
        B, T = like.tokens.shape
        size = self.program.prompt + self.program.answer
        filled = T if self.settings.sequence_length else min(size, T)

        def sequence(ids: np.ndarray) -> list[batches.Turns]:
            rows = [ids[start : start + size] for start in range(0, filled, size)]
            return [(row[: self.program.prompt], row[self.program.prompt :]) for row in rows]

        sequences = [sequence(ids) for ids in self.ids(B, filled)]
        return batches.lay_out(sequences, T, loss_on_prompt=self.settings.loss_on_prompt)

    def groups(self, like: ScoreBatch) -> ScoreBatch:
        """x and two answers; of R_PIT two more behind each. As many groups in a sequence as there is room for."""
        (B, T), (_, E, C), answer = like.tokens.shape, like.last.shape, self.program.answer

        def group(x: np.ndarray, ys: np.ndarray) -> list[np.ndarray]:
            if C == 2:
                return [np.concatenate([x, y]) for y in ys]
            return [np.concatenate([x, ys[j], ys[i]]) for i, j in ((0, 1), (0, 0), (1, 1), (1, 0))]

        x, y = self.ids(B, E, self.program.prompt), self.ids(B, E, 2, answer)
        sequences = [[group(*of) for of in zip(*both, strict=True)] for both in zip(x, y, strict=True)]
        return batches.lay_out_groups(sequences, T, E, C)

    def pairs(self, like: PairBatch) -> PairBatch:
        """x, y_w and y_l."""
        (B, T), R = like.tokens.shape, like.targets.shape[1]
        x, y = self.ids(B, self.program.prompt), self.ids(B, 2, self.program.answer)
        rows = [(a, *b) for a, b in zip(x, y, strict=True)]
        ref_log_probs = np.full((B, 2), -10.0 * self.program.answer)
        return pairs.pair_rows(rows, length=T, num_targets=R)._replace(ref_log_probs=ref_log_probs)

    def prompts(self, like: PromptBatch) -> PromptBatch:
        """As long as there is room."""
        B, P = like.tokens.shape
        return PromptBatch(self.ids(B, P), np.full(B, P))

    def rollout(self, like: Rollout) -> Rollout:
        """Answers as long as there is room."""
        shape, answers = like.tokens.shape, like.response_mask.shape
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        log_probs = np.full(answers, -np.log(self.vocab_size))
        return Rollout(self.ids(*shape), np.ones(shape), positions, log_probs, np.ones(answers))


def arguments(program: Program, config: Any, seed: int = 0) -> tuple:
    """Values for the arguments of a program, on the mesh that is set, none ever whole on one device.

    Args:
      program: of `programs.programs`.
      config: that it is of.
      seed: of tokens and weights.
    """
    sizes = {programs.field(config, program.model), getattr(config, "reward_model", config.policy_model)}
    vocab_size = min(of.num_tokens or of.vocab_size for of in sizes)
    filler = _Filler(program, programs.field(config, program.settings), vocab_size, seed)
    return tuple(filler.argument(like) for like in program.arguments)


# --------------------------------------------------------------------------------------------------------------- works


def phases(program: Program, sizes: ModelConfig) -> tuple[Phase, ...]:
    """What a call takes at least: of a program that samples the prefill, and each token; else its operations."""
    if not program.while_trips:
        return (Phase(program.model_flops),)
    R = program.while_trips
    scale = jnp.dtype(sizes.dtype).itemsize / 4
    _, *decode = sampling_phases(sizes, program.batch, program.length - R, R)
    decode = [phase._replace(bytes=scale * phase.bytes) for phase in decode]
    return Phase(max(program.model_flops - sum(phase.flops for phase in decode), 0.0)), *decode


def work(program: Program, config: Any, available: float) -> Work:
    """What `speed.measure` calls.

    Args:
      program: of `programs.programs`.
      config: that it is of.
      available: bytes that a device can hold.

    Raises (when it is started):
      TooLargeError: where a device cannot hold it.
    """

    def check(needed: float, what: str) -> None:
        if needed > available:
            raise TooLargeError(
                f"{program.stage} needs {what} {needed / GIB:.2f} GiB on each device, which has {available / GIB:.2f}"
            )

    def start(compile: Callable) -> Callable[[int], Any]:
        check(planner.least_bytes(program), "at least")  # before minutes of compiling
        made = compile(program.function, *program.arguments)
        check(max(speed.peak_bytes(made)[0], planner.least_bytes(program)), "")
        given = arguments(program, config)
        fed_back = any(x.donated for x in jax.tree.leaves(made.args_info[0][0]))

        def call(i: int) -> Any:
            nonlocal given
            found = made(*given)
            if fed_back:  # a state is donated, and the new one comes first
                given = (found[0], *given[1:])
            return found

        return call

    tokens = program.batch * program.while_trips if program.while_trips else program.num_tokens
    unit = "new tokens" if program.while_trips else "tokens of rows"
    return Work(tokens, unit, phases(program, programs.field(config, program.model)), start)
