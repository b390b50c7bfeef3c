"""Methods that improve answers, with models whose answers are written down: what is read, written, scored and kept."""

import types

import jax
import numpy as np
import pytest
from test_pit import WordTokenizer, gap_context, scored, words  # noqa: F401

from pit_jax.config import DataConfig, PitConfig
from pit_jax.pipelines import common, improve, pit
from pit_jax.pipelines.improve import Step

KEY = jax.random.key(7)
W, L, C = (WordTokenizer.words[word] for word in "wlc")


@pytest.fixture
def sampled(monkeypatch):
    """Replaces models: `script(stage, max_new_tokens, prompt)` gives ids; calls are kept as (stage, key, draws)."""
    calls = []

    class FakeSampler:
        script = None

        def __init__(self, context, stage, window, settings, size, params=None):
            self.stage, self.window, self.settings = stage, window, settings

        def __call__(self, prompts, key, draws):
            calls.append((self.stage, jax.random.key_data(key).tolist(), draws.tolist()))
            assert all(len(prompt) <= self.window for prompt in prompts)
            replies = [FakeSampler.script(self.stage, self.settings.max_new_tokens, prompt) for prompt in prompts]
            return [Step(tuple(ids), len(x), len(ids) + 1) for x, ids in zip(prompts, replies, strict=True)]

    monkeypatch.setattr(improve, "Sampler", FakeSampler)
    monkeypatch.setattr(common, "load_model", lambda context, stage: stage)
    monkeypatch.setattr(common, "model_of", lambda context, stage: stage)
    return types.SimpleNamespace(
        calls=calls, script=lambda script: setattr(FakeSampler, "script", staticmethod(script))
    )


def context_of(encoder, **fields):
    config = PitConfig(data=DataConfig(prompt_window=4, response_window=4, reflection_window=3), **fields)
    return types.SimpleNamespace(config=config, encoder=encoder)


def draws(n, iteration=1):
    return np.asarray([(i, iteration) for i in range(n)], np.uint32)


def test_self_refine_uses_feedback_that_is_not_empty_and_has_ended(words, sampled):  # noqa: F811
    """Feedback of 0, 1, 2 and 3 ids in a window of 3: the first says nothing, the last did not end."""
    feedback = {(W,): [], (L,): [C], (W, W): [C, C], (L, L): [C, C, C]}

    def script(stage, window, prompt):
        if window == 3:  # a request for feedback: Human: x Assistant: y EOS
            return feedback[tuple(prompt[4:-1])]
        assert prompt[-3:] == [12, 13, 11] and C in prompt, "Improve it. Assistant: behind the feedback"
        return [W, L, W]

    sampled.script(script)
    method = improve.self_refine(context_of(words), "rl_policy", 1.0, 4)
    answers = [(W,), (L,), (W, W), (L, L)]
    steps = method(["x"] * 4, answers, KEY, draws(4))
    assert [step.parsed for step in steps] == [False, True, True, False]
    assert [step.ids for step in steps] == [(W,), (W, L, W), (W, L, W), (L, L)]
    read = [len(words.reflection_prompt("x", y)) for y in answers]
    more = [len(words.refinement_prompt("x", y, feedback[y])) for y in answers]
    assert [step.read for step in steps] == [read[0], read[1] + more[1], read[2] + more[2], read[3]]
    assert [step.written for step in steps] == [1, 2 + 4, 3 + 4, 4]
    (first, key, _), (second, other_key, asked) = sampled.calls
    assert (first, second) == ("rl_policy", "rl_policy") and key != other_key, "two calls, two noises"
    assert asked == [[1, 1], [2, 1]], "each row keeps its own noise"


def test_self_refine_in_one_call(words, sampled):  # noqa: F811
    sampled.script(lambda stage, window, prompt: [W] if prompt == words.one_call_prompt("x", (L,)) else pytest.fail())
    (step,) = improve.self_refine_one_call(context_of(words), "rl_policy", 1.0, 1)(["x"], [(L,)], KEY, draws(1))
    assert step == Step((W,), len(words.one_call_prompt("x", (L,))), 2)


def test_rerank_keeps_the_better_answer(words, sampled, monkeypatch):  # noqa: F811
    """R_P likes low ids: 21 before 22 before 23; of equal scores the answer that was there stays."""
    monkeypatch.setattr(common, "score_groups", lambda model, params, groups, batch_size: -np.asarray(
        [[row[4] for row in group] for group in groups], np.float64
    ))  # fmt: skip
    sampled.script(lambda stage, window, prompt: [L, L])
    method = improve.rerank(context_of(words), "rl_policy", 1.0, 3)
    steps = method(["x"] * 3, [(W,), (C,), (L,)], KEY, draws(3, iteration=1))
    assert [step.ids for step in steps] == [(W,), (L, L), (L,)]
    # x and its form are 4 ids, EOS one: 6 of the old answer, which nobody has scored yet, and 7 of the new one.
    assert [(step.read, step.written, step.scored) for step in steps] == [(4, 3, 13)] * 3
    steps = method(["x"] * 3, [(W,), (C,), (L,)], KEY, draws(3, iteration=2))
    assert [step.scored for step in steps] == [7] * 3


def test_thoughts_are_not_part_of_the_answer(words, sampled):  # noqa: F811
    line = WordTokenizer.words["\n"]
    windows = []

    def script(stage, window, prompt):
        windows.append(window)
        return [C, line, W, L]

    sampled.script(script)
    context = context_of(words)
    (plain,) = improve.pit_method(context, "sft_pit", 1.0, 1)(["x"], [(L,)], KEY, draws(1))
    (thought,) = improve.pit_method(context, common.COT_ARM, 1.0, 1)(["x"], [(L,)], KEY, draws(1))
    assert plain.ids == (C, line, W, L) and thought.ids == (W, L) and windows == [4, 7]
    assert thought.written == plain.written == 5, "thoughts are written too"


def test_gains_are_over_a_copy(words, scored):  # noqa: F811
    """r_gap(x, y, ref) = 10 y - ref: w over l has 210 - 22, and a copy of l 220 - 22."""
    gains = pit.make_gains(gap_context(words, "gap"))
    found = gains(["x", "x"], [(W,), (L,)], [(L,), (L,)])
    assert [(gap, gain) for gap, gain, _ in found] == [(188.0, -10.0), (198.0, 0.0)]
    # The prompt with ref is 7 ids; behind it y and ref, each with EOS.
    assert [read for _, _, read in found] == [7 + 2 + 2] * 2
    by_difference = pit.make_gains(gap_context(words, "r_p_difference"))
    assert by_difference(["x"], [(W,)], [(L,)]) == [(-10.0, -10.0, 4 + 2 + 2)]
