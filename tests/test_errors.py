import re

import pytest

from merger import errors
from merger.errors import OUTSIDE, FormatError, Interrupted, MergerError, exit_code


def family(kind=MergerError):
    """Every error class, parents first."""
    return [kind, *(found for child in kind.__subclasses__() for found in family(child))]


def drawn():
    """The tree at the top of the module: class name -> (parent's name, (exit code, HTTP status) where they stand)."""
    path, tree = [], {}
    for line in errors.__doc__[errors.__doc__.index("\nMergerError") :].split("\n"):
        if found := re.match(r"([-|` ]*)(\w+)", line):
            path[len(found[1]) // 4 :] = [found[2]]
            outside = re.search(r"exit (\d+), HTTP (\d+)", line)
            tree[found[2]] = ("Exception", *path)[-2], outside and tuple(map(int, outside.groups()))
    return tree


def test_the_tree_that_is_drawn_is_the_tree_that_is_there():
    assert {name: parent for name, (parent, _) in drawn().items()} == {
        k.__name__: k.__base__.__name__ for k in family()
    }


def test_the_codes_that_are_drawn_are_those_of_the_table():
    assert {name: outside for name, (_, outside) in drawn().items() if outside} == {
        kind.__name__: outside for kind, outside in OUTSIDE.items()
    }


@pytest.mark.parametrize("kind", family())
def test_every_class_says_what_it_means(kind):
    assert kind.__doc__
    assert kind.__doc__.strip().endswith(".")


@pytest.mark.parametrize("kind", family())
def test_the_exit_code_follows_the_branch(kind):
    branches = {"RequestError": 2, "JobError": 1, "Interrupted": 130}
    wanted = next((code for name, code in branches.items() if name in [k.__name__ for k in kind.__mro__]), 1)
    assert exit_code(kind("went wrong")) == wanted


@pytest.mark.parametrize("kind", family())
def test_the_text_has_place_message_and_remedy(kind):
    assert str(kind("went wrong", where="a/file", remedy="Do this.")) == "a/file: went wrong\nDo this."


def test_the_remedy_of_the_class_stands_in():
    assert str(FormatError("is short", where="a/file")) == f"a/file: is short\n{FormatError.remedy}"


def test_without_place_or_remedy_there_is_just_the_message():
    assert str(MergerError("went wrong")) == "went wrong"


def test_a_remedy_of_one_error_is_not_that_of_the_next():
    Interrupted("stopped", remedy="Something else.")
    assert Interrupted("stopped").remedy == Interrupted.remedy
