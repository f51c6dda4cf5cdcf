"""What rules are given: bases, orders, numbers, dtypes, tensors that some models lack. The rules here only listen."""

from pathlib import Path

import numpy as np
import pytest

from merger.dtypes import TORCH_NAMES
from merger.errors import IncompatibleSources, RecipeError
from merger.expression import cast
from merger.methods.merging import RULES
from merger.methods.rules import Group, Parameter, Rule
from tests.checkpoints import bfloat16, write_model
from tests.methods.making import plan

NAMES = ("model.embed_tokens.weight", "model.layers.0.x.weight", "model.layers.1.x.weight", "model.norm.weight")
BASES = ("required", "optional", "ignored")


class Listener:
    """A rule that keeps its groups and gives back the first tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
        self.groups: dict[str, Group] = {}
        shared, each = {"s": Parameter(int, 3)}, {"w": Parameter(float, required=True), "d": Parameter(float, 0.5)}
        rule = Rule("listen", "Listens", fields.pop("base", "required"), self._make, shared, each, **fields)
        monkeypatch.setitem(RULES, "listen", rule)

    def _make(self, group: Group):
        assert group.name not in self.groups
        self.groups[group.name] = group
        return cast(group.tensors[0], group.dtype)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Models `a` and `b` in float32, `c` in bfloat16."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abc"):
        write(name, i)
    return tmp_path


def write(name: str, seed: int, *lacking: str) -> None:
    rng = np.random.default_rng(seed)
    values = {key: rng.standard_normal((4, 4)).astype(np.float32) for key in NAMES if key not in lacking}
    tensors = {key: bfloat16(value) for key, value in values.items()} if name == "c" else values
    write_model(Path(name), tensors, {"model_type": "llama", "num_hidden_layers": 2, "dtype": "float32"})


def configuration(**fields: object) -> dict[str, object]:
    models = [{"model": name, "parameters": {"w": weight}} for name, weight in (("a", [1, 2]), ("b", 4), ("c", 8))]
    return {"merge_method": "listen", "models": models, **fields}


def held_in(group: Group) -> list[str]:
    """The models whose tensors a group has, in its order."""
    return [next(leaf.file.path.parent.name for leaf in tensor.leaves()) for tensor in group.tensors]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("place", ["first", "last", "not named"])
def test_the_base_stands_apart_unless_it_is_ignored(folder, monkeypatch, base, place):
    listener = Listener(monkeypatch, base=base)
    content = configuration(base_model={"first": "a", "last": "c", "not named": "c"}[place], parameters={"w": 16})
    if place == "not named":
        content["models"] = content["models"][:2]
    plan(content)
    assert listener.groups.keys() == set(NAMES)
    group = listener.groups[NAMES[2]]
    apart = {"first": "a"}.get(place, "c")
    weights = {"a": 2.0, "b": 4.0, "c": 16.0 if place == "not named" else 8.0}
    names = list("abc") if base == "ignored" else [name for name in "abc" if name != apart]
    assert held_in(group) == names
    assert group.numbers("w") == tuple(weights[name] for name in names)
    assert group.each["d"] == (0.5,) * len(names)
    assert group.shared == {"s": 3}
    assert (group.base is None) == (base == "ignored")
    if group.base:
        assert next(group.base.leaves()).file.path.parent.name == apart


@pytest.mark.parametrize(
    "asked", [{}, {"dtype": "float16"}, {"out_dtype": "bfloat16"}, {"dtype": "float64", "out_dtype": "float16"}]
)
def test_dtypes(folder, monkeypatch, asked):
    listener = Listener(monkeypatch, base="ignored")
    made = plan(configuration(**asked)).checkpoint
    group = listener.groups[NAMES[0]]
    names = {torch: ours for ours, torch in TORCH_NAMES.items()}
    work = names[asked.get("dtype", "float32")]  # of float32 and bfloat16 where nothing is asked
    result = names[asked["out_dtype"]] if "out_dtype" in asked else work
    assert (group.work_dtype, group.dtype) == (work, result)
    assert {tensor.dtype for tensor in made.tensors.values()} == {result}
    assert made.config["dtype"] == TORCH_NAMES[result]


def test_the_seed_comes_along(folder, monkeypatch):
    listener = Listener(monkeypatch)
    plan(configuration(base_model="c", seed=7))
    assert {group.seed for group in listener.groups.values()} == {7}


LACKED = NAMES[1]


@pytest.mark.parametrize(
    ("absent", "base", "lacking", "expected"),
    [
        ("refused", "required", "a", ["b"]),
        ("refused", "required", "ab", "c"),
        ("refused", "required", "c", IncompatibleSources),
        ("refused", "optional", "c", IncompatibleSources),
        ("refused", "ignored", "a", ["b", "c"]),
        ("refused", "ignored", "ab", ["c"]),
        ("single", "required", "a", ["b"]),
        ("single", "required", "ab", "c"),
        ("single", "required", "bc", "a"),
        ("single", "required", "c", IncompatibleSources),
        ("base", "required", "ab", "c"),
        ("base", "required", "bc", IncompatibleSources),
        ("stock", "required", "a", "c"),
        ("stock", "required", "c", None),
        ("stock", "required", "ab", "c"),
    ],
)
def test_a_tensor_that_some_models_lack(folder, monkeypatch, absent, base, lacking, expected):
    """Merged of those that have it (a list), one that goes through (a letter), left out (None), or refused."""
    for name in lacking:
        write(name, ord(name), LACKED)
    listener = Listener(monkeypatch, base=base, absent=absent, least=2 if absent == "stock" else 1)
    content = configuration(base_model="c")
    if isinstance(expected, type):
        with pytest.raises(expected, match=LACKED):
            plan(content)
        return
    made = plan(content).checkpoint
    assert any(LACKED in warning for warning in made.warnings)
    assert (LACKED in made.tensors) == (expected is not None)
    assert (LACKED in listener.groups) == isinstance(expected, list)
    if isinstance(expected, list):
        assert held_in(listener.groups[LACKED]) == expected
    elif expected:
        assert [leaf.file.path.parent.name for leaf in made.tensors[LACKED].leaves()] == [expected]


@pytest.mark.parametrize(
    ("fields", "content", "says"),
    [
        ({}, {}, "models: listen needs a base_model"),
        ({"least": 3}, {"base_model": "c"}, "models: listen merges at least 3 models beside the base, not 2"),
        ({"most": 1}, {"base_model": "c"}, "models: listen merges exactly 1 models beside the base, not 2"),
        ({"base": "ignored", "least": 4}, {"base_model": "c"}, "models: listen merges at least 4 models, not 3"),
        ({}, {"base_model": "c", "parameters": {"s": [1, 2]}}, "parameters.s: must be a whole number, not 1.5"),
    ],
)
def test_what_a_rule_does_not_take(folder, monkeypatch, fields, content, says):
    Listener(monkeypatch, **fields)
    if "parameters" in content:
        for name in "abc":  # three layers: the second is half way
            write_model(
                folder / name,
                {f"model.layers.{i}.x": np.ones(2, np.float32) for i in range(3)},
                {"model_type": "llama", "num_hidden_layers": 3},
            )
    with pytest.raises(RecipeError) as caught:
        plan(configuration(**content))
    assert says in str(caught.value)


def test_a_slice_has_its_own_base(folder, monkeypatch):
    listener = Listener(monkeypatch)
    slices = [
        {"sources": [{"model": name, "layer_range": [i, i + 1]} for name in "ab"], **own}
        for i, own in enumerate(({}, {"base_model": "b"}))
    ]
    plan({"merge_method": "listen", "slices": slices, "base_model": "a", "parameters": {"w": 1}})
    assert {name: held_in(group) for name, group in listener.groups.items()} == {
        NAMES[0]: ["b"],
        NAMES[1]: ["b"],
        NAMES[2]: ["a"],
        NAMES[3]: ["a"],
    }
    slices[1]["base_model"] = "c"
    with pytest.raises(RecipeError, match=r"the base c is not among them") as caught:
        plan({"merge_method": "listen", "slices": slices, "base_model": "a", "parameters": {"w": 1}})
    assert caught.value.where == "slices[1].sources"
