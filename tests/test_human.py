import json
import re

import numpy as np
import pytest
from test_report import HOSTILE, Page

from pit_jax.evaluation import human, win_rate

PAIRS = [human.Pair(f"Question {i}?", f"better {i}", f"worse {i}") for i in range(40)]


def shown(page):
    """What the sheet's own script reads."""
    return json.loads(Page(page).scripts[0])


def export(page, annotator, choose, items=None):
    """What an annotator saves who answers `choose(item)` on each of the items; None is no answer."""
    data = shown(page)
    said = [(item["id"], choose(item)) for item in data["items"] if items is None or item["id"] in items]
    verdicts = [{"item": name, "verdict": verdict} for name, verdict in said if verdict]
    return {"sheet": data["sheet"], "annotator": annotator, "verdicts": verdicts}


def prefers(word):
    return lambda item: "A" if word in item["a"] else "B"


# the sheet


def test_outcomes_are_those_of_the_pairs_whichever_side_was_which():
    page, key = human.sheet(PAIRS, 5, "Answers"), human.key(PAIRS, 5)

    def choose(item):
        kind = int(item["prompt"].split()[1][:-1]) % 3
        return "tie" if kind == 0 else prefers("better" if kind == 1 else "worse")(item)

    found = human.read_verdicts(key, {"a.json": export(page, "Ann", choose)})
    assert found.annotators == ("Ann",)
    assert found.outcome.dtype == np.int8
    assert found.outcome.tolist() == [[(0, 1, -1)[i % 3] for i in range(40)]]
    assert found.mask.all()


def test_items_and_sides_are_shuffled_by_the_seed_alone():
    data, key = shown(human.sheet(PAIRS, 5, "Answers")), human.key(PAIRS, 5)
    assert data["sheet"] == key["sheet"]
    assert human.sheet(PAIRS, 5, "Answers") == human.sheet(PAIRS, 5, "Answers")
    order = [item["prompt"] for item in data["items"]]
    assert sorted(order) == sorted(pair.prompt for pair in PAIRS)
    assert order != [pair.prompt for pair in PAIRS]
    first = [item["a"].startswith("better") for item in data["items"]]
    assert sum(first) == 20  # half of them, so that a side that is preferred blindly wins nothing
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)
    other = shown(human.sheet(PAIRS, 6, "Answers"))
    assert other["sheet"] != data["sheet"]
    assert [item["prompt"] for item in other["items"]] != order


def test_the_sheet_does_not_say_which_side_is_which():
    page = human.sheet(PAIRS, 123456789, "Answers")
    data = shown(page)
    assert set(data) == {"sheet", "items"}
    assert all(set(item) == {"id", "prompt", "a", "b"} for item in data["items"])
    assert [item["id"] for item in data["items"]] == [f"item-{i + 1}" for i in range(40)]
    assert not re.search(r"(?i)\bpit|self.?refine|original|chosen|rejected|first_|second_|123456789", page)
    # A sheet of the swapped pairs that happens to show the same is the same: its id has nothing to do with the sides.
    one, swapped = [human.Pair("x", "a", "b")], [human.Pair("x", "b", "a")]
    pages = {human.sheet(pairs, seed, "t") for pairs in (one, swapped) for seed in range(8)}
    assert len(pages) <= 2


def test_a_sheet_of_one_item_may_have_either_side_first():
    sides = {human.key([human.Pair("x", "a", "b"), human.Pair("y", "c", "d")], seed)["items"]["item-1"]["first"]
             for seed in range(20)}  # fmt: skip
    assert sides == {"A", "B"}


def test_no_text_becomes_markup():
    calm = human.sheet([human.Pair("calm", "calm", "calm")], 0, "calm", "calm")
    wild = human.sheet([human.Pair(HOSTILE, HOSTILE, HOSTILE)], 0, HOSTILE, HOSTILE)
    wild.encode("utf-8")
    parsed, wanted = Page(wild), Page(calm)
    assert parsed.elements == [
        (tag, {k: parsed.elements[i][1][k] if v == "calm" else v for k, v in attributes.items()})
        for i, (tag, attributes) in enumerate(wanted.elements)
    ]
    assert parsed.comments == []
    assert parsed.scripts[1] == wanted.scripts[1]
    assert shown(wild)["items"] == [{"id": "item-1", "prompt": HOSTILE, "a": HOSTILE, "b": HOSTILE}]
    assert "{{data}}" in "".join(parsed.texts)


def test_the_sheet_works_without_a_network_and_its_controls_have_names():
    page = human.sheet(PAIRS[:2], 0, "Answers")
    parsed = Page(page)
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not re.search(r"https?://|@import|url\(", page)
    assert not {"link", "iframe", "img", "base", "form"} & set(parsed.tags())
    inputs = [a for tag, a in parsed.elements if tag == "input"]
    labels = {a.get("for") for tag, a in parsed.elements if tag == "label"}
    assert all("aria-label" in a or a["id"] in labels for a in inputs)


def test_no_pairs_no_sheet():
    with pytest.raises(ValueError, match="at least one"):
        human.sheet([], 0, "t")
    with pytest.raises(ValueError, match="at least one"):
        human.key([], 0)


def test_a_key_survives_json():
    key = json.loads(json.dumps(human.key(PAIRS, 5, "Answers")))
    page = human.sheet(PAIRS, 5, "Answers")
    assert human.read_verdicts(key, {"a": export(page, "Ann", prefers("worse"))}).outcome.tolist() == [[-1] * 40]


# what annotators send back


def exports(**changes):
    page = human.sheet(PAIRS, 5, "Answers")
    return {"a.json": export(page, "Ann", prefers("better")), "b.json": export(page, "Bo", prefers("worse"))} | changes


def test_items_without_a_verdict_are_masked():
    page = human.sheet(PAIRS, 5, "Answers")
    key = human.key(PAIRS, 5)
    some = {"item-1", "item-7"}
    found = human.read_verdicts(key, {"a": export(page, "Ann", prefers("better"), some)})
    rows = sorted(key["items"][item]["pair"] for item in some)
    assert np.flatnonzero(found.mask[0]).tolist() == rows
    assert np.flatnonzero(found.outcome[0]).tolist() == rows


def change(**fields):
    return {"b.json": exports()["b.json"] | fields}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (change(sheet="000"), r"b\.json is of the sheet '000', and the key of the sheet [0-9a-f]{12}"),
        (change(annotator=" ann "), r"b\.json and a\.json are both of the annotator 'ann'"),
        (change(annotator="Ａｎｎ"), "are both of the annotator"),
        (change(annotator="  "), r"b\.json does not name its annotator"),
        (change(annotator=3), r"b\.json does not name its annotator"),
        (change(verdicts=[{"item": "item-99", "verdict": "A"}]), r"b\.json: the sheet .* has no item 'item-99'"),
        (change(verdicts=[{"item": "item-1", "verdict": "C"}]), r"verdict on item-1 is 'C', and not one of A, B and"),
        (change(verdicts=[{"item": "item-1", "verdict": v} for v in "AA"]), r"item-1 has two verdicts of 'Bo'"),
        (change(verdicts=[{"item": "item-1"}]), r"b\.json: .* is not .* both text"),
        (change(verdicts=[{"item": ["item-1"], "verdict": "A"}]), "both text"),
        (change(verdicts={"item-1": "A"}), "both text"),
        (change(verdicts=None), "both text"),
        (change(verdicts=["A"]), "both text"),
        ({"b.json": ["not", "an", "export"]}, r"b\.json is not what a sheet saves"),
        ({"b.json": {"sheet": "x"}}, r"b\.json is not what a sheet saves"),
    ],
)
def test_wrong_files_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        human.read_verdicts(human.key(PAIRS, 5), exports(**wrong))


# two annotators


def annotations(*rows):
    """Rows of "+", "-", "0" and "." for no verdict."""
    outcome = [[{"+": 1, "-": -1}.get(c, 0) for c in row] for row in rows]
    mask = [[c != "." for c in row] for row in rows]
    names = tuple("abcdef"[: len(rows)])
    return human.Annotations(names, np.array(outcome, np.int8), np.array(mask))


def test_a_win_only_where_both_agree():
    verdicts = human.agreed(annotations("+++---000...", "+-0+-0+-0+-."))
    assert verdicts.outcome.tolist() == [1, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0]
    assert verdicts.mask.tolist() == [True] * 9 + [False] * 3
    assert verdicts.outcome.dtype == np.int8
    assert verdicts.mask.dtype == bool


def test_each_pair_may_have_its_own_two_of_five_annotators():
    verdicts = human.agreed(annotations("+.-.", "+...", ".--.", ".+.."))
    assert verdicts.outcome.tolist() == [1, 0, -1, 0]
    assert verdicts.mask.tolist() == [True, True, True, False]
    assert human.agreed(annotations("+.-.", "+..."), 1).outcome.tolist() == [1, 0, -1, 0]


def test_the_verdicts_go_into_win_rates():
    verdicts = human.agreed(annotations("+++-.", "++--."))
    summary = win_rate.summarize(verdicts.outcome[verdicts.mask])
    assert (summary["win"], summary["lose"], summary["tie"], summary["n"]) == (0.5, 0.25, 0.25, 4)


def test_swapping_the_sides_of_all_pairs_swaps_the_outcomes():
    swapped = [human.Pair(prompt, second, first) for prompt, first, second in PAIRS]
    answers = [human.read_verdicts(human.key(pairs, 9), {
        "a": export(human.sheet(pairs, 9, "t"), "Ann", prefers("better 1")),
        "b": export(human.sheet(pairs, 9, "t"), "Bo", prefers("better")),
    }) for pairs in (PAIRS, swapped)]  # fmt: skip
    outcomes = [human.agreed(a).outcome for a in answers]
    is_one = np.array(["better 1" in pair.first for pair in PAIRS])
    assert (outcomes[0][is_one] == 1).all()
    assert (outcomes[0][is_one] == -outcomes[1][is_one]).all()


def test_kappa_by_hand():
    # 4 of the 6 that both judged are alike. Shares of +, 0, -: 3/6, 2/6, 1/6 and 3/6, 1/6, 2/6; by chance
    # 9/36 + 2/36 + 2/36 = 13/36 are. (24/36 - 13/36) / (23/36) = 11/23.
    found = human.agreement(annotations("+++00-.+", "++-0+-+."))
    assert [(row["annotators"], row["n"]) for row in found] == [(["a", "b"], 6)]
    assert found[0]["agreement"] == pytest.approx(4 / 6)
    assert found[0]["kappa"] == pytest.approx(11 / 23)


def test_kappa_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = ["".join(rng.choice(list("+-0"), 50)) for _ in range(2)]
        both = annotations(*rows)
        expected = metrics.cohen_kappa_score(both.outcome[0], both.outcome[1])
        assert human.agreement(both)[0]["kappa"] == pytest.approx(expected)


def test_agreement_where_it_says_nothing():
    assert human.agreement(annotations("++", "++")) == [
        {"annotators": ["a", "b"], "n": 2, "agreement": 1.0, "kappa": None}
    ]
    assert human.agreement(annotations("+.", ".+")) == []
    assert [(row["annotators"], row["n"]) for row in human.agreement(annotations("+-", "+.", "--"))] == [
        (["a", "b"], 1), (["a", "c"], 2), (["b", "c"], 1),
    ]  # fmt: skip
