"""What the solver lets leave, on relations written by hand."""

from __future__ import annotations

import torch

from maskprop.align.solve import Solution, never_empty, regularity
from maskprop.infer.coupling import Axis, Coupling, Pin, owned_axes


def test_no_row_leaves_with_a_unit_that_is_the_row_itself() -> None:
    """A row that is its own outer unit may not vouch for its inner one: the row is pinned, so the inner one stays."""
    c = Coupling()
    row, inner, outer_too, inner_too = torch.arange(4).split(1)
    c.size = 4
    c.triples = [(row, row, inner), (row, outer_too, inner_too)]
    c.factors = [(1, 1), (1, 2)]
    c.nonempty, c.read = [Axis((row,), 0)], [torch.arange(4)]
    s = Solution(c, [torch.arange(4)])
    rounds = 0

    def check(s: Solution) -> object:
        nonlocal rounds
        rounds += 1
        assert rounds < 9, "the same group is restored again and again"
        return never_empty(c.nonempty)(s)

    s.solve({"empty": check})
    assert not s.removed.any()


def test_what_is_left_of_an_axis_is_where_others_are_kept() -> None:
    """Of a grouped kernel (groups, units) the first group leaves: the unit that stays is another group's."""
    c = Coupling()
    groups, units = torch.arange(3).reshape(3, 1), torch.arange(3, 9).reshape(3, 2)
    c.size, c.read = 9, [torch.arange(9)]
    c.pins = [Pin(groups[1:], "is read", "")]
    axes = owned_axes([[groups, units]])
    s = Solution(c, [groups, units])
    s.solve({"empty": never_empty(axes), "even": regularity([axes[1]])})
    assert s.leaves(units).tolist() == [[True, True], [False, True], [False, True]]
