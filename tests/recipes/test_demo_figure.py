"""Figures are drawn from synthetic values: size, determinism, what the panels hold, errors."""

import struct
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

import demo_figure as plots
from amortlm.errors import DataError


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    return plots.NumbersData(
        before=list(0.9 * rng.dirichlet(np.full(101, 0.3))),
        after=list(rng.dirichlet(np.full(101, 50.0))),
        kl_before=1.2,
        kl_after=0.01,
        valid_before=0.9,
        valid_after=0.9997,
        steps=[0, 10, 20],
        curve=[1.2, 0.1, 0.02],
        curve_label="KL to uniform (nats)",
    )


@pytest.fixture
def infilling():
    rng = np.random.default_rng(1)
    return plots.InfillingData(
        log_w_before=[list(rng.normal(-30 - i, 4, 32)) for i in range(4)],
        log_w_after=[list(rng.normal(-28 - i, 0.5, 32)) for i in range(4)],
        steps=[0, 50, 100],
        ess=[0.1, 0.5, 0.7],
        log_w_variance=[16.0, 1.0, 0.25],
        metrics={"ESS / samples": (0.1, 0.7), "log reward (nats)": (-31.5, -29.5), "zero": (0.0, 0.0)},
    )


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.mark.parametrize("size", [{}, {"width": 1000, "height": 600}])
def test_demo_figure_is_a_png_of_the_stated_size(tmp_path, numbers, infilling, size):
    path = tmp_path / "new" / "demo.png"
    plots.demo_figure(numbers, infilling, path, **size)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (size.get("width", 1600), size.get("height", 960))


def test_same_data_same_bytes(tmp_path, numbers, infilling):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    for path in (one, two):
        plots.demo_figure(numbers, infilling, path)
    assert one.read_bytes() == two.read_bytes()


def test_no_pyplot(tmp_path, numbers, infilling):
    already = "matplotlib.pyplot" in sys.modules
    plots.demo_figure(numbers, infilling, tmp_path / "demo.png")
    assert already or "matplotlib.pyplot" not in sys.modules


def test_weights_are_centred_per_prompt():
    values = plots.centred([[3.0, 3.0], [-50.0, -50.0, -50.0]])
    assert np.allclose(values, 0)  # equal weights: the exact posterior
    mixed = plots.centred([[0.0, np.log(3), -np.inf]])  # mean weight 4/3
    assert np.allclose(np.exp(mixed), [0.75, 2.25, 0])


@pytest.mark.parametrize("bad", [[[-np.inf, -np.inf]], [[np.nan, 1.0]]])
def test_weights_that_cannot_be_centred(bad):
    with pytest.raises(DataError):
        plots.centred(bad)


def test_log_weight_histogram_counts_every_sample(ax):
    plots.log_weight_histogram(ax, [[0.0, -np.inf, -1e6, 1.0]], [[2.0, 2.0]])
    filled = [p for p in ax.patches if p.get_fill()]
    assert [sum(p.get_data().values) for p in filled] == pytest.approx([1.0, 1.0])


def test_curve_leaves_gaps_where_a_log_axis_has_no_place(ax):
    plots.curve(ax, [0, 1, 2], {"loss": [1.0, 0.0, 0.1], "bound": [2.0, 1.0, 0.5]}, "nats", log=True)
    assert np.isnan(ax.lines[0].get_ydata()).tolist() == [False, True, False]
    assert ax.get_yscale() == "log"
    assert ax.get_legend() is not None


def test_metric_bars_write_every_number_and_keep_signs(ax):
    plots.metric_bars(ax, {"k-hat": (float("inf"), 0.5), "reward": (-4.0, -2.0)})
    assert {t.get_text() for t in ax.texts} == {"k-hat", "inf", "0.5", "reward", "−4", "−2"}
    assert [bar.get_width() for bar in ax.patches] == [0.0, 1.0, -1.0, -0.5]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-41.23, "−41.2"), (0.00012, "0.00012"), (3e-6, "3.0e−06"), (12345.6, "12,346")],
)
def test_numbers_are_short(value, text):
    assert plots._number(value) == text


@pytest.mark.parametrize(("share", "text"), [(1.0, "100%"), (0.9997, "99.97%"), (0.07, "7%"), (0.583, "58%")])
def test_percentages_do_not_round_up_to_all(share, text):
    assert plots._percent(share) == text
