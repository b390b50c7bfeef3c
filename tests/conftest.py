"""Eight CPU devices for the whole suite, set before JAX starts, and what several modules use."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Almost all of the time goes into compiling small programs: level 0 halves it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import commands
import jax
import pytest

from pit_jax import sharding


@pytest.fixture(scope="module")
def one_device():
    """An explicit 1 x 1 mesh, set for a module."""
    with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One compilation cache for all commands."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache):
    """A finished smoke run and what it printed; who changes it works on a copy."""
    workdir = tmp_path_factory.mktemp("run") / "smoke"
    result = commands.train(workdir, cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    return workdir, result.stdout
