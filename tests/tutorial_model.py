"""The tutorial's three models in plain PyTorch, written from its description alone: what the converter is held against.

Nothing of vit_cifar is imported, and everything is slow and obvious. The names of the modules are the tutorial's, so
that the state dict has its keys.
"""

import math

import torch
from torch import nn

WIDTH, DEPTH, HEADS, PATCH, MLP, CLASSES = 192, 12, 12, 4, 768, 10


class CutIntoPatches(nn.Module):
    """(B, 3, 32, 32) -> (B, 64, 48), each patch flattened in the order row, column, channel."""

    def forward(self, images):
        patches = []
        for top in range(0, 32, PATCH):
            for left in range(0, 32, PATCH):
                numbers = [
                    images[:, channel, top + row, left + column]
                    for row in range(PATCH)
                    for column in range(PATCH)
                    for channel in range(3)
                ]
                patches.append(torch.stack(numbers, dim=1))
        return torch.stack(patches, dim=1)


class GridToSequence(nn.Module):
    """(B, D, 8, 8) -> (B, 64, D), row by row."""

    def forward(self, grid):
        return torch.stack([grid[:, :, row, column] for row in range(8) for column in range(8)], dim=1)


def sine_table():
    table = torch.zeros(65, WIDTH)
    for position in range(65):
        for column in range(WIDTH):
            angle = position / 10000 ** (2 * (column // 2) / WIDTH)
            table[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table


class PatchEmbedding(nn.Module):
    def __init__(self, variant):
        super().__init__()
        if variant == "pe_conv":
            self.projection = nn.Sequential(nn.Conv2d(3, WIDTH, PATCH, stride=PATCH), GridToSequence())
        else:
            self.projection = nn.Sequential(CutIntoPatches(), nn.Linear(PATCH * PATCH * 3, WIDTH))
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        if variant == "basic":
            self.positions = nn.Parameter(torch.randn(65, WIDTH))
        else:
            self.positions = None

    def forward(self, images):
        patches = self.projection(images)
        first = self.cls_token.repeat(len(images), 1, 1)
        table = sine_table() if self.positions is None else self.positions
        return torch.cat([first, patches], dim=1) + table


class Attention(nn.Module):
    """Head by head; the last map is kept in `weights`, (B, heads, 65, 65)."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        queries, keys, values = self.query(x), self.key(x), self.value(x)
        size = WIDTH // HEADS
        outputs, maps = [], []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = torch.einsum("bid,bjd->bij", queries[..., part], keys[..., part]) / math.sqrt(size)
            maps.append(torch.softmax(scores, dim=-1))
            outputs.append(torch.einsum("bij,bjd->bid", maps[-1], values[..., part]))
        self.weights = torch.stack(maps, dim=1)
        return torch.cat(outputs, dim=-1)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, MLP), nn.GELU(), nn.Dropout(0.0), nn.Linear(MLP, WIDTH))

    def forward(self, x):
        return self.mlp(x)


class Residual(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.fn = nn.Sequential(*modules)

    def forward(self, x):
        return x + self.fn(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.work1 = Residual(nn.LayerNorm(WIDTH), Attention())
        self.work2 = Residual(nn.LayerNorm(WIDTH), FeedForward())

    def forward(self, x):
        return self.work2(self.work1(x))


class TutorialViT(nn.Module):
    """variant: basic, pe or pe_conv. (B, 3, 32, 32) -> logits (B, 10)."""

    def __init__(self, variant):
        super().__init__()
        self.patchembedding = PatchEmbedding(variant)
        self.transformer = nn.Sequential(*(Layer() for _ in range(DEPTH)))
        self.mlp_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, images):
        return self.mlp_head(self.transformer(self.patchembedding(images))[:, 0])

    @property
    def last_attention(self):
        return self.transformer[-1].work1.fn[1].weights
