"""Log lines: one JSON object each, with what belongs to them."""

import json
import logging
from datetime import UTC, datetime

from api.logs import JsonLines


def line(record: logging.LogRecord) -> dict[str, object]:
    text = JsonLines().format(record)
    assert "\n" not in text
    told: dict[str, object] = json.loads(text)
    return told


def record(message: str, *words: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("api.x").makeRecord("api.x", logging.WARNING, "f", 1, message, words, None, extra=extra)


def test_a_line_tells_when_how_grave_who_and_what() -> None:
    made = record("lost: %s", 'no "lease"\nat all')
    told = line(made)
    assert datetime.fromisoformat(str(told.pop("time"))) == datetime.fromtimestamp(int(made.created * 1000) / 1000, UTC)
    assert told == {"level": "warning", "logger": "api.x", "message": 'lost: no "lease"\nat all'}


def test_a_line_tells_the_job_and_the_attempt() -> None:
    told = line(record("x", job="abc", attempt=2))
    assert (told["job"], told["attempt"]) == ("abc", 2)


def test_an_exception_is_part_of_the_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        made = logging.LogRecord("api.x", logging.ERROR, "f", 1, "x", (), (type(error), error, error.__traceback__))
    assert "ValueError: broken" in str(line(made)["exception"])
