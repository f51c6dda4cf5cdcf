"""What a run tells about itself: manifest, model card, page."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from merger.checkpoint import Part, open_checkpoint
from merger.lineage import Card
from merger.methods.combination import weighted_sum
from merger.plan import Plan, make_plan
from merger.receipt import Receipt
from merger.report import Figures, manifest, model_card, notices, page
from merger.verify import Check
from tests.checkpoints import write_model


@pytest.fixture
def plan(tmp_path) -> Plan:
    tensors = {"x": np.ones(4, np.float32)}
    models = [write_model(tmp_path / f"step-{i}", tensors, {"rope_theta": i}) for i in (1, 2)]
    labels = ["<b>step-1</b>", "step-2"]
    checkpoints = [open_checkpoint(model, label) for model, label in zip(models, labels, strict=True)]
    return make_plan(weighted_sum(checkpoints, [0.25, 0.75]), {"method": "ema", "output": {}}, 10**9)


RECEIPTS = [Receipt("b.safetensors", 2, "22", "f", {"x": 3}), Receipt("a.safetensors", 1, "11", "f")]


def test_the_manifest_is_the_same_for_the_same_run(plan):
    first = json.dumps(manifest(plan, RECEIPTS))
    assert first == json.dumps(manifest(plan, RECEIPTS[::-1]))
    content = json.loads(first)
    assert [shard["file"] for shard in content["shards"]] == ["a.safetensors", "b.safetensors"]
    assert [(source["step"], source["weight"]) for source in content["sources"]] == [(1, 0.25), (2, 0.75)]
    assert content["non_finite"] == {"x": 3}
    assert "rope_theta" in content["warnings"][0]


def test_the_card_has_front_matter_lineage_and_the_recipe(plan):
    _, front, text = model_card(plan).split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "merger"]}
    assert "# ema of 2 checkpoints" in text
    assert "| `step-2` | 2 | 0.75 |" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == dict(plan.recipe)


def with_parents(plan: Plan, *changes: dict) -> Plan:
    """The plan as if its sources had other lineages."""
    pairs = zip(plan.checkpoint.parts, changes, strict=True)
    parts = tuple(Part(replace(part.source, **change), part.weight) for part, change in pairs)
    return replace(plan, checkpoint=replace(plan.checkpoint, parts=parts))


LLAMA = {
    "reference": "hf://org/llama@v1/last",
    "repository": "org/llama",
    "revision": "a" * 40,
    "card": Card("llama3.1", language=("en", "no")),
}
MIT = {"repository": "org/mit", "revision": "b" * 40, "card": Card("mit", language=("en",), datasets=("c4",))}


def test_the_hubs_client_reads_the_card(plan):
    card = ModelCard(model_card(with_parents(plan, LLAMA, MIT), extra_tags=["mergekit"]))
    assert card.data.to_dict() == {
        "base_model": ["org/llama", "org/mit"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "merger", "mergekit"],
        "license": "llama3.1",
        "language": ["en", "no"],
        "datasets": ["c4"],
    }
    assert "| source | commit | step | weight |\n|---|---|---|---|" in card.text
    assert "| `org/llama@v1/last` | aaaaaaaaaaaa | 1 | 0.25 |" in card.text
    assert "- org/mit is under mit and passes into llama3.1." in card.text
    assert "Built with Llama" in card.text


def test_the_manifest_names_commits_and_licences(plan):
    sources = manifest(with_parents(plan, LLAMA, {}), RECEIPTS)["sources"]
    assert [sources[0][key] for key in ("repository", "revision", "license")] == ["org/llama", "a" * 40, "llama3.1"]
    assert not {"repository", "revision", "license"} & sources[1].keys()


def test_a_licence_that_forbids_it_stands_in_the_card(plan):
    text = model_card(with_parents(plan, {"card": Card("cc-by-nd-4.0")}, MIT))
    assert "Not to be passed on:\n\n- &lt;b>step-1&lt;/b> is under cc-by-nd-4.0" in text
    assert "license" not in ModelCard(text).data.to_dict()


def test_nothing_is_said_of_licences_where_nothing_is_known(plan):
    assert "License" not in model_card(plan)


def test_names_break_neither_tables_nor_code(plan):
    hostile = {"reference": "a|b`c\n<i>``"}
    text = model_card(with_parents(plan, hostile, {}))
    assert "| ``` a\\|b`c <i>`` ``` | 1 | 0.25 |" in text
    recipe = {"method": "ema", "checkpoints": ["```", "x\n```\ny"], "output": {}}
    text = model_card(replace(plan, recipe=recipe))
    assert yaml.safe_load(text.split("````yaml\n")[1].split("````")[0]) == recipe


def test_the_main_picture_stands_in_the_card(plan):
    assert "![weights](weights.png)" in model_card(plan, picture="weights.png")
    assert "![" not in model_card(plan)


def test_a_notice_is_made_where_no_source_brings_one(plan, tmp_path):
    assert notices(with_parents(plan, MIT, MIT)) == {}
    made = with_parents(plan, LLAMA, MIT)
    assert notices(made)["NOTICE"].startswith("Llama 3.1 is licensed under")
    brought = replace(made.checkpoint, side_files={"NOTICE.txt": tmp_path})
    assert notices(replace(made, checkpoint=brought)) == {}


def test_the_page_stands_alone_and_escapes_what_it_is_told(plan):
    checks = [Check("finite", True, "all of them"), Check("ties", False, "not at all")]
    shown = page(plan, checks, Figures(0.0, 10, 5, 4, 1 << 20), {"weights": b"png"})
    assert "&lt;b&gt;step-1&lt;/b&gt;" in shown
    assert "<b>" not in shown
    assert 'src="data:image/png;base64,cG5n"' in shown
    assert 'class="failed">failed' in shown
    assert shown.count("src=") == 1
    assert "href" not in shown
