"""The instant reflector: given the frames so far and the instruction, how likely is it that the task is done?

World-Env (arXiv 2509.24948), "VLM-guided instant reflector": R(o_1..o_t, g) = sigmoid(head(h_t)), trained
by binary cross-entropy on per-frame success labels. In imagination it pays the reward and ends the episode
(`StopRule`); at test time it is the robot's own decision to stop ("self stop").

      first, previous, current frame            instruction
        (V views each, one stack)             words -> hash -> mean
                  |                                  |
            stem, stride 4                           |
       residual blocks at 16x16, 8x8  <--- FiLM -----+
                  |                                  |
      largest value anywhere  ---- concatenate ------+
                  |                    <- FrameEncoder ends here; VLMEncoder takes its place on request
                  + <--- MLP --- how far the fingers were apart in the last 8 frames
                  |
             h_t (D numbers)
                  |
     dropout, LayerNorm, Linear, ReLU, Linear   <- the reward head
                  |
               logit_t

Departures from the paper
1. The paper shows the frames to a frozen vision encoder and a frozen language model and trains only the head:
   `--reflector.backbone PATH` does that with any Hugging Face image-text model, which reads every training frame once.
   Two cores can't run those, so by default a small convolutional network is trained from scratch in their place.
2. h_t sees three frames of the prefix (first, previous, current): what the scene looked like, what just
   moved, what is there now. How many frames the paper's VLM sees isn't published.
3. The instruction is a mean of word vectors: word order is lost, but LIBERO's tasks stay apart.
4. Shift and brightness augmentation (not with a backbone), because five demonstrations a task are few. The paper names
   none.
5. The true robot stops when two frames in a row score above eta (in imagination, as in the paper, one). A single one came
   a chunk too early in every lost episode: the object in the basket and still in the hand.
6. It is told how far the fingers were apart (`fingers`), which any robot knows: fingers that met have nothing to let
   go of. On imagined pictures it could not see that, and paid for empty hands (ABLATIONS.md).
A policy can cheat a reward model where it stops falsely, so `reflector_metrics` reports `false_stop_rate`.

Shapes: B trajectories, T time in chunks, K = 8 newest frames, V views, C,H,W image, N frames to judge, D width,
E episodes.

Try it:  python -m pytest tests/test_reflector.py
"""
from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders import ImageTextModel
from episodes import to_float, tokenize
from geometry import MAX_OPENING
from runs import load_pretrained, save_model


@dataclass
class ReflectorConfig:
    """The reflector: network sizes, and what its training does to the frames."""

    backbone: str = ""  # folder or hub name of an image-text model to freeze and read; empty: a network of ours
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the backbone
    views: int = 2  # cameras: agent view, wrist
    channels: int = 48  # convolution channels at 16x16; twice as many at 8x8
    width: int = 128  # D, the length of h_t and of a word vector
    vocabulary: int = 4096  # hash buckets for words; bucket 0 means "no word"
    fingers: bool = True  # tell it how far the fingers were apart lately (the paper's: False)
    dropout: float = 0.3  # of h_t in training
    shift: int = 4  # augmentation: random shift of a view by up to this many pixels
    brightness: float = 0.3  # augmentation: random gain of 1 +- this


@dataclass
class StopRule:
    """When the reflector ends an episode. In imagination at the first frame that it takes for done, as in the paper: what
    comes after it was seldom recorded, so seldom imagined well. The true robot may wait for a second one (`EvaluateConfig`).
    """

    eta: float = 0.5  # score above which a frame counts as done (the paper's 0.5)
    confirm: int = 1  # frames in a row that must count as done

    def confirmed(self, scores: np.ndarray) -> np.ndarray:
        """Scores (..., T), one a chunk -> (..., T): the least of the last `confirm`, 0 before there are as many."""
        before = np.zeros((*scores.shape[:-1], self.confirm - 1), scores.dtype)
        windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([before, scores], axis=-1), self.confirm, axis=-1)
        return windows.min(axis=-1)

    def stops(self, scores: np.ndarray) -> np.ndarray:
        """Scores (..., T) -> bool (..., T): the episode would end here, had it not ended before."""
        return self.confirmed(scores) > self.eta  # never where it is NaN


class FilmBlock(nn.Module):
    """A residual block; the instruction scales and shifts its channels (FiLM, arXiv 1709.07871)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(width, 2 * channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.film(text)[:, :, None, None].chunk(2, dim=1)  # (N, channels, 1, 1) each
        hidden = self.norm2(self.conv1(F.relu(self.norm1(x))))
        return x + self.conv2(F.relu(hidden * (1 + scale) + shift))


class FrameEncoder(nn.Module):
    """(first, previous, current) frames + instruction -> h_t (N, D)."""

    def __init__(self, config: ReflectorConfig):
        super().__init__()
        self.vocabulary = config.vocabulary
        C, D = config.channels, config.width
        self.words = nn.Embedding(config.vocabulary, D, padding_idx=0)
        self.stem = nn.Conv2d(3 * config.views * 3, C, 6, stride=4, padding=1)
        self.block1 = FilmBlock(C, D)
        self.down = nn.Conv2d(C, 2 * C, 3, stride=2, padding=1)
        self.block2 = FilmBlock(2 * C, D)
        self.out = nn.Linear(2 * C + D, D)

    def forward(self, first: Tensor, previous: Tensor, current: Tensor, instruction: list[str]) -> Tensor:
        words, is_word = tokenize(instruction, self.vocabulary, current.device)
        text = self.words(words).sum(dim=1) / is_word.sum(dim=1, keepdim=True).clamp(min=1)  # (N, D)
        x = torch.stack([first, previous, current], dim=1).flatten(1, 3)  # (N, 3*V*3, H, W)
        x = self.stem(to_float(x))  # (N, C, H/4, W/4)
        x = self.down(self.block1(x, text))  # (N, 2C, H/8, W/8)
        x = F.relu(self.block2(x, text)).amax(dim=(2, 3))  # (N, 2C): a bowl on its plate is one wherever both are
        return self.out(torch.cat([x, text], dim=1))  # (N, D)


class VLMEncoder(nn.Module):
    """The same (N, D) from a frozen image-text model, which in training reads what it has read before only once.

    The model is kept out of `parameters` and `state_dict`: checkpoints hold what was trained, and its name.
    """

    def __init__(self, config: ReflectorConfig):
        super().__init__()
        self.vlm = ImageTextModel(config.backbone, "--reflector.backbone", getattr(torch, config.dtype))
        self.vlm.model.requires_grad_(False)
        self.read = {}  # what it made of training frames: {digest of frames and question: (width,)}
        self.out = nn.Linear(self.vlm.width, config.width)

    def forward(self, first: Tensor, previous: Tensor, current: Tensor, instruction: list[str]) -> Tensor:
        self.vlm.model.to(self.out.weight.device)
        frames = torch.stack([first, previous, current], dim=1).flatten(1, 2)  # (N, 3*V, 3, H, W)
        questions = [f"The first, the previous and the current view of a robot. Is the task done: {words}?"
                     for words in instruction]
        with torch.no_grad():  # in imagination no frame comes twice
            hidden = self.remembered(frames, questions) if self.training else self.vlm.hidden(frames, questions)
        return self.out(hidden)

    def remembered(self, frames: Tensor, questions: list[str]) -> Tensor:
        """The model's (N, width); it reads what is not in `self.read`."""
        keys = [hashlib.sha1(pictures.tobytes() + question.encode()).digest()
                for pictures, question in zip(frames.cpu().numpy(), questions)]
        new = [i for i, key in enumerate(keys) if key not in self.read]
        if new:
            hidden = self.vlm.hidden(frames[new], [questions[i] for i in new])
            self.read.update(zip((keys[i] for i in new), hidden.cpu()))
        return torch.stack([self.read[key] for key in keys]).to(frames.device)


class Reflector(nn.Module):
    """R(o_1..o_t, g). Frames are uint8, upright, 0..255."""

    def __init__(self, config: ReflectorConfig):
        super().__init__()
        self.config = config
        self.encoder = VLMEncoder(config) if config.backbone else FrameEncoder(config)
        D = config.width
        self.fingers = nn.Sequential(nn.Linear(8, D), nn.ReLU(), nn.Linear(D, D)) if config.fingers else None
        self.head = nn.Sequential(nn.Dropout(config.dropout), nn.LayerNorm(D), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1))
        self.register_buffer("platt", torch.tensor([1.0, 0.0]))  # set by `calibrate`

    def forward(self, frames: Tensor, instruction: list[str], fingers: Tensor) -> Tensor:
        """Frames (B, T, V, 3, H, W), B texts, fingers (B, T, K): see `finger_history`.

        -> logits (B, T); logit t looks at frames 0, t-1 and t only.
        """
        first = frames[:, :1].expand_as(frames)
        previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        texts = [text for text in instruction for _ in range(frames.shape[1])]
        rows = (values.flatten(0, 1) for values in (first, previous, frames))  # N = B*T
        return self.judge(*rows, texts, fingers.flatten(0, 1)).view(frames.shape[:2])

    def judge(self, first: Tensor, previous: Tensor, current: Tensor, instruction: list[str],
              fingers: Tensor) -> Tensor:
        """Frames (N, V, 3, H, W) each, fingers (N, K) -> logits (N,)."""
        h = self.encoder(first, previous, current, instruction)  # (N, D)
        if self.fingers is not None:
            h = h + self.fingers(fingers / MAX_OPENING * 2 - 1)
        return self.head(h).float().squeeze(1)

    @torch.no_grad()
    def score(self, first: Tensor, previous: Tensor, current: Tensor, instruction: list[str],
              fingers: Tensor) -> Tensor:
        """Frames (B, V, 3, H, W) each -> P(task done) (B,). In the first frame, previous = first."""
        return self.probability(self.judge(first, previous, current, instruction, fingers))

    def probability(self, logits: Tensor) -> Tensor:
        """P(task done), calibrated."""
        return torch.sigmoid(self.platt[0] * logits + self.platt[1])

    def save_pretrained(self, folder: str | Path) -> None:
        save_model(folder, self, asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Reflector:
        return load_pretrained(folder, "reflector", cls, lambda saved: [ReflectorConfig(**saved)])


def augment(frames: Tensor, config: ReflectorConfig, generator: torch.Generator) -> Tensor:
    """Shift each view and change its brightness, the same way at all times. uint8 -> uint8."""
    if config.backbone:
        return frames  # a frozen model reads every frame once
    B, T, V, C, H, W = frames.shape
    device = frames.device
    uniform = 2 * torch.rand(3, B, V, generator=generator, device=generator.device).to(device) - 1
    shift = (uniform[:2] * (config.shift + 0.5)).round().long()[..., None]  # (2, B, V, 1) pixels
    gain = 1 + config.brightness * uniform[2, :, None, :, None, None, None]  # (B, 1, V, 1, 1, 1)
    rows = (torch.arange(H, device=device) + shift[0]).clamp(0, H - 1)  # (B, V, H): edges repeat
    columns = (torch.arange(W, device=device) + shift[1]).clamp(0, W - 1)  # (B, V, W)
    b = torch.arange(B, device=device)[:, None, None, None]
    v = torch.arange(V, device=device)[:, None, None]
    moved = frames.permute(0, 2, 4, 5, 1, 3)  # (B, V, H, W, T, C)
    moved = moved[b, v, rows[:, :, :, None], columns[:, :, None]]
    return (moved.permute(0, 4, 1, 5, 2, 3) * gain).clamp(0, 255).to(torch.uint8)  # (B, T, V, C, H, W)


def reflector_loss(model: Reflector, batch: dict, generator: torch.Generator, rows=slice(None)) -> tuple[Tensor, dict]:
    """Binary cross-entropy, the mean over `rows`.

    batch: frames uint8 (N, 3, V, 3, H, W), first, previous and current; instruction (N texts), labels (N,) in {0, 1}, and
    fingers (N, K).
    """
    frames, labels = augment(batch["frames"], model.config, generator)[rows], batch["labels"][rows]
    logits = model.judge(*frames.unbind(1), batch["instruction"][rows], batch["fingers"][rows])  # (N,)
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    accuracy = ((logits > 0) == (labels > 0.5)).float().mean()
    return loss, {"loss": loss.item(), "accuracy": accuracy.item(), "positives": labels.mean().item()}


def calibrate(model: Reflector, logits: Tensor, labels: Tensor) -> None:
    """Platt scaling on held-out frames: the slope and the shift (N,) logits need to give the labels' frequencies. Where
    all labels are alike nothing is known of either, and they stay as they are."""
    if labels.min() == labels.max():
        return
    platt = torch.tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([platt], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(platt[0] * logits + platt[1], labels) + 1e-3 * (platt[0] - 1) ** 2
        value.backward()
        return value
    optimizer.step(loss)
    model.platt.copy_(platt.detach())


def auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """P(a random positive scores above a random negative), ties count one half; None without both classes."""
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return None
    _, value, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # mean rank, from 1, of every distinct score
    return float((rank[value][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def reflector_metrics(scores: np.ndarray, labels: np.ndarray, valid: np.ndarray, rule: StopRule) -> dict:
    """Held-out quality; scores in [0, 1], labels, valid: (E, T), one row an episode. Undefined = None.

    Over frames: auroc, brier, and ece in 10 equal bins; precision and recall of the frames in which `rule` would stop.
    Over episodes, which stop at their first such frame:
      false_stop_rate  stopped at a frame with label 0 / all episodes
      missed_rate      never stopped / episodes with a success frame
      stop_delay       mean chunks from the first success frame to the stop, where the stop was right
    """
    labels, valid = labels > 0.5, valid.astype(bool)
    stop, success = rule.stops(scores) & valid, labels & valid
    p, y = scores[valid], labels[valid]  # (frames,)
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = [abs(p[bins == i].sum() - y[bins == i].sum()) for i in range(10)]

    stopped, succeeded = stop.any(axis=1), success.any(axis=1)  # (E,)
    first = stop.argmax(axis=1)
    right = stopped & success[np.arange(len(scores)), first]
    delay = (first - success.argmax(axis=1))[right]
    return {
        "auroc": auroc(p, y),
        "precision": _ratio((stop & success).sum(), stop.sum()),
        "recall": _ratio((stop & success).sum(), success.sum()),
        "false_stop_rate": _ratio((stopped & ~right).sum(), len(scores)),
        "missed_rate": _ratio((succeeded & ~stopped).sum(), succeeded.sum()),
        "stop_delay": _ratio(delay.sum(), len(delay)),
        "brier": _ratio(((p - y) ** 2).sum(), len(p)),
        "ece": _ratio(sum(gaps), len(p)),
        "frames": len(p),
        "episodes": len(scores),
    }


def _ratio(part, whole) -> float | None:
    return float(part / whole) if whole else None
