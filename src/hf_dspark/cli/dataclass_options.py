"""Options of a command out of the fields of dataclasses, so that a name, a default and a range are written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

Command = TypeVar("Command", bound=Callable[..., None])


def field_options(*records: type, only: Collection[str] | None = None, **defaults: Any) -> Callable[[Command], Command]:
    """Give a command one option for each field of some dataclasses, in place of its `**fields`.

    A field is an option where it was made with `training.configuration.option`, or is annotated with a `typer.Option`; with `only`, where
    it is named there too. `defaults` are those of fields whose default is another one in this command.
    """

    def decorate(command: Command) -> Command:
        parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        for record in records:
            hints = get_type_hints(record, include_extras=True)
            for one in fields(record):
                default = defaults.get(one.name, one.default)
                if only is None or one.name in only:
                    parameters += _parameter(one, hints[one.name], default)
        command.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
        return command

    return decorate


def take(record: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass among a command's options; what was not given has the dataclass's default."""
    names = [one.name for one in fields(record) if options.get(one.name) is not None]
    return {name: tuple(options[name]) if isinstance(options[name], list) else options[name] for name in names}


def _parameter(one: Field[Any], hint: Any, default: Any) -> list[inspect.Parameter]:
    if get_origin(hint) is not Annotated:
        if "help" not in one.metadata:
            return []
        items = next((get_args(part)[0] for part in (hint, *get_args(hint)) if get_origin(part) is tuple), None)
        if items is not None:  # an option that is given again for more
            hint, default = list[items] | None, None  # type: ignore[valid-type]
        names = filter(None, [one.metadata["flag"]])
        hint = Annotated[hint, typer.Option(*names, help=one.metadata["help"], min=one.metadata["least"], max=one.metadata["most"])]
    default = inspect.Parameter.empty if default is MISSING else default
    return [inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)]
