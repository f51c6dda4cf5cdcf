"""A token: what gives its text away, and what does not."""

import json
import pickle
from dataclasses import asdict, dataclass

import pytest

from merger.secret import Token

TEXT = "hf_AbC0123456789xyz"


@dataclass(frozen=True)
class Holder:
    token: Token


def test_only_reveal_gives_the_text():
    token = Token(TEXT)
    assert token.reveal() == TEXT
    shown = [str(token), repr(token), f"{token}", f"{token!r:>20}", repr(Holder(token)), str(asdict(Holder(token)))]
    assert [text for text in shown if TEXT in text] == []
    assert str(token) == "***"
    with pytest.raises(TypeError):
        vars(token)
    with pytest.raises(TypeError):
        json.dumps({"token": token})


def test_it_is_not_changed():
    token = Token(TEXT)
    with pytest.raises(AttributeError):
        token._text = "x"
    with pytest.raises(ValueError):
        Token("")


def test_it_reaches_another_process():
    token = Token(TEXT)
    back = pickle.loads(pickle.dumps(token))
    assert (back, back.reveal(), hash(back)) == (token, TEXT, hash(token))
    assert back != Token("other")
    assert back != TEXT


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (TEXT, f"401 for {TEXT}: unknown; twice {TEXT}"),
        ("a'b\\c/ü", "as it is a'b\\c/ü"),
        ("a'b\\c/ü", f"in Python {[chr(39) + chr(97)]} {'a' + chr(39) + 'b' + chr(92) + 'c/ü'!r}"),
        ('a"b/ü', f"in JSON {json.dumps({'token': 'a' + chr(34) + 'b/ü'})}"),
        ("a b/c", "in a URL https://hub/x?token=a%20b%2Fc or https://hub/a%20b/c"),
    ],
)
def test_it_is_hidden_in_texts_in_any_form(token, text):
    hidden = Token(token).hidden_in(text)
    assert "***" in hidden
    for form in (token, repr(token)[1:-1], json.dumps(token)[1:-1], "a%20b"):
        assert form not in hidden


def test_other_texts_stay_as_they_are():
    assert Token(TEXT).hidden_in("nothing to see: hf_") == "nothing to see: hf_"
