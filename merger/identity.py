"""What tells a stored model from others of its shape: a digest of its names and of a sample of its values.

Reads a little of each of a few tensors, so that it is as cheap for a model that lies elsewhere. Knows stored tensors;
knows nothing of what the digest is for.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from merger.checkpoint import Checkpoint
from merger.expression import Stored
from merger.reader import part_of

TENSORS = 64  # of which values are looked at, evenly over the names
ELEMENTS = 1024  # from the middle of each: beginnings are rows of tokens that no training moves
_AT_ONCE = 8


def digest_of(model: Checkpoint) -> str:
    """sha256 over the names, dtypes and shapes of all tensors and the sampled values, in hexadecimal.

    Raises ReadFailed and SourceChanged, and TypeError for a model that is not stored.
    """
    names = sorted(model.tensors)
    digest = hashlib.sha256()
    for name in names:
        tensor = model.tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\n".encode())
    chosen = names[:: max(1, -(-len(names) // TENSORS))]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for content in pool.map(lambda name: _middle(model, name), chosen):
            digest.update(content)
    return digest.hexdigest()


def _middle(model: Checkpoint, name: str) -> bytes:
    tensor = model.tensors[name]
    if not isinstance(tensor, Stored):
        raise TypeError(f"{name} of {model.label} is not stored")
    start = max(0, (tensor.size - ELEMENTS) // 2)
    part = tensor.range(start, min(tensor.size, start + ELEMENTS))
    return part_of(part.file, part.start, part.stop)
