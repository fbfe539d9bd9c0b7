"""Muon and AdamW as one optimizer, held against PyTorch's own of each."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.tiny import tiny_unet
from training.optimizers import Muon, make_optimizer, orthogonalised
from training.reproducible import clip_and_step, load_optimizer


class Net(nn.Module):
    """A first and a last convolution, and a matrix and a filter between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.inner = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 8, 3)
        self.linear, self.conv_out = nn.Linear(8, 3, bias=False), nn.Conv2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(self.inner(self.conv_in(x)).relu().movedim(1, -1)).movedim(-1, 1)
        return self.conv_out(h)


def train(network: Net, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x = torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(step))
        loss = (network(x) - x[:, :1, 1:4, 1:4]).square().mean()
        loss.backward()
        clip_and_step(optimizer, 0.0)
        losses.append(loss.item())
    return losses


def twins() -> tuple[Net, Net]:
    torch.manual_seed(0)
    one, other = Net(), Net()
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (24, 24), (1, 30)])
def test_orthogonalised_keeps_the_directions_and_evens_out_their_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    U, _, V = torch.linalg.svd(matrix, full_matrices=False)
    in_its_axes = U.T @ orthogonalised(matrix) @ V.T
    sizes = in_its_axes.diagonal()
    assert 0.6 < sizes.min() and sizes.max() < 1.3
    torch.testing.assert_close(in_its_axes, torch.diag(sizes), atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonalised(1000 * matrix), orthogonalised(matrix), atol=1e-5, rtol=0)
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


def test_the_short_way_over_the_gram_matrix_is_the_iteration_itself() -> None:
    x = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(2))
    plain = x / torch.linalg.matrix_norm(x, keepdim=True)
    for _ in range(5):
        gram = plain @ plain.mT
        plain = 3.4445 * plain + (-4.7750 * gram + 2.0315 * gram @ gram) @ plain
    torch.testing.assert_close(orthogonalised(x), plain, atol=1e-4, rtol=1e-4)


def test_the_rest_is_stepped_as_by_adamw() -> None:
    """First and last convolution and the biases, in a network whose inner weights stand still."""
    ours, theirs = twins()
    for network in (ours, theirs):
        network.inner.weight.requires_grad_(False)
        network.linear.weight.requires_grad_(False)
    decaying = [p for n, p in theirs.named_parameters() if p.ndim > 1 and p.requires_grad]
    free = [p for n, p in theirs.named_parameters() if p.ndim < 2]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    train(ours, Muon(ours, 1e-2, 0.1), 6)
    train(theirs, torch.optim.AdamW(groups, lr=1e-2, fused=True), 6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 30])  # a wide matrix and a tall one
def test_matrices_are_stepped_as_by_pytorchs_muon(rows: int) -> None:
    """Which computes in bfloat16, so that only two or three digits agree; a filter counts as a matrix (C_out, rest)."""
    ours, theirs = twins()
    ours.linear = nn.Linear(8, rows, bias=False)
    theirs.linear = copy.deepcopy(ours.linear)
    optimizer = Muon(ours, 1e-2, 0.1)
    reference = torch.optim.Muon([theirs.linear.weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = ours.linear.weight.detach().clone()
    flat = nn.Parameter(ours.inner.weight.detach().flatten(1).clone())
    reference_of_filter = torch.optim.Muon([flat], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    filter_before = flat.detach().clone()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        ours.linear.weight.grad = torch.randn(rows, 8, generator=g)
        ours.inner.weight.grad = torch.randn(8, 4, 3, 3, generator=g)
        theirs.linear.weight.grad, flat.grad = (
            ours.linear.weight.grad.clone(),
            ours.inner.weight.grad.flatten(1).clone(),
        )
        optimizer.step()
        reference.step()
        reference_of_filter.step()
    for mine, other, start in (
        (ours.linear.weight, theirs.linear.weight, before),
        (ours.inner.weight.flatten(1), flat, filter_before),
    ):
        moved, wanted = mine - start, other - start
        assert (moved - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    """Neither weights nor moments nor the count of steps, in the first step or in a later one."""
    network, _ = twins()
    optimizer = make_optimizer(name, network, 1e-2, 0.1)
    for poison in (float("nan"), float("inf")):
        before = [p.detach().clone() for p in network.parameters()]
        moments = [t.clone() for state in optimizer.state.values() for t in state.values()]
        (network(torch.randn(2, 2, 5, 5)).sum() * poison).backward()
        assert not clip_and_step(optimizer, 1.0).isfinite()
        assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
        after = [t for state in optimizer.state.values() for t in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=False))
        train(network, optimizer, 2)
        assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
        assert all(p.isfinite().all() for p in network.parameters())


def test_a_resumed_optimizer_goes_on_with_the_same_bits() -> None:
    whole, parted = twins()
    optimizer = make_optimizer("muon", whole, 1e-2, 0.1)
    train(whole, optimizer, 6)
    first = make_optimizer("muon", parted, 1e-2, 0.1)
    train(parted, first, 3)
    second = make_optimizer("muon", parted, 1e-2, 0.1)
    load_optimizer(second, first.state_dict())
    train(parted, second, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copied_optimizer_goes_on_with_the_same_bits(how: str) -> None:
    whole, _ = twins()
    optimizer = make_optimizer("muon", whole, 1e-2, 0.1)
    train(whole, optimizer, 2)
    pair = whole, optimizer  # together: else the copy would step copies of the parameters
    parted, again = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(whole, optimizer, 2, first=2)
    train(parted, again, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


def test_a_group_that_is_added_is_stepped_as_by_adamw() -> None:
    network, _ = twins()
    optimizer = make_optimizer("muon", network, 1e-2, 0.1)
    train(network, optimizer, 2)
    added, theirs = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer.add_param_group({"params": [added], "weight_decay": 0.1})
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True)
    before = [p.detach().clone() for p in network.parameters()]
    for seed in range(3):
        added.grad, theirs.grad = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
        train(network, optimizer, 1, first=seed)
        reference.step()
    assert torch.equal(added, theirs)
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_closure_computes_the_gradients() -> None:
    network, twin = twins()
    optimizer, other = (make_optimizer("muon", net, 1e-2, 0.1) for net in (network, twin))
    x = torch.randn(2, 2, 5, 5)

    def closure() -> torch.Tensor:
        loss = network(x).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    twin(x).square().mean().backward()
    assert other.step() is None and loss.item() > 0
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_goes_on_in_another_memory_layout(name: str) -> None:
    """As when it was begun on a GPU: moments that lie otherwise in memory than their parameters belong to the same."""
    whole, parted = twins()
    optimizer = make_optimizer(name, whole, 1e-2, 0.1)
    train(whole, optimizer, 6)
    first = make_optimizer(name, parted.to(memory_format=torch.channels_last), 1e-2, 0.1)
    train(parted, first, 3)
    second = make_optimizer(name, parted.to(memory_format=torch.contiguous_format), 1e-2, 0.1)
    load_optimizer(second, first.state_dict())
    train(parted, second, 3, first=3)
    for a, b in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns(name: str) -> None:
    network, _ = twins()
    losses = train(network, make_optimizer(name, network, 1e-2, 0.0), 60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_gains_and_biases_do_not_decay_and_all_parameters_are_there_once() -> None:
    unet = tiny_unet()
    optimizer = make_optimizer("muon", unet, 1e-2, 0.1)
    names = {id(p): name for name, p in unet.named_parameters()}
    stepped = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(names.values())
    _, outer, gains = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert outer == {"conv_in.weight", "conv_out.weight"}
    assert gains == {n for n in names.values() if n.endswith(".bias") or ".norm" in n or "_norm_" in n}
