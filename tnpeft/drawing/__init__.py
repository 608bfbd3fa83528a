"""Pictures of networks: figures for papers, Mermaid for pages, plain text for terminals."""

from tnpeft.drawing.picture import compose, draw, figure, svg
from tnpeft.drawing.text import mermaid, text
from tnpeft.networks import display

__all__ = ["compose", "draw", "figure", "mermaid", "svg", "text"]

display.offer(svg)  # notebooks show it
