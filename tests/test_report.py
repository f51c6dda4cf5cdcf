"""What a run tells about itself: manifest, model card, page."""

import json

import numpy as np
import pytest
import yaml

from merger.checkpoint import open_checkpoint
from merger.methods.combination import weighted_sum
from merger.plan import Plan, make_plan
from merger.receipt import Receipt
from merger.report import Figures, manifest, model_card, page
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
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merger", "merge"]}
    assert "# ema of 2 checkpoints" in text
    assert "| `step-2` | 2 | 0.75 |" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == dict(plan.recipe)


def test_the_page_stands_alone_and_escapes_what_it_is_told(plan):
    checks = [Check("finite", True, "all of them"), Check("ties", False, "not at all")]
    shown = page(plan, checks, Figures(0.0, 10, 5, 4, 1 << 20), {"weights": b"png"})
    assert "&lt;b&gt;step-1&lt;/b&gt;" in shown
    assert "<b>" not in shown
    assert 'src="data:image/png;base64,cG5n"' in shown
    assert 'class="failed">failed' in shown
    assert shown.count("src=") == 1
    assert "href" not in shown
