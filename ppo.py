"""RLOO + PPO on rollouts of action chunks: World-Env, Algorithm 1 (arXiv 2509.24948).

    start contexts ──► each one K times ──► rollout ──► R_n, one number a rollout ──► RLOO ──► PPO
                                            ▲     ▲
              policy: a_t ~ Laplace(loc, b) ┘     └ env: the virtual world or the true simulator

`improve` is one iteration. Policy and world are only called, never imported: `policy(obs)` returns an
`ActionDistribution` (policy.py); the world follows gymnasium's vector API on action chunks. `rollout` explores and
evaluates as well.

Departures from Algorithm 1, and what the paper leaves open:
 1. One ratio a control step: summed over the A dimensions (the gripper's left out: policy.py), not over the L steps of a
    chunk.
 2. π_old is not a second network but its log-probabilities, scored before the first step on the very
    minibatches of the first epoch. Rounding is then the same and the first ratio exactly 1. `log_prob_gap` is
    their distance to those that `rollout` recorded: it shows another policy or temperature, which a ratio of 1
    would hide.
 3. The buffer is a whole number of groups; iterations, groups and epochs are ours. With one ratio a step,
    clip 0.1 is a narrow trust region (loc may move by about 0.1/√A of b): on the toy of tests/test_ppo.py
    one epoch learns faster than four. By default an iteration is one optimiser step, whose ratio is 1: nothing is clipped.
 4. By default the whole (small) backbone is trained; `lora_rank` does as the paper does.
 5. The gradient's norm is clipped, and `temperature` scales b, in sampling and in scoring alike.
 6. By default one draw of noise moves all steps of a chunk (`chunk_noise`) and mostly goes on in the next one
    (`persistence`), for the first chunks of a rollout alone (`explore_chunks`), which starts just before a grasp: a
    small part of the paper's dimensions, and those that decide. `log_prob` stays that of one chunk by itself, so what a
    chunk's noise earned is also ascribed to its neighbours, whose noise was like it: a gradient smoothed over time. With
    a draw for every step, gradients of 64 rollouts each had nothing in common (cosine 0 in the mean, ABLATIONS.md). Rollouts
    are `mirrored` in pairs (antithetic sampling): what is lost on both sides of the mean alike is then no gradient of it.
 7. A supervised loss on the demonstrations is added (`anchor`): without it a fast policy soon finds what the virtual world
    is wrong about. And where it is not explored the policy is held to what it was before RL (`hold_loss`).
As in the paper: no critic, no KL, no entropy bonus, rewards not divided by their deviation.

Shapes: B rollouts = G groups × K, T time in chunks, V camera views, L action-chunk length, A action
dimensions, C, H, W image, N chunks that were played, lower-case b and n: some of them.

Try it:  python -m pytest tests/test_ppo.py
"""
import copy
import math
from collections import defaultdict
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from distributed import gather, rank, shard, sum_gradients
from runs import UserError


@dataclass
class PPOConfig:
    """Post-training by Algorithm 1."""
    iterations: int = 20  # iterations of Algorithm 1: imagine, compare, update
    groups: int = 8  # start contexts in an iteration (G)
    group_size: int = 8  # rollouts from the same start context (K); the paper's 8
    epochs: int = 1  # passes over an iteration's rollouts
    minibatch: int = 0  # chunks in an optimiser step; 0 takes the whole buffer; the paper's 4
    microbatch: int = 64  # chunks in a forward pass (of all processes); gradients add up, so it is memory alone
    clip_coef: float = 0.1  # nothing is gained by a ratio outside 1 ± clip_coef; the paper's 0.1
    lr_backbone: float = 3e-4  # learning rate of everything but the heads; the paper's 1e-4, for LoRA on 7B
    lr_heads: float = 3e-5  # learning rate of the action head and the scale head; the paper's 1e-5
    warmup: int = 8  # optimiser steps of linear warm-up: Adam's first steps move every weight by the whole rate
    lora_rank: int = 0  # 0 trains the whole backbone; above, only low-rank changes of its matrices (the paper's 32)
    train_scale: bool = True  # train the scale head too, as the paper does; else exploration stays as it is
    anchor: float = 8.0  # weight of the cloning loss on demonstrations, added to PPO's; the paper's 0
    hold: float = 8.0  # weight of the distance to the policy before RL, on chunks played without noise; the paper's 0
    anchor_batch: int = 64  # control steps of the demonstrations, and chunks to hold, in an optimiser step
    max_grad_norm: float = 1.0  # gradient norm above which gradients are scaled down
    temperature: float = 0.75  # multiplies the Laplace scale b, in sampling and in scoring alike; the paper's 1
    chunk_noise: bool = True  # one draw for all steps of a chunk: 6 numbers to explore, not 48 (the paper's: False)
    mirrored: bool = True  # every second rollout of a group has the last one's noise, turned round; the paper's False
    persistence: float = 0.8  # correlation of a chunk's noise with the last one's, so that it adds up; the paper's 0
    explore_chunks: int = 5  # chunks that a rollout explores and learns from, then it is greedy; 0: all (the paper's)


@dataclass
class Rollout:
    """B episodes of up to T chunks; what was not played is zero (NaN in `score`)."""
    images: torch.Tensor       # (B, T+1, V, 3, H, W) uint8; chunk t was chosen from frame t
    states: torch.Tensor       # (B, T+1, 8)
    instruction: list[str]     # B
    actions: torch.Tensor      # (B, T, L, A) the policy's, normalised
    env_actions: torch.Tensor  # (B, T, L, A) the same in the environment's units
    log_prob: torch.Tensor     # (B, T, L) under the tempered distribution that was sampled
    valid: torch.Tensor        # (B, T) bool: this chunk was played
    explored: torch.Tensor     # (B, T) bool: and with noise
    reward: torch.Tensor       # (B,) R_n of Algorithm 1
    success: torch.Tensor      # (B, T) bool: the true simulator's word after it; False in a virtual world
    score: torch.Tensor        # (B, T) the reflector's P(done) after it; NaN without a reflector
    terminated: torch.Tensor   # (B,) bool: stopped before the horizon


# ------------------------------------------------------------------------------------------------------------
# Rollout
# ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def rollout(policy, env, contexts, greedy=False, temperature=1.0, generator=None, chunk_noise=False,
            persistence=0.0, explore_chunks=0) -> Rollout:
    """Play every context once; row i of the result is contexts[i].

    Slot i of the environment plays contexts i, i + num_envs, i + 2 num_envs, ...: a masked reset refills it.
    `env.num_envs` 0 or None means any number: all contexts are played at once. Exploration noise comes from
    `generator` alone, which may be a list as of `generators`; `temperature` is one number or one for each
    context; `chunk_noise`, `persistence`, `explore_chunks`: see `PPOConfig`.
    """
    policy.eval()
    total, slots = len(contexts), env.num_envs or len(contexts)
    temperature = torch.as_tensor(temperature).float().expand(total)        # (B,)
    which, chunk = torch.arange(slots), torch.zeros(slots, dtype=torch.long)  # a slot's context, next chunk
    fresh, starts, steps, noise = which < total, [], [], None
    while (which < total).any():
        if fresh.any():
            obs, _ = env.reset([contexts[min(i, total - 1)] for i in which.tolist()], fresh)
            starts.append((which[fresh], select(obs, fresh.nonzero().flatten())))
        index = (which < total).nonzero().flatten()                         # (b,) slots that still play
        distribution = replace(policy(select(obs, index)), by_chunk=chunk_noise)
        distribution = distribution.tempered(temperature[which[index], None, None])
        explored = (chunk[index] < (explore_chunks or math.inf)) & (not greedy)  # (b,)
        action = distribution.mode                                          # (b, L, A)
        if explored.any():
            one, sign = generator, 1.0
            if isinstance(generator, list):
                one, sign = zip(*(generator[i] for i in which[index].tolist()))
                one, sign = list(one), torch.tensor(sign, device=action.device)[:, None, None]
            drawn = sign * distribution.unit_noise(one)                     # (b, L, A), or (b, 1, A) by chunk
            noise = drawn.new_zeros(slots, *drawn.shape[1:]) if noise is None else noise
            kept = persistence * (chunk[index] > 0).to(drawn)[:, None, None]
            noise[index] = kept * noise[index] + (1 - kept.square()).sqrt() * drawn
            action = distribution.displaced(noise[index] * explored.to(drawn)[:, None, None])
        env_action = policy.env_actions(action)                             # (b, L, A)
        command = env_action.new_zeros(slots, *env_action.shape[1:])        # (slots, L, A) idle slots: zeros
        command[index] = env_action
        obs, reward, terminated, truncated, info = env.step(command)
        success = torch.as_tensor(info.get("success", torch.zeros(slots, dtype=torch.bool)))
        steps.append((which[index], chunk[index], {
            "images": obs["images"][index], "states": obs["state"][index], "actions": action,
            "env_actions": env_action, "log_prob": distribution.log_prob(action),
            "valid": (index >= 0).to(reward.device), "explored": explored.to(reward.device),
            "reward": reward[index], "terminated": terminated[index],
            "success": success[index], "score": torch.as_tensor(info["score"])[index]}))
        ended = (terminated | truncated).cpu() & (which < total)            # (slots,)
        chunk = torch.where(ended, 0, chunk + 1)
        which = torch.where(ended, which + slots, which)
        fresh = ended & (which < total)
    return collect(starts, steps, total)


def generators(count, generator, mirrored=False):
    """One for each of `count` contexts, and the sign of what it draws: a rollout's noise does not depend on what is played
    beside it, or where. mirrored: contexts 2n and 2n + 1 draw alike, with opposite signs."""
    seeds = torch.randint(2**62, (count,), generator=generator).tolist()
    odd = [i % 2 if mirrored else 0 for i in range(count)]
    return [(torch.Generator().manual_seed(seeds[i - odd[i]]), 1.0 - 2 * odd[i]) for i in range(count)]


def select(obs, index):
    """The observations of some slots."""
    return {"images": obs["images"][index], "state": obs["state"][index],
            "instruction": [obs["instruction"][i] for i in index.tolist()]}


def collect(starts, steps, total) -> Rollout:
    """Lay the pieces of a rollout out as (B, T, ...), T being the longest episode."""
    T = 1 + max(int(chunk.max()) for _, chunk, _ in steps)

    def lay(name, fill=0, before=0):
        piece = steps[0][2][name]                                           # (b, ...)
        whole = piece.new_full((total, before + T, *piece.shape[1:]), fill)  # (B, T, ...) or (B, T+1, ...)
        for context, chunk, pieces in steps:
            whole[context, before + chunk] = pieces[name]
        return whole

    images, states, instruction = lay("images", before=1), lay("states", before=1), [""] * total
    for context, obs in starts:
        images[context, 0], states[context, 0] = obs["images"], obs["state"]
        for i, words in zip(context.tolist(), obs["instruction"]):
            instruction[i] = words
    return Rollout(images, states, instruction, lay("actions"), lay("env_actions"), lay("log_prob"),
                   lay("valid"), lay("explored"), lay("reward").sum(1), lay("success"), lay("score", float("nan")),
                   lay("terminated").any(1))


def together(parts) -> Rollout:
    """Several rollouts as one, as long as the longest."""
    T = max(part.valid.shape[1] for part in parts)

    def join(name):
        pieces = [getattr(part, name) for part in parts]
        if name == "instruction":
            return sum(pieces, [])
        if name not in ("reward", "terminated"):                            # (b, t, ...) or (b, t+1, ...)
            fill = math.nan if name == "score" else 0
            pieces = [torch.cat([x, x.new_full((len(x), T - part.valid.shape[1], *x.shape[2:]), fill)], dim=1)
                      for x, part in zip(pieces, parts)]
        return torch.cat(pieces)
    return Rollout(*(join(field.name) for field in fields(Rollout)))


# ------------------------------------------------------------------------------------------------------------
# Advantage and loss
# ------------------------------------------------------------------------------------------------------------
def rloo_advantage(reward):
    """reward (G, K) -> A_n = R_n - mean of the other K - 1 rewards of its group; float32 (G, K)."""
    K = reward.shape[1]
    if K < 2:
        raise UserError("RLOO compares rollouts of one start: set --ppo.group_size to 2 or more")
    reward = reward.float()
    return (reward - reward.mean(1, keepdim=True)) * K / (K - 1)


def ppo_loss(log_prob, old_log_prob, advantage, clip_coef):
    """The clipped surrogate, averaged over control steps: log-probabilities (n, L) of n chunks, advantage (n,)."""
    log_ratio, advantage = log_prob.float() - old_log_prob.float(), advantage.float()[:, None]
    ratio = log_ratio.exp()                                                     # (n, L)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    return loss, {
        "ratio": ratio.detach().mean(),
        "approx_kl": (ratio - 1 - log_ratio).detach().mean(),  # Schulman's k3: never negative
        "clip_frac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }


# ------------------------------------------------------------------------------------------------------------
# Update
# ------------------------------------------------------------------------------------------------------------
def make_optimizer(policy, config):
    """Adam at two rates: one for `policy.action_head` and `policy.scale_head`, one for all else."""
    heads, backbone = [], []
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and (config.train_scale or not name.startswith("scale_head.")):
            (heads if name.startswith(("action_head.", "scale_head.")) else backbone).append(parameter)
    return torch.optim.Adam([{"params": backbone, "lr": config.lr_backbone},
                             {"params": heads, "lr": config.lr_heads}])


class LoRA(nn.Module):
    """x -> W x + B A x: a frozen matrix W (out, in) with a change of low rank (arXiv 2106.09685).

    W is neither copied nor rounded: it may be bfloat16, in which most steps of training would be rounded away.
    """

    def __init__(self, linear, rank):
        super().__init__()
        self.linear, (n_out, n_in) = linear, linear.weight.shape
        self.a = nn.Parameter(torch.randn(rank, n_in, device=linear.weight.device) / math.sqrt(n_in))
        self.b = nn.Parameter(torch.zeros(n_out, rank, device=linear.weight.device))  # starts without a change

    def forward(self, x):
        return self.linear(x) + (x.to(self.a.dtype) @ self.a.T @ self.b.T).to(x.dtype)


def add_lora(policy, rank):
    """Freeze all of the policy but its heads; give every matrix of its backbone a trainable low-rank change.

    A policy that has such changes already goes on with them.
    """
    layers = dict(policy.backbone.named_modules())
    if not any(isinstance(layer, LoRA) for layer in layers.values()):
        for name, layer in layers.items():
            if isinstance(layer, nn.Linear):
                policy.backbone.set_submodule(name, LoRA(layer, rank))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name.startswith(("action_head.", "scale_head.")) or name.endswith((".a", ".b")))


def lora_rank(policy):
    """The rank of the changes that `add_lora` made; 0 where there are none."""
    return next((layer.a.shape[0] for layer in policy.backbone.modules() if isinstance(layer, LoRA)), 0)


@torch.no_grad()
def merge_lora(policy):
    """The same policy as plain matrices again, all of them trainable."""
    for name, layer in list(policy.backbone.named_modules()):
        if isinstance(layer, LoRA):
            layer.linear.weight += layer.b @ layer.a
            policy.backbone.set_submodule(name, layer.linear)
    policy.requires_grad_(True)


def minibatches(count, config, generator):
    """A shuffle of `count` chunks: a list of optimiser steps, each a list of index tensors to be added up."""
    steps = max(1, round(count / config.minibatch)) if config.minibatch else 1
    shuffled = torch.randperm(count, generator=generator)
    return [step.split(config.microbatch) for step in shuffled.tensor_split(steps)]


def choose(policy, played, row, time):
    """The policy's distribution at chunks (n,) of a `Rollout`."""
    return policy({"images": played.images[row, time], "state": played.states[row, time],
                   "instruction": [played.instruction[i] for i in row.tolist()]})


def reference_of(policy):
    """The policy as it is now, to hold it to: a copy that shares what is frozen (of LoRA, nearly everything)."""
    return copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad}).eval()


def hold_loss(policy, reference, played, config, generator):
    """L1 between the means of `policy` and `reference`, on `anchor_batch` of the chunks that were played without noise.

    Yields parts that add up: of all processes' chunks, those that this one has played.
    """
    row, time = (played.valid & ~played.explored).nonzero(as_tuple=True)
    ours, count = own_chunks(row)
    picks = torch.randint(max(1, count), (config.anchor_batch,), generator=generator)
    for index in ours(picks).split(config.microbatch):
        if not len(index):  # none of them are ours
            return
        with torch.no_grad():
            before = choose(reference, played, row[index], time[index]).loc
        after = choose(policy, played, row[index], time[index]).loc
        yield (after - before).abs().mean() * (len(index) / len(picks))


def own_chunks(row):
    """(function, count): all processes have `count` chunks, of which `row` lists ours; the function takes an index into all
    of them to one into ours, and leaves the others out."""
    counts = gather(len(row))
    first = sum(counts[:rank()])
    return lambda index: index[(first <= index) & (index < first + len(row))] - first, sum(counts)


def update(policy, optimizer, played, advantage, config, generator, anchor=None, reference=None):
    """PPO on the explored chunks of one `Rollout`, with its advantages (B,); returns metrics averaged over all minibatches.

    `generator` (CPU) shuffles. `anchor(policy, generator)` yields parts of a supervised loss, whose sum, times
    `config.anchor`, joins that of every optimiser step; so does `hold_loss`, where a `reference` policy is given. The
    policy stays in eval mode, in which it was sampled. Several processes share every minibatch: each scores those of its
    chunks that it has played itself.
    """
    policy.eval()
    row, time = played.explored.nonzero(as_tuple=True)                      # (N,), (N,)
    advantage = advantage.to(played.log_prob.device)
    ours, count = own_chunks(row)

    def score(index):
        b, t = row[index], time[index]
        distribution = replace(choose(policy, played, b, t), by_chunk=config.chunk_noise).tempered(config.temperature)
        return distribution.log_prob(played.actions[b, t]), distribution.entropy()  # (n, L), (n, L)

    epochs = [minibatches(count, config, generator) for _ in range(config.epochs)]
    old_log_prob = torch.empty_like(played.log_prob[row, time])             # (N, L)
    with torch.no_grad():
        for index in (ours(index) for step in epochs[0] for index in step):
            if len(index):
                old_log_prob[index] = score(index)[0]
    gap = float((old_log_prob - played.log_prob[row, time]).abs().mean()) * (len(row) / count)
    metrics = defaultdict(float, log_prob_gap=gap)
    ratio_first = None
    for number, step in enumerate(step for epoch in epochs for step in epoch):
        policy.zero_grad(set_to_none=True)
        for index in map(ours, step):
            if not len(index):
                continue
            log_prob, entropy = score(index)
            loss, parts = ppo_loss(log_prob, old_log_prob[index], advantage[row[index]], config.clip_coef)
            (loss * len(index) / sum(map(len, step))).backward()
            if number == 0 and ratio_first is None:
                ratio_first = float(parts["ratio"])
            for name, value in {**parts, "entropy": entropy.detach().mean()}.items():
                share = len(index) / (count * config.epochs)
                metrics[name] += float(value) * share
        for name, parts in {"anchor": anchor(policy, generator) if anchor and config.anchor else (),
                            "hold": hold_loss(policy, reference, played, config, generator)
                            if reference and config.hold else ()}.items():
            for part in parts:
                (getattr(config, name) * part).backward()
                share = 1 / (len(epochs[0]) * config.epochs)
                metrics[f"{name}_loss"] += share * float(part.detach())
        clip_and_step(optimizer, config)
    everyone = gather(metrics)
    ratio_first = next(value for value in gather(ratio_first) if value is not None)  # of one that shared the first step
    names = dict.fromkeys(name for part in everyone for name in part)  # not every process had chunks to hold
    return {name: sum(part[name] for part in everyone) for name in names} | {"ratio_first": ratio_first}


def clip_and_step(optimizer, config):
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    if not torch.isfinite(norm):
        raise UserError(f"the gradient of PPO is {norm.item()}: delete the run's imagine.tmp and start again "
                        "with a lower --ppo.lr_backbone and --ppo.lr_heads")
    taken = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * min(1.0, (taken + 1) / max(1, config.warmup))
    optimizer.step()


# ------------------------------------------------------------------------------------------------------------
# One iteration
# ------------------------------------------------------------------------------------------------------------
def improve(policy, optimizer, env, draw_contexts, config, generator, anchor=None, reference=None, play=rollout):
    """One iteration of Algorithm 1; returns its metrics.

    draw_contexts(count, generator): a list of start contexts. generator: on the CPU and seeded by (seed,
    iteration), so that a resumed run equals a straight one; the world's own noise is the caller's to seed. play: `rollout`,
    or what does the same (`playing.play_groups`).
    Several processes draw the same starts and play whole groups each.
    """
    starts = draw_contexts(config.groups, generator)
    contexts = [[start] * config.group_size for start in starts]            # (G, K), and their noise
    noise = [generators(config.group_size, generator, config.mirrored) for _ in starts]
    played = play(policy, env, sum(shard(contexts), []), generator=sum(shard(noise), []), temperature=config.temperature,
                  chunk_noise=config.chunk_noise, persistence=config.persistence, explore_chunks=config.explore_chunks)
    reward = played.reward.view(-1, config.group_size)                      # (G, K)
    advantage = rloo_advantage(reward)                                      # (G, K)
    metrics = update(policy, optimizer, played, advantage.flatten(), config, generator, anchor, reference)
    outcome = [value.cpu() for value in (reward, advantage, played.terminated, played.valid.sum(1))]
    reward, advantage, terminated, lasted = (torch.cat(values) for values in zip(*gather(outcome)))  # of everyone
    return metrics | {
        "success_rate": float(terminated.float().mean()),                   # stopped before the horizon
        "reward": float(reward.mean()),
        "control_steps": float(lasted.sum()) * played.actions.shape[2]
        + config.group_size * sum(getattr(start, "before", 0) for start in starts),  # repeated to come to a start
        "stop_chunk": float(lasted.float().mean()),                         # chunks that a rollout lasts
        "groups_without_advantage": float((advantage.abs().amax(1) < 1e-6).float().mean()),
    }
