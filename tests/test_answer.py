"""The answer: by the one rule, from the best evidence, in words that fit every verdict."""

import json
import re
from functools import cache

import pytest
from test_claims import GAINS, made_up

from silalib.analysis import answer, status
from silalib.files import ROOT


@cache
def whole(**found):
    """The answer of made-up evidence: profile -> (claim, gains)."""
    parts = {profile: made_up(*named, profile) for profile, named in found.items()}
    return answer.answer(parts)


def paragraphs(found):
    """Heading -> the text under it."""
    return dict(re.findall(r"^\*\*(.*?)\*\* (.*)", answer.in_markdown(found), re.MULTILINE))


@pytest.mark.parametrize(
    "verdict, word",
    [
        ("reproduced", "Yes"),
        ("negligible", "Not as claimed"),
        ("contradicted", "Not as claimed"),
        ("undecided", "Undecided"),
    ],
)
def test_a_verdict_is_said_in_a_word(verdict, word):
    told = paragraphs(whole(paper=("1", GAINS[verdict])))
    assert told["Does SiLa work?"].startswith(f"{word}: ")
    assert told["Does SiLa work?"].endswith(f"points, 3 seeds, profile `paper` (claim 1: {verdict}).")


def test_too_few_seeds_and_no_record_give_no_advice():
    told = paragraphs(whole(paper=("1", GAINS["reproduced"][:2])))
    assert told["Does SiLa work?"].startswith("Not decided yet: ") and "so far, 2 of 3 seeds" in told["Does SiLa work?"]
    assert told["Should I use it?"] == "Too early to say: not all planned seeds are trained."
    told = paragraphs(answer.answer({}))
    assert told["Does SiLa work?"] == "Not known yet."
    assert told["Which claims hold?"].endswith("not run: 1, 2, 3, 4, 5, 6, 7; reproduced by counting: 8.")


def test_the_advice_waits_for_equal_compute():
    assert "Perhaps" in paragraphs(whole(paper=("1", GAINS["reproduced"])))["Should I use it?"]


@pytest.mark.parametrize(
    "equal, advice", [("reproduced", "Yes, where"), ("contradicted", "Not for accuracy"), ("undecided", "Perhaps")]
)
def test_the_advice_follows_equal_compute(equal, advice):
    """Table 1 gains 2.5; what is left of it at equal compute is another claim's evidence."""
    rows = whole(paper=("1", GAINS["reproduced"])).rows
    other = whole(paper=("A", GAINS[equal])).rows
    mixed = whole(paper=("1", GAINS["reproduced"]))._replace(rows=[rows[0], other[1], *rows[2:]])
    assert paragraphs(mixed)["Should I use it?"].startswith(advice)


def test_paper_comes_before_small_and_a_verdict_before_none():
    both = whole(paper=("6", GAINS["reproduced"]), small=("6", GAINS["contradicted"]))
    row = both.rows[-1]
    assert (row.profile, row.effect.verdict) == ("paper", "reproduced")
    row = whole(paper=("6", GAINS["reproduced"][:1]), small=("6", GAINS["contradicted"])).rows[-1]
    assert (row.profile, row.effect.verdict) == ("small", "contradicted")
    assert whole(paper=("6", ()), small=("6", ())).rows[-1].profile == ""


def test_the_terminal_and_the_page_say_the_same():
    found = whole(paper=("6", GAINS["reproduced"]))
    lines, text = answer.in_lines(found), answer.in_markdown(found)
    for question, ours, verdict, *_ in answer.table(found).itertuples(index=False):
        assert any(line.startswith(f"  {question} {ours}") and (verdict in line or verdict == "-") for line in lines)
        assert f"| {question} | {ours} | {verdict} |" in text
    assert not any("*" in line or "`" in line for line in lines)


def test_it_is_kept_until_a_record_changes(plan, results):
    plan([])
    results.mkdir()
    kept = results / "answer.json"
    came = json.loads((ROOT / "results" / "answer.json").read_bytes())
    assert status.recall() == came and not kept.exists()  # no records here: the answer that came with the code
    folder = results / "small" / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    status.recall()
    made = json.loads(kept.read_text())
    kept.write_text(json.dumps(made | {"lines": ["kept"]}))
    assert status.recall()["lines"] == ["kept"]
    (folder / "result.json").write_text("{ }")
    assert status.recall()["lines"] == made["lines"]
    kept.write_text("damaged")
    assert status.recall()["lines"] == made["lines"]
