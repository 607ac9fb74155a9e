import sys

import pytest
import torch

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.errors import UserError
from vit_cifar.explain.perturbation import (
    METHODS,
    STEPS,
    AttentionMap,
    bootstrap_interval,
    deletion_insertion,
    look,
    randomized,
    rank_correlation,
)
from vit_cifar.models import load_model
from vit_cifar.training.data import load_split, normalize


@pytest.fixture(scope="module")
def model() -> ViTCifarForImageClassification:
    return load_model()[0]


@pytest.fixture(scope="module")
def pixel_values(model) -> torch.Tensor:
    processor = load_model()[1]
    return normalize(load_split("sample", "test").images[:6], processor.image_mean, processor.image_std)


def test_gradients_are_those_of_the_chosen_class(model, pixel_values):
    """One backward pass for all images gives what one for each image and logit gives."""
    classes = torch.tensor([0, 1, 2, 3, 4, 5])
    seen = look(model, pixel_values, classes)
    torch.testing.assert_close(seen.logits, model(pixel_values).logits, atol=1e-5, rtol=1e-5)
    output = model(pixel_values.requires_grad_(), output_attentions=True)
    pixel_values.requires_grad_(False)
    for image in range(6):  # one image and one logit at a time
        expected = torch.autograd.grad(output.logits[image, classes[image]], output.attentions, retain_graph=True)
        for layer, gradient in enumerate(seen.gradients):
            torch.testing.assert_close(gradient[image], expected[layer][image], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(seen.attentions[layer], output.attentions[layer])


def test_without_captum_occlusion_says_what_to_install(model, pixel_values, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UserError, match=r'expected captum, got none: pip install "vit-cifar\[demo\]"'):
        METHODS["occlusion"](look(model, pixel_values))


def test_frozen_weights_change_nothing(pixel_values):
    model = load_model()[0]
    classes = torch.zeros(6, dtype=torch.long)
    expected = METHODS["gradient rollout"](look(model, pixel_values, classes))
    frozen = METHODS["gradient rollout"](look(model.requires_grad_(False), pixel_values, classes))
    torch.testing.assert_close(frozen.values, expected.values)


def test_occlusion_equals_painting_patch_by_patch(model, pixel_values):
    classes = torch.tensor([3, 8, 8, 0, 6, 1])
    found = METHODS["occlusion"](look(model, pixel_values, classes))
    size = model.config.patch_size
    assert found.values.shape == (6, 32 // size, 32 // size) and found.to_itself is None
    whole = model(pixel_values).logits.softmax(-1)
    for row in range(32 // size):
        for column in range(32 // size):
            painted = pixel_values.clone()
            painted[:, :, size * row : size * (row + 1), size * column : size * (column + 1)] = 0
            fall = (whole - model(painted).logits.softmax(-1))[torch.arange(6), classes]
            torch.testing.assert_close(found.values[:, row, column], fall.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gradient rollout", "occlusion"])
def test_maps_for_a_class_change_with_the_class(model, pixel_values, name):
    one, other = (METHODS[name](look(model, pixel_values, torch.full((6,), c))).values for c in (3, 8))
    assert rank_correlation(one, other).max() < 0.99


@pytest.mark.parametrize("name", ["attention", "rollout", "random"])
def test_the_other_maps_do_not(model, pixel_values, name):
    one, other = (METHODS[name](look(model, pixel_values, torch.full((6,), c))).values for c in (3, 8))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", METHODS)
def test_an_image_has_the_same_map_in_any_batch_and_in_a_grid_that_is_not_square(model, pixel_values, name):
    wide = pixel_values.repeat(1, 1, 1, 2)[..., :48]
    classes = torch.arange(6)
    found = METHODS[name](look(model, wide, classes))
    size = model.config.patch_size
    assert found.values.shape == (6, 32 // size, 48 // size)
    alone = METHODS[name](look(model, wide[:1], classes[:1]))
    torch.testing.assert_close(alone.values[0], found.values[0], atol=1e-5, rtol=1e-3)


def test_deletion_and_insertion_equal_painting_one_image_after_another(model, pixel_values):
    classes = torch.tensor([3, 8, 8, 0, 6, 1])
    size = model.config.patch_size
    side = 32 // size
    values = torch.rand(6, side, side, generator=torch.Generator().manual_seed(3))
    curves = deletion_insertion(model, pixel_values, classes, values)
    assert curves.deletion.shape == curves.insertion.shape == (6, STEPS + 1)
    for image in (0, 5):
        order = sorted(range(side**2), key=lambda patch: -values[image].flatten()[patch])
        for step in (0, 1, 7, STEPS):
            gone = set(order[: round(side**2 * step / STEPS)])
            for curve, painted_over in ((curves.deletion, gone), (curves.insertion, set(range(side**2)) - gone)):
                painted = pixel_values[image : image + 1].clone()
                for patch in painted_over:
                    row, column = divmod(patch, side)
                    painted[:, :, size * row : size * (row + 1), size * column : size * (column + 1)] = 0
                expected = model(painted).logits.softmax(-1)[0, classes[image]].item()
                assert curve[image, step].item() == pytest.approx(expected, abs=1e-5)


def test_the_score_tells_a_good_order_from_a_bad_one():
    """A model that sees two patches alone: a map that names them scores best, one that names them last scores worst."""
    config = ViTCifarConfig(patch_embedding="linear", hidden_size=8, num_attention_heads=2, num_hidden_layers=1)

    class TwoPatches(ViTCifarForImageClassification):
        def forward(self, pixel_values, **kwargs):
            output = super().forward(pixel_values, **kwargs)
            score = pixel_values[:, 0, :4, :8].mean(dim=(1, 2))
            output.logits = torch.stack([10 * score, torch.zeros_like(score)], dim=1)
            return output

    model, images, classes = TwoPatches(config).eval(), torch.ones(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    best = torch.zeros(1, 8, 8)
    best[0, 0, :2] = 1
    scores = [deletion_insertion(model, images, classes, values).score.item() for values in (best, -best)]
    assert scores[0] > 0.4 and scores[0] == pytest.approx(-scores[1], abs=0.05)


def test_the_interval_holds_the_mean_and_narrows_with_more_values():
    few, many = (torch.randn(n, generator=torch.Generator().manual_seed(0)) + 3 for n in (50, 5000))
    for values in (few, many):
        low, high = bootstrap_interval(values)
        error = values.std().item() / len(values) ** 0.5
        assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.3 * error)
        assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.3 * error)


def test_randomized_is_another_model_of_the_same_kind_and_leaves_the_random_state(model, pixel_values):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fresh, again = randomized(model), randomized(model)
    assert torch.equal(torch.rand(1), expected)
    assert not fresh.training
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == shapes
    assert not torch.equal(fresh(pixel_values).logits, model(pixel_values).logits)
    assert torch.equal(fresh(pixel_values).logits, again(pixel_values).logits)


def test_rank_correlation_by_hand():
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    b = torch.tensor([[[10.0, 30.0], [20.0, 400.0]]])
    assert rank_correlation(torch.cat([a, a, a]), torch.cat([a**3, -a, b])).tolist() == pytest.approx([1, -1, 0.8])
    assert rank_correlation(torch.zeros_like(a), a).tolist() == [0]


def test_a_map_without_anything_has_no_entropy():
    assert AttentionMap(torch.zeros(1, 2, 2)).entropy.item() == 0
