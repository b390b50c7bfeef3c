"""Critics behind one protocol: a language model of a server, a model of ours, the verifier (SRT section 3.1.1).

A critic reads an instruction and a response, and writes weaknesses, suggestions, a score and a better response in one
call. Scores of refinements come from calls of their own, which know nothing of earlier feedback: a critic that sees its
own feedback gives more (section 4.1).
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from pit_jax import client, interrupts, processes
from pit_jax.config import CriticConfig, SamplingConfig
from pit_jax.data import feedback as feedback_lib, synthetic_critic
from pit_jax.data.feedback import Feedback, Form
from pit_jax.data.verifier import verify
from pit_jax.files import Journal
from pit_jax.pipelines import common
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.samples import Sampler
from pit_jax.types import Params, PreferenceExample

REFINEMENT_HEADING = "### Improved Response"
ATTEMPTS = 2
"""How often a server is asked for a critique that did not come or of which a part is missing, each time with another
seed; beside the client's own retries."""


OVER_WINDOW = "the response is longer than the window of the critic"


class Request(NamedTuple):
    """What a critic is asked about.

    Attributes:
      number: of the row: part of its noise.
      row: with the instruction; an oracle reads its requirements too.
      response: the text to be judged.
    """

    number: int
    row: PreferenceExample
    response: str


class Reply(NamedTuple):
    """What a critic says.

    Attributes:
      feedback: the parts that were found.
      raw: all that it wrote.
      error: why there is no reply; empty where there is one.
      read: tokens that it was given.
      written: tokens that it wrote.
    """

    feedback: Feedback = Feedback()
    raw: str = ""
    error: str = ""
    read: int = 0
    written: int = 0


class Critic(NamedTuple):
    """A critic.

    Attributes:
      name: who it is, for records.
      criticize: critique and refinement of each response, in one call.
      score: a score for each response; nothing else of its replies counts.
    """

    name: str
    criticize: Callable[[Sequence[Request]], list[Reply]]
    score: Callable[[Sequence[Request]], list[Reply]]


# ------------------------------------------------------------------------------------------------------------- verifier


def verifier_critic(seed: int, error_rate: float = 0.0) -> Critic:
    """The verifier as an oracle for the synthetic task; with an error rate, one that judges wrongly now and then.

    Args:
      seed: of wordings and errors.
      error_rate: probability with which the verdict on a requirement is turned around. A requirement that is wrongly
        taken for met is not mended, one that is wrongly taken for missing lowers the score.
    """

    def look(request: Request):
        """The noise of a request, and what the critic believes to be met."""
        said = hashlib.sha256(request.response.encode("utf-8", "replace")).digest()[:8]
        rng = np.random.default_rng([seed, request.number, int.from_bytes(said, "big")])
        met = np.asarray(verify(request.row.requirements, request.response))
        return rng, [bool(x) for x in met ^ (rng.random(len(met)) < error_rate)]

    def criticize(request: Request) -> Reply:
        rng, believed = look(request)
        row = request.row
        said = synthetic_critic.criticize(row.requirements, request.response, row.chosen, rng, believed)
        found = Feedback(said.weaknesses, said.suggestions, float(said.score), said.refinement)
        return Reply(found, feedback_lib.render(found))

    def score(request: Request) -> Reply:
        found = Feedback(score=float(synthetic_critic.score_of(look(request)[1])))
        return Reply(found, feedback_lib.render(found))

    return Critic(
        f"verifier, error rate {error_rate:g}" if error_rate else "verifier",
        lambda requests: [criticize(request) for request in requests],
        lambda requests: [score(request) for request in requests],
    )


# --------------------------------------------------------------------------------------------------------------- server


def server_critic(config: CriticConfig, template: str, cache: Path) -> Critic:
    """A language model behind an OpenAI-compatible server; every reply is on disk as soon as it is there.

    Args:
      config: the server.
      template: text of critic.txt.
      cache: folder of the replies.
    """

    def ask(requests: Sequence[Request], *, whole: bool) -> list[Reply]:
        chats = [
            [{"role": "user", "content": feedback_lib.critic_prompt(template, r.row.prompt, r.response)}]
            for r in requests
        ]
        replies = [Reply() for _ in requests]
        todo = list(range(len(requests)))
        for attempt in range(ATTEMPTS):
            settings = client_config(config, cache, seed=attempt or None, whole=whole)
            words = "critiques" if whole else "scores"
            completions, _ = client.complete(settings, [chats[i] for i in todo], description=words)
            for i, said in zip(todo, completions, strict=True):
                read = replies[i].read + said.prompt_tokens
                written = replies[i].written + said.completion_tokens
                reply = replies[i] if attempt and said.text is None and replies[i].raw else _server_reply(said, whole)
                replies[i] = reply._replace(read=read, written=written)
            todo = [i for i in todo if _incomplete(replies[i], whole)]
            if not todo:
                break
        return replies

    return Critic(
        f"{config.model} at {config.base_url.rstrip('/')}",
        lambda requests: ask(requests, whole=True),
        lambda requests: ask(requests, whole=False),
    )


def client_config(config: CriticConfig, cache: Path, *, seed: int | None = None, whole: bool = True):
    """How the server is asked; a score ends where the refinement would begin."""
    extra = json.loads(config.extra or "{}")
    if not whole:
        extra = {"stop": [REFINEMENT_HEADING]} | extra
    return client.ClientConfig(
        base_url=config.base_url,
        model=config.model,
        temperature=None if config.temperature < 0 else config.temperature,
        max_tokens=config.max_tokens or None,
        seed=seed,
        extra=json.dumps(extra) if extra else "",
        max_in_flight=config.max_in_flight,
        timeout_s=config.timeout_s,
        cache=str(cache),
        api_key_env=config.api_key_env,
    )


def check_server(config: CriticConfig) -> None:
    """Asks the server for a word, so that a missing key or a wrong address is known before anything is trained.

    Raises:
      ValueError: where it does not answer, with the remedy.
    """
    # As a score is asked for, and as a critique is asked for again: fields that a server refuses are known now.
    for asked in (client_config(config, Path(), whole=False), client_config(config, Path(), seed=1)):
        # A few retries, as a server may be busy; half a minute each, as one that hangs is to be known soon.
        settings = dataclasses.replace(asked, cache="", num_retries=4, timeout_s=min(config.timeout_s, 30.0))
        try:
            (said,), _ = client.complete(settings, [[{"role": "user", "content": "Say yes."}]], description="critic")
        except client.ApiError as error:
            raise ValueError(f"the critic: {error} (--config.critic.base_url, --config.critic.model)") from None
        if said.text is None:
            raise ValueError(
                f"the critic's server {config.base_url} gives no answer ({said.error}): start it, wait, or set "
                "--config.critic.base_url"
            )


def _server_reply(said: client.Completion, whole: bool) -> Reply:
    if said.text is None:
        return Reply(error=f"no reply: {said.error}")
    found = feedback_lib.parse(said.text)
    if whole and said.finish_reason == "length":  # what was cut off is no refinement
        found = dataclasses.replace(found, refinement=None)
    return Reply(found, said.text)


def _incomplete(reply: Reply, whole: bool) -> bool:
    return bool(reply.feedback.lacking) if whole else reply.feedback.score is None


# ----------------------------------------------------------------------------------------------------------- own models


def of_first(critic: Critic) -> Critic:
    """A critic that the first process asks for all."""

    def ask(name: str, requests: Sequence[Request]) -> list[Reply]:
        said = processes.on_first(lambda: [_plain(reply) for reply in getattr(critic, name)(requests)])
        return [_reply(value) for value in said]

    return Critic(critic.name, functools.partial(ask, "criticize"), functools.partial(ask, "score"))


def stored(critic: Critic, journal: Journal, chunk: int) -> Critic:
    """A critic whose replies go into a file, `chunk` at a time: a run that is killed asks for none of them again.

    A server needs no such file: its replies are in the cache of the client, each as soon as it is there.
    """
    known = {
        (line["ask"], line["row"], line["response"]): _reply(line["reply"])
        for line in journal.lines
        if line["ask"] in ("criticize", "score")
    }

    def ask(name: str, requests: Sequence[Request]) -> list[Reply]:
        key = lambda r: (name, r.number, r.response)  # noqa: E731
        todo = [r for r in requests if key(r) not in known]
        for start in range(0, len(todo), chunk):
            interrupts.check()
            part = todo[start : start + chunk]
            replies = getattr(critic, name)(part)
            lines = []
            for request, reply in zip(part, replies, strict=True):
                known[key(request)] = reply
                lines.append({"ask": name, "row": request.number, "response": request.response, "reply": _plain(reply)})
            journal.add(*lines)
        return [known[key(request)] for request in requests]

    return Critic(critic.name, functools.partial(ask, "criticize"), functools.partial(ask, "score"))


def _plain(reply: Reply) -> dict:
    return reply._asdict() | {"feedback": dataclasses.asdict(reply.feedback)}


def _reply(value: dict) -> Reply:
    return Reply(**value | {"feedback": Feedback(**value["feedback"])})


class SelfCritic:
    """A model that was tuned on the sequence of Equation 1: it answers, criticises, refines and scores.

    Attributes:
      form: of its sequences.
    """

    def __init__(
        self,
        context: Context,
        stage: str,
        form: Form,
        size: int,
        temperature: float,
        feedback_window: int,
        params: Params = None,
    ):
        """Loads the model.

        Args:
          context: of the run.
          stage: of the model.
          form: of its sequences.
          size: rows of a batch.
          temperature: of answers; critiques and refinements are greedy.
          feedback_window: tokens of a critique with its headings.
          params: of the model, where they are in memory already.
        """
        e, data = context.encoder, context.config.data
        self.form, self._encoder = form, e
        params = common.load_model(context, stage) if params is None else params
        settings = SamplingConfig(data.response_window + len(form.feedback_begins), temperature)
        make = lambda *args, stop=(): Sampler(context, stage, *args, size, params, stop)  # noqa: E731
        self._answer = make(e.policy_window, settings, stop=form.feedback_begins)
        window = data.prompt_window + data.response_window + len(form.feedback_prompt("", ""))
        settings = SamplingConfig(feedback_window + data.response_window, 0.0)
        self._criticize = make(window, settings)
        settings = SamplingConfig(feedback_window, 0.0)
        self._score = make(window, settings, stop=form.refinement_begins)

    def answer(self, prompts: Sequence[str], key: jax.Array, draws: np.ndarray):
        """Steps of first answers."""
        steps = self._answer([self.form.prompt(x) for x in prompts], key, draws)
        return [step._replace(ids=step.ids[: self._encoder.response_window]) for step in steps]

    def criticize(self, prompts: Sequence[str], responses: Sequence[str | Sequence[int]]) -> list[Reply]:
        """Critique and refinement of each response, greedily."""
        return self._read(self._criticize, prompts, responses)

    def score(self, prompts: Sequence[str], responses: Sequence[str | Sequence[int]]) -> list[Reply]:
        """A score for each response: the critique up to where a refinement would begin."""
        return self._read(self._score, prompts, responses)

    def _read(self, sampler: Sampler, prompts, responses) -> list[Reply]:
        encode = lambda y: self._encoder.tokenizer.encode(y) if isinstance(y, str) else list(y)  # noqa: E731
        ids = [encode(y) for y in responses]
        fits = [i for i, y in enumerate(ids) if len(y) <= self._encoder.response_window]
        replies = [Reply(error=OVER_WINDOW)] * len(ids)
        asked = [self.form.feedback_prompt(prompts[i], ids[i]) for i in fits]
        steps = sampler(asked, jax.random.key(0), np.zeros((len(asked), 2), np.uint32))  # greedy: there is no noise
        for i, step in zip(fits, steps, strict=True):
            raw = self.form.feedback_begins_text.lstrip() + self._encoder.text(step.ids)
            found = feedback_lib.parse(raw)
            if step.written == len(step.ids) and not sampler.stops:  # no EOS: what was cut off is no refinement
                found = dataclasses.replace(found, refinement=None)
            replies[i] = Reply(found, raw, read=step.read, written=step.written)
        return replies


def self_critic(model: SelfCritic, name: str) -> Critic:
    """The protocol over a model of ours."""

    def criticize(requests: Sequence[Request]) -> list[Reply]:
        return model.criticize([r.row.prompt for r in requests], [r.response for r in requests])

    def score(requests: Sequence[Request]) -> list[Reply]:
        return model.score([r.row.prompt for r in requests], [r.response for r in requests])

    return Critic(name, criticize, score)
