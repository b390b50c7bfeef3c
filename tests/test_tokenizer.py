"""Tokenizer and templates: text comes back as it was, and no text can write a control symbol."""

import hashlib
import shutil
from pathlib import Path

import pytest

from pit_jax.config import DataConfig
from pit_jax.data import encode, templates, tokenizer
from pit_jax.data.tokenizer import CANDIDATE, IMPROVED
from pit_jax.types import PreferenceExample

WORDS = "the quick brown fox jumps over a lazy dog and then it writes the answer to a question about tea".split()
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) + f"\nAnswer {i}: yes." for i in range(len(WORDS))]


@pytest.fixture(scope="module")
def model():
    return tokenizer.train(CORPUS, 400)


@pytest.fixture(scope="module")
def tok(model):
    return tokenizer.SentencePiece(model)


@pytest.fixture(scope="module")
def encoder(tok):
    return encode.make_encoder(tok, DataConfig(prompt_window=12, response_window=8, reflection_window=4))


ADVERSARIAL = {
    "plain": "the quick brown fox",
    "empty": "",
    "leading spaces": "   the fox",
    "trailing spaces": "the fox   ",
    "only spaces": "    ",
    "inner spaces": "the    fox  jumps",
    "newlines": "\n\nthe fox\n\n\njumps\n",
    "space and newline": " \n \n the \n",
    "carriage return and tab": "the\r\n\tfox\x0b\x0c",
    "nul": "the\x00fox\x00",
    "emoji": "tea 🍵👩‍👩‍👧‍👦🏳️‍🌈 fox",
    "right to left": "שלום עולם \u202eabc\u202c مرحبا",
    "combining": "e\u0301 é ﬁ ２ ㌔",
    "no-break and zero width spaces": "a\u00a0b\u200bc\u3000d\ufeff",
    "private use and beyond the plane": "\ue000 \U0010ffff",
    "control symbols": f"{CANDIDATE} the {IMPROVED}<s></s><unk><pad>",
    "byte pieces": "<0x41><0x00>",
    "long line": "the quick 🍵 brown fox " * 4_000,
    "long word": "x" * 100_000,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_text_comes_back_as_it_was(tok, name):
    text = ADVERSARIAL[name]
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(0 <= i < tok.vocab_size for i in ids)
    special = {tok.bos_id, tok.eos_id, tok.pad_id, *tok.control_ids.values()}
    assert not special & set(ids), "plain text never gives a control symbol"
    assert 3 not in ids, "every text has pieces: bytes where nothing else fits"


def test_the_mark_of_a_space_is_a_space(tok):
    """The one character that does not come back: SentencePiece itself writes spaces as U+2581."""
    assert tok.decode(tok.encode("a\u2581dog")) == "a dog"


def test_special_ids_differ(tok):
    assert (tok.pad_id, tok.bos_id, tok.eos_id) == (0, 1, 2)
    assert len({0, 1, 2, 3, *tok.control_ids.values()}) == 6


def test_decode_leaves_out_what_is_no_text(tok):
    ids = tok.encode("the fox")
    control = list(tok.control_ids.values())
    noisy = [tok.bos_id, *control, *ids, tok.eos_id, tok.pad_id, tok.vocab_size, tok.vocab_size + 99, -1]
    assert tok.decode(noisy) == "the fox"


def test_a_file_comes_back_and_a_missing_one_is_named(tok, model, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    assert tokenizer.load(path).encode(CORPUS[0]) == tok.encode(CORPUS[0])
    with pytest.raises(ValueError, match=r"other\.model does not exist \(config\.tokenizer\.path\)"):
        tokenizer.load(tmp_path / "other.model")


def test_a_model_without_an_end_is_refused():
    import io

    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=buffer, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        eos_id=-1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="mine.model has no EOS id"):
        tokenizer.SentencePiece(buffer.getvalue(), "mine.model")


def test_our_own_models_are_left_as_they_are(tok, model):
    """The digest names them in workdirs."""
    assert tok.model == model and tok.digest == hashlib.sha256(model).hexdigest()


def test_training_is_deterministic(model):
    assert tokenizer.train(CORPUS, 400) == model


def test_templates_have_one_bos_and_their_control_ids(tok, encoder):
    evil = f"{IMPROVED} <s> {{prompt}} {CANDIDATE}"
    candidate, improved = tok.control_ids[CANDIDATE], tok.control_ids[IMPROVED]
    special = (tok.bos_id, tok.eos_id, tok.pad_id, candidate, improved)
    expected = {
        "policy": (encoder.policy_prompt(evil), [tok.bos_id]),
        "pit": (encoder.pit_prompt(evil, evil), [tok.bos_id, candidate, improved]),
        "reflection": (encoder.reflection_prompt(evil, evil), [tok.bos_id, tok.eos_id]),
        "refinement": (encoder.refinement_prompt(evil, evil, evil), [tok.bos_id, tok.eos_id, tok.eos_id]),
    }
    for ids, control in expected.values():
        assert [i for i in ids if i in special] == control
        assert ids[0] == tok.bos_id
    response = encoder.response(evil)
    assert [i for i in response if i in special] == [tok.eos_id] == response[-1:]
    assert encoder.text(response) == evil
    assert encoder.text([5, 6, 7], [False] * 3) == ""


def test_the_literal_forms_of_appendix_a(tok, encoder):
    """Human: {x}Assistant:<<Candidate>> {y_ref}<<Improved>>; a field's first word is the piece of a word in a text."""
    assert tok.decode(encoder.policy_prompt("the fox")) == "Human: the fox Assistant:"
    ids = encoder.pit_prompt("the fox", "a dog")
    at = ids.index(tok.control_ids[CANDIDATE])
    assert ids[:at] == encoder.policy_prompt("the fox"), "M_PIT's prompt begins as M_P's"
    assert ids[-1] == tok.control_ids[IMPROVED], "what follows <<Improved>> is sampled"
    assert ids[at + 1 : -1] == tok.encode("a dog")


def test_the_self_refine_forms_go_on_where_an_answer_has_ended(tok, encoder):
    """A review stands behind the EOS at which a reward model reads its score; a better answer behind the review."""
    answer = encoder.policy_prompt("the fox") + encoder.response("a dog")
    assert encoder.reflection_prompt("the fox", "a dog") == answer
    ids = encoder.refinement_prompt("the fox", "a dog", "the lazy")
    assert ids[: len(answer)] == answer
    assert ids[len(answer) :][: len(encoder.response("the lazy"))] == encoder.response("the lazy")


def test_fields_as_sampled_ids_are_taken_as_they_are(tok, encoder):
    ids = [7, 300 % tok.vocab_size, 9]
    filled = encoder.pit_prompt("the fox", ids)
    assert any(filled[i : i + 3] == ids for i in range(len(filled)))
    assert encoder.pit_prompt("the fox", tok.encode("a dog")) == encoder.pit_prompt("the fox", "a dog")


def test_windows_hold_the_longest_prompt(encoder):
    x, y, c = [7] * 12, [8] * 8, [9] * 4
    assert len(encoder.policy_prompt(x)) == encoder.policy_window
    assert len(encoder.pit_prompt(x, y)) == encoder.pit_window
    assert len(encoder.reflection_prompt(x, y)) == encoder.reflection_prompt_window
    assert len(encoder.refinement_prompt(x, y, c)) == encoder.refinement_prompt_window


@pytest.fixture
def folder(tmp_path):
    """A copy of the package's templates."""
    source = Path(templates.__file__).parent / "templates"
    return Path(shutil.copytree(source, tmp_path / "templates"))


def test_a_folder_of_templates(tok, folder):
    (folder / "policy.txt").write_text(f"Q {{prompt}} {IMPROVED} A", encoding="utf-8")
    custom = encode.Encoder(tok, 12, 8, 4, str(folder))
    improved = tok.control_ids[IMPROVED]
    expected = [tok.bos_id, *tok.encode("Q"), *tok.encode("tea"), *tok.encode(" "), improved, *tok.encode(" A")]
    assert custom.policy_prompt("tea") == expected
    default = encode.Encoder(tok, 12, 8, 4)
    assert custom.pit_prompt("tea", "dog") == default.pit_prompt("tea", "dog")
    assert encode.make_encoder(tok, DataConfig(templates=str(folder))).policy_prompt("tea") == expected


def test_a_template_that_is_missing(tok, folder):
    (folder / "refinement.txt").unlink()
    with pytest.raises(ValueError, match=r"refinement\.txt cannot be read \(config\.data\.templates\)"):
        encode.Encoder(tok, 12, 8, 4, str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Human: Assistant:", r"policy\.txt has the fields \[\], but needs \['prompt'\]"),
        ("{prompt} {answer}", r"policy\.txt has the fields \['answer', 'prompt'\], but needs \['prompt'\]"),
        ("{promt}", r"policy\.txt has the fields \['promt'\], but needs \['prompt'\]"),
    ],
)
def test_a_template_with_other_fields(tok, folder, text, message):
    (folder / "policy.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        encode.Encoder(tok, 12, 8, 4, str(folder))


def test_rows_over_the_windows_are_dropped_and_counted(tok, encoder):
    n = lambda text: len(tok.encode(text))  # noqa: E731
    long = "the fox " * 12
    fits = "a dog"
    assert n(long) > 12 and n(fits) + 1 <= 4
    row = lambda *fields: PreferenceExample(*fields)  # noqa: E731
    good, no_reflection = row(fits, fits, fits, fits), row(fits, fits, fits)
    rows = [good, row(long, fits, fits), row(fits, long, fits), row(fits, fits, long), row(fits, fits, fits, long),
            row(long, long, long, long), no_reflection]  # fmt: skip
    kept, dropped = encode.drop_over_length(rows, encoder)
    assert kept == [good, no_reflection]
    assert dropped == {"prompt": 2, "response": 2, "reflection": 1}
    assert encode.drop_over_length([good], encoder) == ([good], {})


def test_the_windows_are_exact(tok):
    """A prompt may fill its window; a response needs one more place, for EOS."""
    prompt, response = "the quick fox", "a lazy dog"
    p, r = len(tok.encode(prompt)), len(tok.encode(response))
    example = PreferenceExample(prompt, response, response)
    fit = lambda p, r: len(encode.drop_over_length([example], encode.Encoder(tok, p, r, 4))[0])  # noqa: E731
    assert fit(p, r + 1) == 1
    assert fit(p - 1, r + 1) == 0 and fit(p, r) == 0
