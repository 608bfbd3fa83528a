"""Pictures of networks: figures for papers, Mermaid for pages, plain text for terminals."""

from tnpeft.drawing.picture import compose, draw, figure
from tnpeft.drawing.text import mermaid, text

__all__ = ["compose", "draw", "figure", "mermaid", "text"]
