"""Plain text for pretraining, and what word counts alone say of pairs."""

import gzip
import importlib.util
import json
import lzma
import types

import numpy as np
import pytest

from pit_jax.config import PretrainConfig, SFTConfig
from pit_jax.data import batches, texts, tokenizer
from pit_jax.data.sources import DataError
from pit_jax.evaluation import bag_of_words, pit
from pit_jax.types import PreferenceExample


@pytest.fixture(scope="module")
def tokens():
    return tokenizer.SentencePiece(tokenizer.train(["one two three four five six seven"] * 3, 300))


def test_documents_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'{"text": "three", "book": 1}\n{"text": " "}\n'))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"four", mtime=0))
    (tmp_path / "notes.md").write_text("not this")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "b.txt").write_text("nor this")
    assert texts.read(tmp_path) == ["three", "one\n\ntwo\n", "four"]
    assert texts.read(tmp_path / "b.txt") == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"txt": "x"}\n', "a.jsonl, line 1: field 'text' is missing"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 at byte 3 (0xe9)"),
        ("a.txt.gz", gzip.compress(b"abc" * 100, mtime=0)[:-9], "a.txt.gz: cannot be read"),
        ("a.txt", b" \n", "a.txt: there is no text in it"),
        ("a.md", b"x", "no .txt or .jsonl file"),
        ("a.json", b'[{"text": "x"}]', "a.json: text is read from .txt files and from .jsonl"),
        ("a.jsonl.bz2", b"BZh91AY", "a.jsonl.bz2: text is read from .txt"),
    ],
    ids=["field", "encoding", "cut", "empty", "kind", "json", "bz2"],
)
def test_bad_text_names_file_and_place(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        texts.read(tmp_path if name == "a.md" else tmp_path / name)
    assert says in str(error.value)


def test_missing_text(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        texts.read(tmp_path / "gone")


def test_order_is_of_the_text_and_the_seed():
    documents = [f"document {i}" for i in range(50)]
    first = texts.in_order(documents, 0)
    assert first == texts.in_order(documents[::-1], 0) != documents
    assert first != texts.in_order(documents, 1)


def test_sequences_are_the_documents_cut(tokens):
    documents = ["one two three four five six", "seven one"]
    rows = texts.sequences(documents, tokens, 5)
    assert all(bos == [tokens.bos_id] and 1 <= len(ids) <= 4 for bos, ids in rows)
    ids = np.concatenate([ids for _, ids in rows]).tolist()
    assert ids == [i for text in documents for i in (*tokens.encode(text), tokens.eos_id)]
    packed = batches.packed_rows(rows, 5, loss_on_prompt=True)
    assert packed.loss_mask.sum() == len(ids)  # every token but BOS is learnt


def test_sequences_stop_at_a_number_of_tokens(tokens):
    document = "one two three four five six seven"
    whole = sum(len(ids) for _, ids in texts.sequences([document], tokens, 5))
    rows = texts.sequences([document] * 9, tokens, 5, num_tokens=whole + 3)
    assert [len(ids) for _, ids in rows][:-1] == [len(ids) for _, ids in texts.sequences([document], tokens, 5)]
    assert len(rows[-1][1]) == 4  # the row in which the number is reached is whole


def test_text_needs_a_sequence_length():
    with pytest.raises(ValueError, match="sequence_length above 0"):
        PretrainConfig(text="books")
    assert PretrainConfig(text="books", sft=SFTConfig(sequence_length=8)).text == "books"


needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="pip install -e '.[parity]'")


def pair(i: int, chosen: str, rejected: str) -> PreferenceExample:
    filler = json.dumps({"n": i % 7})
    return PreferenceExample("x", f"{filler} {rejected}", f"{filler} {chosen}")


@needs_sklearn
def test_bag_of_words_finds_the_word_that_tells():
    training = [pair(i, "thanks friend", "no friend") for i in range(20)]
    test = [pair(i, "thanks", "no") for i in range(9)] + [pair(0, "no", "thanks")]
    found = bag_of_words.accuracy(training, training[:5], test)
    assert found["n"] == 10 and found["accuracy"] == 0.9


@needs_sklearn
def test_bag_of_words_reads_no_order_of_sides():
    """What is equal on both sides is a tie, and a tie is an error."""
    training = [pair(i, "thanks", "no") for i in range(20)]
    assert bag_of_words.accuracy(training, training, [pair(i, "what", "what") for i in range(4)])["accuracy"] == 0


@needs_sklearn
def test_bag_of_words_chooses_its_penalty_on_the_selection_rows():
    """A strong penalty adds up what it has seen (good 20, best 10), a weak one sees that best beats good."""
    pair = lambda chosen, rejected: PreferenceExample("x", f"is {rejected}", f"is {chosen}")  # noqa: E731
    training = [pair("good", "")] * 30 + [pair("best", "good")] * 10
    strong, weak = [pair("good", "best")] * 8, [pair("best", "good")] * 8
    assert bag_of_words.accuracy(training, weak, weak)["accuracy"] == 1
    assert bag_of_words.accuracy(training, strong, strong)["accuracy"] == 1
    assert bag_of_words.accuracy(training, weak, strong)["accuracy"] == 0
    assert bag_of_words.accuracy(training, strong, weak)["accuracy"] == 0


@needs_sklearn
@pytest.mark.parametrize("rows", [[("no", "yes")], [("a b", "c d"), ("e f", "g")], [("word word", "word")]])
def test_bag_of_words_without_words(rows):
    rows = [PreferenceExample("x", *answers) for answers in rows]
    assert bag_of_words.accuracy(rows, rows, rows) is None


@needs_sklearn
def test_bag_of_words_sees_upper_case():
    rows = [PreferenceExample("Use upper case.", "thanks", "THANKS")] * 4
    assert bag_of_words.accuracy(rows, rows, rows)["accuracy"] == 1


@needs_sklearn
def test_word_counts_learn_from_the_rows_of_r_p_and_are_tested_on_the_test_rows(tmp_path):
    told, other = ([pair(i, *words) for i in range(12)] for words in (("thanks", "no"), ("no", "thanks")))
    rows = {"sft": other, "rm": told, "rl": other, "selection": other[:5], "test": told[:7], "pretrain": []}
    run = types.SimpleNamespace(context=types.SimpleNamespace(rows=rows), maker=types.SimpleNamespace(root=tmp_path))
    found = pit.word_counts(run)
    assert (found["accuracy"], found["n"]) == (1, 7) and pit.word_counts(run) == found
    rows |= {"rm": [PreferenceExample("x", "no", "yes")]}
    assert not pit.word_counts(run) and not pit.word_counts(run)
