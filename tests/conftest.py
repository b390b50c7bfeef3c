"""Eight CPU devices for the whole suite, set before JAX starts, and what several modules use."""

import fcntl
import os
import pathlib
import shutil

os.environ["JAX_PLATFORMS"] = "cpu"
# Almost all of the time goes into compiling small programs: level 0 halves it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import commands
import jax
import pytest
from etils import epath

from pit_jax import files, sharding


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="Also run the tests that are marked slow.")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: bash launch/test.sh --parity --slow runs it"))


@pytest.fixture(scope="module")
def one_device():
    """An explicit 1 x 1 mesh, set for a module."""
    with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])) as mesh:
        yield mesh


def shared_folder(tmp_path_factory, worker_id: str) -> pathlib.Path:
    """What all processes of pytest-xdist see."""
    root = tmp_path_factory.getbasetemp()
    return root if worker_id == "master" else root.parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory, worker_id):
    """One compilation cache for all commands."""
    return shared_folder(tmp_path_factory, worker_id) / "compilation_cache"


def finished_run(tmp_path_factory, worker_id: str, config: str, cache) -> tuple[pathlib.Path, str]:
    """A finished run and what it printed: trained by the first process that asks, and a copy for each."""
    shared = shared_folder(tmp_path_factory, worker_id) / config.replace("/", "_").replace(":", "_")
    with open(f"{shared}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not (shared / "printed").exists():
            shutil.rmtree(shared, ignore_errors=True)
            result = commands.train(shared / "smoke", config=config, cache=cache)
            assert result.returncode == 0, result.stderr[-3000:]
            (shared / "printed").write_text(result.stdout, encoding="utf-8")
        workdir = tmp_path_factory.mktemp("run") / "smoke"
        shutil.copytree(shared / "smoke", workdir)
        printed = (shared / "printed").read_text(encoding="utf-8")
    return workdir, printed.replace(str(shared / "smoke"), str(workdir))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id, cache):
    """A finished smoke run of PIT and what it printed; who changes it works on a copy."""
    return finished_run(tmp_path_factory, worker_id, commands.CONFIG, cache)


@pytest.fixture(scope="session")
def finished_srt(tmp_path_factory, worker_id, cache):
    """The same of SRT."""
    return finished_run(tmp_path_factory, worker_id, commands.SRT_CONFIG, cache)


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A folder that counts as a bucket. A real one has not been tried."""
    root, place = tmp_path / "bucket", files.place
    is_remote = lambda path: str(path).startswith((str(root), "gs://"))  # noqa: E731
    monkeypatch.setattr(files, "is_remote", is_remote)
    monkeypatch.setattr(files, "place", lambda name: epath.Path(name) if is_remote(name) else place(name))
    return epath.Path(root)
