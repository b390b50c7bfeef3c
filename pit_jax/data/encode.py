"""From rows of text to rows of ids: one tokenisation for SFT, reward models, RL, evaluation and inference."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from pit_jax.config import DataConfig
from pit_jax.data import templates
from pit_jax.data.chat import Chat
from pit_jax.data.tokenizer import Tokenizer
from pit_jax.types import PreferenceExample


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Templates, tokenizer and windows.

    Attributes:
      tokenizer: ids.
      prompt_window, response_window, reflection_window: limits of config.data.
      template_folder: replaces the templates of the package; empty: none does.
      chat: the chat template in whose turns all templates are written; None: as they stand.
    """

    tokenizer: Tokenizer
    prompt_window: int
    response_window: int
    reflection_window: int
    template_folder: str = ""
    chat: Chat | None = None

    def __post_init__(self):
        load = lambda name: templates.load(name, self.template_folder)  # noqa: E731
        parse = self.chat.parse if self.chat else functools.partial(templates.parse, self.tokenizer)
        parsed = {name: parse(load(name)) for name in templates.FIELDS}
        object.__setattr__(self, "_templates", parsed)

    @property
    def digest(self) -> str:
        """Names vocabulary, templates (which a user may have edited) and windows: all that makes ids of a text."""
        windows = self.prompt_window, self.response_window, self.reflection_window
        made = self.tokenizer.digest, self._templates, windows
        return hashlib.sha256(repr(made if self.chat is None else (*made, self.chat.digest)).encode()).hexdigest()[:16]

    def prompt(self, prompt: str) -> list[int]:
        """Ids of x as a field of a template."""
        return self.chat.prompt(prompt) if self.chat else self.tokenizer.encode(prompt)

    def _fill(self, name: str, prompt: str | Sequence[int], **fields: str | Sequence[int]) -> list[int]:
        x = self.prompt(prompt) if isinstance(prompt, str) else prompt
        return templates.fill(self.tokenizer, self._templates[name], prompt=x, **fields)

    def policy_prompt(self, prompt: str) -> list[int]:
        """Human: {x}Assistant: (appendix A)."""
        return self._fill("policy", prompt)

    def pit_prompt(self, prompt: str, ref_response: str | Sequence[int]) -> list[int]:
        """Human: {x}Assistant:<<Candidate>> {y_ref}<<Improved>> (appendix A); y_ref as text or as sampled ids."""
        return self._fill("pit", prompt, ref_response=ref_response)

    def reflection_prompt(self, prompt: str, response: str | Sequence[int]) -> list[int]:
        """Self-Refine's request for feedback (appendix E.1)."""
        return self._fill("reflection", prompt, response=response)

    def refinement_prompt(self, prompt: str, response: str | Sequence[int], feedback: str | Sequence[int]) -> list[int]:
        """Self-Refine's request for a better answer (appendix E.1)."""
        return self._fill("refinement", prompt, response=response, feedback=feedback)

    def one_call_prompt(self, prompt: str, response: str | Sequence[int]) -> list[int]:
        """Self-Refine's request for a better answer without feedback (appendix B)."""
        return self._fill("one_call", prompt, response=response)

    def response(self, text: str) -> list[int]:
        """Ids of a response with EOS."""
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]

    def text(self, ids, mask=None) -> str:
        """Text of response ids (up to EOS)."""
        if mask is not None:
            ids = [i for i, m in zip(ids, mask, strict=True) if m]
        return self.tokenizer.decode(ids)

    # Room for the ids that are no field: BOS, template words, control symbols, and feedback in the longest form.
    @property
    def policy_window(self) -> int:
        """Longest policy prompt."""
        return self.prompt_window + len(self.policy_prompt(""))

    @property
    def pit_window(self) -> int:
        """Longest PIT prompt."""
        return self.prompt_window + self.response_window + len(self.pit_prompt("", ""))

    @property
    def reflection_prompt_window(self) -> int:
        """Longest reflection prompt."""
        return self.prompt_window + self.response_window + len(self.reflection_prompt("", ""))

    @property
    def one_call_prompt_window(self) -> int:
        """Longest prompt of the one-call form."""
        return self.prompt_window + self.response_window + len(self.one_call_prompt("", ""))

    @property
    def refinement_prompt_window(self) -> int:
        """Longest refinement prompt."""
        window = self.prompt_window + self.response_window + self.reflection_window
        return window + len(self.refinement_prompt("", "", ""))


def make_encoder(tokenizer: Tokenizer, config: DataConfig, chat: Chat | None = None) -> Encoder:
    """An Encoder with the windows of a config; with `chat`, its tokenizer is the chat's."""
    windows = config.prompt_window, config.response_window, config.reflection_window
    return Encoder(chat.tokenizer if chat else tokenizer, *windows, config.templates, chat)


TEXTS = ("prompt", "rejected", "chosen", "reflection")
"""Of a row, in the order of `token_lengths`."""


def token_lengths(rows: Sequence[PreferenceExample], encoder: Encoder) -> np.ndarray:
    """Tokens [len(rows), 4] int32 of x, y_l, y_w and c, as the windows count them: all but x with EOS."""
    size = lambda text: len(encoder.tokenizer.encode(text)) if text else 0  # noqa: E731
    found = [[len(encoder.prompt(row.prompt)), *(size(getattr(row, name)) for name in TEXTS[1:])] for row in rows]
    return np.asarray(found, np.int32).reshape(-1, len(TEXTS)) + np.asarray([0, 1, 1, 1], np.int32)


def quantiles(lengths: np.ndarray) -> dict[str, dict[str, int]]:
    """50%, 90%, 99% and maximum of `token_lengths`, by text: the smallest length that so many rows do not exceed."""
    if not len(lengths):
        return {}
    shares = {"50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
    found = np.quantile(lengths, [*shares.values()], axis=0, method="inverted_cdf")
    return {name: dict(zip(shares, map(int, found[:, i]), strict=True)) for i, name in enumerate(TEXTS)}


def drop_over_length(
    rows: list[PreferenceExample], encoder: Encoder, lengths: np.ndarray | None = None
) -> tuple[list[PreferenceExample], dict[str, int]]:
    """Rows that fit the windows, and how many do not, by cause (PIT appendix F drops them; nothing is ever cut).

    Args:
      rows: of any length.
      encoder: has the windows.
      lengths: `token_lengths` of the rows, where they are known.
    """
    lengths = token_lengths(rows, encoder) if lengths is None else lengths
    x, y_l, y_w, c = lengths.T
    over = {
        "prompt": x > encoder.prompt_window,
        "response": np.maximum(y_l, y_w) > encoder.response_window,
        "reflection": c > encoder.reflection_window,
    }
    fits, dropped = np.ones(len(rows), bool), {}
    for cause, too_long in over.items():  # the first cause counts
        dropped[cause] = int(np.sum(too_long & fits))
        fits &= ~too_long
    return [rows[i] for i in np.flatnonzero(fits)], {cause: n for cause, n in dropped.items() if n}
