"""Curves: the figures of the log where they belong, as data and as pixels."""

import io
import math

import numpy as np
import pytest
from fastdistill.training.watch import plot, plot_png, record
from fastdistill.training.watch.plots import COLOURS, DAY, NIGHT, curves, described
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from .toys import a_report


def records(count=20, **changes):
    return [record(a_report(update, **changes)) for update in range(1, count + 1)]


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float) / 255


def test_each_loss_has_a_panel_with_its_own_figures():
    lines = [record(a_report(u, losses={"a": 1.0 / u, "b": float(u)})) for u in range(1, 6)]
    axes = plot(lines, "losses").axes
    assert [each.get_title(loc="left") for each in axes] == ["a", "b"]
    np.testing.assert_allclose(axes[0].lines[0].get_xydata(), [(u, 1.0 / u) for u in range(1, 6)])
    np.testing.assert_allclose(axes[1].lines[0].get_xydata(), [(u, u) for u in range(1, 6)])


def test_roles_share_a_panel_and_are_named():
    lines = [record(a_report(u, learning_rates={"student": 1e-4 * u, "critic": 2e-4})) for u in range(1, 6)]
    (axes,) = plot(lines, "learning_rates").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["student", "critic"]


@pytest.mark.parametrize(("last", "scale"), [(29.0, "linear"), (31.0, "log")])
def test_an_axis_is_logarithmic_where_figures_span_much(last, scale):
    lines = [record(a_report(u, losses={"a": value})) for u, value in enumerate((1.0, 5.0, last), 1)]
    (axes,) = plot(lines, "losses").axes
    assert axes.get_yscale() == scale


def test_figures_of_both_signs_keep_a_linear_axis():
    lines = [record(a_report(u, losses={"a": value})) for u, value in enumerate((-1.0, 0.001, 500.0), 1)]
    assert plot(lines, "losses").axes[0].get_yscale() == "linear"


def test_what_is_not_finite_is_a_gap():
    lines = [record(a_report(u, losses={"a": math.inf if u == 3 else 1.0 * u})) for u in range(1, 6)]
    updates, values = curves(lines, "losses")["a"]
    np.testing.assert_array_equal(updates, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(values, [1, 2, np.nan, 4, 5])
    assert plot(lines, "losses").axes[0].get_yscale() == "linear"


def test_a_validation_is_one_point_however_many_reports_repeat_it():
    lines = [record(a_report(u, validation={"fd": 5.0 - u // 5}, validated=u // 5 * 5, best=5)) for u in range(5, 15)]
    updates, values = curves(lines, "validation")["fd"]
    np.testing.assert_array_equal(updates, [5, 10])
    np.testing.assert_array_equal(values, [4, 3])


def test_many_reports_get_a_running_mean_over_them():
    lines = [record(a_report(u, losses={"a": float(u % 2)})) for u in range(1, 101)]
    raw, mean = plot(lines, "losses").axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), [u % 2 for u in range(1, 101)])
    assert mean.get_ydata()[0] == 1.0
    np.testing.assert_allclose(mean.get_ydata()[10:], 0.5, atol=0.11)


@pytest.mark.parametrize("colours", [DAY, NIGHT])
def test_the_picture_has_ink_where_the_figures_are_and_paper_elsewhere(colours):
    lines = [record(a_report(u, losses={"a": float(u)})) for u in range(1, 11)]
    whole = plot(lines, "losses", colours)
    FigureCanvasAgg(whole).draw()
    picture = pixels(plot_png(lines, "losses", colours, dpi=100))
    height = picture.shape[0]
    (axes,) = whole.axes

    def at(update, value):
        x, y = axes.transData.transform((update, value))
        return picture[height - 1 - round(y), round(x)]

    for update in range(2, 10):
        np.testing.assert_allclose(at(update, update), to_rgb(COLOURS[0]), atol=0.15)
        assert np.abs(at(update + 0.3, 11 - update) - to_rgb(COLOURS[0])).max() > 0.3 or abs(11 - 2 * update) < 2
    np.testing.assert_allclose(picture[0, 0], to_rgb(colours["paper"]), atol=0.01)


def test_the_words_for_a_curve_give_its_figures():
    text = described(records(4), "losses")
    assert text == "flow: 1 at update 1, 0.25 at update 4, between 0.25 and 1."


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="validation: no figures to draw in 3 reports"):
        plot(records(3), "validation")
