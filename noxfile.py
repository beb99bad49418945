from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nox

# The pins are the dependency groups of pyproject.toml; a session installs the groups that it names.
PROJECT = nox.project.load_toml("pyproject.toml")
# What makes one processor compute as another: as any can, as one with AVX2 does, and as this one does on two threads.
# There is no row for AVX-512, which would crash a processor without it; one that has it uses it in the last row.
PROCESSORS = (
    {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
    {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    {"OMP_NUM_THREADS": "2"},
)
# The tests that come closest to rounding: they compare what was computed in two ways, or search to the last digits.
ROUNDED = (
    "tests/test_meta_gradients.py::test_second_derivatives_of_several_tasks_are_those_of_each",
    "tests/test_meta_gradients.py::test_tasks_that_share_their_start_are_what_each_is_alone",
    "tests/test_meta_gradients.py::test_what_is_learned_may_differ_from_task_to_task",
    "tests/test_modules.py::test_any_method_may_solve",
    "tests/test_search_closed_forms.py",
    "tests/test_searches.py::test_a_batch_is_its_lanes_one_by_one",
    "tests/test_searches.py::test_an_unrolled_batch_is_its_lanes_one_by_one",
    "tests/test_searches.py::test_the_initial_guess_alone_may_be_batched",
    "tests/test_searches.py::test_vmap_of_vmap_is_a_double_loop",
    "tests/test_searches.py::test_what_is_captured_may_be_batched",
)

# Selects what each change runs; the rest, and most examples, are left to `nox -s nightly`.
EACH_CHANGE = ("-m", "not nightly")
KERNELS = ("tests/test_kernels.py", "tests/test_kernel_calls.py")
# The files whose tests run searches: `nox -s loops` runs them with every loop eager, then with every loop compiled.
SEARCHES = (
    "tests/test_searches.py",
    *sorted(str(path) for path in Path("tests").glob("test_search_*.py")),
    "tests/test_solvers_agree.py",
    "tests/test_termination.py",
    "tests/test_bounds.py",
    "tests/test_problem_sets.py",
    "tests/test_problem_sets_roots.py",
    "tests/test_never_silent.py",
    "tests/test_no_false_alarm.py",
    "tests/test_solver_arguments.py",
)
DISTRIBUTED = tuple(sorted(str(path) for path in Path("tests").glob("test_distributed_*.py")))
MACHINE = tuple(sorted(str(path) for path in Path("tests").glob("test_machine*.py")))
# The files with tests that reach compiled steps where they are built, and a sample of searches, whose loops are eager
# where they are not.
# fmt: off
COMPILED = (
    "test_kernels.py", "test_kernel_calls.py", "test_machine.py", "test_recordings.py", "test_recorded_loops.py",
    "test_solvers_agree.py", "test_search_closed_forms.py", "test_control.py", "test_donation.py",
    "test_donation_refused.py", "test_recorded_views.py", "test_step_counts.py", "test_torch_optim.py",
    "test_rates.py", "test_states.py", "test_package.py", "test_pickling.py", "test_optim_arguments.py",
    "test_optim_parts.py", "test_optim_trees.py", "test_optimizer_fronts.py", "test_optimizer_checkpoints.py",
    "test_func_optimizer.py", "test_unroll.py", "test_meta_gradients.py", "test_meta_optimizers.py",
    "test_meta_optimizer_modules.py", "test_modules.py", "test_module_parameters.py", "test_autocast.py",
    "test_compile.py", "test_empty.py", "test_migrating.py", "test_solver_pickling.py",
)
# fmt: on
# Examples that each change runs; they take seconds.
QUICK = ("clean_labels", "extract_and_recover", "implicit_maml", "linear_fixed_point")
# Of the wheel: what it holds, that its compiled steps run, and a solver of each kind.
WHEEL = ("test_package.py", "test_layers.py", "test_kernel_calls.py", "test_solvers_agree.py")

# The schema of each file that only a forge reads.
SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/*_*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "citation-file-format": "CITATION.cff",
}

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "plain"]


def pins(*groups: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PROJECT, *groups)


def pinned_version(group: str) -> str:
    """Return the version of the first requirement of a group."""
    return pins(group)[0].partition("==")[2]


def install(session: nox.Session, *groups: str, **switches: str) -> None:
    # One pip call for pins and package together: a second one could move torch past its pin.
    session.install(*pins("runtime", *groups), ".", env=switches)


def install_peers(session: nox.Session) -> None:
    session.install(*pins("runtime", "peers"))


def install_data(session: nox.Session) -> None:
    session.install("--no-deps", *pins("data"))


def check(session: nox.Session, built: str, python: str = "python", **env: str) -> None:
    # -I keeps this folder off the path: compiled modules of an editable install may lie in it.
    session.run(python, "-I", "-m", "implicitdiff", env=env, external=True)
    session.run(python, "-I", "-c", f"from implicitdiff import _C; assert {built}", env=env, external=True)


def run_suite(session: nox.Session, pytest: str = "pytest", tests: Sequence[str] = ("tests",), **env: str) -> None:
    # One thread per worker: the workers already fill the cores.
    env = {"OMP_NUM_THREADS": "1", **env}
    session.run(pytest, "-n", "2", *tests, *session.posargs, env=env, external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Tune 29 hyperparameters on real data, beside three searches, and draw the result."""
    install(session, "matplotlib")
    install_data(session)
    session.run("python", "examples/tune_length_scales.py", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Run the examples, all or those named, each of which checks its own claims and draws a figure."""
    install(session, "examples")
    install_data(session)
    run_examples(session, session.posargs or sorted(path.stem for path in Path("examples").glob("*.py")))


def run_examples(session: nox.Session, names: Sequence[str]) -> None:
    for name in names:
        session.run("python", f"examples/{name}.py")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite, but for what is left to the night."""
    install(session, "test")
    # Where there is nvcc, the CUDA module is built too, unless switched off.
    if shutil.which("nvcc") and os.environ.get("IMPLICITDIFF_CUDA") != "0":
        check(session, "_C.cuda")
    run_suite(session, tests=("tests", "--durations=50", *EACH_CHANGE))
    # Its examples need the compiled modules; `plain` runs those of the other pages.
    session.run("pytest", "--doctest-glob=*.md", "docs/compiled.md")


@nox.session
def plain(session: nox.Session) -> None:
    """Run all checks that need no compiled code, in one environment without it."""
    install(session, "lint", "types", "test", "docs", "metadata", IMPLICITDIFF_NO_EXTENSIONS="1")
    check_style(session)
    check_metadata(session)
    session.run("mypy")
    run_doctests(session)
    build_docs(session, "-D", "plot_gallery=0")
    run_examples(session, QUICK)
    run_suite(session, tests=["tests/test_typing.py"])
    check(session, "_C.cpu is None and _C.cuda is None")
    run_suite(session, tests=(*(f"tests/{name}" for name in COMPILED), *EACH_CHANGE))
    run_suite(session, tests=("tests", "-k", "from_optimizer", *EACH_CHANGE))


@nox.session(name="tests-plain")
def tests_plain(session: nox.Session) -> None:
    """Run the whole test suite without compiled code."""
    install(session, "test", IMPLICITDIFF_NO_EXTENSIONS="1")
    check(session, "_C.cpu is None and _C.cuda is None")
    run_suite(session)


@nox.session
def nightly(session: nox.Session) -> None:
    """Run the whole test suite with compiled code and without, and the documentation with every example."""
    install(session, "test", "docs")
    install_data(session)
    run_suite(session)
    build_docs(session)
    # In the same environment, which differs by the compiled modules alone.
    session.install("--force-reinstall", "--no-deps", ".", env={"IMPLICITDIFF_NO_EXTENSIONS": "1"})
    check(session, "_C.cpu is None and _C.cuda is None")
    run_suite(session)


@nox.session
def processors(session: nox.Session) -> None:
    """Run the tests that come closest to rounding as other processors round."""
    install(session, "test")
    for env in PROCESSORS:
        run_suite(session, tests=ROUNDED, **env)


@nox.session
def programs(session: nox.Session) -> None:
    """Run the programs of other libraries, which the tests skip by name where a library is not installed."""
    install(session, "test", "programs")
    run_suite(session, tests=["tests/programs"])


@nox.session
def distributed(session: nox.Session) -> None:
    """Run the tests of several processes, and the examples of them on two."""
    install(session, "test", "examples")
    # These start processes themselves, so one worker runs them.
    session.run("pytest", *DISTRIBUTED, *session.posargs, env={"OMP_NUM_THREADS": "1"})
    for path in sorted(Path("examples").glob("distributed_*.py")):
        session.run("torchrun", "--nproc-per-node", "2", str(path))


@nox.session
def loops(session: nox.Session) -> None:
    """Run the tests of searches twice: every loop eager, then every loop compiled."""
    install(session, "test")
    for mode in ("off", "always"):
        run_suite(session, tests=(f"--compile={mode}", *SEARCHES, *EACH_CHANGE))


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the tests of the compiled code under the address and the undefined behaviour sanitizers."""
    install(session, "test", IMPLICITDIFF_SANITIZE="1", IMPLICITDIFF_CUDA="0")
    compiler = os.environ.get("CXX", "g++")
    # Python is not sanitized, so the runtimes have to be there before it.
    runtimes = [
        session.run(compiler, f"-print-file-name={name}", external=True, silent=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    check(session, "_C.cpu", **env)
    # Captured, a report would be lost with the process that it ends.
    run_suite(session, tests=("--capture=sys", *KERNELS, *MACHINE), **env)


@nox.session
def torchopt(session: nox.Session) -> None:
    """Run TorchOpt's own tests on a shim of its names: every seventh case, or with `-- --every=1` all of them."""
    install(session, "doctest")
    install_peers(session)
    suite, place = Path("tests/torchopt_suite").resolve(), Path(session.create_tmp()).resolve() / "torchopt"
    shutil.rmtree(place, ignore_errors=True)
    # Its release lacks what its tests import. TorchOpt itself is not checked out: the shim is what can be imported.
    source = ("--depth=1", f"--branch=v{pinned_version('torchopt')}", "https://github.com/metaopt/torchopt")
    session.run("git", "clone", "--quiet", "--no-checkout", *source, str(place), external=True)
    session.chdir(place)
    session.run("git", "checkout", "--quiet", "HEAD", "--", "pyproject.toml", "tests", external=True)
    env = {"PYTHONPATH": f"{suite}:{suite / 'shim'}", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    old = ("-Wignore:We've integrated functorch:FutureWarning", "-Wignore:JAXopt is no longer:DeprecationWarning")
    chosen = session.posargs or ["--every=7"]
    session.run("pytest", "-p", "left_out", "--quiet", "-rfExX", *old, *chosen, "tests", env=env)


@nox.session
def build(session: nox.Session) -> None:
    """Build the sdist and from it the wheel, and test the wheel in an empty environment: a sample, or what is asked."""
    session.install(*pins("build"))
    place = Path(session.create_tmp()).resolve()
    shutil.rmtree(place)
    place.mkdir()
    session.run("python", "-m", "build", "--outdir", str(place))
    (wheel,), (sdist,) = place.glob("*.whl"), place.glob("*.tar.gz")
    if sys.platform == "linux":
        wheel = repair(session, wheel)
    session.run("python", "-m", "venv", str(place / "empty"))
    python, pytest = (str(place / "empty/bin" / name) for name in ("python", "pytest"))
    session.run(python, "-m", "pip", "install", "--quiet", *pins("runtime", "test"), str(wheel), external=True)
    suite, kept = Path("tests").resolve(), Path("dist").resolve()
    session.chdir(place)
    check(session, "_C.cpu", python)
    run_suite(session, pytest, [str(suite)] if session.posargs else [str(suite / name) for name in WHEEL])
    kept.mkdir(exist_ok=True)
    for file in (sdist, wheel):
        session.log(f"dist/{shutil.copy(file, kept).rpartition('/')[2]}")


def repair(session: nox.Session, wheel: Path) -> Path:
    """Return the wheel under the oldest manylinux tag that auditwheel finds it to run on; fail if there is none."""
    command = PROJECT["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    folder = wheel.parent / "repaired"
    session.run(*(part.format(dest_dir=folder, wheel=wheel) for part in command.split()))
    (repaired,) = folder.glob("*.whl")
    if "manylinux" not in repaired.name:
        session.error(f"{repaired.name} has no manylinux tag")
    return repaired


@nox.session
def wheels(session: nox.Session) -> None:
    """Build and test a wheel for each version of Python on this system; on Linux in containers, which takes docker."""
    session.install(*pins("wheels"))
    session.run("cibuildwheel", "--output-dir", "dist", *session.posargs)


@nox.session(name="cuda-build")
def cuda_build(session: nox.Session) -> None:
    """Compile the CUDA module and import it, which takes nvcc and no GPU."""
    if not shutil.which("nvcc"):
        session.log("nvcc not found: CUDA not compiled")
        return
    install(session, IMPLICITDIFF_CUDA="1")
    check(session, "_C.cuda")


@nox.session(name="docs-test")
def docs_test(session: nox.Session) -> None:
    """Run the examples in the README, in the pages and in the docstrings; check the steps of docs/internals.md."""
    install(session, "doctest", IMPLICITDIFF_NO_EXTENSIONS="1")
    run_doctests(session)


def run_doctests(session: nox.Session) -> None:
    # What Python there is in docs/ configures Sphinx, or was put there by it.
    pages = ("--doctest-glob=*.md", "--ignore-glob=docs/*.py", "README.md", "docs")
    # The examples of this page need the compiled modules: `nox -s tests` runs them.
    pages += ("--ignore=docs/compiled.md",)
    session.run("pytest", "--doctest-modules", "implicitdiff", *pages)
    session.run("python", "docs/_one_call.py", "--check")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation: every warning an error, every example run for the gallery."""
    install(session, "docs", IMPLICITDIFF_NO_EXTENSIONS="1")
    install_data(session)
    build_docs(session, *session.posargs)


def build_docs(session: nox.Session, *options: str) -> None:
    for generated in ("docs/_build", "docs/api/generated", "docs/gallery"):
        shutil.rmtree(generated, ignore_errors=True)
    # The examples' operations are small: on several threads they lose time, on a busy machine most of it.
    env = {"OMP_NUM_THREADS": "1"}
    session.run("sphinx-build", "-W", "--keep-going", "-n", *options, "docs", "docs/_build/html", env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*pins("lint"))
    check_style(session)


def check_style(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the package's types."""
    install(session, "types", IMPLICITDIFF_NO_EXTENSIONS="1")
    session.run("mypy")


@nox.session
def metadata(session: nox.Session) -> None:
    """Check pyproject.toml, CITATION.cff and the files that only a forge reads, each by its linter."""
    session.install(*pins("metadata"))
    check_metadata(session)


def check_metadata(session: nox.Session) -> None:
    tables = ("setuptools", "cibuildwheel", "ruff", "mypy", "pytest")
    session.run("validate-pyproject", "pyproject.toml", "-E", *tables, env={"VALIDATE_PYPROJECT_NO_NETWORK": "1"})
    for schema, pattern in SCHEMAS.items():
        files = sorted(str(path) for path in Path().glob(pattern))
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)
    session.run("pre-commit", "validate-config")
    session.run("zizmor", "--offline", "--no-progress", ".github")
    if shutil.which("actionlint"):
        session.run("actionlint", external=True)
    else:
        session.log("actionlint is not on PATH: the workflows were not checked by it")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what a derivative and what a step costs."""
    install(session)
    session.run("python", "benchmarks/cost.py")
    session.run("python", "benchmarks/steps.py", *session.posargs)


@nox.session(name="bench-peers")
def bench_peers(session: nox.Session) -> None:
    """Measure derivatives and solvers beside other libraries and plain torch; `-- --save` keeps that for the page."""
    install(session, "quadratic")
    install_peers(session)
    # Without its torch, which may be another.
    session.install("--no-deps", *pins("torchopt"))
    for script in (("peers.py",), ("peers.py", "--memory"), ("stages.py",), ("solvers.py",)):
        session.run("python", f"benchmarks/{script[0]}", *script[1:], *session.posargs)
    write_page(session)


@nox.session(name="bench-growth")
def bench_growth(session: nox.Session) -> None:
    """Measure how times grow with unknowns, problems and parameters; `-- --save` keeps that, and draws it."""
    install(session, "matplotlib")
    session.run("python", "benchmarks/growth.py", *session.posargs)
    write_page(session)


@nox.session(name="bench-loops")
def bench_loops(session: nox.Session) -> None:
    """Measure loops of searches beside those of other libraries, and draw them; `-- --save` keeps that for the page."""
    install(session, "matplotlib")
    install_peers(session)
    for options in (("--threads", "1", "2"), ("--lanes",)):
        session.run("python", "benchmarks/loops.py", *options, *session.posargs)
    write_page(session)


@nox.session(name="bench-distributed")
def bench_distributed(session: nox.Session) -> None:
    """Measure gradients through many tasks on several processes, and draw that; `-- --save` keeps it for the page."""
    install(session, "matplotlib")
    session.run("python", "benchmarks/distributed.py", *session.posargs)
    write_page(session)


def write_page(session: nox.Session) -> None:
    if "--save" in session.posargs:
        session.run("python", "benchmarks/page.py")


@nox.session
def rates(session: nox.Session) -> None:
    """Count the problems of the field's test sets that the solvers solve, beside those of SciPy and other libraries."""
    install(session, "quadratic")
    install_peers(session)
    session.run("python", "benchmarks/rates.py", *session.posargs)


# The oldest torch that pyproject.toml takes, the pinned one, and the newest that these tests have passed on.
TORCHES = [pinned_version(group) for group in ("torch-oldest", "runtime", "torch-newest")]
# The files that depend most on what is private in torch; test_private_torch.py says what has changed, and for whom.
SAMPLE = ("private_torch", "closures", "kernels", "same_function", "decorators", "autograd_only", "linear_solve")
nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
@nox.parametrize("torch", TORCHES)
def versions(session: nox.Session, torch: str) -> None:
    """Run the canaries of torch's private names and a sample of the tests, by versions of torch and Python."""
    try:
        session.install(f"torch=={torch}", *pins("numeric", "test"))
    except nox.command.CommandFailed:
        session.skip(f"torch {torch} does not install on Python {session.python}")
    session.install("--no-deps", ".")
    run_suite(session, tests=[f"tests/test_{name}.py" for name in SAMPLE])
    run_suite(session, tests=["tests/test_transforms.py", "-k", "hessian"])
