"""LIBERO, the true simulator, behind the same vector interface as the virtual environment (`virtual_env.VirtualEnv`).

`LiberoTask` is one simulated task in this process, `LiberoVectorEnv` one in each of B worker processes, stepped by action
chunks: Gymnasium's vector API, with contexts in `reset` and a leading chunk axis in actions.

A picture costs what its 310,000 triangles cost, whatever its size: frames are drawn at chunk boundaries, in exploration
twice a chunk, and `mesh_cell` merges close vertices, save in evaluation (ABLATIONS.md, "Where a true episode's time goes").

Shapes: B slots, V camera views, L action-chunk length, C, H, W image.
"""
from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import os

import gymnasium
import numpy as np
import torch

from distributed import light_children
from geometry import Camera, Cameras, opening
from runs import UserError

os.environ.setdefault("MUJOCO_GL", "egl")  # both must be set before the first import of mujoco; a user's value stays
os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa gains nothing from a second thread; the other core has its own process

CAMERAS = ("agentview", "robot0_eye_in_hand")
RENDER_SIZE = 128  # pixels; frames are averaged down to the size a model wants, or drawn as large as it wants
NO_OP = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
SETTLE_STEPS = 10
BENCHMARK_SEED = 80_000_000  # fixtures of the benchmark's initial states: no placement has them
STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}


def load_suite(name):
    """The benchmark object of a suite; UserError with the known names where there is none."""
    with _quiet():
        try:
            from libero.libero import benchmark
        except (ImportError, AttributeError, OSError) as error:
            raise UserError(f"LIBERO cannot be imported ({error}): pip install -r requirements.txt; for MUJOCO_GL="
                            f"{os.environ['MUJOCO_GL']}: apt-get install libegl1 libegl-mesa0 libgl1") from None
        suites = benchmark.get_benchmark_dict()
        if name not in suites:
            known = ", ".join(sorted(suite for suite in suites if suite in STEP_LIMITS))
            raise UserError(f"there is no suite '{name}': the standard ones are {known} (the installed benchmark also "
                            f"has {len(suites) - len(STEP_LIMITS)} variants of them)")
        return suites[name]()


def step_limit(suite, max_steps=0, chunk_size=1) -> int:
    """`max_steps`, or the suite's limit where that is 0 (a variant of a suite has that suite's); of it, whole chunks."""
    limit = max_steps or next((limit for name, limit in STEP_LIMITS.items() if suite.startswith(name)), 400)
    return limit // chunk_size * chunk_size


def initial_states(suite, task_id) -> np.ndarray:
    """The benchmark's 50 initial states (50, D) of a task. They are the test set: for evaluation alone."""
    try:
        with _quiet():
            return np.asarray(load_suite(suite).get_task_init_states(task_id))
    except FileNotFoundError:  # the benchmark's package knows some variants by name alone
        raise UserError(f"the installed benchmark has no initial states for {suite}: choose another --task") from None


@contextlib.contextmanager
def _quiet():
    """Keep LIBERO's and robosuite's import chatter out of the user's sight; errors still rise."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# One task
# ---------------------------------------------------------------------------------------------------------------------
class LiberoTask:
    """One LIBERO task in this process, without robosuite's observables and renderer (neither changes the physics).

    mesh_cell: edge (m) of the cells in which vertices of drawn meshes are merged; 0 draws the standard meshes.
    image_size: of the pictures that will be wanted; what is drawn is at least as large.
    """

    def __init__(self, suite, task_id, mesh_cell=0.0, image_size=RENDER_SIZE):
        benchmark = load_suite(suite)
        if not 0 <= task_id < benchmark.n_tasks:
            raise UserError(f"{suite} has no task {task_id}: its tasks are 0 to {benchmark.n_tasks - 1}")
        self.suite, self.task_id, self.mesh_cell, self.render_size = suite, task_id, mesh_cell, max(RENDER_SIZE, image_size)
        self.name, self.instruction = benchmark.get_task(task_id).name, benchmark.get_task(task_id).language
        with _quiet():
            from libero.libero.envs.env_wrapper import ControlEnv
            self.env = ControlEnv(bddl_file_name=benchmark.get_task_bddl_file_path(task_id), use_camera_obs=False,
                                  has_offscreen_renderer=False)
        self.env.env.hard_reset = False  # a soft reset gives the same trajectory 100 times faster
        self.env.env._update_observables = lambda force=False: None  # 25 updates a control step that nobody reads
        self.env.env._get_observations = lambda force_update=False: {}
        self._renderer, self._substeps = None, int(self.env.env.control_timestep / self.env.env.model_timestep)

    def reset(self, seed=0, init_state=None):
        """Start an episode: from `init_state` (D,), or from placements drawn with `seed` as the benchmark's were.
        No state holds where fixtures stand (stove, cabinet: they move by a few mm), so every reset draws that from `seed`;
        with `init_state` elsewhere than any placement has them.
        """
        if init_state is None:
            self._soft_reset(seed, joint_noise=0.02)
            init_state = self.env.get_sim_state()
        else:
            seed += BENCHMARK_SEED
        # First a reset, which gives the controller its goal: with another one the hand turns by up to 20 degrees.
        self._soft_reset(seed, joint_noise=0.0)
        if len(init_state) != len(self.env.get_sim_state()):
            raise UserError(f"the installed benchmark's initial states do not fit its task {self.task_id} of {self.suite}")
        self.env.set_init_state(init_state)
        for _ in range(SETTLE_STEPS):
            self.step(NO_OP)

    def _soft_reset(self, seed, joint_noise):
        np.random.seed(seed)  # LIBERO's placement samplers use numpy's global generator
        for fixture in self.env.env.fixtures_dict.values():  # LIBERO places what stands on one as if it were at the origin
            body = self.env.sim.model._model.body(fixture.root_body)
            body.pos[:], body.quat[:] = 0, (1, 0, 0, 0)
        robot = self.env.robots[0]
        robot.initialization_noise["magnitude"] = joint_noise
        robot.gripper.current_action = np.zeros(robot.gripper.dof)  # a soft reset forgets this one
        with _quiet():
            self.env.reset()

    def step(self, action) -> bool:
        """One control step (50 ms) with action (7,); True while the task's goal holds.

        robosuite's `step` to the bit, in half its time: it computes the whole dynamics three times a physics step and asks
        for success three times a control step. What depends on position and velocity alone is enough for the controller.
        """
        import mujoco
        sim, robot, action = self.env.sim, self.env.robots[0], np.clip(action, -1, 1)
        model, data = sim.model._model, sim.data._data
        sim.forward = lambda: None  # the controller asks for what mj_step1 has just computed
        for substep in range(self._substeps):
            mujoco.mj_step1(model, data)
            if substep == 0:
                robot.controller.set_goal(action[:6])
            robot.control(action)
            mujoco.mj_step2(model, data)
        del sim.forward
        self.env._post_process()
        return bool(self.env.check_success())

    def state(self) -> np.ndarray:
        """(8,) float32: gripper position (m), axis-angle (rad), two finger joints (m)."""
        robot, data = self.env.robots[0], self.env.sim.data
        w, *xyz = data.get_body_xquat(robot.robot_model.eef_name)
        # As robosuite and OpenVLA compute it: the quaternion is NOT flipped to one hemisphere, angles go up to 2 pi.
        length = np.sqrt(max(1 - w * w, 1e-12))
        axis_angle = np.array(xyz) / length * 2 * np.arccos(np.clip(w, -1, 1))
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([data.site_xpos[robot.eef_site_id], axis_angle, fingers]).astype(np.float32)

    def render(self) -> np.ndarray:
        """(V, H, W, 3) uint8 of both views, upright, `render_size` pixels."""
        if self._renderer is None:
            self._renderer = self._make_renderer()
        frames = []
        for camera in CAMERAS:
            with self._unseen_hidden(camera):
                self._renderer.update_scene(self.env.sim.data._data, camera, self._scene_option)
            frames.append(self._renderer.render())
        return np.stack(frames)

    @contextlib.contextmanager
    def _unseen_hidden(self, camera):
        """Draw only what the camera can see; all, where a light casts shadows or a box or plane in view mirrors."""
        model, data = self.env.sim.model._model, self.env.sim.data._data
        number, groups = model.camera(camera).id, model.geom_group.copy()
        x, y, z = ((data.geom_xpos - data.cam_xpos[number]) @ data.cam_xmat[number].reshape(3, 3)).T  # it looks along -z
        half = np.radians(model.cam_fovy[number]) / 2
        outside = np.maximum(np.maximum(np.abs(x), np.abs(y)) * np.cos(half) + z * np.sin(half), z)  # m, geoms' centres
        unseen = (groups == 1) & (model.geom_rbound > 0) & (outside > model.geom_rbound)
        mirrors = np.isin(model.geom_type, (0, 6)) & (model.geom_matid >= 0) & (model.mat_reflectance[model.geom_matid] > 0)
        if not model.light_castshadow.any() and not (mirrors & (groups == 1) & ~unseen).any():
            model.geom_group[unseen] = 3  # a group that is not drawn
        yield
        model.geom_group[:] = groups

    def _make_renderer(self):
        try:
            import mujoco
            self._scene_option = mujoco.MjvOption()
            self._scene_option.geomgroup[0] = 0  # collision shapes
            if self.mesh_cell:
                merge_vertices(self.env.sim.model._model, self.mesh_cell)
            return mujoco.Renderer(self.env.sim.model._model, self.render_size, self.render_size)
        except (ImportError, AttributeError, RuntimeError) as error:
            raise UserError(f"no picture can be drawn with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}): apt-get "
                            "install libegl1 libegl-mesa0 libgl1, or set MUJOCO_GL=osmesa (libosmesa6)") from None

    def cameras(self) -> Cameras:
        """Where both cameras are: the agent view in the world, the wrist camera in the gripper's frame."""
        model, data, robot = self.env.sim.model._model, self.env.sim.data, self.env.robots[0]
        agentview, wrist = (model.camera(name).id for name in CAMERAS)
        hand = data.get_body_xmat(robot.robot_model.eef_name).reshape(3, 3)
        offset = data.cam_xpos[wrist] - data.site_xpos[robot.eef_site_id]
        return Cameras(
            agentview=Camera(float(model.cam_fovy[agentview]), data.cam_xpos[agentview].tolist(),
                             data.cam_xmat[agentview].reshape(3, 3).tolist()),
            wrist=Camera(float(model.cam_fovy[wrist]), (hand.T @ offset).tolist(),
                         (hand.T @ data.cam_xmat[wrist].reshape(3, 3)).tolist()),
            plane_z=0.0 if self.env.env._arena_type == "floor" else float(self.env.env.workspace_offset[2]))

    def close(self):
        if self._renderer:
            self._renderer.close()
        self.env.close()


def merge_vertices(model, cell):
    """Simplify every drawn mesh of a compiled MuJoCo model in place, before its renderer is made.

    Vertices in one cell of `cell` metres become one of them and triangles that collapse are dropped. At 6 mm a LIBERO
    scene keeps a fifth of its triangles; at 128 pixels a picture changes by 2 of 255 grey levels in the mean.
    """
    drawn = model.geom_dataid[(model.geom_type == 7) & (model.geom_group == 1)]  # 7: mjGEOM_MESH; group 1: visual
    for mesh in np.unique(drawn):
        vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
        start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        cells = np.floor(model.mesh_vert[vertices] / cell).astype(np.int64)
        _, first, inverse = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        faces = first[inverse.reshape(-1)][model.mesh_face[start:start + count]]  # (count, 3)
        a, b, c = faces.T
        kept = np.flatnonzero((a != b) & (b != c) & (a != c))
        for array, values in ((model.mesh_face, faces), (model.mesh_facenormal, None), (model.mesh_facetexcoord, None)):
            values = array[start:start + count] if values is None else values
            array[start:start + len(kept)] = values[kept].copy()
        model.mesh_facenum[mesh] = len(kept)


def shrink(frames, size) -> np.ndarray:
    """(..., H, W, 3) uint8 averaged down to (..., 3, size, size) uint8; H must be a multiple of size."""
    factor, rest = divmod(frames.shape[-2], size)
    if rest or not factor:
        raise UserError(f"frames of {frames.shape[-2]} pixels cannot be averaged down to {size}: choose a divisor")
    frames = frames.reshape(*frames.shape[:-3], size, factor, size, factor, 3).mean(axis=(-4, -2))
    return np.moveaxis(np.round(frames).astype(np.uint8), -1, -3)


# ---------------------------------------------------------------------------------------------------------------------
# B tasks in B processes
# ---------------------------------------------------------------------------------------------------------------------
class LiberoVectorEnv(gymnasium.vector.VectorEnv):
    """One LIBERO task in each of `num_envs` processes: reset(contexts, mask) -> obs, info; step(actions (B, L, 7)) -> obs,
    reward, terminated, truncated, info.
    obs: images uint8 (B, V, 3, H, W), state (B, 8), instruction list[str]; tensors on `device`.
    info: success (B,) the goal holds in this frame, score (B,) the reflector's P(done) for it, NaN without a reflector.
    stop: what ends an episode before the step limit.  "oracle": the goal was reached, `linger` chunks ago.
          "self": the reflector has stopped (`rule`: StopRule).  "both": both, so that one episode tells what either stop
          would have given.  "none": nothing, and it tells that, too. The reward is 1 where the goal held at any step;
          with "self" and "none", where it holds at the end.
    stride: control steps between the frames that `recorded` gives, a divisor of chunk_size (default: that).
    """
    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}

    def __init__(self, suite, num_envs, image_size=64, chunk_size=8, max_steps=None, stop="oracle", linger=0,
                 mesh_cell=0.0, reflector=None, rule=None, device="cpu", stride=None):
        if stop != "oracle" and (reflector is None or rule is None):
            raise ValueError(f"stop='{stop}' needs a reflector and its rule")
        self.suite, self.num_envs, self.device = suite, num_envs, torch.device(device)
        self.chunk_size, self.stride, self.max_steps = chunk_size, stride or chunk_size, step_limit(suite, max_steps)
        self.stop, self.linger, self.reflector, self.rule = stop, linger, reflector, rule
        frame = gymnasium.spaces.Box(0, 255, (len(CAMERAS), 3, image_size, image_size), np.uint8)
        self.single_observation_space = gymnasium.spaces.Dict({
            "images": frame, "state": gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32),
            "instruction": gymnasium.spaces.Text(200)})
        self.single_action_space = gymnasium.spaces.Box(-1, 1, (chunk_size, 7), np.float32)
        self.observation_space, self.action_space = (gymnasium.vector.utils.batch_space(space, num_envs) for space in
                                                     (self.single_observation_space, self.single_action_space))
        context, self._pipes, self._processes = multiprocessing.get_context("spawn"), [], []
        for _ in range(num_envs):
            here, there = context.Pipe()
            self._processes.append(context.Process(target=_worker, daemon=True,
                                                           args=(there, suite, image_size, mesh_cell, self.stride)))
            with light_children():
                self._processes[-1].start()
            there.close()
            self._pipes.append(here)
        self._slots: list[dict | None] = [None] * num_envs

    def reset(self, contexts, mask=None):
        """Start `contexts[i]` in every slot where mask (B,) holds (default: all); the other slots stay as they are."""
        chosen = [i for i in range(self.num_envs) if mask is None or mask[i]]
        for i in chosen:
            prefix = contexts[i].history.executed if contexts[i].history else ()
            self._pipe(i, "send", ("reset", contexts[i].task_id, contexts[i].seed, contexts[i].init_state, prefix))
        for i in chosen:
            images, state, instruction = self._receive(i)
            self._slots[i] = {"first": images, "previous": images, "images": images, "state": state, "steps": 0,
                              "max_steps": contexts[i].max_steps or self.max_steps, "instruction": instruction,
                              "fingers": np.full(8, opening(state), np.float32), "reached": None,
                              "since": 0, "scores": [], "over": False,
                              "record": [(images[None], state[None], np.zeros(0, bool))]}
        return self._observe(), {}

    def step(self, actions):
        """Play one chunk, actions (B, L, 7) in environment units, in every slot whose episode is not over."""
        actions = actions.float().cpu().numpy()
        playing = [i for i, slot in enumerate(self._slots) if slot and not slot["over"]]
        for i in playing:
            self._pipe(i, "send", ("chunk", actions[i, :self._slots[i]["max_steps"] - self._slots[i]["steps"]]))
        terminated, truncated, success = torch.zeros(3, self.num_envs, dtype=torch.bool)
        reward = torch.zeros(self.num_envs)
        for i in playing:
            slot, (images, states, held) = self._slots[i], self._receive(i)
            slot["since"] += slot["reached"] is not None  # chunks since the goal was first reached
            if held.any() and slot["reached"] is None:
                slot["reached"] = slot["steps"] + int(held.argmax()) + 1
            slot["record"].append((images, states, held[self.stride - 1::self.stride]))
            fingers = np.append(opening(states[-1]), slot["fingers"][:-1])  # as `finger_history` has it
            slot |= {"previous": slot["images"], "images": images[-1], "state": states[-1], "fingers": fingers,
                     "steps": slot["steps"] + len(held)}
            success[i] = bool(held[-1])
        info = self._info(success)
        for i in playing:
            slot = self._slots[i]
            slot["scores"].append(float(info["score"][i]))
            stopped = self.stop != "oracle" and bool(self.rule.stops(np.array(slot["scores"])).any())
            once = slot["reached"] is not None
            enough = once and slot["since"] >= self.linger
            terminated[i] = {"oracle": enough, "self": stopped, "both": enough and stopped, "none": False}[self.stop]
            truncated[i] = slot["steps"] >= slot["max_steps"] and not terminated[i]
            slot["over"] = bool(terminated[i] or truncated[i])
            reward[i] = float(slot["over"] and (success[i] if self.stop in ("self", "none") else once))
        return self._observe(), *(tensor.to(self.device) for tensor in (reward, terminated, truncated)), info

    def lengths(self, i) -> tuple[int, int | None]:
        """Control steps of slot i's episode so far, and after how many of them its goal first held."""
        return self._slots[i]["steps"], self._slots[i]["reached"]

    def recorded(self, i, chunks) -> list[np.ndarray]:
        """Images (N+1, V, 3, H, W), states (N+1, 8), goal held (N,) every `stride` steps of slot i's first whole chunks."""
        return [np.concatenate(values) for values in zip(*self._slots[i]["record"][:chunks + 1])]

    def single_slots(self) -> list["LiberoVectorEnv"]:
        """Each process as an environment of one slot, so that each can play at its own pace, in a thread of its own."""
        singles = [copy.copy(self) for _ in range(self.num_envs)]
        for i, single in enumerate(singles):
            single.num_envs, single._pipes, single._slots = 1, [self._pipes[i]], [None]
        return singles

    def _gather(self, key):
        blank = next(slot for slot in self._slots if slot)
        return torch.from_numpy(np.stack([(slot or blank)[key] for slot in self._slots])).to(self.device)

    def _observe(self):
        return {"images": self._gather("images"), "state": self._gather("state"),
                "instruction": [slot["instruction"] if slot else "" for slot in self._slots]}

    def _info(self, success):
        score = torch.full((self.num_envs,), float("nan"))
        if self.reflector is not None:
            score = self.reflector.score(self._gather("first"), self._gather("previous"), self._gather("images"),
                                         [slot["instruction"] if slot else "" for slot in self._slots],
                                         self._gather("fingers")).cpu()
        return {"success": success.to(self.device), "score": score.to(self.device)}

    def _receive(self, i):
        kind, value = self._pipe(i, "recv")
        if kind == "user_error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"simulator process {i} failed:\n{value}")
        return value

    def _pipe(self, i, method, *arguments):
        try:
            return getattr(self._pipes[i], method)(*arguments)
        except (EOFError, OSError):
            raise UserError(f"simulator process {i} died (out of memory?): run the same command, with a lower --num_procs "
                            "where memory is short") from None

    def close_extras(self, **_):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            process.terminate()


def _worker(pipe, suite, image_size, mesh_cell, stride):
    """Serve one slot: one simulator at a time, made anew when the task changes (7 s)."""
    import signal
    import traceback
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    task = None
    while True:
        try:
            command, *arguments = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # skips the GL libraries' noise at interpreter exit
        try:
            if command == "reset":
                task_id, seed, init_state, prefix = arguments
                if task is None or task.task_id != task_id:
                    if task is not None:
                        task.close()
                    task = LiberoTask(suite, task_id, mesh_cell, image_size)
                task.reset(seed, init_state)
                for action in prefix:
                    task.step(action)
                reply = shrink(task.render(), image_size), task.state(), task.instruction
            else:
                (actions,), held, drawn = arguments, [], []
                for part in np.split(actions, range(stride, len(actions), stride)):
                    held += [task.step(action) for action in part]
                    drawn.append((shrink(task.render(), image_size), task.state()))
                reply = *map(np.stack, zip(*drawn)), np.array(held)
            pipe.send(("ok", reply))
        except UserError as error:
            pipe.send(("user_error", str(error)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))
