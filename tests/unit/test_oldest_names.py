"""What the oldest versions lack is used inside functions alone, and every used name was looked up there."""

from tests.support.oldest_names import FILE, LACKS, exists, used_names
from tests.support.version_table import PAGE, with_table


def test_names_that_the_oldest_set_lacks_stand_where_they_are_used() -> None:
    lines = FILE.read_text().splitlines()
    lacking = {line.removeprefix(LACKS) for line in lines if line.startswith(LACKS)}
    seen = {line.removeprefix(LACKS) for line in lines}
    used = used_names()
    assert "transformers.MuseGlimmerTextConfig" in lacking
    assert not lacking & {name for name, at_top in used.items() if at_top}
    new = used.keys() - seen
    assert not new, f"run tests/oldest.sh, which has not seen {sorted(new)}"


def test_names_attributes_and_parameters_are_looked_up() -> None:
    for name in ("Trainer", "Trainer.train", "Trainer(model)", "Trainer.train(trial)"):
        assert exists(f"transformers.{name}")
    for name in ("NoTrainer", "Trainer.no", "Trainer(no)"):
        assert not exists(f"transformers.{name}")


def test_the_table_of_versions_is_made_from_the_code() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page, "run python -m tests.support.version_table"
