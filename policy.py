"""The policy: OpenVLA-OFT's structure (arXiv 2502.19645), World-Env's scale head, a size for two CPU cores.

    two camera views ─► conv stem ◄─FiLM─┐ 2·16 tokens ┐
    instruction ──────► word embedding ──┴ N tokens    ├─► bidirectional ─► states of ─► action head ─► loc
    state (8) ────────► MLP ─────────────► 1 token     │   transformer      the L     ─► scale head ──► log b
    L learned action tokens ───────────────────────────┘   (one pass)       (B, L, D)   a ~ Laplace(loc, b)

One forward pass gives a whole chunk: `policy(obs)` returns one `ActionDistribution` that samples AND scores,
in normalised action space; `policy.env_actions` turns its samples into environment units.

Departures from OpenVLA-OFT and World-Env:
 1. The backbone is the same `LlamaModel` with `is_causal = False`, but small and trained from scratch. A conv
    stem replaces DINOv2 + SigLIP, and a hashed word embedding the tokeniser: no file is downloaded. The sentence
    modulates the stem's channels (FiLM, as in OpenVLA-OFT+), so that it looks for what is named.
 2. One learned action token a control step (OFT: one a dimension, 56 of zeros, told apart by rotary position alone), read
    out at its own position (OFT reads them shifted by one, a left-over of next-token prediction). A pass costs half as
    much, and after as many steps the clone solves five times as many episodes (ABLATIONS.md).
 3. Augmentation is a random shift with repeated edges, so that there is nothing to crop at test time (OFT: a
    random 90 % crop, then a centre crop), and brightness, contrast and saturation (OFT: hue as well).
 4. log b lies in [-5, 0.5] (World-Env: [-2, 0.5]). Noise is independent at every control step, a random walk
    of the hand: on two tasks of LIBERO-Object 18 of 30 episodes succeeded at b = 0.03 and 5 of 30 at b = 0.1.
    Besides, with the bias at -3 a clamp at -2 passes no gradient: the scale head could not learn.
 5. In cloning the scale head learns from detached features and a detached loc: its gradient stays its own.
 6. Cloning is by Muon (muon.py) instead of AdamW: it gets as far in two thirds of the steps (ABLATIONS.md).
 7. The gripper follows its mean: the robot reads its sign alone, and b is a thirtieth of its size. Noise there would change
    nothing, but its score, 1 / b, was up to nine tenths of the policy gradient, noise for RL (ABLATIONS.md).

Shapes: B batch, V views, L action-chunk length, A action dimensions, C, H, W image, N words, D width.

Try it:  python -m pytest tests/test_policy.py
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from distributed import world_size
from episodes import Normalizer, to_float, tokenize
from runs import UserError, load_pretrained, parts, save_model

MODEL_TYPE = "world_env_policy"


@dataclass
class PolicyConfig:
    """The defaults are the size `small`; `PolicyConfig.tiny()` is for tests."""
    image_size: int = 64  # H = W in pixels; a power of two times `grid`
    views: int = 2  # V: agent view and wrist
    chunk_size: int = 8  # L: control steps that one pass predicts, all of them executed
    action_dim: int = 7  # A: translation 3, rotation 3, gripper 1
    state_dim: int = 8  # gripper position 3, axis-angle 3, finger joints 2
    width: int = 128  # D of the transformer and of both heads
    layers: int = 4  # transformer blocks
    attention_heads: int = 4  # attention heads of a block
    mlp_ratio: float = 2.0  # hidden width of a block's gated MLP over D
    stem_width: int = 128  # channels of the conv stem's last map; halved at each step towards the pixels
    grid: int = 4  # a view becomes grid x grid tokens
    vocab_size: int = 4096  # rows of the hashed word table; at this size no two words of LIBERO share one
    log_scale_init: float = -3.0  # bias of the scale head's last layer: log b at the start
    log_scale_min: float = -5.0  # lower clamp of log b; below it the scale head gets no gradient
    log_scale_max: float = 0.5  # upper clamp of log b
    scale_loss_weight: float = 0.1  # of the scale head in cloning; under 1 for the sake of gradient clipping
    augment: bool = True  # shift and colour jitter in clone_loss
    max_shift: float = 0.05  # largest random shift of a view, as a fraction of the image side
    jitter: float = 0.2  # largest relative change of brightness, contrast and saturation
    backbone: str = ""  # folder or hub id: OpenVLA-OFT (openvla.py) or an image-text model (vlm_policy.py); empty: ours
    statistics: str = ""  # with a backbone: key in its dataset_statistics.json; empty: the suite's
    lora_rank: int = 0  # with a backbone: cloning fine-tunes it by LoRA of this rank (OFT: 32); 0: heads that are new alone
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # with a backbone: of its frozen weights
    gradient_checkpointing: bool = False  # with a backbone: work layers out again for the gradient, not keep them (LoRA)

    @classmethod
    def tiny(cls) -> "PolicyConfig":
        return cls(width=64, layers=2, stem_width=64)


# ------------------------------------------------------------------------------------------------------------
# Distribution
# ------------------------------------------------------------------------------------------------------------
@dataclass
class ActionDistribution:
    """Independent Laplace over a chunk of normalised actions. The only place that samples or scores one.

    The last dimension, the gripper's, follows its mean and is not scored (departure 7).
    loc, log_scale: (B, L, A), float32 outside autocast. At b = 0.03 bfloat16's rounding of loc would be worth
    a tenth of b in every dimension, and the ratio of PPO multiplies them.
    """
    loc: torch.Tensor
    log_scale: torch.Tensor
    by_chunk: bool = False  # one draw moves all L steps of a chunk alike, with b their geometric mean

    @property
    def mode(self) -> torch.Tensor:
        return self.loc

    @property
    def log_b(self) -> torch.Tensor:
        """(B, L, A), or (B, 1, A) by chunk."""
        return self.log_scale.mean(1, keepdim=True) if self.by_chunk else self.log_scale

    def unit_noise(self, generator=None) -> torch.Tensor:
        """(B, L, A), or (B, 1, A) by chunk: unit Laplace, always finite, the difference of two unit exponentials; 0 for
        the gripper.

        generator: one, or a list with one for each of B.
        """
        if isinstance(generator, list):
            rows = [replace(self, loc=loc[None], log_scale=scale[None]).unit_noise(one)
                    for loc, scale, one in zip(self.loc, self.log_scale, generator)]
            return torch.cat(rows)
        device = self.loc.device if generator is None else generator.device
        first, second = torch.empty(2, *self.log_b.shape, dtype=self.loc.dtype, device=device).exponential_(
            generator=generator).to(self.loc.device)
        return torch.cat([(first - second)[..., :-1], torch.zeros_like(first[..., -1:])], dim=-1)

    def displaced(self, noise) -> torch.Tensor:
        """(B, L, A): the mean, displaced by b times unit noise."""
        return (self.loc + self.log_b.exp() * noise).detach()

    def sample(self, generator=None) -> torch.Tensor:
        """(B, L, A)."""
        return self.displaced(self.unit_noise(generator))

    def log_prob(self, actions) -> torch.Tensor:
        """actions (B, L, A) -> (B, L): one log-probability a control step, the sum over the dimensions of the motion.

        By chunk it is that of the chunk's mean action, and the same at all steps: how loc changes from step to step is
        not explored, so nothing can be learned about it.
        """
        error = actions - self.loc
        distance = (error.mean(1, keepdim=True) if self.by_chunk else error).abs() * (-self.log_b).exp()
        return -(distance + self.log_b + math.log(2))[..., :-1].sum(-1).expand(self.loc.shape[:2])

    def entropy(self) -> torch.Tensor:
        """(B, L)."""
        return (1 + math.log(2) + self.log_b)[..., :-1].sum(-1).expand(self.loc.shape[:2])

    def tempered(self, temperature) -> "ActionDistribution":
        """The same with b times `temperature` > 0, a number or (B, 1, 1). Score with what has sampled."""
        factor = torch.as_tensor(temperature, dtype=self.loc.dtype, device=self.loc.device)
        return replace(self, log_scale=self.log_scale + factor.log())


# ------------------------------------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------------------------------------
def augment(images, config, generator):
    """uint8 (B, V, 3, H, W) -> float in [-1, 1]. Each view has its shift, each sample its colours."""
    B, V, C, H, W = images.shape
    reach = round(config.max_shift * H)
    shift = torch.randint(-reach, reach + 1, (2, B * V, 1), generator=generator, device=images.device)
    pixels = torch.arange(H, device=images.device)
    rows, columns = (pixels + shift).clamp(0, H - 1)                          # (B·V, H) each: edges repeat
    which = torch.arange(B * V, device=images.device)[:, None, None]
    shifted = images.flatten(0, 1).permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    shifted = to_float(shifted).permute(0, 3, 1, 2).reshape(B, V, C, H, W)
    brightness, contrast, saturation = config.jitter * (
        2 * torch.rand(3, B, 1, 1, 1, 1, generator=generator, device=images.device) - 1)
    grey = shifted.mean(2, keepdim=True)                                      # (B, V, 1, H, W)
    level = grey.mean((1, 3, 4), keepdim=True)                                # (B, 1, 1, 1, 1)
    shifted = grey + (shifted - grey) * (1 + saturation)
    return (level + (shifted - level) * (1 + contrast) + brightness).clamp(-1, 1)


class ConvStem(nn.Module):
    """One view (B, 3, H, W) -> grid² tokens (B, N, D), seen with a sentence (B, D) in mind, or none. Both views share it.

    The sentence scales and shifts the channels of every map (FiLM, arXiv 1709.07871). Each step halves the map; the
    last one turns 2x2 cells of `stem_width` channels into a token, so the place of an edge inside its token's 16 pixels
    survives in the channels.
    """

    def __init__(self, config):
        super().__init__()
        steps = int(math.log2(config.image_size // config.grid))
        if config.grid << steps != config.image_size:
            raise UserError(f"image_size {config.image_size} must be a power of two times grid {config.grid}")
        widths = [3] + [config.stem_width >> (steps - 2 - i) for i in range(steps - 1)]
        kernels = [5] + [3] * (steps - 2)
        self.blocks = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(n_in, n_out, k, 2, k // 2), nn.GroupNorm(1, n_out))
            for n_in, n_out, k in zip(widths, widths[1:], kernels)))
        self.film = nn.ModuleList(nn.Linear(config.width, 2 * n_out) for n_out in widths[1:])
        for film in self.film:  # at first the words change nothing
            nn.init.zeros_(film.weight), nn.init.zeros_(film.bias)
        self.norm = nn.LayerNorm(config.width)
        self.patches = nn.Conv2d(widths[-1], config.width, 2, stride=2)

    def forward(self, x, sentence=None):
        words = None if sentence is None else self.norm(sentence)
        for block, film in zip(self.blocks, self.film):
            x = block(x)
            if words is not None:
                scale, shift = film(words)[:, :, None, None].chunk(2, dim=1)  # (B, channels, 1, 1) each
                x = x * (1 + scale) + shift
            x = nn.functional.gelu(x)
        return self.patches(x).flatten(2).transpose(1, 2)


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.norm(x)).relu()


class MLPResNet(nn.Module):
    """OpenVLA-OFT's action head: (..., n_in) -> (..., n_out), no squashing at the end."""

    def __init__(self, n_in, width, n_out):
        super().__init__()
        self.norm_in, self.linear_in = nn.LayerNorm(n_in), nn.Linear(n_in, width)
        self.blocks = nn.Sequential(ResidualBlock(width), ResidualBlock(width))
        self.norm_out, self.linear_out = nn.LayerNorm(width), nn.Linear(width, n_out)

    def forward(self, x):
        return self.linear_out(self.norm_out(self.blocks(self.linear_in(self.norm_in(x)).relu())))


# ------------------------------------------------------------------------------------------------------------
# Policy
# ------------------------------------------------------------------------------------------------------------
class Policy(nn.Module):
    """obs -> ActionDistribution over normalised actions (B, L, A).

    obs = {"images": uint8 (B, V, 3, H, W) upright, "state": (B, 8) in m and rad, "instruction": list of B}
    """

    def __init__(self, config: PolicyConfig, normalizer: Normalizer):
        super().__init__()
        self.config, self.normalizer = config, normalizer
        D = config.width
        self.stem = ConvStem(config)
        self.view_position = nn.Parameter(0.02 * torch.randn(config.views, config.grid ** 2, D))
        self.proprio_projector = nn.Sequential(nn.Linear(config.state_dim, D), nn.GELU(), nn.Linear(D, D))
        self.action_tokens = nn.Parameter(0.02 * torch.randn(config.chunk_size, D))
        self.backbone = LlamaModel(LlamaConfig(
            vocab_size=config.vocab_size, pad_token_id=0, hidden_size=D, num_hidden_layers=config.layers,
            intermediate_size=int(config.mlp_ratio * D), num_attention_heads=config.attention_heads,
            is_causal=False))
        self.action_head = MLPResNet(D, D, config.action_dim)
        self.scale_head = MLPResNet(D, D, config.action_dim)
        nn.init.constant_(self.scale_head.linear_out.bias, config.log_scale_init)

    @property
    def device(self):
        return self.action_tokens.device

    def forward(self, obs) -> ActionDistribution:
        features = self.features(to_float(obs["images"].to(self.device)), obs["state"], obs["instruction"])
        return self.heads(features, features)

    def features(self, images, state, instruction):
        """Images float in [-1, 1], state as it comes -> hidden states of the action tokens (B, L, D)."""
        B, V, C, H, W = images.shape
        ids, is_word = tokenize(instruction, self.config.vocab_size, self.device)
        words = self.backbone.embed_tokens(ids)                                             # (B, N, D)
        sentence = (words * is_word[..., None]).sum(1)                                      # (B, D)
        views = self.stem(images.flatten(0, 1), sentence.repeat_interleave(V, dim=0))       # (B·V, 16, D)
        views = views.unflatten(0, (B, V)) + self.view_position                             # (B, V, 16, D)
        state = self.normalizer.normalize_state(state.to(self.device))
        proprio = self.proprio_projector(state)[:, None]                                    # (B, 1, D)
        slots = self.action_tokens.expand(B, -1, -1)                                        # (B, L, D)
        tokens = torch.cat([views.flatten(1, 2), proprio, words, slots], dim=1)
        n_before, n_after = V * views.shape[2] + 1, slots.shape[1]
        mask = nn.functional.pad(is_word.long(), (n_before, n_after), value=1)             # (B, 33 + N + L)
        # Positions count valid tokens, so padding neither is seen nor moves what follows it.
        hidden = self.backbone(inputs_embeds=tokens, attention_mask=mask, position_ids=mask.cumsum(1) - 1,
                               use_cache=False).last_hidden_state
        return hidden[:, -n_after:]                                                         # (B, L, D)

    def heads(self, loc_features, scale_features) -> ActionDistribution:
        with torch.autocast(self.device.type, enabled=False):
            loc = self.action_head(loc_features.float())
            log_scale = self.scale_head(scale_features.float())
        return ActionDistribution(loc, log_scale.clamp(self.config.log_scale_min, self.config.log_scale_max))

    def env_actions(self, actions) -> torch.Tensor:
        """Normalised (B, L, A) -> environment units, clipped to [-1, 1]; gripper -1 (open) or +1 (close)."""
        actions = self.normalizer.unnormalize_action(actions).clamp(-1, 1)
        gripper = torch.where(actions[..., -1:] > 0, 1.0, -1.0)
        return torch.cat([actions[..., :-1], gripper], dim=-1)

    def save_pretrained(self, folder):
        save_model(folder, self, {"model_type": MODEL_TYPE, "config": asdict(self.config),
                                  "normalizer": self.normalizer.to_dict()})

    @classmethod
    def from_pretrained(cls, folder) -> "Policy":
        """folder: or a hub id, as for the world model and the reflector."""
        def arguments(saved):
            if saved.get("model_type") != MODEL_TYPE:
                raise UserError(f"{folder} holds a {saved.get('model_type')}, not a policy: name another")
            return PolicyConfig(**saved["config"]), Normalizer.from_dict(saved["normalizer"])

        return load_pretrained(folder, "policy", cls, arguments).eval()


# ------------------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------------------
def clone_loss(policy, batch, generator, rows=slice(None)):
    """Behaviour cloning: L1 for the mean (OpenVLA-OFT), the Laplace negative log-likelihood for the scale.

    batch: obs and "actions" (B, L, A) normalised, "valid" (B, L) bool: False where a demonstration has ended.
    generator: on the batch's device; draws for the whole batch, of which `rows` alone are learned.
    """
    config = policy.config
    images = augment(batch["images"], config, generator) if config.augment else to_float(batch["images"])
    features = policy.features(images[rows], batch["state"][rows], batch["instruction"][rows])
    predicted = policy.heads(features, features.detach())
    valid = batch["valid"][rows]
    actions = torch.where(valid[..., None], batch["actions"][rows], 0.0)  # padding may hold anything, NaN too
    l1 = masked_mean((predicted.loc - actions).abs().mean(-1), valid)
    scale = ActionDistribution(predicted.loc.detach(), predicted.log_scale)
    nll = -masked_mean(scale.log_prob(actions), valid) / (actions.shape[-1] - 1)
    with torch.no_grad():
        gripper = [policy.env_actions(values)[..., -1] for values in (predicted.loc, actions)]
        gripper = masked_mean((gripper[0] == gripper[1]).float(), valid)
        log_scale = masked_mean(predicted.log_scale[..., :-1].mean(-1), valid)
    metrics = {"l1": l1.detach(), "nll": nll.detach(), "log_scale": log_scale, "gripper_accuracy": gripper}
    return l1 + config.scale_loss_weight * nll, metrics


def anchor_loss(policy, generator, data, size, microbatch):
    """`clone_loss` on `size` control steps of `data` (`CloneData`), in parts that add up: what RL is held by.

    generator: on the CPU. Yields a process's parts, `microbatch` control steps of all processes each.
    """
    batch, seed = data.batch(size, generator), int(torch.randint(2**62, (), generator=generator))
    for rows, weight in parts(batch, min(-(-size // max(microbatch, world_size())), max(1, size // world_size()))):
        yield weight * clone_loss(policy, batch, torch.Generator(data.device).manual_seed(seed), rows)[0]


def masked_mean(values, valid):
    """Mean of values (B, L) over the valid steps."""
    return (values * valid).sum() / valid.sum().clamp(min=1)
