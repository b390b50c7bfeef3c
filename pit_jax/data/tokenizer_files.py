"""File formats of vocabularies: what is read of a SentencePiece model, and tokenizer.json of Hugging Face.

A SentencePiece model is a protocol buffer (sentencepiece_model.proto). Its few fields are read here by hand: the
classes that sentencepiece ships refuse every version of protobuf before the one that they were made with.
"""

import base64
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces."""

SPACE = "\u2581"
"""How SentencePiece writes a space."""

BRACKETED = re.compile(r"[\s\u2581]*[<\[].+[>\]]\s*", re.DOTALL)
"""What a marker looks like that no text may spell: <s>, [CLS], <|im_start|>, <start_of_turn>."""


class Piece(NamedTuple):
    """A piece of a SentencePiece model."""

    text: str
    score: float
    type: int


class Spec(NamedTuple):
    """What a SentencePiece model says of itself beside its pieces."""

    is_unigram: bool
    is_bpe: bool
    byte_fallback: bool
    charsmap: bytes  # precompiled rules of the normaliser; empty: none
    dummy_prefix: bool
    remove_extra_whitespaces: bool
    is_usual: bool  # spaces are escaped and stand before words


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: numbers as int, all else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
            if len(value) < size:
                raise ValueError("the file is cut off")
        else:
            raise ValueError("no protocol buffer")
        yield tag >> 3, value


def _piece(data: bytes) -> Piece:
    values = dict(_fields(data))
    score = struct.unpack("<f", values[2])[0] if 2 in values else 0.0
    return Piece(values.get(1, b"").decode("utf-8"), score, values.get(3, NORMAL))


def pieces_of(model: bytes, name: str) -> list[Piece]:
    """The pieces of a SentencePiece model, by id.

    Raises:
      ValueError: where it is none.
    """
    try:
        found = [_piece(value) for number, value in _fields(model) if number == 1]
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise ValueError(f"{name} is no SentencePiece model, or not all of it") from error
    if not found:
        raise ValueError(f"{name} is no SentencePiece model, or not all of it")
    return found


def spec_of(model: bytes) -> Spec:
    """The settings of a SentencePiece model; what it does not name has the default of the format."""
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(model):
        if number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))
    kind, is_suffix = trainer.get(3, 1), trainer.get(24, 0)
    return Spec(
        is_unigram=kind == 1,
        is_bpe=kind == 2,
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        is_usual=bool(normalizer.get(5, 1)) and not is_suffix,
    )


def with_control(model: bytes, names: Sequence[str], name: str = "tokenizer.model") -> bytes:
    """A SentencePiece model in which no text can spell a marker; the same bytes where that is so already.

    Pieces in brackets that are defined to be found in every text (USER_DEFINED: <start_of_turn>, <extra_id_0>) become
    control pieces, and `names` are added behind all others where they are lacking. Ids stay.
    """
    pieces = pieces_of(model, name)
    found = {piece.text for piece in pieces}
    turned = {
        i
        for i, piece in enumerate(pieces)
        if piece.type != CONTROL
        and (piece.text in names or (piece.type == USER_DEFINED and BRACKETED.fullmatch(piece.text)))
    }
    if turned:
        out, i = bytearray(), 0
        at = 0
        while at < len(model):
            start = at
            tag, at = _varint(model, at)
            if tag == 1 << 3 | 2:
                size, at = _varint(model, at)
                message = model[at : at + size]
                at += size
                # Of a field that stands twice the last one counts.
                message += bytes([3 << 3, CONTROL]) if i in turned else b""
                out += bytes([tag]) + _to_varint(len(message)) + message
                i += 1
                continue
            if tag & 7 == 0:
                _, at = _varint(model, at)
            else:
                size, at = _varint(model, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
                at += size
            out += model[start:at]
        model = bytes(out)
    for added in names:
        if added not in found:
            text = added.encode("utf-8")
            message = bytes([1 << 3 | 2]) + _to_varint(len(text)) + text + bytes([2 << 3 | 5, 0, 0, 0, 0])
            message += bytes([3 << 3, CONTROL])
            model += bytes([1 << 3 | 2]) + _to_varint(len(message)) + message
    return model


def with_roles(model: bytes, bos: str, eos: str) -> bytes:
    """The model with other pieces as BOS and EOS (fields 46, 47): a second trainer_spec is merged into the first."""
    found = b""
    for number, text in ((46, bos), (47, eos)):
        content = text.encode("utf-8")
        found += _to_varint(number << 3 | 2) + _to_varint(len(content)) + content if text else b""
    return model + bytes([2 << 3 | 2]) + _to_varint(len(found)) + found if found else model


def without_prefix(model: bytes) -> bytes:
    """The model without the space that it puts before every text: a second normalizer_spec is merged into the first."""
    return model + bytes([3 << 3 | 2, 2, 3 << 3, 0])


# ------------------------------------------------------------------------------------------------------- tokenizer.json


def _json(model: dict, normalizer: Any, pre_tokenizer: Any, decoder: Any, special: dict[str, int], bos: str) -> dict:
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for text, i in special.items()
    ]
    row = [{"Sequence": {"id": "A", "type_id": 0}}]
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    processor = {
        "type": "TemplateProcessing",
        "single": first + row,
        "pair": first + row + [{"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}} if bos else {},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": processor,
        "decoder": decoder,
        "model": model,
    }


def _replace(pattern: dict[str, str], content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sentencepiece_json(model: bytes, bos: str) -> dict | None:
    """The tokenizer.json of a SentencePiece model, or None where that format has no such model.

    Where the two give other ids: SentencePiece adds scores of pieces in float32 over the whole text, so that of two
    segmentations of nearly the same score it may take the other one in long texts; and normalisers with a precompiled
    map go by characters there and by graphemes here.

    Args:
      model: serialised, see `with_control`.
      bos: the piece that begins a row; empty: none.
    """
    pieces, spec = pieces_of(model, "tokenizer.model"), spec_of(model)
    if not spec.is_usual or not (spec.is_unigram or spec.is_bpe):
        return None
    defined = {p.text for p in pieces if p.type == USER_DEFINED and len(p.text) > 1}
    if spec.is_bpe and defined:
        return None  # found before any merge, which tokenizer.json does only with a space put before what is behind it
    special = {p.text: i for i, p in enumerate(pieces) if p.type in (CONTROL, UNKNOWN)}
    unk = next(i for i, p in enumerate(pieces) if p.type == UNKNOWN)
    normalizers: list[dict] = []
    if spec.charsmap:
        charsmap = base64.b64encode(spec.charsmap).decode("ascii")
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        normalizers += [_replace({"Regex": "^ +| +$"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if spec.dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append(_replace({"String": " "}, SPACE))
    decoders = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    # A text that spells the name of a byte is not that byte: a cut behind its "<" keeps the name out of the text.
    split = {
        "type": "Split",
        "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    if spec.is_unigram:
        best = max((p.score for p in pieces if p.type == NORMAL), default=0.0)

        def score(piece: Piece) -> float:
            # SentencePiece's own rule: a symbol that the user has defined beats all that could stand in its place.
            defined = len(piece.text.encode("utf-8")) * best - 0.1
            return defined if piece.type == USER_DEFINED else piece.score

        vocab: Any = [[p.text, score(p)] for p in pieces]
        inner = {"type": "Unigram", "unk_id": unk, "vocab": vocab, "byte_fallback": spec.byte_fallback}
    else:
        inner = {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unk].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {p.text: i for i, p in enumerate(pieces)},
            "merges": _merges(pieces),
        }
    normalizer = {"type": "Sequence", "normalizers": normalizers}
    decoder = {"type": "Sequence", "decoders": decoders}
    return _json(inner, normalizer, split if spec.byte_fallback else None, decoder, special, bos)


def _merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """The pairs that give a piece, in the order in which SentencePiece takes them: that of the pieces' scores."""
    found = {p.text: p.score for p in pieces if p.type == NORMAL}
    merges = [
        (-score, text[:i], text[i:])
        for text, score in found.items()
        for i in range(1, len(text))
        if text[:i] in found and text[i:] in found
    ]
    return [[left, right] for _, left, right in sorted(merges, key=lambda m: (m[0], len(m[1])))]


def _byte_letters() -> list[str]:
    """The letter for each byte in byte-level vocabularies: itself where it can be seen, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in visible]
    return [chr(b) if b in visible else chr(0x100 + hidden.index(b)) for b in range(256)]


def bytes_json(special: dict[str, int], bos: str) -> dict:
    """The tokenizer.json in which id b is byte b."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {letter: b for b, letter in enumerate(_byte_letters())},
        "merges": [],
    }
    return _json(model, None, byte_level, byte_level, special, bos)


def config_json(names: dict[str, str], **more: Any) -> dict:
    """The tokenizer_config.json beside a tokenizer.json of ours."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | names | more


def dumps(value: Any) -> bytes:
    """JSON as it is written into these files."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8")


def write(folder: str | Path, files: dict[str, bytes]) -> None:
    """Writes files of which each is whole or absent."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        beside = folder / f".{name}.{os.getpid()}.tmp"
        try:
            beside.write_bytes(content)
            os.replace(beside, folder / name)
        finally:
            beside.unlink(missing_ok=True)
