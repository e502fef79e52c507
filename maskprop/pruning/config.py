"""What to prune, and how much: NNI's ``config_list`` and a short form, read into rules.

The short form is a ratio (``0.5``), or a dict from globs over module paths, or modules, to ratios
(``{"layer*.conv1": 0.3}``). What is named includes what is inside it.
Later rules win over earlier ones; what any rule excludes is never pruned.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from maskprop.errors import RatioError, SelectorError
from maskprop.pruning.groups import GRANULARITIES, Group, Groups

Pattern: TypeAlias = "str | nn.Module"
Config: TypeAlias = "float | Mapping[str, float] | Mapping[nn.Module, float] | Sequence[Mapping[str, Any]]"

_RATIOS = {  # NNI 3, and the names that NNI 2 had
    "sparse_ratio": "ratio",
    "sparsity": "ratio",
    "sparsity_per_layer": "ratio",
    "op_sparsity": "ratio",
    "total_sparsity": "ratio",
    "max_sparse_ratio": "most",
    "max_sparsity_per_layer": "most",
    "min_sparse_ratio": "least",
    "sparse_threshold": "threshold",
}
_POOLS = {"global_group_id": "pool", "dependency_group_id": "tie"}
_SELECTORS = (
    "op_types",
    "op_names",
    "op_names_re",
    "op_partial_names",
    "exclude_op_types",
    "exclude_op_names",
    "exclude_op_names_re",
)
_OTHERS = ("exclude", "granularity", "target_names")
_ANY_GRANULARITY = ("default", "out_channel", "per_channel")


@dataclass(frozen=True)
class Rule:
    """How much to prune of the modules that a rule names.

    Attributes:
        number: rules with a higher number win.
        ratio: share of units.
        threshold: units that score below it go, instead of a share.
        least, most: bounds on the share of each group.
        pool: groups of one pool compete with each other; ``None`` for each on its own.
        tie: groups with the same id lose the same units.
        granularity: of the groups to take; empty for the default ones.
    """

    number: int = 0
    ratio: float | None = None
    threshold: float | None = None
    least: float = 0.0
    most: float = 1.0
    pool: str | None = None
    tie: str | None = None
    granularity: tuple[str, ...] = ()


@dataclass
class Selection:
    """Rules by module path, and what is excluded."""

    rules: dict[str, Rule] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)

    def rule_of(self, group: Group) -> Rule | None:
        """The rule that applies to a group, by the modules that produce its units."""
        if any(path in self.excluded for path in group.modules) or group.name in self.excluded:
            return None
        found = [self.rules[path] for path in (*group.modules, group.name) if path in self.rules]
        if not found:
            return None
        rule = max(found, key=lambda r: r.number)
        wanted = group.granularity in rule.granularity if rule.granularity else group.default
        return rule if wanted else None


def select(
    model: nn.Module,
    groups: Groups,
    config: Config,
    *,
    ignore: Pattern | Iterable[Pattern] = (),
    granularity: str | Sequence[str] | None = None,
    ranking: str = "local",
    default_types: Sequence[type] = (),
) -> Selection:
    """Read a configuration.

    Args:
        model: whose modules are named.
        groups: whose names may be used, too.
        config: a ratio, a dict of globs, or NNI's list of dicts.
        ignore: globs over module paths and group names, or modules, that are never pruned.
        granularity: of the groups to take: ``"channel"``, ``"head"``, ``"head dim"`` and so on.
        ranking: ``"local"``: each group loses its ratio. ``"global"``: all compete. ``"isomorphic"``: groups
        with the
            same kinds of members compete.
        default_types: module types that a bare ratio applies to; all by default.

    Raises:
        SelectorError: a name, type, key or value is unknown.
        RatioError: a ratio is outside [0, 1).
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    names = list(dict.fromkeys([*paths, *(g.name for g in groups), *(p for g in groups for p in g.modules)]))
    if ranking not in ("local", "global", "isomorphic"):
        raise SelectorError(f"ranking is {ranking!r}; expected 'local', 'global' or 'isomorphic'.")
    base = Rule(pool=None if ranking == "local" else ranking, granularity=_granularities(granularity))
    found = Selection()
    if isinstance(config, (int, float)):
        rule = replace(base, ratio=_share("ratio", config))
        found.rules = {n: rule for n in names if not default_types or isinstance(paths.get(n), tuple(default_types))}
    elif isinstance(config, Mapping):
        patterns: Mapping[Any, float] = config
        for number, (pattern, ratio) in enumerate(patterns.items()):
            if pattern in (*_RATIOS, *_POOLS, *_SELECTORS, *_OTHERS) and pattern not in names:
                raise SelectorError(f"'{pattern}' is a key of NNI's entries, which come in a list. Write [{{...}}].")
            rule = replace(base, number=number, ratio=_share(str(pattern), ratio))
            found.rules |= dict.fromkeys(_match(pattern, names, paths), rule)
    elif not isinstance(config, (list, tuple)):
        raise SelectorError(
            f"the configuration is a {type(config).__name__}; expected a ratio (0.5), a dict of ratios "
            "({'layer1*': 0.3}), or NNI's list of dicts."
        )
    else:
        for number, entry in enumerate(config):
            _read_entry(found, number, entry, paths, base)
    for pattern in [ignore] if isinstance(ignore, (str, nn.Module)) else ignore:
        found.excluded |= set(_match(pattern, names, paths))
    return found


def _read_entry(
    found: Selection, number: int, entry: Mapping[str, Any], paths: Mapping[str, nn.Module], base: Rule
) -> None:
    if not isinstance(entry, Mapping):
        raise SelectorError(
            f"entry {number} of the configuration is a {type(entry).__name__}; expected a dict such as "
            f"{{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}}."
        )
    known = [*_RATIOS, *_POOLS, *_SELECTORS, *_OTHERS]
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise SelectorError(
                f"entry {number} of the configuration has the unknown key '{key}'."
                + (f" Did you mean '{close[0]}'?" if close else f" Known are {', '.join(known)}.")
            )
    chosen = _modules(number, entry, paths)
    if entry.get("exclude"):
        found.excluded |= chosen
        return
    values: dict[str, Any] = {_RATIOS[k]: entry[k] for k in _RATIOS if entry.get(k) is not None}
    if "ratio" not in values and "threshold" not in values:
        raise RatioError(
            f"entry {number} of the configuration says nothing about how much to prune. Give "
            "'sparse_ratio', 'sparse_threshold', or 'exclude': True."
        )
    for key in ("ratio", "least"):
        if key in values:
            values[key] = _share(f"entry {number}", values[key])
    most = values.get("most", 1.0)
    if not isinstance(most, (int, float)) or not values.get("least", 0.0) <= most <= 1:
        raise RatioError(
            f"entry {number}: max_sparse_ratio is {most!r}; it must be at most 1, and at least min_sparse_ratio "
            f"({values.get('least', 0.0)})."
        )
    if "total_sparsity" in entry:
        values["pool"] = f"entry {number}"
    values |= {_POOLS[k]: str(entry[k]) for k in _POOLS if entry.get(k) is not None}
    rule = replace(
        base,
        number=number,
        **values,
        granularity=_granularities(entry.get("granularity")) or base.granularity,
    )
    found.rules |= dict.fromkeys(chosen, rule)


def _modules(number: int, entry: Mapping[str, Any], paths: Mapping[str, nn.Module]) -> set[str]:
    """Paths that an entry selects, less those that it excludes."""
    where = f"entry {number} of the configuration"
    for key in _SELECTORS:
        if isinstance(entry.get(key), str):
            raise SelectorError(f"{where}: {key} is the text {entry[key]!r}; write a list, [{entry[key]!r}].")
    chosen = set(paths)
    if "op_types" in entry:
        chosen &= set().union(*(_of_type(where, t, paths) for t in entry["op_types"]))
    named = [key for key in ("op_names", "op_names_re", "op_partial_names") if key in entry]
    if named:
        chosen &= set().union(*(_named(where, key, value, paths) for key in named for value in entry[key]))
    for value in entry.get("exclude_op_types", ()):
        chosen -= _of_type(where, value, paths)
    for key in ("op_names", "op_names_re"):
        for value in entry.get(f"exclude_{key}", ()):
            chosen -= _named(where, key, value, paths)
    return chosen


def _of_type(where: str, name: str, paths: Mapping[str, nn.Module]) -> set[str]:
    if name == "default":
        return {
            p
            for p, m in paths.items()
            if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase))
        }
    found = {path for path, module in paths.items() if name in (c.__name__ for c in type(module).__mro__)}
    if not found:
        kinds = sorted({type(m).__name__ for m in paths.values()})
        close = difflib.get_close_matches(name, kinds, n=3) or kinds[:6]
        raise SelectorError(
            f"{where} names the type '{name}', of which the model has no module; it has "
            f"{', '.join(close)}. Correct the name."
        )
    return found


def _named(where: str, key: str, value: str, paths: Mapping[str, nn.Module]) -> set[str]:
    if key == "op_names":
        found = {value} & set(paths)
    elif key == "op_partial_names":
        found = {p for p in paths if value in p}
    else:
        try:
            found = {p for p in paths if re.fullmatch(value, p)}
        except re.error as error:
            raise SelectorError(f"{where}: '{value}' ({key}) is no regular expression: {error}.") from error
    if not found:
        close = difflib.get_close_matches(value, list(paths), n=3)
        raise SelectorError(
            f"{where} names '{value}' ({key}), which no module of the model is called."
            + (f" Did you mean {', '.join(map(repr, close))}?" if close else " Use the names of model.named_modules().")
        )
    return found


def _match(pattern: Pattern, names: Sequence[str], paths: Mapping[str, nn.Module]) -> list[str]:
    """The modules and groups that a glob or a module names, and those inside them."""
    if isinstance(pattern, nn.Module):
        whole = {path for path, module in paths.items() if module is pattern}
        if not whole:
            raise SelectorError(f"a {type(pattern).__name__} is named that is no part of the model. Take one that is.")
    else:
        whole = {n for n in names if fnmatchcase(n, pattern)}
    found = [n for n in names if n in whole or any(part in whole for part in _containers(n))]
    if not found:
        close = difflib.get_close_matches(str(pattern), names, n=3)
        raise SelectorError(
            f"'{pattern}' matches no module and no group."
            + (
                f" Did you mean {', '.join(map(repr, close))}?"
                if close
                else " Print prunable_groups(model, dummy_input) to see the names."
            )
        )
    return found


def _containers(name: str) -> Iterator[str]:
    """``a.b.c`` is in ``a.b`` and ``a``."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _granularities(value: object) -> tuple[str, ...]:
    if value is None or value in _ANY_GRANULARITY:
        return ()
    given = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for one in given:
        if one not in GRANULARITIES:
            raise SelectorError(
                f"granularity {one!r} is unknown; expected one of {', '.join(map(repr, GRANULARITIES))}."
            )
    return given


def _share(what: str, value: object) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value < 1:
        raise RatioError(
            f"{what}: the share to prune is {value!r}; it must be at least 0 and below 1 (0.5 prunes half "
            "of the units)."
        )
    return float(value)
