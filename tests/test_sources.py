"""Reading preference rows, and dividing them."""

import dataclasses
import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys
from fractions import Fraction

import pytest

from pit_jax.config import DataConfig
from pit_jax.data import sources
from pit_jax.data.sources import DataError
from pit_jax.types import PreferenceExample, Requirement

DATA = pathlib.Path(os.environ.get("PIT_JAX_DATA", pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"))
ROW = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def write(path: pathlib.Path, *rows) -> pathlib.Path:
    """A file of rows (objects, or bytes as they are), compressed by its suffix."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]
    data = b"".join(lines)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".xz":
        data = lzma.compress(data)
    path.write_bytes(data)
    return path


def row(i: int, **fields) -> dict:
    return {"prompt": f"p{i}", "chosen": f"w{i}", "rejected": f"l{i}"} | fields


def error_of(reader, *arguments, **keywords) -> str:
    with pytest.raises(DataError) as error:
        reader(*arguments, **keywords)
    return str(error.value)


def test_jsonl_fields(tmp_path):
    requirements = [{"kind": "contains", "value": "gold"}, {"kind": "no_commas"}]
    full = ROW | {"reflection": "add gold", "requirements": requirements, "id": 7}
    rows, counts = sources.read_jsonl(write(tmp_path / "a.jsonl", ROW))
    assert counts == {}
    assert rows[0] == PreferenceExample(prompt="p", rejected="bad", chosen="good")
    rows, _ = sources.read_jsonl(write(tmp_path / "b.jsonl", full))
    expected = (Requirement("contains", "gold"), Requirement("no_commas", ""))
    assert rows[0] == PreferenceExample("p", "bad", "good", "add gold", expected)


def test_prompts_alone_where_they_will_do(tmp_path):
    prompts = write(tmp_path / "a.jsonl", {"prompt": "p"}, {"prompt": "q", "source": "x"})
    assert "field 'chosen' is missing" in error_of(sources.read, prompts)
    rows, counts = sources.read(prompts, answers=False)
    assert rows == [PreferenceExample("p", "", ""), PreferenceExample("q", "", "")] and counts == {}
    assert sources.has_no_answers(rows) and not sources.has_no_answers([PreferenceExample("p", "l", "w")])
    again = write(tmp_path / "b.jsonl", *map(dataclasses.asdict, rows))
    assert sources.read_jsonl(again, answers=False)[0] == rows, "as a workdir keeps them"
    mixed = write(tmp_path / "c.jsonl", {"prompt": "p"}, ROW)
    assert "in all rows or in none" in error_of(sources.read, mixed, answers=False)
    assert sources.read(write(tmp_path / "d.jsonl", ROW), answers=False)[0] == [PreferenceExample("p", "bad", "good")]
    half = write(tmp_path / "e.jsonl", {"prompt": "p", "chosen": "w"})
    assert "'rejected' is missing" in error_of(sources.read, half, answers=False)


def test_jsonl_keeps_texts_as_they_are(tmp_path):
    text = " a\u2028b\x85c\r\n"  # line ends of Unicode inside a string are not line ends of the file
    raw = json.dumps(ROW | {"chosen": text}, ensure_ascii=False).encode() + b"\n"
    rows, _ = sources.read_jsonl(write(tmp_path / "a.jsonl", raw, ROW))
    assert [r.chosen for r in rows] == [text, "good"]


def test_bom_crlf_and_blank_lines(tmp_path):
    line = json.dumps(ROW).encode()
    last = json.dumps(ROW | {"rejected": "worse"}).encode()  # no line feed at the end
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + last)
    assert sources.read(path) == ([PreferenceExample("p", y, "good") for y in ("bad", "worse")], {})
    # Lines are counted as an editor counts them.
    path = write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n", b"{\r\n")
    assert "b.jsonl, line 4: not JSON" in error_of(sources.read, path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".GZ"])
def test_compressed_files(tmp_path, suffix):
    path = write(tmp_path / f"a.jsonl{suffix.lower()}", row(0), row(1)).rename(tmp_path / f"b.jsonl{suffix}")
    assert [r.prompt for r in sources.read(path)[0]] == ["p0", "p1"]


def test_folder_reads_all_files_in_order(tmp_path):
    write(tmp_path / "b.jsonl.gz", row(2))
    write(tmp_path / "c.jsonl", row(3), row(4, rejected="w4"))
    write(tmp_path / "a.jsonl.xz", row(0), row(1))
    write(tmp_path / ".hidden", b"\x00")
    for name in ("folder", "d", ".git"):
        (tmp_path / name).mkdir()
    write(tmp_path / "d" / "a.jsonl", row(5))
    write(tmp_path / ".git" / "a.jsonl", b"\x00")
    write(tmp_path / "README.md", b"no row")
    write(tmp_path / "c.jsonl.txt", b"no row")
    rows, counts = sources.read(tmp_path)
    assert [r.prompt for r in rows] == ["p0", "p1", "p2", "p3", "p5"]
    assert counts == {"same_answers": 1}
    message = error_of(sources.read, tmp_path / "folder")
    assert str(tmp_path / "folder") in message and "no files" in message


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (b'{"prompt": "p", "chosen": \n', "not JSON"),
        (b"plain text\n", "not JSON"),
        (b'["p", "good", "bad"]\n', "is a JSON array"),
        (b"null\n", "is a JSON null"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        ({"prompt": "p", "chosen": "good"}, "field 'rejected' is missing; the row has ['chosen', 'prompt']"),
        ({"chosen": "good", "rejected": "bad"}, "field 'prompt' is missing"),
        (ROW | {"chosen": ["good"]}, "field 'chosen' is a JSON array"),
        (ROW | {"prompt": 3}, "field 'prompt' is a JSON number"),
        (ROW | {"rejected": None}, "field 'rejected' is a JSON null"),
        (ROW | {"reflection": False}, "field 'reflection' is a JSON boolean"),
        (ROW | {"chosen": ""}, "field 'chosen' is empty"),
        (ROW | {"rejected": " \n"}, "field 'rejected' is empty"),
        (ROW | {"prompt": " "}, "field 'prompt' is empty"),
        (ROW | {"chosen": "cut \ud83d"}, "field 'chosen' has half a surrogate pair (U+D83D) at character 4"),
        (ROW | {"requirements": {"kind": "contains"}}, "field 'requirements' is a JSON object"),
        (ROW | {"requirements": [{"kind": "quotes"}, "b"]}, "field 'requirements[1]' is a JSON string"),
        (ROW | {"requirements": [{"kind": "rhymes"}]}, "field 'requirements[0]': unknown requirement kinds ['rhymes']"),
        (ROW | {"requirements": [{"kind": "exactly_words", "value": "many"}]}, "field 'requirements[0]': "),
        (ROW | {"requirements": [{"kind": "quotes"}]}, "field 'requirements' must be in all rows"),
        (ROW | {"requirements": [{"value": "b"}]}, "field 'requirements[0].kind' is missing"),
        (ROW | {"requirements": [{"kind": ""}]}, "field 'requirements[0].kind' is empty"),
        (ROW | {"requirements": [{"kind": "words", "value": 3}]}, "field 'requirements[0].value' is a JSON number"),
    ],
)
def test_jsonl_errors_name_file_line_and_field(tmp_path, bad, expected):
    path = write(tmp_path / "a.jsonl", ROW, b"\n", bad, ROW)
    assert f"{path}, line 3: {expected}" in error_of(sources.read_jsonl, path)


def test_jsonl_takes_null_for_nothing_and_spaces_for_no_difference(tmp_path):
    rows = row(0, reflection=None, requirements=None), row(1, chosen="l1 "), row(2, reflection="c")
    found, counts = sources.read(write(tmp_path / "a.jsonl", *rows))
    assert [r.reflection for r in found] == ["", "c"] and counts == {"same_answers": 1}


@pytest.mark.parametrize(("field", "slip"), [("reflection", "reflecton"), ("requirements", "requirement")])
def test_jsonl_fields_that_are_nearly_ours(tmp_path, field, slip):
    path = write(tmp_path / "a.jsonl", row(0, selection=1, rejection="x", direction=2), row(1) | {slip: "x"})
    assert f"line 2: there is no field '{field}', but '{slip}'" in error_of(sources.read, path)


def test_jsonl_drops_empty_answers_on_request(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0), row(1, chosen=" "), row(2, rejected=""), row(3, chosen="l3"))
    rows, counts = sources.read_jsonl(path, drop_empty=True)
    assert [r.prompt for r in rows] == ["p0"]
    assert counts == {"empty_answer": 2, "same_answers": 1}
    assert "line 1: field 'prompt' is empty" in error_of(
        sources.read_jsonl, write(tmp_path / "b.jsonl", ROW | {"prompt": ""}), drop_empty=True
    )


@pytest.mark.parametrize(
    ("head", "bad", "line", "byte"),
    [
        (b"", '{"prompt": "café"}'.encode("latin-1"), 2, len(json.dumps(ROW)) + 1 + 15),
        (b"\xef\xbb\xbf", '{"prompt": "café"}'.encode("latin-1"), 2, 3 + len(json.dumps(ROW)) + 1 + 15),
        (b"\xef\xbb\xbf\xff", b"", 1, 3),
        ("[]".encode("utf-16"), b"", 1, 0),
        (gzip.compress(b"x", mtime=0), b"", 1, 1),  # compressed, under a name that does not say so
    ],
)
def test_wrong_encoding_names_line_and_byte(tmp_path, head, bad, line, byte):
    path = write(tmp_path / "a.jsonl", head, ROW, bad)
    message = error_of(sources.read, path)
    assert f"a.jsonl, line {line}: not UTF-8 at byte {byte} " in message
    data = path.read_bytes()
    assert f"(0x{data[byte]:02x})" in message


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "cut short", "flipped", "not compressed"])
def test_damaged_compression(tmp_path, suffix, damage):
    path = write(tmp_path / f"a.jsonl{suffix}", *(row(i, chosen=str(i * 2654435761 % 2**32)) for i in range(2000)))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "cut short":
        data = data[:-4]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = json.dumps(ROW).encode()
    path.write_bytes(data)
    # A flipped byte may also come out as text that is no JSON, before the checksum at the end is seen.
    message = error_of(sources.read, path)
    assert str(path) in message
    if damage != "flipped":
        assert "cannot be read after line" in message and "complete" in message


def test_nothing_to_read(tmp_path):
    assert "no such file" in error_of(sources.read, tmp_path / "none.jsonl")
    for name, content in {"a.jsonl": b"", "b.jsonl": b"\n \n", "c.jsonl.gz": b""}.items():
        message = error_of(sources.read_jsonl, write(tmp_path / name, content))
        assert name in message and "no rows" in message
    message = error_of(sources.read_jsonl, write(tmp_path / "d.jsonl", ROW | {"chosen": "bad"}))
    assert "d.jsonl: no row is left; all were dropped: {'same_answers': 1}" in message


def test_format(tmp_path):
    ours = write(tmp_path / "a.jsonl", ROW)
    dialogues = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    hh = write(tmp_path / "b.jsonl", dialogues)
    assert sources.detect_format(ours) == "jsonl" and sources.detect_format(hh) == "hh_rlhf"
    assert sources.read(ours) == sources.read(ours, "jsonl") == sources.read_jsonl(ours)
    assert sources.read(hh) == sources.read(hh, "hh_rlhf") == sources.read_hh_rlhf(hh)
    assert "field 'prompt' is missing" in error_of(sources.read, hh, "jsonl")
    assert "use auto, jsonl, hh_rlhf, summarize, tldr or columns" in error_of(sources.read, hh, "csv")
    other = write(tmp_path / "c.jsonl", {"question": "q", "answer": "a"})
    assert "c.jsonl, line 1: neither" in error_of(sources.read, other)


def test_what_may_be_the_same_rows_twice(tmp_path):
    write(tmp_path / "t.jsonl", row(0))
    write(tmp_path / "t.jsonl.gz", row(0))
    assert "has t.jsonl and t.jsonl.gz, which may be the same rows twice" in error_of(sources.read, tmp_path)
    (tmp_path / "t.jsonl.gz").rename(tmp_path / "u.jsonl.gz")
    write(tmp_path / "v.jsonl", row(0, chosen="w0 "), row(0, rejected="x"), row(0, reflection="c"))
    rows, counts = sources.read(tmp_path)
    assert [r.rejected for r in rows] == ["l0", "x"] and counts == {"duplicate_row": 3}
    prompts = write(tmp_path / "v.jsonl", {"prompt": "p"}, {"prompt": "p"})
    assert sources.read(prompts, answers=False) == ([PreferenceExample("p", "", "")] * 2, {})


# HH-RLHF.

FIRST = "\n\nHuman: Hi.\n\nAssistant:"
SECOND = f"{FIRST} Hello!\n\nHuman: How are you?\n\nAssistant:"


def hh(chosen: str, rejected: str) -> dict:
    return {"chosen": chosen, "rejected": rejected}


def test_split_dialogue():
    assert sources.split_dialogue(f"{FIRST} Hello!") == ("Hi.\n\n", "Hello!")
    prompt, response = sources.split_dialogue(f"{SECOND} Fine,\n\nthanks. \n")
    assert prompt == "Hi.\n\nAssistant: Hello!\n\nHuman: How are you?\n\n"
    assert response == "Fine,\n\nthanks."


@pytest.mark.parametrize("head", [FIRST, SECOND])
def test_the_policy_template_gives_back_the_dialogue(head):
    template = (pathlib.Path(sources.__file__).parent / "templates" / "policy.txt").read_text("utf-8").rstrip("\n")
    prompt, response = sources.split_dialogue(f"{head} Answer.")
    assert "\n\n" + template.format(prompt=prompt) + " " + response == f"{head} Answer."


@pytest.mark.parametrize(
    ("dialogue", "expected"),
    [
        (FIRST, ("Hi.\n\n", "")),
        (f"{FIRST} ", ("Hi.\n\n", "")),
        # The last assistant turn, not the word in an answer.
        (f"{FIRST} Say Assistant: or Human: aloud.", ("Hi.\n\n", "Say Assistant: or Human: aloud.")),
        (f"{FIRST} Say\n\nAssistant:or", ("Hi.\n\n", "Say\n\nAssistant:or")),
        # A model that went on for the human.
        (f"{FIRST} Hello!\n\nHuman: Thanks.", ("Hi.\n\n", "Hello!\n\nHuman: Thanks.")),
        ("Human: Hi.\n\nAssistant: Hello!", ("Hi.\n\n", "Hello!")),
        ("", None),
        ("\n\nHuman: Hi.", None),
        ("\n\nHuman: \n\nAssistant: Hello!", None),
        ("\n\nAssistant: Hello!\n\nHuman: Hi.", None),
        ("\n\nAssistant: Hello!\n\nHuman: Hi.\n\nAssistant: Yes?", None),
    ],
)
def test_split_dialogue_traps(dialogue, expected):
    assert sources.split_dialogue(dialogue) == expected


def test_hh_rlhf_counts_what_it_drops(tmp_path):
    path = write(
        tmp_path / "test.jsonl.gz",
        hh(f"{FIRST} Hello!", f"{FIRST} Go away."),
        hh(f"{SECOND} Fine.", f"{FIRST} Hello!"),  # prompts differ: cut at another turn
        hh(f"{FIRST} Hello!", f"{FIRST.replace('Hi.', 'Hi!')} Hello there!"),  # prompts differ by a letter
        hh(f"{FIRST} Hello!", f"{FIRST} Hello!"),
        hh(f"{FIRST} Hello!", f"{FIRST} Hello! \n"),  # differ in nothing that is kept
        hh(f"{FIRST} Hello!", FIRST),
        hh(f"{FIRST} ", f"{FIRST} Hello!"),
        hh(f"{FIRST} ", f"{FIRST} "),
        hh("\n\nHuman: Hi.", f"{FIRST} Hello!"),
        hh(f"{SECOND} Fine.", f"{SECOND} What?"),
    )
    rows, counts = sources.read(path)
    assert counts == {"prompts_differ": 2, "same_answers": 2, "empty_answer": 3, "not_a_dialogue": 1}
    second = "Hi.\n\nAssistant: Hello!\n\nHuman: How are you?\n\n"
    assert rows == [
        PreferenceExample("Hi.\n\n", rejected="Go away.", chosen="Hello!"),
        PreferenceExample(second, rejected="What?", chosen="Fine."),
    ]


def test_hh_rlhf_errors(tmp_path):
    good = hh(f"{FIRST} a", f"{FIRST} b")
    path = write(tmp_path / "a.jsonl", good, {"chosen": "x"})
    assert f"{path}, line 2: field 'rejected' is missing" in error_of(sources.read, path)
    path = write(tmp_path / "b.jsonl", good, hh("x", 1))
    assert f"{path}, line 2: field 'rejected' is a JSON number" in error_of(sources.read, path)
    path = write(tmp_path / "c.jsonl", hh("x", "y"))
    assert "no row is left; all were dropped: {'not_a_dialogue': 1}" in error_of(sources.read, path)


@pytest.mark.parametrize(
    ("name", "num_rows", "dropped"),
    [
        # The folder's notes: prompts differ in 3 rows, chosen == rejected in 34, empty answers in 3, of 1,137 + 2,749.
        ("helpful-online", 1137, {"same_answers": 2, "empty_answer": 3}),
        ("helpful-rejection-sampled", 2749, {"same_answers": 32, "prompts_differ": 3}),
    ],
)
def test_published_hh_rlhf(name, num_rows, dropped):
    folder = DATA / "hh-rlhf" / name
    if not folder.exists():
        pytest.skip(f"no {folder}: set PIT_JAX_DATA to the folder of test data")
    rows, counts = sources.read(folder)
    assert counts == dropped
    assert len(rows) == num_rows - sum(dropped.values())
    with gzip.open(folder / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        published = {json.loads(line)["chosen"].rstrip() for line in file}
    found = {f"\n\nHuman: {r.prompt}Assistant: {r.chosen}" for r in rows}
    assert len(found - published) <= 1  # one answer opens with a second space
    parts = sources.folds(rows, 0)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Mixtures.


def plain(i: int, ending: str = "") -> dict:
    return {"prompt": f"prompt {i}{ending}", "chosen": f"w{i}", "rejected": f"l{i}"}


def mixture(*parts: str, **fields) -> DataConfig:
    return DataConfig(source="file", mixture=",".join(map(str, parts)), **fields)


def test_parts_of_a_mixture():
    F = Fraction
    parts = sources.mixture_parts(("a.jsonl:2", "hh_rlhf@b/c:0.5", "d@e", "x:y.jsonl", "columns@f.parquet"))
    assert parts == [
        ("a.jsonl", "auto", 2), ("b/c", "hh_rlhf", F(1, 2)), ("d@e", "auto", 1), ("x:y.jsonl", "auto", 1),
        ("f.parquet", "columns", 1),
    ]  # fmt: skip
    for bad in (":2", "a:0", "hh_rlhf@:1", ""):
        assert "use [FORMAT@]PATH[:WEIGHT]" in error_of(sources.mixture_parts, (bad,))
    assert "names a/b/ twice" in error_of(sources.mixture_parts, ("a/b:2", "jsonl@a/b/"))
    assert "names a/../a/b twice" in error_of(sources.mixture_parts, ("a/b", "a/../a/b"))
    assert "names a and a/b/c, one of which is in the other" in error_of(sources.mixture_parts, ("a", "d", "a/b/c"))


@pytest.mark.parametrize(
    ("sizes", "weights", "num_rows", "expected"),
    [
        ((100, 100), (2, 1), 0, [100, 50]),
        ((100, 30), (2, 1), 0, [60, 30]),
        ((10, 10), (3, 1), 0, [10, 3]),  # 3 1/3
        ((7, 100, 100), (1, 1, 2), 0, [7, 7, 14]),
        ((100, 100), (2, 1), 10, [7, 3]),  # 6 2/3 and 3 1/3
        ((100, 100), (1, 1), 5, [3, 2]),  # a tie: the first
        ((10,), (5,), 4, [4]),
        ((10,), (5,), 0, [10]),
    ],
)
def test_quotas(sizes, weights, num_rows, expected):
    assert sources.quotas(sizes, [*map(Fraction, weights)], num_rows) == expected


def test_quotas_that_cannot_be():
    F = Fraction
    assert "num_rows=40 takes 27 rows of part 1, which has 20: at most 30 rows" in error_of(
        sources.quotas, (20, 20), (F(2), F(1)), 40
    )
    assert "part 2 has so small a weight that none of its 10 rows" in error_of(
        sources.quotas, (10, 10), (F(100), F(1)), 0
    )


def test_a_mixture_takes_its_shares(tmp_path):
    a = write(tmp_path / "a.jsonl", *map(plain, range(40)), plain(99, " ") | {"rejected": "w99"})
    dialogues = [{"chosen": f"{head} a", "rejected": f"{head} b"} for i in range(30)
                 if (head := f"\n\nHuman: q{i}\n\nAssistant:")]  # fmt: skip
    b = write(tmp_path / "b.jsonl", *dialogues)
    rows, counts, parts = sources.read_config(mixture(f"{a}:3", f"hh_rlhf@{b}"), 0)
    assert counts == {"same_answers": 1}
    assert parts == [
        {"path": str(a), "format": "jsonl", "weight": 3.0, "read": 41, "dropped": {"same_answers": 1}, "taken": 40},
        {"path": str(b), "format": "hh_rlhf", "weight": 1.0, "read": 30, "dropped": {}, "taken": 13},
    ]
    assert [row.prompt for row in rows[:40]] == [f"prompt {i}\n\n" for i in range(40)]  # one form for all
    assert all(row.prompt.startswith("q") and row.prompt.endswith("\n\n") for row in rows[40:])
    again = sources.read_config(mixture(f"{a}:3", f"hh_rlhf@{b}"), 0)
    assert again[0] == rows and sources.read_config(mixture(f"{a}:3", b), 1)[0] != rows
    fewer, _, parts = sources.read_config(mixture(f"{a}:3", b, num_rows=20), 0)
    assert [part["taken"] for part in parts] == [15, 5] and {*fewer} < {*rows}


def test_a_row_of_two_parts_is_taken_once(tmp_path):
    a, b = write(tmp_path / "a.jsonl", *map(plain, range(5))), write(tmp_path / "b.jsonl", *map(plain, range(3, 9)))
    rows, counts, parts = sources.read_config(mixture(a, b), 0)
    assert len(rows) == len(set(rows)) == 8 and counts == {"duplicate_row": 2}
    assert [(part["read"], part["taken"]) for part in parts] == [(5, 4), (6, 4)]
    b = write(tmp_path / "b.jsonl", plain(1), plain(2))
    assert "all rows are those of other parts" in error_of(sources.read_config, mixture(a, b), 0)


def test_plain_prompts_stay_plain_in_a_mixture(tmp_path):
    a, b = write(tmp_path / "a.jsonl", plain(1)), write(tmp_path / "b.jsonl", plain(2))
    assert [row.prompt for row in sources.read_config(mixture(a, b), 0)[0]] == ["prompt 1", "prompt 2"]


def test_a_sample_depends_on_seed_and_texts_alone():
    rows = [PreferenceExample(f"p{i}", "l", "w") for i in range(50)]
    few = sources.sampled(rows, 10, 0)
    assert few == sorted(few, key=rows.index) and len({*few}) == 10
    assert {*sources.sampled(rows[::-1], 10, 0)} == {*few} != {*sources.sampled(rows, 10, 1)}
    assert {*few} < {*sources.sampled(rows, 20, 0)}


def test_some_rows_of_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(plain, range(20)))
    config = DataConfig(source="file", path=str(path), num_rows=6)
    rows, _, parts = sources.read_config(config, 0)
    assert len(rows) == 6 and parts[0]["taken"] == 6 and parts[0]["read"] == 20
    everything = sources.read_config(DataConfig(source="file", path=str(path)), 0)[0]
    assert everything == sources.read(path)[0] and rows == sources.sampled(everything, 6, 0)
    assert "takes 21 rows of part 1, which has 20" in error_of(
        sources.read_config, dataclasses.replace(config, num_rows=21), 0
    )


def test_parts_that_do_not_go_together(tmp_path):
    a = write(tmp_path / "a.jsonl", plain(1))
    b = write(tmp_path / "b.jsonl", plain(2) | {"requirements": [{"kind": "quotes"}]})
    c = write(tmp_path / "c.jsonl", {"prompt": "p"})
    assert "requirements must be in all parts or in none" in error_of(sources.read_config, mixture(a, b), 0)
    assert "answers must be in all parts" in error_of(sources.read_config, mixture(a, c), 0, answers=False)
    columns = {"columns": "chosen:good"}
    assert "named columns@PATH" in error_of(sources.read_config, mixture(a, **columns), 0)
    d = write(tmp_path / "d.jsonl", {"prompt": "p", "good": "w", "rejected": "l"})
    rows = sources.read_config(mixture(a, f"columns@{d}", **columns), 0)[0]
    assert [row.chosen for row in rows] == ["w1", "w"]


def test_a_prompt_of_two_parts_stays_in_one_fold(tmp_path):
    head = "\n\nHuman: prompt {}\n\nAssistant:"
    a = write(tmp_path / "a.jsonl", *map(plain, range(60)))
    b = write(tmp_path / "b.jsonl", *({side: f"{head.format(i)} {side}" for side in ("chosen", "rejected")}
                                      for i in range(60)))  # fmt: skip
    c = write(tmp_path / "c.jsonl", *(
        {side: [{"role": "user", "content": f"prompt {i}"}, {"role": "assistant", "content": side * 2}]
         for side in ("chosen", "rejected")} for i in range(60)
    ))  # fmt: skip
    rows = sources.read_config(mixture(a, b, c), 0)[0]
    assert len(rows) == 180
    training, selection, test = sources.split_off(rows, 15, 30, 0)
    parts = [*sources.folds(training, 0), selection, test]
    assert [len(part) for part in parts] == [45, 45, 45, 15, 30]
    assert sum(len(prompts(part)) for part in parts) == len(prompts(rows)) == 60


# Dividing.


def examples(*multiplicities: int) -> list[PreferenceExample]:
    """Rows whose i-th prompt comes multiplicities[i] times, interleaved."""
    return [
        PreferenceExample(f"prompt {i}", f"l{i} {j}", f"w{i} {j}")
        for j in range(max(multiplicities))
        for i, number in enumerate(multiplicities)
        if j < number
    ]


def prompts(rows) -> set[str]:
    return {r.prompt for r in rows}


@pytest.mark.parametrize("n", [3, 4, 100, 101])
def test_folds_are_equal(n):
    parts = sources.folds(examples(*[1] * n), seed=0)
    assert sorted(map(len, parts)) == sorted([n // 3, (n + 1) // 3, (n + 2) // 3])


@pytest.mark.parametrize("seed", range(3))
def test_folds_share_no_prompt_and_lose_no_row(seed):
    rows = examples(*[1] * 40, *[2] * 20, *[7] * 3, 15)
    parts = sources.folds(rows, seed)
    assert sorted(r.chosen for part in parts for r in part) == sorted(r.chosen for r in rows)
    assert sum(len(prompts(part)) for part in parts) == len(prompts(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:  # rows keep their order
        assert part == [r for r in rows if r in part]


def test_folds_depend_on_the_seed_and_not_on_the_order():
    rows = examples(*[1] * 50, *[3] * 5)
    first = sources.folds(rows, 0)
    assert [prompts(p) for p in sources.folds(rows[::-1], 0)] == [prompts(p) for p in first]
    assert [prompts(p) for p in sources.folds(rows, 1)] != [prompts(p) for p in first]


def test_a_dialogue_and_its_later_turns_stay_together():
    turns = "Tea {i}?\n\n", "Tea {i}?\n\nAssistant: Yes.\n\nHuman: And milk?\n\n"
    rows = [PreferenceExample(turn.format(i=i), "good", "bad") for i in range(60) for turn in turns]
    training, selection, test = sources.split_off(rows, 10, 20, 0)
    parts = [*sources.folds(training, 0), selection, test]
    seen = [{row.prompt.split("?")[0] for row in part} for part in parts]
    assert [len(part) for part in parts] == [30, 30, 30, 10, 20]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 60


ASKED = "Tell me about number {}."


@pytest.mark.parametrize(
    "others",
    [
        ["tell me  ABOUT number {}"],
        ["Be kind.\n\nTell me about number {}.", "You are a pirate.\n\nSay it in rhymes.\n\nTell me about number {}."],
        ["\n\nHuman: Tell me about number {}.\n\nAssistant:", "Tell me about number {}.\n\n"],
        ["Human: Tell me about number {}.\n\nAssistant: Why?\n\nHuman: Just so.\n\n"],
    ],
)
def test_a_question_in_other_clothes_stays_in_one_part(others):
    rows = [PreferenceExample(form.format(i), "l", f"w{i}") for form in (ASKED, *others) for i in range(60)]
    training, selection, test = sources.split_off(rows, 15, 30, 0)
    seen = [{row.chosen for row in part} for part in (*sources.folds(training, 0), selection, test)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 60 and min(map(len, seen)) >= 5


def test_keys_of_prompts():
    heads = [f"Translate this.\n\nword {i}" for i in range(sources.SYSTEM_TEXT)]
    few = [f"A song.\n\nWho sings line {i}?" for i in range(sources.SYSTEM_TEXT - 1)]
    keys = sources.prompt_keys([*heads, *few, "???", "!!!", "Ça va\u2009?", "Human: no", "Humans: no", "ASK\n\n\nit"])
    assert keys[0] == "word 0" and keys[len(heads)] == "a song who sings line 0"
    assert keys[-6:] == ["???", "!!!", "ça va", "no", "humans no", "ask it"]


def test_too_few_prompts_for_folds():
    assert "2 different prompts" in error_of(sources.folds, examples(5, 5), 0)


def test_divisions_are_the_same_in_every_process():
    code = (
        "from pit_jax.data import sources; from pit_jax.types import PreferenceExample as E\n"
        "rows = [E(f'prompt {i}', 'l', 'w') for i in range(12)]\n"
        "print([[int(r.prompt[7:]) for r in p] for p in (*sources.folds(rows, 3), *sources.split_off(rows, 2, 3, 3))])"
    )
    # PYTHONHASHSEED changes hash(), which must play no part.
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=pathlib.Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    rows = [PreferenceExample(f"prompt {i}", "l", "w") for i in range(12)]
    here = (*sources.folds(rows, 3), *sources.split_off(rows, 2, 3, 3))
    assert runs == {f"{[[int(r.prompt[7:]) for r in part] for part in here]}\n"}


@pytest.mark.parametrize("seed", range(3))
def test_split_off(seed):
    rows = examples(*[1] * 30, *[4] * 5)
    training, selection, test = sources.split_off(rows, num_selection=7, num_test=11, seed=seed)
    assert (len(training), len(selection), len(test)) == (len(rows) - 18, 7, 11)
    assert sorted(r.chosen for part in (training, selection, test) for r in part) == sorted(r.chosen for r in rows)
    for a, b in ((training, selection), (training, test), (selection, test)):
        assert not prompts(a) & prompts(b)
    for part in (training, selection, test):
        assert part == [r for r in rows if r in part]


def test_split_off_depends_on_the_seed_and_not_on_the_order():
    rows = examples(*[1] * 50)
    parts = sources.split_off(rows, 10, 10, 0)
    assert [prompts(p) for p in sources.split_off(rows[::-1], 10, 10, 0)] == [prompts(p) for p in parts]
    assert prompts(sources.split_off(rows, 10, 10, 1)[2]) != prompts(parts[2])


def test_split_off_limits():
    rows = examples(*[1] * 10)
    assert [len(p) for p in sources.split_off(rows, 0, 0, 0)] == [10, 0, 0]
    assert [len(p) for p in sources.split_off(rows, 4, 5, 0)] == [1, 4, 5]
    assert "leave nothing of 10 rows" in error_of(sources.split_off, rows, 5, 5, 0)
    assert "must not be negative" in error_of(sources.split_off, rows, -1, 5, 0)
    # Prompts that come three times: seven rows are not to be had, six are.
    assert [len(p) for p in sources.split_off(examples(*[3] * 5), 0, 7, 0)] == [9, 0, 6]
    assert "fit num_test=2" in error_of(sources.split_off, examples(*[3] * 5), 3, 2, 0)
