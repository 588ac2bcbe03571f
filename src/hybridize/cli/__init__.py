"""The command `hybridize`: one short function per verb; everything heavy is imported inside it."""

import os

import typer

from hybridize.cli.benching import bench
from hybridize.cli.converting import convert, merge, rank
from hybridize.cli.exchanging import export, import_
from hybridize.cli.jobs import plan, report, run
from hybridize.cli.judging import evaluate, throughput
from hybridize.cli.searching import search
from hybridize.cli.training import distill, fit, sft, traces

VERBS = (
    run,
    plan,
    traces,
    rank,
    search,
    convert,
    fit,
    distill,
    sft,
    merge,
    evaluate,
    throughput,
    report,
    import_,
    export,
)

app = typer.Typer(
    name="hybridize",
    help="Turn a pretrained reasoning transformer into a fast hybrid: rank, convert, distil, judge, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command(verb.__name__.strip("_"))(verb)
app.add_typer(bench)


def main() -> None:
    """Run the command; a user's mistake ends in one clear message and exit code 2.

    With HYBRIDIZE_DEBUG set, errors keep their traceback.
    """
    from hybridize.spec.base import StoppedError

    debug = bool(os.environ.get("HYBRIDIZE_DEBUG"))
    try:
        app()
    except (ValueError, ImportError, OSError, StoppedError) as error:
        if debug:
            raise
        stopped = isinstance(error, StoppedError)
        typer.echo(f"hybridize: {'stopped' if stopped else 'error'}: {_message(error)}", err=True)
        raise SystemExit(1 if stopped else 2) from None
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for its name
            raise
        remedy = "use smaller batches (rows_per_batch, batch_size) or a shorter sequence_length"
        typer.echo(f"hybridize: stopped: {str(error).splitlines()[0]} {remedy}; the same command goes on", err=True)
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            typer.echo("hybridize: interrupted; the same command goes on from what is finished", err=True)
        raise


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}; check the path and its permissions"
    return str(error)
