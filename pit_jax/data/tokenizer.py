"""SentencePiece, and the control symbols of PIT.

<<Candidate>> and <<Improved>> are *control* symbols of the vocabulary: encoding a text never produces them, whatever
the text spells, so only `templates.fill` can put them into a row.
"""

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

CANDIDATE = "<<Candidate>>"
IMPROVED = "<<Improved>>"
CONTROL_SYMBOLS = (CANDIDATE, IMPROVED)


class Tokenizer:
    """Text to ids and back; ids of the control symbols by name.

    Attributes:
      vocab_size, pad_id, bos_id, eos_id: of the vocabulary.
      control_ids: control symbol -> id.
      digest: of the model file.
    """

    def __init__(self, model: bytes, name: str = "tokenizer.model"):
        """Args: model: a serialised SentencePiece model; name: where it came from, for errors."""
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.pad_id = max(self._processor.pad_id(), 0)  # only fills slots that no mask counts
        self.control_ids = {}
        for symbol in CONTROL_SYMBOLS:
            i = self._processor.piece_to_id(symbol)
            if not self._processor.is_control(i):
                raise ValueError(
                    f"{name} has no control symbol {symbol}. Train a tokenizer with pit_jax.data.tokenizer.train "
                    "or leave config.tokenizer.path empty."
                )
            self.control_ids[symbol] = i
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{name} has no BOS or no EOS id; both are needed.")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, no EOS, no control symbol."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control symbols, BOS, EOS, padding and ids beyond the vocabulary become nothing.

        A model's vocabulary is rounded up, so an untrained one can sample an id that has no piece.
        """
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._processor.decode([i for i in known if not self._processor.is_control(i)])


def load(path: str | Path) -> Tokenizer:
    """Reads a SentencePiece model file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"tokenizer file {path} does not exist (config.tokenizer.path)")
    return Tokenizer(path.read_bytes(), str(path))


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
