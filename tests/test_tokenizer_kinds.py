"""Vocabularies from elsewhere: SentencePiece, tokenizer.json and bytes give ids that no text can turn into control."""

import io
import json
import lzma
import os
import pathlib

import pytest
import sentencepiece
from hypothesis import example, given, settings, strategies as st
from test_tokenizer import ADVERSARIAL, CORPUS

from pit_jax.data import hugging_face, tokenizer as tokenizer_lib, tokenizer_files as files
from pit_jax.data.tokenizer import CANDIDATE, CONTROL_SYMBOLS, IMPROVED
from pit_jax.models import hf

DATA = pathlib.Path(os.environ.get("PIT_JAX_DATA", pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"))
FOLDER = DATA / "tokenizers"
MODELS = {
    "t5": "t5_cc_all_32000_100extra.model",
    "lm1b": "lm1b_sentencepiece_8k.model",
    "1k": "spm_test_model_1k.model",
    "4k": "tftext_fast_sentencepiece.model",
}
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
MARKERS = ["<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|tool|>", "<|endoftext|>", "[CLS]"]
MARKERS += ["<extra_id_0>", " <extra_id_99>", "[MASK]", "<0x41>", "<start_of_turn>", *CONTROL_SYMBOLS]


def need(path):
    if not path.exists():
        pytest.skip(f"no {path}: set PIT_JAX_DATA to the folder of test data")
    return path


def sentencepiece_model(model_type="bpe", **more):
    """As Llama's: byte fallback, no normalisation; with markers that it finds in every text, as Gemma's."""
    buffer = io.BytesIO()
    settings = dict(model_type=model_type, vocab_size=420, hard_vocab_limit=False, byte_fallback=True, minloglevel=2)
    settings |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0)
    settings |= dict(user_defined_symbols=["<start_of_turn>", "ab"], num_threads=1)
    lines = (line for text in CORPUS for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=buffer, **settings | more)
    return buffer.getvalue()


def added(i, text, special=True):
    return {"id": i, "content": text, "special": special} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )


def write_folder(folder, table, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def gpt2(folder):
    """A tokenizer.json of the published vocabulary and merges of GPT-2."""
    tokenizers = pytest.importorskip("tokenizers")
    read = lambda name: lzma.decompress(need(FOLDER / name).read_bytes()).decode("utf-8")  # noqa: E731
    vocab, lines = json.loads(read("gpt2_encoder.json.xz")), read("gpt2_vocab.bpe.xz").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines if line]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    end = "<|endoftext|>"
    return write_folder(folder, json.loads(made.to_str()), eos_token=end, bos_token=end, add_bos_token=False)


def byte_level(folder, markers=("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"), roles=ROLES, **config):
    """Bytes, some words, and added tokens: one that is a marker without being called special, and one of spaces."""
    letters = files._byte_letters()
    vocab = {letter: i for i, letter in enumerate(letters)} | {"th": 256, "the": 257, "\u0120the": 258}
    # "<s>" is also what merges make: nothing but the name keeps it out of a text.
    vocab |= {"<s": 259, "<s>": 260}
    merges = [["t", "h"], ["th", "e"], ["\u0120", "the"], ["<", "s"], ["<s", ">"]]
    tokens = [added(260, "<s>")]
    tokens += [added(260 + i, text) for i, text in enumerate(markers) if i]
    n = 260 + len(markers)
    tokens += [added(n, "<|tool|>", False), added(n + 1, "    ", False)]
    table = files.bytes_json({}, "")
    table |= {"added_tokens": tokens, "post_processor": None}
    table["pre_tokenizer"] = table["pre_tokenizer"] | {"use_regex": True}
    table["model"] = table["model"] | {"vocab": vocab, "merges": merges}
    return write_folder(folder, table, **roles, **config)


def unigram(folder, scheme="first", **config):
    """As T5 and Llama: pieces with scores among which are the names of special tokens, with the best of all scores."""
    names = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocab = [[name, 0.0] for name in names] + [[f"<0x{b:02X}>", -20.0] for b in range(256)]
    vocab += [
        ["\u2581", -2.0],
        ["\u2581the", -3.0],
        ["fox", -4.0],
        *([c, -6.0] for c in "abcdefghijklmnopqrstuvwxyz<>/|_"),
    ]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    table = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [added(i, name) for i, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": space,
        "post_processor": None,
        "decoder": files.sentencepiece_json(sentencepiece_model(user_defined_symbols=[]), "")["decoder"],
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": True},
    }
    return write_folder(folder, table, **ROLES | {"unk_token": "<unk>"} | config)


def words(folder):
    """Whole words, of which [UNK] is what all others become: nothing is lossier."""
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "the", "fox"]
    table = {
        "version": "1.0",
        "added_tokens": [added(i, name) for i, name in enumerate(names[:4])],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {name: i for i, name in enumerate(names)}, "unk_token": "[UNK]"},
    }
    table["model"]["vocab"] |= {"[cls]": 6}  # what the text [CLS] is lowered to: a plain word
    roles = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return write_folder(folder, table, **roles)


FOREIGN = {
    "gpt2": gpt2,
    "byte level": byte_level,
    "unigram": unigram,
    "words": words,
}
LOSSLESS = {"gpt2", "byte level", "unigram", "bytes", "trained", "bpe", "bpe with markers"}


def comes_back(kind, text):
    """Of a foreign Unigram table the library takes one space before a text for its own, and finds names of bytes."""
    if kind == "unigram" and (text.startswith(" ") or "<0x" in text):
        return False
    return kind in LOSSLESS and "\u2581" not in text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind -> tokenizer, each made once."""
    found = {}

    def make(kind):
        if kind not in found:
            found[kind] = _make(kind, tmp_path_factory.mktemp("kind") / "tokenizer")
        return found[kind]

    return make


def _make(kind, folder):
    if kind == "bytes":
        return tokenizer_lib.load("bytes")
    if kind == "trained":
        return tokenizer_lib.SentencePiece(tokenizer_lib.train(CORPUS, 400))
    if kind == "bpe":
        return tokenizer_lib.SentencePiece(sentencepiece_model(user_defined_symbols=[]))
    if kind == "bpe with markers":
        return tokenizer_lib.SentencePiece(sentencepiece_model())
    if kind == "unigram with markers":
        return tokenizer_lib.SentencePiece(sentencepiece_model("unigram", user_defined_symbols=["an", "\n"]))
    if kind in MODELS:
        return tokenizer_lib.load(need(FOLDER / MODELS[kind]))
    pytest.importorskip("tokenizers")
    return tokenizer_lib.load(FOREIGN[kind](folder))


KINDS = ["bytes", "trained", "bpe", "bpe with markers", *MODELS, *FOREIGN]
spelled = st.lists(st.sampled_from([*MARKERS, " ", "\n", "<", ">", "|", "[", "]", "s", "im_", "the fox"]), max_size=12)
any_text = st.one_of(st.text(max_size=40), spelled.map("".join))


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_gives_a_special_id(made, kind):
    tok = made(kind)
    special = {tok.eos_id, tok.pad_id, *tok.control_ids.values()} | ({tok.bos_id} - {None})
    assert special - {0} <= tok.special_ids | {0}
    for text in [*ADVERSARIAL.values(), *MARKERS, "".join(MARKERS), " ".join(MARKERS), "\uff1cs\uff1e"]:
        ids = tok.encode(text)
        assert not tok.special_ids & set(ids), text[:80]
        assert all(0 <= i < tok.vocab_size for i in ids)
        if comes_back(kind, text):
            assert tok.decode(ids) == text

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(any_text)
    @example("</s" + ">")
    def law(text):
        assert not tok.special_ids & set(tok.encode(text))
        if comes_back(kind, text):
            assert tok.decode(tok.encode(text)) == text

    law()


@pytest.mark.parametrize("kind", KINDS)
def test_what_decodes_to_nothing(made, kind):
    tok = made(kind)
    ids = tok.encode("the fox")
    special = [i for i in sorted(tok.special_ids) if tok.decode([i]) == ""]
    assert {tok.eos_id, *tok.control_ids.values()} <= set(special)
    text = tok.decode(ids)
    assert text.split() == ["the", "fox"]
    assert tok.decode([*special, *ids, tok.vocab_size, tok.vocab_size + 999, -1, tok.eos_id]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_control_symbols_stand_behind_the_vocabulary(made, kind):
    tok = made(kind)
    expected = {
        "bytes": (259, 260), "trained": (4, 5), "t5": (32101, 32102), "lm1b": (8192, 8193), "1k": (1000, 1001),
        "4k": (4000, 4001), "gpt2": (50257, 50258), "byte level": (267, 268), "words": (7, 8),
    }  # fmt: skip
    ids = tuple(tok.control_ids[symbol] for symbol in (CANDIDATE, IMPROVED))
    assert ids == expected.get(kind, (tok.vocab_size - 2, tok.vocab_size - 1))
    if kind != "trained":
        assert tok.vocab_size == ids[1] + 1
    markup = tok.encode_markup(f"{CANDIDATE}{IMPROVED}")
    assert [i for i in markup if i in ids] == list(ids)


def test_ids_of_foreign_models_by_name(made):
    """BOS, EOS and PAD of the published models; None and EOS where they have no such token."""
    assert [(made(k).bos_id, made(k).eos_id, made(k).pad_id) for k in ("1k", "4k")] == [(1, 2, 2)] * 2
    assert (made("t5").bos_id, made("t5").eos_id, made("t5").pad_id) == (2, 1, 0)
    assert (made("lm1b").bos_id, made("lm1b").eos_id, made("lm1b").pad_id) == (None, 1, 0)
    assert (made("gpt2").bos_id, made("gpt2").eos_id, made("gpt2").pad_id) == (None, 50256, 50256)
    assert made("gpt2").encode("hello world") == [31373, 995]
    assert made("gpt2").encode_markup("hello<|endoftext|>") == [31373, 50256]


def test_whitespace_tokens_are_text_and_markers_are_not(made):
    tok = made("byte level")
    assert tok.encode("a    b") == [97, 266, 98]
    tool = tok.encode_markup("<|tool|>")
    assert tool == [265] and tok.encode("<|tool|>") == list(b"<|tool|>")
    assert tok.decode(tool) == "<|tool|>", "what a model says with it is text: the file does not call it special"
    assert tok.encode_markup("<s>") == [260] and tok.encode("<s>") == [60, 115, 62]


def test_markers_of_sentencepiece_models(made):
    """Gemma's and T5's markers are pieces that its own library finds in every text."""
    plain = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    marker, ab = plain.piece_to_id("<start_of_turn>"), plain.piece_to_id("ab")
    tok = made("bpe with markers")
    assert marker in plain.encode("x<start_of_turn>") and marker not in tok.encode("x<start_of_turn>")
    assert marker in tok.encode_markup("x<start_of_turn>") and ab in tok.encode("xab"), "not all symbols are markers"
    t5 = sentencepiece.SentencePieceProcessor(model_file=str(need(FOLDER / MODELS["t5"])))
    text = "the <extra_id_0> fox"
    assert t5.encode(text)[1] == 32100 and 32100 not in made("t5").encode(text)
    for text in ("", " a b", "Hello wörld!\nnew line 1,234"):
        assert made("t5").encode(text) == t5.encode(text)


def test_the_vocabulary_cuts_nothing(made):
    """tokenizer.json can hold a truncation (here to 8 ids)."""
    assert len(made("unigram").encode("the fox " * 50)) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(made, kind, tmp_path):
    tok = made(kind)
    tok.save(tmp_path / "a")
    back = tokenizer_lib.load(tmp_path / "a")
    assert type(back) is type(tok)
    fields = ("vocab_size", "pad_id", "bos_id", "eos_id", "control_ids", "special_ids", "names", "digest")
    for field in fields:
        assert getattr(back, field) == getattr(tok, field), field
    for text in [*ADVERSARIAL.values(), *MARKERS]:
        assert back.encode(text[:1000]) == tok.encode(text[:1000])
    back.save(tmp_path / "b")
    contents = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1]


PLAIN = ["", "a", "the quick brown fox", " two  spaces ", "line\nbreak\n\n", "tea 🍵 e\u0301 שלום", "x" * 300, "<0x41>"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bpe with markers"])
def test_transformers_reads_what_is_saved(made, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = made(kind)
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for symbol, i in tok.control_ids.items():
        assert theirs.convert_tokens_to_ids(symbol) == i
        assert theirs(symbol, add_special_tokens=False).input_ids == tok.encode_markup(symbol)
    for text in [*PLAIN, *CORPUS]:
        assert theirs(text, add_special_tokens=False).input_ids == tok.encode(text), text
    assert theirs.eos_token_id == tok.eos_id
    ids = tok.encode(CORPUS[0])
    if kind in LOSSLESS:
        assert theirs.decode([*ids, *tok.control_ids.values(), tok.eos_id], skip_special_tokens=True) == CORPUS[0]
    if kind in ("bytes", "trained", "bpe", "t5"):
        assert theirs("the fox").input_ids == [tok.bos_id, *tok.encode("the fox")], "rows begin with BOS, once"


@pytest.mark.parametrize("prefixed", [True, False])
def test_transformers_reads_a_model_that_has_no_table(prefixed, tmp_path):
    """Gemma's kind: pieces that are found before any merge. The class is named, so that a space is put as it should."""
    transformers = pytest.importorskip("transformers")
    tok = tokenizer_lib.SentencePiece(sentencepiece_model(add_dummy_prefix=prefixed))
    tok.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the quick fox", "xab", "a\nb"):
        assert theirs(text).input_ids == [tok.bos_id, *tok.encode(text)]
    assert (theirs.eos_token_id, theirs.convert_tokens_to_ids(IMPROVED)) == (tok.eos_id, tok.control_ids[IMPROVED])


@pytest.mark.parametrize("kind", ["bytes", "trained", "bpe", "unigram with markers"])
def test_the_written_table_has_the_ids_of_the_model(made, kind, tmp_path):
    """tokenizer.json alone, on text that is meant to go wrong."""
    pytest.importorskip("tokenizers")
    tok = made(kind)
    tok.save(tmp_path)
    table = hugging_face.load(tmp_path / "tokenizer.json", CONTROL_SYMBOLS)
    assert (table.vocab_size, table.control_ids) == (tok.vocab_size, tok.control_ids)
    assert (table.bos_id, table.eos_id) == (tok.bos_id, tok.eos_id)
    for name, text in [*ADVERSARIAL.items(), ("defined by the user", "xan an anan a n\nan and")]:
        assert table.encode(text) == tok.encode(text), name
        assert table.decode(tok.encode(text)) == text

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(any_text)
    def law(text):
        assert table.encode(text) == tok.encode(text)

    law()


def test_lossy_examples(made):
    texts = ["the fox", "two\nlines"]
    assert list(tokenizer_lib.lossy_examples(made("t5"), texts)) == [("two\nlines", "two lines")]
    assert list(tokenizer_lib.lossy_examples(made("bytes"), [*texts, *ADVERSARIAL.values()])) == []
    # What holds of the lossy ones: the normalised text is a fixed point.
    for kind in MODELS:
        (back,) = [made(kind).decode(made(kind).encode(t)) for t in [" Two  lines\u3000and ２ more "]]
        assert made(kind).decode(made(kind).encode(back)) == back


def test_no_prefix(made):
    for kind in KINDS:
        tok = made(kind)
        inner = tok.unprefixed()
        assert tokenizer_lib.puts_space(tok) == (kind not in ("bytes", "gpt2", "byte level", "words"))
        if kind in LOSSLESS:
            assert inner.decode(inner.encode(" the fox")) == " the fox"
        if tokenizer_lib.puts_space(tok) and kind in LOSSLESS:
            assert inner.encode(" the fox") == tok.encode("the fox")
            assert not tokenizer_lib.puts_space(inner)


# --------------------------------------------------------------------------------------------------------------- errors


def test_eos_from_the_generation_config(tmp_path):
    pytest.importorskip("tokenizers")
    folder = byte_level(tmp_path, roles={})
    with pytest.raises(ValueError, match="names no EOS"):
        tokenizer_lib.load(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [264, 261]}')
    assert tokenizer_lib.load(folder).eos_id == 264
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert tokenizer_lib.load(folder).eos_id == 261


def test_roles_of_pieces_that_the_table_does_not_add(tmp_path):
    """As transformers: what has a role is special. But PAD may be any piece, and that stays text."""
    pytest.importorskip("tokenizers")
    folder = unigram(tmp_path, pad_token="x")
    table = json.loads((folder / "tokenizer.json").read_text())
    table["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(table))
    tok = tokenizer_lib.load(folder)
    assert (tok.bos_id, tok.eos_id) == (1, 2) and {1, 2} <= tok.special_ids and tok.pad_id not in tok.special_ids
    assert tok.encode_markup("</s>") == [2] and 2 not in tok.encode("</s>")
    assert tok.encode("x")[-1] == tok.pad_id and tok.decode(tok.encode("x")) == "x"


def test_letters_without_an_id_do_not_end_an_answer(tmp_path):
    """`<unk>` is what an unknown word becomes: where it is the EOS too, it becomes nothing."""
    pytest.importorskip("tokenizers")
    folder = words(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "[UNK]"}')
    tok = tokenizer_lib.load(folder)
    assert tok.eos_id == 0 and tok.encode("the red fox") == [4, 5]


def test_tokens_that_only_the_config_adds(tmp_path):
    pytest.importorskip("tokenizers")
    more = {"267": {"content": "<|new|>", "special": True}, "260": {"content": "<s>", "special": True}}
    tok = tokenizer_lib.load(byte_level(tmp_path, added_tokens_decoder=more))
    assert tok.encode_markup("<|new|>") == [267] and tok.control_ids[CANDIDATE] == 268


@pytest.mark.parametrize("added_bos", [None, True, False])
@pytest.mark.parametrize("puts_bos", [True, False])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "LlamaTokenizerFast", "GemmaTokenizer"])
def test_rows_begin_with_bos_where_the_tokenizer_puts_it(tmp_path, kind, puts_bos, added_bos):
    """A BOS that is only named, as that of SmolLM2, which is its EOS too, begins no row; add_bos_token has the word."""
    pytest.importorskip("tokenizers")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": kind}
    byte_level(tmp_path, roles=roles, **({} if added_bos is None else {"add_bos_token": added_bos}))
    if puts_bos:
        table = json.loads((tmp_path / "tokenizer.json").read_text())
        table["post_processor"] = files.bytes_json({"<s>": 260}, "<s>")["post_processor"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    tok = tokenizer_lib.load(tmp_path)
    assert tok.names["bos_token"] == "<s>"
    assert tok.bos_id == (260 if (puts_bos if added_bos is None else added_bos) else None)
    if added_bos in (None, puts_bos):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("").input_ids
        assert theirs == ([260] if tok.bos_id else [])


def test_tokens_beside_a_table(tmp_path):
    """Ours do not take the ids of tokens that only added_tokens.json has, and hf counts them alike."""
    pytest.importorskip("tokenizers")
    byte_level(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|x|>": 267, "<s>": 260}')
    tok = tokenizer_lib.load(tmp_path)
    assert tok.encode_markup("<|x|>") == [267] and tok.control_ids[CANDIDATE] == 268
    assert hf.tokenizer_size(tmp_path) == (268, [*CONTROL_SYMBOLS]) and tok.vocab_size == 270
    tok.save(tmp_path / "saved")
    assert tokenizer_lib.load(tmp_path / "saved").digest == tok.digest


def test_roles_and_tokens_that_only_the_config_gives_a_sentencepiece_model(tmp_path):
    """As of a fine-tuned Llama 2 with turns of ChatML: both markers, and the second ends a row."""
    model = sentencepiece_model(user_defined_symbols=[])
    size = len(files.pieces_of(model, "m"))
    decoder = {
        str(size + i): {"content": text, "special": True} for i, text in enumerate(["<|im_start|>", "<|im_end|>"])
    }
    settings = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tok = tokenizer_lib.load(tmp_path)
    assert hf.tokenizer_size(tmp_path) == (size + 2, [*CONTROL_SYMBOLS])
    assert (tok.bos_id, tok.eos_id, tok.control_ids[CANDIDATE]) == (1, size + 1, size + 2)
    assert tok.names["eos_token"] == "<|im_end|>" and 2 in tok.special_ids
    alone = tokenizer_lib.SentencePiece(tok.model)  # as a run keeps it
    assert (alone.eos_id, alone.bos_id, alone.digest) == (tok.eos_id, tok.bos_id, tok.digest)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "the", "bos_token": "none"}))
    plain = tokenizer_lib.load(tmp_path)
    assert (plain.bos_id, plain.eos_id) == (1, 2), "what a text spells ends no row"


def test_tokens_beside_a_sentencepiece_model(tmp_path):
    model = sentencepiece_model()
    size = len(files.pieces_of(model, "m"))
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<s>": 1}))
    tok = tokenizer_lib.load(tmp_path)
    assert tok.encode_markup("<|im_end|>")[-1] == size and tok.control_ids[CANDIDATE] == size + 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1}))
    with pytest.raises(ValueError, match="adds ids that do not follow"):
        tokenizer_lib.load(tmp_path)


def test_a_folder_of_hugging_face_wins_over_its_sentencepiece_model(tmp_path):
    pytest.importorskip("tokenizers")
    folder = byte_level(tmp_path)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    assert isinstance(tokenizer_lib.load(folder), hugging_face.HuggingFace)
    (folder / "tokenizer.json").unlink()
    assert isinstance(tokenizer_lib.load(folder), tokenizer_lib.SentencePiece)


TABLE = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}'


@pytest.mark.parametrize(
    ("files_", "message"),
    [
        ({}, "none of tokenizer.json, tokenizer.model"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json is not JSON"),
        ({"tokenizer.json": "[]"}, "holds no JSON object"),
        ({"tokenizer.json": "{}"}, "is no tokenizer.json"),
        ({"tokenizer.json": '{"model": {"type": "None", "vocab": {}}, "added_tokens": [{"id": 0, "content": "<s>", '
          '"special": true}]}', "tokenizer_config.json": '{"eos_token": "<s>"}'}, "library reads"),
        ({"tokenizer.model": "no model"}, "is no SentencePiece model"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json is not JSON"),
        ({"tokenizer.model": "", "tokenizer_config.json": '{"chat_template": 5}'}, "is no SentencePiece model"),
        ({"tokenizer.json": TABLE, "tokenizer_config.json": '{"chat_template": 5}'}, "chat_template in .* is 5"),
        ({"tokenizer.json": TABLE, "added_tokens.json": '{"<x>": "9"}'}, "'<x>' an id that is no whole number"),
        ({"tokenizer.json": TABLE, "tokenizer_config.json": '{"added_tokens_decoder": {"9": "<x>"}}'}, "a wrong kind"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": 5}}'}, "a value of a wrong kind"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, files_, message):
    for name, text in files_.items():
        (tmp_path / name).write_text(text)
    if message == "library reads":
        pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=message):
        tokenizer_lib.load(tmp_path)


def test_a_cut_model_is_no_model(made, tmp_path):
    model = made("trained").model
    for size in (1, 7, len(model) // 2):
        (tmp_path / "m.model").write_bytes(model[:size])
        with pytest.raises(ValueError, match="m.model is no SentencePiece model, or not all of it"):
            tokenizer_lib.load(tmp_path / "m.model")


def test_a_vocabulary_with_gaps_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    folder = byte_level(tmp_path)
    table = json.loads((folder / "tokenizer.json").read_text())
    table["model"]["vocab"]["zz"] = 900
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="have gaps"):
        tokenizer_lib.load(folder)
