"""Draw the README's network: paper/figures/lorta.svg."""

from pathlib import Path

import tnpeft

if __name__ == "__main__":
    figures = Path(__file__).parents[1] / "paper" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    line = "A[out r] B[dim r] H[head r] P[proj r] L[layer r] -> layer proj out (head dim)"
    sizes = {"layer": 24, "proj": 2, "out": 2048, "head": 32, "dim": 64, "r": 16}
    tnpeft.draw(tnpeft.network(line), figures / "lorta.svg", sizes)
