"""The commands, as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import autopar
from autopar.api import undecorated
from autopar.cli_plan import load_call, parse_inputs, rebatched
from autopar.plan import load_plan

from .cli_helpers import MODEL, run_command, run_main

LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make():
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = torch.zeros(16, 32, dtype=torch.long)
    return LlamaForCausalLM(config).bfloat16(), (), {"input_ids": ids, "labels": ids}
"""


@pytest.fixture
def gpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "small_gpt", raising=False)
    path = tmp_path / "small_gpt.py"
    path.write_text(MODEL)
    return path


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(capsys, "--version") == (0, f"autopar {autopar.__version__}\n", "")


def test_help_is_fast() -> None:
    code = "import sys, autopar.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_of_a_function(gpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = gpt.with_name("plan.json")
    code, text, _ = run_main(capsys, "plan", f"{gpt}:make", "--json", str(out))
    assert code == 0
    for wanted in (
        "of cpu:4",
        "auto, for b=8",
        "blocks.{0..2}.qkv.weight",
        "f32[96, 32]",
        "lines without a file are of small_gpt.py",
        "qkv linear",
        "why not",
        "one process, all threads",
    ):
        assert wanted in text
    assert max(map(len, text.splitlines())) <= 100
    plan = load_plan(out)
    assert plan.hints == {"b": 8} and plan.world_size == 4
    assert len(plan.params) == len(list(undecorated(load_call(f"{gpt}:make", [])[0]).parameters()))


def test_plan_of_a_class_is_that_of_the_function(
    gpt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for i, arguments in enumerate(
        (
            [f"{gpt}:make", "--batch", "12"],
            [f"{gpt}:GPT", "--input", "int64[12,16]", "--input", "targets=int64[12,16]"],
        )
    ):
        out = gpt.with_name(f"{i}.json")
        command = ["plan", *arguments, "--strategy", "tensor", "--save", str(out)]
        assert run_main(capsys, *command, "--cluster", "8xH100")[0] == 0
        plans.append(json.loads(out.read_text()))
    assert plans[0] == plans[1]
    assert plans[0]["hints"] == {"b": 12} and plans[0]["strategy"] == "tensor"


@pytest.mark.slow
def test_plan_of_a_llama_from_hugging_face(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small_llama.py").write_text(LLAMA)
    target = f"{tmp_path / 'small_llama.py'}:make"
    code, text, _ = run_main(capsys, "plan", target, "--cluster", "2x8xH100", "--memory", "1GiB")
    assert code == 0
    assert "(16 devices of 2x8xH100)" in text
    assert "model.layers.{0..2}.self_attn.q_proj.weight" in text
    assert "lines without a file are of modeling_llama.py" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_decorated_class_is_loaded_as_its_user_wrote_it(gpt: Path) -> None:
    module, args, _ = load_call(f"{gpt}:GPT", ["int64[2,4]", "int64[2,4]"])
    assert "autopar" not in vars(module) and len(args) == 2
    assert all(p.is_meta for p in module.parameters())


def test_undecorated_reaches_submodules() -> None:
    inner = autopar.parallelize(torch.nn.Linear(2, 2))
    outer = torch.nn.Sequential(inner, torch.nn.ReLU())
    assert undecorated(outer) is outer
    assert type(outer[0]) is torch.nn.Linear and "autopar" not in vars(outer[0])
    assert undecorated(torch.nn.Linear) is torch.nn.Linear


def test_inputs_are_read() -> None:
    args, kwargs = parse_inputs(["int64[8, 1024]", "bfloat16[]", "mask=bool[3]"])
    assert [(t.dtype, tuple(t.shape)) for t in args] == [
        (torch.int64, (8, 1024)),
        (torch.bfloat16, ()),
    ]
    assert kwargs["mask"].dtype == torch.bool and kwargs["mask"].is_meta


def test_rebatched_changes_what_has_the_batch_and_nothing_else() -> None:
    x = torch.arange(6).view(2, 3)
    args, kwargs = rebatched((x, 7, torch.ones(3)), {"y": [x, torch.ones(2)], "z": "text"}, 5)
    assert args[0].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert args[1] == 7 and args[2].shape == (3,)
    assert kwargs["y"][0] is args[0] and kwargs["y"][1].shape == (5,) and kwargs["z"] == "text"


RANKS = """
import json, os, sys
sys.path.insert(0, os.path.dirname(__file__))
import torch
import autopar
from small_gpt import GPT
from autopar.api import undecorated

plan = sys.argv[1]
torch.manual_seed(0)
model = autopar.parallelize(undecorated(GPT)(), plan=plan, cluster="cpu:2")
ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(1))
targets = ids.roll(-1, 1)
model.autopar.prepare(ids, targets=targets)
assert model.autopar.plan.world_size == 2
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(3):
    loss = model(ids, targets=targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
if int(os.environ["RANK"]) == 0:
    model.autopar.print_plan()
    print("losses", json.dumps(losses))
    print("environment", os.environ["OMP_NUM_THREADS"], os.environ["MALLOC_MMAP_THRESHOLD_"])
"""


@pytest.mark.multiprocess
def test_a_saved_plan_runs_and_gives_one_devices_losses(
    gpt: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, script = gpt.with_name("plan.json"), gpt.with_name("train.py")
    command = ["plan", f"{gpt}:make", "--json", str(out), "--strategy", "tensor"]
    assert run_main(capsys, *command, "--cluster", "cpu:2")[0] == 0
    script.write_text(RANKS)
    done = run_command("run", script, "--nproc", "2", "--", out)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("strategy        tensor" in line for line in lines) == 1  # rank 0 only
    losses = json.loads(next(line for line in lines if line.startswith("losses"))[7:])
    assert "environment 1 1073741824" in lines

    monkeypatch.syspath_prepend(str(gpt.parent))
    from small_gpt import GPT

    torch.manual_seed(0)
    model = undecorated(GPT)()
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for expected in losses:
        loss = model(ids, targets=ids.roll(-1, 1))
        assert abs(loss.item() - expected) < 5e-5 * abs(expected)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


FAILING = """
import os, sys, time
import autopar

rank, how = int(os.environ["RANK"]), sys.argv[1]
if how == "user":
    raise autopar.UserError("this cannot be done", fix="do that")
if how == "error" and rank == 1:
    raise ValueError("what went wrong")
if how == "exit" and rank == 0:
    sys.exit(7)
if how == "killed" and rank == 1:
    os.kill(os.getpid(), 9)
print(f"pid {os.getpid()}", flush=True)
time.sleep(600)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("user", 2, "autopar: this cannot be done\n  fix: do that\n"),
        ("error", 1, "autopar: rank 1 failed:\nTraceback (most recent call last):\n"),
        ("exit", 7, ""),
        ("killed", 137, "autopar: rank 1 was ended by SIGKILL (out of memory?)\n"),
    ],
)
def test_run_shows_one_failure_and_ends_all_ranks(
    tmp_path: Path, how: str, code: int, message: str
) -> None:
    script = tmp_path / "fail.py"
    script.write_text(FAILING)
    done = run_command("run", script, "--nproc", "2", "--", how)
    assert done.returncode == code
    if how == "error":
        assert done.stderr.startswith(message)
        assert done.stderr.endswith("ValueError: what went wrong\n")
        assert done.stderr.count("Traceback") == 1 and "runpy" not in done.stderr
    else:
        assert done.stderr == message
    assert_ended(done.stdout)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_ranks_do_not_outlive_the_command(tmp_path: Path, number: int, code: int) -> None:
    script = tmp_path / "fail.py"
    script.write_text(FAILING)
    command = [sys.executable, "-m", "autopar.cli", "run", str(script), "--nproc", "2", "--", "no"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        started = run.stdout.readline() + run.stdout.readline()
        os.kill(run.pid, number)
        assert run.wait(30) == code
        assert started.count("pid") == 2
        assert_ended(started)
        assert run.stderr.read() == ""


def assert_ended(out: str) -> None:
    """The processes that printed their ids no longer run."""
    pids = [int(line.split()[1]) for line in out.splitlines() if line.startswith("pid")]
    deadline = time.monotonic() + 5
    while any(map(running, pids)):
        assert time.monotonic() < deadline, "a rank outlives the command"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_calibrate_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_main(capsys, "calibrate", "--nproc", "1")
    assert code == 2 and "use at least 2 ranks" in err
