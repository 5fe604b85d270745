"""Every planted bug of tests/mutants still applies, and its killer is there. `python -m tests.mutants` runs them."""

import pytest

from tests.mutants.plant import LostMutant, Mutant, all_mutants


def test_each_mutant_applies() -> None:
    mutants = all_mutants()
    assert len({mutant.name for mutant in mutants}) == len(mutants) >= 60
    for mutant in mutants:
        mutant.check()


SOURCE = """
class Adam:
    def step(self):
        if self.count > 0:  # ß
            self.count += 1

    def reset(self):
        self.count = 0
"""


def plant(before: str, after: str, place: str = "x.py:Adam.step") -> str:
    return Mutant("name", "topic", place, before, after, "effect", "killer").mutate(SOURCE)


def test_a_bug_is_planted_by_syntax() -> None:
    assert plant("self.count > 0", "True") == SOURCE.replace("self.count > 0", "True")
    two = plant("self.count += 1", "self.count += 1\nself.reset()")
    assert "            self.count += 1\n            self.reset()\n" in two


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("self.count = 0", "pass", "x.py:Adam.step"),
        ("self.count", "1", "x.py:Adam.step"),
        ("self.count = 0", "pass", "x.py:Adam.stop"),
        ("self.count > 0", "(self.count > 0)", "x.py:Adam.step"),
    ],
    ids=["gone", "twice", "no such function", "the same"],
)
def test_a_bug_that_cannot_be_planted_is_an_error(before: str, after: str, place: str) -> None:
    with pytest.raises(LostMutant, match="name"):
        plant(before, after, place)
