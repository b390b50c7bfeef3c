import copy
import json
import re
import sys
from xml.etree import ElementTree

import pytest

from pit_jax.evaluation import figures

SVG = "{http://www.w3.org/2000/svg}"


def summary(delta, n=640, half=0.04, **more):
    return {
        "win": (0.4 + delta) / 2, "lose": (0.4 - delta) / 2, "tie": 0.6, "delta": delta,
        "low": delta - half, "high": delta + half, "n": n,
    } | more  # fmt: skip


def ratings(*values):
    order = sorted(values, reverse=True)
    return [
        {
            "name": name, "rating": x, "low": x - 10, "high": x + 10, "rank": order.index(x) + 1,
            "rank_low": order.index(x) + 1, "rank_high": len(order),
        }
        for name, x in zip(("pit", "pit_iteration_2", "original"), values, strict=True)
    ]  # fmt: skip


def step(k, tokens, delta):
    return {
        "iteration": k, "answer": "pit" if k == 1 else f"pit_iteration_{k}", "tokens": tokens, "written": 12.5 * k,
        "copy_rate": 0.25, "length": 11.5, "share_met": 0.9, "all_met": 0.75,
        "delta": {"verifier": {"delta": delta, "low": delta - 0.02, "high": delta + 0.02, "n": 640}},
    }  # fmt: skip


RESULTS = {
    "name": "pit_synthetic",
    "seed": 3,
    "comparisons": {
        "pit_vs_original": {"verifier": summary(0.0782), "llm": summary(0.125, n=125, no_verdict=3)},
        "pit_vs_self_refine": {"verifier": summary(-0.0625, low=-0.1225)},
    },
    "answers": {
        "pit": {"tokens": 30.04, "copy_rate": 0.125, "all_met": 0.79375, "fixed": 0.53, "kept": 0.9},
        "original": {"tokens": 31.0, "copy_rate": None, "all_met": 0.7171875, "fixed": 0.0, "kept": 1.0},
    },
    "iterations": {"pit": [step(1, 72.0, 0.05), step(2, 132.0, 0.08)], "self_refine": [step(1, 152.0, -0.01)]},
    "stop_rules": [
        {"method": "pit", "rule": "gap above 0", "score": 0.9375, "regret": 0.0125, "tokens": 132.5, "iterations": 2.5,
         "n": 640},
        {"method": "self_refine", "rule": "K = 1", "score": None, "regret": None, "tokens": 90.0, "iterations": 1.0,
         "n": 640},
    ],
    "stop_rules_note": "Chosen on selection prompts.",
    "temperature_sweep": {
        "temperatures": [0.0, 0.5, 1.0],
        "comparisons": {
            "pit_vs_original": {"verifier": [summary(0.1), summary(0.05), None]},
            "self_refine_vs_original": {"verifier": [summary(-0.1), summary(0.0), summary(0.02)]},
        },
    },
    "chain_of_thought": {
        "pit_sft_vs_sft": {"verifier": summary(0.22)}, "pit_sft_cot_vs_sft": {"verifier": summary(0.12)},
    },
    "ratings": {
        "verifier": {"elo": ratings(1020.4, 1035.6, 944.0), "bradley_terry": ratings(1030.0, 1025.0, 945.0),
                     "num_comparisons": 1920, "num_shuffles": 20},
    },
    "reward_models": {"r_pit": {"accuracy": 0.9645, "low": 0.947, "high": 0.976, "n": 648},
                      "llm": {"accuracy": 0.844, "low": 0.77, "high": 0.9, "n": 126, "no_verdict": 2}},
    "gap_distributions": {
        "edges": [-4.0, -2.0, 1.0, 2.0],
        "density": {"chosen_rejected": [0.0, 0.2, 0.4], "rejected_chosen": [0.4, 0.05, 0.05]},
    },
    "rl_rewards": {
        "similar": [-2.5, -1.5], "n": 136,
        "stages": {
            "rl_pit_2": {"steps": [0, 10, 20], "reward": [-3.0, -1.0, 0.5], "chosen_step": 20},
            "arm_second_rl_only": {"steps": [0, 10], "reward": [-4.0, -2.0], "chosen_step": 10,
                                   "training_steps": [1, 2], "training_reward": [-4.1, -3.9]},
        },
    },
    "kl_reward": {
        "rl_pit_2": {"steps": [0, 10, 20], "kl": [0.25, 0.5, 0.75], "score": [-3.0, -1.0, 0.5],
                     "share_met": [0.9, 0.92, 0.91], "chosen_step": 20,
                     "bins": [{"low": 0.25, "high": 0.5, "step": 0}, {"low": 0.5, "high": 0.75, "step": 20}]},
        "rl_policy": {"steps": [0, 10], "kl": [0.0, 1.0], "score": [0.0, 1.0], "share_met": None, "chosen_step": 10,
                      "bins": [{"low": 0.0, "high": 1.0, "step": 10}]},
    },
    "costs": {"pit": {"seconds": 3.5, "read": 36019, "written": 8578, "answers": 640}},
    "judge_costs": {"llm": {"calls": 1149, "cached_calls": 79, "prompt_tokens": 8596, "completion_tokens": 3684,
                            "seconds": 7.5, "first_position_rate": 0.5065}},
    "stages": {"sft_policy": {"steps": 41, "seconds": 17.5}, "evaluate": {"steps": 0, "seconds": 90.0}},
    "missing": {"second_rl_only_vs_pit": "python -m pit_jax.train --config.arms=second_rl_only"},
}  # fmt: skip

OF = {
    "win_rates": "comparisons",
    "fig2_gap_distributions": "gap_distributions",
    "fig3_temperature": "temperature_sweep",
    "fig4_rl_rewards": "rl_rewards",
    "fig5_chain_of_thought": "chain_of_thought",
    "kl_reward": "kl_reward",
    "iterations": "iterations",
    "elo": "ratings",
}


@pytest.fixture(scope="module")
def drawn():
    return figures.draw(RESULTS)


def texts(svg):
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_figure_for_each_key_and_none_where_it_is_absent(drawn):
    assert set(drawn) == set(OF) == set(figures.captions(RESULTS))
    assert figures.draw({}) == {}
    for name, key in OF.items():
        assert set(figures.captions({key: RESULTS[key]})) == {name}
    empty = {"ratings": {"llm": {"elo": []}}, "iterations": {"pit": []}, "rl_rewards": {"stages": {}}}
    assert figures.draw(empty) == {}


SRT = {
    "comparisons": {
        "srt_stage1_vs_base": {"verifier": summary(0.09)}, "quarter_vs_base": {"verifier": summary(-0.02)},
        "srt_stage1_vs_rerank": {"verifier": summary(0.01)},
    },
    "stages": {"srt": {"rows": 15_000}, "arm_quarter": {"rows": 3750}, "arm_half": {"rows": 7500}},
    "iterations": {"srt_stage1": [step(0, 20.0, 0.01), step(1, 110.0, 0.09)]},
    "self_scores": {
        "stage1": {
            "histograms": {"answer": [0, 0, 0, 0, 0, 1, 2, 0, 0, 13], "refinement": [0, 0, 0, 0, 0, 0, 1, 0, 0, 15]},
            "quality": [{"score": 7, "n": 1, "share_met": 0.5, "all_met": 0.0},
                        {"score": 10, "n": 15, "share_met": 0.95, "all_met": 0.8}],
        },
    },
}  # fmt: skip


def test_figures_of_srt():
    described, drawn = figures.captions(SRT), figures.draw(SRT)
    assert set(drawn) == {"win_rates", "iterations", "srt_scores", "srt_quality", "srt_sequences"}
    assert "16 prompts" in described["srt_scores"][1] and "SRT Table 2" in described["iterations"][0]
    assert "the answer of M_base" in described["iterations"][1]
    seen = texts(drawn["srt_sequences"])
    assert "sequences" in seen and "delta (%)" in seen and "4000" in seen and "14000" in seen
    alone = {**SRT, "comparisons": {"srt_stage1_vs_base": {"verifier": summary(0.09)}}}
    assert "srt_sequences" not in figures.draw(alone), "one point is no curve"


def test_equal_numbers_give_equal_bytes_whatever_the_order_of_keys(drawn):
    again = figures.draw(json.loads(json.dumps(RESULTS, sort_keys=True)))
    assert again == drawn
    changed = copy.deepcopy(RESULTS)
    changed["comparisons"]["pit_vs_original"]["verifier"]["delta"] += 0.01
    other = figures.draw(changed)
    assert [name for name in drawn if other[name] != drawn[name]] == ["win_rates"]


def test_ids_differ_between_figures_and_every_reference_is_found(drawn):
    ids = [value for svg in drawn.values() for value in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids)) > 10
    for name, svg in drawn.items():
        used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'\bhref="#([^"]+)"', svg))
        assert used
        assert used == set(re.findall(r'\bid="([^"]+)"', svg)), name


def test_a_figure_is_small_plain_and_asks_for_nothing(drawn):
    for svg in drawn.values():
        root = ElementTree.fromstring(svg)
        tags = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert tags <= {"svg", "g", "path", "text", "tspan", "use", "defs", "clipPath", "rect"}
        assert root.get("aria-label")
        assert root.get("role") == "img"
        assert "viewBox" in root.attrib
        assert len(svg) < 100_000
        assert not re.search(r"https?://(?!www\.w3\.org/)", svg)
        assert not re.search(r"20\d\d-\d\d-\d\d", svg)


def test_axes_are_named_with_their_units(drawn):
    wanted = {
        "win_rates": {"delta (points of percent)", "PIT vs. original", "PIT vs. Self-Refine", "llm"},
        "fig2_gap_distributions": {"r_gap(x, y1, y2)", "density", "(y_w, y_l)", "(y_l, y_w)"},
        "fig3_temperature": {"sampling temperature", "delta (points)", "verifier", "Self-Refine vs. original"},
        "fig4_rl_rewards": {"RL step", "Better", "Similar", "Worse", "first and second RL", "second RL only"},
        "fig5_chain_of_thought": {"delta (points of percent)", "PIT SFT vs. SFT", "PIT SFT CoT vs. SFT"},
        "kl_reward": {"KL to SFT (nats)", "reward", "share met (%)", "RL of M_P", "20"},
        "iterations": {"iteration", "tokens per prompt", "share of requirements met", "percent", "Self-Refine"},
        "elo": {"rating", "Elo", "Bradley-Terry", "PIT iteration 2"},
    }
    for name, labels in wanted.items():
        assert labels <= set(texts(drawn[name])), name


def test_captions_say_what_is_seen_and_of_how_many():
    captions = {name: text for name, (_, text) in figures.captions(RESULTS).items()}
    assert "125 to 640 prompts" in captions["win_rates"]
    assert "648 labelled pairs" in captions["fig2_gap_distributions"]
    assert "640 prompts at each temperature" in captions["fig3_temperature"]
    assert "Similar is from -2.50 to -1.50" in captions["fig4_rl_rewards"]
    assert "136 selection prompts" in captions["fig4_rl_rewards"]
    assert captions["kl_reward"].startswith("5 checkpoints")
    assert "1,920 comparisons" in captions["elo"]


def errorbars(axis):
    """label -> (positions, bounds) as drawn."""
    found = {}
    for container in axis.containers:
        line, _, bars = container.lines
        found[container.get_label()] = line.get_xydata().round(4).tolist(), bars[0].get_segments()
    return found


def test_dots_and_intervals_stand_where_the_numbers_say():
    found = errorbars(figures._win_rates(RESULTS).axes[0])
    points, bounds = found["verifier"]
    assert [x for x, _ in points] == [-6.25, 7.82]  # from below: the first comparison is on top
    assert [[round(x, 4) for x, _ in bound] for bound in bounds] == [[-12.25, -2.25], [3.82, 11.82]]
    assert [x for x, _ in found["llm"][0]] == [12.5]

    by_iteration, by_tokens = figures._iterations(RESULTS).axes[2:4]
    assert [y for _, y in errorbars(by_iteration)["PIT"][0]] == [5.0, 8.0]
    assert errorbars(by_tokens)["PIT"][0] == [[72.0, 5.0], [132.0, 8.0]]
    assert errorbars(by_tokens)["Self-Refine"][0] == [[152.0, -1.0]]

    axis = figures._fig3_temperature(RESULTS).axes[0]
    assert [y for _, y in errorbars(axis)["PIT vs. original"][0]] == [10.0, 5.0]  # none where there is no summary
    bars = figures._fig5_chain_of_thought(RESULTS).axes[0].patches
    assert [round(bar.get_height(), 4) for bar in bars] == [22.0, 12.0]
    elo = sorted(errorbars(figures._elo(RESULTS).axes[0])["Elo"][0], key=lambda point: point[1])
    assert [x for x, _ in elo] == [944.0, 1020.4, 1035.6]  # from below


def test_regions_of_figure_4_and_the_chosen_checkpoints():
    axis = figures._fig4_rl_rewards(RESULTS).axes[0]
    regions = {tuple(patch.get_y() + d for d in (0, patch.get_height())) for patch in axis.patches}
    bottom, top = axis.get_ylim()
    assert regions == {(-1.5, top), (-2.5, -1.5), (bottom, -2.5)}
    rings = [line.get_xydata().tolist() for line in axis.lines if line.get_markersize() == 9]
    assert rings == [[[20.0, 0.5]], [[10.0, -2.0]]]
    rings = [
        line.get_xydata().tolist() for axis in figures._kl_reward(RESULTS).axes for line in axis.lines
        if line.get_markersize() == 10
    ]  # fmt: skip
    assert rings == [[[0.75, 0.5]], [[0.75, 91.0]], [[1.0, 1.0]]]


def test_figure_5_by_temperature():
    sweep = RESULTS["temperature_sweep"]
    svg = figures.draw({"chain_of_thought": sweep})["fig5_chain_of_thought"]
    assert "sampling temperature" in texts(svg)


def test_names_of_judges_are_text_and_no_markup_nor_mathematics():
    judge = "<script>$x^2$&\"'"
    svg = figures.draw({"comparisons": {"pit_vs_original": {judge: summary(0.1), "b": summary(0.2)}}})["win_rates"]
    assert judge in texts(svg)


def test_a_judge_without_any_verdict_leaves_a_gap():
    nothing = dict.fromkeys(("win", "lose", "tie", "delta", "low", "high")) | {"n": 0, "no_verdict": 5}
    results = copy.deepcopy(RESULTS)
    results["comparisons"]["pit_vs_original"]["llm"] = nothing
    results["temperature_sweep"]["comparisons"]["pit_vs_original"]["verifier"][0] = nothing
    results["chain_of_thought"]["pit_sft_vs_sft"]["verifier"] = nothing
    results["iterations"]["pit"][0]["delta"]["verifier"] = nothing
    results["iterations"]["pit"].insert(0, step(0, 20.0, 0.0) | {"delta": {}})
    assert set(figures.draw(results)) == set(OF)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_told_from_the_ground():
    assert round(contrast("#767676", "#ffffff"), 2) == 4.54  # WCAG's own example
    assert all(contrast(color, figures.PAPER) >= 3.0 for color in figures.SERIES)
    assert all(contrast(color, figures.PAPER) >= 4.5 for color in (figures.INK, figures.QUIET))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pit_vs_self_refine", "PIT vs. Self-Refine"),
        ("pit_iteration_2", "PIT iteration 2"),
        ("self_refine_iteration_3", "Self-Refine iteration 3"),
        ("pit_t0.4", "PIT, T = 0.4"),
        ("pit_sft_cot_vs_sft", "PIT SFT CoT vs. SFT"),
        ("original", "original"),
    ],
)
def test_proper_names(name, words):
    assert figures.proper(name) == words


def test_settings_of_others_stay_as_they_are():
    import matplotlib

    with matplotlib.rc_context({"font.size": 31.0, "svg.fonttype": "path", "xtick.major.size": 20.0}):
        before = dict(matplotlib.rcParams)
        first = figures.draw({"comparisons": RESULTS["comparisons"]})
        assert dict(matplotlib.rcParams) == before
    assert first == figures.draw({"comparisons": RESULTS["comparisons"]})


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[report\]'"):
        figures.draw(RESULTS)
