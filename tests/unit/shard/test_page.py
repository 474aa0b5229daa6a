"""The HTML page is whole, self-contained, and says what the plan says; traffic adds up."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from aicc.passes.shard.cluster import load_cluster
from aicc.passes.shard.explain import by_hand
from aicc.passes.shard.gantt import gantt_text
from aicc.passes.shard.model import MixtureOfExperts, ModelConfig
from aicc.passes.shard.page import plan_page
from aicc.passes.shard.plan import Plan
from aicc.passes.shard.planner import Problem, search
from aicc.passes.shard.space import Space
from aicc.passes.shard.step import pipeline_run, predict_step
from aicc.passes.shard.traffic import traffic, wire_bytes

MODEL = ModelConfig("small <&> model", hidden=1024, layers=8, heads=8, vocab=8192, seq=512, tied=False)
CLUSTER = load_cluster("a100-80gb-sxm", nodes=2)
VOID = {"meta", "rect", "line", "path", "br"}


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.outside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") or (v or "").startswith(("http:", "https:", "//"))]
        if tag not in VOID or (tag == "rect" and self.get_starttag_text()[-2] != "/"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        if tag in VOID and tag not in self.open:
            return
        while self.open and self.open[-1] in VOID and self.open[-1] != tag:
            self.open.pop()
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("pins", [{"pp": 4, "tp": 2}, {"pp": 1}])
def test_page(pins):
    problem = Problem(MODEL, CLUSTER, 64, space=Space(max_micro_batch=4).pin(**pins))
    result = search(problem)
    hand = by_hand(problem)
    text = plan_page(problem, result.best, result, hand)
    page = Reader()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.outside == [] and "http" not in text and "@import" not in text and "url(" not in text and "<script" not in text
    for heading in ("Mesh", "Placement of layers", "Communication by link", "Alternatives", "Memory by kind", "Where a step goes"):
        assert heading in page.text
    assert ("Pipeline" in page.text) == (pins["pp"] > 1) == ("Memory over time" in page.text)
    assert "small <&> model" in page.text and result.plan.label in page.text
    assert all(name in page.text for name in hand)
    if pins["pp"] > 1:
        schedule, _ = pipeline_run(MODEL, result.plan, CLUSTER, 64, most=2 * result.plan.pp)
        assert page.count["rect"] == 16 + sum(len(ops) for ops in schedule.ops)


def test_gantt_as_text():
    plan = Plan(dp=4, tp=1, pp=4)
    schedule, run = pipeline_run(MODEL, plan, CLUSTER, 32)
    rows = gantt_text(run, schedule, width=60).splitlines()
    assert len(rows) == 4 and all(row.count("|") == 2 for row in rows)
    first, last = (row.split("|")[1] for row in (rows[0], rows[-1]))
    assert first.startswith("F") and first.endswith("X") and last.startswith(".") and last.endswith(".")
    with pytest.raises(ValueError, match="timeline"):
        gantt_text(replace(run, timeline=()), schedule)


def test_traffic_by_axis():
    assert wire_bytes("all_reduce", 8.0, 4) == 12.0 and wire_bytes("p2p", 8.0, 2) == 8.0 and wire_bytes("all_gather", 8.0, 1) == 0.0
    plan = Plan(dp=4, tp=2, pp=2, sp=True, zero=1)
    flows = {(f.axis, f.kind): f for f in traffic(MODEL, plan, CLUSTER, 64)}
    assert {axis for axis, _ in flows} == {"tp", "dp", "pp"}
    assert flows["tp", "reduce_scatter"].levels == ("nvlink3",)
    assert flows["pp", "p2p"].levels == ("infiniband-hdr",)
    # Gradients of the stage's parameters once, in fp32, (n - 1) / n of them; the stage with the head or the embedding and half the layers.
    params = MODEL.params() / 2 / 2
    assert flows["dp", "reduce_scatter"].nbytes == pytest.approx(4 * params * 3 / 4, rel=0.05)
    # Half of the 8 layers, 16 micro-batches, two pairs a layer: one reduce-scatter forward and one backward each, plus an end of the model.
    each = 2 * 512 * 1024 / 2
    assert flows["tp", "reduce_scatter"].nbytes == pytest.approx(16 * (4 * 4 + 1) * each, rel=0.01)
    experts = replace(MODEL, moe=MixtureOfExperts(8, 2, 1024))
    assert ("ep", "all_to_all") in {(f.axis, f.kind) for f in traffic(experts, Plan(dp=16, ep=8), CLUSTER, 64)}
    assert predict_step(MODEL, plan, CLUSTER, 64).seconds > flows["pp", "p2p"].seconds
