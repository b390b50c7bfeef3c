"""Reading the layouts of published preference sets: summaries, columns, chat messages; JSON arrays and Parquet."""

import gzip
import json
import lzma
import os
import pathlib
import sys
import time

import pytest

from pit_jax.config import DataConfig
from pit_jax.data import layouts, sources
from pit_jax.data.chat import split_turns
from pit_jax.data.sources import DataError
from pit_jax.types import PreferenceExample, Requirement

DATA = pathlib.Path(os.environ.get("PIT_JAX_DATA", pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"))


def write(path: pathlib.Path, *rows) -> pathlib.Path:
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return path


def write_parquet(path: pathlib.Path, *rows) -> pathlib.Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install -e '.[parquet]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def error_of(reader, *arguments, **keywords) -> str:
    with pytest.raises(DataError) as error:
        reader(*arguments, **keywords)
    return str(error.value)


def published(*parts: str) -> pathlib.Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}: set PIT_JAX_DATA to the folder of test data")
    return path


# Summaries.

INFO = {"id": "t3_a", "post": "I lost my cat {and} found it.", "title": "My cat", "subreddit": "pets"}
POST = "Summarize this post from r/pets in a sentence or two.\n\nMy cat\n\nI lost my cat {and} found it.\n\n"


def comparison(choice=0, info=INFO, texts=(" Cat found.", " Cat."), **fields) -> dict:
    return {"info": info, "summaries": [{"text": t, "policy": "ref"} for t in texts], "choice": choice} | fields


def test_comparisons_of_summaries(tmp_path):
    article = {"id": "b", "article": "It rained.", "title": "Rain", "site": "cnn", "post": None}
    path = write(
        tmp_path / "batch3.json",
        comparison(0),
        comparison(1, worker="w", split="valid1"),
        comparison(0, article),
        comparison(0, INFO | {"title": None, "subreddit": ""}),
        comparison(None),
        comparison(-1),
        comparison(0, INFO | {"post": " \n"}),
        comparison(0, {"id": "c", "title": "t"}),
        comparison(0, texts=(" Cat.", "Cat. ")),
        comparison(1, texts=(" Cat.", " ")),
    )
    rows, counts = sources.read(tmp_path)
    assert counts == {"tie": 2, "no_post": 2, "same_answers": 1, "empty_answer": 1}
    bare = "Summarize this post in a sentence or two.\n\nI lost my cat {and} found it.\n\n"
    assert rows == [
        PreferenceExample(POST, "Cat.", "Cat found."),
        PreferenceExample(POST, "Cat found.", "Cat."),
        PreferenceExample(
            "Summarize this article in a sentence or two.\n\nRain\n\nIt rained.\n\n", "Cat.", "Cat found."
        ),
        PreferenceExample(bare, "Cat.", "Cat found."),
    ]
    assert sources.detect_format(path) == "summarize"


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (comparison(2), "field 'choice' is 2, but must be 0 or 1"),
        (comparison(True), "field 'choice' is True"),
        (comparison("0"), "field 'choice' is '0'"),
        (comparison(info="text"), "field 'info' is a JSON string"),
        (comparison(texts=("one",)), "field 'summaries' must be an array of two objects"),
        (comparison() | {"summaries": ["a", "b"]}, "field 'summaries' must be an array of two objects"),
        (comparison(texts=("a", 3)), "field 'summaries[1].text' is a JSON number"),
        (comparison(info=INFO | {"title": 3}), "field 'info.title' is a JSON number"),
    ],
)
def test_comparisons_that_are_none(tmp_path, bad, expected):
    path = write(tmp_path / "a.jsonl", comparison(), bad)
    assert f"{path}, line 2: {expected}" in error_of(sources.read, path)


def test_a_query_that_is_none_takes_no_time():
    marks = "SUBREDDIT: r/x" + "\n\nTITLE: t\n\nPOST: " * 400
    start = time.process_time()
    assert "must read SUBREDDIT" in error_of(layouts.tldr, judged("ours", query=marks), "line 1")
    assert time.process_time() - start < 1  # with the third power of its length it took seven


def judged(preferred: str, **fields) -> dict:
    query = f"SUBREDDIT: r/pets\n\nTITLE: My cat\n\nPOST: {INFO['post']}\n\nTL;DR:"
    texts = {"postprocessed_response": "  model", "reference_responses": "  human"}
    return {"query": query, **texts, "explanation": "A", "preferred": preferred, "shuffled_index": "1"} | fields


def test_judged_summaries_have_the_prompt_of_comparisons(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        judged("ours"),
        judged("reference"),
        judged(""),
        judged("ours", reference_responses="model "),
        judged("ours", query="SUBREDDIT: r/pets\n\nTITLE: \n\nPOST: \n\nTL;DR:"),
    )
    rows, counts = sources.read(path)
    assert rows == [PreferenceExample(POST, "human", "model"), PreferenceExample(POST, "model", "human")]
    assert counts == {"tie": 1, "same_answers": 1, "no_post": 1}
    assert "line 2: field 'preferred' is 'both'" in error_of(
        sources.read, write(tmp_path / "b.jsonl", judged("ours"), judged("both"))
    )
    assert "line 1: field 'query' must read" in error_of(
        sources.read, write(tmp_path / "c.jsonl", judged("ours", query="What?"))
    )


def test_published_tldr():
    rows, counts = sources.read(published("tldr"))
    # The folder's notes: 1,334 rows, of which 252 + 182 prefer ours and 151 + 105 the reference.
    assert counts == {"tie": 644} and len(rows) == 252 + 182 + 151 + 105
    with lzma.open(published("tldr", "tldr_ppo_vs_human.jsonl.xz"), "rt", encoding="utf-8") as file:
        first = next(row for row in map(json.loads, file) if row["preferred"])
    assert rows[0].chosen == first["reference_responses"].strip() and first["preferred"] == "reference"
    assert all(row.prompt.startswith("Summarize this post from r/") and "TL;DR:" not in row.prompt[-9:] for row in rows)


# Columns.

FRUIT = "Name a fruit."


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": FRUIT, "response_j": "apple ", "response_k": "carrot"}, (FRUIT, "apple")),
        ({"instruction": FRUIT, "chosen": "apple", "rejected": "carrot", "output": "x"}, (FRUIT, "apple")),
        (
            {"instruction": FRUIT, "input": "A red one.", "chosen": "apple", "rejected": "carrot"},
            (f"{FRUIT}\n\nA red one.", "apple"),
        ),
        (
            {"system": "Be brief.", "question": FRUIT, "chosen": "apple", "rejected": "carrot"},
            (f"Be brief.\n\n{FRUIT}", "apple"),
        ),
        ({"input": FRUIT, "chosen": "apple", "rejected": "carrot"}, (FRUIT, "apple")),
        (
            {"prompt": FRUIT, "response_0": "apple", "response_1": "carrot", "better_response_id": 0},
            (FRUIT, "apple"),
        ),
        (
            {
                "prompt": FRUIT,
                "response_0": "carrot",
                "response_1": "apple",
                "better_response_id": 1,
                "safer_response_id": 0,
            },
            (FRUIT, "apple"),
        ),
        ({"prompt": FRUIT, "response_0": "carrot", "response_1": "apple", "safer_response_id": 1}, (FRUIT, "apple")),
        ({"instruction": FRUIT, "output_1": "carrot", "output_2": "apple", "preference": 2}, (FRUIT, "apple")),
        ({"prompt": FRUIT, "response_a": "apple", "response_b": "carrot", "winner": "A"}, (FRUIT, "apple")),
        ({"prompt": FRUIT, "answer_a": "apple", "answer_b": "carrot", "winner": "answer_a"}, (FRUIT, "apple")),
        ({"prompt": FRUIT, "response_1": "apple", "response_2": "carrot", "preference": 1.0}, (FRUIT, "apple")),
    ],
)
def test_names_of_columns(tmp_path, row, expected):
    path = write(tmp_path / "a.jsonl", row)
    assert sources.detect_format(path) == "columns"
    rows, counts = sources.read(path)
    assert rows == [PreferenceExample(expected[0], "carrot", expected[1])] and counts == {}


@pytest.mark.parametrize(
    ("names", "verdicts"),
    [
        (("response_1", "response_2"), (0, 1, 0, 1)),  # numbers from 0 on
        (("response_1", "response_2"), (1.0, -1.0)),  # how much better the first is
        (("response_1", "response_2"), (0, 0)),
        (("response_0", "response_1"), (-1, 1)),
    ],
)
def test_numbers_that_may_be_of_the_other_answer(tmp_path, names, verdicts):
    rows = [{"prompt": FRUIT, names[0]: "apple", names[1]: "carrot", "preference": v} for v in verdicts]
    message = error_of(sources.read, write(tmp_path / "a.jsonl", *rows))
    said = sorted({str(int(v)) for v in verdicts})
    assert f"line 1: column 'preference' has {said} in this file, and never" in message
    assert f"stands for '{names[0]}': write the name of the better column" in message
    counted = {"response_1": 2, "response_0": 0}[names[0]]  # one row by which it is seen how they are counted
    found, counts = sources.read(write(tmp_path / "b.jsonl", *rows, rows[0] | {"preference": counted}))
    assert found[-1].chosen == ("carrot" if counted == 2 else "apple")
    assert counts["tie"] == sum(v < 1 for v in verdicts)


def test_the_column_of_prompts_is_that_of_the_file(tmp_path):
    pair = {"chosen": "apple", "rejected": "carrot"}
    rows = {"question": None, "input": "note"} | pair, {"question": FRUIT} | pair, {"input": "note"} | pair
    found, counts = sources.read(write(tmp_path / "a.jsonl", *rows))
    assert found == [PreferenceExample(FRUIT, "carrot", "apple")] and counts == {"empty_prompt": 2}
    write(tmp_path / "b.jsonl", {"input": "note"} | pair)  # another file has its own
    assert [row.prompt for row in sources.read(tmp_path)[0]] == [FRUIT, "note"]
    for row in ({"ask": FRUIT} | pair, {"ask": FRUIT, "response_0": "a", "response_1": "b", "better": 0}):
        message = error_of(sources.read, write(tmp_path / "c.jsonl", row))
        assert "another column of prompts is named by --config.data.columns=prompt:NAME" in message


def test_nothing_beside_the_prompt_is_lost(tmp_path):
    row = {"prompt": FRUIT, "chosen": "apple", "rejected": "carrot"}
    for i, (more, x) in enumerate((
        ({"system": "Be brief."}, f"Be brief.\n\n{FRUIT}"),
        ({"system_prompt": None}, FRUIT),
        ({"input": "Red."}, f"{FRUIT}\n\nRed."),
        ({"instruction": "Name it.", "input": "Red."}, FRUIT),  # of which "prompt" was made
        ({"system": "Be brief.", "requirements": [{"kind": "contains", "value": "a"}], "reflection": None}, None),
    )):  # fmt: skip
        path = write(tmp_path / f"{i}.jsonl", row | more)
        (found,), _ = sources.read(path)
        assert sources.detect_format(path) == "columns" and found.prompt == (x or f"Be brief.\n\n{FRUIT}")
        assert found.requirements == ((Requirement("contains", "a"),) if x is None else ())


def test_what_only_later_rows_have_is_not_lost(tmp_path):
    row = {"prompt": FRUIT, "chosen": "apple", "rejected": "carrot"}
    path = write(tmp_path / "a.jsonl", row, row | {"system": "Be brief."})
    assert [found.prompt for found in sources.read(path)[0]] == [FRUIT, f"Be brief.\n\n{FRUIT}"]


HH = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Tea?\n\nAssistant:"


@pytest.mark.parametrize("name", ["prompt", "question"])
@pytest.mark.parametrize(
    ("prompt", "head"),
    [(HH, ""), (f"{HH} ", ""), (HH.removesuffix("\n\nAssistant:"), ""), (HH, HH), ("Tea?", HH), ("Hi. ", HH)],
)
def test_dialogues_of_hh_rlhf_in_columns(tmp_path, name, prompt, head):
    path = write(tmp_path / "a.jsonl", {name: prompt, "chosen": f"{head} yes", "rejected": f"{head} no"})
    assert sources.read(path) == ([PreferenceExample(TWO, "no", "yes")], {})


def test_dialogues_of_hh_rlhf_that_do_not_fit(tmp_path):
    good = {"prompt": HH, "chosen": f"{HH} yes", "rejected": f"{HH} no"}
    other = HH.replace("Tea", "Milk")
    rows = (good | {"prompt": "What is 2 + 2?"}, good | {"rejected": f"{other} no"}, good | {"prompt": other},
            good | {"prompt": f"{HH} Of course,", "chosen": "yes", "rejected": "no"})  # fmt: skip
    assert sources.read(write(tmp_path / "a.jsonl", good, *rows))[1] == {"prompts_differ": 3, "not_a_dialogue": 1}


def test_columns_by_flag(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": FRUIT, "good": "apple", "bad": "carrot", "prompt": "no", "chosen": "no"})
    names = sources.column_names(("prompt:q", "chosen : good", "rejected:bad"))
    assert names == {"prompt": "q", "chosen": "good", "rejected": "bad"}
    expected = [PreferenceExample(FRUIT, "carrot", "apple")]
    assert sources.read(path, columns=names)[0] == sources.read(path, "columns", columns=names)[0] == expected
    assert "column 'worse' (config.data.columns: rejected) is missing; the row has ['bad', 'chosen'" in error_of(
        sources.read, path, columns=names | {"rejected": "worse"}
    )
    assert "is for format columns, but the format is jsonl" in error_of(sources.read, path, "jsonl", columns=names)
    path = write(tmp_path / "b.jsonl", {"x": FRUIT, "left": "carrot", "right": "apple", "said": "right", "better": 0})
    names = sources.column_names(("prompt:x", "first:left", "second:right", "better:said"))
    assert sources.read(path, columns=names)[0] == expected
    row = {"prompt": FRUIT, "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
    path = write(tmp_path / "c.jsonl", row)
    assert sources.read(path, columns={"better": "safer_response_id"})[0][0].chosen == "b"
    for bad in ("prompt", "prompt:", "answer:a"):
        assert f"config.data.columns has {bad!r}: use ROLE:COLUMN" in error_of(sources.column_names, (bad,))
    assert "each role once" in error_of(sources.column_names, ("prompt:a", "prompt:b"))


def test_columns_count_what_they_drop(tmp_path):
    row = {"question": FRUIT, "output_1": "apple", "output_2": "carrot"}
    path = write(
        tmp_path / "a.jsonl",
        row | {"preference": 1},
        *(row | {"preference": tie} for tie in (0, None, "", "tie", -1, "Tie")),
        row | {"preference": 1, "question": " "},
        row | {"preference": 1, "question": None},
        row | {"preference": 1, "output_2": ""},
        row | {"preference": 2, "output_2": None},
        row | {"preference": 1, "output_2": "apple\n"},
    )
    rows, counts = sources.read(path)
    assert len(rows) == 1 and counts == {"tie": 6, "empty_prompt": 2, "empty_answer": 2, "same_answers": 1}
    path = write(tmp_path / "b.jsonl", row | {"preference": 1}, row | {"preference": 3})
    assert "line 2: column 'preference' is 3, which is neither 'output_1' nor 'output_2'" in error_of(
        sources.read, path
    )
    path = write(tmp_path / "c.jsonl", row | {"preference": 1}, {"question": FRUIT})
    assert "line 2: no columns of a pair" in error_of(sources.read, path)
    path = write(tmp_path / "d.jsonl", row | {"preference": 1}, row | {"preference": 1, "output_1": 3})
    assert "line 2: field 'output_1' is a JSON number" in error_of(sources.read, path)


def test_a_strict_reader_names_the_one_that_counts(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "w", "rejected": " "})
    assert "line 1: field 'rejected' is empty; --config.data.format=columns drops" in error_of(sources.read, path)
    path = write(tmp_path / "b.jsonl", *({"prompt": "p", "chosen": "w", "rejected": l} for l in (" ", "l")))
    assert sources.read(path, "columns") == ([PreferenceExample("p", "l", "w")], {"empty_answer": 1})


# Chat messages.


def say(*texts: str, system: str | None = None, names=("role", "content")) -> list[dict]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") if names[0] == "role" else ("human", "gpt")
    head = [] if system is None else [{names[0]: "system", names[1]: system}]
    return head + [{names[0]: roles[i % 2], names[1]: text} for i, text in enumerate(texts)]


ONE = "Hi.\n\n"
TWO = "Hi.\n\nAssistant: Hello!\n\nHuman: Tea?\n\n"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        # TRL: whole dialogues.
        ({"chosen": say("Hi.", "yes"), "rejected": say("Hi.", "no")}, ONE),
        ({"chosen": say("Hi.", "Hello!", "Tea?", "yes"), "rejected": say("Hi.", "Hello! ", "Tea?", "no")}, TWO),
        # TRL: what follows on the prompt.
        ({"prompt": say("Hi."), "chosen": say("Hi.", "yes")[1:], "rejected": say("Hi.", "no")[1:]}, ONE),
        ({"prompt": say("Hi.", "Hello!", "Tea?"), "chosen": say("", "yes")[1], "rejected": say("", "no")[1]}, TWO),
        ({"prompt": say("Hi.", "Hello!", "Tea?"), "chosen": " yes", "rejected": "no "}, TWO),
        ({"prompt": "Hi.", "chosen": say("", "yes")[1:], "rejected": say("", "no")[1:]}, ONE),
        # UltraFeedback: the prompt as text, and once more in the dialogues.
        ({"prompt": "Hi. ", "chosen": say("Hi.", "yes"), "rejected": say("Hi.", "no"), "messages": say("a", "b")}, ONE),
        ({"prompt": say("Hi."), "chosen": say("Hi.", "yes"), "rejected": say("Hi.", "no")}, ONE),
        # LLaMA-Factory: other keys and roles.
        (
            {
                "conversations": say("Hi.", "Hello!", "Tea?", names=("from", "value")),
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            TWO,
        ),
        # System texts stand before the first human turn.
        (
            {"chosen": say("Hi.", "yes", system="Kind."), "rejected": say("Hi.", "no", system="Kind.")},
            f"Kind.\n\n{ONE}",
        ),
        ({"system": "Be kind.", "chosen": say("Hi.", "yes"), "rejected": say("Hi.", "no")}, f"Be kind.\n\n{ONE}"),
        ({"chosen": say("Hi.", "yes", system=""), "rejected": say("Hi.", "no")}, ONE),
        ({"prompt": say("Hi.", system="Be kind."), "chosen": "yes", "rejected": "no"}, f"Be kind.\n\n{ONE}"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chat_messages(tmp_path, row, prompt, kind):
    path = write_parquet(tmp_path / "a.parquet", row) if kind == "parquet" else write(tmp_path / "a.jsonl", row)
    assert sources.detect_format(path) == "columns"
    assert sources.read(path) == ([PreferenceExample(prompt, "no", "yes")], {})


def test_chat_reads_as_the_same_dialogue_of_hh_rlhf(tmp_path):
    turns = ("Hi.", "Hello!", "Tea?")
    chat = write(tmp_path / "a.jsonl", {"chosen": say(*turns, "yes"), "rejected": say(*turns, "no")})
    head = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Tea?\n\nAssistant:"
    hh = write(tmp_path / "b.jsonl", {"chosen": f"{head} yes", "rejected": f"{head} no"})
    assert sources.read(chat)[0] == sources.read(hh, "hh_rlhf")[0]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"chosen": say("Hi.", "yes"), "rejected": say("Hello.", "no")}, "prompts_differ"),
        ({"chosen": say("Hi.", "yes"), "rejected": say("Hi.", "a", "b", "no")}, "prompts_differ"),
        ({"chosen": say("Hi.", "yes", system="a"), "rejected": say("Hi.", "no", system="b")}, "prompts_differ"),
        ({"prompt": say("Hello."), "chosen": say("Hi.", "yes"), "rejected": say("Hi.", "no")}, "prompts_differ"),
        ({"chosen": say("Hi.", "yes"), "rejected": say("Hi.", "yes ")}, "same_answers"),
        ({"chosen": say("Hi.", "yes"), "rejected": say("Hi.", " \n")}, "empty_answer"),
        ({"chosen": say("Hi."), "rejected": say("Hi.", "no")}, "not_a_dialogue"),
        ({"chosen": say("", "yes"), "rejected": say("", "no")}, "not_a_dialogue"),
        ({"chosen": say("Hi.", "", "Tea?", "yes"), "rejected": say("Hi.", "", "Tea?", "no")}, "not_a_dialogue"),
        ({"chosen": [], "rejected": say("Hi.", "no")}, "not_a_dialogue"),
        ({"chosen": say("Hi.", "yes")[1:], "rejected": say("Hi.", "no")[1:]}, "not_a_dialogue"),
        ({"chosen": say("Hi.") * 3 + say("", "yes")[1:], "rejected": say("Hi.", "no")}, "not_a_dialogue"),
        ({"chosen": [*say("Hi."), {"role": "tool", "content": "3"}], "rejected": say("Hi.", "no")}, "not_a_dialogue"),
    ],
)
def test_chat_counts_what_it_drops(tmp_path, row, cause):
    good = {"chosen": say("Hi.", "yes"), "rejected": say("Hi.", "no")}
    assert sources.read(write(tmp_path / "a.jsonl", good, row))[1] == {cause: 1}


def test_a_prompt_beside_dialogues_is_theirs(tmp_path):
    turns = ("Hi.", "Hello!", "Tea?")
    rows = [{"chosen": say(*turns, f"yes {i}"), "rejected": say(*turns, "no"), "prompt": prompt}
            for i, prompt in enumerate(("Hi.", "Tea? ", "", None, "What is 2 + 2?", "Hello!"))]  # fmt: skip
    found, counts = sources.read(write(tmp_path / "a.jsonl", *rows))
    assert found == [PreferenceExample(TWO, "no", f"yes {i}") for i in range(4)] and counts == {"prompts_differ": 2}


def test_chat_keeps_reflection_and_requirements(tmp_path):
    row = {"prompt": say("Hi."), "chosen": "yes", "rejected": "no", "reflection": "Be kind."}
    row["requirements"] = [{"kind": "contains", "value": "yes"}]
    expected = PreferenceExample(ONE, "no", "yes", "Be kind.", (Requirement("contains", "yes"),))
    assert sources.read(write(tmp_path / "a.jsonl", row)) == ([expected], {})
    assert "line 2: field 'requirements' must be in all rows" in error_of(
        sources.read, write(tmp_path / "b.jsonl", row, row | {"requirements": None})
    )
    assert "there is no field 'reflection', but 'reflecton'" in error_of(
        sources.read, write(tmp_path / "c.jsonl", {"reflecton": row.pop("reflection")} | row)
    )


QUOTE = "Mend this:\n\nAssistant: I hate you.\n\nHuman: go on"
MENDED = "Mend this:\n\n Assistant: I hate you.\n\n Human: go on"


def test_a_text_that_quotes_turns_stays_one(tmp_path):
    chat = {"chosen": say(QUOTE, QUOTE, "Human:", "yes", system=QUOTE), "rejected": "no"}
    chat["rejected"] = [*chat["chosen"][:-1], {"role": "assistant", "content": "no"}]
    opening = {"system": "Be kind.", "chosen": say("Assistant: a\n\nHuman:", "yes"),
               "rejected": say("Assistant: a\n\nHuman:", "no")}  # fmt: skip
    info = {"post": QUOTE, "title": "Human:", "subreddit": "x"}
    summaries = {"info": info, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    for row, turns in (
        (chat, [f"{MENDED}\n\n{MENDED}", MENDED, "Human:"]),
        (opening, ["Be kind.\n\n Assistant: a\n\n Human:"]),
        (summaries, [f"Summarize this post from r/x in a sentence or two.\n\n Human:\n\n{MENDED}"]),
        ({"question": f"{QUOTE}\n\n", "chosen": "a", "rejected": "b"}, [MENDED]),
    ):
        (found,), _ = sources.read(write(tmp_path / "a.jsonl", row))
        assert split_turns(found.prompt) == turns and found.prompt.endswith("\n\n")
    plain = write(tmp_path / "b.jsonl", {"prompt": QUOTE, "chosen": "a", "rejected": "b"})
    assert sources.read(plain)[0][0].prompt == QUOTE and split_turns(QUOTE) == [QUOTE]
    chat = write(tmp_path / "c.jsonl", {"chosen": say("Hi.", "yes"), "rejected": say("Hi.", "no")})
    rows = sources.read_config(DataConfig(source="file", mixture=f"{plain},{chat}"), 0)[0]
    assert [split_turns(row.prompt) for row in rows] == [[MENDED], ["Hi."]]


def test_chat_errors_name_the_message(tmp_path):
    good = {"chosen": say("Hi.", "yes"), "rejected": say("Hi.", "no")}
    for bad, expected in (
        ([{"role": "user"}], "field 'content' is missing"),
        ([{"content": "x"}], "field 'role' is missing"),
        (["Hi."], "message 0 is a JSON string"),
        ([{"role": "user", "content": None}], "field 'content' is a JSON null"),
    ):
        path = write(tmp_path / "a.jsonl", good, good | {"chosen": bad})
        message = error_of(sources.read, path)
        assert f"{path}, line 2: " in message and expected in message


def test_prompts_alone_in_other_layouts(tmp_path):
    for i, (row, prompt) in enumerate((
        ({"instruction": FRUIT, "input": "Red.", "output": "apple"}, f"{FRUIT}\n\nRed."),
        ({"messages": say("Hi.", "Hello!", "Tea?", "yes")}, TWO),
        ({"messages": say("Hi.")}, ONE),
        ({"prompt": say("Hi.", system="Be kind.")}, f"Be kind.\n\n{ONE}"),
    )):  # fmt: skip
        path = write(tmp_path / f"{i}.jsonl", row)
        assert sources.read(path, answers=False) == ([PreferenceExample(prompt, "", "")], {})
        assert "no columns of a pair" in error_of(sources.read, path, "columns")
    pair = {"instruction": FRUIT, "chosen": "apple", "rejected": "carrot"}
    path = write(tmp_path / "x.jsonl", pair, {"instruction": FRUIT})
    assert "line 2: answers must be in all rows or in none" in error_of(sources.read, path, answers=False)


@pytest.mark.parametrize(
    ("name", "num_rows", "counts"),
    [("dpo_en_demo_300", 300, {"duplicate_row": 5}), ("rasbt_polite_preference_1100", 1100, {"same_answers": 6})],
)
def test_published_columns(name, num_rows, counts):
    rows, found = sources.read(published("preferences", f"{name}.json.xz"))
    assert found == counts and len(rows) + sum(counts.values()) == num_rows


# Files.


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_an_array_of_rows(tmp_path, suffix):
    opened = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    rows = [{"prompt": "p", "chosen": "w", "rejected": "l"}, {"prompt": "q", "chosen": "w", "rejected": "l"}]
    path = tmp_path / f"a.json{suffix}"
    with opened(path, "wb") as file:
        file.write(b"\xef\xbb\xbf\r\n" + json.dumps(rows, indent=1).replace("\n", "\r\n").encode())
    assert [row.prompt for row in sources.read(path)[0]] == ["p", "q"]


@pytest.mark.parametrize("name", ["a.json.gz", "a.json.xz", "a.jsonl.gz"])
def test_compression_that_ends_early(tmp_path, name):
    rows = [comparison(i % 2, texts=(str(i * 2654435761 % 2**32), "b")) for i in range(500)]
    text = json.dumps(rows) if ".json." in name else "".join(json.dumps(row) + "\n" for row in rows)
    data = {".gz": gzip, ".xz": lzma}[name[-3:]].compress(text.encode())
    (tmp_path / name).write_bytes(data)
    assert len(sources.read(tmp_path / name)[0]) == 500
    (tmp_path / name).write_bytes(data[:-5])
    assert f"{tmp_path / name}: cannot be read after line " in error_of(sources.read, tmp_path / name)


def test_arrays_that_cannot_be_read(tmp_path):
    good = {"prompt": "p", "chosen": "w", "rejected": "l"}
    for i, (content, expected) in enumerate((
        (json.dumps([good, 3]).encode(), "row 2: is a JSON number, but every row must be one JSON object"),
        (json.dumps([good, {"prompt": "p"}]).encode(), "row 2: field 'chosen' is missing"),
        (json.dumps([good])[:-1].encode(), "not JSON"),
        (b'[\n{"prompt": "\xff"}]', "not UTF-8 at byte 14 "),
        (b"[]", "the file has no rows"),
        (b"", "the file has no rows"),
        (b"[" * 100_000, "not JSON"),
    )):  # fmt: skip
        path = tmp_path / f"{i}.json"
        path.write_bytes(content)
        message = error_of(sources.read, path)
        assert str(path) in message and expected in message


def test_parquet(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"w{i}", "rejected": "l" if i != 2 else "w2"} for i in range(1500)]
    write_parquet(tmp_path / "b.parquet", *rows[3:])
    write_parquet(tmp_path / "a.parquet", *rows[:3])
    (tmp_path / "dataset_infos.json").write_text("{}")
    found, counts = sources.read(tmp_path)
    assert [row.prompt for row in found] == [row["prompt"] for row in rows if row["prompt"] != "p2"]
    assert counts == {"same_answers": 1}
    more = {"requirements": [{"kind": "contains", "value": "w"}, {"kind": "no_commas"}]}
    one, two = (rows[i] | more | ({"reflection": "c"} if i else {}) for i in (0, 1))
    found, _ = sources.read(write_parquet(tmp_path / "e.parquet", two, one))  # fields that are missing are null there
    assert [row.reflection for row in found] == ["c", ""]
    assert found[1].requirements == (Requirement("contains", "w"), Requirement("no_commas"))
    bad = write_parquet(tmp_path / "c.parquet", rows[0], rows[1] | {"chosen": None})
    assert f"{bad}, row 2: field 'chosen' is a JSON null" in error_of(sources.read, bad)
    bad = write_parquet(tmp_path / "d.parquet", rows[0] | {"chosen": b"bytes"})
    assert f"{bad}, row 1: field 'chosen' is a JSON bytes" in error_of(sources.read, bad)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_damaged_parquet(tmp_path, damage):
    rows = [{"prompt": f"p{i}", "chosen": str(i * 2654435761 % 2**32), "rejected": "l"} for i in range(2000)]
    path = write_parquet(tmp_path / "a.parquet", *rows)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[10:400] = bytes(390)
    path.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b"", "other": b"{}"}[damage])
    message = error_of(sources.read, path)
    assert f"{path}: cannot be read after row 0" in message and "complete" in message


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[parquet\]'"):
        sources.read(tmp_path)


def test_a_folder_of_two_kinds(tmp_path):
    row = {"prompt": "p", "chosen": "w", "rejected": "l"}
    (tmp_path / "infos.json").write_text("[]")
    write(tmp_path / "a.jsonl", row)
    assert len(sources.read(tmp_path)[0]) == 1  # .json files are descriptions where there are others
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    assert "has 1 .jsonl and 1 .parquet files" in error_of(sources.read, tmp_path)


def test_the_same_rows_in_two_files_are_read_once(tmp_path):
    """As UltraFeedback has them, where the rows for SFT are those of pairs."""
    row = {"chosen": say("Hi.", "yes"), "rejected": say("Hi.", "no")}
    for name, more in (("train_prefs", {}), ("train_sft", {"id": 1}), ("test_prefs", {"rejected": say("Hi.", "?")})):
        write_parquet(tmp_path / f"{name}-00000-of-00001.parquet", row | more)
    rows, counts = sources.read(tmp_path)
    assert [r.rejected for r in rows] == ["?", "no"] and counts == {"duplicate_row": 1}


def test_every_role_is_documented():
    assert len(layouts.COLUMNS["first"]) == len(layouts.COLUMNS["second"])
    assert set(layouts.ROLES.values()) == {"system", "user", "assistant"}
