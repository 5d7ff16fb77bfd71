"""OpenVLA-OFT (arXiv 2502.19645) as our policy: a LIBERO checkpoint of moojink/openvla-oft in native transformers modules.

    BOS ──────────────────────────────────────► 1 token      ┐
    two views ─► DINOv2 | SigLIP ─► projector ► 2·256 tokens │                    hidden states
    state (8) ─► proprio projector ───────────► 1 token      ├─► bidirectional ─► one place before ─► action head ─► loc
    "In: What action should the robot … ─────► P-1 tokens   │   LlamaModel       the L·A slots       scale head ──► log b
    L·A empty slots, </s> ────────────────────► 57 tokens    ┘                    (B, L, A·D)

`OpenVLAPolicy` has the interface of `policy.Policy`, so the other stages take it as it is: `--policy.backbone` names the
checkpoint, a folder or a hub id. Nothing of it is executed: tensors and JSON are all that is read. It has no scale head;
ours is trained on the demonstrations, the rest frozen, or along with a fine-tuning by LoRA (`--policy.lora_rank`).

Departures from OpenVLA-OFT, and limits:
 1. Both heads compute in float32 (OFT: bfloat16 like the rest): at b = 0.03 the rounding would matter.
 2. OFT draws pictures of 256 pixels. Ours have `image_size`, one setting for the policy, the world simulator and the
    reflector: 64 by default. Scaled up here they are blurred, which the policy was never trained on. `--preset large`
    gives it OFT's frames.
 3. OFT turns OpenGL's pictures, stored upside down, by 180 degrees: it sees our upright ones mirrored.
 4. JPEG is PIL's (TensorFlow's differs by 1 grey level in the mean), and pictures under 224 pixels go without.
 5. LoRA changes the language model alone (OFT's: towers and projector too), so nothing before it needs a gradient. It is
    `ppo.LoRA`, not PEFT: the same formula without another package.
 6. Prompt and pictures take no gradient, but every pass computes them anew: a tenth of its arithmetic, where keeping the
    tokens of a chunk would take 4 MB.
 7. Saved is what was trained and the checkpoint's name, 0.6 to 1.5 GB; the 15 GB that are frozen stay where they are.

Shapes: B batch, V views, L action-chunk length, A action dimensions, D width, P tokens of a prompt, H, W image.

Try it:  python -m pytest tests/test_openvla.py
"""
from __future__ import annotations

import io
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, LlamaConfig, LlamaModel, SiglipVisionConfig,
                          SiglipVisionModel)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from encoders import check_memory, recompute_layers, size_of
from episodes import Normalizer
from policy import MLPResNet, Policy, PolicyConfig
from ppo import add_lora, lora_rank
from runs import UserError, find_model, load_pretrained, read_json, save_model
from vlm_policy import VLMPolicy

MODEL_TYPE = "world_env_openvla"
PICTURE, PATCH = 224, 14  # pixels
# The normalisation of DINOv2's pictures as the checkpoints store it, rounded to bfloat16.
MEAN, STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
TOWERS = {"vit_large_patch14_reg4_dinov2.lvd142m": {"width": 1024, "layers": 24, "heads": 16, "mlp": 4096},
          "vit_so400m_patch14_siglip_224": {"width": 1152, "layers": 27, "heads": 16, "mlp": 4304}}
FULL_SIZE = {"model_type": "openvla", "timm_model_ids": list(TOWERS),
             "text_config": {"vocab_size": 32064, "pad_token_id": 32000}}  # all else are LlamaConfig's defaults
PROMPT = "In: What action should the robot take to {}?\nOut:"
FILES = ("config.json", "dataset_statistics.json", "tokenizer.json", "*.safetensors", "action_head--*_checkpoint.pt",
         "proprio_projector--*_checkpoint.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def pixel_values(images):
    """Upright pictures (B, 3, H, W) in [-1, 1] -> (B, 6, 224, 224): three channels for DINOv2, three for SigLIP.

    As OFT does: mirrored (departure 3), JPEG, Lanczos, and the middle 90 % of the area, with 8 bits after each.
    """
    x = ((images.float() + 1) * 127.5).round().flip(-1)                         # exact for what was uint8
    if x.shape[-1] >= PICTURE:
        x = jpeg(x)
    rows, columns = (torch.tensor(lanczos(side), device=x.device) for side in x.shape[-2:])
    x = (rows @ x @ columns.T).round().clamp(0, 255)                            # (B, 3, 224, 224)
    side = 0.9 ** 0.5
    crop = torch.tensor([[side, 0, 0], [0, side, 0]], device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(crop, x.shape, align_corners=True)
    x = F.grid_sample(x / 255, grid, align_corners=True)
    x = (x * 255.5).floor().clamp(0, 255) / 255
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
    return torch.cat([(x - mean) / std, (x - 0.5) / 0.5], dim=1)


def jpeg(images):
    """What is left of pictures (B, 3, H, W) with values 0 to 255 after JPEG's losses."""
    decoded = []
    for image in images.permute(0, 2, 3, 1).byte().cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=2)
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).to(images).permute(0, 3, 1, 2)


@lru_cache
def lanczos(side):
    """The matrix (224, side) of PIL's Lanczos filter: what it makes of the unit vectors."""
    return np.array(Image.fromarray(np.eye(side, dtype=np.float32)).resize((side, PICTURE), Image.LANCZOS))


# ---------------------------------------------------------------------------------------------------------------------
# Policy
# ---------------------------------------------------------------------------------------------------------------------
class OpenVLAPolicy(nn.Module):
    """obs -> ActionDistribution over normalised actions (B, L, A); obs as `Policy` takes them.

    Built on torch's meta device but for the scale head, and filled by `from_checkpoint` or `from_pretrained`.
    """
    forward, heads, env_actions = Policy.forward, Policy.heads, Policy.env_actions

    def __init__(self, config: PolicyConfig, sizes: dict, normalizer: Normalizer | None = None, tokenizer=None):
        super().__init__()
        # A frozen network shall learn its scale from the pictures that it will see.
        self.config = replace(config, augment=config.augment and config.lora_rank > 0)
        self.sizes, self.normalizer, self.tokenizer, self.dtype = sizes, normalizer, tokenizer, getattr(torch, config.dtype)
        llama, dino, siglip = networks(sizes)
        D, head = llama.hidden_size, (config.action_dim * llama.hidden_size, llama.hidden_size, config.action_dim)
        with torch.device("meta"):
            self.dino, self.siglip = Dinov2WithRegistersModel(dino), SiglipVisionModel(siglip)
            self.dino.layernorm, self.siglip.post_layernorm = nn.Identity(), nn.Identity()
            seen = dino.hidden_size + siglip.hidden_size
            self.projector = nn.Sequential(
                nn.Linear(seen, 4 * seen), nn.GELU(), nn.Linear(4 * seen, D), nn.GELU(), nn.Linear(D, D))
            self.proprio_projector = nn.Sequential(nn.Linear(config.state_dim, D), nn.GELU(), nn.Linear(D, D))
            self.backbone = LlamaModel(llama)
            if config.gradient_checkpointing:
                recompute_layers(self.backbone)
            self.to(self.dtype)
            self.action_head = MLPResNet(*head)
        # What no checkpoint holds. Rotary frequencies stay in float32: never cast this module to another dtype.
        self.backbone.rotary_emb = LlamaRotaryEmbedding(llama)
        self.siglip.embeddings.position_ids = torch.arange((PICTURE // PATCH) ** 2)[None]
        self.dino.embeddings.mask_token = nn.Parameter(torch.zeros(1, dino.hidden_size, dtype=self.dtype))
        self.scale_head = MLPResNet(*head)
        nn.init.constant_(self.scale_head.linear_out.bias, config.log_scale_init)
        self.requires_grad_(False).scale_head.requires_grad_(True)

    @property
    def device(self):
        return self.action_head.linear_in.weight.device

    def features(self, images, state, instruction):
        """Images float in [-1, 1], state as it comes -> hidden states for the action slots (B, L, A·D)."""
        with torch.autocast(self.device.type.replace("meta", "cpu"), enabled=False):
            B, slots = len(images), self.config.chunk_size * self.config.action_dim
            views = self.projector(self.stem(images.flatten(0, 1))).unflatten(0, images.shape[:2])  # (B, V, 256, D)
            state = self.normalizer.normalize_state(state.to(self.device)).clamp(-1, 1)
            proprio = self.proprio_projector(state.to(self.dtype))[:, None]                       # (B, 1, D)
            words, stop = self.embedded(instruction, slots)                                       # (B, 1 + N, D), (B, 1)
            tokens = torch.cat([words[:, :1], views.flatten(1, 2), proprio, words[:, 1:]], dim=1)
            before = tokens.shape[1] - words.shape[1]                                             # V·256 + 1
            valid = torch.arange(words.shape[1]) <= stop                                          # padding is on the right
            mask = None if valid.all() else F.pad(valid.long(), (before, 0), value=1).to(self.device)
            hidden = self.backbone(inputs_embeds=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            # Shifted by one, as in next-token prediction: a slot is read at the place before it.
            places = before + stop - slots - 1 + torch.arange(slots)                              # (B, L·A)
            readout = hidden[torch.arange(B, device=self.device)[:, None], places.to(self.device)]
            return readout.reshape(B, self.config.chunk_size, -1)                                 # (B, L, A·D)

    def stem(self, images):
        """One view (B, 3, H, W) -> its 256 patches (B, 256, D of both towers), from the last block but one."""
        dino, siglip = pixel_values(images).to(self.dtype).split(3, dim=1)
        patches = self.dino(dino).last_hidden_state[:, 1 + self.dino.config.num_register_tokens:]
        return torch.cat([patches, self.siglip(siglip).last_hidden_state], dim=-1)

    def embedded(self, instruction, slots):
        """-> embeddings of BOS, prompt, zeros for the slots, </s>, padding (B, P + slots + 1, D); place of </s> (B, 1)."""
        prompts = [self.prompt(text) for text in instruction]
        stop = torch.tensor([[len(prompt) + slots] for prompt in prompts])
        ids = torch.full((len(prompts), int(stop.max()) + 1), self.tokenizer.token_to_id("</s>"))
        for row, prompt in zip(ids, prompts):
            row[:len(prompt)] = torch.tensor(prompt)
        place = torch.arange(ids.shape[1])
        empty = (place >= stop - slots) & (place < stop)
        words = self.backbone.embed_tokens(ids.to(self.device))
        return words.masked_fill(empty[..., None].to(self.device), 0), stop

    def prompt(self, instruction) -> list[int]:
        """Ids of the prompt, BOS first; it ends with the lone space token that the training data had there."""
        ids = self.tokenizer.encode(PROMPT.format(instruction.lower())).ids
        space = self.tokenizer.token_to_id("▁")
        return ids if ids[-1] == space else [*ids, space]

    def save_pretrained(self, folder):
        """What was trained (`runs.learned`) and where the rest is."""
        config = asdict(replace(self.config, lora_rank=lora_rank(self)))
        save_model(folder, self, {"model_type": MODEL_TYPE, "config": config}, whole=False)

    @classmethod
    def from_pretrained(cls, folder) -> "OpenVLAPolicy":
        return load_pretrained(folder, "policy", cls.from_checkpoint, lambda saved: [PolicyConfig(**saved["config"])],
                               whole=False)

    @classmethod
    def from_checkpoint(cls, config: PolicyConfig, suite="") -> "OpenVLAPolicy":
        """Read `config.backbone`; the statistics are `config.statistics` or those of the suite."""
        folder = checkpoint_folder(config.backbone)
        if config.chunk_size != 8 or config.action_dim != 7 or config.state_dim != 8 or config.views != 2:
            raise UserError("OpenVLA-OFT sees 2 views and predicts 8 actions in LIBERO: leave out --policy.chunk_size, "
                            "--policy.views, --policy.action_dim and --policy.state_dim")
        key, normalizer = read_statistics(folder, config.statistics or suite)
        name = str(folder.resolve()) if Path(config.backbone).is_dir() else config.backbone
        policy = cls(replace(config, backbone=name, statistics=key), read_json(folder / "config.json"), normalizer,
                     read_tokenizer(folder))
        check_memory(size_of(policy), torch.device("cpu"), f"to read {config.backbone}",
                     "give --policy.dtype bfloat16, or take a larger machine")
        policy.load_state_dict(read_weights(folder, policy), strict=False, assign=True)
        if config.lora_rank:
            add_lora(policy, config.lora_rank)
        return policy.eval()


def pretrained_policy(config: PolicyConfig, suite, normalizer):
    """`config.backbone`: an OpenVLA-OFT checkpoint, or an image-text model of Hugging Face with new heads."""
    path = find_model(config.backbone, "--policy.backbone ", allow_patterns=["*.json"]) / "config.json"
    if path.exists() and read_json(path).get("model_type") != "openvla":
        return VLMPolicy(config, normalizer)
    return OpenVLAPolicy.from_checkpoint(config, suite)


def load_policy(folder, device):
    """The policy that a stage has saved, of any kind, on `device`."""
    kinds = {MODEL_TYPE: OpenVLAPolicy, VLMPolicy.MODEL_TYPE: VLMPolicy}
    policy = kinds.get(read_json(f"{folder}/config.json").get("model_type"), Policy).from_pretrained(folder)
    if device.type != "cpu":
        check_memory(size_of(policy), device, f"for the policy in {folder}", "give --device cpu, or take a larger card")
    return policy.to(device)


def networks(sizes):
    """A checkpoint's config.json -> configurations of the language model and of both towers, less their last block."""
    if sizes.get("model_type") != "openvla" or list(sizes.get("timm_model_ids", [])) != list(TOWERS):
        raise UserError(f"config.json describes {sizes.get('model_type')} with {sizes.get('timm_model_ids')}; what can be "
                        f"read is openvla with {list(TOWERS)}")
    text = {key: value for key, value in sizes.get("text_config", {}).items() if key not in ("model_type", "torch_dtype")}
    dino, siglip = ({**tower, **sizes.get("tower_sizes", {}).get(name, {})} for name, tower in TOWERS.items())
    dino, siglip = ({"hidden_size": tower["width"], "num_hidden_layers": tower["layers"] - 1,
                     "num_attention_heads": tower["heads"], "mlp_ratio": tower["mlp"] // tower["width"],
                     "intermediate_size": tower["mlp"], "image_size": PICTURE, "patch_size": PATCH, "hidden_act": "gelu",
                     "layer_norm_eps": 1e-6} for tower in (dino, siglip))  # SigLIP's default is the approximate GELU
    return (LlamaConfig(**text, is_causal=False), Dinov2WithRegistersConfig(**dino, num_register_tokens=4),
            SiglipVisionConfig(**siglip, vision_use_head=False))


# ---------------------------------------------------------------------------------------------------------------------
# Reading a checkpoint
# ---------------------------------------------------------------------------------------------------------------------
RENAMES = {  # prefix in the checkpoint: (prefix here, what is replaced in the rest)
    "vision_backbone.featurizer.": ("dino.", {
        "blocks.": "encoder.layer.", "attn.qkv": "attention.{}_proj", "attn.proj": "attention.o_proj",
        "ls1.scale_factor": "layer_scale1.lambda1", "ls2.scale_factor": "layer_scale2.lambda1",
        "cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings", "patch_embed.proj": "embeddings.patch_embeddings.projection"}),
    "vision_backbone.fused_featurizer.": ("siglip.", {
        "blocks.": "encoder.layers.", "attn.qkv": "self_attn.{}_proj", "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1", "norm2": "layer_norm2", "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj": "embeddings.patch_embedding"}),
    "language_model.model.": ("backbone.", {}),
    "projector.": ("projector.", {"fc1": "0", "fc2": "2", "fc3": "4"}),
    "proprio_projector.": ("proprio_projector.", {"fc1": "0", "fc2": "2"}),
    "action_head.model.": ("action_head.", {
        "layer_norm1": "norm_in", "layer_norm2": "norm_out", "fc1": "linear_in", "fc2": "linear_out",
        "mlp_resnet_blocks": "blocks", "ffn.0": "norm", "ffn.1": "linear"}),
}


def our_names(key) -> list[str]:
    """Parameters here that a tensor of the checkpoint fills: one, or three where it holds query, key and value."""
    for prefix, (ours, replaced) in RENAMES.items():
        if key.startswith(prefix):
            name = ours + key.removeprefix(prefix)
            for old, new in replaced.items():
                name = name.replace(old, new)
            return [name.format(part) for part in "qkv"] if "{}" in name else [name]
    return []


def is_unused(key, policy) -> bool:
    """The word head, SigLIP's pooling, final norms and last blocks of the towers: nothing here reads them."""
    towers = {"featurizer": policy.dino, "fused_featurizer": policy.siglip}
    return key.startswith(("language_model.lm_head.", *(
        f"vision_backbone.{name}.{part}." for name, tower in towers.items()
        for part in ("norm", "attn_pool", f"blocks.{tower.config.num_hidden_layers}"))))


def assign_keys(keys, policy) -> dict[str, list[str]]:
    """{key of the checkpoint: parameters here}; UserError names what is missing and what is not expected."""
    names = {key: our_names(key) for key in keys if not is_unused(key, policy)}
    filled = {name for ours in names.values() for name in ours}
    wanted = {name for name in policy.state_dict() if not name.startswith("scale_head.")} - {"dino.embeddings.mask_token"}
    missing = sorted(wanted - filled)
    unknown = sorted(key for key, ours in names.items() if not ours or not set(ours) <= wanted)
    if missing or unknown:
        raise UserError(f"{policy.config.backbone} is not a whole OpenVLA-OFT checkpoint of the size in its config.json: "
                        f"{len(missing)} parameters are not in it {missing[:3]}, {len(unknown)} tensors are not known "
                        f"{unknown[:3]}")
    return names


def read_weights(folder, policy) -> dict[str, torch.Tensor]:
    """All parameters of the policy, but for the scale head, from the shards and the two .pt files."""
    source = {}  # key: how to get the tensor
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*_checkpoint.pt")]):
        try:
            if path.suffix == ".safetensors":
                shard = safe_open(path, "pt")
                source |= {key: shard.get_tensor for key in shard.keys()}
            else:
                part = {f"{path.name.split('--')[0]}.{key.removeprefix('module.')}": value
                        for key, value in torch.load(path, map_location="cpu", weights_only=True).items()}
                source |= {key: part.__getitem__ for key in part}
        except Exception as error:  # both readers raise whatever their parts raise
            raise UserError(f"{path} is not a whole file of tensors ({type(error).__name__}): download it again") from None
    wanted, weights = policy.state_dict(), {}
    for key, names in assign_keys(source, policy).items():
        tensor = source[key](key)
        if key.endswith("fused_featurizer.pos_embed"):
            tensor = tensor[0]
        elif key.endswith("featurizer.pos_embed"):  # in timm the class token has no place of its own
            tensor = F.pad(tensor, (0, 0, 1, 0))
        for name, part in zip(names, tensor.chunk(len(names))):
            if part.shape != wanted[name].shape:
                raise UserError(f"{folder}: {key} has the shape {tuple(tensor.shape)}, which does not fit its config.json")
            weights[name] = part.to(wanted[name].dtype)
    return weights


def checkpoint_folder(name) -> Path:
    """The checkpoint's folder (see `find_model`), without the adapter that is merged already."""
    folder = find_model(name, "--policy.backbone ", allow_patterns=[*FILES, "*.json"], ignore_patterns=["lora_adapter/*"])
    for pattern in FILES:
        found = list(folder.glob(pattern))
        if not found or (len(found) > 1 and pattern.endswith(".pt")):
            raise UserError(f"{folder} is not the folder of one OpenVLA-OFT checkpoint: it has {len(found)} files {pattern}")
    index = folder / "model.safetensors.index.json"
    for shard in sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ():
        if not (folder / shard).exists():
            raise UserError(f"{folder} lacks {shard}: download it again")
    return folder


def read_statistics(folder, name):
    """-> key and normaliser. Its gripper numbers turn the checkpoint's 1 (open) and 0 into our -1 and 1 (closed)."""
    statistics = read_json(folder / "dataset_statistics.json")
    keys = [key for key in statistics if name.startswith(key.removesuffix("_no_noops"))]
    if not keys:
        raise UserError(f"{folder} has the statistics {', '.join(statistics)}, none for '{name}': choose one with "
                        "--policy.statistics")
    key = max(keys, key=len)
    try:
        action, state = statistics[key]["action"], statistics[key]["proprio"]
        if action["mask"] != [True] * 6 + [False] or len(state["q01"]) != 8:
            raise ValueError("other dimensions")
        high, state_high = ([value + 1e-8 for value in part["q99"]] for part in (action, state))
        return key, Normalizer(action["q01"][:6] + [3.0], high[:6] + [-1.0], state["q01"], state_high)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/dataset_statistics.json, {key}: not as OpenVLA-OFT's for LIBERO ({error})") from None


def read_tokenizer(folder):
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # it raises nothing more precise
        raise UserError(f"{folder}/tokenizer.json cannot be read ({error})") from None
    if None in (tokenizer.token_to_id("▁"), tokenizer.token_to_id("</s>")) or not tokenizer.encode("").ids:
        raise UserError(f"{folder}/tokenizer.json is not Llama's: it lacks '▁' or '</s>', or does not begin with BOS")
    return tokenizer
