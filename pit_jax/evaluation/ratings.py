"""Ratings of several sets of answers from comparisons of two: Elo and Bradley-Terry (PIT section 4.7, Table 3).

Comparisons are three arrays of one entry per comparison, in their order:

    first    [n] int, index of the player (here: of the set of answers) on the first side
    second   [n] int, of the player on the second side
    outcome  [n], 1 where the first wins, -1 where the second does, 0 for a tie, as `win_rate.compare` returns them

A tie is half a win. Ratings are on the Elo scale: 400 points are odds of 10 to 1.

Result rows are dicts {name, rating, low, high, rank, rank_low, rank_high, n} in the order of the players. Rank 1 is the
best, equal ratings share the better rank, and n counts the player's comparisons.
"""

from collections.abc import Sequence

import numpy as np

from pit_jax.evaluation import win_rate
from pit_jax.types import Array

INITIAL = 1000.0
SCALE = 400.0
BASE = 10.0

_BLOCK = 64
"""Resamples that are fitted together."""


def all_pairs(scores: Array, *, tie_band: tuple[float, float] | None = None) -> dict[str, np.ndarray]:
    """Every answer to a prompt against every other: the 55 comparisons of 11 answers of section 4.7.

    Args:
      scores: [prompts, players], the judge's score of each player's answer.
      tie_band: as `win_rate.compare` takes it.

    Returns:
      {"first", "second", "outcome", "groups"}, [prompts * players * (players - 1) / 2] each, prompt by prompt; groups
      holds the prompt.

    Raises:
      ValueError: where the scores have another shape, there are fewer than two players, or a score is NaN.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores have the shape {scores.shape}: [prompts, players] with at least two players.")
    first, second = np.triu_indices(scores.shape[1], k=1)
    num_prompts = scores.shape[0]
    return {
        "first": np.tile(first, num_prompts),
        "second": np.tile(second, num_prompts),
        "outcome": win_rate.compare(scores[:, first].ravel(), scores[:, second].ravel(), tie_band=tie_band),
        "groups": np.repeat(np.arange(num_prompts), first.size),
    }


def elo(
    first: Array, second: Array, outcome: Array, num_players: int, *, k: float = 4.0, initial: float = INITIAL
) -> np.ndarray:
    """Elo ratings by one update per comparison, in the given order.

    The side that is expected to win with the probability p = 1 / (1 + 10^((r_other - r) / 400)) gains k * (1 - p) when
    it wins and loses k * p when it does not; the other side pays. K = 4 is that of Chatbot Arena (Zheng et al., 2023),
    whose script the paper uses.

    Args:
      first: [n] int, player on the first side, from 0.
      second: [n] int, player on the second.
      outcome: [n] of 1, -1 (the second wins) and 0 (half a win each).
      num_players: number of players; one without comparisons keeps `initial`.
      k: size of an update, in rating points.
      initial: rating at the start.

    Returns:
      [num_players] float64; their mean is `initial`.

    Raises:
      ValueError: where the arrays do not hold comparisons of `num_players` players.
    """
    first, second, outcome = _comparisons(first, second, outcome, num_players)
    return _elo(first, second, outcome, num_players, k, initial)


def elo_shuffled(
    first: Array,
    second: Array,
    outcome: Array,
    num_players: int,
    *,
    names: Sequence[str] | None = None,
    k: float = 4.0,
    initial: float = INITIAL,
    num_shuffles: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict]:
    """Elo over random orders of the comparisons, as its ratings and ranks change with the order (section 4.7).

    The interval says how much the order matters. It does not say how much other prompts would matter; that is what the
    interval of `bradley_terry` says.

    Args:
      first, second, outcome, num_players, k, initial: as `elo` takes them.
      names: of the players; None: "0", "1", ...
      num_shuffles: number of orders.
      seed: of the orders.
      level: share of the orders that low and high hold.

    Returns:
      Rows as the module says: rating is the mean over orders, rank is the rank of that mean, and rank_low and rank_high
      are the best and the worst rank in any of the orders.

    Raises:
      ValueError: as `elo`, and where a setting or the number of names is wrong.
    """
    first, second, outcome = _comparisons(first, second, outcome, num_players)
    names = _names(names, num_players)
    _check_resampling(num_shuffles, level, "num_shuffles")
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(first.size) for _ in range(num_shuffles))
    ratings = np.stack([_elo(first[i], second[i], outcome[i], num_players, k, initial) for i in orders])
    ranks = _ranks(ratings)
    return _rows(
        names,
        ratings.mean(axis=0),
        np.quantile(ratings, _tails(level), axis=0),
        (ranks.min(axis=0), ranks.max(axis=0)),
        _num_comparisons(first, second, num_players),
    )


def bradley_terry(
    first: Array,
    second: Array,
    outcome: Array,
    num_players: int,
    *,
    names: Sequence[str] | None = None,
    groups: Array | None = None,
    prior: float = 0.0,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict]:
    """Bradley-Terry ratings: P(i beats j) = 1 / (1 + 10^((r_j - r_i) / 400)), by maximum likelihood, with mean 1000.

    Unlike Elo the ratings do not depend on the order of the comparisons.

    The interval is a bootstrap over groups. A resample gives every group a weight from the exponential distribution
    (the Bayesian bootstrap, Rubin 1981) instead of a count: no group gets 0, so where the comparisons have finite
    ratings each resample has them too.

    Args:
      first, second, outcome, num_players: as `elo` takes them.
      names: of the players; None: "0", "1", ...
      groups: [n], the prompt of each comparison; all comparisons of a prompt get one weight. None: each its own.
      prior: ties that are added between every two players, any number from 0. 0 is maximum likelihood. With more than
        0 the ratings are finite whatever the comparisons are.
      num_resamples: of the bootstrap.
      seed: of the resamples.
      level: coverage of low, high, rank_low and rank_high.

    Returns:
      Rows as the module says; rank_low and rank_high bound the rank as low and high bound the rating.

    Raises:
      ValueError: as `elo`; where a setting or the number of names or groups is wrong; where some players never lost to
        the others, or never met them, so that no finite ratings are the most likely ones.
    """
    first, second, outcome = _comparisons(first, second, outcome, num_players)
    names = _names(names, num_players)
    _check_resampling(num_resamples, level, "num_resamples")
    if not (np.isfinite(prior) and prior >= 0):
        raise ValueError(f"prior={prior} ties between every two players: it must be a number from 0.")
    groups = np.arange(first.size) if groups is None else np.asarray(groups)
    if groups.shape != first.shape:
        raise ValueError(f"groups have the shape {groups.shape}, the comparisons {first.shape}: one group for each.")
    groups, num_groups = np.unique(groups, return_inverse=True)[1], np.unique(groups).size

    # Cell (i, j) of the win matrix counts wins of i over j; every comparison has a share in two cells.
    cells = np.concatenate([first * num_players + second, second * num_players + first])
    shares = np.concatenate([(1 + outcome) / 2, (1 - outcome) / 2])
    virtual = prior / 2 * (1 - np.eye(num_players))

    def wins(weights: np.ndarray) -> np.ndarray:
        counts = np.bincount(cells, np.tile(weights[groups], 2) * shares, minlength=num_players**2)
        return counts.reshape(num_players, num_players) + virtual

    counts = wins(np.ones(num_groups))
    _check_finite(counts, names)
    strengths = _fit(counts[None])[0]
    rng = np.random.default_rng(seed)
    resampled = []
    for start in range(0, num_resamples, _BLOCK):
        size = min(_BLOCK, num_resamples - start)
        resampled.append(_fit(np.stack([wins(rng.exponential(size=num_groups)) for _ in range(size)])))
    to_elo = lambda x: INITIAL + SCALE / np.log(BASE) * x  # noqa: E731
    ratings = to_elo(np.concatenate(resampled))
    return _rows(
        names,
        to_elo(strengths),
        np.quantile(ratings, _tails(level), axis=0),
        # A rank is a whole number, and so is its bound.
        np.quantile(_ranks(ratings), _tails(level), axis=0, method="inverted_cdf"),
        _num_comparisons(first, second, num_players),
    )


def _elo(first, second, outcome, num_players, k, initial) -> np.ndarray:
    # Plain Python: 55,000 comparisons take 15 ms. One NumPy call per step costs more than the update itself, and a
    # jitted scan takes longer to compile than 100 orders take here.
    ratings = [float(initial)] * num_players
    base, scale = BASE, SCALE
    for i, j, result in zip(first.tolist(), second.tolist(), ((1 + outcome) / 2).tolist(), strict=True):
        change = k * (result - 1 / (1 + base ** ((ratings[j] - ratings[i]) / scale)))
        ratings[i] += change
        ratings[j] -= change
    return np.array(ratings)


def _fit(wins: np.ndarray) -> np.ndarray:
    """The strengths with mean 0 that maximise sum_ij wins_ij log sigma(s_i - s_j), by Newton's method.

    Args:
      wins: [resamples, players, players].

    Returns:
      [resamples, players], in nats.
    """
    games = wins + wins.swapaxes(1, 2)
    strengths = np.zeros(wins.shape[:2])

    def log_likelihood(s):
        return -(wins * np.logaddexp(0, s[:, None, :] - s[:, :, None])).sum((1, 2))

    value = log_likelihood(strengths)
    for _ in range(200):
        p = np.exp(-np.logaddexp(0, strengths[:, None, :] - strengths[:, :, None]))
        gradient = (wins - games * p).sum(2)
        information = games * p * (1 - p)
        hessian = np.eye(games.shape[1]) * information.sum(2)[..., None] - information
        # Equal strengths for all change nothing: the added constant makes the solution the one with mean 0.
        step = np.linalg.solve(hessian + information.mean((1, 2), keepdims=True), gradient[..., None])[..., 0]
        size = np.ones(len(wins))
        for _ in range(60):
            new = strengths + size[:, None] * step
            new_value = log_likelihood(new)
            worse = new_value < value - 1e-12 * np.abs(value)
            if not worse.any():
                break
            size[worse] /= 2
        strengths, value = new, new_value
        if np.abs(step).max() < 1e-10:
            return strengths - strengths.mean(1, keepdims=True)
    raise AssertionError("Newton's method did not converge on a concave likelihood.")


def _check_finite(wins: np.ndarray, names: Sequence[str]) -> None:
    """Finite ratings exist where every player beat or tied every other through a chain of players (Ford, 1957)."""
    reaches = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(max(1, len(wins).bit_length())):
        reaches = reaches @ reaches
    if reaches.all():
        return
    # The players that the fewest others reach: nobody outside that set has a win or a tie against it.
    top = reaches[:, int(reaches.sum(0).argmin())]
    inside, outside = np.flatnonzero(top), np.flatnonzero(~top)
    met = (wins + wins.T)[np.ix_(inside, outside)].sum() > 0
    what = "never lost to the others" if met else "never met the others"
    raise ValueError(
        f"{', '.join(names[i] for i in inside)} {what} ({', '.join(names[i] for i in outside)}): no finite ratings are "
        "the most likely ones. Add comparisons, leave these players out, or give prior=1, a tie between every two."
    )


def _comparisons(first, second, outcome, num_players: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if num_players < 2:
        raise ValueError(f"num_players={num_players}: ratings compare at least two.")
    columns = {"first": np.asarray(first), "second": np.asarray(second), "outcome": np.asarray(outcome)}
    shapes = {name: x.shape for name, x in columns.items()}
    if len(set(shapes.values())) > 1 or len(shapes["first"]) != 1 or not columns["first"].size:
        raise ValueError(f"one entry per comparison is asked for, and at least one; the shapes are {shapes}.")
    for name in ("first", "second"):
        x = columns[name]
        if not np.issubdtype(x.dtype, np.integer):
            raise ValueError(f"{name} holds {x.dtype}, but a player is a whole number from 0.")
        wrong = np.flatnonzero((x < 0) | (x >= num_players))
        if wrong.size:
            raise ValueError(
                f"{name} holds {x[wrong[0]]} in comparison {wrong[0]}: players are 0 to {num_players - 1}."
            )
    same = np.flatnonzero(columns["first"] == columns["second"])
    if same.size:
        raise ValueError(f"comparison {same[0]} is of player {columns['first'][same[0]]} with itself.")
    wrong = np.flatnonzero(~np.isin(columns["outcome"], (-1, 0, 1)))
    if wrong.size:
        raise ValueError(f"the outcome of comparison {wrong[0]} is {columns['outcome'][wrong[0]]}: it is 1, 0 or -1.")
    return columns["first"].astype(np.int64), columns["second"].astype(np.int64), columns["outcome"].astype(np.float64)


def _names(names: Sequence[str] | None, num_players: int) -> list[str]:
    names = [str(i) for i in range(num_players)] if names is None else list(names)
    if len(names) != num_players:
        raise ValueError(f"there are {len(names)} names for {num_players} players.")
    return names


def _check_resampling(number: int, level: float, name: str) -> None:
    if number < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"{name}={number} must be at least 1, and level={level} between 0 and 1.")


def _tails(level: float) -> list[float]:
    return [(1 - level) / 2, (1 + level) / 2]


def _ranks(ratings: np.ndarray) -> np.ndarray:
    """[..., players] -> the same, 1 + how many are strictly better."""
    return 1 + (ratings[..., None, :] > ratings[..., :, None]).sum(-1)


def _num_comparisons(first: np.ndarray, second: np.ndarray, num_players: int) -> np.ndarray:
    return np.bincount(np.concatenate([first, second]), minlength=num_players)


def _rows(names, ratings, bounds, rank_bounds, counts) -> list[dict]:
    ranks = _ranks(ratings)
    return [
        {
            "name": names[i],
            "rating": float(ratings[i]),
            "low": float(bounds[0][i]),
            "high": float(bounds[1][i]),
            "rank": int(ranks[i]),
            "rank_low": int(rank_bounds[0][i]),
            "rank_high": int(rank_bounds[1][i]),
            "n": int(counts[i]),
        }
        for i in range(len(names))
    ]
