"""What is read from parents' cards, and what the result's card declares. The Hub's own client reads both too."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from merger.lineage import MAX_FRONT_MATTER, Card, Parent, front_matter, read_card, texts_of


def card(front: str) -> Card:
    return read_card(f"---\n{front}\n---\n# A model\n")


# ---- reading ------------------------------------------------------------------------------------------

WHOLE = """\
license: other
license_name: my-license
license_link: https://example.com/license
language: [en, "no", zh]
datasets:
- c4
- org/data
pipeline_tag: text-generation
library_name: transformers
tags: [merge, not-for-all-audiences]
base_model: org/base
model-index:
- name: x
  results: [{task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: acc, value: 0.5}]}]
"""


def test_a_card_is_read_as_the_hubs_client_reads_it():
    found, theirs = card(WHOLE), ModelCard(f"---\n{WHOLE}---\n").data
    assert (found.license, found.license_name, found.license_link) == (
        theirs.license,
        theirs.license_name,
        theirs.license_link,
    )
    assert (list(found.language), list(found.datasets)) == (theirs.language, theirs.datasets)
    assert (found.pipeline_tag, found.library_name) == (theirs.pipeline_tag, theirs.library_name)
    assert (list(found.tags), found.base_model) == (theirs.tags, (theirs.base_model,))


@pytest.mark.parametrize(
    ("front", "wanted"),
    [
        ("license: MIT", Card(license="mit")),
        ("license: [mit]", Card(license="mit")),
        ("license: [mit, apache-2.0]", Card()),
        ("license: null", Card()),
        ("license: {a: b}", Card()),
        ("license: 'two\nlines'", Card()),
        ("language: en", Card(language=("en",))),
        ("language: [en, no, {a: 1}, '<b>', en]", Card(language=("en", "no"))),
        ("datasets: org/data\npipeline_tag: [a]", Card(datasets=("org/data",), pipeline_tag="a")),
        ("datasets: [a/b/c, ../b, 'a b', /a]", Card()),
        ("license_link: LICENSE", Card(license_link="LICENSE")),
        ("license_link: javascript:alert(1)", Card()),
        ("license_link: 'https://a.b/ c'", Card()),
        ("- license: mit", Card()),
        ("license: mit\nlicense: [", Card()),
        ("a: &x 1\nlicense: mit\nb: *x", Card()),
        ("a: !!python/object/apply:os.system [true]\nlicense: mit", Card(license="mit")),
        ("license: mit\n? [a]\n: b", Card()),
        ('license: "\\UFFFFFFFF"', Card()),
    ],
)
def test_only_what_has_the_form_of_an_id_is_kept(front, wanted):
    assert card(front) == wanted


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\nlicense: mit\n", "--- license: mit\n---\n", "a\n---\n"]
)
def test_a_text_without_front_matter_declares_nothing(text):
    assert read_card(text) == Card()


@pytest.mark.parametrize("text", ["\ufeff---\nlicense: mit\n---\n", "\n---\r\nlicense: mit\r\n---\r\nx"])
def test_marks_of_other_systems_do_not_matter(text):
    assert read_card(text) == Card(license="mit")


def test_a_front_matter_that_is_too_long_is_not_read():
    fits = "license: mit\n#" + "x" * (MAX_FRONT_MATTER - 30)
    assert card(fits) == Card(license="mit")
    assert card(fits + "x" * 100) == Card()


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    "front",
    [BOMB, "license: mit\nx: " + "[" * 60_000, "x: " + "{a: " * 16_000, "- " * 30_000, "? " * 30_000, "!" * 60_000],
)
def test_hostile_text_declares_nothing(front):
    """Without the limits this takes long, or all memory."""
    assert card(front) == Card()


@given(st.text())
def test_no_text_raises(text):
    read_card(text)
    assert isinstance(card(text), Card)


KEYS = st.sampled_from([*Card.__dataclass_fields__])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(KEYS, JSON))
def test_any_values_give_strings_of_one_line(content):
    found = card(yaml.safe_dump(content, allow_unicode=True))
    for key, value in vars(found).items():
        strings = value if isinstance(value, tuple) else [value] if value else []
        assert all(isinstance(text, str) and text.isprintable() for text in strings), key


# ---- writing ------------------------------------------------------------------------------------------

A = Parent(
    "hf://org/a", "org/a", "a" * 40, card=Card(language=("en",), datasets=("c4",), pipeline_tag="text-generation")
)
B = Parent("org/b@main", "org/b", "b" * 40, card=Card(language=("de", "en"), tags=("not-for-all-audiences", "x")))
LOCAL = Parent("runs/step-1", card=Card(base_model=("org/base",), pipeline_tag="text-generation"))


def test_the_front_matter_declares_all_parents():
    assert front_matter(
        [A, B, A, LOCAL], library="transformers", license={"license": "mit"}, extra_tags=["mergekit"]
    ) == {
        "base_model": ["org/a", "org/b"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "merger", "mergekit", "not-for-all-audiences"],
        "license": "mit",
        "language": ["en", "de"],
        "datasets": ["c4"],
    }


def test_the_hubs_client_gives_the_fields_back():
    fields = front_matter(
        [A, B], library="peft", license={"license": "other", "license_name": "x", "license_link": "LICENSE"}
    )
    text = f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n\n# title\n"
    data = ModelCard(text).data
    assert {key: data[key] for key in fields} == fields
    assert read_card(text).base_model == ("org/a", "org/b")


def test_folders_alone_declare_neither_parents_nor_a_relation():
    assert front_matter([LOCAL], library="", license={}) == {
        "pipeline_tag": "text-generation",
        "tags": ["merge", "merger"],
    }


def test_tasks_that_differ_are_not_declared():
    other = Parent("c", card=Card(pipeline_tag="feature-extraction"))
    assert "pipeline_tag" not in front_matter([A, other], library="", license={})


def test_an_adapter_is_one_of_the_model_that_its_parents_adapt():
    adapter = Parent("org/lora", "org/lora", card=Card(base_model=("org/base",)))
    made = front_matter([adapter, adapter], library="peft", license={}, is_adapter=True)
    assert (made["base_model"], made["base_model_relation"]) == (["org/base"], "adapter")
    made = front_matter([A], library="peft", license={}, is_adapter=True)
    assert (made["base_model"], made["base_model_relation"]) == (["org/a"], "merge")


# ---- texts of licences --------------------------------------------------------------------------------


def texts(given: dict[str, str], *parents: tuple[str, dict[str, str]]) -> dict[str, str]:
    """With the content itself in the place of paths."""
    paths = [(label, {name: Path(text) for name, text in files.items()}) for label, files in parents]
    found = texts_of({name: Path(text) for name, text in given.items()}, paths, lambda path: str(path).encode())
    return {name: str(path) for name, path in found.items()}


def test_the_text_of_a_licence_comes_along_once():
    mit, apache = {"LICENSE": "mit"}, {"LICENSE": "apache", "NOTICE": "by us"}
    assert texts(mit, ("org/a", mit), ("org/b", mit)) == {}
    assert texts(mit, ("org/a", mit), ("org/b", apache)) == {"LICENSE-2-org-b": "apache", "NOTICE": "by us"}
    assert texts({}, ("a", {}), ("b", mit), ("c", apache)) == {
        "LICENSE": "mit",
        "LICENSE-3-c": "apache",
        "NOTICE": "by us",
    }


def test_names_of_texts_are_plain_and_keep_their_ending():
    given = {"LICENSE.txt": "mit"}
    assert texts(given, ("../../x y|`", {"LICENSE.txt": "other"})) == {"LICENSE-1-x-y.txt": "other"}
