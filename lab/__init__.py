"""Experiments as commands: `python -m lab.NAME`. They write results/*.md and the pictures in docs/."""

import engine  # noqa: F401  first: it sets OpenMP's threads before torch is loaded
