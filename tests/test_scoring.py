"""What models measure, against transformers' own losses and against arithmetic by hand."""

import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from merger import scoring
from merger.checkpoint import open_checkpoint
from merger.errors import NotEnoughMemory, SourceError, UnsupportedModel
from merger.evaluation import Classification, Harness, Preferences, Text
from merger.loading import state_dict
from merger.methods.combination import weighted_sum
from merger.methods.method import Member
from merger.methods.soups import Soup
from merger.scoring import score
from merger.sources import LocalSources
from tests import tiny

TEXTS = ["The quick brown fox jumps over the lazy dog, again and again.", "Grüße aus Köln — naïve café!", "x"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny.save(folder / f"m{seed}", "llama", seed=seed, vocab_size=260)
        tiny.byte_tokenizer(folder / f"m{seed}")
    return folder


def jsonl(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return [str(path)]


def of(folder):
    return open_checkpoint(folder)


def nats(model, tokens):
    """transformers' own loss, summed over the predicted tokens."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item() * (len(tokens) - 1)


# ---- text ---------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_transformers_over_windows_that_cross_no_texts(language_model, tmp_path):
    data = jsonl(tmp_path / "data.jsonl", *({"text": text} for text in TEXTS))
    found = score(of(language_model / "m0"), Text(data=data, context=16, batch_size=3))
    model = tiny.load(language_model / "m0")
    windows = []
    for text in TEXTS:
        ids = tiny.tokens_of(text)
        windows += [ids[at : at + 16] for at in range(0, len(ids) - 1, 16) if len(ids[at : at + 16]) > 1]
    wanted = [nats(model, window) for window in windows]
    assert found.sums == pytest.approx(wanted, rel=1e-5)
    assert found.sizes == tuple(float(len(window) - 1) for window in windows)
    loss = sum(wanted) / sum(found.sizes)
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.unit == "tokens"
    # One token is one byte here; a window that ends within a letter of two bytes counts all of the letter.
    assert found.metrics["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=0.02)


def test_a_file_that_is_not_jsonl_is_one_text_and_batches_change_nothing(language_model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0] * 5)
    scores = [
        score(of(language_model / "m0"), Text(data=[str(tmp_path / "a.txt")], context=20, batch_size=size))
        for size in (1, 4, 64)
    ]
    assert len(scores[0].sums) == math.ceil((5 * len(TEXTS[0]) - 1) / 20)
    for other in scores[1:]:
        assert other.sums == pytest.approx(scores[0].sums, rel=1e-6)


def test_special_tokens_stand_for_no_bytes(tmp_path):
    """A tokenizer that puts tokens around a text, as most do: the bytes are those of the text after its first token."""
    tiny.save(tmp_path / "m", "llama", vocab_size=260)
    tiny.byte_tokenizer(tmp_path / "m")
    made = AutoTokenizer.from_pretrained(tmp_path / "m")
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ends = [("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    made.save_pretrained(tmp_path / "m")
    (tmp_path / "a.txt").write_text(TEXTS[0])
    found = score(of(tmp_path / "m"), Text(data=[str(tmp_path / "a.txt")]))
    assert found.count == len(TEXTS[0]) + 1  # all of it, and the end
    assert found.metrics["bits_per_byte"] == pytest.approx(math.fsum(found.sums) / math.log(2) / len(TEXTS[0]))


def test_code_of_a_model_is_never_run(language_model, tmp_path):
    shutil.copytree(language_model / "m0", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "a.txt").write_text(TEXTS[0])
    with pytest.raises(UnsupportedModel, match=r"m: .*custom"):
        score(of(tmp_path / "m"), Text(data=[str(tmp_path / "a.txt")]))
    assert not (tmp_path / "ran").exists()


def test_a_limit_takes_the_first_windows(language_model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0] * 5)
    whole, part = (
        score(of(language_model / "m0"), Text(data=[str(tmp_path / "a.txt")], context=20, limit=limit))
        for limit in (None, 3)
    )
    assert part.sums == pytest.approx(whole.sums[:3], rel=1e-6)


def test_a_recipe_is_measured_without_being_written(language_model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    folders = [str(language_model / name) for name in ("m0", "m1")]
    mean = LocalSources().open(Member(Soup(models=folders), None))
    found = score(mean, Text(data=[str(tmp_path / "a.txt")]))
    a, b = (tiny.load(language_model / name) for name in ("m0", "m1"))
    with torch.no_grad():
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            x.add_(y).div_(2)
    assert math.fsum(found.sums) == pytest.approx(nats(a, tiny.tokens_of(TEXTS[0])), rel=1e-5)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_tensors_of_every_shape_and_dtype_come_through(language_model):
    model = tiny.load(language_model / "m0")
    made = state_dict(of(language_model / "m0"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(made[name], tensor)


# ---- classifiers and reward models --------------------------------------------------------------------


def classifier(folder, labels, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(**{**tiny.SIZES, "vocab_size": 260}, num_labels=labels)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.score.weight.normal_(0, 1)
    model.save_pretrained(folder)
    tiny.byte_tokenizer(folder)
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0]


def test_accuracy_counts_the_largest_logits(tmp_path):
    model = classifier(tmp_path / "m", 3)
    random = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(3, 260, (length,), generator=random).tolist(), "label": label}
        for length, label in [(5, 0), (9, 1), (5, 2), (7, "LABEL_1"), (5, 1)]
    ]
    found = score(of(tmp_path / "m"), Classification(data=jsonl(tmp_path / "d.jsonl", *rows), batch_size=2))
    labels = [0, 1, 2, 1, 1]
    outputs = [logits(model, row["input_ids"]) for row in rows]
    assert found.sums == tuple(float(out.argmax() == label) for out, label in zip(outputs, labels, strict=True))
    losses = [-out.log_softmax(0)[label].item() for out, label in zip(outputs, labels, strict=True)]
    assert found.metrics["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_preferences_count_the_pairs_that_stand_the_right_way(tmp_path):
    model = classifier(tmp_path / "m", 1)
    rows = [
        {"prompt": "Say: ", "chosen": "yes", "rejected": "no, not at all"},
        {"prompt": "Say: ", "chosen": "never", "rejected": "always"},
        {"chosen": "same", "rejected": "same"},
    ]
    found = score(of(tmp_path / "m"), Preferences(data=jsonl(tmp_path / "d.jsonl", *rows)))

    def reward(text):
        return logits(model, tiny.tokens_of(text)).item()

    margins = [reward(r.get("prompt", "") + r["chosen"]) - reward(r.get("prompt", "") + r["rejected"]) for r in rows]
    assert found.sums == (float(margins[0] > 0), float(margins[1] > 0), 0.5)
    wanted = sum(math.log1p(math.exp(-margin)) for margin in margins) / 3
    assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-5)


# ---- slopes -------------------------------------------------------------------------------------------


ROWS = [{"chosen": "yes", "rejected": "no, not at all", "text": "up we go", "label": i % 2} for i in range(3)]


@pytest.mark.parametrize(
    ("kind", "task"),
    [("AutoModelForCausalLM", Text), (None, Classification), (None, Preferences)],
)
def test_slopes_are_how_the_loss_grows_along_other_models(kind, task, tmp_path):
    labels = 1 if task is Preferences else 2
    for seed in range(3):
        if kind:
            tiny.save(tmp_path / f"m{seed}", "llama", seed=seed, vocab_size=260)
            tiny.byte_tokenizer(tmp_path / f"m{seed}")
        else:
            classifier(tmp_path / f"m{seed}", labels, seed)
    evaluation = task(data=jsonl(tmp_path / "d.jsonl", *ROWS), batch_size=2)
    models = [open_checkpoint(tmp_path / f"m{seed}") for seed in range(3)]
    found = score(models[0], evaluation, along=models)
    assert len(found.slopes) == 3
    assert replace(found, slopes=()) == replace(score(models[0], evaluation), slopes=())
    step = 1e-3
    for along, slope in zip(models, found.slopes, strict=True):
        ends = [score(weighted_sum([models[0], along], [1.0, sign * step]), evaluation) for sign in (1, -1)]
        rise = (ends[0].metrics["loss"] - ends[1].metrics["loss"]) / (2 * step)
        assert slope == pytest.approx(rise, rel=0.02, abs=2e-4)


# ---- what cannot be measured --------------------------------------------------------------------------


def test_a_model_that_does_not_fit_into_memory_is_refused_with_both_numbers(language_model, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "free_memory", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match=r"takes [\d,]+ bytes of memory, 1,000 are free"):
        score(of(language_model / "m0"), Text(data=[str(tmp_path / "a.txt")]))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "a"', "line 1: is not JSON"),
        ('{"text": "abc"}\n[1]', "line 2: is not an object"),
        ('{"txt": "abc"}', "line 1: has no field 'text'; it has txt"),
        ('{"text": "a"}', "holds no text of two tokens or more"),
    ],
)
def test_bad_rows_are_named(language_model, tmp_path, content, complaint):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(SourceError, match=complaint):
        score(of(language_model / "m0"), Text(data=[str(tmp_path / "d.jsonl")]))


def test_a_label_that_the_model_has_not_is_named(tmp_path):
    classifier(tmp_path / "m", 2)
    rows = jsonl(tmp_path / "d.jsonl", {"text": "a", "label": "sad"})
    with pytest.raises(SourceError, match="'sad' is none of the model's labels LABEL_0, LABEL_1"):
        score(of(tmp_path / "m"), Classification(data=rows))


def test_a_classifier_is_no_reward_model_and_a_language_model_no_classifier(language_model, tmp_path):
    classifier(tmp_path / "m", 2)
    pairs = jsonl(tmp_path / "d.jsonl", {"chosen": "a", "rejected": "b"})
    with pytest.raises(UnsupportedModel, match="has 2 labels; a reward model has one"):
        score(of(tmp_path / "m"), Preferences(data=pairs))
    with pytest.raises(UnsupportedModel, match=r"1 tensors are missing .*score\.weight first"):
        score(of(language_model / "m0"), Preferences(data=pairs))


# ---- the harness --------------------------------------------------------------------------------------


@pytest.fixture
def lm_eval(monkeypatch):
    """What merger uses of lm-evaluation-harness, which the tests do not install; the names are those of 0.4.13."""
    asked = {}

    def simple_evaluate(**arguments):
        asked.update(arguments)
        return {"results": {"quiz": {"alias": "quiz", "acc,none": 0.75, "acc_stderr,none": 0.1, "f1,none": 0.5}}}

    parts = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models": SimpleNamespace(),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=SimpleNamespace),
        "lm_eval.tasks": SimpleNamespace(TaskManager=SimpleNamespace),
    }
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    return asked


def test_the_harness_measures_the_loaded_model(language_model, lm_eval):
    evaluation = Harness(tasks=["quiz"], metric="quiz/f1", num_fewshot=2, limit=5, batch_size=3)
    found = score(of(language_model / "m0"), evaluation)
    assert found.metrics == {"quiz/f1": 0.5, "quiz/acc": 0.75}
    assert next(iter(found.metrics)) == "quiz/f1"
    assert (lm_eval["tasks"], lm_eval["num_fewshot"], lm_eval["limit"]) == (["quiz"], 2, 5)
    assert lm_eval["model"].pretrained.config.model_type == "llama"
    assert lm_eval["model"].batch_size == 3


def test_a_metric_that_the_harness_did_not_give_is_told(language_model, lm_eval):
    with pytest.raises(SourceError, match="quiz/exact was not measured; there are quiz/acc, quiz/f1"):
        score(of(language_model / "m0"), Harness(tasks=["quiz"], metric="quiz/exact"))
