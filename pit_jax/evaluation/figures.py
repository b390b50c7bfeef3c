"""The paper's figures from a results dict, as SVG that is the same, byte by byte, wherever the numbers are the same.

`tables` says what a results dict holds. Text stays text, so a figure is small and can be searched. Figures are narrow,
with panels above each other, so that they can be read on a telephone.
"""

import io
import re
from xml.etree import ElementTree

import numpy as np

from pit_jax.evaluation import tables

INK, QUIET, GRID, PAPER = "#1f2428", "#5f676f", "#dfe2e5", "#ffffff"
"""Text, axes, grid and ground. A page with a dark scheme may replace these, and `SERIES`, by colours of its own."""

SERIES = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#50575e")
"""Blue to green are Okabe and Ito's, which the colour-blind tell apart; lines and markers differ as well."""

_STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), "-.", (0, (7, 2, 1.5, 2)), (0, (3, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_WIDTH = 4.2  # inches; fonts are in points, so this decides how large they are on a screen of given width

_ACRONYMS = {"pit": "PIT", "rl": "RL", "sft": "SFT", "cot": "CoT", "llm": "LLM", "kl": "KL", "r": "R", "p": "P"}
_NAMES = {
    "self_refine": "Self-Refine",
    "r_pit": "R_PIT",
    "r_p": "R_P",
    "rl_pit_1": "first RL",
    "rl_pit_2": "first and second RL",
    "arm_second_rl_only": "second RL only",
    "rl_policy": "RL of M_P",
    "stage1": "stage 1",
    "stage2": "stage 2",
    "self_stage1": "M_self, stage 1",
    "self_stage2": "M_self, stage 2",
    "srt_stage1": "SRT stage 1",
    "srt_stage2": "SRT stage 2",
    "base": "M_base",
    "base_greedy": "M_base, greedy",
    "refined_base": "M_base refined",
    "answer1": "stage 1's answer",
    "answer2": "stage 2's answer",
    "srt_rerank": "best of N by self-score",
    "rerank": "best of N by self-score",
}
_PAIRINGS = {
    "chosen_rejected": "(y_w, y_l)",
    "chosen_chosen": "(y_w, y_w)",
    "rejected_rejected": "(y_l, y_l)",
    "rejected_chosen": "(y_l, y_w)",
}


def proper(name: str) -> str:
    """A name of the results dict as prose writes it: "pit_vs_self_refine" is "PIT vs. Self-Refine"."""
    first, versus, second = name.partition("_vs_")
    if versus:
        return f"{proper(first)} vs. {proper(second)}"
    if name in _NAMES:
        return _NAMES[name]
    plain, at, temperature = name.rpartition("_t")
    if at and re.fullmatch(r"[\d.]+", temperature):
        return f"{proper(plain)}, T = {temperature}"
    return " ".join(_ACRONYMS.get(word, word) for word in name.replace("self_refine", "Self-Refine").split("_"))


def draw(results: dict) -> dict[str, str]:
    """The figures that a results dict has numbers for.

    Returns:
      name -> SVG, a whole file each, with an aria-label of title and caption.

    Raises:
      ImportError: where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install -e '.[report]'.") from error
    style = {
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 8.5,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "figure.facecolor": PAPER,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "pit_jax",
    }
    results = tables.in_order(results)
    described = captions(results)
    drawn = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(style)
        for name, (title, caption) in described.items():
            figure = _FIGURES[name](results)
            drawn[name] = _svg(figure, name, title, caption)
    return drawn


def captions(results: dict) -> dict[str, tuple[str, str]]:
    """Title and caption of each figure of `draw`, in reading order: what is seen, and of how many prompts."""
    found: dict[str, tuple[str, str]] = {}
    has = lambda *keys: all(results.get(key) for key in keys)  # noqa: E731
    delta = "Delta is the win rate less the lose rate: above 0 the first is better."
    bars = "Bars are 95% intervals."
    if has("comparisons"):
        n = _ns(s for judges in results["comparisons"].values() for s in judges.values())
        where = "SRT Table 3" if has("srt") else "Tables 1 and 2"
        found["win_rates"] = (f"Who wins, by judge ({where})", f"{delta} {bars} {n}.")
    if has("gap_distributions"):
        n = results.get("reward_models", {}).get("r_pit", {}).get("n")
        of = f" {n:,} labelled pairs." if n else ""
        found["fig2_gap_distributions"] = (
            "Gaps of R_PIT by pairing (Figure 2)",
            "Equation 1 asks that the gap of (y_w, y_l) lies above those of equal qualities, and these above that of "
            f"(y_l, y_w).{of}",
        )
    if has("temperature_sweep"):
        n = _ns(_swept(results["temperature_sweep"]))
        found["fig3_temperature"] = ("Temperature (Figure 3)", f"{delta} {bars} {n} at each temperature.")
    if has("rl_rewards") and results["rl_rewards"].get("stages"):
        rewards = results["rl_rewards"]
        low, high = rewards.get("similar") or (None, None)
        band = "" if low is None else f" Similar is from {low:.2f} to {high:.2f}; Better lies above it, Worse below."
        curves = rewards["stages"].values()
        of = f" {rewards['n']:,} selection prompts." if rewards.get("n") else ""
        thin = " Thin lines: answers to training prompts." if any(c.get("training_reward") for c in curves) else ""
        found["fig4_rl_rewards"] = (
            "Reward during RL (Figure 4)",
            f"Mean r_gap of R_PIT; thick lines with points: each checkpoint on selection prompts.{of}{thin}"
            f"{band} A ring marks the chosen checkpoint.",
        )
    if has("chain_of_thought"):
        if "temperatures" in results["chain_of_thought"]:
            n = f"{_ns(_swept(results['chain_of_thought']))} at each temperature"
        else:
            n = _ns(s for judges in results["chain_of_thought"].values() for s in judges.values())
        found["fig5_chain_of_thought"] = ("Chain of thought (appendix K, Figure 5)", f"{delta} {bars} {n}.")
    if has("kl_reward"):
        count = sum(len(points["steps"]) for points in results["kl_reward"].values())
        found["kl_reward"] = (
            "Reward against KL (appendix F)",
            f"{count} checkpoints of RL, on selection prompts, with their steps; the ring marks the chosen one. Bands "
            "are KL groups; their best checkpoints are filled.",
        )
    if _measures(results.get("iterations", {})):
        n = _ns(s for rows in results["iterations"].values() for row in rows for s in (row.get("delta") or {}).values())
        found["iterations"] = (
            f"Iterations, and the same at equal cost ({tables.iterated_section(results['iterations'])})",
            f"Left by iteration, right by tokens read and written per prompt. {delta} The second is "
            f"{tables.iterated_against(results['iterations'])}. {bars} {n}.",
        )
    if has("self_scores"):
        of = results["self_scores"]
        n = max(sum(x) for row in of.values() for x in row["histograms"].values())
        found["srt_scores"] = (
            "Scores that M_self gives (SRT Figure 3)",
            f"Its own answers and their refinements, each scored by itself, from 1 to 10. {n:,} prompts.",
        )
        if any(row.get("quality") for row in of.values()):
            found["srt_quality"] = (
                "Refinements by their score (SRT Figure 6)",
                "Share of requirements met by the refinements that get this score; larger points are more of them.",
            )
    if points := _sequences(results):
        n = _ns(s for _, judges in points for s in judges.values())
        found["srt_sequences"] = (
            "How many sequences stage 1 learns from (SRT Figure 5)",
            f"Refinements of SRT stage 1 against M_base. {delta} {bars} {n}.",
        )
    if any(_rated(of) for of in results.get("ratings", {}).values()):
        n = ", ".join(
            f"{judge}: {of['num_comparisons']:,} comparisons"
            for judge, of in results["ratings"].items()
            if of.get("num_comparisons")
        )
        found["elo"] = ("Ratings (Table 3)", f"Higher is better. {bars} {n}{'.' if n else ''}".strip())
    return found


def _win_rates(results: dict):
    comparisons = results["comparisons"]
    judges = _judges(comparisons)
    names = list(comparisons)[::-1]
    figure, axes = _panels(1, 1, [0.5 + len(names) * (0.12 + 0.07 * len(judges))])
    axis = axes[0, 0]
    for j, judge in enumerate(judges):
        shift = _dodge(j, len(judges), 0.5, down=True)
        at = [(i + shift, comparisons[name].get(judge)) for i, name in enumerate(names)]
        at = [(y, s) for y, s in at if _told(s)]
        _intervals(axis, [s["delta"] * 100 for _, s in at], [y for y, _ in at], [s for _, s in at], j, judge, False)
    axis.axvline(0, color=QUIET, linewidth=0.9)
    axis.set_yticks(range(len(names)), [proper(name) for name in names])
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("delta (points of percent)")
    _legend(figure, axes)
    return figure


def _fig2_gap_distributions(results: dict):
    distributions = results["gap_distributions"]
    figure, axes = _panels(1, 1, [2.3])
    axis, edges = axes[0, 0], np.asarray(distributions["edges"], float)
    for i, (pairing, density) in enumerate(distributions["density"].items()):
        label, color = _PAIRINGS.get(pairing, proper(pairing)), SERIES[i % len(SERIES)]
        axis.stairs(density, edges, color=color, linestyle=_STYLES[i % len(_STYLES)], linewidth=1.5, label=label)
        axis.stairs(density, edges, color=color, fill=True, alpha=0.12)
    axis.axvline(0, color=QUIET, linewidth=0.9)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("r_gap(x, y1, y2)")
    axis.set_ylabel("density")
    _legend(figure, axes)
    return figure


def _fig3_temperature(results: dict):
    return _by_temperature(results["temperature_sweep"])


def _by_temperature(sweep: dict):
    judges = _judges(sweep["comparisons"])
    figure, axes = _panels(len(judges), 1, [1.8] * len(judges))
    temperatures = np.asarray(sweep["temperatures"], float)
    gap = np.diff(np.sort(temperatures)).min() if len(temperatures) > 1 else 1.0
    for axis, judge in zip(axes[:, 0], judges, strict=True):
        for i, (name, of) in enumerate(sweep["comparisons"].items()):
            told = [(t, s) for t, s in zip(temperatures, of.get(judge) or [], strict=False) if _told(s)]
            x = [t + _dodge(i, len(sweep["comparisons"]), 0.3 * gap) for t, _ in told]
            summaries = [s for _, s in told]
            _intervals(axis, x, [100 * s["delta"] for s in summaries], summaries, i, proper(name), True, "line")
        axis.axhline(0, color=QUIET, linewidth=0.9)
        axis.set_title(judge)
        axis.set_ylabel("delta (points)")
        axis.set_xticks(temperatures)
    axes[-1, 0].set_xlabel("sampling temperature")
    _legend(figure, axes)
    return figure


def _fig4_rl_rewards(results: dict):
    rewards = results["rl_rewards"]
    figure, axes = _panels(1, 1, [2.6])
    axis = axes[0, 0]
    for i, (stage, curve) in enumerate(rewards["stages"].items()):
        color = SERIES[i % len(SERIES)]
        steps, values = curve["steps"], curve["reward"]
        if curve.get("training_reward"):
            axis.plot(curve["training_steps"], curve["training_reward"], color=color, linewidth=0.8, alpha=0.55)
        axis.plot(
            steps, values, color=color, linestyle=_STYLES[i % len(_STYLES)], marker=_MARKERS[i % len(_MARKERS)],
            markersize=3 if len(steps) <= 30 else 0, linewidth=1.8, label=proper(stage), zorder=3,
        )  # fmt: skip
        if curve.get("chosen_step") in steps:
            at = steps.index(curve["chosen_step"])
            axis.plot(steps[at], values[at], "o", color=color, markersize=9, markerfacecolor="none", zorder=4)
    similar = rewards.get("similar")
    if similar:
        low, high = similar
        bottom, top = axis.get_ylim()
        room = 0.16 * (max(top, high) - min(bottom, low))  # so that each region is seen and its name has a place
        bottom, top = min(bottom, low - room), max(top, high + room)
        for start, end, color, name in (
            (high, top, SERIES[2], "Better"),
            (low, high, QUIET, "Similar"),
            (bottom, low, SERIES[1], "Worse"),
        ):
            axis.axhspan(start, end, color=color, alpha=0.10, linewidth=0, zorder=0)
            axis.annotate(
                name, (1, (start + end) / 2), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", ha="left", color=INK, annotation_clip=False,
            )  # fmt: skip
        axis.set_ylim(bottom, top)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("RL step")
    axis.set_ylabel("reward r_gap(x, y, y_ref)")
    _legend(figure, axes)
    return figure


def _fig5_chain_of_thought(results: dict):
    comparisons = results["chain_of_thought"]
    if "temperatures" in comparisons:
        return _by_temperature(comparisons)
    judges = _judges(comparisons)
    figure, axes = _panels(1, 1, [2.2])
    axis, width = axes[0, 0], 0.7 / len(comparisons)
    for i, (name, of) in enumerate(comparisons.items()):
        shift = _dodge(i, len(comparisons), 0.7 - width)
        at = [(j + shift, of[judge]) for j, judge in enumerate(judges) if _told(of.get(judge))]
        x, heights = [x for x, _ in at], [100 * s["delta"] for _, s in at]
        axis.bar(x, heights, width * 0.92, color=SERIES[i % len(SERIES)], alpha=0.85, label=proper(name))
        axis.errorbar(x, heights, _errors([s for _, s in at]), fmt="none", color=INK, elinewidth=1, capsize=2.5)
    axis.axhline(0, color=QUIET, linewidth=0.9)
    axis.set_xticks(range(len(judges)), judges)
    axis.set_xlim(-0.6, len(judges) - 0.4)
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("delta (points of percent)")
    _legend(figure, axes)
    return figure


def _kl_reward(results: dict):
    stages = results["kl_reward"]
    columns = 2 if any(points.get("share_met") for points in stages.values()) else 1
    figure, axes = _panels(len(stages), columns, [1.75] * len(stages), share_y=False)
    for row, (stage, points) in zip(axes, stages.items(), strict=True):
        steps, kl = points["steps"], points["kl"]
        best = {group["step"] for group in points.get("bins") or []}
        measures = [("reward", points["score"])]
        if points.get("share_met"):
            measures.append(("share met (%)", [100 * x for x in points["share_met"]]))
        for axis, (label, values) in zip(row, measures, strict=False):
            for i, group in enumerate(points.get("bins") or []):
                axis.axvspan(group["low"], group["high"], color=QUIET, alpha=0.13 if i % 2 else 0.06, linewidth=0)
            for i, (x, step, y) in enumerate(sorted(zip(kl, steps, values, strict=True))):
                face = SERIES[0] if step in best else PAPER
                axis.plot(x, y, "o", color=SERIES[0], markerfacecolor=face)
                if step == points.get("chosen_step"):
                    axis.plot(x, y, "o", color=SERIES[1], markersize=10, markerfacecolor="none", markeredgewidth=1.5)
                # Above and below in turn, as neighbours may be close.
                axis.annotate(
                    str(step), (x, y), xytext=(0, -7 if i % 2 else 7), textcoords="offset points", ha="center",
                    va="top" if i % 2 else "bottom", fontsize=7,
                )  # fmt: skip
            axis.margins(0.12, 0.25)
            axis.set_ylabel(label)
        for axis in row[len(measures) :]:
            axis.set_visible(False)
        row[0].set_title(proper(stage))
    for axis in axes[-1]:
        axis.set_xlabel("KL to SFT (nats)")
    return figure


def _iterations(results: dict):
    iterations = results["iterations"]
    rows = [row for of in iterations.values() for row in of]
    measures = _measures(iterations)
    figure, axes = _panels(len(measures), 2, [1.65] * len(measures))
    for (by_iteration, by_tokens), measure in zip(axes, measures, strict=True):
        for i, (method, of) in enumerate(iterations.items()):
            of = [row for row in of if _measure(row, measure) is not None]
            dodge = _dodge(i, len(iterations), 0.2)
            for axis, x in (
                (by_iteration, [row["iteration"] + dodge for row in of]),
                (by_tokens, [row["tokens"] for row in of]),
            ):
                summaries = [{} if measure == "share_met" else row["delta"][measure] for row in of]
                y = [100 * _measure(row, measure) for row in of]
                _intervals(axis, x, y, summaries, i, proper(method), True, "line")
        for axis in (by_iteration, by_tokens):
            if measure != "share_met":
                axis.axhline(0, color=QUIET, linewidth=0.9)
        by_iteration.set_xticks(sorted({row["iteration"] for row in rows}))
        by_iteration.set_title("share of requirements met" if measure == "share_met" else measure)
        by_iteration.set_ylabel("percent" if measure == "share_met" else "delta (points)")
    axes[-1, 0].set_xlabel("iteration")
    axes[-1, 1].set_xlabel("tokens per prompt")
    _legend(figure, axes)
    return figure


def _elo(results: dict):
    ratings = {judge: of for judge, of in results["ratings"].items() if _rated(of)}
    sizes = [max(len(of[method]) for method, _ in _rated(of)) for of in ratings.values()]
    figure, axes = _panels(len(ratings), 1, [0.6 + 0.2 * n for n in sizes])
    for axis, (judge, of) in zip(axes[:, 0], ratings.items(), strict=True):
        methods = _rated(of)
        first = sorted(of[methods[0][0]], key=lambda row: row["rating"])
        order = {row["name"]: i for i, row in enumerate(first)}
        for m, (method, label) in enumerate(methods):
            at = [row for row in of[method] if row["name"] in order]
            y = [order[row["name"]] + _dodge(m, len(methods), 0.34, down=True) for row in at]
            scaled = [{"delta": row["rating"], "low": row.get("low"), "high": row.get("high")} for row in at]
            _intervals(axis, [row["rating"] for row in at], y, scaled, m, label, False, scale=1.0)
        axis.set_yticks(range(len(order)), [proper(name) for name in order])
        axis.set_ylim(-0.6, len(order) - 0.4)
        axis.tick_params(axis="y", length=0)
        axis.set_title(judge)
    axes[-1, 0].set_xlabel("rating")
    _legend(figure, axes)
    return figure


def _srt_scores(results: dict):
    models = results["self_scores"]
    figure, axes = _panels(len(models), 1, [1.6] * len(models))
    for axis, (name, found) in zip(axes[:, 0], models.items(), strict=True):
        for i, (side, counts) in enumerate(found["histograms"].items()):
            x = np.arange(1, len(counts) + 1) + (i - 0.5) * 0.4
            label = {"answer": "own answers", "refinement": "refinements"}.get(side, side)
            axis.bar(x, counts, 0.38, color=SERIES[i % len(SERIES)], label=label)
        axis.set_title(f"SRT {proper(name)}")
        axis.set_ylabel("prompts")
        axis.set_xticks(range(1, 11))
    axes[-1, 0].set_xlabel("score")
    _legend(figure, axes)
    return figure


def _srt_quality(results: dict):
    figure, axes = _panels(1, 1, [2.0])
    axis = axes[0, 0]
    for i, (name, found) in enumerate(results["self_scores"].items()):
        rows = found.get("quality") or []
        total = sum(row["n"] for row in rows) or 1
        x, y = [row["score"] for row in rows], [100 * row["share_met"] for row in rows]
        label = f"SRT {proper(name)}"
        color = SERIES[i % len(SERIES)]
        axis.plot(x, y, color=color, linestyle=_STYLES[i % len(_STYLES)], linewidth=1.2, label=label)
        sizes = [10 + 90 * row["n"] / total for row in rows]
        axis.scatter(x, y, sizes, color=color, marker=_MARKERS[i % len(_MARKERS)], zorder=3)
    axis.set_xticks(range(1, 11))
    axis.set_xlabel("score of the refinement")
    axis.set_ylabel("requirements met (%)")
    _legend(figure, axes)
    return figure


def _sequences(results: dict) -> list[tuple[int, dict]]:
    """(sequences, judge -> summary against M_base) of stage 1 and its arms on fewer; none where there are no arms."""
    stages, comparisons = results.get("stages", {}), results.get("comparisons", {})
    found = [
        (stages[stage]["rows"], comparisons[name])
        for stage, name in SEQUENCES.items()
        if name in comparisons and "rows" in stages.get(stage, {})
    ]
    return sorted(found, key=lambda point: point[0]) if len(found) > 1 else []


SEQUENCES = {"arm_quarter": "quarter_vs_base", "arm_half": "half_vs_base", "srt": "srt_stage1_vs_base"}
"""Stage -> what its refinements are compared in."""


def _srt_sequences(results: dict):
    points = _sequences(results)
    figure, axes = _panels(1, 1, [2.0])
    axis = axes[0, 0]
    for i, judge in enumerate(_judges(dict(enumerate(judges for _, judges in points)))):
        x = [n for n, judges in points if judge in judges]
        found = [judges[judge] for _, judges in points if judge in judges]
        _intervals(axis, x, [100 * s["delta"] for s in found], found, i, proper(judge), True, line="yes")
    axis.axhline(0, color=QUIET, linewidth=0.7)
    axis.set_xlabel("sequences")
    axis.set_ylabel("delta (%)")
    _legend(figure, axes)
    return figure


_FIGURES = {
    "srt_sequences": _srt_sequences,
    "srt_scores": _srt_scores,
    "srt_quality": _srt_quality,
    "win_rates": _win_rates,
    "fig2_gap_distributions": _fig2_gap_distributions,
    "fig3_temperature": _fig3_temperature,
    "fig4_rl_rewards": _fig4_rl_rewards,
    "fig5_chain_of_thought": _fig5_chain_of_thought,
    "kl_reward": _kl_reward,
    "iterations": _iterations,
    "elo": _elo,
}


def _judges(comparisons: dict) -> list[str]:
    return list(dict.fromkeys(judge for judges in comparisons.values() for judge in judges))


def _measures(iterations: dict) -> list[str]:
    rows = [row for of in iterations.values() for row in of]
    judges = list(dict.fromkeys(judge for row in rows for judge in row.get("delta") or {}))
    return (["share_met"] if any(row.get("share_met") is not None for row in rows) else []) + judges


def _measure(row: dict, measure: str) -> float | None:
    if measure == "share_met":
        return row.get("share_met")
    return ((row.get("delta") or {}).get(measure) or {}).get("delta")


def _rated(ratings: dict) -> list[tuple[str, str]]:
    return [(m, label) for m, label in (("elo", "Elo"), ("bradley_terry", "Bradley-Terry")) if ratings.get(m)]


def _told(summary: dict | None) -> bool:
    return summary is not None and summary.get("delta") is not None


def _swept(sweep: dict) -> list[dict]:
    return [s for judges in sweep["comparisons"].values() for of in judges.values() for s in of if _told(s)]


def _ns(summaries) -> str:
    """The numbers of prompts of summaries in words."""
    ns = sorted({s["n"] for s in summaries if s and s.get("n")})
    if not ns:
        return "No verdicts"
    return f"{ns[0]:,} prompts" if len(ns) == 1 else f"{ns[0]:,} to {ns[-1]:,} prompts"


def _dodge(i: int, n: int, width: float, *, down: bool = False) -> float:
    """Where series i of n stands beside its place, so that intervals do not hide each other."""
    shift = 0.0 if n == 1 else width * (i / (n - 1) - 0.5)
    return -shift if down else shift


def _panels(rows: int, columns: int, heights: list[float], *, share_y: bool = True):
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.55), layout="constrained")
    FigureCanvasSVG(figure)
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    return figure, figure.subplots(
        rows, columns, squeeze=False, sharex="col" if share_y else False, sharey="row" if share_y else False,
        height_ratios=heights,
    )  # fmt: skip


def _errors(summaries: list[dict], scale: float = 100.0) -> np.ndarray | None:
    """[2, n] for errorbar: below and above delta; 0 where there is no interval."""
    bounds = [(s.get("delta"), s.get("low"), s.get("high")) for s in summaries]
    return scale * np.array([(0.0, 0.0) if l is None else (d - l, h - d) for d, l, h in bounds]).reshape(-1, 2).T


def _intervals(axis, x, y, summaries, i, label, upright, line="", scale=100.0):
    """Dots with their intervals, joined by a line where `line` says so."""
    if not len(x):
        return
    color = SERIES[i % len(SERIES)]
    errors = {"yerr" if upright else "xerr": _errors(summaries, scale).clip(min=0.0)}
    axis.errorbar(
        x, y, **errors, color=color, marker=_MARKERS[i % len(_MARKERS)], elinewidth=1.1, capsize=2, label=label,
        linestyle=_STYLES[i % len(_STYLES)] if line else "none", linewidth=1.2,
    )  # fmt: skip


def _legend(figure, axes) -> None:
    """One legend above all panels."""
    found = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) < 2:
        return
    columns = 2 if max(map(len, found)) > 12 or len(found) == 4 else 3
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=min(columns, len(found)), fontsize=8)


def _svg(figure, name: str, title: str, caption: str) -> str:
    """One SVG element, with ids that no other figure has, no style sheet and no date."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg, link = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        # A style sheet of an inlined SVG holds for the whole page; the root's attributes say the same below.
        for child in parent.findall(f"{svg}defs"):
            if child.find(f"{svg}style") is not None:
                parent.remove(child)
    text = " ".join(value for element in root.iter() for value in element.attrib.values())
    used = set(re.findall(r"#([\w.-]+)\)?", text))
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                if value in used:
                    element.set(key, f"{name}-{value}")
                else:
                    del element.attrib[key]
            elif key == link:
                element.attrib.pop(key)
                element.set("href", value.replace("#", f"#{name}-"))
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    root.attrib |= {"role": "img", "aria-label": f"{title}. {caption}"}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}
    ElementTree.register_namespace("", svg[1:-1])
    return ElementTree.tostring(root, encoding="unicode") + "\n"
