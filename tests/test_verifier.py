"""The verifier against cases read by hand: for each kind some answers that meet it and some that nearly do."""

import time

import pytest
from hypothesis import given, settings, strategies as st

from pit_jax.data.verifier import CHECKS, hashtags, share_met, verify, words
from pit_jax.types import Requirement

CASES = {  # kind: (value, answers that meet it, answers that do not)
    "topic": (
        "tea shop",
        ["Our tea shop is open", "TEA SHOP!", "<b>tea</b> shop", '{"text": "a tea shop"}', "- tea\n- more tea shop"],
        ["Our tea is here", "shop tea", "tea shops", "#tea shop", "tea or shop", "teashop", "tea-shop", ""],
    ),
    "contains": (
        "honey",
        ["With honey.", "HONEY", "**honey**", "(honey)", "honey, please", "P.S. honey"],
        ["honeys", "#honey", "hon ey", "honey-like", "", "<honey>"],
    ),
    "avoids": ("honey", ["With sugar.", "honeys", "honeymoon"], ["With Honey.", "#honey", "<b>HONEY</b>", "", "!?"]),
    "starts_with": (
        "river",
        ["River news: come", "# River", "- river", "1. RIVER", '"River"', "<p><b>river</b> time</p>", "P.S. river"],
        ["The river", "#river news", "Rivers flow", "", "come river"],
    ),
    "ends_with": (
        "river",
        ["Come to the river", "river!", '"Our River."', "<p>our <b>river</b>.</p>", "(a river)."],
        ["river time", "to the river #tea", "to the #river", "rivers", "river P", ""],
    ),
    "hashtag": (
        "lake",
        ["Come #lake", "#LAKE", "<b>#lake</b>", "a #tea #lake."],
        ["lake", "# lake", "#lakes", "#lake-side"],
    ),
    "hashtags": ("2", ["#a and #b", "#a #a", "# a #b #c"], ["#a", "#a #b #c", "a b", "# a # b", ""]),
    "upper_case": ("", ["COME", "<b>COME</b> NOW!", "1. A"], ["COME now", "come", "COMe", "", "1!"]),
    "lower_case": ("", ["come", "<B>come</B> now", "p.s. it"], ["Come", "come NOW", "COME", "", "1!"]),
    "html_bold": (
        "",
        [
            "a <b>b</b>",
            "<strong>a</strong>",
            "<B>a</B>",
            "<p><b>a <i>b</i></b></p>",
            "a<br><b>b</b>",
            '<b class="x">a</b>',
        ],
        ["<b>a", "a</b>", "<b>a</i>", "<b></b>", "<b> ! </b>", "<b>a<b>", "**a**", "<i>a</i>", "< b>a</b>"]
        + ["<b><i>a</b></i>", "<b>a</b><b></b>", "<b>a</b><i>b"],
    ),
    "html_italic": (
        "",
        ["a <i>b</i>", "<em>a</em>", "<b><i>a</i></b>"],
        ["<i>a", "<i>a</b>", "<i></i>", "*a*", "<b>a</b>", "<i>a</em>"],
    ),
    "html_paragraph": (
        "",
        ["<p>a</p>", " <P>a <b>b</b>.</P>\n", "<p>a<p>b</p></p>"],
        [
            "<p>a",
            "a</p>",
            "<p>a</p> b",
            "b <p>a</p>",
            "<p>a</p><p>b</p>",
            "<p></p>",
            "<p>a<p>",
            "<b>a</b>",
            "<p>a</b></p>",
        ],
    ),
    "markdown_bold": (
        "",
        ["a **b**", "**a b** c **d**"],
        ["a **b", "b**", "*b*", "** b **", "****", "<b>b</b>", "**a** **b", "**!**"],
    ),
    "markdown_heading": (
        "",
        ["# Tea", "# a\nb"],
        ["#Tea", "## Tea", " # Tea", "Tea", "#", "# \nTea", "- # Tea", "# !"],
    ),
    "quotes": ("", ['"Tea"', ' "a b." ', "“Tea”"], ['"Tea', 'Tea"', "'Tea'", '"Tea".', '""', '"', '"a" "b"', "Tea"]),
    "json": (
        "text",
        ['{"text": "tea"}', ' {"a": 1, "text": "tea"}\n', '{"text": "<b>tea</b>"}'],
        ['{"text": "tea"', '{"text": "tea}', '"text": "tea"}', '{"title": "tea"}', '{"text": 1}', '{"text": ""}', "tea"]
        + ['["text"]', '{"text" "tea"}', '{"Text": "tea"}', "{'text': 'tea'}", '{"text": "tea"} x', "[" * 100_000, ""],
    ),
    "parentheses": (
        "",
        ["a (b) c", "(A)", "(a) (b)"],
        ["a (b", "b) a", "a () b", "( ! )", "[b]", "((a))", "(a) b)", "a"],
    ),
    "exactly_words": (
        "3",
        [
            "tea for you",
            "- tea\n- for you",
            "1. Tea for <b>you</b>! #now",
            "a thank-you note",
            "don't do it",
            "P.S. a b c",
        ],
        ["tea for", "tea for you now", "", "a thank you note", "#tea for you", "tea 4 you 2"],
    ),
    "at_most_words": ("3", ["tea for you", "tea", "# a b c #d"], ["tea for you now", "", "#tea", "!"]),
    "sentences": (
        "2",
        ["Come. See!", "Is it? Yes", '"Come... See!!"', "<p>Come! See.</p>", "Come. See. #tea", "Pay 3.50 now. Yes."],
        ["Come.", "Come. See. Go.", "", "...", "Come.See", "Come and see", "1. Come. See. Go."],
    ),
    "bullets": (
        "2",
        ["- a\n- b", "- a\n- b\n", "So:\n- a\n- b", "- **a**\n- <b>b</b>"],
        ["- a", "- a\n- b\n- c", "* a\n* b", "-a\n-b", "- a - b", "- a\n b", "- a\n- ", "", " - a\n - b"],
    ),
    "numbered": (
        "2",
        ["1. a\n2. b", "1. a\n2. b\n", "So:\n1. a\n2. b"],
        [
            "1. a",
            "1. a\n2. b\n3. c",
            "1. a\n3. b",
            "2. a\n3. b",
            "1) a\n2) b",
            "1.a\n2.b",
            "- a\n- b",
            "1. a 2. b",
            "1. a\n2. ",
        ],
    ),
    "exclamation": (
        "",
        ["Tea!", '"Tea!"', "<p>Tea!</p>", "**Tea!**", "(tea!)", "Tea!\n"],
        ["Tea.", "Tea! Now", "!", "Tea!?", "Tea! #a", ""],
    ),
    "question": ("", ["Tea?", "“Tea?”", "<b>Tea</b>?", "Tea!?"], ["Tea.", "Tea? Now", "?", "Tea?!", "Tea? #a", ""]),
    "postscript": (
        "",
        ["Tea.\nP.S. Come.", "tea\np.s. come", "P.S. Come", "Tea\n  P. S. Come", "TEA\nP.S.: COME"],
        ["Tea. P.S. Come.", "Tea\nPS Come", "Tea\nP.S Come", "Tea\nP.S.", "Tea\nP.S. !", "", "Tea\nP.P.S. Come"],
    ),
    "no_commas": ("", ["Tea now.", '{"a": "b"}'], ["Tea, now", ",", "", "!"]),
}


def test_every_kind_has_cases():
    assert CASES.keys() == CHECKS.keys()
    assert len(CHECKS) >= 18


@pytest.mark.parametrize("kind", CHECKS)
def test_kind(kind):
    value, right, wrong = CASES[kind]
    assert [(a, CHECKS[kind](value, a)) for a in right] == [(a, True) for a in right]
    assert [(a, CHECKS[kind](value, a)) for a in wrong] == [(a, False) for a in wrong]


def test_words_and_hashtags():
    text = '1. <p>"Thank-you" note, isn\'t it? #Tea 24</p>\nP.S. Come_back'
    assert words(text) == ["thank-you", "note", "isn't", "it", "24", "come", "back"]
    assert hashtags(text) == ["tea"]


def test_verify_keeps_the_order_and_share_met_is_the_mean():
    requirements = (Requirement("topic", "tea"), Requirement("upper_case"), Requirement("contains", "lake"))
    assert verify(requirements, "Tea by the lake") == (True, False, True)
    assert verify(requirements[::-1], "TEA") == (False, True, True)
    assert share_met(requirements, "Tea by the lake") == pytest.approx(2 / 3)
    assert share_met(requirements, "") == 0.0
    assert share_met((), "anything") == 1.0


def test_unknown_kind_says_what_to_use():
    with pytest.raises(ValueError, match="unknown requirement kinds.*'rhymes'"):
        verify((Requirement("rhymes"),), "tea")


def test_nothing_is_met_by_an_empty_answer():
    assert not any(verify([Requirement(kind, CASES[kind][0]) for kind in CHECKS], ""))


# Pieces of what the checks look for, so that broken forms of each come up, beside arbitrary characters.
_PIECES = st.sampled_from(
    [
        *(
            "<b>",
            "</b>",
            "<p>",
            "</p>",
            "<i",
            "**",
            "*",
            '"',
            "“",
            '{"text": "',
            '"}',
            "{",
            "}",
            "(",
            ")",
            "- ",
            "1. ",
            "2. ",
        )
    ]
    + [
        *(
            "\n",
            "\r",
            "\0",
            "#",
            "#tea",
            "tea",
            "Honey",
            "P.S.",
            "!",
            "?",
            ".",
            ",",
            " ",
            "\ud800",
            "é",
            "٣",
            "९. a",
            "²",
        )
    ]
)
_ANSWERS = st.one_of(st.lists(_PIECES, max_size=12).map("".join), st.text(max_size=40))


@settings(max_examples=400, deadline=None)
@given(_ANSWERS)
def test_any_string_is_an_answer(answer):
    requirements = [Requirement(kind, value) for kind, (value, _, _) in CASES.items()]
    met = verify(requirements, answer)
    assert all(type(m) is bool for m in met)
    by_kind = dict(zip(CASES, met, strict=True))
    assert not (by_kind["upper_case"] and by_kind["lower_case"])
    assert not (by_kind["bullets"] and by_kind["markdown_heading"] and answer.count("\n") < 2)
    assert not (by_kind["exclamation"] and by_kind["question"])
    assert not by_kind["exactly_words"] or by_kind["at_most_words"]


@pytest.mark.parametrize(
    "unit", ["<", "<b>", "<b ", "</b>", "!", "(", "**", '"', "{", "[", "\n", "#", "a", "a-", "1. ", "- \n", "P.S.\n"]
)
def test_huge_answers_take_linear_time(unit):
    requirements = [Requirement(kind, value) for kind, (value, _, _) in CASES.items()]
    start = time.perf_counter()
    verify(requirements, unit * (100_000 // len(unit)) + "x")
    assert time.perf_counter() - start < 5  # a quadratic check would take minutes
