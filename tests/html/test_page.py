"""The page of a plan, read as HTML: complete, self-contained, and every text inert."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest
from expecttest import assert_expected_inline
from hypothesis import given, settings

from autopar.cost.timeline import StageUse
from autopar.html.charts import ticks
from autopar.html.modules import blocks_of, copies, parameter_groups, split_block
from autopar.html.page import report_page
from autopar.html.shapes import placed
from autopar.ir.mesh import Mesh
from autopar.plan import Pipeline, Plan, plan_from_json
from tests.test_plan import plans

from .plans import HOSTILE, PLAN, PROBE, TIMELINE
from .test_markup import Reader

OWN_TAGS = {"script": 1, "style": 1, "title": None, "img": 0, "link": 0, "iframe": 0, "base": 0}


def check_inert(page: str) -> None:
    """One script and one style sheet, allowed by their hashes; no address of anything else."""
    page.encode()
    read = Reader(page)
    assert read.open == []  # every element is closed, in order
    tags = [tag for tag, _ in read.tags]
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, number in OWN_TAGS.items():
        assert number is None or tags.count(tag) == number, tag
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "style", "data", "action", "formaction"), (
                tag,
                name,
            )
            if name == "href":
                assert value and value.startswith("#") and value[1:] in ids
    policy = next(a["content"] for _, a in read.tags if "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        body = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert body is not None
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert "url(" not in body[1] and "import" not in body[1] and "http" not in body[1]


def test_stages_of_a_pipeline() -> None:
    uses = (
        StageUse(5e-3, 1e-3, 2e-3, 2**20, 2.0, "embedding, blocks.{0,1}"),
        StageUse(6e-3, 1e-3, 1e-3, 2**21, 1.0, PROBE),
    )
    timeline = replace(TIMELINE, bubble_s=1e-3, stages=uses)
    mesh = Mesh.of(pp=2, tp=4)
    plan = replace(PLAN, mesh=mesh, pipeline=Pipeline("1f1b", ("add_3",)), timeline=timeline)
    page = report_page(plan)
    check_inert(page)
    text = Reader(page).text
    for wanted in ("2 stages, 1f1b", "embedding, blocks.{0,1}", "5 ms", "2 MiB", "bubble"):
        assert wanted in text
    assert "What each stage holds" not in Reader(report_page(PLAN)).text


def test_what_a_reader_looks_for_is_there() -> None:
    text = Reader(report_page(PLAN)).text
    for wanted in (
        "dp=2 x tp=4 on 2x4xH100",
        "2x4xH100 (8 devices)",
        "12.5 ms",
        "blocks.{0..3}",
        "× 4",
        "f32[8/dp, 256/tp]",
        "f32[8/dp, 64] +tp",
        "dp:0 tp:sum",
        "gpt.py:9",
        "blocks.{0..3}.up.weight",
        "gathered twice",
        "1.60x: communication +7.5 ms",
        "needs 3 GiB per device, 2 GiB are there",
        "activations at add blocks.{0..3}",
        "saved activations",
    ):
        assert wanted in text, wanted


def test_an_ordinary_page_is_inert() -> None:
    check_inert(report_page(PLAN))


def test_hostile_texts_are_inert() -> None:
    page = report_page(HOSTILE, {HOSTILE.activations[0].source.rpartition(":")[0]: ["<script>"]})
    check_inert(page)
    assert "<script>window" not in page and "<img" not in page


@settings(max_examples=40, deadline=None)
@given(plans)
def test_any_plan_gives_an_inert_page(plan: Plan) -> None:
    check_inert(report_page(plan))


def test_source_text_is_shown_where_it_is_given() -> None:
    lines = [""] * 8 + ["        h = F.gelu(self.up(x)) < 3"]
    page = report_page(PLAN, {"gpt.py": lines})
    assert "h = F.gelu(self.up(x)) &lt; 3</code>" in page
    assert "h = F.gelu" not in report_page(PLAN)


def test_notes_come_first_and_an_empty_plan_says_what_it_lacks() -> None:
    text = Reader(report_page(replace(PLAN, notes=("mystery runs replicated",)))).text
    assert text.index("mystery runs replicated") < text.index("whole output")
    bare = replace(
        PLAN, params={}, activations=(), traffic=(), alternatives=(), mesh=Mesh(()), choices={},
        predicted=replace(PLAN.predicted, memory_parts={}, time_s=0.0, memory_bytes=0),
    )  # fmt: skip
    text = Reader(report_page(bare)).text
    for wanted in ("carries no ops", "carries no parts", "no parameters", "Nothing is sent"):
        assert wanted in text


def test_a_plan_of_a_file_gives_the_same_page() -> None:
    read = plan_from_json(json.dumps(json.loads(PLAN.to_json())))
    assert report_page(read) == report_page(PLAN)


def test_split_block() -> None:
    assert split_block("layers.{0..5}.attn.query") == ("layers.{0..5}", "attn.query")
    assert split_block("layers.{0..5}.experts.{0..7}.up") == ("layers.{0..5}", "experts.{0..7}.up")
    assert split_block("head") == ("", "head")


@pytest.mark.parametrize(
    ("name", "number"),
    [("a.{0..5}", 6), ("a.{0,1,4..6}", 5), ("a", 1), ("a.{x}", 1), ("a.{5..2}", 1)],
)
def test_copies(name: str, number: int) -> None:
    assert copies(name) == number


def test_blocks_and_parameters_are_collapsed() -> None:
    assert [(b.title, b.copies, len(b.ops)) for b in blocks_of(PLAN.activations)] == [
        ("wte", 1, 1),
        ("blocks.{0..3}", 4, 4),
        ("sum", 1, 1),
    ]
    assert [(g.name, len(g.names)) for g in parameter_groups(PLAN)] == [
        ("wte.weight", 1),
        ("blocks.{0..3}.up.weight", 4),
        ("blocks.{0..3}.down.weight", 4),
    ]


@pytest.mark.parametrize(
    ("type_", "sharding", "text"),
    [
        ("f32[8, 64]", "[dp, -] +tp", "f32[8/dp, 64] +tp"),
        ("f32[]", "[] +dp", "f32[] +dp"),
        ("bf16[64, 8]", "[dp&tp, 3:tp]", "bf16[64/dp&tp, 8/3:tp]"),
        ("f32[8]", "[dp, tp]", "f32[8] [dp, tp]"),
        ("", "[dp]", "[dp]"),
        ("what", "ever", "what ever"),
    ],
)
def test_placed(type_: str, sharding: str, text: str) -> None:
    assert Reader(placed(type_, sharding, ("dp", "tp"))).text == text


def test_an_axis_has_its_colour() -> None:
    assert_expected_inline(
        placed("f32[8, 64]", "[dp, tp]", ("dp", "tp")),
        """<span class="whole">f32[8/<b class="axis a0">dp</b>, 64/<b class="axis a1">tp</b>]</span>""",
    )


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0, False) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(12.5, 17.0, False) == pytest.approx([13, 14, 15, 16, 17])
    assert ticks(0.5, 60.0, True) == pytest.approx([0.5, 1, 2, 5, 10, 20, 50])
    assert ticks(2**30, 2**33, True, 1024.0) == [2**30, 2**31, 2**32, 2**33]
