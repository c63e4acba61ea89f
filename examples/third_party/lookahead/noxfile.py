"""Sessions of development: nox -s tests, nox -s kit, nox -s lint."""

import nox

nox.options.sessions = ["lint", "tests"]


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests."""
    session.install("-e", ".", "pytest")
    session.run("pytest", *session.posargs)


@nox.session
def kit(session: nox.Session) -> None:
    """Do every check of hookline's kit on the installed plugin."""
    session.install(".", "pytest")
    session.run("pytest", "--hookline-plugin", "lookahead", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
