"""Where kernels can run in a rank's program, counted for a whole model."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.fx

from autopar.cost.kernels import (
    Forms,
    cross_entropy_forms,
    dropout_forms,
    pack_forms,
    permute_forms,
)
from autopar.ir.graph import value_of
from autopar.ir.lowered import CLOSE, EXCHANGE, OPEN, PVARY, ROUTED_GATHER, ROUTED_SCATTER
from autopar.ir.mesh import Mesh
from autopar.kernel_use import Places

from .bucket_collectives import BUCKET_BYTES
from .fuse_all_reduce_norm import NormSite, norm_sites
from .short_program import ShortProgram
from .use_kernels import Site, sites

Node = torch.fx.Node
Key = tuple[str, str, str, Forms]  # kernel, fusion, note, what it is given


@dataclass(frozen=True)
class KernelSites:
    """Sites by what they do, norms, sums of gradients by axis; of a program that may be short.

    `whole` are messages of parameters of many copies, whose forms are those of the whole model.
    """

    short: ShortProgram
    norms: list[NormSite]
    sites: dict[Key, list[Site]] = field(default_factory=lambda: defaultdict(list))
    summed: dict[str, list[Site]] = field(default_factory=lambda: defaultdict(list))
    whole: set[Node] = field(default_factory=set)

    @property
    def is_periodic(self) -> bool:
        """Whether the copies of blocks that stay tell of those that were left out."""
        return self.short.is_periodic(self._named())

    def placed(self) -> dict[Key, list[str]]:
        """The places of all sites, in the order of the whole model."""
        return {
            key: [
                site.place if site.place != site.node.name else name
                for site, name in self._all(found)
            ]
            for key, found in self.sites.items()
        }

    def placed_norms(self) -> list[tuple[NormSite, str]]:
        """All norms, each with the name of its place."""
        named = [(site, site.norm.name) for site in self.norms]
        return self.short.all_of(named, lambda one: one[1], lambda one, name: (one[0], name))

    def sums(self) -> dict[str, list[Node]]:
        """The sums of gradients over every axis."""
        return {
            axis: [site.node for site, _ in self._all(found)] for axis, found in self.summed.items()
        }

    def _all(self, found: list[Site]) -> list[tuple[Site, str]]:
        named = [(s, "" if s.node in self.whole else names_of(s)[0]) for s in found]
        return self.short.all_of(named, lambda one: one[1], lambda one, name: (one[0], name))

    def _named(self) -> Iterator[tuple[Hashable, list[str]]]:
        """What there is, with the names that it stands at."""
        for key, found in self.sites.items():
            for site in found:
                if site.node not in self.whole:
                    yield key, names_of(site)
        for norm in self.norms:
            value = value_of(norm.psum)
            yield ("norm", value.shape, value.dtype, str(norm.group)), [norm.norm.name]
        for axis, found in self.summed.items():
            for site in found:
                args: Any = site.node.args
                yield (
                    (axis, tuple((value_of(t).shape, value_of(t).dtype) for t in args[3:])),
                    (names_of(site)),
                )


def kernel_sites(short: ShortProgram, mesh: Mesh, places: Places) -> KernelSites:
    """Put the kernels into a program, and say where they are."""
    norms = list(norm_sites(short.program)) if "all_reduce_norm" in places.of else []
    found = KernelSites(short, norms)
    for site in sites(short.program, mesh, places):
        if site.kernel == "int8":
            found.summed[site.place].append(site)
            continue
        sizes = _whole_bucket(short, site) if site.kernel == "pack" else None
        if sizes is not None:
            found.whole.add(site.node)
        forms = _forms(site) if sizes is None else _packed(site.node, sizes)
        found.sites[site.kernel, site.fusion, site.note, forms].append(site)
    return found


def names_of(site: Site) -> list[str]:
    """The ops or parameters that a site belongs to: of a message, what travels in it."""
    if site.place == site.node.name:
        return [site.place]
    return list(
        dict.fromkeys(name for node in site.node.all_input_nodes for name in _origins(node))
    )


def _origins(node: Node) -> Iterator[str]:
    """The parameters (or ops) that a value is, or is a message of."""
    stack = [node]
    while stack:
        node = stack.pop()
        passes_on = node.target in (operator.getitem, EXCHANGE, OPEN, CLOSE)
        if node.op != "placeholder" and (passes_on or len(node.all_input_nodes) == 1):
            stack += node.all_input_nodes
        else:
            yield node.name


def _whole_bucket(short: ShortProgram, site: Site) -> list[float] | None:
    """Elements of the tensors of the only bucket of its kind, as the whole model has it.

    None where it is in one copy, has others of its kind beside it, or would get full.
    """
    args: Any = site.node.args
    if args[0] is not PVARY or len({short.copy_of.get(n) for n in names_of(site)}) < 2:
        return None
    tensors = args[4:] if site.node.target is CLOSE else args[3:]
    dtype = value_of(tensors[0]).dtype
    for node in short.program.calls():
        if node.target not in (EXCHANGE, OPEN) or node in (site.node, *_opened(site.node)):
            continue
        others: Any = node.args
        alike = others[0] is PVARY and str(others[2]) == str(args[2])
        if alike and value_of(others[3]).dtype == dtype:
            return None
    if site.node.target is CLOSE:
        (start,) = _opened(site.node)
        of_open: Any = start.args
        tensors = of_open[3:]
    named = [(float(value_of(t).numel()), next(_origins(t))) for t in tensors]
    made = short.all_of(named, lambda one: one[1], lambda one, name: (one[0], name))
    sizes = [n for n, _ in made]
    return sizes if sum(sizes) * dtype.itemsize <= BUCKET_BYTES else None


def _opened(node: Node) -> list[Node]:
    """The start of a message, of its end."""
    if node.target is not CLOSE:
        return []
    args: Any = node.args
    return [args[3].args[0]]


def _forms(site: Site) -> Forms:
    made: Forms = _FORMS[site.kernel](site.node)
    return made


def _dropout(node: Node) -> Forms:
    value = value_of(node)
    fusion: Any = node.kwargs["kernel"]  # a Fusion
    return dropout_forms(
        int(value.numel()),
        value.dtype.itemsize,
        value.rank,
        fusion.prologue.extras if fusion.prologue else None,
        fusion.epilogue.extras if fusion.epilogue else None,
        fusion.saves_inputs,
    )


def _cross_entropy(node: Node) -> Forms:
    args: Any = node.args
    logits, prologue = value_of(args[0]), node.kwargs["kernel"]
    tokens = int(value_of(args[1]).numel())
    return cross_entropy_forms(
        tokens,
        int(logits.numel()) // max(tokens, 1),
        logits.dtype.itemsize,
        args[8] is not None,
        bool(node.kwargs.get("in_place")),
        bool(prologue),
        value_of(node).dtype.itemsize,
    )


def _permute(node: Node) -> Forms:
    value = value_of(node)
    width = int(value.shape[-1]) if value.rank > 1 else 1
    ways: Any = node.kwargs.get("ways", 1) if node.target is ROUTED_GATHER else 1
    rows = int(value.numel()) // max(width, 1) * ways
    return permute_forms(rows, width, value.dtype.itemsize, node.target is ROUTED_SCATTER)


def _pack(node: Node) -> Forms:
    """Packed before the message of either direction; unpacked after those that gather."""
    args: Any = node.args
    tensors = args[4:] if node.target is CLOSE else args[3:]
    return _packed(node, [float(value_of(t).numel()) for t in tensors])


def _packed(node: Node, sizes: list[float]) -> Forms:
    args: Any = node.args
    first = args[4] if node.target is CLOSE else args[3]
    joins = node.target is CLOSE and args[0] is not PVARY
    return pack_forms(sizes, value_of(first).dtype.itemsize, joins)


_FORMS: Mapping[str, Any] = {
    "dropout": _dropout,
    "cross_entropy": _cross_entropy,
    "permute": _permute,
    "pack": _pack,
}
