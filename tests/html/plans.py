"""Plans to draw: a small ordinary one, and one whose every text tries to run a script."""

from __future__ import annotations

from dataclasses import replace

from autopar.cost.timeline import TimelineSummary
from autopar.ir.mesh import Axis, Mesh
from autopar.plan import Activation, Alternative, Plan, Prediction, Storage, Traffic

KIB = 1024


def _op(
    op: str, module: str, line: int, count: int, splits: str, type_: str, out: str
) -> Activation:
    return Activation(op, module, f"gpt.py:{line}", count, "bk,nk->bn", splits, type_, out, 2048)


PLAN = Plan(
    fingerprint="f" * 64,
    mesh=Mesh((Axis("dp", 2, 1), Axis("tp", 4))),
    cluster="2x4xH100",
    strategy="auto",
    choices={"linear": {"dp": "b"}},
    params={
        "wte.weight": Storage("[-, -]", False, "f32[512, 64]", 128 * KIB),
        **{
            f"blocks.{i}.{name}.weight": Storage("[tp, -]", name == "up", "f32[256, 64]", 16 * KIB)
            for i in range(4)
            for name in ("up", "down")
        },
    },
    predicted=Prediction(
        0.0125,
        0.01,
        0.002,
        0.0005,
        1300 * KIB,
        {
            "parameters, gradients, optimizer state": 1024 * KIB,
            "saved activations": 256 * KIB,
            "gathered parameters": 20 * KIB,
        },
        {"all_reduce": 99},
    ),
    alternatives=(
        Alternative("zero", "dp=8", None, None, "needs 3 GiB per device, 2 GiB are there"),
        Alternative("data", "dp=8", 0.02, 1 << 21, "1.60x: communication +7.5 ms"),
        Alternative("tensor", "tp=8", 0.021, 1 << 20, "1.68x: communication +8.5 ms"),
    ),
    hints={"b": 8},
    activations=(
        _op("embedding", "wte", 3, 1, "dp:0", "f32[8, 64]", "[dp, -]"),
        _op("linear", "blocks.{0..3}.up", 9, 4, "dp:0 tp:1", "f32[8, 256]", "[dp, tp]"),
        _op("gelu", "blocks.{0..3}", 9, 4, "dp:0 tp:1", "f32[8, 256]", "[dp, tp]"),
        _op("reshape", "blocks.{0..3}", 10, 4, "dp:0 tp:1", "f32[8, 256]", "[dp, tp]"),
        _op("linear", "blocks.{0..3}.down", 10, 4, "dp:0 tp:sum", "f32[8, 64]", "[dp, -] +tp"),
        _op("sum", "", 12, 1, "dp:sum", "f32[]", "[] +dp"),
    ),
    traffic=(
        Traffic("all_reduce", "dp", "gradients of parameters", 9, 99 * KIB),
        Traffic("all_reduce", "tp", "activations at add blocks.{0..3}", 4, 12 * KIB),
    ),
)


# Two steps of the same length: one with all its spans, one with short ones left out.
def _spans(scale: float) -> tuple[tuple[str, str, float, float, str], ...]:
    compute = [
        (f"linear_{i}", "compute", i * 1e-3, i * 1e-3 + 0.9e-3 * scale, "forward") for i in range(5)
    ] + [
        (f"linear_{i}", "compute", i * 1e-3, i * 1e-3 + 0.9e-3 * scale, "backward")
        for i in range(5, 11)
    ]
    return (
        *compute,
        ("add:tp", "level 0 tp", 0.9e-3, 1.4e-3, "forward"),
        ("gradients:dp", "level 1 dp", 9e-3, 11.6e-3, "backward"),
        ("gradients:dp", "compute", 11e-3, 11.6e-3, "wait"),
        ("optimizer", "compute", 11.6e-3, 12e-3, "optimizer"),
    )


TIMELINE = TimelineSummary(
    12e-3, 9.9e-3, {"tp": 0.0, "dp": 0.6e-3}, 0.0, 0.4e-3, 1300 * KIB, _spans(1.0),
    tuple((i * 1e-3, (400 + 180 * min(i, 12 - i)) * KIB) for i in range(12)),
)  # fmt: skip
SPARSE = replace(TIMELINE, spans=_spans(0.05))


def with_timeline(plan: Plan, timeline: TimelineSummary) -> Plan:
    """The plan with a timeline, as a field or beside its fields."""
    made = replace(plan)
    object.__setattr__(made, "timeline", timeline)
    return made


def crowded() -> Plan:
    """The plan with forty candidates close to each other, and a limit."""
    found = tuple(
        Alternative(
            f"zero {i}", f"dp={i}", 0.013 + 0.0004 * (i * 7 % 11), (3 + i * 5 % 13) << 17, "slower"
        )
        for i in range(40)
    )
    made = replace(PLAN, alternatives=found)
    object.__setattr__(made, "memory_limit", 1.8 * 2**20)
    return made


# Every way out of an attribute, an element, a style sheet and a script, and what UTF-8 cannot hold.
PROBE = (
    "</style></script></title></svg>\"'><script>window.probed = 1</script>"
    "<img src=https://probe.invalid/x onerror='window.probed = 2'>&lt;\x00\ud800]]>"
)

HOSTILE = replace(
    PLAN,
    fingerprint=PROBE,
    cluster=f"cluster {PROBE}",
    strategy=PROBE,
    params={f"blocks.{i}.{PROBE}": Storage("[tp, -]", False, PROBE, 64) for i in range(2)},
    predicted=replace(PLAN.predicted, memory_parts={PROBE: 4096, f"activations {PROBE}": 4096}),
    alternatives=(
        Alternative(PROBE, PROBE, 0.5, 4096, PROBE),
        Alternative(PROBE, PROBE, None, None, PROBE),
    ),
    notes=(PROBE, "a" * 500),
    hints={PROBE: 1},
    activations=(
        Activation(
            PROBE, f"blocks.{{0,1}}.{PROBE}", f"{PROBE}:1", 2, PROBE, PROBE, PROBE, PROBE, 9
        ),
        Activation("add", "x" * 300, "javascript:alert(1)", 1, "", "", "f32[8]", "[dp]", 9),
    ),
    traffic=(Traffic(PROBE, PROBE, PROBE, 1, 1),),
)
HOSTILE = with_timeline(
    HOSTILE,
    replace(
        TIMELINE, exposed_s={PROBE: 1.0}, spans=((PROBE, PROBE, 0.0, 1e-3, PROBE), *TIMELINE.spans)
    ),
)
