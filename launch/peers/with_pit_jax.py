"""This package, by the same clock as the others: in its own environment, with pit_jax.works itself."""

import common
import jax
import jax.numpy as jnp
import numpy as np

from pit_jax import sharding, works


def multiply(matrix: np.ndarray):
    """See common.limit."""
    matrix, product = jnp.asarray(matrix), jax.jit(jnp.matmul)
    return lambda: product(matrix, matrix).block_until_ready()


def run(work: dict, variant: str, calls: int, ends: common.Ends) -> None:
    """Calls of a work; the first one has the compiling before it."""
    with jax.set_mesh(sharding.make_mesh()):
        ends.mark()
        call = works.works()[work["work"]]().start(lambda function, *arguments: function.lower(*arguments).compile())
        for i in range(calls):
            jax.block_until_ready(call(i))
            ends.mark()


if __name__ == "__main__":
    common.main(multiply, dict.fromkeys(("sft", "dpo", "rm", "ppo", "gen"), run), ("pit_jax", "jax", "flax", "optax"))
