"""Checkpoints that lie in object stores: opened, found by patterns, and which may be read.

Reads listings, configs and headers.
"""

import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from glob import has_magic

from merger.checkpoint import Checkpoint, checkpoint_of
from merger.errors import PickledWeights, SourceError
from merger.storage.folder import PICKLES, ModelFolder, open_place
from merger.storage.objects import ObjectFolder, object_at, weights_at
from merger.storage.place import natural
from merger.storage.stores import location_of

_WEIGHTS = ".safetensors"


def open_in_store(text: str) -> Checkpoint:
    """The checkpoint at an address, its objects pinned by the ETags that they have now.

    Raises SourceError, FormatError or PickledWeights.
    """
    location = location_of(text)
    if any(fnmatchcase(location.name, pattern) for pattern in PICKLES):
        raise PickledWeights("is a pickle, which merger does not read", where=text)
    if location.name.endswith(_WEIGHTS):
        model = ModelFolder(text, (weights_at(object_at(text)),), None, {}, ())
    else:
        model = open_place(ObjectFolder(location))
    return checkpoint_of(model, text, store_step(text))


def store_step(text: str) -> int | None:
    """The training step that an address ends in."""
    numbers = re.findall(r"\d+", location_of(text).name.removesuffix(_WEIGHTS))
    return int(numbers[-1]) if numbers else None


def store_matches(text: str) -> list[str]:
    """The addresses of the folders and safetensors files that a pattern in the last part of an address matches, in
    natural order.

    Raises SourceError where nothing matches.
    """
    pattern = location_of(text)
    if has_magic(pattern.above.key):
        raise SourceError("has a pattern before the last part of its folder", where=f"checkpoints: {text}")
    place = ObjectFolder(pattern.above)
    names = [name for name in place.matches(pattern.name) if not place.has(name) or name.endswith(_WEIGHTS)]
    if not names:
        some = ", ".join(sorted(place.names)[:5])
        raise SourceError("matches nothing there", where=f"checkpoints: {text}", remedy=f"{place} holds {some}.")
    return [str(pattern.above.at(name)) for name in sorted(names, key=natural)]


def admit_location(text: str, allowed: Collection[str] | None, where: str = "") -> None:
    """See that an address lies below one of the `allowed` ones; None: any may be used, as on a person's own machine.

    Raises SourceError, which does not tell whether anything is there.
    """
    address = f"{location_of(text)}/"
    if allowed is None or any(address.startswith(f"{prefix.rstrip('/')}/") for prefix in allowed):
        return
    remedy = f"It may use what is below {', '.join(allowed)}." if allowed else "It uses no object stores."
    raise SourceError("is outside of the object stores that this service may use", where=where or text, remedy=remedy)
