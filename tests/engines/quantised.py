"""A small model in compressed-tensors' int8, made from one of the project's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

from polder.bench.workloads.models import ModelRecipe, ensure_model

CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head", "re:.*mlp.*"],
}


def int8_attention(recipe: ModelRecipe, directory: Path) -> Path:
    """The model of `recipe` with the linear layers of attention in int8: a scale for each output channel, and for each token."""
    import torch
    from safetensors.torch import load_file, save_file

    source = ensure_model(recipe, directory)
    folder = source.with_name(f"{source.name}-int8-attention")
    if folder.exists():
        return folder
    draft = Path(mkdtemp(prefix=f".{folder.name}-", dir=directory))
    shutil.copytree(source, draft, dirs_exist_ok=True)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "self_attn" in name and name.endswith("proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.float()
        else:
            tensors[name] = tensor
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    os.replace(draft, folder)
    return folder
