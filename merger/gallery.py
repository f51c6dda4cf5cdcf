"""The pictures of a run's report: which numbers are drawn. Knows plans, written shards and scores; knows nothing of
pixels."""

from collections.abc import Iterator
from pathlib import Path

from merger.assessment import Assessment
from merger.checkpoint import root_of
from merger.difference import Pair, by_layer, measure
from merger.dtypes import DTYPES
from merger.expression import Expression, File, Stored, WeightedSum
from merger.plan import Plan
from merger.remote import Remote
from merger.scaled import Scaled
from merger.sizes import active, parameters


def main_picture(plan: Plan) -> dict[str, bytes]:
    """What the result is made of, by its title: the weight of every source, or of surgery what became of the size."""
    from merger.pictures import draw_sizes, draw_weights  # matplotlib: a third of a second

    origin = root_of(plan.checkpoint)
    if origin:
        models = {"before": origin.checkpoint, "after": plan.checkpoint}
        sizes = {name: (parameters(model), active(model)) for name, model in models.items()}
        return {"parameters": draw_sizes(sizes)}
    parts = plan.checkpoint.parts
    names = [Path(part.source.reference).name for part in parts]
    return {"weights": draw_weights([part.source.step for part in parts], [part.weight for part in parts], names)}


def lines(assessment: Assessment | None) -> dict[str, bytes]:
    """The metric along the lines between neighbouring fine-tunes, where it was measured."""
    from merger.pictures import draw_lines

    if assessment is None or not assessment.lines:
        return {}
    found = [(Path(line.first).name, Path(line.other).name, line.places, line.values) for line in assessment.lines]
    return {"between the sources": draw_lines(found, assessment.evaluation.by)}


SAMPLE = 1 << 16  # elements of each tensor that the report's picture of distances looks at


def distances(plan: Plan, output: Path) -> dict[str, bytes]:
    """How far the result is from its last source, by layer, from a sample of each tensor; nothing for a copy."""
    from merger.pictures import draw_distances

    last_files = plan.checkpoint.parts[-1].source.files
    if len(plan.checkpoint.parts) < 2 or any(isinstance(file.path, Remote) for file in last_files):
        return {}  # a request for each tensor is too dear for a picture
    layers = by_layer(measure(_pairs_with_last(plan, output), SAMPLE))
    if not layers:
        return {}
    last = Path(plan.checkpoint.parts[-1].source.reference).name
    title = f"How far the result is from {last}, by the start of each tensor"
    relative, cosine = [row.relative for row in layers.values()], [row.cosine for row in layers.values()]
    return {"distances": draw_distances(title, list(layers), relative, cosine)}


def _pairs_with_last(plan: Plan, output: Path) -> list[Pair]:
    """Every written tensor that is made from the last source, beside that source's own."""
    last = set(plan.checkpoint.parts[-1].source.files)
    pairs = []
    for shard in plan.weights:
        path = output / shard.name
        file = File(path, shard.size, path.stat().st_mtime_ns, "")
        for entry in shard.entries:
            made = entry.expression
            own = [part for part in _parts(made) if last.issuperset(leaf.file for leaf in part.leaves())]
            if own and DTYPES[made.dtype].is_float and own[0].shape == made.shape:
                written = Stored(made.dtype, made.shape, file, len(shard.header) + entry.offset)
                pairs.append(Pair(entry.name, own[0], written))
    return pairs


def _parts(made: Expression) -> Iterator[Expression]:
    """The floating tensors that one is made from: as they are stored, or as they are dequantized."""
    terms = [term for _, term in made.terms] if isinstance(made, WeightedSum) else [made]
    yield from (term for term in terms if isinstance(term, Scaled))
    yield from (leaf for leaf in made.leaves() if DTYPES[leaf.dtype].is_float)
