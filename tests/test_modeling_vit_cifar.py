"""The model against slow, obvious computations, under every attention implementation, loaded in every way."""

import copy
import json
import math
import statistics
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import run_elsewhere
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessor,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import capture_outputs

from vit_cifar import CIFAR10_CLASSES, ViTCifarConfig, ViTCifarForImageClassification, ViTCifarModel
from vit_cifar.modeling_vit_cifar import (
    ViTCifarConvStem,
    ViTCifarDropPath,
    ViTCifarLayer,
    ViTCifarPatchEmbeddings,
    sinusoidal_positions,
)

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VARIANTS = [
    pytest.param(
        {"patch_embedding": patches, "position_embedding": positions, "attention_output_projection": projection},
        id=f"{patches}-{positions}-{'projection' if projection else 'none'}",
    )
    for patches, positions, projection in product(
        ("linear", "conv", "conv_stem"), ("learned", "sinusoidal"), (True, False)
    )
]


def build(model_class=ViTCifarForImageClassification, **fields) -> nn.Module:
    """A tiny model in eval mode with all numbers drawn at random, so that no bias of zero hides a mistake."""
    torch.manual_seed(0)
    model = model_class(ViTCifarConfig(**TINY | {"initializer_range": 0.2} | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def images(batch=3, height=32, width=32, channels=3, seed=1) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def assert_near(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# The whole model once more, slowly, from the state dict's names


def slow_positions(config: ViTCifarConfig) -> torch.Tensor:
    length, width = (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size
    table = torch.zeros(length, width)
    for position, column in product(range(length), range(width)):
        angle = position / 10000 ** (2 * (column // 2) / width)
        table[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table


def slow_forward(model: ViTCifarForImageClassification, pixel_values: torch.Tensor):
    """Logits and attention maps in float32, image by image, patch by patch, head by head."""
    config, weights = model.config, model.state_dict(keep_vars=True)
    size, width = config.patch_size, config.hidden_size
    head_width = width // config.num_attention_heads

    def linear(x, name):
        bias = weights.get(f"{name}.bias")
        return torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"]) + (0 if bias is None else bias)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def patches(image):
        name = "vit.embeddings.patch_embeddings.projection"
        if config.patch_embedding == "conv_stem":
            image, index, scale = image[None], 0, size
            while scale >= 1:
                for _ in range(2):
                    image = nn.functional.conv2d(image, weights[f"{name}.{index}.weight"], padding=1)
                    bn = {
                        key: weights[f"{name}.{index + 1}.{key}"][:, None, None]
                        for key in ("weight", "bias", "running_mean", "running_var")
                    }
                    image = (image - bn["running_mean"]) / (bn["running_var"] + 1e-5).sqrt() * bn["weight"] + bn["bias"]
                    image = gelu(image)
                    index += 3
                if scale > 1:
                    image = nn.functional.max_pool2d(image, 2)
                    index += 1
                scale //= 2
            return [image[0, :, row, column] for row, column in product(*map(range, image.shape[-2:]))]
        found = []
        for row, column in product(range(image.shape[1] // size), range(image.shape[2] // size)):
            patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            if config.patch_embedding == "linear":
                found.append(linear(patch.permute(1, 2, 0).flatten(), name))
            else:
                products = weights[f"{name}.weight"] * patch
                found.append(products.sum((1, 2, 3)) + weights[f"{name}.bias"])
        return found

    def forward(image):
        tokens = torch.stack([weights["vit.embeddings.cls_token"][0, 0], *patches(image)])
        if config.position_embedding == "learned":
            tokens = tokens + weights["vit.embeddings.position_embeddings"][0]
        else:
            tokens = tokens + slow_positions(config)
        maps = []
        for layer in range(config.num_hidden_layers):
            name = f"vit.layers.{layer}"
            normed = norm(tokens, f"{name}.layernorm_before")
            query, key, value = (linear(normed, f"{name}.attention.{part}_proj") for part in "qkv")
            heads, contexts = [], []
            for head in range(config.num_attention_heads):
                columns = slice(head * head_width, (head + 1) * head_width)
                scores = (query[:, None, columns] * key[None, :, columns]).sum(-1) / math.sqrt(head_width)
                heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
            maps.append(torch.stack(heads))
            for head in range(config.num_attention_heads):
                columns = slice(head * head_width, (head + 1) * head_width)
                contexts.append(torch.einsum("qk,kc->qc", maps[-1][head], value[:, columns]))
            context = torch.cat(contexts, dim=-1)
            if config.attention_output_projection:
                context = linear(context, f"{name}.attention.o_proj")
            tokens = tokens + context
            hidden = gelu(linear(norm(tokens, f"{name}.layernorm_after"), f"{name}.mlp.fc1"))
            tokens = tokens + linear(hidden, f"{name}.mlp.fc2")
        return linear(norm(tokens, "vit.layernorm")[0], "classifier"), maps

    results = [forward(image) for image in pixel_values]
    return [logits for logits, _ in results], [maps for _, maps in results]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_maps_and_their_gradients_equal_the_slow_computation(variant):
    model, pixel_values = build(**variant), images(2)
    outputs = model(pixel_values, output_attentions=True)
    gradients = torch.autograd.grad(outputs.logits[:, 3].sum(), outputs.attentions)
    for index, (logits, maps) in enumerate(zip(*slow_forward(model, pixel_values), strict=True)):
        assert_near(outputs.logits[index], logits, 1e-4)
        expected = torch.autograd.grad(logits[3], maps)
        for layer in range(2):
            assert_near(outputs.attentions[layer][index], maps[layer])
            assert_near(gradients[layer][index], expected[layer], 1e-3)


# Attention maps


@pytest.mark.parametrize("implementation", ["default", "eager", "sdpa", "flex_attention", "without_maps"])
def test_one_map_per_layer_under_every_attention_implementation(implementation):
    model, pixel_values = build(), images()
    fast = model(pixel_values).logits
    if implementation == "without_maps":  # a kernel of one's own
        sdpa = AttentionInterface()["sdpa"]
        AttentionInterface.register("without_maps", lambda *args, **kwargs: (sdpa(*args, **kwargs)[0], None))
    if implementation != "default":
        model.set_attn_implementation(implementation)
    outputs = model(pixel_values, output_attentions=True)
    assert isinstance(outputs.attentions, tuple) and len(outputs.attentions) == 2
    for attention in outputs.attentions:
        assert attention.shape == (3, 4, 65, 65)
        assert attention.min() >= 0
        assert_near(attention.sum(-1), torch.ones(3, 4, 65))
    assert_near(outputs.logits, fast)
    for gradient in torch.autograd.grad(outputs.logits[:, 0].sum(), outputs.attentions):
        assert gradient.isfinite().all() and gradient.abs().max() > 0
    if implementation != "flex_attention":  # which takes half a minute to compile
        assert_near(model(pixel_values).logits, outputs.logits)


def test_the_default_implementation_is_a_fused_one_and_gives_no_maps_unasked():
    model = build()
    assert model.config._attn_implementation == "sdpa"
    assert model(images()).attentions is None
    assert model(images(), output_attentions=False).attentions is None


def test_maps_asked_for_by_the_configuration(tmp_path):
    build().save_pretrained(tmp_path)
    model = ViTCifarForImageClassification.from_pretrained(tmp_path, output_attentions=True)
    assert len(model(images()).attentions) == 2
    model.set_attn_implementation("sdpa")
    assert len(model(images()).attentions) == 2
    assert model(images(), output_attentions=False).attentions is None
    model.save_pretrained(tmp_path / "again")
    again = ViTCifarForImageClassification.from_pretrained(tmp_path / "again")
    assert again.config._attn_implementation == "sdpa" and len(again(images()).attentions) == 2


def test_rows_sum_to_one_in_training_with_dropout_too():
    model = build(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.1, drop_path_rate=0.2).train()
    for attention in model(images(), output_attentions=True).attentions:
        assert_near(attention.sum(-1), torch.ones(3, 4, 65))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_dropout_acts_in_training_only(implementation):
    model, pixel_values = build(attention_probs_dropout_prob=0.5), images()
    model.set_attn_implementation(implementation)
    assert torch.equal(model(pixel_values).logits, model(pixel_values).logits)
    model.train()
    assert not torch.equal(model(pixel_values).logits, model(pixel_values).logits)


def test_two_threads_at_the_same_time_each_get_their_own_maps():
    model = build()
    inputs = [images(batch=2, seed=seed) for seed in range(3)]
    expected = [model(pixel_values, output_attentions=True) for pixel_values in inputs[:2]]
    expected.append(model(inputs[2]))
    barrier, failures = threading.Barrier(3), []

    def work(index):
        try:
            for _ in range(20):
                barrier.wait(timeout=60)
                outputs = model(inputs[index], output_attentions=index < 2)
                assert_near(outputs.logits, expected[index].logits)
                if index == 2:
                    assert outputs.attentions is None
                else:
                    assert len(outputs.attentions) == 2
                    for attention, right in zip(outputs.attentions, expected[index].attentions, strict=True):
                        assert_near(attention, right)
        except BaseException as error:
            barrier.abort()
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_hidden_states_run_from_the_embeddings_to_the_last_layer():
    model, pixel_values = build(), images()
    outputs = model.vit(pixel_values, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(outputs.hidden_states[0], model.vit.embeddings(pixel_values))
    assert torch.equal(model.vit.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])


def test_a_tuple_if_asked_for():
    logits, attentions = build()(images(), return_dict=False, output_attentions=True)
    assert logits.shape == (3, 10) and len(attentions) == 2
    logits, attentions = build(return_dict=False)(images(), output_attentions=True)
    assert logits.shape == (3, 10) and len(attentions) == 2


# Patch embedding


def test_linear_patches_are_flattened_by_row_column_channel():
    config = ViTCifarConfig(patch_embedding="linear", hidden_size=48, num_attention_heads=4)
    embedding = ViTCifarPatchEmbeddings(config)
    with torch.no_grad():
        embedding.projection.weight.copy_(torch.eye(48))
        embedding.projection.bias.zero_()
    # Each pixel says where it is: row 12, column 34, channel 1 is 12341.
    rows, columns, channels = torch.arange(32.0), torch.arange(32.0), torch.arange(3.0)
    image = rows[None, :, None] * 1000 + columns[None, None, :] * 10 + channels[:, None, None]
    patches = embedding(image[None])[0].detach()
    assert patches.shape == (64, 48)
    assert patches[0, :13].tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32, 1000]
    assert patches[1, :4].tolist() == [40, 41, 42, 50]  # the second patch lies to the right of the first
    assert patches[8, :4].tolist() == [4000, 4001, 4002, 4010]  # the ninth below it
    assert patches[63, -1] == 31312


def test_a_linear_embedding_is_a_convolution_with_its_weights_in_another_order():
    linear, conv = (
        ViTCifarPatchEmbeddings(ViTCifarConfig(**TINY, patch_embedding=kind)) for kind in ("linear", "conv")
    )
    with torch.no_grad():
        by_row_column_channel = linear.projection.weight.unflatten(1, (4, 4, 3))
        conv.projection.weight.copy_(by_row_column_channel.permute(0, 3, 1, 2))
        conv.projection.bias.copy_(linear.projection.bias)
    pixel_values = images(height=24, width=40)
    assert_near(linear(pixel_values), conv(pixel_values))


@pytest.mark.parametrize(("patch_size", "widths"), [(1, [32]), (2, [16, 32]), (4, [8, 16, 32]), (8, [4, 8, 16, 32])])
def test_the_stem_has_two_convolutions_per_scale_and_doubles_its_width(patch_size, widths):
    stem = ViTCifarConvStem(ViTCifarConfig(**TINY, patch_embedding="conv_stem", patch_size=patch_size))
    convolutions = [module for module in stem if isinstance(module, nn.Conv2d)]
    assert [module.out_channels for module in convolutions] == [width for width in widths for _ in range(2)]
    assert stem(images()).shape == (3, 32, 32 // patch_size, 32 // patch_size)


@pytest.mark.parametrize(("patch_size", "widths"), [(1, [32]), (4, [5, 6, 7, 32]), (8, [5, 6, 6, 7, 7, 32, 32, 32])])
def test_a_stem_of_given_widths_pools_after_every_second_convolution_and_before_its_norm(patch_size, widths):
    config = ViTCifarConfig(**TINY, patch_embedding="conv_stem", patch_size=patch_size, stem_widths=widths)
    stem = ViTCifarConvStem(config).eval()
    convolutions = [module for module in stem if isinstance(module, nn.Conv2d)]
    norms = [module for module in stem if isinstance(module, nn.BatchNorm2d)]
    assert [module.out_channels for module in convolutions] == widths
    x, pixels = images(), 32
    for number, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True), start=1):
        norm.running_mean.normal_()
        norm.weight.data.normal_()  # negative ones too, so that the order matters
        x = convolution(x)
        if number % 2 == 0 and pixels > 32 // patch_size:
            x, pixels = nn.functional.max_pool2d(x, 2), pixels // 2
        x = nn.functional.gelu(norm(x))
    assert_near(stem(images()), x)


# Positions


def test_the_sinusoidal_table_by_hand():
    table = sinusoidal_positions(65, 192)
    assert table.shape == (65, 192)
    assert table[0, ::2].tolist() == [0.0] * 96
    assert table[0, 1::2].tolist() == [1.0] * 96
    for position, column, value in [
        (1, 0, 0.841470985),  # sin 1
        (1, 1, 0.540302306),  # cos 1
        (2, 0, 0.909297427),  # sin 2
        (64, 1, 0.391857230),  # cos 64
        (1, 96, 0.009999833),  # sin (1 / 10000^(96/192)) = sin 0.01
        (1, 97, 0.999950000),  # cos 0.01
        (50, 96, 0.479425539),  # sin 0.5
        (3, 48, 0.295520207),  # sin (3 / 10000^(48/192)) = sin 0.3
        (64, 190, 0.007044103),  # sin (64 / 10000^(190/192)) = sin 0.00704416
    ]:
        assert table[position, column].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("through_the_disk", [False, True])
def test_sinusoidal_positions_are_added_as_they_are_and_never_saved(through_the_disk, tmp_path):
    model = build(ViTCifarModel, position_embedding="sinusoidal", embedding_initializer_range=1.0)
    if through_the_disk:
        model.save_pretrained(tmp_path)
        assert not [name for name in load_file(tmp_path / "model.safetensors") if "position" in name]
        model = ViTCifarModel.from_pretrained(tmp_path)
    pixel_values, embeddings = images(), model.embeddings
    table = slow_positions(model.config)
    tokens = embeddings(pixel_values)
    assert_near(tokens[:, 1:], embeddings.patch_embeddings(pixel_values) + table[1:])
    assert_near(tokens[:, 0], (embeddings.cls_token[0] + table[0]).expand(3, -1))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_positions_at_the_own_size_are_the_table_itself(positions):
    embeddings = build(position_embedding=positions).vit.embeddings
    table = embeddings.positions(32, 32)
    expected = embeddings.position_embeddings if positions == "learned" else sinusoidal_positions(65, 32)[None]
    assert torch.equal(table, expected)


def test_positions_for_another_size_keep_rows_columns_and_the_class_token():
    embeddings = build().vit.embeddings
    with torch.no_grad():
        grid = embeddings.position_embeddings[0, 1:].unflatten(0, (8, 8))
        grid[..., 0] = torch.arange(8.0)[:, None]  # says the row
        grid[..., 1] = torch.arange(8.0)[None, :]  # says the column
        grid[..., 2] = 7.0
    table = embeddings.positions(64, 24)
    assert table.shape == (1, 1 + 16 * 6, 32)
    assert torch.equal(table[:, 0], embeddings.position_embeddings[:, 0])
    resized = table[0, 1:].unflatten(0, (16, 6))
    assert_near(resized[..., 2], torch.full((16, 6), 7.0))
    assert_near(resized[..., 0], resized[:, :1, 0].expand(16, 6))
    assert (resized[1:, 0, 0] > resized[:-1, 0, 0]).all()
    assert_near(resized[..., 1], resized[:1, :, 1].expand(16, 6))
    assert (resized[0, 1:, 1] > resized[0, :-1, 1]).all()
    assert_near(resized[8, 0, 0], torch.tensor(3.75), 0.05)  # the middle of the ninth of 16 rows, in rows of 8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (24, 40), (4, 4)])
def test_other_image_sizes_work(variant, height, width):
    model, pixel_values = build(**variant), images(height=height, width=width)
    outputs = model(pixel_values, output_attentions=True)
    assert outputs.attentions[0].shape[-1] == 1 + height * width // 16
    assert_near(outputs.logits, model(pixel_values).logits)
    assert outputs.logits.isfinite().all()


# What only training does


@pytest.mark.parametrize(("rate", "kept"), [(0.25, 48), (0.5, 32), (0.9, 6), (1.0, 1)])
def test_patches_are_dropped_in_training_only_and_never_the_class_token(rate, kept):
    embeddings = build(patch_drop_rate=rate).vit.embeddings
    everything = embeddings(images(16))
    assert everything.shape[1] == 65
    some = embeddings.train()(images(16))
    assert some.shape == (16, 1 + kept, 32)
    assert torch.equal(some[:, 0], everything[:, 0])
    chosen = []
    for tokens, all_tokens in zip(some[:, 1:], everything[:, 1:], strict=True):
        indices = [(all_tokens == token).all(-1).nonzero().item() for token in tokens]
        assert len(set(indices)) == kept
        chosen.append(frozenset(indices))
    assert len(set(chosen)) > 8  # each image loses others
    assert not torch.equal(some, embeddings(images(16)))


def test_maps_are_smaller_when_patches_are_dropped():
    model = build(patch_drop_rate=0.5)
    assert model(images(), output_attentions=True).attentions[0].shape == (3, 4, 65, 65)
    assert model.train()(images(), output_attentions=True).attentions[0].shape == (3, 4, 33, 33)


def test_drop_path_keeps_the_mean_and_whole_samples():
    torch.manual_seed(0)
    drop_path, branch = ViTCifarDropPath(0.3).train(), torch.ones(20_000, 2, 3)
    dropped = drop_path(branch)
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))  # all of a sample or nothing
    per_sample = dropped[:, 0, 0]
    assert_near(per_sample.unique(), torch.tensor([0, 1 / 0.7]))
    five_deviations = 5 * math.sqrt(0.3 / 0.7 / 20_000)
    assert per_sample.mean().item() == pytest.approx(1, abs=five_deviations)
    assert drop_path.eval()(branch) is branch
    assert torch.equal(ViTCifarDropPath(1.0).train()(branch), torch.zeros_like(branch))


def test_drop_path_rises_from_layer_to_layer_and_is_off_in_eval():
    model = build(num_hidden_layers=5, drop_path_rate=0.4)
    assert [layer.drop_path.rate for layer in model.vit.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    without = build(num_hidden_layers=5)
    assert torch.equal(model(images()).logits, without(images()).logits)
    assert not torch.equal(model.train()(images()).logits, without(images()).logits)


def test_at_rate_1_the_residual_stream_is_left_alone_and_of_the_embeddings_nothing():
    for rates in ({"drop_path_rate": 1.0}, {"hidden_dropout_prob": 1.0}):
        model = build(num_hidden_layers=2, **rates)
        x = torch.randn(2, 17, model.config.hidden_size)
        assert torch.equal(model.vit.layers[1].train()(x), x)  # neither branch
        assert not torch.equal(model.vit.layers[1].eval()(x), x)
    assert not model.vit.embeddings.train()(images()).any()


# The tutorial's three variants and how weights start

TUTORIAL = {
    "basic": {"patch_embedding": "linear", "position_embedding": "learned"},
    "pe": {"patch_embedding": "linear", "position_embedding": "sinusoidal"},
    "pe_conv": {"patch_embedding": "conv", "position_embedding": "sinusoidal"},
}


def tutorial(name: str) -> ViTCifarForImageClassification:
    torch.manual_seed(0)
    config = ViTCifarConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=768,
        attention_output_projection=False,
        embedding_initializer_range=1.0,
        **TUTORIAL[name],
    )
    return ViTCifarForImageClassification(config)


@pytest.mark.parametrize(("name", "count"), [("basic", 4_918_090), ("pe", 4_905_610), ("pe_conv", 4_905_610)])
def test_the_tutorials_variants_have_its_number_of_parameters(name, count):
    model = tutorial(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert [name for name, _ in model.vit.layers[0].attention.named_parameters()] == [
        *("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")
    ]


@pytest.mark.parametrize("name", TUTORIAL)
def test_the_tutorials_variants_start_from_its_distributions(name):
    model = tutorial(name)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.weight.mean().item() == pytest.approx(0, abs=0.002)
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, nn.Conv2d):  # as PyTorch starts it: uniform up to one over the root of the fan-in
            bound = 48**-0.5
            for parameter in (module.weight, module.bias):
                assert parameter.abs().max() <= bound
                assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    embeddings = model.vit.embeddings
    assert embeddings.cls_token.std().item() == pytest.approx(1, abs=0.25)  # of 192 numbers
    if name == "basic":
        assert embeddings.position_embeddings.std().item() == pytest.approx(1, abs=0.03)


def test_linear_weights_are_truncated_at_two_not_at_two_deviations():
    torch.manual_seed(0)
    model = ViTCifarForImageClassification(ViTCifarConfig(**TINY, initializer_range=1.5))
    weight = torch.cat([module.weight.flatten() for module in model.modules() if isinstance(module, nn.Linear)])
    assert 1.99 < weight.abs().max() <= 2
    small = ViTCifarForImageClassification(ViTCifarConfig(**TINY, initializer_range=0.02))
    weight = torch.cat([module.weight.flatten() for module in small.modules() if isinstance(module, nn.Linear)])
    assert weight.abs().max() > 3 * 0.02


def test_weights_missing_from_a_checkpoint_start_like_those_of_a_new_model():
    torch.manual_seed(0)
    config = ViTCifarConfig(embedding_initializer_range=1.0, patch_embedding="conv_stem")
    model = ViTCifarForImageClassification.from_pretrained(None, config=config, state_dict={})
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.vit.embeddings.position_embeddings.std().item() == pytest.approx(1, abs=0.03)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 6
    for norm in norms:
        assert (norm.running_var == 1).all() and not norm.running_mean.any() and (norm.weight == 1).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_norms_keep_their_statistics_in_training(frozen):
    """An adapter's file, such as LoRA's, holds none: what was trained would not be what is loaded."""
    model = build(patch_embedding="conv_stem").requires_grad_(not frozen).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(images())
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()) == frozen


# What the model refuses, heads of other sizes, loss


@pytest.mark.parametrize("patches", ["linear", "conv", "conv_stem"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 32, 32), "pixel_values: expected 3 channels, got 1"),
        ((1, 3, 30, 32), "pixel_values: expected height and width that are multiples of patch_size 4, got 30 x 32"),
        ((1, 3, 32, 33), "pixel_values: expected height and width that are multiples of patch_size 4, got 32 x 33"),
        ((3, 32, 32), r"pixel_values: expected 4 dimensions, \(B, C, H, W\), got \(3, 32, 32\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(patches, shape, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(patch_embedding=patches)(torch.zeros(shape))


def test_fields_assigned_on_loading_are_checked_before_weights_are_made(tmp_path):
    build().save_pretrained(tmp_path)
    for fields, message in [
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size 32, got 5"),
        ({"patch_embedding": "stem"}, "patch_embedding: expected one of linear, conv, conv_stem, got 'stem'"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            ViTCifarForImageClassification.from_pretrained(tmp_path, **fields)


def test_other_heads_and_channels():
    model = build(num_labels=0)
    assert torch.equal(model(images()).logits, model.vit(images()).pooler_output)
    assert build(num_labels=7)(images()).logits.shape == (3, 7)
    assert build(num_channels=1)(images(channels=1)).logits.shape == (3, 10)
    assert build(qkv_bias=False).vit.layers[0].attention.q_proj.bias is None


def test_the_loss_is_cross_entropy():
    model, labels = build(), torch.tensor([1, 2, 9])
    outputs = model(images(), labels=labels)
    assert_near(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))
    # Trainer divides the loss of a model that takes num_items_in_batch by the number of entries of the labels.
    assert not model.accepts_loss_kwargs


def test_probabilities_as_labels_do_not_silently_train_with_another_loss():
    with pytest.raises(ValueError, match="target"):
        build()(images(), labels=torch.rand(3, 10).softmax(-1))


# Saving and loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model with its image processor."""
    folder = tmp_path_factory.mktemp("model")
    build(position_embedding="sinusoidal", patch_embedding="conv_stem").save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=3
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize(
    ("saved", "names", "labels", "problem_type"),
    [
        (10, {0: "age"}, torch.zeros(3), None),  # transformers makes one output a regression
        (1, {0: "a", 1: "b"}, torch.zeros(3, dtype=torch.long), "single_label_classification"),
    ],
)
def test_class_names_given_while_loading_settle_the_loss(saved, names, labels, problem_type, tmp_path):
    """transformers assigns them after the config has been made."""
    build(num_labels=saved).save_pretrained(tmp_path)
    named = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    model = ViTCifarForImageClassification.from_pretrained(tmp_path, **named, ignore_mismatched_sizes=True)
    assert model.config.problem_type == problem_type
    assert model(images(), labels=labels).loss > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_round_trip_keeps_every_bit_in_safetensors(variant, tmp_path):
    model = build(**variant)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "model.safetensors", "configuration_vit_cifar.py", "modeling_vit_cifar.py")
    }
    loaded = ViTCifarForImageClassification.from_pretrained(tmp_path)
    assert not loaded.training
    before, after, on_disk = model.state_dict(), loaded.state_dict(), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() == on_disk.keys()
    assert all(torch.equal(before[name], after[name]) and torch.equal(before[name], on_disk[name]) for name in before)
    assert torch.equal(loaded(images()).logits, model(images()).logits)


def test_the_auto_classes_with_the_package_imported(folder, picture):
    assert type(AutoConfig.from_pretrained(folder)) is ViTCifarConfig
    assert type(AutoModel.from_pretrained(folder)) is ViTCifarModel
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is ViTCifarForImageClassification
    inputs = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 32, 32)
    logits = model(**inputs).logits
    assert_near(AutoModel.from_pretrained(folder)(**inputs).pooler_output, model.vit(**inputs).pooler_output)
    answers = pipeline("image-classification", model=str(folder))(picture, top_k=10)
    assert {answer["label"] for answer in answers} == set(CIFAR10_CLASSES)
    scores = dict(zip(CIFAR10_CLASSES, logits[0].softmax(-1).tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(scores, abs=1e-5)


def test_the_auto_classes_in_a_process_that_cannot_import_the_package(folder, picture, tmp_path):
    script = """
import sys
sys.modules["vit_cifar"] = None  # from here on any import of it fails
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

folder, picture, answer = sys.argv[1:]
picture = Image.open(picture)
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModelForImageClassification.from_pretrained(folder, **trust)
inputs = AutoImageProcessor.from_pretrained(folder, **trust)(picture, return_tensors="pt")
outputs = model(**inputs, output_attentions=True)
model.save_pretrained("again")  # a stranger fine-tunes and publishes it in turn
again = AutoModelForImageClassification.from_pretrained("again", **trust)
torch.save(
    {
        "modules": {type(config).__module__.split(".")[0], type(model).__module__.split(".")[0]},
        "names": config.id2label,
        "logits": outputs.logits.detach(),
        "attentions": [attention.detach() for attention in outputs.attentions],
        "fast": model(**inputs).logits.detach(),
        "again": again(**inputs).logits.detach(),
        "pipeline": pipeline("image-classification", model=folder, **trust)(picture, top_k=10),
    },
    answer,
)
"""
    picture.save(tmp_path / "picture.png")
    finished = run_elsewhere(script, tmp_path, folder, tmp_path / "picture.png", tmp_path / "answer.pt")
    assert finished.returncode == 0, finished.stderr
    answer = torch.load(tmp_path / "answer.pt")
    assert answer["modules"] == {"transformers_modules"}
    assert answer["names"] == dict(enumerate(CIFAR10_CLASSES))

    model = ViTCifarForImageClassification.from_pretrained(folder)
    inputs = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
    outputs = model(**inputs, output_attentions=True)
    assert_near(answer["logits"], outputs.logits)
    assert_near(answer["fast"], outputs.logits)
    assert_near(answer["again"], outputs.logits)
    for theirs, ours in zip(answer["attentions"], outputs.attentions, strict=True):
        assert_near(theirs, ours)
    scores = dict(zip(CIFAR10_CLASSES, outputs.logits[0].softmax(-1).tolist(), strict=True))
    assert {one["label"]: one["score"] for one in answer["pipeline"]} == pytest.approx(scores, abs=1e-5)


def test_a_config_with_fields_of_a_newer_version_loads_with_its_weights(folder, tmp_path):
    model = ViTCifarForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_sizes": [1], "num_head": 1, "brand_new": {}}))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()).logits)


# Checkpointing, compilation, export, half precision


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    def gradients(model):
        torch.manual_seed(0)
        model.train()(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    fields = {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    plain, checkpointed = build(**fields), build(**fields)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    checkpointed.vit.layers[0].layernorm_before.register_forward_hook(lambda *_: calls.append(1))
    expected = gradients(plain)
    for name, gradient in gradients(checkpointed).items():
        assert_near(gradient, expected[name])
    assert len(calls) == 2  # the backward pass computes it again


def test_maps_and_their_gradients_with_gradient_checkpointing():
    model = build().train()
    outputs = model(images(), output_attentions=True)
    expected = torch.autograd.grad(outputs.logits[:, 0].sum(), outputs.attentions)
    model.gradient_checkpointing_enable()
    outputs = model(images(), output_attentions=True)
    assert len(outputs.attentions) == 2
    for gradient, right in zip(
        torch.autograd.grad(outputs.logits[:, 0].sum(), outputs.attentions), expected, strict=True
    ):
        assert_near(gradient, right)


@pytest.mark.parametrize(
    ("patches", "positions"), [("linear", "learned"), ("conv", "sinusoidal"), ("conv_stem", "learned")]
)
def test_the_whole_graph_compiles(patches, positions):
    torch._dynamo.reset()
    model, pixel_values = build(patch_embedding=patches, position_embedding=positions), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(pixel_values).logits, model(pixel_values).logits)


def test_the_whole_graph_compiles_when_the_first_call_asks_for_maps():
    torch._dynamo.reset()
    model, pixel_values = build(), images()
    outputs = torch.compile(model, fullgraph=True, backend="aot_eager")(pixel_values, output_attentions=True)
    expected = model(pixel_values, output_attentions=True)
    assert_near(outputs.logits, expected.logits)
    for attention, right in zip(outputs.attentions, expected.attentions, strict=True):
        assert_near(attention, right)


def test_each_map_comes_once_within_another_model():
    """Whose own hooks go into it as well."""

    class Composite(PreTrainedModel):
        config_class, _can_record_outputs = ViTCifarConfig, {"hidden_states": ViTCifarLayer}
        _supports_sdpa = _supports_attention_backend = True

        def __init__(self, config):
            super().__init__(config)
            self.tower = ViTCifarModel(config)
            self.post_init()

        @capture_outputs
        def forward(self, pixel_values, **kwargs):
            return BaseModelOutput(last_hidden_state=self.tower(pixel_values, **kwargs).last_hidden_state)

    model = Composite(build().config)
    model(images(), output_hidden_states=True)
    outputs = model.tower(images(), output_attentions=True, output_hidden_states=True)
    assert (len(outputs.attentions), len(outputs.hidden_states)) == (2, 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_an_attention_mask_hides_tokens(attention, dtype):
    model, pixel_values = build(attn_implementation=attention).eval(), images()
    tokens = model(pixel_values, output_attentions=True).attentions[0].shape[-1]
    assert_near(model(pixel_values, attention_mask=None).logits, model(pixel_values).logits)
    kept = (torch.arange(tokens) < 3).expand(1, 1, tokens, tokens)
    mask = kept if dtype == torch.bool else torch.where(kept, 0.0, -torch.inf)
    for attention in model(pixel_values, attention_mask=mask, output_attentions=True).attentions:
        assert attention[..., 3:].eq(0).all()
    assert_near(
        model(pixel_values, attention_mask=mask).logits,
        model(pixel_values, attention_mask=mask, output_attentions=True).logits,
    )


def test_training_compiles_too():
    torch._dynamo.reset()
    model = build(
        drop_path_rate=0.2, patch_drop_rate=0.25, hidden_dropout_prob=0.1, patch_embedding="conv_stem"
    ).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("patches", ["linear", "conv", "conv_stem"])
@pytest.mark.parametrize("with_maps", [False, True])
def test_export_with_a_dynamic_batch(patches, with_maps):
    model = build(patch_embedding=patches, position_embedding="sinusoidal")
    options = {"output_attentions": True} if with_maps else {}
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=512)}} | dict.fromkeys(options)
    program = torch.export.export(model, (images(3),), options, dynamic_shapes=shapes).module()
    for batch in (1, 3, 10):
        outputs, expected = program(images(batch), **options), model(images(batch), **options)
        assert_near(outputs.logits, expected.logits)
        if with_maps:
            for attention, right in zip(outputs.attentions, expected.attentions, strict=True):
                assert_near(attention, right)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_near_float32(variant):
    model, pixel_values = build(**variant), images()
    expected = model(pixel_values).logits
    half = copy.deepcopy(model).bfloat16()
    outputs = half(pixel_values, output_attentions=True)  # the model casts the pixels itself
    assert outputs.logits.dtype == torch.bfloat16
    spread = statistics.pstdev(expected.flatten().tolist())
    assert_near(outputs.logits.float(), expected, 0.1 * spread)
    assert_near(half(pixel_values).logits.float(), expected, 0.1 * spread)
    for attention in outputs.attentions:
        assert_near(attention.float().sum(-1), torch.ones(3, 4, 65), 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(model(pixel_values, output_attentions=True).logits.float(), expected, 0.1 * spread)
    assert half(images(height=48, width=24)).logits.isfinite().all()  # interpolation in bfloat16


def test_a_model_saved_in_bfloat16_is_loaded_in_bfloat16(tmp_path):
    build().bfloat16().save_pretrained(tmp_path)
    assert ViTCifarForImageClassification.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert ViTCifarForImageClassification.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_copy_is_independent_and_gives_maps():
    model = build()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert len(twin(images(), output_attentions=True).attentions) == 2
    assert twin(images()).logits.abs().max() > 0


def test_a_token_of_the_convolutional_stem_sees_32_pixels():
    """docs/recipes.md says so: 14 px on each side of its own 4."""
    torch.manual_seed(0)
    config = ViTCifarConfig(patch_embedding="conv_stem", hidden_size=16, num_attention_heads=2, image_size=96)
    stem = ViTCifarModel(config).eval().embeddings.patch_embeddings.projection
    images = torch.randn(8, 3, 96, 96, requires_grad=True)
    stem(images)[:, :, 12, 12].sum().backward()
    for axis in (0, 1):
        seen = (images.grad != 0).any(dim=0).any(dim=0).any(dim=axis).nonzero().flatten()
        assert seen.tolist() == list(range(48 - 14, 48 + 4 + 14))
