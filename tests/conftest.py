"""Eight CPU devices for the whole suite, set before JAX starts; `one_device` is the mesh of tests that need but one."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Almost all of the time goes into compiling small programs: level 0 halves it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import pytest

from pit_jax import sharding


@pytest.fixture(scope="module")
def one_device():
    """An explicit 1 x 1 mesh, set for a module."""
    with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])) as mesh:
        yield mesh
