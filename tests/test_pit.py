"""What the stages of PIT make of rows and models: their text, their ids, and which model each of them reads."""

import dataclasses
import functools
import json
import re
import types

import jax
import numpy as np
import pytest

from pit_jax import sampling, sharding, train_state
from pit_jax.config import (
    DataConfig,
    ModelConfig,
    PitConfig,
    PPOConfig,
    PretrainConfig,
    RewardModelConfig,
    SamplingConfig,
)
from pit_jax.data import batches, encode, synthetic, synthetic_text, templates, tokenizer
from pit_jax.evaluation import judges, store
from pit_jax.learners import ppo
from pit_jax.metrics import MetricsWriter
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines import common, improve, pit
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.improve import Step
from pit_jax.pipelines.stages import Workdir
from pit_jax.types import GAP_PAIRINGS, PreferenceExample

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def rows():
    return synthetic.generate(0, 0, 40)


@pytest.fixture(scope="module")
def encoder(rows):
    texts = [text for r in rows for text in (r.prompt, r.rejected, r.chosen, r.reflection)]
    texts += synthetic_text.word_forms(templates.literals())
    return encode.make_encoder(tokenizer.SentencePiece(tokenizer.train(texts, 2048)), PitConfig().data)


def turns(encoder, rows, **settings):
    config = PitConfig(pretrain=PretrainConfig(**settings))
    return common.pretraining_rows(types.SimpleNamespace(config=config, encoder=encoder, rows={"pretrain": rows}))


def test_pretraining_text_of_a_dialogue(rows, encoder):
    """x is read, y_l is learnt or not, c and y_w always are; both ways the text is the same."""
    row, text = rows[0], encoder.text
    ((read, review, ask, better),) = turns(encoder, rows[:1], refinement_share=1.0)
    assert read == encoder.policy_prompt(row.prompt) + encoder.response(row.rejected)
    assert (text(review[:-1]), text(better[:-1])) == (row.reflection, row.chosen)
    assert read + review + ask == encoder.refinement_prompt(row.prompt, row.rejected, row.reflection)
    ((read_2, learnt_2, ask_2, better_2),) = turns(encoder, rows[:1], refinement_share=1.0, learn_rejected=True)
    assert read_2 == encoder.policy_prompt(row.prompt)
    assert learnt_2 == encoder.response(row.rejected) + encoder.response(row.reflection)
    assert (read_2 + learnt_2, ask_2, better_2) == (read + review, ask, better)


def test_pretraining_text_without_a_better_answer(rows, encoder):
    """(x, y_w, c): c finds everything met."""
    for row, (read, learnt) in zip(rows, turns(encoder, rows, refinement_share=0.0), strict=True):
        assert read == encoder.policy_prompt(row.prompt)
        good = encoder.response(row.chosen)
        assert learnt[: len(good)] == good
        review = synthetic.reflect(row.requirements, [True] * len(row.requirements))
        assert learnt[len(good) :] == encoder.response(review)
        assert review.count(" yes") == len(row.requirements)


def test_the_share_of_dialogues(rows, encoder):
    made = turns(encoder, synthetic.generate(1, 0, 600), refinement_share=0.7)
    assert 0.64 < sum(len(row) == 4 for row in made) / 600 < 0.76  # 3 standard deviations: 0.056


def test_rows_without_reflection_are_two_plain_rows(rows, encoder):
    row = dataclasses.replace(rows[0], reflection="")
    x = encoder.policy_prompt(row.prompt)
    assert turns(encoder, [row]) == [(x, encoder.response(row.chosen)), (x, encoder.response(row.rejected))]


# Ids by hand


class WordTokenizer:
    """One id per word, so that whole rows can be written down: words of templates from 10, x 20, w 21, l 22."""

    vocab_size, pad_id, bos_id, eos_id = 32, 0, 1, 2
    control_ids = {"<<Candidate>>": 4, "<<Improved>>": 5}
    words = {"\n": 6, "Human:": 10, "Assistant:": 11, "Improve": 12, "it.": 13, "x": 20, "w": 21, "l": 22, "c": 23}

    def encode(self, text):
        return [self.words[word] for word in re.findall("|".join(map(re.escape, self.words)), text)]

    def decode(self, ids):
        names = {i: word for word, i in self.words.items()}
        return " ".join(names[i] for i in ids).replace(" \n ", "\n")


ROW = PreferenceExample(prompt="x", rejected="l", chosen="w")
# Human: x Assistant: <<Candidate>> y_2 <<Improved>> y_1 EOS: y_2 is the ref_response, y_1 what is scored.
GAP_ROWS = {
    ("w", "l"): [1, 10, 20, 11, 4, 22, 5, 21, 2],
    ("w", "w"): [1, 10, 20, 11, 4, 21, 5, 21, 2],
    ("l", "l"): [1, 10, 20, 11, 4, 22, 5, 22, 2],
    ("l", "w"): [1, 10, 20, 11, 4, 21, 5, 22, 2],
}
POLICY_ROWS = {"w": [1, 10, 20, 11, 21, 2], "l": [1, 10, 20, 11, 22, 2]}


@pytest.fixture(scope="module")
def words():
    return encode.make_encoder(WordTokenizer(), DataConfig(prompt_window=4, response_window=4, reflection_window=4))


def test_gap_groups_by_hand(words):
    (group,) = pit.gap_groups(words, [ROW])
    assert list(group) == [GAP_ROWS[pairing] for pairing in GAP_PAIRINGS]


def test_policy_groups_by_hand(words):
    assert common.policy_groups(words, [ROW]) == [(POLICY_ROWS["w"], POLICY_ROWS["l"])]


@pytest.fixture
def scored(monkeypatch):
    """(model, groups) of every call of score_groups. A row scores 10 y_1 - y_2, or 10 y without a candidate."""
    calls = []

    def score_groups(model, params, groups, batch_size=64):
        assert model == params
        calls.append((model, [[list(ids) for ids in group] for group in groups]))
        number = lambda ids: 10.0 * ids[-2] - (ids[5] if 4 in ids else 0.0)  # noqa: E731
        return np.array([[number(ids) for ids in group] for group in groups], np.float32)

    monkeypatch.setattr(common, "score_groups", score_groups)
    monkeypatch.setattr(common, "model_of", lambda context, stage: stage)
    monkeypatch.setattr(common, "load_model", lambda context, stage: stage)
    return calls


def gap_context(encoder, loss):
    workdir = types.SimpleNamespace(model_digest=lambda stage: stage)
    return types.SimpleNamespace(config=PitConfig(r_pit=RewardModelConfig(loss=loss)), encoder=encoder, workdir=workdir)


TRIPLES = [("x", [words_of[y1]], [words_of[y2]]) for words_of in [WordTokenizer.words] for y1, y2 in GAP_PAIRINGS]


def test_gap_scores_read_the_gap_form(words, scored):
    """The four rows are those of gap_groups; with y_w = 21 and y_l = 22, r_gap(w, l) is 210 - 22."""
    score = pit.gap_scorer(gap_context(words, "gap"))
    gaps = score(TRIPLES, pairings=4)
    assert scored == [("r_pit", [[GAP_ROWS[pairing] for pairing in GAP_PAIRINGS]])]
    np.testing.assert_array_equal(gaps, [[188, 189, 198, 199]])
    np.testing.assert_array_equal(score(TRIPLES, pairings=2), [[188, 189], [198, 199]])
    np.testing.assert_array_equal(pit.gap_scorer(gap_context(words, "mse"))(TRIPLES[:1]), [[188]])


def test_gap_scores_by_a_difference_of_r_p(words, scored):
    """r(x, y_1) - r(x, y_2): 210 - 220 for (w, l), and 0 where both are one answer."""
    gaps = pit.gap_scorer(gap_context(words, "r_p_difference"))(TRIPLES, pairings=4)
    assert scored == [("r_p", [[POLICY_ROWS[y] for y in pairing] for pairing in GAP_PAIRINGS])]
    np.testing.assert_array_equal(gaps, [[-10, 0, 0, 10]])


@pytest.mark.parametrize("loss", ["gap", "r_p_difference"])
def test_gap_scores_of_nothing(words, scored, loss):
    assert pit.gap_scorer(gap_context(words, loss))([], pairings=2).shape == (0, 2)
    assert scored == []


def answer_set(name, *ids):
    return store.AnswerSet(name, {"name": name}, [Step((y,)) for y in ids], [str(y) for y in ids], 0.0)


def test_the_evaluator_scores_each_answer_in_its_place(words, scored, tmp_path):
    """Policy form, one row per answer; with w = 21, l = 22 and c = 23 the scores say which answer it was."""
    w, l, c = (WordTokenizer.words[word] for word in "wlc")
    judge = judges.reward_model_judge(gap_context(words, "gap"), "evaluator", tmp_path, [ROW, ROW])
    pit_answers, fresh = answer_set("pit", c, w), answer_set("fresh", l, c)
    assert judge.scores(pit_answers).tolist() == [230, 210]
    verdicts = judge.compare(pit_answers, fresh)
    assert verdicts.outcome.tolist() == [1, -1] and verdicts.mask.all()
    assert scored == [("evaluator", [[[1, 10, 20, 11, y, 2]] for y in ys]) for ys in ((c, w), (l, c))]
    again = judges.reward_model_judge(gap_context(words, "gap"), "evaluator", tmp_path, [ROW, ROW])
    assert again.scores(fresh).tolist() == [220, 230] and len(scored) == 2, "scores are kept on disk"


def test_r_pit_is_asked_in_both_orders(words, scored, tmp_path):
    """score_groups of the fixture gives 10 * y_1 - y_2: the order 22 over 21 is 220 - 21 against 210 - 22."""
    w, l = (WordTokenizer.words[word] for word in "wl")
    judge = judges.gap_judge(gap_context(words, "gap"), tmp_path, [ROW, ROW, ROW])
    first, second = answer_set("first", w, l, w), answer_set("second", l, w, w)
    assert judge.compare(first, second).outcome.tolist() == [-1, 1, 0]
    ((stage, groups),) = scored
    assert stage == "r_pit" and groups[0] == [GAP_ROWS["w", "l"], GAP_ROWS["l", "w"]]
    assert judge.compare(second, first).outcome.tolist() == [1, -1, 0] and len(scored) == 1, "the same verdicts, turned"
    assert judge.details(first, second)["gap"] == [188, 199, 189]


def test_response_ids_are_what_stands_before_eos():
    """EOS is taken off where there is one, padding never was part of it, and id 0 of a response stays."""
    prompts = batches.prompt_rows([[1, 9], [1], [1, 9, 9]], 3)
    rollout = sampling.append_ids(prompts, [[7, 0, 8], [], [6, 6, 6, 6]], 4, 2)
    assert common.response_ids(rollout, 2) == [[7, 0, 8], [], [6, 6, 6, 6]]


# Thoughts


def test_a_response_behind_its_thoughts_by_hand(words):
    c, line, w, l = (WordTokenizer.words[word] for word in ("c", "\n", "w", "l"))
    read = functools.partial(improve.without_thoughts, dataclasses.replace(words, response_window=4))
    assert read([c, c, line, w, l]) == (w, l)
    assert read([c, line, w, line, l]) == (w, line, l), "further line breaks are the response's own"
    assert read([c, line, w, l, w, l, w, l]) == (w, l, w, l), "it ends at the window of 4"
    assert read([c, c, w]) == (c, c, w), "without a line break there are no thoughts"
    assert read([w, l, w, l, c]) == (w, l, w, l)


def test_the_target_of_the_sft_is_read_back(rows, encoder):
    """What appendix K's SFT learns, c, a line break and y_w, gives y_w."""
    for row in rows:
        learnt = encoder.response(f"{row.reflection}\n{row.chosen}")[:-1]
        assert list(improve.without_thoughts(encoder, learnt)) == encoder.response(row.chosen)[:-1]


# Models: each stage's sizes are its own, so that a wrong one is seen

SIZES = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
POLICY, PIT, REWARD = (dataclasses.replace(SIZES, d_model=d) for d in (16, 24, 32))


def make_context(root, encoder, rows=(), **fields):
    """A context whose policy, M_PIT and reward models are 16, 24 and 32 wide."""
    config = PitConfig(
        data=DataConfig(prompt_window=48, response_window=32),
        policy_model=POLICY,
        pit_model=PIT,
        reward_model=REWARD,
        **fields,
    )
    encoder = dataclasses.replace(encoder, prompt_window=48, response_window=32)
    workdir = Workdir(root / "w", config)
    splits = {"sft": list(rows), "rm": list(rows), "rl": list(rows), "selection": list(rows)}
    return Context(config, workdir, MetricsWriter(workdir.root), rows=splits, encoder=encoder)


def filled(context, stage, value):
    """Parameters of a stage that all are one number, by which they are known again."""
    spec = lambda x: x.sharding.spec if x.sharding else jax.P()  # noqa: E731
    full = lambda x: jax.device_put(np.full(x.shape, value, x.dtype), spec(x))  # noqa: E731
    return jax.tree.map(full, common.shapes(common.model_of(context, stage)))


def mark(params):
    """The number of `filled`."""
    (value,) = {float(v) for x in jax.tree.leaves(params) for v in np.unique(x)}
    return value


def test_model_of_every_stage(tmp_path, encoder):
    curriculum, arms = ("data", "policy", "pit"), ("second_rl_only", "longer_sft")
    context = make_context(tmp_path, encoder, curriculum=curriculum, arms=arms)
    expected = {
        "sft_policy": (Transformer, 16),
        "sft_pit": (Transformer, 24),
        "r_p": (ScalarModel, 32),
        "r_pit": (ScalarModel, 32),
        "evaluator": (ScalarModel, 32),
        "rl_policy": (Transformer, 16),
        "rl_pit_1": (Transformer, 24),
        "rl_pit_2": (Transformer, 24),
        "rl_pit_3": (Transformer, 24),
        "arm_second_rl_only": (Transformer, 24),
        "arm_longer_sft": (Transformer, 16),
    }
    trained = set(pit.stage_names(context.config)) - {"data", "evaluate"}
    assert set(expected) == {name for name in trained if not name.startswith("pretrain")}
    for stage, (kind, width) in expected.items():
        model = common.model_of(context, stage)
        assert (type(model), model.config.d_model) == (kind, width), stage
        assert model.config.vocab_size == batches.round_up(encoder.tokenizer.vocab_size, 128)


def test_ppo_scores_the_row_that_r_pit_was_trained_on(tmp_path, rows, encoder):
    """PIT prompt, response and EOS: the same ids, and the same score though the padding lies elsewhere."""
    context = make_context(tmp_path, encoder)
    ids = lambda text: encoder.response(text)[:-1]  # noqa: E731
    answers = {"w": lambda r: r.chosen, "l": lambda r: r.rejected}
    model = common.model_of(context, "r_pit")
    params = jax.tree.map(lambda x: 3 * x, common.init_params(model, jax.random.key(1)))
    groups = pit.gap_groups(encoder, rows[:4])
    expected = common.score_groups(model, params, groups, batch_size=4)
    assert np.std(expected) > 0.1
    scores = train_state.jit_step(functools.partial(ppo.rollout_scores, model))
    for i, (y1, y2) in enumerate(GAP_PAIRINGS):
        prompts = [encoder.pit_prompt(r.prompt, ids(answers[y2](r))) for r in rows[:4]]
        arrays = batches.prompt_rows(prompts, batches.round_up(context.encoder.pit_window))
        responses = [ids(answers[y1](r)) for r in rows[:4]]
        rollout = sampling.append_ids(arrays, responses, 32, encoder.tokenizer.eos_id)
        for row, real, group in zip(rollout.tokens, rollout.segments > 0, groups, strict=True):
            assert list(row[real]) == group[i]
        got = scores(params, sharding.shard_batch(rollout))
        # Padded on the other side, and apart from the rows of its group: float32 sums run in another order.
        np.testing.assert_allclose(got, expected[:, i], rtol=1e-6, atol=5e-6)


# References


def test_references_of_the_data_are_both_answers(tmp_path, rows, encoder):
    context = make_context(tmp_path, encoder)
    references = pit.References(context, "data", "sft_pit")
    asked = [rows[0], rows[0], rows[1]]
    got = references(asked, [False, True, True], jax.random.key(0), 0)
    texts = (rows[0].rejected, rows[0].chosen, rows[1].chosen)
    assert list(got) == [encoder.tokenizer.encode(text) for text in texts]


@pytest.fixture
def drawn(monkeypatch):
    """Every call of common.sample: (d_model, mark, prompts, key, rest); it answers with one id per call and row."""
    calls = []

    def sample(model, params, prompts, key, **rest):
        calls.append((model.config.d_model, mark(params), list(prompts), tuple(jax.random.key_data(key)), rest))
        return [[100 * len(calls) + i] for i in range(len(prompts))]

    monkeypatch.setattr(common, "sample", sample)
    return calls


def rl_context(root, encoder, rows, temperature=0.5):
    """A context in which M_P^RL is marked 5 and M_PIT of the second round 7."""
    context = make_context(root, encoder, rows, ppo_pit=PPOConfig(temperature=temperature))
    for stage, value in (("rl_policy", 5.0), ("rl_pit_1", 6.0), ("rl_pit_2", 7.0)):
        context.workdir.save_model(stage, filled(context, stage, value))
    return context


def test_a_sample_does_not_depend_on_the_length_that_prompts_are_padded_to(tmp_path, rows, encoder, monkeypatch):
    context = make_context(tmp_path, encoder)
    model = common.model_of(context, "sft_policy")
    params = jax.tree.map(lambda x: 3 * x, common.init_params(model, jax.random.key(1)))
    prompts = [encoder.policy_prompt(r.prompt) for r in rows[:6]]
    settings, eos = SamplingConfig(max_new_tokens=4), encoder.tokenizer.eos_id
    ask = lambda: common.sample(  # noqa: E731
        model, params, prompts, jax.random.key(0), window=256, settings=settings, eos_id=eos, batch_size=4
    )
    shapes, prompt_rows = [], batches.prompt_rows
    monkeypatch.setattr(batches, "prompt_rows", lambda some, n: shapes.append(n) or prompt_rows(some, n))
    found = ask()
    monkeypatch.setattr(batches, "longest_prompt_length", lambda prompts, window: window)
    assert found == ask() and len(set(map(tuple, found))) > 3
    assert shapes == [128, 128, 256, 256]


def test_references_of_the_policy(tmp_path, rows, encoder, drawn):
    """M_P^RL is asked for x in its own form, at the temperature of the round, for a response window."""
    context = rl_context(tmp_path, encoder, rows)
    key = jax.random.key(3)
    got = pit.References(context, "policy", "rl_pit_2")(rows[:2], [False, True], key, 1)
    assert got == [[100], [101]]
    ((width, value, prompts, used, rest),) = drawn
    assert (width, value) == (16, 5.0)
    assert prompts == [encoder.policy_prompt(r.prompt) for r in rows[:2]]
    assert used == tuple(jax.random.key_data(key))
    assert (rest["settings"].temperature, rest["settings"].max_new_tokens) == (0.5, 32)
    assert (rest["window"], rest["eos_id"]) == (context.encoder.policy_window, encoder.tokenizer.eos_id)


def test_references_of_pit_improve_the_policys(tmp_path, rows, encoder, drawn):
    """M_PIT of the round before, named by the caller, reads M_P^RL's answer; the noise of the two is not shared."""
    context = rl_context(tmp_path, encoder, rows)
    got = pit.References(context, "pit", "rl_pit_2")(rows[:2], [False, False], jax.random.key(3), 0)
    assert got == [[200], [201]]
    (width, value, prompts, used, _), (pit_width, pit_value, pit_prompts, pit_used, rest) = drawn
    assert ((width, value), (pit_width, pit_value)) == ((16, 5.0), (24, 7.0))
    assert prompts == [encoder.policy_prompt(r.prompt) for r in rows[:2]]
    assert pit_prompts == [encoder.pit_prompt(r.prompt, y) for r, y in zip(rows[:2], ([100], [101]), strict=True)]
    assert used != pit_used
    assert rest["window"] == context.encoder.pit_window


@pytest.mark.parametrize(("saved", "in_turn"), [((0, 10, 20, 30), (10, 20, 10)), ((0, 10), (0, 10, 0))])
def test_references_of_checkpoints_come_in_turn(tmp_path, rows, encoder, drawn, saved, in_turn):
    """Intermediate ones, neither the first nor the last; where there are none of these, all."""
    context = rl_context(tmp_path, encoder, rows)
    candidates = context.workdir.candidates("rl_policy")
    for step in saved:
        candidates.add(step, filled(context, "rl_policy", float(step)), {"score": 0.0})
    references = pit.References(context, "policy_checkpoint", "sft_pit")
    for turn in range(3):
        references(rows[:2], [False, False], jax.random.key(0), turn)
    assert [(width, value) for width, value, *_ in drawn] == [(16, float(step)) for step in in_turn]


def test_references_of_srt_are_its_refinements(tmp_path, rows, encoder, drawn):
    """In turn where a prompt has several; rows without one are none of the round, and in a test M_P^RL answers."""
    context = rl_context(tmp_path / "run", encoder, rows)
    long = " ".join(["tea"] * 60)
    found = [(rows[0], "a b"), (rows[1], "c"), (rows[3], "d"), (rows[5], long), (rows[6], None), (rows[7], "")]
    folder = tmp_path / "srt" / "feedback"
    folder.mkdir(parents=True)
    for name, records in (("critic_feedback", found), ("self_feedback_1", [(rows[0], "e")]), ("x.unfinished", [])):
        lines = [json.dumps({"instruction": row.prompt, "refinement": text}) + "\n" for row, text in records]
        (folder / f"{name}.jsonl").write_text("".join(lines) or "not a record\n")
    context.config = dataclasses.replace(context.config, curriculum=("srt",), srt_workdir=str(tmp_path / "srt"))
    references = pit.References(context, "srt", "sft_pit", "rl_pit_1")
    assert references.rows(rows, 3) == [rows[0], rows[1], rows[3]]
    with pytest.raises(ValueError, match="refinements for 3 of the .* prompts of this round, and a batch takes 4"):
        references.rows(rows, 4)
    encode = encoder.tokenizer.encode
    for turn, first in enumerate(("a b", "e", "a b")):
        asked = [rows[0], rows[3], rows[1]]
        got = references(asked, [False] * 3, jax.random.key(0), turn)
        assert got == [encode(text) for text in (first, "d", "c")] and not drawn
    assert references(rows[:3], [False] * 3, jax.random.key(0), 0) == [[100], [101], [102]]
    assert drawn[0][:2] == (16, 5.0), "M_P^RL"
    assert pit.References(context, "data", "sft_pit").rows(rows, 99) is rows, "other sources have references for all"
    # What the first start has read stays, whatever becomes of the run of SRT.
    (folder / "critic_feedback.jsonl").write_text(json.dumps({"instruction": rows[2].prompt, "refinement": "z"}) + "\n")
    again = pit.References(context, "srt", "sft_pit", "rl_pit_1")
    assert again.refinements == references.refinements
    context.workdir.discard("rl_pit_1")
    assert rows[2].prompt in pit.References(context, "srt", "sft_pit", "rl_pit_1").refinements
    context.workdir.discard("rl_pit_1")
    (folder / "critic_feedback.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match="has a line that is no record of SRT"):
        pit.References(context, "srt", "sft_pit", "rl_pit_1")


def test_a_round_on_refinements_of_srt_is_checked_first(tmp_path):
    config = PitConfig(curriculum=("data", "srt"), srt_workdir=str(tmp_path))
    pit.check(config, {"rl_pit_1"})
    with pytest.raises(ValueError, match="has no records: name a run of SRT"):
        pit.check(config, {"rl_pit_1", "rl_pit_2"})
    with pytest.raises(ValueError, match="set --config.srt_workdir=FOLDER"):
        PitConfig(curriculum=("srt",))


def test_references_are_a_function_of_the_key(tmp_path, rows, encoder):
    """Random models: one answer per row, the same from the same key and another from another."""
    context = make_context(tmp_path, encoder, rows)
    for stage, seed in (("rl_policy", 0), ("sft_pit", 1)):
        params = common.init_params(common.model_of(context, stage), jax.random.key(seed))
        context.workdir.save_model(stage, params)
    for source in ("policy", "pit"):
        references = pit.References(context, source, "sft_pit")
        ask = lambda seed: references(rows[:4], [False] * 4, jax.random.key(seed), 0)  # noqa: B023, E731
        first = ask(0)
        assert len(first) == 4 and all(0 < len(y) <= 32 for y in first)
        assert ask(0) == first != ask(1)


# Choice of a reward model


def test_a_head_without_its_backbone_is_the_head_with_it():
    model = ScalarModel(REWARD)
    whole = common.init_params(model, jax.random.key(3))["params"]
    head = common.init_params(model, jax.random.key(3), without="backbone")["params"]
    assert sorted(whole) == ["backbone", "bias", "head"] and sorted(head) == ["bias", "head"]
    assert np.array_equal(whole["head"], head["head"]) and np.any(head["head"])


def test_rounds_with_the_same_settings_share_their_programs(tmp_path, rows, encoder, monkeypatch):
    made, given = [], []
    monkeypatch.setattr(pit, "ppo_programs", lambda *settings: made.append(settings) or settings)
    monkeypatch.setattr(pit, "References", lambda *_: None)
    monkeypatch.setattr(pit, "rl_stage", lambda *_, programs: given.append(programs(1, 2)))
    functions = pit.stage_functions(make_context(tmp_path, encoder, rows))
    functions["rl_pit_1"](), functions["rl_pit_2"]()
    assert given == [(1, 2)] * 2 and made == [(1, 2)]


@pytest.mark.parametrize(
    ("stage", "shares", "chosen"),
    [
        ("r_p", [0.25, 0.75, 0.5, 0.75, 0.5], 3),  # of equal accuracies, the later
        ("r_p", [1.0, 0.75, 0.5, 0.75, 0.5], 0),
        ("r_pit", [0.25, 0.5, 1.0, 0.5, 0.0], 2),
    ],
)
def test_the_best_reward_model_is_kept(tmp_path, rows, encoder, monkeypatch, stage, shares, chosen):
    """Step k adds 1 to every parameter, so a model tells after which step it was taken. Four selection rows."""
    settings = RewardModelConfig(num_steps=4, eval_every=1, batch_size=2)
    context = make_context(tmp_path, encoder, rows[:4], r_p=settings, r_pit=settings)
    backbone = filled(context, stage, 0.0)["params"]["backbone"]
    context.workdir.save_model("pretrain_reward", {"params": backbone})
    measured = iter(shares)

    def score_groups(model, params, groups, batch_size=64):
        scores = np.full((len(groups), 2 if stage == "r_p" else 4), 0.5)  # (w, w) and (l, l) decide nothing
        right = np.arange(len(groups)) < next(measured) * len(groups)
        scores[:, 0], scores[:, -1] = right, ~right
        return scores

    def make_train_step(*args, **settings):
        add = lambda state: state._replace(params=jax.tree.map(lambda x: x + 1, state.params))  # noqa: E731
        return lambda state, batch: (add(state), {"loss": (np.float32(1.0), np.float32(1.0))})

    monkeypatch.setattr(common, "score_groups", score_groups)
    monkeypatch.setattr(pit.reward_model, "make_train_step", make_train_step)
    record = pit.stage_functions(context)[stage]()
    assert (record["chosen_step"], record["selection_accuracy"]) == (chosen, shares[chosen])
    left = common.load_model(context, stage)["params"]
    assert mark(left["backbone"]) == mark(left["bias"]) == chosen
    assert next(measured, None) is None, "it was measured before the first step and after each"
