"""Sizes of networks that a test builds in no time, and the cameras and the normaliser that they need."""
from dataclasses import replace

from episodes import Normalizer
from geometry import Camera, Cameras
from policy import PolicyConfig
from reflector import ReflectorConfig
from world_model import WorldModelConfig

L, SIZE = 4, 16  # control steps in a chunk; height and width of a picture
CAMERAS = Cameras(Camera(45.0, [0.9, 0.0, 0.65], [[0.0, -0.6, 0.8], [1.0, 0.0, 0.0], [0.0, 0.8, 0.6]]),
                  Camera(75.0, [0.05, 0.0, -0.097], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]), plane_z=0.0)
NORMALIZER = Normalizer([-1.0] * 7, [1.0] * 7, [-0.3, -0.3, 0.0, -3.5, -3.5, -3.5, 0.0, -0.04],
                        [0.3, 0.3, 0.5, 3.5, 3.5, 3.5, 0.04, 0.0])
POLICY = replace(PolicyConfig.tiny(), image_size=SIZE, chunk_size=L)
WORLD = WorldModelConfig(image_size=SIZE, channels=(16, 32), chunk_size=L, state_width=32, grasp_channels=8, neighbours=0,
                         attention=False, grasp_dropout=0.0)  # dropout is the one thing that processes draw apart
REFLECTOR = ReflectorConfig(channels=8, width=16, dropout=0.0)
