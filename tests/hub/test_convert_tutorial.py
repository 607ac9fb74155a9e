"""The converter against an independent implementation of the tutorial's models, and against numbers worked by hand."""

import math
import pickle

import pytest
import torch
from helpers import run_elsewhere, run_here
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification
from tutorial_model import TutorialViT

from vit_cifar.hub.convert_tutorial import ConversionError, convert_tutorial
from vit_cifar.hub.folder import FolderError
from vit_cifar.training.data import normalize

VARIANTS = ("basic", "pe", "pe_conv")


def tutorial_model(variant):
    """Weights far from their start, so that every tensor leaves its mark on the logits."""
    torch.manual_seed(0)
    model = TutorialViT(variant).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 0.1)
        if ".fn.0.weight" in name or name == "mlp_head.0.weight":  # a norm's
            parameter.data += 1
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def converted(request, tmp_path_factory):
    """(the tutorial's model, the folder made of its checkpoint, variant)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = tutorial_model(request.param)
    torch.save(model.state_dict(), folder / "checkpoint.pth")
    recipe, _ = convert_tutorial(folder / "checkpoint.pth", folder / "model")
    assert recipe == f"tutorial_{request.param}"
    return model, folder / "model", request.param


def test_logits_and_attention_equal_the_tutorials(converted):
    reference, folder, _ = converted
    model = AutoModelForImageClassification.from_pretrained(folder)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(images)
        outputs = model(images, output_attentions=True)
    assert expected.std() > 0.5  # no agreement of zeros
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.attentions[-1], reference.last_attention, atol=1e-5, rtol=0)
    assert reference.last_attention.amax() > 10 / 65  # nor of uniform maps


def test_every_tensor_has_an_effect_and_its_own_place(converted):
    reference, folder, _ = converted
    model = AutoModelForImageClassification.from_pretrained(folder)
    ours = {tuple(tensor.flatten()[:8].tolist()) for tensor in model.state_dict().values()}
    theirs = {tuple(tensor.flatten()[:8].tolist()) for tensor in reference.state_dict().values()}
    assert ours == theirs and len(theirs) == len(reference.state_dict())


def test_the_folder_loads_without_the_package_and_normalises_as_the_tutorial(converted, tmp_path):
    reference, folder, _ = converted
    script = """
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "vit_cifar" not in sys.modules
torch.save(model(torch.ones(1, 3, 32, 32)).logits, "logits.pt")
"""
    finished = run_elsewhere(script, tmp_path, folder)
    assert finished.returncode == 0, finished.stderr
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), reference(torch.ones(1, 3, 32, 32)), atol=1e-5, rtol=0
    )

    image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    expected = normalize(image[None], mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


# Worked out by hand from the description of the tutorial's model, so that a misreading that reference and package
# share would show.


def test_parameter_counts_by_hand(converted):
    _, folder, variant = converted
    layer = 2 * 2 * 192 + 3 * (192 * 192 + 192) + (192 * 768 + 768) + (768 * 192 + 192)
    assert layer == 407_808
    patches, head = 48 * 192 + 192, 2 * 192 + 192 * 10 + 10
    expected = 192 + patches + 12 * layer + head + (65 * 192 if variant == "basic" else 0)
    assert expected == (4_918_090 if variant == "basic" else 4_905_610)
    assert AutoModelForImageClassification.from_pretrained(folder).num_parameters() == expected


def first_patch_image():
    """Black, but for the first patch: red, green, blue of row r and column c are 100, 200, 300 + 10 r + c."""
    image = torch.zeros(1, 3, 32, 32)
    for channel in range(3):
        for row in range(4):
            for column in range(4):
                image[0, channel, row, column] = 100 * (channel + 1) + 10 * row + column
    return image


def convert(state, folder):
    torch.save(state, folder / "checkpoint.pth")
    return convert_tutorial(folder / "checkpoint.pth", folder / "model")[1]


def test_order_of_a_patchs_48_numbers_by_hand(tmp_path):
    state = tutorial_model("pe").state_dict()
    state["patchembedding.projection.1.weight"] = torch.eye(192, 48)  # output i is the i-th number of the patch
    state["patchembedding.projection.1.bias"] = torch.zeros(192)
    embed = convert(state, tmp_path).vit.embeddings.patch_embeddings
    patches = embed(first_patch_image())
    assert patches[0, 0, :48].tolist() == [
        *(100, 200, 300, 101, 201, 301, 102, 202, 302, 103, 203, 303),
        *(110, 210, 310, 111, 211, 311, 112, 212, 312, 113, 213, 313),
        *(120, 220, 320, 121, 221, 321, 122, 222, 322, 123, 223, 323),
        *(130, 230, 330, 131, 231, 331, 132, 232, 332, 133, 233, 333),
    ]
    assert patches[0, 1:].abs().sum() == 0
    second_row = torch.zeros(1, 3, 32, 32)
    second_row[0, 0, 4, 9] = 7.0  # row 4 and column 9: second row of patches, third from the left, its number 3
    assert embed(second_row)[0].nonzero().tolist() == [[8 + 2, 3]]


def test_a_convolutions_weight_by_hand(tmp_path):
    state = tutorial_model("pe_conv").state_dict()
    weight = torch.zeros(192, 3, 4, 4)
    weight[0, 2, 1, 3] = weight[1, 0, 3, 0] = 1.0
    state["patchembedding.projection.0.weight"] = weight
    state["patchembedding.projection.0.bias"] = torch.zeros(192)
    patches = convert(state, tmp_path).vit.embeddings.patch_embeddings(first_patch_image())
    assert patches[0, 0, :3].tolist() == [313, 130, 0]  # blue of row 1 and column 3; red of row 3 and column 0


def test_entries_of_the_position_table_by_hand(tmp_path):
    table = convert(tutorial_model("pe").state_dict(), tmp_path).vit.embeddings.positions(32, 32)[0]
    assert table.shape == (65, 192)
    for position, column, expected in (
        (0, 0, 0.0),  # sin 0
        (0, 1, 1.0),  # cos 0
        (1, 0, 0.8414710),  # sin 1
        (1, 1, 0.5403023),  # cos 1
        (1, 2, 0.7885930),  # sin(10000^(-2/192)) = sin 0.9085176
        (1, 3, 0.6149155),  # cos of the same
        (64, 190, 0.0070444),  # sin(64 / 10000^(190/192)) = sin(64 * 0.000110069)
        (64, 191, 0.9999752),  # cos of the same
    ):
        assert table[position, column].item() == pytest.approx(expected, abs=2e-6), (position, column)


def test_attention_by_hand(tmp_path):
    """The class token's key is +1 in heads 0 to 5 and -1 in the others, a patch's is 0, every query is 1.

    So its score is 16 * 1 / sqrt(16) = 4 in head 0 and -4 in head 11, that of a patch 0.
    """
    state = {name: torch.zeros_like(tensor) for name, tensor in tutorial_model("basic").state_dict().items()}
    state["patchembedding.cls_token"][..., :96] = 1
    state["patchembedding.cls_token"][..., 96:] = -1  # mean 0, variance 1: the norm leaves it as it is
    last = "transformer.11.work1.fn"
    state[f"{last}.0.weight"] += 1
    state[f"{last}.1.query.bias"] += 1
    state[f"{last}.1.key.weight"] = torch.eye(192)
    attention = convert(state, tmp_path)(torch.zeros(1, 3, 32, 32), output_attentions=True).attentions[-1]
    for head, score in ((0, 4.0), (11, -4.0)):
        expected = math.exp(score) / (math.exp(score) + 64)  # 0.46036 and 0.00029
        assert attention[0, head, 0, 0].item() == pytest.approx(expected, rel=1e-3)
        assert attention[0, head, 17, 30].item() == pytest.approx((1 - expected) / 64, rel=1e-3)


# What goes wrong is said in one line, and nothing is written.


def damaged(change):
    state = tutorial_model("pe_conv").state_dict()
    change(state)
    return state


class NotATensor:
    """A pickle that names a class, as one that runs code would."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged(lambda s: s.pop("mlp_head.1.bias")), "missing: mlp_head.1.bias"),
        (damaged(lambda s: s.update(extra=torch.zeros(1))), "unexpected: extra"),
        (damaged(lambda s: s.update({7: torch.zeros(1)})), "unexpected: 7"),
        (
            damaged(lambda s: s.update({"mlp_head.1.weight": torch.zeros(100, 192)})),
            "misshapen: mlp_head.1.weight (100, 192) instead of (10, 192)",
        ),
        (
            damaged(lambda s: [s.pop(name) for name in list(s) if name.startswith("transformer.11.")]),
            "missing: transformer.11.work1.fn.0.weight, transformer.11.work1.fn.0.bias, "
            "transformer.11.work1.fn.1.query.weight, transformer.11.work1.fn.1.query.bias, "
            "transformer.11.work1.fn.1.key.weight and 9 more",
        ),
        (damaged(lambda s: s.clear()), "missing: patchembedding.cls_token"),
        ({"epoch": 3, "state_dict": {}}, "with tensors alone, got int at 'epoch'"),
        ([torch.zeros(1)], "a state dict, got list"),
        *[
            (
                damaged(lambda s, change=change: s.update({"mlp_head.1.weight": change(s["mlp_head.1.weight"])})),
                message,
            )
            for message, change in (
                ("expected dense tensors, got another kind at 'mlp_head.1.weight'", torch.Tensor.to_sparse),
                ("expected dense tensors, got another kind at 'mlp_head.1.weight'", lambda tensor: tensor.to("meta")),
                ("expected finite real numbers, got others in mlp_head.1.weight", lambda tensor: tensor / 0),
                ("expected finite real numbers, got others in mlp_head.1.weight", lambda tensor: tensor + 0j),
            )
        ],
    ],
    ids=[
        *("missing", "unexpected", "numbered", "misshapen", "shallow", "empty", "wrapped", "list"),
        *("sparse", "meta", "not finite", "complex"),
    ],
)
def test_a_checkpoint_that_is_another_models(content, message, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ConversionError) as error:
        convert_tutorial(tmp_path / "checkpoint.pth", tmp_path / "model")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "empty").touch()
    (tmp_path / "pickle").write_bytes(pickle.dumps(NotATensor()))
    torch.save(tutorial_model("pe").state_dict(), tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:1_000_000])
    torch.save(NotATensor(), tmp_path / "class")
    before = sorted(tmp_path.iterdir())
    for name in ("text", "empty", "pickle", "half", "class", "nowhere"):
        with pytest.raises(ConversionError) as error:
            convert_tutorial(tmp_path / name, tmp_path / "model")
        assert str(error.value).startswith("checkpoint: expected") and "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path):
    torch.save(tutorial_model("pe").state_dict(), tmp_path / "checkpoint.pth")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("mine")
    for taken in (tmp_path / "model", tmp_path / "checkpoint.pth", tmp_path / "checkpoint.pth" / "below"):
        with pytest.raises(FolderError, match="output: expected a"):
            convert_tutorial(tmp_path / "checkpoint.pth", taken)
    assert (tmp_path / "model" / "config.json").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "model"]


def test_the_command(tmp_path):
    torch.save(tutorial_model("basic").state_dict(), tmp_path / "cifar_vit_basic.pth")
    command = ("vit_cifar", "convert-tutorial", tmp_path / "cifar_vit_basic.pth", tmp_path / "new")
    finished = run_here(*command)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"tutorial_basic, 4,918,090 parameters: {tmp_path / 'new'}\n"
    again = run_here(*command)
    assert again.returncode == 2 and again.stdout == ""
    (line,) = again.stderr.strip().splitlines()
    assert line.startswith("vit-cifar: output: expected a new or an empty folder")
