"""The comparison with other libraries: its table on made-up rows, by hand, and its runs with scripts that measure
nothing. No test needs torch or Tunix."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pit_jax import works

ROOT = Path(__file__).parent.parent


def loaded(name):
    """A script of launch/peers, which is no package."""
    spec = importlib.util.spec_from_file_location(f"peers_{name}", ROOT / f"launch/peers/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


compare, common = loaded("compare"), loaded("common")


def row(work, peer, round=1, seconds=None, **more):
    """As a run writes it, of a work whose calls count 4,096 tokens."""
    found = {
        "settings": "stock",
        "peer": peer,
        "round": round,
        "processor": "one",
        "commit": "abc",
        "task": {"work": work, "tokens": 4096, "unit": "tokens"},
    }
    if seconds is None:
        return found | {"error": "status 1: ValueError: no such thing"} | more
    return found | {"seconds": seconds, "others": [0.125] * len(seconds), "limit_flops": 2e11} | more


def as_read(rows):
    return [row | {"work": row["task"]["work"]} for row in rows]


SFT = [
    row("sft_tiny", "transformers eager", 1, [8.0]),
    row("sft_tiny", "transformers compile", 1),
    row("sft_tiny", "trl", 1, [2.0, 4.0, 9.0], limit_flops=1e11),
    row("sft_tiny", "pit_jax", 1, [2.0, 16.0], limit_flops=3e11),
    row("sft_tiny", "transformers eager", 2, [8.0]),
    row("sft_tiny", "transformers compile", 2, error="it had not ended after 600 seconds"),
    row("sft_tiny", "trl", 2, [1.0, 8.0], others=[0.5, 0.75]),
    row("sft_tiny", "pit_jax", 2, [2.0], others=[None]),
]
"""trl: 4 s are the median of 1, 2, 4, 8, 9 (the mean of the rounds' medians would be 4.25), so 1,024 per second; 512 of
transformers, and 2,048 of ours, where 2 s are the median of 2, 2, 16: twice the best of the others."""


def test_rates_are_of_the_median_call_of_all_rounds():
    (line,) = compare.summary(as_read(SFT))
    assert line.rates == {"transformers eager": 512.0, "trl": 1024.0, "pit_jax": 2048.0}
    assert line.errors == {"transformers compile": "it had not ended after 600 seconds"}
    assert line.others == {"transformers eager": 0.125, "trl": 0.125, "pit_jax": 0.125}
    assert (line.best, line.ratio) == ("trl", 2.0)


def test_the_table():
    gen = [row("gen_tiny_b16", "tunix"), row("gen_tiny_b16", "pit_jax", 1, [4.0])]
    dpo = [
        row("dpo_small", "trl", 1, [4.0], others=[0.75]),
        row("dpo_small", "trl stored", 1, [3.2]),
        row("dpo_small", "pit_jax"),
    ]
    assert compare.table(as_read(SFT + gen + dpo), "stock").splitlines() == [
        "| work | per second | settings | transformers | trl | tunix | best of them | pit_jax | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| sft_tiny | tokens | stock | 512 eager, failed compile | 1,024 | - | 1,024 trl | 2,048 | 2.00 |",
        "| gen_tiny_b16 | tokens | stock | - | - | failed | - | 1,024 | - |",
        "| dpo_small | tokens | stock | - | 1,024, 1,280 stored | - | 1,280 trl stored | failed | - |",
        "sft_tiny, transformers compile: it had not ended after 600 seconds",
        "gen_tiny_b16, tunix: status 1: ValueError: no such thing",
        "dpo_small, pit_jax: status 1: ValueError: no such thing",
        "dpo_small, trl: something else took 0.75 cores meanwhile, which makes it slower",
        # torch: 1, 2, 2, 2, 2, 2; jax: 3, 2, 2
        "GFLOP/s of float32 products, in the median: torch 200, jax 200.",
        "Cores busy with something else, in the median: 0.12.",
    ]


def test_limits_are_told_apart():
    rows = [row("sft_tiny", peer, 1, [1.0], limit_flops=limit) for peer, limit in (("trl", 5e10), ("tunix", 7e10))]
    assert compare.conditions(as_read(rows))[0].endswith("torch 50, jax 70.")
    assert compare.conditions(as_read([row("sft_tiny", "trl")])) == []


def test_turns():
    found = [(task.round, task.peer) for task in compare.tasks(["rm_small", "ppo_tiny_e4"], 2)]
    rm = [(1, peer) for peer in ("trl", "trl compile", "tunix", "pit_jax")]
    rm += [(2, peer) for peer in ("trl compile", "tunix", "pit_jax", "trl")]
    ppo = [(1, "trl"), (1, "tunix"), (1, "pit_jax"), (2, "tunix"), (2, "pit_jax"), (2, "trl")]
    assert found == rm + ppo, "nobody is always the last"


def test_what_has_a_row_is_not_run_again():
    todo = compare.tasks(["ppo_tiny_e4"], 2)
    assert [task.peer for task in todo] == ["trl", "tunix", "pit_jax", "tunix", "pit_jax", "trl"]
    had = [row("ppo_tiny_e4", "trl", 1, [1.0]), row("ppo_tiny_e4", "tunix", 1), row("ppo_tiny_e4", "pit_jax", 2, [1.0])]
    had += [row("sft_tiny", "trl", 2, [1.0])]
    assert compare.left(todo, as_read(had)) == [todo[1], todo[2], todo[3], todo[5]], "what failed is run again"


def test_rows_that_a_run_would_not_give_again_do_not_count():
    theirs, ours, failed = had = as_read(
        [row("sft_tiny", "trl", 1, [1.0, 2.0]), row("sft_tiny", "pit_jax", 1, [1.0, 2.0]), row("sft_tiny", "tunix")]
    )
    now = {"sft_tiny": {"work": "sft_tiny", "tokens": 4096, "unit": "tokens"}}

    def fitting(works=now, settings="stock", calls=2, processor="one", commit="abc"):
        return compare.fitting(had, works, settings, calls, processor, commit)

    assert fitting() == had
    assert fitting(settings="huge pages") == fitting(processor="two") == fitting(works={}) == []
    assert fitting(works={"sft_tiny": now["sft_tiny"] | {"tokens": 8192}}) == []
    assert fitting(calls=5) == [failed]
    assert fitting(commit="abd") == [theirs, failed]
    ours["commit"] = "abc+"
    assert fitting(commit="abc+") == [theirs, failed], "who knows what was changed"


def test_turns_that_lie_far_apart_are_told():
    at = lambda peer, number, clock: row("sft_tiny", peer, number, [1.0], time=f"2026-01-01T{clock}")  # noqa: E731
    rows = [
        at("trl", 1, "23:00:00"),
        at("pit_jax", 1, "23:29:59"),
        at("trl", 2, "10:00:00"),
        at("tunix", 2, "11:30:00"),
    ]
    lines = [line for line in compare.table(as_read(rows), "stock").splitlines() if "apart" in line]
    assert lines == ["sft_tiny, round 2: its turns lie 1.5 hours apart: numbers of different hours compare badly"]


def test_half_a_line_is_cut_off_and_a_foreign_file_is_an_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert compare.read(file) == []
    whole = json.dumps(SFT[0]) + "\n"
    file.write_text(whole + json.dumps(SFT[2])[:40])
    assert compare.read(file) == as_read(SFT[:1])
    assert file.read_text() == whole
    for foreign in ('{"name": "sft_tiny", "seconds": 1}\n', "[]\n", "1,2\n"):
        file.write_text(whole + foreign)
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2 was not written by launch/peers.sh: name another"):
            compare.read(file)
        assert file.read_text() == whole + foreign


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("raise ValueError('no such thing')", "status 1: ValueError: no such thing"),
        (
            "import sys; print('a.b.SomeError: of a library\\nwarning: bye', file=sys.stderr); sys.exit(3)",
            "status 3: a.b.SomeError: of a library",
        ),
        ("import os; os.kill(os.getpid(), 9)", "signal 9: it printed nothing"),
        ("print('nothing was written\\n')", "status 0: nothing was written"),
    ],
)
def test_the_line_of_a_failure(tmp_path, script, error):
    assert compare.run([sys.executable, "-c", script, f"--out={tmp_path / 'row'}"], 60) == {"error": error}


def test_a_program_that_is_missing_fails(tmp_path):
    found = compare.run(["env", "A=1", f"{tmp_path}/venv/bin/python", "x.py", f"--out={tmp_path / 'row'}"], 60)
    assert found["error"].startswith("status 127: env: ") and "No such file" in found["error"]


def test_what_takes_too_long_ends_with_all_it_has_started(tmp_path):
    script = (
        "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, file=open(sys.argv[1], 'w', 1));"
    )
    pid = tmp_path / "pid"
    started = time.monotonic()
    found = compare.run([sys.executable, "-c", script + "time.sleep(600)", str(pid), f"--out={tmp_path / 'row'}"], 2)
    assert found == {"error": "it had not ended after 2 seconds"} and time.monotonic() - started < 30
    for _ in range(200):
        state = Path(f"/proc/{pid.read_text().strip()}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("what it started goes on")


def test_the_clock():
    """Calls of 5 and 1 s do not count; then 2 s with 1 of 3 processor seconds of others, and 4 s with 2 of 2."""
    ends = common.Ends()
    ends.found = [common.Busy(*of) for of in ((0, 0, 0), (5, 5, 5), (6, 6, 6), (8, 8, 9), (12, 8, 11), (13, 8, 11))]
    assert ends.row(2) == {"first_seconds": 5, "seconds": [2, 4], "others": [0.5, 0.5]}
    with pytest.raises(RuntimeError, match="6 ends of calls were marked, but 7 should"):
        ends.row(4)


def test_tokens_are_those_of_our_works():
    work = works.describe("sft_tiny")
    assert (common.random_tokens(work, 3, 16, 256) == works.random_tokens(works.SIZES["tiny"], 3, 16, 256)).all()


def test_ours_writes_the_row_of_a_work(monkeypatch, tmp_path):
    """The script itself, on a work and a product that take no time, by a clock that has told squares.

    It stands at 0, 1, 4, 9 and 16: the two calls that do not count took 1 and 3 seconds, those that do 5 and 7.
    """
    clock = itertools.count()
    monkeypatch.setattr(common, "busy", lambda: common.Busy(next(clock) ** 2, 0.0, 0.0))
    sizes = dataclasses.replace(works.SIZES["tiny"], num_layers=1, d_model=16, num_heads=1, num_kv_heads=1, mlp_dim=8)
    monkeypatch.setattr(works, "works", lambda: {"sft_none": functools.partial(works.sft_work, sizes, 8, 6)})
    monkeypatch.setattr(common, "limit", functools.partial(common.limit, size=16))
    monkeypatch.setitem(sys.modules, "common", common)
    told, out = tmp_path / "works.jsonl", tmp_path / "row"
    told.write_text(json.dumps(works.describe("sft_none")) + "\n")
    script = str(ROOT / "launch/peers/with_pit_jax.py")
    monkeypatch.setattr(sys, "argv", [script, f"--works={told}", "--work=sft_none", "--calls=2", f"--out={out}"])
    runpy.run_path(script, run_name="__main__")
    found = json.loads(out.read_text())
    assert (found["first_seconds"], found["seconds"], found["others"]) == (1, [5, 7], [0, 0])
    assert found["limit_flops"] > 0 and {"pit_jax", "jax"} <= found["versions"].keys()


def test_works_are_told_as_they_are():
    """What the scripts read, by hand."""
    told = {name: json.loads(json.dumps(works.describe(name))) for name in compare.WORKS + compare.MORE}
    small, tiny = (8192, 8, 512, 8, 4, 64, 1408), (2048, 4, 256, 4, 2, 64, 704)
    for name, work in told.items():
        keys = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
        assert tuple(work["sizes"][key] for key in keys) == (small if "small" in name else tiny)
        assert (work["sizes"]["dtype"], work["sizes"]["remat"], work["sizes"]["tie_embeddings"]) == (
            "float32",
            "none",
            False,
        )
        how = work["optimizer"]
        assert (how["name"], how["learning_rate"], how["weight_decay"], how["clip_norm"]) == ("adamw", 1e-4, 0.01, 1.0)
    of = lambda name, *keys: tuple(told[name][key] for key in keys)  # noqa: E731
    assert of("sft_small", "rows", "length", "tokens") == (8, 512, 4096)
    assert of("sft_tiny", "rows", "length", "tokens") == (16, 256, 4096)
    assert of("dpo_small", "rows", "prompt", "answer", "tokens") == (8, 128, 128, 4096)
    assert of("rm_small", "rows", "prompt", "answer", "gap", "tokens") == (8, 0, 256, False, 4096)
    assert of("gen_small_b64", "rows", "prompt", "new", "tokens", "unit") == (64, 128, 128, 8192, "new tokens")
    for epochs in (1, 4):
        found = of(f"ppo_tiny_e{epochs}", "rows", "prompt", "new", "epochs", "minibatches", "tokens")
        assert found == (32, 64, 64, epochs, 1, 4096)


# A script in the place of with_*.py: counts its starts, and does what a file says.
SCRIPT = """
import json, pathlib, sys, time
args = dict(part[2:].split("=", 1) for part in sys.argv[1:])
here = pathlib.Path(args["works"]).parent
name = pathlib.Path(__file__).stem.removeprefix("with_") + " " + args.get("variant", "")
with open(here / "calls", "a") as file:
    file.write(name.strip() + "\\n")
if (here / "waits").exists() and name.startswith("tunix"):
    time.sleep(600)
if name.startswith("trl"):
    raise RuntimeError("no luck")
seconds = {"tunix ": 2.0}.get(name, 0.5)
row = {"first_seconds": 9.0, "seconds": [seconds] * int(args["calls"]), "others": [0.0], "limit_flops": 1e11}
pathlib.Path(args["out"]).write_text(json.dumps(row | {"versions": {}}))
"""


@pytest.fixture
def folder(tmp_path):
    """Copies of compare.py and of scripts in the place of the others, with environments."""
    launch = tmp_path / "launch/peers"
    launch.mkdir(parents=True)
    (launch / "compare.py").write_text((ROOT / "launch/peers/compare.py").read_text())
    for name in ("transformers", "trl", "tunix", "pit_jax"):
        (launch / f"with_{name}.py").write_text(SCRIPT)
    made = tmp_path / "my peers"
    for name in ("venv-torch", "venv-jax"):
        (made / name / "bin").mkdir(parents=True)
        (made / name / "bin/python").symlink_to(sys.executable)
    told = [{"work": name, "tokens": 1000, "unit": "tokens"} for name in ("rm_small", "ppo_tiny_e4")]
    (made / "works.jsonl").write_text("".join(json.dumps(work) + "\n" for work in told))
    return made


def start(folder, *arguments):
    """compare.py as launch/peers.sh calls it."""
    script = folder.parent / "launch/peers/compare.py"
    command = [sys.executable, script, f"--folder={folder}", f"--python={sys.executable}", "--avx512=", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_goes_on_where_it_was_interrupted(folder, tmp_path):
    file = tmp_path / "new/rows.jsonl"
    arguments = ("--works=ppo_tiny_e4", "--rounds=2", "--calls=3", f"--json={file}")
    calls = lambda: (folder / "calls").read_text().split() if (folder / "calls").exists() else []  # noqa: E731
    (folder / "waits").touch()
    first = start(folder, *arguments)
    for _ in range(400):
        if calls() == ["trl", "tunix"]:
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=30) == 143
    assert [json.loads(line)["peer"] for line in file.read_text().splitlines()] == ["trl"]
    (folder / "waits").unlink()
    second = start(folder, *arguments)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0, said
    turns = ["trl", "tunix", "pit_jax", "tunix", "pit_jax", "trl"]
    assert calls()[2:] == turns, "the failure and what was interrupted are tried again"
    lines = said.splitlines()
    assert "ppo_tiny_e4 1/2 trl: status 1: RuntimeError: no luck" in lines
    assert "ppo_tiny_e4 2/2 tunix: 500 per second, 2.000 s a call" in lines
    assert "| ppo_tiny_e4 | tokens | huge pages | - | failed | 500 | 500 tunix | 2,000 | 4.00 |" in lines
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["seconds"] for row in rows if row["peer"] == "pit_jax"] == [[0.5] * 3] * 2
    before = len(calls())
    said, _ = start(folder, *arguments).communicate(timeout=60)
    assert calls()[before:] == ["trl"] * 2 and f"4 of 6 are in {file} already" in said
    assert "| 500 tunix | 2,000 | 4.00 |" in said, "the table has what was there"
    start(folder, *arguments, "--stock").communicate(timeout=60)
    assert calls()[before + 2 :] == turns, "other settings are another table"


def test_bad_arguments_end_before_anything_runs(folder, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "file").touch()
    for argument, message in (
        ("--works=sft_smal", "no peer does 'sft_smal': use some of sft_small, "),
        ("--works=gap_small_512", "no peer does 'gap_small_512'"),
        ("--rounds=0", "--rounds: '0' is no number from 1 on"),
        ("--round=1", "unrecognized arguments: --round=1"),
        (f"--json={tmp_path}/other.jsonl", "other.jsonl, line 1 was not written by launch/peers.sh"),
        (f"--json={tmp_path}/file/rows", "error: "),
    ):
        process = start(folder, argument)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and message in said, said
        assert "Traceback" not in said and not (folder / "calls").exists()
    assert os.listdir(tmp_path) and (tmp_path / "other.jsonl").read_text() == '{"a": 1}\n'
