"""One of two processes that share a batch: a module of its own, because a spawned process imports it by name."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vit_cifar.training.distributed import synchronize_batch_norm

IMAGES = torch.randn(8, 3, 6, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    )


def step(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    loss = model(images).square().mean(dim=(1, 2, 3)).sigmoid().mean()
    loss.backward()
    return loss.detach()


def results(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()] + list(model.buffers())


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = synchronize_batch_norm(build())
    step(DistributedDataParallel(model), IMAGES[rank * 4 : rank * 4 + 4])
    torch.save(results(model), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
