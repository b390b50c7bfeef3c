"""SRT: records and their rules by hand, critics on a scripted server, and the real command."""

import collections
import json
import types

import numpy as np
import openai_server
import pytest
from commands import SRT_CONFIG as CONFIG, run

from pit_jax.config import CriticConfig, FeedbackConfig, SrtConfig
from pit_jax.data import feedback as feedback_lib, synthetic
from pit_jax.data.feedback import Feedback
from pit_jax.data.verifier import share_met, verify
from pit_jax.files import Journal
from pit_jax.pipelines import critics, srt
from pit_jax.pipelines.critics import Critic, Reply, Request
from pit_jax.types import PreferenceExample, Requirement

ROW = PreferenceExample(prompt="Write.", rejected="l", chosen="w")


def reply(score, refinement="r", **more):
    found = Feedback("w", "s", score, refinement)
    return Reply(found, f"raw {score}", read=10, written=3, **more)


def scripted(criticize, score):
    """A critic that looks its replies up by the response."""
    asked = types.SimpleNamespace(criticize=[], score=[])

    def look(replies, calls):
        def ask(requests):
            calls.append([r.response for r in requests])
            return [replies[r.response] for r in requests]

        return ask

    return Critic("scripted", look(criticize, asked.criticize), look(score, asked.score)), asked


def records_of(critic, responses, **settings):
    rows = [ROW] * len(responses)
    return srt.make_records(rows, range(len(rows)), responses, critic, FeedbackConfig(**settings))


# Records


def test_a_refinement_is_scored_on_its_own():
    critic, asked = scripted({"a": reply(4.0, "b")}, {"b": reply(7.0)})
    (record,) = records_of(critic, ["a"])
    assert asked.criticize == [["a"]] and asked.score == [["b"]]
    assert (record.score, record.refinement, record.refinement_score, record.scores) == (4.0, "b", 7.0, (4.0, 7.0))
    assert (record.raw, record.raw_score, record.critic) == ("raw 4.0", "raw 7.0", "scripted")
    assert (record.read, record.written, record.dropped) == (20, 6, "")


@pytest.mark.parametrize(
    ("first", "second", "settings", "cause"),
    [
        (reply(4.0), reply(4.0), {}, ""),
        (reply(4.0), reply(4.0), {"keep_ties": False}, "score not higher"),
        (reply(4.0), reply(5.0), {"keep_ties": False}, ""),
        (reply(4.0), reply(3.0), {}, "score not higher"),
        (reply(4.0), reply(5.0), {"min_margin": 2.0}, "score not higher"),
        (reply(4.0), reply(6.0), {"min_margin": 2.0}, ""),
        (reply(None), reply(5.0), {}, "no score"),
        (reply(4.0), reply(None), {}, "refinement not scored"),
        (reply(4.0, None), None, {}, "no refinement"),
        (Reply(Feedback("w", None, 4.0, "r")), reply(9.0), {}, "no suggestions"),
        (Reply(error="no reply: timed out"), None, {}, "no reply"),
    ],
)
def test_rules_of_section_4_1(first, second, settings, cause):
    critic, _ = scripted({"y": first}, {"r": second})
    (record,) = records_of(critic, ["y"], **settings)
    assert record.dropped == cause
    if first.error:
        assert record.raw == first.error, "why there is none is kept for inspection"


def test_rounds_of_critique_stop_where_the_score_does_not_rise():
    """y 4; r1 6, r2 8, r3 7: r2 is kept beside the critique of y. The other row ends after r1, which equals r2."""
    critic, asked = scripted(
        {"y": reply(4.0, "r1"), "r1": reply(6.0, "r2"), "r2": reply(8.0, "r3"), "r3": reply(1.0, "r4"),
         "z": reply(5.0, "q1"), "q1": reply(6.0, "q2")},
        {"r1": reply(6.0), "r2": reply(8.0), "r3": reply(7.0), "q1": reply(6.0), "q2": reply(6.0)},
    )  # fmt: skip
    first, second = records_of(critic, ["y", "z"], num_critiques=4)
    assert (first.refinement, first.refinement_score, first.scores) == ("r2", 8.0, (4.0, 6.0, 8.0, 7.0))
    assert (first.weaknesses, first.score, first.raw) == ("w", 4.0, "raw 4.0")
    assert (second.refinement, second.refinement_score, second.scores) == ("q1", 6.0, (5.0, 6.0, 6.0))
    assert asked.criticize == [["y", "z"], ["r1", "q1"], ["r2"]] and asked.score == [["r1", "q1"], ["r2", "q2"], ["r3"]]
    assert (first.read, first.written) == (60, 18), "three critiques and three scores"
    assert srt.feedback_summary([first, second])["mean_scores_by_round"] == [4.5, 6.0, 7.0, 7.0]


def test_counts_by_cause():
    critic, _ = scripted({"a": reply(4.0, "b"), "c": reply(9.0, "d")}, {"b": reply(7.0), "d": reply(2.0)})
    summary = srt.feedback_summary(records_of(critic, ["a", "c", "a"]))
    assert summary["causes"] == {"kept": 2, "score not higher": 1} and summary["records"] == 3
    assert summary["parse_rate"] == 1.0 and summary["mean_scores"] == [pytest.approx(17 / 3), pytest.approx(16 / 3)]
    assert summary["histograms"] == [[0, 0, 0, 2, 0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 2, 0, 0, 0]]
    assert (summary["read"], summary["written"]) == (60, 18)


def test_records_in_which_nothing_changes_are_a_share():
    """6 that change, 9 that do not, 1 dropped: a quarter of what is kept is 2 of 8."""
    criticize = {f"y{i}": reply(10.0, f"y{i}") for i in range(9)} | {f"z{i}": reply(4.0, "r") for i in range(6)}
    criticize["lost"] = reply(None)
    critic, _ = scripted(criticize, {name: reply(10.0) for name in [*criticize, "r"]})
    records = records_of(critic, list(criticize))
    kept = lambda share, seed=0: [not r.dropped for r in srt.drop_unchanged(records, share, seed)]  # noqa: E731
    assert sum(kept(1.0)) == 15 and sum(kept(0.25)) == 8 and sum(kept(0.0)) == 6
    assert all(kept(0.25)[9:15]) and kept(0.25) == kept(0.25) != kept(0.25, seed=1)
    causes = collections.Counter(r.dropped for r in srt.drop_unchanged(records, 0.25, 0))
    assert causes == {"": 8, "nothing to change": 7, "no score": 1}


def test_a_response_that_does_not_fit_is_not_asked_about():
    critic, asked = scripted({"a": reply(4.0, "b")}, {"b": reply(7.0)})
    rows = [ROW] * 3
    records = srt.make_records(rows, range(3), ["long", "a", "longer"], critic, FeedbackConfig(), lambda y: y == "a")
    assert asked.criticize == [["a"]]
    assert [r.dropped for r in records] == ["over the windows", "", "over the windows"]
    assert [r.read for r in records] == [0, 20, 0]


def test_replies_are_asked_for_once(tmp_path):
    """What was asked before a kill is read; the rest is asked in pieces, and a torn line again."""
    replies = {name: reply(4.0, f"{name}!") for name in "abcde"}
    critic, asked = scripted(replies, {"a": reply(2.0)})
    requests = [Request(i, ROW, name) for i, name in enumerate("abcde")]
    path = tmp_path / "replies.jsonl"
    stored = critics.stored(critic, Journal(path, {"critic": "c"}), 2)
    assert stored.criticize(requests[:3]) == [replies[name] for name in "abc"]
    assert asked.criticize == [["a", "b"], ["c"]]
    with open(path, "a") as file:
        file.write('{"ask": "criticize", "row": 3, "resp')
    again = critics.stored(critic, Journal(path, {"critic": "c"}), 2)
    assert again.criticize(requests) == [replies[name] for name in "abcde"]
    assert asked.criticize[2:] == [["d", "e"]]
    assert again.score(requests[:1]) == [reply(2.0)], "a score is another question"
    other = requests[0]._replace(number=7)
    assert again.criticize([other]) == [replies["a"]] and asked.criticize[3:] == [["a"]], "another row is asked"
    with pytest.raises(ValueError, match="of a run with other critic: delete it"):
        Journal(path, {"critic": "d"})


def test_what_critiques_are_worth_by_hand():
    """Four responses that fail: two found, one mended. Two that pass: one false alarm, one broken."""
    need = Requirement("contains", "tea")
    row = PreferenceExample(prompt="Write.", rejected="l", chosen="w", requirements=(need,))
    says = {"a": (10.0, "a"), "b": (4.0, "tea"), "c": (4.0, "c"), "d": (10.0, "d"), "tea": (10.0, "tea"),
            "tea!": (7.0, "no"), "lost": (None, "tea")}  # fmt: skip
    critic, _ = scripted({y: reply(*said) for y, said in says.items()}, {y: reply(10.0) for y in [*says, "no"]})
    records = records_of(critic, list(says))
    assert srt.truth_of(records, [row] * len(records)) == {
        "failing": 4, "found": 0.5, "mended": 0.25, "passing": 2, "false_alarms": 0.5, "broken": 0.5,
    }  # fmt: skip
    nothing = srt.truth_of([], [])
    assert (nothing["failing"], nothing["found"], nothing["broken"]) == (0, None, None)


# The verifier as a critic


@pytest.fixture(scope="module")
def rows():
    return synthetic.generate(5, 0, 150)


def test_the_verifier_is_never_wrong(rows):
    critic = critics.verifier_critic(0)
    requests = [Request(i, row, row.rejected) for i, row in enumerate(rows)]
    for row, said in zip(rows, critic.criticize(requests), strict=True):
        assert all(verify(row.requirements, said.feedback.refinement)) and said.feedback.score < 10
        assert feedback_lib.parse(said.raw) == said.feedback, "its words are read as any critic's"
    assert critic.criticize(requests) == critic.criticize(requests)
    scores = critic.score([request._replace(response=request.row.chosen) for request in requests])
    assert {said.feedback.score for said in scores} == {10.0}


def test_an_erring_critic_errs_as_often_as_it_is_told(rows):
    requests = [Request(i, row, row.rejected) for i, row in enumerate(rows)]
    right = [s.feedback.score for s in critics.verifier_critic(0).score(requests)]
    wrong = critics.verifier_critic(0, 0.25)
    assert wrong.name == "verifier, error rate 0.25"
    total = sum(len(row.requirements) for row in rows)
    looks = [wrong.criticize([request])[0] for request in requests]
    # With n requirements a right critique has none of n verdicts turned, which is 0.75 to the power of n.
    same = np.mean([a == b.feedback.score for a, b in zip(right, looks, strict=True)])
    assert 0.3 < same < 0.85 and total > 400
    assert np.mean([share_met(r.requirements, s.feedback.refinement) for r, s in zip(rows, looks, strict=True)]) < 0.98
    blind = critics.verifier_critic(0, 1.0).criticize(requests)
    for row, said in zip(rows, blind, strict=True):
        assert said.feedback.refinement == row.rejected, "what fails is taken for met, and what is met is there"


# A server


def critic_script():
    """A critique of the response in the prompt; the response says what the server does, at first or always."""
    asked = collections.Counter()

    def script(messages, _):
        response = messages[-1]["content"].split("### Response\n")[1].split("\n\n### Requirements")[0]
        asked[response] += 1
        return critic_reply(response, asked[response] - 1)

    return script


def critic_reply(response, attempt):
    if response == "nonsense":
        return "I would rather not."
    if response == "late" and attempt == 0:
        return openai_server.Reply("wait", status=429)
    if response == "broken" and attempt == 0:
        return openai_server.Reply(body='{"choices": [', status=200)
    if response == "empty":
        return ""
    if response == "cut":
        return openai_server.Reply(feedback_lib.render(Feedback("w", "s", 5.0, "half an ans")), finish_reason="length")
    if response == "gone":
        return openai_server.Reply("down", status=500)
    return feedback_lib.render(Feedback("w", "s", min(10.0, len(response)), f"{response}!"))


def server_settings(server, **more):
    return CriticConfig(kind="server", base_url=server.base_url, model="m", **more)


def test_bad_replies_are_retried_and_then_counted(tmp_path, monkeypatch):
    openai_server.clean_environment(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-secret")
    real = critics.client.ClientConfig
    monkeypatch.setattr(critics.client, "ClientConfig", lambda **kw: real(**kw | {"num_retries": 1}))
    responses = ["fine", "nonsense", "late", "broken", "empty", "cut", "gone", "fine too"]
    with openai_server.serve(critic_script()) as server:
        critic = critics.server_critic(server_settings(server), feedback_lib.load_template("critic"), tmp_path)
        records = records_of(critic, responses)
        stops = [body.get("stop") for body in server.bodies]
        asked = server.asked()
    causes = dict(zip(responses, [record.dropped for record in records], strict=True))
    assert causes == {
        "fine": "", "nonsense": "no weaknesses", "late": "", "broken": "", "empty": "no weaknesses",
        "cut": "no refinement", "gone": "no reply", "fine too": "",
    }  # fmt: skip
    assert records[0].refinement == "fine!" and (records[0].score, records[0].refinement_score) == (4.0, 5.0)
    assert "500" in records[6].raw or "down" in records[6].raw
    assert sum(n for text, n in asked.items() if "\nnonsense\n" in text) == 2, "asked once more, with another seed"
    assert ["### Improved Response"] in stops and None in stops, "a score ends where the refinement would begin"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert "sk-a-secret" not in path.read_text(encoding="utf-8")
    # The server has stopped: what is on disk needs none, and what is not says so.
    critic = critics.server_critic(server_settings(server), feedback_lib.load_template("critic"), tmp_path)
    kept = ["fine", "nonsense", "late", "empty", "cut", "fine too"]
    again = records_of(critic, kept)
    assert [record.dropped for record in again] == [causes[response] for response in kept]
    assert again[0].refinement == "fine!"
    with pytest.raises(ValueError, match="no server can be reached"):
        records_of(critic, ["gone"])


def test_a_prompt_that_is_always_refused_hinders_no_other(tmp_path, monkeypatch):
    """As by a content policy. It is asked again by itself, with another seed: that, too, does not end the run."""
    openai_server.clean_environment(monkeypatch)

    def script(messages, _):
        blocked = "\nbad\n" in messages[-1]["content"]
        return openai_server.Reply("policy", status=400) if blocked else critic_script()(messages, _)

    with openai_server.serve(script) as server:
        critic = critics.server_critic(server_settings(server), feedback_lib.load_template("critic"), tmp_path)
        records = records_of(critic, ["bad", "fine", "good"])
    assert [record.dropped for record in records] == ["no reply", "", ""]
    assert "status 400: policy" in records[0].raw


def test_a_server_that_is_not_there_is_said_at_once(monkeypatch):
    openai_server.clean_environment(monkeypatch)
    settings = CriticConfig(kind="server", base_url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(ValueError, match=r"no server can be reached .*config.critic.base_url"):
        critics.check_server(settings)
    refuse = lambda *_: openai_server.Reply("bad key", status=401)  # noqa: E731
    with openai_server.serve(refuse) as server, pytest.raises(ValueError, match="OPENAI_API_KEY"):
        critics.check_server(server_settings(server))


# The command


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_every_stage_leaves_what_it_should(finished_srt):
    workdir, printed = finished_srt
    done = {path.stem for path in (workdir / "stages").glob("*.json")}
    assert done == {"data", "pretrain", "sft_policy", "critic_feedback", "srt", "self_feedback_1", "dpo_1", "evaluate"}
    first, second = (read(workdir / "feedback" / f"{s}.jsonl") for s in ("critic_feedback", "self_feedback_1"))
    assert len(first) == 48 and len(second) == 32
    assert not {r["instruction"] for r in first} & {r["instruction"] for r in second}, "prompts of their own"
    for record in first:
        assert record["critic"] == "verifier"
        long = record["dropped"] == "over the windows"  # M_base of a smoke run rambles
        assert long or (record["raw"] and record["refinement"])
    results = json.loads((workdir / "results.json").read_text())
    assert {"srt_stage1_vs_base", "srt_stage2_vs_stage1"} <= set(results["comparisons"])
    assert set(results["srt"]["counts"]) == {"critic_feedback", "self_feedback_1"}
    truth = results["srt"]["feedback"]["critic_feedback"]["truth"]
    assert (truth["found"], truth["mended"]) == (1.0, 1.0) and 0 < truth["failing"] <= 48
    assert "Win rates" in printed and (workdir / "report" / "index.html").exists()


def test_improve_and_evaluate_know_the_run(finished_srt, cache, tmp_path):
    workdir, _ = finished_srt
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "Write a slogan about chess.", "response": "Chess."}\n{"prompt": "x"}\n'
    )
    flags = f"--workdir={workdir}", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"
    result = run("-m", "pit_jax.improve", *flags, "--iterations=2", cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = read(tmp_path / "out.jsonl")
    assert first["steps"][0] == {"response": "Chess.", "read": 0, "written": 0, "scored": 0}
    assert len(first["steps"]) == len(second["steps"]) == 3 and second["steps"][0]["written"] > 0
    for step in first["steps"][1:]:
        assert step["feedback"].startswith("### Feedback") and step["read"] > 0
    wrong = run("-m", "pit_jax.improve", *flags, "--method=pit", cache=cache)
    assert wrong.returncode == 2 and "is a run of SRT, whose methods are srt" in wrong.stderr
    result = run("-m", "pit_jax.evaluate", f"--workdir={workdir}", "--tables=all", "--iterations=2", cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["iterations"]) == {"srt_stage1", "srt_stage2"} and len(results["iterations"]["srt_stage1"]) == 3
    assert "srt_stage1_vs_rerank" in results["comparisons"] and results["missing"]
    unknown = run("-m", "pit_jax.evaluate", f"--workdir={workdir}", "--tables=ratings", cache=cache)
    assert unknown.returncode == 2 and "--tables names 'ratings': use win_rates, self_scores" in unknown.stderr


def test_prompts_alone_and_a_server(finished_srt, cache, tmp_path, monkeypatch):
    """As with real instructions: no pairs, no verifier; M_base and its tokenizer are of another run."""
    openai_server.clean_environment(monkeypatch)
    prompts = [row.prompt for row in synthetic.generate(11, 0, 200)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in dict.fromkeys(prompts)))
    base = finished_srt[0] / "models" / "sft_policy"
    command = [
        "-m",
        "pit_jax.train",
        f"--config={CONFIG}",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.source=file",
    ]
    command += [f"--config.data.path={tmp_path / 'prompts.jsonl'}", f"--config.base={base}"]
    with openai_server.serve(lambda *_: feedback_lib.render(Feedback("w", "s", 5.0, "Tea is good."))) as server:
        command += ["--config.critic.kind=server", "--config.critic.model=m"]
        result = run(*command, f"--config.critic.base_url={server.base_url}", cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    root = tmp_path / "run"
    theirs, ours = (folder / "data" / "tokenizer.model" for folder in (finished_srt[0], root))
    assert theirs.read_bytes() == ours.read_bytes()
    results = json.loads((root / "results.json").read_text())
    assert set(results["comparisons"]["srt_stage1_vs_base"]) == {"self_stage1"}
    assert not any("chosen" in name for name in results["comparisons"])
    result = run("-m", "pit_jax.evaluate", f"--workdir={root}", "--tables=all", cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((root / "results.json").read_text())
    assert set(results["self_scores"]) == {"stage1", "stage2"} and "agreement" not in results["self_scores"]["stage1"]


def test_a_base_of_another_run(finished_srt, cache, tmp_path):
    """The synthetic config from the M_base of the finished run: neither pretraining nor SFT."""
    workdir, _ = finished_srt
    command = ("-m", "pit_jax.train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", "--stage=data")
    result = run(*command, f"--config.base={workdir / 'models' / 'sft_policy'}", cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    command = (*command[:-1], "--stage=sft_policy")
    result = run(*command, f"--config.base={workdir / 'models' / 'sft_policy'}", cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    digests = [read_digest(root) for root in (workdir, tmp_path / "run")]
    assert digests[0] == digests[1] and not (tmp_path / "run" / "models" / "pretrain").exists()
    result = run("-m", "pit_jax.train", "--config=configs/srt_tulu2.py:7b", f"--workdir={tmp_path / 'b'}", cache=cache)
    assert result.returncode == 2 and "holds no checkpoint of pit_jax: name a RUN/models/STAGE" in result.stderr


def read_digest(root):
    manifest = json.loads((root / "models" / "sft_policy" / "0" / "manifest.json").read_text())
    return json.dumps(manifest, sort_keys=True)


def test_a_second_start_does_nothing(finished_srt, cache):
    workdir, _ = finished_srt
    before = (workdir / "results.json").stat().st_mtime_ns
    result = run("-m", "pit_jax.train", f"--config={CONFIG}", f"--workdir={workdir}", cache=cache)
    assert result.returncode == 0 and "All stages were done before" in result.stdout
    assert (workdir / "results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learn": ("weakness",)}, "learn names 'weakness'"),
        ({"learn": ("score",)}, "must name refinement"),
        ({"without": "score"}, "set num_rounds to 0"),
        ({"without": "nothing"}, "use score, suggestions"),
        ({"arms": ("third",)}, "arms names 'third'"),
    ],
)
def test_configs_refuse(fields, message):
    with pytest.raises(ValueError, match=message):
        SrtConfig(**fields)


def test_critics_that_lack_something_are_refused():
    with pytest.raises(ValueError, match="critic.base_url"):
        CriticConfig(kind="server", model="m")
    with pytest.raises(ValueError, match="critic.workdir"):
        CriticConfig(kind="workdir")
    with pytest.raises(ValueError, match="from 0 to 1"):
        CriticConfig(error_rate=1.5)
