"""What is measured, required, and compared: conditions, errors of means, digests."""

import math

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from merger.errors import SourceError
from merger.evaluation import Classification, Evaluation, Harness, Score, Text, verdicts

ADAPTER = TypeAdapter(Evaluation)


def score(*sums: float, sizes: tuple[float, ...] | None = None, **metrics: float) -> Score:
    sizes = sizes or (1.0,) * len(sums)
    return Score(metrics or {"loss": sum(sums) / sum(sizes)}, "tokens", sums, sizes)


def test_a_task_is_told_by_its_name_and_one_file_is_a_list_of_one():
    made = ADAPTER.validate_python({"task": "text", "data": "a.txt", "better_than": "sources"})
    assert made == Text(data=["a.txt"], better_than=["sources"])
    assert made.by == "loss"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"task": "text", "data": "a", "metric": "accuracy"}, "'accuracy' is not measured; there are loss"),
        ({"task": "text", "data": "a", "require": {"accuracy": "> 0.5"}}, "'accuracy' is not measured"),
        ({"task": "text", "data": "a", "require": {"loss": "about 2"}}, "'about 2' is not a condition"),
        ({"task": "text", "data": "a", "require": {"loss": "<= 2.3.1"}}, "is not a condition"),
        ({"task": "text", "data": []}, "at least 1"),
        ({"task": "text", "data": "a", "contxt": 4}, "Extra inputs"),
        ({"task": "guess", "data": "a"}, "'text', 'classification', 'preferences', 'harness'"),
        ({"task": "harness", "tasks": ["arc_easy"]}, "Field required"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields, complaint):
    with pytest.raises(ValidationError, match=complaint):
        ADAPTER.validate_python(fields)


def test_the_digest_follows_settings_and_contents_but_not_what_is_required(tmp_path):
    data = tmp_path / "a.txt"
    data.write_text("one")
    first = Text(data=[str(data)]).key()
    assert Text(data=[str(data)], require={"loss": "<= 1"}, batch_size=2, metric="perplexity").key() == first
    assert Text(data=[str(data)], context=16).key() != first
    data.write_text("two")
    assert Text(data=[str(data)]).key() != first
    with pytest.raises(SourceError, match=r"missing\.txt"):
        Text(data=[str(tmp_path / "missing.txt")]).key()


def test_the_error_of_a_mean_is_that_of_the_definition():
    values = np.random.default_rng(0).normal(size=50)
    assert score(*values).error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert math.isnan(score(1.0).error)
    assert score(1.0).as_data()["error"] is None


def test_the_error_of_a_ratio_agrees_with_resampling():
    random = np.random.default_rng(1)
    sizes = random.integers(5, 40, 400).astype(float)
    sums = sizes * 3 + random.normal(size=400) * np.sqrt(sizes)
    rows = random.integers(0, 400, (4000, 400))
    resampled = (sums[rows].sum(1) / sizes[rows].sum(1)).std()
    assert score(*sums, sizes=tuple(sizes)).error == pytest.approx(resampled, rel=0.1)


def test_a_difference_is_taken_item_by_item():
    random = np.random.default_rng(2)
    hard = random.normal(size=100)
    better = hard - 0.1 + random.normal(size=100) * 1e-3
    difference, error = score(*better).minus(score(*hard))
    assert difference == pytest.approx(-0.1, abs=1e-3)
    assert error < 1e-3 < score(*hard).error
    with pytest.raises(ValueError, match="not of the same items"):
        score(1.0, 2.0).minus(score(1.0))


def test_conditions_are_judged_as_they_are_written():
    wanted = Text(data=["a"], require={"loss": "<= 2.5", "perplexity": "< 12"})
    found = verdicts(wanted, score(2.5, loss=2.5, perplexity=12.18), {})
    assert [verdict.passed for verdict in found] == [True, False]
    assert found[1].says == "perplexity 12.1800 < 12"


def test_equal_is_not_better():
    for evaluation, good, bad in [
        (Text(data=["a"]), score(1.0, 2.0, loss=1.5), score(1.0, 3.0, loss=2.0)),
        (Classification(data=["a"]), score(1.0, 1.0, accuracy=1.0), score(0.0, 1.0, accuracy=0.5)),
    ]:
        [better], [worse], [equal] = (
            verdicts(evaluation, a, {"base": b}) for a, b in [(good, bad), (bad, good), (good, good)]
        )
        assert (better.passed, worse.passed, equal.passed) == (True, False, False)
        assert "of base, " in better.says
        assert "on the same items" in better.says


def test_a_metric_of_the_harness_knows_its_direction():
    assert Harness(tasks=["wikitext"], metric="wikitext/word_perplexity").better(10.0, 11.0)
    assert Harness(tasks=["arc_easy"], metric="arc_easy/acc_norm").better(0.4, 0.3)
    [verdict] = verdicts(
        Harness(tasks=["a"], metric="a/acc", require={"a/f1": "> 0"}), score(1.0, **{"a/acc": 1.0}), {}
    )
    assert (verdict.passed, verdict.says) == (False, "a/f1 was not measured; there are a/acc")
