"""mergekit's configurations against mergekit, tensor by tensor; what it does not do against float64."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from merger.errors import IncompatibleSources, RecipeError, SourceError, UnsupportedModel
from merger.methods.merging import RULES
from merger.recipe import parse_document
from merger.run import Options, plan_of
from tests import tiny
from tests.methods.making import make, plan
from tests.peer import merge

KINDS = {"llama": "abc", "qwen2": "de", "gpt2": "fg", "mixtral": "mno", "qwen3_moe": "rst"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models by a letter each, the same letters as in KINDS."""
    root = tmp_path_factory.mktemp("models")
    letters = [(kind, letter) for kind, all_of in KINDS.items() for letter in all_of]
    return {letter: str(tiny.save(root / letter, kind, seed=ord(letter))) for kind, letter in letters}


def filled(text: str, models: dict[str, str]) -> dict[str, Any]:
    """A configuration with the folders of models for `<a>`, `<b>`, ..."""
    for letter, folder in models.items():
        text = text.replace(f"<{letter}>", folder)
    return yaml.safe_load(text)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """The same tensors, but for so much of their largest number."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        scale = float(theirs[name].abs().max()) or 1.0
        assert float((tensor.double() - theirs[name].double()).abs().max()) <= tolerance * scale, name


CONFIGURATIONS = {
    "weights": """
        merge_method: linear
        models: [{model: <a>, parameters: {weight: 1}}, {model: <b>, parameters: {weight: 0.25}}]
        dtype: float32
    """,
    "a gradient, filters, a default": """
        merge_method: linear
        models:
          - model: <a>
            parameters: {weight: [{filter: mlp, value: [0, 0.5, 1]}, {filter: self_attn, value: 0.75}]}
          - {model: <b>, parameters: {weight: {filter: layers.2, value: 2}}}
          - {model: <c>, parameters: {weight: [1, 0]}}
        parameters: {normalize: [{filter: norm, value: false}, {value: true}], weight: 0.5}
        dtype: float32
    """,
    "a base that is named": """
        merge_method: linear
        models: [{model: <a>, parameters: {weight: 1}}]
        base_model: <b>
        parameters: {weight: 0.5, normalize: false}
        dtype: float32
    """,
    "slices that stay": """
        merge_method: linear
        slices:
          - sources:
              - {model: <a>, layer_range: [0, 3]}
              - {model: <b>, layer_range: [0, 3], parameters: {weight: [1, 0]}}
            parameters: {normalize: false}
          - sources: [{model: <c>, layer_range: [3, 4]}, {model: <a>, layer_range: [3, 4]}]
            parameters: {weight: [2, 1]}
        parameters: {weight: [0.25, 0.75]}
        dtype: float32
    """,
    "slices that move": """
        merge_method: linear
        slices:
          - sources: [{model: <a>, layer_range: [0, 2]}, {model: <b>, layer_range: [2, 4]}]
            parameters: {weight: [{filter: layers.3, value: 3}, {value: [0.5, 1]}]}
          - sources: [{model: <b>, layer_range: [0, 4]}, {model: <c>, layer_range: [0, 4]}]
        parameters: {weight: 1}
        dtype: float32
    """,
    "a stack": """
        merge_method: passthrough
        slices:
          - sources: [{model: <a>, layer_range: [0, 3]}]
          - sources: [{model: <b>, layer_range: [1, 4], parameters: {scale: {filter: o_proj, value: 0.5}}}]
          - sources: [{model: <a>, layer_range: [2, 4]}]
        dtype: float32
    """,
    "fewer layers": """
        merge_method: passthrough
        slices: [{sources: [{model: <a>, layer_range: [0, 1]}]}, {sources: [{model: <a>, layer_range: [3, 4]}]}]
    """,
    "a module": """
        merge_method: linear
        modules:
          default:
            slices: [{sources: [{model: <a>, layer_range: [0, 4]}, {model: <b>, layer_range: [0, 4]}]}]
            parameters: {weight: 0.5}
        parameters: {weight: 0.1, normalize: false}
        dtype: float32
    """,
    "models in a module": """
        merge_method: linear
        modules: {default: {models: [{model: <a>}, {model: <b>, parameters: {weight: 1e-1}}], parameters: {weight: 1}}}
        dtype: float32
        out_dtype: float64
    """,
    "qwen2": """
        merge_method: linear
        slices:
          - sources: [{model: <d>, layer_range: [0, 3]}, {model: <e>, layer_range: [1, 4]}]
          - sources: [{model: <e>, layer_range: [0, 1]}, {model: <d>, layer_range: [3, 4]}]
        parameters: {weight: [1, 0.5, 0.25]}
        dtype: float32
    """,
    "gpt2": """
        merge_method: linear
        slices:
          - sources: [{model: <f>, layer_range: [0, 2]}, {model: <g>, layer_range: [1, 3]}]
          - sources: [{model: <g>, layer_range: [0, 4]}, {model: <f>, layer_range: [0, 4]}]
        parameters: {weight: [{filter: attn, value: [0.2, 1]}, {value: 1}]}
        dtype: float32
    """,
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_tensors_are_mergekits(tmp_path, models, name):
    content = filled(CONFIGURATIONS[name], models)
    theirs = merge(content, tmp_path / "theirs")
    make(content, tmp_path / "ours")
    ours = tiny.stored(tmp_path / "ours")
    assert_equal(ours, theirs, 0.0 if content["merge_method"] == "passthrough" else 1e-6)
    said, expected = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    for key in ("num_hidden_layers", "n_layer", "layer_types", "max_window_layers", "tie_word_embeddings"):
        assert key == "max_window_layers" or said.get(key) == expected.get(key), key
    dtype = content.get("out_dtype") or content.get("dtype") or "float32"
    assert said["dtype"] == dtype
    tiny.load(tmp_path / "ours", dtype)  # no key is missing, none left over


# mergekit's own examples, with tiny models, in float32: it rounds the inputs to `dtype` first.
EXAMPLES = {
    "linear": """
        models:
          - {model: <a>, parameters: {weight: 1.0}}
          - {model: <b>, parameters: {weight: 0.3}}
          - {model: <c>, parameters: {weight: 0.5}}
        merge_method: linear
        dtype: float32
    """,
    "gradient-slerp": """
        slices: [{sources: [{model: <a>, layer_range: [0, 4]}, {model: <b>, layer_range: [0, 4]}]}]
        merge_method: slerp
        base_model: <a>
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: float32
    """,
    "ties": """
        models:
          - {model: <a>, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - {model: <b>, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
        merge_method: ties
        base_model: <c>
        parameters: {normalize: true, int8_mask: true}
        dtype: float32
    """,
    "bio-merge": """
        models:
          - {model: <a>, parameters: {density: 0.5, weight: 0.5}}
          - {model: <b>, parameters: {density: 0.5, weight: 0.5}}
        merge_method: dare_ties
        base_model: <c>
        parameters: {normalize: false, int8_mask: true}
        dtype: float32
    """,
    "orcamini-platy-44layer": """
        slices: [{sources: [{model: <a>, layer_range: [0, 3]}]}, {sources: [{model: <b>, layer_range: [2, 4]}]}]
        merge_method: passthrough
        dtype: float32
    """,
}
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}


def runs(example: str) -> bool:
    """Whether there is the rule that an example names."""
    return yaml.safe_load(example)["merge_method"] in RULES


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if runs(example)])
def test_mergekits_examples_run(tmp_path, models, name):
    content = filled(EXAMPLES[name], models)
    theirs = merge(content, tmp_path / "theirs")
    make(content, tmp_path / "ours")
    ours = tiny.stored(tmp_path / "ours")
    if content["merge_method"] in RANDOM:  # other random numbers
        assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    else:
        assert_equal(ours, theirs, 2e-5)


NUMBERS = {"weight": [0.4, 1], "t": [0.2, 0.8], "density": 0.6, "gamma": 0.1}  # for rules that take them


@pytest.mark.slow  # a second each
@pytest.mark.parametrize("name", [name for name in RULES if name not in RANDOM])
def test_every_rule_gives_what_mergekit_gives(tmp_path, models, name):
    """With gradients, and the base last of the models."""
    rule = RULES[name]
    count = (rule.most or 2) + (rule.base != "ignored")
    given = [{"model": models[letter]} for letter in "abc"[:count]]
    numbers = {key: value for key, value in NUMBERS.items() if key in {**rule.shared, **rule.each}}
    content = {"merge_method": name, "models": given, "parameters": numbers, "dtype": "float32"}
    if rule.base != "ignored":
        content["base_model"] = given[-1]["model"]
    make(content, tmp_path / "ours")
    assert_equal(tiny.stored(tmp_path / "ours"), merge(content, tmp_path / "theirs"), 2e-6)


def as_transformers_has_them(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names that mergekit writes: the experts of a layer as one."""
    made: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in stored.items():
        prefix, _, rest = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        if rest:
            number, kind, _ = rest.split(".")
            experts.setdefault(prefix, {}).setdefault(int(number), {})[kind] = tensor
        else:
            made[prefix] = tensor
    for prefix, numbered in experts.items():
        gate, up, down = ("w1", "w3", "w2") if "w1" in numbered[0] else ("gate_proj", "up_proj", "down_proj")
        each = [numbered[i] for i in range(len(numbered))]
        made[f"{prefix}.experts.gate_up_proj"] = torch.stack([torch.cat([one[gate], one[up]]) for one in each])
        made[f"{prefix}.experts.down_proj"] = torch.stack([one[down] for one in each])
    return made


@pytest.mark.slow  # a second each
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", [name for name in RULES if name not in RANDOM])
def test_fused_experts_give_what_mergekit_gives(tmp_path, models, kind, name):
    """A gradient and a filter on the fused name too; without the option the rules that look at whole tensors differ."""
    rule = RULES[name]
    given = [{"model": models[letter]} for letter in KINDS[kind][: (rule.most or 2) + (rule.base != "ignored")]]
    numbers = {key: value for key, value in NUMBERS.items() if key in {**rule.shared, **rule.each}}
    if "weight" in rule.each:
        numbers["weight"] = [{"filter": "mlp.experts.gate_up", "value": [0.3, 0.9]}, {"value": 0.5}]
    content = {"merge_method": name, "models": given, "parameters": numbers, "dtype": "float32"}
    if rule.base != "ignored":
        content["base_model"] = given[-1]["model"]
    make({**content, "expert_granularity": "fused"}, tmp_path / "ours")
    ours = tiny.stored(tmp_path / "ours")
    assert ours.keys() == tiny.stored(Path(given[0]["model"])).keys()
    theirs = merge(content, tmp_path / "theirs")
    assert_equal(as_transformers_has_them(ours), theirs, 2e-6)
    if name in ("ties", "slerp", "model_stock"):
        plain = {key: value for key, value in NUMBERS.items() if key in numbers}
        make({**content, "parameters": plain}, tmp_path / "x")
        apart = as_transformers_has_them(tiny.stored(tmp_path / "x"))
        assert any(not torch.allclose(apart[name], theirs[name], atol=1e-4) for name in theirs if "experts" in name)


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_random_masks_of_fused_experts(tmp_path, models, name):
    """One mask of the whole tensor, in one pass or block by block: the bytes do not depend on memory."""
    given = [{"model": models[letter]} for letter in "mno"]
    numbers = {"weight": 1, "density": 0.5, **({"epsilon": 0.1} if "della" in name else {})}
    content = {"merge_method": name, "models": given, "base_model": models["o"], "parameters": numbers}
    content["expert_granularity"] = "fused"
    make(content, tmp_path / "a")
    make(content, tmp_path / "b", memory=1 << 20, threads=1)
    a, b = (tiny.stored(tmp_path / folder) for folder in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    tensor = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    base = tiny.stored(Path(models["o"]))
    kept = [(a[tensor.format(i)] != base[tensor.format(i)]) for i in (0, 1)]
    assert not torch.equal(*kept)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("lacking", r"layers\.1\.block_sparse_moe\.experts\.3\.w1\.weight.*is missing in"),
        ("dtype", "not matrices of one shape and one floating dtype"),
    ],
)
def test_experts_that_cannot_be_fused(tmp_path, models, change, says):
    other = tmp_path / "other"
    shutil.copytree(models["n"], other)
    tensors = tiny.stored(other)
    odd = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    if change == "lacking":
        del tensors[odd]
    else:
        tensors[odd] = tensors[odd].bfloat16()
    save_file(tensors, next(other.glob("*.safetensors")), {"format": "pt"})
    given = [{"model": models["m"]}, {"model": str(other)}]
    content = {"merge_method": "linear", "models": given, "parameters": {"weight": 1}, "expert_granularity": "fused"}
    with pytest.raises(IncompatibleSources, match=says):
        plan(content)


@pytest.mark.parametrize(
    "rules", [rules for rules in [("linear", "linear"), ("slerp", "ties")] if {*rules} <= {*RULES}]
)
def test_a_file_of_several(tmp_path, models, rules):
    """The example `mega`: a merge that is merged further, in one pass here and in two there."""
    own = {"slerp": "parameters: {t: 0.3}", "linear": "parameters: {weight: 0.3, normalize: false}"}[rules[0]]
    first = f"""
        slices: [{{sources: [{{model: <a>, layer_range: [0, 4]}}, {{model: <b>, layer_range: [0, 4]}}]}}]
        merge_method: {rules[0]}
        base_model: <a>
        {own}
        dtype: float32
    """
    density = ", density: 0.33" if rules[1] == "ties" else ""
    last = f"""
        models:
          - {{model: half, parameters: {{weight: 1.0}}}}
          - {{model: <b>, parameters: {{weight: [{{filter: mlp, value: 0.5}}, {{value: 0.1}}]{density}}}}}
        merge_method: {rules[1]}
        base_model: <c>
        parameters: {{normalize: true, weight: 1}}
        dtype: float32
    """
    configurations = filled(first, models), filled(last, models)
    merge(configurations[0], tmp_path / "half")
    theirs = merge(filled(last.replace("half", str(tmp_path / "half")), models), tmp_path / "theirs")
    named = yaml.safe_dump_all([{**configurations[0], "name": "half"}, configurations[1]])
    document = parse_document(named)
    make(document.recipe.model_dump(), tmp_path / "ours")
    assert_equal(tiny.stored(tmp_path / "ours"), theirs, 2e-5)
    kept = list(yaml.safe_load_all((tmp_path / "ours" / "mergekit_config.yml").read_text()))
    assert kept == list(yaml.safe_load_all(named))


# ---- beyond mergekit ----------------------------------------------------------------------------------


def test_experts_keep_their_names(tmp_path, models):
    """mergekit fuses them, so float64 says what is right; the filter is the name of one expert."""
    content = filled(
        """
        merge_method: linear
        slices:
          - sources:
              - {model: <m>, layer_range: [0, 2], parameters: {weight: [0.2, 0.6]}}
              - {model: <n>, layer_range: [2, 4], parameters: {weight: [{filter: experts.1.w2, value: 3}, {value: 1}]}}
          - sources: [{model: <n>, layer_range: [1, 4]}, {model: <m>, layer_range: [0, 3]}]
            parameters: {weight: 1}
        """,
        models,
    )
    make(content, tmp_path / "out")
    made, m, n = tiny.stored(tmp_path / "out"), *(tiny.stored(Path(models[x])) for x in "mn")
    layer = "model.layers.{}.block_sparse_moe.experts.1.w2.weight"
    expected = {
        0: (0.2 * m[layer.format(0)].double() + 3 * n[layer.format(2)].double()) / 3.2,
        1: (0.6 * m[layer.format(1)].double() + 3 * n[layer.format(3)].double()) / 3.6,
        2: (m[layer.format(0)].double() + n[layer.format(1)].double()) / 2,
        4: (m[layer.format(2)].double() + n[layer.format(3)].double()) / 2,
    }
    for i, values in expected.items():
        torch.testing.assert_close(made[layer.format(i)].double(), values, rtol=1e-6, atol=1e-7)
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    value = (0.6 * m[gate].double() + n["model.layers.3.block_sparse_moe.gate.weight"].double()) / 1.6
    torch.testing.assert_close(made[gate].double(), value, rtol=1e-6, atol=1e-7)
    embedding = "model.embed_tokens.weight"
    value = (0.2 * m[embedding].double() + n[embedding].double()) / 1.2  # of the first slice, at its beginning
    torch.testing.assert_close(made[embedding].double(), value, rtol=1e-6, atol=1e-7)
    head = (m["lm_head.weight"].double() + n["lm_head.weight"].double()) / 2  # of the last
    torch.testing.assert_close(made["lm_head.weight"].double(), head, rtol=1e-6, atol=1e-7)
    assert len([name for name in made if "experts" in name]) == 5 * 4 * 3
    tiny.load(tmp_path / "out")


def test_lists_of_the_config_go_with_their_layers(tmp_path):
    """Layers with and without a window of attention, from two models that have them in another order."""
    kinds = ["sliding_attention", "full_attention"]
    for name, own in (("x", kinds * 2), ("y", kinds[::-1] * 2)):
        tiny.save(tmp_path / name, "gemma3_text", seed=ord(name), layer_types=own)
    slices = [("x", 0, 2), ("y", 1, 3), ("x", 0, 1)]
    parts = [{"sources": [{"model": str(tmp_path / m), "layer_range": [a, b]}]} for m, a, b in slices]
    make({"merge_method": "passthrough", "slices": parts}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == [kinds[0], kinds[1], kinds[0], kinds[1], kinds[0]]
    assert config["num_hidden_layers"] == 5
    made, y = tiny.stored(tmp_path / "out"), tiny.stored(tmp_path / "y")
    assert torch.equal(made["model.layers.3.mlp.up_proj.weight"], y["model.layers.2.mlp.up_proj.weight"])
    tiny.load(tmp_path / "out")


def test_modules_of_a_vision_model(tmp_path):
    """Text from slices of one, vision from a merge of two, the projector from the other."""
    x, y = (save_vision(tmp_path / name, seed) for seed, name in enumerate("xy"))
    model = {name: {"model": str(tmp_path / name)} for name in "xy"}
    slices = [
        {"sources": [{**model["x"], "layer_range": [0, 2]}, {**model["y"], "layer_range": [0, 2]}]},
        {"sources": [{**model["y"], "layer_range": [1, 2]}, {**model["x"], "layer_range": [1, 2]}]},
    ]
    both = [{**model["x"], "parameters": {"weight": 0}}, {**model["y"], "parameters": {"weight": [1, 2]}}]
    modules = {
        "text_decoder": {"slices": slices, "parameters": {"weight": 1}},
        "vision_tower": {"models": both},
        "multi_modal_projector": {"models": both},
    }
    content = {"merge_method": "linear", "modules": modules}
    make(content, tmp_path / "out")
    made = tiny.stored(tmp_path / "out")
    text = [name for name in x if ".layers.1." in name]
    assert text
    for name in text:
        torch.testing.assert_close(made[name.replace("layers.1", "layers.2")], (x[name] + y[name]) / 2)
    vision = [name for name in x if "visual" in name]
    assert vision
    for name in vision:
        torch.testing.assert_close(made[name], y[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["num_hidden_layers"] == 3
    del modules["vision_tower"]
    with pytest.raises(RecipeError, match="vision_tower"):
        plan(content)
    with pytest.raises(RecipeError, match="several modules"):
        plan({"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}})


def save_vision(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """A tiny qwen2.5-VL; returns its tensors."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {**tiny.SIZES, "num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]})
        )
        model.save_pretrained(folder)
    return tiny.stored(folder)


def test_modules_of_an_encoder_and_decoder(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    for seed, name in enumerate("xy"):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
            T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / name)
    x, y = (tiny.stored(tmp_path / name) for name in "xy")
    two = [{"model": str(tmp_path / name), "parameters": {"weight": weight}} for name, weight in (("x", 1), ("y", 3))]
    layers = {"sources": [{"model": str(tmp_path / "y"), "layer_range": [0, 2]}]}
    modules = {"encoder": {"slices": [layers]}, "decoder": {"models": two}, "shared": {"models": two}}
    content = {"merge_method": "linear", "modules": modules, "parameters": {"weight": 1}}
    make(content, tmp_path / "out")
    made = tiny.stored(tmp_path / "out")
    assert made.keys() == x.keys()
    for name, tensor in made.items():
        expected = y[name] if name.startswith("encoder.") else (x[name] + 3 * y[name]) / 4
        torch.testing.assert_close(tensor, expected, msg=name)
    layers["sources"][0]["layer_range"] = [1, 2]
    with pytest.raises(UnsupportedModel, match="merged, not moved"):
        plan(content)


@pytest.mark.parametrize("rule", ["linear", "dare_ties"])
def test_heads_that_are_stored_and_tied(tmp_path, rule):
    """Settings by name, and random masks, would give another head than the embedding, which the config says it is."""
    given = []
    for name in "xy":
        tensors = tiny.stored(tiny.save(tmp_path / name, "llama", seed=ord(name), tie_word_embeddings=True))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        given.append({"model": str(tmp_path / name), "parameters": {"weight": {"filter": "embed", "value": 0.7}}})
    given[1]["parameters"] = {"weight": [{"filter": "lm_head", "value": 2}, {"value": 1}]}
    content = {"merge_method": rule, "models": given, "parameters": {"weight": 1}}
    if rule == "dare_ties":
        base = {"density": 0.5, "weight": 1}
        content |= {"base_model": given[0]["model"], "parameters": base}
    outcome = make(content, tmp_path / "out")
    assert all(check.passed for check in outcome.checks)
    made = tiny.stored(tmp_path / "out")
    assert made.keys() == tensors.keys()
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])
    tiny.load(tmp_path / "out")


def test_heads_that_are_tied_and_differ(tmp_path):
    """transformers takes such tensors for what they are, so each is merged with its like."""
    given = []
    for name in "xy":
        tensors = tiny.stored(tiny.save(tmp_path / name, "llama", seed=ord(name), tie_word_embeddings=True))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        given.append({"model": str(tmp_path / name), "parameters": {"weight": {"filter": "embed", "value": 0.7}}})
    make({"merge_method": "linear", "models": given, "parameters": {"weight": [{"value": 1}]}}, tmp_path / "out")
    made = tiny.stored(tmp_path / "out")
    torch.testing.assert_close(made["lm_head.weight"], made["model.embed_tokens.weight"] + 1)


def test_a_tied_and_an_untied_model(tmp_path):
    """The result has a head of its own whichever comes first; mergekit's config would depend on chance."""
    for name, tied in (("x", True), ("y", False)):
        tiny.save(tmp_path / name, "llama", seed=ord(name), tie_word_embeddings=tied)
    x, y = (tiny.stored(tmp_path / name) for name in "xy")
    for order in ("xy", "yx"):
        given = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in order]
        make({"merge_method": "linear", "models": given}, tmp_path / order)
        made = tiny.stored(tmp_path / order)
        expected = (x["model.embed_tokens.weight"].double() + y["lm_head.weight"].double()) / 2
        torch.testing.assert_close(made["lm_head.weight"].double(), expected, rtol=1e-6, atol=1e-7)
        assert not json.loads((tmp_path / order / "config.json").read_text())["tie_word_embeddings"]
        tiny.load(tmp_path / order)


def test_inputs_are_not_rounded_before_they_are_merged(tmp_path, models):
    content = filled("{merge_method: linear, models: [{model: <a>}, {model: <b>}], dtype: bfloat16}", models)
    make({**content, "parameters": {"weight": 1}}, tmp_path / "out")
    made, a, b = tiny.stored(tmp_path / "out"), *(tiny.stored(Path(models[x])) for x in "ab")
    for name, tensor in made.items():
        exact = (a[name].double() + b[name].double()) / 2
        ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
        assert bool(((tensor.double() - exact).abs() <= ulp / 2).all()), name


def test_the_first_model_or_the_base_gives_config_and_tokenizer(tmp_path):
    for name in "xy":
        tiny.save(tmp_path / name, "llama", seed=ord(name), vocab_size=256, rope_theta=10000.0 + ord(name))
        tiny.byte_tokenizer(tmp_path / name)
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": ord(name)}))
    given = [{"model": str(tmp_path / name)} for name in "yx"]
    content = {"merge_method": "linear", "models": given, "parameters": {"weight": 1}}
    for name, base in (("y", {}), ("x", {"base_model": str(tmp_path / "x")})):
        made = plan({**content, **base}).checkpoint
        said = json.loads((tmp_path / name / "config.json").read_text())
        assert made.config["rope_parameters"] == said["rope_parameters"]
        assert made.side_files["generation_config.json"].parent.name == name
        assert any("rope" in warning for warning in made.warnings)


TEMPLATES = {"x": "{% for m in messages %}x {{ m.content }} {% endfor %}", "y": "{% for m in messages %}y{% endfor %}"}


def test_a_chat_template(tmp_path):
    """`auto` is the one that most have; what transformers reads in the result is what was asked for."""
    from transformers import AutoTokenizer

    for name in "xyz":
        tiny.save(tmp_path / name, "llama", vocab_size=256)
        tiny.byte_tokenizer(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.chat_template = TEMPLATES["x" if name == "x" else "y"]
        tokenizer.save_pretrained(tmp_path / name)
    told = json.loads((tmp_path / "z" / "tokenizer_config.json").read_text())  # as before transformers 4.50
    (tmp_path / "z" / "chat_template.jinja").unlink()
    (tmp_path / "z" / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": TEMPLATES["y"]}))
    given = [{"model": str(tmp_path / name)} for name in "xyz"]
    content = {"merge_method": "linear", "models": given, "parameters": {"weight": 1}}
    own = "{% for m in messages %}<{{ m.role }}>{% endfor %}"
    for i, (asked, expected) in enumerate([("auto", TEMPLATES["y"]), (own, own), (None, TEMPLATES["x"])]):
        make({**content, **({"chat_template": asked} if asked else {})}, tmp_path / str(i))
        assert AutoTokenizer.from_pretrained(tmp_path / str(i)).chat_template == expected
    with pytest.raises(RecipeError, match="neither a template nor the name of one"):
        plan({**content, "chat_template": "chatmal"})


def test_recipes_and_configurations_nest(tmp_path, models):
    """A recipe under a name in a configuration, and a configuration as a source of a recipe."""
    inner = {"method": "average", "checkpoints": [models["a"], models["b"]]}
    content = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "mean", "layer_range": [1, 4]}]}],
        "merges": {"mean": inner},
    }
    make({"method": "average", "checkpoints": [content, content]}, tmp_path / "out")
    made, a, b = tiny.stored(tmp_path / "out"), *(tiny.stored(Path(models[x])) for x in "ab")
    name = "model.layers.{}.mlp.up_proj.weight"
    expected = (a[name.format(3)].double() + b[name.format(3)].double()) / 2
    torch.testing.assert_close(made[name.format(2)].double(), expected, rtol=1e-6, atol=1e-7)


def test_a_result_tells_its_configuration(tmp_path, models):
    content = filled(CONFIGURATIONS["slices that move"], models)
    make(content, tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text()) == content
    recipe = json.loads((tmp_path / "out" / "merger.json").read_text())["recipe"]
    assert recipe["config"] == content
    assert plan({key: value for key, value in recipe.items() if key != "output"}).size


def weights_in(content: dict[str, Any]) -> list[float]:
    return [part.weight for part in plan(content).checkpoint.parts]


def test_the_weights_that_a_result_tells(models):
    """Mean factors: of sums the models' weights, of stacks their shares of the elements, of others what was said."""
    given = [{"model": models[m], "parameters": {"weight": w}} for m, w in (("a", [0, 2]), ("b", 1), ("c", 0))]
    norms = {"filter": "norm", "value": False}
    content = {"merge_method": "linear", "models": given, "parameters": {"normalize": [norms, {"value": True}]}}
    a, b, c = weights_in(content)
    tensors = tiny.stored(Path(models["a"]))
    first = second = 0.0
    for name, tensor in tensors.items():
        weight = 2 * int(name.split(".")[2]) / 3 if ".layers." in name else 0
        total = 1 if "norm" in name else 1 + weight
        first, second = first + weight / total * tensor.numel(), second + tensor.numel() / total
    size = sum(tensor.numel() for tensor in tensors.values())
    assert (a, b, c) == pytest.approx((first / size, second / size, 0))
    assert weights_in({"method": "average", "checkpoints": [models["c"]]}) == [1]
    pair = [{"model": models[m]} for m in "ab"]
    slerp = {"merge_method": "slerp", "models": pair, "base_model": models["a"], "parameters": {"t": 0.25}}
    assert weights_in(slerp) == pytest.approx([0.75, 0.25])
    given[1]["parameters"] = {"weight": 0.5}
    ties = {"merge_method": "ties", "models": given[1:], "base_model": models["a"], "parameters": {"density": 0.5}}
    assert sorted(weights_in(ties)) == pytest.approx([0, 0.5, 1]), "as they were said, and the base whole"
    stock = {"merge_method": "model_stock", "models": [{"model": models[m]} for m in "abc"], "base_model": models["c"]}
    assert weights_in(stock) == [1, 1, 1]
    parts = [{"sources": [{"model": models[m], "layer_range": [0, n]}]} for m, n in (("a", 3), ("b", 1))]
    layer = sum(tensor.numel() for name, tensor in tensors.items() if ".layers.0." in name)
    after = tensors["model.norm.weight"].numel() + tensors["lm_head.weight"].numel()
    share = (layer + after) / size
    assert weights_in({"merge_method": "passthrough", "slices": parts}) == pytest.approx([1 - share, share])


def test_moments_are_not_those_of_other_layers(tmp_path, models):
    """Of a model as it lies there they are carried, of one that was made of its layers they are not."""
    from safetensors.torch import save_file

    source = tmp_path / "source"
    shutil.copytree(models["a"], source)
    moments = {
        f"{kind}.{name}": t.clone() for name, t in tiny.stored(source).items() for kind in ("exp_avg", "exp_avg_sq")
    }
    save_file(moments, source / "optimizer.safetensors")
    expand = {"method": "expand", "groups": 2, "optimizer": "carry"}
    assert plan({**expand, "source": str(source)}).checkpoint.optimizer
    parts = [{"sources": [{"model": str(source), "layer_range": [i, i + 1]}]} for i in (1, 0, 2, 3)]
    with pytest.raises(SourceError, match="no AdamW moments"):
        plan({**expand, "source": {"merge_method": "passthrough", "slices": parts}})


# ---- what is refused, and what is said ----------------------------------------------------------------


def without(folder: str, place: Path, *names: str) -> str:
    """A copy of a model that lacks tensors."""
    from safetensors.torch import save_file

    place.mkdir()
    tensors = {name: tensor for name, tensor in tiny.stored(Path(folder)).items() if name not in names}
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text((Path(folder) / "config.json").read_text())
    return str(place)


def test_a_tensor_that_some_lack(tmp_path, models):
    name = "model.layers.1.mlp.up_proj.weight"
    lacking = without(models["b"], tmp_path / "lacking", name)
    given = [{"model": m, "parameters": {"weight": w}} for m, w in ((models["a"], 1), (lacking, 2), (models["c"], 3))]
    made = make({"merge_method": "linear", "models": given}, tmp_path / "out")
    a, c = (tiny.stored(Path(models[x]))[name].double() for x in "ac")
    torch.testing.assert_close(tiny.stored(tmp_path / "out")[name].double(), (a + 3 * c) / 4, rtol=1e-6, atol=1e-7)
    assert any(name in warning and "lacking" in warning for warning in made.warnings)
    slices = [{"sources": [{"model": lacking, "layer_range": [0, 4]}]}]
    assert name not in plan({"merge_method": "passthrough", "slices": slices}).checkpoint.tensors


AB = "models: [{model: a}, {model: b}]\nparameters: {weight: 1}\noutput: {path: out}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("merge_method: linear\nmodels: []\n", ["models: ", "at least 1 item"]),
        ("merge_method: linear\n", ["exactly one of models, slices and modules"]),
        (f"merge_method: linear\ndtype: float8\n{AB}", ["dtype: ", "'bfloat16'"]),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b, parameter: {weight: 1}}]\n",
            ["models[1].parameter: is not a field", "did you mean 'parameters'"],
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_rang: [0, 1]}]}]\n",
            ["slices[0].sources[0].layer_rang: is not a field", "did you mean 'layer_range'"],
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1, 2]}]}]\n",
            ["slices[0].sources[0].layer_range: "],
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: {filtr: x, value: 1}}\n",
            ["parameters.weight.filtr: is not a field", "did you mean 'filter'"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [[1, 2]]}\n",
            ["parameters.weight", "must be a number, a truth or a text"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight:}\n",
            ["parameters.weight", "must be a number, a truth or a text"],
        ),
        (f"merge_method: linear\nmerge_method: ties\n{AB}", ["the key 'merge_method' stands twice"]),
        (f"merge_method: passthrough\n{AB}", ["parameters.weight: is no parameter of passthrough"]),
    ],
)
def test_configurations_that_are_not_well_formed(text, says):
    with pytest.raises(RecipeError) as caught:
        plan_of(parse_document(text), Options())
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("models: [{model: <a>}, {model: <d>}]", IncompatibleSources, "model_type is llama"),
        ("models: [{model: <a>}], base_model: <b>", RecipeError, "weight: is missing for"),
        (
            "slices: [{sources: [{model: <a>, layer_range: [0, 5]}, {model: <b>, layer_range: [0, 5]}]}]",
            RecipeError,
            "slices[0].sources[0].layer_range: [0, 5] exceeds the 4 layers",
        ),
        (
            "slices: [{sources: [{model: <a>, layer_range: [0, 3]}, {model: <b>, layer_range: [0, 4]}]}]",
            RecipeError,
            "slices[0].sources[1].layer_range: [0, 4] has 4 layers, and sources[0] has 3",
        ),
        ("modules: {vision: {models: [{model: <a>}]}}", RecipeError, "modules.vision: is no module"),
        ("models: [{model: <a>}], tokenizer_source: union", UnsupportedModel, "has no tokenizer"),
        ("models: [{model: <a>}], tokenizer_source: <b>", UnsupportedModel, "has no tokenizer"),
        ("models: [{model: <a>+<b>}]", UnsupportedModel, "is a model, not an adapter"),
        ("models: [{model: <a>@main}]", RecipeError, "has no revision"),
        (
            "models: [{model: <a>, parameters: {weight: 1}}, {model: <b>, parameters: {weight: -1}}]",
            RecipeError,
            "the weights sum to 0",
        ),
    ],
)
def test_what_is_refused(models, text, error, says):
    with pytest.raises(error) as caught:
        plan(filled(f"{{merge_method: linear, {text}}}", models))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (
            "merge_method: ties\nmodels: [{model: <b>, parameters: {densty: 1}}]\nbase_model: <a>",
            "is no parameter of ties",
        ),
        ("merge_method: slerp\nmodels: [{model: <b>}]\nbase_model: <a>", "merges.half.parameters.t: is missing for"),
        ("merge_method: slerp\nmodels: [{model: <b>}, {model: <c>}]\nbase_model: <a>", "slerp merges exactly 1"),
        ("method: ties\nbase: <a>\nmodels: [<b>]\nextra: 1", "extra: is not a field"),
    ],
)
def test_what_is_wrong_in_a_recipe_within_is_told_with_its_path(models, inner, says):
    """When it is read, or when its models have been looked at."""
    merge = filled(inner, models)
    content = {
        "merge_method": "linear",
        "models": [{"model": "half"}],
        "parameters": {"weight": 1},
        "merges": {"half": merge},
    }
    within = {"method": "average", "checkpoints": [models["a"], content]}
    for recipe, path in ((content, "merges.half."), (within, "checkpoints[1].merges.half.")):
        with pytest.raises(RecipeError) as caught:
            plan(recipe)
        assert says in str(caught.value)
        assert caught.value.where.startswith(path)


def test_models_with_different_numbers_of_layers(tmp_path, models):
    deeper = str(tiny.save(tmp_path / "deeper", "llama", num_hidden_layers=5))
    given = [{"model": model, "parameters": {"weight": 1}} for model in (models["a"], deeper)]
    with pytest.raises(IncompatibleSources, match=r"has 4 layers .* and .* 5"):
        plan({"merge_method": "linear", "models": given})


def test_vocabularies_that_differ(tmp_path, models):
    other = str(tiny.save(tmp_path / "other", "llama", vocab_size=100))
    given = [{"model": model, "parameters": {"weight": 1}} for model in (models["a"], other)]
    with pytest.raises(IncompatibleSources, match="their vocabularies have different sizes"):
        plan({"merge_method": "linear", "models": given})


def test_layers_whose_places_count(tmp_path):
    """Merged where they are they do what they did; moved they would not."""
    folder = tiny.save(tmp_path / "x", "gpt2", scale_attn_by_inverse_layer_idx=True)
    source = {"model": str(folder), "layer_range": [0, 4]}
    assert plan({"merge_method": "passthrough", "slices": [{"sources": [source]}]})
    with pytest.raises(UnsupportedModel, match="attention is scaled by the layer's number"):
        plan({"merge_method": "passthrough", "slices": [{"sources": [{**source, "layer_range": [1, 4]}]}]})
