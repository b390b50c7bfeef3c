"""SRT: the stages of self-refinement tuning, each resumable, each a function of the ones before.

data               rows, three folds, tokenizer                                          section 4.1
pretrain           M_pre, where no checkpoint is named
sft_policy         M_base from M_pre on x -> y_w, or read from config.base: the paper's is Tulu 2
critic_feedback    M_base answers the second fold, the critic writes feedback            section 3.1.1
srt                stage 1: M_self from M_base on x -> (y, f, r)                         section 3.1.2, Equation 1
self_feedback_1    M_self answers the third fold, criticises, refines and scores         section 3.2
dpo_1              stage 2: DPO on (r, y) where the refinement's score is higher         section 3.2
..                 further rounds, each on prompts of its own
evaluate           the tables                                                            section 4
"""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pit_jax import checkpoint, interrupts, optimizers, processes, train_state
from pit_jax.config import FeedbackConfig, SamplingConfig, SrtConfig
from pit_jax.data import batches, feedback as feedback_lib, pairs, synthetic_critic
from pit_jax.data.feedback import MAX_SCORE, PARTS, Feedback, Form
from pit_jax.data.sources import DataError
from pit_jax.data.verifier import verify
from pit_jax.files import Journal, write_text_atomic
from pit_jax.learners import dpo, loop
from pit_jax.pipelines import common, critics, pit
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.critics import Critic, Reply, Request, SelfCritic
from pit_jax.pipelines.samples import Sampler, Step
from pit_jax.types import PreferenceExample

FIRST_STAGE = {
    "lora": "sft_policy",
    "sft_policy": "sft_policy",
    "critic": "critic_feedback",
    "critic_feedback": "critic_feedback",
    "srt": "srt",
    "without": "srt",
    "learn": "srt",
    "self_feedback": "self_feedback_1",
    "dpo": "dpo_1",
    "num_rounds": "self_feedback_1",
    "evaluation": "evaluate",
}
"""Field of the config -> the first stage that reads it; all other fields are read from the start."""


def stage_names(config: SrtConfig) -> list[str]:
    """All stages of a config in order."""
    pretrain = [] if config.base or config.pretrain.checkpoint else ["pretrain"]
    rounds = [name for i in range(1, config.num_rounds + 1) for name in (f"self_feedback_{i}", f"dpo_{i}")]
    arms = [f"arm_{arm}" for arm in config.arms]
    return ["data", *pretrain, "sft_policy", "critic_feedback", "srt", *rounds, *arms, "evaluate"]


def final_stage(config: SrtConfig) -> str:
    """The stage that leaves the last M_self behind."""
    return f"dpo_{config.num_rounds}" if config.num_rounds else "srt"


def make_form(context: Context, without: str | None = None) -> Form:
    """The sequence of Equation 1 in this run's ids."""
    config = context.config
    without = config.without if without is None else without
    template = feedback_lib.load_template("srt", config.data.templates)
    form = Form(context.encoder.tokenizer, template, without, context.encoder.chat)
    if form.prompt("x") != context.encoder.policy_prompt("x"):
        raise ValueError("templates: srt.txt must begin as policy.txt: M_base has learnt to answer behind that")
    return form


def form_of(context: Context) -> dict:
    """What critiques of M_self depend on beside the model: plain JSON."""
    template = feedback_lib.load_template("srt", context.config.data.templates)
    sequence = hashlib.sha256(template.encode("utf-8")).hexdigest()[:16]
    return {"sequence": sequence, "feedback_window": context.config.feedback_window}


def make_self_critic(
    context: Context, stage: str, temperature: float, size: int, form: Form | None = None
) -> SelfCritic:
    """The model of a finished stage as one that answers, criticises and refines."""
    form = form or make_form(context)
    return SelfCritic(context, stage, form, size, temperature, context.config.feedback_window)


# ------------------------------------------------------------------------------------------------------------- records


@dataclasses.dataclass(frozen=True)
class Record:
    """An instruction, a response, what a critic said of it, and whether it is used.

    Attributes:
      row: number of the instruction in its fold.
      instruction, response: x and y.
      weaknesses, suggestions, score, refinement: of the critique; None where it lacks them.
      refinement_score: from a call of its own.
      scores: of y, r_1, r_2, ..., one more per round of critique.
      raw, raw_score: the critique, and the reply that the refinement's score is from, as they came.
      critic: who it was.
      read, written: tokens that the critic was given and wrote.
      dropped: why the record is not used; empty where it is.
    """

    row: int
    instruction: str
    response: str
    weaknesses: str | None
    suggestions: str | None
    score: float | None
    refinement: str | None
    refinement_score: float | None
    scores: tuple[float | None, ...]
    raw: str
    raw_score: str
    critic: str
    read: int
    written: int
    dropped: str = ""

    @property
    def feedback(self) -> Feedback:
        """The critique."""
        return Feedback(self.weaknesses, self.suggestions, self.score, self.refinement)


def make_records(
    rows: Sequence[PreferenceExample],
    numbers: Sequence[int],
    responses: Sequence[str],
    critic: Critic,
    settings: FeedbackConfig,
    fits: Callable[[str], bool] = lambda response: True,
) -> list[Record]:
    """Asks the critic about each response that fits, and about its refinements, each on its own.

    With several rounds of critique the refinement is the next response, until its score does not rise any more; the
    one with the highest score is kept, beside the critique of the first response (section 3.1.1, Table 2).
    """
    requests = [Request(i, row, y) for i, row, y in zip(numbers, rows, responses, strict=True)]
    asked = [i for i, response in enumerate(responses) if fits(response)]
    first = [Reply(error=critics.OVER_WINDOW) for _ in requests]
    for i, reply in zip(asked, critic.criticize([requests[i] for i in asked]), strict=True):
        first[i] = reply
    read, written = ([getattr(reply, field) for reply in first] for field in ("read", "written"))
    best: list[str | None] = [reply.feedback.refinement or None for reply in first]
    newest = list(best)
    scores: list[list[float | None]] = [[reply.feedback.score] for reply in first]
    raw_scores = [""] * len(first)
    active = [i for i, refinement in enumerate(best) if refinement]
    for k in range(settings.num_critiques):
        if k and active:
            replies = critic.criticize([requests[i]._replace(response=newest[i]) for i in active])
            for i, reply in zip(active, replies, strict=True):
                newest[i] = reply.feedback.refinement or None
                read[i], written[i] = read[i] + reply.read, written[i] + reply.written
            active = [i for i in active if newest[i]]
        if not active:
            break
        replies = critic.score([requests[i]._replace(response=newest[i]) for i in active])
        rising = []
        for i, reply in zip(active, replies, strict=True):
            score, earlier = reply.feedback.score, [s for s in scores[i][1:] if s is not None]
            read[i], written[i] = read[i] + reply.read, written[i] + reply.written
            if k == 0 or (score is not None and score > max(earlier, default=-np.inf)):
                best[i], raw_scores[i] = newest[i], reply.raw or reply.error
                if score is not None and (scores[i][0] is None or k or score > scores[i][0]):
                    rising.append(i)
            scores[i].append(score)
        active = rising
    records = []
    for i, (request, reply) in enumerate(zip(requests, first, strict=True)):
        found, later = reply.feedback, [s for s in scores[i][1:] if s is not None]
        record = Record(
            row=request.number, instruction=request.row.prompt, response=request.response,
            weaknesses=found.weaknesses, suggestions=found.suggestions, score=found.score, refinement=best[i],
            refinement_score=max(later, default=None), scores=tuple(scores[i]), raw=reply.raw or reply.error,
            raw_score=raw_scores[i], critic=critic.name, read=read[i], written=written[i],
        )  # fmt: skip
        cause = ""
        if critics.OVER_WINDOW in (reply.error, record.raw_score):
            cause = "over the windows"
        elif reply.error:
            cause = "no reply"
        records.append(dataclasses.replace(record, dropped=cause or why_dropped(record, settings)))
    return records


def why_dropped(record: Record, settings: FeedbackConfig) -> str:
    """The rules of section 4.1: all parts are there, and the refinement is not worse than the response."""
    for part in PARTS:
        if getattr(record, part) in (None, ""):
            return f"no {part}"
    if record.refinement_score is None:
        return "refinement not scored"
    gain = record.refinement_score - record.score
    enough = gain >= settings.min_margin if settings.keep_ties or settings.min_margin else gain > 0
    return "" if enough else "score not higher"


def drop_unchanged(records: list[Record], share: float, seed: int) -> list[Record]:
    """Drops some of the records whose refinement is the response, so that they are at most this share of what is kept.

    A model that learns mostly from answers in which nothing is wrong writes that nothing is wrong. Which ones are
    dropped depends on the seed alone.
    """
    kept = [i for i, record in enumerate(records) if not record.dropped]
    unchanged = [i for i in kept if records[i].refinement == records[i].response]
    changed = len(kept) - len(unchanged)
    most = len(unchanged) if share == 1 else int(changed * share / (1 - share) + 1e-9)
    gone = set(np.random.default_rng(seed).permutation(unchanged)[most:].tolist())
    return [dataclasses.replace(r, dropped="nothing to change") if i in gone else r for i, r in enumerate(records)]


def drop_by_gap(records: list[Record], settings: FeedbackConfig) -> list[Record]:
    """Also drops refinements whose gain over the response is not above 0 by the R_PIT of a PIT run.

    A refinement that is the response has a gain of 0 and is not asked about: other rules say whether it is kept.
    """
    context = pit.open_finished(settings.gap_workdir, ["r_pit"])
    gains = pit.make_gains(context)
    kept = [i for i, record in enumerate(records) if not record.dropped and record.refinement != record.response]
    ids = lambda text: context.encoder.response(text)[:-1]  # noqa: E731
    found = gains(
        [records[i].instruction for i in kept],
        [ids(records[i].refinement) for i in kept],
        [ids(records[i].response) for i in kept],
    )
    worse = {i for i, (_, gain, _) in zip(kept, found, strict=True) if gain <= 0}
    return [dataclasses.replace(r, dropped="gap not higher") if i in worse else r for i, r in enumerate(records)]


def records_path(context: Context, stage: str) -> Path:
    """Where a stage leaves its records, one JSON object per line."""
    return context.workdir.root / "feedback" / f"{stage}.jsonl"


def write_records(context: Context, stage: str, records: Sequence[Record]) -> None:
    """One line per record, those that are dropped too."""
    lines = [json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n" for record in records]
    write_text_atomic(records_path(context, stage), "".join(lines))


def read_records(context: Context, stage: str) -> list[Record]:
    """The records of a finished stage."""
    with open(records_path(context, stage), encoding="utf-8") as file:
        values = [json.loads(line) for line in file]
    return [Record(**value | {"scores": tuple(value["scores"])}) for value in values]


def feedback_summary(records: Sequence[Record]) -> dict:
    """What a stage's record says of its records: counts by cause, scores, tokens."""
    causes = collections.Counter(record.dropped or "kept" for record in records)
    parsed = [not record.feedback.lacking for record in records]
    both = [(r.score, r.refinement_score) for r in records if r.score is not None and r.refinement_score is not None]
    histogram = lambda values: [int(np.sum(np.round(values) == k)) for k in range(1, 11)]  # noqa: E731
    depth = max((len(r.scores) for r in records), default=0)
    by_round = [[r.scores[k] for r in records if len(r.scores) > k and r.scores[k] is not None] for k in range(depth)]
    return {
        "records": len(records),
        "causes": dict(sorted(causes.items())),
        "parse_rate": float(np.mean(parsed)) if parsed else None,
        "mean_scores": [float(np.mean(x)) if x else None for x in zip(*both, strict=True)] if both else None,
        "mean_scores_by_round": [float(np.mean(x)) if x else None for x in by_round],
        "histograms": [histogram(np.asarray(x)) for x in zip(*both, strict=True)] if both else None,
        "read": sum(r.read for r in records),
        "written": sum(r.written for r in records),
    }


def truth_of(records: Sequence[Record], rows: Sequence[PreferenceExample]) -> dict:
    """What a verifier says of critiques and refinements; shares are None where there is nothing to count.

    Args:
      records: those with a critique count.
      rows: of the records, with requirements.

    Returns:
      failing: responses that fail something, of which `found` are not given the highest score and `mended` have a
      refinement that meets everything. passing: the others, of which `false_alarms` get less and `broken` have a
      refinement that fails something.
    """
    judged = [
        (
            all(verify(row.requirements, record.response)),
            record.score < MAX_SCORE,
            all(verify(row.requirements, record.refinement)),
        )
        for record, row in zip(records, rows, strict=True)
        if record.score is not None and record.refinement
    ]
    mean = lambda values: float(np.mean(values)) if values else None  # noqa: E731
    failing, passing = ([(low, good) for ok, low, good in judged if ok is side] for side in (False, True))
    return {
        "failing": len(failing),
        "found": mean([low for low, _ in failing]),
        "mended": mean([good for _, good in failing]),
        "passing": len(passing),
        "false_alarms": mean([low for low, _ in passing]),
        "broken": mean([not good for _, good in passing]),
    }


# -------------------------------------------------------------------------------------------------------------- stages


def data_stage(context: Context) -> dict:
    """PIT's, with the words of the sequence and of the oracle critic in the vocabulary; with M_base comes its own."""
    config = context.config
    if config.base:
        return common.data_stage(context, tokenizer=config.tokenizer.path or common.tokenizer_of(config.base))
    words = [feedback_lib.load_template("srt", config.data.templates)]
    if config.data.source == "synthetic":
        words += synthetic_critic.wordings()
    try:
        return common.data_stage(context, words)
    except DataError as error:
        remedy = "; prompts alone will do where M_base is another run's: set --config.base=RUN/models/STAGE"
        lacking = any(text in str(error) for text in ("is missing", "no columns of a pair"))
        raise DataError(f"{error}{remedy if lacking else ''}") from error


def base_stage(context: Context) -> dict:
    """M_base: trained here, or read from a checkpoint."""
    config = context.config
    if not config.base:
        return common.sft_policy_stage(context, "sft_policy", config.sft_policy)
    like = common.shapes(common.model_of(context, "sft_policy"))
    context.workdir.save_model("sft_policy", checkpoint.restore(*common.find_checkpoint(config), like))
    return {"steps": 0, "from": config.base}


def chosen_prompts(context: Context, fold: str, settings: FeedbackConfig, part: int = 0, parts: int = 1) -> list[int]:
    """Numbers of the rows of a fold that are asked about; `parts` of them share the fold."""
    rows = range(len(context.rows[fold]))[part::parts]
    if len(rows) < settings.num_prompts:
        print(f"  num_prompts is {settings.num_prompts}, but there are {len(rows)} prompts: all are taken", flush=True)
    return list(rows[: settings.num_prompts] if settings.num_prompts else rows)


def _open_journal(context: Context, stage: str, model: str, critic: str, settings: FeedbackConfig) -> Journal:
    """What a stage has so far: first answers, and replies of critics that keep none of their own."""
    header = {"model": context.workdir.model_digest(model), "critic": critic, "templates": context.encoder.digest}
    header |= {"form": form_of(context), "settings": dataclasses.asdict(settings)}
    return Journal(context.workdir.unfinished_feedback(stage), header)


def _first_answers(
    journal: Journal, numbers: Sequence[int], size: int, answer: Callable[[list[int]], list[Step]]
) -> list[tuple[int, ...]]:
    """Answers to rows by number, `size` at a time; those of an earlier start are read.

    They are on disk before a critic is asked about them: another machine may sample others, and what a server said of
    these is paid for.
    """
    known = {line["row"]: tuple(line["ids"]) for line in journal.lines if line["ask"] == "answer"}
    todo = [i for i in numbers if i not in known]
    for start in range(0, len(todo), size):
        interrupts.check()
        part = todo[start : start + size]
        written = {i: step.ids for i, step in zip(part, answer(part), strict=True)}
        journal.add(*({"ask": "answer", "row": i, "ids": list(ids)} for i, ids in written.items()))
        known |= written
    return [known[i] for i in numbers]


def critic_feedback_stage(context: Context) -> dict:
    """Stage 1's data: M_base answers, the critic criticises and refines, the rules of section 4.1 choose."""
    config, stage = context.config, "critic_feedback"
    settings, e, fold = config.critic_feedback, context.encoder, context.rows["rm"]
    numbers = chosen_prompts(context, "rm", settings)
    sampling = SamplingConfig(config.data.response_window, settings.temperature)
    sampler = Sampler(context, "sft_policy", e.policy_window, sampling, settings.batch_size)
    key = common.key_of(config, stage)
    critic = make_critic(context)
    journal = _open_journal(context, stage, "sft_policy", critic.name, settings)
    answers = _first_answers(
        journal, numbers, CHUNK * settings.batch_size,
        lambda part: sampler([e.policy_prompt(fold[i].prompt) for i in part], key, _draws(part)),
    )  # fmt: skip
    if config.critic.kind == "workdir":
        critic = critics.stored(critic, journal, CHUNK * settings.batch_size)
    fits = fits_window(context)  # what does not is never used, so it need not be paid for
    records = make_records([fold[i] for i in numbers], numbers, [*map(e.text, answers)], critic, settings, fits)
    lost = sum(record.dropped == "no reply" or record.raw_score.startswith("no reply") for record in records)
    if lost > config.critic.max_lost * len(records):  # an outage must not end in a model of what came before it
        write_records(context, stage, records)
        raise ValueError(
            f"{stage}: to {lost} of {len(records)} records the critic gave no reply, or none to their refinement, see "
            f'"no reply" in {records_path(context, stage)}. The same command asks for these again, and for nothing '
            f"that is on disk; a share of up to critic.max_lost={config.critic.max_lost:g} is dropped and counted."
        )
    return _finish_feedback(context, stage, records, fold, settings)


def self_feedback_stage(context: Context, number: int) -> dict:
    """Stage 2's data: M_self does all of it, on prompts that it has not seen (section 3.2)."""
    config, stage = context.config, f"self_feedback_{number}"
    settings, fold = config.self_feedback, context.rows["rl"]
    last = "srt" if number == 1 else f"dpo_{number - 1}"
    numbers = chosen_prompts(context, "rl", settings, number - 1, config.num_rounds)
    model = make_self_critic(context, last, settings.temperature, settings.batch_size)
    key = common.key_of(config, stage)
    critic = critics.self_critic(model, f"{last} {context.workdir.model_digest(last)}")
    journal = _open_journal(context, stage, last, critic.name, settings)
    answers = _first_answers(
        journal, numbers, CHUNK * settings.batch_size,
        lambda part: model.answer([fold[i].prompt for i in part], key, _draws(part)),
    )  # fmt: skip
    critic = critics.stored(critic, journal, CHUNK * settings.batch_size)
    texts = [context.encoder.text(ids) for ids in answers]
    records = make_records([fold[i] for i in numbers], numbers, texts, critic, settings)
    return _finish_feedback(context, stage, records, fold, settings)


CHUNK = 4
"""Batches after which answers and critiques are written to disk."""


def _draws(numbers: Sequence[int]) -> np.ndarray:
    return np.asarray([(i, 0) for i in numbers], np.uint32).reshape(-1, 2)


def _finish_feedback(
    context: Context, stage: str, records: list[Record], fold: Sequence[PreferenceExample], settings: FeedbackConfig
) -> dict:
    fits = fits_windows(context)
    records = [r if r.dropped or fits(r) else dataclasses.replace(r, dropped="over the windows") for r in records]
    if settings.gap_workdir:
        records = drop_by_gap(records, settings)
    records = drop_unchanged(records, settings.max_unchanged, common.seed_of(context.config, f"{stage}/unchanged"))
    write_records(context, stage, records)
    summary = feedback_summary(records)
    rows = [fold[record.row] for record in records]
    if rows and rows[0].requirements:
        summary["truth"] = truth_of(records, rows)
    print(f"  records: {', '.join(f'{n} {cause}' for cause, n in summary['causes'].items())}", flush=True)
    _show_record(records)
    if not summary["causes"].get("kept"):
        where = f"no record is kept; they are in {records_path(context, stage)}, each with the reason"
        if stage == "critic_feedback":
            raise ValueError(f"{stage}: {where}")
        print(f"  {where}: this round of DPO changes nothing", flush=True)
    return {"steps": 0} | summary


def fits_window(context: Context) -> Callable[[str], bool]:
    """Whether M_self could have written a response or refinement."""
    e = context.encoder
    return lambda text: len(e.tokenizer.encode(text)) < e.response_window


def fits_windows(context: Context) -> Callable[[Record], bool]:
    """Whether M_self could have written a record: what is longer than it may write would teach it what it cannot do."""
    # Of the whole sequence: arms and a later --redo may learn more parts of it than this run's config.without says.
    form, short = make_form(context, ""), fits_window(context)

    def fits(record: Record) -> bool:
        both = short(record.response) and short(record.refinement)
        return both and len(form.critique(record.feedback)) <= context.config.feedback_window

    return fits


def _show_record(records: Sequence[Record]) -> None:
    """Prints the first one that is kept and whose refinement is another text."""
    for record in records:
        if not record.dropped and record.refinement != record.response:
            print(f"  instruction: {record.instruction}\n    response:    {record.response!r}")
            print(f"    weaknesses:  {record.weaknesses}\n    suggestions: {record.suggestions}")
            scores = f"{feedback_lib.number(record.score)} -> {feedback_lib.number(record.refinement_score)}"
            print(f"    refinement:  {record.refinement!r}  [{scores}]", flush=True)
            return


def make_critic(context: Context) -> Critic:
    """The critic of stage 1 that the config names."""
    config = context.config
    if config.critic.kind == "verifier":
        return critics.verifier_critic(common.seed_of(config, "critic"), config.critic.error_rate)
    if config.critic.kind == "server":
        template = feedback_lib.load_template("critic", config.data.templates)
        return critics.of_first(
            critics.server_critic(config.critic, template, context.workdir.root / "feedback" / "calls")
        )
    other, stage = open_srt(config.critic.workdir)
    model = make_self_critic(other, stage, 0.0, config.critic_feedback.batch_size)
    return critics.self_critic(model, f"{stage} {other.workdir.model_digest(stage)}")


def open_srt(workdir: str) -> tuple[Context, str]:
    """A finished run of SRT, and its last stage.

    Raises:
      ValueError: where it is none.
    """
    context = common.open_workdir(workdir)
    if not isinstance(context.config, SrtConfig):
        raise ValueError(f"{workdir} is not a run of SRT")
    stage = final_stage(context.config)
    common.require(context, [stage])
    return context, stage


def srt_rows(context: Context, records: Sequence[Record], without: str = "") -> list[batches.Turns]:
    """x -> (y, f, r) of Equation 1, as turns that are read and learnt."""
    return [*map(srt_form(context, without), records)]


def srt_form(context: Context, without: str = "") -> Callable[[Record], batches.Turns]:
    """Record -> its row of `srt_rows`."""
    form = make_form(context, without)
    learn = [part for part in context.config.learn if part not in feedback_lib.WITHOUT[without]]
    return lambda r: tuple(form.turns(r.instruction, r.response, r.feedback, learn))


def srt_stage(context: Context, stage: str, without: str = "", share: float = 1.0) -> dict:
    """Stage 1: -sum log P(y, f, r | x) from M_base (Equation 1).

    Args:
      context: of the run.
      stage: its name.
      without: what the sequence leaves out (Table 6).
      share: of the sequences (Figure 5).
    """
    config = context.config
    records = [r for r in read_records(context, "critic_feedback") if not r.dropped]
    rows = batches.Rows(records[: max(1, round(share * len(records)))], srt_form(context, without))
    start = lambda: common.load_model(context, "sft_policy")  # noqa: E731
    return common.likelihood_stage(context, stage, config.policy_model, config.srt, rows, "models/sft_policy", start)


def dpo_pairs(context: Context, records: Sequence[Record]) -> list[tuple[list[int], list[int], list[int]]]:
    """(x, r, y) in ids; answers end as M_self ends them, with the words that a critique begins with."""
    return [*map(pair_form(context), records)]


def pair_form(context: Context) -> Callable[[Record], pairs.Pair]:
    """Record -> its pair of `dpo_pairs`."""
    form, e = make_form(context), context.encoder
    end = list(form.feedback_begins)
    if e.tokenizer.eos_id in end:  # a template that ends the answer's turn: nothing is sampled behind that
        end = end[: end.index(e.tokenizer.eos_id) + 1]
    ids = lambda text: [*e.tokenizer.encode(text), *end]  # noqa: E731
    return lambda r: (form.prompt(r.instruction), ids(r.refinement), ids(r.response))


def dpo_stage(context: Context, number: int) -> dict:
    """Stage 2: DPO with r chosen and y rejected; ref_policy is the model that wrote them (section 3.2)."""
    config, stage = context.config, f"dpo_{number}"
    settings, last = config.dpo, "srt" if number == 1 else f"dpo_{number - 1}"
    records = [r for r in read_records(context, f"self_feedback_{number}") if not r.dropped]
    model = common.model_of(context, last)
    ref_params = common.load_model(context, last)
    if not records:
        context.workdir.save_model(stage, ref_params)
        return {"steps": 0, "rows": 0}
    data = batches.Rows(records, pair_form(context))
    log_probs = dpo.reference_log_probs(model, ref_params, data, settings.batch_size, chunk_size=settings.chunk_size)
    num_steps = settings.num_steps or max(1, round(settings.num_epochs * len(records) / settings.batch_size))
    optimizer = optimizers.make_optimizer(settings.optimizer, num_steps)
    state = loop.run(
        train_state.create(common.with_adapters(context, stage, ref_params), optimizer),
        stage=stage,
        num_steps=num_steps,
        batch_at=pairs.make_pair_batch_at(data, log_probs, settings.batch_size, common.seed_of(config, stage)),
        train_step=dpo.make_train_step(
            model,
            optimizer,
            beta=settings.beta,
            kind=settings.loss,
            label_smoothing=settings.label_smoothing,
            length_normalized=settings.length_normalized,
            chunk_size=settings.chunk_size,
            accumulation=settings.accumulation,
        ),
        directory=context.workdir.checkpoints(stage),
        writer=context.writer,
        profile=context.config.profile,
        save_every=settings.save_every,
    )
    common.leave_model(context, stage, state.params, f"models/{last}")
    return {"steps": num_steps, "rows": len(records)}


def check(config: SrtConfig, todo: set[str]) -> None:
    """What must hold before anything is trained: M_base is there, the critic answers, its template can be read."""
    if todo & {"data", "sft_policy"}:
        common.check_start(config)
    asking = {"critic_feedback": config.critic_feedback}
    asking |= {f"self_feedback_{i}": config.self_feedback for i in range(1, config.num_rounds + 1)}
    for folder in {settings.gap_workdir for stage, settings in asking.items() if stage in todo} - {""}:
        pit.open_finished(folder, ["r_pit"])
    if "critic_feedback" not in todo:
        return
    if config.critic.kind == "workdir":
        open_srt(config.critic.workdir)
    if config.critic.kind == "server":
        feedback_lib.load_template("critic", config.data.templates)
        processes.on_first(lambda: critics.check_server(config.critic))


def stage_functions(context: Context) -> dict[str, Callable[[], dict]]:
    """Every stage but the last, by name."""
    config = context.config
    functions: dict[str, Callable[[], dict]] = {
        "data": lambda: data_stage(context),
        "pretrain": lambda: common.pretrain_stage(context, "pretrain", config.policy_model),
        "sft_policy": lambda: base_stage(context),
        "critic_feedback": lambda: critic_feedback_stage(context),
        "srt": lambda: srt_stage(context, "srt", config.without),
    }
    for i in range(1, config.num_rounds + 1):
        functions[f"self_feedback_{i}"] = functools.partial(self_feedback_stage, context, i)
        functions[f"dpo_{i}"] = functools.partial(dpo_stage, context, i)
    for arm, (without, share) in ARMS.items():
        functions[f"arm_{arm}"] = functools.partial(srt_stage, context, f"arm_{arm}", without or config.without, share)
    return functions


ARMS = {
    "without_score": ("score", 1.0),
    "without_suggestions": ("suggestions", 1.0),
    "without_weaknesses": ("weaknesses", 1.0),
    "without_feedback": ("feedback", 1.0),
    "all_but_refinement": ("all_but_refinement", 1.0),
    "quarter": ("", 0.25),
    "half": ("", 0.5),
}
"""Arm -> (what its sequence leaves out, its share of the sequences)."""

SYSTEM = common.System(stage_names, stage_functions, FIRST_STAGE, check)
