"""vit_cifar: a Vision Transformer for 32x32 images that can be loaded, trained, published and looked inside."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_vit_cifar import CIFAR10_CLASSES, ViTCifarConfig
from .modeling_vit_cifar import ViTCifarForImageClassification, ViTCifarModel

__version__ = "0.1.0"

# With the package imported, `AutoModelForImageClassification.from_pretrained` finds these classes by model_type.
AutoConfig.register(ViTCifarConfig.model_type, ViTCifarConfig, exist_ok=True)
AutoModel.register(ViTCifarConfig, ViTCifarModel, exist_ok=True)
AutoModelForImageClassification.register(ViTCifarConfig, ViTCifarForImageClassification, exist_ok=True)
# Without it, a saved folder carries the two files and names these classes in config.json's auto_map.
ViTCifarConfig.register_for_auto_class()
ViTCifarModel.register_for_auto_class("AutoModel")
ViTCifarForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["CIFAR10_CLASSES", "ViTCifarConfig", "ViTCifarForImageClassification", "ViTCifarModel"]
