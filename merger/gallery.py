"""The pictures of a run's report: which numbers are drawn. Knows plans and written shards; knows nothing of pixels."""

from pathlib import Path

from merger.difference import Pair, by_layer, measure
from merger.dtypes import DTYPES
from merger.expression import File, Stored
from merger.plan import Plan


def weights(plan: Plan) -> bytes:
    """The weight of every source."""
    from merger.pictures import draw_weights  # noqa: PLC0415  (matplotlib: a third of a second)

    parts = plan.checkpoint.parts
    names = [Path(part.source.reference).name for part in parts]
    return draw_weights([part.source.step for part in parts], [part.weight for part in parts], names)


SAMPLE = 1 << 16  # elements of each tensor that the report's picture of distances looks at


def distances(plan: Plan, output: Path) -> dict[str, bytes]:
    """How far the result is from its last source, by layer, from a sample of each tensor; nothing for a copy."""
    from merger.pictures import draw_distances  # noqa: PLC0415

    layers = by_layer(measure(_pairs_with_last(plan, output), SAMPLE))
    if len(plan.checkpoint.parts) < 2 or not layers:
        return {}
    last = Path(plan.checkpoint.parts[-1].source.reference).name
    title = f"How far the result is from {last}, by the start of each tensor"
    relative, cosine = [row.relative for row in layers.values()], [row.cosine for row in layers.values()]
    return {"distances": draw_distances(title, list(layers), relative, cosine)}


def _pairs_with_last(plan: Plan, output: Path) -> list[Pair]:
    """Every written tensor that is made from the last source, beside that source's own."""
    last = set(plan.checkpoint.parts[-1].source.files)
    pairs = []
    for shard in plan.shards:
        file = File(output / shard.name, shard.size, 0, "")
        for entry in shard.entries:
            made, own = entry.expression, [leaf for leaf in entry.expression.leaves() if leaf.file in last]
            if own and DTYPES[made.dtype].is_float and own[0].shape == made.shape:
                written = Stored(made.dtype, made.shape, file, len(shard.header) + entry.offset)
                pairs.append(Pair(entry.name, own[0], written))
    return pairs
