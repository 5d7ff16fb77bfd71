"""Recorded trajectories, the normaliser, and the batches that every stage learns from.

Shapes: B trajectories, T time in chunks, F memory frames, V camera views, L action-chunk length, A action dimensions.
"""
from __future__ import annotations

import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from geometry import opening
from runs import UserError, whole_file

VIEWS = ("agentview", "wrist")
MEMORY = 5  # F: EnerVerse-AC's sparse memory, frames at 0, 1/3 and 2/3 of the history and the last one; before it the grip
GRIP = 3  # its place among them
PER_FRAME, PER_STEP = ("images", "states", "success"), ("actions", "executed")  # an `Episode`'s arrays
CLOSING = 0.072  # m: fingers less open than this have begun to close


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: uint8 where they are kept, [-1, 1] where they are computed with
# ---------------------------------------------------------------------------------------------------------------------
def to_float(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------
def tokenize(instructions, vocab_size, device="cpu"):
    """list of B strings -> ids (B, N), is_word (B, N) bool; padded on the right with 0.

    A word's id is its CRC-32, the same on every machine and in every process: no vocabulary is stored.
    """
    words = [instruction.lower().split() for instruction in instructions]
    ids = torch.zeros(len(words), max(map(len, words)), dtype=torch.long)
    for row, sentence in enumerate(words):
        for column, word in enumerate(sentence):
            ids[row, column] = 1 + zlib.crc32(word.encode()) % (vocab_size - 1)
    ids = ids.to(device)
    return ids, ids > 0


# ---------------------------------------------------------------------------------------------------------------------
# Normaliser
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Normalizer:
    """1 % and 99 % quantiles of actions and states, mapped to [-1, 1]; the gripper command is left as it is."""
    action_q01: list[float]
    action_q99: list[float]
    state_q01: list[float]
    state_q99: list[float]

    @classmethod
    def fit(cls, episodes) -> "Normalizer":
        actions = np.concatenate([episode.actions for episode in episodes])
        states = np.concatenate([episode.states for episode in episodes])
        low, high = np.quantile(actions, [0.01, 0.99], axis=0)
        low[6], high[6] = -1.0, 1.0
        state_low, state_high = np.quantile(states, [0.01, 0.99], axis=0)
        # A direction that the demonstrations hardly move in must not be blown up to fill [-1, 1].
        middle, half = (low + high) / 2, np.maximum((high - low) / 2, 0.05)
        state_middle = (state_low + state_high) / 2
        state_half = np.maximum((state_high - state_low) / 2, [0.02] * 3 + [0.1] * 3 + [0.005] * 2)
        return cls(*(array.astype(float).round(6).tolist() for array in
                     (middle - half, middle + half, state_middle - state_half, state_middle + state_half)))

    def normalize_action(self, action):
        low, high = _like(self.action_q01, action), _like(self.action_q99, action)
        return 2 * (action - low) / (high - low) - 1

    def unnormalize_action(self, action):
        low, high = _like(self.action_q01, action), _like(self.action_q99, action)
        return (action + 1) / 2 * (high - low) + low

    def normalize_state(self, state):
        low, high = _like(self.state_q01, state), _like(self.state_q99, state)
        return (2 * (state - low) / (high - low) - 1).clip(-1.5, 1.5)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, value) -> "Normalizer":
        return cls(**value)


def _like(values, reference):
    if isinstance(reference, torch.Tensor):
        return torch.as_tensor(values, dtype=reference.dtype, device=reference.device)
    return np.asarray(values, dtype=reference.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Episodes
# ---------------------------------------------------------------------------------------------------------------------
def write_arrays(path, arrays: dict):
    """A compressed .npz, under a temporary name until it is whole."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


@contextmanager
def whole_arrays(path, what, remedy):
    """Yield the arrays of an .npz; UserError where it, or what is made of them inside, is not whole."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
        yield arrays
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a whole {what} ({type(error).__name__}): {remedy}") from None


@dataclass
class Chunked:
    """An episode seen at chunk boundaries."""
    images: np.ndarray  # (T+1, V, 3, H, W) uint8
    states: np.ndarray  # (T+1, 8)
    actions: np.ndarray  # (T, L, 7) executed
    success: np.ndarray  # (T+1,) bool: the task is done in this frame
    before: np.ndarray  # (L, 7) executed before its first frame; zeros where the episode had not begun

    def previous(self, t):
        """(L, 7): the chunk that led to frame t."""
        return self.actions[t - 1] if t else self.before


@dataclass
class Episode:
    """One trajectory. Frame i was drawn after `stride * i` control steps."""
    images: np.ndarray  # (N+1, V, 3, H, W) uint8, upright
    states: np.ndarray  # (N+1, 8) float32: position m, axis-angle rad, two finger joints m
    actions: np.ndarray  # (S, 7) float32, environment units: what the policy or the expert wanted
    success: np.ndarray  # (N+1,) bool: the task is done in this frame
    stride: int  # control steps between stored frames: 1 in demonstrations, half a chunk in exploration, else a chunk
    task_id: int
    instruction: str
    source: str  # "demo"; "explore" or "try" in exploration; "imagined"; "check", "evaluate", "test", "closed loop"
    seed: int
    temperature: float = 0.0  # of the noise that it was explored with
    executed: np.ndarray | None = None  # (S, 7) what the robot was told where that differs, as under an expert's pushes
    past: int = 0  # of an episode taken up again, the frame where that began: what is before it is remembered, not learned

    @property
    def scene(self) -> int:
        """A number of the placement that it was played in; episodes taken up again share their first one's."""
        return 1_000_000_000 * self.task_id + self.seed

    def __post_init__(self):
        self.executed = self.actions if self.executed is None else self.executed

    def held_out(self, count) -> bool:
        """Is it of its task's first `count` placements in an exploration, which nothing is trained on?"""
        return self.seed % 1000 < count

    @property
    def achieved(self) -> bool:
        """Was the goal reached in what is new of it? Where it is taken up again, the task may be done already."""
        return bool(self.success.any() and not self.success[:self.past + 1].any())

    def chunks(self, chunk_size, offset=0) -> Chunked:
        """The episode from control step `offset` on, cut into whole chunks."""
        if chunk_size % self.stride or offset % self.stride:
            raise ValueError(f"frames every {self.stride} steps cannot be cut into chunks of {chunk_size} at {offset}")
        count = min((len(self.actions) - offset) // chunk_size, (len(self.images) - 1 - offset // self.stride)
                    * self.stride // chunk_size)
        frames = offset // self.stride + np.arange(count + 1) * (chunk_size // self.stride)
        actions = self.executed[offset:offset + count * chunk_size].reshape(count, chunk_size, self.executed.shape[1])
        before = np.pad(self.executed[:offset], ((chunk_size, 0), (0, 0)))[-chunk_size:]
        return Chunked(self.images[frames], self.states[frames], actions, self.success[frames], before)

    def until(self, step) -> "Episode":
        """Its first `step` control steps, up to the frame that was drawn then."""
        ends = dict.fromkeys(PER_FRAME, step // self.stride + 1) | dict.fromkeys(PER_STEP, step)
        return replace(self, **{name: getattr(self, name)[:end] for name, end in ends.items()})

    def followed_by(self, later) -> "Episode":
        """`later`, which begins in the last frame of this one, with this one as its past."""
        past = len(self.images) - 1
        ends = dict.fromkeys(PER_FRAME, past) | dict.fromkeys(PER_STEP, len(self.actions))
        return replace(later, past=past, **{name: np.concatenate([getattr(self, name)[:end], getattr(later, name)])
                                            for name, end in ends.items()})

    def save(self, path):
        """Write a compressed .npz under a temporary name, then rename it."""
        write_arrays(path, asdict(self))

    @classmethod
    def load(cls, path) -> "Episode":
        with whole_arrays(path, "episode", "delete it and run the same command") as fields:
            return cls(**{key: value.item() if value.ndim == 0 else value for key, value in fields.items()})


def load_episodes(folder) -> list[Episode]:
    return [Episode.load(path) for path in sorted(Path(folder).glob("*.npz"))]


@dataclass
class StartContext:
    """Where an imagined rollout begins: a recorded frame, and those before it. Nothing else is needed."""
    images: np.ndarray  # (T+1, V, 3, H, W) uint8, one a chunk: what has been seen, the last one is now
    states: np.ndarray  # (T+1, 8)
    instruction: str
    previous_actions: np.ndarray  # (L, 7): the chunk that led here, zeros at the start of an episode
    task_id: int
    quantile: float = 0.5  # of the fingers' opening in this rollout, 1 - quantile of the lift; 0.5: the median
    scene: int = -1  # `Episode.scene`


def finger_moments(states) -> dict[str, list[int]]:
    """The frames of `states` (T, 8) in which the fingers have begun to close ("contact") and are open again ("release")."""
    change = np.diff((opening(states) < CLOSING).astype(int), prepend=0)
    return {"contact": np.flatnonzero(change == 1).tolist(), "release": np.flatnonzero(change == -1).tolist()}


def undecided(track: Chunked) -> np.ndarray:
    """(T,) bool: chunks that close the fingers, while these are open or still on the move: what will they hold?"""
    apart = opening(track.states)  # (T+1,) m
    closed_by = -np.diff(apart, prepend=apart[0])  # in the chunk before
    return (track.actions[:, -1, 6] > 0) & ((apart > CLOSING) | (apart > 0.006) & (closed_by > 0.002))[:-1]


def finger_history(states: torch.Tensor) -> torch.Tensor:
    """States (..., T, 8) -> (..., T, K) m between the fingers in the newest K = 8 frames, newest first.

    What was before the first frame is as in it.
    """
    frames = torch.arange(states.shape[-2], device=states.device)[:, None] - torch.arange(8, device=states.device)
    return opening(states)[..., frames.clamp(min=0)]


def memory_index(last: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Indices (B, F) of the memory frames in histories (B, T, 8) whose newest frames are `last` (B,).

    0, 1/3, 2/3, the grip, last. The grip: one chunk after the fingers that are closed now began to close; where they are
    open, the last frame.
    """
    frames, now = torch.arange(states.shape[1], device=last.device), last[:, None]  # (T,), (B, 1)
    open_before = (opening(states) >= CLOSING) & (frames <= now)
    grip = torch.where(open_before, frames, -1).amax(dim=1, keepdim=True) + 2  # (B, 1)
    return torch.cat([now * torch.arange(3, device=last.device) // 3, grip.minimum(now), now], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Batches. Each class holds its data in memory and draws one batch from a generator.
# ---------------------------------------------------------------------------------------------------------------------
class CloneData:
    """Every control step of every episode, or of what is new of one taken up again, with the normalised action chunk that
    follows it."""

    def __init__(self, episodes, normalizer, chunk_size, device):
        self.episodes, self.normalizer, self.chunk_size, self.device = episodes, normalizer, chunk_size, device
        self.index = [(e, n) for e, episode in enumerate(episodes)
                      for n in range(episode.past, (len(episode.actions) - 1) // episode.stride + 1)]

    def batch(self, size, generator) -> dict:
        picks = [self.index[i] for i in torch.randint(len(self.index), (size,), generator=generator)]
        actions, valid = np.zeros((size, self.chunk_size, 7), np.float32), np.zeros((size, self.chunk_size), bool)
        for row, (e, n) in enumerate(picks):
            start = n * self.episodes[e].stride
            chunk = self.episodes[e].actions[start:start + self.chunk_size]
            actions[row, :len(chunk)], valid[row, :len(chunk)] = chunk, True
        return {
            "images": _stack([self.episodes[e].images[n] for e, n in picks], self.device),
            "state": _stack([self.episodes[e].states[n] for e, n in picks], self.device),
            "instruction": [self.episodes[e].instruction for e, _ in picks],
            "actions": torch.from_numpy(self.normalizer.normalize_action(actions)).to(self.device),
            "valid": torch.from_numpy(valid).to(self.device),
        }


class ChunkData:
    """Trajectories at chunk boundaries, for the world simulator, the reflector and the start contexts.

    An episode is cut at every offset below a chunk that it has frames of (every_offset=False: at 0 alone): a demonstration
    makes eight trajectories, what was explored two. truth: `episodes` are imagined copies of these; the next pictures to
    learn are the true ones.
    `past[k]`, the first frame of track k that is learned from, is above 0 where an episode was taken up again.
    """

    def __init__(self, episodes, chunk_size, device, every_offset=True, truth=None):
        self.device, self.chunk_size = device, chunk_size
        self.tracks, self.targets, self.episodes = [], [], []
        for number, episode in enumerate(episodes):
            for offset in range(0, chunk_size if every_offset else 1, episode.stride):
                track = episode.chunks(chunk_size, offset)
                if len(track.actions):
                    self.tracks.append(track)
                    self.targets.append(track if truth is None else truth[number].chunks(chunk_size))
                    self.episodes.append(episode)
        self.past = [episode.past * episode.stride // chunk_size for episode in self.episodes]
        self.frames = [(k, t) for k, track in enumerate(self.tracks) for t in range(self.past[k], len(track.images))]
        self.index = [(k, t) for k, t in self.frames if t < len(self.tracks[k].actions)]  # frames with a successor
        self.grasping = [(k, t) for k, track in enumerate(self.tracks) if self.episodes[k].temperature
                         for t in np.flatnonzero(undecided(track)).tolist() if t >= self.past[k]]
        self.moments = [finger_moments(track.states) for track in self.tracks]
        self.letting_go = [(k, t) for k, t in self.frames if any(0 <= t - m <= 3 for m in self.moments[k]["release"])]
        self.before_it = [(k, t - 1) for k, t in self.letting_go]

    def world_batch(self, size, generator, transitions=1024) -> dict:
        """What the world simulator learns from: `size` next pictures, and many more steps of the hand, which are cheap.

        A quarter of the pictures are from where the fingers open again or up to three chunks later, as half of
        `frame_batch`'s.
        "transitions": as of `transitions`, (B, M, ...), M of them beside every picture, some `transitions` in all.
        """
        quarter = self._draw(size // 4, generator, self.before_it)
        pictures, M = self.pictures(quarter + self._draw(size - len(quarter), generator)), max(1, transitions // size)
        steps = self.transitions(self._draw(size * M, generator))
        return pictures | {"transitions": tuple(value.unflatten(0, (size, M)) for value in steps)}

    def grasp_batch(self, size, generator) -> dict:
        """Frames (B, 2, V, 3, H, W) uint8, a chunk ago and now, their states, and what follows: for the fingers alone.

        Half of the frames are `undecided` ones of exploration, of all an eighth: a demonstration's fingers never miss.
        """
        half = self._draw(size // 2, generator, self.grasping or self.index)
        picks = half + self._draw(size - len(half), generator)
        seen = [(self.tracks[k], [max(t - 1, 0), t]) for k, t in picks]
        _, *told = self.transitions(picks)
        return dict(zip(("previous_actions", "actions", "next_state"), told), task=self.tasks(picks),
                    images=_stack([track.images[frames] for track, frames in seen], self.device),
                    states=_stack([track.states[frames] for track, frames in seen], self.device))

    def _draw(self, count, generator, index=None):
        index = index or self.index
        return [index[i] for i in torch.randint(len(index), (count,), generator=generator)]

    def pictures(self, picks) -> dict:
        """Frame t + 1 of track k for every (k, t) in `picks`, and what leads to it.

        -> memory (B, F, V, 3, H, W) and target (B, V, 3, H, W) uint8, memory_states (B, F, 8), next_state (B, 8),
        actions (B, L, 7), task and scene (B,)
        """
        memory = [(self.tracks[k], memory_index(torch.tensor([t]), torch.from_numpy(self.tracks[k].states)[None])[0].numpy())
                  for k, t in picks]
        _, _, actions, next_state = self.transitions(picks)
        return {"memory": _stack([track.images[frames] for track, frames in memory], self.device),
                "memory_states": _stack([track.states[frames] for track, frames in memory], self.device),
                "target": _stack([self.targets[k].images[t + 1] for k, t in picks], self.device),
                "next_state": next_state, "actions": actions, "task": self.tasks(picks), "scene": self.scenes(picks)}

    def transitions(self, picks) -> list[torch.Tensor]:
        """State (B, 8), previous and next chunk (B, L, 7), next state (B, 8) at frame t of track k."""
        tracks = [(self.tracks[k], t) for k, t in picks]
        return [_stack(values, self.device) for values in zip(*(
            (track.states[t], track.previous(t), track.actions[t], track.states[t + 1]) for track, t in tracks))]

    def tasks(self, picks) -> torch.Tensor:
        """(B,) of every (k, t) in `picks`."""
        return torch.tensor([self.episodes[k].task_id for k, _ in picks], device=self.device)

    def scenes(self, picks) -> torch.Tensor:
        """(B,) likewise."""
        return torch.tensor([self.episodes[k].scene for k, _ in picks], device=self.device)

    def frame_batch(self, size, generator) -> dict:
        """Frames (first, previous, current) for the reflector.

        Half of them are from where the fingers opened again or up to three chunks later (a tenth of all frames, or less):
        there it is decided whether the task is done. As in `grasp_batch`, the network is shown what they are chosen by.
        """
        half = self._draw(size // 2, generator, self.letting_go or self.frames)
        picks = half + self._draw(size - len(half), generator, self.frames)
        frames = [self.tracks[k].images[[0, max(t - 1, 0), t]] for k, t in picks]
        fingers = [finger_history(torch.from_numpy(self.tracks[k].states[:t + 1]))[t] for k, t in picks]
        return {
            "frames": _stack(frames, self.device),
            "fingers": torch.stack(fingers).to(self.device),
            "instruction": [self.episodes[k].instruction for k, _ in picks],
            "labels": torch.tensor([float(self.tracks[k].success[t]) for k, t in picks], device=self.device),
        }

    def starts(self, picks) -> list[StartContext]:
        """Start contexts at frame t of track k for every (k, t) in `picks`."""
        return [StartContext(self.tracks[k].images[:t + 1], self.tracks[k].states[:t + 1], self.episodes[k].instruction,
                             self.tracks[k].previous(t), self.episodes[k].task_id, scene=self.episodes[k].scene)
                for k, t in picks]

    def first_starts(self) -> list[StartContext]:
        """That of the first frame of every track."""
        return self.starts([(k, 0) for k in range(len(self.tracks))])


def joined(a, b):
    """Two batches as one: tensors and lists end to end, in dictionaries and tuples of them."""
    if isinstance(a, dict):
        return {key: joined(a[key], b[key]) for key in a}
    if isinstance(a, tuple):
        return tuple(map(joined, a, b))
    return torch.cat([a, b]) if torch.is_tensor(a) else a + b


def _stack(arrays, device) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)
