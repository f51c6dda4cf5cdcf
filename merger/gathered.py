"""Matrices whose rows come from rows of others, as embeddings do that are brought to another vocabulary.

Knows which rows are read and how means are rounded; knows nothing of tokens.
"""

import hashlib
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from merger.dtypes import DTYPES
from merger.errors import UnsupportedModel
from merger.expression import PAGE, ByteRange, Evaluate, Expression, Fetch, Made, Measure, Stored, join
from merger.kernels import CODES, Bytes, weighted_sum

Integers = NDArray[np.int64]

_GAP = 4 * PAGE  # bytes between rows that are read too: a read apart costs as much time
_SMALL = 2 << 20  # bytes: a source that is not larger is read as a whole
WINDOW = 32  # rows: what is read for any so many is bounded by what is for the worst
_MEAN_ELEMENTS = 1 << 18  # of a matrix at a time, for the mean of its rows


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """Of which rows of which sources each row is the mean: of none (zeros), of one (a copy) or of several.

    Row i has the terms `ends[i]` to `ends[i + 1]`; term t is row `row[t]` of source `source[t]`. `ends` [rows + 1],
    `source` and `row` [terms], all int64. Compared by identity.
    """

    ends: Integers
    source: Integers
    row: Integers

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def digest(self) -> str:
        """The sha256 of what they say."""
        return hashlib.sha256(b"".join(part.tobytes() for part in (self.ends, self.source, self.row))).hexdigest()

    @property
    def most(self) -> int:
        """The most terms that a row has."""
        return int(np.diff(self.ends).max(initial=0))

    @cached_property
    def densest(self) -> tuple[int, int]:
        """The most terms of any `WINDOW` rows that follow each other, and the most runs among them: rows of one source
        that follow each other there too.
        """
        begins = np.ones(len(self.row), np.int64)
        begins[1:] = (np.diff(self.source) != 0) | (np.diff(self.row) != 1)
        before = np.concatenate([[0], np.cumsum(begins)])
        first = self.ends[:-1]
        last = self.ends[np.minimum(np.arange(len(self)) + WINDOW, len(self))]
        return int((last - first).max(initial=0)), int((before[last] - before[first]).max(initial=0)) + 1

    def is_whole(self, source: int, rows: int) -> bool:
        """Whether these are all rows of one source, in their order."""
        own = np.arange(rows)
        return len(self) == rows == len(self.row) and bool((self.source == source).all() and (self.row == own).all())


class _Span(NamedTuple):
    """Rows `top` to `bottom` of a source, which are read at once."""

    source: int
    top: int
    bottom: int


@final
@dataclass(frozen=True, slots=True)
class Gathered(Expression):
    """A tensor [rows, ...] whose rows are copies of rows of floating sources [any, ...], means of several (in float64,
    rounded once), or zeros. Copies keep their bits where the source has the same dtype.
    """

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Expression, ...]
    rows: Rows

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    def leaves(self) -> Iterator[Stored]:
        return chain.from_iterable(source.leaves() for source in self.sources)

    def _terms(self, top: int, bottom: int) -> slice:
        return slice(int(self.rows.ends[top]), int(self.rows.ends[bottom]))

    def _range(self, start: int, stop: int) -> tuple[int, int]:
        """The rows that hold the elements."""
        return start // self.width, -(-stop // self.width)

    def _spans(self, top: int, bottom: int) -> list[_Span]:
        """What is read for rows `top` to `bottom`: rows that are close are read with what lies between them."""
        terms = self._terms(top, bottom)
        which, rows = self.rows.source[terms], self.rows.row[terms]
        found: list[_Span] = []
        for number, source in enumerate(self.sources):
            wanted = np.unique(rows[which == number])
            if not wanted.size:
                continue
            if source.nbytes <= _SMALL:
                found.append(_Span(number, 0, source.shape[0]))
                continue
            breaks = np.flatnonzero(np.diff(wanted) > 1 + _GAP // (self.width * source.itemsize))
            tops, bottoms = wanted[np.r_[0, breaks + 1]], wanted[np.r_[breaks, -1]] + 1
            found += [_Span(number, a, b) for a, b in zip(tops.tolist(), bottoms.tolist(), strict=True)]
        return found

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        if start < stop and self.width:
            for number, top, bottom in self._spans(*self._range(start, stop)):
                yield from self.sources[number].reads(top * self.width, bottom * self.width)

    def memory(self, elements: int) -> int:
        """What is read, the same once more side by side, and rows in float64: for whole windows of the worst rows."""
        if not self.width:
            return 0
        terms, runs = self.rows.densest
        fixed, window = 0, 0
        for source in self.sources:
            size = source.itemsize
            if source.nbytes <= _SMALL:
                fixed += source.memory(source.size) + source.nbytes
            else:
                gap, none = _GAP // size, source.memory(0)
                each = source.memory(1) - none + size
                window = max(window, runs * (none + gap * each) + terms * self.width * each)
        row = self.width * (3 * self.itemsize + (6 if self.rows.most > 1 else 3) * 8)
        rows = -(-window // WINDOW) + row
        return fixed + window + 2 * rows + elements * -(-rows // self.width)

    def measures(self) -> Iterator[Measure]:
        return chain.from_iterable(source.measures() for source in self.sources)

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        return replace(self, sources=tuple(source.measured(found) for source in self.sources))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        if start >= stop:
            return np.empty(0, np.uint8)
        top, bottom = self._range(start, stop)
        spans = self._spans(top, bottom)
        held = {number: self._held(number, spans, fetch) for number in range(len(self.sources))}
        whole = self._run(top, bottom, held)
        if whole is None:
            whole = np.zeros((bottom - top, self.width * self.itemsize), np.uint8)
            counts = np.diff(self.rows.ends[top : bottom + 1])
            self._copy(whole, np.flatnonzero(counts == 1), top, held)
            several = np.flatnonzero(counts > 1)
            if several.size:
                whole[several] = self._means(several, counts[several], top, held)
        skipped = (start - top * self.width) * self.itemsize
        return whole.reshape(-1)[skipped : skipped + (stop - start) * self.itemsize]

    def _held(self, number: int, spans: Sequence[_Span], fetch: Fetch) -> "_Held":
        source, own = self.sources[number], [span for span in spans if span.source == number]
        pitch = self.width * source.itemsize
        parts = [source.values(a * self.width, b * self.width, fetch).reshape(b - a, pitch) for _, a, b in own]
        held = np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty((0, pitch), np.uint8)
        sizes = np.array([b - a for _, a, b in own], np.int64)
        return _Held(held, np.array([a for _, a, _ in own], np.int64), np.cumsum(sizes) - sizes)

    def _run(self, top: int, bottom: int, held: Mapping[int, "_Held"]) -> NDArray[np.uint8] | None:
        """Rows `top` to `bottom` as a view where they are copies of rows that follow each other, as most are."""
        terms = self._terms(top, bottom)
        which, rows = self.rows.source[terms], self.rows.row[terms]
        alone = len(rows) == bottom - top and bool((np.diff(self.rows.ends[top : bottom + 1]) == 1).all())
        if not alone or (which != which[0]).any() or (np.diff(rows) != 1).any():
            return None
        source = int(which[0])
        if self.sources[source].dtype != self.dtype:
            return None
        first = held[source].place_of(int(rows[0]))
        return held[source].content[first : first + len(rows)]

    def _copy(self, whole: NDArray[np.uint8], places: Integers, top: int, held: Mapping[int, "_Held"]) -> None:
        """Fill the rows that are copies of one."""
        terms = self.rows.ends[top + places]
        which = self.rows.source[terms]
        for number, source in enumerate(self.sources):
            chosen = which == number
            if chosen.any():
                taken = held[number].taken(self.rows.row[terms[chosen]])
                whole[places[chosen]] = _converted(taken, source.dtype, self.dtype)

    def _means(self, places: Integers, counts: Integers, top: int, held: Mapping[int, "_Held"]) -> NDArray[np.uint8]:
        """The rows that are means. Terms are added in their order, whatever range is asked for."""
        sums = np.zeros((len(places), self.width))
        first = self.rows.ends[top + places]
        for position in range(int(counts.max())):
            active = np.flatnonzero(counts > position)
            terms = first[active] + position
            which = self.rows.source[terms]
            for number, source in enumerate(self.sources):
                chosen = which == number
                if chosen.any():
                    taken = held[number].taken(self.rows.row[terms[chosen]])
                    wide = _converted(taken, source.dtype, "F64").reshape(-1).view(np.float64)
                    sums[active[chosen]] += wide.reshape(-1, self.width)
        sums /= counts[:, None]
        return _converted(sums.view(np.uint8), "F64", self.dtype)


class _Held(NamedTuple):
    """Rows of a source that were read [any, bytes of a row]: which rows begin each span, and where it begins here."""

    content: NDArray[np.uint8]
    tops: Integers
    places: Integers

    def taken(self, rows: Integers) -> NDArray[np.uint8]:
        taken: NDArray[np.uint8] = self.content[self.place_of(rows)]
        return taken

    def place_of(self, rows: Any) -> Any:
        """Where rows are here: one, or an array of them."""
        span = np.searchsorted(self.tops, rows, side="right") - 1
        return self.places[span] + rows - self.tops[span]


def _converted(rows: NDArray[np.uint8], of: str, to: str) -> NDArray[np.uint8]:
    """Rows [any, bytes] in another dtype, rounded to nearest even."""
    if of == to:
        return rows
    count = rows.size * 8 // DTYPES[of].bits
    out = np.empty(count * DTYPES[to].bits // 8, np.uint8)
    weighted_sum([(1.0, np.ascontiguousarray(rows).reshape(-1), of)], out, to)
    return out.reshape(len(rows), -1)


def gathered(sources: Sequence[Expression], rows: Rows, dtype: str) -> Expression:
    """The rows of the sources as one tensor; one source, all of it in its order, is itself.

    Raises UnsupportedModel for a dtype in which merger does not calculate, ValueError where shapes do not fit.
    """
    used = np.unique(rows.source)
    kept: list[Expression] = [sources[number] for number in used.tolist()]
    shapes = {source.shape[1:] for source in kept or sources}
    if len(shapes) > 1:
        raise ValueError(f"rows of several shapes: {sorted(shapes)}")
    for source in kept:
        if source.dtype not in CODES:
            raise UnsupportedModel(
                f"is {source.dtype}, in which merger does not calculate",
                where="embedding",
                remedy="Convert the model to bfloat16 first.",
            )
    only = kept[0] if len(kept) == 1 else None
    if only and only.dtype == dtype and rows.is_whole(int(used[0]), only.shape[0]):
        return only
    narrowed = Rows(rows.ends, np.searchsorted(used, rows.source), rows.row)
    return Gathered(dtype, (len(rows), *shapes.pop()), tuple(kept), narrowed)


# ---- rows beyond the last -----------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, eq=False)
class Mean(Measure):
    """The mean of the rows of a tensor, in float64, in blocks of rows from the first to the last. By identity."""

    inputs: tuple[Expression]

    @property
    def memory(self) -> int:
        width = math.prod(self.inputs[0].shape[1:])
        elements = max(_MEAN_ELEMENTS, width)
        return self.reading(elements) + 8 * (elements + 2 * width)

    def compute(self, evaluate: Evaluate) -> Sequence[float]:
        [matrix] = self.inputs
        height, width = matrix.shape[0], math.prod(matrix.shape[1:])
        step = max(1, _MEAN_ELEMENTS // width)
        total: Any = np.zeros(width)
        for top, bottom in pairwise([*range(0, height, step), height]):
            [values] = evaluate(top * width, bottom * width)
            rows = _converted(values.reshape(bottom - top, -1), matrix.dtype, "F64").reshape(-1)
            total = total + rows.view(np.float64).reshape(-1, width).sum(0)
        return array("d", (total / height).tobytes())


@final
@dataclass(frozen=True, slots=True)
class MeanRows(Made):
    """Rows that all are the mean of the rows of another tensor, once it is measured."""

    dtype: str
    shape: tuple[int, ...]
    mean: Mean

    def measures(self) -> Iterator[Measure]:
        yield self.mean

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        row = np.array(found[self.mean]).view(np.uint8)
        return Repeated(self.dtype, self.shape, _converted(row[None, :], "F64", self.dtype).tobytes())

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        raise ValueError("was not measured")


@final
@dataclass(frozen=True, slots=True)
class Repeated(Made):
    """One row, known already, again and again."""

    dtype: str
    shape: tuple[int, ...]
    row: bytes

    def memory(self, elements: int) -> int:
        return 2 * len(self.row) + elements * self.itemsize

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        width = len(self.row) // self.itemsize
        top, bottom = start // width, -(-stop // width)
        skipped = (start - top * width) * self.itemsize
        whole = np.tile(np.frombuffer(self.row, np.uint8), bottom - top)
        return whole[skipped : skipped + (stop - start) * self.itemsize]


def padded(whole: Expression, rows: int) -> Expression:
    """The tensor with so many more rows, all of them the mean of its rows: a logit that no token has stays below the
    largest (Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021).

    Raises UnsupportedModel where the tensor must be measured itself.
    """
    if not rows:
        return whole
    if any(True for _ in whole.measures()):
        raise UnsupportedModel(
            "what is measured already cannot be measured again on the fly",
            where="pad_to_multiple_of",
            remedy="Run the inner recipe into a folder of its own first.",
        )
    more = MeanRows(whole.dtype, (rows, *whole.shape[1:]), Mean((whole,)))
    return join([whole, more], (whole.shape[0] + rows, *whole.shape[1:]))
