"""Quantized checkpoints: which become weights, and with which words the others are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merger.checkpoint import open_checkpoint
from merger.difference import measure, pairs_of
from merger.errors import UnsupportedModel
from merger.quantized import dequantized
from merger.recipe import make_document, resolve
from merger.values import values
from tests import tiny
from tests.checkpoints import as_float64
from tests.methods.making import make

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}


def compressed(strategy, kind="float", bits=8, layout="float-quantized", **more):
    """A config as llm-compressor leaves it."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def quantize(tensor, block):
    """A matrix in F8_E4M3 with the largest scale-down of each block, edges cut off; and the scales."""
    height, width = tensor.shape
    rows, columns = block
    codes = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-height // rows), -(-width // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = tensor[part].abs().max() / 448
            codes[part] = (tensor[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def exact(codes, scales, block):
    """The products in float64."""
    spread = scales.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (codes.double() * spread[: codes.shape[0], : codes.shape[1]]).numpy()


def write(folder, tensors, quantization=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    said = {"quantization_config": quantization} if quantization is not None else {}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **said, **config}))
    return folder


def values_of(checkpoint):
    return {
        name: as_float64(content.tobytes(), made.dtype).reshape(made.shape)
        for name, made, content in values(checkpoint)
    }


NAME = "model.layers.0.mlp.up_proj.weight"
MATRIX = torch.from_numpy(np.random.default_rng(0).normal(0, 0.05, (200, 300)))

# ---- what becomes weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "block", "suffix", "shape"),
    [
        (BLOCKS, (128, 128), "_scale_inv", (2, 3)),
        ({**BLOCKS, "weight_block_size": [64, 32]}, (64, 32), "_scale_inv", (4, 10)),
        (PER_TENSOR, (200, 300), "_scale", ()),
        (PER_TENSOR, (200, 300), "_scale_inv", (1,)),
        ({"quant_method": "fbgemm_fp8"}, (1, 300), "_scale", (200, 1)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, (200, 300), "_scale", ()),
        (compressed("tensor"), (200, 300), "_scale", (1,)),
        (compressed("channel"), (1, 300), "_scale", (200, 1)),
        (compressed("channel"), (1, 300), "_scale", (200,)),
        (compressed("block", block_structure=[128, 128]), (128, 128), "_scale", (2, 3)),
        (None, (200, 300), "_scale", (1,)),
        (None, (1, 300), "_scale", (200, 1)),
    ],
)
def test_weights_are_codes_times_scales(tmp_path, quantization, block, suffix, shape):
    codes, scales = quantize(MATRIX, block)
    plain = torch.ones(3, dtype=torch.bfloat16)
    tensors = {NAME: codes, f"{NAME}{suffix}": scales.reshape(shape), "model.norm.weight": plain}
    made = dequantized(open_checkpoint(write(tmp_path / "m", tensors, quantization)))
    assert made.config == {"model_type": "llama", "dtype": "bfloat16"}
    assert {name: tensor.dtype for name, tensor in made.tensors.items()} == {NAME: "BF16", "model.norm.weight": "BF16"}
    wanted = exact(codes, scales, block)
    found = values_of(made)[NAME]
    assert (np.abs(found - wanted) <= np.abs(wanted) * (2.0**-8 + 2.0**-23)).all()
    assert (found == torch.from_numpy(wanted).float().bfloat16().double().numpy()).all()
    assert any("1 tensors" in note and "dequantized to bfloat16" in note for note in made.notes)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_may_be_narrow(tmp_path, kind):
    codes, scales = quantize(MATRIX, (128, 128))
    scales = torch.exp2(scales.log2().ceil()).to(kind)  # powers of two are the same in every type
    made = dequantized(open_checkpoint(write(tmp_path, {NAME: codes, f"{NAME}_scale_inv": scales}, BLOCKS)))
    assert (values_of(made)[NAME] == exact(codes, scales.float(), (128, 128))).all()


def test_fused_experts_have_scales_of_their_own(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    pairs = [quantize(MATRIX * (i + 1), (128, 128)) for i in range(3)]
    codes = torch.stack([c.view(torch.uint8) for c, _ in pairs]).view(torch.float8_e4m3fn)
    tensors = {name: codes, f"{name}_scale_inv": torch.stack([s for _, s in pairs])}
    made = dequantized(open_checkpoint(write(tmp_path / "m", tensors, BLOCKS)))
    found = values_of(made)[name]
    for i, pair in enumerate(pairs):
        wanted = exact(*pair, (128, 128))
        assert (np.abs(found[i] - wanted) <= np.abs(wanted) * (2.0**-8 + 2.0**-23)).all()


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", "F32"), ("float16", "F16"), (None, "BF16")])
def test_weights_get_the_dtype_of_the_model(tmp_path, dtype, wanted):
    codes, scales = quantize(MATRIX, (128, 128))
    tensors = {NAME: codes, f"{NAME}_scale_inv": scales}
    made = dequantized(open_checkpoint(write(tmp_path / "m", tensors, BLOCKS, dtype=dtype)))
    assert made.tensors[NAME].dtype == wanted
    assert made.config["dtype"] == (dtype or "bfloat16")


def test_scales_of_activations_are_left_out_with_a_note(tmp_path):
    codes, scales = quantize(MATRIX, (200, 300))
    extra = {"model.layers.0.mlp.up_proj.input_scale", "model.layers.0.self_attn.k_proj.k_scale"}
    extra |= {"model.layers.0.self_attn.k_scale", "model.layers.0.mlp.up_proj.activation_scale"}
    tensors = {NAME: codes, f"{NAME}_scale": scales, **{name: torch.ones(1) for name in extra}}
    # A parameter of the model is none of them.
    tensors["model.layer_scale"] = torch.ones(2)
    made = dequantized(open_checkpoint(write(tmp_path / "m", tensors, PER_TENSOR)))
    assert set(made.tensors) == {NAME, "model.layer_scale"}
    assert any("4 scales of activations" in note for note in made.notes)


def test_the_config_of_a_language_model_within_another_counts(tmp_path):
    codes, scales = quantize(MATRIX, (128, 128))
    inner = {"text_config": {"model_type": "deepseek_v3", "dtype": "bfloat16", "quantization_config": BLOCKS}}
    folder = write(tmp_path / "m", {NAME: codes, f"{NAME}_scale_inv": scales}, **inner, dtype=None)
    (folder / "hf_quant_config.json").write_text("{}")
    made = dequantized(open_checkpoint(folder))
    assert made.config["text_config"] == {"model_type": "deepseek_v3", "dtype": "bfloat16"}
    assert "hf_quant_config.json" not in made.side_files


def test_what_is_not_quantized_is_itself(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m", {"w": torch.ones(2)}))
    assert dequantized(checkpoint) is checkpoint


# ---- what is refused ----------------------------------------------------------------------------------


AVERAGE = {"method": "average"}


def refused(folder, *says):
    for attempt in (
        lambda: dequantized(open_checkpoint(folder)),
        lambda: resolve(make_document({**AVERAGE, "checkpoints": [str(folder), str(folder)]})),
        lambda: resolve(make_document({**AVERAGE, "checkpoints": [str(folder)], "output": {"dtype": "float16"}})),
    ):
        with pytest.raises(UnsupportedModel) as caught:
            attempt()
        for words in says:
            assert words in str(caught.value)


OTHERS = [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "mxfp4"},
    {"quant_method": "gguf"},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
    {"quant_method": "compressed-tensors", "format": "mixed-precision"},
    {"quant_method": "torchao"},
    compressed("group", bits=4, layout="nvfp4-pack-quantized"),
    compressed("channel", kind="int", layout="int-quantized"),
    compressed("channel", kind="int", bits=4, layout="pack-quantized"),
    compressed("tensor_group", bits=4),
    compressed("channel", symmetric=False),
    {"quant_method": "fp8", "weight_block_size": "128"},
    {"quant_method": "fp8", "weight_block_size": [0, 128]},
    {"bits": 4},
]


@pytest.mark.parametrize("quantization", OTHERS, ids=lambda q: f"{q.get('quant_method')}-{q.get('format', '')}")
def test_other_quantizations_are_refused_by_their_name(tmp_path, quantization):
    folder = write(tmp_path / "m", {NAME: torch.zeros(4, 4, dtype=torch.int32)}, quantization)
    refused(folder, f"quant_method: {quantization.get('quant_method', 'not stated')}", str(folder), "Dequantize it")


@pytest.mark.parametrize("quantization", [BLOCKS, PER_TENSOR, None])
def test_missing_scales_are_refused_with_the_tensor(tmp_path, quantization):
    codes, _ = quantize(MATRIX, (128, 128))
    refused(write(tmp_path / "m", {NAME: codes}, quantization), f"tensor '{NAME}'", f"{NAME}_scale is missing")


@pytest.mark.parametrize(
    ("quantization", "shape", "says"),
    [
        (BLOCKS, (2, 2), "one scale for each 128 x 128 elements"),
        (BLOCKS, (1,), "one scale for each 128 x 128 elements"),
        (PER_TENSOR, (2, 3), "one scale or one scale a row"),
        (compressed("tensor"), (200, 1), "which is not one scale"),
        (compressed("channel"), (1,), "one scale a row"),
        (None, (2, 3), "one scale or one scale a row"),
    ],
)
def test_scales_of_a_wrong_shape_are_refused_with_the_tensor(tmp_path, quantization, shape, says):
    codes, _ = quantize(MATRIX, (128, 128))
    folder = write(tmp_path / "m", {NAME: codes, f"{NAME}_scale": torch.ones(shape)}, quantization)
    refused(folder, f"tensor '{NAME}'", "[200, 300]", str(list(shape)), says)


def test_two_sets_of_scales_are_refused(tmp_path):
    codes, scales = quantize(MATRIX, (128, 128))
    tensors = {NAME: codes, f"{NAME}_scale": scales, f"{NAME}_scale_inv": scales + 1}
    refused(write(tmp_path / "m", tensors, BLOCKS), f"tensor '{NAME}'", "are both there")


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16])
def test_scales_of_other_weights_are_refused(tmp_path, kind):
    """Four-bit floats come as I8 beside eight-bit ones."""
    codes, scales = quantize(MATRIX, (128, 128))
    odd = "model.layers.0.mlp.experts.0.up_proj.weight"
    tensors = {NAME: codes, f"{NAME}_scale_inv": scales, odd: torch.zeros(4, 4, dtype=kind)}
    tensors[f"{odd}_scale_inv"] = torch.ones(1, 1)
    refused(write(tmp_path / "m", tensors, BLOCKS), f"tensor '{odd}_scale_inv'", "eight-bit floats")


def test_a_config_that_promises_what_is_not_there_is_refused(tmp_path):
    refused(write(tmp_path / "m", {NAME: MATRIX.bfloat16()}, BLOCKS), "quant_method: fp8", "holds no eight-bit floats")


# ---- whole runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """Two tiny Llamas in blocks of 128 by 128, as transformers' FineGrainedFP8 stores them, and what they hold."""

    def save(seed):
        sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}  # transformers wants whole blocks
        folder = tiny.save(tmp_path_factory.mktemp("fp8"), "llama", "bfloat16", seed, **sizes)
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensors[name].float(), (128, 128))
        config = json.loads((folder / "config.json").read_text())
        return write(folder, tensors, {**BLOCKS, "modules_to_not_convert": ["lm_head"]}, **config)

    return save(0), save(1)


def of_transformers(folder):
    """What transformers makes of a folder without a device for eight-bit floats, in the model's names."""
    from transformers import AutoModelForCausalLM

    made, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return {name: tensor.detach() for name, tensor in made.state_dict().items()}


def test_weights_are_those_that_transformers_loads(fp8, tmp_path):
    made = make({"method": "average", "checkpoints": [str(fp8[0])], "output": {"dtype": "bfloat16"}}, tmp_path / "o")
    found, wanted = load_file(made.output / "model.safetensors"), of_transformers(fp8[0])
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    assert of_transformers(made.output).keys() == wanted.keys()


def test_averages_are_those_of_the_weights(fp8, tmp_path):
    recipe = {"method": "average", "checkpoints": [str(folder) for folder in fp8], "weights": [0.25, 0.75]}
    made = make(recipe, tmp_path / "o")
    assert "quantization_config" not in json.loads((made.output / "config.json").read_text())
    a, b = (of_transformers(folder) for folder in fp8)
    for name, tensor in load_file(made.output / "model.safetensors").items():
        wanted = (0.25 * a[name].double() + 0.75 * b[name].double()).to(torch.bfloat16)  # one rounding, of float64
        assert torch.equal(tensor, wanted), name


def test_bytes_do_not_depend_on_threads_and_memory(fp8, tmp_path):
    recipe = {"method": "average", "checkpoints": [str(folder) for folder in fp8]}
    first = make(recipe, tmp_path / "one", threads=1).output / "model.safetensors"
    other = make(recipe, tmp_path / "four", threads=4, memory=64 << 20).output / "model.safetensors"
    assert first.read_bytes() == other.read_bytes()


def test_one_model_that_is_only_copied_stays_quantized(fp8, tmp_path):
    made = make({"method": "average", "checkpoints": [str(fp8[0])]}, tmp_path / "o")
    stored, copied = (load_file(folder / "model.safetensors") for folder in (fp8[0], made.output))
    assert stored.keys() == copied.keys()
    assert copied["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert "quantization_config" in json.loads((made.output / "config.json").read_text())


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "upcycle", "experts": 4},
        {"method": "upcycle", "experts": 8, "granularity": 2},
        {"method": "expand", "groups": 2},
    ],
)
def test_surgery_begins_with_the_weights(fp8, tmp_path, recipe):
    plain = make({"method": "average", "checkpoints": [str(fp8[0])], "output": {"dtype": "bfloat16"}}, tmp_path / "p")
    first, second = (
        make({**recipe, "source": str(source)}, tmp_path / name).output / "model.safetensors"
        for name, source in (("a", fp8[0]), ("b", plain.output))
    )
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_nan_is_the_sources_own(fp8, tmp_path):
    tensors = load_file(fp8[0] / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[3, 5] = 0x7F
    config = json.loads((fp8[0] / "config.json").read_text())
    folder = write(tmp_path / "m", tensors, config.pop("quantization_config"), **config)
    recipe = {"method": "average", "checkpoints": [str(folder), str(fp8[1])]}
    made = make(recipe, tmp_path / "o")
    found = load_file(made.output / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert found.isnan().nonzero().tolist() == [[3, 5]]
    assert all(check.passed for check in made.checks)


@pytest.mark.parametrize("quantized", [0, 1])
def test_side_files_of_another_model_leave_the_quantization_as_it_is(fp8, tmp_path, quantized):
    """Of the result and of the giver, one is quantized."""
    plain = make({"method": "average", "checkpoints": [str(fp8[0])], "output": {"dtype": "bfloat16"}}, tmp_path / "p")
    source, giver = (fp8[1], plain.output) if quantized else (plain.output, fp8[1])
    output = {"side_files_from": str(giver)}
    made = make({"method": "average", "checkpoints": [str(source)], "output": output}, tmp_path / "o").output
    config = json.loads((made / "config.json").read_text())
    assert ("quantization_config" in config) == bool(quantized)
    assert of_transformers(made).keys() == of_transformers(giver).keys()


def test_distances_are_those_of_the_weights(fp8, tmp_path):
    plain = make({"method": "average", "checkpoints": [str(fp8[0])], "output": {"dtype": "bfloat16"}}, tmp_path / "o")
    models = [dequantized(open_checkpoint(folder)) for folder in (fp8[0], plain.output, fp8[1])]
    assert {found.relative for found in measure(pairs_of(models[0], models[1])).values()} == {0.0}
    a, b = (of_transformers(folder) for folder in fp8)
    for name, found in measure(pairs_of(models[0], models[2])).items():
        wanted = ((a[name].double() - b[name].double()).norm() / a[name].double().norm()).item()
        assert found.relative == pytest.approx(wanted, rel=1e-9)
