"""Reward models of Hugging Face as judges: sequence classifiers with one output, on PyTorch.

An encoder such as OpenAssistant/reward-model-deberta-v3-large-v2 reads (prompt, answer) as a pair of texts; a model
whose tokenizer has a chat template reads a turn of the user and one of the assistant.
"""

import bisect
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class HfRewardModel(NamedTuple):
    """A model that `score` uses.

    Attributes:
      model: a transformers sequence classifier with one output, in evaluation mode.
      tokenizer: its tokenizer.
      max_length: tokens of prompt and answer together, special tokens included.
      chat: whether texts go through the tokenizer's chat template.
    """

    model: Any
    tokenizer: Any
    max_length: int
    chat: bool


def load(
    name_or_path: str | Path, max_length: int | None = None, *, device: str = "", dtype: str = "float32"
) -> HfRewardModel:
    """A reward model from a local folder or the Hugging Face hub. Code that comes with a model is not run.

    Args:
      name_or_path: a folder, or a name on the hub.
      max_length: longest row in tokens; by default what tokenizer and config allow.
      device: of PyTorch; by default a GPU where there is one.
      dtype: of the parameters: float32, bfloat16 or float16.

    Raises:
      ImportError: where torch or transformers is not installed.
      ValueError: where the model cannot be read, has not one output or has an untrained head, or where max_length is
        needed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"the reward model {name_or_path} needs torch and transformers: pip install -e '.[parity]' ({error})"
        ) from error
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r}: use float32, bfloat16 or float16.")
    name = str(name_or_path)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.num_labels != 1:
            raise ValueError(
                f"it has {config.num_labels} outputs, but a reward model has one (num_labels=1). Is it a classifier, "
                "or a language model without a reward head?"
            )
        model, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
        if loaded["missing_keys"]:
            raise ValueError(f"the checkpoint lacks the parameters {sorted(loaded['missing_keys'])[:5]}.")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"reward model {name} cannot be loaded: {error}") from error
    if max_length is None:
        limits = tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)
        # A tokenizer without a limit says 1e30.
        max_length = min((limit for limit in limits if limit and limit < 1e9), default=None)
    if max_length is None or max_length < 1:
        raise ValueError(f"reward model {name} does not say how long a row may be: give a max_length of at least 1.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return HfRewardModel(model.to(device).eval(), tokenizer, int(max_length), bool(tokenizer.chat_template))


def score(
    reward_model: HfRewardModel, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 16
) -> np.ndarray:
    """r(x, y) of each row.

    A row that is longer than max_length loses the beginning of its prompt, never a part of its answer. A special token
    that is written in a text gets a space after its first character, so that it stays text. Both are warned about, with
    the number of rows.

    Args:
      reward_model: see `load`.
      prompts: [n].
      answers: [n].
      batch_size: rows at a time; it changes the speed only. A decoder without a PAD token takes one row at a time.

    Returns:
      [n] float64.

    Raises:
      ValueError: where the lengths differ, or an answer by itself is longer than max_length; nothing is scored then.
    """
    import torch

    if len(prompts) != len(answers):
        raise ValueError(f"there are {len(prompts)} prompts and {len(answers)} answers: one answer per prompt.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    rows = _rows(reward_model, prompts, answers)
    pad = reward_model.model.config.get_text_config().pad_token_id
    scores = np.zeros(len(rows), np.float64)
    order = sorted(
        range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])
    )  # little padding; memory runs out at once
    size = batch_size if pad is not None else 1
    with torch.inference_mode():
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            inputs = _pad([rows[i] for i in chosen], 0 if pad is None else pad)
            tensors = {name: torch.tensor(x, device=reward_model.model.device) for name, x in inputs.items()}
            scores[chosen] = reward_model.model(**tensors).logits[:, 0].double().cpu().numpy()
    return scores


def _rows(reward_model: HfRewardModel, prompts: Sequence[str], answers: Sequence[str]) -> list[dict[str, list[int]]]:
    """The inputs of each row, within max_length."""
    special = _special_tokens(reward_model.tokenizer)
    limit = reward_model.max_length
    rows, too_long, cut, marked = [], [], [], []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        x, y = (special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text) for text in (prompt, answer))
        if (x, y) != (prompt, answer):
            marked.append(i)
        row = _encode(reward_model, x, y)
        if len(row["input_ids"]) > limit:
            cut.append(i)
            fits = lambda k: len(_encode(reward_model, x[k:], y)["input_ids"]) <= limit  # noqa: B023, E731
            first = bisect.bisect_left(range(len(x) + 1), True, key=fits)
            if first > len(x):
                too_long.append(i)
                continue
            row = _encode(reward_model, x[first:], y)
        rows.append(row)
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(prompts)} answers alone are longer than max_length={limit} tokens (rows "
            f"{_some(too_long)}): raise max_length or leave them out."
        )
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(prompts)} rows are longer than max_length={limit} tokens (rows {_some(cut)}): the "
            "beginning of their prompts was cut off.",
            stacklevel=3,
        )
    if marked:
        warnings.warn(
            f"{len(marked)} of {len(prompts)} rows have special tokens of the model written in their texts (rows "
            f"{_some(marked)}): a space was put into each.",
            stacklevel=3,
        )
    return rows


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _special_tokens(tokenizer: Any) -> re.Pattern:
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) is found nowhere


def _encode(reward_model: HfRewardModel, prompt: str, answer: str) -> dict[str, list[int]]:
    tokenizer = reward_model.tokenizer
    if reward_model.chat:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        inputs = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)
        names = ("input_ids",)
    else:
        inputs = tokenizer(prompt, answer, verbose=False)  # else it warns of long rows, which are cut here
        names = ("input_ids", "token_type_ids")
    return {name: list(inputs[name]) for name in names if name in inputs}


def _pad(rows: list[dict[str, list[int]]], pad: int) -> dict[str, np.ndarray]:
    """[B, S] arrays, padded on the right by the PAD of the model, which may not be that of the tokenizer."""
    lengths = np.asarray([len(row["input_ids"]) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    inputs = {"attention_mask": mask.astype(np.int64)}
    for name in rows[0]:
        inputs[name] = np.full(mask.shape, pad if name == "input_ids" else 0, np.int64)
        inputs[name][mask] = np.concatenate([row[name] for row in rows])
    return inputs
