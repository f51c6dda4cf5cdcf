"""How far results in bfloat16 are from float64, ours and mergekit's: every rule that draws nothing.

`python -m tests.methods.rounding` prints the table of docs/mergekit.md. float64 is mergekit itself with
`dtype: float64` on the same files.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merger.methods.merging import RULES
from merger.methods.rules import Rule
from tests import tiny
from tests.methods.making import make
from tests.peer import merge

RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
NUMBERS = {"weight": [0.4, 1], "t": [0.2, 0.8], "density": 0.6, "gamma": 0.1}  # for rules that take them
BY_MAGNITUDE = {"ties", "breadcrumbs", "breadcrumbs_ties"}  # rules that keep some of the changes


@dataclass(frozen=True)
class Distances:
    """In units in the last place of bfloat16 at the exact value: the largest of all elements, and the mean. `worse` are
    the elements that are over one unit from mergekit's and farther from float64 than these. Left out are, of so many,
    those as large as others on the far side of a threshold: mergekit keeps any of these.
    """

    between: float
    ours: float
    theirs: float
    our_mean: float
    their_mean: float
    worse: int
    left_out: int
    elements: int


def models_in(folder: Path) -> list[str]:
    """Three models in bfloat16: one, and two that differ from it by a tenth."""
    base = tiny.model("llama", seed=1)
    found = []
    for i in range(3):
        torch.manual_seed(i)
        if i:
            base = tiny.model("llama", seed=1)
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.015)
        base.bfloat16().save_pretrained(folder / str(i))
        found.append(str(folder / str(i)))
    return [*found[1:], found[0]]


def content_of(rule: Rule, models: list[str], dtype: str) -> dict[str, Any]:
    """A configuration with gradients; the base is the last model."""
    has_base = rule.base != "ignored"
    given = [*models[: rule.most or 2], *models[-1:]] if has_base else models[: rule.most or 3]
    numbers = {key: value for key, value in NUMBERS.items() if key in {**rule.shared, **rule.each}}
    content: dict[str, Any] = {
        "merge_method": rule.name,
        "models": [{"model": model} for model in given],
        "parameters": numbers,
        "dtype": dtype,
        "out_dtype": dtype,  # without it mergekit writes some rules' results in float32
    }
    return {**content, "base_model": given[-1]} if has_base else content


def distances(name: str, models: list[str], folder: Path) -> Distances:
    """Of all elements of a result by a rule."""
    rule = RULES[name]
    content = content_of(rule, models, "bfloat16")
    make(content, folder / "ours")
    ours, theirs = tiny.stored(folder / "ours"), merge(content, folder / "theirs")
    exact = merge(content_of(rule, models, "float64"), folder / "exact")
    sources = [tiny.stored(Path(model["model"])) for model in content["models"]]
    equal = torch.cat([_at_a_threshold(name, [source[key].double() for source in sources]) for key in exact])
    columns = [torch.cat([each[key].double().reshape(-1) for key in exact]) for each in (ours, theirs, exact)]
    return _measured(*columns, equal)


def _at_a_threshold(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The elements as large as the last one that is kept and the first one that is not; the base is the last tensor."""
    *models, base = (tensor.reshape(-1) for tensor in tensors)
    count, found = base.numel(), torch.zeros(base.numel(), dtype=torch.bool)
    kept, largest = int(NUMBERS["density"] * count), 0 if name == "ties" else int(NUMBERS["gamma"] * count)
    for delta in ((model - base).abs() for model in models if name in BY_MAGNITUDE):
        ordered = delta.sort(descending=True).values
        for place in {largest, largest + kept}:
            around = ordered[max(0, place - 1) : place + 1]
            if len(around) == 2 and around[0] == around[1]:
                found |= delta == around[0]
    return found


def _measured(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, equal: torch.Tensor) -> Distances:
    size = torch.maximum(exact.abs(), torch.full_like(exact, 2.0**-14))
    ulp = torch.exp2(torch.floor(torch.log2(size)) - 7)
    between, mine, its = ((a - b).abs() / ulp for a, b in ((ours, theirs), (ours, exact), (theirs, exact)))
    between, mine, its = (each[~equal] for each in (between, mine, its))
    worse = int(((between > 1) & (mine > its)).sum())
    figures = [float(each.max()) for each in (between, mine, its)] + [float(mine.mean()), float(its.mean())]
    return Distances(*figures, worse, int(equal.sum()), exact.numel())


def main() -> None:
    print("| rule | most from mergekit | ours from float64: most, mean | mergekit's: most, mean | left out |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = models_in(Path(folder))
        for name in sorted(set(RULES) - RANDOM):
            d = distances(name, models, Path(folder) / name)
            ours, theirs = f"{d.ours:.2f}, {d.our_mean:.3f}", f"{d.theirs:.2f}, {d.their_mean:.3f}"
            print(f"| {name} | {d.between:.2f} | {ours} | {theirs} | {d.left_out or ''} |")
            print(name, d, file=sys.stderr)


if __name__ == "__main__":
    main()
