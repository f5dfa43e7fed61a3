"""The program `registry`, also installed as `lorary`: registers the commands."""

import inspect
from collections.abc import Callable

import typer

from .commands.add_domain import add_domain
from .commands.alias import alias
from .commands.base import base
from .commands.chat import chat
from .commands.compose import compose
from .commands.diff import diff
from .commands.doctor import doctor
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.gc import gc
from .commands.generate import generate
from .commands.import_adapter import import_adapter
from .commands.init import init
from .commands.list import list_domains
from .commands.log import log
from .commands.pull import pull
from .commands.push import push
from .commands.quickstart import quickstart
from .commands.remove import remove, restore
from .commands.report import report
from .commands.retrain import retrain
from .commands.route import route
from .commands.search import search
from .commands.show import show
from .commands.verify import verify
from .commands.version import version
from .errors import ReportingGroup

app = typer.Typer(
    name="registry",
    cls=ReportingGroup,
    help="A continual-learning registry: a mixture of LoRA experts over a frozen language model. Add one domain after "
    "another without forgetting, and compose any of them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "quickstart": quickstart,
    "init": init,
    "base": base,
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
    "chat": chat,
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
    """Return the docstring with each paragraph on one line: rich wraps lines to the terminal."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for _name, _command in COMMANDS.items():
    app.command(_name, help=_help(_command))(_command)


def main() -> None:
    """Run the program."""
    app()
