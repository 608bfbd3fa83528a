"""Every family: its line, its formula, its sizes, its start, and its meaning against an independent construction."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import product as pairs
from math import ceil, prod
from typing import Any

import numpy as np
import pytest
import sympy
from oracles import dense

from tnpeft import families
from tnpeft.counting import parameters
from tnpeft.families.tuckers import MODES
from tnpeft.layout import layout
from tnpeft.networks import Factorization, Network, NetworkError, Site, network

NAMED = """
lora cp lorta tenslora tera lotr tensor_guide lotra refta ia3 tucker tensor_train tt_matrix tensor_ring block_term
hierarchical_tucker lora_fa vera lokr krona loha hira lora_xs moslora randlora nola gralora miss c3a monarch fact_tt
fact_tk loretta tt_lora metatt_4d metatt_5d quanta cara dota kradapter shared_outer_lora bd_lora mica glora svft
melora rasa tied_lora abba stella tuka lora_edge pera expert_lora expert_cp expert_tucker
"""
NOT_ZERO = {"lora_xs", "c3a", "tt_lora", "stella"}
STACKED = {"lotra": "basis", "tuka": "scene"}  # with stack indices that no model has
IN_MODELS = [name for name in families.names() if name not in STACKED]


def sizes_of(f: Factorization, line_number: int = 0, out: int = 64, inp: int = 64) -> dict[str, int]:
    stack = {"layer": 2, "proj": 3, "basis": 5, "expert": 4, "scene": 3, "env": 2}
    return dict(f.sizes({**stack, "out": out, "inp": inp, "heads": 4}, line=f.lines[line_number]))


def arrays(net: Network, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {net.label(f): rng.standard_normal([sizes[i] for i in f.indices]) for f in net.factors}


def dense_of(f: Factorization, seed: int = 0, **given: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    sizes = dict(f.sizes({"layer": 1, "proj": 1, **given}))
    factors = arrays(f.network, sizes, seed)
    update = dense(f.network, factors)
    return update.reshape(update.shape[-2:]), {name: np.squeeze(a) for name, a in factors.items()}


# ---- the catalogue


def test_every_named_family_is_there() -> None:
    assert set(NAMED.split()) <= set(families.names())
    assert list(families.names()) == sorted(families.names())
    assert all(getattr(families, name) is families.get(name) for name in families.names())


def test_an_unknown_family_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(NetworkError, match="did you mean 'lora'"):
        families.get("loraa")
    with pytest.raises(NetworkError, match="the families are abba"):
        families.get("????")
    with pytest.raises(AttributeError, match="lists all"):
        _ = families.loraa


def test_a_new_family_is_a_function_and_nothing_else() -> None:
    def mine(rank: int = 2) -> Factorization:
        return Factorization.of("A[out r] B[r inp] -> out inp", name="mine", ranks={"r": rank})

    try:
        assert families.family(mine) is families.mine
        assert families.mine(3).ranks == {"r": 3}
        assert "mine" in families.names()
    finally:
        families.FAMILIES.pop("mine")


def test_a_taken_name_is_refused() -> None:
    def lora() -> Factorization:
        raise AssertionError

    with pytest.raises(NetworkError, match="already called 'lora'"):
        families.family(lora)


# ---- what every declaration has


@pytest.mark.parametrize("name", families.names())
def test_declaration_is_complete(name: str) -> None:
    family = families.get(name)
    f, doc = family(), " ".join((inspect.getdoc(family) or "").split())
    assert f.name == name
    assert all(p.default is not p.empty for p in inspect.signature(family).parameters.values())
    assert f.source
    assert f"Source: {f.source}." in doc
    assert re.search(r"printed|secondary|derived|our reading|as released", f.source)
    assert ">>> " in doc
    assert ("**not zero**" in doc) == (name in NOT_ZERO)
    for line in f.lines:
        assert network(str(line.network)) == line.network
        line.network.require_matrix()


@pytest.mark.parametrize("name", families.names())
def test_formula_of_the_docstring_is_the_sum_of_products(name: str) -> None:
    family = families.get(name)
    formulas = re.findall(r"Parameters: ``(.*?)``", inspect.getdoc(family) or "", re.DOTALL)
    lines = family().lines
    assert len(formulas) == len(lines)
    for formula, line in zip(formulas, lines, strict=True):
        symbols = {index: sympy.Symbol(index) for index in line.network.indices}
        stated = sympy.sympify(formula.replace("\n", " "), locals=symbols)
        trainable = [f for f in line.network.factors if f.kind == "trainable"]
        counted = sum(prod(symbols[index] for index in f.indices) for f in trainable)
        assert sympy.expand(stated - counted) == 0


@pytest.mark.parametrize("name", IN_MODELS)
@pytest.mark.parametrize(("out", "inp"), [(64, 64), (128, 64), (64, 128), (96, 64)])
def test_defaults_place_on_square_and_rectangular_sites(name: str, out: int, inp: int) -> None:
    f = families.get(name)()
    sites = [Site(layer, proj, out, inp, heads=4) for layer in range(2) for proj in ("q_proj", "fc2")]
    if f.square and out % inp and inp % out:
        with pytest.raises(NetworkError, match="cannot be cut into squares"):
            layout(f, sites)
        return
    placed = layout(f, sites)
    for p in placed.site_layouts:
        assert prod(p.sizes[i] for i in p.network.rows) == (min(out, inp) if f.square else out)
        assert prod(p.sizes[i] for i in p.network.cols) == (min(out, inp) if f.square else inp)
    assert placed.count() > 0


@pytest.mark.parametrize("name", ["lorta", "cara", "metatt_5d", "gralora", "miss"])
def test_a_site_that_cannot_be_split_is_named(name: str) -> None:
    with pytest.raises(NetworkError, match=r"layer 0, q_proj \(63 x 63\)"):
        layout(families.get(name)(), [Site(0, "q_proj", 63, 63, heads=4)])


@pytest.mark.parametrize("name", STACKED)
def test_a_stack_index_that_no_model_has_is_named(name: str) -> None:
    with pytest.raises(NetworkError, match=f"'{STACKED[name]}' has no meaning"):
        layout(families.get(name)(), [Site(0, "q_proj", 64, 64)])


@pytest.mark.parametrize("name", families.names())
def test_start_is_zero_and_alive_or_declared(name: str) -> None:
    f = families.get(name)()
    for k, line in enumerate(f.lines):
        net, sizes = line.network, sizes_of(f, k)
        factors = arrays(net, sizes)
        for label in factors:
            if label.startswith("~"):
                factors[label] = factors[label[1:]]
            if f.init.get(label) == "zeros":
                factors[label] = np.zeros_like(factors[label])
        start = dense(net, factors)
        assert (np.abs(start).max() < 1e-9 * prod(start.shape)) == (name not in NOT_ZERO)
        trainable = [net.label(g) for g in net.factors if g.kind == "trainable"]
        zero = [label for label in trainable if f.init.get(label) == "zeros"]
        assert all(sum(net.label(g) in zero for g in term.factors) <= 1 for term in net.terms) or name == "pera"
        moved = {**factors, **{label: factors[label] + 0.1 for label in zero or trainable[:1]}}
        assert np.abs(dense(net, moved) - start).max() > 0


@pytest.mark.parametrize("name", families.names())
def test_a_docstring_says_which_start_is_by_the_rule(name: str) -> None:
    f = families.get(name)()
    unnamed = {x.name for rule in f.lines for x in rule.network.factors} - {*f.init}
    assert bool(unnamed) == ("by the variance rule" in " ".join(families.get(name).__doc__.split()))


# ---- options


def test_alpha_rules_become_one_number() -> None:
    assert families.lora(8).scale == 1.0
    assert families.lora(8, alpha=16).scale == 2.0
    assert families.lora(4, alpha=16, rslora=True).scale == 8.0
    assert families.tt_lora(alpha=4).scale == 4.0
    assert families.loretta(alpha=16).scale == 2.0
    assert families.lora("min(out, inp) // 16").scale == 1.0
    with pytest.raises(NetworkError, match="alpha over it varies over the sites"):
        families.lora("min(out, inp) // 16", alpha=16)


def test_rules_of_sizes() -> None:
    for out, inp in pairs((64, 48), (64, 48, 100)):
        assert sizes_of(families.randlora(7), 0, out, inp)["n"] == ceil(min(out, inp) / 7)
    assert sizes_of(families.lora("min(out, inp) // 16"), out=64, inp=128)["r"] == 4
    assert sizes_of(families.tera(), out=64, inp=128)["d"] == 16
    assert sizes_of(families.c3a(), out=96, inp=64)["c"] == 32
    assert sizes_of(families.lokr(out=(4, None)), out=64, inp=128) == {
        "layer": 2, "proj": 3, "o1": 4, "o2": 16, "i1": 8, "i2": 16, "r": 8,
    }  # fmt: skip
    assert families.rasa(rank=4, shared=1).sizes(layer=5, proj=2, out=6, inp=10)["c"] == 5
    guide = families.tensor_guide().with_ranks(a=3, b=5)
    assert (sizes_of(guide)["c"], sizes_of(guide)["d"]) == (3, 5)


def test_ranks_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(NetworkError, match="2 ranks are given for the 4 bonds a, b, c, d"):
        families.tenslora("qkv_depth", ranks=(8, 8))
    with pytest.raises(NetworkError, match="k=3 does not divide the rank 8"):
        families.gralora(rank=8, k=3)
    with pytest.raises(NetworkError, match="reading='H3' is unknown"):
        families.tera("H3")
    with pytest.raises(NetworkError, match="unknown mode 'head'"):
        families.tucker(modes=["head"])
    with pytest.raises(NetworkError, match="as many digits"):
        families.dota(out=(None,))


@pytest.mark.parametrize("heads", ["true", "interleaved"])
@pytest.mark.parametrize("construction", MODES)
def test_tenslora_counts_by_its_formula(construction: str, heads: str) -> None:
    full = {"layer": 12, "proj": 3, "head": 12}
    kept = MODES[construction]
    tensors = prod(full[i] for i in ("layer", "proj") if i not in kept)
    modes = [768, 64 if "head" in kept else 768, *(full[i] for i in kept)]
    ranks = [4, 4, *([3] * len(kept))]
    by_core = {
        "tucker": (ranks, sum(n * r for n, r in zip(modes, ranks, strict=True)) + prod(ranks)),
        "cp": (5, 5 * sum(modes)),
        "tt": (4, 4 * (modes[0] + modes[-1]) + 16 * sum(modes[1:-1])),
    }
    sites = [Site(k, proj, 768, 768, 12) for k in range(12) for proj in ("q_proj", "k_proj", "v_proj")]
    for core, (given, expected) in by_core.items():
        f = families.tenslora(construction, ranks=given, core=core, heads=heads)
        assert layout(f, sites).count() == tensors * expected


@pytest.mark.parametrize("name", ["tucker", "tensor_train", "tensor_ring", "tt_matrix", "block_term", "cp"])
@pytest.mark.parametrize("modes", [(), ("layer",), ("layer", "proj")])
@pytest.mark.parametrize(("out", "inp"), [((None,), (None,)), ((4, None), (None, None, 2))])
def test_generic_forms_over_splits_and_modes(
    name: str, modes: tuple[str, ...], out: tuple[int | None, ...], inp: tuple[int | None, ...]
) -> None:
    f = families.get(name)(2, out=out, inp=inp, modes=modes)
    sizes = sizes_of(f)
    assert set(sizes) == set(f.network.indices)
    assert dense(f.network, arrays(f.network, sizes)).shape == (2, 3, 64, 64)
    for factor in f.network.factors:
        assert set(factor.indices) & {"layer", "proj"} >= {"layer", "proj"} - set(modes)


@pytest.mark.parametrize("leaves", [2, 3, 4, 5, 7])
def test_hierarchical_tucker_is_a_binary_tree(leaves: int) -> None:
    f = families.hierarchical_tucker(out=(None,) * (leaves - 1), inp=(None,), stack=())
    sizes = [len(factor.indices) for factor in f.network.factors]
    assert sizes.count(3) == leaves - 2
    assert sizes.count(2) == leaves + 1
    assert f.network.hyper == ()


# ---- meaning, against constructions written independently of the declarations


FORMS: dict[str, tuple[Factorization, int, int, Callable[[dict[str, np.ndarray]], np.ndarray]]] = {
    "lokr": (families.lokr(rank=2), 12, 20, lambda a: np.kron(a["C"], a["P"] @ a["Q"])),
    "krona": (families.krona(), 12, 20, lambda a: np.kron(a["C"], a["K"])),
    "cp": (
        *(families.cp(rank=3), 12, 20),
        lambda a: sum(
            w * np.outer(np.kron(p, q), np.kron(s, t))
            for w, p, q, s, t in zip(a["w"], a["A"].T, a["B"].T, a["C"].T, a["D"].T, strict=True)
        ),
    ),
    "loha": (families.loha(rank=2), 6, 10, lambda a: (a["B1"] @ a["A1"]) * (a["B2"] @ a["A2"])),
    "hira": (families.hira(rank=2), 6, 10, lambda a: a["W0"] * (a["B"] @ a["A"])),
    "kradapter": (
        *(families.kradapter(), 12, 5),
        lambda a: np.stack([np.kron(a["U"][:, k], a["V"][:, k]) for k in range(5)], 1),
    ),
    "gralora": (
        *(families.gralora(rank=6, k=2), 8, 12),
        lambda a: np.block([[a["B"][i, j].T @ a["A"][i, j] for j in range(2)] for i in range(2)]),
    ),
    "rasa": (
        *(families.rasa(rank=4, shared=1), 6, 10),
        lambda a: a["B"] @ np.diag(a["d"]) @ a["A"] + a["e"] * np.outer(a["U"], a["V"]),
    ),
    "pera": (families.pera(3), 6, 10, lambda a: a["B"] @ a["A"] + a["B"] ** 2 @ np.diag(a["h"]) @ a["A"] ** 2),
    "glora": (families.glora(rank=2), 6, 10, lambda a: a["W0"] * (a["B1"] @ a["A1"]) + a["B2"] @ a["A2"]),
    "svft": (families.svft(), 6, 10, lambda a: a["U"] @ np.diag(a["m"]) @ a["V"]),
    "tied_lora": (families.tied_lora(3), 6, 10, lambda a: np.diag(a["b"]) @ a["B"] @ np.diag(a["d"]) @ a["A"]),
    "vera": (families.vera(4), 6, 10, lambda a: np.diag(a["b"]) @ a["B"] @ np.diag(a["d"]) @ a["A"]),
    "stella": (families.stella(rank=3), 6, 10, lambda a: a["U"] @ a["S"] @ a["V"]),
    "abba": (families.abba(rank=4), 6, 10, lambda a: (a["B1"] @ a["A1"]) * (a["B2"] @ a["A2"])),
    "randlora": (
        *(families.randlora(rank=4), 12, 8),
        lambda a: sum(a["B"][:, n] @ np.diag(a["lam"][:, n]) @ a["A"] @ np.diag(a["gam"][n]) for n in range(2)),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_line_is_the_product_that_its_source_prints(name: str) -> None:
    f, out, inp, form = FORMS[name]
    update, factors = dense_of(f, out=out, inp=inp)
    np.testing.assert_allclose(update, form(factors), atol=1e-12)


def test_miss_repeats_its_block_over_the_inputs() -> None:
    f = families.miss(rank=4)
    sizes = dict(f.sizes(layer=1, proj=1, out=8, inp=12))
    factors = arrays(f.network, sizes)
    factors["J"] = np.ones(3)
    np.testing.assert_allclose(dense(f.network, factors)[0, 0], np.tile(factors["D"][0, 0], 3), atol=1e-12)


def test_block_diagonal_forms() -> None:
    def diagonal(*blocks: np.ndarray) -> np.ndarray:
        rows, cols = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
        whole, at = np.zeros((rows, cols)), np.zeros(2, int)
        for block in blocks:
            whole[at[0] : at[0] + block.shape[0], at[1] : at[1] + block.shape[1]] = block
            at += block.shape
        return whole

    f = families.melora(rank=3, blocks=2)
    sizes = dict(f.sizes(layer=1, proj=1, out=8, inp=12))
    factors = arrays(f.network, sizes) | {"I": np.eye(2)}
    b, a = factors["B"][0, 0], factors["A"][0, 0]
    np.testing.assert_allclose(dense(f.network, factors)[0, 0], diagonal(b[0] @ a[0], b[1] @ a[1]), atol=1e-12)
    for k, line in enumerate(families.bd_lora(rank=6, blocks=2).lines):
        sizes = dict(
            families.bd_lora(rank=6, blocks=2).sizes({"layer": 1, "proj": 1, "out": 8, "inp": 12}, line=line)
        )
        factors = arrays(line.network, sizes)
        b, a = factors["B"][0, 0], factors["A"][0, 0]
        if k == 0:
            wanted = np.concatenate([b[0], b[1]], 1) @ diagonal(a[0], a[1])
        else:
            wanted = diagonal(b[0], b[1]) @ np.concatenate([a[0], a[1]], 0)
        np.testing.assert_allclose(dense(line.network, factors)[0, 0], wanted, atol=1e-12)


def test_expert_forms_expert_by_expert() -> None:
    sizes = {"layer": 1, "proj": 1, "expert": 3, "out": 6, "inp": 10}
    shared = families.shared_outer_lora(rank=2)
    forms = {
        "shared, down": (shared, 0, lambda a, e: a["B"][0, 0] @ a["A"][0, 0, e]),
        "shared": (shared, 1, lambda a, e: a["B"][0, 0, e] @ a["A"][0, 0]),
        "lora": (families.expert_lora(rank=2), 0, lambda a, e: a["B"][0, 0, e] @ a["A"][0, 0, e]),
        "cp": (families.expert_cp(4), 0, lambda a, e: a["U"][0, 0] @ np.diag(a["e"][0, 0, e]) @ a["V"][0, 0].T),
        "tucker": (families.expert_tucker(2), 0, lambda a, e: a["U"][0, 0] @ a["G"][0, 0, e] @ a["V"][0, 0].T),
    }
    for f, number, one in forms.values():
        line = f.lines[number]
        bound = dict(f.sizes(sizes, line=line))
        factors = arrays(line.network, bound)
        found = dense(line.network, factors)[0, 0]
        for expert in range(3):
            np.testing.assert_allclose(found[expert], one(factors, expert), atol=1e-12)


def test_what_cannot_be_a_model_yet_is_counted() -> None:
    sizes = {"layer": 2, "proj": 3, "scene": 24, "env": 3, "out": 64, "inp": 32}
    f = families.tuka((8, 8, 4, 2))
    assert parameters(f, sizes) == 6 * (8 * 8 * 4 * 2 + 8 * (64 + 32) + 4 * 24 + 2 * 3)
    assert parameters(families.lora_edge(), layer=1, proj=1, out=64, inp=144, kh=3, kw=3) == 64 * 8
    with pytest.raises(NetworkError, match=r"shared=8 of the rank 8"):
        families.rasa(rank=8, shared=8)
    with pytest.raises(NetworkError, match="the rank 7 is odd"):
        families.abba(rank=7)


def test_mica_starts_from_the_minor_singular_vectors() -> None:
    import torch

    from tnpeft.nn.init.initializer import Initializer

    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    placed = layout(families.mica(rank=2), [Site(0, "q_proj", 4, 4)])
    piece = placed.site_layouts[0].parameters["B"]
    start = Initializer(placed, weight=lambda site: weight)(piece)
    assert torch.allclose(start.abs(), torch.tensor([[0.0, 0], [0, 0], [0, 1], [1, 0]]), atol=1e-6)


@pytest.mark.parametrize("digits", [2, 3, 4])
def test_quanta_is_its_gates_one_after_the_other(digits: int) -> None:
    f = families.quanta(out=(2, 3, 2, 2)[:digits], inp=(2, 3, 2, 2)[:digits])
    size = prod((2, 3, 2, 2)[:digits])
    sizes = dict(f.sizes(layer=1, proj=1, out=size, inp=size))
    factors = arrays(f.network, sizes)
    start = {label: array for label, array in factors.items() if label.startswith("~")}

    def circuit(prefix: str) -> np.ndarray:
        state = np.eye(size).reshape([*(2, 3, 2, 2)[:digits], size])
        for high in range(digits - 1, 0, -1):
            for low in range(high - 1, -1, -1):
                gate = factors[f"{prefix}G{high + 1}{low + 1}"][0, 0]
                state = np.moveaxis(np.tensordot(gate, state, axes=((2, 3), (low, high))), (0, 1), (low, high))
        return state.reshape(size, size)

    assert len(start) == digits * (digits - 1) // 2
    np.testing.assert_allclose(dense(f.network, factors)[0, 0], circuit("") - circuit("~"), atol=1e-10)


def test_tt_lora_reads_the_input_digits_backwards() -> None:
    w, a = dense_of(families.tt_lora(ranks=3, out=(2, 3), inp=(2, 5)), out=6, inp=10)
    for i1, i2 in pairs(range(2), range(5)):
        chain = a["C1"][i2] @ a["C2"][:, i1]
        rows = np.einsum("b,bxc,cy->xy", chain, a["C3"], a["C4"]).reshape(-1)
        np.testing.assert_allclose(w[:, 5 * i1 + i2], rows, atol=1e-12)


def test_heads_are_contiguous_unless_interleaved() -> None:
    for heads, touched in (("true", slice(16, 32)), ("interleaved", slice(1, None, 4))):
        f = families.tenslora("att", ranks=2, heads=heads)
        sizes = sizes_of(f)
        factors = arrays(f.network, sizes)
        factors["U3"][:, :, [0, 2, 3]] = 0
        rows = np.abs(dense(f.network, factors)[0, 0]).sum(1)
        expected = np.zeros(64, bool)
        expected[touched] = True
        np.testing.assert_array_equal(rows > 0, expected)


@pytest.mark.parametrize(("bonds", "rank"), [((3, 3, 4, 2), 8), ((2, 2, 2, 2), 4), ((4, 4, 4, 4), 16)])
def test_tera_reaches_the_rank_of_its_bonds(bonds: tuple[int, ...], rank: int) -> None:
    for reading, trained in (("H1", sum(bonds)), ("H2", 16)):
        f = families.tera(reading, ranks=bonds, out=(4, 4), inp=(4, 4))
        w, _ = dense_of(f, out=16, inp=16)
        assert np.linalg.matrix_rank(w) == rank
        assert layout(f, [Site(0, "q_proj", 16, 16)]).count() == trained


def test_a_misspelt_argument_gets_the_nearest_one() -> None:
    with pytest.raises(NetworkError, match=r"lora has no argument 'rnak'\ndid you mean 'rank'\? call it as lora\("):
        families.get("lora")(rnak=2)
    with pytest.raises(NetworkError, match=r"cp has no argument 'zzz'\ncall it as cp\("):
        families.get("cp")(zzz=2)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("cp", {"out": 32}), ("cp", {"modes": 3}), ("gralora", {"k": 0}), ("bd_lora", {"blocks": 0}),
        ("abba", {"rank": None}), ("lorta", {"rank": 0}), ("tucker", {"ranks": 2.5}), ("loretta", {"bottleneck": 3}),
        ("tenslora", {"construction": 1}), ("lora", {"alpha": 10**400}),
        ("lora", {"rslora": "no"}), ("cp", {"unit_norm": 1}), ("tt_lora", {"zero": None}),
    ],
)  # fmt: skip
def test_an_argument_that_does_not_fit_is_refused_with_the_familys_own(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(NetworkError, match=rf"{name}\(.*has an unfit argument(.|\n)*call it as {name}\("):
        families.get(name)(**given)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "option"), [("lora", "alpha"), ("cp", "scale"), ("tt_lora", "alpha")])
def test_a_scale_that_is_not_finite_is_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(NetworkError, match=f"(alpha|scale) is {value}"):
        families.get(name)(**{option: value})
