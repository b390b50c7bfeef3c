"""Chat templates: the turns of templates/*.txt in the form that a model's own Jinja template gives them.

A template is rendered with placeholders for what is filled in and cut at these. Its own words are encoded with special
tokens, what is filled in without: so a text cannot end its turn. Ids are those of the whole rendered text but where a
piece would have reached from a template's words into the text of a field.
"""

import copy
import dataclasses
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from pit_jax.data import templates
from pit_jax.data.templates import Template
from pit_jax.data.tokenizer import Tokenizer, puts_space

_ROLE = re.compile(r"(Human:|Assistant:)")
_TURN = re.compile(r"\n\n(Human|Assistant):(?=\s|$)")
USER, ASSISTANT = "user", "assistant"


def split_turns(prompt: str) -> list[str]:
    """The turns of a prompt, without outer whitespace: user, assistant, ..., user.

    Only a prompt that ends with a blank line has more than one: those of dialogues, whose earlier turns open with
    "\\n\\nAssistant:" and "\\n\\nHuman:". Of two such marks of one speaker in a row, the second is text. Where a text
    quotes such marks, its reader has made text of them (`layouts.one_turn`).
    """
    if not prompt.endswith("\n\n"):
        return [prompt.strip()]
    first, *rest = _TURN.split(prompt)
    turns, speaker = [first], "Human"
    for new, text in zip(rest[::2], rest[1::2], strict=True):
        if new == speaker:
            turns[-1] += f"\n\n{new}:{text}"
        else:
            turns.append(text)
            speaker = new
    if speaker == "Assistant":  # the user has the last word
        last = turns.pop()
        turns[-1] += f"\n\nAssistant:{last}"
    return [turn.strip() for turn in turns]


@functools.lru_cache(maxsize=8)
def _compiled(template: str, date: str) -> Any:
    """As transformers compiles it, with its names; but the date is that of the run, so that ids stay the same."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ValueError("config.tokenizer.chat_template needs jinja2: pip install -e '.[hf]'") from error

    class Generation(jinja2.ext.Extension):
        """{% generation %}, by which transformers marks what a model has said: here it marks nothing."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.fromisoformat(date).strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"config.tokenizer.chat_template: the template is not valid Jinja: {error}") from error


def inside(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Ids of text that goes on behind other text, where `encode` puts a space before what it takes for a beginning."""
    for before in ("\n", "x", "."):
        whole, start = encode(before + text), encode(before)
        if whole[: len(start)] == start:
            return whole[len(start) :]
    return encode(text)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat template with its tokenizer.

    Attributes:
      base: the tokenizer as it was loaded.
      template: Jinja.
      date: YYYY-MM-DD: today, for templates that say it.
      tokenizer: `base` as texts of a turn are encoded: its EOS is what ends a turn of the assistant, and it puts no
        space before a text unless the template has one there.
    """

    base: Tokenizer
    template: str
    date: str

    def __post_init__(self):
        _compiled(self.template, self.date)
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("_between", {})
        first, answer = self._name(0), self._name(1)
        before, after = self._cut(self._render([first, answer], False), [first, answer])[1:]
        spaced = puts_space(self.base)
        tokenizer = copy.copy(self.base if not spaced or before.endswith(" ") else self.base.unprefixed())
        end = self.base.encode_markup(after.lstrip())[:1]
        tokenizer.eos_id = end[0] if end and end[0] in self.base.special_ids else self.base.eos_id
        put("tokenizer", tokenizer)
        put("_spaced", spaced)
        put("_takes_space", spaced and before.endswith(" "))
        put("_single", self._cut(self._render([first], True), [first]))

    @property
    def digest(self) -> str:
        """Of the template and its date."""
        return hashlib.sha256(repr((self.template, self.date)).encode("utf-8", "surrogatepass")).hexdigest()

    def parse(self, text: str) -> Template:
        """A template of ours, "Human: ...Assistant:..." with more such turns, in turns of the chat template.

        What stands behind "Assistant:" is what the model has said so far, and goes on behind the chat template's
        generation prompt as it is; <<End>> is the EOS of a turn. BOS stands where the chat template has one.

        Raises:
          ValueError: where the text has no such turns, or the chat template does not render them.
        """
        opening, *rest = _ROLE.split(text)
        roles, contents = rest[::2], rest[1::2]
        expected = ["Human:", "Assistant:"] * (len(roles) // 2)
        if opening.strip() or not roles or roles != expected:
            raise ValueError(
                "with config.tokenizer.chat_template every template must be turns of the form "
                f"'Human: ...Assistant: ...', but one is {text!r}"
            )
        parts: list[tuple[str, Any]] = []
        said: list[str] = []  # contents of the messages
        slots: dict[str, tuple[str, Any]] = {}
        for user, assistant in zip(contents[::2], contents[1::2], strict=True):
            words = []
            for kind, value in templates.split(self.tokenizer, user.strip()):
                if kind != "text":
                    name = self._name(len(slots))
                    slots[name], value = (kind, value), name
                words.append(value)
            names = [word for word in words if word in slots]
            if said:  # from the end of the last answer on
                rendered = self._render([*said, "".join(words)], True)
                literals = self._cut(rendered, [said[-1], *names])[1:]
                stripped = literals[0].lstrip()
                if parts[-1] == ("ids", tuple(self._markup(stripped)[:1])) == ("ids", (self.tokenizer.eos_id,)):
                    parts.pop()  # the template's own end of the turn
                    literals[0] = stripped
                parts += self._filled(literals, [slots[name] for name in names], behind=True)
            else:
                literals = self._cut(self._render(["".join(words)], True), names)
                parts += self._filled(literals, [slots[name] for name in names], behind=False)
            parts += templates.parse_parts(self.tokenizer, assistant.strip(" "))
            answer = self._name(len(slots))
            slots[answer] = ("", "")
            said += ["".join(words), answer]
        return tuple(part for part in parts if part != ("ids", ()))

    def prompt(self, text: str) -> list[int]:
        """Ids of x; its earlier turns, see `split_turns`, become turns of the chat template."""
        turns = split_turns(text)
        between = self._turns_between(len(turns))
        ids = self.tokenizer.encode(turns[0])
        for literal, turn in zip(between, turns[1:], strict=True):
            ids += [*literal, *self.tokenizer.encode(turn)]
        return ids

    def _turns_between(self, n: int) -> list[tuple[int, ...]]:
        """The ids between n turns."""
        if n not in self._between:
            names = [self._name(i) for i in range(n)]
            first, *literals, last = self._cut(self._render(names, True), names)
            if [first, last] != self._single:
                raise ValueError(
                    "config.tokenizer.chat_template writes the beginning or the end of a dialogue otherwise than that "
                    f"of a single turn: {[first, last]} and {self._single}. Use another template."
                )
            self._between[n] = [self._literal(text, behind=True) for text in literals]
        return self._between[n]

    def _name(self, i: int) -> str:
        return f"Field{i}of{hashlib.sha256(self.template.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"

    def _render(self, contents: Sequence[str], generate: bool) -> str:
        messages = [{"role": ASSISTANT if i % 2 else USER, "content": text} for i, text in enumerate(contents)]
        arguments = dict(messages=messages, tools=None, documents=None, add_generation_prompt=generate)
        try:
            return _compiled(self.template, self.date).render(**arguments, **self.base.names)
        except Exception as error:  # whatever code of a template can raise
            raise ValueError(
                f"config.tokenizer.chat_template cannot write {len(contents)} turns: {type(error).__name__}: {error}"
            ) from error

    def _cut(self, rendered: str, names: Sequence[str]) -> list[str]:
        """The texts before, between and behind names; names before the first of them are not looked for."""
        literals = []
        for name in names:
            literal, found, rendered = rendered.partition(name)
            if not found or name in rendered:
                raise ValueError("config.tokenizer.chat_template must write the text of each turn once, in its order")
            literals.append(literal)
        return [*literals, rendered]

    def _filled(self, literals: Sequence[str], fields: Sequence[tuple[str, Any]], behind: bool) -> list:
        """Parts of a template: literals around fields."""
        parts = []
        for i, literal in enumerate(literals):
            parts.append(("ids", self._literal(literal, behind=behind or i > 0)))
            parts += fields[i : i + 1]
        return parts

    def _literal(self, text: str, *, behind: bool) -> tuple[int, ...]:
        """Ids of words of the chat template before a field (or an answer), and behind another or not.

        Where the tokenizer puts a space before the text of a field, a literal gives up the one that it ends with.
        """
        if self._takes_space:
            text = text.removesuffix(" ")
        ids = inside(self._markup, text) if behind and self._spaced else self._markup(text)
        if not behind:
            while len(ids) > 1 and ids[0] == ids[1] == self.base.bos_id:
                ids = ids[1:]  # a template that says it twice
        return tuple(ids)

    def _markup(self, text: str) -> list[int]:
        return self.base.encode_markup(text)
