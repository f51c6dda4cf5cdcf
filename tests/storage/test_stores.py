"""Addresses in object stores, and what is said of their refusals."""

import sys

import pytest

from merger.errors import MergerError, NotInstalled, ReadFailed, SourceError, WriteFailed
from merger.storage import stores
from merger.storage.patience import Again
from merger.storage.stores import Location, explained, in_store, location_of, store_for

HERE = Location("s3", "b", "runs/a")


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("s3://b/runs/a", HERE),
        ("s3://b/runs/a/", HERE),
        ("gs://b.c", Location("gs", "b.c")),
        ("az://b/", Location("az", "b")),
        ("s3://b/ä b#c", Location("s3", "b", "ä b#c")),
    ],
)
def test_an_address_is_a_bucket_and_a_key(text, location):
    assert location_of(text) == location
    assert location_of(str(location)) == location


def test_locations_have_neighbours():
    assert str(HERE.at("x")) == "s3://b/runs/a/x"
    assert str(Location("s3", "b").at("x")) == "s3://b/x"
    assert (HERE.above, HERE.name) == (Location("s3", "b", "runs"), "a")
    assert Location("s3", "b", "a").above == Location("s3", "b")


@pytest.mark.parametrize(
    "text", ["s3://", "s3:///a", "s3://b//a", "s3://b/../c", "s3://b/./c", "s3://*/a", "memory://b/a", "s3://b/a\nb"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(SourceError, match="is not an address"):
        location_of(text)


def test_only_stores_are_in_a_store():
    assert in_store("s3://b/a")
    assert not any(in_store(text) for text in ("memory://a", "hf://a/b", "a/b", "file:///a", "https://b/a"))


def answer(status: int, body: str = "", url: str = "https://s3.amazonaws.com/b/a?sig=hush") -> str:
    """An error of the library as 0.12 writes it."""
    head = (
        f"Generic S3 error: Error performing GET {url} in 4ms - Server returned non-2xx status code: {status} X: {body}"
    )
    return f"{head}\n\nDebug source:\nGeneric {{ uri: Some({url}), body: {body!r} }}"


def body(code: str, message: str) -> str:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message><Key>hush</Key></Error>'


def told(text: str, failure=ReadFailed) -> Exception:
    """What an error of the library becomes."""
    import obstore

    with pytest.raises((Again, MergerError)) as caught, explained(HERE, failure):
        raise obstore.exceptions.GenericError(text)
    assert "hush" not in f"{caught.value} {caught.value!r}"
    assert caught.value.__suppress_context__
    return caught.value


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_what_may_pass_is_asked_again(status):
    assert isinstance(told(answer(status, body("SlowDown", "Reduce your request rate."))), Again)


def test_refusals_say_what_the_store_says_and_nothing_secret():
    refused = told(answer(403, body("SignatureDoesNotMatch", "The signature does not match.\nhush")))
    assert isinstance(refused, SourceError)
    assert refused.message == "HTTP 403 SignatureDoesNotMatch: The signature does not match."
    assert "AWS_ACCESS_KEY_ID" in refused.remedy
    assert told(answer(418, "hush")).message == "HTTP 418"
    assert isinstance(told(answer(507), WriteFailed), WriteFailed)


def test_a_bucket_elsewhere_and_a_bucket_nowhere():
    moved = answer(301, body("PermanentRedirect", "The bucket must be addressed using another endpoint."))
    assert "another region" in told(moved).message
    assert told(moved).remedy == "Set AWS_REGION."
    assert "no such bucket" in told(answer(404, body("NoSuchBucket", "The bucket does not exist"))).message


@pytest.mark.parametrize(
    "text",
    [
        answer(403, "denied", "http://169.254.169.254/latest/api/token"),
        "Generic GCS error: Error performing GET http://metadata.google.internal/v1 in 5s - HTTP error: x",
    ],
)
def test_no_credentials_are_no_riddle(text):
    assert "no credentials" in told(text).message


def test_what_cannot_be_reached_is_soon_given_up():
    away = told(
        "Generic S3 error: Error performing GET http://a - HTTP error: error sending\n\nDebug source: kind: Connect"
    )
    assert isinstance(away, Again)
    assert away.tries == 2
    cut = told("Generic S3 error: Error performing GET https://a/?sig=hush in 4ms - HTTP error: body of https://a?hush")
    assert isinstance(cut, Again)
    assert str(cut) == "HTTP error: body of ..."
    assert "usable URL" in told("Generic S3 error: x - HTTP error: builder error").message


def test_without_the_library_the_remedy_is_a_line_of_pip(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    store_for.cache_clear()
    with pytest.raises(NotInstalled) as caught:
        store_for("s3://b")
    assert caught.value.remedy == "pip install 'merger[objects]'"


def test_settings_that_are_wrong_are_refused_when_the_store_is_opened(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    store_for.cache_clear()
    with pytest.raises(SourceError, match="cannot be opened"):
        store_for("az://container")


@pytest.mark.parametrize(("endpoint", "allowed"), [("http://127.0.0.1:9", True), ("https://s3.example.org", False)])
def test_encryption_is_left_out_only_where_the_endpoint_says_so(monkeypatch, endpoint, allowed):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert stores._allows_http("s3") is allowed
    assert stores._allows_http("gs") is False
