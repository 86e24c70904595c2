"""The numbers behind the figures of sketches are those of the definitions, and the figures draw them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pages import lines
from scipy.stats import spearmanr

from lorakit.studies import sketches

SIZES = (16, 64, 256)
H, V = 6, 40


@pytest.fixture(scope="module")
def batches() -> list[sketches.Batch]:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(V, H, generator=generator)
    found = []
    for _ in range(5):
        hidden = torch.randn(2, 7, H, generator=generator)
        labels = torch.randint(V, (2, 7), generator=generator)
        labels[0, 4:] = -100
        found.append((hidden, 2 * hidden @ head.T, labels))
    return found


@pytest.fixture(scope="module")
def cosines(batches) -> sketches.Sketched:
    return sketches.cosine_table(batches, SIZES, seeds=20)


def test_head_gradient_is_autograds(batches):
    hidden, _, labels = batches[0]
    head = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    logits = hidden.double() @ head.T
    F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), reduction="sum").backward()
    found = sketches.head_gradient((hidden, logits.detach(), labels))
    torch.testing.assert_close(found, head.grad.T, rtol=1e-8, atol=1e-8)


def test_cosines_are_of_all_pairs_and_their_error_is_under_the_bound(batches, cosines):
    exact = [sketches.head_gradient(batch).flatten() for batch in batches]
    expected = [float(F.cosine_similarity(a, b, dim=0)) for i, a in enumerate(exact) for b in exact[i + 1 :]]
    np.testing.assert_allclose(cosines.exact, expected, rtol=1e-9)
    assert {size: found.shape for size, found in cosines.sketched.items()} == dict.fromkeys(SIZES, (20, 10))
    table = sketches.error_table(cosines)
    for size, bound, error in table.itertuples():
        squares = [
            (found - exact) ** 2
            for row in cosines.sketched[size]
            for found, exact in zip(row, cosines.exact, strict=True)
        ]
        assert error == pytest.approx(np.mean(squares) ** 0.5)
        assert error < bound == pytest.approx((11 / size) ** 0.5)
    assert 2.5 < table["measured"][16] / table["measured"][256] < 6.5  # √16, give or take


def test_figures_of_cosines_draw_their_tables(cosines):
    figure, table = sketches.sketch_error(cosines), sketches.error_table(cosines)
    for name, values in table.items():
        np.testing.assert_allclose(lines(figure.axes[0])[name], [*values.items()])
    left, right = sketches.agreement(cosines, 64).axes
    drawn = left.collections[0].get_offsets()
    np.testing.assert_allclose(drawn, np.stack([cosines.exact, cosines.sketched[64][0]], axis=1))
    ranks = {m: [spearmanr(row, cosines.exact).statistic for row in rows] for m, rows in cosines.sketched.items()}
    assert cosines.ranks()["Spearman"].tolist() == pytest.approx(sum(ranks.values(), []))
    np.testing.assert_allclose(right.lines[0].get_xydata(), [(m, np.mean(values)) for m, values in ranks.items()])
    band = right.collections[0].get_paths()[0].vertices
    assert {*band[:, 1].round(9)} == {round(pick(values), 9) for values in ranks.values() for pick in (min, max)}


def test_sparse_errors_are_of_the_gradient_and_each_shortcut_costs(batches):
    topks = (2, 8, V)
    table = sketches.sparse_table(batches, topks)
    whole, no_label, subset = (values.tolist() for _, values in table.items())
    assert whole[0] > whole[1] > whole[2] and max(whole[2], no_label[2], subset[2]) < 1e-10
    assert all(worse > best for worse, best in zip(no_label[:2] + subset[:2], whole[:2] * 2, strict=True))
    figure = sketches.sparse_errors(table)
    for name, errors in table.items():
        np.testing.assert_allclose(lines(figure.axes[0])[name], list(zip(topks, errors, strict=True)))


def test_sparse_error_of_one_batch_by_hand(batches):
    (hidden, logits, labels), topk = batches[0], 3
    exact = found = no_label = 0
    for b in range(2):
        for t in range(6):
            if labels[b, t + 1] == -100:
                continue
            y, h = int(labels[b, t + 1]), hidden[b, t].double()
            e = logits[b, t].double().softmax(0)
            e[y] -= 1
            kept = set(logits[b, t].topk(topk).indices.tolist())
            part = torch.zeros(V, dtype=torch.float64)
            part[list(kept)] = e[list(kept)]
            exact, no_label = exact + torch.outer(h, e), no_label + torch.outer(h, part)
            part[y] = e[y]
            found = found + torch.outer(h, part)
    table = sketches.sparse_table(batches[:1], [topk])
    expected = [float((way - exact).norm() / exact.norm()) for way in (found, no_label)]
    assert table.iloc[0].tolist()[:2] == pytest.approx(expected)


@pytest.fixture(scope="module")
def stream() -> torch.Tensor:
    return sketches.drifting_stream(200, 20, 3, 0.15, torch.Generator().manual_seed(0))


def test_stream_has_energy_one_and_most_of_it_in_few_directions(stream):
    assert stream.shape == (200, 20)
    assert float(stream.square().sum(1).mean()) == pytest.approx(1, abs=0.2)
    still = sketches.drifting_stream(200, 20, 3, 0.0, torch.Generator().manual_seed(0))
    energy = torch.linalg.svdvals(still) ** 2
    assert float(energy[:3].sum() / energy.sum()) == pytest.approx(0.9, abs=0.04)


def test_captured_energy_is_a_share_of_the_next_row(stream):
    table = sketches.captured_table(stream, 3, 8, 0.95)
    past, frequent, decayed, first = (values.to_numpy() for _, values in table.items())
    assert len(table) == 200 and (table.iloc[0] == 0).all()
    for n in (2, 50, 199):
        row = stream[n] / stream[n].norm()
        V_past = torch.linalg.svd(stream[:n], full_matrices=False).Vh[:3]
        assert past[n] == pytest.approx(float((V_past @ row).square().sum()), rel=1e-3)
        frame = torch.linalg.qr(stream[: min(n, 3)].T).Q
        assert first[n] == pytest.approx(float((row @ frame).square().sum()), rel=1e-4)
    assert decayed[100:].mean() > frequent[100:].mean() + 0.1 > first[100:].mean() + 0.1
    figure = sketches.captured_energy(table, 50)
    for name, values in table.items():
        drawn = lines(figure.axes[0])[name]
        assert drawn[:, 0].tolist() == list(range(50, 201))
        ends = [values.iloc[:50].mean(), values.iloc[-50:].mean()]
        assert drawn[[0, -1], 1].tolist() == pytest.approx(ends)


def test_spectrum_is_of_stream_and_sketch_and_bounds_hold(stream):
    spectra = sketches.spectrum_table(stream, 8)
    energy = np.linalg.svd(stream.double().numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(spectra.stream, energy / energy.sum())
    assert len(spectra.sketch) == len(spectra.bounds) == 8
    assert (spectra.sketch <= spectra.stream[:8] + 1e-12).all()
    np.testing.assert_allclose(spectra.bounds, [energy[k:].sum() / energy.sum() / (8 - k) for k in range(8)])
    assert 0 < spectra.error <= spectra.bounds.min()
    left, right = sketches.spectrum(spectra).axes
    np.testing.assert_allclose(lines(left)["sketch"][:, 1], spectra.sketch)
    np.testing.assert_allclose(lines(right)["bound by k"][:, 1], spectra.bounds)
    assert lines(right)["measured"][0, 1] == pytest.approx(spectra.error)
