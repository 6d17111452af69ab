"""Bodies of other APIs as chats: the same prompt, limits and checks, with errors that name the fields of those APIs."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from soli.serve.chat_prompts import chat_batch
from soli.serve.errors import ApiError
from soli.serve.prompts import RequestBatch
from soli.serve.protocol_requests import ChatBody
from soli.serve.service import LoadedModel, ServiceLimits


def converted_batch(
    fields: Mapping[str, Any], names: Mapping[str, str], loaded: LoadedModel, limits: ServiceLimits
) -> RequestBatch:
    """The batch of a chat with these fields, with usage at the end of its chunks. `names`: fields of a chat and what
    the caller calls them, where that differs."""
    try:
        batch = chat_batch(ChatBody.model_validate(fields), loaded, limits)
    except ApiError as error:
        raise ApiError(error.status, str(error), _renamed(error.param, names), error.code) from error
    except ValidationError as error:
        first = error.errors()[0]
        param = _renamed(".".join(map(str, first["loc"])), names)
        raise ApiError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param) from error
    param_names = {field: _renamed(param, names) or param for field, param in batch.param_names.items()}
    return replace(batch, param_names=param_names, include_usage=True)


def _renamed(param: str | None, names: Mapping[str, str]) -> str | None:
    """A field of a chat in the words of another API, which have a tool's function in place."""
    if param is None:
        return None
    param = re.sub(r"^(tools\.[0-9]+)\.function\b", r"\1", param)
    for chat_name, name in names.items():
        if param == chat_name or param.startswith(f"{chat_name}."):
            return name + param[len(chat_name) :]
    return param
