"""The zoo's models with more layers than it has, and how to compare two captures of one model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from autopar.capture import Capture, capture
from autopar.ir.text import print_graph
from tests.zoo import ZOO, huggingface
from tests.zoo.experts import EinsumExperts, LoopExperts, MoE
from tests.zoo.language import GPT, Llama
from tests.zoo.vision import ViT


def _with_layers(build: Callable[[], nn.Module], layers: int) -> nn.Module:
    """A Hugging Face model of the zoo with its configuration's number of layers changed."""
    import transformers

    kept = {name: getattr(transformers, name) for name in _CONFIGS}

    def config(kind: Any, field: str) -> Callable[..., Any]:
        return lambda **kwargs: kind(**{**kwargs, field: layers})

    patches: dict[str, Any] = {name: config(kind, _CONFIGS[name]) for name, kind in kept.items()}
    with mock.patch.multiple(transformers, **patches):
        return build()


_CONFIGS = {
    "GPT2Config": "n_layer",
    "LlamaConfig": "num_hidden_layers",
    "BertConfig": "num_hidden_layers",
    "T5Config": "num_layers",
    "MixtralConfig": "num_hidden_layers",
}

DEEP: dict[str, Callable[[int], nn.Module]] = {
    "gpt": lambda n: GPT(vocab=50257, dropout=0.1, layers=n),
    "llama": lambda n: Llama(vocab=128, layers=n),
    "vit": lambda n: ViT(layers=n),
    "moe": lambda n: MoE(EinsumExperts, layers=n),
    "moe_index": lambda n: MoE(LoopExperts, layers=n),
    "hf_gpt2": partial(_with_layers, huggingface.gpt2),
    "hf_llama": partial(_with_layers, huggingface.llama),
    "hf_bert": partial(_with_layers, huggingface.bert),
    "hf_mixtral": partial(_with_layers, huggingface.mixtral),
    "hf_t5": partial(_with_layers, huggingface.t5),
}


def deep(name: str, layers: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of the zoo with that many layers, and a batch."""
    torch.manual_seed(0)
    args, kwargs = ZOO[name].inputs(0)
    return DEEP[name](layers).train(), args, kwargs


def folded_and_whole(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any
) -> tuple[Capture, Capture]:
    return (
        capture(module, args, kwargs, fold=True, **options),
        capture(module, args, kwargs, **options),
    )


def is_folded(captured: Capture) -> bool:
    return any("copied" in note for note in captured.notes)


def assert_identical(a: Capture, b: Capture) -> None:
    """The captures are equal in all that later stages read."""
    assert print_graph(a.graph) == print_graph(b.graph)
    assert a.fingerprint == b.fingerprint
    assert (a.symbols, a.symbol_of, a.guards) == (b.symbols, b.symbol_of, b.guards)
    assert a.graph.mutated == b.graph.mutated and a.graph.outputs == b.graph.outputs
    assert (a.result, a.arguments, a.attributes) == (b.result, b.arguments, b.attributes)
    for x, y in zip(a.graph.fx.nodes, b.graph.fx.nodes, strict=True):
        assert x.name == y.name
        for key in ("role", "fqns", "value", "module", "source", "stack", "region"):
            assert x.meta.get(key) == y.meta.get(key), (x.name, key)
