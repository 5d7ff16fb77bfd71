"""Pretrained models that look at pictures: encoders and a VAE for the world simulator, image-text models for reflector and
policy.

What the world simulator attends to (World-Env section 3.2, geometry-aware feature injection):

The paper lets frozen VGGT features (geometry) and frozen CLIP features (semantics) enter its U-Net by cross-attention at
several resolutions. Here any list of encoders does: `--world_model.encoders A B`, where each is the folder or hub name
of a Hugging Face vision model (DINOv2, CLIP, SigLIP, and whatever else AutoModel knows), or `ours`, a small network
that is trained along with the simulator and needs no download. The reference frame is the last one of the memory.
`--world_model.vae` lets it diffuse the latents of an image VAE, as the paper's does, instead of pixels.

    last frame, V views ─► encoder A ─► tokens ─► Linear ─► + view ─┐
                      └──► encoder B ─► tokens ─► Linear ─► + view ─┴─► (B, N, D) ─► cross-attention in the U-Net

Shape letters: B trajectories, V camera views, C, H, W image, N tokens, D width.

Try it: python -m pytest tests/test_encoders.py
"""
from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_layers import GradientCheckpointingLayer

from runs import UserError

AT_ONCE = 64  # pictures in a pass through a VAE


class GridEncoder(nn.Module):
    """Trained along: pictures (B, 3, H, W) in [-1, 1] -> a token for every 8x8 pixels, (B, N, D)."""

    def __init__(self, width: int):
        super().__init__()
        sizes = [(3, width // 4), (width // 4, width // 2), (width // 2, width)]
        self.layers = nn.Sequential(*(layer for i, o in sizes for layer in
                                      (nn.Conv2d(i, o, 4, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU())))
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


class PretrainedEncoder(nn.Module):
    """Frozen: the last hidden states of a Hugging Face vision model, at the size and colours it was trained with.

    It is kept out of `parameters` and `state_dict`: checkpoints hold what was trained, and its name.
    """

    def __init__(self, name: str):
        super().__init__()
        try:
            processor, model = AutoImageProcessor.from_pretrained(name), AutoModel.from_pretrained(name)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"--world_model.encoders {name} is neither 'ours' nor a Hugging Face vision model with its "
                            f"image processor: {reason}") from None
        model = getattr(model, "vision_model", model)  # CLIP and SigLIP hold a text model as well
        self.frozen = [model.eval().requires_grad_(False)]  # a list hides it from nn.Module
        self.width = model.config.hidden_size
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        self.size = size.get("height") or size["shortest_edge"]
        for key in ("mean", "std"):
            value = torch.tensor(getattr(processor, f"image_{key}")).view(1, 3, 1, 1)
            self.register_buffer(key, value, persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, N, width)."""
        images = F.interpolate((images + 1) / 2, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        model = self.frozen[0].to(images.device)
        return model(pixel_values=(images - self.mean) / self.std).last_hidden_state


class Latents:
    """A frozen image VAE of diffusers: pictures to latents, coarser by `factor` and of variance about 1, and back.

    Not a module: checkpoints of the simulator hold its name, not its weights.
    """

    def __init__(self, name: str):
        folder = Path(name) / "vae"  # where a whole pipeline has it
        try:
            self.vae = AutoencoderKL.from_pretrained(folder if folder.is_dir() else name).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"--world_model.vae {name} is no AutoencoderKL of diffusers: {reason}") from None
        config = self.vae.config
        self.channels, self.factor = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """n pictures a sample (B, n*3, H, W) in [-1, 1] -> (B, n*channels, H/factor, W/factor)."""
        vae, pictures = self.vae.to(images.device), images.unflatten(1, (-1, 3)).flatten(0, 1)
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(AT_ONCE)])
        return ((latents - self.shift) * self.scale).unflatten(0, (len(images), -1)).flatten(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The way back."""
        each = latents.unflatten(1, (-1, self.channels)).flatten(0, 1) / self.scale + self.shift
        pictures = torch.cat([self.vae.decode(part).sample for part in each.split(AT_ONCE)])
        return pictures.unflatten(0, (len(latents), -1)).flatten(1, 2)


class ImageTextModel:
    """Any Hugging Face image-text model with its processor (SmolVLM, LLaVA, Qwen-VL, …): pictures and a question go in,
    the last hidden state of the prompt's last word comes out. Not a module: who holds it decides what of it is trained.

    flag: of the command line, for the error.
    """

    def __init__(self, name: str, flag: str, dtype=torch.float32):
        try:
            self.processor = AutoProcessor.from_pretrained(name)
            with torch.device("meta"):  # its shapes alone
                shapes = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name), dtype=dtype)
            check_memory(size_of(shapes), torch.device("cpu"), f"to read {name}",
                         f"take a smaller model, {flag.replace('backbone', 'dtype')} bfloat16 or a larger machine")
            self.model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).eval()
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{flag} {name} is no Hugging Face image-text model with its processor: {reason}") from None
        self.width = self.model.config.get_text_config().hidden_size

    def hidden(self, pictures: Tensor, questions: list[str]) -> Tensor:
        """Pictures uint8 (N, P, 3, H, W), N questions -> (N, width); eight at a time where no gradient is wanted."""
        size = len(questions) if torch.is_grad_enabled() else 8
        return torch.cat([self._read(pictures[i:i + size], questions[i:i + size]) for i in range(0, len(questions), size)])

    def _read(self, pictures: Tensor, questions: list[str]) -> Tensor:
        device, dtype = self.model.device, self.model.dtype
        files = [[Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in row] for row in pictures]
        text = [self.prompt(question, pictures.shape[1]) for question in questions]
        inputs = self.processor(images=files, text=text, padding=True, return_tensors="pt").to(device, dtype)
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state  # (N, tokens, width), without logits
        mask = inputs["attention_mask"]  # padding may be on either side
        last = (mask * torch.arange(mask.shape[1], device=device)).argmax(dim=1)
        return hidden[torch.arange(len(last), device=device), last].float()

    def prompt(self, question: str, pictures: int) -> str:
        """The question, in the model's own chat format where it has one."""
        if self.processor.chat_template is None:
            return " ".join([self.processor.image_token] * pictures + [question])
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def recompute_layers(model: nn.Module):
    """Gradient checkpointing of a transformers model: the backward pass works each layer out again from its input, so that
    the inputs are all that is kept. Whether or not it trains: PPO scores in eval mode, where transformers' own does nothing.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


class Injection(nn.Module):
    """All encoders' tokens of a pair of pictures, in one width."""

    def __init__(self, names: tuple[str, ...], width: int, views: int = 2):
        super().__init__()
        self.encoders = nn.ModuleList(GridEncoder(width) if name == "ours" else PretrainedEncoder(name) for name in names)
        self.project = nn.ModuleList(nn.Sequential(nn.LayerNorm(encoder.width), nn.Linear(encoder.width, width))
                                     for encoder in self.encoders)
        self.view = nn.Parameter(torch.randn(len(names), views, width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, V, 3, H, W) in [-1, 1] -> tokens (B, N, D) of all views and encoders."""
        B, V = images.shape[:2]
        tokens = []
        for encoder, project, view in zip(self.encoders, self.project, self.view):
            found = project(encoder(images.flatten(0, 1))).unflatten(0, (B, V))  # (B, V, N, D)
            tokens.append((found + view[None, :, None]).flatten(1, 2))
        return torch.cat(tokens, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------
def size_of(module) -> int:
    """Bytes of its parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def check_memory(needed, device, what, remedy):
    """UserError if `device` has less free memory than `needed` bytes."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    if needed > free:
        raise UserError(f"{needed / 1e9:.1f} GB of memory are needed {what}, {free / 1e9:.1f} GB are free on {device}: "
                        f"{remedy}")
