"""Reading answers to improve: what a line gives, and what is said of a broken one."""

import gzip
import json

import pytest

from pit_jax.data.answers import Answer, read_answers
from pit_jax.data.chat import split_turns
from pit_jax.data.sources import DataError


def read(tmp_path, *lines, name="answers.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return list(read_answers(path))


def turn(role, content):
    return {"role": role, "content": content}


def test_prompts_with_and_without_a_response(tmp_path):
    lines = {"prompt": "x", "response": "y", "id": 7}, {"prompt": "x"}, {"prompt": "x", "response": None}
    found = read(tmp_path, *lines, b"", {"prompt": "x", "response": ""})
    assert found == [Answer(1, "x", "y", id=7), Answer(2, "x"), Answer(3, "x"), Answer(5, "x")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "reponse": "y"}, "there is no field 'response', but 'reponse'"),
        ({"prompt": "x", "answer": "y"}, "there is no field 'response', but 'answer'"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "z"}]}, "'messages' and 'prompt' are both there"),
        ({"response": "x", "messages": [{"role": "user", "content": "z"}]}, "'messages' and 'response' are both there"),
    ],
)
def test_an_answer_is_never_lost_in_silence(tmp_path, row, message):
    (found,) = read(tmp_path, row)
    assert message in found.error and not found.prompt


def test_messages(tmp_path):
    user, answer = turn("user", "Name a fruit."), turn("assistant", "Kale.")
    dialogue = [user, answer, turn("user", "No, a fruit."), turn("assistant", "An apple.")]
    found = read(tmp_path, {"messages": [user]}, {"messages": [user, answer]}, {"messages": dialogue})
    assert found[:2] == [Answer(1, "Name a fruit."), Answer(2, "Name a fruit.", "Kale.")]
    prompt = "Name a fruit.\n\nAssistant: Kale.\n\nHuman: No, a fruit."
    assert found[2] == Answer(3, prompt, "An apple."), "turns before the last as HH-RLHF writes them"


def test_texts_that_quote_turns_stay_one_turn(tmp_path):
    quote = "Mend:\n\nAssistant: I hate you.\n\nHuman: go on\n\n"
    messages = [turn("user", quote), turn("assistant", quote), turn("user", quote)]
    one, dialogue = read(tmp_path, {"prompt": quote, "response": quote}, {"messages": messages})
    kept = "Mend:\n\n Assistant: I hate you.\n\n Human: go on"
    assert split_turns(one.prompt) == [kept] and one.response == quote
    assert split_turns(dialogue.prompt) == [kept] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"response": "y"}, "field 'prompt' is missing; the row has ['response']"),
        ({"prompt": 5}, "field 'prompt' is a JSON number"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x", "response": ["y"]}, "field 'response' is a JSON array"),
        ({"messages": []}, "at least one turn"),
        ({"messages": "x"}, "at least one turn"),
        ({"messages": ["x"]}, "field 'messages[0]' must be an object"),
        ({"messages": [turn("system", "x")]}, "field 'messages[0].role' is 'system', but 'user' is next in turn"),
        ({"messages": [turn("user", "x"), turn("user", "y")]}, "field 'messages[1].role' is 'user', but 'assistant'"),
        ({"messages": [{"role": "user"}]}, "field 'messages[0].content' is missing"),
        (["prompt"], "is a JSON array"),
        (b"{", "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 28 of the file"),
        (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_broken_line_is_named_and_the_rest_is_read(tmp_path, line, message):
    before, broken, after = read(tmp_path, {"prompt": "a"}, line, {"prompt": "b"})
    assert (before, after) == (Answer(1, "a"), Answer(3, "b"))
    assert broken.number == 2 and broken.error.startswith("line 2: ") and message in broken.error


def test_compressed_files_and_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "answers.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "x"}\n'))
    assert list(read_answers(path)) == [Answer(1, "x")]
    with pytest.raises(DataError, match="no such file"):
        list(read_answers(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        list(read_answers(tmp_path))
    with pytest.raises(DataError, match="no rows"):
        read(tmp_path, b"", b"  ")
