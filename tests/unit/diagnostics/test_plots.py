"""The pictures show the numbers of the log, say what they show, and can be written."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from hf_adanorm import AdaNorm, DetachNorm, plots, watch_norms
from hf_adanorm.diagnostics.log import FIELDS, HISTOGRAM_BINS, NormLog

plt = pytest.importorskip("matplotlib.pyplot", reason="the plots need matplotlib")
from matplotlib.figure import Figure  # noqa: E402

plt.switch_backend("agg")


def make_log(norm=AdaNorm, steps=3, depth=4):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), norm(8)) for _ in range(depth)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_norms(model, every=2, histogram=True) as log:
        for _ in range(2 * steps - 1):
            (model(torch.randn(16, 8)) - torch.randn(16, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return log


@pytest.fixture(scope="module")
def log():
    return make_log()


def all_figures(log):
    return {
        "depth": plots.plot_depth(log),
        "gradients": plots.plot_gradients({"AdaNorm": log, "DetachNorm": log}),
        "theorem": plots.plot_theorem(log),
        "phi": plots.plot_phi(log),
    }


def test_every_figure_is_labeled_whole_and_legible(log, tmp_path):
    before = dict(plt.rcParams)
    for name, figure in all_figures(log).items():
        assert isinstance(figure, Figure), name
        figure.savefig(tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").read_bytes().startswith(b"<?xml")
        assert figure.axes[0].get_xlabel(), name
        assert figure.axes[0].get_ylabel(), name
        figure.draw_without_rendering()
        width, height = figure.bbox.size
        for label in (label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label)):
            box = label.get_window_extent()
            assert min(box.x0, box.y0) >= -1, name
            assert box.x1 <= width + 1, name
            assert box.y1 <= height + 1, name
            assert label.get_size() >= 8, name
    assert dict(plt.rcParams) == before  # the caller's style


def test_depth_shows_the_median_over_steps(log):
    line = plots.plot_depth(log, "grad_output_var").axes[0].get_lines()[0]
    torch.testing.assert_close(
        torch.tensor(line.get_ydata()), log.values("grad_output_var").nanmedian(0).values, check_dtype=False
    )
    assert list(line.get_xdata()) == [1, 2, 3, 4]
    scales = [plots.plot_depth(log, field).axes[0].get_yscale() for field in ("grad_output_var", "share_falling")]
    assert scales == ["log", "linear"]


def test_several_norms_share_a_picture(log):
    other = make_log(DetachNorm)
    left, right = plots.plot_gradients({"AdaNorm": log, "DetachNorm": other}).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["AdaNorm", "DetachNorm"]
    assert len(right.get_lines()) == 2
    torch.testing.assert_close(
        torch.tensor(right.get_lines()[1].get_ydata()),
        other.values("grad_input_var").nanmedian(0).values,
        check_dtype=False,
    )


def test_lines_differ_in_more_than_color_and_show_the_chosen_steps(log):
    figure, ax = plt.subplots()
    assert plots.plot_depth(dict.fromkeys("abcdefg", log), steps=(3, 3), ax=ax) is figure
    lines = ax.get_lines()
    assert len({(line.get_marker(), str(line._dash_pattern)) for line in lines}) == 7
    assert len({line.get_color() for line in lines}) == 7
    torch.testing.assert_close(torch.tensor(lines[0].get_ydata()), log.values("grad_input_var")[1], check_dtype=False)
    assert set(plots.LABELS) == set(FIELDS)
    plt.close(figure)


def test_phi_and_its_marks():
    ax = plots.plot_phi(C=2.0, k=0.25).axes[0]
    phi, z = ax.get_lines()[:2]
    y = torch.tensor(phi.get_xdata())
    torch.testing.assert_close(torch.tensor(phi.get_ydata()), 2 * (1 - 0.25 * y))
    torch.testing.assert_close(torch.tensor(z.get_ydata()), 2 * (1 - 0.25 * y) * y)
    assert {float(line.get_xdata()[0]) for line in ax.get_lines()[3:]} == {2.0, 4.0}


def test_phi_takes_a_log_or_activations(log):
    counts = sum(log.histograms.values())
    shares = plots.plot_phi(log).axes[1].patches[0].get_data().values
    assert list(shares) == pytest.approx((counts / counts.sum()).tolist())
    shares = plots.plot_phi(torch.tensor([0.1, 0.1, 100.0])).axes[1].patches[0].get_data().values
    assert shares[HISTOGRAM_BINS // 2] == pytest.approx(2 / 3)
    assert shares[-1] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda log: plots.plot_depth(NormLog("Model", 1, 0.1)), ValueError, "is empty"),
        (lambda log: plots.plot_depth([1, 2]), TypeError, "expected a NormLog"),
        (lambda log: plots.plot_theorem({"AdaNorm": log}), TypeError, "plot_theorem takes one log, .*, got dict"),
        (lambda log: plots.plot_phi({"AdaNorm": log}), TypeError, "plot_phi takes one log or a tensor"),
        (lambda log: plots.plot_depth(log, "loss"), ValueError, "no statistic 'loss'"),
        (lambda log: plots.plot_depth(log, steps=(100, 200)), ValueError, "no step from 100 to 200 .* are 1 to 5"),
        (lambda log: plots.plot_phi(k=0.0), ValueError, "C and k must be > 0"),
    ],
)
def test_bad_input_is_named(log, draw, error, message):
    with pytest.raises(error, match=message):
        draw(log)


def test_without_matplotlib_the_error_names_the_extra(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plots.plot_depth(log)
