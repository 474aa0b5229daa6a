"""One self-contained HTML page of a plan: mesh, placement, pipeline, memory over time, traffic, alternatives. No scripts, no links.

Entry point: `plan_page(problem, report, result, by_hand)` -> the page's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape

from .gantt import shown_ranks
from .partition import even_split, part_blocks
from .plan import Plan
from .planner import Problem, SearchResult
from .schedules import Schedule
from .simulator import PipelineCosts, PipelineRun
from .step import StepReport, pipeline_inputs, pipeline_run
from .traffic import traffic

__all__ = ["plan_page"]

# Data colours, one for light and one for dark surfaces: forward, input gradient, weight gradient, both, overlapped pair.
_SERIES = (("#2a78d6", "#3987e5"), ("#eb6834", "#d95926"), ("#1baf7a", "#199e70"), ("#eda100", "#c98500"), ("#4a3aa7", "#9085e9"))
_LIGHT, _DARK = ("".join(f"--s{i}:{pair[mode]};" for i, pair in enumerate(_SERIES)) for mode in (0, 1))
_STYLE = (":root{color-scheme:light dark;--bg:#fcfcfb;--ink:#0b0b0b;--soft:#52514e;--line:#e4e3df;--fill:#f4f3f0;" + _LIGHT + "}\n"
          "@media(prefers-color-scheme:dark){:root{--bg:#1a1a19;--ink:#fff;--soft:#c3c2b7;--line:#3a3a37;--fill:#262624;" + _DARK + "}}\n"
          """body{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2.2rem}p,figcaption{color:var(--soft)}figure{margin:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line)}th{color:var(--soft);font-weight:500}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem}.tile{background:var(--fill);border-radius:6px;padding:.6rem 1rem}
.tile b{display:block;font-size:1.25rem}svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em 0 .9em}.wide{overflow-x:auto}
""")
_KINDS = {"F": 0, "B": 1, "W": 2, "BW": 3}
_NAMES = ("forward", "input gradient", "weight gradient", "both gradients", "forward beside backward")


def plan_page(problem: Problem, report: StepReport, result: SearchResult | None, by_hand: Mapping[str, StepReport | None]) -> str:
    """The page. Long pipelines show their first micro-batches, long lists of ranks a sample that is said."""
    config, plan = problem.config, report.plan
    parts = [f"<h1>{escape(config.name)} on {problem.cluster.size} x {escape(problem.cluster.device.name)}</h1>",
             f"<p>{escape(plan.label)}. Global batch {problem.global_batch}, sequence {config.seq}, {escape(config.dtype)}; "
             f"{config.params() / 1e9:.2f} billion parameters.</p>", _tiles(problem, report, result), _breakdown(report),
             "<h2>Mesh</h2>", _mesh(plan, problem.cluster.node_size), "<h2>Placement of layers</h2>", _placement(problem, plan)]
    if plan.pp > 1:
        schedule, run = pipeline_run(config, plan, problem.cluster, problem.global_batch, problem.software, most=2 * plan.pp)
        costs = pipeline_inputs(config, plan, problem.cluster, problem.software)
        parts += ["<h2>Pipeline</h2>", _gantt(plan, problem, schedule, run), "<h2>Memory over time</h2>", _memory(report, schedule, run, costs)]
    parts += ["<h2>Memory by kind</h2>", _memory_table(report), "<h2>Communication by link</h2>", _traffic(problem, plan),
              "<h2>Alternatives</h2>", _alternatives(report, result, by_hand)]
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>Plan: {escape(config.name)}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _tiles(problem: Problem, report: StepReport, result: SearchResult | None) -> str:
    cells = [("step", f"{report.seconds:.4g} s"), ("tokens/s", f"{report.tokens_per_second:,.0f}"), ("MFU", f"{report.mfu:.1%}"),
             ("HFU", f"{report.hfu:.1%}"), ("peak memory", f"{report.peak_memory / 1e9:.1f} of {max(report.capacity) / 1e9:.1f} GB"),
             ("micro-batches", str(report.plan.micro_batches(problem.global_batch)))]
    if result is not None:
        cells.append(("gap to the lower bound", f"{result.gap:.1%}"))
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{escape(v)}</b>{escape(n)}</div>' for n, v in cells) + "</div>"


def _breakdown(report: StepReport) -> str:
    rows = [(n, f"{s:.4g} s", f"{s / report.seconds:.1%}") for n, s in report.breakdown().items() if s > 0]
    return "<h2>Where a step goes</h2>" + _table(("cause", "time", "share"), rows)


def _mesh(plan: Plan, node: int) -> str:
    """A cell per device of the first data replica and its neighbours: rows are nodes; the shade says the pipeline stage."""
    shown = min(plan.devices, 32 * node)
    rows, size = -(-shown // node), 26
    stage, cells = plan.devices // plan.pp, []
    for d in range(shown):
        x, y = 60 + (d % node) * 110, 4 + (d // node) * size
        t, c, r, p = d % plan.tp, d // plan.tp % plan.cp, d % stage // (plan.tp * plan.cp), d // stage
        text = f"p{p} d{r}" + (f" c{c}" if plan.cp > 1 else "") + (f" t{t}" if plan.tp > 1 else "")
        shade = 0.15 + 0.5 * (p / max(1, plan.pp - 1))
        cells.append(f'<rect x="{x}" y="{y}" width="104" height="{size - 4}" rx="3" fill="var(--s0)" fill-opacity="{shade:.2f}"/>'
                     f'<text x="{x + 6}" y="{y + 15}">{text}</text>')
    labels = "".join(f'<text x="0" y="{19 + i * size}">node {i}</text>' for i in range(rows))
    more = "" if shown == plan.devices else f" The first {shown} of {plan.devices} devices."
    return (f'<figure><svg viewBox="0 0 {60 + 110 * node} {rows * size + 8}" role="img" aria-label="mesh">{labels}{"".join(cells)}</svg>'
            f"<figcaption>p pipeline stage, d data rank, c context rank, t tensor rank; darker: later stages.{more}</figcaption></figure>")


def _placement(problem: Problem, plan: Plan) -> str:
    layout = part_blocks(problem.config, plan, plan.split or even_split(problem.config.layers, plan.parts))
    stage, rows, at = plan.devices // plan.pp, [], 0
    for part, (runs, rank) in enumerate(zip(layout.runs, layout.ranks, strict=True)):
        middle = [(k, n) for k, n in runs if k not in ("embedding", "head")]
        count = sum(n for _, n in middle)
        names = [f"layers {at} to {at + count - 1}" if count > 1 else f"layer {at}"] if count else []
        names = ["embedding"] * (runs[0][0] == "embedding") + names + ["head"] * (runs[-1][0] == "head")
        kinds = ", ".join(f"{n} x {k}" for k, n in middle)
        rows.append((str(part), ", ".join(names), kinds, f"stage {rank}", f"{rank * stage} to {rank * stage + stage - 1}"))
        at += count
    cuts = [f"weights cut over tp {plan.tp}"] * (plan.tp > 1) + ["residual stream cut along the sequence"] * plan.sp
    cuts += [f"sequence over cp {plan.cp}"] * (plan.cp > 1) + [f"experts over ep {plan.ep}"] * (plan.ep > 1)
    cuts += [f"{dict(enumerate(('', 'optimizer state', 'optimizer state and gradients', 'all state')))[plan.zero]} over "
             f"{plan.dp * plan.cp} data ranks"] * (plan.zero > 0)
    return _table(("part", "holds", "kinds", "runs on", "devices"), rows) + f"<p>{escape('; '.join(cuts) or 'no cuts inside layers')}.</p>"


def _key(kinds: set[int]) -> str:
    return "".join(f'<span class="key" style="background:var(--s{i})"></span>{_NAMES[i]}' for i in sorted(kinds))


def _gantt(plan: Plan, problem: Problem, schedule: Schedule, run: PipelineRun) -> str:
    ranks, width, row = shown_ranks(plan.pp, 24 if plan.pp <= 24 else 8), 1000.0, 20
    bars, seen = [], set()
    for y, rank in enumerate(ranks):
        bars.append(f'<text x="0" y="{y * row + 14}">stage {rank}</text>')
        for item in run.timeline[rank]:
            kind = 4 if item.op.overlapped else _KINDS[item.op.kind]
            seen.add(kind)
            x, w = 60 + item.start / run.seconds * width, max(0.4, (item.end - item.start) / run.seconds * width - 0.6)
            bars.append(f'<rect x="{x:.1f}" y="{y * row + 2}" width="{w:.1f}" height="{row - 4}" fill="var(--s{kind})"><title>'
                        f"{_NAMES[kind]}, micro-batch {item.op.micro_batch}, part {schedule.part_of[item.op.stage]}: {item.start:.4g} to "
                        f"{item.end:.4g} s</title></rect>")
    total = plan.micro_batches(problem.global_batch)
    note = f"{schedule.name}: {run.seconds:.4g} s, bubble {run.bubble:.1%}"
    if schedule.micro_batches < total:
        note += f"; the first {schedule.micro_batches} of {total} micro-batches"
    if len(ranks) < plan.pp:
        note += f"; {len(ranks)} of {plan.pp} stages"
    return (f'<figure><svg viewBox="0 0 1070 {len(ranks) * row + 4}" role="img" aria-label="pipeline">{"".join(bars)}</svg>'
            f"<figcaption>{escape(note)}.{_key(seen)}</figcaption></figure>")


def _memory(report: StepReport, schedule: Schedule, run: PipelineRun, costs: PipelineCosts) -> str:
    """Bytes per device over time for the first, middle and last stage: what always stays, and activations as they come and go."""
    ranks = sorted({0, len(run.busy) // 2, len(run.busy) - 1})
    capacity, height, width = max(report.capacity), 180.0, 1000.0
    lines, labels = [], []
    for i, rank in enumerate(ranks):
        m = report.memory[rank]
        base = m.total - m.activations
        points = [(t, base + held) for t, held in run.memory(rank, costs, schedule)]
        path = f"M{60:.1f},{height - points[0][1] / capacity * height:.1f}"
        for t, held in points[1:]:
            path += f"H{60 + t / run.seconds * width:.1f}V{height - held / capacity * height:.1f}"
        lines.append(f'<path d="{path}" fill="none" stroke="var(--s{i})" stroke-width="2"><title>stage {rank}</title></path>')
        labels.append(f'<span class="key" style="background:var(--s{i})"></span>stage {rank}')
    axis = "".join(f'<line x1="60" x2="1060" y1="{height * (1 - f):.1f}" y2="{height * (1 - f):.1f}" stroke="var(--line)"/>'
                   f'<text x="0" y="{height * (1 - f) + 10:.1f}">{f * capacity / 1e9:.0f} GB</text>' for f in (0.0, 0.5, 1.0))
    return (f'<figure><svg viewBox="0 0 1070 {height + 14:.0f}" role="img" aria-label="memory over time">{axis}{"".join(lines)}</svg>'
            f"<figcaption>Bytes on the fullest device of a stage; the top line is what the device has.{''.join(labels)}</figcaption></figure>")


def _memory_table(report: StepReport) -> str:
    names = [f.name for f in fields(report.memory[0])]
    rows = [(f"stage {r}", *(f"{getattr(report.memory[r], n) / 1e9:.2f}" for n in names), f"{report.memory[r].total / 1e9:.2f}",
             f"{report.capacity[r] / 1e9:.1f}") for r in shown_ranks(len(report.memory), 16)]
    return _table(("GB on the fullest device", *names, "all", "there is"), rows)


def _traffic(problem: Problem, plan: Plan) -> str:
    flows = traffic(problem.config, plan, problem.cluster, problem.global_batch, problem.software)
    rows = [(f.axis, f.kind, ", ".join(f.levels), f"{f.nbytes / 1e9:.3f} GB", f"{f.seconds:.4g} s") for f in flows]
    return _table(("axis", "collective", "links", "sent per device and step", "time if nothing hides it"), rows) if rows else "<p>None.</p>"


def _alternatives(report: StepReport, result: SearchResult | None, by_hand: Mapping[str, StepReport | None]) -> str:
    rows: list[tuple[str, ...]] = [("this plan", report.plan.label, f"{report.seconds:.4g} s", "", f"{report.mfu:.1%}",
                                    f"{report.peak_memory / 1e9:.1f} GB")]

    def row(name: str, r: StepReport | None) -> tuple[str, ...]:
        if r is None:
            return (name, "does not fit or does not divide", "", "", "", "")
        return (name, r.plan.label, f"{r.seconds:.4g} s", f"{r.seconds / report.seconds - 1:+.1%}", f"{r.mfu:.1%}", f"{r.peak_memory / 1e9:.1f} GB")

    rows += [row(f"by hand: {name}", r) for name, r in by_hand.items()]
    rows += [row("other degrees", r) for r in (result.alternatives[:15] if result else ())]
    text = _table(("", "plan", "step", "against this", "MFU", "memory"), rows)
    if result is not None:
        proof = "no plan of the space is faster under the cost model" if result.proved else "stopped by the budget"
        text += (f"<p>{result.considered} combinations, {result.simulated} simulated, {result.seconds:.1f} s; "
                 f"lower bound {result.lower_bound:.4g} s; {proof}.</p>")
    return text
