"""`improve` and `evaluate` as a user runs them, on a finished smoke run."""

import functools
import json
import math
import shutil

import jax
import numpy as np
import openai_server
import pytest
import test_hf_reward
from commands import run

from pit_jax import sharding
from pit_jax.data import builders, tokenizer as tokenizer_lib, verifier
from pit_jax.evaluation import hf_reward
from pit_jax.pipelines import improve, improve_file, pit
from pit_jax.pipelines.improve import StopRules
from pit_jax.types import Requirement

PROMPT = "Write a slogan about chess."


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# improve


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    lines = [
        {"prompt": PROMPT, "response": "Chess is fun."},
        {"prompt": PROMPT},
        "not json",
        {"prompt": PROMPT, "response": "chess " * 60},
        {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "Play chess!"}]},
        {"prompt": "Name <<Improved>> </script> \u2028 it.", "response": "{prompt} <<Candidate>>"},
    ]
    return write(tmp_path_factory.mktemp("answers") / "answers.jsonl", *lines)


@pytest.fixture(scope="module")
def improved(finished, cache, answers, tmp_path_factory):
    """The command's output file and what it printed."""
    output = tmp_path_factory.mktemp("improved") / "improved.jsonl"
    flags = f"--workdir={finished[0]}", f"--input={answers}", f"--output={output}", "--iterations=2"
    result = run("-m", "pit_jax.improve", *flags, cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    return output, result


def test_every_line_gets_a_line_in_its_place(improved):
    output, result = improved
    lines = read(output)
    assert [line["line"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "not JSON" in lines[2]["error"] and "line 3" in result.stderr
    assert "the response has" in lines[3]["error"] and "line 4" in result.stderr
    done = [line for line in lines if "error" not in line]
    assert len(done) == 4 and result.stdout.startswith("4 of 6 rows done; 2 could not be read")
    for line in done:
        assert line["stop"] == "iterations" and line["kept"] == 2 and len(line["steps"]) == 3
        assert line["response"] == line["steps"][2]["response"]
        assert line["tokens"] == sum(step["read"] + step["written"] + step["scored"] for step in line["steps"])
        for step in line["steps"][1:]:
            assert step["read"] > 0 and step["written"] > 0 and math.isfinite(step["gap"])
    first = lines[0]["steps"][0]
    assert first == {"response": "Chess is fun.", "read": 0, "written": 0, "scored": 0}, "the user's own took nothing"
    assert lines[1]["steps"][0]["written"] > 0, "M_P wrote it"
    assert lines[5]["prompt"] == "Name <<Improved>> </script> \u2028 it."
    assert not output.with_name("improved.jsonl.partial").exists()


def test_an_output_is_not_written_over(improved, finished, cache, answers):
    output, _ = improved
    before = output.read_bytes()
    flags = f"--workdir={finished[0]}", f"--input={answers}", f"--output={output}"
    result = run("-m", "pit_jax.improve", *flags, cache=cache)
    assert result.returncode == 2 and "is there already" in result.stderr and "Traceback" not in result.stderr
    assert output.read_bytes() == before


@pytest.fixture(scope="module")
def improver(finished):
    with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
        context = pit.open_finished(finished[0], improve.METHODS["pit"])
        yield functools.partial(improve_file.Improver, context)


def test_a_killed_run_goes_on_without_doing_rows_again(improver, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", *[{"prompt": PROMPT, "response": f"Chess\u2028{i}."} for i in range(7)], "{")
    settings = improve_file.Settings("pit", StopRules(iterations=2), 1.0, 3)
    whole = improve_file.run(improver(settings, 2), source, tmp_path / "whole.jsonl")

    output, original = tmp_path / "out.jsonl", improve_file.Improver.__call__

    def killed(self, rows):
        for i, done in enumerate(original(self, rows)):
            if i == 3:
                raise KeyboardInterrupt
            yield done

    monkeypatch.setattr(improve_file.Improver, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        improve_file.run(improver(settings, 2), source, output)
    partial = output.with_name("out.jsonl.partial")
    assert not output.exists()
    kept = read(partial)[1:]
    assert len(kept) == 4, "three rows and the broken line"
    with open(partial, "a", encoding="utf-8") as file:
        file.write('{"line": 7, "resp')  # the process was killed while it wrote

    asked = []

    def counted(self, rows):
        rows = list(rows)
        asked.extend(row.number for row in rows)
        return original(self, iter(rows))

    monkeypatch.setattr(improve_file.Improver, "__call__", counted)
    assert improve_file.run(improver(settings, 3), source, output) == whole == read(output)
    assert sorted(asked) == sorted(set(range(1, 8)) - {line["line"] for line in kept})


def test_progress_of_another_run_is_refused(improver, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", {"prompt": PROMPT, "response": "Chess."})
    output = tmp_path / "out.jsonl"
    settings = improve_file.Settings("pit", StopRules(iterations=1), 1.0, 3)
    fail = lambda self, rows: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    monkeypatch.setattr(improve_file.Improver, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        improve_file.run(improver(settings, 1), source, output)
    other = improve_file.Settings("pit", StopRules(iterations=2), 1.0, 3)
    with pytest.raises(ValueError, match=r"of a run with other settings.rules.iterations: take the same flags"):
        improve_file.run(improver(other, 1), source, output)
    write(source, {"prompt": PROMPT, "response": "Chess!"})
    with pytest.raises(ValueError, match=r"of a run with other input"):
        improve_file.run(improver(settings, 1), source, output)


@pytest.mark.parametrize("method", ["self_refine", "self_refine_one_call", "rerank"])
def test_every_method_counts_what_it_takes(improver, tmp_path, method):
    source = write(tmp_path / "in.jsonl", {"prompt": PROMPT, "response": "Chess."}, {"prompt": PROMPT})
    settings = improve_file.Settings(method, StopRules(iterations=2, identical=True), 1.0, 0)
    lines = improve_file.run(improver(settings, 2), source, tmp_path / "out.jsonl")
    e = improver(settings, 2).context.encoder
    for line in lines:
        for before, step in zip(line["steps"], line["steps"][1:], strict=False):
            y = e.tokenizer.encode(before["response"]) if line["line"] == 1 and before is line["steps"][0] else None
            if method == "self_refine_one_call" and y is not None:
                assert step["read"] == len(e.one_call_prompt(PROMPT, y))
            if method == "rerank":
                assert step["read"] == len(e.policy_prompt(PROMPT))
            assert step["written"] >= 1
    if method == "rerank":
        assert lines[0]["steps"][1]["scored"] > 0


def test_interactive(finished, cache):
    flags = f"--workdir={finished[0]}", "--interactive", "--iterations=1"
    result = run("-m", "pit_jax.improve", *flags, cache=cache, input=f"{PROMPT}\nChess is fun.\n{'x ' * 200}\n\n\n")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "0: Chess is fun." in result.stdout and "1: " in result.stdout and "* is the result" in result.stdout
    assert "the prompt has" in result.stdout, "one that is too long is named, and the next is asked for"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workdir=/nowhere", "--interactive"), "has no config.json"),
        (("--input=a.jsonl",), "name --input=FILE and --output=FILE"),
        (("--interactive", "--stop=never"), "--stop names 'never'"),
        (("--interactive", "--min_gain=1"), "--min_gain is for --stop=gap"),
        (("--interactive", "--iterations=0"), "at least 1"),
    ],
)
def test_what_improve_refuses(finished, cache, flags, message):
    workdir = () if flags[0].startswith("--workdir") else (f"--workdir={finished[0]}",)
    result = run("-m", "pit_jax.improve", *workdir, *flags, cache=cache)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


# evaluate


@pytest.fixture(scope="module")
def evaluated(finished, cache, tmp_path_factory):
    """A copy of the run with all tables, of planted answers: those of a model of a few steps meet nothing at all."""
    workdir = tmp_path_factory.mktemp("evaluated") / "smoke"
    shutil.copytree(finished[0], workdir)
    first = evaluate(workdir, cache)
    assert first.returncode == 0, first.stderr[-3000:]
    plant(workdir)
    result = evaluate(workdir, cache)
    assert result.returncode == 0, result.stderr[-3000:]
    return workdir, json.loads((workdir / "results.json").read_text()), result.stdout


def plant(workdir):
    """Replaces stored answers by y_w, y_l or a copy of the answer before; what was made of them is made again."""
    tokenizer = tokenizer_lib.load(workdir / "data" / "tokenizer.model")
    root = workdir / "evaluation" / "answers"
    planted = {}

    def texts(path):
        if path in planted:
            return planted[path]
        header, *lines = read(path)
        split = "test" if path.parent.name in ("test", "own") else "selection"
        rows = builders.read(workdir / "data", split)[: 8 if path.parent.name == "par" else 16]
        rows = [row for row in rows for _ in range(len(lines) // len(rows))]
        of = header["spec"].get("of")
        before = texts(path.with_name(f"{of}.jsonl")) if of else [row.rejected for row in rows]
        rng = np.random.default_rng(sum(path.stem.encode()))
        pick = lambda row, y: (row.chosen, row.rejected, y)[rng.choice(3, p=(0.45, 0.3, 0.25))]  # noqa: E731
        planted[path] = [pick(row, y) for row, y in zip(rows, before, strict=True)]
        return planted[path]

    for path in sorted(root.rglob("*.jsonl")):
        header, *lines = read(path)
        if header["spec"]["method"] not in ("chosen", "rejected"):
            lines = [line | {"text": y, "ids": tokenizer.encode(y)} for line, y in zip(lines, texts(path), strict=True)]
            write(path, header, *lines)
    for made in ("scores", "verdicts", "gaps", "agreement"):
        shutil.rmtree(root.parent / made)


def evaluate(workdir, cache, *flags):
    settings = "--tables=all", "--iterations=3", "--temperatures=0,0.5,1", "--shuffles=5", "--judges=verifier,r_pit"
    return run("-m", "pit_jax.evaluate", f"--workdir={workdir}", *settings, *flags, cache=cache)


def made(workdir, name, split="test"):
    """(header, lines) of a file of answers."""
    header, *lines = read(workdir / "evaluation" / "answers" / split / f"{name}.jsonl")
    return header, lines


def rows_of(workdir):
    """(prompt, requirements) of the test rows, in order."""
    return [
        (row["prompt"], tuple(Requirement(*r) for r in row["requirements"]))
        for row in read(workdir / "samples" / "test.jsonl")
    ]


def share_met(workdir, name):
    """The verifier's scores from the texts."""
    rows = rows_of(workdir)
    return np.asarray([
        np.mean(verifier.verify(requirements, line["text"]))
        for (_, requirements), line in zip(rows, made(workdir, name)[1], strict=True)
    ])  # fmt: skip


def deltas(first, second):
    return np.mean(first > second), np.mean(first < second)


def test_every_table_is_there(evaluated):
    _, results, printed = evaluated
    for key in ("comparisons", "answers", "reward_models", "gap_distributions", "ratings", "iterations", "stop_rules",
                "temperature_sweep", "rl_rewards", "kl_reward", "costs", "stages"):  # fmt: skip
        assert results[key], key
    assert "Ratings" in printed and "When to stop" in printed


def test_comparisons_and_answers_follow_from_the_files(evaluated):
    workdir, results, _ = evaluated
    names = {"rl": "original"}
    for comparison, by_judge in results["comparisons"].items():
        first, second = (names.get(name, name) for name in comparison.split("_vs_"))
        expected = deltas(share_met(workdir, first), share_met(workdir, second))
        assert (by_judge["verifier"]["win"], by_judge["verifier"]["lose"]) == pytest.approx(expected), comparison
        outcomes = outcomes_by_r_pit(workdir, first, second)
        expected = np.mean(outcomes > 0), np.mean(outcomes < 0)
        assert (by_judge["r_pit"]["win"], by_judge["r_pit"]["lose"]) == pytest.approx(expected), comparison
    original = share_met(workdir, "original")
    for name, row in results["answers"].items():
        met, (header, lines) = share_met(workdir, name), made(workdir, name)
        assert row["share_met"] == pytest.approx(met.mean())
        assert row["all_met"] == pytest.approx(np.mean(met == 1))
        assert row["tokens"] == pytest.approx(np.mean([len(line["ids"]) for line in lines]))
        failed = original < 1
        assert row["fixed"] == (pytest.approx(np.mean(met[failed] == 1)) if failed.any() else None)
        if "of" in header["spec"]:
            before = [line["text"] for line in made(workdir, header["spec"]["of"])[1]]
            before = before[1:] + before[:1] if header["spec"]["shuffled"] else before
            copied = np.mean([line["text"] == y for line, y in zip(lines, before, strict=True)])
            assert row["copy_rate"] == pytest.approx(copied)
        else:
            assert row["copy_rate"] is None
    parsed = [line.get("parsed", True) for line in made(workdir, "self_refine")[1]]
    assert results["self_refine"]["parse_rate"] == pytest.approx(np.mean(parsed))


def test_costs_follow_from_the_files(evaluated):
    workdir, results, _ = evaluated
    for name, cost in results["costs"].items():
        header, lines = made(workdir, name)
        assert (cost["answers"], cost["seconds"]) == (len(lines), header["seconds"])
        for field in ("read", "written", "scored"):
            assert cost[field] == sum(line.get(field, 0) for line in lines), (name, field)
    assert set(results["costs"]) >= {"original", "pit", "pit_t0.5", "rerank_iteration_3", "self_refine_iteration_3"}
    assert not {"chosen", "rejected"} & set(results["costs"]), "nobody wrote them"


def outcomes_by_r_pit(workdir, first, second):
    """1, 0, -1 per prompt, from the gaps in both orders; a tie where sigma of half the difference is 0.45 to 0.55."""
    path = workdir / "evaluation" / "verdicts" / "test" / "r_pit"
    sign, path = 1, path / f"{first}_vs_{second}.json"
    if not path.exists():
        sign, path = -1, path.with_name(f"{second}_vs_{first}.json")
    values = json.loads(path.read_text())["values"]
    half = sign * (np.asarray(values["gap"]) - np.asarray(values["swapped_gap"])) / 2
    share = 1 / (1 + np.exp(-half))
    return np.where(share > 0.55, 1, np.where(share < 0.45, -1, 0))


@pytest.mark.parametrize("judge", ["verifier", "r_pit"])
def test_ratings_follow_from_the_files(evaluated, judge):
    """Elo by a plain loop, one order after the other; Bradley-Terry by what holds at the most likely ratings."""
    workdir, results, _ = evaluated
    names = ["original"] + [f"{m}{i}" for m in ("pit", "self_refine") for i in ("", "_iteration_2", "_iteration_3")]
    scores = [share_met(workdir, name) for name in names]
    comparisons = []
    for i in range(len(names)):
        for j in range(i):
            by_scores = np.sign(scores[i] - scores[j]).astype(int)
            outcomes = by_scores if judge == "verifier" else outcomes_by_r_pit(workdir, names[i], names[j])
            comparisons += [(i, j, outcome) for outcome in outcomes]
    found = results["ratings"][judge]
    assert found["num_comparisons"] == len(comparisons) == 21 * len(scores[0])
    rng, ratings = np.random.default_rng(results["seed"]), []
    for _ in range(found["num_shuffles"]):
        rating = [1000.0] * len(names)
        for n in rng.permutation(len(comparisons)):
            i, j, outcome = comparisons[n]
            expected = 1 / (1 + 10 ** ((rating[j] - rating[i]) / 400))
            change = 4 * ((outcome + 1) / 2 - expected)
            rating[i], rating[j] = rating[i] + change, rating[j] - change
        ratings.append(rating)
    assert [row["name"] for row in found["elo"]] == names
    np.testing.assert_allclose([row["rating"] for row in found["elo"]], np.mean(ratings, axis=0), atol=1e-6)
    # Every player has as many wins as they expect; a tie is half of one, and every two players have tied once more.
    strength = [row["rating"] for row in found["bradley_terry"]]
    assert np.mean(strength) == pytest.approx(1000)
    won, expected = np.zeros(len(names)), np.zeros(len(names))
    ties = [(i, j, 0) for i in range(len(names)) for j in range(i)]
    for i, j, outcome in comparisons + ties:
        share = 1 / (1 + 10 ** ((strength[j] - strength[i]) / 400))
        won[i], won[j] = won[i] + (outcome + 1) / 2, won[j] + (1 - outcome) / 2
        expected[i], expected[j] = expected[i] + share, expected[j] + 1 - share
    np.testing.assert_allclose(expected, won, atol=1e-3)
    assert judge == "r_pit" or np.ptp(won) > 1, "there is something to tell apart"  # R_PIT of a few steps ties all


def test_iterations_and_stop_rules_follow_from_the_files(evaluated):
    workdir, results, _ = evaluated
    for method in ("pit", "self_refine", "rerank"):
        names = ["original", method, f"{method}_iteration_2", f"{method}_iteration_3"]
        tokens = 0.0
        for name, line in zip(names, results["iterations"][method], strict=True):
            lines = made(workdir, name)[1]
            tokens += np.mean([y["read"] + y["written"] + y.get("scored", 0) for y in lines])
            assert line["answer"] == name and line["tokens"] == pytest.approx(tokens)
            assert line["share_met"] == pytest.approx(share_met(workdir, name).mean())
        equal = [line for line in results["equal_tokens"] if line["method"] == method]
        assert [line["first"] for line in equal] == (["pit", "pit_iteration_2", "pit_iteration_3"] if equal else [])
        for line in equal:
            taken = {row["answer"]: row["tokens"] for row in results["iterations"][method]}
            within = [name for name in names if taken[name] <= line["first_tokens"]]
            assert line["second"] == within[-1]
            expected = deltas(share_met(workdir, line["first"]), share_met(workdir, line["second"]))
            summary = line["comparisons"]["verifier"]
            assert (summary["win"], summary["lose"]) == pytest.approx(expected)
        assert (method == "pit") != bool(equal)
        if method == "rerank":
            continue
        chain = [made(workdir, name)[1] for name in names]
        scores = np.stack([share_met(workdir, name) for name in names], 1)
        gains = np.stack([
            json.loads((workdir / "evaluation" / "gaps" / "test" / f"{name}.json").read_text())["values"]["gain"]
            for name in names[1:]
        ], 1)  # fmt: skip
        rules = {line["rule"]: line for line in results["stop_rules"] if line["method"] == method}
        for k in (1, 2, 3):
            assert rules[f"K = {k}"]["score"] == pytest.approx(scores[:, k].mean())
            assert rules[f"K = {k}"]["regret"] == pytest.approx((scores.max(1) - scores[:, k]).mean())
        same = np.stack([
            [a["ids"] == b["ids"] for a, b in zip(chain[k - 1], chain[k], strict=True)] for k in (1, 2, 3)
        ], 1)  # fmt: skip
        until = [next((k for k in range(3) if row[k]), 2) + 1 for row in same]
        assert rules["identical"]["iterations"] == pytest.approx(np.mean(until))
        kept = [next((k for k in range(3) if row[k] <= 0), 3) for row in gains]
        assert rules["gap above 0"]["score"] == pytest.approx(
            np.mean([s[k] for s, k in zip(scores, kept, strict=True)])
        )
        best = [int(np.argmax(np.cumsum([0.0, *row]))) for row in gains]
        assert rules["keep best"]["score"] == pytest.approx(np.mean([s[k] for s, k in zip(scores, best, strict=True)]))

        # Tokens: those of all answers that were written; R_PIT's where it is asked.
        written = np.asarray([[y["read"] + y["written"] for y in lines] for lines in chain]).T  # [prompt, y_0 .. y_3]
        read = np.stack([
            json.loads((workdir / "evaluation" / "gaps" / "test" / f"{name}.json").read_text())["values"]["scored"]
            for name in names[1:]
        ], 1)  # fmt: skip
        assert rules["K = 2"]["tokens"] == pytest.approx(written[:, :3].sum(1).mean())
        assert rules["keep best"]["tokens"] == pytest.approx((written.sum(1) + read.sum(1)).mean())
        ended = [next((k for k in range(1, 4) if row[k - 1] <= 0), 3) for row in gains]
        taken = [row[: k + 1].sum() + r[:k].sum() for row, r, k in zip(written, read, ended, strict=True)]
        assert rules["gap above 0"]["tokens"] == pytest.approx(np.mean(taken))
        assert rules["gap above 0"]["iterations"] == pytest.approx(np.mean(ended))

        # A budget of what y_0, y_1 and y_2 take in the mean: a row ends with the answer that reaches it.
        budget = round(written[:, :3].sum(1).mean())
        ended = [next((k for k in range(1, 4) if row[: k + 1].sum() >= budget), 3) for row in written]
        rule = rules[f"{budget} tokens"]
        assert rule["iterations"] == pytest.approx(np.mean(ended))
        assert rule["score"] == pytest.approx(np.mean([s[k] for s, k in zip(scores, ended, strict=True)]))

        # The threshold is that of the selection prompts; what it does is counted on the test prompts.
        rule = rules["gap, calibrated"]
        selected = np.stack([
            json.loads((workdir / "evaluation" / "gaps" / "selection" / f"{name}.json").read_text())["values"]["gain"]
            for name in names[1:]
        ], 1)  # fmt: skip
        met = np.stack([
            json.loads((workdir / "evaluation" / "scores" / "selection" / "verifier" / f"{name}.json").read_text())[
                "values"
            ]["scores"]
            for name in names
        ], 1)  # fmt: skip
        assert rule["threshold"] == pytest.approx(threshold_by_hand(selected, met))
        kept = [next((k for k in range(3) if row[k] <= rule["threshold"]), 3) for row in gains]
        assert rule["score"] == pytest.approx(np.mean([s[k] for s, k in zip(scores, kept, strict=True)]))
        assert rule["regret"] == pytest.approx(np.mean([s.max() - s[k] for s, k in zip(scores, kept, strict=True)]))


def threshold_by_hand(gains, scores):
    """The highest threshold whose loss against the best one is within its standard error."""
    stop = lambda row, t: next((k for k, gain in enumerate(row) if gain <= t), len(row))  # noqa: E731
    reached = {
        t: np.asarray([s[stop(row, t)] for row, s in zip(gains, scores, strict=True)]) for t in [0.0, *gains[gains > 0]]
    }
    best = reached[max(sorted(reached), key=lambda t: reached[t].mean())]
    error = lambda lost: lost.std(ddof=1) / len(lost) ** 0.5  # noqa: E731
    return max(t for t, x in reached.items() if (best - x).mean() <= error(best - x))


def test_the_sweep_and_the_reward_models_follow_from_the_files(evaluated):
    workdir, results, _ = evaluated
    sweep = results["temperature_sweep"]
    assert sweep["temperatures"] == [0.0, 0.5, 1.0]
    original = share_met(workdir, "original")
    for summary, suffix in zip(sweep["comparisons"]["pit_vs_original"]["verifier"], ("_t0", "_t0.5", ""), strict=True):
        expected = deltas(share_met(workdir, f"pit{suffix}"), original)
        assert (summary["win"], summary["lose"]) == pytest.approx(expected)
        assert made(workdir, f"pit{suffix}")[0]["spec"]["temperature"] == float(suffix.removeprefix("_t") or 1)
    labelled = json.loads((workdir / "evaluation" / "agreement" / "labelled.json").read_text())["values"]
    r_pit = results["reward_models"]["r_pit"]
    assert r_pit["accuracy"] == pytest.approx(np.mean(np.greater(labelled["r_pit"]["wl"], labelled["r_pit"]["lw"])))
    assert r_pit["gaps"]["chosen_rejected"] == pytest.approx(np.mean(labelled["r_pit"]["wl"]))
    right = np.greater(labelled["r_p"]["chosen"], labelled["r_p"]["rejected"])
    assert results["reward_models"]["r_p"]["accuracy"] == pytest.approx(right.mean())
    own = json.loads((workdir / "evaluation" / "agreement" / "own_rl_policy.json").read_text())
    met = np.asarray([
        np.mean(verifier.verify(requirements, line["text"]))
        for (_, requirements), line in zip(
            [row for row in rows_of(workdir) for _ in range(2)], made(workdir, "rl_policy", "own")[1], strict=True
        )
    ])  # fmt: skip
    margin = (met[::2] - met[1::2])[own["spec"]["pairs"]]
    assert np.count_nonzero(met[::2] - met[1::2]) == len(margin) == r_pit["policy_n"]
    agree = np.sign(own["values"]["r_pit"]) == np.sign(margin)
    expected = pytest.approx(agree.mean()) if len(margin) else None  # this model tells hardly any apart
    assert r_pit["policy_accuracy"] == expected
    density, edges = results["gap_distributions"]["density"], np.asarray(results["gap_distributions"]["edges"])
    for name, key in (("chosen_rejected", "wl"), ("rejected_chosen", "lw")):
        counts = np.asarray(density[name]) * np.diff(edges) * len(labelled["r_pit"][key])
        below = [np.sum(np.asarray(labelled["r_pit"][key]) < edge) for edge in edges[:-1]]
        np.testing.assert_allclose(np.cumsum(counts)[:-1], below[1:], atol=1e-6)


def test_the_curves_of_rl_follow_from_the_files(evaluated):
    workdir, results, _ = evaluated
    record = json.loads((workdir / "stages" / "rl_pit_2.json").read_text())
    steps = sorted(map(int, record["candidates"]))
    curve, rewards = results["kl_reward"]["rl_pit_2"], results["rl_rewards"]
    assert curve["steps"] == rewards["stages"]["rl_pit_2"]["steps"] == steps
    assert curve["kl"] == [record["candidates"][str(step)]["kl"] for step in steps]
    assert rewards["stages"]["rl_pit_2"]["reward"] == [record["candidates"][str(step)]["score"] for step in steps]
    assert set(rewards["stages"]) == {"rl_pit_2"}, "the first round has y_ref of the data"
    path = workdir / "evaluation" / "gaps" / "par" / "rl_policy.json"
    gaps = np.reshape(json.loads(path.read_text())["values"]["gap"], (rewards["n"], 8))
    spread = np.sqrt(gaps.var(axis=1, ddof=1).mean() / rewards["n"])
    assert rewards["similar"] == pytest.approx([gaps.mean() - 1.96 * spread, gaps.mean() + 1.96 * spread])
    training = [
        (line["step"], line["score"])
        for line in read(workdir / "metrics.jsonl")
        if line["stage"] == "rl_pit_2" and "score" in line
    ]
    found = rewards["stages"]["rl_pit_2"]
    assert list(zip(found["training_steps"], found["training_reward"], strict=True)) == training and training


def test_the_csv_files_hold_the_numbers(evaluated):
    workdir, results, _ = evaluated
    text = (workdir / "tables" / "comparisons.csv").read_text()
    assert repr(results["comparisons"]["pit_vs_original"]["verifier"]["delta"]) in text


def test_nothing_is_made_twice(evaluated, cache):
    workdir, results, _ = evaluated
    files = [path for path in (workdir / "evaluation").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    result = evaluate(workdir, cache)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (workdir / "evaluation").rglob("*") if path.is_file()} == before
    again = json.loads((workdir / "results.json").read_text())
    del again["stages"]["evaluate"], results["stages"]["evaluate"]
    assert again == results


def test_a_table_by_itself_uses_the_same_answers(evaluated, cache, tmp_path):
    """Whichever table asks first for a set of answers, it is made in the same way."""
    workdir = tmp_path / "smoke"
    shutil.copytree(evaluated[0], workdir)
    answers = {path: path.read_bytes() for path in (workdir / "evaluation" / "answers").rglob("*.jsonl")}
    before = json.loads((workdir / "results.json").read_text())
    result = evaluate(workdir, cache, "--tables=temperatures,ratings")
    assert result.returncode == 0, result.stderr[-3000:]
    after = json.loads((workdir / "results.json").read_text())
    for results in (before, after):
        del results["stages"]["evaluate"], results["commands"]
    assert after == before, "tables that are not asked for stay as they are"
    assert (workdir / "tables" / "stop_rules.csv").exists() and len(list((workdir / "report").glob("*.svg"))) > 4
    assert {path: path.read_bytes() for path in (workdir / "evaluation" / "answers").rglob("*.jsonl")} == answers


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tables=best",), "--tables names 'best'"),
        (("--judges=me",), "--judges names 'me'"),
        (("--temperatures=warm",), "numbers with commas"),
        (("--temperatures=-1",), "not below 0"),
        (("--reward_model=/nowhere/at/all",), "/nowhere/at/all"),
    ],
)
def test_what_evaluate_refuses(evaluated, cache, flags, message):
    workdir, _, _ = evaluated
    result = run("-m", "pit_jax.evaluate", f"--workdir={workdir}", "--tables=win_rates", *flags, cache=cache)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


# Judges of others


def test_a_language_model_and_people_judge(evaluated, cache, tmp_path, monkeypatch):
    """A judge that likes the longer answer, on a server that fails now and then; two annotators who differ once."""
    workdir = tmp_path / "smoke"
    shutil.copytree(evaluated[0], workdir)
    openai_server.clean_environment(monkeypatch)

    def script(messages, attempt):
        if attempt == 0 and len(messages[-1]["content"]) % 3 == 0:
            return openai_server.Reply("busy", status=503)
        text = messages[-1]["content"]
        sides = [text.split(f"Start of Assistant {side}'s Answer--")[1].split("--The End")[0] for side in "AB"]
        lengths = [len(side.strip()) for side in sides]
        return "I cannot tell." if sum(lengths) % 5 == 0 else f"[[{'AB'[lengths[1] > lengths[0]]}]]"

    with openai_server.serve(script) as server:
        flags = ("--llm_model=m", f"--llm_base_url={server.base_url}", "--llm_prompts=10", "--sheet=pit_vs_self_refine")
        more = ("--sheet_size=6", "--llm_comparisons=pit_vs_original,chosen_vs_rejected")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-a-secret")
        result = evaluate(workdir, cache, *flags, *more)
        assert result.returncode == 0, result.stderr[-3000:]
        calls = len(server.bodies)
        assert calls > 20
        assert server.headers[0]["authorization"] == "Bearer sk-a-secret"
    results = json.loads((workdir / "results.json").read_text())
    summary, asked = results["comparisons"]["pit_vs_original"]["llm"], 10
    length = lambda name, i: len(made(workdir, name)[1][i]["text"].strip())  # noqa: E731
    pairs = [(length("pit", i), length("original", i)) for i in range(asked)]
    lacking = sum((a + b) % 5 == 0 for a, b in pairs)
    assert (summary["n"], summary.get("no_verdict", 0)) == (asked - lacking, lacking)
    wins = sum(a > b and (a + b) % 5 > 0 for a, b in pairs)
    assert summary["win"] == pytest.approx(wins / summary["n"])
    assert set(results["comparisons"]["pit_vs_self_refine"]) == {"verifier", "r_pit"}, "not asked about"
    assert results["reward_models"]["llm"]["n"] + results["reward_models"]["llm"]["no_verdict"] == asked
    assert results["judge_costs"]["llm"]["n"] == 2 * asked and results["judge_costs"]["llm"]["failed_requests"] == 0
    for path in workdir.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".html", ".txt", ".csv"):
            assert "sk-a-secret" not in path.read_text(encoding="utf-8"), path

    kept = json.loads((workdir / "evaluation" / "human" / "pit_vs_self_refine.json").read_text())
    assert (workdir / "sheets" / "pit_vs_self_refine.html").exists() and len(kept["prompts"]) == 6
    saved = []
    for annotator, differs in (("../ann", False), ("bob", True)):
        verdicts = []
        for item, side in kept["key"]["items"].items():
            wrong = differs and side["pair"] == 0  # all say that the first is better, but for one item
            side = {"A": "B", "B": "A"}[side["first"]] if wrong else side["first"]
            verdicts.append({"item": item, "verdict": side})
        saved.append(write(tmp_path / f"{len(saved)}.json", {
            "sheet": kept["key"]["sheet"], "annotator": annotator, "verdicts": verdicts,
        }))  # fmt: skip
    result = evaluate(workdir, cache, f"--verdicts={saved[0]},{saved[1]}")
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((workdir / "results.json").read_text())["comparisons"]["pit_vs_self_refine"]["human"]
    assert (summary["win"], summary["tie"], summary["n"]) == (pytest.approx(5 / 6), pytest.approx(1 / 6), 6)
    assert sorted(path.name for path in tmp_path.rglob("*ann*")) == [], "a name does not become a path"
    refused = evaluate(workdir, cache, f"--verdicts={write(tmp_path / 'other.json', {'sheet': 'x'})}")
    assert refused.returncode == 2 and "none of the sheets" in refused.stderr


def test_a_reward_model_of_hugging_face_judges(evaluated, cache, tmp_path):
    for library in ("torch", "transformers"):
        pytest.importorskip(library, reason="needs pip install -e '.[parity]'")
    workdir = tmp_path / "smoke"
    shutil.copytree(evaluated[0], workdir)
    folder = test_hf_reward.make_deberta(tmp_path / "tiny-deberta", 1024)
    result = evaluate(workdir, cache, f"--reward_model={folder}")
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((workdir / "results.json").read_text())
    assert results["comparisons"]["pit_vs_original"]["hf_tiny-deberta"]["n"] == 16
    assert results["reward_models"]["hf_tiny-deberta"]["n"] == 16
    scores = json.loads((workdir / "evaluation" / "scores" / "test" / "hf_tiny-deberta" / "pit.json").read_text())
    loaded = hf_reward.load(folder)
    prompts = [prompt.strip() for prompt, _ in rows_of(workdir)]
    expected = hf_reward.score(loaded, prompts, [line["text"] for line in made(workdir, "pit")[1]])
    np.testing.assert_allclose(scores["values"]["scores"], expected, atol=1e-5)
