"""Run a benchmark: ``python scripts/bench.py NAME [options]``, or ``all``, or ``goals``; see bench/driver.py."""

from bench.driver import main

if __name__ == "__main__":
    main()
