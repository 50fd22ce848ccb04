"""The pages draw of a frozen set of committed records what they drew when tests/frozen.json was made, by value."""

from pathlib import Path

import frozen
import pytest

KEPT = Path(__file__).with_name("frozen.json")


@pytest.mark.slow
@pytest.mark.long
def test_pages_draw_what_they_drew():
    keys, expected = frozen.kept(KEPT)
    assert sum(map(len, keys.values())) > 10 and len(expected) > 50
    assert frozen.differences(frozen.draw_these(keys), expected) == []


def test_differences_are_found():
    """A missing row, another number or array, what is not drawn; a figure more is no difference."""
    figure = [[{"shape": [3, 2], "numbers": [6.0, 1.5]}]]
    expected = {"small/figures/a": figure, "small/tables/b": [[[1.0, 2.5], []], [[3.0], [0.25]]]}
    assert frozen.differences(expected | {"small/figures/new": []}, expected) == []
    for changed in (
        {"small/figures/a": [[{"shape": [2, 3], "numbers": [6.0, 1.5]}]]},
        {"small/figures/a": [[{"shape": [3, 2], "numbers": [6.0, 1.5001]}]]},
        {"small/figures/a": [[*figure[0], *figure[0]]]},
        {"small/tables/b": [[[1.0, 2.5], []]]},
        {"small/tables/b": [[[1.0, 2.5], []], [[3.0], [0.26]]]},
    ):
        assert len(frozen.differences(expected | changed, expected)) == 1
    assert frozen.differences({"small/figures/a": figure}, expected) == ["small/tables/b is not drawn"]
    assert frozen.values("76.83 ± 0.40 (−, 1e-3)") == [76.83, 0.4, 1e-3]
