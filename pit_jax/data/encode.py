"""From rows of text to rows of ids: one tokenisation for SFT, reward models, RL, evaluation and inference."""

import dataclasses
import hashlib
from collections.abc import Sequence

from pit_jax.config import DataConfig
from pit_jax.data import templates
from pit_jax.data.tokenizer import Tokenizer
from pit_jax.types import PreferenceExample


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Templates, tokenizer and windows.

    Attributes:
      tokenizer: ids.
      prompt_window, response_window, reflection_window: limits of config.data.
      template_folder: replaces the templates of the package; empty: none does.
    """

    tokenizer: Tokenizer
    prompt_window: int
    response_window: int
    reflection_window: int
    template_folder: str = ""

    def __post_init__(self):
        load = lambda name: templates.load(name, self.template_folder)  # noqa: E731
        parsed = {name: templates.parse(self.tokenizer, load(name)) for name in templates.FIELDS}
        object.__setattr__(self, "_templates", parsed)

    @property
    def digest(self) -> str:
        """Names vocabulary, templates (which a user may have edited) and windows: all that makes ids of a text."""
        windows = self.prompt_window, self.response_window, self.reflection_window
        return hashlib.sha256(repr((self.tokenizer.digest, self._templates, windows)).encode()).hexdigest()[:16]

    def policy_prompt(self, prompt: str) -> list[int]:
        """Human: {x}Assistant: (appendix A)."""
        return templates.fill(self.tokenizer, self._templates["policy"], prompt=prompt)

    def pit_prompt(self, prompt: str, ref_response: str | Sequence[int]) -> list[int]:
        """Human: {x}Assistant:<<Candidate>> {y_ref}<<Improved>> (appendix A); y_ref as text or as sampled ids."""
        return templates.fill(self.tokenizer, self._templates["pit"], prompt=prompt, ref_response=ref_response)

    def reflection_prompt(self, prompt: str, response: str | Sequence[int]) -> list[int]:
        """Self-Refine's request for feedback (appendix E.1)."""
        return templates.fill(self.tokenizer, self._templates["reflection"], prompt=prompt, response=response)

    def refinement_prompt(self, prompt: str, response: str | Sequence[int], feedback: str | Sequence[int]) -> list[int]:
        """Self-Refine's request for a better answer (appendix E.1)."""
        fields = dict(prompt=prompt, response=response, feedback=feedback)
        return templates.fill(self.tokenizer, self._templates["refinement"], **fields)

    def one_call_prompt(self, prompt: str, response: str | Sequence[int]) -> list[int]:
        """Self-Refine's request for a better answer without feedback (appendix B)."""
        return templates.fill(self.tokenizer, self._templates["one_call"], prompt=prompt, response=response)

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


def make_encoder(tokenizer: Tokenizer, config: DataConfig) -> Encoder:
    """An Encoder with the windows of a config."""
    windows = config.prompt_window, config.response_window, config.reflection_window
    return Encoder(tokenizer, *windows, config.templates)


def drop_over_length(rows: list[PreferenceExample], encoder: Encoder) -> tuple[list[PreferenceExample], dict[str, int]]:
    """Rows that fit the windows, and how many do not, by cause (PIT appendix F drops them; nothing is ever cut)."""
    kept, dropped = [], {"prompt": 0, "response": 0, "reflection": 0}
    size = lambda text: len(encoder.tokenizer.encode(text))  # noqa: E731
    for row in rows:
        if size(row.prompt) > encoder.prompt_window:
            dropped["prompt"] += 1
        elif max(size(row.chosen), size(row.rejected)) + 1 > encoder.response_window:
            dropped["response"] += 1
        elif size(row.reflection) + 1 > encoder.reflection_window:
            dropped["reflection"] += 1
        else:
            kept.append(row)
    return kept, {cause: n for cause, n in dropped.items() if n}
