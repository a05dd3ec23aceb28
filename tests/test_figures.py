"""Every figure is drawn from a synthetic frame, warnings being errors, and leaves nothing global behind."""

import io
from html.parser import HTMLParser

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

from ctxlib import figures
from ctxlib.roles import QUESTION_GROUPS, ROLES

rng = np.random.default_rng(0)
CONDITIONS = ["pretrained", "instruct, template", "instruct, no template"]
TOKENS = pd.DataFrame(
    {
        "token": ["<s>", "<|user|>", "<0x0A>", "▁日本", "Ġ$x^", "<script>", "\n\n", " ", "a" * 300, "𝕏"],
        "role": ["bos", "template", "template", *["user"] * 5, "assistant", "system"],
        "turn": [0, *[1] * 8, 2],
        "supervised": [False] * 8 + [True] * 2,
    }
)


def values(**axes) -> pd.DataFrame:
    """Every combination of `axes` with a value, an interval and n, as `metrics.summarise` gives them."""
    frame = pd.MultiIndex.from_product(axes.values(), names=axes.keys()).to_frame(index=False)
    value = rng.uniform(0.1, 0.9, len(frame))
    return frame.assign(value=value, ci_low=value - 0.05, ci_high=value + 0.05, n=40)


def shares(layers) -> pd.DataFrame:
    """Attention by role that sums to one."""
    frame = values(condition=CONDITIONS, layer=layers, role=ROLES)
    return frame.assign(value=frame["value"] / frame.groupby(["condition", "layer"])["value"].transform("sum"))


def curves(x: str, y: str) -> pd.DataFrame:
    return pd.DataFrame(
        {"layer": np.repeat([0, 1, 2], 5), x: np.tile(np.linspace(0, 1, 5), 3), y: rng.random(15)}
    ).assign(threshold=np.tile([np.inf, 0.9, 0.6, 0.4, 0.1], 3))


SCORES = pd.DataFrame(
    {"score": rng.random(80), "truth": rng.random(80) < 0.3, "user_tokens": rng.integers(1, 900, 80)}
).assign(selected=lambda frame: frame["score"] > 0.6, dataset=["town", "shared"] * 40)
LOG = pd.DataFrame({"step": [*range(9)] * 2, "loss": rng.random(18), "run": ["vanilla"] * 9 + ["indicator"] * 9})
FRACTIONS = values(dataset=["town"], threshold=[0.5, 0.6]).rename(
    columns={"value": "fraction", "ci_low": "low", "ci_high": "high"}
)
AGREEMENT = values(layer=range(4), other_layer=range(4)).rename(columns={"value": "disagreement"})
CLAIMS = values(claim=["1 recall falls under the template " * 3, "2 attention to the user falls"]).assign(
    threshold=[0.2, np.nan], holds=[True, False], seed=0
)
RUNS = values(condition=["vanilla", "indicator"], dose=[0.0, 0.5, 0.95], panel=["template", "raw text"])
FOREST = values(metric=["recall of a needle that contradicts memory " * 2, "known facts"]).assign(threshold=[0.2, 0.9])
BARS = values(model=["small", "large"], condition=CONDITIONS)
MANY = values(model=["small", "large", "a name that is long enough to be wrapped", "d", "$x"], condition=CONDITIONS)
FEW = values(model=["small", "large", "third"], condition=[*CONDITIONS, "$x", "e"])
PAIRS = values(panel=["NIH", "MT-Bench"], row=["a", "b"], side=["paper", "$x"], condition=["vanilla", "[IND]"])
PAIRS = PAIRS.assign(value=PAIRS["value"] * np.where(PAIRS["panel"] == "NIH", 1, 9))
DIRECTIONS = values(key=["up", "down", "flat", "bare", "unmeasured"]).assign(
    claim=lambda frame: "the claim " + frame["key"],
    paper_says="up",
    paper="2 up of 2",
    measured="layer 3",
    experiment="town",
    verdict=["holds", "does not hold", "not decided", "no interval", "not measured"],
)

DRAWN = {
    "role_strip": lambda: figures.role_strip(TOKENS),
    "role_strip_without_turns": lambda: figures.role_strip(TOKENS.drop(columns="turn")),
    "label_strip": lambda: figures.label_strip(TOKENS),
    "bars": lambda: figures.bars_with_intervals(BARS, x="model", hue="condition", xlabel="model (size)", paper=BARS),
    "bars_with_runs": lambda: figures.bars_with_intervals(
        BARS, x="model", hue="condition", xlabel="model (size)", runs=BARS
    ),
    "bars_too_many": lambda: figures.bars_with_intervals(
        MANY, x="model", hue="condition", xlabel="model (size)", paper=MANY, runs=MANY
    ),
    "bars_of_many_conditions": lambda: figures.bars_with_intervals(
        FEW, x="model", hue="condition", xlabel="model (size)", paper=FEW, runs=FEW
    ),
    "bars_without_intervals": lambda: figures.bars_with_intervals(
        BARS.assign(ci_low=np.nan, ci_high=np.nan), x="model", hue="condition", xlabel="model (size)", runs=BARS
    ),
    "recall": lambda: figures.recall_by_condition(BARS, xlabel="needle (kind)"),
    "claims": lambda: figures.forest(CLAIMS),
    "errors": lambda: figures.recall_errors(values(side=["paper", "ours"], model=["a", "$x"], condition=CONDITIONS)),
    "pairs": lambda: figures.pairs_beside(PAIRS),
    "pairs_of_the_paper": lambda: figures.pairs_beside(PAIRS[PAIRS["side"] == "paper"].assign(n=8)),
    "directions": lambda: figures.forest(DIRECTIONS, paper=values(claim=["the claim up", "the claim down"])),
    "steering": lambda: figures.steering_curve(
        values(task=["needle", "facts"], steering_alpha=[1.0, 0.95, 0.5, 0.01]), paper=values(task=["needle"])
    ),
    "allocation": lambda: figures.allocation_by_role(shares(range(3))),
    "allocation_one_layer": lambda: figures.allocation_by_role(shares([2])),
    "shift": lambda: figures.allocation_shift(values(layer=range(6), role=["bos", "user", "assistant"])),
    "shift_panels": lambda: figures.allocation_shift(values(condition=["a", "b"], layer=[3], role=["user"])),
    "heads": lambda: figures.head_map(values(layer=range(6), head=range(4))),
    "heads_shift": lambda: figures.head_map(values(condition=["a", "b"], layer=range(2), head=range(4)), shift=True),
    "scores": lambda: figures.score_histogram(SCORES),
    "scores_by_truth": lambda: figures.score_histogram(SCORES, truth="truth", threshold=0.6),
    "scores_by_kind": lambda: figures.scores_by_kind(SCORES, truth="truth", kind="dataset", threshold=0.6),
    "agreement_panels": lambda: figures.layer_agreement(
        pd.concat([AGREEMENT.assign(variant="authors_code"), AGREEMENT.assign(variant="$x")]), panel="variant"
    ),
    "agreement": lambda: figures.layer_agreement(AGREEMENT),
    "lengths": lambda: figures.length_histograms(SCORES),
    "lengths_panels": lambda: figures.length_histograms(SCORES, panel="dataset"),
    "lengths_none_selected": lambda: figures.length_histograms(SCORES.assign(selected=False)),
    "fractions": lambda: figures.fractions_over_beta(FRACTIONS, paper=FRACTIONS),
    "roc": lambda: figures.roc_and_pr(
        curves("false_positive_rate", "true_positive_rate"), curves("recall", "precision"), prevalence=0.3,
        auc={0: 0.5, 1: 0.7, 2: 0.9}, chosen_layer=1, threshold=0.5, n=80,
    ),
    "auc": lambda: figures.layer_auc(values(layer=range(6)), chosen_layer=3),
    "auc_variants": lambda: figures.layer_auc(values(layer=range(6), variant=["standard", "its"]), hue="variant"),
    "curves": lambda: figures.curves_over_seeds(RUNS, RUNS, x="dose", panel="panel", xlabel="dose (share of turns)"),
    "curves_log": lambda: figures.curves_over_seeds(
        RUNS.assign(dose=RUNS.dose + 1), RUNS.assign(dose=RUNS.dose + 1), x="dose", xlabel="dose (share)", log="xy",
        ylim=None,
    ),
    "curves_log_of_nothing_positive": lambda: figures.curves_over_seeds(
        RUNS.assign(dose=RUNS.dose + 1, value=0.0), RUNS.assign(dose=RUNS.dose + 1, value=0.0), x="dose",
        xlabel="dose (share)", log="xy", ylim=None,
    ),
    "forest": lambda: figures.forest(FOREST, runs=RUNS.assign(metric=FOREST.metric[0]), row="metric"),
    "forest_without_intervals": lambda: figures.forest(
        FOREST.assign(ci_low=np.nan, ci_high=np.nan), runs=FOREST, row="metric"
    ),
    "loss": lambda: figures.loss_curves(LOG, smooth=3),
    "loss_logarithmic": lambda: figures.loss_curves(LOG, logarithmic=True),
    "needle": lambda: figures.needle_heatmap(
        values(condition=[*CONDITIONS, "d", "e"], depth_percent=[0, 50, 100], context_length_tokens=[100, 400])
    ),
    "needle_maps": lambda: figures.needle_maps(
        *[values(depth_percent=[0, 50, 100], context_length_tokens=[100, 400]) for _ in range(2)]
    ),
    "needle_maps_by_condition": lambda: figures.needle_maps(
        *[values(condition=CONDITIONS, depth_percent=[0, 50], context_length_tokens=[100, 400]) for _ in range(2)]
    ),
    "needle_large": lambda: figures.needle_heatmap(
        values(depth_percent=np.linspace(0, 100, 30).round(), context_length_tokens=np.linspace(200, 4000, 26).round())
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_draws_with_labelled_axes_and_leaves_nothing_behind(name):
    settings, opened = dict(mpl.rcParams), plt.get_fignums()
    figure = DRAWN[name]()
    figure.savefig(io.BytesIO(), format="png", dpi=30)
    assert plt.get_fignums() == opened
    assert dict(mpl.rcParams) == settings
    labels = [label for ax in figure.axes if ax.axison for label in (ax.get_xlabel(), ax.get_ylabel()) if label]
    assert all("(" in label or label == "condition" for label in labels)  # a unit, or what the bars are
    if "strip" not in name:
        assert any(ax.get_xlabel() for ax in figure.axes)
    assert any("n = " in text.get_text() for text in figure.findobj(mpl.text.Text))


def test_a_frame_without_rows_makes_a_blank_figure_that_says_so():
    nothing = pd.DataFrame(columns=["layer"])
    for figure in (
        figures.roc_and_pr(nothing, nothing, prevalence=np.nan, threshold=0.6),
        figures.layer_auc(nothing),
        figures.bars_with_intervals(nothing, x="x", hue="hue"),
    ):
        figure.savefig(io.BytesIO(), format="png", dpi=30)
        words = [text.get_text() for text in figure.findobj(mpl.text.Text)]
        assert any(said.startswith("no ") for said in words)


def test_the_dot_on_the_roc_stands_where_the_threshold_selects():
    roc = curves("false_positive_rate", "true_positive_rate")
    figure = figures.roc_and_pr(roc, curves("recall", "precision"), prevalence=0.3, chosen_layer=1, threshold=0.5)
    (dot,) = [line for line in figure.axes[0].lines if line.get_marker() == "o" and len(line.get_xdata())]
    (expected,) = roc[(roc.layer == 1) & (roc.threshold == 0.6)].itertuples()
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (expected.false_positive_rate, expected.true_positive_rate)


@pytest.mark.parametrize("name", DRAWN)
def test_no_figure_is_wider_than_nine_inches_or_has_more_than_twelve_bars(name):
    figure = DRAWN[name]()
    assert figure.get_size_inches()[0] <= 9
    if name.startswith(("bars", "shift")):
        assert sum(len(ax.patches) for ax in figure.axes) <= 12


def test_a_layout_with_everything_in_it_overlaps_nowhere():
    subtitle = "A text that is long enough to need a second line in a figure as narrow as this, and more " * 6
    figure = figures.curves_over_seeds(RUNS, RUNS, x="dose", subtitle=subtitle)
    figure.draw_without_rendering()
    (ax,), (legend,) = figure.axes, figure.legends
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [legend.get_window_extent(), ax.get_tightbbox()]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


LONG = "weight that steering leaves to all tokens but the user's (fraction of one)"
CROWDED = {
    "titles of heatmaps": lambda: figures.needle_heatmap(
        values(condition=[f"{name} + [IND], template on" for name in ("indicator", "indicated", "marked")],
               depth_percent=[0, 50, 100], context_length_tokens=[100, 200, 300, 400])
    ),
    "seven panels beside each other": lambda: figures.pairs_beside(
        values(panel=["NIH", "SQuAD", "MT-Bench (rating)", *"abcd"], row=["a · b"], side=["paper", "ours"],
               condition=["vanilla", "indicator + [IND]"])
    ),
    "long labels of points": lambda: figures.bars_with_intervals(
        values(way=list("abcdefg"), heads=["all", "one"]), x="way", hue="heads", xlabel=LONG, ylabel=LONG
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CROWDED)
def test_titles_and_labels_overlap_neither_each_other_nor_the_edge(name):
    figure = CROWDED[name]()
    figure.draw_without_rendering()
    words = [word for ax in figure.axes for word in (ax._left_title, ax.xaxis.label, ax.yaxis.label) if word.get_text()]
    boxes = [word.get_window_extent() for word in words]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :]), words[place]
        assert box.y0 >= 0
        assert box.y1 <= figure.bbox.y1


def test_bars_stand_at_their_values_and_the_papers_lines_over_them():
    figure = figures.bars_with_intervals(BARS, x="model", hue="condition", paper=BARS.assign(value=0.33))
    (ax,) = figure.axes
    by_condition = BARS.pivot(index="condition", columns="model", values="value").loc[CONDITIONS, ["small", "large"]]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx(by_condition.to_numpy().ravel())
    theirs = [lines for lines in ax.collections if isinstance(lines, LineCollection) and lines.get_zorder() == 4]
    assert len(theirs) == len(CONDITIONS)
    assert {height for lines in theirs for segment in lines.get_segments() for _, height in segment} == {0.33}


def test_the_papers_errors_and_ours_stand_in_panels_of_their_own_at_their_values():
    frame = values(side=["paper", "ours"], model=["a", "b"], condition=CONDITIONS)
    figure = figures.recall_errors(frame)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["paper", "ours"]
    for ax, side in zip(figure.axes, ("paper", "ours"), strict=True):
        expected = (
            frame[frame["side"] == side].pivot(index="condition", columns="model", values="value").loc[CONDITIONS]
        )
        assert [bar.get_height() for bar in ax.patches] == pytest.approx(expected.to_numpy().ravel())


def test_pairs_stand_at_their_values_hollow_before_and_filled_after():
    axes = figures.pairs_beside(PAIRS).axes
    for ax, (_, part) in zip(axes, PAIRS.groupby("panel", sort=False), strict=True):
        dots = [line for line in ax.lines if line.get_marker() == "o"]
        assert sorted(dot.get_xdata()[0] for dot in dots) == pytest.approx(sorted(part["value"]))
        hollow = sorted(dot.get_xdata()[0] for dot in dots if dot.get_markerfacecolor() == "white")
        assert hollow == pytest.approx(sorted(part.loc[part["condition"] == "vanilla", "value"]))


@pytest.mark.parametrize(("frame", "panel", "rows"), [(MANY, "condition", "model"), (FEW, "model", "condition")])
def test_more_values_than_bars_allow_are_points_at_the_same_values(frame, panel, rows):
    figure = figures.bars_with_intervals(frame, x="model", hue="condition", runs=frame.assign(value=0.5))
    order = list(frame[rows].unique())
    for ax, (name, part) in zip(figure.axes, frame.groupby(panel, sort=False), strict=False):
        assert ax.get_title(loc="left") == name and not ax.patches
        points = {}
        for line in ax.lines:
            if line.get_marker() == "o":
                points |= dict(zip(line.get_ydata(), line.get_xdata(), strict=True))
        assert [points[place] for place in range(len(order))] == part.set_index(rows)["value"][order].tolist()
        (dots,) = [line for line in ax.lines if line.get_marker() == "."]
        assert list(dots.get_xdata()) == [0.5] * len(order)


def test_a_claim_is_drawn_if_it_was_measured_and_only_then():
    (ax,) = figures.forest(DIRECTIONS).axes
    points = {line.get_ydata()[0]: line.get_xdata()[0] for line in ax.lines if line.get_marker() in tuple("oXDs")}
    assert points == pytest.approx(dict(enumerate(DIRECTIONS["value"][:4])))
    assert [text.get_text() for text in ax.texts][-1] == "not measured"


def test_a_forest_has_the_colour_of_the_one_rule_for_claims():
    rows = pd.DataFrame({"claim": list("abcd"), "value": 0.5, "ci_low": [0.3, 0.3, 0.3, np.nan], "n": 5})
    rows = rows.assign(ci_high=rows.ci_low + 0.4, threshold=[0.2, 0.8, 0.5, 0.2])
    (ax,) = figures.forest(rows, runs=rows).axes
    markers = [line.get_marker() for line in ax.lines if line.get_marker() in tuple("oXDs")]
    assert markers == ["o", "X", "D", "s"]
    assert ax.texts[0].get_text() == "0.500 [0.300, 0.700], n = 5" and ax.texts[3].get_text() == "0.500, n = 5"
    asserted = figures.forest(rows.assign(holds=[False, True, True, True])).axes[0]
    assert [line.get_marker() for line in asserted.lines if line.get_marker() in tuple("oXDs")] == ["X", "o", "o", "s"]


def test_a_condition_has_one_colour_in_every_figure():
    first, second = (
        figures.bars_with_intervals(values(model=["m"], condition=names), x="model", hue="condition").legends[0]
        for names in (["other", "vanilla"], ["vanilla", "indicator"])
    )
    colours = [
        {text.get_text(): patch.get_facecolor() for text, patch in zip(box.get_texts(), box.get_patches(), strict=True)}
        for box in (first, second)
    ]
    assert colours[0]["vanilla"] == colours[1]["vanilla"]
    assert len(set(colours[0].values())) == len(set(colours[1].values())) == 2


def test_a_role_has_one_colour_in_every_figure():
    frame = values(layer=range(2), role=["bos", "user", "assistant"])
    figure = figures.allocation_shift(frame)
    shown = {text.get_text(): patch.get_facecolor() for legend in figure.legends
             for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)}  # fmt: skip
    assert shown == {role: mpl.colors.to_rgba(figures.ROLE_COLOURS[role]) for role in ("bos", "user", "assistant")}
    assert set(figures.ROLE_COLOURS) == {*ROLES, *QUESTION_GROUPS}


def test_needle_colours_run_from_zero_to_one_whatever_the_values():
    frame = values(condition=["a", "b"], depth_percent=[0, 100], context_length_tokens=[100, 200])
    figure = figures.needle_heatmap(frame.assign(value=0.5))
    assert {ax.collections[0].get_clim() for ax in figure.axes[:2]} == {(0, 1)}


def test_recall_and_attention_to_the_needle_stand_side_by_side_each_on_its_own_scale():
    recall = values(depth_percent=[0, 100], context_length_tokens=[100, 200]).assign(value=[0.1, 0.2, 0.3, 0.4])
    attention = recall.assign(value=[0.01, 0.02, 0.03, 0.04])
    figure = figures.needle_maps(recall, attention)
    maps = [ax.collections[0] for ax in figure.axes[:2]]
    assert [drawn.get_clim() for drawn in maps] == [(0, 1), (0, 0.04)]
    for drawn, frame in zip(maps, (recall, attention), strict=True):
        assert drawn.get_array().ravel().tolist() == frame["value"].tolist()
    assert {" ".join(ax.get_ylabel().split()) for ax in figure.axes} - {""} == {
        "depth (% of context)", "needles recalled (all keywords said)", "attention to the needle (fraction)",
    }  # fmt: skip


def test_shift_colours_are_centred_at_zero():
    frame = values(layer=range(2), head=range(2)).assign(value=[-0.4, 0.1, 0.2, 0.0])
    assert figures.head_map(frame, shift=True).axes[0].collections[0].get_clim() == (-0.4, 0.4)


def test_curves_without_limits_show_every_run_of_every_panel():
    runs = RUNS.assign(value=[-5.0 if panel == RUNS.panel.iloc[-1] else 0.5 for panel in RUNS.panel])
    assert runs.value.nunique() == 2
    for ax in figures.curves_over_seeds(runs, runs, x="dose", panel="panel", ylim=None).axes:
        low, high = ax.get_ylim()
        assert low < -5 and high > 0.5


def test_a_panels_title_keeps_its_lines_and_boxes_what_the_font_lacks():
    frame = values(layer=range(2), head=range(4)).assign(condition="from a\nto \U0001f9a9")
    assert figures.head_map(frame).axes[0].get_title("left") == "from a\nto □"


def test_html_strip_escapes_tokens_and_roles():
    tokens = TOKENS.assign(turn='"><script>')
    shown = figures.role_strip_html(tokens)
    seen, text = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append((tag, dict(attributes)))
    parser.handle_data = text.append
    parser.feed(shown)
    assert "<script" not in shown
    assert {tag for tag, _ in seen} <= {"div", "span", "br", "hr", "b"}
    assert {key for _, attributes in seen for key in attributes} <= {"style", "title"}
    assert "<script>" in text
