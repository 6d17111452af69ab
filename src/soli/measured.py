"""What was measured of this machine, remembered in `machine.json` of the cache folder: JSON, by kind and identity."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from soli.atomic_file import replace_file
from soli.errors import SoliError
from soli.input_files import read_object
from soli.kernels.cpu.build import cache_folder
from soli.sections import annotations_of, convert

log = logging.getLogger(__name__)

FILE: Final = "machine.json"


def remembered(kind: str, identity: str, record: type, measure: Callable[[], Any], renew: bool) -> Any:
    """A record of the cache's file, or a new one, which is written there."""
    path = cache_folder() / FILE
    records = _read_records(path)
    known = records.get(kind, {}).get(identity)
    if isinstance(known, dict) and not renew:
        try:
            types = annotations_of(record)
            return record(**{name: convert(name, value, types.get(name)) for name, value in known.items()})
        except (TypeError, SoliError):
            log.info("%s: has an old or damaged record, so it is measured again", path)
    measured = measure()
    records.setdefault(kind, {})[identity] = asdict(measured)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(records, indent=1))
    except (SoliError, OSError) as error:
        log.warning("what was measured is not remembered: %s", error)
    return measured


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    """By kind and identity; none where the file is damaged."""
    try:
        records = read_object(path) if path.exists() else {}
    except SoliError as error:
        log.warning("%s; measured again", error)
        return {}
    return {kind: table for kind, table in records.items() if isinstance(table, dict)}
