"""Training on relevance: what stands around it in PyTorch works as it does around a loss."""

import copy
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lrpfx
from lrpfx import composites

SMOOTH = composites.EpsilonPlus(epsilon=0.01, stabilizer=0.01)


class Net(nn.Module):
    """With batch norm, dropout, and a weight that two layers share."""

    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4) if normed else nn.Identity()
        self.drop = nn.Dropout(0.0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.drop(F.softplus(self.b(F.softplus(self.a(x))) + x)))


def net(normed: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(normed).double().train()


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n)
    return torch.randn(n, 1, 5, 5, dtype=torch.float64), torch.randint(0, 3, (n,))


def explainer_of(model: nn.Module) -> lrpfx.Explainer:
    return lrpfx.Explainer(model, batch()[0], SMOOTH, bn="batch")


def loss_of(explainer: lrpfx.Explainer, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
    """Of the task and of relevance, by one forward pass."""
    found = explainer(x, y, create_graph=True)
    margin = found.relevance[..., :2].square().sum() / len(x)
    return F.cross_entropy(found.output, y) + weight * margin


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_without_the_penalty_a_step_is_that_of_plain_training() -> None:
    model, twin = net(), net()
    explainer, (x, y) = explainer_of(model), batch()
    for own, loss in ((model, loss_of(explainer, x, y, 0.0)), (twin, F.cross_entropy(twin(x), y))):
        optimizer = torch.optim.Adam(own.parameters(), lr=0.1)
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-9)


def test_a_hundred_steps_leave_what_plain_training_leaves() -> None:
    model, twin = net(), net()
    explainer = explainer_of(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    first = loss_of(explainer, *batch()).item()
    for step in range(100):
        x, y = batch(4 + step % 3)
        loss_of(explainer, x, y).backward()
        F.cross_entropy(twin(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss_of(explainer, *batch()).item() < first
    assert list(model.state_dict()) == list(twin.state_dict())
    assert model.a.weight is model.b.weight and model.training and model.drop.training
    assert int(model.norm.num_batches_tracked) == int(twin.norm.num_batches_tracked) + 2
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    forms = [
        {i: {k: v.shape for k, v in one.items()} for i, one in state["state"].items()}
        for state in states
    ]
    assert forms[0] == forms[1]
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_gradients_add_up_over_parts_of_a_batch() -> None:
    model = net(normed=False)
    explainer, (x, y) = explainer_of(model), batch()
    loss_of(explainer, x, y).backward()
    whole = gradients(model)
    model.zero_grad()
    for part in (slice(0, 3), slice(3, 6)):
        (loss_of(explainer, x[part], y[part]) / 2).backward()
    torch.testing.assert_close(gradients(model), whole)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_and_scaled_losses_train(inside: bool) -> None:
    model = net().float()
    x, y = batch()
    explainer = lrpfx.Explainer(model, x.float(), SMOOTH, bn="batch")
    loss_of(explainer, x.float(), y).backward()
    plain = gradients(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(explainer, x.float(), y)
        if inside:
            scaler.scale(loss).backward()
    if not inside:
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = gradients(model)
    for name in ("norm.weight", "a.weight", "head.weight"):
        assert (found[name] - plain[name]).norm() < 0.1 * plain[name].norm(), name
    scaler.step(optimizer)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        def stem(x: Tensor) -> Tensor:
            return F.softplus(self.norm(self.conv(x))).mean((2, 3))

        x = checkpoint(stem, x, use_reentrant=False)
        return self.head(self.drop(F.softplus(self.b(F.softplus(self.a(x))) + x)))


def test_checkpoints_inside_and_around_give_the_same_gradients() -> None:
    model = net()
    x, y = batch()
    loss_of(explainer_of(model), x, y).backward()
    plain = gradients(model)
    inside = Checkpointed().double().train()
    inside.load_state_dict(net().state_dict())
    loss_of(explainer_of(inside), x, y).backward()
    torch.testing.assert_close(gradients(inside), plain)
    around, explainer = net(), None
    explainer = explainer_of(around)
    checkpoint(functools.partial(loss_of, explainer), x, y, use_reentrant=False).backward()
    torch.testing.assert_close(gradients(around), plain)


# -- two processes --------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        _join(0, 1, folder)
        yield
        torch.distributed.destroy_process_group()


def _join(rank: int, size: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=size
    )


def _process(rank: int, folder: str, find_unused: bool) -> None:
    torch.set_num_threads(1)
    _join(rank, 2, folder)
    model = net(normed=False)
    if rank:  # what the first process has is what counts
        with torch.no_grad():
            model.head.bias.add_(1)
    parallel = DistributedDataParallel(model, find_unused_parameters=find_unused)
    explainer = explainer_of(parallel)
    x, y = batch()
    own = slice(3 * rank, 3 * rank + 3)
    with parallel.no_sync():
        loss_of(explainer, x[own], y[own]).backward()
    model.zero_grad()
    loss_of(explainer, x[own], y[own]).backward()
    if rank == 0:
        torch.save(gradients(model), Path(folder) / "gradients")
    torch.distributed.destroy_process_group()


@pytest.mark.nightly  # a quarter of a minute to import PyTorch twice
@pytest.mark.parametrize("find_unused", [True, False])
def test_two_processes_train_as_one(tmp_path: Path, find_unused: bool) -> None:
    # Not forked: threads of autograd that were there before may never end in a fork.
    given = (str(tmp_path), find_unused)
    multiprocessing.start_processes(_process, given, nprocs=2, start_method="spawn")
    model = net(normed=False)
    loss_of(explainer_of(model), *batch()).backward()
    found = torch.load(tmp_path / "gradients", weights_only=True)
    torch.testing.assert_close(found, gradients(model))


def test_a_distributed_model_is_left_as_it_was(alone: None) -> None:
    model = net()
    parallel = DistributedDataParallel(model)
    explainer = explainer_of(parallel)
    twin = copy.deepcopy(model)
    x, y = batch()
    loss_of(explainer, x, y).backward()
    assert parallel.module is model and explainer.model is model
    F.cross_entropy(twin(x), y).backward()
    assert int(model.norm.num_batches_tracked) == int(twin.norm.num_batches_tracked)
    torch.testing.assert_close(parallel(x), copy.deepcopy(model)(x))
