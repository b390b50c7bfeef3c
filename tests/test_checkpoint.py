import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import run as run_command

from pit_jax import checkpoint, files, processes, train_state

ROOT = Path(__file__).parent.parent


def _tree(seed=0):
    rng = np.random.default_rng(seed)
    params = {"layers": {"w": jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)}, "head": jnp.full((8,), jnp.nan)}
    return {
        "state": train_state.create(params, optax.adam(1e-3)),
        "key": jax.random.key_data(jax.random.key(seed)),
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "mask": jnp.array([True, False]),
        "host": rng.integers(0, 9, 4),
        "count": np.int32(seed),
        "round": seed,
        "kl_coef": 0.1 + seed,
    }


def _assert_same(restored, tree):
    """Bitwise, leaf by leaf, and of the same kinds."""
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(restored)[0], jax.tree.leaves(tree), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array), path
        a_array, b_array = np.asarray(a), np.asarray(b)
        assert (a_array.dtype, a_array.shape) == (b_array.dtype, b_array.shape), path
        assert a_array.tobytes() == b_array.tobytes(), path


def test_a_train_state_comes_back_bitwise(tmp_path):
    tree = _tree(3)
    checkpoint.save(tmp_path, 7, tree)
    restored = checkpoint.restore(tmp_path, 7, _tree(0))
    _assert_same(restored, tree)
    assert type(restored["round"]) is int
    assert type(restored["kl_coef"]) is float
    assert restored["state"].step.committed is False  # so it may join arrays on any mesh


def test_abstract_leaves_are_enough(tmp_path):
    tree = {key: x for key, x in _tree(3).items() if key not in ("host", "count", "round", "kl_coef")}
    checkpoint.save(tmp_path, 7, tree)
    _assert_same(checkpoint.restore(tmp_path, 7, jax.eval_shape(lambda: tree)), tree)


def test_a_subtree_is_restored_on_its_own(tmp_path):
    tree = _tree(3)
    checkpoint.save(tmp_path, 7, tree)
    _assert_same(checkpoint.restore(tmp_path, 7, _tree(0)["state"].params, at="state/params"), tree["state"].params)
    assert checkpoint.restore(tmp_path, 7, 0, at="round") == 3
    with pytest.raises(ValueError, match="state/params/head"):
        checkpoint.restore(tmp_path, 7, {"layers": tree["state"].params["layers"]}, at="state/params")


def test_steps_are_listed_in_numerical_order_and_nothing_else_is(tmp_path):
    assert checkpoint.all_steps(tmp_path / "absent") == []
    assert checkpoint.latest_step(tmp_path) is None
    assert checkpoint.restore_latest(tmp_path, {"a": jnp.zeros(1)}) is None
    for step in (9, 100, 20):
        checkpoint.save(tmp_path, step, {"a": jnp.full(1, step)})
    (tmp_path / "300.partial").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "400").write_text("a file")
    assert checkpoint.all_steps(tmp_path) == [9, 20, 100]
    assert checkpoint.latest_step(tmp_path) == 100
    step, tree = checkpoint.restore_latest(tmp_path, {"a": jnp.zeros(1, int)})
    assert (step, int(tree["a"][0])) == (100, 100)
    with pytest.raises(ValueError, match=r"21 does not exist; the steps .* \[9, 20, 100\]"):
        checkpoint.restore(tmp_path, 21, {"a": jnp.zeros(1)})


def test_keep_leaves_the_newest(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, step, {"a": jnp.zeros(1)}, keep=2)
    assert checkpoint.all_steps(tmp_path) == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
    # A run that went back to step 3 keeps what it writes, whatever a later step left there.
    checkpoint.save(tmp_path, 3, {"a": jnp.ones(1)}, keep=1)
    assert checkpoint.all_steps(tmp_path) == [3, 4]
    assert float(checkpoint.restore(tmp_path, 3, {"a": jnp.zeros(1)})["a"][0]) == 1.0
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save(tmp_path, 5, {"a": jnp.zeros(1)}, keep=0)


def test_the_manifest_lists_every_leaf_that_does_not_fit(tmp_path):
    saved = {"params": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}, "extra": jnp.zeros(1), "n": jnp.int32(1)}
    checkpoint.save(tmp_path, 1, saved)
    like = {
        "params": {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)},
        "value_head": {"w": jnp.zeros(3)},
        "n": jnp.float32(1),
    }
    with pytest.raises(ValueError, match="does not hold the leaves") as error:
        checkpoint.restore(tmp_path, 1, like)
    text = str(error.value)
    assert not isinstance(error.value, checkpoint.DamagedError)
    assert "asked for, but not on disk: \n  value_head/w\n" in text
    assert "on disk, but not asked for: \n  extra\n" in text
    assert "params/w: float32[2, 3] on disk, float32[3, 2] asked for" in text
    assert "n: int32[] on disk, float32[] asked for" in text
    assert "params/b" not in text


def test_a_tree_that_does_not_fit_is_not_taken_for_damage(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": jnp.zeros(2), "value_head": jnp.zeros(1)})
    checkpoint.save(tmp_path, 2, {"a": jnp.zeros(2)})
    with pytest.raises(ValueError, match="value_head"):
        checkpoint.restore_latest(tmp_path, {"a": jnp.zeros(2), "value_head": jnp.zeros(1)})


def _largest(step):
    return max((path for path in (step / "arrays").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip_a_bit(step):
    path = _largest(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def _cut(step):
    path = _largest(step)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "a bit flipped": _flip_a_bit,
    "a file cut short": _cut,
    "a file lost": lambda step: _largest(step).unlink(),
    "all arrays lost": lambda step: shutil.rmtree(step / "arrays"),
    "no manifest": lambda step: (step / "manifest.json").unlink(),
    "half a manifest": lambda step: (step / "manifest.json").write_text('{"w": {"sha'),
    "another manifest": lambda step: (step / "manifest.json").write_text('{"w": 1}'),
    "an empty folder": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(tmp_path, kind):
    trees = {step: {"w": jnp.asarray(np.random.default_rng(step).normal(size=4096), jnp.float32)} for step in (1, 2)}
    for step, tree in trees.items():
        checkpoint.save(tmp_path, step, tree)
    DAMAGE[kind](tmp_path / "2")
    with pytest.warns(UserWarning, match=rf"{tmp_path.name}/2 is damaged") as warned:
        step, tree = checkpoint.restore_latest(tmp_path, trees[1])
    assert str(warned[0].message).endswith("\nThe checkpoint before it is taken.")
    assert step == 1
    _assert_same(tree, trees[1])
    with pytest.raises(checkpoint.DamagedError, match="2 is damaged"):
        checkpoint.restore(tmp_path, 2, trees[1])
    # The run goes on and writes step 2 again.
    checkpoint.save(tmp_path, 2, trees[2])
    _assert_same(checkpoint.restore(tmp_path, 2, trees[1]), trees[2])


def test_of_a_page_on_damage_the_first_line_is_said(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"w": jnp.zeros(3)})

    def load(*_):
        raise ValueError("NOT_FOUND: w/c/0\n" + 80 * "a line of TensorStore\n")

    monkeypatch.setattr(checkpoint.ocp, "load", load)
    with pytest.raises(checkpoint.DamagedError) as raised:
        checkpoint.restore(tmp_path, 1, {"w": jnp.zeros(3)})
    assert str(raised.value) == f"checkpoint {tmp_path}/1 is damaged: ValueError: NOT_FOUND: w/c/0"


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.zeros(3)})
    (tmp_path / "1" / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning) as warned,
        pytest.raises(ValueError, match=r"all checkpoints in .* are damaged \(steps \[1\]\)"),
    ):
        checkpoint.restore_latest(tmp_path, {"w": jnp.zeros(3)})
    assert "1 is damaged" in str(warned[0].message) and "before it" not in str(warned[0].message)


CHILD = """
import sys
import numpy as np
import jax
jax.config.update("jax_platforms", "cpu")
from pathlib import Path
from pit_jax import checkpoint

def tree(step):
    return {f"w{i}": np.random.default_rng([step, i]).normal(size=50_000).astype(np.float32) for i in range(20)}

directory, like = Path(sys.argv[1]), tree(0)
restored = checkpoint.restore_latest(directory, like)
start = 0
if restored is not None:
    start, found = restored
    for name, x in tree(start).items():
        assert x.tobytes() == found[name].tobytes(), (start, name)
print("start", start, flush=True)
for step in range(start + 1, 10_000):
    checkpoint.save(directory, step, tree(step), keep=2)
    print("saved", step, flush=True)
"""


def test_kill_9_in_the_middle_of_saves_leaves_the_last_good_one(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    in_the_middle, start = 0, 0
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            first = child.stdout.readline().split()
            assert first == ["start", str(start)], (first, start, child.stderr.read() if not first else "")
            saved = start
            for _ in range(2):
                saved = int(child.stdout.readline().split()[1])
            deadline = time.monotonic() + 20
            while not any(name.endswith(".partial") for name in os.listdir(tmp_path)) and time.monotonic() < deadline:
                pass
            os.kill(child.pid, signal.SIGKILL)
        finally:
            child.kill()
            out, _ = child.communicate()
        saved = max([saved, *(int(line.split()[1]) for line in out.splitlines() if line.startswith("saved"))])
        in_the_middle += bool(list(tmp_path.glob("*.partial")))
        start = checkpoint.latest_step(tmp_path)
        assert start in (saved, saved + 1)  # + 1: complete, but killed before it could say so
        like = {f"w{i}": np.zeros(50_000, np.float32) for i in range(20)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step, tree = checkpoint.restore_latest(tmp_path, like)
        assert step == start
        for i in range(20):
            expected = np.random.default_rng([step, i]).normal(size=50_000).astype(np.float32)
            assert tree[f"w{i}"].tobytes() == expected.tobytes()
    assert in_the_middle
    # The next save removes what was left.
    checkpoint.save(tmp_path, 20_000, {"a": jnp.zeros(1)}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["20000"]


def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path):
    checkpoint.save(tmp_path, 5, {"a": jnp.full(3, 5.0)})
    (tmp_path / "5").rename(tmp_path / "5.old")  # the moment between the two renames
    (tmp_path / "3.deleted").mkdir()
    checkpoint.save(tmp_path, 6, {"a": jnp.full(3, 6.0)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "6"]
    assert float(checkpoint.restore(tmp_path, 5, {"a": jnp.zeros(3)})["a"][0]) == 5.0


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    tree = _tree(1)
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    checkpoint.save(tmp_path, 1, tree)
    _assert_same(checkpoint.restore(tmp_path, 1, tree), tree)
    monkeypatch.undo()
    for path in tmp_path.rglob("*"):
        assert path.suffix not in (".pkl", ".pickle")
        if path.is_file():
            assert path.read_bytes()[:2] not in [bytes([0x80, protocol]) for protocol in range(2, 6)]


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (lambda: jax.random.key(0), "a/b is a key<fry>.*key_data"),
        (lambda: "text", "a/b is a str"),
        (lambda: np.array(["text"]), "a/b is a <U4"),
        (lambda: jnp.zeros((0, 3)), r"a/b is a float32 of shape \(0, 3\)"),
    ],
)
def test_leaves_that_are_not_plain_arrays_are_refused_before_anything_is_written(tmp_path, leaf, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "new", 1, {"a": {"b": leaf()}})
    assert not (tmp_path / "new").exists()


def test_the_manifest_holds_shapes_dtypes_and_checksums(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": [jnp.arange(3, dtype=jnp.int32)]})
    data = np.array([0, 1, 2], "<i4").tobytes()
    assert files.read_json(tmp_path / "1" / "manifest.json") == {
        "a/0": {"shape": [3], "dtype": "int32", "crc32": zlib.crc32(data)}
    }


MESHES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from pit_jax import checkpoint, sharding

directory = Path(sys.argv[1])
w = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
with jax.set_mesh(sharding.make_mesh(4, 1)):
    tree = {"w": jax.device_put(w, jax.P("data", None)), "b": jax.device_put(w[0], jax.P(None)), "step": jnp.int32(3)}
    checkpoint.save(directory, 1, tree)
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t))
    step(tree)
    again = checkpoint.restore(directory, 1, tree)
    step(again)
    assert step._cache_size() == 1  # the restored state has the same type, so nothing is compiled anew
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        assert a.sharding == b.sharding and np.asarray(a).tobytes() == np.asarray(b).tobytes()
with jax.set_mesh(sharding.make_mesh(2, 2)):
    like = jax.eval_shape(
        lambda: {
            "w": jax.sharding.reshard(jnp.zeros((8, 4)), jax.P("data", "model")),
            "b": jax.sharding.reshard(jnp.zeros(4), jax.P("model")),
            "step": jnp.int32(0),
        }
    )
    moved = checkpoint.restore(directory, 1, like)
    assert moved["w"].sharding.spec == jax.P("data", "model") and dict(moved["w"].sharding.mesh.shape)["model"] == 2
    assert {s.data.shape for s in moved["w"].addressable_shards} == {(4, 2)}
    assert np.asarray(moved["w"]).tobytes() == w.tobytes() and np.asarray(moved["b"]).tobytes() == w[0].tobytes()
    jax.jit(lambda t: t["w"] * t["step"])(moved)
try:
    checkpoint.restore(directory, 1, like)
except ValueError as error:
    assert "no mesh is set" in str(error), error
else:
    raise AssertionError("an abstract sharding needs a mesh")
print("done")
"""


def test_shardings_are_those_of_like_on_another_mesh(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", MESHES, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "done\n", result.stderr


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """A step that takes the arrays' memory does not change what is saved."""
    advance = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    x = jnp.arange(1 << 20, dtype=jnp.float32)
    expected = {}
    with checkpoint.Saver(tmp_path) as saver:
        for step in range(4):
            expected[step] = np.array(x, copy=True)
            saver.save(step, {"x": x})
            x = advance(x)
            if step:
                assert checkpoint.latest_step(tmp_path) in (step - 1, step), "the one before is written"
    for step, value in expected.items():
        np.testing.assert_array_equal(checkpoint.restore(tmp_path, step, {"x": value})["x"], value)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """With a limit on the size of files, as a quota sets it."""
    program = f"""
import resource
import numpy as np
from pit_jax import checkpoint
checkpoint.save({str(tmp_path)!r}, 3, {{"x": np.ones(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save({str(tmp_path)!r}, 4, {{"x": np.random.default_rng(0).random(1_000_000)}})
except checkpoint.SaveError as error:
    print(error)
"""
    result = run_command("-c", program)
    assert f"step 4 could not be written to {tmp_path}" in result.stdout, result.stdout + result.stderr
    assert "that of step 3 is kept" in result.stdout and "disk full" in result.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["3"], "the space is given back"
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, 3, {"x": np.zeros(10)})["x"], np.ones(10))


@pytest.mark.parametrize(
    ("several", "error", "message"),
    [
        (True, TimeoutError("Timeout waiting at barrier: heartbeat timeout\nof 1"), "Another process is gone: look at"),
        (True, RuntimeError("UNAVAILABLE: failed to connect"), "The same command goes on, for all of them"),
        (True, OSError("No space left on device"), "Is the disk full"),
        (False, TimeoutError("barrier"), "Is the disk full"),
    ],
)
def test_why_a_checkpoint_is_not_written(tmp_path, monkeypatch, several, error, message):
    """Behind what Orbax makes of it."""
    monkeypatch.setattr(processes, "are_several", lambda: several)
    with pytest.raises(checkpoint.SaveError) as raised, checkpoint.Saver(tmp_path)._explained(4):
        try:
            raise error
        except Exception as cause:
            raise ValueError("the save failed\nas follows") from cause
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert ("disk" in str(raised.value)) != ("process" in str(raised.value))
    assert "(ValueError: the save failed); there is none before it." in str(raised.value)


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_checkpoint_is_written_where_one_before_it_cannot_be_deleted(where, tmp_path, request, monkeypatch):
    folder = request.getfixturevalue("bucket") if where == "bucket" else tmp_path / "folder"
    checkpoint.save(folder, 1, {"x": np.full(3, 1.0)})

    def refuse(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(checkpoint, "delete", refuse)
    if where == "bucket":  # which deletes what a kill has left of the step
        monkeypatch.setattr(checkpoint, "delete", lambda _, step: step == 2 or refuse())
    with pytest.warns(UserWarning, match="step 2 .* is written, but one before it cannot be deleted.*not yours"):
        checkpoint.save(folder, 2, {"x": np.full(3, 2.0)}, keep=1)
    assert checkpoint.all_steps(folder) == [1, 2]
    assert checkpoint.restore(folder, 2, {"x": np.zeros(3)})["x"].tolist() == [2.0] * 3


def test_in_a_bucket_the_manifest_makes_a_checkpoint(bucket):
    for step in (1, 2, 3):
        checkpoint.save(bucket, step, {"x": np.full(4, float(step))}, keep=2)
    assert checkpoint.all_steps(bucket) == [2, 3] and not (bucket / "1").exists()
    (bucket / "3" / "manifest.json").unlink()  # as a kill leaves it
    step, tree = checkpoint.restore_latest(bucket, {"x": np.zeros(4)})
    assert step == 2 and tree["x"].tolist() == [2.0] * 4
    checkpoint.save(bucket, 3, {"x": np.full(4, 9.0)}, keep=2)
    assert checkpoint.restore(bucket, 3, {"x": np.zeros(4)})["x"].tolist() == [9.0] * 4
    checkpoint.delete(bucket, 3)
    assert checkpoint.all_steps(bucket) == [2]


def test_when_a_file_was_written(bucket, tmp_path):
    for path in (tmp_path / "local", files.place(bucket) / "file"):
        path.parent.mkdir(exist_ok=True)
        assert files.changed_at(path) == 0
        path.write_text("x")
        assert files.changed_at(path) == files.changed_at(path) > 0


def test_places():
    assert files.place("runs/demo") == Path("runs/demo") and not files.is_remote(Path("runs/demo"))
    place = files.place("gs://bucket/run") / "models"
    assert str(place) == "gs://bucket/run/models" and files.is_remote(place)
    with pytest.raises(ValueError, match="s3://bucket: the buckets of Google Cloud are known"):
        files.place("s3://bucket")
