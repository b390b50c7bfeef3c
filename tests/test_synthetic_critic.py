"""The critic of the synthetic task: its feedback read back, and its edits by hand and by law."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pit_jax.data import synthetic, synthetic_critic as critic, synthetic_text
from pit_jax.data.verifier import CHECKS, verify, words
from pit_jax.types import Requirement

TEA, SILVER = Requirement("topic", "tea"), Requirement("hashtag", "silver")


@pytest.fixture(scope="module")
def rows():
    return synthetic.generate(3, 0, 400)


@pytest.fixture(scope="module")
def cases(rows):
    """(row, answer): y_l, y_w and the answer to another prompt, for each row."""
    return [(row, text) for row, other in zip(rows, rows[1:], strict=False) for text in answers_of(row, other)]


def answers_of(row, other):
    return row.rejected, row.chosen, other.chosen


def requirements_of(*pairs):
    return tuple(Requirement(*pair) for pair in pairs)


def criticize(row, text, seed=0):
    return critic.criticize(row.requirements, text, row.chosen, np.random.default_rng(seed))


def damage(rng, text):
    """What a half-trained model does to an answer."""
    pieces = text.split(" ")
    i = int(rng.integers(len(pieces)))
    other = synthetic_text.BANK[int(rng.integers(len(synthetic_text.BANK)))]
    marks = [m.span() for m in re.finditer(r"</?\w+>|\*\*|[()\"{}]", text)]
    how = int(rng.integers(7))
    if how == 0 and len(pieces) > 4:
        del pieces[i]
    elif how == 1:
        pieces.insert(i, pieces[i])
    elif how == 2:
        pieces[i] = other
    elif how == 3:
        return text[: int(rng.integers(len(text) // 2, len(text)))]
    elif how == 4 and marks:
        start, end = marks[int(rng.integers(len(marks)))]
        return text[:start] + text[end:]
    elif how == 5:
        return (str.upper, str.lower, str.title)[int(rng.integers(3))](text)
    else:
        pieces.insert(i, other)
    return " ".join(pieces)


def distance(a, b):
    """Words to insert, delete or replace."""
    a, b = a.split(), b.split()
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


# Feedback -------------------------------------------------------------------------------------------------------------


def test_score_by_hand():
    requirements = requirements_of(("topic", "tea"), ("contains", "gold"), ("hashtag", "silver"), ("upper_case",))
    answers = ("coffee", "tea", "tea with gold", "tea with gold #silver", "TEA WITH GOLD #SILVER")
    # 1 + 9 * (0, 1/4, 1/2, 3/4, 1) = 1, 3.25, 5.5, 7.75, 10; 5.5 goes to the even number
    assert [critic.score(requirements, answer) for answer in answers] == [1, 3, 6, 8, 10]
    assert critic.score([TEA] * 19 + [SILVER], "tea") == 9  # 9.55, but not all are met


def test_a_critique_by_hand():
    found = critic.criticize((TEA, SILVER), "Tea now.", "Tea. #silver", np.random.default_rng(0))
    ways = (
        ("yes", "no", "Add #silver."),
        ("holds", "fails", "Tag it with #silver."),
        ("right", "wrong", "Put in #silver."),
    )
    assert (found.weaknesses, found.suggestions) in {
        (f"topic tea {met}{join}#silver {failed}.", suggestion)
        for met, failed, suggestion in ways
        for join in (", ", "; ", " and ")
    }
    assert found[2:] == (6, "Tea now. #silver")


def test_wordings_for_met_and_not_met_are_told_apart():
    assert critic.SUGGESTIONS.keys() == CHECKS.keys()
    assert not any(a.startswith(b) or b.startswith(a) for a in critic.MET for b in critic.NOT_MET)
    for ways in (critic.MET, critic.NOT_MET, critic.NOTHING_TO_CHANGE, *critic.SUGGESTIONS.values()):
        assert len(set(ways)) == len(ways) == critic.NUM_WAYS
    suggestions = [text for ways in critic.SUGGESTIONS.values() for text in ways]
    assert len(set(suggestions)) == len(suggestions)


def read_judgements(requirements, text):
    """The verdicts of weaknesses: each requirement's name, then what is said of it, then how the next one is joined."""
    verdicts = []
    for r in requirements:
        name = synthetic_text.CLAUSES[r.kind].format(v=r.value) + " "
        assert text.startswith(name)
        text = text.removeprefix(name)
        said = next(way for way in (*critic.MET, *critic.NOT_MET) if text.startswith(way))
        verdicts.append(said in critic.MET)
        text = text.removeprefix(said)
        text = text.removeprefix(next(j for j in (", ", "; ", " and ", ".") if text.startswith(j)))
    assert text == ""
    return tuple(verdicts)


def test_judgements_are_the_verifiers(cases):
    for i, (row, text) in enumerate(cases):
        found = criticize(row, text, seed=i)
        assert read_judgements(row.requirements, found.weaknesses) == verify(row.requirements, text)
        assert len(found.weaknesses.split()) <= 7 * len(row.requirements)


def test_each_failing_requirement_has_its_suggestion_and_no_other(cases):
    for i, (row, text) in enumerate(cases):
        rest = criticize(row, text, seed=i).suggestions
        failing = [r for r, ok in zip(row.requirements, verify(row.requirements, text), strict=True) if not ok]
        for r in failing:
            ways = [way.format(v=r.value) for way in critic.SUGGESTIONS[r.kind]]
            said = max((way for way in ways if rest.startswith(way)), key=len)
            rest = rest.removeprefix(said).removeprefix(" ")
        assert rest in (("",) if failing else critic.NOTHING_TO_CHANGE)


def test_what_is_right_is_left_alone(rows):
    for row in rows:
        found = critic.criticize(row.requirements, row.chosen, "never used", np.random.default_rng(0))
        assert found[2:] == (10, row.chosen)
        assert critic.repair(row.requirements, row.chosen) == row.chosen


def test_only_the_wording_depends_on_chance(rows):
    for row in rows[:20]:
        found = [criticize(row, row.rejected, seed) for seed in range(12)]
        assert found[0] == criticize(row, row.rejected, 0)
        assert len({f.weaknesses for f in found}) > 3 and len({f.suggestions for f in found}) > 1
        assert len({f[2:] for f in found}) == 1


def test_another_process_writes_the_same(rows):
    """Sets of strings have another order in each process; no critique may depend on it."""
    code = """
import numpy as np
from pit_jax.data import synthetic, synthetic_critic as critic
for row in synthetic.generate(3, 0, 100):
    print(repr(critic.criticize(row.requirements, row.rejected, row.chosen, np.random.default_rng(7))))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [repr(criticize(row, row.rejected, seed=7)) for row in rows[:100]]


def test_where_no_edit_is_found_the_chosen_answer_is_the_refinement():
    requirements, rng = (TEA, SILVER), np.random.default_rng(0)
    no_words, gibberish, endless = ("", " ", "\n", "#silver", "!?", "<b></b>"), "Xq zzt tea.", "tea " * 60
    for text in (*no_words, gibberish, endless, "Our"):  # "Our" is one word of three at best
        assert critic.repair(requirements, text) is None
        assert critic.criticize(requirements, text, "Tea! #silver", rng).refinement == "Tea! #silver"
    with pytest.raises(ValueError, match="does not meet"):
        critic.criticize(requirements, "", "Coffee! #silver", rng)
    with pytest.raises(ValueError, match="nothing to judge"):
        critic.criticize((), "Tea", "Tea", rng)


def test_wordings_hold_every_word_of_the_feedback(cases):
    known = set(re.findall(r"[A-Za-z]+", " ".join(critic.wordings())))
    for i, (row, text) in enumerate(cases):
        found = criticize(row, text, seed=i)
        values = {word for r in row.requirements for word in r.value.split()}
        assert set(re.findall(r"[A-Za-z]+", f"{found.weaknesses} {found.suggestions}")) <= known | values


# Edits ----------------------------------------------------------------------------------------------------------------

BY_HAND = [
    ("Our tea is for you.", "Our tea is for you. #silver", ("topic", "tea"), ("hashtag", "silver")),
    ("Our tea is for you. #gold", "Our tea is for you. #silver", ("topic", "tea"), ("hashtag", "silver")),
    ("Our tea is for you. # silver", "Our tea is for you. #silver", ("topic", "tea"), ("hashtag", "silver")),
    ('"BUY TEA HERE!"', '"BUY TEA HERE! #SILVER"', ("topic", "tea"), ("hashtag", "silver")),
    ("Pizza is back.", "Tea party is back.", ("topic", "tea party")),
    ("Our party is for you.", "Our tea party is for you.", ("topic", "tea party")),
    ("Welcome to it today.", "Welcome to tea today.", ("topic", "tea")),
    ("Thank you for <i>this</i> here.", "Thank you for <i>tea</i> here.", ("topic", "tea")),
    ("Our is for you.", "Our tea is for you.", ("topic", "tea")),
    ("Join us for here.", "Join us for tea here.", ("topic", "tea")),
    ("All is back.", "Tea is back.", ("topic", "tea")),
    ("See you at tea with gold.", "See you at tea with rose.", ("topic", "tea"), ("contains", "rose")),
    ("See you at tea and gold.", "See you at tea.", ("topic", "tea"), ("avoids", "gold")),
    ("gold time: see you at tea.", "rose time: see you at tea.", ("topic", "tea"), ("starts_with", "rose")),
    ("The rose time: see you at tea.", "rose time: see you at tea.", ("topic", "tea"), ("starts_with", "rose")),
    ("See you at tea with gold!", "See you at tea with rose!", ("topic", "tea"), ("ends_with", "rose")),
    ("See you at tea with rose today!", "See you at tea with rose!", ("topic", "tea"), ("ends_with", "rose")),
    ("<p>Tea is <b>Back</p>", "<p>tea is <b>back</b></p>", ("html_bold",), ("html_paragraph",), ("lower_case",)),
    ("Tea IS <i>back</i>.", "TEA IS <i>BACK</i>.", ("topic", "tea"), ("upper_case",)),
    ("Tea is back <b>with gold.", "Tea is back <b>with gold</b>.", ("topic", "tea"), ("html_bold",)),
    ("Tea is back with gold</b>.", "Tea is back <b>with gold</b>.", ("topic", "tea"), ("html_bold",)),
    ("Tea is back <i>with gold</b>.", "Tea is back <i>with gold</i>.", ("topic", "tea"), ("html_italic",)),
    ("Buy tea here.</p>", "<p>Buy tea here.</p>", ("topic", "tea"), ("html_paragraph",)),
    ("Buy **tea here.", "Buy **tea** here.", ("topic", "tea"), ("markdown_bold",)),
    ("Buy tea [with gold]!", "Buy tea (with gold)!", ("topic", "tea"), ("parentheses",)),
    ("## Buy tea.", "# Buy tea.", ("topic", "tea"), ("markdown_heading",)),
    ("'Buy tea.'", '"Buy tea."', ("topic", "tea"), ("quotes",)),
    ('{"line": "Buy tea."}', '{"text": "Buy tea."}', ("topic", "tea"), ("json", "text")),
    ('{"text": "Buy tea.}', '{"text": "Buy tea."}', ("topic", "tea"), ("json", "text")),
    ("Buy tea here this week.", "Buy tea here.", ("topic", "tea"), ("exactly_words", "3")),
    ("Buy tea here this week now.", "Buy tea here this week.", ("topic", "tea"), ("at_most_words", "5")),
    ("Buy tea here and call us.", "Buy tea here. Call us.", ("topic", "tea"), ("sentences", "2")),
    ("Buy tea here. We love it. Call us.", "Buy tea here. We love it.", ("starts_with", "buy"), ("sentences", "2")),
    ("İİİİ our tea. We love it. Call us.", "İİİİ our tea. We love it.", ("topic", "tea"), ("sentences", "2")),
    ("* Our tea\n* Have fun", "- Our tea\n- Have fun", ("topic", "tea"), ("bullets", "2")),
    ("1. Our tea\n2. Have fun\n3. Good news", "1. Our tea\n2. Good news", ("topic", "tea"), ("numbered", "2")),
    ('"Buy tea."', '"Buy tea!"', ("topic", "tea"), ("exclamation",)),
    ("<p>Buy tea <b>here</b>!</p>", "<p>Buy tea <b>here</b>?</p>", ("topic", "tea"), ("question",)),
    ("Buy tea.\nPS Call us.", "Buy tea.\nP.S. Call us.", ("topic", "tea"), ("postscript",)),
    ("Buy, tea here, now.", "Buy tea here now.", ("topic", "tea"), ("no_commas",)),
    ("Buy tea. #a #gold #rose", "Buy tea. #a #gold", ("topic", "tea"), ("hashtags", "2")),
]


@pytest.mark.parametrize(("before", "after", "requirements"), [(a, b, pairs) for a, b, *pairs in BY_HAND])
def test_edits_by_hand(before, after, requirements):
    assert critic.repair(requirements_of(*requirements), before) == after


@pytest.mark.parametrize("kind", CHECKS)
def test_every_kind_can_be_mended_alone(kind):
    weights = dict.fromkeys(synthetic.FAILURE_WEIGHTS, 0.0) | {kind: 1.0}
    mended = 0
    for row in synthetic.generate(1, 0, 16, failure_weights=weights):
        met = verify(row.requirements, row.rejected)
        assert [r.kind for r, ok in zip(row.requirements, met, strict=True) if not ok] == [kind]
        text = critic.repair(row.requirements, row.rejected)
        if text is not None:
            assert all(verify(row.requirements, text)), (row, text)
            mended += 1
    assert mended >= 15


def test_almost_all_answers_are_mended(rows):
    rng = np.random.default_rng(0)
    damaged = [damage(rng, damage(rng, row.rejected)) for row in rows]
    others = [row.chosen for row in (*rows[1:], rows[0])]
    for texts, least in (([row.rejected for row in rows], 0.99), (damaged, 0.97), (others, 0.9)):
        found = [critic.repair(row.requirements, text) for row, text in zip(rows, texts, strict=True)]
        for row, text in zip(rows, found, strict=True):
            assert text is None or all(verify(row.requirements, text)), (row, text)
        assert np.mean([text is not None for text in found]) >= least


def test_edits_are_smaller_than_rewriting(rows):
    mended = [critic.repair(row.requirements, row.rejected) or row.chosen for row in rows]
    ours = np.array([distance(row.rejected, text) for row, text in zip(rows, mended, strict=True)])
    rewritten = np.array([distance(row.rejected, row.chosen) for row in rows])
    assert ours.mean() < 0.7 * rewritten.mean()
    assert np.mean(ours <= rewritten) > 0.92
    kept = [len(set(words(row.rejected)) & set(words(text))) for row, text in zip(rows, mended, strict=True)]
    assert np.mean(np.divide(kept, [len(set(words(row.rejected))) for row in rows])) > 0.8


def test_edits_read_like_the_data(rows):
    """No space doubled, lost or before a mark, nothing empty inside of marks, and no word that the data do not have."""
    marks = r"  |^ | $| \n|\n\n| [.,!?)]|\( |<b> |<i> |\(\)|><|\*\*\*\*|[a-z][<(]?[A-Z][a-z]|[.!?]{2}"
    broken = re.compile(marks)
    vocabulary = set(re.findall(r"[a-z]+", " ".join(synthetic_text.word_forms()).lower())) | {"p", "s"}
    for row in rows:
        assert not broken.search(row.chosen), row.chosen
        text = critic.repair(row.requirements, row.rejected)
        assert text is None or not broken.search(text), (row.rejected, text)
        assert text is None or set(re.findall(r"[a-z]+", re.sub("<.*?>", " ", text.lower()))) <= vocabulary, text


# Fragments of which broken answers are made, beside arbitrary characters.
_PIECES = st.sampled_from(
    [*("<b>", "</b>", "<p>", "</p>", "<i", "**", "*", '"', "“", '{"text": "', '{"', '"}', "{", "}", "(", ")", "[")]
    + [*("- ", "1. ", "2. ", "\n", "\r", "#", "# ", "#tea", "#gold", "tea", " party", " Honey", " with gold", " and ")]
    + [*("P.S.", "\nPS ", "!", "?", ". ", ", ", " ", "\ud800", "é", "İ", "²", "gold time: ", " Come and see", " today")]
)
_ANSWERS = st.one_of(st.lists(_PIECES, max_size=14).map("".join), st.text(max_size=30))
_DEMANDS = st.sampled_from([row.requirements for row in synthetic.generate(5, 0, 150)])


@settings(max_examples=500, deadline=None)
@given(_ANSWERS, _DEMANDS)
def test_any_string_is_an_answer(answer, requirements):
    text = critic.repair(requirements, answer)
    assert text == critic.repair(requirements, answer)
    assert text is None or all(verify(requirements, text))
    chosen = text if text is not None else "x"
    if text is not None:
        found = critic.criticize(requirements, answer, chosen, np.random.default_rng(0))
        assert "\n" not in found.weaknesses + found.suggestions and found.refinement == text
        assert (found.score == 10) == (text == answer) and 1 <= found.score <= 10
