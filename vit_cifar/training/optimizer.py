"""Which parameters are trained how: Muon for the matrices, AdamW for the rest; what is decayed and what is not."""

from collections import defaultdict

import torch
from torch import nn

from ..modeling_vit_cifar import ViTCifarConvStem, ViTCifarLayer


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """Weights with two or more dimensions; not biases, norms, class token and position table (nanoGPT, DeiT)."""
    tables = ("cls_token", "position_embeddings")
    return [name for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith(tables)]


def muon_parameter_names(model: nn.Module) -> list[str]:
    """The matrices between input and output: weights of the layers, and the filters of a convolutional stem."""
    inner = (ViTCifarLayer, ViTCifarConvStem)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, inner))
    return [name for name in decayed_parameter_names(model) if name.startswith(inside)]


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, m, n) -> about U Vᵀ of the singular value decomposition of each, float32, by five quintic Newton-Schulz steps
    in `dtype` (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if is_tall else matrices
    wide = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = wide @ wide.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, factor, wide, beta=3.4445)
    return (wide.mT if is_tall else wide).float()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, as above), with a Nesterov momentum of 0.95 and decoupled weight decay.

    `torch.optim.Muon` with its defaults, but for three things: that one orthogonalizes in bf16 always and not in
    `dtype`, though a processor without units for bf16 takes some 25 times as long as in float32; one matrix after the
    other, where a GPU waits for the start of each of many small products; and it takes no filters, which here count as
    matrices (out, in * height * width).
    """

    momentum = 0.95

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            of_shape = defaultdict(list)
            for p in (p for p in group["params"] if p.grad is not None):
                state, gradient = self.state[p], p.grad.flatten(1)
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                average = state["momentum_buffer"]
                average.lerp_(gradient, 1 - self.momentum)
                of_shape[gradient.shape].append((p, gradient.lerp(average, self.momentum)))
            for (rows, columns), pairs in of_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]), self.dtype)
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for what `muon_parameter_names` lists and AdamW for the rest, behind one optimizer.

    Args:
        lr, betas, eps: for AdamW; muon_lr, dtype: for Muon. A scheduler scales both learning rates.
        weight_decay: decoupled, for both; AdamW decays only what `decayed_parameter_names` lists.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        muon_lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        # Not super().__init__(): the groups and the state are those of the two optimizers below.
        parameters = dict(model.named_parameters())
        by_muon, decayed = muon_parameter_names(model), decayed_parameter_names(model)
        matrices = [p for n, p in parameters.items() if n in by_muon]
        groups = [
            {
                "params": [p for n, p in parameters.items() if n in decayed and n not in by_muon],
                "weight_decay": weight_decay,
            },
            {"params": [p for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
        ]
        self.optimizers = (
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay, dtype=dtype),
            torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps),
        )
        self.defaults = {"lr": lr}  # which transformers' schedules divide by

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict:
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure=None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict:
        return {"muon": self.optimizers[0].state_dict(), "adamw": self.optimizers[1].state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.optimizers[0].load_state_dict(state_dict["muon"])
        self.optimizers[1].load_state_dict(state_dict["adamw"])
        for state in self.optimizers[1].state.values():
            # Where AdamW keeps it. Trainer with several GPUs puts it on one, which each step would have to wait for.
            state["step"] = state["step"].cpu()
