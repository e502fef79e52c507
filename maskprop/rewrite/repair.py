"""Make the compact model's ``forward`` agree with the plan.

The compact model is replayed. At the first op that is not what the plan expects, the module is known, and so are the
wanted and the actual sizes. In order of preference: set the module's attributes that hold an old size; generate a
forward for the module; pin the units of that op and solve again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from maskprop.align.align import Alignment, align
from maskprop.align.plan import AttributeChange, Plan
from maskprop.errors import ReplaceError, RewriteError
from maskprop.graph.graph import Graph, shape_of
from maskprop.graph.paths import lineage, within
from maskprop.graph.structure import tensors_in
from maskprop.graph.trace import Inputs
from maskprop.infer.coupling import Cut, Pin
from maskprop.infer.sweep import Inference
from maskprop.modules import modules_by_path
from maskprop.rewrite.apply import apply_plan, change_attribute
from maskprop.rewrite.attention import replace_attention
from maskprop.rewrite.attributes import Candidate, candidates_for, everywhere
from maskprop.rewrite.calls import recorded_calls
from maskprop.rewrite.dead import DeadLayer, find_dead, forget_dead, remove_dead
from maskprop.rewrite.edits import Edits
from maskprop.rewrite.generate import generate_forwards
from maskprop.rewrite.mismatch import Mismatch
from maskprop.rewrite.patch import patch_forwards
from maskprop.rewrite.patched import patched_settings
from maskprop.rewrite.replay import Replay
from maskprop.rewrite.roots import apply_roots, root_patches
from maskprop.rewrite.training import follow_training
from maskprop.rewrite.unread import unread_attributes

log = logging.getLogger(__name__)

# How often a solve may be repeated with more units pinned.
MAX_SOLVES = 24


@dataclass
class Repair:
    """Applies a plan to the model and mends its modules until the replay agrees.

    Attributes:
        edits: the model and its undo log.
        graph, inference: of the dense model.
        masks: by tensor name.
        inputs: the dummy input.
            constants, channel_multiple: see :func:`maskprop.align.align.align`.
        customize: applies users' replacements; returns the plan that is left and the paths they took over.
        dead: layers of constant branches, which lose their parameters.
        spared: modules whose layers must not.
        may_generate: whether forwards may be generated.
        may_name: whether attributes that nothing reads may follow.
        taken: paths that users' replacements took over.
        generated: paths of the modules that got a generated forward, with the reason.
        unread: changes of attributes that name a size and that ``forward`` does not read.
        pinned: why units were kept after a solve.
        auxiliary: paths of modules that only training runs, and that follow the others' sizes.
    """

    edits: Edits
    graph: Graph
    inference: Inference
    masks: Mapping[str, Tensor]
    inputs: Inputs
    constants: str = "exact"
    channel_multiple: int = 1
    customize: Callable[[Alignment], tuple[Plan, list[str]]] | None = None
    dead: list[DeadLayer] = field(default_factory=list)
    spared: set[str] = field(default_factory=set)
    may_generate: bool = True
    may_name: bool = True
    generated: dict[str, str] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    unread: list[AttributeChange] = field(default_factory=list)
    pinned: list[str] = field(default_factory=list)
    auxiliary: list[str] = field(default_factory=list)
    _failed: set[str] = field(default_factory=set)
    _treated: set[str] = field(default_factory=set)

    def run(self, alignment: Alignment) -> Alignment:
        """Apply the plan, mending or giving up units until the model follows it.

        Returns:
            The alignment that was carried out, its plan with the attribute changes.

        Raises:
            RewriteError: no plan could be followed.
        """
        pins: list[Pin] = []
        even: frozenset[str] = frozenset()
        mark = self.edits.mark()
        for _ in range(MAX_SOLVES):
            self.generated.clear()
            self._treated.clear()
            self.replaced.clear()
            plan, taken = (alignment.plan, []) if self.customize is None else self.customize(alignment)
            spared = [layer.path for layer in self.dead if within(layer.path, taken)]
            if spared:
                log.info("the user replaces layers that would have become constants: %s", spared)
                self.edits.rollback(mark)
                alignment, pins = self.keep_dead(spared), []
                continue
            masks = {n: m for n, m in self.masks.items() if not within(n, taken)}
            apply_plan(self.edits, plan, masks)
            remove_dead(self.edits, self.dead, alignment)
            if alignment.plan.empty and not self.dead:
                return alignment
            self.taken = taken
            self.replaced += replace_attention(self.edits, plan)
            replay = Replay(self.graph, alignment, [*self.replaced, *self.taken, *self.removed])
            mismatch = self._follow(alignment, replay)
            if mismatch is None:
                self._keep_roots(replay)
                done, self.auxiliary = follow_training(
                    self.edits, self.inference, self.inputs, alignment, replay.replaced
                )
                return done
            self._blame_custom(mismatch)
            log.info("units kept: %s", mismatch)
            self.edits.rollback(mark)
            uncut = self._uncut(alignment, replay, mismatch)
            parts = frozenset() if uncut else self._uneven(alignment, replay, mismatch)
            more = [] if uncut or parts else self._pins(alignment, replay, mismatch)
            if not uncut and not parts and not more:
                raise RewriteError(
                    f"the rewritten model does not follow the plan at {mismatch}, and nothing that could be "
                    "kept instead explains it. "
                    "The model is unchanged. Leave the masks of that module out, or give a customized_replacer for it."
                )
            self.pinned.append(str(mismatch))
            pins = [] if uncut else pins + more  # other cuts, other labels
            even |= parts
            cuts = alignment.coupling.cuts - uncut
            alignment = align(self.inference, self.constants, self.channel_multiple, tuple(pins), even, cuts)
        raise RewriteError(
            f"after {MAX_SOLVES} attempts the model still does not follow the plan; the last difference was "
            f"at {self.pinned[-1]}. The model is unchanged."
        )

    @property
    def removed(self) -> list[str]:
        """Paths of layers that became constants."""
        return [layer.path for layer in self.dead]

    def finish(self) -> None:
        """Let go of what only the repair needed: the undo log, which holds the dense tensors, and the speedup."""
        self.edits.commit()
        self.customize = None

    def keep_dead(self, paths: Collection[str] = ("",)) -> Alignment:
        """Go back to a plan in which the layers of constant branches keep their parameters, all or some of them."""
        self.spared.update(paths)
        forget_dead(self.inference)
        self.dead = find_dead(self.edits.model, self.graph, self.inference, self.inputs, self.spared)
        return align(self.inference, self.constants, self.channel_multiple)

    def _follow(self, alignment: Alignment, replay: Replay) -> Mismatch | None:
        """Mend the model, and name its sizes; the mismatch that remains, if any.

        Most models need no more than attributes: with those that name a size set already, and then perhaps a few
        that only the replay finds, one whole replay shows that all is well.
        """
        self.unread = []
        named = unread_attributes(self.edits.model, replay) if self.may_name else []
        if named:
            mark, attributes = self.edits.mark(), list(alignment.plan.attributes)
            for change in named:
                change_attribute(self.edits, change)
            mismatch = replay.run(self.edits.model, self.inputs)
            if self._mend(alignment, replay, mismatch, generating=False) is None:
                self.unread = named
                alignment.plan.attributes += named
                return None
            self.edits.rollback(mark)
            alignment.plan.attributes[:] = attributes
        mismatch = self._mend(alignment, replay, replay.run(self.edits.model, self.inputs))
        if mismatch is None and self.may_name:
            self._name_sizes(alignment, replay)
        return mismatch

    def _keep_roots(self, replay: Replay) -> None:
        """Keep the scales of branches that were not taken."""
        patches = root_patches(self.edits.model, replay) if self.may_generate else []
        for attempt in [patches, *([one] for one in patches)] if patches else []:
            mark = self.edits.mark()
            apply_roots(self.edits, attempt)
            if replay.run(self.edits.model, self.inputs) is None:
                reason = "a scale in a branch that the dummy input did not take"
                self.generated.update((path, reason) for path, _ in attempt)
                if attempt is patches:
                    return
            else:
                self.edits.rollback(mark)

    def _name_sizes(self, alignment: Alignment, replay: Replay) -> None:
        """Set the attributes that name a size which changed and that ``forward`` does not read."""
        model = self.edits.model
        alike: dict[tuple[type, str], list[AttributeChange]] = {}
        for change in unread_attributes(model, replay):
            alike.setdefault((type(model.get_submodule(change.module)), change.attribute), []).append(change)
        self.unread = self._set_harmless(replay, list(alike.values()))
        alignment.plan.attributes += self.unread

    def _set_harmless(self, replay: Replay, groups: Sequence[list[AttributeChange]]) -> list[AttributeChange]:
        """Set what the replay does not see; an attribute that ``forward`` reads means something else."""
        if not groups:
            return []
        mark = self.edits.mark()
        changes = [change for group in groups for change in group]
        for change in changes:
            change_attribute(self.edits, change)
        if replay.run(self.edits.model, self.inputs) is None:
            return changes
        self.edits.rollback(mark)
        half = len(groups) // 2
        return self._set_harmless(replay, groups[:half]) + self._set_harmless(replay, groups[half:]) if half else []

    def _blame_custom(self, mismatch: Mismatch) -> None:
        """Raises: ReplaceError: the difference comes out of a module that a user's replacement put there."""
        sources = [] if mismatch.op is None else [str(n.meta.get("path")) for n in mismatch.op.all_input_nodes]
        for path in [mismatch.path, *sources]:
            if within(path, self.taken):
                raise ReplaceError(
                    f"the module that was put in place of '{path}' does not fit: {mismatch}. The model is unchanged. "
                    "Return a module whose tensors have the sizes that the masks say."
                )

    # -- mending --------------------------------------------------------------------------------

    def _mend(
        self, alignment: Alignment, replay: Replay, mismatch: Mismatch | None, generating: bool = True
    ) -> Mismatch | None:
        """Repair attributes and (``generating``) forwards; the mismatch that remains, if any."""
        while mismatch is not None:
            after = self._set_attributes(alignment, replay, mismatch)
            if after is mismatch and generating:
                after = self._generate(alignment, replay, mismatch)
            if after is mismatch:
                return mismatch
            mismatch = after
        return None

    def _set_attributes(self, alignment: Alignment, replay: Replay, mismatch: Mismatch) -> Mismatch | None:
        """Try attributes that hold an old size; the next mismatch, or the same object if none helps."""
        candidates = candidates_for(self.edits.model, self.graph, replay, mismatch)
        first = list({(c.path, c.attribute): c for c in reversed(candidates)}.values())[::-1]
        own = [c for c in first if c.path == mismatch.path]
        jointly = [several for n in range(2, min(len(own), 4)) for several in itertools.combinations(own, n)]
        jointly += [tuple(own)] if own == first else [tuple(own), tuple(first)]
        for attempt in [*((c,) for c in candidates), *(several for several in jointly if len(several) > 1)]:
            mark = self.edits.mark()
            after, changes = self._try(replay, attempt)
            if after is not None and after.index <= mismatch.index:
                self.edits.rollback(mark)
                continue
            rivals = [(c,) for c in candidates if after is not None and c.place == attempt[0].place]
            if len(attempt) == 1 < len(rivals):  # several sizes were equal, and the attribute holds one of them
                progress: dict[Sequence[Candidate], int] = {}
                for rival in rivals:
                    self.edits.rollback(mark)
                    after, _ = self._try(replay, rival)
                    progress[rival] = len(replay.ops) + 1 if after is None else after.index
                self.edits.rollback(mark)
                after, changes = self._try(replay, max(rivals, key=progress.__getitem__))
            alignment.plan.attributes += changes
            self.generated.update(
                (c.module, str(mismatch)) for c in changes if c.attribute in patched_settings(self._class_of(c.module))
            )
            return after
        return mismatch

    def _try(self, replay: Replay, attempt: Sequence[Candidate]) -> tuple[Mismatch | None, list[AttributeChange]]:
        """Set attributes, here and in the modules alike; the first mismatch then."""
        changes = [change for candidate in attempt for change in everywhere(self.edits.model, replay, candidate)]
        for change in changes:
            change_attribute(self.edits, change)
        return replay.run(self.edits.model, self.inputs), changes

    def _class_of(self, path: str) -> type:
        return type(self.edits.model.get_submodule(path))

    def _generate(self, alignment: Alignment, replay: Replay, mismatch: Mismatch) -> Mismatch | None:
        """Generate a forward for the module at fault and its like; as :meth:`_set_attributes`."""
        if mismatch.path in self._treated or not self.may_generate:
            return mismatch
        kind = self._class_of(mismatch.path)
        paths = [
            path
            for path, module in modules_by_path(self.edits.model).items()
            if type(module) is kind and path not in self._treated and self._changes(replay, path)
        ]
        mark = self.edits.mark()
        calls = recorded_calls(self.edits, self.graph, paths, self.inputs)
        done = patch_forwards(self.edits, replay, calls)
        rest = {path: arguments for path, arguments in calls.items() if path not in done}
        done += generate_forwards(self.edits, replay, rest) if mismatch.path in rest else []
        self._failed = set(paths) - set(done) if done else set()
        after = replay.run(self.edits.model, self.inputs)
        if mismatch.path in done and (after is None or after.index > mismatch.index):
            self.generated.update({p: str(mismatch) for p in done})
            self._treated.update(done)
            return after
        self.edits.rollback(mark)
        return mismatch

    def _changes(self, replay: Replay, path: str) -> bool:
        """Whether anything that a module is called with or computes itself has another size in the compact model."""
        given = tensors_in(self.graph.calls.get(path), kind=fx.Node)
        shapes = [(shape_of(node), replay.alignment.expected_shape(node)) for _, node in given]
        return any(old != new for old, new in itertools.chain(shapes, *map(replay.around, replay.ops_of(path))))

    # -- giving up ------------------------------------------------------------------------------

    @staticmethod
    def _uncut(alignment: Alignment, replay: Replay, mismatch: Mismatch) -> frozenset[Cut]:
        """Operands of the class at fault that are cut on entry: those shall come whole again before anything else."""
        kind = None if mismatch.op is None else mismatch.op.meta["module"]
        names = {n.name for n in replay.ops if n.meta["module"] is kind}
        return frozenset(cut for cut in alignment.coupling.cuts if cut[0] in names)

    @staticmethod
    def _uneven(alignment: Alignment, replay: Replay, mismatch: Mismatch) -> frozenset[str]:
        """Ops of the class at fault whose equal parts became unequal: those shall stay equal before anything else."""
        kind = None if mismatch.op is None else mismatch.op.meta["module"]
        cuts = [n for n in replay.ops if n.meta["module"] is kind and n.name in alignment.coupling.uneven]
        return frozenset(n.name for n in cuts if any(old != new for old, new in replay.around(n)))

    def _pins(self, alignment: Alignment, replay: Replay, mismatch: Mismatch) -> list[Pin]:
        """Pin what leaves at the op at fault, and at the same op in the other modules of its class.

        Where a forward could be generated for some of those modules, only the others are pinned.
        """
        if mismatch.op is None:
            return self._pin_around(alignment, replay, mismatch.path)
        kind = mismatch.op.meta["module"]
        position = replay.position(mismatch.op)
        found: list[Pin] = []
        for node in replay.ops:
            alike = (
                node.meta["module"] is kind and node.target is mismatch.op.target and replay.position(node) == position
            )
            if alike and (mismatch.path not in self._failed or node.meta["path"] in self._failed):
                found += self._pin_node(alignment, node)
        if not found:  # nothing leaves at the op itself: the module's other ops must be at fault
            for node in replay.ops:
                if node.meta["module"] is kind:
                    found += self._pin_node(alignment, node)
        return found or self._pin_around(alignment, replay, mismatch.path)

    def _pin_around(self, alignment: Alignment, replay: Replay, path: str) -> list[Pin]:
        """Pin what a module is called with, or else whatever leaves in it, or else around it."""
        for outer in lineage(path):
            given = [node for _, node in tensors_in(self.graph.calls.get(outer), kind=fx.Node)]
            inside = [n for n in replay.ops if within(str(n.meta["path"]), [outer])]
            for nodes in (given, inside):
                found = [pin for node in nodes for pin in self._pin_node(alignment, node)]
                if found:
                    return found
        return []

    @staticmethod
    def _pin_node(alignment: Alignment, node: fx.Node) -> list[Pin]:
        found = []
        for one in [node, *node.all_input_nodes]:
            labels = alignment.coupling.labels.get(one)
            for array in (a for part in (labels if isinstance(labels, tuple) else [labels or []]) for a in part):
                if array is not None and alignment.solution.leaves(array).any():
                    found.append(
                        Pin(
                            array,
                            f"{node.target} in '{node.meta.get('path', '')}' could not be made to follow",
                            node.name,
                        )
                    )
        return found
