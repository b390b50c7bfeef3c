"""Several processes on one machine: the numbers of one, and an end where one of them is gone."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import commands
import jax
import numpy as np
import pytest

from pit_jax import checkpoint, interrupts, processes

ROOT = Path(__file__).parents[1]
VARIABLES = (*processes.EXPLICIT, processes.FOUND, "SLURM_STEP_NUM_TASKS")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(folder, count, *arguments):
    """Starts tests/many_processes.py `count` times, with 4 devices in all."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | {"JAX_PLATFORMS": "cpu"}
    port, started = free_port(), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        own = environment | dict(zip(processes.EXPLICIT, (f"127.0.0.1:{port}", str(count), str(i)), strict=True))
        command = [sys.executable, "tests/many_processes.py", str(folder), str(4 // count), *arguments]
        with open(folder / f"{i}.log", "w") as log:
            own = own | {"PYTHONPATH": str(ROOT)}
            started.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log))
    return started


def finish(started, folder, seconds=280):
    """Exit statuses and what was printed."""
    end = time.monotonic() + seconds
    try:
        statuses = [process.wait(max(end - time.monotonic(), 1)) for process in started]
    finally:
        for process in started:
            process.kill()
    return statuses, [(folder / f"{i}.log").read_text() for i in range(len(started))]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """count -> (what the first process found, folder)."""
    found = {}

    def of(count):
        if count not in found:
            folder = tmp_path_factory.mktemp(f"of_{count}")
            statuses, printed = finish(launch(folder, count), folder)
            assert statuses == [0] * count, "\n".join(printed)[-3000:]
            found[count] = json.loads((folder / "numbers.json").read_text()), folder
        return found[count]

    return of


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_numbers_of_one_process(numbers, count):
    one, several = dict(numbers(1)[0]), dict(numbers(count)[0])
    assert several.pop("processes") == count and one.pop("processes") == 1
    assert one.keys() == several.keys()
    assert several["restored"] == [2, True] and several["of_first"] == 7
    assert several["prompt_length"] == 256, "the longest prompt is one of the last process"
    assert several["tokens"] == one["tokens"] and len(np.unique(one["tokens"])) > 16
    for name in several:
        values = [x[name] if isinstance(x[name], dict) else {"": x[name]} for x in (one, several)]
        for key in values[0]:
            np.testing.assert_allclose(values[1][key], values[0][key], rtol=1e-6, atol=1e-6, err_msg=f"{name} {key}")
    assert one["dpo_0"]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert one["sft_1"]["loss"] < one["sft_0"]["loss"] and one["r_pit_1"]["loss"] < one["r_pit_0"]["loss"]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_process_encodes_the_rows_of_its_own_devices(numbers, count):
    """On a mesh of 2 x 2 devices two processes have half of the rows each; of four, two have the same half."""
    read = lambda of, i: json.loads((numbers(of)[1] / f"encoded_{i}.json").read_text())  # noqa: E731
    whole, parts = read(1, 0), [read(count, i) for i in range(count)]
    shares = [part["measured"] for part in parts]
    assert [x for share in shares for x in share] == whole["measured"] == list(range(60))
    assert {len(share) for share in shares} == {60 // count}
    for name in ("sft_0", "sft_1"):  # the rows of 8 sequences
        first, second = (part[name] for part in parts[:: count // 2])
        assert [part[name] for part in parts] == [first] * (count // 2) + [second] * (count // 2)
        assert first + second == whole[name] and min(len(first), len(second)) >= 4
    for name in ("r_pit_0", "r_pit_1", "packed_0", "packed_1", "dpo_0", "dpo_1"):
        # Half of the 16 are measured; what is learnt of the others is encoded too.
        assert sorted(whole[name]) == list(range(16))
        for i, part in enumerate(parts):
            share = 16 // count
            assert part[name][:share] == list(range(i * share, (i + 1) * share))
            assert len(part[name]) <= share + (6 if name.startswith("packed") else 4)  # those of 2 of 4 sequences


def test_a_checkpoint_of_two_processes_is_read_by_one(numbers):
    folder = numbers(2)[1] / "checkpoints"
    manifest = json.loads((folder / "2" / "manifest.json").read_text())
    spread = [path for path, leaf in manifest.items() if leaf.get("sum32") is not None]
    assert "params/params/layers/gate" in spread and manifest["step"]["crc32"] is not None
    like = {path: np.zeros(leaf["shape"], leaf["dtype"]) for path, leaf in manifest.items()}
    step, tree = checkpoint.restore_latest(folder, like)
    assert step == 2 and any(np.abs(tree[path]).max() > 0 for path in spread)
    manifest["params/params/layers/gate"]["sum32"] += 1
    (folder / "2" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.DamagedError, match="params/params/layers/gate"):
        checkpoint.restore(folder, 2, like)


def test_the_others_end_where_one_is_killed(tmp_path):
    started = launch(tmp_path, 2, "die")
    started[1].wait(200)
    since = time.monotonic()
    statuses, printed = finish(started, tmp_path, 60)
    assert statuses[0] not in (0, None) and statuses[1] == -9
    assert time.monotonic() - since < 60
    assert "error in process 0" in printed[0] and "another process has ended" in printed[0].splitlines()[-1]


def test_the_others_end_where_one_has_a_fault(tmp_path):
    """It says why and is gone, and they are as where one was killed; it does not wait for them to abort it."""
    statuses, printed = finish(launch(tmp_path, 2, "fault"), tmp_path, 120)
    assert statuses[0] not in (0, None) and statuses[1] == 1, "\n".join(printed)[-3000:]
    assert printed[1].splitlines()[-1] == "TypeError: a fault"


def test_sigterm_to_one_stops_all_after_the_same_step(tmp_path):
    statuses, printed = finish(launch(tmp_path, 2, "stop"), tmp_path, 120)
    assert statuses == [interrupts.RESTART] * 2, "\n".join(printed)[-3000:]
    step, state = checkpoint.restore_latest(tmp_path / "stopped", np.zeros(4, np.float32))
    assert 5 < step < 100 and state.tolist() == [sum(range(step))] * 4
    assert f"step {step} of 200 is saved" in printed[0] and f"step {step} of 200 is saved" in printed[1]


def test_sigterm_to_one_stops_all_where_no_step_runs(tmp_path):
    statuses, printed = finish(launch(tmp_path, 2, "pause"), tmp_path, 120)
    assert statuses == [interrupts.RESTART] * 2, "\n".join(printed)[-3000:]
    assert all("what is done so far is on disk" in text and "to the end" not in text for text in printed)


def test_a_part_that_one_process_cannot_read_is_damage_for_all(tmp_path):
    """They go on from the checkpoint before it, together and at once."""
    since = time.monotonic()
    statuses, printed = finish(launch(tmp_path, 2, "damage"), tmp_path, 150)
    assert statuses == [0, 0], "\n".join(printed)[-3000:]
    assert all("went on from 1" in text for text in printed) and time.monotonic() - since < 120
    assert "2 is damaged: see what process 1 says" in printed[0] and "2 is damaged" in printed[1]


def test_variables_that_name_no_run_are_errors():
    first, count, index = processes.EXPLICIT
    with pytest.raises(ValueError, match=f"{first} need {count}, {index}"):
        processes.start({first: "h:1"})
    with pytest.raises(ValueError, match="HOST:PORT"):
        processes.start({first: "h", count: "2", index: "0"})
    with pytest.raises(ValueError, match="numbers from 0"):
        processes.start({first: "h:1", count: "2", index: "2"})
    with pytest.raises(ValueError, match="use 1"):
        processes.start({processes.FOUND: "yes"})


def test_one_process_is_alone(tmp_path):
    processes.start({})
    processes.start({processes.FOUND: "0", "SLURM_STEP_NUM_TASKS": "8"})
    processes.start(dict(zip(processes.EXPLICIT, ("h:1", "1", "0"), strict=True)))
    assert not jax.distributed.is_initialized() and processes.is_first() and not processes.are_several()
    assert processes.on_first(lambda: 3) == 3 and processes.small_files_of(tmp_path) == tmp_path
    assert not list(tmp_path.iterdir())


def test_small_files_are_all_but_arrays(tmp_path):
    root, copy = tmp_path / "run", tmp_path / "copy"
    kept = {"config.json", "stages/data.json", "candidates/r_p/candidates.json", "evaluation/answers/test/a.jsonl"}
    for name in (*kept, "models/r_p/0/manifest.json", "candidates/r_p/5/arrays/x", "checkpoints/r_p/5/x", ".hidden"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    copy.mkdir()
    processes.copy_small_files(root, copy)
    assert {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()} == kept


@pytest.mark.slow
def test_a_whole_run_of_two_processes_is_that_of_one(tmp_path):
    """All stages of the smoke variant on a 2 x 1 mesh: the same models, metrics and tables, and one of each file."""
    ours = [*commands.train_arguments(tmp_path / "two"), "--config.mesh.data=2"]
    alone = [*commands.train_arguments(tmp_path / "one"), "--config.mesh.data=2"]
    port = free_port()
    environment = {k: v for k, v in commands.environment().items() if k not in VARIABLES}
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
    started = []
    for i in range(2):
        own = dict(zip(processes.EXPLICIT, (f"127.0.0.1:{port}", "2", str(i)), strict=True))
        with open(tmp_path / f"{i}.log", "w") as log:
            env = environment | own | {"XLA_FLAGS": f"{flags}1"}
            started.append(subprocess.Popen([sys.executable, *ours], cwd=ROOT, env=env, stdout=log, stderr=log))
    statuses, printed = finish(started, tmp_path, 900)
    assert statuses == [0, 0], "\n".join(printed)[-3000:]
    assert printed[0].count("Everything is in") == 1 and "Everything" not in printed[1]
    one = commands.run(*alone, env=environment | {"XLA_FLAGS": f"{flags}2"}, timeout=900)
    assert one.returncode == 0, one.stderr[-3000:]
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1])
    for first, second in zip(*(map(json.loads, x) for x in lines), strict=True):
        assert first.keys() == second.keys() and first["stage"] == second["stage"]
        for key in first.keys() - {"stage"}:
            if not key.startswith(("time", "seconds")):
                assert second[key] == pytest.approx(first[key], rel=1e-6, abs=1e-6), (
                    first["stage"],
                    first["step"],
                    key,
                )
    tables = [json.loads((tmp_path / name / "results.json").read_text())["comparisons"] for name in ("one", "two")]
    assert tables[0] == tables[1]
