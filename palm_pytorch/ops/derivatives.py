"""What a hand-written `backward` is good for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def transformed() -> bool:
    """Whether `torch.func` transforms what is computed (grad, vmap, jvp ..), for which there is to be a plain
    definition: a hand-written derivative is none that it could go on with."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def first_derivative_only(name: str, instead: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the `backward` of a Function whose gradients are constants to autograd: refuses a graph of them.

    (`once_differentiable` of torch refuses only what comes of a gradient that itself requires one, and not
    the usual gradient of 1: there a gradient penalty would be wrong without a word.)
    """

    def refusing(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            if not torch.compiler.is_compiling():
                # Gradients are on in a backward pass only where it is to be differentiated.
                if torch.is_grad_enabled():
                    raise RuntimeError(
                        f"{name}: has no second derivative, so expected create_graph=False; {instead} has"
                    )
                if any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
                    raise RuntimeError(
                        f"{name}: takes no batch of gradients, so expected vectorize=False; {instead} does"
                    )
            return backward(ctx, *grads)

        return checked

    return refusing
