"""Pictures of routing, for people who would rather look than read.

They need matplotlib, but for the page, which needs nothing.
"""

from collections.abc import Mapping, Sequence, Sized
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_moe_pytorch.routing import Routing
from st_moe_pytorch.tools.plan import Plan
from st_moe_pytorch.tools.trace import Trace, visible
from st_moe_pytorch.tools.watch import RoutingStats

RECORD = "run the model inside record_routing"


def _check_not_empty(name: str, parts: Mapping[Any, Any], way_out: str) -> None:
    empty = [part for part, content in parts.items() if isinstance(content, Sized) and not len(content)]
    if not parts or empty:
        raise ValueError(f"{name} must not be empty, got nothing{f' of {empty[0]!r}' if empty else ''}: {way_out}")


def _figure(panels: int, width: float = 8.0, height: float = 2.2) -> tuple[Any, Any]:
    """A figure without a display, and its panels below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * panels + 0.6), layout="constrained")
    return figure, figure.subplots(panels, 1, squeeze=False)[:, 0]


def plot_load(history: Mapping[int, Mapping[str, RoutingStats | Sequence[float]]], path: str | Path) -> None:
    """Heat map of the load of every expert, over the steps of a history {step: {layer: stats}}, a panel per layer.

    In place of stats, their ``load().tolist()`` will do, as from a file.
    """
    _check_not_empty("history", history, "it holds {step: routing_stats(records)}")
    steps = sorted(history)
    layers = list(history[steps[0]])
    figure, panels = _figure(len(layers))
    for axes, layer in zip(panels, layers, strict=True):
        load = torch.stack([_load(history[step][layer]) for step in steps], dim=1)
        experts = load.shape[0]
        look = {"aspect": "auto", "origin": "lower", "interpolation": "nearest", "cmap": "RdBu_r"}
        image = axes.imshow(load.cpu().numpy(), **look, vmin=0, vmax=2 / experts)
        title = f"{layer or 'layer'}: share of the choices asked for (equal: {1 / experts:.1%})"
        axes.set(title=title, xlabel="step", ylabel="expert")
        shown = range(0, len(steps), max(len(steps) // 8, 1))
        axes.set_xticks(list(shown), [str(steps[place]) for place in shown])
        figure.colorbar(image, ax=axes, extend="max", format=lambda share, _: f"{share:.1%}")
    figure.savefig(path, dpi=100)


def _load(counted: RoutingStats | Sequence[float]) -> Tensor:
    return counted.load() if isinstance(counted, RoutingStats) else torch.tensor(counted)


def plot_drops(stats: Mapping[str, RoutingStats], path: str | Path) -> None:
    """Share of the choices at each position that were dropped or not asked for, a panel per layer.

    Positions without a real token are gaps.
    """
    _check_not_empty("stats", stats, RECORD)
    figure, panels = _figure(len(stats))
    for axes, (layer, counted) in zip(panels, stats.items(), strict=True):
        shares = counted.dropped_by_position(), counted.not_asked_by_position()
        for share, label in zip(shares, ("dropped, expert full", "not asked for, by policy"), strict=True):
            axes.plot(share.where(counted.choices_at > 0, torch.nan).cpu().numpy(), label=label)
        labels = {"xlabel": "position in the sequence", "ylabel": "share of choices"}
        axes.set(title=layer or "layer", **labels, ylim=(-0.02, 1.02))
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=100)


def plot_gates(records: Mapping[str, Sequence[Routing]], path: str | Path) -> None:
    """Histogram of the gates of first, second and further choices of real tokens, a panel per layer."""
    _check_not_empty("records", records, RECORD)
    figure, panels = _figure(len(records))
    for axes, (layer, routings) in zip(panels, records.items(), strict=True):
        for rank in range(routings[0].gates.shape[-1]):
            gates = torch.cat([routing.gates[~routing.masked][rank :: routing.gates.shape[-1]] for routing in routings])
            axes.hist(gates.float().cpu().numpy(), bins=50, range=(0, 1), histtype="step", label=f"choice {rank + 1}")
        axes.set(title=layer or "layer", xlabel="gate", ylabel="tokens")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=100)


def plot_plans(plans: Mapping[str, Plan], path: str | Path) -> None:
    """What settings would do: where choices go, and what they cost, a bar per setting."""
    _check_not_empty("plans", plans, "it holds {name: Plan}, as of plan")
    figure, panels = _figure(3, height=0.8 + 0.3 * len(plans))
    names = list(plans)
    dropped = [chosen.dropped for chosen in plans.values()]
    panels[0].barh(names, dropped, label="dropped, expert full")
    not_asked = [chosen.not_asked for chosen in plans.values()]
    panels[0].barh(names, not_asked, left=dropped, label="not asked for, by policy")
    panels[0].set(xlabel="share of all choices")
    panels[0].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # above the bars
    panels[1].barh(names, [chosen.experts_per_token for chosen in plans.values()])
    panels[1].set(xlabel="experts that see a token, on average")
    panels[2].barh(names, [chosen.bytes_per_token for chosen in plans.values()])
    panels[2].set(xlabel="bytes between ranks for each token")
    for axes in panels:
        axes.invert_yaxis()
    figure.savefig(path, dpi=100)


STYLE = """
body { font: 15px/1.9 ui-monospace, monospace; margin: 2em auto; padding: 0 2em; max-width: 60em;
  color: #222; background: #fff }
h1, h2, .hint { font: 15px/1.5 sans-serif } h1 { font-size: 22px } h2 { font-weight: bold }
.legend span { margin-right: .6em; display: inline-block } .none { outline: 1px dashed #c00; background: none }
span { padding: .15em 0; border-radius: .2em; white-space: pre-wrap }
td, th { padding: .1em .8em; text-align: left; vertical-align: top; font-weight: normal }
"""

HINT = """Each token has the colour of the expert that it chose first; a dashed outline means that no expert saw it.
Point at a token to read all its choices, their gates and what became of them."""


def text_page(
    tokens: Sequence[str], records: Mapping[str, Sequence[Routing]], row: int = 0, title: str = "Where tokens go"
) -> str:
    """An HTML page that shows where the tokens of a text go: each coloured by its first expert, a section per layer.

    tokens: the n tokens of a row of the batch, as text. records: as of `record_routing`; the first call of each layer
        is shown.
    title: what stands above them. Pointing at a token tells all its choices, their gates and what became of them.
    """
    _check_not_empty("records", records, RECORD)
    sections = []
    for layer, routings in records.items():
        routing = routings[0]
        if len(tokens) != routing.indices.shape[1]:
            wanted = f"the {routing.indices.shape[1]} tokens that {layer or 'the layer'} saw"
            raise ValueError(f"tokens must be {wanted}, got {len(tokens)}")
        spans = "".join(_span(token, routing, row, place) for place, token in enumerate(tokens))
        used = sorted(set(routing.indices[row, :, 0].tolist()))
        colors = {expert: _color(expert, routing.num_experts) for expert in used}
        legend = "".join(f'<span style="background:{color}"> expert {each} </span>' for each, color in colors.items())
        legend += '<span class="none"> no expert </span>'
        heading = f'<h2>{escape(layer or "layer")}</h2><p class="legend">{legend}</p>'
        sections.append(f"<section>{heading}<p>{spans}</p></section>")
    return _page(title, HINT, sections)


def expert_page(
    traces: Mapping[str, Trace], names: Sequence[str], most: int = 12, title: str = "What experts take"
) -> str:
    """An HTML page of `tools.trace.expert_table`: what each expert gets most above its share, a section per layer.

    names: of the kinds of tokens, by number. The darker a token, the larger the share of its choices that the expert
    got; pointing at it tells how many.
    """
    _check_not_empty("traces", traces, RECORD)
    sections = []
    for layer, traced in traces.items():
        rows = ""
        for expert, (load, shares) in enumerate(zip(traced.load().tolist(), traced.top(most), strict=True)):
            tokens = " ".join(
                f'<span style="background:hsl(210 80% {95 - 45 * of_kind:.0f}%)" title="{count:,} tokens, '
                f'{of_kind:.0%} of all choices of this one"> {escape(visible(names[kind]))} </span>'
                for kind, count, of_kind in shares
            )
            rows += f"<tr><td>{expert}</td><td>{load:.1%}</td><td>{tokens}</td></tr>"
        head = "<tr><th>expert</th><th>share</th><th>gets most, above its share</th></tr>"
        sections.append(f"<section><h2>{escape(layer or 'layer')}</h2><table>{head}{rows}</table></section>")
    hint = "The darker a token, the larger the share of its choices that the expert got. Point at it to read how many."
    return _page(title, hint, sections)


def _page(title: str, hint: str, sections: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = f'<h1>{escape(title)}</h1><p class="hint">{hint}</p>{"".join(sections)}'
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def _span(token: str, routing: Routing, row: int, place: int) -> str:
    fates = {"kept": routing.kept, "dropped": routing.dropped, "not asked": routing.not_asked}
    fates["padding"] = routing.masked
    told = []
    for rank, expert in enumerate(routing.indices[row, place].tolist()):
        fate = next(name for name, flags in fates.items() if flags[row, place, rank])
        told.append(f"expert {expert}: gate {float(routing.gates[row, place, rank]):.2f}, {fate}")
    color = f'style="background:{_color(int(routing.indices[row, place, 0]), routing.num_experts)}"'
    look = color if bool(routing.kept[row, place].any()) else 'class="none"'
    lines = "\n".join(told)
    return f'<span {look} title="{lines}">{escape(token)}</span>'


def _color(expert: int, experts: int) -> str:
    """Hues apart from each other, light enough for dark text."""
    return f"hsl({360 * expert / experts:.0f} 75% {(80, 70)[expert % 2]}%)"
