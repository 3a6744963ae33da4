"""`autopar report` and `autopar compare`, as a user types them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

from autopar.kernel_use import KernelUse
from autopar.plan import Plan

from .cli_helpers import run_main
from .html.plans import HOSTILE, KIB, PLAN

OTHER = replace(
    PLAN,
    strategy="zero",
    params={n: replace(s, sharding="[dp, -]") for n, s in PLAN.params.items()},
    activations=(
        *PLAN.activations[:4],
        replace(PLAN.activations[4], splits="dp:0", sharding="[dp, -]"),
    ),
    predicted=replace(PLAN.predicted, time_s=0.025),
    traffic=PLAN.traffic[:1],
    notes=("mystery: no sharding rule",),
)


def saved(path: Path, plan: Plan) -> str:
    plan.save(path)
    return str(path)


def test_report_writes_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = saved(tmp_path / "plan.json", PLAN), tmp_path / "page.html"
    source = tmp_path / "gpt.py"
    source.write_text("\n" * 8 + "h = gelu(x)\n")
    code, text, _ = run_main(capsys, "report", plan, "-o", str(out), "--source", str(source))
    assert code == 0 and "wrote" in text
    assert out.read_text().startswith("<!DOCTYPE html>") and "h = gelu(x)" in out.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt.py", "page.html", "plan.json"]
    assert run_main(capsys, "report", plan, "-o", str(out))[0] == 0  # the old page is replaced
    assert "h = gelu(x)" not in out.read_text()


def test_report_of_hostile_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = saved(tmp_path / "plan.json", HOSTILE)
    assert run_main(capsys, "report", plan, "-o", str(tmp_path / "x.html"))[0] == 0


def test_report_of_a_plan_whose_kernels_save_time_and_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uses = KernelUse("int8", (), "", 1, 1e-4, 2e-4, step_s=-1e-4, sent_bytes={"all_reduce": -1000})
    saving = replace(PLAN, kernels=(uses,), predicted=replace(PLAN.predicted, kernels_s=-1e-4))
    plan, out = saved(tmp_path / "plan.json", saving), tmp_path / "x.html"
    assert run_main(capsys, "report", plan, "-o", str(out))[0] == 0
    assert "-100 us of the step" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.json", "-o", "x.html"), "cannot read the plan file"),
        (("bad.json", "-o", "x.html"), "not complete JSON"),
        (("deep.json", "-o", "x.html"), "plan file"),
        (("nan.json", "-o", "x.html"), "predicted.time_s is nan"),
        (("negative.json", "-o", "x.html"), "activations[0].local_bytes is -1"),
        (("huge.json", "-o", "x.html"), "predicted.memory_bytes is a number of about 400 digits"),
        (("plan.json", "-o", "folder"), "it is a folder"),
        (("plan.json", "-o", "none/x.html"), "its folder does not exist"),
        (("plan.json", "-o", "plan.json"), "would be overwritten"),
        (("plan.json", "-o", "x.html", "--source", "other.py"), "no op of the plan comes from"),
        (("plan.json", "-o", "x.html", "--source", "gpt.py"), "cannot read gpt.py"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("plan.json"), PLAN)
    Path("folder").mkdir()
    Path("bad.json").write_text(PLAN.to_json()[:100])
    Path("deep.json").write_text("[" * 100_000)
    for name, value in (("nan", float("nan")), ("negative", -1), ("huge", 10**400)):
        raw = json.loads(PLAN.to_json())
        place = {
            "nan": (raw["predicted"], "time_s"),
            "negative": (raw["activations"][0], "local_bytes"),
            "huge": (raw["predicted"], "memory_bytes"),
        }[name]
        place[0][place[1]] = value
        Path(f"{name}.json").write_text(json.dumps(raw))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    code, out, err = run_main(capsys, "report", *arguments)
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_compare_prints_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("a.json"), PLAN)
    saved(Path("b.json"), OTHER)
    code, out, _ = run_main(capsys, "compare", "a.json", "b.json", "--json", "d.json")
    assert code == 0
    assert_expected_inline(
        "\n".join(line.rstrip() for line in out.strip().splitlines()),
        """\
A  a.json
B  b.json

settings
          A     B
strategy  auto  zero

predicted
                                               A         B  B / A
step                                     12.5 ms     25 ms      2
compute                                    10 ms     10 ms      1
communication                               2 ms      2 ms      1
optimizer                                 500 us    500 us      1
memory per device                       1.27 MiB  1.27 MiB      1
parameters, gradients, optimizer state     1 MiB     1 MiB      1
saved activations                        256 KiB   256 KiB      1
gathered parameters                       20 KiB    20 KiB      1

parameters stored differently
name                       ×  A                              B
wte.weight                 1  [-, -] 128 KiB                 [dp, -] 128 KiB
blocks.{0..3}.up.weight    4  [tp, -] gathered twice 16 KiB  [dp, -] gathered twice 16 KiB
blocks.{0..3}.down.weight  4  [tp, -] 16 KiB                 [dp, -] 16 KiB

ops that split differently (in gpt.py)
op              line  ×  A            B
blocks.{0..3}:
  down linear   :10   4  dp:0 tp:sum  dp:0
sum             :12   1  dp:sum       -

sent per device and step
collective  axis       A    B  × A  × B
all_reduce  tp    12 KiB  0 B    4    0

only B mystery: no sharding rule
wrote d.json""",
    )
    raw = json.loads(Path("d.json").read_text())
    assert raw["figures"][0] == {"name": "step", "unit": "s", "a": 0.0125, "b": 0.025}
    assert raw["same_model"] and not raw["identical"]


def test_compare_prints_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tmp_path / "a.json", PLAN), saved(tmp_path / "b.json", OTHER)
    code, out, _ = run_main(capsys, "compare", a, b, "--json", "-")
    assert code == 0 and json.loads(out)["ops"][1]["op"] == "sum"


def test_compare_of_one_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "a.json", PLAN)
    code, out, _ = run_main(capsys, "compare", path, path)
    assert code == 0 and "the plans are identical" in out


def test_compare_of_different_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a.json", PLAN)
    b = saved(tmp_path / "b.json", replace(PLAN, fingerprint="e" * 64))
    code, out, _ = run_main(capsys, "compare", a, b)
    assert code == 0 and "the plans are for different models" in out
    assert max(map(len, out.splitlines())) <= 100 + max(len(a), len(b))


def test_a_difference_in_nothing_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {**PLAN.predicted.comm_bytes, "all_gather": KIB}
    a = saved(tmp_path / "a.json", PLAN)
    b = saved(
        tmp_path / "b.json", replace(PLAN, predicted=replace(PLAN.predicted, comm_bytes=more))
    )
    out = run_main(capsys, "compare", a, b)[1]
    assert "storage of parameters and choices of ops are the same" in out
    assert "identical" not in out


def test_compare_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a.json", PLAN)
    for arguments, message in (
        ((a, str(tmp_path / "none.json")), "cannot read the plan file"),
        ((a, a, "--json", str(tmp_path)), "it is a folder"),
        ((a, a, "--json", a), "would be overwritten"),
    ):
        code, out, err = run_main(capsys, "compare", *arguments)
        assert code == 2 and out == "" and message in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
