"""Which rows the rows of a new embedding come from. Knows ids; knows nothing of tokens, files or values.

The rules are mergekit's (tokenizer/embed.py, `assign_embedding_sources`): a model keeps the rows of the tokens that it
has. Where it lacks one, the row is that of the base if the base has the token, that of the one model which has it, or
the mean over all that have it; zeros where none has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from merger.gathered import Integers, Rows

Taken = tuple[int, int]  # a model's number, and a row of its embedding


@dataclass(frozen=True)
class Given:
    """What a configuration says of a token: the row that models take which lack it, or all of them (`force`)."""

    row: Taken | Literal["zero", "default"]
    force: bool = False


@dataclass(frozen=True)
class _Defaults:
    """Where the row of each id comes from where a model lacks it: `count` rows, those of all that have it, or, where
    `alone`, row `row` of model `model`.
    """

    count: Integers
    alone: NDArray[np.bool_]
    model: Integers
    row: Integers


def rows_of(own: Integers, base: int | None, given: Mapping[int, Given]) -> list[Rows]:
    """For each model the rows of its new embedding; `own` [models, ids] holds the old row of each id, -1 where none."""
    defaults = _defaults(own, base, given)
    forced = np.zeros(own.shape[1], np.bool_)
    forced[[number for number, said in given.items() if said.force]] = True
    return [_rows(own, model, defaults, (own[model] >= 0) & ~forced) for model in range(len(own))]


def _defaults(own: Integers, base: int | None, given: Mapping[int, Given]) -> _Defaults:
    has = own >= 0
    count = has.sum(axis=0)
    model = has.argmax(axis=0)  # the first that has it
    alone = count == 1
    if base is not None:
        model = np.where(has[base], base, model)
        alone |= has[base]
    row = own[model, np.arange(own.shape[1])]
    count = np.where(alone, 1, count)
    for number, said in given.items():
        if said.row == "zero":
            count[number], alone[number] = 0, False
        elif said.row != "default":
            count[number], alone[number] = 1, True
            model[number], row[number] = said.row
    return _Defaults(count, alone, model, row)


def _rows(own: Integers, model: int, defaults: _Defaults, keeps: NDArray[np.bool_]) -> Rows:
    counts = np.where(keeps, 1, defaults.count)
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    source, row = np.empty(int(ends[-1]), np.int64), np.empty(int(ends[-1]), np.int64)
    source[ends[:-1][keeps]], row[ends[:-1][keeps]] = model, own[model, keeps]
    alone = ~keeps & defaults.alone
    source[ends[:-1][alone]], row[ends[:-1][alone]] = defaults.model[alone], defaults.row[alone]
    several = np.flatnonzero(~keeps & ~defaults.alone & (defaults.count > 0))
    which, having = np.nonzero(own[:, several].T >= 0)  # id by id, of each the models in their order
    begins = np.cumsum(counts[several]) - counts[several]
    places = ends[several][which] + np.arange(len(which)) - begins[which]
    source[places], row[places] = having, own[having, several[which]]
    return Rows(ends, source, row)


def own_rows(ids: Sequence[Mapping[int, int]], count: int) -> Integers:
    """[models, ids]: for each model the old row of each new id, from mappings of new ids to old rows; else -1."""
    own = np.full((len(ids), count), -1, np.int64)
    for model, mapping in enumerate(ids):
        own[model, list(mapping)] = list(mapping.values())
    return own
