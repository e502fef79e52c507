"""The family of errors: everything that maskprop raises on purpose is a `MaskpropError`.

A message is one f-string that answers, in this order: where, what was expected and what came, why it
matters (where that is not plain), and what to do. A class that also derives from a built-in exception can
be caught as that one. Whoever raises leaves the model and the files as they were.
"""

from __future__ import annotations


class MaskpropError(Exception):
    """Base of all errors of maskprop."""


class MaskpropWarning(UserWarning):
    """Base of all warnings of maskprop: the result stands, but something about it should be known."""


class UnverifiedWarning(MaskpropWarning):
    """A comparison could not show anything."""


class OptionError(MaskpropError, ValueError):
    """An argument has a value that the function does not take."""


class ModelNameError(OptionError):
    """A model's name on the command line is not understood, or names nothing that is there."""


class StageError(MaskpropError, RuntimeError):
    """A method was called before the stage that it needs, or twice where once is the rule."""


# --- masks -----------------------------------------------------------------------------------------------


class MaskError(MaskpropError, ValueError):
    """Base of the errors about masks; the model is untouched."""


class NoMasksError(MaskError):
    """No masks were given and the model carries none of its own."""


class UnknownMaskError(MaskError):
    """The masks name something that is not a parameter of the model."""


class MaskShapeError(MaskError):
    """A mask neither has the shape of what it masks nor broadcasts to it."""


class MaskValueError(MaskError):
    """A mask is not a dense tensor of zeros and ones."""


class MaskDeviceError(MaskError):
    """A mask is on another device than the parameter that it masks."""


class MaskConflictError(MaskError):
    """Two masks for one parameter, under two names, say different things."""


class MaskFileError(MaskError):
    """A file of masks is missing, unreadable, unsafe, or does not hold masks."""


# --- the stages ------------------------------------------------------------------------------------------


class DummyInputError(MaskpropError, ValueError):
    """The model does not run on the dummy input."""


class TraceError(MaskpropError, RuntimeError):
    """The operations of the model could not be recorded."""


class GraphError(MaskpropError, RuntimeError):
    """A recorded graph, or the facts on it, break an invariant of theirs."""


class RuleError(MaskpropError, ValueError):
    """A rule is registered twice, or returns what a rule may not return."""


class UnsupportedOpError(MaskpropError, NotImplementedError):
    """An op has no rule, and the chosen inference may not probe it."""


class WrappedModelError(MaskpropError, ValueError):
    """The model, or a part of it, is wrapped for several devices or compiled."""


class MetaValueError(MaskpropError, RuntimeError):
    """The value of a tensor on the meta device is needed, and nothing was given that reads it."""


class PlanError(MaskpropError, RuntimeError):
    """No consistent plan exists, or a plan does not fit the model."""


class RewriteError(MaskpropError, RuntimeError):
    """The modules could not be made to follow the plan; the model is unchanged."""


class ReplaceError(RewriteError):
    """A replacer or replace function, often a user's, failed or returned what does not fit."""


class VerifyError(MaskpropError, RuntimeError):
    """The compact model does not compute what the masked one does; the model is unchanged."""


class NonFiniteError(MaskpropError, ArithmeticError):
    """A parameter, buffer or output holds nan or infinity, so that a zero mask does not hide its input."""


# --- pruning ---------------------------------------------------------------------------------------------


class GroupError(MaskpropError, LookupError):
    """A group does not exist, or was found in a way that cannot answer what is asked of it."""


class SelectorError(MaskpropError, ValueError):
    """A configuration names a module, type, group or key that does not exist."""


class RatioError(MaskpropError, ValueError):
    """A share to prune lies outside [0, 1), or would leave nothing of a group."""


class ScoreError(MaskpropError, ValueError):
    """Scores cannot be computed, have a wrong shape, or are not finite."""


class MaskingError(MaskpropError, RuntimeError):
    """Masks cannot be put on a model or taken off it."""


# --- storage ---------------------------------------------------------------------------------------------


class SaveError(MaskpropError, OSError):
    """A model could not be saved; what was in the directory before is as it was."""


class LoadError(MaskpropError, ValueError):
    """A saved model is missing, damaged, half-written, unsafe, or of another version."""


class ArchitectureError(MaskpropError, ValueError):
    """A model is not the dense architecture that a saved plan was made for."""


# --- surroundings ----------------------------------------------------------------------------------------


class MissingExtraError(MaskpropError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
