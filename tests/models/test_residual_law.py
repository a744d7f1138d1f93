"""The law of the residual against dense Gaussians: inverses, joint covariances, log densities.

Whatever is linear in the noise is proved by its covariance, which the units of white noise give
exactly: no random number is drawn for it.
"""

import hashlib
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from small import Asked, stirred
from torch import Tensor
from torch.distributions import MultivariateNormal

from mambaflow.config import ARCHITECTURES
from mambaflow.flow.samplers import SOLVERS, CountedVelocity, uniform_times
from mambaflow.models.random_field import PIXEL, TORUS, Correlation, RandomField
from mambaflow.models.residual_law import (
    LARGEST,
    NEAREST,
    NUGGET,
    ProcessStart,
    ResidualLaw,
    kriging,
    local_variances,
    stationary,
)
from mambaflow.models.velocity_field import ConditionedField, VelocityField

SMALL = replace(ARCHITECTURES["v2"], d_model=32, num_layers=4, num_heads=4, frequencies=8)
MODES = 16
STEP = TORUS / MODES
# Two steps of that torus: as fine to it as 2 pixels are to the grid of 32.
LAW = Correlation(*torch.tensor((2 * STEP, 1.7), dtype=torch.float64))
COVARIANCE = torch.tensor([[0.1, 0.06, 0.02], [0.06, 0.09, 0.05], [0.02, 0.05, 0.08]]).double()
FACTOR = torch.linalg.cholesky(COVARIANCE)
DENSITIES = [1, 7, 30]


def rand(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=draw, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def on_nodes(n: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Places of one image, whole steps apart from one another, none of them twice."""
    draw = torch.Generator().manual_seed(seed)
    side = torch.arange(int(1 / STEP) + 1).double() * STEP + shift
    nodes = torch.cartesian_prod(side, side)
    return nodes[torch.randperm(len(nodes), generator=draw)[:n]][None]


def start(known_xy: Tensor, query_xy: Tensor, b: int = 1) -> ProcessStart:
    """The law around any fill, with any amplitudes: functions of the place."""
    weights, left = kriging(LAW, known_xy, query_xy)
    fill = torch.sin(3 * query_xy.sum(-1, keepdim=True) + torch.arange(3))
    log_amplitude = torch.cos(5 * query_xy[..., :1])
    of = (fill, weights, left, log_amplitude)
    return ProcessStart(*(x.expand(b, -1, -1) for x in of), FACTOR)


def shared(start: ProcessStart, b: int) -> ProcessStart:
    """The same for b images."""
    names = ("fill", "weights", "left", "log_amplitude")
    return replace(start, **{name: getattr(start, name).expand(b, -1, -1) for name in names})


def units() -> Tensor:
    return torch.eye(MODES**2 * 3, dtype=torch.float64).view(-1, MODES, MODES, 3)


def draws_of_units(known_xy: Tensor, query_xy: Tensor) -> Tensor:
    """x_0 as `noise` makes it of every unit of white noise: (units, n, 3)."""
    b = MODES**2 * 3
    prior = stationary(units(), LAW, query_xy.expand(b, -1, -1), known_xy.expand(b, -1, -1))
    return start(known_xy, query_xy, b).noise(prior)


def covariance(of_units: Tensor) -> Tensor:
    """(3 n, 3 n), colours of a place beside one another."""
    flat = of_units.flatten(1)
    return flat.T @ flat


def conditioned(known_xy: Tensor, query_xy: Tensor, nugget: float) -> Tensor:
    """Rasmussen & Williams 2006, eq. 2.24, by an inverse: K_qq - K_qk (K_kk + nugget)^-1 K_kq."""
    among = LAW(known_xy, known_xy)[0] + nugget * torch.eye(known_xy.shape[1])
    across = LAW(known_xy, query_xy)[0]
    return LAW(query_xy, query_xy)[0] - across.T @ among.inverse() @ across


def coloured(field: Tensor, query_xy: Tensor) -> Tensor:
    """amplitude_i amplitude_j C_ij F F'."""
    amplitude = torch.cos(5 * query_xy[0, :, 0]).exp()
    return torch.kron(amplitude[:, None] * field * amplitude, COVARIANCE)


def blocks(matrix: Tensor) -> Tensor:
    """The 3 x 3 covariance of each place."""
    n = len(matrix) // 3
    return matrix.view(n, 3, n, 3).diagonal(dim1=0, dim2=2).movedim(-1, 0)


# --- Kriging ------------------------------------------------------------------------------------


def test_kriging_is_the_definition_with_inverses():
    known, query = rand(2, 20, 2), rand(2, 9, 2, seed=1)
    weights, left = kriging(LAW, known, query)
    for i in range(2):
        among = LAW(known, known)[i] + NUGGET * torch.eye(20)
        across = LAW(known, query)[i]
        expected = across.T @ among.inverse()
        torch.testing.assert_close(weights[i], expected, rtol=1e-8, atol=1e-8)
        still = 1 - (expected @ across).diagonal()
        torch.testing.assert_close(left[i, :, 0], still, rtol=1e-8, atol=1e-8)
    assert (left > 0).all() and (left < 1).all()


def test_single_precision_is_enough_for_kriging_among_neighbours():
    """A fifth of 32 x 32, at the longest and smoothest correlation that is ever fitted."""
    numbers = torch.tensor((8 * PIXEL, 1.95), dtype=torch.float64)
    longest, single = Correlation(*numbers), Correlation(*numbers.float())
    draw = torch.Generator().manual_seed(2)
    place = torch.randperm(1024, generator=draw)
    xy = (torch.stack((place % 32, place // 32), -1)[None] + 0.5) / 32
    found = kriging(single, xy[:, :204], xy[:, 204:])
    exact = kriging(longest, xy[:, :204].double(), xy[:, 204:].double())
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0, atol=1e-2)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=1e-4)


def test_nothing_is_left_of_the_field_at_a_known_pixel_and_all_far_from_any():
    known = rand(1, 20, 2) / 4
    weights, left = kriging(LAW, known, known)
    assert left.max() < 1.1 * NUGGET
    torch.testing.assert_close(weights[0], torch.eye(20).double(), rtol=0, atol=0.05)
    weights, left = kriging(LAW, known, torch.tensor([[[0.999, 0.999]]]).double())
    assert left.item() == pytest.approx(1, abs=1e-3) and weights.abs().max() < 0.05


# --- The noise ----------------------------------------------------------------------------------


def test_noise_on_nodes_has_the_covariance_of_the_definition():
    """Matheron's rule beside the inverse. Exactly, with the nugget taken in as the rule takes it:
    in the weights alone, since the field is drawn without one."""
    xy = on_nodes(50)
    known, query = xy[:, :20], xy[:, 20:]
    found = covariance(draws_of_units(known, query))
    weights = start(known, query).weights[0]
    rule = torch.cat((torch.eye(30).double(), -weights), 1)
    both = torch.cat((query, known), 1)
    exact = rule @ LAW(both, both)[0] @ rule.T
    torch.testing.assert_close(found, coloured(exact, query), rtol=0, atol=1e-9)
    ideal = coloured(conditioned(known, query, 0.0), query)
    torch.testing.assert_close(found, ideal, rtol=0, atol=NUGGET)


@pytest.mark.parametrize("where", ["random places", "a grid between the known pixels"])
def test_noise_at_any_places_has_the_covariance_of_the_definition(where):
    """To what the finest wave is short of: 4 % at a length of two of its steps."""
    known = on_nodes(20)
    side = (torch.arange(6).double() + 0.5) / 6
    query = rand(1, 40, 2) if where == "random places" else torch.cartesian_prod(side, side)[None]
    found = covariance(draws_of_units(known, query))
    ideal = coloured(conditioned(known, query, 0.0), query)
    assert (found - ideal).abs().max() < 0.04 * ideal.diagonal().max()


def test_noise_of_some_places_is_that_of_more_places_there():
    """Density does not matter: neither to the covariance nor to a draw."""
    known, query = rand(1, 15, 2), rand(1, 40, 2, seed=1)
    whole = draws_of_units(known, query)
    for some in (slice(0, 1), slice(5, 9), slice(0, 40, 3)):
        fewer = draws_of_units(known, query[:, some])
        torch.testing.assert_close(fewer, whole[:, some], rtol=0, atol=1e-10)


def test_noise_dies_down_at_a_known_pixel():
    known = rand(1, 15, 2)
    variance = blocks(covariance(draws_of_units(known, known)))
    assert variance.abs().max() < 1e-3 * COVARIANCE.max()


@pytest.mark.parametrize("n", DENSITIES)
def test_its_own_draws_have_an_excess_of_one(n):
    xy = on_nodes(20 + n)
    x = draws_of_units(xy[:, :20], xy[:, 20:])
    # The mean over units, times their number, is the mean over draws.
    given = start(xy[:, :20], xy[:, 20:], len(x))
    assert (given.excess(x) * len(x)).item() == pytest.approx(1, abs=1e-3)


# --- The exact answer ---------------------------------------------------------------------------


def joint(n: int) -> tuple[ProcessStart, Tensor]:
    """The law at n places, and its dense covariance."""
    known, query = rand(1, 15, 2), rand(1, n, 2, seed=1)
    return start(known, query), coloured(conditioned(known, query, NUGGET), query)


@pytest.mark.parametrize("n", DENSITIES)
@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.7, 0.999])
def test_the_velocity_is_that_of_the_dense_joint_gaussian(t, n):
    given, sigma = joint(n)
    x = randn(1, n, 3)
    velocity, _, size = given.enter(x, torch.tensor(t).double().view(1, 1, 1))
    # (x_1, x_t) with x_t = t x_1 + (1 - t) x_0, and x_0 drawn from the same law around 0.
    of_x_t = t**2 * sigma + (1 - t) ** 2 * sigma
    gain = t * sigma @ of_x_t.inverse()
    mean = given.fill.flatten() + gain @ (x - t * given.fill).flatten()
    expected = (mean.view(1, n, 3) - x) / (1 - t)
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
    # size (1 - t) F is the deviation of x_1 given x_t at each place.
    still = blocks(sigma - gain @ (t * sigma))
    found = ((1 - t) * size[0]).square()[..., None] * COVARIANCE
    torch.testing.assert_close(found, still, rtol=1e-5, atol=1e-8)
    axes = randn(1, n, 3, seed=5)
    torch.testing.assert_close(given.paint(axes), torch.einsum("cd,bnd->bnc", FACTOR, axes))


@pytest.mark.parametrize("n", DENSITIES)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_what_is_shown_has_variance_one_and_uncorrelated_colours_at_every_time(t, n):
    given, sigma = joint(n)
    root = torch.linalg.cholesky((t**2 + (1 - t) ** 2) * sigma)
    b = 3 * n
    x = t * given.fill + root.T.reshape(b, n, 3)
    time = torch.full((b, 1, 1), t, dtype=torch.float64)
    _, shown, _ = shared(given, b).enter(x, time)
    one = torch.eye(3).double().expand(n, 3, 3)
    torch.testing.assert_close(blocks(covariance(shown)), one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", DENSITIES)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_so_has_what_is_shown_of_drawn_noise_and_truth(t, n):
    """The same from two independent draws, as `noise` makes them: to the nugget."""
    xy = on_nodes(15 + n)
    known, query = xy[:, :15], xy[:, 15:]
    r = draws_of_units(known, query)
    given = start(known, query, 2 * len(r))
    x = t * given.fill + torch.cat((t * r, (1 - t) * r))  # units of x_1, and of x_0
    _, shown, _ = given.enter(x, torch.full((2 * len(r), 1, 1), t, dtype=torch.float64))
    one = torch.eye(3).double().expand(n, 3, 3)
    torch.testing.assert_close(blocks(covariance(shown)), one, rtol=0, atol=1e-3)


def test_the_end_is_regular():
    given, _ = joint(7)
    x = randn(1, 7, 3)
    at_end = given.enter(x, torch.ones(1, 1, 1).double())
    before = given.enter(x, torch.full((1, 1, 1), 1 - 1e-7).double())
    for one, other in zip(at_end, before, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # There x_t is x_1 itself, and the velocity what is common to all paths that end in it.
    torch.testing.assert_close(at_end[0], x)


def test_at_the_beginning_the_posterior_mean_is_the_fill_whatever_the_noise():
    given, _ = joint(7)
    for scale in (0.0, 1.0, 100.0):
        x = scale * randn(1, 7, 3)
        velocity, _, _ = given.enter(x, torch.zeros(1, 1, 1).double())
        torch.testing.assert_close(x + velocity, given.fill, rtol=0, atol=1e-12)


# --- What the law is trained by -----------------------------------------------------------------


def test_surprise_is_the_negative_log_density_less_a_constant():
    given, _ = joint(7)
    residual = randn(1, 7, 3)
    found = given.surprise(residual)[0, :, 0]
    variance = (given.left * (2 * given.log_amplitude).exp())[0, :, 0]
    normal = MultivariateNormal(torch.zeros(3).double(), variance[:, None, None] * COVARIANCE)
    expected = -normal.log_prob(residual[0]) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(found, expected)


def test_the_likelihood_trains_amplitude_and_colours_and_the_flow_neither():
    law = ResidualLaw(4).double()
    fill, left = randn(1, 7, 3).requires_grad_(), rand(1, 7, 1).requires_grad_()
    with torch.no_grad():
        law.amplitude.weight.add_(0.1)
    own = list(law.parameters())

    def given() -> ProcessStart:
        seen = law.log_amplitude(rand(1, 7, 5))
        return ProcessStart(fill, rand(1, 7, 4), left, seen, law.colours)

    residual = (randn(1, 7, 3) - fill).clone()
    given().surprise(residual).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in own)
    assert law.log_colours.grad.triu(1).count_nonzero() == 0
    assert fill.grad is None, "the fill is not moved to be less surprised"
    for p in own:
        p.grad = None
    start = given()
    velocity, shown, size = start.enter(start.noise(randn(1, 11, 3)), rand(1, 1, 1))
    (velocity + shown + start.paint(size * shown)).sum().backward()
    assert all(p.grad is None for p in own) and fill.grad.any()


def test_the_colours_are_a_factor_of_the_covariance_and_any_numbers_are_of_one():
    law = ResidualLaw(2).double()
    law.set(LAW, COVARIANCE)
    torch.testing.assert_close(law.colours @ law.colours.T, COVARIANCE)
    told = law.numbers()
    assert told["length"] == pytest.approx(2 * STEP / PIXEL) and told["exponent"] == 1.7
    variances = torch.linalg.eigvalsh(COVARIANCE).flip(0).tolist()
    assert [told[f"variance_{i}"] for i in (1, 2, 3)] == pytest.approx(variances)
    with torch.no_grad():
        law.log_colours.copy_(3 * randn(3, 3))
    assert torch.linalg.eigvalsh(law.colours @ law.colours.T).min() > 0
    assert not law.colours.triu(1).any()


# --- The amplitude ------------------------------------------------------------------------------


def test_a_local_variance_is_that_under_a_window_as_wide_as_the_nearest_are_far():
    known, rgb, query = rand(1, 20, 2), randn(1, 20, 3), rand(1, 5, 2, seed=1)
    unexplained = rand(1, 5, 4)
    found = local_variances(unexplained, known, rgb, query)
    torch.testing.assert_close(found[..., :4], unexplained)
    for i in range(5):
        squares = (known[0] - query[0, i]).square().sum(-1)
        width = max(squares.sort().values[:NEAREST].mean().item(), PIXEL**2)
        window = (-squares / width).exp()
        window = window / window.sum()
        mean = (window[:, None] * rgb[0]).sum(0)
        expected = (window[:, None] * (rgb[0] - mean).square()).sum()
        torch.testing.assert_close(found[0, i, 4], expected)


@pytest.mark.parametrize("known", [1, 3, 20])
def test_one_colour_everywhere_has_no_variance(known):
    rgb = torch.tensor([0.3, -0.7, 0.9]).double().expand(1, known, 3)
    seen = local_variances(rand(1, 5, 0), rand(1, known, 2), rgb, rand(1, 5, 2, seed=1))
    assert seen.abs().max() < 1e-12


def test_the_log_amplitude_is_bounded_whatever_is_seen_and_learned():
    law = ResidualLaw(4)
    with torch.no_grad():
        law.amplitude.weight.copy_(10 * randn(1, 10).float())
    seen = torch.tensor([-1e-3, 0, 1e-9, 1e-4, 1, 1e9, 3e38]).view(1, 7, 1).expand(1, 7, 5)
    found = law.log_amplitude(seen)
    assert found.isfinite().all() and found.abs().max() <= LARGEST
    assert torch.equal(ResidualLaw(4).log_amplitude(seen), torch.zeros(1, 7, 1))


def asked(b: int = 2, k: int = 20, n: int = 13) -> Asked:
    xy, rgb = rand(b, k + n, 2).float(), 2 * rand(b, k, 3, seed=1).float() - 1
    return Asked(xy[:, :k], rgb, xy[:, k:])


def law_at(model: VelocityField, given: Asked, query_xy: Tensor) -> ProcessStart:
    field = model.condition(Asked(given.known_xy, given.known_rgb, query_xy))
    assert isinstance(field.start, ProcessStart)
    return field.start


def test_the_law_at_a_place_is_of_the_known_pixels_whatever_else_is_asked():
    model, given = stirred(SMALL), asked()
    whole = law_at(model, given, given.query_xy)
    assert whole.log_amplitude.std() > 1e-3
    for some in (slice(0, 1), slice(4, 9)):
        part = law_at(model, given, given.query_xy[:, some])
        for name in ("fill", "weights", "left", "log_amplitude"):
            found, expected = getattr(part, name), getattr(whole, name)[:, some]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    brighter = replace_known(given, given.known_rgb * 0.5)
    assert not torch.equal(
        law_at(model, brighter, given.query_xy).log_amplitude, whole.log_amplitude
    )


def replace_known(given: Asked, rgb: Tensor) -> Asked:
    return Asked(given.known_xy, rgb, given.query_xy)


def test_the_law_changes_steadily_from_place_to_place():
    """Along a line across the image: a tenth of the step, a tenth of the largest change."""
    model, given = stirred(SMALL), asked(1)
    jumps: dict[str, list[float]] = {"log_amplitude": [], "left": [], "fill": []}
    for n in (200, 2000):
        line = torch.linspace(0.05, 0.95, n)
        start = law_at(model, given, torch.stack((line, 0.3 + 0.4 * line), -1)[None])
        for name, found in jumps.items():
            found.append(getattr(start, name).diff(dim=1).abs().max().item())
    for name, (coarse, fine) in jumps.items():
        assert fine < 0.2 * coarse, name


def test_the_fill_of_the_law_keeps_the_known_colours():
    """Kriging adds what the smooth fill misses: at a known pixel that is all, to the nugget."""
    model, given = stirred(SMALL), asked()
    at_known = law_at(model, given, given.known_xy)
    smooth = model.smooth(given.known_xy, given.known_rgb, given.known_xy).fill
    missed = (smooth - given.known_rgb).abs().max()
    assert (at_known.fill - given.known_rgb).abs().max() < 0.01 * missed


# --- What is refused ----------------------------------------------------------------------------

TAKES_NOISE = [s for s in SOLVERS.values() if s.name != "mean"]
REFUSAL = (
    r"noise \(of mean square [\d.e+]+ in units of its law\) must be a draw of this field's own law;"
    r" use field.noise\(torch.randn\), where field = model.condition\(batch\)"
)


def dense(start: str) -> ConditionedField:
    """A field of as many known pixels as a fifth of an image has."""
    torch.manual_seed(0)
    model = VelocityField(replace(SMALL, start=start)).eval()
    return model.condition(asked(k=204, n=100))


@pytest.mark.parametrize("solver", TAKES_NOISE, ids=lambda s: s.name)
def test_white_noise_is_refused_where_noise_has_a_law_of_its_own(solver):
    field, times = dense("process"), uniform_times(2)
    white = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    for velocity in (field, CountedVelocity(field)):
        with pytest.raises(ValueError, match=REFUSAL):
            solver(velocity, white, times)
    own = field.noise(seeded())
    assert solver(field, own, times, lambda step: torch.zeros(2, 100, 3)).isfinite().all()


def seeded(seed: int = 0):
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def test_a_mean_takes_any_noise():
    field = dense("process")
    white = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    found = SOLVERS["mean"](field, white, uniform_times(1))
    torch.testing.assert_close(found, field.start.fill, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", TAKES_NOISE, ids=lambda s: s.name)
def test_what_stands_on_the_path_is_no_noise_and_is_taken(solver):
    if solver.name == "exponential":
        pytest.skip("it begins at 0 alone")
    white = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.3, 0.6, 1.0])
    found = solver(dense("process"), white, times, lambda step: torch.zeros(2, 100, 3))
    assert found.isfinite().all()


@pytest.mark.parametrize("start", ["gaussian", "plain"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_other_fields_have_white_noise(solver, start):
    field = dense(start)
    white = field.noise(seeded())
    assert torch.equal(white, seeded()(2, 100, 3))
    assert solver(field, white, uniform_times(2), lambda step: white).isfinite().all()


# --- Checkpoints of before ----------------------------------------------------------------------

# Names and shapes of all tensors, as the version before the process start had them.
BEFORE = {
    "gaussian": (replace(SMALL, start="gaussian"), 129, "b587672e88109710"),
    "v1": (replace(ARCHITECTURES["v1"], d_model=32, num_layers=2, num_heads=4, frequencies=8),
           49, "5fb98af7719e59cb"),
    "one cross-attention": (
        replace(SMALL, start="gaussian", readout="cross_attention", modulation="add"),
        88, "4ff826f60c73c513"),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_models_of_before_have_the_tensors_that_their_checkpoints_hold(name):
    config, count, digest = BEFORE[name]
    told = sorted(f"{k} {tuple(v.shape)}" for k, v in VelocityField(config).state_dict().items())
    found = hashlib.sha256("\n".join(told).encode()).hexdigest()
    assert (len(told), found[:16]) == (count, digest)


def test_a_process_start_adds_the_law_and_takes_the_variance_away():
    process, gaussian = (
        set(VelocityField(replace(SMALL, start=start)).state_dict())
        for start in ("process", "gaussian")
    )
    assert gaussian - process == {"log_variance"}
    assert process - gaussian == {
        f"residual_law.{name}"
        for name in ("length", "exponent", "log_colours", "amplitude.weight", "amplitude.bias")
    }


def test_modes_of_the_noise_follow_the_finest_grid_asked_for():
    shapes = []

    def watched(*shape: int) -> Tensor:
        shapes.append(shape)
        return torch.zeros(shape)

    for n, finest in ((50, None), (1600, None), (50, 96)):
        model = VelocityField(SMALL)
        model.prior(asked(1, 20, n), watched, finest)
    sides = [RandomField.modes(size) for size in (32, 40, 96)]
    assert shapes == [(1, side, side, 3) for side in sides] and sides == [64, 80, 192]
