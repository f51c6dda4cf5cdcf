import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from merger.token_rows import Given, own_rows, rows_of

RULES = st.one_of(st.just("zero"), st.just("default"), st.tuples(st.integers(0, 2), st.integers(0, 9)))


def naive(own, base, said, model, number):
    """The terms of a row by the rules, one after the other."""
    having = [(other, int(own[other][number])) for other in range(len(own)) if own[other][number] >= 0]
    rule = said.get(number)
    if own[model][number] >= 0 and not (rule and rule.force):
        return [(model, int(own[model][number]))]
    if rule and rule.row == "zero":
        return []
    if rule and rule.row != "default":
        return [rule.row]
    mine = [term for term in having if term[0] == base]
    return mine or having


def terms(rows):
    """A list of (source, row) for each row."""
    pairs = list(zip(rows.source.tolist(), rows.row.tolist(), strict=True))
    return [pairs[a:b] for a, b in zip(rows.ends[:-1], rows.ends[1:], strict=True)]


@given(st.data())
def test_rows_follow_the_rules(data):
    count = data.draw(st.integers(1, 12))
    own = np.array(
        data.draw(st.lists(st.lists(st.integers(-1, 9), min_size=count, max_size=count), min_size=3, max_size=3))
    )
    base = data.draw(st.sampled_from([None, 0, 1, 2]))
    said = data.draw(st.dictionaries(st.integers(0, count - 1), st.builds(Given, RULES, st.booleans()), max_size=4))
    for model, rows in enumerate(rows_of(own, base, said)):
        assert terms(rows) == [naive(own, base, said, model, number) for number in range(count)]


def test_ids_that_a_model_lacks_have_no_row():
    assert own_rows([{0: 5, 2: 1}, {}], 3).tolist() == [[5, -1, 1], [-1, -1, -1]]
