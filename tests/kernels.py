"""How many kernels a step of a method starts, and what its host waits for: what a method's own test states.

    python tests/kernels.py METHOD [METHOD ...]        prints what `tests/test_METHOD.py` must say

Forward, backward and what follows the step (teachers, queues) are counted together (benchmarks/counted.py), of the small
instance of the conformance checks.
"""

import ast
import sys
from pathlib import Path

from ssl_pretrain.conformance.one_step import STEP, after_step, batch, build, step
from ssl_pretrain.pretext import Method

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from counted import Counted

ROOT = Path(__file__).parents[1]


def counted(method: Method) -> Counted:
    """What the second step of a method starts and waits for; its first may set things up."""
    given = batch(method)
    for number in (STEP, STEP + 1):
        counted_step = step(number=number)
        with Counted() as count:
            losses = method(given, counted_step)
            losses.total.backward()
            after_step(method, counted_step, losses.carry)
        for parameter in method.parameters():
            parameter.grad = None
    return count


def stated(name: str, root: Path = ROOT) -> tuple[int, list[str]]:
    """KERNELS, and ON_THE_HOST ([] without it), of `tests/test_<name>.py`. Raises KeyError where there is no KERNELS."""
    body = ast.parse((root / "tests" / f"test_{name}.py").read_text()).body
    assigned = {ast.unparse(line.targets[0]): line.value for line in body if isinstance(line, ast.Assign)}
    if "KERNELS" not in assigned:
        raise KeyError(f"tests/test_{name}.py does not state KERNELS: python tests/kernels.py {name} prints it")
    waits = assigned.get("ON_THE_HOST")
    return ast.literal_eval(assigned["KERNELS"]), [] if waits is None else ast.literal_eval(waits)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        found = counted(build(each))
        print(f"KERNELS = {sum(found.kernels.values())}  # of a step: python tests/kernels.py {each}")
        if found.waits:
            print(f"ON_THE_HOST = {found.waits}  # write why nothing waits, or make it not wait")
