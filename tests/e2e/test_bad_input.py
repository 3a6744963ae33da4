"""Bad input is one readable message, exit code 2, and nothing half-done."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import autopar
from autopar.errors import UserError
from tests.cli_helpers import MODEL, run_command, run_main

BAD = (
    MODEL
    + """

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        if x.sum() > 0:  # the branch
            x = x * 2
        return x.sum()


class NeedsSizes(nn.Module):
    def __init__(self, size):
        super().__init__()


NUMBER = 3


def branches():
    return Branches(), (torch.zeros(8, 8),)


def no_module():
    return 3, ()


def no_pair():
    return GPT()


def fails():
    return torch.zeros(3).tolist()


def other_shape():
    return GPT(), (torch.zeros(8, 16),)
"""
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "bad", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n")
    profile = Path(autopar.__file__).parent / "profiles" / "cpu-gloo.json"
    whole = profile.read_text()
    (tmp_path / "short.json").write_text(whole[:1000])
    (tmp_path / "old.json").write_text(json.dumps(json.loads(whole) | {"version": 0}))
    (tmp_path / "text.json").write_text("hello")
    return tmp_path


GOOD = "bad.py:make"


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        pytest.param([f"bad.py:{name}", *rest], messages, id=name)
        for name, rest, messages in [
            ("no_module", [], ["no_module() returns an int in place of a module"]),
            ("no_pair", [], ["no_pair() returns a GPT, not (module, args)"]),
            ("NUMBER", [], ["NUMBER in bad.py is an int, not a function or a class of modules"]),
            ("nothing", [], ["there is no nothing in bad.py; it has ", "GPT", "make"]),
            ("fails", [], ["fails() fails: ", "bad.py:", "device='cpu'"]),
            ("NeedsSizes", ["--input", "int64[8]"], ["without arguments", "'size'", "bad.py:"]),
            ("GPT", [], ["no --input is given", "of forward(ids, targets); write"]),
            ("branches", [], ["forward branches on a tensor's value", "bad.py:", "torch.where"]),
            (
                "other_shape",
                [],
                [
                    "GPT.forward(ids, targets) is given 1 argument: missing a required argument: 'targets'"
                ],
            ),
        ]
    ]
    + [
        pytest.param(arguments, messages, id=" ".join(arguments))
        for arguments, messages in [
            (["none.py:make"], ["there is no file none.py"]),
            (["bad.py"], ["cannot read 'bad.py'", "FILE.py:NAME"]),
            (["bad.py:a b"], ["cannot read 'bad.py:a b'"]),
            (["broken.py:f"], ["broken.py cannot be imported: ModuleNotFoundError", "broken.py:1"]),
            (["syntax.py:f"], ["syntax.py cannot be imported: SyntaxError", "syntax.py:2"]),
            ([GOOD, "--cluster", "8xfoo"], ["cannot read the cluster '8xfoo'", "2x8xH100"]),
            ([GOOD, "--cluster", "none.json"], ["none.json"]),
            ([GOOD, "--cluster", "short.json"], ["short.json", "JSON"]),
            ([GOOD, "--cluster", "old.json"], ["old.json", "version"]),
            ([GOOD, "--cluster", "text.json"], ["text.json"]),
            ([GOOD, "--strategy", "magic"], ["unknown strategy 'magic'", "'tensor'"]),
            ([GOOD, "--batch", "0"], ["the batch size 0 is not positive"]),
            ([GOOD, "--batch", "-4"], ["the batch size -4 is not positive"]),
            ([GOOD, "--memory", "lots"], ["cannot read the memory limit 'lots'", "6GiB"]),
            ([GOOD, "--memory", "-1GiB"], ["the memory limit"]),
            ([GOOD, "--memory", "2KiB"], ["fits on no plan", "KiB short", "2 KiB", "more devices"]),
            ([GOOD, "--optimizer", "magic"], ["unknown optimizer 'magic'"]),
            ([GOOD, "--input", "int64[8]"], ["--input is for module classes"]),
            (["bad.py:GPT", "--input", "int64(8)"], ["cannot read the input 'int64(8)'"]),
            (["bad.py:GPT", "--input", "integer[8]"], ["unknown dtype 'integer'"]),
            (["bad.py:GPT", "--input", "int64[8,x]"], ["not positive integers"]),
            ([GOOD, "--json", "none/plan.json"], ["folder does not exist"]),
        ]
    ],
)
def test_plan_says_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], messages: list[str]
) -> None:
    before = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    saves = [] if "--json" in arguments else ["--json", "plan.json"]
    code, out, err = run_main(capsys, "plan", *arguments, *saves)
    assert (code, out) == (2, "")
    assert err.startswith("autopar: ") and "Traceback" not in err and len(err) < 1000
    for message in messages:
        assert message in err
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == before


def test_a_graph_break_has_the_users_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = BAD.splitlines().index("        if x.sum() > 0:  # the branch") + 1
    _, _, err = run_main(capsys, "plan", "bad.py:branches")
    assert f"  at:  bad.py:{line}\n" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.py", "--nproc", "2"], "there is no script none.py"),
        (["bad.py", "--nproc", "0"], "cannot start 0 processes"),
    ],
)
def test_run_says_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, err = run_main(capsys, "run", *arguments)
    assert code == 2 and err.startswith("autopar: ") and message in err


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (3, {}, "takes a torch.nn.Module or a class of modules, not int"),
        (len, {}, "takes a torch.nn.Module"),
        (int, {}, "not the int class"),
        (torch.nn.Linear(2, 2), {"strategy": "magic"}, "unknown strategy 'magic'"),
        (torch.nn.Linear(2, 2), {"backend": "magic"}, "unknown backend 'magic'"),
        (torch.nn.Linear(2, 2), {"cluster": "magic"}, "cannot read the cluster 'magic'"),
        (torch.nn.Linear(2, 2), {"memory_limit": "magic"}, "cannot read the memory limit"),
        (torch.nn.Linear(2, 2), {"memory_limit": 0}, "is not positive"),
        (torch.nn.Linear(2, 2), {"plan": "none.json"}, "cannot read the plan file"),
        (torch.nn.Linear(2, 2), {"plan": "text.json"}, "not complete JSON"),
        (torch.nn.Linear(2, 2), {"optimizer": "magic"}, "unknown optimizer 'magic'"),
        (autopar.parallelize(torch.nn.Linear(2, 2)), {}, "parallelized already"),
    ],
)
def test_parallelize_says_what_is_wrong(
    folder: Path, target: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        autopar.parallelize(target, **options)  # type: ignore[call-overload]


SCRIPT = """
import json, os, sys
import torch
from torch import nn

import autopar

rank = int(os.environ["RANK"])
plan = "plan.json"


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        if x.sum() > 0:
            x = x * 2
        return x


def net(width=8):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))


def shapes():
    model(torch.zeros(8 + rank, 8))


def contents():
    model(torch.full((8, 8), float(rank)))


def world():
    autopar.parallelize(net(), plan="four.json")


def cluster():
    autopar.parallelize(net(), cluster="cpu:8")


def other_model():
    autopar.parallelize(net(32), plan="plan.json")(torch.zeros(8, 8))


def no_fit():
    autopar.parallelize(net(), memory_limit="300B")(torch.zeros(8, 8))


def graph_break():
    autopar.parallelize(Branches())(torch.zeros(8, 8))


torch.manual_seed(0)
model = autopar.parallelize(net())
if sys.argv[1:]:
    contents()
whole = model(torch.ones(8, 8))
model.autopar.plan.save("plan.json")
torch.distributed.barrier()
if rank == 0:
    text = model.autopar.plan.to_json()
    wider = json.loads(text)
    for axis in wider["mesh"]["axes"]:
        axis["size"] *= 2
    with open("four.json", "w") as file:
        json.dump(wider, file)
torch.distributed.barrier()
for case in (shapes, contents, world, cluster, other_model, no_fit, graph_break):
    try:
        case()
        said = "nothing"
    except autopar.UserError as error:
        said = str(error)
    with open(f"said.{rank}", "a") as file:
        print(json.dumps([case.__name__, said]), file=file)
    assert torch.equal(model(torch.ones(8, 8)), whole)  # the model still works
"""


@pytest.mark.multiprocess
def test_every_rank_says_what_is_wrong(folder: Path) -> None:
    (folder / "ranks.py").write_text(SCRIPT)
    done = run_command("run", folder / "ranks.py", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    said = [
        dict(map(json.loads, (folder / f"said.{rank}").read_text().splitlines())) for rank in (0, 1)
    ]
    wanted = {
        "shapes": "batches of different shapes",
        "contents": "different batches of the same shape",
        "world": "the plan is for 4 devices",
        "cluster": "the cluster cpu:8 has 8 devices, and 2 processes were started",
        "other_model": "the plan was made for another model",
        "no_fit": "fits on no plan",
        "graph_break": "ranks.py:",
    }
    assert said[0] == said[1] and sorted(said[0]) == sorted(wanted)
    for name, message in wanted.items():
        assert message in said[0][name]


@pytest.mark.multiprocess
def test_run_shows_the_ranks_error_once(folder: Path) -> None:
    (folder / "ranks.py").write_text(SCRIPT)
    done = run_command("run", folder / "ranks.py", "--nproc", "2", "--", "contents")
    assert done.returncode == 2
    assert done.stderr == (
        "autopar: the ranks were given different batches of the same shape\n"
        "  fix: give every rank the same global batch (no DistributedSampler, the same seed for "
        "shuffling); autopar splits it\n"
    )
    assert not (folder / "plan.json").exists()


NO_RULE = """
import torch
from torch import nn

import autopar


@torch.library.custom_op("bad_input::turn", mutates_args=())
def turn(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0) * 2.0


turn.register_fake(torch.empty_like)
turn.register_autograd(lambda ctx, grad: grad.flip(0) * 2.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return turn(self.layer(x)).sum()


model = autopar.parallelize(Net())
model(torch.ones(8, 8))
"""


@pytest.mark.multiprocess
def test_an_op_without_a_rule_is_named_once_with_its_cost(folder: Path) -> None:
    (folder / "no_rule.py").write_text(NO_RULE)
    done = run_command("run", folder / "no_rule.py", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ShardingWarning: turn") == 1
    assert "ms per step if whole (no_rule.py:" in done.stderr
