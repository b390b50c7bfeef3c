"""The data stage keeps a run's tokenizer and chat template, and finds those of the model that it starts from."""

import dataclasses
import json

import pytest
from test_chat import CHATML, sentencepiece_folder
from test_tokenizer_kinds import byte_level, sentencepiece_model

from pit_jax import config as c
from pit_jax.data import encode, tokenizer as tokenizer_lib
from pit_jax.pipelines import common, stages
from pit_jax.pipelines.common import Context


def rows_file(path):
    words = "the fox jumps over a lazy dog and writes an answer".split()
    rows = [{"prompt": f"{w} {i}\nmore", "chosen": f"{w} yes", "rejected": f"{w} no"} for i, w in enumerate(4 * words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(tmp_path, tokenizer, data=None, **fields):
    file = {"source": "file", "path": rows_file(tmp_path / "rows.jsonl"), "num_selection": 4, "num_test": 4}
    data = dataclasses.replace(data or c.DataConfig(), **file)
    config = dataclasses.replace(c.PitConfig(), data=data, tokenizer=tokenizer, **fields)
    context = Context(config, stages.Workdir(tmp_path / "run", config), None)
    record = common.data_stage(context)
    context.workdir.finish("data", record)
    return context, record


def test_the_trained_tokenizer_is_one_file(tmp_path):
    context, record = run(tmp_path, c.TokenizerConfig(vocab_size=300))
    root = context.workdir.root / "data"
    assert (root / "tokenizer.model").is_file() and not (root / "tokenizer").exists() and "lossy" not in record
    assert not (root / "chat_template.json").exists()
    again = common.open_workdir(context.workdir.root)
    assert again.encoder.digest == context.encoder.digest
    # A workdir from before there were chat templates.
    path = context.workdir.root / "config.json"
    old = json.loads(path.read_text())
    del old["tokenizer"]["chat_template"]
    path.write_text(json.dumps(old))
    assert common.open_workdir(context.workdir.root).encoder.digest == context.encoder.digest
    stages.Workdir(context.workdir.root, context.config)
    del old["tokenizer"]
    path.write_text(json.dumps(old | {"seed": 5}))
    with pytest.raises(ValueError, match=r"config\.seed: 5 -> 0"):
        stages.Workdir(context.workdir.root, context.config)


def test_a_later_start_encodes_no_text_to_know_how_long_it_is(tmp_path, monkeypatch):
    data = c.DataConfig(prompt_window=12, reflection_window=4)  # "jumps 3\nmore" has 12 bytes
    context, record = run(tmp_path, c.TokenizerConfig(path="bytes"), data=data)
    assert sum(record["rows"].values()) + sum(x["prompt"] for x in record["over_length"].values()) == 44
    again = common.open_workdir(context.workdir.root)
    measure, asked = encode.token_lengths, []
    monkeypatch.setattr(encode, "token_lengths", lambda rows, _: asked.append(len(rows)) or measure(rows, _))
    common.load_data(again)
    assert again.rows == context.rows and not asked
    path = context.workdir.root / "data" / "sft.jsonl"
    path.write_text(path.read_text().partition("\n")[2])  # another number of rows: the lengths are not theirs
    common.load_data(again)
    assert len(asked) == 1 and set(again.rows["sft"]) <= set(context.rows["sft"])
    (context.workdir.root / "data" / common.LENGTHS).unlink()  # a workdir of an earlier version
    common.load_data(again)
    assert len(asked) == 1 + len(common.SPLITS) and again.rows["rl"] == context.rows["rl"]


@pytest.mark.parametrize("kind", ["bytes", "hugging face", "sentencepiece", "one file"])
@pytest.mark.parametrize("chat", ["", "model"])
def test_a_run_keeps_its_tokenizer(tmp_path, kind, chat):
    if kind == "hugging face":
        pytest.importorskip("tokenizers")
        byte_level(tmp_path / "t")
    elif kind == "sentencepiece":
        sentencepiece_folder(tmp_path / "t")
    elif kind == "one file":
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "m.model").write_bytes(sentencepiece_model())
    path = {"bytes": "bytes", "one file": str(tmp_path / "t" / "m.model")}.get(kind, str(tmp_path / "t"))
    if chat:
        pytest.importorskip("jinja2")
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / "chat_template.jinja").write_text(CHATML)
        chat = str(tmp_path / "t" / "chat_template.jinja") if kind == "bytes" else "model"
    context, record = run(tmp_path, c.TokenizerConfig(path=path, chat_template=chat))
    assert record["vocab_size"] == context.encoder.tokenizer.vocab_size == tokenizer_lib.load(path).vocab_size
    assert record["rows"]["test"] == 4
    for file in (tmp_path / "t").glob("*"):
        file.unlink()
    again = common.open_workdir(context.workdir.root)
    assert again.encoder.digest == context.encoder.digest
    assert again.encoder.policy_prompt("the fox") == context.encoder.policy_prompt("the fox")
    assert (again.encoder.chat is not None) == bool(chat)
    assert (context.workdir.root / "data" / "tokenizer.model").exists() == (kind in ("sentencepiece", "one file"))


def test_texts_that_do_not_come_back_are_told(tmp_path, capsys):
    (tmp_path / "m.model").write_bytes(sentencepiece_model(normalization_rule_name="nmt_nfkc"))
    _, record = run(tmp_path, c.TokenizerConfig(path=str(tmp_path / "m.model")))
    assert record["lossy"] == 0.5, "prompts have a newline, answers have none"
    assert "50.0% of texts do not come back" in capsys.readouterr().out


def test_the_tokenizer_of_a_checkpoint(tmp_path):
    """A converted checkpoint has one in it; that of another run is beside its models."""
    checkpoint, other = tmp_path / "converted", tmp_path / "other"
    tokenizer_lib.Bytes().save(checkpoint / "tokenizer")
    (other / "data").mkdir(parents=True)
    assert common.tokenizer_of(str(other / "models" / "srt")) is None and common.tokenizer_of("") is None
    (other / "data" / "tokenizer.model").write_bytes(b"")
    assert common.tokenizer_of(str(other / "models" / "srt")) == other / "data" / "tokenizer.model"
    assert common.tokenizer_of(str(checkpoint)) == checkpoint / "tokenizer"
    fields = dict(pretrain=dataclasses.replace(c.PretrainConfig(), checkpoint=str(checkpoint)))
    context, _ = run(tmp_path, c.TokenizerConfig(), **fields)
    assert isinstance(context.encoder.tokenizer, tokenizer_lib.Bytes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "nowhere"}, r"tokenizer nowhere does not exist \(config.tokenizer.path\)"),
        ({"path": "bytes", "chat_template": "model"}, "no chat template comes with the tokenizer"),
        ({"path": "bytes", "chat_template": "nowhere.jinja"}, "chat_template=nowhere.jinja cannot be read"),
    ],
)
def test_what_is_missing_is_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, c.TokenizerConfig(**fields))
