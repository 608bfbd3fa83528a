"""Preconditioned steps: PEFT's for LoRA, the same in every gauge, and invisible to what drives an optimizer."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import peft
import pytest
import torch
from adapter_models import Blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.optimizers import create_riemannian_optimizer
from torch import nn

import tnpeft
from tnpeft import families
from tnpeft.adapters.state import arrays, bank_of
from tnpeft.networks import NetworkError
from tnpeft.optim.grams import groups, inner_product


def tiny():
    run = lambda layer, x: x + torch.tanh(layer["q_proj"](x)) * layer["v_proj"](x)  # noqa: E731
    return Blocks(run, q_proj=(8, 8), v_proj=(8, 8))


def attached(f, seed=0, **fields):
    torch.manual_seed(0)
    config = tnpeft.TensorNetworkConfig(network=f, target_modules=["q_proj", "v_proj"], **fields)
    model = peft.get_peft_model(tiny().double(), config).double()
    generator = torch.Generator().manual_seed(seed)
    values = {k: torch.randn(v.shape, generator=generator).double() for k, v in trained(model).items()}
    tnpeft.set_factors(model, values)
    return model


def trained(model):
    net = model.peft_config["default"].factorization.network
    kinds = {net.label(f): f.kind for f in net.factors}
    return {k: v for k, v in tnpeft.factors(model).items() if kinds[k] == "trainable"}


def updates(model):
    return torch.stack([m.get_delta_weight("default") for m in model.modules() if hasattr(m, "updates")])


def backward(model, seed=1):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)).double()
    loss = model(x).square().mean()
    loss.backward()
    return loss


def run(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


FAMILIES = {
    "lora": families.lora(rank=3),
    "moslora": families.moslora(3),
    "tucker": families.tucker(ranks=3),
    "block_term": families.block_term(ranks=2),
    "tensor_train": families.tensor_train(ranks=2),
    "tensor_ring": families.tensor_ring(ranks=2),
    "hierarchical_tucker": families.hierarchical_tucker(ranks=2),
    "lotr": families.lotr(3),
    "tenslora": families.tenslora(ranks=2),
    "gralora": families.gralora(rank=4),
}


def gauged(model, generator):
    """The same update with an invertible matrix on every bond of exactly two factors."""
    net = model.peft_config["default"].factorization.network
    values = {k: v.clone() for k, v in trained(model).items()}
    for bond in net.bonds:
        ends = [f for f in net.factors if bond in f.indices]
        if len(ends) != 2 or any(f.kind != "trainable" for f in ends):
            continue
        size = values[ends[0].name].shape[ends[0].indices.index(bond)]
        matrix = torch.randn(size, size, generator=generator).double() + 2 * torch.eye(size).double()
        for f, change in zip(ends, (matrix, torch.linalg.inv(matrix).T), strict=True):
            axis = f.indices.index(bond)
            values[f.name] = torch.tensordot(values[f.name], change, ([axis], [0])).movedim(-1, axis)
    tnpeft.set_factors(model, values)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 2**16), st.sampled_from(("sgd", "momentum")))
def test_another_gauge_takes_the_same_step(name, seed, kind):
    models = [attached(FAMILIES[name], seed), attached(FAMILIES[name], seed)]
    gauged(models[1], torch.Generator().manual_seed(seed))
    assert torch.allclose(
        updates(models[0]), updates(models[1]), rtol=1e-6, atol=1e-6 * float(updates(models[0]).abs().max())
    )
    for model in models:
        optimizer = torch.optim.SGD(tnpeft.parameter_groups(model, lr=1e-2), momentum=0.9 * (kind == "momentum"))
        run(model, tnpeft.optim.precondition(optimizer, model, damping=0), 2)
    one, other = map(updates, models)
    assert (one - other).abs().max() < 1e-6 * one.abs().max()


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 2**16))
def test_adam_is_invariant_too_where_asked(name, seed):
    models = [attached(FAMILIES[name], seed), attached(FAMILIES[name], seed)]
    gauged(models[1], torch.Generator().manual_seed(seed))
    for model in models:
        optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-2), weight_decay=0.1)
        run(model, tnpeft.optim.precondition(optimizer, model, damping=0, invariant=True), 3)
    one, other = map(updates, models)
    assert (one - other).abs().max() < 1e-6 * one.abs().max()


def _run(f, values, steps=12):
    """Updates along an invariant run from given values, at rates by rule."""
    model, found = attached(f), []
    tnpeft.set_factors(model, values)
    optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, relative_step=3e-2), weight_decay=0.0)
    tnpeft.optim.precondition(optimizer, model, invariant=True)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, seed=step)
        optimizer.step()
        found.append(updates(model))
    return torch.stack(found)


@pytest.mark.parametrize("zero", [True, False])
def test_lines_that_span_the_same_updates_train_alike(zero):
    """Whole runs, not first steps: what a third factor could do as well is not done twice."""
    generator = torch.Generator().manual_seed(5)
    B, M, N, A = (torch.randn(2, 2, *s, generator=generator).double() for s in ((8, 4), (4, 4), (2, 2), (4, 8)))
    M, N = (torch.linalg.qr(x)[0] for x in (M, N))
    B, blocks = B * (0 if zero else 0.1), torch.stack([N, -N.mT], 2)
    diagonal = torch.zeros(2, 2, 4, 4).double()
    diagonal[..., :2, :2], diagonal[..., 2:, 2:] = N, -N.mT
    per_block = {"U1": B.unflatten(-1, (2, 2)).movedim(-2, 2), "U2": A.mT.unflatten(-1, (2, 2)).movedim(-2, 2)}
    start = {"init": {"U1": "zeros"}}
    lora = families.lora(rank=4)
    pairs = {
        "moslora": (families.moslora(4), {"B": B, "M": M, "A": A}, M @ A),
        "tucker": (replace(families.tucker(ranks=4), **start), {"U1": B, "G": M, "U2": A.mT}, M @ A),
        "block_term": (
            replace(families.block_term(ranks=2, blocks=2), **start),
            {"G": blocks, **per_block},
            diagonal @ A,
        ),
    }
    for name, (other, values, right) in pairs.items():
        one, two = _run(lora, {"B": B, "A": right}), _run(other, values)
        way = (one[-1] - one[0]).norm()
        assert way > 0.1 * one[0].norm(), name
        assert (one[-1] - two[-1]).norm() < 1e-5 * way, name


@pytest.mark.parametrize("name", sorted({*FAMILIES, "cp", "loha", "vera"}))
def test_inner_products_are_those_of_dense_updates(name):
    models = [attached(FAMILIES.get(name) or getattr(families, name)(rank=3), seed) for seed in (1, 2)]
    layout = bank_of(models[0]).layouts["default"]
    one, other = (arrays(model, bank_of(model), "default") for model in models)
    found = inner_product(groups(layout), one, other, torch.float64) * layout.factorization.scale**2
    expected = (updates(models[0]) * updates(models[1])).sum()
    assert torch.allclose(found, expected, rtol=1e-10)


def test_without_preconditioning_the_gauge_matters():
    models = [attached(FAMILIES["lora"], 3), attached(FAMILIES["lora"], 3)]
    gauged(models[1], torch.Generator().manual_seed(3))
    for model in models:
        optimizer = torch.optim.SGD(tnpeft.parameter_groups(model, lr=1e-2))
        backward(model)
        optimizer.step()
    one, other = map(updates, models)
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_lora_steps_as_pefts_riemannian_optimizer(cls):
    ours = attached(families.lora(rank=3, alpha=6))
    tnpeft.set_factors(ours, {k: 0.2 * v for k, v in tnpeft.factors(ours).items()})
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        tiny().double(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    ).double()

    def pairs():
        """Every matrix of theirs, and ours."""
        own = tnpeft.factors(ours)
        for k, (j, proj), label in product(range(2), enumerate(("q_proj", "v_proj")), "AB"):
            yield (
                theirs.get_parameter(f"base_model.model.layers.{k}.{proj}.lora_{label}.default.weight"),
                own[label][k, j],
            )

    with torch.no_grad():
        for matrix, own in pairs():
            matrix.copy_(own)
    optimizers = [
        tnpeft.optim.precondition(cls(tnpeft.parameter_groups(ours, lr=1e-3)), ours, damping=1e-2),
        create_riemannian_optimizer(theirs, cls, lr=1e-3, reg=1e-2),
    ]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        run(model, optimizer, 4)
    for matrix, own in pairs():
        assert torch.allclose(own, matrix, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", [n for n in families.names() if n not in ("tuka",)])
def test_every_family_takes_finite_steps_from_its_start(name, invariant):
    torch.manual_seed(0)
    f = families.get(name)()
    f = f.with_ranks(**{b: 2 for b, r in f.ranks.items() if isinstance(r, int)})
    if "expert" in f.network.indices or "basis" in f.network.indices:
        pytest.skip("for other sites")
    model = peft.get_peft_model(tiny(), tnpeft.TensorNetworkConfig(network=f, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, relative_step=1e-3))
    tnpeft.optim.precondition(optimizer, model, invariant=invariant)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 8, generator=torch.Generator().manual_seed(1))).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    if invariant:  # signs of a preconditioned gradient, as Adam takes, may point uphill
        assert losses[-1] < losses[0]


def test_closures_schedulers_states_and_gradients_pass_through():
    model = attached(families.lora(rank=3))
    for invariant in (False, True):
        optimizer = torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-2))
        same = tnpeft.optim.precondition(optimizer, model, invariant=invariant)
        assert same is optimizer
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 3)
        start = {k: v.clone() for k, v in tnpeft.factors(model).items()}

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            return backward(model)

        assert optimizer.step(closure) > 0
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        by_closure = tnpeft.factors(model)
        schedule.step()
        state = copy.deepcopy(optimizer.state_dict())
        tnpeft.set_factors(model, start)
        again = tnpeft.optim.precondition(
            torch.optim.AdamW(tnpeft.parameter_groups(model, lr=1e-2)), model, invariant=invariant
        )
        again.zero_grad()
        backward(model)
        assert all(
            torch.equal(a, p.grad)
            for a, p in zip(grads, [p for p in model.parameters() if p.requires_grad], strict=True)
        )
        again.step()
        assert all(torch.equal(v, by_closure[k]) for k, v in tnpeft.factors(model).items())
        again.load_state_dict(state)
        results = []
        for each in (optimizer, again):
            tnpeft.set_factors(model, by_closure)
            run(model, each, 1)
            results.append(tnpeft.factors(model))
        assert all(torch.equal(results[0][k], v) for k, v in results[1].items())


def test_refusals():
    model = attached(families.lora(rank=3))
    groups = tnpeft.parameter_groups(model, lr=1e-2)
    with pytest.raises(NetworkError, match="already"):
        tnpeft.optim.precondition(tnpeft.optim.precondition(torch.optim.SGD(groups), model), model)
    with pytest.raises(NetworkError, match="several times"):
        tnpeft.optim.precondition(torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad]), model)
    for damping in (-1, float("nan"), float("inf"), None, "1e-2"):
        with pytest.raises(NetworkError, match=f"damping is '?{damping}"):
            tnpeft.optim.precondition(torch.optim.SGD(groups), model, damping=damping)
    with pytest.raises(NetworkError, match="the optimizer is a PeftModel"):
        tnpeft.optim.precondition(model, torch.optim.SGD(groups))
    other = attached(families.lora(rank=3))
    with pytest.raises(NetworkError, match="no trained parameter of the model"):
        tnpeft.optim.precondition(torch.optim.SGD(groups), other)
    with pytest.raises(NetworkError, match="no tensor-network adapter"):
        tnpeft.optim.precondition(torch.optim.SGD(groups), nn.Linear(2, 2))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_grams_are_those_of_the_jacobian(name):
    """Undamped, the update moves by the gradient projected on what each factor reaches, added up."""
    model = attached(FAMILIES[name])
    bank = bank_of(model)
    layout, held = bank.layouts["default"], arrays(model, bank, "default")
    (group,) = groups(layout)
    stacked = group.stacked(held, torch.float64)
    for label, environment in group.environments.items():
        param = layout.site_layouts[0].parameters[label]
        array = held[param]
        # the outer indices at zero: one entry of the factor for each value of its bonds and batch indices
        total = torch.zeros(array.numel(), array.numel()).double()
        for site in layout.site_layouts:
            if site.parameters[label] != param:
                continue
            values = {k: held[p].detach() for k, p in site.parameters.items()}

            def update(x, values=values, net=site.network, label=label):
                return tnpeft.dense(net, {**values, label: x})

            jacobian = torch.autograd.functional.jacobian(update, array.detach()).reshape(-1, array.numel())
            total += jacobian.T @ jacobian
        gradient = torch.randn(array.shape).double()
        adapter = tnpeft.optim.directions.Directions(model, "default", 0.0, False)
        found = adapter.directions({param: gradient})[0][param]
        expected = torch.linalg.solve(total, gradient.flatten()).reshape(array.shape)
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())), label
        assert stacked[label].shape[-1] == array.shape[-1]
        assert environment


def test_replicas_step_as_separate_runs():
    """Invariant steps have moments of their own for each replica, and rates of their own."""

    def model(**fields):
        torch.manual_seed(0)
        config = tnpeft.TensorNetworkConfig(network=families.lora(rank=2), target_modules=["0"], **fields)
        return peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)).double(), config).double()

    seeds, rates = (4, 5, 6), (1.0, 0.5, 0.25)
    many, alone = model(replicas=3, replica_seeds=[*seeds]), [model(seed=seed) for seed in seeds]
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 7, width, generator=generator).double() for width in (6, 5))
    for k, runs in enumerate((many, *alone)):
        lr = 1e-2 * (1.0, *rates)[k]
        inputs, wanted = (x, y) if runs is many else (x[k - 1 : k], y[k - 1 : k])
        optimizer = torch.optim.AdamW(tnpeft.parameter_groups(runs, lr=lr), weight_decay=0.0)
        tnpeft.optim.precondition(optimizer, runs, invariant=True)
        if runs is many:
            tnpeft.replicas.learning_rates(optimizer, runs, rates)
        for _ in range(4):
            optimizer.zero_grad()
            (runs(inputs.flatten(0, 1)).view_as(wanted) - wanted).square().mean((1, 2)).sum().backward()
            optimizer.step()
    together = tnpeft.factors(many)
    for k, one in enumerate(alone):
        for label, value in tnpeft.factors(one).items():
            assert torch.allclose(together[label][k], value, rtol=1e-9, atol=1e-12), (k, label)
