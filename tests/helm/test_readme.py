"""The chart's README and schema say what values.yaml says; its list of scenarios is that of the files."""

import re
from pathlib import Path

import pytest

from docs.make_chart import BEGIN, END, SCENARIOS_BEGIN, SCENARIOS_END, entries, filled, made
from tests.helm.chart import CHART, SCENARIOS

README = (CHART / "README.md").read_text()


def test_readme_and_schema_are_current() -> None:
    for path, text in made().items():
        assert path.read_text() == text, f"{path.name}: run python docs/make_chart.py"


def test_the_table_has_a_row_for_each_value() -> None:
    table = README.split(BEGIN)[1].split(END)[0]
    rows = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    documented = [".".join(entry.path) for entry in entries((CHART / "values.yaml").read_text())]
    assert [row for row in rows if row in documented] == documented
    assert all(row.startswith("settings.") for row in rows if row not in documented)
    assert len(rows) == len(set(rows))
    assert "settings.max_running" in rows


def test_each_scenario_is_in_the_readme_with_its_own_first_line() -> None:
    listed = dict(re.findall(r"^\| `ci/([a-z-]+)-values\.yaml` \| (.+) \|$", README, re.MULTILINE))
    assert sorted(listed) == SCENARIOS
    for name, text in listed.items():
        first = (CHART / "ci" / f"{name}-values.yaml").read_text().splitlines()[0]
        assert text.startswith(first.removeprefix("# "))


def test_values_that_the_readme_names_exist() -> None:
    documented = {".".join(entry.path) for entry in entries((CHART / "values.yaml").read_text())}
    prose = README.split(BEGIN)[0]
    named = set(re.findall(r"`((?:auth|database|image|migrations|networkPolicy|postgresql)\.[A-Za-z.]+)", prose))
    named |= set(re.findall(r"--set ([A-Za-z.]+)=", prose))
    assert len(named) > 5
    assert named <= documented


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# -- One.\na: 1\n", [(("a",), "One.", 1)]),
        ("# -- One\n# and two.\na: {b: 1}\n", [(("a",), "One and two.", {"b": 1})]),
        ("# ---- a heading ----\n\na:\n  # -- Inner.\n  b: []\n", [(("a", "b"), "Inner.", [])]),
        ("# -- Outer.\na:\n  # -- Inner.\n  b: 1\n", [(("a",), "Outer.", None), (("a", "b"), "Inner.", 1)]),
    ],
)
def test_comments_are_read(text: str, expected: list[object]) -> None:
    assert [(each.path, each.text, each.default) for each in entries(text)] == expected


def test_a_value_that_the_schema_lacks_is_told() -> None:
    documented = entries("# -- One.\na: 1\n")
    with pytest.raises(KeyError, match=r"a is not in values\.schema\.json"):
        filled({"properties": {"settings": {}}, "definitions": {}}, documented)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the tables are made of, which is the chart while the test lasts."""
    for name in ("values.yaml", "values.schema.json"):
        (tmp_path / name).write_text((CHART / name).read_text())
    (tmp_path / "ci").mkdir()
    (tmp_path / "ci" / "one-values.yaml").write_text("# For the first\n# of all.\n\n# Not this.\na: 1\n")
    (tmp_path / "README.md").write_text(
        f"before\n{SCENARIOS_BEGIN}old\n{SCENARIOS_END}\nmiddle\n{BEGIN}old\n{END}\nafter\n"
    )
    monkeypatch.setattr("docs.make_chart.CHART", tmp_path)
    return tmp_path


def test_what_is_made_goes_between_the_marks_only(copy: Path) -> None:
    text = made()[copy / "README.md"]
    rows = "| values | for |\n|---|---|\n| `ci/one-values.yaml` | For the first of all. |\n"
    assert text.startswith(f"before\n{SCENARIOS_BEGIN}{rows}{SCENARIOS_END}\nmiddle\n{BEGIN}| key |")
    assert text.endswith(f"|\n{END}\nafter\n")
    assert "old" not in text.splitlines()


def test_a_scenario_says_what_it_is_for(copy: Path) -> None:
    (copy / "ci" / "two-values.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match=r"two-values\.yaml does not begin with a comment"):
        made()
