"""Tables fit 100 columns, and say what a reader looks for."""

from __future__ import annotations

from io import StringIO

import pytest
from expecttest import assert_expected_inline
from rich.console import Console

from autopar.ir.mesh import Mesh
from autopar.passes.describe import collapse, pattern
from autopar.plan import Activation, Alternative, Plan, Prediction, Storage, Traffic
from autopar.report import print_plan, print_timing
from autopar.units import bytes_text, seconds_text

PLAN = Plan(
    fingerprint="f" * 64,
    mesh=Mesh.of(dp=2, tp=2),
    cluster="cpu:4",
    strategy="auto",
    choices={},
    params={
        "wte.weight": Storage("[-, -]", False, "f32[512, 64]", 131072),
        **{f"blocks.{i}.up.weight": Storage("[tp, -]", False, "f32[256, 64]", 32768) for i in range(3)},
    },
    predicted=Prediction(0.0125, 0.01, 0.002, 0.0005, 5 << 20, {"weights": 5 << 20}, {"all_reduce": 99}),
    alternatives=(
        Alternative("zero", "dp=4", None, None, "needs 3 GiB per device, 2 GiB are there"),
        Alternative("data", "dp=4", 0.02, 1 << 30, "1.60x: communication +7.5 ms"),
    ),
    notes=("mystery: no sharding rule; runs replicated on every device",),
    hints={"b": 8},
    activations=(
        Activation("embedding", "wte", "gpt.py:3", 1, "vd,b->bd", "dp:0", "f32[8, 64]", "[dp, -]", 1024),
        Activation("linear", "blocks.{0..2}.up", "gpt.py:9", 3, "bk,nk->bn", "dp:0 tp:1", "f32[8, 256]", "[dp, tp]", 2048),
        Activation("gelu", "blocks.{0..2}", "gpt.py:9", 3, "bn->bn", "dp:0 tp:1", "f32[8, 256]", "[dp, tp]", 2048),
        Activation("mul", "blocks.{0..2}", "gpt.py:10", 3, "bn->bn", "dp:0 tp:1", "f32[8, 256]", "[dp, tp]", 2048),
        Activation("reshape", "blocks.{0..2}", "gpt.py:10", 3, "bn->bn", "dp:0 tp:1", "f32[8, 256]", "[dp, tp]", 2048),
        Activation("sum", "", "other.py:1", 1, "bn->.", "dp:sum", "f32[]", "[] +dp", 4),
    ),
    traffic=(Traffic("all_reduce", "dp", "gradients of parameters", 4, 99),),
)  # fmt: skip


def printed(plan: Plan) -> str:
    out = StringIO()
    print_plan(plan, Console(file=out, width=100))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join(lines).strip()


def test_plan_tables() -> None:
    assert_expected_inline(
        printed(PLAN),
        """\
plan            dp=2 x tp=2  (4 devices of cpu:4)
strategy        auto, for b=8
step            12.5 ms = compute 10 ms + communication 2 ms + optimizer 500 us
memory          5 MiB per device = weights 5 MiB
sends           all_reduce 99 B
optimality gap  0 (proven the best of the candidates)

parameters
name                     ×  type          sharding  stored per device
wte.weight               1  f32[512, 64]  [-, -]              128 KiB
blocks.{0..2}.up.weight  3  f32[256, 64]  [tp, -]              96 KiB

activations (lines without a file are of gpt.py)
op              line        ×  splits     output            bytes
wte embedding   :3          1  dp:0       f32[8/dp,64]      1 KiB
blocks.{0..2}:
  up linear     :9          3  dp:0 tp:1  f32[8/dp,256/tp]  2 KiB
  gelu, mul     :9          3  dp:0 tp:1  f32[8/dp,256/tp]  4 KiB
sum             other.py:1  1  dp:sum     f32[] +dp           4 B

collectives per step
collective  axis  what for                 ×  sent per device
all_reduce  dp    gradients of parameters  4             99 B

alternatives
strategy  mesh   step  memory  why not
data      dp=4  20 ms   1 GiB  1.60x: communication +7.5 ms
zero      dp=4      -       -  needs 3 GiB per device, 2 GiB are there

warning mystery: no sharding rule; runs replicated on every device""",
    )


def test_long_names_fit_100_columns() -> None:
    deep = ".".join(["encoder"] * 30)
    long = Activation("linear", deep, "f.py:1", 1, "", "dp:0", "f32[8, 8, 8, 8, 8, 8, 8]", "[dp, -, -, -, -, -, -]", 9)  # fmt: skip
    plan = Plan(
        **{
            **{f: getattr(PLAN, f) for f in PLAN.__dataclass_fields__},
            "params": {deep: Storage("[-, -]", False, "f32[512, 64]", 1)},
            "activations": (long,),
            "traffic": (Traffic("all_reduce", "dp", deep, 1, 1),),
            "notes": (deep,),
        }
    )
    out = StringIO()
    print_plan(plan, Console(file=out, width=100))
    assert max(map(len, out.getvalue().splitlines())) <= 100


def test_timing_side_by_side() -> None:
    out = StringIO()
    print_timing(PLAN, 0.025, 10 << 20, Console(file=out, width=100))
    assert_expected_inline(
        "\n".join(line.rstrip() for line in out.getvalue().splitlines()),
        """\
one training step
                   predicted  measured  measured / predicted
time                 12.5 ms     25 ms                  2.00
memory per device      5 MiB    10 MiB                  2.00""",
    )


def test_timing_without_a_plan() -> None:
    out = StringIO()
    print_timing(None, None, console=Console(file=out, width=100))
    assert out.getvalue() == "one training step: not measured yet\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 us"),
        (1.2e-6, "1.2 us"),
        (0.00345, "3.45 ms"),
        (0.9996, "1000 ms"),
        (75.3, "75.3 s"),
    ],
)
def test_seconds_text(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (3 << 30, "3 GiB"), (5 << 50, "5120 TiB")],
)
def test_bytes_text(nbytes: float, text: str) -> None:
    assert bytes_text(nbytes) == text


def test_collapse_names() -> None:
    assert collapse(["a.0.w", "a.1.w", "a.2.w", "a.5.w"]) == "a.{0..2,5}.w"
    assert collapse(["a.0.w", "a.1.w"]) == "a.{0,1}.w"
    assert collapse(["0"]) == "0"
    assert collapse(["conv1.w"]) == "conv1.w"
    assert pattern("layers.12.experts.3.w1") == "layers.#.experts.#.w1"
