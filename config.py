"""Every setting of a run: one dataclass a component (beside its code), put together here; the presets; the command line.

`python train.py --help` prints them all. A preset comes first, then every flag on top of it.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import tyro

from evaluate import EvaluateConfig
from policy import PolicyConfig
from ppo import PPOConfig
from reflector import ReflectorConfig
from runs import FitConfig, UserError, flags
from starts import StartConfig
from virtual_env import VirtualEnvConfig
from world_model import WorldModelConfig

Stage = Literal["demonstrate", "clone", "explore", "simulate", "reflect", "imagine", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
PAPERS = dict(lr_backbone=1e-4, lr_heads=1e-5)  # rates of RL, for policies and buffers larger than small's
VALIDATE_SEED = 20_000_000  # where validation's `placements` begin
LEAST = {"num_demos": 1, "validate.episodes": 1, "ppo.groups": 1, "ppo.microbatch": 1, "ppo.group_size": 2,
         "validate.every": 0, "explore.stride": 1, "virtual.horizon": 1,
         "virtual.stop.confirm": 1, "evaluate.stop.confirm": 1,  # frames in a row
         "drift.batch_size": 2, "grasp.batch_size": 2, "reflect.batch_size": 2}  # half of them imagined


@dataclass
class ExploreConfig:
    episodes: int = 16  # episodes a task
    held_out: int = 3  # of these, the first ones: no network learns from them; they measure simulator and reflector
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)  # taken in turn, they multiply the cloned policy's Laplace scale b
    grasps: int = 32  # more placements a task, of which only the first grasp is played
    releases: int = 2  # times that a training episode is taken up again shortly before its fingers first opened again
    persistence: float = 0.8  # of the noise in these two, one draw a chunk as in RL (`PPOConfig`): it makes near misses
    stride: int = 4  # control steps between stored frames, a divisor of a chunk: twice the views of every grasp
    linger: int = 3  # chunks to go on after the goal is reached, so that there are frames of a task that is done
    mesh_cell: float = 0.006  # m; vertices closer than this are merged in demonstrations and exploration (0: never)


@dataclass
class ValidateConfig:
    """Validation in both worlds while RL goes on, on fresh placements, never on the benchmark's states.

    The policy that truly succeeded most often is kept: that before RL is among them. A tie goes to the earlier one.
    """
    every: int = 10  # RL iterations between two validations; 0: none, the last policy is kept
    episodes: int = 5  # episodes a task


@dataclass
class TrainConfig:
    """World-Env: demonstrate, clone, explore, simulate, reflect, imagine, evaluate."""
    task: str = "libero_object"  # LIBERO suite
    preset: Literal["tiny", "small", "medium", "large"] = "small"  # sizes of everything; any flag given beside it wins
    task_ids: tuple[int, ...] = ()  # tasks of the suite; empty: all of them
    seed: int = 0  # of placements, networks, batches and noise
    output_dir: str = ""  # run folder; empty: runs/<task>, with other presets than small runs/<task>_<preset>
    stages: tuple[Stage, ...] = STAGES  # stages to run; what they need of the others must be there
    demos: str = ""  # folder with official LIBERO HDF5 demonstrations; empty: a scripted expert makes them
    num_demos: int = 5  # demonstrations a task
    max_steps: int = 0  # control steps after which the policy's true episodes are cut off; 0: the suite's limit
    refresh: str = ""  # finished run folder to go on from: its last policy explores, its data and weights are kept
    init_world: str = ""  # folder or hub id of a world simulator of this size, whose weights training starts from
    rl_env: Literal["virtual", "libero", "none"] = "virtual"  # where RL happens; none: filtered cloning alone
    filtered_cloning: bool = False  # before RL, clone what exploration succeeded at, too
    trust_world: bool = False  # start RL even where the held-out episodes say that the imagination is no good
    device: str = "auto"  # "auto" takes the GPU where there is one; or "cpu", "cuda"
    num_procs: int = 0  # simulator processes, shared out among torchrun's; 0: one a core
    bf16: Literal["auto", "on", "off"] = "auto"  # the world simulator's U-Net in bfloat16; "auto": on a GPU
    compile: bool = False  # torch.compile the networks: minutes at the start of a stage, faster from then on
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    clone: FitConfig = field(default_factory=lambda: FitConfig(steps=1600, batch_size=32, lr=1e-3, muon=True))
    explore: ExploreConfig = field(default_factory=ExploreConfig)
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    simulate: FitConfig = field(default_factory=lambda: FitConfig(steps=700, batch_size=16, lr=1e-3, muon=True))
    drift: FitConfig = field(default_factory=lambda: FitConfig(steps=300, batch_size=16, lr=5e-4, muon=True))
    grasp: FitConfig = field(default_factory=lambda: FitConfig(steps=500, batch_size=64, lr=1e-3, weight_decay=0.05))
    reflector: ReflectorConfig = field(default_factory=ReflectorConfig)
    reflect: FitConfig = field(default_factory=lambda: FitConfig(steps=600, batch_size=32, lr=1e-3, weight_decay=0.1))
    virtual: VirtualEnvConfig = field(default_factory=VirtualEnvConfig)
    start: StartConfig = field(default_factory=StartConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def tiny() -> TrainConfig:
    """All seven stages on two tasks in about three minutes: the machinery, not the method's success."""
    fast = dict(warmup=5, save_every=10)
    return TrainConfig(
        preset="tiny", task_ids=(0, 1), num_demos=1, max_steps=64, trust_world=True, policy=PolicyConfig.tiny(),
        clone=FitConfig(steps=60, batch_size=16, muon=True, **fast),
        explore=ExploreConfig(episodes=2, held_out=1, grasps=2, releases=1),
        world_model=WorldModelConfig(channels=(16, 32, 32), patch=4, neighbours=2),
        simulate=FitConfig(steps=30, batch_size=8, muon=True, **fast),
        drift=FitConfig(steps=10, batch_size=8, muon=True, **fast), grasp=FitConfig(steps=20, batch_size=8, **fast),
        reflector=ReflectorConfig(channels=16, width=32), reflect=FitConfig(steps=30, batch_size=8, **fast),
        virtual=VirtualEnvConfig(horizon=3), ppo=PPOConfig(iterations=2, groups=2, group_size=4, minibatch=32),
        validate=ValidateConfig(every=2, episodes=1), evaluate=EvaluateConfig(episodes=1))


def medium() -> TrainConfig:
    """Quarter of an hour of a GPU, with small's demonstrations, clone and exploration: a simulator 1.5 times as wide that
    learns from eleven times as many pictures, and RL from four times as many rollouts."""
    return TrainConfig(
        preset="medium", world_model=WorldModelConfig(channels=(48, 96, 144)),
        simulate=FitConfig(steps=2000, batch_size=64, lr=8e-4), drift=FitConfig(steps=700, batch_size=64, lr=4e-4),
        grasp=FitConfig(steps=500, batch_size=128, lr=1e-3, weight_decay=0.05),
        reflect=FitConfig(steps=600, batch_size=64, lr=1e-3, weight_decay=0.1),
        ppo=PPOConfig(iterations=40, groups=32, microbatch=512, **PAPERS), validate=ValidateConfig(every=20))


def large() -> TrainConfig:
    """Pictures of 256 pixels, for a GPU; `--world_model.vae PATH --world_model.patch 1` diffuses a VAE's latents of them."""
    return TrainConfig(
        preset="large", policy=PolicyConfig(image_size=256),
        world_model=WorldModelConfig(image_size=256, patch=4, channels=(128, 256, 384), layers=2),
        simulate=FitConfig(steps=20_000, batch_size=32, lr=3e-4), drift=FitConfig(steps=5_000, batch_size=32, lr=1e-4),
        reflect=FitConfig(steps=2_000, batch_size=32, lr=3e-4, weight_decay=0.1),
        ppo=PPOConfig(iterations=100, **PAPERS))


def stage_settings(config, name) -> dict:
    """The part of the configuration that a finished stage depends on directly."""
    sections = {"demonstrate": ("demos", "num_demos"), "clone": ("policy", "clone"), "explore": ("explore", "max_steps"),
                "simulate": ("world_model", "init_world", "simulate", "drift", "grasp"), "reflect": ("reflector", "reflect"),
                "imagine": ("virtual", "start", "ppo", "validate", "rl_env", "filtered_cloning", "max_steps"),
                "evaluate": ("evaluate", "max_steps")}
    values = asdict(config)
    chosen = {key: values[key] for key in ("task", "task_ids", "seed", "refresh", *sections[name])}
    if name == "demonstrate":  # what it draws
        chosen |= {"policy": {"image_size": config.policy.image_size}, "explore": {"mesh_cell": config.explore.mesh_cell}}
    if name == "reflect":  # what its held-out verdicts are measured with
        chosen |= {"virtual": {"stop": values["virtual"]["stop"]}}
    for value in chosen.values():
        if isinstance(value, dict):
            for key in ("accumulate", "microbatch"):  # memory alone: they may change when a killed run goes on
                value.pop(key, None)
    return chosen


def parse(arguments: list[str]) -> TrainConfig:
    """The preset first, then every flag on top of it. UserError where flags do not fit together."""
    chosen = [value for flag, value in zip(arguments, arguments[1:]) if flag == "--preset"]
    chosen += [flag.split("=", 1)[1] for flag in arguments if flag.startswith("--preset=")]
    default = {"tiny": tiny, "medium": medium, "large": large}.get(chosen[-1] if chosen else "", TrainConfig)()
    config = tyro.cli(TrainConfig, default=default, args=arguments, use_underscores=True)
    for name in ("image_size", "chunk_size"):
        sizes = {f"--{part}.{name}": getattr(getattr(config, part), name) for part in ("policy", "world_model", "reflector")
                 if hasattr(getattr(config, part), name)}
        if len(set(sizes.values())) > 1:
            raise UserError(f"{', '.join(f'{flag} {value}' for flag, value in sizes.items())}: give them all the same value")
    if not (0 < config.explore.held_out <= config.explore.episodes and 0 < config.evaluate.episodes <= 50):
        raise UserError("--explore.held_out, episodes of a task for tests alone, must be above 0 and not above "
                        "--explore.episodes, and --evaluate.episodes, of the benchmark's initial states, from 1 to 50")
    if min(config.explore.temperatures, default=-1) < 0:
        raise UserError("--explore.temperatures must be one number or more, none below 0")
    if config.explore.episodes + config.explore.grasps > 1000:
        raise UserError("--explore.episodes and --explore.grasps number a task's placements from 0 to 999: lower them")
    for flag, value in flags(asdict(config)).items():
        least = LEAST.get(flag, 1 if flag.endswith((".batch_size", ".accumulate", ".save_every")) else None)
        if least is not None and value < least:
            raise UserError(f"--{flag} must be {least} or more")
    if not 0 <= config.seed < 199:
        raise UserError("--seed must be from 0 to 198: placements of higher ones would be those of validation and tests")
    if config.policy.chunk_size % config.explore.stride:
        raise UserError(f"--explore.stride must divide a chunk, {config.policy.chunk_size} control steps")
    if config.drift.batch_size % 2:
        raise UserError("--drift.batch_size must be even: half of a batch is imagined")
    if (config.policy.views, config.reflector.views, config.policy.action_dim, config.policy.state_dim) != (2, 2, 7, 8):
        raise UserError("--policy.views and --reflector.views must be 2 (agent view and wrist), --policy.action_dim 7 and "
                        "--policy.state_dim 8: LIBERO's")
    if len(set(config.task_ids)) < len(config.task_ids):
        raise UserError("--task_ids names a task twice")
    start = config.start
    if min(start.midway, start.contact, start.release) < 0 or start.midway + start.contact + start.release > 1 + 1e-6:
        raise UserError("--start.midway, .contact and .release are fractions of the starts: none below 0, their sum not "
                        "above 1")
    if not 0 <= start.luck[0] <= start.luck[1] <= 1:
        raise UserError("--start.luck takes the least and the largest quantile of a grasp's outcome, from 0 to 1")
    if config.max_steps < config.policy.chunk_size and config.max_steps:
        raise UserError(f"--max_steps must be 0 (the suite's limit) or at least a chunk, {config.policy.chunk_size}")
    config.output_dir = config.output_dir or f"runs/{config.task}" + f"_{config.preset}" * (config.preset != "small")
    return config
