"""Batch normalisation over the batches of all processes: what makes several processes train as one does."""

import torch
from torch import distributed, nn


class SumOverProcesses(torch.autograd.Function):
    """The sum of every process's tensor; the gradient is the sum of every process's gradient."""

    @staticmethod
    def forward(ctx: object, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return SumOverProcesses.apply(gradient)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the mean and variance of the global batch; `nn.SyncBatchNorm` does this on GPUs only.

    In evaluation it is BatchNorm2d. Gradients flow through the statistics of every process.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) of this process -> the same shape and type, computed in float32."""
        if not self.training:
            return super().forward(input)
        x = input.float()
        size = x.new_tensor([x.numel() / x.shape[1]])
        total, count = SumOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), size])).split([x.shape[1], 1])
        mean = total / count
        centred = x - mean[:, None, None]
        variance = SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """The same model, parameters and names, its batch norms over all processes. Before the optimizer is made."""
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # nothing but forward differs
    return model
