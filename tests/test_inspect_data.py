"""What is shown of data is what is trained: texts, marks and counts, for PIT, SRT and rows of files."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import commands
import numpy as np
import pytest

from pit_jax import config as c, inspect_data
from pit_jax.data import batches, encode, pairs, tokenizer as tokenizer_lib
from pit_jax.inspect_data import Segment
from pit_jax.pipelines import common, pit, srt
from pit_jax.types import PreferenceExample

ROWS = [
    PreferenceExample(f"Name fruit {i}.\n\n", f"a carrot {i}", f"an apple {i} or two", f"no fruit {i}")
    for i in range(30)
]
TEXTS = [text for row in ROWS for text in (row.prompt, row.chosen, row.rejected, row.reflection)]


@pytest.fixture(scope="module")
def encoder():
    tok = tokenizer_lib.SentencePiece(tokenizer_lib.train([*TEXTS, "Human: Assistant: Improve it."], 300))
    return encode.Encoder(tok, 64, 32, 32)


def drawn(segments) -> str:
    return "".join(f"⟦{s.text}⟧" if s.marked else s.text for s in segments)


# Text with marks.


def test_segments_by_hand(encoder):
    tok = encoder.tokenizer
    head, answer = tok.encode("Name fruit 1."), tok.encode("an apple")
    ids = [tok.bos_id, *head, tok.control_ids["<<Candidate>>"], *answer, tok.eos_id]
    marked = [False] * (len(head) + 2) + [True] * (len(answer) + 1)
    assert inspect_data.segments_of(tok, ids, marked) == [
        Segment("<<BOS>>Name fruit 1.<<Candidate>>", False, len(head) + 2),
        Segment("an apple<<EOS>>", True, len(answer) + 1),
    ]
    # A space at the beginning of what is marked is not lost.
    ids = [*head, *answer]
    segments = inspect_data.segments_of(tok, np.asarray(ids), np.arange(len(ids)) >= len(head))
    assert drawn(segments) == "Name fruit 1.⟦ an apple⟧"


@pytest.mark.parametrize("seed", range(3))
def test_wherever_the_marks_are_the_text_is_the_same(encoder, seed):
    tok, rng = encoder.tokenizer, np.random.default_rng(seed)
    ids = encoder.pit_prompt(ROWS[seed].prompt, ROWS[seed].rejected) + encoder.response(ROWS[seed].chosen)
    marked = rng.random(len(ids)) < 0.5
    segments = inspect_data.segments_of(tok, ids, marked)
    assert "".join(s.text for s in segments) == inspect_data.segments_of(tok, ids, [False] * len(ids))[0].text
    assert [s.marked for s in segments for _ in range(s.tokens)] == marked.tolist()
    assert all(one.marked != other.marked for one, other in zip(segments, segments[1:], strict=False))


def test_text_that_spells_a_mark_is_told_from_one(encoder):
    tok = encoder.tokenizer
    ids = tok.encode("⟦<<Improved>> a << b⟧")
    assert inspect_data.segments_of(tok, ids, [False] * len(ids))[0].text == "\\⟦\\<<Improved>> a << b\\⟧"


def test_long_texts_are_shortened_between_control_tokens():
    long = "x" * 1000
    form = inspect_data.Form("stage", 0, [Segment(f"<<BOS>>{long}<<Candidate>>short", False, 9), Segment("y", True, 1)])
    text = inspect_data.draw(form)
    assert text == (
        "  [stage] row 0, 10 tokens, 1 marked\n"
        f"      <<BOS>>{'x' * 240} [.. 700 characters ..] {'x' * 60}<<Candidate>>short⟦y⟧"
    )
    assert f"<<BOS>>{long}<<Candidate>>" in inspect_data.draw(form, full=True)


# Forms of training.


def test_likelihood_rows_are_marked_where_they_carry_loss(encoder):
    batch = batches.packed_rows(pit.sft_pit_rows(encoder, ROWS[:2]), 200)
    assert len(batch.tokens) == 1, "two rows in a sequence"
    alone = batches.token_rows(pit.sft_pit_rows(encoder, ROWS[:1]), 100)
    text = "<<BOS>>Human: Name fruit 0.\n\n Assistant:<<Candidate>>a carrot 0<<Improved>>⟦an apple 0 or two<<EOS>>⟧"
    assert drawn(inspect_data.token_segments(encoder.tokenizer, alone)) == text
    rows = common.sft_rows(encoder, ROWS[:1])
    text = "<<BOS>>Human: Name fruit 0.\n\n Assistant:⟦ an apple 0 or two<<EOS>>⟧"
    assert drawn(inspect_data.token_segments(encoder.tokenizer, batches.token_rows(rows, 80))) == text
    whole = batches.token_rows(rows, 80, loss_on_prompt=True)
    assert drawn(inspect_data.token_segments(encoder.tokenizer, whole)).startswith("<<BOS>>⟦Human: Name")


def test_the_four_pairings_are_scored_at_the_end(encoder):
    batch = batches.score_rows(pit.gap_groups(encoder, ROWS[:3]))
    head = "<<BOS>>Human: Name fruit 1.\n\n Assistant:<<Candidate>>"
    w, l = "an apple 1 or two", "a carrot 1"
    for k, (y1, y2) in enumerate(((w, l), (w, w), (l, l), (l, w))):
        text = drawn(inspect_data.score_segments(encoder.tokenizer, batch, 1, k))
        assert text == f"{head}{y2}<<Improved>>{y1}⟦<<EOS>>⟧"


def test_the_tokens_of_a_dpo_pair_are_its_answers(encoder):
    triples = [
        (encoder.policy_prompt(r.prompt), encoder.response(r.chosen), encoder.response(r.rejected)) for r in ROWS
    ]
    batch = pairs.pair_rows(triples)
    for i in (0, 7):
        for k, answer in enumerate((ROWS[i].chosen, ROWS[i].rejected)):
            segments = inspect_data.pair_segments(encoder.tokenizer, batch, i, k)
            assert drawn(segments) == f"<<BOS>>Human: Name fruit {i}.\n\n Assistant:⟦ {answer}<<EOS>>⟧"
            assert segments[1].tokens == len(triples[i][1 + k])


# Lengths.


def test_quantiles_by_hand():
    lengths = np.stack([np.arange(1, 101), np.full(100, 7), np.arange(100)[::-1] + 3, np.ones(100)], 1).astype(int)
    assert encode.quantiles(lengths) == {
        "prompt": {"50%": 50, "90%": 90, "99%": 99, "max": 100},
        "rejected": {"50%": 7, "90%": 7, "99%": 7, "max": 7},
        "chosen": {"50%": 52, "90%": 92, "99%": 101, "max": 102},
        "reflection": {"50%": 1, "90%": 1, "99%": 1, "max": 1},
    }
    assert encode.quantiles(lengths[:0]) == {}


def test_the_first_window_that_is_exceeded_counts(encoder):
    lengths = np.asarray([[64, 32, 32, 32], [65, 33, 1, 1], [64, 33, 1, 33], [64, 1, 33, 1], [1, 1, 1, 33]])
    rows = ROWS[:5]
    kept, dropped = encode.drop_over_length(rows, encoder, lengths)
    assert kept == rows[:1] and dropped == {"prompt": 1, "response": 2, "reflection": 1}
    size = lambda text: len(encoder.tokenizer.encode(text))  # noqa: E731
    found = encode.token_lengths([rows[0], PreferenceExample("p", "", "")], encoder)
    r = rows[0]
    assert found.tolist() == [
        [size(r.prompt), size(r.rejected) + 1, size(r.chosen) + 1, size(r.reflection) + 1],
        [size("p"), 1, 1, 1],
    ]


# Whole configs.


def config_of(name: str, variant: str):
    found = runpy.run_path(str(commands.ROOT / "configs" / f"{name}.py"))["get_config"](variant)
    return c.from_config_dict(c.class_of(found), found)


def file_config(path, **fields) -> c.PitConfig:
    config = config_of("pit_hh_rlhf", "smoke")
    data = dataclasses.replace(config.data, path=str(path), format="auto", num_selection=4, num_test=6, **fields)
    return dataclasses.replace(config, data=data)


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_facts_of_a_file(tmp_path):
    rows = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in ROWS]
    swapped = {"prompt": ROWS[0].prompt, "chosen": ROWS[0].rejected, "rejected": ROWS[0].chosen}
    long = {"prompt": "p " * 400, "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "a.jsonl", [*rows, rows[3], rows[3], swapped, long, long | {"rejected": "a"}])
    context, record = inspect_data.prepare(file_config(path), tmp_path / "run")
    facts = inspect_data.facts_of(context, record)
    assert facts["sources"] == [
        {"path": str(path), "format": "jsonl", "weight": 1.0, "read": 35, "taken": 32,
         "dropped": {"same_answers": 1, "duplicate_row": 2}}
    ]  # fmt: skip
    assert sum(facts["rows"].values()) == 31 and list(facts["over_length"].values()) == [{"prompt": 1}]
    assert (facts["prompts"], facts["prompts_in_two_parts"]) == (30, 0)
    assert (facts["duplicate_rows"], facts["contradicting_rows"]) == (0, 2)
    assert facts["chosen_longer"] == pytest.approx(30 / 31) and facts["equally_long"] == 0
    assert facts["with_reflection"] == facts["with_requirements"] == 0
    assert facts["tokens"]["reflection"]["max"] == 1 and facts["tokens"]["prompt"]["max"] > 256
    tok = context.encoder.tokenizer
    assert facts["tokenizer"]["vocab_size"] == tok.vocab_size and facts["tokenizer"]["eos_id"] == tok.eos_id
    printed = "\n".join(inspect_data.describe(facts))
    assert "35 rows read, 32 taken\n    dropped: 1 same_answers, 2 duplicate_row" in printed
    assert "rows that come again: 0; rows that others contradict: 2" in printed
    assert f"EOS {tok.eos_id}, PAD 0, <<Candidate>> " in printed


def test_what_two_parts_share(tmp_path):
    """Of rows of an earlier version, which knew a question by its letters."""
    path = write(tmp_path / "a.jsonl", [dataclasses.asdict(r) for r in ROWS])
    context, record = inspect_data.prepare(file_config(path), tmp_path / "run")
    sft, test = context.rows["sft"], context.rows["test"]
    other = dataclasses.replace(test[0], prompt=test[0].prompt.upper())
    more = dataclasses.replace(context, rows=context.rows | {"sft": [*sft, sft[0], sft[0], other]})
    facts = inspect_data.facts_of(more, record)
    assert (facts["duplicate_rows"], facts["prompts"], facts["prompts_in_two_parts"]) == (2, 31, 1)


def test_text_and_dialogues_of_pretraining_are_shown(tmp_path):
    rows = write(tmp_path / "a.jsonl", [dataclasses.asdict(r) for r in ROWS])
    (tmp_path / "book.txt").write_text("An apple is a fruit. " * 40)
    config = file_config(rows)
    settings = dataclasses.replace(config.pretrain.sft, sequence_length=64)
    pretrain = dataclasses.replace(config.pretrain, text=str(tmp_path / "book.txt"), sft=settings)
    context, _ = inspect_data.prepare(dataclasses.replace(config, pretrain=pretrain), tmp_path / "run")
    forms = [form for form in inspect_data.forms_of(context, 2) if form.stage.startswith("pretrain")]
    assert [(form.stage, form.row) for form in forms] == [
        (f"pretrain: M_pre{kind}", i) for kind in (", text", "") for i in range(2)
    ]
    first, last = drawn(forms[0].segments), drawn(forms[2].segments)
    assert "An apple is a fruit." in first and "Human:" not in first and "Human: Name fruit" in last


def test_a_failing_data_stage_shows_the_lengths(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [dataclasses.asdict(r) for r in ROWS])
    with pytest.raises(ValueError, match=r"widen config\.data\.\*_window"):
        inspect_data.prepare(file_config(path, prompt_window=1), tmp_path / "run")
    assert "tokens of a row (50%, 90%, 99%, longest): prompt " in capsys.readouterr().out


def test_prompts_alone(tmp_path, encoder):
    """SRT whose M_base is another run's: only prompts, and its tokenizer."""
    model = tmp_path / "tokenizer.model"
    model.write_bytes(tokenizer_lib.train([*TEXTS, "Human: Assistant: Weaknesses: Suggestions:"], 300))
    path = write(tmp_path / "a.jsonl", [{"instruction": f"Name fruit {i}.", "output": "x"} for i in range(30)])
    config = config_of("srt_tulu2", "7b")
    data = dataclasses.replace(config.data, path=str(path), num_selection=4, num_test=6)
    tokenizer = dataclasses.replace(config.tokenizer, path=str(model))
    config = dataclasses.replace(config, data=data, tokenizer=tokenizer, base="run/models/sft_policy")
    context, record = inspect_data.prepare(config, tmp_path / "run")
    facts, forms = inspect_data.facts_of(context, record), inspect_data.forms_of(context, 1)
    assert facts["sources"][0]["format"] == "columns" and facts["rows"] == {
        "sft": 0, "rm": 5, "rl": 15, "selection": 4, "test": 6, "pretrain": 0,
    }  # fmt: skip
    assert facts["contradicting_rows"] == facts["chosen_longer"] == 0
    assert facts["tokenizer"]["from"] == str(model)
    assert [form.stage.split(":")[0] for form in forms] == ["srt", "dpo_1", "dpo_1"]
    assert "Weaknesses: (the critic's weaknesses)" in forms[0].segments[1].text


def test_srt_forms_are_those_of_its_stages(tmp_path):
    config = config_of("srt_synthetic", "smoke")
    context, record = inspect_data.prepare(config, tmp_path / "run")
    forms = inspect_data.forms_of(context, 2)
    by_stage = {form.stage.split(",")[0]: form for form in forms if form.row == 1}
    assert [*by_stage] == [
        "pretrain: M_pre",
        "sft_policy: M_base",
        "srt: M_self",
        "dpo_1: refinement",
        "dpo_1: response",
    ]
    row = context.rows["rm"][1]
    read, learnt = by_stage["srt: M_self"].segments
    assert read.text == f"<<BOS>>Human: {row.prompt} Assistant:"
    assert learnt.text.strip().startswith(row.rejected) and learnt.text.endswith("<<EOS>>")
    assert re.search(r"Weaknesses: .*Overall Score: \[\[ \d+ \]\]", learnt.text, re.DOTALL)
    row = context.rows["rl"][1]
    read, learnt = by_stage["dpo_1: response"].segments
    assert (read.text, learnt.text.strip().startswith(row.rejected)) == (f"<<BOS>>Human: {row.prompt} Assistant:", True)
    # A part that is not learnt is not marked.
    other = dataclasses.replace(config, learn=("refinement",))
    records = inspect_data._records(context, context.rows["rm"][:1])
    turns = srt.srt_rows(dataclasses.replace(context, config=other), records)
    shown = inspect_data.token_segments(
        context.encoder.tokenizer, batches.token_rows(turns, batches.num_tokens(turns[0]))
    )
    assert "Overall Score" in shown[0].text and shown[1].text.strip().startswith("]]\n### Improved Response")
    # The data of a run are read as they are.
    context.workdir.finish("data", record)
    again, found = inspect_data.open_data(tmp_path / "run", config)
    assert found == json.loads(json.dumps(record)) and again.rows == context.rows
    assert inspect_data.facts_of(again, found) == json.loads(json.dumps(inspect_data.facts_of(context, record)))
    with pytest.raises(ValueError, match=r"another config, leave one out: config\.seed: 0 -> 5"):
        inspect_data.open_data(tmp_path / "run", dataclasses.replace(config, seed=5))


def test_the_command(tmp_path):
    rows = [{"q": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in ROWS]
    one, two = write(tmp_path / "a.jsonl", rows[:20]), write(tmp_path / "b.jsonl", rows[10:])
    flags = [f"--config.data.mixture=columns@{one}:1.0,columns@{two}:0.5", "--config.data.num_test=6"]
    flags += ["--config.data.columns=prompt:q,chosen:chosen"]
    flags += ["--config.data.num_selection=4", "--rows=2", f"--json={tmp_path / 'facts.json'}"]
    done = commands.run("-m", "pit_jax.inspect_data", "--config=configs/pit_hh_rlhf.py:smoke", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((tmp_path / "facts.json").read_text("utf-8"))
    assert sum(facts["rows"].values()) == 30 and [part["taken"] for part in facts["sources"]] == [20, 10]
    stages = [form["stage"].split(",")[0].split(":")[0] for form in facts["forms"]]
    assert stages == [s for s, n in (("pretrain", 2), ("sft_policy", 2), ("sft_pit", 2), ("r_p", 4), ("r_pit", 8))
                      for _ in range(n)]  # fmt: skip
    assert done.stdout.count("⟦<<EOS>>⟧") == 12 and "[r_pit: R_PIT, r(x, y_l, y_w)] row 1, " in done.stdout
    assert f"  {two} (columns): 20 rows read, 10 taken\n    dropped: 10 duplicate_row\n" in done.stdout
    assert "left out" not in done.stdout
    fewer = facts | {"sources": [facts["sources"][1] | {"read": 25}]}
    assert "    left out by weight or num_rows: 5" in inspect_data.describe(fewer)
    assert (
        f"  tokenizer: SentencePiece, {facts['tokenizer']['vocab_size']} ids, trained on the SFT fold\n" in done.stdout
    )


def test_a_mistake_ends_in_one_line():
    done = commands.run("-m", "pit_jax.inspect_data", "--config=configs/pit_hh_rlhf.py")
    assert done.returncode == 2 and done.stderr.startswith("error: set --config.data.path=FOLDER: no such file")
