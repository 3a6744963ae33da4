"""safetensors checkpoints: slices of them, what does not fit, and files that others can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import autopar
from autopar.errors import UserError
from autopar.ir.mesh import Axis, Mesh
from autopar.ir.parse import parse_sharding
from autopar.runtime.checkpoint import Loaded
from autopar.runtime.file_values import check_values, piece_runs
from autopar.runtime.materialise import realise
from autopar.runtime.placements import local_shard
from autopar.runtime.safetensors_files import entries_of


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, dtype=dtype)
        self.head = nn.Linear(4, 10, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(ids) * self.scale + self.table)
        return logits.square().mean()


def filled(dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(1)
    model = Small(dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model


def sharded_files(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """The state in two files with an index, as Hugging Face writes them."""
    names = sorted(state)
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({n: state[n] for n in names if files[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k != "head.weight"}


def meta() -> Small:
    with torch.device("meta"):
        return Small()


def deferred() -> Small:
    with autopar.deferred():
        return Small()


@pytest.mark.parametrize("make", [Small, deferred])
@pytest.mark.parametrize("kind", ["file", "folder", "index"])
def test_values_come_from_the_checkpoint(tmp_path: Path, make: Any, kind: str) -> None:
    source = filled(torch.bfloat16)  # read into float32
    path = tmp_path / "weights.safetensors"
    if kind == "file":
        save_file(state_of(source), path)
    else:
        index = sharded_files(tmp_path, state_of(source))
        path = index if kind == "index" else tmp_path
    model = make()
    with torch.no_grad():
        model.scale.add_(1)  # forgotten
    assert autopar.load_checkpoint(model, path) == Loaded((), ())
    with torch.no_grad():
        model.norm.weight.mul_(2)  # not forgotten
    realise(model)
    for name, value in model.state_dict().items():
        factor = 2 if name == "norm.weight" else 1
        assert torch.equal(value, source.state_dict()[name].to(value.dtype) * factor), name
    assert model.head.weight is model.embedding.weight


def test_a_model_on_meta_is_loaded_or_told_what_lacks(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state_of(filled()), path)
    model = meta()
    with pytest.raises(UserError, match=r"embedding.weight, norm.weight.*built on the meta device"):
        check_values(model)
    autopar.load_checkpoint(model, tmp_path)
    with pytest.raises(UserError, match="the buffers table were built on the meta device"):
        check_values(model)
    model.table = torch.arange(4.0)
    realise(model)
    check_values(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, filled().state_dict()[name])
    plain: Any = autopar.parallelize(meta())
    with pytest.raises(UserError, match="pass checkpoint= to"):
        plain(torch.arange(4))


def test_parallelize_takes_a_checkpoint(tmp_path: Path) -> None:
    autopar.save_checkpoint(filled(), tmp_path)
    decorated: Any = autopar.parallelize(checkpoint=tmp_path)(Small)
    for model in (decorated(), autopar.parallelize(Small(), checkpoint=tmp_path)):
        assert torch.equal(model.embedding.weight, filled().embedding.weight)


def wrong(state: dict[str, torch.Tensor], what: str) -> None:
    if what == "missing":
        del state["scale"], state["norm.bias"]
    elif what == "unexpected":
        state["extra.weight"] = torch.ones(2)
    else:
        state["norm.weight"] = torch.ones(5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "missing: scale, norm.bias"),
        ("unexpected", "not in the model: extra.weight"),
        ("shape", r"of another shape: norm.weight is \[5\], not \[4\]"),
    ],
)
@pytest.mark.parametrize("make", [Small, deferred])
def test_what_does_not_fit_is_named(tmp_path: Path, make: Any, what: str, message: str) -> None:
    state = state_of(filled())
    wrong(state, what)
    save_file(state, tmp_path / "model.safetensors")
    model = make()
    before = {k: v.clone() for k, v in copies(model).items()}
    with pytest.raises(UserError, match=message):
        autopar.load_checkpoint(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in copies(model).items())  # nothing was loaded
    if what == "shape":
        with pytest.raises(UserError, match=message):
            autopar.load_checkpoint(model, tmp_path, strict=False)
        return
    loaded = autopar.load_checkpoint(model, tmp_path, strict=False)
    assert set(loaded.missing) == ({"scale", "norm.bias"} if what == "missing" else set())
    assert loaded.unexpected == (("extra.weight",) if what == "unexpected" else ())
    assert torch.equal(copies(model)["embedding.weight"], state["embedding.weight"])


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: torch.tensor(v.tolist()) for k, v in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["none", "truncated", "torch", "lost", "index", "empty", "two"])
def test_files_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.zeros(100), "b": torch.zeros(3)}, path)
    message, given_path = "no complete safetensors file", path
    if kind == "none":
        message, given_path = "cannot read the checkpoint", tmp_path / "other.safetensors"
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif kind == "torch":
        torch.save({"a": torch.zeros(3)}, path)
    elif kind == "lost":
        index.write_text(json.dumps({"weight_map": {"c": path.name}}))
        message, given_path = "c should be in model.safetensors, says the index", tmp_path
    elif kind == "index":
        index.write_text("[1, 2]")
        message, given_path = "not the index of a checkpoint", tmp_path
    elif kind == "empty":
        path.unlink()
        message, given_path = "not one safetensors file: none", tmp_path
    else:
        path.rename(tmp_path / "a.safetensors")
        save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
        message, given_path = "not one safetensors file: a.safetensors, b.safe", tmp_path
    with pytest.raises(UserError, match=message):
        entries_of(given_path)


SHARDINGS = ("[-, -]", "[dp, -]", "[-, tp]", "[dp, tp]", "[-, dp&tp]", "[2:tp, dp]", "[3:dp, 2:tp]")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 3).map(lambda n: 12 * n),
    columns=st.integers(1, 3).map(lambda n: 8 * n),
    text=st.sampled_from(SHARDINGS),
    rank=st.integers(0, 3),
)
def test_a_piece_is_read_as_it_would_be_cut(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, text: str, rank: int
) -> None:
    file = tmp_path_factory.mktemp("pieces") / "model.safetensors"
    whole = torch.arange(float(rows * columns)).view(rows, columns)
    save_file({"w": whole}, file)
    mesh = Mesh((Axis("dp", 2, 0), Axis("tp", 2, 0)))
    sharding = parse_sharding(text)
    piece = entries_of(file)["w"].read(piece_runs(whole.shape, sharding, mesh, rank))
    assert torch.equal(piece, local_shard(whole, sharding, mesh, rank))


def test_what_is_saved_is_read_by_safetensors(tmp_path: Path) -> None:
    model = filled(torch.bfloat16)
    for path in (tmp_path / "one.safetensors", tmp_path / "folder" / "model.safetensors"):
        autopar.save_checkpoint(model, path if path.stem == "one" else path.parent)
        read = load_file(path)
        assert read.keys() == state_of(model).keys()
        assert all(torch.equal(read[k], v) for k, v in state_of(model).items())
    with pytest.raises(UserError, match=r"cannot write the checkpoint: .*one.safetensors/a.safe"):
        autopar.save_checkpoint(model, tmp_path / "one.safetensors" / "a.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "one.safetensors"]
