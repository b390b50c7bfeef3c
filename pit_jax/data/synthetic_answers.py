"""How the answers of the synthetic task are made: drafts, their rendering, and the faults that are put into them.

An answer is first a draft (chunks of words, with marks, case and layout beside them) and then rendered to text. A base
draft meets everything that is asked by construction; a fault makes a draft miss one kind of requirement. Faults may
miss or do more than asked: what counts is what the verifier reads in the rendered text.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from pit_jax.data import synthetic_text as text_of

_BANK = frozenset(text_of.BANK)
_MARKS = dict(
    html_bold=("<b>", "</b>"), html_italic=("<i>", "</i>"), markdown_bold=("**", "**"), parentheses=("(", ")")
)
_FRAMES = dict(html_paragraph=("<p>", "</p>"), quotes=('"', '"'), json=('{"KEY": "', '"}'), markdown_heading=("# ", ""))
_DISTRACTORS = 0.3  # share of drafts with a bank word that nobody asked for
_UNASKED = 0.06  # share of drafts with a form or a bank word that nobody asked for


def pick(rng, sequence):
    """One element, each equally likely."""
    # Generator.choice and .integers cost ten times as much per call, and a row needs about a hundred draws.
    return sequence[int(rng.random() * len(sequence))]


def integer(rng, low: int, high: int) -> int:
    """Uniform in low .. high, both included."""
    return low + int(rng.random() * (high - low + 1))


def fresh_word(rng, used: set[str]) -> str:
    """A bank word that no requirement of the row names."""
    while (word := pick(rng, text_of.BANK)) in used:
        pass
    return word


# Drafts ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Chunk:
    """Words that stay together."""

    words: list[str]
    role: str = "text"  # text, topic, word (holds a bank word), tail (may go)
    opening: str = ""  # mark around the chunk
    closing: str = ""
    comma: bool = False
    case: str = ""  # of the first word, where it differs from the draft's


@dataclasses.dataclass(slots=True)
class Draft:
    """An answer before it is rendered.

    It stays words and marks until the end, so that a fault can change one thing and leave the others as they were.
    """

    parts: list[list[Chunk]]  # sentences, or items of a list
    ends: list[str]  # the mark that closes each part
    case: str = "sentence"  # sentence, upper, lower
    markers: list[str] | None = None  # of list items
    hashtags: list[str] = dataclasses.field(default_factory=list)
    head: str = ""  # around the whole answer
    foot: str = ""
    postscript: str = ""

    def copy(self) -> "Draft":
        parts = [
            [Chunk(list(c.words), c.role, c.opening, c.closing, c.comma, c.case) for c in part] for part in self.parts
        ]
        markers = None if self.markers is None else list(self.markers)
        return Draft(
            *(parts, list(self.ends), self.case, markers, list(self.hashtags), self.head, self.foot, self.postscript)
        )

    def chunks(self, *roles: str) -> list[Chunk]:
        return [c for part in self.parts for c in part if not roles or c.role in roles]

    def num_words(self) -> int:
        return sum(len(c.words) for part in self.parts for c in part)


def _cased(text: str, case: str) -> str:
    if case == "upper":
        return text.upper()
    if case == "title":
        return text[:1].upper() + text[1:]
    return text


def render(draft: Draft) -> str:
    """The text of a draft."""
    lines = []
    for i, (part, end) in enumerate(zip(draft.parts, draft.ends, strict=True)):
        runs = []
        for j, chunk in enumerate(part):
            words = [_cased(w, draft.case) for w in chunk.words]
            # A part after an unclosed one goes on with the same sentence. A bank word stays as the prompt writes it.
            opens = j == 0 and chunk.role != "word" and (i == 0 or draft.markers or draft.ends[i - 1])
            if draft.case == "sentence" and opens:
                words[0] = _cased(words[0], "title")
            if chunk.case:
                words[0] = _cased(chunk.words[0], chunk.case)
            runs.append(f"{chunk.opening}{' '.join(words)}{chunk.closing}{',' if chunk.comma else ''}")
        lines.append((draft.markers[i] if draft.markers else "") + " ".join(runs) + end)
    body = ("\n" if draft.markers else " ").join(lines)
    if draft.hashtags:
        body += " " + " ".join(_cased(tag, draft.case) for tag in draft.hashtags)
    if draft.postscript:
        body += _cased(draft.postscript.lower() if draft.case == "lower" else draft.postscript, draft.case)
    return draft.head + body + draft.foot


def _tail(rng, length: int) -> Chunk:
    return Chunk(pick(rng, text_of.TAILS[length]).split(), "tail")


def _word_tail(rng, word: str) -> Chunk:
    return Chunk(pick(rng, text_of.WORD_TAILS).format(w=word).split(), "word")


def _core(sentence: str, topic: str) -> list[Chunk]:
    before, _, after = sentence.partition("{t}")
    chunks = [Chunk(before.split()), Chunk(topic.split(), "topic"), Chunk(after.split())]
    return [c for c in chunks if c.words]


def _further(rng, is_list: bool) -> list[Chunk]:
    """A sentence or an item without the topic."""
    return [Chunk(pick(rng, text_of.ITEMS if is_list else text_of.SENTENCES).split())]


def _insert(rng, draft: Draft, chunk: Chunk, keep_last: bool) -> None:
    """Puts a chunk at the end of some part, before the draft's last chunk where that has to stay last."""
    i = integer(rng, 0, len(draft.parts) - 1)
    part = draft.parts[i]
    part.insert(len(part) - 1 if keep_last and i == len(draft.parts) - 1 else len(part), chunk)


def _markers(kind: str, count: int) -> list[str]:
    return ["- "] * count if kind == "bullets" else [f"{i}. " for i in range(1, count + 1)]


def _mark(rng, draft: Draft, opening: str, closing: str, roles=("topic", "word", "tail")) -> bool:
    """Encloses a chunk that has no mark yet; false where there is none."""
    free = [c for c in draft.chunks(*roles) if not c.opening and not c.words[-1].endswith(":")]
    if not free:
        return False
    chunk = pick(rng, free)
    chunk.opening, chunk.closing = opening, closing
    return True


def compose(rng, task: str, topic: str, needs: dict[str, str], used: set[str]) -> Draft | None:
    """A draft that meets everything that is asked.

    Args:
      rng: source of chance.
      task: a key of TASKS.
      topic: what the answer is about.
      needs: kind -> value.
      used: bank words that `needs` names; they get into the draft only where they are asked for.

    Returns:
      The draft, or None where the words that it must have did not fit the count or left nothing to mark.
    """
    list_kind = next((k for k in ("bullets", "numbered") if k in needs), None)
    limit = int(needs.get("exactly_words", needs.get("at_most_words", 99)))
    if list_kind or "sentences" in needs:
        num_parts = int(needs.get(list_kind or "sentences"))
    else:
        num_parts = 2 if rng.random() < 0.2 and limit > 10 else 1
    is_list = list_kind is not None
    topic_part = 0 if rng.random() < 0.7 else integer(rng, 0, num_parts - 1)
    cores = text_of.ITEM_CORES if is_list else text_of.TASKS[task][1]
    parts: list[list[Chunk]] = []
    while len(parts) < num_parts:
        part = _core(pick(rng, cores), topic) if len(parts) == topic_part else _further(rng, is_list)
        if part not in parts:
            parts.append(part)
    draft = Draft(parts, [""] * num_parts)

    # 1. Words that are asked for, and one from the same bank that is not.
    ends_with = needs.get("ends_with")
    starts_with = needs.get("starts_with") or (
        fresh_word(rng, used) if rng.random() < 0.05 and "json" not in needs else None
    )
    if "contains" in needs:
        _insert(rng, draft, _word_tail(rng, needs["contains"]), False)
    if rng.random() < _DISTRACTORS:
        _insert(rng, draft, _word_tail(rng, fresh_word(rng, used)), False)
    if starts_with:
        parts[0][:0] = [Chunk([starts_with], "word"), Chunk(pick(rng, text_of.STARTERS).split())]
    if ends_with:
        parts[-1].append(_word_tail(rng, ends_with))
    if "parentheses" in needs and not any(p[-1].role == "word" and len(p[-1].words) > 1 for p in parts):
        _insert(rng, draft, _tail(rng, 2), bool(ends_with))

    # 2. The word count.
    count = draft.num_words()
    if count > limit:
        return None
    if "exactly_words" in needs:
        target = limit
    elif "at_most_words" in needs:
        target = limit - integer(rng, 0, 2)
    else:
        target = 0 if list_kind else integer(rng, 3, 8)
    while count < target:
        tail = _tail(rng, min(target - count, integer(rng, 1, 3)))
        if all(tail.words != c.words for c in draft.chunks("tail")) or rng.random() < 0.1:  # seldom the same twice
            _insert(rng, draft, tail, bool(ends_with))
            count += len(tail.words)

    # 3. Punctuation.
    for i in range(num_parts - 1):
        draft.ends[i] = "" if is_list else "!" if rng.random() < 0.2 else "."
    if "exclamation" in needs or "question" in needs:
        draft.ends[-1] = "!" if "exclamation" in needs else "?"
    elif is_list and rng.random() < 0.8:
        draft.ends[-1] = ""
    else:
        draft.ends[-1] = pick(rng, "....!!?") if rng.random() < 0.9 else ""
    if "no_commas" not in needs and rng.random() < 0.35:
        part = pick(rng, parts)
        inner = [c for c in part[:-1] if c.role in ("word", "tail") and c is not part[0]]
        if inner:
            pick(rng, inner).comma = True

    # 4. Marks, case, hashtags and what stands around the whole.
    for kind, (opening, closing) in _MARKS.items():
        roles = ("word", "tail") if kind == "parentheses" else ("topic", "word", "tail")
        if kind in needs and not _mark(rng, draft, opening, closing, roles):
            return None
    draft.case = next((k[:5] for k in ("upper_case", "lower_case") if k in needs), "sentence")
    if "hashtag" in needs:
        draft.hashtags = ["#" + needs["hashtag"]]
        if rng.random() < 0.05:
            draft.hashtags.insert(integer(rng, 0, 1), "#" + fresh_word(rng, used))
    elif "hashtags" in needs:
        draft.hashtags = _distinct_tags(rng, int(needs["hashtags"]), used)
    if list_kind:
        draft.markers = _markers(list_kind, num_parts)
    for kind, (head, foot) in _FRAMES.items():
        if kind in needs:
            draft.head, draft.foot = head.replace("KEY", needs.get("json", "")), foot
    if "postscript" in needs:
        draft.postscript = f"\nP.S. {_cased(pick(rng, text_of.SENTENCES), 'title')}."
    if rng.random() < _UNASKED:
        add_unasked(rng, draft, needs, used)
    return draft


def _distinct_tags(rng, count: int, used: set[str]) -> list[str]:
    tags: list[str] = []
    while len(tags) < count:
        tag = "#" + fresh_word(rng, used)
        if tag not in tags:
            tags.append(tag)
    return tags


def add_unasked(rng, draft: Draft, needs: dict[str, str], used: set[str]) -> None:
    """Adds a form or a word that nobody asked for and that breaks nothing."""
    kind = pick(rng, ("hashtag", "hashtag", "swap", "swap", "swap", "swap", "word", "mark", "frame", "upper", "end"))
    closed = {"exclamation", "question", "ends_with", "hashtag", "hashtags", "postscript"} & needs.keys()
    if kind == "hashtag" and not closed:
        draft.hashtags = _distinct_tags(rng, integer(rng, 1, 2), used)
    elif kind == "swap":
        _swap_in(rng, draft, fresh_word(rng, used))
    elif kind == "word" and not {"exactly_words", "at_most_words"} & needs.keys():
        _insert(rng, draft, _word_tail(rng, fresh_word(rng, used)), "ends_with" in needs)
    elif kind == "mark" and not needs.keys() & _MARKS.keys() and "json" not in needs:
        _mark(rng, draft, *pick(rng, tuple(_MARKS.values())))
    elif kind == "frame" and not draft.head and not draft.markers and "postscript" not in needs:
        draft.head, draft.foot = pick(rng, (('"', '"'), ('"', '"'), ("<p>", "</p>")))
    elif kind == "upper" and not {"upper_case", "lower_case", "json"} & needs.keys():
        draft.case = "upper"
    elif kind == "end" and not closed and not draft.markers:
        draft.ends[-1] = pick(rng, "!!?")


def _swap_in(rng, draft: Draft, word: str) -> bool:
    """Puts an ending with `word` in the place of one of the same length without a bank word; false where none is."""
    tails = [c for c in draft.chunks("tail") if len(c.words) in (2, 3)]
    if not tails:
        return False
    chunk = pick(rng, tails)
    endings = [t for t in text_of.WORD_TAILS if len(t.split()) == len(chunk.words)]
    chunk.words, chunk.role = pick(rng, endings).format(w=word).split(), "word"
    return True


# Faults ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Asked:
    """What a prompt asks for, as faults need it."""

    rng: np.random.Generator
    needs: dict[str, str]  # kind -> value
    used: set[str]  # bank words that the requirements name

    @property
    def keep_last(self) -> bool:
        return "ends_with" in self.needs


def _replace_word(draft, asked, word):
    """Another word of the bank in the place of `word`."""
    for chunk in draft.chunks("word"):
        chunk.words = [fresh_word(asked.rng, asked.used) if w == word else w for w in chunk.words]


def _neutral(draft, asked, word):
    """Words without a bank word in the place of those that hold `word`."""
    for chunk in draft.chunks("word"):
        if word in chunk.words:
            chunk.words, chunk.role = pick(asked.rng, text_of.TAILS[min(len(chunk.words), 3)]).split(), "tail"


def _fail_contains(draft, asked, value):
    how = asked.rng.random()
    if how < 0.75:
        return _replace_word(draft, asked, value)
    if how < 0.95:
        return _neutral(draft, asked, value)
    for part in draft.parts:
        part[:] = [c for c in part if value not in c.words] or part


def _fail_starts_with(draft, asked, value):
    how, first = asked.rng.random(), draft.parts[0]
    if how < 0.75:
        _replace_word(draft, asked, value)
    elif how < 0.87:
        first.insert(0, Chunk([pick(asked.rng, ("our", "the", "some", "more"))]))
    else:
        del first[:2]


def _fail_ends_with(draft, asked, value):
    how = asked.rng.random()
    if how < 0.7:
        _replace_word(draft, asked, value)
    elif how < 0.85 and "exactly_words" not in asked.needs:
        draft.parts[-1].append(_tail(asked.rng, integer(asked.rng, 1, 2)))
    else:
        _neutral(draft, asked, value)


def _fail_topic(draft, asked, value):
    how, words = asked.rng.random(), value.split()
    if len(words) == 2 and how < 0.4:
        words = [pick(asked.rng, words)]
    elif how < 0.95:
        words = pick(asked.rng, text_of.TOPICS).split()
    else:
        words = [pick(asked.rng, ("it", "this", "fun", "all"))]
    for chunk in draft.chunks("topic"):
        chunk.words = list(words)


def _fail_avoids(draft, asked, value):
    strangers = [c for c in draft.chunks("word") if not asked.used & set(c.words)]
    if strangers and asked.rng.random() < 0.5:
        chunk = pick(asked.rng, strangers)
        chunk.words = [value if w in _BANK else w for w in chunk.words]
    elif not _swap_in(asked.rng, draft, value):
        _insert(asked.rng, draft, _word_tail(asked.rng, value), asked.keep_last)


def _fail_hashtag(draft, asked, value):
    how = asked.rng.random()
    i = draft.hashtags.index("#" + value)
    if how < 0.65:
        draft.hashtags[i] = "#" + fresh_word(asked.rng, asked.used)
    elif how < 0.8:
        del draft.hashtags[i]
    elif how < 0.9:
        draft.hashtags[i] = value
    else:
        draft.hashtags[i] = "# " + value


def _fail_hashtags(draft, asked, value):
    off = pick(asked.rng, (-2, -1, -1, 1, 1, 2))
    draft.hashtags = _distinct_tags(asked.rng, max(int(value) + off, 1), asked.used)


def _resize(draft, asked, off):
    """Makes a draft longer or shorter by `off` words, at its tails."""
    if off > 0:
        return _insert(asked.rng, draft, _tail(asked.rng, min(off, 3)), asked.keep_last)
    tails = [(p, c) for p in draft.parts for c in p if c.role == "tail" and not c.opening and len(c.words) >= -off]
    if tails:
        part, chunk = pick(asked.rng, tails)
        if len(chunk.words) > -off:
            chunk.words = pick(asked.rng, text_of.TAILS[len(chunk.words) + off]).split()
        elif len(part) > 1:
            part[:] = [c for c in part if c is not chunk]


def _fail_exactly_words(draft, asked, value):
    _resize(draft, asked, pick(asked.rng, (-2, -1, -1, 1, 1, 2)))


def _fail_at_most_words(draft, asked, value):
    while draft.num_words() <= int(value):
        off = int(value) - draft.num_words() + integer(asked.rng, 1, 2)
        _resize(draft, asked, min(off, 3))


def _change_parts(draft, asked, is_list):
    """One part more or one less; parts that hold something asked for stay."""
    first, last = (
        "starts_with" in asked.needs,
        asked.keep_last or bool({"exclamation", "question"} & asked.needs.keys()),
    )
    bare = [i for i, p in enumerate(draft.parts) if not any(c.role in ("topic", "word") or c.opening for c in p)]
    bare = [i for i in bare if not (last and i == len(draft.parts) - 1)]
    if bare and asked.rng.random() < 0.6:
        i = pick(asked.rng, bare)
        del draft.parts[i], draft.ends[i]
        return
    i = integer(asked.rng, int(first), len(draft.parts) - int(last))
    draft.parts.insert(i, _further(asked.rng, is_list))
    draft.ends.insert(i, "" if is_list else ".")
    if not is_list and i == len(draft.parts) - 1 and not draft.ends[i - 1]:
        draft.ends[i - 1] = "."


def _fail_sentences(draft, asked, value):
    if asked.rng.random() < 0.3:  # two sentences run into one
        i = integer(asked.rng, 0, len(draft.parts) - 2)
        draft.parts[i : i + 2] = [[*draft.parts[i], Chunk(["and"]), *draft.parts[i + 1]]]
        del draft.ends[i]
    else:
        _change_parts(draft, asked, False)


def _fail_bullets(draft, asked, value):
    how = asked.rng.random()
    if how < 0.65:
        _change_parts(draft, asked, True)
        draft.markers = _markers("bullets", len(draft.parts))
    elif how < 0.8:
        draft.markers[integer(asked.rng, 0, len(draft.parts) - 1)] = pick(asked.rng, ("* ", "-", ""))
    elif how < 0.9:
        draft.markers = ["* "] * len(draft.parts)
    else:
        draft.markers = _markers("numbered", len(draft.parts))


def _fail_numbered(draft, asked, value):
    how = asked.rng.random()
    if how < 0.65:
        _change_parts(draft, asked, True)
        draft.markers = _markers("numbered", len(draft.parts))
    elif how < 0.9:
        i = integer(asked.rng, 0, len(draft.parts) - 1)
        draft.markers[i] = pick(asked.rng, (f"{i + 2}. ", f"{i + 1} ", "- ", f"{max(i, 1)}. "))
    else:
        draft.markers = _markers("bullets", len(draft.parts))


def _fail_case(draft, asked, right, wrong):
    how = asked.rng.random()
    if how < 0.6:  # a word or two slip
        for _ in range(integer(asked.rng, 1, 2)):
            pick(asked.rng, draft.chunks()).case = "title" if right == "lower" or asked.rng.random() < 0.4 else "lower"
    else:
        draft.case = "sentence" if how < 0.8 else wrong


def _fail_upper_case(draft, asked, value):
    _fail_case(draft, asked, "upper", "lower")


def _fail_lower_case(draft, asked, value):
    _fail_case(draft, asked, "lower", "upper")


def _fail_mark(kind, *wrong):
    """A fault that puts one of `wrong` (opening, closing) in the place of a mark."""

    def fail(draft, asked, value):
        marked = [c for c in draft.chunks() if (c.opening, c.closing) == _MARKS[kind]]
        if marked:
            marked[0].opening, marked[0].closing = pick(asked.rng, wrong)

    return fail


def _fail_frame(*wrong):
    """A fault that puts one of `wrong` (head, foot) around the answer; KEY is another JSON key."""

    def fail(draft, asked, value):
        head, draft.foot = pick(asked.rng, wrong)
        draft.head = head.replace("KEY", pick(asked.rng, [k for k in text_of.JSON_KEYS if k != value]))
        draft.head = draft.head.replace("VALUE", value)

    return fail


def _fail_last_mark(*wrong):
    def fail(draft, asked, value):
        draft.ends[-1] = pick(asked.rng, wrong)

    return fail


def _fail_postscript(draft, asked, value):
    body = draft.postscript.removeprefix("\nP.S. ")
    draft.postscript = pick(
        asked.rng, ("", f" P.S. {body}", f"\nPS {body}", f"\nP.S {body}", f"\n{body}", f"\nP.P. {body}")
    )


def _fail_no_commas(draft, asked, value):
    inner = [c for part in draft.parts for c in part[:-1] if not c.words[-1].endswith(":")]
    if inner:
        pick(asked.rng, inner).comma = True


FAULTS: dict[str, Callable[[Draft, Asked, str], None]] = {
    "topic": _fail_topic,
    "contains": _fail_contains,
    "avoids": _fail_avoids,
    "starts_with": _fail_starts_with,
    "ends_with": _fail_ends_with,
    "hashtag": _fail_hashtag,
    "hashtags": _fail_hashtags,
    "upper_case": _fail_upper_case,
    "lower_case": _fail_lower_case,
    "html_bold": _fail_mark(
        "html_bold", ("<b>", ""), ("<b>", "</i>"), ("<b>", "<b>"), ("", "</b>"), ("**", "**"), ("", "")
    ),
    "html_italic": _fail_mark(
        "html_italic", ("<i>", ""), ("<i>", "</b>"), ("<i>", "<i>"), ("", "</i>"), ("*", "*"), ("", "")
    ),
    "markdown_bold": _fail_mark(
        "markdown_bold", ("**", ""), ("", "**"), ("*", "*"), ("**", "*"), ("<b>", "</b>"), ("", "")
    ),
    "parentheses": _fail_mark("parentheses", ("(", ""), ("", ")"), ("[", "]"), ("(", "]"), ("", "")),
    "html_paragraph": _fail_frame(
        ("<p>", ""), ("", "</p>"), ("<p>", "<p>"), ("<p>", "</b>"), ("<b>", "</b>"), ("", "")
    ),
    "markdown_heading": _fail_frame(("#", ""), ("## ", ""), ("** ", ""), ("- ", ""), ("", "")),
    "quotes": _fail_frame(('"', ""), ("", '"'), ("'", "'"), ("(", ")"), ("", "")),
    "json": _fail_frame(
        *(('{"VALUE": "', '"'), ('{"VALUE": "', "}"), ('"VALUE": "', '"}'), ('{"KEY": "', '"}'), ('{"KEY": "', '"}')),
        *(('{"VALUE" "', '"}'), ("", "")),
    ),
    "exclamation": _fail_last_mark(".", "?", ""),
    "question": _fail_last_mark(".", "!", ""),
    "postscript": _fail_postscript,
    "no_commas": _fail_no_commas,
    "exactly_words": _fail_exactly_words,
    "at_most_words": _fail_at_most_words,
    "sentences": _fail_sentences,
    "bullets": _fail_bullets,
    "numbered": _fail_numbered,
}
"""kind -> fault(draft, what is asked, value of the kind). Several faults go into one draft in this order."""
FAULT_ORDER = {kind: i for i, kind in enumerate(FAULTS)}
