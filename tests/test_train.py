"""The real command: every stage of the smoke variant, resume after kill -9, and what a user's mistakes print."""

import gzip
import json
import random
import shutil
import time

import numpy as np
import pytest
from commands import CONFIG, SRT_CONFIG, run, start, train, train_arguments

from pit_jax import cli, config as config_lib


@pytest.fixture(scope="module")
def until_rl(finished, tmp_path_factory):
    """A copy of the run as it was before RL."""
    workdir = tmp_path_factory.mktemp("until_rl") / "smoke"
    shutil.copytree(finished[0], workdir)
    for name in ("rl_policy", "rl_pit_1", "rl_pit_2", "evaluate"):
        for folder in ("checkpoints", "candidates", "models", "samples"):
            shutil.rmtree(workdir / folder / name, ignore_errors=True)
        (workdir / "stages" / f"{name}.json").unlink()
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "evaluation")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if not json.loads(line)["stage"].startswith("rl_")]
    (workdir / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    return workdir


def contents(workdir):
    """Everything that must be bitwise equal: all arrays, the metrics without times, the numbers of the tables."""
    from pit_jax import checkpoint

    arrays = {}
    for directory in sorted(workdir.glob("models/*")) + sorted(workdir.glob("checkpoints/rl_*")):
        for step in checkpoint.all_steps(directory):
            for path, x in _leaves(directory, step):
                arrays[f"{directory.name}/{step}/{path}"] = x
    metrics = {}
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        key = line["stage"], line["step"], "selection/score" in line or "selection/accuracy" in line
        assert key not in metrics, f"{key} is logged twice"
        metrics[key] = {k: v for k, v in line.items() if not k.startswith(("time", "seconds"))}
    results = json.loads((workdir / "results.json").read_text())
    del results["missing"], results["commands"]  # name the workdir
    for line in (*results["stages"].values(), *results["costs"].values()):
        del line["seconds"]
    return arrays, metrics, results


def _leaves(directory, step):
    """(path, shape, type and checksum) of a checkpoint's leaves, from its manifest."""
    manifest = json.loads((directory / str(step) / "manifest.json").read_text())
    return sorted((path, json.dumps(leaf)) for path, leaf in manifest.items())


def test_nothing_that_training_does_not_need_is_imported():
    """Each of these takes a second or more, where it is installed."""
    code = "import sys, pit_jax.train; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    names = set(result.stdout.split())
    assert {"jax", "optax", "tensorboardX"} <= names
    assert not names & {
        "torch",
        "transformers",
        "tensorflow",
        "matplotlib",
        "sklearn",
        "openai",
        "pyarrow",
        "tokenizers",
    }


def test_the_run_leaves_everything_behind(finished):
    workdir, printed = finished
    results = json.loads((workdir / "results.json").read_text())
    for name in ("pit_vs_original", "original_vs_chosen", "first_rl_only_vs_original", "rl_vs_sft", "fresh_vs_original",
                 "pit_shuffled_vs_original"):  # fmt: skip
        for judge in ("verifier", "evaluator"):
            summary = results["comparisons"][name][judge]
            assert set(summary) == {"win", "lose", "tie", "delta", "low", "high", "n"}
            assert summary["win"] + summary["lose"] + summary["tie"] == pytest.approx(1)
            assert summary["delta"] == pytest.approx(summary["win"] - summary["lose"])
    improved = {"pit", "pit_iteration_2", "pit_sft", "pit_shuffled", "first_rl_only", "self_refine"}
    with_copies = {name for name, row in results["answers"].items() if row["copy_rate"] is not None}
    assert with_copies == improved, "those that were given a ref_response"
    assert set(results["reward_models"]["r_pit"]["gaps"]) == {
        "chosen_rejected", "chosen_chosen", "rejected_rejected", "rejected_chosen",
    }  # fmt: skip
    for key in ("accuracy", "n", "policy_accuracy", "policy_n"):
        assert key in results["reward_models"]["r_pit"] and key in results["reward_models"]["r_p"]
    for stage in ("data", "pretrain", "sft_policy", "sft_pit", "r_p", "r_pit", "evaluator", "rl_policy", "rl_pit_1"):
        assert results["stages"][stage]["seconds"] > 0
    assert "second_rl_only" in results["missing"]["second_rl_only_vs_original"]
    assert "arms=second_rl_only" in printed
    assert (workdir / "samples" / "test.jsonl").exists() and list((workdir / "tensorboard").rglob("events*"))
    assert not list(workdir.rglob("*.pkl")) + list(workdir.rglob("*.pickle"))


def test_every_number_of_the_comparisons_follows_from_the_samples(finished):
    workdir, _ = finished
    results = json.loads((workdir / "results.json").read_text())
    rows = [json.loads(line) for line in (workdir / "samples" / "test.jsonl").read_text().splitlines()]
    names = {"rl": "original"}
    told_apart = 0
    for comparison, judges in results["comparisons"].items():
        first, second = (names.get(name, name) for name in comparison.split("_vs_"))
        ahead = {
            judge: np.asarray([r["scores"][judge][first] - r["scores"][judge][second] for r in rows])
            for judge in ("verifier", "evaluator")
        }
        expected = np.mean(ahead["verifier"] > 0), np.mean(ahead["verifier"] < 0)
        assert (judges["verifier"]["win"], judges["verifier"]["lose"]) == pytest.approx(expected), comparison
        share = 1 / (1 + np.exp(-ahead["evaluator"]))  # a tie from 0.45 to 0.55 (section 4.4)
        expected = np.mean(share > 0.55), np.mean(share < 0.45)
        assert (judges["evaluator"]["win"], judges["evaluator"]["lose"]) == pytest.approx(expected), comparison
        assert judges["verifier"]["n"] == judges["evaluator"]["n"] == len(rows)
        told_apart += bool(ahead["verifier"].any())
    assert told_apart >= 3, "ties alone show nothing"


def test_a_second_start_says_that_all_is_done(finished, cache):
    workdir, _ = finished
    before = contents(workdir)
    result = train(workdir, cache=cache)
    assert result.returncode == 0 and "All stages were done before" in result.stdout
    assert (workdir / "tables.txt").read_text() in result.stdout and contents(workdir) == before


@pytest.mark.parametrize(
    "point",
    ["rollout", "update", "save", *(pytest.param(point, marks=pytest.mark.slow) for point in ("reward", "rounds"))],
)
def test_a_killed_run_resumes_bitwise(point, finished, until_rl, cache, tmp_path):
    workdir = tmp_path / "smoke"
    shutil.copytree(until_rl, workdir)
    killed = train(workdir, cache=cache, program=("tests/killed_train.py", point))
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert not (workdir / "results.json").exists()
    from pit_jax import checkpoint

    if point in ("rollout", "reward", "update"):
        assert checkpoint.latest_step(workdir / "checkpoints/rl_policy") == 1, "it goes on from the middle of the stage"
    resumed = train(workdir, cache=cache)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    ours, theirs = contents(workdir), contents(finished[0])
    assert ours[0].keys() == theirs[0].keys()
    assert [name for name in ours[0] if ours[0][name] != theirs[0][name]] == []
    assert ours[1] == theirs[1]
    assert ours[2] == theirs[2]


def num_steps(workdir):
    """That have been written down."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(("system", "config", "num_kills"), [("", CONFIG, 13), ("_srt", SRT_CONFIG, 7)])
def test_a_run_that_is_killed_at_random_moments_ends_bitwise_the_same(
    system, config, num_kills, cache, tmp_path, request
):
    finished = request.getfixturevalue(f"finished{system}")
    workdir, rng, stages = tmp_path / "smoke", random.Random(0), set()
    for i in range(num_kills):
        arguments = train_arguments(workdir, config=config)
        process = start(*arguments, cache=cache, log=tmp_path / f"{i}.log")
        # So far at least, or machines of other speeds would be killed in the first stages alone, or not at all.
        goal = num_steps(finished[0]) * i // num_kills
        begun = lambda i=i: (tmp_path / f"{i}.log").stat().st_size > 0  # noqa: E731
        while process.poll() is None and not (begun() and num_steps(workdir) >= goal):
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 2.0))
        process.kill()
        assert process.wait() == -9, "it must not have come to an end"
        stages.add(len(list(workdir.glob("stages/*.json"))))
    assert len(stages) > 3, "killed in many places"
    resumed = train(workdir, config=config, cache=cache)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert contents(workdir) == contents(finished[0])


def test_a_reward_stage_killed_before_its_mark_chooses_again(until_rl, cache, tmp_path):
    workdir = tmp_path / "smoke"
    shutil.copytree(until_rl, workdir)
    chosen = (workdir / "models/evaluator/0/manifest.json").read_text()
    (workdir / "stages/evaluator.json").unlink()
    for folder in ("checkpoints", "models"):
        shutil.rmtree(workdir / folder / "evaluator")
    killed = train(workdir, "--stage=evaluator", cache=cache, program=("tests/killed_train.py", "choice"))
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert not (workdir / "stages/evaluator.json").exists()
    resumed = train(workdir, "--stage=evaluator", cache=cache)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert (workdir / "models/evaluator/0/manifest.json").read_text() == chosen
    assert not (workdir / "candidates/evaluator").exists(), "the other candidates are not kept"


def test_an_added_arm_is_trained_and_gets_its_rows(finished, cache, tmp_path):
    workdir = tmp_path / "smoke"
    shutil.copytree(finished[0], workdir)
    result = train(workdir, "--config.arms=longer_sft", cache=cache)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "All stages were done before" not in result.stdout
    results = json.loads((workdir / "results.json").read_text())
    before = json.loads((finished[0] / "results.json").read_text())
    assert results["stages"]["arm_longer_sft"]["steps"] == results["stages"]["sft_pit"]["steps"]
    assert "longer_sft_vs_original" in before["missing"] and "longer_sft_vs_original" not in results["missing"]
    assert results["comparisons"]["longer_sft_vs_original"]["verifier"]["n"] > 0
    for name, judges in before["comparisons"].items():
        assert results["comparisons"][name] == judges, "what was there stays as it was"


def test_redo_trains_a_stage_and_all_after_it_again(finished, cache, tmp_path):
    workdir = tmp_path / "smoke"
    shutil.copytree(finished[0], workdir)
    early = "--redo=r_pit", "--config.r_pit.loss=mse", "--config.sft_pit.optimizer.b1=0.5"
    result = train(workdir, *early, cache=cache)
    assert result.returncode == 2 and "config.sft_pit.optimizer.b1: 0.9 -> 0.5" in result.stderr
    assert "r_pit.loss" not in result.stderr and contents(workdir) == contents(finished[0]), "nothing was deleted"
    result = train(workdir, "--redo=r_pit", "--config.r_pit.loss=mse", cache=cache)
    assert result.returncode == 0, result.stderr[-2000:]
    ours, theirs = contents(workdir)[0], contents(finished[0])[0]
    changed = {name.split("/")[0] for name in ours if ours[name] != theirs.get(name)}
    assert {"r_pit", "rl_pit_1", "rl_pit_2"} <= changed and not changed & {"pretrain", "sft_policy", "sft_pit", "r_p"}
    assert json.loads((workdir / "config.json").read_text())["r_pit"]["loss"] == "mse"
    result = train(workdir, "--redo=r_pit", cache=cache)
    assert result.returncode == 0 and contents(workdir) == contents(finished[0]), "back again, bitwise"


@pytest.mark.parametrize(
    ("flags", "words"), [((), "command goes on"), (("--redo=data",), "command, without --redo, goes")]
)
def test_who_stops_a_run_is_told_how_it_goes_on(tmp_path, flags, words):
    """The same command with --redo would delete what was just trained."""
    program = (
        "from pit_jax import train",
        "def stop(*_): raise KeyboardInterrupt",
        "train.common.run = stop; train.run()",
    )
    result = train(tmp_path / "w", *flags, program=("-c", "\n".join(program)))
    assert result.returncode == 130 and f"the same {words}" in result.stderr and "Traceback" not in result.stderr


def test_a_moved_workdir_keeps_its_programs(tmp_path):
    program = (
        "import pathlib, sys, jax",
        "from pit_jax import cli",
        "cli.keep_programs(pathlib.Path(sys.argv[1]))",
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)",
        "jax.jit(lambda x: 2 * x + 1)(3.0)",
    )
    names = set()
    for folder in ("one", "two"):
        result = run("-c", "\n".join(program), tmp_path / folder)
        assert result.returncode == 0, result.stderr
        names.add(frozenset(path.name for path in (tmp_path / folder / "compilation_cache").glob("*-cache")))
    assert len(names) == 1 and names != {frozenset()}


def test_another_config_is_refused(finished, cache):
    result = train(finished[0], "--config.ppo.kl_coef=0.5", cache=cache)
    assert result.returncode == 2
    assert "config.ppo.kl_coef: 0.2 -> 0.5" in result.stderr and "Traceback" not in result.stderr


def test_a_bucket_of_another_kind_is_one_line():
    result = train("s3://bucket/run")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "gs://BUCKET" in result.stderr


def test_a_misspelt_field_names_the_nearest(tmp_path):
    result = train(tmp_path / "w", "--config.ppo.kl_cof=0.5")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr == "error: the config has no field 'ppo.kl_cof'. Did you mean 'ppo.kl_coef'?\n"
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("ppoo.kl_coef", "ppo.kl_coef"),
        ("ppoo", "ppo"),
        ("pretrain.save_every", "pretrain.sft.save_every"),
        ("seed.x", "seed"),
        ("zzzzzzzzzzzz", None),
    ],
)
def test_the_whole_path_of_a_misspelt_field(field, near):
    config = config_lib.to_config_dict(config_lib.PitConfig()).to_dict()
    known = ["train", "--config=a.py", "--config.ppo.kl_coef=0.5", "--config.pretrain.sft.save_every=2"]
    assert cli.unknown_field(config, known) is None
    hint = f". Did you mean '{near}'?" if near else ""
    for argument in (f"--config.{field}=2", f"-config.{field}", f"--noconfig.{field}"):
        assert cli.unknown_field(config, [*known, argument]) == f"the config has no field '{field}'{hint}"


def test_a_value_of_another_type_is_refused(tmp_path):
    result = train(tmp_path / "w", "--config.ppo.kl_coef=much")
    assert result.returncode != 0 and "kl_coef" in result.stderr
    assert not (tmp_path / "w").exists()


def test_a_stage_needs_the_ones_before(tmp_path):
    result = train(tmp_path / "w", "--stage=r_pit")
    assert result.returncode == 2 and "--stage=r_pit needs data, pretrain" in result.stderr
    result = train(tmp_path / "w2", "--stage=r_pot")
    assert result.returncode == 2 and "rl_policy" in result.stderr


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(finished, cache, tmp_path):
    workdir = tmp_path / "w"
    flags = ("--config.pretrain.sft.optimizer.learning_rate=1e15", "--config.pretrain.sft.save_every=1")
    result = train(workdir, *flags, cache=cache)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "stage pretrain" in result.stderr and "not finite at step" in result.stderr
    from pit_jax import checkpoint

    step = checkpoint.latest_step(workdir / "checkpoints" / "pretrain")
    assert step is not None and f"checkpoint of step {step}" in result.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == step and all(np.isfinite(line["loss"]) for line in lines)


def dialogue(i, answer):
    return f"\n\nHuman: question number {i} about tea?\n\nAssistant: {answer}"


def test_hh_rlhf_smoke_runs_all_stages(tmp_path, cache):
    lines = [
        {"chosen": dialogue(i, f"A good answer {i} is to boil the water."), "rejected": dialogue(i, f"No. {i % 7}")}
        for i in range(160)
    ]
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    result = train(
        tmp_path / "w", f"--config.data.path={path}", "--config.data.prompt_window=96",
        "--config.data.response_window=64", config="configs/pit_hh_rlhf.py:smoke", cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert set(results["comparisons"]["pit_vs_original"]) == {"evaluator"}
    flags = "--tables=all", "--iterations=2", "--temperatures=0.5,1", "--shuffles=3"
    result = run("-m", "pit_jax.evaluate", f"--workdir={tmp_path / 'w'}", *flags, cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert {row["judge"] for row in results["stop_rules"]} == {"evaluator"} and "evaluator's score" in result.stdout
    assert set(results["iterations"]) == {"pit", "rerank"}, "without reflections there is no Self-Refine"
    answers = tmp_path / "answers.jsonl"
    turns = [{"role": "user", "content": "How do I boil water?"}, {"role": "assistant", "content": "No."}]
    answers.write_text(json.dumps({"messages": turns}) + "\n")
    flags = f"--input={answers}", f"--output={tmp_path / 'improved.jsonl'}", "--iterations=2", "--stop=gap,identical"
    result = run("-m", "pit_jax.improve", f"--workdir={tmp_path / 'w'}", *flags, cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = map(json.loads, (tmp_path / "improved.jsonl").read_text().splitlines())
    assert line["prompt"] == "How do I boil water?" and line["steps"][0]["response"] == "No."


def test_bad_rows_are_named_before_any_training(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    path.write_text(good + "\n" + json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    result = train(tmp_path / "w", f"--config.data.path={path}", "--config.data.format=jsonl",
                   config="configs/pit_hh_rlhf.py:smoke")  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "rows.jsonl, line 2" in result.stderr and "'rejected'" in result.stderr
    assert not (tmp_path / "w" / "checkpoints").exists()
    result = train(tmp_path / "w2", config="configs/pit_hh_rlhf.py:small")
    assert result.returncode == 2 and "no such file" in result.stderr
