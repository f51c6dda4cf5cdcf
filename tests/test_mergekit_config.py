"""Settings come to what mergekit makes of them; references; mistakes are told with their field's path."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from merger.checkpoint import Checkpoint
from merger.errors import RecipeError
from merger.expression import Filled
from merger.mergekit_config import Configuration, Model, Reference, reference_of
from merger.mergekit_files import combined, result_of
from merger.mergekit_settings import Setting, evaluate
from merger.methods.rules import Parameter
from merger.methods.settings import check, checker_of, numbers_of
from merger.methods.slices import layout_of
from tests.peer import mergekit

NUMBER, TRUTH = Parameter(float, required=True), Parameter(bool, True)
NAMES = ["model.layers.0.mlp.up.weight", "model.layers.2.self_attn.q.weight", "model.norm.weight"]
FILTERS = ["mlp", "self_attn", "layers.2", "norm", "*", None, "nothing"]

numbers = st.one_of(
    st.floats(-8, 8), st.integers(-8, 8), st.sampled_from(["1e-3", "2.5"]), st.floats(-1, 1).map(lambda x: x * 1e-30)
)
truths = st.booleans()


def settings_of(scalars: st.SearchStrategy) -> st.SearchStrategy:
    """Everything that may stand for a parameter, as plain data."""
    plain = st.one_of(scalars, st.lists(scalars, min_size=1, max_size=5))
    filtered = st.fixed_dictionaries({"value": plain}, optional={"filter": st.sampled_from(FILTERS)})
    return st.one_of(plain, filtered, st.lists(filtered, min_size=1, max_size=4))


def theirs(setting: Any, name: str, t: float, kind: type) -> Any:
    """What mergekit makes of a setting."""
    config = mergekit("config")
    read = TypeAdapter(config.ParameterSetting).validate_python(setting)
    return config.evaluate_setting(name, read, t, validate=TypeAdapter(kind).validate_python)


@given(settings_of(numbers), st.sampled_from(NAMES), st.floats(0, 1))
def test_numbers_are_what_mergekit_makes_of_them(setting, name, t):
    ours = evaluate(TypeAdapter(Setting).validate_python(setting), name, t, checker_of(NUMBER))
    assert ours == theirs(setting, name, t, float)


@given(settings_of(truths), st.sampled_from(NAMES), st.floats(0, 1))
def test_truths_are_picked_as_mergekit_picks_them(setting, name, t):
    ours = evaluate(TypeAdapter(Setting).validate_python(setting), name, t, checker_of(TRUTH))
    assert ours == theirs(setting, name, t, bool)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), st.floats(0, 1))
def test_texts_are_picked_as_mergekit_picks_them(setting, t):
    assert evaluate(setting, "x", t, str) == theirs(setting, "x", t, str)


# ---- precedence, filters, gradients in slices ---------------------------------------------------------


def model_of(layers: int) -> Checkpoint:
    tensors = [f"model.layers.{i}.{rest}.weight" for i in range(layers) for rest in ("mlp.up", "self_attn.q")]
    names = ["model.embed_tokens.weight", *tensors, "model.norm.weight", "lm_head.weight"]
    return Checkpoint({name: Filled("F32", (2, 2)) for name in names}, {"num_hidden_layers": layers}, {}, ())


parameters = st.fixed_dictionaries({}, optional={"weight": settings_of(numbers), "normalize": settings_of(truths)})
weights = st.fixed_dictionaries({}, optional={"weight": settings_of(numbers)})


@st.composite
def sliced(draw: st.DrawFn) -> dict[str, Any]:
    """A configuration of slices of two models with six layers, with settings anywhere."""
    slices = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 3))
        starts = [draw(st.integers(0, 6 - length)) for _ in "ab"]
        sources = [
            {"model": model, "layer_range": [start, start + length], "parameters": draw(weights)}
            for model, start in zip("ab", starts, strict=True)
        ]
        slices.append({"sources": sources, "parameters": draw(parameters)})
    module = {"slices": slices, "parameters": draw(parameters)}
    everywhere = {"weight": draw(numbers), **draw(parameters)}  # required, so that there is always one
    everywhere["weight"] = everywhere["weight"] if isinstance(everywhere["weight"], list) else [everywhere["weight"]]
    if any(isinstance(part, dict) for part in everywhere["weight"]):
        everywhere["weight"] = [*everywhere["weight"], {"value": 0.25}]
    return {"merge_method": "linear", "modules": {"default": module}, "parameters": everywhere}


@given(sliced())
def test_every_tensor_gets_the_numbers_that_mergekit_gives_it(content):
    config, spec = Configuration.model_validate(content), mergekit("merge_methods").get("linear").spec
    check(config)
    models = {Reference(name): model_of(6).named(name) for name in "ab"}
    their_config = mergekit("config").MergeConfiguration.model_validate(content)
    module = their_config.modules["default"]
    first = 0
    layout = layout_of(config, models, models[Reference("a")])
    for region, part in zip(layout.regions, module.slices, strict=True):
        start, stop = part.sources[0].layer_range
        for name in region.names():
            number = int(name.split(".")[2]) - first if ".layers." in name else None
            t = 0.0 if number is None else 1.0 if stop - start == 1 else number / (stop - start - 1)
            own = {
                source.model: name
                if number is None
                else name.replace(f".{number + first}.", f".{number + source.layer_range[0]}.")
                for source in part.sources
            }
            reader = mergekit("config").ConfigReader(config=their_config, t=t, slice_out=part, module=module)
            shared, each = mergekit("parameter_resolver").resolve_parameters(
                spec, tensor_name=name, inputs=own, sources=reader.parameter_sources, t=t
            )
            assert region.depth(name) == t
            rule = {"normalize": TRUTH}, {"weight": NUMBER}
            assert numbers_of(rule[0], region.scopes, name, t, "") == shared
            for share, (ref, values) in zip(region.shares, each.items(), strict=True):
                assert share.own_name(name) == own[ref]
                scopes = (share.scope, *region.scopes)
                assert numbers_of(rule[1], scopes, share.own_name(name), t, "") == values
        first += stop - start


# ---- references ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ref",
    [
        "folder",
        "org/name",
        "org/name@main",
        "org/name@v1+other/adapter",
        "a+b@c",
        {"model": "x"},
        {"model": {"path": "x", "revision": "r"}, "lora": "y@z"},
        {"model": "x@r", "lora": {"path": "y"}},
    ],
)
def test_references_mean_what_they_mean_to_mergekit(ref):
    expected = mergekit("common").ModelReference.model_validate(ref)
    found = reference_of(ref if isinstance(ref, str) else Model.model_validate(ref))
    lora = expected.lora
    assert (found.path, found.revision) == (expected.model.path, expected.model.revision)
    assert (found.lora, found.lora_revision) == ((lora.path, lora.revision) if lora else (None, None))
    assert str(found) == str(expected)


@pytest.mark.parametrize("text", ["a+b+c", "a@b@c", "a@", "@b", "a+"])
def test_references_that_mean_nothing(text):
    with pytest.raises(ValueError, match="must look like"):
        reference_of(text)


# ---- what is refused ----------------------------------------------------------------------------------

AB = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]
LAYERS = [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]


@pytest.mark.parametrize(
    ("content", "where", "says"),
    [
        ({"merge_method": "linaer", "models": AB}, "merge_method", "did you mean 'linear'"),
        (
            {"models": [AB[0], {"model": "b", "parameters": {"wieght": 1}}]},
            "models[1].parameters.wieght",
            "did you mean 'weight'",
        ),
        ({"models": AB, "parameters": {"density": 1}}, "parameters.density", "there are normalize, weight"),
        ({"models": AB, "parameters": {"normalize": 2}}, "parameters.normalize", "must be true or false"),
        (
            {"slices": [{"sources": LAYERS}, {"sources": LAYERS, "parameters": {"weight": [0, {"value": "x"}]}}]},
            "",
            "slices.1.parameters",
        ),
        (
            {"slices": [{"sources": LAYERS}, {"sources": LAYERS, "parameters": {"weight": [{"value": [0, "x"]}]}}]},
            "slices[1].parameters.weight",
            "must be a number, not 'x'",
        ),
        ({"models": [AB[0], AB[0]]}, "models[1].model", "a stands twice"),
        ({"models": [AB[0]], "base_model": "a+b+c"}, "base_model", "must look like"),
        (
            {"models": [{"model": "a", "parameters": {"weight": 1, "normalize": True}}]},
            "models[0].parameters.normalize",
            "holds for all models together",
        ),
        ({"merge_method": "passthrough", "models": [{"model": "a"}, {"model": "b"}]}, "models", "exactly 1 models"),
        (
            {"merge_method": "passthrough", "slices": [{"sources": LAYERS}]},
            "slices[0].sources",
            "exactly 1 models, not 2",
        ),
        ({"models": AB, "parameters": {"weight": "inf"}}, "parameters.weight", "must be a number"),
    ],
)
def test_mistakes_are_told_with_their_fields_path(content, where, says):
    with pytest.raises((RecipeError, ValidationError)) as caught:
        check(Configuration.model_validate({"merge_method": "linear", **content}))
    assert says in str(caught.value)
    assert getattr(caught.value, "where", "") == where


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"models": AB, "slices": [{"sources": LAYERS}]},
        {"models": []},
        {"models": AB, "dtypo": "float16"},
        {"models": AB, "dtype": "float8"},
        {"models": AB, "tokenizer": {}, "tokenizer_source": "union"},
        {"modules": {"default": {}}},
        {"modules": {"default": {"models": AB, "slices": [{"sources": LAYERS}]}}},
        {"slices": [{"sources": [{"model": "a", "layer_range": [2, 2]}]}]},
        {"slices": [{"sources": [{"model": "a", "layer_range": [-1, 2]}]}]},
        {"models": AB, "parameters": {"weight": []}},
        {"models": AB, "parameters": {"weight": None}},
        {"models": AB, "parameters": {"weight": {"filtr": "x", "value": 1}}},
    ],
)
def test_configurations_that_are_not_well_formed(content):
    with pytest.raises(ValidationError):
        Configuration.model_validate({"merge_method": "linear", **content})


def test_what_is_well_formed_stays_what_it_was():
    content = {
        "models": [{"model": {"model": {"path": "a", "revision": "r"}}, "parameters": {"weight": [0, 1]}}],
        "merge_method": "linear",
        "base_model": "a@r",
        "dtype": "bfloat16",
        "tokenizer": {
            "source": "union",
            "tokens": {"<x>": {"source": {"kind": "zero"}, "force": True}, "<y>": {"source": "b"}},
            "pad_to_multiple_of": 8,
        },
        "chat_template": "auto",
    }
    dumped = Configuration.model_validate({**content, "dtype": "torch.bfloat16"}).model_dump(
        mode="json", exclude_none=True, exclude_unset=True
    )
    assert dumped == content


# ---- files of several ---------------------------------------------------------------------------------


def document(name: str | None, *models: str) -> dict[str, Any]:
    named = {"name": name} if name else {}
    return {"merge_method": "linear", "models": [{"model": model} for model in models], **named}


def test_later_configurations_use_earlier_ones():
    documents = [document("one", "a", "b"), document("two", "one", "c"), document(None, "two+lora", "one")]
    result = result_of(documents)
    one = documents[0]
    assert result is documents[2]
    assert combined(documents, result) == {
        **result,
        "merges": {"two": {**documents[1], "merges": {"one": one}}, "one": one},
    }


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([document("one", "two"), document("two", "one"), document("three", "one")], "circle: one uses two uses one"),
        ([document("one", "a"), document("one", "b"), document(None, "one")], "'one' stands twice"),
        ([document("one", "a"), document("two", "b")], "'one' is not used"),
        ([document(None, "a"), document(None, "b")], "missing in 2 of 2 documents"),
        ([document("one", "a"), {"method": "lawa"}], "document 2: is not a mergekit configuration"),
        ([document("one", "a"), "text"], "document 2: is not a mergekit configuration"),
    ],
)
def test_files_that_do_not_belong_together(documents, says):
    with pytest.raises(RecipeError) as caught:
        combined(documents, result_of(documents))
    assert says in str(caught.value)
