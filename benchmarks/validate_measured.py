"""Predicted against measured step times of forced plans, on 4 CPU ranks of this machine.

    python -m benchmarks.validate_measured [--profile FILE] [--models gpt rec] [--json out.json]

Every model runs under every family of plans and under the plan that the search chooses. All plans
of a model live in the same 4 processes and take turns of a few whole training steps (forward,
backward, fused AdamW, zero_grad), in an order that turns round, so that what the machine does
meanwhile hits all of them; a turn in which other programs used the processors is repeated. Plans
that lower to one program are one row. The chosen plan is compared with every other turn by turn:
the median of the ratios, with its 95 % interval. Plans about as fast as it (within a quarter) take
`--deciding` more turns with it for that comparison alone: which of them is fastest is a matter of
few percent. Two plans count as told apart where that interval leaves 1 out (with the default of six
rounds: all turns say the same): within a model the order of these is held against the prediction,
next to that of all. Without `--profile` the machine is calibrated first. What stages send each
other counts as compute. Exits with 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autopar.cost.profile import save_profile
from autopar.runtime.calibrate import calibrate

from .paired import Ratio, paired_ratio
from .rank_jobs import run_ranks
from .validation_models import VALIDATION_MODELS

RANKS = 4
PIPELINES = ("pipeline", "pipeline+data", "pipeline+tensor")
STRATEGIES = ("data", "zero", "tensor", "data+tensor", "zero+tensor", *PIPELINES, "auto")
MEDIAN_ERROR, KENDALL, AUTO_OVER_BEST, PAIRS = 0.15, 0.8, 1.05, 24  # the goals
LOADED = 0.04  # of the processors, used by others: results above it are marked
console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Row:
    """One plan of one model; times in seconds. `foreign`: processors that others used."""

    model: str
    strategies: tuple[str, ...]
    mesh: str
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    steps: int
    spread: float
    foreign: float
    turns: tuple[tuple[float, ...], ...] = ()

    @property
    def error(self) -> float:
        """Relative error of the predicted step time."""
        return self.predicted["step"] / self.measured["step"] - 1


def kendall(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau-a of (predicted, measured): agreeing minus disagreeing over all couples."""
    score = total = 0
    for (a, b), (c, d) in combinations(pairs, 2):
        total += 1
        score += ((a > c) - (a < c)) * ((b > d) - (b < d))
    return score / total if total else 1.0


def run_model(
    model: str, strategies: Sequence[str], profile: Path, arguments: argparse.Namespace
) -> tuple[list[Row], dict[str, Any]]:
    """Measure all plans of a model; raises RuntimeError where a rank fails."""
    with tempfile.TemporaryDirectory(prefix="autopar-validate-") as folder:
        job = {
            "model": model,
            "strategies": list(strategies),
            "cluster": str(profile),
            "rounds": arguments.rounds,
            "deciding": arguments.deciding,
            "steps": arguments.steps,
            "patience_s": arguments.patience,
        }
        try:
            found = run_ranks("benchmarks.validation_worker", RANKS, job, Path(folder), quiet=True)
        except RuntimeError as error:
            raise RuntimeError(f"{model}: a rank failed") from error
    return [row_of(model, plan) for plan in found["plans"]], found


def row_of(model: str, plan: Mapping[str, Any]) -> Row:
    """Medians over the steps of one plan."""
    middle = {name: statistics.median(times) for name, times in plan["measured"].items()}
    steps, deciding = plan["measured"]["step"], plan.get("deciding", [])
    times, each = sorted(steps), plan.get("steps_per_turn", 1)
    turns = [tuple(s[i : i + each]) for s in (steps, deciding) for i in range(0, len(s), each)]
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    middle["compute"] = middle["forward"] + middle["backward"] - middle["comm"]
    return Row(
        model,
        tuple(plan["strategies"]),
        plan["mesh"],
        plan["predicted"],
        middle,
        len(times),
        (quarters[2] - quarters[0]) / middle["step"],
        max(plan["foreign"], default=0.0),
        tuple(turns),
    )


def show(model: str, rows: Sequence[Row], failed: Mapping[str, str]) -> None:
    table = Table(title=f"{model}: milliseconds per step, predicted / measured")
    for column in (
        "plan",
        "mesh",
        "step",
        "error",
        "compute",
        "comm (waiting)",
        "optimizer",
        "IQR",
    ):
        table.add_column(column, justify="left" if column in ("plan", "mesh") else "right")
    for row in rows:
        p, m = ({k: 1e3 * v for k, v in d.items()} for d in (row.predicted, row.measured))
        table.add_row(
            ", ".join(row.strategies),
            row.mesh,
            f"{p['step']:.1f} / {m['step']:.1f}",
            f"{row.error:+.0%}",
            f"{p['compute']:.1f} / {m['compute']:.1f}",
            f"{p['comm']:.1f} / {m['comm']:.1f} ({m['wait']:.1f})",
            f"{p['optimizer']:.1f} / {m['optimizer']:.1f}",
            f"{row.spread:.0%}" + (f" load {row.foreign:.0%}" if row.foreign > LOADED else ""),
        )
    tau, apart, ratio = rank_correlation(rows), ordered_rightly(rows), auto_over_best(rows)
    table.caption = f"Kendall {tau:.2f}"
    table.caption += "" if apart is None else f", of plans that are told apart {apart:.2f}"
    table.caption += f", auto / best of the others {ratio}" if ratio else ""
    console.print(table)
    for strategy, why in failed.items():
        console.print(f"[dim]{model}: no plan for {strategy}: {why}[/dim]")


def rank_correlation(rows: Sequence[Row]) -> float:
    return kendall([(row.predicted["step"], row.measured["step"]) for row in rows])


def ordered_rightly(rows: Sequence[Row]) -> float | None:
    """Kendall's tau over the couples of plans that the measurement tells apart.

    Those whose ratio, turn by turn, differs from 1 with 95 % confidence; None where there are none.
    """
    scores = []
    for a, b in combinations(rows, 2):
        first, second = _turns(a), _turns(b)
        ratio = paired_ratio(first[: len(second)], second[: len(first)])
        if ratio.low > 1 or ratio.high < 1:
            predicted = a.predicted["step"] - b.predicted["step"]
            scores.append(((predicted > 0) - (predicted < 0)) * (1 if ratio.low > 1 else -1))
    return statistics.fmean(scores) if scores else None


def auto_over_best(rows: Sequence[Row]) -> Ratio | None:
    """The chosen plan's time over that of the best other one, turn by turn; None without either."""
    auto = [row for row in rows if "auto" in row.strategies]
    others = [row for row in rows if "auto" not in row.strategies]
    if not auto or not others:
        return None
    mine = _turns(auto[0])
    ratios = [paired_ratio(mine[: len(t)], t[: len(mine)]) for t in map(_turns, others)]
    return max(ratios, key=lambda ratio: ratio.median)


def _turns(row: Row) -> Sequence[Sequence[float]]:
    return row.turns or ((row.measured["step"],),)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures that the goals are about, and which goals are missed."""
    models = list(dict.fromkeys(row.model for row in rows))
    of = {model: [row for row in rows if row.model == model] for model in models}
    ratios = {model: ratio for model in models if (ratio := auto_over_best(of[model]))}
    largest = max((ratio.median for ratio in ratios.values()), default=1.0)
    apart = [tau for m in models if (tau := ordered_rightly(of[m])) is not None]
    figures: dict[str, Any] = {
        "pairs": len(rows),
        "median error": statistics.median(abs(row.error) for row in rows),
        "Kendall, all pairs": rank_correlation(rows),
        "Kendall, mean of models": statistics.fmean(rank_correlation(of[m]) for m in models),
        "the same, of plans that are told apart": statistics.fmean(apart) if apart else None,
        "largest auto / best": largest,
        "auto / best": {model: asdict(ratio) for model, ratio in ratios.items()},
    }
    figures["missed"] = [
        text
        for text, is_missed in (
            (f"at least {PAIRS} pairs", figures["pairs"] < PAIRS),
            (f"median error at most {MEDIAN_ERROR:.0%}", figures["median error"] > MEDIAN_ERROR),
            (f"Kendall at least {KENDALL} overall", figures["Kendall, all pairs"] < KENDALL),
            (
                f"Kendall at least {KENDALL} per model, of plans that are told apart",
                not apart or statistics.fmean(apart) < KENDALL,
            ),
            (
                f"auto within {AUTO_OVER_BEST - 1:.0%} of the best",
                figures["largest auto / best"] > AUTO_OVER_BEST,
            ),
        )
        if is_missed
    ]
    return figures


def show_summary(figures: Mapping[str, Any]) -> None:
    table = Table(title="all models")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(table)
    for text in figures["missed"]:
        console.print(f"[red]missed: {text}[/red]")


def main() -> int:
    parser = argparse.ArgumentParser(description="Predicted against measured step times.")
    models = list(VALIDATION_MODELS)
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--profile", type=Path, help="a cluster profile (default: calibrate now)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of every plan")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per turn")
    parser.add_argument(
        "--deciding", type=int, default=10, help="more turns of plans near the chosen one"
    )
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds per model for repeated turns"
    )
    parser.add_argument("--json", type=Path, help="write every timed step and plan here")
    arguments = parser.parse_args()
    rows: list[Row] = []
    record: dict[str, Any] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autopar-validate-") as folder:
        profile = arguments.profile or Path(folder) / "here.json"
        if arguments.profile is None:
            save_profile(calibrate(RANKS), profile)
        for model in arguments.models:
            found, raw = run_model(model, arguments.strategies, profile.resolve(), arguments)
            rows += found
            record[model] = raw
            show(model, found, raw["failed"])
        figures = summarise(rows)
        if arguments.json:
            record = {
                "summary": figures,
                "rows": [asdict(row) for row in rows],
                "models": record,
                "profile": json.loads(profile.read_text()),
            }
            arguments.json.write_text(json.dumps(record, indent=1))
    show_summary(figures)
    minutes = (time.monotonic() - start) / 60
    console.print(
        f"[dim]python -m benchmarks.validate_measured {' '.join(sys.argv[1:])}: "
        f"{minutes:.1f} minutes[/dim]"
    )
    return 1 if figures["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
