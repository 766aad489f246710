"""What all requests have in common: strict types, and a word for every field that is not taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from qwenkit.errors import suggest
from qwenkit.server.errors import ApiError

Model = TypeVar("Model", bound=BaseModel)
UNKNOWN, REFUSED, SAID = "unknown_field", "refused_field", "said"


Item = TypeVar("Item")
# Lists of bounded length, of which the first wrong item ends the look: what pydantic does with a
# list is done in the event loop, and telling of a million wrong items would take it a minute.
Few = Annotated[list[Item], Field(fail_fast=True, max_length=128)]
Many = Annotated[list[Item], Field(fail_fast=True, max_length=4096)]


class Wire(BaseModel):
    """A JSON object of a request. A field that is not listed is an error naming the nearest one.

    `refused` are fields of the API that is followed which mean something that cannot be done here,
    and why. They may be given as null, which asks for nothing.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _look_at_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given, names = {}, _names(cls)
        for name, value in data.items():
            if name in names:
                given[name] = value
            elif name not in cls.refused:
                known = suggest(name, names)
                raise PydanticCustomError(
                    UNKNOWN, "unknown field. {known}", {"name": name, "known": known}
                )
            elif value is not None:
                raise PydanticCustomError(
                    REFUSED, "{reason}", {"name": name, "reason": cls.refused[name]}
                )
        return given


@cache
def _names(shape: type[BaseModel]) -> frozenset[str]:
    """The names of a shape's fields in JSON."""
    return frozenset(field.alias or name for name, field in shape.model_fields.items())


class Shape(BaseModel):
    """A JSON object of an answer, for the schema."""

    model_config = ConfigDict(extra="forbid")


def refusal(errors: Sequence[Any], body: Any) -> ApiError:
    """What pydantic found wrong with a body, as one refusal: the deepest finding, since those
    above it are only the other shapes that a field might have had.
    """
    found = [(_path(error, body), error) for error in errors]
    param, error = max(found, key=lambda one: one[0].count(".") + one[0].count("["))
    message = error["msg"]
    context = error.get("ctx") or {}
    if error["type"] in (UNKNOWN, REFUSED):
        param = f"{param}.{context['name']}" if param else str(context["name"])
        code = "unknown_parameter" if error["type"] == UNKNOWN else "unsupported_parameter"
        return ApiError(400, f"{param:.200}: {message}", param[:200], code)
    if error["type"] == "missing":
        return ApiError(400, f"{param}: this field is needed.", param, "missing_required_parameter")
    if error["type"] == SAID:
        return ApiError(400, f"{param}: {message}" if param else message, param or None)
    message = message[0].lower() + message[1:]
    given = repr(error.get("input"))
    shown = given if len(given) <= 80 else given[:77] + "..."
    return ApiError(
        400, f"{param or 'the body'}: {message}, got {shown}.", param or None, "invalid_value"
    )


def read(shape: type[Model], fields: Mapping[str, Any]) -> Model:
    """Fields that another API's request was put into. Raises ApiError for what they may not be."""
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        raise refusal(error.errors(), fields) from error


def _path(error: Mapping[str, Any], body: Any) -> str:
    """The place of an error in the body, as a client writes it: messages[0].content."""
    path, value = "", body
    places = list(error["loc"])
    if places and places[0] == "body":
        places = places[1:]
    for index, place in enumerate(places):
        is_last = index == len(places) - 1
        if isinstance(place, int) and isinstance(value, list) and place < len(value):
            path, value = f"{path}[{place}]", value[place]
        elif isinstance(place, str) and isinstance(value, dict) and place in value:
            path, value = (f"{path}.{place}" if path else place), value[place]
        elif is_last and error["type"] == "missing":
            path = f"{path}.{place}" if path else str(place)
        # All else is a name that pydantic gives to one of the shapes that a field may have.
    return path


def said(message: str) -> PydanticCustomError:
    """An error of a validator, in its own words."""
    return PydanticCustomError(SAID, "{message}", {"message": message})
