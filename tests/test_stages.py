"""A workdir: whose it is, what is done, and which candidate is taken."""

import dataclasses
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pit_jax.config import PitConfig
from pit_jax.pipelines import stages
from pit_jax.pipelines.stages import Candidates, Workdir, choose_by_kl_bin, run_stage


def test_choose_by_kl_bin_by_hand():
    """KL from 0 to 8 in 4 bins of width 2: {0, 10}, {20}, none, {30, 40, 50}; a boundary belongs to the bin above."""
    measured = {
        0: {"kl": 0.0, "score": 0.1},
        10: {"kl": 1.9, "score": 0.4},
        20: {"kl": 2.0, "score": 0.9},
        30: {"kl": 6.5, "score": 0.7},
        40: {"kl": 8.0, "score": 0.8},
        50: {"kl": 7.0, "score": 0.8},
    }
    step, winners = choose_by_kl_bin(measured, 4)
    assert step == 20
    assert [w["step"] for w in winners] == [10, 20, 40], "of equal scores, the earlier step"
    assert [(w["low"], w["high"]) for w in winners] == [(0.0, 2.0), (2.0, 4.0), (6.0, 8.0)]
    assert winners[2] == {"step": 40, "low": 6.0, "high": 8.0, "kl": 8.0, "score": 0.8}


def test_choose_by_kl_bin_where_all_are_equal():
    measured = {3: {"kl": 1.5, "score": 0.1}, 6: {"kl": 1.5, "score": 0.2}}
    step, winners = choose_by_kl_bin(measured, 4)
    assert step == 6 and len(winners) == 1 and winners[0]["low"] == winners[0]["high"] == 1.5
    assert choose_by_kl_bin({0: {"kl": -0.1, "score": 2.0}}, 3)[0] == 0


def test_choose_by_one_bin_is_the_best_score():
    measured = {i: {"kl": float(i), "score": s} for i, s in enumerate((0.3, 0.9, 0.2, 0.5))}
    step, winners = choose_by_kl_bin(measured, 1)
    assert step == 1 and len(winners) == 1
    assert [w["step"] for w in choose_by_kl_bin(measured, 100)[1]] == [0, 1, 2, 3]


def test_choose_by_kl_bin_under_a_limit():
    """A candidate that is too far counts neither by its score nor for its bin; where all are too far, the nearest."""
    measured = {i: {"kl": kl, "score": s} for i, (kl, s) in enumerate([(0.0, 0.1), (1.5, 0.3), (1.9, 0.9), (4.0, 2.0)])}
    assert choose_by_kl_bin(measured, 2)[0] == 3
    assert choose_by_kl_bin(measured, 2, max_kl=1.9)[0] == 2
    assert choose_by_kl_bin(measured, 2, max_kl=1.5)[0] == 1, "not step 2, though it wins the bin"
    assert choose_by_kl_bin({k: measured[k] for k in (2, 3)}, 2, max_kl=0.5)[0] == 2


def test_a_workdir_refuses_another_config(tmp_path):
    config = PitConfig()
    Workdir(tmp_path / "w", config)
    Workdir(tmp_path / "w", config).finish("data", {})
    changed = dataclasses.replace(config, seed=4, ppo=dataclasses.replace(config.ppo, kl_coef=0.25))
    with pytest.raises(ValueError) as error:
        Workdir(tmp_path / "w", changed)
    message = str(error.value)
    assert "config.ppo.kl_coef: 0.05 -> 0.25" in message and "config.seed: 0 -> 4" in message
    assert "--workdir" in message and message.count("->") == 2
    assert json.loads((tmp_path / "w" / "config.json").read_text())["seed"] == 0, "the file is left as it was"


@pytest.mark.parametrize("made", ["stages/data.json", "checkpoints/pretrain"])
def test_a_start_that_failed_early_binds_nobody(tmp_path, made):
    """A wrong path, then the right one on the same workdir."""
    config, other = PitConfig(), PitConfig(seed=4)
    Workdir(tmp_path / "w", config)
    (tmp_path / "w" / "stages").mkdir()
    (tmp_path / "w" / "stages" / "data.seconds.json").write_text("0.5")
    Workdir(tmp_path / "w", other)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["seed"] == 4
    (tmp_path / "w" / made).parent.mkdir(exist_ok=True)
    (tmp_path / "w" / made).write_text("{}")
    with pytest.raises(ValueError, match="made with another config"):
        Workdir(tmp_path / "w", config)


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "w").write_text("mine")
    with pytest.raises(ValueError, match="w is a file, but must be a folder"):
        Workdir(tmp_path / "w", PitConfig())


def test_arms_may_be_added(tmp_path):
    config = PitConfig()
    Workdir(tmp_path / "w", config).finish("data", {})
    Workdir(tmp_path / "w", dataclasses.replace(config, arms=("second_rl_only",)))
    stored = json.loads((tmp_path / "w" / "config.json").read_text())
    assert stored["arms"] == ["second_rl_only"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and has no config.json"):
        Workdir(tmp_path, PitConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_done_finish_forget(tmp_path):
    workdir = Workdir(tmp_path / "w", PitConfig())
    assert workdir.done("r_p") is None
    workdir.finish("r_p", {"accuracy": 0.5})
    assert Workdir(tmp_path / "w", PitConfig()).done("r_p") == {"accuracy": 0.5}
    assert workdir.done("r_pit") is None
    workdir.forget("r_p")
    assert workdir.done("r_p") is None


def test_a_model_is_left_behind(tmp_path):
    workdir = Workdir(tmp_path / "w", PitConfig())
    params = {"w": np.arange(4, dtype=np.float32)}
    workdir.save_model("r_p", params)
    np.testing.assert_array_equal(workdir.load_model("r_p", params)["w"], params["w"])


def leave(workdir, stage):
    """As a stage that is done."""
    workdir.save_model(stage, {"w": np.zeros(2, np.float32)})
    workdir.checkpoints(stage).mkdir(parents=True)
    workdir.finish(stage, {})


def test_a_deletion_that_is_killed_is_finished_by_the_next_start(tmp_path, monkeypatch):
    """Marks go before folders, the last stage's first: nothing that is done was made of what is gone."""
    workdir = Workdir(tmp_path / "w", PitConfig())
    for stage in ("sft_policy", "r_p", "rl_policy"):
        leave(workdir, stage)
    unlinked = []
    real = Path.unlink

    def unlink(path, **more):
        unlinked.append(path.name)
        if path.name == "r_p.json":
            raise KeyboardInterrupt
        real(path, **more)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        workdir.discard("r_p", "rl_policy")
    monkeypatch.setattr(Path, "unlink", real)
    assert unlinked == ["rl_policy.json", "r_p.json"]
    again = Workdir(tmp_path / "w", PitConfig())
    assert [again.done(stage) for stage in ("sft_policy", "r_p", "rl_policy")] == [{}, None, None]
    for folder in ("models", "checkpoints"):
        assert {path.name for path in (tmp_path / "w" / folder).iterdir()} == {"sft_policy"}
    assert not (tmp_path / "w" / "discarding.json").exists()


def test_only_rounds_and_arms_are_left_by_others(tmp_path):
    """A copy that a user keeps beside the models is not ours to delete."""
    workdir = Workdir(tmp_path / "w", PitConfig())
    for stage in ("sft_policy", "sft_policy_best", "rl_pit_2", "arm_longer_sft", "dpo_1"):
        leave(workdir, stage)
    for name in ("self_feedback_2.jsonl", "self_feedback_3.unfinished.jsonl", "my_labels.jsonl"):
        (tmp_path / "w" / "feedback").mkdir(exist_ok=True)
        (tmp_path / "w" / "feedback" / name).touch()
    found = workdir.left_by_others(["sft_policy", "dpo_1"])
    assert found == ["arm_longer_sft", "rl_pit_2", "self_feedback_2", "self_feedback_3"]


def test_a_config_is_claimed_only_after_the_checks(tmp_path):
    config = PitConfig()
    Workdir(tmp_path / "w", config)
    later = Workdir(tmp_path / "w", dataclasses.replace(config, name="other"), claim=False)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["name"] == "pit"
    later.claim()
    assert json.loads((tmp_path / "w" / "config.json").read_text())["name"] == "other"


def test_candidates_replace_what_a_killed_run_left(tmp_path):
    candidates = Candidates(tmp_path / "c")
    like = {"w": np.zeros(2, np.float32)}
    add = lambda step, value: candidates.add(step, {"w": np.full(2, value, np.float32)}, {"score": value})  # noqa: E731
    assert candidates.all() == {}
    for step in (0, 10, 20, 30):
        add(step, float(step))
    # Killed, and started again from a checkpoint of step 5: steps 10 and on are measured anew.
    candidates = Candidates(tmp_path / "c")
    add(10, 0.5)
    assert candidates.all() == {0: {"score": 0.0}, 10: {"score": 0.5}}
    np.testing.assert_array_equal(candidates.load(10, like)["w"], [0.5, 0.5])
    np.testing.assert_array_equal(candidates.load(0, like)["w"], [0.0, 0.0])
    with pytest.raises(ValueError, match="does not exist"):
        candidates.load(20, like)
    add(20, 7.0)
    assert list(candidates.all()) == [0, 10, 20]
    candidates.clear()
    assert Candidates(tmp_path / "c").all() == {}


def test_run_stage_runs_once_and_counts_the_seconds_of_all_starts(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 103.0, 200.0, 204.0, 204.0])
    monkeypatch.setattr("pit_jax.pipelines.stages.time.perf_counter", lambda: next(clock))
    workdir = Workdir(tmp_path / "w", PitConfig())

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(workdir, "r_p", killed)
    assert workdir.done("r_p") is None
    assert run_stage(workdir, "r_p", lambda: {"accuracy": 0.75}) == {"accuracy": 0.75, "seconds": 7.0}
    capsys.readouterr()

    def never():
        raise AssertionError("a stage that is done does not run")

    assert run_stage(workdir, "r_p", never) == {"accuracy": 0.75, "seconds": 7.0}
    assert capsys.readouterr().out == "r_p: done\n"
    assert [path.name for path in (tmp_path / "w" / "stages").iterdir()] == ["r_p.json"]


def test_a_workdir_in_a_bucket(bucket):
    """Small files are written here and brought there; another machine goes on with them."""
    config = PitConfig()
    workdir = Workdir(bucket / "run", config)
    assert not str(workdir.root).startswith(str(bucket)) and (bucket / "run" / "config.json").is_file()
    run_stage(workdir, "sft_policy", lambda: {"steps": 3})
    workdir.save_model("sft_policy", {"x": np.arange(3.0)})
    candidates = workdir.candidates("r_p")
    candidates.add(5, {"x": np.arange(2.0)}, {"accuracy": 0.5})
    (workdir.root / "metrics.jsonl").write_text("{}\n")
    workdir.push()
    again = Workdir(bucket / "run", config)
    assert again.root != workdir.root and again.done("sft_policy")["steps"] == 3
    assert (again.root / "metrics.jsonl").read_text() == "{}\n" and not (again.root / "models").exists()
    assert again.load_model("sft_policy", {"x": np.zeros(3)})["x"].tolist() == [0.0, 1.0, 2.0]
    assert again.model_digest("sft_policy") == workdir.model_digest("sft_policy")
    assert again.candidates("r_p").all() == {5: {"accuracy": 0.5}}
    with pytest.raises(ValueError, match="config.seed: 0 -> 1"):
        Workdir(bucket / "run", dataclasses.replace(config, seed=1))
    again.discard("sft_policy")
    there = {path.name for path in Path(str(bucket)).rglob("*") if path.is_file()}
    assert "sft_policy.json" not in there and not (bucket / "run" / "models" / "sft_policy").exists()
    assert "discarding.json" not in there and "metrics.jsonl" in there
    again.candidates("r_p").clear()
    assert not list(Path(str(bucket)).rglob("candidates/r_p/5"))


def test_what_a_long_stage_has_so_far_gets_into_the_bucket(bucket, monkeypatch):
    """Replies that were paid for, before the stage is done."""
    monkeypatch.setattr(stages, "PUSH_SECONDS", 0.01)
    workdir = Workdir(bucket / "run", PitConfig())

    def ask():
        (workdir.root / "feedback").mkdir()
        (workdir.root / "feedback" / "calls.jsonl").write_text("{}\n")
        for _ in range(1000):
            if (bucket / "run" / "feedback" / "calls.jsonl").is_file():
                return {"steps": 0}
            time.sleep(0.01)
        raise AssertionError("nothing came")

    run_stage(workdir, "critic_feedback", ask)
    assert not [thread for thread in threading.enumerate() if thread.name == "push"]


def test_the_mark_of_a_stage_comes_into_a_bucket_behind_its_files(bucket, monkeypatch):
    """A kill between the two would leave a stage that is done and whose tables are nowhere."""
    workdir, written, write = Workdir(bucket / "run", PitConfig()), [], type(bucket).write_bytes
    monkeypatch.setattr(type(bucket), "write_bytes", lambda self, data: written.append(self.name) or write(self, data))
    (workdir.root / "tables.txt").write_text("Table 1")
    workdir.finish("evaluate", {"arms": []})
    assert written == ["tables.txt", "evaluate.json"]


def test_another_mesh_is_no_other_config(tmp_path):
    """A run goes on where there are other devices; a trace may be asked for at any time."""
    config = PitConfig()
    run_stage(Workdir(tmp_path / "run", config), "data", lambda: {"steps": 0})
    other = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=4, model=2), profile=3)
    assert Workdir(tmp_path / "run", other).done("data") is not None
