"""The command that opens models of Hugging Face and writes them: whole or absent, and what it says."""

import dataclasses
import importlib.util
import json
import shutil
import sys
import types

import commands
import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from absl import flags
from absl.testing import flagsaver
from test_chat import CHATML
from test_tokenizer_kinds import byte_level, sentencepiece_model

from pit_jax import checkpoint, convert
from pit_jax.config import DataConfig, ModelConfig, PitConfig, TokenizerConfig
from pit_jax.data import tokenizer as tokenizer_lib
from pit_jax.models import hf
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines.common import shapes
from pit_jax.pipelines.stages import Workdir

pytestmark = [
    pytest.mark.usefixtures("one_device"),
    pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors not installed (extra: hf)"),
]
parity = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers not installed (extra: parity)"
)

SIZES = ModelConfig(
    vocab_size=300, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24,
    embedding_scale=False, qkv_bias=True,
)  # fmt: skip
KEPT = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0, "max_position_embeddings": 77}


def host_params(module, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.3).astype(np.float32), shapes(module))


@pytest.fixture
def theirs(tmp_path):
    """A Qwen 2 with a tokenizer of 290 ids, the highest of them added, and pieces of 0 to 288."""
    folder = tmp_path / "theirs"
    params = host_params(Transformer(SIZES))
    hf.write(folder, params, hf.Description("language_model", "qwen2", "bfloat16", SIZES, KEPT))
    write_tokenizer(folder, 290)
    write(folder / "generation_config.json", {"eos_token_id": [2, 7]})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "merges.bin").write_bytes(b"x")
    return folder


def write_tokenizer(folder, num_ids):
    """A tokenizer.json of words p0, p1, ... and the added token <|im_end|> with the highest id."""
    words = tokenizers.models.WordLevel({f"p{i}": i for i in range(num_ids - 1)}, unk_token="p0")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))


def write(path, content):
    path.write_text(json.dumps(content))


def test_import_and_export_bring_everything_back(theirs, tmp_path, capsys):
    description, params = convert.import_hf(str(theirs), tmp_path / "ckpt")
    assert description.kind == "language_model" and description.family == "qwen2"
    assert description.dtype == description.config.dtype == "bfloat16"
    # 300 rows are more than the 290 ids and the 2 symbols.
    assert (description.config.num_tokens, description.config.vocab_size) == (300, 384)
    assert hf.read_description(tmp_path / "ckpt") == description
    earlier = hf.read_json(tmp_path / "ckpt" / "model.json")
    del earlier["model"]["attention"], earlier["model"]["attention_block"]
    (tmp_path / "ckpt" / "model.json").write_text(json.dumps(earlier))
    assert hf.read_description(tmp_path / "ckpt") == description, "of a version that had one way to attend"
    assert checkpoint.all_steps(tmp_path / "ckpt") == [0]
    names = {path.name for path in (tmp_path / "ckpt" / "tokenizer").iterdir()}
    assert names == {"tokenizer.json", "generation_config.json", "chat_template.jinja"}
    assert "warning" not in capsys.readouterr().err

    again, same = convert.export_hf(tmp_path / "ckpt", tmp_path / "out")
    assert again == description
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    values = hf.read_json(tmp_path / "out" / "config.json")
    assert values == hf.read_json(theirs / "config.json") and values["eos_token_id"] == [2, 7]
    ours, exported = (tokenizer_lib.load(tmp_path / name) for name in ("ckpt/tokenizer", "out"))
    assert ours.digest == exported.digest and ours.control_ids == {"<<Candidate>>": 290, "<<Improved>>": 291}
    table = hf.read_json(tmp_path / "out" / "tokenizer.json")
    added = [token["content"] for token in table.pop("added_tokens")]
    assert added == ["<|im_end|>", "<<Candidate>>", "<<Improved>>"], "what a text can not spell is in the file"
    before = hf.read_json(theirs / "tokenizer.json")
    assert before.pop("added_tokens")[0]["content"] == "<|im_end|>" and table == before
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not list(tmp_path.glob("*.partial"))

    convert.export_hf(tmp_path / "ckpt", tmp_path / "wide", "float32")
    assert hf.read_config(tmp_path / "wide")[0].dtype == "float32"
    wide, narrow = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("wide", "out"))
    assert 1.8 < wide / narrow < 2.0


def test_symbols_get_rows_where_the_table_has_none(theirs, tmp_path):
    """299 ids + 2 symbols in a table of 300 rows: one row is added, the mean of the 299."""
    write_tokenizer(theirs, 299)
    description, params = convert.import_hf(str(theirs), tmp_path / "ckpt")
    assert description.config.num_tokens == 301
    table = np.asarray(params["params"]["embedding"])
    assert table.shape == (384, 16) and not table[301:].any()
    mean = table[:299].astype(np.float64).mean(0).astype(ml_dtypes.bfloat16)  # as a row of the file would be
    np.testing.assert_array_equal(table[300], mean.astype(np.float32))
    convert.export_hf(tmp_path / "ckpt", tmp_path / "out")
    assert hf.read_json(tmp_path / "out" / "config.json")["vocab_size"] == 301
    back, same = convert.import_hf(str(tmp_path / "out"), tmp_path / "again")
    assert back.config == description.config, "the row is there now"
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_sizes_of_tokenizers(tmp_path):
    assert hf.tokenizer_size(tmp_path) is None
    model = tokenizer_lib.train(["some words to learn from, and some more"] * 3, 300)
    size = tokenizer_lib.SentencePiece(model).vocab_size
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert hf.tokenizer_size(tmp_path) == (size, [])
    write(tmp_path / "added_tokens.json", {"<pad>": size + 4})
    assert hf.tokenizer_size(tmp_path) == (size + 5, [])
    write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(size + 9): {"content": "<x>"}}})
    assert hf.tokenizer_size(tmp_path) == (size + 10, [])
    # tokenizer.json goes before tokenizer.model; ids may have gaps.
    write(tmp_path / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 700}}})
    assert hf.tokenizer_size(tmp_path) == (701, ["<<Candidate>>", "<<Improved>>"])
    write(tmp_path / "tokenizer.json", {"model": {"vocab": [["a", -1.0], ["<<Improved>>", -2.0]]}})
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert hf.tokenizer_size(tmp_path) == (2, ["<<Candidate>>"])
    write(tmp_path / "tokenizer.json", {"vocab": {}})
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        hf.tokenizer_size(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match="tokenizer.model is no SentencePiece model"):
        hf.tokenizer_size(tmp_path)


def test_a_tokenizer_that_cannot_be_used_is_told_at_import(theirs, tmp_path, capsys):
    (theirs / "generation_config.json").unlink()
    convert.import_hf(str(theirs), tmp_path / "ckpt")
    said = capsys.readouterr().err
    assert (
        said.startswith("warning: no run and no export can use the tokenizer of this model") and "names no EOS" in said
    )
    assert (tmp_path / "ckpt" / "model.json").is_file()


def test_a_tokenizer_without_a_table_is_told_at_export(theirs, tmp_path, capsys):
    (theirs / "tokenizer.json").unlink()
    (theirs / "tokenizer.model").write_bytes(sentencepiece_model())
    convert.import_hf(str(theirs), tmp_path / "ckpt")
    assert "warning" not in capsys.readouterr().err
    convert.export_hf(tmp_path / "ckpt", tmp_path / "out")
    assert "out gets tokenizer.model alone, from which transformers makes its own" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert hf.read_json(tmp_path / "out" / "tokenizer_config.json")["tokenizer_class"] == "LlamaTokenizer"


def test_without_a_tokenizer_no_rows_are_added(theirs, tmp_path, capsys):
    (theirs / "tokenizer.json").unlink()
    description, _ = convert.import_hf(str(theirs), tmp_path / "ckpt")
    assert description.config.num_tokens == 300
    assert "warning" in (said := capsys.readouterr().err) and "no rows for the control symbols" in said


RUN_SIZES = dataclasses.replace(SIZES, vocab_size=2048, embedding_scale=True, qkv_bias=False)


def make_run(root, write_data, stages, **fields):
    """A workdir of PIT with models of random parameters; `write_data` fills the folder data."""
    data = DataConfig(response_window=40)
    config = PitConfig(policy_model=RUN_SIZES, pit_model=RUN_SIZES, reward_model=RUN_SIZES, data=data, **fields)
    workdir = Workdir(root, config)
    (root / "data").mkdir()
    write_data(root / "data")
    workdir.finish("data", {})
    padded = dataclasses.replace(RUN_SIZES, vocab_size=384)
    for stage in stages:
        params = host_params((ScalarModel if stage == "r_p" else Transformer)(padded), len(stage))
        if stage == "r_p":
            params["params"]["bias"] = np.float32(1.25)
        workdir.save_model(stage, params)
        workdir.finish(stage, {})
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir of PIT with M_P^SFT and R_P of random parameters, and its tokenizer."""
    model = tokenizer_lib.train(["some words to learn from, and some more"] * 3, 300)
    write_model = lambda data: (data / "tokenizer.model").write_bytes(model)  # noqa: E731
    return make_run(tmp_path_factory.mktemp("run") / "run", write_model, ("sft_policy", "r_p"))


def test_a_stage_of_a_run_is_exported(run, tmp_path):
    """As many rows as the tokenizer has ids, and the ids that it ends with."""
    description, params = convert.export_hf(run / "models" / "sft_policy", tmp_path / "out")
    tokenizer = tokenizer_lib.load(run / "data" / "tokenizer.model")
    values = hf.read_json(tmp_path / "out" / "config.json")
    assert values["vocab_size"] == tokenizer.vocab_size == description.config.num_tokens < 384
    assert (values["model_type"], values["eos_token_id"], values["pad_token_id"]) == ("llama", 2, 0)
    assert values["max_position_embeddings"] == 512 + 2 * 40 + 128 + 256, "all windows, and room for templates"
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (run / "data" / "tokenizer.model").read_bytes()
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (3, 9))
    expected = convert.forward(description, params, ids)
    back, same = convert.import_hf(str(tmp_path / "out"), tmp_path / "ckpt")
    assert back.config.num_tokens == tokenizer.vocab_size, "its tokenizer has the symbols"
    np.testing.assert_allclose(convert.forward(back, same, ids), expected, rtol=1e-5, atol=1e-5)


@parity
def test_a_reward_model_of_a_run_is_exported(run, tmp_path, capsys):
    import torch
    import transformers

    description, params = convert.export_hf(run / "models" / "r_p", tmp_path / "out")
    assert "bias of 1.25" in capsys.readouterr().err
    ids = np.random.default_rng(0).integers(3, 200, (3, 9))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        scores = model(torch.tensor(ids)).logits[:, 0].numpy()
    np.testing.assert_allclose(convert.forward(description, params, ids), scores + 1.25, rtol=0, atol=1e-5)


@parity
def test_scores_where_pad_is_eos(tmp_path):
    """A tokenizer without a PAD, as that of Llama 2: transformers must score the EOS, in rows that it pads too."""
    import torch
    import transformers

    model = sentencepiece_model(user_defined_symbols=[], vocab_size=380)
    root = make_run(tmp_path / "run", lambda data: (data / "tokenizer.model").write_bytes(model), ["r_p"])
    tok = tokenizer_lib.load(root / "data" / "tokenizer.model")
    assert tok.pad_id == tok.eos_id == 2
    description, params = convert.export_hf(root / "models" / "r_p", tmp_path / "out")
    row = [tok.bos_id, *tok.encode("the fox"), tok.eos_id]
    expected = convert.forward(description, params, np.array([row]))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    pad = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id
    assert theirs.config.pad_token_id == pad == tok.control_ids["<<Improved>>"]
    with torch.no_grad():
        scores = theirs(torch.tensor([row + [pad] * 3, [5] * 3 + row])).logits[:1, 0].numpy()
        before = theirs(torch.tensor([row[:-1]])).logits[0, 0].item()
    np.testing.assert_allclose(scores + 1.25, expected, rtol=0, atol=1e-5)
    assert abs(before + 1.25 - expected[0]) > 0.01


def test_a_base_whose_pad_is_its_eos_is_told(tmp_path, capsys):
    tok = tokenizer_lib.load("bytes")
    kept = {"eos_token_id": [2, 7], "pad_token_id": 7}
    for pad, told in ((7, True), (None, True), (0, False)):
        description = hf.Description("language_model", "llama", "float32", SIZES, kept | {"pad_token_id": pad})
        hf.write_description(tmp_path, description)
        convert._warn_of_padding(tmp_path, tok)
        assert ("pad_token_id=257)" in capsys.readouterr().err) == told


@pytest.mark.parametrize("kind", ["table", "sentencepiece"])
def test_a_run_with_a_chat_template_says_how_it_ends_its_turns(kind, tmp_path):
    """generate() stops at what ends a turn, and the template is the one that was trained with."""
    chat = CHATML + "{# of the run #}"

    def write_data(data):
        if kind == "table":
            byte_level(data / "start", chat_template="{{ messages }}")
            write(data / "start" / "generation_config.json", {"eos_token_id": 261, "temperature": 0.5})
            tokenizer_lib.load(data / "start").save(data / "tokenizer")
        else:
            model = sentencepiece_model(vocab_size=380, user_defined_symbols=[], control_symbols=["<|im_end|>"])
            (data / "tokenizer.model").write_bytes(model)
        write(data / "chat_template.json", {"template": chat, "date": "2024-01-01"})

    tokenizer = TokenizerConfig(chat_template="some.jinja")
    root = make_run(tmp_path / "run", write_data, ["sft_policy"], tokenizer=tokenizer)
    convert.export_hf(root / "models" / "sft_policy", tmp_path / "out")
    out = tmp_path / "out"
    end = {"table": 264, "sentencepiece": 3}[kind]
    assert hf.read_json(out / "config.json")["eos_token_id"] == end
    assert hf.read_json(out / "tokenizer_config.json")["eos_token"] == "<|im_end|>"
    assert (out / "chat_template.jinja").read_text() == chat
    if kind == "table":
        assert hf.read_json(out / "generation_config.json") == {"eos_token_id": 264, "temperature": 0.5}
    back = tokenizer_lib.load(out)
    assert back.eos_id == end and back.chat_template == chat
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.eos_token_id == end and theirs.chat_template == chat


def test_a_run_without_a_chat_template_exports_none(tmp_path, capsys):
    """That of the model that it started from is for turns that it has not learnt; it ends answers as its rows do."""

    def write_data(data):
        byte_level(data / "start", chat_template="{{ messages }}")
        tokenizer_lib.load(data / "start").save(data / "tokenizer")
        assert tokenizer_lib.load(data / "tokenizer").chat_template == "{{ messages }}"

    root = make_run(tmp_path / "run", write_data, ["sft_policy"])
    convert.export_hf(root / "models" / "sft_policy", tmp_path / "out")
    assert "the form 'Human: {prompt}Assistant:'" in capsys.readouterr().err.replace("\\n", "")
    back = tokenizer_lib.load(tmp_path / "out")
    assert back.chat_template == "" and not (tmp_path / "out" / "chat_template.jinja").exists()
    assert hf.read_json(tmp_path / "out" / "generation_config.json") == {"eos_token_id": back.eos_id}


def test_nothing_half_written_is_left(theirs, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    (tmp_path / "ckpt.partial").mkdir()  # of an import that was killed
    with monkeypatch.context() as patch:
        patch.setattr(hf, "write_description", fail)
        with pytest.raises(OSError, match="disk full"):
            convert.import_hf(str(theirs), tmp_path / "ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    convert.import_hf(str(theirs), tmp_path / "ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_lib.hugging_face.HuggingFace, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            convert.export_hf(tmp_path / "ckpt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "theirs"]
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="ckpt exists: nothing is overwritten"):
        convert.import_hf(str(theirs), tmp_path / "ckpt")
    with pytest.raises(ValueError, match="theirs exists: nothing is overwritten"):
        convert.export_hf(tmp_path / "ckpt", theirs)
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*")) == before


def test_inputs_that_are_no_model(theirs, run, tmp_path):
    cases = {
        "nowhere": "is neither a converted checkpoint",
        str(theirs): "is neither a converted checkpoint",
        str(run / "models" / "rl"): "does not exist; the run has the models r_p, sft_policy",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message):
            convert.export_hf(convert.Path(source), tmp_path / "out")
    convert.import_hf(str(theirs), tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt" / "0")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        convert.export_hf(tmp_path / "ckpt", tmp_path / "out")
    values = hf.read_json(tmp_path / "ckpt" / "model.json")
    del values["model"]["qkv_bias"]
    write(tmp_path / "ckpt" / "model.json", values)
    with pytest.raises(ValueError, match="not of this version of pit_jax.*qkv_bias.*convert the model again"):
        convert.export_hf(tmp_path / "ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_on_the_hub(monkeypatch, theirs):
    for name in ("../nowhere", "a/b/c", "/none/x", "model"):
        with pytest.raises(ValueError, match="neither a folder nor a name on the hub"):
            convert.find(name)
    asked = []

    def download(name, **patterns):
        asked.append((name, patterns))
        if "down" in name:
            raise RuntimeError("no\nnetwork")
        return str(theirs)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))
    assert convert.find("owner/model") == theirs
    patterns = asked[0][1]["allow_patterns"]
    assert set(patterns) == {"*.safetensors", "*.json", "*.jinja", "tokenizer.model"}, "no pickles"
    assert set(asked[0][1]["ignore_patterns"]) == {"*/*", "consolidated*"}, "no weights twice"
    with pytest.raises(ValueError, match=r"did not give it \(RuntimeError: no network\).*name the folder"):
        convert.find("owner/down")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[hf\]'"):
        convert.find("owner/model")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[hf\]'"):
        hf.TensorFiles(theirs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x", "is no .npy of numbers"),
        (np.zeros((2, 3)), r"holds float64 of shape \(2, 3\), but must hold whole numbers"),
        (np.zeros(3, np.int32), r"of shape \(3,\)"),
        (np.array([[1, 2], None], dtype=object), "is no .npy of numbers"),
    ],
    ids=["no array", "numbers with a point", "one row", "objects"],
)
def test_ids_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "ids.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(ValueError, match=message):
        convert.read_ids(path)


def test_ids_that_the_model_has_not(run, theirs, tmp_path):
    """Known before anything is written."""
    stage = run / "models" / "sft_policy"
    description, params, _ = convert.load(stage)
    for ids in map(np.asarray, ([[0, 383]], [[-1, 3]])):
        with pytest.raises(ValueError, match=r"but the model has 0 to \d+"):
            convert.forward(description, params, ids)
        with pytest.raises(ValueError, match=r"but the model has 0 to \d+"):
            convert.export_hf(stage, tmp_path / "out", ids=ids)
        with pytest.raises(ValueError, match="but the model has 0 to 299"):
            convert.import_hf(str(theirs), tmp_path / "out", ids=ids)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "name one of --from=hf and --to=hf"),
        ({"source": "hf", "target": "hf"}, "name one of --from=hf and --to=hf"),
        ({"source": "hf", "verify": "x.npy"}, "go together"),
        ({"target": "hf", "logits": "x.npy"}, "go together"),
        ({"source": "hf", "dtype": "float16"}, "--dtype=float16 is for files"),
    ],
    ids=["none", "both", "no logits", "no ids", "float16"],
)
def test_flags_that_contradict_one_another(given, message):
    with pytest.raises(ValueError, match=message):
        convert.check_flags(**{"source": None, "target": None, "dtype": None, "verify": None, "logits": None} | given)


def test_the_command(theirs, tmp_path, cache):
    """Import with --verify in a process of its own: the logits are those of the function, float32."""
    ids = np.random.default_rng(0).integers(0, 300, (3, 8))
    np.save(tmp_path / "ids.npy", ids)
    command = ("-m", "pit_jax.convert", "--from=hf", f"--input={theirs}", f"--output={tmp_path / 'ckpt'}")
    verify = (f"--verify={tmp_path / 'ids.npy'}", f"--logits={tmp_path / 'out.npy'}")
    result = commands.run(*command, *verify, cache=cache)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "a language model of family qwen2" in result.stdout and "float32 of shape [3, 8, 300]" in result.stdout
    logits = np.load(tmp_path / "out.npy", allow_pickle=False)
    description, params, _ = convert.load(tmp_path / "ckpt")
    assert logits.dtype == np.float32 and logits.shape == (3, 8, 300)
    np.testing.assert_allclose(logits, convert.forward(description, params, ids), rtol=1e-4, atol=1e-5)


def test_a_folder_for_logits_that_is_not_there(theirs, tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros((1, 2), np.int32))
    given = {"input": str(theirs), "output": str(tmp_path / "out"), "verify": str(tmp_path / "ids.npy")}
    with flagsaver.flagsaver(**{"from": "hf"}, **given, logits=str(tmp_path / "none" / "x.npy")):
        flags.FLAGS.mark_as_parsed()
        with pytest.raises(ValueError, match="--logits=.*x.npy: there is no folder .*none"):
            convert.convert()
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line(tmp_path, capsys):
    with flagsaver.flagsaver(**{"to": "hf", "input": "nowhere", "output": str(tmp_path / "out")}):
        flags.FLAGS.mark_as_parsed()
        with pytest.raises(SystemExit) as stopped:
            convert.main(["convert"])
    assert stopped.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == (
        "error: --input=nowhere is neither a converted checkpoint (with model.json) nor a models/STAGE of a run\n"
    )
