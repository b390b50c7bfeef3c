"""Improves answers with a trained workdir (Algorithm 2): methods behind one interface, stop rules, what each takes.

A method turns (x, y_k) into y_{k+1}. `run` drives it over many rows: each goes on until one of its stop rules holds,
and then frees its place in the batch for the next. The noise of a row depends on the key, its number and the iteration
alone, so its answers do not depend on the rows that share its batch, nor on whether the run was stopped in between.

Methods are compared by what they take: tokens that models read, tokens that they sample and tokens that reward models
read, each counted per row.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pit_jax import processes
from pit_jax.config import SamplingConfig, SrtConfig
from pit_jax.data.encode import Encoder
from pit_jax.pipelines import common, critics, pit, srt
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.samples import Draws, Ids, Sampler, Step

METHODS = {
    "pit": ("final",),
    "self_refine": ("rl_policy",),
    "self_refine_one_call": ("rl_policy",),
    "rerank": ("rl_policy", "r_p"),
    "srt": ("final",),
}
"""Method -> the stages whose models it uses; "final" leaves M_PIT behind, or in a run of SRT the last M_self."""

KEEP = ("last", "best")

Method = Callable[[Sequence[str], Sequence[Ids], jax.Array, Draws], list[Step]]
"""(prompts, current answers, typed PRNG key, draws) -> next answers; gap and gain are not yet known."""


# ------------------------------------------------------------------------------------------------------------- stopping


@dataclasses.dataclass(frozen=True)
class StopRules:
    """When a row is done; the first rule of the list that holds is the reason.

    Attributes:
      identical: an answer equals the one before.
      min_gain: an answer's gain is not above this; the one before is then the result. None: off.
      max_tokens: the row has taken at least so many tokens; 0: off.
      max_seconds: so much time has gone by since the start; rows that have not begun then stay as they are. 0: off.
      iterations: K, at most so many new answers.
      keep: last, or best: the answer up to which the gains add up to most.
    """

    identical: bool = False
    min_gain: float | None = None
    max_tokens: int = 0
    max_seconds: float = 0.0
    iterations: int = 1
    keep: str = "last"

    def __post_init__(self):
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: at least 1")
        if self.max_tokens < 0 or self.max_seconds < 0:
            raise ValueError(f"max_tokens={self.max_tokens}, max_seconds={self.max_seconds}: not below 0")
        if self.keep not in KEEP:
            raise ValueError(f"keep={self.keep!r}: use {' or '.join(KEEP)}")

    @property
    def needs_gains(self) -> bool:
        """Whether a rule asks R_PIT."""
        return self.min_gain is not None or self.keep == "best"

    def reason(self, steps: Sequence[Step], seconds: float = 0.0) -> str:
        """Why a row with the answers y_0, y_1, ... stops, or an empty string."""
        if self.identical and steps[-1].ids == steps[-2].ids:
            return "identical"
        if self.min_gain is not None and steps[-1].gain <= self.min_gain:
            return "gap"
        if self.max_tokens and sum(step.tokens for step in steps) >= self.max_tokens:
            return "tokens"
        if self.max_seconds and seconds >= self.max_seconds:
            return "seconds"
        return "iterations" if len(steps) > self.iterations else ""

    def kept(self, steps: Sequence[Step], reason: str) -> int:
        """Number of the answer that is the result."""
        if self.keep == "best":
            return int(np.argmax(np.cumsum([step.gain or 0.0 for step in steps])))
        return len(steps) - 2 if reason == "gap" else len(steps) - 1


def stopped(steps: Sequence[Step], rules: StopRules) -> tuple[int, int]:
    """Where rules would have stopped a row that went on.

    Args:
      steps: y_0, y_1, ..., y_K.
      rules: with iterations at most K.

    Returns:
      (number of the answer that is the result, number of answers that were written until then).
    """
    for k in range(1, len(steps)):
        if reason := rules.reason(steps[: k + 1]):
            return rules.kept(steps[: k + 1], reason), k
    raise ValueError(f"iterations={rules.iterations}, but only {len(steps) - 1} were written")


def calibrate(chains: Sequence[Sequence[Step]], scores: np.ndarray) -> float:
    """The threshold of the gain at which rows stop (appendix J leaves the condition open).

    The highest, which stops earliest, of those whose mean score is not more than a standard error of the difference
    below the best one: scores of few rows cannot tell them apart. The thresholds looked at are 0 and each gain above
    it: a copy, whose gain is 0, always stops its row.

    Args:
      chains: y_0 .. y_K of each row, with gains.
      scores: [n, K + 1], of these answers by a judge that is not R_PIT.

    Raises:
      ValueError: where there are no rows.
    """
    if not len(chains):
        raise ValueError("there are no rows to calibrate the threshold on")
    gains = np.asarray([[step.gain for step in steps[1:]] for steps in chains])
    K = gains.shape[1]
    thresholds = np.concatenate([[0.0], np.unique(gains[gains > 0])])

    def reached(threshold):
        below = gains <= threshold
        kept = np.where(below.any(1), below.argmax(1), K)
        return scores[np.arange(len(gains)), kept]

    outcomes = np.stack([reached(threshold) for threshold in thresholds])
    lost = outcomes[outcomes.mean(1).argmax()] - outcomes
    error = lost.std(1, ddof=1) / len(chains) ** 0.5 if len(chains) > 1 else 0.0
    return float(thresholds[lost.mean(1) <= error].max())


# -------------------------------------------------------------------------------------------------------------- running


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt whose answer is to become better.

    Attributes:
      number: of the row in its file; part of its noise.
      prompt: x.
      response: y_0, ids without EOS; None: M_P writes it.
    """

    number: int
    prompt: str
    response: Ids | None = None


@dataclasses.dataclass(frozen=True)
class Improved:
    """A finished row: y_0, y_1, ..., which of them is the result, and why it stopped there.

    Without y_0 where no time was left to write one.
    """

    row: Row
    steps: tuple[Step, ...]
    kept: int
    stop: str


def run(
    rows: Iterable[Row],
    method: Method,
    first: Method,
    gains: pit.Gains | None,
    rules: StopRules,
    key: jax.Array,
    batch_size: int,
) -> Iterator[Improved]:
    """Yields rows as they finish; at most `batch_size` are under way, and a new one takes the place of one that stops.

    Args:
      rows: what to improve.
      method: writes the next answer.
      first: writes y_0 where a row has none; the answers it is given are empty.
      gains: of R_PIT; None where they are not asked for.
      rules: when to stop.
      key: typed PRNG key of the run.
      batch_size: rows under way.
    """
    if gains is None and rules.needs_gains:
        raise ValueError("a stop by gap and keep=best need R_PIT")
    # All processes stop at the same time, which is that of the first.
    now = (lambda: processes.on_first(time.perf_counter)) if rules.max_seconds else time.perf_counter
    started = now()
    waiting = iter(rows)
    active: list[tuple[Row, list[Step]]] = []
    while True:
        if rules.max_seconds and now() - started >= rules.max_seconds:
            for row in waiting:
                steps = () if row.response is None else (Step(tuple(row.response)),)
                yield Improved(row, steps, 0, "seconds")
        new = [row for _, row in zip(range(batch_size - len(active)), waiting, strict=False)]
        asked = [row for row in new if row.response is None]
        draws = np.asarray([(row.number, 0) for row in asked], np.uint32)
        written = iter(first([row.prompt for row in asked], [()] * len(asked), key, draws) if asked else ())
        active += [(row, [next(written) if row.response is None else Step(tuple(row.response))]) for row in new]
        if not active:
            return
        prompts, before = [row.prompt for row, _ in active], [steps[-1].ids for _, steps in active]
        draws = np.asarray([(row.number, len(steps)) for row, steps in active], np.uint32)
        after = method(prompts, before, key, draws)
        if gains is not None:
            after = with_gains(gains, prompts, after, before, rules.needs_gains)
        seconds = now() - started
        remaining = []
        for (row, steps), step in zip(active, after, strict=True):
            steps = [*steps, step]
            if reason := rules.reason(steps, seconds):
                yield Improved(row, tuple(steps), rules.kept(steps, reason), reason)
            else:
                remaining.append((row, steps))
        active = remaining


def with_gains(
    gains: pit.Gains, prompts: Sequence[str], after: Sequence[Step], before: Sequence[Ids], decide: bool
) -> list[Step]:
    """The steps with gap and gain, and what it took to know them where they decide something."""
    values = gains(prompts, [step.ids for step in after], before)
    return [
        step._replace(gap=gap, gain=gain, scored=step.scored + (scored if decide else 0))
        for step, (gap, gain, scored) in zip(after, values, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------------- methods


def policy(context: Context, stage: str, temperature: float, size: int) -> Method:
    """M_P's own answers; the current ones are not looked at."""
    e = context.encoder
    settings = SamplingConfig(context.config.data.response_window, temperature)
    sampler = Sampler(context, stage, e.policy_window, settings, size)
    return lambda xs, _, key, draws: sampler([e.policy_prompt(x) for x in xs], key, draws)


def pit_method(context: Context, stage: str, temperature: float, size: int) -> Method:
    """M_PIT reads the answer and writes a better one."""
    e, data = context.encoder, context.config.data
    thoughts = pit.has_thoughts(context.config, stage)
    window = data.response_window + (data.reflection_window if thoughts else 0)
    sampler = Sampler(context, stage, e.pit_window, SamplingConfig(window, temperature), size)

    def improve(xs, ys, key, draws):
        steps = sampler([e.pit_prompt(x, y) for x, y in zip(xs, ys, strict=True)], key, draws)
        return [step._replace(ids=without_thoughts(e, step.ids)) for step in steps] if thoughts else steps

    return improve


def self_refine(context: Context, stage: str, temperature: float, size: int) -> Method:
    """Self-Refine in two calls (appendix E.1): M_P writes feedback on its answer, then a better answer.

    Feedback that is empty or does not end within its window cannot be used: the answer stays.
    """
    e, data = context.encoder, context.config.data
    feedback_settings = SamplingConfig(data.reflection_window, temperature)
    params = common.load_model(context, stage)
    critic = Sampler(context, stage, e.reflection_prompt_window, feedback_settings, size, params)
    settings = SamplingConfig(data.response_window, temperature)
    refiner = Sampler(context, stage, e.refinement_prompt_window, settings, size, params)

    def improve(xs, ys, key, draws):
        prompts = [e.reflection_prompt(x, y) for x, y in zip(xs, ys, strict=True)]
        feedback = critic(prompts, jax.random.fold_in(key, 1), draws)
        usable = [0 < len(f.ids) < data.reflection_window for f in feedback]
        prompts = [e.refinement_prompt(x, y, f.ids) for x, y, f in zip(xs, ys, feedback, strict=True)]
        asked = [i for i, ok in enumerate(usable) if ok]
        refined = refiner([prompts[i] for i in asked], jax.random.fold_in(key, 2), draws[asked]) if asked else []
        steps = [Step(tuple(y), f.read, f.written, parsed=False) for y, f in zip(ys, feedback, strict=True)]
        for i, step in zip(asked, refined, strict=True):
            written = feedback[i].written + step.written
            steps[i] = Step(step.ids, feedback[i].read + step.read, written)
        return steps

    return improve


def self_refine_one_call(context: Context, stage: str, temperature: float, size: int) -> Method:
    """Self-Refine in one call (appendix B): M_P is asked for a better answer at once."""
    e = context.encoder
    settings = SamplingConfig(context.config.data.response_window, temperature)
    sampler = Sampler(context, stage, e.one_call_prompt_window, settings, size)

    def improve(xs, ys, key, draws):
        return sampler([e.one_call_prompt(x, y) for x, y in zip(xs, ys, strict=True)], key, draws)

    return improve


def rerank(context: Context, stage: str, temperature: float, size: int) -> Method:
    """M_P answers once more, and R_P takes the better of the two: after K iterations the best of K + 1."""
    e = context.encoder
    sample = policy(context, stage, temperature, size)
    model, params = common.model_of(context, "r_p"), common.load_model(context, "r_p")

    def improve(xs, ys, key, draws):
        new = sample(xs, ys, key, draws)
        form = lambda x, y: [*e.policy_prompt(x), *y, e.tokenizer.eos_id]  # noqa: E731
        groups = [(form(x, y), form(x, step.ids)) for x, y, step in zip(xs, ys, new, strict=True)]
        scores = common.score_groups(model, params, groups, batch_size=size)
        # The score of the earlier answer is known from the iteration before, but for y_0.
        read = [len(new) + (len(old) if draw[1] <= 1 else 0) for (old, new), draw in zip(groups, draws, strict=True)]
        return [
            step._replace(ids=step.ids if b > a else tuple(y), scored=n)
            for step, y, n, (a, b) in zip(new, ys, read, scores, strict=True)
        ]

    return improve


def _self_critic(context: Context, stage: str, temperature: float, size: int) -> critics.SelfCritic:
    without = srt.ARMS[stage.removeprefix("arm_")][0] or None if stage.startswith("arm_") else None
    return srt.make_self_critic(context, stage, temperature, size, srt.make_form(context, without))


def srt_answer(context: Context, stage: str, temperature: float, size: int) -> Method:
    """M_self's first answers; the current ones are not looked at."""
    model = _self_critic(context, stage, temperature, size)
    return lambda xs, _, key, draws: model.answer(xs, key, draws)


def srt_method(context: Context, stage: str, temperature: float, size: int) -> Method:
    """M_self criticises an answer and refines it, greedily (SRT section 3); what gives no refinement stays.

    A refinement that is longer than the response window ends there, as any answer does.
    """
    model, e = _self_critic(context, stage, temperature, size), context.encoder

    def improve(xs, ys, key, draws):
        steps = []
        for y, reply in zip(ys, model.criticize(xs, ys), strict=True):
            refinement = reply.feedback.refinement
            ids = e.response(refinement)[:-1][: e.response_window] if refinement else y
            critique = reply.raw.removesuffix(refinement or "").rstrip()
            steps.append(Step(tuple(ids), reply.read, reply.written, parsed=bool(refinement), feedback=critique))
        return steps

    return improve


def srt_rerank(context: Context, stage: str, temperature: float, size: int) -> Method:
    """The best of N answers by M_self's own scores; of equal ones the first (SRT section 4.4, Figure 4)."""
    model, num = _self_critic(context, stage, temperature, size), context.config.evaluation.num_candidates

    def improve(xs, _, key, draws):
        tried: list[list[Step]] = []
        scores = []
        for n in range(num):
            new = model.answer(xs, key, np.stack([draws[:, 0], draws[:, 1] + n], axis=1).astype(np.uint32))
            said = model.score(xs, [step.ids for step in new])
            scores.append([reply.feedback.score or 0.0 for reply in said])
            tried.append([
                step._replace(read=step.read + reply.read, written=step.written + reply.written)
                for step, reply in zip(new, said, strict=True)
            ])  # fmt: skip
        best = np.argmax(scores, axis=0)
        took = [
            (sum(step.read for step in steps), sum(step.written for step in steps))
            for steps in zip(*tried, strict=True)
        ]
        return [tried[best[i]][i]._replace(read=read, written=written) for i, (read, written) in enumerate(took)]

    return improve


def open_finished(root: str | Path, method: str = "") -> tuple[Context, str]:
    """A workdir to improve answers with, and the method: where none is named, that of the run's system.

    Raises:
      ValueError: where it is no workdir, is of the other system, or has not finished a stage that the method uses.
    """
    context = common.open_workdir(root, writes=True)
    is_srt = isinstance(context.config, SrtConfig)
    method = method or ("srt" if is_srt else "pit")
    if is_srt != (method == "srt"):
        kind, known = ("SRT", ["srt"]) if is_srt else ("PIT", [name for name in METHODS if name != "srt"])
        raise ValueError(f"--method={method}: {root} is a run of {kind}, whose methods are {', '.join(known)}")
    common.require(context, stages(context.config, method))
    return context, method


def stages(config: Any, method: str) -> list[str]:
    """The stages whose models a method uses."""
    last = (srt if isinstance(config, SrtConfig) else pit).final_stage(config)
    return [last if stage == "final" else stage for stage in METHODS[method]]


def form_of(context: Context, method: str = "") -> dict[str, Any]:
    """What the answers of a method, or of any, depend on beside models, prompts, temperature and seed: plain JSON."""
    found = {"templates": context.encoder.digest}
    if method.startswith("srt") or not method and isinstance(context.config, SrtConfig):
        found |= srt.form_of(context)
    if method == "srt_rerank":
        found["num_candidates"] = context.config.evaluation.num_candidates
    return found


def make_method(context: Context, name: str, temperature: float, size: int, stage: str = "") -> Method:
    """A method of `METHODS`, or policy.

    Args:
      context: of the finished run.
      name: of the method.
      temperature: of its samples.
      size: rows of a batch.
      stage: whose model writes; empty: the last one, M_PIT^RL or M_P^RL.
    """
    make = {
        "policy": policy,
        "pit": pit_method,
        "self_refine": self_refine,
        "self_refine_one_call": self_refine_one_call,
        "rerank": rerank,
        "srt_answer": srt_answer,
        "srt": srt_method,
        "srt_rerank": srt_rerank,
    }[name]
    if name.startswith("srt"):
        last = srt.final_stage(context.config)
    else:
        last = pit.final_stage(context.config) if name == "pit" else "rl_policy"
    return make(context, stage or last, temperature, size)


def without_thoughts(encoder: Encoder, ids: Sequence[int]) -> Ids:
    """The response behind a chain of thought, c and a line break (appendix K); all of it where there is none.

    Ends, as any sample does, at the response window: thoughts and response share one longer window.
    """
    _, found, response = encoder.text(ids).partition("\n")
    ids = encoder.response(response)[:-1] if found else ids
    return tuple(ids[: encoder.response_window])
