"""The pictures are PNG files of a known width, whatever the numbers."""

import struct

import pytest

from merger.pictures import draw_distances, draw_weights


def width(png: bytes) -> int:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return int(struct.unpack(">I", png[16:20])[0])


@pytest.mark.parametrize(
    ("steps", "weights"),
    [
        ([7], [1.0]),
        ([1, 2, 4], [-0.5, 0.5, 1.0]),
        ([None, None], [0.5, 0.5]),
        (list(range(0, 3000, 100)), [1 / 30] * 30),
        ([None] * 30, [1 / 30] * 30),
        ([5] * 30, [1 / 30] * 30),
    ],
)
def test_weights_are_drawn_for_any_sources(steps, weights):
    assert width(draw_weights(steps, weights, [f"a-model-with-a-long-name-{i}" for i in range(len(weights))])) == 1000


@pytest.mark.parametrize("layers", [1, 80])
def test_distances_are_drawn_for_any_layers(layers):
    names = [f"model.layers.{i}" for i in range(layers)]
    assert width(draw_distances("title", names, [0.1] * layers, [0.9] * layers)) == 1000
