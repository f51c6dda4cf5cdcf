"""What people write for a model on the Hub."""

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from merger.errors import SourceError
from merger.storage.reference import Reference, looks_remote, reference_of

# Texts that are nearly references, and any others.
PIECES = st.sampled_from(
    [
        "hf://",
        "org",
        "a-b",
        "7B",
        "name.v1",
        "/",
        "/",
        "@",
        "main",
        "refs/pr/1",
        "..",
        ".",
        "-",
        "--",
        ".git",
        "*",
        "%2F",
    ]
)
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PIECES, PIECES, st.characters()), max_size=12).map("".join))


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("org/name", Reference("org/name")),
        ("hf://org/name", Reference("org/name")),
        ("hf://org/name/", Reference("org/name")),
        ("hf://org/name@main", Reference("org/name")),
        ("org/name@v1", Reference("org/name", "v1")),
        ("hf://org/name@v1/step-10", Reference("org/name", "v1", "step-10")),
        ("hf://org/name/runs/step-10/", Reference("org/name", "main", "runs/step-10")),
        ("hf://org/name@refs/pr/3", Reference("org/name", "refs/pr/3")),
        ("hf://org/name@refs/pr/3/sub", Reference("org/name", "refs/pr/3", "sub")),
        ("hf://org/name@step-*", Reference("org/name", "step-*")),
        ("hf://org/name@" + "a" * 40, Reference("org/name", "a" * 40)),
        ("hf://org/name@runs%2Fstep-1/sub", Reference("org/name", "runs/step-1", "sub")),
        ("hf://0rg/na_me-1.5B", Reference("0rg/na_me-1.5B")),
    ],
)
def test_what_is_written_is_what_is_meant(text, reference):
    assert reference_of(text) == reference
    assert reference_of(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hf://",
        "name",
        "hf://org",
        "hf://org/name@",
        "hf://org/name@@x",
        "hf://org/name@v1/a@b",
        "hf://org/name/../other",
        "hf://org/name/./x",
        "hf://../name",
        "hf://org/..",
        "hf://org/name@..",
        "hf://org/name@%2e%2e",
        "hf://org/a..b",
        "hf://org/a--b",
        "hf://org/name.git",
        "hf://org/name.",
        "hf://org-/name",
        "hf://-org/name",
        "hf://org/n\xe4me",
        "hf://org/na me",
        "hf://org/name\n",
        "hf://hf://org/name",
        "https://huggingface.co/org/name",
        f"hf://{'o' * 50}/{'n' * 50}",
    ],
)
def test_what_can_be_no_model_on_the_hub_is_refused(text):
    with pytest.raises(SourceError) as caught:
        reference_of(text)
    assert caught.value.where == text


@given(TEXTS)
@example("hf://org/name@a%25b/c")
@example("hf://org/name@refs%2Fpr%2F1")
@example("hf://org/name@a/b@c")
def test_no_text_makes_anything_but_a_reference_or_a_refusal(text):
    try:
        reference = reference_of(text)
    except SourceError:
        return
    assert reference_of(str(reference)) == reference
    validate_repo_id(reference.repository)  # what the library would refuse in its own words
    assert not {"", ".", ".."} & {*(reference.folder or "-").split("/"), reference.revision}


REVISIONS = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text not in (".", ".."))


@given(REVISIONS)
@example("runs/step-1")
@example("refs/pr/1")
@example("refs/pr/1/x")
@example("50%25")
@example("user@host")
def test_any_branch_that_a_pattern_finds_can_be_written_down(revision):
    reference = Reference("org/name", revision, "sub")
    assert reference_of(str(reference)) == reference


@pytest.mark.parametrize("text", ["hf://anything", "org/name", "org/name@v1", "org/name@v1/sub"])
def test_what_may_mean_the_hub(text):
    assert looks_remote(text)


@pytest.mark.parametrize("text", ["name", "./org/name", "/org/name", "../name", "org/name/sub", "~/name", "C:\\x"])
def test_what_means_a_folder_here(text):
    assert not looks_remote(text)
