"""Which of several models enter a mean, and with what weights, by what they score. Knows the rules; measures nothing
itself.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from merger.evaluation import Measured, Score
from merger.methods.method import Choice, Judge, Method, Tried

_DIGITS = 6
_RATE = 0.1  # of Adam
_DECAYS = 0.9, 0.999  # of its moments

Models = Sequence[str | Method]
# The recipe of a mean of models, with weights or with equal ones.
Mean = Callable[[Models, list[float] | None], Method]
Selected = tuple[list[str | Method], list[float] | None, Choice]


def greedy(models: Models, mean: Mean, evaluation: Measured, judge: Judge) -> Selected:
    """The models whose mean scores best when they are added from the best on, each kept where the mean does not get
    worse (section 2 of the paper: `>=`; its published code has `>`). Equal scores keep the order of the recipe, and so
    do the models that are kept.
    """
    alone = judge.scores(list(models), evaluation)
    values = [score.metrics[evaluation.by] for score in alone]
    order = sorted(range(len(values)), key=lambda i: (values[i] if evaluation.lower_is_better else -values[i], i))
    kept, best = [order[0]], values[order[0]]
    steps = [Tried(_label(models[order[0]]), alone[order[0]].metrics, True)]
    for i in order[1:]:
        score = judge.score(mean([models[j] for j in sorted([*kept, i])], None), evaluation)
        value = score.metrics[evaluation.by]
        accepted = not evaluation.better(best, value)
        steps.append(Tried(f"+ {_label(models[i])}", score.metrics, accepted))
        if accepted:
            kept, best = sorted([*kept, i]), value
    choice = Choice("greedy soup", evaluation.by, _singles(models, alone), tuple(steps))
    return [models[i] for i in kept], None, choice


def learned(models: Models, mean: Mean, evaluation: Measured, judge: Judge, steps: int) -> Selected:
    """The models with the weights of the best mean on the way down the loss from equal weights: Adam on the logarithms
    of weights that a softmax makes positive and of sum 1, with the gradient over all of the data (section 2 of the
    paper). Where a model alone is better than all of these it stays alone.
    """
    alone = judge.scores(list(models), evaluation)
    tried: list[tuple[list[float], Score]] = []
    descent = _Descent(len(models))
    for _ in range(steps):
        weights = [round(float(weight), _DIGITS) for weight in descent.weights]
        score = judge.score(mean(models, weights), evaluation, along=models)
        tried.append((weights, score))
        descent.step(np.array(score.slopes))
    values = [score.metrics[evaluation.by] for score in (*(score for _, score in tried), *alone)]
    best = min(range(len(values)), key=lambda i: (values[i] if evaluation.lower_is_better else -values[i], i))
    told = tuple(Tried(_told(weights), score.metrics, i == best) for i, (weights, score) in enumerate(tried))
    single = best - len(tried)
    choice = Choice("learned soup", evaluation.by, _singles(models, alone, single), told)
    return ([models[single]], None, choice) if single >= 0 else (list(models), tried[best][0], choice)


class _Descent:
    """Adam (Kingma and Ba 2015, algorithm 1) on the logits of the weights."""

    def __init__(self, count: int) -> None:
        self._logits, self._steps = np.zeros(count), 0
        self._mean, self._square = np.zeros(count), np.zeros(count)

    @property
    def weights(self) -> NDArray[np.float64]:
        powers: NDArray[np.float64] = np.exp(self._logits - self._logits.max())
        return powers / np.sum(powers)

    def step(self, slopes: NDArray[np.float64]) -> None:
        """Go against the slopes of the loss along each model."""
        weights = self.weights
        gradient = weights * (slopes - weights @ slopes)  # through the softmax
        self._steps += 1
        first, second = _DECAYS
        self._mean = first * self._mean + (1 - first) * gradient
        self._square = second * self._square + (1 - second) * gradient**2
        mean, square = self._mean / (1 - first**self._steps), self._square / (1 - second**self._steps)
        self._logits -= _RATE * mean / (np.sqrt(square) + 1e-12)


def _singles(models: Models, scores: Sequence[Score], taken: int = -1) -> tuple[Tried, ...]:
    return tuple(
        Tried(_label(model), score.metrics, True if i == taken else None)
        for i, (model, score) in enumerate(zip(models, scores, strict=True))
    )


def _label(model: str | Method) -> str:
    return model if isinstance(model, str) else f"({model.method})"


def _told(weights: Sequence[float]) -> str:
    return "weights " + " ".join(f"{weight:.3f}" for weight in weights)
