"""A synthetic world: seeded, endless scenes of things and stuff with compositional names.

Names are a colour, a surface and a noun (``"red striped ball"``, ``"grey stone wall"``, ``"blue
sky"``). The unseen segmentation classes recombine words of the seen ones.
"""

from tools.scenes.dataset import SceneDataset, world_of_split
from tools.scenes.folder import write_folder
from tools.scenes.words import CLASS_NAMES, SEEN, Kind, words_of_world
from tools.scenes.world import IGNORE, WORLD_VERSION, Scene, World

__all__ = [
    "CLASS_NAMES",
    "IGNORE",
    "SEEN",
    "WORLD_VERSION",
    "Kind",
    "Scene",
    "SceneDataset",
    "World",
    "words_of_world",
    "world_of_split",
    "write_folder",
]
