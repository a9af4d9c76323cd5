"""Shapes, gradients and exportable results of the native ops, registered with torch."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

from moekv.ops.backends import FAILURES, call_directly

_libraries: dict[str, Any] = {}  # of Python kernels, by dispatch key
if FAILURES["cpu"] is None:
    for _key in ("Meta", "Autograd"):
        _libraries[_key] = torch.library.Library("moekv", "IMPL", _key)  # type: ignore[no-untyped-call]


def register(
    op: str,
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    written: Sequence[int] = (),
) -> None:
    """Give a native op its shapes and its gradient, where the library is there.

    An op without a gradient raises in the backward pass, instead of returning none.

    Parameters
    ----------
    op : str
        Its name in ``torch.ops.moekv``.
    fake : callable
        Returns empty outputs, for fake and meta tensors, and refuses what the op refuses.
    backward : callable, optional
        Called with a context and the gradients of the outputs; returns one for each argument that
        is not keyword-only.
    setup_context : callable, optional
        Called with a context, the arguments that are not keyword-only (up to the last that is not
        None), the others as a dict, and the outputs.
    written : sequence of int
        Places of the arguments that the op overwrites.
    """
    if not _libraries:
        return
    # Meta kernels serve fake tensors too; torch.library.register_fake takes ten times as long to
    # import, as it looks through all modules for the name of this one.
    _libraries["Meta"].impl(op, fake)
    native = getattr(torch.ops.moekv, op).default
    if written:
        kernel = _in_place(op, native, written)
    else:
        kernel = _functional(op, native, backward, setup_context)
        call_directly(op, _direct(native))
    _libraries["Autograd"].impl(op, kernel)


def without_gradient(op: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Make a reference raise in the backward pass, as native ops without a gradient do."""
    return _functional(op, reference, None, None)


def _refuse(op: str, what: str) -> NoReturn:
    raise NotImplementedError(
        f"moekv::{op} has no {what}; detach() what goes into it, or call it under torch.no_grad()"
    )


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    return [argument for argument in arguments if isinstance(argument, Tensor)]


def _needs_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _refuse_tangents(op: str, tensors: Sequence[Tensor]) -> None:
    if forward_ad._current_level < 0:  # none can have a tangent
        return
    for tensor in tensors:
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            _refuse(op, "forward-mode derivative")


def _functional(
    op: str,
    native: Any,
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None,
) -> Callable[..., Any]:
    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, options: dict[str, Any], *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = native(*arguments, **options)
            ctx.num_arguments = len(arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, options, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            if backward is None:
                _refuse(op, "backward")
            return None, *backward(ctx, *gradients)[: ctx.num_arguments]

    def kernel(*arguments: Any, **options: Any) -> Any:
        tensors = _tensors(arguments)
        _refuse_tangents(op, tensors)
        if _needs_gradient(tensors):
            return Differentiable.apply(options, *arguments)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return native(*arguments, **options)

    return kernel


def _direct(native: Any) -> Callable[..., Any]:
    """Pass by the kernel above where nothing needs a gradient: it costs as much as a small op."""

    def call(*arguments: Any, **options: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and _needs_gradient(_tensors(arguments)))
            or forward_ad._current_level >= 0
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            return native(*arguments, **options)
        with torch._C._AutoDispatchBelowAutograd():
            return native(*arguments, **options)

    return call


def _in_place(op: str, native: Any, written: Sequence[int]) -> Callable[..., None]:
    def kernel(*arguments: Any, **options: Any) -> None:
        _refuse_tangents(op, _tensors(arguments))
        if _needs_gradient(_tensors(arguments)):
            raise RuntimeError(
                f"moekv::{op}: expected tensors that need no gradient, as what is overwritten "
                "loses it, got one that does; detach() them, or call it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            native(*arguments, **options)
        torch.autograd.graph.increment_version([arguments[i] for i in written])

    return kernel


def exportable(result: type) -> None:
    """Let programs whose results are such named tuples be saved by ``torch.export``."""
    # torch's own error names this function as the one to call; there is no public one.
    _pytree._register_namedtuple(result, serialized_type_name=f"moekv.{result.__name__}")
