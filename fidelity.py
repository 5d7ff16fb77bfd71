"""How far can the imagination be believed? The virtual environment as a measuring instrument.

Episodes that nothing was trained on are imagined open loop: the first frame and the recorded actions go in, and what
comes out is laid beside what truly happened. Two things can be wrong, and they are told apart: the world simulator
(its pictures), and the reflector (its verdict, on true frames as well).

    error by horizon     PSNR, SSIM and a feature distance after 1 to 20 chunks, beside three rivals: the last frame
                         stays; the same simulator with another episode's actions; the nearest training episode
    outcome              does the verdict on the imagined episode equal what truly happened? false and missed successes
    closed loop          the policy itself plays on in both worlds from the same frames, shortly before a grasp, as in RL:
                         does the virtual environment pay for what would truly succeed?
    action following     a small probe, trained on true frames, reads the gripper's place off the imagined ones
    physical violations  blocks of the agent view that change in imagination where nothing moved in truth
    stability            the same actions under 8 noises: how often is the verdict not unanimous?

    python evaluate.py --world runs/libero_object

Shapes: N starts, E episodes, T time in chunks, V camera views, C, H, W image, L action-chunk length.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import report
from distributed import barrier, rank
from episodes import VIEWS, ChunkData, Episode, finger_history, load_episodes, to_float
from geometry import camera_pose, project, turn_between
from intervals import wilson_interval
from reflector import Reflector, StopRule, reflector_metrics
from runs import UserError
from virtual_env import VirtualEnv, VirtualEnvConfig
from world_model import WorldModel


# ---------------------------------------------------------------------------------------------------------------------
# Imagining what was recorded
# ---------------------------------------------------------------------------------------------------------------------
def open_loop(world: WorldModel, reflector: Reflector | None, data: ChunkData, picks, horizon, actions_of=None, seed=0,
              batch=32, true_states=False):
    """Imagine at most `horizon` chunks from frame t of track k on, with the recorded actions, for every (k, t).

    actions_of: (k, t) pairs whose actions are played instead, from the episode's first one on again where they end.
    true_states: the robot goes where it truly went, so that the pictures alone are imagined, of what truly happened.
    Yields, in order, frames (T+1, V, 3, H, W) uint8, states (T+1, 8) and the reflector's scores (T,), NaN without a
    reflector.
    """
    for first in range(0, len(picks), batch):
        here = picks[first:first + batch]
        given = (actions_of or picks)[first:first + batch]
        lengths = [min(horizon, len(data.tracks[k].actions) - t) for k, t in here]
        T = max(lengths)
        actions, states = np.zeros((len(here), T, world.config.chunk_size, 7), np.float32), torch.zeros(len(here), T, 8)
        for row, ((k, t), (other, start), count) in enumerate(zip(here, given, lengths)):
            actions[row, :count] = np.take(data.tracks[other].actions, range(start, start + count), axis=0, mode="wrap")
            states[row, :count] = torch.from_numpy(data.tracks[k].states[t + 1:t + 1 + count])
        config = VirtualEnvConfig(T, StopRule(eta=2.0), shared_noise=False)  # never stops
        env = VirtualEnv(world, reflector, config, len(here), seed=seed + first)
        env.reset(data.starts(here))
        scores = []
        for step in range(T):
            env.alive = torch.tensor(lengths, device=env.device) > step
            pose = states[:, step] if true_states else None
            scores.append(env.step(torch.from_numpy(actions[:, step]), pose)[4]["score"])
        scores = torch.stack(scores, dim=1).cpu().numpy()  # (b, T)
        for row, ((_, t), count) in enumerate(zip(here, lengths)):
            seen = slice(t, t + count + 1)
            yield env.frames[row, seen].cpu().numpy(), env.states[row, seen].cpu().numpy(), scores[row, :count]


def imagine_episodes(world, reflector, episodes, seed=0, true_states=False) -> tuple[list[Episode], list[np.ndarray]]:
    """Each episode imagined from its first frame (one taken up again: from there), with its TRUE success labels; and the
    scores (T,) of its frames."""
    chunk_size = world.config.chunk_size
    data = ChunkData(episodes, chunk_size, next(world.parameters()).device, every_offset=False)
    order = sorted(range(len(episodes)), key=lambda k: len(data.tracks[k].actions) - data.past[k])  # of one length together
    imagined, scores = [None] * len(episodes), [None] * len(episodes)
    picks = [(k, data.past[k]) for k in order]
    played = open_loop(world, reflector, data, picks, 10_000, seed=seed, true_states=true_states)
    for k, (frames, states, scores[k]) in tqdm(zip(order, played), "imagine recorded episodes", len(order), leave=False):
        track, past = data.tracks[k], data.past[k]
        actions = track.actions.reshape(-1, 7)
        imagined[k] = replace(episodes[k], images=np.concatenate([track.images[:past], frames]), past=past,
                              states=np.concatenate([track.states[:past], states]), actions=actions, executed=actions,
                              success=track.success, stride=chunk_size, source="imagined")
    return imagined, scores


def imagined_copies(world, episodes, folder) -> list[Episode]:
    """The pictures that the simulator makes of what truly happened, kept in `folder`: training data of later stages."""
    if rank() == 0 and not (folder / f"{len(episodes) - 1:05d}.npz").exists():  # written last: a killed run has them all
        folder.mkdir(exist_ok=True)
        for number, episode in enumerate(imagine_episodes(world, None, episodes, true_states=True)[0]):
            episode.save(folder / f"{number:05d}.npz")
    barrier()
    return load_episodes(folder)


# ---------------------------------------------------------------------------------------------------------------------
# 1 Error by horizon
# ---------------------------------------------------------------------------------------------------------------------
def horizon_errors(world, episodes, horizons=(1, 5), every=2, features=None, library=None, seed=0) -> dict:
    """Open-loop errors after each number of chunks, from every `every`-th frame of `episodes` on.

    features: frames (N, V, 3, H, W) uint8 -> (N, V, D), for the feature distance (1 - cosine).
    library: training episodes, for the rival that replays the nearest one (of the same task, by its start frame).
    -> {"psnr_{view}_{h}_{kind}", "ssim_...", "feature_...": float, "state_mm_{h}", "state_deg_{h}", "starts_{h}"}
    """
    data = ChunkData(episodes, world.config.chunk_size, next(world.parameters()).device, every_offset=False)
    picks = [(k, t) for k, track in enumerate(data.tracks) for t in range(0, len(track.actions), every)]
    others = picks[len(picks) // 2:] + picks[:len(picks) // 2]
    rivals = {"predicted": open_loop(world, None, data, picks, max(horizons), seed=seed),
              "shuffled": open_loop(world, None, data, picks, max(horizons), others, seed=seed),
              "still": ((data.tracks[k].images[t:t + 1].repeat(max(horizons) + 1, 0), None, None) for k, t in picks)}
    if library:
        rivals["nearest"] = nearest_replays(data, picks, ChunkData(library, world.config.chunk_size, "cpu"), horizons)
    metrics = {}
    for kind, played in rivals.items():
        sums = {h: [] for h in horizons}
        for (k, t), (frames, states, _) in zip(picks, played):
            for h in (h for h in horizons if h < len(frames) and t + h < len(data.tracks[k].images)):
                sums[h].append((frames[h], data.tracks[k].images[t + h],
                                state_difference(states[h], data.tracks[k].states[t + h]) if kind == "predicted" else 0))
        for h, rows in sums.items():
            if len(rows) < 2:
                continue
            guess, truth, state = zip(*rows)
            for name, values in picture_errors(np.stack(guess), np.stack(truth), features).items():
                metrics |= {f"{name}_{view}_{h}_{kind}": round(float(value), 4) for view, value in zip(VIEWS, values)}
            if kind == "predicted":
                mm, degrees = np.mean(state, axis=0)
                metrics |= {f"state_mm_{h}": round(float(mm), 1), f"state_deg_{h}": round(float(degrees), 2),
                            f"starts_{h}": len(rows)}
    return metrics | {"episodes": len(episodes)}


def picture_errors(guess, truth, features=None) -> dict:
    """Pictures (N, V, 3, H, W) uint8 -> {"psnr" (of the mean squared error, dB), "ssim", "feature"}: (V,) each."""
    guess, truth = torch.from_numpy(guess), torch.from_numpy(truth)
    mse = ((guess.float() - truth.float()) / 255).square().mean(dim=(0, 2, 3, 4))
    errors = {"psnr": -10 * mse.clamp(min=1e-10).log10(), "ssim": ssim(guess, truth).mean(0)}
    if features is not None:
        parts = [1 - F.cosine_similarity(features(a), features(b), dim=-1) for a, b in
                 zip(guess.split(256), truth.split(256))]
        errors["feature"] = torch.cat(parts).mean(0).cpu()
    return errors


def ssim(a: Tensor, b: Tensor, window=7) -> Tensor:
    """Structural similarity (Wang et al. 2004) of uint8 pictures (N, V, 3, H, W) -> (N, V); flat 7x7 windows."""
    shape, (a, b) = a.shape[:2], (x.flatten(0, 1).float() / 255 for x in (a, b))
    mean = lambda x: F.avg_pool2d(x, window, stride=1)
    unbiased = window**2 / (window**2 - 1)
    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = ((mean(x * x) - mu * mu) * unbiased for x, mu in ((a, mu_a), (b, mu_b)))
    cov = (mean(a * b) - mu_a * mu_b) * unbiased
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return value.mean(dim=(1, 2, 3)).view(shape)


def nearest_replays(data, picks, library, horizons):
    """For each start the training episode of its task whose frame looks most alike, played on from there."""
    small = lambda images: images[:, :, :, ::4, ::4].reshape(len(images), -1).astype(np.float32)
    index, looks = {}, {}
    for task in {episode.task_id for episode in library.episodes}:
        index[task] = [(k, t) for k, t in library.index if library.episodes[k].task_id == task]
        looks[task] = small(np.stack([library.tracks[k].images[t] for k, t in index[task]]))
    for k, t in picks:
        task = data.episodes[k].task_id
        distance = ((looks[task] - small(data.tracks[k].images[t:t + 1])) ** 2).sum(1)
        found, at = index[task][int(distance.argmin())]
        frames = library.tracks[found].images[at:at + max(horizons) + 1]
        yield np.concatenate([frames, frames[-1:].repeat(max(horizons) + 1 - len(frames), 0)]), None, None


def state_difference(guess, truth) -> tuple[float, float]:
    """Gripper position (mm) and rotation (degrees) between two states (8,)."""
    a, b = torch.from_numpy(guess)[None].float(), torch.from_numpy(truth)[None].float()
    return float((a - b)[0, :3].norm()) * 1000, float(torch.rad2deg(turn_between(a, b).norm()))


# ---------------------------------------------------------------------------------------------------------------------
# 2 The reflector, and the outcome
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def frame_logits(reflector, episodes, chunk_size) -> list[Tensor]:
    """The reflector's logit of every frame at a chunk boundary, (T+1,) an episode."""
    device, logits = next(reflector.parameters()).device, []
    for episode in episodes:
        track = episode.chunks(chunk_size)
        images, states = (torch.from_numpy(values)[None].to(device) for values in (track.images, track.states))
        logits += reflector(images, [episode.instruction], finger_history(states))
    return logits


def frame_scores(reflector, episodes, chunk_size) -> list[np.ndarray]:
    return [reflector.probability(logits).cpu().numpy() for logits in frame_logits(reflector, episodes, chunk_size)]


def reflector_quality(reflector, episodes, chunk_size, rule, scores=None) -> dict:
    """`reflector_metrics` on episodes with true labels, whether their frames are true or imagined."""
    scores = scores or frame_scores(reflector, episodes, chunk_size)
    tracks, T = [episode.chunks(chunk_size) for episode in episodes], max(map(len, scores))
    score, label, valid = np.zeros((len(tracks), T)), np.zeros((len(tracks), T)), np.zeros((len(tracks), T), bool)
    for row, (track, values) in enumerate(zip(tracks, scores)):
        score[row, :len(values)], label[row, :len(values)], valid[row, :len(values)] = values, track.success, True
    return reflector_metrics(score, label, valid, rule)


def outcome_agreement(scores, episodes, rule) -> dict:
    """`agreement` of the reflector (it would have stopped) with the truth (the goal held in a frame); scores: by episode."""
    return agreement([rule.stops(values).any() for values in scores], [episode.success.any() for episode in episodes])


def agreement(verdict, truth) -> dict:
    """Two lists of booleans, with Wilson 95 % intervals.

    false_success: of the true failures, those called successes; missed_success: of the successes, those called failures.
    """
    verdict, truth = np.array(verdict, bool), np.array(truth, bool)
    counts = {"agreement": (int((verdict == truth).sum()), len(truth)),
              "false_success": (int((verdict & ~truth).sum()), int((~truth).sum())),
              "missed_success": (int((~verdict & truth).sum()), int(truth.sum()))}
    return {name: {"count": part, "of": whole, "rate": part / whole if whole else None,
                   "ci95": list(wilson_interval(part, whole))} for name, (part, whole) in counts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 3 Does the imagined gripper go where the actions say?
# ---------------------------------------------------------------------------------------------------------------------
class GripperProbe(nn.Module):
    """Agent view (N, 3, H, W) uint8 -> the gripper's place (N, 2) in pixels: the centre of mass of a heat map."""

    def __init__(self, channels=16):
        super().__init__()
        sizes = [(3, channels, 5, 2), (channels, channels, 3, 1), (channels, channels, 3, 1), (channels, 1, 3, 1)]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, k, s, padding=k // 2) for i, o, k, s in sizes)

    def forward(self, images):
        x = to_float(images)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        heat = self.layers[-1](x).flatten(1).softmax(1)  # (N, H/2 * W/2)
        rows, columns = (torch.arange(n, device=x.device) * 2 + 1.0 for n in x.shape[-2:])
        grid = torch.cartesian_prod(rows, columns).flip(1)  # (H/2 * W/2, 2): x, y
        return heat @ grid


def gripper_pixels(cameras, states, size) -> Tensor:
    """States (N, 8) -> the gripper's place (N, 2) in the agent view, in pixels from the upper left corner."""
    where, _ = project(states[:, None, :3], cameras.agentview, camera_pose(cameras.agentview, states, on_hand=False))
    return (where[:, 0] + 1) / 2 * size


def train_probe(world, episodes, steps=400, size=32, seed=0) -> GripperProbe:
    data = ChunkData(episodes, world.config.chunk_size, "cpu")
    generator, H = torch.Generator().manual_seed(seed), world.config.image_size
    torch.manual_seed(seed)
    probe = GripperProbe()
    optimizer = torch.optim.Adam(probe.parameters(), lr=2e-3)
    for _ in tqdm(range(steps), desc="gripper probe", unit="step", mininterval=1):
        picks = [data.frames[i] for i in torch.randint(len(data.frames), (size,), generator=generator)]
        images = torch.from_numpy(np.stack([data.tracks[k].images[t, 0] for k, t in picks]))
        states = torch.from_numpy(np.stack([data.tracks[k].states[t] for k, t in picks]))
        loss = F.smooth_l1_loss(probe(images), gripper_pixels(world.cameras.of(data.tasks(picks)), states, H))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe.eval()


@torch.no_grad()
def action_following(world, probe, true, imagined, horizons) -> dict:
    """Mean distance (pixels, agent view) between the probe's gripper and the truth, in true and imagined frames."""
    H, result = world.config.image_size, {}
    for h in horizons:
        pairs = [(a.chunks(world.config.chunk_size), b) for a, b in zip(true, imagined) if len(b.images) > h]
        if pairs:
            cameras = world.cameras.of(torch.tensor([b.task_id for _, b in pairs]))
            place = gripper_pixels(cameras, torch.from_numpy(np.stack([a.states[h] for a, _ in pairs])), H)
            for name, frames in (("true", [a.images[h, 0] for a, _ in pairs]),
                                 ("imagined", [b.images[h, 0] for _, b in pairs])):
                result[f"gripper_px_{h}_{name}"] = float((probe(torch.from_numpy(np.stack(frames))) - place)
                                                         .norm(dim=1).mean())
    return result


# ---------------------------------------------------------------------------------------------------------------------
# 4 Things that change without a cause, 5 verdicts that the noise decides
# ---------------------------------------------------------------------------------------------------------------------
def violations(world, true, imagined, block=4, change=25, reach=12) -> dict:
    """Share of steps, and of episodes, in which something changes in the agent view where nothing did in truth.

    A block of 4x4 pixels counts where it changes by more than 25 grey levels between two imagined frames, by less than
    a third of that between the two true ones, and is over 12 pixels from the gripper before and after; a step counts
    with two such blocks. An object that moves untouched, vanishes or appears is seen; so is an arm that is drawn in the
    wrong place, far from the hand. What goes wrong within 12 pixels of the gripper, or slowly, is not seen.
    """
    H, steps, episodes = world.config.image_size, [], []
    for a, b in zip(true, imagined):
        track = a.chunks(world.config.chunk_size)
        moved = [F.avg_pool2d(torch.from_numpy(np.abs(np.diff(images[:, 0].astype(np.float32), axis=0))), block).mean(1)
                 for images in (track.images, b.images)]  # (T, H/4, W/4) each
        cameras = world.cameras.of(torch.full([len(track.states)], a.task_id))
        place = gripper_pixels(cameras, torch.from_numpy(track.states), H)  # (T+1, 2)
        centre = torch.arange(H // block) * block + block / 2
        grid = torch.cartesian_prod(centre, centre).flip(1)  # (blocks, 2)
        away = (torch.cdist(place, grid) > reach).view(-1, H // block, H // block)
        wrong = (moved[1] > change) & (moved[0] < change / 3) & away[1:] & away[:-1]
        steps.append(wrong.flatten(1).sum(1) >= 2)
        episodes.append(bool(steps[-1].any()))
    return {"violating_steps": float(torch.cat(steps).float().mean()), "violating_episodes": float(np.mean(episodes))}


def stability(world, reflector, episodes, rule, noises=8) -> dict:
    """The same actions under several noises: variance of the verdict, and how often it is not unanimous."""
    verdicts = np.array([[bool(rule.stops(values).any()) for values in
                          imagine_episodes(world, reflector, episodes, seed=1000 * (n + 1))[1]]
                         for n in tqdm(range(noises), desc="stability", unit="noise")])  # (noises, E)
    return {"verdict_variance": float(verdicts.var(axis=0).mean()),
            "not_unanimous": float(((verdicts.mean(0) > 0) & (verdicts.mean(0) < 1)).mean())}


def hand_apart(true, imagined, chunks=(1, 3, 5, 10)) -> dict:
    """Where a policy's hand is in either world: median distance in mm, so many chunks after the same start.

    Pairs of states (T+1, 8). Chunks that no pair has lasted are left out.
    """
    apart = {n: [1000 * np.linalg.norm(a[n, :3] - b[n, :3]) for a, b in zip(true, imagined) if min(len(a), len(b)) > n]
             for n in chunks}
    return {f"hand_apart_mm_{n}": float(np.median(values)) for n, values in apart.items() if values}


# ---------------------------------------------------------------------------------------------------------------------
# May reinforcement learning start?
# ---------------------------------------------------------------------------------------------------------------------
def check_trust(world: dict, reflector: dict, least_auroc=0.7, least_informed=0.2):
    """UserError where RL would learn in a world that does not follow its actions, or is paid by a blind reflector.

    world: `horizon_errors`; reflector: {"true", "imagined": `reflector_quality` | {"outcome": `agreement`}}; of held-out
    episodes, a third of which are far wilder than RL. It has gained where that AUROC was 0.78 and successes were imagined to
    succeed by 25 points more often than failures, and lost where 0.72 and less often (RESULTS.md).
    """
    remedy = ("more exploration (--explore.episodes) or training helps; --rl_env none clones what exploration succeeded at "
              "instead; --trust_world goes on all the same; evaluate.py --checkpoint measures the clone")
    for view in VIEWS:
        predicted, *rivals = (world[f"psnr_{view}_1_{kind}"] for kind in ("predicted", "still", "shuffled"))
        if predicted <= max(rivals):
            raise UserError(f"the world simulator cannot be trusted: after one chunk its {view} has {predicted:.1f} dB; a "
                            f"still picture or other actions have {max(rivals):.1f}: {remedy}")
    score = reflector["imagined"]["auroc"]
    if score is None or score < least_auroc:
        raise UserError(f"the reflector cannot be trusted: its AUROC on imagined frames is {score}, below {least_auroc}: "
                        f"{remedy}")
    missed = [reflector[frames]["outcome"]["missed_success"] for frames in ("imagined", "true")]
    successes, (imagined, true) = missed[0]["of"], (cell["of"] - cell["count"] for cell in missed)  # found
    if 2 * imagined < successes or not successes:  # it would not pay what is right
        at_fault = "reflector" if 2 * true <= successes else "world simulator"
        raise UserError(f"the {at_fault} cannot be trusted: of {successes} held-out successes {imagined} are successes in "
                        f"imagination, {true} on true frames: {remedy}")
    false = reflector["imagined"]["outcome"]["false_success"]
    if imagined / successes - false["count"] / max(1, false["of"]) < least_informed:  # Youden's J; one answer for all has 0
        raise UserError(f"the imagination cannot be trusted: {imagined} of {successes} held-out successes, but "
                        f"{false['count']} of {false['of']} failures are imagined to succeed: {remedy}")


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------
HORIZONS = (1, 2, 5, 10, 15, 20)


def measure(world, reflector, policy, test, library, rule, folder, closed_loop) -> dict:
    """Everything above on the episodes `test`, which nothing was trained on; pictures go to `folder`.

    library: the training episodes, for the nearest-episode rival and the probe. policy: its picture tokens are the
    feature distance. rule: when the reflector stops. closed_loop: the policy's successes in imagination,
    true ones from the same starts, and `hand_apart`.
    """
    chunk_size = world.config.chunk_size
    imagined, scores = imagine_episodes(world, reflector, test)
    true_scores = frame_scores(reflector, test, chunk_size)
    with_start = [np.concatenate([true[:1], values]) for true, values in zip(true_scores, scores)]
    result = {"episodes": len(test), "failures": sum(not episode.success.any() for episode in test),
              "outcome": {"imagined frames": outcome_agreement(scores, test, rule),
                          "true frames": outcome_agreement([values[1:] for values in true_scores], test, rule),
                          "closed loop": agreement(*closed_loop[:2])},
              "closed_loop": closed_loop[2],
              "reflector": {"true": reflector_quality(reflector, test, chunk_size, rule, true_scores),
                            "imagined": reflector_quality(reflector, imagined, chunk_size, rule, with_start)},
              "violations": violations(world, test, imagined),
              "following": action_following(world, train_probe(world, library), test, imagined, HORIZONS),
              "stability": stability(world, reflector, test, rule)}

    @torch.no_grad()
    def features(frames):
        frames = frames.to(next(policy.parameters()).device)
        return policy.stem(to_float(frames.flatten(0, 1))).flatten(1).unflatten(0, frames.shape[:2]).float()
    result["horizon"] = horizon_errors(world, test, HORIZONS, every=4, features=features, library=library)

    errors = [np.square(a.chunks(chunk_size).images.astype(np.float32) - b.images).mean() for a, b in zip(test, imagined)]
    order = np.argsort(errors)
    for name, k in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        frames = [np.moveaxis(images, 2, -1) for images in (test[k].chunks(chunk_size).images, imagined[k].images)]
        report.contact_sheet(folder / f"{name}.png", *frames, true_scores[k], with_start[k],
                             f"{name}: {test[k].instruction}", bool(test[k].success.any()), rule.eta)
    return result
