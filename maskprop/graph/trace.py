"""Trace a model to a :class:`Graph` by running it once on fake, real or meta tensors."""

from __future__ import annotations

import functools
import logging
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from maskprop.errors import DummyInputError, MaskpropError, TraceError
from maskprop.graph.caches import caches_emptied
from maskprop.graph.graph import Graph
from maskprop.graph.memory import Memory, remembered
from maskprop.graph.randomness import generators_kept
from maskprop.graph.record import Recorder
from maskprop.graph.shapes import as_fake
from maskprop.graph.structure import map_each_once, map_tensors, tensors_in
from maskprop.graph.wrapping import Function, noting_readers, wrapped
from maskprop.modules import modules_by_path, of_torch

log = logging.getLogger(__name__)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Tracer = Callable[[nn.Module, Inputs], Graph]


def split_inputs(dummy_input: Any) -> Inputs:
    """Positional and keyword arguments of a dummy input, by the convention of ``torch.onnx.export``.

    Args:
        dummy_input: a tensor; a tuple or list of positional arguments, whose last item may be a dict of keyword
            arguments; or a dict of keyword arguments.

    Raises:
        DummyInputError: it is none of these.
    """
    if isinstance(dummy_input, Tensor):
        return (dummy_input,), {}
    if isinstance(dummy_input, Mapping):
        return (), dict(dummy_input)
    if isinstance(dummy_input, (tuple, list)):
        if dummy_input and isinstance(dummy_input[-1], dict):
            return tuple(dummy_input[:-1]), dict(dummy_input[-1])
        return tuple(dummy_input), {}
    raise DummyInputError(
        f"dummy_input is a {type(dummy_input).__name__}; expected a tensor, a tuple or list of positional "
        "arguments, or a dict of "
        "keyword arguments. Wrap a single argument of another type in a tuple."
    )


def trace(
    model: nn.Module, inputs: Inputs, tracer: str | Tracer = "auto", masks: Mapping[str, Tensor] | None = None
) -> Graph:
    """Record one forward pass in evaluation mode.

    Args:
        model: left as it was, even where ``forward`` caches tensors on modules or writes to buffers.
        inputs: positional and keyword arguments.
        tracer: ``"fake"``, ``"concrete"``, ``"meta"``, a function of ``(model, inputs)``, or ``"auto"``: fake
            tensors first, the real input where a value or a data-dependent shape is read.
        masks: by the names of the model's tensors. Where ``forward`` reads a value, it is that of the masked model.

    Raises:
        DummyInputError: ``forward`` fails on the input.
        TraceError: the chosen tracer cannot run the model, its graph is malformed, or ``forward`` remembers in plain
            attributes what the next call reads.
    """
    if callable(tracer):
        try:
            graph = tracer(model, inputs)
        except MaskpropError:
            raise
        except Exception as error:
            name = getattr(tracer, "__name__", type(tracer).__name__)
            raise TraceError(
                f"the tracer {name} failed with {type(error).__name__}: {error}. The model is unchanged. "
                "Mend the tracer, or leave the choice to tracer='auto'."
            ) from error
        return _checked(graph)
    on_meta = any(p.is_meta for p in model.parameters())
    if tracer == "auto" and not on_meta:
        try:
            with quiet():
                return _checked(_trace(model, inputs, concrete=False, masks=masks))
        except MaskpropError:
            raise
        except Exception as error:  # any failure on fake tensors only means that real ones are needed
            log.info("tracing on fake tensors failed (%s: %s); using the real input", type(error).__name__, error)
            tracer = "concrete"
    elif tracer == "auto":
        tracer = "meta"
    if tracer not in ("fake", "concrete", "meta"):
        raise TraceError(
            f"tracer is {tracer!r}; expected 'auto', 'fake', 'concrete', 'meta' or a function of (model, inputs)."
        )
    if tracer == "meta":
        inputs = map_tensors(inputs, lambda t: t.to("meta"))
    try:
        if tracer == "concrete":
            with masked_tensors(model, masks or {}):
                return _checked(_trace(model, inputs, concrete=True))
        return _checked(_trace(model, inputs, concrete=False, masks=masks))
    except MaskpropError:
        raise
    except Exception as error:
        raise DummyInputError(
            f"the forward of {type(model).__name__} failed on the dummy input with {type(error).__name__}: {error}. "
            f"It was called with {describe_inputs(inputs)}. Check `model(*args, **kwargs)` by hand first."
        ) from error


def describe_inputs(inputs: Inputs) -> str:
    """Shapes and dtypes of the arguments, for messages."""
    shapes = [
        f"{path or 'input'}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for path, t in tensors_in(inputs)
    ]
    return ", ".join(shapes) or "no tensors"


def trace_partial(
    model: nn.Module, inputs: Inputs, concrete: bool, training: bool = False
) -> tuple[Graph, Exception | None, str]:
    """Record a forward pass that may fail: what was recorded, the exception, and the module path where it arose.

    ``training`` is for the author's modules; torch's own layers are in evaluation mode whatever it is. The exception
    comes without its traceback, whose frames would keep the model alive.
    """
    try:
        with quiet():
            return _trace(model, inputs, concrete, training=training), None, ""
    except Exception as error:  # the caller reads it
        recorder = getattr(error, "_maskprop_recorder", None)
        if recorder is None:
            raise
        del error._maskprop_recorder  # type: ignore[attr-defined]
        recorder.mark_unread()
        return recorder.graph, error.with_traceback(None), recorder.last_path


def _trace(
    model: nn.Module,
    inputs: Inputs,
    concrete: bool,
    masks: Mapping[str, Tensor] | None = None,
    training: bool = False,
) -> Graph:
    recorder = Recorder(model, concrete, masks)
    recorder.graph.training = training
    return record(recorder, model, inputs)


def record(recorder: Recorder, model: nn.Module, inputs: Inputs) -> Graph:
    """Run one forward pass under a recorder, on the tensors and in the mode that its graph is made for."""
    with ExitStack() as stack:
        stack.enter_context(frozen_state(model))
        if recorder.graph.training:
            for module in model.modules():
                module.__dict__["training"] = not of_torch(type(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(plain_kernels())
        stack.enter_context(not_compiled())
        if recorder.on_meta:
            inputs = map_tensors(inputs, lambda t: t.to("meta"))
        elif not recorder.graph.concrete:
            fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            inputs = map_each_once(inputs, functools.partial(as_fake, fake))
        for i, (path, tensor) in enumerate(tensors_in(inputs)):
            recorder.add_input(tensor, f"input_{i}_" + "".join(c if c.isalnum() else "_" for c in path))
        args, kwargs = inputs
        if recorder.graph.concrete:
            stack.enter_context(noting_readers(recorder.note_tensor_read))
        memory = Memory(model) if recorder.looks_back and not recorder.graph.training else None
        try:
            with recorder.module_paths(), recorder:
                output = model(*args, **kwargs)
        except Exception as error:
            error._maskprop_recorder = recorder  # type: ignore[attr-defined]
            raise
        if memory is not None:
            recorder.graph.remembered = remembered(memory, recorder, model, inputs)
        return recorder.finish(list(tensors_in(output)))


def _checked(graph: Graph) -> Graph:
    graph.check()
    if graph.remembered:
        names = ", ".join(f"'{name}'" for name in graph.remembered)
        raise TraceError(
            f"forward keeps what it computes of its inputs in {names}, and reads it in its next call: one call does "
            "not show what the model computes. The model is unchanged. Keep it in a buffer that is there from the "
            "start, or pass it in and out."
        )
    return graph


@contextmanager
def masked_tensors(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """The model's tensors hold their masked values inside; autograd does not see it."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for name, mask in masks.items():
            path, _, key = name.rpartition(".")
            tensor = getattr(model.get_submodule(path), key)
            before.append((tensor, tensor.data))
            tensor.data = tensor.data * mask.to(tensor)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def quiet() -> Iterator[None]:
    """Failing on fake tensors is expected where sizes are tried: torch need not log it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Turn fused fast paths off, so that attention and LSTM come out as matmul, softmax and chunk.

    And batch norm as its kernel: the choice of one asks four times what only Python can answer about a fake tensor.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            _no_mkldnn(),
            torch.backends.cudnn.flags(enabled=False),
            wrapped(torch, "batch_norm", _chosen_batch_norm),
            wrapped(F, "scaled_dot_product_attention", _groups_repeated),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _chosen_batch_norm(choose: Function) -> Function:
    def batch_norm(*args: Any, **kwargs: Any) -> Any:
        as_layers_do = not kwargs and args[0].numel() > 0
        return torch.native_batch_norm(*args[:-1])[0] if as_layers_do else choose(*args, **kwargs)

    return batch_norm


def _groups_repeated(plain: Function) -> Function:
    """Torch's attention repeats the keys and values of grouped queries before it does anything else."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, enable_gqa: bool = False, **kwargs: Any
    ) -> Any:
        if enable_gqa:
            key, value = (_repeated(t, query.shape[-3] // t.shape[-3]) for t in (key, value))
        return plain(query, key, value, *args, **kwargs)

    return attention


def _repeated(heads: Tensor, times: int) -> Tensor:
    """Each head several times."""
    return (
        heads if times == 1 else heads.unsqueeze(-3).expand(*heads.shape[:-2], times, *heads.shape[-2:]).flatten(-4, -3)
    )


@contextmanager
def not_compiled() -> Iterator[None]:
    """Modules on which ``compile()`` was called run as they are written."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and it takes seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _no_mkldnn() -> Iterator[None]:
    # `torch.backends.mkldnn.flags` also touches a TF32 switch and warns about it
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


_TABLES = {dict, set, list, deque}


@contextmanager
def frozen_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's attributes, buffers and mode are what they were.

    So are the generators (see :func:`generators_kept`): to be entered before modes that make tensors fake.
    """
    before: list[tuple[Any, Any]] = []
    empty: list[Any] = []  # most of a module's tables are
    buffers: dict[int, Tensor] = {}
    modules = modules_by_path(model).values()
    for module in modules:
        attributes = module.__dict__
        if module._buffers:
            buffers.update((id(b), b) for b in module._buffers.values() if b is not None and not b.is_meta)
        before.append((attributes, attributes.copy()))
        for table in attributes.values():
            if type(table) in _TABLES:
                if table:
                    before.append((table, table.copy()))
                else:
                    empty.append(table)
        if module.training:
            module.__dict__["training"] = False
    written = [(b, b._version, b.data, b.detach().clone()) for b in buffers.values()]
    try:
        with caches_emptied(modules), generators_kept():
            yield
    finally:
        with torch.no_grad():
            for buffer, version, data, content in written:
                dense = data.layout is torch.strided
                if dense and (buffer.is_meta or buffer.data_ptr() != data.data_ptr()):
                    buffer.data = data
                if buffer._version != version or (dense and not torch.equal(data, content)):
                    buffer.copy_(content)
        for table in empty:
            table.clear()
        for table, old in before:
            if not _same(table, old):
                table.clear()
                (table.extend if isinstance(table, (list, deque)) else table.update)(old)


def _same(table: Any, old: Any) -> bool:
    """Whether a table holds the same objects in the same order."""
    if isinstance(table, set):
        return bool(table == old)
    if len(table) != len(old) or not all(map(operator.is_, table, old)):
        return False
    return not isinstance(table, dict) or all(map(operator.is_, table.values(), old.values()))
