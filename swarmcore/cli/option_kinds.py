"""Kinds of command-line options, and how several of them are taken together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

FC = TypeVar("FC", bound="Callable[..., Any] | click.Command")

Option = Callable[[Any], Any]
"""A decorator of click's, or one made of several."""


def option(*names: str, **settings: Any) -> Callable[[FC], FC]:
    """As `click.option`, but a default is shown if there is one that says something."""
    shown = settings.get("default") not in (None, "", ())
    return click.option(*names, **({"show_default": shown} | settings))


def flag(*names: str, help: str, **settings: Any) -> Callable[[FC], FC]:
    return click.option(*names, is_flag=True, help=help, **settings)


def several(*names: str, metavar: str, help: str, **settings: Any) -> Callable[[FC], FC]:
    return option(*names, multiple=True, metavar=metavar, help=help, **settings)


def choice(name: str, *values: str, **settings: Any) -> Callable[[FC], FC]:
    return option(name, type=click.Choice(values), **settings)


def count(*names: str, min: int = 1, metavar: str = "N", **settings: Any) -> Callable[[FC], FC]:
    return option(*names, type=click.IntRange(min=min), metavar=metavar, **settings)


def number(
    *names: str, min: float | None = 0, max: float | None = None, **settings: Any
) -> Callable[[FC], FC]:
    return option(*names, type=click.FloatRange(min, max), **settings)


def options(*members: Option) -> Option:
    """All of ``members``, listed in this order."""

    def decorate(command: Any) -> Any:
        for member in reversed(members):
            command = member(command)
        return command

    return decorate


def gathered(name: str, make: Callable[..., Any], *members: Option) -> Option:
    """As `options`, but the command gets all their values in one argument, ``name``, made by ``make``."""
    fields = [parameter.name for parameter in click.command(options(*members)(lambda: None)).params]

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def wrapped(**values: Any) -> Any:
            return command(**{name: make(**{field: values.pop(field) for field in fields})}, **values)

        return options(*members)(wrapped)

    return decorate
