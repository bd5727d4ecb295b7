"""For every test: Ray's workers run at the tests' own priority."""

import os

# Ray starts workers at niceness 15, where a busy machine starves them until tests time out.
os.environ.setdefault("RAY_worker_niceness", "0")
