"""What PIT and SRT share: rows, M_pre, supervised stages, scores of reward models, samples."""

import dataclasses
import datetime
import difflib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax import (
    checkpoint,
    config as config_lib,
    files,
    interrupts,
    optimizers,
    processes,
    sampling,
    sharding,
    train_state,
)
from pit_jax.config import ModelConfig, SamplingConfig, SFTConfig
from pit_jax.data import (
    batches,
    builders,
    encode,
    sources,
    synthetic,
    synthetic_text,
    templates,
    texts as texts_lib,
    tokenizer as tokenizer_lib,
)
from pit_jax.data.chat import Chat
from pit_jax.files import read_json, write_json_atomic, write_text_atomic
from pit_jax.learners import loop, reward_model, sft
from pit_jax.metrics import MetricsWriter
from pit_jax.models import hf, lora
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines.stages import FREE_FIELDS, Workdir, run_stage
from pit_jax.types import Params, PreferenceExample, Rollout

REWARD_STAGES = ("r_p", "r_pit", "evaluator")

COT_ARM = "arm_pit_sft_cot"
"""M_PIT^SFT with a chain of thought, beside one without (Figure 5)."""

SPLITS = ("sft", "rm", "rl", "selection", "test", "pretrain")

LENGTHS = "lengths.npz"
"""Beside the rows of a workdir: split -> `encode.token_lengths`."""


@dataclasses.dataclass
class Context:
    """What every stage reads.

    Attributes:
      config: of the run.
      workdir: where everything lies.
      writer: of metrics; None where nothing is trained.
      command: what the user typed to start the run, for messages.
      rows: split -> rows that fit the windows; filled by the data stage.
      encoder: text to ids; filled by the data stage.
    """

    config: Any
    workdir: Workdir
    writer: MetricsWriter | None
    command: str = "python -m pit_jax.train --config=... --workdir=..."
    rows: dict[str, list[PreferenceExample]] = dataclasses.field(default_factory=dict)
    encoder: encode.Encoder | None = None


def pretrained_models(config: Any) -> list[tuple[str, ModelConfig]]:
    """(stage, sizes) of each M_pre: one per distinct size (appendix J allows other sizes for PIT and rewards)."""
    found: dict[ModelConfig, str] = {}
    for name, field in (("", "policy_model"), ("_pit", "pit_model"), ("_reward", "reward_model")):
        if hasattr(config, field):
            found.setdefault(getattr(config, field), f"pretrain{name}")
    return [(stage, sizes) for sizes, stage in found.items()]


def key_of(config: Any, purpose: str) -> jax.Array:
    """A PRNG key per purpose, from the seed and a stable hash of the name."""
    number = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    return jax.random.fold_in(jax.random.key(config.seed), number)


def seed_of(config: Any, purpose: str) -> int:
    """A NumPy seed per purpose."""
    return int.from_bytes(hashlib.sha256(f"{config.seed}/{purpose}".encode()).digest()[:4], "big")


# ---------------------------------------------------------------------------------------------------------------- data


def data_stage(context: Context, words: Sequence[str] = (), tokenizer: str | Path = "") -> dict:
    """Writes rows and tokenizer, drops rows over the windows, and reports what a surface cue would get.

    Args:
      context: of the run.
      words: more text for the vocabulary.
      tokenizer: a file or folder to take; empty: config.tokenizer.path, that of config.pretrain.checkpoint, or one is
        trained.
    """
    config, root = context.config, context.workdir.root / "data"
    shutil.rmtree(root, ignore_errors=True)  # of a start that was killed: the stage is not done
    if config.data.source == "synthetic":
        builders.write_synthetic(
            root,
            seed=config.seed,
            size=config.data.size,
            num_selection=config.data.num_selection,
            num_test=config.data.num_test,
            num_pretrain=config.data.num_pretrain,
        )
        counts, parts = {}, []
    else:
        sizes = config.data.num_selection, config.data.num_test, config.seed
        if config.data.source == "file":
            rows, counts, parts = sources.read_config(config.data, config.seed, answers=needs_answers(config))
            rest, selection, test = sources.split_off(rows, *sizes)
        else:
            rows, published, counts, parts = builders.read_published(config.data.source)
            rest, selection, test, more = sources.split_published(rows, published, *sizes)
            counts |= more
        if needs_answers(config):
            folds = sources.folds(rest, config.seed)
        else:  # M_base has learnt elsewhere: 1 to 3, as the paper's 25,000 and 75,000
            first, *others = sources.folds(rest, config.seed, 4)
            folds = [], first, [row for part in others for row in part]
        splits = dict(zip(SPLITS, (*folds, selection, test, []), strict=True))
        for name, split in splits.items():
            lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in split]
            write_text_atomic(root / f"{name}.jsonl", "".join(lines))
    raw = read_rows(config, root)
    tokenizer = tokenizer or config.tokenizer.path or tokenizer_of(config.pretrain.checkpoint)
    if tokenizer:
        made = tokenizer_lib.load(tokenizer)
    else:
        # From the first fold alone (section 4.1's D_SFT): the others must stay unseen until their stage.
        texts = [text for row in raw["sft"] for text in (row.prompt, row.rejected, row.chosen, row.reflection)]
        texts += words
        if config.pretrain.text:
            texts += vocabulary_sample(plain_text(config))
        if config.data.source == "synthetic":
            # Each word of the lexicon and of the templates whole, in its three cases.
            texts += synthetic_text.word_forms(templates.literals(config.data.templates), *words)
        made = tokenizer_lib.SentencePiece(tokenizer_lib.train(texts, config.tokenizer.vocab_size))
    if isinstance(made, tokenizer_lib.SentencePiece):
        (root / "tokenizer.model").write_bytes(made.model)
    else:
        made.save(root / "tokenizer")
    if config.tokenizer.chat_template:
        template = read_chat_template(config, made)
        # With the date, which some templates say: a run's ids do not change overnight.
        write_json_atomic(root / "chat_template.json", {"template": template, "date": str(datetime.date.today())})
    load_encoder(context)
    encoder = context.encoder
    record: dict[str, Any] = {"steps": 0, "rows": {}, "over_length": {}, "skipped": counts, "sources": parts}
    lengths = {name: encode.token_lengths(split, encoder) for name, split in raw.items()}
    np.savez(root / LENGTHS, **lengths)  # no later start, and no other process, needs to encode everything for them
    record["tokens"] = encode.quantiles(np.concatenate([*lengths.values()]))
    for name, split in raw.items():
        kept, dropped = encode.drop_over_length(split, encoder, lengths[name])
        context.rows[name] = kept
        record["rows"][name] = len(kept)
        if dropped:
            record["over_length"][name] = dropped
    record["vocab_size"] = encoder.tokenizer.vocab_size
    texts = [text for rows in raw.values() for row in rows[:200] for text in (row.prompt, row.chosen)]
    lossy = list(tokenizer_lib.lossy_examples(encoder.tokenizer, texts))
    if lossy:
        record["lossy"] = len(lossy) / len(texts)
        text, back = min(lossy, key=lambda pair: len(pair[0]))
        print(f"  {record['lossy']:.1%} of texts do not come back from the tokenizer: {text!r} as {back!r}")
    if config.data.source == "synthetic":
        record["surface_baselines"] = synthetic.surface_baselines(raw["rm"] + raw["rl"], raw["sft"])
    print(f"  rows {record['rows']}, over the windows and dropped: {record['over_length'] or 'none'}")
    if record["tokens"]:
        found = (f"{name} {' '.join(map(str, values.values()))}" for name, values in record["tokens"].items())
        print(f"  tokens of a row (50%, 90%, 99%, longest): {', '.join(found)}")
    if len(parts) > 1:
        print("  taken: " + ", ".join(f"{part['taken']} rows of {part['path']}" for part in parts))
    if counts:
        print(f"  rows of the source that were left out: {counts}")
    if "surface_baselines" in record:
        shares = ", ".join(f"{k} {v:.3f}" for k, v in record["surface_baselines"].items())
        print(f"  y_w told from y_l without the prompt: {shares}", flush=True)
    needed = ("sft", "rm", "rl", "selection", "test")[0 if needs_answers(config) else 1 :]
    empty = [name for name in needed if not record["rows"][name]]
    if empty:
        raise ValueError(f"no rows are left in {', '.join(empty)}: widen config.data.*_window or give more rows")
    return record


def read_rows(config: Any, root: Path, splits: Sequence[str] = SPLITS) -> dict[str, list[PreferenceExample]]:
    """Splits that the data stage has written."""
    if config.data.source == "synthetic":
        return {name: builders.read(root, name) for name in splits}
    answers = needs_answers(config)
    read = lambda path: sources.read_jsonl(path, answers=answers)[0] if path.stat().st_size else []  # noqa: E731
    return {name: read(root / f"{name}.jsonl") for name in splits}


def needs_answers(config: Any) -> bool:
    """Whether rows must have y_w and y_l: not where M_base comes from elsewhere, and writes all answers itself."""
    return not getattr(config, "base", "")


def load_encoder(context: Context) -> None:
    """Fills `encoder` from a finished data stage."""
    root = context.workdir.root / "data"
    folder, chat = root / "tokenizer", None
    tokenizer = tokenizer_lib.load(folder if folder.is_dir() else root / "tokenizer.model")
    if context.config.tokenizer.chat_template:
        chat = Chat(tokenizer, **read_json(root / "chat_template.json"))
    context.encoder = encode.make_encoder(tokenizer, context.config.data, chat)


def tokenizer_of(checkpoint: str) -> Path | None:
    """What the model of CHECKPOINT has learnt to read: CHECKPOINT/tokenizer, or that of the run of RUN/models/STAGE."""
    path = Path(checkpoint)
    data = path.parent.parent / "data"
    places = path / "tokenizer", data / "tokenizer", data / "tokenizer.model"
    return next((place for place in places if checkpoint and place.exists()), None)


def read_chat_template(config: Any, tokenizer: tokenizer_lib.Tokenizer) -> str:
    """The Jinja template that config.tokenizer.chat_template names."""
    name = config.tokenizer.chat_template
    if name == "model":
        if not tokenizer.chat_template:
            raise ValueError("config.tokenizer.chat_template=model, but no chat template comes with the tokenizer")
        return tokenizer.chat_template
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config.tokenizer.chat_template={name} cannot be read: {error}; or name model") from error


def prompt_ending(context: Context, prompt: str) -> str:
    """What a prompt lacks at its end to look as those that the models learnt from: a blank line after dialogues."""
    if context.config.data.source == "synthetic" or prompt.endswith("\n\n"):
        return ""
    with open(context.workdir.root / "data" / "sft.jsonl", encoding="utf-8") as file:
        learnt = json.loads(next(file))["prompt"]
    return "\n\n" if learnt.endswith("\n\n") else ""


def load_data(context: Context, splits: Sequence[str] = SPLITS) -> None:
    """Fills `rows` and `encoder` from a finished data stage."""
    load_encoder(context)
    root = context.workdir.root / "data"
    raw, lengths = read_rows(context.config, root, splits), {}
    if (root / LENGTHS).is_file():  # not in a workdir of an earlier version
        with np.load(root / LENGTHS) as found:
            lengths = {name: found[name] for name in splits if len(found[name]) == len(raw[name])}
    context.rows = {
        name: encode.drop_over_length(split, context.encoder, lengths.get(name))[0] for name, split in raw.items()
    }


def selection_rows(context: Context, n: int) -> list[PreferenceExample]:
    """The n selection rows that checkpoints of RL are measured on; from the first again where there are fewer."""
    rows = context.rows["selection"]
    return [rows[i % len(rows)] for i in range(n)]


# ---------------------------------------------------------------------------------------------------------- likelihood


def init_params(module: Transformer | ScalarModel, key: jax.Array, without: str = "") -> Params:
    """Parameters born in their layout on the mesh; nothing is drawn for the part `without`, if one is named."""
    return _jitted_init(module, without)(key)


@functools.cache
def _jitted_init(module: Transformer | ScalarModel, without: str) -> Callable[[jax.Array], Params]:
    method = Transformer.full_logits if isinstance(module, Transformer) else None

    def make(key):
        rows = sharding.mesh_shape().get("data", 1)
        one = jnp.zeros((rows, 8), jnp.int32, out_sharding=module.rules.spec("batch", None))
        params = module.init(key, one, one, one, method=method)["params"]
        return {"params": {name: part for name, part in params.items() if name != without}}

    return jax.jit(make)


def shapes(module: Transformer | ScalarModel) -> Params:
    """Shapes and shardings of a module's parameters, for restoring them."""
    return jax.tree.map(lambda x: x, _shapes(module, jax.sharding.get_abstract_mesh()))


@functools.cache
def _shapes(module: Transformer | ScalarModel, mesh: jax.sharding.AbstractMesh) -> Params:
    """Kept, as every model that is read asks for them: to trace a module takes a tenth of a second."""
    del mesh  # that is set
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0)))


def sized(config: ModelConfig, encoder: encode.Encoder) -> ModelConfig:
    """The sizes with the vocabulary that the tokenizer really has, rounded up for the matrix units.

    Models whose tables are given (`num_tokens`) keep them.
    """
    if config.num_tokens:
        if encoder.tokenizer.vocab_size > config.num_tokens:
            raise ValueError(
                f"the tokenizer has {encoder.tokenizer.vocab_size} ids with the control symbols, but the model has "
                f"{config.num_tokens}: leave config.tokenizer.path empty, and that of the checkpoint is taken"
            )
        return config
    return dataclasses.replace(config, vocab_size=batches.round_up(encoder.tokenizer.vocab_size, 128))


def likelihood_stage(
    context: Context,
    stage: str,
    sizes: ModelConfig,
    settings: SFTConfig,
    rows: Sequence[batches.Turns],
    base: str,
    start: Callable[[], Params],
    *,
    loss_on_prompt: bool = False,
    unlikely: Sequence[batches.Turns] = (),
) -> dict:
    """Trains a decoder on rows of (prompt ids, response ids) or more turns: the last parameters stay (appendix F).

    Args:
      context: of the run.
      stage: its name.
      sizes: of the decoder.
      settings: of the training.
      rows: what is made likely.
      base: whose parameters `start` gives, as for `leave_model`; empty where they are random, and get no adapters.
      start: the parameters at step 0.
      loss_on_prompt: whether prompts are learnt too.
      unlikely: rows of section 3.2's unlikelihood terms, three for each of `rows` in turn.
    """
    found = batches.row_sizes(rows, loss_on_prompt)
    order = np.random.default_rng(seed_of(context.config, f"{stage}/order")).permutation(len(rows))
    over_length = 0
    if settings.sequence_length and not unlikely:
        length = settings.sequence_length
        fitting = order[found[order, 0] <= length]
        over_length, order = len(order) - len(fitting), fitting
        if over_length:
            print(f"  {over_length} of {len(rows)} rows are longer than {length} tokens and dropped")
        held = [order[numbers] for numbers in batches.pack(found[order, 0].tolist(), length)]
        most = max(int(found[numbers, 1].sum()) for numbers in held)
    else:
        held = order[:, None]
        if unlikely:
            found = np.maximum(found, batches.row_sizes(unlikely))
        length, most = batches.round_up(int(found[:, 0].max())), int(found[:, 1].max())
    num_sequences, num_targets = len(held), batches.round_up(most, 16)

    def make(numbers: np.ndarray) -> sft.SFTBatch:
        sequences = [[rows[i] for i in held[n]] for n in numbers]
        likely = batches.lay_out(sequences, length, loss_on_prompt=loss_on_prompt)
        # One of the three rows of section 3.2 for each likely one, side by side.
        others = batches.token_rows([unlikely[i] for n in numbers for i in held[n]], length) if unlikely else None
        return sft.SFTBatch(likely, others)

    num_steps = settings.num_steps or max(1, round(settings.num_epochs * num_sequences / settings.batch_size))
    model = Transformer(sized(sizes, context.encoder))
    optimizer = optimizers.make_optimizer(settings.optimizer, num_steps)
    train_step = sft.make_train_step(
        model, optimizer, unlikelihood=settings.unlikelihood, num_targets=num_targets, chunk_size=settings.chunk_size,
        accumulation=settings.accumulation,
    )  # fmt: skip
    state = loop.run(
        train_state.create(with_adapters(context, stage, start()) if base else start(), optimizer),
        stage=stage,
        num_steps=num_steps,
        batch_at=batches.make_batch_at(make, num_sequences, settings.batch_size, seed_of(context.config, stage)),
        train_step=train_step,
        directory=context.workdir.checkpoints(stage),
        writer=context.writer,
        profile=context.config.profile,
        save_every=settings.save_every,
    )
    leave_model(context, stage, state.params, base)
    return {"steps": num_steps, "rows": len(order), "sequences": num_sequences, "over_length": over_length}


def plain_text(config: Any) -> list[str]:
    """The documents of `pretrain.text`, in an order of their own."""
    return texts_lib.in_order(texts_lib.read(config.pretrain.text), seed_of(config, "pretrain/text"))


def vocabulary_sample(documents: Sequence[str], num_documents: int = 1000, num_characters: int = 4000) -> list[str]:
    """The beginnings of the first documents: what a vocabulary is learnt from must not take longer than the model."""
    return [text[:num_characters] for text in documents[:num_documents]]


def pretraining_rows(context: Context) -> list[batches.Turns]:
    """M_pre's rows: plain text where there is some, and dialogues.

    In these an answer is followed by its review, and some reviews by a better answer: (x, y_w, c of y_w), or
    (x, y_l, c, y_w), the two forms of Self-Refine. A review stands directly behind the answer's EOS, where a reward
    model reads its score. A row of preference data that has no reflection (real data) gives two
    plain rows. Text of the world is good and bad: y_l is learnt too, where `pretrain.learn_rejected` says so, and then
    M_P's mistakes are like those of y_l.
    """
    e, share = context.encoder, context.config.pretrain.refinement_share
    examples = context.rows["pretrain"] or context.rows["sft"]
    rows: list[batches.Turns] = []
    if context.config.pretrain.text:
        length, most = context.config.pretrain.sft.sequence_length, context.config.pretrain.text_tokens
        rows += texts_lib.sequences(plain_text(context.config), e.tokenizer, length, most)
    for i, row in enumerate(examples):
        good, bad = e.response(row.chosen), e.response(row.rejected)
        if not row.reflection:
            rows += [(e.policy_prompt(row.prompt), y) for y in (good, bad)]
        elif np.random.default_rng([seed_of(context.config, "pretrain/form"), i]).random() < share:
            read = e.reflection_prompt(row.prompt, bad[:-1])
            ask = e.refinement_prompt(row.prompt, bad[:-1], row.reflection)
            review = e.response(row.reflection)
            behind = len(read) + len(review)
            if ask[:behind] != read + review:
                raise ValueError("templates: refinement.txt must go on where reflection.txt, {feedback}<<End>> end")
            if context.config.pretrain.learn_rejected:
                if read != e.policy_prompt(row.prompt) + bad:
                    raise ValueError("templates: reflection.txt must be policy.txt, {response}<<End>>")
                read, review = e.policy_prompt(row.prompt), bad + review
            rows.append((read, review, ask[behind:], good))
        else:
            all_met = synthetic.reflect(row.requirements, [True] * len(row.requirements))
            rows.append((e.policy_prompt(row.prompt), good + e.response(all_met)))
    return rows


def pretrain_stage(context: Context, stage: str, sizes: ModelConfig) -> dict:
    """M_pre from scratch."""
    settings = context.config.pretrain.sft
    model = Transformer(sized(sizes, context.encoder))
    start = lambda: init_params(model, key_of(context.config, stage))  # noqa: E731
    rows = pretraining_rows(context)
    return likelihood_stage(context, stage, sizes, settings, rows, "", start, loss_on_prompt=settings.loss_on_prompt)


def check_layout(config: Any, mesh: Mapping[str, int]) -> None:
    """Raises ValueError where the sizes of a model cannot be cut over the axes of the mesh."""
    for name in ("policy_model", "pit_model", "reward_model"):
        for field, axis in (("num_kv_heads", "model"), ("mlp_dim", "model"), ("d_model", "data")):
            size = getattr(getattr(config, name, None), field, 0)
            if size % mesh[axis]:
                raise ValueError(
                    f"config.{name}.{field}={size} is no multiple of the {mesh[axis]} devices of the mesh's axis "
                    f"{axis}: set config.mesh.{axis} to a divisor of it"
                )


def starts_from(config: Any) -> tuple[str, str]:
    """(field, value) of the checkpoint that a run starts from; the value is empty where it starts from nothing."""
    base = getattr(config, "base", "")
    return ("base", base) if base else ("pretrain.checkpoint", config.pretrain.checkpoint)


def find_checkpoint(config: Any) -> tuple[Path, int]:
    """Folder and step of the checkpoint that a run starts from.

    Raises:
      ValueError: where there is none.
    """
    field, path = starts_from(config)
    step = checkpoint.latest_step(Path(path))
    if step is None:
        raise ValueError(
            f"config.{field}={path!r} holds no checkpoint of pit_jax: name a RUN/models/STAGE, or what `python -m "
            "pit_jax.convert --from=hf` has made of a model of Hugging Face"
        )
    return Path(path), step


def check_start(config: Any) -> None:
    """Raises ValueError where the checkpoint that a run starts from is not there, or reads ids of another tokenizer."""
    field, path = starts_from(config)
    if not path:
        return
    find_checkpoint(config)
    ours, theirs = config.tokenizer.path, tokenizer_of(path)
    if not ours and not theirs:
        raise ValueError(
            f"config.{field}={path!r} has no tokenizer in it or in its run: set --config.tokenizer.path to that of the "
            "model"
        )
    if ours and theirs and tokenizer_lib.load(ours).digest != tokenizer_lib.load(theirs).digest:
        raise ValueError(
            f"config.{field}={path!r} has learnt ids of {theirs}, not of config.tokenizer.path={ours!r}: leave the "
            "latter out"
        )


FREE_SIZES = ("vocab_size", "num_tokens", "dtype", "remat", "copy_init", "attention", "attention_block")
"""What a config may say otherwise than the converted model that a run starts from; the first two are the model's."""


def of_checkpoint(config: Any) -> Any:
    """The config with the vocabulary of the converted model that it starts from, where it names one.

    Raises:
      ValueError: where the config has other sizes than that model.
    """
    field, path = starts_from(config)
    if not path or not (Path(path) / hf.DESCRIPTION).is_file():
        return config
    found = hf.read_description(path)
    if found.kind != "language_model":
        raise ValueError(f"config.{field}={path} is a {found.kind.replace('_', ' ')}: name a language model")
    theirs, changed = dataclasses.asdict(found.config), {}
    for name in ("policy_model", "pit_model", "reward_model"):
        if not hasattr(config, name):
            continue
        ours = getattr(config, name)
        lines = [
            f"config.{name}.{key} is {value!r}, but must be {theirs[key]!r}"
            for key, value in dataclasses.asdict(ours).items()
            if key not in FREE_SIZES and value != theirs[key]
        ]
        if lines:
            file = "srt_tulu2" if field == "base" else "pit_smollm"
            raise ValueError(
                f"config.{field}={path} is a model of other sizes: {'; '.join(lines)}. "
                f"--config=configs/{file}.py:{path} takes the sizes of any converted model"
            )
        changed[name] = dataclasses.replace(
            ours, vocab_size=found.config.vocab_size, num_tokens=found.config.num_tokens
        )
    return dataclasses.replace(config, **changed)


def load_pretrained(context: Context, sizes: ModelConfig) -> Params:
    """M_pre of a size: of this run's pretrain stage, or of config.pretrain.checkpoint."""
    like = shapes(Transformer(sized(sizes, context.encoder)))
    if context.config.pretrain.checkpoint:
        return checkpoint.restore(*find_checkpoint(context.config), like)
    return context.workdir.load_model(_pretrain_stage(context.config, sizes), like)


def _pretrain_stage(config: Any, sizes: ModelConfig) -> str:
    return {sizes: stage for stage, sizes in pretrained_models(config)}[sizes]


def pretrained_base(config: Any, sizes: ModelConfig) -> str:
    """What `load_pretrained` reads, as for `leave_model`."""
    return config.pretrain.checkpoint or f"models/{_pretrain_stage(config, sizes)}"


def sft_rows(encoder: encode.Encoder, rows: Sequence[PreferenceExample]) -> list[batches.Turns]:
    """x -> y_w."""
    return [(encoder.policy_prompt(r.prompt), encoder.response(r.chosen)) for r in rows]


def sft_policy_stage(context: Context, stage: str, settings: SFTConfig) -> dict:
    """M_P^SFT: -sum log M_P(y_w | x)."""
    config, e = context.config, context.encoder
    rows = batches.Rows(context.rows["sft"], lambda row: sft_rows(e, [row])[0])
    start = lambda: load_pretrained(context, config.policy_model)  # noqa: E731
    base = pretrained_base(config, config.policy_model)
    return likelihood_stage(context, stage, config.policy_model, settings, rows, base, start)


# --------------------------------------------------------------------------------------------- models, scores, samples


def model_of(context: Context, stage: str) -> Transformer | ScalarModel:
    """The module whose parameters a stage leaves behind."""
    config, e = context.config, context.encoder
    if stage in REWARD_STAGES:
        return ScalarModel(sized(config.reward_model, e))
    is_pit = stage in ("sft_pit", "arm_second_rl_only", COT_ARM) or stage.startswith("rl_pit")
    return Transformer(sized(config.pit_model if is_pit else config.policy_model, e))


def load_model(context: Context, stage: str) -> Params:
    """The parameters of a finished stage."""
    return context.workdir.load_model(stage, shapes(model_of(context, stage)))


def with_adapters(context: Context, stage: str, params: Params, of: str = "lora") -> Params:
    """What a stage trains: the parameters that it starts from, with fresh adapters where config.lora says so."""
    config = context.config
    return lora.add(params, config.lora, key_of(config, f"{stage}/{of}")) if config.lora.rank else params


def leave_model(context: Context, stage: str, params: Params, base: str) -> None:
    """Leaves the model of a stage behind: adapters are merged into it, and lie beside it for those who want them.

    Args:
      context: of the run.
      stage: its name.
      params: with its adapters, if it has some.
      base: what it started from: models/STAGE of this run, or a folder that the config names.
    """
    if lora.is_adapted(params):
        description = dataclasses.asdict(context.config.lora) | {"base": base}
        context.workdir.save_adapters(stage, lora.trained(params), description)
    context.workdir.save_model(stage, lora.merge(params))


def policy_groups(encoder: encode.Encoder, rows: Sequence[PreferenceExample]) -> list[tuple[list[int], ...]]:
    """R_P(x, y_w), R_P(x, y_l)."""
    form = lambda x, y: encoder.policy_prompt(x) + encoder.response(y)  # noqa: E731
    return [(form(r.prompt, r.chosen), form(r.prompt, r.rejected)) for r in rows]


@functools.cache
def _jitted_scores(model: ScalarModel):
    return train_state.jit_step(functools.partial(reward_model.group_scores, model))


def score_groups(
    model: ScalarModel, params: Params, groups: Sequence[Sequence[Sequence[int]]], batch_size: int = 64
) -> np.ndarray:
    """Scores [len(groups), C] of rows of ids, in batches of one shape."""
    if not groups:
        return np.zeros((0, 0), np.float32)
    data = batches.score_rows(groups, 32)
    batch_size = batches.round_up(batch_size, sharding.mesh_shape().get("data", 1))
    out = []
    for start in range(0, len(groups), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(groups) - 1)
        batch = sharding.shard_batch(jax.tree.map(lambda x: x[rows], data))  # noqa: B023
        out.append(sharding.to_host(_jitted_scores(model)(params, batch)))
    return np.concatenate(out)[: len(groups)]


@functools.cache
def jitted_generate(model: Transformer, settings: SamplingConfig, eos_id: int, stop: tuple[int, ...] = ()):
    """`sampling.generate` as a compiled function of (params, prompts, key)."""
    decode_model = Transformer(model.config, sharding.DECODE_RULES)

    def run(params, prompts, key):
        gathered = sharding.gather_weights(params, model.rules, model.config.dtype)
        return sampling.generate(gathered, prompts, key, model=decode_model, config=settings, eos_id=eos_id, stop=stop)

    return jax.jit(run)


def sample(
    model: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    window: int,
    settings: SamplingConfig,
    eos_id: int,
    batch_size: int = 128,
) -> list[list[int]]:
    """One response per prompt as ids without EOS, in batches as long as `batches.longest_prompt_length`."""
    responses: list[list[int]] = []
    length = batches.longest_prompt_length(prompts, window) if prompts else 0
    for i, start in enumerate(range(0, len(prompts), batch_size)):
        numbers = np.minimum(np.arange(start, start + batch_size), len(prompts) - 1)
        make = lambda own: batches.prompt_rows([prompts[j] for j in numbers[own]], length)  # noqa: B023, E731
        batch = sharding.make_batch(batch_size, make)
        rollout = jitted_generate(model, settings, eos_id)(params, batch, jax.random.fold_in(key, i))
        responses += response_ids(sharding.to_host(rollout), eos_id)
    return responses[: len(prompts)]


def response_ids(rollout: Rollout, eos_id: int) -> list[list[int]]:
    """Ids of the responses of a rollout on the host, without EOS."""
    R = rollout.response_mask.shape[1]
    rows = zip(rollout.tokens[:, -R:], rollout.response_mask, strict=True)
    return [[int(t) for t, m in zip(tokens, mask, strict=True) if m and t != eos_id] for tokens, mask in rows]


# ---------------------------------------------------------------------------------------------------------------- runs


class System(NamedTuple):
    """A method as a row of stages.

    Attributes:
      stage_names: config -> all stages in order: the first is "data", the last "evaluate".
      stage_functions: context -> every stage but the last, by name; a function returns the stage's record.
      first_stage: field of the config -> the first stage that reads it; all other fields are read from the start.
      check: (config, names of the stages that will run) -> None; raises ValueError where one of them could not,
        before the first one does, and before anything is deleted.
    """

    stage_names: Callable[[Any], list[str]]
    stage_functions: Callable[[Context], dict[str, Callable[[], dict]]]
    first_stage: dict[str, str]
    check: Callable[[Any, set[str]], None] = lambda config, todo: None


def open_workdir(root: str | Path, command: str = Context.command, writes: bool = False) -> Context:
    """Opens a workdir to use what it holds; its data are not read yet.

    Args:
      root: the workdir.
      command: what the user typed, for messages.
      writes: whether small files will be written into it.

    Raises:
      ValueError: where it is no workdir, is of another version, or has no data.
    """
    path = files.place(root) / "config.json"
    if not path.is_file():
        raise ValueError(f"--workdir={root} has no config.json: name the workdir of a `python -m pit_jax.train`")
    values = read_json(path)
    try:
        config = config_lib.from_config_dict(config_lib.class_of(values), config_lib.complete(values))
    except ValueError as error:
        raise ValueError(f"{path} is not of this version of pit_jax: {error}") from error
    context = Context(config, Workdir.of(root, writes), None, command)
    require(context, ["data"])
    load_encoder(context)
    return context


def require(context: Context, stages: Sequence[str]) -> None:
    """Raises ValueError where a stage is not done."""
    lacking = [stage for stage in stages if context.workdir.done(stage) is None]
    if lacking:
        root = context.workdir.root
        raise ValueError(f"workdir {root} has not finished {', '.join(lacking)}: go on with `python -m pit_jax.train`")


def run(
    system: System,
    config: Any,
    root: str | Path,
    evaluate: Callable[[Context], dict],
    only: str | None = None,
    command: str = Context.command,
    redo: str | None = None,
) -> Context:
    """Runs all stages that are not done, or only the one named.

    Args:
      system: whose stages.
      config: of the run.
      root: the workdir.
      evaluate: the last stage; evaluation lies to the right of pipelines, so it is handed in.
      only: a stage name.
      command: what the user typed, for messages.
      redo: a stage name: what it and all later stages left is deleted first. Fields that only these read may then
        differ from those that the workdir was made with.

    Raises:
      ValueError: for an unknown stage, or one whose earlier stages are not done.
    """
    names = system.stage_names(config)
    for flag, name in (("stage", only), ("redo", redo)):
        if name is not None and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"--{flag}={name} is not a stage of this config: {', '.join(names)}.{hint}")
    later = names[names.index(redo) :] if redo else []
    free = [field for field, first in system.first_stage.items() if first in later or (later and first not in names)]
    workdir = Workdir(root, config, (*FREE_FIELDS, *free), claim=False)
    todo = names if only is None else [only]
    is_done = lambda name: name not in later and workdir.done(name) is not None  # noqa: E731
    lacking = [name for name in names[: names.index(only)] if not is_done(name)] if only else []
    if lacking:
        raise ValueError(f"--stage={only} needs {', '.join(lacking)} first: run them, or all without --stage")
    system.check(config, {name for name in (*todo, *later) if not is_done(name)})
    if redo:
        gone = workdir.left_by_others(names) if later != ["evaluate"] else []
        if gone:
            print(f"deleted, as this config has them not: {', '.join(gone)}", flush=True)
        workdir.discard(*later, *gone)
    workdir.claim()
    context = Context(config, workdir, MetricsWriter(workdir.root, workdir.push), command)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    check_layout(config, mesh.shape)
    interrupts.take_back()
    with jax.set_mesh(mesh):
        evaluated = workdir.done("evaluate")
        if evaluated and set(config.arms) - set(evaluated["arms"]):
            workdir.forget("evaluate")  # an arm was added: the tables get its rows
        functions = system.stage_functions(context) | {"evaluate": lambda: evaluate(context)}
        make_data = functions["data"]
        functions["data"] = lambda: processes.on_first(make_data)
        for name in todo:
            if name != "data" and context.encoder is None:
                load_data(context)
            run_stage(workdir, name, functions[name])
            if name == "data":
                workdir.fetch("data")
            workdir.unfinished_feedback(name).unlink(missing_ok=True)
            if name in REWARD_STAGES:
                # Only now: a stage that was killed before its mark chooses again.
                workdir.candidates(name).clear()
        context.writer.close()
    return context
