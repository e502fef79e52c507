"""Whether a speedup gave the masked model, smaller."""

from __future__ import annotations

import ast
import copy
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from .specimen import Inputs, Specimen, call
from .structure import Masks


@torch.no_grad()
def masked_reference(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of the model whose masked parameters are multiplied by their masks; tied ones stay tied."""
    reference = copy.deepcopy(model)
    parameters = dict(reference.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameters[name].mul_(mask.to(parameters[name].dtype))
    return reference


def tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of a nested output, in order; objects that are no pytrees are read by attribute."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += tensors([value for _, value in sorted(vars(leaf).items())])
    return found


def relative_error(actual: Any, expected: Any) -> float:
    """The largest relative L2 distance over the tensors of two nested outputs; inf where they do not match.

    Integer and bool tensors count as equal or infinitely wrong. A tensor that is zero where zero is expected
    has no error.
    """
    ours, theirs = tensors(actual), tensors(expected)
    if len(ours) != len(theirs):
        return float("inf")
    return max((_distance(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point() and not a.is_complex():
        return 0.0 if torch.equal(a, b) else float("inf")
    finite = torch.isfinite(b)
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not torch.isfinite(a[finite]).all():
        return float("inf")
    a, b = a[finite].double(), b[finite].double()
    difference, norm = float((a - b).norm()), float(b.norm())
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_masked(model: nn.Module, masks: Masks) -> int:
    """Elements that masks set to zero."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return int(sum((1 - mask).sum() * (parameters[name].numel() // mask.numel()) for name, mask in masks.items()))


@dataclass
class Result:
    """What became of one model under one masking.

    Attributes:
        outcome: ``exact``; ``mismatch`` (**wrong without an error**); ``refused`` (an error of the engine's
            family, the model unchanged); ``crashed`` (any other error, or a refusal that left its mark).
        before, after: numbers of parameters.
        masked: how many parameters the masks set to zero.
        error: the largest relative L2 distance to the masked model on fresh inputs.
        variation: how much the masked model's output depends on the input (relative L2); near zero, the
            check has nothing to see.
        seconds: spent in the speedup.
        how: how the model was rewritten, from the report.
        detail: the error, or what differs, or why nothing left.
        extra: ``generated`` (author's class -> what needed a generated forward), ``changed`` (author's class ->
            each expression that was changed -> whether it is ``literal`` or ``computed``; empty where the whole
            forward was generated), ``opaque`` (ops that nothing is known about), ``pinned`` (repairs that failed),
            ``concrete`` (traced on values).
    """

    outcome: str
    before: int = 0
    after: int = 0
    masked: int = 0
    error: float | None = None
    variation: float | None = None
    seconds: float = 0.0
    how: str = ""
    detail: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def smaller(self) -> bool:
        """Whether any parameter left."""
        return self.after < self.before


def check_speedup(
    model: nn.Module,
    inputs: Inputs,
    masks: Masks,
    fresh: Iterable[Inputs],
    *,
    tolerance: float = 1e-4,
    generate: bool = False,
    **options: Any,
) -> Result:
    """Speeds a model up, in place, and compares it with its masked self.

    Args:
        model: a model in eval mode; a fresh one for every call.
        inputs: the dummy input.
        masks: by ``"module.parameter"``.
        fresh: inputs to compare on; the second is compared with the first of the same batch size, too.
        tolerance: the relative L2 error up to which the result counts as exact.
        generate: compare ``model.generate`` too, with the cache on.
        options: more keyword arguments for ``ModelSpeedup``.

    Returns:
        What happened; exceptions of the speedup are results as well.
    """
    from maskprop import ModelSpeedup
    from maskprop.errors import MaskpropError

    fresh = list(fresh)
    before = count_parameters(model)
    reference = masked_reference(model, masks)
    masked = count_masked(model, masks)
    with torch.no_grad():
        expected = [call(reference, x) for x in fresh]
        variation = _variation(reference, inputs, fresh)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kind = type(model)
    result = Result("exact", before, before, masked, variation=variation)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            speedup = ModelSpeedup(model, inputs, masks, **options)
            compact = speedup.speedup_model()
    except MaskpropError as error:
        result.outcome, result.detail = "refused", f"{type(error).__name__}: {error}"
        if not _same_state(model, state):
            result.outcome, result.detail = "crashed", f"changed the model, then {result.detail}"
        return result
    except Exception as error:
        result.outcome, result.detail = "crashed", f"{type(error).__name__}: {error}"
        return result
    finally:
        result.seconds = time.perf_counter() - start
    result.after, result.how = count_parameters(compact), speedup.report.how
    result.extra = _rewriting(compact, speedup.report)
    if not result.smaller:
        reasons = Counter(kept.reason.text for kept in speedup.report.kept)
        result.detail = "; ".join(reason for reason, _ in reasons.most_common(3))
    if compact is not model or not isinstance(compact, kind):
        result.outcome, result.detail = "mismatch", f"another object or class: {type(compact).__name__}"
        return result
    try:
        with torch.no_grad():
            result.error = max(relative_error(call(compact, x), y) for x, y in zip(fresh, expected, strict=True))
            if result.error > tolerance:
                result.outcome, result.detail = "mismatch", f"relative error {result.error:.2e}"
            elif generate and not _same_tokens(compact, reference, fresh[0]):
                result.outcome, result.detail = "mismatch", "generate() gives other tokens"
    except Exception as error:
        result.outcome, result.detail = (
            "mismatch",
            f"the result does not run: {type(error).__name__}: {error}",
        )
    return result


def check_specimen(specimen: Specimen, model: nn.Module, masks: Masks, **options: Any) -> Result:
    """:func:`check_speedup` with the inputs of a specimen."""
    inputs, fresh = specimen.inputs(), specimen.fresh_inputs()
    return check_speedup(model, inputs, masks, fresh, generate=specimen.generates, **options)


def _rewriting(model: nn.Module, report: Any) -> dict[str, Any]:
    """What the report says about how a model was rewritten, classes instead of paths."""
    generated: dict[str, str] = {}
    changed: dict[str, dict[str, str]] = {}
    for where, reason in report.repair.generated.items():
        kind = type(model.get_submodule(where))
        author = f"{kind.__mro__[1].__module__}.{kind.__mro__[1].__qualname__}"
        generated[author] = reason
        changed.setdefault(author, {}).update(_changed(kind))
    facts = {
        "generated": generated,
        "changed": changed,
        "opaque": sorted(report.opaque),
        "pinned": list(report.repair.pinned),
        "concrete": report.concrete,
    }
    return {name: value for name, value in facts.items() if value}


def _changed(kind: Any) -> dict[str, str]:
    """The author's expressions in which numbers were changed; whether those stand there or are computed."""
    from maskprop.rewrite.authored import expression_at

    found = {}
    for patch in getattr(kind, "generated_patches", ()):
        expression = expression_at(kind, patch.place)
        names = [n for part in _parts(expression, patch) for n in ast.walk(part) if isinstance(n, ast.Name)]
        found[ast.unparse(expression)] = "computed" if names else "literal"
    return found


def _parts(expression: Any, patch: Any) -> list[ast.AST]:
    """What a patch changes of an expression; all of it where the number is not written as an argument."""
    if patch.kind == "number":
        operands = [expression.left, expression.right] if isinstance(expression, ast.BinOp) else []
        operands += [expression.value] if isinstance(expression, ast.AugAssign) else []
        operands += expression.args if isinstance(expression, ast.Call) else []
        return [part for part in operands if isinstance(part, ast.Constant)] or [expression]
    if patch.kind not in ("sizes", "argument", "parts") or isinstance(patch.at, str):
        return [expression]
    sizes = expression.comparators if isinstance(expression, ast.Compare) else expression.args[patch.at :]
    if isinstance(sizes[0], ast.Tuple | ast.List):
        sizes = sizes[0].elts
    if patch.kind in ("argument", "parts"):
        return list(sizes[:1])
    return [sizes[axis] if axis < len(sizes) else expression for axis, _, _ in patch.value]


def _variation(reference: nn.Module, inputs: Inputs, fresh: list[Inputs]) -> float:
    """Compares the first sample of the first fresh input with another sample drawn alike."""
    first = tensors(call(reference, fresh[0]))
    other = tensors(call(reference, fresh[1])) if len(fresh) > 1 else tensors(call(reference, inputs))
    values = [
        _distance(a[:1], b[:1])
        for a, b in zip(first, other, strict=False)
        if a.is_floating_point() and a.ndim and a[:1].shape == b[:1].shape
    ]
    return max(values, default=0.0)


def _same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(
        now[name].shape == value.shape and torch.equal(now[name].nan_to_num(), value.nan_to_num())
        for name, value in state.items()
    )


def _same_tokens(compact: Any, reference: Any, inputs: Inputs) -> bool:
    ids = inputs["input_ids"] if isinstance(inputs, dict) else inputs
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    return torch.equal(compact.generate(ids, **options), reference.generate(ids, **options))
