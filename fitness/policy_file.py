from dataclasses import dataclass
from typing import Any
FORMAT="evoprune-policy/1"
@dataclass(eq=False)
class PolicyFile:
    model: str
    fingerprint: str
    table: Any
    mask: Any
    probabilities: Any
    target: Any
STORE={}
def write_policy(p, path): path.write_text("{}"); STORE[str(path)]=p
def read_policy(path): return STORE[str(path)]
