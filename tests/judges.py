"""Judges that make up what they are asked for, and one that measures in the process of the test."""

from merger.evaluation import Score
from merger.methods.method import Judge, open_source
from merger.sources import LocalSources


class Here(Judge):
    """Measures here, and remembers nothing."""

    def score(self, candidate, evaluation, key=None, along=()):
        from merger.scoring import score  # imports torch

        opened = [open_source(LocalSources(), model) for model in (candidate, *along)]
        return score(opened[0], evaluation, along=opened[1:])


class Table(Judge):
    """Scores by the models that a candidate is the mean of; notes what it was asked for."""

    def __init__(self, metric, values):
        self.metric, self.values, self.asked = metric, values, []

    def score(self, candidate, evaluation, key=None, along=()):
        models = (candidate,) if isinstance(candidate, str) else tuple(candidate.models)
        self.asked.append(models)
        value = self.values[frozenset(models)]
        return Score({self.metric: value}, "tokens", (value,), (1.0,))


def table(metric="loss", **values):
    """Of models whose names are letters: `ab` is the mean of a and b."""
    return Table(metric, {frozenset(models): value for models, value in values.items()})
