"""Improves the answers of a file, or of a person at the keyboard, with the models of a finished run."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from pit_jax import processes
from pit_jax.data.answers import Answer, read_answers
from pit_jax.data.sources import DataError
from pit_jax.files import Journal, write_text_atomic
from pit_jax.pipelines import common, improve, pit
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.improve import Improved, Row, StopRules


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the output depends on, beside input and models.

    Attributes:
      method: of `improve.METHODS`.
      rules: when a row stops.
      temperature: of all samples.
      seed: of all samples.
    """

    method: str
    rules: StopRules
    temperature: float
    seed: int


class Improver:
    """Rows in, improved rows out, with the models of a workdir."""

    def __init__(self, context: Context, settings: Settings, size: int):
        self.context, self.settings, self.size = context, settings, size
        self._method = improve.make_method(context, settings.method, settings.temperature, size)
        self._first = None
        self._is_srt = settings.method == "srt"
        has_gaps = not self._is_srt and context.workdir.done(pit.gap_stage(context.config)) is not None
        if settings.rules.needs_gains and not has_gaps:
            raise ValueError(f"--stop=gap and --keep=best need R_PIT, but {context.workdir.root} has not finished it")
        self._gains = pit.make_gains(context) if has_gaps else None

    def _first_answers(self, *arguments):
        if self._first is None:  # most files bring their answers
            method, stage = ("srt_answer", "") if self._is_srt else ("policy", "rl_policy")
            self._first = improve.make_method(self.context, method, self.settings.temperature, self.size, stage)
        return self._first(*arguments)

    def row(self, answer: Answer) -> Row:
        """A line as a row.

        Raises:
          DataError: where it is too long for the windows that the models were trained with; nothing is ever cut.
        """
        e, data = self.context.encoder, self.context.config.data
        prompt = answer.prompt + common.prompt_ending(self.context, answer.prompt)
        where = f"line {answer.number}" if answer.number else "here"
        size = len(e.prompt(prompt))
        if size > data.prompt_window:
            raise DataError(f"{where}: the prompt has {size} tokens, but the models read {data.prompt_window}")
        if answer.response is None:
            if not self._is_srt and self.context.workdir.done("rl_policy") is None:
                raise DataError(
                    f"{where}: there is no response, and the workdir has not finished rl_policy to write one"
                )
            return Row(answer.number, prompt)
        ids = tuple(e.tokenizer.encode(answer.response))
        if len(ids) > data.response_window:
            raise DataError(f"{where}: the response has {len(ids)} tokens, but the models read {data.response_window}")
        return Row(answer.number, prompt, ids)

    def __call__(self, rows: Iterator[Row]) -> Iterator[Improved]:
        """Rows as they finish."""
        key, rules = jax.random.key(self.settings.seed), self.settings.rules
        return improve.run(rows, self._method, self._first_answers, self._gains, rules, key, self.size)

    def line(self, answer: Answer, improved: Improved) -> dict:
        """What the output says of a row."""
        if not improved.steps:
            return {"line": answer.number, "error": f"line {answer.number}: no time was left to write a response"}
        texts = [self.context.encoder.text(step.ids) for step in improved.steps]
        if answer.response is not None:
            texts[0] = answer.response
        steps = []
        for text, step in zip(texts, improved.steps, strict=True):
            steps.append({"response": text, "read": step.read, "written": step.written, "scored": step.scored})
            if step.gap is not None:
                steps[-1] |= {"gap": step.gap, "gain": step.gain}
            if step.feedback:
                steps[-1]["feedback"] = step.feedback
            if not step.parsed:
                steps[-1]["parsed"] = False
        found = {"line": answer.number} | ({} if answer.id is None else {"id": answer.id})
        found |= {"prompt": answer.prompt, "response": texts[improved.kept]}
        found |= {"kept": improved.kept, "stop": improved.stop, "steps": steps}
        return found | {"tokens": sum(step.tokens for step in improved.steps)}


def run(improver: Improver, source: Path, output: Path) -> list[dict]:
    """Improves a file.

    Returns:
      The lines of the output.

    Raises:
      ValueError: where the output is there already, or its folder is not.
    """
    context, settings = improver.context, improver.settings
    if output.exists():
        remedy = "it is the --input, name another" if output.samefile(source) else "name another, or delete it"
        raise ValueError(f"--output={output} is there already: {remedy}")
    if not output.parent.is_dir():
        raise ValueError(f"--output={output}: there is no folder {output.parent}")
    output = processes.own_file(output, output.with_name(output.name + ".partial"))
    stages = set(improve.stages(context.config, settings.method))
    # What stops rows, and writes first answers; M_self does both itself.
    more = set() if settings.method == "srt" else {pit.gap_stage(context.config), "rl_policy"}
    stages |= {stage for stage in more if context.workdir.done(stage) is not None}
    made_from = {
        "input": hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else "",
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "models": {stage: context.workdir.model_digest(stage) for stage in sorted(stages)},
    } | improve.form_of(context, settings.method)
    found = {answer.number: answer for answer in read_answers(source)}
    remedy = "take the same flags, delete it, or name another --output"
    progress = Journal(output.with_name(output.name + ".partial"), made_from, remedy)
    lines = {line["line"]: line for line in progress.lines}
    if lines:
        print(f"{len(lines)} of {len(found)} rows were done before", file=sys.stderr)

    def keep(line: dict) -> None:
        progress.add(line)
        lines[line["line"]] = line

    waiting = []
    for number, answer in found.items():
        if number in lines:
            continue
        try:
            if answer.error:
                raise DataError(answer.error)
            waiting.append(improver.row(answer))
        except DataError as error:
            print(f"{source}, {error}", file=sys.stderr)
            keep({"line": number, "error": str(error)})
    for done in improver(iter(waiting)):
        keep(improver.line(found[done.row.number], done))
        if sys.stderr.isatty():
            end = "\n" if len(lines) == len(found) else ""
            print(f"\r{len(lines)} of {len(found)} rows", end=end, file=sys.stderr, flush=True)
    ordered = [lines[number] for number in sorted(lines)]
    write_text_atomic(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered))
    progress.delete()
    return ordered


def summary(lines: list[dict]) -> str:
    """What happened, in a few words."""
    done = [line for line in lines if "error" not in line]
    text = [f"{len(done)} of {len(lines)} rows done"]
    if len(done) < len(lines):
        text.append(f"{len(lines) - len(done)} could not be read or are too long (see above)")
    if done:
        reasons = {reason: sum(line["stop"] == reason for line in done) for reason in {line["stop"] for line in done}}
        text.append("stopped by " + ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())))
        changed = sum(line["response"] != line["steps"][0]["response"] for line in done)
        text.append(f"{changed} got another answer")
        first = sum(bool(line["steps"][0]["written"]) for line in done)
        if first:
            text.append(f"of {first} the model wrote the first answer too")
        text.append(f"{sum(line['tokens'] for line in done) / len(done):.0f} tokens per row")
    return "; ".join(text) + "."


def interactive(improver: Improver) -> None:
    """Asks for a prompt and an answer at a time; an empty prompt or the end of the input ends it."""
    print("An empty prompt ends this; an empty answer lets M_P write one.")
    number = 0
    while True:
        try:
            prompt = input("prompt: ")
            response = input("answer: ") if prompt.strip() else ""
        except EOFError:
            print()
            return
        if not prompt.strip():
            return
        number += 1
        answer = Answer(number, prompt, response or None)
        try:
            row = improver.row(answer)
        except DataError as error:
            print(f"  {str(error).partition(': ')[2]}")  # there are no lines here
            continue
        (done,) = improver(iter([row]))
        line = improver.line(answer, done)
        for k, step in enumerate(line["steps"]):
            gain = f"  gain {step['gain']:+.2f}" if "gain" in step else ""
            mark = " *" if k == line["kept"] else "  "
            print(f" {mark}{k}: {step['response']}{gain}")
        print(f"   stopped: {line['stop']}; {line['tokens']} tokens; * is the result", flush=True)
