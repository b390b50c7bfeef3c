"""Low-rank adapters (LoRA, Hu et al. 2021): a weight W is frozen, and scale * A B beside it is trained.

    variables = {
        "params": {...},                          as of a model without adapters
        "lora": {"layers": {"q": {"a": [L, inputs, rank], "b": [L, rank, outputs]}, ..., "scale": [L]}},
    }

That is all: a module reads adapters where its variables have some (`Block._project`), so there are no two modules, and
`{"params": variables["params"]}` is the model as it started. The scale is among them so that no copy of the module, as
that for decoding, can be without it. Inputs and outputs are the axes of the weight ("o": three and one); a reward model
has the same under "backbone".
"""

import math

import jax
import jax.numpy as jnp
from flax import traverse_util

from pit_jax.config import LAYER_MATRICES, LoraConfig
from pit_jax.types import Array, Params

INPUTS = {name: 3 if name == "o" else 1 for name in LAYER_MATRICES}
"""Weight of a layer -> how many axes behind the layer axis are its inputs."""

HEAD = ("head", "bias")
"""What a ScalarModel has beside its backbone: trained as it is, with the adapters."""


def is_adapted(params: Params) -> bool:
    """Whether these variables have adapters."""
    return isinstance(params, dict) and "lora" in params


def _layers(tree: dict) -> dict:
    return tree.get("backbone", tree)["layers"]


def add(params: Params, config: LoraConfig, key: Array) -> Params:
    """A model with fresh adapters, which compute what it computed: B is zero.

    A starts uniform in +-1 / sqrt(inputs), as in PEFT. Its numbers do not depend on what else is adapted.

    Args:
      params: {"params": ...} of a Transformer or a ScalarModel.
      config: rank, alpha, targets.
      key: typed PRNG key.
    """
    assert not is_adapted(params), "merge the adapters that are there first"

    def fresh(weights, key):
        L = weights[config.targets[0]].shape[0]
        adapters: dict = {"scale": jnp.full((L,), config.alpha / config.rank, jnp.float32, out_sharding=jax.P(None))}
        for name in config.targets:
            inner = 1 + INPUTS[name]
            shape, spec = weights[name].shape, jax.typeof(weights[name]).sharding.spec
            bound = math.prod(shape[1:inner]) ** -0.5
            a_shape, a_spec = (*shape[:inner], config.rank), jax.P(*spec[:inner], None)
            b_shape, b_spec = (L, config.rank, *shape[inner:]), jax.P(None, None, *spec[inner:])
            of_name = jax.random.fold_in(key, LAYER_MATRICES.index(name))
            a = jax.random.uniform(of_name, a_shape, jnp.float32, -bound, bound, out_sharding=a_spec)
            adapters[name] = {"a": a, "b": jnp.zeros(b_shape, jnp.float32, out_sharding=b_spec)}
        return {"layers": adapters}

    adapters = jax.jit(fresh)(_layers(params["params"]), key)
    return params | {"lora": {"backbone": adapters} if "backbone" in params["params"] else adapters}


def base(params: Params) -> Params:
    """The model without its adapters, which is what it started from (but for the head of a ScalarModel)."""
    return {"params": params["params"]}


def merge(params: Params) -> Params:
    """W + scale * A B in the place of W; a model without adapters as it is."""
    return _merge(params) if is_adapted(params) else params


@jax.jit
def _merge(params: Params) -> Params:
    flat = traverse_util.flatten_dict(params["params"])
    adapters = _layers(params["lora"])
    scale = adapters["scale"]
    for path, weight in flat.items():
        if path[-2:-1] == ("layers",) and path[-1] in adapters:
            a, b = (adapters[path[-1]][x] for x in "ab")
            inner = weight.ndim - 1 - INPUTS[path[-1]]  # letters: l layers, r rank
            ins, outs = "abc"[: INPUTS[path[-1]]], "xyz"[:inner]
            change = jnp.einsum(f"l{ins}r,lr{outs}->l{ins}{outs}", a, b, precision="highest")
            flat[path] = weight + scale.reshape(-1, *[1] * (weight.ndim - 1)) * change
    return {"params": traverse_util.unflatten_dict(flat)}


def _is_trained(path: tuple[str, ...]) -> bool:
    return path[-1] != "scale" if path[0] == "lora" else path[1:] in [(name,) for name in HEAD]


def trained(params: Params) -> Params:
    """What a learner changes: adapters and the head of a ScalarModel; all parameters where there are no adapters."""
    if not is_adapted(params):
        return params
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: x for path, x in flat.items() if _is_trained(path)})


def with_trained(params: Params, changed: Params) -> Params:
    """`params` with what `trained` gives of them in another version."""
    if not is_adapted(params):
        return changed
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | traverse_util.flatten_dict(changed))


@jax.jit
def checksums(params: Params) -> Array:
    """Sums of the bits of each frozen leaf, [leaves] uint32: alike on every mesh, as integers are added exactly."""
    flat = traverse_util.flatten_dict(params)
    bits = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)  # noqa: E731
    return jnp.stack([jnp.sum(bits(x), dtype=jnp.uint32) for path, x in sorted(flat.items()) if not _is_trained(path)])
