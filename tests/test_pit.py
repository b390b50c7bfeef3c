"""What the stages of PIT make of rows: M_pre's text, and where y_l stands in it."""

import dataclasses
import types

import pytest

from pit_jax.config import PitConfig, PretrainConfig
from pit_jax.data import encode, synthetic, synthetic_text, templates, tokenizer
from pit_jax.pipelines import pit


@pytest.fixture(scope="module")
def rows():
    return synthetic.generate(0, 0, 40)


@pytest.fixture(scope="module")
def encoder(rows):
    texts = [text for r in rows for text in (r.prompt, r.rejected, r.chosen, r.reflection)]
    texts += synthetic_text.word_forms(templates.literals())
    return encode.make_encoder(tokenizer.Tokenizer(tokenizer.train(texts, 2048)), PitConfig().data)


def turns(encoder, rows, **settings):
    config = PitConfig(pretrain=PretrainConfig(**settings))
    return pit.pretraining_rows(types.SimpleNamespace(config=config, encoder=encoder, rows={"pretrain": rows}))


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
