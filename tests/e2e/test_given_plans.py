"""Plans and hints that a user gives, on real ranks: used where they can be, else refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from autopar.plan import load_plan
from tests.cli_helpers import MODEL, run_command, run_main

pytestmark = pytest.mark.multiprocess

RANKS = """
import json, os, sys
sys.path.insert(0, os.path.dirname(__file__))
import torch
import autopar
from small_gpt import GPT
from autopar.api import undecorated

Plain = undecorated(GPT)


class Hinted(Plain):
    def __init__(self):
        super().__init__()
        autopar.hint(self.head.weight, split=0, gather=False)

    def forward(self, ids, targets):
        return super().forward(autopar.hint(ids + 0, whole=[0, 1]), targets)


def step(make, rows, **options):
    torch.manual_seed(0)
    alone, model = make().double(), None
    torch.manual_seed(0)
    ids = torch.randint(64, (rows, 16), generator=torch.Generator().manual_seed(rows))
    try:
        model = autopar.parallelize(make().double(), cluster="cpu:2", **options)
        loss = model(ids, targets=ids.roll(-1, 1))
    except autopar.UserError as error:
        return {"error": str(error)}
    loss.backward()
    expected = alone(ids, targets=ids.roll(-1, 1))
    expected.backward()
    wrong = max(
        float((p.grad - q.grad.full_tensor()).abs().max())
        for p, q in zip(alone.parameters(), model.parameters())
    )
    plan = model.autopar.plan
    return {
        "loss": abs(loss.item() - expected.item()),
        "gradient": wrong,
        "sizes": dict(plan.hints),
        "head": plan.params["head.weight"].sharding,
        "hinted": [dict(price.hint) for price in plan.hinted],
        "step_s": plan.predicted.time_s,
    }


found = {
    name: step(Plain, rows, plan=name + ".json" if name != "larger" else "good.json")
    for name, rows in (
        ("good", 8), ("larger", 12), ("edited", 8), ("illegal", 8), ("many", 8), ("other", 8),
    )
}
found["row"] = step(Plain, 1, plan="good.json")
found["hinted"] = step(Hinted, 8)
with open(f"found{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
"""


def test_plans_and_hints_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "small_gpt", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_gpt.py").write_text(
        MODEL.replace("return GPT(), (ids,)", "return GPT().double(), (ids,)")
    )
    (tmp_path / "ranks.py").write_text(RANKS)
    command = ["plan", "small_gpt.py:make", "--strategy", "tensor", "--cluster", "cpu:2"]
    code, _, err = run_main(capsys, *command, "--json", "good.json")
    assert code == 0, err
    good = json.loads((tmp_path / "good.json").read_text())

    def edited(name: str, **changes: object) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(good | changes))

    whole = dict(good["params"]["head.weight"], sharding="[-, -]")
    edited("edited", params=good["params"] | {"head.weight": whole})
    edited("illegal", choices=good["choices"] | {"gelu": {"tp": "z"}})
    edited("many", micro_batches=2)
    fewer = {n: s for n, s in good["params"].items() if "blocks.2" not in n}
    edited("other", fingerprint="0" * 64, params=fewer)

    done = run_command("run", "ranks.py", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"found{i}.json").read_text()) for i in (0, 1))
    assert first == second
    for name in ("good", "larger", "edited", "row", "hinted", "many"):
        assert "error" not in first[name], first[name]
        assert first[name]["loss"] < 1e-12 and first[name]["gradient"] < 1e-12, name
    assert first["good"]["step_s"] == load_plan("good.json").predicted.time_s
    assert first["larger"]["sizes"] == {"b": 12}
    assert first["larger"]["step_s"] > first["good"]["step_s"]
    assert first["edited"]["head"] == "[-, -]" and first["good"]["head"] != "[-, -]"
    assert first["hinted"]["head"].startswith("[tp")
    assert {"param": "head.weight", "split": 0, "gather": False} in first["hinted"]["hinted"]
    assert "tp is 'z'; allowed by" in first["illegal"]["error"]
    assert "the model has 3 blocks.* blocks, the plan 2" in first["other"]["error"]
