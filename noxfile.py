from __future__ import annotations

import nox

# Exact versions, so that a run today and a run next year check the same thing. They need
# Python 3.11 or newer; the package itself asks only for the floors in pyproject.toml.
PINS = {
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "scipy": "1.17.1",
    "scikit-learn": "1.9.1",
    "matplotlib": "3.11.2",
    "pytest": "9.2.0",
    "pytest-xdist": "3.8.0",
    "ruff": "0.17.6",
    "mypy": "2.4.1",
}
RUNTIME = ("torch", "numpy", "scipy")

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "docs-test", "lint", "typecheck"]


def pinned(*names: str) -> list[str]:
    return [f"{name}=={PINS[name]}" for name in names]


def install(session: nox.Session, *tools: str) -> None:
    # One pip call for pins and package together: a second one could move torch past its pin.
    session.install(*pinned(*RUNTIME, *tools), ".")


@nox.session
def demo(session: nox.Session) -> None:
    """Tune the penalties of a logistic regression and draw the result."""
    install(session, "scikit-learn", "matplotlib")
    session.run("python", "examples/tune_penalties.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite."""
    install(session, "pytest", "pytest-xdist")
    # One thread per worker: the workers already fill the cores.
    session.run("pytest", "-n", "2", "tests", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(name="docs-test")
def docs_test(session: nox.Session) -> None:
    """Run the examples in the README and in the docstrings."""
    install(session, "pytest")
    session.run("pytest", "--doctest-modules", "implicitdiff", "--doctest-glob=README.md", "README.md")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*pinned("ruff"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the package's types."""
    install(session, "mypy")
    session.run("mypy")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what a derivative costs."""
    install(session)
    session.run("python", "benchmarks/cost.py", *session.posargs)
