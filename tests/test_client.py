"""The client against real HTTP on loopback: many at a time, retries, the disk cache, errors that end a run."""

import asyncio
import collections
import fcntl
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from openai_server import COMPLETION_TOKENS, PROMPT_TOKENS, Reply, clean_environment, serve

pytest.importorskip("openai", reason="openai is not installed (extra: critic)")

from pit_jax import client
from pit_jax.client import ApiError, ClientConfig, Completion, complete

ROOT = Path(__file__).parents[1]
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    clean_environment(monkeypatch)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def echo(messages, attempt):
    return messages[-1]["content"].upper()


def numbers(n: int) -> list[list[dict[str, str]]]:
    return [chat(f"q{i}") for i in range(n)]


def texts(completions: list[Completion]) -> list[str | None]:
    return [c.text for c in completions]


def test_request_and_reply(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "naïve \u2028 {x} 😀"}]
    with serve(lambda m, _: Reply("cut", finish_reason="length")) as server:
        config = ClientConfig(server.base_url, "m", temperature=0.5, max_tokens=9, seed=3, extra='{"top_p": 0.25}')
        completions, usage = complete(config, [messages])
    sent = {"model": "m", "messages": messages, "temperature": 0.5, "max_tokens": 9, "seed": 3, "top_p": 0.25}
    assert server.bodies == [sent]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert completions == [Completion("cut", "", "length", PROMPT_TOKENS, COMPLETION_TOKENS, cached=False)]
    assert usage == (1, 0, 0, 0, PROMPT_TOKENS, COMPLETION_TOKENS, 0, 0)


def test_fields_that_are_none_are_not_sent():
    with serve(echo) as server:
        complete(ClientConfig(server.base_url, "m", temperature=None, max_tokens=None), [chat("a")])
    assert server.bodies[0].keys() == {"model", "messages"}


def test_the_key_of_another_server_is_not_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(echo) as server:
        complete(ClientConfig(server.base_url, "m", api_key_env="JUDGE_KEY"), [chat("a")])
        monkeypatch.setenv("JUDGE_KEY", "other\n")
        complete(ClientConfig(server.base_url, "m", api_key_env="JUDGE_KEY"), [chat("a")])
    assert [h["authorization"] for h in server.headers] == ["Bearer none", "Bearer other"]


def test_no_requests():
    completions, usage = complete(ClientConfig("http://127.0.0.1:9/v1", "m"), [])
    assert completions == [] and not any(usage)


def test_order_duplicates_and_random_delays():
    rng = random.Random(0)
    delays = collections.defaultdict(lambda: rng.uniform(0, 0.05))

    def script(messages, attempt):
        time.sleep(delays[messages[-1]["content"]])
        return echo(messages, attempt)

    asked = numbers(60) + numbers(60)[::-1] + [chat("q7")]
    with serve(script) as server:
        completions, usage = complete(ClientConfig(server.base_url, "m"), asked)
    assert texts(completions) == [m[-1]["content"].upper() for m in asked]
    assert server.asked() == {f"q{i}": 1 for i in range(60)}
    assert (usage.calls, usage.prompt_tokens, usage.completion_tokens) == (
        60,
        60 * PROMPT_TOKENS,
        60 * COMPLETION_TOKENS,
    )


@pytest.mark.parametrize("limit", [1, 32])
def test_in_flight(limit):
    # Nobody is answered before `limit` requests are there; then, for a while, more would come in if they could.
    full = threading.Event()
    lock, present = threading.Lock(), 0

    def script(messages, attempt):
        nonlocal present
        with lock:
            present += 1
            if present == limit:
                full.set()
        assert full.wait(10)
        time.sleep(0.02)
        return echo(messages, attempt)

    with serve(script) as server:
        completions, _ = complete(ClientConfig(server.base_url, "m", max_in_flight=limit), numbers(3 * limit))
    assert server.most_in_flight == limit
    assert texts(completions) == [f"Q{i}" for i in range(3 * limit)]


FAULTS = [
    Reply("boom", status=500),
    Reply("slow down", status=429, headers={"Retry-After": "0"}),
    Reply(kind="drop"),
    Reply(kind="half"),
    Reply(kind="hang"),
]


def test_failures_change_no_result_and_lose_none(tmp_path):
    rng, lock = random.Random(1), threading.Lock()
    num_faults = collections.Counter()

    def script(messages, attempt):
        with lock:
            fault = rng.choice(FAULTS) if rng.random() < 0.3 and attempt < 4 else None
            num_faults[fault and (fault.kind, fault.status)] += 1
        return fault or echo(messages, attempt)

    with serve(script) as server:
        config = ClientConfig(server.base_url, "m", timeout_s=0.4, cache=str(tmp_path))
        completions, usage = complete(config, numbers(100))
        assert texts(completions) == [f"Q{i}" for i in range(100)]
        num_requests = len(server.bodies)
        again, rerun = complete(config, numbers(100))
        assert len(server.bodies) == num_requests
    assert len(num_faults) == 1 + len(FAULTS) and num_requests - num_faults[None] >= 25, num_faults
    assert (usage.calls, usage.cached, usage.failed, usage.retries) == (100, 0, 0, num_requests - 100)
    assert [c._replace(cached=False) for c in again] == completions
    assert rerun == (0, 100, 0, 0, *2 * (100 * PROMPT_TOKENS, 100 * COMPLETION_TOKENS))


def test_a_request_that_fails_for_good_hinders_no_other(tmp_path):
    def script(messages, attempt):
        return Reply("too\nbusy", status=503) if messages[-1]["content"] == "q1" else echo(messages, attempt)

    with serve(script) as server:
        config = ClientConfig(server.base_url, "m", num_retries=2, cache=str(tmp_path))
        completions, usage = complete(config, numbers(3))
        assert texts(completions) == ["Q0", None, "Q2"]
        assert completions[1].error == "status 503: too busy"
        assert server.asked() == {"q0": 1, "q1": 3, "q2": 1}  # once and two retries
        assert (usage.calls, usage.cached, usage.failed, usage.retries) == (2, 0, 1, 2)
        _, usage = complete(config, numbers(3))  # a failure is not cached
        assert (usage.calls, usage.cached, usage.failed, usage.retries) == (0, 2, 1, 2)
        assert server.asked()["q1"] == 6


def test_waits_between_retries():
    arrivals = []

    def script(messages, attempt):
        arrivals.append(time.monotonic())
        return Reply("", status=429, headers={"Retry-After": "1"} if attempt == 0 else {}) if attempt < 2 else "ok"

    with serve(script) as server:
        completions, _ = complete(ClientConfig(server.base_url, "m"), [chat("a")])
    assert texts(completions) == ["ok"]
    first, second = arrivals[1] - arrivals[0], arrivals[2] - arrivals[1]
    assert 1.0 <= first < 5  # as the server asks
    assert 0.75 <= second < 5  # the second wait of the client's own: 1 s less up to a quarter


def test_a_wait_of_an_hour_is_a_failure():
    start = time.monotonic()
    with serve(lambda *_: Reply("daily limit", status=429, headers={"Retry-After": "3600"})) as server:
        completions, usage = complete(ClientConfig(server.base_url, "m"), [chat("a")])
    assert completions[0].error == "status 429: daily limit"
    assert usage.retries == 0 and time.monotonic() - start < 5


def test_a_server_that_is_gone_is_not_asked_for_ever(monkeypatch):
    monkeypatch.setattr(client, "GIVE_UP_AFTER", 5)
    with serve(lambda *_: Reply(kind="drop")) as server:
        config = ClientConfig(server.base_url, "m", num_retries=0, max_in_flight=2)
        completions, usage = complete(config, numbers(40))
    errors = [c.error for c in completions]
    assert usage.failed == 40 and usage.calls == 0
    assert errors[0].startswith(f"{config.base_url}: Connection error. (")
    assert sum("requests in a row had failed" in e for e in errors) in (34, 35)  # one was still in flight


def test_a_server_that_is_not_there_is_said_at_once(tmp_path):
    with serve(echo) as server:
        config = ClientConfig(server.base_url, "m", num_retries=6, cache=str(tmp_path))
        complete(config, numbers(2))
    started = time.perf_counter()
    with pytest.raises(ApiError, match=r"no server can be reached at http://127.0.0.1:\d+/v1 .*refused"):
        complete(config, numbers(40))  # nobody listens there any more
    assert time.perf_counter() - started < 5, "there are no retries to wait for"
    assert complete(config, numbers(2))[1].cached == 2, "what is on disk needs no server"


@pytest.mark.parametrize("body", ["<html>hello</html>", "{}", '{"choices": []}', '{"choices": [', "[1]", "null"])
def test_a_reply_that_is_no_completion(body, tmp_path):
    with serve(lambda *_: Reply(body=body)) as server:
        completions, usage = complete(ClientConfig(server.base_url, "m", cache=str(tmp_path)), [chat("a")])
    assert completions[0].text is None and "the reply" in completions[0].error
    assert usage.failed == 1 and not list(tmp_path.iterdir())


def test_a_reply_without_usage_or_content():
    body = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]})
    with serve(lambda *_: Reply(body=body)) as server:
        completions, _ = complete(ClientConfig(server.base_url, "m"), [chat("a")])
    assert completions == [Completion("", "", "", 0, 0)]


def test_a_reply_with_half_a_surrogate_pair(tmp_path):
    with serve(lambda *_: "a\ud83d") as server:
        config = ClientConfig(server.base_url, "m", cache=str(tmp_path))
        first, _ = complete(config, [chat("a")])
        second, _ = complete(config, [chat("a")])
    assert texts(first) == texts(second) == ["a?"]


@pytest.mark.parametrize(
    "status, remedy",
    [
        (401, "environment variable JUDGE_KEY, which does not suit it"),
        (403, "environment variable JUDGE_KEY"),
        (404, "Is the model's name right"),
    ],
)
def test_refusals_end_the_run_at_once(status, remedy, monkeypatch, tmp_path, caplog, capfd):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def script(messages, attempt):
        if messages[-1]["content"] == "q0":
            return echo(messages, attempt)
        return Reply(f"You sent \n{KEY}, you may not", status=status)

    with serve(script) as server:
        config = ClientConfig(
            server.base_url, "big-judge", api_key_env="JUDGE_KEY", max_in_flight=1, cache=str(tmp_path)
        )
        with pytest.raises(ApiError) as error:
            complete(config, numbers(500))
        assert len(server.bodies) == 2
    message = str(error.value)
    expected = f"{server.base_url} refuses model 'big-judge' with status {status}: You sent ***, you may not. "
    assert message.startswith(expected.removesuffix(". ")) and remedy in message
    assert f"1 finished calls are kept in {tmp_path / 'calls.jsonl'}" in message
    cached = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "Q0" in cached
    for text in (message, cached, caplog.text, *capfd.readouterr(), repr(config), repr(error.value.__cause__)):
        assert KEY not in text and "secret" not in text
    assert "POST" in caplog.text  # so the log above is one that could have shown the key


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_server_that_refuses_every_request_ends_the_run(status):
    """It is the settings, then: a few requests show it."""
    with serve(lambda *_: Reply("no", status=status)) as server:
        with pytest.raises(ApiError, match=f"status {status}: no. .*needs None there"):
            complete(ClientConfig(server.base_url, "m", max_in_flight=1), numbers(500))
        assert len(server.bodies) == client.NUM_REFUSED
        with pytest.raises(ApiError, match=f"status {status}"):
            complete(ClientConfig(server.base_url, "m", max_in_flight=32), numbers(3))


@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_request_that_is_refused_hinders_no_other(tmp_path, in_flight):
    """As by a content policy: it has failed, and is asked again by the next run, where the cache holds the others."""

    def script(messages, attempt):
        blocked = messages[-1]["content"] in ("q0", "q7")
        return Reply("content policy", status=400) if blocked else echo(messages, attempt)

    with serve(script) as server:
        config = ClientConfig(server.base_url, "m", max_in_flight=in_flight, cache=str(tmp_path))
        completions, usage = complete(config, numbers(20))
        assert [i for i, c in enumerate(completions) if c.text is None] == [0, 7]
        assert "status 400: content policy" in completions[7].error and (usage.calls, usage.failed) == (18, 2)
        again, usage = complete(config, numbers(20))
        assert [i for i, c in enumerate(again) if c.text is None] == [0, 7] and usage.cached == 18
        assert len(server.bodies) == 22


def test_a_missing_key_is_named():
    with (
        serve(lambda *_: Reply("no key", status=401)) as server,
        pytest.raises(ApiError, match="JUDGE_KEY, which is not"),
    ):
        complete(ClientConfig(server.base_url, "m", api_key_env="JUDGE_KEY"), numbers(50))


def test_an_empty_account_ends_the_run():
    body = json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
    with serve(lambda *_: Reply(body=body, status=429)) as server, pytest.raises(ApiError, match="no credit"):
        complete(ClientConfig(server.base_url, "m", num_retries=0), numbers(50))


def test_the_error_of_another_kind_of_server():
    reply = Reply(body='{"detail": "no such model"}', status=404)
    with serve(lambda *_: reply) as server, pytest.raises(ApiError, match="status 404: no such model"):
        complete(ClientConfig(server.base_url, "m"), numbers(1))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"base_url": f"http://user:{KEY}@host/v1"}, "without user, password"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "without user, password"),
        ({"base_url": "localhost:8000/v1"}, "must be an address"),
        ({"base_url": "http://host:port/v1"}, "must be an address"),
        ({"base_url": ""}, "must be an address"),
        ({"model": ""}, "model is empty"),
        ({"max_in_flight": 0}, "max_in_flight=0 must be at least 1"),
        ({"num_retries": -1}, "num_retries=-1"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"extra": "{"}, "must be a JSON object"),
        ({"extra": "[]"}, "must be a JSON object"),
        ({"extra": '{"seed": 1}'}, "seed are not among them"),
        ({"extra": '{"n": 2}'}, "model, messages, n"),
    ],
)
def test_wrong_configs(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        ClientConfig(**({"base_url": "http://host/v1", "model": "m"} | fields))
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "messages", ["text", [], ["text"], [{"role": "user"}], [{"role": "user", "content": None}], chat("\ud83d")]
)
def test_wrong_requests_are_found_before_any_is_asked(messages):
    with serve(echo) as server, pytest.raises(ValueError, match=r"requests\[2\]"):
        complete(ClientConfig(server.base_url, "m"), [*numbers(2), messages])
    assert not server.bodies


def test_a_wrong_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nÜ")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters") as error:
        complete(ClientConfig("http://127.0.0.1:9/v1", "m"), numbers(1))
    assert KEY not in str(error.value)


def test_what_the_cache_keys_on(tmp_path):
    base = {"model": "m", "cache": str(tmp_path)}
    with serve(echo) as server, serve(echo) as other:

        def calls(url=server.base_url, text="a", **fields):
            return complete(ClientConfig(url, **(base | fields)), [chat(text)])[1].calls

        assert calls() == 1
        for fields in [
            dict(model="n"),
            dict(temperature=1.0),
            dict(max_tokens=5),
            dict(seed=0),
            dict(extra='{"a": 1}'),
        ]:
            assert calls(**fields) == 1, fields
            assert calls(**fields) == 0, fields
        assert calls(text="b") == 1
        assert calls(other.base_url) == 1  # the same name may be another model there
        assert calls(timeout_s=9.0, num_retries=1, max_in_flight=2, api_key_env="X") == 0
        assert calls(server.base_url + "/") == 0
        assert calls(server_name="ours") == 1 and calls(other.base_url, server_name="ours") == 0
    names = [json.loads(line)["server"] for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert names == [server.base_url] * 7 + [other.base_url, "ours"]


def test_the_cache_is_readable_and_needs_no_openai(tmp_path, monkeypatch):
    with serve(lambda *_: "naïve \u2028 line\n😀") as server:
        config = ClientConfig(server.base_url, "m", cache=str(tmp_path))
        complete(config, [chat("é")])
    line = (tmp_path / "calls.jsonl").read_bytes()
    assert line.count(b"\n") == 1 and "naïve" in line.decode() and "é" in line.decode()
    row = json.loads(line)
    del row["key"]
    assert row == {
        "server": server.base_url,
        "request": {"model": "m", "messages": chat("é"), "temperature": 0.0, "max_tokens": 1024},
        "text": "naïve \u2028 line\n😀",
        "finish_reason": "stop",
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS,
    }
    monkeypatch.setitem(sys.modules, "openai", None)
    assert texts(complete(config, [chat("é")])[0]) == ["naïve \u2028 line\n😀"]
    with pytest.raises(ImportError, match=r"pip install -e '\.\[critic\]'"):
        complete(config, [chat("new")])


def test_torn_and_broken_lines(tmp_path):
    path = tmp_path / "calls.jsonl"
    with serve(echo) as server:
        config = ClientConfig(server.base_url, "m", cache=str(tmp_path), max_in_flight=1)
        complete(config, numbers(3))
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        for cut in (1, len(lines[2]) // 2, len(lines[2]) - 2):  # a killed process left the beginning of the last line
            path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
            assert complete(config, numbers(3))[1][:2] == (1, 2)
            assert path.read_bytes() == whole
        path.write_bytes(whole[:-1])  # only the line feed is missing
        assert complete(config, numbers(4))[1][:2] == (1, 3)
        assert path.read_bytes().startswith(whole) and len(client.read_cache(path)) == 4
        for bad in (b"{\n", b"[]\n", b'{"key": "k", "text": null}\n', b"\xff\n", lines[0][:30] + b"\n"):
            path.write_bytes(lines[0] + bad + lines[1])
            with pytest.raises(ValueError, match=r"calls\.jsonl, line 2: not a call of this cache\. Delete the line"):
                complete(config, numbers(3))
            assert path.read_bytes() == lines[0] + bad + lines[1]
        twice = json.dumps(json.loads(lines[0]) | {"text": "later"}).encode() + b"\n"
        path.write_bytes(lines[0] + twice)
        assert texts(complete(config, numbers(1))[0]) == ["Q0"]


CALL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job that a shell puts into the background ignores it
from pit_jax.client import ClientConfig, complete
url, cache, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
requests = [[{"role": "user", "content": f"q{i}"}] for i in range(first, last)]
complete(ClientConfig(url, "m", cache=cache, max_in_flight=4), requests)
"""


def start(server, cache, first: int, last: int) -> subprocess.Popen:
    command = [sys.executable, "-c", CALL, server.base_url, str(cache), str(first), str(last)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on(tmp_path, how):
    enough, go_on = threading.Event(), threading.Event()

    def script(messages, attempt):
        number = int(messages[-1]["content"][1:])
        if number >= 12 and not go_on.is_set():
            enough.set()
            go_on.wait(90)
        return echo(messages, attempt)

    with serve(script) as server:
        process = start(server, tmp_path, 0, 30)
        assert enough.wait(60)
        process.send_signal(how)
        assert process.wait(60) == -how, process.communicate()
        process.communicate()
        go_on.set()
        kept = len(client.read_cache(tmp_path / "calls.jsonl"))
        assert 9 <= kept <= 12  # at most three of the first twelve were still in flight
        before = server.asked()
        completions, usage = complete(ClientConfig(server.base_url, "m", cache=str(tmp_path)), numbers(30))
        asked_again = server.asked() - before
    assert texts(completions) == [f"Q{i}" for i in range(30)]
    assert (usage.calls, usage.cached) == (30 - kept, kept)
    assert sum(asked_again.values()) == 30 - kept and set(asked_again.values()) == {1}


def test_two_processes_share_a_cache(tmp_path):
    with serve(lambda messages, _: messages[-1]["content"] * 20_000) as server:  # lines longer than any buffer
        processes = [start(server, tmp_path, first, first + 60) for first in (0, 30)]
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        completions, usage = complete(ClientConfig(server.base_url, "m", cache=str(tmp_path)), numbers(90))
    assert usage.calls == 0
    assert texts(completions) == [f"q{i}" * 20_000 for i in range(90)]


def test_a_line_that_another_process_is_writing_is_not_cut_off(tmp_path):
    path = tmp_path / "calls.jsonl"
    with serve(echo) as server:
        complete(ClientConfig(server.base_url, "m", cache=str(tmp_path)), [chat("other")])
    line = path.read_bytes()
    path.write_bytes(b"")

    def script(messages, attempt):
        file = open(path, "ab", buffering=0)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line[:40])
        threading.Timer(0.3, lambda: (file.write(line[40:]), file.close())).start()
        return echo(messages, attempt)

    with serve(script) as server:
        complete(ClientConfig(server.base_url, "m", cache=str(tmp_path)), [chat("mine")])
    assert path.read_bytes().startswith(line)
    assert [call.text for call in client.read_cache(path).values()] == ["OTHER", "MINE"]


def test_in_a_notebook():
    async def cell(config):  # as a notebook runs one: in an event loop
        return complete(config, numbers(2))

    with serve(echo) as server:
        completions, _ = asyncio.run(cell(ClientConfig(server.base_url, "m")))
    assert texts(completions) == ["Q0", "Q1"]
