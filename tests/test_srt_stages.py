"""Stages of SRT on copies of a finished smoke run: planted records, kills, other critics, rounds and arms."""

import dataclasses
import json
import math
import shutil
import time

import hf_server
import jax
import numpy as np
import pytest
from commands import SRT_CONFIG as CONFIG, run, start, train

from pit_jax import checkpoint, config as config_lib
from pit_jax.config import FeedbackConfig, LoraConfig
from pit_jax.data.feedback import Feedback
from pit_jax.files import read_json
from pit_jax.learners import dpo
from pit_jax.metrics import MetricsWriter
from pit_jax.models import lora
from pit_jax.pipelines import common, critics, srt


@pytest.fixture
def trained(finished_srt):
    return finished_srt[0]


@pytest.fixture
def copy(trained, tmp_path, one_device):
    """A copy as a context whose stages can run; its config by `with_config`."""
    shutil.copytree(trained, tmp_path / "run")
    context = common.open_workdir(tmp_path / "run")
    common.load_data(context)
    context.writer = MetricsWriter(tmp_path / "run")
    return context


def with_config(context, **fields):
    """Other values of some fields; a dict replaces fields of a field."""
    found = {
        name: dataclasses.replace(getattr(context.config, name), **value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return dataclasses.replace(context, config=dataclasses.replace(context.config, **found))


def record(row, number, response, refinement, dropped=""):
    return srt.Record(number, row.prompt, response, "w", "s", 4.0, refinement, 7.0, (4.0, 7.0), "raw", "raw", "me",
                      1, 1, dropped)  # fmt: skip


def step_losses(context, stage):
    with open(context.workdir.root / "metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line["loss"] for line in lines if line.get("stage") == stage and "loss" in line]


# DPO


def test_dpo_prefers_the_refinements_that_were_kept(copy):
    """Eight kept records and eight that were dropped: only the former are learnt, from log 2 on."""
    rows = copy.rows["rl"][:16]
    records = [record(r, i, r.rejected, r.chosen, "" if i < 8 else "score not higher") for i, r in enumerate(rows)]
    srt.write_records(copy, "self_feedback_1", records)
    copy.workdir.discard("dpo_1")
    (copy.workdir.root / "metrics.jsonl").write_text("")
    optimizer = dataclasses.replace(copy.config.dpo.optimizer, learning_rate=3e-3, schedule="constant")
    context = with_config(copy, dpo={"batch_size": 4, "num_steps": 12, "optimizer": optimizer, "chunk_size": 16})
    found = srt.dpo_stage(context, 1)
    assert (found["rows"], found["steps"]) == (8, 12)
    losses = step_losses(context, "dpo_1")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.6
    form, e, model = srt.make_form(context), context.encoder, common.model_of(context, "srt")
    ids = lambda text: [*e.tokenizer.encode(text), *form.feedback_begins]  # noqa: E731
    data = [(form.prompt(r.instruction), ids(r.refinement), ids(r.response)) for r in records[:8]]
    before, after = (
        dpo.reference_log_probs(model, common.load_model(context, stage), data, 4) for stage in ("srt", "dpo_1")
    )
    margins = (after - before) @ np.array([1.0, -1.0])
    assert np.mean(margins > 0) > 0.8, margins


def test_dpo_with_adapters_starts_at_its_reference_and_leaves_them_merged(copy):
    """ref_policy is the base of the adapters: log 2 at the start, and M_self with A B added to it at the end."""
    rows = copy.rows["rl"][:4]
    srt.write_records(copy, "self_feedback_1", [record(r, i, r.rejected, r.chosen) for i, r in enumerate(rows)])
    copy.workdir.discard("dpo_1")
    (copy.workdir.root / "metrics.jsonl").write_text("")
    optimizer = dataclasses.replace(copy.config.dpo.optimizer, learning_rate=3e-2, schedule="constant")
    config = LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))
    context = with_config(copy, lora=config, dpo={"batch_size": 4, "num_steps": 6, "optimizer": optimizer})
    srt.dpo_stage(context, 1)
    losses = step_losses(context, "dpo_1")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.6

    base, left = (common.load_model(context, stage) for stage in ("srt", "dpo_1"))
    folder = context.workdir.adapters("dpo_1")
    assert read_json(folder / "adapters.json")["base"] == "models/srt"
    fresh = lora.add(base, config, jax.random.key(0))
    adapters = checkpoint.restore(folder, 0, lora.trained(fresh))
    merged = lora.merge(lora.with_trained(fresh, adapters))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), left, merged)
    changed = {name for name, w in left["params"]["layers"].items() if name in config_lib.LAYER_MATRICES
               and not np.array_equal(w, base["params"]["layers"][name])}  # fmt: skip
    assert changed == {"q", "down"}


def test_a_round_without_pairs_leaves_the_model_as_it_is(copy):
    srt.write_records(copy, "self_feedback_1", [record(copy.rows["rl"][0], 0, "a", "b", "score not higher")])
    copy.workdir.discard("dpo_1")
    assert srt.dpo_stage(copy, 1) == {"steps": 0, "rows": 0}
    assert copy.workdir.model_digest("dpo_1") == copy.workdir.model_digest("srt")


# Feedback that was begun


class Killed(BaseException):
    """As a kill: nothing catches it."""


@pytest.mark.parametrize("fatal", ["answer", "criticize", "score"])
def test_feedback_goes_on_where_it_was_killed(copy, monkeypatch, fatal):
    """32 prompts in two pieces; killed in the second: nothing of the first is written again, all else is the same."""
    context = with_config(copy, self_feedback={"batch_size": 4, "temperature": 1.0})
    calls = []

    class Model:
        def answer(self, prompts, key, draws):
            ask("answer", len(prompts))
            word = lambda row: context.encoder.tokenizer.encode(f"tea {row}")  # noqa: E731
            return [srt.Step(tuple(word(row))) for row, _ in draws.tolist()]

    def ask(name, n):
        calls.append((name, n))
        if fatal and calls.count((name, n)) == 2 and name == fatal:
            raise Killed

    def critic(model, name):
        def reply(kind, request):
            score = 10.0 if request.response.endswith("!") else 5.0
            return critics.Reply(Feedback("w", "s", score, f"{request.response}!"), f"{kind} {request.number}", read=1)

        def asked(kind, requests):
            ask(kind, len(requests))
            return [reply(kind, request) for request in requests]

        return critics.Critic(name, *(lambda r, k=k: asked(k, r) for k in ("criticize", "score")))

    monkeypatch.setattr(srt, "make_self_critic", lambda *arguments: Model())
    monkeypatch.setattr(critics, "self_critic", critic)
    copy.workdir.discard("self_feedback_1")
    with pytest.raises(Killed):
        srt.self_feedback_stage(context, 1)
    assert context.workdir.unfinished_feedback("self_feedback_1").exists()
    before, fatal = calls[:-1], ""
    calls.clear()
    found = srt.self_feedback_stage(context, 1)
    assert before + calls == [(name, 16) for name in ("answer", "criticize", "score") for _ in range(2)]
    resumed = srt.read_records(context, "self_feedback_1")
    assert found["causes"] == {"kept": 32}
    copy.workdir.discard("self_feedback_1")
    assert not context.workdir.unfinished_feedback("self_feedback_1").exists()
    srt.self_feedback_stage(context, 1)
    assert srt.read_records(context, "self_feedback_1") == resumed


def test_answers_are_on_disk_before_a_critic_is_asked(copy, monkeypatch):
    """What a server says of them is paid for."""

    def make_critic(context):
        def ask(requests):
            with open(context.workdir.unfinished_feedback("critic_feedback"), encoding="utf-8") as file:
                lines = [json.loads(line) for line in file][1:]
            written = {line["row"]: context.encoder.text(line["ids"]) for line in lines}
            assert len(written) == 48 and requests, "those that are too long to be asked about too"
            assert all(written[r.number] == r.response for r in requests)
            raise Killed

        return critics.Critic("a server", ask, ask)

    monkeypatch.setattr(srt, "make_critic", make_critic)
    copy.workdir.discard("critic_feedback")
    with pytest.raises(Killed):
        srt.critic_feedback_stage(copy)


SAYS = (
    *("Weaknesses: it is short.\n", "Suggestions: say more.\n", "Overall Score: [[5]]\n"),
    *("### Improved Response\n", "Tea is good.", " Have some."),
)


@hf_server.needs_transformers_serve
def test_a_kill_of_stage_1_pays_for_no_answer_twice(trained, cache, tmp_path, monkeypatch):
    """kill -9 of the command in the middle; the server is not ours, and what it was asked is in its own log."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-secret")
    hf_server.tiny_chat_model(tmp_path / "model", SAYS)
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    calls = workdir / "feedback" / "calls" / "calls.jsonl"
    posts = lambda: (tmp_path / "serve.log").read_text().count('"POST /v1/chat/completions')  # noqa: E731
    stored = lambda: len(calls.read_text().splitlines()) if calls.exists() else 0  # noqa: E731
    with hf_server.serve(tmp_path / "model", tmp_path) as address:
        command = ["-m", "pit_jax.train", f"--config={CONFIG}", f"--workdir={workdir}", "--stage=critic_feedback"]
        command += ["--config.critic.kind=server", f"--config.critic.base_url={address}"]
        command += [f"--config.critic.model={tmp_path / 'model'}", "--config.critic.max_in_flight=2"]
        command += ["--config.critic_feedback.num_prompts=300"]  # M_base of a smoke run rambles: few fit the window
        begun = start(*command, "--redo=critic_feedback", cache=cache, log=tmp_path / "first.log")
        deadline = time.monotonic() + 240
        while stored() < 10:
            assert begun.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
        begun.kill()
        begun.wait()
        time.sleep(2)  # what was under way at the server ends
        before, asked = stored(), posts()
        result = run(*command, cache=cache)
        assert result.returncode == 0, result.stderr[-3000:]
        # Two words to see that the server is there, then what was not on disk.
        assert 10 <= before < stored() and posts() - asked == 2 + stored() - before
    context = common.open_workdir(workdir)
    records = srt.read_records(context, "critic_feedback")
    judged = [r for r in records if r.read]
    assert len(records) == 300 and 2 * len(judged) >= stored() > len(judged), "a critique and a score each"
    assert {(r.refinement, r.score, r.refinement_score) for r in judged} == {("Tea is good. Have some.", 5.0, 5.0)}
    assert set(context.workdir.done("critic_feedback")["causes"]) == {"kept", "over the windows"}
    for path in workdir.rglob("*"):
        assert not path.is_file() or b"sk-a-secret" not in path.read_bytes()


def test_a_few_records_without_a_reply_are_counted(copy, monkeypatch):
    """2 of 48 are above the default share, and a run of 25,000 is not to end for the 3% that a user allows."""
    numbers = iter(range(48))

    def make_critic(context):
        def criticize(requests):
            found = Feedback("w", "s", 5.0, "tea")
            return [critics.Reply(error="no reply: x") if next(numbers) < 2 else critics.Reply(found) for _ in requests]

        return critics.Critic(
            "a server", criticize, lambda requests: [critics.Reply(Feedback(score=9.0))] * len(requests)
        )

    monkeypatch.setattr(srt, "make_critic", make_critic)
    monkeypatch.setattr(srt, "_first_answers", lambda journal, numbers, *_: [(10,)] * len(numbers))
    copy.workdir.discard("critic_feedback")
    with pytest.raises(ValueError, match='to 2 of 48 records the critic gave no reply.*see "no reply" in'):
        srt.critic_feedback_stage(copy)
    numbers = iter(range(48))
    found = srt.critic_feedback_stage(with_config(copy, critic={"max_lost": 0.05}))
    assert found["causes"] == {"kept": 46, "no reply": 2}


# Critics


def test_a_model_criticises_each_answer_by_itself(copy):
    """The same in any batch; an answer over its window is not read, and says so."""
    model = srt.make_self_critic(copy, "srt", 0.0, 8)
    rows = copy.rows["test"][:6]
    replies = model.criticize([r.prompt for r in rows], [r.rejected for r in rows])
    assert replies[3] == model.criticize([rows[3].prompt], [rows[3].rejected])[0]
    assert all(reply.raw.startswith("### Feedback") and reply.read > 0 < reply.written for reply in replies)
    (long,) = model.score([rows[0].prompt], ["tea " * 60])
    assert long.error == critics.OVER_WINDOW and long.feedback == Feedback()
    key, draws = jax.random.key(0), np.zeros((6, 2), np.uint32)
    answers = model.answer([r.prompt for r in rows], key, draws)
    assert all(len(step.ids) <= copy.encoder.response_window for step in answers)


def test_another_run_as_the_critic(copy, trained):
    context = with_config(copy, critic={"kind": "workdir", "workdir": str(trained)})
    critic = srt.make_critic(context)
    assert critic.name == f"dpo_1 {copy.workdir.model_digest('dpo_1')}"
    row = copy.rows["rm"][0]
    (said,) = critic.criticize([critics.Request(0, row, row.rejected)])
    assert said == srt.make_self_critic(copy, "dpo_1", 0.0, 128).criticize([row.prompt], [row.rejected])[0]
    with pytest.raises(ValueError, match="has no config.json"):
        srt.check(with_config(copy, critic={"kind": "workdir", "workdir": "none"}).config, {"critic_feedback"})
    srt.check(with_config(copy, critic={"kind": "workdir", "workdir": "none"}).config, {"srt"})


def test_r_pit_has_its_say(copy, monkeypatch):
    """Of the records that were kept, those whose gain is not above 0 are dropped."""
    rows = copy.rows["rl"][:4]
    records = [record(r, i, r.rejected, r.chosen, "no score" if i == 3 else "") for i, r in enumerate(rows)]
    asked = []

    def gains(prompts, answers, before):
        asked.append((prompts, [copy.encoder.text(y) for y in answers], [copy.encoder.text(y) for y in before]))
        return [(1.0, gain, 0) for gain in (0.5, 0.0, -0.5)]

    monkeypatch.setattr(srt.pit, "open_finished", lambda root, stages: copy)
    monkeypatch.setattr(srt.pit, "make_gains", lambda context: gains)
    found = srt.drop_by_gap(records, FeedbackConfig(gap_workdir="a run"))
    assert [r.dropped for r in found] == ["", "gap not higher", "gap not higher", "no score"]
    ((prompts, answers, before),) = asked
    assert prompts == [r.prompt for r in rows[:3]]
    assert (answers, before) == ([r.chosen for r in rows[:3]], [r.rejected for r in rows[:3]])


# Windows


def test_what_m_self_could_not_write_is_dropped(copy):
    """A critique takes its room with the words that announce the refinement."""
    row = copy.rows["rl"][0]
    good = record(row, 0, "tea", "tea now")
    room = len(srt.make_form(copy).critique(good.feedback))
    for window, fits in ((room, True), (room - 1, False)):
        assert srt.fits_windows(with_config(copy, feedback_window=window))(good) == fits
    window = copy.config.data.response_window
    size = lambda text: len(copy.encoder.tokenizer.encode(text))  # noqa: E731
    long = next(text for n in range(200) if size(text := " tea" * n) >= window)
    fits = srt.fits_windows(copy)
    assert fits(record(row, 0, "tea", "tea")) and not fits(record(row, 0, "tea", long))
    assert not fits(record(row, 0, long, "tea"))


# Rounds and arms


def test_two_rounds_and_arms(trained, cache, tmp_path):
    """Each round has prompts of its own; arms are in the tables; then no round at all, and nothing of them is left."""
    shutil.copytree(trained, tmp_path / "run")
    command = ("-m", "pit_jax.train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", "--redo=self_feedback_1")
    result = run(*command, "--config.num_rounds=2", "--config.arms=quarter,without_feedback", cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    context = common.open_workdir(tmp_path / "run")
    first, second = ({r.instruction for r in srt.read_records(context, f"self_feedback_{i}")} for i in (1, 2))
    assert len(first) == len(second) == 32 and not first & second
    done = context.workdir.done
    assert done("arm_quarter")["rows"] == round(done("srt")["rows"] / 4) and done("arm_without_feedback")["rows"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"quarter_vs_base", "without_feedback_vs_srt_stage1"} <= set(results["comparisons"])
    assert "half_vs_base" in results["missing"] and "quarter_vs_base" not in results["missing"]
    assert results["models"]["dpo_2"] == context.workdir.model_digest("dpo_2")
    (tmp_path / "run" / "checkpoints" / "arm_half").mkdir()  # of an arm that was killed
    result = run(*command[:-1], "--redo=srt", "--config.num_rounds=0", cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "srt_stage1_vs_base" in results["comparisons"] and "srt_stage2_vs_base" not in results["comparisons"]
    left = {path.name for folder in ("models", "checkpoints") for path in (tmp_path / "run" / folder).iterdir()}
    assert left == {"pretrain", "sft_policy", "srt"}
    assert {path.name for path in (tmp_path / "run" / "feedback").iterdir()} == {"critic_feedback.jsonl"}


def test_a_round_of_pit_on_refinements_of_srt(copy, finished, cache, tmp_path):
    """The command, on planted refinements; where there are none it says so and deletes nothing."""
    rows = copy.rows["rl"][:24]
    srt.write_records(copy, "self_feedback_1", [record(r, i, r.rejected, r.chosen) for i, r in enumerate(rows)])
    shutil.copytree(finished[0], tmp_path / "pit")
    flags = ("--redo=rl_pit_1", "--stage=rl_pit_1", "--config.curriculum=srt")
    result = train(tmp_path / "pit", *flags, f"--config.srt_workdir={copy.workdir.root}", cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "deleted, as this config has them not: rl_pit_2" in result.stdout
    kept = (tmp_path / "pit" / "feedback" / "rl_pit_1.jsonl").read_text(encoding="utf-8").splitlines()
    assert {(x["prompt"], x["refinement"]) for x in map(json.loads, kept)} >= {(r.prompt, r.chosen) for r in rows}
    result = train(tmp_path / "pit", *flags, "--config.srt_workdir=nowhere", cache=cache)
    assert result.returncode == 2 and "name a run of SRT" in result.stderr
    assert (tmp_path / "pit" / "models" / "rl_pit_1").exists(), "nothing was deleted"


def test_a_check_that_fails_deletes_nothing(trained, cache, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    command = ("-m", "pit_jax.train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}")
    critic = ("--config.critic.kind=workdir", "--config.critic.workdir=none", "--redo=critic_feedback")
    for flags, message in (
        (critic, "has no config.json"),
        ((*critic, "--stage=data"), "has no config.json"),  # what is deleted is checked, not what runs now
        (("--redo=srt", "--stage=dpo_1"), "--stage=dpo_1 needs srt, self_feedback_1 first"),
    ):
        result = run(*command, *flags, cache=cache)
        assert result.returncode == 2 and message in result.stderr
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
