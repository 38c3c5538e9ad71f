"""The local configuration with which diffusers opens a single file of any size without a network."""

import json
from pathlib import Path

from sdxl_train.model.architecture import Architecture
from sdxl_train.model.tokenizer import load_tokenizers

CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}


def write_diffusers_config(root: Path, architecture: Architecture, prediction_type: str, scheduler: str = "EulerDiscreteScheduler") -> Path:
    """Write it into a folder that is empty or not there, and give it back."""
    for part, config in architecture.to_diffusers_configs().items():
        (root / part).mkdir(parents=True)
        (root / part / "config.json").write_text(json.dumps({"_class_name": CLASSES[part][1], "model_type": "clip_text_model", **config}))
    load_tokenizers(str(root), None)
    (root / "openai_clip-vit-large-patch14").rename(root / "tokenizer")
    (root / "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k").rename(root / "tokenizer_2")
    (root / "scheduler").mkdir()
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction_type}
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": scheduler, **schedule}))
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1", "scheduler": ["diffusers", scheduler]}
    tokenizers = {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    absent = {"feature_extractor": [None, None], "image_encoder": [None, None]}
    (root / "model_index.json").write_text(json.dumps({**index, **CLASSES, **tokenizers, **absent}))
    return root
