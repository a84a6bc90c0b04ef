"""Pictures are drawn from real records, and the page tells where each token went, in a real browser if there is one."""

import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest
import torch

from st_moe_pytorch import MoE, SparseMoEBlock
from st_moe_pytorch.tools.pictures import plot_drops, plot_gates, plot_load, plot_plans, text_page
from st_moe_pytorch.tools.plan import plan
from st_moe_pytorch.tools.watch import record_routing, routing_stats

TOKENS = ["def", " f", "(x)", ":\n", "  <b>", ' "&"', " ü", " y"]


@pytest.fixture
def records():
    model = torch.nn.ModuleDict({"first": MoE(8, 4, capacity_factor_train=0.5), "second": SparseMoEBlock(MoE(8, 5))})
    model["first"].gate.min_expert_capacity = 1
    with record_routing(model) as records:
        for _ in range(3):
            x = torch.randn(2, len(TOKENS), 8)
            model["second"](model["first"](x, mask=torch.arange(len(TOKENS)) < torch.tensor([[8], [7]])).outputs)
    return records


def test_pictures_are_written(records, tmp_path):
    from matplotlib.image import imread

    stats = routing_stats(records)
    plans = plan(MoE(8, 4), records["first"], {"as it is": {}, "one choice": {"top_n": 1}}, ranks=2)
    plot_load({0: stats, 10: stats, 20: stats}, tmp_path / "load.png")
    plot_drops(stats, tmp_path / "drops.png")
    plot_gates(records, tmp_path / "gates.png")
    plot_plans(plans, tmp_path / "plans.png")
    for name in ("load", "drops", "gates", "plans"):
        image = imread(tmp_path / f"{name}.png")
        assert min(image.shape[:2]) > 200
        assert len({tuple(pixel) for pixel in image.reshape(-1, image.shape[-1])[::7].tolist()}) > 3


def test_positions_without_tokens_are_gaps(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    with record_routing(moe := MoE(8, 4)) as records:
        moe(torch.randn(2, 6, 8), mask=torch.arange(6) < torch.tensor([[4], [2]]))
    plot_drops(routing_stats(records), tmp_path / "drops.png")
    for line in drawn[0].axes[0].lines:
        assert torch.tensor(line.get_ydata()).isnan().tolist() == [False] * 4 + [True] * 2


class Spans(HTMLParser):
    """Titles and texts of the tokens in each section."""

    def __init__(self, page):
        super().__init__()
        self.sections, self.title = [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "section":
            self.sections.append([])
        self.title = dict(attrs).get("title")

    def handle_endtag(self, tag):
        self.title = None

    def handle_data(self, data):
        if self.title:
            self.sections[-1].append((data, self.title))


@pytest.mark.parametrize("row", [0, 1])
def test_page_tells_every_choice_of_every_token(records, row):
    sections = Spans(text_page(TOKENS, records, row)).sections
    assert len(sections) == 2
    for section, routings in zip(sections, records.values(), strict=True):
        assert [text for text, _ in section] == TOKENS
        routing = routings[0]
        for place, (_, title) in enumerate(section):
            assert len(title.splitlines()) == routing.indices.shape[-1]
            for rank, line in enumerate(title.splitlines()):
                expert, gate, fate = re.fullmatch(r"expert (\d): gate ([\d.]+), (.*)", line).groups()
                at = row, place, rank
                assert int(expert) == routing.indices[at]
                assert float(gate) == pytest.approx(float(routing.gates[at]), abs=0.0051)
                flags = {
                    "kept": routing.kept,
                    "dropped": routing.dropped,
                    "not asked": routing.not_asked,
                    "padding": routing.masked,
                }
                assert flags[fate][at]


def test_page_wants_the_tokens_that_the_layer_saw(records):
    with pytest.raises(ValueError, match="tokens must be the 8 tokens that first saw, got 7"):
        text_page(TOKENS[1:], records)


CHROMIUM = shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_page_in_a_browser(records, tmp_path):
    (tmp_path / "page.html").write_text(text_page(TOKENS, records), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --disable-component-update"
    flags += " --disable-background-networking"
    command = [
        CHROMIUM,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path / 'page.html'}",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert [text for text, _ in Spans(dom).sections[0]] == TOKENS
    assert "Where tokens go" in unescape(dom)


def test_the_page_shows_the_row_that_is_asked_for(records):
    first, second = (text_page(TOKENS, records, row=row) for row in (0, 1))
    assert ", padding" not in first
    assert second.count(", padding") == 2  # both choices of the last token of the first layer


def test_the_page_has_a_heading_and_says_how_to_read_it(records):
    assert "<h1>Where tokens go</h1>" in text_page(TOKENS, records)
    page = text_page(TOKENS, records, title="<b> & co")
    assert "<title>&lt;b&gt; &amp; co</title>" in page
    assert "<h1>&lt;b&gt; &amp; co</h1>" in page
    assert "Point at a token to read all its choices" in page


def test_a_history_may_hold_loads_that_were_read_from_a_file(records, tmp_path):
    stats = routing_stats(records)
    plot_load({0: stats, 10: stats}, tmp_path / "stats.png")
    loads = {layer: counted.load().tolist() for layer, counted in stats.items()}
    plot_load({0: loads, 10: loads}, tmp_path / "loads.png")
    assert (tmp_path / "stats.png").read_bytes() == (tmp_path / "loads.png").read_bytes()


@pytest.mark.parametrize(
    ("draw", "nothing", "message"),
    [
        (plot_load, {}, "history must not be empty"),
        (plot_load, {10: {}}, "history must not be empty, got nothing of 10"),
        (plot_drops, {}, "stats must not be empty.*: run the model inside record_routing"),
        (plot_gates, {}, "records must not be empty.*: run the model inside record_routing"),
        (plot_gates, {"first": []}, "records must not be empty, got nothing of 'first'"),
        (plot_plans, {}, "plans must not be empty"),
        (lambda records, _: text_page(TOKENS, records), {}, "records must not be empty"),
        (lambda records, _: text_page(TOKENS, records), {"first": []}, "got nothing of 'first'"),
    ],
)
def test_pictures_of_nothing_are_refused(draw, nothing, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(nothing, tmp_path / "nothing.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [1, 2, 6])
def test_the_legend_of_plans_hides_no_bar(records, tmp_path, monkeypatch, settings):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    asked = {f"factor {factor}": {"capacity_factor_train": factor} for factor in range(1, settings + 1)}
    plot_plans(plan(MoE(8, 4), records["first"], asked), tmp_path / "plans.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend().get_window_extent()
    bars = [bar.get_window_extent() for bar in figure.axes[0].patches]
    assert len(bars) == 2 * settings
    assert legend.y0 >= max(bar.y1 for bar in bars)
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert legend.y1 <= figure.bbox.y1
