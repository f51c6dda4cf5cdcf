"""Tensors that can only be made as a whole, by a function of whole tensors: a decomposition, a search, what another
library computes.

Knows what such a function takes and costs; knows neither torch nor files. It is called before any block of the result
is made, in the first pass (`merger.spilling`); what it returns is stored beside the result until then, so that the
engine reads it like anything else.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, final

from merger.expression import MARGIN, ByteRange, Evaluate, Expression, Fetch, Measure, Stored
from merger.kernels import Bytes


class Tensors(ABC):
    """The tensors that a function is called with, each loaded when it is asked for: torch tensors in their own dtypes,
    on the device that the function computes on.
    """

    device: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> Any:
        """One of them, whole, in fresh memory. Raises ReadFailed, SourceChanged and NonFiniteInput."""

    def all(self) -> list[Any]:
        """All of them at once."""
        return [self.load(index) for index in range(len(self))]


class Function(ABC):
    """Makes a tensor of whole ones; compared by value, and sent to other processes.

    It is called with as many torch threads as it likes to find: one, so that sums do not depend on their number.
    """

    __slots__ = ()
    finite: ClassVar[bool] = True  # whether all it is made from must be

    @abstractmethod
    def memory(self, inputs: Sequence[Expression]) -> int:
        """The most bytes that a call takes: what it loads, what it returns and everything between."""

    @abstractmethod
    def __call__(self, tensors: Tensors) -> Any:
        """A floating torch tensor, which is rounded once to the dtype of the result."""


@final
@dataclass(frozen=True, slots=True)
class Whole(Expression):
    """What a function makes of whole tensors. `name` is for people."""

    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[Expression, ...]
    function: Function
    name: str

    @property
    def cost(self) -> int:
        """The bytes that making it takes, its rounded values included."""
        return self.function.memory(self.inputs) + self.nbytes

    def leaves(self) -> Iterator[Stored]:
        return chain.from_iterable(tensor.leaves() for tensor in self.inputs)

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        """All of what it is made from, for any element."""
        if start < stop:
            yield from chain.from_iterable(tensor.reads(0, tensor.size) for tensor in self.inputs)

    def memory(self, elements: int) -> int:
        """That of a stored tensor: it is one by the time that blocks are made."""
        return elements * self.itemsize + MARGIN

    def measures(self) -> Iterator[Measure]:
        yield from chain.from_iterable(tensor.measures() for tensor in self.inputs)
        yield Making(self)

    def measured(self, found: Mapping[Measure, Any]) -> Expression:
        """The stored tensor, once it was made; until then the same of inputs of which more is known."""
        stored = found.get(Making(self))
        if isinstance(stored, Stored):
            return stored
        return replace(self, inputs=tuple(tensor.measured(found) for tensor in self.inputs))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        raise ValueError(f"{self.name} was not made yet")


@final
@dataclass(frozen=True, slots=True)
class Making(Measure):
    """That a tensor is to be made as a whole. What is found is no number, but where it is stored."""

    whole: Whole
    inputs: tuple[Expression, ...] = ()  # none of which is read over and over

    @property
    def memory(self) -> int:
        return self.whole.cost

    @property
    def is_ready(self) -> bool:
        """Whether nothing else must be known or made before."""
        return not any(True for tensor in self.whole.inputs for _ in tensor.measures())

    def compute(self, evaluate: Evaluate) -> Sequence[float]:
        raise TypeError(f"{self.whole.name} is made as a whole, not measured")


@final
@dataclass(frozen=True, slots=True)
class Part(Expression):
    """So many elements of another expression, from `first` on, in a shape of their own."""

    dtype: str
    shape: tuple[int, ...]
    of: Expression
    first: int

    def leaves(self) -> Iterator[Stored]:
        return self.of.leaves()

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return self.of.reads(self.first + start, self.first + stop)

    def memory(self, elements: int) -> int:
        return self.of.memory(elements)

    def measures(self) -> Iterator[Measure]:
        return self.of.measures()

    def measured(self, found: Mapping[Measure, Any]) -> Expression:
        return replace(self, of=self.of.measured(found))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        return self.of.values(self.first + start, self.first + stop, fetch)


def wholes_in(expressions: Iterable[Expression]) -> list[Whole]:
    """The tensors that are made as a whole for these, each once, those within others too."""
    makings = (measure for tensor in expressions for measure in tensor.measures() if isinstance(measure, Making))
    return list(dict.fromkeys(making.whole for making in makings))


def scratch_size(expressions: Iterable[Expression]) -> int:
    """The bytes that lie beside the result while these are made."""
    return sum(whole.nbytes for whole in wholes_in(expressions))


AT_ONCE = 1 << 20  # elements that are evaluated at once while a tensor is loaded


def loading(tensor: Expression) -> int:
    """The bytes that it takes to load a tensor: its values, and what a part of them is made from."""
    return tensor.nbytes + tensor.memory(min(AT_ONCE, tensor.size))
