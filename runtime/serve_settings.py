"""The settings of ``ziggurat serve``: options before environment before a file, all by the names of the options."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import click
from click.core import ParameterSource
from pydantic import BaseModel, BeforeValidator, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ziggurat.runtime.errors import InvalidRequestError
from ziggurat.runtime.server.settings import ServerSettings

_PREFIX = "ZIGGURAT_"


def read_settings(context: click.Context, file: Path | None) -> tuple[ServerSettings, dict[str, Any]]:
    """Return what the server is told, and the values of all other options by their parameters' names.

    Every parameter of the command but ``config`` and switches of one run can be set; values from the environment and
    the file are read as the command line's are. Raises InvalidRequestError naming what is wrong and where.
    """
    settable = [each for each in context.command.params if each.name not in ("config", "verbose", "help")]
    parameters = {_key(parameter): parameter for parameter in settable}
    given = {
        key: context.params[parameter.name]
        for key, parameter in parameters.items()
        if parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }
    kind = _settings_class(context, parameters, file)
    try:
        found: BaseModel = kind(**given)
    except ValidationError as error:
        raise _refusal(error, given, parameters, file) from None
    except (OSError, ValueError) as error:  # TOML that cannot be read
        raise InvalidRequestError(f"--config {file}: cannot be read ({error})") from None
    values = {key: getattr(found, key) for key in kind.model_fields}
    server = ServerSettings(**{key: values[key] for key in ServerSettings.model_fields})
    others = {parameter.name or key: values[key] for key, parameter in parameters.items()}
    return server, {name: value for name, value in others.items() if name not in ServerSettings.model_fields}


def _key(parameter: click.Parameter) -> str:
    """Return the name of a setting: the option's, without dashes."""
    if isinstance(parameter, click.Argument):
        return parameter.name or ""
    return max(parameter.opts, key=len).removeprefix("--").replace("-", "_")


def _settings_class(
    context: click.Context, parameters: Mapping[str, click.Parameter], file: Path | None
) -> type[BaseSettings]:
    """Return a class with the server's fields, and one for each other option that is read as click reads it."""

    class Sources(BaseSettings, ServerSettings):
        model_config = SettingsConfigDict(
            env_prefix=_PREFIX, env_ignore_empty=True, extra="forbid", toml_file=file, validate_default=False
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
            if file is not None:
                file.open("rb").close()  # pydantic-settings takes a missing file for an empty one
                sources.append(TomlConfigSettingsSource(settings_cls))
            return tuple(sources)

    fields: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if key not in ServerSettings.model_fields:
            default = context.params[parameter.name or ""]
            fields[key] = (Annotated[Any, NoDecode, BeforeValidator(_as_click(parameter))], default)
    return create_model("Settings", __base__=Sources, **fields)


def _as_click(parameter: click.Parameter) -> Any:
    def convert(value: Any) -> Any:
        if getattr(parameter, "multiple", False):
            values: Sequence[Any] = value.split(",") if isinstance(value, str) else value
            return tuple(one(each) for each in values)
        return one(value)

    def one(value: Any) -> Any:
        try:
            return parameter.type.convert(str(value), parameter, None)
        except click.BadParameter as error:
            raise ValueError(error.message) from None

    return convert


def _refusal(
    error: ValidationError, given: Mapping[str, Any], parameters: Mapping[str, Any], file: Path | None
) -> InvalidRequestError:
    """Say in one line which setting is wrong, and where it is from."""
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, [*parameters, *ServerSettings.model_fields], 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return InvalidRequestError(f"{file}: there is no setting {key}{hint} (see: ziggurat serve --help)")
    message = str(first["msg"]).removeprefix("Value error, ").removesuffix(".")
    variable = (_PREFIX + key).upper()
    if key in given:
        where = f"--{key.replace('_', '-')}"
    elif variable in {name.upper() for name in os.environ}:
        where = f"{variable} in the environment"
    else:
        where = f"{file}: {key}"
    value = "" if key == "api_key" else f" {first['input']!r}"
    return InvalidRequestError(f"{where}{value}: {message}")
