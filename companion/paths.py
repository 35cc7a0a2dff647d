"""Where things lie: the data that come with the package, the checkout (if there is one), and runs."""

from pathlib import Path

_ROOT = Path(__file__).parents[1]
CHECKOUT = _ROOT if (_ROOT / "book" / "_toc.yml").exists() else None
DATA = _ROOT / "data" if CHECKOUT else Path(__file__).parent / "data"  # in a wheel data/ is inside the package
PUBLISHED, PROTOCOLS, RESULTS, REASONER = (DATA / name for name in ("published", "protocols", "results", "reasoner"))
RUNS = (CHECKOUT or Path()) / "runs"  # results of long work; outside a checkout below the working directory


def checkout(what: str) -> Path:
    """The root of the repository.  Raises ValueError where the package was installed without one."""
    if CHECKOUT is None:
        raise ValueError(f"{what} needs the repository: clone it and run `make setup` there; a wheel has the libraries")
    return CHECKOUT
