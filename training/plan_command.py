"""From the options of `fastdistill plan` to a method's configuration."""

from __future__ import annotations

from collections.abc import Sequence

from .recipe import MethodConfig
from .registry import config_class
from .settings import SettingsError, changed, from_dict, from_settings, leaves

_OPTIONS = {
    "batch": "trainer.batch_size",
    "roles": "trainer.memory.roles",
    "optimizer": "trainer.memory.optimizer",
    "checkpointing": "trainer.memory.checkpointing",
    "precision": "trainer.precision",
}


def planned_config(method: str, settings: Sequence[str] = (), **options: object) -> MethodConfig:
    """A method's configuration: its defaults, then settings "NAME=VALUE", then options of the command.

    Args:
        options: batch, roles, optimizer, checkpointing, precision; None is not given.

    Raises:
        ValueError: an unknown method or setting, or a value that cannot be, saying where it was read and what is known.
    """
    config = config_class(method)()
    given = [("--set ", from_settings(settings))] if settings else []
    for option, value in options.items():
        if value is not None:
            # Of every stage: reflow within InstaFlow has a trainer of its own.
            names = [name for name, *_ in leaves(config) if f".{name}".endswith(f".{_OPTIONS[option]}")]
            given.append((f"--{option} {value}: ", from_settings([f"{name}={value}" for name in names])))
    for source, values in given:
        try:
            config = from_dict(type(config), values, config)
        except SettingsError as error:
            raise SettingsError(f"{source}{error}") from error.__cause__
    return changed(config)
