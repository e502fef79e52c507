"""Carry out what was decided, with plainer means where the result turns out wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from maskprop.align.align import Alignment
from maskprop.errors import MaskpropError, RewriteError
from maskprop.rewrite.repair import Repair
from maskprop.rewrite.verification import Verification

log = logging.getLogger(__name__)


def carry_out(
    repair: Repair,
    alignment: Alignment,
    verification: Verification | None,
    stage: Callable[[str], AbstractContextManager[None]],
) -> Alignment:
    """Rewrite the model and compare: at first by all means, then without those that may have gone wrong.

    Args:
        repair: of the dense model.
        alignment: what is to leave.
        verification: what the result is held against.
        stage: takes the time of a stage.

    Returns:
        What left in the end.

    Raises:
        RewriteError: the model's forward cannot be made to follow any plan.
        VerifyError: the compact model computes something else, by whatever means.
    """

    def attempt() -> tuple[Alignment, MaskpropError | None]:
        with stage("rewrite"):
            try:
                done = repair.run(alignment)
            except RewriteError as error:
                if not repair.dead:
                    raise
                return alignment, error
        if verification is None:
            return done, None
        with stage("verify"):
            return done, verification.problem(repair.edits, done, bool(repair.generated))

    done, problem = attempt()
    if problem is not None and repair.dead:
        log.warning("%s Trying again with the layers of constant branches kept.", problem)
        repair.edits.rollback()
        alignment = repair.keep_dead()
        done, problem = attempt()
    for switch, used in (("may_name", repair.unread), ("may_generate", repair.generated)):
        if problem is not None and used:
            log.warning("%s Trying again with %s=False.", problem, switch)
            repair.edits.rollback()
            setattr(repair, switch, False)
            done, problem = attempt()
    if problem is not None:
        raise problem
    return done
