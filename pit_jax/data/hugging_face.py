"""Vocabularies of Hugging Face: tokenizer.json through the `tokenizers` library, and the files beside it."""

import copy
import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pit_jax.data import tokenizer_files as files

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
CHAT_FILE = "chat_template.jinja"
MAP_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
ADDED_FILE = "added_tokens.json"

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is no file.

    Raises:
      ValueError: where it is none.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json."""
    return read_object(folder / CONFIG_FILE)


def chat_template_in(folder: Path) -> str:
    """The chat template of a folder: of its own file, of tokenizer_config.json (`default` of several), or empty."""
    if (folder / CHAT_FILE).is_file():
        return (folder / CHAT_FILE).read_text(encoding="utf-8")
    places = CONFIG_FILE, "chat_template.json"
    found = next((text for name in places if (text := read_object(folder / name).get("chat_template"))), "")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else ""
    if not isinstance(found, str):
        raise ValueError(f"the chat_template in {folder} is {found!r}, but must be a text")
    return found


def added_beside(settings: dict[str, Any], added: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that stand beside a vocabulary, by id: with "id", "content", and more where the file says more.

    Args:
      settings: tokenizer_config.json, with its added_tokens_decoder.
      added: added_tokens.json: text -> id.
    """
    found = {text: {"content": text, "id": i} for text, i in added.items()}
    decoder = settings.get("added_tokens_decoder") or {}
    found |= {token["content"]: token | {"id": int(i)} for i, token in decoder.items()}
    wrong = [text for text, token in found.items() if not isinstance(token["id"], int) or not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{ADDED_FILE} or {CONFIG_FILE} gives the token {wrong[0]!r} an id that is no whole number")
    return sorted(found.values(), key=lambda token: token["id"])


def read_added(folder: Path) -> list[dict[str, Any]]:
    """`added_beside` of a folder.

    Raises:
      ValueError: where a file is damaged.
    """
    settings, added = read_settings(folder), read_object(folder / ADDED_FILE)
    try:
        return added_beside(settings, added)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the added tokens in {folder} cannot be read ({error}): download them again") from error


def roles_in(settings: dict[str, Any], mapped: dict[str, Any]) -> dict[str, str]:
    """Role -> text, of tokenizer_config.json or else special_tokens_map.json; empty where there is none."""
    return {role: _text(settings.get(role) or mapped.get(role)) for role in ROLES}


def _text(token: Any) -> str:
    """A token as its text: files have it plain, or with its properties."""
    return (token or {}).get("content", "") if isinstance(token, dict | None) else str(token)


class HuggingFace:
    """A tokenizer.json with our control symbols, see `tokenizer.Tokenizer`.

    Text is encoded by a copy in which all special tokens have names that nobody knows: random ones, made anew in every
    process. So neither the search for added tokens nor the model itself (Unigram finds `</s>` wherever it is spelled)
    can give their ids. All other text has the ids that transformers gives it; but a token in brackets that the file
    does not call special, as <think>, is hidden too: what spells it is text here, and the token for transformers.
    """

    def __init__(self, table: dict[str, Any], beside: dict[str, bytes], symbols: Sequence[str], name: str):
        """Args:
        table: tokenizer.json.
        beside: other files of the folder, by name.
        symbols: added behind the vocabulary where it lacks them.
        name: where it came from, for errors.
        """
        self._beside = beside
        read = lambda file: json.loads(beside.get(file, b"{}"))  # noqa: E731
        settings, mapped, generation = read(CONFIG_FILE), read(MAP_FILE), read(GENERATION_FILE)
        roles = roles_in(settings, mapped)
        more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
        named = {*roles.values(), *map(_text, more.values() if isinstance(more, dict) else more)}
        self._table = table = _complete(table, added_beside(settings, read(ADDED_FILE)), named, symbols, name)
        vocab = _vocab(table)
        added = {token["content"]: token for token in table["added_tokens"]}
        ids = vocab | {text: token["id"] for text, token in added.items()}
        texts = {i: text for text, i in ids.items()}
        self.vocab_size = max(texts) + 1

        self.names = {role: text for role, text in roles.items() if text in ids}
        if "eos_token" not in self.names:
            eos = generation.get("eos_token_id")
            eos = eos[0] if isinstance(eos, list) and eos else eos
            if eos not in texts:
                raise ValueError(
                    f"{name} names no EOS: neither {CONFIG_FILE} nor {MAP_FILE} has an eos_token that is in the "
                    f"vocabulary, nor {GENERATION_FILE} an eos_token_id. Write one of them beside it."
                )
            self.names["eos_token"] = texts[eos]
        self.eos_id = self._eos_of_files = ids[self.names["eos_token"]]
        self.pad_id = ids[self.names.get("pad_token", self.names["eos_token"])]
        self._whole = self._decoder = _build(table, name)
        self.bos_id = ids[self.names["bos_token"]] if "bos_token" in self.names else None
        begins = settings.get("add_bos_token")
        if not isinstance(begins, bool):  # what is named need not be put: rows of GPT-2's kind begin with their text
            begins = self._whole.encode("").ids[:1] == [self.bos_id]
        self.bos_id = self.bos_id if begins else None
        self.control_ids = {symbol: ids[symbol] for symbol in symbols}

        self.chat_template = beside.get(CHAT_FILE, b"").decode("utf-8")

        def is_marker(text: str) -> bool:
            # Turns of some models are written with tokens that the file does not call special.
            is_known = bool(text.strip()) and text in self.chat_template
            return is_known or bool(files.BRACKETED.fullmatch(text))

        hidden = {text for text, token in added.items() if token["special"] or text in named}
        unspellable = hidden | {text for text in added if is_marker(text)}
        self._hidden = frozenset(ids[text] for text in hidden)
        unk = ids.get(_text(table["model"].get("unk_token")))
        if table["model"]["type"] == "Unigram":
            unk = table["model"].get("unk_id")
        # Unknown letters give `<unk>`; where that is the EOS as well, they give nothing.
        roles_of_rows = {self.bos_id, self.eos_id, self.pad_id}
        self.special_ids = frozenset(ids[text] for text in unspellable) - ({unk} - roles_of_rows)
        self._drops_unknown = unk in self.special_ids
        made = repr((self.bos_id, self.eos_id, self.pad_id, sorted(unspellable)))
        canonical = json.dumps(table, sort_keys=True, ensure_ascii=False)
        self.digest = hashlib.sha256((canonical + made).encode("utf-8", "surrogatepass")).hexdigest()

        self._secrets = {text: secrets.token_hex(24) for text in sorted(unspellable)}
        for text, token in added.items():
            if self._whole.token_to_id(text) != token["id"]:
                raise ValueError(
                    f"{name}: token {text!r} has id {token['id']} in the file but {self._whole.token_to_id(text)} when "
                    "it is loaded: the ids of its vocabulary have gaps, so no symbols can be added behind it"
                )
        self._plain = _build(_renamed(table, self._secrets), name)

    def encode(self, text: str) -> list[int]:
        ids = self._plain.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i not in self.special_ids] if self._drops_unknown else ids

    def encode_markup(self, text: str) -> list[int]:
        return self._whole.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size and int(i) not in self._hidden]
        return self._decoder.decode(known, skip_special_tokens=False)

    def unprefixed(self) -> "HuggingFace":
        other = copy.copy(self)
        table = {key: _unprefixed(value) if key != "model" else value for key, value in self._table.items()}
        other._decoder = _build(table, FILE)
        other._plain = _build(_renamed(table, self._secrets), FILE)
        return other

    def save(self, folder: str | Path) -> None:
        content = json.dumps(self._table, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")
        found = self._beside | {FILE: content}
        found.pop(CHAT_FILE, None)
        if self.chat_template:
            found[CHAT_FILE] = self.chat_template.encode("utf-8")
        elif CONFIG_FILE in found:
            config = json.loads(found[CONFIG_FILE])
            config.pop("chat_template", None)
            found[CONFIG_FILE] = files.dumps(config)
        if self.eos_id != self._eos_of_files:
            end = {"eos_token": self._whole.id_to_token(self.eos_id)}
            for file in (CONFIG_FILE, MAP_FILE):
                if file == CONFIG_FILE or file in found:
                    found[file] = files.dumps(json.loads(found.get(file, b"{}")) | end)
        files.write(folder, found)


def load(path: Path, symbols: Sequence[str]) -> HuggingFace:
    """Reads a tokenizer.json and the files beside it.

    Raises:
      ValueError: where one cannot be read, or names no EOS; where the library is not installed.
    """
    table, folder = read_object(path), path.parent
    if not isinstance(table.get("model"), dict) or "vocab" not in table["model"]:
        raise ValueError(f"{path} is no {FILE} of Hugging Face: it has no model with a vocabulary")
    beside = {}
    for name in (CONFIG_FILE, MAP_FILE, GENERATION_FILE, ADDED_FILE):
        if (folder / name).is_file():
            read_object(folder / name)  # says what is wrong with it
            beside[name] = (folder / name).read_bytes()
    template = chat_template_in(folder)
    if template:
        beside[CHAT_FILE] = template.encode("utf-8")
    try:
        return HuggingFace(table, beside, symbols, str(path))
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{path}, or a file beside it, has a value of a wrong kind ({error!r})") from error


def _build(table: dict[str, Any], name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(f"{name} needs the tokenizers library: pip install -e '.[hf]'") from error
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(table))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{name} is no {FILE} that the tokenizers library reads: {error}") from error


def _vocab(table: dict[str, Any]) -> dict[str, int]:
    """Piece -> id of the model, without added tokens."""
    vocab = table["model"]["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def _complete(table: dict, more: Sequence[dict], named: set[str], symbols: Sequence[str], name: str) -> dict:
    """The table with the tokens that only the files beside it add, and with our symbols; it never cuts nor pads."""
    table = table | {"truncation": None, "padding": None, "added_tokens": [*table.get("added_tokens", [])]}
    added = table["added_tokens"]
    vocab = _vocab(table)
    known = {token["content"] for token in added}
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for token in more:
        if token["content"] not in known and vocab.get(token["content"], token["id"]) == token["id"]:
            added.append(usual | {"special": token["content"] in named} | token)
            known.add(token["content"])
    # A role such as PAD may be given to any piece; only what looks like a marker is one.
    lacking = sorted(text for text in named & vocab.keys() - known if files.BRACKETED.fullmatch(text))
    added += [usual | {"id": vocab[text], "content": text, "special": True} for text in lacking]
    next_id = 1 + max([*vocab.values(), *(token["id"] for token in added)])
    for symbol in symbols:
        here = [at for at, token in enumerate(added) if token["content"] == symbol]
        if here:
            added[here[0]] = added[here[0]] | {"special": True}
            continue
        if symbol in vocab:
            raise ValueError(f"{name} has {symbol} as a piece of text: use a vocabulary without it")
        added.append(usual | {"id": next_id, "content": symbol, "special": True})
        next_id += 1
    table["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return table


def _renamed(table: dict, names: dict[str, str]) -> dict:
    """The table with other names for some tokens, which keep their ids."""
    new = lambda text: names.get(text, text)  # noqa: E731
    model = dict(table["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new(text): i for text, i in vocab.items()}
    else:
        model["vocab"] = [[new(text), score] for text, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new(model["unk_token"])
    if model.get("merges"):
        pairs = [(merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [m for m, (a, b) in pairs if a not in names and b not in names and a + b not in names]
    added = [token | {"content": new(token["content"])} for token in table["added_tokens"]]
    # It adds BOS and EOS, by name.
    return table | {"model": model, "added_tokens": added, "post_processor": None}


def _unprefixed(part: Any) -> Any:
    """A normaliser, pre-tokenizer or decoder that neither puts a space before a text nor takes one away."""
    if isinstance(part, list):
        return [kept for item in part if (kept := _unprefixed(item)) is not None]
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {key: value for key, value in part.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return part | {"add_prefix_space": False}
    if kind == "Strip" and "content" in part:
        return part | {"start": 0}
    if kind == "Sequence":
        return {key: _unprefixed(value) if isinstance(value, list) else value for key, value in part.items()}
    return part
