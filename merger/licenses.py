"""The verdict over the licences that the parents of a result declare: which one the result carries, what a person must
acknowledge first, what must not be passed on.

Knows the licence ids of the Hub and what kinds of terms they stand for. Pure. It reads what cards declare, which nobody
checks: a help to be careful, not legal advice (docs/lineage.md has the rules).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from merger.errors import LicenseRefused
from merger.lineage import Parent

Kind = Literal[
    "permissive", "weak-copyleft", "copyleft", "share-alike", "non-commercial", "no-derivatives", "custom", "unknown"
]

# The ids of the Hub (docs/hub/repositories-licenses). The order counts: of the permissive licences, and of Creative
# Commons' non-commercial ones, the later asks for more and is what a mixture carries.
_IDS: Mapping[Kind, str] = {
    "permissive": "cc0-1.0 pddl unlicense wtfpl bsl-1.0 zlib isc mit postgresql ncsa bsd-2-clause bsd bsd-3-clause "
    "bsd-3-clause-clear afl-3.0 ecl-2.0 artistic-2.0 open-mdw openmdw-1.0 apache-2.0 etalab-2.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 odc-by cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0",
    "weak-copyleft": "lgpl lgpl-2.1 lgpl-3.0 lgpl-lr mpl-2.0 epl-1.0 epl-2.0 ms-pl lppl-1.3c ofl-1.1",
    "copyleft": "gpl gpl-2.0 gpl-3.0 agpl-3.0 osl-3.0 eupl-1.1 eupl-1.2",
    "share-alike": "cc-by-sa-3.0 cc-by-sa-4.0 gfdl odbl cdla-sharing-1.0",
    "non-commercial": "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "apple-amlr deepfloyd-if-license fair-noncommercial-research-license h-research intel-research",
    "no-derivatives": "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0",
    "custom": "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma openrail openrail++ bigscience-openrail-m "
    "creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m c-uda apple-ascl grok2-community",
}
KINDS: Mapping[str, Kind] = {name: kind for kind, names in _IDS.items() for name in names.split()}
_ORDER = {name: place for place, name in enumerate(KINDS)}

# What is under the first may be passed on under the second (Creative Commons' list of compatible licences; the FSF on
# GPL-3.0). Beyond these, two licences that each ask for the whole are not taken together without a word.
_PASSES_INTO = {
    *(("lgpl-2.1", "gpl-2.0"), ("lgpl-2.1", "gpl-3.0"), ("lgpl-3.0", "gpl-3.0"), ("lgpl-3.0", "agpl-3.0")),
    *(("mpl-2.0", "gpl-2.0"), ("mpl-2.0", "gpl-3.0"), ("mpl-2.0", "agpl-3.0"), ("mpl-2.0", "lgpl-3.0")),
    *(("gpl-3.0", "agpl-3.0"), ("cc-by-sa-3.0", "cc-by-sa-4.0"), ("cc-by-sa-4.0", "gpl-3.0")),
}
_PATENTS = ("apache-2.0", "gpl-2.0")  # the one permissive licence whose work may not be passed on under GPL-2.0

# What a card must say, and how the name of a derived model must begin.
_LLAMA = {"llama3": ("Built with Meta Llama 3", "Llama-3")} | dict.fromkeys(
    ("llama3.1", "llama3.2", "llama3.3", "llama4"), ("Built with Llama", "Llama")
)
_META = "Copyright © Meta Platforms, Inc. All Rights Reserved."
_NOTICES = {
    "llama2": f"Llama 2 is licensed under the LLAMA 2 Community License, {_META}",
    "llama3": f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {_META}",
    **{
        f"llama{n}": f"Llama {n} is licensed under the Llama {n} Community License, {_META}"
        for n in ("3.1", "3.2", "3.3", "4")
    },
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
}


@dataclass(frozen=True)
class Verdict:
    """What becomes of a result's licence.

    `carried`: it goes on under `license`, the fields for the card's front matter. `ask`: so too, once a person has
    acknowledged the `reasons`. `refuse`: what is made of these parents must not be passed on. `obligations` are for
    those who pass it on; `notices` are the lines that licences want in a file NOTICE. All of them are sentences,
    reasons without their full stop.
    """

    kind: Literal["carried", "ask", "refuse"]
    license: Mapping[str, str]
    reasons: tuple[str, ...] = ()
    obligations: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def verdict(parents: Sequence[Parent], name: str | None = None, *, public: bool = True) -> Verdict:
    """Judge what is made of `parents`, to be called `name` (`org/name` or `name`; None where that is not known yet) and
    passed on in public or not.
    """
    groups: dict[str, list[Parent]] = {}
    for parent in parents:
        groups.setdefault(_terms(parent), []).append(parent)
    refusals = [*_without_derivatives(groups), *_clashes(groups)]
    if refusals:
        return Verdict("refuse", {}, tuple(refusals))
    known = [terms for terms in groups if terms]
    kept = _kept(known)
    if "" in groups and all(kind_of(terms) == "permissive" for terms in kept):
        kept = []  # a card claims no more freedom than is known
    doubts = [*_doubts(groups, kept), *_misnamed(known, name), *(_gated(parents) if public else ())]
    license = _fields(kept, groups)
    obligations = dict.fromkeys(text for terms in known for text in _obligations(terms, groups[terms]))
    notices = tuple(_NOTICES[terms] for terms in known if terms in _NOTICES)
    reasons = tuple(doubts or _carried(groups, kept))
    return Verdict("ask" if doubts else "carried", license, reasons, tuple(obligations), notices)


def require_license(verdict: Verdict, accepted: bool) -> None:
    """See that a result may be passed on. Raises LicenseRefused where it must not be, or nobody has `accepted` it."""
    if verdict.kind == "refuse":
        raise LicenseRefused("; ".join(verdict.reasons), where="license")
    if verdict.kind == "ask" and not accepted:
        remedy = "Where you may pass it on, say so: --accept-license, or `output.accept_license: true` in the recipe."
        raise LicenseRefused("; ".join(verdict.reasons), where="license", remedy=remedy)


# ---- what each licence is -----------------------------------------------------------------------------


def kind_of(terms: str) -> Kind:
    """What kind of licence an id of the Hub stands for, or the name that a card gives to one of its own."""
    if terms in KINDS:
        return KINDS[terms]
    words = set(re.split(r"[^a-z0-9]+", terms.lower()))
    if "nd" in words:
        return "no-derivatives"
    return "non-commercial" if "nc" in words or re.search("non-?commercial", terms.lower()) else "unknown"


def _terms(parent: Parent) -> str:
    """What names a parent's licence: an id, `other:NAME` for one of its own, nothing where none is declared."""
    card = parent.card
    name = re.sub(r"[^a-z0-9.]+", "-", (card.license_name or "").lower()).strip("-")
    if card.license == "other":
        return name if name in KINDS else f"other:{name}"
    return "" if card.license in (None, "unknown", "cc") else str(card.license)  # cc: which of them is not said


def _shown(terms: str) -> str:
    return terms.removeprefix("other:") or "other"


# ---- how they go together -----------------------------------------------------------------------------


def _passes(narrow: str, wide: str) -> bool:
    """Whether work under one licence may be passed on under the other."""
    if narrow == wide or (narrow, wide) in _PASSES_INTO:
        return True
    if kind_of(narrow) == "permissive":
        both = kind_of(wide) == "permissive"
        return (narrow, wide) != _PATENTS and (not both or _ORDER[narrow] < _ORDER[wide])
    commons = all(terms in KINDS and terms.startswith("cc-by-nc-") for terms in (narrow, wide))
    return commons and _ORDER[narrow] < _ORDER[wide]


def _clash(a: str, b: str) -> bool:
    """Whether what is made of both cannot be passed on at all."""
    kinds = {kind_of(a), kind_of(b)}
    if kinds & {"copyleft", "share-alike"}:
        return bool(kinds & {"custom", "non-commercial"})
    if kinds == {"non-commercial"}:
        return not _passes(a, b) and not _passes(b, a)
    return kinds == {"non-commercial", "custom"} and any("-sa-" in terms for terms in (a, b))


def _kept(known: Sequence[str]) -> list[str]:
    """The licences that the result stays under: one where all others pass into it."""
    for wide in known:
        if all(_passes(terms, wide) for terms in known):
            return [wide]
    return [terms for terms in known if not any(_passes(terms, wide) for wide in known if wide != terms)]


def _fields(kept: Sequence[str], groups: Mapping[str, Sequence[Parent]]) -> dict[str, str]:
    if not kept:
        return {}
    if len(kept) > 1:
        return {"license": "other", "license_name": "-and-".join(map(_shown, kept)), "license_link": "LICENSE"}
    if not kept[0].startswith("other:"):
        return {"license": kept[0]}
    link = next((link for parent in groups[kept[0]] if (link := _link(parent))), "")
    fields = {"license": "other", "license_name": kept[0].removeprefix("other:"), "license_link": link}
    return {key: value for key, value in fields.items() if value}


def _link(parent: Parent) -> str | None:
    """Where a licence can be read: a file's name in a card means a file beside that card."""
    link = parent.card.license_link
    if not link or not parent.repository or "://" in link:
        return link
    return f"https://huggingface.co/{parent.repository}/blob/{parent.revision or 'main'}/{link}"


# ---- in words -----------------------------------------------------------------------------------------


def _without_derivatives(groups: Mapping[str, Sequence[Parent]]) -> Iterator[str]:
    for terms, parents in groups.items():
        if kind_of(terms) == "no-derivatives":
            yield f"{_names(parents)} {_are(parents)} under {_shown(terms)}, which forbids to pass on derived works"


def _clashes(groups: Mapping[str, Sequence[Parent]]) -> Iterator[str]:
    for a, b in combinations(groups, 2):
        if _clash(a, b):
            first, other = f"{_names(groups[a])} ({_shown(a)})", f"{_names(groups[b])} ({_shown(b)})"
            yield f"the terms of {first} and {other} contradict each other: nothing made of both can be passed on"


def _doubts(groups: Mapping[str, Sequence[Parent]], kept: Sequence[str]) -> Iterator[str]:
    for terms, parents in groups.items():
        if not terms:
            yield f"{_names(parents)} {'declares' if len(_labels(parents)) == 1 else 'declare'} no licence"
        elif terms not in KINDS:
            yield f"{_names(parents)} {_are(parents)} under terms that are not known here ({_shown(terms)}): read them"
    if len(kept) > 1:
        under = " and ".join(f"{_names(groups[terms])} ({_shown(terms)})" for terms in kept)
        yield f"no one licence covers {under}: the terms of all of them hold"


def _misnamed(known: Iterable[str], name: str | None) -> Iterator[str]:
    called = (name or "").rpartition("/")[2]
    for terms in known:
        begin = _LLAMA[terms][1] if terms in _LLAMA else ""
        if called and not called.replace("_", "-").startswith((begin, begin.replace("-", ""))):
            yield f"{terms} wants the names of derived models to begin with {begin}, {called} does not"


def _gated(parents: Sequence[Parent]) -> Iterator[str]:
    gated = [parent for parent in parents if parent.gated]
    if gated:
        yield f"{_names(gated)} {_are(gated)} gated: its terms may forbid to pass it on to everybody"


def _carried(groups: Mapping[str, Sequence[Parent]], kept: Sequence[str]) -> Iterator[str]:
    for terms, parents in groups.items():
        into = f" and passes into {_shown(kept[0])}" if len(kept) == 1 and terms != kept[0] else ""
        if terms:
            yield f"{_names(parents)} {_are(parents)} under {_shown(terms)}{into}"


def _obligations(terms: str, parents: Sequence[Parent]) -> Iterator[str]:
    """What one licence asks of those who pass the result on."""
    kind, shown = kind_of(terms), _shown(terms)
    if terms in _LLAMA:
        yield f"{_LLAMA[terms][0]}."
        yield f"The names of models that are made of it begin with {_LLAMA[terms][1]}."
    if terms.startswith("cc-by") or terms == "odc-by":
        yield f"Name the makers of {_names(parents)} ({shown})."
    if kind == "non-commercial":
        yield f"Not for commercial use ({shown})."
    if kind in ("copyleft", "share-alike", "weak-copyleft"):
        yield f"Whoever passes it on gives others the rights of {shown} too."
    if kind in ("custom", "unknown"):
        yield f"The terms of {shown}, those on its use too, go on with it: keep its LICENSE and NOTICE files."


def _labels(parents: Iterable[Parent]) -> list[str]:
    return list(dict.fromkeys(parent.label for parent in parents))


def _names(parents: Iterable[Parent]) -> str:
    labels = _labels(parents)
    if len(labels) > 3:
        return f"{', '.join(labels[:2])} and {len(labels) - 2} more"
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


def _are(parents: Iterable[Parent]) -> str:
    return "are" if len(_labels(parents)) > 1 else "is"
