"""Pictures of networks: figures for papers, Mermaid for pages, plain text for terminals."""

from tnpeft.drawing.composition import compose
from tnpeft.drawing.markup import svg
from tnpeft.drawing.picture import draw, figure
from tnpeft.drawing.text import mermaid, text
from tnpeft.networks import display

__all__ = ["compose", "draw", "figure", "mermaid", "svg", "text"]

display.offer(svg)  # notebooks show it
