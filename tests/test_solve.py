"""What the solver lets leave, on relations written by hand."""

from __future__ import annotations

import torch

from maskprop.align.solve import Solution, never_empty
from maskprop.infer.coupling import Coupling


def test_no_row_leaves_with_a_unit_that_is_the_row_itself() -> None:
    """A row that is its own outer unit may not vouch for its inner one: the row is pinned, so the inner one stays."""
    c = Coupling()
    row, inner, outer_too, inner_too = torch.arange(4).split(1)
    c.size = 4
    c.triples = [(row, row, inner), (row, outer_too, inner_too)]
    c.factors = [(1, 1), (1, 2)]
    c.nonempty, c.read = [row], [torch.arange(4)]
    s = Solution(c, [torch.arange(4)])
    rounds = 0

    def check(s: Solution) -> object:
        nonlocal rounds
        rounds += 1
        assert rounds < 9, "the same group is restored again and again"
        return never_empty(c.nonempty)(s)

    s.solve({"empty": check})
    assert not s.removed.any()
