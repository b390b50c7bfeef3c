"""The legend of dimension letters and the few plain data types that all layers share.

Dimension letters, used in every docstring and einsum of the package:

    B  batch                 T  query length          S  key (cache) length
    D  model width           F  MLP width             N  query heads
    K  key/value heads       G  query heads per key/value head (N = K * G)
    H  head width            L  layers                V  vocabulary
    A  gradient accumulation R  response length       P  prompt length
    C  rows of a group       E  groups of a sequence

`segments` [B, T] replaces the usual padding mask everywhere: 0 marks padding, and two positions see each other only
where their segments are equal, so one integer array serves padding and packing. It comes from lengths, never from
comparing token ids with PAD: a vocabulary may use one id for EOS and PAD. Rows that share what they begin with have
`members` (`ScoreBatch`) beside it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Any
"""A nested dict of arrays."""

Metric = tuple[Array, Array]
"""(sum, weight): a mean is taken once, on the host, so that it does not depend on how a batch was split."""
Metrics = dict[str, Metric]


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One thing that a prompt asks of the answer, as the verifier reads it.

    Attributes:
      kind: a key of `pit_jax.data.verifier.CHECKS`.
      value: its argument: a word, a number in decimal digits, or empty.
    """

    kind: str
    value: str = ""


@dataclasses.dataclass(frozen=True)
class PreferenceExample:
    """One row (x, y_l, y_w, c) of preference data (PIT section 3.1, appendix D).

    Attributes:
      prompt: x.
      rejected: y_l, the worse response.
      chosen: y_w, the better response.
      reflection: c, what y_l lacks; empty where the data have none.
      requirements: what x asks for, where a verifier can check it; empty for real data.
    """

    prompt: str
    rejected: str
    chosen: str
    reflection: str = ""
    requirements: tuple[Requirement, ...] = ()


class TokenBatch(NamedTuple):
    """Token rows for likelihood training.

    Attributes:
      tokens: [B, T] int32.
      segments: [B, T] int32, 0 on padding.
      positions: [B, T] int32, position of the token within its segment.
      loss_mask: [B, T] bool, true on tokens that are training targets (never the first of a segment).
    """

    tokens: Array
    segments: Array
    positions: Array
    loss_mask: Array


class ScoreBatch(NamedTuple):
    """Groups of C token rows that a reward model scores at their last token.

    R_P: C = 2, index 0 chosen and 1 rejected. R_PIT: C = 4, the pairings of `GAP_PAIRINGS`.

    The rows of a group are one sequence, in which tokens that rows begin alike with stand once: a prompt is read once
    for all its answers, a candidate once for all that improve it. Scores are those of the rows on their own. Several
    groups may stand one behind the other in a sequence: they do not see each other.

    Attributes:
      tokens: [B, T] int32, right-padded.
      segments: [B, T] int32, the group in which the token stands, 1, 2, ...; 0 on padding.
      positions: [B, T] int32, position of the token within its row.
      members: [B, T] int32, bit c is set where the token stands in row c of its group; 0 on padding. A token sees those
        of its group before it that stand in all of its rows.
      last: [B, E, C] int32, where in the sequence the last token of each row is; 0 for groups that the sequence has
        not: it has as many as its largest segment says.
    """

    tokens: Array
    segments: Array
    positions: Array
    members: Array
    last: Array


GAP_PAIRINGS = (("w", "l"), ("w", "w"), ("l", "l"), ("l", "w"))
"""(y_1, y_2) of r_gap(x, y_1, y_2) along the group axis of a gap batch, in the order of Equation 1."""


class PromptBatch(NamedTuple):
    """Prompts to be continued, left-padded so that all responses start in the same slot.

    Attributes:
      tokens: [B, P] int32.
      lengths: [B] int32.
    """

    tokens: Array
    lengths: Array


class Rollout(NamedTuple):
    """Sampled responses.

    Attributes:
      tokens: [B, P + R] int32: left-padded prompt, then response.
      segments: [B, P + R] int32: 1 on real tokens up to and including EOS, else 0.
      positions: [B, P + R] int32.
      log_probs: [B, R] float32, of each sampled token under the sampling distribution; 0 where not response_mask.
      response_mask: [B, R] bool, true up to and including EOS.
    """

    tokens: Array
    segments: Array
    positions: Array
    log_probs: Array
    response_mask: Array
