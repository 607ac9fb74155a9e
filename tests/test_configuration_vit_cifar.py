"""The configuration: CIFAR-10's names, what it refuses and in which words, what it lets through on loading."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig

from vit_cifar import CIFAR10_CLASSES, ViTCifarConfig

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def reload(tmp_path, changes=None, **kwargs):
    """The configuration of a saved folder whose config.json somebody has changed."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (changes or {})))
    return ViTCifarConfig.from_pretrained(tmp_path, **kwargs)


# Labels


def test_the_ten_class_names_are_there_by_default():
    config = ViTCifarConfig()
    assert CIFAR10_CLASSES == NAMES
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: index for index, name in enumerate(NAMES)}
    assert config.num_labels == 10
    assert ViTCifarConfig(num_labels=10).id2label == dict(enumerate(NAMES))


def test_the_class_names_survive_saving(tmp_path):
    ViTCifarConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["9"] == "truck"
    config = reload(tmp_path)
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: index for index, name in enumerate(NAMES)}


def test_other_labels():
    assert ViTCifarConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config = ViTCifarConfig(id2label={0: "no", 1: "yes"})
    assert config.num_labels == 2
    assert config.label2id == {"no": 0, "yes": 1}
    assert ViTCifarConfig(id2label={"0": "no", "1": "yes"}, num_labels=2).id2label == {0: "no", 1: "yes"}


def test_a_saved_model_can_be_loaded_with_another_number_of_labels(tmp_path):
    ViTCifarConfig().save_pretrained(tmp_path)
    config = reload(tmp_path, num_labels=3)
    assert list(config.id2label.values()) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert config.problem_type == "single_label_classification"


@pytest.mark.parametrize("labels", [{"num_labels": 1}, {"id2label": {0: "age"}}])
def test_one_output_is_a_regression_also_after_saving(labels, tmp_path):
    config = ViTCifarConfig(**labels)
    assert (config.num_labels, config.problem_type) == (1, None)
    config.save_pretrained(tmp_path)
    assert (reload(tmp_path).num_labels, reload(tmp_path).problem_type) == (1, None)


def test_a_classifier_loaded_with_one_output_becomes_a_regression(tmp_path):
    ViTCifarConfig().save_pretrained(tmp_path)
    config = reload(tmp_path, num_labels=1)
    assert (config.num_labels, config.problem_type) == (1, None)


def test_a_config_that_is_given_one_output_becomes_a_regression():
    config = ViTCifarConfig()
    config.num_labels = 1
    assert (config.num_labels, config.problem_type) == (1, None)
    config.num_labels = 3
    assert list(config.id2label.values()) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert config.problem_type == "single_label_classification"
    with pytest.raises(ValueError, match="problem_type: expected regression with num_labels 1"):
        ViTCifarConfig(num_labels=1, problem_type="single_label_classification")


def test_no_labels_at_all(tmp_path):
    ViTCifarConfig(num_labels=0).save_pretrained(tmp_path)
    assert reload(tmp_path).num_labels == 0


# What is refused


@pytest.mark.parametrize(
    ("fields", "field", "expected", "got"),
    [
        ({"hidden_size": 192, "num_attention_heads": 5}, "num_attention_heads", "192", "5"),
        ({"hidden_size": 8, "num_attention_heads": 16}, "num_attention_heads", "8", "16"),
        ({"image_size": 32, "patch_size": 5}, "patch_size", "32", "5"),
        ({"image_size": 32, "patch_size": 64}, "patch_size", "32", "64"),
        ({"patch_embedding": "convolution"}, "patch_embedding", "linear, conv, conv_stem", "'convolution'"),
        ({"position_embedding": "rotary"}, "position_embedding", "learned, sinusoidal", "'rotary'"),
        ({"hidden_act": "gelly"}, "hidden_act", "gelu", "'gelly'"),
        ({"hidden_size": 0}, "hidden_size", "at least 1", "0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "at least 1", "0"),
        ({"num_attention_heads": 0}, "num_attention_heads", "at least 1", "0"),
        ({"intermediate_size": -1}, "intermediate_size", "at least 1", "-1"),
        ({"image_size": 0}, "image_size", "at least 1", "0"),
        ({"patch_size": -4}, "patch_size", "at least 1", "-4"),
        ({"num_channels": 0}, "num_channels", "at least 1", "0"),
        ({"num_labels": -1}, "num_labels", "at least 0", "-1"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob", "from 0 to 1", "1.5"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob", "from 0 to 1", "-0.1"),
        ({"drop_path_rate": 2}, "drop_path_rate", "from 0 to 1", "2"),
        ({"patch_drop_rate": float("nan")}, "patch_drop_rate", "from 0 to 1", "nan"),
        ({"initializer_range": -0.02}, "initializer_range", "at least 0", "-0.02"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps", "at least 0", "-1e-05"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels", "2", "3"),
        ({"num_labels": 10, "id2label": {0: "a", 1: "b"}}, "num_labels", "2", "10"),
        ({"id2label": {1: "a", 2: "b"}}, "id2label", "the keys 0 to 1", "1, 2"),
        ({"id2label": ["a", "b"]}, "id2label", "a dictionary of indices to names", "['a', 'b']"),
        ({"label2id": ["a", "b"]}, "label2id", "a dictionary of names to indices", "['a', 'b']"),
        ({"label2id": {"a": 0, "b": 0}}, "label2id", "an index of its own for each name", "{'a': 0, 'b': 0}"),
        ({"num_labels": 3, "label2id": {"a": 0, "b": 1}}, "num_labels", "2", "3"),
        (
            {"position_embedding": "sinusoidal", "hidden_size": 9, "num_attention_heads": 3},
            *("hidden_size", "even", "9"),
        ),
        ({"patch_embedding": "conv_stem", "image_size": 36, "patch_size": 6}, "patch_size", "power of 2", "6"),
        (
            {"patch_embedding": "conv_stem", "hidden_size": 18, "num_attention_heads": 2},
            *("hidden_size", "multiple of patch_size 4", "18"),
        ),
        *[
            (
                {"patch_embedding": "conv_stem", "stem_widths": widths},
                *("stem_widths", "at least 4 positive numbers for patch_size 4, the last of them hidden_size 192"),
                str(widths),
            )
            for widths in ([24, 48, 192], [24, 48, 48, 96], [24, 0, 48, 192], [])
        ],
        (
            {"stem_widths": [24, 48, 96, 192]},
            "stem_widths",
            "patch_embedding conv_stem",
            "'conv' and [24, 48, 96, 192]",
        ),
    ],
)
def test_refused_in_one_line_with_field_expected_and_got(fields, field, expected, got):
    with pytest.raises(ValueError) as refusal:
        ViTCifarConfig(**fields)
    message = str(refusal.value)
    assert "\n" not in message
    assert message.startswith(f"{field}: expected ")
    assert expected in message.rpartition("got")[0]
    assert message.endswith(f"got {got}")


def test_names_may_come_as_label2id():
    config = ViTCifarConfig(label2id={"yes": 1, "no": 0})
    assert (config.num_labels, config.id2label) == (2, {0: "no", 1: "yes"})


def test_refused_on_loading_too(tmp_path):
    ViTCifarConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^num_attention_heads: expected a divisor of hidden_size 192, got 7$"):
        reload(tmp_path, {"num_attention_heads": 7})


def test_a_field_that_was_assigned_later_is_checked_on_saving(tmp_path):
    config = ViTCifarConfig()
    config.num_attention_heads = 7
    with pytest.raises(StrictDataclassClassValidationError, match="expected a divisor of hidden_size 192, got 7"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [{"hidden_size": "192"}, {"num_hidden_layers": 2.0}, {"qkv_bias": "yes"}])
def test_wrong_types_are_refused(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        ViTCifarConfig(**fields)


@pytest.mark.parametrize("probability", [0, 1, 0.0, 1.0])
def test_both_ends_of_a_probability_are_fine(probability):
    fields = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_drop_rate")
    config = ViTCifarConfig(**dict.fromkeys(fields, probability))
    assert [getattr(config, field) for field in fields] == [probability] * 4


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("hiden_size", "hidden_size"),
        ("hiddenSize", "hidden_size"),
        ("HIDDEN_SIZE", "hidden_size"),
        ("img_size", "image_size"),
        ("patchsize", "patch_size"),
        ("num_heads", "num_attention_heads"),
        ("heads", "num_attention_heads"),
        ("num_layers", "num_hidden_layers"),
        ("num_classes", "num_labels"),
        ("num_label", "num_labels"),
        ("id2labels", "id2label"),
        ("dropout", "hidden_dropout_prob"),
        ("attention_dropout", "attention_probs_dropout_prob"),
        ("drop_path", "drop_path_rate"),
        ("patch_embeddings", "patch_embedding"),
        ("positional_embedding", "position_embedding"),
        ("layer_norm_epsilon", "layer_norm_eps"),
        ("output_projection", "attention_output_projection"),
        ("output_hidden_state", "output_hidden_states"),
    ],
)
def test_a_near_miss_is_refused_and_the_field_named(keyword, meant):
    with pytest.raises(ValueError) as refusal:
        ViTCifarConfig(**{keyword: 1})
    message = str(refusal.value)
    assert "\n" not in message
    assert message.startswith(f"{keyword}: expected a field of ViTCifarConfig")
    assert meant in message
    assert message.endswith(f"got '{keyword}'")


@pytest.mark.parametrize(
    "keyword",
    [
        *("attn_implementation", "torch_dtype", "name_or_path", "auto_map", "gradient_checkpointing", "use_cache"),
        *("is_decoder", "tie_word_embeddings", "tie_last_hidden_states", "encoder_stride", "pooler_act", "note"),
    ],
)
def test_keywords_that_are_no_near_misses_pass(keyword):
    assert ViTCifarConfig(**{keyword: None}).hidden_size == ViTCifarConfig().hidden_size


# Loading what a newer version wrote


@pytest.mark.parametrize("load", [ViTCifarConfig.from_pretrained, AutoConfig.from_pretrained])
def test_fields_of_a_newer_version_load(load, tmp_path):
    config = ViTCifarConfig(hidden_size=64, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    future = {
        "transformers_version": "9.9.9",
        "experts_implementation": None,
        "hidden_sizes": [64, 64],  # these look like misspelt fields
        "num_attention_head": 3,
        "image_sizes": {"height": 32},
        "drop_path_rates": [0.0, 0.1],
        "num_label": 10,
        "entirely_new": {"nested": [1, 2]},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | future))
    loaded = load(tmp_path)
    assert type(loaded) is ViTCifarConfig
    for field in ("hidden_size", "num_attention_heads", "image_size", "drop_path_rate", "id2label"):
        assert getattr(loaded, field) == getattr(config, field)


def test_every_field_survives_saving(tmp_path):
    config = ViTCifarConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        intermediate_size=100,
        hidden_act="relu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.2,
        initializer_range=0.03,
        layer_norm_eps=1e-6,
        image_size=64,
        patch_size=8,
        num_channels=1,
        qkv_bias=False,
        patch_embedding="conv_stem",
        stem_widths=[8, 8, 16, 16, 24, 64],
        position_embedding="sinusoidal",
        attention_output_projection=False,
        drop_path_rate=0.3,
        patch_drop_rate=0.4,
        embedding_initializer_range=1,
        problem_type="multi_label_classification",
    )
    defaults = ViTCifarConfig()
    own = [name for name in ViTCifarConfig.__annotations__ if not name.startswith("_")]
    assert len(own) == 20
    assert not [name for name in own if getattr(config, name) == getattr(defaults, name)]
    config.save_pretrained(tmp_path)
    loaded = reload(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.problem_type == "multi_label_classification"


def test_the_auto_class_makes_it_by_name():
    assert type(AutoConfig.for_model("vit_cifar", hidden_size=96)) is ViTCifarConfig
