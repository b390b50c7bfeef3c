"""Preference rows (x, y_l, y_w, c) written by a language model: the synthetic data of PIT appendix D, step by step.

0. Lists of tasks and requirements, made by hand: `prompts/tasks.txt`, `prompts/requirements.txt`.
1. A task and several requirements are drawn; the model writes a question x0 and its answer y_l ("question").
2. A few more requirements are drawn; the model adds them to x0, which makes x, and writes y_w for it ("extend").
3. Filter 1: the model itself says which requirements y_w and y_l meet. A row is kept where y_w meets all and y_l does
   not ("verify chosen", "verify rejected").
4. The model writes c, a chain of thoughts on how y_l becomes y_w ("reflect").
5. Filter 2: a classifier trained on rows that people have labelled (`pit_jax.data.quality`; only with config.labels).

The paper gives neither its prompts nor its lists, nor numbers beside the 13K rows at the end. Ours differs where that
costs nothing or the paper is silent: step 4 comes after filter 1, so that no reflection is paid for a row that is then
dropped; filter 1 asks for each requirement on its own; a subject and a number are named with the task, as a model that
is asked the same thing twice says the same; prompts that say the same are dropped; the classifier is a logistic
regression over words. y_w need not be the better text: as in the paper, only instructions count.

A folder of rows:

rows.jsonl      {"prompt", "chosen", "rejected", "reflection"}, as `pit_jax.data.sources` reads them
records.jsonl   all rows that were begun, also those that were dropped, with all that was asked and said
calls/          every reply of the server as soon as it came: a killed run pays for none of them again
to_label.jsonl  rows to be labelled for the classifier; written once, when there are rows and no labels
quality.jsonl   what the classifier says of each row that came to it
summary.json    counts by cause, tokens, cost, settings

The files in `prompts` beside this module are in our own words; config.prompts replaces some or all of them.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pit_jax import client
from pit_jax.config import SynthesisConfig
from pit_jax.data import quality
from pit_jax.data.feedback import fill_quoted
from pit_jax.files import Journal, write_json_atomic, write_text_atomic

FIELDS = {
    "question": ({"task", "requirements"}, {"subject", "number"}),
    "extend": ({"question", "rejected", "requirements"}, set()),
    "extend_unseen": ({"question", "requirements"}, set()),
    "verify": ({"question", "response", "requirements"}, set()),
    "reflect": ({"question", "rejected", "chosen"}, set()),
}
"""Template -> (fields that it must have, fields that it may have)."""
LISTS = ("tasks", "subjects", "requirements")

CHUNK = 256
"""Rows that are under way together, at most, and rows whose calls share a file."""
OUTAGE = 32
"""So many requests in a row without a reply, after all retries: then the server is gone, and the run stops."""
PATIENCE = 200
"""So many candidates in a row of which none became a row: then the model cannot do it, and the run stops."""
PAUSES = (5.0, 30.0)
"""Seconds before a refusal of the server is believed that looks final (status 401, 404, no connection)."""
NUM_TO_LABEL = 200

DUPLICATE = "duplicate prompt"
UNCHANGED = "prompt unchanged"
SAME_ANSWERS = "same answers"
CHOSEN_FAILS = "better answer fails a requirement"
REJECTED_MEETS = "worse answer meets everything"
LOW_QUALITY = "classifier"
NOT_NEEDED = "beyond num_rows"

Record = dict[str, Any]


class Unusable(ValueError):
    """A reply that has not what was asked for."""


# -------------------------------------------------------------------------------------------------------------- prompts


class Prompts(NamedTuple):
    """What the model is asked with.

    Attributes:
      templates: name -> text, of FIELDS.
      tasks: lines of tasks.txt.
      subjects: lines of subjects.txt.
      requirements: groups of requirements; a question takes at most one of each.
    """

    templates: dict[str, str]
    tasks: list[str]
    subjects: list[str]
    requirements: list[list[str]]


def load_prompts(folder: str = "") -> Prompts:
    """The files of `prompts`, of which those in a folder replace the package's.

    Raises:
      ValueError: where a file cannot be read, has an unknown name, lacks a field, names an unknown one, or is empty.
    """
    names = (*FIELDS, *LISTS)
    if folder:
        found = sorted(path.stem for path in Path(folder).glob("*.txt"))
        unknown = [name for name in found if name not in names]
        if not found or unknown:
            raise ValueError(
                f"--config.prompts={folder} has {', '.join(f'{x}.txt' for x in unknown) or 'no .txt file'}, but the "
                f"files that it may replace are {', '.join(f'{name}.txt' for name in names)}"
            )
    own = Path(__file__).parent / "prompts"
    paths = {name: (Path(folder) if folder and name in found else own) / f"{name}.txt" for name in names}
    texts = {}
    for name, path in paths.items():
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read (--config.prompts): {error}") from error
    for name, (needed, allowed) in FIELDS.items():
        fields = set(re.findall(r"\{([a-z_]+)\}", texts[name]))
        if not needed <= fields <= needed | allowed:
            more = f", and may have {sorted(allowed)}" if allowed else ""
            raise ValueError(f"{paths[name]} has the fields {sorted(fields)}, but needs {sorted(needed)}{more}")
    lines = {}
    for name in LISTS:
        stripped = [line.strip() for line in texts[name].splitlines()]
        lines[name] = [line for line in stripped if line and not line.startswith("#")]
        if not lines[name]:
            raise ValueError(f"{paths[name]} has no lines")
    groups: dict[str, list[str]] = {}
    for line in lines["requirements"]:
        match = re.fullmatch(r"\[([^\[\]]+)\]\s*(.+)", line)
        groups.setdefault(match[1] if match else line, []).append(match[2] if match else line)
    return Prompts({name: texts[name] for name in FIELDS}, lines["tasks"], lines["subjects"], list(groups.values()))


def draw(config: SynthesisConfig, prompts: Prompts, number: int) -> Record:
    """Task, subject and requirements of a candidate; they depend on the seed and its number alone."""
    rng = np.random.default_rng([config.seed, number])
    pick = lambda values: values[int(rng.integers(len(values)))]  # noqa: E731
    task, subject = pick(prompts.tasks), pick(prompts.subjects)
    first = int(rng.integers(config.min_requirements, config.max_requirements + 1))
    added = int(rng.integers(config.min_added, config.max_added + 1))
    groups = rng.permutation(len(prompts.requirements))[: first + added]
    drawn = [pick(prompts.requirements[group]) for group in groups]
    return {
        "candidate": number,
        "task": task,
        "subject": subject,
        "requirements": drawn[:first],
        "added": drawn[first:],
        "dropped": "",
        "replies": [],
    }


# -------------------------------------------------------------------------------------------------------------- replies


def without_thoughts(reply: str) -> str:
    """What comes after <think> ... </think>."""
    _, end, after = reply.rpartition("</think>")
    if not end and reply.lstrip().startswith("<think>"):
        raise Unusable("thoughts alone")
    return after


def question_and_answer(reply: str) -> tuple[str, str]:
    """The texts below the headings "Question" and "Answer", also "### New Question", "**Answer:**" and the like.

    The answer is all behind its heading, whatever it says, but for the end of a code block that holds both. A heading
    with hashes wins over others, as a question may have a line such as "Answer: yes".

    Raises:
      Unusable: where a heading or the text below it is missing.
    """
    lines = without_thoughts(reply).split("\n")
    mark, space = r"[*_]{0,3}+", r"[ \t]*+"

    def find(name: str, start: int) -> tuple[int, str]:
        """(line of a heading, text behind it in the same line)."""
        heading = re.compile(
            rf"{space}(#{{1,6}}+)?{space}{mark}(?:new )?{name}{mark}{space}(?::{mark}{space}(.*))?\s*", re.IGNORECASE
        )
        found = [(i, m) for i, line in enumerate(lines) if i >= start and (m := heading.fullmatch(line))]
        if not found:
            raise Unusable(f"no heading of the {name}")
        i, match = next(((i, m) for i, m in found if m[1]), found[0])
        return i, match[2] or ""

    i, first = find("question", 0)
    j, second = find("answer", i + 1)
    fences = lambda part: sum(line.lstrip().startswith("```") for line in part)  # noqa: E731
    last = max(k for k, line in enumerate(lines) if line.strip())
    if fences(lines[:i]) % 2 and fences(lines[j + 1 :]) % 2 and lines[last].strip() == "```":
        del lines[last:]
    question, answer = ("\n".join([a, *b]).strip() for a, b in ((first, lines[i + 1 : j]), (second, lines[j + 1 :])))
    for name, text in (("question", question), ("answer", answer)):
        if not text:
            raise Unusable(f"empty {name}")
    return question, answer


# "3 requirements were looked at [[yes]]" and "3/3 [[yes]]" are no verdicts of the third.
_NUMBERED = re.compile(
    r"\W*(?:requirement[ \t]*(\d{1,3})\b|"
    r"(\d{1,3})(?=[.:)\]*_](?!\d)|[ \t]*[-–—|=→][ \t]|[ \t]*[\[\\]|[ \t]+[*_(]*(?:yes|no)\b))(.*)",
    re.IGNORECASE,
)
_MARK = re.compile(r"\\?\[[ \t]*\\?\[[ \t*_`]*(yes|no)[ \t*_`]*\\?\][ \t]*\\?\]", re.IGNORECASE)
_BARE = re.compile(r"\W*(yes|no)\W*", re.IGNORECASE)


def verdicts(reply: str, num_requirements: int) -> list[bool]:
    """Whether each requirement is met, from lines such as "2. It begins with a question. [[yes]]", or "2: yes".

    Number and verdict stand in one line: what an answer is quoted with cannot move a verdict to another requirement.

    Raises:
      Unusable: where a requirement has no verdict, or two that differ.
    """
    found: dict[int, set[str]] = collections.defaultdict(set)
    for line in without_thoughts(reply).splitlines():
        match = _NUMBERED.fullmatch(line)
        if match:
            number, said = int(match[1] or match[2]), match[3]
            bare = _BARE.fullmatch(said)
            found[number] |= {mark.lower() for mark in _MARK.findall(said) or ([bare[1]] if bare else [])}
    said = [found[i] for i in range(1, num_requirements + 1)]
    if not all(said):
        raise Unusable("a verdict is missing")
    if any(len(marks) > 1 for marks in said):
        raise Unusable("verdicts contradict one another")
    return ["yes" in marks for marks in said]


def _cause(error: str) -> str:
    """Why there is no reply, in words that can be counted."""
    status = re.search(r"\bstatus (\d{3})\b", error)
    if status:
        return f"status {status[1]}"
    for words, cause in (
        ("timed out", "timeout"),
        ("cannot be read", "broken JSON"),
        ("no chat completion", "no chat completion"),
        ("not asked", "not asked"),
    ):
        if words in error:
            return cause
    return "no connection"


# ---------------------------------------------------------------------------------------------------------------- steps


class Step(NamedTuple):
    """A call of the model for each candidate.

    Attributes:
      name: in counts.
      ask: record -> what is asked.
      read: record, reply -> fields of the record; raises Unusable.
      drop: record -> why it is dropped, with these fields; empty where it is not.
      greedy: whether the first attempt is made at verify_temperature.
    """

    name: str
    ask: Callable[[Record], str]
    read: Callable[[Record, str], Record]
    drop: Callable[[Record], str] = lambda record: ""
    greedy: bool = False


def plain(text: str) -> str:
    """A text as duplicates are found by: letter case, spaces and marks play no part."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def make_steps(config: SynthesisConfig, prompts: Prompts, seen: set[str]) -> list[Step]:
    """The steps of the module's docstring.

    Args:
      config: of the run.
      prompts: what is asked.
      seen: prompts that there are, as `plain` makes them; it grows.
    """
    templates = prompts.templates
    bullets = lambda lines: "\n".join(f"- {line}" for line in lines)  # noqa: E731
    numbered = lambda lines: "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))  # noqa: E731
    everything = lambda record: [*record["requirements"], *record["added"]]  # noqa: E731

    def is_new(text: str) -> bool:
        number = len(seen)
        seen.add(plain(text))
        return len(seen) > number

    def ask_question(record: Record) -> str:
        return fill_quoted(
            templates["question"],
            task=record["task"],
            subject=record["subject"],
            number=str(record["candidate"] + 1),
            requirements=bullets(record["requirements"]),
        )

    def ask_extend(record: Record) -> str:
        name = "extend" if config.show_rejected else "extend_unseen"
        fields = {"question": record["question"], "requirements": bullets(record["added"])}
        return fill_quoted(templates[name], rejected=record["rejected"], **fields)

    def drop_extended(record: Record) -> str:
        if plain(record["prompt"]) == plain(record["question"]):
            return UNCHANGED
        if record["chosen"] == record["rejected"]:
            return SAME_ANSWERS
        return "" if is_new(record["prompt"]) else DUPLICATE

    def ask_verify(record: Record, which: str) -> str:
        fields = {"question": record["prompt"], "response": record[which]}
        return fill_quoted(templates["verify"], requirements=numbered(everything(record)), **fields)

    def ask_reflect(record: Record) -> str:
        fields = {name: record[name] for name in ("rejected", "chosen")}
        return fill_quoted(templates["reflect"], question=record["prompt"], **fields)

    def read_pair(question: str, answer: str, reply: str) -> Record:
        return dict(zip((question, answer), question_and_answer(reply), strict=True))

    def read_reflection(reply: str) -> Record:
        text = without_thoughts(reply).strip()
        if not text:
            raise Unusable("empty")
        return {"reflection": text}

    def verify(which: str, drop: Callable[[list[bool]], str]) -> Step:
        field = f"{which}_meets"
        return Step(
            f"verify {which}",
            lambda record: ask_verify(record, which),
            lambda record, reply: {field: verdicts(reply, len(everything(record)))},
            lambda record: drop(record[field]),
            greedy=True,
        )

    return [
        Step(
            "question",
            ask_question,
            lambda record, reply: read_pair("question", "rejected", reply),
            lambda record: "" if is_new(record["question"]) else DUPLICATE,
        ),
        Step("extend", ask_extend, lambda record, reply: read_pair("prompt", "chosen", reply), drop_extended),
        verify("chosen", lambda met: "" if all(met) else CHOSEN_FAILS),
        verify("rejected", lambda met: REJECTED_MEETS if all(met) else ""),
        Step("reflect", ask_reflect, lambda record, reply: read_reflection(reply)),
    ]


def seen_prompts(records: Sequence[Record]) -> set[str]:
    """What `make_steps` has seen when it made these records; prompts with equal answers are not looked at there."""
    found = {plain(record["question"]) for record in records if "question" in record}
    return found | {plain(r["prompt"]) for r in records if "prompt" in r and r["dropped"] != SAME_ANSWERS}


def take(server: "Server", step: Step, records: Sequence[Record], description: str) -> list[Record]:
    """Takes a step with each record.

    Returns:
      Those that go on. What is wrong with the others is in `dropped`.
    """
    todo = list(records)
    for attempt in range(server.config.num_attempts):
        # A greedy reply that cannot be used would be the same again.
        greedy = step.greedy and not attempt
        temperature = server.config.verify_temperature if greedy else server.config.temperature
        completions = server.ask(todo, [step.ask(record) for record in todo], attempt, temperature, description)
        for record, said in zip(todo, completions, strict=True):
            problem = _read(step, record, said)
            record["dropped"] = f"{step.name}: {problem}" if problem else ""
            reply = {"step": step.name, "problem": problem} | said._asdict()
            del reply["cached"]
            record["replies"].append(reply)
        todo = [record for record in todo if record["dropped"]]
        if not todo:
            break
    for record in records:
        record["dropped"] = record["dropped"] or step.drop(record)
    return [record for record in records if not record["dropped"]]


def _read(step: Step, record: Record, said: client.Completion) -> str:
    """Takes the fields of a reply over, or says what is wrong with it."""
    if said.text is None:
        return f"no reply ({_cause(said.error)})"
    if said.finish_reason == "length":
        return "cut off at max_tokens"
    if not said.text.strip():
        return "empty reply"
    try:
        record |= step.read(record, said.text)
    except Unusable as error:
        return str(error)
    return ""


# --------------------------------------------------------------------------------------------------------------- server


class Server:
    """The language model; every reply is on disk as soon as it is there.

    Attributes:
      config: of the run.
      calls: folder of the replies.
    """

    def __init__(self, config: SynthesisConfig, calls: Path):
        self.config, self.calls = config, calls
        self._lost = 0

    def settings(self, temperature: float, cache: str) -> client.ClientConfig:
        """How it is asked."""
        c = self.config
        return client.ClientConfig(
            base_url=c.base_url,
            model=c.model,
            temperature=None if temperature < 0 else temperature,
            max_tokens=c.max_tokens or None,
            extra=c.extra,
            max_in_flight=c.max_in_flight,
            num_retries=c.num_retries,
            timeout_s=c.timeout_s,
            cache=cache,
            api_key_env=c.api_key_env,
        )

    def check(self) -> None:
        """Asks for a word, so that a missing key or a wrong address is known before any work.

        Raises:
          ValueError: where it does not answer, with the remedy.
        """
        c = self.config
        for temperature in dict.fromkeys((c.temperature, c.verify_temperature)):
            # A few retries, as a server may be busy; half a minute each, as one that hangs is to be known soon.
            quick = {"num_retries": min(c.num_retries, 4), "timeout_s": min(c.timeout_s, 30.0)}
            settings = dataclasses.replace(self.settings(temperature, ""), **quick)
            chats = [[{"role": "user", "content": "Say yes."}]]
            try:
                (said,), _ = client.complete(settings, chats, description="server", leave=False)
            except client.ApiError as error:
                raise ValueError(
                    f"{error} (--config.base_url, --config.model; temperatures below 0 and max_tokens=0 are not sent)"
                ) from None
            if said.text is None:
                raise ValueError(
                    f"the server {c.base_url} gives no answer ({said.error}): start it, wait, or set --config.base_url"
                )

    def ask(
        self, records: Sequence[Record], texts: Sequence[str], attempt: int, temperature: float, description: str
    ) -> list[client.Completion]:
        """Replies to a text for each record; attempts have files of their own, as they ask for the same.

        Raises:
          ValueError: where the server is gone, or refuses everything.
        """
        group = records[0]["candidate"] // CHUNK
        settings = self.settings(temperature, str(self.calls / f"{group:05d}-{attempt}"))
        completions = self._complete(settings, [[{"role": "user", "content": text}] for text in texts], description)
        for said in completions:
            self._lost = 0 if said.text is not None else self._lost + 1
            if self._lost >= OUTAGE:
                raise ValueError(
                    f"{self._lost} requests in a row got no reply from {self.config.base_url} (the last: {said.error})"
                )
        return completions

    def _complete(self, settings: client.ClientConfig, chats: list, description: str) -> list[client.Completion]:
        for pause in (*PAUSES, None):
            try:
                return client.complete(settings, chats, description=description, leave=False)[0]
            except client.ApiError:
                if pause is not None:
                    time.sleep(pause)
        self.check()
        return self._halves(settings, chats, description)  # it answers others: it refuses some of these and not all

    def _halves(self, settings: client.ClientConfig, chats: list, description: str) -> list[client.Completion]:
        """Finds the requests that are refused, at which the client stops all that is under way."""
        try:
            return client.complete(settings, chats, description=description, leave=False)[0]
        except client.ApiError as error:
            if len(chats) == 1:
                return [client.Completion(None, str(error))]
        half = len(chats) // 2
        return [x for part in (chats[:half], chats[half:]) for x in self._halves(settings, part, description)]

    def spent(self) -> tuple[int, int, int]:
        """Calls, prompt tokens and completion tokens of all replies that are kept."""
        kept = [c for path in sorted(self.calls.glob("*/calls.jsonl")) for c in client.read_cache(path).values()]
        return len(kept), sum(c.prompt_tokens for c in kept), sum(c.completion_tokens for c in kept)


# ------------------------------------------------------------------------------------------------------------------ run


class Kept(NamedTuple):
    """What becomes of the records.

    Attributes:
      rows: records that are rows.
      dropped: cause -> number of the others.
      quality: candidate -> what the classifier says of it, where it was asked.
    """

    rows: list[Record]
    dropped: dict[str, int]
    quality: dict[int, float]


def sift(
    records: Sequence[Record], config: SynthesisConfig, classifier: quality.Classifier | None, known: dict[int, float]
) -> Kept:
    """Rows among records: what no step has dropped, what the classifier lets through, at most num_rows of them.

    Args:
      records: in their order.
      config: of the run.
      classifier: None: there is none.
      known: candidate -> what the classifier has said of it; it grows.
    """
    passed = [record for record in records if not record["dropped"]]
    dropped = collections.Counter(record["dropped"] for record in records if record["dropped"])
    if classifier is not None:
        new = [record for record in passed if record["candidate"] not in known]
        found = quality.probabilities(classifier, [r["prompt"] for r in new], [r["chosen"] for r in new])
        known |= {record["candidate"]: float(p) for record, p in zip(new, found, strict=True)}
        good = [record for record in passed if known[record["candidate"]] >= config.min_quality]
        dropped[LOW_QUALITY] = len(passed) - len(good)
        passed = good
    dropped[NOT_NEEDED] = len(passed[config.num_rows :])
    return Kept(passed[: config.num_rows], {cause: n for cause, n in dropped.most_common() if n}, known)


def header(config: SynthesisConfig, prompts: Prompts) -> dict[str, Any]:
    """What records depend on; number of rows, classifier, address and prices may change on a folder."""
    fields = ("seed", "model", "min_requirements", "max_requirements", "min_added", "max_added", "show_rejected")
    fields += ("temperature", "verify_temperature", "max_tokens", "extra")
    digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]  # noqa: E731
    files = {name: digest(text) for name, text in prompts.templates.items()}
    files |= {name: digest(getattr(prompts, name)) for name in LISTS}
    return {name: getattr(config, name) for name in fields} | {"prompts": files}


def run(config: SynthesisConfig, output: Path) -> dict[str, Any]:
    """Makes rows until there are num_rows of them, and writes the files of the module's docstring.

    Args:
      config: of the run.
      output: folder; a run that was stopped there goes on.

    Returns:
      The summary.

    Raises:
      ValueError: before any work where a file or the server is not as it should be; later where the server is gone
        or no candidate becomes a row. What is finished is then written, and the same call goes on from it.
    """
    if not (config.base_url and config.model):
        raise ValueError("set --config.base_url=http://HOST/v1 and --config.model=NAME: the server and its model")
    prompts = load_prompts(config.prompts)
    most = config.max_requirements + config.max_added
    if most > len(prompts.requirements):
        raise ValueError(
            f"requirements.txt has {len(prompts.requirements)} groups, but a question takes up to {most}: add some, or "
            "lower --config.max_requirements or --config.max_added"
        )
    server = Server(config, output / "calls")
    server.settings(0.0, "")  # raises where a field is not one of a client's
    classifier = None
    if config.labels:
        classifier = quality.train(quality.read_labels(config.labels), config.held_out, config.seed, config.min_quality)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file: name a folder")
    begun = (output / "records.jsonl").exists()
    if not begun:
        server.check()  # before there is a folder
    with _claimed(output):
        remedy = "take the settings that it was begun with, or another --output"
        journal = Journal(output / "records.jsonl", header(config, prompts), remedy)
        paid = server.spent()
        kept = sift(journal.lines, config, classifier, {})
        finished = False
        try:
            _make(config, prompts, server, journal, classifier, kept, checked=not begun)
            finished = True
        finally:
            # What was dropped and why is wanted most where something went wrong.
            summary = _write(config, output, journal, server, classifier, paid, finished)
            if not finished:
                print(f"{describe(summary, output)}\nthe same command goes on from there", file=sys.stderr)
    if not summary["rows"]:
        raise ValueError(f"none of {summary['candidates']} candidates became a row: {_listed(summary['dropped'])}")
    return summary


def _make(
    config: SynthesisConfig,
    prompts: Prompts,
    server: Server,
    journal: Journal,
    classifier: quality.Classifier | None,
    kept: Kept,
    *,
    checked: bool,
) -> None:
    """Adds records until there are enough rows."""
    most = config.max_candidates or 4 * config.num_rows
    steps = make_steps(config, prompts, seen_prompts(journal.lines))
    while len(kept.rows) < config.num_rows and len(journal.lines) < most:
        start = len(journal.lines)
        last = kept.rows[-1]["candidate"] + 1 if kept.rows else 0
        if start - last >= PATIENCE:
            causes = collections.Counter(line["dropped"] or LOW_QUALITY for line in journal.lines[last:])
            cause, n = causes.most_common(1)[0]
            raise ValueError(
                f"none of the last {start - last} candidates became a row ({n} of them: {cause}): read their replies "
                f"in {journal.path}, then take another model or other --config.prompts, and another --output"
            )
        if not checked:
            server.check()
            checked = True
        # A candidate makes one row at most: so many that there are never too many.
        size = min(config.num_rows - len(kept.rows), CHUNK - start % CHUNK, most - start)
        records = [draw(config, prompts, number) for number in range(start, start + size)]
        going = records
        state = f"{len(kept.rows):,} of {config.num_rows:,} rows, {start:,} tried"
        for step in steps:
            going = take(server, step, going, f"{state}; {step.name}") if going else []
        journal.add(*records)
        kept = sift(journal.lines, config, classifier, kept.quality)
        if not sys.stderr.isatty():  # a terminal has the bar
            print(f"{len(kept.rows):,} of {config.num_rows:,} rows, {len(journal.lines):,} tried", file=sys.stderr)


def _write(
    config: SynthesisConfig,
    output: Path,
    journal: Journal,
    server: Server,
    classifier: quality.Classifier | None,
    paid: tuple[int, int, int],
    finished: bool,
) -> dict[str, Any]:
    """Writes rows and summary."""
    kept = sift(journal.lines, config, classifier, {})
    write = lambda name, rows: write_text_atomic(  # noqa: E731
        output / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    rows = [{name: r[name] for name in ("prompt", "chosen", "rejected", "reflection")} for r in kept.rows]
    if rows:
        write("rows.jsonl", rows)
    else:  # of other labels, or another number of rows
        (output / "rows.jsonl").unlink(missing_ok=True)
    if classifier is not None:
        write("quality.jsonl", [{"candidate": i, "quality": p} for i, p in kept.quality.items()])
    elif rows and finished and not (output / "to_label.jsonl").exists():  # somebody may be at work in it
        order = np.random.default_rng(config.seed).permutation(len(rows))[:NUM_TO_LABEL]
        shown = [{"prompt": rows[i]["prompt"], "response": rows[i]["chosen"], "label": None} for i in order]
        write("to_label.jsonl", shown)
    calls, read, written = server.spent()
    replies = [reply for line in journal.lines for reply in line["replies"]]
    problems = collections.Counter(f"{r['step']}: {r['problem']}" for r in replies if r["problem"])
    cost = (read * config.prompt_price + written * config.completion_price) / 1e6
    summary = {
        "finished": finished,
        "rows": len(rows),
        "wanted": config.num_rows,
        "candidates": len(journal.lines),
        "dropped": kept.dropped,
        "unusable_replies": dict(problems.most_common()),
        "calls": calls,
        "calls_now": calls - paid[0],
        "prompt_tokens": read,
        "completion_tokens": written,
        "cost": cost if config.prompt_price or config.completion_price else None,
        "classifier": classifier and {k: v for k, v in classifier._asdict().items() if k != "weights"},
        "config": dataclasses.asdict(config),
    }
    write_json_atomic(output / "summary.json", summary)
    return summary


def describe(summary: dict[str, Any], output: Path) -> str:
    """A summary in a few lines."""
    s = summary
    where = f" in {output / 'rows.jsonl'}" if s["rows"] else ""
    lines = [f"{s['rows']:,} rows of {s['candidates']:,} candidates{where}"]
    if s["finished"] and s["rows"] < s["wanted"]:
        lines.append(f"these are less than the {s['wanted']:,} that are wanted: raise --config.max_candidates")
    if s["dropped"]:
        lines.append(f"dropped: {_listed(s['dropped'])}")
    if s["unusable_replies"]:
        lines.append(f"replies of no use, asked for again up to num_attempts: {_listed(s['unusable_replies'])}")
    if s["classifier"]:
        c = s["classifier"]
        lines.append(
            f"classifier: accuracy {c['accuracy']:.3f} on {c['num_held_out']} held-out rows (always the same label: "
            f"{c['majority']:.3f}), learnt from {c['num_train']}"
        )
        if c["accuracy"] <= c["majority"]:
            lines.append("it is no better than that: label more rows, above all bad ones")
    cost = "" if s["cost"] is None else f"; {s['cost']:,.2f} at the prices of the config"
    tokens = f"{s['prompt_tokens']:,} prompt and {s['completion_tokens']:,} completion tokens"
    lines.append(f"{s['calls']:,} calls, {s['calls_now']:,} of them now; {tokens}{cost}")
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{cause} {n:,}" for cause, n in counts.items())


@contextlib.contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Two processes at work in one folder would number their candidates alike."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"--output={output}: another process is at work in this folder") from error
        yield
