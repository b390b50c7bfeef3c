"""Opens models of Hugging Face here, and ours there.

python -m pit_jax.convert --from=hf --input=DIR_OR_NAME --output=CKPT
python -m pit_jax.convert --to=hf --input=CKPT_OR_RUN/models/STAGE --output=DIR
python -m pit_jax.convert --to=peft --input=RUN/models/STAGE --output=DIR
python -m pit_jax.convert --from=peft --input=DIR --base=CKPT_OR_RUN/models/STAGE --output=CKPT

Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3 (text), as language models or as reward models with one label
(...ForSequenceClassification). A name of the hub is downloaded. CKPT gets 0/ (parameters, float32), model.json (what
they are) and tokenizer/. The tables get a row for each of <<Candidate>> and <<Improved>> that the tokenizer lacks, the
mean of the rows that it knows, and are padded to a multiple of 128.

--to=peft writes the adapters of a stage that was trained with config.lora, for the model that it started from (which
--to=hf exports); --from=peft merges adapters into a model.

--verify=ids.npy --logits=out.npy also writes what our forward pass says in float32 of rows of ids [B, T] without
padding: logits [B, T, V] over the ids that exist, or of a reward model scores [B].
"""

import contextlib
import copy
import dataclasses
import functools
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from pit_jax import checkpoint, cli, config as config_lib, sharding
from pit_jax.config import LAYER_MATRICES, LoraConfig, ModelConfig
from pit_jax.data import batches, hugging_face, templates, tokenizer as tokenizer_lib
from pit_jax.data.tokenizer import IMPROVED, Tokenizer
from pit_jax.files import read_json, sync_directory, write_json_atomic
from pit_jax.models import hf, lora
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines import common
from pit_jax.pipelines.stages import ADAPTERS
from pit_jax.types import Params

_FROM = flags.DEFINE_enum("from", None, ["hf", "peft"], "Read a model of Hugging Face, or adapters of PEFT.")
_TO = flags.DEFINE_enum("to", None, ["hf", "peft"], "Write them.")
_INPUT = flags.DEFINE_string("input", None, "Folder of the model (--from: or its name on the hub).")
_BASE = flags.DEFINE_string("base", None, "--from=peft: the model that the adapters are for, as --input of --to=hf.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must not exist.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "--to: of the files; by default that of the import. --from: of activations (never float16); by default bfloat16 "
    "where the files are, else float32.",
)
_VERIFY = flags.DEFINE_string("verify", None, "An .npy of ids [B, T].")
_LOGITS = flags.DEFINE_string("logits", None, "The .npy to write what our model says of them.")


def module_of(kind: str, config: ModelConfig) -> Transformer | ScalarModel:
    """The module of a kind of hf.KINDS."""
    return ScalarModel(config) if kind == "reward_model" else Transformer(config)


# -------------------------------------------------------------------------------------------------------------- import


def padded(config: ModelConfig, tokenizer: tuple[int, list[str]] | None) -> ModelConfig:
    """The config with rows for the control symbols, and tables padded to a multiple of 128 rows.

    Args:
      config: of `hf.read_config`.
      tokenizer: of `hf.tokenizer_size`.
    """
    rows = config.vocab_size
    num_tokens = rows if tokenizer is None else max(rows, tokenizer[0] + len(tokenizer[1]))
    return dataclasses.replace(config, vocab_size=batches.round_up(num_tokens, 128), num_tokens=num_tokens)


def import_hf(
    source: str, output: Path, dtype: str = "", ids: np.ndarray | None = None
) -> tuple[hf.Description, Params]:
    """A model of Hugging Face as a checkpoint of ours, whole or absent. The mesh must be set.

    Args:
      source: a folder, or a name on the hub.
      output: the checkpoint; must not exist.
      dtype: of activations; empty: bfloat16 where the files are.
      ids: that the model must have, see `check_ids`: told before anything is read.

    Returns:
      (description, parameters).

    Raises:
      ValueError: where the model is not supported or not whole, or the output exists.
    """
    _refuse_existing(output)
    folder = find(source)
    config, kind = hf.read_config(folder)
    files = hf.TensorFiles(folder)
    stored = hf.check_tensors(files, config, kind, folder)
    tokenizer = hf.tokenizer_size(folder)
    if tokenizer is None:
        print(
            f"warning: {folder} has no tokenizer.json or tokenizer.model: no rows for the control symbols are added",
            file=sys.stderr,
        )
    else:
        _try_tokenizer(folder, output)
    rows = config.vocab_size
    config = dataclasses.replace(padded(config, tokenizer), dtype=dtype or _activations(stored))
    check_ids(config, ids)
    values = hf.read_json(folder / "config.json")
    kept = {key: values[key] for key in hf.KEPT if values.get(key) is not None}
    description = hf.Description(kind, values["model_type"], stored, config, kept)
    like = common.shapes(module_of(kind, config))
    params = hf.read_params(files, config, kind, rows, tokenizer[0] if tokenizer else 0, like)
    with _whole(output) as partial:
        checkpoint.save(partial, 0, params)
        (partial / "tokenizer").mkdir()
        _copy(folder, partial / "tokenizer")
        hf.write_description(partial, description)
    return description, params


def _try_tokenizer(folder: Path, output: Path) -> None:
    try:
        tokenizer_lib.load(folder)
    except ValueError as error:
        print(
            f"warning: no run and no export can use the tokenizer of this model: {str(error).rstrip('.')}. The model "
            f"is read all the same; mend the files in {output / 'tokenizer'}",
            file=sys.stderr,
        )


def _activations(stored: str) -> str:
    return "bfloat16" if stored == "bfloat16" else "float32"


def find(source: str) -> Path:
    """The folder of a model; one of the hub is downloaded into its cache, without its pickles.

    Raises:
      ValueError: where it is no folder and cannot be downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise ValueError(f"--input={source} is neither a folder nor a name on the hub (OWNER/MODEL)")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{source} is no folder, and to download it huggingface_hub is needed: pip install -e '.[hf]'"
        ) from error
    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
    ignored = ["*/*", "consolidated*"]  # the same weights under other names
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:  # of the network, of the hub, of a login: they share no class
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--input={source} is no folder, and the hub did not give it ({type(error).__name__}: {reason[:300]}). "
            "Download it where there is a network, and name the folder"
        ) from error


def _copy(source: Path, target: Path) -> None:
    for name in hf.TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ValueError(f"{path} exists: nothing is overwritten. Name another, or move it away")


@contextlib.contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A folder beside `output` that gets its name when all is written, and is removed where that fails."""
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        _refuse_existing(output)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(output.parent)


# -------------------------------------------------------------------------------------------------------------- export


def load(source: Path, ids: np.ndarray | None = None) -> tuple[hf.Description, Params, Tokenizer | None]:
    """A checkpoint of ours: CKPT of an import, or RUN/models/STAGE. The mesh must be set.

    Args:
      source: its folder.
      ids: that the model must have, see `check_ids`.

    Returns:
      (description, parameters, tokenizer where there is one).

    Raises:
      ValueError: where it is neither.
    """
    description, tokenizer = describe(source)
    check_ids(description.config, ids)
    step = checkpoint.latest_step(source)
    if step is None:
        raise ValueError(f"--input={source} holds no checkpoint: the stage has not finished, or the copy is not whole")
    like = common.shapes(module_of(description.kind, description.config))
    return description, checkpoint.restore(source, step, like), tokenizer


def describe(source: Path) -> tuple[hf.Description, Tokenizer | None]:
    """(description, tokenizer where there is one) of what `load` loads."""
    if (source / hf.DESCRIPTION).is_file():
        folder = source / "tokenizer"
        return hf.read_description(source), tokenizer_lib.load(folder) if hf.tokenizer_size(folder) else None
    return _of_run(source)


def _of_run(source: Path) -> tuple[hf.Description, Tokenizer]:
    """What RUN/models/STAGE holds, by the run's config and tokenizer."""
    root = source.absolute().parent.parent
    known = source.absolute().parent.name == "models" and (root / "config.json").is_file()
    if not known:
        raise ValueError(
            f"--input={source} is neither a converted checkpoint (with {hf.DESCRIPTION}) nor a models/STAGE of a run"
        )
    if not source.is_dir():
        stages = sorted(path.name for path in source.absolute().parent.glob("*") if path.is_dir())
        raise ValueError(f"--input={source} does not exist; the run has the models {', '.join(stages) or '(none)'}")
    context = common.open_workdir(root)
    model, tokenizer = common.model_of(context, source.name), context.encoder.tokenizer
    config = model.config
    if not config.num_tokens:  # the tables are rounded up
        config = dataclasses.replace(config, num_tokens=tokenizer.vocab_size)
    form = "" if context.encoder.chat is None else context.encoder.chat.template
    if tokenizer.chat_template and not form:
        print(
            "warning: this run has not learnt the chat template of its tokenizer but the form "
            f"{templates.load('policy', context.encoder.template_folder)!r}, so no chat template goes with it",
            file=sys.stderr,
        )
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = form
    kind, pad = "language_model", tokenizer.pad_id
    if isinstance(model, ScalarModel):
        kind, pad = "reward_model", _pad_of_scores(tokenizer)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}
    ids["max_position_embeddings"] = _length(context)
    kept = {name: i for name, i in ids.items() if i is not None}
    return hf.Description(kind, "", "float32", config, kept), tokenizer


def _pad_of_scores(tokenizer: Tokenizer) -> int:
    """PAD of a reward model: transformers scores the last token that is none, and rows are scored at their EOS."""
    return tokenizer.control_ids[IMPROVED] if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id


def _length(context: common.Context) -> int:
    """Tokens that the model of which a run starts is for, or else all windows of the run and the words around them."""
    _, start = common.starts_from(context.config)
    with contextlib.suppress(ValueError, OSError):  # it need not be there any more
        known = describe(Path(start))[0].kept.get("max_position_embeddings") if start else None
        if known:
            return known
    data = context.config.data
    windows = data.prompt_window + 2 * data.response_window + data.reflection_window
    return windows + getattr(context.config, "feedback_window", 0) + 256


def export_hf(
    source: Path, output: Path, dtype: str = "", ids: np.ndarray | None = None
) -> tuple[hf.Description, Params]:
    """A checkpoint of ours as a model of Hugging Face, whole or absent. The mesh must be set.

    Args:
      source: CKPT of an import, or RUN/models/STAGE.
      output: the folder; must not exist.
      dtype: of the files; empty: that of the import, or float32 of a run.
      ids: that the model must have, see `check_ids`.

    Returns:
      (description with the family that was written, parameters).

    Raises:
      ValueError: where no family of transformers can express the model, or the output exists.
    """
    _refuse_existing(output)
    description, params, tokenizer = load(source, ids)
    _warn_of_bias(params)
    with _whole(output) as partial:
        family = hf.write(partial, params, description, dtype=dtype)
        if tokenizer is not None:
            tokenizer.save(partial)  # with the control symbols, whose rows the tables have
            if not description.family:  # it ends and pads rows as the run did, not as the model that it started from
                end = partial / hugging_face.GENERATION_FILE
                if description.kind == "language_model" and not end.is_file():
                    write_json_atomic(end, {})
                _set(end, eos_token_id=tokenizer.eos_id)
                if description.kept.get("pad_token_id", tokenizer.pad_id) != tokenizer.pad_id:
                    for name in (hugging_face.CONFIG_FILE, hugging_face.MAP_FILE):
                        _set(partial / name, pad_token=IMPROVED)
            if not (partial / hugging_face.FILE).is_file():
                print(
                    f"warning: {output} gets tokenizer.model alone, from which transformers makes its own table: its "
                    "ids may be others where a text has two spaces in a row or one at its ends",
                    file=sys.stderr,
                )
        else:
            print(f"warning: {source} has no tokenizer: {output} gets none", file=sys.stderr)
    return description._replace(family=family), params


def _set(path: Path, **fields) -> None:
    if path.is_file():
        write_json_atomic(path, read_json(path) | fields)


def _warn_of_bias(params: Params) -> None:
    bias = float(params.get("params", {}).get("bias", 0.0))
    if bias:
        print(
            f"warning: the scores of this reward model have a bias of {bias:.6g}, for which a model of Hugging Face "
            "has no place: its scores are lower by that, and their order and differences stay",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------------------------------------------------- peft


PEFT_TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TASKS = {"language_model": "CAUSAL_LM", "reward_model": "SEQ_CLS"}
_SCORE = "base_model.model.score.weight"


def _adapted(config: ModelConfig, kind: str) -> dict[str, str]:
    """Our name of what can have adapters -> theirs, with {} for the layer, by the table of `hf`."""
    found = {}
    for tensor in hf.tensors_of(config, kind):
        if tensor.ours[-2:-1] == ("layers",) and tensor.ours[-1] in LAYER_MATRICES:
            outputs, inputs = tensor.their_axes.split()
            assert tensor.our_axes == inputs + outputs, f"{tensor} needs a transposition"
            found[tensor.ours[-1]] = f"base_model.model.{tensor.theirs.removesuffix('.weight')}"
    return found


def _adapted_shapes(description: hf.Description, config: LoraConfig) -> Params:
    """Shapes and layouts of a model with adapters."""
    params = common.shapes(module_of(description.kind, description.config))
    return jax.eval_shape(lambda p: lora.add(p, config, jax.random.key(0)), params)


def export_peft(
    source: Path, output: Path, dtype: str = "", ids: np.ndarray | None = None
) -> tuple[hf.Description, Params, str]:
    """The adapters of a stage as PEFT reads them, whole or absent. The mesh must be set.

    Args:
      source: RUN/models/STAGE of a run with config.lora.
      output: the folder; must not exist.
      dtype: of the file; empty: float32.
      ids: that the model must have, see `check_ids`.

    Returns:
      (description of the stage's model, what was trained, what it is for: models/STAGE of the run, or a checkpoint).

    Raises:
      ValueError: where the stage has no adapters, no family can express its model, or the output exists.
    """
    _refuse_existing(output)
    description, tokenizer = describe(source)
    check_ids(description.config, ids)
    _, family = hf.exported_config(description.config, description.family)
    folder = source.absolute().parent.parent / "adapters" / source.absolute().name
    if source.absolute().parent.name != "models" or not (folder / ADAPTERS).is_file():
        raise ValueError(
            f"--input={source} has no adapters (in {folder}): name the models/STAGE of a stage that was trained with "
            "--config.lora.rank=RANK, or export the whole model with --to=hf"
        )
    values = read_json(folder / ADAPTERS)
    base = values.pop("base")
    config = config_lib.from_config_dict(LoraConfig, values, ADAPTERS)
    trained = checkpoint.restore(folder, 0, lora.trained(_adapted_shapes(description, config)))
    _warn_of_bias(trained)
    is_reward = description.kind == "reward_model"
    if is_reward:
        _warn_of_padding(base_of(source, base), tokenizer)
    stored = next(d for d in hf.DTYPES.values() if d.name == (dtype or "float32"))
    layers = (trained["lora"]["backbone"] if is_reward else trained["lora"])["layers"]
    rank, arrays, names = config.rank, {}, _adapted(description.config, description.kind)
    for ours in config.targets:
        theirs = names[ours]
        a, b = (np.asarray(layers[ours][x], np.float32) for x in "ab")
        for i in range(len(a)):
            arrays[f"{theirs.format(i)}.lora_A.weight"] = a[i].reshape(-1, rank).T
            arrays[f"{theirs.format(i)}.lora_B.weight"] = b[i].reshape(rank, -1).T
    if is_reward:
        arrays[_SCORE] = np.asarray(trained["params"]["head"])[None]
    arrays = {name: np.ascontiguousarray(x.astype(stored)) for name, x in arrays.items()}
    if not all(np.isfinite(x.astype(np.float32)).all() for x in arrays.values()):
        raise ValueError(f"the adapters have numbers that {stored.name} cannot hold: use --dtype=bfloat16")
    values = {
        "peft_type": "LORA",
        "task_type": _TASKS[description.kind],
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "target_modules": [names[ours].split(".")[-1] for ours in config.targets],
        "modules_to_save": ["score"] if is_reward else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with _whole(output) as partial:
        partial.mkdir()
        hf.write_tensors(partial / PEFT_TENSORS, arrays)
        write_json_atomic(partial / PEFT_CONFIG, values)
    return description._replace(family=family), trained, base


def base_of(source: Path, base: str) -> Path:
    """Where the model is that adapters of RUN/models/STAGE are for: in the run, or a checkpoint."""
    inside = source.absolute().parent.parent / base
    return inside if inside.is_dir() else Path(base)


def _warn_of_padding(base: Path, tokenizer: Tokenizer) -> None:
    """Where the model has no PAD to tell from an EOS, which is where rows are scored."""
    try:
        kept = describe(base)[0].kept
    except ValueError:
        kept = {}
    ends = kept.get("eos_token_id", tokenizer.eos_id)
    if kept.get("pad_token_id") in (None, *(ends if isinstance(ends, list) else [ends])):
        begins = tokenizer.bos_id not in (None, tokenizer.eos_id)
        pad = tokenizer.bos_id if begins else tokenizer.control_ids[IMPROVED]
        print(
            "warning: transformers scores the last token that is not PAD, and the model of these adapters has no PAD "
            f"but its EOS: open it by AutoModelForSequenceClassification.from_pretrained(DIR, num_labels=1, "
            f"pad_token_id={pad}), and fill rows with that id",
            file=sys.stderr,
        )


def read_peft_config(folder: Path, config: ModelConfig, kind: str) -> LoraConfig:
    """What adapters of PEFT are.

    Args:
      folder: with adapter_config.json.
      config, kind: of the model that they are for.

    Raises:
      ValueError: where there is none, and for what we have no place for; it names the fields.
    """
    path = folder / PEFT_CONFIG
    if not path.is_file():
        raise ValueError(f"--input={folder} has no {PEFT_CONFIG}: name a folder that save_pretrained of PEFT wrote")
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object: restore it from a copy")
    wanted: dict[str, tuple] = {"peft_type": ("LORA",), "task_type": (_TASKS[kind], None), "bias": ("none", None)}
    for field in ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layers_to_transform"):
        wanted[field] = (False, None, {}, [])
    wanted["alora_invocation_tokens"] = (None, [])
    # Of others, such as pissa, PEFT takes a part out of the base when it opens the adapters.
    wanted["init_lora_weights"] = (True, False, None, "gaussian")
    wanted["modules_to_save"] = (["score"],) if kind == "reward_model" else (None, [])
    problems = [f"{field} is {values.get(field)!r}" for field in wanted if values.get(field) not in wanted[field]]
    names = {theirs.split(".")[-1]: ours for ours, theirs in _adapted(config, kind).items()}
    modules = values.get("target_modules")
    modules = list(names) if modules == "all-linear" else modules
    if not isinstance(modules, list) or not modules or not all(module in [*names] for module in modules):
        problems.append(f"target_modules is {modules!r}, but must list some of {', '.join(names)}")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        problems.append(f"r and lora_alpha are {rank!r} and {alpha!r}, but must be above 0")
    if problems:
        raise ValueError(f"{path} is of adapters that cannot be read here:" + "".join(f"\n  {p}" for p in problems))
    return LoraConfig(rank, float(alpha), tuple(ours for theirs, ours in names.items() if theirs in modules))


def import_peft(source: Path, base: Path, output: Path, ids: np.ndarray | None = None) -> tuple[hf.Description, Params]:
    """A checkpoint of ours with adapters of PEFT merged into it, whole or absent. The mesh must be set.

    Args:
      source: the folder of the adapters.
      base: the model that they are for: CKPT of an import, or RUN/models/STAGE.
      output: the checkpoint; must not exist.
      ids: that the model must have, see `check_ids`.

    Returns:
      (description, parameters).

    Raises:
      ValueError: where there are others than LoRA's of this model, they are not whole, or the output exists.
    """
    _refuse_existing(output)
    description, params, tokenizer = load(base, ids)
    kind = description.kind
    config = read_peft_config(source, description.config, kind)
    like = _adapted_shapes(description, config)["lora"]
    layers = (like["backbone"] if kind == "reward_model" else like)["layers"]
    given = hf.read_tensors(source / PEFT_TENSORS)
    num_layers, problems = description.config.num_layers, []

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        x = given.pop(name, None)
        if x is None or x.shape != shape:
            problems.append(f"{name}: is missing" if x is None else f"{name}: has shape {x.shape}, not {shape}")
            return np.zeros(shape, np.float32)
        return x.astype(np.float32)

    def put(leaf, rows: list[np.ndarray]):
        return jax.device_put(np.stack(rows).reshape(leaf.shape), leaf.sharding.spec)

    changed: dict = {}
    names = _adapted(description.config, kind)
    for ours in config.targets:
        a, b = layers[ours]["a"], layers[ours]["b"]
        a_shape, b_shape = (config.rank, math.prod(a.shape[1:-1])), (math.prod(b.shape[2:]), config.rank)
        modules = [names[ours].format(i) for i in range(num_layers)]
        changed[ours] = {
            "a": put(a, [take(f"{module}.lora_A.weight", a_shape).T for module in modules]),
            "b": put(b, [take(f"{module}.lora_B.weight", b_shape).T for module in modules]),
        }
    changed = {"lora": {"layers": changed} if kind == "language_model" else {"backbone": {"layers": changed}}}
    if kind == "reward_model":
        head = jax.device_put(take(_SCORE, (1, description.config.d_model))[0], jax.P(None))
        changed["params"] = {"head": head, "bias": jax.device_put(np.float32(0.0), jax.P())}
    problems += [f"{name}: is unknown" for name in sorted(given)]
    if problems:
        lines = "".join(f"\n  {p}" for p in problems[:20])
        raise ValueError(f"the tensors of {source / PEFT_TENSORS} do not fit the model {base}:{lines}")
    params = lora.merge(lora.with_trained(lora.add(params, config, jax.random.key(0)), changed))
    with _whole(output) as partial:
        checkpoint.save(partial, 0, params)
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer")
        hf.write_description(partial, description)
    return description, params


# ------------------------------------------------------------------------------------------------------------- command


def read_ids(path: Path) -> np.ndarray:
    """Ids [B, T] of an .npy file.

    Raises:
      ValueError: where it holds something else.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--verify={path} is no .npy of numbers ({error})") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        found = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else "an archive"
        raise ValueError(f"--verify={path} holds {found}, but must hold whole numbers of shape [B, T]")
    return ids


def check_ids(config: ModelConfig, ids: np.ndarray | None) -> None:
    """Raises ValueError for ids that the model does not have."""
    num_tokens = config.num_tokens or config.vocab_size
    if ids is not None and (ids.min() < 0 or ids.max() >= num_tokens):
        raise ValueError(f"--verify has ids from {ids.min()} to {ids.max()}, but the model has 0 to {num_tokens - 1}")


def forward(description: hf.Description, params: Params, ids: np.ndarray) -> np.ndarray:
    """What a model says of rows of ids [B, T] in float32: logits [B, T, num_tokens], or scores [B] of the last token.

    Raises:
      ValueError: for ids that the model does not have.
    """
    config = dataclasses.replace(description.config, dtype="float32")
    num_tokens = config.num_tokens or config.vocab_size
    check_ids(config, ids)
    model = module_of(description.kind, config)
    method = Transformer.full_logits if isinstance(model, Transformer) else None
    apply = jax.jit(functools.partial(model.apply, method=method))
    size = sharding.mesh_shape().get("data", 1)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), (size, ids.shape[1]))
    out = []
    for start in range(0, len(ids), size):
        rows = ids[np.minimum(np.arange(start, start + size), len(ids) - 1)].astype(np.int32)
        said = np.asarray(apply(params, *sharding.shard_batch((rows, np.ones_like(rows), positions))))
        out.append(said[:, -1] if method is None else said[..., :num_tokens])
    return np.concatenate(out)[: len(ids)].astype(np.float32)


def check_flags(
    source: str | None,
    target: str | None,
    dtype: str | None,
    verify: str | None,
    logits: str | None,
    base: str | None = None,
) -> None:
    """Raises ValueError where flags contradict one another: --from, --to, --dtype, --verify, --logits, --base."""
    if bool(source) == bool(target):
        raise ValueError("name one of --from=hf and --to=hf (or peft in the place of hf)")
    if (source == "peft") != bool(base):
        raise ValueError("--from=peft and --base=MODEL go together: the model that the adapters are for")
    if source == "peft" and dtype:
        raise ValueError("--dtype is not for --from=peft: the checkpoint is float32, activations as in --base")
    if bool(verify) != bool(logits):
        raise ValueError("--verify=IDS.npy and --logits=OUT.npy go together")
    if source and dtype == "float16":
        raise ValueError("--dtype=float16 is for files (--to=hf): activations are float32 or bfloat16")


def convert() -> None:
    """Does what the flags say."""
    check_flags(_FROM.value, _TO.value, _DTYPE.value, _VERIFY.value, _LOGITS.value, _BASE.value)
    output, ids = Path(_OUTPUT.value), read_ids(Path(_VERIFY.value)) if _VERIFY.value else None
    _refuse_existing(output, *([Path(_LOGITS.value)] if _LOGITS.value else []))
    if _LOGITS.value and not Path(_LOGITS.value).absolute().parent.is_dir():
        raise ValueError(f"--logits={_LOGITS.value}: there is no folder {Path(_LOGITS.value).parent}")
    with jax.set_mesh(sharding.make_mesh()):
        if _FROM.value == "hf":
            description, params = import_hf(_INPUT.value, output, _DTYPE.value or "", ids)
        elif _FROM.value == "peft":
            description, params = import_peft(Path(_INPUT.value), Path(_BASE.value), output, ids)
        elif _TO.value == "peft":
            source = Path(_INPUT.value)
            description, params, base = export_peft(source, output, _DTYPE.value or "", ids)
            at = base_of(source, base)
            print(f"adapters for {at}: write that by python -m pit_jax.convert --to=hf --input={at} --output=DIR")
        else:
            description, params = export_hf(Path(_INPUT.value), output, _DTYPE.value or "", ids)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        if ids is not None and _TO.value == "peft":
            params = load(source)[1]
        name = f"{'what was trained of ' * (_TO.value == 'peft')}a {description.kind.replace('_', ' ')}"
        print(
            f"{output}: {name} of family {description.family}, {count:,} parameters, "
            f"{description.config.num_tokens or description.config.vocab_size:,} ids"
        )
        if ids is not None:
            said = forward(description, params, ids)
            partial = Path(f"{_LOGITS.value}.partial")
            with open(partial, "wb") as file:
                np.save(file, said)
            partial.rename(_LOGITS.value)
            print(f"{_LOGITS.value}: float32 of shape {list(said.shape)}")


def main(argv: list[str]) -> None:
    """A user's mistake ends in one line on stderr and status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    with cli.one_line_errors("nothing was written"):
        convert()


def run() -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    flags.mark_flags_as_required(["input", "output"])
    app.run(main, flags_parser=cli.parse_flags)


if __name__ == "__main__":
    run()
