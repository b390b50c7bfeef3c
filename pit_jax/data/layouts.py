"""Layouts of published preference sets: from the fields of one row to (x, y_l, y_w), or the cause of dropping it.

Prompts that are dialogues, or that we word ourselves, end with a blank line as those of HH-RLHF do, so that the
template `Human: {x}Assistant:` makes a dialogue of them. Prompts that are a column of text stay as they are. Answers
have no outer whitespace.

Of a dialogue in one text, "\\n\\nHuman:" and "\\n\\nAssistant:" open its turns: where a single turn quotes them, it
gets a space before the name (`one_turn`), so that nobody's text becomes the turn of somebody else.
"""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pit_jax.data import verifier
from pit_jax.data.row_files import DataError, json_type, string_field
from pit_jax.types import PreferenceExample, Requirement

PROMPTS_DIFFER = "prompts_differ"
"""The dialogues of a pair differ before the last answer."""
EMPTY_PROMPT = "empty_prompt"
EMPTY_ANSWER = "empty_answer"
SAME_ANSWERS = "same_answers"
NOT_A_DIALOGUE = "not_a_dialogue"
"""A dialogue that does not open with a human turn, has an empty one there, or has no answer; of chat messages also one
with an empty turn, whose turns do not alternate, or with turns of others, such as tools."""
NO_POST = "no_post"
"""There is nothing to be summarized."""
TIE = "tie"
"""Nobody says which answer is better."""

Fields = Mapping[str, Any]


def pair(prompt: str, chosen: str, rejected: str, reflection: str = "") -> PreferenceExample | str:
    """A row, or why there is none: an empty text, or answers that differ in nothing but outer whitespace."""
    chosen, rejected = chosen.strip(), rejected.strip()
    if not prompt.strip():
        return EMPTY_PROMPT
    if not chosen or not rejected:
        return EMPTY_ANSWER
    return SAME_ANSWERS if chosen == rejected else PreferenceExample(prompt, rejected, chosen, reflection)


_TURN = re.compile(r"\n\n(?=(?:Human|Assistant):(?:\s|$))")


def one_turn(text: str) -> str:
    """A text of one speaker, in which nothing opens a turn: "\\n\\nHuman:" becomes "\\n\\n Human:"."""
    return _TURN.sub("\n\n ", text)


@functools.lru_cache(maxsize=64)
def _near(field: str, names: tuple[str, ...]) -> str:
    found = difflib.get_close_matches(field, names, n=1, cutoff=0.85)  # "selection" and "rejection" are at 0.84
    return found[0] if found else ""


def check_names(row: Fields, where: str, fields: Iterable[str] = ("reflection", "requirements")) -> None:
    """Fields that a row may lack, so that a slip of the pen would lose them.

    Raises:
      DataError: where one is missing and another has nearly its name.
    """
    for field in fields:
        near = "" if field in row else _near(field, tuple(row))
        if near:
            raise DataError(f"{where}: there is no field {field!r}, but {near!r}: rename it, or leave it out")


def requirements(row: Fields, where: str) -> tuple[Requirement, ...]:
    """Field requirements, [{"kind"[, "value"]}, ...]; none where it is missing or null.

    Raises:
      DataError: where it is something else.
    """
    values = row.get("requirements")
    if values is None:
        return ()
    if not isinstance(values, list):
        raise DataError(f"{where}: field 'requirements' is a JSON {json_type(values)}, but must be an array")
    found = []
    for i, value in enumerate(values):
        field = f"requirements[{i}]"
        if not isinstance(value, dict):
            raise DataError(f"{where}: field {field!r} is a JSON {json_type(value)}, but must be an object")
        kind = string_field(value, f"{field}.kind", where)
        # Of Parquet, whose structs have all fields.
        argument = "" if value.get("value") is None else string_field(value, f"{field}.value", where)
        if not kind:
            raise DataError(f"{where}: field '{field}.kind' is empty")
        found.append(Requirement(kind, argument))
        try:
            verifier.check_requirement(found[-1])
        except ValueError as error:
            raise DataError(f"{where}: field {field!r}: {error}") from error
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------ dialogues

_HUMAN = re.compile(r"\n*Human: ")
_ASSISTANT = re.compile(r"\n\nAssistant:(?=\s|$)")
_NAMED_TURN = re.compile(r"\n\n(Human|Assistant):(?=\s|$)")


def split_dialogue(dialogue: str) -> tuple[str, str] | None:
    """x and y of an HH-RLHF dialogue, split at its last assistant turn.

    x begins after the first `Human: ` and ends with the blank line before `Assistant:`, so that the template
    `Human: {x}Assistant:` gives back the dialogue, with all its earlier turns, as it was written. y has no outer
    whitespace. A human turn after the last assistant turn belongs to y: a model that went on for the human wrote it.

    Returns:
      (x, y), or None where the text is no such dialogue.
    """
    human = _HUMAN.match(dialogue)
    turns = list(_ASSISTANT.finditer(dialogue))
    if human is None or not turns:
        return None
    prompt = dialogue[human.end() : turns[-1].start()]
    return (f"{prompt}\n\n", dialogue[turns[-1].end() :].strip()) if prompt.strip() else None


def dialogue_prompt(text: str) -> str | None:
    """x of a prompt in the form of HH-RLHF: "Human: ..", with further turns, up to "Assistant:" or the human's last.

    Returns:
      x as that of `split_dialogue`; empty where nobody asks anything, or the text ends within an answer; None where it
      is no such prompt.
    """
    human = _HUMAN.match(text)
    if human is None or not (text.startswith("\n\n") or _ASSISTANT.search(text)):
        return None
    x, turns = text[human.end() :].rstrip(), list(_NAMED_TURN.finditer(text, human.end()))
    if turns and turns[-1][1] == "Assistant":
        if text[turns[-1].end() :].strip():
            return ""
        x = text[human.end() : turns[-1].start()]
    return f"{x}\n\n" if x.strip() else ""


def _says(prompt: str, texts: Iterable[str]) -> bool:
    """Whether a column of prompts repeats one of some texts, or says nothing."""
    return not prompt.strip() or any(prompt.split() == text.split() for text in texts)


# ------------------------------------------------------------------------------------------------------------ summaries


def summary_prompt(text: str, title: str = "", subreddit: str = "", kind: str = "post") -> str:
    """x of a set of summaries, in our words: "Summarize this post from r/NAME in a sentence or two.", title, text.

    The three stand one blank line apart; a title or subreddit that is not there is left out. `kind` is post or article.
    """
    place = f" from r/{subreddit.strip()}" if subreddit.strip() else ""
    parts = f"Summarize this {kind}{place} in a sentence or two.", title.strip(), text.strip()
    return one_turn("\n\n".join(filter(None, parts))) + "\n\n"


def summarize(row: Fields, where: str) -> PreferenceExample | str:
    """OpenAI's comparisons of summaries (Stiennon et al., 2020), as they are published.

    {"info": {"post" or "article", "title", "subreddit"}, "summaries": [{"text"}, {"text"}], "choice": 0 or 1}, where
    `choice` is the number of the better summary; null or -1 is a tie. x is `summary_prompt`.
    """
    info, summaries = row.get("info"), row.get("summaries")
    if not isinstance(info, dict):
        raise DataError(f"{where}: field 'info' is a JSON {json_type(info)}, but must be an object")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise DataError(f"{where}: field 'summaries' must be an array of two objects")
    texts = [string_field(summary, f"summaries[{i}].text", where) for i, summary in enumerate(summaries)]
    optional = lambda field: "" if info.get(field) is None else string_field(info, f"info.{field}", where)  # noqa: E731
    kind = "post" if optional("post").strip() else "article"
    choice = row.get("choice")
    if not optional(kind).strip():
        return NO_POST
    if choice is None or choice == -1:
        return TIE
    if isinstance(choice, bool) or choice not in (0, 1):
        raise DataError(f"{where}: field 'choice' is {choice!r}, but must be 0 or 1, or null for a tie")
    prompt = summary_prompt(optional(kind), optional("title"), optional("subreddit"), kind)
    return pair(prompt, texts[int(choice)], texts[1 - int(choice)])


_TLDR = re.compile(r"SUBREDDIT: r/(.*?)\n\nTITLE: (.*?)\n\nPOST: ?(.*)", re.DOTALL)


def tldr(row: Fields, where: str) -> PreferenceExample | str:
    """Summaries of Reddit posts by a model ("ours") and by the author of the post ("reference"), judged by a model.

    {"query": "SUBREDDIT: r/.. TITLE: .. POST: .. TL;DR:", "postprocessed_response", "reference_responses", "preferred":
    "ours", "reference", or empty where nobody judged}. x is that of the same post in OpenAI's comparisons.
    """
    query = string_field(row, "query", where)
    asked = query.rstrip()
    # The end is looked for apart: in one expression a query that is none takes time with the third power of its length.
    found = _TLDR.match(asked.removesuffix("TL;DR:").rstrip("\n")) if asked.endswith("TL;DR:") else None
    if found is None:
        raise DataError(f"{where}: field 'query' must read SUBREDDIT: r/.., TITLE: .., POST: .., TL;DR:")
    subreddit, title, post = found.groups()
    ours, reference = (string_field(row, field, where) for field in ("postprocessed_response", "reference_responses"))
    preferred = string_field(row, "preferred", where)
    if not post.strip():
        return NO_POST
    if preferred not in ("ours", "reference"):
        if preferred:
            raise DataError(f"{where}: field 'preferred' is {preferred!r}, but must be ours, reference or empty")
        return TIE
    better, worse = (ours, reference) if preferred == "ours" else (reference, ours)
    return pair(summary_prompt(post, title, subreddit), better, worse)


# -------------------------------------------------------------------------------------------------------------- columns

COLUMNS = {
    "prompt": ("prompt", "instruction", "question", "query", "input", "conversations"),
    "context": ("input",),  # what the prompt is about: read beside "prompt" and "instruction"
    "system": ("system", "system_prompt"),
    "chosen": ("chosen", "chosen_response", "response_j"),
    "rejected": ("rejected", "rejected_response", "response_k"),
    # Two answers, and which of them is better: names at the same place of the first two lines belong together.
    "first": ("response_0", "response_1", "response1", "output_1", "answer_0", "response_a", "answer_a"),
    "second": ("response_1", "response_2", "response2", "output_2", "answer_1", "response_b", "answer_b"),
    "better": ("better_response_id", "safer_response_id", "preference", "better", "winner"),
    "messages": ("messages",),  # prompts alone: a dialogue, whose last answer is left out
    "reflection": ("reflection",),
}
"""What a column holds -> its names, of which the first that a row has counts. config.data.columns adds to these."""

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TIES = ("", "tie", "0", "-1")


Turns = list[tuple[str, str]]


class Seen(NamedTuple):
    """What the rows of a file say together and none says alone.

    Attributes:
      prompt: the column of prompts: the first of its names under which any row has something; empty: there is none.
      verdicts: all that is said of which answer is better, in lower case.
    """

    prompt: str
    verdicts: frozenset[str]


def look_at(rows: Iterable[tuple[str, Fields]], names: Mapping[str, str]) -> Seen:
    """Looks at all (where, row) of a file; names as for `columns`."""
    filled, verdicts = set(), set()
    for _, row in rows:
        filled |= {name for name in COLUMNS["prompt"] if row.get(name) is not None}
        found = _pair_names(row, names)
        if len(found) == 3:
            verdicts.add(_verdict(row[found[2]]))
    left = (name for name in COLUMNS["prompt"] if name in filled and name not in names.values())
    return Seen(names.get("prompt") or next(left, ""), frozenset(verdicts))


def columns(
    row: Fields, where: str, seen: Seen, names: Mapping[str, str] | None = None, answers: bool = True
) -> PreferenceExample | str:
    """Rows of named columns; texts, or chat messages.

    x is the prompt, behind the system text and before the context where there are such, one blank line apart. The
    answers are `chosen` and `rejected`, or `first` and `second` with `better`, which names one of them: by its column,
    or by the end in which the two names differ, as 0 of response_0 and 2 of output_2. A `better` that is null, empty or
    "tie" is a tie; so is -1 or another 0, but only where the file shows that its answers are counted as they are named.

    Messages are objects {"role", "content"} or {"from", "value"} of system, user (human) and assistant (gpt). Answers
    are whole dialogues, or what follows on `prompt` (messages or text): messages, a single one, or a text. The two
    dialogues must be the same up to the last message, which is the answer. x is written as in HH-RLHF: first human
    turn, then "Assistant: .." and "Human: .." in turn; a system text stands before the first human turn, one blank line
    apart, as the template has no place of its own for it. Turns have no outer whitespace. Texts in the form of HH-RLHF
    are read as such: a prompt up to "Assistant:", and two answers that are whole dialogues. A prompt beside whole
    dialogues must be theirs: all of x, or a turn of the human.

    Args:
      row: fields; also `reflection` and `requirements` as in our own layout.
      where: the row stands.
      seen: of all rows of the file.
      names: key of COLUMNS -> the name of the column; what is not in it is looked up in COLUMNS.
      answers: False: where there are none, x alone will do; both answers are then empty.

    Returns:
      The row, or the cause why it is dropped.

    Raises:
      DataError: where a column is not there, or holds something else.
    """
    names = names or {}
    check_names(row, where, ("requirements",) if "reflection" in names else ("reflection", "requirements"))
    both = _answers(row, where, names, seen)
    if both == (TIE,):
        return TIE
    prompt = row.get(seen.prompt) if seen.prompt else None
    system = _text(row, _column(row, "system", names, where), where)
    if not both:
        if answers:
            raise DataError(f"{where}: {NO_PAIR}; the row has {sorted(row)}")
        prompt = row.get(_column(row, "messages", names, where)) if prompt is None else prompt
        if isinstance(prompt, list | dict):
            turns = _turns(prompt, where, "prompt", system) or []
            x = _dialogue(turns[:-1] if turns and turns[-1][0] == "assistant" else turns)
            return PreferenceExample(x, "", "") if x else NOT_A_DIALOGUE
        x = _plain(row, seen.prompt, system, names, where)
        return PreferenceExample(x, "", "") if x and x.strip() else EMPTY_PROMPT if x is not None else NOT_A_DIALOGUE
    reflection = _text(row, _column(row, "reflection", names, where), where)
    if any(isinstance(value, list | dict) for value in (prompt, *(row[name] for name in both))):
        found = _chat(row, prompt, system, both, where)
    else:
        x = _plain(row, seen.prompt, system, names, where)
        found = NOT_A_DIALOGUE if x is None else _texts(row, x, system, both, where, seen)
    if isinstance(found, str):
        return found
    found = pair(*found, reflection)
    asked = requirements(row, where)
    return dataclasses.replace(found, requirements=asked) if asked and not isinstance(found, str) else found


def _texts(
    row: Fields, x: str, system: str, both: tuple[str, ...], where: str, seen: Seen
) -> tuple[str, str, str] | str:
    """(x, y_w, y_l) of answers that are texts, which may be whole dialogues of HH-RLHF; or why there is none."""
    chosen, rejected = (_text(row, name, where) for name in both)
    whole = split_dialogue(chosen), split_dialogue(rejected)
    if whole[0] is None or whole[1] is None:
        return x, chosen, rejected
    (x, chosen), (other, rejected) = whole
    prompt = _text(row, seen.prompt, where)
    first, *later = _NAMED_TURN.split(x)
    humans = [first, *(text for name, text in zip(later[::2], later[1::2], strict=True) if name == "Human")]
    if x != other or not _says(dialogue_prompt(prompt) or prompt, [x, *humans]):
        return PROMPTS_DIFFER
    return (one_turn(f"{system.strip()}\n\n") if system.strip() else "") + x, chosen, rejected


def _opens(prompt: Any, turns: Turns, where: str) -> bool:
    """Whether a prompt is that of a dialogue: its first messages, or as a text a turn of the user."""
    if isinstance(prompt, list):
        return turns[: len(prompt)] == _turns(prompt, where, "prompt", "")
    return not isinstance(prompt, str) or _says(prompt, [text for role, text in turns if role == "user"])


def _chat(row: Fields, prompt: Any, system: str, both: tuple[str, ...], where: str) -> tuple[str, str, str] | str:
    """(x, y_w, y_l) of chat messages, or why there is none."""
    dialogues = []
    for name in both:
        turns = _turns(row[name], where, name, "")
        if turns and turns[0][0] == "assistant":
            before = _turns(prompt, where, "prompt", system)
            turns = before and [*before, *turns]
        elif turns and not _opens(prompt, turns, where):
            return PROMPTS_DIFFER
        elif turns and system.strip() and turns[0][0] != "system":
            turns = [("system", system.strip()), *turns]
        x = _dialogue(turns[:-1]) if turns and turns[-1][0] == "assistant" else ""
        if not x:
            return NOT_A_DIALOGUE
        dialogues.append((x, turns[-1][1]))
    (x, chosen), (other, rejected) = dialogues
    return (x, chosen, rejected) if x == other else PROMPTS_DIFFER


NO_PAIR = (
    "no columns of a pair: name them by --config.data.columns=prompt:NAME,chosen:NAME,rejected:NAME (or first:NAME,"
    "second:NAME,better:NAME for two answers and which is better)"
)


def is_pair(row: Fields) -> bool:
    """Whether `columns` finds two answers without being told their names."""
    return bool(_pair_names(row, {}))


def _column(row: Fields, role: str, names: Mapping[str, str], where: str) -> str:
    """The name of a column, or an empty string where the row has none."""
    if role in names:
        if names[role] not in row:
            raise DataError(
                f"{where}: column {names[role]!r} (config.data.columns: {role}) is missing; the row has {sorted(row)}"
            )
        return names[role]
    taken = set(names.values())
    return next((name for name in COLUMNS[role] if row.get(name) is not None and name not in taken), "")


def _pair_names(row: Fields, names: Mapping[str, str]) -> tuple[str, ...]:
    """Names of (chosen, rejected) or of (first, second, better); of none."""
    first, second = names.get("first"), names.get("second")
    if not (first or second or "better" in names):
        found = tuple(
            names.get(role) or next((name for name in COLUMNS[role] if name in row), "")
            for role in ("chosen", "rejected")
        )
        if all(found):
            return found
    for one, other in zip(COLUMNS["first"], COLUMNS["second"], strict=True):
        if (first or one) in row and (second or other) in row:
            better = names.get("better") or next((name for name in COLUMNS["better"] if name in row), "")
            return (first or one, second or other, better) if better else ()
    return ()


def _verdict(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # a column of integers with gaps
        value = int(value)
    return "" if value is None else str(value).strip().lower()


_COUNTED = {("1", "2"): "2", ("0", "1"): "0"}
"""Ends of two names -> the verdict by which it is seen that the answers are counted by these numbers. 0 and 1 beside
response_1 and response_2 may be their numbers from 0 on, and -1 and 1 what somebody thinks of the first."""


def _answers(row: Fields, where: str, names: Mapping[str, str], seen: Seen) -> tuple[str, ...]:
    """Names of the columns of (y_w, y_l); (TIE,); nothing where the row has no pair."""
    for role in names:
        _column(row, role, names, where)
    found = _pair_names(row, names)
    if len(found) < 3:
        return found
    first, second, better = found
    said = _verdict(row[better])
    same = len(os.path.commonprefix([first, second]))
    counted = _COUNTED.get((first[same:], second[same:]), "")
    telling = {counted, (first if counted == "0" else second).lower()}
    if counted and seen.verdicts & {"0", "-1"} and not seen.verdicts & telling:
        raise DataError(
            f"{where}: column {better!r} has {sorted(seen.verdicts)} in this file, and never {counted}, so that nobody "
            f"can tell which number stands for {first!r}: write the name of the better column, or 'tie', in its place"
        )
    for i, name in enumerate((first, second)):
        if said and said in (name.lower(), name[same:].lower()):
            return (first, second) if i == 0 else (second, first)
    if said in _TIES:
        return (TIE,)
    raise DataError(
        f"{where}: column {better!r} is {row[better]!r}, which is neither {first!r} nor {second!r}, nor the end of one "
        f"({first[same:]}, {second[same:]}), nor a tie"
    )


def _string(value: Any, where: str, field: str) -> str:
    return string_field({field: value}, field, where)


def _text(row: Fields, name: str, where: str) -> str:
    return _string(row[name], where, name) if name and row.get(name) is not None else ""


def _plain(row: Fields, prompt_name: str, system: str, names: Mapping[str, str], where: str) -> str | None:
    """x of a prompt that is text; None where it is a dialogue without a last question."""
    prompt = _text(row, prompt_name, where)
    # Beside an instruction, "prompt" is what somebody has made of instruction and input.
    has_context = "context" in names or prompt_name == "instruction"
    has_context |= prompt_name == "prompt" and "instruction" not in row
    context = _text(row, _column(row, "context", names, where), where) if has_context else ""
    parts = (system.strip(), prompt.strip(), context.strip())
    dialogue = dialogue_prompt(prompt)
    if dialogue is not None:
        head, tail = (f"{one_turn(part)}\n\n" if part else "" for part in (parts[0], parts[2]))
        return head + dialogue + tail if dialogue else None
    if prompt.strip() and (parts[0] or parts[2]):
        prompt = "\n\n".join(filter(None, parts))
    return one_turn(prompt) if prompt.endswith("\n\n") else prompt


def _turns(value: Any, where: str, field: str, system: str) -> Turns | None:
    """(role, text) of messages; a text is one of the user as a prompt, and of the assistant as an answer.

    None where a turn is of somebody else.
    """
    if value is None or isinstance(value, str):
        found = [("user" if field == "prompt" else "assistant", _string(value or "", where, field).strip())]
    else:
        found = []
        for i, message in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(message, dict):
                raise DataError(f"{where}: {field}, message {i} is a JSON {json_type(message)}, but must be an object")
            role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
            role = ROLES.get(string_field(message, role_key, where).lower())
            if role is None:
                return None
            found.append((role, string_field(message, text_key, where).strip()))
    if system.strip() and found and found[0][0] != "system":
        found.insert(0, ("system", system.strip()))
    return found


def _dialogue(turns: Turns) -> str:
    """x of the turns before the answer; empty where they are no dialogue that an answer can follow."""
    system, rest = (turns[0][1], turns[1:]) if turns and turns[0][0] == "system" else ("", turns)
    alternate = all(role == ("user", "assistant")[i % 2] for i, (role, _) in enumerate(rest))
    if len(rest) % 2 == 0 or not alternate or not all(text for _, text in rest):
        return ""
    names = ("Human: ", "Assistant: ")
    later = "".join(f"{names[i % 2]}{one_turn(text)}\n\n" for i, (_, text) in enumerate(rest[1:], 1))
    return one_turn("\n\n".join(filter(None, (system, rest[0][1])))) + "\n\n" + later
