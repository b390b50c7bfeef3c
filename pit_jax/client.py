"""Chat completions of an OpenAI-compatible server: many at a time, retried, and kept on disk: none is paid twice.

    completions, usage = complete(ClientConfig("http://localhost:8000/v1", "my-model", cache="runs/judge"), requests)

The cache is one file of JSON lines, `calls.jsonl` in the folder `cache`: the request, the reply and its tokens. A call
is written as soon as it has finished, so a killed run goes on where it was. Several processes may share a cache. It
holds what was asked and answered, never the API key.
"""

import asyncio
import dataclasses
import fcntl
import hashlib
import json
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

Messages = Sequence[Mapping[str, str]]
"""A chat: {"role": "system", "user" or "assistant", "content": text} in order."""

RETRIED_STATUS = (408, 409, 429)
"""With 5xx, the refusals that may pass."""

REFUSED_REQUEST = (400, 413, 422)
"""The status of a request that the server does not take as it is, such as one that its content policy blocks."""

NUM_REFUSED = 8
"""Where so many are refused and none is answered, it is the settings that the server refuses."""

GIVE_UP_AFTER = 64
"""Requests in a row that failed after all their retries: then the server is gone, and the rest is not asked."""


class ApiError(ValueError):
    """The server refuses the request for a reason that does not pass: key, model, address or settings."""


class _RefusedRequest(ApiError):
    """The reason may lie in the request alone."""


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    """A server, a model and how to ask it.

    Attributes:
      base_url: address of the API, such as https://api.openai.com/v1 or http://localhost:8000/v1.
      model: its name on that server.
      temperature: 0 for greedy decoding; None leaves the field out, for models that refuse it.
      max_tokens: longest reply; None leaves the field out.
      seed: of sampling, where the server knows it; None leaves the field out. Each seed has its own replies in the
        cache, so several samples of the same messages are several seeds.
      extra: a JSON object of further request fields, such as '{"top_p": 0.9}' or '{"max_completion_tokens": 900}'.
      max_in_flight: requests at a time.
      num_retries: of a request that failed by connection, timeout or status 408, 409, 429 and 5xx. Waits double from
        half a second to 8 seconds, with jitter. A server that asks for a wait of up to 2 minutes (Retry-After) gets
        it; one that asks for more has failed.
      timeout_s: seconds without a byte from the server after which a request is asked again.
      cache: folder of the disk cache; empty: none.
      server_name: what the cache calls the server; empty: base_url. The same name on another server may be another
        model, so the server belongs to the key of a call. A name keeps the cache of a server whose address changes.
      api_key_env: name of the environment variable with the API key. A server that needs none gets none.
    """

    base_url: str
    model: str
    temperature: float | None = 0.0
    max_tokens: int | None = 1024
    seed: int | None = None
    extra: str = ""
    max_in_flight: int = 32
    num_retries: int = 6
    timeout_s: float = 120.0
    cache: str = ""
    server_name: str = ""
    api_key_env: str = "OPENAI_API_KEY"

    def __post_init__(self):
        try:
            url = urllib.parse.urlsplit(self.base_url)
            _ = url.port  # raises where it is not a number
            plain = url.scheme in ("http", "https") and url.hostname and "@" not in url.netloc and not url.query
        except ValueError:
            plain = False
        if not plain:  # the address itself is not shown: it may hold a password
            raise ValueError(
                "base_url must be an address such as https://host/v1, without user, password and ?query: it is written "
                f"into caches and logs. A key belongs into the environment variable {self.api_key_env}."
            )
        if not self.model:
            raise ValueError("model is empty: name a model of the server, see `curl BASE_URL/models`.")
        if self.max_in_flight < 1 or self.num_retries < 0 or self.timeout_s <= 0:
            raise ValueError(
                f"max_in_flight={self.max_in_flight} must be at least 1, num_retries={self.num_retries} at least 0 and "
                f"timeout_s={self.timeout_s} above 0."
            )
        _sampling(self)


class Completion(NamedTuple):
    """The reply to a request, or why there is none.

    Attributes:
      text: the reply; None where the request failed.
      error: why it failed, after all retries; empty where it did not.
      finish_reason: "stop", or "length" where the reply was cut at max_tokens, or what else the server says.
      prompt_tokens: as the server counts them; 0 where it does not.
      completion_tokens: the same.
      cached: whether it comes from the disk cache.
    """

    text: str | None
    error: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


class Usage(NamedTuple):
    """Sums over the distinct requests of a call of `complete`: calls + cached + failed of them.

    Attributes:
      calls: requests that the server answered now.
      cached: requests that the cache answered.
      failed: requests without an answer.
      retries: HTTP requests beyond the first of each request.
      prompt_tokens: of all answers, cached or not, so that a rerun says the same.
      completion_tokens: the same.
      cached_prompt_tokens: the part that cost nothing now.
      cached_completion_tokens: the same.
    """

    calls: int
    cached: int
    failed: int
    retries: int
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    cached_completion_tokens: int


def complete(
    config: ClientConfig, requests: Sequence[Messages], *, description: str = "", leave: bool = True
) -> tuple[list[Completion], Usage]:
    """Asks all requests and returns the replies in their order.

    Equal requests are asked once. A request that fails after all retries becomes a Completion with `error`, is not
    cached and hinders no other. On a terminal a progress bar is shown.

    Args:
      config: the server, the model and how to ask it.
      requests: [n] chats.
      description: the name beside the progress bar; by default the model's.
      leave: False: a bar that is full makes room for the next, which then stands in the same line.

    Returns:
      [n] completions, and what they took.

    Raises:
      ValueError: where a request is no chat, or the cache has a line that is not JSON.
      ApiError: where the server refuses a request for a reason that does not pass (status 401, 404 and the like), or
        refuses all with status 400, 413 or 422, which it may give to single requests too: these have failed. Nothing
        more is asked; calls that had finished are in the cache.
      ImportError: where openai is not installed and the cache does not hold all replies.
    """
    bodies = [_body(config, messages, i) for i, messages in enumerate(requests)]
    keys = [_key(config, body) for body in bodies]
    distinct = dict(zip(keys, bodies, strict=True))
    path = Path(config.cache) / "calls.jsonl" if config.cache else None
    kept = read_cache(path) if path else {}
    found = {key: kept[key] for key in distinct if key in kept}
    todo = {key: body for key, body in distinct.items() if key not in kept}
    retries = 0
    if todo:
        replies, retries = _ask_all(config, todo, path, description or config.model, bool(kept), leave)
        found |= replies
    completions = found.values()
    cached = [c for c in completions if c.cached]
    usage = Usage(
        calls=sum(c.text is not None and not c.cached for c in completions),
        cached=len(cached),
        failed=sum(c.text is None for c in completions),
        retries=retries,
        prompt_tokens=sum(c.prompt_tokens for c in completions),
        completion_tokens=sum(c.completion_tokens for c in completions),
        cached_prompt_tokens=sum(c.prompt_tokens for c in cached),
        cached_completion_tokens=sum(c.completion_tokens for c in cached),
    )
    return [found[key] for key in keys], usage


def read_cache(path: Path | str) -> dict[str, Completion]:
    """The calls of a cache file by key; none where there is no file.

    The last line may be torn, by a process that was killed while it wrote: it is left out, and cut off by the next call
    that is written. Where a key stands twice (two processes asked at the same time) the first line counts.

    Raises:
      ValueError: where another line is not a call.
    """
    path = Path(path)
    if not path.exists():
        return {}
    calls: dict[str, Completion] = {}
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # until the file is closed
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        call = _parse(line)
        if call is not None:
            calls.setdefault(*call)
        elif number < len(lines):
            raise ValueError(
                f"{path}, line {number}: not a call of this cache. Delete the line, so that its request is asked "
                "again, or take another cache folder."
            )
    return calls


def _sampling(config: ClientConfig) -> dict[str, Any]:
    """The fields of a request beside model and messages."""
    fields = {"temperature": config.temperature, "max_tokens": config.max_tokens, "seed": config.seed}
    try:
        extra = json.loads(config.extra or "{}")
        valid = isinstance(extra, dict) and not extra.keys() & {"model", "messages", "stream", "n", *fields}
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(
            f"extra={config.extra!r} must be a JSON object of further request fields, such as "
            "'{\"top_p\": 0.9}'; model, messages, n, stream, temperature, max_tokens and seed are not among them."
        )
    return {name: value for name, value in fields.items() if value is not None} | extra


def _body(config: ClientConfig, messages: Messages, i: int) -> dict[str, Any]:
    """The JSON body of a request."""
    is_chat = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    if not is_chat or not all(
        isinstance(m, Mapping) and m.keys() == {"role", "content"} and all(isinstance(x, str) for x in m.values())
        for m in messages
    ):
        raise ValueError(f"requests[{i}] must be a list of {{'role': text, 'content': text}}, at least one.")
    body = {"model": config.model, "messages": [dict(m) for m in messages]} | _sampling(config)
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"requests[{i}] has half a surrogate pair (U+{ord(error.object[error.start]):04X}): a text was cut inside "
            "a character."
        ) from error
    return body


def _server(config: ClientConfig) -> str:
    return config.server_name or config.base_url.rstrip("/")


def _key(config: ClientConfig, body: dict[str, Any]) -> str:
    text = json.dumps({"server": _server(config), "request": body}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _parse(line: bytes) -> tuple[str, Completion] | None:
    """(key, call) of a line of the cache, None where it is none."""
    try:
        row = json.loads(line)
        reply = row["key"], row["text"], row["finish_reason"], row["prompt_tokens"], row["completion_tokens"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if tuple(map(type, reply)) != (str, str, str, int, int):
        return None
    key, text, finish_reason, prompt_tokens, completion_tokens = reply
    return key, Completion(text, "", finish_reason, prompt_tokens, completion_tokens, cached=True)


def _append(path: Path, key: str, server: str, body: dict[str, Any], reply: Completion) -> None:
    """Adds a line; a lock keeps the lines of several processes apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = {name: getattr(reply, name) for name in ("text", "finish_reason", "prompt_tokens", "completion_tokens")}
    row = {"key": key, "server": server, "request": body} | answer
    line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        _repair(file)
        file.write(line)


def _repair(file: BinaryIO) -> None:
    """Ends the last line, or cuts it off where a killed process left a part of it."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if _parse(content[start:]) is not None:
        file.write(b"\n")
    else:
        file.truncate(start)


def _ask_all(
    config: ClientConfig,
    todo: dict[str, dict[str, Any]],
    path: Path | None,
    description: str,
    answered: bool,
    leave: bool,
) -> tuple[dict[str, Completion], int]:
    """Replies by key, and the number of retries; `answered`: requests have been answered before (the cache)."""
    try:
        import openai
        from anyio.from_thread import start_blocking_portal  # anyio is a requirement of openai
    except ImportError as error:
        raise ImportError(f"asking {config.model} needs openai: pip install -e '.[critic]' ({error})") from error
    api_key = _api_key(config)
    _reach(config)
    replies: dict[str, Completion] = {}
    refused: list[ApiError] = []
    num_asked = num_sent = failed_in_a_row = 0

    async def count(_):
        nonlocal num_sent
        num_sent += 1

    async def work(client, queue, bar):
        nonlocal num_asked, failed_in_a_row, answered
        for key, body in queue:
            if failed_in_a_row >= GIVE_UP_AFTER:
                replies[key] = Completion(None, f"not asked, as {failed_in_a_row} requests in a row had failed")
                continue
            num_asked += 1
            try:
                reply = await _ask(openai, client, config, api_key, body)
            except _RefusedRequest as error:
                refused.append(error)
                if not answered and len(refused) >= min(NUM_REFUSED, len(todo)):
                    raise
                reply = Completion(None, str(error))
            answered = answered or reply.text is not None
            failed_in_a_row = 0 if reply.text is not None else failed_in_a_row + 1
            if path and reply.text is not None:
                _append(path, key, _server(config), body, reply)
            replies[key] = reply
            bar.update()

    async def run():
        client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=api_key or "none",  # without one openai takes that of OPENAI_API_KEY, whatever the server
            max_retries=config.num_retries,
            timeout=openai.Timeout(config.timeout_s, connect=min(config.timeout_s, 10.0)),
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [count]}),
        )
        queue = iter(todo.items())
        with tqdm(total=len(todo), desc=description, unit="call", disable=None, leave=leave) as bar:
            async with client, asyncio.TaskGroup() as group:
                for _ in range(min(config.max_in_flight, len(todo))):
                    group.create_task(work(client, queue, bar))

    try:
        # A thread of its own, since a notebook has a running event loop, in which no other can run.
        with start_blocking_portal() as portal:
            portal.call(run)
    except ExceptionGroup as errors:
        error = errors.exceptions[0]
        if isinstance(error, ApiError) and path:
            num_kept = sum(reply.text is not None for reply in replies.values())
            raise ApiError(f"{error} {num_kept} finished calls are kept in {path}.") from None
        raise error from None
    if refused and not answered:
        raise refused[0]
    return replies, num_sent - num_asked


def _api_key(config: ClientConfig) -> str:
    key = os.environ.get(config.api_key_env, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError(
            f"the environment variable {config.api_key_env} holds characters that no API key has: set it again."
        )
    return key


def _reach(config: ClientConfig) -> None:
    """Raises ApiError where nothing listens at the address: then no retry helps, and none should be waited for."""
    if urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return  # the way to the server is the proxy's
    url = urllib.parse.urlsplit(config.base_url)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10).close()
    except OSError as error:
        raise ApiError(f"no server can be reached at {config.base_url} ({error}): start it, or mend base_url") from None


async def _ask(openai: Any, client: Any, config: ClientConfig, api_key: str, body: dict[str, Any]) -> Completion:
    """One request with its retries, which are openai's own."""
    sampling = {name: value for name, value in body.items() if name not in ("model", "messages")}
    try:
        reply = await client.chat.completions.create(
            model=body["model"], messages=body["messages"], extra_body=sampling
        )
    except openai.APIStatusError as error:
        message = f"status {error.status_code}: {_message(error, api_key)}"
        passes = error.status_code in RETRIED_STATUS or error.status_code >= 500
        if not passes or error.code == "insufficient_quota":  # a 429 that no wait ends: the account is empty
            remedy = _remedy(config, error.status_code, api_key, body)
            kind = _RefusedRequest if error.status_code in REFUSED_REQUEST else ApiError
            raise kind(f"{config.base_url} refuses model {config.model!r} with {message}. {remedy}") from None
        return Completion(None, message)
    except openai.APIConnectionError as error:
        cause = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
        return Completion(None, f"{config.base_url}: {error.message}{cause}")
    except (openai.OpenAIError, ValueError, RecursionError) as error:
        return Completion(None, f"the reply cannot be read: {type(error).__name__}")
    completion = _completion(reply)
    if completion is None:
        shown = _one_line(reply if isinstance(reply, str) else repr(reply), api_key)
        return Completion(None, f"the reply is no chat completion (does base_url end where the API begins?): {shown}")
    return completion


def _completion(reply: Any) -> Completion | None:
    """What a reply says; None where it has not the fields of a chat completion, which openai does not check."""
    try:
        text, finish_reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    except (AttributeError, TypeError, IndexError):
        return None
    if not isinstance(text, str | None):
        return None
    count = lambda name: n if isinstance(n := getattr(reply.usage, name, None), int) else 0  # noqa: E731
    # A refusal has no content. Half a surrogate pair, which JSON can say, becomes "?": it has no UTF-8.
    clean = lambda x: x.encode("utf-8", "replace").decode("utf-8") if isinstance(x, str) else ""  # noqa: E731
    return Completion(clean(text), "", clean(finish_reason), count("prompt_tokens"), count("completion_tokens"))


def _message(error: Any, api_key: str) -> str:
    """The server's own words, which stand in other places with other servers."""
    body = error.body
    if isinstance(body, Mapping):
        body = body.get("message") or body.get("detail") or body
    return _one_line(body or "(no message)", api_key)


def _one_line(x: Any, api_key: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(x))
    text = " ".join((text.replace(api_key, "***") if api_key else text).split())
    return text if len(text) <= 500 else f"{text[:500]} ..."


def _remedy(config: ClientConfig, status: int, api_key: str, body: dict[str, Any]) -> str:
    if status in (401, 403):
        state = "which does not suit it" if api_key else "which is not set"
        return f"The key comes from the environment variable {config.api_key_env}, {state}."
    if status == 404:
        return "Is the model's name right (`curl BASE_URL/models`), and does base_url end where the API begins (/v1)?"
    if status == 429:
        return "The account has no credit left."
    last = _one_line(body["messages"][-1]["content"], api_key)
    return (
        "A model that does not know temperature, max_tokens or seed needs None there; one with a short context needs "
        f"shorter texts. The request ends: {last[-80:]!r}"
    )
