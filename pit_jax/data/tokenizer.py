"""Tokenizers of three kinds behind one protocol: SentencePiece models, tokenizer.json of Hugging Face, raw bytes.

<<Candidate>> and <<Improved>> are *control* symbols of the vocabulary: encoding a text never produces them, whatever
the text spells, so only `templates.fill` can put them into a row. The same holds of the special tokens that a
vocabulary brings along: `</s>` or `<|im_start|>` in a text are the pieces of these letters.
"""

import copy
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from pit_jax.data import hugging_face, tokenizer_files as files

CANDIDATE = "<<Candidate>>"
IMPROVED = "<<Improved>>"
CONTROL_SYMBOLS = (CANDIDATE, IMPROVED)


class Tokenizer(Protocol):
    """Text to ids and back; ids of the control symbols by name.

    Attributes:
      vocab_size: number of ids, with those of the control symbols.
      pad_id: fills slots that no mask counts; may be the EOS.
      bos_id: begins a row; None where the vocabulary has no such id.
      eos_id: ends an answer.
      control_ids: control symbol -> id.
      special_ids: what no text gives: all of these but `<unk>`, and the vocabulary's other special tokens.
      names: "bos_token", "eos_token", ... -> text, as a chat template calls them.
      chat_template: the Jinja template that came with the vocabulary; empty: none did.
      digest: of all that makes ids of a text.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    control_ids: Mapping[str, int]
    special_ids: frozenset[int]
    names: Mapping[str, str]
    chat_template: str
    digest: str

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, no EOS, no control symbol, no special token."""

    def encode_markup(self, text: str) -> list[int]:
        """Ids of text that is ours, such as the words of a chat template: special tokens in it are these tokens."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ids and those beyond the vocabulary become nothing.

        A model's vocabulary is rounded up, so an untrained one can sample an id that has no piece.
        """

    def unprefixed(self) -> "Tokenizer":
        """The same ids without the space that some kinds put before every text: for text that goes on a line."""

    def save(self, folder: str | Path) -> None:
        """Writes what `load` and `transformers.AutoTokenizer` read."""


class SentencePiece:
    """A SentencePiece model; where it lacks our control symbols they are added behind its pieces."""

    def __init__(
        self,
        model: bytes,
        name: str = "tokenizer.model",
        *,
        more: Sequence[str] = (),
        chat_template: str = "",
        bos: str = "",
        eos: str = "",
    ):
        """Args:
        model: serialised.
        name: where it came from, for errors.
        more: further control symbols that it lacks, before ours.
        chat_template: see `Tokenizer`.
        bos, eos: control pieces that begin and end rows; empty, or no such piece: those that the model names.
        """
        model = files.with_control(model, (*more, *CONTROL_SYMBOLS), name)
        self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
        roles = ((bos, p.bos_id()), (eos, p.eos_id()))
        others = [text if p.is_control(p.piece_to_id(text)) and p.piece_to_id(text) != i else "" for text, i in roles]
        self._model = model = files.with_roles(model, *others)
        self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size = p.vocab_size()
        self.bos_id = p.bos_id() if p.bos_id() >= 0 else None
        self.eos_id = p.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"{name} has no EOS id: nothing would end an answer.")
        self.pad_id = p.pad_id() if p.pad_id() >= 0 else 0 if p.is_control(0) else self.eos_id
        self.control_ids = {symbol: p.piece_to_id(symbol) for symbol in CONTROL_SYMBOLS}
        self.special_ids = frozenset(i for i in range(self.vocab_size) if p.is_control(i))
        ids = {"bos_token": p.bos_id(), "eos_token": p.eos_id(), "unk_token": p.unk_id(), "pad_token": p.pad_id()}
        self.names = {key: p.id_to_piece(i) for key, i in ids.items() if i >= 0}
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_markup(self, text: str) -> list[int]:
        return _markup(self, {self._processor.id_to_piece(i): i for i in self.special_ids}, text)

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._processor.decode([i for i in known if not self._processor.is_control(i)])

    def unprefixed(self) -> "SentencePiece":
        other = copy.copy(self)
        other._processor = sentencepiece.SentencePieceProcessor(model_proto=files.without_prefix(self._model))
        return other

    @property
    def model(self) -> bytes:
        """The serialised model, with our control symbols."""
        return self._model

    def save(self, folder: str | Path) -> None:
        bos, eos = self.names.get("bos_token", ""), self._processor.id_to_piece(self.eos_id)
        model = self._model if eos == self.names["eos_token"] else files.with_roles(self._model, "", eos)
        found, names = {"tokenizer.model": model}, self.names | {"eos_token": eos}
        table = files.sentencepiece_json(model, bos)
        if table is not None:
            found |= {hugging_face.FILE: files.dumps(table)}
            config = files.config_json(names)
        else:  # transformers makes its own table of tokenizer.model: with the space before a text, or without
            kind = "LlamaTokenizer" if files.spec_of(model).dummy_prefix else "GemmaTokenizer"
            config = files.config_json(names, tokenizer_class=kind, add_bos_token=bool(bos))
        found |= {hugging_face.CONFIG_FILE: files.dumps(config)}
        if self.chat_template:
            found |= {hugging_face.CHAT_FILE: self.chat_template.encode("utf-8")}
        files.write(folder, found)


class Bytes:
    """Id b is byte b of the text in UTF-8; behind these stand the special ids. No vocabulary is smaller or plainer."""

    _special = {"<pad>": 256, "<s>": 257, "</s>": 258, CANDIDATE: 259, IMPROVED: 260}

    def __init__(self, chat_template: str = ""):
        """Args: chat_template: see `Tokenizer`."""
        self.vocab_size = 256 + len(self._special)
        self.pad_id, self.bos_id, self.eos_id = (self._special[name] for name in ("<pad>", "<s>", "</s>"))
        self.control_ids = {symbol: self._special[symbol] for symbol in CONTROL_SYMBOLS}
        self.special_ids = frozenset(self._special.values())
        self.names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        self.chat_template = chat_template
        self.digest = hashlib.sha256(repr(("bytes", self._special)).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_markup(self, text: str) -> list[int]:
        return _markup(self, self._special, text)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= int(i) < 256).decode("utf-8", errors="replace")

    def unprefixed(self) -> "Bytes":
        return self

    def save(self, folder: str | Path) -> None:
        names = self.names | {"eos_token": next(name for name, i in self._special.items() if i == self.eos_id)}
        found = {
            "tokenizer.json": files.dumps(files.bytes_json(self._special, self.names["bos_token"])),
            "tokenizer_config.json": files.dumps(files.config_json(names, pit_jax="bytes")),
        }
        if self.chat_template:
            found |= {hugging_face.CHAT_FILE: self.chat_template.encode("utf-8")}
        files.write(folder, found)


def _markup(tokenizer: Tokenizer, special: Mapping[str, int], text: str) -> list[int]:
    longest_first = sorted(special, key=lambda name: (-len(name), name))
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    return [i for part in parts for i in ([special[part]] if part in special else tokenizer.encode(part))]


SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def load(path: str | Path) -> Tokenizer:
    """A tokenizer from a file, from a folder, or `bytes`.

    Of a folder with both, tokenizer.json counts, as for transformers: it may have tokens that tokenizer.model has not.
    In what `SentencePiece.save` wrote tokenizer.model is whole, and counts.

    Args:
      path: a SentencePiece model or a tokenizer.json (beside which its other files are looked for), a folder of
        Hugging Face or of `save`, or the word bytes.

    Raises:
      ValueError: where there is none, or it cannot be used.
    """
    if str(path) == "bytes":
        return Bytes()
    path = Path(path)
    if path.is_file():
        return hugging_face.load(path, CONTROL_SYMBOLS) if path.suffix == ".json" else _sentencepiece(path)
    if not path.is_dir():
        raise ValueError(
            f"tokenizer {path} does not exist (config.tokenizer.path): name a SentencePiece model, a tokenizer.json, a "
            "folder with one of them, or bytes"
        )
    if hugging_face.read_settings(path).get("pit_jax") == "bytes":
        return Bytes(hugging_face.chat_template_in(path))
    models = [path / name for name in SENTENCEPIECE_FILES if (path / name).is_file()]
    has_json = (path / hugging_face.FILE).is_file()
    if models and (not has_json or CANDIDATE.encode() in models[0].read_bytes()):
        return _sentencepiece(models[0])
    if not has_json:
        looked = ", ".join((hugging_face.FILE, *SENTENCEPIECE_FILES))
        raise ValueError(f"folder {path} has no tokenizer (config.tokenizer.path): none of {looked} is in it")
    return hugging_face.load(path / hugging_face.FILE, CONTROL_SYMBOLS)


def _sentencepiece(path: Path) -> SentencePiece:
    """With the ids that the folder's owner has put behind the model's own, and its BOS and EOS."""
    model, name, folder = path.read_bytes(), str(path), path.parent
    size = len(files.pieces_of(model, name))
    new = [token for token in hugging_face.read_added(folder) if token["id"] >= size]
    if [token["id"] for token in new] != list(range(size, size + len(new))):
        raise ValueError(
            f"{hugging_face.ADDED_FILE} or {hugging_face.CONFIG_FILE} beside {name} adds ids that do not follow on its "
            f"{size}"
        )
    settings, mapped = hugging_face.read_settings(folder), hugging_face.read_object(folder / hugging_face.MAP_FILE)
    roles = hugging_face.roles_in(settings, mapped)
    return SentencePiece(
        model,
        name,
        more=[token["content"] for token in new],
        chat_template=hugging_face.chat_template_in(folder),
        bos=roles["bos_token"],
        eos=roles["eos_token"],
    )


def lossy_examples(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(text, what it is decoded to) for texts that do not come back: T5 folds newlines, others lack characters."""
    for text in texts:
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            yield text, back


def puts_space(tokenizer: Tokenizer) -> bool:
    """Whether `encode` puts a space before every text, as SentencePiece does, and `decode` takes it away again."""
    return tokenizer.decode(2 * tokenizer.encode("a")).strip() == "a a"


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a unigram model with byte fallback, so that any text has ids and comes back as it was.

    One character does not: U+2581, by which SentencePiece itself marks a space, comes back as one.

    Args:
      texts: training text.
      vocab_size: an upper bound; a small corpus gives fewer pieces.

    Returns:
      The serialised model.
    """
    words = lambda: (line for text in texts for line in re.split(r"\n+", text) if line)  # noqa: E731
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words()),
        model_writer=buffer,
        vocab_size=vocab_size,
        model_type="unigram",
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",  # reversible: no folding, no lost spaces
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,  # the first word of a field is the same piece as inside a sentence
        split_digits=True,
        user_defined_symbols=["\n"],
        control_symbols=list(CONTROL_SYMBOLS),
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return buffer.getvalue()
