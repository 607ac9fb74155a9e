import pytest
import torch

from vit_cifar.explain.attention import cls_map


def maps(layers=3, batch=2, heads=4, tokens=13) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(batch, heads, tokens, tokens, generator=generator).softmax(-1) for _ in range(layers)]


@pytest.mark.parametrize("layer", [0, 2, -1, -3])
@pytest.mark.parametrize("head", [None, 0, 3])
def test_equals_reading_the_row_number_by_number(layer, head):
    attentions = maps()
    result = cls_map(attentions, layer, head, grid=(3, 4))
    assert result.shape == (2, 3, 4)
    for image in range(2):
        for row in range(3):
            for column in range(4):
                numbers = [attentions[layer][image, h, 0, 1 + 4 * row + column] for h in range(4)]
                expected = sum(numbers) / 4 if head is None else numbers[head]
                assert result[image, row, column] == pytest.approx(expected.item())


def test_with_the_class_tokens_own_share_it_adds_up_to_one():
    attentions = maps()
    result = cls_map(attentions, grid=(3, 4))
    torch.testing.assert_close(result.sum((1, 2)) + attentions[-1][:, :, 0, 0].mean(1), torch.ones(2))


def test_a_square_grid_is_found():
    assert cls_map(maps(tokens=17)).shape == (2, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attentions": ()}, "attentions: expected one map per layer, got none"),
        ({"layer": 3}, "layer: expected -3 to 2, got 3"),
        ({"head": 4}, "head: expected 0 to 3, got 4"),
        ({"head": -1}, "head: expected 0 to 3, got -1"),
        ({"grid": (2, 5)}, "grid: expected 12 patches, got 2 x 5"),
        ({}, "grid: expected 12 patches, got 3 x 3"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cls_map(**({"attentions": maps()} | arguments))
