"""Muon: what it does to a matrix, and what it leaves to AdamW."""
import copy

import pytest
import torch
from torch import nn

from muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(64, 96), (40, 200), (200, 40)])
def test_an_update_keeps_its_singular_vectors_and_makes_their_values_alike(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(0, -2, shape[1])  # some columns a hundred times as large as others
    U, _, V = torch.linalg.svd(matrix, full_matrices=False)
    inside = U.T @ orthogonal(matrix) @ V.T  # diagonal where the singular vectors are the same
    values = inside.diagonal()
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inside - values.diag()).abs().max() < 1e-3
    torch.testing.assert_close(orthogonal(1000 * matrix), orthogonal(matrix), atol=1e-3, rtol=0)


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(9, 64), "conv": nn.Conv2d(64, 48, 3), "norm": nn.LayerNorm(48),
                          "hidden": nn.Linear(48, 48), "out": nn.Linear(48, 7)})


def loss(net, ids):
    x = net["embed"](ids)[..., None, None].expand(-1, -1, 3, 3)  # (B, 64, 3, 3)
    return net["out"](net["hidden"](net["norm"](net["conv"](x).flatten(1))).relu()).square().mean()


def test_matrices_and_kernels_get_orthogonal_steps_and_all_else_is_adamws():
    ours, theirs = model(), model()
    before = copy.deepcopy(ours.state_dict())
    optimizers = Muon(ours, lr=0.01, weight_decay=0.1), torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for net, optimizer in zip((ours, theirs), optimizers):
        loss(net, torch.arange(9)).backward()
        optimizer.step()
    for name, value in ours.state_dict().items():
        if name not in ("conv.weight", "hidden.weight"):
            torch.testing.assert_close(value, theirs.state_dict()[name])
            continue
        step = (value - before[name] * (1 - 0.01 * 0.1)).flatten(1)
        assert 0.6 < torch.linalg.matrix_norm(step, 2) / (0.01 * 0.4 * max(step.shape) ** 0.5) < 1.3, name


def test_a_step_moves_against_the_gradient():
    net = model()
    optimizer = Muon(net, lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(20):
        value = loss(net, torch.arange(9))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.2 * losses[0]


def test_momentum_goes_on_where_the_gradient_is_zero():
    net = model()
    optimizer = Muon(net, lr=0.01, weight_decay=0.0)
    loss(net, torch.arange(9)).backward()
    optimizer.step()
    before = net["hidden"].weight.detach().clone()
    net["hidden"].weight.grad = torch.zeros(48, 48)
    optimizer.step()
    assert (net["hidden"].weight - before).square().mean().sqrt() > 1e-3


def test_of_a_world_model_only_the_unet_is_for_muon():
    world = nn.Module()
    world.unet, world.pose_predictor = model(), nn.Linear(64, 64)
    adamw, muon = Muon(world, lr=0.01, weight_decay=0.1).param_groups
    assert {id(p) for p in muon["params"]} == {id(world.unet[name].weight) for name in ("conv", "hidden")}
    assert len(adamw["params"]) + 2 == len(list(world.parameters()))
