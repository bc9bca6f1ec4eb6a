"""Read and edit the inputs and outputs of a model's layers. Only this module registers hooks.

::

    with capture(vae, "decoder.*.norm1") as seen:          # read
        vae.decode(latents)
    seen["decoder.up_blocks.0.resnets.0.norm1"]             # one tensor for each call of the layer

    with edit(vae, {"decoder.conv_norm_out": lambda h: h * 0}):   # change
        vae.decode(latents)

Both are context managers. They remove their hooks on leaving, also after an exception.
"""

import fnmatch
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.core.validate import nearest, one_of, unknown

SIDES = ("input", "output", "update", "input_output")
"""What is captured or edited of a layer: a tensor that it takes or returns; output minus input; or both, input first,
concatenated along the channels."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return ``model`` without the wrappers of DDP, FSDP, DataParallel or ``torch.compile``."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def find_layers(model: nn.Module, layers: str | Iterable[str], parameter: str = "layers") -> dict[str, nn.Module]:
    """Find the modules that ``layers`` names, by path, in the model's own order.

    Args:
        model: any module; wrappers are removed first, so paths have no ``module.`` in front.
        layers: one or several module paths (``encoder.conv_in``) or globs (``decoder.*.norm1``; ``*`` also matches
            dots).
        parameter: the notebook parameter that gave the names; error messages begin with it.

    Raises:
        ValueError: a path or a glob matches nothing; the message lists the nearest paths.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    modules = {name: module for name, module in unwrap(model).named_modules() if name}
    if not patterns:
        raise ValueError(f"{parameter}: none given; expected module paths or globs")
    matched = set()
    for pattern in patterns:
        found = [pattern] if pattern in modules else fnmatch.filter(modules, pattern)
        if not found:
            raise unknown(parameter, pattern, _like(pattern, modules) if "*" in pattern else modules)
        matched.update(found)
    return {name: module for name, module in modules.items() if name in matched}


def _like(pattern: str, names: Iterable[str]) -> list[str]:
    """List the names that a mistyped glob may mean: those that match if its last part is replaced by the nearest
    name."""
    names = list(names)
    head, _, tail = pattern.rpartition(".")
    mended = nearest(tail, {name.rpartition(".")[2] for name in names}, 1)[0]
    return fnmatch.filter(names, f"{head}.{mended}") or names


class Captured(Mapping[str, list[Any]]):
    """The result of :func:`capture`: for each layer a list with one entry per call of the layer.

    Iterating gives the layers in the model's order. In a loop over many batches inside one ``capture``,
    ``clear()`` discards the entries so far.
    """

    def __init__(self, layers: Iterable[str]):
        self._calls: dict[str, list[Any]] = {layer: [] for layer in layers}

    def __getitem__(self, layer: str) -> list[Any]:
        if layer not in self._calls:
            raise KeyError(str(unknown("layer", layer, self._calls)))
        return self._calls[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def clear(self) -> None:
        """Discard all entries; later calls are still captured."""
        for calls in self._calls.values():
            calls.clear()


@contextmanager
def capture(
    model: nn.Module,
    layers: str | Iterable[str],
    *,
    side: str = "output",
    reduce: Callable[[Tensor], Any] | None = None,
    to: str | torch.device | None = None,
    grad: bool = False,
    calls: Collection[int] | None = None,
    entry: int = 0,
    stop: bool = False,
) -> Iterator[Captured]:
    """Record the inputs or outputs of the named layers while the ``with`` block runs.

    Args:
        model: the module; it may be wrapped by accelerate. A layer that was compiled before runs without hooks.
        layers: module paths or globs, see :func:`find_layers`.
        side: ``"output"``, ``"input"``, or for layers whose output has the shape of their input ``"update"``, which is
            output minus input, or ``"input_output"``, input and output concatenated along the channels (the second
            dimension of a map, the last one of tokens). The input is the first tensor among the layer's arguments.
        reduce: a function that is called on each tensor, without gradient and on the tensor's device, when a layer has
            run. Its result is recorded in place of the tensor, so a statistic needs no memory for maps.
        to: the device to which the recorded tensors are moved; None leaves them where they are.
        grad: keep the autograd graph of the recorded tensors; cannot be combined with ``reduce``.
        calls: the calls of each layer to record, counted from 0; None means all.
        entry: the index of the tensor to record if an output has several; -1 is the last.
        stop: leave the ``with`` block as soon as every layer has run (or has had the last of its ``calls``), in the
            middle of the model's forward pass. The call of the model must be the last statement in the block.

    Yields:
        A :class:`Captured`: for every layer the list of its calls, in order.

    Raises:
        ValueError: a layer or the side is unknown, ``calls`` is empty or has a negative number, or both ``grad`` and
            ``reduce`` are given.
        RuntimeError: when the block is left, a named layer has not run, or less often than ``calls`` needs; or a layer
            returned no tensor.
    """
    one_of("side", side, SIDES)
    if calls is not None and (not calls or min(calls) < 0):
        raise ValueError(f"calls: expected one or more numbers, at least 0, got {list(calls)}")
    if grad and reduce is not None:
        raise ValueError("grad: a reduced capture has no autograd graph; give either grad or reduce")
    found = find_layers(model, layers)
    captured = Captured(found)
    ran = dict.fromkeys(found, 0)
    needed = max(calls) + 1 if calls is not None else 1
    stop_signal = _StopForward()

    def record(layer: str, tensor: Tensor) -> None:
        ran[layer] += 1
        if calls is None or ran[layer] - 1 in calls:
            captured[layer].append(_recorded(tensor, reduce, to, grad))
        if stop and min(ran.values()) >= needed:
            raise stop_signal

    with ExitStack() as hooks:
        for name, module in found.items():
            hooks.enter_context(_hooked(name, module, side, entry, record))
        try:
            yield captured
        except _StopForward as signal:
            if signal is not stop_signal:  # it belongs to a capture around this one
                raise
    silent = [name for name, times in ran.items() if times < needed]
    if silent:
        rarely = f" {needed} times" if needed > 1 else ""
        raise RuntimeError(
            f"layers: {', '.join(silent)} never ran{rarely} inside `capture`; "
            "was the right part of the model called, or were they compiled before?"
        )


class _StopForward(BaseException):
    """Ends a forward pass whose remainder is not needed."""


def _recorded(tensor: Tensor, reduce: Callable[[Tensor], Any] | None, to: Any, grad: bool) -> Any:
    if not grad:
        tensor = tensor.detach()
    if reduce is not None:
        with torch.no_grad():
            tensor = reduce(tensor)
    return tensor.to(to) if to is not None and isinstance(tensor, Tensor) else tensor


@contextmanager
def edit(
    model: nn.Module,
    edits: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    side: str = "output",
    entry: int = 0,
) -> Iterator[None]:
    """Replace the outputs (or inputs) of the named layers while the ``with`` block runs.

    Args:
        model: the module to edit.
        edits: for each module path or glob a function from the layer's tensor to its replacement. The other entries of
            a tuple or diffusers output stay the same. If two keys match one layer, both functions are applied in the
            given order.
        side: ``"output"``, ``"input"``, or ``"update"``, which is output minus input. Elements of the update that the
            function does not change leave the output unchanged, bit for bit; elements that it sets to 0 make the output
            equal to the input. With ``"input_output"`` the function takes both, concatenated along the channels, and
            returns the output.
        entry: the index of the tensor to replace if an output has several; -1 is the last.

    Raises:
        ValueError: a layer or the side is unknown.
        TypeError: a function returned something other than a tensor.
        RuntimeError: when the block is left, a named layer has not run; or the shape of an update differs from that of
            its replacement.
    """
    one_of("side", side, SIDES)
    found = [(find_layers(model, key), function) for key, function in edits.items()]
    ran = {name: False for layers, _ in found for name in layers}

    def replaced(layer: str, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ran[layer] = True
        new = function(tensor)
        if not isinstance(new, Tensor):
            raise TypeError(f"edits: the function for {layer} returned {type(new).__name__}, not a tensor")
        return new

    with ExitStack() as hooks:
        for layers, function in found:
            for name, module in layers.items():
                change = partial(replaced, function=function)
                hooks.enter_context(_hooked(name, module, side, entry, change))
        yield
    silent = [name for name, it_ran in ran.items() if not it_ran]
    if silent:
        raise RuntimeError(
            f"layers: {', '.join(silent)} never ran inside `edit`, so they were not edited; "
            "was the right part of the model called, or were they compiled before?"
        )


@contextmanager
def _hooked(
    name: str, module: nn.Module, side: str, entry: int, act: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``act`` with the layer's name and tensor; a tensor that it returns replaces the layer's."""

    def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        given, positional = _given(module, args, kwargs)
        new = act(name, _tensor(name, given))
        if new is None:
            return None
        given = _with_tensor(given, new)
        return (given, kwargs) if positional else (args, given)

    def on_output(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        new = act(name, _tensor(name, out, entry))
        return None if new is None else _with_tensor(out, new, entry)

    def both_sides(args: tuple, kwargs: dict, out: Any) -> tuple[Tensor, Tensor]:
        before = _tensor(name, _given(module, args, kwargs)[0])
        after = _tensor(name, out, entry)
        if before.shape != after.shape:
            raise RuntimeError(
                f"layers: {name} takes {tuple(before.shape)} in and gives {tuple(after.shape)} out, "
                "so it has no update; use side output"
            )
        return before, after

    def on_both(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        before, after = both_sides(args, kwargs, out)
        new = act(name, torch.cat([before, after], 1 if after.ndim == 4 else -1))
        if new is None:
            return None
        if new.shape != after.shape:
            raise RuntimeError(f"layers: the output of {name} has shape {tuple(after.shape)}, not {tuple(new.shape)}")
        return _with_tensor(out, new.to(after.dtype), entry)

    def on_update(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        before, after = both_sides(args, kwargs, out)
        update = after - before
        new = act(name, update)
        if new is None:
            return None
        if new.shape != update.shape:
            raise RuntimeError(f"layers: the update of {name} has shape {tuple(update.shape)}, not {tuple(new.shape)}")
        # elements that do not change keep the output as it was, bit for bit, and gradients flow
        edited = torch.where(new == update, after - (update - new), before + new)
        return _with_tensor(out, edited.to(after.dtype), entry)

    if side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        hook = {"output": on_output, "update": on_update, "input_output": on_both}[side]
        handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _given(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Any, bool]:
    """Return the arguments that hold a layer's input, and whether they are positional.

    Keyword arguments are put in the order of the layer's parameters, because a caller may give them in any order.
    """
    if any(isinstance(argument, Tensor) for argument in args):
        return args, True
    order = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in [*order, *(name for name in kwargs if name not in order)]}, False


def _entries(value: Any) -> dict[Any, Tensor]:
    """Collect the tensors in a tensor, tuple, list, dict or diffusers output, by index or key."""
    if isinstance(value, Tensor):
        return {None: value}
    if not isinstance(value, Mapping | tuple | list):
        return {}
    places = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {place: entry for place, entry in places if isinstance(entry, Tensor)}


def _tensor(layer: str, value: Any, entry: int = 0) -> Tensor:
    tensors = list(_entries(value).values())
    if not -len(tensors) <= entry < len(tensors):
        content = "no tensor" if not tensors else f"{len(tensors)} tensors, none with index {entry}"
        raise RuntimeError(f"layers: {layer} returned a {type(value).__name__} with {content} in it")
    return tensors[entry]


def _with_tensor(value: Any, new: Tensor, entry: int = 0) -> Any:
    if isinstance(value, Tensor):
        return new
    place = list(_entries(value))[entry]
    if isinstance(value, Mapping):
        edited = copy(value)
        edited[place] = new
        return edited
    entries = [*value[:place], new, *value[place + 1 :]]
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def on_gradient(parameter: nn.Parameter, function: Callable[[nn.Parameter], None]) -> Any:
    """Call ``function`` on a parameter whenever its gradient has been accumulated.

    Returns:
        A handle; its ``remove()`` ends the calls.
    """
    return parameter.register_post_accumulate_grad_hook(function)
