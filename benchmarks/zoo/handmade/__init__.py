"""Small networks written for this project, each around one thing that an engine can get wrong."""

from __future__ import annotations

from ..specimen import Zoo
from .attention import ATTENTION
from .convnets import CONVNETS
from .forwards import FORWARDS
from .layers import LAYERS
from .python import PYTHON
from .shapes import SHAPES

HANDMADE = Zoo()
for _zoo in (CONVNETS, ATTENTION, LAYERS, SHAPES, FORWARDS, PYTHON):
    for _specimen in _zoo.values():
        HANDMADE.add(_specimen)
