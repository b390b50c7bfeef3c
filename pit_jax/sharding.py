"""Where arrays live: one dataclass from logical axes to mesh axes, and the mesh itself.

The mesh is always explicit (`jax.sharding.AxisType.Explicit`): the sharding of an array is part of its type, so that a
batch or an FSDP axis that would be lost is an error while tracing, on a 1 x 1 mesh on a laptop as on a pod.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

P = jax.P


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Logical axis -> mesh axis (or None: replicated).

    Attributes:
      batch: rows of a batch.
      embed: the model width of stored weights: FSDP. Weights are gathered over it just before use.
      heads: key/value head groups (and the query heads that belong to them).
      mlp: MLP width.
      vocab: vocabulary of the unembedding and of logits.
    """

    batch: str | None = "data"
    embed: str | None = "data"
    heads: str | None = "model"
    mlp: str | None = "model"
    vocab: str | None = "model"

    def spec(self, *axes: str | None) -> jax.P:
        """`spec("batch", None, "heads")` -> the PartitionSpec of an array with these logical axes."""
        return P(*(None if axis is None else getattr(self, axis) for axis in axes))


RULES = AxisRules()
DECODE_RULES = dataclasses.replace(RULES, embed=None)
"""Weights gathered once per rollout instead of once per decoded token."""


def make_mesh(data: int = 0, model: int = 1, devices=None) -> jax.sharding.Mesh:
    """An explicit `data` x `model` mesh.

    Args:
      data: size of the data axis; 0 takes all devices that `model` leaves.
      model: size of the tensor-parallel axis.
      devices: devices to use; all by default.

    Raises:
      ValueError: where the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if model > len(devices):
        raise ValueError(
            f"config.mesh.model={model} needs at least {model} devices, but there are {len(devices)}: take a larger "
            f"slice, or --config.mesh.model={len(devices)} or less"
        )
    if not data and len(devices) % model:
        raise ValueError(f"config.mesh.model={model} is no divisor of the {len(devices)} devices: take one that is")
    data = data or len(devices) // model
    if data * model != len(devices):
        raise ValueError(
            f"mesh.data={data} x mesh.model={model} needs {data * model} devices, but there are {len(devices)}: "
            "set config.mesh.data=0 (all that are left) or axes whose product is the number of devices."
        )
    if devices[0].platform == "tpu":  # neighbours on the mesh are neighbours in the slice
        grid = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(data, model)
    axis_types = (jax.sharding.AxisType.Explicit,) * 2
    return jax.sharding.Mesh(grid, ("data", "model"), axis_types=axis_types)


def mesh_shape() -> dict[str, int]:
    """Axis sizes of the mesh that is set."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def shard_batch(batch, rules: AxisRules = RULES):
    """Puts host arrays on the mesh with their first axis along `batch`.

    With many processes all hold the same arrays, and each puts the rows of its own devices there.
    """

    def put(x):
        x, spec = np.asarray(x), rules.spec("batch", *[None] * (np.ndim(x) - 1))
        if jax.process_count() == 1:
            return jax.device_put(x, spec)
        return jax.make_array_from_callback(x.shape, jax.NamedSharding(jax.sharding.get_mesh(), spec), x.__getitem__)

    return jax.tree.map(put, batch)


def own_rows(num_rows: int, rules: AxisRules = RULES) -> np.ndarray:
    """Numbers, ascending, of those rows of a batch that lie on devices of this process."""
    if jax.process_count() == 1:
        return np.arange(num_rows)
    layout = jax.NamedSharding(jax.sharding.get_mesh(), rules.spec("batch"))
    parts = layout.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[rows] for (rows,) in parts]))


def make_batch(num_rows: int, make: Callable[[np.ndarray], Any], rules: AxisRules = RULES):
    """A batch on the mesh, its first axis along `batch`, of which each process makes the rows that its devices hold.

    Args:
      num_rows: B.
      make: numbers [n] of rows of the batch, ascending -> host arrays [n, ...] with these rows.
      rules: the layout.
    """
    own = own_rows(num_rows, rules)
    if jax.process_count() == 1:
        return shard_batch(make(own), rules)
    mesh = jax.sharding.get_mesh()

    def put(x):
        layout = jax.NamedSharding(mesh, rules.spec("batch", *[None] * (x.ndim - 1)))
        part = lambda index: x[np.searchsorted(own, np.arange(num_rows)[index[0]])]  # noqa: E731
        return jax.make_array_from_callback((num_rows, *x.shape[1:]), layout, part)

    return jax.tree.map(put, make(own))


def own_part(tree, rules: AxisRules = RULES):
    """NumPy arrays of the rows that `own_rows` numbers, of arrays with their first axis along `batch`."""

    def one(x):
        own = own_rows(len(x), rules)
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)[own]
        found = np.zeros((len(own), *x.shape[1:]), x.dtype)
        for shard in x.addressable_shards:
            found[np.searchsorted(own, np.arange(len(x))[shard.index[0]])] = shard.data
        return found

    return jax.tree.map(one, tree)


def to_host(tree):
    """NumPy arrays of all rows, in every process."""
    here = lambda x: not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated  # noqa: E731
    return jax.device_get(jax.tree.map(lambda x: x if here(x) else replicate(x), tree))


def replicate(tree):
    """Arrays, of the host or of the mesh, whole on every device."""
    return jax.tree.map(lambda x: jax.sharding.reshard(x, P(*[None] * np.ndim(x))), tree)


def laid_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x` in the layout of `other`, an array of the same rank."""
    return jax.sharding.reshard(x, jax.typeof(other).sharding.spec)


def gather_weights(params, rules: AxisRules = RULES, dtype=None):
    """Parameters in the layout of DECODE_RULES: gathered over FSDP once per rollout, not once per token.

    Args:
      params: of a model.
      rules: their layout.
      dtype: of activations, to which weights are rounded at every use: rounded before they are gathered, half as much
        is gathered, held and read for each token. Scales of norms, which are not rounded, stay as they are.
    """

    def gather(path, x):
        x = x if dtype is None or path[-1].key == "scale" else x.astype(dtype)
        names = (None if name == rules.embed else name for name in jax.typeof(x).sharding.spec)
        return jax.sharding.reshard(x, P(*names))

    return jax.tree_util.tree_map_with_path(gather, params)


def take_rows(tree, rows, rules: AxisRules = RULES):
    """Rows of every array of a batch, in a new order, laid along `batch`."""
    return jax.tree.map(lambda x: x.at[rows].get(out_sharding=rules.spec("batch", *[None] * (x.ndim - 1))), tree)
