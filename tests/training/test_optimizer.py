import copy

import pytest
import torch
from transformers import get_scheduler

from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification
from vit_cifar.training.optimizer import (
    Muon,
    MuonWithAdamW,
    decayed_parameter_names,
    muon_parameter_names,
    orthogonalize,
)


def build() -> ViTCifarForImageClassification:
    torch.manual_seed(0)
    return ViTCifarForImageClassification(
        ViTCifarConfig(
            patch_embedding="conv_stem",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
        )
    )


def both(model) -> MuonWithAdamW:
    return MuonWithAdamW(model, lr=1e-3, muon_lr=0.02, weight_decay=0.1, dtype=torch.float32)


def train(model, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(4, 3, 32, 32, generator=generator), labels=torch.arange(4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())


def test_every_parameter_is_in_one_place():
    model = build()
    optimizer = both(model)
    memory = [p.data_ptr() for group in optimizer.param_groups for p in group["params"]]
    assert sorted(memory) == sorted(p.data_ptr() for p in model.parameters())


def test_what_is_decayed_and_what_muon_trains():
    names = [name for name, _ in build().named_parameters()]
    decayed, by_muon = decayed_parameter_names(build()), muon_parameter_names(build())
    for name in names:
        vector = name.endswith((".bias", "cls_token", "position_embeddings")) or "norm" in name
        stem_norm = "projection" in name and build().get_parameter(name).ndim == 1
        assert (name in decayed) == (not (vector or stem_norm)), name
    assert "classifier.weight" in decayed
    assert set(by_muon) == set(decayed) - {"classifier.weight"}


@pytest.mark.parametrize("embedding", ["linear", "conv"])
def test_a_plain_patch_embedding_is_not_for_muon(embedding):
    model = ViTCifarForImageClassification(ViTCifarConfig(patch_embedding=embedding, num_hidden_layers=1))
    assert all(".layers." in name for name in muon_parameter_names(model))


def test_equals_the_two_optimizers_by_hand(monkeypatch):
    monkeypatch.setattr(
        torch.optim._muon,
        "_zeropower_via_newtonschulz",
        lambda update, *_: orthogonalize(update[None], torch.float32)[0],
    )
    model, twin = build(), build()
    train(model, both(model))

    by_muon, decayed = muon_parameter_names(twin), decayed_parameter_names(twin)
    others = {name: p for name, p in twin.named_parameters() if name not in by_muon}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for name, p in others.items() if name in decayed], "weight_decay": 0.1},
            {"params": [p for name, p in others.items() if name not in decayed], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    flat = {name: torch.nn.Parameter(twin.get_parameter(name).detach().flatten(1).clone()) for name in by_muon}
    muon = torch.optim.Muon(flat.values(), lr=0.02, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        twin(torch.randn(4, 3, 32, 32, generator=generator), labels=torch.arange(4)).loss.backward()
        for name, matrix in flat.items():
            matrix.grad = twin.get_parameter(name).grad.flatten(1)
        muon.step()
        adamw.step()
        with torch.no_grad():
            for name, matrix in flat.items():
                twin.get_parameter(name).copy_(matrix.view_as(twin.get_parameter(name)))
        twin.zero_grad()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Products of several matrices at once may be rounded otherwise than of one.
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_makes_about_the_steps_of_torchs_muon_in_bf16(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    own, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    steps = Muon([own], 0.02, 0.1, torch.bfloat16), torch.optim.Muon([theirs], 0.02, 0.1)
    for _ in range(5):
        own.grad = theirs.grad = torch.randn(shape, generator=generator)
        for one in steps:
            one.step()
    torch.testing.assert_close(own - start, theirs - start, rtol=0.05, atol=0.002)


@pytest.mark.parametrize("shape", [(48, 200), (200, 48), (48, 48)])
def test_orthogonalizes_as_newton_and_schulz_do_step_by_step(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.logspace(0, -5, len(values), dtype=torch.float64)  # from large to hardly there, as in a gradient
    matrix = left * values @ right
    expected = matrix / matrix.norm()
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    found, negative = orthogonalize(torch.stack([matrix.float(), -2 * matrix.float()]), torch.float32)
    torch.testing.assert_close(negative, -found)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)
    values = (left.T @ found.double() @ right.T).diag()
    assert values[: len(values) // 2].min() > 0.5 and values.max() < 1.5


def test_a_loaded_state_goes_on_as_if_unbroken():
    model = build()
    optimizer = both(model)
    train(model, optimizer)
    twin = copy.deepcopy(model)
    resumed = MuonWithAdamW(twin, lr=1.0, muon_lr=1.0, weight_decay=0.0, dtype=torch.float32)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    train(twin, resumed)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_scheduler_scales_both():
    optimizer = both(build())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 5e-4, 5e-4]


@pytest.mark.parametrize(("name", "words"), [("polynomial", {}), ("cosine_with_min_lr", {"min_lr_rate": 0.1})])
def test_transformers_schedules_that_ask_for_a_learning_rate_scale_both(name, words):
    optimizer = both(build())
    scheduler = get_scheduler(name, optimizer, 0, 10, scheduler_specific_kwargs=words)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    muon, *adamw = (group["lr"] for group in optimizer.param_groups)
    assert 0 < muon < 0.015 and adamw == pytest.approx([muon / 20, muon / 20])


def test_parameters_whose_memory_moves_are_still_trained():
    """As they do when Trainer prepares a model for several processes."""
    model, twin = build(), build()
    optimizer = both(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    train(model, optimizer)
    train(twin, both(twin))
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
