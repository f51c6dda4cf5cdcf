import json

import numpy as np
import pytest
from safetensors import safe_open

from merger.architecture import ties_embeddings
from merger.checkpoint import in_dtype, open_checkpoint, parents_of, step_of, with_license_files
from merger.errors import FormatError, PickledWeights, SourceError
from merger.expression import Stored, WeightedSum, combine
from merger.lineage import Card
from merger.methods.combination import weighted_sum
from tests.checkpoints import bfloat16, read_raw, write_model

TENSORS = {
    "model.embed_tokens.weight": bfloat16(np.arange(24.0).reshape(6, 4)),
    "model.layers.0.mlp.up_proj.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model.layers.0.mlp.gate.e_score_correction_bias": np.arange(4, dtype=np.float32),
    "model.layers.0.positions": np.arange(5),
    "model.layers.0.mask": np.array([True, False]),
    "model.norm.weight": np.ones(4, np.float16),
    "scale": np.array(0.5, np.float64),
    "empty": np.zeros((0, 4), np.float32),
}
CONFIG = {"model_type": "llama", "dtype": "float32"}


def bytes_of(tensor):
    return tensor.file.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


# ---- opening ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_the_tensors_are_those_that_the_safetensors_library_reads(tmp_path, shards):
    checkpoint = open_checkpoint(write_model(tmp_path / "model", TENSORS, CONFIG, shards))
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    wanted = {name: tensor for file in files for name, tensor in read_raw(file).items()}
    found = {name: (tensor.dtype, tensor.shape, bytes_of(tensor)) for name, tensor in checkpoint.tensors.items()}
    assert len(files) == shards
    assert found == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_of_transformers_is_opened(llama_run, dtype):
    folder = llama_run(dtype) / "step-200"
    checkpoint = open_checkpoint(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        wanted = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in checkpoint.tensors.items()} == {
            name: (it.get_dtype(), it.get_shape()) for name, it in wanted.items()
        }
    assert checkpoint.config == json.loads((folder / "config.json").read_text())
    assert checkpoint.config["dtype"] == dtype
    assert list(checkpoint.side_files) == ["generation_config.json"]


def test_a_checkpoint_is_made_of_itself(tmp_path):
    folder = write_model(tmp_path / "step-7", TENSORS, CONFIG, 2)
    (part,) = open_checkpoint(folder).parts
    assert part.weight == 1
    assert part.source.reference == str(folder)
    assert part.source.step == 7
    assert [file.path for file in part.source.files] == sorted(folder.glob("*.safetensors"))
    assert [file.size for file in part.source.files] == [file.path.stat().st_size for file in part.source.files]
    assert [file.mtime_ns for file in part.source.files] == [file.path.stat().st_mtime_ns for file in part.source.files]


def test_a_checkpoint_goes_by_what_the_recipe_called_it(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model", TENSORS), "hf://me/model")
    assert checkpoint.label == "hf://me/model"
    assert checkpoint.parts[0].source.reference == "hf://me/model"


def test_one_file_is_a_checkpoint_without_config(tmp_path):
    folder = write_model(tmp_path / "model", TENSORS, CONFIG, side_files={"tokenizer.json": "{}"})
    checkpoint = open_checkpoint((folder / "model.safetensors").rename(folder / "step-12.safetensors"))
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert checkpoint.config is None
    assert checkpoint.side_files == {}
    assert checkpoint.parts[0].source.step == 12


def test_training_state_is_noted(tmp_path):
    side_files = {"optimizer.pt": b"", "rng_state_0.pth": b"", "tokenizer.json": "{}"}
    checkpoint = open_checkpoint(write_model(tmp_path / "model", TENSORS, CONFIG, side_files=side_files))
    assert "training state is left alone: optimizer.pt, rng_state_0.pth in model" in checkpoint.notes
    assert list(checkpoint.side_files) == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("auto_map", "noted"),
    [
        ({"AutoModelForCausalLM": "modeling.Model"}, True),
        ({"AutoModelForCausalLM": "other/repository--modeling.Model"}, False),
        ({}, False),
        (None, False),
    ],
)
def test_code_that_is_needed_and_not_carried_is_noted(tmp_path, auto_map, noted):
    folder = write_model(tmp_path / "model", TENSORS, {**CONFIG, "auto_map": auto_map})
    assert any("auto_map" in note for note in open_checkpoint(folder).notes) == noted


def test_what_cannot_be_opened_says_so(tmp_path):
    with pytest.raises(SourceError):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PickledWeights):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


# ---- steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-1000", 1000),
        ("step-0", 0),
        ("checkpoint-0500", 500),
        ("llama-7b-step2000", 2000),
        ("global_step300", 300),
        ("step-1000.safetensors", 1000),
        ("final", None),
    ],
)
def test_the_step_is_the_last_number_of_the_name(tmp_path, name, step):
    assert step_of(tmp_path / name) == step


@pytest.mark.parametrize(
    ("state", "step"),
    [
        ('{"global_step": 4000}', 4000),
        ('{"global_step": null}', None),
        ('{"global_step": true}', None),
        ('{"global_step": "4000"}', None),
        ("{}", None),
        ("[]", None),
        ("not json", None),
        ("\x80", None),
    ],
)
def test_without_a_number_the_step_is_the_trainers(tmp_path, state, step):
    folder = tmp_path / "last"
    folder.mkdir()
    (folder / "trainer_state.json").write_bytes(state.encode("latin-1"))
    assert step_of(folder) == step


def test_the_name_counts_before_the_trainers_state(tmp_path):
    folder = write_model(tmp_path / "step-5", TENSORS, side_files={"trainer_state.json": '{"global_step": 6}'})
    assert step_of(folder) == 5


# ---- other dtypes -------------------------------------------------------------------------------------


def test_floating_tensors_take_another_dtype_and_others_stay(tmp_path):
    changed = in_dtype(open_checkpoint(write_model(tmp_path / "model", TENSORS, CONFIG)), "BF16")
    assert {name: tensor.dtype for name, tensor in changed.tensors.items()} == {
        "model.embed_tokens.weight": "BF16",
        "model.layers.0.mlp.up_proj.weight": "BF16",
        "model.layers.0.mlp.gate.e_score_correction_bias": "F32",
        "model.layers.0.positions": "I64",
        "model.layers.0.mask": "BOOL",
        "model.norm.weight": "BF16",
        "scale": "BF16",
        "empty": "BF16",
    }
    assert {name: tensor.shape for name, tensor in changed.tensors.items()} == {
        name: tensor[1] if isinstance(tensor, tuple) else tensor.shape for name, tensor in TENSORS.items()
    }


def test_tensors_that_have_the_dtype_already_are_copied(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model", TENSORS, CONFIG))
    changed = in_dtype(checkpoint, "F32")
    up_proj = "model.layers.0.mlp.up_proj.weight"
    assert changed.tensors[up_proj] is checkpoint.tensors[up_proj]
    assert isinstance(changed.tensors["scale"], WeightedSum)


def test_a_bias_that_came_in_a_narrow_type_follows_the_rest(tmp_path):
    name = "mlp.gate.e_score_correction_bias"
    checkpoint = open_checkpoint(write_model(tmp_path / "model", {name: bfloat16(np.ones(4))}))
    assert in_dtype(checkpoint, "F16").tensors[name].dtype == "F16"


def test_sums_are_rounded_once_to_the_dtype(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model", TENSORS, CONFIG))
    up_proj = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    made = combine([(0.5, up_proj)], "F32")
    changed = in_dtype(type(checkpoint)({"a": made}, None, {}, ()), "F16")
    assert changed.tensors["a"] == WeightedSum("F16", (3, 4), ((0.5, up_proj),))


def test_the_config_names_the_dtype(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model", TENSORS, CONFIG))
    assert in_dtype(checkpoint, "BF16").config == {"model_type": "llama", "dtype": "bfloat16"}
    assert checkpoint.config == CONFIG
    assert in_dtype(open_checkpoint(tmp_path / "model" / "model.safetensors"), "BF16").config is None


# ---- notes and side files -----------------------------------------------------------------------------


def test_notes_and_names_leave_the_original_alone(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model", TENSORS))
    assert checkpoint.noting("one").noting("two").notes == ("one", "two")
    assert checkpoint.named("the mean").label == "the mean"
    assert (checkpoint.notes, checkpoint.label) == ((), str(tmp_path / "model"))


@pytest.mark.parametrize(("own", "given"), [(True, False), (False, True), (True, True), (False, False)])
def test_side_files_of_another_model_leave_the_ties_as_they_are(tmp_path, own, given):
    taker = write_model(tmp_path / "taker", TENSORS, {"tie_word_embeddings": own, "a": 1})
    side_files = {"tokenizer.json": "{}"}
    giver = write_model(tmp_path / "giver", TENSORS, {"tie_word_embeddings": given, "a": 2}, side_files=side_files)
    changed = open_checkpoint(taker).with_side_files_of(open_checkpoint(giver))
    assert changed.config == {"tie_word_embeddings": own, "a": 2}
    assert changed.side_files == {"tokenizer.json": giver / "tokenizer.json"}
    assert all(isinstance(tensor, Stored) and taker in tensor.file.path.parents for tensor in changed.tensors.values())


@pytest.mark.parametrize("own", [True, False])
def test_ties_stay_where_the_config_of_the_language_model_is_nested(tmp_path, own):
    taker = write_model(tmp_path / "taker", TENSORS, {"text_config": {"tie_word_embeddings": own}})
    giver = write_model(tmp_path / "giver", TENSORS, {"text_config": {"tie_word_embeddings": not own}})
    changed = open_checkpoint(taker).with_side_files_of(open_checkpoint(giver))
    assert ties_embeddings(changed.config) == own


# ---- lineage ------------------------------------------------------------------------------------------


def test_a_source_knows_what_its_card_declares(tmp_path):
    texts = {"README.md": "---\nlicense: mit\n---\n# x", "LICENSE": "mit", "USE_POLICY.md": "be nice", "vocab.txt": ""}
    folder = write_model(tmp_path / "a", TENSORS, CONFIG, side_files=texts)
    source = open_checkpoint(folder).parts[0].source
    assert source.card == Card("mit")
    assert list(source.license_files) == ["LICENSE", "USE_POLICY.md"]
    assert "README.md" not in open_checkpoint(folder).side_files


@pytest.mark.parametrize("text", [b"\xff\xfe---", b"---\nlicense: mit\n---\n" + b"x" * (1 << 20)])
def test_a_card_that_cannot_be_read_declares_nothing(tmp_path, text):
    folder = write_model(tmp_path / "a", TENSORS, CONFIG, side_files={"README.md": text})
    assert open_checkpoint(folder).parts[0].source.card == Card()


def test_parents_stand_once_with_the_sum_of_their_weights(tmp_path):
    a, b = (open_checkpoint(write_model(tmp_path / name, TENSORS, CONFIG), name) for name in "ab")
    parents = parents_of(weighted_sum([a, b, a], [0.5, 0.75, -0.25]))
    assert [(parent.label, parent.repository, parent.weight) for parent in parents] == [
        ("a", None, 0.25),
        ("b", None, 0.75),
    ]


def test_the_licences_of_all_sources_come_along(tmp_path):
    texts = {"a": {"LICENSE": "mit"}, "b": {"LICENSE": "mit"}, "c": {"LICENSE": "apache", "NOTICE": "c"}}
    models = [
        open_checkpoint(write_model(tmp_path / name, TENSORS, CONFIG, side_files={**files, "vocab.txt": "x"}))
        for name, files in texts.items()
    ]
    made = with_license_files(weighted_sum(models, [1.0, 1.0, 1.0]))
    assert {name: path.read_text() for name, path in made.side_files.items()} == {
        "LICENSE": "mit",
        "LICENSE-3-c": "apache",
        "NOTICE": "c",
        "vocab.txt": "x",
    }
    assert with_license_files(models[0]) is models[0]


def test_a_licence_that_is_gone_is_an_error(tmp_path):
    folder = write_model(tmp_path / "a", TENSORS, CONFIG, side_files={"LICENSE": "mit"})
    model = open_checkpoint(folder)
    (folder / "LICENSE").unlink()
    with pytest.raises(SourceError, match="LICENSE: cannot be read"):
        with_license_files(model)
