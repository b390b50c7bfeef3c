"""Answers of a finished stage's model: what was written, what it took, and the noise that it depends on."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from pit_jax import sharding
from pit_jax.config import SamplingConfig
from pit_jax.data import batches
from pit_jax.pipelines import common
from pit_jax.pipelines.common import Context
from pit_jax.types import Params

Ids = tuple[int, ...]


class Step(NamedTuple):
    """An answer and what it took.

    Attributes:
      ids: of the answer, without EOS.
      read: tokens that policies were given to write it.
      written: tokens that they sampled, EOS and feedback among them.
      scored: tokens that reward models were given to choose it, or to decide whether to go on.
      parsed: False where the feedback could not be used, so that the answer is the one before.
      gap: r_gap(x, y_k, y_{k-1}) by R_PIT; None for y_0, and where it was not asked for.
      gain: gap - r_gap(x, y_{k-1}, y_{k-1}): how much further than a copy. A copy has 0, whatever the offset of R_PIT.
      feedback: the critique that it follows, where it is in words (SRT).
    """

    ids: Ids
    read: int = 0
    written: int = 0
    scored: int = 0
    parsed: bool = True
    gap: float | None = None
    gain: float | None = None
    feedback: str = ""

    @property
    def tokens(self) -> int:
        """All that it took."""
        return self.read + self.written + self.scored


Draws = np.ndarray
"""[n, 2] uint32: row number and iteration of each answer to be written. They pick its noise."""


class Sampler:
    """A model of a finished stage that answers prompts, `size` at a time so that one program serves all."""

    def __init__(
        self,
        context: Context,
        stage: str,
        window: int,
        settings: SamplingConfig,
        size: int,
        params: Params = None,
        stop: Ids = (),
    ):
        """Loads the model.

        Args:
          context: of the run.
          stage: of the model.
          window: longest prompt.
          settings: of sampling.
          size: rows of a batch.
          params: of the model, where they are in memory already.
          stop: ids that end an answer, beside EOS; they are not part of it.
        """
        self._eos, self._stop = context.encoder.tokenizer.eos_id, tuple(stop)
        self._params = common.load_model(context, stage) if params is None else params
        self._generate = common.jitted_generate(common.model_of(context, stage), settings, self._eos, self._stop)
        self._window, self._size = batches.round_up(window), batches.round_up(size, sharding.mesh_shape()["data"])

    def __call__(self, prompts: Sequence[Sequence[int]], key: jax.Array, draws: Draws) -> list[Step]:
        """One answer per prompt; prompts of like length are read together."""
        steps = {}
        padded = batches.prompt_lengths(np.asarray([len(ids) for ids in prompts], np.int32), self._window)
        for index, length in batches.like_length_batches(padded, self._size):
            arrays = sharding.shard_batch(batches.prompt_rows([prompts[i] for i in index], length))
            rollout = sharding.to_host(self._generate(self._params, arrays, row_keys(key, draws[index])))
            written = np.sum(rollout.response_mask, axis=1)
            for i, ids, n in zip(index, common.response_ids(rollout, self._eos), written, strict=True):
                steps[i] = Step(self._without_stop(ids), read=len(prompts[i]), written=int(n))
        return [steps[i] for i in range(len(prompts))]

    @property
    def stops(self) -> bool:
        """Whether ids beside EOS end an answer."""
        return bool(self._stop)

    def _without_stop(self, ids: Sequence[int]) -> Ids:
        ids, n = tuple(ids), len(self._stop)
        return ids[:-n] if n and ids[-n:] == self._stop else ids


@jax.jit
def row_keys(key: jax.Array, draws: Draws) -> jax.Array:
    """A key per row, from its number and iteration alone."""
    return jax.vmap(lambda draw: jax.random.fold_in(jax.random.fold_in(key, draw[0]), draw[1]))(draws)
