"""Repeated layers are found as tandem repeats of op signatures."""

from __future__ import annotations

import pytest

from autopar.ir.graph import Graph
from autopar.passes.blocks import find_blocks
from tests.simulate import concrete, subject_of, zoo_subject
from tests.zoo import ZOO

from .helpers import graph_of

HEAD = '%w{i}: param f32[4, 4] grad "layers.{i}.w"'
LAYER = """
%h{i}: f32[2, 4] = aten.linear(%{x}, %w{i})
%r{i}: f32[2, 4] = aten.relu(%h{i})
"""


def stack(layers: int, odd: int | None = None) -> Graph:
    """Layers of linear and relu; layer `odd` has gelu."""
    lines = [HEAD.format(i=i) for i in range(layers)] + ['%x: input f32[2, 4] "x"']
    for i in range(layers):
        text = LAYER.format(i=i, x=f"r{i - 1}" if i else "x")
        lines.append(text.replace("relu", "gelu") if i == odd else text)
    lines.append(f"%s: f32[] = aten.sum(%r{layers - 1})\nreturn %s")
    return graph_of("\n".join(lines))


def regions(graph: Graph) -> list[tuple[str, int, int]]:
    return [(first.name, ops, copies) for first, ops, copies in find_blocks(graph).regions]


def test_a_stack_of_layers() -> None:
    """The first layer reads the input, which has no gradient: it stands for itself."""
    blocks = find_blocks(stack(5))
    assert regions(stack(5)) == [("r0", 2, 4)]
    names = {n.name: r.name for n, r in blocks.representative.items()}
    assert names["h3"] == names["h2"] == "h1"
    assert names["h0"] == "h0"
    assert names["w3"] == names["w2"] == names["w4"]
    assert names["w0"] == "w0"
    assert names["s"] == "s"


def test_an_odd_layer_parts_a_stack() -> None:
    found = regions(stack(9, odd=4))
    assert len(found) == 2
    assert all(ops == 2 and copies >= 3 for _, ops, copies in found)


def test_nothing_repeats() -> None:
    blocks = find_blocks(stack(1))
    assert blocks.regions == ()
    assert all(node is stands for node, stands in blocks.representative.items())


def test_a_shared_weight_stands_for_itself() -> None:
    graph = graph_of(
        """
        %w: param f32[4, 4] grad "w"
        %x: input f32[2, 4] grad "x"
        %a: f32[2, 4] = aten.linear(%x, %w)
        %b: f32[2, 4] = aten.relu(%a)
        %c: f32[2, 4] = aten.linear(%b, %w)
        %d: f32[2, 4] = aten.relu(%c)
        %e: f32[2, 4] = aten.linear(%d, %w)
        return %e
        """
    )
    blocks = find_blocks(graph)
    assert regions(graph) == [("b", 2, 2)]
    names = {n.name: r.name for n, r in blocks.representative.items()}
    assert names["w"] == "w"


@pytest.mark.parametrize(("name", "copies"), [("gpt_outside", [2]), ("llama", [2]), ("vit", [2])])
def test_the_zoo(name: str, copies: list[int]) -> None:
    graph = concrete(zoo_subject(name))
    found = [c for _, ops, c in find_blocks(graph).regions if ops > 10]
    assert found == copies


@pytest.mark.slow
def test_encoder_and_decoder() -> None:
    """T5 has two stacks, whose first layers make the position biases of the others."""
    pytest.importorskip("transformers")
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    args, kwargs = ZOO["hf_t5"].inputs(0)
    graph = concrete(subject_of(T5ForConditionalGeneration(config), args, kwargs))
    found = [c for _, ops, c in find_blocks(graph).regions if ops > 10]
    assert found == [3, 3]


@pytest.mark.parametrize("name", ["gpt_outside", "llama", "resnet", "moe", "hf_t5"])
def test_representatives_are_alike(name: str) -> None:
    graph = concrete(zoo_subject(name))
    for node, stands in find_blocks(graph).representative.items():
        assert node.op == stands.op
        if node.op == "call_function":
            assert node.target == stands.target
        assert node.meta.get("value") == stands.meta.get("value")
        assert find_blocks(graph).representative[stands] is stands
