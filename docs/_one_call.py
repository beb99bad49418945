"""The picture of docs/internals.md, and a check of its steps.

`python docs/_one_call.py` draws ``docs/_static/one_call.svg``. With ``--check`` it runs the call under a profiler and
compares: every step has to be made, in this order, in the file, by the function, and with as many transforms on the
stack as the table says. Run it after a function of the table has moved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple
from xml.sax.saxutils import escape

PICTURE = Path(__file__).parent / "_static" / "one_call.svg"


class Step(NamedTuple):
    """A step of the call.

    Attributes:
        does: the operation, for the picture.
        file: below the package.
        function: its qualified name.
    """

    does: str
    file: str
    function: str


class Part(NamedTuple):
    """Steps in one frame.

    Attributes:
        title: for the picture.
        level: the number of transforms on the stack.
        steps: in their order.
    """

    title: str
    level: int
    steps: list[Step]


PARTS = [
    Part(
        "caller's frame: vmap and grad run",
        2,
        [
            Step("the user's loss calls run", "solvers/_loop/function.py", "SolverFunction.__call__"),
            Step("choose the implicit derivative", "solvers/_loop/solver.py", "SolverImpl.run"),
            Step("lift grad f at the guess", "_closures/lift.py", "lift"),
            Step("take the transforms off", "solvers/_loop/lifted.py", "LiftedProblem._search"),
        ],
    ),
    Part(
        "below the transforms: plain rows",
        0,
        [
            Step("loop until every lane stops", "solvers/_loop/row_search.py", "until_stopped"),
            Step("one iteration of the method", "solvers/lbfgs.py", "_step"),
            Step("f and grad f, all lanes", "solvers/_loop/problem.py", "RowFunction.pull"),
            Step("judge the stopped lanes", "solvers/_loop/termination.py", "Termination.judge"),
        ],
    ),
    Part(
        "caller's frame: vmap and grad run",
        2,
        [
            Step("compare grad f at the solution", "_closures/lift.py", "confirmed_value"),
            Step("attach the derivatives", "_implicit/primitive.py", "attach"),
        ],
    ),
    Part(
        "below the transforms: plain tensors",
        0,
        [Step("return the known solution", "_implicit/primitive.py", "_ImplicitSolution.forward")],
    ),
    Part(
        "caller's frame: backward of grad",
        2,
        [Step("receive the cotangent", "_implicit/primitive.py", "_ImplicitSolution.backward")],
    ),
    Part(
        "below the transforms: plain tensors",
        0,
        [
            Step("compute the derivative", "_implicit/primitive.py", "_UnrecordedVjp.forward"),
            Step("one graph for all lanes", "_implicit/root.py", "RootProblem.unrecorded_vjp"),
            Step("solve Aᴴ u = x̄", "_implicit/linear_problem.py", "LinearProblem.primal"),
            Step("form the matrix of each lane", "_implicit/system.py", "_materialise_each"),
            Step("factorise: LAPACK's kernel", "linear_solve/lu.py", "lu"),
            Step("θ̄ = -Bᴴ u", "_implicit/linearisation.py", "JointLinearisation.pull_theta"),
        ],
    ),
    Part("caller's frame: the gradient of each lane", 2, []),
]

# --- the check --------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of a function of the package: its place, and how many transforms were on the stack."""

    file: str
    function: str
    level: int


def trace() -> list[Call]:
    """The calls that ``vmap(grad(loss))`` makes, with `lbfgs` in the loss, and a closed form that it agrees with."""
    import torch
    from torch import Tensor

    import implicitdiff
    from implicitdiff import solvers

    package = Path(implicitdiff.__file__).parent
    calls: list[Call] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            stack = torch._C._functorch.get_interpreter_stack()
            file = path.relative_to(package).as_posix()
            calls.append(Call(file, frame.f_code.co_qualname, 0 if stack is None else len(stack)))

    def f(x: Tensor, theta: Tensor) -> Tensor:
        return ((x - theta) ** 2).sum() / 2 + (x**4).sum() / 4

    # A compiled loop repeats the operations of these functions without a call of them.
    solver = solvers.lbfgs(f, compile="off")

    def minimiser(theta: Tensor) -> Tensor:
        return solver.run(torch.zeros(3, dtype=torch.float64), theta)[0]

    thetas = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sys.setprofile(profile)
    gradient = torch.func.vmap(torch.func.grad(lambda theta: (minimiser(theta) ** 2).sum()))(thetas)
    sys.setprofile(None)
    x = torch.func.vmap(minimiser)(thetas)
    torch.testing.assert_close(gradient, 2 * x / (1 + 3 * x**2))
    return calls


def check() -> None:
    """Raise unless every step is made, in the order of the table."""
    calls, at = trace(), 0
    for part in PARTS:
        for step in part.steps:
            wanted = Call(step.file, step.function, part.level)
            if wanted not in calls[at:]:
                levels = sorted({call.level for call in calls if call[:2] == wanted[:2]})
                raise SystemExit(f"{wanted} is not called there; it is called with {levels} transforms on the stack")
            at = calls.index(wanted, at) + 1


# --- the picture ------------------------------------------------------------------------------------------------------

WIDTH, MARGIN, BOX, GAP, TITLE = 360, 10, 46, 8, 30
STYLE = """
  svg { font-family: system-ui, sans-serif; }
  .page { fill: #ffffff; }
  .caller { fill: #e3edf9; } .below { fill: #f8ead6; }
  .box { fill: #ffffff; stroke: #8a8f98; }
  text { fill: #1b1f24; font-size: 14px; }
  .title { font-size: 13px; font-weight: 600; }
  .code { font-family: ui-monospace, monospace; font-size: 12px; fill: #3d444d; }
  .arrow { stroke: #57606a; stroke-width: 1.5; fill: none; } .head { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16181d; }
    .caller { fill: #1d2c42; } .below { fill: #40311c; }
    .box { fill: #23272e; stroke: #6b7280; }
    text { fill: #f0f2f5; } .code { fill: #c3c9d2; }
    .arrow { stroke: #a8b0bb; } .head { fill: #a8b0bb; }
  }
"""


def draw() -> str:
    """The steps from top to bottom, in a band for each frame."""
    y, number = MARGIN, 0
    drawn: list[str] = []
    arrows: list[str] = []
    for i, part in enumerate(PARTS):
        height = TITLE + len(part.steps) * (BOX + GAP)
        frame = "below" if part.level == 0 else "caller"
        drawn.append(
            f'<rect class="{frame}" x="{MARGIN}" y="{y}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="6"/>'
        )
        drawn.append(f'<text class="title" x="{MARGIN + 10}" y="{y + 20}">{escape(part.title)}</text>')
        for k, step in enumerate(part.steps):
            number += 1
            top = y + TITLE + k * (BOX + GAP)
            drawn += box(number, step, top)
            leaves = k == len(part.steps) - 1 and i < len(PARTS) - 1
            if part.steps[k + 1 :] or leaves:
                arrows += arrow(top + BOX, 2 * GAP + MARGIN if leaves else GAP)
        y += height + MARGIN + GAP
    inside = "\n".join([*drawn, *arrows])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">\n'
        f"<title>One call of vmap(grad(loss)), step by step</title>\n<style>{STYLE}</style>\n"
        f'<rect class="page" width="{WIDTH}" height="{y}"/>\n{inside}\n</svg>\n'
    )


def box(number: int, step: Step, y: int) -> list[str]:
    x = MARGIN + 8
    code = f"{Path(step.file).name}: {step.function}"
    # About as many letters as the box is wide.
    squeezed = ' textLength="308" lengthAdjust="spacingAndGlyphs"' if len(code) > 42 else ""
    return [
        f'<rect class="box" x="{x}" y="{y}" width="{WIDTH - 2 * x}" height="{BOX}" rx="4"/>',
        f'<text x="{x + 8}" y="{y + 19}">{number}. {escape(step.does)}</text>',
        f'<text class="code" x="{x + 8}" y="{y + 37}"{squeezed}>{escape(code)}</text>',
    ]


def arrow(y: int, length: int) -> list[str]:
    x, end = WIDTH - 40, y + length
    return [
        f'<path class="arrow" d="M{x} {y}V{end - 4}"/>',
        f'<path class="head" d="M{x - 4} {end - 6}h8l-4 6z"/>',
    ]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        check()
    else:
        PICTURE.write_text(draw())
