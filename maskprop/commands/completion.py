"""`maskprop completion`: a script that completes commands and options in a shell."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

from maskprop.commands import Command

_BASH = """_maskprop() {{
    local words
    case "${{COMP_WORDS[1]}}" in
{options}
        *) words="{commands} --help --version" ;;
    esac
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{choices}
    esac
    [[ $COMP_CWORD -eq 1 ]] && words="{commands} --help --version"
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _maskprop maskprop
"""


@dataclass
class _Words:
    """What can follow a sub-command: words, and after an option its choices."""

    words: list[str] = field(default_factory=list)
    choices: dict[str, list[str]] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="for which shell")


def run(arguments: argparse.Namespace) -> int:
    """Write the script to stdout."""
    from maskprop.cli import build_parser

    known = _commands(build_parser())
    sys.stdout.write(_fish(known) if arguments.shell == "fish" else _bash(known, arguments.shell == "zsh"))
    return 0


def _commands(parser: argparse.ArgumentParser) -> dict[str, _Words]:
    """The words of every sub-command."""
    found: dict[str, _Words] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found[name] = _words(sub)
    return found


def _words(parser: argparse.ArgumentParser) -> _Words:
    made = _Words()
    for action in parser._actions:
        options = [option for option in action.option_strings if option.startswith("--")]
        choices = [str(choice) for choice in action.choices or ()]
        made.words += options or choices
        made.choices |= {option: choices for option in options if choices}
    return made


def _bash(known: dict[str, _Words], zsh: bool) -> str:
    options = [f'        {name}) words="{" ".join(of.words)}" ;;' for name, of in known.items()]
    choices = [
        f'        "{name} {option}") words="{" ".join(values)}" ;;'
        for name, of in known.items()
        for option, values in of.choices.items()
    ]
    script = _BASH.format(options="\n".join(options), choices="\n".join(choices), commands=" ".join(known))
    return ("autoload -U +X bashcompinit && bashcompinit\n" if zsh else "") + script


def _fish(known: dict[str, _Words]) -> str:
    lines = ["complete -c maskprop -f -n __fish_use_subcommand -a '" + " ".join(known) + "'"]
    for name, of in known.items():
        here = f"complete -c maskprop -n '__fish_seen_subcommand_from {name}'"
        for word in of.words:
            values = f" -x -a '{' '.join(of.choices[word])}'" if word in of.choices else ""
            lines.append(f"{here} -l {word[2:]}{values}" if word.startswith("--") else f"{here} -f -a {word}")
    return "\n".join(lines) + "\n"


COMMAND = Command(
    "completion",
    "Print a script for shell completion.",
    add_arguments,
    run,
    '  eval "$(maskprop completion bash)"\n  maskprop completion fish > ~/.config/fish/completions/maskprop.fish',
)
