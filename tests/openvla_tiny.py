"""A random OpenVLA-OFT checkpoint of tiny size, in the files of a real one. `python tests/openvla_tiny.py FOLDER` writes it.

Weights are an integer hash of their name in the checkpoint and their place in the tensor, the same on every machine: the
numbers in data/openvla_oft_golden.json are what the ORIGINAL classes (timm, OFT's fork of transformers) compute from them.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "openvla_oft_golden.json").read_text())
TOWERS = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
TINY = {"dino": (32, 3, 128), "siglip": (48, 3, 179), "llama": (32, 2, 48)}
FULL = {"dino": (1024, 24, 4096), "siglip": (1152, 27, 4304), "llama": (4096, 32, 11008)}  # width, layers, MLP
WORDS = {"In": 512, ":": 29901, "What": 1724, "action": 3158, "should": 881, "the": 278, "robot": 19964, "take": 2125,
         "to": 304, "pick": 5839, "up": 701, "alphabet": 22968, "soup": 22300, "and": 322, "place": 2058, "it": 372,
         "in": 297, "basket": 25972, "?": 29973, "\n": 13, "Out": 3744}  # Llama-2's ids


def hash01(count, seed):
    """`count` numbers in (-1, 1), the same on every machine."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(seed) * np.uint64(1000003)) & np.uint64(0xffffffff)
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x45d9f3b)) & np.uint64(0xffffffff)
    return ((x ^ (x >> np.uint64(16))).astype(np.float64) / 2 ** 31 - 1).astype(np.float32)


def fill(name, shape):
    seed = 0
    for byte in name.encode():
        seed = (seed * 131 + byte) % 65521
    values, last = torch.from_numpy(hash01(int(np.prod(shape)), seed)).reshape(shape), name.split(".")[-1]
    if "scale_factor" in name:
        return 0.5 + 0.3 * values
    if len(shape) == 1:
        return 1 + 0.2 * values if ("norm" in name or ".ffn.0." in name) and last == "weight" else 0.2 * values
    if any(part in name for part in ("embed_tokens", "pos_embed", "token", "latent")):
        return 0.5 * values
    return values * (3.0 / np.prod(shape[1:])) ** 0.5


def linear(name, n_out, *n_in):
    return {f"{name}.weight": (n_out, *n_in), f"{name}.bias": (n_out,)}


def tower(prefix, width, layers, mlp, scaled):
    shapes = {f"{prefix}.pos_embed": (1, 256, width)} | linear(f"{prefix}.patch_embed.proj", width, 3, 14, 14)
    shapes |= linear(f"{prefix}.norm", width)
    for i in range(layers):
        block = f"{prefix}.blocks.{i}"
        shapes |= linear(f"{block}.norm1", width) | linear(f"{block}.norm2", width)
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", mlp, width) | linear(f"{block}.mlp.fc2", width, mlp)
        if scaled:
            shapes |= {f"{block}.ls{n}.scale_factor": (width,) for n in (1, 2)}
    return shapes


def key_shapes(sizes):
    """{key: shape} of the shards, of the action head and of the proprio projector."""
    (dino, _, _), (siglip, _, mlp), (D, layers, wide) = sizes["dino"], sizes["siglip"], sizes["llama"]
    name = "vision_backbone.featurizer"
    shapes = tower(name, *sizes["dino"], True) | {f"{name}.cls_token": (1, 1, dino), f"{name}.reg_token": (1, 4, dino)}
    name = "vision_backbone.fused_featurizer"
    shapes |= tower(name, *sizes["siglip"], False)
    name += ".attn_pool"
    shapes |= {f"{name}.latent": (1, 1, siglip)} | linear(f"{name}.q", siglip, siglip) | linear(f"{name}.kv", 2 * siglip, siglip)
    shapes |= linear(f"{name}.proj", siglip, siglip) | linear(f"{name}.norm", siglip)
    shapes |= linear(f"{name}.mlp.fc1", mlp, siglip) | linear(f"{name}.mlp.fc2", siglip, mlp)
    seen = dino + siglip
    shapes |= linear("projector.fc1", 4 * seen, seen) | linear("projector.fc2", D, 4 * seen) | linear("projector.fc3", D, D)
    shapes |= {f"language_model.{key}.weight": (32064, D) for key in ("model.embed_tokens", "lm_head")}
    shapes["language_model.model.norm.weight"] = (D,)
    for i in range(layers):
        block = f"language_model.model.layers.{i}"
        shapes |= {f"{block}.self_attn.{part}_proj.weight": (D, D) for part in "qkvo"}
        shapes |= {f"{block}.mlp.{part}_proj.weight": (wide, D) for part in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (D, wide), f"{block}.input_layernorm.weight": (D,),
                   f"{block}.post_attention_layernorm.weight": (D,)}
    head = linear("model.layer_norm1", 7 * D) | linear("model.fc1", D, 7 * D) | linear("model.layer_norm2", D)
    head |= linear("model.fc2", 7, D)
    for i in (0, 1):
        head |= linear(f"model.mlp_resnet_blocks.{i}.ffn.0", D) | linear(f"model.mlp_resnet_blocks.{i}.ffn.1", D, D)
    return shapes, head, linear("fc1", D, 8) | linear("fc2", D, D)


def write_tokenizer(path):
    """One word, one token; the ids of these words, of punctuation and of the special tokens are Llama-2's."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 29871} | WORDS
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"[:?\n]"), "isolated")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.save(str(path))


def write_checkpoint(folder, head_dtype=torch.float32):
    """The whole folder: two shards and their index, two .pt files with DDP's prefix, statistics, tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, head, proprio = key_shapes(TINY)
    keys = sorted(shards)
    parts, weight_map = (keys[0::2], keys[1::2]), {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: fill(key, shards[key]).contiguous() for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for part, shapes, dtype in (("action_head", head, head_dtype), ("proprio_projector", proprio, torch.float32)):
        torch.save({f"module.{key}": fill(f"{part}.{key}", shape).to(dtype) for key, shape in shapes.items()},
                   folder / f"{part}--150000_checkpoint.pt")
    sizes = {name: {"width": width, "layers": layers, "heads": 2, "mlp": mlp}
             for name, (width, layers, mlp) in zip(TOWERS, (TINY["dino"], TINY["siglip"]))}
    D, layers, wide = TINY["llama"]
    (folder / "config.json").write_text(json.dumps({
        "model_type": "openvla", "timm_model_ids": TOWERS, "tower_sizes": sizes, "text_config": {
            "model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064, "hidden_size": D,
            "num_hidden_layers": layers, "intermediate_size": wide, "num_attention_heads": 2, "num_key_value_heads": 2}}))
    (folder / "dataset_statistics.json").write_text(json.dumps(GOLDEN["stats"]))
    write_tokenizer(folder / "tokenizer.json")
    return folder


if __name__ == "__main__":
    write_checkpoint(sys.argv[1])
