"""Shows what a config's data look like, and what is trained on them, without training anything.

python -m pit_jax.inspect_data --config=configs/pit_hh_rlhf.py --config.data.path=FOLDER
python -m pit_jax.inspect_data --workdir=runs/demo --json=facts.json

With --config the data stage runs in a temporary folder, with a tokenizer where the config trains one; with --workdir
the data of a run are read. It prints rows and where they came from, what was dropped and why, duplicates, lengths, the
tokenizer, and a few rows in every form that a stage trains on. Tokens between ⟦ ⟧ are those that carry loss; of a
reward model's rows, the one that is scored. <<BOS>>, <<EOS>> and <<Candidate>> are control tokens; text that spells
such a name or ⟦ has a \\ before it.
"""

import collections
import contextlib
import dataclasses
import io
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from pit_jax import cli, config as config_lib
from pit_jax.config import PitConfig, SrtConfig
from pit_jax.data import batches, pairs, sources
from pit_jax.data.feedback import Feedback
from pit_jax.data.tokenizer import Tokenizer
from pit_jax.files import write_json_atomic
from pit_jax.pipelines import common, critics, pit, srt
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.stages import Workdir
from pit_jax.types import GAP_PAIRINGS, PreferenceExample, ScoreBatch, TokenBatch

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :VARIANT where it has some.")
_WORKDIR = flags.DEFINE_string("workdir", None, "A run whose data stage is done: its data are shown.")
_JSON = flags.DEFINE_string("json", None, "File for the same facts; its rows are not shortened.")
_ROWS = flags.DEFINE_integer("rows", 3, "Rows that are shown in each form.", lower_bound=0)
_FULL = flags.DEFINE_bool("full", False, "Show long texts whole.")

SYSTEMS = {PitConfig: pit.SYSTEM, SrtConfig: srt.SYSTEM}
MARKS = "⟦", "⟧"
SHORT = 240
"""Characters of a text that are shown of its beginning; a quarter as many of its end."""


# ---------------------------------------------------------------------------------------------------------------- facts


def facts_of(context: Context, record: dict[str, Any]) -> dict[str, Any]:
    """What a data stage made, as plain JSON.

    Args:
      context: with rows and encoder.
      record: of the data stage.
    """
    config, tokenizer = context.config, context.encoder.tokenizer
    splits = {name: rows for name, rows in context.rows.items() if name != "pretrain"}
    rows = [row for split in splits.values() for row in split]
    texts = collections.Counter((row.prompt, row.chosen, row.rejected) for row in rows)
    keys = iter(sources.prompt_keys([row.prompt for row in rows]))
    seen = collections.Counter(key for split in splits.values() for key in {next(keys) for _ in split})
    longer = [len(row.chosen) - len(row.rejected) for row in rows]
    share = lambda found: sum(found) / len(rows) if rows else 0.0  # noqa: E731
    windows = {name: getattr(config.data, f"{name}_window") for name in ("prompt", "response", "reflection")}
    return {
        "config": config.name,
        "source": config.data.source,
        "sources": record.get("sources", []),
        "dropped": record.get("skipped", {}),
        "windows": windows,
        "over_length": record.get("over_length", {}),
        "rows": {name: len(split) for name, split in context.rows.items()},
        "tokens": record.get("tokens", {}),
        "prompts": len({row.prompt for row in rows}),
        "prompts_in_two_parts": sum(number > 1 for number in seen.values()),
        "duplicate_rows": sum(number - 1 for number in texts.values()),
        "contradicting_rows": sum(number for (x, w, l), number in texts.items() if w != l and (x, l, w) in texts),
        "chosen_longer": share([n > 0 for n in longer]),
        "equally_long": share([n == 0 for n in longer]),
        "with_reflection": share([bool(row.reflection) for row in rows]),
        "with_requirements": share([bool(row.requirements) for row in rows]),
        "tokenizer": {
            "kind": {"HuggingFace": "tokenizer.json", "SentencePiece": "SentencePiece", "Bytes": "bytes"}.get(
                type(tokenizer).__name__, type(tokenizer).__name__
            ),
            "from": config.tokenizer.path or common.starts_from(config)[1] or "trained on the SFT fold",
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
            "control_ids": dict(tokenizer.control_ids),
            "digest": tokenizer.digest[:16],
        },
    }


def describe(facts: dict[str, Any]) -> list[str]:
    """The facts in lines."""
    listed = lambda counts: ", ".join(f"{n} {cause}" for cause, n in counts.items()) or "none"  # noqa: E731
    lines = [f"{facts['config']}: source {facts['source']}"]
    for part in facts["sources"]:
        lines.append(f"  {part['path']} ({part['format']}): {part['read']} rows read, {part['taken']} taken")
        left = part["read"] - part["taken"] - sum(part["dropped"].values())
        lines.append(f"    dropped: {listed(part['dropped'])}")
        if left:
            lines.append(f"    left out by weight or num_rows: {left}")
    windows = ", ".join(f"{name} {n}" for name, n in facts["windows"].items())
    over = "; ".join(f"{split}: {listed(causes)}" for split, causes in facts["over_length"].items())
    lines.append(f"  over the windows ({windows}): {over or 'none'}")
    lines.append(f"  rows: {listed({split: n for split, n in facts['rows'].items() if n})}")
    lines.append(
        f"  different prompts: {facts['prompts']} (questions in two parts: {facts['prompts_in_two_parts']}); rows that "
        f"come again: {facts['duplicate_rows']}; rows that others contradict: {facts['contradicting_rows']}"
    )
    for name, values in facts["tokens"].items():
        lines.append(f"  tokens of {name}: " + ", ".join(f"{share} {n}" for share, n in values.items()))
    lines.append(
        f"  chosen has more characters in {facts['chosen_longer']:.1%}, as many in {facts['equally_long']:.1%}; with a "
        f"reflection {facts['with_reflection']:.1%}, with requirements {facts['with_requirements']:.1%}"
    )
    found = facts["tokenizer"]
    lines.append(f"  tokenizer: {found['kind']}, {found['vocab_size']} ids, {found['from']}")
    ids = {name: found[f"{name.lower()}_id"] for name in ("BOS", "EOS", "PAD")} | found["control_ids"]
    lines.append("    " + ", ".join(f"{name} {i}" for name, i in ids.items()))
    return lines


# ---------------------------------------------------------------------------------------------------------------- forms


class Segment(NamedTuple):
    """Tokens that stand side by side.

    Attributes:
      text: control tokens by name, all others decoded.
      marked: they carry loss, or are scored.
      tokens: how many.
    """

    text: str
    marked: bool
    tokens: int


class Form(NamedTuple):
    """A row as a stage reads it.

    Attributes:
      stage: and what it learns.
      row: number of the row in its split.
      segments: of its tokens.
    """

    stage: str
    row: int
    segments: list[Segment]


_LOOKS_MARKED = re.compile(rf"[{''.join(MARKS)}]|<<(?=\w+>>)")


def segments_of(tokenizer: Tokenizer, ids: Sequence[int], marked: Sequence[bool]) -> list[Segment]:
    """Ids as text, cut where the marks change."""
    names = {tokenizer.bos_id: "<<BOS>>", tokenizer.eos_id: "<<EOS>>"}
    names |= {i: name for name, i in tokenizer.control_ids.items()}
    ids = [int(i) for i in ids]
    found: list[Segment] = []
    begin = 0  # of the plain ids up to here
    for i, (token, mark) in enumerate(zip(ids, marked, strict=True)):
        if not found or found[-1].marked != bool(mark):
            found.append(Segment("", bool(mark), 0))
        text = names.get(token, "")
        if token in names:
            begin = i + 1
        elif i + 1 == len(ids) or ids[i + 1] in names or bool(marked[i + 1]) != bool(mark):
            # Decoded with what stands before it: a space at the beginning of a piece is lost where it is the first.
            start = i + 1 - _plain_tokens(ids, names, i, found[-1].tokens)
            whole, before = tokenizer.decode(ids[begin : i + 1]), tokenizer.decode(ids[begin:start])
            text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[start : i + 1])
            text = _LOOKS_MARKED.sub(r"\\\g<0>", text)
        found[-1] = Segment(found[-1].text + text, found[-1].marked, found[-1].tokens + 1)
    return found


def _plain_tokens(ids: Sequence[int], names: dict[int, str], i: int, before: int) -> int:
    """How many of the ids that end at i, at most `before` + 1, are plain and side by side."""
    number = 1
    while number <= before and ids[i - number] not in names:
        number += 1
    return number


def token_segments(tokenizer: Tokenizer, batch: TokenBatch, row: int = 0) -> list[Segment]:
    """A row of likelihood training: marked where it carries loss."""
    real = batch.segments[row] > 0
    return segments_of(tokenizer, batch.tokens[row][real], batch.loss_mask[row][real])


def score_segments(tokenizer: Tokenizer, batch: ScoreBatch, group: int, c: int) -> list[Segment]:
    """Row c of a group of a reward model: marked where it is scored."""
    slots = _slots(batch.members[group], batch.positions[group], c)
    return segments_of(tokenizer, batch.tokens[group][slots], slots == batch.last[group, 0, c])


def pair_segments(tokenizer: Tokenizer, batch: pairs.PairBatch, pair: int, c: int) -> list[Segment]:
    """Answer c of a DPO pair behind its prompt: marked where the token's log-prob counts."""
    slots = _slots(batch.members[pair], batch.positions[pair], c)
    sources_of_c = batch.sources[pair][batch.target_members[pair] >> c & 1 > 0]
    follows = np.isin(slots, sources_of_c)  # the log-prob of a token is read where the one before it stands
    return segments_of(tokenizer, batch.tokens[pair][slots], np.concatenate([[False], follows[:-1]]))


def _slots(members: np.ndarray, positions: np.ndarray, c: int) -> np.ndarray:
    slots = np.flatnonzero(members >> c & 1)
    return slots[np.argsort(positions[slots], kind="stable")]


def forms_of(context: Context, num_rows: int) -> list[Form]:
    """The first rows of the splits in every form that a stage trains on, by the functions that make its batches."""
    few = dataclasses.replace(context, rows={name: rows[:num_rows] for name, rows in context.rows.items()})
    if not num_rows:
        return []
    return _pit_forms(few) if isinstance(context.config, PitConfig) else _srt_forms(few)


def _likelihood(
    context: Context, stage: str, rows: Sequence[batches.Turns], loss_on_prompt: bool = False
) -> list[Form]:
    tokenizer, found = context.encoder.tokenizer, []
    for i, row in enumerate(rows):
        batch = batches.token_rows([row], batches.num_tokens(row), loss_on_prompt=loss_on_prompt)
        found.append(Form(stage, i, token_segments(tokenizer, batch)))
    return found


def _pretraining(context: Context) -> list[Form]:
    config = context.config
    if config.pretrain.checkpoint or not (context.rows["pretrain"] or context.rows["sft"]):
        return []
    rows, number = common.pretraining_rows(context), max(map(len, context.rows.values()))
    text = [row for row in rows if len(row[0]) < 2]  # behind BOS, or nothing
    dialogues = [row for row in rows if len(row[0]) > 1]
    found = _likelihood(context, "pretrain: M_pre, text", text[:number], config.pretrain.sft.loss_on_prompt)
    return found + _likelihood(context, "pretrain: M_pre", dialogues[:number], config.pretrain.sft.loss_on_prompt)


def _pit_forms(context: Context) -> list[Form]:
    config, e = context.config, context.encoder
    sft, rm = context.rows["sft"], context.rows["rm"]
    found = _pretraining(context)
    found += _likelihood(context, "sft_policy: M_P, x -> y_w", common.sft_rows(e, sft))
    rows = pit.sft_pit_rows(e, sft, config.sft_pit.chain_of_thought)
    found += _likelihood(context, "sft_pit: M_PIT, (x, y_l) -> y_w", rows)
    if config.sft_pit.unlikelihood:
        found += _likelihood(context, "sft_pit: M_PIT, made unlikely", pit.unlikely_rows(e, sft))
    forms = [("r_p: R_P", ("y_w", "y_l"), common.policy_groups)]
    if config.r_pit.loss != "r_p_difference":
        names = [f"r(x, y_{one}, y_{two})" for one, two in GAP_PAIRINGS]
        forms.append(("r_pit: R_PIT", names, pit.gap_groups))
    for stage, names, make_groups in forms:
        for i, group in enumerate(make_groups(e, rm)):
            batch = batches.score_rows([group])
            found += [
                Form(f"{stage}, {name}", i, score_segments(e.tokenizer, batch, 0, c)) for c, name in enumerate(names)
            ]
    return found


def _srt_forms(context: Context) -> list[Form]:
    config, e = context.config, context.encoder
    found = [] if config.base else _pretraining(context)
    if not config.base:
        found += _likelihood(context, "sft_policy: M_base, x -> y_w", common.sft_rows(e, context.rows["sft"]))
    stand_in = "y_l in place of M_base's answer" + ("" if config.critic.kind == "verifier" else " and no critique yet")
    records = _records(context, context.rows["rm"])
    found += _likelihood(context, f"srt: M_self, {stand_in}", srt.srt_rows(context, records, config.without))
    if config.num_rounds:
        for i, pair in enumerate(srt.dpo_pairs(context, _records(context, context.rows["rl"]))):
            batch = pairs.pair_rows([pair])
            for c, name in enumerate(("refinement", "response")):
                found.append(Form(f"dpo_1: {name}, {stand_in}", i, pair_segments(e.tokenizer, batch, 0, c)))
    return found


def _records(context: Context, rows: Sequence[PreferenceExample]) -> list[srt.Record]:
    """Records as stage 1 makes them, by the oracle critic where that is the config's."""
    config = context.config
    requests = [critics.Request(i, row, row.rejected or "(M_base's answer)") for i, row in enumerate(rows)]
    if config.critic.kind == "verifier":
        seed = common.seed_of(config, "critic")
        said = [reply.feedback for reply in critics.verifier_critic(seed, config.critic.error_rate).criticize(requests)]
    else:
        words = "(the critic's weaknesses)", "(the critic's suggestions)", 5.0
        said = [Feedback(*words, row.chosen or "(the critic's refinement)") for row in rows]
    return [
        srt.Record(
            row=request.number, instruction=request.row.prompt, response=request.response,
            **dataclasses.asdict(feedback), refinement_score=None, scores=(), raw="", raw_score="",
            critic=config.critic.kind, read=0, written=0,
        )
        for request, feedback in zip(requests, said, strict=True)
    ]  # fmt: skip


def draw(form: Form, full: bool = False) -> str:
    """A form in lines: its head, and its text with marks, indented."""
    opened, closed = MARKS
    texts = [text if full else _shortened(text) for text, _, _ in form.segments]
    marked = [f"{opened}{t}{closed}" if s.marked else t for t, s in zip(texts, form.segments, strict=True)]
    tokens = [sum(s.tokens for s in form.segments if s.marked is side) for side in (False, True)]
    head = f"  [{form.stage}] row {form.row}, {sum(tokens)} tokens, {tokens[1]} marked"
    return "\n".join([head, *(f"      {line}".rstrip() for line in "".join(marked).split("\n"))])


_CONTROL = re.compile(r"((?<!\\)<<\w+>>)")


def _shortened(text: str) -> str:
    """Without the middle of long texts between control tokens."""

    def short(part: str) -> str:
        cut = len(part) - SHORT - SHORT // 4
        return part if cut <= 40 else f"{part[:SHORT]} [.. {cut} characters ..] {part[-SHORT // 4 :]}"

    return "".join(map(short, _CONTROL.split(text)))


# -------------------------------------------------------------------------------------------------------------- command


def prepare(config: Any, folder: Path) -> tuple[Context, dict[str, Any]]:
    """Runs the data stage of a config in an empty folder; what it prints is shown where it fails."""
    if not config.tokenizer.path:  # else the data can be seen before the checkpoint is there
        common.check_start(config)
    context, printed = Context(config, Workdir(folder, config), None), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return context, SYSTEMS[type(config)].stage_functions(context)["data"]()
    except BaseException:
        print(printed.getvalue(), end="")
        raise


def open_data(root: str | Path, config: Any | None = None) -> tuple[Context, dict[str, Any]]:
    """The data of a run.

    Args:
      root: a workdir whose data stage is done.
      config: one whose data these must be; None: any.

    Raises:
      ValueError: where it is none, or was made with other data.
    """
    context = common.open_workdir(root)
    if config is not None:
        fields = lambda c: {k: dataclasses.asdict(c)[k] for k in ("seed", "data", "tokenizer")}  # noqa: E731
        lines = config_lib.differing_fields(fields(config), fields(context.config))
        if lines:
            raise ValueError(f"--workdir={root} has the data of another config, leave one out: {'; '.join(lines)}")
    common.load_data(context)
    return context, context.workdir.done("data")


def inspect(context: Context, record: dict[str, Any], num_rows: int, full: bool, json_path: str | None) -> None:
    """Prints all, and writes it where a path is given."""
    facts, forms = facts_of(context, record), forms_of(context, num_rows)
    print("\n".join(describe(facts)))
    if forms:
        print(f"\nTokens between {' '.join(MARKS)} carry loss; of r_p and r_pit, they are scored.")
    for form in forms:
        print(draw(form, full))
    if json_path:
        shown = [form._asdict() | {"segments": [s._asdict() for s in form.segments]} for form in forms]
        write_json_atomic(json_path, facts | {"forms": shown})


def main(argv: list[str]) -> None:
    """A user's mistake ends in one line on stderr and status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; fields are set as --config.FIELD=VALUE")
    with cli.one_line_errors():
        if _CONFIG.value is None and not _WORKDIR.value:
            raise ValueError("name --config=FILE, or --workdir=FOLDER of a run")
        values = _CONFIG.value
        config = None
        if values is not None:
            config = common.of_checkpoint(config_lib.from_config_dict(config_lib.class_of(values), values))
        if _WORKDIR.value:
            context, record = open_data(_WORKDIR.value, config)
            inspect(context, record, _ROWS.value, _FULL.value, _JSON.value)
            return
        with tempfile.TemporaryDirectory(prefix="inspect_data_") as folder:
            context, record = prepare(config, Path(folder) / "run")
            inspect(context, record, _ROWS.value, _FULL.value, _JSON.value)


def run() -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=cli.parse_flags)


if __name__ == "__main__":
    run()
