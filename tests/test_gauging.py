"""Statistics of models on disk: what is in the folder, under which names, and what is refused before anything is."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from merger import gauging
from merger.checkpoint import open_checkpoint
from merger.errors import JobError, NotEnoughMemory, OutputOccupied, SourceError, UnsupportedModel
from merger.gauging import Order, make_statistics
from merger.statistics import manifest_in
from tests import tiny

ROWS = [[5, 9, 3, 77, 12, 40, 41], [4, 4, 30], [8, 1, 2, 3, 50]]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS))
    return path


def made(folder, data, kind="fisher", name="stats", **more):
    output = folder.parent / name
    manifest = make_statistics(open_checkpoint(folder), Order(kind, (data,), **more), output, lambda _text: None)
    return output, manifest


def tensors(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


# ---- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stored_tensor_has_its_fisher_information(tmp_path, data, kind, dtype):
    model = tiny.save(tmp_path / "m", kind, dtype)
    folder, manifest = made(model, data, labels="data")
    found, stored = tensors(folder), tiny.stored(model)
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in stored.items()}
    assert all(t.dtype == torch.float32 and float(t.min()) >= 0 for t in found.values())
    assert manifest.without == []
    assert manifest.mean == pytest.approx(float(torch.cat([t.flatten() for t in found.values()]).double().mean()))


def test_fused_experts_are_told_apart_as_they_are_stored(tmp_path, data):
    """Each expert's numbers, from gradients of a model whose experts are one tensor, against a finite difference."""
    model = tiny.save(tmp_path / "m", "mixtral", num_hidden_layers=1)
    folder, manifest = made(model, data, labels="data", limit=1)
    loaded, name = tiny.load(model).double(), "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    loaded.set_experts_implementation("eager")  # the default one knows no float64
    fused = dict(loaded.named_parameters())["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(fused[2].float(), tiny.stored(model)[name])

    def likelihood():
        with torch.no_grad():
            logits = loaded(torch.tensor([ROWS[0]])).logits[0, :-1]
        return float(logits.log_softmax(-1)[range(len(ROWS[0]) - 1), ROWS[0][1:]].sum())

    own = tensors(folder)[name]
    row, column = divmod(int(own.argmax()), own.shape[1])
    values = []
    for step in (1e-3, -2e-3):  # norms are computed in float32, whatever the model is in
        with torch.no_grad():
            fused[2, row, column] += step
        values.append(likelihood())
    slope = (values[0] - values[1]) / 2e-3
    assert float(own[row, column]) == pytest.approx(slope**2 / manifest.data.tokens, rel=1e-2)
    assert float(own[row, column]) > 0


@pytest.mark.parametrize(("kind", "count"), [("llama", 29), ("mixtral", 17), ("gemma", 28)])
def test_linear_layers_have_gram_matrices_under_the_names_of_their_weights(tmp_path, data, kind, count):
    model = tiny.save(tmp_path / "m", kind)
    folder, manifest = made(model, data, "gram")
    found, stored = tensors(folder), tiny.stored(model)
    assert len(found) + len(manifest.same) == count
    assert {*found, *manifest.same, *manifest.without} == {*stored}
    assert all(found[manifest.same.get(n, n)].shape == (stored[n].shape[1],) * 2 for n in (*found, *manifest.same))
    assert all(np.linalg.eigvalsh(gram.double()).min() > -1e-6 * float(gram.max()) for gram in found.values())
    assert manifest.data.tokens == sum(map(len, ROWS))


def test_a_model_without_linear_layers_is_refused(tmp_path, data):
    with pytest.raises(UnsupportedModel, match="no linear layers"):
        made(tiny.save(tmp_path / "m", "gpt2"), data, "gram")
    assert not (tmp_path / "stats").exists()


# ---- the folder ---------------------------------------------------------------------------------------


def test_the_manifest_says_of_what_they_are(tmp_path, data):
    model = tiny.save(tmp_path / "m", "llama")
    folder, manifest = made(model, data, context=4, limit=3, seed=7)
    assert manifest == manifest_in(folder / "statistics.json")
    assert manifest.data.windows == 3
    assert manifest.data.tokens == 3 + 2 + 2  # windows of 4, 3 and 3 tokens
    assert (manifest.labels, manifest.seed, manifest.data.context, manifest.data.limit) == ("model", 7, 4, 3)
    assert manifest.data.files[0].sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    [(name, file)] = manifest.files.items()
    assert file.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert (folder / name).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_the_same_again_gives_the_same_bytes(tmp_path, data, kind):
    model = tiny.save(tmp_path / "m", "llama", num_hidden_layers=2)
    first, again = (made(model, data, kind, name)[0] for name in ("a", "b"))
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_headers_tell_statistics_of_other_models_and_texts_apart(tmp_path, data):
    models = [tiny.save(tmp_path / f"m{seed}", "llama", seed=seed, num_hidden_layers=1) for seed in (0, 1)]
    told = [made(models[0], data, name="a")[1], made(models[1], data, name="b")[1]]
    data.write_text(json.dumps({"input_ids": ROWS[0]}))
    told.append(made(models[0], data, name="c")[1])
    assert len({file.header_sha256 for manifest in told for file in manifest.files.values()}) == 3


def test_little_memory_means_several_passes_and_the_same_matrices(tmp_path, data):
    model = tiny.save(tmp_path / "m", "llama")
    whole, _ = made(model, data, "gram", "whole")
    parts, manifest = made(model, data, "gram", "parts", memory=2 * 4 * 48 * 48 + 100)
    assert len(manifest.files) > 5
    index = json.loads((parts / "statistics.safetensors.index.json").read_text())["weight_map"]
    assert {*index.values()} == {*manifest.files}
    assert open_checkpoint(parts).tensors.keys() == index.keys()
    a, b = tensors(whole), tensors(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_much_fisher_information_lies_in_several_files(tmp_path, data, monkeypatch):
    monkeypatch.setattr(gauging, "_FILE_SIZE", 20_000)
    model = tiny.save(tmp_path / "m", "llama")
    folder, manifest = made(model, data)
    assert len(manifest.files) > 3
    assert open_checkpoint(folder).tensors.keys() == tiny.stored(model).keys()


# ---- refusals -----------------------------------------------------------------------------------------


def test_a_matrix_that_fits_no_memory_is_refused_with_the_number(tmp_path, data):
    with pytest.raises(NotEnoughMemory, match=r"takes 18,432 bytes, 10,000 are allowed") as error:
        made(tiny.save(tmp_path / "m", "llama"), data, "gram", memory=10_000)
    assert "down_proj" in error.value.where
    assert "--memory 18KiB" in error.value.remedy


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_model_that_fits_no_memory_is_refused_with_the_number(tmp_path, data, monkeypatch, kind):
    monkeypatch.setattr(gauging, "free_memory", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match=r"[\d,]{6,} bytes of memory, 1,000 are free"):
        made(tiny.save(tmp_path / "m", "llama"), data, kind)


def test_nothing_is_overwritten_and_nothing_is_left_of_what_fails(tmp_path, data, monkeypatch):
    model = tiny.save(tmp_path / "m", "llama", num_hidden_layers=1)
    (tmp_path / "stats").mkdir()
    with pytest.raises(OutputOccupied):
        made(model, data)

    def fail(*_given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gauging, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        made(model, data, name="other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "m", "stats"]


@pytest.mark.parametrize("content", ["", '{"input_ids": [1]}\n'])
def test_data_without_text_are_refused(tmp_path, data, content):
    data.write_text(content)
    with pytest.raises(SourceError, match="no text of two tokens"):
        made(tiny.save(tmp_path / "m", "llama"), data)


def test_data_that_are_not_there_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(gauging, "load", None)
    with pytest.raises(SourceError, match="is not there"):
        made(tiny.save(tmp_path / "m", "llama"), tmp_path / "none.txt")


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, data, kind):
    broken = tiny.model("llama", num_hidden_layers=1)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.inf
    broken.save_pretrained(tmp_path / "m")
    with pytest.raises(JobError, match="NaN or infinity"):
        made(tmp_path / "m", data, kind, labels="data")
