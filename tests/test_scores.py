"""Scores keep their labels, refuse what means nothing, and are files that can be trusted."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from tv_interp.errors import FileError, ScoreError, UnknownName
from tv_interp.interventions import Site
from tv_interp.scores import METRICS, Metric, Scores, get_metric
from tv_interp.scores.scores import load_dataset, save_groups

N = 24
ATTRS = {
    "model": "tiny",
    "task": "pairs",
    "corruption": "answers",
    "direction": "denoise",
    "metric": "logit_diff",
    "at": "answer",
    "dropped": {"no answer of equal token length": 2},
    "seed": 0,
}


def scores(effects=None, *, total="clear", dims=("layer", "head"), clusters=None, **fields):
    """Scores of two layers with three heads whose true means are known."""
    rng = np.random.default_rng(0)
    if effects is None:
        means = np.array([[0.1, -3.0, 0.5], [2.0, 0.0, -0.2]])
        effects = means + 0.1 * rng.standard_normal((N, 2, 3))
    coords = {"prompt": np.arange(len(effects))}
    coords |= {dim: np.arange(n) for dim, n in zip(dims, effects.shape[1:], strict=True)}
    rows = ("prompt",)
    noise = rng.standard_normal(len(effects))
    total = {"clear": 4 + noise, "unclear": noise, None: None}[total]
    if total is not None:
        total = xr.DataArray(total, dims=rows, coords={"prompt": coords["prompt"]}, name="total")
    return Scores(
        xr.DataArray(effects, dims=(*rows, *dims), coords=coords, name="effect"),
        fields.pop("unit", "logits"),
        total,
        tuple(map(str, range(len(effects)))) if clusters is None else clusters,
        ATTRS | fields,
    )


# -------------------------------------------------------------------------------- what it holds


@pytest.mark.parametrize(
    "dims", [("head", "layer"), ("layer", "heads"), ("demo", "layer"), ("via", "site")]
)
def test_axes_out_of_order_are_refused(dims):
    with pytest.raises(ScoreError, match="expected dims in the order of .*prompt first, got"):
        scores(np.zeros((N, 2, 3)), dims=dims)


def test_prompt_comes_first_and_has_clusters():
    ours = scores()
    with pytest.raises(ScoreError, match="prompt first, got .'layer', 'prompt', 'head'."):
        Scores(ours.data.transpose("layer", "prompt", "head"), "logits", None, ours.clusters, {})
    with pytest.raises(ScoreError, match="3 cluster labels for 24 prompts"):
        scores(clusters=("a", "b", "c"))


def test_mean_and_recovered():
    ours = scores()
    mean, share = ours.mean(), ours.recovered()
    assert mean.dims == share.dims == ("layer", "head")
    np.testing.assert_allclose(mean, ours.data.values.mean(0))
    np.testing.assert_allclose(share, ours.data.values.mean(0) / ours.total.values.mean())
    assert mean.attrs["unit"] == "logits" and share.attrs["unit"] == "fraction of total"
    assert share[0, 1] < 0 < share[1, 0]


def test_recovered_is_refused_without_a_measurable_total():
    with pytest.raises(
        ScoreError,
        match=r"interval of the mean total .* logits contains 0: corruption 'answers' makes no "
        r"measurable difference here, .*use mean\(\) or another corruption",
    ):
        scores(total="unclear").recovered()
    with pytest.raises(ScoreError, match="there is no total to recover .*: use mean"):
        scores(total=None).recovered()
    for total in ("unclear", None):
        with pytest.raises(ScoreError, match="total"):
            scores(total=total).ci(of="recovered")
        assert not scores(total=total).total_is_clear()
    assert scores().total_is_clear()


def test_total_of_one_item_is_never_clear():
    """Many prompts with the same query are one observation."""
    assert not scores(clusters=("the same",) * N).total_is_clear()


@pytest.mark.parametrize("of", ["mean", "recovered"])
def test_intervals(of):
    ours = scores()
    interval = ours.ci(of=of, seed=3)
    value = ours.mean() if of == "mean" else ours.recovered()
    xr.testing.assert_identical(interval.value.rename(None), value.rename(None))
    assert (interval.lo < value).all() and (value < interval.hi).all()
    assert interval.lo.dims == ("layer", "head") and interval.attrs["level"] == 0.95
    assert interval.identical(ours.ci(of=of, seed=3))
    assert not interval.lo.equals(ours.ci(of=of, seed=4).lo)
    wide, narrow = ours.ci(of=of, level=0.99), ours.ci(of=of, level=0.5)
    assert (wide.lo < narrow.lo).all() and (narrow.hi < wide.hi).all()


def test_recovered_is_paired():
    """An effect that is half of its total, prompt by prompt, is half of it without doubt."""
    total = np.random.default_rng(1).normal(4, 2, N)
    ours = scores(0.5 * total[:, None, None])
    ours = Scores(ours.data, "logits", ours.total.copy(data=total), ours.clusters, ATTRS)
    interval = ours.ci(of="recovered")
    np.testing.assert_allclose([interval.lo.item(), interval.hi.item()], 0.5)
    assert ours.ci().hi.item() - ours.ci().lo.item() > 0.1


def test_intervals_refuse_nonsense():
    with pytest.raises(ScoreError, match="expected of='mean' or of='recovered', got 'total'"):
        scores().ci(of="total")
    for level in (0, 1, 95):
        with pytest.raises(ScoreError, match="expected a level between 0 and 1"):
            scores().ci(level=level)


def test_significant():
    ours = scores()
    found = ours.significant()
    expected = np.array([[True, True, True], [True, False, True]])
    # 0.1 of a total of 4 is above the least share of .02, at .04 it is not
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        ours.significant(min_recovered=0.04), expected & (abs(ours.recovered()) >= 0.04)
    )
    assert not ours.significant(min_recovered=0.04)[0, 0]
    assert found.identical(ours.significant()) and found.attrs["fdr"] == 0.05
    assert scores(total=None).significant()[0, 0]  # no total: no share is asked for
    pvalues = ours.pvalues()
    assert pvalues.dims == ("layer", "head") and float(pvalues[1, 1]) > 0.05


def test_nothing_is_significant_in_zeros():
    ours = scores(np.zeros((N, 2, 3)))
    assert not ours.significant(min_recovered=0).any() and (ours.pvalues() == 1).all()


# --------------------------------------------------------------------------- looking at the cells


def test_top_keeps_the_sign():
    ours = scores()
    assert ours.top(3) == (Site(0, 1), Site(1, 0), Site(0, 2))
    assert float(ours.mean().sel(layer=0, head=1)) < -2.5
    assert len(ours.top(99)) == 6 and ours.top(0) == ()
    assert scores(at="query_is").top(1) == (Site(0, 1, "z", "query_is"),)


def test_top_takes_the_largest_over_other_axes():
    effects = np.zeros((N, 2, 3, 2))
    effects[:, 1, 2, 1] = -5
    effects[:, 0, 0, 0] = 4
    ours = scores(effects, dims=("layer", "head", "demo"))
    assert ours.top(2) == (Site(1, 2), Site(0, 0))
    with pytest.raises(ScoreError, match="top needs axes layer and head, these scores have"):
        scores(effects[:, :, :, 0], dims=("role", "site")).top()


def test_to_pandas():
    table = scores().to_pandas()
    assert list(table.columns) == ["layer", "head", "mean", "recovered"] and len(table) == 6
    row = table[(table["layer"] == 0) & (table["head"] == 1)].iloc[0]
    assert row["mean"] == pytest.approx(float(scores().mean()[0, 1]))
    assert row["recovered"] == pytest.approx(float(scores().recovered()[0, 1]))
    assert list(scores(total="unclear").to_pandas().columns) == ["layer", "head", "mean"]


def test_repr():
    text = repr(scores())
    assert text == "Scores(prompt 24, layer 2, head 3; logits; pairs answers denoise)"


def test_adding():
    ours = scores()
    both = ours + ours
    np.testing.assert_allclose(both.data, 2 * ours.data)
    assert both.unit == "logits" and both.total.identical(ours.total)
    for other, what in [
        (scores(unit="nats"), "unit cannot be added: 'logits' and 'nats'"),
        (scores(corruption="inputs"), "corruption cannot be added: 'answers' and 'inputs'"),
        (scores(direction="noise"), "direction cannot be added"),
        (scores(clusters=("a",) * N), "prompts cannot be added"),
        (scores(np.zeros((N, 2, 2))), "axes cannot be added"),
        (scores(np.zeros((N, 2, 3)), dims=("layer", "demo")), "axes cannot be added"),
    ]:
        with pytest.raises(ScoreError, match=what):
            ours + other
    with pytest.raises(TypeError):
        ours + 1


# ---------------------------------------------------------------------------------------- files


def test_load_gives_what_was_saved(tmp_path):
    sites = scores(np.random.default_rng(2).normal(size=(N, 2, 2)), dims=("part", "site"))
    names = {"part": ["both", "q"], "site": ["L0H1.z@answer", "L1H0.z@query_is"]}
    sites = Scores(sites.data.assign_coords(names), "nats", None, sites.clusters, ATTRS)
    single = scores(np.zeros((N, 2, 3), dtype=np.float32) + 1 / 3, clusters=("ü", *"b" * (N - 1)))
    for ours in (scores(), sites, single):
        ours.save(tmp_path / "scores.nc")
        back = Scores.load(tmp_path / "scores.nc")
        xr.testing.assert_identical(back.data, ours.data)
        assert back.data.dtype == ours.data.dtype and back.data.dims == ours.data.dims
        assert (back.unit, back.clusters, back.attrs) == (ours.unit, ours.clusters, ours.attrs)
        assert (back.total is None) == (ours.total is None)
        if ours.total is not None:
            xr.testing.assert_identical(back.total, ours.total)
            assert back.ci(of="recovered").identical(ours.ci(of="recovered"))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.nc"]


def test_equal_scores_are_equal_files(tmp_path):
    for name in ("a.nc", "b.nc"):
        scores().save(tmp_path / name)
    assert (tmp_path / "a.nc").read_bytes() == (tmp_path / "b.nc").read_bytes()
    scores(seed=1).save(tmp_path / "b.nc")  # and replaces what was there
    assert (tmp_path / "a.nc").read_bytes() != (tmp_path / "b.nc").read_bytes()
    assert Scores.load(str(tmp_path / "b.nc")).attrs["seed"] == 1


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "scores.nc"
    with pytest.raises(FileError, match=r"expected a .nc file, got .*there is no such file"):
        Scores.load(path)
    with pytest.raises(FileError, match="there is no such file"):
        Scores.load(tmp_path)
    scores().save(path)
    whole = path.read_bytes()
    for content in (b"", b"no netCDF", whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(FileError, match="is corrupt or no netCDF file") as caught:
            Scores.load(path)
        assert "\n" not in str(caught.value)
    save_groups({"/": xr.Dataset({"effect": ("prompt", [1.0])})}, path)
    with pytest.raises(FileError, match="scores.nc is no scores file of tv_interp"):
        Scores.load(path)
    wrong = scores().data.rename(head="heads").to_dataset(name="effect")
    wrong = wrong.assign_coords(cluster=("prompt", list(scores().clusters)))
    save_groups({"/": wrong.assign_attrs(tv_interp='{"unit": "logits", "attrs": {}}')}, path)
    with pytest.raises(FileError, match="no scores file of tv_interp: expected dims"):
        Scores.load(path)


def test_groups(tmp_path):
    path = tmp_path / "both.nc"
    save_groups({name: scores(at=name)._to_dataset() for name in ("answer", "query_is")}, path)
    assert Scores.load(path, "query_is").attrs["at"] == "query_is"
    with pytest.raises(FileError, match="both.nc is corrupt or no netCDF file"):
        Scores.load(path, "x")


def test_files_that_cannot_be_written(tmp_path):
    """As root every directory is writable, so the parent is a file, or is missing."""
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "scores.nc", tmp_path / "missing" / "scores.nc"):
        with pytest.raises(FileError, match="cannot write .*scores.nc: N"):
            scores().save(path)
    (tmp_path / "directory.nc").mkdir()
    with pytest.raises(FileError, match="cannot write .*directory.nc"):
        scores().save(tmp_path / "directory.nc")
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory.nc", "file"]


def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "scores.nc"
    scores().save(path)
    before = path.read_bytes()
    for error, raised in ((OSError(28, "No space left"), FileError), (RuntimeError, RuntimeError)):
        real = xr.Dataset.to_netcdf

        def fail(self, target, error=error, real=real, **settings):
            real(self, target, **settings)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(xr.Dataset, "to_netcdf", fail)
            with pytest.raises(raised):
                scores(seed=1).save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["scores.nc"]


def test_no_group_means_the_root(tmp_path):
    scores().save(tmp_path / "a.nc")
    assert "effect" in load_dataset(tmp_path / "a.nc")


# -------------------------------------------------------------------------------------- metrics


def test_metrics_by_name():
    assert get_metric("kl") is METRICS["kl"]
    own = Metric("mine", "logits", lambda logits, rows, targets: logits[:, 0], lambda vocab: None)
    assert get_metric(own) is own
    with pytest.raises(UnknownName, match="unknown metric 'logit-diff': did you mean 'logit_diff'"):
        get_metric("logit-diff")
