"""The command line of the scripts: fields of dataclasses as flags, and a help text in groups.

`--help` shows what this project adds and what most runs set; `--help_all` every flag.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from transformers import HfArgumentParser

from common.errors import InputError
from common.flags import refuse_unknown

USUAL, OTHERS = "Training", "Other flags of transformers"


class _Formatter(argparse.HelpFormatter):
    """One spelling of every flag, short placeholders, and the default where it says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]
        if action.nargs == 0:
            return ", ".join(names)
        return f"{', '.join(names)} {self._format_args(action, 'TEXT')}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "?":
            return "True|False"
        return re.sub(r"\[(TEXT|N|X) \.\.\.\]", "...", super()._format_args(action, default_metavar))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default in (None, argparse.SUPPRESS, "", []) or action.nargs == 0 or "%(default)" in text:
            return text
        return text + (
            f" (default: {' '.join(map(str, default))})" if isinstance(default, list) else " (default: %(default)s)"
        )


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_all_help()  # type: ignore[attr-defined]
        parser.exit()


class DataclassParser(HfArgumentParser):
    """HfArgumentParser, strict about flags, whose help is in groups.

    Args:
        classes: dataclasses. Each is a group, named by its `title` or the first line of its docstring.
        usual: transformers' flags that --help shows under USUAL -> the help that replaces theirs.
    """

    def __init__(self, classes: Sequence[type], usual: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(classes, allow_abbrev=False, formatter_class=_Formatter)
        self.usual = usual
        self.add_argument(
            "--help_all",
            action=_HelpAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="Every flag, those of transformers included.",
        )
        kinds = {f.name: str(f.type) for kind in classes for f in dataclasses.fields(kind)}
        for action in self._actions:
            if action.choices is None:
                kind = kinds.get(action.dest, "")
                action.metavar = "X" if "float" in kind else "N" if "int" in kind else "TEXT"
            action.help = usual.get(action.dest, action.help)
            if isinstance(action, argparse._StoreFalseAction):  # the twin of a switch that is on, which has its help
                action.help = f"The same as --{action.dest} False."

    # -- parsing ---------------------------------------------------------------------------------------------------------

    def parse_args_into_dataclasses(self, args: Sequence[str] | None = None, **options: Any) -> tuple[Any, ...]:
        """As HfArgumentParser's.

        Raises:
            InputError: a flag that does not exist, a value that belongs to no flag.
        """
        refuse_unknown(self, args or ())
        *parsed, rest = super().parse_args_into_dataclasses(
            args, return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            raise InputError(f"{' '.join(rest)}: the flag before it takes one value, or none; --help lists the flags.")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        """Wrong values end in one sentence, without the usage of 200 flags."""
        raise InputError(f"{message} (--help lists the flags)")

    # -- help ------------------------------------------------------------------------------------------------------------

    def groups(self) -> list[tuple[str, list[argparse.Action]]]:
        """(title, flags) in the order of the classes; the last one holds what --help leaves out."""
        actions = {action.dest: action for action in reversed(self._actions)}  # reversed: not the --no_ twins
        seen, groups = {"help", "help_all"}, dict[str, list[argparse.Action]]()
        for kind in self.dataclass_types:
            for base in filter(dataclasses.is_dataclass, kind.__mro__):
                ours = not base.__module__.startswith("transformers.")
                title = getattr(base, "title", (base.__doc__ or "").split("\n")[0]) if ours else OTHERS
                for name in vars(base).get("__annotations__", {}):
                    if name in seen or name not in actions:
                        continue
                    seen.add(name)
                    groups.setdefault(USUAL if not ours and name in self.usual else title, []).append(actions[name])
        others = groups.pop(OTHERS, [])
        return [*groups.items(), (OTHERS, others)]

    def format_help(self) -> str:
        """The groups that concern most runs."""
        return self._format(self.groups()[:-1])

    def print_all_help(self) -> None:
        """Every group."""
        print(self._format(self.groups()))

    def _format(self, groups: list[tuple[str, list[argparse.Action]]]) -> str:
        formatter = self._get_formatter()
        formatter.add_text(
            f"{self.prog} --flag value ... | --config run.yaml (flags of the command line take precedence)"
        )
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text("--help_all lists every flag, transformers' own included.")
        return formatter.format_help()
