"""Write what every command and option does, for `mkdocs build`: in place of `<!-- commands -->`, from the parsers."""

import argparse
import functools
import html
import textwrap
from pathlib import Path
from unittest import mock

from hookline.cli import OWN, main
from hookline.installed import COMMANDS, installed

MARK = "<!-- commands -->"


def on_page_markdown(markdown, page, config, files):
    """Write the commands where the page has the mark."""
    if MARK not in markdown:
        return markdown
    own = [part for name in OWN for part in rendered(parser_of([name]))]
    brought = []
    for name, point in installed(COMMANDS).items():
        plugin = point.module.partition(".")[0].removeprefix("hookline_")
        known = (Path(config.docs_dir) / "plugins" / f"{plugin}.md").exists()
        whose = f"Of the plugin [{plugin}](plugins/{plugin}.md)." if known else f"Of {point.value}."
        brought += rendered(parser_of([name]), whose)
    return markdown.replace(MARK, "\n\n".join(own + brought))


def parser_of(words):
    """Return the parser that `hookline WORDS --help` asks."""
    asked = []
    with mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser: asked.append(parser)):
        try:
            main([*words, "--help"])
        except SystemExit:
            return asked[0]
    raise AssertionError(words)


class Recorder(argparse.HelpFormatter):
    """Keeps the arguments that a parser shows in its help."""

    def __init__(self, prog):
        super().__init__(prog)
        self.shown = []

    def add_argument(self, action):
        """Keep an argument, unless it is hidden or every command has it."""
        if action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
            self.shown.append(action)


def rendered(parser, whose=""):
    """Return the parts of the text on a command, and on its commands."""
    parser.formatter_class = functools.partial(argparse.HelpFormatter, width=80)
    usage = textwrap.dedent(parser.format_usage().replace("usage: ", " " * 7, 1)).strip()
    recorder = Recorder(parser.prog)
    parser.formatter_class = lambda prog: recorder
    parser.format_help()
    level = "#" * parser.prog.count(" ")
    parts = [f"#{level} {parser.prog}", f"{parser.description or ''} {whose}".strip(), f"```text\n{usage}\n```"]
    below = [action for action in recorder.shown if isinstance(action.choices, dict)]
    rows = [row(action, parser.prog) for action in recorder.shown if action not in below]
    if rows:
        parts.append("\n".join(["| argument | what it does |", "|---|---|", *rows]))
    if parser.epilog and parser.epilog.strip():
        parts.append(f"```text\n{parser.epilog.strip()}\n```")
    for action in below:
        for one in dict.fromkeys(action.choices.values()):
            parts += rendered(one)
    return parts


def row(action, prog):
    """Return the row of an argument."""
    names = ", ".join(action.option_strings)
    value = "|".join(map(str, action.choices or ())) or (action.dest.upper() if names else action.dest)
    value = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar or value
    if action.nargs in ("?", "*"):
        value = f"[{value}]"
    shown = names if action.nargs == 0 else f"{names} {value}" if names else value
    means = (action.help or "") % {**vars(action), "prog": prog}
    cells = [f"`{shown}`", html.escape(means[:1].upper() + means[1:], quote=False)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
