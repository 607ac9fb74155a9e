import math

import pytest
import torch

from vit_cifar.explain.attention import AttentionMap, cls_map, gradient_rollout, rollout


def maps(layers=3, batch=2, heads=4, tokens=13) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(batch, heads, tokens, tokens, generator=generator).softmax(-1) for _ in range(layers)]


def product(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    columns = list(zip(*right, strict=True))
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in left]


def identity(size: int) -> list[list[float]]:
    return [[float(row == column) for column in range(size)] for row in range(size)]


@pytest.mark.parametrize("layer", [0, 2, -1, -3])
@pytest.mark.parametrize("head", ["mean", "max", 0, 3])
def test_equals_reading_the_row_number_by_number(layer, head):
    attentions = maps()
    result = cls_map(attentions, layer, head, grid=(3, 4)).values
    assert result.shape == (2, 3, 4)
    for image in range(2):
        for row in range(3):
            for column in range(4):
                numbers = [attentions[layer][image, h, 0, 1 + 4 * row + column].item() for h in range(4)]
                expected = {"mean": sum(numbers) / 4, "max": max(numbers)}.get(head) or numbers[head]
                assert result[image, row, column] == pytest.approx(expected)


@pytest.mark.parametrize("method", [cls_map, rollout])
def test_with_the_class_tokens_own_share_it_adds_up_to_one(method):
    result = method(maps(), grid=(3, 4))
    torch.testing.assert_close(result.values.sum((1, 2)) + result.to_itself, torch.ones(2))
    assert (result.to_itself > 0).all()


@pytest.mark.parametrize("fusion", ["mean", "max"])
@pytest.mark.parametrize("discard_ratio", [0.0, 0.4])
def test_rollout_equals_multiplying_layer_by_layer(fusion, discard_ratio):
    attentions = maps()
    result = rollout(attentions, fusion, discard_ratio, grid=(3, 4))
    for image in range(2):
        total = identity(13)
        for attention in attentions:
            heads = attention[image].tolist()
            fuse = max if fusion == "max" else lambda numbers: sum(numbers) / len(numbers)
            step = [[fuse([head[r][c] for head in heads]) for c in range(13)] for r in range(13)]
            smallest = sorted((step[r][c], r, c) for r in range(13) for c in range(13))[: int(169 * discard_ratio)]
            for _, r, c in smallest:
                step[r][c] = 0.0
            for r in range(13):
                step[r][r] += 1.0
                step[r] = [number / sum(step[r]) for number in step[r]]
            total = product(step, total)
        assert result.values[image].flatten().tolist() == pytest.approx(total[0][1:], rel=1e-4)
        assert result.to_itself[image].item() == pytest.approx(total[0][0], rel=1e-4)


def test_gradient_rollout_equals_adding_layer_by_layer():
    attentions = maps()
    gradients = [torch.randn(a.shape, generator=torch.Generator().manual_seed(i)) for i, a in enumerate(attentions)]
    result = gradient_rollout(attentions, gradients, grid=(3, 4))
    for image in range(2):
        total = identity(13)
        for attention, gradient in zip(attentions, gradients, strict=True):
            weighted = [
                [
                    sum(max(0.0, (attention[image, h, r, c] * gradient[image, h, r, c]).item()) for h in range(4)) / 4
                    for c in range(13)
                ]
                for r in range(13)
            ]
            added = product(weighted, total)
            total = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(total, added, strict=True)]
        assert result.values[image].flatten().tolist() == pytest.approx(total[0][1:], rel=1e-4)
    assert result.to_itself is None


def test_a_square_grid_is_found():
    assert cls_map(maps(tokens=17)).values.shape == (2, 4, 4)


def test_a_map_says_what_its_picture_hides():
    values = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 8.0], [0.0, 0.0]], [[-3.0, 0.1], [0.1, 0.0]]])
    found = AttentionMap(values)
    assert found.minimum.tolist() == [1, 0, -3]
    assert found.maximum.tolist() == pytest.approx([1, 8, 0.1])
    assert found.entropy.tolist() == pytest.approx([2, 0, 1])  # bits: of four, of one, of two
    assert found.to_itself is None
    random = cls_map(maps(), grid=(3, 4))
    for image in range(2):
        numbers = random.values[image].flatten().tolist()
        shares = [number / sum(numbers) for number in numbers]
        assert random.entropy[image].item() == pytest.approx(-sum(s * math.log2(s) for s in shares), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attentions": ()}, "attentions: expected one map per layer, got none"),
        ({"layer": 3}, "layer: expected -3 to 2, got 3"),
        ({"head": 4}, "head: expected 0 to 3, mean or max, got 4"),
        ({"head": -1}, "head: expected 0 to 3, mean or max, got -1"),
        ({"head": "min"}, "fusion of heads: expected one of mean, max, got 'min'"),
        ({"grid": (2, 5)}, "grid: expected 12 patches, got 2 x 5"),
        ({}, "grid: expected 12 patches, got 3 x 3"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cls_map(**({"attentions": maps()} | arguments))


def test_wrong_arguments_of_rollout_are_named():
    with pytest.raises(ValueError, match="discard_ratio: expected at least 0 and less than 1, got 1"):
        rollout(maps(), discard_ratio=1)
    with pytest.raises(ValueError, match="gradients: expected the shapes of the maps"):
        gradient_rollout(maps(), maps(layers=2))
