"""Evolution against random search on a planted target: synthetic layers, a hidden metric, distance between masks.

    python benchmarks/planted_target.py --evaluations 400
    python benchmarks/planted_target.py --hidden 'add(mul(abs(W),X_l2),mul(1000,mul(abs(W),G_l2)))'

Ten seeds, equal evaluations; prints the overlap with the hidden masks by seed, and the p-value of an exact paired
sign-flip test of the mean difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.search.planted import HIDDEN, Session, sign_flip_p

SEEDS = range(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=400)
    parser.add_argument("--hidden", default=HIDDEN, help="the metric to find")
    options = parser.parse_args()
    differences = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in SEEDS:
            found = {}
            for searcher in ("evolution", "random"):
                session = Session(
                    Path(scratch) / f"{searcher}-{seed}", seed=seed, searcher=searcher, hidden=options.hidden
                )
                session.go(options.evaluations)
                found[searcher] = session.overlap()
            differences.append(found["evolution"] - found["random"])
            print(f"seed {seed}: evolution {found['evolution']:.4f}, random {found['random']:.4f}", flush=True)
    p = sign_flip_p(differences)
    wins = sum(difference > 0 for difference in differences)
    print(f"{wins} of {len(differences)} seeds won, p = {p:.4f} (target: below 0.05)")


if __name__ == "__main__":
    main()
