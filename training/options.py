"""The options of a training script: declared once with default, range and help; read from preset, file and command.

    dataclass default  <  preset  <  the run that --resume goes on with  <  --config FILE  <  command line

The parser is transformers' `HfArgumentParser`. Nothing here imports torch, so that `--help` is there at once.
"""

import argparse
import gc
import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

from training.script import UserError, run

Options = TypeVar("Options")


@dataclass(frozen=True)
class Limits:
    """What values an option may have; of a list, each of its entries."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    choices: tuple[str, ...] = ()

    def violated_by(self, value: Any) -> str:
        """What is wrong with `value`, such as "must be at least 1"; empty if nothing is."""
        if self.choices:
            return "" if value in self.choices else f"choose {', '.join(self.choices[:-1])} or {self.choices[-1]}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return ""
        if not math.isfinite(value):
            return "must be a finite number"
        for name, holds in {
            "at_least": value >= self.at_least,
            "at_most": value <= self.at_most,
            "above": value > self.above,
            "below": value < self.below,
        }.items():
            if not holds:
                return f"must be {name.replace('_', ' ')} {getattr(self, name):g}"
        return ""


def option(default: Any, help: str, *, fixed: bool = False, group: str = "", **limits: Any) -> Any:
    """A field of an options dataclass. `fixed`: may not change when a run is resumed. `limits`: see `Limits`.

    `group` opens a group of --help, to which the fields that follow belong, too.
    """
    metadata = {"help": help.replace("%", "%%"), "limits": Limits(**limits), "fixed": fixed, "group": group}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check(options: Any) -> None:
    """Raises `UserError`, naming the option, if a value is out of its range."""
    for f in fields(options):
        value = getattr(options, f.name)
        limits = f.metadata.get("limits", Limits())
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and (problem := limits.violated_by(entry)):
                raise UserError(f"--{f.name} {entry}: {problem}.")


METAVARS = {"int": "N", "float": "X", "str": "NAME", "string_to_bool": "yes|no"}  # in --help

# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def answer_early(cls: type, presets: dict[str, dict] | None = None, default_preset: str | None = None) -> None:
    """Ends the program if the command line asks for --help or holds a wrong option; else does nothing.

    Called by a script before its heavy imports, so that the answer does not wait for them.
    """
    run(lambda argv: parse_options(cls, argv, presets, default_preset))
    gc.disable()  # until the next `run`: see `quick_imports`


def parse_options(
    cls: type[Options], argv: Sequence[str], presets: dict[str, dict] | None = None, default_preset: str | None = None
) -> Options:
    """The options of a run, checked; UserError, in one sentence, names what is wrong.

    `--config FILE` (YAML or JSON) sets options by name; `--resume` takes up those of the run in `--output_dir`, and
    refuses to change the ones that would make it another run. `--help` shows the defaults of the preset beside it.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--config", "--output_dir"):
        first.add_argument(name, name.replace("_", "-"))
    first.add_argument("--resume", nargs="?", const="true", default="false")
    try:
        early, _ = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name.split('/')[0]}: {error.message}.") from error

    from_file = read_config_file(cls, early.config) if early.config else {}
    preset = early.preset or from_file.get("preset")
    output_dir = early.output_dir or from_file.get("output_dir")
    resume = early.resume.lower() in ("true", "1", "yes", "y", "t") or from_file.get("resume") is True
    defaults: dict[str, Any] = {}
    if presets is not None:
        if (preset or default_preset) not in presets:
            raise UserError(f"--preset {preset}: choose one of {', '.join(presets)}.")
        defaults |= presets[preset or default_preset] | {"preset": preset or default_preset}
    output_dir = output_dir or defaults.get("output_dir") or _default(cls, "output_dir")
    earlier = options_of_run(cls, output_dir) if resume else {}
    defaults |= earlier | from_file | {"output_dir": output_dir}
    if preset and earlier:
        defaults["preset"] = preset

    parser = build_parser(cls)
    parser.set_defaults(**defaults)
    namespace = vars(parser.parse_args(list(argv)))
    namespace.pop("config")
    options = cls(**namespace)
    if hasattr(options, "resume"):
        options.resume = resume
    check(options)
    if earlier:
        _check_unchanged(options, earlier)
    return options


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each line of --help, where there is one and the line does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_off = action.default is None or action.default is False or action.default == []
        says_nothing = is_off or "default: " in (action.help or "")
        return action.help if says_nothing else super()._get_help_string(action)


def build_parser(cls: type) -> argparse.ArgumentParser:
    """`HfArgumentParser` for one dataclass, with each option spelled once in --help, in the groups of the fields."""
    from transformers import HfArgumentParser  # imported when used: it takes most of a second

    bare = [(f.name, f.type, _with_help_only(f)) for f in fields(cls)]  # it hands all metadata to argparse
    parser = HfArgumentParser(
        make_dataclass(cls.__name__, bare), allow_abbrev=False, description=cls.__doc__, formatter_class=HelpFormatter
    )
    parser.usage = "%(prog)s [--config FILE] [options]"
    groups, group = {}, None
    for f in fields(cls):
        if title := f.metadata.get("group"):
            group = parser.add_argument_group(title)
        groups[f.name] = groups["no_" + f.name] = group
    for action in list(parser._actions):
        if len(action.option_strings) > 1 and action.dest != "help":
            action.option_strings = action.option_strings[:1]  # --batch-size is still understood
        if action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS  # the opposite of a switch, which is understood, too
        if action.nargs != 0:
            action.metavar = METAVARS.get(getattr(action.type, "__name__", ""), "NAME")
        if groups.get(action.dest) is not None:
            parser._optionals._group_actions.remove(action)
            groups[action.dest]._group_actions.append(action)
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML or JSON file with options by name")
    return parser


def _with_help_only(f: Field) -> Any:
    default = {"default": f.default} if f.default_factory is MISSING else {"default_factory": f.default_factory}
    return field(**default, metadata={"help": f.metadata.get("help", "")})


def read_config_file(cls: type, path: str) -> dict:
    """Options by name from a YAML or JSON file; UserError names an unknown one or a value of the wrong kind."""
    import yaml

    if not Path(path).is_file():
        raise UserError(f"--config {path}: there is no such file.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML or JSON ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must hold options as `name: value`.")
    return {name: _of_kind(cls, name, value, f"--config {path}") for name, value in content.items()}


def _of_kind(cls: type, name: Any, value: Any, source: str) -> Any:
    """`value`, if it is of the kind that the option `name` has; YAML reads 1e-4 as text, which is forgiven."""
    try:
        default = _default(cls, name)
    except StopIteration:
        raise UserError(f"{source}: there is no option {name!r}; see --help.") from None
    kind = str(next(f.type for f in fields(cls) if f.name == name))
    wanted = next((k for k in ("list", "bool", "int", "float", "str") if k in kind), type(default).__name__)
    if value is None and "None" in kind:
        return None
    if wanted == "float" and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif wanted == "list" and isinstance(value, list):
        entries = {"int": int, "float": (int, float), "str": str}[next(k for k in ("int", "float", "str") if k in kind)]
        if all(isinstance(entry, entries) and not isinstance(entry, bool) for entry in value):
            return value
    elif type(value).__name__ == wanted:
        return value
    raise UserError(f"{source}: {name}: {value!r} is not of the kind {wanted}.")


def _default(cls: type, name: str) -> Any:
    f = next(f for f in fields(cls) if f.name == name)
    return f.default_factory() if f.default_factory is not MISSING else f.default


# ----------------------------------------------------------------------------------------------------------------------
# Going on with a run
# ----------------------------------------------------------------------------------------------------------------------


def options_of_run(cls: type, folder: str | Path) -> dict:
    """The options that the run in `folder` was started with, as far as this version still knows them."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"--resume: {folder} holds no run to go on with (no config.json); check --output_dir.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, options = config.get("kind", cls.__name__), config["options"]
        if not options or not isinstance(options, dict):
            raise ValueError("it holds no options")
        if kind != cls.__name__:
            raise UserError(f"--resume: {folder} holds a run of another script ({kind}); check --output_dir.")
        known = [f.name for f in fields(cls) if f.name in options and f.name not in ("resume", "overwrite")]
        return {name: _of_kind(cls, name, options[name], str(file)) for name in known}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume: {file} is damaged ({error!r}); restore it, or start a new run.") from error


def _check_unchanged(options: Any, earlier: dict) -> None:
    fixed = [f.name for f in fields(options) if f.metadata.get("fixed")]
    if getattr(options, "lora_rank", 0):
        fixed.remove("pretrained")  # it may have moved: the checkpoint knows its weights
    for name in fixed:
        if name in earlier and getattr(options, name) != earlier[name]:
            free = ", ".join(f.name for f in fields(options) if not f.metadata.get("fixed"))
            raise UserError(
                f"--{name} {getattr(options, name)}: the run in {options.output_dir} has {earlier[name]}, and a "
                f"resumed run may change only {free}."
            )
