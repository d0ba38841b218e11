"""The command `relish`: the four stages' commands in one place."""

import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .cache.commands import app as cache_app
from .cache.errors import RelishError
from .evaluate.commands import register as register_evaluate
from .extract.commands import register as register_extract
from .train.commands import register as register_train


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a job scheduler sends: it unwinds everything just as Ctrl-C does."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            with _sigterm_raises():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            typer.echo("interrupted; what is finished is kept: run the same command again to go on", err=True)
            raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
        except RelishError as error:
            typer.echo(f"error: {error}", err=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            # A full disk, a folder without permission, a file where a folder should be: the system says it best.
            place = f"{error.filename}: " if error.filename else ""
            typer.echo(f"error: {place}{error.strerror or error}", err=True)
        raise typer.Exit(2)


def _version(asked: bool) -> None:
    if asked:
        from .cache.version import __version__

        typer.echo(f"relish {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """RELISH text regression: predict a number from a text with a frozen LLM.

    extract runs the LLM once and caches its hidden states; train and evaluate work from the cache alone.
    """


register_extract(app)
app.add_typer(cache_app, name="cache")
register_train(app)
register_evaluate(app)


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may be no Unicode, and a terminal may lack a character: neither is worth an error after the work.
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
