"""The pictures of docs/walkthrough.md, one per station, from the toy: `python -m lab.figures`.

    python -m lab.figures                     trains what is missing under runs/figures, then draws all ten
    python -m lab.figures --only rollout      one of them

Three short runs of one seed are trained: with the EMA pull, without it, and DMD2's. The students of few-steps are runs
of lab/steps.py, seed 0; other pictures use the student that comes along. They show what a quantity IS; which setting is
better is in results/, with seeds.
"""

from importlib import import_module
from pathlib import Path

from engine.errors import UserError
from engine.flags import Parser, fail

FOLDER = Path("docs/walkthrough")
FIGURES = {  # in the order of the stations -> the module that draws it, by a function of that name
    "noise-levels": "sampling",
    "distribution-matching": "losses",
    "latent-gan": "losses",
    "score-loss": "losses",
    "rollout": "sampling",
    "adversarial-gradient": "losses",
    "discriminator-maps": "losses",
    "score-lag": "losses",
    "preference": "sampling",
    "few-steps": "sampling",
}


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), default=list(FIGURES), help="names of pictures")
    args = parser.parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    from lab import figures_canvas  # here, so that a mistake is answered before torch is loaded

    lacking = None
    for name in args.only:
        draw = getattr(import_module(f"lab.figures_{FIGURES[name]}"), name.replace("-", "_"))
        path = FOLDER / f"{name}.png"
        try:
            figures_canvas.save(draw(), path)
        except UserError as e:
            lacking = e  # the other pictures are drawn first
            continue
        print(f"{path}, {path.stat().st_size // 1000} kB", flush=True)
    if lacking:
        fail(lacking)


if __name__ == "__main__":
    main()
