"""A smaller pretrained policy: any Hugging Face image-text model (SmolVLM, LLaVA, Qwen-VL, …) with action heads of ours.

    two views + "What should the robot do to …?" ─► image-text model ─► last word's state ┐
    state (8) ──────────────────────────────────────────────────────────────────────────┴─► action head ─► loc
                                                                                            scale head  ─► log b
`VLMPolicy` has the interface of `policy.Policy`; `--policy.backbone` names the model, a folder or a hub id. It has never
seen a robot, so cloning trains both heads, and its matrices by LoRA (`--policy.lora_rank`): the option for a 24 GB card.

Departures from OpenVLA-OFT: one state vector for the whole chunk, no action slots, so that models of any build will do;
pictures go through the model's own processor, on the CPU.

Shapes: B batch, V views, L action-chunk length, A action dimensions, D width, H, W image.

Try it:  python -m pytest tests/test_vlm_policy.py
"""
from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from encoders import ImageTextModel, recompute_layers
from episodes import Normalizer, to_uint8
from policy import MLPResNet, Policy, PolicyConfig
from ppo import add_lora, lora_rank
from runs import load_pretrained, save_model


class VLMPolicy(nn.Module):
    """obs -> ActionDistribution over normalised actions (B, L, A); obs as `Policy` takes them."""
    MODEL_TYPE = "world_env_vlm"
    forward, heads, env_actions = Policy.forward, Policy.heads, Policy.env_actions

    def __init__(self, config: PolicyConfig, normalizer: Normalizer):
        super().__init__()
        name = str(Path(config.backbone).resolve()) if Path(config.backbone).is_dir() else config.backbone
        self.config, self.normalizer = replace(config, backbone=name), normalizer
        self.reader = ImageTextModel(name, "--policy.backbone", getattr(torch, config.dtype))
        self.backbone = self.reader.model
        if config.gradient_checkpointing:
            recompute_layers(self.backbone)
        sizes = self.reader.width + config.state_dim, 4 * config.width, config.chunk_size * config.action_dim
        chunk = nn.Unflatten(1, (config.chunk_size, config.action_dim))
        self.action_head, self.scale_head = (nn.Sequential(MLPResNet(*sizes), chunk) for _ in range(2))
        nn.init.constant_(self.scale_head[0].linear_out.bias, config.log_scale_init)
        self.backbone.requires_grad_(False)
        if config.lora_rank:
            add_lora(self, config.lora_rank)

    @property
    def device(self):
        return self.action_head[0].linear_in.weight.device

    def features(self, images, state, instruction):
        """Images float in [-1, 1], state as it comes -> what both heads are shown (B, D)."""
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.reader.hidden(to_uint8(images), [f"What should the robot do to {text}?" for text in instruction])
        return torch.cat([hidden, self.normalizer.normalize_state(state.to(self.device))], dim=1)

    @torch.no_grad()
    def stem(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, 1, D): what the model makes of each alone (a distance for `fidelity`)."""
        return self.reader.hidden(to_uint8(images)[:, None], [""] * len(images))[:, None]

    def save_pretrained(self, folder):
        """What was trained (`runs.learned`) and where the rest is."""
        config = asdict(replace(self.config, lora_rank=lora_rank(self)))
        save_model(folder, self, {"model_type": self.MODEL_TYPE, "config": config, "normalizer": self.normalizer.to_dict()},
                   whole=False)

    @classmethod
    def from_pretrained(cls, folder) -> VLMPolicy:
        return load_pretrained(folder, "policy", cls, lambda saved: (
            PolicyConfig(**saved["config"]), Normalizer.from_dict(saved["normalizer"])), whole=False).eval()
