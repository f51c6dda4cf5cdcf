"""Pictures from a process of its own: the same bytes, and drawn here where that one is gone."""

import subprocess
import sys

import pytest

from merger import painter, pictures

WEIGHTS = ([1, 2], [0.25, 0.75], ["a", "b"])


@pytest.fixture
def begun(monkeypatch):
    monkeypatch.setattr(painter, "_begun", [])
    painter.begin()
    painter.begin()
    [one] = painter._begun
    yield one
    one._end()


def test_the_process_draws_the_same(begun):
    assert (
        begun.draw("draw_weights", WEIGHTS) == painter.draw("draw_weights", *WEIGHTS) == pictures.draw_weights(*WEIGHTS)
    )


def test_without_the_process_it_is_drawn_here(begun):
    begun._process.kill()
    begun._process.wait()
    assert begun.draw("draw_weights", WEIGHTS) is None
    assert painter.draw("draw_weights", *WEIGHTS) == pictures.draw_weights(*WEIGHTS)


def test_what_cannot_be_drawn_is_told_here(begun):
    with pytest.raises(TypeError):
        painter.draw("draw_distances", "title", ["a"], [0.5], ["no number"])
    assert begun.draw("draw_weights", WEIGHTS) == pictures.draw_weights(*WEIGHTS), "it goes on"


def test_it_ends_when_nobody_asks_any_more():
    done = subprocess.run([sys.executable, "-m", "merger.painter"], input=b"", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"")
