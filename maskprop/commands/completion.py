"""`maskprop completion`: a script that completes commands and options in a shell."""

from __future__ import annotations

import argparse
import sys

from maskprop.commands import Command

_BASH = """_maskprop() {{
    local words
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) words="{commands} --help --version" ;;
    esac
    [[ $COMP_CWORD -eq 1 ]] && words="{commands} --help --version"
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _maskprop maskprop
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="for which shell")


def run(arguments: argparse.Namespace) -> int:
    """Write the script to stdout."""
    from maskprop.cli import build_parser

    options = _options(build_parser())
    sys.stdout.write(_fish(options) if arguments.shell == "fish" else _bash(options, arguments.shell == "zsh"))
    return 0


def _options(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Options of every sub-command."""
    found: dict[str, list[str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found[name] = [option for a in sub._actions for option in a.option_strings if option.startswith("--")]
    return found


def _bash(options: dict[str, list[str]], zsh: bool) -> str:
    cases = "\n".join(f'        {name}) words="{" ".join(words)}" ;;' for name, words in options.items())
    script = _BASH.format(cases=cases, commands=" ".join(options))
    return ("autoload -U +X bashcompinit && bashcompinit\n" if zsh else "") + script


def _fish(options: dict[str, list[str]]) -> str:
    lines = ["complete -c maskprop -f -n __fish_use_subcommand -a '" + " ".join(options) + "'"]
    for name, words in options.items():
        lines += [f"complete -c maskprop -n '__fish_seen_subcommand_from {name}' -l {word[2:]}" for word in words]
    return "\n".join(lines) + "\n"


COMMAND = Command(
    "completion",
    "Print a script for shell completion.",
    add_arguments,
    run,
    '  eval "$(maskprop completion bash)"\n  maskprop completion fish > ~/.config/fish/completions/maskprop.fish',
)
