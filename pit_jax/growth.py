"""How time and memory grow with the length of rows, the vocabulary, rows per batch and layers, one at a time.

The programs are a step of SFT, its log-probs in chunks, on a decoder of about a million parameters, and those log-probs
alone, with their gradients. What should come out: at a constant number of tokens the memory of both does not depend on
the length, but for what a step holds of each token; log-probs alone hold a chunk of logits, so they grow with the
vocabulary and not with the length; all else is at most proportional.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pit_jax import sharding
from pit_jax.config import ModelConfig
from pit_jax.losses.log_probs import token_log_probs
from pit_jax.types import Array
from pit_jax.works import Phase, Work, random_tokens, sft_work

SIZES = ModelConfig(
    vocab_size=2048, num_layers=2, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=384,
    tie_embeddings=True,
)  # fmt: skip
CHUNK = 64
"""Positions of each row whose logits exist at a time."""

TOKENS, ROWS, LENGTH = 8192, 8, 256
"""Of a batch where the length grows; rows and their length where something else does."""

VALUES = {
    "length": (256, 512, 1024, 2048, 4096, 8192),
    "vocabulary": (2048, 8192, 32_768, 131_072, 262_144),
    "batch": (1, 4, 16, 64),
    "layers": (1, 2, 4, 8, 16),
}
"""What grows -> its values."""


class Point(NamedTuple):
    """A line of a table.

    Attributes:
      program: "sft" or "log-probs".
      value: of what grows.
      rows, length: of the batch.
      work: what is measured.
    """

    program: str
    value: int
    rows: int
    length: int
    work: Callable[[], Work]


def summed_log_probs(table: Array, hidden: Array, targets: Array, chunk: int) -> Array:
    """Of all targets [B, T] behind hidden states [B, T, D], by a table [V, D]."""
    logits = lambda h: jnp.einsum("btd,vd->btv", h, table)  # noqa: E731
    return jnp.sum(token_log_probs(logits, hidden, targets, chunk_size=chunk, with_entropy=False)[0])


def log_probs_program(chunk: int = CHUNK) -> Callable:
    """(table [V, D], hidden [B, T, D], targets [B, T]) -> (sum, gradients of the first two), jitted."""
    return jax.jit(jax.value_and_grad(functools.partial(summed_log_probs, chunk=chunk), argnums=(0, 1)))


def log_probs_work(sizes: ModelConfig, rows: int, length: int, chunk: int = CHUNK) -> Work:
    """Log-probs of all tokens of `rows`, and the gradients of hidden states and table."""
    keys = jax.random.split(jax.random.key(0))

    def start(compile: Callable) -> Callable[[int], Any]:
        spec = sharding.RULES.spec("batch", None, None)
        hidden = jax.random.normal(keys[0], (rows, length, sizes.d_model), out_sharding=spec)
        table = 0.02 * jax.random.normal(keys[1], (sizes.vocab_size, sizes.d_model), out_sharding=jax.P(None, None))
        targets = sharding.shard_batch(random_tokens(sizes, 0, rows, length))
        compiled = compile(log_probs_program(chunk), table, hidden, targets)
        return lambda i: compiled(table, hidden, targets)

    flops = 3 * 2.0 * rows * length * sizes.vocab_size * sizes.d_model
    return Work(rows * length, "tokens", (Phase(flops),), start)


def points(name: str) -> list[Point]:
    """What is measured where `name`, a key of VALUES, grows.

    Where the length grows, the step has as many tokens at every length, and log-probs alone have one row.
    """
    found = []
    for value in VALUES[name]:
        sizes = {"vocabulary": {"vocab_size": value}, "layers": {"num_layers": value}}.get(name, {})
        sizes = dataclasses.replace(SIZES, **sizes)
        length = value if name == "length" else LENGTH
        rows = {"length": TOKENS // length, "batch": value}.get(name, ROWS)
        found.append(Point("sft", value, rows, length, functools.partial(sft_work, sizes, rows, length, CHUNK)))
        if name in ("length", "vocabulary"):
            rows = 1 if name == "length" else ROWS
            alone = functools.partial(log_probs_work, sizes, rows, length)
            found.append(Point("log-probs", value, rows, length, alone))
    return sorted(found, key=lambda point: point.program, reverse=True)
