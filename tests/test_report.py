import base64
import copy
import csv
import hashlib
import html.parser
import json
import math
import re

import pytest
from hypothesis import given, settings, strategies as st
from test_figures import RESULTS, contrast, summary

from pit_jax.evaluation import figures, report, tables

HOSTILE = (
    "<script>window.x=1</script></script><!-- <img src=x onerror=y> -->\"'&lt;{{data}}\u2028\u2029\x00\u202e\ud800]]>"
)
SAMPLES = [
    {
        "prompt": "Write a tagline. Use lemon.",
        "requirements": [["topic", "tea"], ["html_paragraph", ""]],
        "met": {"original": [True, False], "pit": [True, True], "pit_iteration_2": [True, True],
                "fresh": [False, True]},
        "answers": {
            "original": "silver tea time", "pit": "lemon tea time, now", "pit_iteration_2": "lemon tea time, now",
            "fresh": "no tea",
        },
        "scores": {"verifier": {"original": 0.5, "pit": 1.0, "fresh": 0.123456789}, "evaluator": {"pit": math.nan}},
        "chains": {"pit": ["original", "pit", "pit_iteration_2"]},
        "verdicts": {"verifier": {"pit_vs_original": 1}, "llm": {"pit_vs_original": None}},
    },
    {"prompt": "Second.", "requirements": [], "answers": {"original": "a", "pit": "b"}, "scores": {}},
]  # fmt: skip


class Page(html.parser.HTMLParser):
    """Elements, with their attributes, and the text in them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.texts, self.stack, self.comments = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.stack.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    def handle_comment(self, data):
        self.comments.append(data)

    def tags(self):
        return [tag for tag, _ in self.elements]


def data_of(page):
    return json.loads(Page(page).scripts[0])


def rows_of(page, name):
    """The cells of an HTML table, merged ones repeated."""
    part = re.search(rf'id="table-{name}".*?</details>', page, re.DOTALL)[0]
    merged: dict[int, tuple[str, int]] = {}
    found = []
    for line in re.findall(r"<tr.*?</tr>", part, re.DOTALL):
        cells = re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", line)
        row = [html.unescape(text) for _, text in cells]
        if 0 in merged:
            text, left = merged.pop(0)
            row.insert(0, text)
            if left > 1:
                merged[0] = (text, left - 1)
        elif span := re.search(r'rowspan="(\d+)"', cells[0][0]):
            merged[0] = (row[0], int(span[1]) - 1)
        found.append(row)
    return found


def table(name, results=RESULTS):
    return next(t for t in tables.tables(results) if t.name == name)


def cells(name, *start, results=RESULTS):
    """The rows that begin with `start`."""
    return [row for row in table(name, results).rows if row[: len(start)] == list(start)]


# tables


def test_comparisons_by_hand():
    found = table("comparisons")
    assert found.header[-3:] == ["no verdict", "tokens", "copy rate"]
    assert [row[:2] + row[7:] for row in found.rows] == [
        ["pit vs. original", "verifier", "640", "0", "30.0", "12.50"],
        ["pit vs. original", "llm", "125", "3", "30.0", "12.50"],
        ["pit vs. self refine", "verifier", "640", "0", "30.0", "12.50"],
    ]
    assert [row[2:7] for row in found.rows] == [
        ["23.91", "16.09", "60.00", "+7.82", "[+3.82, +11.82]"],
        ["26.25", "13.75", "60.00", "+12.50", "[+8.50, +16.50]"],
        ["16.88", "23.12", "60.00", "-6.25", "[-12.25, -2.25]"],
    ]
    without = {"comparisons": {"rl_vs_sft": {"verifier": summary(0.1)}}}
    assert table("comparisons", without).header[-1] == "prompts"
    known = without | {"answers": {"original": {"tokens": 12.0, "copy_rate": None}}}
    assert table("comparisons", known).rows[0][-2:] == ["12.0", "-"]  # "rl" is the original answer


def test_no_verdict_at_all_is_shown_as_such():
    nothing = dict.fromkeys(("win", "lose", "tie", "delta", "low", "high")) | {"n": 0, "no_verdict": 5}
    rows = table("comparisons", {"comparisons": {"pit_vs_original": {"llm": nothing}}}).rows
    assert rows == [["pit vs. original", "llm", *["-"] * 5, "0", "5"]]


def test_ratings_by_hand():
    assert table("ratings").rows == [
        ["pit", "verifier", "1020", "[1010, 1030]", "2 (2-3)", "1030", "[1020, 1040]", "1 (1-3)"],
        ["pit iteration 2", "verifier", "1036", "[1026, 1046]", "1 (1-3)", "1025", "[1015, 1035]", "2 (2-3)"],
        ["original", "verifier", "944", "[934, 954]", "3 (3-3)", "945", "[935, 955]", "3 (3-3)"],
    ]
    assert "verifier: 1,920 comparisons, 20 shuffles of their order." in table("ratings").notes


def test_iterations_and_stop_rules_by_hand():
    assert table("iterations").rows[1] == [
        "pit", "2", "132.0", "25.0", "11.5", "25.00", "90.00", "75.00", "+8.00 [+6.00, +10.00]",
    ]  # fmt: skip
    assert cells("stop_rules", "pit")[0][1:] == ["gap above 0", "93.75", "1.25", "132.5", "2.5", "640"]
    assert cells("stop_rules", "self refine")[0][1:] == ["K = 1", "-", "-", "90.0", "1.0", "640"]
    assert table("stop_rules").notes[-1] == "Chosen on selection prompts."


def test_temperatures_by_hand():
    assert [row[2] for row in cells("temperature_sweep", "pit vs. original")] == ["0", "0.5"]
    assert cells("temperature_sweep", "self refine vs. original")[2][3:8] == [
        "21.00", "19.00", "60.00", "+2.00", "[-2.00, +6.00]",
    ]  # fmt: skip
    by_temperature = {"chain_of_thought": RESULTS["temperature_sweep"]}
    assert len(table("chain_of_thought", by_temperature).rows) == 5
    assert [row[5] for row in table("chain_of_thought").rows] == ["+22.00", "+12.00"]


def test_gap_distributions_by_hand():
    # rejected_chosen: 2 * 0.4 below -2, and two thirds of the bin from -2 to 1, which holds 3 * 0.05: 0.8 + 0.1.
    # chosen_rejected: two thirds of 3 * 0.2.
    assert table("gap_distributions").rows == [
        ["chosen rejected", "40", "+1.00 to +2.00"],
        ["rejected chosen", "90", "-4.00 to -2.00"],
    ]


def test_rl_by_hand():
    assert cells("rl_rewards", "rl pit 2")[0][1:] == ["3", "-3.000", "+0.500", "20", "+0.500"]
    assert table("rl_rewards").notes == ("Similar: from -2.500 to -1.500; above it Better, below it Worse.",)
    assert [row[1:] for row in cells("kl_reward", "rl pit 2")] == [
        ["best of its KL group", "0", "0.250", "-3.000", "90.00"],
        ["", "10", "0.500", "-1.000", "92.00"],
        ["chosen", "20", "0.750", "0.500", "91.00"],
    ]
    assert [row[-1] for row in cells("kl_reward", "rl policy")] == ["-", "-"]


def test_costs_and_judges_by_hand():
    assert table("costs").rows == [["pit", "640", "3.5", "36,019", "8,578"]]
    assert table("judge_costs").rows == [["llm", "1,149", "79", "8,596", "3,684", "7.5", "50.65"]]
    assert cells("reward_models", "llm") == [
        ["llm", "labelled, of test prompts", "84.40", "[77.00, 90.00]", "126", "2"]
    ]
    assert cells("reward_models", "r_pit")[0][-1] == "0"


def test_every_table_is_whole():
    found = tables.tables(RESULTS)
    assert [t.name for t in found] == [
        "comparisons", "answers", "iterations", "stop_rules", "temperature_sweep", "chain_of_thought", "ratings",
        "reward_models", "gap_distributions", "rl_rewards", "kl_reward", "costs", "judge_costs", "stages", "missing",
    ]  # fmt: skip
    for t in found:
        assert all(len(row) == len(t.header) for row in t.rows), t.name
        assert all(isinstance(cell, str) for row in t.rows for cell in row), t.name
        assert bool(t.records) == (t.name != "missing")
    for key in RESULTS.keys() - {"name", "seed", "answers", "stop_rules_note"}:
        assert [t.name for t in tables.tables({key: RESULTS[key]})] == [key]


def test_csv_has_the_numbers_unrounded(tmp_path):
    paths = tables.write_csv(RESULTS, tmp_path)
    assert {path.stem for path in paths} == {t.name for t in tables.tables(RESULTS)} - {"missing"}
    read = {}
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            read[path.stem] = list(csv.DictReader(file))
    assert read["comparisons"][1]["no_verdict"] == "3"
    assert float(read["comparisons"][0]["delta"]) == 0.0782
    assert [row["method"] for row in read["ratings"]] == ["elo"] * 3 + ["bradley_terry"] * 3
    assert float(read["ratings"][0]["rating"]) == 1020.4
    assert float(read["iterations"][1]["delta.verifier.low"]) == 0.06
    assert [(row["low"], row["chosen_rejected"]) for row in read["gap_distributions"]][2] == ("1.0", "0.4")
    assert [(row["prompts"], row["step"], row["reward"], row["chosen"]) for row in read["rl_rewards"]][3:6] == [
        ("selection", "0", "-4.0", "False"), ("selection", "10", "-2.0", "True"), ("training", "1", "-4.1", ""),
    ]  # fmt: skip
    assert read["stop_rules"][1]["score"] == ""


def test_order_does_not_depend_on_that_of_the_keys():
    names = ["chosen", "pit_iteration_10", "original", "pit_t0.2", "pit_iteration_2", "zebra", "pit", "self_refine"]
    assert list(tables.in_order(dict.fromkeys(names))) == [
        "pit", "pit_iteration_2", "pit_iteration_10", "pit_t0.2", "self_refine", "original", "chosen", "zebra",
    ]  # fmt: skip
    comparisons = ["pit_vs_self_refine", "original_vs_chosen", "pit_vs_original", "first_rl_only_vs_pit"]
    assert list(tables.in_order({"a": dict.fromkeys(comparisons)})["a"]) == [
        "pit_vs_original", "pit_vs_self_refine", "first_rl_only_vs_pit", "original_vs_chosen",
    ]  # fmt: skip
    scrambled = json.loads(json.dumps(RESULTS, sort_keys=True))
    assert tables.render(scrambled) == tables.render(RESULTS)


# the page


@pytest.fixture(scope="module")
def page():
    return report.render(RESULTS, {"seed": 3, "ppo": {"kl_coef": 0.2}}, SAMPLES, figures.draw(RESULTS))


def test_tables_of_the_page_are_those_of_the_text(page):
    for t in tables.tables(RESULTS):
        if t.rows:
            assert rows_of(page, t.name) == [t.header, *t.rows], t.name
        for note in t.notes:
            assert html.escape(note) in page


def test_headlines_by_hand():
    found = {line.label: line for line in report.headlines(tables.in_order(RESULTS))}
    first = found["PIT vs. original, by the verifier"]
    assert (first.value, first.tone) == ("+7.8 points", "up")
    assert first.details == (
        "wins 23.9%, loses 16.1%", "95% interval [+3.8, +11.8], 640 prompts", "llm +12.5 [+8.5, +16.5], 125 prompts",
    )  # fmt: skip
    assert found["PIT vs. Self-Refine, by the verifier"].tone == "down"
    assert found["meet every requirement, original → PIT"].value == "71.7% → 79.4%"
    assert found["of PIT's answers copy the original"].value == "12.5%"
    unclear = {"comparisons": {"pit_vs_original": {"llm": summary(0.01)}}}
    assert [line.tone for line in report.headlines(unclear)] == [""]


def test_the_page_is_one_file_that_runs_its_own_script_and_asks_for_nothing(page):
    parsed = Page(page)
    policy = next(a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert re.search(r"script-src ([^;]*);", policy)[1] == f"'sha256-{digest}'"
    assert len(parsed.scripts) == 2
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(parsed.tags())
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert all(re.match(r"#[\w.-]+$", attributes[name]) for name in ("href", "src") if name in attributes)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert "{{" not in page.replace("{{data}}", "")


def test_ids_of_the_page_are_unique_and_links_and_labels_point_to_one(page):
    parsed = Page(page)
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in parsed.elements if tag == "a"} <= set(ids)
    labelled = [a for tag, a in parsed.elements if a.get("role") in ("img", "region")]
    assert len(labelled) == len(figures.captions(RESULTS)) + 14
    assert all(a["aria-label"] for a in labelled)
    heads = [a for tag, a in parsed.elements if tag == "th"]
    assert heads
    assert all(a.get("scope") in ("col", "row", "rowgroup") for a in heads)


def hostile(x, word):
    """The same with `word` in the place of every text, and after every name that is not one of the format's."""
    if isinstance(x, str):
        return word
    if isinstance(x, list):
        return [hostile(y, word) for y in x]
    return {name: hostile(y, word) for name, y in x.items()} if isinstance(x, dict) else x


def render_with(word, num=2):
    """A page whose every text is `word`: names of judges, answers, methods and stages, prompts, requirements, ..."""
    results = copy.deepcopy(RESULTS)
    results["name"] = word
    results["comparisons"] = {"pit_vs_original": {word: summary(0.1)}, f"{word}_vs_original": {word: summary(0.1)}}
    results["answers"] = {"pit": {"tokens": 1.0}, word: {"tokens": 1.0, word: 0.5}}
    results["ratings"] = {word: RESULTS["ratings"]["verifier"]}
    results["stop_rules"] = [dict(row, method=word, rule=word) for row in RESULTS["stop_rules"]]
    results["stop_rules_note"] = word
    results["iterations"] = {word: RESULTS["iterations"]["pit"]}
    results["missing"], results["commands"] = {word: word}, {word: word}
    results["costs"], results["judge_costs"], results["stages"] = ({word: row} for row in (
        RESULTS["costs"]["pit"], RESULTS["judge_costs"]["llm"], RESULTS["stages"]["evaluate"],
    ))  # fmt: skip
    sample = {
        "prompt": word, "requirements": [[word, word]], "met": {"original": [True], "pit": [False]},
        "answers": {"original": word, "pit": f"{word} {word}", word: word}, "scores": {word: {"pit": 1.0}},
        "chains": {"pit": ["original", "pit"], word: ["original", word]}, "verdicts": {word: {"pit_vs_original": 1}},
    }  # fmt: skip
    config = {word: word, "nested": {word: [word]}}
    return report.render(results, config, [sample] * num, {})


def test_no_text_becomes_markup():
    calm, wild = render_with("calm"), render_with(HOSTILE)
    wild.encode("utf-8")
    parsed, wanted = Page(wild), Page(calm)
    assert parsed.tags() == wanted.tags()
    assert parsed.comments == wanted.comments == []
    assert [sorted(a) for _, a in parsed.elements] == [sorted(a) for _, a in wanted.elements]
    assert parsed.scripts[1] == wanted.scripts[1]
    assert not set("<>&\u2028\u2029\x00\u202e") & set(parsed.scripts[0])
    shown = "".join(parsed.texts)
    assert shown.count("window.x=1") > 20
    assert "{{data}}" in shown  # what a part holds is not filled again


def test_hostile_text_arrives_letter_by_letter():
    row = data_of(render_with(HOSTILE))["rows"][0]
    assert row["p"] == HOSTILE
    assert row["r"] == [f"{HOSTILE.replace('_', ' ')}: {HOSTILE}"]
    assert HOSTILE in row["a"]
    assert "".join(piece[1:] for piece in row["d"]["pit"] if piece[0] != "-") == f"{HOSTILE} {HOSTILE}"


def test_names_in_a_drawn_figure_are_escaped_too():
    results = {"comparisons": {"pit_vs_original": {HOSTILE.replace("\x00", "").replace("\ud800", ""): summary(0.1),
                                                   "other": summary(0.2)}}}  # fmt: skip
    parsed = Page(report.render(results, {}, [], figures.draw(results)))
    assert len(parsed.scripts) == 2
    assert "img" not in parsed.tags()


def test_samples_as_the_page_reads_them(page):
    data = data_of(page)
    assert data["names"] == ["pit", "pit_iteration_2", "original", "fresh"]
    assert data["labels"] == ["PIT", "PIT iteration 2", "original", "fresh"]
    assert data["judges"] == ["verifier", "evaluator", "llm"]
    assert data["chains"] == {"pit": ["original", "pit", "pit_iteration_2"]}
    first, second = data["rows"]
    assert first["a"] == [None, None, "silver tea time", "no tea"]
    assert first["d"]["pit"] == ["-silver ", "+lemon ", "=tea time", "+, now"]
    assert first["d"]["pit_iteration_2"] == ["=lemon tea time, now"]
    assert first["m"] == ["11", "11", "10", "01"]
    assert first["s"] == [[1.0, None, 0.5, 0.1235], [None] * 4, [None] * 4]
    assert first["v"] == SAMPLES[0]["verdicts"]
    assert first["r"] == ["topic: tea", "html paragraph"]
    assert second["d"] == {"pit": ["-a", "+b"]}
    assert second["m"] == [None] * 4


def test_old_samples_and_empty_runs_have_a_page():
    old = [{"prompt": "x", "requirements": [], "scores": {}, "answers": {
        "original": "a", "pit": "b", "pit_iteration_2": "c", "pit_t0.2": "d", "self_refine": "e", "fresh": "f",
    }}]  # fmt: skip
    assert data_of(report.render({}, {}, old, {}))["chains"] == {
        "pit": ["original", "pit", "pit_iteration_2"],
        "self_refine": ["original", "self_refine"],
    }
    empty = report.render({}, {}, [], {})
    assert data_of(empty)["rows"] == []
    assert '<section id="samples" hidden>' in empty
    assert '<section id="samples">' in report.render({}, {}, old, {})


def test_of_many_samples_evenly_spaced_ones_are_shown(monkeypatch):
    samples = [{"prompt": f"{i} " + "x" * (50 if i % 3 else 900), "answers": {"original": "a"}} for i in range(300)]
    everything = report.render({}, {}, samples, {})
    assert len(data_of(everything)["rows"]) == 300
    assert "prompts, evenly spaced" not in everything
    monkeypatch.setattr(report, "MAX_SAMPLES_BYTES", 40_000)
    fewer = report.render({}, {}, samples, {})
    shown = [row["i"] for row in data_of(fewer)["rows"]]
    empty = len(report.render({}, {}, [], {}))
    assert len(everything) - empty > 100_000
    assert len(fewer) - empty < 40_500
    assert len(shown) > 60
    gaps = {b - a for a, b in zip(shown, shown[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1
    assert shown[-1] + max(gaps) >= 300
    assert f"{len(shown)} of 300 prompts, evenly spaced" in fewer
    monkeypatch.setattr(report, "MAX_SAMPLES_BYTES", 10)
    assert data_of(report.render({}, {}, samples, {}))["rows"] == []


def test_a_long_answer_is_cut_and_says_so(monkeypatch):
    monkeypatch.setattr(report, "MAX_CHARACTERS", 10)
    found = report.render({}, {}, [{"prompt": "p", "answers": {"original": "a" * 11, "fresh": "b" * 10}}], {})
    assert data_of(found)["rows"][0]["a"] == ["a" * 10 + " [cut here]", "b" * 10]
    assert "Texts are cut after 10 characters. All is in samples/test.jsonl." in found


WORDS = st.lists(st.sampled_from(["a", "b ", "c\n", " ", "don't ", "!", "é", "\n\n", "#x"]), max_size=12).map("".join)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(WORDS, WORDS)
def test_differences_make_up_both_texts(before, after):
    pieces = report.changes(before, after)
    kept = lambda signs: "".join(piece[1:] for piece in pieces if piece[0] in signs)  # noqa: E731
    assert kept("=+") == after
    assert kept("=-").split() == before.split() or "".join(kept("=-").split()) == "".join(before.split())
    if before == after:
        assert all(piece[0] == "=" for piece in pieces)


def test_differences_by_hand():
    assert report.changes("Use a lemon. Thanks", "Use one lemon, please. Thanks") == [
        "=Use ", "-a ", "+one ", "=lemon", "+, please", "=. Thanks",
    ]  # fmt: skip
    assert report.changes("", "new") == ["+new"]
    assert report.changes("old", "") == ["-old"]


def test_text_can_be_told_from_the_ground_in_both_schemes(page):
    blocks = re.findall(r":root \{(.*?)\}", page, re.DOTALL)[:2]
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks)
    assert set(light) == set(dark)
    inks_on = {
        "paper": ("ink", "quiet", "accent", "good", "bad"), "raised": ("ink", "quiet", "good", "bad"),
        "ins": ("ink",), "del": ("ink",),
    }  # fmt: skip
    for colors in (light, dark):
        for ground, inks in inks_on.items():
            assert all(contrast(colors[ground], colors[ink]) >= 4.5 for ink in inks), ground
        assert all(contrast(colors["paper"], colors[f"s{i}"]) >= 3.0 for i in range(len(figures.SERIES)))
    assert [light[f"s{i}"] for i in range(len(figures.SERIES))] == list(figures.SERIES)


def test_figures_of_the_page_follow_its_scheme(page):
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert drawn.count("<svg") == len(figures.captions(RESULTS))
    assert set(re.findall(r": #[0-9a-f]{6}", drawn)) == set()
    assert {"var(--ink)", "var(--paper)", "var(--s0)"} <= set(re.findall(r"var\(--\w+\)", drawn))


def test_config_and_commands_are_shown(page):
    assert "seed = 3\nppo.kl_coef = 0.2" in page
    assert "python -m pit_jax.train --config.arms=second_rl_only" in page
