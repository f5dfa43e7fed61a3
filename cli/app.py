"""The program: `registry`, also installed as `lorary`. Commands are registered here, and nothing else happens."""

import inspect
from collections.abc import Callable

import typer

from .commands.add_domain import add_domain
from .commands.compose import compose, generate
from .commands.diff import diff
from .commands.evaluate import evaluate, route
from .commands.export import export
from .commands.import_adapter import import_adapter
from .commands.init import init
from .commands.log import alias, log, remove, restore
from .commands.pull import pull, push, search
from .commands.quickstart import quickstart
from .commands.report import report
from .commands.retrain import retrain
from .commands.show import list_domains, show, version
from .commands.verify import doctor, gc, verify
from .errors import ReportingGroup

app = typer.Typer(
    name="registry",
    cls=ReportingGroup,
    help="A continual-learning registry of LoRA experts: add domains one after another to a frozen language model, "
    "forget nothing, compose any of them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "quickstart": quickstart,
    "init": init,
    "add-domain": add_domain,
    "retrain": retrain,
    "import": import_adapter,
    "export": export,
    "list": list_domains,
    "show": show,
    "log": log,
    "diff": diff,
    "alias": alias,
    "remove": remove,
    "restore": restore,
    "compose": compose,
    "generate": generate,
    "route": route,
    "evaluate": evaluate,
    "report": report,
    "push": push,
    "pull": pull,
    "search": search,
    "verify": verify,
    "gc": gc,
    "doctor": doctor,
    "version": version,
}


def _help(command: Callable[..., None]) -> str:
    """The docstring, each paragraph on one line: rich breaks lines where the terminal ends."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for _name, _command in COMMANDS.items():
    app.command(_name, help=_help(_command))(_command)


def main() -> None:
    """The entry point of the console scripts."""
    app()
