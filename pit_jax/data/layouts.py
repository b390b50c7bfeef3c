"""Layouts of published preference sets: from the fields of one row to (x, y_l, y_w), or the cause of dropping it.

Prompts that are dialogues, or that we word ourselves, end with a blank line as those of HH-RLHF do, so that the
template `Human: {x}Assistant:` makes a dialogue of them. Prompts that are a column of text stay as they are. Answers
have no outer whitespace.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from pit_jax.data.row_files import DataError, json_type, string_field
from pit_jax.types import PreferenceExample

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


# ------------------------------------------------------------------------------------------------------------ summaries


def summary_prompt(text: str, title: str = "", subreddit: str = "", kind: str = "post") -> str:
    """x of a set of summaries, in our words: "Summarize this post from r/NAME in a sentence or two.", title, text.

    The three stand one blank line apart; a title or subreddit that is not there is left out. `kind` is post or article.
    """
    place = f" from r/{subreddit.strip()}" if subreddit.strip() else ""
    parts = f"Summarize this {kind}{place} in a sentence or two.", title.strip(), text.strip()
    return "".join(f"{part}\n\n" for part in parts if part)


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


_TLDR = re.compile(r"SUBREDDIT: r/(.*?)\n\nTITLE: (.*?)\n\nPOST: ?(.*?)\n*TL;DR:\s*$", re.DOTALL)


def tldr(row: Fields, where: str) -> PreferenceExample | str:
    """Summaries of Reddit posts by a model ("ours") and by the author of the post ("reference"), judged by a model.

    {"query": "SUBREDDIT: r/.. TITLE: .. POST: .. TL;DR:", "postprocessed_response", "reference_responses", "preferred":
    "ours", "reference", or empty where nobody judged}. x is that of the same post in OpenAI's comparisons.
    """
    query = string_field(row, "query", where)
    found = _TLDR.match(query)
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
    "context": ("input",),  # what an instruction is about: read beside "instruction" alone
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


def columns(
    row: Fields, where: str, names: Mapping[str, str] | None = None, answers: bool = True
) -> PreferenceExample | str:
    """Rows of named columns; texts, or chat messages.

    x is the prompt, behind the system text and before the context where there are such, one blank line apart. The
    answers are `chosen` and `rejected`, or `first` and `second` with `better`, which names one of them: by its column,
    or by the end in which the two names differ, as 0 of response_0 and 2 of output_2. A `better` that is null, empty,
    "tie", -1 or another 0 is a tie.

    Messages are objects {"role", "content"} or {"from", "value"} of system, user (human) and assistant (gpt). Answers
    are whole dialogues, or what follows on `prompt` (messages or text): messages, a single one, or a text. The two
    dialogues must be the same up to the last message, which is the answer. x is written as in HH-RLHF: first human
    turn, then "Assistant: .." and "Human: .." in turn; a system text stands before the first human turn, one blank line
    apart, as the template has no place of its own for it. Turns have no outer whitespace.

    Args:
      row: fields.
      where: the row stands.
      names: key of COLUMNS -> the name of the column; what is not in it is looked up in COLUMNS.
      answers: False: where there are none, x alone will do; both answers are then empty.

    Returns:
      The row, or the cause why it is dropped.

    Raises:
      DataError: where a column is not there, or holds something else.
    """
    names = names or {}
    both = _answers(row, where, names)
    if both == (TIE,):
        return TIE
    prompt_name = _column(row, "prompt", names, where)
    prompt = row.get(prompt_name) if prompt_name else None
    system = _text(row, _column(row, "system", names, where), where)
    if not both:
        if answers:
            raise DataError(f"{where}: {NO_PAIR}; the row has {sorted(row)}")
        prompt = row.get(_column(row, "messages", names, where)) if prompt is None else prompt
        if isinstance(prompt, list | dict):
            turns = _turns(prompt, where, "prompt", system) or []
            x = _dialogue(turns[:-1] if turns and turns[-1][0] == "assistant" else turns)
            return PreferenceExample(x, "", "") if x else NOT_A_DIALOGUE
        x = _plain(row, prompt_name, system, names, where)
        return PreferenceExample(x, "", "") if x.strip() else EMPTY_PROMPT
    if not any(isinstance(value, list | dict) for value in (prompt, *(row[name] for name in both))):
        chosen, rejected = (_text(row, name, where) for name in both)
        reflection = _text(row, _column(row, "reflection", names, where), where)
        return pair(_plain(row, prompt_name, system, names, where), chosen, rejected, reflection)

    dialogues = []
    for name in both:
        turns = _turns(row[name], where, name, "")
        if turns and turns[0][0] == "assistant":
            before = _turns(prompt, where, "prompt", system)
            turns = before and [*before, *turns]
        elif turns and isinstance(prompt, list) and turns[: len(prompt)] != _turns(prompt, where, "prompt", ""):
            return PROMPTS_DIFFER
        elif turns and system.strip() and turns[0][0] != "system":
            turns = [("system", system.strip()), *turns]
        x = _dialogue(turns[:-1]) if turns and turns[-1][0] == "assistant" else ""
        if not x:
            return NOT_A_DIALOGUE
        dialogues.append((x, turns[-1][1]))
    (x, chosen), (other, rejected) = dialogues
    return pair(x, chosen, rejected) if x == other else PROMPTS_DIFFER


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


def _answers(row: Fields, where: str, names: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the columns of (y_w, y_l); (TIE,); nothing where the row has no pair."""
    for role in names:
        _column(row, role, names, where)
    found = _pair_names(row, names)
    if len(found) < 3:
        return found
    first, second, better = found
    verdict = row[better]
    if isinstance(verdict, float) and verdict.is_integer():  # a column of integers with gaps
        verdict = int(verdict)
    said = "" if verdict is None else str(verdict).strip().lower()
    same = len(os.path.commonprefix([first, second]))
    for i, name in enumerate((first, second)):
        if said and said in (name.lower(), name[same:].lower()):
            return (first, second) if i == 0 else (second, first)
    if said in _TIES:
        return (TIE,)
    raise DataError(
        f"{where}: column {better!r} is {verdict!r}, which is neither {first!r} nor {second!r}, nor the end of one "
        f"({first[same:]}, {second[same:]}), nor a tie"
    )


def _string(value: Any, where: str, field: str) -> str:
    return string_field({field: value}, field, where)


def _text(row: Fields, name: str, where: str) -> str:
    return _string(row[name], where, name) if name and row[name] is not None else ""


def _plain(row: Fields, prompt_name: str, system: str, names: Mapping[str, str], where: str) -> str:
    prompt = _text(row, prompt_name, where)
    has_context = "context" in names or prompt_name == "instruction"
    context = _text(row, _column(row, "context", names, where), where) if has_context else ""
    if not prompt.strip() or not (system.strip() or context.strip()):
        return prompt
    return "\n\n".join(filter(None, (system.strip(), prompt.strip(), context.strip())))


Turns = list[tuple[str, str]]


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
    later = "".join(f"{names[i % 2]}{text}\n\n" for i, (_, text) in enumerate(rest[1:], 1))
    return (f"{system}\n\n" if system else "") + f"{rest[0][1]}\n\n" + later
