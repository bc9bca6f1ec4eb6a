"""Reading and editing what flows through a model's layers: the only place that registers a hook.

::

    with capture(vae, "decoder.*.norm1") as seen:          # read
        vae.decode(latents)
    seen["decoder.up_blocks.0.resnets.0.norm1"]             # one tensor for each call of the layer

    with edit(vae, {"decoder.conv_norm_out": lambda h: h * 0}):   # change
        vae.decode(latents)

Both are context managers; whatever happens inside, their hooks are gone afterwards.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from vaelab.checks import nearest, one_of, unknown

SIDES = ("input", "output")


def unwrap(model: nn.Module) -> nn.Module:
    """``model`` without the wrappers of DDP, FSDP, DataParallel or ``torch.compile``."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def find_layers(model: nn.Module, layers: str | Iterable[str]) -> dict[str, nn.Module]:
    """The modules that ``layers`` names, by path, in the model's own order.

    Args:
        model: any module; wrappers are looked through, so a name has no ``module.`` in front.
        layers: module paths (``encoder.conv_in``) or globs (``decoder.*.norm1``; ``*`` also
            matches dots), one or several.

    Raises:
        ValueError: a path or a glob that matches nothing; the message lists the nearest paths.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    modules = {name: module for name, module in unwrap(model).named_modules() if name}
    if not patterns:
        raise ValueError("layers: none were asked for")
    matched = set()
    for pattern in patterns:
        found = [pattern] if pattern in modules else fnmatch.filter(modules, pattern)
        if not found:
            raise unknown("layers", pattern, _like(pattern, modules) if "*" in pattern else modules)
        matched.update(found)
    return {name: module for name, module in modules.items() if name in matched}


def _like(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a mistyped glob may have meant: those it matches with its last part mended."""
    names = list(names)
    head, _, tail = pattern.rpartition(".")
    mended = nearest(tail, {name.rpartition(".")[2] for name in names}, 1)[0]
    return fnmatch.filter(names, f"{head}.{mended}") or names


class Captured(Mapping[str, list[Any]]):
    """What :func:`capture` saw: a list for each layer, with one entry for each call of it.

    Iterating gives the layers in the model's order. ``clear()`` forgets what was seen and goes
    on watching, for loops that run many batches inside one ``capture``.
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
        """Forget what was seen so far."""
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
) -> Iterator[Captured]:
    """Record what the named layers take in or give out while the ``with`` block runs.

    Args:
        model: the module to watch; it may be wrapped by accelerate, compiled layers excepted.
        layers: module paths or globs, see :func:`find_layers`.
        side: ``"output"`` or ``"input"``. Of a tuple, a list or a diffusers output the first
            tensor is meant.
        reduce: called, without gradient and on the tensor's own device, when a layer has run;
            its result is kept in place of the tensor, so that a statistic never stores a map.
        to: a device to copy what is kept to; None leaves it where it is.
        grad: keep the autograd graph of the captured tensors; not together with ``reduce``.

    Yields:
        A :class:`Captured`: for every layer the list of its calls, in order.

    Raises:
        ValueError: an unknown layer or side.
        RuntimeError: on leaving, a layer that was asked for never ran; or a layer gave no tensor.
    """
    one_of("side", side, SIDES)
    if grad and reduce is not None:
        raise ValueError("grad: a reduced capture keeps no graph; ask for one of grad and reduce")
    found = find_layers(model, layers)
    captured = Captured(found)
    ran = dict.fromkeys(found, False)

    def keep(layer: str, value: Any) -> None:
        tensor = _first_tensor(layer, value)
        ran[layer] = True
        if not grad:
            tensor = tensor.detach()
        if reduce is not None:
            with torch.no_grad():
                tensor = reduce(tensor)
        if to is not None and isinstance(tensor, Tensor):
            tensor = tensor.to(to)
        captured[layer].append(tensor)

    with ExitStack() as hooks:
        for name, module in found.items():
            hooks.enter_context(_watching(name, module, side, keep))
        yield captured
    silent = [name for name, it_ran in ran.items() if not it_ran]
    if silent:
        raise RuntimeError(
            f"layers: {', '.join(silent)} never ran inside `capture`; was the right part of the model called?"
        )


@contextmanager
def edit(
    model: nn.Module,
    edits: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    side: str = "output",
) -> Iterator[None]:
    """Change what the named layers give out (or take in) while the ``with`` block runs.

    Args:
        model: the module to edit.
        edits: for each module path or glob a function from the layer's tensor to its
            replacement. A tuple or diffusers output keeps its other entries. Where two keys
            match one layer, both are applied, in the order given.
        side: ``"output"`` or ``"input"``.

    Raises:
        ValueError: an unknown layer or side.
        TypeError: a function that returns something else than a tensor.
        RuntimeError: on leaving, a layer that was to be edited never ran.
    """
    one_of("side", side, SIDES)
    found = [(find_layers(model, key), function) for key, function in edits.items()]
    ran = {name: False for layers, _ in found for name in layers}

    def replaced(layer: str, value: Any, function: Callable[[Tensor], Tensor]) -> Any:
        ran[layer] = True
        new = function(_first_tensor(layer, value))
        if not isinstance(new, Tensor):
            raise TypeError(f"edits: the function for {layer} returned {type(new).__name__}, not a tensor")
        return _with_first_tensor(value, new)

    with ExitStack() as hooks:
        for layers, function in found:
            for name, module in layers.items():
                hooks.enter_context(_replacing(name, module, side, replaced, function))
        yield
    silent = [name for name, it_ran in ran.items() if not it_ran]
    if silent:
        raise RuntimeError(f"layers: {', '.join(silent)} never ran inside `edit`; nothing of them was edited")


@contextmanager
def _watching(name: str, module: nn.Module, side: str, keep: Callable[[str, Any], None]) -> Iterator[None]:
    if side == "output":
        handle = module.register_forward_hook(lambda _, args, out: keep(name, out))
    else:
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(name, _inputs(args, kwargs)), with_kwargs=True
        )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replacing(name: str, module: nn.Module, side: str, replaced: Callable, function: Callable) -> Iterator[None]:
    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if any(isinstance(argument, Tensor) for argument in args):
            return replaced(name, args, function), kwargs
        return args, replaced(name, kwargs, function)

    if side == "output":
        handle = module.register_forward_hook(lambda _, args, out: replaced(name, out, function))
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _inputs(args: tuple, kwargs: dict) -> Any:
    return args if any(isinstance(argument, Tensor) for argument in args) else kwargs


def _first_tensor(layer: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    for entry in entries:
        if isinstance(entry, Tensor):
            return entry
    raise RuntimeError(f"layers: {layer} gave a {type(value).__name__} with no tensor in it")


def _with_first_tensor(value: Any, new: Tensor) -> Any:
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        key = next(key for key, entry in value.items() if isinstance(entry, Tensor))
        edited = copy(value)
        edited[key] = new
        return edited
    place = next(i for i, entry in enumerate(value) if isinstance(entry, Tensor))
    entries = [*value[:place], new, *value[place + 1 :]]
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
