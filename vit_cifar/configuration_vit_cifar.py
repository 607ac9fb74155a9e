"""Configuration of ViT-CIFAR. It travels with the weights as remote code: it needs torch and transformers only."""

from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PATCH_EMBEDDINGS = ("linear", "conv", "conv_stem")
POSITION_EMBEDDINGS = ("learned", "sinusoidal")
# Keywords that transformers itself accepts in every config; they only look like misspelt fields of this one.
TRANSFORMERS_KEYWORDS = ("is_decoder", "tie_word_embeddings", "tie_last_hidden_states")


@strict
class ViTCifarConfig(PreTrainedConfig):
    r"""
    Configuration of a Vision Transformer for small images. The names are those of transformers' `ViTConfig`; the
    fields that only this model has are listed here.

    Args:
        patch_embedding (`"linear"`, `"conv"` or `"conv_stem"`, defaults to `"conv"`):
            `linear` cuts the image into patches and projects each, flattened in the order (row, column, channel);
            `conv` is one convolution with kernel and stride `patch_size`; `conv_stem` is overlapping 3x3 convolutions
            with max pooling between them (Xiao et al. 2021, arXiv:2106.14881).
        stem_widths (`list[int]`, *optional*):
            Number of filters of each convolution of `conv_stem`, the last of them `hidden_size`; pooling halves the
            image after every second one until a position is a patch. By default two convolutions per scale, whose
            width doubles at each scale.
        position_embedding (`"learned"` or `"sinusoidal"`, defaults to `"learned"`):
            A learned table, or the fixed one of Vaswani et al. 2017 (arXiv:1706.03762, section 3.5).
        attention_output_projection (`bool`, defaults to `True`):
            Whether a linear layer mixes the heads after attention.
        drop_path_rate (`float`, defaults to 0.0):
            Probability of skipping a residual branch in the last layer, rising linearly from 0 in the first one
            (Huang et al. 2016, arXiv:1603.09382).
        patch_drop_rate (`float`, defaults to 0.0):
            Share of patch tokens left out of each training image (Liu et al. 2023, arXiv:2208.07220). Never in eval.
        embedding_initializer_range (`float`, defaults to 0.02):
            Standard deviation of the class token and of learned positions at the start.

    Raises:
        ValueError: at construction, in one line with field, expected and got, for sizes below 1, probabilities
            outside 0..1, unknown words, heads that do not divide the width, patches that do not divide the image,
            `num_labels` that disagrees with `id2label`, class numbers with a gap, and a keyword that looks like
            a misspelt field. huggingface_hub's `StrictDataclassFieldValidationError`: a value of the wrong type.

    Example:

    ```python
    >>> from vit_cifar import ViTCifarConfig, ViTCifarForImageClassification

    >>> config = ViTCifarConfig(patch_embedding="conv_stem", hidden_size=128, num_attention_heads=4)
    >>> model = ViTCifarForImageClassification(config)
    ```"""

    model_type = "vit_cifar"

    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 768
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-5
    image_size: int = 32
    patch_size: int = 4
    num_channels: int = 3
    qkv_bias: bool = True
    patch_embedding: str = "conv"
    stem_widths: list[int] | None = None
    position_embedding: str = "learned"
    attention_output_projection: bool = True
    drop_path_rate: float | int = 0.0
    patch_drop_rate: float | int = 0.0
    embedding_initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and not (isinstance(num_labels, int) and num_labels >= 0):
            raise ValueError(f"num_labels: expected an integer of at least 0, got {num_labels!r}")
        for name, kind in (("id2label", "of indices to names"), ("label2id", "of names to indices")):
            if not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name}: expected a dictionary {kind}, got {getattr(self, name)!r}")
        if self.id2label is None and self.label2id:
            self.id2label = {index: name for name, index in self.label2id.items()}
            if len(self.id2label) != len(self.label2id):
                raise ValueError(f"label2id: expected an index of its own for each name, got {self.label2id}")
        # A dictionary that was saved carries its model_type. There, unknown fields are a newer version's, and
        # num_labels is what `from_pretrained(..., num_labels=3)` asks for: both are transformers' own business.
        loaded = "model_type" in kwargs
        if not loaded:
            self._refuse_near_misses(kwargs)
            if self.stem_widths is not None and self.patch_embedding != "conv_stem":
                raise ValueError(
                    f"stem_widths: expected patch_embedding conv_stem with it, got {self.patch_embedding!r} and "
                    f"{self.stem_widths}"
                )
            if num_labels is not None and self.id2label is not None and num_labels != len(self.id2label):
                raise ValueError(
                    f"num_labels: expected {len(self.id2label)}, the number of names in id2label, got {num_labels}"
                )
        if self.id2label is None and num_labels in (None, len(CIFAR10_CLASSES)):
            self.id2label = dict(enumerate(CIFAR10_CLASSES))
        if num_labels is None:
            num_labels = len(self.id2label)
        if self.problem_type is None and num_labels != 1:
            # Left unset, transformers takes float labels for a multi-label task and trains with the wrong loss.
            self.problem_type = "single_label_classification"
        elif self.problem_type == "single_label_classification" and num_labels == 1:
            if not loaded:
                raise ValueError("problem_type: expected regression with num_labels 1, got single_label_classification")
            self.problem_type = None  # a classifier reloaded with one output: transformers makes that a regression
        super().__post_init__(**kwargs)
        if sorted(self.id2label) != list(range(len(self.id2label))):
            got = ", ".join(map(str, self.id2label))
            raise ValueError(
                f"id2label: expected the keys 0 to {len(self.id2label) - 1}, one for each class, got {got}"
            )
        if self.label2id is None:
            self.label2id = {name: index for index, name in self.id2label.items()}
        self.validate_architecture()  # here as well as by @strict, which would wrap the one line into two

    @PreTrainedConfig.num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        PreTrainedConfig.num_labels.fset(self, num_labels)
        if num_labels == 1 and self.problem_type == "single_label_classification":
            self.problem_type = None  # a regression: the cross-entropy of one class is 0 and trains nothing
        elif num_labels > 1 and self.problem_type is None:
            self.problem_type = "single_label_classification"

    def _refuse_near_misses(self, kwargs: dict) -> None:
        """transformers stores unknown keywords silently, so a misspelt field would train another model."""
        fields = [*self.__dataclass_fields__, "num_labels", "output_attentions"]
        for key in kwargs:
            if hasattr(type(self), key) or key in TRANSFORMERS_KEYWORDS:
                continue
            name = key.lower().replace("-", "_")
            near = get_close_matches(name, fields, n=2, cutoff=0.7)
            near = near or [field for field in fields if set(name.split("_")) <= set(field.split("_"))]  # `num_heads`
            if near:
                raise ValueError(
                    f"{key}: expected a field of ViTCifarConfig (did you mean {' or '.join(near)}?), got {key!r}"
                )

    def validate_output_attentions(self) -> None:
        """transformers' own refuses maps with fused kernels; this model gives them there too."""

    def validate_architecture(self) -> None:
        """Checks that concern values and how they fit together; @strict has checked the types."""
        self.num_labels = self.num_labels  # `from_pretrained(..., id2label=...)` fits no problem_type to its number
        for name in (
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("image_size", "patch_size", "num_channels"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_drop_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability from 0 to 1, got {getattr(self, name)}")
        for name in ("initializer_range", "embedding_initializer_range", "layer_norm_eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name, words in (
            ("patch_embedding", PATCH_EMBEDDINGS),
            ("position_embedding", POSITION_EMBEDDINGS),
            ("hidden_act", tuple(ACT2FN)),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected one of {', '.join(words)}, got {getattr(self, name)!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: expected a divisor of image_size {self.image_size}, got {self.patch_size}")
        if self.position_embedding == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size: expected an even number for sinusoidal positions, got {self.hidden_size}")
        if self.patch_embedding == "conv_stem":
            if self.patch_size & (self.patch_size - 1):
                raise ValueError(f"patch_size: expected a power of 2 for conv_stem, got {self.patch_size}")
            if self.stem_widths is None and self.hidden_size % self.patch_size:
                raise ValueError(
                    f"hidden_size: expected a multiple of patch_size {self.patch_size} for conv_stem, whose width "
                    f"doubles at each scale, got {self.hidden_size}"
                )
            least, widths = max(1, 2 * (self.patch_size.bit_length() - 1)), self.stem_widths
            if widths is not None and (len(widths) < least or min(widths) < 1 or widths[-1] != self.hidden_size):
                raise ValueError(
                    f"stem_widths: expected at least {least} positive numbers for patch_size {self.patch_size}, the "
                    f"last of them hidden_size {self.hidden_size}, got {widths}"
                )


__all__ = ["CIFAR10_CLASSES", "ViTCifarConfig"]
