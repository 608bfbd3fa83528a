"""Start values: distributions, the two rules, data starts, and that nothing but the key decides them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from oracles import dense

import tnpeft
from tnpeft.layout import Layout, layout
from tnpeft.networks import Factorization, NetworkError, Site
from tnpeft.nn.init.initializer import Initializer, factor_hash
from tnpeft.nn.init.philox import _log, normal, orthonormal, uniform, words
from tnpeft.scaling.starts import Spec, fans

LORA = "B[layer proj out r] A[layer proj r inp] -> layer proj out inp"
CP = (
    "w[layer proj r] A[layer proj o1 r] B[layer proj o2 r] C[layer proj i1 r] D[layer proj i2 r]"
    " -> layer proj (o1 o2) (i1 i2)"
)


def place(
    line: str, *, layers: int = 1, out: int = 64, inp: int = 64, projs: tuple[str, ...] = ("q_proj",), **fields
) -> Layout:
    sites = [Site(k, proj, out, inp, 4) for k in range(layers) for proj in projs]
    return layout(Factorization.of(line, **fields), sites)


def starts(placed: Layout, seed: int = 0, weight=None) -> dict[str, torch.Tensor]:
    """Start values by label: layouts of one site, or of factors that are all shared."""
    starter = Initializer(placed, seed, weight)
    return {piece.label: starter(piece) for piece in placed.parameters}


def update(placed: Layout, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The update of the first site."""
    return dense(placed.site_layouts[0].network, values)


# ---- random numbers


def test_uniform_and_normal_have_their_moments_and_tails():
    count = 400_000
    u, z = uniform(count, 1, "A"), normal(count, 1, "A")
    standard_error = 1 / np.sqrt(count)
    assert abs(u.mean()) < 5 * standard_error
    assert abs(u.var() - 1 / 3) < 5 * standard_error
    assert abs(z.mean()) < 5 * standard_error
    assert abs(z.var() - 1) < 5 * np.sqrt(2) * standard_error
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96) * standard_error
    for limit, share in ((1.0, 0.3173105), (2.0, 0.0455003), (3.0, 0.0026998)):
        assert abs((abs(z) > limit).mean() - share) < 5 * np.sqrt(share / count)


def test_numbers_are_pinned():
    assert words(1, 0, "A", None, None).tolist() == [13488255735677828656]
    assert normal(3, 0, "A").tolist() == [-0.8298166988091423, 0.763387348975117, 0.24010528108930834]


def test_a_frozen_factor_beside_an_array_is_pinned():
    """Its spread is worked out in double precision: folders hold its hash."""
    line = "B[out r] ^m[r] ~A[r inp] -> out inp"
    f = Factorization.of(line, ranks={"r": 3}, init={"m": [1.0, 0.0, 2.0]})
    starter = Initializer(layout(f, [Site(0, "q_proj", 4, 8)]))
    hashes = {param.label: factor_hash(starter(param)) for param in starter.layout.parameters}
    assert hashes["A"] == "adc48b47b9a8e3ed"


def test_a_longer_draw_begins_with_a_shorter_one():
    for count in (0, 1, 2, 17, 1000):
        assert (normal(count, 3, "B") == normal(5000, 3, "B")[:count]).all()


def test_keys_do_not_run_into_each_other():
    keys = [(0, "A1", None), (0, "A", 1), (0, "A", "1"), ("0", "A", 1), (1, "A", None), (0, "A", None)]
    assert len({words(1, *key).item() for key in keys}) == len(keys)


def test_the_logarithm_behind_the_normals_is_good_to_a_few_ulp():
    x = np.abs(uniform(20_000, 0, "x"))
    assert np.all(np.abs(_log(x) - np.log(x)) <= 4 * np.finfo(float).eps * np.maximum(1, np.abs(np.log(x))))


@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (5, 5), (40, 7), (3, 9)])
def test_orthonormal(shape):
    q = orthonormal(normal(shape[0] * shape[1], 0, "Q").reshape(shape))
    gram = q @ q.T if shape[0] < shape[1] else q.T @ q
    assert np.abs(gram - np.eye(min(shape))).max() < 16 * max(shape) * np.finfo(float).eps


def test_values_are_the_same_in_another_process_and_in_any_order():
    placed = place(LORA, layers=3, projs=("q_proj", "v_proj"), ranks={"r": 2}, init={"B": "normal", "A": "kaiming"})
    starter = Initializer(placed, 7)
    here = {(p.label, p.layer, p.proj): factor_hash(starter(p)) for p in placed.parameters}
    again = Initializer(placed, 7)
    assert {(p.label, p.layer, p.proj): factor_hash(again(p)) for p in reversed(placed.parameters)} == here
    assert len(set(here.values())) == len(here)
    code = (
        "from tnpeft.layout import layout\nfrom tnpeft.networks import Factorization, Site\n"
        "from tnpeft.nn.init.initializer import Initializer, factor_hash\n"
        f"f = Factorization.of({LORA!r}, ranks={{'r': 2}}, init={{'B': 'normal', 'A': 'kaiming'}})\n"
        "placed = layout(f, [Site(2, 'v_proj', 64, 64, 4)])\n"
        "print(*[factor_hash(Initializer(placed, 7)(p)) for p in placed.parameters])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [here["B", 2, "v_proj"], here["A", 2, "v_proj"]]


# ---- named starts


def test_kaiming_is_the_law_of_lora():
    a = starts(place(LORA, inp=256, ranks={"r": 64}, init={"A": "kaiming"}))["A"]
    bound = 1 / 16
    assert a.abs().max() <= bound
    assert abs(a.var() / (bound**2 / 3) - 1) < 5 * np.sqrt(0.8 / a.numel())


def test_xavier_has_the_bound_of_torch_on_c3a():
    line = "K[layer proj o1 i1 c] ^Circ[o2 i2 c] -> layer proj (o1 o2) (i1 i2)"
    placed = place(line, ranks={"c": 16}, splits={"out": (None, "c"), "inp": (None, "c")}, init={"Circ": "circulant"})
    site_layout = placed.site_layouts[0]
    assert fans(
        site_layout.parameters["K"].indices, site_layout.network, site_layout.sizes
    ) == torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(4, 4, 16))


def test_circulant_multiplies_like_a_circular_correlation():
    line = "K[c] ^Circ[out inp c] -> out inp"
    placed = place(line, out=8, inp=8, ranks={"c": 8}, init={"Circ": "circulant", "K": "normal"})
    values = starts(placed)
    dense = update(placed, values)
    for row in range(8):
        assert torch.equal(dense[row], values["K"].double().roll(row))


@pytest.mark.parametrize(
    ("line", "axes"), [("B[out r] ^A[r inp] -> out inp", 1), ("^B[out r] A[r inp] -> out inp", 0)]
)
def test_dct_is_orthonormal_and_scipys(line, axes):
    fft = pytest.importorskip("scipy.fft")
    name = "AB"[axes == 0]
    value = starts(place(line, out=12, inp=12, ranks={"r": 5}, init={name: "dct"}))[name].double().numpy()
    value = value if axes else value.T
    assert np.allclose(value, fft.dct(np.eye(12), norm="ortho", axis=0)[:5], atol=1e-6)


def test_dct_over_depth_repeats_frequencies_above_the_number_of_layers():
    placed = place("A[out a] ^u[layer a] B[a inp] -> layer out inp", layers=4, ranks={"a": 6}, init={"u": "dct"})
    starter = Initializer(placed)
    u = torch.stack([starter(p) for p in placed.parameters if p.label == "u"])
    assert torch.allclose(u[:, :4].T @ u[:, :4], torch.eye(4), atol=1e-6)
    assert torch.equal(u[:, 4:], u[:, :2])


def test_orthogonal_columns_and_rows():
    values = starts(
        place(
            "B[out r] M[r s] A[s inp] -> out inp",
            ranks={"r": 5, "s": 7},
            init={"B": "orthogonal", "M": "orthogonal", "A": "orthogonal"},
        )
    )
    assert torch.allclose(values["B"].T @ values["B"], torch.eye(5), atol=1e-6)
    assert torch.allclose(values["M"] @ values["M"].T, torch.eye(5), atol=1e-6)
    assert torch.allclose(values["A"] @ values["A"].T, torch.eye(7), atol=1e-6)


@pytest.mark.parametrize("init", ["orthogonal", "eye"])
def test_a_vector_per_layer_is_a_row_of_one_matrix(init):
    placed = place("B[out r] P[layer r] A[r inp] -> layer out inp", layers=6, ranks={"r": 3}, init={"P": init})
    starter = Initializer(placed)
    matrix = torch.stack([starter(p) for p in placed.parameters if p.label == "P"])
    assert matrix.shape == (6, 3)
    assert torch.allclose(matrix.T @ matrix, torch.eye(3), atol=1e-6)


def test_constants():
    placed = place("a[out] b[inp] c[out] -> out inp", init={"a": "ones", "b": "constant(-2.5)", "c": "uniform(0.5)"})
    values = starts(placed)
    assert values["a"].eq(1).all()
    assert values["b"].eq(-2.5).all()
    assert 0.4 < values["c"].abs().max() <= 0.5


@pytest.mark.parametrize(
    "bad", ["gauss", "normal(a)", "normal(1, 2)", "constant", "zeros(1)", "normal(inf)", "", "normal(1"]
)
def test_an_unknown_start_is_refused(bad):
    with pytest.raises(NetworkError, match="'A' cannot start as"):
        Initializer(place(LORA, ranks={"r": 2}, init={"A": bad}))


def test_a_spec_reads_blanks_and_exponents():
    assert Spec.parse(" normal( 1e-5 ) ") == Spec("normal", (1e-5,))


@pytest.mark.parametrize("init", ["normal(0.1)", "kaiming", "orthogonal", "eye", None])
def test_a_replica_starts_as_a_run_of_the_next_seed(init):
    one = "B[layer proj out r] A[layer proj r inp] w[r] -> layer proj out inp"
    many = "B[layer proj out replica r] A[layer proj r inp] w[replica r] -> replica layer proj out inp"
    f = [
        Factorization.of(line, ranks={"r": 4}, init={"A": "zeros", **({"B": init} if init else {})})
        for line in (one, many)
    ]
    site = [Site(0, "q_proj", 16, 8)]
    alone, stacked = layout(f[0], site), layout(f[1], site, stack={"replica": 3})
    values = starts(stacked, 5)
    for k in range(3):
        expected = starts(alone, 5 + k)
        assert torch.equal(values["B"][:, k], expected["B"])
        assert torch.equal(values["w"][k], expected["w"])


def test_tasks_are_drawn_apart():
    f = Factorization.of(
        "U[out a] S[task a b] V[b inp] -> task out inp", ranks={"a": 4, "b": 4}, init={"S": "orthogonal"}
    )
    s = starts(layout(f, [Site(0, "q_proj", 16, 8)], stack={"task": 3}))["S"]
    assert torch.allclose(s @ s.mT, torch.eye(4).expand(3, 4, 4), atol=1e-6)
    assert not torch.allclose(s[0], s[1])


# ---- arrays


def test_an_array_of_a_pieces_shape_serves_all_and_a_stacked_one_is_taken_apart():
    stacked = torch.arange(2 * 2 * 3 * 64.0).reshape(2, 2, 3, 64)
    placed = place(
        LORA,
        layers=2,
        projs=("v_proj", "q_proj"),
        ranks={"r": 3},
        init={"A": stacked.numpy(), "B": np.ones((64, 3)).tolist()},
    )
    starter = Initializer(placed)
    for piece in placed.parameters:
        if piece.label == "B":
            assert starter(piece).eq(1).all()
        else:
            proj = ("q_proj", "v_proj").index(piece.proj)
            assert torch.equal(starter(piece), stacked[piece.layer, proj])


def test_an_array_is_copied_and_checked():
    given = torch.ones(2, 64)
    placed = place("B[out r] A[r inp] -> out inp", ranks={"r": 2}, init={"A": given})
    starter = Initializer(placed)
    value = starter(placed.site_layouts[0].parameters["A"])
    given.zero_()
    value.add_(1)
    assert starter(placed.site_layouts[0].parameters["A"]).eq(1).all()
    for wrong, text in (
        (torch.ones(64, 2), r"shape \(64, 2\)"),
        ([[1.0], [1.0, 2.0]], "cannot start so"),
        ([[float("nan")]], "not finite"),
    ):
        with pytest.raises(NetworkError, match=text):
            starts(place("B[out r] A[r inp] -> out inp", ranks={"r": 2}, init={"A": wrong}))


# ---- from the base weight


@pytest.fixture
def weight():
    return torch.from_numpy(normal(64 * 48, 0, "weight").reshape(64, 48)).float()


def test_svd_multiplies_to_the_best_approximation(weight):
    line = "^U[layer proj out a] R[layer proj a b] ^V[layer proj b inp] -> layer proj out inp"
    fields = {"ranks": {"a": 6, "b": 6}, "init": {"U": "svd", "V": "svd", "R": "eye"}}
    placed = place(line, inp=48, **fields)
    got = update(placed, starts(placed, weight=lambda site: weight))
    tail = torch.linalg.svdvals(weight.double())[6:]
    assert torch.isclose((got - weight).norm(), tail.norm(), rtol=1e-5)


def test_svd_on_split_rows_and_with_powers(weight):
    line = "B[r o1 layer o2] A[i1 i2 layer r] -> layer (o1 o2) (i1 i2)"
    placed = place(line, inp=48, ranks={"r": 48}, init={"B": "svd(0.5)", "A": "svd(0.5)"})
    values = starts(placed, weight=lambda site: weight)
    assert torch.allclose(update(placed, values).float(), weight, atol=1e-4)
    norms = values["B"].flatten(1).norm(dim=1), values["A"].reshape(-1, 48).norm(dim=0)
    assert torch.allclose(*norms, rtol=1e-4)


def test_base_and_its_axes(weight):
    placed = place(
        "^W[i1 layer o1 proj i2] d[layer o1] -> layer proj o1 (i1 i2)", inp=48, init={"W": "base", "d": "ones"}
    )
    assert torch.equal(update(placed, starts(placed, weight=lambda site: weight)).float(), weight)


def test_tt_svd_is_exact_at_full_rank_and_twins_cancel(weight):
    line = "g[layer o1 i1 a] h[layer b o2 a i2] k[layer b o3 i3]"
    line += " - ~g[layer o1 i1 a] ~h[layer b o2 a i2] ~k[layer b o3 i3] -> layer (o1 o2 o3) (i1 i2 i3)"
    placed = place(line, inp=48, ranks={"a": 12, "b": 16}, init=dict.fromkeys("ghk", "tt_svd"))
    values = starts(placed, weight=lambda site: weight)
    assert update(placed, values).abs().max() == 0
    zeroed = {name: value * (0 if name.startswith("~") else 1) for name, value in values.items()}
    assert torch.allclose(update(placed, zeroed).float(), weight, atol=1e-4)


def test_starts_from_the_weight_ask_for_it_and_for_one_site(weight):
    with pytest.raises(NetworkError, match="needs the base weight"):
        starts(place("^W[layer out inp] d[out] -> layer out inp", init={"W": "base"}))
    shared = place("^W[out inp] d[layer out] -> layer out inp", layers=2, inp=48, init={"W": "base"})
    with pytest.raises(NetworkError, match="serves 2 sites"):
        starts(shared, weight=lambda site: weight)


# ---- the two rules

NETWORKS = {
    "lora": (LORA, {"r": 8}, {}),
    "cp": (CP, {"r": 21}, {}),
    "tucker": ("G[a b c] U[out a] V[inp b] P[layer c] -> layer out inp", {"a": 6, "b": 5, "c": 3}, {}),
    "tt": ("g1[o1 a] g2[a o2 b] g3[b i1 c] g4[c i2] -> (o1 o2) (i1 i2)", {"a": 4, "b": 9, "c": 4}, {}),
    "ring": ("g1[z o1 a] g2[a o2 b] g3[b i1 c] g4[c i2 z] -> (o1 o2) (i1 i2)", {"a": 4, "b": 5, "c": 4, "z": 3}, {}),
    "loha": ("B1[out r] A1[r inp] B2[out s] A2[s inp] -> out inp", {"r": 6, "s": 5}, {}),
    "vera": ("b[out] ~B[out r] d[r] ~A[r inp] -> out inp", {"r": 32}, {"d": "constant(0.1)", "B": "kaiming"}),
    "named": ("B[out r] M[r s] A[s inp] -> out inp", {"r": 12, "s": 16}, {"A": "orthogonal"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_variance_rule(name):
    """With unit entries in the zero factor, one output of a unit-variance input has variance one, over many draws."""
    line, ranks, init = NETWORKS[name]
    placed = place(line, ranks=ranks, init=init)
    net = placed.site_layouts[0].network
    open_ = [f for f in net.factors if f.kind == "trainable" and net.label(f) not in init]
    zero = next(net.label(f) for f in open_ if {*f.indices} & {*net.rows, *net.cols})  # a core has few directions
    assert Initializer(placed).zeros == {zero}
    squares = []
    for seed in range(60):
        values = starts(placed, seed)
        assert update(placed, values).abs().max() == 0
        values[zero] = torch.from_numpy(normal(values[zero].numel(), seed, "test").reshape(values[zero].shape))
        squares.append(update(placed, values).square().mean().item())
    mean, error = np.mean(squares), np.std(squares) / np.sqrt(len(squares))
    assert abs(mean - 1 / 64) < 5 * error


@pytest.mark.parametrize("name", NETWORKS)
def test_one_zero_factor_takes_the_whole_first_gradient(name):
    line, ranks, init = NETWORKS[name]
    placed = place(line, ranks=ranks, init=init)
    values = {label: value.double().requires_grad_() for label, value in starts(placed).items()}
    target = torch.from_numpy(normal(64 * 64, 0, "target").reshape(64, 64))
    (update(placed, values) * target).sum().backward()
    (zero,) = Initializer(placed).zeros
    for label, value in values.items():
        assert bool(value.grad.any()) == (label == zero)


def test_a_term_without_a_zero_factor_has_entries_of_the_target_size():
    placed = place("B[out r] A[r inp] - ~B[out r] ~A[r inp] -> out inp", ranks={"r": 8})
    starter = Initializer(placed)
    assert starter.zeros == frozenset()
    values = starts(placed)
    assert update(placed, values).abs().max() == 0
    assert torch.equal(values["A"], values["~A"])
    assert abs((values["B"] @ values["A"]).square().mean() * 64 - 1) < 0.25


def test_the_zero_of_one_term_serves_another_and_never_two_in_one():
    shared = place("B[out r] A[r inp] + C[out s] B[out r] D[s r inp] -> out inp", ranks={"r": 2, "s": 2})
    assert Initializer(shared).zeros == {"B"}
    crossing = place(
        "A[out r] B[r inp] + C[out s] D[s inp] + B[r inp] E[out r] -> out inp",
        ranks={"r": 2, "s": 2},
        init={"B": "zeros"},
    )
    assert Initializer(crossing).zeros == {"B", "C"}


@pytest.mark.parametrize("start", ["normal(1e39)", "constant(1e39)", "uniform(1e300)", [[1e39] * 64] * 2])
def test_a_start_that_overflows_is_refused(start):
    with pytest.raises(NetworkError, match="start of factor 'A' is not finite"):
        starts(place(LORA, ranks={"r": 2}, init={"A": start}))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("start", ["svd", "svd_minor"])
def test_no_factor_starts_from_a_base_weight_that_is_not_finite(start, number):
    weight = torch.ones(64, 64)
    weight[3, 5] = number
    with pytest.raises(NetworkError, match="base weight of q_proj is not finite"):
        starts(place(LORA, ranks={"r": 2}, init={"A": start}), weight=lambda site: weight)


def test_tied_factors_do_not_start_at_zero():
    placed = place("A[out r] A[inp r] -> out inp", ranks={"r": 8})
    assert Initializer(placed).zeros == frozenset()
    assert abs(update(placed, starts(placed)).fill_diagonal_(0).square().mean() * 64 - 1) < 0.3


def test_dead_starts_are_refused():
    arrays = {"A": np.zeros((2, 64)), "B": "zeros"}
    with pytest.raises(NetworkError, match="both start at zero"):
        Initializer(place(LORA, ranks={"r": 2}, init=arrays))
    with pytest.raises(NetworkError, match="stays zero for ever"):
        Initializer(place("b[out] ^C[out inp] -> out inp", init={"C": "constant(0)"}))
    with pytest.raises(NetworkError, match="the constant m is zero"):  # in fp32, which is what is stored
        starts(place("B[out r] ^m[r] ~A[r inp] -> out inp", ranks={"r": 3}, init={"m": [1e-60] * 3}))
    with pytest.raises(NetworkError, match="B is to have columns of unit norm, and starts at zero"):
        Initializer(place(LORA, ranks={"r": 2}, init={"A": "normal(1)"}, unit_norm=("B",)))
    assert Initializer(place(LORA, ranks={"r": 2}, unit_norm=("B",))).zeros == {"A"}
    with pytest.raises(NetworkError, match="repeats the start"):
        Initializer(place("B[out inp] - ~B[out inp] -> out inp", init={"~B": "ones"}))


def test_a_shared_factor_asks_for_the_smallest_of_its_sites():
    f = Factorization.of(
        "B[layer proj out r] M[r s] A[layer proj s inp] -> layer proj out inp", ranks={"r": 8, "s": 8}
    )
    sites = [Site(0, "q_proj", 64, 64), Site(0, "fc2", 64, 256)]
    both, alone = layout(f, sites), layout(f, sites[1:])
    shared = [next(p for p in x.parameters if p.label == "M") for x in (both, alone)]
    assert torch.equal(Initializer(both)(shared[0]), Initializer(alone)(shared[1]))


def test_the_hash_tells_values_and_shapes_apart():
    x = torch.arange(6.0)
    hashes = {factor_hash(t) for t in (x, x + 1, x.reshape(2, 3), x.reshape(3, 2), x.reshape(3, 2).T.contiguous())}
    assert len(hashes) == 5
    assert factor_hash(x.reshape(2, 3).T) == factor_hash(x.reshape(2, 3).T.contiguous())
    assert factor_hash(x.to(torch.bfloat16)) == factor_hash(x)


@pytest.mark.parametrize("value", [None, [[1.0, 0.0], [0.0, 2.0]], "numpy", "torch", "eye"])
def test_a_constant_is_data(value):
    """Without a value it is refused by name; a list, an array and a tensor are one and the same."""
    line, held = "B[out r] ^S[r k] A[k inp] -> out inp", [[1.0, 0.0], [0.0, 2.0]]
    value = {"numpy": np.array(held), "torch": torch.tensor(held)}.get(str(value), value)
    init = {} if value is None else {"S": value}
    if value is None:
        with pytest.raises(tnpeft.NetworkError, match="the constant 'S' has no value") as caught:
            Initializer(place(line, ranks={"r": 2, "k": 2}, init=init))
        assert caught.value.position == line.index("^S")
        return
    placed = place(line, ranks={"r": 2, "k": 2}, init=init)
    (param,) = (param for param in placed.parameters if param.label == "S")
    assert Initializer(placed)(param).tolist() == (held if not isinstance(value, str) else torch.eye(2).tolist())
