"""Fisher and RegMean as recipes: the whole way to files, against float64 in numpy; what is refused and told."""

import json
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from merger.checkpoint import open_checkpoint
from merger.errors import IncompatibleSources, NonFiniteInput, NotEnoughMemory, NotInstalled, RecipeError, SourceError
from merger.expression import Filled, WeightedSum
from merger.gauging import Order, make_statistics
from merger.methods import informed
from merger.recipe import make_document, parse_document
from merger.run import Options, check_machine, plan_of, run
from merger.sources import LocalSources, Roots
from merger.weighed import Weighed
from merger.whole import Tensors, Whole
from tests import tiny
from tests.checkpoints import write_safetensors
from tests.methods.making import Silent, make, plan

NAMES = ("a", "b", "c")
TEXTS = {"a": [5, 9, 3, 77, 12, 40, 41], "b": [4, 4, 30, 11, 90], "c": [8, 1, 2, 3, 50, 61, 62, 63, 64]}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def statistics_of(model: Path, kind: str, text: list[int], output: Path) -> Path:
    data = output.parent / f"{output.name}.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps({"input_ids": text}))
    make_statistics(open_checkpoint(model), Order(kind, (data,)), output, lambda _text: None)
    return output


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Three fine-tunes of one tiny model, with their statistics of both kinds."""
    folder = tmp_path_factory.mktemp("shelf")
    base = tiny.model("llama", num_hidden_layers=2)
    for seed, name in enumerate(NAMES):
        model = tiny.model("llama", num_hidden_layers=2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.02)
        model.save_pretrained(folder / name)
        for kind in ("fisher", "gram"):
            statistics_of(folder / name, kind, TEXTS[name], folder / kind / name)
    base.save_pretrained(folder / "base")
    return folder


def recipe(shelf, method, names=NAMES, weights=(1.0, 1.0, 1.0), **fields):
    kind = "gram" if method == "regmean" else method
    models = [
        {"source": str(shelf / name), "statistics": str(shelf / kind / name), "weight": weight}
        for name, weight in zip(names, weights, strict=False)
    ]
    return {"method": method, "models": models, **fields}


def values(folder):
    return {name: tensor.double().numpy() for name, tensor in tiny.stored(Path(folder)).items()}


def statistics(folder):
    """The tensors, those that layers share for each of them, and the manifest."""
    told = json.loads((folder / "statistics.json").read_text())
    found = {name: tensor.double().numpy() for name, tensor in load_file(folder / "statistics.safetensors").items()}
    return {**found, **{name: found[other] for name, other in told["same"].items()}}, told


def near(found, wanted):
    """Within the rounding of float32."""
    np.testing.assert_allclose(found, wanted, rtol=2.0**-23, atol=2.0**-24)


# ---- Fisher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 3.0, 0.5), (1.0, 0.0, 2.0)])
def test_fisher_is_the_mean_weighed_by_what_predictions_depend_on(shelf, tmp_path, normalize, weights):
    make(recipe(shelf, "fisher", weights=weights, normalize=normalize, floor=1e-4), tmp_path / "out")
    kept = [(name, weight) for name, weight in zip(NAMES, weights, strict=True) if weight]
    models, own = [values(shelf / name) for name, _ in kept], [statistics(shelf / "fisher" / name) for name, _ in kept]
    means = [told["mean"] for _, told in own]
    common = sum(w * m for (_, w), m in zip(kept, means, strict=True)) / sum(w for _, w in kept)
    for name, found in values(tmp_path / "out").items():
        counts = [
            weight * np.maximum(1e-4, tensors[name] / (mean if normalize else common))
            for (_, weight), (tensors, _), mean in zip(kept, own, means, strict=True)
        ]
        near(found, sum(c * model[name] for c, model in zip(counts, models, strict=True)) / sum(counts))


def test_how_large_all_fisher_information_is_makes_no_difference(shelf, tmp_path):
    """Half as much of everything, as from twice the tokens, is the same importance."""
    given = recipe(shelf, "fisher", ("a", "b"), normalize=False)
    make(given, tmp_path / "out")
    for entry in given["models"]:
        folder = tmp_path / Path(entry["statistics"]).name
        halved = {name: t / 2 for name, t in load_file(Path(entry["statistics"]) / "statistics.safetensors").items()}
        rewrite(Path(entry["statistics"]), folder, {name: tensor.numpy() for name, tensor in halved.items()}, 0.5)
        entry["statistics"] = str(folder)
    make(given, tmp_path / "halved")
    assert same_weights(tmp_path / "out", tmp_path / "halved")


def rewrite(source, folder, tensors, factor=1.0):
    """Statistics of the same model with other numbers, and a manifest that fits them."""
    folder.mkdir()
    told = json.loads((source / "statistics.json").read_text())
    path = write_safetensors(folder / "statistics.safetensors", tensors)
    header = open_checkpoint(path).parts[0].source.files[0].header_sha256
    told["files"] = {path.name: {"size": path.stat().st_size, "header_sha256": header, "sha256": "0" * 64}}
    (folder / "statistics.json").write_text(json.dumps({**told, "mean": told["mean"] * factor}))
    return folder


def same_weights(first, other):
    return (Path(first) / "model.safetensors").read_bytes() == (Path(other) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_one_model_and_twins_stay_themselves(shelf, tmp_path, method):
    kind = "gram" if method == "regmean" else method
    other = statistics_of(shelf / "a", kind, TEXTS["b"], tmp_path / "other")
    make(recipe(shelf, method, ("a",)), tmp_path / "alone")
    twins = recipe(shelf, method, ("a", "a"))
    twins["models"][1]["statistics"] = str(other)
    make(twins, tmp_path / "twins")
    for place in ("alone", "twins"):
        found = values(tmp_path / place)
        assert all(np.array_equal(found[name], value) for name, value in values(shelf / "a").items())


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_equal_statistics_make_the_plain_mean(shelf, tmp_path, method):
    kind = "gram" if method == "regmean" else method
    given = recipe(shelf, method)
    tensors = load_file(shelf / kind / "a" / "statistics.safetensors")
    for entry in given["models"][1:]:
        own = shelf / kind / Path(entry["source"]).name
        folder = rewrite(own, tmp_path / own.name, {name: tensor.numpy() for name, tensor in tensors.items()})
        entry["statistics"] = str(folder)
    make({**given, **({"normalize": False} if method == "fisher" else {})}, tmp_path / "out")
    models = [values(shelf / name) for name in NAMES]
    for name, found in values(tmp_path / "out").items():
        near(found, np.mean([model[name] for model in models], axis=0))


# ---- RegMean ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "by_tokens", "weights"), [(0.9, False, (1, 1, 1)), (0.0, True, (1, 2, 0.5)), (0.5, True, (1, 1, 1))]
)
def test_regmean_solves_for_each_linear_layer(shelf, tmp_path, alpha, by_tokens, weights):
    make(recipe(shelf, "regmean", weights=weights, alpha=alpha, by_tokens=by_tokens), tmp_path / "out")
    models, own = [values(shelf / name) for name in NAMES], [statistics(shelf / "gram" / name) for name in NAMES]
    shares = np.array(weights) / sum(weights)
    layers = 0
    for name, found in values(tmp_path / "out").items():
        if name in own[0][1]["without"]:
            near(found, sum(share * model[name] for share, model in zip(shares, models, strict=True)))
            continue
        layers += 1
        grams = []
        for weight, (tensors, told) in zip(weights, own, strict=True):
            scaled = alpha * tensors[name] + (1 - alpha) * np.diag(np.diag(tensors[name]))
            grams.append(weight * scaled * (told["data"]["tokens"] if by_tokens else 1))
        wanted = np.linalg.solve(sum(grams), sum(g @ m[name].T for g, m in zip(grams, models, strict=True))).T
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert layers == 2 * 7 + 1


def test_regmean_keeps_outputs_nearer_than_the_mean_does(shelf, tmp_path):
    """What it minimises, over the layers: the distance of outputs from each model's own, on that one's inputs."""
    make(recipe(shelf, "regmean", alpha=1.0), tmp_path / "regmean")
    merged, models = values(tmp_path / "regmean"), [values(shelf / name) for name in NAMES]
    own = [statistics(shelf / "gram" / name)[0] for name in NAMES]

    def distance(weights, name):
        pairs = zip(models, own, strict=True)
        return sum(np.trace((weights - m[name]) @ g[name] @ (weights - m[name]).T) for m, g in pairs)

    for name in own[0]:
        plain = np.mean([model[name] for model in models], axis=0)
        assert distance(merged[name], name) < distance(plain, name)


class Stopping(Silent):
    """Stops the run after its first shard."""

    def finished(self, receipt):
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(shelf, tmp_path, method):
    given = {**recipe(shelf, method), "output": {"shard_size": "40KB"}}
    make(given, tmp_path / "whole")
    again = tmp_path / "again"
    document = make_document({**given, "output": {**given["output"], "path": str(again)}})
    with pytest.raises(KeyboardInterrupt):
        run(document, Options(threads=1), Stopping())
    shards = sorted(path.name for path in (tmp_path / "whole").glob("model-*.safetensors"))
    assert 0 < len(list(again.glob("model-*.safetensors"))) < len(shards)
    assert make(given, again).resumed > 0
    assert all((tmp_path / "whole" / name).read_bytes() == (again / name).read_bytes() for name in shards)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3, "memory": 3 << 20}])
def test_the_bytes_depend_neither_on_threads_nor_on_memory(shelf, tmp_path, method, options):
    make(recipe(shelf, method), tmp_path / "one")
    make(recipe(shelf, method), tmp_path / "other", **options)
    assert same_weights(tmp_path / "one", tmp_path / "other")


# ---- families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "gemma"])
@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_other_families(tmp_path, kind, method):
    """Experts that are fused in memory, inputs that come first, tied heads."""
    for seed, name in enumerate("ab"):
        tiny.save(tmp_path / name, kind, "bfloat16", seed=seed, num_hidden_layers=1, n_layer=1)
        if (kind, method) != ("gpt2", "regmean"):
            own = "gram" if method == "regmean" else method
            statistics_of(tmp_path / name, own, TEXTS[name], tmp_path / own / name)
    if (kind, method) == ("gpt2", "regmean"):
        return  # refused when statistics are made (tests/test_gauging.py)
    made = plan(recipe(tmp_path, method, ("a", "b")))
    kinds = {type(tensor) for tensor in made.checkpoint.tensors.values()}
    assert kinds == ({Weighed} if method == "fisher" else {Whole, WeightedSum})
    make(recipe(tmp_path, method, ("a", "b")), tmp_path / "out")
    assert tiny.load(tmp_path / "out")(tiny.tokens()).logits.isfinite().all()


def test_a_tied_and_an_untied_model_have_a_head_of_their_own(tmp_path):
    for seed, (name, tied) in enumerate((("a", True), ("b", False))):
        tiny.save(tmp_path / name, "llama", seed=seed, num_hidden_layers=1, tie_word_embeddings=tied)
        statistics_of(tmp_path / name, "fisher", TEXTS[name], tmp_path / "fisher" / name)
    make(recipe(tmp_path, "fisher", ("a", "b")), tmp_path / "out")
    a, b = (statistics(tmp_path / "fisher" / name) for name in ("a", "b"))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    counts = [np.maximum(1e-6, x / told["mean"]) for x, told in ((a[0][embedding], a[1]), (b[0][head], b[1]))]
    parts = [values(tmp_path / "a")[embedding], values(tmp_path / "b")[head]]
    near(values(tmp_path / "out")[head], sum(c * p for c, p in zip(counts, parts, strict=True)) / sum(counts))


# ---- plans --------------------------------------------------------------------------------------------


def test_statistics_count_in_the_plan_and_stand_in_the_manifest(shelf, tmp_path):
    given = recipe(shelf, "fisher", ("a", "b"))
    made = plan(given)
    assert made.read_size >= 2 * 2 * made.parameters * 4
    assert plan(given).fingerprint == made.fingerprint
    tensors = load_file(shelf / "fisher" / "a" / "statistics.safetensors")
    other = rewrite(shelf / "fisher" / "a", tmp_path / "a", {name: t.numpy() for name, t in tensors.items()})
    again = {**given, "models": [{**given["models"][0], "statistics": str(other)}, given["models"][1]]}
    first = plan(again).fingerprint
    (other / "statistics.safetensors").touch()
    assert len({made.fingerprint, first, plan(again).fingerprint}) == 3
    make(given, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "merger.json").read_text())
    assert [own["reference"] for source in told["sources"] for own in source["statistics"]] == [
        entry["statistics"] for entry in given["models"]
    ]


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_plan_travels_to_other_processes(shelf, method):
    made = plan(recipe(shelf, method))
    sent = pickle.loads(pickle.dumps(made))
    assert [s.header for s in sent.shards] == [s.header for s in made.shards]
    assert [len(part.source.observed) for part in sent.checkpoint.parts] == [1, 1, 1]


def test_it_is_told_that_they_are_experimental_and_what_is_averaged(shelf):
    for method, count in (("fisher", 0), ("regmean", 6)):
        notes = plan(recipe(shelf, method)).checkpoint.notes
        assert informed.EXPERIMENTAL in notes
        assert any(note.startswith(f"{count} of 21 tensors have no statistics") for note in notes)


def test_a_matrix_that_does_not_fit_is_refused_with_the_number(shelf, monkeypatch):
    made, allotment = plan_of(make_document({**recipe(shelf, "regmean"), "output": {"path": "x"}}), Options())
    largest = made.wholes[0]
    m, n = largest.shape
    assert largest.cost >= 8 * (4 * m * n + 5 * n * n)
    monkeypatch.setattr("merger.spilling.free_memory", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match=f"takes {largest.cost:,} bytes"):
        check_machine(made, Options(memory=1000))
    assert allotment.whole == max(Options().memory, largest.cost)


class Weighing(TorchDispatchMode):
    """Watches the bytes of torch's tensors that are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (weakref.ref(tensor), storage.nbytes())
        self.alive = {place: pair for place, pair in self.alive.items() if pair[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


@pytest.mark.parametrize(("m", "n"), [(300, 200), (100, 400)])
@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_the_cost_that_is_told_holds_what_is_computed(m, n, alpha):
    """With one token a model, so that alpha 1 goes by the eigenvalues."""
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(m, n, generator=random) for _ in range(2)]
    grams = [x.T @ x for x in (torch.randn(1, n, generator=random) for _ in range(2))]
    function = informed.Regression((0.5, 0.5), (0.5, 0.5), alpha)

    class Loaded(Tensors):
        def __len__(self):
            return 4

        def load(self, index):
            return [*weights, *grams][index].clone()

    with Weighing() as watched, torch.no_grad():
        function(Loaded())
    shapes = [Filled("F32", (m, n))] * 2 + [Filled("F32", (n, n))] * 2
    told = function.memory(shapes)
    assert watched.most > 8 * (2 * m * n + 2 * n * n)
    assert watched.most <= told <= 2.5 * watched.most


def test_nested_recipes_take_it_like_any_other(shelf, tmp_path):
    inner = recipe(shelf, "fisher", ("a", "b"))
    make({"method": "soup", "models": [inner, str(shelf / "c")]}, tmp_path / "out")
    make(inner, tmp_path / "inner")
    a, b = values(tmp_path / "inner"), values(shelf / "c")
    for name, found in values(tmp_path / "out").items():
        np.testing.assert_allclose(found, (a[name] + b[name]) / 2, rtol=2.0**-22, atol=2.0**-23)


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_of_a_model_with_other_values_are_refused(shelf, method):
    given = recipe(shelf, method)
    given["models"][0]["statistics"], given["models"][1]["statistics"] = (
        given["models"][1]["statistics"],
        given["models"][0]["statistics"],
    )
    with pytest.raises(IncompatibleSources, match=r"of another model than .*/a: the values differ") as error:
        plan(given)
    assert error.value.where == given["models"][0]["statistics"]


def test_statistics_of_another_architecture_or_kind_are_refused(shelf, tmp_path):
    other = tiny.save(tmp_path / "m", "llama", num_hidden_layers=1)
    own = statistics_of(other, "fisher", TEXTS["a"], tmp_path / "own")
    given = recipe(shelf, "fisher", ("a", "b"))
    given["models"][1]["statistics"] = str(own)
    with pytest.raises(IncompatibleSources, match="has no statistics") as error:
        plan(given)
    assert str(own) in error.value.where
    given["models"][1]["statistics"] = str(shelf / "gram" / "b")
    with pytest.raises(IncompatibleSources, match="of the kind gram, fisher is what is needed"):
        plan(given)


def test_models_of_which_one_lacks_what_the_other_has_are_refused(shelf, tmp_path):
    name, own = "model.layers.0.self_attn.o_proj.weight", shelf / "gram" / "b"
    tensors = {n: t.numpy() for n, t in load_file(own / "statistics.safetensors").items() if n != name}
    given = recipe(shelf, "regmean", ("a", "b"))
    given["models"][1]["statistics"] = str(rewrite(own, tmp_path / "b", tensors))
    with pytest.raises(IncompatibleSources, match=r"has statistics in .*/gram/a and none in .*/b") as error:
        plan(given)
    assert name in error.value.where


def test_numbers_that_are_not_finite_are_refused(shelf, tmp_path):
    tensors = {n: t.numpy().copy() for n, t in load_file(shelf / "gram" / "b" / "statistics.safetensors").items()}
    tensors["lm_head.weight"][3, 3] = np.nan
    given = recipe(shelf, "regmean", ("a", "b"))
    given["models"][1]["statistics"] = str(rewrite(shelf / "gram" / "b", tmp_path / "b", tensors))
    with pytest.raises(NonFiniteInput):
        make(given, tmp_path / "out")


def test_folders_outside_of_what_a_service_may_use_are_refused(shelf, tmp_path):
    given = recipe(shelf, "fisher", ("a", "b"))
    document = make_document({**given, "output": {"path": "x"}})
    with pytest.raises(SourceError, match="outside of the folders"):
        plan_of(document, Options(), LocalSources(Roots([shelf / "a", shelf / "b", tmp_path])))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"models": []}, "models: list should have at least 1 item"),
        ({"floor": 0}, "floor: input should be greater than 0"),
        ({"flor": 1}, "flor: is not a field; did you mean 'floor'?"),
        ({"models": [{"source": "a"}]}, "models[0].statistics: field required"),
        ({"models": [{"source": "a", "statistics": "b", "weight": -1}]}, "models[0].weight: input should be greater"),
        ({"models": [{"source": "a", "statistics": "b", "weight": 0}]}, "every weight is zero"),
        (
            {"models": [{"source": "a", "statistic": "b"}]},
            "models[0].statistic: is not a field; did you mean 'statistics'?",
        ),
        (
            {"models": [{"source": {"method": "soup"}, "statistics": "b"}]},
            "models[0].source: input should be a valid string",
        ),
        ({"models": ["a"]}, "models[0]: input should be a valid dictionary"),
    ],
)
def test_what_is_no_recipe_is_refused_with_the_fields_path(change, complaint):
    given = {"method": "fisher", "models": [{"source": "a", "statistics": "b"}], **change}
    with pytest.raises(RecipeError) as error:
        parse_document(yaml.safe_dump(given))
    assert complaint in str(error.value)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_is_between_0_and_1(alpha):
    given = {"method": "regmean", "alpha": alpha, "models": [{"source": "a", "statistics": "b"}]}
    with pytest.raises(RecipeError, match="alpha: input should be"):
        parse_document(yaml.safe_dump(given))


def test_a_folder_that_is_not_there_is_refused(shelf):
    given = recipe(shelf, "fisher", ("a", "b"))
    given["models"][0]["statistics"] = str(shelf / "none")
    with pytest.raises(SourceError) as error:
        plan(given)
    assert "none" in error.value.where


def test_without_torch_regmean_is_refused_and_fisher_is_not(shelf, monkeypatch):
    monkeypatch.setattr(informed, "find_spec", lambda _name: None)
    plan(recipe(shelf, "fisher"))
    with pytest.raises(NotInstalled, match="need torch"):
        plan(recipe(shelf, "regmean"))
