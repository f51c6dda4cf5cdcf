"""A text that must not be seen. Knows how to hold it; knows nothing of who gave it or what it opens."""

from hmac import compare_digest
from json import dumps
from typing import Any
from urllib.parse import quote

_HIDDEN = "***"


class Token:
    """A secret text such as a Hub token: `reveal` gives it, everything else prints `***`.

    It can be compared and pickled, so that it reaches the tasks of a cluster as an argument. It is no dataclass:
    nothing that writes out fields or turns values into JSON finds the text in it.
    """

    __slots__ = ("_text",)

    _text: str

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("a token has at least one character")
        object.__setattr__(self, "_text", text)

    def reveal(self) -> str:
        """The text, to be sent to where it is meant for."""
        return self._text

    def hidden_in(self, text: str) -> str:
        """`text` with *** where the token's text stood: as it is, or as Python, JSON or a URL would write it."""
        own = self._text
        forms = {own, repr(own)[1:-1], dumps(own)[1:-1], quote(own), quote(own, safe="")}
        for form in sorted(forms, key=len, reverse=True):  # the longest first: a form may begin with another one
            text = text.replace(form, _HIDDEN)
        return text

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a token is not changed: {name}")

    def __repr__(self) -> str:
        return _HIDDEN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash((Token, self._text))

    def __reduce__(self) -> tuple[Any, ...]:
        return Token, (self._text,)
