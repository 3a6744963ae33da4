"""Write the accelerator profiles in autopar/profiles from tables of published figures.

    python -m benchmarks.make_profiles FOLDER [OUT]

FOLDER holds hardware_datasheet.csv, gemm_efficiency.csv, membw_measured.csv, nccl_busbw.csv and
nccl_model_constants.csv. Every number carries the source that its row names; a figure that a device
lacks is taken from the nearest relative and says so.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from autopar.cost.cluster import Cluster, CollectiveCurve, Device, Level
from autopar.cost.comm import fit_collective, wire_factor
from autopar.cost.curve import Curve
from autopar.cost.profile import save_profile

Row = dict[str, str]
Tables = dict[str, list[Row]]
TABLES = (
    "hardware_datasheet",
    "gemm_efficiency",
    "membw_measured",
    "nccl_busbw",
    "nccl_model_constants",
)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
GIB = 1024**3
# Time from one kernel to the next on a busy stream, plus its ramp up and down.
KERNEL_S = 4e-6
KERNEL_SOURCE = "assumed: 4 us per kernel on the device; the tables have no figure"


@dataclass(frozen=True)
class Efficiency:
    """What a training step reaches of the tables' best figures, one number per kind of work.

    `product`, `fp8`, `attention`: of the rates of benchmarks that repeat one kernel (a step also
    has transposed operands, changing shapes, and runs into the power limit). `memory`: of the
    stream bandwidth. `link`: of collectives' bandwidth in groups of 8. Fitted to
    published training steps: docs/accuracy.md says how, and how independent the check is.
    """

    product: float = 1.0
    fp8: float = 1.0
    attention: float = 1.0
    memory: float = 1.0
    link: float = 1.0


AMPERE = Efficiency(product=0.83, fp8=0.83, attention=0.93, memory=1.0)
HOPPER = Efficiency(product=1.04, fp8=0.98, attention=0.88, memory=0.42)
HOPPER_500W = Efficiency(product=1.04, fp8=0.98, attention=0.54, memory=0.42)
VOLTA = Efficiency(product=0.62, fp8=0.62, attention=0.62, memory=0.75)
# The runs on AWS p3.16xlarge show a quarter of what NCCL reaches in groups of 8 elsewhere.
VOLTA_P3 = replace(VOLTA, link=0.25)
FITTED = "what steps of training reach: docs/accuracy.md"


@dataclass(frozen=True)
class Recipe:
    """Where a device's figures stand in the tables, and whose stand in for those it lacks.

    `ends`: how a datasheet's choice such as 16/32 is read (the first or the last figure).
    `network_bytes_per_s`: of one device, where it is not the tables' usual network.
    """

    name: str
    datasheet: str
    gemm: tuple[str, ...]  # rows whose efficiency, as a share of peak, makes the curve
    membw: str | None  # rows of membw_measured; None: the A100's measured share of the datasheet
    busbw: tuple[tuple[str, str], ...]  # (device, algorithm) of all_reduce rows in one host
    nodes: str | None  # device of multi-node all_reduce rows; None: datasheet NIC x H100's share
    reaches: Efficiency = HOPPER
    bf16_from: str = ""  # datasheet row of the peak rates where the device's own has none
    first: bool = False
    network_bytes_per_s: float | None = None
    fp8: tuple[str, ...] = ()


# AWS p3.16xlarge: 25 Gb/s for 8 devices (the datasheet row says so).
P3_NETWORK = 25e9 / 8 / 8
A100_GEMM = ("A100 SXM 80GB",)
H100_GEMM = ("H100 80GB (variant unstated)",)
H100_FP8 = ("H100 SXM 80GB",)
A100_LINK = (("A100 SXM", ""),)
H100_LINK = (("H100 SXM 80GB", "NVLS"),)
V100_LINK = (("V100 NVLink2", ""),)
A100_NET, H100_NET = "DGX A100 NVL3+8x200Gb", "DGX H100 NVL4+8x400Gb"
B200_NET = "B200 (p6-b200, EFA v4 8x400Gb)"
RECIPES = (
    Recipe("V100", "V100 SXM2 16/32GB", A100_GEMM, None, V100_LINK, None, VOLTA),
    Recipe(
        "V100-P3",
        "V100 SXM2 16/32GB",
        A100_GEMM,
        None,
        V100_LINK,
        None,
        VOLTA_P3,
        first=True,
        network_bytes_per_s=P3_NETWORK,
    ),
    Recipe("A100", "A100 SXM 80GB", A100_GEMM, "A100 SXM 80GB", A100_LINK, A100_NET, AMPERE),
    Recipe("A100-40GB", "A100 SXM 40GB", A100_GEMM, None, A100_LINK, A100_NET, AMPERE),
    Recipe("H100", "H100 SXM5 80GB", H100_GEMM, "H100 SXM 80GB", H100_LINK, H100_NET, fp8=H100_FP8),
    Recipe(
        "H100-500W",
        "H100 SXM 96GB HBM2e (Meta Grand Teton, 500W)",
        H100_GEMM,
        None,
        H100_LINK,
        H100_NET,
        HOPPER_500W,
        bf16_from="H100 SXM5 80GB",
        fp8=H100_FP8,
    ),
    Recipe(
        "H200",
        "H200 SXM 141GB",
        H100_GEMM,
        "H200 SXM",
        (("H200 SXM", "NVLS"),),
        "H200 (4 nodes, ring)",
        fp8=("H200 SXM",),
    ),
    Recipe("B200", "B200 SXM", ("B200", "NVIDIA B200 SXM"), None, ((B200_NET, ""),), B200_NET),
    Recipe("MI300X", "MI300X 192GB", ("AMD MI300X",), None, (("MI300X", ""),), None),
)
H100 = next(recipe for recipe in RECIPES if recipe.name == "H100")
# Compute runs this much slower while a collective runs beside it.
OVERLAP_ROW = "Galvatron profile"


def read_tables(folder: Path) -> Tables:
    tables: Tables = {}
    for name in TABLES:
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            tables[name] = list(csv.DictReader(file))
    return tables


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def sources(rows: list[Row], note: str = "") -> str:
    text = "; ".join(dict.fromkeys(row["source"] for row in rows))
    return f"{note}: {text}" if note else text


def gemm_efficiency(
    tables: Tables, devices: tuple[str, ...], dtypes: tuple[str, ...] = ("fp16", "bf16")
) -> tuple[list[tuple[float, float]], str]:
    """(flops, share of peak) of the measured products of some dtypes, and their sources.

    Small products of a device without rows of its own follow the A100's curve, scaled to the
    device's best product.
    """

    def points(
        names: tuple[str, ...], dtypes: tuple[str, ...] = ("fp16", "bf16")
    ) -> tuple[list[tuple[float, float]], list[Row]]:
        rows = [
            row
            for row in tables["gemm_efficiency"]
            if row["device"] in names
            and row["dtype"] in dtypes
            and row["m"]
            and min(float(row[d]) for d in "mnk") >= 1024
        ]
        made = [
            (2 * float(r["m"]) * float(r["n"]) * float(r["k"]), float(r["frac_of_peak"]))
            for r in rows
        ]
        return sorted(made), rows

    own, rows = points(devices, dtypes)
    note = "share of peak, measured"
    if len(own) < 4:
        ramp, ramp_rows = points(("A100 SXM 80GB",))
        best, best_ramp = max(y for _, y in own), max(y for _, y in ramp)
        first = min(x for x, _ in own)
        own = [(x, y / best_ramp * best) for x, y in ramp if x < first] + own
        rows = rows + ramp_rows
        note = "share of peak, measured; products below the smallest row follow the A100's curve"
    rising: list[tuple[float, float]] = []  # the best product of at most this size
    for x, y in own:
        rising.append((x, max(y, rising[-1][1] if rising else 0.0)))
    # Assumed: below the smallest row the device is not filled and the rate falls with the work.
    x0, y0 = rising[0]
    return [(x0 / 64, y0 / 16), *rising], sources(rows, note)


def sheet_row(tables: Tables, name: str) -> Row:
    return next(r for r in tables["hardware_datasheet"] if r["device"] == name)


def matmul_rates(tables: Tables, recipe: Recipe) -> dict[str, Curve]:
    """Rates of products by dtype: peak of the datasheet x share measured x what steps reach."""
    sheet = sheet_row(tables, recipe.bf16_from or recipe.datasheet)
    measured = gemm_efficiency(tables, recipe.gemm)
    fp8 = gemm_efficiency(tables, recipe.fp8, ("fp8",)) if recipe.fp8 else measured
    rates: dict[str, Curve] = {}
    for dtype, column in (
        ("bfloat16", "bf16_dense_tflops"),
        ("float16", "fp16_dense_tflops"),
        ("float32", "fp32_tflops"),
        ("float8_e4m3fn", "fp8_dense_tflops"),
    ):
        peak = number(sheet[column])
        if peak is None:
            continue
        narrow = dtype.startswith("float8")
        points, source = fp8 if narrow else measured
        reached = recipe.reaches.fp8 if narrow else recipe.reaches.product
        rates[dtype] = Curve.of(
            ((x, y * peak * 1e12 * reached) for x, y in points),
            f"peak {peak:g} Tflop/s: {sheet['source']}; {source}; times {reached:g}, {FITTED}",
        )
    return rates


def attention_rates(tables: Tables, recipe: Recipe) -> dict[str, Curve]:
    """FlashAttention 2 as published at sequence 8192; shorter ones ramp as products do."""
    name = {"A100-40GB": "A100 SXM 80GB", "H100-500W": "H100 SXM 80GB"}.get(recipe.name)
    flash = [
        r
        for r in tables["gemm_efficiency"]
        if r["device"] == (name or recipe.membw) and "Flash Attention" in r["note"]
    ]
    if not flash:
        return {}
    efficiency, _ = gemm_efficiency(tables, recipe.gemm)
    top = max(y for _, y in efficiency)
    best = float(flash[0]["tflops"]) * 1e12 * recipe.reaches.attention
    note = f"{sources(flash)}; times {recipe.reaches.attention:g}, {FITTED}"
    curve = Curve.of(((x, best * y / top) for x, y in efficiency), note)
    return {"bfloat16": curve, "float16": curve}


def device(tables: Tables, recipe: Recipe) -> Device:
    sheet = sheet_row(tables, recipe.datasheet)
    rates = {"matmul": matmul_rates(tables, recipe)}
    attention = attention_rates(tables, recipe)
    if attention:
        rates["attention"] = attention
    sheet_bw = float(sheet["mem_bw_TBps"].split("/")[-1]) * 1e12
    memory = float(sheet["mem_gb"].split("/")[0 if recipe.first else -1])
    bandwidth = memory_bandwidth(tables, recipe, sheet_bw, sheet["source"])
    reached = recipe.reaches.memory
    overlap = next(
        r
        for r in tables["nccl_busbw"]
        if r["device"] == OVERLAP_ROW and r["collective"] == "overlap_coe"
    )
    return Device(
        recipe.name,
        memory * 1e9 if memory > 100 else memory * GIB,
        KERNEL_S,
        rates,
        {
            "default": Curve(
                bandwidth.scaled(reached).points,
                f"{bandwidth.source}; times {reached:g}, {FITTED}",
            )
        },
        Curve.of([(1, 1 / 64), (64, 1.0)], "tensor-core tiles are at least 64 wide: padding"),
        overlap_slowdown=float(overlap["busbw_GBps"]) - 1.0,
        sources={
            "memory_bytes": sheet["source"],
            "op_overhead_s": KERNEL_SOURCE,
            "overlap_slowdown": f"measured on A100s: {overlap['source']}",
        },
    )


def memory_bandwidth(tables: Tables, recipe: Recipe, sheet: float, source: str) -> Curve:
    """Streaming bandwidth: BabelStream's copy where measured, else the datasheet's at its share."""

    def copy_row(name: str) -> Row:
        rows = tables["membw_measured"]
        return next(r for r in rows if r["device"] == name and r["kernel"] == "Copy")

    if recipe.membw is not None:
        row = copy_row(recipe.membw)
        return Curve.constant(float(row["TBps"]) * 1e12, f"stream copy: {row['source']}")
    row = copy_row("H100 SXM 80GB")
    reference = next(r for r in tables["hardware_datasheet"] if r["device"] == "H100 SXM5 80GB")
    share = float(row["TBps"]) / float(reference["mem_bw_TBps"])
    note = f"{sheet / 1e12:g} TB/s: {source}; times the H100's measured share {share:.2f}"
    return Curve.constant(sheet * share, f"{note}: {row['source']}")


def timed(rows: list[Row]) -> list[tuple[float, float]]:
    """(bytes, seconds) of all_reduce rows, from the bus bandwidth of nccl-tests."""
    found: list[tuple[float, float]] = []
    for row in rows:
        size, bus = number(row["size_bytes"]), number(row["busbw_GBps"])
        group = number(row["gpus"])
        if size and bus and group:
            found.append((size, wire_factor("all_reduce", int(group)) * size / (bus * 1e9)))
    return sorted(found)


def host_level(tables: Tables, recipe: Recipe) -> Level:
    """All-reduce as measured; the others on the same links at the H100's relative latency."""
    rows = [
        r
        for r in tables["nccl_busbw"]
        if (r["device"], r["algo"]) in recipe.busbw
        and r["collective"] == "all_reduce"
        and r["nodes"] == "1"
    ]
    fitted = "NVSWITCH H100 measured (nccl-tests fit)"
    constants = [r for r in tables["nccl_model_constants"] if r["table"] == fitted]
    times = timed(rows)
    collectives: dict[str, tuple[CollectiveCurve, ...]] = {}
    if len(times) > 4:
        collectives["all_reduce"] = (fit_collective("all_reduce", 8, times, sources(rows)),)
        peak = ring_peak(tables, recipe, rows)
    else:
        peak = max(float(r["busbw_GBps"]) for r in rows) * 1e9
        alpha = next(
            r for r in constants if r["collective"] == "ALLREDUCE" and r["gpus_per_node"] == "8"
        )
        collectives["all_reduce"] = (
            CollectiveCurve(
                8,
                float(alpha["alpha_us"]) * 1e-6,
                Curve.constant(peak, sources([*rows, alpha], "bandwidth, then the H100's latency")),
            ),
        )
    h100_peak = ring_peak(tables, H100, [])
    for kind, column in (("all_gather", "ALLGATHER"), ("reduce_scatter", "REDUCESCATTER")):
        curves = []
        for r in constants:
            if r["collective"] != column:
                continue
            group = int(r["gpus_per_node"])
            # beta is bytes of the gathered tensor per second; bus bytes are (g-1)/g of them.
            bus = float(r["beta_GBps"]) * 1e9 * wire_factor(kind, group)
            note = "the H100's fit"
            if recipe.name != "H100":
                bus *= peak / h100_peak
                note += f", bandwidth times {peak / h100_peak:.2f} (ring bandwidths)"
            curves.append(
                CollectiveCurve(
                    group, float(r["alpha_us"]) * 1e-6, Curve.constant(bus, sources([r], note))
                )
            )
        collectives[kind] = tuple(sorted(curves, key=lambda c: c.group))
    direct = next(r for r in tables["nccl_model_constants"] if r["table"] == "A2A intra-node CE")
    scale = 1.0 if recipe.name == "H100" else peak / h100_peak
    collectives["all_to_all"] = (
        CollectiveCurve(
            8,
            float(direct["alpha_us"]) * 1e-6,
            Curve.constant(
                float(direct["beta_GBps"]) * 1e9 * wire_factor("all_to_all", 8) * scale,
                sources([direct], f"the H100's, bandwidth times {scale:.2f}"),
            ),
        ),
    )
    gather = collectives["all_gather"][-1]
    collectives["broadcast"] = (CollectiveCurve(8, gather.alpha_s, gather.bandwidth),)
    link = recipe.reaches.link
    if link != 1.0:
        collectives = {kind: beyond_quads(collectives[kind], link) for kind in KINDS}
    return Level("host", 8, {kind: collectives[kind] for kind in KINDS})


def beyond_quads(curves: tuple[CollectiveCurve, ...], share: float) -> tuple[CollectiveCurve, ...]:
    """Groups of 2 and 4 as they are, of 8 at a share of the bandwidth.

    V100 hosts join two quads of four devices: NVLinks within a quad, fewer of them between.
    """
    whole = curves[-1]
    note = f"{whole.bandwidth.source}; times {share:g}, {FITTED}"
    slow = replace(whole, bandwidth=Curve(whole.bandwidth.scaled(share).points, note))
    known = {curve.group: curve for curve in curves[:-1]}
    return (*(known.get(g, replace(whole, group=g)) for g in (2, 4)), slow)


def ring_peak(tables: Tables, recipe: Recipe, rows: list[Row]) -> float:
    """Bytes/s of the bus for a ring of 8: measured without NVLS where there is such a row."""
    names = {"H100": "H100 NVLink4 (ring)", "H200": "H200 SXM", "B200": "B200"}
    ring = [
        float(r["busbw_GBps"])
        for r in tables["nccl_busbw"]
        if r["device"] == names.get(recipe.name)
        and r["gpus"] == "8"
        and (r["algo"].startswith("Ring") or "ring" in r["device"])
        and r["collective"] == "all_reduce"
    ]
    return max(ring or [float(r["busbw_GBps"]) for r in rows]) * 1e9


def network_level(tables: Tables, recipe: Recipe) -> Level:
    """Groups of one device per host: the H100's ring and latency tables, scaled to the links."""
    nic, nic_source = per_device_network(tables, recipe)
    reference, _ = per_device_network(tables, H100)
    scale = nic / reference
    note = f"model of the H100's network, bandwidth times {scale:.2f} ({nic_source})"
    collectives: dict[str, tuple[CollectiveCurve, ...]] = {}
    for kind, prefix, column in (
        ("all_reduce", "H100_AR", "AR"),
        ("all_gather", "H100_AGRS", "AG/RS"),
        ("reduce_scatter", "H100_AGRS", "AG/RS"),
    ):
        rows = [
            r
            for r in tables["nccl_model_constants"]
            if r["table"].startswith(prefix)
            and r["collective"] == column
            and r["gpus_per_node"] == "1"
        ]
        curves = []
        for nodes in sorted({int(r["nodes"]) for r in rows}):
            mine = [r for r in rows if int(r["nodes"]) == nodes]
            times = [(float(x), best_time(mine, x, scale)) for x in (4**i for i in range(5, 17))]
            curves.append(fit_collective(kind, nodes, times, sources(mine, note)))
        collectives[kind] = tuple(curves)
    rows = [r for r in tables["nccl_model_constants"] if r["table"] == "A2A multi-node latency"]
    exchange = next(r for r in tables["nccl_busbw"] if r["device"] == "DGX H100 8x400Gb")
    collectives["all_to_all"] = tuple(
        CollectiveCurve(
            int(r["nodes"]),
            float(r["alpha_us"]) * 1e-6,
            Curve.constant(
                float(exchange["busbw_GBps"]) * 1e9 * scale, sources([r, exchange], note)
            ),
        )
        for r in rows
    )
    collectives["broadcast"] = collectives["all_gather"]
    return Level("network", 8 * 1024, {kind: collectives[kind] for kind in KINDS})


def best_time(rows: list[Row], nbytes: float, scale: float) -> float:
    """Seconds by the best protocol and algorithm; beta is tensor bytes per second."""
    return min(
        float(r["alpha_us"]) * 1e-6 + nbytes / (float(r["beta_GBps"]) * 1e9 * scale) for r in rows
    )


def per_device_network(tables: Tables, recipe: Recipe) -> tuple[float, str]:
    """Bytes/s of the network that one of a host's 8 devices has, and the source."""
    if recipe.network_bytes_per_s is not None:
        row = sheet_row(tables, recipe.datasheet)
        return recipe.network_bytes_per_s, f"25 Gb/s for 8 devices: {row['source']}"
    rows = [
        r
        for r in tables["nccl_busbw"]
        if r["device"] == recipe.nodes and r["nodes"] not in ("", "1") and r["busbw_GBps"]
    ]
    if rows:
        row = max(rows, key=lambda r: float(r["busbw_GBps"]))
        bus = float(row["busbw_GBps"])
        return bus / 8 * 1e9, f"bus bandwidth {bus:g} GB/s over 8 devices: {row['source']}"
    sheet = next(r for r in tables["hardware_datasheet"] if r["device"] == recipe.datasheet)
    text = sheet["typical_internode_unidir_GBps_per_gpu"]
    if recipe.name == "V100":  # one 100 Gb/s adapter for 4 of the 8 devices
        return 12.5e9 / 4, f"{text}: {sheet['source']}"
    share = per_device_network(tables, H100)[0] / 50e9
    return float(text) * 1e9 * share, f"{text} GB/s times the H100's share: {sheet['source']}"


def make_profile(tables: Tables, recipe: Recipe) -> Cluster:
    return Cluster(
        recipe.name,
        device(tables, recipe),
        (host_level(tables, recipe), network_level(tables, recipe)),
    )


def main(arguments: list[str]) -> None:
    if len(arguments) not in (1, 2):
        raise SystemExit(__doc__)
    tables = read_tables(Path(arguments[0]))
    default = Path(__file__).parent.parent / "autopar" / "profiles"
    out = Path(arguments[1]) if len(arguments) == 2 else default
    for recipe in RECIPES:
        save_profile(make_profile(tables, recipe), out / f"{recipe.name.lower()}.json")
        print(out / f"{recipe.name.lower()}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
