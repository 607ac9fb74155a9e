"""ViT-CIFAR: a Vision Transformer for small images that gives its attention maps under every attention implementation.

Read from top to bottom in the order that the data flows: patches -> embeddings -> attention -> layer -> model -> head.
This file travels with the weights as remote code: it needs torch and transformers only.

Ancestors: "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2021, arXiv:2010.11929) and transformers'
`models/vit/modeling_vit.py`, whose module names are kept; the pre-norm block of "Attention Is All You Need" as in
nanoGPT; the convolutional stem of "Early Convolutions Help Transformers See Better" (Xiao et al. 2021,
arXiv:2106.14881) and CCT (Hassani et al. 2021, arXiv:2104.05704); stochastic depth (Huang et al. 2016,
arXiv:1603.09382); patch dropping (Liu et al. 2023, arXiv:2208.07220).

Letters in shape comments: B batch, C channels, H and W image height and width, P patch size, h = H / P and w = W / P
the grid, N tokens (class token + patches), D hidden size, A heads, K = D / A width of a head.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs, maybe_install_capturing_hooks

from .configuration_vit_cifar import ViTCifarConfig


def sinusoidal_positions(length: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """The fixed table of Vaswani et al. 2017, section 3.5: sine in even columns, cosine in odd ones.

    Returns: float32 tensor of shape (length, width); row p, columns 2i and 2i + 1 hold sin and cos of
    p / 10000^(2i / width).
    """
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    return torch.stack([(position * frequency).sin(), (position * frequency).cos()], dim=-1).flatten(1)


class ViTCifarConvStem(nn.Sequential):
    """Overlapping 3x3 convolutions, with 2x2 max pooling after every second one until a position is a patch.

    By default the width doubles at each scale: patch size 4 gives D/4, D/4, D/2, D/2, D, D. With `stem_widths` the
    pooling comes before the norm, where it costs less (airbench, Jordan 2024, arXiv:2404.00498).
    (B, C, H, W) -> (B, D, h, w)
    """

    def __init__(self, config: ViTCifarConfig):
        scales = config.patch_size.bit_length()  # resolutions from pixels to patches
        doubled = [config.hidden_size >> n for n in reversed(range(scales)) for _ in range(2)]
        layers, in_channels = [], config.num_channels
        for index, width in enumerate(config.stem_widths or doubled):
            pooling = [nn.MaxPool2d(2)] if index % 2 and index < 2 * (scales - 1) else []
            rest = [nn.BatchNorm2d(width), ACT2FN[config.hidden_act]]
            layers += [nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)]
            layers += pooling + rest if config.stem_widths else rest + pooling
            in_channels = width
        super().__init__(*layers)

    def train(self, mode: bool = True) -> "ViTCifarConvStem":
        super().train(mode)
        for norm in (layer for layer in self if hasattr(layer, "running_mean")):
            norm.train(mode and all(p.requires_grad for p in norm.parameters()))  # frozen: LoRA saves no statistics
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # Channels last makes the whole training step 1.2 to 1.5 times as fast on a CPU.
        return super().forward(pixel_values.contiguous(memory_format=torch.channels_last))


class ViTCifarPatchEmbeddings(nn.Module):
    """Pixels to one vector per patch: (B, C, H, W) -> (B, h * w, D), row by row."""

    def __init__(self, config: ViTCifarConfig):
        super().__init__()
        self.patch_size, self.num_channels, self.kind = config.patch_size, config.num_channels, config.patch_embedding
        if self.kind == "linear":
            self.projection = nn.Linear(config.patch_size**2 * config.num_channels, config.hidden_size)
        elif self.kind == "conv":
            self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, self.patch_size)
        else:
            self.projection = ViTCifarConvStem(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values: expected 4 dimensions, (B, C, H, W), got {tuple(pixel_values.shape)}")
        batch, channels, height, width = pixel_values.shape
        if channels != self.num_channels:
            raise ValueError(f"pixel_values: expected {self.num_channels} channels, got {channels}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"pixel_values: expected height and width that are multiples of patch_size {self.patch_size}, "
                f"got {height} x {width}"
            )
        if self.kind != "linear":
            return self.projection(pixel_values).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h * w, D)
        size = self.patch_size
        patches = pixel_values.reshape(batch, channels, height // size, size, width // size, size)
        # (B, C, h, P, w, P) -> (B, h * w, P * P * C)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.projection(patches)


class ViTCifarEmbeddings(nn.Module):
    """Patches with the class token in front, positions added, some patches left out in training."""

    def __init__(self, config: ViTCifarConfig):
        super().__init__()
        self.grid = config.image_size // config.patch_size
        self.patch_size, self.patch_drop_rate = config.patch_size, config.patch_drop_rate
        self.patch_embeddings = ViTCifarPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if config.position_embedding == "learned":
            self.position_embeddings = nn.Parameter(torch.zeros(1, self.grid**2 + 1, config.hidden_size))
        else:
            self.register_parameter("position_embeddings", None)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """The position table (1, 1 + h * w, D) for an image of height x width; interpolated if the grid is another."""
        table = self.position_embeddings
        if table is None:  # computed at each call: a buffer outside the checkpoint would hold garbage after loading
            table = sinusoidal_positions(self.grid**2 + 1, self.cls_token.shape[-1], self.cls_token.device)
            table = table[None].to(self.cls_token.dtype)
        grid = (height // self.patch_size, width // self.patch_size)
        if grid == (self.grid, self.grid):
            return table
        patches = table[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)  # (1, D, h, w)
        patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embeddings(pixel_values)
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        tokens = torch.cat([cls_token, tokens], dim=1)  # (B, N, D)
        tokens = tokens + self.positions(*pixel_values.shape[-2:]).to(tokens.dtype)  # autocast: the stream is bf16
        if self.training and self.patch_drop_rate > 0:
            batch, num_patches = tokens.shape[0], tokens.shape[1] - 1
            kept = max(1, round(num_patches * (1 - self.patch_drop_rate)))
            order = torch.rand(batch, num_patches, device=tokens.device).argsort(dim=1)[:, :kept] + 1
            patches = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))
            tokens = torch.cat([tokens[:, :1], patches], dim=1)
        return self.dropout(tokens)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, (B, A, N, K) -> (B, N, A, K), and the map (B, A, N, N) that it was made with.

    The map is the one before dropout, so that its rows sum to 1 in training too; gradients reach it.
    """
    attention = query @ (key * scaling).transpose(-1, -2)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:  # which to keep, as sdpa takes it
            attention_mask = torch.where(attention_mask, 0.0, -torch.inf)
        attention = attention + attention_mask
    attention = attention.softmax(dim=-1).to(value.dtype)
    context = nn.functional.dropout(attention, p=dropout, training=module.training) @ value
    return context.transpose(1, 2).contiguous(), attention


class ViTCifarAttention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D) and the map (B, A, N, N) or None."""

    def __init__(self, config: ViTCifarConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        has_projection = config.attention_output_projection
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size) if has_projection else nn.Identity()

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (p(hidden_states).view(heads).transpose(1, 2) for p in projections)  # (B, A, N, K) each

        attend = eager_attention_forward
        if not kwargs.get("output_attentions", self.config.output_attentions):  # fused kernels have no maps to give
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout, mask = self.attention_dropout if self.training else 0.0, kwargs.pop("attention_mask", None)
        context, attention = attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(context.flatten(2)), attention


class ViTCifarMLP(nn.Module):
    """Two linear layers with the activation between, token by token: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTCifarConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class ViTCifarDropPath(nn.Module):
    """Skips the residual branch for whole samples in training, and scales the others so that the mean stays."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * kept / max(1 - self.rate, 1e-6)


class ViTCifarLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block: two residual lines."""

    def __init__(self, config: ViTCifarConfig, drop_path_rate: float):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTCifarAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTCifarMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = ViTCifarDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        return hidden_states + self.drop_path(self.dropout(self.mlp(self.layernorm_after(hidden_states))))


class ViTCifarPreTrainedModel(PreTrainedModel):
    config_class = ViTCifarConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer must not divide it again
    _no_split_modules = ["ViTCifarEmbeddings", "ViTCifarLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ViTCifarLayer, "attentions": ViTCifarAttention}
    _input_embed_layer = "patch_embeddings"

    def _init_weights(self, module: nn.Module) -> None:
        """Linear layers start from a normal distribution truncated at +-2, convolutions as PyTorch starts them."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, ViTCifarEmbeddings):
            init.normal_(module.cls_token, std=self.config.embedding_initializer_range)
            if module.position_embeddings is not None:
                init.normal_(module.position_embeddings, std=self.config.embedding_initializer_range)
        else:
            super()._init_weights(module)


class ViTCifarModel(ViTCifarPreTrainedModel):
    """Embeddings, layers, final LayerNorm."""

    def __init__(self, config: ViTCifarConfig):
        super().__init__(config)
        config.validate_architecture()  # again: `from_pretrained(..., num_attention_heads=5)` assigns fields unchecked
        self.embeddings = ViTCifarEmbeddings(config)
        last = max(config.num_hidden_layers - 1, 1)
        rates = [config.drop_path_rate * i / last for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList([ViTCifarLayer(config, rate) for rate in rates])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (B, C, H, W), normalised; any height and width that are multiples of the patch size.
            output_attentions: also return `attentions`, one (B, A, N, N) map per layer, rows summing to 1, under
                every attention implementation. Token 0 is the class token, then the patches row by row.
            output_hidden_states: also return `hidden_states`, the input of the first layer and each layer's output.

        Returns: `last_hidden_state` (B, N, D) after the final LayerNorm and `pooler_output` (B, D), its class token.

        Raises:
            ValueError: the number of dimensions or channels, or a height or width that patches do not divide.
        """
        hidden_states = self.embeddings(pixel_values.to(self.embeddings.cls_token.dtype))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])


class ViTCifarForImageClassification(ViTCifarPreTrainedModel):
    """ViTCifarModel with a linear classifier on the class token."""

    def __init__(self, config: ViTCifarConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTCifarModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()
        maybe_install_capturing_hooks(self.vit)  # now, as torch.compile cannot trace it at the first request for maps

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values, output_attentions, output_hidden_states: as for `ViTCifarModel`.
            labels: (B,) class indices; with them the output carries `loss`, the mean cross-entropy in nats
                (of a model with one output, the mean squared error, as in transformers).

        Returns: `logits` (B, num_labels), and what was asked for of `loss`, `attentions`, `hidden_states`.
        """
        outputs = self.vit(pixel_values, return_dict=True, **kwargs)  # whatever the config says
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["ViTCifarForImageClassification", "ViTCifarModel", "ViTCifarPreTrainedModel"]
