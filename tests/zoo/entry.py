"""What a zoo entry is: an ordinary model, its batches and its loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def model_output_is_loss(output: Any, target: Tensor | None = None) -> Tensor:
    """The loss of a model whose forward returns it."""
    del target
    assert isinstance(output, Tensor)
    return output


def in_float64(model: nn.Module) -> nn.Module:
    return model.double()


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    `batch(step, batch_size)` returns the *global* batch's (args, kwargs), float inputs in float32;
    the same step gives the same data everywhere. `target(step, batch_size)` is what a loss outside
    `forward` compares the output with. `double(model)` is the model in float64, with nothing in it
    that still computes in float32.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Inputs]
    loss: Callable[..., Tensor] = model_output_is_loss
    target: Callable[[int, int], Tensor] | None = None
    has_dropout: bool = False
    has_batch_norm: bool = False
    batch_size: int = 8
    double: Callable[[nn.Module], nn.Module] = in_float64

    def inputs(
        self, step: int, dtype: torch.dtype = torch.float32, batch_size: int | None = None
    ) -> Inputs:
        """The batch of one step, its float tensors in `dtype`."""
        args, kwargs = self.batch(step, batch_size or self.batch_size)
        return (
            tuple(_cast(value, dtype) for value in args),
            {key: _cast(value, dtype) for key, value in kwargs.items()},
        )

    def step_loss(self, model: nn.Module, step: int, batch_size: int | None = None) -> Tensor:
        """Run `model` on one step's batch, in the dtype of its parameters, and return the loss."""
        dtype = next(model.parameters()).dtype
        args, kwargs = self.inputs(step, dtype, batch_size)
        output = model(*args, **kwargs)
        if self.target is None:
            return self.loss(output)
        return self.loss(output, _cast(self.target(step, batch_size or self.batch_size), dtype))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def random(step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step's data; `stream` separates inputs from targets."""
    return torch.Generator().manual_seed(1_000_003 * stream + step)


def token_ids(step: int, *shape: int, vocab: int, stream: int = 0) -> Tensor:
    return torch.randint(vocab, shape, generator=random(step, stream))
