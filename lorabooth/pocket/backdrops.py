"""The places of the pocket world by name.

Textures are smooth or made of large crisp pieces, since a small autoencoder must carry them.
"""

from collections.abc import Callable

import numpy as np

from lorabooth.pocket.landscapes import beach, desert, grass, night, snow
from lorabooth.pocket.settings import Backdrop
from lorabooth.pocket.surfaces import brick_wall, cobblestones, pink_fabric, water, wooden_floor

BACKDROPS: dict[str, Callable[[np.random.Generator, int], Backdrop]] = {
    "beach": beach,
    "snow": snow,
    "grass": grass,
    "wooden floor": wooden_floor,
    "brick wall": brick_wall,
    "night": night,
    "desert": desert,
    "water": water,
    "pink fabric": pink_fabric,
    "cobblestones": cobblestones,
}
