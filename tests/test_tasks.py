"""Tasks to train on: their losses by hand, what rows become, and how an installed package brings one."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from merger.errors import MergerError, NotInstalled, RecipeError, SourceError
from merger.fine_tuning import orders_of
from merger.recycling import Recycling
from merger.rows import rows_of
from merger.sources import LocalSources
from merger.tasks import Classification, Encoding, Preferences, Text, package_of, task_of
from tests import tiny
from tests.packages import install, margins

PLAIN = Encoding(None, ("no", "yes"), 4)


def reward_model():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**tiny.SIZES, num_labels=1)).eval()


def alone(model, ids):
    """The reward of one sequence, with nothing padded."""
    return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


# ---- rows and losses ----------------------------------------------------------------------------------


def test_windows_of_text_are_cut_as_they_are_measured():
    found = Text().examples({"input_ids": [3, 4, 5, 6, 7, 8, 9, 10, 11]}, "row", PLAIN)
    assert list(found) == [(3, 4, 5, 6), (7, 8, 9, 10)]  # a window of one token predicts nothing


def test_labels_are_in_the_order_of_their_numbers_else_of_their_names(tmp_path):
    def labels(*values):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"text": "x", "label": value}) for value in values))
        return Classification().labels(rows_of([path]))

    assert labels(10, 2, 2, 0) == ("0", "2", "10")
    assert labels("no", "yes", "maybe") == ("maybe", "no", "yes")


def test_the_loss_of_preferences_is_that_of_bradley_and_terry():
    model = reward_model()
    pairs = [((5, 6, 7), (8, 9)), ((10, 11), (12, 13, 14, 15, 16))]
    margins = [alone(model, chosen) - alone(model, rejected) for chosen, rejected in pairs]
    wanted = sum(math.log1p(math.exp(-margin)) for margin in margins) / 2
    assert Preferences().loss(model, pairs).item() == pytest.approx(wanted, rel=1e-5)


def test_preferences_are_read_behind_their_prompt_or_as_tokens(tmp_path):
    tiny.byte_tokenizer(tmp_path)
    encoding = Encoding(AutoTokenizer.from_pretrained(tmp_path), (), 4)
    [pair] = Preferences().examples({"prompt": "say ", "chosen": "yes", "rejected": "no"}, "row", encoding)
    assert pair == (tuple(tiny.tokens_of("say yes")), tuple(tiny.tokens_of("say no")))
    [pair] = Preferences().examples({"chosen": [5, 6], "rejected": [7]}, "row", PLAIN)
    assert pair == ((5, 6), (7,))
    with pytest.raises(SourceError, match="line 7: has no field 'rejected'"):
        list(Preferences().examples({"chosen": [5, 6]}, "line 7", PLAIN))


def test_a_reward_model_has_one_output_and_a_base_without_padding_gets_it():
    made = Preferences().config({}, Preferences().labels(()))
    assert (made["num_labels"], made["pad_token_id"]) == (1, 0)
    assert "pad_token_id" not in Preferences().config({"pad_token_id": 3}, ("LABEL_0",))
    assert Text().config({}, ()) == {}


# ---- of installed packages ----------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder on the path, as site-packages is."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in ("merger_margins", "odd"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def test_the_example_of_the_documentation_is_a_task(site):
    margins(site)
    assert package_of("margins") == "merger-margins 1.0"
    assert "merger_margins" not in sys.modules  # to look it up runs nothing of it
    task, model = task_of("margins"), reward_model()
    [example] = task.examples({"chosen": [5, 6, 7], "rejected": [8, 9], "margin": 0.5}, "row", PLAIN)
    margin = alone(model, [5, 6, 7]) - alone(model, [8, 9]) - 0.5
    assert task.loss(model, [example]).item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)


def test_ready_tasks_cannot_be_replaced(site):
    install(site, "odd", "1", {"text": "odd:Odd"}, odd="raise SystemExit")
    assert package_of("text") is None
    assert isinstance(task_of("text"), Text)


def test_unknown_names_are_refused_with_what_there_is(site):
    margins(site)
    with pytest.raises(RecipeError, match="'margin' is no task to train on; did you mean 'margins'") as refused:
        package_of("margin")
    assert refused.value.remedy == (
        "There are text, classification, preferences; of installed packages margins (of merger-margins 1.0)."
    )
    for name in ("os:system", "merger_margins:Margins", "../margins", "margins "):
        with pytest.raises(RecipeError, match="is no task to train on"):
            package_of(name)


def test_a_name_that_two_packages_bring_is_refused(site):
    margins(site)
    install(site, "odd", "2", {"margins": "odd:Odd"})
    with pytest.raises(RecipeError, match=r"is brought by merger-margins 1\.0 and odd 2"):
        package_of("margins")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("Odd = dict", "odd:Odd is no merger.tasks.Task"),
        ("import merger.tasks\nclass Odd(merger.tasks.Task): pass", "TypeError: Can't instantiate abstract class"),
    ],
)
def test_what_cannot_be_loaded_is_told(site, source, complaint):
    install(site, "odd", "1", {"odd": "odd:Odd"}, odd=source)
    with pytest.raises(NotInstalled, match=complaint) as refused:
        task_of("odd")
    assert "odd 1" in refused.value.where


def test_another_version_than_that_of_the_digest_does_not_train(site):
    margins(site)
    assert task_of("margins", "merger-margins 1.0").has_head
    with pytest.raises(MergerError, match=r"comes from merger-margins 1\.0 on this machine and from merger-margins 0"):
        task_of("margins", "merger-margins 0.9")


def test_the_digest_of_a_stage_follows_from_the_package_and_its_version(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "base", "llama")
    (tmp_path / "pairs.jsonl").write_text('{"chosen": [5], "rejected": [6]}')

    def keys(folder):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            patch.delitem(sys.modules, "merger_margins", raising=False)
            training = Recycling(task="margins", target="pairs.jsonl", folder="work", runs=1)
            return [order.key for order in orders_of(training, ["base"], LocalSources())]

    first = keys(margins(tmp_path / "first"))
    newer = keys(margins(tmp_path / "newer", "1.1"))
    fork = margins(tmp_path / "fork")
    (fork / "merger_margins-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fork\nVersion: 1.0\n")
    other = keys(fork)
    assert keys(margins(tmp_path / "again")) == first
    assert len({first[0], newer[0], other[0]}) == 3
    assert len({first[1], newer[1], other[1]}) == 3
