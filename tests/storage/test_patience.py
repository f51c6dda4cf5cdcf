"""How often and how long a failing server is asked again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import ReadFailed, WriteFailed
from merger.storage import patience
from merger.storage.patience import TRIES, Again, Patience, asked_delay, persist


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that were waited, without waiting."""
    seconds: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", seconds.append)
    return seconds


def failing(times: int, answer: str = "done"):
    """Something that fails so many times before it answers."""
    left = iter(range(times))

    def ask() -> str:
        if next(left, None) is not None:
            raise Again("HTTP 503")
        return answer

    return ask


def test_what_fails_is_asked_again_until_it_answers(waits):
    assert persist(failing(TRIES - 1), "there") == "done"
    assert len(waits) == TRIES - 1


def test_what_answers_at_once_is_not_waited_for(waits):
    assert persist(failing(0), "there") == "done"
    assert waits == []


def test_in_the_end_the_last_failure_and_the_way_on_are_told(waits):
    with pytest.raises(ReadFailed, match=f"failed {TRIES} times, the last time: HTTP 503") as caught:
        persist(failing(TRIES), "there")
    assert caught.value.where == "there"
    assert "again" in caught.value.remedy
    assert len(waits) == TRIES - 1


def test_another_error_can_be_asked_for(waits):
    with pytest.raises(WriteFailed):
        persist(failing(TRIES), "there", WriteFailed)


def test_other_errors_pass_at_once(waits):
    def ask() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        persist(ask, "there")
    assert waits == []


def test_waits_double_up_to_a_limit_and_are_never_the_same_for_all(waits):
    patient = Patience("there")
    for _ in range(TRIES - 1):
        patient.spend(Again("x"))
    for number, seconds in enumerate(waits):
        longest = min(patience._LONGEST, patience._FIRST * 2**number)
        assert longest / 2 <= seconds <= longest


def test_whoever_gets_on_may_fail_as_often_as_before(waits):
    patient = Patience("there")
    for _ in range(3 * TRIES):
        patient.spend(Again("x"))
        patient.renew()
    assert max(waits) <= patience._FIRST


def test_a_server_is_given_the_time_that_it_asks_for(waits):
    Patience("there").spend(Again("x", 42.0))
    assert 42 <= waits[0] <= 42 + patience._FIRST


def test_no_server_is_given_hours(waits):
    Patience("there").spend(Again("x", 1e9))
    assert waits == [patience._LONGEST_ASKED]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "\xb2"}, None),  # a digit for Python, and no number
        ({"retry-after": "-1"}, None),
        ({"ratelimit": '"api";r=0;t=42'}, 42.0),
        ({"ratelimit": '"api"; r=0; t=42'}, 42.0),
        ({"ratelimit": '"pages";r=7;t=9, "resolvers";r=0;t=42'}, 42.0),
        ({"retry-after": "7", "ratelimit": '"api";r=0;t=42'}, 7.0),
        ({"ratelimit": '"api";r=499;t=250'}, None),  # a failure of another kind: requests remain
        ({"ratelimit": "t="}, None),
        ({"ratelimit-policy": '"fixed window";"api";q=500;w=300'}, None),
    ],
)
def test_how_long_an_answer_asks_to_wait(headers, seconds):
    assert asked_delay(headers) == seconds


@given(st.text(), st.text())
def test_no_header_is_too_strange(retry_after, limit):
    seconds = asked_delay({"retry-after": retry_after, "ratelimit": limit})
    assert seconds is None or seconds >= 0
