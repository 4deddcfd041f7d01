"""Rows of a pass, laid end to end."""

from __future__ import annotations

from dti_ray.data.packing import end_to_end, pack
from tests.builders import make_config, make_sequences, make_table, train_spec


def test_rows_end_to_end_are_one_row_with_the_same_prompts() -> None:
    table, config = make_table(prefix=3), make_config("packing.n=4")
    rows = list(pack(make_sequences([14, 5, 23]), table, train_spec(config, k=5, row_tokens=80)))
    assert len(rows) > 2
    joined = end_to_end(rows)
    assert joined.size_tokens == sum(row.size_tokens for row in rows) - 3 * (len(rows) - 1)
    assert sorted(set(joined.prompt.tolist())) == list(range(1, 1 + sum(int(row.prompt.max()) for row in rows)))
    begin = first = 0
    for row in rows:
        end, last = begin + len(row.tokens), first + row.targets
        assert (joined.tokens[begin:end] == row.tokens).all()
        assert (joined.prompt[begin:end] - row.prompt == joined.prompt[begin] - 1).all()
        assert (joined.after[first:last] == row.after + begin).all()
        assert (joined.users[first:last] == row.users).all()
        begin, first = end, last
    assert end_to_end(rows[:1]) is rows[0]
