"""Recurrent modules of torch keep a list of their parameters, and weak references to them."""

from __future__ import annotations

from torch import nn


def refresh_flat_weights(module: nn.Module) -> None:
    """Let every `nn.RNN`, `nn.LSTM` and `nn.GRU` in a module list the parameters that it has now.

    They read the list, not their attributes, and make it anew where a weak reference is to another
    parameter. No reference is left: a tensor to which there are any cannot become another one.
    """
    for found in module.modules():
        if isinstance(found, nn.RNNBase):
            names = found._flat_weights_names
            found._flat_weights = [getattr(found, name, None) for name in names]
            found._flat_weight_refs = [None] * len(names)
