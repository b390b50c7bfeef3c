"""Templates: text files whose `{fields}` are filled with plain text and whose control symbols become control ids.

The files beside this module are the default wording (the literal forms of PIT appendix A, and our own words for the
Self-Refine prompts of appendices E.1 and B); a folder with files of the same names replaces them.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from pit_jax.data.tokenizer import CONTROL_SYMBOLS, Tokenizer, puts_space

FIELDS = {
    "policy": {"prompt"},
    "pit": {"prompt", "ref_response"},
    "reflection": {"prompt", "response"},
    "refinement": {"prompt", "response", "feedback"},
    "one_call": {"prompt", "response"},
}
SRT_FIELDS = {
    "srt": {"prompt", "response", "weaknesses", "suggestions", "score", "refinement"},
    "critic": {"prompt", "response"},
}
END = "<<End>>"
"""In a template: EOS, where a turn of the dialogue has ended."""

_PARTS = re.compile("(" + "|".join(map(re.escape, (*CONTROL_SYMBOLS, END))) + r"|\{[a-z_]+\})")


def load(name: str, folder: str | Path = "") -> str:
    """The text of a template.

    Raises:
      ValueError: where a replaced file is missing, is not UTF-8, lacks a field or names an unknown one.
    """
    path = Path(folder or Path(__file__).parent / "templates") / f"{name}.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template {path} cannot be read (config.data.templates): {error}") from error
    found = set(re.findall(r"\{([a-z_]+)\}", text))
    needed = (FIELDS | SRT_FIELDS)[name]
    if found != needed:
        raise ValueError(f"template {path} has the fields {sorted(found)}, but needs {sorted(needed)}")
    return text


def literals(folder: str | Path = "", names: Sequence[str] = tuple(FIELDS)) -> str:
    """The words of templates, for training a tokenizer."""
    return " ".join(_PARTS.sub(" ", load(name, folder)) for name in names)


Template = tuple[tuple[str, str | tuple[int, ...]], ...]
"""Parts in order: ("ids", ids of a literal or of a control symbol) or ("field", its name)."""


def split(tokenizer: Tokenizer, text: str) -> list[tuple[str, str | tuple[int, ...]]]:
    """A template's text in parts: as in `Template`, with literals as ("text", words).

    Some tokenizers put a space before a text: with them a literal gives up the one before a field.
    """
    control = {**tokenizer.control_ids, END: tokenizer.eos_id}
    if puts_space(tokenizer):
        text = re.sub(r" (?=\{[a-z_]+\})", "", text)
    parts: list[tuple[str, str | tuple[int, ...]]] = []
    for part in _PARTS.split(text):
        if part in control:
            parts.append(("ids", (control[part],)))
        elif part.startswith("{") and part.endswith("}"):
            parts.append(("field", part[1:-1]))
        elif part:
            parts.append(("text", part))
    return parts


def parse_parts(tokenizer: Tokenizer, text: str) -> list[tuple[str, str | tuple[int, ...]]]:
    """`split`, with its literals encoded one by one."""
    parts = split(tokenizer, text)
    return [("ids", tuple(tokenizer.encode(value))) if kind == "text" else (kind, value) for kind, value in parts]


def parse(tokenizer: Tokenizer, text: str) -> Template:
    """A template's text with its literals encoded, behind BOS where there is one.

    Literals and fields are encoded one by one, so a field cannot merge with what stands beside it, and a control
    symbol is made only where the template itself has one.
    """
    bos = [] if tokenizer.bos_id is None else [("ids", (tokenizer.bos_id,))]
    return (*bos, *parse_parts(tokenizer, text))


def fill(tokenizer: Tokenizer, template: Template, **fields: str | Sequence[int]) -> list[int]:
    """The ids of a template whose fields are plain text, or ids that a model has sampled."""
    ids: list[int] = []
    for kind, part in template:
        value = fields[part] if kind == "field" else part
        ids += tokenizer.encode(value) if isinstance(value, str) else value
    return ids
