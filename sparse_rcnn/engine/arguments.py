"""The flags and YAML files of ``python -m sparse_rcnn.train``: jsonargparse over the fields of ``TrainConfig``."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser

from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.suggestions import did_you_mean

RECIPES = Path(__file__).parents[1] / "assets" / "recipes"
_REQUIRED = ("data", "output")  # by a file, a flag, or on --resume the checkpoint


def read_arguments(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The fields of :class:`TrainConfig` that the command line and its YAML files give, and no others.

    Later ones win, as in ``--config paper_300 --config mine.yaml --epochs 12``. What cannot be parsed is one line on
    stderr and exit status 2; ``--print_config`` and ``--help`` exit with 0.
    """
    parser = TrainParser()
    words = parser.spelled(sys.argv[1:] if arguments is None else arguments)
    parser.parse_args(words)  # with the defaults, for --print_config
    given = parser.parse_args(words, defaults=False).as_dict()
    given.pop("config", None)
    # A printed configuration has null for what is required and was not given.
    return {name: value for name, value in given.items() if value is not None or name not in _REQUIRED}


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


class TrainParser(ArgumentParser):
    """One flag for each field of :class:`TrainConfig`, and ``--config``."""

    def __init__(self) -> None:
        super().__init__(
            prog="sparse_rcnn.train",
            description="Train a Sparse R-CNN on a data set in COCO, YOLO or Pascal VOC format.",
            epilog="With --resume everything that is not given keeps the value that the run was started with.",
            allow_abbrev=False,
        )
        self.reading = ""  # the configuration file that is being parsed, for errors
        self.hints = typing.get_type_hints(TrainConfig)
        names = ", ".join(recipes())
        self.add_argument(
            "--config", action=_Config, metavar="NAME|FILE", help=f"recipe ({names}) or YAML file; later ones win"
        )
        for field in dataclasses.fields(TrainConfig):
            self.add_argument(f"--{field.name.replace('_', '-')}", **_options(field, self.hints[field.name]))

    def spelled(self, arguments: Sequence[str]) -> list[str]:
        """Arguments as jsonargparse has them: ``--set.a=1`` for ``--set a=1``, ``[64, 80]`` for lists ``64 80``."""
        words: list[str] = []
        flag, items = "", []
        for word in arguments:
            if word.startswith("--"):
                flag, items = word, []
                words += [] if flag == "--set" else [word]
            elif flag == "--set":
                key, equals, value = word.partition("=")
                if not key or not equals:
                    self.error(f"--set: expected KEY=VALUE, got {word!r}")
                words.append(f"--set.{key.replace('-', '_')}={value}")
            elif _is_list(self.hints.get(flag[2:].replace("-", "_"))) and not word.startswith("["):
                if items:
                    words.pop()
                items.append(word)
                words.append(f"[{', '.join(items)}]")
            else:
                words.append(word)
        return words

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line, and exit with 2."""
        line = f"{self.prog}: error: {self.reading}{self._in_words(message)}\n"
        self.exit(2, line if distributed.first_to_complain() else None)

    def _in_words(self, message: str) -> str:
        if found := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            return f"{found[1]}: no such flag{did_you_mean(found[1], flags)}"
        if found := re.match(r"Option '(.+)' is not accepted", message):
            return f"{found[1]}: no such field{did_you_mean(found[1], self.hints)}"
        if found := re.match(r'Parser key "(\w+)"(.*?):.*(?:Given|Got) value: (.*)$', message, re.DOTALL):
            hint = self.hints.get(found[1])
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            return f"{found[1]}{found[2]}: expected {wanted.replace(' | None', ' or null')}, got {found[3]}"
        return " ".join(message.split())


class _Config(ActionConfigFile):
    """``--config``, which takes names of recipes too."""

    def __call__(self, parser: TrainParser, namespace: Any, value: str, option_string: str | None = None) -> None:
        path = Path(value)
        if not path.is_file():
            names = recipes()
            if value not in names:
                near = did_you_mean(value, names)
                parser.error(f"--config: expected a file or one of {', '.join(names)}, got {value!r}{near}")
            path = RECIPES / f"{value}.yaml"
        parser.reading = f"{path}: "
        super().__call__(parser, namespace, str(path), option_string)
        parser.reading = ""


def _options(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """The flag of a field, as ``add_argument`` takes it."""
    options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%"), "default": field.default}
    if field.default is dataclasses.MISSING:
        options["default"] = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    if hint is bool:
        options["action"] = ActionYesNo(no_prefix="no-")
    else:
        options["type"] = hint | None if options["default"] is None else hint
    return options


def _is_list(hint: Any) -> bool:
    """Whether the type of a field is a tuple, or a tuple or None."""
    return tuple in map(typing.get_origin, (hint, *typing.get_args(hint)))
