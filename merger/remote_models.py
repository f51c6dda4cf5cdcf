"""Checkpoints that lie on the Hub: opened, and found by patterns. Reads trees, configs and headers."""

import re
from dataclasses import replace
from fnmatch import fnmatchcase
from glob import has_magic

from merger.checkpoint import Checkpoint, checkpoint_of
from merger.errors import PickledWeights, SourceError
from merger.storage.folder import PICKLES, ModelFolder, declared, open_place
from merger.storage.hub import Access, HubFolder, Pin, branches, pinned
from merger.storage.place import natural
from merger.storage.reference import Reference, reference_of


def open_on_hub(text: str, access: Access, pin: Pin = pinned) -> Checkpoint:
    """The checkpoint that a reference names, at the commit that `pin` finds for its revision.

    Raises SourceError, FormatError or PickledWeights.
    """
    reference = reference_of(text)
    repository = pin(reference, access)
    folder, _, name = reference.folder.rpartition("/")
    if any(fnmatchcase(name, pattern) for pattern in PICKLES):
        raise PickledWeights("is a pickle, which merger does not read", where=text)
    if name.endswith(".safetensors"):
        place = HubFolder(repository, folder, text.rpartition("/")[0])
        if not place.has(name):
            raise SourceError("is not in the repository", where=text)
        model = ModelFolder(text, (place.weights(name),), None, {}, ())
    else:
        model = open_place(HubFolder(repository, reference.folder, text))
    if reference.folder:
        model = _with_the_repositorys(model, HubFolder(repository, "", text))
    return checkpoint_of(
        model,
        text,
        hub_step(reference),
        repository=repository.name,
        revision=repository.commit,
        gated=repository.gated,
    )


def _with_the_repositorys(model: ModelFolder, root: HubFolder) -> ModelFolder:
    """A folder of a repository, with the repository's card and licence where it has none of its own."""
    text, files = declared(root)
    return replace(model, card_text=model.card_text or text, license_files=model.license_files or files)


def hub_step(reference: Reference) -> int | None:
    """The training step that the folder's name or the revision ends in."""
    names = [reference.folder.rpartition("/")[2]]
    if not re.fullmatch("[0-9a-f]{40}", reference.revision):
        names.append(reference.revision)
    numbers = [number for name in names for number in re.findall(r"\d+", name)[-1:]]
    return int(numbers[0]) if numbers else None


def hub_matches(text: str, access: Access, pin: Pin = pinned) -> list[str]:
    """The references that a pattern matches, in natural order: over branches and tags, or over folders and files of
    weights.

    Raises SourceError where nothing matches.
    """
    pattern = reference_of(text)
    found = _revisions(pattern, access) if has_magic(pattern.revision) else _folders(pattern, access, pin)
    if not found:
        raise SourceError("matches nothing on the Hub", where=f"checkpoints: {text}")
    return sorted(map(str, found), key=natural)


def _revisions(pattern: Reference, access: Access) -> list[Reference]:
    if has_magic(pattern.folder):
        raise SourceError("has two patterns: of revisions and of folders", where=str(pattern))
    names = branches(pattern, access)
    return [Reference(pattern.repository, n, pattern.folder) for n in names if fnmatchcase(n, pattern.revision)]


def _folders(pattern: Reference, access: Access, pin: Pin) -> list[Reference]:
    parent, _, last = pattern.folder.rpartition("/")
    if has_magic(parent):
        raise SourceError("has a pattern before the last part of its folder", where=str(pattern))
    place = HubFolder(pin(pattern, access), parent, str(pattern))
    names = [name for name in place.matches(last) if not place.has(name) or name.endswith(".safetensors")]
    above = f"{parent}/" if parent else ""
    return [Reference(pattern.repository, pattern.revision, above + name) for name in names]
