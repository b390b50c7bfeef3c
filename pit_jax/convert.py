"""Opens models of Hugging Face here, and ours there.

python -m pit_jax.convert --from=hf --input=DIR_OR_NAME --output=CKPT
python -m pit_jax.convert --to=hf --input=CKPT_OR_RUN/models/STAGE --output=DIR

Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3 (text), as language models or as reward models with one label
(...ForSequenceClassification). A name of the hub is downloaded. CKPT gets 0/ (parameters, float32), model.json (what
they are) and tokenizer/. The tables get a row for each of <<Candidate>> and <<Improved>> that the tokenizer lacks, the
mean of the rows that it knows, and are padded to a multiple of 128.

--verify=ids.npy --logits=out.npy also writes what our forward pass says in float32 of rows of ids [B, T] without
padding: logits [B, T, V] over the ids that exist, or of a reward model scores [B].
"""

import contextlib
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

from pit_jax import checkpoint, cli, sharding
from pit_jax.config import ModelConfig
from pit_jax.data import batches, tokenizer as tokenizer_lib
from pit_jax.data.tokenizer import Tokenizer
from pit_jax.files import sync_directory
from pit_jax.models import hf
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines import common
from pit_jax.types import Params

_FROM = flags.DEFINE_enum("from", None, ["hf"], "Read a model of Hugging Face.")
_TO = flags.DEFINE_enum("to", None, ["hf"], "Write one.")
_INPUT = flags.DEFINE_string("input", None, "Folder of the model (--from: or its name on the hub).")
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


def import_hf(source: str, output: Path, dtype: str = "") -> tuple[hf.Description, Params]:
    """A model of Hugging Face as a checkpoint of ours, whole or absent. The mesh must be set.

    Args:
      source: a folder, or a name on the hub.
      output: the checkpoint; must not exist.
      dtype: of activations; empty: bfloat16 where the files are.

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
    rows = config.vocab_size
    config = dataclasses.replace(padded(config, tokenizer), dtype=dtype or _activations(stored))
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
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))
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


def load(source: Path) -> tuple[hf.Description, Params, Tokenizer | None]:
    """A checkpoint of ours: CKPT of an import, or RUN/models/STAGE. The mesh must be set.

    Returns:
      (description, parameters, tokenizer where there is one).

    Raises:
      ValueError: where it is neither.
    """
    if (source / hf.DESCRIPTION).is_file():
        description, folder = hf.read_description(source), source / "tokenizer"
        tokenizer = None if hf.tokenizer_size(folder) is None else tokenizer_lib.load(folder)
    else:
        description, tokenizer = _of_run(source)
    step = checkpoint.latest_step(source)
    if step is None:
        raise ValueError(f"--input={source} holds no checkpoint: the stage has not finished, or the copy is not whole")
    like = common.shapes(module_of(description.kind, description.config))
    return description, checkpoint.restore(source, step, like), tokenizer


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
    kind = "reward_model" if isinstance(model, ScalarModel) else "language_model"
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    kept = {name: i for name, i in ids.items() if i is not None}
    return hf.Description(kind, "", "float32", config, kept), tokenizer


def export_hf(source: Path, output: Path, dtype: str = "") -> tuple[hf.Description, Params]:
    """A checkpoint of ours as a model of Hugging Face, whole or absent. The mesh must be set.

    Args:
      source: CKPT of an import, or RUN/models/STAGE.
      output: the folder; must not exist.
      dtype: of the files; empty: that of the import, or float32 of a run.

    Returns:
      (description with the family that was written, parameters).

    Raises:
      ValueError: where no family of transformers can express the model, or the output exists.
    """
    _refuse_existing(output)
    description, params, tokenizer = load(source)
    bias = float(params["params"]["bias"]) if description.kind == "reward_model" else 0.0
    if bias:
        print(
            f"warning: the scores of this reward model have a bias of {bias:.6g}, for which a model of Hugging Face "
            "has no place: its scores are lower by that, and their order and differences stay",
            file=sys.stderr,
        )
    with _whole(output) as partial:
        family = hf.write(partial, params, description, dtype=dtype)
        if tokenizer is not None:
            tokenizer.save(partial)  # with the control symbols, whose rows the tables have
        else:
            print(f"warning: {source} has no tokenizer: {output} gets none", file=sys.stderr)
    return description._replace(family=family), params


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


def forward(description: hf.Description, params: Params, ids: np.ndarray) -> np.ndarray:
    """What a model says of rows of ids [B, T] in float32: logits [B, T, num_tokens], or scores [B] of the last token.

    Raises:
      ValueError: for ids that the model does not have.
    """
    config = dataclasses.replace(description.config, dtype="float32")
    num_tokens = config.num_tokens or config.vocab_size
    if ids.min() < 0 or ids.max() >= num_tokens:
        raise ValueError(f"--verify has ids from {ids.min()} to {ids.max()}, but the model has 0 to {num_tokens - 1}")
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


def check_flags(source: str | None, target: str | None, dtype: str | None, verify: str | None, logits: str | None):
    """Raises ValueError where flags contradict one another: --from, --to, --dtype, --verify, --logits."""
    if bool(source) == bool(target):
        raise ValueError("name one of --from=hf and --to=hf")
    if bool(verify) != bool(logits):
        raise ValueError("--verify=IDS.npy and --logits=OUT.npy go together")
    if source and dtype == "float16":
        raise ValueError("--dtype=float16 is for files (--to=hf): activations are float32 or bfloat16")


def convert() -> None:
    """Does what the flags say."""
    check_flags(_FROM.value, _TO.value, _DTYPE.value, _VERIFY.value, _LOGITS.value)
    output, ids = Path(_OUTPUT.value), read_ids(Path(_VERIFY.value)) if _VERIFY.value else None
    _refuse_existing(output, *([Path(_LOGITS.value)] if _LOGITS.value else []))
    with jax.set_mesh(sharding.make_mesh()):
        if _FROM.value:
            description, params = import_hf(_INPUT.value, output, _DTYPE.value or "")
        else:
            description, params = export_hf(Path(_INPUT.value), output, _DTYPE.value or "")
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        print(
            f"{output}: a {description.kind.replace('_', ' ')} of family {description.family}, {count:,} parameters, "
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
